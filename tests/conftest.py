"One thread, no network, no display, nothing that this user has cached, fixed seeds; and no test may change the environment or the working folder"
import os,random,tempfile
os.environ.update(MPLBACKEND='Agg', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
if 'PYTEST_XDIST_WORKER' not in os.environ: # xdist's workers inherit it
    _caches = tempfile.TemporaryDirectory(prefix='caches-')
    os.environ.update({o:os.path.join(_caches.name, o) for o in ('MPLCONFIGDIR','FASTAI_HOME','HF_HOME','TORCH_HOME')})

import matplotlib.pyplot as plt,numpy as np,pytest,torch
from PIL import Image
from fastai_discriminative.registry import _families,_find_name,list_families
from small_models import add_small_models

add_small_models()

def pytest_addoption(parser):
    parser.addoption('--zoo', action='store_true', help='prove every architecture, not only the smallest of each kind')
    parser.addoption('--zoo-sample', type=int, metavar='SEED', help='prove a random thirtieth of all architectures besides')
    parser.addoption('--cases', type=int, metavar='N', help='run at most N cases of each parametrised test, spread over all of them')
    parser.addoption('--kills', type=int, default=10, metavar='N', help='kill processes that write files so many times (default: 10)')

def _spread(n, total):
    "At most `n` of `total` places, the first and the last among them if `n` is 2 or more"
    return range(total) if n>=total else {round(i*(total-1)/max(1, n-1)) for i in range(n)}

def pytest_collection_modifyitems(config, items):
    "Leave out what `--cases` does"
    if not (n := config.getoption('--cases')): return
    tests = {}
    for o in items: tests.setdefault(o.nodeid.partition('[')[0], []).append(o)
    taken = {cases[i] for cases in tests.values() for i in _spread(n, len(cases))}
    config.hook.pytest_deselected(items=[o for o in items if o not in taken])
    items[:] = [o for o in items if o in taken]

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
def no_figures():
    "Each test starts without figures, whatever an earlier one drew: which of them share a process is chance"
    yield
    plt.close('all')

@pytest.fixture(autouse=True)
def no_leaks():
    "Fail a test that changes an environment variable, the working folder or autograd's state, and restore them"
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

@pytest.fixture
def own_families():
    "The test may register families, which are removed afterwards"
    list_families()
    was = dict(_families)
    yield
    _families.clear()
    _families.update(was)
    _find_name.cache_clear()

@pytest.fixture
def too_sure(monkeypatch):
    "Whatever a head says, half of it would be right"
    from fastai_discriminative import points
    from helpers import with_factor
    monkeypatch.setattr(points, '_tempered', with_factor(.5))

# ---- data

def _images(path, n, lo, hi):
    "`n` noisy images of 32 pixels in each of three classes, each brighter by `lo` than the one before"
    rng = np.random.default_rng(0)
    for i,c in enumerate(('ant','bee','cow')):
        (path/c).mkdir()
        for j in range(n): Image.fromarray(rng.integers(lo*i, hi+lo*i, (32,32,3), dtype=np.uint8)).save(path/c/f'{j}.png')
    return path

@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "30 images whose classes are hard to tell"
    return _images(tmp_path_factory.mktemp('images'), 10, 40, 120)

@pytest.fixture(scope='session')
def many(tmp_path_factory):
    "45 images whose classes are hard to tell"
    return _images(tmp_path_factory.mktemp('many'), 15, 40, 120)

@pytest.fixture(scope='session')
def bright(tmp_path_factory):
    "48 images whose classes are easy to tell"
    return _images(tmp_path_factory.mktemp('bright'), 16, 60, 90)

@pytest.fixture
def dls(folder):
    from fastai.vision.all import ImageDataLoaders
    return ImageDataLoaders.from_folder(folder, valid_pct=0.3, seed=1, bs=8, num_workers=0)

@pytest.fixture(scope='session')
def ckpt(tmp_path_factory):
    "A folder with a checkpoint of `resnet10t`, `w.pth`"
    import timm
    path = tmp_path_factory.mktemp('ckpt')
    torch.manual_seed(7)
    torch.save(timm.create_model('resnet10t').state_dict(), path/'w.pth')
    return path
