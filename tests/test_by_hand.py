"Parameters frozen by hand stay frozen when their group is unfrozen, until they are unfrozen by hand"
import warnings
from collections import OrderedDict

import pytest
from torch import nn
from fastai.vision.all import ImageDataLoaders,load_learner,set_seed

from fastai_discriminative.all import *
from helpers import *

class Adapted(nn.Module):
    "A layer with a small one beside it, as in LoRA"
    def __init__(self, ni, nf):
        super().__init__()
        self.base,self.lora,self.norm = nn.Conv2d(ni, nf, 3, stride=2, padding=1, bias=False),nn.Conv2d(ni, nf, 1, stride=2, bias=False),nn.BatchNorm2d(nf)
    def forward(self, x): return self.norm(self.base(x)+self.lora(x)).relu()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.mid,self.top = Adapted(3, 8),Adapted(8, 8),Adapted(8, 16)
        self.fc = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), hidden=nn.Linear(16, 8), act=nn.GELU(), out=nn.Linear(8, 3)))
    def forward(self, x): return self.fc(self.top(self.mid(self.stem(x))))

def learner(dls, hand=(), n_groups=None, **kwargs):
    torch.manual_seed(3)
    learn = plain(dls, Net(), opt_func=fused_adamw, metrics=accuracy, **kwargs)
    freeze_by_hand(learn, hand)
    return learn.split(n_groups, preset=Preset(1e-3, 1e-2))

def freeze_by_hand(learn, starts):
    for n,p in learn.model.named_parameters():
        if n.startswith(tuple(starts)): p.requires_grad_(False)

def named(learn, starts): return {n for n,_ in learn.model.named_parameters() if n.startswith(tuple(starts))}
def still(learn): return {n for n,f in flags(learn).items() if not f}
def moved(learn, before): return {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}

kinds_by_hand = dict(group=['stem.'], later_group=['mid.'], body=['stem.','mid.','top.'], tensor=['mid.base.weight'], norms=['stem.norm.','top.norm.'], head_tensor=['fc.out.bias'],
    base=['stem.base.','mid.base.','top.base.','stem.norm.','mid.norm.','top.norm.'])

def head_then_all(learn): learn.fit_strategy([Phase(1, 1e-2, frozen=-1), Phase(1, 1e-2)])
def cached_then_all(learn): learn.fit_strategy([Phase(2, 1e-2, frozen=-1, cached=True), Phase(1, 1e-2)])
def freeze_and_thaw(learn):
    learn.freeze()
    learn.fit(1, 1e-2)
    learn.unfreeze()
    learn.fit(1, 1e-2)

fits = dict(phase=lambda l: l.fit_strategy([Phase(1, 1e-2)]), phases=head_then_all, cached=cached_then_all, by_name=lambda l: l.fit_strategy('freeze_unfreeze', 1),
    one_cycle=lambda l: l.fit_one_cycle(1, 1e-2), freeze_and_thaw=freeze_and_thaw, fine_tune=lambda l: l.fine_tune(1, 1e-2))

@pytest.fixture(autouse=True)
def no_noise():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'These groups stay frozen')
        yield

def check(learn, how, hand):
    before,want = weights(learn),named(learn, hand)
    fits[how](learn)
    assert want and still(learn)==want==learn.true_freeze.pinned
    assert moved(learn, before)==set(flags(learn))-want

@pytest.mark.parametrize('how', fits)
@pytest.mark.parametrize('kind', kinds_by_hand)
def test_it_stays_as_it_is_and_all_else_trains(dls, kind, how):
    learn = learner(dls)
    freeze_by_hand(learn, kinds_by_hand[kind])
    check(learn, how, kinds_by_hand[kind])

@pytest.mark.parametrize('kind', kinds_by_hand)
def test_frozen_by_hand_before_the_split(dls, kind): check(learner(dls, kinds_by_hand[kind]), 'phases', kinds_by_hand[kind])

def test_auto_leaves_it(bright):
    learn = learner(bright_dls(bright), ['stem.','mid.base.'])
    before,want = weights(learn),named(learn, ['stem.','mid.base.'])
    learn.fit_strategy('auto', 1)
    assert still(learn)==want and not moved(learn, before) & want and moved(learn, before) & named(learn, ['fc.'])

def test_thawed_by_hand_it_trains(dls):
    learn = learner(dls, ['stem.'])
    learn.freeze()
    assert learn.layer_groups.frozen==[True]*7+[False]
    learn.unfreeze()
    assert learn.layer_groups.frozen==[True]*2+[False]*6 and learn.opt.frozen_idx==2
    learn.model.stem.requires_grad_(True)
    assert learn.layer_groups.frozen==[False]*8 and learn.opt.frozen_idx==0 and not learn.true_freeze.pinned
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert moved(learn, before)==set(flags(learn))

