"`lr_find_groups`: fastai's curve where all groups go together, one course a group, trials; everything put back; what it refuses"
import math,random
from functools import partial

import numpy as np,pytest,torch
import matplotlib.pyplot as plt
from fastai.callback.schedule import SuggestionMethod,slide
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import Adam,Callback,accuracy,set_seed

from fastai_discriminative.all import *
from fastai_discriminative import auto as at
from helpers import flags,own_net,ours,plain,same,stock,weights

@pytest.fixture
def learn(dls):
    set_seed(0)
    res = ours(dls, preset='resnet10t', metrics=accuracy)
    res.unfreeze()
    return res

def state(learn):
    "Everything that a finder must not change"
    m,opt = learn.model,learn.opt
    grads = [None if p.grad is None else p.grad.clone() for p in m.parameters()]
    model = dict(w=weights(learn), flags=flags(learn), modes=[o.training for o in m.modules()], grads=grads)
    rand = dict(torch=torch.get_rng_state(), numpy=str(np.random.get_state()), python=random.getstate(), order=[dl.rng.getstate() for dl in learn.dls.loaders])
    own = {k:v for k,v in learn.__dict__.items() if k!='opt'}
    return dict(model, **rand, opt=opt, moments=str(opt.state_dict()), frozen=opt.frozen_idx, cbs=list(learn.cbs), values=list(learn.recorder.values), own=own)

def unchanged(a, b):
    assert same(a.pop('w'), b.pop('w')) and torch.equal(a.pop('torch'), b.pop('torch'))
    assert all((x is None)==(y is None) and (x is None or torch.equal(x, y)) for x,y in zip(a.pop('grads'), b.pop('grads')))
    own,then = a.pop('own'),b.pop('own')
    assert own.keys()==then.keys() and all(own[k] is then[k] for k in own)
    assert {k:v for k,v in a.items() if v!=b[k]}=={}

# ---- what it finds

def test_one_course_for_all_is_the_curve_of_fastai(dls):
    "The same rates and losses to the last bit, with fewer batches than steps"
    curves = []
    for fast in (True,False):
        set_seed(1)
        learn = plain(dls, own_net(), opt_func=Adam)
        if not fast: learn.split()
        for dl in learn.dls.loaders: dl.rng = random.Random(3)
        set_seed(2)
        if fast:
            learn.lr_find(1e-5, 1., 20, show_plot=False, suggest_funcs=None)
            curves.append([list(map(float, o)) for o in (learn.recorder.lrs,learn.recorder.losses)])
        else: curves.append(learn.lr_find_groups('joint', ratio=1., start_lr=1e-5, end_lr=1., num_it=20).curves['all'])
    assert len(curves[0][0])>len(dls.train) and curves[0][1]==curves[1][1]
    assert curves[0][0]==pytest.approx(curves[1][0], rel=1e-6)

def test_the_presets_slope(learn):
    found = learn.lr_find_groups('joint', num_it=20, end_lr=.1)
    case = learn.preset.scaled(*fit_case(learn, n_epoch=5)).lrs(learn.layer_groups)
    assert [o/found.lrs[-1] for o in found.lrs]==pytest.approx([o/case[-1] for o in case])
    assert found.slice==slice(found.lrs[0], found.lrs[found.n_body-1]) and found.method=='joint' and found.confidence in ('clear','weak')

@pytest.mark.parametrize('rule', [SuggestionMethod.Valley, SuggestionMethod.Steep, SuggestionMethod.Minimum, partial(slide, lr_diff=5)])
def test_rules_of_fastai(learn, rule):
    found = learn.lr_find_groups('joint', num_it=24, end_lr=1., suggest=rule)
    assert 0<found.lrs[-1]<=1. and f"`{getattr(rule, 'func', rule).__name__}`" in str(found)

