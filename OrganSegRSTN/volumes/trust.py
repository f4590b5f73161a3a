"""How far to trust a mask: signals of the fixed point (section 3.3), recorded without a label while the rounds run.

The record of a case is plain data for JSON: {'rounds': [{voxels, planes, entropy, soft_DSC,
inter_iteration, from_start, snapshots}, ...], 'contraction': ..., 'probes': [...]}. reporting/trust.py predicts the DSC from it.
"""

import itertools
import math

import numpy as np
from scipy import ndimage

from running.files import read_json, write_json
from volumes.planes import mean_of, region
from volumes.rounds import agreement, coarse_to_fine, fine_round

PROBES = [(None, 0), *itertools.product(range(3), (1, -1))]  # starts of round 1: widened, or shifted along an axis


class Watch:
    """Records the signals of a case's rounds; a mask counts as organ from `threshold`.

    probes: of how many other starts round 1 is computed, too (0 to 7: widened, then shifted both ways along
    each axis, by `shift` voxels). weights: of the planes, see volumes.planes.plane_weights.
    """

    def __init__(self, threshold, probes=0, shift=1, weights=None):
        self.threshold, self.probes, self.shift, self.weights = threshold, probes, shift, weights
        self.rounds, self.changes = [], []

    def coarse_to_fine(self, coarse_volumes, fine, image, start=None):
        """Yield what volumes.rounds.coarse_to_fine does, and record it.

        Without coarse_volumes the planes of round 0 are unknown.
        """
        planes = [Watched(tester, self.threshold) for tester in fine]
        votes, before = [volume >= 255 * self.threshold for volume in coarse_volumes], None
        for mask, score in coarse_to_fine(coarse_volumes, planes, image, self.threshold, start, self.weights):
            if before is None:
                first = mask
                self.rounds.append(round_signals(mask, score, votes))
            else:
                values = round_signals(mask, score, [plane.vote for plane in planes])
                values['inter_iteration'] = agreement(before[0], mask).value
                values['from_start'] = agreement(first, mask).value
                values['snapshots'] = mean_disagreement([plane.votes for plane in planes])
                self.rounds.append(values)
            if len(self.rounds) == 2:
                self.changes = [
                    agreement(mask, fine_round(other, before[1], fine, image, self.threshold, self.weights)[0]).value
                    if other.any()
                    else None
                    for other in other_starts(before[0], self.shift, self.probes)
                ]
            yield mask, score
            before = mask, score

    def record(self):
        """Return the record of the rounds so far."""
        inters = [values['inter_iteration'] for values in self.rounds[1:]]
        unknown = [None] * (self.probes - len(self.changes))  # no round 1 to compare with
        return {'rounds': self.rounds, 'contraction': contraction(inters), 'probes': self.changes + unknown}


class Watched:
    """A PlaneTester of TEST 'F' that keeps where it sees organ, `vote`, and where each of several snapshots does, `votes`.

    They are bool (W, H, L); organ is from `threshold`. Of a single snapshot `votes` is empty.
    """

    def __init__(self, tester, threshold):
        self.tester, self.threshold, self.reach = tester, threshold, tester.reach

    def predict(self, image, **volumes):
        """Return the mean probability of the snapshots, as PlaneTester.predict does."""
        probabilities = list(self.tester.each(image, **volumes))
        votes = [probability >= self.threshold for probability in probabilities]
        mean = mean_of(probabilities)
        self.vote, self.votes = mean >= self.threshold, votes if len(votes) > 1 else []
        return mean


def round_signals(mask, score, votes):
    """Return the signals of a round from its mask, its mean probability, and the masks of the three planes.

    planes: their disagreement; entropy: bits, mean over the mask; soft_DSC: Dice of mask and probability.
    """
    marked = marked_part(mask, score)
    return {
        'voxels': len(marked),
        'planes': disagreement(votes) if votes else None,
        'entropy': entropy(marked),
        'soft_DSC': soft_DSC(marked, score),
    }


def marked_part(mask, score):
    """Return the probabilities (n,) of a mask's voxels."""
    place = region(mask, 0) if mask.any() else ()
    return score[place][mask[place] > 0]


