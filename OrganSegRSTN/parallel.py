"""The processes of one run that torchrun started: which of them this is, and what they tell each other.

Without torchrun a run is one process, of rank 0, and nothing here does anything.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist


def rank():
    """The number of this process among all of the run, from 0; 0 logs and writes."""
    return int(os.environ.get('RANK', '0'))


def world_size():
    """How many processes the run has."""
    return int(os.environ.get('WORLD_SIZE', '1'))


def local_rank():
    """The number of this process among those on this machine."""
    return int(os.environ.get('LOCAL_RANK', '0'))


def quiet():
    """Let all but rank 0 print nothing; errors still reach the user."""
    if rank():
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


@contextlib.contextmanager
def process_group(device, hours=24):
    """For the block the processes can talk: by nccl on GPUs, gloo on CPUs. A rank that is gone is a ConnectionError.

    hours: how long a rank waits for another, which may have much longer cases to test.
    """
    if world_size() == 1:
        yield
        return
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(hours=hours))
    try:
        yield
        dist.barrier()  # all leave together: a process that ends while another still talks to it may abort
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
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def mean(values, device):
    """The mean of `values` (floats) over all processes."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return (tensor / world_size()).tolist()


def gather(value):
    """[value of rank 0, of rank 1, ...], on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
