"Built-in families: the order of each holds on its smallest members, whole and cut, and its rates are those of timm and of the publications"
import re

import numpy as np,pytest,timm,torch,torchvision
from fastai.vision.learner import create_body,create_head,create_timm_model,model_meta
from fastai.vision.models import xresnet
from torch import nn

from fastai_discriminative.core import read_data
from fastai_discriminative.groups import *
from fastai_discriminative.rules import *
from fastai_discriminative.backbone import named_params as _named_params
from fastai_discriminative.presets import *
from fastai_discriminative.presets import _table
from fastai_discriminative.registry import *
from fastai_discriminative.trace import trace_order

try: from timm.optim import param_groups_layer_decay
except ImportError: from timm.optim.optim_factory import param_groups_layer_decay

# Small members of each family, one for each way in which its models are built; names that the installed timm does not know are left out
members = {o[0]:o[1:] for o in map(str.split, '''
    vit          test_vit test_vit2 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 vit_relpos_small_patch16_224 vit_tiny_r_s16_p8_224 flexivit_small
    cait         cait_xxs24_224
    coat         coat_lite_tiny coat_tiny
    convit       convit_tiny
    volo         volo_d1_224
    xcit         xcit_nano_12_p8_224
    beit         beit_base_patch16_224
    eva          eva02_tiny_patch14_224 vit_small_patch16_dinov3
    metaformer   poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
    coatnet      test_coatnet coatnet_pico_rw_224
    maxvit       test_maxvit maxvit_rmlp_pico_rw_256
    convnext     test_convnext test_convnext2 convnext_atto
    convnextv2   convnextv2_atto
    densenet     densenet121
    resnet       test_resnet resnet10t resnet18d seresnet18 skresnet18 resnest14d legacy_seresnet18 res2net50_14w_8s
    regnet       regnetx_002 regnety_002 regnetz_005 regnetv_040
    efficientnet test_efficientnet tf_efficientnet_lite0 efficientnet_b0 tf_efficientnetv2_b0 mnasnet_small mobilenetv2_035 mixnet_s tinynet_e
    mobilenetv3  mobilenetv3_small_050 lcnet_035 hardcorenas_a
    mobilenetv4  mobilenetv4_conv_small mobilenetv4_hybrid_medium
    hrnet        hrnet_w18_small
    mlp_mixer    mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224
    pit          pit_ti_224 pit_ti_distilled_224
    swin         swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_cr_tiny_224
    swinv2       swinv2_tiny_window8_256
    vgg          vgg11 vgg11_bn'''.strip().splitlines())}
def _timm_families(): return {f.name for f in list_families() if f.modules and all(m.startswith('timm.') for m in f.modules)}

def _smallest_of(family, n=2):
    "The smallest members of a family that the list above does not know, because it is new"
    size = {r['arch']:int(r['params']) for r in read_data('zoo.csv')}
    return sorted((o for o in timm.list_models() if find_family(o).name==family), key=lambda o: size.get(o, float('inf')))[:n]

members.update({f:_smallest_of(f) for f in sorted(_timm_families()-set(members))})
cases = [(f,a) for f,o in members.items() for a in o if timm.is_model(a)]

def _meta(arch, **kwargs):
    "A model without weights, or a real one where the oldest timm cannot make it without"
    try:
        with torch.device('meta'): return timm.create_model(arch, **kwargs)
    except NotImplementedError: return timm.create_model(arch, **kwargs)

def test_every_family_has_members(): assert _timm_families()==set(members)=={f for f,_ in cases}

def test_families_asked_for():
    "The families of the issue, under our names"
    asked = '''resnet50 resnext50_32x4d seresnet50 regnety_032 efficientnet_b0 mobilenetv2_100 mobilenetv3_large_100 mobilenetv4_conv_small convnext_tiny convnextv2_tiny vit_base_patch16_224
        deit_base_patch16_224 beit_base_patch16_224 eva02_base_patch14_224 vit_small_patch14_dinov2 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 maxvit_tiny_tf_224 coatnet_0_rw_224
        caformer_s18 pit_s_224 vgg16 hrnet_w18 densenet121 mixer_b16_224'''.split()
    assert [o for o in asked if not find_family(o).registered]==[]

# ## Whole models and bodies

def _strict(groups, family, model):
    assert (groups.rule, groups.family)==('registered', family), "its function left something out, and another rule had to step in"
    assert sorted(n for g in groups for n in g.param_names)==sorted(_named_params(model))

