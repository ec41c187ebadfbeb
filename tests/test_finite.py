"The first NaN or infinite value is named, and the learner can be used again"
import numpy as np,pytest,torch
from torch import nn
from PIL import Image
from fastai.vision.all import (Callback,CategoryBlock,CrossEntropyLossFlat,DataBlock,ImageBlock,IndexSplitter,Learner,MSELossFlat,RandomSplitter,
    RegressionBlock,TransformBlock,accuracy,get_image_files,parent_label)

from fastai_discriminative.all import *
from fastai_discriminative.finite import find_nonfinite
from helpers import *

@pytest.fixture
def dls(bright): return bright_dls(bright)

nan = float('nan')
name = '0.model.layer2.0.conv1.weight'
fits = dict(auto=('auto',1), lp_ft=('lp_ft',1), discriminative=('discriminative',1), phases=([Phase(1, 1e-3)],None))

def _spoil(t, v=nan):
    with torch.no_grad(): t.view(-1)[0] = v

def _still_trains(learn):
    "The learner is unchanged, and a fit without the fault trains it"
    assert 'forward' not in vars(learn.model) and all(torch.isfinite(v).all() for v in learn.model.state_dict().values() if v.is_floating_point())
    assert all(torch.isfinite(v).all() for s in learn.opt.state_dict()['state'] for v in s.values() if isinstance(v, torch.Tensor))
    assert type(learn.loss_func) is CrossEntropyLossFlat or isinstance(learn.loss_func.func, nn.MSELoss)
    before = weights(learn)
    learn.fit_strategy([Phase(1, 1e-3)])
    assert np.isfinite(learn.recorder.values[-1][:2]).all() and changed(learn, before)

@pytest.mark.parametrize('value', [nan, float('inf')])
@pytest.mark.parametrize('how', fits)
def test_a_damaged_weight_of_the_body(dls, how, value):
    learn = pre_ours(dls)
    p = dict(learn.model.named_parameters())[name]
    was = p.detach().clone()
    _spoil(p, value)
    with pytest.raises(NotFiniteError, match=f'first.* is in the (frozen )?weight {name!r}'): learn.fit_strategy(*fits[how])
    with torch.no_grad(): p.copy_(was)
    _still_trains(learn)

@pytest.mark.parametrize('how', fits)
def test_a_damaged_statistic_of_the_body(dls, how):
    learn = pre_ours(dls)
    b = dict(learn.model.named_buffers())['0.model.layer1.0.bn1.running_var']
    was = b.clone()
    _spoil(b)
    learn.freeze()
    s,n = fits[how]
    with pytest.raises(NotFiniteError, match=r"first.* is in the buffer '0.model.layer1.0.bn1.running_var'"): learn.fit_strategy([Phase(1, 1e-3, frozen=-1)] if n is None else s, n)
    b.copy_(was)
    _still_trains(learn)

@pytest.mark.parametrize('cached', [True, False])
def test_a_head_that_learns_too_fast(dls, cached):
    learn = pre_ours(dls)
    before = weights(learn)
    with pytest.raises(NotFiniteError) as e: learn.fit_strategy([Phase(3, 1e30, frozen=-1, cached=cached), Phase(1, 1e-3)])
    assert "'1." in str(e.value) and "'0." not in str(e.value) and 'rates of' in str(e.value) and 'e+29' in str(e.value)
    assert same(before, weights(learn))
    _still_trains(learn)

def test_a_head_that_was_ruined_before_is_not_the_frozen_parts_fault(dls):
    learn = pre_ours(dls)
    _spoil(learn.model[1][-1].weight)
    learn.freeze()
    with pytest.raises(NotFiniteError, match="first.* is in the weight '1.8.weight'"): learn.fit_one_cycle(1, 1e-3, cbs=CachedFeatures())

