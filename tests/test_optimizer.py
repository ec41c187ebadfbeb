"Fused optimisers equal fastai's own, decay only what they should, never change frozen parameters, and save their state by name"
import copy,pickle,random,warnings
from functools import partial

import numpy as np,pytest,torch
from torch import nn
from torch.utils.data import TensorDataset

from fastai.basics import Learner,DataLoaders,DataLoader,MSELossFlat,load_learner,L
from fastai.callback.all import GradientAccumulation,GradientClip,MixedPrecision,ReduceLROnPlateau,SchedCos
from fastai.callback.channelslast import ChannelsLast
from fastai.optimizer import Adam,SGD,RAdam,QHAdam,Lamb,Larc,RMSProp,ranger,OptimWrapper

from fastai_discriminative.groups import ParamLists
from fastai_discriminative.optimizer import FusedOptimizer,OptimizerStateError,fused_adamw,fused_sgd,optimizer_units
from fastai_discriminative.moments import copy_like,same_layout
from fastai_discriminative.optimizer import _works
from fastai_discriminative.registry import DiscriminativeError

impls = [o for o in ('fused','foreach','loop') if _works(torch.optim.AdamW, o, torch.device('cpu'), torch.float32)]
sgd_impls = [o for o in ('fused','foreach','loop') if _works(torch.optim.SGD, o, torch.device('cpu'), torch.float32)]

def net(seed=0):
    torch.manual_seed(seed)
    conv = lambda n: [nn.Conv2d(n,6,3), nn.GroupNorm(2,6), nn.ReLU()]
    return nn.Sequential(*conv(3), *conv(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2))

def plain(m):
    ps = list(m.parameters())
    return [ps[a:b] for a,b in zip([0,4,8], [4,8,len(ps)])]

def named(m, cuts=(4,8)):
    ps = list(m.named_parameters())
    return [ps[a:b] for a,b in zip([0,*cuts], [*cuts,len(ps)])]

class NamedLists(list):
    "Stand-in for any splitter result with names"
    def __init__(self, m, cuts=(4,8), no_wd=()):
        gs = named(m, cuts)
        super().__init__([[p for _,p in g] for g in gs])
        self.names,self.no_wd,self.group_names = [[k for k,_ in g] for g in gs],frozenset(no_wd),[f'g{i}' for i in range(len(gs))]

def run(m, opt, n=25, sched=None, seed=1):
    "`n` steps on data that depend on `seed` only; `sched` maps a hyper-parameter to a function of progress"
    gen = torch.Generator().manual_seed(seed)
    for i in range(n):
        for k,f in (sched or {}).items(): opt.set_hyper(k, f(i/n))
        x,y = torch.randn(8,3,10,10, generator=gen, dtype=next(m.parameters()).dtype),torch.randint(0, 2, (8,), generator=gen)
        nn.functional.cross_entropy(m(x), y).backward()
        opt.step()
        opt.zero_grad()
    return m

def flat(m): return torch.cat([p.detach().flatten() for p in m.parameters()])
def clones(m): return [p.detach().clone() for p in m.parameters()]
def moved(m, before): return [not torch.equal(p, q) for p,q in zip(m.parameters(), before)]
def moments(opt, p, k='exp_avg'): return opt.opt.state[p][k]

scheds = {'constant': None, 'one_cycle': {'lr': SchedCos(np.array([1e-4,1e-3,1e-2]), np.array([1e-6,1e-5,1e-4])), 'mom': SchedCos(0.95,0.85)}}

# ---- the same numbers as fastai's own

