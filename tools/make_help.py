"""What `help()` says of parameters: `data/help.json`, made from the docments in the modules, as Python drops comments

    python tools/make_help.py     # after `nbdev-export`; `tools/build_docs.py` runs it too
"""
import ast,io,json,re,tokenize
from itertools import chain
from pathlib import Path

pkg = Path(__file__).parent.parent/'fastai_discriminative'
help_file = pkg/'data'/'help.json'
rooms = [o for o in sorted(pkg.glob('*.py')) if not o.stem.startswith('_') and o.stem!='all']

def comments(src):
    "Line number -> text of the comment that ends this line"
    toks = tokenize.generate_tokens(io.StringIO(src).readline)
    return {o.start[0]:o.string.lstrip('#').strip() for o in toks if o.type==tokenize.COMMENT}

def _type(o): return f' : {ast.unparse(o)}' if o else ''

def params(node, says):
    "`(heading, docment)` of each parameter or field of `node` that has one, and of what it returns"
    if isinstance(node, ast.ClassDef): ps = [(o.target.id, o.target.id, o) for o in node.body if isinstance(o, ast.AnnAssign)]
    else:
        a = node.args
        ps = [(o.arg, o.arg, o) for o in chain(a.posonlyargs, a.args, a.kwonlyargs)]
        ps += [(o.arg, star+o.arg, o) for star,o in (('*',a.vararg), ('**',a.kwarg)) if o]
    last = {o.lineno:k for k,_,o in ps} # a comment is about the last one of its line
    ret = getattr(node, 'returns', None)
    if ret: last[ret.lineno] = 'return'
    found = [(name+_type(o.annotation), says[o.lineno]) for k,name,o in ps if last[o.lineno]==k and o.lineno in says]
    return found, [(ast.unparse(ret), says[ret.lineno])] if ret and ret.lineno in says else []

def _section(title, found): return ['', title, '-'*len(title), *chain.from_iterable((h, f'    {s}') for h,s in found)] if found else []

def docstring(node, says):
    "The docstring of `node` with what its docments say, in NumPy's style; `''` if they say nothing"
    ps,ret = params(node, says)
    of = next((ast.unparse(d.args[0]) for d in getattr(node, 'decorator_list', []) if isinstance(d, ast.Call) and ast.unparse(d.func)=='delegates'), None)
    if of and ps: ps.append(('**kwargs', f'Further arguments of `{of}`'))
    return '\n'.join([ast.get_docstring(node) or '', *_section('Parameters', ps), *_section('Returns', ret)]).strip() if ps or ret else ''

def _is(o, name): return any(name in ast.unparse(d) for d in o.decorator_list)

def public(tree):
    "`(qualified name, node)` of public functions, classes with fields, and methods, patched ones too"
    for o in tree.body:
        if getattr(o, 'name', '_').startswith('_'): continue
        if isinstance(o, ast.ClassDef):
            if _is(o, 'dataclass'): yield o.name,o
            fs = [m for m in o.body if isinstance(m, ast.FunctionDef) and not _is(m, '.setter')]
            yield from ((f'{o.name}.{m.name}', m) for m in fs if not m.name.startswith('_') or m.name in ('__init__','__call__'))
        elif _is(o, 'patch'): yield from ((f'{c}.{o.name}', o) for c in re.findall(r'[A-Za-z_][\w.]*', ast.unparse(o.args.args[0].annotation)))
        else: yield o.name,o

def room_help(src):
    "Qualified name -> docstring, for what is public in the module `src`"
    says = comments(src)
    return {k:s for k,o in public(ast.parse(src)) if (s := docstring(o, says))}

def help_json():
    "What belongs into `data/help.json`"
    texts = {o.stem:room_help(o.read_text(encoding='utf-8')) for o in rooms}
    return json.dumps({k:v for k,v in texts.items() if v}, indent=1, ensure_ascii=False)+'\n'

if __name__=='__main__': help_file.write_text(help_json(), encoding='utf-8')
