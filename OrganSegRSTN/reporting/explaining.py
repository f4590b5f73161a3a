"""Pictures of what the networks see (section 3.2): image, probability, saliency, the fine network's input and output."""

import io

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model import bounding_box
from reporting.pictures import AS_PUBLISHED, COLOURS, INK, standing
from running.data_folder import PLANES
from running.files import atomic_write
from utils import to_unit
from volumes.planes import plane_view, slice_window

WORLD = {'R': (0, 1), 'L': (0, -1), 'A': (1, 1), 'P': (1, -1), 'S': (2, 1), 'I': (2, -1)}
TITLES = ('image', 'probability', 'saliency', 'the fine network sees', 'fine probability')


def write_explanation(folder, image, networks, mask, score, spacing=None):
    """Write folder/X.png, Y.png and Z.png of a new scan's round 0; see volumes.segmenting.segment_scan."""
    found = None if set(networks.orientation) - WORLD.keys() else [WORLD[code] for code in networks.orientation]
    for tester in networks.fine:
        path = f'{folder}/{tester.plane}.png'
        write_panels(path, tester, image, mask, score, found, spacing)
        print(f'written: {path}')


def write_panels(path, tester, image, mask, score, found=None, spacing=None):
    """Write the picture of the slice along the tester's plane that has most of the mask.

    tester: PlaneTester of TEST 'F', whose first snapshot is shown; mask, score: of the round before the
    one shown; found: where the axes lead, see pictures.anatomy; spacing: mm, along the axes.
    """
    panels, box, j = look(tester, image, mask, score)
    axis = PLANES.index(tester.plane)
    rows, columns = sorted({0, 1, 2} - {axis}, key=lambda a: -(found or AS_PUBLISHED)[a][0])
    aspect = 1 if spacing is None else spacing[rows] / spacing[columns]
    inside = np.zeros(panels['image'].shape, bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    upright = {name: standing(panel[None], rows, columns, found)[0] for name, panel in panels.items()}
    inside = standing(inside[None], rows, columns, found)[0]
    a0, b0 = (int(inside.any(axis=1 - k).argmax()) for k in (0, 1))
    height, width = (int(inside.any(axis=1 - k).sum()) for k in (0, 1))
    figure = Figure((12.5, 3.1), layout='constrained')
    for place, (axes, title) in enumerate(zip(figure.subplots(1, len(TITLES)), TITLES)):
        panel = upright[title]
        if title == TITLES[3]:
            panel = panel[a0 : a0 + height, b0 : b0 + width]
        ranges = {'probability': (0, 1), 'fine probability': (0, 1), 'image': (0, 1)}.get(title, (None, None))
        colours = 'gray' if title in (TITLES[0], TITLES[3]) else 'magma'
        shown = axes.imshow(panel, cmap=colours, vmin=ranges[0], vmax=ranges[1], aspect=aspect, interpolation='nearest')
        figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02).ax.tick_params(labelsize=6)
        if title != TITLES[3]:
            axes.add_patch(Rectangle((b0 - 0.5, a0 - 0.5), width, height, fill=False, ec=COLOURS['label'], lw=1))
        axes.set_title(title if place else f'{title}, plane {tester.plane}, slice {j}', fontsize=9, color=INK)
        axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format='png', dpi=110, metadata={'Software': None})
    with atomic_write(path) as file:
        file.write(picture.getvalue())


@torch.inference_mode()
def look(tester, image, mask, score):
    """Return ({title: panel (A, B)}, the box (a0, a1, b0, b1), the slice) of the slice with most of the mask."""
    settings = tester.settings
    views = [plane_view(volume, tester.plane) for volume in (image, mask, score)]
    j = int(views[1].sum(axis=(1, 2), dtype=np.int64).argmax())
    ids = slice_window(j, len(views[0]), settings.thickness)
    net = tester.load(tester.paths[0])
    seen = torch.from_numpy(to_unit(views[0][ids], *settings.intensity_window))[None].to(settings.device)
    mask, score = (
        torch.from_numpy(view[ids[: settings.thickness]].astype(np.float32))[None].to(settings.device)
        for view in views[1:]
    )
    saliency = net.saliency(score)
    weighted, middle = seen * saliency, settings.thickness // 2
    arrays = (
        seen[0, 1],
        score[0, middle],
        saliency[0, middle],
        weighted[0, 1],
        net.fine(weighted, mask >= 0.5, 0)[0, middle],
    )
    panels = dict(zip(TITLES, (array.float().cpu().numpy() for array in arrays)))
    return panels, bounding_box(mask[0] >= 0.5, net.margins()), j
