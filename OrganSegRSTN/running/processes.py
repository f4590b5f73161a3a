"""The device of a process, and the processes of a run that torchrun started.

Without torchrun a run is one process of rank 0, and the functions that communicate do nothing.
"""

import contextlib
import datetime
import gc
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from running.script import out_of_memory

DRIVER = Path('/proc/driver/nvidia/version')  # also in a container that is shown no card
OR_CPU = 'or give cpu (CURRENT_GPU=cpu in run.sh)'


def pick_device(GPU_ID):
    """Return the device of this process: CUDA device number GPU_ID; the CPU with `cpu`, or on a machine without a card.

    GPU_ID may list one device for each process on a machine: `0,1,2,3`, or `cpu,cpu`. With `cpu`
    nothing of CUDA is touched. Raise ValueError where a card cannot be used.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # huge pages: a third less time on a CPU
    GPU_IDs, rank = GPU_ID.split(','), local_rank()
    mine = GPU_IDs[rank] if rank < len(GPU_IDs) else ''
    if mine == 'cpu':
        return torch.device('cpu')
    if twice := next((one for one in GPU_IDs if one != 'cpu' and GPU_IDs.count(one) > 1), None):
        raise ValueError(f'GPU_ID {GPU_ID} names device {twice} twice; each process needs one of its own')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # an old driver is an error below
        found = torch.cuda.is_available()
    if not found:
        if has_card():
            raise ValueError(f'GPU_ID {GPU_ID}: {why_without_CUDA()}, {OR_CPU}')
        return torch.device('cpu')
    if not mine.isdigit() or int(mine) >= torch.cuda.device_count():
        raise ValueError(
            f'GPU_ID {GPU_ID} names no CUDA device for process {rank} of this machine; '
            f'there are {torch.cuda.device_count()}, from 0'
        )
    device = torch.device('cuda', int(mine))
    check_architecture(device)
    torch.cuda.set_device(device)
    return device


def has_card():
    """Return whether the machine has an NVIDIA card, as far as its driver or nvidia-smi says."""
    return DRIVER.exists() or shutil.which('nvidia-smi') is not None


def why_without_CUDA():
    """Return why PyTorch finds no CUDA device on a machine that has a card, and the cure."""
    if torch.version.cuda is None:
        return f'this PyTorch, {torch.__version__}, is built without CUDA; install another (docs/machines.md)'
    reason = ''
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = str(error)
    if 'too old' in reason:
        return (
            f'the NVIDIA driver is too old for CUDA {torch.version.cuda}; update it, or install the PyTorch of an '
            'older CUDA (docs/machines.md)'
        )
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None and (not visible or 'No CUDA GPUs' in reason):
        return f'no card is visible, CUDA_VISIBLE_DEVICES is {visible!r}; unset it'
    return f'no card is visible ({reason.partition(".")[0]}); start a container with --gpus all'


def check_architecture(device):
    """Raise ValueError where the installed PyTorch holds no code for this card."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's own words for it
        capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if built and not any(runs_on(architecture, capability) for architecture in built):
        raise ValueError(
            f'{device_name(device)} has architecture sm_{"".join(map(str, capability))}, but this PyTorch is built for '
            f'{", ".join(built)}; install the one that docs/machines.md names for it, {OR_CPU}'
        )


def runs_on(architecture, capability):
    """Return whether code for an architecture, such as `sm_80` or `compute_80`, runs on a card of `capability` (8, 6).

    Of architectures with other names, which are not NVIDIA's, nothing is known: they may.
    """
    found = re.fullmatch(r'(sm|compute)_(\d+)(\d)[af]?', architecture)
    if not found:
        return True
    kind, code = found[1], (int(found[2]), int(found[3]))
    return code <= capability and (kind == 'compute' or code[0] == capability[0])


