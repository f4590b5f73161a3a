"""results.txt, results.json and run.json of a result folder, and the provenance of a run.

results.txt holds the published lines, results.json the same figures for programs, run.json what the
volumes were made with.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from running.data_folder import print_once
from running.files import LEFTOVERS, atomic_write, locked, open_file, quoted, read_json, write_json
from utils import organ_rule

LIBRARIES = ('torch', 'numpy', 'scipy', 'fast-functions')
RUNS = 'runs'  # key of run.json: provenance of the runs that wrote to the folder; all other keys are settings


class Results:
    """Lines and figures of a stage: `with Results(folder, stage) as results: results(line)` prints and writes them."""

    def __init__(self, folder, stage):
        self.folder, self.stage = folder, stage
        self.lines, self.cases = [], []
        self.undefined = set()  # indices of cases

    def __call__(self, line):
        print(line, flush=True)
        self.lines.append(line)

    def add_case(self, number, case, scores, agreement=(), signals=None):
        """Add a case's figures to results.json.

        scores: {prefix of the volume's file: Dice}; agreement: Dice by round; signals: a record of volumes.trust.
        """
        scores = {
            key: {
                'DSC': None if math.isnan(dice.value) else dice.value,
                'intersection': dice.inter,
                'prediction': dice.pred,
                'label': dice.label,
            }
            for key, dice in scores.items()
        }
        found = {'number': number, 'image_file': case.image_file, 'scores': scores}
        if agreement:
            found['agreement'] = {str(r): dice.value for r, dice in enumerate(agreement, 1)}
        if signals:
            found['signals'] = signals
        self.cases.append(found)

    def average(self, values):
        """Return numpy's mean and std of the defined values, nan where there is none; remember the undefined cases."""
        defined = [value for value in values if not math.isnan(value)]
        self.undefined |= {i for i, value in enumerate(values) if math.isnan(value)}
        if not defined:
            return math.nan, math.nan
        return float(np.mean(defined)), float(np.std(defined))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        if self.undefined:
            self(
                f'{len(self.undefined)} case(s) with an empty label and an empty prediction left out of the averages .'
            )
        with atomic_write(self.folder / 'results.txt', 'w') as file:
            file.write('\n'.join(self.lines) + '\n')
        write_json(self.folder / 'results.json', {'stage': self.stage, 'cases': self.cases})
        print(f'written: {self.folder}', flush=True)


@contextlib.contextmanager
def lock_folders(*folders):
    """Lock result folders during the block, so that no second run writes into them."""
    with contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked(folder / '.lock', LEFTOVERS, f'*/{LEFTOVERS}'))
        try:
            yield
        except KeyboardInterrupt:
            if folders:
                print(f'stopped: the volumes in {folders[0]} are whole; the next run continues after them', flush=True)
            raise


# --- run.json: what the volumes were made with ---------------------------------------------------------------------


def prepare_folder(folder, settings, provenance, replace=None):
    """Record in folder/run.json what the volumes are made with; raise ValueError where stored ones were made otherwise.

    settings: {name: value}, flat; None is unknown and agrees with any value. Volumes without a
    run.json (the published pipeline's) are kept, with a line. replace: remove volumes of other
    settings, and their figures, instead of raising; it is called first, to raise where they
    could not be made again.
    """
    path, volumes = folder / 'run.json', stored_volumes(folder)
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        check_folder(folder, settings)
        former = _read_run(path)
    except ValueError:
        if volumes and not replace:
            raise
        if volumes:
            replace()
        remove_results(folder, volumes)
        volumes, former = [], {}
    known = {name: value for name, value in former.items() if name != RUNS} if volumes else {}
    runs = [run for run in former.get(RUNS, []) if volumes and run != provenance]
    content = known | settings | {RUNS: [*runs, provenance]}
    if content != former:
        write_json(path, content)


def check_folder(folder, settings, cure='--overwrite (OVERWRITE=1 in run.sh)'):
    """Raise ValueError that names `cure` where the stored volumes of a folder were made with other settings.

    Print a line where nothing says what they were made with.
    """
    volumes = stored_volumes(folder)
    try:
        former = _read_run(folder / 'run.json')
        if volumes and not former:
            print_once(f'{folder}: uses {len(volumes)} volumes of unknown settings (there is no run.json)')
        differing = [f'{name} was {shown(former[name])}, is {shown(value)}' for name, value in settings.items()
                     if None not in (value, former.get(name)) and former[name] != value]  # fmt: skip
    except ValueError as error:
        differing = [str(error)]
    if differing and volumes:
        more = f'; and {len(differing) - 5} more' if len(differing) > 5 else ''
        raise ValueError(
            f'{folder}: its volumes were made with other settings ({"; ".join(differing[:5])}{more}); '
            f'give the former settings, or {cure} to make the volumes again'
        )


