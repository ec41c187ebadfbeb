"timm's tests for optimisers: a loss falls, odd layouts and narrow valleys work, copies train in the same way, and each group has its rate"
import copy,pickle
from functools import partial

import pytest,torch,torch._dynamo # the first step of a torch optimiser would import it, and that sets an environment variable
from torch import nn

from fastai_discriminative.optimizer import OptimizerStateError,fused_adamw,fused_sgd

funcs = dict(adamw=(fused_adamw,5e-2), adamw_decayed=(partial(fused_adamw, wd=.3, decay_1d=True),5e-2), adam=(partial(fused_adamw, decouple_wd=False),5e-2),
    sgd=(fused_sgd,1e-3), momentum=(partial(fused_sgd, mom=.9),1e-3), momentum_decayed=(partial(fused_sgd, mom=.9, wd=.1, decay_1d=True),1e-3))
by_func = pytest.mark.parametrize('func', funcs)

def problem(odd=False):
    "A matrix and a vector that should map one input to zero; `odd`: both lie in memory with gaps"
    g = torch.Generator().manual_seed(0)
    w,b,x = (torch.randn(*s, generator=g) for s in ((7,4,2),(7,2),(4,)))
    w,b = (o[...,0] if odd else o[...,0].contiguous() for o in (w,b))
    return nn.Parameter(w),nn.Parameter(b),x

def descend(opt, w, b, x, n=1):
    "`n` steps; the loss before each"
    res = []
    for _ in range(n):
        loss = (w@x+b).square().sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        res.append(loss.item())
    return res

@by_func
@pytest.mark.parametrize('odd', [False,True])
@pytest.mark.parametrize('impl', [None,'foreach','loop'])
def test_a_loss_falls_and_layouts_make_no_difference(func, odd, impl):
    f,lr = funcs[func]
    w,b,x = problem(odd)
    opt = f([[w],[b]], lr=lr, impl=impl)
    losses = descend(opt, w, b, x, 200)
    assert losses[-1]<losses[0]/2 and 'Optim' in repr(opt)
    w2,b2,_ = problem()
    descend(f([[w2],[b2]], lr=lr, impl='loop'), w2, b2, x, 200)
    torch.testing.assert_close(w, w2, rtol=1e-4, atol=1e-5)

@by_func
def test_the_loss_of_a_small_net_falls_in_every_step(func):
    f,lr = funcs[func]
    torch.manual_seed(0)
    m,x = nn.Sequential(nn.Linear(2,3), nn.Tanh(), nn.Linear(3,1), nn.Sigmoid()),torch.linspace(-1, 1, 8).view(4,2)
    opt,losses = f([list(m[0].parameters()), list(m[2].parameters())], lr=lr),[]
    for _ in range(20):
        loss = m(x).sum()
        loss.backward()
        losses.append(loss.item())
        opt.step()
        opt.zero_grad()
    assert all(b<a for a,b in zip(losses, losses[1:]))

@by_func
def test_in_a_narrow_curved_valley_it_comes_nearer(func):
    "The gradient of one coordinate per step, in turn; the valley is Rosenbrock's function"
    f,lr = funcs[func]
    if 'decayed' in func: return # decay pulls it to zero, which is not the end of the valley
    p,goal = nn.Parameter(torch.tensor([1.5,1.5])),torch.ones(2)
    opt = f([[p]], lr=lr/50 if 'adam' not in func else lr)
    for i in range(600):
        x,y = p
        ((1-x)**2+100*(y-x*x)**2).backward()
        p.grad[i%2] = 0
        opt.step()
        opt.zero_grad()
    assert p.isfinite().all() and (p-goal).norm()<torch.tensor([.5,.5]).norm()

copies = dict(state=lambda opt,w,b,new: (new.load_state_dict(copy.deepcopy(opt.state_dict())), (w,b,new))[1],
    deepcopy=lambda opt,w,b,new: copy.deepcopy((opt.param_lists[0][0],opt.param_lists[1][0],opt)),
    pickle=lambda opt,w,b,new: pickle.loads(pickle.dumps((opt.param_lists[0][0],opt.param_lists[1][0],opt))))

