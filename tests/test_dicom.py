"""dicom2npy.py on DICOM series made here: what it reads and refuses, and the line that says why.

Each table reads: what is wrong -> (how to make it, what the line says). Each bad series is made from
six good slices.
"""

import copy
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from raw_scans import (
    AXIAL,
    BOMB,
    DICOM2NPY,
    REPO,
    convert,
    converted,
    enhanced,
    geometry,
    loaded,
    make_slices,
    random_volume,
    write_slices,
    zeros,
)

from scans.dicom import series_folders

# --- how a series is spoilt -----------------------------------------------------------------------------------------


def change(number, **tags):
    """Set these tags in the slice of this number."""

    def bad(slices):
        for tag, value in tags.items():
            setattr(slices[number - 1], tag, value)

    return bad


def change_all(**tags):
    return lambda slices: [setattr(s, tag, value) for s in slices for tag, value in tags.items()]


def element(number, tag, vr, value):
    """Put an element of this value representation, right or not, into the slice of this number."""
    return lambda slices: slices[number - 1].add_new(tag, vr, value)


def without(*tags):
    return lambda slices: [delattr(s, tag) for s in slices for tag in tags]


def drop(number):
    return lambda slices: slices.pop(number - 1)


def then(*steps):
    return lambda slices: [step(slices) for step in steps]


def again(slices, **tags):
    """Return the same slices once more, of the same series."""
    copies = copy.deepcopy(slices)
    for s in copies:
        s.SOPInstanceUID, s.AcquisitionNumber = generate_uid(), 1
    for s in slices:
        s.AcquisitionNumber = 1
    change_all(**tags)(copies)
    return copies


def tilt(slices):
    for s in slices:
        s.ImagePositionPatient = [-10, -20 + s.InstanceNumber / 2, s.ImagePositionPatient[2]]


def packed_pixels(content):
    """Replace RLE pixels by these bytes."""

    def bad(slices):
        for s in slices:
            s.compress(RLELossless)
            s.PixelData = (
                b'\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0' + struct.pack('<I', len(content)) + content
            )

    return bad


# --- what is read --------------------------------------------------------------------------------------------------


def test_a_case_is_named_by_the_first_folder_that_tells_the_series_apart(tmp_path):
    for case in ('anna', 'bert'):
        write_slices(tmp_path / 'raw/study' / case / 'CT', make_slices(random_volume()))
    convert('dicom2npy.py', tmp_path / 'raw', tmp_path / 'out')
    assert list(loaded(tmp_path / 'out', 'images')) == ['anna', 'bert']
    convert('dicom2npy.py', tmp_path / 'raw/study/anna', tmp_path / 'one')
    assert list(loaded(tmp_path / 'one', 'images')) == ['CT']
    convert('dicom2npy.py', tmp_path / 'raw/study/anna/CT', tmp_path / 'itself')
    assert list(loaded(tmp_path / 'itself', 'images')) == ['CT']


def test_slope_intercept_rounding_and_limits(tmp_path):
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 100
    for case, slope, intercept in (('plain', 1, -1024), ('half', 0.5, -10.25), ('steep', 40, 0)):
        slices = make_slices(stored, intercept=0, RescaleSlope=slope, RescaleIntercept=intercept)
        write_slices(tmp_path / case, slices)
    unsigned = make_slices(stored, intercept=0, PixelRepresentation=0)
    for s in unsigned:
        s.PixelData = np.full((2, 3), 60000, '<u2').tobytes()
        s.RescaleIntercept = -50000
        del s.RescaleSlope
    write_slices(tmp_path / 'unsigned', unsigned)

    said, _ = convert('dicom2npy.py', tmp_path)
    images = loaded(tmp_path, 'images')
    np.testing.assert_array_equal(images['plain'], stored - 1024)
    np.testing.assert_array_equal(images['half'], np.rint(stored * 0.5 - 10.25))
    np.testing.assert_array_equal(images['steep'], np.minimum(stored.astype(int) * 40, 32767))
    assert (images['unsigned'] == 10000).all()
    assert 'half: values rounded to whole HU' in said and 'steep: values beyond -32768 to 32767 HU cut off' in said
    assert 'plain: values' not in said and 'unsigned: values' not in said


