"""Does it hold on a GPU, how fast is it there, and which rates does a pretrained body need: one command of eight minutes, without a network

    python benchmarks/bench_gpu.py pack DIR                                                                       # here
    python3 DIR/bench_gpu.py run DIR --out OUT [--limit 460] [--procs 2] [--seeds 2] [--sizes 224 128 64]          # there
    python benchmarks/bench_gpu.py table OUT                # what came of it
    python benchmarks/bench_gpu.py summary OUT              # the package's `data/measured.csv`, of all cases that are there

`pack` writes what `run` needs: these scripts, the package, weights, images, wheels. The other machine has torch, torchvision, and what fastai needs besides: matplotlib, pandas,
requests, PyYAML, scikit-learn, scipy, rich, huggingface_hub. `run` does three things, each in processes of its own, so that one that fails leaves the others alone:

1. Checks, never timed: what is frozen stays as it was, the fused optimiser steps as fastai's, cached features train as images do (`OUT/checks.json`).
2. Milliseconds of a training step and of an epoch of the head, ours beside fastai's, in turn; random weights and images (`OUT/steps.json`).
3. Short fits in plain torch, images decoded once into memory, in order of interest until `limit` seconds are over (`OUT/sweep-K.jsonl`, at most four files, a line a fit as they end).

Without a GPU all is tiny, to see that it runs. What a fit is stands in `gpu_sweep.py`.
"""
import argparse,atexit,importlib,json,math,os,platform,random,shutil,statistics,subprocess,sys,tempfile,time,zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import nn
sys.path.insert(0, str(Path(__file__).parent))
from gpu_sweep import case_line,error_text,image_files,lite0,load,mean_of,work

pure = {k:None for k in ('fastai','fastcore','fasttransform','plum-dispatch','beartype','fastdownload','cloudpickle','timm')}
pure['prodigyopt'] = None
pure['fastprogress'] = '1.0.3' # the last one that does not need python-fasthtml, which needs a dozen more

# ---- pack

def pack_weights(src, dir, arch=lite0):
    "The weights in file `src`, matrices in half precision, and the depth of each parameter: 0 the stem, 1 the head"
    import timm
    from safetensors.torch import load_file,save_file
    from fastai_discriminative.all import layer_groups
    model,dir = timm.create_model(arch, num_classes=0),Path(dir)
    sd = {k:v for k,v in load_file(src).items() if k in model.state_dict()}
    model.load_state_dict(sd)
    save_file({k:(v.half() if v.is_floating_point() and v.ndim>1 else v).contiguous() for k,v in sd.items()}, dir/f'{arch}.safetensors')
    groups = layer_groups(model, 'block')
    (dir/f'{arch}.json').write_text(json.dumps({p:i/len(groups) for i,g in enumerate(groups) for p in g.param_names}))

def pack_images(src, dst, most=5000, px=224):
    "Up to `most` images of folder `src`, of at most `px` pixels"
    files = image_files(src)
    random.Random(0).shuffle(files)
    for f in files[:most]:
        im,to = Image.open(f).convert('RGB'),Path(dst)/f.parent.name/f'{f.stem}.webp'
        im.thumbnail((px,px))
        to.parent.mkdir(parents=True, exist_ok=True)
        im.save(to, quality=90)

def pack_wheels(dst):
    "What fastai and timm need that a machine with torch may lack; safetensors is the only one that is compiled"
    def _pip(*args): subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', '3.12', '-d', dst, *args], check=True)
    _pip('--implementation', 'py', '--platform', 'any', *(f'{k}=={v or version(k)}' for k,v in pure.items()))
    _pip('--implementation', 'cp', '--platform', 'manylinux2014_x86_64', f"safetensors=={version('safetensors')}")

def mib(dir): return sum(f.stat().st_size for f in Path(dir).rglob('*') if f.is_file())/2**20

