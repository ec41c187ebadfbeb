"The learner as users see it: splits keep the state, presets reach the optimiser, mistakes are named, and nothing else changes"
import copy,inspect,pickle,subprocess,sys,textwrap

import numpy as np,pytest,timm,torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.vision.all import (Adam,CrossEntropyLossFlat,DataBlock,DataLoaders,GradientAccumulation,ImageBlock,Learner,load_learner,
    MaskBlock,OptimWrapper,resnet18,RMSProp,SGD,squeezenet1_1,unet_learner)
from fastai.data.all import DataLoader

from fastai_discriminative.all import *
from fastai_discriminative import learner as learner_room
from fastai_discriminative.freeze import TrueFreeze
from helpers import *

# ---- data and learners

class Tied(nn.Module):
    "The first and the last linear layer share their weight"
    def __init__(self):
        super().__init__()
        self.stem,self.a,self.b,self.c = conv(3,16),nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,16)
        self.out,self.c.weight = nn.Linear(16,3),self.a.weight
    def forward(self, x): return self.out(self.c(self.b(self.a(self.stem(x).mean((2,3))))))

class Idle(nn.Module):
    "Has a layer that its forward pass never uses"
    def __init__(self):
        super().__init__()
        self.stem,self.forgotten,self.out = conv(3,8),nn.Linear(8,8),nn.Linear(8,3)
    def forward(self, x): return self.out(self.stem(x).mean((2,3)))

class Inner(nn.Module):
    "A user's wrapper that happens to call its part `module`, next to a part with the same names inside"
    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict(dict(fc=nn.Linear(3,8)))
        self.fc = nn.Linear(8,3)
    def forward(self, x): return self.fc(self.module['fc'](x.mean((2,3))))

# ---- rule 7: nothing changes until asked

_script = '''
    import sys,random,numpy as np,torch
    from fastai.vision.all import *
    torch.set_num_threads(1)
    def go(name, f, n_split=None):
        random.seed(1); np.random.seed(1); torch.manual_seed(1)
        dls = ImageDataLoaders.from_folder(sys.argv[1], valid_pct=0.3, seed=1, bs=8, num_workers=0, batch_tfms=[Flip(), Brightness()])
        learn = vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy)
        f(learn)
        res[name] = {**learn.model.state_dict(), 'rng': torch.get_rng_state(), 'lrs': tensor([h['lr'] for h in learn.opt.hypers]),
            'loss': tensor(learn.recorder.losses)}
    for how in ('without','with'):
        if how=='with': from fastai_discriminative.all import *
        res = {}
        go('fine_tune', lambda l: l.fine_tune(2))
        go('number', lambda l: l.fit_one_cycle(2, 3e-3))
        go('none', lambda l: l.fit_one_cycle(1))
        go('slice', lambda l: l.fit_one_cycle(2, slice(1e-5,1e-2), wd=0.1))
        go('keyword', lambda l: l.fit_one_cycle(n_epoch=1, lr_max=slice(1e-2), pct_start=0.5))
        go('array', lambda l: (l.freeze(), l.fit_one_cycle(1, np.array([1e-4,1e-3])), l.unfreeze(), l.fit_one_cycle(1, [1e-4,1e-3], 10., 1e3)))
        go('flat_cos', lambda l: (l.freeze(), l.fit_flat_cos(1, 1e-3), l.fit(1, slice(1e-4,1e-3)), l.fit_sgdr(1, 1, slice(1e-2,1e-4))))
        torch.save(res, f'{sys.argv[2]}/{how}')
'''

def test_stock_learners_train_bit_identically_with_and_without_us(folder, tmp_path):
    "In a separate process, before our import and after it"
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(_script), str(folder), str(tmp_path)], capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    res = [torch.load(tmp_path/how) for how in ('with','without')]
    assert res[0].keys()==res[1].keys() and len(res[0])==7
    for k in res[0]: assert same(res[0][k], res[1][k]), k
    assert not same(res[0]['number'], res[0]['slice'])

def test_a_stock_learner_takes_reversed_and_zero_rates_as_ever(dls):
    learn = stock(dls)
    learn.fit_one_cycle(1, slice(1e-3,1e-5))
    assert learn.opt.hypers[0]['lr']>learn.opt.hypers[-1]['lr']

