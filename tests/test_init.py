"""init.py: folds, pairing, lists and slices, and every bad input."""

import shutil

import numpy as np
import pytest
from conftest import SHAPES, pretrain_args, write_case

from running.data_folder import Slice, fold_list, read_cases, read_list
from utils import in_training_set


def cases_a_fold(total, folds):
    """How many cases each fold tests, after checking that they are runs of cases in file order."""
    tested = [[i for i in range(total) if not in_training_set(total, i, folds, fold)] for fold in range(folds)]
    assert sum(tested, []) == list(range(total)), 'every case is tested once, in file order'
    return [len(cases) for cases in tested]


@pytest.mark.parametrize(
    ('total', 'folds', 'sizes'),
    [
        (82, 4, [20, 20, 21, 21]),  # NIH Pancreas-CT
        (80, 4, [20, 20, 20, 20]),
        (83, 4, [20, 21, 21, 21]),
        (8, 4, [2, 2, 2, 2]),
        (5, 2, [2, 3]),
        (7, 3, [2, 2, 3]),
        (3, 3, [1, 1, 1]),
        (3, 1, [3]),
    ],
)
def test_extra_cases_go_one_each_to_the_last_folds(total, folds, sizes):
    assert cases_a_fold(total, folds) == sizes


# --- what it writes ------------------------------------------------------------------------------------------------


def test_slices_are_those_of_the_volumes_unclipped(initialized):
    image, label = np.load(initialized / 'images/0002.npy'), np.load(initialized / 'labels/0002.npy')
    assert image.min() < -100, 'there is something to clip'
    np.testing.assert_array_equal(np.load(initialized / 'images_X/0002/0005.npy'), image[5])
    np.testing.assert_array_equal(np.load(initialized / 'images_Y/0002/0005.npy'), image[:, 5])
    np.testing.assert_array_equal(np.load(initialized / 'images_Z/0002/0005.npy'), image[:, :, 5])
    np.testing.assert_array_equal(np.load(initialized / 'labels_Y/0002/0005.npy'), label[:, 5])
    for axis, plane in enumerate('XYZ'):
        for number, shape in enumerate(SHAPES, 1):
            files = sorted(file.name for file in (initialized / f'images_{plane}' / f'{number:04d}').iterdir())
            assert files == [f'{j:04d}.npy' for j in range(shape[axis])]


def test_lists_hold_a_line_a_slice_with_paths_relative_to_the_data_folder(initialized):
    for axis, plane in enumerate('XYZ'):
        records = [Slice.read(line) for line in read_list(initialized / 'lists' / f'training_{plane}.txt')]
        assert [(r.case, r.index) for r in records] == [(c, j) for c, s in enumerate(SHAPES) for j in range(s[axis])]
        assert records[0].image_file == f'images_{plane}/0001/0000.npy'
        assert records[-1].label_file == f'labels_{plane}/0004/{SHAPES[3][axis] - 1:04d}.npy'
    label = np.load(initialized / 'labels/0001.npy')
    z = Slice.read(read_list(initialized / 'lists' / 'training_Z.txt')[3])
    a, b = np.nonzero(label[:, :, 3])
    assert z.organs == ((len(a), a.min(), a.max(), b.min(), b.max()),)
    image = np.load(initialized / 'images/0001.npy')[:, :, 3]
    assert z.average == pytest.approx(np.clip(image, -100, 240).mean())


def test_fold_lists_hold_a_line_a_case(initialized):
    assert read_list(fold_list(initialized, 'testing', 0)) == [
        '0 images/0001.npy labels/0001.npy',
        '1 images/0002.npy labels/0002.npy',
    ]
    assert [case.number for case in read_cases(initialized, 'training', 0)] == [2, 3]
    assert [case.number for case in read_cases(initialized, 'testing', 1)] == [2, 3]


def test_a_second_run_leaves_the_same_and_a_moved_folder_still_works(data, initialized, call):
    assert call('init.py', data, 1, 2, -100, 240).code == 0
    files = sorted(file.relative_to(initialized) for file in initialized.rglob('*') if file.is_file())
    assert files == sorted(file.relative_to(data) for file in data.rglob('*') if file.is_file())
    assert all((data / file).read_bytes() == (initialized / file).read_bytes() for file in files)


