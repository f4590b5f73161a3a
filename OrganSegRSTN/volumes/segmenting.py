"""A mask for a new scan (section 3.3, algorithm 1): coarse on three planes, then fine rounds until two agree.

Snapshots hold intensity window, margin and orientation of their training; what contradicts them is
refused. For published snapshots, which hold nothing, a line says what is assumed. A network knows
its organ in arrays that lie as in training, so a scan's axes are turned to lie so, and the mask's
axes back.
"""

import functools
import itertools
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import nibabel.orientations as axes
import numpy as np
import torch

from running.arguments import PRECISIONS
from running.data_folder import PLANES, SNAPSHOT
from running.processes import pick_device, pick_precision, print_device, set_up_CUDA
from running.results import checksum
from running.weights import description, load_weights, spacing_doubt
from scans.geometry import PUBLISHED, Geometry, axis_codes, known, lays_out, load_geometry, what_it_holds
from scans.voxels import Volume, intensity_doubts
from volumes.calibration import calibration_file, print_trust
from volumes.planes import plane_weights
from volumes.starting import given, starts
from volumes.testing import PlaneSettings, PlaneTester, to_bytes
from volumes.trust import Watch, probe_shift

NIH = 'PLI'
STORED = 'stored'
NARROWEST = 20  # HU of an intensity window


def segment(image, affine, snapshots, rounds=10, stop_DSC=0.99, threshold=0.5, start=None, probes=0, **options):
    """Return (mask, probability, record) of the organ in a scan: what predict.py finds in a NIfTI file.

    image: (x, y, z) HU, axes as nibabel reads a NIfTI file. affine: (4, 4) from its index to RAS mm;
    None if unknown: then the axes are taken as conversion stores them. snapshots: for each of the
    planes X, Y, Z a path, or a list of paths whose mean counts; or Networks, to load them once for
    many scans. rounds: fine rounds at most; stop_DSC: inter-iteration DSC at which two rounds agree;
    threshold: probability from which a voxel is organ. start: mask of the image's shape that is round
    0, instead of the coarse networks' one. probes: of how many other starts round 1 is
    computed, too, see volumes.trust. options: those of Networks.

    mask: uint8, probability: float32, both of the image's shape. record: a dict for JSON, see
    segment_scan. Print the lines of predict.py; contextlib.redirect_stdout hides them. Raise
    ValueError or FileNotFoundError where something does not fit.
    """
    for name, value, most in (('rounds', rounds, np.inf), ('stop_DSC', stop_DSC, 1), ('threshold', threshold, 1)):
        if not 0 <= value <= most:
            raise ValueError(f'{name} {value}: a number from 0{f" to {most}" if most == 1 else ""} is expected')
    if isinstance(snapshots, Networks) and options:
        raise TypeError(f'{", ".join(options)}: for Networks, which are loaded already, not for segment')
    networks = snapshots if isinstance(snapshots, Networks) else Networks(snapshots, **options)
    image = np.asarray(image)
    affine = None if affine is None else np.asarray(affine, float)
    if image.ndim != 3 or not image.size or image.dtype.kind not in 'biuf':
        raise ValueError(f'image {image.shape} of {image.dtype}: a volume (x, y, z) of numbers in HU is expected')
    if affine is not None and not (affine.shape == (4, 4) and lays_out(affine)):
        raise ValueError(f'affine {affine.tolist()}: (4, 4) that gives every voxel a place is expected; None: unknown')
    geometry = Geometry(np.eye(4) if affine is None else affine, 'nothing' if affine is None else what_it_holds(affine),
                        'image', 'array')  # fmt: skip
    marks = np.unique(start) if np.shape(start) == image.shape else ()
    if start is not None and (not len(marks) or marks[0] < 0 or np.count_nonzero(marks) != 1):
        raise ValueError(
            f'start {np.shape(start)}: a mask of the image, {image.shape}, of 0 and one other value is expected'
        )
    planes = (image[..., k] for k in range(image.shape[2]))
    scan = Volume(image.shape, planes, geometry).image(print)
    start = None if start is None else (np.asarray(start) > 0).transpose(PUBLISHED)
    mask, probability, record = segment_scan(scan, networks, rounds, stop_DSC, threshold, start, probes)
    return mask.transpose(PUBLISHED), probability.transpose(PUBLISHED), record


