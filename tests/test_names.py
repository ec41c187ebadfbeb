"Groups and rates by name: the same as by number, or a helpful error"
import pickle

import numpy as np,pytest,timm,torchvision
from fastai.vision.all import Callback,set_seed

from fastai_discriminative.all import *
from fastai_discriminative.names import *
from helpers import *

archs = ['resnet10t','test_vit','test_convnext','test_efficientnet']

@pytest.fixture(scope='module', params=archs)
def groups(request): return layer_groups(timm.create_model(request.param, num_classes=3))

def parts(groups):
    "Groups with names of their own, of all kinds there are"
    def _group(name, names, layers, depth, **kw): return LayerGroup(name, tuple(names), tuple(layers), depth, (depth,depth), 1, **kw)
    gs = [_group('conv1', ['0.net.conv1.weight'], ['conv1'], 0.), _group('a.0-1', ['0.net.a.0.conv1.weight','0.net.a.1.conv1.weight'], ['a.0','a.1'], .3)]
    gs += [_group('b.0', ['0.net.b.0.conv1.weight'], ['b.0'], .3), _group('a.2 ... b.1', ['0.net.a.2.conv1.weight','0.net.b.1.conv1.weight'], ['a.2','b.1'], .6)]
    gs += [_group('pretrained head', ['0.net.head.norm.weight'], ['head'], .8), _group('fpn', ['0.fpn.weight'], ['fpn'], 1., new=True)]
    return LayerGroups([*gs, _group('head', ['1.8.weight','1.8.bias'], ['head'], 1., is_head=True)], 'registered')

# ---- names

def test_every_group_and_every_parameter_is_found_by_name(groups):
    for i,g in enumerate(groups):
        assert find_groups(groups, g.name)==[i]
        for n in g.param_names: assert find_groups(groups, n)==[i]
        for l in g.layers: assert i in find_groups(groups, l)
    assert find_groups(groups, 'head')==[len(groups)-1] and find_groups(groups, 'stem')==[0]

@pytest.mark.parametrize('name,want', [('conv1',[0]), ('a',[1,3]), ('a.1',[1]), ('a.2',[3]), ('b',[2,3]), ('b.0.conv1',[2]), ('head',[6]), ('pretrained head',[4]), ('head.norm',[4]), ('norm',[4]),
    ('0.net.a',[1,3]), ('0',[0,1,2,3,4,5]), ('1',[6]), ('fpn',[5]), ('0.fpn',[5]), ('1.8.bias',[6]), ('stem',[0]), ('a.0-1',[1]), ('a.2 ... b.1',[3]), ('a.2.conv1.weight',[3])])
def test_what_a_name_stands_for(name, want): assert find_groups(parts(None), name)==want

def test_a_part_of_a_word_is_no_name():
    for bad in ('conv','a.','.a','','a.10','net.','A'):
        with pytest.raises(SplitterError, match='No group, layer or module is called'): find_groups(parts(None), bad)

def test_errors_give_the_near_names_and_all_groups():
    with pytest.raises(SplitterError, match="called 'pretrainedhead'.*Did you mean 'pretrained head'.*The groups are: conv1, a.0-1, b.0, a.2 ... b.1, pretrained head, fpn, head"):
        find_groups(parts(None), 'pretrainedhead')
    gs = layer_groups(timm.create_model('test_vit', num_classes=3))
    with pytest.raises(SplitterError, match="'attn.qkv' could be 'blocks.0.attn.qkv', 'blocks.1.attn.qkv', 'blocks.2.attn.qkv' and 3 more, which are in 3 groups.*more of the path"):
        find_groups(gs, 'attn.qkv')

def test_stem_is_a_layer_where_one_is_called_so():
    gs = parts(None)
    gs.groups[2] = LayerGroup('b.0', ('0.net.stem.weight',), ('stem',), .3, (.3,.3), 1)
    assert find_groups(gs, 'stem')==[2]

# ---- where a group is meant

@pytest.mark.parametrize('name,n', [('layer3',3), ('layer3.0.conv1',3), ('stem',0), ('head',5), ('0.model.layer2',2), ('0',0), ('1',5)])
def test_freeze_to_a_name_is_freeze_to_its_number(dls, name, n):
    learn = ours(dls)
    learn.freeze_to(name)
    assert learn.opt.frozen_idx==n
    assert frozen_names(learn)=={p for g in learn.layer_groups[:n] for p in g.param_names}=={p for p,f in flags(learn).items() if not f}
    learn.true_freeze.freeze_to(name)
    assert learn.opt.frozen_idx==n

