"""Read one DICOM series: choose its files, order and check its slices, return HU and geometry."""

import contextlib
import filecmp
import itertools
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from pydicom.uid import UID_dictionary

from running.files import MOST_VOXELS
from scans.dicom_file import header_value, hounsfield, read_slices, stored_values
from scans.geometry import Geometry, Scan, lays_out
from scans.resampling import upright, usual_gap
from scans.voxels import stack_slices

TILT = np.sin(np.radians(0.5))  # largest angle between the slices' normal and the stacking direction
UNEVEN = 0.1  # largest distance of a slice from its place, as a fraction of the slice spacing
ROUNDING = 0.101  # mm; the same, since some positions are rounded to 0.1 mm
LPS_TO_RAS = np.diag([-1, -1, 1, 1])
BROKEN = ('a dangling link', 'empty', 'not DICOM', 'unreadable')
HIDDEN = 'a hidden DICOM image'


def read_series(folder, say=print, resample=False, acquisition=None):
    """Return the one series in a folder as a Scan, ordered by InstanceNumber, as published.

    Where the numbers do not follow the positions, the positions decide. `say` prints each note.
    A series that is incomplete, mixed, tilted or unevenly spaced raises ValueError; `resample`
    straightens the last two. `acquisition` (str) chooses one AcquisitionNumber of several. ValueError:
    no slice has it, or two acquisitions overlap.
    """
    slices = ordered_slices(folder, say, acquisition)
    size, geometry = (len(slices), *slices[0].size), None
    planes = _planes(slices)
    if slices[0].position is not None:
        affine = _affine(slices)
        if fault := _fault(slices):
            if not resample:
                raise ValueError(f'{folder}: {fault} (dicom2npy.py --resample interpolates)')
            planes, affine, size = upright(planes, np.array([s.position for s in slices]), affine, size)
            say(f'{fault}: resampled by linear interpolation, {len(slices)} slices to {size[0]}')
        geometry = Geometry(LPS_TO_RAS @ affine, 'position', str(folder), 'DICOM')
    return Scan(stack_slices(planes, size, folder, say), geometry)


def ordered_slices(folder, say=print, acquisition=None):
    """Return the DicomSlices of the one series in a folder in the order of read_series, which see."""
    slices = _of_acquisition(_one_series(folder, _read_headers(folder, say)), acquisition, say)
    _check_alike(slices)
    if slices[0].position is None:
        say('no positions in its headers: the order by InstanceNumber is not checked, and where it lies is unknown')
        return _by_number(slices)
    _check_apart(slices)
    return _in_order(slices, say)


# --- files ---------------------------------------------------------------------------------------------------------


def series_folders(raw):
    """Yield (folder, whether it holds slices) for `raw` and every folder below it; follow links. OSError: one is unreadable."""
    seen = set()

    def fail(error):
        raise error

    for folder, below, files in os.walk(raw, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(folder))
        below[:] = sorted(b for b in below if b[0] != '.' and os.path.realpath(os.path.join(folder, b)) not in seen)
        yield Path(folder), any(is_slice(Path(folder, name)) for name in sorted(files))


def is_slice(path):
    """Return whether a file is a DICOM image, or is named like one and not hidden."""
    return not _why_no_slice(path)


def _why_no_slice(path):
    """Return why a file is left out; '' for a slice, and for a file that is named like one."""
    why = _kind(path)
    if path.name.startswith('.'):
        return 'hidden' if why else HIDDEN
    return '' if why in BROKEN and path.suffix.lower() in ('.dcm', '.ima') else why


