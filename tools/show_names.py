"""What the website shows of a public name: its signature with all docments, and its docstring

nbdev executes a page's cells and asks each name what it is. Then its module is `__main__`, where fastcore finds no comments of a dataclass' fields, types have the wrong module, and a property is drawn
as the function inside it. So we ask again, in the module that users import."""
import functools,re
from importlib import import_module
from operator import attrgetter
from fastcore.docments import DocmentText
from fastcore.utils import *
from nbdev.doclinks import NbdevLookup
from nbdev.showdoc import BasicMarkdownRenderer

_re_shown = re.compile(r'^show_doc\(([\w.]+)\)$', re.M)
_re_class = re.compile(r'^(```python\n)def ([A-Z]\w*)\((.*?)\)(?:->None)?:(?=\n```)', re.M|re.S)
_re_property = re.compile(r'(?<=```python\n)def (\w+)\(\)(?:->(.*?))?:(?=\n```| #)', re.S)
_re_section = re.compile(r'\n+\*?(?:Parameters|Returns)\*?\n-{7,}\n(?:.+\n?)+')
_re_module = re.compile(r'\b(?:__main__|fastai_discriminative\.\w+|pathlib(?:\._local)?)\.(?=[A-Za-z_])')

def no_sections(
    md:str, # Markdown of a name, as nbdev shows it
) -> str: # The same, without the sections that `explain_rooms` put into the docstring
    "The signature above says the same, in its comments"
    return _re_section.sub('\n', md)

def as_written(
    md:str, # What nbdev says of a name, in markdown
) -> str: # The same, with its signature as in the source
    "Classes as classes, where nbdev writes the function that makes them; no type where none was written; our types without the module"
    def _class(m): return f'{m[1]}class {m[2]}:' if m[3].split()==['*args,','**kwargs'] else f'{m[1]}class {m[2]}({m[3]}):'
    def _types(m): return _re_module.sub('', m[0].replace(':NoneType=None', '=None').replace(':list=<factory>', ':list=[]').replace(':dict=<factory>', ':dict={}'))
    return re.sub(r'^```python\n(?:class|def|async def) .*?\n```$', _types, _re_class.sub(_class, md), flags=re.M|re.S)

def as_property(
    md:str, # What nbdev says of the function inside a property, in markdown
) -> str: # The same as a property, which nobody calls
    "`property failures:DataFrame` in place of `def failures()->DataFrame:`"
    return _re_property.sub(lambda m: f'property {m[1]}'+(f':{m[2]}' if m[2] else ''), md)

def is_property(o): return isinstance(o, (property,functools.cached_property))

def _line(name, o):
    f = getattr(o, 'fget', None) or o.func
    sig,_,says = as_property(f'```python\n{DocmentText(f, docstring=False)}\n```').splitlines()[1].partition(' # ')
    about = (f.__doc__ or '').split('\n')[0]
    if about: says = re.sub('^[A-Z](?=[a-z])', lambda m: m[0].lower(), says)
    text = '; '.join(s for s in (about, says) if s)
    return f'    {sig} # {text}' if text else f'    {sig}'

def with_properties(
    md:str, # What we say of a class, in markdown
    cls:type, # The class
    apart:list=(), # Names that have their own entry, such as `ModelMap.df`
) -> str: # The same, with a line for each property
    "What an instance has beside its fields; nbdev leaves out what stands inside a class"
    own = {k:o for k,o in vars(cls).items() if is_property(o) and k[0]!='_' and f'{cls.__name__}.{k}' not in apart}
    lines = [_line(k, o) for k,o in own.items() if (getattr(o, 'fget', None) or o.func).__module__==cls.__module__]
    return md.replace('):\n```', '\n'.join(['):', *lines, '```']), 1) if lines else md

def _says_nothing(o):
    "A method of Python's own without a docstring; `getdoc` would show that of `object`"
    return getattr(o, '__name__', '').startswith('__') and not o.__doc__

def shown_name(
    source:str, # Of a cell of a page
) -> str|None: # The name that the cell shows; `None` for another cell
    "`Phase` for `show_doc(Phase)`"
    m = _re_shown.search(source)
    return m and m[1]

def entry(
    name:str, # Such as `Phase` or `Learner.split`
    mod:str, # Module that defines it, without the package
    apart:list=(), # All names that have an entry on this page
) -> str: # Markdown; '' if there is nothing to say
    "What the page of module `mod` shows of `name`"
    o = attrgetter(name)(import_module(f'fastai_discriminative.{mod}'))
    if _says_nothing(o): return ''
    md = no_sections(BasicMarkdownRenderer(o)._repr_markdown_())
    md = as_written(with_properties(as_written(md), o, apart) if isinstance(o, type) else md)
    return NbdevLookup().linkify(as_property(md) if is_property(o) else md)
