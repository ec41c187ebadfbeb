"The imports that a page's visible cells need: those of its hidden cells, and of names that `fastai_discriminative.all` does not have"
import ast,builtins,re
from importlib import import_module
from fastcore.utils import *
from fastcore.nbio import mk_cell,read_nb,write_nb

_stars = ('fastai.vision.all','fastai_discriminative.all')
_re_hidden = re.compile(r'^#\|\s*(?:hide|exporti?|exports|default_exp|echo:\s*false)\b', re.M)
_re_export = re.compile(r'^#\|\s*default_exp\s+(\w+)', re.M)
_re_magic = re.compile(r'^\s*[%!].*$', re.M)

def star_names(mod):
    "What `from mod import *` gives"
    m = import_module(mod)
    return set(getattr(m, '__all__', [k for k in vars(m) if k[0]!='_']))

def _given(o):
    "Names that the import `o` gives"
    star = isinstance(o, ast.ImportFrom) and o.names[0].name=='*'
    return star_names(o.module) if star else {(a.asname or a.name).split('.')[0] for a in o.names}

def _bound(o):
    "Names that the node `o` itself binds"
    if isinstance(o, (ast.Import,ast.ImportFrom)): return _given(o)
    if isinstance(o, ast.Name): return set() if isinstance(o.ctx, ast.Load) else {o.id}
    return {getattr(o, 'name', None) or getattr(o, 'arg', None)} if isinstance(o, (ast.FunctionDef,ast.ClassDef,ast.arg,ast.ExceptHandler)) else set()

def needs(
    trees, # Parsed cells
) -> set: # Names that they use and do not bind
    "What must come from elsewhere"
    nodes = [n for t in trees for n in ast.walk(t)]
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}-set().union(*map(_bound, nodes))-set(dir(builtins))

def _line(o, names):
    "The import `o`, of `names` only"
    if isinstance(o, ast.Import): return 'import '+','.join(a.name+(f' as {a.asname}' if a.asname else '') for a in o.names if (a.asname or a.name).split('.')[0] in names)
    return f'from {o.module} import '+','.join(sorted(names))

def page_imports(
    nb, # A notebook
) -> list: # Lines of Python
    "What to type so that the visible cells of `nb` run, and so that all names it documents are there"
    code = [c.source for c in nb.cells if c.cell_type=='code']
    trees = [(bool(_re_hidden.search(s)), ast.parse(_re_magic.sub('', s))) for s in code if not s.startswith('%%')]
    seen,hidden = [t for h,t in trees if not h],[o for h,t in trees if h for o in t.body if isinstance(o, (ast.Import,ast.ImportFrom))]
    left,res = needs(seen),[]
    room = next((m[1] for s in code if (m := _re_export.search(s))), None)
    for m in _stars:
        if left & star_names(m) or room: res.append(f'from {m} import *')
        left -= star_names(m)
    for o in hidden:
        if isinstance(o, ast.ImportFrom) and (o.module or '').startswith('nbdev'): continue
        if names := {n for n in _given(o) & left if n[0]!='_'}: res.append(_line(o, names))
        left -= _given(o)
    if room and (own := star_names(f'fastai_discriminative.{room}')-star_names(_stars[1])): res.append(f'from fastai_discriminative.{room} import '+(','.join(sorted(own)) if len(own)<7 else '*'))
    return res

def show_imports(
    cache:Path, # The `_proc` folder, whose pages lack hidden cells
    nbs:Path, # Folder of the notebooks
): # Nothing; the pages in `cache` change
    "Put the imports of each page before its first code"
    for p in cache.rglob('*.ipynb'):
        lines,nb = page_imports(read_nb(nbs/p.relative_to(cache))),read_nb(p)
        at = next((i for i,c in enumerate(nb.cells) if c.cell_type=='code' and c.get('source')), None)
        if not lines or at is None: continue
        nb.cells.insert(at, mk_cell('The code on this page needs these imports:\n\n```python\n'+'\n'.join(lines)+'\n```', 'markdown'))
        write_nb(nb, p)
