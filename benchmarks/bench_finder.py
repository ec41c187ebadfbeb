"""Which rate does a finder name, and what would training at it have cost? Against the sweep of `bench_gpu.py`; and how long a trial has to be

    python benchmarks/bench_finder.py [CASE ...] [--seeds 3] [--only trials] [--out benchmarks/results/finder.json]
    python benchmarks/bench_finder.py --damage [CASE ...]                       # the damage of trials of 4, 8 and 12 steps, to results/damage.json
    python benchmarks/bench_finder.py --lost [CASE ...]                         # what is lost of a head after each epoch of a body phase at 1e-3, 2e-3 and 3e-3, to results/lost.json

A case is `data-arch-size-images-epochs`, as in `bench_tuned.py`. For each seed the head is trained on cached features, as in the sweep; then each method says which rate the end of the body should have: the trials, the range test along the preset's
slope and the search over ratios of `lr_find_groups`, and fastai's four rules on the curve of that range test. The regret of a rate is read off the sweep's curve for ratio .1: points of test accuracy below the best rate by validation loss. Run again, it goes on where it stopped.
"""
import argparse,json,sys,time
from pathlib import Path

import torch
sys.path.insert(0, str(Path(__file__).parent))
from fastai.vision.all import *
from fastai.callback.schedule import minimum,slide,steep,valley
from fastai_discriminative.all import *
from fastai_discriminative.auto import _AutoRates,_cycle,_put_back,_seen,_whole_batches
from fastai_discriminative.lr_finder import _suggested
from fastai_discriminative import points
from fastai_discriminative.points import BestPoint,lost_share,tempered_loss
from fastai_discriminative.probe import some_batches
from bench_step import machine
from bench_tuned import learner

cases = [f'{k}-lite0-{size}-600-10' for size in (64,160) for k in ('clipart','elpv','fashion')]
rules = (valley,steep,minimum,slide)

methods = 'trials','joint','ratios'

def found(case, seed, only):
    "Rate at the end of the body by each of the methods `only`, and seconds"
    data,arch,size,n,n_epoch = case.split('-')
    set_seed(seed)
    learn,res = learner(data, arch, int(size), int(n)),{}
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy([Phase(int(n_epoch), frozen=-1, cached=True)])
    learn.unfreeze()
    learn.true_freeze.train_norm = 'running'
    def _timed(k, f):
        start = time.perf_counter()
        r = f()
        res[k] = dict(lr=r.slice.stop, ratio=round(r.slice.start/r.slice.stop, 4), s=round(time.perf_counter()-start, 1), confidence=r.confidence)
        return r
    for k in only:
        try: f = _timed(k, lambda: learn.lr_find_groups(k, n_epoch=int(n_epoch)))
        except ReportError as e:
            print(case, seed, k, e, flush=True) # it names no rate
            continue
        if k!='joint': continue
        rates,losses = f.curves['all']
        for rule in rules: res[f'lr_find, {rule.__name__}'] = dict(lr=_suggested(rates, losses, 100, rule)*f.slice.stop/f.lrs[-1], s=res['joint']['s'])
    res['preset'] = dict(lr=learn.preset.scaled(*fit_case(learn, n_epoch=int(n_epoch))).lr_high, s=0.)
    return dict(case=case, seed=seed, found=res)

def damage(case):
    "Share of a trained head's knowledge that trials of some lengths take, by rate"
    data,arch,size,n,n_epoch = case.split('-')
    set_seed(1)
    learn,res = learner(data, arch, int(size), int(n)),[]
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy([Phase(int(n_epoch), frozen=-1, cached=True)])
    learn.unfreeze()
    learn.true_freeze.train_norm = 'running'
    rates,groups,valid = _AutoRates(learn.preset, None),learn.splitter.find(learn.model),some_batches(learn, 8, 1)
    start,chance = _seen(learn, valid)
    for lr,k in [(lr,k) for lr in (3e-4,1e-3,2e-3) for k in (4,8,12)]:
        with _put_back(learn):
            _cycle(learn, rates.at(lr, groups), _whole_batches(learn, k))
            res.append(dict(case=case, lr=lr, steps=k, damage=round((_seen(learn, valid)[0]-start)/(chance-start), 3)))
    return res