def pack(a):
    "Everything that `run` needs, in `a.dir`"
    import fastai_discriminative
    from bench_data import lite0_weights,sets
    dir,src = Path(a.dir),Path(fastai_discriminative.__file__).parent
    shutil.rmtree(dir/'images', ignore_errors=True)
    shutil.rmtree(dir/'wheels', ignore_errors=True)
    dir.mkdir(parents=True, exist_ok=True)
    for f in Path(__file__).parent.glob('*.py'): shutil.copy(f, dir)
    shutil.copytree(src, dir/src.name, ignore=shutil.ignore_patterns('__pycache__'), dirs_exist_ok=True)
    pack_weights(lite0_weights(), dir)
    for k in a.images: pack_images(sets[k](), dir/'images'/k)
    pack_wheels(dir/'wheels')
    print(f'{src} and the rest: {mib(dir):.1f} MiB in {dir}')
    if mib(dir)>60: sys.exit('That is more than 60 MiB: too much to travel.')

# ---- the other machine

def reach(dir, only_wheels=False):
    "Let Python find the package in `dir`, and the wheels there if fastai or timm is missing"
    dir = Path(dir).resolve()
    if only_wheels or not (find_spec('fastai') and find_spec('timm')):
        site = tempfile.mkdtemp(prefix='bench_gpu-')
        atexit.register(shutil.rmtree, site, ignore_errors=True)
        for w in sorted((dir/'wheels').glob('*.whl')):
            if w.name.startswith('safetensors') and find_spec('safetensors'): continue # theirs is built for their Python
            with zipfile.ZipFile(w) as z: z.extractall(site)
        sys.path.insert(0, site)
    sys.path.insert(0, str(dir))
    importlib.invalidate_caches()

def sync(dev):
    if dev=='cuda': torch.cuda.synchronize()

def machine(dev):
    "Where figures were taken"
    import fastai,timm
    name = torch.cuda.get_device_name() if dev=='cuda' else 'cpu'
    return dict(device=name, python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__, timm=timm.__version__, timm_at=timm.__file__)

def noted(f, *args):
    "What `f` returns, or what went wrong"
    try: return f(*args)
    except Exception as e: return dict(ok=False, error=error_text(e))

def write(out, name, res): (Path(out)/f'{name}.json').write_text(json.dumps(res, indent=1)+'\n')

# ---- learners for checks and steps

def memory_dls(n, bs, px, dev, n_valid=None, n_out=5):
    "Random images on the device, always the same, a class brighter than the one before"
    import fastai.vision.all as fv
    fv.set_seed(0)
    n_all = n+(n_valid or n)
    ys = torch.arange(n_all)%n_out
    xs = (torch.rand(n_all,3,px,px)*.5+ys.view(-1,1,1,1)/n_out).to(dev)
    ds = [(fv.TensorImage(x), fv.TensorCategory(y)) for x,y in zip(xs, ys.to(dev))]
    dls = fv.DataLoaders.from_dsets(ds[:n], ds[n:], bs=bs, num_workers=0, device=torch.device(dev))
    dls.c = n_out
    return dls

def make_learner(how, dls, arch, px):
    "A learner with random weights, of 'fastai' or 'ours'"
    import fastai.vision.all as fv,fastai_discriminative.all as fd
    fv.set_seed(0)
    kw = dict(pretrained=False, loss_func=fv.CrossEntropyLossFlat(), normalize=False, metrics=fv.accuracy)
    if 'vit' in arch: kw['img_size'] = px
    return fv.vision_learner(dls, arch, **kw) if how=='fastai' else fd.discriminative_learner(dls, arch, train_norm='group', **kw)

def quiet(learn, f, *args, **kwargs):
    with learn.no_logging(), learn.no_bar(): f(*args, **kwargs)

def small(dev, n=None):
    "The learner of most checks, frozen"
    big = dev=='cuda'
    arch,px,bs = ('resnet50',224,32) if big else ('resnet10t',32,8)
    learn = make_learner('ours', memory_dls(n or 4*bs, bs, px, dev), arch, px)
    learn.freeze()
    return learn

# ---- checks

