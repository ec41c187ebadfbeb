"The website, as `tools/build_docs.py` left it: no dead link or anchor, nothing from another host; in a browser no error, enough contrast in both modes, and a search that finds"
import ast,dataclasses,functools,html,http.server,importlib,inspect,json,os,re,shutil,threading,zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

docs = Path(__file__).parent.parent/'_docs'
pytestmark = [pytest.mark.skipif(not (docs/'index.html').exists(), reason='the site is not built: run `python tools/build_docs.py`'), pytest.mark.xdist_group('site')]

class _Page(HTMLParser):
    "What a page links to, what in it can be linked to, and its pictures without a text"
    def __init__(self, path):
        super().__init__()
        self.ids,self.links,self.far,self.bare = set(),[],[],[]
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id','name') if a.get(k)}
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        url = a.get('src') or a.get('href') or ''
        if tag in ('script','link','img','iframe') and a.get('rel')!='canonical' and url.startswith(('http:','https:','//')): self.far.append(url)
        if tag=='img' and not a.get('alt'): self.bare.append(url[:60])

@pytest.fixture(scope='module')
def pages(): return {p:_Page(p) for p in docs.rglob('*.html')}

def _dead(pages, page, link):
    "Does `link` of `page` lead nowhere in the site?"
    if ':' in link.partition('#')[0]: return False
    path,_,anchor = link.partition('#')
    to = page if not path else docs/path.lstrip('/') if path.startswith('/') else Path(os.path.normpath(page.parent/path))
    return not to.exists() or bool(anchor and to in pages and anchor not in pages[to].ids)

def test_no_dead_links(pages):
    assert len(pages)>40
    assert not [(p.name, o) for p,page in pages.items() for o in page.links if _dead(pages, p, o)]

def test_nothing_from_another_host(pages):
    assert not [(p.name, o) for p,page in pages.items() for o in page.far]
    assert not [p.name for p in docs.rglob('*.css') if '@import url(http' in p.read_text(encoding='utf-8')]

@pytest.mark.parametrize('name', ['submit','folds'])
def test_the_kaggle_notebooks_can_be_downloaded(name, pages):
    "The notebook as it is in the repository, beside settings that name it"
    assert f'kaggle/{name}.zip' in pages[docs/'kaggle.html'].links
    with zipfile.ZipFile(docs/'kaggle'/f'{name}.zip') as z:
        assert {*z.namelist()}=={f'{name}/kernel-metadata.json',f'{name}/{name}.ipynb'}
        assert json.loads(z.read(f'{name}/kernel-metadata.json'))['code_file']==f'{name}.ipynb'
        assert z.read(f'{name}/{name}.ipynb')==(docs.parent/'nbs'/'kaggle'/name/f'{name}.ipynb').read_bytes()

def test_no_page_is_empty():
    "Each has more to say than its title and description"
    assert not [p.name for p in docs.rglob('*.html.md') if len([o for o in p.read_text(encoding='utf-8').split('\n\n') if o.strip()])<3]

def test_llms_txt_leads_to_every_page():
    "And to none that is not there"
    linked = re.findall(r'\]\((?:[a-z]+://[^)]*?/)?([^)/:]+(?:/[^):]+)*\.html\.md)\)', (docs/'llms.txt').read_text(encoding='utf-8'))
    assert {*linked}=={p.relative_to(docs).as_posix() for p in docs.rglob('*.html.md')}

def test_the_sitemap_holds_whole_addresses():
    "Or is not there, as long as nobody knows where the site will be"
    f = docs/'sitemap.xml'
    assert not f.exists() or all(o.startswith('http') for o in re.findall('<loc>(.*?)</loc>', f.read_text(encoding='utf-8')))

def test_classes_are_shown_as_classes():
    text = (docs/'phases.html.md').read_text(encoding='utf-8')
    assert 'class Phase(' in text and 'def Phase(' not in text

