"Cached features as a demanding user meets them: the same result as without, for any boundary, model and loader; never stale; nothing left behind; and a word where it cannot be done"
import copy,gc,os,pickle,random,shutil,subprocess,sys,time,warnings
from pathlib import Path

import numpy as np,pytest,torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from fastai.data.all import DataLoader
from fastai.vision.all import (Callback,CategoryBlock,CrossEntropyLossFlat,CutMix,DataBlock,DataLoaders,EarlyStoppingCallback,GradientAccumulation,ImageBlock,
    ImageDataLoaders,IndexSplitter,Learner,MaskBlock,MixUp,ProgressCallback,Resize,SaveModelCallback,TfmdDL,WeightedDL,accuracy,aug_transforms,get_image_files,
    load_learner,noop,parent_label,resnet18,set_seed,unet_learner,vision_learner)

from fastai_discriminative import features,keys
from fastai_discriminative.all import *

@pytest.fixture(scope='session')
def folder(many): return many

# ---- data and learners

def make_dls(folder, **kwargs):
    set_seed(0)
    return ImageDataLoaders.from_folder(folder, valid_pct=.3, seed=1, **{**dict(bs=8, num_workers=0), **kwargs})

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def ours(folder, arch='resnet10t', dls=None, **kwargs):
    dls = dls or make_dls(folder)
    set_seed(0)
    return quiet(discriminative_learner(dls, arch, pretrained=False, **{**dict(metrics=accuracy), **kwargs}))

