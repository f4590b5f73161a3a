"""Read one DICOM file without trusting it: a DicomSlice for each image, its pixels as HU."""

import logging
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from running.files import quoted
from scans.voxels import DEFLATE_AT_BEST

START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of JPEG and JPEG-LS
MOST_PIXELS = 2**26  # of one slice
TAGS = (
    'SOPInstanceUID Modality SeriesInstanceUID AcquisitionNumber InstanceNumber NumberOfFrames SamplesPerPixel '
    'PhotometricInterpretation Rows Columns BitsAllocated PixelRepresentation PixelSpacing ImageOrientationPatient '
    'ImagePositionPatient SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept ModalityLUTSequence '
    'PixelPaddingValue PixelPaddingRangeLimit SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence'
).split()

logging.getLogger('pydicom').setLevel(logging.CRITICAL)  # our errors name the cause in one line
warnings.filterwarnings('ignore', module='pydicom')


class DicomSlice(NamedTuple):
    """The header of one slice: lengths in mm, directions and position in LPS; None if missing."""

    path: Path
    frame: int | None  # from 0, in a file of several
    uid: str  # SOPInstanceUID
    series: str
    acquisition: str
    number: int | None  # InstanceNumber; of a frame, its place in the file
    size: tuple  # rows, columns
    spacing: tuple | None  # between rows, between columns
    directions: np.ndarray | None  # (2, 3): along a row, and down a column
    position: np.ndarray | None  # of the first pixel
    thickness: float
    slope: float
    intercept: float
    padding: tuple | None  # first and last stored value that means: outside the field of view

    def __str__(self):
        number = 'no InstanceNumber' if self.number is None else f'InstanceNumber {self.number}'
        return f'{self.path.name} ({number if self.frame is None else f"frame {self.number}"})'


# --- headers -------------------------------------------------------------------------------------------------------


def read_slices(path):
    """Return the DicomSlices of a file, one a frame; ValueError unless they are grey values."""
    dataset = _dataset(path, specific_tags=TAGS)
    try:
        _check_room(path, dataset, dataset.file_meta.get('TransferSyntaxUID'))
        return [_slice(path, k, frame) for k, frame in _frames(dataset)]
    except Exception as error:  # pydicom parses a value on first access, see _dataset
        raise ValueError(f'{path}: {error}') from None


def header_value(path, tag):
    """Return a value of a DICOM file's header or meta information as text; '' if it is missing."""
    dataset = _dataset(path, specific_tags=[tag])
    try:
        return str(dataset.get(tag) or dataset.file_meta.get(tag) or '')
    except Exception as error:  # see read_slices
        raise ValueError(f'{path}: {error}') from None


def _dataset(path, **options):
    """Return the pydicom Dataset of a file, without its pixels if `specific_tags` are given."""
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get('TransferSyntaxUID')
        if syntax == DeflatedExplicitVRLittleEndian:
            raise ValueError('it is deflated as a whole and could unpack to any size; save it uncompressed')
        return pydicom.dcmread(path, stop_before_pixels='specific_tags' in options, **options)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file; is it a dangling link?') from None
    except OSError:
        raise
    except pydicom.errors.InvalidDicomError:
        raise ValueError(f'{path}: not a DICOM file, though its name says so') from None
    except Exception as error:  # the parser raises many types on a broken file
        raise ValueError(f'{path}: not a readable DICOM file ({error})') from None


def _check_room(path, dataset, syntax):
    """Check a header's size against its file before allocating memory."""
    if not dataset.get('Rows') or not dataset.get('Columns'):
        raise ValueError('no image in it; is the file truncated?')
    if not syntax:
        raise ValueError('no TransferSyntaxUID, so its pixels cannot be decoded')
    size = _number(dataset, 'Rows', kind=int), _number(dataset, 'Columns', kind=int)
    bits, frames = _number(dataset, 'BitsAllocated', 0, int), _number(dataset, 'NumberOfFrames', 1, int)
    room = os.path.getsize(path) * (DEFLATE_AT_BEST if syntax.is_compressed else 1)
    pixels = size[0] * size[1]
    if min(size) < 1 or pixels > MOST_PIXELS or pixels * frames * max(bits, 8) > 8 * room:
        claim = f'{size} pixels of {bits} bits' + (f' in {frames} frames' if frames > 1 else '')
        raise ValueError(f'its header claims {claim}, more than the file can hold; is it truncated?')