def segment_scan(scan, networks, rounds, stop_DSC, threshold, start=None, probes=0, explain=None):
    """Return (mask uint8, probability float32, record) of a Scan, both (W, H, L) as the scan is stored.

    record: organ_ID, snapshots and settings; voxels and ml of the mask (None: voxels of unknown
    size); rounds used and their last agreement, an inter-iteration DSC (None: no fine round), both
    also by round; start: what round 0 is; signals, see volumes.trust; trust: the figures of
    print_trust; warnings.

    start: mask of the scan's shape, round 0; explain: called with (image, networks, mask, probability)
    of round 0, which lie as in training, and their spacing (mm, or None).
    """
    warnings = []

    def warn(text):
        print(f'warning: {text}', flush=True)
        warnings.append(text)

    for doubt in intensity_doubts(scan.image, *networks.settings.intensity_window):
        warn(doubt)
    if networks.training.orientation == '' and axis_codes(scan.geometry):
        warn('the training arrays had no position in the patient: the mask is right only if this scan lies as they did')
    there, back = turns(scan.geometry, networks.orientation)
    spacing = None
    if known(scan.geometry):
        spacing = scan.geometry.spacing[np.argsort(there[:, 0])]
        doubt = spacing_doubt(spacing, networks.training.spacing)
        if doubt:
            warn(doubt)
    image = np.ascontiguousarray(axes.apply_orientation(scan.image, there))
    start = None if start is None else given(np.ascontiguousarray(axes.apply_orientation(start, there)))
    explain = explain and functools.partial(explain, spacing=spacing)
    weights = plane_weights(networks.training.recipe, spacing if networks.training.spacing else None)  # as in testing
    mask, probability, found = find(image, networks, rounds, stop_DSC, threshold, start, probes, explain, warn, weights)
    if not mask.any():
        warn('nothing found, the mask is empty; does the scan look, and lie, like those of the training?')
    ml = scan.geometry.voxel_ml * found['voxels'] if known(scan.geometry) else None
    print(f'volume: {found["voxels"]} voxels, ' + ('of unknown size' if ml is None else f'{ml:.1f} ml'))
    settings = {'threshold': threshold, 'stop_DSC': stop_DSC}
    trust = print_trust(
        found['signals'], networks.calibration_file(), lambda: networks.checksums, settings, found['start']
    )
    record = networks.record() | found | {'ml': ml, 'trust': trust, 'warnings': warnings}
    return axes.apply_orientation(mask, back), axes.apply_orientation(probability, back), record


def find(image, networks, rounds, stop_DSC, threshold, start=None, probes=0, explain=None, warn=print, weights=None):
    """Return (mask uint8, probability float32, record) of `image` (W, H, L) HU, which lies as in training.

    start: (mask, probability) of round 0. Without it, and if the rounds find nothing, they are tried
    again from other starts, see volumes.starting. weights: of the planes.
    """
    begin = time.time()
    volumes = []
    for tester in networks.coarse if start is None else ():
        volumes.append(to_bytes(tester.predict(image)))
        networks.release(tester)
    tried = iter([(*start, '')] if start else starts(volumes, threshold, networks.training.place, weights))
    if not rounds:  # a box or a low threshold must not be the mask
        tried = itertools.islice(tried, 1)
    for *first, remark in tried:
        if remark:
            print(f'nothing found; tries again: {remark}', flush=True)
        if explain and first[0].any():
            explain(image, networks, *first)
        watch = Watch(threshold, probes, probe_shift(networks.settings.margin), weights)
        name = 'start' if start or remark else 'coarse'
        mask, score = run_rounds(watch, first, name, volumes, networks.fine, image, rounds, stop_DSC, begin)
        if mask.any():
            break
        begin = time.time()
    if remark and mask.any():
        warn(f'found only with {remark}: look at this scan')
    if not mask.any() and not start and not networks.training.place:
        warn('the snapshots do not say where the training cases have the organ, so it is not looked for there')
    networks.release(*networks.fine)
    signals = watch.record()
    voxels = [values['voxels'] for values in signals['rounds']]
    inter = [values['inter_iteration'] for values in signals['rounds'][1:]]
    found = {'voxels': voxels[-1], 'rounds': len(inter), 'agreement': inter[-1] if inter else None}
    found |= {
        'start': remark or ('given' if start else 'coarse'),
        'voxels_by_round': voxels,
        'inter_iteration_DSC': inter,
        'signals': signals,
    }
    return mask, score, found


def run_rounds(watch, start, name, volumes, fine, image, rounds, stop_DSC, begin):
    """Run the rounds from `start` until two agree or `rounds` are done, and print a line for each.

    Return (mask, probability) of the last one. name: of round 0, coarse or start; the others: see find.
    """
    done = watch.rounds
    for mask, score in watch.coarse_to_fine(volumes, fine, image, start):
        text = f'round {len(done) - 1}' if len(done) > 1 else name
        text += f': {done[-1]["voxels"]} voxels'
        inter = done[-1].get('inter_iteration')
        text += '' if inter is None else f', inter-iteration DSC = {inter:.4f}'
        print(f'{text}, {time.time() - begin:.1f} s', flush=True)
        if len(done) > rounds or (inter is not None and inter >= stop_DSC):
            break
        begin = time.time()
    print(f'rounds used: {len(done) - 1}')
    return mask, score


