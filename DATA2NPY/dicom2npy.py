"""Convert DICOM series to images/CASE.npy and geometry/CASE.json. Usage:

    python dicom2npy.py [RAW] [OUT] [--resample] [--acquisition N]

An image is (rows, columns, slices), int16 HU.
RAW (default: the current folder) is searched for folders that hold a series. DOI/PANCREAS_0001/...
and manifest-.../Pancreas-CT/PANCREAS_0001/... become case 0001. Elsewhere a case is named after the
first folder below RAW in which the series differ. OUT (default: RAW) is the data folder. Slices are
ordered by InstanceNumber, as published, and by position if the two disagree. A case that fails is
named, the others are converted, and the exit code is 1.
"""

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..', 'OrganSegRSTN'))
try:
    from running.arguments import Parser
    from running.script import run
    from scans.converting import case_name, convert_all, existing_folder, only_one, save_scan, speaker
    from scans.dicom import read_series, refuse_part, series_folders, split_scans
except ModuleNotFoundError as error:
    sys.exit(f'dicom2npy.py: error: {error}; install requirements.txt, and run this script where the repository has it: '
             'python REPOSITORY/DATA2NPY/dicom2npy.py RAW OUT')  # fmt: skip


def find_series(raw):
    """Return {case: [folder, ...]} of folders with slices; PANCREAS_0001 is a case even without."""
    cases, others = defaultdict(list), {}
    top = Path(raw).resolve().name
    for folder, holds_slices in series_folders(raw):
        below = folder.relative_to(raw).parts
        numbers = [case_name(part) for part in (top, *below) if case_name(part) != part]
        if numbers:
            cases[numbers[0]] += [folder] * holds_slices
        elif holds_slices:
            others[below] = folder
    shared = len(os.path.commonprefix([below[:-1] for below in others])) if len(others) > 1 else 0
    for below, folder in others.items():
        cases[without_blanks(below[shared] if below else top)].append(folder)
    return cases


def without_blanks(name):
    """Return a folder's name as a case's name, which cannot hold white space."""
    case = re.sub(r'\s', '_', name)
    if case != name:
        print(f'{case}: named after the folder {name!r}, its white space replaced by _')
    return case


def main():
    parser = Parser(__doc__)
    parser.add_argument('raw', metavar='RAW', nargs='?', default='.', help='folder with the DICOM series')
    parser.add_argument('out', metavar='OUT', nargs='?', help='data folder to write to (RAW)')
    parser.add_argument('--resample', action='store_true', help='straighten a tilted or unevenly spaced series')
    parser.add_argument('--acquisition', metavar='N', help='read the slices of this AcquisitionNumber only')
    args = parser.parse_args()
    raw, out = existing_folder(args.raw), args.out or args.raw
    cases = find_series(raw)
    if not cases:
        raise FileNotFoundError(f'{raw}: no DICOM series found in it or below')
    parts = split_scans([folder for folders in cases.values() for folder in folders])

    def convert(case, folders):
        if not folders:
            raise FileNotFoundError(f'no DICOM series found for it in {raw}')
        folder = only_one(case, folders)
        refuse_part(folder, parts)
        save_scan(out, case, read_series(folder, speaker(case), args.resample, args.acquisition))

    return convert_all(out, cases, convert)


if __name__ == '__main__':
    run(main)
