"""Training on several GPUs, or several machines: training.py with a batch of as many slices as there are processes.

Takes training.py's arguments, and writes what it writes. torchrun starts a process a GPU; GPU_ID lists
those of a machine:

    torchrun --standalone --nproc_per_node 4 training_parallel.py DATA_PATH ... 0,1,2,3 ...
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 training_parallel.py ...

Every process crops one slice of the batch for itself, the gradients are averaged, and rank 0 logs the
batch's mean losses and saves. An incomplete last batch is dropped.
"""

import os
import shlex
import sys

from running import processes, script  # before packages: it names a missing one

# isort: split
from torch.nn.parallel import DistributedDataParallel

import training


def main():
    if 'RANK' not in os.environ:
        count = len(training.parse().GPU_ID.split(','))
        command = shlex.join(['torchrun', '--standalone', '--nproc_per_node', str(count), *sys.argv])
        raise ValueError(f'needs torchrun, which starts its processes; type: {command}')
    training.main(distribute)


def distribute(model, mode):
    """Return the model, whose gradients are averaged over all processes in every step of a mode."""
    if processes.world_size() == 1:
        return model
    for layer in (model.saliency1, model.saliency2):
        layer.requires_grad_(mode != 'S')  # mode S does not use them
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


if __name__ == '__main__':
    script.run(main)
