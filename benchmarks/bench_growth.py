"""How time and memory grow with images, layer groups, parameters and processes

    python benchmarks/bench_growth.py [--runs 3] [--base 128] [--steps 10] [--panels NAME ...] [--out benchmarks/results/growth.json]
        [--plot benchmarks/results/growth.png] [--replot]

Each point comes from a process of its own, on the CPU and one thread, the points in turn, `runs` times; figures are medians. Images are random and in memory
already, so that no decoding is timed: `base` images times 1, 4 and 16, and a sixteenth of them to validate. Peak memory is what a fit needs above what the
process held before it; 1 MB is 2**20 bytes. An exponent is the slope of a line through the logarithms: 1 is linear growth, and a fixed part makes it smaller.
Needs `pip install accelerate` for two processes.
"""
import argparse,hashlib,json,statistics,threading,time
from pathlib import Path

import accelerate,numpy as np,torch
from fastai.distributed import *
from fastai.vision.all import *

from fastai_discriminative.all import *
from fastai_discriminative.files import written_aside
from fastai_discriminative.demo import _markers,lite0_weights
from fastai_discriminative.pictures import okabe_ito
from bench_frozen import Peak,make_learner,measure,medians,memory_dls,paired,quiet_fit,status_mb,step,timed,work,write
from bench_step import machine,one_run

lite0 = 'tf_efficientnet_lite0'
param_archs = [lite0, 'vit_small_patch16_224', 'resnet50', 'convnext_tiny']
n_groups = {lite0: [2,4,8,None,'block'], 'convnext_tiny': [2,4,8,None,'block'], 'resnet152': [2,4,8,16,40]} # the last has 52 layers to group

class AnonPeak(Peak):
    "Also the peak without pages of files, in `anon_mb`: the kernel drops those of a memory-mapped file when it needs room"
    def __enter__(self):
        super().__enter__()
        self.done,self.anon = threading.Event(),[status_mb('RssAnon')]
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self
    def _watch(self):
        while not self.done.wait(.01): self.anon.append(status_mb('RssAnon'))
    def __exit__(self, *args):
        super().__exit__(*args)
        self.done.set()
        self.thread.join()
        self.anon_mb = max(self.anon)-self.anon[0]

