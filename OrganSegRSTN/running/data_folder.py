"""The data folder: names of its files, cases, lists of slices and folds, snapshots and result folders (docs/data.md)."""

import functools
import glob
import math
import operator
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from running.files import LEFTOVERS, load_array, quoted, read_json, read_lines
from utils import is_organ, organ_rule

PLANES = 'XYZ'
INIT_RECORD = 'init.json'  # what init.py made the lists of, and their sizes and checksums
MODES = 'SIJ'  # separate, individual, joint (section 3.3)
# names as snapshot_name makes them
SNAPSHOT_PARTS = r'(?P<plane>[XYZ])(?P<mode>[SIJ])(?P<thickness>[13])_(?P<organ>\d+)(?:_(?P<time>.{15}))?'
SNAPSHOT = re.compile(rf'FD(?P<fold>\d+).{SNAPSHOT_PARTS}\.pkl')
GOOD_LOSS = {'S': 0.3, 'I': 0.2, 'J': 0.15}  # mean Avg loss of a mode's last epoch that the published README asks for


def plane_view(volume, plane):
    """Return a view of the volume (W, H, L) with the plane's axis first: plane_view(v, 'Y')[j] is slice j along Y."""
    return np.moveaxis(volume, PLANES.index(plane), 0)


# --- cases ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A line of lists/training_FD0.txt or testing_FD0.txt: the case's number among all, from 0, and its files."""

    number: int
    image_file: str
    label_file: str

    def image(self, data_path):
        """Return the scan (W, H, L)."""
        return self._three_axes(load_array(os.path.join(data_path, self.image_file)), self.image_file)

    def label(self, data_path, organ_ID):
        """Return where the organ is, bool (W, H, L)."""
        label = load_array(os.path.join(data_path, self.label_file))
        return self._three_axes(np.asarray(is_organ(label, organ_ID)), self.label_file)

    @staticmethod
    def _three_axes(volume, file):
        if volume.ndim != 3:
            raise ValueError(f'{file}: {volume.ndim} axes instead of 3 (W, H, L)')
        return volume


def case_names(data):
    """Return the names of the cases with an image and a label, in file order; print what is left out."""
    images, labels = (array_names(data / kind) for kind in ('images', 'labels'))
    for missing, names in (('label', set(images) - set(labels)), ('image', set(labels) - set(images))):
        for name in sorted(names):
            print(f'{name}: left out, it has no {missing}s/{name}.npy')
    names = [name for name in images if name in labels]
    if not names:
        raise FileNotFoundError(f'{data}: no images/*.npy with labels/*.npy of the same name; convert the scans first')
    for name in names:
        if fault := name_fault(name):
            file = f'images/{name}.npy'
            raise ValueError(
                f'{file!r}: a case name cannot hold {fault}, since lists are split at white space; rename it'
            )
    return names


def array_names(folder):
    """Return the sorted names of a folder's .npy files; print what else is in it."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    arrays = [file for file in files if file.suffix == '.npy' and not file.name.startswith('.') and file.exists()]
    others = [file.name for file in files if file not in arrays and not file.match(LEFTOVERS)]
    if others:
        more = f' and {len(others) - 5} more' if len(others) > 5 else ''
        print(f'{folder}: {len(others)} left out, hidden or not .npy files: {", ".join(others[:5])}{more}')
    return [file.stem for file in arrays]


def name_fault(name):
    """Return what a case's name holds that lists and results lines cannot; '' where nothing."""
    if re.search(r'\s', name):
        return 'white space'
    if not name.isprintable():
        return 'characters that cannot be printed'
    return '' if name else 'nothing'


def check_case(name, image, label, organ_number):
    """Return the label as whole numbers; raise ValueError where the two volumes cannot be a case."""
    if image.ndim != 3 or image.shape != label.shape or not image.size:
        raise ValueError(
            f'{name}: image {image.shape} and label {label.shape} are not two volumes (W, H, L) of one shape'
        )
    if not np.isfinite(image).all():
        raise ValueError(f'images/{name}.npy: not all values are finite')
    if not (np.isfinite(label).all() and np.array_equal(label, np.floor(label)) and label.min() >= 0):
        raise ValueError(f'labels/{name}.npy: not all values are whole numbers from 0')
    if label.max() > organ_number:
        print(
            f'labels/{name}.npy: holds {label.max():g}, above organ_number {organ_number}: right only if you redefined is_organ'
        )
    return whole_numbers(label)


