"""Read one DICOM series: check its files and headers, order its slices, return HU with their geometry."""

import logging
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless, UID_dictionary

from running.files import MOST_VOXELS
from scans.geometry import Geometry, Scan, lays_out
from scans.voxels import DEFLATE_AT_BEST, stack_slices

START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of JPEG and JPEG-LS
MOST_PIXELS = 2**26  # of one slice
TILT = np.sin(np.radians(0.5))  # largest angle between the slices' normal and the stacking direction
UNEVEN = 0.1  # largest difference between a gap and the slice spacing, as a fraction of the spacing

logging.getLogger('pydicom').setLevel(logging.CRITICAL)  # our errors name the cause in one line
logging.getLogger('nibabel').setLevel(logging.CRITICAL)
warnings.filterwarnings('ignore', module='pydicom')


class DicomSlice(NamedTuple):
    """The header of one slice. Lengths in mm, directions and position in LPS; None where a value is missing."""

    path: Path
    series: str
    number: int  # InstanceNumber
    size: tuple  # rows, columns
    spacing: tuple | None  # between rows, between columns
    directions: np.ndarray | None  # (2, 3): along a row, and down a column
    position: np.ndarray | None  # of the first pixel
    thickness: float


def read_series(folder, say=print):
    """Return the one series in a folder as a Scan, its slices ordered by InstanceNumber.

    `say` prints each note on its own line. A series that is incomplete, tilted or mixed raises ValueError.
    """
    slices = _one_series(folder, [_header(path) for path in _image_files(folder, say)])
    _check_alike(slices)
    slices.sort(key=lambda s: s.number)
    _check_numbers(slices)
    geometry = None
    if slices[0].position is None:
        say('no positions in its headers: the order by InstanceNumber is not checked, and its place in the patient is unknown')
    else:
        geometry = Geometry(_affine(slices), 'position', str(folder), 'DICOM')
    planes = (_hounsfield(s) for s in slices)
    return Scan(stack_slices(planes, (len(slices), *slices[0].size), folder, say), geometry)


def is_slice(path):
    """Return whether a file is a DICOM image, or is named like one. Hidden files and other DICOM objects are not."""
    if path.name.startswith('.') or path.suffix in ('.npy', '.npz') or path.name == 'DICOMDIR' or not path.is_file():
        return False
    try:
        with open(path, 'rb') as file:
            if file.read(132)[128:] == b'DICM':
                kind = _value(path, 'SOPClassUID')
                return not kind or kind not in UID_dictionary or 'Image Storage' in UID_dictionary[kind][0]
    except (ValueError, OSError):
        pass  # reading it raises the error that names the cause
    return path.suffix.lower() in ('.dcm', '.ima')


def _image_files(folder, say):
    """Return the DICOM slices of a folder, sorted; print the name of every other file."""
    found = []
    for path in sorted(Path(folder).iterdir()):
        if is_slice(path):
            found.append(path)
        elif path.is_file() and not path.name.startswith('.'):
            say(f'{path.name} is not a DICOM image, skipped')
    return found


def _dataset(path, **options):
    """Return the pydicom Dataset of a file, without its pixels if `specific_tags` are given."""
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get('TransferSyntaxUID')
        if syntax == DeflatedExplicitVRLittleEndian:
            raise ValueError('it is deflated as a whole and could unpack to any size; save it uncompressed')
        return pydicom.dcmread(path, stop_before_pixels='specific_tags' in options, **options)
    except OSError:
        raise
    except pydicom.errors.InvalidDicomError:
        raise ValueError(f'{path}: not a DICOM file, though its name says so') from None
    except Exception as error:  # the parser raises many types on a broken file
        raise ValueError(f'{path}: not a readable DICOM file ({error})') from None


def modality(path):
    """Return the Modality of a DICOM file, such as CT; '' if it has none."""
    return _value(path, 'Modality')


def _value(path, tag):
    """Return a header value of a DICOM file as text; '' if it is missing."""
    dataset = _dataset(path, specific_tags=[tag])
    try:
        return str(dataset.get(tag) or '')
    except Exception as error:  # pydicom parses a value on first access, see _dataset
        raise ValueError(f'{path}: {error}') from None


