"Comparisons are fair, survive interrupts and failures, and run on a cluster"
import math,os
from functools import partial
from unittest.mock import patch

import joblib,numpy as np,pandas as pd,pytest,torch
from torch import nn

from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoader,DataLoaders,Learner,ProgressCallback,accuracy,noop,set_seed
from fastai_discriminative.all import *
from fastai_discriminative import compare as cm

# ---- a small learner, which other processes can make too

def make(metrics=accuracy, seed=3):
    "Three kinds of points in four dimensions, and a body of two layers"
    rng = np.random.default_rng(seed)
    y = torch.as_tensor(rng.integers(0, 3, 96))
    x = torch.as_tensor(rng.normal(size=(96,4)), dtype=torch.float32) + torch.nn.functional.one_hot(y, 4)*2
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items[:64], bs=16, shuffle=True, num_workers=0), DataLoader(items[64:], bs=16, num_workers=0))
    model = nn.Sequential(nn.Linear(4,16), nn.ReLU(), nn.Linear(16,16), nn.ReLU(), nn.Linear(16,3))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=metrics)

class Blow(Callback):
    def after_pred(self): self.learn.pred = self.pred*float('nan')

def blow(learn, n_epoch, cbs): learn.fit(n_epoch, 1e-3, cbs=[*cbs,Blow()])
def fails(learn, n_epoch, cbs): raise RuntimeError('out of luck')
def by_hand(learn, n_epoch, cbs): learn.fit_one_cycle(n_epoch, 1e-2, cbs=cbs)

def jobs(*rows):
    "Finished fits, by hand: `(strategy, seed, [(seconds, accuracy), ...])`"
    def _rows(r): return [dict(epoch=i+1, train_s=t, train_loss=1., valid_loss=1-a, accuracy=a) for i,(t,a) in enumerate(r)]
    return [dict(strategy=n, seed=s, n_epoch=len(r), start=1, error='', score={}, rows=_rows(r)) for n,s,r in rows]

# ---- fair

def test_results_are_tidy():
    c = compare_strategies(make, ['fastai','uniform','auto'], 2, seeds=2)
    df = c.results
    assert list(df.columns)[:6]==['strategy','seed','epoch','train_s','train_loss','valid_loss'] and 'accuracy' in df
    assert set(zip(df.strategy, df.seed))=={(n,s) for n in ('fastai','uniform','auto') for s in (0,1)}
    assert (df.groupby(['strategy','seed']).train_s.diff().dropna()>=0).all() and (df.train_s>0).all()
    assert len(df[(df.strategy=='fastai') & (df.seed==0)])==3
    t = c.table()
    assert list(t.index)==['fastai','uniform','auto'] and (t.seeds==2).all() and c.reference=='fastai'
    assert c.plot().get_xlabel().startswith('training time') and 'accuracy' in repr(c) and '<table' in c._repr_html_()

def test_a_fit_is_that_by_hand():
    c = compare_strategies(make, dict(hand=by_hand), 3, seeds=[5])
    set_seed(5, reproducible=True)
    learn = make()
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    import random
    for dl in learn.dls.loaders: dl.rng = random.Random(5)
    set_seed(5, reproducible=True)
    learn.fit_one_cycle(3, 1e-2)
    assert c.results.valid_loss.tolist()==[float(o[1]) for o in learn.recorder.values]

def test_the_order_of_strategies_changes_nothing():
    a = compare_strategies(make, ['uniform','lp_ft'], 2, seeds=1).results.set_index(['strategy','epoch']).valid_loss
    b = compare_strategies(make, ['lp_ft','uniform'], 2, seeds=1).results.set_index(['strategy','epoch']).valid_loss
    assert a.sort_index().equals(b.sort_index())

def test_data_shared_by_all_learners_are_in_the_same_order():
    dls = make().dls
    def _make():
        learn = make()
        learn.dls = dls
        return learn
    a = compare_strategies(_make, ['uniform','head_boost'], 1, seeds=1).results
    b = compare_strategies(_make, ['head_boost'], 1, seeds=1).results
    assert a[a.strategy=='head_boost'].train_loss.tolist()==b.train_loss.tolist()

def test_the_restored_epoch_is_the_last_row():
    c = compare_strategies(make, ['auto'], 4, seeds=3)
    df = c.results
    for _,g in df.groupby('seed'): assert g.accuracy.iloc[-1]==g.accuracy.iloc[9:].max()

# ---- numbers

