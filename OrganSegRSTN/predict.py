"""Predict the mask of a new scan (section 3.3, algorithm 1): coarse on three planes, then fine rounds until two agree.

    python predict.py INPUT OUTPUT.nii.gz SNAPSHOT_X SNAPSHOT_Y SNAPSHOT_Z [options]

INPUT is a NIfTI file, or a folder with one DICOM series. OUTPUT is a mask on INPUT's own grid (of a
DICOM series: columns, rows, slices). Several snapshots of a plane, separated by commas, are averaged:
x/FD0:XJ3_1.pkl,x/FD1:XJ3_1.pkl.

A network knows its organ in arrays that lie as in training, so INPUT's axes are turned to lie so, and
the mask's axes back. How training arrays lie comes from --orientation; else from geometry/ of the data
folder of the first snapshot; else NIH's PLI is assumed: rows run to the back, columns to the left,
slices downwards. INPUT without a position (no affine, or one of mere spacing) is taken as conversion
would store it.
"""

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import nibabel.orientations as axes
import numpy as np

from running import arguments, script
from running.data_folder import PLANES
from running.results import start
from running.weights import load_weights
from scans.dicom import is_slice, modality, read_series, series_folders
from scans.geometry import PUBLISHED, axis_codes, known, load_geometry
from scans.nifti import affine_header, grid_header, is_nifti_name, read_nifti_image, write_nifti
from scans.voxels import intensity_doubts
from volumes.rounds import agreement, coarse_to_fine
from volumes.testing import PlaneSettings, PlaneTester, to_bytes

NIH = 'PLI'
STORED = 'stored'
SNAPSHOT = re.compile(r'FD\d+.(?P<plane>[XYZ])(?P<mode>[SIJ])[13]_(?P<organ>\d+)(_\d{8}_\d{6})?\.pkl')


def main():
    args = parse()
    device, _ = start(args)
    check_outputs(args)
    snapshots = [split_snapshots(getattr(args, f'SNAPSHOT_{plane}')) for plane in PLANES]
    thickness = check_snapshots(snapshots, args.force)
    margin = find_margin(snapshots[0][0]) if args.margin is None else args.margin
    codes = training_orientation(args.orientation, snapshots[0][0])
    scan, header = read_input(args.INPUT)
    for doubt in intensity_doubts(scan.image, args.low_range, args.high_range):
        print(f'warning: {doubt}')
    there, back = turns(scan.geometry, codes)
    image, scan = np.ascontiguousarray(axes.apply_orientation(scan.image, there)), scan._replace(image=None)
    settings = PlaneSettings((args.low_range, args.high_range), thickness, margin, device, args.precision)
    mask, probability = segment(image, snapshots, settings, args.rounds, args.stop_DSC, args.threshold)
    print_volume(mask, scan.geometry)
    for path, volume in ((args.OUTPUT, mask), (args.probability, probability)):
        if path:
            write_nifti(path, axes.apply_orientation(volume, back).transpose(PUBLISHED), header)
            print(f'written: {path}')


# --- arguments -----------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Return the arguments; see the top of this file."""
    parser = arguments.Parser(__doc__)
    parser.add_argument('INPUT', help='NIfTI file, or folder with one DICOM series')
    parser.add_argument('OUTPUT', help='mask to write, .nii.gz or .nii')
    for plane in PLANES:
        parser.add_argument(f'SNAPSHOT_{plane}', help=f'snapshot of plane {plane}, or several separated by commas')
    for name, default, kind, text in (
        ('--low_range', -100, arguments.number(), 'lower end of the intensity window of the training (HU)'),
        ('--high_range', 240, arguments.number(), 'its upper end'),
        ('--rounds', 10, arguments.whole(0), 'fine rounds at most'),
        ('--stop_DSC', 0.99, arguments.number(0, 1), 'inter-iteration DSC at which two rounds agree'),
        ('--threshold', 0.5, arguments.number(0, 1), 'probability from which a voxel is organ'),
    ):
        parser.add_argument(name, default=default, type=kind, help=f'{text} (default {default})')
    parser.add_argument('--device', '--GPU_ID', dest='GPU_ID', default='0',
                        help='number of the CUDA device, or cpu (default 0)')  # fmt: skip
    parser.add_argument('--margin', type=arguments.whole(0),
                        help="pixels around the organ's box (default: by the name of the snapshot's folder, else 20)")  # fmt: skip
    parser.add_argument('--orientation', type=orientation, metavar='WHERE',
                        help="how training arrays lie: axis codes such as PLI, or a training case's geometry/CASE.json; "
                        f'{STORED}: do not turn anything')  # fmt: skip
    parser.add_argument('--probability', metavar='FILE', help='write the mean probability, too (float32 .nii.gz)')
    arguments.add_precision(parser)
    parser.add_argument('--force', action='store_true', help='take a snapshot although its name is of another plane')
    return arguments.parse(parser, argv)


