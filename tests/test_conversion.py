"""dicom2npy.py and nii2npy.py as a user runs them: on DICOM and NIfTI files made here, and on a shared real series."""

import gzip
import itertools
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from raw_scans import convert, geometry, loaded, make_slices, random_volume, write_slices

from scans.converting import convert_all

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('RSTN_SHARED', REPO.parent / 'shared'))


# --- making raw data and running the scripts -----------------------------------------------------------------------


def write_nifti(path, array, affine=None, code=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nib.save(image, path)


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


# --- geometry ------------------------------------------------------------------------------------------------------


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