def test_calls_look_as_in_fastai():
    for name,args in (('fit_one_cycle',['self','n_epoch','lr_max','div']), ('fit_flat_cos',['self','n_epoch','lr','div_final']),
        ('fit',['self','n_epoch','lr','wd'])):
        assert list(inspect.signature(getattr(Learner, name)).parameters)[:4]==args
    with pytest.raises(TypeError): Learner.fit_one_cycle(object())

# ---- split keeps the state

def test_a_frozen_learner_stays_frozen_and_a_free_one_free(dls):
    learn = stock(dls)
    assert not any(learn.split().layer_groups.frozen)
    learn = stock(dls)
    learn.freeze()
    assert learn.split(5).layer_groups.frozen==[True]*4+[False]
    assert learn.split('block').layer_groups.frozen==[True]*(len(learn.layer_groups)-1)+[False]
    assert learn.split(2).layer_groups.frozen==[True,False]

def test_a_boundary_inside_a_new_group_thaws_that_group(dls):
    learn = ours(dls, n_groups=6)
    learn.freeze_to(3)
    assert learn.split(3).layer_groups.frozen[-2:]==[False,False]
    cold = frozen_names(learn)
    assert all(f==(n not in cold) for n,f in flags(learn).items())

def test_names_need_layer_groups(dls):
    learn = stock(dls)
    with pytest.raises(OptimizerStateError, match=r"`freeze_to\('head'\)` needs layer groups. Call `learn.split\(\)`"): learn.freeze_to('head')
    assert learn.opt is None or not learn.opt.frozen_idx
    learn.freeze_to(1)
    assert learn.opt.frozen_idx==1

@pytest.mark.parametrize('lr,hint', [('1e-3','without quotes'), ('auto','a strategy goes into `learn.fit_strategy`')])
def test_a_text_is_no_rate(dls, lr, hint):
    with pytest.raises(PresetError, match=f"Unknown learning rate '{lr}'.*{hint}"): stock(dls).split().fit_one_cycle(1, lr)

def test_a_learner_is_not_its_model(dls):
    learn = stock(dls)
    def checked(o): return check_splitter(Splitter(n_groups=2), o)
    def split(o): return Learner(dls, o, loss_func=learn.loss_func).split()
    for f in (layer_groups, model_map, Splitter(), checked, split):
        with pytest.raises(SplitterError, match='Expected a model .*got a Learner. Pass its model: `learn.model`'): f(learn)
    for f in (preset_for, find_family):
        with pytest.raises(FamilyError, match='got a Learner. Pass its model: `learn.model`'): f(learn)
    with pytest.raises(SplitterError, match=r"got a str. Build one first: `timm.create_model\('resnet18'\)`"): layer_groups('resnet18')
    with pytest.raises(SplitterError, match='got a NoneType. Pass a model'): layer_groups(None)
    with pytest.raises(StrategyError, match='`make_learner` is a function .*not a Learner'): compare_strategies(learn, ['lp_ft'], 1)

def test_parameters_frozen_by_hand_stay_frozen(dls):
    learn = stock(dls)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.split(4)
    assert learn.layer_groups.frozen==[True]*3+[False]
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not body(changed(learn, before))

def test_a_single_parameter_frozen_by_hand_stays_frozen(dls):
    learn = stock(dls)
    learn.model[0].model.layer3[0].conv1.weight.requires_grad_(False)
    learn.split(4, train_norm=False)
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert '0.model.layer3.0.conv1.weight' not in changed(learn, before)
    assert [n for n,f in flags(learn).items() if not f]==['0.model.layer3.0.conv1.weight']

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_moments_stay_with_their_parameters_over_a_second_split(dls, opt):
    learn = warm(dls, opt)
    key = 'grad_avg' if opt=='adam' else 'exp_avg'
    state = lambda: {n:s[key].clone() for n,p in learn.model.named_parameters() for s in [learn.opt.state[p] if opt=='adam' else learn.opt.opt.state[p]] if key in s}
    old = state()
    assert len(old)==len(list(learn.model.parameters()))
    learn.split('block')
    assert same(old, state()) and len(learn.opt.param_lists)==len(learn.layer_groups)
    learn.fit_one_cycle(1, 1e-3)

