"Preflight: each finding appears when it should and only then, the summary is right, and nothing changes"
import pickle,random,shutil
from functools import partial

import numpy as np,pytest,torch
from PIL import Image
from torch import nn
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper
from fastai.vision.all import (Adam,BCEWithLogitsLossFlat,CrossEntropyLossFlat,DataLoaders,ImageDataLoaders,L,Learner,MSELossFlat,Normalize,accuracy,
    imagenet_stats,set_seed)

from fastai_discriminative.all import *
from fastai_discriminative import findings as fg,fit_look as fl
from helpers import own_net,ours,plain,quiet,stock
from test_lr_finder import state,unchanged

def found(look): return {f.name:f for f in look.findings}

@pytest.fixture
def learn(dls):
    "Random weights that stand in for pretrained ones"
    set_seed(0)
    res = ours(dls, preset='resnet10t', metrics=accuracy)
    res.pretrained = True
    res.unfreeze()
    res.recorder.values = L() # as after a fit, for `state`
    return res

def trained_norms(learn):
    "Norm layers that look trained, with statistics of the learner's own data"
    bns = [m for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for m in bns:
            m.weight.fill_(.9)
            m.reset_running_stats()
            m.momentum = None # the mean of all batches
        learn.model.train()
        for b in fl.some_batches(learn, 3): learn.model(b[0])
    for m in bns: m.momentum = .1
    return learn

def images(path, n, size=32, fmt='png', seed=0):
    "`n` images for each class, a dict of class to number"
    rng = np.random.default_rng(seed)
    for c,k in n.items():
        (path/c).mkdir(parents=True)
        for j in range(k): Image.fromarray(rng.integers(0, 255, (size,size,3), dtype=np.uint8)).save(path/c/f'{c}{j}.{fmt}')
    return path

# ---- findings, one by one

def test_size(learn):
    f = found(learn.preflight(1))['size']
    assert '32 px' in f.what and 'trained at 176' in f.what and f.fix=='item_tfms=Resize(176)' and f.args=='--size 176'

def test_size_is_silent_at_the_checkpoints_own(learn):
    for m in learn.model.modules():
        if hasattr(m, 'pretrained_cfg'): m.pretrained_cfg = {**m.pretrained_cfg, 'input_size':(3,32,32)}
    assert 'size' not in found(learn.preflight(1))

def test_size_is_not_known_without_a_checkpoint(dls):
    assert ours(dls).preflight(1).skipped['size']=='nothing is pretrained'
    assert 'does not say' in plain(dls, own_net()).preflight(1).skipped['size']

def test_norms(learn):
    trained_norms(learn)
    learn.dls.add_tfms([Normalize.from_stats(*imagenet_stats)], 'after_batch')
    with torch.no_grad():
        for m in learn.model.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_var *= 9
    f = found(learn.preflight(1))['norms']
    assert 'unlike those of the pretraining' in f.what and 'train_norm=True' in f.fix
    assert float(f.what.split('the variance ')[1].split()[0])>3

def test_norms_are_silent_where_statistics_are_those_of_the_data(learn):
    learn.dls.add_tfms([Normalize.from_stats(*imagenet_stats)], 'after_batch')
    look = trained_norms(learn).preflight(1)
    assert 'norms' not in found(look) and 'norms' not in look.skipped

def test_images_that_are_not_normalized(learn):
    f = found(trained_norms(learn).preflight(1))['norms']
    assert 'between 0 and 1' in f.what and 'Normalize' in f.fix

def test_a_model_without_running_statistics_is_told_of_its_inputs_only(dls):
    learn = ours(dls, 'test_vit')
    learn.pretrained = True
    assert '(0.5, 0.5, 0.5)' in found(learn.preflight(1))['norms'].fix
    learn.dls.add_tfms([Normalize.from_stats((.5,.5,.5), (.5,.5,.5))], 'after_batch')
    assert learn.preflight(1).skipped['norms']=='no layer of the body has running statistics'

def test_steps(learn):
    f = found(learn.preflight(3, 'lp_ft'))['steps']
    assert f.what.startswith('6 steps, but no fit of fewer than 180') and f.fix=="learn.fit_strategy('lp_ft', 90)" and f.args=='--epochs 90'
    assert 'steps' not in found(learn.preflight(90, 'lp_ft')) and 'steps' not in found(learn.preflight(90))
    assert found(learn.preflight(89))['steps'].fix=="learn.fit_one_cycle(90, 'preset')"
    n = 90*2
    assert learn.preset.scaled(*fit_case(learn, n_epoch=90)).lr_high==pytest.approx(learn.preset.law.at(n, 32)*(8/64)**.5)

def test_steps_do_not_matter_to_a_body_that_never_trains(learn):
    assert learn.preflight(1, 'feature_extraction').skipped['steps']=='only new layers train'

def test_a_model_of_ones_own_that_was_never_trained(dls):
    learn = plain(dls, own_net()).split(2)
    f = found(learn.preflight(1))['random_layers']
    assert 'look random' in f.what and f.fix=="learn.split(preset=preset_for(learn.model, regime='random'))"
    assert eval(f.fix).preset.regime=='random' and 'random_layers' not in found(learn.preflight(1))

def test_steps_of_recipes_that_no_law_carries_over(dls):
    learn = quiet(discriminative_learner(dls, 'convnext_tiny.fb_in22k', pretrained=False, preset=Preset(1e-5, 1e-4, sources=preset_for('convnext_tiny.fb_in22k').sources)))
    learn.pretrained = True
    f = found(learn.preflight(1))['steps']
    assert f.fix=='learn.lr_find_groups()' and 'the rates are those of recipes' in f.what
    assert learn.preflight(1, lr=1e-3).skipped['steps']=='the rates are your own'

def test_validation(learn):
    f = found(learn.preflight(1))['validation']
    lo,hi = fg._wilson(.9, 9)
    assert f.what.startswith('9 images') and f'{lo:.1%} and {hi:.1%}' in f.what and 'fewer than 870 images' in f.what and f.args=='--seeds 5'
    assert fg._wilson(.9, 870)==pytest.approx((.87827, .91821), abs=1e-5) # by hand: (p + z2/2n -+ z sqrt(pq/n + z2/4n2))/(1 + z2/n)

@pytest.mark.parametrize('n,says', [(860,True), (870,False)])
def test_validation_is_silent_from_where_two_points_show(n, says):
    dls = DataLoaders.from_dsets(vectors(40), vectors(n), bs=20)
    f = found(plain(dls, nn.Linear(4,2)).preflight(1)).get('validation')
    assert (f is not None)==says
    if says: assert 'seeds' in f.fix # the whole data would not do

def vectors(n, classes=True): return [(torch.randn(4), torch.tensor(i%2) if classes else torch.randn(1)) for i in range(n)]

def test_validation_asks_for_more_of_the_data_where_they_are_enough():
    f = found(plain(DataLoaders.from_dsets(vectors(3000), vectors(480), bs=100), nn.Linear(4,2)).preflight(1))['validation']
    assert f.fix=='dblock.splitter = RandomSplitter(valid_pct=0.25)' and f.args=='--valid-pct 0.25'

def test_nothing_to_validate_on():
    assert 'nothing to validate on' in found(plain(DataLoaders.from_dsets(vectors(40), bs=20), nn.Linear(4,2)).preflight(1))['validation'].what

def test_regression_and_many_labels_have_no_interval():
    dls = DataLoaders.from_dsets(vectors(40, False), vectors(20, False), bs=20)
    look = quiet(Learner(dls, nn.Linear(4,1), loss_func=MSELossFlat())).preflight(1)
    assert not look.findings and 'not have one class each' in look.skipped['validation']
    many = [(torch.randn(4), torch.tensor([1.,0.])) for _ in range(40)]
    look = quiet(Learner(DataLoaders.from_dsets(many, many, bs=20), nn.Linear(4,2), loss_func=BCEWithLogitsLossFlat())).preflight(1)
    assert not look.findings and 'not have one class each' in look.skipped['validation']

def test_masks_have_no_interval():
    pairs = [(torch.randn(3,8,8), torch.zeros(8,8).long()) for _ in range(40)]
    look = quiet(Learner(DataLoaders.from_dsets(pairs, pairs, bs=20), nn.Conv2d(3,2,1), loss_func=CrossEntropyLossFlat(axis=1))).preflight(1)
    assert not look.findings and {'validation','classes','overlap'}<set(look.skipped)

def test_decay(dls):
    learn = stock(dls, 'test_vit', opt_func=Adam, wd=.1)
    f = found(learn.preflight(1, lr=1e-3))['decay']
    assert 'pos_embed' in f.what and 'Weight decay of 0.1' in f.what and f.fix=='learn.split(fused=True)'
    assert 'decay' not in found(learn.split(fused=True).preflight(1)) # as the line says
    assert 'decay' in found(stock(dls, 'test_vit', opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), wd=.1).preflight(1, lr=1e-3))

