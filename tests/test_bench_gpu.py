"`benchmarks/bench_gpu.py` at tiny sizes: what it packs, its checks, a row of steps, one fit of each kind, the table"
import json,sys,zipfile
from argparse import Namespace
from copy import deepcopy
from pathlib import Path

import pytest,timm,torch
from safetensors.torch import load_file,save_file

sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
import bench_gpu,gpu_sweep
from helpers import stock

@pytest.fixture
def packed(tmp_path, folder):
    "A folder as `pack` makes it, without wheels, with random weights"
    src = tmp_path/'w.safetensors'
    model = timm.create_model(gpu_sweep.lite0)
    save_file(model.state_dict(), src)
    bench_gpu.pack_weights(src, tmp_path)
    bench_gpu.pack_images(folder, tmp_path/'images'/'toys', most=24, px=24)
    return tmp_path

def _case(dir, size=32):
    "Images and depths for `fit`"
    x,y = gpu_sweep.read(dir/'images'/'toys', size)
    xy = {p:(x[i],y[i]) for p,i in zip(('train','valid','test'), gpu_sweep.parts(len(x)))}
    return xy,json.loads((dir/f'{gpu_sweep.lite0}.json').read_text())

case = dict(data='toys', size=32, n=0, epochs=1, seed=0)
def _cell(**kwargs): return dict(dict(how='layers', hi=1e-3, ratio=.1, norm='running'), **kwargs)

def test_pack(packed):
    sd = load_file(packed/f'{gpu_sweep.lite0}.safetensors')
    assert all(v.dtype==(torch.float16 if v.ndim>1 else torch.float32) for v in sd.values() if v.is_floating_point())
    xy,depths = _case(packed)
    assert depths['conv_stem.weight']==0 and max(depths.values())<1 and depths.keys()<sd.keys()
    assert [len(xy[k][0]) for k in ('train','valid','test')]==[14,4,6]
    assert xy['train'][0].shape[1:]==(3,32,32) and xy['train'][0].dtype==torch.uint8

def test_wheels_are_reached_only_where_needed(tmp_path, monkeypatch):
    (tmp_path/'wheels').mkdir()
    with zipfile.ZipFile(tmp_path/'wheels'/'a-1-py3-none-any.whl', 'w') as z: z.writestr('only_in_a_wheel.py', 'x = 1')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    bench_gpu.reach(tmp_path)
    assert sys.path[0]==str(tmp_path.resolve())
    with pytest.raises(ImportError): import only_in_a_wheel
    bench_gpu.reach(tmp_path, only_wheels=True)
    import only_in_a_wheel
    assert only_in_a_wheel.x==1

@pytest.mark.parametrize('name', ['frozen_bits','adam','adam_channels_last','cached'])
def test_checks_pass(name):
    res = bench_gpu.noted(bench_gpu.checks[name], 'cpu')
    assert res['ok'], res

def test_a_freeze_that_does_not_freeze_is_seen(dls):
    learn = stock(dls).split(train_norm=True)
    learn.freeze()
    was = bench_gpu.state(learn)
    learn.fit(1, 1e-2)
    assert bench_gpu.moved(learn, was)[0]>0

def test_an_error_is_noted():
    def _fail(dev): raise ValueError('no such device')
    res = bench_gpu.noted(_fail, 'cpu')
    assert res['ok'] is False and 'ValueError: no such device' in res['error']

def test_steps_row():
    row = bench_gpu.step_row('resnet10t', 32, 2, 3, 1, 'cpu', False)
    assert row['times'].keys()=={'frozen','unfrozen','head_epoch'} and all(v['step']>0 and v['epoch']>0 for v in row['ms'].values())

def test_a_contestant_that_fails_leaves_the_others(monkeypatch):
    def _fail(): raise ValueError('no such device')
    one = lambda ms: lambda: dict(step=ms, epoch=9*ms)
    fs = {'fastai frozen':one(4.), 'ours frozen':one(2.), 'fastai unfrozen':one(9.), 'ours unfrozen':one(6.), 'ours cached':_fail}
    monkeypatch.setattr(bench_gpu, 'contestants', lambda *args: fs)
    row = bench_gpu.step_row('resnet10t', 32, 2, 3, 2, 'cpu', False)
    assert row['times']['frozen']==dict(median=2., min=2., max=2.) and 'head_epoch' not in row['times']
    assert 'ours cached FAILED: ValueError: no such device' in bench_gpu.step_line(row)

