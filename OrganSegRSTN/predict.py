"""Predict the mask of a new scan (section 3.3, algorithm 1): coarse on three planes, then fine rounds until two agree.

    python predict.py INPUT OUTPUT.nii.gz SNAPSHOT_X SNAPSHOT_Y SNAPSHOT_Z [options]

INPUT is a NIfTI file, or a folder with one DICOM series. OUTPUT is a mask on INPUT's own grid (of a
DICOM series: columns, rows, slices). Several snapshots of a plane, separated by commas, are averaged:
x/FD0:XJ3_1.pkl,x/FD1:XJ3_1.pkl.

The snapshots hold intensity window, margin and orientation of their training; options that contradict
them are refused. For published snapshots, which hold nothing, a line says what is assumed.

A network knows its organ in arrays that lie as in training, so INPUT's axes are turned to lie so, and
the mask's axes back. INPUT without a position (no affine, or one of mere spacing) is taken as
conversion would store it.
"""

import argparse
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from running import arguments, script  # before packages: it names a missing one

# isort: split
import nibabel.orientations as axes
import numpy as np

from running.data_folder import PLANES
from running.results import start
from running.weights import description, load_weights, warn_of_spacing
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
    training = check_snapshots(snapshots, args.force)
    settings = plane_settings(args, training, snapshots[0][0], device)
    codes = training_orientation(args.orientation, training, snapshots[0][0])
    scan, header = read_input(args.INPUT)
    for doubt in intensity_doubts(scan.image, *settings.intensity_window):
        print(f'warning: {doubt}')
    there, back = turns(scan.geometry, codes)
    if known(scan.geometry):
        warn_of_spacing(scan.geometry.spacing[np.argsort(there[:, 0])], training.spacing)
    image, scan = np.ascontiguousarray(axes.apply_orientation(scan.image, there)), scan._replace(image=None)
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
        ('--rounds', 10, arguments.whole(0), 'fine rounds at most'),
        ('--stop_DSC', 0.99, arguments.number(0, 1), 'inter-iteration DSC at which two rounds agree'),
        ('--threshold', 0.5, arguments.number(0, 1), 'probability from which a voxel is organ'),
    ):
        parser.add_argument(name, default=default, type=kind, help=f'{text} (default {default})')
    parser.add_argument('--device', '--GPU_ID', dest='GPU_ID', default='0',
                        help='number of the CUDA device, or cpu (default 0)')  # fmt: skip
    for name, kind, text in (
        ('--low_range', arguments.number(), 'lower end of the intensity window (HU)'),
        ('--high_range', arguments.number(), 'upper end of the intensity window (HU)'),
        ('--margin', arguments.whole(0), "pixels around the organ's box"),
    ):
        parser.add_argument(name, type=kind, help=f'{text} (default: as the snapshots say)')
    parser.add_argument('--orientation', type=orientation, metavar='WHERE',
                        help="how training arrays lie: axis codes such as PLI, or a training case's geometry/CASE.json; "
                        f'{STORED}: do not turn anything (default: as the snapshots say)')  # fmt: skip
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
    """Refuse outputs that are not NIfTI names, cannot be written, or are INPUT itself, before any work is done."""
    outputs = [Path(path) for path in (args.OUTPUT, args.probability) if path]
    for path in outputs:
        if not is_nifti_name(path):
            raise ValueError(f'{path}: a mask is written as .nii.gz or .nii; name it so')
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f'{path}: cannot be written; name a file in a folder that you can write to')
    files = [os.path.realpath(path) for path in [args.INPUT, *outputs]]
    same = any(path.exists() and os.path.samefile(path, args.INPUT) for path in outputs if os.path.exists(args.INPUT))
    if same or len(set(files)) < len(files):
        raise ValueError(f'{args.OUTPUT}: INPUT, OUTPUT and --probability must be different files')


# --- snapshots -----------------------------------------------------------------------------------------------------


def split_snapshots(text):
    """Return the paths in a list separated by commas; the name of a snapshot's folder holds a comma, too."""
    return [Path(path.strip()) for path in re.split(r'(?<=\.pkl),|(?<=\.pth),', text)]


class Training(NamedTuple):
    """What all snapshots of a prediction must share; None where a snapshot does not say it."""

    width: int
    slice_thickness: int
    organ_ID: int | None = None
    crop_margin: int | None = None
    intensity_window: list | None = None  # HU
    orientation: str | None = None  # axis codes of the training arrays; '' where they had no position
    spacing: list | None = None  # mm


