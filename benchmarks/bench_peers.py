"""Ways to fine-tune one pretrained model: ours, fastai's, Lightning's and a loop by hand, from the same weights on the same images

    python benchmarks/bench_peers.py [--runs 5] [--n-train 600] [--head-epochs 1] [--epochs 3] [--out benchmarks/results/peers.json]

EfficientNet-Lite0 with its ImageNet weights and fastai's head, on the clip art at 64 px, on one thread: first epochs for the head alone, then epochs for all.
Each run of each contestant is a process of its own, the contestants in turn. All read fastai's `DataLoaders`, so decoding and augmentation cost the same.
Each freezes and thaws as its own documentation shows. What has no rates of its own gets fastai's 2e-3 for the head, and a tenth of it for the body where
layers do not decay; nobody's rates were tuned for these images, so accuracies show that all of them train, not who is best.
`limit` is what the machine cannot do without: decoding, forward and backward passes, and no optimiser. Memory is read from `/proc`, so this needs Linux.
"""
import argparse,ctypes,gc,hashlib,json,os,statistics,subprocess,sys,tempfile,time,warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch,torch.nn.functional as F
from fastai.vision.all import Callback,Learner,OptimWrapper,accuracy,apply_init,nn,set_seed

from fastai_discriminative.cli import _parser
from fastai_discriminative.jobs import _Job
from fastai_discriminative.demo import clipart_path,folder_images,lite0_weights
from bench_step import machine

arch,head_lr,body_ratio = 'tf_efficientnet_lite0',2e-3,.1
now = time.perf_counter

def plain_tensors(b): return [o.as_subclass(torch.Tensor) for o in b]

class Clock(Callback):
    "Seconds of training and of validation, and the accuracy, of each epoch over any number of fits"
    order = -20 # before all others, so that their work counts
    def __init__(self): self.rows = []
    def before_train(self): self.t = now()
    def after_train(self): self.rows.append(dict(train_s=now()-self.t))
    def before_validate(self): self.t = now()
    def after_validate(self): self.rows[-1]['valid_s'] = now()-self.t
    def after_fit(self):
        vals = self.recorder.values
        for r,v in zip(self.rows[-len(vals):], vals): r['accuracy'] = float(v[-1])

def clocked(learn, f):
    "A function that runs `f` in silence and returns the rows of a `Clock`"
    def _fit():
        clock = Clock()
        with learn.no_bar(), learn.no_logging(), learn.added_cbs(clock): f()
        return clock.rows
    return _fit

def ours(learn, a, fast=False):
    "`discriminative_learner` at its preset's rates; the head trains on features computed once"
    from fastai_discriminative.features import CachedFeatures
    def _f():
        if fast: learn.to_fast()
        learn.fit_one_cycle(a.head_epochs, 'preset', cbs=CachedFeatures())
        learn.unfreeze()
        learn.fit_one_cycle(a.epochs, 'preset')
    return clocked(learn, _f)

def stock(learn, a):
    "`vision_learner` and `fine_tune`, nothing changed"
    return clocked(learn, lambda: learn.fine_tune(a.epochs, freeze_epochs=a.head_epochs))

def layer_decay_groups(model, decay=.75, wd=.01):
    "timm's groups for the body, one step below the head's; timm passes over what is frozen"
    from timm.optim import param_groups_layer_decay,param_groups_weight_decay
    body = param_groups_layer_decay(model[0].model, weight_decay=wd, layer_decay=decay)
    for g in body: g['lr_scale'] *= decay
    head = param_groups_weight_decay(model[1], weight_decay=wd)
    return body+[dict(g, lr_scale=1.) for g in head],len(head)

def layer_decay(learn, a):
    "fastai's loop and freeze, timm's layer decay, torch's AdamW"
    learn.unfreeze() # timm passes over what is frozen
    groups,n_head = layer_decay_groups(learn.model)
    scales,wd = [g['lr_scale'] for g in groups],[g['weight_decay'] for g in groups]
    adamw,split = partial(OptimWrapper, opt=torch.optim.AdamW),lambda m: [g['params'] for g in groups]
    learn = Learner(learn.dls, learn.model, opt_func=adamw, splitter=split, metrics=accuracy)
    def _f():
        learn.freeze_to(-n_head)
        learn.fit_one_cycle(a.head_epochs, [head_lr*o for o in scales], wd=wd)
        learn.unfreeze()
        learn.fit_one_cycle(a.epochs, [head_lr/2*o for o in scales], wd=wd)
    return clocked(learn, _f)

