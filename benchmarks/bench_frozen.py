"""What a frozen body costs: one step and its memory, in fastai's `vision_learner` and in ours, and an epoch of the head on cached features

    python benchmarks/bench_frozen.py [--runs 5] [--bs 8] [--px 128] [--archs NAME ...] [--steps 10] [--n-train 600] [--out benchmarks/results/frozen.json]

Each figure comes from a process of its own, on the CPU and one thread; the contestants take turns, `runs` times, so that a slow moment of the machine hits
all of them, and ratios are taken within a run. A step is one in a real `learn.fit`, from the start of the batch until its gradients are dropped. Peak memory
is what the fit needs above what the process held before it. 1 MB is 2**20 bytes. Weights are random; a body in quarters is ours with a group for each block.
`epoch` has real images and weights; fastai's epoch is its second frozen one there, so that neither side pays for its first batches. The first epoch on cached
features has their building, `build_s`, in it.
"""
import argparse,ctypes,gc,json,os,statistics,subprocess,sys,time,traceback,warnings
from functools import wraps
from pathlib import Path

import torch
from fastai.vision.all import *

from fastai_discriminative.all import *
from bench_step import machine

archs = ['resnet50', 'convnext_tiny', 'vit_small_patch16_224']
quarters = [0, .25, .5, .75, 1]

def spawn(script, spec, launch=(), timeout=1800):
    "What `script` prints for `spec`, in a process of its own on one thread; with `launch`, a module that starts several"
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='')
    r = subprocess.run([sys.executable, *launch, script, '--worker', json.dumps(spec)], capture_output=True, text=True, env=env, timeout=timeout)
    res = [o for o in r.stdout.splitlines() if o.startswith('{')]
    if not res: raise RuntimeError(f'{spec}\n{r.stderr[-3000:]}')
    return json.loads(res[-1])

def work(spec, tasks):
    "Run the task that `spec` names, and print its result, or what went wrong, for `spawn`"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    set_seed(42)
    try: res = tasks[spec.pop('task')](**spec)
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        print('\n'+json.dumps(dict(error=f'{type(e).__name__}: {e} ({Path(at.filename).name}, line {at.lineno})')), flush=True)
        raise
    print('\n'+json.dumps(rounded(res)), flush=True)

def rounded(o):
    "`o` with its floats rounded to 4 significant digits"
    if isinstance(o, float): return float(f'{o:.4g}')
    if isinstance(o, dict): return {k:rounded(v) for k,v in o.items()}
    return [rounded(v) for v in o] if isinstance(o, list) else o

def status_mb(key): return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(f'{key}:')).split()[1])/1024

class Peak:
    "Within, the peak of this process's memory above what it held before, in `mb`"
    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0) # else memory that was freed and is used again would not be counted
        Path('/proc/self/clear_refs').write_text('5') # VmHWM starts anew
        self.base = status_mb('VmRSS')
        return self
    def __exit__(self, *args): self.mb = status_mb('VmHWM')-self.base

def timed(o, name):
    "Let method `name` of `o`, an object or a class, note its seconds in the list that is returned"
    f,res = getattr(o, name),[]
    @wraps(f)
    def _f(*args, **kwargs):
        start = time.perf_counter()
        try: return f(*args, **kwargs)
        finally: res.append(time.perf_counter()-start)
    setattr(o, name, _f)
    return res

def memory_dls(n, n_valid, bs, px, n_out=10):
    "Random images and labels that are there already, so that no decoding is timed"
    xs,ys = torch.randn(n+n_valid, 3, px, px),torch.randint(0, n_out, (n+n_valid,))
    ds = [(TensorImage(x), TensorCategory(y)) for x,y in zip(xs, ys)]
    dls = DataLoaders.from_dsets(ds[:n], ds[n:], bs=bs, num_workers=0)
    dls.c = n_out
    return dls

def make_learner(how, dls, arch, px=None, n_groups=None, **kwargs):
    "A learner with random weights: `how` is 'fastai' or 'ours'"
    kwargs = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), normalize=False, **kwargs)
    if 'vit' in arch: kwargs['img_size'] = px
    if how=='fastai': return vision_learner(dls, arch, **kwargs)
    return discriminative_learner(dls, arch, n_groups, train_norm='group', **kwargs)

