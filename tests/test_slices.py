"""Planes, windows and their average, on literal arrays."""

import numpy as np
import pytest
import torch

from running.data_folder import Slice, organ_extents, plane_view, slice_averages
from utils import for_device, to_unit
from volumes.planes import SliceAverage, slice_window

VOLUME = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # (W, H, L); VOLUME[w, h, l] == 12 w + 4 h + l


def test_a_plane_view_has_the_planes_axis_in_front():
    np.testing.assert_array_equal(
        plane_view(VOLUME, 'X')[1], [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    )  # (H, L)
    np.testing.assert_array_equal(plane_view(VOLUME, 'Y')[1], [[4, 5, 6, 7], [16, 17, 18, 19]])  # (W, L)
    np.testing.assert_array_equal(plane_view(VOLUME, 'Z')[1], [[1, 5, 9], [13, 17, 21]])  # (W, H)


def test_a_plane_view_is_a_view():
    volume = np.zeros((2, 3, 4))
    plane_view(volume, 'Y')[2] = 1
    np.testing.assert_array_equal(volume[:, 2], np.ones((2, 4)))
    assert volume.sum() == 8


@pytest.mark.parametrize(
    ('slices', 'windows'),
    [
        (1, [[0, 0, 0]]),
        (2, [[0, 0, 1], [0, 1, 1]]),
        (4, [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]),
    ],
)
def test_beyond_an_end_the_end_stands_in(slices, windows):
    assert [slice_window(j, slices, 3) for j in range(slices)] == windows


def test_thickness_1_sees_one_slice_three_times():
    assert [slice_window(j, 3, 1) for j in range(3)] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def averaged(slices, outputs, thickness=3):
    """The average along Z of (1, 1, slices) where window j's output is the literal outputs[j] (None: skipped)."""
    average = SliceAverage((1, 1, slices), 'Z', thickness)
    for j, output in enumerate(outputs):
        if output is not None:
            average.add(j, torch.tensor(output, dtype=torch.float32).reshape(thickness, 1, 1))
    return average.volume().ravel().tolist()


def test_one_slice_takes_the_middle_output():
    assert averaged(1, [[5, 7, 9]]) == [7]


def test_two_slices_are_each_covered_by_both_windows():
    # the window at 0 is (stand-in, 0, 1), that at 1 is (0, 1, stand-in)
    assert averaged(2, [[90, 1, 2], [3, 4, 90]]) == [(1 + 3) / 2, (2 + 4) / 2]


def test_three_slices_have_two_windows_at_the_ends_and_three_inside():
    assert averaged(3, [[90, 1, 2], [3, 4, 5], [6, 7, 90]]) == [(1 + 3) / 2, (2 + 4 + 6) / 3, (5 + 7) / 2]


def test_a_skipped_window_counts_as_zero_and_still_covers():
    assert averaged(3, [None, [3, 4, 5], [6, 7, 90]]) == [3 / 2, np.float32((4 + 6) / 3), (5 + 7) / 2]
    assert averaged(3, [None, None, None]) == [0, 0, 0]


def test_thickness_1_is_not_averaged():
    assert averaged(3, [[1], [2], [3]], thickness=1) == [1, 2, 3]


@pytest.mark.parametrize('plane', 'XYZ')
def test_constant_outputs_average_to_the_constant_on_every_plane(plane):
    shape = (3, 4, 5)
    average = SliceAverage(shape, plane, 3)
    slices = len(average.view)
    for j in range(slices):
        average.add(j, torch.full((3, *average.view.shape[1:]), 6.0))
    np.testing.assert_array_equal(average.volume(), np.full(shape, 6))


def test_intensities_are_clipped_and_scaled():
    unit = to_unit(np.array([-3000, -100, 70, 240, 3000], np.int16), -100, 240)
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit, [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize('dtype', ['int16', 'uint8', 'uint16', 'int32', 'float64', 'bool'])
@pytest.mark.parametrize('window', [(-100, 240), (10.5, 101.0)], ids=str)
def test_intensities_of_a_tensor_are_those_of_an_array(dtype, window):
    image = (np.arange(40) * 7).astype(dtype)
    np.testing.assert_array_equal(to_unit(torch.from_numpy(for_device(image)), *window), to_unit(image, *window))


def test_slices_are_averaged_after_clipping():
    image = np.array([[[-1000, 0], [40, 1000]], [[-100, -100], [240, 240]]], np.int16)  # (2, 2, 2)
    averages = slice_averages(image, (-100, 240))
    assert averages['X'].tolist() == [(-100 + 0 + 40 + 240) / 4, (-100 - 100 + 240 + 240) / 4]
    assert averages['Y'].tolist() == [(-100 + 0 - 100 - 100) / 4, (40 + 240 + 240 + 240) / 4]
    assert averages['Z'].tolist() == [(-100 + 40 - 100 + 240) / 4, (0 + 240 - 100 + 240) / 4]


def test_an_organs_extents_are_pixels_and_first_and_last_places_of_each_slice():
    mask = np.zeros((2, 4, 5), bool)
    mask[1, 1, 2] = mask[1, 2, 2] = mask[1, 2, 4] = True
    extents = organ_extents(mask)
    nothing = [0, 0, 0, 0, 0]
    assert extents['X'].tolist() == [nothing, [3, 1, 2, 2, 4]]  # a slice is (H, L)
    assert extents['Y'].tolist() == [nothing, [1, 1, 1, 2, 2], [2, 1, 1, 2, 4], nothing]  # (W, L)
    assert extents['Z'].tolist() == [nothing, nothing, [2, 1, 1, 1, 2], nothing, [1, 1, 1, 2, 2]]  # (W, H)


# --- a line of lists/training_X|Y|Z.txt ----------------------------------------------------------------------------


def test_a_list_line_is_written_and_read_back():
    record = Slice(3, 12, 'images_X/a/0012.npy', 'labels_X/a/0012.npy', 45.0, ((2, 0, 1, 1, 1), (0, 0, 0, 0, 0)))
    line = '3 12 images_X/a/0012.npy labels_X/a/0012.npy 45.0 2 0 1 1 1 0 0 0 0 0'
    assert str(record) == line
    assert Slice.read(line) == record


def test_published_lists_with_absolute_paths_are_read():
    record = Slice.read('0 1 /data/images_Z/0001/0001.npy /data/labels_Z/0001/0001.npy -87.25 4 1 2 3 4')
    assert record.image_file == '/data/images_Z/0001/0001.npy'
    assert record.organs == ((4, 1, 2, 3, 4),)


@pytest.mark.parametrize('line', ['', '0 1 a b -87.25', '0 1 a b -87.25 4 1 2 3', '0 1 a b -87.25 4 1 2 3 4 5'])
def test_a_line_that_is_no_slice_is_refused(line):
    with pytest.raises(ValueError, match='run init.py again'):
        Slice.read(line)
