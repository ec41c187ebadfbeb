"What is uploaded: the wheel and the sdist hold every file and pass the index's checks, the sdist's own tests pass in it, and all say the same version"
import importlib,os,re,shutil,subprocess,sys,tarfile,zipfile
from email.parser import Parser

import pytest

from test_repo import _files,root

version = importlib.import_module('fastai_discriminative').__version__

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The wheel and the sdist of this tree, built from a copy"
    src,out = tmp_path_factory.mktemp('src'),tmp_path_factory.mktemp('dist')
    for o in _files():
        (src/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/o, src/o)
    cmd = 'import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out), b.build_wheel(out)'
    res = subprocess.run([sys.executable, '-c', cmd, str(out)], cwd=src, capture_output=True, text=True)
    assert not res.returncode, res.stderr[-2000:]
    return next(out.glob('*.whl')),next(out.glob('*.tar.gz'))

@pytest.fixture(scope='module')
def unpacked(built, tmp_path_factory):
    "The sdist, unpacked: a folder that is no git checkout"
    path = tmp_path_factory.mktemp('sdist')
    with tarfile.open(built[1]) as t: t.extractall(path, filter='data')
    return next(path.iterdir())

pytestmark = pytest.mark.xdist_group('release')

def test_the_wheel_holds_every_file_of_the_package(built):
    held = set(zipfile.ZipFile(built[0]).namelist())
    miss = [o for o in _files('fastai_discriminative') if o not in held]
    assert not miss, f"not in the wheel: {miss}"

def test_the_sdist_holds_every_file(unpacked):
    "Its tests look at the notebooks, the tools and the benchmarks"
    miss = [o for o in _files() if not (unpacked/o).exists()]
    assert not miss, f"not in the sdist: {miss}"

def _run(*cmd, **kwargs):
    res = subprocess.run(cmd, capture_output=True, text=True, **kwargs)
    assert not res.returncode, res.stdout[-3000:]+res.stderr[-2000:]
    return res.stdout

def test_the_index_takes_both(built):
    pytest.importorskip('twine', reason='of the extra `dev`')
    said = _run(sys.executable, '-m', 'twine', 'check', '--strict', *map(str, built))
    assert len(re.findall('PASSED', said))==2, said

def test_the_wheel_holds_nothing_else(built):
    checker = shutil.which('check-wheel-contents', path=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]))
    if not checker: pytest.skip('needs check-wheel-contents, of the extra `dev`')
    assert 'OK' in _run(checker, str(built[0]))

def test_tests_pass_in_the_sdist(unpacked):
    "Those that look at files of the repository, and some that train"
    env = {**os.environ, 'PYTHONPATH':str(unpacked), 'GIT_CEILING_DIRECTORIES':str(unpacked.parent)}
    said = _run(sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-k', 'not import_is_light', 'tests/test_repo.py', 'tests/test_time_limit.py', cwd=unpacked, env=env)
    assert re.search(r'\d+ passed', said) and 'failed' not in said

def test_the_version_is_the_same_everywhere(built):
    cite = (root/'CITATION.cff').read_text(encoding='utf-8')
    meta = zipfile.ZipFile(built[0]).read(f'fastai_discriminative-{version}.dist-info/METADATA').decode()
    assert [re.search(r'^version: (.*)$', cite, re.M)[1], Parser().parsestr(meta)['Version']]==[version]*2

def test_the_workflow_runs_what_ci_runs():
    "So there is one list of checks"
    flow = (root/'.github/workflows/ci.yml').read_text(encoding='utf-8')
    assert re.findall(r'- run: (.*)', flow)==['bash .ci/run']
