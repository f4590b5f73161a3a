"""Coarse and oracle testing, fusion and coarse to fine on tiny cases: what is computed, stored, reused and printed."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import FOLDER, coarse2fine_args, fusion_args, run_script, tiny_weights, training_args

from model import RSTN
from running.data_folder import print_once, read_cases
from running.weights import describe
from utils import DSC_computation, to_unit
from volumes.planes import region
from volumes.rounds import coarse_to_fine, stopped_at
from volumes.testing import PlaneSettings, PlaneTester, predict_volume, to_bytes


def within(low, high, thickness=3):
    """Settings of a test on the CPU with this intensity window."""
    return PlaneSettings((low, high), thickness, 4, torch.device('cpu'), 'fp32')


COARSE = 'results/coarse_testing_1e-5x10,4'
FINE = 'results/coarse2fine_testing_1e-5x10,4/FD0:XJ3_1,YJ3_1,ZJ3_1:e1111_0.5_0.5,2'
DICE = r'2 \* \d+ / \(\d+ \+ \d+\) = \d\.\d+'


def volume(path):
    with np.load(path) as file:
        assert file.files == ['volume']
        return file['volume']


def rewrite(path, array):
    np.savez_compressed(path, volume=array)


def lines(folder):
    return (folder / 'results.txt').read_text().splitlines()


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob('*.npz'))}


def succeeded(done):
    assert done.code == 0, done.err
    return done


# --- a volume along a plane ----------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Stands where a network does: hands on its middle slice's inputs, so that averages can be told."""

    def __init__(self, thickness=3):
        super().__init__()
        self.seen, self.thickness = [], thickness

    def forward(self, image, **others):
        self.seen.append({'image': image} | others)
        return image if self.thickness == 3 else image[:, 1:2]


def test_every_window_is_seen_clipped_and_scaled_and_averaged_back():
    image = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(np.int16) * 10 - 20
    for plane in 'XYZ':
        net = Recorder()
        found = predict_volume(net, image, plane, within(0, 200))
        assert [tuple(seen['image'].shape[:2]) for seen in net.seen] == [(image.shape['XYZ'.index(plane)], 3)]
        np.testing.assert_allclose(found, np.clip(image, 0, 200) / 200, atol=1e-6)
        assert found.dtype == np.float32


def test_windows_go_in_batches_of_so_many_pixels(monkeypatch):
    image, label = np.arange(5 * 2 * 3).reshape(2, 3, 5), np.ones((2, 3, 5), bool)
    monkeypatch.setattr('volumes.testing.PIXELS_AT_ONCE', {'cpu': 13})  # two slices of 2 x 3 pixels
    for marks in ({}, {'label': label}):
        net = Recorder()
        found = predict_volume(net, image, 'Z', within(0, 30), **marks)
        assert [len(seen['image']) for seen in net.seen] == [2, 2, 1]
        np.testing.assert_allclose(found, image / 30, atol=1e-6)


@pytest.mark.parametrize('slices', [1, 2])
def test_volumes_of_one_and_two_slices_work(slices):
    image = np.random.default_rng(0).integers(0, 200, (4, 5, slices))
    for thickness in (1, 3):
        found = predict_volume(Recorder(thickness), image, 'Z', within(0, 200, thickness))
        np.testing.assert_allclose(found, image / 200, atol=1e-6)
    net = RSTN(n_class=1, TEST='C', width=3).eval()
    assert predict_volume(net, image, 'Z', within(0, 200, 1)).shape == image.shape


