"Layer groups: a partition in execution order with the head last for any model in any wrapper, the best cut, names that survive, and every fault named"
import pickle,re
from copy import deepcopy
from itertools import combinations
from types import SimpleNamespace

import numpy as np,pytest,timm,torch,torchvision
from fastai.torch_core import TensorBase
from fastai.vision.learner import create_body,create_timm_model,create_unet_model,create_vision_model
from torch import nn
from timm.models.vision_transformer import Block,VisionTransformer

from fastai_discriminative.groups import *
from fastai_discriminative.groups import _group_name,_natural,_partition
from fastai_discriminative.backbone import named_params as _named_params
from fastai_discriminative.paths import ModelLayer as _Layer,merge_small as _merge_small
from fastai_discriminative.rules import *
from fastai_discriminative.presets import *
from fastai_discriminative.registry import *
from fastai_discriminative.trace import _FirstUse

def _meta(arch, **kwargs):
    "A model without weights, or a real one where the oldest timm cannot make it without"
    try:
        with torch.device('meta'): return timm.create_model(arch, **kwargs)
    except (NotImplementedError,RuntimeError): return timm.create_model(arch, **kwargs)

def _names(model): return [n for n,_ in model.named_parameters()]

def _sound(groups, model):
    "Properties of all groups of all models"
    assert sorted(n for g in groups for n in g.param_names)==sorted(_named_params(model))
    assert all(g.param_names and g.layers for g in groups)
    ds = groups.depths
    assert ds==sorted(ds) and 0<=ds[0] and ds[-1]<=1
    assert len(set(ds))==len(ds) or len({l.run for l in groups.map.layers})>1, "only branches are equally deep"
    assert not any(g.is_head for g in groups[:-1])
    assert all(g.span[0]<=g.depth<=g.span[1] for g in groups)
    assert groups[-1].depth==1. if groups[-1].is_head else groups[-1].depth<1
    ps = _named_params(model)
    assert all(g.n_params==sum(ps[n].numel() for n in g.param_names) for g in groups)
    return groups

class Wrapper(nn.Module):
    "What people write around a backbone"
    def __init__(self, backbone, n_in, n_out=2):
        super().__init__()
        self.backbone,self.fc = backbone,nn.Linear(n_in, n_out)
    def forward(self, x): return self.fc(self.backbone(x))

def _chain(*no):
    "A plain net of linear layers, defined back to front"
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            for i in reversed(range(len(no)-1)): setattr(self, f'l{i}', nn.Linear(no[i], no[i+1]))
        def forward(self, x):
            for i in range(len(no)-1): x = getattr(self, f'l{i}')(x)
            return x
    return Chain()

# ## How many groups

archs = ['resnet18','convnext_tiny','vit_tiny_patch16_224','swin_tiny_patch4_window7_224','efficientnet_b0','vgg11','cait_xxs24_224','hrnet_w18_small','densenet121','deit_tiny_distilled_patch16_224']

