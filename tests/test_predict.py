"Predictions for unlabelled images: fastai's own, in the requested order and form, with a row for every image"
import shutil
from pathlib import Path

import numpy as np,pandas as pd,pytest,torch
from fastai.vision.all import (DataBlock,ImageBlock,L,MSELossFlat,MultiCategoryBlock,RandomSplitter,RegressionBlock,Resize,accuracy,get_image_files,
    set_seed,vision_learner)
from fastai_discriminative.core import DataError
from fastai_discriminative.demo import clipart_path,demo_dls,export_learner
from fastai_discriminative.predict import *

def _copy(files, to):
    to.mkdir(parents=True)
    for f in files: shutil.copy(f, to)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A competition's folder: `train/CLASS`, `test`, and a table that calls the images by their stems"
    p = tmp_path_factory.mktemp('comp')
    for c in ('flags','food'): _copy(sorted((clipart_path()/c).iterdir())[:12], p/'train'/c)
    _copy(sorted((clipart_path()/'tools').iterdir())[:5], p/'test')
    pd.DataFrame(dict(id=sorted((o.stem for o in (p/'test').iterdir()), reverse=True), n=range(5))).to_csv(p/'test.csv', index=False)
    return p

def _learner(root, vocab=None, seed=0):
    set_seed(seed)
    dls = demo_dls(root/'train', size=32, bs=8)
    return vision_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy)

@pytest.fixture(scope='module')
def learn(root): return _learner(root)

def _fails(msg, f, *args, **kwargs):
    with pytest.raises(DataError, match=msg): f(*args, **kwargs)

def test_order_of_the_table_and_of_the_folder(root):
    ids = list(pd.read_csv(root/'test.csv').id)
    for o in (root, root/'test.csv'):
        images = find_images(o)
        assert (images.ids,[f.stem for f in images.files],images.column)==(ids,ids,'id')
    assert find_images(root/'test').ids==sorted(f'{o}.webp' for o in ids)
    assert find_images(find_images(root)).ids==ids and len(find_images(list((root/'test').iterdir())))==5

def test_labelled_images_are_not_asked_about(tmp_path, root):
    shutil.copytree(root/'train', tmp_path/'train')
    _fails('Its folders `train`', find_images, tmp_path)
    _copy([next((root/'test').iterdir())], tmp_path/'other')
    assert [f.parent.name for f in find_images(tmp_path).files]==['other']

@pytest.mark.parametrize('rows,msg', [(['nobody'], 'is not an image'), ([], 'has no rows'), (['twin'], 'stands for several files')])
def test_a_table_that_names_what_is_not_there(rows, msg, tmp_path, root):
    src = next((root/'test').iterdir())
    for d in 'ab':
        (tmp_path/d).mkdir()
        shutil.copy(src, tmp_path/d/f'twin{src.suffix}')
    pd.DataFrame(dict(id=rows)).to_csv(tmp_path/'test.csv', index=False)
    _fails(msg, find_images, tmp_path)

@pytest.mark.parametrize('path,msg', [('nowhere','does not exist'), ('file.txt','neither a folder nor a table'), ('empty','No images to predict'), ('bad.csv','cannot be read as a table')])
def test_no_images(path, msg, tmp_path):
    (tmp_path/'file.txt').write_text('x')
    (tmp_path/'empty').mkdir()
    (tmp_path/'bad.csv').write_bytes(b'\xff\xfe\x00"')
    _fails(msg, find_images, tmp_path/path)

def test_predictions_are_fastais(learn, root):
    p = predict_images(learn, root)
    theirs,_,dec = learn.get_preds(dl=learn.dls.test_dl(p.images.files), with_decoded=True)
    assert np.allclose(p.preds, theirs, atol=1e-6) and p.labels==[learn.dls.vocab[i] for i in dec]
    assert np.array_equal(p.preds, predict_images(learn, root, bs=2).preds) or np.allclose(p.preds, predict_images(learn, root, bs=2).preds, atol=1e-5)

