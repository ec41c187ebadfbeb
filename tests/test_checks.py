"The checks pass for right splitters, name what is wrong in others, and work in one line of pytest"
import subprocess,sys,textwrap

import pytest,timm,torch
from fastai.vision.models import xresnet
from torch import nn

from fastai_discriminative import checks as C
from fastai_discriminative.checks import *
from fastai_discriminative.groups import *
from fastai_discriminative.registry import *
from small_models import newer

size = (3,16,16)

class Net(nn.Module):
    "A network of a family that its author registered"
    def __init__(self):
        super().__init__()
        self.stem,self.norm = nn.Conv2d(3,8,3,2),nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8,8,3,padding=1), nn.BatchNorm2d(8)) for _ in range(4)])
        self.fc = nn.Linear(8, 2)
    def forward(self, x):
        x = self.norm(self.stem(x))
        for b in self.blocks: x = x+b(x).relu()
        return self.fc(x.mean((2,3)))

def _net_layers(m):
    yield m.stem,m.norm
    yield from m.blocks

@pytest.fixture
def net_family(own_families): register_family('net', archs='Net')(_net_layers)

# ## What is right passes

@parametrize_with_splitter_checks(Net, input_size=size)
def test_one_line(check, net_family): check()

@parametrize_with_splitter_checks(Net(), x=torch.randn(2,*size))
def test_traced_without_registration(check): check()

@parametrize_with_splitter_checks(['test_resnet','test_vit'])
def test_architectures(check): check()

@parametrize_with_splitter_checks(xresnet.xresnet18)
def test_function(check): check()

def test_which_checks_apply():
    assert set(splitter_checks('test_vit'))==set(splitter_checks(xresnet.xresnet18))=={'rules','numbers','rates','copies','training','body','channels'}
    assert set(splitter_checks(Net))==set(splitter_checks(Net()))=={'rules','numbers','rates','copies','training'}

def test_unknown_architecture():
    with pytest.raises(FamilyError, match="'resnet' is a family, not an architecture.*'resnet18'"): splitter_checks('resnet')
    with pytest.raises(FamilyError, match="Did you mean 'test_vit'"): splitter_checks('test_vitt')

def test_the_model_is_left_alone():
    m = Net()
    was = {n:t.clone() for n,t in m.state_dict().items()}
    for f in splitter_checks(m, input_size=size).values(): f()
    assert m.training and all(torch.equal(t, was[n]) for n,t in m.state_dict().items()) and all(p.requires_grad and p.grad is None for p in m.parameters())

def test_the_random_state_is_left_alone():
    check = splitter_checks(Net(), input_size=size)['training']
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    check()
    assert torch.equal(torch.rand(1), a)

@pytest.mark.parametrize('train_norm', ['group','affine',True,False])
@pytest.mark.parametrize('arch', ['test_resnet','test_vit',newer('test_mambaout')])
def test_every_choice_of_norms(arch, train_norm): C._check_training(C._Case(arch), train_norm)

# ## What is wrong is named

def _failing(name, what, match, **kwargs):
    with pytest.raises(SplitterError, match=match): splitter_checks(what, **kwargs)[name]()

def test_wrong_order(own_families):
    register_family('net', archs='Net')(lambda m: [*m.blocks, m.stem, m.norm])
    _failing('rules', Net, r"stem.weight is in group 4 \('stem'\), but first used before blocks.0.0.weight of group 0", input_size=size)

def test_late_token():
    "timm's pattern puts CaiT's class token into the stem"
    m = timm.create_model('cait_xxs24_224')
    def as_timm(m):
        from timm.models._manipulate import group_parameters
        ps = dict(m.named_parameters())
        return [[ps[n] for n in names] for _,names in sorted(group_parameters(m, m.group_matcher()).items())]
    with pytest.raises(SplitterError) as e: check_splitter(as_timm, m)
    assert any(o.startswith('cls_token is in group 0, but first used after blocks.') for o in e.value.faults)

