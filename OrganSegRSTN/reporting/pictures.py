"""The report's pictures: charts (SVG), and slices (JPEG) with contours of masks (SVG paths)."""

import math

import contourpy
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from reporting.measures import joint_box
from running.data_folder import GOOD_LOSS, PLANES, plane_view
from utils import to_unit

COLOURS = {'label': '#56b4e9', 'prediction': '#e69f00', 'coarse': '#cc79a7'}  # safe for the colour-blind
INK, FAINT, GREEN = '#1f2933', '#9aa5b1', '#2e7d32'
STYLE = {
    'svg.hashsalt': 'report',  # the same picture is the same file
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': FAINT,
    'axes.labelcolor': INK,
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
}


def write_chart(path, draw, size, *args):
    """Draw a chart of `size` (inches) by draw(axes, *args) and write it as SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout='constrained')
        draw(figure.add_subplot(), *args)
        figure.savefig(path, format='svg', metadata={'Date': None})


def draw_losses(axes, log):
    """Draw the loss by epoch, mode by mode; of the published recipe also what its README asks for."""
    start = 0
    for mode, good in GOOD_LOSS.items():
        epochs = sorted({epoch for m, epoch in [*log.steps, *log.epochs] if m == mode})
        for place, epoch in enumerate(epochs, start):
            steps = thinned(log.steps.get((mode, epoch), []), 60)
            axes.plot(place + (np.arange(len(steps)) + 0.5) / max(len(steps), 1), steps, color=FAINT, lw=0.6)
        means = {i + 1: log.epochs[mode, epoch] for i, epoch in enumerate(epochs, start) if (mode, epoch) in log.epochs}
        for part, style in enumerate(('C0:', 'C1--', 'k-')):
            axes.plot(list(means), [loss[part] for loss in means.values()], style, lw=1.4, marker='.', ms=4)
        if not epochs:
            continue
        end = start + len(epochs)
        if log.recipe == 'published':
            axes.hlines(good, start, end, color=GREEN, lw=1.4)
            axes.text(start + 0.05, good, f'{good:g}', color=GREEN, va='bottom', size=7)
        axes.text((start + end) / 2, 1.03, mode, ha='center', weight='bold', transform=axes.get_xaxis_transform())
        axes.axvline(end, color=FAINT, lw=0.5)
        start = end
    names = {'each step': (FAINT, '-'), 'coarse': ('C0', ':'), 'fine': ('C1', '--'), 'Avg': ('k', '-')}
    loss = '1 − Dice + cross-entropy'
    if log.recipe == 'published':
        names, loss = names | {'asked for': (GREEN, '-')}, '1 − Dice'
    for name, (colour, style) in names.items():
        axes.plot([], [], color=colour, ls=style, label=name)
    axes.legend(frameon=False, fontsize=7, ncols=2, loc='upper right')
    axes.set(xlabel='epoch', ylabel=f'loss ({loss})', xlim=(0, max(start, 1)))
    axes.set_ylim(0, 1.05 if log.recipe == 'published' else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def thinned(values, most):
    """Return means of at most `most` groups of neighbouring values."""
    groups = np.array_split(values, most) if len(values) > most else [[value] for value in values]
    return [float(np.mean(group)) for group in groups]


def draw_rounds(axes, cases):
    """Draw the DSC by round of each case, and the mean; a case that has stopped keeps its last."""
    rounds = max(map(len, cases))
    filled = np.array([case + [case[-1]] * (rounds - len(case)) for case in cases]) * 100
    axes.plot(filled.T, color=FAINT, lw=0.8)
    axes.plot([], [], color=FAINT, lw=0.8, label='a case')
    axes.plot(np.nanmean(filled, axis=0), color=INK, lw=2.2, marker='o', ms=4, label='mean')
    axes.legend(frameon=False, loc='lower right')
    axes.set(xlabel='round', ylabel='DSC (%)', xlim=(-0.2, max(rounds - 1, 1) + 0.2), ylim=(-2, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_gain(axes, cases):
    """Draw coarse against coarse to fine of [(name, coarse DSC, final DSC)], the lowest first."""
    cases = sorted(cases, key=lambda case: (case[2], case[0]))
    names, coarse, final = zip(*cases)
    coarse, final, places = np.array(coarse) * 100, np.array(final) * 100, np.arange(len(cases))
    axes.vlines(places, coarse, final, color=FAINT, lw=1.2, zorder=1)
    axes.scatter(places, coarse, s=22, color='w', edgecolor=COLOURS['coarse'], lw=1.4, label='coarse (round 0)')
    axes.scatter(places, final, s=24, color=COLOURS['prediction'], label='coarse to fine')
    axes.legend(frameon=False, ncols=2, loc='lower left', bbox_to_anchor=(0, 1), borderpad=0)
    axes.set(ylabel='DSC (%)', ylim=(-2, 102), xlim=(-0.7, len(cases) - 0.3))
    name_cases(axes, names)


def name_cases(axes, names):
    """Write the names of cases under the places 0, 1, ... of a chart."""
    short = [name if len(name) <= 16 else f'{name[:15]}…' for name in names]
    size, angle = min(8, 540 / len(names)), 90 if len(names) > 8 else 0
    axes.set_xticks(np.arange(len(names)), short if size > 3 else [], rotation=angle, fontsize=size, parse_math=False)


def draw_differences(axes, cases):
    """Draw the paired differences of the DSC of [(name, difference)], in this order, and their mean."""
    names, differences = zip(*cases)
    differences = 100 * np.array(differences)
    colours = [COLOURS['prediction'] if value < 0 else COLOURS['label'] for value in differences]
    axes.bar(np.arange(len(names)), differences, color=colours, width=0.7)
    axes.axhline(0, color=INK, lw=0.8)
    axes.axhline(differences.mean(), color=FAINT, lw=1.2, ls='--', label=f'mean {differences.mean():+.2f}')
    axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), borderpad=0)
    axes.set(ylabel='difference of DSC (%)', xlim=(-0.7, len(names) - 0.3))
    name_cases(axes, names)


def draw_trust(axes, cases):
    """Draw predicted against true DSC of [(predicted, true, whether it is one of the worst)]."""
    predicted, true, worst = map(np.array, zip(*cases))
    low = max(100 * min(predicted.min(), true.min()) - 5, 0)
    axes.plot([low, 100], [low, 100], color=FAINT, lw=1, zorder=1)
    for marks, colour, name in (
        (~worst, INK, 'a case'),
        (worst, COLOURS['prediction'], 'a quarter of the cases: the worst'),
    ):
        axes.scatter(100 * predicted[marks], 100 * true[marks], s=22, color=colour, label=name)
    axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), borderpad=0)
    axes.set(xlabel='predicted DSC (%)', ylabel='true DSC (%)', xlim=(low, 100), ylim=(low, 100), aspect='equal')


MARGIN, LEAST = 12, 64  # voxels: around the box of label and prediction; at least shown along each axis
MOST_PIXELS = 256  # a side of a slice; a wider one is thinned
COLUMNS = 8  # of slices in a sheet
AS_PUBLISHED = [(1, -1), (0, -1), (2, -1)]  # rows to the back, columns to the left, slices downwards


def write_planes(folder, stem, image, masks, geometry, intensity_window, most_slices):
    """Write a case's slices around label and prediction along X, Y, Z; return what the page shows.

    image: (W, H, L) HU, shown in `intensity_window`; masks: any of {label, prediction, coarse}, bool
    (W, H, L); geometry: its Geometry, or None for voxels, oriented as the published arrays.
    """
    box = joint_box([mask for name, mask in masks.items() if name != 'coarse'], image.shape, MARGIN, LEAST)
    volumes = {'image': to_unit(image[box], *intensity_window)} | {name: mask[box] for name, mask in masks.items()}
    return [write_plane(folder, stem, plane, volumes, box, image.shape, geometry, most_slices) for plane in PLANES]


def write_plane(folder, stem, plane, volumes, box, shape, geometry, most_slices):
    """Write the slices along a plane of volumes cut to `box` from a scan of `shape`.

    Writes folder/{stem}_{plane}.jpg, a sheet of slices, and {stem}_{plane}_0.jpg, the one shown first.
    """
    axis = PLANES.index(plane)
    found = anatomy(geometry)
    spacing = np.ones(3) if geometry is None else geometry.spacing
    rows, columns = rows_and_columns(axis, found)
    seen = {name: upright(volume, plane, rows, columns, found) for name, volume in volumes.items()}
    places, first = chosen_slices(seen, most_slices)
    stride = math.ceil(max(seen['image'].shape[1:]) / MOST_PIXELS)
    seen = {name: view[places][:, ::stride, ::stride] for name, view in seen.items()}
    image = seen.pop('image')
    sheet, poster = f'{stem}_{plane}.jpg', f'{stem}_{plane}_0.jpg'
    write_sheet(folder / sheet, image)
    write_sheet(folder / poster, image[first : first + 1])
    height, width = image.shape[1:]
    return {
        'plane': plane,
        'view': ('sagittal', 'coronal', 'axial')[found[axis][0]] if found else '',
        'sheet': f'{folder.name}/{sheet}',
        'poster': f'{folder.name}/{poster}',  # the slice that is shown first
        'first': first,  # its place among the slices
        'numbers': [int(j) + box[axis].start for j in places],  # of the slices, as in images_X/CASE/0000.npy
        'slices': shape[axis],  # of the whole volume
        'remarks': remarks(found and (found[rows][0], found[columns][0]), box, shape, len(places), axis, stride),
        'size': (width, height),  # pixels
        'shown': (float(width * stride * spacing[columns]), float(height * stride * spacing[rows])),  # mm or voxels
        'contours': {name: [contour_path(mask) for mask in view] for name, view in seen.items()},  # SVG, half pixels
    }


def anatomy(geometry):
    """Return [(0 R, 1 A or 2 S, 1 if the axis leads there, -1 if away)] of the three axes, or None."""
    if geometry is None or geometry.holds != 'position':
        return None
    cosines = geometry.affine[:3, :3] / geometry.spacing
    world = np.abs(cosines).argmax(axis=0)
    if sorted(world) != [0, 1, 2]:
        return None
    return [(int(w), int(np.sign(cosines[w, a]))) for a, w in enumerate(world)]


def remarks(world, box, shape, count, axis, stride):
    """Return the remarks on a picture: where up and left are (`world`: axes of rows, columns), what is left out."""
    texts = []
    if world:
        texts.append(f'{"RAS"[world[0]]} up, {"RAS"[world[1]]} on the left')
    if any(side.stop - side.start < size for side, size in zip(box, shape)):
        texts.append(f'cropped around the organ, slices {box[axis].start} to {box[axis].stop - 1}')
    if count < box[axis].stop - box[axis].start:
        texts.append(f'{count} of these slices are kept')
    if stride > 1:
        texts.append(f'1 pixel in {stride}')
    return texts


def upright(volume, plane, rows, columns, found):
    """Return the slices (N, rows, columns) along a plane, head or front up, the patient's right on the left."""
    return standing(plane_view(volume, plane), rows, columns, found)


