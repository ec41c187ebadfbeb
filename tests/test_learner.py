"The learner as a demanding user meets it: freezes that freeze, presets that arrive, files that load, mistakes that are named, and nothing else changed"
import copy,inspect,pickle,subprocess,sys,textwrap,warnings
from functools import partial

import numpy as np,pytest,timm,torch
from PIL import Image
from timm.layers import EvoNorm2dB0
from torch import nn

from fastai.vision.all import (Adam,Callback,CancelFitException,CrossEntropyLossFlat,DataLoaders,GradientAccumulation,ImageBlock,ImageDataLoaders,Learner,
    MaskBlock,Normalize,OptimWrapper,ProgressCallback,RMSProp,SGD,DataBlock,accuracy,error_rate,load_learner,noop,resnet18,
    squeezenet1_1,unet_learner,vision_learner,xresnet18)
from torch.utils.data import TensorDataset
from fastai.data.all import DataLoader

from fastai_discriminative.all import *
from fastai_discriminative.learner import TrueFreeze

# ---- data and learners

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "30 noisy images of 32 pixels in three classes"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i,c in enumerate(('ant','bee','cow')):
        (path/c).mkdir()
        for j in range(10): Image.fromarray(rng.integers(40*i, 120+40*i, (32,32,3), dtype=np.uint8)).save(path/c/f'{j}.png')
    return path

@pytest.fixture
def dls(folder): return ImageDataLoaders.from_folder(folder, valid_pct=0.3, seed=1, bs=8, num_workers=0)

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def stock(dls, arch='resnet10t', **kwargs): return quiet(vision_learner(dls, arch, pretrained=False, **kwargs))
def ours(dls, arch='resnet10t', **kwargs): return quiet(discriminative_learner(dls, arch, pretrained=False, **kwargs))
def plain(dls, model, **kwargs): return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), **kwargs))