def check_sources(folders, data_path, cases, labels=False):
    """Return the case_settings of these cases; raise ValueError where the volumes of a folder were made with others."""
    settings = case_settings(data_path, cases, labels)
    for folder in folders:
        check_folder(folder, settings, 'test it again with --overwrite')
    return settings


def shown(value):
    """Return a setting for an error line."""
    return quoted(value) if '\n' in str(value) else value


def stored_volumes(folder):
    """Return the files of the predictions in a result folder."""
    merged = folder.glob('*.nii.gz') if folder.parent.name.startswith('merged_') else ()
    return [*folder.glob('volumes/*.npz'), *merged]


def case_settings(data_path, cases, labels=False):
    """Return {'case 1 image_file': name and SHA-256, ...} of what a stage makes volumes of: images, or labels as well."""
    checksum, settings = Checksums(data_path), {'is_organ': organ_rule()} if labels else {}
    kinds = ('image_file', 'label_file') if labels else ('image_file',)
    for number, case in enumerate(cases, 1):
        for kind in kinds:
            file = Path(data_path, getattr(case, kind))
            digest = checksum(file)
            settings[f'case {number} {kind}'] = digest and f'{file.name} {digest}'
    checksum.save()
    return settings


def remove_results(folder, volumes):
    """Remove volumes of a result folder and their NIfTI files, and first the figures that were made of them."""
    for name in ('results.txt', 'results.json'):
        (folder / name).unlink(missing_ok=True)
    for volume in volumes:
        volume.unlink()
        volume.with_suffix('.nii.gz').unlink(missing_ok=True)


def read_settings(path):
    """Return the settings in a run.json, without its runs; {} where there is none; raise ValueError if damaged."""
    try:
        content = _read_run(path)
    except ValueError as error:
        raise ValueError(f'{error}; run the stage that made it again, with --overwrite') from None
    return {name: value for name, value in content.items() if name != RUNS}


def _read_run(path):
    try:
        content = read_json(path)
        if not isinstance(content.get(RUNS, []), list):
            raise ValueError(f'its {RUNS} are not a list')
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f'{path}: not a readable run.json ({error})') from None
    return content


def checksum(path):
    """Return the SHA-256 of a file; None where it is missing, or no file but a pipe or a device."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except (FileNotFoundError, ValueError):
        return None
    return digest.hexdigest()


class Checksums:
    """SHA-256 of files of a data folder; those of unchanged files are remembered in its .checksums.json.

    A file is unchanged where size, inode and times of modification and change are.
    """

    def __init__(self, data_path):
        self.path = Path(data_path, '.checksums.json')
        try:
            self.known = read_json(self.path)
        except (OSError, ValueError):
            self.known = {}

    def __call__(self, path):
        """Return the SHA-256 of a file; None where it is missing, or no file but a pipe or a device."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        state = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
        remembered = self.known.get(str(path))
        if not (isinstance(remembered, list) and remembered[:-1] == state):
            self.known[str(path)] = remembered = [*state, checksum(path)]
        return remembered[-1]

    def save(self):
        """Write what is known; a data folder that cannot be written to costs only time."""
        with contextlib.suppress(OSError):
            write_json(self.path, self.known)


# --- provenance ----------------------------------------------------------------------------------------------------


def start(args):
    """Return (device, provenance) of a stage that runs a network, and print the lines that begin every log."""
    from running.processes import device_name, set_up  # importing torch takes seconds

    device = set_up(args)
    return device, print_provenance(args, device_name(device))


def start_without_network(args, stage):
    """Return the provenance of a stage that runs no network, and print the same lines."""
    print(f'device: CPU ({stage} needs no other)')
    return print_provenance(args, 'CPU')


def print_provenance(args, device):
    """Return the provenance of a run with these arguments, and print it: code and libraries, arguments."""
    provenance = code() | {
        'device': device,
        'arguments': {name: value for name, value in vars(args).items() if name != 'unused'},
    }
    versions = ', '.join(f'{name} {value}' for name, value in provenance['versions'].items())
    print(f'code: {provenance["revision"]}; {versions}')
    print('arguments: ' + ' '.join(f'{name}={value}' for name, value in provenance['arguments'].items()), flush=True)
    return provenance


def code():
    """Return {'revision': ..., 'versions': {...}} of the code and its libraries."""
    versions = {'python': platform.python_version()} | {name: library_version(name) for name in LIBRARIES}
    return {'revision': revision(), 'versions': versions}


@functools.cache
def revision():
    """Return the commit of the code, with `-dirty` where files differ from it; `unknown` without git, or installed."""
    if not Path(__file__).resolve().parents[2].joinpath('.git').exists():  # else git names the repository around
        return 'unknown'
    command = ['git', '-C', Path(__file__).resolve().parent, 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def library_version(name):
    """Return the installed version of a library, or `none`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return 'none'
