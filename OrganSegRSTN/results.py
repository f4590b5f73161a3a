"""results.txt and run.json of a result folder: what came out, and what it was made with."""

import contextlib
import hashlib
import json
import math
import statistics

from claims import open_file, read_json
from utils import held, whole_file

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
        with whole_file(self.path, 'w') as file:
            file.write('\n'.join(self.lines) + '\n')
        print(f'written: {self.path.parent}', flush=True)


@contextlib.contextmanager
def hold(*folders):
    """Hold result folders for the block: a second run into one of them is told who is at work, and stops."""
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(held(folder / '.lock', '.*.part', 'volumes/.*.part'))
        try:
            yield
        except KeyboardInterrupt:
            if folders:
                print(f'stopped: the volumes in {folders[0]} are whole; the next run goes on after them', flush=True)
            raise


def prepare_folder(folder, settings, made):
    """Make sure that what is stored in folder/volumes was made with these settings (kept in folder/run.json).

    Volumes made with others are removed, said in a line; volumes without a run.json (the published pipeline's) are kept.
    A value None is unknown and equals any. made: the provenance of this run, told beside that of the former runs that
    made some of the volumes.
    """
    path = folder / 'run.json'
    volumes = list(folder.glob('volumes/*.npz'))
    content = _read_json(path)
    former = read_settings(path)
    if volumes and former is None:
        print(f'{folder}: {len(volumes)} volumes of unknown settings are taken as they are (no run.json)')
    differing = [f'{k}: {former[k]}, now {v}' for k, v in settings.items() if not _same((former or {}).get(k), v)]
    if differing:
        if volumes:
            print(f'{folder}: {len(volumes)} volumes made with other settings are made again ({"; ".join(differing)})')
        for volume in volumes:
            volume.unlink()
            volume.with_suffix('.nii.gz').unlink(missing_ok=True)
    known = settings if former is None else {key: _known(former.get(key), value) for key, value in settings.items()}
    runs = [run for run in content.get(RUNS, []) if volumes and not differing and run != made]
    if known | {RUNS: [*runs, made]} != content:
        with whole_file(path, 'w') as file:
            json.dump(known | {RUNS: [*runs, made]}, file, indent=1)


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
    """The settings in a run.json, without its runs; None where there is none that can be read."""
    return {key: value for key, value in _read_json(path).items() if key != RUNS} or None


def _read_json(path):
    """The content of a run.json; {} where there is none that can be read."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}


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
