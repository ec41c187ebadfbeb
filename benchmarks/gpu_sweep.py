"""The fits of `bench_gpu.py`, in plain torch, with all images in the device's memory: which rates, ratio and norm policy a pretrained body needs

A fit: fastai's head on features computed once, 20 epochs; then all layers in one cycle, each at `hi*ratio**(1-depth)`, the head at `hi`. All cells of a case train side by side, on
the same batches: a step of theirs is one graph of the GPU's. Each seed has other images to train, validate and test on. Scored on validation and test images:
the head, the end, the average of the weights over about a quarter of the steps (`ema`), and halfway to it (`mix50`). `tempered` is the loss at the best of 29 temperatures.
`trial` is a cycle of 12 steps from the head at the same rates, on validation images. With norm `running` all norm layers, the head's too, keep their statistics; with `group` all train. `fine_tune` is fastai's, in plain torch.
"""
import json,math,statistics,time,traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np,torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

lite0,exts,trial = 'tf_efficientnet_lite0',('.png','.jpg','.jpeg','.webp'),12 # steps of a trial

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

# ---- networks side by side

def norms(m): return [o for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm)]
def cast(dev): return torch.autocast(dev, torch.bfloat16, enabled=dev=='cuda')

def as_shape(row, shape):
    "A part of a row as a tensor; convolutions' weights in channels-last memory"
    return row.view(shape[0], *shape[2:], shape[1]).permute(0,3,1,2) if len(shape)==4 else row.view(shape)

