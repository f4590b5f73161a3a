"""Where an array lies in the patient: its affine, and how a label is turned onto its image.

An affine (4, 4) maps an index of the array *as stored* to RAS+ mm. Arrays are stored as published:
an image is (rows, columns, slices) of its DICOM slices, and a NIfTI array becomes that by
transpose(1, 0, 2).
"""

import itertools
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel.orientations as axes
import numpy as np

from running.files import read_json, write_json

PUBLISHED = (1, 0, 2)
TOLERANCE = 0.1  # voxels by which the corners of two grids may differ


class Geometry(NamedTuple):
    """`affine` (4, 4) of an array, what it `holds`, the `source` (a path) and its `type`, as DICOM.

    An affine holds its array's 'position' in the patient; or only its 'spacing', if it is a scaled
    permutation at the origin, which programs write that know no position; or 'nothing', if its
    header says so.
    """

    affine: np.ndarray
    holds: str
    source: str
    type: str

    @property
    def spacing(self):
        """Return the mm from voxel to voxel along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_ml(self):
        """Return the volume of a voxel in ml."""
        return abs(np.linalg.det(self.affine[:3, :3])) / 1000

    def transposed(self):
        """Return the geometry of the array's transpose(1, 0, 2)."""
        return self._replace(affine=self.affine[:, [*PUBLISHED, 3]])


class Scan(NamedTuple):
    """An image as stored, (rows, columns, slices) int16 HU, and its Geometry (None if unknown)."""

    image: np.ndarray
    geometry: Geometry | None


def known(geometry):
    """Return whether a Geometry (or None) says anything about its array."""
    return geometry is not None and geometry.holds != 'nothing'


def axis_codes(geometry):
    """Return where an array's axes run to, as PLI (back, left, down); '' if that is not known."""
    return ''.join(axes.aff2axcodes(geometry.affine)) if geometry and geometry.holds == 'position' else ''


def lays_out(affine):
    """Return whether an affine (4, 4) is finite and gives every voxel a place of its own."""
    with np.errstate(all='ignore'):
        volume = abs(np.linalg.det(affine[:3, :3]))
    return bool(np.isfinite(affine).all() and np.isfinite(volume) and volume > 1e-9)


def what_it_holds(affine):
    """Return what an affine that lays its array out holds: 'position' or only 'spacing'."""
    return 'spacing' if not affine[:3, 3].any() and np.count_nonzero(affine[:3, :3]) == 3 else 'position'


# --- geometry/CASE.json --------------------------------------------------------------------------------------------


def geometry_file(data_path, case):
    """Return the path of geometry/CASE.json in the data folder."""
    return Path(data_path, 'geometry', f'{case}.json')


def save_geometry(path, geometry, **partners):
    """Write a geometry with its spacing and its `partners`, see `check_partners`."""
    content = {
        'affine': geometry.affine.tolist(),
        'spacing': geometry.spacing.tolist(),
        'holds': geometry.holds,
        'source': os.path.abspath(geometry.source),
        'type': geometry.type,
    }
    write_json(path, content | partners)


def load_geometry(path, shape=None, image=None):
    """Return the geometry in a file; None if there is none, or (with a line) it does not fit.

    It does not fit if it was written for an image of another `shape`, or other than `image`.
    """
    content = read_record(path)
    if not content:
        return None
    if shape and (fault := _image_fault(content, shape, image)):
        print(f'{path}: not used with its image: {fault} since its conversion; convert it again')
        return None
    try:
        affine, holds = np.array(content['affine'], float).reshape(4, 4), content['holds']
        if holds not in ('position', 'spacing', 'nothing'):
            raise ValueError(f'holds {holds!r}')
        if holds != 'nothing' and not lays_out(affine):
            raise ValueError(f'affine {affine.tolist()} lays out no volume')
        return Geometry(affine, holds, str(content['source']), str(content['type']))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f'{path}: not a geometry ({error!r}); convert its image again') from None


def check_partners(data_path, case, image, label):
    """Raise ValueError if an image or label is not the one that geometry/CASE.json was written for.

    The file holds `shape` and `image_crc32` of the image and `label_crc32` of the label, which is
    null if the label belongs to an earlier image. What it does not hold is not checked: older data
    folders and arrays of your own have none of it.
    """
    path = geometry_file(data_path, case)
    content = read_record(path)
    if fault := _image_fault(content, image.shape, image):
        what, entry = f'images/{case}.npy: {fault}', 'image_crc32'
    elif 'label_crc32' in content and content['label_crc32'] != crc32(label):
        earlier = content['label_crc32'] is None
        fault = f'images/{case}.npy has changed' if earlier else 'its voxels have changed'
        what, entry = f'labels/{case}.npy: {fault}', 'label_crc32'
    else:
        return
    record = path if 'shape' in fault else f'"{entry}" from {path}, or all of it if axes were turned'
    raise _changed(what, record)


