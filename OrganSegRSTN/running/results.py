"""What a figure was made with: code revision, libraries, device, threads, seed and arguments."""

import contextlib
import functools
import hashlib
import json
import math
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from running.files import LEFTOVERS, atomic_write, locked, open_file, read_json

LIBRARIES = ('torch', 'numpy', 'scipy', 'fast-functions')


def start(args):
    """(device, provenance) of a stage that runs a network: the lines that every log begins with are printed."""
    from running.processes import device_name, pick_device

    device = pick_device(args.GPU_ID)
    made = provenance(args, device_name(device))
    print_provenance(made)
    return device, made


def start_without_network(args, stage):
    """The provenance of a stage that runs no network: the same lines are printed."""
    print(f'device: CPU ({stage} needs no other)')
    made = provenance(args, 'CPU')
    print_provenance(made)
    return made


def code():
    """{what: value} of the code and its libraries."""
    versions = {'python': platform.python_version()} | {name: library_version(name) for name in LIBRARIES}
    return {'revision': revision(), 'versions': versions}


def provenance(args, device):
    """{what: value} of a run with these arguments on a device of this name."""
    return code() | {
        'device': device,
        'arguments': {name: value for name, value in vars(args).items() if name != 'unused'},
    }


def print_provenance(made):
    """Two lines: the code and its libraries, the arguments."""
    print(f'code: {made["revision"]}; ' + ', '.join(f'{name} {value}' for name, value in made['versions'].items()))
    print('arguments: ' + ' '.join(f'{name}={value}' for name, value in made['arguments'].items()), flush=True)


@functools.cache
def revision():
    """The commit of the code, `-dirty` where files differ from it; `unknown` without git."""
    command = ['git', '-C', Path(__file__).resolve().parent, 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def library_version(name):
    """The installed version of a library, or `none`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return 'none'


RUNS = 'runs'  # key of run.json: what is told of the runs that went into the folder; the others are settings


class Results:
    """Lines of a stage: `with Results(folder) as results: results(line)` prints them and writes folder/results.txt."""

    def __init__(self, folder):
        self.path = folder / 'results.txt'
        self.lines = []
        self.undefined = set()  # places of the cases

    def __call__(self, line):
        print(line, flush=True)
        self.lines.append(line)

    def average(self, values):
        """Mean and population standard deviation of the defined values (nan is left out); nan where there is none."""
        defined = [value for value in values if not math.isnan(value)]
        self.undefined |= {i for i, value in enumerate(values) if math.isnan(value)}
        if not defined:
            return math.nan, math.nan
        return statistics.fmean(defined), statistics.pstdev(defined)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        if self.undefined:
            self(
                f'{len(self.undefined)} case(s) with an empty label and an empty prediction left out of the averages .'
            )
        with atomic_write(self.path, 'w') as file:
            file.write('\n'.join(self.lines) + '\n')
        print(f'written: {self.path.parent}', flush=True)


@contextlib.contextmanager
def lock_folders(*folders):
    """Hold result folders for the block: a second run into one of them is told who is at work, and stops."""
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked(folder / '.lock', LEFTOVERS, f'volumes/{LEFTOVERS}'))
        try:
            yield
        except KeyboardInterrupt:
            if folders:
                print(f'stopped: the volumes in {folders[0]} are whole; the next run goes on after them', flush=True)
            raise


def prepare_folder(folder, settings, made):
    """Make sure that what is stored in folder/volumes was made with these settings (kept in folder/run.json).

    Volumes made with others, or beside a run.json that cannot be read, are removed, said in a line, and with them the
    results.txt of their figures; volumes without a run.json (the published pipeline's) are kept. A value None is unknown
    and equals any. made: the provenance of this run, told beside that of the former runs that made some of the volumes.
    """
    path = folder / 'run.json'
    volumes = list(folder.glob('volumes/*.npz'))
    former, damage = {}, None
    try:
        former = _read_run(path)
    except ValueError as error:
        damage = error
    if volumes and not (damage or former.keys() - {RUNS}):
        print(f'{folder}: {len(volumes)} volumes of unknown settings are taken as they are (no run.json)')
    differing = [f'{k}: {former[k]}, now {v}' for k, v in settings.items() if not _same(former.get(k), v)]
    if volumes and (damage or differing):
        kind = 'unknown' if damage else 'other'
        print(
            f'{folder}: {len(volumes)} volumes made with {kind} settings are made again ({damage or "; ".join(differing)})'
        )
    if damage or differing:
        discard(folder, volumes)
    known = {key: _known(former.get(key), value) for key, value in settings.items()}
    runs = [run for run in former.get(RUNS, []) if volumes and not differing and run != made]
    if damage or known | {RUNS: [*runs, made]} != former:
        with atomic_write(path, 'w') as file:
            json.dump(known | {RUNS: [*runs, made]}, file, indent=1)


def discard(folder, volumes):
    """Remove volumes of a result folder, their NIfTIs, and first the figures that were made of them."""
    (folder / 'results.txt').unlink(missing_ok=True)
    for volume in volumes:
        volume.unlink()
        volume.with_suffix('.nii.gz').unlink(missing_ok=True)


def _known(former, now):
    """`now`, or `former` in the places where that is None."""
    if isinstance(now, list) and isinstance(former, list) and len(now) == len(former):
        return list(map(_known, former, now))
    return former if now is None else now


def _same(former, now):
    if former is None or now is None:
        return True
    if isinstance(now, list) and isinstance(former, list):
        return len(former) == len(now) and all(map(_same, former, now))
    if isinstance(now, dict) and isinstance(former, dict):
        return all(_same(former.get(key), value) for key, value in now.items())
    return former == now


def read_settings(path):
    """The settings in a run.json, without its runs; None where there is none; ValueError names one that cannot be read."""
    try:
        content = _read_run(path)
    except ValueError as error:
        raise ValueError(f'{error}; run the stage that made it again') from None
    return {key: value for key, value in content.items() if key != RUNS} or None


def _read_run(path):
    """The content of a run.json; {} where there is none; ValueError names one that cannot be read."""
    try:
        content = read_json(path)
        if not isinstance(content.get(RUNS, []), list):
            raise ValueError(f'its {RUNS} are no list')
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f'{path}: not a readable run.json ({error})') from None
    return content


def checksum(path):
    """SHA-256 of a file, or None where it is gone, or no file but a pipe or a device."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except (FileNotFoundError, ValueError):
        return None
    return digest.hexdigest()
