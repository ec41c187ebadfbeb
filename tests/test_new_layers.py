"New layers anywhere in a model: their rates and groups, and what freezing does to them and to parameters frozen by hand"
import pickle

import pytest,timm,torch,torchvision
from torch import nn
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastcore.basics import partial

from fastai_discriminative.all import *
from fastai_discriminative.core import OptimizerStateError

class Adapted(nn.Module):
    "A pretrained body with a new stem before it, adapters in two blocks, and a pyramid after it"
    def __init__(self):
        super().__init__()
        self.to_rgb,self.body = nn.Conv2d(4,3,1),timm.create_model('test_resnet', num_classes=0)
        for s in (self.body.layer2, self.body.layer3): s.add_module('adapter', nn.LazyConv2d(s[-1].bn3.num_features if hasattr(s[-1], 'bn3') else s[-1].bn2.num_features, 1))
        self.fpn,self.head = nn.Linear(self.body.num_features, 8),nn.Linear(8,3)
        self.eval()(torch.zeros(1,4,48,48)) # the adapters get their shapes
        self.train()
    def forward(self, x): return self.head(self.fpn(self.body(self.to_rgb(x))))

def learner(model, n_in=4, **kwargs):
    dl = [DataLoader([(torch.randn(4,n_in,48,48), torch.randint(3, (4,)))]*3, bs=None, num_workers=0) for _ in range(2)]
    learn = Learner(DataLoaders(*dl), model, loss_func=nn.CrossEntropyLoss(), **kwargs)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__=='ProgressCallback'])
    learn.logger = lambda *_: None
    return learn

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def moved(learn, before): return {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k]) and 'num_batches' not in k}
opts = dict(adam=Adam, fused=fused_adamw, torch=partial(__import__('fastai.optimizer', fromlist=['OptimWrapper']).OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('new', [['adapter'], 'body.layer2.adapter', ['adapter','fpn'], ['*adapter*'], ['to_rgb.weight']])
def test_groups_of_their_own_before_the_head(new):
    m = Adapted()
    gs = layer_groups(m, new=new)
    named = [k for k in ([new] if isinstance(new, str) else new) if k not in ('fpn','to_rgb.weight')]
    ns = [n for g in gs for n in g.param_names]
    assert sorted(ns)==sorted(n for n,_ in m.named_parameters())
    assert gs[-1].is_head and all(g.is_new for g in gs[gs.n_body:]) and not any(g.is_new for g in gs[:gs.n_body])
    if named: assert all('adapter' not in n for g in gs[:gs.n_body] for n in g.param_names) == ('layer2' not in named[0])

def test_a_name_a_module_and_a_parameter_say_the_same():
    m = Adapted()
    a = layer_groups(m, new=['adapter'])
    mods = [m.body.layer2.adapter, m.body.layer3.adapter]
    for new in (mods, [p for o in mods for p in o.parameters()]):
        b = layer_groups(m, new=new)
        assert {n for g in a[a.n_body:] for n in g.param_names}=={n for g in b[b.n_body:] for n in g.param_names}

def test_what_is_named_and_not_there():
    with pytest.raises(SplitterError, match="names 'adaptor'.*Did you mean 'adapter'"): layer_groups(Adapted(), new='adaptor')
    class Bare(Adapted):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()
    with pytest.raises(SplitterError) as e: layer_groups(Bare(), new='drop')
    assert "no part of this Bare with that name has parameters" in str(e.value) and 'mean' not in str(e.value), 'a module without parameters is no better name'
    with pytest.raises(SplitterError, match='not part of this Adapted'): layer_groups(Adapted(), new=nn.Linear(2,2))
    with pytest.raises(SplitterError, match='takes names, modules and parameters, not a int'): layer_groups(Adapted(), new=[3])

@pytest.mark.parametrize('opt', opts)
def test_they_get_the_rate_of_the_head(opt):
    learn = learner(Adapted(), opt_func=opts[opt]).split(new=['adapter'])
    gs = learn.layer_groups
    head = Preset(1e-6, 1e-4, 10).lrs(gs)
    assert all(r==head[-1]==pytest.approx(1e-3) for g,r in zip(gs, head) if g.is_new) and head[gs.n_body-1]<=1e-4
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    lrs = learn.layer_groups.lrs
    assert lrs[gs.n_body:]==[1e-3]*(len(gs)-gs.n_body) and lrs[0]==pytest.approx(1e-5) and max(lrs[:gs.n_body])<1e-3
    learn.fit_one_cycle(1, slice(1e-3))
    assert learn.layer_groups.lrs==pytest.approx([1e-4]*gs.n_body+[1e-3]*(len(gs)-gs.n_body))
    assert 'new' in repr(learn.layer_groups) and 'new' not in repr(learner(Adapted()).split().layer_groups)

@pytest.mark.parametrize('opt', opts)
def test_a_frozen_body_leaves_them_training(opt):
    learn = learner(Adapted(), opt_func=opts[opt]).split(new=['adapter'])
    learn.freeze()
    before = state(learn)
    learn.fit(1, 1e-2)
    got = moved(learn, before)
    assert {n.split('.')[-2] for n in got}=={'adapter','to_rgb','fpn','head'}, got
    learn.unfreeze()
    before = state(learn)
    learn.fit(1, 1e-2)
    assert 'body.conv1.0.weight' in moved(learn, before)

@pytest.mark.parametrize('name', ['feature_extraction','lp_ft','gradual_unfreeze','discriminative','head_boost','auto'])
def test_strategies_never_freeze_what_is_new(name):
    learn = learner(Adapted(), metrics=lambda p,y: (p.argmax(1)==y).float().mean(), opt_func=fused_adamw).split(new=['adapter'])
    groups = learn.splitter.find(learn.model)
    for p in find_strategy(name).phases(3, Preset(1e-6, 1e-4, 10), groups): assert p.frozen<len(groups)
    before = state(learn)
    learn.fit_strategy(name, 1)
    assert any('adapter' in n for n in moved(learn, before))

@pytest.mark.parametrize('opt', opts)
def test_what_the_user_froze_stays_frozen(opt):
    class WithAverage(nn.Module):
        "Contains an average of its own blocks, which is not trained"
        def __init__(self):
            super().__init__()
            self.net = timm.create_model('test_resnet', num_classes=3)
            self.net.layer3.ema = nn.Conv2d(8,8,1).requires_grad_(False)
            self.net.fc.bias.requires_grad_(False)
        def forward(self, x): return self.net.fc(self.net.forward_features(x).mean((2,3)))
    m = WithAverage()
    m.net.layer3.ema.forward = lambda x: x # in the sequence of its stage, but no part of the computation
    learn = learner(m, 3, opt_func=opts[opt]).split()
    pinned = {'net.layer3.ema.weight','net.layer3.ema.bias','net.fc.bias'}
    still = lambda: {n for n,p in m.named_parameters() if not p.requires_grad}
    assert still()==pinned
    for act in (learn.unfreeze, lambda: learn.freeze_to(-2), learn.unfreeze, learn.freeze, lambda: learn.freeze_to(0)):
        act()
        assert pinned<=still()
        before = state(learn)
        learn.fit(1, 1e-2)
        assert not pinned & moved(learn, before) and pinned<=still()
    assert still()==pinned
    m.net.fc.bias.requires_grad_(True)
    learn.unfreeze()
    before = state(learn)
    learn.fit(1, 1e-2)
    assert 'net.fc.bias' in moved(learn, before) and 'net.fc.bias' not in still(), 'thawed by hand'
    learn.opt.freeze_to(2)
    learn.opt.freeze_to(0) # past the learner
    before = state(learn)
    learn.fit(1, 1e-2)
    assert not any('ema' in n for n in moved(learn, before))

@pytest.mark.parametrize('opt', opts)
def test_a_norm_that_the_user_froze_stays_frozen_where_all_norms_train(opt):
    "fastai's optimisers thaw the norms of a group that they freeze"
    m = timm.create_model('test_resnet', num_classes=3)
    pinned = {f'layer2.0.bn1.{o}' for o in ('weight','bias')}
    m.layer2[0].bn1.requires_grad_(False)
    learn = learner(m, 3, opt_func=opts[opt]).split(train_norm=True)
    for act in (learn.freeze, learn.unfreeze, lambda: learn.freeze_to(-2)):
        act()
        before = state(learn)
        learn.fit(1, 1e-2)
        assert not pinned & moved(learn, before) and 'layer2.0.bn2.weight' in moved(learn, before)

@pytest.mark.parametrize('opt', opts)
def test_freezing_to_a_group_that_is_not_there(opt):
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(3*48*48, 3)), 3, opt_func=opts[opt]).split()
    n = len(learn.layer_groups)
    for bad in (-n-1, -n-7, n+1):
        with pytest.raises(OptimizerStateError, match=f'there are {n} groups'): learn.freeze_to(bad)
    assert all(p.requires_grad for p in learn.model.parameters())

