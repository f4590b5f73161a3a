"""merge_organs.py: the predictions of several organs in one NIfTI, by highest mean probability."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import FOLDER, coarse2fine_args, merge_args, tiny_weights

import merge_organs
from running.files import load_volume
from running.results import Checksums

FINE = 'results/coarse2fine_testing_1e-5x10,4'
AFFINE = np.array([[0, -2.0, 0, 30], [-3.0, 0, 0, 40], [0, 0, -5.0, 100], [0, 0, 0, 1]])


def row(*values):
    return np.array([[values]], np.uint8)


def merged(**found):
    return merge_organs.merge({int(organ[1:]): both for organ, both in found.items()}).ravel().tolist()


def test_a_voxel_is_of_the_organ_of_the_highest_probability():
    one, two = (row(1, 1, 1, 0), row(200, 130, 255, 0)), (row(0, 1, 1, 1), row(0, 140, 254, 200))
    assert merged(_1=one, _2=two) == [1, 2, 1, 2]
    assert merged(_2=two, _1=one) == [1, 2, 1, 2]


def test_only_organs_whose_mask_holds_the_voxel_are_asked():
    """The second organ's larger probability lies in a component that post-processing removed."""
    assert merged(_1=(row(1, 0), row(130, 90)), _2=(row(0, 0), row(250, 250))) == [1, 0]


def test_of_equal_probabilities_the_organ_named_first_is_taken_even_at_0():
    equal = row(1, 1), row(255, 0)
    assert merged(_5=equal, _3=equal) == [5, 5]


def test_three_organs_meet():
    parts = [(row(1, 1, 1), row(*p)) for p in ((130, 190, 150), (140, 180, 190), (150, 170, 200))]
    assert merged(_1=parts[0], _2=parts[1], _3=parts[2]) == [3, 1, 3]


# --- the script ----------------------------------------------------------------------------------------------------


def run_two_organs(data, call, *options):
    """coarse2fine_testing.py of organs 1 and 2 of the tiny data."""
    for organ in (1, 2):
        args = coarse2fine_args(data)
        args[2], args[7] = 2, organ
        done = call('coarse2fine_testing.py', *args, '--probability', *options)
        assert done.code == 0, done.err


@pytest.fixture
def two(tested):
    """The tiny data with snapshots of two organs: two networks that do not agree on what is bright enough."""
    for plane in 'XYZ':
        torch.save(tiny_weights(seed=8), tested / 'models/snapshots' / FOLDER / f'FD0:{plane}J3_2.pkl')
    return tested


def folder_of(data, organ):
    return data / FINE / f'FD0:XJ3_{organ},YJ3_{organ},ZJ3_{organ}:e1111_0.5_0.5,2'


def merged_folder(data):
    return data / 'results/merged_1e-5x10,4/FD0:XJ3_1+2,YJ3_1+2,ZJ3_1+2:e1111_0.5_0.5,2'


def volumes(data, organ, name, shape):
    return load_volume(folder_of(data, organ) / 'volumes' / name, shape)


def test_one_file_a_case_on_the_scans_grid_with_each_organs_number(two, call):
    (two / 'geometry').mkdir()
    content = {'affine': AFFINE.tolist(), 'holds': 'position', 'source': 'x', 'type': 'DICOM'}
    (two / 'geometry/0001.json').write_text(json.dumps(content))
    run_two_organs(two, call)
    done = call('merge_organs.py', *merge_args(two))
    assert done.code == 0, done.err
    assert f'{two}: no geometry/CASE.json that says where some cases lie: their .nii.gz is in voxels' in done.out

    folder = merged_folder(two)
    assert sorted(file.name for file in folder.glob('[!.]*')) == [
        '0001.nii.gz',
        '0002.nii.gz',
        'results.json',
        'results.txt',
        'run.json',
    ]
    np.testing.assert_array_equal(nib.load(folder / '0001.nii.gz').affine, AFFINE)
    np.testing.assert_array_equal(nib.load(folder / '0002.nii.gz').affine, np.eye(4))
    organs = np.asarray(nib.load(folder / '0001.nii.gz').dataobj)
    assert organs.dtype == np.uint8
    masks, scores = (
        [volumes(two, organ, name, organs.shape).astype(int) for organ in (1, 2)] for name in ('R2_1.npz', 'P_1.npz')
    )
    second = scores[1] * masks[1] > scores[0] * masks[0]
    np.testing.assert_array_equal(organs, np.where(second, 2, masks[0]))
    assert {0, 1, 2} == set(np.unique(organs)), 'both have their part'

    label = np.load(two / 'labels/0001.npy')
    both = np.count_nonzero((label == 1) & (organs == 1))
    line = f'    DSC of organ 1 = 2 * {both} / ({np.sum(organs == 1)} + {np.sum(label == 1)}) = '
    assert (folder / 'results.txt').read_text().splitlines()[2].startswith(line)