def test_windows_without_a_voxel_of_label_are_skipped():
    image = np.full((2, 2, 7), 100)
    label = np.zeros(image.shape, bool)
    label[0, 0, 5] = True
    net = Recorder()
    found = predict_volume(net, image, 'Z', within(0, 200), label=label)
    assert net.seen[0]['label'][:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    # windows 4, 5, 6 of 0..6; slice 3 is covered by 2, 3, 4, slice 6 by 5, 6
    np.testing.assert_allclose(found[0, 0] * 2, [0, 0, 0, 1 / 3, 2 / 3, 1, 1], atol=1e-6)


def test_fine_testing_hands_on_score_and_mask_of_the_window():
    image, mask = np.zeros((2, 2, 3)), np.ones((2, 2, 3), np.uint8)
    score = np.broadcast_to(np.array([0.25, 0.5, 0.75], np.float32), (2, 2, 3))
    net = Recorder()
    predict_volume(net, image, 'Z', within(0, 200), score=score, mask=mask)
    assert net.seen[0]['score'][:, :, 0, 0].tolist() == [[0.25, 0.25, 0.5], [0.25, 0.5, 0.75], [0.5, 0.75, 0.75]]
    assert net.seen[0]['mask'].shape == (3, 3, 2, 2)


@pytest.mark.parametrize('dtype', [np.int16, np.int32, np.uint8, np.float64, '>i2'], ids=str)
def test_intensities_are_those_of_to_unit_whatever_the_type(dtype):
    image = np.arange(24).reshape(2, 3, 4).astype(dtype) * 7
    net = Recorder()
    predict_volume(net, image, 'X', within(10.5, 101))
    np.testing.assert_array_equal(net.seen[0]['image'][:, 1], to_unit(image, 10.5, 101))


def test_a_region_is_the_box_of_a_mask_with_a_rim_inside_the_volume():
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[4:6, 1, 5] = 1
    assert region(mask, 2) == (slice(2, 8), slice(0, 4), slice(3, 7))


def test_a_round_on_the_region_of_the_mask_is_that_on_the_whole_scan():
    """Nothing beyond margin and saliency's reach of the mask changes a fine round, along any plane."""
    rng = np.random.default_rng(0)
    image = rng.integers(-200, 300, (30, 28, 26)).astype(np.int16)
    score, mask = rng.random(image.shape, np.float32), np.zeros(image.shape, np.uint8)
    mask[12:17, 3:8, 10:16] = rng.random((5, 5, 6)) > 0.5
    net = RSTN(crop_margin=4, TEST='F', width=4).eval()
    net.load_state_dict(tiny_weights())
    place = region(mask, PlaneTester('X', [], 'F', within(-100, 240)).reach)
    assert np.prod([s.stop - s.start for s in place]) < image.size / 3
    for plane in 'XYZ':
        whole = predict_volume(net, image, plane, within(-100, 240), score=score, mask=mask)
        part = predict_volume(net, image[place], plane, within(-100, 240), score=score[place], mask=mask[place])
        assert whole.max() > 0.1
        np.testing.assert_allclose(part, whole[place], atol=1e-6)
        whole[place] = 0
        assert not whole.any()


def test_probabilities_are_stored_rounded_and_128_is_organ():
    stored = to_bytes(np.array([0, 0.4999, 0.5, 0.502, 1], np.float32))
    assert stored.dtype == np.uint8
    assert stored.tolist() == [0, 127, 128, 128, 255]


# --- coarse and oracle testing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(('script', 'stage'), [('coarse_testing.py', 'coarse'), ('oracle_testing.py', 'oracle')])
def test_results_lines_volumes_and_their_reuse(tested, call, script, stage):
    done = succeeded(call(script, *training_args(tested)))
    folder = tested / f'results/{stage}_testing_1e-5x10,4/FD0:ZJ3_1.pkl'
    first, one, two, last = lines(folder)
    assert first == 'Evaluating snapshot e1111:'
    assert re.fullmatch(rf'  Testcase 1: DSC = {DICE} \.', one)
    assert re.fullmatch(rf'  Testcase 2: DSC = {DICE} \.', two)
    scores = [float(line.split()[-2]) for line in (one, two)]
    assert last == f'Snapshot e1111: average DSC = {sum(scores) / 2} .'
    assert all(line in done.out.splitlines() for line in lines(folder))
    assert [path.name for path in sorted((folder / 'volumes').iterdir())] == ['e1111_1.npz', 'e1111_2.npz']
    label = np.load(tested / 'labels/0001.npy') == 1
    found = volume(folder / 'volumes/e1111_1.npz')
    assert found.dtype == np.uint8 and found.shape == label.shape
    assert str(DSC_computation(label, found >= 128)) in one

    # again: nothing is computed, the results are rewritten from the stored volumes
    rewrite(folder / 'volumes/e1111_2.npz', (np.load(tested / 'labels/0002.npy') == 1) * np.uint8(128))
    before = times(folder)
    shutil.rmtree(tested / 'models')
    done = succeeded(call(script, *training_args(tested)))
    assert 'snapshot /' not in done.out
    assert times(folder) == before
    assert lines(folder)[1] == one
    assert lines(folder)[2].endswith('= 1.0 .')


@pytest.mark.parametrize('damage', ['truncated', 'garbage', 'empty', 'another shape', 'another name', 'flipped bytes'])
def test_a_damaged_volume_is_computed_again_with_a_line(tested, call, damage):
    succeeded(call('coarse_testing.py', *training_args(tested)))
    folder = tested / COARSE / 'FD0:ZJ3_1.pkl'
    path, expected = folder / 'volumes/e1111_2.npz', lines(folder)
    good = volume(path)
    content = path.read_bytes()
    if damage == 'another shape':
        rewrite(path, good[:-1])
    elif damage == 'another name':
        np.savez_compressed(path, prediction=good)
    elif damage == 'flipped bytes':
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - b for b in content[middle : middle + 40]) + content[middle + 40 :]
        )
    else:
        path.write_bytes({'truncated': content[: len(content) // 2], 'garbage': b'volume', 'empty': b''}[damage])
    done = succeeded(call('coarse_testing.py', *training_args(tested)))
    assert [line for line in done.out.splitlines() if line.startswith(str(path)) and 'made again' in line]
    assert lines(folder) == expected
    np.testing.assert_array_equal(volume(path), good)


def test_oracle_volumes_of_another_rule_for_the_organ_are_not_reused(tested, call):
    succeeded(call('oracle_testing.py', *training_args(tested)))
    record = tested / 'results/oracle_testing_1e-5x10,4/FD0:ZJ3_1.pkl/run.json'
    record.write_text(record.read_text().replace('label == organ_ID', 'label >= organ_ID'))
    done = call('oracle_testing.py', *training_args(tested))
    assert done.code == 1 and "is_organ was 'def is_organ" in done.err and len(done.err.splitlines()) == 1


def test_oracle_volumes_of_another_label_are_not_fused(tested, call):
    for plane in 'XYZ':
        succeeded(call('oracle_testing.py', *training_args(tested, plane)))
    path = tested / 'labels/0002.npy'
    np.save(path, np.roll(np.load(path), 1, axis=0))
    done = call('oracle_fusion.py', *fusion_args(tested))
    assert done.code == 1 and 'case 2 label_file was 0002.npy' in done.err


def test_masks_of_another_case_are_not_scored_as_fused_for_this_one(tested, call):
    for plane in 'XYZ':
        succeeded(call('coarse_testing.py', *training_args(tested, plane)))
    succeeded(call('coarse_fusion.py', *fusion_args(tested)))
    for plane in 'XYZ':
        shutil.rmtree(tested / COARSE / f'FD0:{plane}J3_1.pkl/volumes')
    path = tested / 'lists/testing_FD0.txt'
    path.write_text('\n'.join(reversed(path.read_text().splitlines())))
    done = call('coarse_fusion.py', *fusion_args(tested))
    assert done.code == 1 and 'case 1 image_file was 0001.npy' in done.err


def test_oracle_testing_sees_nothing_far_from_the_label(tested, call):
    succeeded(call('oracle_testing.py', *training_args(tested)))
    found = volume(tested / 'results/oracle_testing_1e-5x10,4/FD0:ZJ3_1.pkl/volumes/e1111_1.npz')
    label = np.load(tested / 'labels/0001.npy')
    near = np.flatnonzero(label.any(axis=(0, 1)))
    assert found.any()
    outside = [j for j in range(label.shape[2]) if j < near[0] - 2 or j > near[-1] + 2]
    assert not found[:, :, outside].any()
    a = np.flatnonzero(label.any(axis=(1, 2)))
    assert not found[: max(a[0] - 4, 0)].any() and not found[a[-1] + 5 :].any()


def test_cases_without_the_organ_are_nan_left_out_and_counted(tested, call):
    np.save(tested / 'labels/0002.npy', np.zeros_like(np.load(tested / 'labels/0002.npy')))
    succeeded(call('oracle_testing.py', *training_args(tested)))
    _, one, two, last, closing = lines(tested / 'results/oracle_testing_1e-5x10,4/FD0:ZJ3_1.pkl')
    assert two == '  Testcase 2: DSC = 2 * 0 / (0 + 0) = nan .'
    assert last == f'Snapshot e1111: average DSC = {one.split()[-2]} .'
    assert closing == '1 case(s) with an empty label and an empty prediction left out of the averages .'


def test_an_image_and_label_of_two_shapes_are_refused(tested, call):
    np.save(tested / 'labels/0001.npy', np.zeros((4, 4, 4), np.uint8))
    done = call('coarse_testing.py', *training_args(tested))
    assert done.code == 1
    assert len(done.err.splitlines()) == 1 and '(4, 4, 4)' in done.err
    assert not (tested / COARSE / 'FD0:ZJ3_1.pkl/results.txt').exists()


def test_a_missing_snapshot_is_one_line(data, call):
    done = call('coarse_testing.py', *training_args(data))
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'FD0:ZJ3_1.pkl: no such' in done.err and 'train' in done.err


def test_thickness_1_runs_through_testing(data, call):
    args = training_args(data)
    args[6] = 1
    folder = data / 'models/snapshots' / FOLDER
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(RSTN(n_class=1, width=4).state_dict(), folder / 'FD0:ZJ1_1.pkl')
    for script in ('coarse_testing.py', 'oracle_testing.py'):
        succeeded(call(script, *args))
    found = volume(data / COARSE / 'FD0:ZJ1_1.pkl/volumes/e1111_1.npz')
    assert (found == 128).all(), 'score layers of zero'
    args[6] = 3
    torch.save(RSTN(n_class=1, width=4).state_dict(), folder / 'FD0:ZJ3_1.pkl')
    done = call('coarse_testing.py', *args)
    assert done.code == 1 and 'slice_thickness 1, not 3' in done.err


# --- fusion --------------------------------------------------------------------------------------------------------


def test_fusion_reads_the_planes_stored_volumes_and_its_own_again(tested, call):
    done = call('coarse_fusion.py', *fusion_args(tested))
    assert done.code == 1
    assert (
        'FD0:XJ3_1.pkl/volumes/e1111_1.npz: no such volume, or not a whole one; test this plane and fold first'
        in done.err
    )
    for plane in 'XYZ':
        succeeded(call('coarse_testing.py', *training_args(tested, plane)))
    succeeded(call('coarse_fusion.py', *fusion_args(tested)))
    folder = tested / COARSE / 'FD0:fusion:XJ3_1.pkl,YJ3_1.pkl,ZJ3_1.pkl_e1111,0.5'
    names = ['X', 'Y', 'Z', 'F1', 'F2', 'F3', 'F1P', 'F2P', 'F3P']
    text = lines(folder)
    assert text[0] == 'Fusing results of 1 snapshots:'
    assert text[1] == '  Testcase 1:' and text[11] == '  Testcase 2:'
    for k, name in enumerate(names):
        assert re.fullmatch(rf'    DSC_{name} = {DICE} \.', text[2 + k])
        scores = [float(text[start + k].split()[-2]) for start in (2, 12)]
        assert text[21 + k].startswith(f'Average DSC_{name} = ')
        assert float(text[21 + k].split()[-2]) == pytest.approx(sum(scores) / 2)
    assert len(text) == 30
    files = {f'{name}_{case}.npz' for name in names for case in (1, 2)}
    assert {path.name for path in (folder / 'volumes').iterdir()} == files

    before = times(folder)
    succeeded(call('coarse_fusion.py', *fusion_args(tested)))
    assert (times(folder), lines(folder)) == (before, text)
    rewrite(folder / 'volumes/F2_1.npz', (np.load(tested / 'labels/0001.npy') == 1).astype(np.uint8))
    succeeded(call('coarse_fusion.py', *fusion_args(tested)))
    assert lines(folder)[6].startswith('    DSC_F2 = ') and lines(folder)[6].endswith(' = 1.0 .')


# --- coarse to fine ------------------------------------------------------------------------------------------------

SCORES = [(0.5, math.nan), (0.6, 0.85), (0.7, 0.92), (0.8, 0.985), (0.9, 0.97)]


@pytest.mark.parametrize(
    ('agreement', 'score'),
    [(0.8, 0.6), (0.85, 0.6), (0.90, 0.7), (0.95, 0.8), (0.98, 0.8), (0.99, 0.9)],  # the last: never reached
)
def test_stopping_is_at_the_first_round_that_agrees_else_at_the_last(agreement, score):
    assert stopped_at(SCORES, agreement) == score


def test_a_round_of_dice_0_is_not_passed_over():
    assert stopped_at([(0.5, math.nan), (0.0, 0.95), (0.7, 0.95)], 0.9) == 0


def test_without_fine_rounds_round_0_is_the_last():
    assert stopped_at([(0.5, math.nan)], 0.9) == 0.5


class Says:
    """A tester that predicts the next of these volumes and keeps what it was given, which is all there is."""

    reach = 99

    def __init__(self, *volumes):
        self.volumes, self.given = list(volumes), []

    def predict(self, image, score, mask):
        self.given.append((score, mask))
        return self.volumes.pop(0)


def one_row(*values):
    return np.array([[values]], np.float32)


def in_bytes(*values):
    return np.array([[values]], np.uint8)


def test_round_0_is_the_sum_of_the_coarse_bytes_over_765():
    volumes = [in_bytes(255, 128, 1), in_bytes(255, 127, 0), in_bytes(255, 128, 0)]
    mask, score = next(coarse_to_fine(volumes, [], None, 0.5))
    assert score.dtype == np.float32
    assert score.ravel().tolist() == [1, np.float32(383) / np.float32(765), np.float32(1) / np.float32(765)]
    assert mask.ravel().tolist() == [1, 1, 0]


def test_a_round_is_seen_with_the_mean_score_and_the_processed_mask_of_the_one_before():
    x = Says(one_row(0.9, 0.9, 0, 0, 0, 0, 0.3, 0, 0), one_row(*[0] * 9))
    y = Says(one_row(0.6, 0.9, 0, 0, 0, 0, 0.6, 0, 0), one_row(*[0] * 9))
    z = Says(one_row(0.3, 0.0, 0, 0, 0, 0, 0.6, 0, 0), one_row(*[0] * 9))
    coarse = [in_bytes(*[200] * 9)] * 3
    rounds = list(coarse_to_fine(coarse, [x, y, z], coarse[0], 0.5))
    assert [mask.ravel().tolist() for mask, _ in rounds] == [
        [1] * 9,
        [1, 1, 0, 0, 0, 0, 1, 0, 0],
        [0] * 9,
    ]  # the last, empty, ends the rounds
    for r in (0, 1):
        for tester in (x, y, z):
            for given, made in zip(tester.given[r], reversed(rounds[r])):
                np.testing.assert_array_equal(given, made)
    np.testing.assert_allclose(rounds[1][1], one_row(0.6, 0.6, 0, 0, 0, 0, 0.5, 0, 0), atol=1e-6)


def test_weights_of_the_planes_count_in_round_0_and_in_fine_rounds():
    coarse = [in_bytes(255), in_bytes(0), in_bytes(51)]
    fine = [Says(one_row(0.5)), Says(one_row(1)), Says(one_row(0))]
    weights = np.array([0.6, 0.2, 0.2], np.float32)
    (_, first), (_, second) = itertools.islice(coarse_to_fine(coarse, fine, coarse[0], 0.5, weights=weights), 2)
    assert first.dtype == second.dtype == np.float32
    assert (first.item(), second.item()) == pytest.approx((0.64, 0.5))


def test_small_components_are_removed_from_every_fine_round_but_not_from_round_0():
    says = Says(one_row(1, 1, 1, 0, 1, 0, 0, 0, 0, 0))
    coarse = [in_bytes(255, 255, 255, 0, 255, 0, 0, 0, 0, 0)] * 3
    (first, _), (second, _) = itertools.islice(coarse_to_fine(coarse, [says], coarse[0], 0.5), 2)
    assert first.ravel().tolist() == [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert second.ravel().tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_an_empty_round_0_has_no_fine_rounds():
    assert len(list(coarse_to_fine([in_bytes(25)] * 3, [Says()], None, 0.5))) == 1


def test_coarse_to_fine_lines_volumes_and_their_reuse(tested, call):
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    folder = tested / FINE
    text = lines(folder)
    patterns = ['Fusing results of 1 snapshots:']
    for case in (1, 2):
        patterns += [f'  Testcase {case}:', rf'    Round 0, DSC = {DICE} \.']
        for r in (1, 2):
            patterns += [rf'    Round {r}, DSC = {DICE} \.', rf'      Inter-iteration DSC = {DICE} \.']
    patterns += [rf'Round {r}, Average DSC = 0\.\d+ \.' for r in range(3)]
    patterns += [rf'DSC threshold = 0\.{n}, Average DSC = 0\.\d+ std = 0\.\d+ \.' for n in (90, 95, 98, 99)]
    assert len(text) == len(patterns)
    assert [pattern for pattern, line in zip(patterns, text) if not re.fullmatch(pattern, line)] == []

    # round 0 is the mean of the three coarse volumes, which are stored as coarse testing does
    paths = [tested / COARSE / f'FD0:{plane}J3_1.pkl/volumes/e1111_1.npz' for plane in 'XYZ']
    total = sum(volume(path).astype(int) for path in paths)
    np.testing.assert_array_equal(volume(folder / 'volumes/R0_1.npz'), total >= 0.5 * 765)
    assert len(list((folder / 'volumes').iterdir())) == 6
    coarse = volume(paths[2])
    paths[2].unlink()
    succeeded(call('coarse_testing.py', *training_args(tested)))
    np.testing.assert_array_equal(volume(paths[2]), coarse)

    # again, without the snapshots: from the stored volumes
    before = times(tested)
    shutil.rmtree(tested / 'models')
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    assert (times(tested), lines(folder)) == (before, text)
    rewrite(folder / 'volumes/R2_1.npz', (np.load(tested / 'labels/0001.npy') == 1).astype(np.uint8))
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    assert lines(folder)[5].startswith('    Round 2, DSC') and lines(folder)[5].endswith(' = 1.0 .')


def test_stored_coarse_volumes_are_used(tested, call):
    label = np.load(tested / 'labels/0001.npy') == 1
    for plane in 'XYZ':
        folder = tested / COARSE / f'FD0:{plane}J3_1.pkl/volumes'
        folder.mkdir(parents=True)
        rewrite(folder / 'e1111_1.npz', label * np.uint8(255))
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested, rounds=0)))
    text = lines(tested / FINE.replace(',2', ',0'))
    assert text[2].endswith(' = 1.0 .'), 'case 1, round 0'
    assert not text[4].endswith(' = 1.0 .'), 'case 2, round 0'
    assert text[5].startswith('Round 0, Average') and text[6].startswith('DSC threshold = 0.90')


def test_an_empty_mask_ends_the_rounds_which_are_recorded_as_empty(tested, call):
    for plane in 'XYZ':
        folder = tested / COARSE / f'FD0:{plane}J3_1.pkl/volumes'
        folder.mkdir(parents=True)
        for case in (1, 2):
            rewrite(folder / f'e1111_{case}.npz', np.zeros_like(np.load(tested / f'labels/000{case}.npy')))
    np.save(tested / 'labels/0002.npy', np.zeros_like(np.load(tested / 'labels/0002.npy')))
    count = np.count_nonzero(np.load(tested / 'labels/0001.npy') == 1)
    done = succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    assert 'snapshot /' not in done.out, 'no network was needed'
    assert lines(tested / FINE) == [
        'Fusing results of 1 snapshots:',
        '  Testcase 1:',
        f'    Round 0, DSC = 2 * 0 / (0 + {count}) = 0.0 .',
        f'    Round 1, DSC = 2 * 0 / (0 + {count}) = 0.0 .',
        '      Inter-iteration DSC = 2 * 0 / (0 + 0) = 1.0 .',
        f'    Round 2, DSC = 2 * 0 / (0 + {count}) = 0.0 .',
        '      Inter-iteration DSC = 2 * 0 / (0 + 0) = 1.0 .',
        '  Testcase 2:',
        '    Round 0, DSC = 2 * 0 / (0 + 0) = nan .',
        '    Round 1, DSC = 2 * 0 / (0 + 0) = nan .',
        '      Inter-iteration DSC = 2 * 0 / (0 + 0) = 1.0 .',
        '    Round 2, DSC = 2 * 0 / (0 + 0) = nan .',
        '      Inter-iteration DSC = 2 * 0 / (0 + 0) = 1.0 .',
        'Round 0, Average DSC = 0.0 .',
        'Round 1, Average DSC = 0.0 .',
        'Round 2, Average DSC = 0.0 .',
        'DSC threshold = 0.90, Average DSC = 0.0 std = 0.0 .',
        'DSC threshold = 0.95, Average DSC = 0.0 std = 0.0 .',
        'DSC threshold = 0.98, Average DSC = 0.0 std = 0.0 .',
        'DSC threshold = 0.99, Average DSC = 0.0 std = 0.0 .',
        '1 case(s) with an empty label and an empty prediction left out of the averages .',
    ]
    assert not volume(tested / FINE / 'volumes/R2_1.npz').any()


def test_cases_undefined_in_different_rounds_are_counted_once_each(tested, call):
    empty = [np.zeros_like(np.load(tested / f'labels/000{case}.npy')) for case in (1, 2)]
    folder = tested / FINE / 'volumes'
    folder.mkdir(parents=True)
    for case, undefined_round in ((1, 0), (2, 2)):
        np.save(tested / f'labels/000{case}.npy', empty[case - 1])
        for r in range(3):
            rewrite(folder / f'R{r}_{case}.npz', empty[case - 1] + np.uint8(r != undefined_round))
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    assert lines(tested / FINE)[-1].startswith('2 case(s) with an empty label and an empty prediction')


def test_a_scripts_run_from_another_folder_by_a_relative_path(tested):
    done = run_script('coarse_testing.py', *training_args(Path(tested.name)), cwd=tested.parent)
    assert done.code == 0, done.err
    assert len(lines(tested / COARSE / 'FD0:ZJ3_1.pkl')) == 4


def test_a_timestamp_is_in_every_name(tested, call):
    stamp = '20261123_000000'
    folder = tested / 'models/snapshots' / FOLDER
    for plane in 'XYZ':
        torch.save(tiny_weights(), folder / f'FD0:{plane}J3_1_{stamp}.pkl', _use_new_zipfile_serialization=False)
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested, rounds=1, timestamp=stamp)))
    succeeded(call('coarse_fusion.py', *fusion_args(tested, timestamp=stamp)))
    x, y, z = (f'{plane}J3_1_{stamp}' for plane in 'XYZ')
    assert (tested / f'results/coarse2fine_testing_1e-5x10,4/FD0:{x},{y},{z}:e1111_0.5_0.5,1/results.txt').exists()
    assert (tested / f'results/coarse_testing_1e-5x10,4/FD0:fusion:{x}.pkl,{y}.pkl,{z}.pkl_e1111,0.5').exists()
    assert not (tested / COARSE / 'FD0:XJ3_1.pkl').exists()


