"Moments are saved and loaded by name, into any number of groups, from fastai's and torch's optimisers, and not at all if they do not fit"
import copy,pickle,re
from functools import partial

import pytest,torch
from torch import nn

from fastai.optimizer import Adam,OptimWrapper,RAdam,RMSProp,SGD,Lookahead

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

def loads_nothing(opt, sd, msg):
    "Is `sd` refused with `msg`, and is `opt` unchanged?"
    moments,hypers = frozen_copy(opt),[dict(h) for h in opt.hypers]
    with pytest.warns(UserWarning, match=msg), pytest.raises(OptimizerStateError, match=msg): opt.load_state_dict(sd)
    assert [dict(h) for h in opt.hypers]==hypers and opt.opt.state.keys()==moments.keys()
    assert all(torch.equal(v, opt.opt.state[p][k]) for p,s in moments.items() for k,v in s.items())

others = dict(sgd=lambda m: SGD(plain(m), 1e-2), fused_sgd=lambda m: fused_sgd(named(m), 1e-2), radam=lambda m: RAdam(plain(m), 1e-2),
    torch_sgd=lambda m: OptimWrapper(plain(m), opt=torch.optim.SGD, lr=1e-2), nadam=lambda m: OptimWrapper(plain(m), opt=torch.optim.NAdam, lr=1e-2),
    lookahead=lambda m: Lookahead(Adam(plain(m), 1e-2)), rmsprop=lambda m: RMSProp(plain(m), 1e-2),
    torch_rmsprop=lambda m: OptimWrapper(plain(m), opt=torch.optim.RMSprop, lr=1e-2))

@pytest.mark.parametrize('opt', [{}, [], 1, {'lr':1}])
def test_a_state_of_no_kind_is_refused_by_name(opt):
    p = nn.Parameter(torch.ones(2))
    o = fused_sgd([[p]], lr=.1)
    sd = o.state_dict()
    with pytest.raises(OptimizerStateError, match=re.escape(f'that of {opt!r}')): o.load_state_dict({**sd, 'opt':opt})

@pytest.mark.parametrize('kind', others)
@pytest.mark.parametrize('steps', [0,2])
def test_state_of_another_kind_is_not_taken_for_ours(kind, steps):
    if kind=='rmsprop' and not steps: return # nothing in it tells it from an Adam that made no step
    m = net()
    other = others[kind](m)
    run(m, other, steps)
    loads_nothing(trained()[1], copy.deepcopy(other.state_dict()), 'another kind of optimiser')

@pytest.mark.parametrize('f', [lambda m: Adam(plain(m), 1e-2), lambda m: fused_adamw(named(m), 1e-2),
    lambda m: OptimWrapper(plain(m), opt=torch.optim.AdamW, lr=1e-2)])
@pytest.mark.parametrize('steps', [0,2])
def test_adam_s_state_is_not_sgd_s(f, steps):
    m = net()
    other = f(m)
    run(m, other, steps)
    loads_nothing(trained(f=partial(fused_sgd, mom=0.9))[1], copy.deepcopy(other.state_dict()), 'another kind of optimiser')

def with_hyper(k, v): return lambda sd: sd['hypers'][1].update({k:v})
def without(k): return lambda sd: sd['hypers'][1].pop(k)
def of_first(**kw): return lambda sd: sd['state'][0].update(kw)

@pytest.mark.parametrize('damage,msg', [(with_hyper('lr','1e-3'),"'lr' of group 1 is '1e-3'"), (with_hyper('wd',None),"'wd' of group 1 is None"),
    (with_hyper('lr',float('nan')),"'lr' of group 1 is nan"), (with_hyper('lr',torch.ones(7)),"'lr' of group 1 is tensor"), (with_hyper('lr',10**400),"'lr' of group 1 is 1000"), (with_hyper('mom',-1.),"'mom' of group 1 is -1.0"), (with_hyper('eps',True),"'eps' of group 1 is True"),
    (without('sqr_mom'),'another kind'), (with_hyper('beta',.9),'another kind'), (lambda sd: sd['hypers'].pop(),'2 groups of hyper-parameters'),
    (lambda sd: sd['state'].pop(),'9 parameters'), (lambda sd: sd['names'][1].pop(),'names'), (lambda sd: sd['names'].pop(),'names'),
    (lambda sd: sd.update(hypers=[1,2,3]),'damaged'), (lambda sd: sd.update(state=5),'damaged'), (lambda sd: sd.update(sizes=torch.ones(7)),'damaged'),
    (lambda sd: sd['state'].__setitem__(3, None),'damaged'),
    (lambda sd: sd.update(names=[['8.bias']*4,['b']*4,['c']*2]),'names'),
    (of_first(grad_avg=1.),'not contain moments'), (of_first(step='3'),'not contain moments'), (of_first(step=-1),'not contain moments'), (of_first(sqr_avg=torch.ones(6,3,3,3, dtype=torch.long)),'not contain moments')])