def state(learn): return {k:v.detach().to('cpu', copy=True) for k,v in learn.model.state_dict().items()}

def moved(learn, was):
    "Numbers of tensors that differ from `was` by a bit, in frozen groups and in the others"
    gs = learn.layer_groups
    cold = {n.rpartition('.')[0] for g,f in zip(gs, gs.frozen) if f for n in g.param_names}
    diff = [k.rpartition('.')[0] in cold for k,v in learn.model.state_dict().items() if not torch.equal(v.cpu(), was[k])]
    return sum(diff),len(diff)-sum(diff)

def frozen_result(learn, dev):
    "Train a frozen learner; what moved, and the loss"
    was = state(learn)
    quiet(learn, learn.fit_one_cycle, 2, 1e-2)
    (cold,warm),loss = moved(learn, was),float(learn.recorder.values[-1][0])
    groups = learn.opt.opt.param_groups
    ok = cold==0 and warm>0 and math.isfinite(loss) and all(p.device.type==dev for p in learn.model.parameters())
    return dict(ok=ok, frozen_moved=cold, others_moved=warm, loss=loss, fused=all(g['fused'] for g in groups), n_frozen=learn.opt.frozen_idx)

def check_frozen_bits(dev): return frozen_result(small(dev), dev)

def check_bf16(dev):
    "bfloat16: fastai's mixed precision on a GPU, ours elsewhere"
    learn = small(dev)
    theirs = dev=='cuda' and hasattr(learn, 'to_bf16')
    (learn.to_bf16 if theirs else lambda: learn.to_fast(False, True))()
    return dict(frozen_result(learn, dev), by='to_bf16' if theirs else 'to_fast')

def check_adam(dev, channels_last=False, steps=5):
    "Greatest difference of weights after some steps, between fastai's `Adam` and ours, on the same gradients"
    import timm
    from copy import deepcopy
    from fastai.optimizer import Adam
    from fastai_discriminative.all import fused_adamw
    a = timm.create_model('resnet50' if dev=='cuda' else 'resnet10t', num_classes=5).to(dev)
    b = deepcopy(a)
    pa,pb = list(a.parameters()),list(b.parameters())
    oa,ob = Adam([pa], lr=1e-3, wd=.1),fused_adamw([pb], lr=1e-3, wd=.1)
    for p in pa: oa.state[p]['do_wd'] = p.ndim>1
    for i in range(steps):
        if channels_last and i==2: # after the first steps, so that there are moments
            for m in (a,b): m.to(memory_format=torch.channels_last)
        for p,q in zip(pa, pb):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for o in (oa,ob):
            o.set_hyper('lr', 1e-3*(i+1))
            o.set_hyper('mom', .95-.02*i)
            o.step()
    diff = max(float((p-q).detach().abs().max()) for p,q in zip(pa, pb))
    return dict(ok=diff<1e-5, diff=diff, fused=all(g['fused'] for g in ob.opt.param_groups))

def check_adam_channels_last(dev): return check_adam(dev, True)

def head_fit(dev, cbs=()):
    "Train the head of the small learner for three epochs; loss, accuracy, the head's devices, and how often the stem ran after the first"
    import fastai.vision.all as fv
    learn,n,seen = small(dev),[0],set()
    def _count(*args):
        n[0] += learn.epoch>0
        return conv(*args)
    def _see(m, inp, out): seen.update((inp[0].device.type,out.device.type))
    stem = next(m for m in learn.model[0].modules() if isinstance(m, nn.Conv2d))
    last = [m for m in learn.model[1].modules() if isinstance(m, nn.Linear)][-1]
    conv,stem._conv_forward = stem._conv_forward,_count # a hook would also see a stem that is passed over
    last.register_forward_hook(_see)
    fv.set_seed(1)
    for dl in learn.dls.loaders: dl.rng = random.Random(1)
    quiet(learn, learn.fit_one_cycle, 3, 1e-3, cbs=list(cbs))
    return dict(loss=float(learn.recorder.values[-1][1]), acc=float(learn.recorder.values[-1][2]), devices=sorted(seen), stem_runs=n[0])

