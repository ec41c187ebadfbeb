"""Cost of one optimiser step: fastai's `Adam`, torch's AdamW through `OptimWrapper`, and `fused_adamw`; and of schedule and recorder in a real fit

    python benchmarks/bench_step.py [--runs 7] [--steps 5] [--out benchmarks/results/step.json]

Medians over `runs`; each run times `steps` steps with gradients in place, the optimisers in turn, so that a slow moment of the machine hits all of them.
`hypers_us` is what a schedule costs a batch: set `lr` (one a group) and `mom`, hand them to torch, read both back. `schedule` is what fastai's `ParamScheduler` and
`Recorder` take a batch in `fit_one_cycle` with 40 groups, in a learner that was split and in one that was not: in a tiny network, and in one that fills the caches;
and what they take when they are called a thousand times on end, `loop_us`.
"""
import argparse,json,os,platform,statistics,time
from functools import partial
from pathlib import Path

import fastai.callback.schedule,numpy as np,timm,torch
from fastai.basics import *
from fastai.optimizer import Adam,OptimWrapper

from fastai_discriminative.groups import layer_groups
from fastai_discriminative.learner import TrueFreeze # with `Learner.split`
from fastai_discriminative.optimizer import fused_adamw

archs = ['convnext_tiny', 'resnet50', 'vit_small_patch16_224', 'tf_efficientnet_lite0']
wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
opts = dict(fastai_adam=Adam, wrapper_adamw=wrapped, wrapper_adamw_fused=partial(wrapped, fused=True), ours=fused_adamw)

def one_run(opt, steps):
    "Milliseconds a step"
    start = time.perf_counter()
    for _ in range(steps): opt.step()
    return (time.perf_counter()-start)/steps*1e3

def hypers_us(opt, n=200):
    "Microseconds for what `ParamScheduler`, `step` and `Recorder` do with hyper-parameters in one batch"
    lrs = np.linspace(1e-6, 1e-4, len(opt.param_lists))
    sync,res = getattr(opt, '_sync', lambda: None),[]
    for i in range(n):
        start = time.perf_counter()
        opt.set_hyper('lr', lrs*(1+i/n))
        opt.set_hyper('mom', 0.9-i/(10*n))
        sync()
        opt.hypers[-1]['lr'],opt.hypers[-1]['mom'],opt.hypers[-1]['lr']
        res.append((time.perf_counter()-start)*1e6)
    return statistics.median(res)

def bench(arch, n_groups, runs, steps):
    "One row: medians for each optimiser on copies of the same groups"
    m = timm.create_model(arch, num_classes=10)
    groups = layer_groups(m, n_groups)(m)
    for p in m.parameters(): p.grad = torch.randn_like(p)*1e-3
    made = {k: f(list(groups) if k!='ours' else groups, lr=1e-6) for k,f in opts.items()}
    for o in made.values(): one_run(o, 2)
    times = {k: [] for k in made}
    for _ in range(runs):
        for k,o in made.items(): times[k].append(one_run(o, steps))
    ms,spread = {k: round(statistics.median(v), 3) for k,v in times.items()},{k: [round(min(v), 3), round(max(v), 3)] for k,v in times.items()}
    return dict(arch=arch, n_groups=len(groups), n_tensors=sum(map(len, groups)), ms=ms, spread_ms=spread,
        speedup_vs_fastai=round(ms['fastai_adam']/ms['ours'], 2), speedup_vs_wrapper=round(ms['wrapper_adamw']/ms['ours'], 2),
        vs_wrapper_fused=round(ms['ours']/ms['wrapper_adamw_fused'], 2), hypers_us={k: round(hypers_us(o), 1) for k,o in made.items()})

class Chain(nn.Module):
    "Forty small layers: all that a batch takes is overhead"
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3,3) for _ in range(40))
    def forward(self, x):
        x = x.mean((2,3))
        for o in self.layers: x = o(x)
        return x

class Meter(Callback):
    "Seconds of each call of the scheduler's and the recorder's methods, in `secs`; and of all three again and again within one batch, in `loop_us`"
    order = 1000
    def before_fit(self):
        calls = (self.param_scheduler,'before_batch'), (self.param_scheduler,'after_batch'), (self.recorder,'after_batch')
        self.methods = [getattr(o, n) for o,n in calls]
        self.secs = [self._timed(o, n) for o,n in calls]
    def after_batch(self, n=1000):
        if not self.training or self.iter!=self.n_iter-1: return
        start = time.perf_counter()
        for _ in range(n):
            for f in self.methods: f()
        self.loop_us = (time.perf_counter()-start)/n*1e6
    def _timed(self, o, name):
        f,res = getattr(o, name),[]
        def _f():
            start = time.perf_counter()
            f()
            if self.training: res.append(time.perf_counter()-start)
        setattr(o, name, _f)
        return res

def schedule_us(model, split, n=40, steps=60):
    "Microseconds a batch of schedule and recorder, in `n` groups"
    ds = [(TensorBase(torch.randn(3,32,32)), torch.tensor(i%3)) for i in range(2*steps)]
    dls,opt = DataLoaders(DataLoader(ds, bs=2), DataLoader(ds[:4], bs=2)),fused_adamw if split else Adam
    splitter,meter = (lambda m: list(layer_groups(m, n)(m))),Meter()
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt, splitter=splitter)
    if split: learn.split(n)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, slice(1e-6, 1e-5), cbs=meter)
    assert len(learn.opt.hypers)==n and split==any(isinstance(o, TrueFreeze) for o in learn.cbs)
    return sum(statistics.median(o) for o in meter.secs)*1e6,meter.loop_us

def bench_schedule(net, make, runs):
    "One row: medians of `runs` fits each, in turn"
    us = [[o for split in (False,True) for o in schedule_us(make(), split)] for _ in range(runs)]
    stock,stock_loop,ours,ours_loop = (round(statistics.median(o), 1) for o in zip(*us))
    times = round(statistics.median(a/b for a,_,b,_ in us), 2)
    return dict(net=net, n_groups=40, fastai_us=stock, ours_us=ours, times=times, fastai_loop_us=stock_loop, ours_loop_us=ours_loop)

def machine():
    "Where these figures were taken"
    cpu = next((o.split(':')[1].strip() for o in Path('/proc/cpuinfo').read_text().splitlines() if o.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else ''
    gpu = dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}
    return dict(cpu=cpu or platform.processor(), **gpu, cores=os.cpu_count(), threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 2),
        python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__, timm=timm.__version__)

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--runs', type=int, default=7)
    ap.add_argument('--steps', type=int, default=5)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'step.json')
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for arch in archs:
        for n in (2, 'block'):
            rows.append(bench(arch, n, args.runs, args.steps))
            print(rows[-1]['arch'], rows[-1]['n_groups'], rows[-1]['ms'], f"{rows[-1]['speedup_vs_fastai']}x", rows[-1]['hypers_us'], flush=True)
    schedule = [bench_schedule('40 small linear layers', Chain, args.runs), bench_schedule('resnet152', lambda: timm.create_model('resnet152', num_classes=4), args.runs)]
    for o in schedule: print(o)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(machine=machine(), runs=args.runs, steps=args.steps, rows=rows, schedule=schedule), indent=1)+'\n')
