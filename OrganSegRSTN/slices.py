"""Planes, windows of slices and their average: a volume (W, H, L) seen along X, Y or Z."""

import math
from typing import NamedTuple

import numpy as np

from claims import shown
from utils import PLANES


def plane_view(volume, plane):
    """The volume (W, H, L) with the plane's axis in front, as a view: plane_view(v, 'Y')[j] is slice j along Y."""
    return np.moveaxis(volume, PLANES.index(plane), 0)


def slice_window(j, slices, thickness):
    """The three slices the network sees at j: j and its neighbours, itself standing in beyond an end (thickness 3)."""
    reach = thickness // 2
    return [max(j - reach, 0), j, min(j + reach, slices - 1)]


class SliceAverage:
    """Adds up the outputs of the windows of a volume along a plane and averages them where they overlap.

    A slice's sum is divided by the number of windows that cover it, whether or not a window was added (section 3.3).
    """

    def __init__(self, shape, plane, thickness):
        self.total = np.zeros(shape, np.float32)  # (W, H, L)
        self.view = plane_view(self.total, plane)  # the same memory, (slices, A, B)
        self.reach = thickness // 2

    def covered(self, j):
        """The slices inside the volume that the window at j covers."""
        return range(max(j - self.reach, 0), min(j + self.reach + 1, len(self.view)))

    def add(self, j, output):
        """Add the output (thickness, A, B) of the window at j; what belongs to a stand-in at an end is dropped."""
        for k in self.covered(j):
            self.view[k] += output[k - j + self.reach]

    def volume(self):
        """The average (W, H, L)."""
        for j in range(len(self.view)):
            self.view[j] /= len(self.covered(j))  # a window covers k as often as k's window covers it
        return self.total


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
        """The record of a list line; ValueError where it is not one."""
        fields = line.split()
        try:
            average, numbers = float(fields[4]), [int(field) for field in fields[:2] + fields[5:]]
            if len(fields) < 10 or len(fields) % 5 or min(numbers) < 0 or not math.isfinite(average):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f'{shown(line)} is not a slice of a list; run init.py again') from None
        case, index, *counts = numbers
        organs = tuple(tuple(counts[i : i + 5]) for i in range(0, len(counts), 5))
        return cls(case, index, fields[2], fields[3], average, organs)


def slice_averages(image, window):
    """{plane: mean intensity of each slice} of `image` (W, H, L), clipped to `window`."""
    clipped = np.clip(image, *window)
    exact = np.int64 if clipped.dtype.kind in 'iu' else np.float64
    rows = clipped.sum(axis=2, dtype=exact)  # (W, H)
    sums = {'X': rows.sum(axis=1), 'Y': rows.sum(axis=0), 'Z': clipped.sum(axis=(0, 1), dtype=exact)}
    return {plane: values / (image.size // len(values)) for plane, values in sums.items()}


def organ_extents(mask):
    """{plane: (slices, 5) array} of `mask` (W, H, L): pixels, minA, maxA, minB, maxB of each slice; 0 where empty."""
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
    """First and last True of each row of `hits` (slices, n); 0 where there is none."""
    last = hits.shape[1] - 1 - hits[:, ::-1].argmax(axis=1)
    return hits.argmax(axis=1), np.where(hits.any(axis=1), last, 0)