def test_splitting_twice_leaves_one_freeze_callback(dls):
    learn = stock(dls).split(3).split(4, train_norm=False).split(5)
    assert len(learn.cbs.filter(lambda o: isinstance(o, TrueFreeze)))==1
    assert learn.true_freeze.train_norm=='group' and len(learn.layer_groups)==len(learn.opt.hypers)==5

def test_split_does_not_use_random_numbers_or_change_weights(dls):
    for learn in (stock(dls), plain(dls, own_net())):
        before,rng,npr = weights(learn),torch.get_rng_state(),np.random.get_state()[1].copy()
        learn.split()
        assert same(before, weights(learn)) and torch.equal(rng, torch.get_rng_state()) and (npr==np.random.get_state()[1]).all()

def check_groups(learn, n=None):
    "Rules 1 and 4, and that the optimiser has the same groups"
    groups,names = learn.layer_groups,[n for n,_ in learn.model.named_parameters()]
    assert sorted(n for g in groups for n in g.param_names)==sorted(names)
    ps = dict(learn.model.named_parameters())
    assert lists(learn.opt)==[[id(ps[n]) for n in g.param_names] for g in groups]
    assert n is None or len(groups)==n
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-3)
    assert set(names)<=changed(learn, before)
    return groups

def test_split_on_unet(folder):
    files = sorted(folder.glob('*/*.png'))[:6]
    db = DataBlock((ImageBlock,MaskBlock(['a','b'])), get_y=lambda f: np.zeros((32,32), np.uint8), splitter=lambda o: (list(range(4)),[4,5]))
    learn = quiet(unet_learner(db.dataloaders(files, bs=2, num_workers=0), resnet18, pretrained=False))
    learn.freeze()
    groups = learn.split(4).layer_groups
    assert groups.rule=='registered' and groups.frozen==[True]*3+[False] and groups[-1].is_head
    assert all(n.startswith('layers.0.') for g in groups[:-1] for n in g.param_names)
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not {n for n in changed(learn, before) if n.startswith('layers.0.')}

@pytest.mark.parametrize('make,rule', [(lambda: timm.create_model('resnet10t', num_classes=3), 'registered'),
    (lambda: timm.create_model('test_byobnet', num_classes=3), 'timm'),
    (lambda: squeezenet1_1(num_classes=3), 'registered'), (own_net, 'traced'), (Tied, 'traced')], ids=['timm','timm-matcher','torchvision','own','tied'])
def test_split_on_a_plain_learner(dls, make, rule):
    learn = plain(dls, make()).split(3)
    assert learn.layer_groups.rule==rule
    check_groups(learn, 3)

def test_split_on_fastais_torchvision_learner(dls):
    learn = stock(dls, squeezenet1_1)
    learn.freeze()
    groups = learn.split(3).layer_groups
    assert groups.rule=='registered' and groups.frozen==[True,True,False]
    learn.unfreeze()
    check_groups(learn, 3)

def test_a_model_without_head(dls):
    model = timm.create_model('resnet10t', num_classes=0)
    learn = quiet(Learner(dls, model, loss_func=lambda p,y: p.square().mean())).split(3)
    assert not any(g.is_head for g in learn.layer_groups)
    assert len(set(learn.preset.lrs(learn.layer_groups)))==3
    check_groups(learn, 3)

def test_shared_parameters_belong_to_the_first_group_that_uses_them(dls):
    groups = plain(dls, Tied()).split('block').layer_groups
    where = {n:i for i,g in enumerate(groups) for n in g.param_names}
    assert where['stem.0.weight']<=where['a.weight']<where['b.weight'] and 'c.weight' not in where

def test_names_that_only_look_like_a_wrappers(dls): check_groups(plain(dls, Inner()).split('block'))

def test_a_learner_with_an_arch_of_its_own(dls):
    learn = plain(dls, own_net())
    learn.arch = 'my_net'
    check_groups(learn.split(3), 3)

def test_a_learner_without_validation_set(dls):
    ds = TensorDataset(torch.randn(6,3,32,32), torch.tensor([0,1,2]*2))
    learn = plain(DataLoaders(DataLoader(ds, bs=3)), own_net()).split()
    assert learn.layer_groups.rule=='traced'

# ---- bad input: a clear error, and the learner unchanged

