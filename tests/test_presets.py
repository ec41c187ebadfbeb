"Presets: every architecture and checkpoint, the published layer-decay tables and timm as oracles, scaling, and bad input"
import csv,importlib.util,math,pickle,re,time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, timm, torch

from fastai_discriminative import presets
from fastai_discriminative.presets import *
from fastai_discriminative.backbone import has_batch_norm
from fastai_discriminative.core import read_data
from fastai_discriminative.presets import _combine,_default_head_lr,_find_regime,_nearest,_recipes_of,_regime_preset,_table,_unregistered,_usable
from fastai_discriminative.registry import *

torch.set_num_threads(1)
table = _table()
layer_decay_rows = [r for r in table.values() if re.fullmatch(r'[\d.]+', r['layer_decay']) and re.search(r'= ?(14|26|34|42)( |$)|^(14|26)$', r['lr_groups'])]

# ## Oracles

@pytest.fixture(scope='module')
def vit_b(): return timm.create_model('vit_base_patch16_224')

@pytest.mark.parametrize('decay', [0.65, 0.75])
def test_rates_equal_timm_layer_decay(vit_b, decay):
    try: from timm.optim import param_groups_layer_decay
    except ImportError: from timm.optim.optim_factory import param_groups_layer_decay
    scales = sorted({g['lr_scale'] for g in param_groups_layer_decay(vit_b, layer_decay=decay)})
    assert len(scales)==14
    p = Preset(decay**13, 1)
    np.testing.assert_allclose(p.lrs([i/13 for i in range(14)]), scales, rtol=1e-12)
    np.testing.assert_allclose(p.lrs(14), scales, rtol=1e-12)

@pytest.mark.parametrize('ident,decay,n', [(3,0.8,14), (1,0.7,14), (118,0.65,14), (117,0.75,26), (56,0.75,26), (57,0.75,34)])
def test_published_layer_decay_tables(ident, decay, n):
    "ConvNeXt 22k and 1k, BEiT-B and -L, MAE-L and -H: each value of decay**(n-1-i), and the printed end-to-end ratio"
    r = table[ident]
    assert float(r['layer_decay'])==decay
    np.testing.assert_allclose(Preset(r['lr']*r['ratio'], r['lr']).lrs(n), r['lr']*decay**np.arange(n-1, -1, -1), rtol=1e-12)
    printed = r['derived_bottom_lr_ratio']
    digits = len(printed.partition('e')[0].replace('.', '').lstrip('0'))
    assert float(f'%.{digits-1}e' % r['ratio'])==float(printed)

@pytest.mark.parametrize('r', layer_decay_rows, ids=lambda r: str(r['id']))
def test_ratio_column_agrees_with_the_printed_one(r): assert r['ratio']==pytest.approx(float(r['derived_bottom_lr_ratio']), rel=0.04)

def test_layer_decay_rows_are_covered(): assert len(layer_decay_rows)>30

def test_convnext_recipe_end_to_end(): assert 1/table[3]['ratio']==pytest.approx(18.2, abs=0.05)

# ## Rule 5: depth decides, not the number of groups

def test_rates_follow_depth():
    p = Preset(1e-6, 1e-3, 5)
    fine,coarse = p.lrs(25),p.lrs([0, 1/3, 2/3, 1])
    np.testing.assert_allclose(fine[[0,8,16,24]], coarse, rtol=1e-12)
    assert coarse[-1]==p.head_lr==pytest.approx(5e-3)

def test_groups_protocol():
    class Groups(list): depths = [0., .5, 1.]
    p = Preset(1e-6, 1e-4, 20)
    np.testing.assert_allclose(p.lrs(Groups([SimpleNamespace(is_head=o) for o in (False,False,True)])), [1e-6, 1e-5, 2e-3])
    np.testing.assert_allclose(p.lrs(Groups([SimpleNamespace(is_head=False)]*3)), [1e-6, 1e-5, 1e-4])
    np.testing.assert_allclose(p.lrs((0., .5, 1.)), p.lrs(np.array([0, .5, 1])))
    np.testing.assert_allclose(p.lrs(1), [1e-4])
    assert p.lrs([0, 1]).dtype==float

@pytest.mark.parametrize('bad', [0, -1, [], [-.1, 1], [0, 1.1], [0, float('nan')], 'abc', None, True, [[0,1]]])
def test_bad_groups(bad):
    with pytest.raises(PresetError): Preset(1e-6, 1e-4).lrs(bad)