def whole_numbers(label):
    """Return a label that holds whole numbers as an array of integers or booleans."""
    return label if label.dtype.kind in 'bui' else label.astype(np.int64)


# --- lists ---------------------------------------------------------------------------------------------------------


def slice_list(data_path, plane):
    """Return the path of lists/training_X|Y|Z.txt: all slices of all cases along a plane."""
    return Path(data_path, 'lists', f'training_{plane}.txt')


def fold_list(data_path, kind, fold):
    """Return the path of lists/training_FD0.txt or testing_FD0.txt, for `kind` training or testing."""
    return Path(data_path, 'lists', f'{kind}_FD{fold}.txt')


def read_list(path):
    """Return the lines of a list, without blank ones."""
    try:
        return read_lines(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such list; run init.py first, with enough folds') from None
    except ValueError as error:
        raise ValueError(f'{path}: not a list ({error}); run init.py again') from None


def read_cases(data_path, kind, fold):
    """Return the cases that train or test a fold, in order.

    A list that was edited by hand is taken as it is; a line says how many cases it holds.
    """
    path = fold_list(data_path, kind, fold)
    other = fold_list(data_path, 'testing' if kind == 'training' else 'training', fold)
    cases = _read_cases(path)
    if not cases:
        why = '; with FOLDS=1 no case is left to train on' if kind == 'training' else ''
        raise ValueError(f'{path}: holds no case{why}')
    others = [case.number for case in _read_cases(other)] if other.exists() else []
    numbers = [case.number for case in cases]
    if repeated := [number for number in numbers if numbers.count(number) > 1]:
        raise ValueError(f'{path}: holds case {repeated[0]} twice')
    if shared := sorted(set(numbers) & set(others)):
        print_once(f'warning: {path}: case {shared[0]} trains and tests fold {fold}: its figures say little')
    if sorted(numbers + others) != list(range(len(numbers + others))) or resized(data_path, path):
        print_once(f'{path}: {len(cases)} cases, as edited by hand')
    return cases


def resized(data_path, path):
    """Return whether a list has another size than init.py wrote."""
    return recorded(data_path, 'lists', path.name, 0) not in (None, path.stat().st_size)


def changed_since_init(data_path, file):
    """Return whether images/CASE.npy or labels/CASE.npy exists and is not as init.py found it, by size and time."""
    path = Path(data_path, file)
    kind = {'images': 0, 'labels': 1}.get(path.parent.name)
    return os.path.exists(path) and recorded(data_path, 'cases', path.stem, kind) not in (None, file_state(path))


def rule_changed_since_init(data_path):
    """Return whether is_organ is not as it was when init.py listed the slices by it."""
    return recorded(data_path, 'settings', 'is_organ') not in (None, organ_rule())


def recorded(data_path, *keys):
    """Return what the record of init.py holds under these keys, one in the other; None: nothing, or it cannot be read."""
    try:
        return functools.reduce(operator.getitem, keys, read_json(Path(data_path, INIT_RECORD)))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def file_state(path):
    """Return [bytes, time of the last change (ns)] of a file."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


@functools.cache
def print_once(line):
    """Print a line the first time that it comes."""
    print(line, flush=True)


def _read_cases(path):
    cases = []
    for line in read_list(path):
        fields = line.split()
        if len(fields) != 3 or not re.fullmatch('[0-9]{1,9}', fields[0]):
            raise ValueError(f'{path}: {quoted(line)} is not `case image_file label_file`; correct it or run init.py')
        cases.append(Case(int(fields[0]), *fields[1:]))
    return cases


class Slice(NamedTuple):
    """A line of lists/training_X|Y|Z.txt; `organs` holds (pixels, minA, maxA, minB, maxB) of organ 1, 2, ..."""

    case: int
    index: int
    image_file: str
    label_file: str
    average: float
    organs: tuple

    def __str__(self):
        numbers = [number for organ in self.organs for number in organ]
        return ' '.join(map(str, [*self[:5], *numbers]))

    @classmethod
    def read(cls, line):
        """Return the record of a list line; raise ValueError where it is not one."""
        fields = line.split()
        try:
            average, numbers = float(fields[4]), [int(field) for field in fields[:2] + fields[5:]]
            if len(fields) < 10 or len(fields) % 5 or min(numbers) < 0 or not math.isfinite(average):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f'{quoted(line)} is not a slice of a list; run init.py again') from None
        case, index, *counts = numbers
        organs = tuple(tuple(counts[i : i + 5]) for i in range(0, len(counts), 5))
        return cls(case, index, fields[2], fields[3], average, organs)


def slice_averages(image, intensity_window):
    """Return {plane: mean intensity of each slice} of `image` (W, H, L), clipped to `intensity_window` (HU)."""
    clipped = np.clip(image, *intensity_window)
    rows = clipped.sum(axis=2, dtype=np.float64)  # (W, H)
    sums = {'X': rows.sum(axis=1), 'Y': rows.sum(axis=0), 'Z': clipped.sum(axis=(0, 1), dtype=np.float64)}
    return {plane: values / (image.size // len(values)) for plane, values in sums.items()}


def organ_extents(mask):
    """Return {plane: (slices, 5) array} of `mask` (W, H, L): pixels, minA, maxA, minB, maxB; 0 where it is empty."""
    counts = [mask.sum(axis=axis, dtype=np.int64) for axis in range(3)]

    def profile(axis, other):  # pixels by slice and place along the other axis
        kept = counts[3 - axis - other]
        return kept if axis < other else kept.T

    extents = {}
    for axis, plane in enumerate(PLANES):
        a, b = (profile(axis, other) for other in range(3) if other != axis)
        extents[plane] = np.stack([a.sum(axis=1), *_ends(a > 0), *_ends(b > 0)], axis=1)
    return extents


def _ends(hits):
    """Return first and last True of each row of `hits` (slices, n); 0 where there is none."""
    last = hits.shape[1] - 1 - hits[:, ::-1].argmax(axis=1)
    return hits.argmax(axis=1), np.where(hits.any(axis=1), last, 0)


# --- snapshots and results -----------------------------------------------------------------------------------------


def training_settings(args):
    """Return `1e-5x10,20`: rate, multiplier and margin as they stand in folder names; `fast_3e-4x1,20` of that recipe."""
    recipe = '' if args.recipe == 'published' else f'{args.recipe}_'
    return f'{recipe}{args.learning_rate1}x{args.learning_rate_m1},{args.crop_margin}'


def epoch_name(args):
    """Return `e2682`: the epochs of S, I, J and the decay step."""
    return f'e{args.epoch_S}{args.epoch_I}{args.epoch_J}{args.epoch_step}'


def results_folder(args, stage, name):
    """Return results/{stage}_testing_1e-5x10,20/{name} of the data folder."""
    return Path(args.data_path, 'results', f'{stage}_testing_{training_settings(args)}', name)


def snapshot_folder(args):
    """Return models/snapshots/SIJ_training_1e-5x10,20 of the data folder."""
    return Path(args.data_path, 'models', 'snapshots', f'SIJ_training_{training_settings(args)}')


def snapshot_name(args, plane, mode, timestamp, step=None):
    """Return `FD0:XJ3_1_20261123_000000.pkl`; a timestamp that has not 15 characters is left out.

    step: of a snapshot within a mode, `..._step00500.pkl`.
    """
    stamp = f'_{timestamp}' if len(timestamp) == 15 else ''
    stamp += '' if step is None else f'_step{step:05d}'
    return f'FD{args.current_fold}:{plane}{mode}{args.slice_thickness}_{args.organ_ID}{stamp}.pkl'


def step_snapshots(args, snapshot):
    """Return the paths of the snapshots within mode J, `..._step00500.pkl`, beside that of its end, in order."""
    name = snapshot.removesuffix('.pkl')
    paths = snapshot_folder(args).glob(f'{glob.escape(name)}_step*.pkl')
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def averaged_snapshots(args, snapshot):
    """Return the paths of a snapshot and, with --average N, of the N - 1 last ones that --snapshot_steps saved."""
    steps = step_snapshots(args, snapshot)
    if len(steps) < args.average - 1:
        raise ValueError(
            f'{snapshot_folder(args) / snapshot}: {len(steps)} snapshots of steps beside it are too few for '
            f'--average {args.average}'
        )
    return [snapshot_folder(args) / snapshot, *steps[len(steps) - args.average + 1 :]]


def find_snapshot(args, plane, timestamp):
    """Return the name of the snapshot to test: of the timestamp; else the one without; else, with a line, the newest."""
    return _find_snapshots(args, {plane: timestamp})[0]


def find_snapshots(args):
    """Return the names of the three planes' snapshots to test, of timestamp1_X, _Y and _Z.

    Planes without a timestamp of their own get snapshots of one training.
    """
    return _find_snapshots(args, {plane: getattr(args, f'timestamp1_{plane}') for plane in PLANES})


def _find_snapshots(args, asked):
    """Return the snapshot of each plane of {plane: timestamp}."""
    open_planes = [plane for plane, timestamp in asked.items() if len(timestamp) != 15]
    given = {timestamp for timestamp in asked.values() if len(timestamp) == 15}
    stored = {plane: stored_timestamps(args, plane) for plane in open_planes}
    chosen = '_'
    if any(stored.values()):
        shared = set.intersection(*filter(None, stored.values()), *({timestamp} for timestamp in given))
        if not shared and given and all('_' in times for times in stored.values()):
            print(
                f'{", ".join(open_planes)}: no snapshots of the training {", ".join(given)}; tests those without a timestamp'
            )
            shared = {'_'}
        if not shared:
            choice = '; '.join(f'{plane}: {", ".join(sorted(times))}' for plane, times in stored.items())
            given = f' and {", ".join(sorted(given))}' if given else ''
            raise ValueError(
                f'{snapshot_folder(args)}: no training of all planes ({choice}{given}); name the timestamp of each plane'
            )
        chosen = '_' if '_' in shared else max(shared)
        if chosen != '_':
            print(f'{", ".join(open_planes)}: no snapshot without a timestamp; tests the training {chosen}')
        elif not given and (others := set.union(*stored.values()) - {'_'}):
            others = ', '.join(sorted(others))
            print_once(f'{", ".join(open_planes)}: tests the snapshots without a timestamp, not {others}')
    return [snapshot_name(args, plane, 'J', chosen if plane in open_planes else time) for plane, time in asked.items()]


def stored_timestamps(args, plane):
    """Return the timestamps of a plane's stored snapshots of mode J, `_` for one without."""
    name = snapshot_name(args, plane, 'J', '_').removesuffix('.pkl')
    found = (
        re.fullmatch(re.escape(name) + r'(?:_(.{15}))?\.pkl', file.name) for file in snapshot_folder(args).glob('*.pkl')
    )
    return {match[1] or '_' for match in found if match}


def without_fold(args, snapshots):
    """Return snapshot names, without `FD0:`, joined by commas."""
    return ','.join(name.removeprefix(f'FD{args.current_fold}:') for name in snapshots)


def pretrained_folder(args):
    """Return models/pretrained of the data folder."""
    return Path(args.data_path, 'models', 'pretrained')


def pretrained_name(args):
    """Return `fcn8s_FD0_1.pth`: the FCN-8s that pretrain.py trains for a fold and an organ."""
    return f'fcn8s_FD{args.current_fold}_{args.organ_ID}.pth'


def find_pretrained(args):
    """Return the FCN-8s to start training from: --pretrained, else the first of those in models/pretrained/."""
    if args.pretrained:
        return Path(args.pretrained)
    folder = pretrained_folder(args)
    names = ['fcn8s_from_caffe.pth', 'fcn8s_from_vgg16.pth', pretrained_name(args)]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f'{folder}: no FCN-8s to start from ({", ".join(names)}). Train one on this data with pretrain.py '
            '(ENABLE_PRETRAINING=1 in run.sh), or convert one you have with pretrain.py --convert FILE'
        )
    return found
