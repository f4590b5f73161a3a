"""The built module, wrapper and all, under sanitizers: random arrays of every kind, right and wrong, and one of more
than 2^31 voxels. test_fast_functions.py builds it with them and runs this: python fast_functions_sanitized.py FOLDER
"""

import contextlib
import resource
import runpy
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, sys.argv[1])
import fast_functions

rng = np.random.default_rng(7)
BY_SCIPY = runpy.run_path(str(Path(__file__).parent.parent / 'SWIG_fast_functions' / 'test.py'))['post_processing']


def random_view(shape):
    """A uint8 or bool array of this shape: of random strides, signs and order of axes, perhaps read-only or broadcast."""
    order = rng.permutation(len(shape))
    wide = rng.integers(1, 256, tuple(2 * shape[axis] for axis in order), np.uint8)
    wide *= rng.random(wide.shape) < 0.5
    view = wide.transpose(np.argsort(order))[tuple(slice(None, None, int(rng.choice([1, 2, -1, -2]))) for _ in shape)]
    view = view[tuple(slice(n) for n in shape)]
    if shape and shape[0] and rng.random() < 0.2:
        view = np.broadcast_to(view[:1], shape)
    return view != 0 if rng.random() < 0.3 else view


def check_counts():
    shape = tuple(int(n) for n in rng.integers(0, 14, rng.integers(0, 5)))
    A, G, P = random_view(shape), random_view(shape), np.zeros(3, np.uint32)
    fast_functions.DSC_computation(A, G, P)
    assert P.tolist() == [np.count_nonzero(A), np.count_nonzero(G), np.count_nonzero((A != 0) & (G != 0))]


def check_post_processing():
    shape = tuple(int(n) for n in rng.integers(1, [8, 8, 150]))
    F = (rng.random(shape) < rng.uniform(0, 0.45)).astype(np.uint8)
    threshold = rng.uniform(0, 1.1)
    expected = BY_SCIPY(F, threshold)
    fast_functions.post_processing(F, random_view(shape), threshold, False)
    assert np.array_equal(F, expected)


def check_refusal():
    """Arrays of the wrong type, shape or layout end in an exception, whatever they are."""
    things = [None, 1, 'text', b'\0', [], np.zeros(3), np.zeros((2, 3, 4), '>u4'), np.zeros((2, 3, 4), object),
              np.zeros((0, 1, 2), np.uint8), np.zeros((1,) * 33, np.uint8), random_view((2, 3, 4)), np.zeros(3, np.uint32),
              np.zeros((2, 3, 4), 'u1,u1')]  # fmt: skip
    arguments = [things[i] for i in rng.integers(0, len(things), 3)]
    for call in (
        lambda: fast_functions.DSC_computation(*arguments),
        lambda: fast_functions.post_processing(*arguments[:2], 0.5, arguments[2]),
    ):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            call()


def check_beyond_2_to_31():
    F = np.zeros((3, 1024, 750001), np.uint8)  # 2.3e9 voxels, of which only what is written takes memory
    F[:, 1000, -90:-10] = 5  # one organ through all planes, 240 voxels
    F[2, 1010, 10:129] = 7  # fewer than half as many, beyond 2^31
    P = np.zeros(3, np.uint32)
    fast_functions.DSC_computation(F, F[::-1], P)
    assert P.tolist() == [359, 359, 240]
    fast_functions.post_processing(F, F, 0.5, False)
    fast_functions.DSC_computation(F, F, P)
    assert P.tolist() == [240, 240, 240] and not F[2, 1010, 10:129].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.6e6, 'kB: what is empty takes no memory'


for _ in range(600):
    check_counts()
    check_post_processing()
    check_refusal()
check_beyond_2_to_31()
print(f'{fast_functions.__file__} is as expected')
