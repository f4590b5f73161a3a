"""Predictions as NIfTI files, to open over their scan in 3D Slicer or ITK-SNAP."""

import gzip
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'DATA2NPY'))
from geometry import geometry_file, load_geometry, nifti_header
from utils import whole_file

GRID = (  # the fields of a NIfTI header that lay its array into the patient
    'pixdim xyzt_units qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z '
    'srow_x srow_y srow_z'
).split()


def add_option(made):
    """--nifti, for a stage that calls `export`."""
    made.add_argument('--nifti', action='store_true', help='write the final predictions as .nii.gz, too')


def export(args, npz, mask, case):
    """Where --nifti was given: write the mask (W, H, L) of a utils.Case beside its .npz, axes as in the array."""
    if getattr(args, 'nifti', False):
        write_on_scan(npz.with_suffix('.nii.gz'), mask, case, args.data_path)


def write_on_scan(path, volume, case, data_path):
    """Write a volume (W, H, L) of a utils.Case as uint8, where geometry/CASE.json says that its array lies."""
    name = Path(case.image_file).stem
    geometry = load_geometry(geometry_file(data_path, name))
    if not known(geometry):
        _say_unplaced(name)
    write_nifti(path, volume.astype(np.uint8), affine_header(geometry))


def known(geometry):
    """Whether a Geometry (or None) says anything about its array."""
    return geometry is not None and geometry.holds != 'nothing'


def axis_codes(geometry):
    """Where the axes of an array run to in the patient, such as PLI (back, left, down); '' where that is not known."""
    return ''.join(nib.aff2axcodes(geometry.affine)) if geometry and geometry.holds == 'position' else ''


# --- files ---------------------------------------------------------------------------------------------------------


def affine_header(geometry):
    """Header of a file whose array has this Geometry; where that is not known, the identity."""
    header = nib.Nifti1Header()
    header.set_xyzt_units('mm')
    if known(geometry):
        header.set_sform(geometry.affine, 'scanner')
        header.set_qform(geometry.affine, 'scanner')
    else:
        header.set_sform(np.eye(4), 'aligned')
    return header


def grid_header(path):
    """Header of a file on the very grid of the NIfTI file at `path`: and nothing else of it."""
    source, header = nifti_header(path), nib.Nifti1Header()
    for field in GRID:
        header[field] = source[field]
    return header


def is_nifti_name(path):
    """Whether a path ends as a NIfTI file's does."""
    return str(path).endswith(('.nii', '.nii.gz'))


def write_nifti(path, array, header):
    """Write a 3D array as .nii or .nii.gz; the same array gives the same bytes, and the file appears when complete."""
    header.set_data_dtype(array.dtype)
    image = nib.Nifti1Image(array, None, header)
    with whole_file(path) as file:
        if str(path).endswith('.gz'):
            with gzip.GzipFile('', 'wb', compresslevel=3, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


_said_unplaced = False


def _say_unplaced(case):
    global _said_unplaced
    if not _said_unplaced:
        print(f'{case}: no geometry/{case}.json that says where it lies: its .nii.gz is in voxels (said once)')
    _said_unplaced = True
