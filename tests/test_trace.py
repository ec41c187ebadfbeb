"Trace: the order is right on networks with a known order, and the model, its gradients and all random states are unchanged"
import gc,random,weakref
from collections import OrderedDict,namedtuple

import numpy as np,pytest,timm,torch
from torch import nn
from torch.nn.utils import parametrizations

from fastai_discriminative.registry import *
from fastai_discriminative.trace import *
from fastai_discriminative.trace import input_sizes as _input_sizes

v4 = torch.zeros(2,4)

class Net(nn.Module):
    "Modules given by name; `fwd` says how they run"
    def __init__(self, fwd, **mods):
        super().__init__()
        self.fwd = fwd
        for k,m in mods.items(): setattr(self, k, m)
    def forward(self, *xs): return self.fwd(self, *xs)

def lin(ni=4, no=4): return nn.Linear(ni, no)
def wb(*names): return [f'{n}.{o}' for n in names for o in ('weight','bias')]

# ## Known orders

def test_definition_order_reversed():
    m = Net(lambda s,x: s.a(s.b(s.c(x))), a=lin(), b=lin(), c=lin())
    tr = trace_order(m, v4)
    assert sorted(tr.order[:2])==sorted(wb('c')) and sorted(tr.order[2:4])==sorted(wb('b')) and sorted(tr.order[4:])==sorted(wb('a'))
    assert tr.unused==[] and tr.device=='meta'
    assert tr.position=={n:i for i,n in enumerate(tr.order)}

def test_weight_before_its_position():
    "A parent uses a parameter between its children; a hook on modules would never see it"
    m = Net(lambda s,x: s.b(s.a(x)*s.scale+s.shift), scale=nn.Parameter(torch.ones(4)), shift=nn.Parameter(torch.zeros(4)), b=lin(), a=lin())
    order = trace_order(m, v4).order
    assert set(order[:2])==set(wb('a')) and order[2:4]==['scale','shift'] and set(order[4:])==set(wb('b'))

def test_shared_module_counts_at_its_first_use():
    m = Net(lambda s,x: s.a(s.b(s.a(x))), b=lin(), a=lin())
    tr = trace_order(m, v4)
    assert set(tr.order[:2])==set(wb('a')) and set(tr.order[2:])==set(wb('b')) and len(tr.order)==4

def test_tied_weights():
    emb,out = nn.Embedding(7,4),nn.Linear(4,7)
    out.weight = emb.weight
    m = Net(lambda s,x: s.out(s.mid(s.emb(x))), out=out, mid=lin(), emb=emb)
    tr = trace_order(m, torch.zeros(2,3,dtype=torch.long))
    assert tr.order[0]=='out.weight' and tr.order[-1]=='out.bias' and tr.unused==[]

def test_multihead_attention():
    attn = nn.MultiheadAttention(8, 2, batch_first=True)
    m = Net(lambda s,x: s.after(s.attn(s.norm(x), s.norm(x), s.norm(x))[0]), after=lin(8,2), attn=attn, norm=nn.LayerNorm(8))
    tr = trace_order(m, torch.zeros(2,5,8))
    assert set(tr.order[:2])==set(wb('norm')) and set(tr.order[-2:])==set(wb('after'))
    assert set(tr.order[2:6])=={'attn.in_proj_weight','attn.in_proj_bias','attn.out_proj.weight','attn.out_proj.bias'} and tr.order[2].startswith('attn.in_proj')

@pytest.mark.parametrize('meta', [True, False])
def test_transformer_encoder(meta):
    "torch's fast path puts a whole layer into one operation, so only the order of layers is to be had"
    enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(8,2,16,batch_first=True), 3, enable_nested_tensor=False)
    m = Net(lambda s,x: s.enc(x if meta or x.sum().item()<1 else -x), enc=enc)
    tr = trace_order(m, torch.zeros(2,5,8))
    assert [int(n.split('.')[2]) for n in tr.order]==[0]*12+[1]*12+[2]*12 and tr.unused==[]
    assert tr.device==('meta' if meta else 'cpu')

