"""Whole or not at all: what is left, and goes on, where a run is killed, lacks space or permission, or meets another one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import CODE, coarse2fine_args, fusion_args, pretrain_args, run_script, training_args

from running.files import load_array, load_volume, save_volume

COARSE = 'results/coarse_testing_1e-5x10,4/FD0:ZJ3_1.pkl'
FINE = 'results/coarse2fine_testing_1e-5x10,4/FD0:XJ3_1,YJ3_1,ZJ3_1:e1111_0.5_0.5,2'

# Python runs it at its start: the process sends itself a signal when a file is complete and about to get its name
SITECUSTOMIZE = """
import os, signal, sys
left = [os.environ['SIGNAL_AT']]
def hook(event, args):
    if event == 'os.rename' and left and str(args[1]).endswith(left[0]):
        left.clear()
        os.kill(os.getpid(), int(os.environ['SIGNAL']))
sys.addaudithook(hook)
"""


@pytest.fixture
def signalled(tmp_path):
    """signalled(name, number): an environment in which a process gets the signal before the file `name` appears."""
    (tmp_path / 'hook').mkdir()
    (tmp_path / 'hook' / 'sitecustomize.py').write_text(SITECUSTOMIZE)

    def signalled(name, number):
        return os.environ | {'PYTHONPATH': str(tmp_path / 'hook'), 'SIGNAL_AT': name, 'SIGNAL': str(int(number))}

    return signalled


def contents(folder):
    """{file: its bytes} of the results; of run.json, which tells the run, the settings alone."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    return {
        path: json.loads(content) | {'runs': None} if path.name == 'run.json' else content
        for path, content in found.items()
    }


def leftovers(folder):
    """Files that no run should leave: half-written ones and locks."""
    return [path.name for path in folder.rglob('.*') if path.name != '.checksums.json']


def undisturbed(call, data, script, args):
    """What an undisturbed run of the script leaves in a copy of the data folder's results."""
    copy = shutil.copytree(data, data.with_name('undisturbed'))
    done = call(script, copy, *args[1:])
    assert done.code == 0, done.err
    return contents(copy / 'results')


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*.npz')}


def one_line(done, *words):
    """That a script has ended with exit code 1 and one line, which holds these words."""
    assert done.code == 1
    assert len(done.err.splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err
    return True


# --- killed, terminated, interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('script', 'args', 'name', 'number', 'code'),
    [
        ('coarse_testing.py', training_args, 'e1111_2.npz', signal.SIGKILL, -signal.SIGKILL),
        ('coarse_testing.py', training_args, 'e1111_2.npz', signal.SIGTERM, 143),
        ('coarse_testing.py', training_args, 'e1111_2.npz', signal.SIGINT, 130),
        ('coarse_testing.py', training_args, 'results.txt', signal.SIGKILL, -signal.SIGKILL),
        ('coarse2fine_testing.py', coarse2fine_args, 'R1_2.npz', signal.SIGKILL, -signal.SIGKILL),
        ('coarse2fine_testing.py', coarse2fine_args, 'R1_2.npz', signal.SIGTERM, 143),
    ],
    ids=lambda value: getattr(value, 'name', None),
)
def test_a_stopped_run_is_taken_up_at_the_first_missing_volume(
    tested, call, signalled, script, args, name, number, code
):
    expected = undisturbed(call, tested, script, args(tested))
    done = run_script(script, *args(tested), env=signalled(name, number))
    assert done.code == code, done.err
    assert not list(tested.rglob('results.txt'))
    stored = {path: time for path, time in times(tested).items() if path.name != 'R0_2.npz'}  # of an unfinished case
    assert stored and not any(path.name == name for path in stored)
    if number == signal.SIGKILL:
        assert any(left.endswith('.part') for left in leftovers(tested))
    else:
        assert (done.err, leftovers(tested)) == ('', [])
        assert 'stopped: the volumes in' in done.out.splitlines()[-1]
    assert call(script, *args(tested)).code == 0
    assert contents(tested / 'results') == expected
    assert times(tested).items() >= stored.items(), 'what was stored is not made again'
    assert leftovers(tested) == []


def test_a_killed_fusion_goes_on(tested, call, signalled):
    for plane in 'XYZ':
        assert call('coarse_testing.py', *training_args(tested, plane)).code == 0
    expected = undisturbed(call, tested, 'coarse_fusion.py', fusion_args(tested))
    done = run_script('coarse_fusion.py', *fusion_args(tested), env=signalled('F1_2.npz', signal.SIGKILL))
    assert done.code == -signal.SIGKILL
    assert call('coarse_fusion.py', *fusion_args(tested)).code == 0
    assert contents(tested / 'results') == expected


def test_a_killed_initialization_leaves_no_list_and_no_folder_that_is_not_whole(data, call, signalled):
    args = [data, 1, 2, -100, 240]
    before = {path: path.read_bytes() for path in data.rglob('*') if path.is_file()}
    done = run_script('init.py', *args, env=signalled('labels_Y/0003', signal.SIGKILL))
    assert done.code == -signal.SIGKILL
    assert not list((data / 'lists').iterdir())
    slices = list(data.glob('*_[XYZ]/[!.]*/*.npy'))
    assert all(path.read_bytes() == before[path] for path in slices)
    assert one_line(call('coarse_testing.py', *training_args(data)), 'no such list; run init.py')
    assert call('init.py', *args).code == 0
    assert {path: path.read_bytes() for path in data.rglob('*') if path.is_file()} == before


