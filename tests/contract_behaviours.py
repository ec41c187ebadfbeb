"The documented behaviour of fastai's optimisers and learners as plain text; `python contract_behaviours.py FOLDER with|without OUT.json`"
import hashlib,inspect,json,pickle,random,sys,warnings
from functools import partial
from pathlib import Path
warnings.simplefilter('ignore')
import numpy as np,torch
from torch import nn
from fastai.vision.all import *
import fastai.callback.schedule as schedule

folder = Path('.') # where learners write

# ---- how to tell

def told(o):
    "`o` in plain text and lists, to the last bit"
    if isinstance(o, torch.Tensor): o = o.detach().cpu().contiguous().as_subclass(torch.Tensor).numpy()
    if isinstance(o, np.ndarray): return [list(o.shape), str(o.dtype), hashlib.sha1(np.ascontiguousarray(o).tobytes()).hexdigest()[:12]]
    if isinstance(o, (np.generic,)): return [str(o.dtype), told(o.item())]
    if isinstance(o, float): return o.hex()
    if isinstance(o, (type(None),bool,int)): return o
    if isinstance(o, (str,Path)): return str(o).replace(str(folder), '.')
    if isinstance(o, dict): return [type(o).__name__, [[told(k), told(v)] for k,v in o.items()]]
    if isinstance(o, (list,tuple,L)): return [type(o).__name__, *map(told, o)]
    if isinstance(o, slice): return ['slice', told(o.start), told(o.stop)]
    return getattr(o, '__name__', type(o).__name__)

def raised(f, *args, **kwargs):
    "The error that `f` raises"
    try: return 'nothing', f(*args, **kwargs)
    except BaseException as e: return type(e).__name__,str(e)[:300]

def warned(f, *args, **kwargs):
    "The warnings of `f`"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message)[:200] for w in ws if issubclass(w.category, UserWarning)]

# ---- what is tried

def layer(ni, nf): return nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU())
def net():
    torch.manual_seed(0)
    return nn.Sequential(layer(3,4), layer(4,4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3)))
def lists(m): return L(m[0], m[1], m[2]).map(params)
def picture(i): return torch.randn(3,6,6, generator=torch.Generator().manual_seed(i))
def label(i): return torch.tensor(i%3)
def data():
    dsets = Datasets(list(range(12)), [[picture],[label]], splits=(list(range(12)), list(range(6))))
    dls = dsets.dataloaders(bs=4, val_bs=6, num_workers=0, device='cpu', path=folder)
    dls.c = 3
    dls.train.rng.seed(1)
    return dls

def learner(splitter=lists, metrics=accuracy, **kwargs):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    learn = Learner(data(), net(), loss_func=CrossEntropyLossFlat(), splitter=splitter, metrics=metrics, **kwargs)
    learn.logged = []
    learn.logger = lambda row: learn.logged.append([o for o in row if not (isinstance(o, str) and ':' in o)])
    return learn.remove_cbs(ProgressCallback) if learn._grab_cbs(ProgressCallback) else learn

def names(learn): return {id(p):n for n,p in learn.model.named_parameters()}
def of_opt(opt): return dict(state=[opt.state.get(p, {}) if isinstance(opt, Optimizer) else opt.opt.state.get(p, {}) for ps in opt.param_lists for p in ps],
    hypers=opt.hypers, frozen=opt.frozen_idx)
def of_learner(learn):
    "Everything that a call can change"
    rec = learn.recorder
    res = dict(model=learn.model.state_dict(), flags=[p.requires_grad for p in learn.model.parameters()], modes=[m.training for m in learn.model.modules()],
        opt=learn.opt and of_opt(learn.opt), cbs=learn.cbs, attrs=sorted(k for k in vars(learn) if k not in ('logged','lock')), logged=learn.logged,
        rng=[torch.get_rng_state(), np.random.rand(), random.random()])
    return {**res, 'recorder':{k:getattr(rec, k, None) for k in ('lrs','losses','iters','values','metric_names','hps','log')}}

def trained(f, **kwargs):
    learn = learner(**kwargs)
    res = f(learn)
    return of_learner(learn),None if res is learn else res

