"Shared by several test files: small learners, and functions that inspect them"
from functools import partial

import numpy as np,torch
from torch import nn
from fastai.vision.all import Adam,Callback,CrossEntropyLossFlat,ImageDataLoaders,Learner,ProgressCallback,SGD,accuracy,noop,set_seed,vision_learner

from fastai_discriminative import points
from fastai_discriminative.all import *

# ---- data and learners

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def stock(dls, arch='resnet10t', **kwargs): return quiet(vision_learner(dls, arch, pretrained=False, **kwargs))
def ours(dls, arch='resnet10t', **kwargs): return quiet(discriminative_learner(dls, arch, pretrained=False, **kwargs))
def plain(dls, model, **kwargs): return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), **kwargs))

def conv(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride=2), nn.BatchNorm2d(nf), nn.ReLU())
def own_net(): return nn.Sequential(conv(3,8), conv(8,8), conv(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

# ---- a head that is too sure

def with_factor(scale):
    "`points._tempered`, which says of every head that `scale` of its logits would be right"
    stock = points._tempered
    return lambda *args: (stock(*args)[0],scale)

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
    "Everything that a refused call must not change"
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

# ---- learners that have trained

kinds = dict(adam=dict(opt_func=Adam), fused_adamw=dict(opt_func=fused_adamw), sgd=dict(opt_func=partial(SGD, mom=0.9)),
    fused_sgd=dict(opt_func=partial(fused_sgd, mom=0.9)))

def warm(dls, opt, n_groups=4, train_norm='group', arch='resnet10t', **kwargs):
    "A split learner that has trained unfrozen, so that there is momentum"
    learn = stock(dls, arch, wd=0.3, **kinds[opt], **kwargs).split(n_groups, train_norm=train_norm)
    learn.fit_one_cycle(1, 1e-2)
    return learn

# ---- for strategies: learners whose random weights stand in for pretrained ones

def bright_dls(path): return ImageDataLoaders.from_folder(path, valid_pct=.33, seed=1, bs=8, num_workers=0)

def pre_ours(dls, arch='resnet10t', metrics=accuracy, **kwargs):
    set_seed(0)
    learn = quiet(discriminative_learner(dls, arch, pretrained=False, metrics=metrics, train_norm='affine', **{'preset':arch, **kwargs}))
    learn.pretrained = True # random weights stand in for pretrained ones
    return learn

def pre_plain(dls, **kwargs):
    set_seed(0)
    return quiet(Learner(dls, own_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs))

def pre_stock(dls):
    set_seed(0)
    learn = quiet(vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy))
    learn.pretrained = True
    return learn

class Spy(Callback):
    "What a callback sees of a fit"
    order = 58
    def before_fit(self): self.fits,self.epochs,self.frozen,self.lrs,self.states = getattr(self, 'fits', 0)+1,[],[],[],[]
    def after_batch(self):
        if self.training: self.lrs.append([h['lr'] for h in self.opt.hypers])
    def after_epoch(self):
        self.epochs.append(self.epoch)
        self.frozen.append(self.opt.frozen_idx)
        self.states.append(weights(self.learn))

class Stop(Callback):
    "An interrupt in epoch `at`, in its second batch"
    order = 58
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch==self.at and self.iter==1: raise KeyboardInterrupt