def _kind(path):
    """Return what a file is; '' for a DICOM image."""
    if path.suffix in ('.npy', '.npz'):  # a data folder holds many
        return 'not DICOM'
    if not path.is_file():  # opening a pipe would hang
        return 'not a file' if path.exists() else 'a dangling link'
    try:
        with open(path, 'rb') as file:
            start = file.read(132)
        if start[128:] != b'DICM':
            return 'not DICOM' if start else 'empty'
        uid = header_value(path, 'SOPClassUID') or header_value(path, 'MediaStorageSOPClassUID')
    except OSError:
        return 'unreadable'
    except ValueError:
        return ''  # a broken slice: reading it raises the error that names the cause
    name = UID_dictionary.get(uid, [''])[0]
    if 'Image Storage' in name or not name and (not uid or uid.startswith('1.2.840.10008.')):
        return ''
    return name or f'private SOP class {uid}'


def _image_files(folder, say):
    """Return the slices of a folder, sorted. Name and count the other files.

    ValueError: one of these may be a slice that was lost, being named like the slices.
    """
    files = defaultdict(list)
    for path in sorted(Path(folder).iterdir()):
        if not path.is_dir():
            files[_why_no_slice(path)].append(path)
    slices = files.pop('', [])
    patterns = {re.sub(r'\d+', '', path.name) for path in slices}
    for why, paths in files.items():
        more = f' and {len(paths) - 5} more' if len(paths) > 5 else ''
        say(f'{len(paths)} left out, {why}: {", ".join(path.name for path in paths[:5])}{more}')
        for path in paths:
            if why == HIDDEN or why in BROKEN and re.sub(r'\d+', '', path.name) in patterns:
                raise ValueError(f'{path}: {why} among the slices, so one may be missing; restore or remove it')
    return slices


def _read_headers(folder, say):
    """Return the DicomSlices in a folder. Skip a file that is a byte-for-byte copy of another."""
    slices, files = [], {}
    for path in _image_files(folder, say):
        found = read_slices(path)
        twin = files.setdefault(found[0].uid, path)
        if twin != path and filecmp.cmp(twin, path, shallow=False):
            say(f'{path.name} is a copy of {twin.name}, skipped')
        else:
            slices += found
    return slices


def split_scans(folders):
    """Return {folder: other folder} of those that hold parts of one scan.

    These are of one patient and frame of reference, and their slices together are an even stack.
    """
    patients, parts = defaultdict(list), {}
    for folder in folders:
        with contextlib.suppress(ValueError, OSError):  # read_series raises it again
            first = next(path for path in sorted(folder.iterdir()) if is_slice(path))
            patients[header_value(first, 'PatientID'), header_value(first, 'FrameOfReferenceUID')].append(folder)
    for together in patients.values():
        stacks = {}
        for folder in together if len(together) > 1 else ():
            with contextlib.suppress(ValueError, OSError):
                stacks[folder] = _read_headers(folder, say=_silent)
        for one, two in itertools.combinations(stacks, 2):
            if _are_one_stack(stacks[one], stacks[two]):
                parts |= {one: two, two: one}
    return parts


def refuse_part(folder, parts):
    """Raise ValueError if a folder holds a part of a scan, by split_scans."""
    if folder in parts:
        raise ValueError(
            f'{folder} and {parts[folder]} look like parts of one scan; put its slices into one folder, or read each '
            'folder by itself'
        )


def _are_one_stack(slices, others):
    """Return whether two sets of slices, three or more in all, are one even stack together."""
    try:
        _check_alike([slices[0], others[0]])
        return len(slices + others) > 2 and not _fault(_in_order(slices + others, say=_silent))
    except (ValueError, TypeError):  # unlike each other, broken, or without positions
        return False


def _silent(note):
    """Print nothing."""


# --- slices --------------------------------------------------------------------------------------------------------


def _one_series(folder, slices):
    """Return the slices; raise an error unless they are of exactly one series."""
    if not slices:
        raise FileNotFoundError(f'{folder}: no DICOM series found in it')
    others = [s for s in slices if s.series != slices[0].series]
    if others:
        names = f'{slices[0].path.name} and {others[0].path.name}'
        raise ValueError(f'{folder}: two series in one folder ({names}); keep one of them')
    return slices