def steps(opt_func, n=8):
    "Some steps, some of them with a frozen group or a layer without a gradient"
    m = net()
    opt = opt_func(lists(m), lr=slice(1e-3,1e-1))
    for i in range(n):
        if i==3: opt.freeze_to(1)
        if i==5: opt.unfreeze()
        m(torch.randn(4,3,6,6, generator=torch.Generator().manual_seed(i))).pow(2).mean().backward()
        if i==6:
            for p in m[1].parameters(): p.grad = None
        opt.step()
        opt.zero_grad()
    return list(m.parameters()),of_opt(opt),opt.state_dict() if isinstance(opt, Optimizer) else None

behaviours = {}
def behaviour(f):
    behaviours[f.__name__.replace('_', ' ')] = f
    return f

# ---- Optimizer

opts = dict(sgd=SGD, sgd_momentum=partial(SGD, mom=0.9, wd=.1), sgd_l2=partial(SGD, wd=.1, decouple_wd=False), rmsprop=RMSProp,
    rmsprop_momentum=partial(RMSProp, mom=0.9, wd=.1), adam=Adam, adam_l2=partial(Adam, wd=.1, decouple_wd=False), radam=RAdam, qhadam=QHAdam, larc=Larc,
    lars=partial(Larc, clip=False), lamb=Lamb, lookahead=lambda ps,lr: Lookahead(SGD(ps, lr), k=3), ranger=ranger,
    wrapper=lambda ps,lr: OptimWrapper(ps, opt=torch.optim.AdamW, lr=1e-2),
    wrapper_sgd=lambda ps,lr: OptimWrapper(ps, opt=torch.optim.SGD, lr=1e-2, momentum=.9))
for k,f in opts.items(): behaviours[f'steps of {k}'] = partial(steps, f)

def opt_of(f=Adam, **kwargs): return f(lists(net()), lr=1e-2, **kwargs)

@behaviour
def optimizer_takes_defaults_of_its_steps():
    def fade(p, lr, rate, **kwargs): p.data.mul_(1-lr*rate)
    fade.defaults = dict(rate=.5)
    m = net()
    opt = Optimizer(lists(m), [fade,sgd_step], lr=.1)
    for p in m.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    return opt.hypers,list(m.parameters()),[len(ps) for ps in opt.param_lists],[len(ps) for ps in Optimizer(list(m.parameters()), sgd_step, lr=1.).param_lists]
@behaviour
def optimizer_sets_hypers():
    res = []
    for v in (1e-3, slice(1e-4,1e-2), slice(1e-2), [1.,2.,3.], np.array([1.,2.,3.])):
        opt = opt_of()
        opt.set_hyper('lr', v)
        opt.set_hypers(wd=v, mom=.5)
        res.append(opt.hypers)
    return res,raised(opt.set_hyper, 'lr', [1.,2.]),opt.param_groups[0].keys()
@behaviour
def optimizer_param_groups_can_be_set():
    opt = opt_of()
    opt.param_groups = [{**g, 'lr':i} for i,g in enumerate(opt.param_groups)]
    return opt.hypers
@behaviour
def optimizer_freezes():
    res = []
    for f in (lambda o: o.freeze(), lambda o: o.freeze_to(1), lambda o: o.freeze_to(-2), lambda o: (o.freeze(), o.unfreeze()), lambda o: o.freeze_to(3)):
        for g in (Adam, lambda ps,lr: OptimWrapper(ps, opt=torch.optim.SGD, lr=lr)):
            opt = opt_of(g)
            opt.state[opt.param_lists[0][2]]['force_train'] = True
            res.append((warned(f, opt), opt.frozen_idx, [p.requires_grad for ps in opt.param_lists for p in ps]))
    return res
@behaviour
def optimizer_steps_only_on_gradients_and_takes_no_closure():
    opt = opt_of()
    p = opt.param_lists[1][0]
    p.grad = torch.ones_like(p)
    opt.step()
    n = len(opt.all_params(with_grad=True)),len(opt.all_params(slice(1,None)))
    return n,[len(s) for s in opt.state.values()],raised(opt.step, lambda: 0),opt.zero_grad(),p.grad
@behaviour
def optimizer_keeps_flags_when_its_state_is_cleared():
    opt = opt_of()
    for ps in opt.param_lists:
        for p in ps: p.grad = torch.ones_like(p)
    opt.state[opt.param_lists[0][0]]['do_wd'] = False
    opt.step()
    opt.clear_state()
    return of_opt(opt)