def conv(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride=2), nn.BatchNorm2d(nf), nn.ReLU())
def own_net(): return nn.Sequential(conv(3,8), conv(8,8), conv(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

class Tied(nn.Module):
    "The first and the last linear layer share their weight"
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b,self.c = conv(3,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16)
        self.out,self.c.weight = nn.Linear(16,3),self.a.weight
    def forward(self, x): return self.out(self.c(self.b(self.a(self.stem(x).mean((2,3))))))

class Idle(nn.Module):
    "Has a layer that its forward pass never uses"
    def __init__(self):
        super().__init__()
        self.stem,self.forgotten,self.out = conv(3,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x): return self.out(self.stem(x).mean((2,3)))

class Inner(nn.Module):
    "A user's wrapper that happens to call its part `module`, next to a part with the same names inside"
    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict(dict(fc=nn.Linear(3,8)))
        self.fc = nn.Linear(8,3)
    def forward(self, x): return self.fc(self.module['fc'](x.mean((2,3))))

# ---- what to look at

def weights(learn): return {n:o.detach().clone() for n,o in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def changed(learn, before): return {n for n,o in learn.model.state_dict().items() if not torch.equal(o, before[n])}
def flags(learn): return {n:p.requires_grad for n,p in learn.model.named_parameters()}
def frozen_names(learn): return {n for g,f in zip(learn.layer_groups, learn.layer_groups.frozen) for n in g.param_names if f}
def lists(opt): return [[id(p) for p in ps] for ps in opt.param_lists]
def norm_modules(learn):
    def bare(m): return not any(True for c in m.children() for _ in c.parameters())
    return {n:m for n,m in learn.model.named_modules() if 'Norm' in type(m).__name__ and bare(m)}
def norm_names(learn): return {f'{n}.{k}' for n,m in norm_modules(learn).items() for k in m.state_dict()}
def body(names): return {n for n in names if n.startswith('0.')}
def under(names, groups):
    "Those of state `names` that belong to a layer of `groups` (parameters, and the buffers of modules that have parameters there)"
    mods = {n.rpartition('.')[0] for g in groups for n in g.param_names}
    return {n for n in names if n.rpartition('.')[0] in mods}

def snapshot(learn):
    "All that a refused call must leave alone"
    opt = learn.opt
    return dict(w=weights(learn), f=flags(learn), mode={n:m.training for n,m in learn.model.named_modules()}, spl=learn.splitter, opt=opt,
        func=learn.opt_func, cbs=list(learn.cbs), bn=learn.train_bn,
        preset=learn.__dict__.get('preset'), peak=learn.__dict__.get('peak_lrs'), hyp=opt and [dict(h) for h in opt.hypers], idx=opt and opt.frozen_idx,
        lists=opt and lists(opt), rng=torch.get_rng_state())

def unchanged(learn, was):
    now = snapshot(learn)
    assert same(now.pop('w'), was['w'])
    assert torch.equal(now.pop('rng'), was['rng'])
    for k,v in now.items():
        assert v is was[k] or (k not in ('opt','spl','preset') and v is not None and np.all(v==was[k])), f'{k} changed from {was[k]} to {v}'

class Hypers(Callback):
    "Keeps the rates that the optimiser has at each step"
    order = 100
    def before_fit(self): self.lrs = []
    def before_step(self): self.lrs.append([h['lr'] for h in self.opt.hypers])
    @property
    def peak(self): return np.max(self.lrs, axis=0)

class Raise(Callback):
    "Raises `exc` in a training batch"
    order = 50
    def __init__(self, exc, at='after_backward'):
        self.exc = exc
        setattr(self, at, self._go)
    def _go(self):
        if self.training and self.train_iter==1: raise self.exc

# ---- rule 7: nothing changes until asked

_script = '''
    import sys,random,numpy as np,torch
    from fastai.vision.all import *
    if sys.argv[1]=='with': from fastai_discriminative.all import *
    torch.set_num_threads(1)
    res = {}
    def go(name, f, n_split=None):
        random.seed(1); np.random.seed(1); torch.manual_seed(1)
        dls = ImageDataLoaders.from_folder(sys.argv[2], valid_pct=0.3, seed=1, bs=8, num_workers=0, batch_tfms=[Flip(), Brightness()])
        learn = vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy)
        f(learn)
        res[name] = {**learn.model.state_dict(), 'rng': torch.get_rng_state(), 'lrs': tensor([h['lr'] for h in learn.opt.hypers]),
            'loss': tensor(learn.recorder.losses)}
    go('fine_tune', lambda l: l.fine_tune(2))
    go('number', lambda l: l.fit_one_cycle(2, 3e-3))
    go('none', lambda l: l.fit_one_cycle(2))
    go('slice', lambda l: l.fit_one_cycle(2, slice(1e-5,1e-2), wd=0.1))
    go('keyword', lambda l: l.fit_one_cycle(n_epoch=2, lr_max=slice(1e-2), pct_start=0.5))
    go('array', lambda l: (l.freeze(), l.fit_one_cycle(1, np.array([1e-4,1e-3])), l.unfreeze(), l.fit_one_cycle(1, [1e-4,1e-3], 10., 1e3)))
    go('flat_cos', lambda l: (l.freeze(), l.fit_flat_cos(2, 1e-3), l.fit(1, slice(1e-4,1e-3)), l.fit_sgdr(1, 1, slice(1e-2,1e-4))))
    torch.save(res, sys.argv[3])
'''

def test_stock_learners_train_bit_identically_with_and_without_us(folder, tmp_path):
    res = []
    for how in ('with','without'):
        p = subprocess.run([sys.executable, '-c', textwrap.dedent(_script), how, str(folder), str(tmp_path/how)], capture_output=True, text=True)
        assert p.returncode==0, p.stderr
        res.append(torch.load(tmp_path/how))
    assert res[0].keys()==res[1].keys() and len(res[0])==7
    for k in res[0]: assert same(res[0][k], res[1][k]), k
    assert not same(res[0]['number'], res[0]['slice'])

def test_a_stock_learner_takes_reversed_and_zero_rates_as_ever(dls):
    learn = stock(dls)
    learn.fit_one_cycle(1, slice(1e-3,1e-5))
    assert learn.opt.hypers[0]['lr']>learn.opt.hypers[-1]['lr']

def test_calls_look_as_in_fastai():
    for name,args in (('fit_one_cycle',['self','n_epoch','lr_max','div']), ('fit_flat_cos',['self','n_epoch','lr','div_final']),
        ('fit',['self','n_epoch','lr','wd'])):
        assert list(inspect.signature(getattr(Learner, name)).parameters)[:4]==args
    with pytest.raises(TypeError): Learner.fit_one_cycle(object())

# ---- rule 6: frozen is frozen

kinds = dict(adam=dict(opt_func=Adam), fused_adamw=dict(opt_func=fused_adamw), sgd=dict(opt_func=partial(SGD, mom=0.9)),
    fused_sgd=dict(opt_func=partial(fused_sgd, mom=0.9)))

def warm(dls, opt, n_groups=4, train_norm='group', arch='resnet10t', **kwargs):
    "A split learner that has trained unfrozen, so that there is momentum"
    learn = stock(dls, arch, wd=0.3, **kinds[opt], **kwargs).split(n_groups, train_norm=train_norm)
    learn.fit_one_cycle(1, 1e-2)
    return learn

@pytest.mark.parametrize('opt', kinds)
def test_frozen_parameters_and_statistics_do_not_move_by_one_bit(dls, opt):
    learn = warm(dls, opt)
    for how,n in ((lambda: learn.freeze(), 3), (lambda: learn.freeze_to(-2), 2), (lambda: learn.freeze_to(2), 2), (lambda: learn.freeze_to(1), 1)):
        how()
        assert learn.opt.frozen_idx==n
        before,groups = weights(learn),learn.layer_groups
        learn.fit_one_cycle(1, 1e-2)
        moved = changed(learn, before)
        assert not under(moved, groups[:n])
        assert {p for g in groups[n:] for p in g.param_names}<=moved
    learn.unfreeze()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert changed(learn, before)==set(before)

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_train_norm_true_is_fastais_way(dls, opt):
    learn = warm(dls, opt, train_norm=True)
    learn.freeze()
    before,norms = weights(learn),norm_names(learn)
    learn.fit_one_cycle(1, 1e-2)
    moved = changed(learn, before)
    assert body(moved)==body(norms) and norms<=moved

@pytest.mark.parametrize('opt', ['adam','fused_adamw','fused_sgd'])
def test_train_norm_false_never_moves_a_norm_of_the_body(dls, opt):
    learn = warm(dls, opt, train_norm=False)
    for how in (learn.unfreeze, learn.freeze, learn.unfreeze, lambda: learn.freeze_to(2)):
        how()
        before,norms = weights(learn),norm_names(learn)
        learn.fit_one_cycle(1, 1e-2)
        moved = changed(learn, before)
        assert not body(norms)&moved
        assert norms-body(norms)<=moved and norms-body(norms)
    learn.unfreeze()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert changed(learn, before)==set(before)-body(norm_names(learn))

@pytest.mark.parametrize('train_norm', ['group',True,False])
def test_from_the_first_fit_on_a_frozen_learner_is_frozen(dls, train_norm):
    learn = ours(dls, train_norm=train_norm, wd=0.3)
    learn.freeze()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert body(changed(learn, before))==(body(norm_names(learn)) if train_norm is True else set())

@pytest.mark.parametrize('arch', ['test_efficientnet','test_vit','test_byobnet','evonorm','xresnet18'])
def test_other_kinds_of_norms_freeze_as_well(dls, arch):
    if arch=='xresnet18': learn = quiet(discriminative_learner(dls, xresnet18, pretrained=False))
    elif arch=='evonorm': learn = plain(dls, nn.Sequential(*[nn.Sequential(nn.Conv2d(i,8,3), EvoNorm2dB0(8)) for i in (3,8,8)], nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8,3))).split(3)
    else: learn = ours(dls, arch, **(dict(img_size=32) if 'vit' in arch else {}))
    learn.freeze()
    before,cold = weights(learn),learn.layer_groups[:-1]
    learn.fit_one_cycle(1, 1e-2)
    moved = changed(learn, before)
    assert cold and not under(moved, cold) and under(moved, learn.layer_groups[-1:])

def test_no_flag_on_frozen_parameters_after_split(dls):
    learn = stock(dls)
    learn.freeze()
    learn.split(4)
    assert {n for n,f in flags(learn).items() if not f}==frozen_names(learn)==body(flags(learn))

def test_validating_in_the_middle_of_a_fit_thaws_nothing(dls):
    class ValidateAgain(Callback):
        def after_train(self): self.learn.validate(0)
    learn = warm(dls, 'adam')
    learn.freeze()
    before = weights(learn)
    learn.fit_one_cycle(2, 1e-2, cbs=ValidateAgain())
    assert not body(changed(learn, before))

def test_freezing_in_the_middle_of_a_fit_freezes_at_once(dls):
    class FreezeLater(Callback):
        def before_epoch(self):
            if self.epoch==1:
                self.learn.freeze()
                self.before = weights(self.learn)
    learn = warm(dls, 'adam')
    learn.fit_one_cycle(2, 1e-2, cbs=(cb:=FreezeLater()))
    assert not body(changed(learn, cb.before))

def test_thawing_in_the_middle_of_a_fit_thaws_norms_as_well(dls):
    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch==1:
                self.learn.unfreeze()
                self.before = weights(self.learn)
    learn = warm(dls, 'adam')
    learn.freeze()
    learn.fit_one_cycle(2, 1e-2, cbs=(cb:=Thaw()))
    assert changed(learn, cb.before)==set(cb.before)
    assert all(flags(learn).values())

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_reset_opt_and_export_keep_the_freeze(dls, opt, tmp_path):
    learn = warm(dls, opt, path=tmp_path)
    learn.freeze()
    learn.export('x.pkl')
    assert learn.layer_groups.frozen==[True]*3+[False]
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    learn.fit_one_cycle(1, 1e-2, reset_opt=True)
    assert not body(changed(learn, before))

def test_lr_find_leaves_all_as_it_was(dls, tmp_path):
    learn = ours(dls, path=tmp_path)
    learn.freeze()
    before,f = weights(learn),flags(learn)
    learn.lr_find(num_it=7, show_plot=False, suggest_funcs=())
    assert same(before, weights(learn)) and f==flags(learn) and learn.opt.frozen_idx==len(learn.layer_groups)-1

@pytest.mark.parametrize('bad', ['groups','all',None,1,0,'True'])
def test_train_norm_is_one_of_three(dls, bad):
    learn = stock(dls)
    was = snapshot(learn)
    with pytest.raises(SplitterError, match='train_norm'): learn.split(train_norm=bad)
    unchanged(learn, was)

# ---- split keeps the state

def test_a_frozen_learner_stays_frozen_and_a_free_one_free(dls):
    learn = stock(dls)
    assert not any(learn.split().layer_groups.frozen)
    learn = stock(dls)
    learn.freeze()
    assert learn.split(5).layer_groups.frozen==[True]*4+[False]
    assert learn.split('block').layer_groups.frozen==[True]*(len(learn.layer_groups)-1)+[False]
    assert learn.split(2).layer_groups.frozen==[True,False]

def test_a_boundary_inside_a_new_group_thaws_that_group(dls):
    learn = ours(dls, n_groups=6)
    learn.freeze_to(3)
    assert learn.split(3).layer_groups.frozen[-2:]==[False,False]
    cold = frozen_names(learn)
    assert all(f==(n not in cold) for n,f in flags(learn).items())

def test_parameters_frozen_by_hand_stay_frozen(dls):
    learn = stock(dls)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.split(4)
    assert learn.layer_groups.frozen==[True]*3+[False]
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not body(changed(learn, before))

def test_a_single_parameter_frozen_by_hand_stays_frozen(dls):
    learn = stock(dls)
    learn.model[0].model.layer3[0].conv1.weight.requires_grad_(False)
    learn.split(4, train_norm=False)
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert '0.model.layer3.0.conv1.weight' not in changed(learn, before)
    assert [n for n,f in flags(learn).items() if not f]==['0.model.layer3.0.conv1.weight']

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_moments_stay_with_their_parameters_over_a_second_split(dls, opt):
    learn = warm(dls, opt)
    key = 'grad_avg' if opt=='adam' else 'exp_avg'
    state = lambda: {n:s[key].clone() for n,p in learn.model.named_parameters() for s in [learn.opt.state[p] if opt=='adam' else learn.opt.opt.state[p]] if key in s}
    old = state()
    assert len(old)==len(list(learn.model.parameters()))
    learn.split('block')
    assert same(old, state()) and len(learn.opt.param_lists)==len(learn.layer_groups)
    learn.fit_one_cycle(1, 1e-3)

def test_splitting_twice_leaves_one_freeze_callback(dls):
    learn = stock(dls).split(3).split(4, train_norm=False).split(5)
    assert len(learn.cbs.filter(lambda o: isinstance(o, TrueFreeze)))==1
    assert learn.true_freeze.train_norm=='group' and len(learn.layer_groups)==len(learn.opt.hypers)==5

def test_split_does_not_use_random_numbers_or_change_weights(dls):
    for learn in (stock(dls), plain(dls, own_net())):
        before,rng,npr = weights(learn),torch.get_rng_state(),np.random.get_state()[1].copy()
        learn.split()
        assert same(before, weights(learn)) and torch.equal(rng, torch.get_rng_state()) and (npr==np.random.get_state()[1]).all()

def check_groups(learn, n=None):
    "Rules 1 and 4, and that the optimiser has these very groups"
    groups,names = learn.layer_groups,[n for n,_ in learn.model.named_parameters()]
    assert sorted(n for g in groups for n in g.param_names)==sorted(names)
    ps = dict(learn.model.named_parameters())
    assert lists(learn.opt)==[[id(ps[n]) for n in g.param_names] for g in groups]
    assert n is None or len(groups)==n
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-3)
    assert set(names)<=changed(learn, before)
    return groups

def test_split_on_unet(folder):
    files = sorted(folder.glob('*/*.png'))[:6]
    db = DataBlock((ImageBlock,MaskBlock(['a','b'])), get_y=lambda f: np.zeros((32,32), np.uint8), splitter=lambda o: (list(range(4)),[4,5]))
    learn = quiet(unet_learner(db.dataloaders(files, bs=2, num_workers=0), resnet18, pretrained=False))
    learn.freeze()
    groups = learn.split(4).layer_groups
    assert groups.rule=='registered' and groups.frozen==[True]*3+[False] and groups[-1].is_head
    assert all(n.startswith('layers.0.') for g in groups[:-1] for n in g.param_names)
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not {n for n in changed(learn, before) if n.startswith('layers.0.')}

@pytest.mark.parametrize('make,rule', [(lambda: timm.create_model('resnet10t', num_classes=3), 'registered'),
    (lambda: timm.create_model('test_byobnet', num_classes=3), 'timm'),
    (lambda: squeezenet1_1(num_classes=3), 'registered'), (own_net, 'traced'), (Tied, 'traced')], ids=['timm','timm-matcher','torchvision','own','tied'])
def test_split_on_a_plain_learner(dls, make, rule):
    learn = plain(dls, make()).split(3)
    assert learn.layer_groups.rule==rule
    check_groups(learn, 3)

def test_split_on_fastais_torchvision_learner(dls):
    learn = stock(dls, squeezenet1_1)
    learn.freeze()
    groups = learn.split(3).layer_groups
    assert groups.rule=='registered' and groups.frozen==[True,True,False]
    learn.unfreeze()
    check_groups(learn, 3)

def test_a_model_without_head(dls):
    model = timm.create_model('resnet10t', num_classes=0)
    learn = quiet(Learner(dls, model, loss_func=lambda p,y: p.square().mean())).split(3)
    assert not any(g.is_head for g in learn.layer_groups)
    assert len(set(learn.preset.lrs(learn.layer_groups)))==3
    check_groups(learn, 3)

def test_shared_parameters_belong_to_the_first_group_that_uses_them(dls):
    groups = plain(dls, Tied()).split('block').layer_groups
    where = {n:i for i,g in enumerate(groups) for n in g.param_names}
    assert where['stem.0.weight']<=where['a.weight']<where['b.weight'] and 'c.weight' not in where

def test_names_that_only_look_like_a_wrappers(dls): check_groups(plain(dls, Inner()).split('block'))

def test_a_learner_with_an_arch_of_its_own(dls):
    learn = plain(dls, own_net())
    learn.arch = 'my_net'
    check_groups(learn.split(3), 3)

def test_a_learner_without_validation_set(dls):
    ds = TensorDataset(torch.randn(6,3,32,32), torch.tensor([0,1,2]*2))
    learn = plain(DataLoaders(DataLoader(ds, bs=3)), own_net()).split()
    assert learn.layer_groups.rule=='traced'

# ---- bad input: a clear error, and the learner unchanged

@pytest.mark.parametrize('how,exc,words', [
    (dict(n_groups=0), SplitterError, ['n_groups=0','from 2 to 6','block']),
    (dict(n_groups=-1), SplitterError, ['n_groups=-1','from 2 to 6']),
    (dict(n_groups=1), SplitterError, ['n_groups=1','from 2 to 6']),
    (dict(n_groups=7), SplitterError, ['n_groups=7','from 2 to 6','resnet10t','5 layers']),
    (dict(n_groups='blok'), SplitterError, ["'blok'","mean 'block'"]),
    (dict(n_groups=2.5), SplitterError, ['2.5','from 2 to 6']),
    (dict(n_groups=True), SplitterError, ['True','from 2 to 6']),
    (dict(preset='resnet10'), FamilyError, ["'resnet10'","'resnet10t'"]),
    (dict(preset='resnet10t.c3_in1kk'), FamilyError, ['c3_in1kk',"'c3_in1k'"]),
    (dict(preset='clip'), FamilyError, ["'clip'"]),
    (dict(preset=3), FamilyError, ['int']),
    (dict(preset=Preset(1e-4, 1e-2, optimizer='sgd')), PresetError, ['sgd','adamw','fused_sgd']),
    (dict(train_norm='grup'), SplitterError, ["'grup'","mean 'group'"])])
@pytest.mark.parametrize('kind', ['stock','split','unset'])
def test_bad_splits_name_the_fix_and_change_nothing(dls, how, exc, words, kind):
    learn = stock(dls)
    if kind!='unset': learn.freeze()
    if kind=='split': learn.split(3)
    was = snapshot(learn)
    with pytest.raises(exc) as e: learn.split(**how)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

bad_lrs = [([1e-3]*3, ['3 learning rates for 4 groups','layer']), ([1e-3]*5, ['5 learning rates for 4']), (np.ones(2), ['2 learning rates for 4']), ([], ['0 learning rates']),
    (slice(1e-2,1e-4), ['reversed','slice(0.0001, 0.01)']), (slice(-1e-4,1e-2), ['-0.0001','at least 0']), (slice(1e-4,-1e-2), ['-0.01','at least 0']), (slice(float('nan'),1e-2), ['nan']),
    (slice(1e-4,float('nan')), ['nan']), (slice(float('inf'),1e-2), ['inf','finite']), (slice(1e-4,float('inf')), ['inf']), (slice(float('inf')), ['inf']), (slice(1e-4,None), ['0.0001','end']),
    (slice(None), ['slice(None']), (float('nan'), ['nan']), (float('inf'), ['inf']), (-1e-3, ['-0.001']), ([1e-3,1e-3,float('nan'),1e-3], ['nan']), ('preste', ["'preste'","mean 'preset'"]),
    (slice('preset'), ["'preset'"]), (slice('a','b'), ["'a'"]), ('1e-3', ["'1e-3'"])]

@pytest.mark.parametrize('lr,words', bad_lrs, ids=[str(o[0]) for o in bad_lrs])
@pytest.mark.parametrize('fit', ['fit_one_cycle','fit_flat_cos','fit','fit_sgdr'])
def test_rates_that_cannot_be_meant_are_refused(dls, fit, lr, words):
    learn = stock(dls).split(4)
    was = snapshot(learn)
    with pytest.raises(PresetError) as e: getattr(learn, fit)(1, *([1] if fit=='fit_sgdr' else []), lr)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

@pytest.mark.parametrize('lr', [0., 1e-3, slice(1e-3), slice(1e-4,1e-3), slice(1e-3,1e-3), slice(0,1e-3), [1e-3]*4, [1e-3], [1e-3,1e-4,1e-5,0.],
    np.array([1e-4]*4), np.array([1e-4]*4, np.float32), (1e-4,)*4, None])
def test_rates_that_fastai_takes_arrive_as_in_fastai(dls, lr):
    learn,ref = stock(dls).split(4),Learner(dls, nn.Linear(1,1), loss_func=CrossEntropyLossFlat(),
        splitter=lambda m: [[nn.Parameter(torch.zeros(1))] for _ in range(4)])
    ref.create_opt()
    ref.opt.set_hyper('lr', ref.lr if lr is None else lr)
    learn.fit(1, lr)
    assert [h['lr'] for h in learn.opt.hypers]==[h['lr'] for h in ref.opt.hypers]

@pytest.mark.parametrize('lr', [np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5)])
def test_single_numbers_of_all_kinds_are_one_rate_for_all(dls, lr):
    learn = stock(dls).split(4)
    learn.fit(1, lr)
    assert [h['lr'] for h in learn.opt.hypers]==[0.5]*4