@pytest.mark.parametrize('impl', impls)
@pytest.mark.parametrize('sched', scheds)
@pytest.mark.parametrize('kw', [{}, dict(wd=0.3), dict(wd=0.3, decouple_wd=False), dict(mom=0.8, sqr_mom=0.999, eps=1e-8, wd=0.)])
def test_equals_native_adam(impl, sched, kw):
    a,b = net().double(),net().double()
    run(a, Adam(plain(a), slice(1e-4,1e-2), **kw), sched=scheds[sched])
    run(b, fused_adamw(plain(b), slice(1e-4,1e-2), decay_1d=True, impl=impl, **kw), sched=scheds[sched])
    torch.testing.assert_close(flat(b), flat(a), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('impl', impls)
def test_equals_native_adam_in_float32(impl):
    a,b = net(),net()
    run(a, Adam(plain(a), 1e-3))
    run(b, fused_adamw(plain(b), 1e-3, decay_1d=True, impl=impl))
    torch.testing.assert_close(flat(b), flat(a), rtol=1e-3, atol=2e-5)

@pytest.mark.parametrize('impl', sgd_impls)
@pytest.mark.parametrize('sched', scheds)
@pytest.mark.parametrize('kw', [{}, dict(mom=0.9), dict(mom=0.9, wd=0.3), dict(mom=0.9, wd=0.3, decouple_wd=False), dict(wd=0.3)])
def test_equals_native_sgd(impl, sched, kw):
    a,b = net().double(),net().double()
    run(a, SGD(plain(a), slice(1e-4,1e-2), **kw), sched=scheds[sched])
    run(b, fused_sgd(plain(b), slice(1e-4,1e-2), decay_1d=True, impl=impl, **kw), sched=scheds[sched])
    torch.testing.assert_close(flat(b), flat(a), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('f', [fused_adamw, partial(fused_sgd, mom=0.9)])
def test_implementations_agree(f):
    res = [flat(run(m:=net().double(), f(plain(m), 1e-2, wd=0.1, impl=o))) for o in impls]
    for o in res[1:]: torch.testing.assert_close(o, res[0], rtol=1e-9, atol=1e-11)

def test_no_wd_equals_native_with_do_wd_flags():
    a,b = net().double(),net().double()
    na = Adam(plain(a), 1e-2, wd=0.3)
    for p in a.parameters():
        if p.ndim<=1: na.state[p]['do_wd'] = False
    torch.testing.assert_close(flat(run(b, fused_adamw(plain(b), 1e-2, wd=0.3))), flat(run(a, na)), rtol=1e-9, atol=1e-11)

def test_equals_native_over_random_partitions():
    rnd = random.Random(3)
    for _ in range(6):
        a,b = net().double(),net().double()
        n = rnd.randint(1, 6)
        where = [rnd.randrange(n) for _ in a.parameters()]
        part = lambda m: [[p for p,w in zip(m.parameters(), where) if w==i] for i in range(n)]
        lrs,wds,k = [10**rnd.uniform(-5,-2) for _ in range(n)],[rnd.choice([0.,.1,.5]) for _ in range(n)],rnd.randrange(n)
        oa,ob = Adam(part(a) , 1e-3),fused_adamw(part(b), 1e-3, decay_1d=True)
        for o in (oa,ob):
            o.set_hypers(lr=lrs, wd=wds)
            o.freeze_to(k)
        start = clones(b)
        if not any(p.requires_grad for p in b.parameters()): continue
        run(a, oa, n=5)
        run(b, ob, n=5)
        torch.testing.assert_close(flat(b), flat(a), rtol=1e-9, atol=1e-11)
        assert moved(b, start)==[w>=k for w in where]
        assert sorted(id(p) for g in ob.opt.param_groups for p in g['params'])==sorted(id(p) for p in b.parameters())

# ---- which kernels

class NoFused(torch.optim.SGD):
    "SGD of a torch that has no `fused` yet"
    def __init__(self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, *, foreach=None):
        super().__init__(params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, foreach=foreach)

class OnlyLoop(torch.optim.AdamW):
    "AdamW on a device without any multi-tensor kernel"
    def __init__(self, params, lr=1e-3, **kw):
        if kw.get('fused') or kw.get('foreach'): raise RuntimeError('not on this device')
        super().__init__(params, lr=lr, **kw)

@pytest.mark.parametrize('old,new,impl', [(NoFused,torch.optim.SGD,'foreach'), (OnlyLoop,torch.optim.AdamW,'loop')])
def test_falls_back_where_fused_does_not_work(old, new, impl):
    a,b = net().double(),net().double()
    oa,ob = FusedOptimizer(plain(a), old, lr=1e-2),FusedOptimizer(plain(b), new, lr=1e-2)
    torch.testing.assert_close(flat(run(a, oa)), flat(run(b, ob)), rtol=1e-9, atol=1e-11)
    assert {(g['fused'],g['foreach']) for g in oa.opt.param_groups}=={(False,impl=='foreach')}
    with pytest.raises(OptimizerStateError, match='has no fused'): FusedOptimizer(plain(a), old, lr=1e-2, impl='fused')

# ---- who is decayed

def decayed(opt):
    opt._sort_groups()
    return {opt._name(p) for g,(_,d) in zip(opt.opt.param_groups, opt._halves.slots) for p in g['params'] if d}

def test_who_is_decayed():
    m = net()
    weights = {'0.weight','3.weight','8.weight'}
    assert decayed(fused_adamw(named(m), 1e-3))==weights
    assert decayed(fused_adamw(NamedLists(m, no_wd=['3.weight','not.here']), 1e-3))==weights-{'3.weight'}
    assert decayed(fused_adamw(named(m), 1e-3, no_wd=['3.weight']))==weights-{'3.weight'}
    assert decayed(fused_adamw(named(m), 1e-3, no_wd='3.weight', decay_1d=True))=={k for k,_ in m.named_parameters()}-{'3.weight'}
    opt = fused_adamw(named(m), 1e-3, decay_1d=True)
    opt.state[m[0].weight]['do_wd'] = False
    assert decayed(opt)=={k for k,_ in m.named_parameters()}-{'0.weight'}

def test_a_bias_with_two_dimensions_is_not_decayed():
    m = nn.Module()
    m.bias,m.table = nn.Parameter(torch.ones(2,2)),nn.Parameter(torch.ones(2,2))
    assert decayed(fused_adamw([list(m.named_parameters())], 1e-3))=={'table'}

def test_wd_reaches_the_decayed_half_of_its_group_only():
    m = net()
    opt = fused_adamw(named(m), 1e-3)
    opt.set_hyper('wd', [0.1,0.2,0.3])
    opt._sync()
    assert [(i,d,g['weight_decay']) for g,(i,d) in zip(opt.opt.param_groups, opt._halves.slots)]==[
        (0,True,0.1),(0,False,0.),(1,True,0.2),(1,False,0.),(2,True,0.3),(2,False,0.)]
    assert [h['wd'] for h in opt.hypers]==[0.1,0.2,0.3] and len(opt.param_groups)==len(opt.param_lists)==3

@pytest.mark.parametrize('wd_bn_bias', [False, True])
def test_the_learner_s_wd_bn_bias(wd_bn_bias):
    learn = reg_learner(partial(fused_adamw, decay_1d=wd_bn_bias), wd_bn_bias=wd_bn_bias)
    learn.create_opt()
    names = {k for k,_ in learn.model.named_parameters()}
    assert decayed(learn.opt)==(names if wd_bn_bias else {'0.0.weight','1.0.weight','2.weight'})

def test_only_decay_moves_a_weight_with_zero_gradient():
    m = net()
    opt,before = fused_adamw(named(m), 1e-2, wd=0.5),clones(m)
    for p in m.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    for (k,p),q in zip(m.named_parameters(), before): torch.testing.assert_close(p.detach(), q*(1-1e-2*0.5) if p.ndim>1 else q, rtol=1e-6, atol=0)

# ---- hyper-parameters, as fastai sees them

def test_hypers_take_numbers_slices_and_lists():
    opt,native = fused_adamw(named(net()), 1e-3),Adam(plain(net()), 1e-3)
    for v in (1e-3, slice(1e-5,1e-3), slice(1e-3), [1e-5,1e-4,1e-3], np.array([1e-5,1e-4,1e-3]), L(1e-5,1e-4,1e-3)):
        for o in (opt,native): o.set_hyper('lr', v)
        assert [h['lr'] for h in opt.hypers]==pytest.approx([float(h['lr']) for h in native.hypers])
        assert all(type(h['lr']) is float for h in opt.hypers)
    assert set(opt.hypers[0])==set(native.hypers[0])

def test_hypers_refuse_what_does_not_fit():
    opt = fused_adamw(named(net()), 1e-3)
    with pytest.raises(AssertionError, match='Trying to set 2 values for lr but there are 3'): opt.set_hyper('lr', [1e-3,1e-3])
    with pytest.raises(OptimizerStateError, match="Unknown hyper-parameter 'sqr_mon'.*Did you mean 'sqr_mom'"): opt.set_hyper('sqr_mon', 0.9)

def test_editing_hypers_by_hand_has_effect():
    opt = fused_adamw(named(net()), 1e-3)
    opt._sync()
    opt.hypers[1]['lr'] = 7e-4
    opt._sync()
    assert [g['lr'] for g in opt.opt.param_groups]==[1e-3,1e-3,7e-4,7e-4,1e-3,1e-3]

def test_param_groups_can_be_read_and_written():
    opt = fused_adamw(named(net()), 1e-3)
    gs = opt.param_groups
    assert [len(g['params']) for g in gs]==[4,4,2] and gs[2]['lr']==1e-3
    opt.param_groups = [{**g, 'lr': 2e-3} for g in gs]
    assert [h['lr'] for h in opt.hypers]==[2e-3]*3

def test_unchanged_hypers_are_not_written_again():
    opt = fused_adamw([[nn.Parameter(torch.zeros(2,2))] for _ in range(40)], 1e-3)
    opt._sync()
    class Count(dict):
        n = 0
        def update(self, *a, **k):
            Count.n += 1
            super().update(*a, **k)
    opt.opt.param_groups = [Count(g) for g in opt.opt.param_groups]
    opt._sync()
    assert Count.n==0
    opt.hypers[5]['lr'] = 1.
    opt._sync()
    assert Count.n==2

def test_kernels_grow_with_groups_not_with_parameters():
    if 'fused' not in impls: pytest.skip(f"torch {torch.__version__} has no fused AdamW on the CPU")
    from torch.utils._python_dispatch import TorchDispatchMode
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.n += 1
            return f(*args, **(kwargs or {}))
    def calls(n):
        ps = [nn.Parameter(torch.zeros(2,2)) for _ in range(n)]
        opt = fused_adamw([ps[:n//2], ps[n//2:]], 1e-3)
        for _ in range(2):
            for p in ps: p.grad = torch.ones_like(p)
            with Calls() as c:
                c.n = 0
                opt.step()
                opt.zero_grad()
        return c.n
    assert calls(8)==calls(64)<=8

# ---- freezing

@pytest.mark.parametrize('f', [fused_adamw, partial(fused_sgd, mom=0.9)])
@pytest.mark.parametrize('n', [1, 2, -1])
def test_frozen_does_not_move_by_one_bit(f, n):
    m = net()
    opt = f(named(m), 1e-2, wd=0.1)
    run(m, opt, 5)
    nn.functional.cross_entropy(m(torch.randn(4,3,10,10)), torch.zeros(4, dtype=torch.long)).backward()
    opt.freeze_to(n)
    k,before = sum(len(o) for o in opt.param_lists[:n]),clones(m)
    assert opt.frozen_idx==n%3 and all(p.grad is None for ps in opt.param_lists[:n] for p in ps)
    run(m, opt, 20, {'lr': lambda t: 1e-2*(1-t)})
    assert moved(m, before)==[False]*k + [True]*(10-k)

def test_moments_survive_freeze_and_thaw():
    m = net()
    opt = fused_adamw(named(m), 1e-2)
    run(m, opt, 5)
    old = moments(opt, m[0].weight).clone()
    opt.freeze_to(2)
    run(m, opt, 5)
    assert torch.equal(moments(opt, m[0].weight), old)
    opt.unfreeze()
    assert torch.equal(moments(opt, m[0].weight), old) and opt.frozen_idx==0
    before = clones(m)
    run(m, opt, 1)
    assert all(moved(m, before)) and not torch.equal(moments(opt, m[0].weight), old)
    assert int(opt.opt.state[m[0].weight]['step'])==6 and int(opt.opt.state[m[8].weight]['step'])==11

def test_clear_state_drops_moments_and_keeps_flags():
    m = net()
    opt = fused_adamw(named(m), 1e-2)
    opt.state[m[0].bias].update(do_wd=False, force_train=True, other=1)
    run(m, opt, 2)
    with opt.keep_state():
        with opt.keep_state(): opt.clear_state()
        opt.clear_state()
    assert len(opt.opt.state)==10
    opt.clear_state()
    assert len(opt.opt.state)==0 and opt.state[m[0].bias]==dict(do_wd=False, force_train=True)
    run(m, opt, 2)

@pytest.mark.parametrize('train_bn', [False, True])
def test_force_train_keeps_norms_of_frozen_groups_training(train_bn):
    learn = reg_learner(train_bn=train_bn)
    learn.freeze()
    before = clones(learn.model)
    fit(learn, 1)
    names = [k for k,_ in learn.model.named_parameters()]
    assert {k for k,o in zip(names, moved(learn.model, before)) if o}=={'2.weight','2.bias'} | ({'0.1.weight','0.1.bias'} if train_bn else set())

def test_learner_freeze_clears_unless_kept():
    learn = reg_learner()
    fit(learn, 1)
    with learn.opt.keep_state(): learn.freeze_to(1)
    assert len(learn.opt.opt.state)==8
    learn.freeze_to(1)
    assert len(learn.opt.opt.state)==0

def test_freeze_to_checks_its_number():
    opt = fused_adamw(named(net()), 1e-3)
    with pytest.raises(OptimizerStateError, match='there are 3 groups'): opt.freeze_to(-4)
    with pytest.warns(UserWarning, match='whole model is frozen'): opt.freeze_to(3)
    with pytest.raises(OptimizerStateError, match='all 10 parameters are frozen'): opt.step()
    with pytest.raises(AssertionError): fused_adamw(list(net().parameters()), 1e-3).freeze()

def test_zero_grad_sets_none():
    m = net()
    opt = fused_adamw(named(m), 1e-3)
    m(torch.randn(2,3,10,10)).sum().backward()
    opt.zero_grad()
    assert all(p.grad is None for p in m.parameters())
    opt.step()

# ---- what is refused

def test_bad_parameters_are_named():
    m,err = net(),partial(pytest.raises, OptimizerStateError)
    with err(match="'0.weight' with shape .* is in groups 0 and 1"): fused_adamw([named(m)[0], named(m)[0]], 1e-3)
    with err(match='number 0 of group 1 with shape'): fused_adamw([[m[0].weight], [m[0].weight]], 1e-3)
    with err(match='no parameter'): fused_adamw([], 1e-3)
    with err(match='no parameter'): fused_adamw([[],[]], 1e-3)
    with err(match='Sequential'): fused_adamw(m, 1e-3)
    with err(match='Conv2d'): fused_adamw([m[0], m[3]], 1e-3)
    with err(match='dict'): fused_adamw([{'params': list(m.parameters())}], 1e-3)
    with err(match='float'): fused_adamw([[1.]], 1e-3)
    with err(match='lazy'): fused_adamw([list(nn.LazyLinear(3).named_parameters())], 1e-3)
    with err(match="'w' is complex"): fused_adamw([[('w', nn.Parameter(torch.zeros(2, dtype=torch.cfloat)))]], 1e-3)
    with err(match="'3.weigth'.*Did you mean '3.weight'"): fused_adamw(named(m), 1e-3, no_wd=['3.weigth'])
    with err(match='came without names'): fused_adamw(plain(m), 1e-3, no_wd=['3.weight'])
    with err(match="Unknown `impl` 'quick'"): fused_adamw(plain(m), 1e-3, impl='quick')
    with err(match="Two parameters are called 'weight'.*prefix"): fused_adamw([list(m[0].named_parameters()), list(m[3].named_parameters())], 1e-3)
    with err(match='RMSprop'): FusedOptimizer(plain(m), torch.optim.RMSprop, lr=1e-3)
    with pytest.raises(NotImplementedError): fused_adamw(plain(m), 1e-3).step(lambda: 0)
    bad = NamedLists(m)
    bad.names = bad.names[:2]
    with err(match='names. Split the model again'): fused_adamw(bad, 1e-3)
    assert issubclass(OptimizerStateError, (DiscriminativeError,)) and issubclass(OptimizerStateError, ValueError)

def test_sparse_gradients_are_named():
    m = nn.Embedding(5, 3, sparse=True)
    opt = fused_adamw([list(m.named_parameters())], 1e-3)
    m(torch.tensor([1,2])).sum().backward()
    with pytest.raises(OptimizerStateError, match="Sparse gradients are not supported, and 'weight'"): opt.step()

def test_shared_and_empty_groups():
    m = net()
    opt = fused_adamw([[], [*m[0].parameters(), m[0].weight], [*m[1:].parameters()]], slice(1e-5,1e-3))
    assert [len(o) for o in opt.param_lists]==[0,2,8] and len(opt.hypers)==3
    run(m, opt, 2)
    for ps in (m.parameters(), list(m.parameters()), m[0].weight, L(m.parameters())): assert len(fused_adamw(ps, 1e-3).param_lists)==1
    assert len(fused_adamw(L(L(m[0].parameters()), L(m[1:].parameters())), 1e-3).param_lists)==2

# ---- devices, dtypes, memory layouts

@pytest.mark.parametrize('impl', impls)
def test_a_model_that_changes_dtype_takes_its_moments_along(impl):
    m = net()
    opt = fused_adamw(named(m), 1e-3, impl=impl)
    run(m, opt, 3)
    m.double()
    opt.set_hypers(lr=1e-3)
    run(m, opt, 3)
    assert moments(opt, m[0].weight).dtype==torch.float64

@pytest.mark.parametrize('f', [fused_adamw, partial(fused_sgd, mom=0.9)])
def test_channels_last_gives_the_same_weights(f):
    res = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        m = net().double()
        opt = f(named(m), 1e-2)
        run(m, opt, 3)
        m.to(memory_format=fmt)
        opt.set_hypers(lr=1e-2)
        run(m, opt, 3)
        new = f(named(m), 1e-2)
        new.load_state_dict(opt.state_dict())
        res.append(run(m, new, 3)[3].weight.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(res[1], res[0], rtol=1e-8, atol=1e-10)

@pytest.mark.parametrize('f', [fused_adamw, partial(fused_sgd, mom=0.9)])
@pytest.mark.parametrize('late', [False, True])
def test_a_gradient_in_another_memory_layout(f, late):
    "torch's fused CPU kernels would pair the wrong elements, in silence"
    res = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        p,q = nn.Parameter(torch.arange(24.).reshape(2,3,2,2)),nn.Parameter(torch.ones(2))
        opt = f([[p],[q]], 0.1, wd=0.)
        if late:
            q.grad = torch.ones(2)
            opt.step()
        for i in range(3):
            p.grad = (torch.arange(24.).reshape(2,3,2,2)-11*i).contiguous(memory_format=fmt)
            opt.step()
        res.append(p.detach().clone())
    torch.testing.assert_close(res[0], res[1])

def test_strides_of_dimensions_of_size_one_cost_no_copy():
    p = nn.Parameter(torch.ones(2,1,3))
    opt = fused_adamw([[p]], 0.1, impl='fused' if 'fused' in impls else None)
    g = torch.ones(6).as_strided((2,1,3), (3,1,1))
    p.grad = g
    opt.step()
    assert p.grad.data_ptr()==g.data_ptr() and (opt.impl is None or p.grad.stride()==p.stride())

def test_a_model_that_goes_channels_last_between_two_steps():
    res = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        m = net().double()
        opt = fused_adamw(named(m), 1e-2)
        run(m, opt, 3)
        m.to(memory_format=fmt)
        res.append(run(m, opt, 3)[3].weight.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(res[1], res[0], rtol=1e-8, atol=1e-10)

def test_flags_written_after_creation_count():
    m = net()
    opt = fused_adamw(named(m), 1e-2, decay_1d=True)
    opt.state[m[0].weight]['do_wd'] = False
    run(m, opt, 1)
    assert [d for g,(_,d) in zip(opt.opt.param_groups, opt._halves.slots) for p in g['params'] if p is m[0].weight]==[False]

def test_layout_helpers():
    t = torch.randn(4,3,2,2)
    cl = t.contiguous(memory_format=torch.channels_last)
    assert not same_layout(t, cl) and torch.equal(copy_like(cl, t), t) and copy_like(cl, t).stride()==cl.stride()
    assert not copy_like(nn.Parameter(t), t).requires_grad and copy_like(t, t) is not t

# ---- in a Learner

def reg_split(m): return [list(o.named_parameters(prefix=str(i))) for i,o in enumerate(m)]
def reg_split2(m): return [list(m[:2].named_parameters()), list(m[2].named_parameters(prefix='2'))]

class RegData(TensorDataset):
    def new_empty(self): return RegData(*[o[:0] for o in self.tensors])

def reg_learner(opt_func=fused_adamw, splitter=reg_split, bs=16, n=64, **kw):
    torch.manual_seed(0)
    x = torch.randn(n, 4, dtype=torch.float64)
    ds = RegData(x, x.sum(1, keepdim=True))
    dls = DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds, bs=bs), device='cpu')
    model = nn.Sequential(nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.ReLU()), nn.Sequential(nn.Linear(8,8), nn.ReLU()), nn.Linear(8,1)).double()
    return Learner(dls, model, loss_func=MSELossFlat(), opt_func=opt_func, splitter=splitter, **kw)

def native_split(m): return [list(o.parameters()) for o in m]

def fit(learn, n=2, lr=slice(1e-4,1e-2), **kw):
    with learn.no_logging(): learn.fit_one_cycle(n, lr, **kw)
    return learn

@pytest.mark.parametrize('ours,native', [(fused_adamw,Adam), (fused_sgd,SGD), (partial(fused_sgd, mom=0.9, wd=0.1),partial(SGD, mom=0.9, wd=0.1))])
def test_one_cycle_equals_native(ours, native):
    a,b = fit(reg_learner(native, native_split), wd=0.1),fit(reg_learner(ours), wd=0.1)
    torch.testing.assert_close(flat(b.model), flat(a.model), rtol=1e-8, atol=1e-10)
    assert b.recorder.lrs==pytest.approx([float(o) for o in a.recorder.lrs])
    assert {k: pytest.approx([float(o) for o in v]) for k,v in a.recorder.hps.items()}==dict(b.recorder.hps)

def test_fine_tune_and_lr_find():
    learn = reg_learner()
    with learn.no_logging():
        learn.fine_tune(1)
        before = clones(learn.model)
        learn.lr_find(num_it=10, show_plot=False, suggest_funcs=None)
    assert not any(moved(learn.model, before))

def test_save_and_load(tmp_path):
    learn = fit(reg_learner(path=tmp_path))
    learn.save('m', with_opt=True)
    for split in (reg_split, reg_split2):
        new = reg_learner(path=tmp_path, splitter=split)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            new.load('m', with_opt=True)
        for a,b in zip(learn.model.parameters(), new.model.parameters()): assert torch.equal(moments(learn.opt, a), moments(new.opt, b))
    fit(new)

def test_load_says_why_it_failed(tmp_path):
    fit(reg_learner(path=tmp_path)).save('m')
    new = reg_learner(path=tmp_path, opt_func=partial(fused_sgd, mom=0.9))
    with pytest.warns(UserWarning, match='another kind of optimiser'): new.load('m')

@pytest.mark.parametrize('n', [0, 1, 2])
def test_export_and_load_learner(tmp_path, n):
    learn = reg_learner(partial(fused_adamw, wd=0.1), path=tmp_path)
    fit(learn, 1)
    with learn.opt.keep_state(): learn.freeze_to(n)
    old = [moments(learn.opt, p).clone() for p in learn.model.parameters()]
    learn.export('e.pkl')
    assert all(torch.equal(moments(learn.opt, p), o) for p,o in zip(learn.model.parameters(), old)) and len(learn.opt.hypers)==3
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'e.pkl')
    x = torch.randn(4, 4, dtype=torch.float64)
    assert torch.equal(new.model.eval()(x), learn.model.eval()(x))
    new.create_opt()
    assert isinstance(new.opt, FusedOptimizer) and new.opt.hypers[0]['wd']==0.1

def test_learner_pickle_and_deepcopy():
    learn = fit(reg_learner(), 1)
    for new in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        before,mine = clones(learn.model),clones(new.model)
        fit(new, 1)
        assert all(moved(new.model, mine)) and not any(moved(learn.model, before))

accumulate,clip = partial(GradientAccumulation, 32),partial(GradientClip, 0.1)

@pytest.mark.parametrize('cbs', [[accumulate], [clip], [accumulate,clip], [ChannelsLast]])
def test_callbacks_equal_native(cbs):
    a,b = reg_learner(Adam, native_split, cbs=[o() for o in cbs]),reg_learner(cbs=[o() for o in cbs])
    for o in (a,b): fit(o, 3)
    torch.testing.assert_close(flat(b.model), flat(a.model), rtol=1e-8, atol=1e-10)

def test_accumulation_left_over_does_not_reach_frozen_groups():
    learn = reg_learner(cbs=GradientAccumulation(1000))
    fit(learn, 1)
    assert learn.model[0][0].weight.grad is not None
    learn.freeze()
    assert learn.model[0][0].weight.grad is None

def test_reduce_lr_on_plateau_has_effect():
    learn = reg_learner(cbs=ReduceLROnPlateau(monitor='valid_loss', patience=0, min_delta=1e9))
    with learn.no_logging(): learn.fit(3, 1e-2)
    assert learn.opt.hypers[-1]['lr']<1e-2 and learn.opt.opt.param_groups[-1]['lr']==pytest.approx(1e-3, rel=0.9)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="fastai's MixedPrecision autocasts on CUDA only")
def test_mixed_precision():
    learn = reg_learner(cbs=MixedPrecision())
    learn.dls.cuda()
    learn.model.float().cuda()
    fit(learn)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_a_grad_scaler_sees_the_gradients():
    "What `MixedPrecision` does with an optimiser, without CUDA: read `param_groups`, unscale, step"
    GradScaler = getattr(torch.amp, 'GradScaler', None) or pytest.skip(f"torch {torch.__version__} has no GradScaler for the CPU")
    class Fake:
        def __init__(self, opt): self.opt,self.stepped = opt,False
        @property
        def param_groups(self): return self.opt.param_groups
        def step(self): self.stepped = True
    m,n = net(),net()
    opt,ref,scaler = fused_adamw(named(m), 1e-2),fused_adamw(named(n), 1e-2),GradScaler('cpu', init_scale=256.)
    x,y = torch.randn(4,3,10,10),torch.zeros(4, dtype=torch.long)
    for i in range(3):
        scaler.scale(nn.functional.cross_entropy(m(x), y)).backward()
        nn.functional.cross_entropy(n(x), y).backward()
        fake = Fake(opt)
        scaler.step(fake)
        scaler.update()
        assert fake.stepped
        for o in (opt,ref):
            o.step()
            o.zero_grad()
    torch.testing.assert_close(flat(m), flat(n), rtol=1e-3, atol=2e-5)

def test_an_instance_as_opt_func():
    learn = reg_learner()
    learn.opt_func = fused_adamw(reg_split(learn.model), 1e-3)
    fit(learn, 1)
    assert learn.opt is learn.opt_func

def test_param_lists_of_our_splitter():
    import timm
    from fastai_discriminative.groups import layer_groups
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=3, depth=2)
    ps = layer_groups(m)(m)
    opt = fused_adamw(ps, slice(1e-5,1e-3))
    assert isinstance(ps, ParamLists) and opt.param_names()==[list(o) for o in ps.names] and opt.group_names==list(ps.group_names)
    out = decayed(opt)
    assert not out & {'cls_token','pos_embed','norm.weight','patch_embed.proj.bias'} and 'blocks.0.attn.qkv.weight' in out

# ---- units

@pytest.mark.parametrize('f,want', [(Adam,'adamw'), (RAdam,'adamw'), (QHAdam,'adamw'), (ranger,'adamw'), (partial(Adam, wd=0.1),'adamw'), (fused_adamw,'adamw'), (SGD,'sgd'),
    (partial(SGD, mom=0.9),'sgd'), (fused_sgd,'sgd'), (partial(fused_sgd, mom=0.9),'sgd'), (RMSProp,'other'), (Lamb,'other'), (Larc,'other'), (partial(OptimWrapper, opt=torch.optim.SGD),'sgd'),
    (partial(OptimWrapper, opt=torch.optim.AdamW),'adamw'), (partial(OptimWrapper, opt=partial(torch.optim.NAdam, eps=1e-6)),'adamw'),
    (partial(OptimWrapper, opt=torch.optim.RMSprop),'other'),
    (lambda p, lr: OptimWrapper(p, opt=torch.optim.SGD, lr=lr),'sgd'), (torch.optim.SGD,'other'), (None,'other'), (partial(Adam),'adamw')])
def test_optimizer_units(f, want): assert optimizer_units(f)==want

def test_optimizer_units_of_optimisers():
    ps = [[nn.Parameter(torch.zeros(2,2))]]
    for f,want in ((Adam,'adamw'), (SGD,'sgd'), (ranger,'adamw'), (fused_adamw,'adamw'), (fused_sgd,'sgd'), (partial(OptimWrapper, opt=torch.optim.SGD),'sgd'), (Lamb,'other')):
        assert optimizer_units(f(ps, lr=1e-3))==want
    assert optimizer_units(torch.optim.AdamW(ps[0]))=='adamw'