# --- what stored volumes were made with ----------------------------------------------------------------------------


def change_snapshot(data, args):
    torch.save(tiny_weights(seed=8), data / 'models/snapshots' / FOLDER / 'FD0:ZJ3_1.pkl')
    return args


def change_window(data, args):
    return [*args[:4], 400, *args[5:]]


def change_scan(data, args):
    image = data / read_cases(data, 'testing', 0)[0].image_file
    np.save(image, np.load(image)[::-1])
    return args


def change_precision(data, args):
    return [*args, '--precision', 'bf16']


def damage_run_json(data, args):
    (data / COARSE / 'FD0:ZJ3_1.pkl/run.json').write_text('{"window"')
    return args


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        (change_snapshot, r'snapshot FD0:ZJ3_1.pkl was \w{64}, is \w{64}'),
        (change_window, r'window was \[-100.0, 240.0\], is \[-100.0, 400.0\]'),
        (change_scan, r'case 1 image_file was 0001.npy \w{64}, is 0001.npy \w{64}'),
        (change_precision, 'precision was fp32, is bf16'),
        (damage_run_json, 'not a readable run.json'),
    ],
)
def test_volumes_made_with_other_settings_are_an_error_that_names_the_cure(tested, call, change, why):
    folder = tested / COARSE / 'FD0:ZJ3_1.pkl'
    succeeded(call('coarse_testing.py', *training_args(tested)))
    before, figures = times(folder), lines(folder)
    args = change(tested, training_args(tested))
    done = call('coarse_testing.py', *args)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert re.search(rf'{why}.+--overwrite \(OVERWRITE=1 in run.sh\)', done.err)
    assert (times(folder), lines(folder)) == (before, figures), 'nothing of it is lost'
    done = call(
        'coarse2fine_testing.py', *coarse2fine_args(tested)[:3], *args[3:8], *coarse2fine_args(tested)[8:], *args[22:]
    )
    assert done.code == 1 and times(folder) == before, 'coarse to fine leaves the folder as it is'
    succeeded(call('coarse_testing.py', *args, '--overwrite'))
    assert not times(folder).items() & before.items()
    succeeded(call('coarse_testing.py', *args))


