"""Initialization: slices every volume along X, Y and Z, and writes the lists of slices and folds.

Reads images/*.npy (int16 HU) and labels/*.npy (uint8), both (W, H, L), paired by name; writes images_X|Y|Z/,
labels_X|Y|Z/ and lists/. A slice is written unclipped; only its average in the list is of clipped intensities.
"""

import os
import re
import shutil
from pathlib import Path

import arguments
import numpy as np
from slices import Slice, plane_view
from tqdm import tqdm
from utils import PLANES, fold_list, in_training_set, load_array, slice_list, whole_file


def main():
    made = arguments.parser(__doc__, 'data_path organ_number folds low_range high_range'.split())
    args = arguments.parse(made)
    names = case_names(Path(args.data_path))
    if len(names) < args.folds:
        raise ValueError(f'{args.data_path}: {len(names)} cases cannot be divided into {args.folds} folds')
    records = {plane: [] for plane in PLANES}
    for number, name in enumerate(tqdm(names, desc='cases', disable=None)):
        for plane, found in initialize_case(args, number, name).items():
            records[plane] += found
    write_lists(args, names, records)


def case_names(data):
    """Names of the cases that have both an image and a label, in file order; others are left out with a line."""
    images, labels = (sorted(file.stem for file in (data / kind).glob('*.npy')) for kind in ('images', 'labels'))
    for missing, names in (('label', set(images) - set(labels)), ('image', set(labels) - set(images))):
        for name in sorted(names):
            print(f'{name}: left out, it has no {missing}s/{name}.npy')
    names = [name for name in images if name in labels]
    if not names:
        raise FileNotFoundError(f'{data}: no images/*.npy with labels/*.npy of the same name; convert the scans first')
    for name in names:
        if re.search(r'\s', name):
            raise ValueError(
                f'images/{name}.npy: a case name cannot hold white space (lists are divided by it); rename it'
            )
    return names


def initialize_case(args, number, name):
    """Slice one case and measure its slices; -> {plane: [Slice]}."""
    data = Path(args.data_path)
    image, label = load_array(data / 'images' / f'{name}.npy'), load_array(data / 'labels' / f'{name}.npy')
    label = check_case(name, image, label, args.organ_number)
    records = {}
    for plane in PLANES:
        views = {'images': plane_view(image, plane), 'labels': plane_view(label, plane)}
        files = [[f'{kind}_{plane}/{name}/{j:04d}.npy' for kind in views] for j in range(len(views['images']))]
        for kind, view in views.items():
            write_slices(data / f'{kind}_{plane}' / name, view)
        window = (args.low_range, args.high_range)
        records[plane] = [
            Slice.measure(number, j, *files[j], *pair, args.organ_number, window)
            for j, pair in enumerate(zip(views['images'], views['labels']))
        ]
    return records


def check_case(name, image, label, organ_number):
    """The label as whole numbers; ValueError where the two volumes cannot be a case."""
    if image.ndim != 3 or image.shape != label.shape or not image.size:
        raise ValueError(
            f'{name}: image {image.shape} and label {label.shape} are not two volumes (W, H, L) of one shape'
        )
    if not np.isfinite(image).all():
        raise ValueError(f'images/{name}.npy: not all values are finite')
    if not np.array_equal(label, np.floor(label)) or label.min() < 0:
        raise ValueError(f'labels/{name}.npy: not all values are whole numbers from 0')
    if label.max() > organ_number:
        print(
            f'labels/{name}.npy: holds {label.max():g}, above organ_number {organ_number}: right only for an own is_organ'
        )
    return label if label.dtype.kind in 'bui' else label.astype(np.int64)


def write_slices(folder, view):
    """Write the slices of a plane view as folder/0000.npy, ...; the folder appears when all are written."""
    part = folder.with_name(f'.{folder.name}.{os.getpid()}.part')
    part.mkdir(parents=True)
    try:
        for j, image in enumerate(view):
            np.save(part / f'{j:04d}.npy', image)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_lists(args, names, records):
    """Write lists/training_X|Y|Z.txt, training_FD*.txt and testing_FD*.txt."""
    files = {slice_list(args.data_path, plane): list(map(str, records[plane])) for plane in PLANES}
    for fold in range(args.folds):
        for kind in ('training', 'testing'):
            files[fold_list(args.data_path, kind, fold)] = [
                f'{i} images/{name}.npy labels/{name}.npy'
                for i, name in enumerate(names)
                if in_training_set(len(names), i, args.folds, fold) == (kind == 'training')
            ]
    for stale in set(Path(args.data_path, 'lists').glob('*_FD*.txt')) - set(files):  # of more folds, formerly
        stale.unlink()
    for path, lines in files.items():
        with whole_file(path, 'w') as file:
            file.writelines(f'{line}\n' for line in lines)
    print(f'{len(names)} cases in {args.folds} folds, lists in {Path(args.data_path, "lists")}')


if __name__ == '__main__':
    arguments.run(main)
