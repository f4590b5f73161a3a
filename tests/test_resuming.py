"""Training and pretraining that are killed, ended, interrupted and gone on with: nothing is lost, not a bit differs."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CODE, FOLDER, pretrain_args, run_script, training_args

from running.checkpoint import Losses
from running.weights import load_weights

SNAPSHOTS = f'models/snapshots/{FOLDER}'
LOG = 'logs/FD0:Z3_1.txt'
EPOCHS = (1, 1, 1, 1)
MODES = [f'FD0:Z{mode}3_1.pkl' for mode in 'SIJ']
RESUME = ('--seed', 1, '--checkpoint_minutes', 0, '--resume')  # 0 minutes: a checkpoint after every step


def start(script, *args):
    """Start a script as a process, in a group of its own; what it prints is read from .stdout."""
    command = [sys.executable, CODE / script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, pattern):
    """Read the process's lines up to the one that holds `pattern`."""
    for line in process.stdout:
        if re.search(pattern, line):
            return
    raise AssertionError(f'{pattern} was never printed: {process.stderr.read()}')


def end(process, number):
    """Send a signal and wait; -> (exit code, what came last on stdout, stderr)."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def log_lines(out):
    """The log, without headers (device, code, arguments), the lines of resuming, folders and times."""
    headers = ('device: ', 'code: ', 'arguments: ', 'resumed from')
    lines = [line for line in out.splitlines() if not line.startswith(headers)]
    return [re.sub(r'^/.+/|\d+\.\d\ds', '', line) for line in lines]


def same_weights(one, two):
    one, two = load_weights(one), load_weights(two)
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope='module')
def undisturbed(initialized, tmp_path_factory):
    """Pretraining and training along Z that nothing happened to: .data, .pretraining, .log."""
    data = tmp_path_factory.mktemp('undisturbed') / 'data'
    data.mkdir()
    for kept in initialized.iterdir():
        (data / kept.name).symlink_to(kept)
    pretraining = run_script('pretrain.py', *pretrain_args(data), '--seed', 1)
    assert pretraining.code == 0, pretraining.err
    log = run_script('training.py', *training_args(data, epochs=EPOCHS), '--seed', 1)
    assert log.code == 0, log.err
    return SimpleNamespace(data=data, pretraining=pretraining.out, log=log.out)


@pytest.fixture
def pretrained(undisturbed, data):
    """A data folder of the test's own with the same FCN-8s to start from."""
    (data / 'models/pretrained').mkdir(parents=True)
    (data / 'models/pretrained/fcn8s_FD0_1.pth').symlink_to(undisturbed.data / 'models/pretrained/fcn8s_FD0_1.pth')
    return data


def assert_as_undisturbed(undisturbed, data):
    assert log_lines((data / LOG).read_text()) == log_lines(undisturbed.log)
    for name in MODES:
        assert same_weights(data / SNAPSHOTS / name, undisturbed.data / SNAPSHOTS / name), name
    assert sorted(path.name for path in (data / SNAPSHOTS).iterdir()) == ['FD0:Z3_1.ckpt', *sorted(MODES)]


def test_losses_go_on_from_any_place_of_an_epoch():
    for before in ([], [(1, 2, 3)], [(1, 2, 3), (4, 4, 4)]):
        losses, resumed = Losses(), Losses()
        for step in before:
            losses.add(step)
        resumed.load_state_dict(losses.state_dict())
        for one in (losses, resumed):
            one.add((2, 0, 1))
        assert resumed.mean.tolist() == losses.mean.tolist() == np.mean([*before, (2, 0, 1)], axis=0).tolist()


# --- killed --------------------------------------------------------------------------------------------------------


def test_a_training_killed_again_and_again_ends_with_the_same_bits_and_log(undisturbed, pretrained):
    args = (*training_args(pretrained, epochs=EPOCHS), *RESUME)
    chance = random.Random(7)
    for pattern in (
        '0ZS .+Iter.00001',
        '0ZS .+Iter.00003',
        '0ZI .+Iter.00002',
        '0ZI Epoch.1., Total',
        '0ZJ .+Iter.00001',
    ):
        process = start('training.py', *args)
        wait_for(process, pattern)
        time.sleep(chance.uniform(0, 0.05))
        code, _, err = end(process, signal.SIGKILL)
        assert (code, err) == (-signal.SIGKILL, '')
    done = run_script('training.py', *args)
    assert done.code == 0, done.err
    assert 'resumed from' in done.out
    assert_as_undisturbed(undisturbed, pretrained)