# ## Every name

names = timm.list_models()+timm.list_pretrained()

def test_every_architecture_and_checkpoint_has_a_preset():
    start = time.perf_counter()
    for o in names:
        p = preset_for(o)
        assert 0<p.lr_low<=p.lr_high<=p.head_lr and p.head_mult>=1 and p.bs==64 and p.optimizer=='adamw' and p.note, o
        assert p.regime in preset_regimes and p.family, o
        assert 1e-3<=p.head_lr<=5e-3, (o, p)
        assert 1e-7<=p.lr_high<=2.5e-3 and p.ratio>=1e-5, (o, p)
        if not p.sources: assert 'no p' in p.note, o
    assert time.perf_counter()-start < 60

def test_measured_is_what_the_benchmark_measured():
    rows = read_data('measured.csv')
    assert {r['arch'] for r in rows}=={o.partition('.')[0] for o in names if preset_for(o).measured}
    for r in rows:
        p = preset_for(r['arch'], bs=int(r['bs']), n_steps=int(r['steps']), size=int(r['size']))
        assert p.measured and p.regime==r['regime'] and 'not measured' not in repr(p)
        assert not preset_for(r['arch'], regime='random').measured
    for size in {r['size'] for r in rows}: # a preset is tried on nothing, so it does not go beyond what was best; rates in the middle of the body, as the best ones differ in ratio
        best = math.prod(mids := [float(r['best_lr_high'])*float(r['best_ratio'])**.5 for r in rows if r['size']==size])**(1/len(mids))
        p = preset_for(r['arch'], bs=32, n_steps=180, size=int(size))
        assert .2*best<(p.lr_low*p.lr_high)**.5<best
    assert not preset_for('convnext_tiny.fb_in22k').measured

def test_every_pretrained_tag_has_a_regime_by_rule():
    assert [o for o in timm.list_pretrained() if not _find_regime(o.partition('.')[2], o.partition('.')[0])] == []
    found = {regime_of(*reversed(o.split('.', 1))) for o in timm.list_pretrained()}
    assert found=={*preset_regimes}-{'random','lm'} # no timm checkpoint is without weights, or made of text

@pytest.mark.parametrize('name,regime', [
    ('resnet50.a1_in1k','supervised'), ('resnet50.tv_in1k','supervised'), ('resnet50.ram_in1k','supervised'), ('vit_base_patch16_224.sam_in1k','supervised'),
    ('swin_tiny_patch4_window7_224.ms_in22k','supervised_large'), ('vit_base_patch16_224.augreg_in21k','supervised_large'), ('convnext_nano.in12k','supervised_large'),
    ('resnext101_32x8d.fb_swsl_ig1b_ft_in1k','supervised_large'), ('resnet50.fb_ssl_yfcc100m_ft_in1k','supervised_large'), ('regnety_320.swag_ft_in1k','supervised_large'),
    ('tf_efficientnet_b0.ns_jft_in1k','supervised_large'), ('mvitv2_base_cls.fb_inw21k','supervised_large'),
    ('convnext_tiny.fb_in22k_ft_in1k','intermediate'), ('convnext_base.clip_laion2b_augreg_ft_in12k_in1k','intermediate'), ('beit_base_patch16_224.in22k_ft_in22k','intermediate'),
    ('vit_base_patch16_clip_224.openai_ft_in12k','intermediate'), ('convnextv2_tiny.fcmae_ft_in22k_in1k','intermediate'), ('hiera_tiny_224.mae_in1k_ft_in1k','intermediate'),
    ('vit_base_patch16_224.mae','mim'), ('convnextv2_tiny.fcmae','mim'), ('eva02_base_patch14_224.mim_in22k','mim'), ('vit_huge_patch14_gap_224.in22k_ijepa','mim'), ('aimv2_huge_patch14_224.apple_pt','mim'),
    ('vit_base_patch16_clip_224.openai','clip'), ('convnext_base.clip_laion2b','clip'), ('vit_base_patch16_siglip_224.webli','clip'), ('fastvit_mci0.apple_mclip','clip'), ('resnet50_clip.yfcc15m','clip'),
    ('vit_pe_core_base_patch16_224.fb','clip'), ('eva02_base_patch16_clip_224.merged2b','clip'), ('convnext_base.clip_laion2b_ft_320','clip'), ('vit_so400m_patch14_siglip_gap_224.pali_pt','clip'),
    ('vit_base_patch16_224.dino','ssl'), ('vit_small_patch14_dinov2.lvd142m','ssl'), ('convnext_tiny.dinov3_lvd1689m','ssl'), ('regnety_320.seer','ssl'), ('vit_base_patch16_radio_v3.c_radio','ssl'),
    ('nfnet_f0.','random')])
