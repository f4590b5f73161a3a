"""Write a small synthetic cohort as raw data, laid out like NIH Pancreas-CT: the built-in demo.

Each case is an upper abdomen with its own anatomy: OUT/DOI/PANCREAS_0001/STUDY/SERIES/000000.dcm
... (CT slices, 16 bit, slope 1, intercept -1024, z decreasing with InstanceNumber) and
OUT/TCIA_pancreas_labels-02-05-2017/label0001.nii.gz. The target, organ 1, is a small bent pancreas
between duodenum, bowel and stomach of nearly the same HU. The same arguments give the same bytes.
Usage:

    python make_phantom.py OUT [--cases 8] [--size 96 96 40] [--seed 0] [--target_only]
"""

import gzip
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), '..', 'OrganSegRSTN'))
try:
    import nibabel as nib
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    from scipy import ndimage

    from running.arguments import Parser, whole
    from running.files import atomic_write, errors_naming, locked
    from running.script import run
except ModuleNotFoundError as error:
    sys.exit(f'make_phantom.py: error: {error}; install requirements.txt, and run this script where the repository has '
             'it: python REPOSITORY/DATA2NPY/make_phantom.py OUT')  # fmt: skip

PANCREAS, DUODENUM, STOMACH, LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, AORTA = range(1, 9)
FIELD_MM = np.array([316.8, 316.8, 144.0])  # what a volume covers along its rows' axis, columns' axis and slices
INTERCEPT = -1024
NOISE_HU = 10.0
LABELS = 'TCIA_pancreas_labels-02-05-2017'
SETTINGS = 'phantom.txt'


# --- drawing -------------------------------------------------------------------------------------------------------


class Canvas:
    """A volume to draw on: `hu` float32 and `label` uint8, both (rows, columns, slices).

    A shape is a field of signed distances in mm, negative inside. Coordinates are y (to the back),
    x (to the patient's left) and z (downwards) from the volume's centre. A smooth random field bends
    them, so that no two cases are alike.
    """

    def __init__(self, size, rng):
        self.rng = rng
        self.spacing = FIELD_MM / size
        self.hu = np.full(size, -1000, np.float32)
        self.label = np.zeros(size, np.uint8)
        axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, self.spacing)]
        straight = np.stack(np.meshgrid(*axes, indexing='ij')).astype(np.float32)
        self.grid = np.stack([axis + self.field(30) * 4 for axis in straight])

    def field(self, smooth_mm):
        """Return random values of mean 0 and deviation 1, smooth over about `smooth_mm`."""
        noise = self.rng.standard_normal(self.hu.shape, np.float32)
        noise = ndimage.gaussian_filter(noise, smooth_mm / self.spacing, mode='reflect')
        return (noise - noise.mean()) / noise.std()

    def near(self, values, deviation):
        """Return the values with normal noise added."""
        return np.asarray(values, float) + self.rng.normal(0, deviation, np.shape(values))

    def paint(self, distance, hu, label=None, texture=0.0):
        """Fill the shape `distance` with `hu`; a border voxel mixes both sides.

        The voxels get the organ `label` (0: none); without a label they keep their own.
        """
        cover = np.clip(0.5 - distance / (1.3 * self.spacing.mean()), 0, 1)
        if texture:
            hu = hu + texture * self.field(7)
        self.hu += cover * (hu - self.hu)
        if label is not None:
            self.label[cover >= 0.5] = label

    def ellipsoid(self, centre, radii):
        """Return the distance to an ellipsoid (a good approximation near its surface)."""
        centre, radii = np.float32(centre), np.float32(radii)
        offset = [(axis - c) / r for axis, c, r in zip(self.grid, centre, radii)]
        scaled = np.sqrt(sum(o * o for o in offset))
        slope = np.sqrt(sum((o / r) ** 2 for o, r in zip(offset, radii)))
        return scaled * (scaled - 1) / np.maximum(slope, 1e-6)

    def tube(self, points, radii):
        """Return the distance to a tube along `points` [(y, x, z), ...] with these `radii`; inf where it is far."""
        radii = np.broadcast_to(np.float32(radii), len(points))
        far = radii.max() + self.spacing.mean() + 20  # with room for what is added to the distance
        ends = points.min(0) - far, points.max(0) + far
        near = np.all([(axis >= low) & (axis <= high) for axis, low, high in zip(self.grid, *ends)], axis=0)
        grid, nearest = self.grid[:, near], np.inf
        for a, b, start, end in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            along = sum((axis - p) * d for axis, p, d in zip(grid, a, b - a)) / np.dot(b - a, b - a)
            along = np.clip(along, 0, 1)
            off = sum((axis - (p + along * d)) ** 2 for axis, p, d in zip(grid, a, b - a))
            nearest = np.minimum(nearest, np.sqrt(off) - (start + along * (end - start)))
        distance = np.full(self.hu.shape, np.inf, np.float32)
        distance[near] = nearest
        return distance