def conv(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride=2), nn.BatchNorm2d(nf), nn.ReLU(inplace=True))
def own_net(): return nn.Sequential(conv(3,8), conv(8,8), conv(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

def state(learn): return {n:o.detach().clone() for n,o in learn.model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def close(a, b): return a.keys()==b.keys() and all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-5) for k in a)

def fit(learn, freeze=-1, n=2, cbs=None, lr=1e-3):
    learn.freeze_to(freeze)
    set_seed(1)
    learn.fit_one_cycle(n, lr, cbs=cbs)
    return learn

class Calls(Callback):
    "Counts the images that the body computes, and what the batches look like"
    def before_fit(self):
        self.n,self.shapes = 0,[]
        self.stem = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        forward = self.stem.forward
        def _counts(x): # no hook, as a module with hooks is taken apart
            self.n += len(x)
            return forward(x)
        self.stem.forward = _counts
    def after_pred(self): self.shapes.append(tuple(self.xb[0].shape))
    def after_fit(self): del self.stem.forward

# ---- the same result

kinds = [('resnet10t', -1, {}), ('resnet10t', -2, {}), ('resnet10t', 1, {}), ('test_vit', -1, dict(img_size=32)), ('test_vit', -3, dict(img_size=32)), ('test_convnext', -2, {}),
    ('test_efficientnet', -2, {}), ('swin_tiny_patch4_window7_224', -2, dict(img_size=32, window_size=1, depths=(1,1,1,1))), ('test_mambaout', -1, {}), ('densenet121', -2, {}),
    ('beit_base_patch16_224', -2, dict(img_size=32, depth=3, embed_dim=48, num_heads=4)), ('regnetx_002', -2, {}), ('test_nfnet', -2, {})]

@pytest.mark.parametrize('arch,freeze,kwargs', kinds, ids=[f'{a}[{f}]' for a,f,_ in kinds])
def test_same_result_as_without(folder, arch, freeze, kwargs):
    a,b,cache = ours(folder, arch, **kwargs),ours(folder, arch, **kwargs),CachedFeatures()
    assert same(state(a), state(b))
    fit(a, freeze)
    fit(b, freeze, cbs=cache)
    assert close(state(a), state(b))
    assert np.allclose(np.array(a.recorder.values, dtype=float), np.array(b.recorder.values, dtype=float), rtol=1e-4, atol=1e-5)
    assert a.recorder.lrs==b.recorder.lrs and len(cache.rows)==2

def test_the_body_runs_once_an_image(folder):
    learn,calls = ours(folder),Calls()
    fit(learn, n=5, cbs=[CachedFeatures(), calls])
    n = len(learn.dls.train_ds)+len(learn.dls.valid_ds)
    assert n<=calls.n<=n+64, f"{calls.n} images through the stem, with {n} to compute and a few to probe"
    assert {len(o) for o in calls.shapes}=={2}, "a head is trained on pooled features"

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('kwargs', [dict(bs=7), dict(bs=64), dict(bs=8, shuffle=False)], ids=str)
def test_batches_are_the_loaders_own(folder, workers, kwargs):
    "Order, size and random numbers: a head with dropout draws the same numbers"
    a,b = (ours(folder, dls=make_dls(folder, num_workers=workers, **kwargs)) for _ in range(2))
    assert same(state(fit(a)), state(fit(b, cbs=CachedFeatures())))

def test_weighted_loader(folder):
    def _dls():
        set_seed(0)
        files = get_image_files(folder)
        dls = make_dls(folder)
        np.random.seed(3)
        dls.loaders[0] = dls.train.new(cls=WeightedDL, wgts=np.arange(1, len(dls.train_ds)+1))
        return dls
    a,b = (ours(folder, dls=_dls()) for _ in range(2))
    states = []
    for learn,cbs in ((a,None), (b,CachedFeatures())):
        learn.freeze()
        np.random.seed(5)
        torch.manual_seed(5)
        learn.fit_one_cycle(2, 1e-3, cbs=cbs)
        states.append(state(learn))
    assert close(*states)

def test_masks_as_targets_and_a_model_that_looks_twice(folder):
    "A U-Net uses results from inside its encoder, and the image again at its end"
    def _unet():
        mask = Image.fromarray((np.arange(1024).reshape(32,32)%2).astype(np.uint8))
        db = DataBlock((ImageBlock,MaskBlock(['a','b'])), get_items=get_image_files, get_y=lambda f: mask, splitter=IndexSplitter(range(8)))
        set_seed(0)
        learn = quiet(unet_learner(db.dataloaders(folder, bs=8, num_workers=0), resnet18, pretrained=False)).split()
        return learn
    a,b,cache = _unet(),_unet(),CachedFeatures()
    fit(a, n=1)
    fit(b, n=1, cbs=cache)
    assert close(state(a), state(b))
    used = cache.rows[0].prefix.used
    assert len(used)>3 and any(m is None for m,*_ in used)

def test_plain_learner_with_a_model_written_by_hand(folder):
    dls = make_dls(folder)
    set_seed(0)
    a = quiet(Learner(dls, own_net(), loss_func=CrossEntropyLossFlat())).split()
    b = quiet(Learner(make_dls(folder), copy.deepcopy(a.model), loss_func=CrossEntropyLossFlat())).split()
    fit(a, 2)
    fit(b, 2, cbs=CachedFeatures())
    assert close(state(a), state(b))

def test_dropout_before_the_first_training_layer_stays_alive(folder):
    "A head's dropout has no parameters, and only frozen layers before it, but it is not fixed"
    def _learn():
        set_seed(0)
        net = nn.Sequential(conv(3,8), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(8,3)))
        return quiet(Learner(make_dls(folder), net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)).split()
    a,b,cache = _learn(),_learn(),CachedFeatures()
    fit(a, 1)
    fit(b, 1, cbs=cache)
    assert same(state(a), state(b)) and '1.2' not in cache.rows[0].prefix.names

def test_frozen_dropout_is_off_with_and_without(folder):
    kwargs = dict(drop_path_rate=.5, drop_rate=0., depths=(2,1,1,1), img_size=32, window_size=1)
    a,b = (ours(folder, 'swin_tiny_patch4_window7_224', **kwargs) for _ in range(2))
    assert same(state(fit(a)), state(fit(b, cbs=CachedFeatures())))

@pytest.mark.parametrize('freeze', [-1,-2,-4])
def test_dropout_without_parameters_between_frozen_layers(folder, freeze):
    a,b = (ours(folder, 'test_vit', img_size=32, pos_drop_rate=.5) for _ in range(2))
    assert close(state(fit(a, freeze)), state(fit(b, freeze, cbs=CachedFeatures())))

def test_random_layers_that_stay_awake_are_not_fixed(folder):
    "A dropout between a frozen layer and a training one is active, so its results are not cached"
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop,self.a,self.b,self.out = nn.Dropout(.5),conv(3,8),conv(8,8),nn.Linear(8,3)
        def forward(self, x): return self.out(self.b(self.drop(self.a(x))).mean((2,3)))
    def _learn():
        set_seed(0)
        return quiet(Learner(make_dls(folder), Noisy(), loss_func=CrossEntropyLossFlat())).split(train_norm='group')
    a,b,cache = _learn(),_learn(),CachedFeatures()
    fit(a, 1)
    fit(b, 1, cbs=cache)
    assert close(state(a), state(b))

