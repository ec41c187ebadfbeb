"""Every architecture of timm, every torchvision classifier, every XResNet: all checks that need no weights; and real training steps for the smallest of each kind. Nothing is sampled, nothing skipped

Two processes with one thread each do the work before the first test, for the architectures chosen on the command line; each test then looks at one result."""
import logging,multiprocessing,time,warnings
from collections import Counter,deque
from concurrent.futures import ProcessPoolExecutor,ThreadPoolExecutor

import pytest,timm,torch

from fastai_discriminative.checks import *
from fastai_discriminative.coverage import *
from fastai_discriminative.core import read_data
from fastai_discriminative.registry import *

names = list(all_architectures())
stored = {r['arch']:r for r in read_data('zoo.csv')}
same_versions = f'timm {timm.__version__},' in read_data('zoo.csv', head=True)

def _start():
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.getLogger('timm').setLevel(logging.ERROR)

def _kind(name):
    "What an architecture is the smallest of: its module of timm, or its family"
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

def _do(job): return (prove if job[0]=='prove' else _step)(job[1])

@pytest.fixture(scope='module')
def results(request):
    "(`'prove'` or `'step'`, name) -> result, for all tests of this page that were asked for"
    jobs = [j for o in request.session.items if o.path==request.path and (j := getattr(o, 'callspec', None) and o.callspec.params.get('job'))]
    start,res = time.perf_counter(),{}
    steps,proofs = (deque(j for j in jobs if j[0]==k) for k in ('step','prove'))
    steps = deque(sorted(steps, key=lambda j: -int(stored[j[1]]['params']))) # the longest first
    with ThreadPoolExecutor(2) as threads: list(threads.map(lambda queues: _work(queues, res), ((steps,proofs), (proofs,))))
    return res,time.perf_counter()-start

def _work(queues, res):
    "Do the jobs of `queues` in turn, in one process: training steps, which take much memory, are all given to the same one"
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _start) as pool:
        for q in queues:
            while q:
                try: j = q.popleft()
                except IndexError: break # the other thread was faster
                res[j] = pool.submit(_do, j).result()

@pytest.mark.parametrize('job', [('prove',n) for n in names], ids=lambda j: j[1])
def test_zoo(job, results):
    "All checks hold, but for those of the table of exceptions, which have to fail; and the table of coverage says what is"
    row,bad = results[0][job]
    known = zoo_exceptions(job[1])
    assert bad.keys()==known.keys(), [f"{k}: {bad.get(k, 'passes, and is excepted needlessly')}" for k in bad.keys()^known.keys()]
    if same_versions: assert row==stored.get(job[1]), 'data/zoo.csv is stale: run `python tools/make_zoo.py`'

@pytest.mark.parametrize('job', [('step',n) for n in smallest()], ids=lambda j: j[1])
def test_real_steps(job, results):
    "Forward, backward, optimiser step after split, freeze, freeze_to(-2), unfreeze: what trains moves, what is frozen does not, norms follow `train_norm`"
    assert not results[0][job]

def test_smallest_are_of_every_kind():
    assert {_kind(n) for n in smallest()}=={_kind(n) for n in names if n in stored}
    assert {stored[n]['family'] for n in smallest()}=={r['family'] for n,r in stored.items() if n in all_architectures() and r['rule']!='none'}

def test_families_serve_their_architectures():
    "A registered family that left a parameter out would quietly fall back on another rule"
    assert [n for n,r in stored.items() if n in all_architectures() and r['rule'] not in ('registered','none') and find_family(all_architectures()[n]).registered]==[]

def test_exceptions_name_architectures():
    used = {(r['archs'],r['check']) for r in read_data('exceptions.csv') if any(r['check'] in zoo_exceptions(n) for n in names)}
    assert used=={(r['archs'],r['check']) for r in read_data('exceptions.csv')} or not same_versions # older releases have fewer architectures
    assert all(len(r['reason'])>20 for r in read_data('exceptions.csv'))

def test_nothing_was_left_out(request, results, capsys):
    asked = {o.callspec.params['job'][1] for o in request.session.items if getattr(o, 'originalname', '')=='test_zoo'}
    if asked!=set(names): pytest.skip('a part of the zoo was chosen on the command line')
    res,secs = results
    rules = Counter(r[0]['rule'] for j,r in res.items() if j[0]=='prove' and r[0]['rule']!='none')
    tested,excepted = {j[1] for j,r in res.items() if j[0]=='prove' and not r[1]},{n for n in names if zoo_exceptions(n)}
    steps = sum(j[0]=='step' for j in res)
    with capsys.disabled():
        print(f"\n{len(names)} architectures ({len(timm.list_models())} of timm): {', '.join(f'{n} {r}' for r,n in rules.most_common())}; "
            f"{len(tested)} pass every check, {len(excepted)} are excepted from one; {steps} of them trained for real; {secs:.0f} s in two processes")
    assert not tested & excepted and tested|excepted==set(names)>=set(timm.list_models())
    if same_versions: assert set(stored)==set(names)