def quiet_fit(learn, *args, one_cycle=False, **kwargs):
    "`learn.fit` or `learn.fit_one_cycle` without a word"
    with learn.no_logging(), learn.no_bar(): (learn.fit_one_cycle if one_cycle else learn.fit)(*args, **kwargs)

class StepClock(Callback):
    "Seconds of each training batch, from its start until its gradients are dropped"
    order = -1000 # before all others, so that what they do at the start of a batch is counted
    def __init__(self): self.secs = []
    def before_batch(self): self.start = time.perf_counter()
    def after_batch(self):
        if self.training: self.secs.append(time.perf_counter()-self.start)
    @property
    def ms(self): return statistics.median(self.secs[2:] or self.secs)*1e3 # the first batches fill caches

class SavedBytes(Callback):
    "Count what autograd keeps of one forward pass for the backward pass: each storage once, no parameters, no buffers; then end the fit"
    order = 1000
    def before_batch(self):
        own,kept = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())},{}
        def _keep(t): kept[t.untyped_storage().data_ptr()] = t.untyped_storage() # held, so that no other gets its address
        with torch.autograd.graph.saved_tensors_hooks(_keep, noop): self.learn.loss_func(self.model(*self.xb), *self.yb)
        self.mb = sum(s.nbytes() for p,s in kept.items() if p not in own)/2**20
        raise CancelFitException

def step(how, arch, share, bs, px, steps, n_groups=None):
    "One point: the step of a learner with the first `share` of its body's groups frozen"
    learn = make_learner(how, memory_dls(bs*steps, bs, bs, px), arch, px, n_groups)
    if learn.opt is None: learn.create_opt()
    n = len(learn.opt.param_lists)
    learn.freeze_to(round(share*(n-1)))
    clock,saved = StepClock(),SavedBytes()
    with Peak() as peak: quiet_fit(learn, 1, 1e-4, cbs=clock)
    quiet_fit(learn, 1, 1e-4, cbs=saved)
    return dict(ms=clock.ms, peak_mb=peak.mb, saved_mb=saved.mb, n_found=n, n_frozen=learn.opt.frozen_idx)

def step_specs(archs, bs, px, steps):
    "All points, contestants beside each other"
    for arch in archs:
        base = dict(task='step', arch=arch, bs=bs, px=px, steps=steps)
        for share in (1, 0):
            for how in ('fastai', 'ours'): yield dict(base, how=how, share=share)
        for share in quarters: yield dict(base, how='ours', share=share, n_groups='block')

def epoch(how, n_train, epochs):
    "Seconds of building features, and of the epochs in which its head trains; `how` is 'fastai', 'ours' or 'cached'"
    from fastai_discriminative.cli import _parser
    from fastai_discriminative.jobs import _Job
    from fastai_discriminative.demo import clipart_path,folder_images,lite0_weights
    a = _parser().parse_args(['demo', '--size', '64', '--bs', '32', '--n-train', str(n_train)])
    job,build = _Job(a, folder_images(clipart_path(), verify=False), 'tf_efficientnet_lite0', lite0_weights()),[]
    learn = job.stock() if how=='fastai' else job.ours()
    lr,cbs = () if how=='fastai' else ('preset',),[]
    if how=='cached':
        from fastai_discriminative.features import CachedFeatures
        cbs = [CachedFeatures()]
        build = timed(cbs[0], '_look')
    train,valid,fit = timed(learn, '_do_epoch_train'),timed(learn, '_do_epoch_validate'),timed(learn, 'fit')
    quiet_fit(learn, epochs, *lr, one_cycle=True, cbs=cbs)
    return dict(build_s=build[0] if build else 0., train_s=train, valid_s=valid, fit_s=sum(fit), accuracy=[float(o[-1]) for o in learn.recorder.values])

def epoch_specs(n_train, **epochs): return [dict(task='epoch', how=how, n_train=n_train, epochs=n) for how,n in epochs.items()]

def try_spawn(script, spec, **kwargs):
    "`spawn`, or the last words of what failed"
    try: return spawn(script, spec, **kwargs)
    except (RuntimeError, subprocess.TimeoutExpired) as e: return dict(error=str(e).strip().splitlines()[-1][:300])