def test_random_numbers_and_the_learner_stay(learn, root):
    before,state = {k:v.clone() for k,v in learn.model.state_dict().items()},torch.get_rng_state()
    a = predict_images(learn, root, tta=2, seed=1)
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    again,other = (predict_images(learn, root, tta=2, seed=s).preds for s in (1,2))
    assert np.array_equal(a.preds, again) and not np.array_equal(a.preds, other)

def test_files_folders_and_ensembles(learn, root, tmp_path):
    other = _learner(root, seed=1)
    for i,o in enumerate((learn,other)): export_learner(o, tmp_path/f'learner-{i}.pkl')
    mean = (predict_images(learn, root).preds+predict_images(other, root).preds)/2
    for o in (tmp_path, [tmp_path/'learner-0.pkl', str(tmp_path/'learner-1.pkl')], [learn,other]): assert np.allclose(predict_images(o, root).preds, mean, atol=1e-6)

def test_classes_in_another_order(learn, root):
    "Two learners of one task may have their classes in different orders"
    other = _learner(root)
    other.model.load_state_dict(learn.model.state_dict())
    other.dls.vocab.items = L(reversed(other.dls.vocab.items)) if isinstance(other.dls.vocab.items, L) else list(reversed(other.dls.vocab.items))
    p = predict_images([learn,other], root)
    assert np.allclose(p.preds, .5, atol=1e-6)

def test_other_classes_are_refused(learn, root, tmp_path):
    for c in ('flags','music'): _copy(sorted((clipart_path()/c).iterdir())[:8], tmp_path/'train'/c)
    _fails('do not predict the same classes', predict_images, [learn,_learner(tmp_path)], root)

@pytest.mark.parametrize('content,msg', [(None,'No learner'), (b'x','cannot be loaded'), (dict(a=1),'cannot be loaded|contains a dict')])
def test_no_learner(content, msg, root, tmp_path):
    f = tmp_path/'learner.pkl'
    if isinstance(content, bytes): f.write_bytes(content)
    elif content: torch.save(content, f)
    _fails(msg, predict_images, f, root)

def test_an_image_that_cannot_be_opened_has_a_row(learn, root, tmp_path):
    _copy((root/'test').iterdir(), tmp_path/'test')
    (tmp_path/'test'/'broken.png').write_bytes(b'no image')
    with pytest.warns(UserWarning, match='1 image cannot be opened.*broken.png'): p = predict_images(learn, tmp_path)
    i = [f.name for f in p.images.files].index('broken.png')
    assert len(p.labels)==6 and np.allclose(p.preds[i], np.delete(p.preds, i, 0).mean(0), atol=1e-6)

# ---- the shape of the answer

def _shaped(p, **cols): return p.table(pd.DataFrame(dict(id=p.images.ids[:2], **cols)))

def test_labels_and_probabilities(learn, root):
    p = predict_images(learn, root)
    assert p.table().values.tolist()==[list(o) for o in zip(p.images.ids, p.labels)]
    assert _shaped(p, label='food').label.tolist()==p.labels[:2]
    t = _shaped(p, food=.5, flags=.5)
    assert list(t.columns)==['id','food','flags'] and np.allclose(t[['flags','food']].values.astype(float), p.preds[:2])
    assert np.allclose(p.table(pd.DataFrame(dict(id=p.images.ids[:2], target=.5)), positive='food').target.astype(float), p.preds[:2,1])

@pytest.mark.parametrize('cols,kw,msg', [(dict(food=1,flag=1),{},"Did you mean 'flags'"), (dict(target=.5),{},r"`positive='food'` \(--positive food\)"), (dict(target=.5),dict(positive='fod'),"Did you mean 'food'")])
def test_a_sample_that_does_not_fit(cols, kw, msg, learn, root):
    p = predict_images(learn, root)
    _fails(msg, p.table, pd.DataFrame(dict(id=p.images.ids[:2], **cols)), **kw)
    _fails('asks for a probability', p.table, positive='food')
    _fails('1 row without a prediction', p.table, pd.DataFrame(dict(id=['nobody'], label='x')))

