"""dicom2npy.py and nii2npy.py as a user runs them: on DICOM and NIfTI files made here, and on a shared real series."""

import gzip
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from scans.converting import convert_all

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('RSTN_SHARED', REPO.parent / 'shared'))
AXIAL = [1, 0, 0, 0, 1, 0]


# --- making raw data and running the scripts -----------------------------------------------------------------------


def make_slices(volume, orientation=AXIAL, start=(-10, -20, 50), spacing=(2.0, 3.0, 5.0), intercept=-1024, **tags):
    """DICOM slices of a volume (rows, columns, slices) in HU; they are stacked against their normal, as in NIH."""
    across, down = np.array(orientation, float).reshape(2, 3)
    series, slices = generate_uid(), []
    for k in range(volume.shape[2]):
        s = Dataset()
        s.SOPClassUID, s.SOPInstanceUID, s.SeriesInstanceUID, s.Modality = CTImageStorage, generate_uid(), series, 'CT'
        s.InstanceNumber, s.ImageOrientationPatient, s.PixelSpacing = k + 1, list(orientation), list(spacing[:2])
        s.ImagePositionPatient = list(np.array(start) - k * spacing[2] * np.cross(across, down))
        s.Rows, s.Columns, s.SamplesPerPixel, s.PhotometricInterpretation = *volume.shape[:2], 1, 'MONOCHROME2'
        s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation = 16, 16, 15, 1
        s.RescaleSlope, s.RescaleIntercept = 1, intercept
        s.PixelData = (volume[:, :, k] - intercept).astype('<i2').tobytes()
        s.file_meta = FileMetaDataset()
        s.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for tag, value in tags.items():
            setattr(s, tag, value)
        slices.append(s)
    return slices