@pytest.mark.parametrize('how,exc,words', [
    (dict(n_groups=0), SplitterError, ['n_groups=0','from 2 to 6','block']),
    (dict(n_groups=-1), SplitterError, ['n_groups=-1','from 2 to 6']),
    (dict(n_groups=1), SplitterError, ['n_groups=1','from 2 to 6']),
    (dict(n_groups=7), SplitterError, ['n_groups=7','from 2 to 6','resnet10t','5 layers']),
    (dict(n_groups='blok'), SplitterError, ["'blok'","mean 'block'"]),
    (dict(n_groups=2.5), SplitterError, ['2.5','from 2 to 6']),
    (dict(n_groups=True), SplitterError, ['True','from 2 to 6']),
    (dict(preset='resnet10'), FamilyError, ["'resnet10'","'resnet10t'"]),
    (dict(preset='resnet10t.c3_in1kk'), FamilyError, ['c3_in1kk',"'c3_in1k'"]),
    (dict(preset='clip'), FamilyError, ["'clip'"]),
    (dict(preset=3), FamilyError, ['int']),
    (dict(preset=Preset(1e-4, 1e-2, optimizer='sgd')), PresetError, ['sgd','adamw','fused_sgd']),
    (dict(train_norm='grup'), SplitterError, ["'grup'","mean 'group'"])])
@pytest.mark.parametrize('kind', ['stock','split','unset'])
def test_bad_splits_name_the_fix_and_change_nothing(dls, how, exc, words, kind):
    learn = stock(dls)
    if kind!='unset': learn.freeze()
    if kind=='split': learn.split(3)
    was = snapshot(learn)
    with pytest.raises(exc) as e: learn.split(**how)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

bad_lrs = [([1e-3]*3, ['3 learning rates for 4 groups','layer']), ([1e-3]*5, ['5 learning rates for 4']), (np.ones(2), ['2 learning rates for 4']), ([], ['0 learning rates']),
    (slice(1e-2,1e-4), ['reversed','slice(0.0001, 0.01)']), (slice(-1e-4,1e-2), ['-0.0001','at least 0']), (slice(1e-4,-1e-2), ['-0.01','at least 0']), (slice(float('nan'),1e-2), ['nan']),
    (slice(1e-4,float('nan')), ['nan']), (slice(float('inf'),1e-2), ['inf','finite']), (slice(1e-4,float('inf')), ['inf']), (slice(float('inf')), ['inf']), (slice(1e-4,None), ['0.0001','end']),
    (slice(None), ['slice(None']), (float('nan'), ['nan']), (float('inf'), ['inf']), (-1e-3, ['-0.001']), ([1e-3,1e-3,float('nan'),1e-3], ['nan']), ('preste', ["'preste'","mean 'preset'"]),
    (slice('preset'), ["'preset'"]), (slice('a','b'), ["'a'"]), ('1e-3', ["'1e-3'"])]

@pytest.mark.parametrize('lr,words', bad_lrs, ids=[str(o[0]) for o in bad_lrs])
@pytest.mark.parametrize('fit', ['fit_one_cycle','fit_flat_cos','fit','fit_sgdr'])
def test_rates_that_cannot_be_meant_are_refused(dls, fit, lr, words):
    learn = stock(dls).split(4)
    was = snapshot(learn)
    with pytest.raises(PresetError) as e: getattr(learn, fit)(1, *([1] if fit=='fit_sgdr' else []), lr)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

@pytest.mark.parametrize('lr', [0., 1e-3, slice(1e-3), slice(1e-4,1e-3), slice(1e-3,1e-3), slice(0,1e-3), [1e-3]*4, [1e-3], [1e-3,1e-4,1e-5,0.],
    np.array([1e-4]*4), np.array([1e-4]*4, np.float32), (1e-4,)*4, None])
def test_rates_that_fastai_takes_arrive_as_in_fastai(dls, lr):
    learn,ref = stock(dls).split(4),Learner(dls, nn.Linear(1,1), loss_func=CrossEntropyLossFlat(),
        splitter=lambda m: [[nn.Parameter(torch.zeros(1))] for _ in range(4)])
    ref.create_opt()
    ref.opt.set_hyper('lr', ref.lr if lr is None else lr)
    learn.fit(1, lr)
    assert [h['lr'] for h in learn.opt.hypers]==[h['lr'] for h in ref.opt.hypers]