def test_a_first_attempt_without_the_snapshot_leaves_nothing(tested, call):
    shutil.rmtree(tested / 'models')
    for script, args in (
        ('coarse_testing.py', training_args(tested)),
        ('coarse2fine_testing.py', coarse2fine_args(tested)),
    ):
        done = call(script, *args)
        assert (done.code, 'no such weights' in done.err) == (1, True)
    assert not (tested / 'results').exists()


def test_a_snapshot_that_is_gone_costs_no_volume(tested, call):
    succeeded(call('coarse_testing.py', *training_args(tested)))
    before = times(tested)
    shutil.rmtree(tested / 'models')
    call('coarse_testing.py', *training_args(tested))
    assert times(tested) == before


def test_overwrite_leaves_files_that_no_stage_made(tested, call):
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--nifti'))
    own = tested / FINE / 'corrected.nii.gz'
    own.touch()
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--stop_DSC', 0.5, '--overwrite'))
    assert own.exists()


def test_a_label_of_an_earlier_image_is_not_scored(tested, call):
    stages = [('coarse_testing.py', training_args(tested, plane)) for plane in 'XYZ']
    stages += [('coarse_fusion.py', fusion_args(tested)), ('coarse2fine_testing.py', coarse2fine_args(tested))]
    for script, args in stages:
        succeeded(call(script, *args))
    name = Path(read_cases(tested, 'testing', 0)[0].image_file).stem
    (tested / 'geometry').mkdir()
    (tested / f'geometry/{name}.json').write_text('{"label_crc32": null}')
    for script, args in stages:
        done = call(script, *args)
        assert done.code == 1 and f'labels/{name}.npy: images/{name}.npy has changed since its conversion' in done.err