def check_labels(data_path, cases):
    """Raise ValueError if the label of one of these cases (Case) was made for an earlier image, by its geometry/CASE.json."""
    for case in cases:
        path = geometry_file(data_path, Path(case.image_file).stem)
        if read_record(path).get('label_crc32', 0) is None:
            raise _changed(f'{case.label_file}: {case.image_file} has changed', f'"label_crc32" from {path}')


def _changed(what, record):
    return ValueError(f'{what} since its conversion; convert it again, or, if that is right, delete {record}')


def _image_fault(content, shape, image):
    """Return how an image differs from the one of a geometry file; '' if it does not."""
    if content.get('shape', list(shape)) != list(shape):
        return f'its shape is {list(shape)} instead of {content["shape"]}'
    if image is not None and content.get('image_crc32') not in (None, crc32(image)):
        return 'its voxels have changed'
    return ''


def crc32(array):
    """Return the CRC-32 of an array's bytes, in C order: it depends on values and type."""
    return zlib.crc32(np.ascontiguousarray(array))


def read_record(path):
    """Return the object in geometry/CASE.json; {} if there is no such file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f'{path}: not a geometry ({error!r}); convert its image again') from None


# --- a label onto its image ----------------------------------------------------------------------------------------


def place_label(label, theirs, shape, ours, orientation='auto'):
    """Turn a label, axes as in its file, onto its image's axes; return (label of `shape`, how).

    theirs: the label's Geometry; ours: that of the image as stored, or None. The two affines decide
    if their grids coincide; else the published transpose(1, 0, 2), unless the affines contradict it.
    orientation: 'auto', or 'affine' or 'published' to insist on one of the two. ValueError: the
    label does not fit.
    """
    if sorted(label.shape) != sorted(shape):
        raise ValueError(f'{theirs.source}: shape {label.shape} does not fit its image, stored as {tuple(shape)}')
    both = known(ours) and known(theirs)
    turn = _turn(theirs.affine, label.shape, ours.affine, shape) if both and orientation != 'published' else None
    if turn is not None:
        return axes.apply_orientation(label, turn), 'by the affines'
    if orientation == 'affine':
        raise ValueError(f'{theirs.source}: {_contradiction(theirs, ours) if both else "no two affines to go by"}')
    if orientation == 'auto' and both and _contradicts(theirs, ours):
        raise ValueError(
            f'{theirs.source}: {_contradiction(theirs, ours)}; if the affine is wrong but the arrays pair as in NIH '
            'Pancreas-CT, give --orientation published'
        )
    if tuple(label.shape[a] for a in PUBLISHED) != tuple(shape):
        raise ValueError(f'{theirs.source}: shape {label.shape} transposed does not fit its image, {tuple(shape)}')
    return label.transpose(PUBLISHED), 'by transpose(1, 0, 2)'


def _turn(theirs, their_shape, ours, our_shape):
    """Return the nibabel orientation that turns their grid onto ours; None if none does."""
    between = np.linalg.solve(ours, theirs)  # their index -> our index
    turn = axes.io_orientation(between)
    if tuple(their_shape[a] for a in turn[:, 0].argsort()) != tuple(our_shape):
        return None
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in our_shape))])
    found = corners @ (between @ axes.inv_ornt_aff(turn, their_shape)).T
    return turn if np.abs(found - corners).max() <= TOLERANCE else None


def _contradicts(theirs, ours):
    """Return whether the affines of two different grids speak against the published transpose."""
    if theirs.holds == ours.holds == 'position':
        return True
    ones = any(np.allclose(g.spacing, 1) for g in (theirs, ours))  # as written if not known
    return not ones and not np.allclose(theirs.transposed().spacing, ours.spacing, rtol=0.01)


def _contradiction(theirs, ours):
    """Return a text about two grids that do not coincide."""

    def text(geometry):
        spacing, origin = (
            ', '.join(f'{v:.4g}' for v in values) for values in (geometry.spacing, geometry.affine[:3, 3])
        )
        return f'spacing ({spacing}) at ({origin}) mm'

    return f"its grid, {text(theirs.transposed())}, is not its image's, {text(ours)}"
