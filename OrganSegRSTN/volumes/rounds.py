"""Coarse to fine (section 3.3, algorithm 1): the fine network looks again until two rounds agree."""

import numpy as np

from running.data_folder import epoch_name, results_folder, without_fold
from running.files import load_volume
from utils import DSC_computation, post_processing
from volumes.planes import region

AGREEMENTS = ('0.90', '0.95', '0.98', '0.99')  # inter-iteration DSC at which a user might stop


def coarse_to_fine(coarse_volumes, fine, image, threshold, start=None, weights=None):
    """Yield (mask uint8, probability float32), (W, H, L), of rounds 0, 1, 2, ...; no round follows an empty mask.

    coarse_volumes: of the three planes, uint8; fine: their PlaneTesters of TEST 'F'; image: HU.
    Round 0 is the coarse mean, or `start`: a mask and its probability. weights: of the planes in every mean, see
    volumes.planes.plane_weights.
    """
    if start is None:
        score = coarse_probability(coarse_volumes, weights)
        start = (score >= threshold).astype(np.uint8), score
    mask, score = start
    yield mask, score
    while mask.any():
        mask, score = fine_round(mask, score, fine, image, threshold, weights)
        yield mask, score


def fine_round(mask, score, fine, image, threshold, weights=None):
    """Return mask and probability of the round after these: crop by the mask, weigh by the probability's saliency."""
    place = region(mask, fine[0].reach)  # the rest of the scan does not matter
    seen = [tester.predict(image[place], score=score[place], mask=mask[place]) for tester in fine]
    found = sum(seen) / np.float32(len(fine)) if weights is None else weighted(seen, weights)
    # outside, the probability is 0, which a threshold of 0 counts as organ
    score, mask = np.zeros(score.shape, np.float32), np.full(score.shape, threshold <= 0, np.uint8)
    score[place], mask[place] = found, found >= threshold
    return post_processing(mask, mask, 0.5, None), score


def coarse_probability(volumes, weights=None):
    """Return the mean (W, H, L) float32 of the planes' stored volumes (uint8): the sum of the bytes over 765.

    weights: of the planes; None: all the same.
    """
    if weights is not None:
        return weighted(volumes, weights / np.float32(255))
    return sum(volume.astype(np.float32) for volume in volumes) / np.float32(255 * len(volumes))


def weighted(volumes, weights):
    """Return the sum (float32) of the volumes of the planes X, Y, Z times their weights."""
    return sum(weight * volume for weight, volume in zip(weights, volumes, strict=True))


def agreement(before, mask):
    """Return the inter-iteration Dice of two rounds; two empty ones agree."""
    dice = DSC_computation(before, mask)
    return dice if dice.pred + dice.label else dice._replace(value=1.0)


def stopped_at(scores, asked):
    """Return the DSC of the first round whose inter-iteration DSC reaches `asked`, else of the last.

    scores: [(DSC, inter-iteration DSC)] of a case's rounds.
    """
    return next((score for score, inter in scores[1:] if inter >= asked), scores[-1][0])


# --- stored rounds -------------------------------------------------------------------------------------------------


def rounds_folder(args, snapshots):
    """Return results/coarse2fine_testing_*/FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,10 of the planes' snapshots (names)."""
    return results_folder(args, 'coarse2fine', folder_name(args, snapshots))


def folder_name(args, snapshots):
    """Return `FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,10`."""
    names = without_fold(args, [name.removesuffix('.pkl') for name in snapshots])
    thresholds = f'{args.coarse_threshold}_{args.fine_threshold}'
    return f'FD{args.current_fold}:{names}:{epoch_name(args)}_{thresholds},{args.max_rounds}'


def round_file(folder, r, number):
    """Return the path of a case's mask of round r, or (r 'P') of the last round's mean probability."""
    return folder / 'volumes' / (f'P_{number}.npz' if r == 'P' else f'R{r}_{number}.npz')


def stored_rounds(folder, number, shape, args):
    """Return the masks of rounds 0, 1, ... of a case as far as they are stored, and needed."""
    masks = []
    while not finished(masks, args):
        mask = load_volume(round_file(folder, len(masks), number), shape)
        if mask is None:
            break
        masks.append(mask)
    return masks


def finished(masks, args):
    """Return whether these are all rounds of a case: max_rounds, or up to two that agree by --stop_DSC."""
    if args.stop_DSC is not None and len(masks) > 1 and agreement(masks[-2], masks[-1]).value >= args.stop_DSC:
        return True
    return len(masks) == args.max_rounds + 1