def test_compressed_slices_and_what_else_lies_among_them(tmp_path):
    volume = random_volume()
    slices = make_slices(volume)
    for s in slices:
        s.compress(RLELossless)
    write_slices(tmp_path / 'a', slices)
    (tmp_path / 'a/notes.txt').write_text('not DICOM')
    (tmp_path / 'a/.DS_Store').write_text('hidden')
    report = make_slices(volume)[0]
    report.SOPClassUID = '1.2.840.10008.5.1.4.1.1.88.33'  # a structured report
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.save_as(tmp_path / 'a/report.dcm', enforce_file_format=True)
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    np.testing.assert_array_equal(loaded(tmp_path / 'out', 'images')['a'], volume)
    for line in ('hidden: .DS_Store', 'not DICOM: notes.txt', 'Comprehensive SR Storage: report.dcm'):
        assert f'a: 1 left out, {line}' in said


PHILIPS = ('1.3.46.670589.11.0.0.12.2', '1.2.840.10008.5.1.4.1.1.11.1', '1.2.840.10008.5.1.4.1.1.66')


def test_objects_that_are_no_images_are_told_by_their_SOP_class(tmp_path):
    """Philips series hold private objects, presentation states, raw data; any name may be a DICOMDIR."""
    volume = random_volume()
    write_slices(tmp_path / 'a', make_slices(volume))
    for i, uid in enumerate((*PHILIPS, '1.2.840.10008.1.3.10')):
        other = Dataset()
        other.SOPClassUID, other.SOPInstanceUID, other.SeriesInstanceUID = uid, generate_uid(), generate_uid()
        if i == 3:
            del other.SOPClassUID  # a DICOMDIR names it in the file's meta information alone
        other.file_meta = FileMetaDataset()
        other.file_meta.MediaStorageSOPClassUID, other.file_meta.MediaStorageSOPInstanceUID = uid, generate_uid()
        other.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        other.save_as(tmp_path / f'a/{900 + i}.dcm', enforce_file_format=True)
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    for kind in ('private SOP class 1.3.46', 'Grayscale Softcopy', 'Raw Data Storage', 'Media Storage Directory'):
        assert f'a: 1 left out, {kind}' in said, said
    np.testing.assert_array_equal(loaded(tmp_path / 'out', 'images')['a'], volume)


SHUFFLED = {
    'missing': lambda slices: [delattr(s, 'InstanceNumber') for s in slices],
    'empty': change_all(InstanceNumber=None),
    'shuffled': lambda slices: [setattr(s, 'InstanceNumber', n) for s, n in zip(slices, (2, 5, 1, 6, 3, 4))],
    'all_one': change_all(InstanceNumber=1),
}


def test_positions_order_slices_without_sound_InstanceNumbers_downwards_as_in_NIH(tmp_path):
    volume = random_volume(shape=(6, 5, 6))
    for case, spoil in SHUFFLED.items():
        slices = make_slices(volume)
        spoil(slices)
        write_slices(tmp_path / case, slices)
    upwards = make_slices(volume)
    for s in upwards:
        s.InstanceNumber = 7 - s.InstanceNumber
    write_slices(tmp_path / 'upwards', upwards)
    upwards[2].InstanceNumber, upwards[3].InstanceNumber = upwards[3].InstanceNumber, upwards[2].InstanceNumber
    write_slices(tmp_path / 'upwards_but_for_two', upwards)
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    images = loaded(tmp_path / 'out', 'images')
    for case in SHUFFLED:
        np.testing.assert_array_equal(images[case], volume)
        assert geometry(tmp_path / 'out', case)['affine'][2][2] == -5
        assert f'{case}: InstanceNumbers are missing, repeated or not in the order of the positions' in said
    for case in ('upwards', 'upwards_but_for_two'):
        np.testing.assert_array_equal(images[case], volume[:, :, ::-1])
    assert 'upwards: InstanceNumbers' not in said and 'upwards_but_for_two: InstanceNumbers' in said


def test_positions_rounded_to_a_tenth_of_a_millimetre(tmp_path):
    slices = make_slices(random_volume(shape=(6, 5, 30)), start=(-10.04, -20.06, 50.03), spacing=(0.7, 0.7, 0.625))
    for s in slices:
        s.ImagePositionPatient = [round(float(v), 1) for v in s.ImagePositionPatient]
    write_slices(tmp_path / 'a', slices)
    convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    assert abs(geometry(tmp_path / 'out', 'a')['spacing'][2] - 0.625) < 0.005


def test_a_copy_of_a_slice_is_skipped_and_a_slice_like_it_is_not(call, tmp_path):
    volume = random_volume()
    write_slices(tmp_path / 'raw/a', make_slices(volume))
    shutil.copy(tmp_path / 'raw/a/007.dcm', tmp_path / 'raw/a/007 (1).dcm')
    said = call(DICOM2NPY, tmp_path / 'raw', tmp_path / 'out').out
    assert 'a: 007.dcm is a copy of 007 (1).dcm, skipped' in said
    np.testing.assert_array_equal(loaded(tmp_path / 'out', 'images')['a'], volume)
    shutil.rmtree(tmp_path / 'out')
    content = bytearray((tmp_path / 'raw/a/007.dcm').read_bytes())
    content[-1] ^= 1
    (tmp_path / 'raw/a/007 (1).dcm').write_bytes(content)
    assert 'lie at one position: a repeated slice' in converted(call, tmp_path)


