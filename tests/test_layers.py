"The map of a model: its information on each parameter, depth by path, and that it fits copies"
import pickle,types
from collections import Counter
from copy import deepcopy

import pandas as pd,pytest,timm,torch,torchvision
from torch import nn

from fastai.vision.learner import create_vision_model
from fastai_discriminative import layers
from fastai_discriminative.all import *
from fastai_discriminative.trace import blank_model
from small_models import newer

def conv(i, o, **kw): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kw), nn.BatchNorm2d(o), nn.ReLU())

def plain(i, o): return nn.Conv2d(i, o, 3, padding=1)

class Towers(nn.Module):
    "Two equal models side by side"
    def __init__(self, make):
        super().__init__()
        self.a,self.b = make(),make()
        self.head = nn.LazyLinear(2)
    def forward(self, x): return self.head(torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1))

class TwoStreams(nn.Module):
    "Two inputs, streams of different lengths, then a trunk that both feed"
    def __init__(self):
        super().__init__()
        self.rgb,self.depth = nn.Sequential(*[plain(i, 8) for i in (3,8,8,8)]),nn.Sequential(*[plain(i, 8) for i in (1,8)])
        self.trunk,self.fc = nn.Sequential(plain(16,8), plain(8,8)),nn.Linear(8,2)
    def forward(self, x, y): return self.fc(self.trunk(torch.cat([self.rgb(x), self.depth(y)], 1)).mean((2,3)))

class Aux(nn.Module):
    "A chain with a second output in the middle"
    def __init__(self):
        super().__init__()
        self.early,self.late = nn.Sequential(*[plain(i, 8) for i in (3,8,8)]),nn.Sequential(*[plain(8, 8) for _ in range(3)])
        self.aux,self.fc = nn.Sequential(nn.Linear(8,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,2)),nn.Linear(8,2)
    def forward(self, x):
        x = self.early(x)
        aux = self.aux(x.mean((2,3)))
        return aux,self.fc(self.late(x).mean((2,3)))

class UNet(nn.Module):
    "Skips from each level of the encoder to the decoder"
    def __init__(self):
        super().__init__()
        self.e1,self.e2,self.e3,self.d2,self.d1 = conv(3,8),conv(8,16),conv(16,32),conv(48,16),conv(24,8)
        self.out,self.down,self.up = nn.Conv2d(8,2,1),nn.MaxPool2d(2),nn.Upsample(scale_factor=2)
    def forward(self, x):
        a = self.e1(x)
        b = self.e2(self.down(a))
        c = self.e3(self.down(b))
        d = self.d2(torch.cat([self.up(c), b], 1))
        return self.out(self.d1(torch.cat([self.up(d), a], 1)))

class Shortcut(nn.Module):
    "Blocks with a convolution on the shortcut, flat in one module"
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3,8,3,padding=1)
        for i in range(3):
            for n in 'abs': setattr(self, f'{n}{i}', nn.Conv2d(8,8,3,padding=1))
        self.fc = nn.Linear(8,2)
    def forward(self, x):
        x = self.stem(x)
        for i in range(3): x = getattr(self, f'b{i}')(getattr(self, f'a{i}')(x).relu()) + getattr(self, f's{i}')(x)
        return self.fc(x.mean((2,3)))

def built(make, *size):
    "A model whose lazy layers have seen a batch"
    m = make()
    m.eval()(*[torch.zeros(2, *s) for s in size])
    return m.train()

def depths(m, **kw):
    "Name of a layer -> its depth"
    return {l.name:l.depth for l in model_map(m, **kw).layers}