@pytest.mark.parametrize('arch', archs)
def test_n_groups(arch):
    model = _meta(arch)
    blocks = _sound(layer_groups(model, 'block'), model)
    n = len(blocks)
    where = {l:i for i,g in enumerate(blocks) for l in g.param_names}
    for k in {k for k in (2, 3, 4, 6, 9, n//2, n-1, n) if k<=n}:
        gs = _sound(layer_groups(model, k), model)
        assert len(gs)==k and gs.n_layers==n
        runs = [sorted({where[o] for o in g.param_names}) for g in gs]
        assert sum(runs, [])==list(range(n)), "groups are runs of whole blocks"
    assert layer_groups(model, n).names==blocks.names
    assert 3<=len(_sound(layer_groups(model), model))<=10
    assert blocks.depths[0]==0 and np.allclose(np.diff(blocks.depths), 1/(n-1))

def test_numpy_integer(): assert len(layer_groups(_meta('resnet18'), np.int64(4)))==4

@pytest.mark.parametrize('bad', [0, -1, 1, 11, 1000])
def test_impossible_n_groups(bad):
    with pytest.raises(SplitterError, match=rf"resnet18\S* has 9 layers and a head, so n_groups={bad} is impossible. Use a number from 2 to 10, 'block'"):
        layer_groups(_meta('resnet18'), bad)

@pytest.mark.parametrize('bad', [3., '3', 'blok', True, [3], float('nan')])
def test_n_groups_of_a_wrong_kind(bad):
    with pytest.raises(SplitterError, match='n_groups=.* is not a number from 2 to 10') as e: layer_groups(_meta('resnet18'), bad)
    assert ("Did you mean 'block'" in str(e.value))==(bad=='blok')

def test_n_groups_of_a_headless_model():
    m = _meta('resnet18', num_classes=0)
    assert len(_sound(layer_groups(m, 1), m))==1 and not layer_groups(m, 1)[0].is_head
    with pytest.raises(SplitterError, match='has 9 layers, so n_groups=10.*from 1 to 9'): layer_groups(m, 10)

def test_default_of_the_family(own_families):
    register_family('groups_of_four', archs='FourNet', n_groups=4)(lambda m: m.children())
    class FourNet(nn.Sequential): pass
    m = FourNet(*[nn.Linear(4,4) for _ in range(8)])
    assert len(layer_groups(m))==4 and len(layer_groups(m, 'block'))==8
    m = FourNet(nn.Linear(4,4), nn.Linear(4,4))
    assert len(layer_groups(m))==2, "no more than there are layers"

# ## The cut

def _layers(sizes, stages): return [_Layer((f'{s}.{i}.w',), n, False, f'stages.{s}.{i}') for i,(n,s) in enumerate(zip(sizes, stages))]

def _cost(layers, starts):
    n,k,tot = len(layers),len(starts),sum(l.n_params for l in layers)
    w = [(l.n_params/tot + 1/n)/2 for l in layers]
    inside = sum(layers[s].stage==layers[s-1].stage for s in starts[1:])/(2*k)**2
    return sum(sum(w[a:b])**2 for a,b in zip(starts, [*starts[1:],n])) + inside

@pytest.mark.parametrize('seed', range(12))
def test_partition_is_optimal(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 10))
    layers = _layers(rng.integers(1, 1000, n)**int(rng.integers(1,3)), np.sort(rng.integers(0, 4, n)))
    for k in range(1, n+1):
        got = _partition(layers, k)
        assert len(got)==k and got[0]==0 and got==sorted(set(got))
        best = min(_cost(layers, [0,*c]) for c in combinations(range(1,n), k-1))
        assert _cost(layers, got)==pytest.approx(best, rel=1e-12)

def test_stage_borders_are_preferred():
    "Equal layers in stages of 3, 5 and 4: even runs of 4 would cut two stages, one layer more or less cuts none"
    assert _partition(_layers([10]*12, [0]*3+[1]*5+[2]*4), 3)==[0,3,8]
    assert _partition(_layers([10]*12, [0]*12), 3)==[0,4,8]

def test_groups_are_even_where_stages_do_not_matter():
    sizes = [len(r) for r in np.split(np.arange(24), _partition(_layers([5]*24, [0]*24), 6)[1:])]
    assert sizes==[4]*6

def test_natural_groups_are_stages():
    assert _natural(_layers([1]*9, [0]*3+[1]*3+[2]*3))==[0,3,6]
    assert layer_groups(_meta('resnet50')).names[1:]==['layer1.0-2','layer2.0-3','layer3.0-5','layer4.0-2','head']

def test_small_layers_ride_along():
    a,s = lambda n: _Layer((n,), 100, False, n), lambda n: _Layer((n,), 1, True, n)
    merged = _merge_small([s('token'), a('b0'), s('norm'), a('b1'), s('scale'), s('shift')])
    assert [(l.name, l.param_names) for l in merged]==[('b0', ('token','b0','norm')), ('b1', ('b1','scale','shift'))]
    assert [l.small for l in _merge_small([s('a'), s('b')])]==[True]
    assert _merge_small([])==[]

# ## The head

def test_bare_classifier_is_the_head():
    assert layer_groups(_meta('vit_tiny_patch16_224'))[-1].param_names==('head.weight','head.bias')
    gs = layer_groups(_meta('convnext_tiny'))
    assert gs[-1].param_names==('head.fc.weight','head.fc.bias') and 'head.norm.weight' in gs[-2].param_names

def test_classifier_of_two_parts():
    m = _meta('deit_tiny_distilled_patch16_224')
    assert set(_sound(layer_groups(m), m)[-1].param_names)=={'head.weight','head.bias','head_dist.weight','head_dist.bias'}

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','convnext_tiny','vgg11','cait_xxs24_224'])
def test_no_classifier_no_head(arch):
    m = _meta(arch, num_classes=0)
    assert not _sound(layer_groups(m), m)[-1].is_head

def test_fastai_body_and_head():
    m = create_timm_model('convnext_tiny', 2, pretrained=False)[0]
    gs = _sound(layer_groups(m), m)
    assert gs.rule=='registered' and gs.arch.startswith('convnext_tiny') and all(n.startswith('1.') for n in gs[-1].param_names)
    assert len(gs)==len(layer_groups(_meta('convnext_tiny')))
    check_splitter(Splitter('convnext_tiny'), m)

def test_wrapper_class():
    m = Wrapper(timm.create_model('test_vit', num_classes=5), 5)
    gs = _sound(layer_groups(m), m)
    assert gs.family=='vit' and set(gs[-1].param_names)=={'fc.weight','fc.bias','backbone.head.weight','backbone.head.bias'}
    check_splitter(Splitter(n_groups='block'), m)

def test_two_wrappers_deep():
    m = Wrapper(Wrapper(timm.create_model('resnet10t', num_classes=0), timm.create_model('resnet10t').num_features, 4), 4)
    gs = _sound(layer_groups(m, 'block'), m)
    assert gs.rule=='registered' and {n.rpartition('.')[0] for n in gs[-1].param_names}=={'fc','backbone.fc'}
    check_splitter(Splitter(n_groups=3), m)

def test_part_that_its_author_called_module():
    class W(nn.Module):
        def __init__(self, m, head):
            super().__init__()
            self.module = m
            if head: self.fc = nn.Linear(3,2)
        def forward(self, x): return self.fc(self.module(x)) if hasattr(self, 'fc') else self.module(x)
    for head in (True, False):
        m = W(timm.create_model('resnet10t', num_classes=3), head)
        gs = layer_groups(m, 'block')
        assert len(gs)==len(layer_groups(m.module, 'block')) and sum(len(g.param_names) for g in gs)==len(_names(m))
        check_splitter(Splitter(), m)

def test_in_chans_1():
    m = timm.create_model('resnet10t', in_chans=1, num_classes=3)
    _sound(layer_groups(m), m)
    check_splitter(Splitter(n_groups='block'), m)

@pytest.mark.parametrize('f', [torchvision.models.resnet18, torchvision.models.densenet121, torchvision.models.alexnet])
def test_torchvision_cut_and_whole(f):
    with torch.device('meta'): whole = f()
    gs = _sound(layer_groups(whole), whole)
    assert gs.rule=='registered' and gs[-1].n_params<1e7 and gs[-1].is_head
    m = create_vision_model(f, 2, pretrained=False)
    gs = _sound(layer_groups(m, arch=f), m)
    assert gs.rule=='registered' and all(n.startswith('1.') for n in gs[-1].param_names)

def _casts_in_a_trace():
    "The oldest torch cannot cast to fastai's tensors, as its U-Net does at the end, under a dispatch mode"
    with _FirstUse({}):
        try: return torch.zeros(1).as_subclass(TensorBase) is not None
        except RuntimeError as e: return 'already associated' not in str(e)

def test_unet():
    m = create_unet_model(torchvision.models.resnet18, 3, (64,64), pretrained=False)
    for arch,rule in ((torchvision.models.resnet18,'registered'), (None,'traced')):
        if rule=='traced' and not _casts_in_a_trace(): continue
        gs = _sound(layer_groups(m, arch=arch, input_size=(3,64,64)), m)
        assert gs.rule==rule
        assert all(n.startswith('layers.0.') for g in gs[:-1] for n in g.param_names) and not any(n.startswith('layers.0.') for n in gs[-1].param_names)
    if _casts_in_a_trace(): check_splitter(Splitter(torchvision.models.resnet18, 'block'), m, input_size=(3,64,64))

def test_two_backbones():
    "Both parallel parts are pretrained: neither may be used as the head"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.b,self.a = (timm.create_model(o, num_classes=0) for o in ('test_vit','resnet10t'))
            self.fc = nn.Linear(self.a.num_features+self.b.num_features, 2)
        def forward(self, x): return self.fc(torch.cat([self.a(x), self.b(x)], 1))
    m = Two()
    gs = _sound(layer_groups(m), m)
    assert set(gs[-1].param_names)=={'fc.weight','fc.bias'} and gs.rule=='traced'
    assert all(len({n[0] for n in g.param_names})==1 for g in gs), 'no group mixes the two'
    assert {g.span[0] for g in gs if g.depth<.5}>={0.} and sum(g.span[0]==0 for g in gs)==2, 'both begin at the input'
    check_splitter(Splitter(n_groups='block'), m, input_size=(3,160,160))

def test_own_net_of_timm_blocks():
    "A block of a known model is not a known model"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc,self.blocks,self.patch = nn.Linear(32,2),nn.Sequential(*[Block(32,2) for _ in range(12)]),nn.Conv2d(3,32,16,16)
        def forward(self, x): return self.fc(self.blocks(self.patch(x).flatten(2).transpose(1,2)).mean(1))
    m = Net()
    gs = _sound(layer_groups(m, 'block'), m)
    assert gs.rule=='traced' and gs.names==['patch',*[f'blocks.{i}' for i in range(12)],'head']
    check_splitter(Splitter(), m)

def test_own_subclass_of_a_known_class():
    class MyViT(VisionTransformer): pass
    m = MyViT(img_size=32, patch_size=16, embed_dim=32, depth=4, num_heads=2, num_classes=3)
    gs = _sound(layer_groups(m, 'block'), m)
    assert (gs.rule, gs.family)==('registered','vit') and gs.names==['patch_embed.proj','blocks.0','blocks.1','blocks.2','blocks.3','head']

# ## Models that nobody knows

def test_custom_model_by_execution_order():
    m = _chain(4,5,6,7,2)
    gs = _sound(layer_groups(m, 'block', x=torch.zeros(1,4)), m)
    assert gs.rule=='traced' and [g.layers for g in gs]==[('l0',),('l1',),('l2',),('head',)]
    check_splitter(lambdaless(m), m, x=torch.zeros(1,4))

def lambdaless(m): return Splitter(groups=layer_groups(m, 'block', x=torch.zeros(1,4)))

def test_model_of_one_layer():
    gs = layer_groups(nn.Linear(4,2), x=torch.zeros(1,4))
    assert len(gs)==1 and gs[0].is_head and gs[0].depth==1

def test_tied_weights_are_in_the_earliest_group():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.out,self.mid,self.mid2,self.emb = nn.Linear(8,30),nn.Linear(8,8),nn.Linear(8,8),nn.Embedding(30,8)
            self.emb.weight = self.out.weight
        def forward(self, x): return self.out(self.mid2(self.mid(self.emb(x))))
    m,x = Tied(),torch.zeros(1,3,dtype=torch.long)
    gs = _sound(layer_groups(m, 'block', x=x), m)
    assert gs[0].param_names==('out.weight',) and 'out.bias' in gs[-1].param_names
    lists = check_splitter(Splitter(groups=gs), m, x=x)
    assert sum(map(len, lists))==len(list(m.parameters()))

def test_parameters_outside_the_forward_pass():
    m = _chain(4,5,6,2)
    m.spare,m.token = nn.Linear(3,3),nn.Parameter(torch.zeros(2))
    x = torch.zeros(1,4)
    with pytest.raises(SplitterError, match=r'3 trainable parameters of Chain are not used.*token, spare.weight.*requires_grad_\(False\)'): layer_groups(m, x=x)
    m.spare.requires_grad_(False)
    m.token.requires_grad_(False)
    check_splitter(Splitter(groups=_sound(layer_groups(m, x=x), m)), m, x=x)
    del m.spare,m.token
    _sound(layer_groups(m, x=x), m)

@pytest.mark.parametrize('make', [lambda: _chain(4,5,2), lambda: _meta('resnet18')])
def test_no_trainable_parameter(make):
    m = make().requires_grad_(False)
    with pytest.raises(SplitterError, match=r'has no trainable parameter.*requires_grad_\(True\)'): layer_groups(m)

def test_frozen_part_is_grouped_all_the_same():
    m = _meta('resnet18')
    want = layer_groups(m).names
    m.layer1.requires_grad_(False)
    assert _sound(layer_groups(m), m).names==want

def test_lazy_model():
    with pytest.raises(SplitterError, match='Lazy parameters.*Run one batch'): layer_groups(nn.Sequential(nn.LazyConv2d(4,3), nn.Flatten(), nn.LazyLinear(2)))

def test_model_that_cannot_run():
    with pytest.raises(SplitterError, match='could not run a forward pass.*as `x`'): layer_groups(_chain(4,5,2))

def test_model_is_not_changed():
    m = timm.create_model('cait_xxs24_224', num_classes=2).train()
    was = {n:(id(p),p.requires_grad,p.sum().item()) for n,p in m.named_parameters()}
    layer_groups(m, 4)
    assert was=={n:(id(p),p.requires_grad,p.sum().item()) for n,p in m.named_parameters()} and all(o.training for o in m.modules())

# ## Rule 5: a block's rate does not depend on the number of groups

@pytest.mark.parametrize('arch', ['convnext_tiny','vit_tiny_patch16_224','resnet50','efficientnet_b0','swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('n', [3, 4, 6, 9, 'block', None])
def test_rate_of_a_block_stays_within_its_groups_width(arch, n):
    model,p = _meta(arch),Preset(1e-6, 1e-3, 10)
    fine,gs = layer_groups(model, 'block'),layer_groups(model, n)
    lr = {o:r for g,r in zip(fine, p.lrs(fine)) for o in g.param_names}
    for g,r in zip(gs, p.lrs(gs)):
        lo,hi = (p.head_lr,)*2 if g.is_head else (p.lr_high*p.ratio**(1-d) for d in g.span)
        assert lo*(1-1e-9)<=r<=hi*(1+1e-9)
        assert all(lo*(1-1e-9)<=lr[o]<=hi*(1+1e-9) for o in g.param_names)

# ## Names

@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224','swin_tiny_patch4_window7_224','swinv2_tiny_window8_256','beit_base_patch16_224','resnet18'])
def test_no_wd_is_timms(arch):
    m = _meta(arch)
    want = m.no_weight_decay() if hasattr(m, 'no_weight_decay') else set()
    assert layer_groups(m)(m).no_wd=={n for n in _names(m) if n in want}
    w = Wrapper(m, 1000)
    assert layer_groups(w)(w).no_wd=={f'backbone.{n}' for n in _names(m) if n in want}

class Undecayed(nn.Module):
    "A class of one's own that says what has no weight decay, as timm's models do"
    def __init__(self):
        super().__init__()
        self.pos,self.down,self.fc = nn.Parameter(torch.ones(4, 4)),nn.Linear(4, 4),nn.Linear(4, 2)
    def no_weight_decay(self): return {'pos','down.*'}
    def forward(self, x): return self.fc(self.down(x+self.pos))

def test_no_wd_of_a_class_of_ones_own():
    m = Undecayed()
    assert layer_groups(m, x=torch.zeros(2,4,4))(m).no_wd=={'pos','down.weight','down.bias'}
    m.inner = timm.create_model('test_vit') # its own list counts as well
    m.forward = lambda x: m.fc(m.down(m.inner(x)[:,:4]+m.pos[0]))
    assert layer_groups(m)(m).no_wd=={'pos','down.weight','down.bias','inner.pos_embed','inner.cls_token'}

@pytest.mark.parametrize('names,want', [('b.1 b.2 b.3','b.1-3'), ('b.1 b.3 b.0 b.2','b.1 ... b.2'), ('s_3.a s_3.b','s_3.a ... s_3.b'), ('l.0.conv1 l.0.down.1 l.0.conv2','l.0.conv1-2'), ('b.9','b.9')])
def test_a_group_is_named_by_numbers_only_where_they_count_up(names, want):
    assert _group_name([SimpleNamespace(name=n, stage='s') for n in names.split()])==want

def test_param_lists():
    m = timm.create_model('test_vit')
    gs = layer_groups(m, 3)
    lists,ps = gs(m),dict(m.named_parameters())
    assert isinstance(lists, list) and isinstance(lists[0], list) and lists.group_names==gs.names
    assert all(ps[n] is p for ns,l in zip(lists.names, lists) for n,p in zip(ns, l)) and [len(o) for o in lists.names]==[len(o) for o in lists]

class Net(nn.Module):
    "Unknown to all, with a part to compile"
    def __init__(self):
        super().__init__()
        self.c,self.b,self.a = nn.Linear(8,2),nn.Sequential(nn.Linear(8,8), nn.ReLU(), nn.Linear(8,8)),nn.Linear(4,8)
    def forward(self, x): return self.c(self.b(self.a(x)))

def _wrappers(m):
    yield nn.DataParallel(m)
    yield torch.compile(m, backend='eager')
    yield nn.DataParallel(torch.compile(m, backend='eager'))
    yield torch.compile(nn.DataParallel(m), backend='eager')

@pytest.mark.parametrize('make,x', [(lambda: timm.create_model('resnet10t', num_classes=2), None), (lambda: Wrapper(timm.create_model('test_vit', num_classes=3), 3), None),
    (Net, torch.zeros(1,4))])
def test_wrappers_do_not_matter(make, x):
    m = make()
    gs = layer_groups(m, 'block', x=x)
    for w in _wrappers(m):
        again = layer_groups(w, 'block', x=x)
        assert [g.param_names for g in again]==[g.param_names for g in gs] and again.rule==gs.rule
        assert gs.mismatch(w)=='' and all(p is q for a,b in zip(gs(w), gs(m)) for p,q in zip(a,b))
        check_splitter(Splitter(groups=gs), w, x=x)

def test_compiled_part():
    m,x = Net(),torch.zeros(1,4)
    gs = layer_groups(m, 'block', x=x)
    m.b = torch.compile(m.b, backend='eager')
    assert any('_orig_mod' in n for n in _names(m))
    again = layer_groups(m, 'block', x=x)
    assert [g.param_names for g in again]==[g.param_names for g in gs] and gs.mismatch(m)==''
    check_splitter(Splitter(groups=gs), m, x=x)
    with pytest.raises(SplitterError, match=r'is in group \d, but first used before'): check_splitter(Backwards(groups=gs), m, x=x)

def test_compiled_backbone():
    m = timm.create_model('test_vit', num_classes=3)
    want = layer_groups(Wrapper(m, 3))
    w = Wrapper(torch.compile(m, backend='eager'), 3)
    assert layer_groups(w)(w).names==want(Wrapper(m, 3)).names and layer_groups(w)(w).no_wd==want.no_wd
    check_splitter(Splitter(), w)

def test_groups_refuse_another_model():
    gs = layer_groups(_meta('resnet18'))
    assert gs.mismatch(_meta('resnet18'))==''
    bad = gs.mismatch(_meta('resnet34'))
    assert re.search(r'\d+ parameters are in no group, such as layer1.2', bad) and 'missing' not in bad
    with pytest.raises(SplitterError, match=r'made for another model \(resnet18.*missing.*in no group.*Split this model again'): gs(_meta('vit_tiny_patch16_224'))

def test_pickle_and_copy():
    m = timm.create_model('convnext_atto', num_classes=2)
    gs = layer_groups(m, 4)
    for o in (pickle.loads(pickle.dumps(gs)), deepcopy(gs)):
        assert (o.names, o.depths, o.rule, o.family, o.arch, o.no_wd)==(gs.names, gs.depths, gs.rule, gs.family, gs.arch, gs.no_wd) and list(o)==list(gs)
    m2 = deepcopy(m)
    ps = set(map(id, m2.parameters()))
    assert all(id(p) in ps for l in gs(m2) for p in l)

def test_sequence_and_table():
    gs = layer_groups(_meta('resnet18'))
    assert gs[-1].is_head and list(reversed(gs))[0] is gs[-1] and len(gs[1:3])==2 and gs[0] in gs
    assert 'registered' in repr(gs) and all(n in repr(gs) and n in gs._repr_html_() for n in gs.names)

# ## Splitter

def test_splitter():
    m = timm.create_model('resnet10t', num_classes=2)
    s = Splitter(n_groups=4)
    lists = s(m)
    assert len(lists)==4 and s.groups.arch.startswith('resnet10t')
    first = s.groups
    assert s.find(deepcopy(m)) is first, "looked at once"
    again = pickle.loads(pickle.dumps(s))
    assert again.groups.names==first.names and again.n_groups==4
    other = timm.create_model('test_vit', num_classes=2)
    assert len(s(other))==4 and s.groups.arch.startswith('test_vit'), "found anew for another model"

def test_splitter_for_another_architecture():
    with pytest.raises(SplitterError, match="requested for 'resnet50', but the model is a 'resnet18'"): Splitter('resnet50')(_meta('resnet18'))
    with pytest.raises(SplitterError, match="requested for 'resnet18', but the model is a 'ResNet'"): Splitter('resnet18')(torchvision.models.resnet18())
    with pytest.raises(SplitterError, match="requested for 'tv_resnet', but the model is a 'vit'"): Splitter(torchvision.models.resnet18)(_meta('vit_tiny_patch16_224'))
    with pytest.raises(SplitterError, match="family 'resnet' do not fit this Sequential.*leave it out"):
        Splitter('resnet18')(nn.Sequential(create_body(torchvision.models.resnet18(), pretrained=False), nn.Linear(512,2)))

def test_splitter_takes_names_with_tags_and_old_ones():
    for arch in ('convnext_tiny.fb_in22k','convnext_tiny_in22k','hf-hub:timm/convnext_tiny.fb_in22k'): assert len(Splitter(arch, 4)(_meta('convnext_tiny')))==4

def test_splitter_for_an_unknown_architecture():
    with pytest.raises(FamilyError, match="Unknown architecture 'resnet5O'.*Did you mean"): Splitter('resnet5O')

def test_splitter_of_a_plugin_function():
    def my_arch(pretrained=False): return timm.create_model('resnet10t')
    assert len(Splitter(my_arch, 3)(my_arch()))==3

# ## check_splitter: each fault by name

class Backwards(Splitter):
    "Body groups in the wrong order"
    def __call__(self, m):
        *body,head = super().__call__(m)
        return [*body[::-1], head]

class Bad:
    "Spoils the groups of a small ResNet in one way"
    def __init__(self, how): self.how = how
    def __call__(self, m): return getattr(self, self.how)(*map(list, layer_groups(m, 3)(m)))
    def missing(self, a, b, c): return [a[1:], b, c]
    def doubled(self, a, b, c): return [a, b+a[:1], c]
    def foreign(self, a, b, c): return [a, b, c+[nn.Parameter(torch.zeros(3,5))]]
    def empty(self, a, b, c): return [a, [], b, c]
    def swapped(self, a, b, c): return [b, a, c]
    def body_in_head(self, a, b, c): return [a, b[:-1], b[-1:]+c]
    def head_in_body(self, a, b, c): return [a, b+c[:1], c[1:]]
    def flat(self, a, b, c): return a+b+c
    def fickle(self, a, b, c): return [a, b, c] if id(self)==self.me else [a+b[:1], b[1:], c]
    def generators(self, a, b, c): return tuple(iter(o) for o in (a,b,c))

@pytest.fixture(scope='module')
def model(): return timm.create_model('resnet10t', num_classes=2)

@pytest.mark.parametrize('how,match', [
    ('missing', r'^1 fault in the groups of .*Bad.*:\n- conv1\.\S+ is in no group$'), ('doubled', r'conv1\.\S+ is in groups \[0, 1\]'), ('foreign', r'a tensor of shape \(3, 5\) in group 2 is not a parameter'),
    ('empty', 'group 1 is empty'), ('swapped', r'^9 faults.*\n- layer4.0.conv1.weight is in group 0, but first used after layer3\S+ of group 1 \(parameter 34 of 44 in order of use\)'), ('body_in_head', r'layer4\.\S+ is pretrained, but in the last group'),
    ('head_in_body', 'fc.weight is new, but in group 1'), ('flat', r'returns \d+ parameters, not lists of parameters')])
def test_faults(model, how, match):
    with pytest.raises(SplitterError, match=match): check_splitter(Bad(how), model)

def test_all_faults_are_named(model):
    def no_stem(m): return [list(m.layer4.parameters()), list(m.fc.parameters())]
    with pytest.raises(SplitterError, match=r'^33 faults.*no_stem.*\n- conv1.0.weight is in no group\n(- .* is in no group\n){29}\.\.\. and 3 more in the `faults`') as e: check_splitter(no_stem, model)
    left = {n for n,_ in model.named_parameters() if not n.startswith(('layer4.','fc.'))}
    assert {o.partition(' ')[0] for o in e.value.faults}==left

def test_only_the_fewest_are_named(model):
    "One early tensor in a late group is one fault, not one for each of the tensors after it"
    def late_stem(m):
        a,b,c = map(list, layer_groups(m, 3)(m))
        return [a[1:], b+a[:1], c]
    with pytest.raises(SplitterError) as e: check_splitter(late_stem, model)
    assert [o for o in e.value.faults if 'pickle' not in o]==['conv1.0.weight is in group 1, but first used before conv1.1.weight of group 0 (parameter 1 of 44 in order of use)']

def test_groups_that_take_turns_are_named():
    "Two branches that run alternately: whichever group goes first, a part of it is used after the other began"
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.fc = nn.ModuleList([nn.Linear(4,4) for _ in range(3)]),nn.ModuleList([nn.Linear(4,4) for _ in range(3)]),nn.Linear(4,2)
        def forward(self, x):
            for a,b in zip(self.a, self.b): x = a(x)+b(x)
            return self.fc(x)
    m,x = Turns(),torch.zeros(1,4)
    with pytest.raises(SplitterError, match=r'^4 faults.*\n- b.0.weight is in group 1, but first used before a.1.weight of group 0'): check_splitter(by_branch, m, x=x)
    gs = layer_groups(m, 'block', x=x)
    check_splitter(Splitter(groups=gs), m, x=x)

def by_branch(m): return [list(o.parameters()) for o in (m.a, m.b, m.fc)]

def test_entangled_layers_are_one():
    "A table that the blocks of a stage share is used by all of them: they cannot be apart"
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.k,self.v,self.fc = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,2)
        def forward(self, x):
            x = nn.functional.linear(self.stem(x), self.k.weight)
            x = nn.functional.linear(x, self.v.weight)
            return self.fc(x+self.k.bias+self.v.bias)
    m,x = Shared(),torch.zeros(1,4)
    gs = layer_groups(m, 'block', x=x)
    assert [set(g.param_names) for g in gs]==[{'stem.weight','stem.bias'}, {f'{o}.{p}' for o in 'kv' for p in ('weight','bias')}, {'fc.weight','fc.bias'}]
    check_splitter(Splitter(groups=gs), m, x=x)

def test_splitter_that_cannot_be_pickled(model):
    gs = layer_groups(model, 3)
    with pytest.raises(SplitterError, match='cannot be pickled.*module-level function or a class'): check_splitter(lambda m: gs(m), model)

def test_splitter_that_changes_its_mind(model):
    s = Bad('fickle')
    s.me = id(s)
    with pytest.raises(SplitterError, match='after pickling, the splitter groups the parameters differently'): check_splitter(s, model)

def test_good_splitters_pass(model):
    assert [len(o) for o in check_splitter(Bad('generators'), model)]==[len(o) for o in layer_groups(model, 3)(model)]
    res = check_splitter(Splitter(), model)
    assert isinstance(res, ParamLists) and len(repr(res))<200, 'no values of parameters in the output of a cell'
    check_splitter(fastais_own, nn.Sequential(timm.create_model('resnet10t', num_classes=0), nn.Sequential(nn.Linear(timm.create_model('resnet10t').num_features, 2))))

def fastais_own(m): return [list(m[0].parameters()), list(m[1].parameters())]

def test_model_without_names_to_check():
    "There is no known backbone, so the head is unknown and the rest is checked"
    m,x = _chain(4,5,6,2),torch.zeros(1,4)
    check_splitter(in_order, m, x=x)
    with pytest.raises(SplitterError, match='first used before'): check_splitter(out_of_order, m, x=x)

def in_order(m): return [list(o.parameters()) for o in (m.l0, m.l1, m.l2)]
def out_of_order(m): return [list(o.parameters()) for o in (m.l1, m.l0, m.l2)]

def test_check_leaves_the_model_alone(model):
    model.train()
    was = {n:t.clone() for n,t in model.state_dict().items()}
    check_splitter(Splitter(), model)
    assert all(torch.equal(t, was[n]) for n,t in model.state_dict().items()) and all(o.training for o in model.modules())

def test_layers_whose_parameters_are_empty():
    "They have no sizes by which they could be cut"
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(0))
        def forward(self, x): return x+self.w.sum()
    m = nn.Sequential(nn.Sequential(Empty(), Empty()), nn.Linear(4,2))
    assert [len(ps) for ps in layer_groups(m, x=torch.zeros(1,4))(m)]==[2,2] # empty ones are small, and small ones go together

def test_a_familys_name_as_architecture(model):
    "It names the right model, or is refused"
    assert layer_groups(model, arch='resnet').names==layer_groups(model).names
    with pytest.raises(FamilyError, match="'convnext' is a family, not an architecture.*'convnext_"): layer_groups(model, arch='convnext')
