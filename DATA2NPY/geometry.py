"""Where an array lies in the patient: its affine, and how a label's axes are turned onto its image's.

An affine (4, 4) takes an index of the array *as stored* to RAS+ mm. Arrays are stored as published: an image is (rows,
columns, slices) of its DICOM slices, and a NIfTI array becomes that by transpose(1, 0, 2).
"""

import gzip
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from claims import open_file, read_json
from utils import whole_file

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


def nifti_header(path):
    """The header of a NIfTI file, without its extensions, which may claim any size; ValueError where it is none."""
    with open_file(path) as file:
        block = (gzip.GzipFile(fileobj=file) if str(path).endswith('.gz') else file).read(1024)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):
            return kind(block[: kind.template_dtype.itemsize])
    raise ValueError('no NIfTI header')


def nifti_geometry(header, path):
    """Geometry of a NIfTI file's array, axes as in the file, by its nibabel header."""
    affine = np.asarray(header.get_best_affine(), float)
    coded = header['sform_code'] > 0 or header['qform_code'] > 0
    if not (coded and lays_out(affine)):
        holds = 'nothing'
    elif not affine[:3, 3].any() and np.count_nonzero(affine[:3, :3]) == 3:
        holds = 'spacing'
    else:
        holds = 'position'
    return Geometry(affine, holds, str(path), 'NIfTI')


# --- the file geometry/CASE.json -----------------------------------------------------------------------------------


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
    with whole_file(path, 'w') as file:
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


# --- a label onto its image's axes ---------------------------------------------------------------------------------


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
