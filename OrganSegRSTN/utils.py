"""Names of files and folders, folds, intensities, Dice and post-processing: what every stage shares, without torch."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import socket
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from claims import check_entry, check_npy, open_file, read_lines, shown

try:
    import fast_functions
except ImportError:
    fast_functions = None

PLANES = 'XYZ'
LEFT = '.*.[0-9]*.part'  # what a killed run leaves half-written: .NAME.PROCESS.part


# --- labels, folds and intensities ---------------------------------------------------------------------------------


def is_organ(label, organ_ID):
    """Where `label` (any shape) shows the organ, as bool. Redefine it here, once, for overlapping organs."""
    return label == organ_ID


def in_training_set(total_samples, i, folds, current_fold):
    """Whether case `i` (from 0) trains fold `current_fold`; the last total % folds folds test one case more."""
    size, extra = divmod(total_samples, folds)

    def start(fold):
        return fold * size + max(0, fold - (folds - extra))

    return not start(current_fold) <= i < start(current_fold + 1)


def to_unit(image, low_range, high_range):
    """Intensities clipped to [low_range, high_range] and scaled to [0, 1], float32, same shape."""
    unit = np.clip(image, low_range, high_range).astype(np.float32)
    unit -= np.float32(low_range)
    unit /= np.float32(high_range - low_range)
    return unit


# --- Dice and post-processing --------------------------------------------------------------------------------------


class Dice(NamedTuple):
    """Dice-Sorensen coefficient with its counts (voxels); prints as `2 * inter / (pred + label) = value`."""

    value: float
    inter: int
    pred: int
    label: int

    def __str__(self):
        return f'2 * {self.inter} / ({self.pred} + {self.label}) = {self.value}'


def DSC_computation(label, pred):
    """Dice of two masks of one shape (bool or uint8, nonzero is organ): (DSC, intersection, pred sum, label sum).

    DSC is nan where both are empty: it is undefined there.
    """
    if label.shape != pred.shape:
        raise ValueError(f'label of shape {label.shape} and prediction of shape {pred.shape} cannot be compared')
    label, pred = (mask if mask.dtype in (bool, np.uint8) else mask != 0 for mask in (label, pred))
    if fast_functions:
        counts = np.zeros(3, np.uint32)
        fast_functions.DSC_computation(label, pred, counts)
        labels, preds, inter = map(int, counts)
    else:
        _say_slower()
        labels, preds = np.count_nonzero(label), np.count_nonzero(pred)
        inter = np.count_nonzero(np.logical_and(label, pred))
    total = labels + preds
    return Dice(2.0 * inter / total if total else float('nan'), inter, preds, labels)


def post_processing(F, S, threshold, organ_ID):
    """Keep the 6-connected components of F of at least `threshold` times the largest one's size.

    F: mask (W, H, L), changed in place where it is a writable uint8 array, and returned; S: seed volume of F's shape,
    without effect, as in the published C++; organ_ID: unused, kept for users' scripts. F comes back unchanged where
    it is empty or at least half full.
    """
    F, S = np.require(F, np.uint8, ['C', 'W']), np.asarray(S)
    if fast_functions:
        seed = S if S.dtype in (bool, np.uint8) else S != 0  # a copy would take longer than all the rest
        fast_functions.post_processing(F, seed, threshold, False)
    else:
        _say_slower()
        _post_processing_scipy(F, S, threshold)
    return F


def _post_processing_scipy(F, S, threshold, top2=False):
    """fast_functions.post_processing in scipy; the same results, slower."""
    from scipy import ndimage

    if np.shape(S) != F.shape:
        raise ValueError(f'S of shape {np.shape(S)} does not fit F of shape {F.shape}')
    foreground = np.count_nonzero(F)
    if foreground == 0 or foreground >= F.size // 2:
        return
    components, _ = ndimage.label(F)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    reference = np.sort(sizes[1:])[-2:][0] if top2 else sizes.max()
    F[(sizes < threshold * reference)[components]] = 0


_said_slower = False


def _say_slower():
    global _said_slower
    if not _said_slower:
        print('fast_functions is not built: scipy does its work, slower (pip install ./SWIG_fast_functions)')
    _said_slower = True


# --- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, mode='wb'):
    """Open a file that appears under its name only when it is complete: written beside it, flushed, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name[:200]}.{os.getpid()}.part')
    try:
        with naming(path, part), open(part, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # of a disk that cannot be written to; the block's own error tells
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path, part=None):
    """Let an OSError of the block that names no file, or `part`, name `path`: also one that a library hides behind its own.

    numpy and torch answer a full disk with a ValueError or RuntimeError about the archive that they could not close.
    """
    try:
        yield
    except Exception as error:
        behind = error
        while behind and not (isinstance(behind, OSError) and behind.errno and behind.filename in (None, str(part))):
            behind = behind.__context__
        if behind is None:
            raise
        raise OSError(behind.errno, behind.strerror, str(path)) from None


