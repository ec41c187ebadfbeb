"`auto`: what it tries changes nothing, what it makes of it, and where it ends"
import math,warnings
from copy import deepcopy

import numpy as np,pytest,torch
from torch import nn
from fastai.vision.all import accuracy,Adam,Callback,CrossEntropyLossFlat,CutMix,error_rate,Learner,MixUp,set_seed

from fastai_discriminative.all import *
from fastai_discriminative import auto as at,phases as ph,points
from fastai_discriminative.points import Point
from fastai_discriminative.probe import some_batches
from helpers import *
from helpers import pre_ours as ours,ours as scratch

k = ph._cached_per_epoch # epochs of a head on cached features

@pytest.fixture
def dls(bright): return bright_dls(bright)

own_share = at._trial_share

@pytest.fixture(autouse=True)
def long_trials_of_short_fits(monkeypatch):
    "Let trials take a larger share of a fit, so that even a short one has them"
    monkeypatch.setattr(at, '_trial_share', .6)

@pytest.fixture
def telling(monkeypatch):
    "A head on random features knows nothing that it could lose: make it look better than nothing on validation images"
    stock = at._seen
    monkeypatch.setattr(at, '_seen', lambda *args: (loss := stock(*args)[0], loss+1))

def measured(learn, preset, n_epoch):
    "What `auto` measures on `learn` outside of a fit"
    learn.strategy_run,learn.best_point = None,Point('head', 1., .5, [])
    learn.best_point.points,learn.best_point.monitor = [Point('head', 1., .5, [])],'accuracy'
    try: return at._AutoRates(preset, n_epoch)._measure(learn)
    finally: del learn.strategy_run,learn.best_point

# ---- what it does

def test_nothing_pretrained_everything_new(dls):
    learn,spy = scratch(dls),Spy()
    learn.fit_strategy('auto', 2, cbs=spy)
    assert spy.frozen==[0,0] and len(set(spy.lrs[3]))==1 and max(map(max, spy.lrs))==pytest.approx(learn.preset.scaled(8).head_lr, rel=.05)

def test_nan_ends_the_fit_with_the_best_weights(dls):
    class Blow(Callback):
        def after_pred(self):
            if self.training and self.epoch>=k: self.learn.pred = self.pred*float('nan')
    learn = ours(dls)
    learn.fit_strategy('auto', 3, cbs=Blow())
    assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values() if v.is_floating_point())
    probe = float(learn.recorder.values[k-1][-1])
    assert learn.validate()[-1]==pytest.approx(probe)

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_trials_see_the_learners_own_loss(dls, cb, telling):
    "While `MixUp` or a similar callback trains, it has its own loss, which only knows the last batch"
    learn = ours(dls)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*could not try rates')
        learn.fit_strategy('auto', long(dls), cbs=cb())
    assert learn.auto_evidence.trials and type(learn.loss_func) is CrossEntropyLossFlat

def test_a_short_fit_tries_nothing_and_says_so(dls):
    learn = ours(dls)
    learn.fit_strategy('auto', 1)
    e = learn.auto_evidence
    assert not e.trials and 'too short for trials' in repr(e) and e.lrs
    assert [p.name for p in e.points]==['head','end','average','halfway']

def long(dls): return math.ceil(at._least_steps*1.2*at._most_trials/at._trial_share/len(dls.train))+1

def test_a_longer_one_tries_rates_and_stays_within_its_share(dls):
    learn,n = ours(dls),long(dls)
    learn.fit_strategy('auto', n)
    e = learn.auto_evidence
    assert 2<=len(e.trials)<=at._most_trials and len(set(t.lr for t in e.trials))==len(e.trials)
    assert len(e.trials)*1.2*at._trial_steps(n*len(dls.train))<=at._trial_share*n*len(dls.train)
    assert e.lrs[-1]==pytest.approx(.5*at._highest(e.trials, e.bearable)*at._longer(n*len(dls.train))) and e.lrs==sorted(e.lrs)

def never_finite(preds, targs): return torch.tensor(math.nan)

@pytest.mark.parametrize('metric', [accuracy, never_finite])
def test_a_body_that_bears_nothing_stays_as_it_is(dls, metric, too_sure, monkeypatch):
    "Nor does the head stay scaled, also where no metric is finite, so that no weights were kept"
    monkeypatch.setattr(at, '_bearable', lambda n: -math.inf)
    learn,seen = ours(dls, metrics=metric),Around()
    learn.fit_strategy('auto', long(dls), cbs=seen)
    e = learn.auto_evidence
    assert e.scale==.5 and not e.lrs and 'ruins more' in repr(e) and 'none: the body stays' in repr(e)
    assert not changed(learn, seen.head)
    assert len(learn.recorder.values)==k # the epoch that was given up has no row

