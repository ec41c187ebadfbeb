"Phases as one fit: rates, moments, callbacks, interrupts, and an end that is never below the best"
import pickle
from dataclasses import replace
from functools import partial

import numpy as np,pytest
from fastai.vision.all import accuracy,EarlyStoppingCallback,error_rate,RMSProp,SaveModelCallback

from fastai_discriminative.all import *
from fastai_discriminative import phases as ph
from helpers import *
from helpers import pre_ours as ours

names = [s.name for s in list_strategies()]
k = ph._cached_per_epoch # epochs of a head on cached features

@pytest.fixture
def dls(bright): return bright_dls(bright)

# ---- one fit

def test_the_rates_of_a_phase_are_those_of_fit_one_cycle(dls):
    ours_spy,stock_spy = Spy(),Spy()
    ours(dls).fit_strategy(Phase(2, slice(1e-4,1e-2)), cbs=ours_spy)
    learn = ours(dls)
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=stock_spy)
    np.testing.assert_allclose(ours_spy.lrs, stock_spy.lrs, rtol=1e-3, atol=1e-9)

def test_moments_and_momentum(dls):
    "The head's step counts continue when the body is unfrozen"
    learn = ours(dls)
    learn.fit_strategy([Phase(2, 1e-3, frozen=-1), Phase(1, 1e-4)])
    steps = {int(learn.opt.opt.state[p]['step']) for p in list(learn.opt.param_lists)[-1]}
    body = {int(learn.opt.opt.state[p]['step']) for ps in list(learn.opt.param_lists)[:-1] for p in ps}
    n = len(dls.train)
    assert steps=={3*n} and body=={n}
    assert len(learn.recorder.hps['lr'])==3*n and len(learn.recorder.hps['mom'])==3*n
    assert min(learn.recorder.hps['mom'])<.9

def test_momentum_where_phases_train_different_norms(dls):
    learn = ours(dls, opt_func=partial(fused_sgd, mom=0.9))
    learn.fit_strategy([Phase(1, 1e-3, train_norm=False), Phase(1, 1e-3, train_norm='group'), Phase(1, 1e-3, frozen=-1), Phase(1, 1e-3, train_norm=True)])
    bufs = {n:learn.opt.opt.state[p]['momentum_buffer'] for n,p in learn.model.named_parameters()}
    assert all(b.shape==p.shape and b.abs().sum()>0 for b,p in zip(bufs.values(), learn.model.parameters()))

def test_callbacks_see_one_fit(dls, tmp_path):
    learn,spy = ours(dls, path=tmp_path),Spy()
    learn.fit_strategy('lp_ft', 2, cbs=[spy, SaveModelCallback(monitor='valid_loss', fname='best')])
    assert spy.epochs==list(range(k+2)) and len(learn.recorder.values)==k+2
    assert (tmp_path/'models'/'best.pth').exists()
    best = min(v[1] for v in learn.recorder.values)
    assert learn.validate()[0]==pytest.approx(best, rel=1e-4)

def test_early_stopping_stops_all_phases(dls):
    learn = ours(dls)
    learn.fit_strategy([Phase(3, 0., frozen=-1), Phase(5, 0.)], cbs=EarlyStoppingCallback(monitor='valid_loss', patience=1, min_delta=10.))
    assert len(learn.recorder.values)<=3

@pytest.mark.parametrize('at', [0,k-1,k,k+1])
@pytest.mark.parametrize('name', ['lp_ft','auto'])
def test_an_interrupt_leaves_a_sound_learner(dls, name, at):
    learn,spy = ours(dls),Spy()
    own,mine = learn.true_freeze.train_norm,list(learn.cbs)
    with pytest.raises(KeyboardInterrupt): learn.fit_strategy(name, 2, cbs=[spy,Stop(at)])
    assert list(learn.cbs)==mine and learn.true_freeze.train_norm==own and 'forward' not in vars(learn.model)
    if name=='auto' and at>=k:
        vals = [float(v[-1]) for v in learn.recorder.values]
        assert learn.validate()[-1]==pytest.approx(max(vals[k-1:]))
    learn.fit_one_cycle(1, 1e-4)
    learn.fit_strategy(name, 1)

