"""Looks over a data folder before hours are spent on it: python check_data.py data_path organ_number low_range high_range

Reads images/, labels/ and geometry/. Prints a line a case, what is suspicious (a warning: look at it), and what init.py
or the training would stop at (an error, exit code 1). Writes data_path/check_data.png, or check_data_1.png ... for
several organs: of each case the axial slice that shows most of the organ, its contour in red.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from running import arguments, script
from running.data_folder import case_names, check_case
from running.files import atomic_write, load_array
from scans.converting import intensity_doubts, outside
from scans.geometry import Geometry, geometry_file, load_geometry
from scans.nifti import axis_codes, known
from utils import is_organ

OUTLIER = 3.5  # robust z-score from which a case stands out (Iglewicz and Hoaglin, 1993)
CLEARLY = 0.03  # of correlation, that a flip must be better by
CUT_OFF = 0.25  # share of an organ that the intensity window may clip
FEWEST = 4  # cases that make a cohort to stand out from


class Organ(NamedTuple):
    """An organ in a case; all but `voxels` are nan or None where it has none."""

    voxels: int
    ml: float  # nan where the spacing is unknown
    mean: float  # HU
    clipped: float  # share of its voxels outside the intensity window
    centre: tuple  # centroid, from 0 to 1 along each axis
    picture: tuple  # (image, mask) of the axial slice that shows most of it, both (W, H)


class Case(NamedTuple):
    """What was seen of a case; `organs` holds an Organ for organ 1, 2, ..."""

    name: str
    shape: tuple
    geometry: Geometry | None
    limits: tuple  # lowest and highest HU
    clipped: float  # share of voxels outside the intensity window
    organs: list
    thumbnail: np.ndarray  # (24, 24, 24) samples of the image, clipped to the window


class Notes(dict):
    """{remark: [case name, ...]}; no names where it is about the whole folder."""

    def add(self, remark, *names):
        self.setdefault(str(remark), []).extend(names)

    def show(self, kind):
        """Print a line a remark, with the first cases that it is about."""
        for remark, names in self.items():
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            print(f'{kind}: {", ".join(names[:3])}{more}: {remark}' if names else f'{kind}: {remark}')

    def single_out(self, name, cases, organ_ID):
        """Whether there is a remark on this case, not on another organ, that does not hold for most of the cases."""
        return any(
            name in names
            and 2 * len(names) <= len(cases)
            and set(re.findall(r'organ (\d+)', remark)) <= {str(organ_ID)}
            for remark, names in self.items()
        )


def main():
    made = arguments.stage_parser(__doc__, 'data_path organ_number low_range high_range'.split())
    args = arguments.parse(made)
    errors, warnings = Notes(), Notes()
    cases = []
    for name in case_names(Path(args.data_path)):
        try:
            cases.append(look_at(args, name, warnings))
        except (ValueError, OSError) as error:
            errors.add(error)
    compare_geometry(cases, warnings)
    compare_images(cases, warnings)
    print_cases(cases)
    for organ_ID in range(1, args.organ_number + 1):
        print_organ(cases, organ_ID)
        compare_organs(cases, organ_ID, warnings)
        if cases and not any(case.organs[organ_ID - 1].voxels for case in cases):
            warnings.add(f'organ {organ_ID} is in no label: it cannot be trained on')
    if not any(organ.voxels for case in cases for organ in case.organs):
        errors.add('there is no organ in any label')
    for organ_ID in range(1, args.organ_number + 1) if cases else ():
        number = f'_{organ_ID}' if args.organ_number > 1 else ''
        contact_sheet(Path(args.data_path, f'check_data{number}.png'), cases, organ_ID, args, warnings)
    warnings.show('warning')
    errors.show('error')
    print(f'{len(cases)} cases looked at: {len(warnings)} kinds of warnings, {len(errors)} errors')
    return 1 if errors else 0


# --- one case ------------------------------------------------------------------------------------------------------


def look_at(args, name, warnings):
    """The Case of a name, its own warnings noted; ValueError or OSError where init.py would stop at it."""
    data, window = Path(args.data_path), (args.low_range, args.high_range)
    image, label = load_array(data / 'images' / f'{name}.npy'), load_array(data / 'labels' / f'{name}.npy')
    for kind, array, usual in (('image', image, np.int16), ('label', label, np.uint8)):
        if array.dtype != usual:
            warnings.add(f'the {kind} is {array.dtype}, usual is {np.dtype(usual)}', name)
    label = check_case(name, image, label, args.organ_number)
    geometry = load_geometry(geometry_file(data, name))
    for doubt in intensity_doubts(image, *window):
        warnings.add(doubt, name)
    organs = [measure(image, is_organ(label, i + 1), geometry, window) for i in range(args.organ_number)]
    for organ_ID, organ in enumerate(organs, 1):
        if not organ.voxels:
            warnings.add(f'no organ {organ_ID} in its label', name)
        elif organ.clipped > CUT_OFF:
            warnings.add(f'over {CUT_OFF:.0%} of organ {organ_ID} lie outside the intensity window', name)
    return Case(
        name, image.shape, geometry, (image.min(), image.max()), outside(image, *window), organs, sample(image, window)
    )


def sample(image, window, points=24):
    """(points, points, points) voxels of `image`, evenly spread, clipped to `window`, float32."""
    grid = [((np.arange(points) + 0.5) * n / points).astype(int) for n in image.shape]
    return np.clip(image[np.ix_(*grid)], *window).astype(np.float32)


def measure(image, mask, geometry, window):
    """The Organ where `mask` (W, H, L) is True."""
    areas = np.count_nonzero(mask, axis=(0, 1))
    voxels = int(areas.sum())
    k = int(areas.argmax()) if voxels else mask.shape[2] // 2
    picture = np.clip(image[:, :, k], *window).astype(np.float32), mask[:, :, k].copy()
    if not voxels:
        return Organ(0, 0.0, np.nan, np.nan, (np.nan,) * 3, picture)
    ml = voxels * abs(np.linalg.det(geometry.affine[:3, :3])) / 1000 if known(geometry) else np.nan
    inside = image[mask]
    sums = [np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    centre = tuple(float((np.arange(len(s)) + 0.5) @ s / voxels / len(s)) for s in sums)
    return Organ(voxels, ml, float(inside.mean(dtype=np.float64)), outside(inside, *window), centre, picture)


# --- a case among the others ---------------------------------------------------------------------------------------


def compare_geometry(cases, warnings):
    """Note the cases whose axes or spacing are not those of the others."""
    codes = Counter(axis_codes(case.geometry) for case in cases)
    unknown = [case.name for case in cases if not known(case.geometry)]
    if unknown:
        warnings.add('no spacing known: sizes are in voxels', *unknown)
    spacing = np.array([case.geometry.spacing for case in cases if known(case.geometry)])
    for case in cases:
        ours, usual = axis_codes(case.geometry), codes.most_common(1)[0][0]
        if ours and usual and ours != usual:
            warnings.add(f'axes run {ours}, in most cases {usual}: turn it before training', case.name)
        if known(case.geometry):
            ratio = case.geometry.spacing / np.median(spacing, axis=0)
            if max(ratio.max(), 1 / ratio.min()) > 2:
                warnings.add(f'spacing {spacing_text(case)} mm, far from that of the others', case.name)


def compare_images(cases, warnings):
    """Note the cases that resemble the mean of the others more when they are flipped along an axis."""
    if len(cases) < FEWEST:
        return
    total = sum(case.thumbnail for case in cases)
    for case in cases:
        others = total - case.thumbnail
        straight = likeness(case.thumbnail, others)
        for axis in range(3):
            flipped = likeness(np.flip(case.thumbnail, axis), others)
            if flipped > straight + CLEARLY:
                warnings.add(f'flipped along axis {axis}? so it would resemble the others better '
                             f'(correlation {flipped:.2f}, now {straight:.2f})', case.name)  # fmt: skip


def likeness(one, other):
    """Correlation of two arrays of one shape; 0 where one of them is even."""
    return np.corrcoef(one.ravel(), other.ravel())[0, 1] if one.std() and other.std() else 0.0


def compare_organs(cases, organ_ID, warnings):
    """Note the cases whose organ is of another size, density or place than that of the others: a flip shows so."""
    cases = [case for case in cases if case.organs[organ_ID - 1].voxels]
    if len(cases) < FEWEST:
        return
    organs = [case.organs[organ_ID - 1] for case in cases]
    centres = np.array([organ.centre for organ in organs])
    sizes, unit = organ_sizes(organs)
    stand_out(cases, organ_ID, f'size in {unit}', np.log(sizes), 0.25, warnings, shown=np.exp)
    stand_out(cases, organ_ID, 'mean HU', [organ.mean for organ in organs], 8, warnings)
    for axis, places in enumerate(centres.T):
        stand_out(cases, organ_ID, f'place along axis {axis}', places, 0.03, warnings, mirror=lambda place: 1 - place)


def stand_out(cases, organ_ID, what, values, least, warnings, shown=float, mirror=None):
    """Note the cases whose value is an outlier, and where its `mirror` value would be none."""
    usual = np.median(values)
    for i in np.flatnonzero(np.abs(robust_z(values, least)) > OUTLIER):
        remark = f'organ {organ_ID}: unusual {what}, {shown(values[i]):.4g} where {shown(usual):.4g} is the median'
        if mirror and abs(mirror(values[i]) - usual) < abs(values[i] - usual) / 2:
            remark += '; flipped along it?'
        warnings.add(remark, cases[i].name)


def organ_sizes(organs):
    """(sizes, their unit): ml, or voxels where the spacing of one is not known."""
    in_ml = all(np.isfinite(organ.ml) for organ in organs)
    return [organ.ml if in_ml else organ.voxels for organ in organs], 'ml' if in_ml else 'voxels'


def robust_z(values, least):
    """How far each value is from the median, in standard deviations as the median deviation tells them.

    least: the smallest deviation to measure by, in the values' unit, so that an even cohort has no outliers.
    """
    off = np.asarray(values, float) - np.median(values)
    return off / max(np.median(np.abs(off)) / 0.6745, least)


# --- what is shown -------------------------------------------------------------------------------------------------


def print_cases(cases):
    """A line a case: size, spacing, axes, range and what the window clips."""
    print(f'{"case":<16}{"size":>18}{"spacing, mm":>22}{"axes":>6}{"HU":>16}{"clipped":>9}')
    for case in cases:
        size, values = ' x '.join(map(str, case.shape)), ' to '.join(f'{value:g}' for value in case.limits)
        print(f'{case.name:<16}{size:>18}{spacing_text(case):>22}{axis_codes(case.geometry) or "?":>6}{values:>16}'
              f'{case.clipped:>9.0%}')  # fmt: skip


def spacing_text(case):
    """`0.8 x 0.8 x 1`, in mm, or `?`."""
    return ' x '.join(f'{s:.3g}' for s in case.geometry.spacing) if known(case.geometry) else '?'


def print_organ(cases, organ_ID):
    """A line a case: the organ's size, density and place."""
    print(f'organ {organ_ID:<10}{"voxels":>10}{"ml":>9}{"mean HU":>9}{"clipped":>9}   centre, 0 to 1 along each axis')
    for case in cases:
        organ = case.organs[organ_ID - 1]
        if not organ.voxels:
            print(f'{case.name:<16}{0:>10}   missing')
            continue
        centre = ' '.join(f'{place:.2f}' for place in organ.centre)
        print(f'{case.name:<16}{organ.voxels:>10}{organ.ml:>9.1f}{organ.mean:>9.0f}{organ.clipped:>9.0%}   {centre}')


