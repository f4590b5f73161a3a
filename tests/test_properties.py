"""Properties that hold for all inputs: lists, folds, windows and their average, boxes and crops, post-processing, Dice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import ndimage

import utils
from Data import slice_bar
from model import bounding_box, crop, uncrop, union
from running import files
from running.data_folder import (
    Case,
    Slice,
    fold_list,
    name_fault,
    organ_extents,
    plane_view,
    read_cases,
    slice_averages,
)
from utils import DSC_computation, in_training_set, post_processing, to_unit
from volumes.planes import SliceAverage, slice_window

quick = examples(max_examples=60, deadline=None)
COUNTS = st.integers(0, 10**9)
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)
SEEDS = st.integers(0, 2**32 - 1)
NAMES = st.text(st.characters(exclude_categories=['C', 'Z'], exclude_characters='/'), min_size=1, max_size=20)


def masks(shape, full, seed):
    """Two random masks (W, H, L) uint8, about `full` of their voxels 1."""
    return ((np.random.default_rng([seed, i]).random(shape) < full).astype(np.uint8) for i in range(2))


# --- lists ---------------------------------------------------------------------------------------------------------


@quick
@given(
    case=COUNTS, index=COUNTS, name=NAMES, average=st.floats(-1e5, 1e5),
    organs=st.lists(st.tuples(*[COUNTS] * 5), min_size=1, max_size=20).map(tuple),
)  # fmt: skip
def test_a_slice_is_read_back_from_its_line(case, index, name, average, organs):
    record = Slice(case, index, f'images_X/{name}/0.npy', f'/abs/labels_X/{name}/0.npy', average, organs)
    assert Slice.read(str(record)) == record


@quick
@given(line=st.text() | st.lists(st.integers() | st.floats() | st.text()).map(lambda v: ' '.join(map(str, v))))
def test_any_other_line_is_a_slice_or_a_ValueError_that_quotes_it(line):
    try:
        assert len(Slice.read(line).organs) == (len(line.split()) - 5) // 5
    except ValueError as error:
        assert repr(line[:80]) in str(error) and 'run init.py again' in str(error)


@quick
@given(names=st.lists(st.tuples(NAMES, NAMES), max_size=10), start=st.integers(0, 9), tested=st.integers(0, 9))
def test_cases_are_read_back_from_their_lists(tmp_path_factory, names, start, tested):
    data = tmp_path_factory.mktemp('lists')
    cases = [Case(i, f'images/{image}.npy', f'labels/{label}.npy') for i, (image, label) in enumerate(names)]
    fold = {'testing': cases[start : start + tested], 'training': cases[:start] + cases[start + tested :]}
    for kind, expected in fold.items():
        with files.atomic_write(fold_list(data, kind, 0), 'w') as file:
            file.writelines(f'{" ".join(map(str, case))}\n' for case in expected)
    for kind, expected in fold.items():
        if expected:
            assert read_cases(data, kind, 0) == expected


@quick
@given(name=st.text(max_size=8))
def test_a_name_without_fault_is_one_field_of_one_line(name):
    if not name_fault(name):
        assert f'0 {name}\n'.split() == ['0', name] and len(name.splitlines()) == 1
        assert name.encode()


# --- folds ---------------------------------------------------------------------------------------------------------


@quick
@given(folds=st.integers(1, 12), data=st.data())
def test_every_case_is_tested_in_one_fold_and_folds_differ_by_one_the_larger_last(folds, data):
    total = data.draw(st.integers(folds, 100))
    tested = [[i for i in range(total) if not in_training_set(total, i, folds, fold)] for fold in range(folds)]
    assert sum(tested, []) == list(range(total))
    sizes = [len(cases) for cases in tested]
    assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1


@quick
@given(pixels=st.lists(st.integers(0, 50), min_size=1, max_size=60), share=st.floats(0.01, 1))
def test_the_share_of_slices_is_reached_by_the_fullest_that_have_the_organ(pixels, share):
    bar = slice_bar(pixels, share)
    present = [count for count in pixels if count > 0]
    active = [count for count in pixels if count >= bar]
    assert all(count > 0 for count in active)
    assert len(active) >= min(len(present), max(1, math.floor(len(present) * share)))
    assert not active or len([count for count in active if count > min(active)]) < max(1, len(present) * share)


# --- windows -------------------------------------------------------------------------------------------------------


@quick
@given(slices=st.integers(1, 40), thickness=st.sampled_from([1, 3]), data=st.data())
def test_a_window_is_three_neighbours_within_the_volume(slices, thickness, data):
    j = data.draw(st.integers(0, slices - 1))
    window = slice_window(j, slices, thickness)
    assert len(window) == 3 and window[1] == j and window == sorted(window)
    assert window[0] >= 0 and window[2] < slices and window[2] - window[0] <= thickness - 1


@quick
@given(
    shape=SHAPES, plane=st.sampled_from('XYZ'), thickness=st.sampled_from([1, 3]), seed=SEEDS, skipped=st.floats(0, 1)
)
def test_the_average_is_that_of_all_windows_that_cover_a_slice(shape, plane, thickness, seed, skipped):
    rng = np.random.default_rng(seed)
    average = SliceAverage(shape, plane, thickness)
    slices, reach = len(average.view), thickness // 2
    outputs = {
        j: rng.random((thickness, *average.view.shape[1:]), np.float32)
        for j in range(slices)
        if rng.random() >= skipped
    }
    for j, output in outputs.items():
        average.add(j, torch.from_numpy(output))
    found = plane_view(average.volume(), plane)
    for k in range(slices):
        covering = [j for j in range(k - reach, k + reach + 1) if 0 <= j < slices]
        expected = sum(outputs[j][k - j + reach] for j in covering if j in outputs) / len(covering)
        np.testing.assert_allclose(found[k], expected, rtol=1e-5, atol=1e-6)


@quick
@given(shape=SHAPES, full=st.floats(0, 1), seed=SEEDS)
def test_extents_and_averages_are_those_of_every_slice_by_itself(shape, full, seed):
    mask, _ = masks(shape, full, seed)
    image = np.random.default_rng(seed).integers(-2000, 2000, shape).astype(np.int16)
    extents, averages = organ_extents(mask.astype(bool)), slice_averages(image, (-100, 240))
    for plane in 'XYZ':
        for j, (marked, pixels) in enumerate(zip(plane_view(mask, plane), plane_view(image, plane))):
            a, b = np.nonzero(marked)
            expected = [len(a), a.min(), a.max(), b.min(), b.max()] if len(a) else [0] * 5
            assert extents[plane][j].tolist() == expected
            assert averages[plane][j] == pytest.approx(np.clip(pixels, -100, 240).mean())


@quick
@given(low=st.floats(-3000, 3000), width=st.floats(1, 5000), seed=SEEDS)
def test_intensities_keep_their_order_within_0_to_1(low, width, seed):
    image = np.sort(np.random.default_rng(seed).integers(-32768, 32768, 50).astype(np.int16))
    unit = to_unit(image, low, low + width)
    assert unit.dtype == np.float32 and (np.diff(unit) >= 0).all()
    assert unit.min() >= 0 and unit.max() <= 1 + 1e-3  # float32, of a narrow window far from 0
    np.testing.assert_array_equal(unit[image <= low], 0)


# --- boxes ---------------------------------------------------------------------------------------------------------

MARGINS = st.tuples(*[st.integers(0, 5)] * 4)


@quick
@given(shape=SHAPES, full=st.floats(0, 0.5), margins=MARGINS, seed=SEEDS)
def test_a_box_is_the_smallest_around_all_marks_plus_margins(shape, full, margins, seed):
    mask = torch.from_numpy(next(masks(shape, full, seed))) > 0
    box = bounding_box(mask, margins)
    if not mask.any():
        assert box is None
        return
    _, a, b = mask.nonzero().T.tolist()
    assert box == (max(min(a) - margins[0], 0), min(max(a) + 1 + margins[1], shape[1]),
                   max(min(b) - margins[2], 0), min(max(b) + 1 + margins[3], shape[2]))  # fmt: skip
    assert crop(mask, box).sum() == mask.sum()


@quick
@given(shape=SHAPES, full=st.floats(0.1, 0.5), margins=MARGINS, seed=SEEDS, outside=st.sampled_from([0.0, -9999999.0]))
def test_a_crop_put_back_is_the_image_within_its_box_and_nothing_else(shape, full, margins, seed, outside):
    image = torch.from_numpy(np.random.default_rng(seed).random(shape))
    box = bounding_box(torch.from_numpy(next(masks(shape, full, seed))) > 0, margins)
    assume(box is not None)
    back = uncrop(crop(image, box), box, shape[1:], outside)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[:, box[0] : box[1], box[2] : box[3]] = True
    assert back.shape == image.shape
    assert torch.equal(back[inside], image[inside]) and (back[~inside] == outside).all()


@quick
@given(shape=SHAPES, full=st.floats(0.1, 0.5), margins=MARGINS, seed=SEEDS)
def test_a_joint_box_holds_what_each_box_holds(shape, full, margins, seed):
    marks = [torch.from_numpy(mask) > 0 for mask in masks(shape, full, seed)]
    assume(all(mask.any() for mask in marks))
    joint = union([bounding_box(mask, margins) for mask in marks])
    assert joint == bounding_box(torch.cat(marks), margins)


# --- Dice and post-processing, by the C++ module and by scipy -------------------------------------------------------


@pytest.fixture(params=['module', 'scipy'], scope='module')
def engine(request):
    """The C++ module, or what stands in where it is not built."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 'scipy':
            patch.setattr(utils, 'fast_functions', None)
        elif utils.fast_functions is None:
            pytest.skip('fast_functions is not built')
        yield request.param


