"""A volume (W, H, L) along the planes X, Y or Z: slices, slice windows and their average (section 3.3)."""

import numpy as np
import torch

from running.data_folder import PLANES
from running.processes import to_host


def slice_window(j, slices, thickness):
    """Return the three slices that the network sees at j: j and its neighbours, or j itself beyond an end."""
    reach = thickness // 2
    return [max(j - reach, 0), j, min(j + reach, slices - 1)]


def region(mask, reach):
    """Return the place (three slices) of the box around the voxels of a mask (W, H, L), `reach` voxels larger on each side.

    The mask must not be empty.
    """
    place = []
    for axis, n in enumerate(mask.shape):
        inside = np.moveaxis(mask[tuple(place)], axis, 0)  # one full pass, then smaller ones
        hits = np.flatnonzero(inside.any(axis=(1, 2)))
        place.append(slice(max(hits[0] - reach, 0), min(hits[-1] + 1 + reach, n)))
    return tuple(place)


def mean_of(volumes):
    """Return the mean of an iterable of volumes (float32), the first of which it changes."""
    total = None
    for count, volume in enumerate(volumes, 1):
        total = volume if total is None else np.add(total, volume, out=total)
    return total if count == 1 else np.divide(total, np.float32(count), out=total)


def plane_weights(recipe, spacing):
    """Return the weights of the planes X, Y, Z in a mean of them, float32 that add up to 1; None: all the same.

    With the fast recipe each plane is weighted by its slice spacing (`spacing`: mm, or None where it is unknown): the plane
    with the smallest pixels counts most.
    """
    if recipe != 'fast' or spacing is None or np.allclose(spacing, spacing[0], rtol=1e-3):
        return None
    return np.divide(spacing, np.sum(spacing)).astype(np.float32)


class SliceAverage:
    """The average of the outputs of overlapping slice windows along a plane (section 3.3), added up on a device.

    A slice's sum is divided by the number of windows that cover it, whether or not a window was added.
    """

    def __init__(self, shape, plane, thickness, device='cpu'):
        self.axis, self.reach = PLANES.index(plane), thickness // 2
        sides = [n for axis, n in enumerate(shape) if axis != self.axis]
        self.view = torch.zeros(shape[self.axis], *sides, device=device)  # (slices, A, B)

    def covered(self, j):
        """Return the slices inside the volume that the window at j covers."""
        return range(max(j - self.reach, 0), min(j + self.reach + 1, len(self.view)))

    def add(self, j, output):
        """Add the output (thickness, A, B) of the window at j; drop the part that lies beyond an end."""
        for k in self.covered(j):
            self.view[k] += output[k - j + self.reach]

    def volume(self):
        """Return the average (W, H, L), a numpy array."""
        for j in range(len(self.view)):
            self.view[j] /= len(self.covered(j))  # a window covers k as often as k's window covers it
        return to_host(self.view.movedim(0, self.axis).contiguous())
