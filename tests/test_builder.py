"`discriminative_learner`: arguments arrive, typos are named, and a refused learner leaves the data alone"
import inspect,warnings

import numpy as np,pytest,timm,torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.vision.all import accuracy,Adam,CrossEntropyLossFlat,DataLoaders,error_rate,resnet18,vision_learner
from fastai.data.all import DataLoader

from fastai_discriminative.all import *
from fastai_discriminative.core import DataError
from helpers import *

# ---- bad input: a clear error, and the learner unchanged

@pytest.mark.parametrize('arch,words', [('resnet10tt', ["'resnet10tt'","'resnet10t'"]), ('convnxt_tiny', ['convnext_tiny']),
    ('resnet10t.nope', ['nope','c3_in1k']), ('resnet', ["'resnet' is a family","'resnet18'"]), ('tv_resnet', ["'tv_resnet' is a family"]), (None, ['NoneType'])])
def test_unknown_architectures(dls, arch, words):
    with pytest.raises(FamilyError) as e: discriminative_learner(dls, arch, pretrained=False)
    for w in words: assert w in str(e.value)

@pytest.mark.parametrize('kwargs,exc', [(dict(n_groups=99), SplitterError), (dict(preset='nope'), FamilyError), (dict(train_norm='nope'), SplitterError),
    (dict(preset=Preset(1e-3,1e-2,optimizer='sgd')), PresetError)])
def test_a_refused_learner_leaves_the_data_alone(dls, tmp_path, kwargs, exc):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path/'w.pth')
    was = list(dls.after_batch.fs)
    with pytest.raises(exc): discriminative_learner(dls, 'resnet10t', weights_file=tmp_path/'w.pth', **kwargs)
    assert list(dls.after_batch.fs)==was

# ---- arguments

def test_arguments_are_vision_learners():
    mine,its = inspect.signature(discriminative_learner).parameters,inspect.signature(vision_learner).parameters
    assert set(its)-set(mine)=={'splitter','train_bn'}
    assert set(mine)-set(its)=={'n_groups','preset','weights_file','train_norm'}
    assert mine['opt_func'].default is fused_adamw
    for k in set(its)&set(mine)-{'opt_func'}: assert mine[k].default==its[k].default, k

@pytest.mark.parametrize('arch', ['resnet10t',resnet18], ids=['timm','function'])
def test_arguments_arrive(dls, tmp_path, arch):
    loss,cb = CrossEntropyLossFlat(label_smoothing=0.1),Hypers()
    learn = discriminative_learner(dls, arch, pretrained=False, lin_ftrs=[17], ps=0.25, n_out=5, metrics=[accuracy,error_rate], loss_func=loss,
        moms=(0.9,0.8,0.9), wd=0.2, path=tmp_path,
        model_dir='mine', cbs=cb, lr=5e-3, wd_bn_bias=True, bn_final=True, first_bn=False, y_range=(0,1), concat_pool=False, opt_func=Adam)
    head = list(learn.model[1].modules())
    assert [m.out_features for m in head if isinstance(m, nn.Linear)]==[17,5] and [m.p for m in head if isinstance(m, nn.Dropout)]==[0.125,0.25]
    assert type(head[-1]).__name__=='SigmoidRange' and [m.num_features for m in head if isinstance(m,
        nn.BatchNorm1d)]==[17,5] and 'AdaptiveAvgPool2d' in str(learn.model[1])
    assert learn.loss_func is loss and len(learn.metrics)==2 and learn.moms==(0.9,0.8,0.9)
    assert learn.wd==0.2 and learn.path==tmp_path and learn.model_dir=='mine' and learn.lr==5e-3
    assert cb in learn.cbs and learn.wd_bn_bias is True and learn.arch==arch and learn.n_out==5 and learn.opt.__class__.__name__=='Optimizer'
    assert learn.model.eval()(torch.randn(2,3,32,32)).shape==(2,5)

