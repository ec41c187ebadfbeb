"Registry: one base class for errors, registration, the most specific family, plug-ins, and every way to name a model"
import os,re,subprocess,sys
from pathlib import Path

import pytest,timm,torch,torchvision
from fastai.vision.models import xresnet
from torch import nn

from fastai_discriminative import registry
from fastai_discriminative.registry import *
from fastai_discriminative.core import near_matches
from fastai_discriminative.registry import arch_of,_default_tag,_families,split_arch

root = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures('own_families')

def _stem(m): yield m

def _meta(arch, **kwargs):
    "A model without weights, or a real one where the oldest timm cannot make it without"
    try:
        with torch.device('meta'): return timm.create_model(arch, **kwargs)
    except NotImplementedError: return timm.create_model(arch, **kwargs)

# ## Errors

@pytest.mark.parametrize('err', [FamilyError, SplitterError, PresetError, WeightsError])
def test_errors_stand_under_one_base(err):
    assert issubclass(err, DiscriminativeError) and issubclass(err, ValueError)
    assert not issubclass(DiscriminativeError, ValueError)
    with pytest.raises(DiscriminativeError, match='thing'): raise err('thing')

def test_near():
    assert near_matches('resnt', ['resnet','vgg'])==" Did you mean 'resnet'?"
    assert near_matches('resnt', ['resnet','resnet'])==" Did you mean 'resnet'?"
    assert near_matches('zzzzzz', ['resnet','vgg'])==''
    assert near_matches(None, ['resnet'])=='' and near_matches('a', [])==''

# ## Registering

def test_register_returns_the_function_and_keeps_what_was_said():
    f = register_family('mine', archs=r'my_\w+', n_groups=4, recipes=dict(ssl=(1,)), source='a paper')(_stem)
    fam = find_family('mine')
    assert f is _stem
    assert (fam.name, fam.layers, fam.archs, fam.modules, fam.n_groups, fam.recipes, fam.source)==('mine', _stem, (r'my_\w+',), (), 4, dict(ssl=(1,)), 'a paper')
    assert fam.registered and fam in list_families()

def test_duplicate_is_refused_unless_exist_ok():
    register_family('mine', archs='mynet')(_stem)
    with pytest.raises(FamilyError, match="'mine' is already registered.*exist_ok"): register_family('mine', archs='other')(_stem)
    assert find_family('mine').archs==('mynet',)
    register_family('mine', archs='other', exist_ok=True)(_stem)
    assert find_family('mine').archs==('other',) and [f.name for f in list_families()].count('mine')==1

def test_builtin_is_not_replaced_by_accident():
    with pytest.raises(FamilyError, match='already registered'): register_family('convnext', archs='convnext.*')(_stem)
    assert find_family('convnext_tiny').layers is not _stem

def test_family_that_matches_nothing_is_refused():
    with pytest.raises(FamilyError, match='neither `modules` nor `archs`'): register_family('mine')

@pytest.mark.parametrize('kw,match', [(dict(recipes=(1,2)), r"`recipes` is a dict .*such as {'supervised': \(1, 2\)}"), (dict(n_groups=1), 'from 2.*got 1'), (dict(n_groups='4'), "got '4'"), (dict(n_groups=True), 'got True')])
def test_settings_that_could_not_be_used_later(kw, match):
    with pytest.raises(FamilyError, match=f"'mine'.*{match}"): register_family('mine', archs='my_net', **kw)
    assert 'mine' not in _families

def test_families_are_sorted_and_registered():
    names = [f.name for f in list_families()]
    assert names==sorted(names) and len(set(names))==len(names)
    assert all(f.registered and f.source for f in list_families())

# ## The most specific family wins

def test_most_specific_family_wins():
    mod = 'timm.models.levit'
    assert not find_family('levit_128s').registered
    register_family('by_module', mod)(_stem)
    assert find_family('levit_128s').name=='by_module'
    register_family('by_arch', archs='levit_128.*')(_stem)
    assert find_family('levit_128s').name=='by_arch' and find_family('levit_256').name=='by_module'
    register_family('by_both', mod, 'levit_128s.*')(_stem)
    assert find_family('levit_128s').name=='by_both' and find_family('levit_128').name=='by_arch'

