"""Which rates, ratio and norm policy a pretrained body needs after its head: full fits, and the short trials that should tell

    python benchmarks/bench_sweep.py CASE ... [--rates 3e-4 1e-3] [--ratios .1] [--norms running] [--seeds 1] [--jobs 2] [--table]
    python benchmarks/bench_sweep.py --summary

A case is `data-arch-size-images-epochs`, as in `bench_tuned.py`. For each seed the head is trained once, on cached features. From it start short trials at every rate, of `--trial-steps` steps each, as `auto` makes them; and a fit of the body at each
rate, ratio and norm policy, at whose end four points are scored on validation and test images: the head alone, the end, the average, and halfway to it.
Each fit is a line in `results/sweep/CASE.jsonl`; run again, it goes on where it stopped. `--table` only shows what is there; `--summary` makes of all that is there the package's `data/measured.csv`.
"""
import argparse,json,sys,time
from pathlib import Path

import fastai_discriminative,joblib,torch
sys.path.insert(0, str(Path(__file__).parent))
from fastai.vision.all import *
from fastai_discriminative.all import *
from fastai_discriminative.auto import _cycle,_put_back,_seen
from fastai_discriminative.points import WeightAverage,tempered_loss
from fastai_discriminative.probe import some_batches
from bench_tuned import archs,images,learner
from copy import deepcopy # after fastai, which has a `copy` of its own

out = Path(__file__).parent/'results'/'sweep'

def score(learn, files, labels):
    "Accuracy, and loss at the best temperature"
    with learn.no_bar(): preds,_ = learn.get_preds(dl=learn.dls.test_dl(files), act=noop)
    y = tensor([learn.dls.vocab.o2i[o] for o in labels])
    return dict(acc=(preds.argmax(1)==y).float().mean().item(), loss=tempered_loss(preds, y))

class Points(Callback):
    "Averages the weights of a fit"
    def before_batch(self):
        if self.training and not hasattr(self, 'avg'): self.avg = WeightAverage(self.learn.model, self.n_epoch*len(self.dls.train))
    def after_step(self): self.avg.update()

def fitted(learn, head, lr, ratio, norm, n_epoch, sets):
    "Scores after a fit of everything from `head`"
    learn.model.load_state_dict(head)
    learn.create_opt()
    learn.opt.clear_state()
    cb,start = Points(),time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy([Phase(n_epoch, slice(lr*ratio, lr), train_norm=norm)], cbs=cb)
    res = dict(fit_s=time.time()-start)
    for name in ('end','average','halfway'):
        if name!='end': cb.avg.apply(dict(average=1., halfway=.5)[name])
        res[name] = {k:score(learn, *v) for k,v in sets.items()}
    return res

def tried(learn, lrs, ratio, k, n_valid=3):
    "Damage of a cycle of `k` steps at each of `lrs`"
    train,valid = some_batches(learn, k),some_batches(learn, n_valid, 1)
    learn.unfreeze()
    learn.true_freeze.train_norm = 'running'
    (start,chance),res = _seen(learn, valid),[]
    groups = learn.splitter.find(learn.model)
    for lr in lrs:
        with _put_back(learn):
            _cycle(learn, [lr*ratio**(1-d) for d in groups.depths], train)
            loss,_ = _seen(learn, valid)
        res.append(dict(lr=lr, k=k, loss=loss, damage=(loss-start)/(chance-start)))
    return res

def work(case, seed, cells, lrs, ks):
    "One head, its trials, and the fits in `cells` that are not there yet"
    torch.set_num_threads(1)
    data,arch,size,n_train,n_epoch = case.split('-')
    have = {(r['seed'],r['lr'],r['ratio'],r['norm']) for r in rows(case) if 'end' in r}
    todo = [c for c in cells if (seed,*c) not in have]
    if not todo: return
    set_seed(seed, reproducible=True)
    learn = learner(data, arch, int(size), int(n_train))
    for dl in learn.dls.loaders: dl.rng = random.Random(seed)
    learn.split(train_norm='affine', fused=True)
    t,v = images(data)[1],learn.dls.valid_ds
    sets = dict(valid=(list(v.items), [learn.dls.vocab[int(v.tls[1][i])] for i in range(len(v))]), test=(t.files, t.labels))
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy([Phase(10, learn.preset, frozen=-1, cached=True)])
    head = deepcopy(learn.model.state_dict())
    common = dict(case=case, seed=seed, head={k:score(learn, *v) for k,v in sets.items()}, steps=int(n_epoch)*len(learn.dls.train))
    if not any('trials' in r and r['seed']==seed for r in rows(case)): write(case, dict(common, trials=[o for k in ks for o in tried(learn, lrs, .1, k)]))
    for lr,ratio,norm in todo:
        try: r = fitted(learn, head, lr, ratio, norm, int(n_epoch), sets)
        except Exception as e: r = dict(end=None, error=f'{type(e).__name__}: {e}')
        write(case, dict(common, lr=lr, ratio=ratio, norm=norm, **r))

