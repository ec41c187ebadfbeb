"Every strategy on every kind of learner, and what each is known for"
import pytest,torch
from fastai.vision.all import set_seed

from fastai_discriminative.all import *
from fastai_discriminative import phases as ph,strategies
from helpers import *
from helpers import pre_ours as ours,pre_plain as plain,pre_stock as stock

names = [s.name for s in list_strategies()]
k = ph._cached_per_epoch # epochs of a head on cached features
kinds = dict(cnn=ours, vit=lambda dls: ours(dls, 'test_vit'), convnext=lambda dls: ours(dls, 'test_convnext'), plain=plain, stock=stock)

@pytest.fixture
def dls(bright): return bright_dls(bright)

# ---- all of them, everywhere

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('name', names)
def test_every_strategy_runs_on_every_kind_of_learner(dls, name, kind):
    learn = kinds[kind](dls)
    start,spy = weights(learn),Spy()
    learn.fit_strategy(name, 2, cbs=spy)
    end = weights(learn)
    assert all(torch.isfinite(v).all() for v in end.values() if v.is_floating_point()) and not same(start, end)
    assert spy.fits==(2 if name=='fastai' else 1)
    assert len(learn.recorder.values)>=2 and len(learn.recorder.lrs)
    assert not hasattr(learn, 'strategy_run') and not hasattr(learn, 'keep_best') and not hasattr(learn, 'cached_features')
    learn.validate()

@pytest.mark.parametrize('name', ['lp_ft','surgical','auto','feature_extraction'])
def test_the_body_does_not_move_by_a_bit_while_the_head_trains(dls, name):
    learn,spy = ours(dls),Spy()
    body = [n for g in learn.layer_groups[:-1] for n in g.param_names]
    bufs = [n for n,_ in learn.model[0].named_buffers()]
    start = weights(learn)
    learn.fit_strategy(name, 2, cbs=spy)
    assert spy.frozen[:k]==[len(learn.layer_groups)-1]*k
    for o in body+[f'0.{o}' for o in bufs]: assert torch.equal(start[o], spy.states[k-1][o]), o
    if name!='feature_extraction': assert not same({o:start[o] for o in body}, {o:spy.states[-1][o] for o in body})

def test_fastai_is_fine_tune_to_the_bit(dls):
    ends = []
    for f in (lambda l: l.fine_tune(2), lambda l: l.fit_strategy('fastai', 2), lambda l: l.split(fused=True).fit_strategy('fastai', 2)):
        learn = stock(dls)
        for dl in learn.dls.loaders: dl.rng.seed(3)
        set_seed(1)
        f(learn)
        ends.append(weights(learn))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])

# ---- n_epoch and phases

def _phases(name, n_epoch, n_groups=None, arch='resnet10t', dls=None):
    learn = ours(dls, arch, n_groups=n_groups)
    return find_strategy(name).phases(n_epoch, learn.preset, learn.layer_groups)

def test_gradual_unfreeze_thaws_from_the_head_down(dls):
    ps = _phases('gradual_unfreeze', 20, dls=dls)
    n = len(ours(dls).layer_groups)
    assert [p.frozen for p in ps]==list(range(n-1, -1, -1)) and sum(p.n_epoch for p in ps)==20
    assert [p.frozen for p in _phases('gradual_unfreeze', 2, dls=dls)]==[n-1,0]

def test_layer_decay_does_not_depend_on_the_number_of_groups(dls):
    def _rate(n, name):
        learn = ours(dls, n_groups=n)
        lrs = find_strategy('layer_decay').phases(1, learn.preset, learn.layer_groups)[0].lr
        return next(lr for g,lr in zip(learn.layer_groups, lrs) if any(o.startswith(name) for o in g.param_names))
    assert _rate('block', '0.model.conv1')==pytest.approx(_rate(None, '0.model.conv1'), rel=.6)
    assert _rate('block', '1')==_rate(3, '1')

def test_surgical_gives_the_full_rate_to_the_highest_ratio(dls):
    learn,spy = ours(dls),Spy()
    learn.fit_strategy([Phase(2, strategies._AutoRGN(1e-3), sched='flat')], cbs=spy)
    assert all(max(o)==pytest.approx(1e-3) for o in spy.lrs)
    assert spy.lrs[0]!=spy.lrs[-1] # asked anew in the second epoch

# ---- evidence changes nothing

def test_frozen_groups_have_no_ratio(dls):
    learn = ours(dls)
    learn.freeze()
    assert learn.grad_ratios()[:-1]==[0.]*(len(learn.layer_groups)-1)

# ---- mistakes

def test_every_strategy_says_when_and_whence():
    for s in list_strategies(): assert len(s.about)>20 and s.source, s.name
