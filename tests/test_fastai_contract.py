"What fastai documents of its optimisers, learners, schedules and recorder is the same to the last bit with and without our import"
import json,subprocess,sys
from functools import partial

import pytest,torch
from fastai.optimizer import Adam,OptimWrapper,SGD,ranger

import contract_behaviours as contract
from fastai_discriminative.all import *

pytestmark = pytest.mark.xdist_group('contract') # both processes run once
funcs = dict(adam=Adam, sgd=partial(SGD, mom=0.9), ranger=ranger, adamw=partial(OptimWrapper, opt=torch.optim.AdamW), fused=fused_adamw)

def ours(path):
    "Files that split learners wrote, one per optimiser, and their weights"
    res = {}
    for k,f in funcs.items():
        learn = contract.learner(opt_func=f).split(3)
        learn.path,learn.model_dir = path,'.'
        learn.fit(1, 1e-2)
        learn.freeze_to(1)
        learn.save(k)
        res[k] = json.loads(json.dumps(contract.told(learn.model.state_dict())))
    return res

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The results of a process without our package, and of one with it"
    path = tmp_path_factory.mktemp('contract')
    res = dict(ours=ours(path/'ours'))
    for how in ('without','with'):
        (path/'run').mkdir(exist_ok=True)
        p = subprocess.run([sys.executable, contract.__file__, str(path/'run'), how, str(path/how)], capture_output=True, text=True)
        assert not p.returncode, p.stderr[-3000:]
        res[how] = json.loads((path/how).read_text())
    return res

@pytest.mark.parametrize('name', contract.behaviours)
def test_behaviour_is_the_same_with_us(runs, name): assert runs['with'][name]==runs['without'][name]

def test_the_processes_had_what_they_should(runs):
    a,b = (runs[k] for k in ('without','with'))
    assert not a['imported'] and b['imported'] and len(contract.behaviours)>=60
    assert len({json.dumps(a[k]) for k in contract.behaviours})==len(contract.behaviours), 'two behaviours tell the same: one of them tries nothing'

@pytest.mark.parametrize('func', funcs)
def test_stock_fastai_reads_the_weights_of_our_files(runs, func):
    _,weights,warnings = runs['without']['ours'][func]
    assert weights==runs['ours'][func] and warnings==['list','Could not load the optimizer state.']
