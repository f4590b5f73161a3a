"""NIfTI files: what nii2npy.py reads, what it refuses, and masks that lie on their scan."""

import gzip
import io
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import nibabel as nib
import nibabel.orientations as axes
import numpy as np
import pydicom
import pytest
from conftest import write_case
from raw_scans import (
    BOMB,
    NII2NPY,
    REPO,
    SHARED,
    converted,
    geometry,
    loaded,
    make_slices,
    random_volume,
    write_nifti,
    write_slices,
    zeros,
)
from test_bad_inputs import refused

from running.data_folder import Case
from scans import nifti
from scans.converting import save_scan
from scans.dataset import find, without_channel
from scans.dicom import read_series
from scans.geometry import Geometry, axis_codes, load_geometry, place_label

# --- masks as NIfTI --------------------------------------------------------------------------------------------------


AFFINE = np.array([[0, -2.0, 0, 30.5], [-3.0, 0, 0, 40], [0, 0, -5.0, 100.25], [0, 0, 0, 1]])
MASK = np.zeros((3, 4, 5), bool)
MASK[0, 1, 2] = True
CASE = Case(7, 'images/0008.npy', 'labels/0008.npy')


def write_geometry(data, case, holds='position'):
    (data / 'geometry').mkdir(exist_ok=True)
    content = {'affine': AFFINE.tolist(), 'holds': holds, 'source': 'x', 'type': 'DICOM'}
    (data / 'geometry' / f'{case}.json').write_text(json.dumps(content))


def write_bytes(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def exported(data, mask=MASK, case=CASE, wanted=True):
    nifti.export(SimpleNamespace(nifti=wanted, data_path=str(data)), data / 'volumes' / 'R2_1.npz', mask, case)
    path = data / 'volumes' / 'R2_1.nii.gz'
    return nib.load(path) if path.exists() else None


def test_a_mask_lies_where_its_array_lies(tmp_path):
    write_geometry(tmp_path, '0008')
    image = exported(tmp_path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), MASK.astype(np.uint8))
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, AFFINE)
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-6)
    assert (image.header['sform_code'], image.header['qform_code']) == (1, 1)
    assert image.header.get_zooms() == (3, 2, 5) and image.header.get_xyzt_units()[0] == 'mm'
    assert [file.name for file in (tmp_path / 'volumes').iterdir()] == ['R2_1.nii.gz'], 'and no rest of its making'


def test_nothing_is_written_unasked(tmp_path):
    assert exported(tmp_path, wanted=False) is None
    assert not list(tmp_path.iterdir())


def test_without_geometry_it_is_in_voxels_which_is_said_once(tmp_path, capsys):
    for _ in range(2):
        image = exported(tmp_path)
    np.testing.assert_array_equal(image.affine, np.eye(4))
    line = 'no geometry/CASE.json that says where some cases lie: their .nii.gz is in voxels'
    assert capsys.readouterr().out == f'{tmp_path}: {line}\n'
    write_geometry(tmp_path, '0008', holds='nothing')
    np.testing.assert_array_equal(exported(tmp_path).affine, np.eye(4))


def test_the_same_mask_gives_the_same_bytes_and_another_one_replaces_it(tmp_path):
    path = tmp_path / 'volumes' / 'R2_1.nii.gz'
    exported(tmp_path)
    first = path.read_bytes()
    assert first[4:8] == bytes(4), 'no time of its making in it'
    exported(tmp_path, ~MASK)
    assert path.read_bytes() != first
    exported(tmp_path)
    assert path.read_bytes() == first


def test_any_layout_in_memory_and_both_endings(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for name in ('a.nii', 'a.nii.gz'):
        for one in (array, array.transpose(2, 0, 1)[:, ::-1], np.asfortranarray(array)):
            nifti.write_nifti(tmp_path / name, one, nifti.affine_header(None))
            np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / name).dataobj), one)


def test_axis_codes_are_known_only_of_a_position():
    assert axis_codes(Geometry(AFFINE, 'position', 'x', 'DICOM')) == 'PLI'
    assert axis_codes(Geometry(AFFINE, 'spacing', 'x', 'DICOM')) == ''
    assert axis_codes(None) == ''


# --- conversion: python nii2npy.py RAW OUT ---------------------------------------------------------------------------


def test_geometry_of_NIfTI_is_that_of_the_array_as_stored(tmp_path, convert):
    affine = np.array([[0, 0, -3, 7.0], [2, 0, 0, -8], [0, 5, 0, 9], [0, 0, 0, 1]])
    volume = random_volume()
    write_nifti(tmp_path / 'imagesTr/a_0000.nii.gz', volume, affine)
    write_nifti(tmp_path / 'imagesTr/b.nii', volume.astype(np.float32), affine, code=0)
    write_nifti(tmp_path / 'labelsTr/a.nii.gz', (volume > 0).astype(np.float64), affine)
    write_nifti(tmp_path / 'labelsTr/b.nii.gz', (volume > 0).astype(np.uint8), affine, code=0)
    said, _ = convert(tmp_path, tmp_path / 'out')

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
def test_all_48_axis_orders_and_flips_of_a_label_come_onto_its_image(tmp_path, origin, convert):
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
    said, _ = convert(tmp_path, tmp_path / 'out')
    images, labels = loaded(tmp_path / 'out', 'images'), loaded(tmp_path / 'out', 'labels')
    assert len(labels) == 48 and said.count('by the affines') == 48
    for case, image in images.items():
        np.testing.assert_array_equal(labels[case], image)


