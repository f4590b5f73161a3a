"""Dice, post-processing and the fusion of three planes, on literal arrays; C++ and scipy do the same."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import CODE
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import utils
from running.results import Results
from utils import Dice, DSC_computation, post_processing
from volumes import fusion


@pytest.fixture(params=['fast_functions', 'scipy'])
def engine(request, monkeypatch):
    """Run a test with the C++ module and with its scipy fallback."""
    if request.param == 'scipy':
        monkeypatch.setattr(utils, 'fast_functions', None)
    elif utils.fast_functions is None:
        pytest.skip('fast_functions is not built')
    return request.param


def line(text):
    """(1, 1, n) uint8 of a line of text, '#' being 1."""
    return np.array([[[pixel == '#' for pixel in text]]], np.uint8)


# --- Dice ----------------------------------------------------------------------------------------------------------


def test_dice_on_literal_masks(engine):
    score = DSC_computation(label=line('##..#'), pred=line('#.#..'))
    assert score == (0.4, 1, 2, 3)  # (DSC, intersection, pred sum, label sum)
    assert str(score) == '2 * 1 / (2 + 3) = 0.4'


def test_dice_takes_any_type_of_mask(engine):
    label = line('##..#')
    for pred in (line('#.#..').astype(bool), line('#.#..') * 7, line('#.#..').astype(np.int64), line('#.#..') * 0.5):
        assert DSC_computation(label, pred) == (0.4, 1, 2, 3)
    strided = np.zeros((2, 2, 10), np.uint8)
    strided[:1, :1, ::2] = line('#.#..')
    assert DSC_computation(label, strided[:1, :1, ::2]) == (0.4, 1, 2, 3)


def test_dice_of_nothing_with_nothing_is_undefined(engine):
    score = DSC_computation(line('...'), line('...'))
    assert math.isnan(score.value)
    assert str(score) == '2 * 0 / (0 + 0) = nan'
    assert DSC_computation(line('...'), line('#..')).value == 0


def test_masks_of_two_shapes_cannot_be_compared():
    with pytest.raises(ValueError, match=r'\(1, 1, 3\).*\(1, 1, 4\)'):
        DSC_computation(line('...'), line('....'))


# --- post-processing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('before', 'threshold', 'after'),
    [
        ('####.##.#........', 0.5, '####.##..........'),  # 2 is half of 4: kept
        ('####.##.#........', 0.6, '####.............'),
        ('####.##.#........', 0.0, '####.##.#........'),
        ('####.####.........', 1.0, '####.####.........'),
        ('###.#....', 0.5, '###.#....'),  # 4 = floor(9 / 2): half full, unchanged
        ('###.#.....', 0.5, '###.......'),  # 4 < floor(10 / 2)
        ('........', 0.5, '........'),
        ('########', 0.5, '########'),
        ('.', 0.5, '.'),
    ],
)
def test_components_below_the_threshold_of_the_largest_go(engine, before, threshold, after):
    F = line(before)
    np.testing.assert_array_equal(post_processing(F, F.copy(), threshold, 1), line(after))


def test_only_faces_connect(engine):
    F = np.zeros((4, 4, 4), np.uint8)
    F[0, 0, :3] = 1  # three in a row
    F[1, 1, 3] = 1  # touches it at a corner only
    expected = F.copy()
    expected[1, 1, 3] = 0
    np.testing.assert_array_equal(post_processing(F.copy(), F, 0.5, 1), expected)
    F[1, 0, 2] = F[1, 1, 2] = 1  # a bridge of faces
    np.testing.assert_array_equal(post_processing(F.copy(), F, 0.5, 1), F)


def test_it_works_in_place_and_returns(engine):
    F = line('####.#......')
    assert post_processing(F, F.copy(), 0.5, 1) is F
    np.testing.assert_array_equal(F, line('####........'))


def test_the_seed_has_no_effect_but_must_fit(engine):
    F = line('####.#......')
    np.testing.assert_array_equal(post_processing(F.copy(), np.zeros_like(F), 0.5, 1), line('####........'))
    with pytest.raises(ValueError, match='S'):
        post_processing(F.copy(), line('####'), 0.5, 1)


SEEDS = st.integers(0, 2**32 - 1)


@examples(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3), full=st.floats(0, 0.6), threshold=st.floats(0, 1), top2=st.booleans(),
    seed=SEEDS,
)  # fmt: skip
def test_fallback_and_module_do_the_same(shape, full, threshold, top2, seed):
    if utils.fast_functions is None:
        pytest.skip('fast_functions is not built')
    rng = np.random.default_rng(seed)
    F, label = ((rng.random(shape) < full).astype(np.uint8) for _ in range(2))
    fast, slow = F.copy(), F.copy()
    utils.fast_functions.post_processing(fast, F, threshold, top2)
    utils._post_processing_scipy(slow, F, threshold, top2)
    np.testing.assert_array_equal(fast, slow)
    counts = np.zeros(3, np.uint32)
    utils.fast_functions.DSC_computation(label, F, counts)
    assert counts.tolist() == [label.sum(), F.sum(), (label & F).sum()]


def test_without_the_module_it_is_said_once_that_scipy_is_slower():
    code = (
        'import sys; sys.modules["fast_functions"] = None\n'
        'import numpy as np, utils\n'
        'F = np.zeros((2, 2, 2), np.uint8); F[0, 0, 0] = 1\n'
        'for _ in range(3): print(utils.DSC_computation(F, F)); utils.post_processing(F, F, 0.5, 1)'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=CODE, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('slower') == 1
    assert done.stdout.count('2 * 1 / (1 + 1) = 1.0') == 3


# --- fusion --------------------------------------------------------------------------------------------------------


def test_fusion_of_literal_bytes(engine):
    x = np.array([[[255, 127, 128, 255, 0, 0, 100, 0, 0, 255]]], np.uint8)
    y = np.array([[[255, 0, 128, 255, 0, 0, 100, 0, 0, 0]]], np.uint8)
    z = np.array([[[255, 0, 127, 0, 127, 128, 183, 0, 0, 0]]], np.uint8)
    # sums of bytes: 765 127 383 510 127 128 383 0 0 255; a vote is at least 127.5, 382.5, 637.5
    masks = fusion.fusion_masks([x, y, z], 0.5)
    assert list(masks) == ['X', 'Y', 'Z', 'F1', 'F2', 'F3', 'F1P', 'F2P', 'F3P']
    expected = {
        'X': '#.##.....#',
        'Y': '#.##......',
        'Z': '#....##...',
        'F1': '#.##.##..#',
        'F2': '#.##..#...',
        'F3': '#.........',
        'F1P': '#.##.##..#',  # more than half full: unchanged
        'F2P': '#.##..#...',  # 1 is half of 2
        'F3P': '#.........',
    }
    for name, text in expected.items():
        np.testing.assert_array_equal(masks[name], line(text), err_msg=name)


def test_the_planes_own_masks_obey_the_threshold_and_the_votes_do_not():
    volume = np.array([[[0, 60, 130, 200, 255, 0, 0]]], np.uint8)
    masks = fusion.fusion_masks([volume, volume, volume], 0.75)
    np.testing.assert_array_equal(masks['X'], line('...##..'))
    np.testing.assert_array_equal(masks['F2'], line('..###..'))


def test_small_components_leave_the_post_processed_votes_only():
    volume = np.zeros((1, 1, 20), np.uint8)
    volume[0, 0, [0, 1, 2, 3, 8]] = 255
    masks = fusion.fusion_masks([volume] * 3, 0.5)
    for name in ('F1', 'F2', 'F3'):
        assert masks[name].sum() == 5
        np.testing.assert_array_equal(masks[f'{name}P'], line('####' + '.' * 16))


def test_nothing_anywhere_fuses_to_nothing(engine):
    masks = fusion.fusion_masks([np.zeros((2, 3, 4), np.uint8)] * 3, 0.5)
    assert not any(mask.any() for mask in masks.values())


# --- results lines -------------------------------------------------------------------------------------------------


def test_results_are_printed_and_kept_and_undefined_ones_counted_at_the_end(tmp_path, capsys):
    with Results(tmp_path / 'name', 'coarse') as results:
        results(f'  Testcase 1: DSC = {Dice(0.5, 1, 2, 2)} .')
        mean, std = results.average([0.25, math.nan, 0.75])
        results(f'average DSC = {mean} std = {std} .')
        assert not (tmp_path / 'name' / 'results.txt').exists(), 'unfinished'
    text = (
        '  Testcase 1: DSC = 2 * 1 / (2 + 2) = 0.5 .\n'
        'average DSC = 0.5 std = 0.25 .\n'
        '1 case(s) with an empty label and an empty prediction left out of the averages .\n'
    )
    assert (tmp_path / 'name' / 'results.txt').read_text() == text
    assert capsys.readouterr().out.startswith(text)


def test_an_average_of_nothing_defined_is_nan(tmp_path):
    assert all(math.isnan(value) for value in Results(tmp_path, 'coarse').average([math.nan, math.nan]))


def test_a_stopped_run_leaves_no_results(tmp_path):
    with pytest.raises(RuntimeError), Results(tmp_path, 'coarse') as results:
        results('first line')
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('content', ['import a_module_that_is_not_there', 'raise OSError("of another platform")'])
def test_a_module_that_a_build_by_hand_left_and_that_fails_is_named(tmp_path, content):
    shutil.copy(CODE / 'utils.py', tmp_path)
    (tmp_path / 'fast_functions.py').write_text(content)
    code = 'import numpy as np, utils; print(utils.DSC_computation(np.ones(3, bool), np.ones(3, bool)).value)'
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[1] == '1.0'
    assert f'remove {tmp_path / "fast_functions.py"} and _fast_functions.so beside it' in done.stdout