def curve(points, steps=4):
    """Return a smooth curve through the points (N, 3), `steps` pieces between two (Catmull-Rom)."""
    points = np.asarray(points, float)
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        b + t / 2 * (c - a) + t**2 / 2 * (2 * a - 5 * b + 4 * c - d) + t**3 / 2 * (3 * b - a - 3 * c + d)
        for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:])
    ]
    return np.concatenate([*pieces, points[-1:]]).astype(np.float32)


# --- anatomy: all lengths in mm, points as (y to the back, x to the left, z downwards) ------------------------------


def draw_body(canvas):
    """Draw skin, fat, the wall with ribs, spine and back muscles; return the wall's inside."""
    rng, (y, x, z) = canvas.rng, canvas.grid
    radii = np.array([rng.uniform(100, 112), rng.uniform(138, 152), 1e4])
    fat = rng.uniform(11, 20)
    canvas.paint(canvas.ellipsoid((0, 0, 0), radii), -98, texture=7)
    outside = canvas.ellipsoid((0, 0, 0), radii - fat)
    canvas.paint(outside, 57, texture=8)
    steps = np.abs(np.mod(z + 120 * np.arctan2(np.abs(x), y) / np.pi + rng.uniform(0, 32), 32) - 16)
    canvas.paint(np.maximum(np.abs(outside + 6) - 4, steps - 4.5), 380)
    canvas.paint(outside + 12, -95, texture=12)
    for side in (-1, 1):
        canvas.paint(canvas.ellipsoid((80, 36 * side, 0), (17, 30, 1e4)), 58, texture=8)
        canvas.paint(canvas.ellipsoid((54, 34 * side, 30), (15, 14, 60)), 58, texture=8)
    disc = np.abs(np.mod(z + rng.uniform(0, 36), 36) - 18) - 13
    vertebra = canvas.ellipsoid((58, 0, 0), (19, 23, 1e4))
    canvas.paint(vertebra, 85, texture=8)
    canvas.paint(np.maximum(vertebra, disc), 430, texture=20)
    canvas.paint(np.maximum(vertebra + 5, disc + 4), 215, texture=30)
    canvas.paint(canvas.ellipsoid((86, 0, 0), (13, 15, 1e4)), 420, texture=30)
    canvas.paint(canvas.ellipsoid((83, 0, 0), (8, 9, 1e4)), 35)
    return outside + 13


def draw_large_organs(canvas, wall):
    """Draw liver, spleen, kidneys and stomach, all inside the wall."""
    rng, near = canvas.rng, canvas.near
    bumps = 2.5 * canvas.field(15)
    right = canvas.ellipsoid(near((-2, -84, -22), 4), near((74, 62, 72), 3))
    left = canvas.ellipsoid(near((-48, -30, -45), 4), near((34, 62, 36), 3))
    liver = np.maximum(np.minimum(right, left) + bumps, wall)
    canvas.paint(liver, rng.uniform(106, 116), LIVER, texture=7)
    canvas.paint(np.maximum(np.abs(canvas.field(14)) * 26 - 2.2, liver + 9), 150)
    spleen = canvas.ellipsoid(near((30, 104, -38), 4), near((42, 27, 44), 3)) + bumps
    canvas.paint(np.maximum(spleen, wall), rng.uniform(118, 130), SPLEEN, texture=7)
    for side, label in ((-1, RIGHT_KIDNEY), (1, LEFT_KIDNEY)):
        centre, radii = near((50, 68 * side, 34 - 8 * side), 4), near((25, 25, 48), 2)
        canvas.paint(canvas.ellipsoid(centre, radii) + bumps / 2, rng.uniform(165, 185), label, texture=9)
        canvas.paint(canvas.ellipsoid(centre - (4, 9 * side, 0), radii * (0.35, 0.5, 0.5)), -40, texture=20)
    centre, radii = near((-52, 44, -34), 5), near((32, 46, 40), 3)
    stomach = np.maximum(canvas.ellipsoid(centre, radii) + bumps, wall)
    canvas.paint(stomach, rng.uniform(78, 95), STOMACH, texture=10)
    canvas.paint(stomach + 9, rng.uniform(15, 45), texture=8)
    level = canvas.grid[0] - (centre[0] - radii[0] * rng.uniform(0.2, 0.6))
    canvas.paint(np.maximum(stomach + 9, level), -950)


