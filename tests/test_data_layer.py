"""The training set: which slices are active, and what a sample holds."""

import shutil

import numpy as np
import pytest
from conftest import write_case

from Data import DataLayer, slice_bar
from running.data_folder import fold_list, print_once, read_cases

PIXELS = [0, 0, 5, 9, 2, 0, 7, 3, 8, 1]  # 7 slices with the organ


@pytest.mark.parametrize(
    ('threshold', 'bar'),
    [
        (1, 1),  # all seven: the smallest, 1
        (0.98, 2),  # floor(6.86) = 6 places from the end of 0 0 0 1 2 3 5 7 8 9
        (0.5, 7),  # floor(3.5) = 3
        (0.2, 9),  # floor(1.4) = 1
        (4, 4),  # above 1: the bar itself
        (0, 0),  # every slice
    ],
)
def test_the_bar_is_the_count_that_the_fullest_share_reaches(threshold, bar):
    assert slice_bar(PIXELS, threshold) == bar


def test_slices_without_the_organ_are_never_active_below_a_share():
    assert slice_bar([0, 0, 0], 0.98) > 0


@pytest.fixture
def cases(tmp_path, call):
    """Cases 0, 1 (fold 0) and 2, 3 (fold 1) of 2 x 2 x 3, where a voxel of slice l of case c is 10 c + l."""
    for c, present in enumerate(([1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0])):
        image = np.broadcast_to(10 * c + np.arange(3), (2, 2, 3)).astype(np.int16)
        label = np.zeros((2, 2, 3), np.uint8)
        label[0, 0] = np.array(present) * 2
        write_case(tmp_path, f'case{c}', image, label)
    assert call('init.py', tmp_path, 2, 2, 0, 100).code == 0
    return tmp_path


def layer(data, fold=0, threshold=1, thickness=3, organ=2):
    return DataLayer(data, fold, 2, 0, 100, threshold, thickness, organ, 'Z')


def seen(sample):
    """The value of each of the three image slices of a sample, as it was before scaling."""
    return [round(float(value) * 100) for value in sample[0][:, 0, 0]]


def test_active_are_the_slices_with_the_organ_of_the_folds_training_cases(cases):
    assert [seen(sample)[1] for sample in layer(cases, fold=0)] == [21, 22, 30]
    assert [seen(sample)[1] for sample in layer(cases, fold=1)] == [0, 1, 2, 10, 11, 12]


def test_a_rule_other_than_that_of_init_gives_a_warning(cases, capsys):
    layer(cases)
    assert 'is_organ' not in capsys.readouterr().out
    record = cases / 'init.json'
    record.write_text(record.read_text().replace('label == organ_ID', 'label >= organ_ID'))
    layer(cases)
    assert 'training_Z.txt: is_organ (utils.py) was another one when init.py wrote it' in capsys.readouterr().out


def test_a_threshold_of_0_takes_every_slice(cases):
    assert [seen(sample)[1] for sample in layer(cases, threshold=0)] == [20, 21, 22, 30, 31, 32]


def test_a_window_ends_with_its_case(cases):
    assert [seen(sample) for sample in layer(cases, threshold=0)] == [
        [20, 20, 21],  # not [12, 20, 21]: case 1 ends before it
        [20, 21, 22],
        [21, 22, 22],  # not [21, 22, 30]
        [30, 30, 31],
        [30, 31, 32],
        [31, 32, 32],  # the end of the list
    ]
    assert seen(layer(cases, fold=1)[0]) == [0, 0, 1]  # its beginning


def test_a_sample_is_image_in_0_to_1_and_label_of_the_organ(cases):
    image, label = layer(cases)[0]
    assert (image.shape, label.shape) == ((3, 2, 2), (3, 2, 2))
    assert str(image.dtype) == str(label.dtype) == 'torch.float32'
    np.testing.assert_allclose(image[1], np.full((2, 2), 0.21), rtol=1e-6)
    np.testing.assert_array_equal(label[:, 0, 0], [0, 1, 1])  # slices 20, 21, 22
    assert label.sum() == 2


def test_a_stored_sample_is_small_and_becomes_the_same_on_a_device(cases):
    slices = layer(cases)
    stored = slices.stored(0)
    assert [str(tensor.dtype) for tensor in stored] == ['torch.int16', 'torch.uint8']
    assert stored[0][:, 0, 0].tolist() == [20, 21, 22]
    for one, other in zip(slices.on_device('cpu', *stored), slices[0]):
        np.testing.assert_array_equal(one, other)


def test_thickness_1_is_the_slice_three_times_and_one_label(cases):
    sample = layer(cases, thickness=1)[0]
    assert seen(sample) == [21, 21, 21]
    assert sample[1].shape == (1, 2, 2)
    assert sample[1].sum() == 1


