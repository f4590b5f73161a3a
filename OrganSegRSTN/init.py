"""Initialization: slice every volume along X, Y and Z, and write the lists of slices and folds.

Read images/*.npy (int16 HU) and labels/*.npy (uint8), both (W, H, L), paired by name. Write
images_X|Y|Z/, labels_X|Y|Z/, lists/ and init.json, the record of what the lists were made of. A slice
is written unclipped; only its average in the list is of clipped intensities. A list that was edited by
hand is replaced only with --overwrite. Every case is checked before anything is replaced.
"""

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from running import arguments, script  # before packages: it names a missing one

# isort: split
import numpy as np
from tqdm import tqdm

from running.data_folder import (
    INIT_RECORD,
    PLANES,
    Slice,
    case_names,
    check_case,
    file_state,
    fold_list,
    organ_extents,
    plane_view,
    slice_averages,
    slice_list,
    whole_numbers,
)
from running.files import (
    LEFTOVERS,
    atomic_write,
    errors_naming,
    load_array,
    locked,
    read_json,
    read_lines,
    write_array,
    write_json,
)
from running.results import checksum, start_without_network
from scans.geometry import check_partners
from utils import in_training_set, is_organ, organ_rule

SLICES_AT_ONCE = 32  # slices gathered at a time


def main():
    parser = arguments.stage_parser(__doc__, 'data_path organ_number folds low_range high_range'.split())
    parser.add_argument('--if_changed', action='store_true',
                        help='do nothing if the lists are of these settings, images and labels')  # fmt: skip
    arguments.add_overwrite(parser, 'lists that were edited manually')
    args = arguments.parse(parser)
    start_without_network(args, 'initialization')
    names = case_names(Path(args.data_path))
    if len(names) < args.folds:
        raise ValueError(f'{args.data_path}: {len(names)} cases cannot be divided into {args.folds} folds')
    inputs = describe_inputs(args, names)
    record = read_record(args.data_path)
    if args.if_changed and unchanged(args.data_path, record, inputs):
        print('initialized before: nothing has changed')
        return
    records = {plane: [] for plane in PLANES}
    written = ['lists', *(f'{kind}_{plane}' for kind in ('images', 'labels') for plane in PLANES)]
    with locked(Path(args.data_path, '.lock'), '.check_data*.part', *(f'{folder}/{LEFTOVERS}' for folder in written)):
        replaced = replaceable_lists(args, fold_lists(args, names), record.get('lists', {}))
        check_cases(args, names)
        for path in replaced:  # before the slices: a run that is cut off leaves no list of other slices
            path.unlink()
        with ThreadPoolExecutor(os.cpu_count()) as writers:
            for number, name in enumerate(tqdm(names, desc='cases', disable=None)):
                for plane, found in initialize_case(args, number, name, writers).items():
                    records[plane] += found
        write_lists(args, fold_lists(args, names) | slice_lists(args, records), inputs)
    print(f'{len(names)} cases in {args.folds} folds, lists in {Path(args.data_path, "lists")}')


def check_cases(args, names):
    """Raise ValueError for the first case that cannot be sliced."""
    for name in tqdm(names, desc='cases checked', disable=None):
        image, label = load_case(args, name)
        check_partners(args.data_path, name, image, label)
        check_case(name, image, label, args.organ_number)


def load_case(args, name):
    """Return image and label (W, H, L) of a case as stored."""
    return tuple(load_array(Path(args.data_path, kind, f'{name}.npy')) for kind in ('images', 'labels'))


def initialize_case(args, number, name, writers):
    """Slice a checked case, several planes at a time; measure its slices meanwhile.

    Return {plane: [Slice]}.
    """
    data = Path(args.data_path)
    image, label = load_case(args, name)
    label = whole_numbers(label)
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
    """Return the image and label file of slice j, relative to the data folder."""
    return tuple(f'{kind}_{plane}/{name}/{j:04d}.npy' for kind in ('images', 'labels'))


