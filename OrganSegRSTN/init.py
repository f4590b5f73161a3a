"""Initialization: slices every volume along X, Y and Z, and writes the lists of slices and folds.

Reads images/*.npy (int16 HU) and labels/*.npy (uint8), both (W, H, L), paired by name; writes images_X|Y|Z/,
labels_X|Y|Z/ and lists/. A slice is written unclipped; only its average in the list is of clipped intensities.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from running import arguments, script
from running.data_folder import (
    PLANES,
    Slice,
    case_names,
    check_case,
    fold_list,
    organ_extents,
    slice_averages,
    slice_list,
)
from running.files import LEFTOVERS, atomic_write, errors_naming, load_array, locked, write_array
from running.results import start_without_network
from scans.geometry import check_partners
from utils import in_training_set, is_organ
from volumes.planes import plane_view

SLICES_AT_ONCE = 32  # slices gathered at a time


def main():
    made = arguments.parser(__doc__, 'data_path organ_number folds low_range high_range'.split())
    args = arguments.parse(made)
    start_without_network(args, 'initialization')
    names = case_names(Path(args.data_path))
    if len(names) < args.folds:
        raise ValueError(f'{args.data_path}: {len(names)} cases cannot be divided into {args.folds} folds')
    records = {plane: [] for plane in PLANES}
    written = ['lists', *(f'{kind}_{plane}' for kind in ('images', 'labels') for plane in PLANES)]
    with locked(Path(args.data_path, '.lock'), '.check_data*.part', *(f'{folder}/{LEFTOVERS}' for folder in written)):
        for former in Path(args.data_path, 'lists').glob('*.txt'):  # a run that is cut off leaves none that lie
            former.unlink()
        with ThreadPoolExecutor(os.cpu_count()) as writers:
            for number, name in enumerate(tqdm(names, desc='cases', disable=None)):
                for plane, found in initialize_case(args, number, name, writers).items():
                    records[plane] += found
        write_lists(args, names, records)


def initialize_case(args, number, name, writers):
    """Slice one case, several planes at a time, and measure its slices meanwhile; -> {plane: [Slice]}."""
    data = Path(args.data_path)
    image, label = load_array(data / 'images' / f'{name}.npy'), load_array(data / 'labels' / f'{name}.npy')
    check_partners(data, name, image, label)
    label = check_case(name, image, label, args.organ_number)
    written = [
        writers.submit(write_slices, data / f'{kind}_{plane}' / name, volume, plane)
        for kind, volume in (('images', image), ('labels', label))
        for plane in PLANES
    ]
    averages = slice_averages(image, (args.low_range, args.high_range))
    organs = [organ_extents(np.asarray(is_organ(label, organ_ID))) for organ_ID in range(1, args.organ_number + 1)]
    for job in written:
        job.result()
    return {
        plane: [
            Slice(number, j, *slice_files(plane, name, j), float(average), tuple(map(tuple, extents)))
            for j, (average, *extents) in enumerate(zip(averages[plane], *(organ[plane].tolist() for organ in organs)))
        ]
        for plane in PLANES
    }


def slice_files(plane, name, j):
    """Image and label file of slice j, relative to the data folder."""
    return tuple(f'{kind}_{plane}/{name}/{j:04d}.npy' for kind in ('images', 'labels'))


def write_slices(folder, volume, plane):
    """Write the slices of a volume as folder/0000.npy, ...; the folder appears when all are written."""
    part = folder.with_name(f'.{folder.name}.{os.getpid()}.part')
    part.mkdir(parents=True)
    try:
        for j, image in enumerate(contiguous_slices(volume, plane)):
            path = part / f'{j:04d}.npy'
            with errors_naming(path), open(path, 'wb') as file:
                write_array(file, image)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def contiguous_slices(volume, plane):
    """The slices of a plane, each contiguous in memory, gathered some at a time: one by one costs a cache miss a voxel."""
    view = plane_view(volume, plane)
    for j in range(0, len(view), SLICES_AT_ONCE):
        yield from np.ascontiguousarray(view[j : j + SLICES_AT_ONCE])


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
    for path, lines in files.items():
        with atomic_write(path, 'w') as file:
            file.writelines(f'{line}\n' for line in lines)
    print(f'{len(names)} cases in {args.folds} folds, lists in {Path(args.data_path, "lists")}')


if __name__ == '__main__':
    script.run(main)
