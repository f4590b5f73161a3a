"""Where an array lies in the patient: its affine, and how a label's axes are turned onto its image's.

An affine (4, 4) takes an index of the array *as stored* to RAS+ mm. Arrays are stored as published: an image is (rows,
columns, slices) of its DICOM slices, and a NIfTI array becomes that by transpose(1, 0, 2).
"""

import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from running.files import atomic_write, read_json

PUBLISHED = (1, 0, 2)


TOLERANCE = 0.1  # voxels that the corners of two grids may lie apart and still be one grid


class Geometry(NamedTuple):
    """`affine` (4, 4) of an array, what it `holds`, the `source` file or folder and its `type`, DICOM or NIfTI.

    An affine holds its array's 'position' in the patient; or the 'spacing' alone, being no more than a scaled
    permutation at the origin, which programs write that know no better; or 'nothing', where the header says so.
    """

    affine: np.ndarray
    holds: str
    source: str
    type: str

    @property
    def spacing(self):
        """mm from voxel to voxel along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def transposed(self, axes=PUBLISHED):
        """The geometry of the array's transpose."""
        return self._replace(affine=self.affine[:, [*axes, 3]])


def lays_out(affine):
    """Whether an affine (4, 4) lays an array out in space: every voxel somewhere, and no two at one place."""
    with np.errstate(all='ignore'):
        volume = abs(np.linalg.det(affine[:3, :3]))
    return bool(np.isfinite(affine).all() and np.isfinite(volume) and volume > 1e-9)


def geometry_file(data_path, case):
    """geometry/CASE.json of the data folder."""
    return Path(data_path, 'geometry', f'{case}.json')


def save_geometry(path, geometry):
    """Write a geometry with its spacing; the file appears only when it is complete."""
    content = {
        'affine': geometry.affine.tolist(),
        'spacing': geometry.spacing.tolist(),
        'holds': geometry.holds,
        'source': os.path.abspath(geometry.source),
        'type': geometry.type,
    }
    with atomic_write(path, 'w') as file:
        json.dump(content, file)


def load_geometry(path):
    """The geometry in a file; None where there is no such file."""
    try:
        content = read_json(path)
        affine, holds = np.array(content['affine'], float).reshape(4, 4), content['holds']
        if holds not in ('position', 'spacing', 'nothing'):
            raise ValueError(f'holds {holds!r}')
        if holds != 'nothing' and not lays_out(affine):
            raise ValueError(f'affine {affine.tolist()} lays out no volume')
        return Geometry(affine, holds, str(content['source']), str(content['type']))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f'{path}: not a geometry ({error!r}); convert its image again') from None


def place_label(label, theirs, shape, ours, orientation='auto'):
    """Turn a label, axes as in its NIfTI file, onto its image's axes: (label of `shape`, how that was known).

    theirs: the label's Geometry; ours: that of the image as stored, or None. By the two affines where they lay one grid
    on the other; else by the published transpose(1, 0, 2), unless the affines speak against that.
    orientation: 'auto', or 'affine' or 'published' to insist on one of the two. ValueError: the label does not fit.
    """
    if sorted(label.shape) != sorted(shape):
        raise ValueError(f'{theirs.source}: shape {label.shape} does not fit its image, stored as {tuple(shape)}')
    known = ours is not None and 'nothing' not in (ours.holds, theirs.holds)
    turn = _turn(theirs.affine, label.shape, ours.affine, shape) if known and orientation != 'published' else None
    if turn:
        axes, flips = turn
        return label.transpose(axes)[flips], 'by the affines'
    if orientation == 'affine':
        raise ValueError(f'{theirs.source}: {_contradiction(theirs, ours) if known else "no two affines to go by"}')
    if orientation == 'auto' and known and _contradicts(theirs, ours):
        raise ValueError(
            f'{theirs.source}: {_contradiction(theirs, ours)}; where the affine is wrong but the arrays pair as in NIH '
            'Pancreas-CT, give --orientation published'
        )
    if tuple(label.shape[a] for a in PUBLISHED) != tuple(shape):
        raise ValueError(f'{theirs.source}: shape {label.shape} transposed does not fit its image, {tuple(shape)}')
    return label.transpose(PUBLISHED), 'by transpose(1, 0, 2)'


def _turn(theirs, their_shape, ours, our_shape):
    """(axes, flips) that lay their array onto ours, voxel on voxel, by the affines; None where no such turn does."""
    between = np.linalg.solve(ours, theirs)  # their index -> our index
    axes = np.abs(between[:3, :3]).argmax(axis=1)
    if sorted(axes) != [0, 1, 2] or tuple(their_shape[a] for a in axes) != tuple(our_shape):
        return None
    signs = np.sign(between[range(3), axes]).astype(int)
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in their_shape))])
    turned = np.where(signs > 0, corners[:, axes], np.array(our_shape) - 1 - corners[:, axes])
    if np.abs(corners @ between[:3].T - turned).max() > TOLERANCE:
        return None
    return tuple(int(a) for a in axes), tuple(slice(None, None, int(sign)) for sign in signs)


def _contradicts(theirs, ours):
    """Whether the affines speak against the published transpose, their grids not coinciding."""
    if theirs.holds == ours.holds == 'position':
        return True
    ones = any(np.allclose(g.spacing, 1) for g in (theirs, ours))  # what is written for an unknown spacing
    return not ones and not np.allclose(theirs.transposed().spacing, ours.spacing, rtol=0.01)


def _contradiction(theirs, ours):
    """What to tell about two grids that do not coincide."""
    theirs = theirs.transposed()

    def text(geometry):
        return ' at '.join(
            '(' + ', '.join(f'{v:.4g}' for v in values) + ')' for values in (geometry.spacing, geometry.affine[:3, 3])
        )

    return f"its grid (spacing {text(theirs)} mm) is not its image's ({text(ours)} mm)"


DEFLATE_AT_BEST = 1100  # no gzip file grows by more when it is unpacked, and no compressed slice of a scan does


class Scan(NamedTuple):
    """An image as stored, (rows, columns, slices) int16 HU, and its Geometry (None if unknown)."""

    image: np.ndarray
    geometry: Geometry | None


def stack_slices(planes, size, source, say):
    """(rows, columns, slices) int16 from `size` (slices, rows, columns) and its planes; `say` what that changed."""
    stack, notes = np.empty(size, np.int16), {}
    limits = np.iinfo(np.int16)
    for k, plane in enumerate(planes):
        if not np.isfinite(plane).all():
            raise ValueError(f'{source}: slice {k} holds values that are not finite (NaN or infinite)')
        whole = np.rint(plane)
        stack[k] = np.clip(whole, limits.min, limits.max)
        if np.abs(whole - plane).max() > 1e-3:
            notes['values rounded to whole HU'] = True
        if (stack[k] != whole).any():
            notes[f'values beyond {limits.min} to {limits.max} HU cut off there'] = True
    for note in notes:
        say(note)
    return np.ascontiguousarray(stack.transpose(1, 2, 0))
