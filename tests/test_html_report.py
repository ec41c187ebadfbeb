"The HTML report is complete, harmless, readable in both colour modes, and correct; checked in a browser if there is one"
import re,shutil,subprocess
from base64 import b64decode
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.pyplot as plt,pytest,torch
from fastai.vision.all import ImageDataLoaders,accuracy,set_seed

from fastai_discriminative.all import *
from fastai_discriminative import html_report as hr
from helpers import own_net,plain,pre_ours,stock
from test_preflight import images

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
evil = '<script>alert(1)</script>'

class Tags(HTMLParser):
    "All tags with their attributes, those that are open at the end, and all text"
    void = {'meta','link','br','line','polyline','img','input'}
    def __init__(self, html):
        super().__init__()
        self.tags,self.open,self.texts = [],[],[]
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.texts.append(data)
    @property
    def text(self): return ' '.join(self.texts)

@pytest.fixture(scope='module')
def run(bright_data, tmp_path_factory):
    "A learner with a preflight, a fit with `auto` and a meter, and its report"
    learn,meter = pre_ours(bright_data),DistortionMeter(n_images=4)
    look = learn.preflight(1, 'auto')
    look.findings.append(PreflightFinding('classes', f'{evil} & more', 'x<y'))
    learn.fit_strategy('auto', 1, cbs=meter)
    path = learn.discriminative_report(tmp_path_factory.mktemp('report')/'run.html', meter=meter, seed=7, title=f'A {evil} run')
    return learn,path,path.read_text(encoding='utf-8')

@pytest.fixture(scope='module')
def bright_data(bright): return ImageDataLoaders.from_folder(bright, valid_pct=.33, seed=1, bs=8, num_workers=0)

# ---- the page

def test_page_is_whole_and_loads_nothing(run):
    t = Tags(run[2])
    assert not t.open and run[2].startswith('<!DOCTYPE html>')
    assert not {k for k,_ in t.tags} & {'script','iframe','object','embed','form','base'} and not re.search(r'https?://|url\(|@import', run[2])
    links = [v for _,a in t.tags for k,v in a.items() if k in ('src','href','action')]
    assert links[0]=='data:,' and all(o.startswith('data:image/svg+xml;base64,') for o in links[1:]) and not any(k.startswith('on') for _,a in t.tags for k in a)
    assert "default-src 'none'" in next(a['content'] for k,a in t.tags if a.get('http-equiv')=='Content-Security-Policy')

def test_what_comes_from_the_data_is_escaped(run):
    assert evil not in run[2] and f'A {evil} run' in Tags(run[2]).text and f'{evil} & more' in Tags(run[2]).text

def _pictures(html): return [a for k,a in Tags(html).tags if k=='img']

def test_pictures_have_words(run):
    said = [a['alt'] for a in _pictures(run[2])]
    assert [o.partition(':')[0] for o in said]==['Learning rate of each group','Loss','Metrics','Change of the weights over their norm']
    assert all(re.search(r'from [\d.e+-]+ to [\d.e+-]+', o) for o in said[1:]) and f'{len(run[0].layer_groups)} groups over {len(run[0].recorder.group_hps)} steps' in said[0]

def test_pictures_are_whole_and_load_nothing(run):
    for a in _pictures(run[2]):
        svg = b64decode(a['src'].partition(',')[2]).decode()
        assert ElementTree.fromstring(svg.partition('<!DOCTYPE')[0]+svg.partition('.dtd">')[2]).tag.endswith('}svg') and '<script' not in svg
        assert all(o.startswith(('#','data:')) for o in re.findall(r'href="([^"]*)"', svg))

def test_tables_and_pictures_scroll_in_boxes(run):
    t = Tags(run[2])
    assert re.search(r'\.box \{ overflow-x: auto', run[2])
    assert all(f'<div class="box" tabindex="0" role="region" aria-label="{n}"><table>' in run[2] for n in ('Layer groups','Losses and metrics of each epoch','Environment','Phases'))
    assert run[2].count('<table>')==len(re.findall(r'role="region" aria-label="[^"]*"><table>', run[2])) and any(a.get('name')=='viewport' for _,a in t.tags)

def _luminance(c):
    vs = [int(c[i:i+2], 16)/255 for i in (1,3,5)]
    return sum(w*(v/12.92 if v<=.04045 else ((v+.055)/1.055)**2.4) for w,v in zip((.2126,.7152,.0722), vs))

def _contrast(a, b):
    hi,lo = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (hi+.05)/(lo+.05)

def test_contrast_in_both_colour_modes():
    assert _contrast('#000000', '#ffffff')==pytest.approx(21) and _contrast('#777777', '#ffffff')==pytest.approx(4.48, abs=.01)
    day,night = (dict(re.findall(r'--(\w+):\s*(#[0-9a-f]{6})', o)) for o in hr._style.split('prefers-color-scheme: dark'))
    assert day.keys()==night.keys() and len(day)==5 and day!=night
    for c in (day,night): assert all(_contrast(c[a], c[b])>=4.5 for a in ('ink','muted') for b in ('paper','panel'))
    assert set(re.findall(r'(?:^|[ {;])(?:color|fill):\s*([^;}]+)', hr._style))<={'var(--ink) ','var(--ink)','var(--muted) ','var(--muted)'}

# ---- what it says

