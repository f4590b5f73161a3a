"""NIfTI files: images and labels to convert, and predictions to open over their scan in 3D Slicer or ITK-SNAP."""

import contextlib
import gzip
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from running.files import MOST_VOXELS, atomic_write, open_file
from scans.geometry import Geometry, Scan, geometry_file, known, lays_out, load_geometry
from scans.voxels import DEFLATE_AT_BEST, stack_slices

GRID = (  # the fields of a NIfTI header that place its array in the patient
    'pixdim xyzt_units qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z '
    'srow_x srow_y srow_z'
).split()
FARTHEST = 1 << 24  # bytes that a NIfTI file may hold before its array


def is_nifti_name(path):
    """Return whether a path ends like a NIfTI file."""
    return str(path).endswith(('.nii', '.nii.gz'))


# --- writing -------------------------------------------------------------------------------------------------------


def add_option(parser):
    """Add --nifti, for a stage that calls `export`."""
    parser.add_argument('--nifti', action='store_true', help='write the final predictions as .nii.gz, too')


def export(args, npz, mask, case):
    """With --nifti, write the mask (W, H, L) of a Case beside its .npz, axes as in the array."""
    if getattr(args, 'nifti', False):
        write_on_scan(npz.with_suffix('.nii.gz'), mask, case, args.data_path)


def write_on_scan(path, volume, case, data_path):
    """Write a volume (W, H, L) of a Case as uint8, placed as geometry/CASE.json says."""
    name = Path(case.image_file).stem
    geometry = load_geometry(geometry_file(data_path, name))
    if not known(geometry):
        _warn_unplaced(name)
    write_nifti(path, volume.astype(np.uint8), affine_header(geometry))


_said_unplaced = False


def _warn_unplaced(case):
    global _said_unplaced
    if not _said_unplaced:
        print(f'{case}: no geometry/{case}.json that says where it lies: its .nii.gz is in voxels (said once)')
    _said_unplaced = True


def affine_header(geometry):
    """Return the header of a file whose array has this Geometry; the identity if it is not known."""
    header = nib.Nifti1Header()
    header.set_xyzt_units('mm')
    if known(geometry):
        header.set_sform(geometry.affine, 'scanner')
        header.set_qform(geometry.affine, 'scanner')
    else:
        header.set_sform(np.eye(4), 'aligned')
    return header


def grid_header(path):
    """Return a header with the grid of the NIfTI file at `path` and nothing else of it."""
    source, header = nifti_header(path), nib.Nifti1Header()
    for field in GRID:
        header[field] = source[field]
    return header


def write_nifti(path, array, header):
    """Write a 3D array as .nii or .nii.gz; the same array gives the same bytes."""
    header.set_data_dtype(array.dtype)
    image = nib.Nifti1Image(array, None, header)
    with atomic_write(path) as file:
        if str(path).endswith('.gz'):
            with gzip.GzipFile('', 'wb', compresslevel=3, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


# --- reading -------------------------------------------------------------------------------------------------------


def read_nifti_image(path, say=print):
    """Read an image as a Scan, stored as published, transpose(1, 0, 2); `say` prints what was changed."""
    values, geometry = read_nifti(path)
    if not known(geometry):
        say('its header gives no affine (sform and qform codes are 0)')
    return Scan(stack_slices(values.T, values.T.shape, path, say), geometry.transposed())


def read_nifti_label(path):
    """Read a label: (uint8 array, its Geometry), axes as in the file; ValueError if a value is not 0, 1 ... 255."""
    values, geometry = read_nifti(path)
    with np.errstate(invalid='ignore'):
        label = values.astype(np.uint8)
    wrong = values[label != values]
    if wrong.size:
        raise ValueError(f'{path}: {wrong[0]} is not an organ; a label holds whole numbers from 0 to 255')
    return label, geometry


def read_nifti(path):
    """Read (array of numbers, Geometry) of a 3D file, axes as in the file."""
    with _readable(path):
        header = nifti_header(path)
    _check_size(header, path)
    with _readable(path):
        return np.asanyarray(nib.arrayproxy.ArrayProxy(path, header)), nifti_geometry(header, path)


def nifti_header(path):
    """Read the header without its extensions, which may claim any size; ValueError if there is none."""
    with open_file(path) as file:
        block = (gzip.GzipFile(fileobj=file) if str(path).endswith('.gz') else file).read(1024)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):
            return kind(block[: kind.template_dtype.itemsize])
    raise ValueError('no NIfTI header')


def nifti_geometry(header, path):
    """Return the Geometry of an array, axes as in its file, from its nibabel header."""
    affine = np.asarray(header.get_best_affine(), float)
    coded = header['sform_code'] > 0 or header['qform_code'] > 0
    if not (coded and lays_out(affine)):
        holds = 'nothing'
    elif not affine[:3, 3].any() and np.count_nonzero(affine[:3, :3]) == 3:
        holds = 'spacing'
    else:
        holds = 'position'
    return Geometry(affine, holds, str(path), 'NIfTI')


@contextlib.contextmanager
def _readable(path):
    """Raise whatever nibabel, zlib and gzip raise about a broken file as one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except Exception as error:
        raise ValueError(f'{path}: not a readable NIfTI file; is it truncated? ({error})') from None


def _check_size(header, path):
    """Refuse, before memory is allocated, what is not 3D numbers or asks for more voxels than the file can hold."""
    with _readable(path):
        shape, kind, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f'{path}: shape {shape}, where one 3D volume is expected')
    if kind.kind not in 'iufb':
        raise ValueError(f'{path}: it holds {kind}, not plain numbers')
    if offset > FARTHEST:
        raise ValueError(f'{path}: its header says that the voxels begin at byte {offset}, which no scan needs')
    voxels = math.prod(shape)
    room = os.path.getsize(path) * (DEFLATE_AT_BEST if str(path).endswith('.gz') else 1)
    if voxels > MOST_VOXELS or offset + voxels * kind.itemsize > room:
        raise ValueError(f'{path}: its header claims {shape} voxels, more than the file can hold; is it truncated?')
