"Our parts with those of fastai and others: each pair trains as it should, or is refused with a reason"
import warnings
from functools import partial

import numpy as np,pytest,torch
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CrossEntropyLossFlat,CutMix,DataBlock,EarlyStoppingCallback,GradientAccumulation,GradientClip,
    ImageBlock,ImageDataLoaders,IndexSplitter,MaskBlock,MixUp,MSELossFlat,MultiCategoryBlock,OptimWrapper,RegressionBlock,ReduceLROnPlateau,SaveModelCallback,
    accuracy_multi,get_image_files,mse,set_seed,unet_learner)
from timm.optim import Lamb,Lion,NAdamW

from fastai_discriminative.all import *
from fastai_discriminative.backbone import clean_name
from helpers import *
from helpers import pre_ours

@pytest.fixture
def dls(bright): return bright_dls(bright)

# ---- what we bring: how to fit, whether the body may move, and whether features may be kept

def _preset(learn, cbs):
    learn.unfreeze()
    learn.fit_one_cycle(2, 'preset', cbs=cbs)
def _frozen(learn, cbs):
    learn.freeze()
    learn.fit_one_cycle(2, 'preset', cbs=cbs)
def _cached(learn, cbs):
    learn.freeze()
    learn.fit_one_cycle(3, 'preset', cbs=[CachedFeatures(), *cbs])
def _phases(learn, cbs): learn.fit_strategy([Phase(3, frozen=-1, cached=True), Phase(1, frozen=-2), Phase(1)], cbs=cbs)
def _named(name): return lambda learn, cbs: learn.fit_strategy(name, 1, cbs=cbs)

fits = dict(preset=_preset, frozen=_frozen, cached=_cached, phases=_phases, lp_ft=_named('lp_ft'), auto=_named('auto'))
still = {'frozen','cached'} # the body does not move in these

class Freezes(Callback):
    "The weights of frozen groups, before and after each epoch's training"
    order = 70
    def __init__(self): self.bad,self.seen = [],0
    def _cold(self):
        groups = self.learn.splitter.find(self.learn.model)
        ps = {clean_name(n):p for n,p in self.learn.model.named_parameters()}
        return {n:ps[n].detach().clone() for g in groups[:self.opt.frozen_idx] for n in g.param_names}
    def before_batch(self):
        if self.training and self.iter==0: self.was = self._cold()
    def after_train(self):
        self.seen += 1
        now = self._cold()
        self.bad += [n for n,p in self.was.items() if n in now and not torch.equal(p, now[n])]

def check(learn, fit, cbs=(), body=True):
    "Fit, and check what must be true in any combination"
    before,spy,own = weights(learn),Freezes(),[id(vars(m).get('forward')) for m in learn.model.modules()]
    fits[fit](learn, [spy, *cbs])
    moved,n = {clean_name(k) for k in changed(learn, before)},len(learn.recorder.values)
    assert n and np.isfinite(np.array([r[:2] for r in learn.recorder.values], dtype=float)).all(), 'losses are finite'
    assert spy.seen>=n-3 and not spy.bad, 'frozen is frozen'
    groups = learn.splitter.find(learn.model)
    assert moved & set(groups[-1].param_names), 'the head moves'
    assert fit not in still or not moved & {o for g in groups[:-1] for o in g.param_names}, 'the body stays'
    if fit in ('preset','phases') and body: assert moved & set(groups[0].param_names), 'the body moves'
    assert [id(vars(m).get('forward')) for m in learn.model.modules()]==own, 'nobody holds a layer'
    assert learn.model(learn.dls.one_batch()[0].as_subclass(torch.Tensor)).shape[0]==learn.dls.bs, 'the model takes images'
    return learn

# ---- callbacks

class Counts(Callback):
    def __init__(self): self.n = 0
    def after_step(self): self.n += 1

def _stop(): return EarlyStoppingCallback(monitor='valid_loss', patience=99)
def _save(): return SaveModelCallback(monitor='valid_loss', fname='best')
def _plateau(): return ReduceLROnPlateau(monitor='valid_loss', patience=99)
callbacks = dict(stop=_stop, save=_save, plateau=_plateau, mixup=MixUp, cutmix=CutMix)

@pytest.mark.parametrize('fit', fits)
@pytest.mark.parametrize('cb', callbacks)
def test_callbacks(dls, tmp_path, cb, fit):
    learn = pre_ours(dls, path=tmp_path)
    if (cb,fit)==('cutmix','cached'):
        with pytest.raises(FeatureError, match='CutMix may change images'): check(learn, fit, [CutMix()])
        return
    if cb=='cutmix' and fit in ('phases','lp_ft','auto'):
        with pytest.warns(UserWarning, match='CutMix may change images'): check(learn, fit, [CutMix()])
    else: check(learn, fit, [callbacks[cb]()], body=cb!='save') # the best epoch may be one of the head alone
    if cb=='save': assert (tmp_path/'models'/'best.pth').exists()
    assert type(learn.loss_func) is CrossEntropyLossFlat

@pytest.mark.parametrize('fit', ['preset','cached','phases','auto'])
def test_accumulation_steps_less_often(dls, fit):
    n = []
    for cbs in ([], [GradientAccumulation(16)]):
        counts = Counts()
        check(pre_ours(dls), fit, [counts, *cbs])
        n.append(counts.n)
    assert n[1]==n[0]//2

