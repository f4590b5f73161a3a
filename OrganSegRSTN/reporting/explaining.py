"""Pictures of what the networks see (section 3.2): image, probability, saliency, the fine network's input and output."""

import io
import re

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from model import bounding_box
from reporting.pictures import COLOURS, INK, anatomy, rows_and_columns, standing
from running.data_folder import PLANES, plane_view
from running.files import atomic_write, read_volume
from running.results import Checksums, read_settings
from utils import to_unit
from volumes.planes import plane_weights, slice_window
from volumes.rounds import coarse_probability
from volumes.testing import PlaneSettings, PlaneTester

WORLD = {'R': (0, 1), 'L': (0, -1), 'A': (1, 1), 'P': (1, -1), 'S': (2, 1), 'I': (2, -1)}
IMAGE, SALIENCY, SEEN = 'image', 'saliency', 'the fine network sees'
TITLES = (IMAGE, 'probability, round 0', SALIENCY, SEEN, 'fine probability, round 1')


def write_explanation(folder, image, networks, mask, score, spacing=None):
    """Write folder/X.png, Y.png and Z.png of a new scan's round 0; see volumes.segmenting.segment_scan."""
    found = None if set(networks.orientation) - WORLD.keys() else [WORLD[code] for code in networks.orientation]
    for tester in networks.fine:
        path = f'{folder}/{tester.plane}.png'
        write_panels(path, tester, image, mask, score, found, spacing)
        print(f'written: {path}')


def explain_case(folder, case_id, tested, number, image, geometry, intensity_window):
    """Write folder/{case_id}_{X|Y|Z}_seen.png of round 1 of a test case; return the files.

    tested: ResultFolder of coarse to fine. Return [] if snapshots or coarse volumes are not there any more; ValueError: a
    snapshot has changed.
    """
    data, names = tested.path.parents[2], re.search(r':(X.+,Z[^:]+):', tested.path.name)[1].split(',')
    names = [f'FD{tested.fold}:{name}.pkl' for name in names]
    snapshots = [data / 'models' / 'snapshots' / f'SIJ_training_{tested.run.settings}' / name for name in names]
    coarse = [data / 'results' / f'coarse_testing_{tested.run.settings}' / name for name in names]
    volumes = [path / 'volumes' / f'{tested.run.epoch}_{number}.npz' for path in coarse]
    if not all(path.exists() for path in (*snapshots, *volumes)):
        return []
    checksum, settings = Checksums(data), read_settings(tested.path / 'run.json')
    for path in snapshots:
        if settings.get(f'snapshot {path.name}') not in (None, checksum(path)):
            raise ValueError(f'{path}: has changed since {tested.path.name} tested it: what it sees is not drawn')
    spacing = None if geometry is None else geometry.spacing
    weights = plane_weights('fast' if tested.run.settings.startswith('fast_') else 'published', spacing)
    score = coarse_probability([read_volume(path, image.shape) for path in volumes], weights)
    mask = tested.mask('R0', number, image.shape)
    margin, files = int(tested.run.settings.rpartition(',')[2]), []
    settings = PlaneSettings(intensity_window, tested.run.thickness, margin, torch.device('cpu'), 'fp32')
    for plane, path in zip(PLANES, snapshots if mask.any() else ()):
        files.append(f'{folder.name}/{case_id}_{plane}_seen.png')
        tester = PlaneTester(plane, [path], 'F', settings)
        write_panels(folder.parent / files[-1], tester, image, mask, score, anatomy(geometry), spacing)
    return files


def write_panels(path, tester, image, mask, score, found=None, spacing=None):
    """Write the picture of the slice along the tester's plane that has most of the mask.

    tester: PlaneTester of TEST 'F', whose first snapshot is shown; mask, score: of the round before the
    one shown; found: where the axes lead, see pictures.anatomy; spacing: mm, along the axes.
    """
    panels, box, j = look(tester, image, mask, score)
    axis = PLANES.index(tester.plane)
    rows, columns = rows_and_columns(axis, found)
    aspect = 1 if spacing is None else spacing[rows] / spacing[columns]
    inside = np.zeros(panels[IMAGE].shape, bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    upright = {name: standing(panel[None], rows, columns, found)[0] for name, panel in panels.items()}
    inside = standing(inside[None], rows, columns, found)[0]
    a0, b0 = (int(inside.any(axis=1 - k).argmax()) for k in (0, 1))
    height, width = (int(inside.any(axis=1 - k).sum()) for k in (0, 1))
    figure = Figure((12.5, 3.1), layout='constrained')
    for place, (axes, title) in enumerate(zip(figure.subplots(1, len(TITLES)), TITLES)):
        panel = upright[title]
        if title == SEEN:
            panel = panel[a0 : a0 + height, b0 : b0 + width]
        ranges = (None, None) if title in (SALIENCY, SEEN) else (0, 1)
        colours = 'gray' if title in (IMAGE, SEEN) else 'magma'
        shown = axes.imshow(panel, cmap=colours, vmin=ranges[0], vmax=ranges[1], aspect=aspect, interpolation='nearest')
        figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02).ax.tick_params(labelsize=6)
        if title != SEEN:
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
        net.fine_windows(weighted, mask >= 0.5, empty=0)[0, middle],
    )
    panels = dict(zip(TITLES, (array.float().cpu().numpy() for array in arrays)))
    return panels, bounding_box(mask[0] >= 0.5, net.margins()), j