@pytest.mark.parametrize('cuts', [(4,8),(8,)])
def test_damaged_state_changes_nothing(damage, msg, cuts):
    sd = copy.deepcopy(trained()[1].state_dict())
    damage(sd)
    loads_nothing(trained(cuts, n=2)[1], sd, msg)

@pytest.mark.parametrize('damage', [lambda sd: sd.update(param_groups=[{}]), lambda sd: sd['param_groups'][1].pop('lr'), lambda sd: sd['param_groups'][1].update(lr='x'),
    lambda sd: sd['param_groups'][0].update(betas=(.9,)), lambda sd: sd['param_groups'].pop()])
def test_damaged_state_of_a_wrapper_changes_nothing(damage):
    m = net()
    other = OptimWrapper(plain(m), opt=torch.optim.AdamW, lr=1e-2)
    run(m, other, 2)
    sd = copy.deepcopy(other.state_dict())
    damage(sd)
    loads_nothing(trained()[1], sd, 'damaged|of group 1|goes by position|another kind')

# ---- momentum of a part of a group

def torch_sgd(m, **kw):
    "torch's own, with a group for each parameter, so that each begins when its first gradient comes"
    return torch.optim.SGD([dict(params=[p]) for p in m.parameters()], 1e-2, momentum=0.9, **kw)

def skipping(m, opt, plan):
    "A step for each set of layers in `plan`; these layers get no gradient in that step"
    gen = torch.Generator().manual_seed(2)
    for skip in plan:
        nn.functional.cross_entropy(m(torch.randn(8,3,10,10, generator=gen, dtype=torch.float64)), torch.randint(0, 2, (8,), generator=gen)).backward()
        for i in skip:
            for p in m[i].parameters(): p.grad = None
        opt.step()
        opt.zero_grad()

@pytest.mark.parametrize('impl', [None,'foreach','loop'])
@pytest.mark.parametrize('wd', [0.,.1])
@pytest.mark.parametrize('plan', [[{1}]+[()]*4, [{0,3},{0},(),{4},()], [{0,1,3,4},(),()], [(),{8},{0,8},()]])
def test_layers_that_a_step_skips_train_as_in_torch(plan, wd, impl):
    a,b = net().double(),net().double()
    skipping(a, torch_sgd(a, weight_decay=wd), plan)
    skipping(b, fused_sgd(named(b, (8,)), 1e-2, mom=0.9, wd=wd, decouple_wd=False, decay_1d=True, impl=impl), plan)
    torch.testing.assert_close(flat(b), flat(a), rtol=1e-12, atol=1e-14)

def test_frozen_momentum_goes_into_fewer_groups():
    "Six groups, frozen to three: no group of the three has the momentum of all its parameters"
    a,b = net().double(),net().double()
    opt,ref = fused_sgd(named(b, (1,3,5,7,9)), 1e-2, mom=0.9, wd=0.),torch_sgd(a)
    opt.freeze_to(3)
    for p in list(a.parameters())[:5]: p.requires_grad_(False)
    skipping(a, ref, [()]*3)
    skipping(b, opt, [()]*3)
    new = fused_sgd(named(b, (4,8)), 1e-2, mom=0.9, wd=0.)
    new.load_state_dict(copy.deepcopy(opt.state_dict()))
    new.unfreeze()
    for p in a.parameters(): p.requires_grad_(True)
    skipping(a, ref, [()]*3)
    skipping(b, new, [()]*3)
    torch.testing.assert_close(flat(b), flat(a), rtol=1e-12, atol=1e-14)

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