def test_sizes_of_training_and_validation_may_differ(folder):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.out = conv(3,8),nn.Linear(8,3)
        def forward(self, x): return self.out((self.a(x)*x.shape[-1]).sum((2,3))/x.shape[-1])
    def _learn():
        dls = make_dls(folder, item_tfms=Resize(32))
        dls.valid.after_item = type(dls.valid.after_item)([*dls.valid.after_item.fs, Resize(24)])
        set_seed(0)
        return quiet(Learner(dls, Sized(), loss_func=CrossEntropyLossFlat())).split()
    a,b = _learn(),_learn()
    fit(a)
    fit(b, cbs=CachedFeatures())
    assert close(state(a), state(b)) and np.allclose(a.recorder.values, b.recorder.values, atol=1e-5)

def test_from_a_table(folder):
    import pandas as pd
    files = get_image_files(folder)
    def _learn():
        set_seed(0)
        df = pd.DataFrame(dict(name=[str(o.relative_to(folder)) for o in files], label=[o.parent.name for o in files]))
        return ours(folder, dls=ImageDataLoaders.from_df(df, folder, valid_pct=.3, seed=1, bs=8, num_workers=0))
    assert same(state(fit(_learn())), state(fit(_learn(), cbs=CachedFeatures())))

def test_several_inputs(folder):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = conv(3,8),nn.Linear(2,8),nn.Linear(8,3)
        def forward(self, x, extra): return self.out(self.a(x).mean((2,3))+self.b(extra))
    set_seed(0)
    ds = TensorDataset(torch.randn(32,3,16,16), torch.randn(32,2), torch.randint(0, 3, (32,)))
    def _learn():
        set_seed(0)
        dls = DataLoaders(DataLoader(ds, bs=8, shuffle=True), DataLoader(ds, bs=8))
        return quiet(Learner(dls, Two(), loss_func=CrossEntropyLossFlat(), splitter=noop)).split()
    a,b,cache = _learn(),_learn(),CachedFeatures()
    fit(a)
    fit(b, cbs=cache)
    assert close(state(a), state(b)) and all(len(r.parts)>=2 for r in cache.rows.values())

# ---- callbacks and fastai's own ways

def test_saves_stops_accumulates_and_resumes(folder, tmp_path):
    learn = ours(folder, path=tmp_path)
    fit(learn, n=4, cbs=[CachedFeatures(), SaveModelCallback(monitor='accuracy', fname='best'), EarlyStoppingCallback(patience=9), GradientAccumulation(16)])
    other = ours(folder, path=tmp_path)
    other.load('best')
    assert other.validate()[1]==max(o[2] for o in learn.recorder.values)

def test_mixup_mixes_features(folder):
    learn,calls = ours(folder),Calls()
    fit(learn, cbs=[CachedFeatures(), MixUp(), calls])
    assert {len(o) for o in calls.shapes}=={2}

def test_others_see_model_and_loaders_as_they_are(folder):
    class Looks(Callback):
        order = 99
        def after_epoch(self):
            x = torch.randn(2,3,32,32)
            self.shape,self.batch = tuple(self.model(x).shape),tuple(self.dls.train.one_batch()[0].shape)
    learn,looks = ours(folder),Looks()
    fit(learn, cbs=[CachedFeatures(), looks])
    assert looks.shape==(2,3) and looks.batch==(8,3,32,32)

def test_get_preds_within_a_fit_uses_images(folder):
    class Predicts(Callback):
        order = 99
        def __init__(self): self.preds,self.busy = None,False
        def after_epoch(self):
            if self.busy: return
            self.busy = True
            self.preds = self.learn.get_preds()[0]
            self.busy = False
    learn,cb = ours(folder),Predicts()
    fit(learn, n=3, cbs=[CachedFeatures(), cb])
    assert cb.preds.shape==(len(learn.dls.valid_ds),3) and len(learn.recorder.values)

