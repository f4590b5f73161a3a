"""How time, memory and disk grow with slices, matrix and cases: measured, a law fitted, and what 82 NIH cases would take.

Measured are the stage scripts on made-up cases of three sizes with a narrow network, and single windows and training
steps with the paper's. The laws are least squares (of relative errors, no coefficient below 0) on what the work
consists of: processes started, windows, operations of the networks, voxels, files. Operations are counted on the networks as they
run here, without the padding's ring.

Usage: python tests/scale.py [--json FILE] [--markdown FILE] [--from FILE] [--soak FILE] [--quick]
Some 6 minutes on two cores; nothing else should run. --from writes the page anew from an earlier run's JSON.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import measured
import numpy as np
import torch
from bench import machine
from bench_rows import network
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode

from model import FCN8s
from training import make_optimizer, train_step

FULL = SimpleNamespace(width=16, paper_width=64, repeats=3,
                       runs=[((128, 128, 60), 1), ((192, 192, 90), 1), ((256, 256, 120), 1), ((128, 128, 60), 3)],
                       windows=[(96, 96), (160, 128), (256, 256), (512, 240), (512, 512)],
                       steps=[(96, 96), (160, 160), (256, 256)])  # fmt: skip
QUICK = SimpleNamespace(width=4, paper_width=4, repeats=1, runs=[((14, 16, 7), 1)],
                        windows=[(16, 16), (24, 24)], steps=[(16, 16), (24, 24)])  # fmt: skip
MARGIN, ROUNDS = 20, 2
PLANES = {'X': (0, 1, 2), 'Y': (1, 0, 2), 'Z': (2, 0, 1)}  # the plane's axis, and the two of its slices

# What the estimate for NIH Pancreas-CT assumes.
NIH = SimpleNamespace(cases=82, folds=4, shape=(512, 512, 240), organ=(170, 110, 90), threshold=0.98,
                      pretraining_epochs=10, training_epochs=16, rounds=10)  # fmt: skip
GPU, GPU_TFLOPS = 'NVIDIA A100', 40  # a quarter of the 156 TFLOP/s that it reaches at best in TF32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write what was measured to FILE')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the page to FILE instead of printing it')
    parser.add_argument('--from', type=Path, metavar='FILE', dest='earlier', help='measure nothing, take this JSON')
    parser.add_argument('--soak', type=Path, metavar='FILE', help="soak.py's JSON, to be put on the page, too")
    parser.add_argument('--quick', action='store_true', help='tiny sizes: tries the script, measures nothing')
    args = parser.parse_args()
    found = json.loads(args.earlier.read_text()) if args.earlier else measure(QUICK if args.quick else FULL)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    soak = json.loads(args.soak.read_text()) if args.soak else None
    text = '\n'.join(page(found, soak)) + '\n'
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text, end='')


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(size):
    """Everything that the page is made of, as JSON has it."""
    os.environ |= {'THP_MEM_ALLOC_ENABLE': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}  # as run.sh has it
    stages = [record for shape, cases in size.runs for record in pipeline(shape, cases, size.width)]
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        full = process.submit(full_width, size).result()
    return {'machine': machine(), 'width': size.width, 'paper_width': size.paper_width, 'stages': stages, **full}


def pipeline(shape, cases, width):
    """A record of each stage of a run from init to coarse to fine: its time, its peak memory, its share of the work."""
    records = []
    with tempfile.TemporaryDirectory(prefix='scale_') as folder:
        data = Path(folder)
        measured.write_cases(data, [shape] * cases)
        measured.write_snapshots(data, width)
        organs = [organ_extent(np.load(file)) for file in sorted(data.glob('labels/*.npy'))]
        for stage, script, arguments, _ in measured.stages(data, ROUNDS):
            before = disk(data)
            run = measured.run(script, *arguments)
            records.append({'stage': stage, 'shape': shape, 'cases': cases, 'seconds': run.seconds, 'peak': run.peak,
                            'disk': disk(data) - before, **work(stage, shape, organs, width)})  # fmt: skip
    return records


def organ_extent(label):
    """Slices with organ along each axis."""
    return [int(np.ptp(axis)) + 1 for axis in np.nonzero(label)]


def disk(folder):
    """Bytes that the files in a folder take up on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob('*') if path.is_file())


