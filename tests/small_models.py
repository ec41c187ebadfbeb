"The small models that newer timm has for tests, for the oldest timm that we support, so that the tests need no other models there"
import warnings
import pytest,timm
from packaging.version import Version
from timm.models import convnext,resnet,vision_transformer
from timm.models._registry import generate_default_cfgs,register_model

def newer(arch):
    "`arch` as a parameter of tests that older versions of timm run without"
    # An architecture that timm does not have cannot be split. With the newest timm nothing is skipped, so that a wrong name fails
    missing = Version(timm.__version__)<Version('1.0.31') and not timm.is_model(arch)
    return pytest.param(arch, marks=pytest.mark.skipif(missing, reason=f'timm {timm.__version__} has no {arch}'))

def _add(mod, create, name, cfg, **model_args):
    "Add model `name` to module `mod` of timm, as timm's own are"
    def _f(pretrained=False, **kwargs): return create(name, pretrained=pretrained, **{**model_args, **kwargs})
    _f.__name__ = _f.__qualname__ = name
    _f.__module__ = mod.__name__
    setattr(mod, name, _f)
    mod.default_cfgs.update(generate_default_cfgs({f'{name}.r160_in1k': mod._cfg(hf_hub_id='timm/', input_size=(3,160,160), **cfg)}))
    register_model(_f)

def add_small_models():
    "Does nothing where timm has them"
    if timm.is_model('test_resnet'): return
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Overwriting test_vit') # the oldest has one of a fixed size
        _add(vision_transformer, vision_transformer._create_vision_transformer, 'test_vit', {},
            patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, dynamic_img_size=True)
    _add(convnext, convnext._create_convnext, 'test_convnext', dict(pool_size=(5,5)), depths=(1,2,4,2), dims=(24,32,48,64), norm_eps=1e-5)
    _add(resnet, resnet._create_resnet, 'test_resnet', dict(pool_size=(5,5), first_conv='conv1.0'), block=resnet.BasicBlock, layers=(1,1,1,1),
        stem_width=16, stem_type='deep', avg_down=True, channels=(32,48,48,96))