def test_one_acquisition_of_several_is_chosen_by_its_number(tmp_path):
    first, second = random_volume(1), random_volume(2)
    slices = make_slices(first, AcquisitionNumber=1)
    later = make_slices(second, AcquisitionNumber=2, SeriesInstanceUID=slices[0].SeriesInstanceUID)
    write_slices(tmp_path / 'raw/a', slices + later)
    said, _ = convert('dicom2npy.py', tmp_path / 'raw', tmp_path / 'out', status=1)
    assert 'its acquisitions 1 (4 slices), 2 (4 slices) overlap' in said and '--acquisition' in said
    for number, volume in (('1', first), ('2', second)):
        said, _ = convert('dicom2npy.py', tmp_path / 'raw', tmp_path / number, '--acquisition', number)
        assert f'a: acquisitions 1 (4 slices), 2 (4 slices): only {number} is read' in said
        np.testing.assert_array_equal(loaded(tmp_path / number, 'images')['a'], volume)
    said, _ = convert('dicom2npy.py', tmp_path / 'raw', tmp_path / 'out', '--acquisition', '9', status=1)
    assert 'no slice of acquisition 9; there are 1 (4 slices), 2 (4 slices)' in said


def test_acquisitions_of_one_volume_are_counted_and_read_as_one(tmp_path):
    volume = random_volume(shape=(6, 5, 6))
    slices = make_slices(volume)
    for s, number in zip(slices, (1, 1, 2, 2, 10, 10)):
        s.AcquisitionNumber = number
    write_slices(tmp_path / 'a', slices)
    said, _ = convert('dicom2npy.py', tmp_path)
    assert 'a: acquisitions 1 (2 slices), 2 (2 slices), 10 (2 slices): all are read' in said
    np.testing.assert_array_equal(loaded(tmp_path, 'images')['a'], volume)


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_padding_becomes_air_and_is_counted(tmp_path, syntax):
    volume = random_volume()
    volume[0, :2], volume[1, 0] = 1024 - 24, -1020  # stored 2024 is padding, and so is all up to 2030
    slices = make_slices(volume, PixelPaddingValue=2030, PixelPaddingRangeLimit=2024)
    signed = make_slices(volume, intercept=0)
    for s in signed:
        s.add_new('PixelPaddingValue', 'US', 63536)  # -2000, written as if it were unsigned
        s.PixelData = np.full((6, 5), -2000, '<i2').tobytes() if s.InstanceNumber == 1 else s.PixelData
    for s in (*slices, *signed):
        s.file_meta.TransferSyntaxUID = syntax
    write_slices(tmp_path / 'range', slices)
    write_slices(tmp_path / 'signed', signed)
    write_slices(tmp_path / 'mr', make_slices(volume, Modality='MR', PixelPaddingValue=2024))
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    images = loaded(tmp_path / 'out', 'images')
    expected = volume.copy()
    expected[0, :2] = -1024
    np.testing.assert_array_equal(images['range'], expected)
    assert 'range: 8 voxels (6.7%) lie outside the field of view (NaN or padding): set to -1024 HU' in said
    assert (images['signed'][:, :, 0] == -1024).all() and (images['signed'][:, :, 1:] == volume[:, :, 1:]).all()
    np.testing.assert_array_equal(images['mr'], volume)
    assert 'mr: ' in said and 'outside the field of view' not in said.split('mr: ')[1].split('range: ')[0]


def test_enhanced_CT_is_read_with_one_frame_a_file_and_with_all_in_one(tmp_path):
    volume = random_volume()
    write_slices(tmp_path / 'one_each', enhanced(make_slices(volume)))
    write_slices(tmp_path / 'all_in_one', enhanced(make_slices(volume), frames=4))
    packed = enhanced(make_slices(volume), frames=4)
    packed[0].compress(RLELossless)
    write_slices(tmp_path / 'packed', packed)
    shuffled = make_slices(volume)
    order = [2, 0, 3, 1]
    write_slices(tmp_path / 'shuffled', enhanced([shuffled[k] for k in order], frames=4))
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    for case, image in loaded(tmp_path / 'out', 'images').items():
        np.testing.assert_array_equal(image, volume, err_msg=case)
        assert geometry(tmp_path / 'out', case)['spacing'] == [2, 3, 5]
    assert 'shuffled: InstanceNumbers are missing, repeated or not in the order' in said