def test_validation_and_predictions_after_the_fit_are_of_images(folder):
    a,b = ours(folder),ours(folder)
    fit(a)
    fit(b, cbs=CachedFeatures())
    assert np.allclose(a.validate(), b.validate(), atol=1e-5)
    assert torch.allclose(a.get_preds()[0], b.get_preds()[0], atol=1e-5)

def test_attached_for_good(folder):
    learn = ours(folder)
    learn.add_cb(CachedFeatures())
    fit(learn)
    assert len(learn.validate())==2 and len(learn.get_preds()[0])==len(learn.dls.valid_ds)
    fit(learn)

def test_exported_and_pickled_without_features(folder, tmp_path):
    learn = ours(folder, path=tmp_path)
    cache = CachedFeatures(n_views=1, ram_gb=3.)
    learn.add_cb(cache)
    fit(learn)
    again = pickle.loads(pickle.dumps(cache))
    assert (again.n_views,again.ram_gb,again.rows)==(1,3.,{})
    learn.export('l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert load_learner(tmp_path/'l.pkl').predict(get_image_files(folder)[0])[0] in ('ant','bee','cow')
    assert cache.rows, "the learner's own features are still there"

def test_copies_and_saves_of_the_model_within_a_fit(folder, tmp_path):
    class Keeps(Callback):
        order = 99
        def after_epoch(self):
            if self.epoch==0: self.best = copy.deepcopy(self.model)
            torch.save(self.model, tmp_path/'m.pth')
    learn,keeps = ours(folder),Keeps()
    fit(learn, n=3, cbs=[CachedFeatures(), keeps])
    x = torch.randn(2,3,32,32)
    assert not torch.allclose(keeps.best.eval()(x), learn.model.eval()(x))

def test_two_caches_at_once(folder):
    learn = ours(folder)
    learn.add_cb(CachedFeatures())
    fit(learn, cbs=CachedFeatures())
    assert 'forward' not in vars(learn.model) and learn.model(torch.randn(2,3,32,32)).shape==(2,3)

def test_a_model_with_an_attribute_of_ours(folder):
    learn = ours(folder)
    learn.model.autocast = learn.model.prefix = True
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn, cbs=CachedFeatures())

class Darkens(Callback):
    order = 5
    def before_batch(self): self.learn.xb = (self.xb[0]*.5,)

class DarkensInPlace(Callback):
    "After `CachedFeatures`, and the tensor stays where it is"
    order = 20
    def before_batch(self): self.learn.xb[0].mul_(.5)

@pytest.mark.parametrize('cb', [CutMix, Darkens, DarkensInPlace])
def test_a_callback_that_changes_images_is_refused(folder, cb):
    learn = ours(folder)
    with pytest.raises(FeatureError, match=cb.__name__): fit(learn, cbs=[CachedFeatures(), cb()])
    assert 'forward' not in vars(learn.model) and learn.loss_func.__class__ is CrossEntropyLossFlat
    fit(learn, n=1)

@pytest.mark.parametrize('cb', [CutMix, Darkens, DarkensInPlace])
def test_cached_phases_train_on_images_where_a_callback_changes_them(folder, cb):
    learn,calls = ours(folder),Calls()
    before = state(learn)
    with pytest.warns(UserWarning, match=f'trains on the data for 1 instead. {cb.__name__} may change images'):
        learn.fit_strategy([Phase(10, 1e-2, frozen=-1, cached=True)], cbs=[cb(), calls])
    assert len(learn.recorder.values)==1 and {len(o) for o in calls.shapes}=={4}
    after = state(learn)
    moved = {k for k in after if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith('1.') for k in moved), "a frozen body"

def test_a_callback_that_does_not_ask_for_images_leaves_the_cache_alone(folder):
    class Counts(Callback):
        n = 0
        def before_batch(self): self.n += 1
    learn,calls,counts = ours(folder),Calls(),Counts()
    learn.fit_strategy([Phase(3, 1e-2, frozen=-1, cached=True)], cbs=[counts, MixUp(), calls])
    assert {len(o) for o in calls.shapes}=={2} and counts.n==3*(len(learn.dls.train)+len(learn.dls.valid))

def test_lr_find_on_features(folder):
    learn = ours(folder)
    learn.add_cb(CachedFeatures())
    learn.freeze()
    learn.lr_find(num_it=5, show_plot=False)
    assert 'forward' not in vars(learn.model)

