"Hyper-parameters, gradients and updates of every group: equal to direct computation, without side effects, in files and loggers"
import csv,os,pickle

import numpy as np,pandas as pd,pytest,torch
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.vision.all import Callback,CancelStepException,Recorder,SGD,set_seed

from fastai_discriminative.all import *
from fastai_discriminative.schedules import GroupHypers
from helpers import Stop,bright_dls,kinds,ours,pre_ours,same,stock,weights

class Seen(Callback):
    "All that the optimiser has in each training batch"
    order = 99
    def before_fit(self): self.hypers,self.frozen = [],[]
    def after_batch(self):
        if self.training:
            self.hypers.append([dict(h) for h in self.opt.hypers])
            self.frozen.append([i<self.opt.frozen_idx for i in range(len(self.opt.hypers))])

def as_seen(learn, seen):
    hps = learn.recorder.group_hps
    assert len(hps)==len(seen.hypers)==len(learn.recorder.lrs) and list(hps.keys())==list(seen.hypers[0][0])
    for k in hps.keys():
        assert list(hps[k].columns)==learn.layer_groups.names
        np.testing.assert_array_equal(hps[k].values, [[h[k] for h in hs] for hs in seen.hypers])
    np.testing.assert_array_equal(hps.frozen.values, seen.frozen)
    assert hps['lr'].iloc[:,-1].tolist()==learn.recorder.lrs
    assert all(hps.at(i)[k]==[h[k] for h in hs] for i,hs in enumerate(seen.hypers) for k in hps.keys())

# ---- the recorder

@pytest.mark.parametrize('opt', [*kinds])
def test_every_hyper_parameter_of_every_group_is_kept(dls, opt):
    learn,seen = stock(dls, wd=.1, **kinds[opt]).split(4),Seen()
    learn.freeze_to(1)
    learn.fit_one_cycle(2, slice(1e-5,1e-2), cbs=seen)
    as_seen(learn, seen)
    assert len({tuple(o) for o in learn.recorder.group_hps['lr'].values})==len(seen.hypers)
    learn.recorder.train_metrics = True
    learn.fit_flat_cos(1, [1e-4,2e-4,3e-4,4e-4], cbs=seen)
    as_seen(learn, seen)

@pytest.mark.parametrize('name', ['lp_ft','gradual_unfreeze','auto'])
def test_phases_cached_ones_too(bright, name):
    learn,seen = pre_ours(bright_dls(bright), n_groups=4),Seen()
    learn.fit_strategy(name, 3, cbs=seen)
    as_seen(learn, seen)
    assert learn.recorder.group_hps.frozen.values[0].tolist()==[True]*3+[False] and not learn.recorder.group_hps.frozen.values[-1].any()

def test_what_stays_constant_is_kept_once(dls):
    learn = ours(dls, n_groups=3)
    learn.fit_one_cycle(2, 1e-3)
    log = learn.recorder.group_hps._log
    assert [len(log[k][0]) for k in ('wd','eps','sqr_mom','frozen')]==[1]*4 and len(log['wd'][1])==3

def test_only_numbers_are_hyper_parameters():
    hps = GroupHypers(['a','b'], [dict(lr=1, foreach=None, amsgrad=False, betas=(1,2)), dict(lr=np.float64(2), foreach=None, amsgrad=False, betas=(1,2))])
    assert list(hps)==hps.keys() and dict.fromkeys(hps)
    assert hps.keys()==['lr']
    with pytest.raises(KeyError, match='there are lr'): hps['amsgrad']

def test_a_stock_learner_keeps_fastais(dls):
    learn = stock(dls)
    learn.fit_one_cycle(1, 1e-3)
    assert type(learn.recorder) is Recorder and not hasattr(learn.recorder, 'group_hps')

def test_a_fit_that_goes_on_has_all_of_it(bright, tmp_path):
    def _fit(learn, **kwargs):
        set_seed(3)
        learn.dls.train.rng.seed(5)
        learn.fit_strategy([Phase(2, 1e-2, frozen=-1, cached=True), Phase(3, slice(1e-4,1e-3))], **kwargs)
    whole,half,rest = (pre_ours(bright_dls(bright), n_groups=3) for _ in range(3))
    m = StepMeter(2)
    _fit(whole, cbs=m)
    with pytest.raises(KeyboardInterrupt): _fit(half, resume=tmp_path/'fit.pt', cbs=[StepMeter(2), Stop(3)])
    again = StepMeter(2)
    _fit(rest, resume=tmp_path/'fit.pt', cbs=again)
    for k in ('lr','mom','wd'): pd.testing.assert_frame_equal(whole.recorder.group_hps[k], rest.recorder.group_hps[k])
    pd.testing.assert_frame_equal(whole.recorder.group_hps.frozen, rest.recorder.group_hps.frozen)
    pd.testing.assert_frame_equal(m.results, again.results)
    pd.testing.assert_frame_equal(rest.recorder.group_sizes, again.results)