@pytest.mark.parametrize('fit', ['preset','cached','phases','auto'])
def test_clipped_gradients_are_small(dls, fit):
    class Norms(Callback):
        order = GradientClip.order+1
        def __init__(self): self.norms = []
        def before_step(self): self.norms.append(float(sum(p.grad.pow(2).sum() for p in self.model.parameters() if p.grad is not None))**.5)
    norms = Norms()
    check(pre_ours(dls), fit, [GradientClip(.1), norms])
    assert norms.norms and max(norms.norms)<.11

@pytest.mark.parametrize('fit', ['preset','frozen','cached','phases','lp_ft'])
def test_stopped_early(dls, fit):
    learn = pre_ours(dls)
    fits[fit](learn, [EarlyStoppingCallback(monitor='valid_loss', min_delta=1e9, patience=1)])
    assert len(learn.recorder.values)==2
    check(learn, 'preset')

@pytest.mark.parametrize('fit', ['cached','phases'])
def test_the_best_is_loaded_at_the_end(dls, tmp_path, fit):
    learn = pre_ours(dls, path=tmp_path)
    check(learn, fit, [SaveModelCallback(monitor='valid_loss', fname='best')], body=False)
    best = min(r[1] for r in learn.recorder.values)
    assert learn.validate()[0]==pytest.approx(best, abs=1e-4)

# ---- precision, compilation, workers

@pytest.mark.parametrize('fit', fits)
def test_bf16(dls, fit):
    learn = check(pre_ours(dls).to_fast(bf16=True), fit)
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())

@pytest.mark.parametrize('fit', ['preset','cached','phases'])
def test_processes_that_load(bright, fit):
    dls = ImageDataLoaders.from_folder(bright, valid_pct=.33, seed=1, bs=8, num_workers=1)
    a,b = check(pre_ours(dls), fit),check(pre_ours(bright_dls(bright)), fit)
    assert [r[1] for r in a.recorder.values]==pytest.approx([r[1] for r in b.recorder.values], abs=1e-4)

@pytest.mark.parametrize('fit', fits)
def test_compiled(dls, fit):
    "The backend runs the graphs unchanged: unfreezing must make new ones"
    torch._dynamo.reset()
    learn = pre_ours(dls)
    learn.model = torch.compile(learn.model, backend='eager')
    learn.split(train_norm='affine')
    try: check(learn, fit)
    finally: torch._dynamo.reset()

# ---- optimisers

opts = dict(fused=fused_adamw, fused_sgd=partial(fused_sgd, mom=.9), torch=partial(OptimWrapper, opt=torch.optim.AdamW),
    timm_lamb=partial(OptimWrapper, opt=Lamb), timm_nadamw=partial(OptimWrapper, opt=NAdamW), timm_lion=partial(OptimWrapper, opt=Lion))

@pytest.mark.parametrize('fit', ['preset','cached','phases'])
@pytest.mark.parametrize('opt', opts)
def test_optimizers(dls, opt, fit):
    learn = pre_ours(dls, opt_func=opts[opt])
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The preset is in adamw units')
        check(learn, fit)

# ---- tasks

def _regression(bright):
    db = DataBlock((ImageBlock,RegressionBlock), get_items=get_image_files, get_y=lambda o: float(o.parent.name=='cow'), splitter=IndexSplitter(range(8)))
    return dict(dls=db.dataloaders(bright, bs=8, num_workers=0), n_out=1, loss_func=MSELossFlat(), metrics=mse)

def _multi(bright):
    db = DataBlock((ImageBlock,MultiCategoryBlock), get_items=get_image_files, get_y=lambda o: [o.parent.name,'animal'], splitter=IndexSplitter(range(8)))
    return dict(dls=db.dataloaders(bright, bs=8, num_workers=0), loss_func=BCEWithLogitsLossFlat(), metrics=accuracy_multi)

@pytest.mark.parametrize('fit', ['preset','cached','phases','auto'])
@pytest.mark.parametrize('task', [_regression,_multi], ids=lambda o: o.__name__[1:])
def test_tasks(bright, task, fit):
    kw = task(bright)
    check(pre_ours(kw.pop('dls'), **kw), fit, [MixUp()] if task is _multi else [])

@pytest.mark.parametrize('fit', ['preset','cached','phases'])
def test_unet(bright, fit):
    mask = np.zeros((32,32), np.uint8)
    mask[8:20,8:20] = 1
    db = DataBlock((ImageBlock,MaskBlock(['a','b'])), get_items=lambda p: get_image_files(p)[:16], get_y=lambda f: mask, splitter=IndexSplitter(range(4)))
    set_seed(0)
    learn = quiet(unet_learner(db.dataloaders(bright, bs=4, num_workers=0), _small_resnet, pretrained=False, n_out=2)).split(train_norm='affine', fused=True)
    check(learn, fit)

def _small_resnet(pretrained=False):
    from torchvision.models.resnet import BasicBlock,ResNet
    return ResNet(BasicBlock, [1,1,1,1])

def test_pairs_of_callbacks(dls, tmp_path):
    "Several at once"
    cbs = [GradientAccumulation(16), GradientClip(.1), MixUp(), SaveModelCallback(monitor='valid_loss'), EarlyStoppingCallback(patience=9), ReduceLROnPlateau(patience=9)]
    check(pre_ours(dls, path=tmp_path).to_fast(bf16=True), 'phases', cbs, body=False)
