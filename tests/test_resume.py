"An interrupted fit continues from its file, to the bit as if it had not stopped; no other fit does"
import json,os,random,shutil,signal,subprocess,sys,tempfile,traceback,warnings
from collections import deque
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import numpy as np,pytest,torch
from fastai.vision.all import (Adam,Callback,CrossEntropyLossFlat,EarlyStoppingCallback,Flip,GradientAccumulation,ImageDataLoaders,
    MixUp,Normalize,ReduceLROnPlateau,Resize,aug_transforms,error_rate,partial,set_seed)

from fastai_discriminative.all import *
from fastai_discriminative import auto as at_,resume as rs,same_fit,strategies as st
from helpers import *
from helpers import pre_ours as ours

@pytest.fixture
def dls(bright): return bright_dls(bright)

@pytest.fixture(autouse=True)
def as_in_a_test(monkeypatch, too_sure):
    "A head in three cached epochs that is too sure, trials in short fits too, and a file at the end of every epoch, however short"
    monkeypatch.setattr(st._lp, '__defaults__', (3,))
    monkeypatch.setattr(rs, '_write_share', 0)
    monkeypatch.setattr(at_, '_trial_share', .9)
    monkeypatch.setattr(at_, '_least_steps', 2)

class Cut(Callback):
    "An interrupt at training batch `at` of the whole fit; the file restores its counter"
    order = 58
    def __init__(self, at): self.at,self.n = at,0
    def before_batch(self):
        if self.training:
            if self.n==self.at: self.stop()
            self.n += 1
    def stop(self): raise KeyboardInterrupt

fits = dict(one_cycle=lambda l, **kw: l.fit_one_cycle(3, 'preset', **kw), lp_ft=lambda l, **kw: l.fit_strategy('lp_ft', 2, **kw),
    gradual=lambda l, **kw: l.fit_strategy('gradual_unfreeze', 3, **kw), auto=lambda l, **kw: l.fit_strategy('auto', 2, **kw))

def first(images, **kwargs):
    set_seed(0)
    return ours(bright_dls(images), **kwargs)

def other(path, **kwargs):
    "The same learner as another process may build it: another head, and other random numbers"
    learn = ours(bright_dls(path), **kwargs)
    set_seed(99)
    for p in learn.model[1].parameters(): torch.nn.init.normal_(p)
    for dl in learn.dls.loaders: dl.rng = random.Random(3)
    return learn

def state(learn):
    "Everything that must be equal"
    rec,o = learn.recorder,learn.opt.state_dict()
    own = dict(weights=weights(learn), flags=flags(learn), frozen=learn.opt.frozen_idx, moments=list(o['state']), hypers=list(o['hypers']))
    history = dict(rows=[list(v) for v in rec.values], lrs=rec.lrs, losses=rec.losses, iters=rec.iters, hps=vars(rec).get('hps'))
    last = dict(final=list(learn.final_record), peak=learn.peak_lrs, epoch=learn.epoch, evidence=repr(vars(learn).get('auto_evidence')))
    dice = dict(torch=torch.get_rng_state(), numpy=np.random.get_state()[1], python=random.getstate(), loaders=[dl.rng.getstate() for dl in learn.dls.loaders])
    return {**own, **history, **last, **dice}

def equal(a, b, at=''):
    assert type(a) is type(b), at
    if isinstance(a, dict): assert a.keys()==b.keys() and all(equal(a[k], b[k], f'{at} {k}') for k in a), at
    elif isinstance(a, (list,tuple)): assert len(a)==len(b) and all(equal(x, y, f'{at} {i}') for i,(x,y) in enumerate(zip(a, b))), at
    elif isinstance(a, torch.Tensor): assert torch.equal(a, b), at
    else: assert np.array_equal(a, b, equal_nan=isinstance(a, float)), (at, a, b)
    return True

@lru_cache
def whole(name, images):
    "The end of the uninterrupted fit `name`"
    learn = first(images)
    fits[name](learn)
    return state(learn)

