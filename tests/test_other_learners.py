"Learners other than `vision_learner`: U-Nets, timm's feature extractors, Hugging Face models, text, and models written by hand"
import numpy as np,pandas as pd,pytest,timm,torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.data import TextDataLoaders
from fastai.text.learner import language_model_learner,text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config,awd_lstm_clas_split,awd_lstm_lm_config
from fastai.vision.learner import unet_learner
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import resnet18

from fastai_discriminative.all import *
from fastai_discriminative.checks import *

def _dls(n_in=3, size=32, y=None, n=8):
    x = torch.randn(n, n_in, size, size)
    ds = list(zip(x, torch.randint(0, 2, (n,)) if y is None else y))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0)
    dls.c = dls.n_inp = 1
    return dls

def _holds(learn, checks=('rules','numbers','rates','copies','training')):
    "The learner's groups are in order and named, all checks pass, a fit with the preset works, and frozen parameters do not change"
    x = learn.dls.one_batch()[:learn.dls.n_inp]
    check_splitter(learn.splitter, learn.model, x=tuple(x))
    todo = splitter_checks(learn.model, x=tuple(x), arch=getattr(learn, 'arch', None))
    for k in checks: todo[k]()
    gs = learn.layer_groups
    assert len(set(gs.names))==len(gs)>=3 and all(gs.names) and gs.depths==sorted(gs.depths) and gs[-1].is_head
    learn.freeze_to(-1)
    cold = {n:learn.model.get_parameter(n).detach().clone() for g in gs[:-1] for n in g.param_names}
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 'preset')
    assert all(torch.equal(learn.model.get_parameter(n), p) for n,p in cold.items())
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 'preset')
    assert any(not torch.equal(learn.model.get_parameter(n), p) for n,p in cold.items())
    return gs

# ## U-Net

@pytest.mark.parametrize('arch,family', [(resnet18,'tv_resnet'), (xresnet18,'xresnet')])
def test_unet(arch, family):
    dls = _dls(size=64, y=torch.randint(0, 2, (8,64,64)))
    learn = unet_learner(dls, arch, pretrained=False, normalize=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1)).split()
    gs = _holds(learn)
    assert (gs.family, gs.rule)==(family,'registered') and gs[-1].name=='decoder' and learn.preset.family==family
    assert set(gs[-1].param_names)=={n for n,_ in learn.model.named_parameters() if not n.startswith('layers.0.')}
    stock = unet_learner(dls, arch, pretrained=False, normalize=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1))
    assert len(gs)>len(stock.splitter(learn.model))

# ## timm's features_only

class Pyramid(nn.Module):
    "A custom head on all stages of a timm backbone"
    def __init__(self, arch):
        super().__init__()
        self.body = timm.create_model(arch, features_only=True)
        self.channels_last = arch.startswith('swin')
        self.heads = nn.Linear(sum(self.body.feature_info.channels()), 2)
    def forward(self, x): return self.heads(torch.cat([o.mean((1,2) if self.channels_last else (2,3)) for o in self.body(x)], 1))

@pytest.mark.parametrize('arch,size', [('resnet10t',64), ('test_convnext',64), ('mobilenetv3_small_050',64), ('test_vit',160), ('swin_tiny_patch4_window7_224',224), ('hrnet_w18_small',64),
    ('regnetx_002',64), ('vgg11',64), ('cspresnet50',64)])
def test_features_only(arch, size):
    learn = Learner(_dls(size=size), Pyramid(arch), loss_func=CrossEntropyLossFlat()).split()
    gs = _holds(learn, ('rules','numbers','rates'))
    assert gs[-1].param_names==('heads.weight','heads.bias') and all(n.startswith('body.') for g in gs[:-1] for n in g.param_names)
    assert learn.preset.family==find_family(arch).name, "the preset knows the backbone that the class hides"

class Laterals(nn.Module):
    "New layers beside the backbone's, between its stages in the order of use"
    def __init__(self, arch, start):
        super().__init__()
        self.net,self.start = timm.create_model(arch, features_only=True),start
        self.lat = nn.ModuleList(nn.Conv2d(o, 16, 1) for o in self.net.feature_info.channels()[start:])
        self.out = nn.Linear(16, 2)
    def forward(self, x): return self.out(sum(l(o).mean((2,3)) for l,o in zip(self.lat, self.net(x)[self.start:])))

@pytest.mark.parametrize('arch', ['resnet10t','tf_efficientnet_lite0','mobilenetv3_small_050','vgg11','cspresnet50'])
@pytest.mark.parametrize('start', [0,-1])
def test_all_layers_around_features_only_are_new(arch, start):
    learn = Learner(_dls(size=64), Laterals(arch, start), loss_func=CrossEntropyLossFlat()).split()
    gs = learn.layer_groups
    assert {n.split('.')[0] for n in gs[-1].param_names}=={'lat','out'} and gs[-1].is_head, gs
    assert {n.split('.')[0] for g in gs[:-1] for n in g.param_names}=={'net'} and gs.arch.startswith(arch)

def test_features_only_alone_have_no_head():
    m = timm.create_model('tf_efficientnet_lite0', features_only=True)
    gs = layer_groups(m)
    assert not any(g.is_new for g in gs) and preset_for(m).lrs(gs).max()==pytest.approx(preset_for(m).lr_high)

