"""Merge the coarse-to-fine predictions of several organs: one NIfTI a test case, each voxel with its organ's number.

A voxel belongs to the organ of the highest mean probability among those whose last round holds it
(the one named first where two are equal). Reads what `coarse2fine_testing.py --probability` has stored
of each organ; the arguments are the same, but for the list of organs. Writes
results/merged_*/*/CASE.nii.gz on the grid of geometry/CASE.json, and results.txt: the DSC of each
organ after merging.
"""

from argparse import Namespace
from pathlib import Path

from running import arguments, script  # before packages: it names a missing one

# isort: split
from running.data_folder import PLANES, find_snapshots, read_cases, snapshot_name, training_settings
from running.files import load_volume
from running.results import Results, check_sources, lock_folders, prepare_folder, read_settings, start_without_network
from scans.geometry import check_labels
from scans.nifti import write_on_scan
from utils import DSC_computation
from volumes.fusion import merge
from volumes.rounds import finished, folder_name, round_file, rounds_folder, stored_rounds


def main():
    args = parse()
    provenance = start_without_network(args, 'merging')
    tested = {organ: tested_organ(args, organ) for organ in args.organ_IDs}
    settings = {f'organ {organ} {name}': value for organ in tested for name, value in tested[organ].settings.items()}
    settings |= {f'organ {organ} results': tested[organ].folder.name for organ in tested}
    cases = read_cases(args.data_path, 'testing', args.current_fold)
    check_labels(args.data_path, cases)
    folder = merged_folder(args)
    values = {organ: [] for organ in tested}
    check_sources([organ.folder for organ in tested.values()], args.data_path, cases)

    def check():
        for number, case in enumerate(cases, 1):
            for organ, one in tested.items():
                last_round(one, number, case.label(args.data_path, organ).shape)

    with lock_folders(folder), Results(folder, 'merged') as results:
        prepare_folder(folder, settings, provenance, args.overwrite and check)
        results(f'Merging organs {", ".join(map(str, tested))}:')
        for number, case in enumerate(cases, 1):
            results(f'  Testcase {number}:')
            labels = {organ: case.label(args.data_path, organ) for organ in tested}
            merged = merge({organ: last_round(tested[organ], number, labels[organ].shape) for organ in tested})
            write_on_scan(folder / f'{Path(case.image_file).stem}.nii.gz', merged, case, args.data_path)
            scores = {organ: DSC_computation(label, merged == organ) for organ, label in labels.items()}
            results.add_case(number, case, {str(organ): score for organ, score in scores.items()})
            for organ, score in scores.items():
                results(f'    DSC of organ {organ} = {score} .')
                values[organ].append(score.value)
        for organ in tested:
            results(f'Average DSC of organ {organ} = {results.average(values[organ])[0]} .')


def parse():
    parser = arguments.stage_parser(__doc__, arguments.MERGING, arguments.FUSION_OPTIONAL)
    arguments.add_overwrite(parser)
    return arguments.parse(parser)


def tested_organ(args, organ):
    """Return the arguments with which coarse2fine_testing.py tested an organ, with its `folder` and `settings`."""
    args = Namespace(**vars(args) | {'organ_ID': organ})
    args.folder = rounds_folder(args, find_snapshots(args))
    args.settings = read_settings(args.folder / 'run.json')
    stop_DSC = args.settings.get('stop_DSC')
    args.stop_DSC = stop_DSC if isinstance(stop_DSC, float) else None
    return args


def last_round(tested, number, shape):
    """Return (mask, probability as round(255 p)), (W, H, L) uint8, of the last round of a case of a tested organ."""
    masks = stored_rounds(tested.folder, number, shape, tested)
    probability = load_volume(round_file(tested.folder, 'P', number), shape)
    if probability is None or not finished(masks, tested):
        raise FileNotFoundError(
            f'{tested.folder}: case {number} is incomplete; run coarse2fine_testing.py --probability of organ '
            f'{tested.organ_ID} first'
        )
    return masks[-1], probability


def merged_folder(args):
    """Return results/merged_1e-5x10,20/FD0:XJ3_1+3,...: named as coarse to fine names the folder of one organ."""
    args = Namespace(**vars(args) | {'organ_ID': '+'.join(map(str, args.organ_IDs))})
    snapshots = [snapshot_name(args, plane, 'J', getattr(args, f'timestamp1_{plane}')) for plane in PLANES]
    return Path(args.data_path, 'results', f'merged_{training_settings(args)}', folder_name(args, snapshots))


if __name__ == '__main__':
    script.run(main)