def lightning_module(learn, a):
    "The model as Lightning's: AdamW for the head and one cosine over all steps, which layers that thaw later join"
    import lightning.pytorch as pl
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone,self.head = learn.model
        def forward(self, x): return self.head(self.backbone(x))
        def training_step(self, b, i):
            x,y = plain_tensors(b)
            return F.cross_entropy(self(x), y)
        def validation_step(self, b, i):
            x,y = plain_tensors(b)
            self.log('accuracy', (self(x).argmax(1)==y).float().mean(), batch_size=len(y))
        def configure_optimizers(self):
            opt = torch.optim.AdamW(self.head.parameters(), lr=head_lr)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, (a.head_epochs+a.epochs)*len(learn.dls.train))
            return dict(optimizer=opt, lr_scheduler=dict(scheduler=cosine, interval='step'))
    return Net()

def lightning_clock():
    "`Clock` for Lightning, which validates within the training epoch"
    import lightning.pytorch as pl
    class LightningClock(pl.Callback):
        rows = []
        def on_train_epoch_start(self, trainer, net): self.t = now()
        def on_validation_start(self, trainer, net):
            self.rows.append(dict(train_s=now()-self.t))
            self.t = now()
        def on_validation_end(self, trainer, net): self.rows[-1].update(valid_s=now()-self.t, accuracy=float(trainer.callback_metrics['accuracy']))
    return LightningClock()

def lightning(learn, a, callbacks):
    "Lightning's `Trainer`, with the callbacks that `callbacks` makes of `a` and a temporary folder"
    import lightning.pytorch as pl
    learn.unfreeze() # the callbacks freeze
    net,clock,tmp = lightning_module(learn, a),lightning_clock(),tempfile.TemporaryDirectory()
    cbs = [clock, *callbacks(a, tmp.name)] # the clock first, so that the others' work counts
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp.name)
    if callbacks is not fts: quiet['enable_checkpointing'] = False
    trainer = pl.Trainer(accelerator='cpu', devices=1, max_epochs=a.head_epochs+a.epochs, callbacks=cbs, **quiet)
    def _fit():
        trainer.fit(net, learn.dls.train, learn.dls.valid)
        tmp.cleanup()
        return clock.rows
    return _fit

def fts(a, tmp):
    "FinetuningScheduler in two phases; it insists on a checkpoint callback, which here saves nothing, and restores nothing"
    from finetuning_scheduler import FTSCheckpoint,FinetuningScheduler
    head = dict(params=['head.*'], max_transition_epoch=a.head_epochs)
    body = dict(params=['backbone.*'], lr=head_lr*body_ratio, max_transition_epoch=a.head_epochs+a.epochs)
    sched = FinetuningScheduler(ft_schedule={0:head, 1:body}, epoch_transitions_only=True, restore_best=False, log_dir=tmp)
    return [sched, FTSCheckpoint(dirpath=tmp, monitor='accuracy', mode='max', save_top_k=0)]

def backbone(a, tmp):
    "Lightning's own callback, at its defaults"
    from lightning.pytorch.callbacks import BackboneFinetuning
    return [BackboneFinetuning(unfreeze_backbone_at_epoch=a.head_epochs, backbone_initial_ratio_lr=body_ratio)]

def plain_epoch(learn, opt, sched):
    "One epoch by hand, as a row; the body stays in eval mode, so that its BatchNorm costs what ours costs"
    (body,head),start = learn.model,now()
    body.eval(), head.train()
    for b in learn.dls.train:
        x,y = plain_tensors(b)
        F.cross_entropy(learn.model(x), y).backward()
        opt.step()
        sched.step()
        opt.zero_grad()
    mid,right = now(),0
    head.eval()
    with torch.no_grad():
        for b in learn.dls.valid:
            x,y = plain_tensors(b)
            right += (learn.model(x).argmax(1)==y).sum().item()
    return dict(train_s=mid-start, valid_s=now()-mid, accuracy=right/len(learn.dls.valid_ds))