def test_overwrite_removes_nothing_that_cannot_be_made_again(tested, call):
    """The snapshots are gone, or a plane's volume is: the results of other settings are all that is left."""
    stages = [('coarse_testing.py', training_args(tested, plane)) for plane in 'XYZ']
    stages += [('coarse2fine_testing.py', coarse2fine_args(tested)), ('coarse_fusion.py', fusion_args(tested))]
    for script, args in stages:
        succeeded(call(script, *args))
    shutil.rmtree(tested / 'models')
    shutil.rmtree(tested / COARSE / 'FD0:XJ3_1.pkl')
    kept, settings = times(tested), tested / COARSE / 'FD0:YJ3_1.pkl/run.json'
    for (script, args), change in zip(stages[2:], (['--precision', 'bf16'], ['--stop_DSC', 0.5], [])):
        if not change:
            settings.write_text(settings.read_text().replace('"fp32"', '"tf32"', 1))
        done = call(script, *args, *change, '--overwrite')
        assert done.code == 1 and re.search('no such (weights|volume)', done.err)
    assert times(tested) == kept and 'results.txt' in {path.name for path in (tested / FINE).iterdir()}


def test_overwrite_removes_nothing_where_a_scan_is_damaged_or_missing(tested, call):
    args, rounds = training_args(tested), coarse2fine_args(tested)
    succeeded(call('coarse_testing.py', *args))
    succeeded(call('coarse2fine_testing.py', *rounds))
    kept = times(tested)
    image = tested / read_cases(tested, 'testing', 0)[-1].image_file
    image.write_bytes(image.read_bytes()[:-10])
    damaged = call('coarse_testing.py', *args, '--overwrite')
    image.unlink()
    missing = call('coarse2fine_testing.py', *rounds, '--stop_DSC', 0.5, '--overwrite')
    for done in (damaged, missing):
        assert done.code == 1 and image.name in done.err
    assert times(tested) == kept


