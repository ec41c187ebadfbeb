"""The demo's comparison over several seeds and both data sets; writes the figures that the README's table is made from

    python benchmarks/bench_demo.py [--seeds 3] [--out benchmarks/results/demo.json]

Each seed trains ours and fastai's `fine_tune` in turn in one process: same weights, images, transforms, batch size and number of epochs. Seconds are of training alone, on one thread.
The split is the same for all seeds; what differs is the head's random weights, the order of the images and their augmentation.
"""
import argparse,json
from pathlib import Path

from fastai_discriminative.cli import _Job,_parser,_race
from fastai_discriminative.demo import clipart_path,elpv_path,folder_images,lite0_weights
from bench_step import machine

def runs_of(data, path, seeds):
    "The runs on the images in `path`, as dicts"
    a = _parser().parse_args(['demo', '--seeds', str(seeds), '--quiet', '--threads', '1'])
    runs,_ = _race(_Job(a, folder_images(path, verify=False), 'tf_efficientnet_lite0', lite0_weights()), compare=True)
    for r in runs: yield dict(data=data, strategy=r.how, seed=r.seed, accuracy=r.rows[-1]['accuracy'], train_s=r.rows[-1]['train_s'], epochs=r.rows)

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'demo.json')
    args = ap.parse_args()
    import torch
    torch.set_num_threads(1)
    runs = [r for data,path in (('clip art', clipart_path()), ('solar cells (ELPV)', elpv_path())) for r in runs_of(data, path, args.seeds)]
    for r in runs: print(r['data'], r['strategy'], r['seed'], f"{r['accuracy']:.3f} in {r['train_s']:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(machine=machine(), runs=runs), indent=1)+'\n')
