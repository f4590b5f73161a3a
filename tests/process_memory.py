"""What bench.py, scale.py and soak.py share: cases and snapshots made up, and stage scripts run and watched as processes.

Linux only: what a process holds is read from /proc.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from golden_case import recipe

from model import RSTN

CODE = Path(__file__).resolve().parent.parent / 'OrganSegRSTN'
BEGIN = [0, 1, -100, 240, 0.98, 3, 1]  # current_fold ... organ_ID
RATES = ['1e-5', 10, '1e-5', 10, 20]
EPOCHS = [1, 1, 1, 1]
SNAPSHOTS = 'models/snapshots/SIJ_training_1e-5x10,20'
POLL = 0.02  # seconds between two looks at a running process


class Run(NamedTuple):
    """How long a script took, and the most memory it ever held (bytes, resident)."""

    seconds: float
    peak: int


def run(script, *args, watch=lambda pid: None):
    """Run a stage script to its end, calling watch(pid) meanwhile; RuntimeError with its last line where it fails."""
    peak = 0
    with tempfile.TemporaryFile('w+') as output:
        start = time.perf_counter()
        command = [sys.executable, CODE / script, *map(str, args)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, held_memory(process.pid, 'VmHWM'))
            watch(process.pid)
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f'{script} ended with {process.returncode}: {output.read().strip().splitlines()[-1:]}')
    return Run(seconds, peak)


def held_memory(pid, what):
    """Return the resident memory of a process in bytes: `VmRSS` now, `VmHWM` at most so far; 0 where it has just ended."""
    try:
        found = re.search(rf'{what}:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def write_cases(data, shapes):
    """Write images/0001.npy ... and labels/: a bright organ in a soft body, a volume a shape; those of a shape are alike."""
    for number, shape in enumerate(shapes, 1):
        for kind, volume in zip(('images', 'labels'), recipe.volume(1 + shapes.index(shape), shape)):
            (data / kind).mkdir(parents=True, exist_ok=True)
            np.save(data / kind / f'{number:04d}.npy', volume)


def write_snapshots(data, width):
    """Write one snapshot under three planes' names: the golden recipe's, which segments bright organs untrained."""
    with torch.device('meta'):
        shapes = {key: tensor.shape for key, tensor in RSTN(width=width).state_dict().items()}
    folder = data / SNAPSHOTS
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: torch.from_numpy(array) for key, array in recipe.weights(shapes, 7).items()}
    torch.save(weights, folder / 'FD0:XJ3_1.pkl')
    for plane in 'YZ':
        (folder / f'FD0:{plane}J3_1.pkl').hardlink_to(folder / 'FD0:XJ3_1.pkl')


def testing_args(data, plane):
    """Return the positionals of coarse_testing.py."""
    return [data, *BEGIN, plane, 'cpu', *RATES, 0.5, 1, *EPOCHS, '_']


def stages(data, rounds):
    """Return (name, script, arguments, files) from init to coarse-to-fine, all cases being test cases of the one fold.

    files: a pattern that finds one path in the data folder for each case that is done.
    """
    results = data / 'results'
    yield 'init', 'init.py', [data, 1, 1, -100, 240], data / 'labels_Z' / '[!.]*'
    for plane in 'XYZ':
        volumes = results / 'coarse_testing_1e-5x10,20' / f'FD0:{plane}J3_1.pkl' / 'volumes'
        yield f'coarse {plane}', 'coarse_testing.py', testing_args(data, plane), volumes / '[!.]*'
    three = [data, *BEGIN, 'cpu', *RATES, *EPOCHS]
    fused = results / 'coarse_testing_1e-5x10,20' / 'FD0:fusion:*' / 'volumes'
    yield 'coarse fusion', 'coarse_fusion.py', [*three, 0.5, *'___'], fused / 'F3P_*'
    refined = results / 'coarse2fine_testing_1e-5x10,20' / '*' / 'volumes'
    yield 'coarse to fine', 'coarse2fine_testing.py', [*three, 0.5, 0.5, rounds, *'___'], refined / f'R{rounds}_*'
