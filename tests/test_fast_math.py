"`to_fast`: chooses by measurement, changes nothing else, and goes back"
import copy

import numpy as np,pytest,torch
from torch import nn

from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoaders,Learner,ProgressCallback,noop,set_seed
from fastai.data.all import DataLoader
from torch.utils.data import TensorDataset

from fastai_discriminative.all import *
from fastai_discriminative import fast_math

def autocast_is_on():
    try: return torch.is_autocast_enabled('cpu')
    except TypeError: return torch.is_autocast_cpu_enabled() # before torch 2.4

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.drop,self.bn,self.b,self.out = nn.Conv2d(3,8,3,2),nn.Dropout(.5),nn.BatchNorm2d(8),nn.Conv2d(8,8,3,2),nn.Linear(8,3)
        self.seen = []
    def forward(self, x):
        x = self.b(self.bn(self.drop(self.a(x))))
        self.seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last), autocast_is_on()))
        return self.out(x.mean((2,3)))

@pytest.fixture
def learn():
    set_seed(0)
    ds = TensorDataset(torch.randn(24,3,32,32), torch.randint(0, 3, (24,)))
    learn = Learner(DataLoaders(DataLoader(ds, bs=8, shuffle=True), DataLoader(ds, bs=8)), Net(), loss_func=CrossEntropyLossFlat(), opt_func=fused_adamw)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn.split()

def state(learn): return {n:o.detach().clone() for n,o in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

ways = (False,False),(True,False),(False,True),(True,True)

costs = {(100,50,90,49): (True,False), (100,97,85,84): (False,False), (100,80,60,40): (True,True), (100,99,70,90): (False,True)}

@pytest.mark.parametrize('ms,best', costs.items(), ids=str)
def test_precision_has_to_earn_its_place(ms, best): assert fast_math._fastest(dict(zip(ways, ms)))==best

def test_takes_what_was_fastest(learn, monkeypatch):
    monkeypatch.setattr(fast_math, '_step_ms', lambda m, xb, last, bf16: 10.+5*bf16-4*last)
    learn.to_fast()
    assert (learn.fast_math.channels_last,learn.fast_math.bf16)==(True,False) and len(learn.fast_math.ms)==4
    assert learn.model.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert 'channels last, 32 bits; channels first, 32 bits 10 ms' in repr(learn.fast_math)

def test_measuring_leaves_no_trace(learn):
    learn.freeze()
    p = learn.model.out.weight
    p.grad = torch.ones_like(p)
    before,rng,flags,modes = state(learn),torch.get_rng_state(),[o.requires_grad for o in learn.model.parameters()],[m.training for m in learn.model.modules()]
    learn.to_fast()
    assert same(before, state(learn)) and torch.equal(rng, torch.get_rng_state()) and torch.equal(p.grad, torch.ones_like(p))
    assert flags==[o.requires_grad for o in learn.model.parameters()] and modes==[m.training for m in learn.model.modules()]

def test_interrupt_while_measuring(learn, monkeypatch):
    def _stops(*args): raise KeyboardInterrupt
    monkeypatch.setattr(fast_math, '_step_ms', _stops)
    before,flags = state(learn),[o.requires_grad for o in learn.model.parameters()]
    with pytest.raises(KeyboardInterrupt): learn.to_fast()
    assert not hasattr(learn, 'fast_math') and same(before, state(learn)) and flags==[o.requires_grad for o in learn.model.parameters()]

@pytest.mark.parametrize('last,bf16', [(True,False), (False,True), (True,True)])
def test_used_in_the_forward_pass_alone(learn, last, bf16):
    class Looks(Callback):
        def after_loss(self): self.loss_dtype,self.on = self.learn.loss.dtype,autocast_is_on()
    learn.to_fast(last, bf16)
    looks = Looks()
    learn.fit_one_cycle(1, 1e-3, cbs=looks)
    dtypes,lasts,on = map(set, zip(*learn.model.seen))
    assert dtypes=={torch.bfloat16 if bf16 else torch.float32} and (lasts=={True} if last else True) and on=={bf16}
    assert looks.loss_dtype==torch.float32 and not looks.on
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())
    assert 'forward' not in vars(learn.model)