def _header(path):
    """Return the DicomSlice of a file; raise ValueError unless it is one slice of grey values."""
    tags = (
        'SeriesInstanceUID InstanceNumber Rows Columns BitsAllocated PixelSpacing ImageOrientationPatient '
        'ImagePositionPatient SliceThickness SpacingBetweenSlices NumberOfFrames SamplesPerPixel PhotometricInterpretation'
    ).split()
    dataset = _dataset(path, specific_tags=tags)
    try:
        values = {tag: dataset.get(tag) for tag in tags}
        if not values['Rows'] or not values['Columns']:
            raise ValueError('no image in it; is the file truncated?')
        if int(values['NumberOfFrames'] or 1) > 1:
            raise ValueError('a multi-frame image; only one slice a file can be read')
        kind = str(values['PhotometricInterpretation'])
        if (values['SamplesPerPixel'] or 1) > 1 or not kind.startswith('MONOCHROME'):
            raise ValueError(f'a colour image ({kind}), not a slice of grey values')
        if values['InstanceNumber'] is None:
            raise ValueError('no InstanceNumber to order it by')
        size = int(values['Rows']), int(values['Columns'])
        _check_room(path, size, int(values['BitsAllocated'] or 0), dataset.file_meta.get('TransferSyntaxUID'))
        thickness = float(values['SpacingBetweenSlices'] or values['SliceThickness'] or 1)
        return DicomSlice(
            path,
            str(values['SeriesInstanceUID']),
            int(values['InstanceNumber']),
            size,
            _numbers(values['PixelSpacing'], (2,)),
            _numbers(values['ImageOrientationPatient'], (2, 3)),
            _numbers(values['ImagePositionPatient'], (3,)),
            thickness,
        )
    except Exception as error:  # see _value
        raise ValueError(f'{path}: {error}') from None


def _check_room(path, size, bits, syntax):
    """Check a header's size against its file before allocating memory."""
    if not syntax:
        raise ValueError('no TransferSyntaxUID, so its pixels cannot be decoded')
    room = os.path.getsize(path) * (DEFLATE_AT_BEST if syntax.is_compressed else 1)
    pixels = size[0] * size[1]
    if min(size) < 1 or pixels > MOST_PIXELS or pixels * max(bits, 8) > 8 * room:
        raise ValueError(
            f'its header claims {size} pixels of {bits} bits, more than the file can hold; is it truncated?'
        )


def _numbers(value, shape):
    """Return a header's list of numbers as an array of `shape`; None if it is missing or empty."""
    if not value:
        return None
    numbers = np.array(value, float)
    if numbers.size != np.prod(shape) or not np.isfinite(numbers).all():
        raise ValueError(f'{value} where {np.prod(shape)} numbers belong')
    return numbers.reshape(shape)


def _one_series(folder, slices):
    """Return the slices; raise an error unless they are of exactly one series."""
    if not slices:
        raise FileNotFoundError(f'{folder}: no DICOM series found in it')
    others = [s for s in slices if s.series != slices[0].series]
    if others:
        raise ValueError(
            f'{folder}: two series in one folder ({slices[0].path.name} and {others[0].path.name}); keep one of them'
        )
    return slices


def _check_alike(slices):
    """Refuse slices of different size, spacing or orientation, and a size that no scan has."""
    first = slices[0]
    for other in slices:
        if other.size != first.size:
            raise ValueError(f'{other.path}: {other.size} pixels, where {first.path.name} has {first.size}')
        for name in ('spacing', 'directions', 'position'):
            one, two = getattr(first, name), getattr(other, name)
            if (one is None) != (two is None):
                raise ValueError(
                    f'{(first if one is None else other).path}: no {name} in its header, unlike the others'
                )
            if name != 'position' and one is not None and not np.allclose(one, two, atol=1e-3):
                raise ValueError(f'{other.path}: {name} {two.tolist()}, where {first.path.name} has {one.tolist()}')
    if first.size[0] * first.size[1] * len(slices) > MOST_VOXELS:
        raise ValueError(f'{first.path}: its header claims {first.size} pixels, which no scan has')


def _check_numbers(slices):
    """Refuse repeated InstanceNumbers and, in a series without positions, missing ones."""
    for one, two in zip(slices, slices[1:]):
        if one.number == two.number:
            raise ValueError(f'{two.path}: repeated slice, InstanceNumber {two.number} is that of {one.path.name} too')
        if two.position is None and two.number > one.number + 1:
            raise ValueError(
                f'{two.path.parent}: slice missing, InstanceNumber {one.number} is followed by {two.number}'
            )


def _affine(slices):
    """Return the affine (4, 4) from (row, column, slice) to RAS+ mm; raise ValueError unless the stack is even."""
    first, last = slices[0], slices[-1]
    if first.directions is None or first.spacing is None or min(first.spacing) <= 0:
        raise ValueError(f'{first.path}: a position, but no ImageOrientationPatient or PixelSpacing to go with it')
    across, down = first.directions
    if not np.allclose(first.directions @ first.directions.T, np.eye(2), atol=1e-3):
        raise ValueError(
            f'{first.path}: ImageOrientationPatient {first.directions.tolist()} is not two unit directions'
        )
    normal = np.cross(across, down)
    step = normal * first.thickness
    if len(slices) > 1:
        _check_stack(slices, normal)
        step = (last.position - first.position) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([down * first.spacing[0], across * first.spacing[1], step, first.position], axis=1)
    if not lays_out(affine):
        raise ValueError(
            f'{first.path}: spacing {first.spacing.tolist()} and {first.thickness} mm are no voxel of a scan'
        )
    return np.diag([-1, -1, 1, 1]) @ affine  # LPS -> RAS