def write_slices(folder, slices):
    """Write slices under names whose order is not that of their InstanceNumbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, s in enumerate(slices):
        s.save_as(folder / f'{(7 * i) % 1000:03}.dcm', enforce_file_format=True)


def write_nifti(path, array, affine=None, code=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nib.save(image, path)


def random_volume(seed=0, shape=(6, 5, 4)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def convert(script, *arguments, cwd=None, status=0):
    """Run a script; its stdout and stderr. `status` is the exit code to expect."""
    command = [sys.executable, REPO / 'DATA2NPY' / script, *arguments]
    ran = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert 'Traceback' not in ran.stderr
    return ran.stdout, ran.stderr


def loaded(folder, kind):
    """{case: array} of images/ or labels/; nothing but whole .npy files may be there."""
    files = sorted(Path(folder, kind).iterdir()) if Path(folder, kind).exists() else []
    return {file.name.removesuffix('.npy'): np.load(file) for file in files}


def geometry(folder, case):
    return json.loads(Path(folder, 'geometry', f'{case}.json').read_text())


# --- DICOM ---------------------------------------------------------------------------------------------------------


def test_both_NIH_layouts_without_arguments(tmp_path):
    old, new = random_volume(1), random_volume(2, (4, 7, 3))
    label_old, label_new = (
        np.random.default_rng(i).integers(0, 2, s, np.uint8) for i, s in ((3, (6, 5, 4)), (4, (4, 7, 3)))
    )
    write_slices(tmp_path / 'DOI/PANCREAS_0001/1.2.3/4.5.6', make_slices(old))
    write_slices(tmp_path / 'manifest-1/Pancreas-CT/PANCREAS_0002/DATE-CT/1.0-A', make_slices(new, intercept=0))
    for number, label in enumerate((label_old, label_new, label_old), 1):  # 0003: withdrawn, only its label remains
        write_nifti(
            tmp_path / f'TCIA_pancreas_labels-02-05-2017/label000{number}.nii.gz', label.transpose(1, 0, 2), code=0
        )

    said, _ = convert('dicom2npy.py', cwd=tmp_path)
    images = loaded(tmp_path, 'images')
    assert list(images) == ['0001', '0002'] and all(image.dtype == np.int16 for image in images.values())
    np.testing.assert_array_equal(images['0001'], old)
    np.testing.assert_array_equal(images['0002'], new)
    assert said.splitlines()[0].startswith('0001: image 6 x 5 x 4, 2 x 3 x 5 mm') and len(said.splitlines()) == 2

    said, _ = convert('nii2npy.py', cwd=tmp_path)
    labels = loaded(tmp_path, 'labels')
    assert list(labels) == ['0001', '0002'] and all(label.dtype == np.uint8 for label in labels.values())
    np.testing.assert_array_equal(labels['0001'], label_old)
    np.testing.assert_array_equal(labels['0002'], label_new)
    assert 'by transpose(1, 0, 2)' in said and '0003: a label without an image, skipped' in said


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


# Each bad series is made from six good slices; its line must say why it is refused.
def change(number, **tags):
    def bad(slices):
        for tag, value in tags.items():
            setattr(slices[number - 1], tag, value)

    return bad


def change_all(**tags):
    def bad(slices):
        for number in range(1, len(slices) + 1):
            change(number, **tags)(slices)

    return bad


def drop(*numbers):
    def bad(slices):
        slices[:] = [s for s in slices if s.InstanceNumber not in numbers]

    return bad


def tilt(slices):
    for s in slices:
        s.ImagePositionPatient = [-10, -20 + s.InstanceNumber / 2, s.ImagePositionPatient[2]]


def drop_positions_and_number_3(slices):
    drop(3)(slices)
    for s in slices:
        del s.ImagePositionPatient, s.ImageOrientationPatient


def cut(length):
    def bad(folder):
        file = sorted(folder.glob('*.dcm'))[2]
        file.write_bytes(file.read_bytes()[:length])

    return bad


BAD_SERIES = {
    'two_series': (change(3, SeriesInstanceUID='1.2.3'), 'two series in one folder'),
    'missing': (drop(3), 'InstanceNumber 2 and 4 lie 10 mm apart, others 5 mm: a slice is missing between them'),
    'missing_unseen': (drop_positions_and_number_3, 'slice missing, InstanceNumber 2 is followed by 4'),
    'repeated': (change(4, InstanceNumber=3), 'repeated slice, InstanceNumber 3'),
    'one_place': (change(4, ImagePositionPatient=[-10, -20, 40]), 'InstanceNumber 3 and 4 lie at one position'),
    'disorder': (change(4, ImagePositionPatient=[-10, -20, 47]), 'the numbers do not follow the positions'),
    'uneven': (change(4, ImagePositionPatient=[-10, -20, 36]), 'the slices are not evenly spaced'),
    'size': (change(4, Rows=3), '(3, 5) pixels, where'),
    'pixel_size': (change(4, PixelSpacing=[2, 2]), 'spacing [2.0, 2.0], where'),
    'oblique': (change(4, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), 'directions'),
    'no_place': (change(4, ImagePositionPatient=None), 'no position in its header, unlike the others'),
    'no_number': (change(4, InstanceNumber=None), 'no InstanceNumber'),
    'tilt': (tilt, 'gantry tilt'),
    'multi_frame': (change(1, NumberOfFrames=3), 'multi-frame'),
    'colour': (change_all(SamplesPerPixel=3, PhotometricInterpretation='RGB'), 'a colour image'),
    'slope': (change(2, RescaleSlope=0), 'slope 0.0 and intercept -1024.0 give no HU'),
    'absurd': (change_all(Rows=60000, Columns=60000), 'its header claims (60000, 60000) pixels'),
    'larger': (change_all(Rows=600, Columns=500), 'its header claims (600, 500) pixels of 16 bits, more than the file'),
}
BAD_FILES = {
    'truncated': (cut(-20), 'its pixels cannot be read; is the file truncated?'),
    'beheaded': (cut(400), 'no image in it; is the file truncated?'),
    'empty': (cut(0), 'not a DICOM file, though its name says so'),
}


def test_a_bad_series_has_its_line_leaves_nothing_and_does_not_stop_the_others(tmp_path):
    good, raw, out = random_volume(shape=(6, 5, 6)), tmp_path / 'raw', tmp_path / 'out'
    for case, (spoil, _) in BAD_SERIES.items():
        slices = make_slices(good)
        spoil(slices)
        write_slices(raw / case, slices)
    for case, (spoil, _) in BAD_FILES.items():
        write_slices(raw / case, make_slices(good))
        spoil(raw / case)
    write_slices(raw / 'with space', make_slices(good))
    write_slices(raw / 'twice/a', make_slices(good))
    write_slices(raw / 'twice/b', make_slices(good))
    write_slices(raw / 'PANCREAS_0002/study/series', make_slices(good))
    (raw / 'PANCREAS_0003/study').mkdir(parents=True)

    said, failed = convert('dicom2npy.py', raw, out, status=1)
    lines = dict(line.split(': error: ', 1) for line in said.splitlines() if ': error: ' in line)
    expected = {case: line for case, (_, line) in (BAD_SERIES | BAD_FILES).items()}
    expected |= {'with space': 'white space', 'twice': '2 sources for one case', '0003': 'no DICOM series found'}
    for case, line in expected.items():
        assert line in lines.pop(case), case
    assert not lines
    assert list(loaded(out, 'images')) == ['0002'] and [f.name for f in (out / 'geometry').iterdir()] == ['0002.json']
    assert failed.splitlines()[0] == f'{len(expected)} of {len(expected) + 1} cases failed:'
    assert len(failed.splitlines()) == len(expected) + 1 and 'two_series: error: ' in failed


def test_no_series_at_all(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/notes.txt').write_text('not DICOM')
    assert 'no DICOM series found' in convert('dicom2npy.py', tmp_path, status=1)[1]
    assert 'no such folder' in convert('dicom2npy.py', tmp_path / 'b', status=1)[1]
    assert os.listdir(tmp_path) == ['a']


# --- geometry ------------------------------------------------------------------------------------------------------


ORIENTATIONS = {  # (row direction, column direction), LPS
    'head_first': AXIAL,
    'back_to_front': [-1, 0, 0, 0, -1, 0],
    'sagittal': [0, 1, 0, 0, 0, -1],
    'coronal': [1, 0, 0, 0, 0, -1],
    'oblique': [0.8, 0.6, 0, -0.6, 0.8, 0],
}


def test_geometry_of_DICOM_is_RAS_of_the_array_as_stored(tmp_path):
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
    assert 'nowhere: no positions in its headers' in said and not (tmp_path / 'geometry/nowhere.json').exists()


def test_geometry_of_NIfTI_is_that_of_the_array_as_stored(tmp_path):
    affine = np.array([[0, 0, -3, 7.0], [2, 0, 0, -8], [0, 5, 0, 9], [0, 0, 0, 1]])
    volume = random_volume()
    write_nifti(tmp_path / 'imagesTr/a_0000.nii.gz', volume, affine)
    write_nifti(tmp_path / 'imagesTr/b.nii', volume.astype(np.float32), affine, code=0)
    write_nifti(tmp_path / 'labelsTr/a.nii.gz', (volume > 0).astype(np.float64), affine)
    write_nifti(tmp_path / 'labelsTr/b.nii.gz', (volume > 0).astype(np.uint8), affine, code=0)
    said, _ = convert('nii2npy.py', tmp_path, tmp_path / 'out')

    images, labels = loaded(tmp_path / 'out', 'images'), loaded(tmp_path / 'out', 'labels')
    for case in ('a', 'b'):
        np.testing.assert_array_equal(images[case], volume.transpose(1, 0, 2))
        np.testing.assert_array_equal(labels[case], images[case] > 0)
        assert images[case].dtype == np.int16 and labels[case].dtype == np.uint8
    kept = geometry(tmp_path / 'out', 'a')
    np.testing.assert_allclose(np.array(kept['affine']) @ [3, 2, 1, 1], affine @ [2, 3, 1, 1])
    assert kept['spacing'] == [5, 2, 3] and kept['holds'] == 'position' and kept['type'] == 'NIfTI'
    assert geometry(tmp_path / 'out', 'b')['holds'] == 'nothing' and 'b: its header gives no affine' in said
    assert 'a: label 5 x 6 x 4, by the affines' in said and 'b: label 5 x 6 x 4, by transpose(1, 0, 2)' in said


@pytest.mark.parametrize('origin', [(7, -8, 9), (0, 0, 0)], ids=['somewhere', 'at_the_origin'])
def test_all_48_axis_orders_and_flips_of_a_label_come_onto_its_image(tmp_path, origin):
    volume = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)  # every voxel its own value
    affine = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), origin)
    turns = [
        np.array(list(zip(a, f)))
        for a in itertools.permutations(range(3))
        for f in itertools.product((1, -1), repeat=3)
    ]
    for i, turn in enumerate(turns):
        write_nifti(tmp_path / f'images/{i:02}.nii', volume.astype(np.int16), affine)
        turned = nib.Nifti1Image(volume, affine).as_reoriented(turn)
        write_nifti(tmp_path / f'labels/{i:02}.nii', np.asarray(turned.dataobj), turned.affine)
    said, _ = convert('nii2npy.py', tmp_path, tmp_path / 'out')
    images, labels = loaded(tmp_path / 'out', 'images'), loaded(tmp_path / 'out', 'labels')
    assert len(labels) == 48 and said.count('by the affines') == 48
    for case, image in images.items():
        np.testing.assert_array_equal(labels[case], image)


@pytest.fixture
def paired(tmp_path):
    """A converted DICOM case 0001, (image, label and affine that pair with it by transpose, the label's path)."""
    image = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    write_slices(tmp_path / 'DOI/PANCREAS_0001/a/b', make_slices(image))
    convert('dicom2npy.py', tmp_path)
    affine = np.array(geometry(tmp_path, '0001')['affine'])[:, [1, 0, 2, 3]]
    path = tmp_path / 'TCIA_pancreas_labels-02-05-2017/label0001.nii.gz'
    return image, image.astype(np.uint8).transpose(1, 0, 2), affine, path


def test_a_label_lies_on_its_DICOM_image_by_the_affines_else_by_the_published_transpose(tmp_path, paired):
    image, label, affine, path = paired
    upright = nib.as_closest_canonical(nib.Nifti1Image(label, affine))
    for array, its_affine, code, how in (
        (label, affine, 1, 'by the affines'),
        (upright.dataobj, upright.affine, 1, 'by the affines'),
        (label, upright.affine, 0, 'by transpose(1, 0, 2)'),  # no code: the affine means nothing
        (label, np.eye(4), 1, 'by transpose(1, 0, 2)'),  # what is written where nothing is known
        (label, np.diag([-3.0, -2, 5, 1]), 1, 'by transpose(1, 0, 2)'),  # the spacing alone
    ):
        write_nifti(path, np.asarray(array), its_affine, code)
        assert how in convert('nii2npy.py', tmp_path)[0]
        np.testing.assert_array_equal(loaded(tmp_path, 'labels')['0001'], image)
    (tmp_path / 'geometry/0001.json').unlink()  # converted by an older version
    write_nifti(path, label, affine)
    assert 'by transpose(1, 0, 2)' in convert('nii2npy.py', tmp_path)[0]


def test_affines_that_contradict_are_an_error_unless_the_orientation_is_given(tmp_path, paired):
    image, label, affine, path = paired
    shifted = affine + [[0, 0, 0, 4.0], [0] * 4, [0] * 4, [0] * 4]
    rotated = nib.affines.from_matvec([[2.4, -1.2, 0], [1.8, 1.6, 0], [0, 0, 5]], affine[:3, 3])
    for wrong in (shifted, rotated, np.diag([2.5, 2.5, 5, 1])):
        write_nifti(path, label, wrong)
        said, _ = convert('nii2npy.py', tmp_path, status=1)
        assert '0001: error: ' in said and "is not its image's" in said and '--orientation published' in said
        assert not loaded(tmp_path, 'labels')
    said, _ = convert('nii2npy.py', tmp_path, '--orientation', 'affine', status=1)
    assert "is not its image's" in said
    said, _ = convert('nii2npy.py', tmp_path, '--orientation', 'published')
    np.testing.assert_array_equal(loaded(tmp_path, 'labels')['0001'], image)


# --- NIfTI ---------------------------------------------------------------------------------------------------------


def test_folders_and_patterns_that_the_user_names(tmp_path):
    image, label = random_volume(), random_volume() > 0
    write_nifti(tmp_path / 'scans/pt_1_ct.nii.gz', image)
    write_nifti(tmp_path / 'scans/pt_1_label.nii.gz', label.astype(np.uint8))
    write_nifti(tmp_path / 'img/img0007.nii.gz', image)
    write_nifti(tmp_path / 'my [labels]/label0007.nii.gz', label.astype(np.int32))
    raw, out = tmp_path / 'scans', tmp_path / 'data'
    convert('nii2npy.py', raw, out, '--images', raw / '*_ct.nii.gz', '--labels', raw / '*_label.nii.gz')
    convert('nii2npy.py', '.', 'data', '--images', 'img', '--labels', 'my [labels]', cwd=tmp_path)
    images, labels = loaded(out, 'images'), loaded(out, 'labels')
    assert list(images) == list(labels) == ['0007', 'pt_1']
    for case in images:
        np.testing.assert_array_equal(images[case], image.transpose(1, 0, 2))
        np.testing.assert_array_equal(labels[case], label.transpose(1, 0, 2))


def claim(path, *shape):
    """Overwrite what the header of a .nii.gz says its shape is."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[40:56] = struct.pack('<8h', len(shape), *shape, *[1] * (7 - len(shape)))
    path.write_bytes(gzip.compress(bytes(content)))


def test_bad_labels_and_images_have_their_line_and_leave_nothing(tmp_path):
    image, label = random_volume(), (random_volume() > 0).astype(np.uint8)
    bad_labels = {
        'fraction': (label * 0.5, '0.5 is not an organ; a label holds whole numbers from 0 to 255'),
        'nan': (np.where(label, np.nan, 0), 'nan is not an organ'),
        'negative': (-label.astype(np.int16), '-1 is not an organ'),
        'organ_256': (label.astype(np.int16) * 256, '256 is not an organ'),
        'shape': (label[:, :, 1:], 'shape (6, 5, 3) does not fit its image, stored as (5, 6, 4)'),
        'flat': (label[:, :, 0], 'shape (6, 5), where one 3D volume is expected'),
        'turned': (label.transpose(1, 0, 2), 'transposed does not fit its image'),
    }
    for case, (array, _) in bad_labels.items():
        write_nifti(tmp_path / f'images/{case}.nii.gz', image, code=0)
        write_nifti(tmp_path / f'labels/{case}.nii.gz', array, code=0)
    bad_images = {
        'image_nan': (np.where(image > 0, np.nan, image), 'values that are not finite'),
        'image_4D': (np.stack([image, image], -1), 'shape (6, 5, 4, 2), where one 3D volume is expected'),
        'complex': (image.astype(np.complex64), 'it holds complex64, not plain numbers'),
    }
    for case, (array, _) in bad_images.items():
        write_nifti(tmp_path / f'images/{case}.nii.gz', array)
        write_nifti(tmp_path / f'labels/{case}.nii.gz', label)
    expected = {case: line for case, (_, line) in (bad_labels | bad_images).items()}
    for case in ('good', 'cut_short', 'absurd', 'garbage', 'with space', 'twice'):
        write_nifti(tmp_path / f'images/{case}.nii.gz', image)
        write_nifti(tmp_path / f'labels/{case}.nii.gz', label)
    for case in ('cut_short', 'garbage'):
        file = tmp_path / f'labels/{case}.nii.gz'
        file.write_bytes(file.read_bytes()[:-20] if case == 'cut_short' else b'\x00' * 1000)
        expected[case] = f'labels/{case}.nii.gz: not a readable NIfTI file'
    claim(tmp_path / 'images/absurd.nii.gz', 30000, 30000, 30000)
    write_nifti(tmp_path / 'images/twice.nii', image)
    expected |= {
        'absurd': 'its header claims (30000, 30000, 30000) voxels, more than the file can hold',
        'with space': 'white space',
        'twice': '2 sources for one case',
    }

    said, failed = convert('nii2npy.py', tmp_path, tmp_path / 'out', status=1)
    lines = dict(line.split(': error: ', 1) for line in said.splitlines() if ': error: ' in line)
    for case, line in expected.items():
        assert line in lines.pop(case), case
    assert not lines
    assert list(loaded(tmp_path / 'out', 'images')) == list(loaded(tmp_path / 'out', 'labels')) == ['good']
    assert [file.name for file in (tmp_path / 'out/geometry').iterdir()] == ['good.json']
    assert failed.splitlines()[0] == f'{len(expected)} of {len(expected) + 1} cases failed:'


def test_nothing_to_convert(tmp_path):
    assert 'no NIfTI files in' in convert('nii2npy.py', tmp_path, status=1)[1]
    write_nifti(tmp_path / 'labels/a.nii.gz', random_volume())
    assert 'run dicom2npy.py first' in convert('nii2npy.py', tmp_path, status=1)[1]
    assert 'no such folder' in convert('nii2npy.py', tmp_path, '--labels', tmp_path / 'b', status=1)[1]


# --- a real series -------------------------------------------------------------------------------------------------


def test_a_real_JPEG_2000_series_lies_under_its_row_flipped_label(tmp_path):
    source = SHARED / 'data/totalsegmentator_ct'
    if not source.exists():
        pytest.skip(f'{source} is not there; RSTN_SHARED names another folder')
    for name, link in (
        ('example_ct_dicom', 'DOI/PANCREAS_0001'),
        ('example_seg_dicom.nii.gz', 'TCIA_pancreas_labels-02-05-2017/label0001.nii.gz'),
    ):
        (tmp_path / link).parent.mkdir(parents=True)
        (tmp_path / link).symlink_to(source / name)
    convert('dicom2npy.py', tmp_path)
    image = loaded(tmp_path, 'images')['0001']
    first = pydicom.dcmread(min((source / 'example_ct_dicom').iterdir()))
    np.testing.assert_array_equal(image[:, :, 0], first.pixel_array.astype(int) - 1024)
    assert geometry(tmp_path, '0001')['spacing'] == [0.9765625, 0.9765625, 2]

    def liver_mean(label):
        return image[label == 5].mean()

    assert 'by the affines' in convert('nii2npy.py', tmp_path)[0]
    assert 70 < liver_mean(loaded(tmp_path, 'labels')['0001']) < 110
    (tmp_path / 'geometry/0001.json').unlink()
    assert 'by transpose(1, 0, 2)' in convert('nii2npy.py', tmp_path)[0]
    published = loaded(tmp_path, 'labels')['0001']
    assert liver_mean(published) < 0 and 70 < liver_mean(published[::-1]) < 110


def test_only_what_a_killed_conversion_has_left_is_removed(tmp_path):
    for folder in ('raw', 'images', 'imagesTr'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '.my notes.part').touch()
        (tmp_path / folder / '.0001.npy.77.part').touch()
    convert_all(tmp_path, {}, None)
    assert [path.parent.name for path in sorted(tmp_path.rglob('.0001*'))] == ['imagesTr', 'raw']
    assert len(list(tmp_path.rglob('.my notes.part'))) == 3