def _of_acquisition(slices, acquisition, say):
    """Return the slices of one AcquisitionNumber; all of them if it is None."""
    chosen = [s for s in slices if acquisition in (None, s.acquisition)]
    if not chosen:
        raise ValueError(f'{slices[0].path.parent}: no slice of acquisition {acquisition}; there are {_counts(slices)}')
    if len({s.acquisition for s in slices}) > 1:
        say(f'acquisitions {_counts(slices)}: {"all are" if acquisition is None else f"only {acquisition} is"} read')
    return chosen


def _counts(slices):
    """Return the AcquisitionNumbers of slices as a text: 1 (4 slices), 2 (4 slices)."""
    counts = Counter(s.acquisition or 'without a number' for s in slices)
    parts = [f'{number} ({counts[number]} slices)' for number in sorted(counts, key=lambda n: (len(n), n))]
    return ', '.join(parts[:5]) + (f' and {len(parts) - 5} more' if len(parts) > 5 else '')


def _check_apart(slices):
    """Refuse two evenly spaced acquisitions that overlap: by position they become one volume."""
    normal, heights = _normal(slices[0]), defaultdict(list)
    for s in slices:
        heights[s.acquisition].append(s.position @ normal)
    stacks = {number: np.sort(places) for number, places in heights.items()}
    even = sorted((places[0], places[-1], number) for number, places in stacks.items() if _is_even(np.diff(places)))
    for (_, end, one), (start, _, two) in zip(even, even[1:]):
        if start < end - 1e-3:
            raise ValueError(_overlap(slices, one, two))


def _is_even(gaps):
    """Return whether gaps, at least one, are of one length."""
    return len(gaps) > 0 and np.abs(gaps - usual_gap(gaps)).max() <= _allowed(usual_gap(gaps))


def _allowed(gap):
    """Return how far (mm) a slice may lie from its place among slices with this gap."""
    return max(UNEVEN * gap, ROUNDING)


def _overlap(slices, one, two):
    """Return the message for two acquisitions that overlap."""
    counts = _counts([s for s in slices if s.acquisition in (one, two)])
    return (
        f'{slices[0].path.parent}: its acquisitions {counts} overlap; keep one of them, or give '
        f'dicom2npy.py --acquisition {one or two}'
    )


def _check_alike(slices):
    """Refuse slices of different size, spacing or orientation, and a size that no scan has."""
    first = slices[0]
    for other in slices:
        if other.size != first.size:
            raise ValueError(f'{other.path}: {other.size} pixels, where {first.path.name} has {first.size}')
        for name in ('spacing', 'directions', 'position'):
            one, two = getattr(first, name), getattr(other, name)
            if (one is None) != (two is None):
                without = first if one is None else other
                raise ValueError(f'{without.path}: no {name} in its header, unlike the others')
            if name != 'position' and one is not None and not np.allclose(one, two, atol=1e-3):
                raise ValueError(f'{other.path}: {name} {two.tolist()}, where {first.path.name} has {one.tolist()}')
    if first.size[0] * first.size[1] * len(slices) > MOST_VOXELS:
        raise ValueError(f'{first.path}: its header claims {first.size} pixels, which no scan has')


def _by_number(slices):
    """Return slices without positions in the order of InstanceNumber.

    ValueError: a number is missing or repeated.
    """
    if unnumbered := [s for s in slices if s.number is None]:
        raise ValueError(f'{unnumbered[0].path}: neither a position nor an InstanceNumber to order it by')
    slices = sorted(slices, key=lambda s: s.number)
    for one, two in zip(slices, slices[1:]):
        if two.number != one.number + 1:
            what = 'repeated' if two.number == one.number else 'missing'
            raise ValueError(f'{two.path}: slice {what}, InstanceNumber {one.number} is followed by {two.number}')
    return slices


