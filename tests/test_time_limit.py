"A fit ends in time, with the best weights so far"
import time

import pytest,torch
from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoader,DataLoaders,Learner,accuracy
from fastai_discriminative.all import *
from torch import nn

class Slow(Callback):
    def after_batch(self): time.sleep(.02)

def _learner():
    torch.manual_seed(0)
    x,y = torch.randn(64, 4),torch.arange(64)%3
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items[:48], bs=8), DataLoader(items[48:], bs=8))
    return Learner(dls, nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3)), CrossEntropyLossFlat(), metrics=accuracy)

@pytest.mark.parametrize('minutes', [0, -1, float('nan'), float('inf'), 'x'])
def test_wrong_minutes(minutes):
    with pytest.raises(StrategyError, match='must be a positive number'): TimeLimit(minutes)

def test_no_epoch_begins_that_would_not_be_done_in_time():
    "An epoch takes at least .16 s, so .6 s have room for three, and no batch of a fourth is seen"
    learn,limit = _learner(),TimeLimit(.6/60)
    with learn.no_bar(), learn.no_logging(): learn.fit(100, cbs=[Slow(), limit])
    assert limit.is_over and 1<=len(learn.recorder.values)<=3 and learn.recorder.smooth_loss.count==6*len(learn.recorder.values)

def test_over_in_the_middle_of_the_first_epoch_and_ever_after():
    learn,limit = _learner(),TimeLimit(.03/60)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[Slow(), limit])
        assert limit.is_over and learn.recorder.smooth_loss.count<6
        learn.fit(1, cbs=limit)
    assert learn.recorder.smooth_loss.count==0

def test_in_time_changes_nothing():
    a,b = _learner(),_learner()
    for o,cbs in ((a,None),(b,TimeLimit(10))):
        with o.no_bar(), o.no_logging(): o.fit(2, cbs=cbs)
    assert all(torch.equal(v, b.model.state_dict()[k]) for k,v in a.model.state_dict().items())

def test_the_best_weights_are_left():
    "A strategy that keeps the best ends with it, as after an interrupt"
    learn = _learner()
    timed = Strategy('timed', lambda n_epoch,preset,groups: [Phase(n_epoch, 1.)], keep_best=True) # so fast that it gets worse again
    learn.split(2)
    learn.preset = Preset(1e-3, 1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit_strategy(timed, 1000, cbs=[Slow(), TimeLimit(2/60)])
    accs = [r[2] for r in learn.recorder.values]
    assert 2<len(accs)<20 and max(accs)>min(accs), accs
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[1]==max(accs)

def test_fits_have_equal_shares_of_what_is_left():
    limit = TimeLimit(6)
    first = limit.share(3)
    assert first.minutes==pytest.approx(2, abs=.01) and first.end<limit.end and limit.share(1).end==pytest.approx(limit.end, abs=.5)
    first.is_over = True
    assert not limit.is_over and limit.minutes_left==pytest.approx(6, abs=.01)
    limit.end = time.monotonic()-1
    learn = _learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=limit.share(2))
    assert limit.minutes_left==0 and len(learn.recorder.values)==0

class SlowStart(Callback):
    "What takes long once, before the batches, as features do that are cached"
    order = 12
    def before_train(self):
        if self.epoch==0: time.sleep(1)
    def before_validate(self):
        if self.epoch==0: time.sleep(1)

def test_what_is_done_once_does_not_end_a_fit():
    "The first epoch takes over two seconds and the others nearly nothing, so there is room for nine more in less than two"
    learn,limit = _learner(),TimeLimit(3.5/60)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, cbs=[SlowStart(), limit])
    assert len(learn.recorder.values)==10 and not limit.is_over