def test_it_stays_out_of_exports(dls, tmp_path):
    learn = ours(dls, path=tmp_path)
    learn.fit(1, 1e-3, cbs=StepMeter(1))
    twin = pickle.loads(pickle.dumps(learn.recorder))
    assert learn.recorder.group_hps is not None and twin.group_hps is None and twin.group_sizes is None

# ---- the sizes

class Norms(Callback):
    "Norms of each group's gradients, weights and updates at each step, by hand"
    order = 98
    def before_fit(self): self.rows = []
    def _all(self, f):
        some = [[f(p).detach().flatten() for p in ps if p.grad is not None] for ps in self.opt.param_lists]
        return [torch.cat(ts) if ts else torch.full((1,), torch.nan) for ts in some]
    def before_step(self): self.old,self.grad = self._all(lambda p: p.clone()),self._all(lambda p: p.grad.clone())
    def after_step(self):
        now = self._all(lambda p: p)
        self.rows.append([(g.norm().item(), ((n-o).norm()/o.norm()).item(), o.norm().item()) for g,n,o in zip(self.grad, now, self.old)])

@pytest.mark.parametrize('every', [1,3])
@pytest.mark.parametrize('opt', ['adam','fused_sgd'])
def test_sizes_are_what_they_say(dls, every, opt):
    learn,meter,hand = stock(dls, **kinds[opt]).split(3),StepMeter(every),Norms()
    learn.freeze_to(1)
    learn.fit_one_cycle(2, 1e-2, cbs=[meter,hand])
    want,df = np.array(hand.rows)[::every],meter.results
    assert list(df.columns)==['step','epoch','group','gradient','update','weights'] and df.step.unique().tolist()==list(range(0, len(hand.rows), every))
    assert df.epoch.tolist()==[s//len(dls.train) for s in df.step]
    got = df[['gradient','update','weights']].values.reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.isnan(got[:,0]).all() and not np.isnan(got[:,1:]).any()
    assert np.allclose([meter.last['gradient'],meter.last['update']], got[-1,:,:2].T, equal_nan=True)

def test_a_step_of_sgd_is_the_rate_times_the_gradient(dls):
    learn,meter = stock(dls, opt_func=SGD, wd=0.).split(3),StepMeter(1)
    learn.fit(1, [1e-3,1e-2,1e-1], cbs=meter)
    df = meter.results
    np.testing.assert_allclose(df['update'], df.gradient/df.weights*np.tile([1e-3,1e-2,1e-1], len(df)//3), rtol=1e-3)

def test_gradients_as_the_optimiser_sees_them(dls):
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    learn.fit(1, 1e-3, cbs=[meter,GradientClip(.01)])
    total = np.sqrt((meter.results.gradient**2).groupby(meter.results.step).sum())
    np.testing.assert_allclose(total, .01, rtol=1e-3)
    learn.fit(2, 1e-3, cbs=[meter,GradientAccumulation(16)])
    assert meter.results.step.unique().tolist()==[1,3] # every second batch is a step, and a fit begins anew

def test_a_step_that_is_skipped_is_not_measured(dls):
    class Skip(Callback):
        order = 20
        def before_step(self):
            if self.train_iter==1: raise CancelStepException()
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    learn.fit(1, 1e-3, cbs=[meter,Skip()])
    assert meter.results.step.unique().tolist()==[o for o in range(len(dls.train)) if o!=1]

@pytest.mark.parametrize('split', [True, False])
def test_training_is_the_same_with_and_without(bright, split):
    ends = []
    for cbs in ([], [StepMeter(2)]):
        torch.manual_seed(0)
        learn = stock(bright_dls(bright))
        if split: learn.split(3, fused=True)
        learn.dls.train.rng.seed(1)
        learn.fit_one_cycle(1, 1e-2, cbs=cbs)
        ends.append(weights(learn))
    assert same(*ends) and learn.recorder.group_sizes.group.nunique()==(3 if split else 2)

def test_the_finder_is_not_measured(dls):
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    learn.add_cb(meter)
    learn.fit(1, 1e-3)
    was = meter.results
    learn.lr_find(num_it=12, show_plot=False)
    pd.testing.assert_frame_equal(meter.results, was)

def test_mistakes(dls):
    for bad in (0, 1.5, True, 'all'):
        with pytest.raises(ReportError, match='whole number of steps'): StepMeter(bad)
    with pytest.raises(ReportError, match='Nothing was recorded'): StepMeter().plot()
    with pytest.raises(ReportError, match="Did you mean 'gradient'"): StepMeter().plot('gradients')
    for cb in (GroupLogger,GroupCSVLogger):
        with pytest.raises(ReportError, match='learn.split'): stock(dls).fit(1, cbs=cb())
    with pytest.warns(UserWarning, match='nowhere to write'): ours(dls).fit(1, 1e-3, cbs=GroupLogger())

@pytest.mark.parametrize('what', ['gradient','update'])
def test_picture_of_sizes(dls, what):
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    learn.freeze()
    learn.fit_one_cycle(40, 1e-3, cbs=meter)
    ax = meter.plot(what)
    x,y = ax.lines[-1].get_data()
    np.testing.assert_allclose(y, meter.results[meter.results.group=='head'][what].values.reshape(40, 2).mean(1)) # of 80 steps
    np.testing.assert_allclose(x, np.arange(.5, 80, 2))
    assert [o.get_text() for o in ax.texts]==['head'] and ax.get_yscale()=='log' and ax.get_ylabel()

# ---- loggers

def test_csv(bright, tmp_path):
    learn = pre_ours(bright_dls(bright), n_groups=3, path=tmp_path)
    learn.fit_strategy('auto', 2, cbs=[CSVLogger(), GroupCSVLogger('groups.csv')])
    plain,df,hps = pd.read_csv(tmp_path/'history.csv'),pd.read_csv(tmp_path/'groups.csv'),learn.recorder.group_hps
    pd.testing.assert_frame_equal(df[plain.columns], plain) # with the row of the best epoch
    ends = [learn.recorder.iters[e]-1 for e in df.epoch]
    for k in hps.keys():
        for g in hps.names: np.testing.assert_allclose(df[f'{k}/{g}'], hps[k][g].values[ends], rtol=1e-12)

def test_csv_of_names_with_commas_and_of_a_fit_that_is_appended(dls, tmp_path):
    class Rename(Callback):
        order = Recorder.order+1
        def before_fit(self): self.recorder.group_hps.names[0] = 'a,b'
    learn = ours(dls, n_groups=3, path=tmp_path)
    for _ in range(2): learn.fit(1, 1e-3, cbs=[GroupCSVLogger(append=True), Rename()])
    rows = list(csv.reader(open(tmp_path/'history.csv')))
    assert len(rows)==4 and len({len(r) for r in rows})==1 and 'lr/a,b' in rows[0]

def test_tensorboard(dls, tmp_path):
    pytest.importorskip('tensorboard', reason='of the extra `dev`: what fastai writes is read back with it')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = ours(dls, n_groups=3)
    learn.freeze_to(1)
    meter = StepMeter(2)
    learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=[TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False), meter, GroupLogger(every=2)])
    ev = EventAccumulator(str(tmp_path/'tb'))
    ev.Reload()
    def _read(tag): return [(o.step,o.value) for o in ev.Scalars(tag)]
    hps,tags = learn.recorder.group_hps,ev.Tags()['scalars']
    for g in hps.names: np.testing.assert_allclose(_read(f'lr/{g}'), [(i+1,v) for i,v in enumerate(hps['lr'][g]) if i%2==0], rtol=1e-6)
    assert _read('wd/head')==[(1,pytest.approx(hps['wd']['head'][0]))] # a constant is written once
    head = meter.results[meter.results.group=='head']
    np.testing.assert_allclose(_read('update/head'), list(zip(head.step+1, head['update'])), rtol=1e-6)
    assert 'train_loss' in tags and 'lr_0' in tags and f'gradient/{hps.names[1]}' in tags and f'gradient/{hps.names[0]}' not in tags

def test_wandb(dls, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='of the extra `dev`: a real run without a network')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    env = set(os.environ)
    run = wandb.init(project='x', dir=str(tmp_path), settings=wandb.Settings(x_disable_stats=True, console='off'))
    learn.gather_args = dict # fastai's own stops at a list of paths
    try:
        learn.fit_one_cycle(1, slice(1e-4,1e-2), cbs=[WandbCallback(log=None, log_preds=False), meter, GroupLogger(every=1)])
        now = dict(run.summary)
        steps = run.step
    finally:
        wandb.finish()
        for k in os.environ.keys()-env: del os.environ[k]
    hps = learn.recorder.group_hps
    for g in hps.names:
        assert now[f'lr/{g}']==pytest.approx(hps['lr'][g].iloc[-1]) and now[f'mom/{g}']==pytest.approx(hps['mom'][g].iloc[-1])
        assert now[f'update/{g}']==pytest.approx(meter.last['update'][hps.names.index(g)])
    assert now['lr_2']==now['lr/head'] and steps==len(dls.train) # in fastai's own steps, none of which is added