def test_steps_that_move_what_is_frozen():
    class Sneaky(Net):
        def forward(self, x):
            with torch.no_grad(): self.stem.weight.mul_(0.99)
            return super().forward(x)
    _failing('training', Sneaky, 'after freeze: stem.weight is frozen, but changed', input_size=size)

def test_statistics_that_do_not_rest():
    class Restless(Net):
        def forward(self, x):
            self.norm.running_mean.add_(1)
            return super().forward(x)
    _failing('training', Restless, 'after freeze: the running statistics of norm should stay the same, but changed', input_size=size)

def test_statistics_that_do_not_follow():
    class Stubborn(Net):
        def forward(self, x):
            self.norm.eval()
            x = self.norm(self.stem(x))
            self.norm.train(self.training)
            return self.fc(self.blocks[0](x).mean((2,3))+sum(b.sum() for p in self.blocks[1:] for b in p.parameters()))
    _failing('training', Stubborn, 'the running statistics of norm should follow the batch, but did not change', input_size=size)

def test_groups_that_are_no_runs(monkeypatch):
    good = C.cut_groups
    def bad(m, n):
        gs = good(m, n)
        if n==4: gs.groups[0],gs.groups[1] = gs.groups[1],gs.groups[0]
        return gs
    monkeypatch.setattr(C, 'cut_groups', bad)
    _failing('numbers', Net(), 'n_groups=4: the groups are not runs of whole blocks', input_size=size)

def test_refusal_without_the_maximum(monkeypatch):
    good = C.cut_groups
    def bad(m, n):
        if n==9: raise SplitterError('no')
        return good(m, n)
    monkeypatch.setattr(C, 'cut_groups', bad)
    _failing('numbers', Net(), 'n_groups=9 of at most .: no', input_size=size)

def test_rates_that_depend_on_the_number(monkeypatch):
    monkeypatch.setattr(C.Preset, 'lrs', lambda self, groups: torch.logspace(-5, -3, len(groups)).tolist())
    _failing('rates', Net(), r'n_groups=\d, .*: rate \S+ is outside', input_size=size)

@pytest.mark.parametrize('arch', [newer('naflexvit_base_patch16_gap')])
def test_linear_stem_cannot_be_adapted(arch): _failing('channels', arch, r"n_in=1: WeightsError: .* cannot be adapted to n_in=1 channels: embeds.proj.weight")

# ## In pytest

def _run(tmp_path, text):
    (tmp_path/'test_family.py').write_text(textwrap.dedent(text))
    return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rxX', str(tmp_path)], capture_output=True, text=True, cwd=tmp_path).stdout

head = '''
    import torch
    from torch import nn
    from fastai_discriminative.checks import *
    from fastai_discriminative.registry import register_family
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.b,self.a,self.fc = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,2)
        def forward(self, x): return self.fc(self.b(self.a(x)).relu())
    register_family('mine', archs='Mine')(lambda m: [%s])
    @parametrize_with_splitter_checks(Mine, %s, x=torch.randn(2,4))
    def test_mine(check): check()
    '''

def test_a_file_of_ones_own(tmp_path): assert '5 passed' in _run(tmp_path, head%('m.a, m.b', 'None'))

def test_a_fault_fails_the_file(tmp_path):
    out = _run(tmp_path, head%('m.b, m.a', 'None'))
    assert '1 failed, 4 passed' in out and "a.weight is in group 1 ('a'), but first used before b.weight" in out

def test_an_expected_failure_is_one_only_while_it_fails(tmp_path):
    why = "dict(rules='b was there first')"
    out = _run(tmp_path, head%('m.b, m.a', why))
    assert '4 passed, 1 xfailed' in out and 'b was there first' in out
    out = _run(tmp_path, head%('m.a, m.b', why))
    assert '1 failed, 4 passed' in out and 'XPASS(strict)' in out

def test_an_expected_failure_that_does_not_exist():
    with pytest.raises(SplitterError, match="names 'rule'. The checks are: rules, numbers"): parametrize_with_splitter_checks(Net, {'rule':'why'})
