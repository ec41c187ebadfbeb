"The coverage table and its page are complete and up to date"
import json,re
from pathlib import Path

import pytest,timm,torchvision

from fastai_discriminative.coverage import *
from fastai_discriminative.coverage import _versions
from fastai_discriminative.core import read_data
from fastai_discriminative.checks import *
from fastai_discriminative.core import html_table
from fastai_discriminative.presets import *
from fastai_discriminative.registry import *

root = Path(__file__).parent.parent
rows = read_data('zoo.csv')
same_versions = f'timm {timm.__version__},' in read_data('zoo.csv', head=True)
other = pytest.mark.skipif(not same_versions, reason=f"the table was made with another timm: {read_data('zoo.csv', head=True)}")

def test_nothing_is_left_out():
    names = set(all_architectures())
    assert names>=set(timm.list_models()) and {f'torchvision.{o}' for o in torchvision.models.list_models(module=torchvision.models)}<=names
    assert all(f'fastai.{o}' in names for o in ('xresnet18','xresnet50_deep','xse_resnext50','xsenet154')) and 'fastai.XResNet' not in names

@other
def test_one_row_each(): assert [r['arch'] for r in rows]==list(all_architectures())

def test_reading_tables():
    assert {'arch','family','rule','params','layers','groups','largest'}==set(rows[0])
    assert [r['arch'] for r in rows if r['rule']=='none']==[r['arch'] for r in rows if 'splits' in zoo_exceptions(r['arch'])]
    assert all(r['rule'] in ('registered','timm','traced') and int(r['groups'])<=int(r['layers']) and 0<float(r['largest'])<=1 for r in rows if r['rule']!='none')

def test_exceptions_are_looked_up():
    assert set(zoo_exceptions('csatv2'))=={'channels'}==set(zoo_exceptions('naflexvit_base_patch16_gap')) and zoo_exceptions('resnet50')=={}
    assert zoo_exceptions('my_csatv2')=={}, "whole names only"

def test_prove_names_what_fails():
    row,bad = prove('csatv2')
    assert row['arch']=='csatv2' and list(bad)==['channels'] and 'n_in=1' in bad['channels'] and 'n_in=3' not in bad['channels']
    assert prove('test_vit')[1]=={}

def test_write_and_read_again(tmp_path):
    write_zoo(rows, tmp_path/'zoo.csv')
    was = (root/'fastai_discriminative/data/zoo.csv').read_text().splitlines()
    assert (tmp_path/'zoo.csv').read_text().splitlines()[1:]==was[1:]
    assert (tmp_path/'zoo.csv').read_text().startswith(f'# {_versions()}\narch,family,')

@other
def test_table_is_complete():
    t = coverage_table()
    split = [r for r in rows if r['rule']!='none']
    assert t.architectures.astype(int).sum()==len(split) and set(t.family)=={r['family'] for r in split} and t.notna().all().all()
    registered = {f.name for f in list_families()}-{'awd_lstm'} # text, and so in no zoo of images
    assert registered<=set(t.family)
    conv = t.set_index('family').loc['convnext']
    assert conv.rule=='registered' and conv.recipes.startswith('supervised 1 2; ') and conv.measured=='no' and re.fullmatch(r'\w+: \S+ to \S+, head \S+', conv.preset)
    assert t.set_index('family').loc['csatv2'].exceptions=='channels 2'

@other
def test_line():
    n = sum(bool(zoo_exceptions(r['arch'])) for r in rows)
    assert coverage_line().startswith(f'{len(rows)} architectures') and f'{len(rows)-n} pass every check, {n} are excepted' in coverage_line()

def _outputs(nb):
    "Everything that the notebook shows, as text"
    for c in json.loads((root/'nbs'/nb).read_text(encoding='utf-8'))['cells']:
        for o in c.get('outputs', ()):
            yield ''.join(o.get('text', ()))
            yield from (''.join(v) for v in o.get('data', {}).values())

@other
@pytest.mark.parametrize('nb,shown', [('13_coverage.ipynb', lambda: [html_table((t:=coverage_table()).columns, t.values), coverage_line()]), ('index.ipynb', lambda: [coverage_line()])], ids=['page','readme'])
def test_page_is_not_stale(nb, shown):
    "The page shows what the registry, the presets and the table say now"
    outs = list(_outputs(nb))
    for o in shown(): assert any(o in s for s in outs), f'stale: run `nbdev-test nbs/{nb} --save && nbdev-clean`'

def test_readme_has_the_line():
    if same_versions: assert coverage_line() in (root/'README.md').read_text(encoding='utf-8')
