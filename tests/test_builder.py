"`discriminative_learner`: arguments arrive, typos are named, and a refused learner leaves the data alone"
import inspect

import pytest,timm,torch
from torch import nn
from torch.utils.data import TensorDataset
from fastai.vision.all import accuracy,Adam,CrossEntropyLossFlat,DataLoaders,error_rate,resnet18,vision_learner
from fastai.data.all import DataLoader

from fastai_discriminative.all import *
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