@pytest.mark.parametrize('opt', ['sgd','fused_sgd'])
def test_adamw_rates_do_not_go_to_sgd(dls, opt):
    learn = stock(dls, opt_func=kinds[opt]['opt_func']).split(4)
    was = snapshot(learn)
    with pytest.raises(PresetError, match='adamw units.*sgd units.*fused_adamw'): learn.fit_one_cycle(1, Preset(1e-5, 1e-3))
    unchanged(learn, was)
    assert learn.preset is None or learn.preset.optimizer=='sgd'
    learn.layer_groups
    learn.fit_one_cycle(1, Preset(1e-4, 1e-3, optimizer='sgd'))

def test_no_preset_in_these_units_says_what_to_do_and_that_works(dls):
    learn = plain(dls, own_net(), opt_func=SGD).split()
    assert learn.preset is None
    was = snapshot(learn)
    with pytest.raises(PresetError, match=r'learn.split\(fused=True\)'): learn.fit_one_cycle(1, 'preset')
    unchanged(learn, was)
    learn.split(fused=True)
    assert learn.preset.optimizer=='adamw' and optimizer_units(learn.opt)=='adamw'
    learn.fit_one_cycle(1, 'preset')

def test_a_preset_needs_groups(dls):
    learn = stock(dls)
    was = snapshot(learn)
    for lr in ('preset', Preset(1e-5, 1e-3)):
        with pytest.raises(PresetError, match=r'learn.split\(\)'): learn.fit_one_cycle(1, lr)
    unchanged(learn, was)

