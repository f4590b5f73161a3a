"""The training set of a plane: the active slices of a fold's training cases (section 4.1)."""

import math
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from running.data_folder import (
    Slice,
    changed_since_init,
    plane_view,
    print_once,
    read_cases,
    read_list,
    rule_changed_since_init,
    slice_list,
)
from running.files import array_shape, load_array
from running.processes import send
from running.results import Checksums, revision
from running.weights import seen_cases
from scans.geometry import axis_codes, geometry_file, known, load_geometry
from utils import for_device, is_organ, to_unit

# how far `varied` goes at most: degrees; the logarithm of scales; contrast, and half as much brightness
TURN, SCALE, STRETCH, CONTRAST = 15, 0.2, 0.1, 0.3
SHIFT = 0.15  # of a whole slice, in shares of its sides, at most: other scans end elsewhere


class DataLayer(Dataset):
    """Samples (image (3, A, B) float32 in [0, 1], label (slice_thickness, A, B) float32 of 0 and 1).

    With further organs `others` the label has their slices, too: (slice_thickness x organs, A, B).
    """

    def __init__(self, data_path, current_fold, organ_number, low_range, high_range, slice_threshold, slice_thickness,
                 organ_ID, plane, others=()):  # fmt: skip
        self.data_path, self.organ_ID, self.others = data_path, organ_ID, others
        self.intensity_window, self.thickness = (low_range, high_range), slice_thickness
        path = slice_list(data_path, plane)
        self.slices = read_slices(path)
        if any(len(record.organs) < organ_ID for record in self.slices):
            raise ValueError(f'{path}: holds no organ {organ_ID}; run init.py with organ_number {organ_number}')
        cases = read_cases(data_path, 'training', current_fold)
        training = {case.number for case in cases}
        self.check_end(path, training)
        self.check_numbers(path, cases)
        if rule_changed_since_init(data_path):
            print_once(f'warning: {path}: is_organ (utils.py) was another one when init.py wrote it; run init.py again')
        for case in cases:
            self.compare_slices(case, plane)
        pixels = [record.organs[organ_ID - 1][0] for record in self.slices]
        bar = slice_bar(pixels, slice_threshold)
        self.active = [i for i, record in enumerate(self.slices) if pixels[i] >= bar and record.case in training]
        if not self.active:
            raise ValueError(
                f'{path}: no slice of fold {current_fold} to train on has {bar} pixels or more of organ {organ_ID}; '
                'lower slice_threshold or look at the labels'
            )

    def check_end(self, path, cases):
        """Raise ValueError where the list of slices was cut off: it ends before its last case, or before one of `cases`."""
        last = self.slices[-1]
        beyond = os.path.join(os.path.dirname(last.image_file), f'{last.index + 1:04d}.npy')
        if last.case < max(cases) or os.path.exists(os.path.join(self.data_path, beyond)):
            raise ValueError(
                f'{path}: ends with slice {last.index} of case {last.case}, but there are more; run init.py again'
            )

    def check_numbers(self, path, cases):
        """Raise ValueError where a case has another number in the list of the fold than in that of the slices."""
        names = {record.case: Path(record.image_file).parent.name for record in self.slices}
        for case in cases:
            if names[case.number] != Path(case.image_file).stem:
                raise ValueError(
                    f'{path}: case {case.number} is {names[case.number]}, but {case.image_file} in the list of the '
                    'fold; correct its number there, or run init.py again'
                )

    def compare_slices(self, case, plane):
        """Print a warning where the slices of a case are not those of its volumes, of which init.py made them."""
        for kind in ('image_file', 'label_file'):
            file = getattr(case, kind)
            if changed_since_init(self.data_path, file):  # or copied
                volume = plane_view(load_array(os.path.join(self.data_path, file)), plane)
                slices = [getattr(record, kind) for record in self.slices if record.case == case.number]
                if len(slices) != len(volume) or not np.array_equal(self.stack(slices), volume):
                    print_once(f'warning: {file}: has changed since init.py sliced it; run init.py again')

    def __len__(self):
        return len(self.active)

    def __getitem__(self, index):
        return self.on_device('cpu', *self.stored(index))

    def stored(self, index):
        """Return a sample as it travels to a device: image HU, int16, uint8 or bool as stored, else float32; label uint8."""
        records = self.window_of(self.active[index])
        image = self.stack([record.image_file for record in records])
        label = self.stack([record.label_file for record in records[: self.thickness]])
        if image.shape[1:] != label.shape[1:]:
            raise ValueError(
                f'{records[1].label_file}: shape {label.shape[1:]}, its image {image.shape[1:]}; run init.py again'
            )
        label = np.concatenate([is_organ(label, organ) for organ in (self.organ_ID, *self.others)]).astype(np.uint8)
        return torch.from_numpy(for_device(image)), torch.from_numpy(label)

    def on_device(self, device, image, label):
        """Return a stored sample on a device: float32, the image in [0, 1]."""
        return self.unit_on(device, image), send(label, device).float()  # converted there

    def unit_on(self, device, image):
        """Return the stored image of a sample, or of a batch, on a device: float32 in [0, 1]."""
        return to_unit(send(image, device), *self.intensity_window)

    def stack(self, files):
        """Return the slices in these files, (n, A, B)."""
        slices = [load_array(os.path.join(self.data_path, file)) for file in files]
        for file, found in zip(files, slices):
            if found.ndim != 2 or found.shape != slices[0].shape:
                raise ValueError(f'{file}: shape {found.shape}, its neighbour {slices[0].shape}; run init.py again')
        return np.stack(slices)

    def window_of(self, i):
        """Return the three records of the slice window at slice i; slice i itself stands in beyond an end of its case."""
        case, reach = self.slices[i].case, self.thickness // 2
        before, after = max(i - reach, 0), min(i + reach, len(self.slices) - 1)
        return [self.slices[k] if self.slices[k].case == case else self.slices[i] for k in (before, i, after)]


