"Files after a kill: checkpoints are complete, and feature files without an owner are removed at the next use of the folder. `pytest tests/test_files.py --kills 40` kills more often"
import errno,json,os,stat,subprocess,sys
from pathlib import Path

import pytest,torch
from fastai.vision.all import CrossEntropyLossFlat,Learner,SaveModelCallback

from fastai_discriminative import files
from fastai_discriminative.all import *
from fastai_discriminative.files import OwnedFolder,sweep_folders,written_aside
from helpers import *

posix = pytest.mark.skipif(files.fcntl is None, reason='Windows has no `fcntl`: nothing is locked or swept there')

def _script(code, *args):
    "The output of one of our scripts, as JSON"
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(Path(files.__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)
    assert not r.returncode, r.stderr[-3000:]
    return json.loads(r.stdout.strip().splitlines()[-1])

def _left(path): return sorted(o.name for o in Path(path).iterdir() if o.name.startswith(files._prefix))

# ---- checkpoints

_saves = """
import json,os,random,signal,sys,time,warnings
warnings.simplefilter('ignore')
import torch
from torch import nn
from fastai.vision.all import *
from fastai_discriminative.all import *
torch.set_num_threads(1)
kind,path,n,images,rng = sys.argv[1],Path(sys.argv[2]),int(sys.argv[3]),sys.argv[4],random.Random(0)
dls = ImageDataLoaders.from_folder(images, valid_pct=.3, seed=1, bs=8, num_workers=0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3072,600), nn.ReLU(), nn.Linear(600,3))
learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=path, model_dir='.')
if kind!='stock': learn.split()
learn.create_opt()
name = 'l.pkl' if kind=='export' else 'l.pth'
def save(v):
    for p in model.parameters(): p.data.fill_(v)
    if kind=='export': learn.export(name)
    else: learn.save('l')
save(0)
start = time.time()
save(0)
took = time.time()-start
def whole():
    try: o = torch.load(path/name, weights_only=False)
    except Exception: return False
    ps = list(o.model.parameters()) if kind=='export' else [v for k,v in o['model'].items()]
    return all(bool((p==ps[0].flatten()[0]).all()) for p in ps)
res,left = [],[]
for i in range(n):
    r,w = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(w, b'1')
        for v in range(1000): save(v)
    os.read(r, 1)
    time.sleep(rng.uniform(0, 3*took))
    there = set(path.iterdir())
    end = time.time()+20*(i%2) # every other kill waits for a file that is being written: on a busy machine, chance alone may meet none
    while time.time()<end and set(path.iterdir())<=there: pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    res.append(whole())
    left.append(len(list(path.iterdir()))-1)
save(1)
print(json.dumps([res, left, sorted(o.name for o in path.iterdir())]))
"""

@posix
@pytest.mark.parametrize('kind', ['save','export'])
def test_a_kill_leaves_a_whole_file(kind, folder, tmp_path, request):
    n = request.config.getoption('--kills')
    whole,left,after = _script(_saves, kind, tmp_path, n, folder)
    assert len(whole)==n and all(whole), f"{n-sum(whole)} of {n} files are halves"
    assert any(left), "no kill met a file that was being written"
    assert after==['l.pkl' if kind=='export' else 'l.pth']

def _net(dls, path, split=True):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072,4), torch.nn.ReLU(), torch.nn.Linear(4,3))
    learn = quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=path, model_dir='models'))
    return learn.split() if split else learn

def test_saved_as_fastai_saves(dls, tmp_path):
    "The same name, the same bytes, through links, for SaveModelCallback too; nothing else in the folder"
    learn = _net(dls, tmp_path)
    learn.create_opt()
    stock = Learner.save._stock(learn, 'stock')
    assert learn.save('a.b')==tmp_path/'models'/'a.b.pth' and stock.name=='stock.pth'
    (tmp_path/'c').mkdir()
    (tmp_path/'c'/'real.pth').touch()
    os.chmod(tmp_path/'c'/'real.pth', 0o640)
    (tmp_path/'models'/'link.pth').symlink_to(tmp_path/'c'/'real.pth')
    learn.save('link', with_opt=False)
    assert (tmp_path/'models'/'link.pth').is_symlink() and stat.S_IMODE((tmp_path/'c'/'real.pth').stat().st_mode)==0o640
    assert learn.save(str(tmp_path/'elsewhere'))==tmp_path/'elsewhere.pth'
    learn.fit_one_cycle(2, 1e-2, cbs=SaveModelCallback(fname='best', with_opt=True))
    assert sorted(o.name for o in (tmp_path/'models').iterdir())==['a.b.pth','best.pth','link.pth','stock.pth']
    assert same(*[torch.load(o, weights_only=False)['model'] for o in (stock, tmp_path/'models'/'a.b.pth')])
    learn.load('a.b')
    with open(tmp_path/'f.pth', 'wb') as f: learn.save(f)
    assert torch.load(tmp_path/'f.pth', weights_only=False)['model'].keys()==learn.model.state_dict().keys()

def test_a_learner_that_was_never_split_saves_as_ever(dls, tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'OwnedFolder', None)
    learn = _net(dls, tmp_path, split=False)
    assert learn.save('a')==tmp_path/'models'/'a.pth'
    learn.export()