@pytest.mark.parametrize('arch,kw', [('resnet10t',{}), ('test_vit',dict(img_size=32))])
def test_custom_heads(dls, arch, kw):
    nf = 512 if arch=='resnet10t' else 64
    head = nn.Sequential(*([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if nf==512 else []), nn.Linear(nf,3))
    learn = ours(dls, arch, custom_head=head, **kw)
    assert learn.model[1] is head
    learn.fit_one_cycle(1, 'preset')

@pytest.mark.parametrize('pool', [True,False])
def test_pool_with_bodies_that_pool_themselves(dls, pool):
    assert ours(dls, 'test_vit', img_size=32, pool=pool).model.eval()(torch.randn(2,3,32,32)).shape==(2,3)

@pytest.mark.parametrize('arch', ['resnet10t','test_vit',resnet18], ids=['timm','vit','function'])
@pytest.mark.parametrize('typo', ['metrcs','n_group','weight_file','presets','train_bn','splitter'])
def test_typos_are_not_swallowed(dls, arch, typo):
    with pytest.raises(TypeError, match=typo): discriminative_learner(dls, arch, pretrained=False, **{typo:True})

def test_torchvision_weights_are_not_for_timm(dls):
    with pytest.raises(TypeError, match='weights_file'): discriminative_learner(dls, 'resnet10t', pretrained=False, weights='DEFAULT')
    with pytest.raises(TypeError, match='cut'): discriminative_learner(dls, 'resnet10t', pretrained=False, cut=-2)

def test_functions_work(dls):
    learn = quiet(discriminative_learner(dls, resnet18, pretrained=False, n_groups=4))
    assert learn.layer_groups.rule=='registered' and isinstance(learn.opt, FusedOptimizer) and learn.preset.family=='tv_resnet'
    learn.fit_one_cycle(1, 'preset')

def test_the_same_start_as_vision_learner(dls):
    torch.manual_seed(5)
    a = ours(dls)
    torch.manual_seed(5)
    assert same(weights(a), weights(stock(dls)))

def test_timm_arguments_go_through(dls):
    learn = ours(dls, drop_path_rate=0.3)
    assert 'drop_prob=0.3' in str(learn.model) or 'DropPath' in str(learn.model)

@pytest.mark.parametrize('arch,kw', [('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=1, depths=(1,1,1,1), embed_dim=12, num_heads=(1,1,1,1))),
    ('gmlp_s16_224', dict(img_size=32)),
    ('cait_xxs24_224', dict(img_size=32, depth=1)), ('hiera_tiny_224', dict(img_size=(32,32), stages=(1,1,1,1)))])
def test_architectures_that_vision_learner_cannot_use(dls, arch, kw):
    learn = ours(dls, arch, **kw)
    learn.fit_one_cycle(1, 'preset')
    assert learn.get_preds()[0].shape==(9,3)

def test_no_classes_in_the_data(dls):
    ds = TensorDataset(torch.randn(6,3,32,32), torch.zeros(6))
    dl = DataLoaders(DataLoader(ds, bs=3), DataLoader(ds, bs=3))
    with pytest.raises(SplitterError, match='n_out'): discriminative_learner(dl, 'resnet10t', pretrained=False, loss_func=nn.MSELoss())

# ---- bodies that were never trained

def test_a_random_body_gets_one_rate(dls):
    learn = ours(dls)
    lr = preset_for('resnet10t', regime='random', bs=8).head_lr
    assert learn.preset.regime=='random' and learn.preset.sources==[] and 'no pretrained weights: one rate for all layers' in learn.preset.note
    shown = learn.layer_groups.lrs
    assert np.allclose(shown, lr) and len(shown)==len(learn.layer_groups)
    cb = Hypers()
    learn.fit_one_cycle(1, 'preset', cbs=cb)
    assert np.allclose(learn.peak_lrs, shown) and np.allclose(cb.lrs, np.array(cb.lrs)[:,:1])
    learn.fit_strategy('auto', 1, cbs=(cb := Hypers()))
    assert np.allclose(learn.peak_lrs, shown) and np.allclose(cb.lrs, np.array(cb.lrs)[:,:1])

def test_whose_body_is_random(dls, ckpt, tmp_path):
    "If fastai's own learner says so, but not if weights were loaded or a preset was requested"
    assert stock(dls).split().preset.regime=='random'
    assert plain(dls, timm.create_model('resnet10t', num_classes=3)).split(fused=True).preset.regime=='supervised', 'nobody said so'
    assert ours(dls, preset='resnet10t').preset.sources==preset_for('resnet10t').sources
    assert discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'w.pth', pretrained=False).preset.regime=='supervised'
    learn = ours(dls)
    load_pretrained(learn.model[0].model, ckpt/'w.pth')
    assert learn.split().preset.regime=='supervised'

def test_a_file_for_an_architecture_without_weights(dls, tmp_path):
    arch,file = 'mobilenetv2_035',tmp_path/'w.pth'
    assert preset_for(arch).regime=='random'
    torch.save(timm.create_model(arch).state_dict(), file)
    assert discriminative_learner(dls, arch, weights_file=file).preset.regime=='supervised'

@pytest.mark.parametrize('strategy', ['lp_ft','freeze_unfreeze','gradual_unfreeze'])
def test_freezing_a_random_body_is_said(dls, strategy):
    learn = ours(dls, arch='test_resnet')
    with pytest.warns(UserWarning, match='Nothing in this model is pretrained'): learn.fit_strategy(strategy, 2)

@pytest.mark.parametrize('kw,strategy', [({},'auto'), ({},'uniform'), (dict(preset='test_resnet'),'lp_ft')])
def test_what_is_not_said(dls, kw, strategy):
    learn = ours(dls, arch='test_resnet', **kw)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Nothing in this model')
        learn.fit_strategy(strategy, 1)
    if strategy=='uniform': assert np.allclose(learn.peak_lrs, learn.preset.scaled(8).head_lr), 'new layers are not slowed down'

# ---- functions that fastai cannot cut, and images of another size

class NoPool(nn.Module):
    def __init__(self, pretrained=False):
        super().__init__()
        self.a,self.b,self.fc = nn.Conv2d(3,8,3),nn.Conv2d(8,8,3),nn.Linear(8,10)
    def forward(self, x): return self.fc(self.b(self.a(x)).mean((2,3)))

class EarlyPool(NoPool):
    def __init__(self, pretrained=False):
        nn.Module.__init__(self)
        self.a,self.p,self.b,self.c,self.fc = nn.Conv2d(3,8,3),nn.MaxPool2d(2),nn.Conv2d(8,8,3),nn.Conv2d(8,8,3),nn.Linear(8,10)

class NoArgument(NoPool):
    def __init__(self): super().__init__()

@pytest.mark.parametrize('arch,words', [(NoPool,'NoPool has none'), (EarlyPool,'has it so early that only 1 of 4 layers would be left'), (NoArgument,'NoArgument.pretrained=...'), (NoPool(),'NoPool.pretrained=...')])
def test_functions_that_cannot_be_cut(dls, arch, words):
    tfms = list(dls.after_batch.fs)
    with pytest.raises(SplitterError, match=words) as e: discriminative_learner(dls, arch, pretrained=False)
    assert 'Learner(dls, ' in str(e.value) and list(dls.after_batch.fs)==tfms

def test_cut_is_obeyed(dls):
    "fastai 2.8's `vision_learner` takes `cut` and forgets it"
    learn = ours(dls, NoPool, cut=-1)
    assert len(learn.model[0])==2 and learn.model.eval()(torch.zeros(2,3,32,32)).shape==(2,3)
    learn.fit_one_cycle(1, 'preset')
    assert len(ours(dls, resnet18, cut=-3).model[0])==len(ours(dls, resnet18).model[0])-1
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))
    assert ours(dls, EarlyPool, cut=-1, n_out=2, custom_head=head).model(torch.zeros(2,3,32,32)).shape==(2,2)

