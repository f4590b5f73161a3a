"""Coarse-to-fine testing (section 3.3, algorithm 1): the fine network looks again until two rounds agree.

Round 0 is the mean of the three coarse volumes (made here where coarse_testing.py has not made them); every further
round crops by the previous mask, weighs by the saliency of the previous probability, and averages the three planes.
Writes results/coarse2fine_testing_*/*/results.txt and volumes/R{round}_{case}.npz.
"""

import time

import arguments
import numpy as np
from model import pick_device
from results import Results
from testing import PlaneTester, coarse_probability, fine_rounds, stored, to_bytes
from utils import (
    PLANES,
    DSC_computation,
    epoch_name,
    find_snapshot,
    load_volume,
    read_cases,
    results_folder,
    save_volume,
)

AGREEMENTS = ('0.90', '0.95', '0.98', '0.99')  # inter-iteration DSC at which a user might stop


def main():
    made = arguments.parser(__doc__, arguments.COARSE2FINE, arguments.FUSION_OPTIONAL)
    args = arguments.parse(made)
    device = pick_device(args.GPU_ID)
    snapshots = [find_snapshot(args, plane, getattr(args, f'timestamp1_{plane}')) for plane in PLANES]
    coarse, fine = (
        [PlaneTester(args, plane, snapshot, TEST, device) for plane, snapshot in zip(PLANES, snapshots)]
        for TEST in 'CF'
    )
    folder = results_folder(args, 'coarse2fine', folder_name(args, snapshots))
    cases = []
    with Results(folder) as results:
        results('Fusing results of 1 snapshots:')
        for number, case in enumerate(read_cases(args.data_path, 'testing', args.current_fold), 1):
            start = time.time()
            results(f'  Testcase {number}:')
            label = case.label(args.data_path, args.organ_ID)
            masks = stored_rounds(
                folder, number, label.shape, args, lambda c=case, n=number: rounds(args, c, n, coarse, fine)
            )
            cases.append(report_rounds(results, label, masks))
            print(f'    {case.image_file}: {time.time() - start:.1f} s', flush=True)
        report_averages(results, cases, args.max_rounds)


def folder_name(args, snapshots):
    """`FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,10`."""
    names = ','.join(name.removeprefix(f'FD{args.current_fold}:').removesuffix('.pkl') for name in snapshots)
    thresholds = f'{args.coarse_threshold}_{args.fine_threshold}'
    return f'FD{args.current_fold}:{names}:{epoch_name(args)}_{thresholds},{args.max_rounds}'


def stored_rounds(folder, number, shape, args, compute):
    """The masks of rounds 0, 1, ... of a case, read from `folder` where all are there, or computed and stored."""
    paths = [folder / 'volumes' / f'R{r}_{number}.npz' for r in range(args.max_rounds + 1)]
    masks = [load_volume(path, shape) for path in paths]
    if any(mask is None for mask in masks):
        masks = compute()
        for path, mask in zip(paths, masks):
            save_volume(path, mask)
    return masks


def rounds(args, case, number, coarse, fine):
    """The masks (W, H, L) uint8 of round 0 to max_rounds; after an empty one all are empty."""
    image = case.image(args.data_path)
    score = coarse_probability([coarse_volume(args, tester, image, number) for tester in coarse])
    masks = [(score >= args.fine_threshold).astype(np.uint8)]
    looks = fine_rounds(fine, image, score, masks[0], args.fine_threshold, args.organ_ID)
    for _, mask in zip(range(args.max_rounds), looks):
        masks.append(mask)
    masks += [np.zeros_like(masks[0])] * (args.max_rounds + 1 - len(masks))
    return masks


def coarse_volume(args, tester, image, number):
    """A plane's coarse volume (uint8) of a case: coarse testing's own file."""
    file = results_folder(args, 'coarse', tester.path.name) / 'volumes' / f'{epoch_name(args)}_{number}.npz'
    return stored(file, image.shape, lambda: to_bytes(tester.predict(image)))


def report_rounds(results, label, masks):
    """Print a case's rounds; -> [(DSC, inter-iteration DSC)], the latter nan in round 0."""
    scores = []
    for r, mask in enumerate(masks):
        score, agreement = DSC_computation(label, mask), np.nan
        results(f'    Round {r}, DSC = {score} .')
        if r > 0:
            inter = DSC_computation(masks[r - 1], mask)
            inter = inter if inter.pred + inter.label else inter._replace(value=1.0)  # two empty rounds agree
            results(f'      Inter-iteration DSC = {inter} .')
            agreement = inter.value
        scores.append((score.value, agreement))
    return scores


def report_averages(results, cases, max_rounds):
    """Print the averages of every round and of stopping at each agreement."""
    for r in range(max_rounds + 1):
        results(f'Round {r}, Average DSC = {results.average([scores[r][0] for scores in cases])[0]} .')
    for agreement in AGREEMENTS:
        mean, std = results.average([stopped_at(scores, float(agreement)) for scores in cases])
        results(f'DSC threshold = {agreement}, Average DSC = {mean} std = {std} .')


def stopped_at(scores, agreement):
    """DSC of the first round whose inter-iteration DSC reaches `agreement`, else of the last."""
    return next((score for score, inter in scores[1:] if inter >= agreement), scores[-1][0])


if __name__ == '__main__':
    arguments.run(main)