def test_any_grid_turned_any_way_comes_onto_itself_and_a_grid_a_tenth_voxel_off_does_not():
    rng = np.random.default_rng(0)
    for _ in range(400):
        shape = tuple(rng.integers(2, 7, 3))
        label = np.arange(np.prod(shape)).reshape(shape)
        directions = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag(rng.uniform(0.5, 5, 3))
        affine = nib.affines.from_matvec(directions, rng.uniform(-200, 200, 3))
        turn = np.array(list(zip(rng.permutation(3), rng.choice([1, -1], 3))))
        turned = axes.apply_orientation(label, turn)
        theirs = Geometry(affine @ axes.inv_ornt_aff(turn, shape), 'position', 'label', 'NIfTI')
        ours = Geometry(affine, 'position', 'image', 'NIfTI')
        np.testing.assert_array_equal(place_label(turned, theirs, shape, ours)[0], label)
        off = theirs._replace(affine=theirs.affine + 0.2 * np.eye(4, k=3) * theirs.spacing.max())
        with pytest.raises(ValueError, match="is not its image's"):
            place_label(turned, off, shape, ours)


@pytest.fixture
def convert(call, monkeypatch):
    """Run nii2npy.py; return what it printed. `status` is the exit code to expect."""

    def convert(*arguments, cwd=None, status=0):
        with monkeypatch.context() as context:
            context.chdir(cwd or '.')
            done = call(NII2NPY, *arguments)
        assert done.code == status, done.out + done.err
        return done.out, done.err

    return convert


@pytest.fixture
def paired(tmp_path):
    """A converted DICOM case 0001: (image, label and affine that pair by transpose, its path)."""
    image = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    write_slices(tmp_path / 'dicom', make_slices(image))
    save_scan(tmp_path, '0001', read_series(tmp_path / 'dicom'))
    affine = np.array(geometry(tmp_path, '0001')['affine'])[:, [1, 0, 2, 3]]
    path = tmp_path / 'labelsTr/label0001.nii.gz'
    return image, image.astype(np.uint8).transpose(1, 0, 2), affine, path


def test_a_label_lies_on_its_DICOM_image_by_the_affines_else_by_the_published_transpose(tmp_path, paired, convert):
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
        assert how in convert(tmp_path)[0]
        np.testing.assert_array_equal(loaded(tmp_path, 'labels')['0001'], image)
    (tmp_path / 'geometry/0001.json').unlink()  # converted by an older version
    write_nifti(path, label, affine)
    assert 'by transpose(1, 0, 2)' in convert(tmp_path)[0]


def test_affines_that_contradict_are_an_error_unless_the_orientation_is_given(tmp_path, paired, convert):
    image, label, affine, path = paired
    shifted = affine + [[0, 0, 0, 4.0], [0] * 4, [0] * 4, [0] * 4]
    rotated = nib.affines.from_matvec([[2.4, -1.2, 0], [1.8, 1.6, 0], [0, 0, 5]], affine[:3, 3])
    for wrong in (shifted, rotated, np.diag([2.5, 2.5, 5, 1])):
        write_nifti(path, label, wrong)
        said, _ = convert(tmp_path, status=1)
        assert '0001: error: ' in said and "is not its image's" in said and '--orientation published' in said
        assert not loaded(tmp_path, 'labels')
    said, _ = convert(tmp_path, '--orientation', 'affine', status=1)
    assert "is not its image's" in said
    said, _ = convert(tmp_path, '--orientation', 'published')
    np.testing.assert_array_equal(loaded(tmp_path, 'labels')['0001'], image)


def test_folders_and_patterns_that_the_user_names(tmp_path, convert):
    image, label = random_volume(), random_volume() > 0
    write_nifti(tmp_path / 'scans/pt_1_ct.nii.gz', image)
    write_nifti(tmp_path / 'scans/pt_1_label.nii.gz', label.astype(np.uint8))
    write_nifti(tmp_path / 'img/img0007.nii.gz', image)
    write_nifti(tmp_path / 'my [labels]/label0007.nii.gz', label.astype(np.int32))
    raw, out = tmp_path / 'scans', tmp_path / 'data'
    convert(raw, out, '--images', raw / '*_ct.nii.gz', '--labels', raw / '*_label.nii.gz')
    convert('.', 'data', '--images', 'img', '--labels', 'my [labels]', cwd=tmp_path)
    images, labels = loaded(out, 'images'), loaded(out, 'labels')
    assert list(images) == list(labels) == ['0007', 'pt_1']
    for case in images:
        np.testing.assert_array_equal(images[case], image.transpose(1, 0, 2))
        np.testing.assert_array_equal(labels[case], label.transpose(1, 0, 2))


@pytest.mark.parametrize('end', ['.nii', '.nii.gz', '.nii*', '.NII.GZ', '.nrrd', '.mhd'])
def test_a_pattern_may_end_as_a_scan_does(tmp_path, end):
    for name in ('a_ct', 'b_ct', 'a_label'):
        (tmp_path / f'{name}{end.replace("*", ".gz")}').touch()
    assert list(find(tmp_path, str(tmp_path / f'*_ct{end}'), ())) == ['a', 'b']


def test_a_channel_pairs_with_a_label_of_its_name(tmp_path):
    images = {'img0001_0000': ['a'], 'pt_0000': ['b'], 'c_0000': ['c']}
    assert without_channel(images, {'0001': [], 'pt': []}) == {'0001': ['a'], 'pt': ['b'], 'c_0000': ['c']}