def draw_bowel(canvas, wall):
    """Draw loops of small bowel below and beside the pancreas, and the colon with its air."""
    rng, near = canvas.rng, canvas.near
    low, high = [(-58, -50, 34), (-22, 15, -8)], [(-2, 80, 75), (16, 80, 34)]  # below, and beside body and tail
    for i in range(14):
        middle = rng.uniform(low[i > 8], high[i > 8])
        loop = canvas.tube(curve(middle + rng.normal(0, 14, (4, 3))), rng.uniform(9, 13))
        canvas.paint(np.maximum(loop, wall), rng.uniform(70, 112), 0, texture=12)
        canvas.paint(loop + 7, rng.uniform(20, 70), texture=10)
    for points in (
        near([(-40, -98, 40), (-76, -40, 52), (-80, 20, 44), (-66, 70, 30)], 4),
        near([(30, 108, 0), (40, 112, 30), (32, 108, 80)], 4),
    ):
        colon = np.maximum(canvas.tube(curve(points), 13 + 2 * np.sin(1.5 * np.arange(4 * len(points) - 3))), wall)
        canvas.paint(colon, 65, 0, texture=8)
        canvas.paint(colon + 5, -120, texture=130)
        canvas.paint(np.maximum(colon + 5, canvas.field(12) * 8), -850)


def draw_pancreas_and_neighbours(canvas):
    """Draw the great vessels, the duodenum around the head, the target, and the veins behind it."""
    rng, near = canvas.rng, canvas.near
    canvas.paint(canvas.tube(curve(near([(28, 9, -90), (27, 8, 0), (28, 6, 90)], 2)), 9.5), 185, AORTA, texture=5)
    canvas.paint(canvas.tube(curve(near([(26, -20, -90), (28, -18, 0), (30, -16, 90)], 2)), 11), 138, 0, texture=5)
    shift = rng.normal(0, (4, 5, 4))
    path = [(6, -32, 30), (-6, -22, 14), (-15, -2, 3), (-9, 22, -4), (2, 46, -10), (16, 68, -20)] + shift
    path = curve(near(path, 2.5))
    radii = np.interp(np.linspace(0, 5, len(path)), range(6), near((21, 18, 16.5, 17, 17, 14), 0.8))
    around = [(-26, -34, 2), (-10, -62, 10), (14, -64, 32), (26, -44, 56), (16, -8, 60), (0, 24, 46), (-8, 44, 30)]
    duodenum = canvas.tube(curve(near(around + shift, 2.5)), 11.5) + 1.2 * canvas.field(10)
    canvas.paint(duodenum, rng.uniform(66, 88), DUODENUM, texture=12)
    canvas.paint(duodenum + 7, rng.uniform(45, 80), texture=12)
    lobules = 1.5 * canvas.field(9)
    canvas.paint(canvas.tube(path, radii) + lobules, rng.uniform(91, 101), PANCREAS, texture=12)
    vein = [(6, -12, 40), (7, -13, 22), (6, 4, 8), (10, 26, 2), (18, 48, -4), (30, 72, -16)] + shift
    free = canvas.label != PANCREAS
    canvas.paint(np.where(free, canvas.tube(curve(vein), 5.5), 10), 152, 0)


def make_case(size, rng):
    """Return one anatomy (hu int16, label uint8), both (rows, columns, slices), from the top."""
    canvas = Canvas(size, rng)
    wall = draw_body(canvas)
    draw_large_organs(canvas, wall)
    draw_bowel(canvas, wall)
    draw_pancreas_and_neighbours(canvas)
    blurred = ndimage.gaussian_filter(canvas.hu, 0.45)
    grain = ndimage.gaussian_filter(rng.standard_normal(size, np.float32), 0.6)
    noisy = blurred + NOISE_HU / grain.std() * grain
    return np.clip(np.rint(noisy), INTERCEPT, 3071).astype(np.int16), canvas.label


# --- raw data ------------------------------------------------------------------------------------------------------