def test_an_optimizer_of_unknown_units_gets_a_warning(dls):
    learn = stock(dls, opt_func=RMSProp).split()
    with pytest.warns(UserWarning, match='adamw units'): learn.fit_one_cycle(1, 'preset')

def refuses(learn, exc, *words, **kwargs):
    was = snapshot(learn)
    with pytest.raises(exc) as e: learn.split(**kwargs)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

def test_no_trainable_parameter(dls):
    refuses(plain(dls, own_net().requires_grad_(False)), SplitterError, 'no trainable parameter', 'requires_grad_(True)')

def test_parameters_outside_the_forward_pass(dls):
    refuses(plain(dls, Idle()), SplitterError, '2 trainable parameters of Idle', 'forgotten.weight', 'requires_grad_(False)')
    learn = plain(dls, Idle())
    learn.model.forgotten.requires_grad_(False)
    learn.split()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not [n for n in changed(learn, before) if 'forgotten' in n]

def test_lazy_modules(dls):
    model = nn.Sequential(conv(3,8), nn.Flatten(), nn.LazyLinear(3))
    learn = quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat()))
    with pytest.raises(SplitterError, match='Run one batch'): learn.split()
    assert not isinstance(learn.splitter, Splitter) and learn.opt is None
    model(torch.zeros(2,3,32,32))
    check_groups(learn.split())

