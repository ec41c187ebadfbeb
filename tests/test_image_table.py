"Labels in a table, as competitions have them: what is found without being told, and one sentence for each thing that is wrong"
import random

import pandas as pd,pytest
from PIL import Image
from fastai_discriminative.core import DataError
from fastai_discriminative.demo import *
from fastai_discriminative.image_folder import dealt_out
from fastai_discriminative.predict import *

def _image(f, c=0):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16,16), (c%256,90,200)).save(f)

def _comp(root, folder='train', suffix='', n=12, test='test', **cols):
    "A competition's folder: `n` images of two kinds and their table, four to predict and theirs"
    ids,asked = [f'i{k:02}' for k in range(n)],[f'i{k}' for k in range(90, 94)]
    for k,o in enumerate(ids): _image(root/folder/f'{o}.png', 20*k)
    for o in asked: _image(root/test/f'{o}.png')
    cols = cols or dict(label=['cat','dog']*(n//2))
    pd.DataFrame(dict(id=[o+suffix for o in ids], **cols)).to_csv(root/'train.csv', index=False)
    pd.DataFrame(dict(id=[o+suffix for o in asked])).to_csv(root/'test.csv', index=False)
    return root

def _edit(path, f): f(pd.read_csv(path, dtype=str)).to_csv(path, index=False)
def _refused(msg, *args, **kwargs):
    with pytest.raises(DataError, match=msg) as e: folder_images(*args, **kwargs)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('folder,suffix,test', [('train','','test'), ('train_images','.png','test_images'), ('images','','images'), ('Train','.png','test'), ('photos/big','','test')])
def test_the_layouts_of_competitions(folder, suffix, test, tmp_path, recwarn):
    root = _comp(tmp_path/'comp', folder, suffix, test=test)
    fi = folder_images(root)
    assert (fi.path,fi.labels,fi.source)==(root,['cat','dog']*6,"'label' of train.csv") and [f.stem for f in fi.files]==[f'i{k:02}' for k in range(12)]
    assert [f.stem for f in find_images(root).files]==['i90','i91','i92','i93']
    assert not [o for o in recwarn if issubclass(o.category, DataWarning)], 'images that the test table names are not missing from the other'
    assert folder_images(root/'train.csv').files==fi.files

def test_the_same_names_to_train_on_and_to_predict(tmp_path):
    root = _comp(tmp_path, 'train_images', test='test_images')
    for f in (root/'test_images').iterdir(): f.unlink()
    for o in ('i00','i01'): _image(root/'test_images'/f'{o}.png')
    pd.DataFrame(dict(id=['i00','i01'])).to_csv(root/'test.csv', index=False)
    assert {f.parent.name for f in folder_images(root).files}=={'train_images'} and {f.parent.name for f in find_images(root).files}=={'test_images'}

def test_paths_in_the_table(tmp_path):
    "By its end or whole, and where the same name lies in two folders"
    for d in 'ab':
        for k in range(3): _image(tmp_path/'train'/d/f'{k}.png')
    for form in ('{d}/{k}.png', 'train/{d}/{k}', '{d}/{k}'):
        pd.DataFrame([(form.format(d=d, k=k),d) for d in 'ab' for k in range(3)], columns=['path','label']).to_csv(tmp_path/'train.csv', index=False)
        assert [f.parent.name for f in folder_images(tmp_path).files]==list('aaabbb')
    pd.DataFrame([(k,'a') for k in range(3)], columns=['path','label']).to_csv(tmp_path/'train.csv', index=False)
    _refused("'0' stands for several files", tmp_path)

def test_learners_get_the_labels_of_the_table(tmp_path):
    root = _comp(tmp_path, label=['9','10']*6)
    dls = demo_dls(root, size=16, bs=4)
    want = dict(zip(folder_images(root).files, ['9','10']*6))
    assert {f:dls.vocab[int(y)] for ds in (dls.train_ds,dls.valid_ds) for f,(_,y) in zip(ds.items, ds)}==want
    assert [sum(want[o]==c for o in dls.valid.items) for c in ('9','10')]==[1,1], 'the same share of each class'

# ---- which column

def _animals(root, **more): return _comp(root, age=[str(k%5) for k in range(12)], kind=['cat','dog']*6, **more)

def test_the_column_of_labels_is_told_by_the_other_tables(tmp_path):
    root = _animals(tmp_path)
    _refused(r"Which column of .*train.csv' holds the labels: 'age', 'kind'\? Choose with `label_col='kind'` \(--label-col kind\)", root)
    assert folder_images(root, label_col='kind').labels==['cat','dog']*6 and folder_images(root, label_col='age').classes==list('01234')
    pd.DataFrame(dict(id=['i90'], kind='cat')).to_csv(root/'sample_submission.csv', index=False)
    assert folder_images(root).source.startswith("'kind'")
    (root/'sample_submission.csv').unlink()
    _edit(root/'test.csv', lambda o: o.assign(age='1'))
    assert folder_images(root).source.startswith("'kind'"), 'ages are known of unlabelled images too'
    _edit(root/'test.csv', lambda o: o.assign(kind=''))
    _refused("'age', 'kind'", root)

def test_one_column_a_class(tmp_path):
    root = _comp(tmp_path, scab=['1','0']*6, rust=['0','1']*6)
    assert folder_images(root).labels==['scab','rust']*6
    _edit(root/'train.csv', lambda o: o.assign(rust='1'))
    _refused("Which column .* 'scab', 'rust'", root)

def test_two_columns_that_name_images(tmp_path):
    root = _comp(tmp_path)
    _edit(root/'train.csv', lambda o: o.assign(path='train/'+o.id+'.png'))
    assert folder_images(root).source.startswith("'label'"), 'they name the same images, so neither holds labels'
    _edit(root/'train.csv', lambda o: o.assign(path=list(o.path[::-1])))
    _refused("Columns 'id' and 'path' .* both name images, but different ones. Choose with `id_col='id'`", root)
    assert folder_images(root, id_col='path').files[0].stem=='i11' and folder_images(root, id_col='id').files[0].stem=='i00'

def test_the_numbers_of_the_rows_are_no_column(tmp_path):
    "As pandas writes them, and files that are called by numbers"
    for k in range(12): _image(tmp_path/'train'/f'{k}.png')
    pd.DataFrame(dict(image=[str(k) for k in reversed(range(12))], label=['cat','dog']*6)).to_csv(tmp_path/'train.csv')
    fi = folder_images(tmp_path)
    assert fi.files[0].stem=='11' and fi.source.startswith("'label'")

@pytest.mark.parametrize('kw,msg', [(dict(label_col='lable'), "no column 'lable', which `label_col` names. Did you mean 'label'"), (dict(id_col='ids'), "no column 'ids', which `id_col` names. Did you mean 'id'"),
    (dict(group_col='x'), "no column 'x', which `group_col` names. It has: 'id', 'label'"), (dict(id_col='label'), "No column .* names images .*'cat' in column 'label' is not an image there")])
def test_columns_that_are_not_there(kw, msg, tmp_path): _refused(msg, _comp(tmp_path), **kw)

def test_columns_of_no_table(tmp_path):
    for c in 'ab':
        for k in range(3): _image(tmp_path/c/f'{k}.png')
    _refused("There is no table .*train.csv' that has a column 'kind'", tmp_path, label_col='kind')

# ---- what is wrong with rows and labels

def _set(i, col, v):
    def _f(o):
        o.loc[i, col] = v
        return o
    return _f

@pytest.mark.parametrize('edit,msg', [
    (_set(3, 'id', 'i0x'), "In column 'id' of .*, 1 of 12 names cannot be matched to an image: 'i0x' is not an image under .*Did you mean '.*Add the images"),
    (_set(3, 'id', 'i04'), "Column 'id' .* names images more than once: 'i04'. Keep one row"), (lambda o: o.assign(id='q'+o.id), "No column of .*train.csv' names images under .*'qi00' in column 'id'"),
    (_set(3, 'label', None), "Column 'label' .* is empty for 'i03'. Fill these cells"), (_set([3,4], 'label', 'nan'), "is empty for 'i03', 'i04'"), (lambda o: o.assign(label='cat'), "Only one class .*The labels come from 'label' of train.csv"),
    (lambda o: o.drop(columns='label'), "has no column of labels. It only has 'id'"), (lambda o: o[:0], 'has no rows'), (lambda o: o[:3], 'Too few images'),
    (lambda o: o.assign(label=[f'{k/7:.3f}' for k in range(12)]), "holds numbers such as 0.143, not classes.*RegressionBlock"),
    (lambda o: o.assign(label=['rust scab','rust','scab']*4), "several labels in one cell, such as 'rust scab'.*MultiCategoryBlock"), (lambda o: o.assign(label=['a|b','b','a','a|b']*3), 'several labels in one cell')])
def test_tables_that_are_refused(edit, msg, tmp_path):
    root = _comp(tmp_path)
    _edit(root/'train.csv', edit)
    _refused(msg, root)

@pytest.mark.parametrize('labels,classes', [(['0','1']*6, ['0','1']), (['0.0','1.0']*6, ['0','1']), (['007','010']*6, ['007','010']), (['red rose','white rose','red tulip']*4, ['red rose','red tulip','white rose']), (['None','NA']*6, ['NA','None']), (['-1','1']*6, ['-1','1'])])
def test_labels_that_are_classes(labels, classes, tmp_path): assert folder_images(_comp(tmp_path, label=labels)).classes==classes

def test_a_table_without_images(tmp_path):
    pd.DataFrame(dict(id=['a'], label=['b'])).to_csv(tmp_path/'train.csv', index=False)
    _image(tmp_path/'test'/'a.png')
    _refused('has labels, but there are no images beside it. Expected', tmp_path)
    (tmp_path/'train.csv').write_bytes(b'\xff\xfe\x00"')
    _refused('cannot be read as a table', tmp_path)

def test_images_without_a_row_and_unreadable_ones_are_left_out(tmp_path):
    root = _comp(tmp_path)
    _image(root/'train'/'extra.png')
    (root/'train'/'i05.png').write_bytes(b'no image')
    with pytest.warns(DataWarning) as w: fi = folder_images(root)
    assert len(fi.files)==len(fi.labels)==11 and [o.name for o in fi.unreadable]==['i05.png']
    assert [s in str(o.message) for s,o in zip(('Left out images without a row in train.csv','Skipped 1 unreadable'), w)]==[True,True] and 'extra.png' in str(w[0].message)

# ---- groups

def _patients(root, n=40, per=4):
    rng = random.Random(1)
    return _comp(root, n=n, label=[rng.choice(['cat','dog']) for _ in range(n)], patient=[f'p{k//per}' for k in range(n)])

def test_groups_stay_whole(tmp_path):
    fi = folder_images(_patients(tmp_path), label_col='label', group_col='patient')
    of = dict(zip(fi.files, fi.groups))
    for seed in range(3):
        parts = [{fi.groups[i] for i,v in enumerate(f.is_valid) if v} for f in image_folds(fi, 4, seed)]
        assert sum(map(len, parts))==10 and len(set.union(*parts))==10
        dls = demo_dls(fi, size=16, bs=4, seed=seed)
        assert not {of[o] for o in dls.train.items}&{of[o] for o in dls.valid.items} and 4<=len(dls.valid_ds)<=12
    assert {of[o] for o in demo_dls(fi, size=16, bs=4).valid.items}=={of[o] for o in demo_dls(fi, n_train=9, size=16, bs=4).valid.items}
    plain = demo_dls(folder_images(tmp_path, label_col='label'), size=16, bs=4)
    assert {of[o] for o in plain.train.items}&{of[o] for o in plain.valid.items}, 'without the column they would not'

def test_groups_that_cannot_be_dealt_out(tmp_path):
    fi = folder_images(_patients(tmp_path), label_col='label', group_col='patient')
    fi.groups = ['a','b']*20
    with pytest.raises(DataError, match='2 groups of images cannot be divided into 3 parts'): image_folds(fi, 3)
    fi.groups,fi.labels = [f'g{k//8}' for k in range(40)],['cat']*8+['dog']*32
    with pytest.raises(DataError, match="All images of 'cat' are in one of 4 parts"): image_folds(fi, 4)
    dls = demo_dls(fi, size=16, bs=4)
    assert len(dls.valid_ds)==8 and {dls.vocab[int(y)] for _,y in dls.valid_ds}=={'dog'}, 'each class is trained on'
    fi.groups = ['a']*40
    with pytest.raises(DataError, match='1 group of images cannot'): demo_dls(fi, size=16)

def test_parts_without_groups_hold_the_same_share_of_each_class(tmp_path):
    fi = folder_images(_comp(tmp_path))
    assert [sorted(fi.labels[i] for i in o) for o in dealt_out(fi, 3, 0)]==[['cat']*2+['dog']*2]*3
    with pytest.raises(DataError, match=r'^12 images cannot be divided into 13 parts\. Use fewer folds\.$'): dealt_out(fi, 13, 0)
    fi.labels[0] = 'owl'
    with pytest.raises(DataError, match="All images of 'owl' are in one of 3 parts.* Add images, or leave this class out"): dealt_out(fi, 3, 0)

def test_an_empty_group_is_no_group(tmp_path):
    root = _patients(tmp_path)
    _edit(root/'train.csv', _set([3,7], 'patient', None))
    _refused("Column 'patient' .* is empty for 'i03', 'i07'", root, label_col='label', group_col='patient')
