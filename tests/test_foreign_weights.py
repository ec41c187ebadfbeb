"Checkpoints from any source, by every way to load weights: they are loaded completely and correctly, or not at all"
import zipfile

import pytest,timm,torch,torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel
from safetensors.torch import save_file
from fastai.vision.all import CrossEntropyLossFlat

from fastai_discriminative.all import *
from helpers import *

arch = 'test_resnet'

# ---- files

def own(**kwargs): return timm.create_model(arch, **kwargs)
def at(sd, end, f):
    "`sd` with `f` of the first tensor whose name ends so"
    k = next(k for k in sd if k.endswith(end) and 'fc' not in k)
    return {**sd, k:f(sd[k])}

def sgd_state(sd):
    ps = [nn.Parameter(v) for v in sd.values() if v.is_floating_point()]
    opt = torch.optim.SGD(ps, 1e-2, momentum=.9)
    for p in ps: p.grad = torch.zeros_like(p)
    opt.step()
    return opt.state_dict()

def one(v, x):
    v = v.clone()
    v.view(-1)[-1] = x
    return v

others = dict(resnet10t=lambda sd: timm.create_model('resnet10t').state_dict(), vit=lambda sd: timm.create_model('test_vit').state_dict(),
    convnext=lambda sd: timm.create_model('test_convnext').state_dict(), byobnet=lambda sd: timm.create_model('test_byobnet').state_dict(),
    torchvision=lambda sd: torchvision.models.resnet18().state_dict(), deeper=lambda sd: own(layers=(2,1,1,1)).state_dict(),
    wider=lambda sd: own(channels=(32,48,48,128)).state_dict(), gray=lambda sd: own(in_chans=1).state_dict(),
    prefix=lambda sd: {f'encoder.{k}':v for k,v in sd.items()}, upper=lambda sd: {k.upper():v for k,v in sd.items()},
    numbers=lambda sd: dict(enumerate(sd.values())), tensor=lambda sd: torch.zeros(3), list=lambda sd: list(sd.values()),
    names=lambda sd: list(sd), number=lambda sd: 3, nothing=lambda sd: None,
    empty=lambda sd: {}, optimizer=sgd_state, nested=lambda sd: dict(net=dict(a=dict(sd))), half_of_it=lambda sd: dict(list(sd.items())[:len(sd)//3]),
    stats_gone=lambda sd: {k:v for k,v in sd.items() if 'running' not in k}, arrays=lambda sd: {k:v.tolist() for k,v in list(sd.items())[:3]})

values = dict(nan=('.weight', lambda v: one(v, float('nan'))), inf=('.weight', lambda v: one(v, float('-inf'))), stats_nan=('running_mean', lambda v: one(v, float('nan'))),
    stats_inf=('running_mean', lambda v: one(v, float('inf'))),
    variance=('running_var', lambda v: one(v, -.1)), bool=('.weight', lambda v: v>0), int=('.weight', lambda v: v.long()),
    uint8=('.weight', lambda v: v.byte()), complex=('.weight', lambda v: v.to(torch.complex64)),
    overflow=('.weight', lambda v: one(v.double(), 1e39)), half_nan=('.weight', lambda v: one(v.half(), float('nan'))), sparse=('.weight', lambda v: v.to_sparse()), meta=('.weight', lambda v: v.to('meta')))
damage = dict(truncated=lambda f: f.write_bytes(f.read_bytes()[:-3000]), cut=lambda f: f.write_bytes(f.read_bytes()[:100]), blank=lambda f: f.write_bytes(b''),
    no_zip=lambda f: f.write_bytes(b'PK\5\6'+bytes(18)), text=lambda f: f.write_text('{"weights": 3}'),
    safe=lambda f: save_file({k:v.contiguous() for k,v in torch.load(f, weights_only=True).items()}, f))

def zipped(f):
    with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('data.pkl', bytes(10**7))

damage['bomb'] = zipped
kinds_ = [*others, *values, *damage, 'twice']

def write(kind, sd, path):
    "A file of this `kind`, made from the right weights `sd`"
    sd = {k:v.detach().clone() for k,v in sd.items()}
    if kind=='twice': what = {**{f'_orig_mod.{k}':v for k,v in sd.items()}, **{k:v+1 for k,v in list(sd.items())[:1]}}
    elif kind in values: what = at(sd, *values[kind])
    else: what = others.get(kind, lambda sd: sd)(sd)
    torch.save(what, path)
    if kind in damage: damage[kind](path)
    return path

# ---- doors

@pytest.fixture(scope='module')
def learn(folder, tmp_path_factory):
    from fastai.vision.all import ImageDataLoaders
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=1, bs=8, num_workers=0)
    learn = quiet(discriminative_learner(dls, arch, pretrained=False, path=tmp_path_factory.mktemp('learner')))
    learn.fit(1, 1e-3)
    (learn.path/learn.model_dir).mkdir()
    return learn

@pytest.mark.parametrize('kind', kinds_)
def test_load(learn, kind):
    file = write(kind, learn.model.state_dict(), learn.path/learn.model_dir/'f.pth')
    was,state = snapshot(learn),{n:{k:v.clone() for k,v in learn.opt.opt.state[p].items()} for n,p in learn.model.named_parameters()}
    with pytest.raises(WeightsError) as e: learn.load('f')
    unchanged(learn, was)
    for n,p in learn.model.named_parameters(): assert same(learn.opt.opt.state[p], state[n])
    if kind in values: assert values[kind][0] in str(e.value) and "'0.model." in str(e.value)
    if 'nan' in kind: assert 'had diverged' in str(e.value)
    file.unlink()

@pytest.mark.parametrize('kind', kinds_)
def test_load_pretrained(tmp_path, kind):
    m = own()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    with pytest.raises(WeightsError) as e: load_pretrained(m, write(kind, own().state_dict(), tmp_path/'f.pth'))
    assert same(m.state_dict(), before) and not hasattr(m, 'not_in_checkpoint')
    if kind in values: assert values[kind][0] in str(e.value)

@pytest.mark.parametrize('kind', [o for o in kinds_ if o!='gray']) # timm itself adapts a stem to other channels
def test_weights_file(dls, tmp_path, kind):
    load,tfms = nn.Module.load_state_dict,list(dls.after_batch.fs)
    with pytest.raises(WeightsError) as e: discriminative_learner(dls, arch, weights_file=write(kind, own().state_dict(), tmp_path/'f.pth'))
    assert nn.Module.load_state_dict is load and list(dls.after_batch.fs)==tfms
    if kind in values: assert values[kind][0] in str(e.value)

# ---- what is right comes in whole

def good(sd, m):
    return dict(plain=sd, module={f'module.{k}':v for k,v in sd.items()}, compiled={f'_orig_mod.{k}':v for k,v in sd.items()}, average=AveragedModel(m).state_dict(),
        ema=dict(state_dict={k:torch.zeros_like(v) for k,v in sd.items()}, state_dict_ema=sd),
        double={k:v.double() if v.is_floating_point() else v for k,v in sd.items()},
        epochs={k:v.float() if 'tracked' in k else v for k,v in sd.items()})

@pytest.mark.parametrize('kind', ['plain','module','compiled','average','ema','double','epochs'])
def test_what_fits_is_loaded(dls, tmp_path, kind):
    m = own()
    sd,file = m.state_dict(),tmp_path/'f.pth'
    torch.save(good(sd, m)[kind], file)
    assert load_pretrained(fresh := own(), file)==[] and same(fresh.state_dict(), sd)
    body = discriminative_learner(dls, arch, weights_file=file).model[0].model.state_dict()
    assert all(torch.equal(v, sd[k]) for k,v in body.items())

def test_half_precision_has_its_own_limit(tmp_path):
    m = own()
    torch.save(at(m.state_dict(), '.weight', lambda v: one(v, 1e5)), tmp_path/'f.pth')
    load_pretrained(own(), tmp_path/'f.pth')
    with pytest.raises(WeightsError, match='reaches 1e.05, more than torch.float16 can hold'): load_pretrained(own().half(), tmp_path/'f.pth')

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2,2) # an author's own name, not a wrapper's
        self.fc = nn.Linear(2,2)
        self.register_buffer('mask', torch.full((2,2), float('-inf')).triu(1))

