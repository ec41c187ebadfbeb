"Every strategy on every kind of learner; phases that are one fit; evidence that changes nothing; and an end that is never below the best"
import pickle
from copy import deepcopy

import numpy as np,pytest,torch
from PIL import Image
from torch import nn

from fastai.vision.all import (Adam,Callback,CrossEntropyLossFlat,EarlyStoppingCallback,ImageDataLoaders,Learner,ProgressCallback,RMSProp,SaveModelCallback,
    accuracy,error_rate,noop,set_seed,vision_learner)
from fastai_discriminative.all import *
from fastai_discriminative import auto as st,phases as ph,strategies

names = [s.name for s in list_strategies()]
k = ph._cached_per_epoch # epochs of a head on cached features

# ---- data and learners

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "48 noisy images of 32 pixels in three classes of brightness"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i,c in enumerate(('ant','bee','cow')):
        (path/c).mkdir()
        for j in range(16): Image.fromarray(rng.integers(60*i, 90+60*i, (32,32,3), dtype=np.uint8)).save(path/c/f'{j}.png')
    return path

@pytest.fixture
def dls(folder): return ImageDataLoaders.from_folder(folder, valid_pct=.33, seed=1, bs=8, num_workers=0)

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def conv(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride=2), nn.BatchNorm2d(nf), nn.ReLU())
def own_net(): return nn.Sequential(conv(3,8), conv(8,8), conv(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

def ours(dls, arch='resnet10t', metrics=accuracy, **kwargs):
    set_seed(0)
    learn = quiet(discriminative_learner(dls, arch, pretrained=False, metrics=metrics, train_norm='affine', **kwargs))
    learn.pretrained = True # random weights stand in for pretrained ones
    return learn

def plain(dls, **kwargs):
    set_seed(0)
    return quiet(Learner(dls, own_net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs))

def stock(dls):
    set_seed(0)
    learn = quiet(vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy))
    learn.pretrained = True
    return learn

kinds = dict(cnn=ours, vit=lambda dls: ours(dls, 'test_vit'), convnext=lambda dls: ours(dls, 'test_convnext'), plain=plain, stock=stock)

def weights(learn): return {k:v.detach().clone() for k,v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

class Spy(Callback):
    "What a callback sees of a fit"
    order = 58
    def before_fit(self): self.fits,self.epochs,self.frozen,self.lrs,self.states = getattr(self, 'fits', 0)+1,[],[],[],[]
    def after_batch(self):
        if self.training: self.lrs.append([h['lr'] for h in self.opt.hypers])
    def after_epoch(self):
        self.epochs.append(self.epoch)
        self.frozen.append(self.opt.frozen_idx)
        self.states.append(weights(self.learn))

class Stop(Callback):
    "An interrupt in epoch `at`, in its second batch"
    order = 58
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.epoch==self.at and self.iter==1: raise KeyboardInterrupt

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

def test_nothing_pretrained_everything_new(dls):
    learn,spy = ours(dls),Spy()
    learn.pretrained = False
    learn.fit_strategy('auto', 2, cbs=spy)
    assert spy.frozen==[0,0] and len(set(spy.lrs[3]))==1 and max(map(max, spy.lrs))==pytest.approx(learn.preset.scaled(8).head_lr, rel=.05)

def test_fastai_is_fine_tune_to_the_bit(dls):
    ends = []
    for f in (lambda l: l.fine_tune(2), lambda l: l.fit_strategy('fastai', 2), lambda l: l.split(fused=True).fit_strategy('fastai', 2)):
        learn = stock(dls)
        for dl in learn.dls.loaders: dl.rng.seed(3)
        set_seed(1)
        f(learn)
        ends.append(weights(learn))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])

# ---- one fit

def test_the_rates_of_a_phase_are_those_of_fit_one_cycle(dls):
    ours_spy,stock_spy = Spy(),Spy()
    ours(dls).fit_strategy(Phase(2, slice(1e-4,1e-2)), cbs=ours_spy)
    learn = ours(dls)
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(1e-4,1e-2), cbs=stock_spy)
    np.testing.assert_allclose(ours_spy.lrs, stock_spy.lrs, rtol=1e-3, atol=1e-9)