def rows_and_columns(axis, found):
    """Return the axes that run along rows and columns of the slices along `axis`, so that head or front is up."""
    return sorted({0, 1, 2} - {axis}, key=lambda a: -(found or AS_PUBLISHED)[a][0])


def standing(view, rows, columns, found):
    """Return the slices (N, A, B) with head or front up and the patient's right on the left; see rows_and_columns."""
    view = view if rows < columns else view.swapaxes(1, 2)
    flips = [slice(None, None, -1 if found and found[axis][1] > 0 else 1) for axis in (rows, columns)]
    return view[:, flips[0], flips[1]]


def chosen_slices(seen, most):
    """Return (places of at most `most` slices at equal steps, which of them to show first).

    The first is where label and prediction differ most; without one of them, where the other is largest.
    """
    masks = [seen[name] for name in ('label', 'prediction') if name in seen]
    slices = len(seen['image'])
    counts = np.logical_xor.reduce(masks).sum(axis=(1, 2)) if masks else np.zeros(slices)
    worst = int(counts.argmax()) if counts.any() else slices // 2
    step = math.ceil(slices / most)
    return np.arange(worst % step, slices, step), worst // step


def write_sheet(path, slices):
    """Write slices (N, A, B) in [0, 1] side by side, COLUMNS in a row, as one grey JPEG."""
    count, height, width = slices.shape
    columns = min(COLUMNS, count)
    sheet = np.zeros((math.ceil(count / columns) * height, columns * width), np.uint8)
    for j, picture in enumerate(slices):
        row, column = divmod(j, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = np.round(picture * 255)
    Image.fromarray(sheet).save(path, quality=82, optimize=True)


def contour_path(mask):
    """Return the outlines of a mask (A, B) as an SVG path in half pixels."""
    if not mask.any():
        return ''
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    return ''.join(closed_path(np.round(2 * line - 1).astype(int)) for line in lines)


def closed_path(points):
    """Return a closed line through points (N, 2), whole numbers, the last one the first, as an SVG path."""
    steps = np.diff(points, axis=0)
    turns = np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1
    kept = points[np.r_[0, turns]]
    moves = ' '.join(f'{x} {y}' for x, y in np.diff(kept, axis=0))
    return f'M{kept[0][0]} {kept[0][1]}l{moves}z' if moves else ''