def test_going_on_after_an_interrupt(dls):
    whole,rest = Spy(),Spy()
    ours(dls).fit_strategy('lp_ft', 2, cbs=whole)
    learn = ours(dls)
    with pytest.raises(KeyboardInterrupt): learn.fit_strategy('lp_ft', 2, cbs=Stop(k+1))
    learn.fit_strategy('lp_ft', 2, cbs=rest, start_epoch=k+1)
    n = len(dls.train)
    np.testing.assert_allclose(rest.lrs, whole.lrs[-n:])
    assert rest.frozen[-1]==0

def test_a_learner_can_be_exported_afterwards(dls, tmp_path):
    learn = ours(dls, path=tmp_path)
    learn.fit_strategy(n_epoch=1)
    learn.export('l.pkl')
    assert (tmp_path/'l.pkl').stat().st_size
    p = Phase(2, slice(1e-5,1e-3), frozen=-1, cached=True)
    assert pickle.loads(pickle.dumps([p]))==[p] and pickle.loads(pickle.dumps(find_strategy('surgical'))).name=='surgical'

def test_features_that_cannot_be_kept(dls, monkeypatch):
    def _refuse(self): raise FeatureError('No features here.')
    monkeypatch.setattr(CachedFeatures, 'rehearse', _refuse)
    learn = ours(dls)
    with pytest.warns(UserWarning, match='trains on the data for 1 instead'): learn.fit_strategy('lp_ft', 2)
    assert len(learn.recorder.values)==1+2

def test_a_cache_of_ones_own(dls):
    learn,cf = ours(dls),CachedFeatures(n_views=2)
    learn.fit_strategy('lp_ft', 1, cbs=cf)
    assert cf.rows[0].n_views==2 and not cf.paused
    cf.close()

def test_metrics_of_training_batches(dls):
    learn = ours(dls)
    learn.recorder.train_metrics = True
    learn.fit_strategy('auto', 2)
    names,rows = list(learn.recorder.metric_names[1:]),learn.recorder.values
    assert learn.auto_evidence.monitor=='valid_accuracy'
    i = names.index('valid_accuracy')
    assert len({len(r) for r in rows})==1 and float(rows[-1][i])>=float(rows[k-1][i])

# ---- n_epoch and phases

@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('n_groups', [2,3,'block'])
@pytest.mark.parametrize('n_epoch', [1,3,30])
def test_phases_fit_any_number_of_epochs_and_groups(dls, name, n_epoch, n_groups):
    learn = ours(dls, n_groups=n_groups)
    ps = find_strategy(name).phases(n_epoch, learn.preset, learn.layer_groups)
    assert ph._check_phases(ps, learn.layer_groups)==[replace(p, frozen=p.frozen%len(learn.layer_groups)) for p in ps]
    on_images = sum(p.n_epoch for p in ps if not p.cached)
    assert on_images in (n_epoch,n_epoch+1) or name=='feature_extraction'

# ---- the best, and no less

def _harmful(): return [Phase(k, 1e-2, frozen=-1, cached=True), Phase(2, 3.)]

@pytest.mark.parametrize('metrics', [accuracy, error_rate, None])
def test_never_below_the_probe(dls, metrics, monkeypatch):
    monkeypatch.setitem(ph._strategies, 'harmful', Strategy('harmful', lambda *_: _harmful(), keep_best=True))
    learn,spy = ours(dls, metrics=metrics),Spy()
    learn.fit_strategy('harmful', 2, cbs=spy)
    rows,i = learn.recorder.values,1 if metrics is None else 2
    best = (min if metrics is not accuracy else max)(float(v[i]) for v in rows[k-1:])
    assert float(rows[-1][i])==pytest.approx(best)
    assert len(learn.recorder.iters)==len(rows)
    learn.recorder.plot_loss()
    assert learn.validate()[i-1]==pytest.approx(best, rel=1e-4)

# ---- mistakes

