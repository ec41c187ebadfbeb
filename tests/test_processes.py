"Two processes on the CPU train one model: the same in both, and the same as one process with twice the batch"
import os,subprocess,sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pytest,torch
from torch import nn
from fastai_discriminative.ranks import *
from helpers import *
from processes_worker import cases,more,strategies

pytestmark = pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed: it comes with the dev extra, which the oldest versions are tested without')

worker = Path(__file__).parent/'processes_worker.py'

def _start(out, *cmd):
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':''}
    return subprocess.Popen([sys.executable, *cmd, str(worker), str(out)], stderr=subprocess.PIPE, text=True, env=env)

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "The results of all cases in both processes, and in a single one"
    path = tmp_path_factory.mktemp('processes')
    jobs = [_start(path/'of1'), _start(path/'of2', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')]
    try:
        for o in jobs:
            err = o.communicate(timeout=400)[1]
            assert not o.returncode, err[-3000:]
    finally:
        for o in jobs: o.kill()
    return [torch.load(path/f'of{n}-{r}', weights_only=False) for n,r in ((2,0), (2,1), (1,0))]

def _trained(res, name):
    for o in res: assert 'error' not in o[name], o[name]
    return [o[name] for o in res]

refused = ('not finite','not finite features','item missing','late after_pred','late before_batch','alone')
names,names2 = [o for o,*_ in cases()],[o for o,*_ in more() if o not in refused]

def test_all_strategies_are_there():
    own = {'feature_extraction','lp_ft','discriminative','gradual_unfreeze','freeze_unfreeze','surgical','layer_decay','auto'}
    assert own==set(strategies) and {f'{s} {f}' for s in own for f in (True,False)}<=set(names)

@pytest.mark.parametrize('name', names+names2)
def test_processes_end_with_the_same_bits_and_evidence(ran, name):
    a,b = _trained(ran[:2], name)
    assert same(a['state'], b['state'])
    rest = [{k:v for k,v in o.items() if k not in ('state','start')} for o in (a,b)]
    np.testing.assert_equal(*rest)

def test_an_image_that_is_not_finite_in_one_process_stops_both(ran):
    "On features, which cannot be cached, and on images, where the loss shows it"
    a,b = (o['not finite features'] for o in ran[:2])
    assert a['error']=='FeatureError' and 'Another process' in a['message']
    assert b['error']=='NotFiniteError' and 'inputs' in b['message']
    assert all(o['not finite'].get('error')=='NotFiniteError' for o in ran[:2]), ran[0]['not finite']

@pytest.mark.parametrize('name', names)
def test_two_processes_give_what_one_gives_with_twice_the_batch(ran, name):
    a,b = _trained(ran[1:], name)
    moved = max(float((o-b['start'][k]).abs().max()) for k,o in b['state'].items())
    far = max(float((o-b['state'][k]).abs().max()) for k,o in a['state'].items())
    assert far<=1e-5 and far<moved/20, f'{far} apart, moved by {moved}'

def test_trials_see_the_batch_of_all_processes(ran):
    a,b = _trained(ran[1:], 'trials')
    assert len(a['trials'])>1 and a['scale']==b['scale']==.5
    np.testing.assert_allclose(a['trials'], b['trials'], atol=1e-5)
    np.testing.assert_allclose(a['lrs'], b['lrs'], rtol=1e-6)
    assert [o[0] for o in a['points']]==[o[0] for o in b['points']]==['head','end','average','halfway']
    np.testing.assert_allclose([o[1:] for o in a['points']], [o[1:] for o in b['points']], atol=1e-5)

def test_a_communication_hook_outlives_a_thaw(ran):
    res = _trained(ran[:2], 'hook')[0]
    assert res['hooks']==[['fp16_compress_hook']]*5 and res['n_wrappers']==2

@pytest.mark.parametrize('name, error, words', [('item missing','FeatureError','Another process|returned 15 of 16'), ('late after_pred','RanksError','after this batch had begun'),
    ('late before_batch','RanksError','`order` is below 5'), ('alone','RanksError','another process trains different ones')])
def test_what_cannot_be_served_is_an_error_in_all_processes(ran, name, error, words):
    for o in ran[:2]:
        assert o[name].get('error')==error
        assert any(w in o[name]['message'] for w in words.split('|'))

def test_a_model_that_cannot_be_made_anew(monkeypatch):
    "As with FSDP or a compiled model around it"
    monkeypatch.setattr(ReducedParams, 'check_agreed', lambda self: None)
    monkeypatch.setattr('fastai_discriminative.ranks.n_ranks', lambda: 2)
    learn = SimpleNamespace(model=nn.Linear(2,2))
    reduced = ReducedParams(learn)
    reduced.follow()
    learn.model.bias.requires_grad_(False)
    with pytest.raises(RanksError, match='Linear cannot be rebuilt'): reduced.follow()