def test_a_built_optimizer_cannot_be_split(dls):
    model = own_net()
    refuses(plain(dls, model, opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1))), SplitterError, 'opt_func')

def test_an_optimizer_that_fails_leaves_the_learner_alone(dls):
    def fussy(ps, lr):
        if len(ps)>2: raise RuntimeError('only two groups')
        return Adam(ps, lr=lr)
    learn = stock(dls, opt_func=fussy)
    learn.freeze()
    refuses(learn, RuntimeError, 'only two', n_groups=4)

@pytest.mark.parametrize('arch,words', [('resnet10tt', ["'resnet10tt'","'resnet10t'"]), ('convnxt_tiny', ['convnext_tiny']),
    ('resnet10t.nope', ['nope','c3_in1k']), (None, ['NoneType'])])
def test_unknown_architectures(dls, arch, words):
    with pytest.raises(FamilyError) as e: discriminative_learner(dls, arch, pretrained=False)
    for w in words: assert w in str(e.value)

@pytest.mark.parametrize('kwargs,exc', [(dict(n_groups=99), SplitterError), (dict(preset='nope'), FamilyError), (dict(train_norm='nope'), SplitterError),
    (dict(preset=Preset(1e-3,1e-2,optimizer='sgd')), PresetError)])
def test_a_refused_learner_leaves_the_data_alone(dls, tmp_path, kwargs, exc):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path/'w.pth')
    was = list(dls.after_batch.fs)
    with pytest.raises(exc): discriminative_learner(dls, 'resnet10t', weights_file=tmp_path/'w.pth', **kwargs)
    assert list(dls.after_batch.fs)==was

# ---- checkpoints

@pytest.fixture(scope='session')
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp('ckpt')
    torch.manual_seed(7)
    torch.save(timm.create_model('resnet10t').state_dict(), path/'w.pth')
    return path

def tensors(ckpt): return torch.load(ckpt/'w.pth', weights_only=True)

def check_loaded(learn, sd):
    got = learn.model[0].model.state_dict()
    for k in got: assert torch.equal(got[k], sd[k]), k
    assert learn.opt.frozen_idx==len(learn.layer_groups)-1
    assert 'state_dict' not in str(learn.model[0].model.pretrained_cfg.keys()) and 'state_dict' not in learn.model[0].model.default_cfg

def save_as(kind, sd, path):
    from safetensors.torch import save_file
    if kind=='safetensors':
        save_file(sd, path/'a.safetensors')
        return path/'a.safetensors'
    wrap = dict(pth=lambda: sd, state_dict=lambda: dict(state_dict=sd, epoch=3), model=lambda: dict(model=sd),
        ema=lambda: dict(state_dict={k:torch.zeros_like(v) for k,v in sd.items()}, state_dict_ema=sd),
        module=lambda: {f'module.{k}':v for k,v in sd.items()}, compiled=lambda: {f'_orig_mod.{k}':v for k,v in sd.items()}, both=lambda: {f'_orig_mod.module.{k}':v for k,v in sd.items()},
        params=lambda: {k:nn.Parameter(v) if v.is_floating_point() else v for k,v in sd.items()},
        headless=lambda: {k:v for k,v in sd.items() if not k.startswith('fc.')})[kind]
    torch.save(wrap(), path/'a.pth')
    return path/'a.pth'

@pytest.mark.parametrize('kind', ['pth','safetensors','state_dict','model','ema','module','compiled','both','params','headless'])
def test_weights_come_from_a_file(dls, ckpt, tmp_path, kind):
    sd = tensors(ckpt)
    file = save_as(kind, sd, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = quiet(discriminative_learner(dls, 'resnet10t', weights_file=str(file) if kind=='pth' else file))
    check_loaded(learn, sd)
    assert any(isinstance(o, Normalize) for o in dls.after_batch.fs)

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('with_opt', [True,False])
def test_weights_come_from_a_fastai_learner(dls, tmp_path, opt, with_opt):
    learn = warm(dls, opt, path=tmp_path)
    file = learn.save('x', with_opt=with_opt)
    if opt=='adam' and with_opt: # fastai pickles its own classes into this file, so it cannot be read without running code
        with pytest.raises(WeightsError, match='with_opt=False'): discriminative_learner(dls, 'resnet10t', weights_file=file)
    else: check_loaded(discriminative_learner(dls, 'resnet10t', weights_file=file), learn.model[0].model.state_dict())

def test_gray_images_adapt_the_first_convolution(dls, ckpt):
    sd = tensors(ckpt)
    learn = discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'w.pth', n_in=1, normalize=False)
    w = learn.model[0].model.conv1[0].weight
    assert w.shape[1]==1 and torch.allclose(w, sd['conv1.0.weight'].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(learn.model[0].model.layer4[0].conv2.weight, sd['layer4.0.conv2.weight'])

def test_other_classes_load_with_a_warning(dls, ckpt, tmp_path):
    sd = tensors(ckpt)
    sd.update({'fc.weight':torch.randn(7,512), 'fc.bias':torch.randn(7)})
    torch.save(sd, tmp_path/'seven.pth')
    with pytest.warns(UserWarning, match=r"seven.pth' has a classifier of 7 classes"):
        learn = discriminative_learner(dls, 'resnet10t', weights_file=tmp_path/'seven.pth')
    check_loaded(learn, sd)

def truncated(src, dst, share=0.6):
    b = src.read_bytes()
    dst.write_bytes(b[:int(len(b)*share)])
    return dst

class Evil:
    def __reduce__(self): return (print, ('code ran',))

def bad_file(kind, ckpt, path):
    sd = tensors(ckpt)
    if kind=='missing': return path/'w.pth'
    if kind=='folder': return path
    if kind=='truncated': return truncated(ckpt/'w.pth', path/'t.pth')
    if kind=='truncated_safe': return truncated(save_as('safetensors', sd, path), path/'t.safetensors')
    if kind=='lfs': (path/'p.pth').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n')
    if kind=='empty': (path/'p.pth').write_bytes(b'')
    if kind=='evil': torch.save(dict(sd, x=Evil()), path/'p.pth')
    if kind=='whole_model': torch.save(timm.create_model('resnet10t'), path/'p.pth')
    if kind=='other': torch.save(timm.create_model('test_byobnet').state_dict(), path/'p.pth')
    if kind=='wider': torch.save(timm.create_model('resnet18').state_dict(), path/'p.pth')
    if kind=='part': torch.save({k:v for k,v in sd.items() if 'layer3' not in k}, path/'p.pth')
    if kind=='shape': torch.save({**sd, 'layer1.0.conv1.weight':torch.zeros(3,3)}, path/'p.pth')
    if kind=='list': torch.save([1,2], path/'p.pth')
    if kind=='no_tensor': torch.save(dict(epoch=3), path/'p.pth')
    return path/'p.pth'

@pytest.mark.parametrize('kind,words', [('missing',['No checkpoint file','w.pth']), ('folder',['No checkpoint file']), ('truncated',['t.pth','truncated']),
    ('truncated_safe',['t.safetensors','truncated']),
    ('lfs',['cannot be read']), ('empty',['cannot be read']), ('evil',['cannot be read','weights_only=False','save_file']), ('whole_model',['weights_only=False']),
    ('other',["does not fit 'resnet10t'","missing","architecture"]), ('wider',["does not fit 'resnet10t'"]), ('part',["does not fit 'resnet10t'",'layer3']), ('shape',["does not fit 'resnet10t'",'layer1.0.conv1.weight']),
    ('list',['no model weights']), ('no_tensor',['no model weights'])])
def test_bad_checkpoints_are_named(dls, ckpt, tmp_path, capsys, kind, words):
    was = list(dls.after_batch.fs)
    with pytest.raises(WeightsError) as e: discriminative_learner(dls, 'resnet10t', weights_file=bad_file(kind, ckpt, tmp_path))
    for w in words: assert w in str(e.value)
    assert 'code ran' not in capsys.readouterr().out
    assert list(dls.after_batch.fs)==was

def test_a_missing_file_names_its_neighbours(dls, ckpt):
    with pytest.raises(WeightsError, match=r"Did you mean 'w.pth'\?|Here are: w.pth"): discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'ww.pth')

