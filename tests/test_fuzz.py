"Random models, states, checkpoints, folders and command lines: the rules hold, or one of our errors says why and nothing has changed. For more cases: `python tests/test_fuzz.py 20000`"
import contextlib,copy,io,math,os,pickle,random,re,sys,tempfile,traceback,warnings
from collections import Counter
from functools import lru_cache,partial
from pathlib import Path
os.environ.update(MPLBACKEND='Agg', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')

import pytest,timm,torch
from PIL import Image
from torch import nn
# `.ci/run` has it from the extra `dev`; the oldest versions are tested without that extra
hypothesis = pytest.importorskip('hypothesis', reason='hypothesis is not installed: it comes with the extra `dev`')
from hypothesis import HealthCheck,given,settings,strategies as st
from fastai.vision.all import Adam,DataLoader,DataLoaders,Learner,ProgressCallback,RMSProp,SGD,image_extensions,noop

from fastai_discriminative import cli,jobs
from fastai_discriminative.all import *
from fastai_discriminative.backbone import named_params
from fastai_discriminative.weights import load_pretrained,timm_model
from fastai_discriminative.core import DataError,DiscriminativeError
from fastai_discriminative.demo import demo_dls,folder_images

ends = Counter() # how the cases of a property ended

def _error(f):
    "The `DiscriminativeError` that `f` raises, or `None`; any other exception is a fault"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: f()
        except DiscriminativeError as e:
            assert str(e).strip(), 'an error says why'
            ends[type(e).__name__] += 1
            return e
    ends['fine'] += 1

# ---- models: trees of modules that take and give 4 features, or 4 channels of 2 x 2 pixels

class Scale(nn.Module):
    "A parameter without a layer: ones, a scalar, an empty one, complex, or integers"
    def __init__(self, kind):
        super().__init__()
        values = dict(scalar=torch.ones(()), empty=torch.ones(0), complex=torch.ones(1, dtype=torch.complex64), whole=torch.ones(1).long())
        self.p = nn.Parameter(values.get(kind, torch.ones(1)), requires_grad=kind!='whole')
    def forward(self, x): return x*(self.p.abs() if self.p.is_complex() else self.p.sum() if self.p.numel()!=1 else self.p)

class Count(nn.Module):
    "A buffer with integers, and one without a value"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros((), dtype=torch.int64))
        self.register_buffer('none', None)
    def forward(self, x):
        self.n += 1
        return x

class Odd(nn.Module):
    "Raises an error, changes a tensor in place, or reads values, which meta tensors do not have"
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
    def forward(self, x):
        if self.kind=='raises': raise RuntimeError('a model that does not run')
        if self.kind=='inplace': return torch.relu_(x+0)
        return x if x.sum()>=0 else -x

class Part(nn.Module):
    "Children under `names` that run as `how` says"
    def __init__(self, how, kids, names):
        super().__init__()
        self.how,box = how,self
        if how=='dict': box = self.box = nn.ModuleDict()
        if how in ('list','back'): self.box = nn.ModuleList(kids)
        else:
            for n,k in zip(names, kids): box.add_module(n, k)
        self.n = len(kids)
        for p in self.parameters() if 'frozen' in how else ():
            if not isinstance(p, nn.parameter.UninitializedParameter): p.requires_grad_(False)
    def run(self):
        kids = list((self.box if hasattr(self, 'box') else self).children())[:]
        return kids[::-1] if self.how=='back' else kids*2 if self.how=='twice' else [] if 'idle' in self.how else kids
    def forward(self, x):
        if self.how=='branch': return sum((k(x) for k in self.run()), x)
        for k in self.run(): x = k(x)
        return x

class Net(nn.Module):
    "A tree with one or two inputs, and an output of one of four kinds"
    def __init__(self, tree, n_in, out):
        super().__init__()
        self.tree,self.n_in,self.out = tree,n_in,out
    def forward(self, *xs):
        y = self.tree(sum(xs))
        return dict(tensor=y, tuple=(y,y.mean()), list=[y], dict=dict(y=y))[self.out]