def test_one_group_at_a_time(learn):
    learn.freeze_to(2)
    found = learn.lr_find_groups('groups', num_it=18, end_lr=1.)
    plt.close(found.plot().figure)
    names = learn.layer_groups.names
    assert list(found.curves)==names[2:] and found.lrs[:2]==[0.,0.] and all(o>0 for o in found.lrs[2:])
    assert found.frozen==[True]*2+[False]*(len(names)-2) and found.slice.start==found.lrs[2]

def test_courses_of_their_own(learn):
    n,seen = len(learn.layer_groups),[]
    class Look(Callback):
        order = 70
        def after_batch(self): seen.append([float(h['lr']) for h in self.opt.hypers])
    learn.add_cb(Look())
    learn.lr_find_groups('joint', start_lr=[1e-6*(i+1) for i in range(n)], end_lr=[1e-2]*n, num_it=18)
    assert seen[0]==pytest.approx([1e-6*(i+1) for i in range(n)]) and seen[-1][0]<seen[-1][-1]*1.1

@pytest.fixture
def trained(learn, monkeypatch):
    "A trained head, and short trials"
    monkeypatch.setattr(at, '_most_steps', 2)
    monkeypatch.setattr(at, '_bearable', lambda n: 9.) # random weights bear nothing
    learn.freeze()
    learn.fit_one_cycle(3, 1e-2)
    learn.unfreeze()
    return learn

def test_trials(trained):
    found = trained.lr_find_groups(n_epoch=4)
    assert found.method=='trials' and 'bears up to' in repr(found) and found.lrs==sorted(found.lrs)
    rates,damages = found.curves['all']
    assert list(rates)==sorted(rates) and len(damages)==len(rates)>1

def test_a_fit_takes_it(trained):
    found = trained.lr_find_groups('joint', num_it=20, end_lr=.1)
    trained.fit_one_cycle(1, found)
    assert trained.peak_lrs==found.lrs

# ---- as it was

@pytest.mark.parametrize('method,opt_func', [('joint',fused_adamw), ('joint',Adam), ('ratios',fused_adamw), ('groups',fused_adamw), ('trials',fused_adamw)])
def test_everything_is_put_back(dls, method, opt_func, monkeypatch):
    monkeypatch.setattr(at, '_most_steps', 2)
    monkeypatch.setattr(at, '_bearable', lambda n: 9.)
    learn = ours(dls, preset='resnet10t', opt_func=opt_func, metrics=accuracy, cbs=SaveModelCallback())
    learn.fit_one_cycle(3, 1e-2)
    learn.unfreeze()
    learn.fit_one_cycle(1, 1e-4)
    for p in list(learn.model.parameters())[::2]: p.grad = torch.ones_like(p)
    was,files = state(learn),sorted(learn.path.rglob('*'))
    learn.lr_find_groups(method, num_it=18, end_lr=1e-2, stop_div=False)
    unchanged(state(learn), was)
    assert sorted(learn.path.rglob('*'))==files

class Stops(Callback):
    "Stops a fit at its third step"
    def __init__(self, error): self.error,self.n = error,0
    def after_step(self):
        self.n += 1
        if self.n==3: raise self.error

@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('no way')])
def test_after_an_interrupt_too(learn, error):
    learn.fit_one_cycle(1, 1e-3)
    stops = learn.add_cb(Stops(error)).stops
    was = state(learn)
    with pytest.raises(type(error)): learn.lr_find_groups('joint', num_it=18, end_lr=1e-3, stop_div=False)
    assert stops.n==0
    unchanged(state(learn), was)

def test_the_fit_that_follows_is_the_one_that_would_have_been(dls):
    ends = []
    for look in (False,True):
        set_seed(5)
        learn = ours(dls, preset='resnet10t')
        learn.unfreeze()
        for dl in learn.dls.loaders: dl.rng = random.Random(3)
        if look: learn.lr_find_groups('joint', num_it=20, end_lr=1.)
        learn.fit_one_cycle(1, 1e-3)
        ends.append(weights(learn))
    assert same(*ends)

