"`auto`: its evidence changes nothing, and what it makes of it"
from copy import deepcopy

import numpy as np,pytest,torch
from torch import nn
from fastai.vision.all import accuracy,Adam,Callback,CrossEntropyLossFlat,error_rate,Learner,set_seed

from fastai_discriminative.all import *
from fastai_discriminative import auto as st,phases as ph
from helpers import *
from helpers import pre_ours as ours

k = ph._cached_per_epoch # epochs of a head on cached features

@pytest.fixture
def dls(bright): return bright_dls(bright)

# ---- what it does

def test_nothing_pretrained_everything_new(dls):
    learn,spy = ours(dls),Spy()
    learn.pretrained = False
    learn.fit_strategy('auto', 2, cbs=spy)
    assert spy.frozen==[0,0] and len(set(spy.lrs[3]))==1 and max(map(max, spy.lrs))==pytest.approx(learn.preset.scaled(8).head_lr, rel=.05)

def test_nan_ends_the_fit_with_the_best_weights(dls, monkeypatch):
    class Blow(Callback):
        def after_pred(self):
            if self.training and self.epoch>=k: self.learn.pred = self.pred*float('nan')
    learn = ours(dls)
    learn.fit_strategy('auto', 3, cbs=Blow())
    assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values() if v.is_floating_point())
    probe = float(learn.recorder.values[k-1][-1])
    assert learn.validate()[-1]==pytest.approx(probe)

def test_auto_goes_back_and_slows_down(dls, monkeypatch):
    monkeypatch.setattr(st._AutoRates, '_top', lambda self, groups: np.full(len(groups), 3.))
    monkeypatch.setattr(st._AutoRates, '_is_worse', lambda self, learn: True)
    learn,spy = ours(dls),Spy()
    learn.fit_strategy('auto', 3, cbs=spy)
    assert learn.auto_evidence.history[0]==k and learn.auto_evidence.lrs[0]<3.
    assert 'went back' in repr(learn.auto_evidence)

def test_a_short_training_is_not_spent_on_evidence(dls):
    learn = ours(dls)
    learn.fit_strategy('auto', 1)
    assert not learn.auto_evidence.trial and 'not tried' in repr(learn.auto_evidence)
    learn.fit_strategy('auto', 20)
    assert list(learn.auto_evidence.trial)==list(st._shares)

def test_worse_means_worse_by_more_than_chance(dls):
    learn,seen = ours(dls),[]
    class Look(Callback):
        order = 62
        def after_epoch(self): seen.append((st._AutoRates(None, 1)._is_worse(self.learn), float(self.recorder.values[-1][-1]), self.learn.keep_best.value))
    learn.fit_strategy('auto', 2, cbs=Look())
    assert not any(w for w,now,best in seen if now==best)

def test_monitor_and_direction(dls):
    learn = ours(dls, metrics=[accuracy,error_rate])
    learn.fit_strategy('auto', 1, monitor='error_rate')
    assert learn.auto_evidence.monitor=='error_rate'
    learn.fit_strategy('auto', 1, monitor='accuracy', comp=np.less) # somebody who wants the worst
    rows = [float(v[2]) for v in learn.recorder.values]
    assert rows[-1]==min(rows[k-1:])

# ---- evidence changes nothing

@pytest.mark.parametrize('arch', ['resnet10t','test_vit'])
@pytest.mark.parametrize('opt_func', [fused_adamw, Adam])
def test_looking_changes_nothing(dls, arch, opt_func):
    learn = ours(dls, arch, opt_func=opt_func)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-4)
    start,rng,grads = weights(learn),torch.get_rng_state(),{n:p.grad for n,p in learn.model.named_parameters()}
    modes,order = [m.training for m in learn.model.modules()],dls.train.rng.getstate()
    moments = deepcopy(learn.opt.state_dict())
    ratios = learn.grad_ratios()
    st._AutoRates(learn.preset, 30)._measure(learn)
    assert learn.auto_evidence.trial
    assert len(ratios)==len(learn.layer_groups) and all(r>0 for r in ratios)
    assert same(start, weights(learn)) and torch.equal(rng, torch.get_rng_state()) and dls.train.rng.getstate()==order
    assert [m.training for m in learn.model.modules()]==modes
    assert all(p.grad is grads[n] for n,p in learn.model.named_parameters())
    assert str(moments)==str(learn.opt.state_dict())
    assert learn.grad_ratios()==ratios

def test_a_model_that_cannot_be_looked_at(dls, monkeypatch):
    def _fails(*args): raise RuntimeError('no way')
    monkeypatch.setattr(st, '_trial', _fails)
    learn = ours(dls)
    start = weights(learn)
    with pytest.warns(UserWarning, match='cautious rates. RuntimeError: no way'): learn.fit_strategy('auto', 20)
    assert not learn.auto_evidence.trial and not same(start, weights(learn))

def test_a_model_whose_output_a_callback_unpacks(dls):
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
    learn.fit_strategy('auto', 20)
    assert learn.auto_evidence.trial

def test_shift_of_norm_statistics(dls):
    learn = ours(dls)
    xb = dls.train.one_batch()[:1]
    before = st._norm_shifts(learn, xb)
    n,(m,mean) = next(iter(st._norm_means(learn, xb).items())) # later layers see what the first makes of it
    m.running_mean.copy_(mean)
    after = st._norm_shifts(learn, xb)
    assert after[n]<1e-4<before[n]

def test_statistics_of_batches_where_the_running_ones_are_nonsense(dls):
    learn = ours(dls)
    learn.fit_strategy('feature_extraction', 1)
    batches = st.some_batches(learn, 1, 1)
    assert not st._batch_stats_win(ours(dls, 'test_vit'), batches)
    for m in learn.model[0].modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.fill_(100.)
    start = weights(learn)
    learn.model.eval()
    assert st._batch_stats_win(learn, batches) in (True,False) and same(start, weights(learn)) and not learn.model.training

@pytest.mark.parametrize('losses,share', [([1,1,1,1,1],1.), ([1,.9,.8,2.3,3],.6), ([1,.9,9,.5,.5],.1), ([1,9,9,9,9],.1), ([4,1,.4,.5,1.1],1.),
    ([4,1,.3,1,1],.3), ([1,1,1,1,float('nan')],.6)])
def test_share_of_a_step(losses, share): assert st._pick_share(losses)==share

# ---- mistakes

def test_auto_says_why_it_needs_a_validation_set(dls):
    dls.loaders[1] = dls.train.new([], shuffle=False, drop_last=False)
    with pytest.raises(StrategyError, match='validation set'): ours(dls).fit_strategy(n_epoch=1)
    ours(dls).fit_strategy('lp_ft', 1)
