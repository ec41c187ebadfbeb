"Our light schedules and recorder give what fastai's give, and leave fastai's alone"
import copy
import pytest,torch
from fastai.vision.all import Callback

from fastai_discriminative.all import *
from helpers import *

# ---- schedules and records without detours

def test_stock_schedules_are_back_after_every_fit(dls):
    from fastai.callback import schedule
    stock_ = schedule.combine_scheds,schedule.ParamScheduler
    class Looks(Callback):
        def before_epoch(self): self.inside = schedule.combine_scheds,schedule.ParamScheduler
    class Stops(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn,looks = ours(dls),Looks()
    learn.fit_one_cycle(1, 1e-4, cbs=looks)
    assert looks.inside==stock_==(schedule.combine_scheds,schedule.ParamScheduler)
    with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(1, 1e-4, cbs=Stops())
    assert stock_==(schedule.combine_scheds,schedule.ParamScheduler)

def test_what_others_put_into_fastais_schedules_stays(dls, monkeypatch):
    from fastai.callback import schedule
    ours(dls).fit_one_cycle(1, 1e-4)
    class Theirs(schedule.ParamScheduler): pass
    monkeypatch.setattr(schedule, 'ParamScheduler', Theirs)
    stock(dls).fit_one_cycle(1, 1e-4)
    ours(dls).fit_one_cycle(1, 1e-4)
    assert schedule.ParamScheduler is Theirs

@pytest.mark.parametrize('how', ['fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_schedules_and_losses_are_fastais_to_the_bit(dls, how):
    "The same splitter and optimiser, split by us and not"
    import random
    net = own_net()
    def _run(split):
        learn = plain(dls, copy.deepcopy(net), splitter=lambda m: [list(o) for o in layer_groups(m, 3)(m)])
        if split: learn.split(3, train_norm=True)
        torch.manual_seed(1)
        random.seed(1)
        dls.train.rng = random.Random(1)
        args = (1,1) if how=='fit_sgdr' else (2,)
        getattr(learn, how)(*args, slice(1e-4, 1e-2))
        return learn
    def _floats(o): return list(map(float, o))
    a,b = (_run(o).recorder for o in (False,True))
    assert a.lrs==b.lrs and {k:_floats(v) for k,v in a.hps.items()}=={k:_floats(v) for k,v in b.hps.items()}
    assert _floats(a.losses)==_floats(b.losses) and a.values==b.values and a.iters==b.iters

def test_recorder_keeps_its_place_and_its_values(dls):
    learn = stock(dls)
    learn.fit(1, 1e-4)
    order,values = [o.name for o in learn.cbs],learn.recorder.values
    learn.split()
    assert [o.name for o in learn.cbs][:len(order)]==order and learn.recorder.values is values and learn.split().recorder.values is values