@quick
@given(shape=SHAPES, full=st.floats(0, 0.7), threshold=st.floats(0, 1), seed=SEEDS)
def test_components_that_reach_the_threshold_stay_whole_and_the_others_go(engine, shape, full, threshold, seed):
    before, S = masks(shape, full, seed)
    after = post_processing(before.copy(), S, threshold, 1)
    labels, components = ndimage.label(before)
    sizes = np.bincount(labels.ravel(), minlength=components + 1)
    if not components or before.sum() >= before.size // 2:
        np.testing.assert_array_equal(after, before)
        return
    for component in range(1, components + 1):
        stays = sizes[component] >= threshold * sizes[1:].max()
        assert (after[labels == component] == stays).all()
    assert not after[labels == 0].any()


@quick
@given(shape=SHAPES, full=st.floats(0, 0.4), threshold=st.floats(0, 1), seed=SEEDS)
def test_post_processing_twice_is_post_processing_once(engine, shape, full, threshold, seed):
    F, S = masks(shape, full, seed)
    once = post_processing(F, S, threshold, 1)
    np.testing.assert_array_equal(post_processing(once.copy(), S, threshold, 1), once)


@quick
@given(shape=SHAPES, full=st.floats(0, 1), seed=SEEDS)
def test_dice_counts_what_is_marked_in_both(engine, shape, full, seed):
    label, pred = masks(shape, full, seed)
    dice = DSC_computation(label, pred)
    assert dice[1:] == (int((label & pred).sum()), int(pred.sum()), int(label.sum()))
    if dice.pred + dice.label:
        assert 0 <= dice.value <= 1 and dice.value == 2 * dice.inter / (dice.pred + dice.label)
        assert (dice.value == 1) == np.array_equal(label, pred)
    else:
        assert math.isnan(dice.value)
    other = DSC_computation(pred, label)
    assert other[1:] == (dice.inter, dice.label, dice.pred)


@quick
@given(
    shape=SHAPES,
    full=st.floats(0, 1),
    seed=SEEDS,
    turn=st.permutations(range(3)),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
)
def test_dice_does_not_depend_on_how_the_volumes_lie(engine, shape, full, seed, turn, flips):
    views = [
        mask.transpose(turn)[tuple(slice(None, None, flip) for flip in flips)] for mask in masks(shape, full, seed)
    ]
    assert DSC_computation(*views)[1:] == DSC_computation(*masks(shape, full, seed))[1:]