def test_mixed_precision_makes_features_in_16_bits(folder):
    learn,cache = ours(folder).to_fast(False, True),CachedFeatures()
    fit(learn, -2, cbs=cache)
    assert cache.rows[0].parts[0].dtype==torch.bfloat16
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())

def test_interrupted_and_taken_up_again(folder):
    class Stops(Callback):
        order = 99
        def after_batch(self):
            if self.training and self.epoch==1: raise KeyboardInterrupt
    a,b,cache = ours(folder),ours(folder),CachedFeatures()
    with pytest.raises(KeyboardInterrupt): fit(b, cbs=[cache, Stops()])
    assert 'forward' not in vars(b.model) and b.dl is None and all(isinstance(o, TfmdDL) and 'create_batches' not in vars(o) for o in b.dls.loaders)
    assert b.model(torch.randn(2,3,32,32)).shape==(2,3)
    b.model.load_state_dict(a.model.state_dict())
    b.create_opt()
    fit(b, cbs=cache)
    assert np.isfinite(b.recorder.values[-1][0])

# ---- never stale

@pytest.fixture
def built(monkeypatch):
    "Numbers of the loaders that features were made for"
    res,build = [],CachedFeatures._build
    monkeypatch.setattr(CachedFeatures, '_build', lambda self, i, dl: res.append(i) or build(self, i, dl))
    return res

def test_kept_while_nothing_changes(folder, built):
    learn,cache = ours(folder),CachedFeatures()
    fit(learn, n=3, cbs=cache)
    fit(learn, n=2, cbs=cache)
    assert built==[0,1]

def test_kept_with_a_plain_loader(built):
    ds = [(torch.randn(3,16,16), torch.tensor(i%3)) for i in range(16)]
    learn = quiet(Learner(DataLoaders(DataLoader(ds, bs=4, shuffle=True), DataLoader(ds, bs=4)), own_net(), loss_func=CrossEntropyLossFlat())).split()
    cache = CachedFeatures()
    fit(learn, n=3, cbs=cache)
    fit(learn, n=1, cbs=cache)
    assert built==[0,1]

def test_another_pool_takes_other_features(folder, built):
    class Pool(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how = how
        def forward(self, x): return getattr(x.flatten(2), self.how)(-1)
    def _learn(body, how):
        set_seed(0)
        return quiet(Learner(dls, nn.Sequential(body, Pool(how), nn.Linear(8,3)), loss_func=CrossEntropyLossFlat())).split()
    dls,cache = make_dls(folder),CachedFeatures()
    body = conv(3,8)
    fit(_learn(body, 'mean'), 1, n=1, cbs=cache)
    a = _learn(body, 'amax')
    fit(a, 1, n=1, cbs=cache)
    assert built==[0,1,0,1]
    x = torch.stack([dls.train.after_batch((dls.train.do_item(i)[0][None],))[0][0] for i in range(3)])
    assert torch.allclose(cache.rows[0].parts[0][:3], a.model[:2].eval()(x), atol=1e-5)
    a.model[2] = nn.Linear(8,3)
    a.create_opt()
    fit(a, 1, n=1, cbs=cache)
    assert len(built)==6

def test_a_loader_exchanged_in_mid_fit(folder, built):
    class Exchanges(Callback):
        def before_epoch(self):
            if self.epoch==1: self.dls.loaders[0] = self.dls.train.new(dataset=self.dls.valid_ds, shuffle=True)
    learn,cache = ours(folder),CachedFeatures()
    fit(learn, n=2, cbs=[cache, Exchanges()])
    assert built==[0,1,0] and cache.rows[0].n==len(learn.dls.valid_ds)

def test_tensors_changed_in_place_in_mid_fit(built):
    xs,ys = torch.randn(16,3,16,16),torch.arange(16)%3
    class Changes(Callback):
        def after_epoch(self):
            if self.epoch==0: xs.add_(1.)
    dls = DataLoaders(DataLoader(TensorDataset(xs, ys), bs=4), DataLoader(TensorDataset(xs[:4].clone(), ys[:4]), bs=4))
    learn = quiet(Learner(dls, own_net(), loss_func=CrossEntropyLossFlat())).split()
    fit(learn, n=2, cbs=[CachedFeatures(), Changes()])
    assert built==[0,1,0]

def test_items_of_a_list_are_looked_at_one_by_one(built, monkeypatch):
    "Each is a view of one large tensor, so pickling them would write it once for each"
    written = []
    write = keys.CrcFile.write
    monkeypatch.setattr(keys.CrcFile, 'write', lambda self, b: written.append(len(b)) or write(self, b))
    xs = torch.randn(16,3,16,16)
    ds = [(xs[i], torch.tensor(i%3)) for i in range(16)]
    learn = quiet(Learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds[:4], bs=4)), own_net(), loss_func=CrossEntropyLossFlat())).split()
    cache = CachedFeatures()
    fit(learn, n=1, cbs=cache)
    xs[9].add_(1.)
    fit(learn, n=1, cbs=cache)
    assert built==[0,1,0] and sum(written)<1e4