def test_it_tells_what_it_runs_with(data, call):
    first, code, arguments = call('init.py', data, 1, 2, -100, 240).out.splitlines()[:3]
    assert first == 'device: CPU (initialization needs no other)'
    assert code.startswith('code: ') and ', numpy ' in code
    assert arguments.startswith(
        f'arguments: data_path={data} organ_number=1 folds=2 low_range=-100.0 high_range=240.0 '
    )


def test_fold_lists_of_more_folds_formerly_are_removed(data, call):
    assert call('init.py', data, 1, 4, -100, 240).code == 0
    assert fold_list(data, 'testing', 3).exists()
    assert call('init.py', data, 1, 2, -100, 240).code == 0
    names = sorted(file.name for file in (data / 'lists').iterdir())
    assert names == ['testing_FD0.txt', 'testing_FD1.txt', 'training_FD0.txt', 'training_FD1.txt', 'training_X.txt',
                     'training_Y.txt', 'training_Z.txt']  # fmt: skip


def test_slices_of_a_formerly_longer_case_are_removed(data, call):
    for kind in ('images', 'labels'):
        np.save(data / kind / '0001.npy', np.load(data / kind / '0001.npy')[:, :, 2:6])
    assert call('init.py', data, 1, 2, -100, 240).code == 0
    assert len(list((data / 'images_Z/0001').iterdir())) == 4


def test_only_what_a_killed_run_of_its_own_has_left_is_removed(data, call):
    for folder in ('raw', 'images', 'images_Z'):
        (data / folder).mkdir(exist_ok=True)
        (data / folder / '.my notes.part').touch()
    (data / 'raw/.0001.77.part').mkdir()
    (data / 'images_Z/.0001.77.part').mkdir()
    assert call('init.py', data, 1, 2, -100, 240).code == 0
    left = sorted(str(path.relative_to(data)) for path in data.rglob('.*.part'))
    assert left == ['images/.my notes.part', 'images_Z/.my notes.part', 'raw/.0001.77.part', 'raw/.my notes.part']


# --- lists are the user's --------------------------------------------------------------------------------------------

INIT = (1, 2, -100, 240)


@pytest.mark.parametrize('name', ['training_FD0.txt', 'testing_FD1.txt', 'training_Y.txt'])
def test_a_list_that_was_edited_by_hand_is_replaced_only_with_overwrite(data, call, name):
    path = data / 'lists' / name
    written = path.read_text()
    path.write_text(written.split('\n', 1)[1])
    before = {file: file.stat().st_mtime_ns for file in data.rglob('*') if file.is_file()}
    assert refused(call('init.py', data, *INIT), f'{path}: edited by hand', '--overwrite (OVERWRITE=1 in run.sh)')
    assert {file: file.stat().st_mtime_ns for file in data.rglob('*') if file.is_file()} == before, 'nothing is touched'
    assert call('init.py', data, *INIT, '--overwrite').code == 0
    assert path.read_text() == written


@pytest.mark.parametrize('options', [(), ('--overwrite',)])
def test_a_case_that_is_refused_leaves_lists_and_slices_as_they_are(data, call, options):
    if options:
        (data / 'lists/testing_FD0.txt').write_text('0 images/0001.npy labels/0001.npy\n')  # the user's
    np.save(data / 'images/0001.npy', np.load(data / 'images/0001.npy') + 1)
    np.save(data / 'images/0004.npy', np.full(SHAPES[3], np.nan, np.float32))
    before = {file: file.read_bytes() for file in data.rglob('*') if file.is_file()}
    assert refused(call('init.py', data, *INIT, *options), 'images/0004.npy: not all values are finite')
    assert {file: file.read_bytes() for file in data.rglob('*') if file.is_file()} == before


def test_a_list_that_it_does_not_write_is_never_removed(data, call):
    for name in ('mine.txt', 'testing_FD9.txt'):
        (data / 'lists' / name).write_text('0 images/0001.npy labels/0001.npy\n')
    assert call('init.py', data, *INIT, '--overwrite').code == 0
    assert (data / 'lists/mine.txt').exists() and (data / 'lists/testing_FD9.txt').exists()