def plain(learn, a):
    "The floor: a loop by hand, fused AdamW, one cycle for the head and one for everything"
    body,head = learn.model
    def _phase(epochs, mods, lrs):
        opt = torch.optim.AdamW([dict(params=list(m.parameters())) for m in mods], fused=True)
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, lrs, total_steps=epochs*len(learn.dls.train))
        return [plain_epoch(learn, opt, sched) for _ in range(epochs)]
    def _fit():
        body.requires_grad_(False)
        rows = _phase(a.head_epochs, [head], [head_lr])
        body.requires_grad_(True)
        return rows+_phase(a.epochs, [body,head], [head_lr/2*body_ratio, head_lr/2])
    return _fit

contestants = dict(ours=ours, ours_fast=partial(ours, fast=True), fastai=stock, fastai_layer_decay=layer_decay,
    lightning_fts=partial(lightning, callbacks=fts), lightning_backbone=partial(lightning, callbacks=backbone), plain=plain)

def seconds(f, n=1):
    "Median of `n` calls of `f`"
    res = []
    for _ in range(n):
        start = now()
        f()
        res.append(now()-start)
    return statistics.median(res)

def limit(learn, a):
    "Seconds that no way to train can save: without augmentation, without an optimiser, on a batch in memory where that is said"
    learn.unfreeze()
    (body,_),dls = learn.model,learn.dls
    body.eval() # the head trains, the body's BatchNorm rests
    x,y = plain_tensors(dls.train.one_batch())
    every = dls.test_dl(list(dls.train_ds.items)+list(dls.valid_ds.items))
    def _step():
        F.cross_entropy(learn.model(x), y).backward()
        learn.model.zero_grad()
    def _all():
        for (o,) in every: body(o.as_subclass(torch.Tensor))
    n,n_all = len(dls.train),len(every)
    with torch.no_grad():
        body(x) # the first pass of a process is slower
        res = dict(features_s=seconds(_all), features_in_memory_s=seconds(lambda: body(x), 10)*n_all)
    _step()
    return dict(res, steps_in_memory_s=seconds(_step, 10)*n*a.epochs, load_epoch_s=seconds(lambda: list(dls.train)), batches=n, batches_all=n_all)

def start_learner(name, a):
    "A learner with random numbers as after `a.seed`: the order of images and the head's weights are alike for all"
    args = _parser().parse_args(['demo', '--n-train', str(a.n_train), '--threads', '1'])
    job = _Job(args, folder_images(clipart_path(), verify=False), arch, lite0_weights())
    set_seed(a.seed)
    learn = job.ours() if name.startswith('ours') else job.stock()
    set_seed(a.seed) # builders draw different numbers
    apply_init(learn.model[1], nn.init.kaiming_normal_)
    return learn

def digest(model):
    "A name for the weights of `model`"
    res = hashlib.sha1()
    for k,v in sorted(model.state_dict().items()): res.update(k.encode()+v.numpy().tobytes())
    return res.hexdigest()[:8]

def memory_mb(key): return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key)).split()[1])/1024

def one(name, a):
    "One run in this process"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    learn = start_learner(name, a)
    if name=='limit': return limit(learn, a)
    res,fit = dict(start=digest(learn.model)),contestants[name](learn, a)
    set_seed(a.seed)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0) # else memory that was freed before and is used again would not count
    before = memory_mb('VmRSS')
    Path('/proc/self/clear_refs').write_text('5') # Linux: the peak starts anew
    start = now()
    rows = fit()
    return dict(res, fit_s=now()-start, peak_mb=memory_mb('VmHWM')-before, epochs=rows)

def spawn(name, seed, a):
    "One run in a process of its own; an error is a result as well"
    cmd = [sys.executable, __file__, '--one', name, '--seed', seed, '--n-train', a.n_train, '--head-epochs', a.head_epochs, '--epochs', a.epochs]
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONWARNINGS='ignore')
    r,who = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, env=env),dict(name=name, seed=seed)
    return dict(who, error=r.stderr.strip()[-400:]) if r.returncode else dict(who, **json.loads(r.stdout.splitlines()[-1]))

