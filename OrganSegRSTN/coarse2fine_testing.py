"""Coarse-to-fine testing (section 3.3, algorithm 1): the fine network looks again until two rounds agree.

Round 0 is the mean of the three coarse volumes (made here where coarse_testing.py has not made them); every further
round crops by the previous mask, weighs by the saliency of the previous probability, and averages the three planes.
Writes results/coarse2fine_testing_*/*/results.txt and volumes/R{round}_{case}.npz; with --probability P_{case}.npz, too.
"""

import time

import numpy as np

from running import arguments, processes, script
from running.data_folder import PLANES, epoch_name, find_snapshot, read_cases, results_folder
from running.files import load_volume, save_volume
from running.results import Results, prepare_folder, start
from scans.nifti import add_option, export
from utils import DSC_computation
from volumes.rounds import (
    AGREEMENTS,
    agreement,
    coarse_probability,
    fine_rounds,
    finished,
    folder_name,
    probability_file,
    stored_rounds,
)
from volumes.testing import PlaneTester, first_alone, require_snapshots, run_settings, share_out, stored, to_bytes


def main():
    args = arguments_of()
    processes.quiet()
    device, run = start(args)
    snapshots = [find_snapshot(args, plane, getattr(args, f'timestamp1_{plane}')) for plane in PLANES]
    coarse, fine = (
        [PlaneTester(args, plane, snapshot, TEST, device) for plane, snapshot in zip(PLANES, snapshots)]
        for TEST in 'CF'
    )
    folder = results_folder(args, 'coarse2fine', folder_name(args, snapshots))
    tested = read_cases(args.data_path, 'testing', args.current_fold)
    needed = 'P' if args.probability else 'R0'
    require_snapshots(fine, [folder / 'volumes' / f'{needed}_{number}.npz' for number in range(1, len(tested) + 1)])

    def masks_and_label(number, case):
        start = time.time()
        label = case.label(args.data_path, args.organ_ID)
        masks = case_rounds(args, folder, case, number, label.shape, coarse, fine)
        print(f'    {case.image_file}: {time.time() - start:.1f} s', flush=True)
        return masks, label

    with first_alone(folder, *(coarse_folder(args, tester) for tester in coarse)):
        if processes.rank() == 0:
            prepare_folders(args, folder, coarse, run_settings(args, tested, snapshots), run)
        if not share_out(tested, masks_and_label):
            return
        cases = []
        with Results(folder) as results:
            results('Fusing results of 1 snapshots:')
            for number, case in enumerate(tested, 1):
                results(f'  Testcase {number}:')
                masks, label = masks_and_label(number, case)
                export(args, folder / 'volumes' / f'R{len(masks) - 1}_{number}.npz', masks[-1], case)
                cases.append(report_rounds(results, label, masks))
            report_averages(results, cases, args.max_rounds)


def arguments_of():
    made = arguments.parser(__doc__, arguments.COARSE2FINE, arguments.FUSION_OPTIONAL)
    made.add_argument('--stop_DSC', type=arguments.number(0, 1), metavar='DSC',
                      help='end a case at the first round whose inter-iteration DSC reaches it (default: all rounds)')  # fmt: skip
    arguments.add_precision(made)
    made.add_argument('--probability', action='store_true',
                      help="store the last round's mean probability, too, as merge_organs.py needs it")  # fmt: skip
    add_option(made)
    arguments.add_overwrite(made)
    return arguments.parse(made)


def prepare_folders(args, folder, coarse, settings, run):
    """Make sure that the volumes in the result folder, and in those of coarse testing, are of these settings."""
    prepare_folder(folder, settings | {'stop_DSC': args.stop_DSC or 'none'}, run)
    for tester, checksum in zip(coarse, settings['snapshots']):
        prepare_folder(coarse_folder(args, tester), settings | {'snapshots': [checksum]}, run)


def case_rounds(args, folder, case, number, shape, coarse, fine):
    """The masks of a case's rounds: those stored, or made and stored here, with P_{case}.npz where that is asked for."""
    masks = stored_rounds(folder, number, shape, args)
    probability = probability_file(folder, number)
    lacking = args.probability and load_volume(probability, shape) is None
    if lacking or not finished(masks, args):
        probability.unlink(missing_ok=True)  # stored last: where it is, the rounds beside it are those it belongs to
        masks, score = rounds(args, case, number, coarse, fine)
        for r, mask in enumerate(masks):
            save_volume(folder / 'volumes' / f'R{r}_{number}.npz', mask)
        if args.probability:
            save_volume(probability, to_bytes(score))
    return masks


def rounds(args, case, number, coarse, fine):
    """(masks, score) of a case: the masks (W, H, L) uint8 of round 0 and on until they are finished, after an empty one
    all empty; the mean probability, float32, of the last round that was needed.
    """
    image = case.image(args.data_path)
    score = coarse_probability([coarse_volume(args, tester, image, number) for tester in coarse])
    masks = [(score >= args.fine_threshold).astype(np.uint8)]
    looks = fine_rounds(fine, image, score, masks[0], args.fine_threshold, args.organ_ID)
    while not finished(masks, args):
        score, mask = next(looks, (score, np.zeros_like(masks[0])))
        masks.append(mask)
    return masks, score


def coarse_folder(args, tester):
    """The result folder of coarse testing of a plane."""
    return results_folder(args, 'coarse', tester.path.name)


def coarse_volume(args, tester, image, number):
    """A plane's coarse volume (uint8) of a case: coarse testing's own file."""
    file = coarse_folder(args, tester) / 'volumes' / f'{epoch_name(args)}_{number}.npz'
    return stored(file, image.shape, lambda: to_bytes(tester.predict(image)))


def report_rounds(results, label, masks):
    """Print a case's rounds; -> [(DSC, inter-iteration DSC)], the latter nan in round 0."""
    scores = []
    for r, mask in enumerate(masks):
        score, inter = DSC_computation(label, mask), None
        results(f'    Round {r}, DSC = {score} .')
        if r > 0:
            inter = agreement(masks[r - 1], mask)
            results(f'      Inter-iteration DSC = {inter} .')
        scores.append((score.value, inter.value if inter else np.nan))
    return scores


def report_averages(results, cases, max_rounds):
    """Print the averages of every round (a case that has stopped keeps its last DSC) and of stopping at an agreement."""
    for r in range(max_rounds + 1):
        mean, _ = results.average([scores[min(r, len(scores) - 1)][0] for scores in cases])
        results(f'Round {r}, Average DSC = {mean} .')
    for asked in AGREEMENTS:
        mean, std = results.average([stopped_at(scores, float(asked)) for scores in cases])
        results(f'DSC threshold = {asked}, Average DSC = {mean} std = {std} .')


def stopped_at(scores, asked):
    """DSC of the first round whose inter-iteration DSC reaches `asked`, else of the last."""
    return next((score for score, inter in scores[1:] if inter >= asked), scores[-1][0])


if __name__ == '__main__':
    script.run(main)