def test_decay_is_silent_without_decay_or_wishes(dls):
    assert 'decay' not in found(stock(dls, 'test_vit', wd=0.).preflight(1, lr=1e-3))
    assert 'decay' not in found(stock(dls, 'resnet10t', wd=.1).preflight(1, lr=1e-3))
    frozen = stock(dls, 'test_vit', wd=.1)
    frozen.freeze()
    assert 'decay' not in found(frozen.preflight(1, lr=1e-3)) # what is frozen is not decayed

def test_random_layers_by_their_rates(learn):
    trained_norms(learn)
    f = found(learn.preflight(2, lr=1e-4))['random_layers']
    assert "rate of 0.0001" in f.what and "'head'" in f.what and f.fix=="learn.fit_one_cycle(2, 'preset')"
    assert 'random_layers' not in found(learn.preflight(2, lr='preset')) and 'random_layers' not in found(learn.preflight(2, lr=slice(1e-5,1e-3)))
    assert 'random_layers' not in found(learn.preflight(2, 'lp_ft')) # the head comes first
    assert 'random_layers' in found(learn.preflight(2, 'uniform'))

def test_a_stock_learner_has_random_layers_too(dls):
    learn = stock(dls)
    learn.pretrained = True
    trained_norms(learn)
    assert found(learn.preflight(1, lr=1e-3))['random_layers'].fix=='learn.fit_one_cycle(1, slice(0.001, 0.01))'
    assert 'random_layers' not in found(learn.preflight(1, lr=slice(1e-4,1e-3)))
    learn.fit(1, 1e-3)
    assert 'trained before' in learn.preflight(1, lr=1e-3).skipped['random_layers']