def test_table_against_numbers_by_hand():
    c = StrategyComparison(jobs(('fastai',0,[(1,.4),(10,.6)]), ('fastai',1,[(1,.5),(10,.5)]), ('new',0,[(2,.7),(5,.8)]), ('new',1,[(2,.4),(5,.7)]), ('bad',0,[(1,.1)]), ('bad',1,[(1,.1)])))
    t = c.table()
    assert t.loc['new','accuracy']==pytest.approx(.75) and t.loc['new','difference']==pytest.approx(.2)
    assert t.loc['new','difference ±']==pytest.approx(0., abs=1e-12) and t.loc['new','distinguishable']=='yes'
    assert c.times_to_reference('new')=={0:.2, 1:.5} and t.loc['new','time to reference']==pytest.approx(.35)
    assert c.times_to_reference('bad')=={0:math.inf, 1:math.inf} and c.times_to_reference('fastai')=={0:1., 1:.1}
    assert t.loc['fastai','±']==pytest.approx(12.706*np.std([.6,.5], ddof=1)/2**.5, rel=1e-3)

def test_lower_is_better():
    c = StrategyComparison(jobs(('a',0,[(1,.4),(10,.6)]), ('b',0,[(2,.3),(4,.7)])), metric='valid_loss')
    assert c.times_to_reference('b')=={0:.4}

def test_one_seed_has_no_interval():
    t = StrategyComparison(jobs(('a',0,[(1,.4)]), ('b',0,[(2,.3)]))).table()
    assert t['±'].isna().all() and (t.distinguishable=='').all()

def test_score_on_a_test_set():
    c = compare_strategies(make, ['uniform'], 2, seeds=2, score=lambda learn: dict(test=learn.validate()[-1]+1))
    df = c.results
    assert df.test.notna().sum()==2 and (df.dropna().test==df.dropna().accuracy+1).all()
    assert c.table('test').test.iloc[0]==pytest.approx(df.test.mean())

# ---- failures, interrupts, files

def test_failures_are_recorded_and_the_rest_goes_on(tmp_path):
    c = compare_strategies(make, dict(fails=fails, nan=blow, uniform='uniform'), 2, seeds=2, fname=tmp_path/'c.json')
    assert c.failures.strategy.tolist()==['fails','fails','nan','nan']
    assert 'out of luck' in c.failures.error[0] and 'nan' in c.failures.error[2] and 'epoch 0' in c.failures.error[2]
    t = c.table()
    assert t.loc['fails','failed']==2 and t.loc['uniform','seeds']==2 and t.loc['nan','seeds']==0
    c.plot()

def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    f,n = tmp_path/'c.json',[]
    def _fit(learn, n_epoch, cbs):
        n.append(1)
        if len(n)==3: raise KeyboardInterrupt
        by_hand(learn, n_epoch, cbs)
    with pytest.raises(KeyboardInterrupt): compare_strategies(make, dict(a=_fit), 1, seeds=4, fname=f)
    assert len(StrategyComparison.load(f).jobs)==2 and [o.name for o in tmp_path.iterdir()]==['c.json']
    c = compare_strategies(make, dict(a=_fit), 1, seeds=4, fname=f)
    assert len(n)==5 and sorted(j['seed'] for j in c.jobs)==[0,1,2,3]
    compare_strategies(make, dict(a=_fit), 1, seeds=4, fname=f)
    assert len(n)==5
    more = compare_strategies(make, dict(a=_fit, b=by_hand), 1, seeds=4, fname=f)
    assert len(n)==5 and more.names==['a','b'] and len(more.jobs)==8
    with pytest.raises(StrategyError, match='n_epoch=1'): compare_strategies(make, dict(a=_fit), 2, seeds=4, fname=f)

def test_save_and_load(tmp_path):
    c = compare_strategies(make, ['uniform'], 1, seeds=2)
    back = StrategyComparison.load(c.save(tmp_path/'c.json'))
    pd.testing.assert_frame_equal(back.results, c.results)
    (tmp_path/'bad.json').write_text('{"jobs": 3')
    with pytest.raises(StrategyError, match='no comparison'): StrategyComparison.load(tmp_path/'bad.json')
    (tmp_path/'other.json').write_text('[1]')
    with pytest.raises(StrategyError, match='no comparison'): StrategyComparison.load(tmp_path/'other.json')
    with pytest.raises(FileNotFoundError): StrategyComparison.load(tmp_path/'none.json')
    with pytest.raises(StrategyError, match='no folder'): compare_strategies(make, ['uniform'], 1, seeds=1, fname=tmp_path/'nowhere'/'c.json')
    with pytest.raises(StrategyError, match="Did you mean 'accuracy'"): StrategyComparison(c.jobs, metric='acuracy').table()

