"The command as a user runs it, in a separate process"
import json,os,re,shutil,signal,subprocess,sys,time
from functools import partial
from pathlib import Path
import pandas as pd,pytest,timm
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
    assert re.search(r'tf_efficientnet_lite0.*: \d+ groups', r.stdout) and 'frozen' in r.stdout and re.search(r'^epoch 0  train_loss [\d.]+  valid_loss [\d.]+  accuracy [\d.]+  ', r.stdout, re.M)
    assert 'size: Images of 32 px, but the checkpoint was trained at 224' in r.stdout and 'Fix: --size 224' in r.stdout and 'overlap' not in r.stdout
    rows = re.findall(r"^(auto|fastai's fine_tune) +(42|43|mean) +\d+ +[\d.]+% +[\d.]+ s$", r.stdout, re.M)
    assert len(rows)==6 and 'the head alone reached accuracy' in r.stdout
    out = tmp_path/'discriminative-demo'
    assert sorted(o.name for o in out.iterdir())==['accuracy.png','history.csv','learner.pkl','report.html','run.json']
    assert Image.open(out/'accuracy.png').size[0]>500

def test_finetune_skips_and_reports_an_unreadable_image(photos, tmp_path):
    args = ['--arch','tf_efficientnet_lite0','--weights-file',lite0_weights(),'--epochs',1,'--size',32,'--n-train',32,'--n-groups',4,'--quiet','--compare','--threads',1]
    r = _run('finetune', photos, *args, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert r.stderr.strip()==f"note: Skipped 1 unreadable image: {photos/'food'/'broken.png'}"
    assert ': 4 groups' in r.stdout and 'epoch 0' not in r.stdout and "fine_tune" in r.stdout
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

def test_from_scratch_shows_the_rates_that_it_trains_at(photos, tmp_path, capsys):
    args = ['finetune', photos, '--arch', 'test_resnet', '--from-scratch', '--size', 32, '--epochs', 1, '--quiet', '--threads', 1, '--overwrite', '--out', tmp_path/'out']
    for more,want in (((), None), (('--lr-high','3e-3'), 3e-3)):
        assert main([*map(str, (*args, *more))])==0
        out,err = capsys.readouterr()
        shown = {float(o) for o in re.findall(r'^\d+ .*%  +([\d.e-]+) +[\d.]+', out, re.M)}
        learn = load_learner(tmp_path/'out'/'learner.pkl')
        assert shown=={float(f'{o:.2g}') for o in learn.peak_lrs} and len(set(learn.peak_lrs))==1, out
        assert 'recipe' not in out or 'no published recipe' in out
        if want: assert shown=={want}
        assert 'stay random' not in err

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
    (['groups','effnetb0'], "Did you mean 'efficientnet_b0'"), (['groups','swin_tiny'], 'Did you mean'), (['preset','vit_base_patch16_224.maee'], "no pretrained tag 'maee'")])
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

@pytest.mark.parametrize('args', [[],['demo','--epochs','0'],['demo','--epochs','x'],['demo','--data','mnist'],['finetune','f'],['finetune','f','--arch','resnet18','--from-scratch','--weights-file','w.pth'],['demo','--n-groups','many'],['demo','--valid-pct','1']])
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

# Windows cannot send a process SIGINT or SIGTERM that it hears as Python does elsewhere, and has no SIGKILL
_signals = pytest.mark.skipif(os.name=='nt', reason='Windows has no such signals to another process')

@_signals
def test_interrupt(tmp_path):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL) # a shell that starts the tests in the background has SIGINT ignored, and children inherit it
    p = subprocess.Popen([*_cmd, 'demo', '--quiet', '--size', '64'], cwd=tmp_path, env=_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while 'seed 42' not in (line := p.stdout.readline()): assert line, p.stderr.read()
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert p.returncode==130 and 'Interrupted' in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())