def test_order_of_registration_does_not_matter():
    register_family('by_both', 'timm.models.levit', 'levit_.*')(_stem)
    register_family('by_module', 'timm.models.levit')(_stem)
    register_family('by_arch', archs='levit_.*')(_stem)
    assert find_family('levit_256').name=='by_both'

def test_both_means_both():
    register_family('elsewhere', 'timm.models.resnet', 'levit_.*')(_stem)
    assert not find_family('levit_256').registered

def test_archs_match_whole_names():
    register_family('short', archs='levit_25')(_stem)
    assert not find_family('levit_256').registered

@pytest.mark.parametrize('arch,name', [('convnextv2_atto','convnextv2'), ('convnext_atto','convnext'), ('mobilenetv4_conv_small','mobilenetv4'), ('mobilenetv3_small_050','mobilenetv3'),
    ('coatnet_0_rw_224','coatnet'), ('maxvit_tiny_tf_224','maxvit'), ('coatnext_nano_rw_224','coatnet'), ('swinv2_tiny_window8_256','swinv2'), ('swinv2_cr_tiny_224','swin')])
def test_built_in_families_that_share_a_module(arch, name): assert find_family(arch).name==name

# ## Names

@pytest.mark.parametrize('x,name', [
    ('convnext_tiny','convnext'), ('convnext_tiny.fb_in22k','convnext'), ('hf-hub:timm/convnext_tiny.fb_in22k','convnext'), ('hf_hub:timm/resnet18.a1_in1k','resnet'),
    ('vit_base_patch16_224.mae','vit'), ('convnext','convnext'), ('vgg','vgg')])
def test_strings(x, name):
    fam = find_family(x)
    assert fam.name==name and fam.registered

def test_known_to_timm_only():
    fam = find_family('levit_128s.fb_dist_in1k')
    assert (fam.name, fam.registered, fam.layers, fam.recipes)==('levit', False, None, {})

def test_hub_name_outside_timm_is_left_to_timm():
    fam = find_family('hf-hub:somebody/my_own_net')
    assert fam.name=='my_own_net' and not fam.registered

@pytest.mark.parametrize('old,new,name', [('convnext_tiny_in22k','convnext_tiny.fb_in22k','convnext'), ('tf_efficientnet_b0_ns','tf_efficientnet_b0.ns_jft_in1k','efficientnet'),
    ('vit_base_patch16_224_in21k','vit_base_patch16_224.augreg_in21k','vit'), ('swin_base_patch4_window7_224_in22k','swin_base_patch4_window7_224.ms_in22k','swin')])
def test_names_that_timm_has_replaced(old, new, name):
    "timm still makes such models, so users still type them"
    assert split_arch(old)==split_arch(new)
    assert find_family(old).name==name

@pytest.mark.parametrize('bad,near', [('convnext_tny','convnext_tiny'), ('ResNet50','resnet50'), ('resnet_50','resnet50'), ('efficientnet-b0','efficientnet_b0')])
def test_unknown_name_with_near_matches(bad, near):
    with pytest.raises(FamilyError, match=f"Unknown architecture '{bad}'.*Did you mean.*{near}.*list_models"): find_family(bad)

@pytest.mark.parametrize('bad', ['qqqqqqqq', '', ' '])
def test_unknown_name_without_near_matches(bad):
    with pytest.raises(FamilyError, match='Unknown architecture') as e: find_family(bad)
    assert 'Did you mean' not in str(e.value)

def test_unknown_tag():
    with pytest.raises(FamilyError, match=r"'convnext_tiny' has no pretrained tag 'fb_in23k'.*Did you mean 'fb_in22k'.*It has: .*in12k"): find_family('convnext_tiny.fb_in23k')
    no_tags = next(o for o in timm.list_models('resnet*') if not timm.list_pretrained(f'{o}.*'))
    with pytest.raises(FamilyError, match='It has: none'): find_family(f'{no_tags}.a1_in1k')