def lite0_learner(n, bs, px):
    "EfficientNet-Lite0 with its ImageNet weights, on random images"
    dls = memory_dls(n, max(2, n//16), bs, px)
    return discriminative_learner(dls, lite0, weights_file=lite0_weights(), loss_func=CrossEntropyLossFlat(), normalize=False)

def fit_mode(learn, mode):
    "Train as `mode` says: 'unfrozen', or the head on cached features in memory ('ram') or in files ('disk'); seconds of building and of an epoch"
    if mode=='unfrozen':
        learn.unfreeze()
        build,cbs,n = [],[],1
    else:
        from fastai_discriminative.features import CachedFeatures
        cbs,n = [CachedFeatures(**(dict(ram_gb=0) if mode=='disk' else {}))],4
        build = timed(cbs[0], '_look')
    train = timed(learn, '_do_epoch_train')
    quiet_fit(learn, n, 'preset', one_cycle=True, cbs=cbs)
    return dict(build_s=build[0] if build else 0., epoch_s=statistics.median(train[1:] or train), rows_mb=cbs[0].nbytes/2**20 if cbs else 0.)

def images(mode, n, bs, px):
    "One point: a fit with `n` training images"
    learn = lite0_learner(n, bs, px)
    with AnonPeak() as peak: res = fit_mode(learn, mode)
    return dict(res, peak_mb=peak.mb, anon_mb=peak.anon_mb)

class Meter(Callback):
    "Seconds of what scheduler, recorder and optimiser do with hyper-parameters in each batch, in `secs`"
    order = 1000
    def before_fit(self):
        sched,rec = [next(o for o in self.learn.cbs if isinstance(o, t)) for t in (ParamScheduler,Recorder)]
        self.secs = [timed(o, m) for o,m in ((sched,'before_batch'), (sched,'after_batch'), (rec,'after_batch'), (self.opt,'_sync'))]

def groups(arch, n_groups, bs, px, steps):
    "One point: what a number of groups costs in splitting, in an optimiser step and in the schedule of a real fit"
    learn = make_learner('ours', memory_dls(bs*steps, bs, bs, px), arch, px, n_groups)
    split,meter = timed(learn, 'split'),Meter()
    for _ in range(5): learn.split(n_groups)
    quiet_fit(learn, 1, 1e-5, one_cycle=True, cbs=meter)
    us = [statistics.median(o)*1e6 for o in meter.secs]
    for p in learn.model.parameters(): p.grad = torch.randn_like(p)*1e-3
    opt_ms = statistics.median(one_run(learn.opt, 1) for _ in range(steps))
    names = 'set_us','note_us','record_us','hand_on_us'
    return dict(n_found=len(learn.opt.param_lists), split_ms=statistics.median(split)*1e3, opt_ms=opt_ms, schedule_us=sum(us), **dict(zip(names, us)))

def bare(arch, bs, px, steps):
    "One point: the same model in a loop of its own, forward and backward, without and with torch's fused AdamW"
    learn = make_learner('ours', memory_dls(bs, bs, bs, px), arch, px)
    m,(x,y) = learn.model.train(),learn.dls.train.one_batch()
    opt,bare_s,loop_s = torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),[],[]
    for _ in range(steps):
        start = time.perf_counter()
        learn.loss_func(m(x), y).backward()
        bare_s.append(time.perf_counter()-start)
        opt.step()
        opt.zero_grad()
        loop_s.append(time.perf_counter()-start)
    return dict(bare_ms=statistics.median(bare_s[2:])*1e3, loop_ms=statistics.median(loop_s[2:])*1e3, n_params=sum(p.numel() for p in m.parameters()))

def _broadcast(self, t, rank):
    "fastai's `DistributedDL._broadcast` without its `.cuda()`, which raises where there is no GPU; gloo broadcasts what is in memory"
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

def digest(tensors): return hashlib.sha1(b''.join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()

def processes(mode, n_procs, n, bs, px):
    "One point: a fit in `n_procs` processes, by fastai's `distrib_ctx`; do all end with the same weights?"
    DistributedDL._broadcast = _broadcast
    learn = lite0_learner(n, bs, px)
    with learn.distrib_ctx(sync_bn=False, cpu=True): # torch's SyncBatchNorm is for GPUs only
        with AnonPeak() as peak: res = fit_mode(learn, mode)
    assert max(1, num_distrib())==n_procs
    res.update(peak_mb=peak.mb, anon_mb=peak.anon_mb)
    if n_procs==1: return res
    seen = [None]*n_procs
    torch.distributed.all_gather_object(seen, [digest(learn.model.parameters()), digest(learn.model.buffers())])
    torch.distributed.destroy_process_group()
    return dict(res, same_params=len({o[0] for o in seen})==1, same_buffers=len({o[1] for o in seen})==1)

def launcher(spec):
    "The module that starts the processes of `spec`, if there are several: `accelerate launch --cpu` starts one only, unless there is MPI"
    n = spec.get('n_procs', 1)
    return () if n==1 else ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n))

def points(panel, base, steps):
    "Specifications of the points of `panel`"
    if panel=='images': return [dict(task=panel, mode=m, n=base*k, bs=32, px=64) for k in (1,4,16) for m in ('ram','disk','unfrozen')]
    if panel=='groups': return [dict(task=panel, arch=a, n_groups=n, bs=2, px=32, steps=2*steps) for a,ns in n_groups.items() for n in ns]
    if panel=='processes': return [dict(task=panel, mode=m, n_procs=k, n=base*4, bs=32, px=64) for m in ('unfrozen','ram','disk') for k in (1,2)]
    of = [dict(arch=a, bs=8, px=64, steps=steps) for a in param_archs]
    return [dict(o, **t) for o in of for t in (dict(task='step', how='ours', share=0), dict(task='step', how='ours', share=1), dict(task='bare'))]