def test_a_file_needs_a_timm_name(dls, ckpt):
    with pytest.raises(WeightsError, match='timm architecture name'): discriminative_learner(dls, resnet18, pretrained=False, weights_file=ckpt/'w.pth')

def test_a_failed_load_leaves_torch_alone(dls, ckpt, tmp_path):
    orig = nn.Module.load_state_dict
    with pytest.raises(WeightsError): discriminative_learner(dls, 'resnet10t', weights_file=bad_file('shape', ckpt, tmp_path))
    assert nn.Module.load_state_dict is orig

# ---- rule 4: names, not positions

def preds(learn, folder): return torch.stack([learn.predict(f)[2] for f in sorted(folder.glob('ant/*.png'))[:2]])

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_export_is_small_and_predicts_the_same(dls, ckpt, folder, tmp_path, opt):
    learn = quiet(discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'w.pth', opt_func=kinds[opt]['opt_func'], path=tmp_path))
    learn.fit_one_cycle(1, 'preset')
    want = preds(learn, folder)
    learn.export('x.pkl')
    n_bytes = sum(o.numel()*o.element_size() for o in learn.model.state_dict().values())
    assert (tmp_path/'x.pkl').stat().st_size < 1.1*n_bytes+3e5
    again = quiet(load_learner(tmp_path/'x.pkl'))
    assert torch.equal(preds(again, folder), want) and torch.equal(preds(learn, folder), want)
    assert again.layer_groups.names==learn.layer_groups.names and again.layer_groups.frozen==learn.layer_groups.frozen
    again.dls = dls
    before = weights(again)
    again.fit_one_cycle(1, 'preset')
    assert changed(again, before) and not body(changed(again, before))

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('how', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy','pickle'])
def test_copies_train_as_the_original_and_apart_from_it(dls, opt, how):
    learn = warm(dls, opt)
    learn.freeze_to(2)
    twin = how(learn)
    assert twin.layer_groups.frozen==learn.layer_groups.frozen and lists(twin.opt)!=lists(learn.opt)
    res,before = [],weights(learn)
    for l in (twin,learn):
        assert same(weights(l), before)
        torch.manual_seed(3)
        l.dls = dls
        dls.train.rng.seed(3)
        l.fit_one_cycle(1, slice(1e-4,1e-2))
        res.append(weights(l))
    assert same(*res) and not same(res[0], before)
    assert not under(changed(twin, before), twin.layer_groups[:2])

@pytest.mark.parametrize('n_groups', [2,4,'block'])
def test_saved_moments_go_into_other_groups_by_name(dls, tmp_path, n_groups):
    learn = warm(dls, 'fused_adamw', path=tmp_path)
    file = learn.save('x')
    new = stock(dls, opt_func=fused_adamw, path=tmp_path).split(n_groups)
    new.load('x', with_opt=True)
    assert same(weights(new), weights(learn)) and file.exists()
    old = {n:learn.opt.opt.state[p]['exp_avg'] for n,p in learn.model.named_parameters()}
    assert same(old, {n:new.opt.opt.state[p]['exp_avg'] for n,p in new.model.named_parameters()})
    new.fit_one_cycle(1, 1e-3)

class DDPLike(nn.Module):
    "Names its model `module`, as `DistributedDataParallel` does"
    def __init__(self, m):
        super().__init__()
        self.module = m
    def forward(self, *a): return self.module(*a)

def compiled(m): return torch.compile(m, backend='eager')
wraps = dict(compile=compiled, ddp=DDPLike, compile_ddp=lambda m: compiled(DDPLike(m)), ddp_compile=lambda m: DDPLike(compiled(m)))

@pytest.mark.parametrize('wrap', wraps)
def test_groups_are_found_by_name_in_wrapped_models(dls, wrap):
    learn = stock(dls).split(4)
    names,ids = learn.layer_groups.names,lists(learn.opt)
    learn.model = wraps[wrap](learn.model)
    learn.create_opt()
    assert lists(learn.opt)==ids and learn.layer_groups.names==names
    learn.freeze()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    moved = changed(learn, before)
    assert moved and not [n for n in moved if '0.model.' in n]

@pytest.mark.parametrize('wrap', wraps)
def test_wrapped_models_can_be_split(dls, wrap):
    want = stock(dls).split(4).layer_groups
    learn = stock(dls)
    learn.model = wraps[wrap](learn.model)
    got = learn.split(4).layer_groups
    assert [g.param_names for g in got]==[g.param_names for g in want] and got.rule==want.rule

# ---- presets reach the optimiser

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('call', [lambda l,p,c: l.fit_one_cycle(2, 'preset', pct_start=0.5, cbs=c), lambda l,p,c: l.fit_one_cycle(2, p, pct_start=0.5, cbs=c),
    lambda l,p,c: l.fit_one_cycle(n_epoch=2, lr_max=p, pct_start=0.5, cbs=c),
    lambda l,p,c: l.fit_one_cycle(2, lr_max='preset', pct_start=0.5, cbs=c), lambda l,p,c: l.fit_flat_cos(1, 'preset', cbs=c),
    lambda l,p,c: l.fit_flat_cos(1, lr=p, cbs=c), lambda l,p,c: l.fit(1, 'preset', cbs=c),
    lambda l,p,c: l.fit(1, p, cbs=c)], ids=['cycle','object','keyword','keyword-name','flat','flat-keyword','fit','fit-object'])
def test_the_rates_at_the_peak_are_the_presets(dls, opt, call):
    p = Preset(1e-5, 1e-3, head_mult=3)
    learn = stock(dls, **kinds[opt]).split(4, preset=p)
    cb = Hypers()
    call(learn, p, cb)
    assert np.allclose(cb.peak, p.scaled(8).lrs(learn.layer_groups), rtol=1e-6)
    assert np.allclose(learn.layer_groups.lrs, cb.peak, rtol=1e-6)
    assert (np.diff(cb.peak)>0).all()

def test_presets_by_name_and_none(dls):
    assert stock(dls).split(preset='resnet50.a1_in1k').preset.sources==preset_for('resnet50.a1_in1k').sources
    assert stock(dls).split().preset.family=='resnet'

def test_one_rate_for_one_learner_preset(dls):
    p = Preset(1e-5, 1e-3)
    a,b = stock(dls).split(4, preset=p),ours(dls, n_groups=4, preset=p)
    assert np.allclose(a.layer_groups.lrs, b.layer_groups.lrs)
    assert p.bs==64 and a.preset is p

@pytest.mark.parametrize('n_acc,accum', [(8,1), (16,2), (20,3), (4,1)])
@pytest.mark.parametrize('where', ['learner','call','list'])
def test_accumulated_batches_count(dls, n_acc, accum, where):
    p,acc = Preset(1e-5, 1e-3),GradientAccumulation(n_acc)
    learn = stock(dls, cbs=acc if where=='learner' else None).split(4, preset=p)
    kw = dict(call=dict(cbs=acc), list=dict(cbs=[acc])).get(where, {})
    learn.fit_one_cycle(1, 'preset', **kw)
    assert np.allclose(learn.peak_lrs, p.scaled(8, accum).lrs(learn.layer_groups))

def test_rates_do_not_depend_on_the_number_of_groups(dls):
    p = Preset(1e-6, 1e-2, head_mult=2)
    fine = stock(dls).split('block', preset=p).layer_groups
    rate = {n:lr for g,lr in zip(fine, fine.lrs) for n in g.param_names}
    for n in (2,3,4,5,6):
        groups = stock(dls).split(n, preset=p).layer_groups
        for g,lr in zip(groups, groups.lrs):
            rs = [rate[o] for o in g.param_names]
            assert min(rs)*(1-1e-6)<=lr<=max(rs)*(1+1e-6)

# ---- interrupts

def modes_ok(learn):
    "Are all modules in the mode of the model?"
    return {n for n,m in learn.model.named_modules() if m.training!=learn.model.training}

@pytest.mark.parametrize('exc', [KeyboardInterrupt, CancelFitException, RuntimeError])
@pytest.mark.parametrize('at', ['before_batch','after_backward','after_step'])
@pytest.mark.parametrize('train_norm', ['group',False])
def test_an_interrupted_learner_is_whole(dls, exc, at, train_norm):
    learn = ours(dls, n_groups=4, train_norm=train_norm)
    learn.freeze_to(2)
    want = {n:n not in frozen_names(learn) for n in flags(learn)}
    with pytest.raises(exc) if exc is not CancelFitException else warnings.catch_warnings(): learn.fit_one_cycle(2, 1e-2, cbs=Raise(exc('stop'), at))
    assert flags(learn)==want and not modes_ok(learn)
    assert learn.layer_groups.frozen==[True,True,False,False] and not learn.true_freeze.still
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert changed(learn, before) and not under(changed(learn, before), learn.layer_groups[:2])
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-3)
    assert all(flags(learn).values())

