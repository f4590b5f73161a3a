"""Convert NIfTI labels, and NIfTI images if any, to labels/CASE.npy and images/CASE.npy. Usage:

    python nii2npy.py [RAW] [OUT] [--images WHERE] [--labels WHERE] [--orientation HOW]

In RAW (default: the folder you are in), labels are TCIA_pancreas_labels*/label0001.nii.gz, which
become case 0001, and labels/NAME.nii.gz or labelsTr/NAME.nii.gz; images are images/NAME.nii.gz or
imagesTr/NAME.nii.gz (or NAME_0000). WHERE is another folder, or a pattern in quotes whose last * is
the case: --images 'scans/*_ct.nii.gz'. OUT (default: RAW) is the data folder. A label whose image
is not in RAW belongs to OUT/images/CASE.npy. .nrrd, .mha and .mhd are read too, if SimpleITK is
installed. RAW/dataset.json (nnU-Net, Decathlon) names the organs.

A label is turned onto its image's axes, never resampled. HOW is auto, affine or published: auto
turns NIH's labels (TCIA_pancreas_labels*) by transpose(1, 0, 2), as published, and others by the
two affines if both say how, else by transpose(1, 0, 2). A case that fails is named, the others are
converted, and the exit code is 1.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..', 'OrganSegRSTN'))
try:
    import numpy as np

    from running.arguments import Parser
    from running.files import load_array
    from running.script import run
    from scans.converting import convert_all, existing_folder, image_file, only_one, save_label, save_scan, speaker
    from scans.dataset import copy_label_names, find, without_channel
    from scans.geometry import geometry_file, load_geometry, place_label
    from scans.itk import is_itk_name, open_itk
    from scans.nifti import open_nifti
except ModuleNotFoundError as error:
    sys.exit(f'nii2npy.py: error: {error}; install requirements.txt, and run this script where the repository has it: '
             'python REPOSITORY/DATA2NPY/nii2npy.py RAW OUT')  # fmt: skip

IMAGES = ('images', 'imagesTr')
LABELS = ('TCIA_pancreas_labels*', 'labels', 'labelsTr')


def open_scan(path, say):
    """Return the Volume of a file."""
    return open_itk(path) if is_itk_name(path) else open_nifti(path, say)


def convert_case(out, case, images, labels, orientation):
    """Read the image and the label of a case; write them if neither is wrong."""
    say = speaker(case)
    scan = open_scan(only_one(case, images), say).image(say) if images else None
    if scan is None and not image_file(out, case).exists():
        print(f'{case}: a label without an image, skipped')
        return
    label, how = read_label(out, case, only_one(case, labels), scan, orientation) if labels else (None, '')
    if scan:
        save_scan(out, case, scan, label)
    if label is not None and save_label(out, case, label):
        counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in label)
        organs = ', '.join(f'{organ}: {n}' for organ, n in enumerate(counts) if organ and n)
        print(f'{case}: label {" x ".join(map(str, label.shape))}, {how}, voxels of organ {organs or "(none)"}')


def read_label(out, case, path, scan, orientation):
    """Return a label (uint8) turned onto its image, a Scan or else images/CASE.npy, and how."""
    volume = open_scan(path, speaker(case))
    if scan:
        shape, ours = scan.image.shape, scan.geometry
    else:
        image = load_array(image_file(out, case))
        shape, ours = image.shape, load_geometry(geometry_file(out, case), image.shape, image)
    if orientation == 'auto' and path.absolute().parent.name.startswith('TCIA_pancreas_labels'):
        orientation = 'published'
    if orientation != 'published' and not scan and ours is None and geometry_file(out, case).exists():
        raise ValueError(f'{path}: not laid onto images/{case}.npy, which has changed since its conversion (see above)')
    label, how = place_label(volume.label(), volume.geometry, shape, ours, orientation)
    return np.ascontiguousarray(label), how


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
        raise FileNotFoundError(f'{raw}: no scans in {", ".join(dict.fromkeys(LABELS + IMAGES))}; see --labels')
    if not images and not any(Path(out, 'images').glob('*.npy')):
        raise FileNotFoundError(f'{out}/images: no image to lay the labels onto; run dicom2npy.py first')
    if labels and not any(case in images or image_file(out, case).exists() for case in labels):
        names = f'{next(iter(labels.values()))[0]} and {next(iter(images.values()))[0]}' if images else 'images/*.npy'
        raise ValueError(f'{raw}: no label has an image of its name ({names}); see --images and --labels')
    if args.images is None and Path(raw, 'imagesTs').is_dir():
        print('imagesTs: left out, scans without labels; predict.py reads them as they are')
    copy_label_names(raw, out)
    cases = {case: (images.get(case), labels.get(case)) for case in images.keys() | labels.keys()}
    return convert_all(out, cases, lambda case, files: convert_case(out, case, *files, args.orientation))


if __name__ == '__main__':
    run(main)
