"The distortion meter: equal to direct computation, and without side effects"
import numpy as np,pytest,torch

from fastai.vision.all import ProgressCallback,noop,set_seed
from fastai_discriminative.all import *
from fastai_discriminative import report as rp
from test_compare import make

def learner():
    set_seed(0)
    learn = make()
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def test_moved_is_what_it_says():
    learn,meter = learner().split(),DistortionMeter()
    old = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    learn.fit_one_cycle(2, 1e-2, cbs=meter)
    now,df = dict(learn.model.named_parameters()),meter.results
    assert df.epoch.tolist()==[1]*3+[2]*3 and list(df.columns)==['epoch','group','moved','cka','gradients']
    for g in learn.layer_groups:
        d = torch.cat([(now[n]-old[n]).flatten() for n in g.param_names]).norm()/torch.cat([old[n].flatten() for n in g.param_names]).norm()
        assert df[(df.epoch==2) & (df.group==g.name)].moved.item()==pytest.approx(d.item(), rel=1e-4)
    assert (df.gradients>0).all()

def test_frozen_groups_have_not_moved():
    learn,meter = learner().split(),DistortionMeter()
    learn.freeze()
    learn.fit(1, 1e-2, cbs=meter)
    df = meter.results
    assert (df.moved[:-1]==0).all() and np.allclose(df.cka[:-1], 1) and df.moved.iloc[-1]>0 and df.gradients.isna().all()

@pytest.mark.parametrize('split', [True, False])
def test_training_is_the_same_with_and_without(split):
    ends = []
    for meter in ([], [DistortionMeter()]):
        learn = learner()
        if split: learn.split()
        learn.dls.train.rng.seed(1)
        learn.fit_one_cycle(2, 1e-2, cbs=meter)
        ends.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a,b in zip(*ends))

def test_fits_go_on_from_each_other_and_reset():
    learn,meter = learner().split(),DistortionMeter()
    learn.fit_strategy('lp_ft', 1, cbs=meter)
    learn.fit(1, 1e-3, cbs=meter)
    assert meter.results.epoch.max()==12
    meter.reset()
    learn.fit(1, 1e-3, cbs=meter)
    assert meter.results.epoch.max()==1

def test_cka():
    x,y = torch.randn(64, 300),torch.randn(64, 300)
    q = torch.linalg.qr(torch.randn(300,300))[0]
    k = rp._gram(x)
    assert rp._cka(k, rp._gram(2*x@q+1))==pytest.approx(1, abs=1e-4) and abs(rp._cka(k, rp._gram(y)))<.15
    assert np.isnan(rp._cka(k, rp._gram(torch.ones(64,3))))
    mix = rp._cka(k, rp._gram(x+y))
    assert .2<mix<.9

def test_outputs_are_those_of_the_last_layer_of_each_group():
    learn = learner().split()
    xb = (torch.randn(8,4),)
    outs = rp._group_outputs(learn.model, learn.splitter.find(learn.model), xb)
    m = learn.model.eval()
    for o,want in zip(outs, (m[0](xb[0]), m[:3](xb[0]), m(xb[0]))): assert torch.allclose(o, rp._gram(want), atol=1e-4)
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_mistakes():
    with pytest.raises(ValueError, match='at least 4'): DistortionMeter(3)
    with pytest.raises(ValueError, match='Nothing was recorded'): DistortionMeter().plot()

def test_picture():
    learn,meter = learner().split(),DistortionMeter()
    learn.fit_strategy('lp_ft', 1, cbs=meter)
    assert len(meter.plot().axes)==5
