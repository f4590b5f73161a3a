"""Snapshots: their names, which one is tested, and what is read and refused."""

import errno
import fcntl
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CODE, settings, tiny_weights

from model import load_RSTN
from running.data_folder import (
    epoch_name,
    find_pretrained,
    find_snapshot,
    find_snapshots,
    print_once,
    results_folder,
    snapshot_folder,
    snapshot_name,
)
from running.files import locked
from running.weights import load_weights

CPU = torch.device('cpu')
STAMP = '20261123_000000'


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('timestamp', 'name'),
    [
        (STAMP, 'FD2:XJ3_1_20261123_000000.pkl'),
        ('_', 'FD2:XJ3_1.pkl'),
        ('20261123', 'FD2:XJ3_1.pkl'),  # not 15 characters
        ('20261123_0000000', 'FD2:XJ3_1.pkl'),
        ('', 'FD2:XJ3_1.pkl'),
    ],
)
def test_a_timestamp_of_15_characters_is_part_of_a_snapshots_name(timestamp, name):
    assert snapshot_name(settings('d', current_fold=2), 'X', 'J', timestamp) == name


def test_folders_are_named_by_the_rates_as_typed():
    args = settings('d', learning_rate1='1e-5', learning_rate_m1='10', crop_margin=20)
    assert snapshot_folder(args) == Path('d/models/snapshots/SIJ_training_1e-5x10,20')
    assert results_folder(args, 'coarse', 'name') == Path('d/results/coarse_testing_1e-5x10,20/name')
    assert epoch_name(settings('d', epoch_S=2, epoch_I=6, epoch_J=8, epoch_step=2)) == 'e2682'


@pytest.fixture
def found(tmp_path, capsys):
    """found(names, timestamp): which of these snapshots is tested along X."""

    def found(names, timestamp, **changes):
        args = settings(tmp_path, **changes)
        snapshot_folder(args).mkdir(parents=True, exist_ok=True)
        for name in names:
            (snapshot_folder(args) / name).touch()
        return find_snapshot(args, 'X', timestamp)

    return found


def test_a_timestamp_asks_for_its_snapshot(found):
    names = ['FD0:XJ3_1.pkl', f'FD0:XJ3_1_{STAMP}.pkl', 'FD0:XJ3_1_20270101_000000.pkl']
    assert found(names, STAMP) == f'FD0:XJ3_1_{STAMP}.pkl'
    assert found(names, '20280101_000000') == 'FD0:XJ3_1_20280101_000000.pkl', 'even where it is missing'


def test_without_a_timestamp_the_untimestamped_snapshot_is_tested(found):
    assert found(['FD0:XJ3_1.pkl', f'FD0:XJ3_1_{STAMP}.pkl'], '_') == 'FD0:XJ3_1.pkl'


def test_without_an_untimestamped_one_it_is_the_newest_and_that_is_said(found, capsys):
    others = ['FD0:XS3_1_20300101_000000.pkl', 'FD0:YJ3_1_20300101_000000.pkl', 'FD1:XJ3_1_20300101_000000.pkl',
              'FD0:XJ1_1_20300101_000000.pkl', 'FD0:XJ3_12_20300101_000000.pkl']  # fmt: skip
    newest = 'FD0:XJ3_1_20261124_000000.pkl'
    assert found([*others, newest, f'FD0:XJ3_1_{STAMP}.pkl'], '_') == newest
    assert 'tests the training 20261124_000000' in capsys.readouterr().out


def test_any_15_characters_are_a_timestamp_also_when_searching(found):
    assert found(['FD0:XJ3_1_my-own-training.pkl', 'FD0:XJ3_1_too-long-for-a-stamp.pkl'], '_') == (
        'FD0:XJ3_1_my-own-training.pkl'
    )


def test_without_any_snapshot_the_untimestamped_one_is_what_is_missed(found):
    assert found([], '_') == 'FD0:XJ3_1.pkl'


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights():
    return tiny_weights(seed=3)


