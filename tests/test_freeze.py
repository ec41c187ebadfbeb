"Frozen means frozen: parameters, statistics and flags, for every norm policy, optimiser and interrupt"
import warnings

import pytest
from timm.layers import EvoNorm2dB0
from torch import nn
from fastai.vision.all import Callback,CancelFitException,xresnet18

from fastai_discriminative.all import *
from helpers import *

# ---- rule 6: frozen is frozen

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

@pytest.mark.parametrize('train_norm', ['group',True])
def test_a_fit_of_a_learner_that_is_frozen_whole_says_so(dls, train_norm):
    learn = ours(dls, train_norm=train_norm)
    learn.unfreeze()
    for p in learn.model.parameters(): p.requires_grad_(False)
    before = weights(learn)
    with pytest.raises(OptimizerStateError, match=r'All layers are frozen.*`learn.unfreeze\(\)`.*requires_grad_'): learn.fit_one_cycle(1, 1e-2)
    assert not changed(learn, before)
    learn = ours(dls, train_norm=train_norm)
    learn.freeze()
    with pytest.warns(UserWarning, match='whole model is frozen'): learn.opt.freeze_to(len(learn.layer_groups))
    if train_norm is True: return learn.fit_one_cycle(1, 1e-2) # its norm layers train
    with pytest.raises(OptimizerStateError, match='All layers are frozen'): learn.fit_one_cycle(1, 1e-2)
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)

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