def test_masks_and_parts_called_module(tmp_path):
    m,file = Masked(),tmp_path/'f.pth'
    torch.save(m.state_dict(), file)
    assert load_pretrained(fresh := Masked(), file)==[] and same(fresh.state_dict(), m.state_dict())
    torch.save({**m.state_dict(), 'mask':torch.full((2,2), float('-inf'))}, file)
    with pytest.raises(WeightsError, match="'mask' is not finite"): load_pretrained(fresh, file)

class LogVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2,2)
        self.register_buffer('running_var', -torch.ones(2))

def test_a_variance_is_one_by_its_module(tmp_path):
    torch.save(LogVariance().state_dict(), tmp_path/'f.pth')
    assert load_pretrained(LogVariance(), tmp_path/'f.pth')==[]

class Shared(nn.Module):
    "A norm that stands in it twice, and a tied weight"
    def __init__(self):
        super().__init__()
        self.a,self.norm,self.b,self.fc = nn.Linear(4,4),nn.BatchNorm1d(4),nn.Linear(4,4),nn.Linear(4,2)
        self.again,self.b.weight = self.norm,self.a.weight

def test_what_a_model_has_under_two_names(tmp_path):
    "A file has all names, or one of them, as safetensors keeps one: the whole model is loaded"
    sd,file = {k:v+1 for k,v in Shared().state_dict().items()},tmp_path/'f.pth'
    for gone in (), ('again','b.weight'), ('norm','a.weight'):
        torch.save({k:v for k,v in sd.items() if not k.startswith(gone or '-')}, file)
        assert load_pretrained(m := Shared(), file)==[] and same(m.state_dict(), sd)