def test_a_probe_that_fails_leaves_the_signals(tested, call):
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested)))
    (tested / 'models/snapshots' / FOLDER / 'FD0:YJ3_1.pkl').unlink()
    signals = {path: path.read_bytes() for path in (tested / FINE / 'signals').iterdir()}
    assert call('coarse2fine_testing.py', *coarse2fine_args(tested), '--probe', 1).code == 1
    assert signals and {path: path.read_bytes() for path in (tested / FINE / 'signals').iterdir()} == signals


def test_volumes_of_another_precision_agree(tested, call):
    folder = tested / 'results/coarse_testing_1e-5x10,4/FD0:ZJ3_1.pkl'
    succeeded(call('coarse_testing.py', *training_args(tested)))
    exact = volume(folder / 'volumes/e1111_1.npz')
    succeeded(call('coarse_testing.py', *training_args(tested), '--precision', 'bf16', '--overwrite'))
    half = volume(folder / 'volumes/e1111_1.npz')
    assert not np.array_equal(half, exact)
    assert np.mean((half >= 128) != (exact >= 128)) < 0.01


def test_a_published_folder_of_volumes_without_run_json_is_taken_as_it_is(tested, call):
    succeeded(call('coarse_testing.py', *training_args(tested)))
    folder = tested / COARSE / 'FD0:ZJ3_1.pkl'
    before = times(folder)
    for script, args in (
        ('coarse2fine_testing.py', coarse2fine_args(tested)),
        ('coarse_fusion.py', fusion_args(tested)),
        ('coarse_testing.py', training_args(tested)),
    ):
        (folder / 'run.json').unlink(missing_ok=True)
        print_once.cache_clear()
        said = succeeded(call(script, *args)).out
        assert said.count(f'{folder}: uses {len(before)} volumes of unknown settings') == 1
    assert times(folder) == before


