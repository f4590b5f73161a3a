"""The device of a process, and the processes of a run that torchrun started.

Without torchrun a run is one process of rank 0, and the functions that communicate do nothing.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist


def pick_device(GPU_ID):
    """Return and print the device of a run: CUDA device number GPU_ID, or the CPU without CUDA or with `cpu`.

    GPU_ID may list one device for each process on a machine: `0,1,2,3`, or `cpu,cpu`.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # huge pages: a third less time on a CPU
    GPU_IDs, rank = GPU_ID.split(','), local_rank()
    mine = GPU_IDs[rank] if rank < len(GPU_IDs) else ''
    if mine == 'cpu' or not torch.cuda.is_available():
        why = 'as asked' if mine == 'cpu' else f'no CUDA device found, GPU_ID {GPU_ID} is not used'
        device = torch.device('cpu')
        print(f'device: {device_name(device)} ({why})', flush=True)
        return device
    if not mine.isdigit() or int(mine) >= torch.cuda.device_count():
        raise ValueError(
            f'GPU_ID {GPU_ID} names no CUDA device for process {rank} of this machine; '
            f'there are {torch.cuda.device_count()}, from 0'
        )
    device = torch.device('cuda', int(mine))
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: TF32 moves one stored probability in a hundred
    print(f'device: {device_name(device)}', flush=True)
    return device


def device_name(device):
    """Return `CPU, 2 threads` or `cuda:0, NVIDIA A100`."""
    if device.type == 'cpu':
        return f'CPU, {torch.get_num_threads()} threads'
    return f'{device}, {torch.cuda.get_device_name(device)}'


def rank():
    """Return the number of this process in the run, from 0; rank 0 logs and writes."""
    return int(os.environ.get('RANK', '0'))


def world_size():
    """Return the number of processes of the run."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def local_rank():
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get('LOCAL_RANK', '0'))


def quiet():
    """Silence the output of all ranks but 0; errors are still printed."""
    if rank():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


@contextlib.contextmanager
def process_group(device, hours=24):
    """Connect the processes during the block: nccl on GPUs, gloo on CPUs.

    Raise ConnectionError if another rank has exited. hours: how long a rank waits for another one,
    whose cases may take much longer.
    """
    if world_size() == 1:
        yield
        return
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=hours))
    try:
        yield
        dist.barrier()  # exit together: a process can abort when another one exits during communication
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error).lower():
            raise
        raise ConnectionError(
            f'rank {rank()} of {world_size()}: another process of this run has ended '
            f'({str(error).splitlines()[0]}); start the run again'
        ) from error
    finally:
        dist.destroy_process_group()


def wait():
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def mean(values, device):
    """Return the mean of `values` (floats) over all processes."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return (tensor / world_size()).tolist()


def gather(value):
    """Return [value of rank 0, of rank 1, ...] on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