def check_cached(dev, tol=.02):
    "The head on cached features is the head on images"
    from fastai_discriminative.all import CachedFeatures
    with CachedFeatures() as cb:
        plain,cached = head_fit(dev),head_fit(dev, [cb])
        rows = sum(r.n for r in cb.rows.values())
    near = abs(plain['loss']-cached['loss'])<=tol*max(1, abs(plain['loss'])) and abs(plain['acc']-cached['acc'])<=.05
    return dict(ok=near and rows>0 and cached['devices']==[dev] and cached['stem_runs']==0<plain['stem_runs'], plain=plain, cached=cached, rows=rows)

def check_to_fast(dev):
    "`to_fast` measures, and the learner trains on"
    learn = small(dev)
    quiet(learn, learn.to_fast)
    learn.unfreeze()
    quiet(learn, learn.fit_one_cycle, 1, 1e-3)
    loss = float(learn.recorder.values[-1][0])
    return dict(ok=math.isfinite(loss), loss=loss, chosen=repr(getattr(learn, 'fast_math', None)))

def check_auto(dev):
    "The strategy `auto`, from the head to the last point"
    learn = small(dev)
    learn.pretrained = True # random weights stand in for pretrained ones
    quiet(learn, learn.fit_strategy, n_epoch=2)
    loss = float(learn.recorder.values[-1][1])
    return dict(ok=math.isfinite(loss), loss=loss)

checks = dict(frozen_bits=check_frozen_bits, adam=check_adam, adam_channels_last=check_adam_channels_last,
    bf16=check_bf16, cached=check_cached, to_fast=check_to_fast, auto=check_auto)

def run_checks(out, dev):
    "Every check, written as they end"
    res = dict(machine=machine(dev), checks={})
    for k,f in checks.items():
        res['checks'][k] = noted(f, dev)
        write(out, 'checks', res)
        print(k, res['checks'][k], flush=True)

# ---- steps

def timed(learn, name, dev):
    "Milliseconds of each call of the learner's method `name` in training, in the list that is returned"
    f,res = getattr(learn, name),[]
    def _f(*args):
        sync(dev)
        start = time.perf_counter()
        f(*args)
        sync(dev)
        if learn.training: res.append((time.perf_counter()-start)*1e3)
    setattr(learn, name, _f)
    return res

def contestants(arch, px, bs, steps, dev, bf16):
    "Name -> function that trains one epoch and returns ms of a step and of the epoch"
    from fastai_discriminative.all import CachedFeatures
    def _of(how, freeze, cbs=()):
        learn = make_learner(how, dls, arch, px)
        if bf16: learn.to_bf16()
        (learn.freeze if freeze else learn.unfreeze)()
        step,epoch = timed(learn, 'one_batch', dev),timed(learn, '_do_epoch_train', dev)
        def _go():
            step.clear(), epoch.clear()
            quiet(learn, learn.fit, 1, 1e-4, cbs=list(cbs))
            return dict(step=statistics.median(step[2:] or step), epoch=epoch[-1])
        return _go
    dls = memory_dls(bs*steps, bs, px, dev, n_valid=bs)
    return {'fastai frozen':_of('fastai', True), 'ours frozen':_of('ours', True), 'fastai unfrozen':_of('fastai', False), 'ours unfrozen':_of('ours', False),
        'ours cached':_of('ours', True, [CachedFeatures()])}

def ratio(rows, over, under, key):
    rs = [r[over][key]/r[under][key] for r in rows]
    return dict(median=round(statistics.median(rs), 3), min=round(min(rs), 3), max=round(max(rs), 3))

