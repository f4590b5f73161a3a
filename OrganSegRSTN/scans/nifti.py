"""NIfTI files: images and labels to convert, predictions to open in 3D Slicer or ITK-SNAP."""

import contextlib
import gzip
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from running.data_folder import print_once
from running.files import MOST_VOXELS, atomic_write, open_file
from scans.geometry import Geometry, geometry_file, known, lays_out, load_geometry, what_it_holds
from scans.voxels import DEFLATE_AT_BEST, Volume

GRID = (  # the fields of a NIfTI header that place its array in the patient
    'pixdim xyzt_units qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z '
    'srow_x srow_y srow_z'
).split()
FARTHEST = 1 << 24  # bytes that a NIfTI file may hold before its array
MM = {1: 1000, 3: 0.001}  # of the codes in xyzt_units that say metres and microns


def is_nifti_name(path):
    """Return whether a path ends like a NIfTI file."""
    return str(path).endswith(('.nii', '.nii.gz'))


# --- writing -------------------------------------------------------------------------------------------------------


def export(args, npz, mask, case):
    """With --nifti, write the mask (W, H, L) of a Case beside its .npz, axes as in the array."""
    if getattr(args, 'nifti', False):
        write_on_scan(npz.with_suffix('.nii.gz'), mask, case, args.data_path)


def write_on_scan(path, volume, case, data_path):
    """Write a volume (W, H, L) of a Case as uint8, placed as geometry/CASE.json says."""
    name = Path(case.image_file).stem
    geometry = load_geometry(geometry_file(data_path, name), volume.shape)
    if not known(geometry):
        print_once(f'{data_path}: no geometry/CASE.json that says where some cases lie: their .nii.gz is in voxels')
    write_nifti(path, volume.astype(np.uint8), affine_header(geometry))


def affine_header(geometry):
    """Return a header that places an array by its Geometry; the identity if it is not known."""
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


def open_nifti(path, say=print):
    """Return the Volume of a 3D file; `say` prints what is odd in it. ValueError: no such file."""
    with _readable(path):
        header = nifti_header(path)
        shape = header.get_data_shape()
        if len(shape) > 3 and set(shape[3:]) == {1}:
            header.set_data_shape(shape[:3])
    _check_size(header, path)
    with _readable(path):
        return Volume(header.get_data_shape(), _planes(path, header), nifti_geometry(header, path, say))


def nifti_header(path):
    """Read a header, but not its extensions, which may claim any size; ValueError: no header."""
    with _unpacked(path) as file:
        block = file.read(1024)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):
            return kind(block[: kind.template_dtype.itemsize])
    raise ValueError('no NIfTI header')


def nifti_geometry(header, path, say=print):
    """Return the Geometry of a file's array from its nibabel header: by sform, else by qform."""
    unit = int(header['xyzt_units']) & 7
    if unit in MM:
        say(f'its header is in {"metres" if unit == 1 else "microns"}: converted to mm')
    for name in ('sform', 'qform'):
        if header[f'{name}_code'] > 0:
            with contextlib.suppress(nib.spatialimages.HeaderDataError, ValueError):  # a bad quaternion
                affine = np.diag([MM.get(unit, 1)] * 3 + [1]) @ getattr(header, f'get_{name}')()
                if lays_out(affine):
                    return Geometry(affine, what_it_holds(affine), str(path), 'NIfTI')
            say(f'its {name} lays out no volume: not used')
    say('its header gives no affine')
    return Geometry(np.eye(4), 'nothing', str(path), 'NIfTI')


def _planes(path, header):
    """Yield the planes (x, y) of a file along z, scaled, one at a time in memory."""
    with _readable(path), _unpacked(path) as file:
        array = nib.arrayproxy.ArrayProxy(file, header)
        for k in range(array.shape[2]):
            yield array[..., k]
        file.read(1)  # at its end a gzip file is checked against its checksum


@contextlib.contextmanager
def _unpacked(path):
    """Open a file, through gzip if its first bytes say so, whatever its name."""
    with open_file(path) as file:
        yield gzip.GzipFile(fileobj=file) if _is_gzip(file) else file


def _is_gzip(file):
    packed = file.read(2) == b'\x1f\x8b'
    file.seek(0)
    return packed


@contextlib.contextmanager
def _readable(path):
    """Raise what nibabel, zlib and gzip raise about a broken file as a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except Exception as error:
        raise ValueError(f'{path}: not a readable NIfTI file; is it truncated? ({error})') from None


def _check_size(header, path):
    """Refuse, before allocating memory, what is not 3D numbers or cannot be in the file."""
    with _readable(path):
        shape, kind, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        with open_file(path) as file:
            room = os.path.getsize(path) * (DEFLATE_AT_BEST if _is_gzip(file) else 1)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f'{path}: shape {shape}, where one 3D volume is expected')
    if kind.kind not in 'iufb':
        raise ValueError(f'{path}: it holds {kind}, not plain numbers')
    # given offset 0, nibabel reads the header as voxels and ITK begins 4 bytes early
    if not header.template_dtype.itemsize <= offset <= FARTHEST:
        raise ValueError(
            f'{path}: its header says that the voxels begin at byte {offset}; write it again (usual is 352)'
        )
    voxels = math.prod(shape)
    if voxels > MOST_VOXELS or offset + voxels * kind.itemsize > room:
        raise ValueError(f'{path}: its header claims {shape} voxels, more than the file can hold; is it truncated?')
