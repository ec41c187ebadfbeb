"`help` explains every parameter of every public name, a page of the website does so once, and the file that it comes from is fresh"
import ast,importlib,inspect,pydoc,subprocess,sys,time

import pytest
from fastcore.docments import docments,qual_name
from fastai.vision.all import Learner

from fastai_discriminative.all import *
from fastai_discriminative.explain import explain_rooms
from test_repo import _public,mods,root

# The functions behind the commands, which `--help` explains
of_the_command = {'cli','jobs','run_folder','run_progress'}
rooms = [o for o in mods if o not in of_the_command]

@pytest.fixture
def tools(monkeypatch): monkeypatch.syspath_prepend(root/'tools')

def _bare(obj): return getattr(obj, 'fget', None) or getattr(obj, 'func', None) or getattr(obj, '__func__', None) or obj

def test_the_file_is_fresh(tools):
    made = importlib.import_module('make_help').help_json()
    assert made==(root/'fastai_discriminative/data/help.json').read_text(encoding='utf-8'), 'data/help.json is stale: run `python tools/make_help.py`'

@pytest.mark.parametrize('room', rooms)
def test_every_docment_is_in_the_help(room):
    "What fastcore reads from the source, which the tool reads in its own way, stands in the docstring"
    miss = []
    for qual,node,obj,_ in _public(room):
        said,own = inspect.getdoc(getattr(obj, '__func__', obj)) or '',{o.arg for o in ast.walk(node) if isinstance(o, ast.arg)} # others are delegated
        docs = {k:v for k,v in docments(inspect.unwrap(_bare(obj)), returns=True).items() if v and (k in own or k=='return' or isinstance(node, ast.ClassDef))}
        miss += [f'{qual}({k})' for k,v in docs.items() if f'    {v}' not in said]
    assert not miss, f"not in `help`: {miss}"

@pytest.mark.parametrize('f,says', [(discriminative_learner, {'arch':'timm architecture', 'n_groups : int | str | None':"Number of groups including the head's", '**kwargs':'Further arguments of `vision_learner`',
    'Learner':'In layer groups'}), (Learner.fit_strategy, {'cbs':'Callbacks', 'start_epoch : int':'Start with this epoch'}), (Phase, {'n_epoch : int':'Number of epochs, at least 1'}), (TimeLimit.__init__, {'minutes':'Time limit in minutes'})])
def test_help(f, says):
    lines = [o.strip(' |') for o in pydoc.plain(pydoc.render_doc(f)).splitlines()]
    for k,v in says.items():
        at = [i for i,o in enumerate(lines) if o.startswith(k)]
        assert any(lines[i+1].startswith(v) for i in at), k

@pytest.mark.parametrize('name,more', [('fit_one_cycle', "`lr_max` may also be 'preset'"), ('freeze_to', 'name of a group'), ('fine_tune', '`base_lr` may also be'), ('load', 'completely or not at all')])
def test_help_of_fastais_methods(name, more):
    said = getattr(Learner, name).__doc__
    assert said.startswith(getattr(Learner, name)._stock.__doc__+'\n\n') and more in said

def test_a_room_of_its_own_explains_itself():
    code = 'import fastai_discriminative.predict as p; print(p.predict_images.__doc__)'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert '\ntta' in res.stdout, res.stderr[-1000:]

def test_again_changes_nothing_and_costs_little():
    was,took = Learner.split.__doc__,[]
    for _ in range(5):
        start = time.perf_counter()
        explain_rooms()
        took.append(time.perf_counter()-start)
    assert Learner.split.__doc__==was and min(took)<.05

def test_a_page_says_it_once(tools):
    "nbdev shows docments in the signature; sections of the docstring below would be the second time"
    # The oldest versions are tested without the extra `dev`: nbdev needs a newer fastcore than they do
    pytest.importorskip('smalldocs', reason='smalldocs is not installed: it builds the website, and comes with the extra `dev`')
    no_sections,show = importlib.import_module('show_names').no_sections,importlib.import_module('fastcore.docments').MarkdownRenderer
    n = 0
    for obj in (_bare(o) for r in rooms for _,_,o,_ in _public(r)):
        try: md = show(obj)._repr_markdown_()
        except AttributeError: continue
        plain = no_sections(md)
        n += plain!=md
        assert '\n---' not in plain and md.startswith(plain.rstrip().removesuffix('*')[:200]), qual_name(obj)
    assert n>50