@pytest.mark.parametrize('lr', [np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5)])
def test_single_numbers_of_all_kinds_are_one_rate_for_all(dls, lr):
    learn = stock(dls).split(4)
    learn.fit(1, lr)
    assert [h['lr'] for h in learn.opt.hypers]==[0.5]*4

@pytest.mark.parametrize('opt', ['sgd','fused_sgd'])
def test_adamw_rates_do_not_go_to_sgd(dls, opt):
    learn = stock(dls, opt_func=kinds[opt]['opt_func']).split(4)
    was = snapshot(learn)
    with pytest.raises(PresetError, match='adamw units.*sgd units.*fused_adamw'): learn.fit_one_cycle(1, Preset(1e-5, 1e-3))
    unchanged(learn, was)
    assert learn.preset is None or learn.preset.optimizer=='sgd'
    learn.layer_groups
    learn.fit_one_cycle(1, Preset(1e-4, 1e-3, optimizer='sgd'))

def test_no_preset_in_these_units_says_what_to_do_and_that_works(dls):
    learn = plain(dls, own_net(), opt_func=SGD).split()
    assert learn.preset is None
    was = snapshot(learn)
    with pytest.raises(PresetError, match=r'learn.split\(fused=True\)'): learn.fit_one_cycle(1, 'preset')
    unchanged(learn, was)
    learn.split(fused=True)
    assert learn.preset.optimizer=='adamw' and optimizer_units(learn.opt)=='adamw'
    learn.fit_one_cycle(1, 'preset')

def test_a_preset_needs_groups(dls):
    learn = stock(dls)
    was = snapshot(learn)
    for lr in ('preset', Preset(1e-5, 1e-3)):
        with pytest.raises(PresetError, match=r'learn.split\(\)'): learn.fit_one_cycle(1, lr)
    unchanged(learn, was)

def test_an_optimizer_of_unknown_units_gets_a_warning(dls):
    learn = stock(dls, opt_func=RMSProp).split()
    with pytest.warns(UserWarning, match='adamw units'): learn.fit_one_cycle(1, 'preset')

def refuses(learn, exc, *words, **kwargs):
    was = snapshot(learn)
    with pytest.raises(exc) as e: learn.split(**kwargs)
    for w in words: assert w in str(e.value)
    unchanged(learn, was)

def test_no_trainable_parameter(dls):
    refuses(plain(dls, own_net().requires_grad_(False)), SplitterError, 'no trainable parameter', 'requires_grad_(True)')

def test_parameters_outside_the_forward_pass(dls):
    refuses(plain(dls, Idle()), SplitterError, '2 trainable parameters of Idle', 'forgotten.weight', 'requires_grad_(False)')
    learn = plain(dls, Idle())
    learn.model.forgotten.requires_grad_(False)
    learn.split()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    assert not [n for n in changed(learn, before) if 'forgotten' in n]

def test_lazy_modules(dls):
    model = nn.Sequential(conv(3,8), nn.Flatten(), nn.LazyLinear(3))
    learn = quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat()))
    with pytest.raises(SplitterError, match='Run one batch'): learn.split()
    assert not isinstance(learn.splitter, Splitter) and learn.opt is None
    model(torch.zeros(2,3,32,32))
    check_groups(learn.split())

def test_a_built_optimizer_cannot_be_split(dls):
    model = own_net()
    refuses(plain(dls, model, opt_func=OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1))), SplitterError, 'opt_func')

def test_a_parameter_of_whole_numbers(dls):
    model = own_net()
    model[5].count = nn.Parameter(torch.tensor([1]), requires_grad=False)
    refuses(plain(dls, model), SplitterError, "'5.count'", 'register_buffer')

def test_an_optimizer_that_cannot_freeze_leaves_the_learner_alone(dls):
    class Fussy(FusedOptimizer):
        def freeze_to(self, n):
            super().freeze_to(n)
            raise RuntimeError('no freezing')
    learn = stock(dls)
    learn.freeze()
    learn.opt_func = Fussy
    refuses(learn, RuntimeError, 'no freezing', n_groups=4)

def test_an_optimizer_that_fails_leaves_the_learner_alone(dls):
    def fussy(ps, lr):
        if len(ps)>2: raise RuntimeError('only two groups')
        return Adam(ps, lr=lr)
    learn = stock(dls, opt_func=fussy)
    learn.freeze()
    refuses(learn, RuntimeError, 'only two', n_groups=4)

