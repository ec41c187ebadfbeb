"""The fits of `bench_gpu.py`, in plain torch, with all images in the device's memory: which rates, ratio and norm policy a pretrained body needs

A fit: fastai's head on features computed once, 20 epochs; then all layers in one cycle, each at `hi*ratio**(1-depth)`, the head at `hi`. Scored on validation and test images:
the head, the end, the average of the weights over about a quarter of the steps (`ema`), and halfway to it (`mix50`). `tempered` is the loss at the best of 29 temperatures.
With norm `running` all norm layers, the head's too, keep their statistics; with `group` all train. `fine_tune` is fastai's, in plain torch.
"""
import json,math,statistics,time,traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np,torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

lite0,exts = 'tf_efficientnet_lite0',('.png','.jpg','.jpeg','.webp')

# ---- data and model

def image_files(folder): return sorted(f for f in Path(folder).rglob('*') if f.suffix.lower() in exts)

def read(folder, size):
    "Images of `folder` as bytes (n, 3, size, size), and their classes; always in the same order"
    files = image_files(folder)
    classes = sorted({f.parent.name for f in files})
    def _one(f): return np.asarray(Image.open(f).convert('RGB').resize((size,size), Image.BILINEAR))
    with ThreadPoolExecutor(4) as ex: x = np.stack(list(ex.map(_one, files)))
    return torch.from_numpy(x).permute(0,3,1,2).contiguous(),torch.tensor([classes.index(f.parent.name) for f in files])