@contextlib.contextmanager
def held(path, *parts):
    """Hold the lock file `path` for the block; ValueError names the process that holds it already.

    What a killed run left half-written is removed: files and folders that the patterns `parts` find beside the lock.
    The kernel frees the lock however the process ends. On a file system without locks nothing is held, or removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if lock is None:
        _say_unlocked()
        yield
        return
    try:
        with naming(path):
            os.truncate(lock.fileno(), 0)
            os.write(
                lock.fileno(),
                f'process {os.getpid()} on {socket.gethostname()} ({os.path.basename(sys.argv[0])})'.encode(),
            )
        for pattern in parts:
            for part in list(path.parent.glob(pattern)):
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        lock.close()


def _lock(path):
    """The open file `path`, locked; None where its file system has no locks; ValueError names who has locked it."""
    while True:
        lock = open(path, 'a+')  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or 'another process'
            lock.close()
            raise ValueError(f'{path.parent}: in use by {holder}; wait until it is done, or end it') from None
        except OSError as error:
            lock.close()
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            path.unlink(missing_ok=True)
            return None
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
        lock.close()  # its last holder has removed it since


@functools.cache
def _say_unlocked():
    print('this file system has no locks: that no two runs write into one folder is up to you', flush=True)


def load_array(path):
    """The array of a .npy file; ValueError names a file that is no whole array of numbers."""
    try:
        with open_file(path) as file:
            check_npy(file)
            return np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (ValueError, EOFError, RecursionError) as error:
        raise ValueError(f'{path}: not a readable .npy array ({error}); make it again') from None


def write_array(file, array):
    """Write a .npy into an open file through its own `write`: numpy's short cut does not tell a full disk's error."""
    np.save(SimpleNamespace(write=file.write), array)


def save_volume(path, volume):
    """Write a prediction as a compressed .npz with the one array `volume`."""
    with whole_file(path) as file:
        np.savez_compressed(file, volume=volume)


def read_volume(path, shape=None):
    """The array `volume` of a prediction's .npz, of `shape` where that is known; ValueError names what is no whole one."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            entry = archive.getinfo('volume.npy')
            check_entry(archive, entry, shape)
            with archive.open(entry) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such volume') from None
    except Exception as error:  # zlib, zip and numpy each have their own errors for a broken file
        why = str(error) or type(error).__name__
        raise ValueError(f'{path}: not a whole .npz of a prediction ({why})') from None


def load_volume(path, shape):
    """The array `volume` (of `shape`) of a prediction's .npz; None where there is none, or (said in a line) a broken one."""
    try:
        return read_volume(path, shape)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f'{error}; made again where it can be')
        return None


# --- lists ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A line of lists/training_FD0.txt or testing_FD0.txt: its number among all cases, from 0, and its files."""

    number: int
    image_file: str
    label_file: str

    def image(self, data_path):
        """The scan (W, H, L)."""
        return self._three_axes(load_array(os.path.join(data_path, self.image_file)), self.image_file)

    def label(self, data_path, organ_ID):
        """Where the organ is, bool (W, H, L)."""
        label = load_array(os.path.join(data_path, self.label_file))
        return self._three_axes(np.asarray(is_organ(label, organ_ID)), self.label_file)

    @staticmethod
    def _three_axes(volume, file):
        if volume.ndim != 3:
            raise ValueError(f'{file}: {volume.ndim} axes instead of 3 (W, H, L)')
        return volume


def name_fault(name):
    """What keeps a case's name out of the lists and lines that it would stand in; '' where nothing does."""
    if re.search(r'\s', name):
        return 'white space'
    if not name.isprintable():
        return 'characters that cannot be printed'
    return '' if name else 'nothing'