def _check_stack(slices, normal):
    """Refuse a stack with a tilt, a gap or a repeated slice, or in another order than its InstanceNumbers."""
    gaps = np.diff([s.position @ normal for s in slices])
    usual = np.sort(np.abs(gaps))[(len(gaps) - 1) // 2] * np.sign(gaps.sum())
    for one, two, gap in zip(slices, slices[1:], gaps):
        pair = f'{two.path}: InstanceNumber {one.number} and {two.number}'
        if abs(gap) < 1e-3:
            raise ValueError(f'{pair} lie at one position: a repeated slice')
        if gap * usual <= 0:
            raise ValueError(f'{pair} run against the other slices: the numbers do not follow the positions')
        if abs(gap - usual) > UNEVEN * abs(usual):
            what = 'a slice is missing between them' if gap / usual > 1.5 else 'the slices are not evenly spaced'
            raise ValueError(f'{pair} lie {abs(gap):.4g} mm apart, others {abs(usual):.4g} mm: {what}')
    way = slices[-1].position - slices[0].position
    if np.linalg.norm(way - (way @ normal) * normal) > TILT * np.linalg.norm(way):
        degrees = np.degrees(np.arccos(min(1, abs(way @ normal) / np.linalg.norm(way))))
        raise ValueError(
            f'{slices[0].path.parent}: slices are stacked {degrees:.1f} degrees off their normal (gantry tilt)'
        )


def _hounsfield(slice_):
    """Return a slice's HU, (rows, columns) float64: stored values times slope plus intercept."""
    dataset = _dataset(slice_.path)
    try:
        _check_coded_size(dataset, slice_.size)
        stored = dataset.pixel_array
        slope, intercept = (
            float(default if dataset.get(tag) is None else dataset.get(tag))
            for tag, default in (('RescaleSlope', 1), ('RescaleIntercept', 0))
        )
    except Exception as error:  # every decoder has its own errors
        raise ValueError(f'{slice_.path}: its pixels cannot be read; is the file truncated? ({error})') from None
    if stored.shape != slice_.size:
        raise ValueError(f'{slice_.path}: {stored.shape} pixels in it, where its header says {slice_.size}')
    if not (np.isfinite([slope, intercept]).all() and slope):
        raise ValueError(f'{slice_.path}: slope {slope} and intercept {intercept} give no HU')
    return stored * slope + intercept


def _check_coded_size(dataset, size):
    """Check a compressed slice's own size against its header: decoders allocate what the code asks for."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
        *coded, colours, bits = _coded_size(frame)
        if (tuple(coded), colours) != (size, 1) or not 2 <= bits <= 16:
            raise ValueError(f'its code claims {coded} pixels, {colours} colours and {bits} bits')


def _coded_size(frame):
    """Return (rows, columns, colours, bits) from a JPEG, JPEG-LS or JPEG 2000 frame; struct.error, IndexError if cut."""
    if frame[4:8] == b'jP  ':  # JPEG 2000 in a JP2 file: a chain of boxes
        at = 0
        while frame[at + 4 : at + 8] != b'jp2c':
            at += max(struct.unpack_from('>I', frame, at)[0], 8)
        frame = frame[at + 8 :]
    if frame[:4] == b'\xff\x4f\xff\x51':  # JPEG 2000
        right, bottom, left, top, *_, colours, bits = struct.unpack_from('>8IHB', frame, 8)
        return bottom - top, right - left, colours, (bits & 0x7F) + 1
    at = 2
    while frame[at + 1] not in START_OF_FRAME:  # a chain of segments and single fill bytes
        at += 1 if frame[at + 1] == 0xFF else 2 + struct.unpack_from('>H', frame, at + 2)[0]
    bits, rows, columns, colours = struct.unpack_from('>BHHB', frame, at + 4)
    return rows, columns, colours, bits


def series_folders(raw):
    """Yield (folder, whether it holds slices) for `raw` and every folder below it; follow links."""
    seen = set()
    for folder, below, files in os.walk(raw, followlinks=True):
        seen.add(os.path.realpath(folder))
        below[:] = sorted(b for b in below if b[0] != '.' and os.path.realpath(os.path.join(folder, b)) not in seen)
        yield Path(folder), any(is_slice(Path(folder, name)) for name in sorted(files))