def write_series(folder, hu, spacing, case, uid):
    """Write hu (rows, columns, slices) as folder/STUDY/SERIES/000000.dcm ..., from the top."""
    study, series, frame = uid('study'), uid('series'), uid('frame')
    folder = folder / study / series
    folder.mkdir(parents=True)
    for k in range(hu.shape[2]):
        slice_ = Dataset()
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, uid('slice', k)
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.Modality, slice_.PatientName, slice_.PatientID = 'CT', f'PHANTOM^{case}', f'PANCREAS_{case}'
        slice_.StudyDate, slice_.StudyTime, slice_.SeriesDescription = '20180101', '000000', 'made-up abdomen'
        slice_.StudyID, slice_.SeriesNumber, slice_.InstanceNumber = '1', 1, k + 1
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [f'{v:.6g}' for v in position(spacing, hu.shape, k)]
        slice_.PixelSpacing = [f'{step:.6g}' for step in spacing[:2]]
        slice_.SliceThickness = f'{spacing[2]:.6g}'
        slice_.Rows, slice_.Columns = hu.shape[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, 'MONOCHROME2'
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, INTERCEPT, 'HU'
        slice_.PixelData = (hu[:, :, k] - INTERCEPT).astype('<i2').tobytes()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.file_meta.ImplementationClassUID = uid('program')
        slice_.save_as(folder / f'{k:06}.dcm', enforce_file_format=True)


def position(spacing, size, k):
    """Return the LPS coordinates (mm) of the first pixel of slice k."""
    return -(size[1] - 1) / 2 * spacing[1], -(size[0] - 1) / 2 * spacing[0], 1000 - k * spacing[2]


def write_label(path, label, spacing):
    """Write the label as .nii.gz, paired with the image by transpose(1, 0, 2) and by its affine."""
    affine = np.diag([-spacing[1], -spacing[0], -spacing[2], 1])  # columns to the left, rows to the back, slices down
    affine[:3, 3] = np.array([-1, -1, 1]) * position(spacing, label.shape, 0)
    nifti = nib.Nifti1Image(label.transpose(1, 0, 2), affine)
    nifti.set_qform(affine, code='scanner')
    nifti.set_sform(affine, code='scanner')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nifti.to_bytes(), mtime=0))


def write_case(folder, number, args):
    """Write one case of the cohort and print its size and target."""
    case = f'{number:04}'
    hu, label = make_case(tuple(args.size), np.random.default_rng([args.seed, number]))
    if args.target_only:
        label[label != PANCREAS] = 0
    spacing = FIELD_MM / args.size

    def uid(*what):
        return generate_uid(entropy_srcs=[f'OrganSegRSTN phantom {args.seed} {args.size} {case} {what}'])

    write_series(folder / 'DOI' / f'PANCREAS_{case}', hu, spacing, case, uid)
    write_label(folder / LABELS / f'label{case}.nii.gz', label, spacing)
    share = 100 * np.mean(label == PANCREAS)
    print(f'{case}: {" x ".join(map(str, hu.shape))}, target {share:.2f} % of the volume', flush=True)


def arguments():
    parser = Parser(__doc__)
    parser.add_argument('out', metavar='OUT', help='the raw folder to write')
    parser.add_argument('--cases', type=whole(1, 9999), default=8, help='number of cases (default 8)')
    size = ('ROWS', 'COLUMNS', 'SLICES')
    parser.add_argument('--size', type=whole(8, 1024), nargs=3, default=[96, 96, 40], metavar=size,
                        help='voxels of a case (default 96 96 40)')  # fmt: skip
    parser.add_argument('--seed', type=whole(0), default=0, help='random seed of the anatomies (default 0)')
    parser.add_argument('--target_only', action='store_true', help='label organ 1 only, as NIH does')
    return parser.parse_args()


def main():
    args = arguments()
    out = Path(args.out)
    settings = f'{args.cases} cases of {args.size}, seed {args.seed}, target_only {args.target_only}\n'
    finished = out / SETTINGS
    if finished.exists() and finished.read_text() == settings:
        print(f'{out} already holds this phantom')
        return 0
    for name in ('DOI', LABELS):
        if (out / name).exists():
            raise FileExistsError(f'{out / name}: already exists; name another folder, or remove this one first')
    unfinished = out / f'.phantom.{os.getpid()}.part'
    with locked(out / '.lock', '.phantom.*.part'), errors_naming(unfinished):
        try:
            for number in range(1, args.cases + 1):
                write_case(unfinished, number, args)
            for name in ('DOI', LABELS):
                (unfinished / name).rename(out / name)
            with atomic_write(finished, 'w') as file:
                file.write(settings)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return 0


if __name__ == '__main__':
    run(main)