class Nets:
    "`k` networks whose numbers are the rows of one matrix, so that one step trains them all; parameters first, then the statistics of norm layers"
    def __init__(self, arch, dir, n_out, k, dev='cpu'):
        self.nets,at = [Net(arch, dir, n_out).to(dev, memory_format=torch.channels_last) for _ in range(k)],0
        self.dev,self.spans = dev,[]
        own = [(n,p,True) for n,p in self.nets[0].named_parameters()]+[(n,b,False) for n,b in self.nets[0].named_buffers() if 'running' in n]
        for n,t,trains in own:
            self.spans.append((n, at, t.numel(), t.shape, trains))
            at += -(-t.numel()//8)*8 # aligned
            if trains: self.n_params = at
        self.w = torch.zeros(k, at, device=dev)
        with torch.no_grad(): self.views = [[self._own(net, row, *o) for o in self.spans] for net,row in zip(self.nets, self.w)]

    def _own(self, net, row, name, at, n, shape, trains):
        "Let tensor `name` of `net` be a part of `row`"
        path,_,key = name.rpartition('.')
        m,v = net.get_submodule(path),as_shape(row[at:at+n], shape)
        v.copy_(getattr(m, key))
        if trains: getattr(m, key).data = v
        else: m._buffers[key] = v
        return v

    def per_param(self, f):
        "A number for each parameter, by name and shape, as a row"
        res = torch.zeros(self.n_params, device=self.dev)
        for n,at,k,shape,trains in self.spans:
            if trains: res[at:at+k] = f(n, shape)
        return res

# ---- training

class OutOfTime(Exception): "The time limit cut a fit"

def one_cycle(p, warm=.25, div=25., final=1e-5):
    "Share of the peak rate at `p` of the time, and momentum, as in fastai's `fit_one_cycle`"
    def _cos(a, b, q): return a+(1+math.cos(math.pi*(1-q)))*(b-a)/2
    return (_cos(1/div,1,p/warm),_cos(.95,.85,p/warm)) if p<warm else (_cos(1,final,(p-warm)/(1-warm)),_cos(.85,.95,(p-warm)/(1-warm)))

def train_head(net, f, y, epochs=20, lr=2e-3, bs=32):
    "The head on features `f`; vectors are not decayed"
    net.head.train()
    groups = [dict(params=[p for p in net.head.parameters() if (p.ndim>1)==d], lr=lr, weight_decay=.01*d) for d in (True,False)]
    opt,n = torch.optim.AdamW(groups, eps=1e-5, foreach=True),max(1, len(f)//bs)
    for e in range(epochs):
        i = torch.randperm(len(f)).to(f.device)
        for b in range(n):
            share,mom = one_cycle((e*n+b)/(epochs*n))
            for g in opt.param_groups: g['lr'],g['betas'] = lr*share,(mom,.99)
            j = i[b*bs:(b+1)*bs]
            F.cross_entropy(net.head(f[j]), y[j]).backward()
            opt.step()
            opt.zero_grad()

class Cycle:
    "One cycle of AdamW for all of `nets`; each step has the same images for all, and looks up its number on the device, so that it can be recorded once and played again"
    def __init__(self, nets, x, y, rates, epochs, running, mean=None, bs=32, **cycle):
        self.o,self.x,self.y,self.rates,self.mean,self.n = nets,x,y,rates,mean,max(1, len(x)//bs)*epochs
        for net,r in zip(nets.nets, running):
            net.train()
            if r: # with only the body's in eval mode the fit diverges: drawings at 64 px, 1e-3, .226 in place of .629
                for m in norms(net): m.eval()
        bs,dev,decay = min(bs, len(x)),nets.dev,max(0., 1-4/max(4, self.n))
        self.idx = torch.stack([i for _ in range(epochs) for i in torch.randperm(len(x))[:max(1, len(x)//bs)*bs].split(bs)]).to(dev)
        rows = [(s, 1-b, 1/(1-b**t), (1-.99**t)**-.5, 1-min(decay, t/(10+t))) for t in range(1, self.n+1) for s,b in [one_cycle((t-1)/self.n, **cycle)]]
        self.plan,self.at = torch.tensor(rows, device=dev),torch.zeros(1, dtype=torch.long, device=dev)
        self.decay = nets.per_param(lambda n,shape: .01*(len(shape)>1))
        self.g,self.m,self.v = (torch.zeros_like(nets.w[:,:nets.n_params]) for _ in range(3))
        self.gs = [[as_shape(row[at:at+k], shape) for _,at,k,shape,trains in nets.spans if trains] for row in self.g]
        self.side = [torch.cuda.Stream() for _ in range(6)] if dev=='cuda' else []

    def gradient(self, k, x, y):
        net = self.o.nets[k]
        with cast(self.o.dev): out = net(x)
        grads = torch.autograd.grad(F.cross_entropy(out.float(), y), list(net.parameters()))
        torch._foreach_copy_(self.gs[k], grads)

    def step(self):
        share,rest,fix1,fix2,take = self.plan.index_select(0, self.at)[0]
        i = self.idx.index_select(0, self.at)[0]
        x,y = augment(self.x.index_select(0, i).float()/255),self.y.index_select(0, i)
        if self.side: self.spread(x, y)
        else:
            for k in range(len(self.o.nets)): self.gradient(k, x, y)
        with torch.no_grad():
            w,lr = self.o.w[:,:self.o.n_params],self.rates*share
            self.m.lerp_(self.g, rest)
            self.v.mul_(.99).addcmul_(self.g, self.g, value=.01)
            w.mul_(1-lr*self.decay).sub_(lr*fix1*self.m/((self.v.sqrt()*fix2).add_(1e-5)))
            if self.mean is not None: self.mean.lerp_(self.o.w, take)
            self.at.add_(1)

    def spread(self, x, y):
        "The gradients of all, on streams of their own"
        now = torch.cuda.current_stream()
        for s in self.side: s.wait_stream(now)
        for k in range(len(self.o.nets)):
            with torch.cuda.stream(self.side[k%len(self.side)]): self.gradient(k, x, y)
        for s in self.side: now.wait_stream(s)

    def recorded(self):
        "`step` as a graph of the GPU's, nothing changed yet"
        kept = [t for t in (self.o.w,self.m,self.v,self.at,self.mean) if t is not None]
        was,main,graph = [t.clone() for t in kept],torch.cuda.Stream(),torch.cuda.CUDAGraph()
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            for _ in range(2): self.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=main): self.step()
        for t,o in zip(kept, was): t.copy_(o)
        return graph

    def run(self, deadline=math.inf):
        "All steps; how they ran"
        how,step,start = 'eager',self.step,self.o.w.clone()
        if self.o.dev=='cuda':
            for how in ('streams','graph'):
                try: step = self.recorded().replay
                except RuntimeError as e:
                    print(f'{how}: {error_text(e)}', flush=True)
                    for t in (self.m,self.v,self.at): t.zero_()
                    self.o.w.copy_(start)
                    if self.mean is not None: self.mean.copy_(start)
                    self.side,how = [],'eager'
                else: break
        for t in range(self.n):
            if t%20==0:
                if time.time()>deadline: raise OutOfTime()
                if self.o.dev=='cuda': torch.cuda.synchronize() # else the clock would say nothing
            step()
        return how

def cycle(nets, x, y, rates, epochs, running, mean=None, deadline=math.inf, **kwargs): return Cycle(nets, x, y, rates, epochs, running, mean, **kwargs).run(deadline)

@torch.no_grad()
def features(net, x, bs=512):
    net.eval()
    with cast(x.device.type): return torch.cat([net.features(x[i:i+bs].float()/255).float() for i in range(0, len(x), bs)])

def score(logits, y):
    "Accuracy, loss, and loss at the best of 29 temperatures, from 1/8 to 16"
    lps = F.log_softmax(logits*2**(torch.arange(-16, 13, device=y.device)/4).view(-1,1,1), -1)
    losses = -lps.gather(2, y.view(1,-1,1).expand(len(lps),-1,1)).mean((1,2))
    return dict(acc=(logits.argmax(1)==y).float().mean().item(), loss=losses[16].item(), tempered=losses.min().item())

@torch.no_grad()
def evaluate(net, data): return {k:score(net.head.eval()(features(net, x)), y) for k,(x,y) in data.items()}

def layer_rates(nets, depths, hi, ratio):
    "The rate of each parameter, by the depth of its layer; the head's is `hi`"
    return nets.per_param(lambda n,shape: hi*ratio**(1-depths[n.removeprefix('body.')]) if n.startswith('body.') else hi)

def fine_tune_rates(nets, lr):
    "fastai's: the head for an epoch, norm layers training at a tenth of its rate; then two groups, a hundred times apart"
    ns = {f'{k}.' for k,m in nets.nets[0].named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return [nets.per_param(lambda n,shape: lr if n.startswith('head.') else lr/10*(n.rpartition('.')[0]+'.' in ns)),
        nets.per_param(lambda n,shape: lr/2 if n.startswith('head.') else lr/200)]

# ---- fits

def fit(dir, case, cells, xy, depths, deadline=math.inf, arch=lite0):
    "What each of `cells` scored on `case`; all are of one kind, and train side by side from the same head"
    (x,y),data,t0 = xy['train'],{k:xy[k] for k in ('valid','test')},time.time()
    torch.manual_seed(case['seed'])
    nets = Nets(arch, dir, int(max(o.max() for _,o in xy.values()))+1, len(cells), x.device.type)
    res = fine_tune(nets, x, y, cells, case['epochs'], data, deadline) if cells[0]['how']=='fine_tune' else layers(nets, x, y, cells, case, xy, data, depths, deadline)
    s = round((time.time()-t0)/len(cells), 2)
    return [dict(case, **c, arch=arch, n_train=len(x), share_s=s, **r) for c,r in zip(cells, res)]

def fine_tune(nets, x, y, cells, epochs, data, deadline):
    nets.w[1:] = nets.w[0]
    first,rest = zip(*[fine_tune_rates(nets, c['hi']) for c in cells])
    cycle(nets, x, y, torch.stack(first), 1, [False]*len(cells), deadline=deadline, warm=.99)
    how = cycle(nets, x, y, torch.stack(rest), epochs, [False]*len(cells), deadline=deadline, warm=.3, div=5.)
    return [dict(ran=how, end=evaluate(o, data)) for o in nets.nets]

def layers(nets, x, y, cells, case, xy, data, depths, deadline):
    "The head on features; a trial of each cell, put back; the cycle of each cell; averages"
    train_head(nets.nets[0], features(nets.nets[0], x), y)
    nets.w[1:] = nets.w[0]
    start,head,mean = nets.w.clone(),evaluate(nets.nets[0], data),nets.w.clone()
    rates,running = torch.stack([layer_rates(nets, depths, c['hi'], c['ratio']) for c in cells]),[c['norm']=='running' for c in cells]
    cycle(nets, x[:trial*32], y[:trial*32], rates, 1, running, deadline=deadline)
    res = [dict(head=head, trial=evaluate(o, dict(valid=xy['valid']))) for o in nets.nets]
    nets.w.copy_(start)
    how = cycle(nets, x, y, rates, case['epochs'], running, mean, deadline=deadline)
    end = nets.w.clone()
    for k,w in dict(end=end, ema=mean, mix50=(start+mean)/2).items():
        nets.w.copy_(w)
        for r,o in zip(res, nets.nets): r.update({k:evaluate(o, data), 'ran':how})
    return res

def error_text(e):
    at = traceback.extract_tb(e.__traceback__)[-1]
    return f'{type(e).__name__}: {str(e)[:500]} ({Path(at.filename).name}, line {at.lineno})'

rates_by_ratio = {.1:(1e-5,3e-5,1e-4,3e-4,1e-3,2e-3,3e-3), 1.:(3e-5,1e-4,3e-4,1e-3), .01:(3e-4,1e-3,3e-3)}
layer_cells = [dict(how='layers', hi=h, ratio=r, norm='running') for r,hs in rates_by_ratio.items() for h in hs]+[
    dict(how='layers', hi=h, ratio=.1, norm='group') for h in (3e-4,1e-3,3e-3)]
fine_tune_cells = [dict(how='fine_tune', hi=h) for h in (2e-3,5e-3,1e-2,2e-2)]

def jobs(sets, sizes, seeds):
    "Cases and cells in order of interest; `n` 0 is all images"
    def _of(budgets, seeds): return [(dict(data=s, size=size, n=n, epochs=e, seed=seed), cells) for seed in seeds for n,e in budgets for size in sizes for s in sets for cells in (layer_cells,fine_tune_cells)]
    return _of([(600,10),(0,10),(600,4)], range(1))+_of([(600,10)], range(1, seeds))+_of([(0,30)], range(1))+_of([(0,10),(600,4)], range(1, seeds))

def work(a, k, dev, turn, deadline):
    "Process `k`: take the next case until time or cases are over, or three in a row fail"
    torch.set_num_threads(1)
    dir,cache,failed = Path(a.dir),{},0
    depths,todo = json.loads((dir/f'{lite0}.json').read_text()),jobs(sorted(o.name for o in (dir/'images').iterdir()), a.sizes, a.seeds)
    with open(Path(a.out)/f'sweep-{k%4}.jsonl', 'a') as f: # a line is one write; more files would not all travel back
        while time.time()<deadline and failed<3:
            with turn.get_lock(): i,turn.value = turn.value,turn.value+1
            if i>=len(todo): return
            case,cells = todo[i]
            try:
                key = case['data'],case['size']
                if key not in cache: cache[key] = [o.to(dev) for o in read(dir/'images'/case['data'], case['size'])]
                x,y = cache[key]
                xy = {p:(x[j],y[j]) for p,j in zip(('train','valid','test'), [o.to(dev) for o in parts(len(x), case['n'], case['seed'])])}
                rows,failed = fit(dir, case, cells, xy, depths, deadline),0
            except OutOfTime: return
            except Exception as e: rows,failed = [dict(case, error=error_text(e))],failed+1
            f.write(''.join(json.dumps(r)+'\n' for r in rows))
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
