"""The voxels of a scan: an image in HU as int16, a label as uint8, read slice by slice."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scans.geometry import Geometry, Scan

DEFLATE_AT_BEST = 1100  # times its size that a gzip file or a compressed slice can unpack to
AIR = -200  # HU; every CT scan falls below it somewhere
OUTSIDE = -1024  # HU for NaN, which some scanners' files hold outside the field of view
ROUNDING = 1e-3  # by which a stored value may miss the whole number that it means
SLICES_AT_ONCE = 32  # slices that are turned at a time: one by one costs a cache miss a voxel


class Volume(NamedTuple):
    """A file's array, axes as in the file: `shape` (x, y, z), planes (x, y) to read, Geometry."""

    shape: tuple
    planes: Iterator
    geometry: Geometry

    def image(self, say):
        """Read a Scan, stored as published, transpose(1, 0, 2); `say` prints what was changed."""
        planes = (plane.T for plane in self.planes)
        image = stack_slices(planes, self.shape[::-1], self.geometry.source, say)
        return Scan(image, self.geometry.transposed())

    def label(self):
        """Read a label, uint8, axes as in the file; ValueError: a value is not 0, 1 ... 255."""
        label = np.empty(self.shape, np.uint8, order='F')
        for k, plane in enumerate(self.planes):
            whole = np.rint(plane)
            wrong = plane[~((np.abs(plane - whole) <= ROUNDING) & (whole >= 0) & (whole <= 255))]
            if wrong.size:
                raise ValueError(
                    f'{self.geometry.source}: {wrong[0]} is not an organ; a label holds whole numbers from 0 to 255'
                )
            label[:, :, k] = whole
        return label


def stack_slices(planes, size, source, say):
    """Return an image (rows, columns, slices) int16 from its planes (rows, columns).

    size: (slices, rows, columns). Values are rounded and clipped to int16, NaN becomes OUTSIDE;
    `say` prints a line for each such change. ValueError: an infinite value, or nothing but NaN.
    """
    image, notes, blank = np.empty((*size[1:], size[0]), np.int16), {}, 0
    block = np.empty((SLICES_AT_ONCE, *size[1:]), np.int16)
    limits = np.iinfo(np.int16)
    for k, plane in enumerate(planes):
        if np.isinf(plane).any():
            raise ValueError(f'{source}: slice {k} holds infinite values')
        blank += np.count_nonzero(np.isnan(plane))
        values = np.where(np.isnan(plane), OUTSIDE, plane) if plane.dtype.kind == 'f' else plane
        whole = np.rint(values)
        place = k % SLICES_AT_ONCE
        block[place] = np.clip(whole, limits.min, limits.max)
        if np.abs(whole - values).max() > ROUNDING:
            notes['values rounded to whole HU'] = True
        if (block[place] != whole).any():
            notes[f'values beyond {limits.min} to {limits.max} HU cut off there'] = True
        if place == SLICES_AT_ONCE - 1 or k == size[0] - 1:
            image[:, :, k - place : k + 1] = block[: place + 1].transpose(1, 2, 0)
    if blank == image.size:
        raise ValueError(f'{source}: all its values are NaN')
    if blank:
        say(
            f'{blank} voxels ({blank / image.size:.1%}) lie outside the field of view (NaN or padding): set to {OUTSIDE} HU'
        )
    for note in notes:
        say(note)
    return image


def intensity_doubts(image, low_range, high_range):
    """Return sentences on why `image` may be no CT scan in HU, or not suit the intensity window."""
    low, high = image.min(), image.max()
    doubts = []
    if low >= 0 and high <= 255:
        doubts.append(f'values from {low} to {high}: a picture of 8 bit, not HU')
    elif low > AIR:
        doubts.append(
            f'no value below {AIR} HU, not even air: another modality, clipped, or without its intercept (-1024)'
        )
    clipped = share_outside(image, low_range, high_range)
    if clipped > 0.97:
        doubts.append(f'{clipped:.1%} of its voxels lie outside the intensity window, {low_range:g} to {high_range:g}')
    return doubts


def share_outside(image, low_range, high_range):
    """Return the share of voxels outside the intensity window."""
    return 1 - np.count_nonzero((image >= low_range) & (image <= high_range)) / image.size