def test_a_training_killed_while_its_checkpoint_is_written_goes_on_from_the_one_before(undisturbed, pretrained):
    args = (*training_args(pretrained, epochs=EPOCHS), *RESUME)
    process = start('training.py', *args)
    wait_for(process, '0ZS .+Iter.00002')
    while not (parts := list((pretrained / SNAPSHOTS).glob('.*.ckpt.*.part'))):
        pass
    process.send_signal(signal.SIGSTOP)
    caught = parts[0].exists()  # stopped in the middle of writing
    end(process, signal.SIGKILL)
    assert caught and parts[0].exists()
    done = run_script('training.py', *args)
    assert done.code == 0, done.err
    assert not parts[0].exists(), 'what was half-written is removed'
    assert_as_undisturbed(undisturbed, pretrained)


def test_a_pretraining_that_is_killed_ends_with_the_same_bits_and_log(undisturbed, data):
    args = (*pretrain_args(data), *RESUME)
    path = data / 'models/pretrained/fcn8s_FD0_1.pth'
    process = start('pretrain.py', *args)
    while not path.with_suffix('.ckpt').exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not path.exists()
    done = run_script('pretrain.py', *args)
    assert done.code == 0, done.err
    assert 'resumed from' in done.out
    assert log_lines(done.out)[:-1] == log_lines(undisturbed.pretraining)[1:-1]  # the last names the file
    assert same_weights(path, undisturbed.data / 'models/pretrained/fcn8s_FD0_1.pth')
    assert [left.name for left in path.parent.iterdir()] == [path.name]


# --- ended and interrupted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_leave_a_checkpoint_however_long_ago_the_last_was(undisturbed, pretrained, number, code):
    args = (*training_args(pretrained, epochs=EPOCHS), '--seed', 1, '--resume')
    process = start('training.py', *args)
    wait_for(process, '0ZI .+Iter.00002')
    assert end(process, number)[::2] == (code, '')
    left = {path.name for path in (pretrained / SNAPSHOTS).iterdir()}
    snapshot = {'FD0:ZI3_1.pkl'} if number == signal.SIGINT else set()  # as published, Ctrl-C saves it as it is
    assert left == {'FD0:Z3_1.ckpt', 'FD0:ZS3_1.pkl'} | snapshot
    done = run_script('training.py', *args)
    assert done.code == 0, done.err
    assert_as_undisturbed(undisturbed, pretrained)