@pytest.mark.parametrize('bad,words', [('layer9',"Did you mean 'layer"), ('bn1',"Give more of the path"), (None,'6 groups'), (1.5,'6 groups'), ([1],'6 groups'), (7,'6 groups.*or a name: conv1')])
def test_freeze_to_what_is_no_group(dls, bad, words):
    learn = ours(dls)
    was = snapshot(learn)
    for f in (learn.freeze_to, learn.true_freeze.freeze_to):
        with pytest.raises(OptimizerStateError, match=words): f(bad)
    unchanged(learn, was)

def test_a_learner_without_layer_groups_is_fastais(dls):
    learn = stock(dls)
    with pytest.raises(OptimizerStateError, match='needs layer groups'): learn.freeze_to('layer3')

def test_a_resnet_of_torchvision_has_the_names_of_torchvision(dls):
    learn = stock(dls, torchvision.models.resnet18).split()
    for i,n in enumerate(('conv1','layer1','layer2','layer3','layer4','head')):
        learn.freeze_to(n)
        assert learn.opt.frozen_idx==i
    again = pickle.loads(pickle.dumps(learn))
    again.freeze_to('layer3')
    assert again.opt.frozen_idx==3 and again.layer_groups.names==learn.layer_groups.names

def test_phases_by_name_are_phases_by_number(dls):
    def run(*frozen):
        learn,spy = ours(dls, n_groups=4),Spy()
        learn.fit_strategy([Phase(1, 1e-2, frozen=f) for f in frozen], cbs=spy)
        return spy.frozen
    assert run('head', 'layer4.0', 'stem')==[3,2,0]==run(-1, 2, 0)

def test_a_registered_strategy_by_name(dls):
    @register_strategy('names of the tests', 'this test')
    def _f(n_epoch, preset, groups):
        "For a test: the head, then all but the first layers, with rates by name."
        return [Phase(1, preset, frozen='head'), Phase(n_epoch, {'stem':1e-5, 'head':1e-3}, frozen='layer3')]
    learn,spy,hyp = ours(dls),Spy(),Hypers()
    learn.fit_strategy('names of the tests', 1, cbs=[spy, hyp])
    assert spy.frozen==[5,3] and np.allclose(learn.peak_lrs, rates_by_name(learn.layer_groups, {'stem':1e-5, 'head':1e-3}))
    learn.plot_strategy('names of the tests', 1)

@pytest.mark.parametrize('bad,error,words', [(dict(frozen='layer9'),StrategyError,"No group, layer or module is called 'layer9'"), (dict(frozen=9),StrategyError,'Phase 1 has frozen=9.*6 groups'),
    (dict(frozen=None),StrategyError,'Phase 1 has frozen=None'), (dict(lr={'layer9':1}),PresetError,"'layer9'"), (dict(lr=[1,2]),PresetError,'2 learning rates for 6 groups'),
    (dict(lr=float('nan')),PresetError,'not a finite number'), (dict(frozen='stem', cached=True),StrategyError,'nothing is frozen')])
def test_a_phase_that_cannot_be_run_stops_before_the_first(dls, bad, error, words):
    learn = ours(dls)
    was = snapshot(learn)
    with pytest.raises(error, match=words): learn.fit_strategy([Phase(1, 1e-2), Phase(1, **bad)])
    unchanged(learn, was)

def test_a_fit_by_number_goes_on_by_name(bright, tmp_path):
    def run(frozen, **kwargs):
        set_seed(0)
        learn = ours(bright_dls(bright))
        learn.fit_strategy([Phase(1, 1e-3, frozen=frozen), Phase(1, 1e-3)], resume=tmp_path/'fit.pt', **kwargs)
    with pytest.raises(KeyboardInterrupt): run(-1, cbs=Stop(1))
    run('head')

# ---- rates by name

def test_rates_between_follow_depth(groups):
    lrs = rates_by_name(groups, {'stem':1e-5, 'head':1e-3})
    d0 = groups[0].depth
    assert np.allclose(lrs, [1e-5*100**((g.depth-d0)/(1-d0)) for g in groups]) and lrs[0]==1e-5 and lrs[-1]==1e-3

def test_a_layer_has_its_rate_however_many_groups_there_are():
    m = timm.create_model('test_vit', num_classes=3)
    fine = layer_groups(m, 'block')
    at = dict(zip(fine.names, rates_by_name(fine, {'blocks.0':1e-5, 'head':1e-3})))
    for n in (4, 6):
        gs = layer_groups(m, n)
        for g,lr in zip(gs, rates_by_name(gs, {'blocks.0':1e-5, 'head':1e-3})):
            for l in g.layers: assert .2<lr/at[l]<5, f'{l} of {n} groups'