@pytest.mark.parametrize('name,cuts', [('one_cycle',(0,6)), ('lp_ft',(5,17)), ('gradual',(9,)), ('auto',(2,14,18))])
def test_cut_off_at_some_batch(name, cuts, bright, tmp_path):
    "Interrupt several times, and continue in a new learner each time"
    end,k = whole(name, bright),4
    for i,c in enumerate(cuts):
        learn = (other if i else first)(bright)
        with pytest.raises(KeyboardInterrupt): fits[name](learn, resume=tmp_path/'fit.pt', cbs=Cut(c))
    learn,spy = other(bright),Spy()
    fits[name](learn, resume=tmp_path/'fit.pt', cbs=spy)
    assert len(spy.lrs)==len(end['lrs'])-c//k*k and k==len(learn.dls.train)
    equal(end, state(learn))
    assert name!='auto' or 'trial at' in end['evidence'] and 'logits times' in end['evidence']
    assert sorted(o.name for o in tmp_path.iterdir())==['fit.pt'] and '_do_fit' not in vars(learn)

def cut(path, fname, at, fit=fits['one_cycle'], cbs=(), make=first, **kwargs):
    "A learner whose fit was interrupted at batch `at`"
    learn = make(path, **kwargs)
    with pytest.raises(KeyboardInterrupt): fit(learn, resume=fname, cbs=[*cbs, Cut(at)])
    return learn

# ---- a fit that is complete

def test_what_is_complete_is_not_trained_again(bright, tmp_path):
    def twice(make):
        learn = make(bright)
        learn.fit_strategy('auto', 1, resume=tmp_path/'a.pt')
        middle = state(learn)
        learn.fit_one_cycle(1, 1e-3, resume=tmp_path/'b.pt')
        return middle,state(learn),learn
    a,b,_ = twice(first)
    (tmp_path/'b.pt').unlink()
    with pytest.warns(UserWarning) as said: c,d,learn = twice(other)
    assert all('Nothing is trained' in str(o.message) for o in said if o.category is UserWarning), [str(o.message) for o in said]
    assert len(learn.recorder.group_hps)==len(learn.recorder.lrs)>0 and learn.plot_rates()
    equal(a, c)
    equal(b, d)
    assert [p.name for p in learn.auto_evidence.points]==['head','end','average','halfway']

def test_an_early_end_is_an_end(bright, tmp_path):
    def fit(learn): learn.fit_one_cycle(4, 1e-6, cbs=EarlyStoppingCallback('valid_loss', min_delta=9, patience=1), resume=tmp_path/'fit.pt')
    learn = first(bright)
    fit(learn)
    was = state(learn)
    assert len(was['rows'])==2
    again = other(bright)
    with pytest.warns(UserWarning, match='complete'): fit(again)
    equal(was, state(again))

def test_cut_off_between_the_last_epoch_and_the_end(bright, tmp_path):
    "The choice of a point starts again"
    class Late(Callback):
        order = 1
        def after_fit(self): raise KeyboardInterrupt
    learn = first(bright)
    learn.fit_strategy('auto', 1)
    whole = state(learn)
    with pytest.raises(KeyboardInterrupt): first(bright).fit_strategy('auto', 1, cbs=Late(), resume=tmp_path/'fit.pt')
    learn,spy = other(bright),Spy()
    learn.fit_strategy('auto', 1, cbs=spy, resume=tmp_path/'fit.pt')
    assert not spy.lrs
    equal(whole, state(learn))

# ---- together with

class Half(Callback):
    "Holds a count that decides, and freezes the body for the second half"
    def __init__(self): self.seen = 0
    def before_epoch(self):
        self.seen += 1
        if self.seen==2: self.learn.true_freeze.freeze_to(2)

class Moody(Callback):
    "Changes the images by what it keeps: two generators, a queue, and an argument that it counts down"
    def __init__(self, left=7): self.left,self.dice,self.rng,self.seen = left,random.Random(0),np.random.default_rng(0),deque(maxlen=3)
    def before_batch(self):
        if not self.training: return
        self.left -= 1
        self.seen.append(self.left)
        self.learn.xb = (self.x*(1 + .1*self.dice.random() + .1*self.rng.random() + .01*sum(self.seen) + .1*(self.left>0)),)

class Average(Callback):
    "A running average of the model, made at the start or with the first batch"
    def __init__(self, late=False): self.late,self.ema = late,None
    def before_fit(self): self.ema = None if self.late else deepcopy(self.learn.model)
    def after_batch(self):
        self.ema = self.ema or deepcopy(self.learn.model)
        for a,b in zip(self.ema.parameters(), self.learn.model.parameters()): a.data.lerp_(b.data, .1)

def frozen_cycle(learn, **kwargs):
    learn.freeze()
    learn.fit_one_cycle(3, 1e-3, **kwargs)