def test_random_layers_by_their_norms(learn):
    assert 'not pretrained' in found(learn.preflight(1))['random_layers'].what
    trained_norms(learn)
    name,m = next((n,m) for n,m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d) and 'layer3' in n)
    m.reset_parameters()
    f = found(learn.preflight(1))['random_layers']
    assert repr(name) in f.what and f.fix==f"learn.split(new=[{name.rpartition('.')[0]!r}])"
    assert 'random_layers' not in found(learn.split(new=[name.rpartition('.')[0]]).preflight(1)) # as the line says

def test_classes(tmp_path):
    path = images(tmp_path/'d', dict(ant=10, bee=10, cow=1))
    for n,says in ((2,True), (3,False)):
        images(tmp_path/f'more{n}', dict(cow=n-1), seed=n)
        files = sorted(path.rglob('*.png'))+sorted((tmp_path/f'more{n}').rglob('*.png'))
        dls = ImageDataLoaders.from_path_func(path, files, lambda o: o.parent.name, valid_pct=0., bs=8, num_workers=0)
        f = found(plain(dls, own_net()).preflight(1)).get('classes')
        assert (f is not None)==says
        if says: assert "1 of 3 classes" in f.what and "'cow' (2)" in f.what and "['cow']" in f.fix

def test_overlap_by_path_and_by_bytes(tmp_path):
    path = images(tmp_path/'d', dict(ant=6, bee=6))
    files = sorted(path.rglob('*.png'))
    def _look(files, valid):
        dls = ImageDataLoaders.from_path_func(path, files, lambda o: o.parent.name, valid_pct=0., bs=4, num_workers=0)
        two = ImageDataLoaders.from_path_func(path, valid, lambda o: o.parent.name, valid_pct=0., bs=4, num_workers=0)
        return plain(DataLoaders(dls.train, two.train.new(shuffle=False, drop_last=False)), own_net()).preflight(1)
    assert 'overlap' not in found(_look(files[:4]+files[6:10], files[4:6]+files[10:]))
    f = found(_look(files, files[:2]))['overlap']
    assert '2 are the same file' in f.what and 'Of 2 files' in f.what and 'unique' in f.fix
    other = tmp_path/'valid'/'ant'
    other.mkdir(parents=True)
    shutil.copy(files[0], other)                                                                   # a copy
    Image.fromarray(np.zeros((32,32,3), dtype=np.uint8)).save(other/files[1].name)                 # only its name
    assert '1 have the same name and the same bytes' in found(_look(files, sorted(other.iterdir())))['overlap'].what
    assert 'overlap' not in found(_look(files, [other/files[1].name]))
    (tmp_path/'link.png').symlink_to(files[3])
    assert '1 are the same file' in found(_look(files, [tmp_path/'link.png']))['overlap'].what