def test_a_fit_interrupted_before_it_began(dls):
    class Early(Callback):
        order = -20
        def before_fit(self): raise CancelFitException
    learn = ours(dls, n_groups=4)
    learn.fit_one_cycle(1, 1e-2, cbs=Early())
    assert all(flags(learn).values())

# ---- the table

def test_table_of_a_stock_learner(dls):
    learn = stock(dls)
    t = learn.layer_groups
    assert len(t)==2 and 'lr' in repr(t) and not any(t.frozen) and t.lrs==[1e-3,1e-3]
    learn.freeze()
    assert learn.layer_groups.frozen==[True,False] and 'yes' in repr(learn.layer_groups)
    learn.fit_one_cycle(1, slice(1e-4,1e-2))
    assert len(learn.layer_groups.lrs)==2

def test_table_of_one_group(dls):
    t = plain(dls, own_net()).layer_groups
    assert len(t)==1 and t[0].n_params==sum(p.numel() for p in own_net().parameters())

def test_table_columns(dls):
    learn = stock(dls, wd=0.05).split(4)
    learn.freeze()
    t = learn.layer_groups
    text,html = repr(t).splitlines(),t._repr_html_()
    assert len(text)==1+1+4 and [o for o in ('group','layers','parameters','share','lr','wd','frozen') if o not in text[1]]==[]
    assert text[2].endswith('yes') and not text[-1].endswith('yes') and '0.05' in text[2]
    assert html.count('<tr>')==5 and html.count('<th>')==8 and html.count('yes')==3
    assert sum(g.n_params for g in t)==sum(p.numel() for p in learn.model.parameters())

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_the_table_shows_the_last_peak_and_changes_nothing(dls, opt):
    learn = stock(dls, **kinds[opt]).split(4, preset=Preset(1e-5,1e-3))
    assert np.allclose(learn.layer_groups.lrs, learn.preset.scaled(8).lrs(learn.layer_groups))
    for lr,want in ((slice(1e-5,1e-2), [1e-5,1e-4,1e-3,1e-2]), (slice(1e-2), [1e-3]*3+[1e-2]), (2e-3, [2e-3]*4),
        ([4e-4,3e-4,2e-4,1e-4], [4e-4,3e-4,2e-4,1e-4])):
        for fit in (learn.fit_one_cycle, learn.fit_flat_cos, learn.fit):
            fit(1, lr)
            was = snapshot(learn)
            assert np.allclose(learn.layer_groups.lrs, want)
            repr(learn.layer_groups), learn.layer_groups._repr_html_()
            unchanged(learn, was)
    learn.fine_tune(1, 1e-2)
    assert np.allclose(learn.layer_groups.lrs, np.geomspace(5e-5,5e-3,4))
    learn.fit_one_cycle(1, wd=0.2)
    assert learn.layer_groups.wds==[0.2]*4

def test_table_names_are_those_of_the_model(dls):
    names = ours(dls, 'test_efficientnet').layer_groups.names
    assert 'conv_head' in names and names[-1]=='head' and names.count('head')==1

# ---- arguments

def test_arguments_are_vision_learners():
    mine,its = inspect.signature(discriminative_learner).parameters,inspect.signature(vision_learner).parameters
    assert set(its)-set(mine)=={'splitter','train_bn'}
    assert set(mine)-set(its)=={'n_groups','preset','weights_file','train_norm'}
    assert mine['opt_func'].default is fused_adamw
    for k in set(its)&set(mine)-{'opt_func'}: assert mine[k].default==its[k].default, k

