"An export from an older version loads after modules and names have moved, and predicts the same; its weights can be read without this package"
import pickle,pickletools,sys,zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pytest,torch
import fastai_discriminative.all as ours
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.vision.core import PILImage

from fastai_discriminative.all import *
from helpers import plain,own_net,same,weights

file = Path(__file__).parent/'data'/'export_96295fc.pkl' # by the version of that commit, from a `test_vit` of two blocks, three groups, after `lp_ft`
predicted = [0.013461, 0.596971, 0.389568] # by the learner that was exported

# What exports hold of ours. Once released, such a name stays within a major version, in the room where it was
held = {'freeze TrueFreeze', 'groups LayerGroup', 'groups LayerGroups', 'groups Splitter', 'layers ModelMap', 'optimizer fused_adamw', 'optimizer fused_sgd', 'paths ModelLayer', 'presets Preset',
    'presets RateLaw', 'ranks ReducedParams', 'schedules _Recorder', 'schedules _SmoothLoss', 'trace ModelTrace',
    'best KeepBest', 'compare TrainClock', 'fast_math FastMath', 'features CachedFeatures', 'phases KeepBest', 'phases StrategyRun', 'report DistortionMeter',
    'demo _FolderLabel', 'demo _TableLabel', 'recorder GroupCSVLogger', 'recorder GroupLogger', 'recorder StepMeter', 'time_limit TimeLimit'}

def names_in(path):
    "Names of this package in a file of torch's"
    z = zipfile.ZipFile(path)
    ops = pickletools.genops(z.read(next(o for o in z.namelist() if o.endswith('data.pkl'))))
    return {arg.partition('.')[2] for op,arg,_ in ops if op.name=='GLOBAL' and arg.startswith('fastai_discriminative.')}

def picture(): return PILImage.create(np.random.default_rng(1).integers(0, 255, (32,32,3), dtype=np.uint8))

def load_old():
    # A pickle needs the packages of its classes. fastai 2.7 keeps its transforms in fastcore, so it cannot read what 2.8 wrote, with or without us
    pytest.importorskip('fasttransform', reason='the file was written by fastai 2.8, which has its transforms from fasttransform')
    return load_learner(file)

def test_an_export_of_an_older_version_predicts_as_it_did():
    learn = load_old()
    with learn.no_bar(): _,i,probs = learn.predict(picture())
    assert torch.allclose(probs, torch.tensor(predicted), atol=1e-5) and i==1

def test_an_export_of_an_older_version_can_train_on(dls, tmp_path):
    learn = load_old()
    assert len(learn.layer_groups)==3 and learn.layer_groups.frozen==[True,True,False]
    learn.dls,learn.logger,learn.path = dls,print,tmp_path
    was = weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 'preset')
    cold = {n for g in learn.layer_groups[:2] for n in g.param_names}
    assert all(torch.equal(was[n], v) for n,v in weights(learn).items() if n in cold) and not same(was, weights(learn))
    learn.unfreeze()
    learn.save('x')
    assert same(weights(learn), weights(learn.load('x')))

def test_names_in_exports_stay(dls, tmp_path):
    lost = [o for o in held if not hasattr(import_module(f'fastai_discriminative.{o.split()[0]}'), o.split()[1])]
    assert not lost, f'exports hold {lost}: see "Style" in CONTRIBUTING.md'
    cbs = {f"{o.__module__.partition('.')[2]} {o.__name__}" for o in vars(ours).values() if isinstance(o, type) and issubclass(o, Callback) and o.__module__.startswith('fastai_discriminative.')}
    assert len(cbs)>1 and cbs<=held, 'callbacks that a learner may keep: add them to `held`'
    learn = plain(dls, own_net(), path=tmp_path).split(fused=True)
    learn.fit_one_cycle(1, 'preset')
    learn.export('e.pkl')
    assert names_in(file)<=held and 6<len(now := names_in(tmp_path/'e.pkl')) and now<=held, 'add them to `held`'

class Missing:
    def __init__(self, *args, **kwargs): pass
    def __setstate__(self, state): pass

class PlainUnpickler(pickle.Unpickler):
    "As on the page of the learner"
    def find_class(self, module, name):
        if module.startswith('fastai_discriminative'): return Missing
        return super().find_class(module, name)

def test_weights_of_an_export_need_no_package(monkeypatch):
    learn = load_old()
    monkeypatch.setitem(sys.modules, 'fastai_discriminative', None)
    for k in [k for k in sys.modules if k.startswith('fastai_discriminative.')]: monkeypatch.delitem(sys.modules, k)
    with pytest.raises(UnboundLocalError, match='res'): load_learner(file) # fastai's way to say it
    bare = torch.load(file, map_location='cpu', weights_only=False, pickle_module=SimpleNamespace(Unpickler=PlainUnpickler, __name__='plain'))
    assert same({**bare.model.state_dict()}, weights(learn)) and isinstance(bare.splitter, Missing)