def accumulating(): return [GradientAccumulation(24)]
others = dict(adam=dict(opt_func=Adam), accumulate=dict(cbs=accumulating), adam_accumulates=dict(cbs=accumulating, opt_func=Adam))
others.update(moody=dict(cbs=lambda: [Moody()]))
others.update(mixup=dict(cbs=lambda: [MixUp()]), freezes=dict(cbs=lambda: [Half()]), sgdr=dict(fit=lambda l, **kw: l.fit_sgdr(2, 1, 1e-3, **kw)))
others.update(plateau=dict(cbs=lambda: [ReduceLROnPlateau('valid_loss', min_delta=9)], fit=lambda l, **kw: l.fit(4, 1e-3, **kw)))
others.update(views=dict(cbs=lambda: [CachedFeatures(n_views=2)], fit=frozen_cycle, views=True))
others.update(sgd=dict(opt_func=partial(fused_sgd, mom=.9), fit=lambda l, **kw: l.fit_flat_cos(3, 1e-2, **kw)))

@pytest.mark.parametrize('name', others)
def test_together_with(name, bright, tmp_path):
    case = dict(others[name])
    cbs,fit,views = case.pop('cbs', list),case.pop('fit', lambda l, **kw: l.fit_one_cycle(3, 1e-3, **kw)),case.pop('views', False)
    def make(other):
        set_seed(0)
        dls = ImageDataLoaders.from_folder(bright, valid_pct=.33, seed=1, bs=8, num_workers=0, item_tfms=Resize(32),
            batch_tfms=aug_transforms(size=32) if views else None)
        learn = pre_plain(dls, **case).split(3)
        if other: set_seed(9)
        return learn
    learn = make(False)
    fit(learn, cbs=cbs())
    whole = state(learn)
    learn = make(False)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[*cbs(), Cut(9)], resume=tmp_path/'fit.pt')
    learn,spy = make(True),Spy()
    fit(learn, cbs=[*cbs(), spy], resume=tmp_path/'fit.pt')
    assert len(spy.lrs)==len(whole['lrs'])-8
    equal(whole, state(learn))

def test_what_a_callback_was_built_with_is_that_of_the_call(bright, tmp_path):
    cut(bright, tmp_path/'fit.pt', 5, cbs=[EarlyStoppingCallback('valid_loss', min_delta=9, patience=1)])
    learn,stop = other(bright),EarlyStoppingCallback('valid_loss', min_delta=9, patience=9)
    fits['one_cycle'](learn, cbs=stop, resume=tmp_path/'fit.pt')
    assert len(learn.recorder.values)==3 and stop.wait==2

def test_what_you_froze_stays_frozen(bright, tmp_path):
    def make(f):
        learn = f(bright)
        learn.model[1][-1].weight.requires_grad_(False)
        return learn
    cut(bright, tmp_path/'fit.pt', 5, make=lambda path: make(first))
    learn = make(other)
    fits['one_cycle'](learn, resume=tmp_path/'fit.pt')
    assert not learn.model[1][-1].weight.requires_grad and learn.model[0].model.conv1[0].weight.requires_grad

def test_the_state_of_a_callback_that_is_gone(bright, tmp_path):
    cut(bright, tmp_path/'fit.pt', 5)
    with pytest.warns(UserWarning, match="holds the state of 'Cut', which this fit does not have"): fits['one_cycle'](other(bright), resume=tmp_path/'fit.pt')

def test_an_object_that_a_callback_makes(bright, tmp_path):
    "It goes on from its state if `before_fit` makes it; else a warning names it"
    whole,cb,late = Average(),Average(),Average(True)
    fits['one_cycle'](first(bright), cbs=whole)
    cut(bright, tmp_path/'fit.pt', 9, cbs=[Average()])
    fits['one_cycle'](other(bright), cbs=cb, resume=tmp_path/'fit.pt')
    assert same(cb.ema.state_dict(), whole.ema.state_dict())
    cut(bright, tmp_path/'late.pt', 9, cbs=[Average(True)])
    with pytest.warns(UserWarning, match='`Average.ema` is not used.*before_fit'): fits['one_cycle'](other(bright), cbs=late, resume=tmp_path/'late.pt')

def test_a_callback_that_is_new_is_named(bright, tmp_path):
    cut(bright, tmp_path/'fit.pt', 5)
    with pytest.warns(UserWarning, match="This fit has 'MixUp', which it did not have"): fits['one_cycle'](other(bright), cbs=MixUp(), resume=tmp_path/'fit.pt')