@pytest.mark.parametrize('family,arch', cases)
def test_whole(family, arch):
    m = _meta(arch)
    assert find_family(arch).name==family
    for n in (None,'block'):
        s = Splitter(arch, n)
        check_splitter(s, m)
        _strict(s.groups, family, m)
        assert s.groups[-1].is_head==bool(m.num_classes) and len(s.groups)>=3

def _checked(model, family, arch=None, **kwargs):
    "One group per block, checked with a trace, and the default groups, which are runs of blocks and need no trace"
    s = Splitter(arch, 'block')
    check_splitter(s, model, **kwargs)
    blocks,groups = s.groups,layer_groups(model, arch=arch)
    for gs in (blocks, groups): _strict(gs, family, model)
    assert [n for g in groups for n in g.param_names]==[n for g in blocks for n in g.param_names]
    assert {g.param_names[0] for g in groups}<={g.param_names[0] for g in blocks} and groups[-1].param_names==blocks[-1].param_names
    return blocks,groups

class _Body(nn.Module):
    "What fastai's `TimmBody` is: the backbone, without its pooling and classifier"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model.forward_features(x)

class _Head(nn.Module):
    "Takes any features, maps or tokens"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)
    def forward(self, x): return self.fc((x[0] if isinstance(x, (tuple,list)) else x).flatten(1)[:,:8])

@pytest.mark.parametrize('family,arch', cases)
def test_body_and_head(family, arch):
    body = _Body(_meta(arch, num_classes=0))
    m = nn.Sequential(body, _Head().to(next(body.parameters()).device))
    for gs in _checked(m, family):
        assert gs[-1].param_names==('1.fc.weight','1.fc.bias')
        assert all(o.startswith('0.model.') for g in gs[:-1] for o in g.param_names)

@pytest.mark.parametrize('arch', ['convnext_atto','resnet10t','test_vit','mobilenetv3_small_050'])
def test_stock_vision_learner_model(arch):
    m = create_timm_model(arch, 2, pretrained=False)[0]
    check_splitter(Splitter(arch, 'block'), m)
    _strict(layer_groups(m, arch=arch), find_family(arch).name, m)

more = [torchvision.models.resnext50_32x4d, torchvision.models.wide_resnet50_2, torchvision.models.vgg11, xresnet.xresnet18_deep, xresnet.xse_resnext18]
# the largest ones differ from the others in depth only
tv = [f for f in dict.fromkeys([*model_meta, *more]) if f.__name__ not in ('xresnet34','xresnet101','xresnet152','resnet101','resnet152','densenet161','densenet169','densenet201','vgg13_bn','vgg19_bn')]

@pytest.mark.parametrize('f', tv, ids=lambda f: f.__name__)
def test_functions_of_fastai(f):
    with torch.device('meta'):
        m = f()
        cut = nn.Sequential(create_body(f(), pretrained=False, cut=model_meta.get(f, dict(cut=-4 if f.__name__.startswith('x') else -2))['cut']), nn.Identity())
        nf = trace_order(cut).output.shape[1]
        cut[1] = create_head(nf, 2)
    family,head = find_family(f).name,[n for n,_ in m.named_parameters()][-2:]
    for model,want in ((m,head), (cut,[n for n,_ in cut.named_parameters() if n.startswith('1.')])):
        for gs in _checked(model, family, f, input_size=(3,64,64)): assert sorted(gs[-1].param_names)==sorted(want)

def test_body_has_the_same_groups_whole_and_cut():
    f = torchvision.models.resnet50
    with torch.device('meta'): m,cut = f(),nn.Sequential(create_body(f(), pretrained=False), nn.Linear(2048,2))
    sizes = lambda gs: [g.n_params for g in gs[:-1]]
    for n in (None,4,'block'): assert sizes(layer_groups(m, n))==sizes(layer_groups(cut, n, arch=f))

# ## Oracle: timm's layer decay

def _timm_scales(m, decay):
    "Parameter name -> lr_scale by timm"
    names = {id(p):n for n,p in m.named_parameters()}
    return {names[id(p)]:g['lr_scale'] for g in param_groups_layer_decay(m, layer_decay=decay) for p in g['params']}

def _our_rates(groups, preset): return {n:lr for g,lr in zip(groups, preset.lrs(groups)) for n in g.param_names}