def _leaf(kind, image, pool):
    lin,bn = (partial(nn.Conv2d, 4, 4, 1),nn.BatchNorm2d) if image else (partial(nn.Linear, 4, 4),nn.BatchNorm1d)
    if kind=='again' and pool: return pool[len(pool)//2]
    if kind in ('linear','again','tied'):
        m = lin()
        if kind=='tied' and pool: m.weight = pool[-1].weight
        pool.append(m)
        return m
    if kind=='lazy': return nn.LazyConv2d(4, 1) if image else nn.LazyLinear(4)
    if kind in ('raises','data','inplace'): return Odd(kind)
    if kind=='count': return Count()
    return dict(bn=lambda: bn(4), ln=lambda: nn.GroupNorm(1, 4) if image else nn.LayerNorm(4), gn=lambda: nn.GroupNorm(2, 4), act=nn.ReLU,
        drop=nn.Dropout, same=nn.Identity).get(kind, partial(Scale, kind))()

def _build(tree, image, pool):
    if isinstance(tree, str): return _leaf(tree, image, pool)
    how,kids,names = tree[0],[_build(o, image, pool) for o in tree[1]],_names[tree[2]:]+_names[:tree[2]]
    return nn.Sequential(*kids) if how=='seq' else Part(how, kids, names)

_leaves = ['linear']*12 + ['bn','ln','gn']*3 + 'act inplace drop same again tied again tied scale scalar count data'.split()
_rare = 'empty complex whole lazy raises'.split()
_names = ['a','b','module','head','weight','blocks','x1','é','norm','0']
_hows = 'seq seq list back dict branch plain'.split()
leaves = st.sampled_from(_leaves*8+_rare)
def _trees(kids, hows, least): return st.tuples(st.sampled_from(hows), st.lists(kids, min_size=least, max_size=4), st.integers(0, 9))
trees = _trees(st.recursive(leaves, lambda kids: _trees(kids, _hows*5+['twice']*3+['frozen']*3+['idle_frozen','idle'], 0), max_leaves=8), _hows, 2)
nets = st.fixed_dictionaries(dict(tree=trees, image=st.booleans(), n_in=st.sampled_from([1,1,2]), out=st.sampled_from(['tensor','tuple','list','dict']),
    pair=st.booleans()))

def make_net(r):
    "The model of recipe `r`, with the same weights each time"
    torch.manual_seed(0)
    net = Net(_build(r['tree'], r['image'], []), r['n_in'], r['out'])
    pair = r['pair'] and r['n_in']==1 and r['out']=='tensor'
    return nn.Sequential(net, nn.Conv2d(4, 4, 1) if r['image'] else nn.Linear(4, 4)) if pair else net

def _numbers(o): return sum(map(_numbers, o.values() if isinstance(o, dict) else o)) if isinstance(o, (dict,list,tuple)) else o.abs().sum()
def _loss(out, *ys):
    res = _numbers(out)
    return res if res.requires_grad else res+torch.zeros(1, requires_grad=True).sum()

opts = dict(adam=Adam, sgd=partial(SGD, mom=.9), rms=RMSProp, fused_adamw=fused_adamw, fused_sgd=partial(fused_sgd, mom=.9))

def make_learner(model, r, opt='adam'):
    "A learner with one batch"
    torch.manual_seed(1)
    xs = [torch.rand(2, 4, *([2,2] if r['image'] else [])) for _ in range(r['n_in'])]
    dl = DataLoader([(*xs, torch.zeros(1))], bs=None, num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.n_inp = r['n_in']
    learn = Learner(dls, model, loss_func=_loss, opt_func=opts[opt], wd=.1)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def _same(a, b):
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)): return a is b or a==b
    return a.dtype==b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
def values(model): return {n:o.detach().clone() for n,o in [*model.named_parameters(), *model.named_buffers()] if not isinstance(o,
    nn.parameter.UninitializedTensorMixin)}
def moved(a, b): return {n for n in a.keys()|b.keys() if not (n in a and n in b and _same(a[n], b[n]))}
def flags(model): return {n:p.requires_grad for n,p in model.named_parameters()}
def look(learn):
    "What a refused call must not change"
    return dict(flags=flags(learn.model), modes=[m.training for m in learn.model.modules()], vars=[sorted(vars(m)) for m in learn.model.modules()],
        splitter=learn.splitter,
        opt=learn.opt, func=learn.opt_func, cbs=list(learn.cbs), bn=learn.train_bn, rng=torch.get_rng_state().tolist())

def first_uses(learn):
    "Names of the parameters in the order in which a real pass runs the modules they are in, seen by hooks"
    model,order = copy.deepcopy(learn.model).eval(),[]
    names = {id(p):n for n,p in model.named_parameters()}
    for m in model.modules(): m.register_forward_pre_hook(lambda m,_: order.extend(names[id(p)] for p in m.parameters(recurse=False)))
    with torch.no_grad(): model(*learn.dls.train_ds[0][:learn.dls.n_inp])
    return list(dict.fromkeys(order))

def _has(tree, how): return not isinstance(tree, str) and (tree[0]==how or any(_has(o, how) for o in tree[1]))
def _user_frozen(groups, was):
    "Names that were frozen by hand in a training group"
    k = next((i for i,g in enumerate(groups) if any(was[n] for n in g.param_names)), len(groups))
    return {n for g in groups[k:] for n in g.param_names if not was[n]}