def test_regimes(name, regime): assert regime_of(*reversed(name.split('.', 1)))==regime

def test_regime_default_and_override():
    assert regime_of('something_new')=='supervised'
    p = preset_for('vit_base_patch16_224', regime='random')
    assert p.regime=='random' and p.ratio==1 and p.head_mult==1 and p.sources==[]
    assert preset_for('nfnet_f0').regime=='random'

def test_models_and_functions():
    import torchvision
    m = timm.create_model('convnext_femto.d1_in1k')
    assert preset_for(m)==preset_for('convnext_femto.d1_in1k')
    assert preset_for(timm.models.resnet18)==preset_for('resnet18')
    for o in (torchvision.models.resnet18, torchvision.models.vgg11):
        p = preset_for(o)
        assert p.regime=='supervised' and 'tag unknown' in p.note

# ## Where the numbers come from

def test_table_is_whole():
    assert sorted(table)==list(range(1, 231))
    assert all(r['source'] and r['source_type'] and r['confidence'] for r in table.values())
    assert {r['regime'] for r in table.values()} <= {*preset_regimes, ''}
    assert {r['units'] for r in table.values()}=={'adamw','sgd','other'}

@pytest.mark.parametrize('word', ['LAMB', 'RMSProp', 'LARS', 'SGDP'])
def test_other_units_are_never_used(word):
    rows = [r for r in table.values() if word in r['optimizer']]
    assert rows and not any(_usable(r, u) for r in rows for u in ('adamw','sgd'))

def test_dense_and_video_rows_are_never_used():
    assert not any(_usable(r, u) for r in table.values() if r['task'] not in ('classification','resolution','text') for u in ('adamw','sgd'))

def test_text_rows_serve_text_alone():
    text = {r['id'] for r in table.values() if r['task']=='text'}
    assert text and not any(text&set(preset_for(o).sources) for o in names)

def test_sources_are_the_rows_used():
    for o in names:
        p = preset_for(o)
        rows = p.recipes()
        assert [r['id'] for r in rows]==p.sources and all(_usable(r, 'adamw') for r in rows)
        if not rows: continue
        lr = [r['lr']*math.sqrt(64/r['bs']) for r in rows]
        assert min(lr)*.999<=p.lr_high<=max(lr)*1.001 and min(r['ratio'] for r in rows)*.999<=p.ratio<=max(r['ratio'] for r in rows)*1.001

@pytest.mark.parametrize('fam', [f for f in list_families() if f.recipes] or [None], ids=lambda f: f.name if f else 'none')
def test_registered_recipes_exist_and_are_usable(fam):
    if fam is None: pytest.skip('no family brings recipes')
    for regime,ids in fam.recipes.items():
        assert regime in preset_regimes and ids
        for i in ids: assert _usable(table[i], 'adamw') or _usable(table[i], 'sgd'), (fam.name, regime, i)

class OwnNet(torch.nn.Linear): pass

def test_a_familys_own_rates(own_families):
    own = Preset(1e-5, 1e-4, 5, bs=128)
    register_family('own', archs='OwnNet', recipes=dict(supervised=own))(lambda m: [m])
    m = OwnNet(4, 2)
    assert preset_for(m, bs=128)==replace(own, regime='supervised', family='own', note='rates that the family was registered with; pretrained tag unknown, taken as supervised on ImageNet-1k')
    p = preset_for(m, bs=512, n_steps=100, size=64)
    assert (p.lr_low, p.lr_high, p.head_lr)==pytest.approx((2e-5, 2e-4, 1e-3)) and p.law is None and not p.sources
    assert preset_for(m, regime='ssl').lr_high==preset_for('resnet18', regime='ssl').lr_high, 'the mean of the regime, as for any family without recipes'
    with pytest.raises(PresetError, match="family 'own' for 'supervised' are for adamw. For sgd, give your own"): preset_for(m, optimizer='sgd')
    register_family('own', archs='OwnNet', recipes=dict(super=own), exist_ok=True)(lambda m: [m])
    with pytest.raises(PresetError, match="Unknown regime 'super' of family 'own'. Did you mean 'supervised'"): preset_for(m)

