"""Make `fastai_discriminative/data/recipes.csv`, the table of published fine-tuning recipes that ships with the package.

    python tools/make_recipes.py [RAW.csv] [OUT.csv]   # by default from tools/recipes_raw.csv

Copies the columns people read (with their source) and adds the ones the code computes with. A number that the text does not settle stays empty,
and a row with an empty number is never used. `FIXES` holds the few rows whose text needs a human reading; each says why.
"""
import csv,re,sys
from pathlib import Path

KEEP = '''id family models pretraining task_dataset optimizer lr_as_stated batch_size lr_scaling_rule abs_peak_lr layer_decay lr_groups derived_bottom_lr_ratio
    head_lr_multiplier weight_decay epochs bn_handling source source_type confidence'''.split()
ADDED = 'regime task units lr bs ratio head_mult stem sizes steps size ckpt_size new_task'.split()
SIZES = 'atto femto pico nano tiny small medium base large xlarge huge giant'

IMAGES = {  # task_dataset, without its image size -> training images; data sets of several sizes, or of one's own, are not here
    'ImageNet-1k':1281167, 'ImageNet':1281167, 'ImageNet 1% labels':12811, 'ImageNet 1%':12811, 'ImageNet 10% labels':128116, 'ImageNet-1k + 5 shifts':1281167,
    'ImageNet-1k fine-tune (paper Table 5)':1281167, 'ImageNet classification full fine-tune':1281167, 'ImageNet-1k higher resolution':1281167,
    'CIFAR-10':50000, 'CIFAR-100':50000, 'CIFAR-10 / CIFAR-100':50000, 'CIFAR-10/100':50000, 'CIFAR':50000, 'CIFAR-100 fine-tune':50000, 'CIFAR-100 mixup fine-tune':50000,
    'CIFAR-10 (vit_jax)':50000, 'CUB-200-2011':5994, 'CUB-200':5994, 'beans (1k images)':1034, 'Stanford Dogs':12000, 'hymenoptera (2 classes)':244, 'Kaggle Paddy disease':10407,
    'Oxford Pets':3680, 'Flowers102 quick start':1020, 'IMDb':25000, 'MS-COCO multi-label':82081, 'VTAB-1k':1000}

FIXES = {  # id -> columns
    30: dict(ratio=''),                    # 0.9 per block over blocks that the row does not count
    65: dict(lr=2e-3, bs=512), 66: dict(lr=1e-3, bs=512),  # stated per shard of 512
    78: dict(lr=5e-5, bs=512), 79: dict(lr=3e-4, bs=512),  # stated before the linear rule, whose base is 512
    98: dict(lr=1.2e-5),                   # best of 71 runs on ImageNet
    101: dict(units='other'),              # SGDP and AdamP
    113: dict(lr=0.01, bs=768, units='sgd'),  # "as DeiT#45"
    130: dict(bs=1024),                    # the 224 px model; 512 is for 336 px
    144: dict(bs=384),                     # the D2 model; 240 is for D3
    168: dict(lr=1e-5, ratio=1, steps=750),           # second phase, of 4 epochs; the ratio in the text compares two phases, not two layers
    195: dict(head_mult='', lr=''),        # a grid; x10 is an ablation
    200: dict(stem='', sizes=''), 203: dict(stem='', sizes=''), 223: dict(lr=5e-5, ratio=1, head_mult=100, stem='', sizes=''),  # names of several models, or no size at all
    201: dict(task='classification'),      # multi-label classification on COCO images
    204: dict(lr=''),                      # the same 0.01 at batch 64 and 512
    208: dict(units='adamw'),              # 2e-4 is the Adam / AdamW run; SGD has no rate in the row
    222: dict(lr=1e-5, ratio=1, head_mult=100),  # timm strings get two groups in fastai: body base_lr/2/100, head base_lr/2
    224: dict(lr=2e-5, ratio=1, head_mult=100, bs=32, steps=925),  # geometric mean of the two rates swept, 1e-5 and 4e-5; 5 epochs of 5,912 pets
    225: dict(regime='supervised'), 226: dict(lr=''),  # 226: two recipes in one row
    228: dict(regime='lm', ratio=1/2.6**4, head_mult=1)}  # 2.6 from each of the five groups to the next, the head's included

def _num(s, pat=r'([\d.]+(?:e-?\d+)?)'):
    m = re.fullmatch(pat, s.strip())
    return float(m[1]) if m else ''

def regime(r):
    "What the checkpoint was trained on, from the words of the row"
    s = r['pretraining']
    if re.search(r'intermediate|MIM \+ IN|->1k', s): return 'intermediate'
    if re.search(r'FCMAE|SparK|SimMIM|MAE|MaskFeat|MIM|BEiT', s): return 'mim'
    if re.search(r'MoCo / CLIP|13 SSL|various|any|defaults|not found|LM$|WikiText|SAM|strikes', s): return ''
    if re.search(r'CLIP|SigLIP', s): return 'clip'
    if re.search(r'iBOT|DINO|MoCo|EsViT|SwAV|Barlow|VICReg|SimCLR|SEER', s): return 'ssl'
    return 'supervised' if 'IN-1k' in s or s.startswith('supervised') else 'supervised_large'