# ---- properties of models

def check_groups(learn, r, a):
    "Rules 1 to 5"
    groups,spl,ps = learn.layer_groups,learn.splitter,named_params(learn.model)
    assert sorted(n for g in groups for n in g.param_names)==sorted(ps), 'rule 1: every parameter in one group'
    assert Counter(id(p) for o in learn.opt.param_lists for p in o)==Counter(map(id, learn.model.parameters())), 'rule 1: and once in the optimiser'
    if isinstance(a['n_groups'], int): assert len(groups)==a['n_groups']
    lists = check_splitter(spl, learn.model, x=learn.dls.train_ds[0][:learn.dls.n_inp])
    at = [groups.where[n] for n in first_uses(learn) if groups[groups.where[n]].is_head or not groups[groups.where[n]].new]
    if not _has(r['tree'], 'branch'): assert at==sorted(at), 'rule 2: groups follow the order of the pass'
    assert groups[-1].is_head and not any(g.is_head for g in groups[:-1]), 'rule 3: the head is last'
    for other,what in ((pickle.loads(pickle.dumps(spl)),learn.model), (spl,copy.deepcopy(learn.model)), (Splitter(n_groups=a['n_groups'],
        groups=groups),learn.model)):
        assert other(what).names==lists.names, 'rule 4: names, not positions'
    p,blocks = Preset(1e-7, 1e-3, 10),layer_groups(learn.model, 'block', x=learn.dls.train_ds[0][:learn.dls.n_inp], new=spl.new)
    alone = {n:lr for g,lr in zip(blocks, p.lrs(blocks)) for n in g.param_names}
    for g,lr in zip(groups, p.lrs(groups)):
        lo,hi = (lr,lr) if g.is_new else (p.lr_high*p.ratio**(1-d) for d in g.span)
        assert all(lo*(1-1e-9)<=alone[n]<=hi*(1+1e-9) for n in g.param_names), 'rule 5: a rate does not depend on the number of groups'

def _still(learn, train_norm):
    "Names of parameters and buffers in frozen groups"
    gs,norms = learn.layer_groups,learn.layer_groups.map.norms if train_norm is True else ()
    cold = {n for i,g in enumerate(gs) if i<learn.opt.frozen_idx for n in g.param_names}
    mods = {n.rpartition('.')[0] for n in cold}
    stats = {n for n,_ in learn.model.named_buffers() if n.rpartition('.')[0] in mods and n.rpartition('.')[2].startswith(('running','num'))}
    return {n for n in cold|stats if n.rpartition('.')[0] not in norms}

def check_op(learn, op, a, fixed):
    "A call leaves the weights as they are; a step leaves what is frozen as it is"
    before,n = values(learn.model),len(learn.layer_groups)
    if op=='step':
        still = _still(learn, a['train_norm'])|fixed
        refused = _error(lambda: learn.fit(1, 1e-2)) # nothing trains
        if refused: still = {n for n in before if not n.endswith('.n')} # a `Count` counts as soon as it runs
        assert not moved(before, values(learn.model))&still, 'rule 6: frozen is frozen'
    else:
        what = look(learn)
        f = dict(freeze=learn.freeze, unfreeze=learn.unfreeze).get(op, lambda: learn.freeze_to(op))
        if _error(f): assert not -n<=op<=n and look(learn)==what, 'rule 8: a refused call changes nothing'
        elif isinstance(op, int): assert learn.true_freeze.asked==(op%n if op!=n else n)<=learn.opt.frozen_idx # groups frozen by hand come on top
        assert not moved(before, values(learn.model)), 'no call changes a weight'
    assert not any(f for n,f in flags(learn.model).items() if n in fixed), 'what the user froze stays frozen'

def check_model(r, a):
    "A random model in a random number of groups, frozen, thawed and trained"
    model = make_net(r)
    was = flags(model)
    learn = make_learner(model, r, a['opt'])
    before,what,new = values(model),look(learn),list(was)[a['new']:a['new']+1] if isinstance(a['new'], int) else a['new']
    e = _error(lambda: learn.split(a['n_groups'], train_norm=a['train_norm'], new=new))
    assert not moved(before, values(learn.model)), 'a split changes no weight'
    if e:
        assert look(learn)==what, 'rule 8: a refused split changes nothing'
        return
    assert flags(model)==was and torch.get_rng_state().tolist()==what['rng']
    check_groups(learn, r, a)
    fixed = _user_frozen(learn.layer_groups, was)
    for op in a['ops']: check_op(learn, op, a, fixed)

