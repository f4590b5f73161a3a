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


def write_snapshots(data, legacy=''):
    """Write the weights under the names of the three planes' J snapshots; `legacy`: planes in PyTorch 0.4's file format."""
    folder = data / 'models' / 'snapshots' / 'SIJ_training_1e-5x10,20'
    folder.mkdir(parents=True, exist_ok=True)
    state, written = weights(), {}
    for plane in 'XYZ':
        path, old = folder / f'FD0:{plane}J3_1_{TIMESTAMP}.pkl', plane in legacy
        if old in written:
            path.hardlink_to(written[old])
        else:
            torch.save(state, path, _use_new_zipfile_serialization=not old)
            written[old] = path