def test_in_the_same_process_too(bright, tmp_path):
    "A notebook whose cell is stopped and run once more"
    learn = cut(bright, tmp_path/'fit.pt', 14, fits['auto'])
    fits['auto'](learn, resume=tmp_path/'fit.pt')
    equal(whole('auto', bright), state(learn))

def test_what_a_scaler_of_gradients_has_learnt(bright, tmp_path):
    "Mixed precision keeps its scaler in the learner while it trains"
    class Scaler:
        scale = 1
        def state_dict(self): return dict(scale=self.scale)
        def load_state_dict(self, sd): self.scale = sd['scale']
    class Scales(Callback):
        def before_fit(self): self.learn.scaler = Scaler()
        def after_batch(self):
            if self.training: self.learn.scaler.scale *= 2
        def after_fit(self): self.end,self.learn.scaler = self.learn.scaler.scale,None
    def make(): return pre_plain(bright_dls(bright)).split(3)
    with pytest.raises(KeyboardInterrupt): make().fit_one_cycle(3, 1e-3, cbs=[Scales(), Cut(9)], resume=tmp_path/'fit.pt')
    cb = Scales()
    make().fit_one_cycle(3, 1e-3, cbs=cb, resume=tmp_path/'fit.pt')
    assert cb.end==2**12

# ---- other fits

def other_data(path, drop=(), bs=8):
    set_seed(0)
    dls = bright_dls(path)
    if drop: dls = ImageDataLoaders.from_folder(path, valid_pct=.33, seed=2, bs=8, num_workers=0)
    dls.train.bs = bs
    return ours(dls)

refused = dict(n_epoch=(first, lambda l, **kw: l.fit_one_cycle(5, 'preset', **kw), 'n_epoch is 3 there and 5 here'),
    rate=(first, lambda l, **kw: l.fit_one_cycle(3, 1e-3, **kw), 'lr_max is .* there and 0.001 here'),
    method=(first, lambda l, **kw: l.fit_flat_cos(3, 'preset', **kw), 'fit is fit_one_cycle there and fit_flat_cos here'),
    strategy=(first, fits['lp_ft'], 'strategy is missing there and lp_ft here'),
    model=(lambda p: ours(bright_dls(p), 'resnet18'), fits['one_cycle'], 'model weight .* is missing there and'),
    split=(lambda p: other_data(p, drop=True), fits['one_cycle'], 'data training sum over all items'), bs=(lambda p: other_data(p, bs=4), fits['one_cycle'], 'data training batch size is 8 there and 4 here'),
    optimizer=(lambda p: first(p, opt_func=Adam), fits['one_cycle'], 'optimizer'), metrics=(lambda p: first(p, metrics=error_rate), fits['one_cycle'], 'metrics is ..accuracy.. there and'),
    number=(first, lambda l, **kw: l.fit_one_cycle(3, 'preset', start_epoch=1, **kw), 'Leave out `start_epoch`'), fine_tune=(first, lambda l, **kw: l.fine_tune(3, **kw), 'two fits'),
    unsplit=(lambda p: pre_stock(bright_dls(p)), lambda l, **kw: l.fit_one_cycle(3, 1e-3, **kw), 'needs layer groups'))

def changed_by(f):
    def make(path):
        learn = first(path)
        f(learn)
        return learn
    return make, fits['one_cycle']
def dropout(learn): next(m for m in learn.model.modules() if isinstance(m, torch.nn.Dropout)).p = .9
def weighted(learn): learn.loss_func = CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.]))
def keeping(learn): learn.dls.train.drop_last = False
def flipping(learn): learn.dls.train.after_batch.add(Flip())
def labelled(learn): learn.dls.train_ds.tls[1].items = learn.dls.train_ds.tls[1].items[::-1]
refused.update(layer=(*changed_by(dropout), r'model layer .* is Dropout\(p=.* there and Dropout\(p=0.9'), loss=(*changed_by(weighted), 'loss func weight is None there and'),
    drop_last=(*changed_by(keeping), 'training drop_last is True there and False here'), transforms=(*changed_by(flipping), 'training transforms after_batch .* is missing there'),
    labels=(*changed_by(labelled), 'training sum over labels is'), opt_args=(lambda p: first(p, opt_func=partial(fused_adamw, eps=1e-2)), fits['one_cycle'], "opt_func is .* there and .*'eps': 0.01"),
    no_name=(first, lambda l, resume: l.fit_one_cycle(3, 'preset', resume=True), '`resume` takes the name of a file'))

