"""training_parallel.py under torchrun, on two CPU processes: the same steps as one process that averages gradients."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import CODE, FOLDER, pretrain_args, run_script, settings, training_args

from Data import load_slices
from running import processes, script
from running.checkpoint import random_states, seed_everything, set_random_states
from running.processes import pick_device, runs_on, set_up
from running.weights import load_weights
from training import DSC_loss, make_optimizer, starting_model

SNAPSHOTS = f'models/snapshots/{FOLDER}'
EPOCHS = (1, 1, 1, 1)
STEP = re.compile(r'0Z[SIJ] Epoch.+, Iter.+Loss (\S+),')


@pytest.fixture
def pretrained(data):
    """The tiny data folder with an FCN-8s to start from."""
    done = run_script('pretrain.py', *pretrain_args(data), '--seed', 1)
    assert done.code == 0, done.err
    return data


def torchrun(*args, processes=2, **keywords):
    """training_parallel.py on so many processes of this machine, as one process group of the system."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', processes,
               CODE / 'training_parallel.py', *args, '--seed', 1]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def seeded(rank):
    """Seed as the process of this rank does."""
    os.environ['RANK'] = str(rank)
    seed_everything(1)
    del os.environ['RANK']


def one_process(data, ranks=2):
    """The same training in this process: (logged losses, state dict)."""
    args = settings(data, plane='Z', timestamp='_', seed=1)
    slices, states = load_slices(args, 'Z'), []
    for rank in reversed(range(ranks)):
        seeded(rank)
        model = starting_model(args)[0].train()
        states.insert(0, random_states())
    optimizer, losses = make_optimizer(model, args.learning_rate1, args.learning_rate_m1), []
    for mode in 'SIJ':
        orders = []
        for rank in range(ranks):
            set_random_states(states[rank])
            orders.append(torch.randperm(len(slices)))
            states[rank] = random_states()
        for first in range(0, len(slices) // ranks * ranks, ranks):
            optimizer.zero_grad()
            steps = []
            for rank in range(ranks):
                set_random_states(states[rank])
                sample = slices.on_device('cpu', *slices[orders[0][first + rank]])
                image, label = (tensor[None] for tensor in sample)
                coarse, fine = (DSC_loss()(probability, label) for probability in model(image, label, mode))
                loss = (coarse + 2 * fine) / 3
                (loss / ranks).backward()
                steps.append([coarse.item(), fine.item(), loss.item()])
                states[rank] = random_states()
            optimizer.step()
            losses.append([sum(values) / ranks for values in zip(*steps)])
    return losses, model.state_dict()


def test_two_processes_take_the_steps_of_one_that_averages_their_gradients(pretrained):
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    losses, wanted = one_process(pretrained)
    random.setstate(random_state)
    torch.set_rng_state(torch_state)
    out = finished(torchrun(*training_args(pretrained, epochs=EPOCHS)))
    logged = [[float(loss) for loss in found[1].split('/')] for found in map(STEP.match, out.splitlines()) if found]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), atol=6e-5, rtol=0)  # four digits are logged
    assert sum('device: CPU' in line for line in out.splitlines()) == 1, 'rank 0 logs'
    found = load_weights(pretrained / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    assert found.keys() == wanted.keys(), 'a plain snapshot, without module.'
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=1e-4, msg=key)


