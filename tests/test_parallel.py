"""training_parallel.py under torchrun, on two CPU processes: the same steps as one process that averages gradients."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CODE, FOLDER, pretrain_args, run_script, settings, training_args

from Data import load_slices
from running.checkpoint import random_states, seed_everything, set_random_states
from running.processes import pick_device
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
                image, label = (tensor[None] for tensor in slices[orders[0][first + rank]])
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
    done = call('training_parallel.py', *args)
    assert done.code == 1
    typed = shlex.split(done.err.partition('type: ')[2])
    assert typed == [
        'torchrun',
        '--standalone',
        '--nproc_per_node',
        '2',
        *map(str, [CODE / 'training_parallel.py', *args]),
    ]


# --- which GPU a process takes (no CUDA here: its answers are given) -------------------------------------------------


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four CUDA devices; -> the list of those chosen."""
    chosen = []
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'GPU')
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    return chosen


@pytest.mark.parametrize(('GPU_ID', 'local_rank', 'index'), [('2', 0, 2), ('0,1,3', 0, 0), ('0,1,3', 2, 3)])
def test_of_several_GPUs_each_process_takes_its_own(four_gpus, monkeypatch, capsys, GPU_ID, local_rank, index):
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    device = pick_device(GPU_ID)
    assert device == torch.device('cuda', index)
    assert four_gpus == [device]
    assert not torch.backends.cudnn.allow_tf32, 'float32 is float32'
    assert capsys.readouterr().out == f'device: cuda:{index}, GPU\n'


@pytest.mark.parametrize(('GPU_ID', 'local_rank'), [('4', 0), ('0,1', 2), ('one', 0), ('', 0), ('0,', 1)])
def test_a_GPU_that_is_not_there_is_an_error(four_gpus, monkeypatch, GPU_ID, local_rank):
    monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    with pytest.raises(
        ValueError, match=rf'GPU_ID {GPU_ID} names no CUDA device for process {local_rank} .+ are 4, from 0'
    ):
        pick_device(GPU_ID)
    assert four_gpus == []


def test_the_CPU_is_taken_where_it_is_asked_for(four_gpus, capsys):
    assert pick_device('cpu') == torch.device('cpu')
    assert capsys.readouterr().out.endswith('threads (as asked)\n')
