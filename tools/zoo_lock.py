"""A hash of everything that the zoo's proof depends on: the code that decides groups, and the versions of the checked models

    python tools/zoo_lock.py     # exit status 0 if `tools/zoo.lock` is of this code and these versions

`tools/make_zoo.py` writes the lock when it has proved the whole zoo. `.ci/run` proves the whole zoo again while the lock differs.
"""
import ast,hashlib,sys
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).parent.parent
lock = root/'tools'/'zoo.lock'
# The way from a name to a model (weights and builder make and cut it) and to its groups, and the checks. The other rooms train and report: their own tests prove them
rooms = 'core registry trace backbone paths layers groups rules presets families weights builder checks coverage'.split()
packages = 'timm torch torchvision fastai'.split()

class _Code(ast.NodeTransformer):
    "Drops docstrings, so that words can be mended without a new proof; comments and blank lines are not in the tree"
    def generic_visit(self, o):
        super().generic_visit(o)
        doc = isinstance(o, (ast.Module,ast.ClassDef,ast.FunctionDef,ast.AsyncFunctionDef)) and ast.get_docstring(o) is not None
        if doc: o.body = o.body[1:] or ([] if isinstance(o, ast.Module) else [ast.Pass()])
        return o

def code(src): return ast.unparse(_Code().visit(ast.parse(src)))

def zoo_hash(pkg=root/'fastai_discriminative'):
    "Hash of the rooms' code and of the tables that the checks read"
    h = hashlib.sha256()
    for o in rooms: h.update(f'{o}\n{code((pkg/f"{o}.py").read_text(encoding="utf-8"))}\n'.encode())
    for o in ('exceptions.csv','recipes.csv'): h.update((pkg/'data'/o).read_bytes())
    return h.hexdigest()

def versions(): return ', '.join(f"{o} {version(o).partition('+')[0]}" for o in packages)
def read_lock(): return dict(l.split(': ', 1) for l in lock.read_text(encoding='utf-8').splitlines()) if lock.exists() else {}
def write_lock(): lock.write_text(f'code: {zoo_hash()}\nversions: {versions()}\n', encoding='utf-8')

if __name__=='__main__':
    was,now = read_lock(),dict(code=zoo_hash(), versions=versions())
    stale = [k for k in now if was.get(k)!=now[k]]
    print(f"the zoo was proved with other {' and '.join(stale)}" if stale else 'the zoo was proved with this code and these versions')
    sys.exit(bool(stale))