# ---- what it refuses

def test_refused(learn, dls):
    with pytest.raises(ReportError, match="Unknown method 'trial'. Did you mean 'trials'"): learn.lr_find_groups('trial')
    with pytest.raises(PresetError, match='needs layer groups'): stock(dls).lr_find_groups()
    with pytest.raises(PresetError, match='2 rates for'): learn.lr_find_groups('joint', start_lr=[1e-6,1e-5])
    learn.preset = None
    with pytest.raises(PresetError, match="method='joint', ratio=.1"): learn.lr_find_groups()
    assert learn.lr_find_groups('joint', ratio=.1, num_it=20, end_lr=1.).lrs[0]>0

def test_no_call_inside_a_fit(learn):
    class Look(Callback):
        def before_batch(self): self.learn.lr_find_groups('joint')
    with pytest.raises(ReportError, match='A fit is running'): learn.fit_one_cycle(1, 1e-3, cbs=Look())

def test_diverging_at_once(learn):
    with pytest.raises(ReportError, match='Start with a lower'): learn.lr_find_groups('joint', start_lr=1e6, end_lr=1e9)

def test_not_a_number_from_the_start(learn):
    with torch.no_grad(): next(learn.model.parameters()).fill_(math.nan)
    with pytest.raises(ReportError, match='Only 0 steps'): learn.lr_find_groups('joint', num_it=20)

def test_a_head_that_knows_nothing(learn):
    with torch.no_grad():
        for p in learn.model[1].parameters(): p.zero_()
    with pytest.raises(StrategyError, match='knows nothing'): learn.lr_find_groups('trials')

def test_a_frozen_body_is_refused_by_trials_only(learn):
    learn.freeze()
    with pytest.raises(ReportError, match=r'The body is frozen.*`learn.unfreeze\(\)`'): learn.lr_find_groups('trials')
    assert learn.lr_find_groups('joint', num_it=20, end_lr=1.).lrs[0]==0

def test_two_groups_are_the_fewest(dls):
    learn = plain(dls, own_net()).split(n_groups=2)
    assert len(learn.lr_find_groups('joint', ratio=1., num_it=20, end_lr=1.).lrs)==2

def test_plots(trained):
    for method in ('joint','trials'):
        ax = trained.lr_find_groups(method, num_it=18, end_lr=1.).plot()
        assert ax.get_xscale()=='log' and ax.get_xlabel() and ax.get_ylabel()
        plt.close(ax.figure)
    ax = plt.subplots()[1]
    assert trained.lr_find_groups('joint', num_it=18, end_lr=1.).plot(ax) is ax
    plt.close('all')

def test_a_look_at_the_data_moves_no_order(learn):
    from fastai_discriminative.probe import one_input,some_batches
    was = [(dl.rng, dl.rng.getstate()) for dl in learn.dls.loaders]
    one_input(learn), some_batches(learn, 2), some_batches(learn, 1, 1)
    assert [(dl.rng, dl.rng.getstate()) for dl in learn.dls.loaders]==was

def test_a_search_over_ratios_is_a_range_test_for_each(learn):
    kw = dict(num_it=24, end_lr=1.)
    found = learn.lr_find_groups('ratios', **kw)
    tests = {f'ratio {r:g}':learn.lr_find_groups('joint', ratio=r, **kw) for r in (.01,.1,1.)}
    assert found.curves=={k:t.curves['all'] for k,t in tests.items()}
    best = min(tests, key=lambda k: min(tests[k].curves['all'][1]))
    assert found.lrs==tests[best].lrs and f'with {best}' in found.why
    learn.preset = None
    assert learn.lr_find_groups('ratios', **kw).lrs==found.lrs
    with pytest.raises(PresetError, match='one number for'): learn.lr_find_groups('ratios', start_lr=[1e-6]*len(learn.layer_groups))
    assert len(found.plot().lines)>=4