def test_blanks_in_a_folder_become_underscores(tmp_path):
    for name in ('Anna  B', 'a\nb', 'c d', 'c_d'):
        write_slices(tmp_path / 'raw' / name, make_slices(random_volume()))
    said, _ = convert('dicom2npy.py', tmp_path / 'raw', tmp_path / 'out', status=1)
    assert list(loaded(tmp_path / 'out', 'images')) == ['Anna__B', 'a_b']
    assert "Anna__B: named after the folder 'Anna  B', its white space replaced by _" in said
    assert 'c_d: error: 2 sources for one case' in said


# --- resampling ----------------------------------------------------------------------------------------------------


def ramp(row, column, z):
    """Return HU at a place (mm, LPS y, x, z): linear, so that linear interpolation is exact."""
    return row + 2 * column - 3 * z


def scanned(positions, shape=(8, 7)):
    """Return slices of the ramp at these first pixels, 2 x 3 mm, and their positions."""
    volume = np.zeros((*shape, len(positions)), np.int16)
    for k, (x, y, z) in enumerate(positions):
        rows, columns = np.indices(shape)
        volume[:, :, k] = np.rint(ramp(y + 2 * rows, x + 3 * columns, z))
    slices = make_slices(volume)
    for s, position in zip(slices, positions):
        s.ImagePositionPatient = list(position)
    return slices


@pytest.mark.parametrize(
    ('positions', 'shape', 'spacing', 'line'),
    [
        ([(-10, -20 + k, 50 - 5 * k) for k in range(6)], (11, 7, 6), 5, '11.3 degrees off their normal (gantry tilt)'),
        ([(-10, -20 - k, 50 - 5 * k) for k in range(6)], (11, 7, 6), 5, '11.3 degrees off their normal (gantry tilt)'),
        ([(-10 + 1.5 * k, -20, 50 + 5 * k) for k in range(5)], (8, 9, 5), 5, '16.7 degrees off their normal'),
        ([(-10, -20, 50 - 5 * k) for k in (0, 1, 2, 4, 5)], (8, 7, 6), 5, 'a slice is missing between them'),
        ([(-10, -20, 50 - z) for z in (0, 5, 10, 13, 18)], (8, 7, 5), 4.5, 'the slices are not evenly spaced'),
    ],
    ids=['tilted', 'tilted_back', 'sheared_to_the_left', 'a_gap', 'uneven'],
)
def test_a_series_is_resampled_only_if_asked(positions, shape, spacing, line, call, tmp_path):
    write_slices(tmp_path / 'raw/a', scanned(positions))
    error = converted(call, tmp_path)
    assert line in error and '--resample' in error
    done = call(DICOM2NPY, tmp_path / 'raw', tmp_path / 'out', '--resample')
    assert done.code == 0 and line in done.out and ': resampled by linear interpolation' in done.out
    image = loaded(tmp_path / 'out', 'images')['a']
    assert image.shape == shape
    affine = np.array(geometry(tmp_path / 'out', 'a')['affine'])
    np.testing.assert_allclose(np.linalg.norm(affine[:, :3], axis=0), [2, 3, spacing])
    np.testing.assert_allclose(affine[:3, :3].T @ affine[:3, :3], np.diag([4, 9, spacing**2]), atol=1e-9)
    places = np.einsum('ij,jrck->irck', affine, np.stack([*np.indices(shape), np.ones(shape)]))
    x, y, z = places[:3] * np.array([-1, -1, 1]).reshape(3, 1, 1, 1)
    inside = image != -1024
    np.testing.assert_allclose(image[inside], ramp(y, x, z)[inside], atol=1.01)
    assert inside.mean() > 0.6 and inside[:, :, 0].sum() == 8 * 7


def test_slices_that_lie_too_far_apart_are_not_resampled(call, tmp_path):
    write_slices(tmp_path / 'raw/a', make_slices(random_volume(shape=(6, 5, 3))))
    last = pydicom.dcmread(tmp_path / 'raw/a/014.dcm')
    last.ImagePositionPatient = [-10, -20, -1e10]
    last.save_as(tmp_path / 'raw/a/014.dcm')
    done = call(DICOM2NPY, tmp_path / 'raw', tmp_path / 'out', '--resample')
    assert done.code == 1 and 'its slices lie too far apart for one grid' in done.out


# --- files that are left out ---------------------------------------------------------------------------------------