def orientation(text):
    """Type of --orientation: axis codes, a geometry file, or 'stored'."""
    if text == STORED or text.endswith('.json'):
        return text
    if len(text) != 3 or any(sum(code in pair for code in text.upper()) != 1 for pair in ('LR', 'AP', 'SI')):
        raise argparse.ArgumentTypeError(f'{text!r} is neither axis codes such as {NIH} nor a .json file')
    return text.upper()


def check_outputs(args):
    """Refuse names that are no NIfTI file's, and to write over INPUT, before any work is done."""
    outputs = [os.path.abspath(path) for path in (args.OUTPUT, args.probability) if path]
    for path in outputs:
        if not is_nifti_name(path):
            raise ValueError(f'{path}: a mask is written as .nii.gz or .nii; name it so')
    if len({*outputs, os.path.abspath(args.INPUT)}) <= len(outputs):
        raise ValueError(f'{args.OUTPUT}: INPUT, OUTPUT and --probability must be different files')


# --- snapshots -----------------------------------------------------------------------------------------------------


def split_snapshots(text):
    """Return the paths in a list separated by commas; the name of a snapshot's folder holds a comma, too."""
    return [Path(path) for path in re.split(r'(?<=\.pkl),|(?<=\.pth),', text)]


class Kind(NamedTuple):
    """What all snapshots of a prediction must share; organ is None where the name does not hold it."""

    width: int
    thickness: int
    organ: str | None


def check_snapshots(snapshots, force):
    """Return the thickness of the networks of `snapshots` (a list of paths a plane).

    Raise ValueError where they do not belong together.
    """
    paths = [path for paths in snapshots for path in paths]
    kinds = [snapshot_kind(path, plane, force) for plane, paths in zip(PLANES, snapshots) for path in paths]
    for what, values in zip(Kind._fields, zip(*kinds)):
        known_values = [(path, value) for path, value in zip(paths, values) if value is not None]
        for path, value in known_values:
            first, usual = known_values[0]
            if value != usual:
                raise ValueError(f'{path}: has {what} {value}, but {first} has {what} {usual}')
    return kinds[0].thickness


def snapshot_kind(path, plane, force):
    """Return the Kind of a snapshot for a plane, from its name and its weights."""
    weights = load_weights(path)
    name = SNAPSHOT.fullmatch(path.name)
    if name and name['plane'] != plane and not force:
        raise ValueError(f'{path}: a snapshot of plane {name["plane"]} given for plane {plane} (or give --force)')
    if name and name['mode'] != 'J':
        print(f'warning: {path.name} is of mode {name["mode"]}; the training ends with mode J')
    try:
        sizes = len(weights['coarse_model.conv1_1.weight']), len(weights['saliency1.weight'])
    except KeyError as error:
        raise ValueError(f'{path}: not an RSTN snapshot, {error} is missing') from None
    return Kind(*sizes, name and name['organ'])


def find_margin(snapshot):
    """Return the margin of the training by the name of the snapshot's folder, SIJ_training_1e-5x10,20; else 20."""
    found = re.fullmatch(r'SIJ_training_.*,(\d+)', snapshot.absolute().parent.name)
    return int(found[1]) if found else 20


# --- the scan and its axes -----------------------------------------------------------------------------------------


def read_input(path):
    """Return (Scan as conversion stores it, header of a NIfTI file on the input's grid)."""
    if os.path.isdir(path):
        folder = series_folder(path)
        scan = read_series(folder, say=print)
        return scan, affine_header(scan.geometry and scan.geometry.transposed())
    if not is_nifti_name(path):
        raise ValueError(f'{path}: neither a NIfTI file (.nii, .nii.gz) nor a folder with a DICOM series')
    return read_nifti_image(path), grid_header(path)