def contact_sheet(path, cases, organ_ID, args, warnings):
    """Write a PNG with a tile a case: the organ's contour on its largest axial slice; cases with warnings in orange."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    columns = min(8, max(4, int(np.ceil(len(cases) ** 0.5))), len(cases))
    rows = -(-len(cases) // columns)
    tile = np.array([2.6, 2.6 * np.median([height(case) for case in cases]) + 0.3])  # inches
    figure, grid = plt.subplots(
        rows, columns, figsize=tile * [columns, rows] + [0, 0.4], squeeze=False, dpi=110, layout='constrained'
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, case in zip(grid.flat, cases):
        draw_tile(
            axes, case, organ_ID, (args.low_range, args.high_range), warnings.single_out(case.name, cases, organ_ID)
        )
    figure.suptitle(
        f'organ {organ_ID}, window {args.low_range:g} to {args.high_range:g} HU, axial slices as stored; orange: has a warning of its own',
        fontsize=10,
    )
    with atomic_write(path) as file:
        figure.savefig(file, format='png')
    plt.close(figure)
    print(f'written: {path}')


def height(case):
    """Height of an axial slice over its width, in mm (rows run down)."""
    step = case.geometry.spacing if known(case.geometry) else np.ones(3)
    return case.shape[0] * step[0] / (case.shape[1] * step[1])


def draw_tile(axes, case, organ_ID, window, suspicious):
    """Draw a case's axial slice as stored, rows downwards, with the organ's contour."""
    organ = case.organs[organ_ID - 1]
    image, mask = organ.picture
    axes.imshow(
        image, cmap='gray', vmin=window[0], vmax=window[1], aspect=height(case) * image.shape[1] / image.shape[0]
    )
    if mask.any():
        axes.contour(mask, levels=[0.5], colors='red', linewidths=1)
    size = f'{organ.ml:.0f} ml' if np.isfinite(organ.ml) else f'{organ.voxels} voxels'
    text = f'{size}, {organ.mean:.0f} HU' if organ.voxels else 'missing'
    axes.set_title(f'{case.name}: {text}', fontsize=8, color='darkorange' if suspicious else 'black', pad=2)


if __name__ == '__main__':
    script.run(main)