def exponent(xs, ys):
    "Slope of the line through the logarithms"
    return round(float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1e-9)), 1)[0]), 3)

def by(rows, *keys):
    "Rows with the same `keys`, in order"
    res = {}
    for r in rows: res.setdefault(tuple(r[k] for k in keys), []).append(r)
    return res

def images_summary(rows):
    "For each mode the medians, and exponents of time and memory against images"
    res = {}
    for (mode,),rs in by(rows, 'mode').items():
        pts = [dict(n=n, **medians(o, 'build_s', 'epoch_s', 'peak_mb', 'anon_mb', 'rows_mb')) for (n,),o in by(rs, 'n').items()]
        xs,keys = [p['n'] for p in pts],('epoch_s','peak_mb','anon_mb') if mode=='unfrozen' else ('build_s','epoch_s','peak_mb','anon_mb','rows_mb')
        slope = {f'{k}_kb_per_image': round(float(np.polyfit(xs, [p[k]*1024 for p in pts], 1)[0]), 2) for k in ('peak_mb','anon_mb','rows_mb')}
        res[mode] = dict(points=pts, exponent={k: exponent(xs, [p[k] for p in pts]) for k in keys}, **slope)
    return res

def groups_summary(rows):
    "For each architecture the medians, and exponents against groups"
    res,keys = {},('split_ms','opt_ms','schedule_us','set_us','note_us','record_us','hand_on_us')
    for (arch,),rs in by(rows, 'arch').items():
        pts = [dict(n=n, **medians(o, *keys)) for (n,),o in by(rs, 'n_found').items()]
        res[arch] = dict(points=sorted(pts, key=lambda p: p['n']), exponent={k: exponent([p['n'] for p in pts], [p[k] for p in pts]) for k in keys[:3]})
    return res

def params_summary(rows):
    "For each architecture the medians, and time in units of the bare model's; exponents against parameters"
    pts = []
    for (arch,),rs in by(rows, 'arch').items():
        full,froz,raw = [[r for r in rs if r['task']==t and r.get('share')==s] for t,s in (('step',0), ('step',1), ('bare',None))]
        p = dict(arch=arch, n_params=raw[0]['n_params'], **medians(raw, 'bare_ms', 'loop_ms'))
        for k,o in (('unfrozen',full), ('frozen',froz)): p.update({f'{k}_{i}': v for i,v in medians(o, 'ms', 'peak_mb').items()})
        full = [dict(o, bare_ms=o['ms'], loop_ms=o['ms']) for o in full]
        pts.append(dict(p, over_bare=paired(full, raw, 'bare_ms'), over_loop=paired(full, raw, 'loop_ms')))
    pts.sort(key=lambda p: p['n_params'])
    xs = [p['n_params'] for p in pts]
    return dict(points=pts, exponent={k: exponent(xs, [p[k] for p in pts]) for k in ('unfrozen_ms','frozen_ms','bare_ms','unfrozen_peak_mb','frozen_peak_mb')})

def processes_summary(rows):
    "For each mode the medians, and how much faster two processes are"
    res,keys = {},('build_s','epoch_s','peak_mb','anon_mb')
    for (mode,),rs in by(rows, 'mode').items():
        of = {n: o for (n,),o in by(rs, 'n_procs').items()}
        res[mode] = dict(points=[dict(n=n, **medians(o, *keys)) for n,o in of.items()])
        if len(of)<2: continue
        res[mode].update(speedup=paired(of[1], of[2], 'epoch_s'), **{k: all(o[k] for o in of[2]) for k in ('same_params','same_buffers')})
    return res

summaries = dict(images=images_summary, groups=groups_summary, parameters=params_summary, processes=processes_summary)

def worse(summary, tol=1.1):
    "Names of what grows faster than linearly"
    if not isinstance(summary, dict): return []
    own = [k for k,v in summary.get('exponent', {}).items() if v>tol]
    return own + [f'{k} {o}' for k,v in summary.items() if k!='exponent' for o in worse(v, tol)]