def lost(case, lr, seed=0):
    "Share of what the head knows that is lost after each epoch of a body phase that never ends early, and the points in the end"
    data,arch,size,n,n_epoch = case.split('-')
    learn,shares = learner(data, arch, int(size), int(n)),[]
    class Lost(Callback):
        order = 58.5 # before `BestPoint`
        def after_epoch(self):
            kb = self.learn.best_point
            if not kb.is_last: return
            preds,targs = [torch.cat(o) for o in zip(*kb._seen)]
            shares.append(round(lost_share(tempered_loss(preds, targs), kb.points[0].loss, targs), 2))
        def after_fit(self): self.learn.points = self.learn.best_point.points
    points._judged_at = 2. # never
    phases = [Phase(10, frozen=-1, cached=True), Phase(int(n_epoch), slice(lr/10, lr), train_norm='running')]
    set_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy(Strategy('head, then all', lambda *a: phases, keep_best=BestPoint), int(n_epoch), cbs=Lost())
    return dict(case=case, seed=seed, lr=lr, lost=shares, head=learn.points[0].value, end=learn.points[1].value)

def sweep_line(data, size, ratio=.1):
    "Rates, points over the head, and validation losses of the sweep's line for `ratio`, means over its seeds"
    rs = [json.loads(l) for f in sorted((Path(__file__).parent/'results'/'gpu').glob('sweep-*.jsonl')) for l in f.read_text().splitlines()]
    rs = [r for r in rs if r.get('how')=='layers' and (r['data'],r['size'],r['n'],r['epochs'],r['norm'],r['ratio'])==(data,size,600,10,'running',ratio)]
    his = sorted({r['hi'] for r in rs})
    def _mean(f): return [float(np.mean([f(r) for r in rs if r['hi']==h])) for h in his]
    return his,_mean(lambda r: r['end']['test']['acc']-r['head']['test']['acc']),_mean(lambda r: r['end']['valid']['tempered'])

def with_regrets(row):
    data,_,size,*_ = row['case'].split('-')
    his,gains,losses = sweep_line(data, int(size))
    best = gains[int(np.argmin(losses))]
    for k,o in row['found'].items():
        xs,ys = (his,gains) if k!='ratios' else sweep_line(data, int(size), min((.01,.1,1.), key=lambda r: abs(math.log(r/o['ratio']))))[:2]
        o['regret'] = round(100*(best-float(np.interp(math.log(o['lr']), np.log(xs), ys))), 2)
    return row

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('cases', nargs='*', metavar='CASE')
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--only', nargs='+', choices=methods, default=methods)
    ap.add_argument('--damage', action='store_true')
    ap.add_argument('--lost', action='store_true')
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'finder.json')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.lost:
        rows = [lost(c, lr) for lr in (1e-3,2e-3,3e-3) for c in a.cases or cases[:3]]
        (a.out.parent/'lost.json').write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1)+'\n')
        return print(*rows, sep='\n')
    if a.damage:
        rows = [r for c in a.cases or cases[:3] for r in damage(c)]
        (a.out.parent/'damage.json').write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1)+'\n')
        return print(*rows, sep='\n')
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(machine=machine(), rows=[])
    for case in a.cases or cases:
        for seed in range(a.seeds):
            row = next((r for r in res['rows'] if (r['case'],r['seed'])==(case,seed)), None)
            todo = [k for k in a.only if row is None or k not in row['found']]
            if not todo: continue
            if row is None: res['rows'].append(row := dict(case=case, seed=seed, found={}))
            row['found'].update(with_regrets(found(case, seed, todo))['found'])
            a.out.write_text(json.dumps(res, indent=1)+'\n')
            print(case, seed, {k:(f"{row['found'][k]['lr']:.2g}",row['found'][k]['regret'],row['found'][k]['s']) for k in todo if k in row['found']}, flush=True)
        for k in a.only: print(case, k, stable(res['rows'], case, k), flush=True)

def stable(rows, case, method):
    "How many seeds of a case there are, and how many of them name rates within one half decade"
    lrs = [math.log10(r['found'][method]['lr']) for r in rows if r['case']==case and method in r['found']]
    return len(lrs),max(sum(0<=o-lo<=.5 for o in lrs) for lo in lrs)

if __name__=='__main__': main()