@pytest.mark.parametrize('arch,decay,n', [('vit_base_patch16_224',0.75,14), ('vit_base_patch16_224',0.65,14), ('vit_large_patch16_224',0.75,26), ('deit3_small_patch16_224',0.7,14)])
def test_vit_equals_timm_layer_decay(arch, decay, n):
    "The same partition, and each parameter's rate lr * lr_scale"
    m,lr = _meta(arch),1e-3
    scales,gs = _timm_scales(m, decay),layer_groups(m, 'block')
    parts = {}
    for k,s in scales.items(): parts.setdefault(s, set()).add(k)
    assert len(gs)==n and [set(g.param_names) for g in gs]==[parts[s] for s in sorted(parts)]
    ours = _our_rates(gs, Preset(lr*decay**(n-1), lr, head_mult=1))
    assert set(ours)==set(scales)
    for k,s in scales.items(): assert ours[k]==pytest.approx(lr*s, rel=1e-12)

# ## Oracle: BEiT

beit_rows = [r for r in _table().values() if r['family'] in ('BEiT','BEiTv2') and re.search(r'= ?(14|26)$', r['lr_groups'])]

def _beit_layer_id(name, n):
    "get_num_layer_for_vit of microsoft/unilm, beit/optim_factory.py"
    if name in ('cls_token','mask_token','pos_embed') or name.startswith('patch_embed'): return 0
    if name.startswith('rel_pos_bias'): return n-1
    return int(name.split('.')[1])+1 if name.startswith('blocks') else n-1

@pytest.mark.parametrize('size', ['base','large'])
def test_beit_tables(size):
    "14 or 26 values; only the final norm has no layer of its own with us: it rides with the last block"
    rows,m = [r for r in beit_rows if r['models'].split('_')[1]==size],_meta(f'beit_{size}_patch16_224')
    n,gs = dict(base=14, large=26)[size],layer_groups(m, 'block')
    assert len(rows)>=3 and len(gs)==n
    for r in rows:
        decay,rates = float(r['layer_decay']),_our_rates(gs, Preset(r['lr']*r['ratio'], r['lr']))
        np.testing.assert_allclose(Preset(r['lr']*r['ratio'], r['lr']).lrs(gs), r['lr']*decay**np.arange(n-1,-1,-1), rtol=1e-12)
        assert r['ratio']==pytest.approx(decay**(n-1), rel=1e-12)
        for k,lr in rates.items():
            want = r['lr']*decay**(n-1-_beit_layer_id(k, n))
            if k.startswith(('norm.','fc_norm.')): assert want*decay*(1-1e-12)<=lr<=want*(1+1e-12), k
            else: assert lr==pytest.approx(want, rel=1e-12), k

# ## Oracle: ConvNeXt

def _convnext_layer_id(name):
    "get_num_layer_for_convnext of facebookresearch/ConvNeXt, optim_factory.py, for timm's names: 12 groups of 3 blocks, the stem 0, the head 13"
    down = re.match(r'stages\.(\d)\.downsample', name)
    if name.startswith('stem'): return 0
    if down: return {1:2, 2:3, 3:12}[int(down[1])]
    block = re.match(r'stages\.(\d)\.blocks\.(\d+)\.', name)
    if not block: return 13
    s,j = int(block[1]),int(block[2])
    return (1, 2, 3+j//3, 12)[s]

@pytest.fixture(scope='module')
def convnext(): return _meta('convnext_base')

@pytest.mark.parametrize('ident', [1,2,3,4,5])
def test_convnext_table(convnext, ident):
    "The published groups with our preset's arithmetic give the published rates"
    r = _table()[ident]
    decay,ids = float(r['layer_decay']),{n:_convnext_layer_id(n) for n,_ in convnext.named_parameters()}
    assert set(ids.values())==set(range(14)) and r['ratio']==pytest.approx(decay**13, rel=1e-12)
    gs = LayerGroups([LayerGroup(f'id {i}', tuple(n for n,j in ids.items() if j==i), (f'id {i}',), i/13, (i/13,i/13), 1, i==13) for i in range(14)], 'registered')
    assert gs.mismatch(convnext)==''
    rates = _our_rates(gs, Preset(r['lr']*r['ratio'], r['lr']))
    for n,i in ids.items(): assert rates[n]==pytest.approx(r['lr']*decay**(13-i), rel=1e-12)

def test_convnext_blocks_stay_near_the_published_rates(convnext):
    "One group per block, while the table has one per three: no parameter differs from it by more than one published step (a factor `decay`)"
    decay,gs = 0.8,layer_groups(convnext, 'block')
    rates = _our_rates(gs, Preset(decay**13, 1))
    off = {n:np.log(lr)/np.log(decay)-(13-_convnext_layer_id(n)) for n,lr in rates.items()}
    assert len(gs)==38 and set(off)=={n for n,_ in convnext.named_parameters()}
    assert max(map(abs, off.values()))<=1
