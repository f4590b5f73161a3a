"""Check a data folder before a long training. Usage:

    python check_data.py data_path organ_number low_range high_range

Read images/, labels/ and geometry/. Print a line for each case, warnings (look at these cases) and
errors (init.py or the training would stop; exit code 1). Write data_path/check_data.png, or
check_data_1.png ... for several organs: of each case the axial slice with most of the organ, its
contour in red.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from running import arguments, script  # before packages: it names a missing one

# isort: split
import numpy as np

from running.data_folder import case_names, check_case
from running.files import atomic_write, load_array
from scans.geometry import Geometry, axis_codes, check_partners, crc32, geometry_file, known, load_geometry
from scans.voxels import intensity_doubts, share_outside
from utils import is_organ

OUTLIER = 3.5  # robust z-score of an outlier (Iglewicz and Hoaglin, 1993)
CLEARLY = 0.03  # correlation that a flip must gain
CUT_OFF = 0.25  # share of an organ that the intensity window may clip
FEWEST = 4  # cases to compare


class Organ(NamedTuple):
    """An organ in a case; where it has no voxels, all else but `picture` is nan."""

    voxels: int
    ml: float  # nan if the spacing is unknown
    mean: float  # HU
    clipped: float  # share of its voxels outside the intensity window
    centre: tuple  # centroid, from 0 to 1 along each axis
    picture: tuple  # (image, mask) of the axial slice with most of it, both (W, H)


class CaseFigures(NamedTuple):
    """A case measured; `organs` holds an Organ for organ 1, 2, ..."""

    name: str
    shape: tuple
    geometry: Geometry | None
    limits: tuple  # lowest and highest HU
    clipped: float  # share of voxels outside the intensity window
    organs: list
    thumbnail: np.ndarray  # (24, 24, 24) samples of the image, clipped to the window
    crc32: int  # of the image

    @property
    def spacing(self):
        """Return `0.8 x 0.8 x 1` in mm, or `?`."""
        return ' x '.join(f'{s:.3g}' for s in self.geometry.spacing) if known(self.geometry) else '?'

    @property
    def height(self):
        """Return the height of an axial slice over its width in mm (rows run down)."""
        step = self.geometry.spacing if known(self.geometry) else np.ones(3)
        return self.shape[0] * step[0] / (self.shape[1] * step[1])


class Remarks(dict):
    """{remark: [case name, ...]}; no names if it is about the whole folder."""

    def add(self, remark, *names):
        self.setdefault(str(remark), []).extend(names)

    def show(self, kind):
        """Print each remark with the first of its cases."""
        for remark, names in self.items():
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            print(f'{kind}: {", ".join(names[:3])}{more}: {remark}' if names else f'{kind}: {remark}')


def main():
    args = arguments.parse(arguments.stage_parser(__doc__, 'data_path organ_number low_range high_range'.split()))
    errors, warnings, cases = Remarks(), Remarks(), []
    for name in case_names(Path(args.data_path)):
        try:
            cases.append(measure_case(args, name, warnings))
        except (ValueError, OSError) as error:
            errors.add(error)
    compare_geometry(cases, warnings)
    compare_images(cases, warnings)
    print_cases(cases)
    for organ_ID in range(1, args.organ_number + 1):
        print_organ(cases, organ_ID)
        compare_organs(cases, organ_ID, warnings)
    if cases and not any(organ.voxels for case in cases for organ in case.organs):
        errors.add(f'no label holds an organ from 1 to {args.organ_number}')
    warnings.show('warning')
    errors.show('error')
    print(f'{len(cases)} cases looked at; warnings: {len(warnings)}, errors: {len(errors)}')
    for organ_ID in range(1, args.organ_number + 1) if cases else ():
        contact_sheet(args, cases, organ_ID)
    return 1 if errors else 0


# --- one case ------------------------------------------------------------------------------------------------------


def measure_case(args, name, warnings):
    """Return the CaseFigures of a case, add its warnings; raise what init.py would stop at."""
    data, intensity_window = Path(args.data_path), (args.low_range, args.high_range)
    image, label = (load_array(data / kind / f'{name}.npy') for kind in ('images', 'labels'))
    check_partners(data, name, image, label)
    label = check_case(name, image, label, args.organ_number)
    geometry = load_geometry(geometry_file(data, name))
    for doubt in intensity_doubts(image, *intensity_window):
        warnings.add(doubt, name)
    organ_IDs = range(1, args.organ_number + 1)
    organs = [measure_organ(image, is_organ(label, organ_ID), geometry, intensity_window) for organ_ID in organ_IDs]
    for organ_ID, organ in zip(organ_IDs, organs):
        if not organ.voxels:
            warnings.add(f'no organ {organ_ID} in its label', name)
        elif organ.clipped > CUT_OFF:
            warnings.add(f'over {CUT_OFF:.0%} of organ {organ_ID} lie outside the intensity window', name)
    evenly = np.ix_(*(((np.arange(24) + 0.5) * n / 24).astype(int) for n in image.shape))
    thumbnail = np.clip(image[evenly], *intensity_window).astype(np.float32)
    limits, clipped = (image.min(), image.max()), share_outside(image, *intensity_window)
    return CaseFigures(name, image.shape, geometry, limits, clipped, organs, thumbnail, crc32(image))


def measure_organ(image, mask, geometry, intensity_window):
    """Return the Organ where `mask` (W, H, L) is True."""
    sums = [np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    voxels = int(sums[2].sum())
    k = int(sums[2].argmax()) if voxels else mask.shape[2] // 2
    picture = np.clip(image[:, :, k], *intensity_window).astype(np.float32), mask[:, :, k].copy()
    if not voxels:
        return Organ(0, np.nan, np.nan, np.nan, (np.nan,) * 3, picture)
    inside = image[mask]
    ml = voxels * geometry.voxel_ml if known(geometry) else np.nan
    centre = tuple(float((np.arange(len(s)) + 0.5) @ s / voxels / len(s)) for s in sums)
    clipped = share_outside(inside, *intensity_window)
    return Organ(voxels, ml, float(inside.mean(dtype=np.float64)), clipped, centre, picture)


# --- a case among the others ---------------------------------------------------------------------------------------


def compare_geometry(cases, warnings):
    """Warn of cases whose axes or spacing differ from the others'."""
    if unknown := [case.name for case in cases if not known(case.geometry)]:
        warnings.add('no spacing known: sizes are in voxels', *unknown)
    cases = [case for case in cases if known(case.geometry)]
    if not cases:
        return
    codes = Counter(axis_codes(case.geometry) for case in cases)
    usual_codes = max(codes, key=codes.get)
    usual_spacing = np.median([case.geometry.spacing for case in cases], axis=0)
    for case in cases:
        ours, ratio = axis_codes(case.geometry), case.geometry.spacing / usual_spacing
        if ours and usual_codes and ours != usual_codes:
            warnings.add(
                f'axes run {ours}, in most cases {usual_codes}: turn the raw scan and convert it again', case.name
            )
        if max(ratio.max(), 1 / ratio.min()) > 2:
            warnings.add(f'spacing {case.spacing} mm, far from that of the others', case.name)