def check_snapshots(snapshots, force):
    """Return the Training of `snapshots` (a list of paths a plane); raise ValueError where they do not belong together."""
    paths = [path for paths in snapshots for path in paths]
    found = [read_training(path, plane, force) for plane, paths in zip(PLANES, snapshots) for path in paths]
    shared = {}
    for what, values in zip(Training._fields, zip(*found)):
        known_values = [(path, value) for path, value in zip(paths, values) if value is not None]
        for path, value in known_values:
            first, usual = known_values[0]
            if value != usual and what != 'spacing':
                raise ValueError(f'{path}: has {what} {value}, but {first} has {what} {usual}')
        shared[what] = known_values[0][1] if known_values else None
    return Training(**shared)


def read_training(path, plane, force):
    """Return the Training of a snapshot for a plane, from what it holds and from its name."""
    weights = load_weights(path)
    facts, name = description(weights), SNAPSHOT.fullmatch(path.name)
    own_plane = facts.get('plane') or (name and name['plane'])
    if own_plane not in (None, plane) and not force:
        raise ValueError(f'{path}: a snapshot of plane {own_plane} given for plane {plane} (or give --force)')
    if name and name['mode'] != 'J':
        print(f'warning: {path.name} is of mode {name["mode"]}; the training ends with mode J')
    try:
        sizes = len(weights['coarse_model.conv1_1.weight']), len(weights['saliency1.weight'])
    except KeyError as error:
        raise ValueError(f'{path}: not an RSTN snapshot, {error} is missing') from None
    organ_ID = facts.get('organ_ID', int(name['organ']) if name else None)
    orientation = facts.get('orientation', '') if facts else None
    return Training(*sizes, organ_ID, facts.get('crop_margin'), facts.get('intensity_window'), orientation,
                    facts.get('spacing'))  # fmt: skip


def plane_settings(args, training, snapshot, device):
    """Return the PlaneSettings: what the snapshots say; else what is asked; else what is assumed."""
    low, high = training.intensity_window or (None, None)
    window = (
        settle('--low_range', args.low_range, low, -100),
        settle('--high_range', args.high_range, high, 240),
    )
    if window[0] >= window[1]:
        raise ValueError(f'--high_range {window[1]:g} is not above --low_range {window[0]:g}')
    margin = settle('--margin', args.margin, training.crop_margin, named_margin(snapshot))
    return PlaneSettings(window, training.slice_thickness, margin, device, args.precision)


def settle(option, asked, trained, assumed):
    """Return the value of an option: the training's, else the asked one, else the assumed one; print where it is from."""
    if trained is None:
        if asked is None:
            print(f'{option}: the snapshots do not say; assumes {assumed:g}')
        return assumed if asked is None else asked
    if asked not in (None, trained):
        raise ValueError(f'{option} {asked:g}: the snapshots were trained with {trained:g}; leave the option out')
    print(f'{option}: {trained:g}, as the snapshots say')
    return trained


def named_margin(snapshot):
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


def training_orientation(asked, training, snapshot):
    """Return the axis codes of the arrays that a snapshot was trained on, or 'stored'; print how they are known."""
    codes, why = asked, 'as asked'
    if asked and asked.endswith('.json'):
        geometry = load_geometry(asked)
        if geometry is None:
            raise FileNotFoundError(f'{asked}: no such geometry')
        codes, why = axis_codes(geometry) or STORED, f'by {asked}'
    if training.orientation is not None:
        trained = training.orientation or STORED
        if codes not in (None, STORED, trained):
            raise ValueError(f'--orientation {asked}: the snapshots were trained on arrays that lie {trained}')
        codes, why = (codes, why) if codes else (trained, 'as the snapshots say')
    elif not asked:
        codes, why = folder_orientation(snapshot)
    print(f'training arrays: {codes} ({why})')
    return codes


def folder_orientation(snapshot):
    """Return (axis codes, how they are known) by geometry/ of the data folder of a snapshot; else NIH's."""
    *data, models, snapshots, _, _ = ['', '', *snapshot.absolute().parts]
    folder = Path(*data, 'geometry')
    files = sorted(folder.glob('*.json')) if (models, snapshots) == ('models', 'snapshots') else []
    if not files:
        return NIH, "assumed to be NIH's, see --orientation"
    found = Counter(axis_codes(load_geometry(file)) or STORED for file in files)
    codes, count = found.most_common(1)[0]
    return codes, f'as {count} of {len(files)} cases in {folder}'


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