def test_unregistered_recipes_are_usable():
    for fam,recipes in _unregistered.items():
        for regime,ids in recipes.items(): assert regime in preset_regimes and all(_usable(table[i], 'adamw') or _usable(table[i], 'sgd') for i in ids), (fam, regime)

def test_combination_by_hand():
    p = _combine([table[i] for i in (55,56)], 'adamw')
    assert p.lr_high==pytest.approx(math.sqrt(2e-3*4e-3)/4) and p.ratio==pytest.approx(math.sqrt(0.65**13*0.75**25))
    assert p.head_lr==pytest.approx((1e-3*5e-3*2e-5*100*math.sqrt(2))**(1/3))
    assert _combine([table[3]], 'adamw').wd==1e-8

def test_head_target():
    assert 1e-3<_default_head_lr('adamw')<5e-3
    assert _combine([table[179]], 'sgd').head_mult==pytest.approx(10)
    assert _combine([table[222]], 'adamw').head_lr==pytest.approx(1e-3)

def test_nothing_published():
    p = preset_for('ghostnet_100.in1k')
    assert p.sources==[] and not p.measured and 'no published recipe' in p.note and p.recipes()==[]
    assert (p.lr_low,p.lr_high)==(_regime_preset('supervised','adamw').lr_low, _regime_preset('supervised','adamw').lr_high)

def test_cached_presets_are_not_shared():
    p = preset_for('ghostnet_100.in1k')
    p.sources.append(1)
    p.lr_low = p.lr_high
    assert preset_for('ghostnet_100.in1k').sources==[] and preset_for('ghostnet_100.in1k').ratio<1

@pytest.mark.parametrize('name,ids', [('convnext_base.fb_in22k',[3]), ('convnext_large.fb_in1k',[]), ('vit_base_patch16_224.mae',[55]), ('vit_large_patch16_224.mae',[56]),
    ('beit_base_patch16_224.in22k_ft_in22k',[116]), ('convnextv2_tiny.fcmae',[16]), ('maxvit_tiny_tf_224.in1k',[]), ('deit_base_patch16_224.fb_in1k',[105])])
def test_rows_of_known_checkpoints(name, ids):
    fam = find_family(name)
    if not _recipes_of(fam): pytest.skip(f'family {fam.name} brings no recipes')
    assert preset_for(name).sources==ids

def test_mae_is_the_published_recipe():
    if not _recipes_of(find_family('vit_base_patch16_224')): pytest.skip('family brings no recipes')
    p = preset_for('vit_base_patch16_224.mae', bs=1024)
    assert p.lr_high==pytest.approx(2e-3) and p.ratio==pytest.approx(0.65**13)

def test_nearest_keeps_unsized_and_uniform_rows():
    assert [r['id'] for r in _nearest([table[i] for i in (115,116,122,124)], 'beitv2_large_patch16_224')]==[124]
    assert [r['id'] for r in _nearest([table[i] for i in (131,132,133)], 'eva02_tiny_patch14_224')]==[131]
    assert len(_nearest([table[i] for i in (75,76,78)], 'vit_small_patch14_dinov2'))==3
    assert len(_nearest([table[i] for i in (223,225)], 'resnet50'))==2
    assert _nearest([], 'resnet50')==[]

# ## Scaling

def test_scaling_rule():
    p = preset_for('vit_base_patch16_224.mae')
    q = preset_for('vit_base_patch16_224.mae', bs=16)
    assert q.lr_high==pytest.approx(p.lr_high/2) and q.ratio==pytest.approx(p.ratio) and q.head_mult==p.head_mult and q.bs==16
    assert preset_for('vit_base_patch16_224.mae', bs=8, accum=4, world_size=2)==p
    s = Preset(1e-3, 1e-2, optimizer='sgd')
    assert s.scaled(128).lr_high==pytest.approx(2e-2)
    assert s.scaled(256).scaled(64)==s