def test_equal_towers_have_equal_depths_and_rates():
    m = built(lambda: Towers(lambda: timm.create_model('test_resnet', num_classes=0)), (3,64,64))
    ds = depths(m)
    for n,d in ds.items():
        if n.startswith('a.'): assert d==ds[n.replace('a.', 'b.', 1)]
    for k in ('block', None, 3, 5, 8):
        gs = layer_groups(m, k)
        assert all(len({n.partition('.')[0] for n in g.param_names})==1 for g in gs), 'no group holds parts of both'
        check_splitter(Splitter(n_groups=k), m, input_size=(3,64,64))
    gs = layer_groups(m, 'block')
    lr = {n:r for g,r in zip(gs, Preset(1e-6, 1e-3, 10).lrs(gs)) for n in g.param_names}
    assert all(r==lr[n.replace('a.', 'b.', 1)] for n,r in lr.items() if n.startswith('a.'))
    assert lr['a.conv1.0.weight']<1.1e-6

def test_too_few_groups_for_two_towers():
    m = built(lambda: Towers(lambda: nn.Sequential(conv(3,4), conv(4,4))), (3,8,8))
    with pytest.raises(SplitterError, match='2 parallel branches.*a number from 3 to'): layer_groups(m, 2, x=torch.zeros(2,3,8,8))
    assert layer_groups(m, 3, x=torch.zeros(2,3,8,8)).names[-1]=='head'

def test_streams_of_different_lengths():
    x = torch.zeros(2,3,8,8),torch.zeros(2,1,8,8)
    ds = depths(TwoStreams(), x=x)
    assert [ds[f'rgb.{i}'] for i in range(4)]==[i/6 for i in range(4)]
    assert [ds[f'depth.{i}'] for i in range(2)]==[0., 1/4], 'a share of the longest path through it'
    assert (ds['trunk.0'],ds['trunk.1'])==(4/6,5/6)
    m = TwoStreams()
    for k in ('block',None,4,6): check_splitter(Splitter(groups=layer_groups(m, k, x=x)), m, x=x)

def test_second_output_on_the_way():
    ds = depths(Aux(), input_size=(3,8,8))
    assert [ds[f'late.{i}'] for i in range(3)]==[i/6 for i in (3,4,5)]
    assert ds['aux.0']==3/6 and ds['aux.4']==5/6, 'as deep as the layers beside it'
    check_splitter(Splitter(n_groups='block'), Aux(), input_size=(3,8,8))

def test_skips_do_not_shorten_the_path():
    ds = depths(UNet(), input_size=(3,16,16))
    assert list(ds)==['e1','e2','e3','d2','d1'] or [n.split('.')[0] for n in ds]==['e1','e2','e3','d2','d1']
    assert list(ds.values())==[i/5 for i in range(5)]

def test_a_shortcut_of_one_layer_is_part_of_its_block():
    m = model_map(Shortcut(), input_size=(3,8,8))
    assert len({l.run for l in m.layers})==1 and len(m.layers)==7
    at = {n:l for l in m.layers for n in l.param_names}
    assert all(at[f's{i}.weight'] is at[f'a{i}.weight'] for i in range(3))
    check_splitter(Splitter(n_groups='block'), Shortcut(), input_size=(3,8,8))

def test_a_whole_model_inside_is_no_layer():
    m = built(lambda: Towers(lambda: timm.create_model('test_vit', num_classes=0)), (3,160,160))
    assert sum(n.startswith('a.') for n in depths(m))>5

@pytest.mark.parametrize('arch', ['test_resnet','test_vit','densenet121','hrnet_w18_small','convnext_atto',newer('mambaout_femto'),'nf_resnet26'])
def test_a_chain_counts_its_layers(arch):
    m = model_map(blank_model(arch))
    assert [l.depth for l in m.layers]==[i/len(m.layers) for i in range(len(m.layers))]

def test_data_that_leave_torch_are_taken_for_a_chain():
    class Away(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.fc = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,2)
        def forward(self, x): return self.fc(self.c(torch.from_numpy(self.b(self.a(x)).detach().numpy()*2)))
    m = model_map(Away(), x=torch.zeros(2,4))
    assert [l.depth for l in m.layers]==[0., 1/3, 2/3] and m.trace.device=='cpu'

