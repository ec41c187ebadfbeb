"A split learner's file has the state of any optimiser by name, and what is frozen; it is loaded into other groups completely or not at all"
import copy
from functools import partial

import numpy as np,pytest,timm.optim,torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import Adam,Lamb,Lookahead,OptimWrapper,RMSProp,SGD,ranger

from fastai_discriminative.all import *
from fastai_discriminative.opt_state import named_state,opt_names,put_named_state
from fastai_discriminative.backbone import named_params
from helpers import Stop,changed,flags,plain,same,weights

funcs = dict(adam=Adam, sgd=partial(SGD, mom=0.9), rmsprop=partial(RMSProp, mom=0.9), lamb=Lamb, ranger=ranger,
    adamw=partial(OptimWrapper, opt=torch.optim.AdamW), lion=partial(OptimWrapper, opt=timm.optim.Lion),
    adafactor=partial(OptimWrapper, opt=timm.optim.Adafactor), fused=fused_adamw)
funcs.update(timm_lamb=partial(OptimWrapper, opt=timm.optim.Lamb), novograd=partial(OptimWrapper, opt=timm.optim.NvNovoGrad),
    fused_ahead=lambda ps, **kwargs: Lookahead(fused_adamw(ps, **kwargs)))

@pytest.fixture
def dls():
    gen = torch.Generator().manual_seed(0)
    items = [(torch.randn(3,8,8, generator=gen), torch.tensor(i%3)) for i in range(8)]
    res = DataLoaders(DataLoader(items, bs=4, shuffle=True, num_workers=0), DataLoader(items, bs=8, num_workers=0))
    res.c,res.n_inp = 3,1
    return res

def layer(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU())
def net(): return nn.Sequential(layer(3,4), layer(4,4), layer(4,4), layer(4,8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3))

by_func = pytest.mark.parametrize('func', funcs)