@pytest.mark.parametrize('cls', [nn.LSTM, nn.GRU])
def test_recurrent(cls):
    m = Net(lambda s,x: s.fc(s.rnn(s.proj(x))[0]), fc=lin(10,2), rnn=cls(4,5,num_layers=2,bidirectional=True), proj=lin())
    tr = trace_order(m, torch.zeros(3,2,4))
    assert set(tr.order[:2])==set(wb('proj')) and set(tr.order[-2:])==set(wb('fc'))
    assert all(n.startswith('rnn.') for n in tr.order[2:-2]) and len(tr.order)==4+16 and tr.unused==[]

def test_parametrized():
    m = Net(lambda s,x: s.b(s.c(s.a(x))), b=lin(), a=parametrizations.weight_norm(lin()), c=parametrizations.orthogonal(lin()))
    tr = trace_order(m, v4)
    assert {n.partition('.')[0] for n in tr.order[:3]}=={'a'} and {n.partition('.')[0] for n in tr.order[3:-2]}=={'c'} and set(tr.order[-2:])==set(wb('b'))
    assert tr.unused==[]

@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_old_weight_norm():
    "It keeps the computed weight as a plain attribute, which must not become a meta tensor"
    a = nn.utils.weight_norm(lin())
    m,w = Net(lambda s,x: s.b(s.a(x)), b=lin(), a=a),a.weight
    tr = trace_order(m, v4)
    assert {n.partition('.')[0] for n in tr.order[:3]}=={'a'} and tr.unused==[]
    assert a.weight is w and not w.is_meta

def test_spectral_norm_keeps_its_vectors():
    a = parametrizations.spectral_norm(lin())
    m = Net(lambda s,x: s.b(s.a(x)), b=lin(), a=a)
    was = {n:t.clone() for n,t in m.state_dict().items()}
    trace_order(m, v4)
    assert all(torch.equal(t, was[n]) for n,t in m.state_dict().items())

def test_parameter_list_and_dict():
    m = Net(lambda s,x: x*s.ps[1]+s.ps[0]+s.pd['k'], pd=nn.ParameterDict(dict(k=torch.ones(4))), ps=nn.ParameterList([torch.ones(4), torch.ones(4)]))
    assert trace_order(m, v4).order==['ps.1','ps.0','pd.k']

def test_parameters_in_a_list_argument():
    m = Net(lambda s,x: torch.cat([x, s.b, s.a]), a=nn.Parameter(torch.zeros(1,4)), b=nn.Parameter(torch.zeros(1,4)))
    assert trace_order(m, v4).order==['b','a']

def test_view_of_a_parameter_counts():
    m = Net(lambda s,x: s.a(x@s.w.t().reshape(4,4)), a=lin(), w=nn.Parameter(torch.zeros(4,4)))
    assert trace_order(m, v4).order[0]=='w'

@pytest.mark.parametrize('arch', ['test_vit','resnet10t','convnext_atto','test_efficientnet'])
def test_meta_and_real_run_agree(arch):
    m = timm.create_model(arch, num_classes=3)
    tr = trace_order(m)
    peek = Net(lambda s,x: s.m(x*(1 if x.sum().item()<1e9 else 2)), m=m)
    real = trace_order(peek, torch.zeros(1,*m.pretrained_cfg['input_size']))
    assert (tr.device, real.device)==('meta','cpu')
    assert [f'm.{n}' for n in tr.order]==real.order and tr.unused==real.unused==[]

# ## Where it runs

def test_plain_tensor_attribute_forces_a_real_run():
    m = Net(lambda s,x: s.b(s.a(x)+s.table), b=lin(), a=lin())
    m.table = torch.ones(4)
    tr = trace_order(m, v4)
    assert tr.device=='cpu' and set(tr.order[:2])==set(wb('a'))

def test_value_dependent_model_runs_for_real():
    m = Net(lambda s,x: s.a(x) if s.b(x).sum().item()>1e9 else s.b(x), a=lin(), b=lin())
    tr = trace_order(m, v4)
    assert tr.device=='cpu' and tr.unused==wb('a')

