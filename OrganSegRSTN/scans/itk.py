"""NRRD and MetaImage files, read by SimpleITK: an optional package, imported only here."""

import math

import numpy as np

from running.files import MOST_VOXELS
from scans.geometry import Geometry, lays_out, what_it_holds
from scans.voxels import Volume

TYPES = {'.nrrd': 'NRRD', '.mha': 'MetaImage', '.mhd': 'MetaImage'}


def is_itk_name(path):
    """Return whether a path ends like an NRRD or MetaImage file."""
    return path.suffix.lower() in TYPES


def open_itk(path):
    """Return the Volume of a 3D file; ValueError: not such a file, or SimpleITK is missing."""
    try:
        import SimpleITK
    except ImportError:
        raise ValueError(f'{path}: reading it needs SimpleITK; install it with: pip install SimpleITK==2.5.7') from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = reader.GetSize()
        if len(shape) != 3 or reader.GetNumberOfComponents() != 1 or math.prod(shape) > MOST_VOXELS:
            raise ValueError(f'{path}: shape {shape}, where one 3D volume of plain numbers is expected')
        image = reader.Execute()
    except RuntimeError as error:
        raise ValueError(f'{path}: not readable; is it truncated? ({str(error).splitlines()[-1]})') from None
    affine = np.eye(4)  # LPS
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1, -1, 1, 1]) @ affine
    holds = what_it_holds(affine) if lays_out(affine) else 'nothing'
    if SimpleITK.GetArrayViewFromImage(image).dtype.kind not in 'iuf':
        raise ValueError(f'{path}: it holds {image.GetPixelIDTypeAsString()}, not plain numbers')
    return Volume(shape, _planes(image), Geometry(affine, holds, str(path), TYPES[path.suffix.lower()]))


def _planes(image):
    """Yield the planes (x, y) of an image, which must outlive its views."""
    import SimpleITK

    for plane in SimpleITK.GetArrayViewFromImage(image):
        yield plane.T