def test_sgd_and_adamw_never_mix():
    a = Preset(1e-3, 1e-2)
    assert a.scaled(256).lr_high==pytest.approx(2e-2) and Preset(1e-3, 1e-2, optimizer='sgd').scaled(256).lr_high==pytest.approx(4e-2)
    assert preset_for('resnetv2_50x1_bit.goog_in21k', optimizer='sgd').optimizer=='sgd'

# ## Bad input

@pytest.mark.parametrize('kw,word', [
    (dict(lr_low=1e-3, lr_high=1e-5), 'Reversed.*Preset\\(1e-05, 0.001\\)'), (dict(lr_low=-1e-5, lr_high=1e-3), 'lr_low.*positive'), (dict(lr_low=0, lr_high=1e-3), 'freeze'),
    (dict(lr_low=float('nan'), lr_high=1e-3), 'finite'), (dict(lr_low=1e-5, lr_high=float('inf')), 'finite'), (dict(lr_low='abc', lr_high=1), 'number'), (dict(lr_low=None, lr_high=1), 'number'),
    (dict(lr_low=1e-5, lr_high=1e-3, head_mult=0), 'head_mult'), (dict(lr_low=1e-5, lr_high=1e-3, bs=0), 'bs'), (dict(lr_low=1e-5, lr_high=1e-3, optimizer='adanw'), 'Did you mean'),
    (dict(lr_low=1e-5, lr_high=1e-3, optimizer=None), 'Unknown optimizer')])
def test_bad_presets(kw, word):
    with pytest.raises(PresetError, match=word): Preset(**kw)

@pytest.mark.parametrize('kw', [dict(bs=0), dict(bs=-1), dict(bs=float('nan')), dict(accum=0), dict(world_size=0), dict(bs='many')])
def test_bad_batches(kw):
    with pytest.raises(PresetError, match=next(iter(kw))): preset_for('resnet18', **kw)

def test_bad_names():
    with pytest.raises(FamilyError, match='Did you mean'): preset_for('convnext_tny')
    with pytest.raises(PresetError, match="Did you mean 'adam"): preset_for('resnet18', optimizer='adamm')
    with pytest.raises(PresetError, match="Did you mean 'supervised"): preset_for('resnet18', regime='supervisd')
    with pytest.raises(PresetError, match='lamb.*not converted'): preset_for('resnet18', optimizer='lamb')

def test_sgd_without_rows_says_what_exists():
    with pytest.raises(PresetError, match='No published SGD recipe.*own rates'): preset_for('ghostnet_100', optimizer='sgd')
    with pytest.raises(PresetError, match='family has some for: supervised_large'): preset_for('resnetv2_50x1_bit.goog_in21k', optimizer='sgd', regime='clip')

def test_family_with_unknown_recipes():
    fam = SimpleNamespace(name='x', recipes=dict(mim=(999,)), registered=True)
    with pytest.raises(PresetError, match='999'): presets._rows_of(fam, 'mim')

def test_errors_are_value_errors_too(): assert issubclass(PresetError, ValueError) and issubclass(PresetError, DiscriminativeError)

# ## Form

def test_repr_and_pickle():
    p = preset_for('ghostnet_100.in1k')
    assert pickle.loads(pickle.dumps(p))==p
    assert len(repr(p))<200 and 'adamw' in repr(p) and 'no published recipe' in repr(p)
    assert p.slice==slice(p.lr_low, p.lr_high)

def test_table_is_what_the_script_makes(tmp_path):
    "The packaged table holds all the columns that its numbers are made from: the script run on it gives the same file"
    root = Path(__file__).parent.parent
    script = root/'tools'/'make_recipes.py'
    if not script.exists(): pytest.skip('not a source checkout')
    spec = importlib.util.spec_from_file_location('make_recipes', script)
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    with open(root/'fastai_discriminative'/'data'/'recipes.csv', encoding='utf-8', newline='') as f: rows = list(csv.DictReader(f))
    assert [*mod.KEEP, *mod.ADDED]==[*rows[0]]
    mod.main(root/'fastai_discriminative'/'data'/'recipes.csv', tmp_path/'again.csv')
    assert (tmp_path/'again.csv').read_bytes()==(root/'fastai_discriminative'/'data'/'recipes.csv').read_bytes()

# ---- steps and image size

def test_a_recipe_for_the_same_labels_is_not_one_for_new_ones():
    p = preset_for('convnext_tiny.fb_in1k')
    assert p.sources==[] and 'only change the image size' in p.note and p.lr_high==_regime_preset('supervised','adamw').lr_high
    for o in names:
        p = preset_for(o)
        assert all(r['new_task']=='yes' for r in p.recipes())