@behaviour
def optimizer_state_goes_round():
    res = []
    for f in (Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)):
        m,n = net(),net()
        a,b = f(lists(m), lr=1e-2),f(lists(n), lr=1e-3)
        for p in m.parameters(): p.grad = torch.ones_like(p)
        a.step()
        b.load_state_dict(deepcopy(a.state_dict()))
        res += [of_opt(b), sorted(a.state_dict()), raised(f(list(n.parameters()), lr=1e-3).load_state_dict, deepcopy(a.state_dict()))]
    return res
@behaviour
def wrapper_knows_fastai_s_names():
    m = net()
    w = OptimWrapper(lists(m), opt=torch.optim.Adam, lr=1e-3)
    w.set_hypers(lr=slice(1e-4,1e-2), mom=.7, sqr_mom=[.8,.9,.95], wd=.1)
    built = OptimWrapper(opt=torch.optim.SGD([dict(params=m[0].parameters()), dict(params=m[1].parameters(), lr=.5)], lr=.1))
    dicts = OptimWrapper([dict(params=m[0].parameters(), lr=.3), dict(params=m[1].parameters())], torch.optim.SGD, lr=.1, convert_groups=False)
    return w.hypers,[g['betas'] for g in w.opt.param_groups],built.hypers,dicts.hypers,raised(OptimWrapper),raised(OptimWrapper, m.parameters(),
        built.opt),w.clear_state(),of_opt(w)

# ---- Learner

@behaviour
def learner_freezes():
    fs = dict(freeze=lambda l: l.freeze(), to=lambda l: l.freeze_to(1), back=lambda l: l.freeze_to(-2), all=lambda l: (l.freeze(), l.unfreeze()))
    kinds = dict(plain={}, norms_too=dict(train_bn=False), decay=dict(wd_bn_bias=True), wrapper=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)))
    return {f'{k} {n}':trained(f, **kw) for n,f in fs.items() for k,kw in kinds.items()},raised(learner(splitter=trainable_params).freeze)
@behaviour
def learner_clears_moments_when_it_freezes(): return trained(lambda l: (l.fit(1), l.freeze(), of_opt(l.opt), l.fit(1), l.unfreeze()))

fits = dict(fit=lambda l: l.fit(1), fit_rate=lambda l: l.fit(2, 1e-2, wd=.1), fit_slice=lambda l: l.fit(1, slice(1e-4,1e-2)),
    fit_list=lambda l: (l.fit(1), l.fit(1, [1e-3,1e-2,1e-1], reset_opt=True)), fit_later=lambda l: l.fit(3, 1e-2, start_epoch=2),
    one_cycle=lambda l: l.fit_one_cycle(2),
    one_cycle_slice=lambda l: l.fit_one_cycle(2, slice(1e-4,1e-2), div=10, div_final=100, pct_start=.4, wd=.2, moms=(.9,.8,.9)),
    one_cycle_array=lambda l: l.fit_one_cycle(1, np.array([1e-3,1e-2,1e-1])), one_cycle_end=lambda l: l.fit_one_cycle(1, slice(1e-2)),
    one_cycle_later=lambda l: l.fit_one_cycle(3, 1e-2, start_epoch=1), flat_cos=lambda l: l.fit_flat_cos(2, 1e-2, div_final=10, pct_start=.5),
    sgdr=lambda l: l.fit_sgdr(2, 1, 1e-2), fine_tune=lambda l: l.fine_tune(1), fine_tune_args=lambda l: l.fine_tune(2, 1e-2, freeze_epochs=2, lr_mult=10),
    frozen=lambda l: (l.freeze(), l.fit_one_cycle(1, 1e-2)), bad_list=lambda l: raised(l.fit_one_cycle, 1, [1.,2.]))