def test_a_case_that_fails_is_named_and_the_others_are_converted(tmp_path, convert):
    for case in ('good', 'cut', 'with space', 'twice'):
        write_nifti(tmp_path / f'images/{case}.nii.gz', random_volume())
        write_nifti(tmp_path / f'labels/{case}.nii.gz', (random_volume() > 0).astype(np.uint8))
    file = tmp_path / 'labels/cut.nii.gz'
    file.write_bytes(file.read_bytes()[:-20])
    write_nifti(tmp_path / 'images/twice.nii', random_volume())
    expected = {
        'cut': 'labels/cut.nii.gz: not a readable NIfTI file',
        'with space': 'white space',
        'twice': '2 sources for one case',
    }
    said, failed = convert(tmp_path, tmp_path / 'out', status=1)
    lines = dict(line.split(': error: ', 1) for line in said.splitlines() if ': error: ' in line)
    assert lines.keys() == expected.keys() and all(expected[case] in line for case, line in lines.items()), said
    assert list(loaded(tmp_path / 'out', 'images')) == list(loaded(tmp_path / 'out', 'labels')) == ['good']
    assert [file.name for file in (tmp_path / 'out/geometry').iterdir()] == ['good.json']
    assert failed.splitlines()[0] == '3 of 4 cases failed:' and len(failed.splitlines()) == 4


def test_a_case_whose_raw_scan_is_gone_is_named_not_one_of_another_folder(tmp_path, convert):
    for folder, case in (('a', '1'), ('a', '2'), ('b', '3')):
        write_nifti(tmp_path / folder / f'images/{case}.nii.gz', random_volume())
        write_nifti(tmp_path / folder / f'labels/{case}.nii.gz', (random_volume() > 0).astype(np.uint8))
    said = [convert(tmp_path / folder, tmp_path / 'data')[0] for folder in 'ab']
    assert 'kept' not in ''.join(said)
    (tmp_path / 'a/images/2.nii.gz').unlink()
    (tmp_path / 'a/labels/2.nii.gz').unlink()
    said, _ = convert(tmp_path / 'a', tmp_path / 'data')
    assert [line for line in said.splitlines() if 'kept' in line] == [
        f'2: kept, though {tmp_path}/a/images/2.nii.gz is gone; to leave it out, remove images/2.npy and labels/2.npy'
    ]


def test_a_scan_of_another_source_that_takes_the_name_of_a_case_is_named(tmp_path, convert):
    for site, brighter in (('a', 0), ('b', 1)):
        write_nifti(tmp_path / site / 'images/001.nii.gz', random_volume() + brighter)
        write_nifti(tmp_path / site / 'labels/001.nii.gz', (random_volume() > 0).astype(np.uint8))
    said = [convert(tmp_path / 'a', tmp_path / 'data')[0]]
    (tmp_path / 'a').rename(tmp_path / 'moved')
    said += [convert(tmp_path / site, tmp_path / 'data')[0] for site in ('moved', 'b')]
    assert ['replaces' in text for text in said] == [False, False, True]
    assert f'001: replaces the scan of {tmp_path}/moved/images/001.nii.gz' in said[2]


def test_nothing_to_convert(tmp_path, convert):
    assert 'no scans in' in convert(tmp_path, status=1)[1]
    write_nifti(tmp_path / 'labels/a.nii.gz', random_volume())
    assert 'run dicom2npy.py first' in convert(tmp_path, status=1)[1]
    assert 'no such folder' in convert(tmp_path, '--labels', tmp_path / 'b', status=1)[1]


def test_a_real_JPEG_2000_series_lies_under_its_row_flipped_label(tmp_path, convert):
    source = SHARED / 'data/totalsegmentator_ct'
    if not source.exists():
        pytest.skip(f'{source} is not there; RSTN_SHARED names another folder')
    save_scan(tmp_path, '0001', read_series(source / 'example_ct_dicom'))
    image = loaded(tmp_path, 'images')['0001']
    first = pydicom.dcmread(min((source / 'example_ct_dicom').iterdir()))
    np.testing.assert_array_equal(image[:, :, 0], first.pixel_array.astype(int) - 1024)
    assert geometry(tmp_path, '0001')['spacing'] == [0.9765625, 0.9765625, 2]
    (tmp_path / 'labelsTr').mkdir()
    (tmp_path / 'labelsTr/label0001.nii.gz').symlink_to(source / 'example_seg_dicom.nii.gz')

    def liver_mean(label):
        return image[label == 5].mean()

    assert 'by the affines' in convert(tmp_path)[0]
    assert 70 < liver_mean(loaded(tmp_path, 'labels')['0001']) < 110
    (tmp_path / 'geometry/0001.json').unlink()
    (tmp_path / 'labels/0001.npy').unlink()
    assert 'by transpose(1, 0, 2)' in convert(tmp_path)[0]
    published = loaded(tmp_path, 'labels')['0001']
    assert liver_mean(published) < 0 and 70 < liver_mean(published[::-1]) < 110


def test_time_axes_of_one_and_any_compression_under_any_name(tmp_path, convert):
    volume = random_volume()
    write_nifti(tmp_path / 'images/a.nii.gz', volume[..., None])
    write_nifti(tmp_path / 'images/b.nii.gz', volume[..., None, None])
    (tmp_path / 'images/c.nii').write_bytes((tmp_path / 'images/a.nii.gz').read_bytes())
    (tmp_path / 'images/d.nii.gz').write_bytes(gzip.decompress((tmp_path / 'images/a.nii.gz').read_bytes()))
    (tmp_path / 'images/E.NII.gz').write_bytes((tmp_path / 'images/a.nii.gz').read_bytes())
    convert(tmp_path, tmp_path / 'out')
    images = loaded(tmp_path / 'out', 'images')
    assert list(images) == ['E', 'a', 'b', 'c', 'd']
    for image in images.values():
        np.testing.assert_array_equal(image, volume.transpose(1, 0, 2))


