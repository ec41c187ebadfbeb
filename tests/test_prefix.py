"The fixed part of a model and what the rest uses: tested in both modes, refused if the two cannot be separated"
import pytest,torch
from torch import nn

from fastai_discriminative.all import *
from test_features import conv,ours,own_net

@pytest.fixture(scope='session')
def folder(many): return many

# ---- what the rest uses

def test_what_only_training_uses():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.aux,self.out = conv(3,8),conv(8,8),nn.Linear(8,3),nn.Linear(8,3)
        def forward(self, x):
            f = self.a(x)
            y = self.out(self.b(f).mean((2,3)))
            return y+self.aux(f.mean((2,3))) if self.training else y
    m,x = Deep(),torch.randn(4,3,32,32)
    for o in (m.a, m.b): o.requires_grad_(False).eval()
    pre = FrozenPrefix(m, (x,))
    assert len(pre.used)==2 and m.training
    for mode in (True,False):
        m.train(mode)
        for o in (m.a, m.b): o.eval()
        assert torch.allclose(pre.rest(*pre.features(x)), m(x), atol=1e-6)

# ---- what cannot be taken apart

def test_nothing_frozen():
    with pytest.raises(NothingFrozen): FrozenPrefix(own_net(), (torch.randn(2,3,32,32),))

def test_inputs_that_are_no_tensors():
    with pytest.raises(FeatureError, match='not tensors'): FrozenPrefix(own_net(), (dict(x=torch.randn(2,3,8,8)),))

def test_everything_frozen():
    net = own_net().requires_grad_(False)
    with pytest.raises(FeatureError, match='Nothing trains'): FrozenPrefix(net, (torch.randn(2,3,32,32),))

def test_a_model_with_a_secret():
    "Values that layers pass on outside their results cannot be cached"
    class Secret(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.out = conv(3,8).requires_grad_(False),nn.Linear(8,3)
        def forward(self, x):
            y = self.a(x)
            return self.out(y.mean((2,3)))*Secret.inner(self.a[0])
        @staticmethod
        def inner(m): return m.seen
    m = Secret()
    m.a[0].forward = (lambda f: lambda x: setattr(m.a[0], 'seen', x.abs().mean()) or f(x))(m.a[0].forward)
    with pytest.raises(FeatureError, match='gives other results'): FrozenPrefix(m, (torch.randn(3,3,32,32),))

def test_a_frozen_layer_that_only_training_runs():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.aux,self.out = conv(3,8),nn.Linear(8,3),nn.Linear(8,3)
        def forward(self, x):
            x = self.a(x).mean((2,3))
            return self.out(x)+self.aux(x) if self.training else self.out(x)
    m = Aux()
    for o in (m.a, m.aux): o.requires_grad_(False).eval()
    with pytest.raises(FeatureError, match='more often in training'): FrozenPrefix(m, (torch.randn(4,3,32,32),))
    assert 'forward' not in vars(m.aux) and m.training

def test_rows_that_are_no_samples():
    "An LSTM returns its state with layers first: not one row per sample, even if the numbers are equal"
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out = nn.LSTM(4, 4, num_layers=4, batch_first=True).requires_grad_(False),nn.Linear(4,3)
        def forward(self, x): return self.out(self.rnn(x)[1][0].sum(0))
    for bs in (3,4,8):
        with pytest.raises(FeatureError, match='no row for each|gives other results'): FrozenPrefix(Rnn(), (torch.randn(bs,5,4),))

def test_a_prefix_that_is_random_in_training():
    "Random numbers inside a frozen layer that stays in train mode"
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3,1,1))
        def forward(self, x): return x*self.w+(torch.randn_like(x) if self.training else 0)
    net = nn.Sequential(Noise().requires_grad_(False), nn.Flatten(), nn.Linear(12,3))
    with pytest.raises(FeatureError, match='In training'): FrozenPrefix(net, (torch.randn(4,3,2,2),))
    net[0].eval()
    FrozenPrefix(net, (torch.randn(4,3,2,2),))

# ---- a frozen prefix keeps nothing for a backward pass

def saved_bytes(learn, k):
    "Bytes that autograd keeps of a forward pass with the groups before `k` frozen"
    learn.freeze_to(k)
    kept,own = {},{p.data_ptr() for p in learn.model.parameters()}
    def _keep(t):
        if t.data_ptr() not in own: kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    learn.model.train()
    learn.true_freeze.hold()
    with torch.autograd.graph.saved_tensors_hooks(_keep, lambda t: t): out = learn.model(torch.randn(8,3,32,32))
    learn.true_freeze.release()
    out.sum().backward()
    return sum(kept.values())

@pytest.mark.parametrize('arch,kwargs', [('resnet10t',{}), ('test_vit',dict(img_size=32)), ('test_convnext',{}), ('test_efficientnet',{}), ('swin_tiny_patch4_window7_224',dict(img_size=32, window_size=1))])
def test_nothing_is_saved_before_the_first_training_group(folder, arch, kwargs):
    learn = ours(folder, arch, n_groups='block', **kwargs)
    n = len(learn.layer_groups)
    sizes = [saved_bytes(learn, k) for k in range(n)]
    assert sizes==sorted(sizes, reverse=True) and sizes[-1]<.2*sizes[0]
    learn.freeze()
    grads = {n_ for n_,p in learn.model.named_parameters() if p.grad is not None}
    assert not any(n_.startswith('0.') for n_ in grads)