def test_model_on_meta_stays_there():
    with torch.device('meta'): m = Net(lambda s,x: s.a(s.b(x)), a=lin(), b=lin())
    tr = trace_order(m, v4)
    assert tr.device=='meta' and set(tr.order[:2])==set(wb('b')) and all(p.is_meta for p in m.parameters())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precision(dtype):
    m = timm.create_model('resnet10t', num_classes=3).to(dtype)
    tr = trace_order(m)
    assert tr.unused==[] and tr.order[0].startswith('conv1') and all(p.dtype==dtype for p in m.parameters())

@pytest.mark.parametrize('arch,kwargs', [('resnet10t',dict(in_chans=1)), ('test_vit',dict(in_chans=5)), ('test_vit',dict(img_size=64)), ('convnext_atto',dict(in_chans=2))])
def test_input_is_found(arch, kwargs):
    m = timm.create_model(arch, **kwargs)
    assert trace_order(m).unused==[]
    assert trace_order(nn.Sequential(m, nn.Linear(1000,2))).unused==[]

def test_first_convolution_tells_the_channels():
    m = nn.Sequential(nn.Conv2d(7,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2))
    assert (7,224,224) in _input_sizes(m) and trace_order(m).unused==[]

def test_input_size():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(), nn.Linear(4*6*6,2))
    assert trace_order(m, input_size=(3,8,8)).unused==[]
    with pytest.raises(SplitterError, match='`input_size`'): trace_order(m)

@pytest.mark.parametrize('bad', [224, '3x8x8', (3,8.,8), (3,0,8), (3,-8,8)])
def test_bad_input_size(bad):
    with pytest.raises(SplitterError, match=r'`input_size` must be \(channels, height, width\)'): trace_order(nn.Conv2d(3,4,3), input_size=bad)

# ## Inputs and outputs

def test_tuple_of_inputs():
    m = Net(lambda s,x,y: s.a(x)+s.b(y), b=lin(3,4), a=lin())
    assert set(trace_order(m, (v4, torch.zeros(2,3))).order[:2])==set(wb('a'))

def test_list_and_dict_as_one_input():
    m = Net(lambda s,x: s.a(x[1])+s.b(x[0]), b=lin(3,4), a=lin())
    assert set(trace_order(m, [torch.zeros(2,3), v4]).order[:2])==set(wb('a'))
    m = Net(lambda s,x: s.a(x['v'])+s.b(x['u']), b=lin(3,4), a=lin())
    assert set(trace_order(m, dict(u=torch.zeros(2,3), v=v4)).order[:2])==set(wb('a'))

def test_function_that_returns_the_input(): assert len(trace_order(lin(), lambda: v4).order)==2

def test_batch_on_its_own_device_is_untouched():
    x = torch.rand(2,4)
    was = x.clone()
    trace_order(Net(lambda s,x: s.a(x.add(1)), a=lin()), x)
    assert torch.equal(x, was)

Out = namedtuple('Out', 'logits aux')

@pytest.mark.parametrize('wrap', [lambda o: dict(out=o), lambda o: (o,[o]), lambda o: Out(o,None), lambda o: None])
def test_any_output(wrap): assert len(trace_order(Net(lambda s,x: wrap(s.a(x)), a=lin()), v4).order)==2

def test_output_has_the_right_shape(): assert trace_order(timm.create_model('resnet10t', num_classes=7)).output.shape==(1,7)

# ## What is not used

def test_unused_are_listed():
    m = Net(lambda s,x: s.a(x), spare=lin(), a=lin(), token=nn.Parameter(torch.zeros(3)))
    tr = trace_order(m, v4)
    assert tr.unused==['token','spare.weight','spare.bias'] and set(tr.order)==set(wb('a'))

def test_model_without_parameters():
    tr = trace_order(nn.ReLU(), v4)
    assert tr.order==tr.unused==[]