def test_files_that_are_left_out_are_named_and_counted(tmp_path):
    write_slices(tmp_path / 'a', make_slices(random_volume()))
    for name in ('.DS_Store', '._000.dcm'):
        (tmp_path / 'a' / name).write_text('hidden')
    for i in range(7):
        (tmp_path / f'a/note{i}.txt').write_text('text')
    (tmp_path / 'a/done').touch()
    (tmp_path / 'a/more').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(tmp_path / 'a/pipe')
    said, _ = convert('dicom2npy.py', tmp_path, tmp_path / 'out')
    for line in (
        '2 left out, hidden: .DS_Store, ._000.dcm', '1 left out, empty: done', '1 left out, a dangling link: more',
        '7 left out, not DICOM: note0.txt, note1.txt, note2.txt, note3.txt, note4.txt and 2 more',
        '1 left out, not a file: pipe',
    ):  # fmt: skip
        assert f'a: {line}' in said, said


def link_nowhere(path):
    path.unlink()
    path.symlink_to(path.parent / 'nowhere')


LOST = {
    'a dangling link': (link_nowhere, 'no such file; is it a dangling link?', 'a dangling link among the slices'),
    'an empty file': (
        lambda path: path.write_bytes(b''), 'not a DICOM file, though its name says so', 'empty among the slices',
    ),
    'a hidden slice': (
        lambda path: path.rename(path.parent / f'.{path.name}'), 'a hidden DICOM image', 'a hidden DICOM image among',
    ),
    'zeros': (
        lambda path: path.write_bytes(bytes(500)), 'not a DICOM file, though its name says so', 'not DICOM among',
    ),
}  # fmt: skip


@pytest.mark.parametrize('ending', ['.dcm', ''], ids=['dcm', 'no_ending'])
@pytest.mark.parametrize('what', LOST)
def test_a_series_that_loses_its_last_slice_is_an_error(what, ending, call, tmp_path):
    spoil, *lines = LOST[what]
    write_slices(tmp_path / 'raw/a', make_slices(random_volume()))
    for path in list((tmp_path / 'raw/a').iterdir()):
        path.rename(path.with_name(f'IM{path.stem}{ending}'))
    spoil(tmp_path / f'raw/a/IM021{ending}')
    assert lines[ending == ''] in converted(call, tmp_path)


@pytest.mark.parametrize('part', [slice(0, 3), slice(0, 6, 2)], ids=['upper_half', 'every_second'])
def test_two_halves_of_one_scan_are_not_two_cases(part, tmp_path):
    slices = make_slices(random_volume(shape=(6, 5, 6)), PatientID='p', FrameOfReferenceUID='1.2.3')
    half = slices[part]
    write_slices(tmp_path / 'raw/study/a', half)
    write_slices(tmp_path / 'raw/study/b', [s for s in slices if s not in half])
    write_slices(tmp_path / 'raw/study/c', make_slices(random_volume(), PatientID='p', FrameOfReferenceUID='1.2.3'))
    said, _ = convert('dicom2npy.py', tmp_path / 'raw', tmp_path / 'out', status=1)
    for case in 'ab':
        assert f'{case}: error: ' in said and 'look like parts of one scan; put its slices into one folder' in said
    assert list(loaded(tmp_path / 'out', 'images')) == ['c']


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write_slices(tmp_path / 'raw/a', make_slices(random_volume()))
    (tmp_path / 'raw/b').mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == 'b':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)  # root may read everything
    with pytest.raises(PermissionError, match='raw/b'):
        list(series_folders(tmp_path / 'raw'))


ORIENTATIONS = {  # (row direction, column direction), LPS
    'head_first': AXIAL,
    'back_to_front': [-1, 0, 0, 0, -1, 0],
    'sagittal': [0, 1, 0, 0, 0, -1],
    'coronal': [1, 0, 0, 0, 0, -1],
    'oblique': [0.8, 0.6, 0, -0.6, 0.8, 0],
}


def test_geometry_is_RAS_of_the_array_as_stored(tmp_path):
    for case, orientation in ORIENTATIONS.items():
        write_slices(tmp_path / case, make_slices(random_volume(), orientation))
    slices = make_slices(random_volume())
    for s in slices:
        del s.ImagePositionPatient, s.ImageOrientationPatient
    write_slices(tmp_path / 'nowhere', slices)
    said, _ = convert('dicom2npy.py', tmp_path)

    for case, orientation in ORIENTATIONS.items():
        across, down = np.array(orientation, float).reshape(2, 3)
        row, column, k = 3, 2, 1  # a voxel, and where the DICOM standard puts it
        place = np.array([-10, -20, 50]) + row * 2.0 * down + column * 3.0 * across - k * 5.0 * np.cross(across, down)
        kept = geometry(tmp_path, case)
        np.testing.assert_allclose(
            np.array(kept['affine']) @ [row, column, k, 1], [*(place * [-1, -1, 1]), 1], atol=1e-6
        )
        np.testing.assert_allclose(kept['spacing'], [2, 3, 5])
        assert kept['type'] == 'DICOM' and kept['source'] == str(tmp_path / case)
    assert 'nowhere: no positions in its headers' in said and geometry(tmp_path, 'nowhere')['holds'] == 'nothing'