def series_folder(path):
    """Return the one folder at or below `path` that holds a DICOM series; print a warning where it is not CT."""
    folders = [folder for folder, holds_slices in series_folders(path) if holds_slices]
    if len(folders) != 1:
        raise ValueError(f'{path}: {len(folders) or "no"} folders with DICOM slices in it; name the one of the series')
    first = next(file for file in sorted(folders[0].iterdir()) if is_slice(file))
    if (kind := modality(first)) not in ('', 'CT'):
        print(f'warning: {folders[0]}: its modality is {kind}, not CT')
    return folders[0]


def training_orientation(asked, snapshot):
    """Return the axis codes of the arrays that a snapshot was trained on, or 'stored'; print how they are known."""
    codes, why = asked, 'as asked'
    if asked and asked.endswith('.json'):
        geometry = load_geometry(asked)
        if geometry is None:
            raise FileNotFoundError(f'{asked}: no such geometry')
        codes, why = axis_codes(geometry) or STORED, f'by {asked}'
    elif not asked:
        *data, models, snapshots, _, _ = ['', '', *snapshot.absolute().parts]
        folder = Path(*data, 'geometry')
        files = sorted(folder.glob('*.json')) if (models, snapshots) == ('models', 'snapshots') else []
        codes, why = NIH, "assumed to be NIH's, see --orientation"
        if files:
            found = Counter(axis_codes(load_geometry(file)) or STORED for file in files)
            codes, count = found.most_common(1)[0]
            why = f'as {count} of {len(files)} cases in {folder}'
    print(f'training arrays: {codes} ({why})')
    return codes


def turns(geometry, codes):
    """Return the nibabel orientations that turn an array of this Geometry to lie as `codes`, and back."""
    ours = axis_codes(geometry)
    if codes == STORED:
        print('input: its axes are taken as conversion stores them')
    elif not ours:
        print('input: has no position: its axes are taken as conversion stores them, transpose(1, 0, 2)')
    else:
        print(f'input: lies {ours} as stored, {"turned" if ours != codes else "not turned"}')
    if codes == STORED or not ours:
        ours = codes = NIH
    ours, theirs = (axes.axcodes2ornt(one) for one in (ours, codes))
    return axes.ornt_transform(ours, theirs), axes.ornt_transform(theirs, ours)


# --- the prediction ------------------------------------------------------------------------------------------------


def segment(image, snapshots, settings, rounds, stop_DSC, threshold):
    """Return (mask uint8, probability float32) of `image` (W, H, L) HU after the last round that was needed.

    snapshots: a list of paths for each plane; settings: PlaneSettings.
    """
    begin = time.time()
    coarse, fine = (
        [PlaneTester(plane, paths, TEST, settings) for plane, paths in zip(PLANES, snapshots)] for TEST in 'CF'
    )
    volumes = []
    for tester in coarse:
        volumes.append(to_bytes(tester.predict(image)))
        tester.release()
    before = None
    for done, (mask, probability) in enumerate(coarse_to_fine(volumes, fine, image, threshold, organ_ID=1)):
        voxels, seconds = np.count_nonzero(mask), time.time() - begin
        if before is None:
            print(f'coarse: {voxels} voxels, {seconds:.1f} s', flush=True)
        else:
            inter = agreement(before, mask).value
            print(f'round {done}: {voxels} voxels, inter-iteration DSC = {inter:.4f}, {seconds:.1f} s', flush=True)
        if done == rounds or (before is not None and inter >= stop_DSC):
            break
        before, begin = mask, time.time()
    print(f'rounds used: {done}')
    return mask, probability


def print_volume(mask, geometry):
    """Print the size of the organ, and a warning where there is none."""
    voxels = np.count_nonzero(mask)
    if not voxels:
        print('warning: nothing found, the mask is empty; does the scan look, and lie, like those of the training?')
    ml = abs(np.linalg.det(geometry.affine[:3, :3])) / 1000 * voxels if known(geometry) else None
    print(f'volume: {voxels} voxels, ' + ('of unknown size' if ml is None else f'{ml:.1f} ml'))


if __name__ == '__main__':
    script.run(main)