@pytest.mark.parametrize('pre,suf', [('prob_',''), ('','_probability'), ('is ','?')])
def test_headings_with_one_text_before_and_after_all_classes(pre, suf, learn, root):
    p = predict_images(learn, root)
    t = _shaped(p, **{f'{pre}food{suf}':0, f'{pre}flags{suf}':0})
    assert list(t)==['id',f'{pre}food{suf}',f'{pre}flags{suf}'] and np.allclose(t[[f'{pre}flags{suf}',f'{pre}food{suf}']].values.astype(float), p.preds[:2])

@pytest.mark.parametrize('cols', [('class_0','class_1'), ('prob_flags','p_food'), ('prob_flags',), ('prob_flags','prob_food','prob_other')])
def test_headings_that_are_not_understood(cols, learn, root):
    if len(cols)>1: _fails(r"The sample's columns.*as in 'prob_CLASS'.*--like.*`p.preds`", _shaped, predict_images(learn, root), **dict.fromkeys(cols, .5))
    else: _fails('Choose the class', _shaped, predict_images(learn, root), **dict.fromkeys(cols, .5))

def test_classes_that_begin_alike(root):
    "`class_1` is not `class_11`, and the order is that of the sample"
    images = UnseenImages([Path('a.png')], ['a'], 'id')
    p = Predictions(images, np.arange(12.)[None], [str(i) for i in range(12)], ['11'])
    t = p.table(pd.DataFrame(dict(id=['a'], **{f'class_{i}':0 for i in (11,1,0,*range(2, 11))})))
    assert t.iloc[0,1:].tolist()==[11.,1.,0.,*range(2, 11)]

@pytest.mark.parametrize('like,positive,msg', [(dict(class_0=1,class_1=2),None,'are not class names'), (dict(target=.5),None,'Choose the class'), (dict(target=.5),'fod',"Did you mean 'food'"), (None,'food','asks for a probability')])
def test_a_sample_is_checked_before_the_first_image(like, positive, msg, learn, root, monkeypatch):
    def _early(*a): raise AssertionError('an image was predicted')
    monkeypatch.setattr('fastai_discriminative.predict._preds', _early)
    ids = find_images(root).ids
    _fails(msg, predict_images, learn, root, like=like and pd.DataFrame(dict(id=ids, **like)), positive=positive)
    _fails('without a prediction', predict_images, learn, root, like=pd.DataFrame(dict(id=['nobody'], label='x')))
    _fails('cannot be read as a table', predict_images, learn, root, like=root/'none.csv')

def test_saved_whole(learn, root, tmp_path):
    p = predict_images(learn, root)
    f = p.save(tmp_path/'submission.csv')
    assert pd.read_csv(f).equals(p.table()) and [o.name for o in tmp_path.iterdir()]==['submission.csv']