def line(ax, i, xs, ys, label, linear=False, **kw):
    "A line in the colour and with the marker of number `i`; dashed beside it what linear growth from the first point would be"
    kw = dict(dict(color=okabe_ito[i%4], marker=_markers[i%4], lw=2, ms=6), **kw)
    ax.plot(xs, ys, label=label, **kw)
    if linear: ax.plot(xs, [ys[0]*x/xs[0] for x in xs], '--', color=kw['color'], lw=1, alpha=.6)

def plot_images(axs, s):
    "Seconds, and memory, against images"
    names = dict(ram='cached, in memory', disk='cached, in files', unfrozen='whole model')
    for i,(mode,d) in enumerate(s.items()):
        xs,get = [p['n'] for p in d['points']],lambda k: [p[k] for p in d['points']]
        if mode!='disk': line(axs[0], i, xs, get('epoch_s'), f"an epoch, {'whole model' if mode=='unfrozen' else 'head on cached features'}", True)
        if mode=='ram': line(axs[0], 1, xs, get('build_s'), 'building the cache, once', True)
        line(axs[1], i, xs, get('peak_mb'), names[mode])
        if mode=='ram': line(axs[1], 3, xs, get('rows_mb'), 'the kept features alone', True)
        if mode=='disk': line(axs[1], 1, xs, get('anon_mb'), 'cached, in files: without their pages', ls=':', lw=1.5)
    axs[0].set(title='Images: time', xlabel='training images', ylabel='seconds')
    axs[1].set(title='Images: memory', xlabel='training images', ylabel='peak above the start of the fit (MB)')

def plot_groups(ax, s):
    "Milliseconds of splitting, optimiser step and schedule against groups: a colour for each, a marker for each architecture"
    what = dict(split_ms='splitting the learner, once', opt_ms='optimiser, a step', schedule_us='schedule and recorder, a step')
    for j,(arch,d) in enumerate(s.items()):
        xs = [p['n'] for p in d['points']]
        for i,(k,v) in enumerate(what.items()):
            ys = [p[k]/(1000 if k.endswith('_us') else 1) for p in d['points']]
            line(ax, i, xs, ys, v if j==0 else None, j==len(s)-1, marker=_markers[j], lw=1.5, ms=5)
        ax.plot([], [], color='gray', marker=_markers[j], ls='', label=short_name(arch))
    ax.set(title='Layer groups', xlabel='groups', ylabel='milliseconds')

def short_name(arch): return arch.removeprefix('tf_efficientnet_').split('_patch')[0]

def plot_params(axs, s):
    "Milliseconds a step, and memory, against parameters"
    xs,get = [p['n_params']/1e6 for p in s['points']],lambda k: [p[k] for p in s['points']]
    line(axs[0], 0, xs, get('unfrozen_ms'), 'whole model', True)
    line(axs[0], 1, xs, get('bare_ms'), 'whole model: bare forward and backward', lw=1, ms=4)
    line(axs[0], 2, xs, get('frozen_ms'), 'body frozen', True)
    line(axs[1], 0, xs, get('unfrozen_peak_mb'), 'whole model', True)
    line(axs[1], 2, xs, get('frozen_peak_mb'), 'body frozen', True)
    for ax in axs:
        for p,x in zip(s['points'], xs):
            ax.text(x, .02, short_name(p['arch']), rotation=90, transform=ax.get_xaxis_transform(), fontsize=7.5, ha='center', va='bottom', color='dimgray')
    axs[0].set(title='Parameters: time', xlabel='parameters (millions)', ylabel='milliseconds a step')
    axs[1].set(title='Parameters: memory', xlabel='parameters (millions)', ylabel='peak above the start of the fit (MB)')

