"""`auto`, the head alone, and peers that were tuned, on real weights and images at the sizes users train at

    python benchmarks/bench_tuned.py [CASE ...] [--seeds 5] [--jobs 2] [--only auto ...]

A case is `data-arch-size-images-epochs`, such as `clipart-lite0-160-600-10`; without one all of `cases`, in order. Each case is a file in `results/tuned/`, made by
`compare_strategies`: run again, it goes on where it stopped. `--jobs` processes, one thread each.
Every fit has the same images, transforms, weights and epochs, the frozen epoch of `fine_tune` excepted, which comes on top as fastai has it.
A peer with a knob runs with every value on the first seed; the value that is best on validation images then runs on all seeds. `auto` is one run, whatever the case.
Each set is split once: images to train on, images to validate on, by which knobs, epochs and `auto` choose, and images to test on, which no fit sees (`test`).
What is not ours is done with the package that does it: timm's groups, loss and averaged weights, AutoGluon's published defaults in fastai's loop, `prodigyopt`, finetuning-scheduler, scikit-learn.
"""
import argparse,sys,tempfile
from dataclasses import replace
from functools import lru_cache,partial
from pathlib import Path

import joblib,torch
sys.path.insert(0, str(Path(__file__).parent))
from fastai.vision.all import *
from fastai.callback.schedule import SuggestionMethod
from fastai_discriminative.all import *
from fastai_discriminative.auto import _AutoRates
from fastai_discriminative.points import tempered_loss
from fastai_discriminative.demo import demo_dls,folder_images
from bench_data import archs,keras_cfg,keras_mb,sets
from bench_peers import layer_decay_groups,plain_tensors
from bench_step import machine

out = Path(__file__).parent/'results'/'tuned'

# ---- learners

