"""A soak: many tiny cases through init, coarse testing, fusion and coarse to fine; does memory or do open files grow?

Every stage is the script itself, in a process of its own, whose resident memory and open files are looked at each time
another case is done. The last quarter of the cases is compared with the second (the first warms up). The cases are
alike: windows of other sizes would fill PyTorch's caches, which grow to a limit.

Usage: python tests/soak.py [--cases N] [--json FILE]    Exit code 1 if anything grows. 200 cases take some minutes.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import process_memory

SHAPE = (28, 32, 14)  # voxels of a case: 50 kB in float32
WIDTH, ROUNDS = 4, 2
ALLOWED = {'init': 128e3}  # bytes a case that may stay: init.py keeps its 74 slices' list lines until it writes them
ALLOWED_ELSE = 8e3  # with NOISE, over 200 cases, about two float32 volumes a case
BRIEFLY = 2  # files, one read and one written: a fast stage is looked at a few times a case
NOISE = 10e6  # bytes: what the memory allocator takes and gives back at its own times; 9 MB was seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=200, metavar='N', help='how many cases (default 200, at least 8)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to FILE')
    args = parser.parse_args()
    if args.cases < 8:
        parser.error(f'argument --cases: {args.cases} is not a whole number of at least 8')
    found = soak(args.cases)
    for stage, one in found.items():
        print(f'{stage:15} {one["seconds"]:6.1f} s, peak {one["peak"] / 1e6:4.0f} MB; quarter 2 -> 4: '
              f'{one["memory"][0] / 1e6:.1f} -> {one["memory"][1] / 1e6:.1f} MB, {one["files"][0]} -> {one["files"][1]} open files; '
              f'{"GROWS" if one["grows"] else "no growth"}')  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({'cases': args.cases, 'stages': found}, indent=2) + '\n')
    return int(any(one['grows'] for one in found.values()))


def soak(cases):
    """Return {stage: figures} of so many cases."""
    os.environ['THP_MEM_ALLOC_ENABLE'] = '0'  # huge pages would make steps of 2 MB
    found = {}
    with tempfile.TemporaryDirectory(prefix='soak_') as folder:
        data = Path(folder)
        process_memory.write_cases(data, [SHAPE] * cases)
        process_memory.write_snapshots(data, WIDTH)
        for stage, script, arguments, files in process_memory.stages(data, ROUNDS):
            looks = Looks(files)
            run = process_memory.run(script, *arguments, watch=looks)
            found[stage] = {'seconds': run.seconds, 'peak': run.peak, **growth(stage, looks.seen, cases)}
    return found


class Looks:
    """Looks at a running process: {cases done: (least resident bytes, fewest open files)}; called often."""

    def __init__(self, files):
        self.files, self.seen = files, {}

    def __call__(self, pid):
        done = sum(1 for _ in Path('/').glob(str(self.files.relative_to('/'))))
        memory = process_memory.held_memory(pid, 'VmRSS')
        try:
            opened = len(os.listdir(f'/proc/{pid}/fd'))
        except OSError:  # it has just ended
            return
        if memory:
            before = self.seen.get(done, (memory, opened))
            self.seen[done] = (min(memory, before[0]), min(opened, before[1]))


def growth(stage, seen, cases):
    """Return the least memory and open files in the second and the last quarter of the cases, and whether they grow."""
    quarters = [quarter(seen, cases * start, cases * (start + 0.25)) for start in (0.25, 0.75)]
    memory = [min(memory for memory, _ in looks) for looks in quarters]
    files = [min(opened for _, opened in looks) for looks in quarters]
    allowed = NOISE + ALLOWED.get(stage, ALLOWED_ELSE) * cases / 2  # between the middles of the two quarters
    more = memory[1] - memory[0] > allowed or files[1] - files[0] > BRIEFLY
    return {'memory': memory, 'files': files, 'looks': len(seen), 'grows': more}


def quarter(seen, start, end):
    """Return the looks at start <= cases done < end; where a fast stage went unseen, the nearest one."""
    within = [seen[done] for done in seen if start <= done < end]
    return within or [seen[min(seen, key=lambda done: abs(done - (start + end) / 2))]]


if __name__ == '__main__':
    sys.exit(main())
