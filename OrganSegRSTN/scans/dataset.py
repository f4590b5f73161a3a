"""The files of a data set for nii2npy.py: images, labels, and the organs in dataset.json."""

import glob
import os
import re
from collections import defaultdict
from pathlib import Path

from running.files import atomic_write, read_json
from scans.converting import case_name

SCAN = re.compile(r'\.(nii(\.gz)?|nrrd|mha|mhd)$', re.IGNORECASE)


def find(raw, where, places):
    """Return {case: [path, ...]} in `where`, else in the `places` of `raw`; print the rest."""
    if where is None:
        patterns = [os.path.join(glob.escape(raw), place, '*') for place in places]
    elif os.path.isdir(where):
        patterns = [os.path.join(glob.escape(where), '*')]
    elif '*' in where:
        patterns = [where]
    else:
        raise FileNotFoundError(f'{where}: no such folder, nor a pattern with a *')
    cases = defaultdict(list)
    for pattern in patterns:
        for case, paths in find_files(pattern).items():
            cases[case] += paths
        if os.path.basename(pattern) == '*':
            print_left_out(pattern)
    if where is not None and not cases:
        raise FileNotFoundError(f'{where}: no scans (.nii, .nii.gz, .nrrd, .mha, .mhd) found')
    return cases


def find_files(pattern):
    """Return {case: [path, ...]} of a pattern, whose last * stands for the case."""
    parts = Path(pattern).parts
    place = max(i for i, part in enumerate(parts) if '*' in part)
    around = SCAN.sub('', re.sub(r'\.nii\*$', '.nii', parts[place])).split('*')
    if len(around) == 1:
        raise ValueError(f'{pattern}: no * in it that stands for the case')
    named = re.compile('(.*)'.join(map(re.escape, around)), re.DOTALL)
    cases = defaultdict(list)
    for path in sorted(map(Path, glob.glob(pattern))):
        match = named.fullmatch(SCAN.sub('', path.parts[place]))
        if match and SCAN.search(path.name):
            cases[case_name(match[match.lastindex])].append(path)
    return cases


def print_left_out(pattern):
    """Print how many files of FOLDER/* are hidden or no scans by name, and five of them."""
    hidden = glob.glob(f'{pattern[:-1]}.*')
    paths = hidden + [path for path in glob.glob(pattern) if not SCAN.search(path)]
    paths = sorted(path for path in paths if not os.path.isdir(path) and not path.endswith(('.npy', '.part')))
    if paths:
        more = ', ...' if len(paths) > 5 else ''
        print(f'{len(paths)} files left out, hidden or not named as scans: {", ".join(paths[:5])}{more}')


def without_channel(images, labels):
    """Return the images, nnU-Net's NAME_0000, NAME_0001 ... under NAME if a label has that name."""
    cases = defaultdict(list)
    for case, paths in images.items():
        name = case_name(re.sub(r'_\d{4}$', '', case))
        cases[name if name in labels and case not in labels else case] += paths
    return cases


def read_label_names(path):
    """Return {number: name} of a dataset.json.

    nnU-Net writes {"spleen": 1}, Decathlon {"1": "spleen"}. {} without such a file; ValueError if it has no labels.
    """
    try:
        labels = read_json(path).get('labels', {}).items()
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path}: no label names ({error})') from None
    number = re.compile('[0-9]{1,3}')
    pairs = [pair if number.fullmatch(pair[0]) else (pair[1], pair[0]) for pair in labels]
    return {
        int(organ): name
        for organ, name in pairs
        if number.fullmatch(str(organ)) and isinstance(name, str) and name.isprintable()
    }


def copy_label_names(raw, data_path):
    """Copy raw/dataset.json, if any, to the data folder for report.py; print ORGAN_NUMBER."""
    path, copy = Path(raw, 'dataset.json'), Path(data_path, 'dataset.json')
    try:
        names = {number: name for number, name in read_label_names(path).items() if number and name != 'ignore'}
    except ValueError as error:
        print(error)
        return
    if names:
        print(f'ORGAN_NUMBER={max(names)}: {", ".join(f"{number} {name}" for number, name in sorted(names.items()))}')
        if not (copy.exists() and copy.samefile(path)):
            with atomic_write(copy) as file:
                file.write(path.read_bytes())
