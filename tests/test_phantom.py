"""The built-in demo data: make_phantom.py, and what the conversion makes of it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

REPO = Path(__file__).resolve().parent.parent
TINY = ['--cases', '2', '--size', '32', '30', '16']


def run(script, *arguments, status=0):
    """Run a script of DATA2NPY; its stdout and stderr."""
    command = [sys.executable, REPO / 'DATA2NPY' / script, *arguments]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == status, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def fingerprint(folder):
    """{file: hash of its bytes} of all files of a folder."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def converted(raw):
    """[(image, label), ...] of a phantom, through the conversion scripts."""
    run('dicom2npy.py', raw)
    assert 'by transpose(1, 0, 2)' in run('nii2npy.py', raw)
    names = sorted(os.listdir(raw / 'images'))
    assert names == sorted(os.listdir(raw / 'labels'))
    return [(np.load(raw / 'images' / name), np.load(raw / 'labels' / name)) for name in names]


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    raw = tmp_path_factory.mktemp('phantom with a blank')
    run('make_phantom.py', raw, '--cases', '2')
    return converted(raw)


def test_a_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        run('make_phantom.py', tmp_path / name, *TINY, '--seed', seed)
    a, b, c = (fingerprint(tmp_path / name) for name in 'abc')
    assert a == b and len(a) == 2 * 16 + 2 + 1
    assert not set(a.values()) & set(c.values())
    case = next((tmp_path / 'a/DOI/PANCREAS_0002').rglob('000000.dcm'))
    assert len(case.relative_to(tmp_path / 'a/DOI').parts) == 4  # DOI/PANCREAS_0002/STUDY/SERIES/000000.dcm


def test_what_is_there_already_is_kept(tmp_path):
    run('make_phantom.py', tmp_path, *TINY)
    before = fingerprint(tmp_path)
    assert 'already holds this phantom' in run('make_phantom.py', tmp_path, *TINY)
    assert 'already exists; name another folder' in run('make_phantom.py', tmp_path, *TINY, '--seed', 1, status=1)
    assert fingerprint(tmp_path) == before


def test_any_size_converts_and_pairs_also_by_the_published_transpose(tmp_path):
    run('make_phantom.py', tmp_path, *TINY, '--target_only')
    pairs = converted(tmp_path)
    assert all(image.shape == label.shape == (32, 30, 16) for image, label in pairs)
    assert all(np.unique(label).tolist() == [0, 1] for _, label in pairs)
    run('nii2npy.py', tmp_path, '--orientation', 'published')
    for (_, label), name in zip(pairs, ('0001', '0002')):
        np.testing.assert_array_equal(np.load(tmp_path / f'labels/{name}.npy'), label)


def test_the_target_is_small_and_its_neighbours_look_like_it(cohort):
    for image, label in cohort:
        assert image.shape == label.shape == (96, 96, 40) and np.unique(label).tolist() == list(range(9))
        assert 0.004 < (label == 1).mean() <= 0.015
        around = ndimage.binary_dilation(label == 1) & (label != 1)
        assert (label[around] == 2).any()  # it touches the duodenum
        alike = np.abs(ndimage.gaussian_filter(image.astype(float), 0.7)[around] - 92) < 40
        assert alike.mean() > 0.2  # and a good part of its surface looks like what lies beyond it


def test_the_HU_are_those_of_a_CT(cohort):
    expected = {1: (85, 105), 4: (95, 125), 5: (100, 140), 6: (110, 190), 7: (110, 190), 8: (165, 195)}
    for image, label in cohort:
        for organ, (low, high) in expected.items():
            inside = ndimage.binary_erosion(label == organ)  # the border voxels are mixtures
            assert low < image[inside].mean() < high, organ
        assert np.median(image[0]) < -950 and image.max() > 350  # air around, and bone
        assert 10 < image[ndimage.binary_erosion(label == 8)].std() < 25  # noise


def test_anatomies_differ(cohort):
    one, two = (label == 1 for _, label in cohort)
    assert 2 * (one & two).sum() / (one.sum() + two.sum()) < 0.8