def _load(learn, folder): learn.model[0].load_state_dict({k:v+.01 if v.is_floating_point() else v for k,v in learn.model[0].state_dict().items()})
def _one_weight(learn, folder): next(learn.model.parameters()).data.view(-1)[0].add_(1e-3)
def _running_stats(learn, folder): next(b for n,b in learn.model.named_buffers() if 'running_mean' in n).add_(.1)
def _size(learn, folder): learn.dls.after_item.add(Resize(24))
def _settings(learn, folder): learn.dls.train.after_batch.fs[0].div = 128.
def _file(learn, folder):
    f = Path(learn.dls.train.items[0])
    Image.fromarray(np.full((32,32,3), 7, dtype=np.uint8)).save(f)
    os.utime(f, (time.time()+9, time.time()+9))
def _items(learn, folder):
    ds = learn.dls.train_ds
    for tl in ds.tls: tl.items = tl.items[:-1]
    learn.dls.train.n = len(ds)

@pytest.mark.parametrize('change', [_load, _one_weight, _running_stats, _settings, _size, _file, _items], ids=lambda o: o.__name__)
def test_made_anew_when_it_matters(folder, built, change, tmp_path):
    shutil.copytree(folder, tmp_path/'images')
    learn,cache = ours(tmp_path/'images'),CachedFeatures()
    fit(learn, n=1, cbs=cache)
    del built[:]
    change(learn, tmp_path)
    fit(learn, n=1, cbs=cache)
    assert 0 in built

def test_weights_changed_between_epochs(folder, built):
    class Changes(Callback):
        def after_epoch(self):
            if self.epoch==1: _one_weight(self.learn, None)
    fit(ours(folder), n=4, cbs=[CachedFeatures(), Changes()])
    assert built==[0,1,0,1]

def test_another_boundary(folder, built):
    learn,cache = ours(folder),CachedFeatures()
    fit(learn, n=1, cbs=cache)
    fit(learn, -2, n=1, cbs=cache)
    assert built==[0,1,0,1]

def test_thawed_between_epochs(folder):
    class Thaws(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.freeze_to(-2)
            if self.epoch==2: self.learn.unfreeze()
    learn,calls = ours(folder),Calls()
    before = state(learn)
    with pytest.warns(UserWarning, match='continues without cached features'): fit(learn, n=3, cbs=[CachedFeatures(), Thaws(), calls])
    dims = [len(o) for o in calls.shapes]
    k = len(learn.dls.train)+len(learn.dls.valid)
    assert {2}==set(dims[:k]) and {4}==set(dims[k:]) and calls.shapes[-1][1:]==(3,32,32)
    assert not torch.equal(before['0.model.conv1.weight' if '0.model.conv1.weight' in before else next(iter(before))], next(iter(state(learn).values())))

def test_thawed_within_an_epoch_is_an_error(folder):
    class Thaws(Callback):
        def after_batch(self):
            if self.training and self.iter==1: self.learn.unfreeze()
    learn = ours(folder)
    with pytest.raises(FeatureError, match='during an epoch'): fit(learn, cbs=[CachedFeatures(), Thaws()])
    assert 'forward' not in vars(learn.model)

# ---- views, memory and files

def aug_dls(folder):
    set_seed(0)
    tfms = dict(item_tfms=Resize(32), batch_tfms=aug_transforms())
    db = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=IndexSplitter(range(10)), **tfms)
    return db.dataloaders(folder, bs=8, num_workers=0)