# --- two runs at once ----------------------------------------------------------------------------------------------


def started(script, *args, env):
    """A script's process, once it has stopped itself."""
    command = [sys.executable, CODE / script, *map(str, args)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    return process


def test_a_second_run_is_told_who_is_at_work_and_the_first_goes_on(tested, call, signalled):
    first = started('coarse2fine_testing.py', *coarse2fine_args(tested), env=signalled('e1111_1.npz', signal.SIGSTOP))
    who = f'in use by process {first.pid} on '
    assert one_line(run_script('coarse2fine_testing.py', *coarse2fine_args(tested)), FINE, who)
    assert one_line(call('coarse_testing.py', *training_args(tested)), COARSE, who)  # coarse to fine writes there, too
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=300) == 0, first.stderr.read()
    assert leftovers(tested) == []
    assert call('coarse_testing.py', *training_args(tested)).code == 0


def test_one_initialization_at_a_time(data, call, signalled):
    args = [data, 1, 2, -100, 240]
    first = started('init.py', *args, env=signalled('testing_FD1.txt', signal.SIGSTOP))
    assert one_line(call('init.py', *args), f'{data}: in use by process {first.pid} on ')
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=300) == 0, first.stderr.read()
    assert leftovers(data) == []


# --- no space, no permission ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tested):
    """The data folder on a small file system of its own, and how to change that."""
    folder = tested.with_name('disk')
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'none', folder], check=False).returncode:
        pytest.skip('a small tmpfs can be mounted by root only')
    try:
        shutil.copytree(tested, folder / 'data')
        yield Disk(folder)
    finally:
        subprocess.run(['umount', '-l', folder], check=True)  # snapshots stay mapped for a while


class Disk:
    """A small file system with a data folder in it."""

    def __init__(self, folder):
        self.folder, self.data = folder, folder / 'data'

    def fill(self, pages):
        """Leave so many pages free."""
        free = os.statvfs(self.folder).f_bavail - pages
        (self.folder / 'filler').write_bytes(bytes(free * os.statvfs(self.folder).f_frsize))

    def make_room(self):
        (self.folder / 'filler').unlink()

    def allow(self, what):
        """what: 'ro' or 'rw'"""
        subprocess.run(['mount', '-o', f'remount,{what}', self.folder], check=True)


ON_DISK = [
    ('coarse_testing.py', training_args, 2),
    ('coarse_testing.py', training_args, 3),  # room for a volume
    ('coarse2fine_testing.py', coarse2fine_args, 17),
    ('coarse_fusion.py', fusion_args, 2),
    ('pretrain.py', pretrain_args, 2),
    ('training.py', training_args, 2),  # room for the log
    ('training.py', training_args, 0),
    ('init.py', lambda data: [data, 1, 2, -100, 240], 3),
    ('check_data.py', lambda data: [data, 1, -100, 240], 2),
    ('report.py', lambda data: [data], 6),
]


@pytest.mark.parametrize(('script', 'args', 'pages'), ON_DISK)
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing_half_written(disk, call, script, args, pages):
    data = disk.data
    if script in ('coarse_fusion.py', 'report.py'):
        for plane in 'XYZ':
            assert call('coarse_testing.py', *training_args(data, plane)).code == 0
    if script == 'training.py':
        assert call('pretrain.py', *pretrain_args(data)).code == 0
    if script == 'init.py':  # nothing there that it would replace
        for folder in data.glob('*_[XYZ]'):
            shutil.rmtree(folder)
    disk.fill(pages)
    assert one_line(call(script, *args(data)), 'No space left on device', str(data))
    assert leftovers(data) == []
    disk.make_room()
    done = call(script, *args(data))
    assert done.code == 0, done.err


@pytest.mark.parametrize(('script', 'args'), [case[:2] for case in ON_DISK if case[0] != 'coarse_fusion.py'])
def test_a_read_only_disk_is_one_line(disk, call, script, args):
    if script == 'report.py':
        assert call('coarse_testing.py', *training_args(disk.data)).code == 0
    if script == 'training.py':
        assert call('pretrain.py', *pretrain_args(disk.data)).code == 0
    disk.allow('ro')
    done = call(script, *args(disk.data))
    disk.allow('rw')
    assert one_line(done, 'Read-only file system', str(disk.data))
    assert leftovers(disk.data) == []


