"""Run the tests of the core on the oldest versions that we support, in an environment that is made for them and kept

    python tools/test_versions.py                  # on the versions of tools/oldest.txt
    python tools/test_versions.py --cases 2        # the same with at most two cases of each test, as `.ci/run` does: a version breaks a call, not one value of many
    python tools/test_versions.py --save           # write to tools/versions.json, and to CONTRIBUTING's table, what ran
    python tools/test_versions.py --newest --save  # the same tests on what is installed

The first run takes about 3 GB of downloads and 6 GB of disk: on Linux, torch of that time comes with CUDA's libraries.
Exit status: 0 if all tests pass, 1 if one fails, 3 if the versions cannot be fetched here.
"""
import hashlib,json,os,re,subprocess,sys,tempfile
from datetime import date
from pathlib import Path
from xml.etree import ElementTree
from fastcore.script import call_parse

root = Path(__file__).parent.parent
oldest,record,page = root/'tools'/'oldest.txt',root/'tools'/'versions.json',root/'CONTRIBUTING.md'
# The rooms that everything else stands on; the tests of a room are in test_ROOM.py and test_ROOM_*.py
core = 'registry trace layers groups presets families names optimizer opt_state freeze weights learner phases strategies auto checks cli'.split()
packages = 'fastai fastcore timm torch torchvision numpy'.split()

def tests(): return [str(o.relative_to(root)) for r in core for o in (root/'tests'/f'test_{r}.py', *sorted((root/'tests').glob(f'test_{r}_*.py')))]

def _out(*cmd, **kwargs): return subprocess.run([*map(str, cmd)], check=True, stdout=subprocess.PIPE, text=True, **kwargs).stdout.strip()

# ---- the environment

def oldest_python(text):
    "The interpreter of the oldest version that pyproject.toml (`text`) allows, or this one where there is none"
    want = re.search(r'^requires-python = ">=([\d.]+)"', text, re.M)[1]
    for o in (f'python{want}', *sorted(Path.home().glob(f'.pyenv/versions/{want}.*/bin/python'))):
        try: return _out(o, '-c', 'import sys; print(sys.executable)', stderr=subprocess.DEVNULL)
        except (OSError,subprocess.CalledProcessError): pass # pyenv puts a `python3.10` there that says only that another version is chosen
    print(f"no Python {want} here: taking {sys.version.split()[0]}")
    return sys.executable

def build(venv):
    "Make `venv` with the oldest versions, unless it has them; its Python. Exits with 3 where they cannot be fetched"
    text = (root/'pyproject.toml').read_text(encoding='utf-8')
    python,extras = oldest_python(text),['.[demo]', 'pytest', 'pytest-xdist', 'setuptools>=77']
    asked = re.findall(r'^(?:requires-python|dependencies|demo) = .*$', text, re.M)
    lock = hashlib.sha256('\n'.join([*asked, *extras, oldest.read_text(encoding='utf-8'), _out(python, '-VV')]).encode()).hexdigest()
    made = venv/('Scripts' if os.name=='nt' else 'bin')/'python'
    def _pip(*args): # the environment is kept, so a second copy of 3 GB of packages in pip's cache serves nobody
        subprocess.run([str(made), '-m', 'pip', 'install', '-qq', '--no-cache-dir', *args], check=True, cwd=root, timeout=1200)
    if (venv/'lock').exists() and (venv/'lock').read_text()==lock: _pip('--no-deps', '--no-build-isolation', '-e', '.')
    else:
        subprocess.run([python, '-m', 'venv', '--clear', str(venv)], check=True)
        try:
            _pip('-U', 'pip') # that of an old Python fetches whole packages to read what they need
            _pip('--no-compile', '-r', str(oldest))
        except subprocess.SubprocessError as e:
            print(f"The oldest versions cannot be fetched here, so nothing was tested: {e}")
            sys.exit(3)
        _pip('--no-compile', '-c', str(oldest), '-e', *extras) # a fault in here is ours
        (venv/'lock').write_text(lock)
    return made

# ---- what ran

def run(python, cases=0):
    "Run the tests of the core with `python`, at most `cases` of each if any: what it ran on, and how many passed; `None` if one failed"
    code = "import json,platform,sys; from importlib.metadata import version; print(json.dumps({'python':platform.python_version(), **{o:version(o) for o in sys.argv[1:]}}))"
    res = json.loads(_out(python, '-c', code, *packages))
    print(', '.join(f'{k} {v}' for k,v in res.items()), flush=True)
    env = {**os.environ, 'PATH':os.pathsep.join([str(Path(python).parent), os.environ['PATH']])}
    with tempfile.TemporaryDirectory() as d:
        xml = Path(d)/'tests.xml'
        rc = subprocess.run([str(python), '-m', 'pytest', f'--junitxml={xml}', f'--cases={cases}', *tests()], cwd=root, env=env, stdin=subprocess.DEVNULL).returncode
        if rc: return None
        suite = ElementTree.parse(xml).getroot().find('testsuite').attrib
    skipped = int(suite['skipped'])
    return dict(date=str(date.today()), **{k:v.partition('+')[0] for k,v in res.items()}, passed=int(suite['tests'])-skipped, skipped=skipped)

def table(ran):
    "Lines of CONTRIBUTING's table, from what `record` holds"
    titles = dict(python='Python', numpy='NumPy', passed='tests of the core that passed', skipped='skipped, each with its reason', date='run on')
    cols = [c for c in ('oldest','newest') if c in ran]
    rows = [[titles.get(k, k), *(str(ran[c][k]) for c in cols)] for k in ('python', *packages, 'passed', 'skipped', 'date')]
    return [f"| {' | '.join(o)} |" for o in (['',*cols], ['---']*(len(cols)+1), *rows)]

def in_page(text, ran):
    "`text` of CONTRIBUTING with the table of what `ran`"
    return re.sub(r'(?<=\n)\|  \| oldest .*?(?=\n\n)', lambda m: '\n'.join(table(ran)), text, flags=re.S)

def _record(): return json.loads(record.read_text(encoding='utf-8')) if record.exists() else {}

def _write(ran):
    record.write_text(json.dumps(ran, indent=1)+'\n', encoding='utf-8')
    page.write_text(in_page(page.read_text(encoding='utf-8'), ran), encoding='utf-8')

@call_parse
def main(
    newest:bool=False, # On what is installed, instead of the oldest versions?
    save:bool=False, # Write what ran to tools/versions.json and CONTRIBUTING.md, if all tests pass?
    cases:int=0, # At most so many cases of each test; 0 for all
    venv:str='.venv-oldest', # Where the environment of the oldest versions is kept
):
    "Run the tests of the core on the oldest versions, and fail if one of them does"
    if save and cases: sys.exit("`--save` writes how many tests passed, and `--cases` leaves some out. Use one of them.")
    which,ran = 'newest' if newest else 'oldest',_record()
    res = run(sys.executable if newest else build((root/venv).absolute()), cases)
    if not res: sys.exit(1)
    other = [f'{k} {ran[which][k]}' for k in ('python',*packages) if which in ran and ran[which][k]!=res[k]]
    if save: _write({**ran, which:res})
    elif other: print(f"CONTRIBUTING.md tells of {', '.join(other)}: `--save` writes what ran now")
