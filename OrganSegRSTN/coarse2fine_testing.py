"""Coarse-to-fine testing (section 3.3, algorithm 1): the fine network looks again until two rounds agree.

Round 0 is the mean of the three coarse volumes; those that coarse_testing.py has not made are added to
its folders. Every further round crops by the previous mask, weighs by the saliency of the previous
probability, and averages the three planes. Writes results/coarse2fine_testing_*/*/results.txt and
volumes/R{round}_{case}.npz; with --probability also P_{case}.npz. signals/{case}.json says how far to trust
the masks (volumes/trust.py).
"""

import time

from running import arguments, processes, script  # before packages: it names a missing one

# isort: split
import numpy as np

from running.data_folder import PLANES, epoch_name, find_snapshots, read_cases, results_folder
from running.files import load_volume, save_volume
from running.results import Results, check_folder, prepare_folder, start
from scans.nifti import export
from utils import DSC_computation
from volumes.rounds import (
    AGREEMENTS,
    agreement,
    finished,
    round_file,
    rounds_folder,
    stopped_at,
    stored_rounds,
)
from volumes.testing import (
    case_weights,
    first_alone,
    plane_tester,
    require_inputs,
    require_snapshots,
    run_settings,
    share_out,
    stored,
    to_bytes,
    weights_settings,
)
from volumes.trust import PROBES, Watch, probe_shift, record_file, record_of_masks, store_record, stored_record


def main():
    args = parse()
    processes.quiet()
    device, provenance = start(args)
    snapshots = find_snapshots(args)
    tested = read_cases(args.data_path, 'testing', args.current_fold)
    coarse, fine = (
        [plane_tester(args, plane, snapshot, TEST, device, tested) for plane, snapshot in zip(PLANES, snapshots)]
        for TEST in 'CF'
    )
    weights = case_weights(args, tested)
    folder = rounds_folder(args, snapshots)
    coarse_folders = [results_folder(args, 'coarse', snapshot) for snapshot in snapshots]
    last = 'P' if args.probability else 0
    require_snapshots(fine, [round_file(folder, last, number) for number in range(1, len(tested) + 1)])

    def masks_and_label(number, case):
        begin = time.time()
        label = case.label(args.data_path, args.organ_ID)
        planes = list(zip(coarse_folders, coarse))
        masks = case_rounds(args, folder, case, number, label.shape, planes, fine, weights.get(case.image_file))
        print(f'    {case.image_file}: {time.time() - begin:.1f} s', flush=True)
        return masks, label

    with first_alone(folder, *coarse_folders):
        if processes.rank() == 0:
            prepare_folders(args, tested, snapshots, weights, folder, coarse_folders, fine, provenance)
        if not share_out(tested, masks_and_label):
            return
        cases = []
        with Results(folder, 'coarse2fine') as results:
            results('Fusing results of 1 snapshots:')
            for number, case in enumerate(tested, 1):
                results(f'  Testcase {number}:')
                masks, label = masks_and_label(number, case)
                export(args, round_file(folder, len(masks) - 1, number), masks[-1], case)
                cases.append(report_rounds(results, folder, number, case, label, masks))
            report_averages(results, cases, args.max_rounds)
            if args.stop_DSC is not None and args.stop_DSC < float(AGREEMENTS[-1]):
                results(f'Rounds ended at an inter-iteration DSC of {args.stop_DSC}: so do higher DSC thresholds .')


def prepare_folders(args, tested, snapshots, weights, folder, coarse_folders, fine, provenance):
    """Prepare the result folder, and those of coarse testing as far as volumes are missing there."""
    coarse = {path: run_settings(args, tested, [name]) for path, name in zip(coarse_folders, snapshots)}
    for path, settings in coarse.items():
        check_folder(path, settings, 'coarse_testing.py --overwrite')
    stop_DSC = 'none' if args.stop_DSC is None else args.stop_DSC
    settings = run_settings(args, tested, snapshots) | {'stop_DSC': stop_DSC} | weights_settings(weights)
    replace = args.overwrite and (lambda: require_inputs(args, fine, tested))
    prepare_folder(folder, settings, provenance, replace)
    for path, settings in coarse.items():
        if len(list(path.glob(f'volumes/{epoch_name(args)}_*.npz'))) < len(tested):
            prepare_folder(path, settings, provenance)


