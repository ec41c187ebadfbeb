"Anything that can be typed or piped: each command ends with the right status and a clear message, without a traceback"
import os,subprocess,sys,tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np,pytest
from PIL import Image
import fastai_discriminative
from fastai_discriminative.cli import main
from fastai_discriminative.demo import DataError,folder_images

pytestmark = pytest.mark.skipif(os.name=='nt', reason='Windows has no such names, links, pipes and limits')

def _picture(f, c=0):
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16,16,3), c, np.uint8)).save(f)

tables = dict(table='5,b,2\n', lost='6,b,2\n', twice='4,b,2\n', nan='5,,2\n', norow='', ragged='5,b,2,3,4\n') # the last row of each

def _classes(d, classes=('a','b'), n=6, size=(16,16)):
    for k,c in enumerate(classes):
        (d/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(np.full((*size,3), 90*k+i, np.uint8)).save(d/c/f'{i}.png')
    return d

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Folders of every kind"
    p = tmp_path_factory.mktemp('place')
    for o in ('ok','loop','file','cut','odd','space name\n x', os.fsdecode(b'bytes\xff')): _classes(p/o)
    _classes(p/'names', (os.fsdecode(b'a\xff'),'ü ñ'))
    (p/'loop'/'a'/'self').symlink_to(p/'loop'/'a')
    (p/'loop'/'c').symlink_to(p/'loop'/'c')
    (p/'loop'/'b'/'x.png').symlink_to(p/'loop'/'b'/'x.png')
    for o in 'ab': (p/'loop'/o/'up').symlink_to(p/'loop')
    (p/'file'/'c').write_text('a file where a folder belongs')
    (p/'file'/'train').write_text('another')
    for i in range(3): (p/'cut'/'a'/f'{i}.png').write_bytes((p/'cut'/'a'/'5.png').read_bytes()[:40*i])
    (p/'odd'/'a'/'folder.png').mkdir()
    os.mkfifo(p/'odd'/'b'/'pipe.png')
    _classes(p/'tv'/'train')
    (p/'tv'/'valid').mkdir()
    _classes(p/'one', ('a',))
    _classes(p/'few', n=1)
    _classes(p/'wide', size=(1,500))
    for n,row in tables.items():
        for i in range(6): _picture(p/n/'train'/f'{i}.png')
        (p/n/'train.csv').write_text('id,label,age\n'+''.join(f'{i},{"ab"[i%2]},{i%3}\n' for i in range(5))+row)
    for o in ('empty','w.dir','onlyloop'): (p/o).mkdir()
    (p/'onlyloop'/'x.png').symlink_to(p/'onlyloop'/'x.png')
    (p/'onlyloop'/'.h.png').write_bytes(b'x')
    (p/'selfloop').symlink_to(p/'selfloop')
    for o in ('afile','w.pth','w.safetensors'): (p/o).write_bytes(b'x')
    return p

_fit = ['--arch','resnet10t','--from-scratch','--epochs','1','--quiet','--size','32','--strategy','uniform','--threads','1']
def _fits(*args): return [['finetune',args[0],*_fit,*args[1:]]]
def _each(cmd, *args): return [[*cmd, *(o if isinstance(o, list) else [o])] for o in args]
_ok = ['finetune','ok',*_fit]

_table = ['--label-col','label']
done = [['groups','resnet10t'], ['groups','resnet10t','--n-groups','block'], ['groups','resnet18.'], ['families'], ['--version'], ['--help'], ['finetune','--help'], ['preset','resnet10t','--optimizer','sgd'],
    ['preset','resnet10t','--bs','1','--size','8','--n-steps','1'], *[c for o in ('ok','ok/','./ok/../ok','loop','file','cut','odd','space name\n x','wide',os.fsdecode(b'bytes\xff'),'names') for c in _fits(o)],
    *[c for o in ('table','table/train.csv','norow') for c in _fits(o, *_table)], *_fits('table', '--label-col', 'age', '--group-col', 'id'), *_each(_ok, ['--size','8'], ['--bs','999999'], ['--valid-pct','.999'], ['--seed','4294967295'], ['--lr-low','1e-9'], ['--n-groups','2'], ['--n-train','2'], ['--strategy','fastai'], ['--compare'])]

refused = [(2, *o) for o in [
    *[(c, 'Unknown architecture') for c in _each(['groups'], '', ' ', '../x', '.', '/', '\udcff', 'resnet18\n', 'a'*5000, 'résnet18', 'resnet10t\0')], (['preset',''], 'Unknown architecture'), (['groups','resnet18.zzz'], 'no pretrained tag'),
    *[(o, 'is a family, not an architecture') for o in (['groups','resnet'], ['preset','vit'], ['groups','tv_resnet'], ['finetune','ok','--arch','convnext','--from-scratch'])],
    *[(['groups','resnet10t','--n-groups',o], 'impossible') for o in ('-1','0','1','1000000000')], *[(['groups','resnet10t','--n-groups',o], 'neither a whole number') for o in ('BLOCK','1e3','')],
    (['preset','resnet10t','--bs','1'+'0'*30], 'below a billion'), (['preset','resnet10t','--n-steps','0'], 'at least 1'), (['preset','resnet10t','--size','9'*400], 'from 8 to 8192'),
    ([], 'usage'), (['bogus'], 'invalid choice'), (['groups'], 'required'), (['groups','--'], 'required'), (['demo','--data',''], 'invalid choice'), (['--debug'], 'usage'), (['finetune','ok'], '--arch'),
    *[(_fits(o)[0], 'is not a name of a file or folder') for o in ('', 'a\0b', '~nouser/x')], *[(_fits(o)[0], 'is not a folder') for o in ('/dev/null','afile','selfloop')],
    *[(_fits(o)[0], 'does not exist') for o in ('nowhere','afile/x')], (_fits('ok/a')[0], 'outside of any class'), (_fits('empty')[0], 'No images to train on'), (_fits('onlyloop')[0], 'in 0 sub-folders. Expected'), (_fits('tv')[0], 'No images to validate on'),
    (_fits('one')[0], 'Only one class'), (_fits('few')[0], 'Too few images'),
    *[([*_ok,'--size',o], 'from 8 to 8192') for o in ('1','0','-3','1000000000','x')], *[([*_ok,'--bs',o], 'at least 2') for o in ('1','0','1000000000')], *[([*_ok,'--valid-pct',o], 'between 0 and 1') for o in ('0','1','nan')],
    *[([*_ok,'--seed',o], 'from 0 to') for o in ('-1','1'+'0'*30)], ([*_ok,'--threads','1000000000'], 'from 1 to 1024'), ([*_ok,'--workers','1000000'], 'from 0 to 256'), ([*_ok,'--epochs','0'], 'at least 1'),
    *[([*_ok,'--out',o], 'is not a name') for o in ('','x\0y','~nouser/x')], *[([*_ok,'--out',o], 'Cannot make the folder') for o in ('/dev/null','afile','selfloop','afile/x','new/deep/'+'a'*300)],
    (['finetune','ok','--arch','resnet10t','--quiet','--weights-file','w.pth','--out','neu/deep'], 'cannot be read'), *[([*_ok,'--weights-file',o], 'is not a name') for o in ('','~nouser/w.pth')], *[(['finetune','ok','--arch','resnet10t','--quiet','--weights-file',o], m) for o,m in
        (('.','No checkpoint'),('w.pth','cannot be read'),('w.safetensors','cannot be read'),('w.dir','No checkpoint'),('/dev/null','No checkpoint'))],
    ([*_ok,'--strategy',''], 'Unknown strategy'), ([*_ok,'--strategy','nope'], 'Unknown strategy'), *[([*_ok,'--lr-low',o], 'positive learning rate') for o in ('nan','inf','0','-1','1e-300')],
    ([*_ok,'--lr-low','1e-3','--lr-high','1e-4'], 'Reversed'), ([*_ok,'--n-groups','-5'], 'impossible'), ([*_ok,'--n-train','1'], 'too few'), (['finetune','ok','--arch',''], 'Unknown architecture')]]
refused += [(2, _fits(o, *a)[0], msg) for o,a,msg in [('table', (), "holds the labels: 'label', 'age'? Choose with `label_col='label'` (--label-col label)"), ('lost', _table, "'6' is not an image under"), ('twice', _table, "more than once: '4'. Keep one row"),
    ('nan', _table, "Column 'label' of"), ('ragged', _table, 'cannot be read as a table'), ('table', ('--label-col','lable'), "Did you mean 'label'"), ('table', ('--id-col',''), "has no column ''"), ('table', (*_table,'--id-col','age'), '--id-col'),
    ('table', (*_table,'--group-col','x'), "no column 'x', which `group_col` names"), ('ok', _table, 'There is no table'), ('table', (*_table,'--group-col','label'), 'All images of'), ('table/train', (), 'outside of any class')]]
refused += [(1, _fits('a'*300)[0], 'File name too long')]

def _run(args, capsys):
    "Status and messages of a command; an exception fails the test"
    try: status = main(args)
    except SystemExit as e: status = e.code or 0
    return status,capsys.readouterr().err

def _id(o): return ascii(' '.join(a for a in o if a not in _fit))[1:60] if isinstance(o, list) else ''

@pytest.mark.parametrize('args', done, ids=_id)
def test_done(args, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    out = ['--out', str(tmp_path/'out')] if args[0]=='finetune' and '--help' not in args else []
    assert _run([*args, *out], capsys)[0]==0
    assert not out or sorted(o.name for o in (tmp_path/'out').iterdir())==['accuracy.png','history.csv','learner.pkl','report.html','run.json']

@pytest.mark.parametrize('status,args,msg', refused, ids=_id)
def test_refused(status, args, msg, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    got,err = _run(args, capsys)
    assert got==status and msg in err and 'Traceback' not in err
    assert sorted(os.listdir(place))==before, "no folder is left"

def test_enough_command_lines(): assert len(done)+len(refused)>=100

def test_results_among_the_images_are_no_images(tmp_path, capsys, monkeypatch):
    "`cd photos; finetune .` twice: the plot of the first run is no class of the second, and no image to predict"
    monkeypatch.chdir(_classes(tmp_path/'photos'))
    assert main(_fits('.')[0])==0
    with pytest.warns(UserWarning, match="because they contain the results of a run: .*photos/discriminative-photos'"): assert main(_fits('.')[0])==0
    runs = ['discriminative-photos','discriminative-photos-2']
    assert all((Path(o)/'accuracy.png').exists() for o in runs) and folder_images('.').classes==['a','b']
    assert main(['predict', runs[0], '.', '--csv', str(tmp_path/'s.csv')])==0 and len((tmp_path/'s.csv').read_text().splitlines())==13
    for out in ('.','a','../photos'):
        assert main([*_fits('.')[0], '--out', out])==2 and 'holds images to train on' in capsys.readouterr().err
        assert sorted(os.listdir())==['a','b',*runs] and len(os.listdir('a'))==6

def test_a_file_that_a_library_leaves_open_is_no_note(tmp_path, recwarn):
    d = _classes(tmp_path/'d')
    Image.new('RGB', (16,16)).save(d/'b'/'moves.gif', save_all=True, append_images=[Image.new('RGB', (16,16), 5)])
    assert main([*_fits(str(d))[0], '--out', str(tmp_path/'out')])==0 and not recwarn.list

def test_a_folder_that_links_lead_to_again_counts_once(place):
    files = [str(o.relative_to(place)) for o in folder_images(place/'loop').files]
    assert len(files)==len(set(files)) and len(files)<=2*12

@pytest.mark.parametrize('e,status', [(OSError(28,'No space left on device'),1), (MemoryError('much'),1), (RuntimeError('a library\nof somebody'),1), (BrokenPipeError(),141), (KeyboardInterrupt(),130)])
def test_whatever_goes_wrong(e, status, monkeypatch, capsys):
    def _raise(*args): raise e
    monkeypatch.setattr('fastai_discriminative.cli._groups_of', _raise)
    got,err = _run(['groups','resnet10t'], capsys)
    assert got==status and 'Traceback' not in err and err.count('\n')<=2
    assert status!=1 or type(e).__name__ in err and ('--debug shows where' in err)==isinstance(e, RuntimeError)
    if isinstance(e, Exception) and status==1:
        with pytest.raises(type(e)): main(['groups','resnet10t','--debug'])

# ---- in a process of its own

_cmd = [sys.executable, '-W', 'ignore', '-c', 'import sys; from fastai_discriminative.cli import main; sys.exit(main())']
_env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(Path(fastai_discriminative.__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}

def _shell(line, cwd, **kwargs):
    "Run `line`, in which `$CMD` stands for the command"
    r = subprocess.run(['bash', '-c', line, 'bash', *_cmd], cwd=cwd, env={**_env, **kwargs}, capture_output=True, text=True, timeout=200)
    assert 'Traceback' not in r.stderr and 'Exception ignored' not in r.stderr, r.stderr
    return r

@pytest.mark.parametrize('line,status,msg', [
    ('"$@" --help >/dev/full', None, ''), ('"$@" --help >&-', 0, ''), ('"$@" --help 2>&-', 0, ''), ('"$@" bogus 2>&-', 2, ''), ('"$@" bogus 2>/dev/full', 2, ''),
    ('"$@" --help >&- 2>&- <&-', 0, ''), ('"$@" --help | true; exit ${PIPESTATUS[0]}', None, ''), ('"$@" groups resnet10t >/dev/full', 1, 'No space left'),
    ('("$@" families; echo $? >status) | true; exit $(cat status)', 141, '')], ids=lambda o: o if isinstance(o, str) and '$@' in o else '')
def test_streams(line, status, msg, tmp_path):
    r = _shell(line, tmp_path)
    assert r.returncode in ((0,1,141) if status is None else (status,)) and msg in r.stderr

def test_a_full_disk_leaves_no_half_results(place, tmp_path):
    "A limit on the file size simulates a full disk"
    r = _shell('ulimit -f 100; "$@" finetune %s %s --out out' % (place/'ok', ' '.join(_fit)), tmp_path)
    assert r.returncode==2 and 'Cannot write the results' in r.stderr and 'Is the disk full?' in r.stderr
    assert not any(o.name.endswith('.pkl') for o in tmp_path.rglob('*')) and not list(tmp_path.rglob('.fastai*'))

@contextmanager
def nobody():
    "Root may read everything, so the test runs as another user"
    root = os.geteuid()==0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)

@pytest.mark.parametrize('what', ['.','a'])
def test_a_folder_that_cannot_be_read_is_named(what):
    "It is not skipped silently, as `os.walk` would do"
    with tempfile.TemporaryDirectory() as d: # pytest's own folders are closed to others
        Path(d).chmod(0o755)
        folder = _classes(Path(d)/'images', ('a','b','c'))
        (folder/what).chmod(0)
        try:
            with nobody(), pytest.raises(DataError, match=f"{(folder/what).name}' cannot be read: Permission denied"): folder_images(folder)
        finally: (folder/what).chmod(0o755)