class Networks:
    """The networks of one organ, and what their snapshots say of the training.

    snapshots: for each of the planes X, Y, Z a path, or a list of paths whose mean counts. device:
    number of the CUDA device, or cpu. low_range and high_range (HU), margin (pixels), orientation
    (axis codes such as PLI, a geometry/CASE.json, or 'stored'): of snapshots that do not hold them.
    precision: as --precision. force: take a snapshot although its name is of another plane. keep: keep
    the networks in memory for the next scan.
    """

    def __init__(self, snapshots, device='0', low_range=None, high_range=None, margin=None, orientation=None,
                 precision='fp32', force=False, keep=True):  # fmt: skip
        if orientation and not is_orientation(orientation):
            raise ValueError(f'orientation {orientation!r}: neither axis codes such as {NIH} nor a .json file')
        if precision not in PRECISIONS:
            raise ValueError(f'precision {precision!r}: one of {", ".join(PRECISIONS)} is expected')
        paths = [[paths] if isinstance(paths, str | Path) else paths for paths in snapshots]
        self.paths = [[Path(path) for path in plane] for plane in paths]
        if len(self.paths) != len(PLANES) or not all(self.paths):
            raise ValueError(f'snapshots of {len(self.paths)} planes: those of X, Y and Z are needed')
        self.training = check_snapshots(self.paths, force)
        first = self.paths[0][0]
        if not isinstance(device, torch.device):
            GPU_ID = str(device)
            device = pick_device(GPU_ID)
            print_device(device, GPU_ID)
        precision = pick_precision(precision, device)
        if device.type == 'cuda':
            set_up_CUDA(precision, seed=None)
        self.settings = plane_settings(self.training, first, device, low_range, high_range, margin, precision)
        self.orientation = training_orientation(orientation, self.training, first)
        self.coarse, self.fine = (
            [PlaneTester(plane, paths, TEST, self.settings) for plane, paths in zip(PLANES, self.paths)]
            for TEST in 'CF'
        )
        self.keep = keep

    @functools.cached_property
    def checksums(self):
        """Return the SHA-256 of each snapshot."""
        return [checksum(path) for paths in self.paths for path in paths]

    def calibration_file(self):
        """Return the path of what report.py writes beside the first snapshot, see volumes.calibration."""
        return calibration_file(self.paths[0][0].parent, self.settings.thickness, self.training.organ_ID)

    def release(self, *testers):
        """Free the memory of these testers' networks, unless they are kept."""
        for tester in () if self.keep else testers:
            tester.release()

    def record(self):
        """Return what a mask depends on beside its scan."""
        low, high = self.settings.intensity_window
        settings = {'low_range': low, 'high_range': high, 'margin': self.settings.margin}
        settings |= {'recipe': 'fast'} if self.training.recipe == 'fast' else {}
        return {
            'organ_ID': self.training.organ_ID,
            'snapshots': [[path.name for path in plane] for plane in self.paths],
            'settings': settings | {'precision': self.settings.precision, 'orientation': self.orientation},
        }


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
    place: list | None = None  # of the organ, in shares of the volume
    recipe: str | None = None


def check_snapshots(snapshots, force):
    """Return the Training of `snapshots` (a list of paths a plane); raise ValueError where they do not belong together."""
    paths = [path for paths in snapshots for path in paths]
    found = [read_training(path, plane, force) for plane, paths in zip(PLANES, snapshots) for path in paths]
    shared = {}
    for what, values in zip(Training._fields, zip(*found)):
        known_values = [(path, value) for path, value in zip(paths, values) if value is not None]
        for path, value in known_values:
            first, usual = known_values[0]
            if value != usual and what not in ('spacing', 'place'):
                raise ValueError(f'{path}: has {what} {value}, but {first} has {what} {usual}')
        shared[what] = known_values[0][1] if known_values else None
    return Training(**shared)


def read_training(path, plane, force):
    """Return the Training of a snapshot for a plane, from what it holds and from its name."""
    weights = load_weights(path)
    facts, name = description(weights), SNAPSHOT.fullmatch(path.name)
    organ_ID, own_plane = whose(path, facts)
    if own_plane not in (None, plane) and not force:
        raise ValueError(f'{path}: a snapshot of plane {own_plane} given for plane {plane} (or give --force)')
    if name and name['mode'] != 'J':
        print(f'warning: {path.name} is of mode {name["mode"]}; the training ends with mode J')
    try:
        sizes = len(weights['coarse_model.conv1_1.weight']), len(weights['saliency1.weight'])
    except KeyError as error:
        raise ValueError(f'{path}: not an RSTN snapshot, {error} is missing') from None
    orientation = facts.get('orientation', '') if facts else None
    return Training(*sizes, organ_ID, facts.get('crop_margin'), facts.get('intensity_window'), orientation,
                    facts.get('spacing'), facts.get('place'), facts.get('recipe'))  # fmt: skip