def step_row(arch, px, bs, steps, runs, dev, bf16):
    "Medians, and fastai's milliseconds in units of ours, run by run; the first run warms up, and leaves out those that fail"
    fs = contestants(arch, px, bs, steps, dev, bf16)
    errors = {k:r['error'] for k,r in ((k,noted(f)) for k,f in fs.items()) if 'error' in r}
    fs = {k:f for k,f in fs.items() if k not in errors}
    rows = [{k:f() for k,f in fs.items()} for _ in range(runs)]
    ms = {k:{m:round(statistics.median(r[k][m] for r in rows), 3) for m in ('step','epoch')} for k in fs}
    pairs = dict(frozen=('fastai frozen','ours frozen','step'), unfrozen=('fastai unfrozen','ours unfrozen','step'), head_epoch=('fastai frozen','ours cached','epoch'))
    times = {k:ratio(rows, a, b, m) for k,(a,b,m) in pairs.items() if a in fs and b in fs}
    return dict(arch=arch, px=px, bs=bs, steps=steps, runs=runs, bf16=bf16, ms=ms, times=times, errors=errors)

def run_steps(out, dev):
    "A row for each architecture, in 32 bits and, on a GPU, in bfloat16"
    big,res = dev=='cuda',dict(machine=machine(dev), rows=[])
    cases = [(o,224) for o in ('resnet50','convnext_tiny','vit_small_patch16_224')] if big else [('resnet10t',32),('test_vit',32)]
    for bf16 in (False,True) if big else (False,):
        for arch,px in cases:
            r = noted(step_row, arch, px, 32 if big else 4, 12 if big else 4, 4 if big else 2, dev, bf16)
            res['rows'].append(dict(arch=arch, bf16=bf16, **{k:v for k,v in r.items() if k not in ('arch','bf16')}))
            write(out, 'steps', res)
            print(res['rows'][-1], flush=True)

# ---- run

def wait(ps, until):
    "Let processes `ps` end; those that have not by `until` are stopped"
    for p in ps: p.join(max(.1, until-time.time()))
    late = [p for p in ps if p.is_alive()]
    for p in late: p.terminate()
    for p in late: p.join(5)
    return len(late)

def run(a):
    "Checks, steps, and fits for the rest of the time"
    start,dev,ctx = time.time(),'cuda' if torch.cuda.is_available() else 'cpu',torch.multiprocessing.get_context('spawn')
    a.out,a.dir = str(Path(a.out).resolve()),str(Path(a.dir).resolve())
    Path(a.out).mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HUB_OFFLINE='1', MPLBACKEND='Agg', OMP_NUM_THREADS='1')
    reach(a.dir, a.only_wheels)
    for f in [o for o in (run_checks,run_steps) if o.__name__.removeprefix('run_') in a.parts]:
        p = ctx.Process(target=f, args=(a.out,dev))
        p.start()
        if wait([p], time.time()+a.limit/4) or p.exitcode: print(f'{f.__name__} did not end well, after {time.time()-start:.0f} s', flush=True)
    print(f'fits from {time.time()-start:.0f} s on', flush=True)
    turn,deadline,ps = ctx.Value('i', 0),start+a.limit-10,[]
    for k in range(a.procs if 'sweep' in a.parts else 0):
        ps.append(ctx.Process(target=work, args=(a, k, dev, turn, deadline)))
        ps[-1].start()
    wait(ps, start+a.limit)
    table(a)

# ---- table

def show(out, name, f):
    "The lines that `f` makes of the result `name`"
    path = Path(out)/f'{name}.json'
    res = json.loads(path.read_text()) if path.exists() else {}
    print(name, res.get('machine', 'is not there'), *f(res), sep='\n  ')

def step_line(r):
    if 'ms' not in r: return f"{r['arch']} {r.get('error')}"
    ms = [f"{k} {v['step']} ({v['epoch']} an epoch)" for k,v in r['ms'].items()]
    times = [f"{k} {v['median']} ({v['min']}-{v['max']})" for k,v in r['times'].items()]
    failed = [f'; {k} FAILED: {v}' for k,v in r['errors'].items()]
    return f"{r['arch']} {r['px']} px{' bf16' if r['bf16'] else ''}, ms a step: {', '.join(ms)}; times faster: {', '.join(times)}{''.join(failed)}"