class _Spoils(Callback):
    "Puts NaN somewhere in the second epoch's second batch"
    order = 50
    def __init__(self, where, epoch=0): self.where,self.at = where,epoch
    def before_batch(self):
        if self.training and self.iter==1 and self.epoch==self.at and self.where in ('xb','yb'): _spoil(getattr(self.learn, self.where)[0][3])
    def after_pred(self):
        if self.training and self.iter==1 and self.epoch==self.at and self.where=='pred': self.learn.pred = self.pred*nan
    def after_loss(self):
        if self.training and self.iter==1 and self.epoch==self.at and self.where=='loss': self.learn.loss_grad = self.learn.loss_grad*nan

@pytest.mark.parametrize('where,said', dict(xb=r'the inputs \(NaN in 1 of 8 samples\)', pred='the predictions', loss='the loss itself').items())
def test_a_damaged_batch(dls, where, said):
    learn = pre_ours(dls)
    before = weights(learn)
    with pytest.raises(NotFiniteError, match=f'epoch 1, batch 2. The first value that is not finite is in {said}'): learn.fit_strategy([Phase(2, 1e-3)], cbs=_Spoils(where))
    assert same(before, weights(learn))
    _still_trains(learn)

def test_damaged_targets(bright):
    db = DataBlock((ImageBlock,RegressionBlock), get_items=get_image_files, get_y=lambda o: nan if o.name=='3.png' else 1., splitter=IndexSplitter(range(8)))
    learn = quiet(discriminative_learner(db.dataloaders(bright, bs=8, num_workers=0), 'resnet10t', pretrained=False, n_out=1, loss_func=MSELossFlat()))
    with pytest.raises(NotFiniteError, match=r'the targets \(NaN in \d of 8'): learn.fit_strategy([Phase(1, 1e-3)])

def test_a_damaged_image_is_named_by_its_file(bright):
    def _pixels(o):
        t = torch.from_numpy(np.array(Image.open(o))).permute(2,0,1).float()/255
        if (o.parent.name,o.name)==('bee','7.png'): t[0,3,3] = nan
        return t
    db = DataBlock((TransformBlock,CategoryBlock), get_items=get_image_files, get_x=_pixels, get_y=parent_label, splitter=RandomSplitter(.2, seed=1))
    learn = pre_ours(db.dataloaders(bright, bs=8, num_workers=0))
    before = weights(learn)
    with pytest.raises(NotFiniteError, match=r"features of item \d+ \('.*bee.7.png'\) are NaN. The first.* is in the inputs \(NaN in 1 of 8 samples\)"):
        learn.fit_strategy('auto', 1)
    assert same(before, weights(learn)) and 'forward' not in vars(learn.model)

def test_layer_that_overflows(dls):
    class Squares(nn.Module):
        def forward(self, x): return (x*1e30)**2
    net = nn.Sequential(conv(3,8), Squares(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,3))
    learn = quiet(Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)).split()
    with pytest.raises(NotFiniteError, match="the output of layer '1' for finite inputs"): learn.fit_strategy([Phase(1, 1e-3)])

def test_auto_ends_with_the_best_weights_and_a_warning(dls):
    learn = pre_ours(dls)
    with pytest.warns(UserWarning, match=r'epoch 12, batch 2. The first value that is not finite is in the predictions.*ends with the best weights so far'):
        learn.fit_strategy('auto', 3, cbs=_Spoils('pred', 11))
    assert learn.recorder.values
    _still_trains(learn)

def test_the_last_step_of_a_fit(dls):
    "No later batch would show it"
    class Blows(Callback):
        order = 50
        def after_step(self):
            if self.iter==self.n_iter-1: _spoil(self.learn.model[1][-1].weight)
    learn = pre_ours(dls)
    with pytest.raises(NotFiniteError, match="its last step. The first value that is not finite is in the weight '1.8.weight'"): learn.fit_strategy([Phase(1, 1e-3)], cbs=Blows())
    _still_trains(learn)

def test_masks_may_be_infinite_by_design():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4,4)
            self.register_buffer('mask', torch.triu(torch.full((4,4), -float('inf')), 1))
        def forward(self, x): return (self.l(x)[:,None]+self.mask).softmax(-1)
    assert find_nonfinite(Masked(), (torch.randn(2,4),)) is None
