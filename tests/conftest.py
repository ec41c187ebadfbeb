"One thread, no network, no display, fixed seeds; and no test may leave the environment or the working folder changed"
import os,random
os.environ.update(MPLBACKEND='Agg', HF_HUB_OFFLINE='1')

import numpy as np,pytest,torch
from PIL import Image

_ours = ('PYTEST_', 'COV_')

def _env(): return {k:v for k,v in os.environ.items() if not k.startswith(_ours)}

@pytest.fixture(scope='session', autouse=True)
def one_thread():
    "Small models on a shared machine are fastest, and reproducible, on one thread"
    torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def seeded():
    "Each test starts from the same random state, whatever ran before it"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

@pytest.fixture(autouse=True)
def no_leaks():
    "Fail a test that leaves an environment variable, the working folder or autograd's switch changed, and put them back"
    env,cwd,grad = _env(),os.getcwd(),torch.is_grad_enabled()
    yield
    now = _env()
    leaks = sorted(k for k in env.keys()|now.keys() if env.get(k)!=now.get(k))
    for k in leaks:
        if k in env: os.environ[k] = env[k]
        else: del os.environ[k]
    moved,switched = os.getcwd()!=cwd, torch.is_grad_enabled()!=grad
    os.chdir(cwd)
    torch.set_grad_enabled(grad)
    assert not leaks, f"environment variables left changed: {leaks}"
    assert not moved, "the working folder was left changed"
    assert not switched, "gradients were left switched on or off"

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "45 noisy images of 32 pixels in three classes"
    path,rng = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i,c in enumerate(('ant','bee','cow')):
        (path/c).mkdir()
        for j in range(15): Image.fromarray(rng.integers(40*i, 120+40*i, (32,32,3), dtype=np.uint8)).save(path/c/f'{j}.png')
    return path