def test_several_labels_and_numbers(root):
    files = get_image_files(root/'train')
    kw = dict(get_items=get_image_files, splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    def _dls(block, get_y): return DataBlock((ImageBlock,block), get_y=get_y, **kw).dataloaders(root/'train', bs=8)
    def _two(f): return [f.parent.name, 'drawing']
    def _size(f): return float(len(f.name))
    many = predict_images(vision_learner(_dls(MultiCategoryBlock, _two), 'test_resnet', pretrained=False), root)
    assert all(set(o.split())<={'flags','food','drawing'} for o in many.labels) and many.preds.shape==(5,3)
    number = predict_images(vision_learner(_dls(RegressionBlock, _size), 'test_resnet', pretrained=False, n_out=1, loss_func=MSELossFlat()), root)
    assert number.classes is None and np.allclose(number.labels, number.preds[:,0])
    assert number.table(pd.DataFrame(dict(id=number.images.ids, size=0.))).shape==(5,2)

# ---- folds

def test_folds_deal_out_each_image_once(root):
    folds = image_folds(root/'train', 3)
    assert np.array_equal(sum(np.array(f.is_valid, int) for f in folds), np.ones(24))
    assert all([f.labels[i] for i,v in enumerate(f.is_valid) if v].count('food')==4 for f in folds)
    assert [f.is_valid for f in image_folds(root/'train', 3)]==[f.is_valid for f in folds]!=[f.is_valid for f in image_folds(root/'train', 3, seed=1)]

@pytest.mark.parametrize('n', [1, 0, 2.5, 13])
def test_folds_that_cannot_be(n, root): _fails('n_folds' if n<2 or n==2.5 else 'fewer images than there are folds', image_folds, root/'train', n)

def test_out_of_fold(root):
    learners = [vision_learner(demo_dls(f, size=32, bs=8), 'test_resnet', pretrained=False) for f in image_folds(root/'train', 2)]
    oof = fold_predictions(learners)
    assert len(set(oof.images.files))==24 and oof.targets==[Path(o).parent.name for o in oof.images.files]
    k = len(learners[0].dls.valid_ds)
    assert np.allclose(oof.preds[k:], learners[1].get_preds()[0], atol=1e-6) and 0<=oof.accuracy<=1
    _fails('true labels of these images are unknown', lambda: predict_images(learners, root).accuracy)

# ---- labels in a table, and samples of other forms

def test_a_sample_that_calls_images_by_a_number_of_the_table(learn, root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    names = sorted(o.name for o in (tmp_path/'test').iterdir())
    pd.DataFrame(dict(row=['4','3','2','1','0'], image=names, site=['a','a','b','b','b'])).to_csv(tmp_path/'test.csv', index=False)
    p = predict_images(learn, tmp_path)
    assert p.images.column=='image' and p.images.ids==names
    t = p.table(pd.DataFrame(dict(food=[0]*5, row=list('01234'), flags=0)))
    assert list(t.columns)==['food','row','flags'] and np.allclose(t[['flags','food']].values.astype(float), p.preds[::-1])
    assert p.table(pd.DataFrame(dict(row=['2'], label='food'))).values.tolist()==[['2',p.labels[2]]]
    _fails("1 row without a prediction, such as 'a' in column 'site'", p.table, pd.DataFrame(dict(site=['a'], label='food')))

def test_the_names_need_not_come_first(learn, root):
    p = predict_images(learn, root/'test')
    t = p.table(pd.DataFrame(dict(label='x', file=[o.rpartition('.')[0] for o in p.images.ids])))
    assert list(t.columns)==['label','file'] and list(t.label)==p.labels

def test_a_name_twice_in_the_table(root, tmp_path):
    shutil.copytree(root/'test', tmp_path/'test')
    o = next((root/'test').iterdir()).stem
    pd.DataFrame(dict(id=[o,o])).to_csv(tmp_path/'test.csv', index=False)
    _fails(f"names images more than once: '{o}'", find_images, tmp_path)

def test_from_a_table_to_a_submission_in_python(root, tmp_path):
    files = sorted((root/'train').rglob('*.webp'))
    _copy(files, tmp_path/'train')
    shutil.copytree(root/'test', tmp_path/'test')
    pd.DataFrame(dict(id=[f.stem for f in files], kind=[f.parent.name for f in files])).to_csv(tmp_path/'train.csv', index=False)
    pd.DataFrame(dict(id=sorted(o.stem for o in (root/'test').iterdir()), kind='food')).to_csv(tmp_path/'sample_submission.csv', index=False)
    learners = [vision_learner(demo_dls(f, size=32, bs=8), 'test_resnet', pretrained=False) for f in image_folds(tmp_path, 2)]
    oof = fold_predictions(learners)
    assert dict(zip(oof.images.files, oof.targets))=={tmp_path/'train'/f.name:f.parent.name for f in files}
    export_learner(learners[0], tmp_path/'learner.pkl')
    out = predict_images(tmp_path/'learner.pkl', tmp_path).save(tmp_path/'s.csv', like=tmp_path/'sample_submission.csv')
    df = pd.read_csv(out)
    assert list(df)==['id','kind'] and len(df)==5 and set(df.kind)<={'flags','food'}

def test_a_learner_that_is_not_there_has_near_matches(root, tmp_path):
    (tmp_path/'discriminative-birds').mkdir()
    _fails("No learner .*discriminative-bird'. Did you mean 'discriminative-birds'\\? Give a file .* or the folder that `finetune` made", predict_images, tmp_path/'discriminative-bird', root)
