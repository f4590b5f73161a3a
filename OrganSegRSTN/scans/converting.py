"""What dicom2npy.py and nii2npy.py share: naming and writing a case, going on when one fails."""

import contextlib
import os
import re
import sys
from pathlib import Path

import numpy as np

from running.data_folder import name_fault, print_once
from running.files import LEFTOVERS, atomic_write, load_array, locked, write_array, write_json
from scans.geometry import (
    Geometry,
    crc32,
    geometry_file,
    known,
    load_geometry,
    read_record,
    save_geometry,
)


def case_name(text):
    """Return 0001 for PANCREAS_0001, label0001 and img0001; another name is the case."""
    numbered = re.fullmatch(r'(?:PANCREAS_|label|img)(\d+)', text)
    return numbered[1] if numbered else text


def only_one(case, sources):
    """Return the one source of a case; ValueError: several, or a name that no list can hold."""
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


def save_scan(data_path, case, scan, label=None):
    """Write geometry/CASE.json and images/CASE.npy; print a line.

    label: what save_label writes next. Without it, print a line if the stored label was made for another image.
    An image of the user's is kept, see `keeps`. ValueError: the label is the user's, and of another image.
    """
    if keeps(data_path, case, 'image', scan.image):
        return
    geometry = scan.geometry or unknown_geometry(data_path, case)
    partners = {'image_crc32': crc32(scan.image)}
    former, here = recorded(data_path, case), os.path.abspath(geometry.source)
    if former.get('source', here) != here and former.get('image_crc32') != partners['image_crc32'] and scan.geometry:
        print(f'{case}: replaces the scan of {former["source"]}')
    if label is not None and not keeps(data_path, case, 'label', label):
        partners['label_crc32'] = crc32(label)
    elif label_file(data_path, case).exists():
        partners |= _partner_label(data_path, case, geometry, partners['image_crc32'])
    # the shape last: without the line of a checksum, it is still JSON
    save_geometry(geometry_file(data_path, case), geometry, **partners, shape=scan.image.shape)
    save_array(image_file(data_path, case), scan.image)
    spacing = ' x '.join(f'{s:.3g}' for s in geometry.spacing) + ' mm' if known(geometry) else 'unknown spacing'
    size = ' x '.join(map(str, scan.image.shape))
    print(f'{case}: image {size}, {spacing}, {scan.image.min()} to {scan.image.max()} HU')


def save_label(data_path, case, label):
    """Write labels/CASE.npy and its checksum into geometry/CASE.json; return False if it is the user's, see `keeps`."""
    if keeps(data_path, case, 'label', label):
        return False
    save_array(label_file(data_path, case), label)
    path = geometry_file(data_path, case)
    if content := read_record(path):
        content.pop('label_crc32', None)
        write_json(path, {'label_crc32': crc32(label)} | content)
    else:
        save_geometry(path, unknown_geometry(data_path, case), label_crc32=crc32(label))
    return True


def keeps(data_path, case, kind, array):
    """Return whether the stored image or label (`kind`) is the user's and another than this one; print a line if so.

    It is the user's where geometry/CASE.json holds no checksum of it: made by hand, or changed and said to be right.
    """
    path = Path(data_path, f'{kind}s', f'{case}.npy')
    if not path.exists() or f'{kind}_crc32' in recorded(data_path, case):
        return False
    with contextlib.suppress(ValueError):  # nothing is lost with what is broken
        if crc32(load_array(path)) != crc32(array):
            print_once(
                f'{path} is kept: it is not what the conversion makes, and geometry/{case}.json holds no {kind}_crc32, '
                'so it is your own; to have it made again, move it away and convert again (ENABLE_..2NPY=1)'
            )
            return True
    return False


def _partner_label(data_path, case, geometry, image_crc32):
    """Return the record of the label beside a new image: null, with a line, if of another image.

    ValueError: it is of another image, and the user's.
    """
    content, former = recorded(data_path, case), None
    with contextlib.suppress(ValueError):
        former = load_geometry(geometry_file(data_path, case))
    alike = former is None or (former.holds == geometry.holds and np.allclose(former.affine, geometry.affine))
    if alike and content.get('image_crc32', image_crc32) == image_crc32 and content.get('label_crc32', 0) is not None:
        return {key: content[key] for key in ('label_crc32',) if key in content}
    if 'label_crc32' not in content:
        raise ValueError(
            f'labels/{case}.npy is your own, since geometry/{case}.json holds no label_crc32, and was made for another '
            f'images/{case}.npy: move it away'
        )
    print(f'{case}: labels/{case}.npy was made for another images/{case}.npy: convert it again')
    return {'label_crc32': None}


def unknown_geometry(data_path, case):
    """Return the geometry of an image of which nothing is known."""
    return Geometry(np.eye(4), 'nothing', str(image_file(data_path, case)), 'unknown')


def recorded(data_path, case):
    """Return what geometry/CASE.json holds; {} where there is none that can be read."""
    with contextlib.suppress(ValueError):
        return read_record(geometry_file(data_path, case))
    return {}


def image_file(data_path, case):
    """Return the path of images/CASE.npy in the data folder."""
    return Path(data_path, 'images', f'{case}.npy')


def label_file(data_path, case):
    """Return the path of labels/CASE.npy in the data folder."""
    return Path(data_path, 'labels', f'{case}.npy')


def convert_all(data_path, cases, convert):
    """Call convert(case, sources) for each item, also after failures; return the exit code."""
    failed = []
    for case in sorted({path.stem for path in Path(data_path, 'geometry').glob('*.json')} - cases.keys()):
        source = recorded(data_path, case).get('source')
        if source and image_file(data_path, case).exists() and not os.path.exists(source):
            print(
                f'{case}: kept, though {source} is gone; to leave it out, remove images/{case}.npy and labels/{case}.npy'
            )
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
