"""Straighten a stack of slices that is tilted or unevenly spaced, by linear interpolation."""

import numpy as np
from scipy import ndimage

from running.files import MOST_VOXELS


def usual_gap(gaps):
    """Return the median of the gaps' lengths, one that occurs."""
    return np.sort(np.abs(gaps))[(len(gaps) - 1) // 2]


def upright(planes, positions, affine, size):
    """Return (planes, affine, size) on an even grid whose slices are stacked along their normal.

    planes: (rows, columns) in turn, ordered along their normal; positions: (slices, 3), their first
    pixels in mm; affine (4, 4): from (row, column, slice) to mm; size: (slices, rows, columns).
    A plane grows by as much as the slices are shifted, so that nothing is cut off. Voxels outside
    the slices are NaN. ValueError: the grid would be too large.
    """
    pixel = affine[:3, :2]  # mm, one step down and one across
    away = positions - positions[0]
    shifts = away @ pixel / (pixel**2).sum(axis=0)  # pixels
    normal = np.cross(*pixel.T) / np.prod(np.linalg.norm(pixel, axis=0))
    normal *= np.sign(away[-1] @ normal)
    heights = away @ normal
    low, high = np.floor(shifts.min(axis=0)), np.ceil(shifts.max(axis=0))
    grid = np.array([np.rint(heights[-1] / usual_gap(np.diff(heights))) + 1, *(size[1:] + high - low)])
    if not np.prod(grid) <= MOST_VOXELS:
        raise ValueError(f'its slices lie too far apart for one grid, {grid.tolist()} voxels')
    count, *canvas = (int(n) for n in grid)
    straight = affine.copy()
    straight[:3, 2] = normal * heights[-1] / (count - 1)
    straight[:3, 3] = positions[0] + pixel @ low
    moved = (ndimage.affine_transform(plane, np.eye(2), low - shift, tuple(canvas), order=1, cval=np.nan)
             for plane, shift in zip(planes, shifts))  # fmt: skip
    return _between(moved, heights, np.linspace(0, heights[-1], count)), straight, (count, *canvas)


def _between(planes, heights, wanted):
    """Yield planes at the heights `wanted`, interpolated between those at `heights`; both rise."""
    planes, k = iter(planes), 0
    below, above = next(planes), next(planes)
    for height in wanted:
        while height > heights[k + 1]:
            below, above, k = above, next(planes), k + 1
        weight = round((height - heights[k]) / (heights[k + 1] - heights[k]), 3)
        yield below if weight == 0 else above if weight == 1 else (1 - weight) * below + weight * above
