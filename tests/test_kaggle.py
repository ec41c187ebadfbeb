"The Kaggle notebooks run as on Kaggle: the same folders, only `/kaggle/working` writable, no network, the package from a wheel"
import json,os,shutil,subprocess,sys,sysconfig
from pathlib import Path

import pandas as pd,pytest
from fastai_discriminative.demo import clipart_path,lite0_weights

root = Path(__file__).parent.parent
kaggle = Path('/kaggle')

def _apart(cmd, **kwargs):
    "Run shell lines in separate namespaces, with other mounts and no network"
    return subprocess.run(['unshare','-mn','bash','-ec',cmd], capture_output=True, text=True, timeout=900, **kwargs)

def _why_not():
    if not (root/'nbs'/'kaggle').is_dir(): return 'the notebooks are not here'
    if not shutil.which('unshare') or os.geteuid(): return 'needs `unshare`, and root, for namespaces of its own'
    if kaggle.exists() and any(kaggle.rglob('*.*')): return 'this is Kaggle, or something else has a folder /kaggle'
    return '' if _apart('mount -t tmpfs tmpfs /mnt').returncode==0 else 'no namespaces here'

pytestmark = [pytest.mark.skipif(bool(_why_not()), reason=_why_not()), pytest.mark.xdist_group('kaggle')]

def _data(path):
    "A competition's images: three classes of drawings, and nine images to predict"
    for kind in ('flags','food','plants'):
        for i,f in enumerate(sorted((clipart_path()/kind).iterdir())[:19]):
            dst = path/'test' if i>=16 else path/'train'/kind
            dst.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, dst/f'{kind}{i}{f.suffix}')
    ids = sorted(o.name for o in (path/'test').iterdir())
    pd.DataFrame(dict(id=ids[::-1], label='flags')).to_csv(path/'sample_submission.csv', index=False)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Inputs as data sets, and a Python with the packages of Kaggle's image, but without this package"
    p = tmp_path_factory.mktemp('kaggle')
    src,inp = p/'src',p/'input'
    shutil.copytree(root, src, ignore=shutil.ignore_patterns('.*','_*','build','benchmarks','models'))
    shutil.copytree(root/'fastai_discriminative', src/'fastai_discriminative', dirs_exist_ok=True)
    wheel = [sys.executable,'-m','pip','wheel','-q','--no-deps','--no-build-isolation','--no-index','-w',inp/'fastai-discriminative-wheel','.']
    subprocess.run(list(map(str, wheel)), cwd=src, check=True, capture_output=True)
    (inp/'tf-efficientnet-lite0-weights').mkdir()
    shutil.copy(lite0_weights(), inp/'tf-efficientnet-lite0-weights')
    _data(inp/'drawings')
    subprocess.run([sys.executable,'-m','venv',p/'venv'], check=True)
    site = next((p/'venv').glob('lib/*/site-packages'))
    for o in Path(sysconfig.get_paths()['purelib']).iterdir():
        if 'fastai_discriminative' not in o.name and not (site/o.name).exists(): (site/o.name).symlink_to(o)
    made = not kaggle.exists()
    kaggle.mkdir(exist_ok=True)
    yield p
    if made: kaggle.rmdir()

@pytest.mark.parametrize('name,made', [('submit',['learner.pkl']), ('folds',['comparison.json','learner-fold0.pkl','learner-fold1.pkl','oof.csv'])])
def test_notebook(name, made, place):
    work,nb = place/name,root/'nbs'/'kaggle'/name
    work.mkdir()
    meta = json.loads((nb/'kernel-metadata.json').read_text())
    shutil.copy(nb/meta['code_file'], work/'nb.ipynb')
    run = "from fastcore.nbio import read_nb; from execnb.shell import CaptureShell; s = CaptureShell(path='.'); s.run_all(read_nb('nb.ipynb'), exc_stop=True); import fastai_discriminative; print(fastai_discriminative.__file__)"
    cmd = f'mount -t tmpfs tmpfs /kaggle; mkdir /kaggle/input /kaggle/working; mount --bind {place}/input /kaggle/input; mount -o remount,bind,ro /kaggle/input; mount --bind {work} /kaggle/working; ' \
        f'cd /kaggle/working; . {place}/venv/bin/activate; python -c "{run}"'
    r = _apart(cmd, env={**{k:v for k,v in os.environ.items() if not k.startswith('PYTHON')}, 'HF_HUB_OFFLINE':'1', 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'Agg', 'KAGGLE_KERNEL_RUN_TYPE':'Interactive'})
    assert r.returncode==0, (r.stdout+r.stderr)[-3000:]
    assert str(place/'venv') in r.stdout, 'the package came from the wheel'
    sub,sample = pd.read_csv(work/'submission.csv'),pd.read_csv(place/'input'/'drawings'/'sample_submission.csv')
    assert list(sub.columns)==['id','label'] and list(sub.id)==list(sample.id) and set(sub.label)<={'flags','food','plants'}
    assert {o.name for o in work.iterdir()}>={*made,'submission.csv'}
    assert meta['enable_internet']=='false' and any('wheel' in o for o in meta['dataset_sources'])