def test_groups_outside_take_the_nearest_and_one_rate_is_that_of_all():
    gs = parts(None)
    assert rates_by_name(gs, {'b.0':1e-4, 'a.2':1e-3})[:2]==[pytest.approx(1e-4)]*2
    assert np.allclose(rates_by_name(gs, {'b.0':1e-4, 'a.2':1e-3})[3:], 1e-3)
    assert np.allclose(rates_by_name(gs, {'fpn':1e-3}), 1e-3)

def test_groups_beside_each_other_keep_their_own_rates():
    lrs = rates_by_name(parts(None), {'stem':1e-5, 'a.1':1e-4, 'b.0':1e-3, 'head':1e-2})
    assert lrs[:3]==[1e-5,1e-4,1e-3] and lrs[-2:]==[pytest.approx(1e-2), 1e-2] and 10**-3.5<lrs[3]<1e-2

def test_a_name_of_several_groups_gives_all_of_them_its_rate():
    lrs = rates_by_name(parts(None), {'a':1e-4, 'head':1e-3})
    assert lrs[1]==lrs[3]==1e-4 and lrs[2]==pytest.approx(1e-4)

@pytest.mark.parametrize('bad,words', [({}, 'empty'), ({'nose':1e-3}, "called 'nose'"), ({'head':0}, 'above 0'), ({'head':-1}, 'above 0'), ({'head':float('inf')}, 'above 0'), ({'head':'preset'}, "'preset'"),
    ({'head':True}, 'True'), ({'head':None}, 'None'), ({0:1e-3}, '0 is not a name.*conv1.*or a list'), ({None:1e-3}, 'None is not a name'), ({'a':1e-3, 'a.0':1e-4}, "'a.0-1' has two rates")])
def test_rates_that_cannot_be_used(bad, words):
    with pytest.raises(PresetError, match=words): rates_by_name(parts(None), bad)

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fit_flat_cos','fit_sgdr','fit_strategy'])
def test_every_fit_takes_rates_by_name(dls, fit):
    rates,hyp = dict(stem=1e-4, layer3=1e-3, head=1e-2),Hypers()
    learn = ours(dls, n_groups=6)
    want = rates_by_name(learn.layer_groups, rates)
    if fit=='fit_strategy': learn.fit_strategy(Phase(1, rates, sched='flat'), cbs=hyp)
    elif fit=='fit_sgdr': learn.fit_sgdr(1, 1, rates, cbs=hyp)
    else: getattr(learn, fit)(1, rates, cbs=hyp)
    assert np.allclose(learn.peak_lrs, want)
    assert np.allclose(hyp.peak/hyp.peak[-1], np.array(want)/want[-1], rtol=.1) and np.allclose(learn.layer_groups.lrs, want)

def test_rates_by_name_that_are_refused_change_nothing(dls):
    learn = ours(dls)
    was = snapshot(learn)
    with pytest.raises(PresetError, match="Did you mean 'layer"): learn.fit_one_cycle(1, {'layer9':1e-3})
    unchanged(learn, was)

def test_a_function_of_a_phase_may_return_rates_by_name(dls):
    learn = ours(dls)
    learn.fit_strategy(Phase(1, lambda learn,epoch: {'stem':1e-5, 'head':1e-3}))
    assert np.allclose(learn.peak_lrs, rates_by_name(learn.layer_groups, {'stem':1e-5, 'head':1e-3}))

def test_the_finder_starts_and_ends_by_name(dls):
    learn,seen = ours(dls, n_groups=4),[]
    class Watch(Callback):
        order = 100
        def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    learn.add_cb(Watch())
    learn.lr_find_groups('joint', num_it=24, start_lr={'stem':1e-6, 'head':1e-4}, end_lr={'stem':1e-2, 'head':1.}, stop_div=False)
    assert np.allclose(seen[0], rates_by_name(learn.layer_groups, {'stem':1e-6, 'head':1e-4}))
    with pytest.raises(PresetError, match="'nose'"): learn.lr_find_groups('joint', start_lr={'nose':1e-6})

def test_fine_tune_by_name_and_a_learner_without_groups(dls):
    learn = ours(dls)
    learn.fine_tune(1, {'stem':1e-5, 'head':1e-3})
    assert np.allclose(learn.peak_lrs, rates_by_name(learn.layer_groups, {'stem':1e-5, 'head':1e-3})) and learn.opt.frozen_idx==0
    for f in ('fit','fit_one_cycle','fine_tune'):
        with pytest.raises(PresetError, match='need layer groups'): getattr(stock(dls), f)(1, {'head':1e-3})
