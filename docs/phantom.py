"""Draw docs/phantom.png: a test case of the demo with its label, coarse and coarse-to-fine contours. Usage:

    python docs/phantom.py DATA_PATH COARSE2FINE_FOLDER [CASE_NUMBER]

after `LAZY_MODE=1 bash run.sh`; COARSE2FINE_FOLDER is the folder of results/coarse2fine_testing_*/ to show.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).parent.parent / 'OrganSegRSTN'))
from running.data_folder import PLANES, plane_view, read_cases
from running.files import load_volume
from utils import DSC_computation

MASKS = {'label': '#2ecc40', 'coarse (round 0)': '#ff9f1a', 'coarse to fine (last round)': '#ff3860'}
ASPECTS = {'X': 3.6 / 3.3, 'Y': 3.6 / 3.3, 'Z': 1}  # mm of a slice by mm of a pixel
TITLES = {'X': 'X (coronal)', 'Y': 'Y (sagittal)', 'Z': 'Z (axial)'}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_path')
    parser.add_argument('folder')
    parser.add_argument('number', type=int, nargs='?', default=1)
    args = parser.parse_args()
    case = read_cases(args.data_path, 'testing', 0)[args.number - 1]
    image, label = case.image(args.data_path), case.label(args.data_path, 1)
    volumes = Path(args.folder, 'volumes')
    last = max(int(file.name[1:].split('_')[0]) for file in volumes.glob(f'R*_{args.number}.npz'))
    rounds = [load_volume(volumes / f'R{r}_{args.number}.npz', image.shape) for r in (0, last)]
    draw(image, dict(zip(MASKS, [label, *rounds])))


def draw(image, masks):
    """A panel a plane, at the slice where the label is largest."""
    label = masks['label']
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.6), facecolor='black', width_ratios=[1, 1, 1])
    for plane, panel in zip(PLANES, panels):
        slices = plane_view(label, plane)
        j = int(slices.reshape(len(slices), -1).sum(axis=1).argmax())
        upright = (lambda slice_: slice_) if plane == 'Z' else np.transpose  # the head at the top
        panel.imshow(upright(plane_view(image, plane)[j]), cmap='gray', vmin=-100, vmax=240, aspect=ASPECTS[plane])
        for name, colour in MASKS.items():
            mask = upright(plane_view(masks[name], plane)[j])
            if mask.any():
                panel.contour(mask, levels=[0.5], colors=colour, linewidths=1.4)
        panel.set_title(f'{TITLES[plane]}, slice {j}', color='white', fontsize=10)
        panel.axis('off')
    names = [f'{n}: DSC {DSC_computation(label, m).value:.3f}' if n != 'label' else n for n, m in masks.items()]
    handles = [Line2D([], [], color=colour) for colour in MASKS.values()]
    figure.legend(handles, names, loc='lower center', ncols=3, facecolor='black', labelcolor='white', frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(Path(__file__).with_name('phantom.png'), dpi=100)
    print(np.round([DSC_computation(label, mask).value for mask in masks.values()], 4))


if __name__ == '__main__':
    main()