SLOW_LOADING = """
import os, runpy, sys, time
sys.path.insert(0, sys.argv[1])
import Data
plain = Data.DataLayer.stored
def slowly(self, index):
    print('loading', file=sys.stderr, flush=True)
    time.sleep(0.3)
    return plain(self, index)
Data.DataLayer.stored = slowly
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_signal_while_a_slice_is_loaded_waits_for_the_step_and_its_checkpoint(undisturbed, pretrained):
    args = (*training_args(pretrained, epochs=EPOCHS), '--seed', 1, '--resume')
    command = [sys.executable, '-c', SLOW_LOADING, CODE, CODE / 'training.py', *args]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, '0ZS .+Iter.00002')
    for _ in range(4):  # the fourth sample is being loaded
        assert process.stderr.readline() == 'loading\n'
    code, out, err = end(process, signal.SIGTERM)
    assert (code, err) == (143, '')
    assert 'Iter[00003]' in out and 'Iter[00004]' not in out
    assert [path.name for path in (pretrained / SNAPSHOTS).iterdir()] == ['FD0:Z3_1.ckpt']
    assert (pretrained / LOG).read_text().endswith('ended by Terminated\n')
    done = run_script('training.py', *args)
    assert done.code == 0, done.err
    assert_as_undisturbed(undisturbed, pretrained)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(pretrained):
    """A data folder whose training has ended in mode S, and left a checkpoint."""
    process = start('training.py', *training_args(pretrained, epochs=EPOCHS), *RESUME)
    wait_for(process, '0ZS .+Iter.00002')
    assert end(process, signal.SIGTERM)[0] == 143
    return pretrained


def test_a_signal_to_the_whole_group_leaves_the_process_that_loads_slices_alone(pretrained):
    process = start('training.py', *training_args(pretrained, epochs=EPOCHS), *RESUME, '--workers', 1)
    wait_for(process, '0ZS .+Iter.00002')
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, '')
    assert 'checkpoint saved: ' in out


def test_a_checkpoint_of_other_arguments_is_refused_and_the_differing_ones_are_named(ended, call):
    args = training_args(ended, epochs=(1, 1, 3, 1))
    before = (ended / SNAPSHOTS / 'FD0:Z3_1.ckpt').read_bytes()
    done = call('training.py', *args, '--seed', 2, '--resume')
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'made with other arguments (epoch_J was 1, is 3; seed was 1, is 2)' in done.err
    assert (ended / SNAPSHOTS / 'FD0:Z3_1.ckpt').read_bytes() == before
    assert 'Iter[00002]' in (ended / LOG).read_text(), 'nor is its log'


def test_a_checkpoint_of_other_lists_is_refused(ended, call):
    path = ended / 'lists/training_Z.txt'
    path.write_text(''.join(reversed(path.read_text().splitlines(keepends=True))))
    done = call('training.py', *training_args(ended, epochs=EPOCHS), '--seed', 1, '--resume')
    assert done.code == 1 and 'made with other arguments (training_Z.txt was' in done.err


@pytest.mark.parametrize('damage', ['cut off', 'a bit flipped'])
def test_a_broken_checkpoint_is_one_line_that_says_what_to_do(ended, call, damage):
    path = ended / SNAPSHOTS / 'FD0:Z3_1.ckpt'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:5000] if damage == 'cut off' else content)
    done = call('training.py', *training_args(ended, epochs=EPOCHS), *RESUME)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'FD0:Z3_1.ckpt: not a readable checkpoint' in done.err and 'remove it to start again' in done.err


def test_a_checkpoint_of_another_version_is_one_line_that_says_what_to_do(ended, call):
    path = ended / SNAPSHOTS / 'FD0:Z3_1.ckpt'
    state = torch.load(path, weights_only=True)
    state['parts']['model']['renamed'] = state['parts']['model'].popitem()[1]
    torch.save(state, path)
    done = call('training.py', *training_args(ended, epochs=EPOCHS), *RESUME)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'FD0:Z3_1.ckpt: made by another version of this code (model); remove it to start again' in done.err


def test_without_resume_a_training_starts_anew(undisturbed, ended):
    done = run_script('training.py', *training_args(ended, epochs=EPOCHS), '--seed', 1)
    assert done.code == 0 and 'resumed' not in done.out
    assert_as_undisturbed(undisturbed, ended)


def test_a_finished_training_is_not_done_again_while_its_snapshots_are_there(undisturbed, pretrained):
    args = (*training_args(pretrained, epochs=(1, 0, 0, 1)), '--seed', 1, '--resume')
    first = run_script('training.py', *args)
    path = pretrained / SNAPSHOTS / MODES[0]
    written = path.stat().st_mtime_ns
    again = run_script('training.py', *args)
    assert (again.code, again.out) == (0, f'finished before: {pretrained / SNAPSHOTS / "FD0:Z3_1.ckpt"}\n')
    assert path.stat().st_mtime_ns == written
    assert (pretrained / LOG).read_text() == first.out
    path.unlink()  # S takes a gigabyte, and testing needs only J
    assert run_script('training.py', *args).out == again.out
    (pretrained / SNAPSHOTS / MODES[2]).unlink()
    anew = run_script('training.py', *args)
    assert (anew.code, log_lines(anew.out)) == (0, log_lines(first.out))
    assert same_weights(path, undisturbed.data / SNAPSHOTS / MODES[0])


def test_a_training_begun_anew_leaves_nothing_of_the_one_before_to_go_on_from(undisturbed, pretrained):
    args = (*training_args(pretrained, epochs=EPOCHS), '--seed', 1)
    assert run_script('training.py', *args).code == 0
    process = start('training.py', *args)  # without --resume
    wait_for(process, '0ZS .+Iter.00001')
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    done = run_script('training.py', *args, '--resume')
    assert done.code == 0, done.err
    assert_as_undisturbed(undisturbed, pretrained)


def test_of_two_trainings_into_one_snapshot_the_second_is_told_of_the_first(pretrained, call):
    first = start('training.py', *training_args(pretrained, epochs=(1000, 1, 1, 1)))
    wait_for(first, '0ZS .+Iter.00001')
    second = call('training.py', *training_args(pretrained, epochs=EPOCHS))
    assert (second.code, len(second.err.splitlines())) == (1, 1)
    assert f'in use by process {first.pid} on ' in second.err and 'training.py' in second.err
    assert (pretrained / LOG).read_text().startswith('device: CPU'), "the first one's log is left alone"
    assert call('training.py', *training_args(pretrained, plane='X', epochs=(1, 0, 0, 1))).code == 0, 'other planes may'
    assert end(first, signal.SIGKILL)[0] == -signal.SIGKILL