@pytest.mark.parametrize('k,v,why', [('again.running_var', -torch.ones(4), 'is a variance of -1'), ('b.weight', torch.ones(4,4), "differs from 'a.weight'"),
    ('again.bias', torch.ones(4), "differs from 'norm.bias'"), ('again.num_batches_tracked', torch.tensor(5), "differs from 'norm.num_batches_tracked'")])
def test_two_values_for_one_tensor(tmp_path, k, v, why):
    m,file = Shared(),tmp_path/'f.pth'
    sd = {n:o.clone() for n,o in m.state_dict().items()}
    torch.save({**sd, k:v}, file)
    with pytest.raises(WeightsError, match=f"'{k}' {why}"): load_pretrained(m, file)
    assert same(m.state_dict(), sd)

def test_parts_that_the_model_lacks_as_a_whole_are_left_out(tmp_path):
    sd = {**own().state_dict(), 'decoder.0.weight':torch.zeros(3)}
    torch.save(sd, tmp_path/'f.pth')
    assert load_pretrained(m := own(), tmp_path/'f.pth')==[] and same(m.state_dict(), {k:v for k,v in sd.items() if k in m.state_dict()})

def test_other_classes(dls, learn, tmp_path):
    "The file's head is dropped if a new one is made, and refused if it does not fit the existing one"
    m = own(num_classes=7)
    torch.save(m.state_dict(), tmp_path/'f.pth')
    with pytest.warns(UserWarning, match='7 classes'): body = discriminative_learner(dls, arch, weights_file=tmp_path/'f.pth').model[0].model.state_dict()
    assert all(torch.equal(v, m.state_dict()[k]) for k,v in body.items())
    with pytest.raises(WeightsError, match="'fc.weight', 'fc.bias' have other shapes"): load_pretrained(own(), tmp_path/'f.pth')
    other = quiet(discriminative_learner(dls, arch, pretrained=False, n_out=7, loss_func=CrossEntropyLossFlat(), path=learn.path))
    other.save('seven')
    was = snapshot(learn)
    with pytest.raises(WeightsError, match='nothing was loaded'): learn.load('seven')
    unchanged(learn, was)

@pytest.mark.parametrize('strict', [True,False])
def test_load_with_names_of_nobody(learn, strict):
    torch.save(own().state_dict(), learn.path/learn.model_dir/'f.pth')
    was = snapshot(learn)
    with pytest.raises(WeightsError): learn.load('f', strict=strict)
    unchanged(learn, was)

def test_a_learner_that_diverged_is_not_loaded_even_into_itself(dls, tmp_path):
    learn = quiet(discriminative_learner(dls, arch, pretrained=False, path=tmp_path))
    for p in learn.model.parameters(): p.data.fill_(float('inf'))
    learn.save('late')
    with pytest.raises(WeightsError, match='had diverged'): learn.load('late')

def test_a_file_that_is_not_there_is_pythons_own(learn):
    with pytest.raises(FileNotFoundError): learn.load('nowhere')

def test_timms_own_download_is_looked_at(monkeypatch):
    sd = at(own(num_classes=0).state_dict(), 'running_var', lambda v: one(v, -1.))
    from fastai_discriminative.weights import timm_model
    with pytest.raises(WeightsError, match="timm's checkpoint has impossible values.*running_var' is a variance"): timm_model(arch, True, None, 3, pretrained_cfg_overlay=dict(state_dict=sd))
