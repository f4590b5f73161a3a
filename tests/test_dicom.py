"""dicom2npy.py on DICOM series made here: what it reads, what it refuses, and the one line that says why.

Each table reads: what is wrong -> (how to make it, what the line says). Each bad series is made from six good slices.
"""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless
from raw_scans import (
    AXIAL,
    BOMB,
    REPO,
    convert,
    converted,
    geometry,
    loaded,
    make_slices,
    random_volume,
    write_slices,
    zeros,
)

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
    assert (
        'a: notes.txt is not a DICOM image, skipped' in said and 'report.dcm is not' in said and 'DS_Store' not in said
    )


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


SERIES = {
    'two series mixed': (change(3, SeriesInstanceUID='1.2.3'), 'two series in one folder'),
    'a slice left out': (
        drop(3), 'InstanceNumber 2 and 4 lie 10 mm apart, others 5 mm: a slice is missing between them',
    ),
    'a slice left out, without positions': (
        then(drop(3), without('ImagePositionPatient', 'ImageOrientationPatient')),
        'slice missing, InstanceNumber 2 is followed by 4',
    ),
    'a number twice': (change(4, InstanceNumber=3), 'repeated slice, InstanceNumber 3'),
    'a position twice': (
        change(4, ImagePositionPatient=[-10, -20, 40]), 'InstanceNumber 3 and 4 lie at one position',
    ),
    'a position out of order': (
        change(4, ImagePositionPatient=[-10, -20, 47]), 'the numbers do not follow the positions',
    ),
    'uneven gaps': (change(4, ImagePositionPatient=[-10, -20, 36]), 'the slices are not evenly spaced'),
    'another size': (change(4, Rows=3), '(3, 5) pixels, where'),
    'another spacing': (change(4, PixelSpacing=[2, 2]), 'spacing [2.0, 2.0], where'),
    'another orientation': (change(4, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), 'directions'),
    'one slice without a position': (
        change(4, ImagePositionPatient=None), 'no position in its header, unlike the others',
    ),
    'a tilted gantry': (tilt, 'gantry tilt'),
    'no InstanceNumber': (without('InstanceNumber'), 'no InstanceNumber to order it by'),
    'an InstanceNumber in words': (element(2, 'InstanceNumber', 'LO', 'two'), "invalid literal for int() with base 10: 'two'"),
    'two InstanceNumbers in one slice': (element(2, 'InstanceNumber', 'IS', [2, 3]), 'int() argument must be'),
    'no pixels claimed': (change(2, Rows=0), 'no image in it'),
    'no Columns': (without('Columns'), 'no image in it'),
    'Rows twice': (element(2, 'Rows', 'US', [6, 6]), 'int() argument must be'),
    'negative Rows': (element(2, 'Rows', 'SS', -6), 'its header claims (-6, 5) pixels'),
    'a size that no scan has': (change_all(Rows=60000, Columns=60000), 'its header claims (60000, 60000) pixels'),
    'a larger size than the file': (
        change_all(Rows=600, Columns=500), 'its header claims (600, 500) pixels of 16 bits, more than the file',
    ),
    'a million frames claimed': (change(1, NumberOfFrames=10**6), 'a multi-frame image'),
    'frames in words': (element(1, 'NumberOfFrames', 'LO', 'many'), 'invalid literal'),
    'in colour': (change_all(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'a colour image (RGB)'),
    'a slope of 0': (change(2, RescaleSlope=0), 'slope 0.0 and intercept -1024.0 give no HU'),
    'a slope that is no number': (element(2, 'RescaleSlope', 'FD', float('nan')), 'slope nan'),
    'an intercept in words': (element(2, 'RescaleIntercept', 'LO', 'none'), 'its pixels cannot be read'),
    'a spacing of 0': (change_all(PixelSpacing=[0, 2]), 'no ImageOrientationPatient or PixelSpacing'),
    'a spacing of nothing': (change_all(PixelSpacing=['1e-30', '1e-30']), 'are no voxel of a scan'),
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
    """Return a compressed slice of 64 x 64 that pydicom ships, with some bytes of its code changed."""
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
