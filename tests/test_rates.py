"Pictures of rates: a plan shows what the fit then does, and drawing it changes nothing"
import numpy as np,pytest
import matplotlib.pyplot as plt

from fastai_discriminative.all import *
from fastai_discriminative import pictures
from fastai_discriminative.backbone import named_params
from helpers import bright_dls,ours,pre_ours,snapshot,stock,unchanged

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def lines(ax, n): return np.stack([o.get_ydata() for o in ax.lines[:n]])

def as_planned(learn, plan, n):
    "The lines of `plan` are those of the fit that has ended"
    hps = learn.recorder.group_hps
    ran = np.where(hps.frozen.values, np.nan, hps['lr'].values).T
    assert plan.shape==ran.shape==(n,len(learn.recorder.lrs))
    assert np.array_equal(np.isnan(plan), np.isnan(ran))
    np.testing.assert_allclose(np.nan_to_num(plan), np.nan_to_num(ran), rtol=1e-4, atol=1e-6*np.nanmax(ran))
    assert np.array_equal(lines(learn.plot_rates(), n), ran, equal_nan=True)

@pytest.mark.parametrize('lr', ['preset', 1e-3, slice(1e-5,1e-2), slice(1e-2), [1e-4,2e-4,3e-4,4e-4], np.array([1e-4,2e-4,3e-4,4e-4]), None])
@pytest.mark.parametrize('frozen', [0,2])
def test_a_plan_is_what_the_fit_does(dls, lr, frozen):
    learn = stock(dls).split(4)
    learn.freeze_to(frozen)
    was = snapshot(learn)
    lr = Preset(1e-5, 1e-3) if lr is None else lr
    plan = lines(learn.plot_rates(lr, 3), 4)
    unchanged(learn, was)
    learn.fit_one_cycle(3, lr)
    as_planned(learn, plan, 4)

@pytest.mark.parametrize('what', ['lp_ft','gradual_unfreeze','layer_decay','last_layers',
    [Phase(2, frozen=-1, sched='flat'), Phase(3, 'preset', sched='slanted')], Phase(2, slice(1e-5,1e-3), sched='flat_cos')])
def test_so_it_is_with_strategies(bright, what):
    learn = pre_ours(bright_dls(bright), n_groups=4)
    n_epoch = 3 if isinstance(what, str) else None
    was = snapshot(learn)
    plan = lines(learn.plot_rates(what, n_epoch), 4)
    unchanged(learn, was)
    learn.fit_strategy(what, n_epoch)
    as_planned(learn, plan, 4)

def test_rates_of_a_phase_are_those_of_its_own_steps(bright):
    "`'preset'` in a phase is the preset at the steps of that phase, in the picture too"
    learn = pre_ours(bright_dls(bright), n_groups=3)
    p = strategy_phases(learn, [Phase(3)])[0]
    learn.fit_strategy([Phase(3)])
    assert p.lr==pytest.approx(list(learn.peak_lrs)) and np.allclose(p.rates_at([.25])[:,0], p.lr)

def test_measured_rates_are_those_of_their_phase_whatever_is_frozen_now(bright):
    learn = pre_ours(bright_dls(bright), n_groups=4)
    free = strategy_phases(learn, 'surgical', 2)[1].lr
    learn.freeze()
    was = snapshot(learn)
    assert strategy_phases(learn, 'surgical', 2)[1].lr==pytest.approx(free) and min(free)>0
    unchanged(learn, was)
    learn.unfreeze()
    for n in learn.layer_groups[1].param_names: named_params(learn.model)[n].requires_grad_(False)
    was = snapshot(learn)
    lrs = strategy_phases(learn, 'surgical', 2)[1].lr
    assert lrs[1]==0 and lrs[0]>0 and lrs[3]>0
    unchanged(learn, was)

def test_long_fits_are_drawn_at_six_hundred_steps(dls):
    learn = stock(dls).split(3)
    ax = learn.plot_rates(1e-3, 1000)
    assert len(ax.lines[0].get_xdata())==600 and ax.lines[0].get_xdata()[-1]==1000*len(dls.train)-1