def test_a_checkpoint_that_lacks_layers(tmp_path):
    m = Adapted()
    file = tmp_path/'body.pth'
    torch.save({k:v for k,v in m.state_dict().items() if 'adapter' not in k and not k.startswith(('fpn','head','to_rgb'))}, file)
    fresh = Adapted()
    lacking = load_pretrained(fresh, file)
    assert {n for n in lacking if 'adapter' in n}=={'body.layer2.adapter.weight','body.layer2.adapter.bias','body.layer3.adapter.weight','body.layer3.adapter.bias'}
    assert torch.equal(fresh.body.conv1[0].weight, m.body.conv1[0].weight)
    learn = learner(fresh).split()
    gs = learn.layer_groups
    assert {n for g in gs[gs.n_body:] for n in g.param_names}==set(lacking)
    before = state(learn)
    with pytest.raises(WeightsError, match='lacks'): load_pretrained(timm.create_model('test_vit'), file)
    torch.save({**m.state_dict(), 'fpn.weight':torch.zeros(2,2)}, file)
    with pytest.raises(WeightsError, match="'fpn.weight' have other shapes"): load_pretrained(fresh, file)
    assert not moved(learn, before)

def test_pickled_splitters_know_what_is_new():
    m = Adapted()
    spl = Splitter(new=[m.body.layer2.adapter])
    lists = spl(m)
    again = pickle.loads(pickle.dumps(spl))
    assert again(Adapted()).names==lists.names and again.find(m).n_body==spl.find(m).n_body
    check_splitter(spl, m, input_size=(4,48,48))

@pytest.mark.parametrize('name', ['fcn_resnet50','fasterrcnn_resnet50_fpn'])
def test_heads_of_torchvision_train_in_a_frozen_body(name):
    m = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    learn = learner(m, 3).split()
    learn.freeze()
    trains = {n for n,p in m.named_parameters() if p.requires_grad and not is_norm(m.get_submodule(n.rpartition('.')[0]))}
    assert trains and not any(n.startswith('backbone.body' if 'rcnn' in name else 'backbone') for n in trains)
    assert any('classifier' in n or 'fpn' in n for n in trains)