def test_labels_off_whole_numbers_by_rounding_are_rounded(tmp_path, convert):
    label = np.random.default_rng(0).integers(0, 4, (6, 5, 4)).astype(np.int16)
    for case, factor in (('tenth', 10), ('255th', 255)):
        write_nifti(tmp_path / f'images/{case}.nii', random_volume())
        write_nifti(tmp_path / f'labels/{case}.nii', label * factor)
        content = bytearray((tmp_path / f'labels/{case}.nii').read_bytes())
        struct.pack_into('<f', content, 112, 1 / factor)
        (tmp_path / f'labels/{case}.nii').write_bytes(content)
    assert (np.asarray(nib.load(tmp_path / 'labels/255th.nii').dataobj) % 1).any(), 'not whole as others read them'
    convert(tmp_path, tmp_path / 'out')
    for made in loaded(tmp_path / 'out', 'labels').values():
        np.testing.assert_array_equal(made, label.transpose(1, 0, 2))


def test_NaN_outside_the_field_of_view_is_air_and_is_counted(tmp_path, convert):
    image = random_volume().astype(np.float32)
    image[0, 0] = np.nan
    write_nifti(tmp_path / 'images/a.nii.gz', image)
    said, _ = convert(tmp_path, tmp_path / 'out')
    assert 'a: 4 voxels (3.3%) lie outside the field of view (NaN or padding): set to -1024 HU' in said
    np.testing.assert_array_equal(
        loaded(tmp_path / 'out', 'images')['a'], np.nan_to_num(image, nan=-1024).transpose(1, 0, 2)
    )


@pytest.mark.parametrize(('unit', 'factor'), [('meter', 1000), ('micron', 0.001)])
def test_metres_and_microns_become_mm(unit, factor, tmp_path, convert):
    image = nib.Nifti1Image(random_volume(), np.diag([-2, -3, 5, factor]) / factor)
    image.header.set_xyzt_units(unit)
    (tmp_path / 'images').mkdir()
    nib.save(image, tmp_path / 'images/a.nii')
    said, _ = convert(tmp_path, tmp_path / 'out')
    assert f'a: its header is in {unit.replace("er", "re")}s: converted to mm' in said
    np.testing.assert_allclose(geometry(tmp_path / 'out', 'a')['spacing'], [3, 2, 5], rtol=1e-6)


def test_an_sform_of_zeros_gives_way_to_the_qform_else_nothing_is_known(tmp_path, convert):
    affine = np.array([[-2.0, 0, 0, 7], [0, -3, 0, -8], [0, 0, 5, 9], [0, 0, 0, 1]])
    for case, code in (('qform', 1), ('nothing', 0)):
        image = nib.Nifti1Image(random_volume(), affine)
        image.set_qform(affine, code)
        image.set_sform(np.diag([0, 0, 0, 1]), 1)
        write_bytes(tmp_path / f'images/{case}.nii', image.to_bytes())
    said, _ = convert(tmp_path, tmp_path / 'out')
    np.testing.assert_allclose(geometry(tmp_path / 'out', 'qform')['affine'], affine[:, [1, 0, 2, 3]], atol=1e-6)
    assert geometry(tmp_path / 'out', 'nothing')['holds'] == 'nothing'
    assert said.count('its sform lays out no volume: not used') == 2
    assert 'nothing: its header gives no affine' in said and 'nothing: image 5 x 6 x 4, unknown spacing' in said


def test_labels_of_NIH_are_turned_as_published_whatever_their_headers_say(tmp_path, paired, convert):
    image, label, affine, _ = paired
    path = tmp_path / 'TCIA_pancreas_labels-02-05-2017/label0001.nii.gz'
    flipped = affine @ axes.inv_ornt_aff(np.array([[0, 1], [1, -1], [2, 1]]), label.shape)
    for wrong in (flipped, affine + 4 * np.eye(4, k=3)):
        write_nifti(path, label, wrong)
        assert 'by transpose(1, 0, 2)' in convert(cwd=tmp_path)[0]
        np.testing.assert_array_equal(loaded(tmp_path, 'labels')['0001'], image)
    write_nifti(path, label, flipped)
    assert 'by the affines' in convert(tmp_path, '--orientation', 'affine')[0]


def test_a_copy_beside_the_raw_data_says_where_to_run_it(tmp_path):
    copy = shutil.copy(REPO / 'DATA2NPY/nii2npy.py', tmp_path)
    done = subprocess.run([sys.executable, copy], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and 'run this script where the repository has it' in done.stderr
    )


def test_files_that_are_left_out_are_named_and_counted(tmp_path, convert):
    write_nifti(tmp_path / 'images/a.nii.gz', random_volume())
    for name in ('.a.nii.gz', 'b.mgz', 'notes.txt'):
        (tmp_path / 'images' / name).write_bytes(b'text')
    (tmp_path / 'images/c.nii.gz').symlink_to('nowhere')
    (tmp_path / 'images/d.nii').touch()
    said, _ = convert('.', 'out', cwd=tmp_path, status=1)
    left_out = '3 files left out, hidden or not named as scans: ./images/.a.nii.gz, ./images/b.mgz, ./images/notes.txt'
    assert left_out in said.splitlines()
    assert 'c: error: images/c.nii.gz: no such file' in said and 'd: error: images/d.nii: not a readable' in said


