"""What dicom2npy.py and nii2npy.py share: case names, writing a case, and going on when a case fails."""

import re
import sys
from pathlib import Path

from running.data_folder import name_fault
from running.files import LEFTOVERS, atomic_write, locked, write_array
from scans.geometry import geometry_file, save_geometry


def case_name(text):
    """Return the case of a folder or file: 0001 for PANCREAS_0001, label0001 and img0001, else its own name."""
    numbered = re.fullmatch(r'(?:PANCREAS_|label|img)(\d+)', text)
    return numbered[1] if numbered else text


def only_one(case, sources):
    """Return the one source of a case; ValueError if it has several, or if its name does not fit into a list."""
    if len(sources) > 1:
        raise ValueError(f'{len(sources)} sources for one case: {", ".join(map(str, sources))}; keep one of them')
    if fault := name_fault(case):
        raise ValueError(f'{str(sources[0])!r}: the case name {case!r} holds {fault}, which is not allowed; rename it')
    return sources[0]


def existing_folder(path):
    """Return the path if it is a folder; else FileNotFoundError."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f'{path}: no such folder')
    return path


def speaker(case):
    """Return a print that writes a note as one line, after the case's name."""
    return lambda note: print(*f'{case}: {note}'.split())


def save_array(path, array):
    """Write a .npy file."""
    with atomic_write(path) as file:
        write_array(file, array)


def save_scan(data_path, case, scan):
    """Write geometry/CASE.json, if known, and images/CASE.npy; print a line."""
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
    """Return the path of images/CASE.npy in the data folder."""
    return Path(data_path, 'images', f'{case}.npy')


def convert_all(data_path, cases, convert):
    """Call convert(case, sources) for each item of `cases`; name one that fails and go on. Return exit code 0 or 1."""
    failed = []
    with locked(Path(data_path, '.lock'), *(f'{kind}/{LEFTOVERS}' for kind in ('images', 'labels', 'geometry'))):
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
