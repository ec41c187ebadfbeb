"Averaged weights, the loss at the best temperature, and the choice between points"
import math

import numpy as np,pytest,torch
from torch import nn
from fastai.vision.all import Callback,CategoryBlock,CrossEntropyLossFlat,BCEWithLogitsLossFlat,DataBlock,ImageBlock,IndexSplitter,MSELossFlat
from fastai.vision.all import get_image_files,parent_label

from fastai_discriminative.all import *
from fastai_discriminative import phases as ph, points
from fastai_discriminative.points import *
from helpers import *
from helpers import pre_ours as ours

k = ph._cached_per_epoch

@pytest.fixture
def dls(bright): return bright_dls(bright)

def head_then(lr, norm='running'):
    return Strategy('head, then all', lambda n,preset,groups: [Phase(k, preset, frozen=-1, cached=True), Phase(n, lr, train_norm=norm)], keep_best=BestPoint)

class Look(Callback):
    "What `BestPoint` knows after the fit"
    order = 70
    def after_fit(self): self.best = self.learn.best_point

# ---- averages

def test_the_average_is_the_exponential_one():
    m = nn.Linear(3, 2)
    avg,want = WeightAverage(m, 40),m.weight.detach().clone()
    for i in range(1, 60):
        with torch.no_grad(): m.weight.add_(torch.randn_like(m.weight))
        avg.update()
        d = min(.9, i/(10+i))
        want = d*want+(1-d)*m.weight.detach()
    torch.testing.assert_close(avg.mean[0], want)

def test_the_average_holds_statistics_and_leaves_counts_alone():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    avg = WeightAverage(m, 8)
    m(torch.randn(8, 3, 8, 8)*5+3)
    live = m[1].running_mean.clone()
    avg.update()
    avg.apply()
    assert not torch.equal(m[1].running_mean, live) and m[1].num_batches_tracked==1
    avg.start = [torch.zeros_like(t) for t in avg.mean]
    avg.apply(.25)
    torch.testing.assert_close(m[0].weight.detach(), .25*avg.mean[0])
    avg.apply(0.)
    assert all(torch.equal(t, o) for t,o in zip(avg.live, avg.start))
    avg.apply()
    assert all(torch.equal(t, o) for t,o in zip(avg.live, avg.mean))

def test_the_average_counts_from_where_it_was_restarted_and_goes_back_to_the_first_weights():
    m = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    avg,was = WeightAverage(m, 8),[t.detach().clone() for t in m.parameters()]
    with torch.no_grad(): m[1].weight.mul_(.5)
    avg.restart()
    assert list(avg.before)==[2] and torch.equal(avg.before[2], was[2]) # nothing is kept twice
    assert torch.equal(avg.start[2], was[2]*.5) and torch.equal(avg.mean[2], was[2]*.5)
    with torch.no_grad():
        for p in m.parameters(): p.add_(1)
    assert torch.equal(avg.start[2], was[2]*.5)
    avg.update()
    other = WeightAverage(m, 1)
    other.load_state_dict(avg.state_dict())
    for a in (avg,other):
        a.apply(.5)
        torch.testing.assert_close(m[1].weight.detach(), .5*(was[2]*.5)+.5*avg.mean[2])
        a.first()
        assert all(torch.equal(p.detach(), o) for p,o in zip(m.parameters(), was))

@pytest.mark.parametrize('n_steps', [0,1,4,5,10**6])
def test_any_number_of_steps(n_steps): assert 0<=WeightAverage(nn.Linear(1,1), n_steps).decay<1

# ---- losses and choice

def test_temperature_changes_nothing_else():
    torch.manual_seed(0)
    x,y = torch.randn(300, 4),torch.randint(0, 4, (300,))
    x[range(300),y] += 1
    assert tempered_loss(x, y)==pytest.approx(tempered_loss(x*4, y), rel=1e-5)
    assert tempered_loss(x, y)<=nn.functional.cross_entropy(x, y).item()+1e-6
    assert points._tempered(x, y)[1]==4*points._tempered(x*4, y)[1]<2 and points._tempered(x.roll(1, 0), y)[1]==1
    assert tempered_loss(x, y)<tempered_loss(x.roll(1, 0), y)<=math.log(4)+.01

def _lost(x, y): return tempered_loss(x, y)/math.log(x.shape[1])