@_signals
def test_interrupt_after_an_epoch_keeps_what_was_best(photos, tmp_path):
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    args = map(str, ['finetune', photos, '--arch', 'test_efficientnet', '--from-scratch', '--strategy', 'uniform', '--size', 32, '--epochs', 5000, '--threads', 1, '--folds', 2])
    p = subprocess.Popen([*_cmd, *args], cwd=tmp_path, env=_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while 'epoch 2 ' not in (line := p.stdout.readline()): assert line, p.stderr.read()
    p.send_signal(signal.SIGINT)
    out_,err = p.communicate(timeout=60)
    out = tmp_path/'discriminative-photos'
    assert p.returncode==130 and 'The results up to then are in' in err and 'Traceback' not in err
    assert sorted(o.name for o in out.iterdir())==['fit-fold1.pt','history.csv','learner-fold1.pkl','oof.csv','progress.json','run.json']
    run,history = json.loads((out/'run.json').read_text()),pd.read_csv(out/'history.csv')
    assert list(history.epoch)==list(range(1, len(history)+1)) and history.train_s.is_monotonic_increasing and history.train_s.is_unique
    assert 'Saved 1 learner, oof.csv' in out_ and f'{len(history)}  ' in re.search(r'uniform, fold 1 +42 +(.*)', out_)[1]
    assert run['stopped']=='by Ctrl-C' and run['results'][0]['accuracy']==pytest.approx(run['out_of_fold'])

# ---- to go on with a run

_three = ['--arch','resnet10t','--from-scratch','--strategy','uniform','--size','32','--epochs','3','--threads','1','--folds','2','--seed','7']
_patient = "import sys,time; from fastai.learner import Recorder; from fastai_discriminative.cli import main\nlog = Recorder.after_epoch\n" \
    "def slow(self):\n    time.sleep(.5)\n    log(self)\nRecorder.after_epoch = slow\nsys.exit(main())" # nothing that an export would hold

def _cut(args, cwd, after, sigs):
    "Start a command whose epochs last half a second, and send it the signals named in `sigs` when its output matches `after`; its status, stdout and stderr"
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    cmd = [sys.executable,'-c',_patient,*map(str, args)]
    p = subprocess.Popen(cmd, cwd=cwd, env=_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    seen = ''
    while not re.search(after, seen, re.S):
        line = p.stdout.readline()
        assert line, p.stderr.read()
        seen += line
    for o in sigs.split(): p.send_signal(getattr(signal, o))
    more,err = p.communicate(timeout=60)
    return p.returncode,seen+more,err

def _what_is_left(out):
    "The results without times and names of files"
    runs = [(r['how'],r['seed'],r['accuracy']) for r in json.loads((out/'run.json').read_text())['results']]
    states = [{k:v.tolist() for k,v in load_learner(f).model.state_dict().items()} for f in sorted(out.glob('learner*.pkl'))]
    return runs,pd.read_csv(out/'history.csv').drop(columns='train_s').values.tolist(),states,(out/'oof.csv').read_bytes()

@_signals
@pytest.mark.parametrize('sigs,status', [('SIGINT SIGINT', 130), ('SIGTERM', 143), ('SIGKILL', -9)])
def test_a_run_goes_on(sigs, status, photos, tmp_path, whole, monkeypatch, capsys):
    "In the second or third epoch of its second fold: the end is that of a run that was never cut, to the bit"
    args = ['finetune', photos, *_three]
    got,said,err = _cut(args, tmp_path, 'Fold 2 of 2.*epoch 1 ', sigs)
    out = tmp_path/'discriminative-photos'
    assert got==status and 'Traceback' not in err and {'fit-fold2.pt','progress.json','learner-fold1.pkl'}<={o.name for o in out.iterdir()}
    line = f'fastai-discriminative finetune {photos} {" ".join(_three)} --resume --out discriminative-photos'
    if status>0:
        assert line in err, err
        assert f"Stopped by {'SIGTERM' if status==143 else 'Ctrl-C'}" in err and 'Saved 2 learners' in said
        assert json.loads((out/'run.json').read_text())['results'][1]['how']=='uniform, fold 2'
    monkeypatch.chdir(tmp_path)
    assert main(line.split()[1:])==0 and 'Fold 1 of 2\nuniform, fold 1, seed 7: finished before' in capsys.readouterr().out
    assert sorted(o.name for o in out.iterdir())==['history.csv','learner-fold1.pkl','learner-fold2.pkl','oof.csv','run.json']
    assert _what_is_left(out)==_what_is_left(whole)

@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    "The folder of a run that was never cut"
    out = tmp_path_factory.mktemp('whole')/'out'
    assert main(['finetune',str(photos),*_three,'--quiet','--out',str(out)])==0
    return out

def _stopping(monkeypatch, at):
    "Interrupt the fits of this process in epoch `at` of the last one, counted over all of them"
    from fastai_discriminative.compare import TrainClock
    n,old = [0],TrainClock.before_epoch
    def _f(self):
        n[0] += 1
        if n[0]==at: raise KeyboardInterrupt
        return old(self)
    monkeypatch.setattr(TrainClock, 'before_epoch', _f)

def test_other_runs_do_not_go_on(photos, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    args = ['finetune',str(photos),*_three,'--quiet','--out',str(out)]
    with monkeypatch.context() as m:
        _stopping(m, 5)
        assert main(args)==130
    assert 'Stopped by Ctrl-C' in capsys.readouterr().err
    before = {o.name:o.read_bytes() for o in out.iterdir()}
    for more,msg in ((['--bs','8'], 'started with bs=32, but now it is 8'), (['--epochs','4'], 'started with epochs=3'), (['--overwrite'], 'Use one of them')):
        assert msg in _fails(capsys, *args, '--resume', *more)
    assert 'continue that run with --resume' in _fails(capsys, *args)
    shutil.copytree(photos, tmp_path/'photos')
    (tmp_path/'photos'/'food'/'broken.png').unlink()
    shutil.copy(next((photos/'food').glob('*.webp')), tmp_path/'photos'/'food'/'one-more.webp')
    assert 'started with folder=' in _fails(capsys, 'finetune', tmp_path/'photos', *_three, '--out', out, '--resume')
    assert {o.name:o.read_bytes() for o in out.iterdir()}==before
    assert main([*args,'--resume','--time-limit','9'])==0 and _what_is_left(out)==_what_is_left(whole)
    capsys.readouterr()
    assert main([*args,'--resume'])==0 and 'nothing is left to do' in capsys.readouterr().out

def test_changed_images_do_not_go_on(photos, tmp_path, capsys, monkeypatch):
    shutil.copytree(photos, tmp_path/'photos')
    args = ['finetune',str(tmp_path/'photos'),*_three,'--quiet','--out',str(tmp_path/'out')]
    with monkeypatch.context() as m:
        _stopping(m, 5)
        assert main(args)==130
    next((tmp_path/'photos'/'food').glob('*.webp')).rename(tmp_path/'photos'/'food'/'another.webp')
    assert re.search(r"started with images='48 \(checksum \w+\)', but now", _fails(capsys, *args, '--resume'))

def test_an_interrupt_while_results_are_saved(photos, whole, tmp_path, capsys, monkeypatch):
    "What is finished is named, and the run goes on"
    args = ['finetune',str(photos),*_three,'--quiet','--out',str(tmp_path/'out')]
    with monkeypatch.context() as m:
        def _now(*a): raise KeyboardInterrupt
        m.setattr('fastai_discriminative.jobs._oof_table', _now)
        assert main(args)==130
    assert '2 finished fits (fold1, fold2)' in (err := capsys.readouterr().err) and '--resume' in err
    assert main([*args,'--resume'])==0 and _what_is_left(tmp_path/'out')==_what_is_left(whole)

def test_seeds_go_on(photos, tmp_path, capsys, monkeypatch):
    "Beside stock fastai, whose runs begin again"
    a,b = ([*map(str, ['finetune',photos,*_quick,'--seeds',2,'--compare','--out',tmp_path/o])] for o in 'ab')
    assert main(a)==0
    with monkeypatch.context() as m:
        _stopping(m, 5) # one epoch of ours, two of fastai's, one of ours
        assert main(b)==130
    assert main([*b,'--resume'])==0 and 'finished before' in capsys.readouterr().out
    def _scores(o): return [(r['how'],r['seed'],r['accuracy']) for r in json.loads((tmp_path/o/'run.json').read_text())['results']]
    assert _scores('a')==_scores('b') and len(_scores('a'))==4
    assert {o.name for o in (tmp_path/'b').iterdir()}=={'accuracy.png','history.csv','learner.pkl','report.html','run.json'}

def test_a_fit_that_a_time_limit_cut_goes_on(photos, whole, tmp_path, capsys, monkeypatch):
    "After whole epochs, with the limit of the next call: not with what was left of the old one"
    from fastai_discriminative.time_limit import CancelFitException,TimeLimit
    out = tmp_path/'out'
    args = ['finetune',str(photos),*_three,'--quiet','--out',str(out)]
    def _over(self):
        if self.epoch<1: return
        self.is_over,self.end = True,0.
        raise CancelFitException
    with monkeypatch.context() as m:
        m.setattr(TimeLimit, 'after_epoch', _over)
        assert main([*args,'--time-limit','9'])==0
    assert '--resume' in capsys.readouterr().out and {'fit-fold1.pt','fit-fold2.pt'}<={o.name for o in out.iterdir()}
    n = []
    monkeypatch.setattr(TimeLimit, 'before_epoch', lambda self: n.append(self.epoch) or setattr(self, '_began', time.monotonic()))
    assert main([*args,'--resume','--time-limit','9'])==0 and n==[2,2] and _what_is_left(out)==_what_is_left(whole)

def test_a_time_limit_leaves_a_run_that_goes_on(photos, whole, tmp_path, capsys):
    "There was time for nothing in a fold, then for all"
    out = tmp_path/'out'
    args = ['finetune',str(photos),*_three,'--quiet','--out',str(out)]
    assert main([*args,'--time-limit','.0001'])==2
    said = capsys.readouterr()
    assert said.out.count('There was no time for an epoch of this fold.')==2 and not out.exists()
    assert main([*args,'--resume','--time-limit','9'])==0 and _what_is_left(out)==_what_is_left(whole)

_quick = ['--arch','test_resnet','--from-scratch','--strategy','uniform','--size','32','--epochs','1','--threads','1','--quiet']

def test_a_folder_becomes_a_submission(photos, tmp_path, monkeypatch, capsys):
    "Two commands; a third does not replace what they wrote"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, 'comp/train')
    (tmp_path/'comp'/'test').mkdir()
    for i,f in enumerate(sorted((photos/'flags').glob('*.webp'))[:5]): shutil.copy(f, tmp_path/'comp'/'test'/f'{i}{f.suffix}')
    pd.DataFrame(dict(id=[4,3,2,1,0])).to_csv('comp/test.csv', index=False)
    assert main(['finetune','comp',*_quick])==main(['predict','discriminative-comp/learner.pkl','comp'])==0
    df = pd.read_csv('submission.csv')
    assert list(df.id)==[4,3,2,1,0] and set(df.label)<={'flags','food'}
    assert 'already exists' in _fails(capsys, 'predict', 'discriminative-comp', 'comp') and pd.read_csv('submission.csv').equals(df)
    assert 'no folder' in _fails(capsys, 'predict', 'discriminative-comp', 'comp', '--csv', 'nowhere/x.csv')
    with monkeypatch.context() as m:
        def _full(*a): raise OSError(28, 'No space left on device')
        m.setattr('fastai_discriminative.predict.Predictions.save', _full)
        assert 'Name another file with --csv' in _fails(capsys, 'predict', 'discriminative-comp', 'comp', '--csv', 'x.csv')
    assert main(['predict','discriminative-comp','comp','--overwrite','--tta','2','--ensemble','discriminative-comp/learner.pkl'])==0
    assert main(['finetune','comp',*_quick])==0 and (tmp_path/'discriminative-comp-2'/'learner.pkl').exists()
    assert 'results of another run' in _fails(capsys, 'finetune', 'comp', *_quick, '--out', 'discriminative-comp')
    assert main(['finetune','comp',*_quick,'--out','discriminative-comp','--overwrite'])==0

def test_json_is_all_that_stdout_has(photos, tmp_path, capsys):
    assert main(['finetune',str(photos),*_quick,'--json','--out',str(tmp_path/'a')])==0
    out,err = capsys.readouterr()
    rec = json.loads(out)
    assert rec==json.loads((tmp_path/'a'/'run.json').read_text()) and 'Saved' in err
    assert rec['arguments']['arch']=='test_resnet' and set(rec['versions'])=={'python','fastai_discriminative','fastai','timm','torch'}
    assert rec['results'][0]['accuracy']==pytest.approx(pd.read_csv(tmp_path/'a'/'history.csv').accuracy.iloc[-1])

def test_folds(photos, tmp_path, capsys):
    out = tmp_path/'out'
    assert main(['finetune',str(photos),*_quick,'--folds','3','--out',str(out)])==0
    assert 'Out-of-fold accuracy' in capsys.readouterr().out
    oof = pd.read_csv(out/'oof.csv')
    names = {f'{c}/{f.name}' for c in ('flags','food') for f in (photos/c).glob('*.webp')}
    assert len(oof)==48 and (oof.truth==oof.file.map(lambda o: Path(o).parent.name)).all() and {*oof.file}==names and len(list(out.glob('learner-fold?.pkl')))==3
    assert (oof.label==oof[['probability flags','probability food']].idxmax(1).str.removeprefix('probability ')).all()
    assert main(['finetune',str(photos),*_quick,'--folds','2','--out',str(out),'--overwrite'])==0 and len(list(out.glob('learner-fold?.pkl')))==2
    assert main(['predict',str(out),str(photos/'food'),'--csv',str(tmp_path/'x.csv')])==0
    assert main(['finetune',str(photos),*_quick,'--out',str(out),'--overwrite'])==0 and [o.name for o in out.glob('learner*')]==['learner.pkl']

@pytest.mark.parametrize('n_done,says', [(0,'No fit was completed, so nothing was saved'), (1,'The same command continues from there')])
def test_an_interrupted_comparison_says_what_is_kept(photos, tmp_path, monkeypatch, capsys, n_done, says):
    monkeypatch.chdir(tmp_path)
    def _interrupted(*a, fname, **kw):
        if n_done: fname.write_text('{}')
        raise KeyboardInterrupt
    monkeypatch.setattr('fastai_discriminative.jobs.compare_strategies', _interrupted)
    assert main(['compare',str(photos),'--strategies','lp_ft','uniform',*(o for o in _quick if o not in ('--strategy','uniform'))])==130
    assert says in capsys.readouterr().err
    assert (tmp_path/'discriminative-compare-photos').exists()==bool(n_done)

def test_compare_goes_on_where_it_stopped(photos, tmp_path, capsys):
    args = ['compare',str(photos),'--arch','test_resnet','--from-scratch','--size','32','--epochs','1','--threads','1','--quiet','--out',str(tmp_path/'c')]
    assert main([*args,'--strategies','uniform','--seeds','1'])==0
    first = json.loads((tmp_path/'c'/'comparison.json').read_text())['jobs']
    assert main([*args,'--strategies','uniform','fastai','--seeds','2'])==0
    jobs = json.loads((tmp_path/'c'/'comparison.json').read_text())['jobs']
    assert jobs[0]==first[0] and {(j['strategy'],j['seed']) for j in jobs}=={(s,k) for s in ('uniform','fastai') for k in (0,1)}
    assert Image.open(tmp_path/'c'/'comparison.png').size[0]>500 and '4 fits' in capsys.readouterr().out
    assert "started with size=32, but now it is 48" in _fails(capsys, *args, '--size', 48)
    assert "Did you mean 'lp_ft'" in _fails(capsys, *args, '--strategies', 'lpft')

@pytest.mark.parametrize('folds', [[], ['--folds','2']])
def test_a_time_limit_leaves_what_was_best(folds, photos, tmp_path, capsys):
    args = ['finetune',str(photos),*_quick,*folds,'--epochs','5000','--out',str(tmp_path/'out')]
    assert main([*args,'--time-limit','.08'])==0
    how = 'after 0.08 minutes'+(', divided between 2 folds' if folds else '')
    assert f'Stopped {how}.' in capsys.readouterr().out
    run = json.loads((tmp_path/'out'/'run.json').read_text())
    assert run['stopped']==how and len(run['results'])==len(list((tmp_path/'out').glob('learner*.pkl')))==(2 if folds else 1)
    assert re.search('no time for an epoch|no learners to predict with', _fails(capsys, *args, '--time-limit', '1e-6', '--overwrite'))

@pytest.fixture
def comp(photos, tmp_path):
    "A competition's folder with labels in a table"
    root = tmp_path/'comp'
    for d in ('train_images','test_images'): (root/d).mkdir(parents=True)
    rows = [(f'{i:03}',f,c) for i,(c,f) in enumerate((c,f) for c in ('flags','food') for f in sorted((photos/c).glob('*.webp'))[:12])]
    for i,f,c in rows: shutil.copy(f, root/'train_images'/f'{i}.webp')
    for i in range(4): shutil.copy(rows[i][1], root/'test_images'/f'{i:03}.webp') # the same names as in the other folder
    pd.DataFrame([(i,int(c=='food'),f'p{int(i)//3}') for i,f,c in rows], columns=['id','target','patient']).to_csv(root/'train.csv', index=False)
    pd.DataFrame(dict(id=['002','001','000','003'], target=0)).to_csv(root/'sample_submission.csv', index=False)
    return root

def test_a_table_becomes_a_submission(comp, monkeypatch, capsys):
    monkeypatch.chdir(comp.parent)
    assert main(['finetune','comp',*_quick,'--folds','2','--group-col','patient'])==0
    assert "Labels: 'target' of train.csv, 8 groups of 'patient' kept whole" in capsys.readouterr().out
    oof = pd.read_csv('discriminative-comp/oof.csv', dtype=str)
    train = pd.read_csv(comp/'train.csv', dtype=str).set_index('id')
    ids = oof.id # the table's own, under its own heading
    assert sorted(ids)==sorted(train.index) and list(oof.truth)==list(train.target[ids])
    assert not {*train.patient[ids[:12]]}&{*train.patient[ids[12:]]}, 'half of the images are of one fold, and share no patient with the rest'
    for images in ('comp','comp/test_images'): # the sample lies beside either
        assert main(['predict','discriminative-comp',images,'--overwrite'])==0
        assert 'For the probability of one class, add --positive 1' in capsys.readouterr().out
        df = pd.read_csv('submission.csv', dtype=str)
        assert list(df)==['id','target'] and list(df.id)==['002','001','000','003'] and set(df.target)<={'0','1'}
    assert main(['predict','discriminative-comp','comp','--positive','1','--csv','p.csv'])==0 and '--positive' not in capsys.readouterr().out
    assert ((p := pd.read_csv('p.csv').target)>0).all() and (p<1).all()
    assert "Did you mean 'target'" in _fails(capsys, 'finetune', 'comp', *_quick, '--label-col', 'targte')
    assert main(['finetune','comp/train.csv',*_quick,'--label-col','patient','--id-col','id'])==0 and "Labels: 'patient' of train.csv" in capsys.readouterr().out
    assert sorted(o.name for o in Path('.').glob('discr*'))==['discriminative-comp','discriminative-comp-2']