def test_mistakes_are_named_before_anything_moves(dls):
    learn = ours(dls)
    start,n = weights(learn),len(learn.layer_groups)
    for f,what in [
        (lambda: learn.fit_strategy('lpft', 2), "Did you mean 'lp_ft'"), (lambda: learn.fit_strategy('auto'), 'n_epoch'), (lambda: learn.fit_strategy('auto', 0), 'at least 1'),
        (lambda: learn.fit_strategy('auto', 1.5), 'whole number'), (lambda: learn.fit_strategy(True), 'whole number'),
        (lambda: learn.fit_strategy([]), 'list of `Phase`'), (lambda: learn.fit_strategy([1]), 'list of `Phase`'), (lambda: Phase(0), 'at least 1'), (lambda: Phase(1, sched='cosine'), 'Unknown schedule'),
        (lambda: learn.fit_strategy(Phase(1, frozen=n)), 'trains nothing'), (lambda: learn.fit_strategy(Phase(1, frozen=-n-1)), f'{n} groups'),
        (lambda: learn.fit_strategy(Phase(1, cached=True)), 'nothing is frozen'), (lambda: learn.fit_strategy([Phase(1), Phase(1), Phase(1)], 2), '3 phases take 3 epochs'),
        (lambda: learn.fit_strategy('fastai', 1, start_epoch=1), 'start in the middle'),
        (lambda: learn.fit_strategy('auto', 1, monitor='acuracy'), "Did you mean 'accuracy'")]:
        with pytest.raises(StrategyError) as e: f()
        assert what in str(e.value), (what, str(e.value))
    with pytest.raises(PresetError, match='reversed'): learn.fit_strategy(Phase(1, slice(1e-2,1e-4)))
    with pytest.raises(PresetError, match='rates for'): learn.fit_strategy(Phase(1, [1e-3]*(n+1)))
    assert same(start, weights(learn)) and learn.true_freeze.train_norm=='affine'

def test_an_optimiser_of_unknown_units(dls):
    with pytest.warns(UserWarning, match='not known'): ours(dls, opt_func=RMSProp).fit_strategy('uniform', 1)

def test_registering():
    @register_strategy('mine', 'me')
    def _mine(n_epoch, preset, groups):
        "Only mine."
        return [Phase(n_epoch, 1e-3)]
    try:
        assert find_strategy('mine').about=='Only mine.' and find_strategy('mine') in list_strategies()
        with pytest.raises(StrategyError, match='already'): register_strategy('auto')(_mine)
    finally: del ph._strategies['mine']

def some_epochs(k, n_epoch, preset, groups):
    "Some epochs."
    return [Phase(k*n_epoch, 1e-3)]

class Longer:
    "Twice as long."
    def __call__(self, n_epoch, preset, groups): return some_epochs(2, n_epoch, preset, groups)

def test_what_is_registered_may_be_a_partial_or_an_object(dls):
    try:
        for k in (3,2): register_strategy('mine')(partial(some_epochs, k)) # again, changed, as in a cell that runs once more
        learn = ours(dls)
        learn.fit_strategy('mine', 1)
        assert find_strategy('mine').about=='Some epochs.' and len(learn.recorder.values)==2
        with pytest.raises(StrategyError, match='already'): register_strategy('mine')(Longer())
        with pytest.raises(StrategyError, match='already'): register_strategy('auto')(partial(some_epochs, 3))
    finally: del ph._strategies['mine']
    try:
        for _ in range(2): register_strategy('longer')(Longer())
        assert find_strategy('longer').about=='Twice as long.'
    finally: del ph._strategies['longer']

def test_pictures(dls):
    learn = ours(dls)
    start,peak = weights(learn),learn.peak_lrs
    for n in names: assert learn.plot_strategy(n, 2).get_title()==n
    assert learn.plot_strategy([Phase(1), Phase(1)]).get_title()=='2 phases'
    assert same(start, weights(learn)) and learn.peak_lrs is peak

@pytest.mark.parametrize('f', [lambda n_epoch: [Phase(n_epoch)], lambda: [], lambda a, b, c, d: [], lambda *, n_epoch, preset, groups: []])
def test_a_strategy_that_could_not_be_called_is_refused_when_it_is_registered(f):
    with pytest.raises(StrategyError, match=r"function of `\(n_epoch, preset, groups\)` that returns a list of `Phase`"): register_strategy('odd')(f)
    with pytest.raises(StrategyError, match="takes a name first: `@register_strategy"): register_strategy(lambda n_epoch, preset, groups: [])
    assert 'odd' not in [o.name for o in list_strategies()]
