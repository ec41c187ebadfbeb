"""Run every notebook in its own process: notebooks redefine what the package patches into `Learner`, and the next notebook must not see that

`nbdev-test` gives several notebooks to one process, in which order chance decides which of them see the patches of which.
"""
import subprocess,sys
from concurrent.futures import ThreadPoolExecutor
from fastcore.script import call_parse
from nbdev.doclinks import nbglob

def _test(path, save):
    "Exit status and output of one notebook's test"
    res = subprocess.run(['nbdev-test', str(path), '--do-print', *['--save']*save], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(res.stdout, flush=True)
    return path,res.returncode

# The slowest first, so that no process waits for them at the end
_slow = 'compare strategies report auto demo performance learner'.split()

def _order(p):
    "Tutorials, then slow notebooks, then the others by name"
    return 'tutorials' not in p.parts, next((i for i,o in enumerate(_slow) if o in p.stem), len(_slow)), p.name

@call_parse
def main(
    n_workers:int=2, # Notebooks at a time
    save:bool=False, # Write outputs back to notebooks on success?
):
    "Test all notebooks, and fail if one of them does"
    with ThreadPoolExecutor(n_workers) as ex: done = list(ex.map(lambda p: _test(p, save), sorted(nbglob(as_path=True), key=_order)))
    bad = [str(p) for p,rc in done if rc]
    print(f"{len(done)-len(bad)} of {len(done)} notebooks pass" + (f"; these do not: {', '.join(bad)}" if bad else ''))
    sys.exit(bool(bad))