def mean_disagreement(groups):
    """Return the mean disagreement of the snapshots of each plane; None where a plane has one."""
    return float(np.mean([disagreement(votes) for votes in groups])) if all(groups) else None


def disagreement(masks):
    """Return the share of the voxels in any of these masks (bool, one shape) that is not in all; 0 for empty ones."""
    marked = np.count_nonzero(np.logical_or.reduce(masks))
    return 1 - np.count_nonzero(np.logical_and.reduce(masks)) / marked if marked else 0.0


def entropy(probabilities):
    """Return the mean binary entropy (bits, 0 to 1) of these probabilities; None of none."""
    if not probabilities.size:
        return None
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(p * np.log2(p) + (1 - p) * np.log2(1 - p)))


def soft_DSC(marked, score):
    """Return 2 sum(p m) / (sum(p) + sum(m)) of a mask m and its probability p; None if the mask is empty.

    marked: the probabilities of the mask's voxels; score: all of them.
    """
    if not len(marked):
        return None
    inside, total = (float(p.sum(dtype=np.float64)) for p in (marked, score))
    return 2 * inside / (total + len(marked))


def contraction(inters):
    """Return the factor by which a round shrinks the distance, 1 - inter-iteration DSC, to the one before; or None.

    It is the geometric mean over the rounds; below 1 they approach each other, at 0 they have met.
    """
    distances = [1 - inter for inter in inters]
    if len(distances) < 2 or distances[0] == 0:
        return None
    return (distances[-1] / distances[0]) ** (1 / (len(distances) - 1))


def probe_shift(margin):
    """Return by how many voxels --probe moves a start: a quarter of the crop margin."""
    return max(margin // 4, 1)


def other_starts(mask, shift, count):
    """Return `count` masks like this one to start round 1 from: widened, or shifted, by `shift` voxels (see PROBES)."""
    starts = []
    for axis, way in PROBES[:count]:
        if axis is None:
            starts.append(ndimage.binary_dilation(mask, iterations=shift).astype(np.uint8))
        else:
            starts.append(shifted(mask, [way * shift if a == axis else 0 for a in range(3)]))
    return starts


def shifted(mask, shift):
    """Return the mask moved by `shift` (voxels along each axis); what leaves the volume is lost."""
    moved = np.zeros_like(mask)
    target = tuple(slice(max(s, 0), n + min(s, 0)) for s, n in zip(shift, mask.shape))
    source = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(shift, mask.shape))
    moved[target] = mask[source]
    return moved


# --- the record of a test case -------------------------------------------------------------------------------------


def record_file(folder, number):
    """Return the path of a case's record in a result folder of coarse to fine."""
    return folder / 'signals' / f'{number}.json'


def store_record(folder, number, record):
    """Write a case's record."""
    write_json(record_file(folder, number), record, nulls=True)


def stored_record(folder, number):
    """Return a case's record, or None where there is none that is whole."""
    try:
        record = read_json(record_file(folder, number))
        return record if is_record(record) else None
    except (OSError, ValueError):
        return None


def is_record(record):
    """Return whether this is a record: what it holds may come from a damaged or strange file."""
    rounds, probes = (record.get(name) for name in ('rounds', 'probes')) if isinstance(record, dict) else (None, None)
    if not (
        isinstance(rounds, list) and rounds and isinstance(probes, list) and all(isinstance(r, dict) for r in rounds)
    ):
        return False
    numbers = [record.get('contraction'), *probes, *(number for values in rounds for number in values.values())]
    return all(number is None or (isinstance(number, int | float) and math.isfinite(number)) for number in numbers)


def record_of_masks(masks):
    """Return the record of stored masks alone, of results that were made without signals."""
    rounds = [{'voxels': int(np.count_nonzero(mask))} for mask in masks]
    for values, before, mask in zip(rounds[1:], masks, masks[1:]):
        values |= {'inter_iteration': agreement(before, mask).value, 'from_start': agreement(masks[0], mask).value}
    inters = [values['inter_iteration'] for values in rounds[1:]]
    return {'rounds': rounds, 'contraction': contraction(inters), 'probes': []}
