"What a type checker knows of the package: an annotation on every parameter and result that a user meets, and pyright finds wrong calls and no others"
import ast,json,re,shutil,subprocess,sys
from pathlib import Path

import pytest

from test_repo import _decorated,_public,_returns,_tree

# Rooms whose names a user types: those of `all`, and those with a page of their own
rooms = [o.module for o in _tree('all').body if isinstance(o, ast.ImportFrom) and o.names[0].name=='*']+['predict','demo','checks','coverage']

def _bare(node, method):
    "Parameters of the function `node` without an annotation, and `'return'` if it returns something and does not say what"
    a = node.args
    pars = [*a.posonlyargs, *a.args, *a.kwonlyargs][method and not _decorated(node, 'staticmethod'):]
    return [o.arg for o in pars if o.annotation is None] + ['return']*(node.returns is None and _returns(node))

@pytest.mark.parametrize('room', rooms)
def test_everything_is_annotated(room):
    bare = [(qual, b) for qual,node,_,method in _public(room) if not isinstance(node, ast.ClassDef) and (b := _bare(node, method))]
    assert not bare

_right = """
from torch import nn
from fastai.vision.all import ImageDataLoaders,accuracy
from fastai_discriminative.all import *
from fastai_discriminative.predict import *

def fine_tune(dls: ImageDataLoaders, model: nn.Module) -> Predictions:
    learn = discriminative_learner(dls, 'resnet18', n_groups=4, weights_file='w.pth', metrics=accuracy)
    learn.fit_strategy('lp_ft', 5)
    learn.fit_one_cycle(5, 'preset')
    learn.fit_strategy([Phase(1, frozen='head', cached=True), Phase(3, slice(1e-5, 1e-3)), Phase(1, {'stem':1e-5, 'head':1e-3})])
    low: float = preset_for('resnet18.a1_in1k', bs=64, n_steps=500).lr_low
    groups: LayerGroups = layer_groups(model)
    check_splitter(Splitter("resnet18", 4), model)
    found: StrategyComparison = compare_strategies(lambda: learn, ['lp_ft','auto'], n_epoch=1, seeds=[1,2])
    print(low, groups, found.results.describe())
    return predict_images([learn, 'other.pkl'], 'folder', tta=4)
"""
_wrong = """
discriminative_learner(object(), 'resnet18')
Splitter('resnet18', n_groups=1.5)
preset_for(3)
Phase('five')
Phase(5, frozne='head')
TimeLimit('an hour').end
KeepBest(monitor=3)
"""

@pytest.mark.xdist_group('pyright')
def test_pyright_finds_wrong_calls_only(tmp_path):
    checker = shutil.which('basedpyright')
    if not checker: pytest.skip('needs basedpyright, of the extra `dev`')
    (tmp_path/'use.py').write_text(_right+_wrong, encoding='utf-8')
    conf = dict(typeCheckingMode='standard', reportWildcardImportFromLibrary=False, reportUnusedExpression=False, extraPaths=[str(Path(__file__).parent.parent)]) # an editable install cannot be followed
    (tmp_path/'pyrightconfig.json').write_text(json.dumps(conf), encoding='utf-8')
    res = subprocess.run([checker, '--pythonpath', sys.executable, '-p', str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    found = sorted({int(o) for o in re.findall(r'use\.py:(\d+):\d+ - error', res.stdout)})
    first = (_right+_wrong).split('\n').index('discriminative_learner(object(), \'resnet18\')')+1
    assert found==list(range(first, first+7)), res.stdout+res.stderr