def run_as_anybody(script, *args):
    """Run a script as a user to whom permissions apply, which they do not to root."""
    mere = ['setpriv', '--inh-caps=-all', '--bounding-set=-all'] if os.geteuid() == 0 else []
    command = [*mere, sys.executable, CODE / script, *map(str, args)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    return type('Ran', (), {'code': done.returncode, 'out': done.stdout, 'err': done.stderr})


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which('setpriv'), reason='root without setpriv: all is permitted')
@pytest.mark.parametrize('denied', ['results', 'images/0001.npy'])
def test_a_denied_permission_is_one_line(tested, call, denied):
    (tested / 'results').mkdir()
    path = tested / denied
    mode = path.stat().st_mode
    path.chmod(0o500 if denied == 'results' else 0)
    done = run_as_anybody('coarse_testing.py', *training_args(tested))
    path.chmod(mode)
    assert one_line(done, 'Permission denied', denied)
    assert leftovers(tested) == []
    assert call('coarse_testing.py', *training_args(tested)).code == 0


# --- broken files --------------------------------------------------------------------------------------------------


def test_no_flipped_bit_and_no_cut_makes_another_volume_of_a_stored_one(tmp_path):
    path = tmp_path / 'R0_1.npz'
    volume = (np.random.default_rng(0).random((6, 5, 4)) > 0.5).astype(np.uint8)
    save_volume(path, volume)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        found = load_volume(path, volume.shape)
        assert found is None or (found.dtype == volume.dtype and np.array_equal(found, volume)), place
        path.write_bytes(whole[:place])
        assert load_volume(path, volume.shape) is None, place


def test_a_cut_array_is_named(tmp_path):
    path = tmp_path / '0001.npy'
    np.save(path, np.arange(40, dtype=np.int16).reshape(2, 4, 5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f'{path}: not a readable .npy array'):
            load_array(path)


# --- several processes ---------------------------------------------------------------------------------------------


def torchrun(script, *args, **keywords):
    """Run a script as two processes that torchrun starts."""
    begin = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    command = [*begin, CODE / script, *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, **keywords)


@pytest.mark.parametrize(
    ('script', 'args'), [('oracle_testing.py', training_args), ('coarse2fine_testing.py', coarse2fine_args)]
)
def test_two_processes_share_out_the_cases_and_write_what_one_writes(tested, call, script, args):
    expected = undisturbed(call, tested, script, args(tested))
    done = torchrun(script, *('cpu,cpu' if arg == 'cpu' else arg for arg in args(tested)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('device: CPU, 1 threads (as asked)')
    assert contents(tested / 'results') == expected
    first, *others = [line for line in done.stdout.splitlines() if line.startswith('written: ')]
    assert first and not others, 'the first process alone reports'
    assert leftovers(tested) == []


def test_a_killed_process_ends_the_others_and_the_next_run_goes_on(tested, call, signalled):
    expected = undisturbed(call, tested, 'coarse_testing.py', training_args(tested))
    done = torchrun('coarse_testing.py', *training_args(tested), env=signalled('e1111_2.npz', signal.SIGKILL))
    assert done.returncode == 1
    assert 'Signal 9 (SIGKILL) received by PID' in done.stderr.splitlines()[-2]
    assert not (tested / COARSE / 'results.txt').exists()
    assert call('coarse_testing.py', *training_args(tested)).code == 0
    assert contents(tested / 'results') == expected
    assert leftovers(tested) == []


def test_a_failure_under_torchrun_ends_with_its_line(data):
    done = torchrun('coarse_testing.py', *training_args(data))
    assert done.returncode == 1
    assert 'coarse_testing.py: error: ' in done.stderr.splitlines()[-2]
    assert 'FD0:ZJ3_1.pkl: no such weights' in done.stderr.splitlines()[-2]


# --- what a run logs about itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('script', 'args'), [('coarse_testing.py', training_args), ('coarse2fine_testing.py', coarse2fine_args)]
)
def test_the_same_run_says_the_same_times_apart(tested, call, script, args):
    said = []
    for _ in range(2):
        shutil.rmtree(tested / 'results', ignore_errors=True)
        said.append(re.sub(r'\d+\.\d s\b', 'TIME s', call(script, *args(tested)).out).splitlines())
    assert said[0] == said[1]
    assert [line.split(':')[0] for line in said[0][:3]] == ['device', 'code', 'arguments']


def runs(folder):
    return json.loads((folder / 'run.json').read_text())['runs']


def test_run_json_tells_of_every_run_that_made_volumes_and_fusion_heeds_the_settings_alone(tested, call):
    for plane in 'XYZ':
        call('coarse_testing.py', *training_args(tested, plane))
    call('coarse_fusion.py', *fusion_args(tested))
    [run] = runs(tested / COARSE)
    assert (run['arguments']['plane'], run['device']) == ('Z', 'CPU, 1 threads')
    assert run['versions']['torch'] and run['revision']
    before = times(tested)
    call('coarse_testing.py', *training_args(tested))
    assert len(runs(tested / COARSE)) == 1, 'the same run once more'
    call('coarse_testing.py', *training_args(tested), '--nifti')
    assert [run['arguments']['nifti'] for run in runs(tested / COARSE)] == [False, True]
    call('coarse_fusion.py', *fusion_args(tested))
    assert times(tested) == before
    call('coarse_testing.py', *training_args(tested), '--precision', 'bf16', '--overwrite')
    assert [run['arguments']['precision'] for run in runs(tested / COARSE)] == ['bf16'], 'its volumes are all there are'