# ## Errors

def test_lazy_modules():
    m = nn.Sequential(nn.LazyConv2d(4,3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(SplitterError, match='Lazy parameters.*0.weight.*Run one batch'): trace_order(m)
    m(torch.zeros(1,3,8,8))
    assert trace_order(m, torch.zeros(1,3,8,8)).unused==[]

def test_failing_forward():
    def boom(s, x): raise KeyError('no such thing')
    m = Net(boom, a=lin())
    with pytest.raises(SplitterError, match="Net could not run a forward pass.*KeyError.*no such thing.*as `x`"): trace_order(m, v4)
    with pytest.raises(SplitterError, match='mat1 and mat2'): trace_order(lin(3,4), v4)

# ## Nothing is changed

def _fickle():
    "A net with everything that a forward pass could change"
    def fwd(s, x):
        s.calls += 1
        s.last = x
        s.seen += 1
        s.total = s.total+x.sum()
        x = s.drop(s.bn(s.a(x)))
        return s.b(x + random.random() + np.random.rand() + torch.rand(1, device=x.device))
    m = Net(fwd, a=lin(), bn=nn.BatchNorm1d(4), drop=nn.Dropout(0.5), b=lin())
    m.register_buffer('seen', torch.zeros(1))
    m.register_buffer('total', torch.zeros(1))
    m.calls = 0
    return m

def _peeking():
    "The same, but it cannot run on meta"
    m = _fickle()
    fwd = m.fwd
    m.fwd = lambda s,x: fwd(s, x*(1 if x.sum().item()<1e9 else 2))
    return m

@pytest.mark.parametrize('make,device', [(_fickle,'meta'), (_peeking,'cpu')])
@pytest.mark.parametrize('fails', [False, True])
def test_model_is_left_as_it_was(make, device, fails):
    m = make()
    if fails: m.b.forward = lambda x: 1/0
    m.bn.eval()
    m.a.bias.requires_grad_(False)
    m.a.weight.grad = torch.ones(4,4)
    ps,flags,state = dict(m.named_parameters()),{n:o.training for n,o in m.named_modules()},{n:t.clone() for n,t in m.state_dict().items()}
    bufs = dict(m.named_buffers())
    grads = {n:(p.requires_grad, p.grad) for n,p in ps.items()}
    if fails:
        with pytest.raises(SplitterError): trace_order(m, torch.rand(2,4))
    else: assert trace_order(m, torch.rand(2,4)).device==device
    assert all(p is ps[n] for n,p in m.named_parameters()) and all(b is bufs[n] for n,b in m.named_buffers())
    assert all(torch.equal(t, state[n]) for n,t in m.state_dict().items())
    assert {n:o.training for n,o in m.named_modules()}==flags
    assert all((p.requires_grad, p.grad)==grads[n] if p.grad is None else p.grad is grads[n][1] for n,p in m.named_parameters())
    assert m.calls==0 and not hasattr(m, 'last') and torch.is_grad_enabled()

@pytest.mark.parametrize('kind', [dict,OrderedDict])
def test_a_module_of_two_names_keeps_its_weights(kind):
    "torch's `functional_call` puts those of the trace in their place; older torch keeps them in an `OrderedDict`, and so does a learner that it exported"
    m = Net(lambda s,x: s.outer.inner(s.a(x)), a=lin(), outer=nn.Module())
    m.outer.inner = m.a
    for o in m.modules(): o._parameters = kind(o._parameters)
    w = m.a.weight
    assert trace_order(m, v4).device=='meta'
    assert m.a.weight is w and m.outer.inner.weight is w and not w.is_meta

@pytest.mark.parametrize('make', [_fickle,_peeking])
def test_random_states(make):
    def draws(): return torch.rand(3).tolist(),np.random.rand(3).tolist(),[random.random() for _ in range(3)]
    def seed():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
    seed()
    want = draws()
    seed()
    trace_order(make(), torch.zeros(2,4))
    seed()
    m = make()
    seed()
    trace_order(m, torch.zeros(2,4))
    assert draws()==want

def test_users_hooks_keep_working():
    m,seen = Net(lambda s,x: s.b(s.a(x)), b=lin(), a=lin()),[]
    pre = m.a.register_forward_pre_hook(lambda mod,i: (i[0]+1,))
    post = m.b.register_forward_hook(lambda mod,i,o: seen.append(o.shape))
    m.a.weight.register_hook(lambda g: g*0)
    trace_order(m, v4)
    seen.clear()
    m(v4).sum().backward()
    assert seen==[(2,4)] and not m.a.weight.grad.any() and m.b.weight.grad is not None
    assert len(m.a._forward_pre_hooks)==len(m.b._forward_hooks)==1
    pre.remove()
    post.remove()
    assert not m.a._forward_pre_hooks and not m.b._forward_hooks

def test_hook_that_needs_values_forces_a_real_run():
    m,seen = lin(),[]
    m.register_forward_hook(lambda mod,i,o: seen.append(o.sum().item()))
    assert trace_order(m, v4).device=='cpu'

def test_training_goes_on_the_same():
    def train(traced):
        torch.manual_seed(0)
        m = nn.Sequential(lin(), nn.BatchNorm1d(4), nn.Dropout(.5), lin())
        opt = torch.optim.AdamW(m.parameters())
        for i in range(4):
            if traced and i==2: trace_order(m, v4)
            opt.zero_grad()
            m(torch.rand(8,4)).pow(2).sum().backward()
            opt.step()
        return m.state_dict()
    a,b = train(False),train(True)
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_nothing_is_kept():
    alive = []
    def fwd(s, x):
        y = s.a(x)
        alive.append(weakref.ref(y))
        s.keep = y
        return y
    m = Net(fwd, a=lin())
    tr = trace_order(m, v4)
    gc.collect()
    assert len(alive)==1 and alive[0]() is None
    assert not any(isinstance(o, torch.Tensor) for o in (*tr.order, *tr.unused, tr.device))
    n = len([o for o in gc.get_objects() if type(o) is nn.Parameter])
    trace_order(m, v4)
    gc.collect()
    assert len([o for o in gc.get_objects() if type(o) is nn.Parameter])==n

def test_large_model_on_meta_without_memory():
    with torch.device('meta'): m = timm.create_model('resnet152')
    tr = trace_order(m)
    assert len(tr.order)==len(list(m.parameters())) and tr.device=='meta'

@pytest.mark.parametrize('arch', ['efficientvit_m0','levit_128s'])
def test_a_cache_of_the_model_is_as_it_was(arch):
    model = timm.create_model(arch).eval()
    trace_order(model)
    caches = [v for m in model.modules() for k,v in vars(m).items() if k=='attention_bias_cache']
    assert caches and not any(caches)

def test_a_module_with_two_names_keeps_its_weights():
    "torch's `functional_call` leaves the stand-in behind where one module has two names, as in fastai's AWD_LSTM"
    m = Net(lambda s, x: s.b(s.a(x)), a=lin(), b=lin())
    m.c = m.a
    was = dict(m.named_parameters())
    for x in (v4, torch.zeros(1,3)): # one that works, and one that fails
        try: trace_order(m, x)
        except SplitterError: pass
        assert all(p is was[n] for n,p in m.named_parameters()) and not any(p.is_meta for p in m.parameters())

def test_a_copy_is_no_use_yet():
    "Weights that are copied before the model runs are used where the copy is"
    def fwd(s, x):
        w = s.b.weight.clone()
        return nn.functional.linear(s.a(x), w, s.b.bias)
    tr = trace_order(Net(fwd, a=lin(), b=lin()), v4)
    assert sorted(tr.order[:2])==['a.bias','a.weight'] and sorted(tr.order[2:])==['b.bias','b.weight']
    m = Net(lambda s, x: (s.b.weight.clone(), s.a(x))[1], a=lin(), b=lin())
    assert trace_order(m, v4).unused==['b.weight','b.bias']