args = st.fixed_dictionaries(dict(opt=st.sampled_from(list(opts)), train_norm=st.sampled_from(['group','group','affine','running',True,False]),
    n_groups=st.one_of(st.none(), st.none(), st.just('block'), st.integers(2, 4), st.integers(-2, 9)), new=st.one_of(*[st.just(())]*4, st.integers(0, 20),
        st.sampled_from(['*bias','nothing','tree','head'])),
    ops=st.lists(st.one_of(st.just('step'), st.just('step'), st.just('freeze'), st.just('unfreeze'), st.integers(-4, 4)), max_size=4)))

def check_stock(r, opt):
    "Rule 7: a learner that was never split trains bit for bit as with fastai's own `fit`"
    learns = [make_learner(make_net(r), r, opt) for _ in range(2)]
    for learn,fit in zip(learns, (Learner.fit, Learner.fit._stock)):
        torch.manual_seed(2)
        try: fit(learn, 2, 1e-2)
        except Exception as e: learn.error = type(e),str(e)
    assert getattr(learns[0], 'error', None)==getattr(learns[1], 'error', None)
    assert not moved(*(values(o.model) for o in learns)), 'rule 7: nothing changes until asked'
    ends['fine'] += 1

# ---- properties of what is loaded

_junk = [None, 'x', -1, math.nan, math.inf, 10**40, True, [], {}, (), torch.zeros(7), torch.zeros(()), torch.full((4,4), math.nan), b'x', [[]], {'lr':1}]

def _places(o, path=()):
    "Paths to everything in the lists and dicts of `o`"
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ():
        yield *path,k
        yield from _places(v, (*path,k))

def mutated(o, how, at, value):
    "A copy of `o` in which place number `at` is dropped, doubled, or holds `value`"
    o = copy.deepcopy(o)
    places = list(_places(o))
    *up,k = places[at%len(places)]
    box = o
    for i in up: box = box[i]
    if how=='drop': del box[k]
    elif how=='double' and isinstance(box, list): box.insert(k, box[k])
    elif how=='double': box[f'{k}2'] = box[k]
    else: box[k] = copy.deepcopy(value)
    return o

mutations = st.lists(st.tuples(st.sampled_from(['drop','double','set','set']), st.integers(0, 10**4), st.sampled_from(_junk)), min_size=1, max_size=2)

def _state_of(opt): return [(id(p), k, v.clone() if isinstance(v,
    torch.Tensor) else v) for p,s in opt.opt.state.items() for k,v in s.items()],[dict(h) for h in opt.hypers],opt.frozen_idx
def _all_same(a, b): return a[1:]==b[1:] and len(a[0])==len(b[0]) and all(x[:2]==y[:2] and _same(x[2], y[2]) for x,y in zip(a[0], b[0]))

def check_state(r, opt, other, n, changes):
    "A changed optimiser state fits, or is refused completely"
    def _trained(opt, n):
        learn = make_learner(make_net(r), r, opt)
        learn.split(n)
        learn.fit(1, 1e-2)
        return learn
    try: a,b = _trained(opt, None),_trained(other, n)
    except DiscriminativeError: return # `check_model` looks at these
    sd = a.opt.state_dict()
    for c in changes: sd = mutated(sd, *c)
    was = _state_of(b.opt)
    if _error(lambda: b.opt.load_state_dict(sd)):
        assert _all_same(_state_of(b.opt), was), 'rule 8: a refused state changes nothing'
        return
    hypers = [v for h in b.opt.hypers for v in h.values()]
    assert len(b.opt.hypers)==len(b.opt.param_lists) and all(isinstance(v,
        (int,float)) and math.isfinite(v) for v in hypers if v is not None), 'a rate is a number'
    assert all(s.numel()==1 or s.shape==p.shape for p,o in b.opt.opt.state.items() for s in o.values() if isinstance(s,
        torch.Tensor)), 'moments have the shapes of parameters'
    b.fit(1, 1e-2)

_casts = dict(half=torch.Tensor.half, double=torch.Tensor.double, bfloat=torch.Tensor.bfloat16, whole=torch.Tensor.long, bool=torch.Tensor.bool,
    flat=torch.Tensor.flatten, more=lambda o: o[None],
    cut=lambda o: o.flatten()[:-1], complex=lambda o: o.float()+0j, view=lambda o: o.expand(2, *o.shape)[0], param=lambda o: nn.Parameter(o.float()),
    sparse=torch.Tensor.to_sparse, csr=lambda o: o.reshape(len(o) if o.ndim else 1, -1).to_sparse_csr(), meta=lambda o: o.to('meta'))