def test_numbers_are_those_of_the_learner(run):
    learn,_,html = run
    t = Tags(html)
    for g,lr in zip(learn.layer_groups, learn.layer_groups.lrs): assert g.name in t.texts and f'{g.n_params:,}' in t.texts and f'{lr:.2g}' in t.texts
    for r in learn.recorder.values: assert all(f'{v:.4f}' in t.texts for v in r)
    assert str(torch.__version__) in t.texts and "What auto measured" in t.texts and f'{learn.auto_evidence.points[0].loss:.3f}' in t.texts
    assert 'set_seed(7, reproducible=True)' in t.text and "learn.fit_strategy('auto', 1)" in t.text and "discriminative_learner(dls, 'resnet10t', n_groups=" in t.text

def test_code_of_a_page_can_be_run(run):
    code = hr._code(run[0], last_preflight(run[0]), 7)
    compile(code.replace('...', 'None'), 'report', 'exec')
    assert hr._code(run[0], None, None).endswith('epochs and peak rates, as they were recorded')

def test_a_stock_learner_without_a_fit(dls, tmp_path):
    learn = stock(dls)
    html = learn.discriminative_report(tmp_path/'a.html').read_text(encoding='utf-8')
    assert 'No fit was recorded' in html and 'vision_learner(dls' in html and 'not known' in html and not Tags(html).open

def test_a_class_may_be_called_anything(tmp_path):
    path = images(tmp_path/'d', {'<b>ant':8, 'bee & co':8})
    set_seed(0)
    learn = plain(ImageDataLoaders.from_folder(path, valid_pct=.25, bs=4, num_workers=0), own_net(), metrics=accuracy, path=tmp_path/'<i>')
    learn.fit(1, 1e-3)
    learn.recorder.values[0] = [float('nan'), *learn.recorder.values[0][1:]]
    html = learn.discriminative_report(tmp_path/'a.html', code='x<y & z').read_text(encoding='utf-8')
    assert '<b>ant' not in html and '<i>' not in html and 'x&lt;y &amp; z' in html and not Tags(html).open

def test_a_report_is_whole_or_not_there(dls, tmp_path, monkeypatch):
    learn = stock(dls)
    learn.discriminative_report(tmp_path/'a.html', title='old')
    def _full(*args, **kwargs): raise OSError('No space left on device')
    monkeypatch.setattr(hr.Path, 'write_text', _full)
    with pytest.raises(OSError, match='No space'): learn.discriminative_report(tmp_path/'a.html')
    monkeypatch.undo()
    assert '<title>old</title>' in (tmp_path/'a.html').read_text() and [o.name for o in tmp_path.iterdir()]==['a.html']
    with pytest.raises(FileNotFoundError, match='nowhere'): learn.discriminative_report(tmp_path/'nowhere'/'a.html')

def test_charts():
    assert hr._chart({}, 't', 'x')=='' and hr._chart({'a':([0], [float('nan')])}, 't', 'x')==''
    assert _pictures(hr._chart({'a':([3], [.5]), 'b':([], [])}, 't', 'x'))[0]['alt']=='t: a from 0.5 to 0.5'
    assert len(hr._chart({'a':(range(10**4), range(10**4))}, 't', 'x'))<60_000 and not plt.get_fignums()

def test_rates_are_of_all_groups(run):
    "As `plot_rates` draws them; a learner without groups has none"
    svg = b64decode(_pictures(run[2])[0]['src'].partition(',')[2]).decode()
    assert all(escape(n) in svg for n in run[0].layer_groups.names if len(n)<18)
    assert hr._rates(plain(run[0].dls, own_net()))==''

# ---- in a browser

_quiet = ['--headless','--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync']
_ask = """<script>onload = () => { const e = document.documentElement; parent.document.title = [innerWidth, e.scrollWidth, document.querySelectorAll('.box').length,
    getComputedStyle(document.body).backgroundColor].join('|') }</script>"""

@pytest.mark.skipif(not chromium, reason='a page can be looked at in a browser only: no Chromium here; the static tests above always run')
@pytest.mark.parametrize('dark', [False, True])
def test_in_a_browser(run, tmp_path, dark):
    "No errors on the console, and nothing wider than a phone; asked by a script that only a copy has, in a frame, as no window is so narrow"
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', run[2]).replace('</body>', _ask+'</body>')
    frame = tmp_path/'frame.html'
    frame.write_text(f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><iframe style="border:0;width:360px;height:800px" srcdoc="{escape(page)}"></iframe>', encoding='utf-8')
    def _chrome(*args): return subprocess.run([chromium, *_quiet, f'--user-data-dir={tmp_path/"profile"}', '--enable-logging=stderr', '--window-size=800,900',
        *(['--force-dark-mode'] if dark else []), '--dump-dom', *args], capture_output=True, text=True, timeout=60)
    res = _chrome(frame.as_uri())
    inner,wide,n,paper = re.search(r'<title>([^<]*)</title>', res.stdout)[1].split('|')
    assert int(inner)==360 and int(wide)<=360 and int(n)>5
    assert (sum(map(int, re.findall(r'\d+', paper)[:3]))<200)==dark
    whole = _chrome(run[1].as_uri())
    assert '</main>' in whole.stdout and 'CONSOLE' not in whole.stderr+res.stderr
