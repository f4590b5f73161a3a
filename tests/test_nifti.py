"""Masks as NIfTI: where they lie, what they hold, and that the same mask gives the same bytes."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from running.data_folder import Case
from scans import nifti
from scans.geometry import Geometry

AFFINE = np.array([[0, -2.0, 0, 30.5], [-3.0, 0, 0, 40], [0, 0, -5.0, 100.25], [0, 0, 0, 1]])
MASK = np.zeros((3, 4, 5), bool)
MASK[0, 1, 2] = True
CASE = Case(7, 'images/0008.npy', 'labels/0008.npy')


@pytest.fixture(autouse=True)
def not_said(monkeypatch):
    monkeypatch.setattr(nifti, '_said_unplaced', False)


def write_geometry(data, case, holds='position'):
    (data / 'geometry').mkdir(exist_ok=True)
    content = {'affine': AFFINE.tolist(), 'holds': holds, 'source': 'x', 'type': 'DICOM'}
    (data / 'geometry' / f'{case}.json').write_text(json.dumps(content))


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
    assert (
        capsys.readouterr().out
        == '0008: no geometry/0008.json that says where it lies: its .nii.gz is in voxels (said once)\n'
    )
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
    assert nifti.axis_codes(Geometry(AFFINE, 'position', 'x', 'DICOM')) == 'PLI'
    assert nifti.axis_codes(Geometry(AFFINE, 'spacing', 'x', 'DICOM')) == ''
    assert nifti.axis_codes(None) == ''