def ranks_of(process):
    """{rank: process id} of what torchrun has started."""
    found = {}
    for folder in Path('/proc').iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = dict(
                entry.split('=', 1) for entry in (folder / 'environ').read_text().split('\0') if '=' in entry
            )
            parent = int((folder / 'stat').read_text().rsplit(')', 1)[1].split()[1])
        except OSError:
            continue
        if parent == process.pid and 'RANK' in environment:
            found[int(environment['RANK'])] = int(folder.name)
    return found


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc to find the ranks')
def test_killing_one_rank_ends_all_with_a_line_and_resume_goes_on(pretrained):
    args = training_args(pretrained, epochs=(1, 1, 1, 1))
    undisturbed = finished(torchrun(*args))
    weights = load_weights(pretrained / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    for path in (pretrained / SNAPSHOTS).iterdir():
        path.unlink()
    process = torchrun(*args, '--checkpoint_minutes', 0)
    for line in process.stdout:
        if '0ZI' in line and 'Iter[00001]' in line:
            break
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'training_parallel.py: error: rank 0 of 2: another process of this run has ended' in err
    resumed = finished(torchrun(*args, '--checkpoint_minutes', 0, '--resume'))
    assert 'resumed from' in resumed
    log, again = (
        [re.sub(r'\d+\.\d\ds', '', line) for line in out.splitlines() if line.startswith('0Z')]
        for out in (undisturbed, resumed)
    )
    assert again == log[-len(again) :], 'the log goes on'
    after = load_weights(pretrained / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    assert all(torch.equal(after[key], weights[key]) for key in weights)


def test_more_processes_than_slices_are_refused(pretrained):
    args = training_args(pretrained)
    path = pretrained / 'lists/training_Z.txt'
    lines = [line.split() for line in path.read_text().splitlines()]
    case = next(line for line in lines if line[0] in '23' and int(line[5]) > 0)
    args[5] = int(case[5])
    path.write_text(''.join(' '.join([*line[:5], *(line[5:] if line is case else '00000')]) + '\n' for line in lines))
    process = torchrun(*args)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'training_parallel.py: error: 1 slices to train on are too few for 2 processes' in err


def test_without_torchrun_it_says_what_to_type(pretrained, call):
    args = training_args(pretrained, epochs=(1, 0, 0, 1))
    args[9] = 'cpu,cpu'
    for given in (args, ['--resume', *args]):
        done = call('training_parallel.py', *given)
        assert done.code == 1
        typed = shlex.split(done.err.partition('type: ')[2])
        script = [CODE / 'training_parallel.py', *given]
        assert typed == ['torchrun', '--standalone', '--nproc_per_node', '2', *map(str, script)]


# --- devices and precisions (no CUDA here: its answers are given) ----------------------------------------------------


class Fake:
    """A machine of four CUDA devices of one capability, as torch.cuda shows it; what is set stays in the monkeypatch."""

    def __init__(self, monkeypatch, capability=(8, 0), built=('sm_75', 'sm_80', 'sm_90', 'compute_90')):
        self.chosen = []
        for owner, name in ((torch.backends.cudnn, 'allow_tf32'), (torch.backends.cuda.matmul, 'allow_tf32')):
            monkeypatch.setattr(owner, name, True)
        answers = {
            'is_available': lambda: True,
            'device_count': lambda: 4,
            'get_device_name': lambda device: 'GPU',
            'set_device': self.chosen.append,
            'get_device_capability': lambda device: capability,
            'get_arch_list': lambda: list(built),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def arguments(GPU_ID, precision='fp32', seed=None):
    return Namespace(GPU_ID=GPU_ID, precision=precision, seed=seed)


@pytest.mark.parametrize(('GPU_ID', 'local_rank', 'index'), [('2', 0, 2), ('0,1,3', 0, 0), ('0,1,3', 2, 3)])
def test_of_several_GPUs_each_process_takes_its_own(monkeypatch, capsys, GPU_ID, local_rank, index):
    fake = Fake(monkeypatch)
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    device = set_up(arguments(GPU_ID))
    assert device == torch.device('cuda', index)
    assert fake.chosen == [device]
    assert capsys.readouterr().out == f'device: cuda:{index}, GPU\n'


@pytest.mark.parametrize(('GPU_ID', 'local_rank'), [('4', 0), ('0,1', 2), ('one', 0), ('', 0), ('0,', 1)])
def test_a_GPU_that_is_not_there_is_an_error(monkeypatch, GPU_ID, local_rank):
    fake = Fake(monkeypatch)
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    with pytest.raises(
        ValueError, match=rf'GPU_ID {GPU_ID} names no CUDA device for process {local_rank} .+ are 4, from 0'
    ):
        pick_device(GPU_ID)
    assert fake.chosen == []


def test_a_GPU_twice_is_an_error(monkeypatch):
    Fake(monkeypatch)
    with pytest.raises(ValueError, match='GPU_ID 0,0 names device 0 twice'):
        pick_device('0,0')


def test_the_CPU_is_taken_where_it_is_asked_for_and_CUDA_is_not_touched(monkeypatch, capsys):
    def touched(*_):
        raise AssertionError('CUDA was touched')

    for name in ('is_available', 'device_count', 'init', 'set_device', 'get_device_capability'):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert set_up(arguments('cpu', 'auto')) == torch.device('cpu')
    assert capsys.readouterr().out.splitlines()[0].endswith('threads (as asked)')
    set_random_states(random_states())


def test_without_a_card_the_CPU_is_taken_and_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(processes, 'has_card', lambda: False)
    assert set_up(arguments('1')) == torch.device('cpu')
    assert 'no CUDA device found, GPU_ID 1 is not used' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('built_with', 'visible', 'says', 'line'),
    [
        (None, None, '', 'is built without CUDA; install another'),
        ('13.0', '', '', "CUDA_VISIBLE_DEVICES is ''; unset it"),
        ('13.0', '0', 'The NVIDIA driver on your system is too old (found version 12020).', 'is too old for CUDA 13.0; update it'),
        ('13.0', '0', 'No CUDA GPUs are available', "CUDA_VISIBLE_DEVICES is '0'; unset it"),
        ('13.0', '0', 'CUDA unknown error. See the manual', r'no card is visible .CUDA unknown error.; start'),
        ('13.0', None, 'No CUDA GPUs are available', 'no card is visible .+ --gpus all'),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_used_is_an_error_with_its_cure(monkeypatch, built_with, visible, says, line):
    def fails():
        raise RuntimeError(says)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'init', fails)
    monkeypatch.setattr(torch.version, 'cuda', built_with)
    monkeypatch.setattr(processes, 'has_card', lambda: True)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    with pytest.raises(ValueError, match=rf'^GPU_ID 0: .*{line}.*, or give cpu'):
        pick_device('0')


@pytest.mark.parametrize(
    ('architecture', 'capability', 'runs'),
    [
        ('sm_80', (8, 6), True), ('sm_86', (8, 0), False), ('sm_75', (6, 1), False), ('sm_60', (6, 1), True),
        ('sm_90a', (9, 0), True), ('sm_75', (8, 0), False), ('compute_120', (12, 1), True), ('compute_90', (10, 3), True),
        ('gfx90a', (9, 0), True),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_card(architecture, capability, runs):
    assert runs_on(architecture, capability) == runs


def test_a_card_that_PyTorch_is_not_built_for_is_an_error(monkeypatch):
    fake = Fake(monkeypatch, capability=(6, 1))
    with pytest.raises(ValueError, match=r'has architecture sm_61, but .+ built for sm_75, .+ docs/machines.md'):
        pick_device('0')
    assert fake.chosen == []


@pytest.mark.parametrize(
    ('capability', 'asked', 'found'),
    [((8, 0), 'auto', 'bf16'), ((7, 5), 'auto', 'fp32'), ((9, 0), 'tf32', 'tf32'), ((7, 0), 'fp16', 'fp16')],
)
def test_TF32_is_on_only_where_it_is_asked_for(monkeypatch, capsys, capability, asked, found):
    Fake(monkeypatch, capability, built=['sm_70', 'sm_75', 'sm_80', 'sm_90'])
    args = arguments('0', asked)
    set_up(args)
    assert args.precision == found
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (found == 'tf32')
    assert (f'precision: {found} (auto)' in capsys.readouterr().out) == (asked == 'auto')


@pytest.mark.parametrize('asked', ['tf32', 'bf16'])
def test_a_precision_that_a_card_lacks_is_refused_by_name(monkeypatch, asked):
    Fake(monkeypatch, capability=(7, 5))
    with pytest.raises(ValueError, match=f'precision {asked}: cuda:0, GPU does not compute in it'):
        set_up(arguments('0', asked))


@pytest.mark.parametrize('asked', ['tf32', 'fp16'])
def test_a_precision_that_a_CPU_lacks_is_refused_by_name(asked):
    with pytest.raises(ValueError, match=f'precision {asked}: '):
        set_up(arguments('cpu', asked))


def test_with_a_seed_operations_that_are_not_repeatable_are_named_in_the_log(monkeypatch, capsys):
    Fake(monkeypatch)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    asked = []
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', lambda *_, **__: asked.append(True))
    set_up(arguments('0', seed=1))
    assert asked
    warnings.showwarning(
        UserWarning('pool_backward_cuda does not have a deterministic implementation, but …'), 0, '', 0
    )
    assert 'pool_backward_cuda does not have a deterministic implementation\n' in capsys.readouterr().out


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        (
            'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.90 GiB of which 1.00 GiB is '
            'free. Process 7 has 9 GiB memory in use. If reserved but unallocated memory is large try …'
        ),
        'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`',
        'cuDNN error: CUDNN_STATUS_ALLOC_FAILED',
        'cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED',
    ],
)
def test_too_little_memory_is_a_line_with_what_was_needed_and_what_lowers_it(text):
    error = torch.OutOfMemoryError(text) if 'GiB' in text else RuntimeError(text)
    assert script.foreseeable(error)
    line = script.message_of(error)
    assert line.endswith('; less is needed with --precision bf16 (PRECISION) or a narrower network (PRETRAINING_WIDTH)')
    assert line.startswith(text.partition(' Process')[0].rstrip('.'))
    assert 'reserved' not in line


def test_too_little_memory_without_a_size_says_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (2**30 // 4, 12 * 2**30))
    line = script.message_of(RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'))
    assert 'CUDNN_STATUS_ALLOC_FAILED (0.2 of 12.0 GiB are free); less is needed' in line
    broken = RuntimeError('CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`')
    assert script.foreseeable(broken), 'the card is full'
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (10 * 2**30, 12 * 2**30))
    assert not script.foreseeable(broken), 'cuBLAS is broken'
    line = script.message_of(RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.'))
    assert 'are free' not in line


def test_a_rank_that_lacks_memory_blames_no_other(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for name in ('init_process_group', 'destroy_process_group', 'barrier'):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    for text, kind in [('NCCL error: out of memory', 'DistBackendError'), ('Connection closed', 'ConnectionError')]:
        with (
            pytest.raises((torch.distributed.DistError, ConnectionError)) as caught,
            processes.process_group(torch.device('cpu')),
        ):
            raise torch.distributed.DistBackendError(text)
        assert type(caught.value).__name__ == kind


def test_what_goes_to_a_card_is_pinned_first(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: asked.append('pin') or tensor)
    monkeypatch.setattr(torch.Tensor, 'to', lambda tensor, device, non_blocking: asked.append(str(device)) or tensor)
    processes.send(torch.zeros(1), 'cpu')
    processes.send(torch.zeros(1), 'cuda:0')
    assert asked == ['cpu', 'pin', 'cuda:0']


def test_another_RuntimeError_is_a_mistake_in_this_code():
    assert not script.foreseeable(RuntimeError('shapes differ'))