def _read(room, ext):
    "A page as text: no tags, no links, no backticks"
    s = (docs/f'{room}.{ext}').read_text(encoding='utf-8')
    if ext=='html': s = html.unescape(re.sub(r'<[^>]*>', '', s))
    return re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', s.replace('`', '')).replace('\u2019', "'")

@pytest.fixture(scope='module')
def rooms():
    "Name -> module, for all of the package; imported before a test begins, as an import may set environment variables"
    return {p.stem:importlib.import_module(f'fastai_discriminative.{p.stem}') for p in sorted((docs.parent/'fastai_discriminative').glob('[!_]*.py'))}

def _public_classes(rooms):
    "`(room, class)` for the public classes, all of which have a page"
    def _own(o, room): return isinstance(o, type) and o.__module__==room.__name__ and o.__name__ in room.__all__
    return [(k, o) for k,room in rooms.items() if k!='all' for o in vars(room).values() if _own(o, room)]

@pytest.mark.parametrize('ext', ['html','html.md'])
def test_fields_are_explained(ext, rooms):
    "Every public class has its text on its page, and a dataclass the comments of its fields, as `help` does"
    known = json.loads((docs.parent/'fastai_discriminative'/'data'/'help.json').read_text(encoding='utf-8'))
    lost,n = [],0
    for room,cls in _public_classes(rooms):
        page,says = _read(room, ext),[]
        if dataclasses.is_dataclass(cls):
            section = known[room][cls.__name__].partition('Parameters\n')[2]
            says = [f'{k}:' for k in cls.__dataclass_fields__] + [f' # {o.strip()}' for o in re.findall(r'^    (.+)$', section, re.M)]
            assert len(says)==2*len(cls.__dataclass_fields__)
            n += len(says)
        says += [o for o in [(inspect.getdoc(cls) or '').split('\n')[0]] if not o.startswith(f'{cls.__name__}(')] # that of a named tuple says nothing
        lost += [(room, cls.__name__, o) for o in says if o.replace('`', '') not in page]
    assert n>200 and not lost

def test_properties_are_shown_as_properties(rooms):
    "Nobody calls what a page does not show as a function"
    kinds = property,functools.cached_property
    found = [(room, cls.__name__, k) for room,cls in _public_classes(rooms) for k,o in vars(cls).items() if k[0]!='_' and isinstance(o, kinds)]
    text = {room:(docs/f'{room}.html.md').read_text(encoding='utf-8') for room in {o[0] for o in found}}
    assert len(found)>40 and not [o for o in found if not re.search(rf'^ *property {o[2]}\b', text[o[0]], re.M)]
    assert not [o for o in found if re.search(rf'^### {o[1]}\.{o[2]}\n\n```python\ndef ', text[o[0]], re.M)]

def test_pages_have_no_traces_of_how_they_were_made():
    "No module `__main__`, no text of `object`, no progress bars"
    assert not [(p.name, o) for p in docs.rglob('*.html.md') for o in ('__main__','Return repr(self)','<factory>','\u2588\u2588','0.00% [') if o in p.read_text(encoding='utf-8')]

def _python(text):
    "The examples of a page, parsed; what is no Python, such as a signature, is passed over"
    for s in re.findall(r'^```python\n(.*?)^```$', text, re.M|re.S):
        try: yield ast.parse(re.sub(r'^\s*[%!].*$', '', s, flags=re.M))
        except SyntaxError: pass

def test_imports_are_shown(rooms):
    "A name of ours that `fastai_discriminative.all` does not have is imported on each page that uses it, and on its own"
    given = {*vars(rooms['all'])}
    own = {k:{*room.__all__}-given for k,room in rooms.items() if k!='all'}
    ours,lost = set().union(*own.values()),[]
    assert {'find_groups','splitter_checks'}<=ours
    for p in docs.rglob('*.html.md'):
        room,text = p.name.removesuffix('.html.md'),p.read_text(encoding='utf-8')
        nodes = [n for t in _python(text) for n in ast.walk(t)]
        has = {a.asname or a.name for n in nodes if isinstance(n, (ast.Import,ast.ImportFrom)) for a in n.names}
        has |= {o for n in nodes if isinstance(n, ast.ImportFrom) and n.names[0].name=='*' for o in own.get((n.module or '').rpartition('.')[2], ())}
        has |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        has |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef,ast.ClassDef))} | {n.arg for n in nodes if isinstance(n, ast.arg)}
        used = {n.id for n in nodes if isinstance(n, ast.Name)} & ours
        lost += [(room, o) for o in (used | own.get(room, set()))-has if text.count('```python')]
    assert not lost