def test_writing_through_a_view_feeds_what_reads_the_whole():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.fc = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(8,4),nn.Linear(4,2)
        def forward(self, x):
            out = x.new_zeros(len(x), 8)
            out[:,:4] = self.a(x)
            out[:,4:].copy_(self.b(self.a(x)))
            return self.fc(self.c(out))
    m = model_map(Views(), x=torch.zeros(2,4))
    assert [l.before for l in m.layers]==[0,1,2]

def test_the_table_has_every_parameter():
    m = timm.create_model('test_vit', num_classes=5)
    df = model_map(m).df.set_index('parameter')
    assert list(df.index)==[n for n,_ in m.named_parameters()] and not df.duplicated().all()
    assert df.loc['head.weight','new'] and not df.loc['blocks.0.attn.qkv.weight','new']
    assert df.loc['blocks.0.norm1.weight','norm'] and not df.loc['blocks.0.attn.qkv.weight','norm']
    assert df.loc['pos_embed','undecayed'] and df.loc['head.bias','undecayed'] and not df.loc['head.weight','undecayed']
    assert df.loc['blocks.0.attn.qkv.weight','module']=='blocks.0.attn.qkv' and df.loc['blocks.0.attn.qkv.weight','shape']==tuple(m.blocks[0].attn.qkv.weight.shape)
    assert df.depth.between(0, 1).all() and df.loc['head.weight','depth']==1

def test_shared_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.fc = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,2)
            self.b.weight = self.a.weight
            self.again = self.fc
            self.idle = nn.Parameter(torch.zeros(3), requires_grad=False)
        def forward(self, x): return self.fc(self.b(self.a(x)))
    df = model_map(Tied(), x=torch.zeros(2,4)).df.set_index('parameter')
    assert df.loc['a.weight','shared']==('b.weight',) and df.loc['fc.bias','shared']==('again.bias',) and df.loc['a.bias','shared']==()
    assert df.loc['idle','unused'] and not df.loc['a.weight','unused']
    assert df.loc['a.weight','place']==0 and pd.isna(df.loc['idle','place'])

class Order(nn.Module):
    "Linear layers of these names that run in this order"
    def __init__(self, order):
        super().__init__()
        for n in dict.fromkeys(order): setattr(self, n, nn.Linear(4,4))
        self.order = order
    def forward(self, x):
        for n in self.order: x = getattr(self, n)(x)
        return x

@pytest.mark.parametrize('order', ['amnacdnf','amacdmf','abcabdbecf'])
def test_layers_that_run_again_stay_in_a_chain(order):
    "`a` runs on what `m`, `n` gave, which it hid: `c`, `d` were a branch beside those, and `n` stood in a group behind `c`"
    m,x,names = Order(order),torch.zeros(2,4),[*dict.fromkeys(order)]
    for k in ('block', *range(2, len(names)+1)): check_splitter(Splitter(groups=layer_groups(m, k, x=x)), m, x=x)
    mm = model_map(m, x=x)
    assert [l.name for l in mm.layers]==names[:-1] and {l.run for l in mm.layers}=={0}
    assert [l.depth for l in mm.layers]==[i/len(mm.layers) for i in range(len(mm.layers))]

@pytest.mark.parametrize('new', [(), ['a.bias']], ids=['old','new'])
def test_a_tied_weight_that_runs_again_behind_other_layers(new):
    "`a` has the weight of `b`; without its bias, that is new, it is `b` running again"
    m,x = Order('bmacdmf'),torch.zeros(2,4)
    m.a.weight = m.b.weight
    gs = layer_groups(m, 'block', x=x, new=new)
    assert [gs.where[f'{n}.weight'] for n in 'bmcd']==[0,1,2,3]
    for k in range(2+len(new), len(gs)+1): check_splitter(Splitter(groups=layer_groups(m, k, x=x, new=new)), m, x=x)