def test_fusion_names_a_planes_damaged_run_json(tested, call):
    for plane in 'XYZ':
        succeeded(call('coarse_testing.py', *training_args(tested, plane)))
    (tested / COARSE / 'FD0:YJ3_1.pkl/run.json').write_text('{"window"')
    done = call('coarse_fusion.py', *fusion_args(tested))
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'FD0:YJ3_1.pkl/run.json: not a readable run.json' in done.err and 'run the stage' in done.err


def test_overwriting_coarse_to_fine_loses_nothing_where_the_coarse_folders_are_of_other_settings(tested, call):
    args = coarse2fine_args(tested)
    succeeded(call('coarse2fine_testing.py', *args))
    before = times(tested)
    args[4] = 400
    done = call('coarse2fine_testing.py', *args, '--overwrite')
    assert done.code == 1 and 'coarse_testing.py --overwrite' in done.err
    assert times(tested) == before


def test_volumes_are_fused_and_merged_for_the_cases_that_they_are_of(tested, call):
    """The first case leaves the testing list: what is stored as case 1 is no longer of case 1."""
    for plane in 'XYZ':
        succeeded(call('coarse_testing.py', *training_args(tested, plane)))
    path = tested / 'lists/testing_FD0.txt'
    path.write_text(path.read_text().splitlines()[1])
    done = call('coarse_fusion.py', *fusion_args(tested))
    assert done.code == 1
    assert re.search(
        r'case 1 image_file was 0001.npy \w{64}, is 0002.npy \w{64}.*; give .* or test it again with', done.err
    )


