"""Round 0 of a new scan: the coarse mean; a rough mask or a box; and where to look again if nothing was found."""

import numpy as np
from scipy import ndimage

from scans.geometry import place_label
from scans.nifti import open_nifti
from volumes.rounds import coarse_probability

LOWER = (0.25, 0.1, 0.05)  # thresholds of round 0, if nothing was found from the usual one


def starts(coarse_volumes, threshold, place, weights=None):
    """Yield (mask, probability, remark) of round 0: the coarse mean's, then those to try if the rounds find nothing.

    place: the box of the organ in training cases, see running.weights.FACTS, or None. weights: of the planes.
    """
    score = coarse_probability(coarse_volumes, weights)
    yield (score >= threshold).astype(np.uint8), score, ''
    for lower in LOWER:
        mask = largest_component(score >= lower)
        if lower < threshold and mask.any():
            yield mask, score, f'round 0 from the probability {lower:g} on'
    if place:
        mask = box_mask(place_voxels(place, score.shape), score.shape)
        yield mask, np.maximum(score, mask), 'round 0 where the training cases have the organ'


def largest_component(mask):
    """Return the largest 6-connected component of a mask, uint8; an empty one is returned as it is."""
    components, count = ndimage.label(mask)
    return (components == np.bincount(components.ravel())[1:].argmax() + 1).astype(np.uint8) if count else mask


def given(mask):
    """Return (mask uint8, probability float32) of a rough mask as round 0."""
    return mask.astype(np.uint8), mask.astype(np.float32)


# --- boxes ---------------------------------------------------------------------------------------------------------


def box_mask(box, shape):
    """Return the mask, uint8, of a box (a0, a1, b0, b1, c0, c1): from a0 up to, not including, a1, and so on."""
    mask = np.zeros(shape, np.uint8)
    mask[tuple(map(slice, box[::2], box[1::2]))] = 1
    return mask


def place_voxels(place, shape):
    """Return the box in voxels of a place in shares of the volume, at least a voxel wide."""
    ends = np.clip(np.rint(np.multiply(place, np.repeat(shape, 2))), 0, np.repeat(shape, 2)).astype(int)
    ends[::2] = np.minimum(ends[::2], np.array(shape) - 1)
    ends[1::2] = np.maximum(ends[1::2], ends[::2] + 1)
    return ends.tolist()


# --- what a person or another tool gives ---------------------------------------------------------------------------


def read_start(path, scan):
    """Return the mask in a NIfTI file as `scan` (a Scan) is stored; ValueError where it does not fit, or is empty."""
    volume = open_nifti(path)
    label, _ = place_label(volume.label(), volume.geometry, scan.image.shape, scan.geometry)
    if not label.any():
        raise ValueError(f'{path}: an empty mask is no start')
    if len(values := np.unique(label[label > 0])) > 1:
        raise ValueError(f'{path}: holds organs {", ".join(f"{value:g}" for value in values)}; give the mask of one')
    return (label > 0).astype(np.uint8)


def read_box(box, scan):
    """Return the mask of a box as `scan` is stored; box: x0 x1 y0 y1 z0 z1, voxels of INPUT, the ends included."""
    x0, x1, y0, y1, z0, z1 = box
    stored = (y0, y1 + 1, x0, x1 + 1, z0, z1 + 1)  # the published transpose(1, 0, 2)
    for low, high, size, name in zip(stored[::2], stored[1::2], scan.image.shape, 'yxz'):
        if not 0 <= low < high <= size:
            raise ValueError(f'--box: {name} from {low} to {high - 1} is not within 0 to {size - 1}')
    return box_mask(stored, scan.image.shape)
