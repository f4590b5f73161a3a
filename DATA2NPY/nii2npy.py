"""Convert NIfTI labels, and images where they are NIfTI too, to labels/CASE.npy (uint8) and images/CASE.npy. Usage:

    python nii2npy.py [RAW] [OUT] [--images WHERE] [--labels WHERE] [--orientation auto|affine|published]

In RAW (default: the folder you are in), labels are TCIA_pancreas_labels*/label0001.nii.gz, which become case 0001, and
labels/NAME.nii.gz or labelsTr/NAME.nii.gz; images are images/NAME.nii.gz or imagesTr/NAME.nii.gz. WHERE is another
folder, or a pattern in quotes whose last * is the case: --images 'scans/*_ct.nii.gz'. OUT (default: RAW) is the data
folder; a label whose image is not here in NIfTI belongs to OUT/images/CASE.npy, as dicom2npy.py wrote it.

A label is turned onto its image's axes, never resampled: by the two affines if both say how, else by the published
transpose(1, 0, 2). A case that fails is named, the others are converted, and the exit code is 1.
"""

import glob
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'OrganSegRSTN'))
import numpy as np

from running.arguments import Parser
from running.files import load_array
from running.script import run
from scans.converting import (
    case_name,
    convert_all,
    existing_folder,
    image_file,
    only_one,
    save_array,
    save_scan,
    speaker,
)
from scans.geometry import geometry_file, load_geometry, place_label
from scans.nifti import read_nifti_image, read_nifti_label

IMAGES = ('images', 'imagesTr')
LABELS = ('TCIA_pancreas_labels*', 'labels', 'labelsTr')
NIFTI = re.compile(r'\.nii(\.gz)?$')


def find_files(pattern):
    """Return {case: [path, ...]} of the NIfTI files that match a pattern; its last * stands for the case."""
    parts = Path(pattern).parts
    place = max(i for i, part in enumerate(parts) if '*' in part)
    named = re.sub(r'\.nii(\.gz|\*)?$', '', parts[place]).split('*')
    if len(named) == 1:
        raise ValueError(f'{pattern}: no * in it that stands for the case')
    named = re.compile('(.*)'.join(map(re.escape, named)), re.DOTALL)
    cases = defaultdict(list)
    for path in sorted(map(Path, glob.glob(pattern))):
        match = named.fullmatch(NIFTI.sub('', path.parts[place]))
        if match and NIFTI.search(path.name):
            cases[case_name(match[match.lastindex])].append(path)
    return cases


def find(raw, where, places):
    """Return {case: [path, ...]} of the NIfTI files in `where`, else in the usual places of `raw`."""
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
    if where is not None and not cases:
        raise FileNotFoundError(f'{where}: no NIfTI files (.nii, .nii.gz) found')
    return cases


def without_channel(images, labels):
    """Return the images with nnU-Net's NAME_0000 under NAME, if that is a label's name."""
    return {
        case.removesuffix('_0000') if case.removesuffix('_0000') in labels else case: paths
        for case, paths in images.items()
    }


def convert_case(out, case, images, labels, orientation):
    """Read the image and the label of a case, then write them; nothing is written if one of them is wrong."""
    scan = read_nifti_image(only_one(case, images), speaker(case)) if images else None
    if scan is None and not image_file(out, case).exists():
        print(f'{case}: a label without an image, skipped')
        return
    if labels:
        label, theirs = read_nifti_label(only_one(case, labels))
        if scan:
            shape, ours = scan.image.shape, scan.geometry
        else:
            shape, ours = load_array(image_file(out, case)).shape, load_geometry(geometry_file(out, case))
        label, how = place_label(label, theirs, shape, ours, orientation)
    if scan:
        save_scan(out, case, scan)
    if labels:
        save_array(Path(out, 'labels', f'{case}.npy'), np.ascontiguousarray(label))
        organs = ', '.join(f'{organ}: {n}' for organ, n in enumerate(np.bincount(label.ravel())) if organ and n)
        print(f'{case}: label {" x ".join(map(str, label.shape))}, {how}, voxels of organ {organs or "(none)"}')


def main():
    parser = Parser(__doc__)
    parser.add_argument('raw', metavar='RAW', nargs='?', default='.', help='folder with the NIfTI files')
    parser.add_argument('out', metavar='OUT', nargs='?', help='data folder to write to (RAW)')
    parser.add_argument('--images', metavar='WHERE', help='folder or pattern of the images')
    parser.add_argument('--labels', metavar='WHERE', help='folder or pattern of the labels')
    ways = ('auto', 'affine', 'published')
    parser.add_argument(
        '--orientation', choices=ways, default='auto', help='how a label is turned onto its image (auto)'
    )
    args = parser.parse_args()
    raw, out = existing_folder(args.raw), args.out or args.raw
    labels = find(raw, args.labels, LABELS)
    images = without_channel(find(raw, args.images, IMAGES), labels)
    if not labels and not images:
        raise FileNotFoundError(f'{raw}: no NIfTI files in {", ".join(dict.fromkeys(LABELS + IMAGES))}; see --labels')
    if not images and not any(Path(out, 'images').glob('*.npy')):
        raise FileNotFoundError(f'{out}/images: no image to lay the labels onto; run dicom2npy.py first')
    cases = {case: (images.get(case), labels.get(case)) for case in images.keys() | labels.keys()}
    return convert_all(out, cases, lambda case, files: convert_case(out, case, *files, args.orientation))


if __name__ == '__main__':
    run(main)