DATASETS = {
    'Decathlon': {'labels': {'0': 'background', '1': 'pancreas', '2': 'cancer'}},
    'nnU-Net': {'labels': {'background': 0, 'pancreas': 1, 'cancer': 2, 'ignore': 3}},
}


@pytest.mark.parametrize('dataset', DATASETS)
def test_a_folder_of_Decathlon_or_nnU_Net_with_its_organs(dataset, tmp_path, convert):
    content = json.dumps(DATASETS[dataset])
    write_bytes(tmp_path / 'dataset.json', content.encode())
    for case in ('a', 'b'):
        write_nifti(tmp_path / f'imagesTr/{case}_0000.nii.gz', random_volume())
        write_nifti(tmp_path / f'labelsTr/{case}.nii.gz', (random_volume() > 0).astype(np.uint8))
    write_nifti(tmp_path / 'imagesTr/b_0001.nii.gz', random_volume())
    write_nifti(tmp_path / 'imagesTs/c_0000.nii.gz', random_volume())
    said, _ = convert('.', 'out', cwd=tmp_path, status=1)
    assert 'ORGAN_NUMBER=2: 1 pancreas, 2 cancer' in said and 'imagesTs: left out' in said
    assert (tmp_path / 'out/dataset.json').read_text() == content, 'where report.py finds it'
    assert 'b: error: 2 sources for one case: imagesTr/b_0000.nii.gz, imagesTr/b_0001.nii.gz' in said
    assert list(loaded(tmp_path / 'out', 'images')) == list(loaded(tmp_path / 'out', 'labels')) == ['a']
    (tmp_path / 'imagesTr/b_0001.nii.gz').unlink()
    convert(cwd=tmp_path)
    assert (tmp_path / 'dataset.json').read_text() == content, 'also where RAW is OUT'


@pytest.mark.parametrize('content', ['{', '{}', '{"labels": [1]}', '{"labels": {"1": null}, "a": 1}'])
def test_a_dataset_json_without_organs_stops_nothing(content, tmp_path, convert):
    write_bytes(tmp_path / 'dataset.json', content.encode())
    write_nifti(tmp_path / 'images/a.nii.gz', random_volume())
    convert(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize('ending', ['nrrd', 'mha', 'mhd'])
def test_NRRD_and_MetaImage_lie_where_NIfTI_of_the_same_scan_lies(ending, tmp_path, call):
    SimpleITK = pytest.importorskip('SimpleITK')
    affine = nib.affines.from_matvec([[0, -2.0, 0], [-1.8, 0, 3.2], [2.4, 0, 2.4]], [7, -8, 9])
    write_nifti(tmp_path / 'nifti/images/a.nii.gz', random_volume(), affine)
    write_nifti(tmp_path / 'nifti/labels/a.nii.gz', (random_volume() > 0).astype(np.uint8), affine)
    for kind in ('images', 'labels'):
        (tmp_path / 'itk' / kind).mkdir(parents=True)
        scan = SimpleITK.ReadImage(str(tmp_path / 'nifti' / kind / 'a.nii.gz'))
        SimpleITK.WriteImage(scan, str(tmp_path / 'itk' / kind / f'a.{ending}'))
    for raw in ('nifti', 'itk'):
        done = call(NII2NPY, tmp_path / raw, tmp_path / f'{raw}_out')
        assert done.code == 0 and 'by the affines' in done.out, done.out
    for kind in ('images', 'labels'):
        one, other = (loaded(tmp_path / f'{raw}_out', kind)['a'] for raw in ('nifti', 'itk'))
        np.testing.assert_array_equal(one, other)
    one, other = (geometry(tmp_path / f'{raw}_out', 'a')['affine'] for raw in ('nifti', 'itk'))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_broken_NRRD_or_missing_SimpleITK_is_one_line(tmp_path, call, monkeypatch):
    write_bytes(tmp_path / 'raw/images/a.nrrd', b'NRRD0004\n')
    monkeypatch.setitem(sys.modules, 'SimpleITK', None)
    assert 'install it with: pip install SimpleITK==' in converted(call, tmp_path, NII2NPY)
    monkeypatch.undo()
    pytest.importorskip('SimpleITK')
    assert 'a.nrrd: not readable' in converted(call, tmp_path, NII2NPY)


# --- images, labels and geometry of a case --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, call):
    """A data folder of cases a and b, converted from raw/."""
    for case, seed in (('a', 0), ('b', 1)):
        write_nifti(tmp_path / f'raw/images/{case}.nii.gz', random_volume(seed))
        write_nifti(tmp_path / f'raw/labels/{case}.nii.gz', (random_volume(seed) > 0).astype(np.uint8))
    assert call(NII2NPY, tmp_path / 'raw', tmp_path / 'data').code == 0
    return tmp_path / 'data'


def init(call, data):
    return call('init.py', data, 1, 2, -100, 240)


def test_a_case_as_converted_is_initialized_also_when_converted_again(folder, tmp_path, call):
    assert init(call, folder).code == 0
    assert call(NII2NPY, tmp_path / 'raw', folder, '--labels', tmp_path / 'raw/labels').code == 0
    shutil.rmtree(tmp_path / 'raw/labels')
    done = call(NII2NPY, tmp_path / 'raw', folder)
    assert done.code == 0 and 'was made for another' not in done.out
    assert init(call, folder).code == 0


@pytest.mark.parametrize('change', ['voxels', 'affine', 'shape'])
def test_a_label_of_an_image_that_was_converted_anew_is_named_and_refused_until_it_is_converted_too(
    change, folder, tmp_path, call
):
    image = random_volume(5, (6, 5, 3) if change == 'shape' else (6, 5, 4)) if change != 'affine' else random_volume()
    (tmp_path / 'raw/labels').rename(tmp_path / 'labels')
    write_nifti(tmp_path / 'raw/images/a.nii.gz', image, np.diag([-1, -1, 1, 1]) if change == 'affine' else None)
    for _ in range(2):
        done = call(NII2NPY, tmp_path / 'raw', folder)
        assert done.code == 0 and 'a: labels/a.npy was made for another images/a.npy: convert it again' in done.out
        assert 'b: labels' not in done.out
        assert refused(
            init(call, folder), 'labels/a.npy: images/a.npy has changed since its conversion; convert it again'
        )
    write_nifti(tmp_path / 'labels/a.nii.gz', (image > 0).astype(np.uint8))
    assert call(NII2NPY, tmp_path / 'raw', folder, '--labels', tmp_path / 'labels').code == 0
    assert init(call, folder).code == 0


def test_arrays_that_changed_since_their_conversion_are_refused_unless_that_is_said_to_be_right(folder, call):
    for kind, key in (('images', 'image_crc32'), ('labels', 'label_crc32')):
        np.save(folder / kind / 'a.npy', 1 - np.load(folder / kind / 'a.npy').clip(0, 1))
        assert refused(init(call, folder), f'{kind}/a.npy: its voxels have changed since its conversion')
        assert call('check_data.py', folder, 1, -100, 240).code == 1
        record = folder / 'geometry/a.json'
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != key}))
        assert init(call, folder).code == 0


