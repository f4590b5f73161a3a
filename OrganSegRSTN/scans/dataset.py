"""The files of a data set to convert with nii2npy.py: images, labels, and the organs in nnU-Net's dataset.json."""

import glob
import json
import os
import re
from collections import defaultdict
from pathlib import Path

from running.files import atomic_write, read_json
from scans.converting import case_name

SCAN = re.compile(r'\.(nii(\.gz)?|nrrd|mha|mhd)$', re.IGNORECASE)


def find(raw, where, places):
    """Return {case: [path, ...]} of the scans in `where`, else in the `places` of `raw`; print what is left out."""
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
    """Return {case: [path, ...]} of the scans that match a pattern; its last * stands for the case."""
    parts = Path(pattern).parts
    place = max(i for i, part in enumerate(parts) if '*' in part)
    around = re.sub(r'\.nii(\.gz|\*)?$', '', parts[place]).split('*')
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
    """Print how many files of the folders that FOLDER/* matches are no scans by name, or hidden, and the first five."""
    hidden = glob.glob(f'{pattern[:-1]}.*')
    paths = hidden + [path for path in glob.glob(pattern) if not SCAN.search(path)]
    paths = sorted(path for path in paths if not os.path.isdir(path) and not path.endswith(('.npy', '.part')))
    if paths:
        more = ', ...' if len(paths) > 5 else ''
        print(f'{len(paths)} files left out, hidden or not named as scans: {", ".join(paths[:5])}{more}')


def without_channel(images, labels):
    """Return the images with nnU-Net's NAME_0000, NAME_0001 ... under NAME, if that is a label's name."""
    cases = defaultdict(list)
    for case, paths in images.items():
        name = re.sub(r'_\d{4}$', '', case)
        cases[name if name in labels and case not in labels else case] += paths
    return cases


def save_organ_names(raw, data_path):
    """Write organs.json, {"1": "pancreas", ...}, from raw/dataset.json, if there is one, and print ORGAN_NUMBER."""
    path, organs = Path(raw, 'dataset.json'), {}
    try:
        for key, value in dict(
            read_json(path)['labels']
        ).items():  # Decathlon's {"1": "pancreas"}, nnU-Net's the reverse
            number, name = (key, value) if str(key).isdecimal() else (value, key)
            if str(number).isdecimal() and int(number) > 0 and name != 'ignore':
                organs[int(number)] = ' '.join(str(name).split())
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        print(f'{path}: no labels in it ({error!r})')
    if organs:
        with atomic_write(Path(data_path, 'organs.json'), 'w') as file:
            json.dump(dict(sorted(organs.items())), file)
        print(f'ORGAN_NUMBER={max(organs)}: {", ".join(f"{number} {name}" for number, name in sorted(organs.items()))}')