def _in_order(slices, say):
    """Return slices in the order of InstanceNumber, or by position if the two disagree.

    By position they run as in NIH, downwards (against their normal), unless the InstanceNumbers
    that exist mostly rise with it. ValueError: two slices lie at one position.
    """
    normal = _normal(slices[0])
    downwards = sorted(slices, key=lambda s: s.position @ normal, reverse=True)
    for one, two in zip(downwards, downwards[1:]):
        if (one.position - two.position) @ normal < 1e-3:
            raise ValueError(_repetition(slices, one, two))
    numbered = sorted((s for s in slices if s.number is not None), key=lambda s: s.number)
    rising = [(two.position - one.position) @ normal > 0 for one, two in zip(numbered, numbered[1:])]
    if len({s.number for s in numbered}) == len(slices) and len(set(rising)) <= 1:
        return numbered
    say('InstanceNumbers are missing, repeated or not in the order of the positions: ordered by position')
    heights = [s.position @ normal for s in numbered]
    with np.errstate(all='ignore'):  # nan where all numbers are one
        trend = np.corrcoef([float(s.number) for s in numbered], heights)[0, 1] if len(numbered) > 1 else 0
    return downwards[::-1] if trend > 0.5 else downwards


def _repetition(slices, one, two):
    """Return the message for two slices at one position."""
    if one.acquisition != two.acquisition:
        return _overlap(slices, one.acquisition, two.acquisition)
    return f'{two.path}: {one} and {two} lie at one position: a repeated slice'


def _normal(first):
    """Return the normal of a slice; ValueError if its header does not say how it lies."""
    if first.directions is None or first.spacing is None or min(first.spacing) <= 0:
        raise ValueError(f'{first.path}: a position, but no ImageOrientationPatient or PixelSpacing to go with it')
    if not np.allclose(first.directions @ first.directions.T, np.eye(2), atol=1e-3):
        raise ValueError(f'{first.path}: orientation {first.directions.tolist()} is not two unit directions')
    return np.cross(*first.directions)


def _affine(slices):
    """Return the affine (4, 4) from (row, column, slice) to LPS mm, of slices on a line."""
    first, last = slices[0], slices[-1]
    across, down = first.directions
    step = _normal(first) * first.thickness
    if len(slices) > 1:
        step = (last.position - first.position) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([down * first.spacing[0], across * first.spacing[1], step, first.position], axis=1)
    if not lays_out(affine):
        size = [*first.spacing.tolist(), float(np.linalg.norm(step))]
        raise ValueError(f'{first.path}: a spacing of {size} mm, which no scan has')
    return affine


def _fault(slices):
    """Return what keeps ordered slices from lying on an even, upright grid; '' if they do."""
    if len(slices) < 2:
        return ''
    normal, places = _normal(slices[0]), np.array([s.position for s in slices])
    gaps = np.abs(np.diff(places @ normal))
    usual = usual_gap(gaps)
    allowed = _allowed(usual)
    k = np.abs(gaps - usual).argmax()
    if abs(gaps[k] - usual) > allowed:
        what = 'a slice is missing between them' if gaps[k] > 1.5 * usual else 'the slices are not evenly spaced'
        return f'{slices[k]} and {slices[k + 1]} lie {gaps[k]:.4g} mm apart, others {usual:.4g} mm: {what}'
    off = np.abs(places - np.linspace(places[0], places[-1], len(places))).max(axis=1)
    k = off.argmax()
    if off[k] > allowed:
        return f'{slices[k]} lies {off[k]:.4g} mm off the line from the first to the last slice'
    way = places[-1] - places[0]
    if np.linalg.norm(way - (way @ normal) * normal) > max(TILT * np.linalg.norm(way), ROUNDING):
        degrees = np.degrees(np.arccos(min(1, abs(way @ normal) / np.linalg.norm(way))))
        return f'slices are stacked {degrees:.1f} degrees off their normal (gantry tilt)'
    return ''


def _planes(slices):
    """Yield the HU of each slice, (rows, columns)."""
    for path, frames in itertools.groupby(slices, key=lambda s: s.path):
        stored = stored_values(path, slices[0].size)
        for s in frames:
            yield hounsfield(s, stored[s.frame or 0])