def test_an_organ_that_the_list_lacks_is_refused(cases):
    with pytest.raises(ValueError, match='no organ 3'):
        layer(cases, organ=3)


def test_no_active_slice_is_refused_with_a_cure(cases):
    with pytest.raises(ValueError, match='lower slice_threshold'):
        layer(cases, organ=1)
    with pytest.raises(ValueError, match='lower slice_threshold'):
        layer(cases, threshold=50)


def test_a_moved_data_folder_and_absolute_paths_are_read(cases, tmp_path):
    expected = [seen(sample) for sample in layer(cases)]
    moved = tmp_path.with_name(tmp_path.name + ' moved')
    shutil.copytree(cases, moved)
    assert [seen(sample) for sample in layer(moved)] == expected
    path = moved / 'lists/training_Z.txt'
    path.write_text(
        path.read_text().replace(' images_Z', f' {cases}/images_Z').replace(' labels_Z', f' {cases}/labels_Z')
    )
    for kind in ('images', 'labels'):
        shutil.rmtree(moved / f'{kind}_Z')
    assert [seen(sample) for sample in layer(moved)] == expected


# --- lists that are not whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize('fold', [0, 1])
def test_a_slice_list_that_has_lost_its_last_lines_is_noticed_before_training(cases, fold):
    path = cases / 'lists/training_Z.txt'
    lines = path.read_text().splitlines(keepends=True)
    last = max(case.number for case in read_cases(cases, 'training', fold))
    for kept in range(len([line for line in lines if int(line.split()[0]) <= last])):
        path.write_text(''.join(lines[:kept]))
        with pytest.raises(ValueError, match=r'/lists/training_Z\.txt: .*run init\.py again'):
            layer(cases, fold=fold)


@pytest.mark.parametrize('lost', [0, 1, 3, 4, 6, 7, 9, 10])  # of the cases' three lines each
def test_a_list_that_has_lost_a_line_within_a_case_is_named(cases, lost):
    path = cases / 'lists/training_Z.txt'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:lost] + lines[lost + 1 :]))
    with pytest.raises(ValueError, match=r'training_Z\.txt: .*run init\.py again'):
        layer(cases)


@pytest.mark.parametrize('kind', ['training', 'testing'])
@pytest.mark.parametrize('edit', [str, lambda text: f'\ufeff{text}'.rstrip('\n'), lambda text: f'\n{text}\n\n'])
def test_a_list_edited_by_hand_is_taken_as_it_is_with_a_line_that_counts_its_cases(cases, kind, edit, capsys):
    path = fold_list(cases, kind, 0)
    first, second = path.read_text().splitlines()
    path.write_text(edit(f'{second}\n'))
    print_once.cache_clear()
    assert [str(case.number) for case in read_cases(cases, kind, 0)] == [second.split()[0]]
    assert f'{path}: 1 cases, as edited by hand' in capsys.readouterr().out
    if kind == 'training':
        assert {record.case for record in [layer(cases).slices[i] for i in layer(cases).active]} == {
            int(second.split()[0])
        }


def test_a_case_that_trains_and_tests_is_warned_about_and_one_that_stands_twice_refused(cases, capsys):
    training, testing = (fold_list(cases, kind, 0) for kind in ('training', 'testing'))
    testing.write_text(training.read_text())
    print_once.cache_clear()
    read_cases(cases, 'testing', 0)
    assert 'warning:' in capsys.readouterr().out
    testing.write_text(training.read_text() * 2)
    with pytest.raises(ValueError, match='holds case 2 twice'):
        read_cases(cases, 'testing', 0)


@pytest.mark.parametrize('kind', ['images', 'labels'])
def test_a_volume_of_the_fold_that_changed_after_it_was_sliced_is_warned_about(cases, kind, capsys):
    def said():
        layer(cases)
        return capsys.readouterr().out

    print_once.cache_clear()
    for case in (0, 2):  # one that tests, one that trains
        file = cases / kind / f'case{case}.npy'
        volume = np.load(file)
        np.save(file, volume)
        assert said() == '', 'another time, the same voxels'
        volume[1, 1, 1] = 1
        np.save(file, volume)
    warning = f'warning: {kind}/case2.npy: has changed since init.py sliced it; run init.py again\n'
    assert (said(), said()) == (warning, '')
    (cases / 'init.json').write_text('{"cases": {"case2": 3}}')
    print_once.cache_clear()
    assert said() == ''


def test_an_empty_list_is_refused(cases):
    fold_list(cases, 'testing', 0).write_text('\n')
    with pytest.raises(ValueError, match=r'testing_FD0\.txt: holds no case'):
        read_cases(cases, 'testing', 0)


def test_a_testing_list_that_stands_alone_is_taken_as_it_is(cases):
    wanted = read_cases(cases, 'testing', 0)
    fold_list(cases, 'training', 0).unlink()
    assert read_cases(cases, 'testing', 0) == wanted
