"""Fusion of the three planes of coarse or oracle testing by vote (section 3.3); merging of several organs."""

import numpy as np

from running import arguments
from running.data_folder import PLANES, epoch_name, find_snapshots, read_cases, results_folder, without_fold
from running.files import load_volume, save_volume
from running.processes import rank
from running.results import Results, check_sources, lock_folders, prepare_folder, read_settings, start_without_network
from scans.geometry import check_labels
from scans.nifti import export
from utils import DSC_computation, post_processing
from volumes.rounds import weighted
from volumes.testing import case_weights, weights_settings

FUSIONS = [*PLANES, 'F1', 'F2', 'F3', 'F1P', 'F2P', 'F3P']


def parse(doc):
    """Return the arguments of a fusion script with this docstring."""
    parser = arguments.stage_parser(doc, arguments.FUSION, arguments.FUSION_OPTIONAL)
    arguments.add_nifti(parser)
    arguments.add_overwrite(parser)
    return arguments.parse(parser)


def fuse(args, stage):
    """Fuse the volumes of a fold's test cases: volumes/{X|Y|Z|F1|F2|F3|F1P|F2P|F3P}_{case}.npz, results.txt and .json."""
    if rank():  # under torchrun one process is enough
        return
    provenance = start_without_network(args, 'fusion')
    snapshots = find_snapshots(args)
    epoch = epoch_name(args)
    name = f'FD{args.current_fold}:fusion:{without_fold(args, snapshots)}_{epoch},{args.threshold}'
    folder = results_folder(args, stage, name)
    sources = [results_folder(args, stage, snapshot) for snapshot in snapshots]
    cases = read_cases(args.data_path, 'testing', args.current_fold)
    check_labels(args.data_path, cases)
    weights = case_weights(args, cases)
    files = {n: [source / 'volumes' / f'{epoch}_{n}.npz' for source in sources] for n, _ in enumerate(cases, 1)}
    values = {fusion: [] for fusion in FUSIONS}

    def check():
        for number, case in enumerate(cases, 1):
            shape = case.label(args.data_path, args.organ_ID).shape
            for file in files[number]:
                plane_volume(file, shape)

    with lock_folders(folder), Results(folder, f'{stage}_fusion') as results:
        settings = fusion_settings(sources) | weights_settings(weights)
        settings |= check_sources(sources, args.data_path, cases, labels=stage == 'oracle')
        prepare_folder(folder, settings, provenance, args.overwrite and check)
        results('Fusing results of 1 snapshots:')
        for number, case in enumerate(cases, 1):
            results(f'  Testcase {number}:')
            label = case.label(args.data_path, args.organ_ID)
            weight = weights.get(case.image_file)
            masks = stored_fusion(folder / 'volumes', number, files[number], label.shape, args, weight)
            export(args, folder / 'volumes' / f'F2P_{number}.npz', masks['F2P'], case)
            scores = {fusion: DSC_computation(label, masks[fusion]) for fusion in FUSIONS}
            results.add_case(number, case, scores)
            for fusion, score in scores.items():
                results(f'    DSC_{fusion} = {score} .')
                values[fusion].append(score.value)
        for fusion in FUSIONS:
            results(f'Average DSC_{fusion} = {results.average(values[fusion])[0]} .')


def fusion_settings(sources):
    """Return what the planes' volumes were made with, by the run.json of their folders."""
    return {
        f'{plane} {name}': value
        for plane, source in zip(PLANES, sources)
        for name, value in read_settings(source / 'run.json').items()
    }


def stored_fusion(folder, number, files, shape, args, weights=None):
    """Return {name: mask} of a case's nine fusions, stored in `folder` or made from the planes' `files`."""
    paths = {fusion: folder / f'{fusion}_{number}.npz' for fusion in FUSIONS}
    masks = {fusion: load_volume(path, shape) for fusion, path in paths.items()}
    if any(mask is None for mask in masks.values()):
        masks = fusion_masks([plane_volume(file, shape) for file in files], args.threshold, weights)
        for fusion, path in paths.items():
            save_volume(path, masks[fusion])
    return masks


def plane_volume(file, shape):
    """Return a plane's stored volume (W, H, L) uint8; raise FileNotFoundError where there is no whole one."""
    volume = load_volume(file, shape)
    if volume is None:
        raise FileNotFoundError(f'{file}: no such volume, or not a whole one; test this plane and fold first')
    return volume


def fusion_masks(volumes, threshold, weights=None):
    """Return {name: mask (W, H, L)} of three planes' volumes (round(255 p), uint8).

    X, Y, Z: a plane's probability >= threshold; F1, F2, F3: sum of the probabilities >= 0.5, 1.5, 2.5;
    F1P, F2P, F3P: these post-processed. weights: of the planes, see plane_weights; the sum is then three times their mean.
    """
    probabilities = [volume / np.float32(255) for volume in volumes]
    total = sum(probabilities)  # in the order X, Y, Z, float32
    if weights is not None:
        total = 3 * weighted(probabilities, weights)
    masks = {plane: probability >= threshold for plane, probability in zip(PLANES, probabilities)}
    votes = {f'F{votes}': (total >= votes - 0.5).astype(np.uint8) for votes in (1, 2, 3)}
    processed = {f'{name}P': post_processing(mask.copy(), mask, 0.5, None) for name, mask in votes.items()}
    return masks | votes | processed


def merge(found):
    """Return organ numbers (W, H, L) uint8, 0 where there is none, of {organ: (mask, probability)}, both uint8."""
    merged, highest = np.zeros((2, *next(iter(found.values()))[0].shape), np.uint8)
    for organ, (mask, probability) in found.items():
        taken = (mask != 0) & ((merged == 0) | (probability > highest))
        merged[taken], highest[taken] = organ, probability[taken]
    return merged