def compare_images(cases, warnings):
    """Warn of copies, and of cases that resemble the mean of the others more if they are flipped along an axis."""
    seen = {}
    for case in cases:
        if (first := seen.setdefault(case.crc32, case.name)) != case.name:
            warnings.add(
                f'the same image as {first}: a fold that trains on one and tests the other says little', case.name
            )
    total = sum(case.thumbnail for case in cases)
    for case in cases if len(cases) >= FEWEST else ():
        one, others = case.thumbnail, (total - case.thumbnail).ravel()
        turned = {'now': one} | {axis: np.flip(one, axis) for axis in range(3)}
        with np.errstate(invalid='ignore'):  # of an even image
            likeness = {axis: np.corrcoef(image.ravel(), others)[0, 1] for axis, image in turned.items()}
        for axis in range(3):
            if likeness[axis] > likeness['now'] + CLEARLY:
                gain = f'correlation with the others {likeness[axis]:.2f}, now {likeness["now"]:.2f}'
                warnings.add(f'flipped along axis {axis}? {gain}', case.name)


def compare_organs(cases, organ_ID, warnings):
    """Warn of cases whose organ differs from the others' in size, density or place."""
    present = [case for case in cases if case.organs[organ_ID - 1].voxels]
    if cases and not present:
        warnings.add(f'organ {organ_ID} is in no label: it cannot be trained on')
    if len(present) < FEWEST:
        return
    organs = [case.organs[organ_ID - 1] for case in present]
    ml, means, centres = (np.array([getattr(organ, name) for organ in organs]) for name in ('ml', 'mean', 'centre'))
    unit, sizes = ('ml', ml) if np.isfinite(ml).all() else ('voxels', np.array([organ.voxels for organ in organs]))
    for what, values, off in (
        (f'size in {unit}', sizes, robust_z(np.log(sizes), least=0.25)),
        ('mean HU', means, robust_z(means, least=8)),
        *((f'place along axis {axis}', c, robust_z(c, least=0.03)) for axis, c in enumerate(centres.T)),
    ):
        usual = np.median(values)
        for i in np.flatnonzero(np.abs(off) > OUTLIER):
            flipped = what.startswith('place') and abs(1 - values[i] - usual) < abs(values[i] - usual) / 2
            remark = f'unusual {what}, {values[i]:.4g} where {usual:.4g} is the median'
            remark += '; flipped along it?' if flipped else ''
            warnings.add(f'organ {organ_ID}: {remark}', present[i].name)