# --- what is refused: series ---------------------------------------------------------------------------------------


SERIES = {
    'two series mixed': (change(3, SeriesInstanceUID='1.2.3'), 'two series in one folder'),
    'a slice left out': (
        drop(3), '007.dcm (InstanceNumber 2) and 014.dcm (InstanceNumber 4) lie 10 mm apart, others 5 mm: a slice is missing',
    ),
    'a slice left out, without positions': (
        then(drop(3), without('ImagePositionPatient', 'ImageOrientationPatient')),
        'slice missing, InstanceNumber 2 is followed by 4',
    ),
    'a number twice, without positions': (
        then(change(4, InstanceNumber=3), without('ImagePositionPatient')),
        'slice repeated, InstanceNumber 3 is followed by 3',
    ),
    'no InstanceNumber and no position': (
        without('InstanceNumber', 'ImagePositionPatient'), 'neither a position nor an InstanceNumber',
    ),
    'a position twice': (
        change(4, ImagePositionPatient=[-10, -20, 40]), '(InstanceNumber 4) lie at one position: a repeated slice',
    ),
    'a position in the place of another': (
        change(4, ImagePositionPatient=[-10, -20, 47]), '10 mm apart, others 5 mm: a slice is missing between them',
    ),
    'slices shifted sideways': (
        change(4, ImagePositionPatient=[30, -20, 35]), '021.dcm (InstanceNumber 4) lies 40 mm off the line from the first',
    ),
    'slices shifted to the back': (
        change(2, ImagePositionPatient=[-10, -21, 45]), '007.dcm (InstanceNumber 2) lies 1 mm off the line from the first',
    ),
    'gaps that shrink': (
        lambda slices: [
            change(n, ImagePositionPatient=[-10, -20, 50 - z])(slices)
            for n, z in enumerate((0, 5.4, 10.8, 15.8, 20.4, 25), 1)
        ],
        '014.dcm (InstanceNumber 3) lies 0.8 mm off the line from the first to the last slice',
    ),
    'two acquisitions': (
        lambda slices: slices.extend(again(slices, AcquisitionNumber=2)),
        'its acquisitions 1 (6 slices), 2 (6 slices) overlap; keep one of them, or give dicom2npy.py --acquisition 1',
    ),
    'two acquisitions, the second between the slices of the first': (
        lambda slices: [change(n, AcquisitionNumber=n % 2 + 1)(slices) for n in range(1, 7)],
        'its acquisitions 1 (3 slices), 2 (3 slices) overlap; keep one of them, or give dicom2npy.py --acquisition 1',
    ),
    'an acquisition that repeats a slice of another': (
        lambda slices: slices.extend(again(slices, AcquisitionNumber=2)[3:4]),
        'its acquisitions 1 (6 slices), 2 (1 slices) overlap',
    ),
    'a modality table': (change(3, ModalityLUTSequence=[Dataset()]), 'a table (ModalityLUTSequence) gives its values'),
    'nothing but padding': (
        change_all(PixelPaddingValue=-32768, PixelPaddingRangeLimit=32767), 'all its values are NaN',
    ),
    'uneven gaps': (change(4, ImagePositionPatient=[-10, -20, 36]), 'the slices are not evenly spaced'),
    'another size': (change(4, Rows=3), '(3, 5) pixels, where'),
    'another spacing': (change(4, PixelSpacing=[2, 2]), 'spacing [2.0, 2.0], where'),
    'another orientation': (change(4, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), 'directions'),
    'one slice without a position': (
        change(4, ImagePositionPatient=None), 'no position in its header, unlike the others',
    ),
    'a tilted gantry': (tilt, 'gantry tilt'),
    'an InstanceNumber in words': (element(2, 'InstanceNumber', 'LO', 'two'), "InstanceNumber 'two' is not a number"),
    'two InstanceNumbers in one slice': (element(2, 'InstanceNumber', 'IS', [2, 3]), "InstanceNumber '[2, 3]' is not"),
    'no pixels claimed': (change(2, Rows=0), 'no image in it'),
    'no Columns': (without('Columns'), 'no image in it'),
    'Rows twice': (element(2, 'Rows', 'US', [6, 6]), "Rows '[6, 6]' is not a number"),
    'negative Rows': (element(2, 'Rows', 'SS', -6), 'its header claims (-6, 5) pixels'),
    'a size that no scan has': (change_all(Rows=60000, Columns=60000), 'its header claims (60000, 60000) pixels'),
    'a larger size than the file': (
        change_all(Rows=600, Columns=500), 'its header claims (600, 500) pixels of 16 bits, more than the file',
    ),
    'a million frames claimed': (change(1, NumberOfFrames=10**6), 'in 1000000 frames, more than the file'),
    'frames without functional groups': (
        change(1, NumberOfFrames=2, PixelData=bytes(2 * 60)), '2 frames, but 1 functional groups that say where each lies',
    ),
    'frames in words': (element(1, 'NumberOfFrames', 'LO', 'many'), "NumberOfFrames 'many' is not a number"),
    'in colour': (change_all(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'a colour image (RGB)'),
    'a slope of 0': (change(2, RescaleSlope=0), 'slope 0.0 and intercept -1024.0 give no HU'),
    'a slope that is no number': (element(2, 'RescaleSlope', 'FD', float('nan')), 'slope nan'),
    'an intercept in words': (element(2, 'RescaleIntercept', 'LO', 'none'), "RescaleIntercept 'none' is not a number"),
    'a spacing of 0': (change_all(PixelSpacing=[0, 2]), 'no ImageOrientationPatient or PixelSpacing'),
    'a spacing of nothing': (change_all(PixelSpacing=['1e-30', '1e-30']), 'mm, which no scan has'),
    'a spacing that is no number': (element(2, 'PixelSpacing', 'FD', [float('nan'), 1.0]), 'where 2 numbers belong'),
    'one number of spacing': (change(2, PixelSpacing='2'), 'where 2 numbers belong'),
    'a position without directions': (without('ImageOrientationPatient'), 'no ImageOrientationPatient'),
    'directions of no length': (change_all(ImageOrientationPatient=[0] * 6), 'is not two unit directions'),
    'pixels of 64 bits': (change_all(BitsAllocated=64), 'its pixels cannot be read'),
    'pixels of no bits': (change_all(BitsAllocated=0), 'its pixels cannot be read'),
    'without its pixels': (without('PixelData'), 'its pixels cannot be read'),
    'half of its pixels': (change(2, PixelData=bytes(30)), 'its pixels cannot be read'),
    'RLE of nothing': (packed_pixels(b''), 'its pixels cannot be read'),
    'RLE of a million segments': (packed_pixels(struct.pack('<16I', 10**6, *[64] * 15)), 'its pixels cannot be read'),
    'RLE that ends too soon': (
        packed_pixels(struct.pack('<16I', 2, 64, 66, *[0] * 13) + b'\x05\x01'), 'its pixels cannot be read',
    ),
}  # fmt: skip


def bad_series(folder, what):
    slices = make_slices(random_volume(shape=(6, 5, 6)))
    SERIES[what][0](slices)
    write_slices(folder, slices)


@pytest.mark.parametrize('what', SERIES)
def test_a_bad_series(what, call, tmp_path):
    bad_series(tmp_path / 'raw/a', what)
    assert SERIES[what][1] in converted(call, tmp_path)


def test_a_bad_case_leaves_nothing_and_does_not_stop_the_others(tmp_path):
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    bad_series(raw / 'size', 'another size')
    bad_series(raw / 'slope', 'a slope of 0')
    write_slices(raw / 'twice/a', make_slices(random_volume()))
    write_slices(raw / 'twice/b', make_slices(random_volume()))
    write_slices(raw / 'PANCREAS_0002/study/series', make_slices(random_volume()))
    (raw / 'PANCREAS_0003/study').mkdir(parents=True)

    said, failed = convert('dicom2npy.py', raw, out, status=1)
    expected = {
        '0003': 'no DICOM series found',
        'size': '(3, 5) pixels, where',
        'slope': 'give no HU',
        'twice': '2 sources for one case',
    }
    lines = dict(line.split(': error: ', 1) for line in said.splitlines() if ': error: ' in line)
    assert lines.keys() == expected.keys() and all(line in lines[case] for case, line in expected.items())
    assert list(loaded(out, 'images')) == ['0002'] and [f.name for f in (out / 'geometry').iterdir()] == ['0002.json']
    assert failed.splitlines()[0] == '4 of 5 cases failed:' and len(failed.splitlines()) == 5


def test_no_series_at_all(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/notes.txt').write_text('not DICOM')
    assert 'no DICOM series found' in convert('dicom2npy.py', tmp_path, status=1)[1]
    assert 'no such folder' in convert('dicom2npy.py', tmp_path / 'b', status=1)[1]
    assert os.listdir(tmp_path) == ['a']


# --- what is refused: files ----------------------------------------------------------------------------------------


def cut(length):
    """Cut the third file to this length."""

    def bad(folder):
        file = sorted(folder.glob('*.dcm'))[2]
        file.write_bytes(file.read_bytes()[:length])

    return bad


FILES = {
    'an empty file': (cut(0), 'not a DICOM file, though its name says so'),
    'a beheaded file': (cut(400), 'no image in it; is the file truncated?'),
    'a file cut off': (cut(-20), 'its pixels cannot be read; is the file truncated?'),
    'text': (lambda folder: (folder / '000.dcm').write_text('text' * 99), 'not a DICOM file, though its name says so'),
    'noise after the preamble': (
        lambda folder: (folder / '000.dcm').write_bytes(bytes(128) + b'DICM' + bytes(range(256))), 'no image in it',
    ),
}  # fmt: skip


@pytest.mark.parametrize('what', FILES)
def test_a_bad_file_among_slices(what, call, tmp_path):
    spoil, line = FILES[what]
    write_slices(tmp_path / 'raw/a', make_slices(random_volume(shape=(6, 5, 6))))
    spoil(tmp_path / 'raw/a')
    assert line in converted(call, tmp_path)


def compressed_slice(name, old, new):
    """Return a compressed 64 x 64 slice that pydicom ships, with some bytes of its code changed."""
    content = Path(get_testdata_file(name, download=False)).read_bytes()
    assert content.count(old) == 1
    return content.replace(old, new)


CODES = {  # decoders believe the code, not the header
    'a JPEG 2000 code of 2^31 x 2^31': (
        'MR_small_jp2klossless.dcm', b'\xff\x51\0\x29\0\0' + struct.pack('>2I', 64, 64), b'\xff\x51\0\x29\0\0' + struct.pack('>2I', *[2**31 - 1] * 2),
        'its code claims [2147483647, 2147483647] pixels',
    ),
    'a JPEG-LS code of 65535 x 65535': (
        'MR_small_jpeg_ls_lossless.dcm', b'\xff\xf7\0\x0b\x10\0\x40\0\x40', b'\xff\xf7\0\x0b\x10\xff\xff\xff\xff',
        'its code claims [65535, 65535] pixels',
    ),
    'a JPEG-LS code of 174 bits': (
        'MR_small_jpeg_ls_lossless.dcm', b'\xff\xf7\0\x0b\x10', b'\xff\xf7\0\x0b\xae', 'its code claims [64, 64] pixels, 1 colours and 174 bits',
    ),
    'a code without a beginning': ('MR_small_jpeg_ls_lossless.dcm', b'\xff\xf7\0\x0b\x10', b'\xff\xe0\0\x0b\x10', 'its pixels cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('what', CODES)
def test_a_bad_code(what, call, tmp_path, spare):
    name, old, new, line = CODES[what]
    (tmp_path / 'raw/a').mkdir(parents=True)
    (tmp_path / 'raw/a/1.dcm').write_bytes(compressed_slice(name, old, new))
    assert line in converted(call, tmp_path)


def test_a_deflated_bomb(call, tmp_path, spare):
    (tmp_path / 'raw/a').mkdir(parents=True)
    s = make_slices(random_volume(shape=(6, 5, 1)))[0]
    s.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    s.save_as(file := tmp_path / 'raw/a/1.dcm', enforce_file_format=True)
    head = file.read_bytes().partition(DeflatedExplicitVRLittleEndian.encode())
    file.write_bytes(b''.join(head[:2]) + zeros(BOMB, zlib.compressobj(1, zlib.DEFLATED, -15)))
    assert 'it is deflated as a whole' in converted(call, tmp_path)


# --- where the scripts run -----------------------------------------------------------------------------------------


def test_a_linked_script_works_and_a_copied_one_says_where_to_run_it(tmp_path):
    """The published README says `cp dicom2npy.py $RAW_PATH; python dicom2npy.py`."""
    write_slices(tmp_path / 'a', make_slices(random_volume()))
    for script in ('dicom2npy.py', 'make_phantom.py'):
        (tmp_path / script).write_bytes((REPO / 'DATA2NPY' / script).read_bytes())
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f'python REPOSITORY/DATA2NPY/{script} ' in done.stderr
    (tmp_path / 'dicom2npy.py').unlink()
    (tmp_path / 'dicom2npy.py').symlink_to(REPO / 'DATA2NPY/dicom2npy.py')
    subprocess.run([sys.executable, 'dicom2npy.py'], cwd=tmp_path, check=True)
    assert list(loaded(tmp_path, 'images')) == ['a']