def test_a_lambda_is_known_by_what_is_in_it(bright, tmp_path):
    def fit(lr): return lambda l, **kw: l.fit_strategy([Phase(2, lambda learn, epoch: lr)], **kw)
    cut(bright, tmp_path/'fit.pt', 5, fit(1e-3))
    with pytest.raises(ResumeError, match='phases 0 lr is lambda of 0.001 there and lambda of 0.01 here'): fit(1e-2)(other(bright), resume=tmp_path/'fit.pt')
    fit(1e-3)(other(bright), resume=tmp_path/'fit.pt')

def test_the_name_of_a_lambda_tells_its_defaults_and_bears_what_has_no_value_yet():
    assert len({same_fit._name(f) for f in (lambda x: x, lambda x, k=3: x, lambda x, k=4: x, lambda x, *, k=5: x)})==4
    f = lambda: (later, 7)
    assert same_fit._name(f)=='lambda of 7'
    later = 2
    assert same_fit._name(f)=='lambda of 7, 2' and f()==(2, 7)

def test_other_fits_are_refused(bright, tmp_path):
    fname = tmp_path/'fit.pt'
    cut(bright, fname, 5)
    held = fname.read_bytes()
    for name,(make,fit,text) in refused.items():
        learn = make(bright)
        was = snapshot(learn)
        with pytest.raises(ResumeError, match=text): fit(learn, resume=fname)
        unchanged(learn, was)
        assert fname.read_bytes()==held and '_do_fit' not in vars(learn)
    learn = first(bright)
    learn.freeze()
    assert learn.opt.frozen_idx
    with pytest.raises(ResumeError, match='frozen groups is 0 there and'): fits['one_cycle'](learn, resume=fname)