def test_arrays_of_your_own_are_not_converted_over(folder, tmp_path, call):
    for kind, key in (('images', 'image_crc32'), ('labels', 'label_crc32')):
        path, record = folder / kind / 'a.npy', folder / 'geometry/a.json'
        made, own = np.load(path), 1 - np.load(path).clip(0, 1)
        np.save(path, own)
        assert call(NII2NPY, tmp_path / 'raw', folder).code == 0, 'a change that is not said to be right'
        np.testing.assert_array_equal(np.load(path), made)
        np.save(path, own)
        text = re.sub(rf'.*"{key}".*\n', '', record.read_text())  # as docs/data.md does
        record.write_text(text)
        done = call(NII2NPY, tmp_path / 'raw', folder)
        assert done.code == 0 and done.out.count(f'{path} is kept: it is not what the conversion makes') == 1
        assert np.load(path).tolist() == own.tolist() and key not in record.read_text()
        path.unlink()
        assert call(NII2NPY, tmp_path / 'raw', folder).code == 0
        np.testing.assert_array_equal(np.load(path), made)


def test_an_image_of_another_shape_is_refused_until_its_geometry_goes(folder, call):
    for kind in ('images', 'labels'):
        np.save(folder / kind / 'a.npy', np.load(folder / kind / 'a.npy')[:, 1:])
    assert refused(init(call, folder), 'images/a.npy: its shape is [5, 5, 4] instead of [5, 6, 4]')
    (folder / 'geometry/a.json').unlink()
    assert init(call, folder).code == 0


def test_a_stale_geometry_is_not_believed(folder, tmp_path, call, capsys):
    np.save(folder / 'images/a.npy', np.load(folder / 'images/a.npy') + 1)
    shutil.rmtree(tmp_path / 'raw/images')
    before = np.load(folder / 'labels/a.npy')
    done = call(NII2NPY, tmp_path / 'raw', folder)
    assert f'{folder}/geometry/a.json: not used with its image: its voxels have changed' in done.out
    assert done.code == 1 and 'a.nii.gz: not laid onto images/a.npy, which has changed since its conversion' in done.err
    np.testing.assert_array_equal(np.load(folder / 'labels/a.npy'), before)
    assert 'b: label 5 x 6 x 4, by the affines' in done.out
    done = call(NII2NPY, tmp_path / 'raw', folder, '--orientation', 'published')
    assert 'a: label 5 x 6 x 4, by transpose(1, 0, 2)' in done.out
    assert load_geometry(folder / 'geometry/b.json', (5, 6, 3)) is None
    assert 'b.json: not used with its image: its shape is [5, 6, 3] instead of [5, 6, 4]' in capsys.readouterr().out


def test_older_data_folders_and_own_arrays_go_on_working(folder, tmp_path, call):
    record = folder / 'geometry/a.json'
    older = {k: v for k, v in json.loads(record.read_text()).items() if k in ('affine', 'holds', 'source', 'type')}
    record.write_text(json.dumps(older))
    (folder / 'geometry/b.json').unlink()
    assert init(call, folder).code == 0
    shutil.rmtree(tmp_path / 'raw/labels')
    write_nifti(tmp_path / 'raw/images/b.nii.gz', random_volume(9))
    done = call(NII2NPY, tmp_path / 'raw', folder)
    assert done.code == 0 and 'a: labels' not in done.out and f'{folder}/images/b.npy is kept' in done.out


