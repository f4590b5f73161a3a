"""What dicom2npy.py and nii2npy.py share: case names, writing a case, and going on where one case fails."""

import re
import sys
from pathlib import Path

import numpy as np

from running.data_folder import name_fault
from running.files import LEFTOVERS, atomic_write, locked, write_array
from scans.geometry import geometry_file, save_geometry


def case_name(text):
    """The case that a folder or file stands for: 0001 of PANCREAS_0001, label0001 and img0001, else its own name."""
    numbered = re.fullmatch(r'(?:PANCREAS_|label|img)(\d+)', text)
    return numbered[1] if numbered else text


def only_one(case, sources):
    """The one source of a case; ValueError where it has several, or its name cannot stand in a list."""
    if len(sources) > 1:
        raise ValueError(f'{len(sources)} sources for one case: {", ".join(map(str, sources))}; keep one of them')
    if fault := name_fault(case):
        raise ValueError(f'{str(sources[0])!r}: the case name {case!r} holds {fault}, which none may; rename it')
    return sources[0]


def existing_folder(path):
    """The path, if it is a folder."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f'{path}: no such folder')
    return path


def speaker(case):
    """A print, of one line, that begins with the case's name."""
    return lambda note: print(*f'{case}: {note}'.split())


def save_array(path, array):
    """Write a .npy file; it appears only when it is complete."""
    with atomic_write(path) as file:
        write_array(file, array)


def save_scan(data_path, case, scan):
    """Write geometry/CASE.json, where it is known, and images/CASE.npy, and say so in a line."""
    where = geometry_file(data_path, case)
    if scan.geometry:
        save_geometry(where, scan.geometry)
    else:
        where.unlink(missing_ok=True)
    save_array(image_file(data_path, case), scan.image)
    spacing = ' x '.join(f'{s:.3g}' for s in scan.geometry.spacing) + ' mm' if scan.geometry else 'unknown spacing'
    size = ' x '.join(map(str, scan.image.shape))
    print(f'{case}: image {size}, {spacing}, {scan.image.min()} to {scan.image.max()} HU')


def image_file(data_path, case):
    """images/CASE.npy of the data folder."""
    return Path(data_path, 'images', f'{case}.npy')


def convert_all(data_path, cases, convert):
    """convert(case, sources) for each case of a dict; one that fails is named, the others go on. Exit code: 0 or 1."""
    with locked(Path(data_path, '.lock'), *(f'{kind}/{LEFTOVERS}' for kind in ('images', 'labels', 'geometry'))):
        return _convert_all(cases, convert)


def _convert_all(cases, convert):
    failed = []
    for case, sources in sorted(cases.items()):
        try:
            convert(case, sources)
        except (ValueError, OSError, MemoryError) as error:
            failed.append(' '.join(f'{case}: error: {str(error) or type(error).__name__}'.split()))
            print(failed[-1])
        sys.stdout.flush()
    if failed:
        print(f'{len(failed)} of {len(cases)} cases failed:', *failed, sep='\n', file=sys.stderr)
    return 1 if failed else 0


AIR = -200  # HU that every CT scan falls below somewhere


def intensity_doubts(image, low_range, high_range):
    """What speaks against `image` (any shape) being a CT scan in HU that suits the window: a list of sentences."""
    low, high = image.min(), image.max()
    doubts = []
    if low >= 0 and high <= 255:
        doubts.append(f'values from {low} to {high}: a picture of 8 bit, not HU')
    elif low > AIR:
        doubts.append(
            f'no value below {AIR} HU, not even air: another modality, clipped, or without its intercept (-1024)'
        )
    clipped = outside(image, low_range, high_range)
    if clipped > 0.97:
        doubts.append(f'{clipped:.1%} of its voxels lie outside the intensity window, {low_range:g} to {high_range:g}')
    return doubts


def outside(image, low_range, high_range):
    """Share of voxels that the intensity window clips."""
    return 1 - np.count_nonzero((image >= low_range) & (image <= high_range)) / image.size