def pick_precision(asked, device):
    """Return the precision of a run on a device; `auto`, which is printed, is bf16 on CUDA devices that have it, else fp32.

    Raise ValueError for one that the device cannot compute in.
    """
    ampere = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked == 'auto':
        asked = 'bf16' if ampere else 'fp32'
        print(f'precision: {asked} (auto)', flush=True)
    if asked == 'tf32' and not ampere or asked == 'bf16' and device.type == 'cuda' and not ampere:
        raise ValueError(f'precision {asked}: {device_name(device)} does not compute in it; give fp32 or auto')
    if asked == 'fp16' and device.type == 'cpu':
        raise ValueError('precision fp16: is for CUDA devices; give bf16 or fp32 for a CPU')
    return asked


def set_up(args):
    """Return a stage's device, set up for args.precision and args.seed, and print it; replace an args.precision of auto."""
    device = pick_device(args.GPU_ID)
    print_device(device, args.GPU_ID)
    args.precision = pick_precision(args.precision, device)
    if device.type == 'cuda':
        set_up_CUDA(args.precision, getattr(args, 'seed', None))
    return device


def print_device(device, GPU_ID):
    """Print a line with the device, and why it is the CPU."""
    why = ''
    if device.type == 'cpu':
        why = ' (as asked)' if 'cpu' in GPU_ID else f' (no CUDA device found, GPU_ID {GPU_ID} is not used)'
    print(f'device: {device_name(device)}{why}', flush=True)


def set_up_CUDA(precision, seed):
    """Set what float32 is: TF32 only if asked for, in convolutions and products; with a seed, take repeatable ways."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == 'tf32'
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums of fp16 overflow
    if seed is None:
        return
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    shown = warnings.showwarning

    def show(message, *rest, **keywords):
        if 'deterministic' in str(message):
            print(f'seed: not repeatable to the bit: {str(message).split(",")[0]}', flush=True)
        else:
            shown(message, *rest, **keywords)

    warnings.showwarning = show


def send(tensor, device):
    """Return a tensor on a device; from the CPU to a card it goes through pinned memory, and the host need not wait."""
    if tensor.device.type == 'cpu' and torch.device(device).type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor):
    """Return a tensor as a numpy array; from a card it comes through pinned memory, which PyTorch keeps for the next."""
    if tensor.is_cuda:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor).numpy()
    return tensor.numpy()


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
    """Connect the processes during the block: by nccl on GPUs, by gloo on CPUs.

    Raise ConnectionError if another rank has exited. hours: how long a rank waits for another one,
    whose cases may take much longer.
    """
    if world_size() == 1:
        yield
        return
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'  # gloo: objects need no GPU
    dist.init_process_group(
        backend, timeout=datetime.timedelta(hours=hours), device_id=device if device.type == 'cuda' else None
    )
    try:
        yield
        gc.collect()  # a DistributedDataParallel is in a reference cycle and must not outlive the group
        dist.barrier()  # exit together: a process can abort when another one exits during communication
    except (dist.DistError, RuntimeError) as error:
        abort(device)
        lost = isinstance(error, dist.DistError) or 'gloo' in str(error).lower()
        if not lost or out_of_memory(error):  # also where NCCL reports that this rank lacks memory
            raise
        raise ConnectionError(
            f'rank {rank()} of {world_size()}: another process of this run has ended '
            f'({str(error).splitlines()[0]}); start the run again'
        ) from error
    except BaseException:
        abort(device)
        raise
    dist.destroy_process_group()


def abort(device):
    """End the communication without waiting for it: the other ranks fail at once instead of hanging.

    On GPUs destroy_process_group first waits for what other ranks have not sent.
    """
    if device.type == 'cuda':
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def wait():
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def mean(values):
    """Return the mean of `values` (floats) over all processes."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / world_size()).tolist()


def average_gradients(model):
    """Replace the gradients of the parameters that have one by their mean over all processes."""
    if world_size() > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def gather(value):
    """Return [value of rank 0, of rank 1, ...] on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