def test_damage_is_0_for_nothing_and_1_for_everything(dls):
    learn = ours(dls)
    learn.fit_strategy('feature_extraction', 1)
    learn.unfreeze()
    start,chance = at._seen(learn, batches := some_batches(learn, 1, 1))
    assert start<chance
    state = deepcopy(learn.model.state_dict())
    with torch.no_grad():
        for p in learn.model.parameters(): p.copy_(torch.randn_like(p))
    ruined = at._seen(learn, batches)[0]
    assert ruined>start+.5*(chance-start)
    learn.model.load_state_dict(state)
    assert at._seen(learn, batches)[0]==start

def test_an_extreme_prediction_does_not_hide_what_a_head_knows(dls):
    class Extreme(Callback):
        n = 0
        def after_pred(self):
            if not self.n: self.learn.pred = torch.cat([nn.functional.one_hot((self.y[:1]+1)%3, 3)*1e4, self.pred[1:]])
            self.n += 1
    learn = ours(dls)
    learn.fit_strategy('feature_extraction', 2)
    batches = some_batches(learn, 4) # of training, which the head knows
    start,chance = at._seen(learn, batches)
    with learn.added_cbs(Extreme()): odd,odd_chance = at._seen(learn, batches)
    assert start<odd<start+.6*(chance-start) and odd<odd_chance<=math.log(3)+1e-6

def test_higher_rates_in_short_cycles_do_more_damage(dls):
    learn = ours(dls)
    learn.fit_strategy('feature_extraction', 2)
    learn.unfreeze()
    learn.true_freeze.train_norm = 'running'
    train,valid,res = some_batches(learn, 4),some_batches(learn, 2, 1),[]
    for lr in (1e-6,1e-1):
        with at._put_back(learn):
            at._cycle(learn, [lr]*len(learn.layer_groups), train)
            res.append(at._seen(learn, valid)[0])
    assert res[0]==pytest.approx(at._seen(learn, valid)[0], rel=.05) and res[1]>1.2*res[0]

@pytest.mark.parametrize('n_steps,bearable,longer,steps', [(36,.072,1.,1), (72,.144,1.,3), (180,.35,1.,7), (1000,.35,.5**.3,16), (10**6,.35,(500/10**6)**.3,16)])
def test_what_the_length_of_a_fit_decides(n_steps, bearable, longer, steps, monkeypatch):
    monkeypatch.setattr(at, '_trial_share', own_share)
    assert (at._bearable(n_steps),at._longer(n_steps),at._trial_steps(n_steps))==pytest.approx((bearable,longer,steps))

def test_monitor_and_direction(dls):
    learn = ours(dls, metrics=[accuracy,error_rate])
    learn.fit_strategy('auto', 1, monitor='error_rate')
    assert learn.auto_evidence.monitor=='error_rate'
    learn.fit_strategy('auto', 1, monitor='accuracy', comp=np.less) # somebody who wants the worst
    ps = learn.auto_evidence.points
    assert [p.taken for p in ps].count(True)==1 and next(p for p in ps if p.taken).row==list(learn.recorder.values[-1])
    assert float(learn.recorder.values[-1][2])<=ps[0].value

def test_a_picture_measures_nothing(dls):
    learn = ours(dls)
    learn.plot_strategy('auto', 5)
    assert not hasattr(learn, 'auto_evidence')

# ---- evidence changes nothing

@pytest.mark.parametrize('arch', ['resnet10t','test_vit'])
@pytest.mark.parametrize('opt_func', [fused_adamw, Adam])
def test_looking_changes_nothing(dls, arch, opt_func, telling):
    learn = ours(dls, arch, opt_func=opt_func)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-4)
    learn.model.zero_grad(set_to_none=False)
    start,rng,grads = weights(learn),torch.get_rng_state(),{n:p.grad for n,p in learn.model.named_parameters()}
    modes,order = [m.training for m in learn.model.modules()],dls.train.rng.getstate()
    moments = deepcopy(learn.opt.state_dict())
    ratios = learn.grad_ratios()
    measured(learn, learn.preset, 60)
    assert learn.auto_evidence.trials
    assert len(ratios)==len(learn.layer_groups) and all(r>0 for r in ratios)
    assert same(start, weights(learn)) and torch.equal(rng, torch.get_rng_state()) and dls.train.rng.getstate()==order
    assert [m.training for m in learn.model.modules()]==modes
    assert all(p.grad is grads[n] for n,p in learn.model.named_parameters())
    assert str(moments)==str(learn.opt.state_dict())
    assert learn.grad_ratios()==ratios