fixed = 'vit_tiny_patch16_224'
def small_vit(**kwargs): return timm.create_model(fixed, num_classes=3, embed_dim=24, depth=1, num_heads=2, **kwargs)

def test_a_size_the_model_was_not_built_for(dls):
    small = dict(embed_dim=24, depth=1, num_heads=2)
    with pytest.raises(DataError, match="224 x 224 pixels, but those of the data have 32 x 32.*Resize.224.*img_size=32.*dynamic_img_size=True"): ours(dls, fixed, **small)
    for kw in (dict(img_size=32), dict(dynamic_img_size=True)): ours(dls, fixed, **small, **kw).fit_one_cycle(1, 'preset')

@pytest.mark.parametrize('fit', [lambda l: l.fit_one_cycle(1, 1e-3), lambda l: l.fit(1), lambda l: l.fit_strategy('lp_ft', 1)])
def test_the_size_is_asked_before_any_fit(dls, fit):
    learn = plain(dls, small_vit()).split(fused=True)
    was = snapshot(learn)
    with pytest.raises(DataError, match='built for images of 224'): fit(learn)
    unchanged(learn, was)

# ---- fine_tune

def test_fine_tune_takes_a_preset(dls):
    learn,spy,p = ours(dls),Spy(),Preset(1e-5, 1e-3, head_mult=2)
    learn.fine_tune(2, p, freeze_epochs=1, cbs=spy)
    n = len(learn.layer_groups)
    assert spy.fits==2 and learn.opt.frozen_idx==0 and np.allclose(learn.peak_lrs, p.scaled(8).lrs(learn.layer_groups))
    learn = ours(dls, preset=p)
    learn.fine_tune(1, 'preset')
    assert np.allclose(learn.peak_lrs, p.scaled(8).lrs(learn.layer_groups)) and n==len(learn.peak_lrs)