def _frames(dataset):
    """Yield (frame or None, {tag: value}) of each image.

    The frame's own functional groups go before the shared ones, and these before the header.
    """
    frames = int(dataset.get('NumberOfFrames') or 1)
    shared, *_ = dataset.get('SharedFunctionalGroupsSequence') or [()]
    own = dataset.get('PerFrameFunctionalGroupsSequence') or [()]
    if len(own) != frames:
        raise ValueError(f'{frames} frames, but {len(own)} functional groups that say where each lies')
    for k, groups in enumerate(own):
        macros = [macro.value[0] for macro in (*shared, *groups) if macro.VR == 'SQ' and macro.value]
        yield k if frames > 1 else None, {e.keyword: e.value for part in (dataset, *macros) for e in part}


def _slice(path, frame, values):
    """Return the DicomSlice of an image from the values of its header."""
    kind = str(values.get('PhotometricInterpretation'))
    if _number(values, 'SamplesPerPixel', 1) > 1 or not kind.startswith('MONOCHROME'):
        raise ValueError(f'a colour image ({kind}), not a slice of grey values')
    if values.get('ModalityLUTSequence'):
        raise ValueError('a table (ModalityLUTSequence) gives its values, not slope and intercept: this is not read')
    slope, intercept = _number(values, 'RescaleSlope', 1), _number(values, 'RescaleIntercept', 0)
    if not (np.isfinite([slope, intercept]).all() and slope):
        raise ValueError(f'slope {slope} and intercept {intercept} give no HU')
    return DicomSlice(
        path=path,
        frame=frame,
        uid=str(values.get('SOPInstanceUID')),
        series=str(values.get('SeriesInstanceUID')),
        acquisition=str(values.get('FrameAcquisitionNumber') or values.get('AcquisitionNumber') or ''),
        number=_number(values, 'InstanceNumber', kind=int) if frame is None else frame + 1,
        size=(_number(values, 'Rows', kind=int), _number(values, 'Columns', kind=int)),
        spacing=_numbers(values, 'PixelSpacing', (2,)),
        directions=_numbers(values, 'ImageOrientationPatient', (2, 3)),
        position=_numbers(values, 'ImagePositionPatient', (3,)),
        thickness=_number(values, 'SpacingBetweenSlices') or _number(values, 'SliceThickness') or 1,
        slope=slope,
        intercept=intercept,
        padding=_padding(values),
    )


def _padding(values):
    """Return the (first, last) stored value of padding; None without, or if it is not CT."""
    first = _number(values, 'PixelPaddingValue', kind=int)
    if first is None or values.get('Modality', 'CT') not in ('', 'CT'):
        return None
    return first, _number(values, 'PixelPaddingRangeLimit', first, int)


def _number(values, tag, default=None, kind=float):
    """Return a header's number; the default if it is missing or empty."""
    value = values.get(tag)
    try:
        return default if value is None or value == '' else kind(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'{tag} {quoted(str(value))} is not a number') from None


def _numbers(values, tag, shape):
    """Return a header's list of numbers as an array of `shape`; None if it is missing or empty."""
    value = values.get(tag)
    if not value:
        return None
    try:
        numbers = np.array(value, float).reshape(shape)
        if np.isfinite(numbers).all():
            return numbers
    except (TypeError, ValueError):
        pass
    raise ValueError(f'{tag} {quoted(str(value))} where {np.prod(shape)} numbers belong')


# --- pixels --------------------------------------------------------------------------------------------------------


def stored_values(path, size):
    """Return the stored pixels of a file, (frames, rows, columns)."""
    dataset = _dataset(path)
    try:
        _check_coded_size(dataset, size)
        stored = dataset.pixel_array
    except Exception as error:  # every decoder has its own errors
        raise ValueError(f'{path}: its pixels cannot be read; is the file truncated? ({error})') from None
    if stored.ndim > 3 or stored.shape[-2:] != size:
        raise ValueError(f'{path}: {stored.shape} pixels in it, where its header says {size}')
    return stored.reshape(-1, *size)


def hounsfield(slice_, stored):
    """Return a slice's HU, (rows, columns) float64: stored values times slope plus intercept.

    Padding outside the field of view is NaN.
    """
    hu = stored * slice_.slope + slice_.intercept
    if slice_.padding:
        words = np.array([value & 0xFFFFFFFF for value in slice_.padding], np.int64)
        first, last = sorted(words.astype(stored.dtype))  # -2000 may be written as 63536
        hu[(first <= stored) & (stored <= last)] = np.nan
    return hu


def _check_coded_size(dataset, size):
    """Check a compressed slice's own size against its header: decoders believe the slice."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get('NumberOfFrames') or 1)):
            *coded, colours, bits = _coded_size(frame)
            if (tuple(coded), colours) != (size, 1) or not 2 <= bits <= 16:
                raise ValueError(f'its code claims {coded} pixels, {colours} colours and {bits} bits')


def _coded_size(frame):
    """Return (rows, columns, colours, bits) of a JPEG, JPEG-LS or JPEG 2000 frame.

    struct.error, IndexError: it is cut off.
    """
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