def test_no_steps():
    dls = DataLoaders.from_dsets(vectors(6), vectors(6), bs=8, drop_last=True)
    look = plain(dls, nn.Linear(4,2)).preflight(3)
    f = found(look)['no_steps']
    assert look.n_steps==0 and len(dls.train)==0 and 'a batch has 8' in f.what and 'bs=2' in f.fix and f.args=='--bs 2'
    assert 'no_steps' not in found(plain(DataLoaders.from_dsets(vectors(8), vectors(6), bs=8), nn.Linear(4,2)).preflight(1)) # one batch
    acc = plain(DataLoaders.from_dsets(vectors(8), vectors(6), bs=8), nn.Linear(4,2)).preflight(1, cbs=GradientAccumulation(64))
    assert 'a step is taken after 8' in found(acc)['no_steps'].what

def test_step():
    f = found(plain(DataLoaders.from_dsets(vectors(8), vectors(8), bs=4), nn.Linear(5,2)).preflight(1))['step']
    assert 'RuntimeError' in f.what and 'shapes cannot be multiplied' in f.what and 'learn.dls.one_batch()' in f.fix
    bare = plain(DataLoaders.from_dsets(vectors(8), vectors(8), bs=4), nn.Linear(4,2)).preflight(1)
    assert 'step' not in found(bare) and bare.memory>0 and bare.seconds>0

# ---- what it tells

def test_phases_and_groups_are_those_of_the_fit(learn):
    look = learn.preflight(2, 'lp_ft')
    assert [(p['epochs'], p['steps'], p['on']) for p in look.phases]==[(10,20,'cached features'), (2,4,'data')] and look.n_steps==24
    n = len(learn.layer_groups)
    assert look.phases[0]['trains']==f'1 of {n} groups' and [g['lrs'][0] for g in look.groups[:-1]]==[None]*(n-1)
    learn.fit_strategy('lp_ft', 2)
    assert [g['lrs'][1] for g in look.groups]==pytest.approx(learn.peak_lrs)
    assert [g['group'] for g in look.groups]==learn.layer_groups.names and look.groups[-1]['new']

def test_a_list_of_phases_and_a_preset_of_its_own_length(learn):
    "A picture and a look show the rates of the fit, which depend on the phase's length"
    phases = [Phase(1, frozen=-1), Phase(2, 'preset')]
    look = learn.preflight(strategy=phases)
    assert [p['steps'] for p in look.phases]==[2,4]
    learn.fit_strategy(phases)
    assert [g['lrs'][1] for g in look.groups]==pytest.approx(learn.peak_lrs)