def test_what_is_no_file_of_a_fit(bright, tmp_path):
    "It is not changed, since it may be a user's model"
    learn,fname = first(bright, path=tmp_path),tmp_path/'fit.pt'
    cut(bright, fname, 5)
    whole = fname.read_bytes()
    (tmp_path/'half.pt').write_bytes(whole[:len(whole)//2])
    (tmp_path/'empty.pt').write_bytes(b'')
    learn.save('model')
    (tmp_path/'folder').mkdir()
    torch.save(Path, tmp_path/'code.pt')
    for name,text in {'half.pt':'damaged', 'empty.pt':'damaged', 'code.pt':'cannot be read', 'models/model.pth':'another program wrote it', 'folder':'is a folder'}.items():
        was,held = snapshot(learn),(tmp_path/name).is_file() and (tmp_path/name).read_bytes()
        with pytest.raises(ResumeError, match=text): fits['lp_ft'](learn, resume=tmp_path/name)
        unchanged(learn, was)
        assert held is False or (tmp_path/name).read_bytes()==held

def test_the_number_of_an_epoch_is_not_enough_for_auto(dls):
    learn = ours(dls)
    was = snapshot(learn)
    with pytest.raises(StrategyError, match="resume='file'"): learn.fit_strategy('auto', 3, start_epoch=4)
    with pytest.raises(StrategyError, match='not a list of phases'): learn.fit_strategy('fastai', 3, resume='fit.pt')
    unchanged(learn, was)

def test_data_that_moved_are_the_same_data(bright, tmp_path):
    cut(bright, tmp_path/'fit.pt', 5)
    shutil.copytree(bright, tmp_path/'elsewhere')
    learn = other(tmp_path/'elsewhere')
    fits['one_cycle'](learn, resume=tmp_path/'fit.pt')
    assert len(learn.recorder.values)==3

# ---- writes

def test_a_write_that_fails_leaves_the_file_and_the_fit_as_they_are(bright, tmp_path, monkeypatch):
    def full(o, f):
        f.write(b'half of it')
        raise OSError(28, 'No space left on device')
    fname = tmp_path/'fit.pt'
    cut(bright, fname, 5)
    held = fname.read_bytes()
    learn = other(bright)
    with monkeypatch.context() as m, pytest.warns(UserWarning, match='No space left.*continues, and the file is unchanged'):
        m.setattr(torch, 'save', full)
        fits['one_cycle'](learn, resume=fname)
    assert fname.read_bytes()==held and [o.name for o in tmp_path.iterdir()]==['fit.pt']
    again = other(bright)
    fits['one_cycle'](again, resume=fname)
    equal(state(learn), state(again))
    with monkeypatch.context() as m, pytest.raises(ResumeError, match='cannot be written'):
        m.setattr(torch, 'save', full)
        fits['one_cycle'](first(bright), resume=tmp_path/'new.pt')

def test_short_epochs_do_not_wait_for_the_disk(bright, tmp_path, monkeypatch):
    monkeypatch.setattr(rs, '_write_share', 1e9)
    n,save = [],torch.save
    monkeypatch.setattr(torch, 'save', lambda *args: (n.append(1), save(*args)))
    pre_plain(bright_dls(bright)).split(3).fit_one_cycle(5, 1e-3, resume=tmp_path/'fit.pt')
    assert len(n)==3 # the start, the last epoch, the end

# ---- SIGKILL

class Kill(Cut):
    "SIGKILL at training batch `at` of the whole fit"
    def stop(self): os.kill(os.getpid(), signal.SIGKILL)

def kill_at_write(n):
    "SIGKILL in the `n`th write, before the disk has it"
    sync,left = os.fsync,[n]
    def _sync(fd):
        left[0] -= 1
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        sync(fd)
    os.fsync = _sync

def process(path, name, fname, at, seed, out):
    "What one process does: the fit `name`, killed at batch `at` or, if that is negative, in write `-at`; its result goes to `out`"
    torch.set_num_threads(1)
    st._lp.__defaults__,rs._write_share,at_._trial_share,at_._least_steps = (3,),0,.9,2
    learn = (other if seed else first)(Path(path))
    if at and at<0: kill_at_write(-at)
    fits[name](learn, resume=fname, cbs=[Kill(at)] if at and at>0 else [])
    torch.save(state(learn), out)

def forked(*args):
    "The exit status of `process(*args)` in a child of this process"
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: process(*args)
    except BaseException: os._exit(traceback.print_exc() or 1)
    os._exit(0)

def spawned(*args): return subprocess.run([sys.executable, '-W', 'ignore', __file__, 'process', json.dumps(args, default=str)], env={**os.environ, 'PYTHONHASHSEED':'random'}).returncode

def killed(path, folder, name, kills, start):
    "Is the fit `name`, killed at each of `kills` and going on in a new process every time, equal to the whole one?"
    whole,out,fname = folder/f'{name}-whole',folder/f'{name}-out',folder/f'{name}.pt'
    if not whole.exists(): assert start(path, name, None, None, 0, whole)==0
    out.unlink(missing_ok=True)
    fname.unlink(missing_ok=True)
    for i,at in enumerate(kills): assert start(path, name, fname, at, i, out)==-signal.SIGKILL, (name, kills)
    assert not out.exists() and start(path, name, fname, None, 1, out)==0
    return equal(*(torch.load(o, weights_only=False) for o in (whole,out)))

def test_killed_three_times(bright):
    "By SIGKILL, each time going on in a new process; `python tests/test_resume.py 20 FOLDER` kills more"
    res = subprocess.run([sys.executable, __file__, '1', str(bright), 'fork', 'auto'], capture_output=True, text=True)
    assert not res.returncode and 'auto killed at' in res.stdout, res.stdout+res.stderr[-3000:]

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    what,*args = sys.argv[1:]
    if what=='process': process(*json.loads(args[0]))
    else:
        path,names,folder = Path(args[0]),args[2:] or list(fits),Path(tempfile.mkdtemp())
        n_batches,start,n_kills = dict(one_cycle=12, lp_ft=20, gradual=12, auto=20),*((forked,3) if 'fork' in args else (spawned,1))
        for i in range(int(what)):
            name = names[i%len(names)]
            kills = sorted(random.sample(range(1, n_batches[name]), n_kills)) if n_kills>1 or random.random()<.7 else [-random.randint(2, 4)]
            killed(path, folder, name, kills, start)
            print(f'{i+1}: {name} killed at {kills}: equal', flush=True)
        shutil.rmtree(folder)

def test_statistics_of_a_random_batch_need_a_seed(bright):
    def _told(seed):
        set_seed(seed)
        dls = ImageDataLoaders.from_folder(bright, valid_pct=.33, seed=1, bs=8, num_workers=0, batch_tfms=Normalize())
        return same_fit._told_data(dls.train, str(dls.path), 1)
    assert _told(1)==_told(1)
    assert 'Normalize' in str(_told(1)['transforms']) and any(_told(1)!=_told(o) for o in (2,3))