def test_predictions_are_32_bits(learn):
    learn.to_fast(False, True)
    assert learn.get_preds()[0].dtype==torch.float32 and len(learn.validate())==1

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_autocast_ends_with_a_failing_pass(learn, error, monkeypatch):
    learn.to_fast(False, True)
    def _fails(x): raise error('stop')
    monkeypatch.setattr(learn.model.bn, 'forward', _fails)
    with pytest.raises(error): learn.fit_one_cycle(1, 1e-3)
    assert not autocast_is_on() and 'forward' not in vars(learn.model)
    with pytest.raises(error): learn.validate()
    assert not autocast_is_on()

def test_goes_back(learn):
    learn.to_fast(True, True).to_fast(False, False)
    assert not hasattr(learn, 'fast_math') and learn.model.b.weight.is_contiguous() and not any(isinstance(o, FastMath) for o in learn.cbs)

def test_channels_last_gives_the_same_training(learn):
    other = copy.deepcopy(learn).to_fast(True, False)
    for o in (learn,other):
        set_seed(1)
        o.model.drop.p = 0. # its dice fall in the order of memory
        o.fit_one_cycle(2, 1e-3)
    assert np.allclose(learn.recorder.losses, other.recorder.losses, rtol=1e-3)

def test_moments_follow_the_memory_format(learn):
    learn.fit_one_cycle(1, 1e-3)
    learn.to_fast(True, False)
    learn.fit(1, 1e-3)
    s = learn.opt.opt.state[learn.model.b.weight]['exp_avg']
    assert s.is_contiguous(memory_format=torch.channels_last)

def test_beside_fastais_mixed_precision(learn, monkeypatch):
    monkeypatch.setattr(fast_math, '_step_ms', lambda m, xb, last, bf16: 10.-9*bf16)
    learn.to_bf16().to_fast()
    assert not learn.fast_math.bf16

def small(model, *shape):
    ds = TensorDataset(torch.randn(8,*shape), torch.randint(0, 3, (8,)))
    learn = Learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4)), model, loss_func=CrossEntropyLossFlat(), opt_func=fused_adamw)
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def test_a_way_that_does_not_run_is_said_and_not_taken():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.out = nn.Conv2d(3,4,3),nn.Linear(4*36,3)
        def forward(self, x): return self.out(self.a(x).view(len(x), -1))
    learn = small(Views(), 3,8,8)
    with pytest.warns(UserWarning, match='cannot run with channels last'): learn.to_fast(bf16=False)
    assert not learn.fast_math.channels_last
    learn.fit(1)

def test_volumes_have_another_order_of_memory():
    net = nn.Sequential(nn.Conv3d(1,4,3), nn.Flatten(), nn.Linear(4*8,3))
    learn = small(net, 1,4,4,4)
    with pytest.warns(UserWarning, match='cannot run with channels last'): learn.to_fast(bf16=False)
    learn.fit(1)

def test_dicts_and_buffers_put_in_anew():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(12,3)
            self.register_buffer('n', torch.zeros(1))
            self.register_buffer('k', torch.randn(1,3,2,2))
        def forward(self, x):
            self.n = self.n+1
            return dict(logits=self.out((x*self.k).flatten(1)))
    learn = small(Odd(), 3,2,2)
    n,k = learn.model.n,learn.model.k.clone()
    learn.to_fast()
    assert learn.model.n is n and n.item()==0 and torch.equal(learn.model.k, k)

def test_it_measures_where_fits_run(learn, monkeypatch):
    "A new learner's model may still be on the CPU of a machine with a GPU"
    seen,stock = [],learn.model.to
    def _to(*args, **kwargs):
        seen.append(args)
        return stock(*args, **kwargs)
    monkeypatch.setattr(learn.model, 'to', _to)
    learn.to_fast()
    assert seen[0]==(learn.dls.device,)