@pytest.mark.parametrize('make,args,kw,words', [(ours,(1,'prest'),{},"Did you mean 'preset'"), (stock,(1,'preset'),{},'learn.split()'), (ours,(1,),dict(base_lr='preset', lr_mult=10),'lr_mult')])
def test_fine_tune_refuses_before_it_freezes(dls, make, args, kw, words):
    learn = make(dls)
    if learn.opt is None: learn.create_opt()
    was = snapshot(learn)
    with pytest.raises(PresetError, match=words): learn.fine_tune(*args, **kw)
    unchanged(learn, was)

@pytest.mark.parametrize('arch,fix', [('resnet10t', '`weights_file`.*`pretrained=False`'), (resnet18, 'load_pretrained')])
@pytest.mark.parametrize('e', [OSError('no network\nat all'), ConnectionError(''), RuntimeError('No pretrained weights exist for it')])
def test_a_download_that_fails_says_what_to_do(arch, fix, e, dls, monkeypatch):
    def _offline(*args, **kwargs): raise e
    monkeypatch.setattr(timm, 'create_model', _offline)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', _offline)
    was = list(dls.after_batch.fs)
    with pytest.raises(WeightsError, match=f"weights of '{arch if isinstance(arch, str) else 'resnet18'}' could not be fetched .*{fix}"): discriminative_learner(dls, arch)
    assert list(dls.after_batch.fs)==was

def test_other_errors_stay_what_they_are(dls, monkeypatch):
    def _fail(*args, **kwargs): raise RuntimeError('something else')
    monkeypatch.setattr(timm, 'create_model', _fail)
    with pytest.raises(RuntimeError, match='something else'): discriminative_learner(dls, 'resnet10t', pretrained=False)
