"""Run every notebook in its own process: notebooks redefine what the package patches into `Learner`, and the next notebook must not see that

`nbdev-test` gives several notebooks to one process, in which order chance decides which of them see the patches of which.
The processes are forked from one that has imported fastai, so that no notebook waits for that. What this package patches is not there yet.
"""
import multiprocessing,os,sys,time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

_fork = multiprocessing.get_context('forkserver')
_fork.set_forkserver_preload(['fastai.vision.all','timm','nbdev.test','nbdev.showdoc'])

def _run(path, save):
    "In a process of its own: test one notebook"
    cfg = get_config()
    os.chdir(cfg.nbs_path)
    passed,_ = test_nb(path, skip_flags=cfg.tst_flags, basepath=cfg.config_path, do_print=True, save=save)
    sys.exit(not passed)

def _test(save, path):
    "Exit status of one notebook's test, and the seconds that it took"
    p,start = _fork.Process(target=_run, args=(path, save)),time.time()
    p.start()
    p.join()
    return path,p.exitcode,time.time()-start

# The slowest first, so that no process waits for them at the end
_slow = 'compare strategies report auto demo performance learner'.split()

def _order(p):
    "Tutorials, then slow notebooks, then the others by name"
    return 'tutorials' not in p.parts, next((i for i,o in enumerate(_slow) if o in p.stem), len(_slow)), p.name

@call_parse(pos=['path'])
def main(
    path:str=None, # A notebook or a folder of them; all if left out
    n_workers:int=2, # Notebooks at a time
    save:bool=False, # Write outputs back to notebooks on success?
):
    "Test notebooks, and fail if one of them does"
    nbs = [o.absolute() for o in sorted(nbglob(path, as_path=True), key=_order)]
    with ThreadPoolExecutor(n_workers) as ex: done = list(ex.map(partial(_test, save), nbs))
    bad = [str(p) for p,rc,_ in done if rc]
    print('slowest:', ', '.join(f'{p.stem} {s:.0f} s' for p,_,s in sorted(done, key=lambda o: -o[2])[:12]))
    print(f"{len(done)-len(bad)} of {len(done)} notebooks pass" + (f"; these do not: {', '.join(bad)}" if bad else ''))
    sys.exit(bool(bad))