def test_a_label_of_your_own_is_not_left_with_another_image(folder, tmp_path, call):
    record, raw = folder / 'geometry/a.json', tmp_path / 'raw'
    record.write_text(re.sub(r'.*"label_crc32".*\n', '', record.read_text()))
    write_nifti(raw / 'images/a.nii.gz', random_volume(9))
    np.save(folder / 'labels/a.npy', np.load(folder / 'labels/a.npy')[::-1])
    before = (folder / 'labels/a.npy').read_bytes(), (folder / 'images/a.npy').read_bytes()
    for _ in range(2):
        done = call(NII2NPY, raw, folder)
        assert done.code == 1 and 'labels/a.npy is your own' in done.err and 'move it away' in done.err
        assert ((folder / 'labels/a.npy').read_bytes(), (folder / 'images/a.npy').read_bytes()) == before
        shutil.rmtree(raw / 'labels', ignore_errors=True)  # then the image alone


def test_a_label_beside_an_image_of_your_own_can_be_converted_again(folder, tmp_path, call):
    (folder / 'geometry/a.json').unlink()
    (folder / 'labels/a.npy').unlink()
    shutil.rmtree(tmp_path / 'raw/images')
    label = tmp_path / 'raw/labels/a.nii.gz'
    for scale in (1, 2):
        write_nifti(label, (random_volume() > 0).astype(np.uint8) * scale)
        assert call(NII2NPY, tmp_path / 'raw', folder).code == 0
        assert np.load(folder / 'labels/a.npy').max() == scale


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import resource
from scans.nifti import open_nifti
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
volume = open_nifti(sys.argv[2])
array = volume.label() if sys.argv[3] == 'label' else volume.image(print)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ('kind', 'dtype', 'size'), [('image', np.int16, 2), ('image', np.float64, 2), ('label', np.float64, 1)]
)
def test_reading_takes_little_more_memory_than_the_array(kind, dtype, size, tmp_path):
    shape = (512, 512, 80)  # 42 MB of int16
    write_nifti(tmp_path / 'a.nii.gz', np.broadcast_to(np.zeros(1, dtype), shape))
    command = [sys.executable, '-c', PEAK, REPO / 'OrganSegRSTN', tmp_path / 'a.nii.gz', kind]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < np.prod(shape) * size / 2**20 + 40


# --- bad files -----------------------------------------------------------------------------------------------------


def nifti_bytes(array=None, **fields):
    """A .nii of an int16 volume (6, 5, 4), fields of its header changed: {offset: bytes}."""
    array = random_volume() if array is None else array
    path = io.BytesIO()
    nib.Nifti1Image(array, np.eye(4)).to_stream(path)
    content = bytearray(path.getvalue())
    for field, value in fields.items():
        at, form = {'dim': (40, '<8h'), 'datatype': (70, '<2h'), 'vox_offset': (108, '<f'), 'extension': (348, '<4B2i'),
                    'slope': (112, '<2f'), 'sizeof_hdr': (0, '<i'), 'magic': (344, '<4s')}[field]  # fmt: skip
        struct.pack_into(form, content, at, *value)
    return bytes(content)


IMAGES = {
    'an empty file': (b'', 'not a readable NIfTI file'),
    'text': (b'text', 'not a readable NIfTI file'),
    'a header alone': (nifti_bytes()[:348], 'more than the file can hold', 'not a readable NIfTI file'),
    'half of a header': (nifti_bytes()[:200], 'not a readable NIfTI file'),
    'half of its voxels': (nifti_bytes()[:-120], 'more than the file can hold', 'not a readable NIfTI file'),
    'more voxels claimed than it holds': (nifti_bytes(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), 'more than the file can hold'),
    'negative sizes': (nifti_bytes(dim=[3, -6, 5, 4, 1, 1, 1, 1]), 'where one 3D volume is expected'),
    'no voxels': (nifti_bytes(dim=[3, 0, 5, 4, 1, 1, 1, 1]), 'where one 3D volume is expected'),
    'four axes': (nifti_bytes(dim=[4, 3, 2, 5, 4, 1, 1, 1]), 'shape (3, 2, 5, 4), where one 3D volume is expected'),
    'ninety axes': (nifti_bytes(dim=[90, 6, 5, 4, 1, 1, 1, 1]), 'not a readable NIfTI file'),
    'an unknown type of voxels': (nifti_bytes(datatype=[4444, 16]), 'not a readable NIfTI file'),
    'colours': (nifti_bytes(datatype=[128, 24]), 'not plain numbers'),
    'half of its voxels beyond its end': (nifti_bytes(vox_offset=[400.0]), 'more than the file can hold', 'not a readable NIfTI file'),
    'voxels at 10^15': (nifti_bytes(vox_offset=[1e15]), 'the voxels begin at byte 999999986991104'),
    'voxels inside the header': (nifti_bytes(vox_offset=[0.0]), 'the voxels begin at byte 0; write it again'),
    'one infinite voxel': (nifti_bytes(np.full((3, 2, 2), np.inf)), 'slice 0 holds infinite values'),
    'voxels at no number': (nifti_bytes(vox_offset=[float('nan')]), 'not a readable NIfTI file'),
    'another magic': (nifti_bytes(magic=[b'NiFT']), 'no NIfTI header'),
    'an intercept that is no number': (nifti_bytes(slope=[1, float('nan')]), 'not a readable NIfTI file'),
    'voxels that are no numbers': (nifti_bytes(np.full((3, 2, 2), np.nan)), 'all its values are NaN'),
    'complex voxels': (nifti_bytes(np.zeros((3, 2, 2), np.complex64)), 'it holds complex64, not plain numbers'),
    'a flat picture': (nifti_bytes(dim=[2, 6, 20, 1, 1, 1, 1, 1]), 'shape (6, 20), where one 3D volume is expected'),
}  # fmt: skip