@pytest.mark.parametrize('big', [1e2,1e4,1e8])
def test_a_few_extreme_logits_do_not_decide(big):
    torch.manual_seed(0)
    x,y = torch.randn(300, 8),torch.randint(0, 8, (300,))
    x[range(300),y] += 3
    was,odd = _lost(x, y),x.clone()
    odd[:6] = nn.functional.one_hot((y[:6]+1)%8, 8)*big
    assert was<.6 and was<_lost(odd, y)<was+.1 # the six know nothing, which is 2 % of all
    alone = min(nn.functional.cross_entropy(odd*2**(k/4), y).item() for k in range(-200, 9))/math.log(8)
    assert big<1e3 or alone>.95 # the best temperature without a guess sees a model that knows nothing

def test_a_model_that_knows_nothing_is_as_good_as_a_guess():
    torch.manual_seed(0)
    y = torch.randint(0, 5, (100,))
    for scale in (0,1,1e6): assert tempered_loss(scale*torch.randn(100, 5), y)<=math.log(5)+1e-6
    for x in (math.nan,math.inf): assert math.isnan(tempered_loss(torch.full((100,5), x), y)) and points._tempered(torch.full((100,5), x), y)[1]==1

def test_the_factor_of_a_model_that_is_too_sure():
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    y = torch.distributions.Categorical(logits=x).sample()
    for sure in (2,4): assert points._tempered(sure*x, y)[1]==pytest.approx(1/sure, rel=.3)
    x[0,0] = math.nan # one image
    assert points._tempered(4*x, y)[1]==1

def test_the_share_of_a_guess_is_close_to_the_best():
    torch.manual_seed(0)
    x,y = torch.randn(300, 4),torch.randint(0, 4, (300,))
    x[range(100,300),y[100:]] += 6 # two thirds are known, the others are noise
    fine = min(-((1-s)*(x*t).softmax(1)[range(300),y]+s/4).log().mean().item() for t in np.geomspace(.1, 10, 60) for s in np.linspace(0, 1, 101))
    assert fine-1e-6<=tempered_loss(x, y)<fine+.02

def test_what_has_classes():
    x,y = torch.randn(4,3),torch.zeros(4).long()
    assert has_classes(CrossEntropyLossFlat(), x, (y,)) and has_classes(nn.CrossEntropyLoss(), x, (y,))
    assert not has_classes(MSELossFlat(), x, (y,)) and not has_classes(BCEWithLogitsLossFlat(), x, (x,))
    assert not has_classes(CrossEntropyLossFlat(), torch.randn(4,3,5,5), (torch.zeros(4,5,5).long(),))

def _point(name, loss, value): return Point(name, loss, value, [])

@pytest.mark.parametrize('points,comp,want', [
    ([('head',1.,.7),('end',.9,.7),('average',.8,.69)], np.greater, 'end'),
    ([('head',1.,.3),('end',.9,.31),('average',.8,.3)], np.less, 'average'),
    ([('head',1.,.7),('end',1.,.9)], np.greater, 'head'),
    ([('head',1.,.7),('end',math.nan,.9),('average',math.inf,.9),('halfway',.9,math.nan)], np.greater, 'head')])
def test_the_lowest_loss_that_is_not_worse_than_the_head(points, comp, want): assert pick_point([_point(*o) for o in points], comp).name==want

def test_nothing_finite(): assert pick_point([_point('end', math.nan, 1.)], np.greater) is None

# ---- in a fit

@pytest.mark.parametrize('lr', [1e-4,3.])
def test_the_fit_ends_with_the_point_that_was_picked(dls, lr):
    learn,look = ours(dls),Look()
    learn.fit_strategy(head_then(lr), 2, cbs=look)
    ps = look.best.points
    assert [p.name for p in ps]==['head','end','average','halfway']
    best = pick_point(ps, np.greater)
    assert [float(o) for o in learn.recorder.values[-1]]==pytest.approx([float(o) for o in best.row])
    assert len(learn.recorder.values)==k+2+(best.name!='end')==len(learn.recorder.iters)
    if lr==3.: assert best.name!='end'
    assert best.value>=ps[0].value
    assert list(map(float, learn.validate()))==pytest.approx(list(map(float, best.row[1:])), rel=1e-4)

@pytest.fixture
def known(bright):
    "Validation images enough to be sure of a loss, which the head knows from training"
    fs = get_image_files(bright)
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda _: fs*7, get_y=parent_label, splitter=IndexSplitter(range(len(fs), 7*len(fs))))
    return block.dataloaders(bright, bs=8, num_workers=0)

