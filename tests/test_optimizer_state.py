"Moments are saved and loaded by name, into any number of groups, from fastai's and torch's optimisers, and not at all if they do not fit"
import copy,pickle
from functools import partial

import pytest,torch
from torch import nn

from fastai.optimizer import Adam,OptimWrapper

from fastai_discriminative.optimizer import OptimizerStateError,fused_adamw,fused_sgd
from test_optimizer import clones,flat,moments,moved,named,net,plain,run

def trained(cuts=(4,8), f=fused_adamw, n=4):
    m = net()
    opt = f(named(m, cuts), 1e-2)
    run(m, opt, n)
    return m,opt

@pytest.mark.parametrize('f', [fused_adamw, partial(fused_sgd, mom=0.9)])
@pytest.mark.parametrize('cuts', [(8,), (4,8), (1,2,3,4,5,6,7,8,9), ()])
def test_state_goes_into_any_number_of_groups(f, cuts, tmp_path):
    m,opt = trained(f=f)
    torch.save(opt.state_dict(), tmp_path/'o.pth')
    sd = torch.load(tmp_path/'o.pth', weights_only=True)
    m2 = copy.deepcopy(m)
    new = f(named(m2, cuts), 5e-3)
    new.load_state_dict(sd)
    assert [h['lr'] for h in new.hypers]==([1e-2]*3 if cuts==(4,8) else [5e-3]*(len(cuts)+1))
    for a,b in zip(m.parameters(), m2.parameters()):
        for k,v in opt.opt.state[a].items(): assert torch.equal(new.opt.state[b][k], v) and new.opt.state[b][k] is not v
    for o in (opt,new): o.set_hyper('lr', 1e-3)
    torch.testing.assert_close(flat(run(m2, new, 5)), flat(run(m, opt, 5)), rtol=1e-6, atol=1e-7)

def test_state_of_groups_in_another_order_is_matched_by_name():
    m,opt = trained()
    new = fused_adamw(named(m)[::-1], 1e-3)
    new.load_state_dict(opt.state_dict())
    assert all(torch.equal(moments(new, p), moments(opt, p)) for p in m.parameters())

def frozen_copy(opt): return {p: {k: v.clone() for k,v in s.items()} for p,s in opt.opt.state.items()}

def test_state_that_does_not_fit_changes_nothing():
    m,opt = trained()
    m2,opt2 = trained(n=2)
    good,old = opt.state_dict(),frozen_copy(opt2)
    bad_shape = {**good, 'state': good['state'][:-1] + [{**good['state'][-1], 'grad_avg': torch.zeros(7)}]}
    renamed = {**good, 'names': [*good['names'][:2], ['8.w', '8.bias']]}
    sgd = trained(f=partial(fused_sgd, mom=0.9))[1].state_dict()
    short = {**good, 'names': None, 'state': good['state'][:-1]}
    other_groups = {**good, 'names':None, 'sizes':[8,1,1]}
    for sd,msg in ((bad_shape,"'8.bias' has shape .7,.*the parameter has .2,"), (renamed,"It has '8.w', which.*It lacks '8.weight'"), (sgd,'another kind of optimiser'),
        (short,'goes by position'), ({'model':1},'not the state of an optimiser'), (other_groups,r'groups of \[8, 1, 1\].*\[4, 4, 2\]')):
        with pytest.warns(UserWarning, match=msg), pytest.raises(OptimizerStateError, match=msg): opt2.load_state_dict(sd)
        assert all(torch.equal(v, opt2.opt.state[p][k]) for p,s in old.items() for k,v in s.items())
        assert [h['lr'] for h in opt2.hypers]==[1e-2]*3

def test_state_of_fastai_s_adam_and_back():
    a = net().double()
    na = Adam(plain(a), slice(1e-4,1e-2), wd=0.1)
    run(a, na, 5)
    b = copy.deepcopy(a)
    ob = fused_adamw(named(b), 1e-3, decay_1d=True)
    ob.load_state_dict(copy.deepcopy(na.state_dict()))
    assert [h['lr'] for h in ob.hypers]==pytest.approx([1e-4,1e-3,1e-2])
    torch.testing.assert_close(flat(run(b, ob, 5)), flat(run(a, na, 5)), rtol=1e-9, atol=1e-11)
    c = copy.deepcopy(b)
    nc = Adam(plain(c), 1e-3)
    nc.load_state_dict(copy.deepcopy(ob.state_dict()))
    torch.testing.assert_close(flat(run(c, nc, 5)), flat(run(b, ob, 5)), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('cls,f,kw', [(torch.optim.AdamW,fused_adamw,{}), (torch.optim.SGD,partial(fused_sgd, mom=0.9, decouple_wd=False),dict(momentum=0.9))])
def test_state_of_an_optim_wrapper(cls, f, kw):
    a = net().double()
    wa = OptimWrapper(plain(a), opt=cls, lr=1e-2, weight_decay=0.1, **kw)
    run(a, wa, 5)
    b = copy.deepcopy(a)
    ob = f(plain(b), 1e-3, decay_1d=True)
    ob.load_state_dict(wa.state_dict())
    assert [h['lr'] for h in ob.hypers]==[1e-2]*3
    assert [h['wd'] for h in ob.hypers]==[0.1]*3
    if cls is torch.optim.AdamW: ob.set_hyper('eps', 1e-8)
    torch.testing.assert_close(flat(run(b, ob, 5)), flat(run(a, wa, 5)), rtol=1e-9, atol=1e-11)

def test_state_of_a_frozen_model():
    m,opt = net(),None
    opt = fused_adamw(named(m), 1e-2)
    opt.freeze_to(2)
    run(m, opt, 3)
    new = fused_adamw(named(m, (8,)), 1e-2)
    new.load_state_dict(opt.state_dict())
    assert set(new.opt.state)=={m[8].weight, m[8].bias}

def test_pickle_and_deepcopy():
    for how in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        m,opt = trained()
        m2,opt2 = how((m,opt))
        assert {id(p) for ps in opt2.param_lists for p in ps}=={id(p) for p in m2.parameters()}
        opt.set_hyper('lr', [1e-4,1e-3,1e-2])
        opt2.set_hyper('lr', [1e-4,1e-3,1e-2])
        assert torch.equal(flat(run(m, opt, 5)), flat(run(m2, opt2, 5))) and opt2.param_names()==opt.param_names()
    f = pickle.loads(pickle.dumps(partial(fused_sgd, mom=0.9)))
    assert f(plain(net()), 1e-3).hypers[0]['mom']==0.9

def test_param_lists_can_be_replaced():
    m,opt = trained()
    old,masters = opt.param_lists,[[nn.Parameter(p.detach().clone()) for p in ps] for ps in opt.param_lists]
    opt.param_lists = masters
    for ps in masters:
        for p in ps: p.grad = torch.ones_like(p)
    before = clones(m)
    opt.step()
    assert not any(moved(m, before)) and set(opt.opt.state)=={p for ps in masters for p in ps} and opt.param_names() is None
    opt.param_lists = old
    run(m, opt, 1)
    assert all(moved(m, before)) and opt.param_names() is not None