# ## Hugging Face

class Wrapped(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.hf = m
    def forward(self, x): return self.hf(pixel_values=x).logits

def _hf(name):
    tf = pytest.importorskip('transformers', reason='transformers is an extra of development, and not installed with the oldest versions')
    kw = dict(num_labels=2, image_size=32)
    cfg = dict(ViT=lambda: tf.ViTConfig(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=64, patch_size=8, **kw),
        Dinov2=lambda: tf.Dinov2Config(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, patch_size=8, **kw),
        Swin=lambda: tf.SwinConfig(embed_dim=16, depths=[1,1,6,1], num_heads=[1,2,2,2], window_size=2, patch_size=2, **kw),
        ConvNext=lambda: tf.ConvNextConfig(hidden_sizes=[8,16,24,32], depths=[3,3,9,3], num_labels=2),
        ResNet=lambda: tf.ResNetConfig(embedding_size=8, hidden_sizes=[8,16,24,32], depths=[3,4,6,3], layer_type='bottleneck', num_labels=2))[name]()
    return getattr(tf, f'{name}ForImageClassification')(cfg)

@pytest.mark.parametrize('name', ['ViT','Dinov2','Swin','ConvNext','ResNet'])
def test_hugging_face(name):
    model = Wrapped(_hf(name))
    learn = Learner(_dls(), model, loss_func=CrossEntropyLossFlat()).split()
    gs = _holds(learn, ('rules','numbers','rates','training'))
    assert gs.rule=='traced' and set(gs[-1].param_names)=={n for n,_ in model.named_parameters() if n.startswith('hf.classifier.')}

@pytest.mark.parametrize('name', ['ViT','Dinov2'])
def test_hugging_face_blocks_are_layers(name):
    "Twelve undivided blocks; no batch is needed, since the model's config gives the image size"
    m = Wrapped(_hf(name))
    gs = layer_groups(m, 'block')
    blocks = [{n.split('layers.' if '.layers.' in n else 'layer.')[1].split('.')[0] for n in g.param_names if '.layer' in n and '.layernorm' not in n} for g in gs]
    assert [o for o in blocks if o]==[{str(i)} for i in range(12)]
    check_splitter(Splitter(groups=gs), m)

def test_mask_token_is_no_obstacle():
    "Only pretraining uses it, so it stays with the embeddings that contain it"
    m = Wrapped(_hf('Dinov2'))
    assert 'hf.dinov2.embeddings.mask_token' in layer_groups(m)[0].param_names

# ## Text

texts = pd.DataFrame(dict(text=['a good film, really very nice indeed','a bad film, not good at all']*40, label=[0,1]*40))
small = dict(n_hid=32, emb_sz=16)

def test_awd_lstm_classifier():
    "ULMFiT: five groups, each 2.6 times as fast as the one before"
    dls = TextDataLoaders.from_df(texts, text_col='text', label_col='label', valid_pct=.2, bs=8, seq_len=20, num_workers=0)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config={**awd_lstm_clas_config, **small}).split()
    gs = _holds(learn, ('rules','numbers','rates')) # fastai's WeightDropout holds tensors that `deepcopy` refuses
    assert gs.names==['encoder','rnns.0','rnns.1','rnns.2','head'] and (gs.rule, gs.family)==('registered','awd_lstm')
    assert learn.preset.regime=='lm' and learn.preset.sources==[228]
    lrs = learn.preset.lrs(gs)
    np.testing.assert_allclose(lrs[1:]/lrs[:-1], 2.6, rtol=1e-12)
    assert lrs[-1]==pytest.approx(1e-2) and learn.preset.bs==64, "the paper's rate at its batch of 64"
    fastais = awd_lstm_clas_split(learn.model)
    assert [{id(p) for p in g} for g in gs(learn.model)]==[{id(p) for p in g} for g in fastais], "the same groups as fastai's own splitter"

def test_awd_lstm_language_model():
    "The decoder shares the encoder's weights, which belong to the encoder that uses them first"
    dls = TextDataLoaders.from_df(texts, text_col='text', is_lm=True, valid_pct=.2, bs=4, seq_len=8)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, config={**awd_lstm_lm_config, **small}).split()
    gs = learn.layer_groups
    assert gs.names==['encoder','rnns.0','rnns.1','rnns.2','head'] and gs[-1].param_names==('1.decoder.bias',)
    check_splitter(learn.splitter, learn.model, x=dls.one_batch()[0])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 'preset')

# ## By hand

class Handmade(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
        self.out,self.c3,self.c2,self.c1 = nn.Linear(32,2),conv(16,32),conv(8,16),conv(3,8) # defined in the reverse order
        self.scale = nn.Parameter(torch.ones(8,1,1))
    def forward(self, x): return self.out(self.c3(self.c2(self.c1(x)*self.scale)).mean((2,3)))

def test_hand_written_cnn():
    learn = Learner(_dls(), Handmade(), loss_func=CrossEntropyLossFlat()).split()
    gs = _holds(learn)
    assert gs.rule=='traced' and [g.param_names[0] for g in gs]==['c1.0.weight','c2.0.weight','c3.0.weight','out.weight']
    assert 'scale' in gs[0].param_names