@lru_cache(maxsize=None)
def images(data):
    "The images of set `data`, taken apart: to train and validate on, and to test on"
    fi = folder_images(sets[data](), verify=False)
    idxs = np.random.default_rng(2026).permutation(len(fi.files))
    n = min(1000, len(idxs)//5)
    part = lambda o: replace(fi, files=[fi.files[i] for i in sorted(o)], labels=[fi.labels[i] for i in sorted(o)])
    return part(idxs[n:]),part(idxs[:n])

def learner(data, arch, size, n_train):
    "A stock learner on set `data`; `n_train` 0 for all images"
    name,weights = archs[arch]
    fi = images(data)[0]
    n_valid = min(500, len(fi.files)//4)
    dls = demo_dls(fi, n_train or None, size, seed=42, valid_pct=n_valid/len(fi.files))
    kw,cfg = dict(vit=(dict(img_size=size), {}), mobilenet=(keras_mb, keras_cfg)).get(arch, ({}, {}))
    learn = vision_learner(dls, name, pretrained_cfg_overlay=dict(cfg, file=str(weights())), metrics=accuracy, **kw)
    if arch!='vit': learn.model.to(memory_format=torch.channels_last) # for all, fastai's too: the same arithmetic in two thirds of the time
    return learn

def left_out(data, learn, most=3000):
    "Images of set `data` that this fit left out, since it takes fewer than there are; at most `most`, always the same"
    fi,seen = images(data)[0],{*learn.dls.train_ds.items,*learn.dls.valid_ds.items}
    idxs = [i for i,f in enumerate(fi.files) if f not in seen]
    assert len(idxs)==len(fi.files)-len(seen)
    idxs = sorted(np.random.default_rng(2027).permutation(idxs)[:most])
    return replace(fi, files=[fi.files[i] for i in idxs], labels=[fi.labels[i] for i in idxs])

def scores(data, learn):
    "Accuracy and loss on images that the fit did not see: `test` on those put aside for all fits, `more` on those that this one left out. And accuracy on those to validate on: averaged weights come after the last row"
    def _accuracy(preds, y): return (preds.argmax(1)==y).float().mean().item()
    res = dict(valid=_accuracy(*learn.get_preds()))
    for k,t in dict(test=images(data)[1], more=left_out(data, learn)).items():
        if not t.files: continue
        preds,y = learn.get_preds(dl=learn.dls.test_dl(t.files), act=noop)[0],tensor([learn.dls.vocab.o2i[o] for o in t.labels])
        res |= {k:_accuracy(preds, y), f'{k}_loss':F.cross_entropy(preds, y).item(), f'{k}_loss_tempered':tempered_loss(preds, y), f'{k}_n':len(y)}
    return res

# ---- ours

class AsItIs(_AutoRates):
    "The head's logits are not scaled before the body trains"
    def _calibrate(self, learn): return 1.

class FastHead(AsItIs):
    "In the body phase too, the head is as fast as when it trained alone (`power` 1), or half of the way there on a log scale (.5)"
    power = 1.
    def at(self, hi, groups): return [*super().at(hi, groups)[:-1], hi*max(1., self.preset.head_lr/hi)**self.power]
class MidHead(FastHead): power = .5

def _auto(n_head, rates, n_epoch, preset, groups):
    first,body = find_strategy('auto').phases(n_epoch, preset, groups)
    return [replace(first, n_epoch=n_head), replace(body, lr=rates(preset, n_epoch))]

# `auto` without its scaled head, and with one more difference: another number of cached epochs than ten for the head, or another rate for it in the body phase
variants = {**{f'auto, {n} head epochs':(n,AsItIs) for n in (4,30)}, 'auto, head as it is':(10,AsItIs), 'auto, mid head':(10,MidHead), 'auto, fast head':(10,FastHead)}
for k,o in variants.items(): register_strategy(k, keep_best=find_strategy('auto').keep_best)(partial(_auto, *o))

# ---- peers

def fine_tune(base_lr, learn, n_epoch, cbs): learn.fine_tune(n_epoch, base_lr, cbs=cbs)

def fine_tune_found(learn, n_epoch, cbs):
    "`fine_tune` at what `lr_find` suggests for the frozen learner, as fastai's course does it"
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): lr = learn.lr_find(show_plot=False, suggest_funcs=(SuggestionMethod.Valley,)).valley
    learn.fine_tune(n_epoch, lr, cbs=cbs)

def lp_slice(lr, learn, n_epoch, cbs):
    "A cell of the sweep: the head on cached features, then everything at `slice(lr/10, lr)` in one cycle, without trials or a choice of points"
    learn.fit_strategy([Phase(10, frozen=-1, cached=True), Phase(n_epoch, slice(lr/10, lr), train_norm='running')], cbs=cbs)

class Ema(Callback):
    "timm's averaged weights, which are the model's when the fit is over"
    order = 58 # before what looks at the end of the fit
    def before_fit(self):
        from timm.utils import ModelEmaV3
        self.average = ModelEmaV3(self.learn.model, decay=.99, use_warmup=True)
    def after_step(self): self.average.update(self.learn.model, self.train_iter)
    def after_fit(self): self.learn.model.load_state_dict(self.average.module.state_dict())

def layer_decay(lr, decay, smooth, pct_start, learn, n_epoch, cbs):
    "AdamW on timm's groups, each `decay` times as fast as the one above; with label smoothing and averaged weights if `smooth`"
    learn.unfreeze() # else the body would be left out
    groups,_ = layer_decay_groups(learn.model, decay, .05)
    loss = LabelSmoothingCrossEntropyFlat(eps=.1) if smooth else learn.loss_func
    peer = Learner(learn.dls, learn.model, loss, partial(OptimWrapper, opt=torch.optim.AdamW), splitter=lambda m: [g['params'] for g in groups], metrics=learn.metrics)
    with peer.no_bar(), peer.no_logging():
        peer.fit_one_cycle(n_epoch+1, [lr*g['lr_scale'] for g in groups], wd=[g['weight_decay'] for g in groups], pct_start=pct_start, cbs=[*cbs, *([Ema()] if smooth else [])])

def prodigy(learn, n_epoch, cbs):
    "Prodigy, which finds its rate, on all layers; cosine decay as its authors advise"
    from prodigyopt import Prodigy
    learn.unfreeze()
    peer = Learner(learn.dls, learn.model, learn.loss_func, partial(OptimWrapper, opt=partial(Prodigy, weight_decay=.01, safeguard_warmup=True)), lr=1., metrics=learn.metrics)
    with peer.no_bar(), peer.no_logging(): peer.fit_flat_cos(n_epoch+1, 1., pct_start=0., cbs=cbs)

def fts(learn, n_epoch, cbs):
    "Lightning with finetuning-scheduler's own schedule, at its defaults: from the head down, a phase ends when the validation loss stops falling, and begins from the best weights so far"
    import lightning.pytorch as pl
    from finetuning_scheduler import FTSCheckpoint,FTSEarlyStopping,FinetuningScheduler
    learn.unfreeze() # the scheduler freezes
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone,self.head = learn.model
        def training_step(self, b, i):
            x,y = plain_tensors(b)
            return F.cross_entropy(self.head(self.backbone(x)), y)
        def validation_step(self, b, i):
            x,y = plain_tensors(b)
            self.log('val_loss', F.cross_entropy(self.head(self.backbone(x)), y), batch_size=len(y))
        def configure_optimizers(self): return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
    with tempfile.TemporaryDirectory() as tmp:
        own = [FinetuningScheduler(log_dir=tmp), FTSCheckpoint(dirpath=tmp, monitor='val_loss', save_top_k=1), FTSEarlyStopping(monitor='val_loss')]
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp)
        pl.Trainer(accelerator='auto', devices=1, max_epochs=n_epoch+1, callbacks=own, **quiet).fit(Net(), learn.dls.train, learn.dls.valid)
    learn.model.to(learn.dls.device)
    with learn.added_cbs(cbs): learn.validate()