def test_fits_and_table(packed, capsys):
    xy,depths = _case(packed)
    rows = gpu_sweep.fit(packed, case, [_cell(), _cell(norm='group')], xy, depths)
    rows += gpu_sweep.fit(packed, case, [dict(how='fine_tune', hi=2e-3)], xy, depths)
    assert rows[0]['head']==rows[1]['head'] and rows[0]['end']!=rows[1]['end'] and 'head' not in rows[2] and rows[0]['ran']=='eager'
    assert all(r[p]['test']['tempered']<=r[p]['test']['loss'] for r in rows[:2] for p in ('head','end','ema','mix50'))
    (packed/'sweep-0.jsonl').write_text('\n'.join(json.dumps(o) for o in rows)+'\n')
    bench_gpu.table(Namespace(out=packed))
    out = capsys.readouterr().out
    assert 'sweep: 3 fits, 0 failed' in out and 'toys 32 all 1 (3 fits): head' in out and 'fine_tune' in out

def test_time_cuts_a_fit(packed):
    xy,depths = _case(packed)
    with pytest.raises(gpu_sweep.OutOfTime): gpu_sweep.fit(packed, case, gpu_sweep.fine_tune_cells[:1], xy, depths, deadline=0)

@pytest.fixture
def nets(packed, monkeypatch):
    "Two networks with the same numbers, without dropout and augmentation"
    monkeypatch.setattr(gpu_sweep, 'augment', lambda x: x)
    res = gpu_sweep.Nets(gpu_sweep.lite0, packed, 3, 2)
    res.w[1:] = res.w[0]
    for m in [m for net in res.nets for m in net.modules() if isinstance(m, torch.nn.Dropout)]: m.p = 0
    return res

def test_side_by_side_trains_as_torch_does(nets, packed):
    (x,y),depths = _case(packed)[0]['train'],_case(packed)[1]
    ref,hi,ratio = deepcopy(nets.nets[0]),1e-3,.1
    c = gpu_sweep.Cycle(nets, x, y, torch.stack([gpu_sweep.layer_rates(nets, depths, hi, o) for o in (ratio,1.)]), 3, [True,True], bs=6)
    gs = [dict(params=[p], peak=hi*ratio**(1-depths[n[5:]] if n.startswith('body.') else 0), weight_decay=.01*(p.ndim>1)) for n,p in ref.named_parameters()]
    opt = torch.optim.AdamW(gs, eps=1e-5)
    ref.train()
    for m in gpu_sweep.norms(ref): m.eval()
    assert c.run()=='eager' and c.n==6
    for t in range(c.n):
        share,mom = gpu_sweep.one_cycle(t/c.n)
        for g in opt.param_groups: g['lr'],g['betas'] = g['peak']*share,(mom,.99)
        opt.zero_grad()
        torch.nn.functional.cross_entropy(ref(x[c.idx[t]].float()/255), y[c.idx[t]]).backward()
        opt.step()
    assert max(float((a-b).detach().abs().max()) for a,b in zip(ref.parameters(), nets.nets[0].parameters()))<1e-5
    assert float((nets.w[0]-nets.w[1]).abs().max())>1e-4

def test_running_keeps_all_norm_statistics(nets, packed):
    (x,y),depths = _case(packed)[0]['train'],_case(packed)[1]
    was = [[o.running_mean.clone() for o in gpu_sweep.norms(net)] for net in nets.nets]
    gpu_sweep.cycle(nets, x, y, torch.stack([gpu_sweep.layer_rates(nets, depths, 1e-3, .1)]*2), 1, [True,False])
    same = [[torch.equal(o.running_mean, w) for o,w in zip(gpu_sweep.norms(net), ws)] for net,ws in zip(nets.nets, was)]
    assert all(same[0]) and not any(same[1])

def test_fine_tune_freezes_all_but_head_and_norms(nets):
    first,rest = gpu_sweep.fine_tune_rates(nets, 2e-3)
    by = {n:(float(first[at]),float(rest[at])) for n,at,*_,trains in nets.spans if trains}
    assert by['body.conv_stem.weight']==pytest.approx((0,1e-5)) and by['body.bn1.weight']==pytest.approx((2e-4,1e-5)) and by['head.2.weight']==pytest.approx((2e-3,1e-3))

def test_jobs_come_in_order_of_interest():
    js = gpu_sweep.jobs(['a','b'], [224,128], 2)
    assert len({json.dumps(o, sort_keys=True) for o in js})==len(js)==2*2*2*(3+1+1+2)
    (first,cells),(second,peers) = js[:2]
    assert first==second==dict(data='a', size=224, n=600, epochs=10, seed=0) and cells==gpu_sweep.layer_cells and peers==gpu_sweep.fine_tune_cells
    assert len({json.dumps(o) for o in cells})==len(cells)