class StoredSlices(DataLayer):
    """The samples of DataLayer.stored."""

    def __getitem__(self, index):
        return self.stored(index)


def read_slices(path):
    """Return the records of a list of slices: of case 0, 1, ... each slice from 0."""
    lines = read_list(path)
    try:
        slices = [Slice.read(line) for line in lines]
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if not slices:
        raise ValueError(f'{path}: holds no slice; run init.py again')
    places = [(record.case, record.index) for record in slices]
    for (case, index), place in zip([(-1, 0), *places], places):
        if place not in ((case, index + 1), (case + 1, 0)):
            raise ValueError(f'{path}: slice {place[1]} of case {place[0]} is out of place; run init.py again')
    return slices


def slice_bar(pixels, slice_threshold):
    """Return the number of organ pixels from which a slice is active.

    pixels: the counts of all slices. A slice_threshold above 1 is the bar itself; up to 1, that share of the slices
    with the organ, the fullest first, reaches the bar (all slices for 0).
    """
    if slice_threshold > 1:
        return slice_threshold
    if slice_threshold == 0:
        return 0
    present = sum(count > 0 for count in pixels)
    last = max(math.floor(present * slice_threshold), 1)
    return max(sorted(pixels)[-last], 1)


def training_facts(args, origin, **facts):
    """Return the facts to store with weights that are trained with these arguments (see running.weights.FACTS).

    origin: the facts of the weights that the training starts from.
    """
    cases = read_cases(args.data_path, 'training', args.current_fold)
    seen = dict.fromkeys([*image_checksums(args, cases), *origin.get('cases', ())])
    return (
        facts
        | geometry_facts(args.data_path, cases)
        | place_fact(args, cases)
        | {
            'organ_ID': args.organ_ID,
            'slice_thickness': args.slice_thickness,
            'crop_margin': args.crop_margin,
            'intensity_window': [args.low_range, args.high_range],
            'cases': list(seen),
            'revision': revision(),
        }
    )


def geometry_facts(data_path, cases):
    """Return orientation (axis codes) and spacing (mm) of most of these cases, as far as geometry/ says."""
    geometries = [load_geometry(geometry_file(data_path, Path(case.image_file).stem)) for case in cases]
    codes = Counter(filter(None, map(axis_codes, geometries)))
    spacings = [geometry.spacing for geometry in geometries if known(geometry)]
    facts = {'orientation': codes.most_common(1)[0][0]} if codes else {}
    return facts | ({'spacing': np.median(spacings, axis=0).tolist()} if spacings else {})