def test_views_differ_and_are_drawn_anew(folder):
    learn,cache = ours(folder, dls=aug_dls(folder)),CachedFeatures(n_views=3)
    fit(learn, cbs=cache)
    train,valid = cache.rows[0],cache.rows[1]
    views = train.parts[0].view(3, train.n, -1)
    assert not torch.allclose(views[0], views[1]) and not torch.allclose(views[1], views[2]) and valid.n_views==1
    a,b = train.get(range(train.n), cache._views)[0][0],train.get(range(train.n), cache._views)[0][0]
    assert not torch.equal(a, b)
    targets = train.parts[1].view(3, train.n)
    assert torch.equal(targets[0], targets[1])

def test_without_views_augmentation_rests(folder):
    learn,cache,plain = ours(folder, dls=aug_dls(folder)),CachedFeatures(),CachedFeatures()
    fit(learn, n=1, cbs=cache)
    fit(learn, n=1, cbs=plain)
    assert torch.equal(cache.rows[0].parts[0], plain.rows[0].parts[0])
    rng,tfms = random.getstate(),learn.dls.train_ds.split_idx
    assert tfms==0, "training images are augmented again"

def test_random_numbers_are_left_alone(folder):
    learn = ours(folder, dls=aug_dls(folder))
    learn.freeze()
    set_seed(5)
    before = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    cb = CachedFeatures(n_views=2)
    cb.learn,learn.dl = learn,learn.dls.train
    cb.before_train()
    cb.release()
    after = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:]==after[1:]

def test_files_above_the_budget(folder, tmp_path):
    a,b,cache = ours(folder),ours(folder),CachedFeatures(ram_gb=0, folder=tmp_path)
    fit(a)
    fit(b, cbs=cache)
    assert close(state(a), state(b)) and list(tmp_path.rglob('*.bin')) and 'in files' in repr(cache)
    assert sum(f.stat().st_size for f in tmp_path.rglob('*.bin'))==cache.nbytes
    cache.close()
    assert not list(tmp_path.iterdir()) and not cache.rows

def test_files_go_with_the_fit(folder, tmp_path):
    fit(ours(folder), cbs=CachedFeatures(ram_gb=0, folder=tmp_path))
    gc.collect()
    assert not list(tmp_path.iterdir())

def test_files_go_when_made_anew(folder, tmp_path):
    learn,cache = ours(folder),CachedFeatures(ram_gb=0, folder=tmp_path)
    fit(learn, n=1, cbs=cache)
    _load(learn, None)
    fit(learn, n=1, cbs=cache)
    assert len({f.parent for f in tmp_path.rglob('*.bin')})==2

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted_while_made(folder, tmp_path, error, monkeypatch):
    n,compute = [],FrozenPrefix.features
    def _fails(self, *xb):
        n.append(1)
        if len(n)==4: raise error('stopped')
        return compute(self, *xb)
    learn,cache = ours(folder),CachedFeatures(ram_gb=0, folder=tmp_path)
    before,modes = state(learn),[m.training for m in learn.model.modules()]
    learn.freeze()
    monkeypatch.setattr(FrozenPrefix, 'features', _fails)
    with pytest.raises(error): learn.fit_one_cycle(1, 1e-3, cbs=cache)
    monkeypatch.undo()
    assert same(before, state(learn)) and 0 not in cache.rows and 'forward' not in vars(learn.model)
    assert learn.dls.train_ds.split_idx==0 and all('get_idxs' not in vars(o) for o in learn.dls.loaders)
    cache.close()
    assert not list(tmp_path.iterdir())
    learn.fit_one_cycle(1, 1e-3, cbs=cache)

def test_no_room_is_said_and_done_without(folder, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), dict(free=0))())
    learn,calls = ours(folder),Calls()
    with pytest.warns(UserWarning) as said: fit(learn, n=3, cbs=[CachedFeatures(ram_gb=0), calls])
    said = [o for o in said if 'Training continues without cached features' in str(o.message)]
    assert len(said)==2, "once for each loader, not in each epoch"
    assert {len(o) for o in calls.shapes}=={4}

# ---- what cannot be done

def test_nothing_frozen_is_said_and_trains_as_ever(folder):
    a,b = ours(folder),ours(folder)
    fit(a, 0)
    with pytest.warns(UserWarning, match='Nothing at the start of the model is frozen'): fit(b, 0, cbs=CachedFeatures())
    assert same(state(a), state(b))

