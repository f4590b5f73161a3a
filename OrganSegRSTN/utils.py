"""What users of the published pipeline import: organ rule, folds, intensities, Dice and post-processing."""

import functools
import inspect
from pathlib import Path
from typing import NamedTuple

import numpy as np

_reason = None
try:
    import fast_functions
except Exception as error:  # a module of another Python or platform fails in other ways than ImportError
    fast_functions, _reason = None, error


def is_organ(label, organ_ID):
    """Return where `label` (any shape) shows the organ, as bool. Redefine it here, once, for overlapping organs."""
    return label == organ_ID


def organ_rule():
    """Return the source of is_organ, by which a changed one is noticed; not that of functions it calls."""
    return inspect.getsource(is_organ)


def in_training_set(total_samples, i, folds, current_fold):
    """Return whether case `i` (from 0) trains fold `current_fold`; the last total % folds folds test one more case."""
    size, extra = divmod(total_samples, folds)

    def start(fold):
        return fold * size + max(0, fold - (folds - extra))

    return not start(current_fold) <= i < start(current_fold + 1)


def for_device(volume):
    """Return an array as it travels to a device: int16, uint8 and bool as they are, other numbers as float32."""
    return volume if volume.dtype in (np.bool_, np.uint8, np.int16) else volume.astype(np.float32)


def to_unit(image, low_range, high_range):
    """Return intensities clipped to [low_range, high_range] and scaled to [0, 1], float32, same shape.

    image: an array, or a tensor on any device.
    """
    if isinstance(image, np.ndarray):
        unit = image.clip(low_range, high_range).astype(np.float32)
    else:
        unit = image.float().clip(low_range, high_range)  # a tensor of bytes would take bounds as bytes
    unit -= np.float32(low_range)
    unit /= np.float32(high_range - low_range)
    return unit


class Dice(NamedTuple):
    """Dice-Sorensen coefficient with its counts (voxels); prints as `2 * inter / (pred + label) = value`."""

    value: float
    inter: int
    pred: int
    label: int

    def __str__(self):
        return f'2 * {self.inter} / ({self.pred} + {self.label}) = {self.value}'


def DSC_computation(label, pred):
    """Return Dice of two masks of one shape (nonzero is organ): (DSC, intersection, pred sum, label sum).

    DSC is undefined, nan, where both are empty.
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

    F: mask (W, H, L), changed in place if it is a writable, C-contiguous uint8 array, else copied; returned.
    It is unchanged where it is empty or at least half full. S: seed volume of F's shape, without effect, as in the published
    C++. organ_ID: not used, kept for users' scripts.
    """
    F, S = np.require(F, np.uint8, ['C', 'W']), np.asarray(S)
    if fast_functions:
        seed = S if S.dtype in (bool, np.uint8) else S != 0  # a copy would take longer than the rest
        fast_functions.post_processing(F, seed, threshold, False)
    else:
        _say_slower()
        _post_processing_scipy(F, S, threshold)
    return F


def _post_processing_scipy(F, S, threshold, top2=False):
    """Do what fast_functions.post_processing does, with scipy: same results, slower."""
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


@functools.cache
def _say_slower():
    cure = 'pip install ./SWIG_fast_functions'
    if (stray := Path(__file__).with_name('fast_functions.py')).exists():
        cure = f'remove {stray} and _fast_functions.so beside it, which a build by hand left there, or build anew'
    print(f'fast_functions cannot be imported ({_reason}): scipy does its work, slower ({cure})')