@pytest.mark.usefixtures('spare')
@pytest.mark.parametrize('packed', [False, True], ids=['nii', 'nii.gz'])
@pytest.mark.parametrize('what', IMAGES)
def test_a_bad_NIfTI_image(what, packed, call, tmp_path):
    content, line, *when_packed = IMAGES[what]  # what a packed file holds shows only when it is unpacked
    line = when_packed[0] if packed and when_packed else line
    path = tmp_path / 'raw/images' / ('a.nii.gz' if packed else 'a.nii')
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert line in converted(call, tmp_path, NII2NPY)


PACKED = {
    'a gzip file cut off': (lambda: gzip.compress(nifti_bytes())[:-30], 'not a readable NIfTI file'),
    'a gzip file of noise': (lambda: b'\x1f\x8b\x08\0' + bytes(range(200)), 'not a readable NIfTI file'),
    'a gzip file with another checksum': (lambda: flip(gzip.compress(nifti_bytes()), -8), 'CRC check failed'),
    'a gzip bomb of voxels': (lambda: bomb(dim=[3, 2000, 1000, 1000, 1, 1, 1, 1]), 'more than the file can hold'),
    'a gzip bomb before its voxels': (lambda: bomb(vox_offset=[2.0**28]), 'its header says that the voxels begin at byte 268435456'),
    'a gzip bomb in an extension': (
        lambda: bomb(extension=[1, 0, 0, 0, 2**28, 6], vox_offset=[2.0**28]), 'its header says that the voxels begin at byte 268435456',
    ),
}  # fmt: skip


def flip(content, at):
    """Change one byte."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def bomb(**fields):
    """A NIfTI header, then zeros without end, packed."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(nifti_bytes(**fields)) + zeros(BOMB, packer)


@pytest.mark.usefixtures('spare')
@pytest.mark.parametrize('what', PACKED)
def test_a_bad_gzip_file(what, call, tmp_path):
    make, line = PACKED[what]
    (tmp_path / 'raw/images').mkdir(parents=True)
    (tmp_path / 'raw/images/a.nii.gz').write_bytes(make())
    assert line in converted(call, tmp_path, NII2NPY)


@pytest.mark.usefixtures('spare')
def test_a_gzip_bomb_behind_its_voxels_is_not_unpacked(call, tmp_path):
    (tmp_path / 'raw/images').mkdir(parents=True)
    (tmp_path / 'raw/images/a.nii.gz').write_bytes(bomb())
    assert call(NII2NPY, tmp_path / 'raw', tmp_path / 'out').code == 0


LABELS = {
    'half an organ': (random_volume() * 0.5, 'is not an organ; a label holds whole numbers from 0 to 255'),
    'organ 256': (np.full((6, 5, 4), 256, np.int16), '256 is not an organ'),
    'organ -1': (np.full((6, 5, 4), -1, np.int16), '-1 is not an organ'),
    'organ nan': (np.full((6, 5, 4), np.nan), 'nan is not an organ'),
    'a slice too few': (np.zeros((6, 5, 3), np.uint8), 'shape (6, 5, 3) does not fit its image, stored as (5, 6, 4)'),
    'axes in another order': (np.zeros((5, 6, 4), np.uint8), 'transposed does not fit its image'),
}


@pytest.mark.parametrize('what', LABELS)
def test_a_bad_label(what, call, tmp_path):
    label, line = LABELS[what]
    write_nifti(tmp_path / 'raw/images/a.nii.gz', random_volume(), code=0)
    write_nifti(tmp_path / 'raw/labels/a.nii.gz', label, code=0)
    assert line in converted(call, tmp_path, NII2NPY)


def affine_text(affine):
    return json.dumps({'affine': affine, 'holds': 'position', 'source': 'a', 'type': 'DICOM'})


GEOMETRIES = {
    'an empty file': '',
    'no JSON': '{',
    'a list': '[1, 2]',
    'another object': '{"a": 1}',
    'nested without end': '[' * 100000,
    'an affine of words': affine_text([['a'] * 4] * 4),
    'an affine of three rows': affine_text(np.eye(4)[:3].tolist()),
    'an affine of nothing': affine_text(np.zeros((4, 4)).tolist()),
    'an affine beyond all numbers': affine_text(np.full((4, 4), np.inf).tolist()),
    'a number of 400 digits': affine_text([[10**400] * 4] * 4),
    'another kind': '{"affine": [[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]], "holds": [], "source": "", "type": ""}',
}


@pytest.mark.parametrize('what', GEOMETRIES)
def test_a_bad_geometry(what, call, tmp_path):
    write_nifti(tmp_path / 'raw/labels/a.nii.gz', np.zeros((6, 5, 4), np.uint8))
    write_case(tmp_path / 'out', 'a', random_volume(shape=(5, 6, 4)), np.zeros((5, 6, 4), np.uint8))
    (tmp_path / 'out/geometry').mkdir()
    (tmp_path / 'out/geometry/a.json').write_text(GEOMETRIES[what])
    done = call(NII2NPY, tmp_path / 'raw', tmp_path / 'out')
    assert done.code == 1 and 'geometry/a.json: not a geometry (' in done.out.splitlines()[-1], done.out
    assert len(done.err.splitlines()) == 2


def test_a_pattern_without_a_place_for_the_case(call, tmp_path):
    (tmp_path / 'ct.nii').touch()
    assert refused(call(NII2NPY, tmp_path, '--images', tmp_path / 'ct.nii*'), 'no * in it that stands for the case')
