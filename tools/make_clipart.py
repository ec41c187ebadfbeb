"""Make `fastai_discriminative/data/clipart.zip` and its data card from Debian's public-domain `openclipart-png`.

    python tools/make_clipart.py                     # apt-get download, dpkg -x, select, write zip and card
    python tools/make_clipart.py --deb FILE.deb --sheet sheet.png

Needs Pillow and numpy, and Debian's `apt-get` and `dpkg`. The same package and the same Pillow give the same bytes."""
import argparse, hashlib, io, re, subprocess, sys, tempfile, zipfile
from pathlib import Path
import numpy as np, PIL
from PIL import Image, ImageDraw, features

Image.MAX_IMAGE_PIXELS = None  # `_load` has its own limit
PKG,ROOT = 'openclipart-png','usr/share/openclipart/png'
# class -> folders of the package that it takes; a leading '-' leaves a folder or a file out (by prefix)
_lines = """
animals    animals -animals/fantasy
buildings  buildings -buildings/furniture
clothing   people/clothing -people/clothing/pantyhose
devices    computer/hardware computer/icons/etiquette-theme/devices computer/icons/flat-theme/device computer/icons/lemon-theme/devices electronics office/telephone
flags      signs_and_symbols/flags -signs_and_symbols/flags/semaphore -signs_and_symbols/flags/historic
food       food
music      recreation/music
people     people -people/clothing -people/smilies -people/bodypart -people/stickmen
plants     plants
sports     recreation/sports
tools      tools -tools/weapons -tools/toys
transport  transportation -transportation/roadsigns -transportation/aiga-symbols"""
CLASSES = {c:' '.join(spec) for c,*spec in map(str.split, _lines.strip().splitlines())}
# left out by file name: photographs of known people, copies of well-known works, pictures that render as 'Linked Image Not Found', nudes, and strays
_skip = """martin_luther john_coltrane jazz_enrique brozo_the my_lovely_baby van_gogh jacob_leisler stylized_yoga gabbiano_architetto stripper sexy_lady hide_girl
female_rollandin elfish_girl silhouette_female silhouette_male safety_pin samoa_tatoo fire_engine gender_ ampelfrau ampelmaenn"""
SKIP = re.compile('|'.join(_skip.split()))

def _members(root, spec):
    "Files of the class `spec`, sorted; links between categories are left out: an image with two labels teaches neither"
    inc,exc = [o for o in spec.split() if o[0]!='-'],tuple(o[1:] for o in spec.split() if o[0]=='-')
    fs = sorted({p for o in inc for p in (root/o).rglob('*.png') if p.is_file() and not p.is_symlink() and not SKIP.match(p.name)})
    return [p for p in fs if not p.relative_to(root).as_posix().startswith(exc or ('\0',))]

