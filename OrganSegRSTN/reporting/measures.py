"""How well a predicted mask lies on its label, beyond Dice, and the spread of a measure over cases."""

import math
import statistics
from typing import NamedTuple

import numpy as np
import surface_distance
from scipy import ndimage

TOLERANCE = 1.0  # of the normalized surface Dice, in the unit of the spacing
RESAMPLES = 10_000  # of the bootstrap


class Surfaces(NamedTuple):
    """Distances between two surfaces, in mm or voxels as the spacing, and a share of surface."""

    hd95: float  # 95th percentile of the distances, the larger of the two directions
    asd: float  # mean distance, the mean of the two directions
    nsd: float  # share, in [0, 1], of the two surfaces that lies within TOLERANCE of the other


def compare_surfaces(label, pred, spacing):
    """Return the Surfaces of two masks (W, H, L) of one shape, bool; spacing: from voxel to voxel along each axis.

    If one is empty, the distances are infinite and the NSD is 0; if both are, all three are nan.
    """
    if label.shape != pred.shape:
        raise ValueError(f'label of shape {label.shape} and prediction of shape {pred.shape} cannot be compared')
    if not (np.isfinite(spacing).all() and np.min(spacing) > 0):
        raise ValueError(f'spacing {list(spacing)} is not three positive numbers')
    if not (label.any() and pred.any()):
        one_empty = label.any() or pred.any()
        return Surfaces(math.inf, math.inf, 0.0) if one_empty else Surfaces(math.nan, math.nan, math.nan)
    found = surface_distance.compute_surface_distances(label, pred, spacing)
    return Surfaces(
        float(surface_distance.compute_robust_hausdorff(found, 95)),
        float(np.mean(surface_distance.compute_average_surface_distance(found))),
        float(surface_distance.compute_surface_dice_at_tolerance(found, TOLERANCE)),
    )


class Spread(NamedTuple):
    """A measure over `cases` cases: figures of the `counted` ones, and why others are not counted."""

    cases: int
    counted: int
    mean: float
    std: float  # population standard deviation, as in results.txt
    min: float
    max: float
    low: float  # 95 % bootstrap interval of the mean; nan for fewer than two cases
    high: float
    infinite: int  # nothing was predicted, or predicted where there is no organ
    undefined: int  # nan: neither label nor prediction
    unmeasured: int  # None: a volume was missing or broken


def spread(values):
    """Return the Spread of values, of which some may be inf, nan or None."""
    numbers = [value for value in values if value is not None]
    finite = [value for value in numbers if math.isfinite(value)]
    figures = [math.nan] * 4
    if finite:
        figures = statistics.fmean(finite), statistics.pstdev(finite), min(finite), max(finite)
    figures = [*figures, *interval(finite)]
    infinite, undefined = sum(map(math.isinf, numbers)), sum(map(math.isnan, numbers))
    return Spread(len(values), len(finite), *figures, infinite, undefined, len(values) - len(numbers))


def interval(values):
    """Return (low, high): 95 % percentile bootstrap interval of the mean; the same in every call."""
    if len(values) < 2:
        return math.nan, math.nan
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def joint_box(masks, shape, margin, least):
    """Return the slices of the box around all masks (W, H, L), with a margin (voxels).

    It has at least `least` voxels along each axis. If the masks are empty, it lies around the middle.
    """
    marked = np.logical_or.reduce([*masks, np.zeros(shape, bool)])
    box = next(iter(ndimage.find_objects(marked.astype(np.uint8))), [slice(n // 2, n // 2 + 1) for n in shape])
    sides = []
    for side, size in zip(box, shape):
        first, last = side.start - margin, side.stop - 1 + margin
        extra = max(0, least - (last + 1 - first))
        first, last = first - extra // 2, last + extra - extra // 2
        sides.append(slice(max(first, 0), min(last + 1, size)))
    return tuple(sides)