def rows(case):
    f = out/f'{case}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

def write(case, row):
    with open(out/f'{case}.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

def table(case):
    "What is there of `case`"
    rs = rows(case)
    print(f"\n{case}: {rs[0]['steps'] if rs else 0} steps")
    for r in rs:
        if 'trials' in r: print(f"  seed {r['seed']} head valid {r['head']['valid']['acc']:.3f} {r['head']['valid']['loss']:.3f} test {r['head']['test']['acc']:.3f} {r['head']['test']['loss']:.3f}; trials", ' '.join(f"{t['lr']:g}/{t['k']}: {t['damage']:.2f}" for t in r['trials']))
        elif r.get('end'): print(f"  seed {r['seed']} {r['lr']:g} x {r['ratio']:g} {r['norm']:8}", *(f"{p}: valid {r[p]['valid']['acc']:.3f} {r[p]['valid']['loss']:.3f} test {r[p]['test']['acc']:.3f} {r[p]['test']['loss']:.3f};" for p in ('end','average','halfway')), f"{r['fit_s']:.0f} s")
        else: print('  ', r.get('lr'), r.get('error'))

def summary(case):
    "A row of `data/measured.csv`: the best cell of `case` by validation loss at its end, beside the head alone, and the spread over cells"
    data,arch,size,n_train,n_epoch = case.split('-')
    rs = [r for r in rows(case) if r.get('end')]
    cells = {c:[r for r in rs if (r['lr'],r['ratio'],r['norm'])==c] for c in {(r['lr'],r['ratio'],r['norm']) for r in rs}}
    def _mean(c, what, part='test', k='acc'): return float(np.mean([r[what][part][k] for r in cells[c]]))
    best = min(cells, key=lambda c: _mean(c, 'end', 'valid', 'loss'))
    accs = [_mean(c, 'end') for c in cells]
    name,weights = archs[arch]
    nums = dict(head_acc=_mean(best, 'head'), best_acc=_mean(best, 'end'), worst_acc=min(accs), head_loss=_mean(best, 'head', k='loss'), best_loss=_mean(best, 'end', k='loss'))
    return dict(arch=name, regime=preset_for(name).regime, optimizer='adamw', weights=weights().stem, data=data, size=size, n_train=n_train, n_epoch=n_epoch, bs=32, steps=rs[0]['steps'],
        seeds=len({r['seed'] for r in rs}), cells=len(cells), best_lr_high=f'{best[0]:g}', best_ratio=f'{best[1]:g}', train_norm=best[2], **{k:f'{v:.3f}' for k,v in nums.items()})

def write_summary():
    "The package's table of what was measured"
    cases = sorted(f.stem for f in out.glob('*.jsonl'))
    df = pd.DataFrame([summary(c) for c in cases])
    df.to_csv(Path(fastai_discriminative.__file__).parent/'data'/'measured.csv', index=False)
    print(df.to_string())

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('cases', nargs='*', metavar='CASE')
    ap.add_argument('--rates', nargs='+', type=float, default=[3e-4,1e-3])
    ap.add_argument('--ratios', nargs='+', type=float, default=[.1])
    ap.add_argument('--norms', nargs='+', default=['running'])
    ap.add_argument('--trial-rates', nargs='+', type=float, default=[1e-4,3e-4,1e-3,3e-3])
    ap.add_argument('--trial-steps', nargs='+', type=int, default=[4,8])
    ap.add_argument('--seeds', type=int, default=1)
    ap.add_argument('--jobs', type=int, default=2)
    ap.add_argument('--table', action='store_true')
    ap.add_argument('--summary', action='store_true')
    a = ap.parse_args()
    out.mkdir(parents=True, exist_ok=True)
    if a.summary: return write_summary()
    if not a.cases: ap.error('name a case, such as clipart-lite0-160-600-10')
    cells = [(lr,ratio,norm) for norm in a.norms for lr in a.rates for ratio in a.ratios]
    if not a.table: joblib.Parallel(n_jobs=a.jobs)(joblib.delayed(work)(c, s, cells, a.trial_rates, a.trial_steps) for s in range(a.seeds) for c in a.cases)
    for c in a.cases: table(c)

if __name__=='__main__':
    from bench_sweep import main as _main # by its name, so that other processes find what it pickles
    _main()