def parse():
    parser = arguments.stage_parser(__doc__, arguments.COARSE2FINE, arguments.FUSION_OPTIONAL)
    parser.add_argument('--stop_DSC', type=arguments.number(0, 1), metavar='DSC',
                        help='end a case at the first round whose inter-iteration DSC reaches it (default: all rounds)')  # fmt: skip
    parser.add_argument('--probability', action='store_true',
                        help="store the last round's mean probability, too, for merge_organs.py")  # fmt: skip
    parser.add_argument('--probe', type=arguments.whole(0, len(PROBES)), default=0, metavar='N',
                        help='also compute round 1 from N other starts, widened or shifted, as a signal (default 0)')  # fmt: skip
    arguments.add_testing(parser)
    return arguments.parse(parser)


def case_rounds(args, folder, case, number, shape, coarse, fine, weights):
    """Return the masks of a case's rounds: the stored ones, or new ones that are stored here.

    coarse: [(result folder, PlaneTester)] of the planes; weights: their plane_weights.
    """
    masks = stored_rounds(folder, number, shape, args)
    probability = round_file(folder, 'P', number)
    missing = args.probability and load_volume(probability, shape) is None
    if missing or not finished(masks, args) or not covers(stored_record(folder, number), masks, args.probe):
        image = case.image(args.data_path)
        volumes = [coarse_volume(args, path, tester, image, number) for path, tester in coarse]
        masks, score, record = rounds(args, volumes, fine, image, weights)
        for path in (probability, record_file(folder, number)):
            path.unlink(missing_ok=True)  # they are stored last, so that they always belong to the rounds beside them
        for r, mask in enumerate(masks):
            save_volume(round_file(folder, r, number), mask)
        if args.probability:
            save_volume(probability, to_bytes(score))
        store_record(folder, number, record)
    return masks


def covers(record, masks, probes):
    """Return whether a case's record has so many probes, and all rounds of these masks; no record (None) has no probes."""
    if record is None:
        return not probes
    signals = record['rounds']
    whole = len(signals) >= len(masks) or not signals[-1].get('voxels')  # no round follows an empty mask
    return whole and len(record['probes']) >= probes


def coarse_volume(args, folder, tester, image, number):
    """Return a plane's coarse volume (uint8) of a case: the file of coarse testing, added where it is missing."""
    return stored(
        folder / 'volumes' / f'{epoch_name(args)}_{number}.npz',
        image.shape,
        lambda: to_bytes(tester.predict(image)),
    )


def rounds(args, coarse_volumes, fine, image, weights):
    """Return (masks of rounds 0, 1, ... until they are finished, mean probability of the last computed round, record).

    The rounds after an empty mask are empty. The record is that of volumes.trust.
    """
    masks, watch = [], Watch(args.fine_threshold, args.probe, probe_shift(args.crop_margin), weights)
    for mask, score in watch.coarse_to_fine(coarse_volumes, fine, image):
        masks.append(mask)
        if finished(masks, args):
            break
    while not finished(masks, args):
        masks.append(np.zeros_like(masks[0]))
    return masks, score, watch.record()


def report_rounds(results, folder, number, case, label, masks):
    """Print a case's rounds; return [(DSC, inter-iteration DSC)], the latter nan in round 0."""
    scores = [DSC_computation(label, mask) for mask in masks]
    inters = [agreement(before, mask) for before, mask in zip(masks, masks[1:])]
    for r, score in enumerate(scores):
        results(f'    Round {r}, DSC = {score} .')
        if r > 0:
            results(f'      Inter-iteration DSC = {inters[r - 1]} .')
    signals = stored_record(folder, number) or record_of_masks(masks)
    results.add_case(number, case, {f'R{r}': score for r, score in enumerate(scores)}, inters, signals)
    return list(zip([score.value for score in scores], [np.nan, *(inter.value for inter in inters)]))


def report_averages(results, cases, max_rounds):
    """Print the averages of every round (a case that has stopped keeps its last DSC) and of stopping at an agreement."""
    for r in range(max_rounds + 1):
        mean, _ = results.average([scores[min(r, len(scores) - 1)][0] for scores in cases])
        results(f'Round {r}, Average DSC = {mean} .')
    for asked in AGREEMENTS:
        mean, std = results.average([stopped_at(scores, float(asked)) for scores in cases])
        results(f'DSC threshold = {asked}, Average DSC = {mean} std = {std} .')


if __name__ == '__main__':
    script.run(main)