def whose(path, facts):
    """Return (organ_ID, plane) of a snapshot that holds these facts, else by its name; None is unknown."""
    name = SNAPSHOT.fullmatch(path.name)
    return facts.get('organ_ID', int(name['organ']) if name else None), facts.get('plane', name and name['plane'])


def organ_snapshots(words):
    """Return {organ_ID: [paths of X, of Y, of Z]} of folders of snapshots, and of snapshots as texts.

    A text is one snapshot, or several of a plane, separated by commas, whose mean counts.
    """
    found = {}
    for word in words:
        for paths in folder_snapshots(Path(word)) if Path(word).is_dir() else [split_snapshots(word)]:
            organ, plane = whose(paths[0], description(load_weights(paths[0])))
            if None in (organ, plane):
                raise ValueError(
                    f'{paths[0]}: neither it nor its name says its organ and plane; name it as FD0:XJ3_1.pkl'
                )
            planes = found.setdefault(organ, {})
            if plane in planes:
                raise ValueError(
                    f'{paths[0]}: organ {organ}, plane {plane} is given already: {planes[plane][0]}; separate '
                    'snapshots by a comma to average them; organs need different numbers'
                )
            planes[plane] = paths
    for organ, planes in found.items():
        if missing := set(PLANES) - set(planes):
            raise ValueError(f'organ {organ}: no snapshot of plane {", ".join(sorted(missing))}')
    return {organ: [found[organ][plane] for plane in PLANES] for organ in sorted(found)}


def folder_snapshots(folder):
    """Return [paths a fold] for each organ and plane of a folder of snapshots of mode J: of the newest training.

    A training without a timestamp goes before all others, as in testing.
    """
    found = {}  # {(organ, fold): {timestamp: {plane: path}}}
    for path in sorted(folder.glob('*.pkl')):
        if (name := SNAPSHOT.fullmatch(path.name)) and name['mode'] == 'J':
            trainings = found.setdefault((int(name['organ']), int(name['fold'])), {})
            trainings.setdefault(name['time'] or '', {})[name['plane']] = path
    groups = {}
    for (organ, fold), trainings in found.items():
        whole = [time for time, planes in trainings.items() if len(planes) == len(PLANES)]
        if not whole:
            raise ValueError(
                f'{folder}: no training of all three planes of organ {organ}, fold {fold}; train the others, or give the '
                'snapshots of each organ, separated by commas'
            )
        chosen = '' if '' in whole else max(whole)
        print(f'organ {organ}, fold {fold}: the training {chosen or "without a timestamp"} in {folder}')
        for plane, path in trainings[chosen].items():
            groups.setdefault((organ, plane), []).append(path)
    if not groups:
        raise FileNotFoundError(f'{folder}: no snapshots of mode J in it, such as FD0:XJ3_1.pkl')
    return list(groups.values())


def plane_settings(training, snapshot, device, low_range, high_range, margin, precision):
    """Return the PlaneSettings: what the snapshots say; else what is asked; else what is assumed."""
    low, high = training.intensity_window or (None, None)
    window = (settle('--low_range', low_range, low, -100), settle('--high_range', high_range, high, 240))
    if window[0] >= window[1]:
        raise ValueError(f'--high_range {window[1]:g} is not above --low_range {window[0]:g}')
    if window[1] - window[0] < NARROWEST:
        raise ValueError(
            f'intensity window {window[0]:g} to {window[1]:g}: scans are read as whole HU, of which it holds too few; train '
            'on arrays in HU, or multiplied by 1000'
        )
    margin = settle('--margin', margin, training.crop_margin, named_margin(snapshot))
    return PlaneSettings(window, training.slice_thickness, margin, device, precision)


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


# --- how arrays lie ------------------------------------------------------------------------------------------------


def is_orientation(text):
    """Return whether a text is axis codes, a geometry file, or 'stored'."""
    codes = len(text) == 3 and all(sum(code in pair for code in text) == 1 for pair in ('LR', 'AP', 'SI'))
    return codes or text == STORED or text.endswith('.json')


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
        if codes != trained and asked != STORED:  # not asked, or a geometry file without axes
            codes, why = trained, 'as the snapshots say'
    elif not asked:
        codes, why = folder_orientation(snapshot)
    print(f'training arrays: {codes} ({why})', flush=True)
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