def test_a_module_that_never_runs_has_a_tied_weight():
    "`idle` shares the weight of `h`, which runs between second runs of others; found in a random model"
    m,x = Order('gbfhd'),torch.zeros(2,4)
    m.order,m.idle = 'bdfbhdgf',nn.Linear(4,4)
    m.idle.weight = m.h.weight
    m.idle.bias.requires_grad_(False)
    gs = layer_groups(m, 'block', x=x)
    assert [gs.where[f'{n}.weight'] for n in 'bdfhg']==[0,1,2,3,4]
    for k in range(2, len(gs)+1): check_splitter(Splitter(groups=layer_groups(m, k, x=x)), m, x=x)

def test_it_fits_copies_and_wrappers():
    m = timm.create_model('test_resnet')
    mm = model_map(m)
    again = pickle.loads(pickle.dumps(mm))
    assert again.shapes==mm.shapes and again.norms==mm.norms and [l.param_names for l in again.layers]==[l.param_names for l in mm.layers]
    for o in (m, deepcopy(m), nn.DataParallel(m), torch.compile(m), nn.DataParallel(torch.compile(m))): assert list(mm(o))==[n for n,_ in m.named_parameters()]
    assert list(mm(nn.DataParallel(m)).values())[0] is m.conv1[0].weight
    with pytest.raises(SplitterError, match='another model'): mm(timm.create_model('test_vit'))

wraps = dict(parallel=nn.DataParallel, compile=torch.compile, both=lambda m: nn.DataParallel(torch.compile(m)),
    inside=lambda m: nn.Sequential(torch.compile(m), nn.Linear(2,2)))

@pytest.mark.parametrize('wrap', wraps.values(), ids=wraps)
def test_names_of_modules_and_parameters_agree(wrap):
    m = wrap(timm.create_model('test_resnet', num_classes=2))
    mods,ps = named_mods(m),named_params(m)
    assert {n.rpartition('.')[0] for n in ps}<=mods.keys()
    assert all(dict(mods[n.rpartition('.')[0]].named_parameters(recurse=False))[n.rpartition('.')[2]] is p for n,p in ps.items())
    assert model_map(m).norms=={n for n,o in mods.items() if is_norm(o)}

@pytest.mark.parametrize('name', ['fcn_resnet50','deeplabv3_resnet50','lraspp_mobilenet_v3_large','fasterrcnn_resnet50_fpn','ssd300_vgg16','retinanet_resnet50_fpn'])
def test_torchvision_detection_and_segmentation(name):
    m = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    mm = model_map(m)
    body = {n for l in mm.layers for n in l.param_names}
    assert body and all(n.startswith('backbone.') and not n.startswith(('backbone.fpn','backbone.extra')) for n in body)
    assert set(mm.head)=={n for n,_ in m.named_parameters()}-body

# ---- torchvision's names

@pytest.mark.parametrize('name', ['resnet18','resnet34','squeezenet1_1','densenet121','vgg11_bn','convnext_tiny','shufflenet_v2_x1_0'])
def test_a_body_that_fastai_cut_has_the_names_of_torchvision(name, monkeypatch):
    arch = getattr(torchvision.models, name)
    model,whole = create_vision_model(arch, 2, pretrained=False),dict(blank_model(arch).named_modules())
    m,cuts = model_map(model, arch),layer_groups(model, arch=arch)
    for l in m.layers:
        its = Counter(tuple(p.shape) for p in whole[l.name].parameters())
        assert its and its<=Counter(m.shapes[n] for n in l.param_names), l.name
    assert len({l.name for l in m.layers})==len(m.layers)
    monkeypatch.setattr(layers, '_named_as_in', lambda *a: None)
    assert [g.param_names for g in layer_groups(model, arch=arch)]==[g.param_names for g in cuts] # the cuts do not depend on the names

def test_a_body_that_is_not_as_its_function_builds_it_keeps_its_numbers():
    own = nn.Sequential(create_vision_model(torchvision.models.resnet18, 2, pretrained=False)[0], nn.Linear(512, 2))
    own[0][1] = nn.GroupNorm(8, 64)
    found = [types.SimpleNamespace(name='4.0')]
    layers._named_as_in(found, own, torchvision.models.resnet18, '0.')
    assert found[0].name=='4.0'
