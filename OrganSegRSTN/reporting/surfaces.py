"""The 3D view of a case: label and prediction, packed for the page, whose script makes surfaces of them."""

import base64
import json
import math

import numpy as np

from reporting.measures import joint_box
from reporting.pictures import AS_PUBLISHED, anatomy
from running.files import atomic_write

MOST_VOXELS = 2_000_000  # of the box around the masks: 670 kB a case; a larger box is thinned


def write_surfaces(path, case_id, masks, geometry):
    """Write a script that gives the page label and prediction: showSurfaces(ID, {size, axes, masks, ...}).

    masks: bool (W, H, L), those of label and prediction that exist; geometry: their Geometry, or None,
    oriented as the published arrays. A box of more than MOST_VOXELS is thinned by whole blocks.
    """
    masks = {name: mask for name, mask in masks.items() if name != 'coarse'}
    box = joint_box(masks.values(), next(iter(masks.values())).shape, 0, 1)
    masks = {name: mask[box] for name, mask in masks.items()}
    size = next(iter(masks.values())).shape
    step = math.ceil((np.prod(size) / MOST_VOXELS) ** (1 / 3))
    masks = {name: thinned(mask, step) for name, mask in masks.items()}
    content = {
        'size': next(iter(masks.values())).shape,
        'axes': (patient_axes(geometry) * step).tolist(),
        'known': anatomy(geometry) is not None,
        'masks': {name: base64.b64encode(np.packbits(mask)).decode() for name, mask in masks.items()},
    }
    with atomic_write(path, 'w') as file:
        file.write(f'showSurfaces({json.dumps(case_id)}, {json.dumps(content)});\n')


def thinned(mask, step):
    """Return a mask with one voxel for each block of step x step x step: set where half of it is."""
    mask = np.pad(mask, [(0, -size % step) for size in mask.shape])
    blocks = mask.reshape([part for size in mask.shape for part in (size // step, step)])
    return blocks.mean(axis=(1, 3, 5)) >= 0.5


def patient_axes(geometry):
    """Return (3, 3): the steps along an array's axes, as columns, in RAS mm (or voxels)."""
    if anatomy(geometry):
        return geometry.affine[:3, :3]
    axes = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(AS_PUBLISHED):
        axes[world, axis] = sign if geometry is None else sign * geometry.spacing[axis]
    return axes