def test_other_hyper_parameters(dls):
    learn = stock(dls).split(3)
    learn.fit_one_cycle(2, 1e-3)
    ax = learn.plot_rates(key='mom')
    np.testing.assert_array_equal(lines(ax, 3).T, learn.recorder.group_hps['mom'].values)
    assert [o.get_text() for o in ax.texts]==['all groups'] and ax.get_ylabel()=='mom' and ax.get_yscale()=='linear'

def test_names_and_peaks_stand_beside_the_lines(dls):
    learn = stock(dls).split(3)
    ax = learn.plot_rates([1.4e-4,9.96e-4,1.26e-2], 4)
    assert [o.get_text() for o in ax.texts]==[f'{pictures._short(n)} {p}' for n,p in zip(learn.layer_groups.names, ('1.4e-4','1e-3','1.3e-2'))]
    assert ax.get_xlabel()==f'step ({len(dls.train)} an epoch)' and ax.get_ylabel()=='learning rate' and ax.get_yscale()=='log'
    fig,mine = plt.subplots()
    assert learn.plot_rates(1e-3, 1, ax=mine) is mine and learn.plot_strategy('uniform', 1, ax=mine) is mine
    assert tuple(learn.plot_rates(1e-3, 1, figsize=(3,2)).figure.get_size_inches())==(3,2)

def test_mistakes(dls):
    with pytest.raises(ReportError, match='learn.split'): stock(dls).plot_rates(1e-3, 2)
    learn = stock(dls).split(3)
    with pytest.raises(ReportError, match='No fit was recorded'): learn.plot_rates()
    with pytest.raises(ReportError, match='number of epochs is missing'): learn.plot_rates('preset')
    with pytest.raises(StrategyError, match="Did you mean 'lp_ft'"): learn.plot_rates('lpft', 3)
    for bad in (slice(1e-2,1e-4), [1e-3,1e-3], -1.):
        with pytest.raises(PresetError): learn.plot_rates(bad, 3)
    assert 'fit' not in vars(learn)
    learn.fit(1, 1e-3)
    with pytest.raises(ReportError, match="Did you mean 'mom'"): learn.plot_rates(key='mo')
    assert not plt.get_fignums()

def test_not_within_a_fit(dls):
    from fastai.vision.all import Callback
    class Draw(Callback):
        def before_step(self): self.learn.plot_rates(1e-3, 2)
    with pytest.raises(Exception, match='A fit is running'): ours(dls).fit(1, 1e-3, cbs=Draw())

# ---- forty groups

def test_forty_lines_have_a_bar_and_a_few_names():
    x,names = np.arange(1, 30),[f'stages.2.blocks.{i}' for i in range(39)]+['head']
    ax = pictures.group_lines(x, np.geomspace(1e-5, 1e-2, 40)[:,None]/x, names, 39)
    assert len(ax.lines)==40 and len(ax.texts)==6 and ax.texts[-1].get_text()=='head' and len(ax.figure.axes)==2
    cs = [o.get_color() for o in ax.lines]
    light = [np.dot(c[:3], (.2126,.7152,.0722)) for c in cs[:39]]
    assert light==sorted(light) and cs[39][0]>.8 and ax.lines[39].get_linestyle()!='-'

def test_names_do_not_meet():
    ax = pictures.group_lines([1,2], np.full((5,1), 1e-3)*[1,1.0001]+np.arange(5)[:,None]*1e-9, list('abcde'), 4)
    ys = sorted(o.xy[1] for o in ax.texts)
    assert min(np.diff(ys))*ax.bbox.height*72/ax.figure.dpi>=9 and -.3<ys[0] and ys[-1]<=1

def test_a_map_of_forty_names_fourteen():
    ax = pictures.group_map(np.arange(11), np.random.rand(40,10), [f'g{i}' for i in range(40)], 'rate')
    labels = [o.get_text() for o in ax.get_yticklabels()]
    assert len(labels)==14 and labels[0]=='g0' and labels[-1]=='g39' and ax.get_yticks()[-1]==39.5