_valueless = 'sparse','csr','meta'
_wraps = dict(plain=lambda o: o, model=lambda o: dict(model=o), state=lambda o: dict(state_dict=o, epoch=3), ema=lambda o: dict(model_ema=o, model={}),
    module=lambda o: {f'module.{k}':v for k,v in o.items()},
    learner=lambda o: {f'0.model.{k}':v for k,v in o.items()}, both=lambda o: dict(model=dict(model=o)), listed=lambda o: [o], pairs=lambda o: list(o.items()))

def _plain(o): return isinstance(o, torch.Tensor) and o.layout==torch.strided and not o.is_meta

def changed_tensors(sd, changes):
    "`sd` with tensors renamed, dropped, doubled, of other shapes and types, or no tensors"
    sd = dict(sd)
    for how,at,k in changes:
        if not sd: break
        n = list(sd)[at%len(sd)]
        if how=='rename': sd[n+'x'] = sd.pop(n)
        elif how=='drop': del sd[n]
        elif how=='double': sd[f'module.{n}'] = sd[n]
        elif how=='junk': sd[n] = _junk[k%len(_junk)]
        elif _plain(sd[n]): sd[n] = _casts[list(_casts)[k%len(_casts)]](sd[n])
    return sd

def _write(sd, wrap, hurt, path):
    "A checkpoint file; `hurt` is `None`, or where it is cut or has another byte"
    if wrap=='safetensors' and all(map(_plain, sd.values())):
        from safetensors.torch import save_file
        save_file({k:v.detach().clone().contiguous() for k,v in sd.items()}, path := path/'w.safetensors')
    else: torch.save(_wraps.get(wrap, _wraps['plain'])(sd), path := path/'w.pth')
    if hurt is not None:
        b = path.read_bytes()
        at = hurt[1]%len(b)
        path.write_bytes(b[:at] if hurt[0]=='cut' else b[:at]+bytes([b[at]^hurt[2]])+b[at+1:])
    return path

checkpoints = st.tuples(st.lists(st.tuples(st.sampled_from('rename drop double junk cast cast'.split()), st.integers(0, 200), st.integers(0, 200)), max_size=3),
    st.sampled_from(['plain','plain','safetensors','safetensors',*_wraps]), st.one_of(st.none(), st.none(), st.none(),
        st.tuples(st.sampled_from(['cut','flip']), st.integers(0, 10**6), st.integers(1, 255))))

def check_loaded(sd, model, changes):
    "What a file that was accepted has under a name of the model's is now there; of a tensor without plain values nothing can be"
    if any(c[0]=='double' for c in changes): return
    for k,v in model.state_dict().items():
        if not isinstance(o := sd.get(k), torch.Tensor): continue
        if _plain(o) and o.shape==(1,) and v.ndim==0: o = o[0] # as torch before 0.4 saved a number
        assert _plain(o) and _same(o.detach().to(v.dtype), v), f'{k}: the weights are those of the file'

def check_refused(e, sd, changes):
    "Where all that is wrong with a file is tensors without plain values, it is refused by the name of one"
    odd = [k for k,o in sd.items() if isinstance(o, torch.Tensor) and not _plain(o)]
    if odd and all(c[0]=='cast' and list(_casts)[c[2]%len(_casts)] in _valueless for c in changes): assert any(repr(k) in str(e) for k in odd), str(e)

def load_by_fastai(model, file, r, before):
    "`Learner.load` after `split`; torch's own words on a file that cannot be read"
    learn = make_learner(model, r, 'fused_adamw')
    learn.split()
    learn.path,was = file.parent,look(learn)
    (learn.path/'models').mkdir()
    file.rename(learn.path/'models'/'w.pth')
    try: learn.load('w', with_opt=False)
    except Exception as e:
        assert not moved(before, values(model)) and look(learn)==was, 'rule 8: a refused file changes nothing'
        ends[type(e).__name__] += 1
        return e
    ends['fine'] += 1

def check_checkpoint(r, ckpt, how):
    "A changed file is loaded tensor by tensor, or refused completely"
    changes,wrap,hurt = ckpt
    model = timm.create_model('test_resnet') if how=='timm' else make_net(r)
    if how!='timm' and any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()): return
    own = {k:v.clone()+1 if v.is_floating_point() else v.clone() for k,v in model.state_dict().items()}
    sd,res = changed_tensors(own, changes),[model]
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        file,before = _write(sd, wrap, hurt, Path(d)),values(model)
        if how=='timm': e = _error(lambda: res.append(timm_model('test_resnet', False, file, 3)))
        elif how=='learner':
            try: e = load_by_fastai(model, file, r, before)
            except DiscriminativeError: return # `check_model` looks at these
        else: e = _error(lambda: load_pretrained(model, file))
    if e: assert not moved(before, values(model)), 'rule 8: a refused file changes nothing'
    if hurt is None and e and wrap in ('plain','safetensors'): check_refused(e, sd, changes)
    elif hurt is None and not e: check_loaded(sd, res[-1], changes)

