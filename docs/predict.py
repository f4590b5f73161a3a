"""Draw docs/predict.png: a scan with the mask that predict.py found in it, at the slices that hold most of it. Usage:

python docs/predict.py INPUT MASK.nii.gz
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / 'OrganSegRSTN'))
from predict import read_input
from reporting.measures import joint_box
from reporting.pictures import anatomy, rows_and_columns, upright
from running.data_folder import PLANES

COLOUR = '#ff3860'
VIEWS = ('sagittal', 'coronal', 'axial')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('INPUT')
    parser.add_argument('MASK')
    args = parser.parse_args()
    scan = read_input(args.INPUT).scan
    mask = np.asarray(nib.load(args.MASK).dataobj).transpose(1, 0, 2) > 0  # as the scan is stored
    draw(scan.image, mask, scan.geometry)


def draw(image, mask, geometry):
    """A panel a plane, around the mask, upright, the patient's right on the left."""
    found, spacing = anatomy(geometry), geometry.spacing
    box = joint_box([mask], mask.shape, 12, 64)
    sides = [rows_and_columns(axis, found) for axis in range(3)]
    extent = spacing * mask[box].shape  # mm
    ratios = [extent[columns] / extent[rows] for rows, columns in sides]
    figure, panels = plt.subplots(1, 3, figsize=(11, 11 / sum(ratios) + 0.6), facecolor='black', width_ratios=ratios)
    for axis, (plane, panel, (rows, columns)) in enumerate(zip(PLANES, panels, sides)):
        view, marked = (upright(volume[box], plane, rows, columns, found) for volume in (image, mask))
        j = int(marked.sum(axis=(1, 2)).argmax())
        panel.imshow(view[j], cmap='gray', vmin=-100, vmax=240, aspect=spacing[rows] / spacing[columns])
        panel.contourf(marked[j], levels=[0.5, 1.5], colors=COLOUR, alpha=0.35)
        panel.contour(marked[j], levels=[0.5], colors=COLOUR, linewidths=1.4)
        panel.set_title(f'{VIEWS[found[axis][0]]}, slice {j + box[axis].start}', color='white', fontsize=10)
        panel.axis('off')
    ml = np.count_nonzero(mask) * np.prod(spacing) / 1000
    figure.text(0.5, 0.02, f'mask: {np.count_nonzero(mask)} voxels, {ml:.1f} ml', color=COLOUR, ha='center')
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(Path(__file__).with_name('predict.png'), dpi=100)


if __name__ == '__main__':
    main()