for k,f in fits.items(): behaviours[f'fit: {k}'] = partial(trained, f)
def one_cycle(l): l.fit_one_cycle(2, slice(1e-4,1e-2))
for k in ('rmsprop','lamb','ranger','wrapper'): behaviours[f'one cycle of {k}'] = partial(trained, one_cycle, opt_func=opts[k])
cbs = dict(accumulate=lambda: GradientAccumulation(8), clip=lambda: GradientClip(.1), early=lambda: EarlyStoppingCallback(min_delta=9, patience=1),
    best=lambda: SaveModelCallback(fname='best', with_opt=True), every=lambda: SaveModelCallback(fname='every', every_epoch=True),
    plateau=lambda: ReduceLROnPlateau(min_delta=9), mixup=lambda: MixUp(.4), csv=lambda: CSVLogger(fname='log.csv'), nan=lambda: TerminateOnNaNCallback(),
    mom=lambda: ParamScheduler({'mom':SchedLin(.9,.1)}))
for k,f in cbs.items(): behaviours[f'callback: {k}'] = partial(trained, lambda l, f=f, lr=1e30 if k=='nan' else 1e-2: (l.fit(3, lr, cbs=f()), written()))

def written():
    "The contents of the files that a callback wrote, without times"
    return {o.name:re.sub(r'\d+:\d+', '', o.read_text()) if o.suffix=='.csv' else torch.load(o,
        weights_only=False) for o in sorted(folder.rglob('*')) if o.suffix in ('.csv','.pth')}

class Told(Callback):
    "All events in order"
    order = 99
    def __init__(self, stop=None, at=None): self.seen,self.stop,self.at = [],stop,at
    def __call__(self, name):
        self.seen.append(name)
        if name==self.at and self.stop and (self.training or 'batch' not in name): raise self.stop()
@behaviour
def events_come_in_order():
    res = []
    for stop,at in ((None,None), (CancelFitException,'after_epoch'), (CancelEpochException,'after_train'), (CancelTrainException,'after_batch'), (CancelBatchException,'before_backward'), (CancelStepException,'before_step')):
        cb = Told(stop, at)
        res.append((trained(lambda l: l.fit(1, 1e-2, cbs=cb)), cb.seen))
    return res
@behaviour
def an_error_in_a_fit_takes_its_callbacks_away():
    learn = learner()
    return raised(learn.fit_one_cycle, 1, cbs=Told(KeyError, 'after_pred')),of_learner(learn)
@behaviour
def lr_find_leaves_no_trace():
    def f(l):
        l.fit(1)
        l.freeze()
        before = sorted(map(str, folder.rglob('*_tmp*')))
        return l.lr_find(num_it=40, show_plot=False, suggest_funcs=(minimum,steep,valley)),before,l.lr_find(1e-5, 1e-1, 7, stop_div=False, show_plot=False)
    return trained(f)
@behaviour
def validate_and_predictions(): return trained(lambda l: (l.fit(1), l.validate(), l.get_preds(),
    l.get_preds(0, with_loss=True, with_decoded=True, with_input=True)))

# ---- save, load, export

@behaviour
def save_writes_what_load_reads():
    learn = learner()
    learn.fit(1, slice(1e-3,1e-2))
    res = [learn.save('a'), learn.save('b', with_opt=False), learn.save('c')]
    res += [torch.load(o, weights_only=False) for o in res]
    for k,kw in (('a',{}), ('a',dict(with_opt=False)), ('b',{}), ('c',dict(device='cpu', strict=False))):
        other = learner()
        res += [warned(other.load, k, **kw), of_learner(other)]
    fewer = learner(splitter=trainable_params)
    return res,warned(fewer.load, 'a'),of_learner(fewer),raised(learn.save, 'sub/c')[0]
@behaviour
def load_of_what_does_not_fit():
    learner().save('small', with_opt=False)
    learn = learner()
    learn.model[2][2] = nn.Linear(4,5)
    missing = raised(learner().load, 'nowhere')
    return raised(learn.load, 'small'),learn.model.state_dict(),missing[0]
@behaviour
def export_and_load_learner():
    learn = learner()
    learn.fit(1, 1e-2)
    learn.freeze()
    learn.export('e.pkl')
    new = load_learner(folder/'e.pkl')
    return of_learner(learn),sorted(vars(new)),new.model.state_dict(),new.opt,new.cbs,[p.requires_grad for p in new.model.parameters()],len(new.dls.train_ds)