def measure(script, specs, runs, launch=lambda spec: ()):
    "Rows with the settings and figures of each of `specs`, in turn, `runs` times"
    for run in range(runs):
        for spec in specs:
            row = dict(spec, run=run, **try_spawn(script, spec, launch=launch(spec)))
            print(row, flush=True)
            yield row

def medians(rows, *keys): return {k: round(statistics.median(o[k] for o in rows), 3) for k in keys}

def paired(over, under, key):
    "`key` of `over` in units of `under`'s, run by run: median and extremes"
    base = {o['run']: o[key] for o in under}
    r = [o[key]/base[o['run']] for o in over if o['run'] in base]
    return dict(median=round(statistics.median(r), 3), min=round(min(r), 3), max=round(max(r), 3))

def step_summary(rows):
    "Medians and paired ratios for each architecture"
    keys,res = ('ms','peak_mb','saved_mb'),{}
    for arch in dict.fromkeys(o['arch'] for o in rows):
        of = lambda how,share,n_groups=None: [o for o in rows if (o['arch'],o['how'],o['share'],o.get('n_groups'))==(arch,how,share,n_groups)]
        res[arch] = d = {}
        for name,share in (('frozen',1), ('unfrozen',0)):
            stock,ours = of('fastai', share),of('ours', share)
            d[name] = dict(fastai=medians(stock, *keys), ours=medians(ours, *keys), speedup=paired(stock, ours, 'ms'), memory=paired(ours, stock, 'peak_mb'))
        parts = [of('ours', s, 'block') for s in quarters]
        d['quarters'] = [dict(share=s, n_frozen=o[0]['n_frozen'], n_groups=o[0]['n_found'], **medians(o, *keys)) for s,o in zip(quarters, parts)]
        d['falls'] = {k: all(a[k]>b[k] for a,b in zip(d['quarters'], d['quarters'][1:])) for k in keys}
    return res

def epoch_summary(rows):
    "Medians over runs, and fastai's frozen epoch in units of ours"
    res,later = {},lambda xs: statistics.median(xs[1:] or xs)
    for r in rows:
        r.update(first_train_s=r['train_s'][0], later_train_s=later(r['train_s']), later_epoch_s=later([a+b for a,b in zip(r['train_s'], r['valid_s'])]))
        r['last'] = r['accuracy'][-1]
    of = {how: [o for o in rows if o['how']==how] for how in dict.fromkeys(o['how'] for o in rows)}
    for how,rs in of.items():
        res[how] = medians(rs, 'build_s', 'first_train_s', 'later_train_s', 'later_epoch_s', 'fit_s', 'last')
        if how!='fastai': res[how].update(speedup_train=paired(of['fastai'], rs, 'later_train_s'), speedup_epoch=paired(of['fastai'], rs, 'later_epoch_s'))
    return res

def parse():
    "Arguments of the command line"
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--runs', type=int, default=5)
    ap.add_argument('--bs', type=int, default=8)
    ap.add_argument('--px', type=int, default=128)
    ap.add_argument('--steps', type=int, default=10)
    ap.add_argument('--archs', nargs='*', default=archs)
    ap.add_argument('--n-train', type=int, default=600)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'frozen.json')
    ap.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
    return ap.parse_args()

def write(path, res):
    "Write `res` as JSON"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(res, indent=1)+'\n')

def main(args):
    "Measure everything, and write it"
    rows = list(measure(__file__, list(step_specs(args.archs, args.bs, args.px, args.steps)), args.runs))
    epochs = list(measure(__file__, epoch_specs(args.n_train, fastai=2, ours=2, cached=4), args.runs))
    torch.set_num_threads(1)
    res = dict(machine=machine(), runs=args.runs, bs=args.bs, px=args.px, steps=args.steps, n_train=args.n_train, summary={}, rows=rows, epochs=epochs)
    write(args.out, res) # before anything can go wrong with a summary
    ok = lambda rs: [o for o in rs if 'error' not in o]
    res['summary'] = dict(step=step_summary(ok(rows)), epoch=epoch_summary(ok(epochs)), errors=[o for o in rows+epochs if 'error' in o])
    write(args.out, res)
    print(json.dumps(res['summary'], indent=1))

if __name__=='__main__':
    args = parse()
    if args.worker: work(args.worker, dict(step=step, epoch=epoch))
    else: main(args)
