"""Every architecture of timm, every torchvision classifier, every XResNet: all checks that need no weights; and real training steps for the smallest of each kind

`pytest` proves the smallest of each kind, `pytest --zoo` proves all, and `--zoo-sample SEED` a random thirtieth besides the smallest."""
import logging,random,sys,warnings
from pathlib import Path

import pytest,timm

from fastai_discriminative.checks import *
from fastai_discriminative.coverage import *
from fastai_discriminative.core import read_data
from fastai_discriminative.registry import *

sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
from zoo_lock import code,read_lock,versions,zoo_hash

names = list(all_architectures())
stored = {r['arch']:r for r in read_data('zoo.csv')}
same_versions = f'timm {timm.__version__},' in read_data('zoo.csv', head=True)

def _kind(name):
    "The group of which an architecture is the smallest: its timm module or its family"
    what = all_architectures()[name]
    return (timm.model_entrypoint(what) if isinstance(what, str) else what).__module__

def smallest():
    "The `test_*` models, and the smallest of each Python module and of each family, by the number of parameters"
    rows = sorted((r for n,r in stored.items() if n in all_architectures() and r['rule']!='none'), key=lambda r: int(r['params']))
    by = {}
    for r in rows:
        for k in (_kind(r['arch']), (r['family'],r['rule'])): by.setdefault(k, r['arch'])
    return sorted({*by.values(), *(n for n in names if n.startswith('test_'))})

def _step(name):
    "What is wrong with real training steps of `name`, or `''`"
    try: splitter_checks(all_architectures()[name])['training']()
    except Exception as e: return f'{type(e).__name__}: {e}'
    return ''

def chosen(config):
    "The architectures that this run proves"
    if config.option.zoo: return names
    seed = config.option.zoo_sample
    return sorted({*smallest(), *(() if seed is None else random.Random(seed).sample(names, len(names)//30))})

def stepped(config):
    "The smallest of each kind that take real steps. Those of thirty million parameters and more take up to a minute each: all with `--zoo`, two by chance with `--zoo-sample`, as in CI"
    seed,large = config.option.zoo_sample,[n for n in smallest() if int(stored[n]['params'])>=3e7]
    some = large if config.option.zoo else [] if seed is None else random.Random(seed).sample(large, 2)
    return [n for n in smallest() if n not in large or n in some]

def _step_params(config):
    "Large models train in one process, one after the other: two at once may not fit into memory"
    return [pytest.param(n, marks=[pytest.mark.xdist_group('large')]*(int(stored[n]['params'])>1e8)) for n in stepped(config)]

def pytest_generate_tests(metafunc):
    if 'arch' in metafunc.fixturenames: metafunc.parametrize('arch', chosen(metafunc.config))
    if 'small' in metafunc.fixturenames: metafunc.parametrize('small', _step_params(metafunc.config))

@pytest.fixture(autouse=True)
def quiet_timm():
    log = logging.getLogger('timm')
    was = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    log.setLevel(was)

def test_zoo(arch):
    "All checks pass, except those in the table of exceptions, which must fail; the coverage table is right"
    row,bad = prove(arch)
    known = zoo_exceptions(arch)
    assert bad.keys()==known.keys(), [f"{k}: {bad.get(k, 'passes, and is excepted needlessly')}" for k in bad.keys()^known.keys()]
    if same_versions: assert row==stored.get(arch), 'data/zoo.csv is stale: run `python tools/make_zoo.py`'

def test_real_steps(small):
    "Forward, backward, optimiser step after split, freeze, freeze_to(-2), unfreeze: trainable parameters change, frozen ones do not, norm layers follow `train_norm`"
    splitter_checks(all_architectures()[small])['training']()

def test_smallest_are_of_every_kind():
    assert {_kind(n) for n in smallest()}=={_kind(n) for n in names if n in stored}
    assert {stored[n]['family'] for n in smallest()}=={r['family'] for n,r in stored.items() if n in all_architectures() and r['rule']!='none'}

def test_families_serve_their_architectures():
    "A registered family that leaves a parameter out would silently use another rule"
    assert [n for n,r in stored.items() if n in all_architectures() and r['rule'] not in ('registered','none') and find_family(all_architectures()[n]).registered]==[]

def test_exceptions_name_architectures():
    used = {(r['archs'],r['check']) for r in read_data('exceptions.csv') if any(r['check'] in zoo_exceptions(n) for n in names)}
    assert used=={(r['archs'],r['check']) for r in read_data('exceptions.csv')} or not same_versions # older releases have fewer architectures
    assert all(len(r['reason'])>20 for r in read_data('exceptions.csv'))

def test_nothing_was_left_out(request):
    "Each process of pytest-xdist collects all tests, and each test of the zoo passes only if all checks pass or are excepted"
    opt = request.config.option
    if opt.keyword or opt.markexpr or any('::' in o for o in request.config.args): pytest.skip('a part of the zoo was chosen on the command line')
    ours = [o.callspec.params for o in request.session.items if o.path==request.path and hasattr(o, 'callspec')]
    asked = {k:[o[k] for o in ours if k in o] for k in ('arch','small')}
    assert asked=={'arch':chosen(request.config), 'small':stepped(request.config)} and set(smallest())<=set(asked['arch'])
    if opt.zoo: assert set(asked['arch'])==set(names)>=set(timm.list_models())
    if same_versions: assert set(stored)==set(names)

def test_the_proof_is_of_this_code(request):
    "Words may change; code that decides groups needs a new proof, and `--zoo` is one"
    if request.config.option.zoo: pytest.skip('this run proves the whole zoo')
    was = read_lock()
    if was and was['versions']!=versions(): pytest.skip('the zoo was proved with other versions')
    assert was.get('code')==zoo_hash(), 'data/zoo.csv was proved with other code: run `python tools/make_zoo.py`'

def test_the_hash_is_of_code_only():
    a = 'def f(x): # one\n    "One"\n    return x\n'
    assert code(a)==code('def f(x):\n\n    "Two"\n    return x # two\n')!=code(a.replace('return x', 'return -x'))