def test_seconds_as_budget():
    c = compare_strategies(make, dict(slow=by_hand, fast='uniform'), 12, seeds=2, budget='seconds', reference='slow')
    n = {j['strategy']:j['n_epoch'] for j in c.jobs}
    assert n['slow']==12 and n['fast']>=1 and [(j['strategy'],j['n_epoch']) for j in c.info['trials']]==[('fast',1)]

@pytest.mark.parametrize('seconds,n', [(.5,1), (2.,1), (3.,2), (10.5,9)])
def test_as_many_epochs_as_fit_in_the_seconds(seconds, n):
    "The trial: a head that is built in .5 seconds and trained in .1, then one epoch of 1 second"
    c = StrategyComparison([], info=dict(trials=jobs(('x',0,[(.5,.1),(.6,.1),(1.6,.2)]))))
    assert cm._epochs_within(c, 'x', seconds)==n

# ---- mistakes

def test_mistakes_are_named_before_anything_runs():
    def _never(): raise AssertionError('nothing may run')
    for kw,what in [(dict(strategies=['lpft']), "Did you mean 'lp_ft'"), (dict(strategies=[]), 'no strategies'), (dict(strategies=['auto'], budget='second'), "Did you mean 'seconds'"),
        (dict(strategies=['auto'], reference='fastai'), 'not one of the strategies'), (dict(strategies=['auto'], seeds=[]), 'no seeds'), (dict(strategies=['auto'], n_epoch=0), 'at least 1'),
        (dict(strategies=[[Phase(1)]]), 'has no name'), (dict(strategies=['auto','auto']), 'Two strategies')]:
        with pytest.raises(StrategyError) as e: compare_strategies(_never, **kw)
        assert what in str(e.value), (what, str(e.value))

def test_a_factory_that_returns_the_same_learner_twice():
    learn = make()
    with pytest.raises(StrategyError, match='same model twice'): compare_strategies(lambda: learn, ['uniform','head_boost'], 1, seeds=1)
    with pytest.raises(StrategyError, match='not a `Learner`'): compare_strategies(lambda: learn.model, ['uniform'], 1, seeds=1)

def test_a_factory_that_starts_elsewhere_each_time():
    made = []
    def _make():
        learn = make()
        made.append(learn)
        with torch.no_grad(): next(learn.model.parameters()).add_(len(made))
        return learn
    with pytest.raises(StrategyError, match='different weights'): compare_strategies(_make, ['uniform','head_boost'], 1, seeds=1)

# ---- many processes

def _pair(): return compare_strategies(make, ['uniform','lp_ft'], 1, seeds=2).results.valid_loss

@pytest.fixture(scope='module')
def alone(): return _pair()

def test_processes_give_what_one_gives(alone):
    with joblib.parallel_config(n_jobs=2): np.testing.assert_allclose(alone, _pair(), rtol=1e-5)

def test_a_dask_cluster_of_two_workers(alone):
    # the dev extra brings it, so CI runs this; the environment of the oldest versions is made without that extra (CONTRIBUTING)
    distributed = pytest.importorskip('distributed', reason='dask is not installed: it comes with the dev extra, which the oldest versions are tested without')
    local = partial(distributed.LocalCluster, n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with patch.dict(os.environ), local() as cluster, distributed.Client(cluster):
        with joblib.parallel_config(backend='dask'): np.testing.assert_allclose(_pair(), alone, rtol=1e-5)

def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.setattr(cm.os, 'cpu_count', lambda: 8)
    assert cm._share_threads() is None
    with joblib.parallel_config(n_jobs=2): assert cm._share_threads()==4
    before = torch.get_num_threads()
    with cm._threads(3): assert torch.get_num_threads()==3
    assert torch.get_num_threads()==before

def test_a_clock_names_what_a_validation_without_a_fit_has():
    "fastai's `validate` has no training loss, so its record is shorter by one"
    learn,clock = make(),TrainClock()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(clock):
        learn.fit(1)
        loss,acc = learn.validate()
    assert [set(r) for r in clock.rows]==[{'epoch','train_s','train_loss','valid_loss','accuracy'}, {'epoch','train_s','valid_loss','accuracy'}]
    assert (clock.rows[1]['valid_loss'],clock.rows[1]['accuracy'])==pytest.approx((loss,acc))

def test_a_reference_that_trains_nothing_has_no_time_to_compare_with():
    job = dict(seed=0, n_epoch=1, start=1, error='', score={})
    jobs = [dict(job, strategy=k, rows=[dict(epoch=1, train_s=s, accuracy=a)]) for k,s,a in (('none',0.,.5), ('some',2.,.6))]
    c = cm.StrategyComparison(jobs, 'accuracy', 'none')
    assert math.isnan(c.times_to_reference('some')[0]) and math.isnan(c.table().loc['some','time to reference'])