def write_slices(folder, volume, plane):
    """Write the slices of a volume as folder/0000.npy, ...; the folder appears when it is whole."""
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
    """Yield the slices of a plane, each contiguous in memory.

    They are gathered some at a time: one by one costs a cache miss a voxel.
    """
    view = plane_view(volume, plane)
    for j in range(0, len(view), SLICES_AT_ONCE):
        yield from np.ascontiguousarray(view[j : j + SLICES_AT_ONCE])


# --- lists, and the record of what they were made of ----------------------------------------------------------------


def slice_lists(args, records):
    """Return {path: lines} of lists/training_X|Y|Z.txt."""
    return {slice_list(args.data_path, plane): list(map(str, records[plane])) for plane in PLANES}


def fold_lists(args, names):
    """Return {path: lines} of lists/training_FD*.txt and testing_FD*.txt."""
    return {
        fold_list(args.data_path, kind, fold): [
            f'{i} images/{name}.npy labels/{name}.npy'
            for i, name in enumerate(names)
            if in_training_set(len(names), i, args.folds, fold) == (kind == 'training')
        ]
        for fold in range(args.folds)
        for kind in ('training', 'testing')
    }


def write_lists(args, lists, inputs):
    """Write the record, then the lists: a run that is cut off leaves a record without its lists."""
    content = {path: ''.join(f'{line}\n' for line in lines).encode() for path, lines in lists.items()}
    written = {path.name: [len(text), hashlib.sha256(text).hexdigest()] for path, text in content.items()}
    write_json(Path(args.data_path, INIT_RECORD), inputs | {'lists': written})
    for path, text in content.items():
        with atomic_write(path) as file:
            file.write(text)


def replaceable_lists(args, planned, recorded):
    """Return the paths of the lists of earlier runs, which this one replaces.

    planned: {path: lines} of the folds' lists to be written; recorded: {name: [size, checksum]} of the
    lists written last. ValueError names a list that was edited by hand, unless args.overwrite.
    """
    known = {*recorded, *(path.name for path in planned), *(f'training_{plane}.txt' for plane in PLANES)}
    found = sorted(path for path in Path(args.data_path, 'lists').glob('*.txt') if path.name in known)
    for path in [] if args.overwrite else found:
        if edited(path, planned, recorded):
            raise ValueError(f'{path}: edited by hand, or not made by init.py; move it away, or replace it with '
                             '--overwrite (OVERWRITE=1 in run.sh)')  # fmt: skip
    return found


def edited(path, planned, recorded):
    """Return whether a list is not as recorded.

    Without a record, return whether a fold has other cases than planned.
    """
    if path.name in recorded:
        return [path.stat().st_size, checksum(path)] != recorded[path.name]
    return path in planned and fold_lines(path) != planned[path]


def fold_lines(path):
    """Return a fold's lines with paths relative to the data folder; None if they are not text."""
    absolute = re.compile(r' \S*/((images|labels)/[^/\s]+\.npy)')  # as the published init.py writes them
    try:
        return [absolute.sub(r' \1', line) for line in read_lines(path)]
    except ValueError:
        return None


def describe_inputs(args, names):
    """Return what the lists are made of: the settings, size and time of change of each volume."""
    settings = {name: getattr(args, name) for name in ('organ_number', 'folds', 'low_range', 'high_range')}
    cases = {
        name: [file_state(Path(args.data_path, kind, f'{name}.npy')) for kind in ('images', 'labels')] for name in names
    }
    return {'settings': settings | {'is_organ': organ_rule()}, 'cases': cases}


def read_record(data_path):
    """Return the record of the last initialization; {} if there is none that can be read."""
    try:
        record = read_json(Path(data_path, INIT_RECORD))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record.get('lists'), dict) else {}


def unchanged(data_path, record, inputs):
    """Return whether the recorded initialization had these inputs, and all that it wrote exists."""
    if any(record.get(key) != value for key, value in inputs.items()):
        return False
    slices = [f'{kind}_{plane}/{name}' for kind in ('images', 'labels') for plane in PLANES for name in inputs['cases']]
    lists = [f'lists/{name}' for name in record['lists']]
    return all(Path(data_path, path).exists() for path in slices + lists)


if __name__ == '__main__':
    script.run(main)