def test_a_body_that_lost_what_the_head_knew_ends_early_and_says_so(known):
    learn,look = ours(known),Look()
    learn.fit_strategy(head_then(3.), 5, cbs=look)
    ps = look.best.points
    assert [p.name for p in ps]==['head','end','average','halfway'] and ps[0].taken
    assert len(learn.recorder.values)==k+3+1 and 'after 3 of 5 epochs' in ps[1].note and not (ps[0].note or ps[2].note)
    assert list(map(float, learn.validate()))==pytest.approx(list(map(float, ps[0].row[1:])), rel=1e-4)
    assert 'ended after 3 of 5 epochs' in repr(AutoEvidence(1., 'accuracy', [], .3, [1e-3,1e-3], 'Why.', ps))

@pytest.mark.parametrize('n_epoch,ran', [(1,1), (2,2), (3,2), (4,3)])
def test_short_phases_end_early_only_after_three_fifths(known, n_epoch, ran):
    learn = ours(known)
    learn.fit_strategy(head_then(3.), n_epoch)
    assert len(learn.recorder.values)==k+ran+1 # the last row is the head's

def test_few_images_cannot_end_a_phase(dls):
    "On 15 images that a head hardly knows, even a ruined body may be chance"
    learn,look = ours(dls),Look()
    learn.fit_strategy(head_then(3.), 5, cbs=look)
    ps = look.best.points
    assert not any(p.note for p in ps) and len(learn.recorder.values)==k+5+1 and ps[0].taken

@pytest.mark.parametrize('share,loss', [(.49,9.), (9.,0.), (math.nan,9.)])
def test_a_loss_that_may_come_back_ends_nothing(dls, share, loss, monkeypatch):
    monkeypatch.setattr(points, 'lost_share', lambda *a: share)
    monkeypatch.setattr(points, 'tempered_loss', lambda *a: loss)
    learn,look = ours(dls),Look()
    learn.fit_strategy(head_then(3.), 5, cbs=look)
    assert not any(p.note for p in look.best.points) and len(learn.recorder.values)>=k+5

def test_the_share_that_is_lost():
    y = torch.tensor([0]*30+[1]*10)
    knows_nothing = -(.75*math.log(.75)+.25*math.log(.25))
    assert lost_share(.2, .2, y)==0 and lost_share(knows_nothing, .2, y)==pytest.approx(1) and lost_share(.1, .2, y)<0
    assert lost_share(9., knows_nothing+.1, y)==0 and lost_share(9., .1, torch.zeros(40).long())==0 # nothing to lose

def test_points_are_what_they_are_called(dls):
    learn,look,seen = ours(dls),Look(),{}
    class Keep(Callback):
        order = 80
        def before_batch(self):
            if self.training and self.epoch==k and 'head' not in seen: seen['head'] = weights(self.learn)
    learn.fit_strategy(head_then(1e-3), 2, cbs=[look, Keep()])
    live = {id(t):n for n,t in (*learn.model.named_parameters(), *learn.model.named_buffers())}
    for t,s in zip(look.best.average.live, look.best.average.start): assert torch.equal(s, seen['head'][live[id(t)]])

@pytest.mark.parametrize('norm,moves', [('running',False), ('group',True)])
def test_statistics_are_taken_anew_where_they_moved(dls, norm, moves):
    learn,look = ours(dls),Look()
    learn.fit_strategy(head_then(1e-3, norm), 2, cbs=look)
    assert look.best._moving==moves

def test_an_interrupt_leaves_the_best_epoch(dls):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch==k+1: raise KeyboardInterrupt
    learn = ours(dls)
    with pytest.raises(KeyboardInterrupt): learn.fit_strategy(head_then(3.), 3, cbs=Stop())
    best = max(float(v[-1]) for v in learn.recorder.values[k-1:])
    assert learn.validate()[-1]==pytest.approx(best)

def test_a_strategy_of_one_phase_keeps_the_best_epoch(dls):
    learn = ours(dls)
    learn.fit_strategy(Strategy('one', lambda n,p,g: [Phase(n, 1e-3)], keep_best=BestPoint), 3)
    best = max(float(v[-1]) for v in learn.recorder.values)
    assert learn.validate()[-1]==pytest.approx(best)