def _load(p, side):
    "`p` on white, cut to its drawing, centred in a `side` x `side` RGB square; None when blank, unreadable, huge or a sliver"
    try:
        im = Image.open(p)
        if im.width*im.height>25e6: return None
        im = im.convert('RGBA')
    except Exception: return None
    if max(im.size)>1200: im.thumbnail((1200,1200), Image.LANCZOS)
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    ink = np.abs(255-np.asarray(im).astype(int)).max(2)>16
    if ink.mean()<.01: return None
    ys,xs = np.flatnonzero(ink.any(1)),np.flatnonzero(ink.any(0))
    im = im.crop((int(xs[0]), int(ys[0]), int(xs[-1])+1, int(ys[-1])+1))
    if min(im.size)<24 or max(im.size)/min(im.size)>5: return None
    k = (side-4)/max(im.size)
    im = im.resize([max(1, round(o*k)) for o in im.size], Image.LANCZOS)
    res = Image.new('RGB', (side,side), 'white')
    res.paste(im, ((side-im.width)//2, (side-im.height)//2))
    return None if np.asarray(res).astype(float).std()<8 else res

def _hash(im):
    "(256-bit difference hash, coarse colours): two near-duplicates are close in both"
    g = np.asarray(im.convert('L').resize((17,16), Image.BOX)).astype(int)
    return (g[:,1:]>g[:,:-1]+2).ravel(), np.asarray(im.resize((8,8), Image.BOX)).astype(int).ravel()

def _same(a, b, bits, col): return (np.count_nonzero(a[0]!=b[0], -1)<=bits) & (np.abs(a[1]-b[1]).mean(-1)<=col)

def select(root, cap, side, bits, col):
    "dict class -> [(name, image)], and the counts of what was dropped"
    root,ims,drop = Path(root),[],dict(blank=0, near_duplicate=0, two_classes=0, over_cap=0)
    for c,spec in CLASSES.items():
        for p in _members(root, spec):
            im = _load(p, side)
            if im is None: drop['blank'] += 1
            else: ims.append((c, p.relative_to(root).with_suffix('').as_posix(), im, _hash(im)))
    H,C = (np.stack([o[3][i] for o in ims]) for i in (0,1))
    labels,keep = np.array([o[0] for o in ims]),np.ones(len(ims), bool)
    for i,(c,_,_,h) in enumerate(ims):
        near = np.flatnonzero(_same(h, (H,C), bits, col))
        why = 'two_classes' if (labels[_same(h, (H,C), bits//2, col/2)]!=c).any() else 'near_duplicate' if keep[near[near<i]].any() else None
        if why is None: continue
        keep[i] = False
        drop[why] += 1
    res = {}
    for c in CLASSES:
        mine = sorted((o for o,k in zip(ims, keep) if k and o[0]==c), key=lambda o: hashlib.sha1(o[1].encode()).hexdigest())
        drop['over_cap'] += max(0, len(mine)-cap)
        res[c] = sorted(((o[1],o[2]) for o in mine[:cap]), key=lambda o: o[0])
    return res,drop

def encode(im, fmt, q):
    "Bytes of `im`"
    b = io.BytesIO()
    if fmt=='webp': im.save(b, 'WEBP', quality=q, method=6)
    elif fmt=='jpg': im.save(b, 'JPEG', quality=q, optimize=True, progressive=True)
    else: im.quantize(q, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(b, 'PNG', optimize=True)
    return b.getvalue()

def _name(path, seen):
    "A short ASCII file name, the author's part kept; unique in its class"
    s = re.sub(r'[^A-Za-z0-9]+', '_', path.split('/')[-1]).strip('_').lower()
    n,k = s,2
    while n in seen: n,k = f'{s}_{k}',k+1
    seen.add(n)
    return n

def write_zip(sets, dst, fmt, q):
    "Write the zip with fixed dates, order and modes; return its size in bytes"
    with zipfile.ZipFile(dst, 'w') as z:
        for c,ims in sets.items():
            seen = set()
            for path,im in ims:
                zi = zipfile.ZipInfo(f'clipart/{c}/{_name(path, seen)}.{fmt}', (1980,1,1,0,0,0))
                zi.external_attr,zi.create_system,zi.compress_type = 0o644<<16,3,zipfile.ZIP_STORED if fmt!='png' else zipfile.ZIP_DEFLATED
                z.writestr(zi, encode(im, fmt, q))
    return Path(dst).stat().st_size

CARD = """# Clip art, 12 classes

{n} drawings, {side} x {side} px, RGB on white, {fmt} (quality {q}), {mb:.2f} MB. A small set of real images for demos, tests and lessons: small enough to
ship, hard enough that pretrained features matter.

- **Source**: Debian package `{pkg}` {version} (Open Clip Art Library 0.18).
- **Licence**: public domain (Creative Commons Public Domain Dedication, as `/usr/share/doc/{pkg}/copyright` states). File names keep the authors' names
  where the package has them.
- **Layout**: `clipart/CLASS/NAME.{ext}`; no split is fixed.
- **SHA-256** of `clipart.zip`: `{sha}`

| class | images | folders of the package (`-`: left out) |
|---|---|---|
{rows}

**How it was made**: `python tools/make_clipart.py` (Pillow {pil}, libwebp {webp}). Every PNG of the folders above, links left out; put on white, cut to the drawing, centred
in a square. Dropped: {blank} blank, unreadable, above 25 megapixels or thinner than 1:5; {two_classes} that occur under two classes; {near_duplicate} near-duplicates (256-bit difference
hash and 8 x 8 colours both close); {over_cap} above the cap of {cap} a class, chosen by the SHA-1 of the path. Left out on purpose: weapons, historic flags,
furniture, smilies, stick figures, road signs and pictograms, which look like no other member of their class; photographs of known people, copies of
well-known works, broken renderings and nudes (`SKIP` in the script).

**Limits**: labels are the library's folders and carry some noise (a farmer with a cow is filed once); several drawings may be by one author or from one series, so a
random split is a little optimistic; classes are unequal ({lo} to {hi}).
"""

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    data = Path(__file__).parent.parent/'fastai_discriminative/data'
    ap.add_argument('--deb', type=Path, help='openclipart-png_*.deb; downloaded with apt-get when absent')
    ap.add_argument('--out', type=Path, default=data/'clipart.zip')
    ap.add_argument('--sheet', type=Path, help='also write a contact sheet PNG here')
    for n,t,d in (('cap',int,200), ('side',int,96), ('fmt',str,'webp'), ('q',int,70), ('bits',int,16), ('col',float,8.)): ap.add_argument(f'--{n}', type=t, default=d)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        if a.deb is None:
            subprocess.run(['apt-get', 'download', PKG], cwd=tmp, check=True)
            a.deb = next(Path(tmp).glob('*.deb'))
        subprocess.run(['dpkg', '-x', str(a.deb), f'{tmp}/x'], check=True)
        version = subprocess.run(['dpkg-deb', '-f', str(a.deb), 'Version'], check=True, capture_output=True, text=True).stdout.strip()
        sets,drop = select(Path(tmp)/'x'/ROOT, a.cap, a.side, a.bits, a.col)
    size = write_zip(sets, a.out, a.fmt, a.q)
    ns = {c:len(o) for c,o in sets.items()}
    rows = '\n'.join(f'| {c} | {n} | {CLASSES[c]} |' for c,n in ns.items())
    a.out.with_suffix('.md').write_text(CARD.format(ext=a.fmt, n=sum(ns.values()), side=a.side, fmt=dict(webp='WebP', jpg='JPEG', png='PNG')[a.fmt], q=a.q, mb=size/1e6, pkg=PKG,
        version=version, sha=hashlib.sha256(a.out.read_bytes()).hexdigest(), rows=rows, pil=PIL.__version__, webp=features.version('webp'), cap=a.cap,
        lo=min(ns.values()), hi=max(ns.values()), **drop))
    print(f'{sum(ns.values())} images, {size/1e6:.2f} MB', ns, drop)
    if a.sheet: sheet(a.out, a.sheet)

def sheet(src, dst, per=26, tile=64):
    "Contact sheet of the zip at `src`: rows of `per` tiles, a colour bar and the name for each class"
    z = zipfile.ZipFile(src)
    by = {}
    for n in z.namelist(): by.setdefault(n.split('/')[1], []).append(n)
    nrow = sum(-(-len(o)//per) for o in by.values())
    im,y = Image.new('RGB', (per*tile+80, nrow*tile), 'grey'),0
    for c,ns in by.items():
        ImageDraw.Draw(im).text((2, y+4), f'{c} {len(ns)}', fill='yellow')
        for i,n in enumerate(ns): im.paste(Image.open(z.open(n)).resize((tile,tile)), (80+i%per*tile, y+i//per*tile))
        y += -(-len(ns)//per)*tile
    im.save(dst)

if __name__=='__main__': sys.exit(main())