def test_a_full_disk_leaves_the_old_file_and_the_learner(dls, tmp_path, monkeypatch):
    learn = _net(dls, tmp_path)
    learn.fit_one_cycle(1, 1e-2)
    was,opt,dls = learn.save('a').read_bytes(),learn.opt,learn.dls
    learn.export()
    pkl = (tmp_path/'export.pkl').read_bytes()
    def _full(o, f, *args, **kwargs):
        Path(f).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    opt = learn.opt
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', _full)
        with pytest.raises(OSError): learn.save('a')
        with pytest.raises(OSError): learn.export()
    assert (tmp_path/'models'/'a.pth').read_bytes()==was and (tmp_path/'export.pkl').read_bytes()==pkl
    assert sorted(o.name for o in tmp_path.iterdir())==['export.pkl','models'] and [o.name for o in (tmp_path/'models').iterdir()]==['a.pth']
    assert learn.opt is opt and learn.dls is dls
    learn.fit_one_cycle(1, 1e-2)

@posix
def test_written_straight_where_nothing_can_be_moved(tmp_path):
    with written_aside('/dev/null') as tmp: assert tmp==Path('/dev/null')
    with pytest.raises(FileNotFoundError, match='no/where.txt'), written_aside(tmp_path/'no'/'where.txt') as tmp: tmp.write_text('a')
    (tmp_path/'old.txt').write_text('old')
    (tmp_path/'loop').symlink_to(tmp_path/'loop')
    with pytest.raises(OSError), written_aside(tmp_path/'loop') as tmp: tmp.write_text('a')
    assert (tmp_path/'loop').is_symlink()

# ---- folders with an owner

_owners = """
import gc,json,os,signal,sys,warnings
warnings.simplefilter('ignore')
import torch
from fastai.vision.all import *
from fastai_discriminative.all import *
from fastai_discriminative.files import _prefix
torch.set_num_threads(1)
images,folder,back = Path(sys.argv[1]),Path(sys.argv[2]),[]
def fit(end):
    dls = ImageDataLoaders.from_folder(images, valid_pct=.3, seed=1, bs=8, num_workers=0)
    learn = discriminative_learner(dls, 'resnet10t', pretrained=False)
    learn.freeze()
    class Ends(Callback):
        order = 99
        def after_batch(self): end()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3, cbs=[CachedFeatures(ram_gb=0, folder=folder), Ends()])
def files():
    gc.collect()
    return {o.parent.parent.name for o in folder.rglob('*.bin')}
def forked(sig=None):
    "A process that trains on features in files, and is killed or waits; its number"
    (r,w),pid = os.pipe(),os.fork()
    def _end():
        os.write(w, b'1')
        if sig: os.kill(os.getpid(), sig)
        signal.pause()
    if not pid: fit(_end)
    os.read(r, 1)
    if sig: os.waitpid(pid, 0)
    return pid
dead = set()
for s in (signal.SIGKILL, signal.SIGTERM):
    forked(s)
    dead |= files()
alive = forked()
living = files()
fit(noop)
after = files()
os.kill(alive, signal.SIGKILL)
os.waitpid(alive, 0)
fit(noop)
gc.collect()
print(json.dumps([len(dead), len(living), living==after, [o.name for o in folder.iterdir()]]))
"""

@posix
def test_features_of_killed_processes_go_and_those_of_living_ones_stay(folder, tmp_path):
    dead,living,kept,left = _script(_owners, folder, tmp_path)
    assert (dead,living)==(2,1) and kept and left==[]

@posix
def test_only_what_nobody_holds_is_swept(tmp_path, monkeypatch):
    mine,gone = OwnedFolder(tmp_path),OwnedFolder(tmp_path)
    (tmp_path/'.fastai_discriminative-another_machine-x').mkdir()
    (tmp_path/'.fastai_discriminative-another_machine-x'/'lock').touch()
    no_lock,empty = (tmp_path/f'{files._prefix}{o}' for o in ('no_lock','empty'))
    for o in (no_lock, empty): o.mkdir()
    (no_lock/'features.bin').touch()
    (dead := tmp_path/f'{files._prefix}dead').mkdir()
    for o in ('lock','features.bin'): (dead/o).touch()
    gone.remove()
    sweep_folders(tmp_path)
    assert {o.name for o in tmp_path.iterdir()}=={mine.path.name,'.fastai_discriminative-another_machine-x',no_lock.name}
    path = mine.path
    del mine
    assert not path.exists()

@posix
def test_a_forked_process_is_not_the_owner(tmp_path):
    mine = OwnedFolder(tmp_path)
    pid = os.fork()
    if not pid:
        mine.remove()
        os._exit(0)
    os.waitpid(pid, 0)
    sweep_folders(tmp_path)
    assert mine.path.exists()

@posix
@pytest.mark.parametrize('error', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_swept(tmp_path, monkeypatch, error):
    def _none(*args): raise OSError(error, os.strerror(error))
    with monkeypatch.context() as m:
        m.setattr(files.fcntl, 'flock', _none)
        mine = OwnedFolder(tmp_path)
        (mine.path/'a').touch()
        sweep_folders(tmp_path)
    sweep_folders(tmp_path)
    assert mine.path.exists()
    mine.remove()
    assert not list(tmp_path.iterdir())

@posix
@pytest.mark.parametrize('mod,name', [(files.os,'open'),(files.fcntl,'flock')])
def test_swept_away_before_it_was_locked(tmp_path, monkeypatch, mod, name):
    "Another process removes the new folder before it is locked: a second one is created"
    call,n = getattr(mod, name),[]
    def _late(*args):
        if not n:
            n.append(1)
            sweep_folders(tmp_path)
            assert not list(tmp_path.iterdir())
        return call(*args)
    monkeypatch.setattr(mod, name, _late)
    mine = OwnedFolder(tmp_path)
    assert [o.name for o in tmp_path.iterdir()]==[mine.path.name] and (mine.path/'lock').exists()