@pytest.mark.parametrize('bad', [None, 3, 1.5, ['resnet18'], b'resnet18'])
def test_wrong_type(bad):
    with pytest.raises(FamilyError, match=f'Expected an architecture name.*got {type(bad).__name__}'): find_family(bad)

def test_split_arch():
    assert split_arch('a.b.c')==('a','b.c')
    assert split_arch('hf-hub:timm/vit_base_patch16_224.mae')==('vit_base_patch16_224','mae')

def test_default_tag():
    assert _default_tag('convnext_tiny')==timm.create_model('convnext_tiny').pretrained_cfg['tag']!=''
    assert _default_tag('no_such_net')==''

# ## Functions and models

@pytest.mark.parametrize('f,name', [
    (torchvision.models.resnet18,'tv_resnet'), (torchvision.models.wide_resnet50_2,'tv_resnet'), (torchvision.models.resnext50_32x4d,'tv_resnet'),
    (torchvision.models.vgg11_bn,'tv_vgg'), (torchvision.models.densenet121,'tv_densenet'), (torchvision.models.squeezenet1_0,'tv_squeezenet'),
    (torchvision.models.alexnet,'tv_alexnet'), (torchvision.models.ResNet,'tv_resnet'), (xresnet.xresnet18,'xresnet'), (xresnet.xse_resnext50,'xresnet'),
    (timm.models.convnext.convnext_tiny,'convnext'), (timm.models.convnext.convnextv2_atto,'convnextv2')])
def test_functions(f, name): assert find_family(f).name==name and find_family(f).registered

def test_unknown_function():
    def my_net(pretrained=False): return nn.Linear(1,1)
    assert not find_family(my_net).registered
    assert not find_family(torchvision.models.shufflenet_v2_x0_5).registered

@pytest.mark.parametrize('arch,name', [('resnet10t','resnet'), ('test_vit','vit'), ('convnext_atto','convnext'), ('cait_xxs24_224','cait')])
def test_timm_models(arch, name):
    m = _meta(arch)
    assert split_arch(arch_of(m))[0]==arch and find_family(m)==find_family(arch) and find_family(m).name==name

def test_torchvision_and_fastai_models():
    with torch.device('meta'): models = torchvision.models.resnet18(),torchvision.models.vgg11(),torchvision.models.squeezenet1_1()
    assert [find_family(m).name for m in models]==['tv_resnet','tv_vgg','tv_squeezenet']
    assert find_family(xresnet.xresnet18()).name=='xresnet'