@pytest.mark.parametrize('name,short', [('resnet50.a1_in1k',2.5e-4), ('convnext_tiny.fb_in1k',3.3e-5), ('vit_base_patch16_224.mae',3.3e-5)])
def test_rates_by_the_length_of_a_fit(name, short):
    def hi(n, **kw): return preset_for(name, n_steps=n, **kw).lr_high
    long = preset_for(name).lr_high
    assert hi(180)==hi(500)==pytest.approx(short) and hi(90)==pytest.approx(short/2) and hi(10**7)==pytest.approx(long)
    between = [hi(n) for n in (500,1000,5000,20_000,10**7)]
    assert sorted(between, reverse=long<short)==between
    assert hi(180, bs=16)==pytest.approx(short/2)
    ways = preset_for(name, bs=32, n_steps=300),preset_for(name).scaled(32, n_steps=300),preset_for(name, bs=16, accum=2, n_steps=9).scaled(32, n_steps=300)
    for p in ways: assert [p.lr_low, p.lr_high, p.head_lr, p.n_steps]==pytest.approx([ways[0].lr_low, hi(300, bs=32), ways[0].head_lr, 300])

def test_heads_do_not_go_with_steps_and_short_fits_are_steep():
    for name in ('resnet50.a1_in1k','vit_base_patch16_224.mae'):
        p,q = preset_for(name, bs=32),preset_for(name, bs=32, n_steps=200, size=64)
        assert q.head_lr==pytest.approx(p.head_lr) and q.ratio==pytest.approx(min(.1, p.ratio))
        assert preset_for(name, n_steps=10**7).ratio==pytest.approx(p.ratio)
    assert preset_for('vit_base_patch16_224.mae', n_steps=10**7).head_mult>=1

def test_small_images_want_more():
    def hi(size): return preset_for('resnet50.a1_in1k', n_steps=200, size=size).lr_high # its own size is 224
    assert hi(16)==hi(70)==pytest.approx(hi(224)*3) and hi(112)==pytest.approx(2*hi(224)) and hi(224)==hi(384)==hi(None) and hi(112)>hi(160)>hi(224)

def test_rates_without_a_law_stay():
    p = Preset(1e-6, 1e-4)
    assert p.scaled(64, n_steps=100, size=64)==p and not p.is_lawful()
    for q in (preset_for('resnet18'), preset_for('resnet18', bs=16, n_steps=200, size=64)):
        assert q.is_lawful() and q.scaled(8).is_lawful()
        mine = replace(q, lr_low=1e-5, lr_high=2e-4, head_mult=3.)
        assert not mine.is_lawful() and mine.scaled(q.bs, n_steps=1000).lr_high==pytest.approx(2e-4)
        assert not replace(q, lr_low=q.lr_low/2).is_lawful()
    for q in (preset_for('resnet18', regime='random'), preset_for('resnetv2_50x1_bit.goog_in21k', optimizer='sgd')): assert q.law is None and q.scaled(64, n_steps=100)==q

@pytest.mark.parametrize('bad', [0, -3, math.nan, math.inf, 'many'])
@pytest.mark.parametrize('what', ['n_steps','size'])
def test_steps_and_sizes_that_make_no_sense(what, bad):
    with pytest.raises(PresetError, match=what): preset_for('resnet18', **{'n_steps':100, what:bad})

def test_batch_norm_is_found_in_names_and_models():
    assert [has_batch_norm(o) for o in ('resnet18','convnext_tiny','levit_128','no_such_model', True, torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))]==[True,False,True,False,True,True,False]
    m = timm.create_model('test_resnet', num_classes=0)
    assert preset_for(m, n_steps=200).lr_high==pytest.approx(2.5e-4)

def test_the_new_columns_of_the_table():
    assert table[1]['steps']==round(30*1281167/512) and (table[1]['size'],table[1]['ckpt_size'],table[1]['new_task'])==(384,224,'no')
    assert table[46]['steps']==500 and table[55]['steps']==125114 and table[42]['size']==384
    assert table[225]['steps'] is None and {r['new_task'] for r in table.values()}=={'yes','no'}
    assert all(r['new_task']=='no' for r in table.values() if r['task']!='classification')