def robust_z(values, least):
    """Return how many robust standard deviations each value is from the median.

    least: the smallest deviation to measure by, in the values' unit, so that an even cohort has
    no outliers.
    """
    off = np.asarray(values, float) - np.median(values)
    return off / max(np.median(np.abs(off)) / 0.6745, least)


# --- what is shown -------------------------------------------------------------------------------------------------


def print_cases(cases):
    """Print size, spacing, axes, HU range and clipped share of each case."""
    print(f'{"case":<16}{"size":>18}{"spacing, mm":>22}{"axes":>6}{"HU":>16}{"clipped":>9}')
    for case in cases:
        size, limits = ' x '.join(map(str, case.shape)), ' to '.join(f'{value:g}' for value in case.limits)
        codes = axis_codes(case.geometry) or '?'
        print(f'{case.name:<16}{size:>18}{case.spacing:>22}{codes:>6}{limits:>16}{case.clipped:>9.0%}')


def print_organ(cases, organ_ID):
    """Print the organ's size, density and place in each case."""
    print(f'organ {organ_ID:<10}{"voxels":>10}{"ml":>9}{"mean HU":>9}{"clipped":>9}   centre, 0 to 1 along each axis')
    for case in cases:
        organ = case.organs[organ_ID - 1]
        centre = ' '.join(f'{place:.2f}' for place in organ.centre)
        figures = (
            f'{organ.ml:>9.1f}{organ.mean:>9.0f}{organ.clipped:>9.0%}   {centre}' if organ.voxels else '   missing'
        )
        print(f'{case.name:<16}{organ.voxels:>10}{figures}')


def contact_sheet(args, cases, organ_ID):
    """Write a PNG with a tile for each case: the organ's contour on its largest axial slice."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    columns = min(8, max(4, int(np.ceil(len(cases) ** 0.5))), len(cases))
    rows = -(-len(cases) // columns)
    inches = [2.6 * columns, (2.6 * np.median([case.height for case in cases]) + 0.3) * rows + 0.4]
    figure, grid = plt.subplots(rows, columns, figsize=inches, squeeze=False, dpi=110, layout='constrained')
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, case in zip(grid.flat, cases):
        draw_tile(axes, case, case.organs[organ_ID - 1], (args.low_range, args.high_range))
    title = f'organ {organ_ID}, window {args.low_range:g} to {args.high_range:g} HU, axial slices as stored'
    figure.suptitle(title, fontsize=10)
    path = Path(args.data_path, f'check_data_{organ_ID}.png' if args.organ_number > 1 else 'check_data.png')
    with atomic_write(path) as file:
        figure.savefig(file, format='png')
    plt.close(figure)
    print(f'written: {path}')


def draw_tile(axes, case, organ, intensity_window):
    """Draw an axial slice as stored, rows downwards, with the organ's contour."""
    image, mask = organ.picture
    low, high = intensity_window
    axes.imshow(image, cmap='gray', vmin=low, vmax=high, aspect=case.height * image.shape[1] / image.shape[0])
    if mask.any():
        axes.contour(mask, levels=[0.5], colors='red', linewidths=1)
    size = f'{organ.ml:.0f} ml' if np.isfinite(organ.ml) else f'{organ.voxels} voxels'
    axes.set_title(f'{case.name}: {f"{size}, {organ.mean:.0f} HU" if organ.voxels else "missing"}', fontsize=8, pad=2)


if __name__ == '__main__':
    script.run(main)