# ---- properties of folders

def _image(mode, size=(5,4), fmt='PNG'):
    f = io.BytesIO()
    Image.new(mode, size).save(f, fmt)
    return f.getvalue()

_good = dict(rgb=_image('RGB'), grey=_image('L'), one=_image('1'), palette=_image('P'), alpha=_image('RGBA'), deep=_image('I;16'), jpg=_image('RGB',
    fmt='JPEG'), cmyk=_image('CMYK', fmt='JPEG'), gif=_image('P', fmt='GIF'),
    dot=_image('RGB', (1,1)), long=_image('RGB', (1,300)), float=_image('F', fmt='TIFF'))
_broken = dict(empty=b'', cut=_good['rgb'][:-20], half=_good['jpg'][:len(_good['jpg'])//2], text=b'no image', zeros=bytes(64), head=_good['rgb'][:20])
_suffixes = '.png .jpg .PNG .jpeg .gif .tif .bmp'.split()
_folders = ['a','b','c','train','valid','val','test','Train','.x','é','名','a b','x\n','-n','*','~','a.png','train.d',os.fsdecode(b'a\xff'),'y'*200]
stems = st.one_of(st.sampled_from([*map(str, range(6)),'x','.h','é',os.fsdecode(b'\xff'),'a b','-','%s','{}']),
    st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1, max_size=5))
pictures = st.tuples(stems, st.one_of(st.sampled_from(_suffixes[:2]), st.sampled_from([*_suffixes,'.txt',''])), st.one_of(*[st.sampled_from(list(_good))]*4,
    st.sampled_from(list(_broken))))
links = st.tuples(st.sampled_from(['l','m','l.png','train']), st.sampled_from(['.','..','../..','nowhere','a','../a','l','0.png','../a/0.png']))
def _folder(dirs): return st.fixed_dictionaries(dict(dirs=dirs, files=st.lists(pictures, max_size=5), links=st.one_of(*[st.just([])]*4, st.lists(links,
    max_size=1))))
_none = st.just([])
_inner = st.recursive(_folder(_none), lambda f: _folder(st.lists(st.tuples(st.sampled_from(_folders), f), max_size=2)), max_leaves=2)
_root = st.lists(st.tuples(st.one_of(st.sampled_from(_folders[:3]), st.sampled_from(_folders)), _inner), max_size=5)
folders = st.one_of(_folder(_root), _folder(_root), st.builds(lambda f, split: dict(f, dirs=[('train',f),*split]), _folder(_root), st.one_of(_none,
    st.tuples(st.tuples(st.sampled_from(['valid','val']), _folder(_root))).map(list))))

def make_folder(r, path, top=None):
    "Write the folder of recipe `r`; what cannot be written is left out"
    top = top or path
    with contextlib.suppress(OSError): path.mkdir()
    if not path.is_dir() or path.is_symlink(): return
    for name,suffix,kind in r['files']:
        with contextlib.suppress(OSError): (path/(name+suffix)).write_bytes({**_good,**_broken}[kind])
    for name,o in r['dirs']: make_folder(o, path/name, top)
    for name,to in r['links']:
        if not os.path.abspath(path/to).startswith(os.path.abspath(top)): continue # all of the disk would be looked through
        with contextlib.suppress(OSError): (path/name).symlink_to(to)

def _opens(f):
    try: Image.open(f).load()
    except Exception: return False
    return True

def _expected(root):
    "Names of classes -> images and broken files, of a folder without links and without `train`"
    res = {}
    for d in sorted(o for o in root.iterdir() if o.is_dir() and not o.name.startswith('.')):
        fs = [o for o in d.rglob('*') if o.is_file() and o.suffix.lower() in image_extensions and not any(p.startswith('.') for p in o.relative_to(root).parts)]
        res[d.name] = sorted(filter(_opens, fs)),sorted(o for o in fs if not _opens(o))
    return res

def _batch(dls):
    b = dls.train.new(shuffle=False, drop_last=False).one_batch()
    assert b[0].shape[1:]==(3,8,8)

def check_folder(r, n_train, valid_pct):
    "Every image of a class is found once, under its class, or the folder is refused"
    with tempfile.TemporaryDirectory() as d:
        root,res = Path(d)/'f',[]
        make_folder(r, root)
        linked = any(o.is_symlink() for o in root.rglob('*'))
        e = _error(lambda: res.append(folder_images(root)))
        assert e is None or isinstance(e, DataError)
        plain = not linked and not any(o.is_dir() and o.name.lower()=='train' for o in root.iterdir())
        want = _expected(root) if plain else {}
        full = {k:v for k,v in want.items() if v[0]}
        if plain: assert (e is None)==(len(full)>1 and sum(len(g) for g,_ in full.values())>3), 'two classes and four images are enough'
        if e: return
        fi, = res
        assert len(fi.files)==len(fi.labels)==len({*fi.files}) and fi.files and all(map(_opens, fi.files)) and not any(map(_opens, fi.unreadable))
        assert all(k in f.relative_to(root).parts for f,k in zip(fi.files, fi.labels)), 'a class is a folder'
        if plain:
            assert {k:[f for f,c in zip(fi.files, fi.labels) if c==k] for k in fi.classes}=={k:g for k,(g,_) in full.items()}
            assert sorted(fi.unreadable)==sorted(b for _,bs in want.values() for b in bs)
        if _error(lambda: res.append(demo_dls(fi, n_train, 8, 4, 1, valid_pct))): return
        sets = [[dls.train_ds.items,dls.valid_ds.items] for dls in (res[1], demo_dls(fi, n_train, 8, 4, 1, valid_pct))]
        assert [list(map(str, o)) for o in sets[0]]==[list(map(str, o)) for o in sets[1]], 'the same seed gives the same split'
        train,valid = map(set, sets[0])
        assert train and valid and not train&valid and train|valid<={*fi.files}
        of = dict(zip(fi.files, fi.labels))
        assert {of[o] for o in train}=={*fi.classes}, 'each class is trained on'
        assert fi.is_valid is None or {f for f,v in zip(fi.files, fi.is_valid) if v}==valid
        assert [res[1].vocab[int(y)] for _,y in res[1].train_ds]==[of[o] for o in res[1].train_ds.items]
        if len(train)<9: _batch(res[1])

# ---- properties of command lines

class Stop(DiscriminativeError): "Everything is there, so training would begin"

@lru_cache(maxsize=None)
def place():
    "A folder to run commands in"
    box = tempfile.TemporaryDirectory()
    root = Path(box.name)
    def _f(**kw): return {**dict(dirs=[], files=[], links=[]), **kw}
    images = _f(files=[(str(i),'.png','rgb') for i in range(4)])
    make_folder(_f(dirs=[('ok',_f(dirs=[('a',images),('b',images)])), ('empty',_f(links=[('loop','loop')]))]), root)
    (root/'afile').write_text('x')
    torch.save(timm.create_model('test_resnet').state_dict(), root/'w.pth')
    return box,root

_paths = ['ok','ok','ok','empty','afile','nowhere','','empty/loop','.','ok/a','a\0b','~nobody/x','-x','w.pth',os.fsdecode(b'\xff')]
_archs = ['test_resnet']*6+['test_vit','resnet18.zzz','','x','resnet','tv_resnet','test_resnet.r160_in1k','../x','é','a'*500]
_figures = ['1','2','3','8','32','64']*3+['0','-1','1.5','1e-3','1e-4','.5','nan','inf','1'+'0'*30,'','x','block','all','٣',' 2','1_0','0x10']
_strategies = [*(o.name for o in list_strategies()),'nope','']
_values = {**{f"--{k}":_figures for k in 'epochs size bs n-groups n-train valid-pct seed seeds threads lr-low lr-high workers n-steps folds time-limit tta'.split()},
    '--strategy':_strategies, '--out':['out','out/x','afile','','ok'],
    '--arch':_archs, '--weights-file':_paths, '--data':['clipart','elpv','x'], '--optimizer':['adamw','sgd','adam'], '--folder':_paths, '--csv':['out.csv','out/x.csv','w.pth',''], '--like':_paths, '--positive':['a','x'],
    '--ensemble':_paths, '--strategies':_strategies}
_switches = '--quiet --from-scratch --compare --json --overwrite --debug --help --version -h --'.split()
_options = st.sampled_from(list(_values))
_pairs = _options.flatmap(lambda k: st.tuples(st.just(k), st.sampled_from(_values[k])))
_odd = st.one_of(st.sampled_from(_switches), st.text(max_size=6), _options, _pairs.map('='.join)).map(lambda o: (o,))
words = st.one_of(_pairs, _pairs, _pairs, _odd)
good = dict(finetune=[('ok','--arch','test_resnet','--from-scratch','--size','32'),('ok','--arch','test_resnet','--weights-file','w.pth','--size','32')],
    groups=[('test_resnet',)], preset=[('test_resnet',)], families=[()], demo=[()],
    predict=[('w.pth','ok')], compare=[('ok','--arch','test_resnet','--from-scratch','--size','32','--strategies','uniform')])
_starts = st.sampled_from([(c,*o) for c,os in good.items() for o in os])
def _line(start, more): return [*start, *(o for w in more for o in w)]
_any = st.tuples(st.sampled_from([*good,'bogus']), st.sampled_from(_paths+_archs))
lines = st.builds(_line, st.one_of(_starts, st.sampled_from([('finetune',*o) for o in good['finetune']]), _any), st.lists(words, max_size=3))

_work = '_run','compare_strategies','predict_images' # where a command begins to train or predict

def check_line(args):
    "A command ends with an expected status and says why"
    out,err,(_,root),was,threads = io.StringIO(),io.StringIO(),place(),os.getcwd(),torch.get_num_threads()
    def _stop(*args, **kwargs): raise Stop('would train')
    work = {k:getattr(jobs, k) for k in _work}
    for k in work: setattr(jobs, k, _stop)
    before = sorted(map(str, root.rglob('*')))
    os.chdir(root)
    status = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = cli.main(list(args))
    except SystemExit as e: status = e.code or 0
    except (DiscriminativeError,OSError): # with `--debug` as it was raised
        if '--debug' not in args: raise
        status = 2
    finally:
        for k,f in work.items(): setattr(jobs, k, f)
        os.chdir(was)
        torch.set_num_threads(threads)
    said = err.getvalue()
    assert status in (0,1,2) and 'Traceback' not in said
    assert '(--debug shows where)' not in said, 'an error that nobody foresaw'
    assert status==0 or said.strip() or '--debug' in args, 'an error says why'
    assert status==2 or out.getvalue().strip() or status==1, 'a command prints something'
    assert sorted(map(str, root.rglob('*')))==before, 'no folder is left'
    ends[f'status {status}'+(', would train' if 'would train' in said else '')] += 1

# ---- running them

fused = st.sampled_from(['fused_adamw','fused_adamw','fused_sgd'])
properties = dict(folders=(check_folder, (folders,st.sampled_from([None,None,1,2,3,5,100]),st.sampled_from([.2,.5,.01,.99])), 200),
    lines=(check_line, (lines,), 250), states=(check_state, (nets,fused,fused,st.sampled_from([None,None,2,3]),mutations), 200),
    checkpoints=(check_checkpoint, (nets,checkpoints,st.sampled_from(['own','own','timm','learner'])), 300),
    models=(check_model, (nets,args), 400), stock=(check_stock, (nets,st.sampled_from(list(opts))), 100))

def run(name, n, seed=None, faults=None):
    "Try property `name` in `n` cases: always the same ones without a `seed`; collect what fails in `faults` (kind -> cases) if that is given"
    f,given_by,_ = properties[name]
    def _f(case):
        try: f(*case)
        except Exception as e:
            if faults is None: raise
            faults.setdefault(_kind(e), []).append(case)
    _f.__name__ = _f.__qualname__ = f.__name__
    config = settings(max_examples=n, derandomize=seed is None, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    _f = config(given(st.tuples(*given_by))(_f))
    (_f if seed is None else hypothesis.seed(seed)(_f))()

_posix = pytest.mark.skipif(os.name=='nt', reason='Windows has no such names and links')

@pytest.mark.parametrize('name', [pytest.param(o, marks=_posix) if o in ('folders','lines') else o for o in properties])
def test_random(name): run(name, properties[name][2])

def _kind(e):
    "A name for the fault that raised `e`: where, and what"
    at = [o for o in traceback.extract_tb(e.__traceback__) if 'fastai_discriminative' in o.filename or o.filename==__file__][-1]
    said = re.sub(re.escape(tempfile.gettempdir())+'/tmp[^/]*', '', str(e))
    return f'{Path(at.filename).name}:{at.lineno} {at.name}: {type(e).__name__}: {said[:200]}'

def _report(total, seed):
    "Try all properties in `total` cases, and print what was found; the exit status"
    torch.set_num_threads(1)
    share,n_kinds = total/sum(n for *_,n in properties.values()),0
    for name,(*_,n) in properties.items():
        ends.clear()
        faults = {}
        run(name, round(n*share), seed, faults)
        n_kinds += len(faults)
        print(f"{name}: {round(n*share)} cases, {', '.join(f'{v} {k}' for k,v in ends.most_common())}; {len(faults)} kinds of fault", flush=True)
        for k,cases in faults.items(): print(f'  {len(cases)} x {k}\n    {min(map(repr, cases), key=len)}')
    return n_kinds>0

if __name__=='__main__':
    _args = [*map(int, sys.argv[1:])]
    _seed = _args[1] if len(_args)>1 else random.randrange(2**32)
    print(f'seed {_seed}')
    sys.exit(_report(_args[0] if _args else 20000, _seed))