def table(a):
    "Checks, steps, and a line for each case of the sweep: accuracy and tempered loss on test images"
    show(a.out, 'checks', lambda r: [f"{'ok    ' if o['ok'] else 'FAILED'} {k}: {({i:j for i,j in o.items() if i!='ok'})}" for k,o in r.get('checks', {}).items()])
    show(a.out, 'steps', lambda r: [step_line(o) for o in r.get('rows', [])])
    rows,cases = load(a.out),{}
    bad = [r['error'] for r in rows if 'error' in r]
    print(f'sweep: {len(rows)-len(bad)} fits, {len(bad)} failed', *sorted(set(bad))[:9], sep='\n  ')
    for r in rows:
        if 'error' not in r: cases.setdefault((r['data'],r['size'],r['n'] or 'all',r['epochs']), []).append(r)
    for k in cases: print(case_line(k, cases[k]))

def summary(a):
    "The package's table of what was measured, from all cases in `a.out`: the best cell by validation loss at its end, the head alone, and the spread over cells"
    import fastai_discriminative,pandas as pd
    from bench_data import archs
    from fastai_discriminative.all import preset_for
    by = {}
    for r in load(a.out):
        if r.get('how')=='layers': by.setdefault((r['arch'],r['data'],r['size'],r['n_train'],r['epochs']), []).append(r)
    df = pd.DataFrame([measured(k, rs, {o:f().stem for o,f in archs.values()}, preset_for) for k,rs in sorted(by.items())])
    df.to_csv(Path(fastai_discriminative.__file__).parent/'data'/'measured.csv', index=False)
    print(df.to_string())

def measured(case, rows, weights, preset_for):
    "A row of the table; only cells that every seed has"
    (arch,data,size,n_train,n_epoch),cells,seeds = case,{},{r['seed'] for r in rows}
    for r in rows: cells.setdefault((r['hi'],r['ratio'],r['norm']), []).append(r)
    full = {k:rs for k,rs in cells.items() if len(rs)==len(seeds)}
    k = min(full, key=lambda k: mean_of(full[k], 'end', 'valid', 'tempered'))
    nums = dict(head_acc=mean_of(full[k], 'head'), best_acc=mean_of(full[k], 'end'), worst_acc=min(mean_of(rs, 'end') for rs in full.values()),
        head_loss=mean_of(full[k], 'head', key='tempered'), best_loss=mean_of(full[k], 'end', key='tempered'))
    return dict(arch=arch, regime=preset_for(arch).regime, optimizer='adamw', weights=weights[arch], data=data, size=size, n_train=n_train, n_epoch=n_epoch, bs=32,
        steps=n_train//32*n_epoch, seeds=len(seeds), cells=len(full), best_lr_high=f'{k[0]:g}', best_ratio=f'{k[1]:g}', train_norm=k[2], **{k:f'{v:.3f}' for k,v in nums.items()})

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = ap.add_subparsers(required=True)
    def _cmd(f, arg):
        p = sub.add_parser(f.__name__, help=f.__doc__)
        p.set_defaults(f=f)
        p.add_argument(arg)
        return p
    for f in (table,summary): _cmd(f, 'out')
    p = _cmd(pack, 'dir')
    p.add_argument('--images', nargs='+', default=['clipart','elpv','fashion'], help='sets of `bench_data.py`')
    p = _cmd(run, 'dir')
    p.add_argument('--out', required=True)
    p.add_argument('--limit', type=float, default=460., help='seconds for all of it')
    p.add_argument('--parts', nargs='+', choices=('checks','steps','sweep'), default=('checks','steps','sweep'))
    p.add_argument('--procs', type=int, default=2)
    p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--sizes', type=int, nargs='+', default=[224,128,64])
    p.add_argument('--only-wheels', action='store_true', help='use the wheels even where fastai and timm are installed')
    a = ap.parse_args()
    a.f(a)

if __name__=='__main__': main()
