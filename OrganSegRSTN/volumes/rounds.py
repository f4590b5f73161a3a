"""Coarse to fine (section 3.3, algorithm 1): rounds of fine testing until two agree, and how they are stored."""

import numpy as np

from running.data_folder import epoch_name
from running.files import load_volume
from utils import DSC_computation, post_processing

AGREEMENTS = ('0.90', '0.95', '0.98', '0.99')  # inter-iteration DSC at which a user might stop


def folder_name(args, snapshots):
    """`FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,10`."""
    names = ','.join(name.removeprefix(f'FD{args.current_fold}:').removesuffix('.pkl') for name in snapshots)
    thresholds = f'{args.coarse_threshold}_{args.fine_threshold}'
    return f'FD{args.current_fold}:{names}:{epoch_name(args)}_{thresholds},{args.max_rounds}'


def probability_file(folder, number):
    """The mean probability of a case's last round."""
    return folder / 'volumes' / f'P_{number}.npz'


def stored_rounds(folder, number, shape, args):
    """The masks of rounds 0, 1, ... of a case as far as they are stored, and needed."""
    masks = []
    for r in range(args.max_rounds + 1):
        mask = load_volume(folder / 'volumes' / f'R{r}_{number}.npz', shape)
        if mask is None:
            break
        masks.append(mask)
        if finished(masks, args):
            break
    return masks


def finished(masks, args):
    """Whether these are all rounds of a case: max_rounds, or two that agree as --stop_DSC asks."""
    if args.stop_DSC and len(masks) > 1 and agreement(masks[-2], masks[-1]).value >= args.stop_DSC:
        return True
    return len(masks) == args.max_rounds + 1


def agreement(before, mask):
    """Inter-iteration Dice of two rounds; two empty ones agree."""
    dice = DSC_computation(before, mask)
    return dice if dice.pred + dice.label else dice._replace(value=1.0)


def coarse_probability(volumes):
    """Mean (W, H, L) float32 of the three planes' stored volumes (uint8), summed in the order X, Y, Z."""
    return sum(volume / np.float32(255) for volume in volumes) / np.float32(len(volumes))


def fine_rounds(testers, image, score, mask, threshold, organ_ID):
    """Rounds 1, 2, ... (section 3.3, algorithm 1): yields (score, mask) of each; ends when a mask is empty.

    testers: of TEST 'F', one a plane; score: the previous round's mean probability, float32; mask: its organ, uint8.
    """
    while mask.any():
        planes = [tester.predict(image, score=score, mask=mask) for tester in testers]
        score = sum(planes) / np.float32(len(planes))
        mask = (score >= threshold).astype(np.uint8)
        mask = post_processing(mask, mask.copy(), 0.5, organ_ID)
        yield score, mask