def test_moments_and_momentum(dls):
    "The head's step counts go on when the body thaws"
    learn = ours(dls)
    learn.fit_strategy([Phase(2, 1e-3, frozen=-1), Phase(1, 1e-4)])
    steps = {int(learn.opt.opt.state[p]['step']) for p in list(learn.opt.param_lists)[-1]}
    body = {int(learn.opt.opt.state[p]['step']) for ps in list(learn.opt.param_lists)[:-1] for p in ps}
    n = len(dls.train)
    assert steps=={3*n} and body=={n}
    assert len(learn.recorder.hps['lr'])==3*n and len(learn.recorder.hps['mom'])==3*n
    assert min(learn.recorder.hps['mom'])<.9

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
    def _refuse(self, xb): raise FeatureError('No features here.')
    monkeypatch.setattr(CachedFeatures, '_prefix', _refuse)
    learn = ours(dls)
    with pytest.warns(UserWarning, match='trains on the data themselves'): learn.fit_strategy('lp_ft', 2)
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
    assert float(rows[-1][i])==max(float(v[i]) for v in rows[k-1:])

# ---- n_epoch and phases

def _phases(name, n_epoch, n_groups=None, arch='resnet10t', dls=None):
    learn = ours(dls, arch, n_groups=n_groups)
    return find_strategy(name).phases(n_epoch, learn.preset, learn.layer_groups)

@pytest.mark.parametrize('name', names)
@pytest.mark.parametrize('n_groups', [2,3,'block'])
@pytest.mark.parametrize('n_epoch', [1,3,30])
def test_phases_fit_any_number_of_epochs_and_groups(dls, name, n_epoch, n_groups):
    learn = ours(dls, n_groups=n_groups)
    ps = find_strategy(name).phases(n_epoch, learn.preset, learn.layer_groups)
    assert ph._check_phases(ps, learn.layer_groups)==ps
    on_images = sum(p.n_epoch for p in ps if not p.cached)
    assert on_images in (n_epoch,n_epoch+1) or name=='feature_extraction'

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

def test_frozen_groups_have_no_ratio(dls):
    learn = ours(dls)
    learn.freeze()
    assert learn.grad_ratios()[:-1]==[0.]*(len(learn.layer_groups)-1)

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

def test_mistakes_are_named_before_anything_moves(dls):
    learn = ours(dls)
    start,n = weights(learn),len(learn.layer_groups)
    for f,what in [
        (lambda: learn.fit_strategy('lpft', 2), "Did you mean 'lp_ft'"), (lambda: learn.fit_strategy('auto'), 'n_epoch'), (lambda: learn.fit_strategy('auto', 0), 'at least 1'),
        (lambda: learn.fit_strategy('auto', 1.5), 'whole number'), (lambda: learn.fit_strategy(True), 'whole number'),
        (lambda: learn.fit_strategy([]), 'list of `Phase`'), (lambda: learn.fit_strategy([1]), 'list of `Phase`'), (lambda: Phase(0), 'at least 1'), (lambda: Phase(1, sched='cosine'), 'Unknown schedule'),
        (lambda: learn.fit_strategy(Phase(1, frozen=n)), 'trains nothing'), (lambda: learn.fit_strategy(Phase(1, frozen=-n-1)), f'{n} groups'),
        (lambda: learn.fit_strategy(Phase(1, cached=True)), 'nothing is frozen'), (lambda: learn.fit_strategy([Phase(1), Phase(1), Phase(1)], 2), '3 phases take 3 epochs'),
        (lambda: learn.fit_strategy('fastai', 1, start_epoch=1), 'go on in the middle'),
        (lambda: learn.fit_strategy('auto', 1, monitor='acuracy'), "Did you mean 'accuracy'")]:
        with pytest.raises(StrategyError) as e: f()
        assert what in str(e.value), (what, str(e.value))
    with pytest.raises(PresetError, match='reversed'): learn.fit_strategy(Phase(1, slice(1e-2,1e-4)))
    with pytest.raises(PresetError, match='rates for'): learn.fit_strategy(Phase(1, [1e-3]*(n+1)))
    assert same(start, weights(learn)) and learn.true_freeze.train_norm=='affine'

def test_auto_says_why_it_needs_a_validation_set(dls):
    dls.loaders[1] = dls.train.new([], shuffle=False, drop_last=False)
    with pytest.raises(StrategyError, match='validation set'): ours(dls).fit_strategy(n_epoch=1)
    ours(dls).fit_strategy('lp_ft', 1)

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

def test_every_strategy_says_when_and_whence():
    for s in list_strategies(): assert len(s.about)>20 and s.source, s.name

def test_pictures(dls):
    learn = ours(dls)
    start,peak = weights(learn),learn.peak_lrs
    for n in names: assert learn.plot_strategy(n, 2).get_title()==n
    assert learn.plot_strategy([Phase(1), Phase(1)]).get_title()=='2 phases'
    assert same(start, weights(learn)) and learn.peak_lrs is peak