def test_text_tables_and_pickle(learn):
    look = learn.preflight(1)
    assert pickle.loads(pickle.dumps(look))==look and last_preflight(learn) is look and last_preflight(ours(learn.dls)) is None
    s,h = str(look),look._repr_html_()
    assert all(f.fix in s and f.name in h for f in look.findings) and '--size 176' in look.text(command=True) and '--size 176' not in s
    look.findings.append(PreflightFinding('norms', 'they differ', 'learn.split(train_norm=True)'))
    assert 'Fix: in Python, learn.split(train_norm=True)' in look.text(command=True) and 'in Python' not in str(look)
    look.findings.append(PreflightFinding('classes', '<script>alert(1)</script>', 'x<y'))
    assert '<script' not in look._repr_html_()

# ---- nothing is changed

@pytest.mark.parametrize('how', [{}, dict(strategy='lp_ft'), dict(strategy='surgical'), dict(strategy='auto'), dict(lr=slice(1e-5,1e-3))])
def test_everything_is_as_it_was(learn, how):
    learn.fit_one_cycle(1, 1e-3)
    before = state(learn)
    learn.preflight(2, **how)
    unchanged(before, state(learn))

def test_a_stock_learner_is_as_it_was_and_trains_as_without(dls):
    ends = []
    for look in (False,True):
        set_seed(0)
        learn = stock(dls)
        for dl in learn.dls.loaders: dl.rng = random.Random(3)
        set_seed(3)
        if look:
            learn.create_opt()
            learn.recorder.values = L()
            before = state(learn)
            learn.preflight(1, 'lp_ft'), learn.preflight(1, lr=1e-3)
            unchanged(before, state(learn))
        learn.fit_one_cycle(1, 1e-3)
        ends.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a,b in zip(*ends))

def test_everything_is_as_it_was_after_an_error(learn, monkeypatch):
    before = state(learn)
    def _stop(look): raise KeyboardInterrupt
    monkeypatch.setitem(fg._finders, 'size', _stop)
    with pytest.raises(KeyboardInterrupt): learn.preflight(1)
    unchanged(before, state(learn))

def test_a_finding_that_fails_is_told(learn, monkeypatch):
    def _broken(look): raise KeyError('x')
    monkeypatch.setitem(fg._finders, 'size', _broken)
    assert learn.preflight(1).skipped['size']=="KeyError: 'x'"

# ---- what it refuses

@pytest.mark.parametrize('how,msg', [(dict(n_epoch=0), 'at least 1'), (dict(n_epoch=1, strategy='lpft'), "Did you mean 'lp_ft'"), (dict(n_epoch=1, strategy='lp_ft', lr=1e-3), 'its own rates'),
    (dict(n_epoch=1, lr='presets'), 'Did you mean'), (dict(n_epoch=1, lr=[1e-3,1e-2]), '2 learning rates')])
def test_errors_are_those_of_the_fit(learn, how, msg):
    before = state(learn)
    with pytest.raises(DiscriminativeError, match=msg): learn.preflight(**how)
    unchanged(before, state(learn))

def test_a_preset_needs_groups(dls):
    with pytest.raises(PresetError, match='layer groups'): stock(dls).preflight(1, lr='preset')

def test_tables(tmp_path):
    "Some checks work on tabular data, and the others say why they do not"
    import pandas as pd
    from fastai.tabular.all import Categorify,CategoryBlock,TabularDataLoaders,tabular_learner
    df = pd.DataFrame(dict(a=np.random.randn(60), b=['x','y']*30, y=['p','q','r']*20))
    dls = TabularDataLoaders.from_df(df, tmp_path, procs=[Categorify], cat_names=['b'], cont_names=['a'], y_names='y', y_block=CategoryBlock(),
        valid_idx=list(range(20)), bs=16)
    look = quiet(tabular_learner(dls, layers=[8])).preflight(2)
    assert look.n_steps==4 and [f.name for f in look.findings]==['validation'] and {'size','classes','overlap'}<set(look.skipped)