@pytest.mark.parametrize('arch', ['resnet10t',resnet18], ids=['timm','function'])
def test_arguments_arrive(dls, tmp_path, arch):
    loss,cb = CrossEntropyLossFlat(label_smoothing=0.1),Hypers()
    learn = discriminative_learner(dls, arch, pretrained=False, lin_ftrs=[17], ps=0.25, n_out=5, metrics=[accuracy,error_rate], loss_func=loss,
        moms=(0.9,0.8,0.9), wd=0.2, path=tmp_path,
        model_dir='mine', cbs=cb, lr=5e-3, wd_bn_bias=True, bn_final=True, first_bn=False, y_range=(0,1), concat_pool=False, opt_func=Adam)
    head = list(learn.model[1].modules())
    assert [m.out_features for m in head if isinstance(m, nn.Linear)]==[17,5] and [m.p for m in head if isinstance(m, nn.Dropout)]==[0.125,0.25]
    assert type(head[-1]).__name__=='SigmoidRange' and [m.num_features for m in head if isinstance(m,
        nn.BatchNorm1d)]==[17,5] and 'AdaptiveAvgPool2d' in str(learn.model[1])
    assert learn.loss_func is loss and len(learn.metrics)==2 and learn.moms==(0.9,0.8,0.9)
    assert learn.wd==0.2 and learn.path==tmp_path and learn.model_dir=='mine' and learn.lr==5e-3
    assert cb in learn.cbs and learn.wd_bn_bias is True and learn.arch==arch and learn.n_out==5 and learn.opt.__class__.__name__=='Optimizer'
    assert learn.model.eval()(torch.randn(2,3,32,32)).shape==(2,5)

@pytest.mark.parametrize('arch,kw', [('resnet10t',{}), ('test_vit',dict(img_size=32))])
def test_custom_heads(dls, arch, kw):
    nf = 512 if arch=='resnet10t' else 64
    head = nn.Sequential(*([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if nf==512 else []), nn.Linear(nf,3))
    learn = ours(dls, arch, custom_head=head, **kw)
    assert learn.model[1] is head
    learn.fit_one_cycle(1, 'preset')

@pytest.mark.parametrize('pool', [True,False])
def test_pool_with_bodies_that_pool_themselves(dls, pool):
    assert ours(dls, 'test_vit', img_size=32, pool=pool).model.eval()(torch.randn(2,3,32,32)).shape==(2,3)

@pytest.mark.parametrize('arch', ['resnet10t','test_vit',resnet18], ids=['timm','vit','function'])
@pytest.mark.parametrize('typo', ['metrcs','n_group','weight_file','presets','train_bn','splitter'])
def test_typos_are_not_swallowed(dls, arch, typo):
    with pytest.raises(TypeError, match=typo): discriminative_learner(dls, arch, pretrained=False, **{typo:True})

def test_torchvision_weights_are_not_for_timm(dls):
    with pytest.raises(TypeError, match='weights_file'): discriminative_learner(dls, 'resnet10t', pretrained=False, weights='DEFAULT')
    with pytest.raises(TypeError, match='cut'): discriminative_learner(dls, 'resnet10t', pretrained=False, cut=-2)

def test_functions_work(dls):
    learn = quiet(discriminative_learner(dls, resnet18, pretrained=False, n_groups=4))
    assert learn.layer_groups.rule=='registered' and isinstance(learn.opt, FusedOptimizer) and learn.preset.family=='tv_resnet'
    learn.fit_one_cycle(1, 'preset')

def test_the_same_start_as_vision_learner(dls):
    torch.manual_seed(5)
    a = ours(dls)
    torch.manual_seed(5)
    assert same(weights(a), weights(stock(dls)))

def test_timm_arguments_go_through(dls):
    learn = ours(dls, drop_path_rate=0.3)
    assert 'drop_prob=0.3' in str(learn.model) or 'DropPath' in str(learn.model)

@pytest.mark.parametrize('arch,kw', [('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=1, depths=(1,1,1,1), embed_dim=12, num_heads=(1,1,1,1))),
    ('gmlp_s16_224', dict(img_size=32)),
    ('cait_xxs24_224', dict(img_size=32, depth=1)), ('hiera_tiny_224', dict(img_size=(32,32), stages=(1,1,1,1)))])
def test_architectures_that_vision_learner_cannot_use(dls, arch, kw):
    learn = ours(dls, arch, **kw)
    learn.fit_one_cycle(1, 'preset')
    assert learn.get_preds()[0].shape==(9,3)

def test_no_classes_in_the_data(dls):
    ds = TensorDataset(torch.randn(6,3,32,32), torch.zeros(6))
    dl = DataLoaders(DataLoader(ds, bs=3), DataLoader(ds, bs=3))
    with pytest.raises(SplitterError, match='n_out'): discriminative_learner(dl, 'resnet10t', pretrained=False, loss_func=nn.MSELoss())

# ---- schedules and records without detours

def test_stock_schedules_are_back_after_every_fit(dls):
    from fastai.callback import schedule
    stock_ = schedule.combine_scheds,schedule.ParamScheduler
    class Looks(Callback):
        def before_epoch(self): self.inside = schedule.combine_scheds,schedule.ParamScheduler
    class Stops(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn,looks = ours(dls),Looks()
    learn.fit_one_cycle(1, 1e-4, cbs=looks)
    assert looks.inside==stock_==(schedule.combine_scheds,schedule.ParamScheduler)
    with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(1, 1e-4, cbs=Stops())
    assert stock_==(schedule.combine_scheds,schedule.ParamScheduler)

def test_what_others_put_into_fastais_schedules_stays(dls, monkeypatch):
    from fastai.callback import schedule
    ours(dls).fit_one_cycle(1, 1e-4)
    class Theirs(schedule.ParamScheduler): pass
    monkeypatch.setattr(schedule, 'ParamScheduler', Theirs)
    stock(dls).fit_one_cycle(1, 1e-4)
    ours(dls).fit_one_cycle(1, 1e-4)
    assert schedule.ParamScheduler is Theirs

@pytest.mark.parametrize('how', ['fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_schedules_and_losses_are_fastais_to_the_bit(dls, how):
    "The same splitter and optimiser, split by us and not"
    import random
    net = own_net()
    def _run(split):
        learn = plain(dls, copy.deepcopy(net), splitter=lambda m: [list(o) for o in layer_groups(m, 3)(m)])
        if split: learn.split(3, train_norm=True)
        torch.manual_seed(1)
        random.seed(1)
        dls.train.rng = random.Random(1)
        args = (1,1) if how=='fit_sgdr' else (2,)
        getattr(learn, how)(*args, slice(1e-4, 1e-2))
        return learn
    def _floats(o): return list(map(float, o))
    a,b = (_run(o).recorder for o in (False,True))
    assert a.lrs==b.lrs and {k:_floats(v) for k,v in a.hps.items()}=={k:_floats(v) for k,v in b.hps.items()}
    assert _floats(a.losses)==_floats(b.losses) and a.values==b.values and a.iters==b.iters

def test_recorder_keeps_its_place_and_its_values(dls):
    learn = stock(dls)
    learn.fit(1, 1e-4)
    order,values = [o.name for o in learn.cbs],learn.recorder.values
    learn.split()
    assert [o.name for o in learn.cbs][:len(order)]==order and learn.recorder.values is values and learn.split().recorder.values is values