def test_a_snapshot_of_arrays_that_lie_otherwise_is_refused_and_another_voxel_size_warned_about(tested, call):
    (tested / 'geometry').mkdir()
    for name in ('0001', '0002'):
        affine = np.diag([2.0, 2.0, 3.0, 1.0]) + np.eye(4, k=3)
        content = {'affine': affine.tolist(), 'holds': 'position', 'source': 'x', 'type': 'NIfTI'}
        (tested / f'geometry/{name}.json').write_text(json.dumps(content))
    path = tested / 'models/snapshots' / FOLDER / 'FD0:ZJ3_1.pkl'
    state = RSTN(width=4).state_dict()
    for orientation, code in (('PLI', 1), ('RAS', 0)):
        torch.save(describe(state, orientation=orientation, spacing=[1.0, 1.0, 1.0]), path)
        done = call('coarse_testing.py', *training_args(tested))
        assert done.code == code
    assert 'warning: voxels of 2 x 2 x 3 mm, but the networks were trained on 1 x 1 x 1 mm' in done.out


def test_what_is_assumed_of_published_snapshots_is_printed(tested, call):
    done = succeeded(call('coarse_testing.py', *training_args(tested)))
    assert 'does not say how it was trained; assumes plane Z, organ_ID 1, intensity_window [-100.0, 240.0]' in done.out


# --- predictions as NIfTI ------------------------------------------------------------------------------------------


def test_every_stage_writes_its_final_predictions_beside_their_volumes(tested, call):
    for stage in ('coarse', 'oracle'):
        for plane in 'XYZ':
            succeeded(call(f'{stage}_testing.py', *training_args(tested, plane), '--nifti'))
        succeeded(call(f'{stage}_fusion.py', *fusion_args(tested), '--nifti'))
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--nifti'))
    found = sorted((tested / 'results').rglob('*.nii.gz'))
    names = sorted(path.name for path in found)
    assert names == sorted(f'{name}_{case}.nii.gz' for name in [*['e1111'] * 6, *['F2P'] * 2, 'R2'] for case in (1, 2))
    for path in found:
        stored = volume(path.with_name(path.name.replace('.nii.gz', '.npz')))
        mask = np.asarray(nib.load(path).dataobj)
        np.testing.assert_array_equal(mask, stored >= 128 if path.name.startswith('e') else stored != 0)
    last = tested / FINE / 'volumes/R2_1.nii.gz'
    last.unlink()
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--nifti'))
    assert last.exists(), 'written from the stored volumes'


def test_a_case_that_stops_early_has_its_last_round_as_nifti(tested, call):
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--nifti'))
    succeeded(call('coarse2fine_testing.py', *coarse2fine_args(tested), '--nifti', '--stop_DSC', 0.01, '--overwrite'))
    assert sorted(path.name for path in (tested / FINE).rglob('*.nii.gz')) == ['R1_1.nii.gz', 'R1_2.nii.gz']


# --- stopping early ------------------------------------------------------------------------------------------------


def test_stop_DSC_ends_a_case_where_two_rounds_agree_and_its_last_score_goes_on(tested, call):
    args = coarse2fine_args(tested)
    succeeded(call('coarse2fine_testing.py', *args))
    full = lines(tested / FINE)
    succeeded(call('coarse2fine_testing.py', *args, '--stop_DSC', 0.01, '--overwrite'))
    text = lines(tested / FINE)
    assert text[:5] == full[:5]  # round 1 agrees with round 0 by more than 0.01
    assert text[5] == '  Testcase 2:'
    round_1, round_2 = (next(line for line in text if line.startswith(f'Round {r}, ')) for r in (1, 2))
    assert round_1.split('=')[1] == round_2.split('=')[1]
    ended = 'Rounds ended at an inter-iteration DSC of 0.01: so do higher DSC thresholds .'
    assert text[-1] == ended and ended not in full
    assert sorted(path.name for path in (tested / FINE / 'volumes').iterdir()) == [
        'R0_1.npz', 'R0_2.npz', 'R1_1.npz', 'R1_2.npz',
    ]  # fmt: skip