def slice_list(data_path, plane):
    """lists/training_X|Y|Z.txt: all slices of all cases along a plane."""
    return Path(data_path, 'lists', f'training_{plane}.txt')


def fold_list(data_path, kind, fold):
    """lists/training_FD0.txt or testing_FD0.txt, for `kind` training or testing."""
    return Path(data_path, 'lists', f'{kind}_FD{fold}.txt')


def read_list(path):
    """The lines of a list that init.py wrote; one that ends within a line was cut off."""
    try:
        return read_lines(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such list; run init.py first, with enough folds') from None
    except ValueError as error:
        raise ValueError(f'{path}: not a list ({error}); run init.py again') from None


def read_cases(data_path, kind, fold):
    """The cases that train or test a fold, in order; ValueError where its two lists do not hold every case once.

    A list that stands alone, as somebody may write it to test scans of his own, is taken as it is.
    """
    path = fold_list(data_path, kind, fold)
    other = fold_list(data_path, 'testing' if kind == 'training' else 'training', fold)
    cases = _read_cases(path)
    numbers = [case.number for case in (cases + _read_cases(other) if other.exists() else [])]
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError(
            f'{path}: with {other.name} it does not hold every case from 0 once, as if one of them were cut off; '
            'run init.py again'
        )
    return cases


def _read_cases(path):
    cases = []
    for line in read_list(path):
        fields = line.split()
        if len(fields) != 3 or not re.fullmatch('[0-9]{1,9}', fields[0]):
            raise ValueError(f'{path}: {shown(line)} is not `case image_file label_file`; run init.py again')
        cases.append(Case(int(fields[0]), *fields[1:]))
    return cases


# --- snapshots and results -----------------------------------------------------------------------------------------


def _stamp(timestamp):
    """A timestamp of 15 characters is part of a name; any other is left out."""
    return f'_{timestamp}' if len(timestamp) == 15 else ''


def snapshot_folder(args):
    """models/snapshots/SIJ_training_1e-5x10,20 of the data folder."""
    return Path(args.data_path, 'models', 'snapshots', f'SIJ_training_{training_settings(args)}')


def training_settings(args):
    """`1e-5x10,20`: rate, multiplier and margin as they stand in folder names."""
    return f'{args.learning_rate1}x{args.learning_rate_m1},{args.crop_margin}'


def snapshot_name(args, plane, mode, timestamp):
    """`FD0:XJ3_1_20261123_000000.pkl`."""
    return f'FD{args.current_fold}:{plane}{mode}{args.slice_thickness}_{args.organ_ID}{_stamp(timestamp)}.pkl'


def find_snapshot(args, plane, timestamp, mode='J'):
    """Name of the snapshot to test: of the timestamp; else the untimestamped one; else the newest timestamped one."""
    name = snapshot_name(args, plane, mode, timestamp)
    folder = snapshot_folder(args)
    if _stamp(timestamp) or (folder / name).exists():
        return name
    timed = re.compile(re.escape(name[: -len('.pkl')]) + r'_.{15}\.pkl')
    found = sorted(file.name for file in folder.glob('*.pkl') if timed.fullmatch(file.name))
    if not found:
        return name
    print(f'{plane}: no snapshot without a timestamp; the newest is taken: {found[-1]}')
    return found[-1]


def pretrained_folder(args):
    """models/pretrained of the data folder."""
    return Path(args.data_path, 'models', 'pretrained')


def pretrained_name(args):
    """`fcn8s_FD0_1.pth`: the FCN-8s that pretrain.py trains for a fold and an organ."""
    return f'fcn8s_FD{args.current_fold}_{args.organ_ID}.pth'


def find_pretrained(args):
    """The FCN-8s to start training from: --pretrained, else the first there is in models/pretrained/."""
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


def epoch_name(args):
    """`e2682`: the epochs of S, I, J and the decay step."""
    return f'e{args.epoch_S}{args.epoch_I}{args.epoch_J}{args.epoch_step}'


def results_folder(args, stage, name):
    """results/{stage}_testing_1e-5x10,20/{name} of the data folder."""
    return Path(args.data_path, 'results', f'{stage}_testing_{training_settings(args)}', name)