def test_subclass_of_a_known_class():
    class MyResNet(torchvision.models.ResNet): pass
    class MyViT(timm.models.vision_transformer.VisionTransformer): pass
    a,b = MyResNet(torchvision.models.resnet.BasicBlock, [1,1,1,1]),MyViT(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    assert find_family(a).name=='tv_resnet' and find_family(b).name=='vit'

def test_model_that_nobody_knows():
    class Net(nn.Sequential): pass
    assert find_family(Net()).name=='Net' and not find_family(Net()).registered
    assert not find_family(nn.Linear(1,1)).registered

# ## Plug-ins

plugin = '''
from fastai_discriminative.registry import register_family
print('plug-in loaded')
@register_family('from_plugin', archs='PluginNet', source='a plug-in')
def _layers(m): yield m
'''

def _install(folder, name, entries, **modules):
    "A package as pip leaves it: modules and a `.dist-info` with entry points"
    info = folder/f'{name}-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (info/'entry_points.txt').write_text('[fastai_discriminative.families]\n' + '\n'.join(f'{k} = {v}' for k,v in entries.items()))
    for m,text in modules.items(): (folder/f'{m}.py').write_text(text)

def _python(folder, code):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(root)])}
    res = subprocess.run([sys.executable, '-W', 'always', '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert res.returncode==0, res.stderr
    return res.stdout.split('\n'),res.stderr

def test_plugins(tmp_path):
    "All are loaded once, on first use; a broken or missing one warns by name and stops nothing"
    _install(tmp_path, 'broken', dict(broken='broken_plugin', lost='no_such_module_anywhere'), broken_plugin='raise RuntimeError("no good")')
    _install(tmp_path, 'mine', dict(mine='my_plugin'), my_plugin=plugin)
    _install(tmp_path, 'builtins_of_ours', dict(ours='fastai_discriminative.families'))
    out,err = _python(tmp_path, '''
from fastai_discriminative.registry import *
print('imported')
print(find_family('from_plugin').source)
print('from_plugin' in [f.name for f in list_families()])
print(find_family('resnet18').registered)
''')
    assert [o for o in out if o]==['imported', 'plug-in loaded', 'a plug-in', 'True', 'True']
    assert err.count("Families of plug-in 'broken' (broken_plugin) could not be loaded: RuntimeError: no good")==1
    assert "Families of plug-in 'lost' (no_such_module_anywhere) could not be loaded: ModuleNotFoundError" in err

def test_built_in_families_come_by_the_same_door():
    "The families must be found after importing a single module"
    text = (root/'pyproject.toml').read_text()
    assert re.search(r'\[project\.entry-points\."fastai_discriminative\.families"\]\s*\n\w+ *= *"fastai_discriminative\.families"', text)

def test_plugins_are_loaded_once(monkeypatch):
    calls = []
    monkeypatch.setattr(registry, 'entry_points', lambda group: calls.append(group) or [])
    monkeypatch.setitem(registry._plugins, 'loaded', False)
    find_family('resnet18'),list_families(),find_family(nn.Linear(1,1))
    assert calls==['fastai_discriminative.families']

@pytest.mark.parametrize('typed,meant', [('effnetb0','efficientnet_b0'), ('EfficientNet-B3','efficientnet_b3'), ('effnetv2_s','efficientnetv2_s'), ('efficentnet_b0','efficientnet_b0'), ('ResNet-50','resnet50'), ('resnext50','resnext50_32x4d'),
    ('vit_b_16','vit_base_patch16_224'), ('ViT-B/16','vit_base_patch16_224'), ('google/vit-base-patch16-224','vit_base_patch16_224'), ('swin_t','swin_tiny_patch4_window7_224'), ('convnext-t','convnext_tiny'), ('convnxt_tiny','convnext_tiny'),
    ('facebook/convnext-tiny-224','convnext_tiny'), ('mobilenet_v2','mobilenetv2_100'), ('mobilenet_v3_large','mobilenetv3_large_100'), ('vgg-16','vgg16'), ('resnet118','resnet18'), ('wide_resnet50','wide_resnet50_2'), ('dinov2','vit_base_patch14_dinov2')])
def test_names_that_people_type(typed, meant):
    with pytest.raises(FamilyError) as e: find_family(typed)
    assert repr(meant) in str(e.value).partition('Did you mean ')[2]

@pytest.mark.parametrize('typed', ['xyzzy','','b0','-'])
def test_names_that_are_near_to_nothing(typed):
    with pytest.raises(FamilyError) as e: find_family(typed)
    assert 'Did you mean' not in str(e.value)

@pytest.mark.parametrize('kw,msg', [(dict(archs=nn.Linear), "named by strings. For a class: `archs='Linear'`"), (dict(archs=('X',3)), 'names 3, but'), (dict(modules=nn), 'named by strings'),
    (dict(archs='My('), r"regular expressions, and 'My\(' is none"), (dict(archs=['ok','*x']), "'\\*x' is none")])
def test_a_family_that_no_model_could_match_is_refused_and_harms_nobody(kw, msg):
    with pytest.raises(FamilyError, match=msg): register_family('odd', **kw)(lambda m: [])

@pytest.mark.parametrize('archs', ['mine', ['mine'], ('mine',), {'mine'}, (o for o in ['mine'])], ids=lambda o: type(o).__name__)
def test_names_in_any_collection(monkeypatch, archs):
    monkeypatch.setattr(registry, '_families', dict(registry._families))
    register_family('odd', archs=archs)(_stem)
    assert registry._families['odd'].archs==('mine',)
    assert 'odd' not in _families and find_family(nn.Linear(2,2)).layers is None