def test_without_a_record_a_folds_list_of_other_cases_is_a_users(data, call):
    """As the published init.py leaves them, with absolute paths; or written by hand."""
    path = data / 'lists/testing_FD0.txt'
    written = path.read_text()
    (data / 'init.json').unlink()
    path.write_text(written.replace('images/', '/media/NIH/images/').replace('labels/', '/media/NIH/labels/'))
    assert call('init.py', data, *INIT).code == 0
    assert path.read_text() == written
    for record in (None, '{"lists": 5}', 'not JSON'):
        (data / 'init.json').unlink(missing_ok=True)
        if record:
            (data / 'init.json').write_text(record)
        path.write_text(written.splitlines()[0] + '\n')
        assert refused(call('init.py', data, *INIT), f'{path}: edited by hand, or not made by init.py')


def test_if_changed_does_nothing_where_nothing_has_changed(data, call):
    (data / 'lists/testing_FD0.txt').write_text('0 images/0001.npy labels/0001.npy\n')  # the user's, and kept
    before = {file: file.stat().st_mtime_ns for file in data.rglob('*') if file.is_file()}
    done = call('init.py', data, *INIT, '--if_changed')
    assert (done.code, done.out.splitlines()[-1]) == (0, 'initialized before: nothing has changed')
    assert {file: file.stat().st_mtime_ns for file in data.rglob('*') if file.is_file()} == before


@pytest.mark.parametrize(
    'change',
    [
        lambda data: np.save(data / 'images/0002.npy', np.load(data / 'images/0002.npy')),
        lambda data: write_case(data, '0005', *(np.load(data / kind / '0001.npy') for kind in ('images', 'labels'))),
        lambda data: (data / 'labels/0004.npy').unlink(),
        lambda data: shutil.rmtree(data / 'labels_Y/0003'),
        lambda data: (data / 'lists/training_X.txt').unlink(),
        lambda data: (data / 'init.json').write_text((data / 'init.json').read_text().replace('==', '>=')),
        lambda data: (data / 'init.json').write_text('not JSON'),
    ],
    ids=['image', 'case more', 'case less', 'slices', 'list', 'is_organ', 'record'],
)
def test_if_changed_initializes_where_something_has_changed(data, call, change):
    change(data)
    done = call('init.py', data, *INIT, '--if_changed')
    assert done.code == 0 and 'cases in 2 folds, lists in' in done.out
    assert call('init.py', data, *INIT, '--if_changed').out.endswith('initialized before: nothing has changed\n')


@pytest.mark.parametrize('settings', [(2, 2, -100, 240), (1, 4, -100, 240), (1, 2, -101, 240), (1, 2, -100, 200)])
def test_if_changed_initializes_with_other_settings(data, call, settings):
    assert 'lists in' in call('init.py', data, *settings, '--if_changed').out


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_cases(tmp_path):
    """Two cases of 3 x 4 x 5, organ 1."""
    label = np.zeros((3, 4, 5), np.uint8)
    label[1, 1:3, 2:4] = 1
    for name in ('a', 'b'):
        write_case(tmp_path, name, np.arange(60, dtype=np.int16).reshape(3, 4, 5), label)
    return tmp_path


def refused(done, *parts):
    """The run ended with exit code 1 and one error line that holds `parts`."""
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert all(part in done.err for part in parts), done.err
    return True


def test_images_and_labels_are_paired_by_name_not_by_count(two_cases, call):
    shutil.move(two_cases / 'labels/a.npy', two_cases / 'labels/c.npy')
    done = call('init.py', two_cases, 1, 1, -100, 240)
    assert done.code == 0
    assert 'a: left out, it has no labels/a.npy' in done.out
    assert 'c: left out, it has no images/c.npy' in done.out
    assert read_list(fold_list(two_cases, 'testing', 0)) == ['0 images/b.npy labels/b.npy']


def test_no_pair_at_all_is_refused(two_cases, call):
    shutil.rmtree(two_cases / 'labels')
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'no images/*.npy with labels/*.npy')


def test_more_folds_than_cases_are_refused(two_cases, call):
    assert refused(call('init.py', two_cases, 1, 3, -100, 240), '2 cases', '3 folds')


def label_of(value):
    label = np.zeros((3, 4, 5))
    label[0, 0, 0] = value
    return label