def test_a_model_that_cannot_be_tried(dls, monkeypatch):
    def _fails(*args): raise RuntimeError('no way')
    monkeypatch.setattr(at, '_cycle', _fails)
    learn = ours(dls)
    start = weights(learn)
    with pytest.warns(UserWarning, match='could not try rates.*RuntimeError: no way'): learn.fit_strategy('auto', long(dls))
    assert not learn.auto_evidence.trials and not same(start, weights(learn))

def test_a_trial_that_is_not_finite_is_out_and_the_rest_goes_on(dls, monkeypatch):
    stock,n = at._cycle,[]
    def _first_blows(learn, lrs, batches):
        stock(learn, lrs, batches)
        n.append(1)
        if len(n)==1:
            with torch.no_grad():
                for p in learn.model.parameters(): p.fill_(float('nan'))
    monkeypatch.setattr(at, '_cycle', _first_blows)
    learn = ours(dls)
    learn.fit_strategy('auto', long(dls))
    e = learn.auto_evidence
    assert e.trials[0].damage==math.inf and e.trials[1].lr<e.trials[0].lr and math.isfinite(e.trials[1].damage) and e.lrs

def test_a_model_whose_output_a_callback_unpacks(dls, telling):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = own_net()
        def forward(self, x): return self.net(x),x
    class First(Callback):
        def after_pred(self): self.learn.pred = self.pred[0]
    set_seed(0)
    learn = quiet(Learner(dls, Pair(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=First()))
    learn.fit_strategy('surgical', 1)
    learn.fit_strategy('auto', long(dls))
    assert learn.auto_evidence.trials

# ---- a head that is too sure

def logits(learn): return learn.get_preds(act=nn.Identity())[0]

class Around(Callback):
    "Weights when the head is trained and when the body begins to train, and their average"
    order = 80
    def after_epoch(self):
        if self.epoch==k-1: self.head = weights(self.learn)
    def before_batch(self):
        if self.training and self.epoch==k and not hasattr(self, 'start'): self.start = weights(self.learn)
    def after_fit(self): self.average = getattr(self.learn.best_point, 'average', None)

def last_layer(w): return [n for n in w if n.startswith('1.')][-1]

def test_the_body_starts_from_a_head_that_is_less_sure_and_the_head_stays_as_it_was(dls, too_sure, monkeypatch, telling):
    monkeypatch.setattr(points, 'pick_point', lambda ps, comp: ps[0]) # nothing gained
    learn,seen = ours(dls),Around()
    learn.fit_strategy('auto', long(dls), cbs=seen)
    end,e = weights(learn),learn.auto_evidence
    name = last_layer(end)
    assert e.trials and e.scale==e.points[0].scale==.5 and "the head's logits times 0.5" in repr(e) and e.points[0].taken
    assert torch.equal(seen.start[name], seen.head[name]*.5)
    assert all(torch.equal(end[n], o) for n,o in seen.head.items() if 'num_batches' not in n)
    assert list(map(float, learn.validate()))==pytest.approx(list(map(float, e.points[0].row[1:])))

def test_halfway_is_between_the_scaled_head_and_the_average(dls, too_sure, monkeypatch):
    monkeypatch.setattr(points, 'pick_point', lambda ps, comp: ps[3])
    learn,seen = ours(dls),Around()
    learn.fit_strategy('auto', long(dls), cbs=seen)
    end,e = weights(learn),learn.auto_evidence
    seen.average.apply()
    mean = weights(learn)
    name = last_layer(end)
    assert e.scale==.5 and e.points[3].name=='halfway' and e.points[3].taken and not torch.equal(mean[name], seen.start[name])
    assert all(torch.equal(end[n], torch.lerp(o, mean[n], .5)) for n,o in seen.start.items() if 'num_batches' not in n)

def test_a_head_that_is_not_sure_enough_stays_as_it_is(dls, monkeypatch):
    monkeypatch.setattr(points, '_tempered', with_factor(2.))
    learn,seen = ours(dls),Around()
    learn.fit_strategy('auto', long(dls), cbs=seen)
    e,name = learn.auto_evidence,last_layer(seen.head)
    assert e.trials and e.scale==1 and e.points[0].scale==2 and 'logits' not in repr(e) and torch.equal(seen.start[name], seen.head[name])

def test_a_short_fit_starts_from_the_head_as_it_is(dls, too_sure):
    learn = ours(dls)
    learn.fit_strategy('auto', 1)
    assert not learn.auto_evidence.trials and learn.auto_evidence.scale==1 and 'logits' not in repr(learn.auto_evidence)

def test_a_head_whose_scaling_fails_is_left_as_it_was(dls, too_sure, monkeypatch):
    "What fails is the look at the scaled head: the fit goes on with the preset's rate, and says so"
    stock,n = at.batch_pred,[]
    def _second_fails(*args):
        n.append(1)
        if len(n)==2: raise RuntimeError('no way')
        return stock(*args)
    monkeypatch.setattr(at, 'batch_pred', _second_fails)
    learn,seen = ours(dls),Around()
    with pytest.warns(UserWarning, match='could not try rates.*RuntimeError: no way'): learn.fit_strategy('auto', long(dls), cbs=seen)
    name = last_layer(seen.head)
    assert learn.auto_evidence.scale==1 and torch.equal(seen.start[name], seen.head[name])

class Unit(nn.Module):
    def forward(self, x): return nn.functional.normalize(x)

def with_end(learn, *end):
    learn.model[1].extend(end)
    return learn

@pytest.mark.parametrize('end,scaled', [((), True), ((nn.Identity(),), True), ((Unit(),), False), ((nn.Softplus(),), False), ((nn.LayerNorm(3),), False),
    ((nn.Linear(3, 3), nn.Tanh()), False)])
def test_logits_are_scaled_exactly_or_not_at_all(dls, end, scaled):
    learn = with_end(ours(dls), *map(deepcopy, end))
    was,old = weights(learn),logits(learn)
    assert at._scale_head(learn, .25)==scaled
    if scaled: assert torch.allclose(logits(learn), old/4, rtol=1e-4, atol=1e-6) and len(changed(learn, was))==1
    else: assert same(was, weights(learn))

def test_a_head_that_was_frozen_by_hand_is_left_alone(dls):
    learn = ours(dls)
    list(learn.model[1].parameters())[-1].requires_grad_(False)
    was = weights(learn)
    assert not at._scale_head(learn, .5) and same(was, weights(learn))

# ---- data that tell little

def test_validation_images_of_one_class_cannot_judge_a_trial(dls, monkeypatch):
    learn = ours(dls)
    stock = at._seen
    monkeypatch.setattr(at, '_seen', lambda *a: (stock(*a)[0],)*2) # what other images' targets would cost is the same
    with pytest.warns(UserWarning, match='the head is no better than'): learn.fit_strategy('auto', long(dls))
    assert learn.auto_evidence.lrs and not learn.auto_evidence.trials

def test_ten_images_to_validate_on(dls):
    dls.valid.n = 10
    dls.valid.get_idxs = lambda: list(range(10))
    learn = ours(dls)
    learn.fit_strategy('auto', long(dls))
    assert learn.auto_evidence.points and learn.recorder.values[-1][-1]>=learn.auto_evidence.points[0].value

def test_a_regression_has_no_temperature(dls):
    class Number(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = own_net()
        def forward(self, x): return self.net(x)[:,0]
    seen = set()
    def loss(pred, y):
        seen.add((type(pred),type(y)))
        return ((pred-y.float())**2).mean()
    set_seed(0)
    learn = quiet(Learner(dls, Number(), loss_func=loss, opt_func=fused_adamw))
    learn.fit_strategy('auto', long(dls))
    e = learn.auto_evidence
    assert e.monitor=='valid_loss' and all(p.loss==pytest.approx(p.value) for p in e.points)
    assert seen=={(torch.Tensor,torch.Tensor)} # in trials as in a fit

# ---- mistakes

def test_auto_says_why_it_needs_a_validation_set(dls):
    dls.loaders[1] = dls.train.new([], shuffle=False, drop_last=False)
    with pytest.raises(StrategyError, match='validation set'): ours(dls).fit_strategy(n_epoch=1)
    ours(dls).fit_strategy('lp_ft', 1)

def test_a_head_that_stays_is_named():
    e = at.AutoEvidence(.8, 'accuracy', [], .35, [1e-5,1e-4], 'Because.', [Point('head', 1., .8, [], True), Point('end', 2., .7, [])])
    assert 'gained nothing' in repr(e) and repr(e).count('yes')==1
    e.points[0].taken,e.points[1].taken = False,True
    assert 'gained nothing' not in repr(e)