def place_fact(args, cases):
    """Return {'place': box (a0, a1, b0, b1, c0, c1) of the organ in these cases}, the median, in shares of the volume.

    It is {} where the list of plane X is missing or no case has the organ.
    """
    path, by_number = slice_list(args.data_path, 'X'), {case.number: case for case in cases}
    if not path.exists():
        return {}
    boxes = {}
    for record in read_slices(path):
        pixels, *ends = record.organs[args.organ_ID - 1]
        if pixels and record.case in by_number:
            boxes.setdefault(record.case, []).append((record.index, *ends))
    shares = []
    for number, slices in boxes.items():
        a, b0, b1, c0, c1 = np.transpose(slices)
        box = [a.min(), a.max() + 1, b0.min(), b1.max() + 1, c0.min(), c1.max() + 1]
        shape = array_shape(Path(args.data_path, by_number[number].image_file))
        shares.append(np.divide(box, np.repeat(shape, 2)))
    return {'place': np.median(shares, axis=0).tolist()} if shares else {}


def refuse_seen_cases(args, path, origin):
    """Raise ValueError where weights, by their facts, have seen a test case of this fold."""
    cases = read_cases(args.data_path, 'testing', args.current_fold)
    for scan in seen_cases(origin, image_checksums(args, cases)):
        raise ValueError(
            f'{path}: was trained on {scan}, a test case of fold {args.current_fold}; run pretrain.py for this fold'
        )


def image_checksums(args, cases):
    """Return `images/0001.npy SHA-256` of each case, which tells whether two data folders hold the same scans."""
    checksum = Checksums(args.data_path)
    found = [f'{case.image_file} {checksum(Path(args.data_path, case.image_file))}' for case in cases]
    checksum.save()
    return found


def load_slices(args, plane, others=()):
    """Return the training set of a plane, as stored."""
    return StoredSlices(args.data_path, args.current_fold, args.organ_number, args.low_range, args.high_range,
                     args.slice_threshold, args.slice_thickness, args.organ_ID, plane, others)  # fmt: skip


def neighbours(slices, most):
    """Return the organs, `most` at most, that share the most active slices with the organ of a training set."""
    counts = Counter()
    for i in slices.active:
        counts.update(organ for organ, (pixels, *_) in enumerate(slices.slices[i].organs, 1) if pixels)
    del counts[slices.organ_ID]
    return tuple(organ for organ, _ in counts.most_common(most))


def varied(image, label, box=None):
    """Return the part of a sample inside `box` (a0, a1, b0, b1), turned, scaled and changed in contrast at random.

    Without a box it is the whole slice, shifted as well.
    image: (3, A, B) in [0, 1], label: (C, A, B) of 0 and 1; -> the same of the box's size. What lies beyond the slice is
    0, and what is 0 in the image, the intensity window's dark end, stays 0.
    """
    size = image.shape[1:]
    a0, a1, b0, b1 = box or (0, size[0], 0, size[1])
    angle = math.radians(random.uniform(-TURN, TURN))
    scale, stretch = (math.exp(random.uniform(-most, most)) for most in (SCALE, STRETCH))
    a, b = (  # from the box's centre
        torch.arange(low, high, device=image.device) - (low + high - 1) / 2 for low, high in ((a0, a1), (b0, b1))
    )
    a, b = a[:, None] * scale * stretch, b[None] * scale / stretch
    a, b = math.cos(angle) * a - math.sin(angle) * b, math.sin(angle) * a + math.cos(angle) * b
    places = [
        (2 * place + start + end) / n - 1 + (0 if box else random.uniform(-2 * SHIFT, 2 * SHIFT))
        for place, start, end, n in ((b, b0, b1, size[1]), (a, a0, a1, size[0]))
    ]
    pixels, grid = torch.cat([image, label])[None], torch.stack(places, -1)[None]
    seen = F.grid_sample(pixels, grid, align_corners=False)[0]
    image, label = seen[:3], (seen[3:] >= 0.5).float()
    contrast, light = math.exp(random.uniform(-CONTRAST, CONTRAST)), random.uniform(-CONTRAST, CONTRAST) / 2
    return (contrast * image + light).clamp(0, 1) * (image > 0), label