def save(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def probability(path, TEST='O'):
    net = load_RSTN(path, TEST, 3, 4, CPU)
    assert not net.training
    image, label = torch.linspace(0, 1, 3 * 24 * 28).reshape(1, 3, 24, 28), torch.ones(1, 3, 24, 28)
    with torch.inference_mode():
        return net(image, label=label, score=label, mask=label)


@pytest.mark.parametrize('TEST', 'COF')
def test_legacy_files_and_parallel_prefixes_give_the_same(tmp_path, weights, TEST):
    plain = probability(save(tmp_path / 'zip.pkl', weights), TEST)
    assert 0 < plain.mean() < 1
    assert torch.equal(probability(save(tmp_path / 'legacy.pkl', weights, legacy=True), TEST), plain)
    prefixed = {f'module.{key}': tensor for key, tensor in weights.items()}
    assert torch.equal(probability(save(tmp_path / 'parallel.pkl', prefixed), TEST), plain)
    assert torch.equal(probability(save(tmp_path / 'both.pkl', prefixed, legacy=True), TEST), plain)


def test_the_width_is_read_from_the_weights(tmp_path):
    net = load_RSTN(save(tmp_path / 'wide.pkl', tiny_weights(width=6)), 'O', 3, 4, CPU)
    assert net.coarse_model.fc7.weight.shape == (384, 384, 1, 1)
    assert net.margin == 4


def test_only_the_networks_that_are_used_are_kept(tmp_path, weights):
    path = save(tmp_path / 'a.pkl', weights)
    assert {key.split('.')[0] for key in load_RSTN(path, 'C', 3, 4, CPU).state_dict()} == {'coarse_model'}
    assert 'coarse_model' not in {key.split('.')[0] for key in load_RSTN(path, 'F', 3, 4, CPU).state_dict()}


def test_a_half_precision_snapshot_whose_sum_overflows_is_finite(tmp_path, weights):
    weights = {key: tensor.half() for key, tensor in weights.items()}
    weights['fine_model.fc6.bias'] = torch.full_like(weights['fine_model.fc6.bias'], 60000.0)
    torch.save(weights, tmp_path / 'a.pkl')
    load_RSTN(tmp_path / 'a.pkl', 'F', 3, 4, CPU)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pkl'):
        load_weights(tmp_path / 'none.pkl')


class Malicious:
    """Its pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'among weights'])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, weights, form):
    path, trap = tmp_path / 'bad.pkl', tmp_path / 'it ran'
    if form == 'pickle':
        path.write_bytes(pickle.dumps(Malicious(trap)))
    elif form == 'among weights':
        save(path, weights | {'saliency1.bias': Malicious(trap)})
    else:
        save(path, Malicious(trap), legacy=form == 'legacy')
    with pytest.raises(ValueError, match=r'bad\.pkl: refused'):
        load_weights(path)
    assert not trap.exists()
    if form != 'legacy':
        torch.load(path, weights_only=False) if form != 'pickle' else pickle.loads(path.read_bytes())
        assert trap.exists(), 'it would have run'


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('part', [0, 1, 2, 10, 30, 600, 5000, 0.3, 0.9])
def test_a_truncated_file_is_refused_by_name(tmp_path, weights, legacy, part):
    path = save(tmp_path / 'cut.pkl', weights, legacy)
    size = part if isinstance(part, int) else int(path.stat().st_size * part)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r'cut\.pkl'):
        load_weights(path)


def test_no_flipped_bit_makes_other_weights_of_a_snapshot(tmp_path):
    state = {'a': torch.arange(20.0), 'b': torch.arange(7.0)}
    path = save(tmp_path / 'flipped.pkl', state)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = load_weights(path)
        except ValueError as error:
            assert 'flipped.pkl: ' in str(error)
        else:
            assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state), place


def test_the_entry_that_has_changed_is_named(tmp_path, weights):
    path = save(tmp_path / 'flipped.pkl', weights)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo('flipped/data/5').header_offset + 200  # beyond its header and name, and what aligns it
    with open(path, 'r+b') as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 64]))
    with pytest.raises(ValueError, match=r"flipped\.pkl: .*'flipped/data/5' differs from its checksum"):
        load_weights(path)


@pytest.mark.parametrize('content', [b'hello\n', b'PK\x03\x04', b'\x80\x02.', bytes(100), b'FD0:XJ3_1.pkl' * 9])
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content):
    path = tmp_path / 'other.pkl'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'other\.pkl'):
        load_weights(path)


@pytest.mark.parametrize('value', [[torch.zeros(1)], {'epoch': 3}, torch.zeros(3), {1: torch.zeros(1)}])
def test_what_is_not_a_state_dict_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r'list\.pkl: not'):
        load_weights(save(tmp_path / 'list.pkl', value))


def test_another_thickness_is_named(tmp_path, weights):
    with pytest.raises(ValueError, match='slice_thickness 3, not 1'):
        load_RSTN(save(tmp_path / 'a.pkl', weights), 'O', 1, 4, CPU)


def test_missing_and_wrongly_shaped_keys_are_named(tmp_path, weights):
    lacking = {key: tensor for key, tensor in weights.items() if key != 'fine_model.fc7.bias'}
    with pytest.raises(ValueError, match=r'fine_model\.fc7\.bias is missing'):
        load_RSTN(save(tmp_path / 'a.pkl', lacking), 'O', 3, 4, CPU)
    wrong = weights | {'coarse_model.conv2_1.weight': torch.zeros(8, 4, 3, 1)}
    with pytest.raises(ValueError, match=r'coarse_model\.conv2_1\.weight is \(8, 4, 3, 1\), expected \(8, 4, 3, 3\)'):
        load_RSTN(save(tmp_path / 'b.pkl', wrong), 'C', 3, 4, CPU)
    with pytest.raises(ValueError, match='not an RSTN snapshot'):
        load_RSTN(save(tmp_path / 'c.pkl', {'conv1_1.weight': torch.zeros(4, 3, 3, 3)}), 'O', 3, 4, CPU)


# --- where training starts from ------------------------------------------------------------------------------------


def test_training_starts_from_the_first_there_is(tmp_path):
    args = settings(tmp_path)
    folder = tmp_path / 'models' / 'pretrained'
    folder.mkdir(parents=True)
    (folder / 'fcn8s_FD1_1.pth').touch()  # another fold's
    (folder / 'fcn8s_FD0_2.pth').touch()  # another organ's
    with pytest.raises(FileNotFoundError, match=r'pretrain\.py .*--convert FILE'):
        find_pretrained(args)
    for name in ('fcn8s_FD0_1.pth', 'fcn8s_from_vgg16.pth', 'fcn8s_from_caffe.pth'):
        (folder / name).touch()
        assert find_pretrained(args).name == name
    assert find_pretrained(settings(tmp_path, pretrained='own.pth')) == Path('own.pth')


def save_empty(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_three_planes_without_timestamps_are_of_one_training(tmp_path, capsys):
    """The newest snapshot of each plane may be of another training: two stopped trainings have left these."""
    args = settings(tmp_path, timestamp1_X='_', timestamp1_Y='_', timestamp1_Z='_')
    old, new = '20261101_000000', '20261102_000000'
    names = {time: [f'FD0:{plane}J3_1_{time}.pkl' for plane in 'XYZ'] for time in (old, new)}
    save_empty(snapshot_folder(args), *names[old], names[new][0])
    assert find_snapshots(args) == names[old]
    assert f'X, Y, Z: no snapshot without a timestamp; tests the training {old}' in capsys.readouterr().out
    save_empty(snapshot_folder(args), *names[new])
    assert find_snapshots(args) == names[new]
    args.timestamp1_X = old
    assert find_snapshots(args) == names[old], 'the training that is named'
    args.timestamp1_Y = new
    with pytest.raises(ValueError, match='name the timestamp of each plane'):
        find_snapshots(args)
    args.timestamp1_Z = new
    assert find_snapshots(args) == [names[old][0], *names[new][1:]], 'each is named: as asked'
    args.timestamp1_X = args.timestamp1_Y = args.timestamp1_Z = '_'
    save_empty(snapshot_folder(args), *(f'FD0:{plane}J3_1.pkl' for plane in 'XYZ'))
    capsys.readouterr()
    print_once.cache_clear()
    find_snapshots(args), find_snapshots(args)
    assert capsys.readouterr().out == f'X, Y, Z: tests the snapshots without a timestamp, not {old}, {new}\n'


def test_a_timestamp_of_one_plane_goes_with_snapshots_without_one(tmp_path):
    args, time = (
        settings(tmp_path, timestamp1_X='20261101_000000', timestamp1_Y='_', timestamp1_Z='_'),
        '20261101_000000',
    )
    names = [f'FD0:XJ3_1_{time}.pkl', 'FD0:YJ3_1.pkl', 'FD0:ZJ3_1.pkl']
    save_empty(snapshot_folder(args), *names)
    assert find_snapshots(args) == names
    whole = [f'FD0:{plane}J3_1_{time}.pkl' for plane in 'XYZ']
    save_empty(snapshot_folder(args), *whole)
    assert find_snapshots(args) == whole, 'of one training where there is one'


def test_planes_that_no_training_has_in_common_are_an_error(tmp_path):
    args = settings(tmp_path, timestamp1_X='_', timestamp1_Y='_', timestamp1_Z='_')
    save_empty(snapshot_folder(args), 'FD0:XJ3_1.pkl', 'FD0:YJ3_1_20261101_000000.pkl', 'FD0:ZJ3_1.pkl')
    with pytest.raises(ValueError, match=r'no training of all planes \(X: _; Y: 20261101_000000; Z: _\)'):
        find_snapshots(args)


# --- who holds a folder --------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from running.files import locked
with locked(sys.argv[2], '*.part'):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_a_folder_and_a_killed_one_holds_nothing(tmp_path):
    lock = tmp_path / 'results' / '.lock'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, CODE, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    with (
        pytest.raises(ValueError, match=rf'{lock.parent}: in use by process {holder.pid} on .+; wait until'),
        locked(lock, '*.part'),
    ):
        pass
    assert lock.exists()
    holder.kill()
    holder.wait()
    left = lock.with_name('.volume.npz.1.part')
    left.write_bytes(b'half')
    with locked(lock, '.*.part'):
        assert str(os.getpid()) in lock.read_text()
        assert not left.exists()
    assert list(lock.parent.iterdir()) == []


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_a_run_goes_on_with_a_line_that_it_is_not_kept_apart(
    tmp_path, monkeypatch, capsys, code
):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', flock)
    others = tmp_path / '.volume.npz.1.part'
    others.write_bytes(b'half, maybe of a run that is at work')
    with locked(tmp_path / '.lock', '.*.part'), locked(tmp_path / '.other', '.*.part'):
        assert others.exists()
    assert list(tmp_path.iterdir()) == [others]
    assert capsys.readouterr().out.count('this file system has no locks') == 2


def test_another_error_of_a_lock_is_no_lack_of_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, 'flock', flock)
    with pytest.raises(OSError, match='Input/output error'), locked(tmp_path / '.lock'):
        pass