def parts(n, n_train=0, seed=1):
    "Indices of images to train, validate and test on: a quarter to test, up to 500 to validate; `n_train` 0 for all others"
    i,t,v = torch.randperm(n, generator=torch.Generator().manual_seed(seed)),min(1000, n//4),min(500, n//5)
    return i[t+v:][:n_train or n],i[t:t+v],i[:t]

def augment(x):
    "Flips, rotations up to 10 degrees, zooms up to 1.1, light; a batch of floats in [0,1]"
    n,dev = len(x),x.device
    t = (torch.rand(n, device=dev)-.5)*2*math.radians(10)
    z,f = 1-.1*torch.rand(n, device=dev),torch.where(torch.rand(n, device=dev)<.5, -1., 1.)
    m = torch.zeros(n, 2, 3, device=dev)
    m[:,0,0],m[:,0,1],m[:,1,0],m[:,1,1] = f*t.cos()*z,-t.sin()*z,f*t.sin()*z,t.cos()*z
    x = F.grid_sample(x, F.affine_grid(m, x.shape, align_corners=False), padding_mode='reflection', align_corners=False)
    return (x*(1+.2*(torch.rand(n,1,1,1, device=dev)-.5))).clamp(0,1)

class Net(nn.Module):
    "A convolutional timm body under fastai's head"
    def __init__(self, arch, dir, n_out):
        super().__init__()
        import timm
        from safetensors.torch import load_file
        self.body = timm.create_model(arch, num_classes=0)
        self.body.load_state_dict({k:v.float() if v.is_floating_point() else v for k,v in load_file(Path(dir)/f'{arch}.safetensors').items()})
        nf = 2*self.body.num_features
        self.head = nn.Sequential(nn.BatchNorm1d(nf), nn.Dropout(.25), nn.Linear(nf,512,bias=False), nn.ReLU(inplace=True),
            nn.BatchNorm1d(512), nn.Dropout(.5), nn.Linear(512,n_out,bias=False))
        for l in (self.head[2],self.head[6]): nn.init.kaiming_normal_(l.weight)
        for k in ('mean','std'): self.register_buffer(k, torch.tensor(self.body.pretrained_cfg[k]).view(1,3,1,1), persistent=False)
    def features(self, x):
        x = self.body.forward_features(((x-self.mean)/self.std).contiguous(memory_format=torch.channels_last))
        return torch.cat([F.adaptive_max_pool2d(x,1), F.adaptive_avg_pool2d(x,1)], 1).flatten(1)
    def forward(self, x): return self.head(self.features(x).float())

def cast(dev): return torch.autocast(dev, torch.bfloat16, enabled=dev=='cuda')

@torch.no_grad()
def features(net, x, bs=256):
    net.eval()
    with cast(x.device.type): return torch.cat([net.features(x[i:i+bs].float()/255).float() for i in range(0, len(x), bs)])

def score(logits, y):
    "Accuracy, loss, and loss at the best of 29 temperatures, from 1/8 to 16"
    lps = F.log_softmax(logits*2**(torch.arange(-16, 13, device=y.device)/4).view(-1,1,1), -1)
    losses = -lps.gather(2, y.view(1,-1,1).expand(len(lps),-1,1)).mean((1,2))
    return dict(acc=(logits.argmax(1)==y).float().mean().item(), loss=losses[16].item(), tempered=losses.min().item())

@torch.no_grad()
def evaluate(net, data): return {k:score(net.head.eval()(features(net, x)), y) for k,(x,y) in data.items()}

# ---- training

class OutOfTime(Exception): "The time limit cut a fit"

def one_cycle(p, warm=.25, div=25., final=1e-5):
    "Share of the peak rate at `p` of the time, and momentum, as in fastai's `fit_one_cycle`"
    def _cos(a, b, q): return a+(1+math.cos(math.pi*(1-q)))*(b-a)/2
    return (_cos(1/div,1,p/warm),_cos(.95,.85,p/warm)) if p<warm else (_cos(1,final,(p-warm)/(1-warm)),_cos(.85,.95,(p-warm)/(1-warm)))

def set_step(opt, p, **cycle):
    s,m = one_cycle(p, **cycle)
    for g in opt.param_groups: g['lr'],g['betas'] = g['peak']*s,(m,.99)

def adamw(groups):
    "AdamW for `(parameters, rate)` pairs; vectors are not decayed"
    halves = [([p for p in ps if (p.ndim>1)==decays], lr, .01*decays) for ps,lr in groups for decays in (True,False)]
    return torch.optim.AdamW([dict(params=ps, lr=lr, peak=lr, weight_decay=wd) for ps,lr,wd in halves if ps], eps=1e-5, fused=True)

def train_head(net, f, y, epochs=20, lr=2e-3, bs=32):
    "The head on features `f`"
    net.head.train()
    opt,n = adamw([(list(net.head.parameters()), lr)]),max(1, len(f)//bs)
    for e in range(epochs):
        i = torch.randperm(len(f), device=f.device)
        for b in range(n):
            set_step(opt, (e*n+b)/(epochs*n))
            j = i[b*bs:(b+1)*bs]
            F.cross_entropy(net.head(f[j]), y[j]).backward()
            opt.step()
            opt.zero_grad()

def norms(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
def floats(net): return [v for v in net.state_dict().values() if v.is_floating_point()]

def train_all(net, x, y, groups, epochs, running, mean=None, bs=32, deadline=math.inf, **cycle):
    "All in `groups`, in one cycle; `running` keeps all norm statistics, the head's too; `mean` collects the average"
    opt,n,k,now = adamw(groups),max(1, len(x)//bs),0,floats(net)
    decay = max(0., 1-4/max(4, epochs*n))
    for e in range(epochs):
        net.train()
        if running: # with only the body's in eval mode the fit diverges: drawings at 64 px, 1e-3, .226 in place of .629
            for o in norms(net): o.eval()
        i = torch.randperm(len(x), device=x.device)
        for b in range(n):
            if time.time()>deadline: raise OutOfTime()
            set_step(opt, (e*n+b)/(epochs*n), **cycle)
            j = i[b*bs:(b+1)*bs]
            with cast(x.device.type): out = net(augment(x[j].float()/255))
            F.cross_entropy(out.float(), y[j]).backward()
            opt.step()
            opt.zero_grad()
            k += 1
            if mean is not None: torch._foreach_lerp_(mean, now, 1-min(decay, k/(10+k)))

def layer_rates(net, depths, hi, ratio):
    "`(parameters, rate)` by depth, the head last"
    by = {}
    for n,p in net.body.named_parameters(): by.setdefault(depths[n], []).append(p)
    return [(ps, hi*ratio**(1-d)) for d,ps in by.items()]+[(list(net.head.parameters()), hi)]

def fine_tune(net, x, y, lr, epochs, deadline=math.inf):
    "fastai's: the head for an epoch, norm layers training at a tenth of its rate; then two groups, a hundred times apart"
    body,head,ns = list(net.body.parameters()),list(net.head.parameters()),[p for o in norms(net.body) for p in o.parameters()]
    for p in body: p.requires_grad_(False)
    for p in ns: p.requires_grad_(True)
    train_all(net, x, y, [(ns, lr/10), (head, lr)], 1, False, warm=.99, deadline=deadline)
    for p in body: p.requires_grad_(True)
    train_all(net, x, y, [(body, lr/200), (head, lr/2)], epochs, False, warm=.3, div=5., deadline=deadline)

def fit(dir, job, xy, depths, starts, deadline=math.inf, arch=lite0):
    "What `job` scored; `starts` keeps the trained head of each case, which does not depend on the rates"
    (x,y),data,t0 = xy['train'],{k:xy[k] for k in ('valid','test')},time.time()
    torch.manual_seed(job['seed'])
    net,res = Net(arch, dir, int(max(o.max() for _,o in xy.values()))+1).to(x.device, memory_format=torch.channels_last),{}
    if job['how']=='fine_tune': fine_tune(net, x, y, job['hi'], job['epochs'], deadline)
    else:
        key = tuple(job[k] for k in ('data','size','n','seed'))
        if key not in starts:
            train_head(net, features(net, x), y)
            starts[key] = [v.clone() for v in floats(net)],evaluate(net, data)
        start,res['head'] = starts[key]
        torch._foreach_copy_(floats(net), start)
        mean = [v.clone() for v in start]
        torch.manual_seed(job['seed'])
        train_all(net, x, y, layer_rates(net, depths, job['hi'], job['ratio']), job['epochs'], job['norm']=='running', mean, deadline=deadline)
    res['end'] = evaluate(net, data)
    if 'head' in res:
        for k,s in dict(ema=1., mix50=.5).items():
            torch._foreach_copy_(floats(net), torch._foreach_lerp(start, mean, s))
            res[k] = evaluate(net, data)
    return dict(job, arch=arch, n_train=len(x), train_s=round(time.time()-t0, 2), **res)

# ---- jobs

def error_text(e):
    at = traceback.extract_tb(e.__traceback__)[-1]
    return f'{type(e).__name__}: {str(e)[:500]} ({Path(at.filename).name}, line {at.lineno})'

his,ratios,budgets = (3e-4,1e-3,1e-4,3e-3,3e-5),(.1,1.,.01),((600,10),(600,4),(0,10),(0,30))

def jobs(sets, sizes, seeds):
    "All fits in order of interest; `n` 0 is all images; the rarer cells, norm layers training at other ratios, are each seed's last"
    res = []
    for seed in range(seeds):
        rare = []
        for n,e in budgets:
            for size in sizes:
                for s in sets:
                    c = dict(data=s, size=size, n=n, epochs=e, seed=seed)
                    res += [dict(c, how='layers', hi=h, ratio=r, norm='running') for r in ratios for h in his]
                    res += [dict(c, how='layers', hi=h, ratio=ratios[0], norm='group') for h in his]
                    res += [dict(c, how='fine_tune', hi=h) for h in (2e-3,5e-3,1e-2,2e-2)]
                    rare += [dict(c, how='layers', hi=h, ratio=r, norm='group') for r in ratios[1:] for h in his]
        res += rare
    return res

def work(a, k, dev, turn, deadline):
    "Process `k`: take the next fit until time or fits are over, or three in a row fail"
    torch.set_num_threads(1)
    dir,cache,starts,failed = Path(a.dir),{},{},0
    depths,todo = json.loads((dir/f'{lite0}.json').read_text()),jobs(sorted(o.name for o in (dir/'images').iterdir()), a.sizes, a.seeds)
    with open(Path(a.out)/f'sweep-{k%4}.jsonl', 'a') as f: # a line is one write; more files would not all travel back
        while time.time()<deadline and failed<3:
            with turn.get_lock(): i,turn.value = turn.value,turn.value+1
            if i>=len(todo): return
            job = todo[i]
            try:
                key = job['data'],job['size']
                if key not in cache: cache[key] = [o.to(dev) for o in read(dir/'images'/job['data'], job['size'])]
                x,y = cache[key]
                xy = {p:(x[j],y[j]) for p,j in zip(('train','valid','test'), [o.to(dev) for o in parts(len(x), job['n'])])}
                r,failed = fit(dir, job, xy, depths, starts, deadline),0
            except OutOfTime: return
            except Exception as e: r,failed = dict(job, error=error_text(e)),failed+1
            f.write(json.dumps(r)+'\n')
            f.flush()

# ---- table

def load(out): return [json.loads(l) for f in sorted(Path(out).glob('sweep-*.jsonl')) for l in f.read_text().splitlines()]

def mean_of(rows, point, part='test', key='acc'): return statistics.mean(r[point][part][key] for r in rows)

def case_line(case, rows):
    "Heads, the best cell on validation images and what it scores on test images, the spread, `fine_tune` tuned and not; means over seeds"
    cells,line = {},' '.join(map(str, case))+f' ({len(rows)} fits):'
    for r in rows: cells.setdefault((r['how'],r['hi'],r.get('ratio'),r.get('norm')), []).append(r)
    ft,ls = ([k for k in cells if k[0]==how] for how in ('fine_tune','layers'))
    if ls:
        heads = [r for k in ls for r in cells[k]]
        k,p = max(((k,p) for k in ls for p in ('end','ema','mix50')), key=lambda o: mean_of(cells[o[0]], o[1], 'valid'))
        ends = [mean_of(cells[o], 'end') for o in ls]
        line += f" head {mean_of(heads, 'head'):.3f} {mean_of(heads, 'head', key='tempered'):.3f}, best {mean_of(cells[k], p):.3f} {mean_of(cells[k], p, key='tempered'):.3f} at {k[1:]} {p}, cells {min(ends):.3f}-{max(ends):.3f};"
    if ft:
        k = max(ft, key=lambda o: mean_of(cells[o], 'end', 'valid'))
        line += f" fine_tune {mean_of(cells[min(ft)], 'end'):.3f} at {min(ft)[1]:g}, tuned {mean_of(cells[k], 'end'):.3f} {mean_of(cells[k], 'end', key='tempered'):.3f} at {k[1]:g}"
    return line