def figures(r, a):
    "What is compared of run `r`; `other_s` is neither training nor validation: features, set-up"
    train,valid,acc = [[o[k] for o in r['epochs']] for k in ('train_s','valid_s','accuracy')]
    thawed = {k:statistics.median(v[a.head_epochs:]) for k,v in dict(full_s=train, valid_s=valid).items()}
    whole = dict(other_s=r['fit_s']-sum(train+valid), fit_s=r['fit_s'], peak_mb=r['peak_mb'], accuracy=acc[-1], n_epochs=len(acc))
    return dict(head_first_s=train[0], head_last_s=train[a.head_epochs-1], **thawed, **whole)

def ratios(by, peers):
    "Medians of the ratios between figures of the same seed"
    pairs = [(o, peers[s]) for s,o in by.items() if s in peers]
    keys = ('head_first_s','head_last_s','full_s','fit_s','peak_mb')
    return {k:statistics.median(o[k]/p[k] for o,p in pairs) for k in keys if pairs and all(p[k] for _,p in pairs)}

def medians(rows): return {k:statistics.median(o[k] for o in rows) for k in rows[0]}

def summary(runs, a):
    "For each contestant medians, mean accuracy, and ratios to fastai's and to the loop by hand; medians for `limit`"
    good,res = [r for r in runs if 'error' not in r],{}
    figs = {n:{r['seed']:figures(r, a) for r in good if r['name']==n} for n in contestants}
    for n,by in figs.items():
        if not by: continue
        res[n] = dict(medians(list(by.values())), accuracy=statistics.mean(o['accuracy'] for o in by.values()))
        res[n].update({f'ratio_to_{p}':ratios(by, figs[p]) for p in ('fastai','plain')})
    limits = [{k:v for k,v in r.items() if k not in ('name','seed')} for r in good if r['name']=='limit']
    if limits: res['limit'] = medians(limits)
    return res

def rounded(o):
    "`o` with floats of four digits"
    if isinstance(o, dict): return {k:rounded(v) for k,v in o.items()}
    if isinstance(o, list): return list(map(rounded, o))
    return round(o, 4) if isinstance(o, float) else o

def table(res):
    "The summary as text; the last columns are ratios of `fit_s`"
    cols = 'head_first_s head_last_s full_s valid_s other_s fit_s peak_mb accuracy n_epochs'.split()
    def _ratio(n, p): return res[n][f'ratio_to_{p}'].get('fit_s', float('nan'))
    rows = [[n]+[f'{res[n][c]:.3f}' for c in cols]+[f'{_ratio(n, p):.2f}' for p in ('fastai','plain')] for n in contestants if n in res]
    lines = [['']+cols+['/fastai','/plain']]+rows
    return '\n'.join(f'{l[0]:18}'+''.join(f'{o:>13}' for o in l[1:]) for l in lines)+f"\nlimit: {res.get('limit')}"

def main(a):
    "All runs, the table and the file"
    runs = []
    for seed in range(a.runs):
        for name in [*contestants,'limit']:
            runs.append(spawn(name, seed, a))
            r = runs[-1]
            print(seed, name, r['error'] if 'error' in r else f"{r['fit_s']:.1f} s" if 'fit_s' in r else 'done', flush=True)
    starts = {(r['seed'], r['start']) for r in runs if 'start' in r}
    res,pkgs = rounded(summary(runs, a)),{o:version(o) for o in ('torchvision','lightning','finetuning-scheduler')}
    settings = {k:getattr(a, k) for k in ('runs','n_train','head_epochs','epochs')}
    settings.update(arch=arch, data='clip art', size=64, bs=32, head_lr=head_lr, body_ratio=body_ratio, same_start=len(starts)==len({s for s,_ in starts}))
    print(table(res))
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(dict(machine={**machine(), **pkgs}, settings=settings, summary=res, runs=rounded(runs)), indent=1)+'\n')

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--runs', type=int, default=5)
    ap.add_argument('--n-train', type=int, default=600)
    ap.add_argument('--head-epochs', type=int, default=1)
    ap.add_argument('--epochs', type=int, default=3)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'peers.json')
    ap.add_argument('--one', help='run this contestant in this process and print a line of JSON')
    ap.add_argument('--seed', type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    if args.one: print(json.dumps(rounded(one(args.one, args))))
    else: main(args)