def test_the_stored_probability_is_the_last_rounds(two, call):
    """What it says of its mask: nothing below the threshold, and all above it that post-processing has kept."""
    run_two_organs(two, call)
    shape = np.load(two / 'labels/0001.npy').shape
    mask, probability = (volumes(two, 1, name, shape) for name in ('R2_1.npz', 'P_1.npz'))
    assert mask.any() and probability[mask != 0].min() >= 127


def test_rounds_stored_without_their_probability_are_made_again(two, call):
    args = coarse2fine_args(two)
    assert call('coarse2fine_testing.py', *args).code == 0
    folder = folder_of(two, 1) / 'volumes'
    assert not (folder / 'P_1.npz').exists(), 'unasked it is not stored'
    assert call('coarse2fine_testing.py', *args, '--probability').code == 0
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {'P_1.npz', 'P_2.npz'} < {file.name for file in before}
    (folder / 'P_1.npz').unlink()
    assert call('coarse2fine_testing.py', *args, '--probability').code == 0
    again = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert again == {'R0_1.npz', 'R1_1.npz', 'R2_1.npz', 'P_1.npz'}, 'only this case'


def test_a_probability_does_not_outlive_the_rounds_that_it_belongs_to(two, call):
    run_two_organs(two, call)
    (folder_of(two, 1) / 'volumes/R1_1.npz').unlink()
    assert call('coarse2fine_testing.py', *coarse2fine_args(two)).code == 0
    assert not (folder_of(two, 1) / 'volumes/P_1.npz').exists()


def test_cases_that_stopped_early_are_merged_from_their_last_round(two, call):
    run_two_organs(two, call, '--stop_DSC', 0.01)
    shape = np.load(two / 'labels/0001.npy').shape
    assert not (folder_of(two, 1) / 'volumes/R2_1.npz').exists()
    assert call('merge_organs.py', *merge_args(two)).code == 0
    organs = np.asarray(nib.load(merged_folder(two) / '0001.nii.gz').dataobj)
    mask = volumes(two, 1, 'R1_1.npz', shape) | volumes(two, 2, 'R1_1.npz', shape)
    np.testing.assert_array_equal(organs != 0, mask != 0)


@pytest.mark.parametrize('lost', ['R2_2.npz', 'P_2.npz'])
def test_an_organ_that_is_half_there_is_named(lost, two, call):
    run_two_organs(two, call)
    assert call('merge_organs.py', *merge_args(two)).code == 0
    (folder_of(two, 2) / 'volumes' / lost).unlink()
    done = call('merge_organs.py', *merge_args(two))
    assert done.code == 1
    assert (
        'case 2 is incomplete; run coarse2fine_testing.py --probability of organ 2 first' in done.err.splitlines()[-1]
    )


def test_run_json_holds_what_each_organ_was_tested_with_and_a_change_is_an_error(two, call):
    run_two_organs(two, call)
    assert call('merge_organs.py', *merge_args(two)).code == 0
    settings = json.loads((merged_folder(two) / 'run.json').read_text())
    snapshots = two / 'models/snapshots' / FOLDER
    for organ in (1, 2):
        name = f'FD0:XJ3_{organ}.pkl'
        assert settings[f'organ {organ} snapshot {name}'] == Checksums(two)(snapshots / name)
        assert settings[f'organ {organ} results'] == folder_of(two, organ).name
    assert settings['runs'][0]['arguments']['organ_IDs'] == [1, 2]

    run_two_organs(two, call, '--stop_DSC', 0.01, '--overwrite')
    done = call('merge_organs.py', *merge_args(two))
    assert done.code == 1 and 'organ 1 stop_DSC was none, is 0.01' in done.err and '--overwrite' in done.err
    lost = folder_of(two, 2) / 'volumes/P_1.npz'
    lost.rename(two / 'elsewhere.npz')
    before = sorted(merged_folder(two).iterdir())
    assert call('merge_organs.py', *merge_args(two), '--overwrite').code == 1
    assert sorted(merged_folder(two).iterdir()) == before, 'what cannot be made again is kept'
    (two / 'elsewhere.npz').rename(lost)
    assert call('merge_organs.py', *merge_args(two), '--overwrite').code == 0


@pytest.mark.parametrize(
    ('organs', 'words'),
    [
        ('1', 'not a list of two or more different organs'),
        ('1 1', 'not a list of two or more different organs'),
        ('1 x', 'organ_IDs'),
        ('1 3', '3 is above organ_number, 2'),
    ],
)
def test_organs_that_cannot_be_merged_are_refused(organs, words, call):
    done = call('merge_organs.py', *merge_args('data', organs))
    assert done.code == 2 and words in done.err.splitlines()[-1]
