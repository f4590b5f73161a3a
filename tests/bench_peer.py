"""Train MONAI's 3D UNet on a fold for some minutes and print the DSC of each test case: a peer to compare with.

Usage: python tests/bench_peer.py DATA_PATH FOLD ORGAN_ID [--minutes M] [--low_range HU] [--high_range HU]
                                  [--every_slice N] [--cases N] [--threads N] [--json FILE]

It reads what init.py wrote, so the fold's cases are the same. The minutes are those of the training alone; testing
follows. MONAI is installed for this run only, into a temporary folder, without its dependencies: torch stays as it is.

The network is the one of MONAI's spleen tutorial at half its patches: channels 16 to 256, two residual units, instance
norm; patches of 64 x 64 x 64 around organ and anywhere in equal numbers, brightened at random;
Dice and cross-entropy; AdamW at 1e-3 along a cosine; sliding windows that overlap by half, weighted by a Gaussian.
Parts below half of the largest are removed, as in coarse to fine: much elsewhere looks like the organ in a patch.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'OrganSegRSTN'))

from running.arguments import number, whole
from running.data_folder import read_cases
from utils import DSC_computation, post_processing, to_unit

MONAI = 'monai==1.6.1'
PATCH = 64
BATCH = 4
RATE = 1e-3


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    random.seed(args.seed), torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory(prefix='bench_peer_') as folder:
        pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', folder, MONAI]
        subprocess.run(pip, check=True)
        sys.path.insert(0, folder)
        net, steps = train(args, load(args, 'training')[: args.cases])
        scores = test(args, net, load(args, 'testing'))
    found = {'minutes': args.minutes, 'steps': steps, 'threads': args.threads, 'DSC': scores}
    found['mean'] = sum(scores.values()) / len(scores)
    print(f'mean DSC = {found["mean"]:.4f} after {steps} steps')
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + '\n')


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_path', type=Path)
    parser.add_argument('fold', type=whole(0))
    parser.add_argument('organ_ID', type=whole(1, 255))
    parser.add_argument('--minutes', type=number(0), default=20, help='of training (default 20)')
    parser.add_argument('--low_range', type=number(), default=-100)
    parser.add_argument('--high_range', type=number(), default=240)
    parser.add_argument('--every_slice', type=whole(1), default=1, metavar='N', help='keep every Nth slice only')
    parser.add_argument('--cases', type=whole(1), metavar='N', help='train on the first N cases only')
    parser.add_argument('--threads', type=whole(1), default=2)
    parser.add_argument('--seed', type=whole(0), default=0)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to FILE, too')
    return parser.parse_args()


def load(args, kind):
    """Return [(name, image (W, H, L) in [0, 1], label)] of the fold's cases, padded to a patch at least."""
    volumes = []
    for case in read_cases(str(args.data_path), kind, args.fold):
        image = to_unit(case.image(args.data_path), args.low_range, args.high_range)
        label = case.label(args.data_path, args.organ_ID)
        image, label = (volume[:, :, :: args.every_slice] for volume in (image, label))
        pad = [(0, max(PATCH - n, 0)) for n in image.shape]
        volumes.append((case.image_file, np.pad(image, pad), np.pad(label, pad)))
    return volumes


def patches(volumes):
    """Return a batch (N, 1, n, n, n) of images and of labels: every other patch has an organ voxel in its middle."""
    images, labels = [], []
    for i in range(BATCH):
        _, image, label = random.choice(volumes)
        centre = [random.randrange(n) for n in image.shape]
        if i % 2 == 0 and label.any():
            centre = random.choice(np.argwhere(label))
        start = [min(max(int(c) - PATCH // 2, 0), n - PATCH) for c, n in zip(centre, image.shape)]
        place = tuple(slice(s, s + PATCH) for s in start)
        images.append(image[place] * random.uniform(0.9, 1.1) + random.uniform(-0.1, 0.1))
        labels.append(label[place])
    return [torch.from_numpy(np.stack(arrays)[:, None].astype(np.float32)) for arrays in (images, labels)]


def train(args, volumes):
    """Return the network after `minutes`, and its steps."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    net = UNet(3, 1, 1, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
    loss, optimizer = DiceCELoss(sigmoid=True), torch.optim.AdamW(net.parameters(), lr=RATE)
    began, steps = time.monotonic(), 0
    while steps == 0 or (done := (time.monotonic() - began) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]['lr'] = RATE * (1 + math.cos(math.pi * (done if steps else 0))) / 2
        image, label = patches(volumes)
        error = loss(net(image), label)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            print(f'step {steps}, {time.monotonic() - began:.0f} s, loss {error.item():.3f}', flush=True)
    return net.eval(), steps


@torch.inference_mode()
def test(args, net, volumes):
    """Return {case: DSC}, printed as they come."""
    from monai.inferers import sliding_window_inference

    scores = {}
    for name, image, label in volumes:
        windows = {'roi_size': [PATCH] * 3, 'sw_batch_size': BATCH, 'overlap': 0.5, 'mode': 'gaussian'}
        logits = sliding_window_inference(torch.from_numpy(image)[None, None], predictor=net, **windows)
        found = (logits[0, 0] > 0).numpy().astype(np.uint8)
        before = DSC_computation(label, found).value
        scores[name] = DSC_computation(label, post_processing(found, found, 0.5, None)).value
        print(f'{name}: DSC = {scores[name]:.4f}, {before:.4f} of all parts', flush=True)
    return scores


if __name__ == '__main__':
    main()