@by_func
@pytest.mark.parametrize('how', copies)
def test_copies_train_on_in_step(func, how):
    f,lr = funcs[func]
    w,b,x = problem()
    opt = f([[w],[b]], lr=[lr,lr/2])
    descend(opt, w, b, x, 20)
    w2,b2 = (nn.Parameter(o.detach().clone()) for o in (w,b))
    w2,b2,new = copies[how](opt, w2, b2, f([[w2],[b2]], lr=1.))
    assert w2 is not w and new is not opt and {k for k in vars(new) if k[0]!='_'}=={k for k in vars(opt) if k[0]!='_'}
    for _ in range(20):
        descend(opt, w, b, x), descend(new, w2, b2, x)
        assert torch.equal(w, w2) and torch.equal(b, b2)
    sd,sd2 = opt.state_dict(),new.state_dict()
    assert sd['hypers']==sd2['hypers'] and all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(s2[k])) for s,s2 in zip(sd['state'], sd2['state']) for k in s)

@by_func
def test_state_is_not_changed_by_who_loads_it(func):
    f,lr = funcs[func]
    w,b,x = problem()
    opt = f([[w],[b]], lr=lr)
    descend(opt, w, b, x, 3)
    sd = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(sd)
    w2,b2 = (nn.Parameter(o.detach().double()) for o in (w,b)) # in another dtype
    new = f([[w2],[b2]], lr=lr)
    new.load_state_dict(sd)
    descend(new, w2, b2, x.double(), 3)
    assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(c[k])) for a,c in zip(sd['state'], kept['state']) for k in c) and sd['hypers']==kept['hypers']
    descend(opt, w, b, x, 3)
    torch.testing.assert_close(w2.float(), w.detach(), rtol=1e-4, atol=1e-5)

@by_func
def test_each_group_has_its_own_rate(func):
    f,lr = funcs[func]
    w,b,x = problem()
    was = w.detach().clone(),b.detach().clone()
    opt = f([[w],[b]], lr=[0.,lr])
    descend(opt, w, b, x, 5)
    assert torch.equal(w, was[0]) and not torch.equal(b, was[1])
    opt.set_hyper('lr', [lr,0.])
    now = b.detach().clone()
    descend(opt, w, b, x, 5)
    assert torch.equal(b, now) and not torch.equal(w, was[0])

@by_func
@pytest.mark.parametrize('grad', ['zero','none'])
def test_without_gradients_nothing_but_decay_happens(func, grad):
    f,lr = funcs[func]
    w,b,_ = problem()
    was = w.detach().clone()
    opt = f([[w],[b]], lr=lr)
    w.grad = torch.zeros_like(w) if grad=='zero' else None
    b.grad = torch.ones_like(b)
    opt.step()
    opt.zero_grad()
    wd = opt.hypers[0]['wd'] if grad=='zero' and 'adam'!=func else 0
    if func!='adam' or grad=='none': torch.testing.assert_close(w.detach(), was*(1-lr*wd))
    assert all(p.grad is None or not p.grad.any() for p in (w,b))
    with pytest.raises(NotImplementedError, match='closure'): opt.step(lambda: 0)

def test_a_parameter_in_two_groups_is_refused():
    w,b,_ = problem()
    with pytest.raises(OptimizerStateError): fused_adamw([[w,b],[w]], lr=1e-3)

def test_what_lies_between_a_parameter_s_elements_is_left_alone():
    for f,lr in funcs.values():
        base = torch.ones(6,2)
        p,q = nn.Parameter(base[:,0]),nn.Parameter(torch.ones(6))
        opt = f([[p],[q]], lr=lr)
        for _ in range(3):
            p.grad,q.grad = torch.arange(6.),torch.arange(6.)
            opt.step()
        assert torch.equal(base[:,1], torch.ones(6))
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)
        with pytest.raises(OptimizerStateError, match='no fused .*with gaps in memory'): f([[p],[q]], lr=lr, impl='fused')
