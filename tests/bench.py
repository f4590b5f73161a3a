"""How fast: every row the plain way and as the stages run it, in one run, alternating; medians, as a table and as JSON.

Plain and fast each have a process, since torch decides on its memory and threads once a process: the plain one in the
environment a user has, the fast one in that of run.sh. They take turns; between two turns there is a pause in which
the plain one's waiting threads, which spin for a few milliseconds, go to sleep. What is timed: bench_rows.py.

Usage: python tests/bench.py [--json FILE] [--only KEY,...] [--repeats N] [--memory] [--cc3d] [--quick]
Some 15 minutes on two cores and up to 12 GB of memory; nothing else should run.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_memory
import bench_rows

ASKED = {  # row: the ratio that it should reach at least
    'coarse_fp32': 2.0, 'fine_fp32': 6, 'training_fp32': 3.2, 'coarse_bf16': 4, 'fine_bf16': 7, 'training_bf16': 4,
    'fine_fp32_one_thread': 6, 'training_fp32_one_thread': 4, 'fine_round': 6, 'coarse_case': 2,
    'init': 4, 'dsc': 3, 'post_processing_organ': 80, 'post_processing_blobs': 15,
}  # fmt: skip
ENVIRONMENT = {
    'plain': {'THP_MEM_ALLOC_ENABLE': None, 'OMP_WAIT_POLICY': None},  # unset
    'fast': {'THP_MEM_ALLOC_ENABLE': '1', 'OMP_WAIT_POLICY': 'PASSIVE'},
}
PAUSE = 0.02  # seconds between two turns
CC3D = 'connected-components-3d==4.1.1'


def main():
    args = arguments()
    with tempfile.TemporaryDirectory(prefix='bench_cc3d_') as peers:
        if args.cc3d:
            pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', peers, CC3D]
            subprocess.run(pip, check=True)
        workers = {side: Process(side, args.quick, peers) for side in ENVIRONMENT}
        found = {'machine': machine(), 'quick': args.quick, 'repeats': args.repeats}
        found['product_rate'] = rates = workers['fast'].ask('product_rates', args.repeats)
        for key in args.only:
            found[key] = row(workers, key, args.repeats, rates)
            print(f'{key}: {found[key]["ratio"]:.2f}', file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.close()
    if args.memory:
        found['memory'] = memory(args.quick)
    print('\n'.join(table(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + '\n')


def arguments():
    """Return the options, --only as a list of keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures to FILE')
    parser.add_argument('--only', metavar='KEY,...', default=','.join(ASKED), help='only these rows')
    parser.add_argument('--repeats', type=int, default=7, metavar='N', help='turns of each row (default 7)')
    parser.add_argument('--memory', action='store_true', help='peak memory of coarse testing and of training, too')
    parser.add_argument('--cc3d', action='store_true', help=f'compare with {CC3D}, installed for this run only')
    parser.add_argument('--quick', action='store_true', help='tiny sizes: tries the bench, measures nothing')
    args = parser.parse_args()
    args.only = args.only.split(',')
    if unknown := set(args.only) - set(ASKED):
        parser.error(f'argument --only: {unknown.pop()!r} is not one of {", ".join(ASKED)}')
    if args.repeats < 1:
        parser.error(f'argument --repeats: {args.repeats} is not a whole number of at least 1')
    return args


class Process:
    """A process that serves the plain or the fast rows; it sleeps unless it is asked."""

    def __init__(self, side, quick, peers):
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        for name, value in ENVIRONMENT[side].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self.process = context.Process(target=bench_rows.serve, args=(other, side == 'fast', quick, peers), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is noticed here

    def ask(self, method, *arguments):
        """Return the answer of a method of bench_rows.Worker."""
        self.pipe.send((method, *arguments))
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit('bench.py: error: a measuring process ended, see above')

    def close(self):
        self.pipe.close()
        self.process.join()


def row(workers, key, repeats, rates):
    """Return {plain, fast, ratio, ...} of a row: medians in seconds; plain is the faster of several ways."""
    names = {side: worker.ask('prepare', key) for side, worker in workers.items()}
    times = {(side, name): [] for side in names for name in names[side]}
    for _ in range(repeats):
        for side, name in times:
            time.sleep(PAUSE)
            times[side, name].append(workers[side].ask('time', name))
    medians = {place: statistics.median(values) for place, values in times.items()}
    others = {name: seconds for (side, name), seconds in medians.items() if side == 'plain'}
    measured = {name: seconds for name, seconds in others.items() if not name.startswith(('cc3d', 'np.save'))}
    way = min(measured, key=measured.get)
    (fast,) = (seconds for (side, _), seconds in medians.items() if side == 'fast')
    found = {'plain': measured[way], 'fast': fast, 'ratio': measured[way] / fast, 'asked': ASKED[key], 'way': way}
    found['others'] = {name: seconds for name, seconds in others.items() if name != way}
    if operations := workers['plain'].ask('operations', key):
        rate, _ = rates['bf16' if 'bf16' in key else 'fp32']
        found |= {'gflop': operations / 1e9, 'gflops': operations / fast / 1e9}
        found |= {'plain_gflops': operations / measured[way] / 1e9, 'of_product_rate': found['gflops'] / rate}
    return found


def memory(quick):
    """Return {what: peak resident bytes} of whole stages at full width, each in its own process."""
    return {'coarse_testing': bench_memory.coarse_testing(quick), 'training': bench_memory.training(quick)}


def machine():
    """Return what the figures were measured on."""
    cpu = [
        line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line
    ]
    libraries = {name: importlib.metadata.version(name) for name in ('torch', 'numpy', 'scipy')}
    return {'cpu': cpu[0] if cpu else platform.machine(), 'cores': len(os.sched_getaffinity(0)), **libraries}


def table(found):
    """Return the lines to print."""
    yield ', '.join(f'{name} {value}' for name, value in found['machine'].items())
    for precision, (rate, how) in found['product_rate'].items():
        yield f'matrix products in {precision}: {rate:.0f} GFLOP/s ({how})'
    yield f'{"":26} {"plain s":>9} {"fast s":>9} {"ratio":>7} {"asked":>6} {"GFLOP/s":>8} {"of rate":>8}   plain way; others'
    for key in ASKED:
        if key in found:
            one = found[key]
            speed = f'{one["gflops"]:8.0f} {one["of_product_rate"]:8.2f}' if 'gflops' in one else f'{"":17}'
            others = ''.join(f'; {name} {s:.4f} s, {s / one["fast"]:.1f} x' for name, s in one['others'].items())
            yield (f'{key:26} {one["plain"]:9.4f} {one["fast"]:9.4f} {one["ratio"]:6.2f}x {one["asked"]:5}x {speed}   '
                   f'{one["way"]}{others}')  # fmt: skip
    yield 'GFLOP/s: operations of the plain network over the fast time; of rate: over the matrix product in that precision'
    for what, peak in found.get('memory', {}).items():
        yield f'peak resident memory, {what}: {peak / 1e9:.2f} GB'


if __name__ == '__main__':
    main()
