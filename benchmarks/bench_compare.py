"""What `compare_strategies` costs beside the same fits by hand, what the distortion meter costs, and what `auto` spends on evidence

    python benchmarks/bench_compare.py [compare] [meter] [evidence] [--runs 5] [--out benchmarks/results/compare.json]

EfficientNet-Lite0 with its ImageNet weights, drawings of 64 px, one thread. `compare`: seconds for three fits (`uniform`, `lp_ft`, `auto`; 200 images, 2 epochs) through `compare_strategies` with a file, over those of a
loop by hand. `meter`: CPU seconds of an epoch (600 images and the validation images) with
`DistortionMeter`, over those without, in twice as many runs: what is measured is smaller than the noise of a clock. `evidence`: seconds from the first batch to the first step of the body, without the
head's own epochs, over the training seconds of `auto` (600 images, 10 epochs): the trials; and with the computing of the features. By hand and by us in turn, medians of `runs`.
"""
import argparse,json,statistics,tempfile,time
from functools import partial
from pathlib import Path

import torch
from fastai.vision.all import *
from fastai_discriminative.all import *
from fastai_discriminative import auto
from fastai_discriminative.demo import clipart_path,demo_dls,folder_images,lite0_weights
from bench_step import machine

fi = folder_images(clipart_path(), verify=False)

def learner(n): return discriminative_learner(demo_dls(fi, n), 'tf_efficientnet_lite0', weights_file=lite0_weights(), metrics=accuracy)

def seconds(f, clock=time.perf_counter):
    start = clock()
    f()
    return clock()-start

names = ['uniform','lp_ft','auto']

def by_hand():
    for n in names:
        set_seed(0, reproducible=True)
        learn = learner(200)
        with learn.no_bar(), learn.no_logging(): learn.fit_strategy(n, 2)

def by_compare():
    with tempfile.TemporaryDirectory() as d: compare_strategies(partial(learner, 200), names, 2, seeds=1, fname=Path(d)/'c.json', bar=False)

def in_turn(runs, clock=time.perf_counter, **fs):
    "Seconds of each of `fs` in each run, in turn"
    res = {k:[] for k in fs}
    for i in range(runs):
        for k in (list(fs) if i%2 else list(fs)[::-1]): res[k].append(seconds(fs[k], clock))
    return res

def ratio(t, a, b): return dict(seconds=t, ratios=[x/y for x,y in zip(t[a], t[b])], median=statistics.median(x/y for x,y in zip(t[a], t[b])))

def meter(runs):
    "An epoch with and without the meter; the reference is measured before the first of them"
    learn,m = learner(600),DistortionMeter()
    learn.unfreeze()
    def fit(cbs):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-6, cbs=cbs)
    fit(m)
    return ratio(in_turn(2*runs, time.process_time, on=lambda: fit(m), off=lambda: fit(None)), 'on', 'off')

def evidence(runs):
    res = []
    for _ in range(runs):
        took,clock = [],TrainClock()
        look = auto._AutoRates._measure
        def _timed(self, learn):
            start = time.perf_counter()
            try: return look(self, learn)
            finally: took.append(time.perf_counter()-start)
        auto._AutoRates._measure = _timed
        learn = learner(600)
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit_strategy('auto', 10, cbs=clock)
        finally: auto._AutoRates._measure = look
        head = [r['train_s'] for r in clock.rows[:10]]
        epochs = statistics.median(b-a for a,b in zip(head, head[1:]))
        features,total = head[0]-epochs,clock.rows[-1]['train_s']
        res.append(dict(evidence_s=took[0], features_s=features, head_s=head[-1]-features, total_s=total, share=took[0]/total, share_with_features=(took[0]+features)/total, share_with_head=(took[0]+head[-1])/total))
    return dict(runs=res, **{k:statistics.median(r[k] for r in res) for k in ('share','share_with_features','share_with_head')})

def compare(runs):
    by_compare() # warm up
    return ratio(in_turn(runs, ours=by_compare, hand=by_hand), 'ours', 'hand')

parts = dict(compare=compare, meter=meter, evidence=lambda runs: evidence(min(runs, 3)))

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('parts', nargs='*', metavar='PART', help=f"of {', '.join(parts)} (default: all); the others stay as they are in the file")
    ap.add_argument('--runs', type=int, default=5)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'compare.json')
    args = ap.parse_args()
    if bad := [o for o in args.parts if o not in parts]: ap.error(f"no part {bad[0]!r}: there are {', '.join(parts)}")
    torch.set_num_threads(1)
    d = json.loads(args.out.read_text()) if args.out.exists() else {}
    d.update(machine=machine(), **{k:parts[k](args.runs) for k in args.parts or parts})
    print(json.dumps({k:{n:v for n,v in o.items() if n not in ('seconds','runs','ratios')} for k,o in d.items() if k in parts}, indent=1))
    args.out.write_text(json.dumps(d, indent=1)+'\n')