@behaviour
def learners_can_be_pickled_and_copied():
    learn = learner()
    learn.logger = noop
    learn.fit(1, 1e-2)
    res = []
    for f in (deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        new = f(learn)
        torch.manual_seed(3)
        new.fit_one_cycle(1, 1e-2)
        res.append(of_learner(Learner.add_cbs(new, [])) if hasattr(new, 'logged') else None)
    return res

# ---- ParamScheduler and Recorder

@behaviour
def schedules():
    fs = dict(lin=SchedLin(1.,3.), cos=SchedCos(1.,3.), no=SchedNo(1.,3.), exp=SchedExp(1.,3.), poly=SchedPoly(1.,3.,2), both=combined_cos(.25, 1., 3., .1),
        three=combine_scheds([.2,.3,.5], [SchedLin(0,1),SchedNo(1,1),SchedCos(1,0)]))
    arr = combined_cos(.3, np.array([1.,2.]), np.array([3.,4.]), np.array([0.,1.]))
    return {k:[f(p) for p in np.linspace(0, 1, 9)] for k,f in fs.items()},[arr(p) for p in (0.,.2,.3,.9,1.)],raised(combine_scheds, [.2,.3],
        [SchedNo(1,1)]*2),type(schedule.combine_scheds)
@behaviour
def param_scheduler_records_the_last_group():
    def f(l):
        l.create_opt()
        l.fit(2, cbs=ParamScheduler(dict(lr=SchedLin(np.array([1e-3,1e-2,1e-1]), 0.), mom=SchedCos(.9,.5), wd=SchedExp(1e-3,1e-1))))
        return l.recorder.hps
    return trained(f),ParamScheduler.order,ParamScheduler.run_valid
@behaviour
def recorder_keeps_metrics_and_losses():
    res = []
    for kw in ({}, dict(train_metrics=True), dict(valid_metrics=False), dict(add_time=False, beta=.5)):
        learn = learner(metrics=[accuracy, error_rate, AccumMetric(lambda i,t: (i.argmax(1)==t).float().mean(), flatten=False)])
        learn.remove_cbs(Recorder).add_cb(Recorder(**kw))
        learn.fit_one_cycle(2, 1e-2)
        res.append(of_learner(learn))
    return res
@behaviour
def recorder_draws():
    learn = learner()
    learn.fit_one_cycle(3, 1e-2)
    def lines(ax): return [(l.get_label(), np.asarray(l.get_xdata(), float), np.asarray(l.get_ydata(), float)) for l in ax.lines]
    res = lines(learn.recorder.plot_loss(skip_start=1))
    plt.close('all')
    learn.recorder.plot_sched()
    res += [lines(ax) for ax in plt.gcf().axes]
    plt.close('all')
    return res
@behaviour
def default_callbacks_and_signatures():
    names = 'freeze unfreeze freeze_to fit fit_one_cycle fit_flat_cos fit_sgdr fine_tune lr_find save load export validate get_preds create_opt'
    fs = [getattr(Learner, k) for k in names.split()] + [o for o in opts.values() if inspect.isfunction(o)] + [OptimWrapper,Optimizer,ParamScheduler,Recorder]
    return defaults.callbacks,learner().cbs,[(f.__name__, (f.__doc__ or '').split('\n\nOf a learner in layer groups')[0], list(inspect.signature(f).parameters)) for f in fs] # what `help` adds of ours comes last

# ---- what stock fastai makes of files that this package wrote, `without` it only

def of_ours(path):
    "Weights and moments that a learner which was never split reads from each file in `path`"
    res = {}
    for file in sorted(path.glob('*.pth')):
        learn = learner(splitter=trainable_params)
        learn.path,learn.model_dir = path,'.'
        ws = warned(learn.load, file.stem)
        res[file.stem] = told([learn.model.state_dict(), ws])
    return res

if __name__=='__main__':
    folder,how,done = Path(sys.argv[1]),sys.argv[2],{}
    if how=='with': exec('from fastai_discriminative.all import *')
    torch.set_num_threads(1)
    for k,f in behaviours.items():
        for o in (folder/'models', folder/'log.csv'):
            if o.is_dir(): shutil.rmtree(o)
            elif o.exists(): o.unlink()
        done[k] = told(f())
    if how=='without': done['ours'] = of_ours(folder.parent/'ours')
    done['imported'] = 'fastai_discriminative' in sys.modules
    Path(sys.argv[3]).write_text(json.dumps(done))
