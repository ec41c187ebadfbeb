"Code that each process of `test_processes.py` runs: all cases one after the other, with results in one file per rank"
import sys,traceback,warnings
from dataclasses import replace
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai.distributed import *
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
import fastai_discriminative.auto as auto_room,fastai_discriminative.points as points
from fastai_discriminative.all import *
from unittest.mock import patch as patched
from helpers import with_factor

n_train,n_valid,bs = 32,16,8

def _broadcast(self, t, rank): # fastai's moves the indices to a GPU
    t = LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = _broadcast

def images(n, seed):
    "`n` noisy images, each class brighter than the one before"
    ys = torch.arange(n)%3
    xs = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + 2*ys.view(-1,1,1,1)
    return list(zip(xs, ys))

def loaders(world):
    "Of `bs` images for each of two processes, or for one process the batches that two make together"
    idxs,bs2 = torch.arange(n_train),bs*2//world
    if world==1: idxs = idxs.view(2, -1, bs).transpose(0, 1).flatten()
    return DataLoaders(DataLoader(images(n_train, 0), bs=bs2, get_idxs=idxs.tolist), DataLoader(images(n_valid, 1), bs=bs2), device='cpu')

def conv(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride=2), nn.GroupNorm(2, nf), nn.ReLU())
def own_net(): return nn.Sequential(conv(3,8), conv(8,8), conv(8,16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,3))

class ThawAt(Callback):
    "`opt.freeze_to(0)` at `event` of the third batch"
    def __init__(self, event, order=0):
        self.order,self.n = order,0
        setattr(self, event, self._go)
    def _go(self):
        if not self.training: return
        self.n += 1
        if self.n==3: self.opt.freeze_to(0)

class ThawAlone(Callback):
    "`opt.freeze_to(0)` in the second process, before the second epoch"
    def before_epoch(self):
        if self.epoch==1 and rank_distrib(): self.opt.freeze_to(0)

class Hooked(Callback):
    "Sends gradients in half precision, and notes with how many hooks each epoch ends"
    order = 11.5 # after `DistributedTrainer`
    def before_fit(self):
        self.learn.hooks = []
        self.learn.model.register_comm_hook(None, fp16_compress_hook)
    def after_train(self): self.learn.hooks.append((id(self.learn.model), [o[0].__name__ for o in self.learn.model._comm_hooks]))

class Gap(list):
    "A data set without the item 5, which is of the second process's share of features"
    def __getitem__(self, i):
        if i==5: raise SkipItemException
        return super().__getitem__(i)

def gap(world):
    learn = plain(world)
    learn.dls.train = DataLoader(Gap(learn.dls.train.dataset), bs=bs)
    return learn

def one_nan(world):
    "An image that is not finite, of the second process's share of the batches"
    learn = plain(world)
    learn.dls.train.dataset[-1][0].fill_(float('nan'))
    return learn

def plain(world, arch=None, frozen=True, **kwargs):
    set_seed(0)
    loss = CrossEntropyLossFlat()
    if arch: learn = discriminative_learner(loaders(world), arch, pretrained=False, preset=arch, n_out=3, loss_func=loss, metrics=accuracy, **kwargs)
    else: learn = Learner(loaders(world), own_net(), loss_func=loss, metrics=accuracy).split(fused=True, **kwargs)
    learn.pretrained = True
    learn.preset = replace(learn.preset, lr_low=3e-4, lr_high=3e-3) # random weights have far to go
    if frozen: learn.freeze()
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

strategies = ['lp_ft','discriminative','gradual_unfreeze','freeze_unfreeze','surgical','layer_decay','feature_extraction','auto']
phases = [Phase(2, 1e-3, frozen=-1), Phase(3, 1e-3)]

def _with_trials(learn):
    "`auto` as in a fit that is long enough for trials, from a head that is too sure"
    with patched.object(auto_room, '_trial_steps', lambda n: 6), patched.object(points, '_tempered', with_factor(.5)): learn.fit_strategy('auto', 3)

def cases():
    "Name -> function of the world's size that returns a learner, and one that trains it"
    for s in strategies:
        for frozen in (True,False): yield f'{s} {frozen}',partial(plain, frozen=frozen),lambda l,s=s: l.fit_strategy(s, 2+(s=='gradual_unfreeze'))
    yield 'phases',plain,lambda l: l.fit_strategy(phases)
    yield 'to and fro',plain,lambda l: l.fit_strategy([Phase(1, 1e-3), Phase(1, 1e-3, frozen=-1), Phase(1, 1e-3, frozen=1, train_norm=False), Phase(1, 1e-3)])
    for event in ('after_batch','before_batch','after_step'): yield event,plain,lambda l,e=event: l.fit(2, 1e-3, cbs=ThawAt(e))
    yield 'accumulated',plain,lambda l: l.fit(2, 1e-3, cbs=[ThawAt('after_batch'), GradientAccumulation(16 if len(l.dls.train)>2 else 32)])
    yield 'trials',plain,_with_trials
    yield 'two fits',plain,lambda l: [l.fit(1, 1e-3), l.unfreeze(), l.fit(1, 1e-3)]

def more():
    "Cases that one process does not repeat"
    for name,s,frozen in (('resnet auto','auto',True),('resnet gradual','gradual_unfreeze',False)):
        yield name,partial(plain, arch='resnet10t', frozen=frozen),lambda l,s=s: l.fit_strategy(s, 3)
    yield 'hook',plain,lambda l: l.fit_strategy(phases, cbs=Hooked())
    yield 'not finite features',one_nan,lambda l: l.fit_strategy('auto', 2)
    yield 'not finite',one_nan,lambda l: l.fit_strategy(phases)
    yield 'item missing',gap,lambda l: l.fit(1, 1e-3, cbs=CachedFeatures())
    for event in ('after_pred','before_batch'): yield f'late {event}',plain,lambda l,e=event: l.fit(2, 1e-3, cbs=ThawAt(e, order=-1 if e=='after_pred' else 60))
    yield 'alone',plain,lambda l: l.fit(2, 1e-3, cbs=ThawAlone())

def result(learn):
    ev,best = getattr(learn, 'auto_evidence', None),getattr(learn, 'best_point', None)
    res = dict(state={k:v.clone() for k,v in learn.model.state_dict().items()}, values=[list(map(float, o)) for o in learn.recorder.values])
    if hasattr(learn, 'hooks'): res.update(hooks=[o for _,o in learn.hooks], n_wrappers=len({i for i,_ in learn.hooks}))
    if ev:
        res.update({k:getattr(ev, k) for k in ('scale','lrs','why')}, trials=[(t.lr,t.loss,t.damage) for t in ev.trials])
        res['points'] = [(p.name,p.loss,p.value) for p in ev.points]
    return res

def run(learn, train, world):
    start = {k:v.clone() for k,v in learn.model.state_dict().items()}
    try:
        if world==1: train(learn)
        else:
            with learn.distrib_ctx(sync_bn=False, cpu=True): train(learn)
        return dict(result(learn), start=start)
    except DiscriminativeError as e: return dict(error=type(e).__name__, message=str(e))
    except Exception as e: return dict(error=type(e).__name__, message=str(e)[:2000], trace=traceback.format_exc())

if __name__=='__main__':
    out,world = sys.argv[1],max(1, num_distrib())
    torch.set_num_threads(1)
    only = sys.argv[2:]
    todo = [*cases(), *(more() if world>1 else [])]
    torch.save({n: run(make(world), train, world) for n,make,train in todo if not only or n in only}, f'{out}-{rank_distrib()}')