def test_a_name_that_is_pinned_in_a_frozen_group(dls):
    learn = learner(dls)
    learn.freeze()
    learn.true_freeze.pinned.add('stem.base.weight')
    head_then_all(learn)
    assert still(learn)=={'stem.base.weight'}

def test_a_freeze_past_the_learner(dls):
    learn = learner(dls, ['stem.','top.norm.'])
    for n in (2, 0, 3, 0):
        learn.opt.freeze_to(n)
        learn.fit(1, 1e-3)
    assert still(learn)==named(learn, ['stem.','top.norm.'])

@pytest.mark.parametrize('n_groups', [2,3,'block'])
def test_another_split_knows_a_freeze_from_a_hand(dls, n_groups):
    learn = learner(dls, ['stem.'])
    freeze_by_hand(learn, ['top.lora.'])
    learn.freeze()
    assert learn.split(n_groups, preset=learn.preset).layer_groups.frozen[:-1]==[True]*(len(learn.layer_groups)-1)
    learn.unfreeze()
    assert still(learn)==named(learn, ['stem.','top.lora.'])

def test_export_a_new_optimizer_and_another_process(dls, tmp_path):
    learn = learner(dls, ['stem.'], path=tmp_path)
    learn.freeze()
    learn.export()
    learn.fit(1, 1e-3, reset_opt=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    for o in (learn, loaded, load_and_split(tmp_path, dls)):
        assert still(o)==named(o, ['stem.','mid.','top.','fc.hidden.'])
        o.unfreeze()
        assert still(o)==named(o, ['stem.'])

def load_and_split(path, dls):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = load_learner(path/'export.pkl')
    learn.opt,learn.dls = None,dls
    return learn.split(3, preset=learn.preset)

@pytest.mark.parametrize('fit', ['one_cycle','phases'])
@pytest.mark.parametrize('same_process', [False,True])
def test_a_fit_that_goes_on_keeps_it(folder, tmp_path, fit, same_process):
    def make(hand):
        set_seed(1)
        return learner(ImageDataLoaders.from_folder(folder, valid_pct=0.3, seed=1, bs=8, num_workers=0), hand)
    def run(learn, **kwargs):
        set_seed(1)
        if fit=='one_cycle': learn.fit_one_cycle(3, 1e-2, **kwargs)
        else: learn.fit_strategy([Phase(1, 1e-2, frozen=-1), Phase(2, 1e-2)], **kwargs)
    hand = ['stem.','mid.base.']
    whole,learn = make(hand),make(hand)
    run(whole)
    with pytest.raises(KeyboardInterrupt): run(learn, cbs=Stop(2), resume=tmp_path/'fit.pt')
    learn.remove_cbs(Stop)
    if not same_process:
        learn = make(hand if fit=='one_cycle' else ()) # a fit in phases brings what was frozen by hand from its file
    run(learn, resume=tmp_path/'fit.pt')
    assert same(weights(whole), weights(learn)) and still(learn)==named(learn, hand)==learn.true_freeze.pinned

def test_the_table_tells_a_hand_from_a_freeze(dls):
    learn = learner(dls, ['stem.','top.norm.'])
    def words():
        cols,rows = learn.layer_groups._table()
        return [r[cols.index('frozen')] for r in rows]
    assert words()==['by hand','by hand','','','','2 of 3 by hand','','']
    learn.freeze()
    assert words()==['by hand']*2+['yes']*5+['']

# ---- phases say what they leave

def test_a_warning_for_whole_groups_that_a_phase_means_to_train(dls):
    learn = learner(dls, ['stem.','mid.','top.base.'])
    with pytest.warns(UserWarning, match="stay frozen in all phases.*by hand: 'stem.base', 'stem.lora', 'mid.base', 'mid.lora' and 1 more.*requires_grad_"): learn.fit_strategy([Phase(1, 1e-2)])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'These groups stay frozen')
        learn.fit_strategy([Phase(1, 1e-2, frozen=-1)])

def test_a_phase_in_which_nothing_is_left_to_train(dls):
    learn = learner(dls, ['fc.out.'])
    before = weights(learn)
    with pytest.raises(StrategyError, match="Phase 1 trains nothing, since its groups were frozen by hand: 'head'"):
        learn.fit_strategy([Phase(1, 1e-2), Phase(1, 1e-2, frozen=-1)])
    assert same(before, weights(learn))