# ---- rule 4: names, not positions

def preds(learn, folder): return torch.stack([learn.predict(f)[2] for f in sorted(folder.glob('ant/*.png'))[:2]])

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_export_is_small_and_predicts_the_same(dls, ckpt, folder, tmp_path, opt):
    learn = quiet(discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'w.pth', opt_func=kinds[opt]['opt_func'], path=tmp_path))
    learn.fit_one_cycle(1, 'preset')
    want = preds(learn, folder)
    learn.export('x.pkl')
    n_bytes = sum(o.numel()*o.element_size() for o in learn.model.state_dict().values())
    assert (tmp_path/'x.pkl').stat().st_size < 1.1*n_bytes+3e5
    again = quiet(load_learner(tmp_path/'x.pkl'))
    assert torch.equal(preds(again, folder), want) and torch.equal(preds(learn, folder), want)
    assert again.layer_groups.names==learn.layer_groups.names and again.layer_groups.frozen==learn.layer_groups.frozen
    again.dls = dls
    before = weights(again)
    again.fit_one_cycle(1, 'preset')
    assert changed(again, before) and not body(changed(again, before))

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('how', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy','pickle'])
def test_copies_train_as_the_original_and_apart_from_it(dls, opt, how):
    learn = warm(dls, opt)
    learn.freeze_to(2)
    twin = how(learn)
    assert twin.layer_groups.frozen==learn.layer_groups.frozen and lists(twin.opt)!=lists(learn.opt)
    res,before = [],weights(learn)
    for l in (twin,learn):
        assert same(weights(l), before)
        torch.manual_seed(3)
        l.dls = dls
        dls.train.rng.seed(3)
        l.fit_one_cycle(1, slice(1e-4,1e-2))
        res.append(weights(l))
    assert same(*res) and not same(res[0], before)
    assert not under(changed(twin, before), twin.layer_groups[:2])

@pytest.mark.parametrize('n_groups', [2,4,'block'])
def test_saved_moments_go_into_other_groups_by_name(dls, tmp_path, n_groups):
    learn = warm(dls, 'fused_adamw', path=tmp_path)
    file = learn.save('x')
    new = stock(dls, opt_func=fused_adamw, path=tmp_path).split(n_groups)
    new.load('x', with_opt=True)
    assert same(weights(new), weights(learn)) and file.exists()
    old = {n:learn.opt.opt.state[p]['exp_avg'] for n,p in learn.model.named_parameters()}
    assert same(old, {n:new.opt.opt.state[p]['exp_avg'] for n,p in new.model.named_parameters()})
    new.fit_one_cycle(1, 1e-3)

@pytest.mark.parametrize('arch', ['resnet18','test_vit','resnet14t'])
def test_a_checkpoint_of_another_architecture_is_refused_whole(dls, tmp_path, arch):
    other = stock(dls, arch, path=tmp_path, **(dict(img_size=32) if 'vit' in arch else {}))
    other.create_opt()
    other.save('other')
    learn = warm(dls, 'fused_adamw', path=tmp_path)
    was = snapshot(learn)
    with pytest.raises(WeightsError, match='nothing was loaded'): learn.load('other')
    unchanged(learn, was)
    learn.save('own')
    with pytest.raises(FileNotFoundError, match="There is no file '.*onw.pth'. Did you mean 'own'"): learn.load('onw')
    unchanged(learn, was)
    before = weights(learn)
    learn.fit(1, 1e-2)
    assert same(weights(learn.load('own')), before)

class DDPLike(nn.Module):
    "Names its model `module`, as `DistributedDataParallel` does"
    def __init__(self, m):
        super().__init__()
        self.module = m
    def forward(self, *a): return self.module(*a)

def compiled(m): return torch.compile(m, backend='eager')
wraps = dict(compile=compiled, ddp=DDPLike, compile_ddp=lambda m: compiled(DDPLike(m)), ddp_compile=lambda m: DDPLike(compiled(m)))

@pytest.mark.parametrize('wrap', wraps)
def test_groups_are_found_by_name_in_wrapped_models(dls, wrap):
    learn = stock(dls).split(4)
    names,ids = learn.layer_groups.names,lists(learn.opt)
    learn.model = wraps[wrap](learn.model)
    learn.create_opt()
    assert lists(learn.opt)==ids and learn.layer_groups.names==names
    learn.freeze()
    before = weights(learn)
    learn.fit_one_cycle(1, 1e-2)
    moved = changed(learn, before)
    assert moved and not [n for n in moved if '0.model.' in n]

@pytest.mark.parametrize('wrap', wraps)
def test_wrapped_models_can_be_split(dls, wrap):
    want = stock(dls).split(4).layer_groups
    learn = stock(dls)
    learn.model = wraps[wrap](learn.model)
    got = learn.split(4).layer_groups
    assert [g.param_names for g in got]==[g.param_names for g in want] and got.rule==want.rule

# ---- presets reach the optimiser

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('call', [lambda l,p,c: l.fit_one_cycle(2, 'preset', pct_start=0.5, cbs=c), lambda l,p,c: l.fit_one_cycle(2, p, pct_start=0.5, cbs=c),
    lambda l,p,c: l.fit_one_cycle(n_epoch=2, lr_max=p, pct_start=0.5, cbs=c),
    lambda l,p,c: l.fit_one_cycle(2, lr_max='preset', pct_start=0.5, cbs=c), lambda l,p,c: l.fit_flat_cos(1, 'preset', cbs=c),
    lambda l,p,c: l.fit_flat_cos(1, lr=p, cbs=c), lambda l,p,c: l.fit(1, 'preset', cbs=c),
    lambda l,p,c: l.fit(1, p, cbs=c)], ids=['cycle','object','keyword','keyword-name','flat','flat-keyword','fit','fit-object'])
def test_the_rates_at_the_peak_are_the_presets(dls, opt, call):
    p = Preset(1e-5, 1e-3, head_mult=3)
    learn = stock(dls, **kinds[opt]).split(4, preset=p)
    cb = Hypers()
    call(learn, p, cb)
    assert np.allclose(cb.peak, p.scaled(8).lrs(learn.layer_groups), rtol=1e-6)
    assert np.allclose(learn.layer_groups.lrs, cb.peak, rtol=1e-6)
    assert (np.diff(cb.peak)>0).all()

def test_presets_by_name_and_none(dls):
    assert stock(dls).split(preset='resnet50.a1_in1k').preset.sources==preset_for('resnet50.a1_in1k').sources
    assert stock(dls).split().preset.family=='resnet'

def test_one_rate_for_one_learner_preset(dls):
    p = Preset(1e-5, 1e-3)
    a,b = stock(dls).split(4, preset=p),ours(dls, n_groups=4, preset=p)
    assert np.allclose(a.layer_groups.lrs, b.layer_groups.lrs)
    assert p.bs==64 and a.preset is p

@pytest.mark.parametrize('n_acc,accum', [(8,1), (16,2), (20,3), (4,1)])
@pytest.mark.parametrize('where', ['learner','call','list'])
def test_accumulated_batches_count(dls, n_acc, accum, where):
    p,acc = Preset(1e-5, 1e-3),GradientAccumulation(n_acc)
    learn = stock(dls, cbs=acc if where=='learner' else None).split(4, preset=p)
    kw = dict(call=dict(cbs=acc), list=dict(cbs=[acc])).get(where, {})
    learn.fit_one_cycle(1, 'preset', **kw)
    assert np.allclose(learn.peak_lrs, p.scaled(8, accum).lrs(learn.layer_groups))

@pytest.mark.parametrize('call,n_epoch', [(lambda l: l.fit_one_cycle(3, 'preset'),3), (lambda l: l.fit(n_epoch=2, lr='preset'),2), (lambda l: l.fit_flat_cos(1, 'preset'),1),
    (lambda l: l.fit_sgdr(2, 1, 'preset'),3)], ids=['cycle','fit','flat','sgdr'])
def test_steps_and_image_size_of_the_fit_count(dls, call, n_epoch):
    learn = stock(dls, opt_func=fused_adamw).split(4, preset='resnet18.a1_in1k')
    assert learn.preset.is_lawful()
    call(learn)
    want = preset_for('resnet18.a1_in1k', bs=8, n_steps=n_epoch*len(dls.train), size=dls.one_batch()[0].shape[-1])
    assert np.allclose(learn.peak_lrs, want.lrs(learn.layer_groups)) and not np.allclose(learn.peak_lrs, learn.preset.scaled(8).lrs(learn.layer_groups))

def test_what_is_known_of_a_fit(dls, monkeypatch):
    learn,n = stock(dls),len(dls.train)
    size = dls.one_batch()[0].shape[-1]
    assert fit_case(learn)==(8,1,1,None,size) and fit_case(learn, n_epoch=3).n_steps==3*n
    assert fit_case(learn, GradientAccumulation(16), 4)==(8,2,1,4*n//2,size)
    monkeypatch.setattr(learner_room, 'num_distrib', lambda: 2)
    assert fit_case(learn, n_epoch=3)[2:4]==(2,3*-(-n//2))
    rows = Learner(DataLoaders.from_dsets([(torch.randn(4), 0)]*8, [(torch.randn(4), 0)]*8, bs=4), nn.Linear(4,2), loss_func=CrossEntropyLossFlat())
    assert fit_case(rows).size is None

def test_rates_do_not_depend_on_the_number_of_groups(dls):
    p = Preset(1e-6, 1e-2, head_mult=2)
    fine = stock(dls).split('block', preset=p).layer_groups
    rate = {n:lr for g,lr in zip(fine, fine.lrs) for n in g.param_names}
    for n in (2,3,4,5,6):
        groups = stock(dls).split(n, preset=p).layer_groups
        for g,lr in zip(groups, groups.lrs):
            rs = [rate[o] for o in g.param_names]
            assert min(rs)*(1-1e-6)<=lr<=max(rs)*(1+1e-6)

# ---- the table

def test_table_of_a_stock_learner(dls):
    learn = stock(dls)
    t = learn.layer_groups
    assert len(t)==2 and 'lr' in repr(t) and not any(t.frozen) and t.lrs==[1e-3,1e-3]
    learn.freeze()
    assert learn.layer_groups.frozen==[True,False] and 'yes' in repr(learn.layer_groups)
    learn.fit_one_cycle(1, slice(1e-4,1e-2))
    assert len(learn.layer_groups.lrs)==2

def test_table_of_one_group(dls):
    t = plain(dls, own_net()).layer_groups
    assert len(t)==1 and t[0].n_params==sum(p.numel() for p in own_net().parameters())

def test_table_columns(dls):
    learn = stock(dls, wd=0.05).split(4)
    learn.freeze()
    t = learn.layer_groups
    text,html = repr(t).splitlines(),t._repr_html_()
    assert len(text)==1+1+4 and [o for o in ('group','layers','parameters','share','lr','wd','frozen') if o not in text[1]]==[]
    assert 'yes' in text[2] and 'yes' not in text[-1] and '0.05' in text[2]
    assert html.count('<tr>')==5 and html.count('<th>')==10 and html.count('yes')==3
    assert sum(g.n_params for g in t)==sum(p.numel() for p in learn.model.parameters())

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
def test_the_table_shows_the_last_peak_and_changes_nothing(dls, opt):
    learn = stock(dls, **kinds[opt]).split(4, preset=Preset(1e-5,1e-3))
    assert np.allclose(learn.layer_groups.lrs, learn.preset.scaled(8).lrs(learn.layer_groups))
    for lr,want in ((slice(1e-5,1e-2), [1e-5,1e-4,1e-3,1e-2]), (slice(1e-2), [1e-3]*3+[1e-2]), (2e-3, [2e-3]*4),
        ([4e-4,3e-4,2e-4,1e-4], [4e-4,3e-4,2e-4,1e-4])):
        for fit in (learn.fit_one_cycle, learn.fit_flat_cos, learn.fit):
            fit(1, lr)
            was = snapshot(learn)
            assert np.allclose(learn.layer_groups.lrs, want)
            repr(learn.layer_groups), learn.layer_groups._repr_html_()
            unchanged(learn, was)
    learn.fine_tune(1, 1e-2)
    assert np.allclose(learn.layer_groups.lrs, np.geomspace(5e-5,5e-3,4))
    learn.fit_one_cycle(1, wd=0.2)
    assert learn.layer_groups.wds==[0.2]*4

def test_table_names_are_those_of_the_model(dls):
    names = ours(dls, 'test_efficientnet').layer_groups.names
    assert 'conv_head' in names and names[-1]=='head' and names.count('head')==1