def learner(dls, func='adam', n_groups=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    learn = plain(dls, net(), opt_func=funcs[func], **kwargs)
    return learn.split(n_groups) if n_groups else learn

def fit(learn, n=1, seed=3):
    "Train on the same batches, whatever ran before"
    torch.manual_seed(seed)
    learn.dls.train.rng.seed(seed)
    learn.fit(n, 1e-2)
    return learn

def inner(opt): return inner(opt.opt) if isinstance(opt, Lookahead) else opt if hasattr(opt, 'cbs') else opt.opt

def moments(learn):
    "Everything that the optimiser keeps, by name"
    res = {f'{n} {k}':v for n,p in named_params(learn.model).items() for k,v in inner(learn.opt).state.get(p, {}).items() if isinstance(v,
        torch.Tensor) or k=='step'}
    slow = getattr(learn.opt, 'slow_weights', None) or []
    names = {id(p):n for n,p in named_params(learn.model).items()}
    return {**res, **{f'{names[id(p)]} slow':w for ps,ws in zip(learn.opt.param_lists, slow) for p,w in zip(ps, ws)}}

def alike(a, b): return a.keys()==b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
def snap(learn): return copy.deepcopy((moments(learn), [dict(h) for h in learn.opt.hypers], flags(learn), learn.opt.frozen_idx))
def is_as(learn, was): return alike(moments(learn), was[0]) and [dict(h) for h in learn.opt.hypers]==was[1] and (flags(learn),learn.opt.frozen_idx)==was[2:]

# ---- what fits

@by_func
@pytest.mark.parametrize('n_groups', [2,3])
def test_moments_go_into_other_groups_and_train_on_as_before(dls, tmp_path, func, n_groups):
    learn = fit(learner(dls, func, path=tmp_path))
    learn.save('x')
    new = learner(dls, func, n_groups, seed=1, path=tmp_path)
    new.load('x')
    assert len(new.opt.hypers)==n_groups
    assert alike(moments(new), moments(learn)) and len(moments(learn))>=10
    if 'opt' in vars(new.opt) and isinstance(new.opt, Lookahead): assert new.opt.count==learn.opt.count==2
    for l in (learn,new): fit(l, 2)
    if 'fused' in func: assert all(torch.allclose(v, weights(learn)[k], rtol=1e-5, atol=1e-7) for k,v in weights(new).items()) # groups are kernels of their own
    else: assert same(weights(new), weights(learn)) and alike(moments(new), moments(learn))

@by_func
def test_hypers_come_along_where_the_groups_are_the_same(dls, tmp_path, func):
    learn = learner(dls, func, path=tmp_path)
    learn.fit(1, slice(1e-4,1e-2))
    learn.save('x')
    for n,same_groups in ((4,True),(3,False)):
        new = learner(dls, func, n, path=tmp_path)
        was = [dict(h) for h in new.opt.hypers]
        new.load('x')
        steps = {k:v for k,v in learn.opt.hypers[0].items() if k=='step'} # timm counts them in the groups
        assert [dict(h) for h in new.opt.hypers]==([dict(h) for h in learn.opt.hypers] if same_groups else [{**h, **steps} for h in was])

@by_func
def test_another_split_keeps_the_moments(dls, func):
    learn,new = (fit(learner(dls, func)) for _ in range(2))
    new.split(3)
    for l in (learn,new): fit(l)
    assert all(torch.allclose(v, weights(learn)[k], rtol=1e-5, atol=1e-7) for k,v in weights(new).items())

@by_func
def test_what_is_frozen_comes_back(dls, tmp_path, func):
    learn = fit(learner(dls, func, 5, path=tmp_path))
    whole = learner(dls, func, 3).splitter.groups[0]
    k = 1+max(learn.splitter.groups.group_of(n) for n in whole.param_names)
    learn.freeze_to(k)
    list(learn.model.children())[-1].bias.requires_grad_(False)
    fit(learn).save('x')
    for n in (3,5):
        new = fit(learner(dls, func, n, path=tmp_path), seed=4)
        new.load('x')
        assert flags(new)==flags(learn) and new.layer_groups.frozen==[i<(1 if n==3 else k) for i in range(n)]
        before = weights(new)
        assert changed(fit(new), before)==changed(fit(copy.deepcopy(learn)), weights(learn))
        new.unfreeze()
        assert [n for n,f in flags(new).items() if not f]==['6.bias'] # frozen by hand
    learn.unfreeze()
    learn.save('y')
    assert all(f or n=='6.bias' for n,f in flags(new.load('y')).items())

def test_a_group_that_was_frozen_in_part_trains_and_is_named(dls, tmp_path):
    learn = fit(learner(dls, path=tmp_path))
    learn.freeze_to(2)
    learn.save('x')
    new = learner(dls, n_groups=2, path=tmp_path)
    with pytest.warns(UserWarning, match="were frozen when the file was saved, but not all of group '"): new.load('x')
    assert all(flags(new).values()) and new.layer_groups.frozen==[False,False]
    new.load('x', with_opt=False)

def test_a_file_loaded_in_the_middle_of_a_fit_freezes_the_rest_of_it(dls, tmp_path):
    learn = fit(learner(dls, path=tmp_path))
    learn.freeze_to(2)
    learn.save('frozen')
    learn.unfreeze()
    class Reload(Callback):
        def after_batch(self):
            if self.training and self.iter==0:
                self.learn.load('frozen')
                self.was = weights(self.learn)
    cb = Reload()
    learn.fit(1, 1e-2, cbs=cb)
    assert {n for n in changed(learn, cb.was)}<={n for n in cb.was if n.split('.')[0] in ('2','3','6')} # running statistics too

def test_weights_alone_leave_what_is_frozen(dls, tmp_path):
    learn = fit(learner(dls, path=tmp_path))
    learn.save('x')
    learn.freeze()
    was = snap(learn)
    learn.load('x', with_opt=False)
    assert is_as(learn, was)

@by_func
def test_split_takes_the_moments_along(dls, func):
    learn = fit(learner(dls, func))
    was = moments(learn)
    assert alike(moments(learn.split(3)), was) and len(was)>=10

# ---- fastai's own files, and older ones of ours

def test_files_of_stock_fastai_load(dls, tmp_path):
    stock = fit(learner(dls, n_groups=0, path=tmp_path))
    stock.save('x')
    learn = fit(learner(dls, seed=1, path=tmp_path), seed=5)
    was = snap(learn)
    with pytest.warns(UserWarning, match="goes by position, but it has groups of 18 parameters in 1"): learn.load('x')
    assert same(weights(learn), weights(stock)) and is_as(learn, was)
    halves = learner(dls, n_groups=0, path=tmp_path, splitter=lambda m: learner(dls).splitter(m))
    fit(halves).save('y')
    learn.freeze()
    learn.load('y')
    assert alike(moments(learn), moments(halves)) and learn.opt.frozen_idx==3 # such a file does not say

@by_func
def test_stock_fastai_reads_the_weights(dls, tmp_path, func):
    learn = fit(learner(dls, func, path=tmp_path))
    learn.save('x')
    stock = learner(dls, func, 0, seed=1, path=tmp_path)
    with pytest.warns(UserWarning, match='Could not load the optimizer state'): stock.load('x')
    assert same(weights(stock), weights(learn))
    same_groups = learner(dls, func, 0, seed=1, path=tmp_path, splitter=lambda m: learner(dls).splitter(m))
    same_groups.load('x')
    assert alike(moments(same_groups), moments(learn))

# ---- what does not fit

def refused(learn, sd, msg):
    was,names = snap(learn),opt_names(learn.opt, named_params(learn.model))
    with pytest.warns(UserWarning, match=msg), pytest.raises(OptimizerStateError, match=msg): put_named_state(learn.opt, sd, names)
    assert is_as(learn, was)

def saved_state(learn): return copy.deepcopy(named_state(learn.opt, opt_names(learn.opt, named_params(learn.model))))

@pytest.mark.parametrize('func', [o for o in funcs if o!='fused'])
def test_state_of_another_kind_is_refused(dls, func):
    target = fit(learner(dls, func, 3))
    for other in funcs:
        if other==func or {other,func}<={'adam','fused','adamw'}: continue # Adam's moments, whoever keeps them
        sd = saved_state(fit(learner(dls, other)))
        refused(target, sd, 'another kind of optimiser')
        for k in ('names','sizes','opt'): sd.pop(k) # as fastai saves it
        if {other,func}<={'adam','lamb','fused'}: continue # these are the same in a file of fastai's
        refused(target, sd, 'another kind of optimiser|goes by position')

def test_adam_s_moments_are_the_same_whoever_keeps_them(dls):
    for a in ('fused','adamw'):
        learn,new = fit(learner(dls, a)),learner(dls, 'adam', 3)
        put_named_state(new.opt, saved_state(learn), opt_names(new.opt, named_params(new.model)))
        old = {n:learn.opt.opt.state[p] for n,p in named_params(learn.model).items()}
        for n,p in named_params(new.model).items():
            s = new.opt.state[p]
            assert torch.equal(s['grad_avg'], old[n]['exp_avg']) and torch.equal(s['sqr_avg'], old[n]['exp_avg_sq']) and s['step']==int(old[n]['step'])
        fit(new)
    refused(fit(learner(dls, 'adamw')), saved_state(learner(dls, 'adam')), 'another kind of optimiser')

def hyper(k, v): return lambda sd: (sd['hypers'] if 'hypers' in sd else sd['param_groups'])[1].update({k:v})
def first(sd): return next(s for s in (sd['state'].values() if isinstance(sd['state'], dict) else sd['state']) if any(isinstance(v,
    torch.Tensor) and v.ndim for v in s.values()))
def resize(sd): first(sd).update({k:torch.ones(7) for k,v in first(sd).items() if isinstance(v, torch.Tensor) and v.ndim})
damages = dict(lr_text=hyper('lr','1e-3'), lr_nan=hyper('lr', float('nan')), a_name_less=lambda sd: sd['names'][1].pop(),
    a_group_less=lambda sd: sd['names'].pop(), a_name_twice=lambda sd: sd['names'][0].__setitem__(0, sd['names'][0][1]),
    another_model=lambda sd: sd['names'][0].__setitem__(0, 'stem'), no_state=lambda sd: sd.update(state=5),
    no_dict=lambda sd: sd['state'].__setitem__(3, None), shape=resize, extra=lambda sd: sd.update(more=1))

@pytest.mark.parametrize('func', ['adam','sgd','rmsprop','lamb','ranger','adamw','lion'])
@pytest.mark.parametrize('damage', damages)
def test_damaged_state_changes_nothing(dls, func, damage):
    sd = saved_state(fit(learner(dls, func)))
    damages[damage](sd)
    for n in (3,4) if func=='adam' else (3,): refused(fit(learner(dls, func, n), seed=5), sd,
        'damaged|not a finite number|of another model|another kind|has shape')

@pytest.mark.parametrize('damage,msg', [(lambda sd: sd.update(count='3'),"'count' is saved as '3'"), (lambda sd: sd.pop('slow_weights'),'no slow weights'),
    (lambda sd: sd['slow_weights'].pop(),'damaged'), (lambda sd: sd['slow_weights'][0].__setitem__(0, torch.ones(7)),'has shape')])
def test_damaged_slow_weights_change_nothing(dls, damage, msg):
    sd = saved_state(fit(learner(dls, 'ranger')))
    damage(sd)
    refused(fit(learner(dls, 'ranger', 3), seed=5), sd, msg)

@pytest.mark.parametrize('damage', [dict(frozen=9), dict(frozen='2'), dict(pinned=['nobody']), dict(pinned=None)])
def test_a_file_that_contradicts_itself_loads_the_weights_alone(dls, tmp_path, damage):
    learn = fit(learner(dls, path=tmp_path))
    learn.freeze_to(2)
    file = learn.save('x')
    o = torch.load(file, weights_only=False)
    o['opt'].update(damage)
    torch.save(o, file)
    new = fit(learner(dls, n_groups=3, seed=1, path=tmp_path), seed=5)
    was = snap(new)
    with pytest.warns(UserWarning, match='it lists frozen parameters that it does not contain'): new.load('x')
    assert is_as(new, was) and same(weights(new), weights(learn))

def test_a_wrapper_whose_optimiser_cannot_load_is_as_it_was(dls):
    learn = fit(learner(dls, 'lion', 3))
    sd = saved_state(learn)
    class Lion(timm.optim.Lion):
        def __setstate__(self, s):
            super().__setstate__(s)
            raise RuntimeError('too old')
    learn.opt.opt.__class__ = Lion
    was = snap(learn)
    sd['state'][0] = {'exp_avg':torch.zeros_like(sd['state'][0]['exp_avg'])}
    names = opt_names(learn.opt, named_params(learn.model))
    with pytest.raises(OptimizerStateError, match='Lion cannot load the saved state .RuntimeError: too old'): put_named_state(learn.opt, sd, names)
    assert is_as(learn, was)

# ---- callbacks and resume

@pytest.mark.parametrize('func', ['adam','ranger','adamw'])
def test_save_model_with_opt_brings_back_the_best_epoch_s_moments(dls, tmp_path, func):
    learn = learner(dls, func, path=tmp_path)
    class Best(SaveModelCallback):
        def _save(self, name):
            super()._save(name)
            self.kept = snap(self.learn)
    cb = Best(with_opt=True, comp=lambda new,best: np.isinf(best)) # the first epoch is best
    learn.fit_one_cycle(2, 1e-2, cbs=cb)
    assert is_as(learn, cb.kept) and learn.opt.frozen_idx==0

@pytest.mark.parametrize('func', ['ranger','lamb','adamw','lion'])
def test_resume_is_bit_equal(dls, tmp_path, func):
    def new(): return learner(dls, func, path=tmp_path)
    def go(learn, **kwargs):
        torch.manual_seed(3)
        dls.train.rng.seed(3)
        learn.fit_one_cycle(3, 1e-2, **kwargs)
        return learn
    ref = go(new())
    with pytest.raises(KeyboardInterrupt): go(new(), cbs=Stop(1), resume=tmp_path/'fit.pt')
    learn = go(new(), cbs=Stop(9), resume=tmp_path/'fit.pt')
    assert same(weights(learn), weights(ref)) and alike(moments(learn), moments(ref))

@by_func
def test_lr_find_leaves_moments_and_frozen_groups(dls, tmp_path, func):
    learn = fit(learner(dls, func, path=tmp_path))
    learn.freeze_to(2)
    fit(learn)
    was = snap(learn)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=())
    assert alike(moments(learn), was[0]) and (flags(learn),learn.opt.frozen_idx)==was[2:]