def work(stage, shape, organs, width):
    """{windows, gflop, voxels, files} of a stage on cases of one shape."""
    cases, windows, gflop = len(organs), 0, 0
    if stage.startswith('coarse ') and stage[-1] in PLANES:
        axis, *sides = PLANES[stage[-1]]
        windows = cases * shape[axis]
        gflop = windows * operations([shape[side] for side in sides], width)
    elif stage == 'coarse to fine':
        fine = [fine_work(shape, organ, width) for organ in organs]
        windows, gflop = (ROUNDS * sum(values) for values in zip(*fine))
    files = 2 * sum(shape) * cases if stage == 'init' else 0
    return {'windows': windows, 'gflop': gflop, 'voxels': math.prod(shape) * cases, 'files': files}


def fine_work(shape, organ, width):
    """(windows, GFLOP) of one fine round of a case, the organ being found where it is."""
    windows = gflop = 0
    for axis, *sides in PLANES.values():
        crop = [min(organ[side] + 2 * MARGIN, shape[side]) for side in sides]
        windows, gflop = windows + organ[axis], gflop + organ[axis] * operations(crop, width)
    return windows, gflop


def operations(size, width, training=False):
    """GFLOP of one FCN-8s on an image of this size, as it runs here; training: and backward."""
    with torch.device('meta'):
        net, image = FCN8s(3, width), torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as counter:
        out = net(image)
        if training:
            out.sum().backward()
    return counter.get_total_flops() / 1e9


def full_width(size):
    """Records of single windows and of training steps with the paper's network: {windows: [...], steps: [...]}."""
    net = network('C', size.paper_width).eval()
    windows = []
    with torch.inference_mode():
        for sides in size.windows:
            seconds = timed(lambda sides=sides: net(image=torch.rand(1, 3, *sides)), size.repeats)
            windows.append({'size': sides, 'gflop': operations(sides, size.paper_width), 'seconds': seconds})
    net = network(None, size.paper_width).train()
    optimizer = make_optimizer(net, '1e-5', '10')
    steps = []
    for sides in size.steps:
        image, label = torch.rand(1, 3, *sides), torch.ones(1, 3, *sides)
        seconds = timed(lambda i=image, y=label: train_step(net, optimizer, 'I', i, y), size.repeats)
        gflop = 2 * operations(sides, size.paper_width, training=True)
        peak = measured.held_memory(os.getpid(), 'VmHWM')
        steps.append({'size': sides, 'gflop': gflop, 'seconds': seconds, 'peak': peak})
    return {'windows': windows, 'steps': steps}


