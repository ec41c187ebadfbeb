"The command as a user runs it: in a process of its own"
import os,re,shutil,signal,subprocess,sys,time
from functools import partial
from pathlib import Path
import pytest,timm
import fastai_discriminative
from fastai.vision.all import Image,load_learner
from fastai_discriminative.cli import _parser,main
from fastai_discriminative.demo import clipart_path,lite0_weights

_env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(Path(fastai_discriminative.__file__).parent.parent), os.environ.get('PYTHONPATH', '')])}
_cmd = [sys.executable, '-c', 'import sys; from fastai_discriminative.cli import main; sys.exit(main())']

def _run(*args, cwd, timeout=300): return subprocess.run([*_cmd, *map(str, args)], cwd=cwd, env=_env, capture_output=True, text=True, timeout=timeout)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two classes of drawings, one damaged file among them"
    res = tmp_path_factory.mktemp('cli')/'photos'
    for c in ('flags','food'):
        (res/c).mkdir(parents=True)
        for o in sorted((clipart_path()/c).iterdir())[:24]: shutil.copy(o, res/c)
    (res/'food'/'broken.png').write_bytes(b'not an image')
    return res

def _fails(capsys, *args):
    "The message on stderr of a command that ends with status 2"
    assert main([*map(str, args)])==2
    out,err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith('fastai-discriminative: error: ') and 'Traceback' not in err
    return last

