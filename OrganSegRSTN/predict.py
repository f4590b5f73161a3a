"""A mask for a new scan (section 3.3, algorithm 1): coarse on three planes, then fine rounds until two agree. Usage:

    python predict.py INPUT OUTPUT.nii.gz SNAPSHOT_X SNAPSHOT_Y SNAPSHOT_Z [options]

INPUT is a NIfTI file, or a folder with one DICOM series; OUTPUT a mask on INPUT's own grid (of a DICOM series: columns,
rows, slices). Several snapshots of a plane, separated by commas, are averaged: x/FD0:XJ3_1.pkl,x/FD1:XJ3_1.pkl.

A network knows its organ in arrays that lie as in training. INPUT's axes are turned to lie so, and the mask's back.
How training arrays lie is told by --orientation; else by geometry/ of the data folder that the first snapshot lies in;
else they are taken to be NIH's: PLI, that is, rows run to the back, columns to the left, slices downwards. INPUT that
does not say where it lies (no affine, or one of mere spacing) is seen as conversion would store it.
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

from model import load_RSTN
from running import arguments, script
from running.data_folder import PLANES
from running.results import start
from running.weights import load_weights
from scans.dicom import is_slice, modality, read_series, series_folders
from scans.geometry import PUBLISHED, axis_codes, known, load_geometry
from scans.nifti import affine_header, grid_header, is_nifti_name, read_nifti_image, write_nifti
from scans.voxels import intensity_doubts
from volumes.rounds import agreement, coarse_probability, fine_rounds
from volumes.testing import predict_volume, to_bytes

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
    look = Look(snapshots, thickness, margin, (args.low_range, args.high_range), device, args.precision)
    mask, probability = segment(image, look, args.rounds, args.stop_DSC, args.threshold)
    print_volume(mask, scan.geometry)
    for path, volume in ((args.OUTPUT, mask), (args.probability, probability)):
        if path:
            write_nifti(path, axes.apply_orientation(volume, back).transpose(PUBLISHED), header)
            print(f'written: {path}')


# --- arguments -----------------------------------------------------------------------------------------------------


def parse(argv=None):
    """The arguments; see the top of this file."""
    made = arguments.Parser(__doc__)
    made.add_argument('INPUT', help='NIfTI file, or folder with one DICOM series')
    made.add_argument('OUTPUT', help='mask to write, .nii.gz or .nii')
    for plane in PLANES:
        made.add_argument(f'SNAPSHOT_{plane}', help=f'snapshot of plane {plane}, or several separated by commas')
    for name, default, kind, text in (
        ('--low_range', -100, arguments.number(), 'lower end of the intensity window of the training (HU)'),
        ('--high_range', 240, arguments.number(), 'its upper end'),
        ('--rounds', 10, arguments.whole(0), 'fine rounds at most'),
        ('--stop_DSC', 0.99, arguments.number(0, 1), 'inter-iteration DSC at which two rounds agree'),
        ('--threshold', 0.5, arguments.number(0, 1), 'probability from which a voxel is organ'),
    ):
        made.add_argument(name, default=default, type=kind, help=f'{text} (default {default})')
    made.add_argument('--device', '--GPU_ID', dest='GPU_ID', default='0',
                      help='number of the CUDA device, or cpu (default 0)')  # fmt: skip
    made.add_argument('--margin', type=arguments.whole(0),
                      help="pixels around the organ's box (default: what the snapshot's folder is named for, else 20)")  # fmt: skip
    made.add_argument('--orientation', type=orientation, metavar='WHERE',
                      help="how training arrays lie: axis codes such as PLI, or a training case's geometry/CASE.json; "
                      f'{STORED}: do not turn anything')  # fmt: skip
    made.add_argument('--probability', metavar='FILE', help='write the mean probability, too (float32 .nii.gz)')
    arguments.add_precision(made)
    made.add_argument('--force', action='store_true', help='take a snapshot although its name tells another plane')
    return arguments.parse(made, argv)


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
    """The paths in a list separated by commas; the folder of a snapshot has a comma in its name, too."""
    return [Path(path) for path in re.split(r'(?<=\.pkl),|(?<=\.pth),', text)]


class Kind(NamedTuple):
    """What all snapshots of a prediction must share; the organ is None where the name does not tell it."""

    width: int
    thickness: int
    organ: str | None


def check_snapshots(snapshots, force):
    """Thickness of the networks in `snapshots` (a list of paths a plane); ValueError where they do not belong together."""
    paths = [path for paths in snapshots for path in paths]
    kinds = [snapshot_kind(path, plane, force) for plane, paths in zip(PLANES, snapshots) for path in paths]
    for what, values in zip(Kind._fields, zip(*kinds)):
        told = [(path, value) for path, value in zip(paths, values) if value is not None]
        for path, value in told:
            if value != told[0][1]:
                raise ValueError(f'{path}: of {what} {value}, where {told[0][0]} is of {what} {told[0][1]}')
    return kinds[0].thickness


def snapshot_kind(path, plane, force):
    """The Kind of a snapshot for a plane, from its name and its weights."""
    weights = load_weights(path)
    name = SNAPSHOT.fullmatch(path.name)
    if name and name['plane'] != plane and not force:
        raise ValueError(
            f'{path}: a snapshot of plane {name["plane"]} where that of plane {plane} belongs (or --force)'
        )
    if name and name['mode'] != 'J':
        print(f'warning: {path.name} is of mode {name["mode"]}; the training ends with mode J')
    try:
        sizes = len(weights['coarse_model.conv1_1.weight']), len(weights['saliency1.weight'])
    except KeyError as error:
        raise ValueError(f'{path}: not an RSTN snapshot, {error} is missing') from None
    return Kind(*sizes, name and name['organ'])


def find_margin(snapshot):
    """The margin that a snapshot was trained with: SIJ_training_1e-5x10,20 is the folder of margin 20."""
    named = re.fullmatch(r'SIJ_training_.*,(\d+)', snapshot.absolute().parent.name)
    return int(named[1]) if named else 20


# --- the scan and its axes -----------------------------------------------------------------------------------------


def read_input(path):
    """(Scan as conversion stores it, header of a NIfTI file on the input's grid)."""
    if os.path.isdir(path):
        folder = series_folder(path)
        scan = read_series(folder, say=print)
        return scan, affine_header(scan.geometry and scan.geometry.transposed())
    if not is_nifti_name(path):
        raise ValueError(f'{path}: neither a NIfTI file (.nii, .nii.gz) nor a folder with a DICOM series')
    return read_nifti_image(path), grid_header(path)


def series_folder(path):
    """The one folder at or below `path` that holds a DICOM series; a line warns where that is not CT."""
    folders = [folder for folder, holds_slices in series_folders(path) if holds_slices]
    if len(folders) != 1:
        raise ValueError(f'{path}: {len(folders) or "no"} folders with DICOM slices in it; name the one of the series')
    first = next(file for file in sorted(folders[0].iterdir()) if is_slice(file))
    if (kind := modality(first)) not in ('', 'CT'):
        print(f'warning: {folders[0]}: its modality is {kind}, not CT')
    return folders[0]


def training_orientation(told, snapshot):
    """Axis codes of the arrays that a snapshot was trained on, or 'stored'; says in a line how that is known."""
    codes, why = told, 'as asked'
    if told and told.endswith('.json'):
        geometry = load_geometry(told)
        if geometry is None:
            raise FileNotFoundError(f'{told}: no such geometry')
        codes, why = axis_codes(geometry) or STORED, f'as {told} says'
    elif not told:
        *data, models, snapshots, _, _ = ['', '', *snapshot.absolute().parts]
        folder = Path(*data, 'geometry')
        files = sorted(folder.glob('*.json')) if (models, snapshots) == ('models', 'snapshots') else []
        codes, why = NIH, "taken to be as NIH's, see --orientation"
        if files:
            found = Counter(axis_codes(load_geometry(file)) or STORED for file in files)
            codes, count = found.most_common(1)[0]
            why = f'as {count} of {len(files)} cases in {folder}'
    print(f'training arrays: {codes} ({why})')
    return codes


def turns(geometry, codes):
    """nibabel orientations that turn an array of this Geometry to lie as `codes` say, and back."""
    ours = axis_codes(geometry)
    if codes == STORED:
        print('input: its axes are taken as conversion stores them')
    elif not ours:
        print('input: it does not say how it lies: its axes are taken as conversion stores them, transpose(1, 0, 2)')
    else:
        print(f'input: lies {ours} as stored, {"turned" if ours != codes else "not turned"}')
    if codes == STORED or not ours:
        ours = codes = NIH
    ours, theirs = (axes.axcodes2ornt(one) for one in (ours, codes))
    return axes.ornt_transform(ours, theirs), axes.ornt_transform(theirs, ours)


# --- the prediction ------------------------------------------------------------------------------------------------


class Look:
    """The networks of three planes. Only those in use are in memory: of one snapshot a plane the fine ones stay,
    of several each is read when its turn comes.
    """

    def __init__(self, snapshots, thickness, margin, window, device, precision):
        self.snapshots, self.thickness, self.margin = snapshots, thickness, margin
        self.window, self.device, self.precision = window, device, precision
        self.kept = {}

    def coarse(self, image):
        """Coarse probability of `image` (W, H, L) HU, stored and averaged as coarse testing does."""
        planes = [to_bytes(self.plane('C', i, image)) for i in range(len(PLANES))]
        self.kept.clear()
        return coarse_probability(planes)

    def predict(self, image, score, mask):
        """Fine probability, given that of the previous round and its mask."""
        planes = [self.plane('F', i, image, score=score, mask=mask) for i in range(len(PLANES))]
        return sum(planes) / np.float32(len(planes))

    def plane(self, TEST, i, image, **volumes):
        """Mean probability of a plane's networks."""
        paths = self.snapshots[i]
        total = 0
        for path in paths:
            net = self.kept.get(i) or load_RSTN(path, TEST, self.thickness, self.margin, self.device, self.precision)
            if len(paths) == 1:
                self.kept[i] = net
            total = total + predict_volume(net, image, PLANES[i], self.window, self.thickness, self.device, **volumes)
        return total / np.float32(len(paths))


def segment(image, look, rounds, stop_DSC, threshold):
    """(mask uint8, probability float32) of `image` (W, H, L) HU after the last round that was needed."""
    start = time.time()
    score = look.coarse(image)
    mask = (score >= threshold).astype(np.uint8)
    print(f'coarse: {np.count_nonzero(mask)} voxels, {time.time() - start:.1f} s', flush=True)
    done, start = 0, time.time()
    looks = fine_rounds([look], image, score, mask, threshold, organ_ID=1)
    for done, (probability, after) in zip(range(1, rounds + 1), looks):
        inter, mask, score = agreement(mask, after), after, probability
        print(f'round {done}: {inter.pred} voxels, inter-iteration DSC = {inter.value:.4f}, '
              f'{time.time() - start:.1f} s', flush=True)  # fmt: skip
        if inter.value >= stop_DSC:
            break
        start = time.time()
    print(f'rounds used: {done}')
    return mask, score


def print_volume(mask, geometry):
    """Say how large the organ is, and warn where there is none."""
    voxels = np.count_nonzero(mask)
    if not voxels:
        print(
            'warning: nothing found, the mask is empty; is it a scan like those of the training, and turned like them?'
        )
    ml = abs(np.linalg.det(geometry.affine[:3, :3])) / 1000 * voxels if known(geometry) else None
    print(f'volume: {voxels} voxels, ' + ('of unknown size' if ml is None else f'{ml:.1f} ml'))


if __name__ == '__main__':
    script.run(main)
