"""Planes, windows of slices and their average: a volume (W, H, L) seen along X, Y or Z."""

import numpy as np

from running.data_folder import PLANES


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
