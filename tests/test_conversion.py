"""dicom2npy.py and nii2npy.py as a user runs them: on DICOM and NIfTI files made here, and on a shared real series."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
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
    assert 'nowhere: no positions in its headers' in said and geometry(tmp_path, 'nowhere')['holds'] == 'nothing'


def test_only_what_a_killed_conversion_has_left_is_removed(tmp_path):
    for folder in ('raw', 'images', 'imagesTr'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '.my notes.part').touch()
        (tmp_path / folder / '.0001.npy.77.part').touch()
    convert_all(tmp_path, {}, None)
    assert [path.parent.name for path in sorted(tmp_path.rglob('.0001*'))] == ['imagesTr', 'raw']
    assert len(list(tmp_path.rglob('.my notes.part'))) == 3