# ---- in a browser

_flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()

_faint = r"""()=>{ // texts whose contrast with what is behind them is below 4.5:1 (WCAG 2.2, 1.4.3)
    const lum = c => {const f = v => {v /= 255; return v<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4}; return .2126*f(c[0])+.7152*f(c[1])+.0722*f(c[2])}
    const parse = s => {const p = s.match(/[\d.]+/g).map(Number); return [p[0],p[1],p[2],p.length>3 ? p[3] : 1]}
    const over = (a,b) => [0,1,2].map(i => a[i]*a[3]+b[i]*(1-a[3])).concat(1)
    const back = e => {
        const all = []
        for (let n = e; n; n = n.parentElement) {const c = parse(getComputedStyle(n).backgroundColor); if (c[3]>0) all.push(c); if (c[3]==1) break}
        return all.reverse().reduce((b,c) => over(c,b), [255,255,255,1])
    }
    const res = [],walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walk.nextNode()) {
        const t = walk.currentNode,e = t.parentElement
        if (!t.data.trim() || e.closest('svg,script,style') || !e.checkVisibility({opacityProperty:true, visibilityProperty:true})) continue
        let opacity = 1
        for (let n = e; n; n = n.parentElement) opacity *= +getComputedStyle(n).opacity
        const b = back(e),f = parse(getComputedStyle(e).color),[x,y] = [lum(over([f[0],f[1],f[2],f[3]*opacity], b)),lum(b)].sort((p,q) => q-p)
        if ((x+.05)/(y+.05)<4.5) res.push(`${e.tagName} ${e.className}: ${t.data.trim().slice(0,30)}`)
    }
    return res
}"""

class _Quiet(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args): super().__init__(*args, directory=str(docs))
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium here')
    sync = pytest.importorskip('playwright.sync_api', reason='needs playwright, of the extra `dev`')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=_flags)
        yield b,f'http://127.0.0.1:{server.server_port}/'
        b.close()
    server.shutdown()

def _open(browser, errors, **kwargs):
    "A new page that notes what goes wrong"
    page = browser.new_context(**kwargs).new_page()
    page.on('console', lambda m: errors.append((page.url, m.text)) if m.type in ('error','warning') else None)
    page.on('pageerror', lambda e: errors.append((page.url, str(e))))
    return page

@pytest.mark.parametrize('mode', ['light','dark'])
def test_every_page(mode, browser, pages):
    b,url = browser
    errors,faint = [],{}
    page = _open(b, errors, viewport=dict(width=1200, height=900), color_scheme=mode)
    for p in sorted(pages):
        page.goto(url+p.relative_to(docs).as_posix())
        if bad := page.evaluate(_faint): faint[p.name] = bad[:3]
    assert not errors and not faint

@pytest.mark.parametrize('word,title', [('layer_groups','Layer groups'), ('predict','Predict'), ('tta','Predict'), ('kaggle','Train and submit')])
def test_search(word, title, browser):
    b,url = browser
    for mode in ('light','dark'):
        page = _open(b, [], viewport=dict(width=1200, height=900), color_scheme=mode)
        page.goto(url+'index.html')
        page.fill('.navbar input[type=search]', word)
        page.wait_for_selector('.search-result-title')
        assert title in page.locator('.search-result-title').all_inner_texts() and not page.evaluate(_faint)

def test_phone(browser, pages):
    "No page is wider than a phone; what is, scrolls in a box of its own"
    b,url = browser
    page = _open(b, [], viewport=dict(width=360, height=740))
    wide = {}
    for p in sorted(pages):
        page.goto(url+p.relative_to(docs).as_posix())
        if (w := page.evaluate('document.documentElement.scrollWidth'))>360: wide[p.name] = w
    assert not wide