def test_fine_tune_caches_its_frozen_fit(folder):
    learn,calls = ours(folder),Calls()
    with pytest.warns(UserWarning, match='Nothing at the start'): learn.fine_tune(1, 1e-3, freeze_epochs=2, cbs=[CachedFeatures(), calls])
    assert {len(o) for o in calls.shapes}=={4}, "the second fit trains on images"

def test_not_split(folder):
    learn = quiet(vision_learner(make_dls(folder), 'resnet10t', pretrained=False))
    with pytest.raises(FeatureError, match='learn.split'): learn.fit_one_cycle(1, cbs=CachedFeatures())

def test_norms_that_move(folder):
    learn = ours(folder, train_norm=True)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.opt.freeze_to(-1)
    for s in learn.opt.state.values(): s.pop('force_train', None)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    with pytest.raises(FeatureError, match="still change.*instead of True"): learn.fit_one_cycle(1, 1e-3, cbs=CachedFeatures())

def test_shapes_that_differ():
    rows = features._Rows(4, 1, (torch.zeros(2,5),), (torch.zeros(2),))
    with pytest.raises(FeatureError, match='different shapes'): rows.put([0,1], (torch.zeros(2,6),), (torch.zeros(2),))

def test_loaders_of_other_kinds(folder):
    learn = ours(folder)
    learn.dls.loaders[0] = torch.utils.data.DataLoader([(torch.randn(3,32,32), 0)]*8, batch_size=4)
    with pytest.raises(FeatureError, match="but not for torch"): fit(learn, cbs=CachedFeatures())

def test_bad_arguments(tmp_path):
    with pytest.raises(FeatureError, match='number of views'): CachedFeatures(n_views=-1)
    with pytest.raises(FeatureError, match='number of views'): CachedFeatures(n_views=1.5)
    with pytest.raises(FeatureError, match='does not exist'): CachedFeatures(folder=tmp_path/'no')

def test_items_that_are_skipped(folder):
    from fastai.data.load import SkipItemException
    class Skips(list):
        def __getitem__(self, i):
            if i==3: raise SkipItemException
            return super().__getitem__(i)
    ds = Skips((torch.randn(3,16,16), torch.tensor(i%3)) for i in range(16))
    learn = quiet(Learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4)), own_net(), loss_func=CrossEntropyLossFlat())).split()
    with pytest.raises(FeatureError, match='returned 15 of 16 items'): fit(learn, cbs=CachedFeatures())

# ---- several processes

_ddp = """
import sys,warnings
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import *
from fastai.distributed import *
from fastai_discriminative.all import *
torch.set_num_threads(1)
def _broadcast(self, t, rank): # fastai's moves the indices to a GPU
    t = LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = _broadcast
set_seed(0)
dls = ImageDataLoaders.from_folder(sys.argv[1], valid_pct=.3, seed=1, bs=8, num_workers=0)
def fit(cbs):
    set_seed(0)
    learn = discriminative_learner(dls, 'resnet10t', pretrained=False)
    learn.freeze()
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=cbs)
    return torch.cat([o.detach().flatten().float() for o in learn.model.state_dict().values()])
cache = CachedFeatures(ram_gb=float(sys.argv[2]))
ws = fit(cache)
rows = torch.cat([r.parts[0].flatten() for r in cache.rows.values()])
res = f'{ws.double().sum():.12f} {rows.double().sum():.9f} {len(rows)} {sum(r.n for r in cache.rows.values())} {bool(cache._tmp)}'
Path(f'{sys.argv[3]}-{rank_distrib()}').write_text(res)
"""

@pytest.mark.parametrize('ram_gb', ['1','0'])
def test_two_processes_share_the_work_and_agree(folder, tmp_path, ram_gb):
    (tmp_path/'ddp.py').write_text(_ddp)
    def _run(n):
        env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
        out = tmp_path/f'of-{n}'
        cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), str(tmp_path/'ddp.py'), str(folder), ram_gb, str(out)]
        res = subprocess.run(cmd, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
        assert not res.returncode, res.stderr[-3000:]
        return [Path(f'{out}-{r}').read_text().split() for r in range(n)]
    a,b = _run(2)
    assert a==b and a[3]==str(len(get_image_files(folder))) and a[4]==str(ram_gb=='0')
    alone = _run(1)[0]
    assert abs(float(alone[1])-float(a[1]))<1e-2, "the same features, whoever computed them"
