"""results.txt and run.json of a result folder: what came out, and what it was made with."""

import hashlib
import json
import math
import statistics

from claims import open_file, read_json
from utils import whole_file


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


def prepare_folder(folder, settings):
    """Make sure that what is stored in folder/volumes was made with these settings (kept in folder/run.json).

    Volumes made with others are removed, said in a line; volumes without a run.json (the published pipeline's) are kept.
    A value None is unknown and equals any.
    """
    path = folder / 'run.json'
    volumes = list(folder.glob('volumes/*.npz'))
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
    if known != former:
        with whole_file(path, 'w') as file:
            json.dump(known, file, indent=1)


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
    """The settings in a run.json; None where there is none that can be read."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


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