@pytest.mark.parametrize(
    ('kind', 'volume', 'says'),
    [
        ('labels', np.zeros((3, 5, 4), np.uint8), '(3, 5, 4)'),
        ('images', np.zeros((3, 4), np.int16), '(3, 4)'),
        ('images', np.zeros((0, 4, 5), np.int16), '(0, 4, 5)'),
        ('images', np.full((3, 4, 5), np.nan), 'finite'),
        ('images', np.full((3, 4, 5), np.inf), 'finite'),
        ('images', np.array([{}]), 'not a readable .npy'),
        ('labels', label_of(0.5), 'whole numbers'),
        ('labels', label_of(-1), 'whole numbers'),
        ('labels', label_of(np.nan), 'whole numbers'),
        ('labels', label_of(np.inf), 'whole numbers'),
        ('labels', np.full((3, 4, 5), 'organ'), 'not a readable .npy'),
    ],
)
def test_a_bad_volume_is_refused_by_name_and_no_list_is_written(two_cases, call, kind, volume, says):
    np.save(two_cases / kind / 'b.npy', volume)
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'b', says)
    assert not (two_cases / 'lists').exists()


@pytest.mark.parametrize('content', [b'', b'not an array', b'\x93NUMPY\x01\x00'])
def test_a_file_that_is_no_array_is_refused_by_name(two_cases, call, content):
    (two_cases / 'images/b.npy').write_bytes(content)
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'images/b.npy')


def test_an_archive_under_an_arrays_name_is_refused_by_name(two_cases, call):
    with open(two_cases / 'images/b.npy', 'wb') as file:
        np.savez(file, volume=np.zeros((3, 4, 5)))
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'images/b.npy')


def test_a_truncated_array_is_refused_by_name(two_cases, call):
    path = two_cases / 'images/b.npy'
    path.write_bytes(path.read_bytes()[:-10])
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'images/b.npy')


@pytest.mark.parametrize('name', ['b 2', 'b\t2', ' b'])
def test_a_case_name_with_white_space_is_refused(two_cases, call, name):
    for kind in ('images', 'labels'):
        shutil.move(two_cases / kind / 'b.npy', two_cases / kind / f'{name}.npy')
    assert refused(call('init.py', two_cases, 1, 1, -100, 240), 'white space')


def test_labels_above_organ_number_are_warned_about(two_cases, call):
    np.save(two_cases / 'labels/b.npy', label_of(3).astype(np.uint8))
    done = call('init.py', two_cases, 2, 1, -100, 240)
    assert done.code == 0
    assert 'labels/b.npy: holds 3, above organ_number 2' in done.out


def test_whole_numbers_in_floats_and_booleans_are_labels(two_cases, call):
    np.save(two_cases / 'labels/a.npy', label_of(1))
    np.save(two_cases / 'labels/b.npy', label_of(1).astype(bool))
    assert call('init.py', two_cases, 1, 1, -100, 240).code == 0
    assert read_list(two_cases / 'lists/training_X.txt')[0].endswith(' 1 0 0 0 0')


def test_every_organ_has_its_numbers(two_cases, call):
    label = np.zeros((3, 4, 5), np.uint8)
    label[0, 1, 2], label[0, 3, 4] = 1, 3
    np.save(two_cases / 'labels/a.npy', label)
    assert call('init.py', two_cases, 3, 1, -100, 240).code == 0
    assert read_list(two_cases / 'lists/training_X.txt')[0].endswith(' 1 1 1 2 2 0 0 0 0 0 1 3 3 4 4')


def test_files_that_are_no_cases_are_named_and_counted(tmp_path, call):
    for i in range(2):
        write_case(tmp_path, f'{i}', np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), np.uint8))
    (tmp_path / 'images/gone.npy').symlink_to(tmp_path / 'nowhere.npy')
    for name in ('.hidden.npy', 'scan.nii.gz', 'B.NPY'):
        (tmp_path / 'images' / name).touch()
    done = call('init.py', tmp_path, 1, 2, -100, 240)
    assert done.code == 0
    assert 'images: 4 left out, hidden or not .npy files: .hidden.npy, B.NPY, gone.npy, scan.nii.gz' in done.out


def test_one_fold_leaves_no_case_to_train_on(tmp_path, call):
    write_case(tmp_path, '1', np.zeros((3, 4, 5), np.int16), np.ones((3, 4, 5), np.uint8))
    assert call('init.py', tmp_path, 1, 1, -100, 240).code == 0
    done = call('pretrain.py', *pretrain_args(tmp_path))
    assert done.code == 1 and 'with FOLDS=1 no case is left to train on' in done.err
