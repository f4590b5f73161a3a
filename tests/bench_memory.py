"""Peak resident memory of two stages at full width, for bench.py: the scripts themselves, in processes of their own."""

import tempfile
from pathlib import Path

import process_memory
import torch

from model import FCN8s


def coarse_testing(quick):
    """Return peak (bytes) of coarse testing of all slices of one 512x512x240 case along Z, float32."""
    shape, width = ((40, 32, 6), 4) if quick else ((512, 512, 240), 64)
    with tempfile.TemporaryDirectory(prefix='bench_') as folder:
        data = Path(folder)
        process_memory.write_cases(data, [shape])
        process_memory.write_snapshots(data, width)
        (data / 'lists').mkdir()
        (data / 'lists' / 'testing_FD0.txt').write_text('0 images/0001.npy labels/0001.npy\n')
        return process_memory.run('coarse_testing.py', *process_memory.testing_args(data, 'Z')).peak


def training(quick):
    """Return peak (bytes) of training on 96x96 slices, one epoch in each mode, float32."""
    shape, width = ((24, 24, 8), 4) if quick else ((96, 96, 8), 64)
    with tempfile.TemporaryDirectory(prefix='bench_') as folder:
        data = Path(folder)
        process_memory.write_cases(data, [shape] * 2)
        process_memory.run('init.py', data, 1, 2, -100, 240)
        pretrained = data / 'models' / 'pretrained' / 'fcn8s_from_caffe.pth'
        pretrained.parent.mkdir(parents=True)
        torch.save(FCN8s(3, width).state_dict(), pretrained)
        settings = [*process_memory.BEGIN, 'Z', 'cpu', *process_memory.RATES, 0.5, 1, *process_memory.EPOCHS, '_']
        return process_memory.run('training.py', data, *settings).peak