def plot_processes(ax, s):
    "Seconds of an epoch against processes; dashed what perfect sharing would be"
    for i,k,label in ((0,'epoch_s','an epoch, head on cached features'), (1,'build_s','building the cache, once'), (2,'epoch_s','an epoch, whole model')):
        mode = 'unfrozen' if i==2 else 'ram'
        if mode not in s: continue
        xs,ys = [p['n'] for p in s[mode]['points']],[p[k] for p in s[mode]['points']]
        line(ax, i, xs, ys, label)
        ax.plot(xs, [ys[0]/x for x in xs], '--', color=okabe_ito[i], lw=1, alpha=.6)
    ax.set(title='Processes, one thread each', xlabel='processes', ylabel='seconds', xlim=(.8,2.2), xticks=[1,2], yscale='log')

def finish(ax, dashed, below):
    "Scales, legend, and the room that these and labels need"
    from matplotlib.ticker import LogLocator,ScalarFormatter
    ax.set_yscale('log')
    if dashed=='linear growth':
        ax.set_xscale('log')
        ax.xaxis.set(major_locator=LogLocator(subs=(1,2,5)), major_formatter=ScalarFormatter(), minor_formatter='')
    ax.plot([], [], '--', color='gray', lw=1, label=dashed)
    lo,hi = ax.get_ylim()
    ax.set_ylim(lo*(lo/hi)**below, hi*(hi/lo)**.4)
    ax.grid(alpha=.25)
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False, fontsize=7.5, loc='upper left')

def plot(summary, fname):
    "All panels, as PNG"
    from matplotlib.figure import Figure
    fig = Figure(figsize=(13,8.4), layout='constrained')
    axs = list(fig.subplots(2, 3).flat)
    for k,f,o in (('images',plot_images,axs[:2]), ('processes',plot_processes,axs[2]), ('parameters',plot_params,axs[3:5]), ('groups',plot_groups,axs[5])):
        if summary.get(k): f(o, summary[k])
    for i,ax in enumerate(axs):
        if ax.lines: finish(ax, 'linear speed-up' if i==2 else 'linear growth', .45 if i in (3,4) else 0)
        else: ax.axis('off')
    fig.suptitle('How time and memory grow', fontsize=12)
    with written_aside(fname) as tmp: fig.savefig(tmp, dpi=130)

def parse():
    "Arguments of the command line"
    ap,here = argparse.ArgumentParser(description=__doc__.splitlines()[0]),Path(__file__).parent
    ap.add_argument('--runs', type=int, default=3)
    ap.add_argument('--base', type=int, default=128)
    ap.add_argument('--steps', type=int, default=10)
    ap.add_argument('--panels', nargs='*', default=list(summaries), choices=list(summaries))
    ap.add_argument('--out', type=Path, default=here/'results'/'growth.json')
    ap.add_argument('--plot', type=Path, default=here/'results'/'growth.png')
    ap.add_argument('--replot', action='store_true', help='measure nothing, summarize and plot `--out` anew')
    ap.add_argument('--worker', type=json.loads, help=argparse.SUPPRESS)
    return ap.parse_args()

def summarize(rows):
    "Medians, exponents and errors of all panels"
    res = {k: summaries[k]([o for o in v if 'error' not in o]) for k,v in rows.items()}
    return dict(res, errors=[o for v in rows.values() for o in v if 'error' in o], worse_than_linear=worse(res))

def main(args):
    "Measure all panels, and write figures and plot"
    if args.replot: res = json.loads(args.out.read_text())
    else:
        rows = {k: list(measure(__file__, points(k, args.base, args.steps), args.runs, launcher)) for k in args.panels}
        torch.set_num_threads(1)
        res = dict(machine=dict(machine(), accelerate=accelerate.__version__), runs=args.runs, base=args.base, steps=args.steps, summary={}, rows=rows)
    write(args.out, res) # before anything can go wrong with a summary
    res['summary'] = summarize(res['rows'])
    write(args.out, res)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(res['summary'], args.plot)
    print(json.dumps({k:res['summary'][k] for k in ('errors','worse_than_linear')}, indent=1))

if __name__=='__main__':
    args = parse()
    if args.worker: work(args.worker, dict(images=images, groups=groups, step=step, bare=bare, processes=processes))
    else: main(args)
