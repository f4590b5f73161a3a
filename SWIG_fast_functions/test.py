"""Check the built module `fast_functions` against numpy and scipy, then time it beside them (and cc3d, if installed).

Usage: python test.py [--no_timing]    Exit code 1 if anything differs. Takes about 15 seconds.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import fast_functions
import numpy as np
from scipy import ndimage

SHAPE = (512, 512, 240)  # voxels, an abdominal CT


def post_processing(F: np.ndarray, threshold: float = 0.5, top2: bool = False) -> np.ndarray:
    """Return the post-processed copy of a (X, Y, Z) uint8 mask, by scipy."""
    label, components = ndimage.label(F)
    if components == 0 or np.count_nonzero(F) >= F.size // 2:
        return F.copy()
    sizes = np.bincount(label.ravel())
    sizes[0] = 0  # the background
    largest = np.sort(sizes)[-2 if top2 and components > 1 else -1]
    kept = sizes >= threshold * largest
    kept[0] = False
    return F * kept[label]


def counts(A: np.ndarray, G: np.ndarray) -> list[int]:
    """Return |A|, |G| and |A and G|, by numpy."""
    return [int(np.count_nonzero(voxels)) for voxels in (A, G, np.logical_and(A, G))]


def fast_post_processing(F: np.ndarray, threshold: float = 0.5, top2: bool = False) -> np.ndarray:
    """Return the post-processed copy of a (X, Y, Z) uint8 mask, by the module."""
    F = F.copy()
    fast_functions.post_processing(F, F, threshold, top2)
    return F


def fast_counts(A: np.ndarray, G: np.ndarray) -> list[int]:
    """Return |A|, |G| and |A and G|, by the module."""
    P = np.zeros(3, np.uint32)
    fast_functions.DSC_computation(A, G, P)
    return P.tolist()


def literal_cases() -> int:
    """Return how many of the small cases, whose answers can be seen, are wrong."""
    row = np.array([[[3, 3, 3, 3, 0, 1, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0]]], np.uint8)
    half = np.array([[[3, 3, 3, 3, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0]]], np.uint8)
    largest = np.array([[[3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]], np.uint8)
    A, G = np.array([[1, 1, 0], [0, 2, 0]], np.uint8), np.array([[True, False, False], [True, True, False]])
    passed = (
        np.array_equal(fast_post_processing(row, 0.5), half),
        np.array_equal(fast_post_processing(row, 0.6), largest),
        np.array_equal(fast_post_processing(row, 0.5, top2=True), row),
        fast_counts(A, G) == [3, 3, 2],
    )
    return passed.count(False)


def random_cases(cases: int = 300) -> int:
    """Return how many of the random volumes come out differently from scipy and numpy."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(cases):
        shape = rng.integers(1, (12, 12, 150))
        F, G = (rng.integers(1, 256, shape, np.uint8) * (rng.random(shape) < rng.random() * 0.6) for _ in 'FG')
        threshold, top2 = rng.random() * 1.1, bool(rng.integers(2))
        same = np.array_equal(fast_post_processing(F, threshold, top2), post_processing(F, threshold, top2))
        wrong += not same or fast_counts(F, G) != counts(F, G) or fast_counts(F.T, G.T[::-1]) != counts(F.T, G.T[::-1])
    return wrong


def organ_volume(rng: np.random.Generator) -> np.ndarray:
    """Return SHAPE uint8: an ellipsoid of about half a percent of the volume, and 300 specks."""
    x, y, z = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    F = (((x - 250) / 60) ** 2 + ((y - 280) / 40) ** 2 + ((z - 120) / 35) ** 2 < 1).astype(np.uint8)
    for corner in rng.integers(0, np.array(SHAPE) - 3, (300, 3)):
        F[tuple(slice(start, start + rng.integers(1, 4)) for start in corner)] = 1
    return F


def blob_volume(rng: np.random.Generator) -> np.ndarray:
    """Return SHAPE uint8: smoothed noise, of which the highest 15 % are set."""
    noise = ndimage.gaussian_filter(rng.standard_normal(SHAPE, np.float32), sigma=3)
    return (noise > np.quantile(noise[::8, ::8, ::8], 0.85)).astype(np.uint8)


def seconds(work: Callable, fresh: Callable, repeats: int) -> float:
    """Return the median time of work(fresh()), not counting fresh()."""
    times = []
    for _ in range(repeats):
        argument = fresh()
        start = time.perf_counter()
        work(argument)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def peers() -> dict[str, Callable]:
    """Return the post-processings of other libraries: (X, Y, Z) mask -> mask."""
    rows = {'scipy': post_processing}
    try:
        import cc3d
    except ImportError:
        return rows

    def labels_and_counts(F: np.ndarray) -> np.ndarray:
        label = cc3d.connected_components(F, connectivity=6, binary_image=True)
        sizes = np.bincount(label.ravel())
        sizes[0] = 0
        kept = sizes >= 0.5 * sizes.max()
        kept[0] = False
        return F * kept[label]

    return {**rows, 'cc3d': labels_and_counts, 'cc3d.largest_k': partial(cc3d.largest_k, k=1, connectivity=6)}


def print_times() -> bool:
    """Print the table of times on volumes of SHAPE; return whether all results agree."""
    rng = np.random.default_rng(0)
    organ, blobs = organ_volume(rng), blob_volume(rng)
    agree = True
    print(f'\n{SHAPE[0]}x{SHAPE[1]}x{SHAPE[2]} voxels    {"":17}   seconds     ratio')

    def row(name: str, seconds_taken: float, fast: float) -> None:
        print(f'{name:42} {seconds_taken:9.4f}  {seconds_taken / fast:6.1f} x')

    for name, F in ('organ', organ), ('blobs', blobs):
        fast = seconds(lambda copy: fast_functions.post_processing(copy, copy, 0.5, False), F.copy, repeats=7)
        row(f'post_processing, {name}: fast_functions', fast, fast)
        for peer, work in peers().items():
            row(f'post_processing, {name}: {peer}', seconds(work, lambda F=F: F, repeats=3), fast)
        agree &= np.array_equal(fast_post_processing(F), post_processing(F))

    moved = np.roll(organ, 5, axis=0)
    fast = seconds(lambda A: fast_counts(A, moved), lambda: organ, repeats=9)
    row('DSC_computation: fast_functions', fast, fast)
    row('DSC_computation: numpy', seconds(lambda A: counts(A, moved), lambda: organ, repeats=9), fast)
    return agree and fast_counts(organ, moved) == counts(organ, moved)


def main() -> int:
    """Check, print, time; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--no_timing', action='store_true', help='only check')
    arguments = parser.parse_args()
    wrong = {'literal cases': literal_cases(), 'random volumes': random_cases()}
    if not arguments.no_timing:
        wrong['large volumes'] = int(not print_times())
        print()
    for cases, count in wrong.items():
        print(f'{cases}: {"all as expected" if count == 0 else f"{count} WRONG"}')
    return int(any(wrong.values()))


if __name__ == '__main__':
    sys.exit(main())
