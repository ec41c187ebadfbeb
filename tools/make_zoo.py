"""Check every architecture again and write `fastai_discriminative/data/zoo.csv`, from which the coverage page and `fastai-discriminative families` are made

    python tools/make_zoo.py [--processes 2] [--only FAMILY]

With `--only`, proves the architectures that are FAMILY's, now or in the table, and replaces their rows. The whole zoo's proof is written to `tools/zoo.lock` besides.
Prints what fails without being in `data/exceptions.csv`, and then writes nothing. Afterwards: `nbdev-test nbs/13_coverage.ipynb --save && nbdev-clean`.
"""
import argparse,logging,multiprocessing,os,time,warnings
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
path = Path(__file__).parent.parent/'fastai_discriminative'/'data'/'zoo.csv'

def start():
    "Settings of a process: one thread, no chatter"
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.getLogger('timm').setLevel(logging.ERROR)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--processes', type=int, default=2)
    ap.add_argument('--only', metavar='FAMILY', help='prove this family alone')
    args = ap.parse_args()
    start()
    from fastprogress.fastprogress import progress_bar
    from fastai_discriminative.coverage import all_architectures,prove,write_zoo,zoo_exceptions
    from fastai_discriminative.core import read_data
    from fastai_discriminative.registry import find_family
    from zoo_lock import write_lock
    stored = {r['arch']:r for r in read_data('zoo.csv')}
    def _asked(n): return not args.only or args.only in (find_family(all_architectures()[n]).name, stored.get(n, {}).get('family'))
    names,t,rows,faults = [n for n in all_architectures() if _asked(n)],time.perf_counter(),[],[]
    if not names: raise SystemExit(f'no architecture is of family {args.only!r}')
    with multiprocessing.get_context('spawn').Pool(args.processes, start) as pool:
        for row,bad in progress_bar(pool.imap(prove, names, chunksize=4), total=len(names)):
            rows.append(row)
            known = zoo_exceptions(row['arch'])
            faults += [f"{row['arch']}, {k}: {bad.get(k, 'passes, but is excepted')}" for k in bad.keys()^known.keys()]
    if faults: raise SystemExit('\n'.join([*faults, f'{len(faults)} faults; {path.name} is as it was']))
    new = stored | {r['arch']:r for r in rows}
    write_zoo([new[n] for n in all_architectures() if n in new], path)
    if not args.only: write_lock()
    print(f'{path}: {len(rows)} rows proved in {time.perf_counter()-t:.0f} s')

if __name__=='__main__': main()
