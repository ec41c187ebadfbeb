"Pages that teach: a reader who copies the visible cells of a page in order can run them"
import ast,builtins,importlib,json,re,symtable
from functools import cache
from pathlib import Path

import pytest
from nbdev.doclinks import NbdevLookup

nbs = Path(__file__).parent.parent/'nbs'
pages = [*sorted((nbs/'tutorials').glob('*.ipynb')), nbs/'gallery.ipynb']
rooms = [nbs/f'{o}.ipynb' for o in ('07d_rates','08a_auto','09_lr_finder')] # a room's imports are hidden, as they are those of every page: fastai, this package, and the room's own names
given = {*dir(builtins), 'display', 'get_ipython'} # what a notebook has before its first cell
# Page -> names that a visible cell uses and only hidden cells define, each with its reason
hidden_ok = dict(
    groups_and_families=dict(draw='draws the strips of a picture, and shows nothing to copy', error_of='prints an error that is expected', pytest='stands for `!pytest`, without what differs from run to run'))

_hidden = re.compile(r'^#\|\s*(hide\b|echo: *false|include: *false|hide_input|default_exp)', re.M)
_exported = re.compile(r'^#\|\s*export', re.M)
_magic = re.compile(r'^\s*[%!].*$', re.M)

@cache
def _names_of(module):
    "What `from module import *` brings"
    m = importlib.import_module(module)
    return frozenset(getattr(m, '__all__', None) or (o for o in vars(m) if not o.startswith('_')))

# what the hidden imports of a room bring; read here, since no test may change the environment, and these imports do
brought = frozenset().union(*map(_names_of, ('fastai.vision.all','fastai_discriminative.all','fastai_discriminative.demo','fastcore.test')))

def _used(table):
    "Global names that the code of `table`, or of a function in it, reads"
    top = table.get_type()=='module'
    yield from (s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global()))
    for c in table.get_children(): yield from _used(c)

def _bound(table, src):
    "Names that the code of a cell binds"
    own = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    stars = [n.module for n in ast.walk(ast.parse(src)) if isinstance(n, ast.ImportFrom) and n.names[0].name=='*']
    return own.union(*map(_names_of, stars))

def hidden_names(
    cells, # Source of each code cell of a page
    known=(), # Names that its reader has
): # Names that visible cells use, and that no visible cell has bound by then, or a hidden cell has bound again since
    seen,lost = {*given, *known},set()
    for src in cells:
        hidden,src = bool(_hidden.search(src)),'' if src.lstrip().startswith('%%') else _magic.sub('', src)
        if _exported.search(src): continue # its names are the room's own
        table = symtable.symtable(src, 'cell', 'exec')
        bound = _bound(table, src)
        if hidden:
            again = {s.get_name() for s in table.get_symbols() if s.is_assigned() and not s.is_imported()}
            seen -= again-given
        else:
            lost |= {*_used(table)}-seen-bound
            seen |= bound
    return lost

def _cells(nb): return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

@pytest.mark.parametrize('nb', pages+rooms, ids=lambda o: o.stem)
def test_visible_cells_need_no_hidden_ones(nb):
    cells,known = _cells(nb),set()
    if nb in rooms:
        own = re.search(r'default_exp (\w+)', cells[0])[1]
        known = brought|{*vars(importlib.import_module(f'fastai_discriminative.{own}'))}
    lost = hidden_names(cells, known)-{*hidden_ok.get(nb.stem, {})}
    assert not lost, f"visible cells of {nb.name} use names that a reader does not see: {', '.join(sorted(lost))}. Make their cells visible, or import them in a visible one."

@pytest.mark.parametrize('cells,lost', [
    (['#| hide\ndef f(): return 1', 'f()'], {'f'}),                               # a helper
    (['#| hide\nfrom math import *', 'x = sqrt(2)'], {'sqrt'}),                   # an import
    (['s = "from math import *"', 'sqrt(2)'], {'sqrt'}),                         # an import in a text
    (['x = 1', '#| hide\nx = 2', 'x+1'], {'x'}),                                  # another value than the reader has
    (['def g(): return h()', '#| echo: false\nh = len\ng()'], {'h'}),             # used in a function
    (['from math import *\nx = sqrt(2)', '#| hide\nassert x>1', '[x+i for i in range(3)]'], set()),
    (['%pip install x\nimport json', '#| fig-alt: a line\njson.dumps(1)'], set()),
])
def test_hidden_names(cells, lost): assert hidden_names(cells)==lost

def test_no_link_around_a_link():
    "nbdev makes a link of a name in backticks; inside another link, the page shows the brackets instead"
    lookup = NbdevLookup('fastai_discriminative')
    texts = [(p.name, m[0]) for p in nbs.rglob('*.ipynb') if not any(o.startswith(('.','_')) for o in p.relative_to(nbs).parts)
        for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown' for m in re.finditer(r'\[[^][]*\]\([^()]*\)', ''.join(c['source']))]
    assert len(texts)>100
    assert lookup.link_line('[`StepMeter`](recorder.html)').startswith('[[')
    assert not [o for o in texts if lookup.link_line(o[1])!=o[1]]
