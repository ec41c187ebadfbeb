"Checkpoints from files: some load, and others are refused by name"
import warnings

import pytest,timm,torch
from torch import nn
from fastai.vision.all import Normalize,resnet18

from fastai_discriminative.all import *
from helpers import *

# ---- checkpoints

def tensors(ckpt): return torch.load(ckpt/'w.pth', weights_only=True)

def check_loaded(learn, sd):
    got = learn.model[0].model.state_dict()
    for k in got: assert torch.equal(got[k], sd[k]), k
    assert learn.opt.frozen_idx==len(learn.layer_groups)-1
    assert 'state_dict' not in str(learn.model[0].model.pretrained_cfg.keys()) and 'state_dict' not in learn.model[0].model.default_cfg

def save_as(kind, sd, path):
    from safetensors.torch import save_file
    if kind=='safetensors':
        save_file(sd, path/'a.safetensors')
        return path/'a.safetensors'
    wrap = dict(pth=lambda: sd, state_dict=lambda: dict(state_dict=sd, epoch=3), model=lambda: dict(model=sd),
        ema=lambda: dict(state_dict={k:torch.zeros_like(v) for k,v in sd.items()}, state_dict_ema=sd),
        module=lambda: {f'module.{k}':v for k,v in sd.items()}, compiled=lambda: {f'_orig_mod.{k}':v for k,v in sd.items()}, both=lambda: {f'_orig_mod.module.{k}':v for k,v in sd.items()},
        params=lambda: {k:nn.Parameter(v) if v.is_floating_point() else v for k,v in sd.items()},
        headless=lambda: {k:v for k,v in sd.items() if not k.startswith('fc.')})[kind]
    torch.save(wrap(), path/'a.pth')
    return path/'a.pth'

@pytest.mark.parametrize('kind', ['pth','safetensors','state_dict','model','ema','module','compiled','both','params','headless'])
def test_weights_come_from_a_file(dls, ckpt, tmp_path, kind):
    sd = tensors(ckpt)
    file = save_as(kind, sd, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn = quiet(discriminative_learner(dls, 'resnet10t', weights_file=str(file) if kind=='pth' else file))
    check_loaded(learn, sd)
    assert any(isinstance(o, Normalize) for o in dls.after_batch.fs)

@pytest.mark.parametrize('opt', ['adam','fused_adamw'])
@pytest.mark.parametrize('with_opt', [True,False])
def test_weights_come_from_a_fastai_learner(dls, tmp_path, opt, with_opt):
    learn = warm(dls, opt, path=tmp_path)
    file = learn.save('x', with_opt=with_opt)
    if opt=='adam' and with_opt: # fastai pickles its own classes into this file, so it cannot be read without running code
        with pytest.raises(WeightsError, match='with_opt=False'): discriminative_learner(dls, 'resnet10t', weights_file=file)
    else: check_loaded(discriminative_learner(dls, 'resnet10t', weights_file=file), learn.model[0].model.state_dict())

def test_gray_images_adapt_the_first_convolution(dls, ckpt):
    sd = tensors(ckpt)
    learn = discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'w.pth', n_in=1, normalize=False)
    w = learn.model[0].model.conv1[0].weight
    assert w.shape[1]==1 and torch.allclose(w, sd['conv1.0.weight'].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(learn.model[0].model.layer4[0].conv2.weight, sd['layer4.0.conv2.weight'])

def test_other_classes_load_with_a_warning(dls, ckpt, tmp_path):
    sd = tensors(ckpt)
    sd.update({'fc.weight':torch.randn(7,512), 'fc.bias':torch.randn(7)})
    torch.save(sd, tmp_path/'seven.pth')
    with pytest.warns(UserWarning, match=r"seven.pth' has a classifier of 7 classes"):
        learn = discriminative_learner(dls, 'resnet10t', weights_file=tmp_path/'seven.pth')
    check_loaded(learn, sd)

def truncated(src, dst, share=0.6):
    b = src.read_bytes()
    dst.write_bytes(b[:int(len(b)*share)])
    return dst

class Evil:
    def __reduce__(self): return (print, ('code ran',))

def bad_file(kind, ckpt, path):
    sd = tensors(ckpt)
    if kind=='missing': return path/'w.pth'
    if kind=='folder': return path
    if kind=='truncated': return truncated(ckpt/'w.pth', path/'t.pth')
    if kind=='truncated_safe': return truncated(save_as('safetensors', sd, path), path/'t.safetensors')
    if kind=='lfs': (path/'p.pth').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n')
    if kind=='empty': (path/'p.pth').write_bytes(b'')
    if kind=='evil': torch.save(dict(sd, x=Evil()), path/'p.pth')
    if kind=='whole_model': torch.save(timm.create_model('resnet10t'), path/'p.pth')
    if kind=='other': torch.save(timm.create_model('test_byobnet').state_dict(), path/'p.pth')
    if kind=='wider': torch.save(timm.create_model('resnet18').state_dict(), path/'p.pth')
    if kind=='part': torch.save({k:v for k,v in sd.items() if 'layer3' not in k}, path/'p.pth')
    if kind=='shape': torch.save({**sd, 'layer1.0.conv1.weight':torch.zeros(3,3)}, path/'p.pth')
    if kind=='list': torch.save([1,2], path/'p.pth')
    if kind=='no_tensor': torch.save(dict(epoch=3), path/'p.pth')
    return path/'p.pth'

@pytest.mark.parametrize('kind,words', [('missing',['No checkpoint file','w.pth']), ('folder',['No checkpoint file']), ('truncated',['t.pth','truncated']),
    ('truncated_safe',['t.safetensors','truncated']),
    ('lfs',['cannot be read']), ('empty',['cannot be read']), ('evil',['cannot be read','weights_only=False','save_file']), ('whole_model',['weights_only=False']),
    ('other',["does not fit 'resnet10t'","missing","architecture"]), ('wider',["does not fit 'resnet10t'"]), ('part',["does not fit 'resnet10t'",'layer3']), ('shape',["does not fit 'resnet10t'",'layer1.0.conv1.weight']),
    ('list',['no model weights']), ('no_tensor',['no model weights'])])
def test_bad_checkpoints_are_named(dls, ckpt, tmp_path, capsys, kind, words):
    was = list(dls.after_batch.fs)
    with pytest.raises(WeightsError) as e: discriminative_learner(dls, 'resnet10t', weights_file=bad_file(kind, ckpt, tmp_path))
    for w in words: assert w in str(e.value)
    assert 'code ran' not in capsys.readouterr().out
    assert list(dls.after_batch.fs)==was

def test_a_missing_file_names_its_neighbours(dls, ckpt):
    with pytest.raises(WeightsError, match=r"Did you mean 'w.pth'\?|Here are: w.pth"): discriminative_learner(dls, 'resnet10t', weights_file=ckpt/'ww.pth')

def test_a_file_needs_a_timm_name(dls, ckpt):
    with pytest.raises(WeightsError, match='timm architecture name'): discriminative_learner(dls, resnet18, pretrained=False, weights_file=ckpt/'w.pth')

def test_a_failed_load_leaves_torch_alone(dls, ckpt, tmp_path):
    orig = nn.Module.load_state_dict
    with pytest.raises(WeightsError): discriminative_learner(dls, 'resnet10t', weights_file=bad_file('shape', ckpt, tmp_path))
    assert nn.Module.load_state_dict is orig