def task(r):
    "`classification`; `resolution` if only the image size changes and the labels stay; or why the row is neither"
    s = r['task_dataset']
    if r['family'].startswith('ULMFiT'): return 'text'
    if 'Kinetics' in s: return 'video'
    if re.search(r'COCO|ADE20K|detection|segmentation|place recognition', s): return 'dense'
    if re.match(r'ImageNet-2[12]k', s): return 'checkpoint'
    same_labels = re.match('ImageNet-1k', s) and (regime(r)=='supervised' or '->1k' in r['pretraining'])
    return 'resolution' if same_labels else 'classification'

def units(r):
    s = r['optimizer']
    if re.match(r'(fastai )?(v1 )?Adam(W|$| \()|fastai.*Adam', s): return 'adamw'
    return 'sgd' if re.match(r'SGD($| )(?!/)', s) and 'SGDP' not in s else 'other'

def lr_bs(r):
    "Peak rate of the pretrained body (not of a separate head) and the batch it was used at"
    s = r['abs_peak_lr']
    if m := re.match(r'([\d.e-]+) @(\d+)', s): return float(m[1]), float(m[2])
    lr = _num(s, r'(?:.*(?:backbone|trunk) )?([\d.]+(?:e-?\d+)?)(?: stated|, head .*)?')
    b = r['batch_size']
    m = re.search(r'= (\d+)\)?$', b) if 'per GPU' in b or 'per card' in b else re.match(r'(\d+)(?=$| \(| in the| base)', b)
    return lr, float(m[1]) if m else ''

def ratio(r):
    "Rate of the first layer over the rate at the end of the body: 1 for one rate, or one rate for the body and another for the head"
    if r['layer_decay'].startswith(('none (uniform','2 groups')): return 1.0
    printed,decay = _num(r['derived_bottom_lr_ratio']),_num(r['layer_decay'])
    n = re.search(r'(?:^|= )(\d+)(?: scale values.*)?$', r['lr_groups'])
    if printed == '' or decay == '' or not n: return printed
    exact = decay**(int(n[1])-1)
    assert abs(exact/printed-1) < 0.04, (r['id'], exact, printed)
    return exact

def head_mult(r): return _num(r['head_lr_multiplier'], r'([\d.]+)(?: \(.*\))?')

def stem_sizes(r):
    "Name stem and sizes, so that a preset can prefer the rows nearest to an architecture"
    s = re.sub(r'\bvit-([bl])\b', lambda m: 'vit_'+dict(b='base', l='large')[m[1]], r['models'].lower().replace('google/', '').replace('clip ', ''))
    sizes = re.findall(rf"(?<![a-z])({SIZES.replace(' ', '|')})(?![a-z])", s)
    stem = re.match(r'([a-z]+[a-z0-9]*)[_-]', s)
    return (stem[1], ' '.join(dict.fromkeys(sizes))) if stem and sizes else ('', '')

def sizes_px(r):
    "Image size of the recipe, and of the checkpoint where the row tells that it was another, in pixels"
    px = re.findall(r'@(\d{3})', r['task_dataset']) or re.findall(r'@(\d{3})\b', r['models'])
    was = re.search(r'(?:^|\D)([1-6]\d[0248])(?: supervised| \+|\)|$)|@(\d{3})', r['pretraining'])
    return px[0] if len(set(px))==1 else '', (was[1] or was[2]) if was else ''

def steps(r, bs):
    "Steps of the optimiser: stated, or epochs x images / batch; empty where the source does not tell"
    e = r['epochs']
    if m := re.match(r'(\d+) steps', e): return int(m[1])
    n = IMAGES.get(re.sub(r' @.*', '', r['task_dataset']))
    m = re.match(r'(\d+)(?= \(\+| head|$)', e)
    return round(int(m[1])*n/float(bs)) if n and m and bs else ''

def make(rows):
    for r in rows:
        o = {k: r[k] for k in KEEP}
        o['lr'],o['bs'] = lr_bs(r)
        o['stem'],o['sizes'] = stem_sizes(r)
        o.update(regime=regime(r), task=task(r), units=units(r), ratio=ratio(r), head_mult=head_mult(r))
        o['size'],o['ckpt_size'] = sizes_px(r)
        o.update(FIXES.get(int(r['id']), {}))
        if 'steps' not in o: o['steps'] = steps(r, o['bs'])
        o['new_task'] = 'yes' if o['task']=='classification' else 'no'
        yield {k: f'{v:.17g}' if k=='ratio' and v != '' else f'{v:.6g}' if isinstance(v, float) else v for k,v in o.items()}

def main(src=Path(__file__).parent/'recipes_raw.csv', dst=Path(__file__).parent.parent/'fastai_discriminative'/'data'/'recipes.csv'):
    rows = list(make(csv.DictReader(open(src, newline='', encoding='utf-8'))))
    with open(dst, 'w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, KEEP+ADDED, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    used = sum(o['task'] in ('classification','resolution') and o['units']!='other' and '' not in (o['lr'], o['bs'], o['ratio']) for o in rows)
    print(f'{dst}: {len(rows)} rows, {used} of them usable')

if __name__ == '__main__': main(*sys.argv[1:])
