"""What channels-last memory and bfloat16 do to a training step, as `Learner.to_fast` measures it

    python benchmarks/bench_fast_math.py [--runs 5] [--out benchmarks/results/fast_math.json]

Milliseconds of a forward and a backward pass with everything training, random weights, one thread; the four ways in turn, `runs` times, medians, and ratios to 32 bits
and channels first within a run.
"""
import argparse,json,statistics
from pathlib import Path

import timm,torch

from fastai_discriminative.fast_math import _step_ms
from bench_step import machine

points = [('tf_efficientnet_lite0', 64, 32), ('resnet50', 128, 8), ('convnext_tiny', 128, 8), ('vit_small_patch16_224', 128, 8)]
ways = {'channels first, 32 bits':(False,False), 'channels last, 32 bits':(True,False), 'channels first, bfloat16':(False,True), 'channels last, bfloat16':(True,True)}

def bench(arch, px, bs, runs):
    "One row"
    model = timm.create_model(arch, num_classes=10, **(dict(img_size=px) if 'vit' in arch else {}))
    x,times = torch.randn(bs, 3, px, px),[]
    for _ in range(runs): times.append({k: _step_ms(model, [x], *w) for k,w in ways.items()})
    base = next(iter(ways))
    ms = {k: round(statistics.median(t[k] for t in times), 1) for k in ways}
    return dict(arch=arch, px=px, bs=bs, ms=ms, times_faster={k: round(statistics.median(t[base]/t[k] for t in times), 2) for k in ways})

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--runs', type=int, default=5)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'fast_math.json')
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [bench(*p, args.runs) for p in points]
    for r in rows: print(r['arch'], r['ms'], r['times_faster'])
    args.out.write_text(json.dumps(dict(machine=machine(), runs=args.runs, rows=rows), indent=1)+'\n')