def test_demo(tmp_path):
    r = _run('demo', '--n-train', 64, '--epochs', 1, '--seeds', 2, '--size', 32, '--valid-pct', .05, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert not r.stderr
    assert re.search(r'tf_efficientnet_lite0.*: \d+ groups', r.stdout) and 'frozen' in r.stdout and 'Epoch 1/11' in r.stdout
    assert 'size: Images of 32 px, but the checkpoint was trained at 224' in r.stdout and 'Mend it: --size 224' in r.stdout and 'overlap' not in r.stdout
    rows = re.findall(r"^(auto|fastai's fine_tune) +(42|43|mean) +\d+ +[\d.]+% +[\d.]+ s$", r.stdout, re.M)
    assert len(rows)==6 and 'the head alone reached accuracy' in r.stdout
    out = tmp_path/'discriminative-demo'
    assert sorted(o.name for o in out.iterdir())==['accuracy.png','learner.pkl']
    assert Image.open(out/'accuracy.png').size[0]>500

def test_finetune_skips_and_reports_an_unreadable_image(photos, tmp_path):
    args = ['--arch','tf_efficientnet_lite0','--weights-file',lite0_weights(),'--epochs',1,'--size',32,'--n-train',32,'--n-groups',4,'--quiet','--compare','--threads',1]
    r = _run('finetune', photos, *args, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert r.stderr.strip()==f"note: Skipped 1 unreadable image: {photos/'food'/'broken.png'}"
    assert ': 4 groups' in r.stdout and 'Epoch' not in r.stdout and "fine_tune" in r.stdout
    learn = load_learner(tmp_path/'discriminative-photos'/'learner.pkl')
    assert learn.dls.vocab==['flags','food']
    with learn.no_bar(): assert learn.predict(next((photos/'flags').iterdir()))[0] in ('flags','food')

def test_finetune_train_and_valid_at_another_size_from_scratch(photos, tmp_path):
    for o in ('train','valid'):
        for c in ('flags','food'):
            (tmp_path/'d'/o/c).mkdir(parents=True)
            for f in sorted((photos/c).glob('*.webp'))[:8]: shutil.copy(f, tmp_path/'d'/o/c)
    assert main(['finetune', str(tmp_path/'d'), '--arch', 'test_vit', '--from-scratch', '--size', '64', '--epochs', '1', '--quiet', '--out', str(tmp_path/'out')])==0
    assert (tmp_path/'out'/'learner.pkl').exists()

def test_tables(capsys):
    assert main(['groups','resnet18','--n-groups','3'])==main(['groups','resnet18','--n-groups','block'])==main(['preset','convnext_tiny.fb_in22k','--bs','16'])==main(['families'])==0
    out,err = capsys.readouterr()
    assert 'resnet18.a1_in1k: 3 groups' in out and 'batch 16' in out and 'convnextv2' in out and not err

@pytest.mark.parametrize('args,msg', [
    (['finetune','nowhere','--arch','resnet18'], 'folder nowhere does not exist'),
    (['finetune','{empty}','--arch','resnet18'], 'No images to train on in .*empty'),
    (['finetune','{photos}/food','--arch','resnet18'], 'outside of any class'),
    (['finetune','{one}','--arch','resnet18'], 'Only one class'),
    (['finetune','{photos}','--arch','resnet118'], "Unknown architecture 'resnet118'. Did you mean 'resnet18'"),
    (['finetune','{photos}','--arch','resnet18','--from-scratch','--strategy','lpft'], "Did you mean 'lp_ft'"),
    (['finetune','{photos}','--arch','resnet18','--n-groups','0','--from-scratch'], 'n_groups=0 is impossible'),
    (['finetune','{photos}','--arch','resnet18','--n-groups','99','--from-scratch'], 'n_groups=99 is impossible. Use a number from 2'),
    (['finetune','{photos}','--arch','resnet18','--weights-file','no.pth'], "No checkpoint file 'no.pth'"),
    (['finetune','{photos}','--arch','resnet18','--weights-file','{cut}'], 'may be truncated'),
    (['finetune','{photos}','--arch','resnet18','--weights-file','{lite0}'], "does not fit 'resnet18'"),
    (['finetune','{photos}','--arch','resnet18','--from-scratch','--lr-low','1e-2','--lr-high','1e-4'], 'Reversed rates'),
    (['finetune','{photos}','--arch','resnet18','--from-scratch','--out','{cut}'], 'Cannot make the folder'),
    (['finetune','{photos}','--arch','resnet18','--from-scratch','--n-train','1'], 'too few for 2 classes'),
    (['groups','swin_tiny'], 'Did you mean'), (['preset','vit_base_patch16_224.maee'], "no pretrained tag 'maee'")])
def test_errors_of_the_user(args, msg, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(photos=photos, empty=tmp_path/'empty', one=tmp_path/'one', cut=tmp_path/'cut.safetensors', lite0=lite0_weights())
    names['empty'].mkdir()
    shutil.copytree(photos/'flags', names['one']/'flags')
    names['cut'].write_bytes(lite0_weights().read_bytes()[:10000])
    assert re.search(msg, _fails(capsys, *[o.format(**names) for o in args]))
    assert not list(tmp_path.rglob('learner.pkl')) and not (tmp_path/'discriminative-photos').exists()

def test_a_download_that_fails_says_what_to_do(photos, tmp_path, capsys, monkeypatch):
    def _offline(*args, **kwargs): raise OSError('no network\nat all')
    monkeypatch.setattr(timm, 'create_model', _offline)
    msg = _fails(capsys, 'finetune', photos, '--arch', 'resnet18', '--out', tmp_path/'out')
    assert "weights of 'resnet18' could not be fetched (no network)" in msg and '--weights-file' in msg

@pytest.mark.parametrize('args', [[],['demo','--epochs','0'],['demo','--epochs','x'],['demo','--data','mnist'],['finetune','f'],['demo','--n-groups','many'],['demo','--valid-pct','1']])
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as e: _parser().parse_args(args)
    assert e.value.code==2 and 'usage: fastai-discriminative' in capsys.readouterr().err

def test_debug_shows_the_traceback(tmp_path):
    r = _run('groups', 'resnet118', '--debug', cwd=tmp_path)
    assert r.returncode==1 and 'Traceback' in r.stderr and 'FamilyError' in r.stderr

def test_help_imports_nothing_heavy(tmp_path):
    code = "import sys; sys.argv[1:] = ['finetune','--help']\nfrom fastai_discriminative.cli import main\ntry: main()\nfinally: print(sorted({'torch','fastai','timm'}&set(sys.modules)))"
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=_env, capture_output=True, text=True)
    assert r.stdout.strip().endswith('[]') and '--weights-file' in r.stdout

@pytest.mark.skipif(os.name=='nt', reason='no SIGINT to another process')
def test_interrupt(tmp_path):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL) # a shell that starts the tests in the background has SIGINT ignored, and children inherit it
    p = subprocess.Popen([*_cmd, 'demo', '--quiet', '--size', '64'], cwd=tmp_path, env=_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while 'seed 42' not in (line := p.stdout.readline()): assert line, p.stderr.read()
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert p.returncode==130 and 'Interrupted' in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())