def pooled(learn, files):
    "Features of the pretrained body for `files`, pooled where they are maps"
    m = learn.model.eval().to(learn.dls.device)
    with torch.no_grad(): fs = [m[0](x.as_subclass(Tensor)) for x, in learn.dls.test_dl(files)]
    return torch.cat([f.mean((2,3)) if f.ndim==4 else f for f in fs])

def logistic(learn, n_epoch, cbs):
    "scikit-learn's logistic regression on the body's features, C chosen on validation images: every head's yardstick"
    from sklearn.linear_model import LogisticRegression
    (x,y),(vx,vy) = [(pooled(learn, list(ds.items)).cpu(), [int(ds.tls[1][i]) for i in range(len(ds))]) for ds in (learn.dls.train_ds,learn.dls.valid_ds)]
    mean,std = x.mean(0),x.std(0)+1e-6
    fits = [LogisticRegression(C=c, max_iter=2000).fit((x-mean)/std, y) for c in (1e-4,1e-3,1e-2,1e-1)]
    best = max(fits, key=lambda f: f.score((vx-mean)/std, vy))
    lin = nn.Linear(x.shape[1], len(learn.dls.vocab))
    w,b = torch.from_numpy(best.coef_).float(),torch.from_numpy(best.intercept_).float()
    if len(w)==1: w,b = torch.cat([-w,w])/2,torch.cat([-b,b])/2 # two classes
    with torch.no_grad():
        lin.weight.zero_(), lin.bias.fill_(-1e4) # a class without a training image
        lin.weight[best.classes_],lin.bias[best.classes_] = w/std,b-w@(mean/std)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if learn.model[0](learn.dls.one_batch()[0][:1].as_subclass(Tensor)).ndim==4 else []
    learn.model[1] = nn.Sequential(*pool, lin).to(learn.dls.device)
    with learn.added_cbs(cbs): learn.validate()

# ---- cases

base_lrs,layer_lrs,cells = (2e-3,5e-3,1e-2,2e-2),(1e-4,3e-4,1e-3),(3e-5,1e-4,3e-4,1e-3)
ours = {'head alone':'feature_extraction', "auto's head":[Phase(10, frozen=-1, cached=True)], 'auto':'auto', **{k:k for k in variants}}
tuned = {'fine_tune': {f'fine_tune {lr:g}':partial(fine_tune, lr) for lr in base_lrs},
    'timm': {f'timm {lr:g}':partial(layer_decay, lr, .75, True, .1) for lr in layer_lrs},
    'slice': {f'slice {lr:g}':partial(lp_slice, lr) for lr in cells}}
fixed = {'logistic':logistic, 'fine_tune lr_find':fine_tune_found, 'autogluon':partial(layer_decay, 1e-4, .9, False, .1), 'prodigy':prodigy, 'finetuning-scheduler':fts}
cases = ['clipart-lite0-160-600-10','elpv-lite0-160-600-10','fashion-lite0-160-600-10']

def compare(case, strategies, seeds):
    "The comparison of `case`, with the fits of `strategies` in it"
    data,arch,size,n_train,n_epoch = case.split('-')
    make,fname = partial(learner, data, arch, int(size), int(n_train)),out/f'{case}.json'
    c = compare_strategies(make, strategies, int(n_epoch), seeds, reference=next(iter(strategies)), monitor='accuracy', fname=fname, score=partial(scores, data), bar=False)
    c.info.update(machine=machine(), case=case, threads=1)
    c.save(fname)
    print(case, c.table('test')[['seeds','failed','test','train_s']].round(3).to_string(), sep='\n', flush=True)
    return c

def best(c, knobs):
    "Which of `knobs` is best on the validation images of the first seed"
    def _valid(name): return next((j['score']['valid'] for j in c.jobs if j['strategy']==name and j['seed']==0 and not j['error']), 0.)
    return max(knobs, key=_valid)

def run(case, only, seeds):
    "What `only` names of case `case`: ours and the peers without a knob on all seeds; those with one on the first, and the best on all"
    plain = {k:v for k,v in {**ours,**fixed}.items() if k in only}
    if plain: compare(case, plain, seeds)
    for k in [o for o in tuned if o in only]:
        c = compare(case, tuned[k], 1)
        name = best(c, tuned[k])
        if seeds>1: compare(case, {name:tuned[k][name]}, seeds)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('cases', nargs='*', metavar='CASE', help=f'such as {cases[0]}')
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--jobs', type=int, default=2)
    everyone = [*ours,*tuned,*fixed]
    ap.add_argument('--only', nargs='+', choices=everyone, default=everyone)
    args = ap.parse_args()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with joblib.parallel_config(n_jobs=args.jobs):
        for o in args.cases or cases: run(o, args.only, args.seeds)

if __name__=='__main__':
    from bench_tuned import main as _main # by its name, so that other processes find what it pickles
    _main()
