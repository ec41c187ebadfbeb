"""Seconds to split a built model, against timm's `group_parameters` on the same model, for every architecture of timm where both serve; and forward passes per traced split

    python benchmarks/bench_split.py [--out benchmarks/results/split.json]

Models are on the meta device, one thread; per model the median of 7 runs of each, in turn.
"""
import argparse,json,logging,os,statistics,time,warnings
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
import timm,torch
from fastprogress.fastprogress import progress_bar
from timm.models._manipulate import group_parameters

from fastai_discriminative import trace
from fastai_discriminative.groups import layer_groups
from bench_step import machine

def seconds(fs, n=7):
    "Median seconds of each of `fs`, run in turn"
    ts = [[] for _ in fs]
    for _ in range(n):
        for f,t in zip(fs, ts):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter()-start)
    return [statistics.median(t) for t in ts]

def passes(model):
    "Forward passes that one split of `model` takes"
    count,run = [],trace._run
    trace._run = lambda *args: count.append(1) or run(*args)
    try: layer_groups(model)
    finally: trace._run = run
    return len(count)

def measure(arch):
    "One row"
    model = trace.blank_model(arch)
    gs,n = layer_groups(model),passes(model)
    row = dict(arch=arch, rule=gs.rule, params=len(list(model.parameters())), passes=n)
    if gs.rule=='traced': return dict(row, ours=seconds([lambda: layer_groups(model)], 3)[0])
    try: group_parameters(model, model.group_matcher())
    except Exception: return dict(row, ours=seconds([lambda: layer_groups(model)])[0])
    ours,timms = seconds([lambda: layer_groups(model), lambda: group_parameters(model, model.group_matcher())])
    return dict(row, ours=ours, timm=timms, ratio=ours/timms)

def summary(rows):
    "Medians and extremes"
    r = sorted(o['ratio'] for o in rows if 'ratio' in o)
    t = sorted(o['ours'] for o in rows if o['rule']=='traced')
    return dict(n=len(r), median_ratio=statistics.median(r), p90_ratio=r[int(.9*len(r))], max_ratio=r[-1], median_ms=1e3*statistics.median(o['ours'] for o in rows if 'ratio' in o),
        traced=len(t), median_traced_ms=1e3*statistics.median(t), max_traced_s=t[-1], most_passes=max(o['passes'] for o in rows))

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'split.json')
    args = ap.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.getLogger('timm').setLevel(logging.ERROR)
    rows = [measure(a) for a in progress_bar(timm.list_models())]
    args.out.write_text(json.dumps(dict(machine=machine(), summary=summary(rows), rows=[{k:round(v, 7) if isinstance(v, float) else v for k,v in r.items()} for r in rows]), indent=1)+'\n')
    print(json.dumps(summary(rows), indent=1))
