"""Rebuilds the inputs of the golden results: what the published pipeline was run on (see golden/README.md)."""

import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parent
GOLDEN = TESTS / 'golden' / 'seed7'
sys.path[:0] = [str(TESTS / 'golden'), str(TESTS.parent / 'OrganSegRSTN')]

import recipe  # noqa: E402

from model import RSTN  # noqa: E402

SHAPES = [(40, 48, 24), (36, 44, 20), (40, 40, 22), (44, 36, 24)]
TIMESTAMP = '20261123_000000'
SNAPSHOTS = 'models/snapshots/SIJ_training_1e-5x10,20'


def write_volumes(data):
    """images/0001.npy ... labels/0004.npy of seed 7."""
    for i, shape in enumerate(SHAPES):
        for kind, volume in zip(('images', 'labels'), recipe.volume(700 + i, shape)):
            (data / kind).mkdir(parents=True, exist_ok=True)
            np.save(data / kind / f'{i + 1:04d}.npy', volume)


def weights():
    """Return the state dict of the full-width RSTN of seed 7."""
    with torch.device('meta'):
        shapes = {key: tensor.shape for key, tensor in RSTN().state_dict().items()}
    return {key: torch.from_numpy(array) for key, array in recipe.weights(shapes, 7).items()}


def write_snapshots(data, legacy=False):
    """Write the weights, once, under the names of the three planes' J snapshots; `legacy`: in PyTorch 0.4's format."""
    first, *others = (data / SNAPSHOTS / f'FD0:{plane}J3_1_{TIMESTAMP}.pkl' for plane in 'XYZ')
    first.parent.mkdir(parents=True)
    torch.save(weights(), first, _use_new_zipfile_serialization=not legacy)
    for path in others:
        path.hardlink_to(first)


def remove_snapshots(data):
    """Remove them: a gigabyte."""
    for path in (data / SNAPSHOTS).iterdir():
        path.unlink()
