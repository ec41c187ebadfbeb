"The table of groups: each column compared with a direct computation, and norm layers with their behaviour in a fit"
import time

import numpy as np,pandas as pd,pytest,torch
from torch import nn

from fastai.vision.all import Callback
from fastai_discriminative.all import *
from helpers import norm_modules,ours,plain,stock

def test_every_column(dls):
    learn = stock(dls, wd=.05).split(4, train_norm='affine')
    learn.freeze_to(2)
    df,ps = learn.layer_groups.df,dict(learn.model.named_parameters())
    groups = learn.splitter.find(learn.model)
    assert df.group.tolist()==[g.name for g in groups] and df.depth.tolist()==groups.depths
    assert df.layers.tolist()==[len(g.layers) for g in groups] and df.tensors.tolist()==[len(g.param_names) for g in groups]
    n = [sum(ps[o].numel() for o in g.param_names) for g in groups]
    assert df.parameters.tolist()==n and df.share.tolist()==[o/sum(n) for o in n] and df.share.sum()==pytest.approx(1)
    assert df.new.tolist()==[False]*3+[True] and df.frozen.tolist()==[True]*2+[False]*2 and df.wd.tolist()==[.05]*4
    assert not {'lr_now','gradient','update'} & {*df.columns}
    assert all(df[k].dtype.kind in 'ifb' for k in df.columns if k!='group')

def test_rates_now_beside_the_peak(dls):
    class Look(Callback):
        def before_fit(self): self.dfs = []
        def before_step(self): self.dfs.append((self.learn.layer_groups.df,[h['lr'] for h in self.opt.hypers]))
    learn,look = ours(dls, n_groups=3),Look()
    learn.fit_one_cycle(1, [1e-4,1e-3,1e-2], cbs=look)
    for df,now in look.dfs: assert df.lr_now.tolist()==now and df.lr.tolist()==[1e-4,1e-3,1e-2]
    df = learn.layer_groups.df
    assert df.lr_now.tolist()==[h['lr'] for h in learn.opt.hypers] and (df.lr_now<df.lr).all()
    assert 'lr now' in repr(learn.layer_groups)

def test_sizes_of_the_last_fit(dls):
    learn,meter = ours(dls, n_groups=3),StepMeter(1)
    learn.freeze_to(1)
    learn.fit_one_cycle(1, 1e-3, cbs=meter)
    df = learn.layer_groups.df
    for k in ('gradient','update'):
        want = [meter.results[meter.results.group==g][k].mean() for g in df.group]
        np.testing.assert_allclose(df[k], want)
        assert np.isnan(want[0]) and want[1]>0
    last = repr(learn.layer_groups).splitlines()[-1].split()
    assert last[-2:]==[f'{df.gradient.iloc[-1]:.2g}',f'{df["update"].iloc[-1]:.2g}']
    assert 'gradient' not in learn.split(4).layer_groups.df # they were those of other groups
    learn.fit(1, 1e-3)
    assert 'gradient' not in learn.layer_groups.df # the last fit measured nothing

# ---- norm layers

def _kept(m): return [(n, b.clone()) for n,b in m.named_buffers() if n.startswith('running_')]

@pytest.mark.parametrize('train_norm', ['group','affine','running',True,False])
@pytest.mark.parametrize('arch', ['resnet10t','test_vit'])
@pytest.mark.parametrize('frozen', [0,2])
def test_norm_layers_do_what_the_table_says(dls, arch, train_norm, frozen):
    learn = ours(dls, arch, n_groups=4, train_norm=train_norm)
    learn.freeze_to(frozen)
    df,groups = learn.layer_groups.df,learn.splitter.find(learn.model)
    mods = [(groups.group_of(n), m, _kept(m), [p.detach().clone() for p in m.parameters()]) for n,m in norm_modules(learn).items()]
    learn.fit(1, 1e-2)
    res = np.zeros((len(groups),4), int)
    for i,m,bufs,ps in mods:
        trained,moved = (any(not torch.equal(a, b) for a,b in o) for o in (zip(ps, m.parameters()), [(o, dict(m.named_buffers())[n]) for n,o in bufs]))
        res[i] += (1, trained, bool(bufs), moved)
    assert df[['norms','norms_train','norms_stats','norms_move']].values.tolist()==res.tolist()
    pd.testing.assert_frame_equal(learn.layer_groups.df[['norms_train','norms_move']], df[['norms_train','norms_move']])

def test_norm_layers_in_words(dls):
    def _norms(train_norm):
        learn = ours(dls, n_groups=3, train_norm=train_norm)
        learn.freeze_to(1)
        t = learn.layer_groups
        cols,rows = t._table()
        return [r[cols.index('norms')] for r in rows]
    assert _norms('group')==['still','train','train'] and _norms('affine')==['still','train, statistics kept','train']
    assert _norms(False)==['still','still','train'] and _norms(True)==['train']*3
    assert 'norms' not in plain(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 3))).split().layer_groups._table()[0]

def test_a_stock_learner_has_the_table_too(dls):
    learn = stock(dls)
    learn.freeze()
    df = learn.layer_groups.df
    assert df.frozen.tolist()==[True,False] and df.norms_train.tolist()==df.norms.tolist()==df.norms_move.tolist() # as fastai's freeze leaves them
    learn.fit(1, cbs=StepMeter(1))
    assert learn.layer_groups.df['update'].iloc[-1]>0

def test_many_groups_in_no_time(dls):
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(138)]
    learn = plain(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8), *blocks, nn.Linear(8, 3))).split('block')
    learn.fit(1, 1e-3, cbs=StepMeter(1))
    start = time.time()
    text = repr(learn.layer_groups)
    assert len(text.splitlines())==2+140 and time.time()-start<5 # it takes some 20 ms