def timed(work, repeats):
    """Median seconds of work(), after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# --- laws ----------------------------------------------------------------------------------------------------------


class Law:
    """value = sum of coefficient x term, fitted to records; terms: {name: record -> number}."""

    def __init__(self, records, value, terms):
        self.terms = terms
        rows = np.array([[term(record) for term in terms.values()] for record in records], float)
        values = np.array([record[value] for record in records], float)
        scale = np.abs(rows).max(axis=0)
        scale[scale == 0] = 1
        self.coefficients = nnls(rows / scale / values[:, None], np.ones(len(values)))[0] / scale
        self.worst = float(np.abs(rows @ self.coefficients / values - 1).max())

    def __call__(self, record):
        return sum(c * term(record) for c, term in zip(self.coefficients, self.terms.values()))


def field(name, unit=1.0):
    return lambda record: record[name] / unit


def laws(found):
    """{what: (unit, Law)} of everything measured."""
    once, stages = lambda _: 1, found['stages']
    of = {
        name: [record for record in stages if record['stage'] == name]
        for name in ('init', 'coarse fusion', 'coarse to fine')
    }
    coarse = [record for record in stages if record['stage'][-2:] in (' X', ' Y', ' Z')]
    windows, gflop = {'window': field('windows')}, {'GFLOP': field('gflop')}
    voxels, files = {'million voxels': field('voxels', 1e6)}, {'thousand files': field('files', 1e3)}
    start, case = {'process': once}, {'million voxels of a case': lambda r: r['voxels'] / r['cases'] / 1e6}
    width = f'width {found["width"]}'
    return {
        'init.py': ('s', Law(of['init'], 'seconds', start | voxels | files)),
        'init.py, disk': ('bytes', Law(of['init'], 'disk', voxels | files)),
        'init.py, memory': ('bytes', Law(of['init'], 'peak', start | case)),
        f'coarse testing, {width}': ('s', Law(coarse, 'seconds', start | windows | gflop | voxels)),
        f'coarse testing, {width}, memory': ('bytes', Law(coarse, 'peak', start | case)),
        'coarse testing, disk': ('bytes', Law(coarse, 'disk', voxels)),
        'coarse fusion': ('s', Law(of['coarse fusion'], 'seconds', start | voxels)),
        f'coarse to fine, {width}': ('s', Law(of['coarse to fine'], 'seconds', start | windows | gflop | voxels)),
        'window, full width': ('s', Law(found['windows'], 'seconds', {'window': once} | gflop)),
        'training step, full width': ('s', Law(found['steps'], 'seconds', {'step': once} | gflop)),
        'training step, full width, memory': ('bytes', Law(found['steps'], 'peak', start | gflop)),
    }  # fmt: skip


# --- NIH -----------------------------------------------------------------------------------------------------------


def nih_jobs(found, made, on_gpu):
    """{phase: [seconds of a job, ...]} of all folds of NIH Pancreas-CT at full width; jobs of a phase are independent."""
    width = found['paper_width']

    def seconds(law, windows, gflop):  # `windows` of `gflop` each
        return windows * (gflop / GPU_TFLOPS / 1e3 if on_gpu else made[law][1]({'gflop': gflop}))

    share = (NIH.folds - 1) / NIH.folds * NIH.cases * NIH.threshold
    pretraining, training, coarse, fine = 0, [], 0, 0
    for plane, (axis, *sides) in PLANES.items():
        full, crop = nih_sides(sides)
        slices = share * NIH.organ[axis]
        one = operations(full, width, training=True)
        pretraining += NIH.pretraining_epochs * seconds('training step, full width', slices, one)
        training.append(NIH.training_epochs * seconds('training step, full width', slices, nih_step(found, plane)))
        coarse += seconds('window, full width', NIH.shape[axis], operations(full, width))
        fine += NIH.rounds * seconds('window, full width', NIH.organ[axis], operations(crop, width))
    return {'pretraining': [pretraining] * NIH.folds, 'training': training * NIH.folds,
            'coarse testing': [coarse] * NIH.cases, 'coarse to fine': [fine] * NIH.cases}  # fmt: skip


def nih_sides(sides):
    """The sizes of a slice and of a crop."""
    return [NIH.shape[side] for side in sides], [NIH.organ[side] + 2 * MARGIN for side in sides]


def nih_step(found, plane):
    """GFLOP of a training step: the coarse network on a slice, the fine one on a crop."""
    return sum(operations(size, found['paper_width'], training=True) for size in nih_sides(PLANES[plane][1:]))


def makespan(jobs, workers):
    """Seconds until all jobs are done, the longest first, each by one worker."""
    busy = [0.0] * workers
    for job in sorted(jobs, reverse=True):
        busy[busy.index(min(busy))] += job
    return max(busy)


# --- the page ------------------------------------------------------------------------------------------------------


def page(found, soak):
    """The lines of logs/scale.md."""
    made = laws(found)
    yield '# How time, memory and disk grow\n'
    yield f'Measured by `tests/scale.py` on {found["machine"]["cpu"]}, {found["machine"]["cores"]} cores, torch {found["machine"]["torch"]}, float32.\n'
    yield from measured_tables(found)
    yield '\n## The law\n'
    yield 'Least squares of relative errors; the last column is the largest of them among the measured runs.\n'
    yield '| what | law | off by at most |\n| --- | --- | --- |'
    for what, (unit, law) in made.items():
        terms = ' + '.join(f'{amount(c, unit)} a {term}' for c, term in zip(law.coefficients, law.terms) if c)
        yield f'| {what} | {terms} | {law.worst:.0%} |'
    yield from nih_page(found, made)
    if soak:
        yield from soak_page(soak)


def measured_tables(found):
    """What was measured, as tables."""
    yield f'## Whole stages, width {found["width"]}, {ROUNDS} fine rounds\n'
    yield '| cases | stage | windows | seconds | peak memory | disk |\n| --- | --- | --- | --- | --- | --- |'
    for one in found['stages']:
        yield (f'| {one["cases"]} of {"x".join(map(str, one["shape"]))} | {one["stage"]} | {one["windows"]} | {one["seconds"]:.1f} | '
               f'{amount(one["peak"], "bytes")} | {amount(one["disk"], "bytes")} |')  # fmt: skip
    yield f'\n## One window, one training step, width {found["paper_width"]}\n'
    yield '| what | GFLOP | seconds | GFLOP/s | peak memory |\n| --- | --- | --- | --- | --- |'
    for what, records in (('coarse window', found['windows']), ('training step, both networks', found['steps'])):
        for one in records:
            peak = amount(one['peak'], 'bytes') if 'peak' in one else ''
            yield (f'| {what} {one["size"][0]}x{one["size"][1]} | {one["gflop"]:.1f} | {one["seconds"]:.2f} | '
                   f'{one["gflop"] / one["seconds"]:.0f} | {peak} |')  # fmt: skip


def nih_page(found, made):
    """The estimate, and what it rests on."""
    yield f'\n## {NIH.cases} NIH cases of {"x".join(map(str, NIH.shape))}, all {NIH.folds} folds, full width: an ESTIMATE\n'
    yield (f'Nothing of this was run. This machine: the laws above, beyond the sizes they were measured at. GPUs: the operations counted, at {GPU_TFLOPS} TFLOP/s '
           f'({GPU}, a quarter of its 156 TFLOP/s in TF32), nothing else; reading slices and starting kernels come on top. Assumed: the organ extends over '
           f'{" x ".join(map(str, NIH.organ))} voxels, {NIH.pretraining_epochs} epochs of pretraining, {NIH.training_epochs} of training, {NIH.rounds} fine rounds. '
           f'Pretraining counts as training steps of one network. A GPU does one job at a time (a pretraining a fold, a training a plane and fold, the tests a case), '
           f'and each phase waits for the one before.\n')  # fmt: skip
    workers = {'this machine': (1, False)} | {f'{n} GPU{"s" * (n > 1)}': (n, True) for n in range(1, 9)}
    jobs = {on_gpu: nih_jobs(found, made, on_gpu) for on_gpu in (False, True)}
    yield f'| on | {" | ".join(jobs[True])} | all |'
    yield '| --- ' * 6 + '|'
    for name, (count, on_gpu) in workers.items():
        times = [makespan(phase, count) for phase in jobs[on_gpu].values()]
        yield f'| {name} | {" | ".join(duration(seconds) for seconds in [*times, sum(times)])} |'
    voxels = NIH.cases * math.prod(NIH.shape)
    case = {'voxels': voxels, 'files': NIH.cases * 2 * sum(NIH.shape), 'cases': NIH.cases}
    slices, results = made['init.py, disk'][1](case), 3 * made['coarse testing, disk'][1](case)
    yield (f'\nDisk: volumes {amount(3 * voxels, "bytes")}, slices {amount(slices, "bytes")}, coarse results {amount(results, "bytes")} (by the law), '
           f'snapshots {NIH.folds * 9 * 1.07:.0f} GB (9 a fold). Initialization on this machine: {duration(made["init.py"][1](case))}. Memory of training along Z: '
           f'{amount(made["training step, full width, memory"][1]({"gflop": nih_step(found, "Z")}), "bytes")} (by the law).')  # fmt: skip


def soak_page(soak):
    """soak.py's figures."""
    yield f'\n## A soak: {soak["cases"]} tiny cases (`tests/soak.py`)\n'
    yield '| stage | seconds | memory, second quarter | last quarter | open files | grows |\n| --- | --- | --- | --- | --- | --- |'
    for stage, one in soak['stages'].items():
        before, after = (f'{memory / 1e6:.1f} MB' for memory in one['memory'])
        files = ' → '.join(map(str, one['files']))
        yield f'| {stage} | {one["seconds"]:.0f} | {before} | {after} | {files} | {"yes" if one["grows"] else "no"} |'


def amount(value, unit):
    """A figure with its unit, readable."""
    return f'{value:.3g} s' if unit == 's' else in_units(value, {'TB': 1e12, 'GB': 1e9, 'MB': 1e6, 'kB': 1e3, 'B': 1})


def duration(seconds):
    """Seconds as minutes, hours or days."""
    return in_units(seconds, {'days': 86400, 'h': 3600, 'min': 60, 's': 1})


def in_units(value, sizes):
    """The value in the largest unit of which it holds one, the last if of none."""
    name = next((name for name, size in sizes.items() if value >= size), list(sizes)[-1])
    return f'{value / sizes[name]:.3g} {name}'


if __name__ == '__main__':
    main()
