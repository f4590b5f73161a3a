"""The C++ module: what post-processing keeps and removes, what Dice counts, and what both refuse.

Rows of small masks are written as text, one digit a voxel ('.' is 0), so that the rule can be read off them.
"""

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fast_functions
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

TESTS = Path(__file__).resolve().parent
SEEDS = st.integers(0, 2**32 - 1)
BY_OTHERS = runpy.run_path(str(TESTS.parent / 'SWIG_fast_functions' / 'test.py'))  # the same rules by scipy and numpy
processed_by_scipy, counts_by_numpy = BY_OTHERS['post_processing'], BY_OTHERS['counts']


def mask(*planes: list[str]) -> np.ndarray:
    """Return (X, Y, Z) uint8 from X planes of Y rows of text."""
    return np.array([[[0 if v == '.' else int(v) for v in row] for row in plane] for plane in planes], np.uint8)


def processed(F: np.ndarray, threshold: float = 0.5, top2: bool = False) -> np.ndarray:
    """Return the post-processed copy of F."""
    F = F.copy()
    assert fast_functions.post_processing(F, F.copy(), threshold, top2) is None
    return F


def counts(A: np.ndarray, G: np.ndarray) -> list[int]:
    """Return |A|, |G| and |A and G|."""
    P = np.full(3, 99, np.uint32)
    assert fast_functions.DSC_computation(A, G, P) is None
    return P.tolist()


def random_mask(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """Return uint8 of values 1 to 255 in about `share` of the voxels, else 0."""
    return rng.integers(1, 256, shape, np.uint8) * (rng.random(shape) < share)


# ------------------------------------------------------------------------------------------------- post-processing


@pytest.mark.parametrize(
    ('threshold', 'top2', 'expected'),
    [
        (0.0, False, '1111.11.1.........'),
        (0.25, False, '1111.11.1.........'),
        (0.5, False, '1111.11...........'),
        (0.51, False, '1111..............'),
        (1.0, False, '1111..............'),
        (1.01, False, '..................'),
        (float('inf'), False, '..................'),
        (0.5, True, '1111.11.1.........'),
        (0.51, True, '1111.11...........'),
        (1.0, True, '1111.11...........'),
        (2.0, True, '1111..............'),
    ],
)
def test_components_of_at_least_threshold_times_the_largest_stay(threshold, top2, expected):
    before = mask(['1111.11.1.........'])
    assert np.array_equal(processed(before, threshold, top2), mask([expected]))


def test_kept_voxels_keep_their_values():
    before = mask(['9182.77.3.........'])
    assert np.array_equal(processed(before), mask(['9182.77...........']))


def test_a_tie_for_the_largest_keeps_both():
    before = mask(['11.22.3.......'])
    assert np.array_equal(processed(before, 1.0), mask(['11.22.........']))


def test_top2_with_two_equal_largest_measures_against_their_size():
    before = mask(['11.22.3.......'])
    assert np.array_equal(processed(before, 0.6, top2=True), mask(['11.22.........']))


@pytest.mark.parametrize('top2', [False, True])
def test_a_single_component_is_measured_against_itself(top2):
    before = mask(['.111....'])
    assert np.array_equal(processed(before, 1.0, top2), before)


def test_voxels_connect_through_faces_along_every_axis():
    before = mask(['11...', '.....', '.....'], ['.1...', '.1..7', '.....'], ['.....', '.1...', '.1...'])
    after = mask(['11...', '.....', '.....'], ['.1...', '.1...', '.....'], ['.....', '.1...', '.1...'])
    assert np.array_equal(processed(before), after)


def test_voxels_do_not_connect_through_edges_and_corners():
    before = mask(['111..', '...1.', '.....'], ['.....', '.....', '....1'])
    after = mask(['111..', '.....', '.....'], ['.....', '.....', '.....'])
    assert np.array_equal(processed(before), after)


def test_planes_of_one_row_connect():
    before = mask(['1.1.'], ['1...'])
    assert np.array_equal(processed(before, 0.75), mask(['1...'], ['1...']))


def test_a_run_that_ends_a_row_does_not_go_on_in_the_next():
    before = mask(['..111', '1....', '.....'])
    assert np.array_equal(processed(before), mask(['..111', '.....', '.....']))


def test_branches_that_meet_late_are_one_component():
    before = mask(['1.1.1.22', '1.1.1...', '11111...', '........', '........'])
    after = mask(['1.1.1...', '1.1.1...', '11111...', '........', '........'])
    assert np.array_equal(processed(before), after)


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ('111.1...', '111.1...'),  # 4 of 8: half full
        ('111.1....', '111.1....'),  # 4 of 9: floor(9 / 2)
        ('111.1.....', '111.......'),  # 4 of 10
        ('11111.11', '11111.11'),
        ('........', '........'),
    ],
)
def test_an_empty_or_half_full_volume_stays(row, expected):
    assert np.array_equal(processed(mask([row])), mask([expected]))


def test_the_seed_volume_has_no_effect():
    before = mask(['1111.2.........'])
    for S in (np.zeros_like(before), np.ones_like(before), before == 2):
        F = before.copy()
        fast_functions.post_processing(F, S, 0.5, False)
        assert np.array_equal(F, mask(['1111...........']))


def test_the_seed_volume_may_be_the_volume_or_bool_or_read_only_or_strided():
    before = mask(['1111.2.........'])
    read_only = before.copy()
    read_only.flags.writeable = False
    for S in (read_only, before.astype(bool), before[:, :, ::-1], np.asfortranarray(before)):
        F = before.copy()
        fast_functions.post_processing(F, S, 0.5, False)
        assert np.array_equal(F, mask(['1111...........']))
    fast_functions.post_processing(before, before, 0.5, False)
    assert np.array_equal(before, mask(['1111...........']))


@pytest.mark.parametrize('length', [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 200])
def test_runs_that_cross_or_end_at_a_word(length):
    rng = np.random.default_rng(length)
    for shape in ((3, 4, length), (1, 1, length), (length, 1, 1), (1, length, 1), (2, length, 3)):
        for share in (0.1, 0.3, 0.45):
            F = random_mask(rng, shape, share)
            assert np.array_equal(processed(F), processed_by_scipy(F, 0.5, False)), shape
    F = np.zeros((5, 1, length), np.uint8)
    F[1:3], F[4, 0, : length // 3] = 1, 2
    assert np.array_equal(processed(F), processed_by_scipy(F, 0.5, False))


@pytest.mark.parametrize('shape', [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_a_volume_without_voxels(shape):
    assert processed(np.zeros(shape, np.uint8)).shape == shape


@settings(deadline=None, max_examples=150)
@given(
    SEEDS,
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 140)),
    st.floats(0, 0.6),
    st.floats(0, 1.2),
    st.booleans(),
)
def test_post_processing_equals_scipy(seed, shape, share, threshold, top2):
    F = random_mask(np.random.default_rng(seed), shape, share)
    assert np.array_equal(processed(F, threshold, top2), processed_by_scipy(F, threshold, top2))


@pytest.mark.parametrize('top2', [False, True])
@pytest.mark.parametrize(('sigma', 'share'), [(0, 0.2), (1, 0.3), (3, 0.15)])
def test_post_processing_of_volumes_for_several_threads_equals_scipy(sigma, share, top2):
    noise = ndimage.gaussian_filter(np.random.default_rng(sigma).random((130, 150, 121)), sigma)  # 2.4e6 voxels
    F = (noise > np.quantile(noise, 1 - share)).astype(np.uint8)
    for volume in (F, np.ascontiguousarray(F.T)):
        assert np.array_equal(processed(volume, 0.01, top2), processed_by_scipy(volume, 0.01, top2))


# ----------------------------------------------------------------------------------------------------- Dice counts


def test_DSC_computation_counts_voxels_that_are_not_0():
    A = mask(['11.3', '....'])
    G = mask(['1.22', '9...'])
    assert counts(A, G) == [3, 4, 2]


def test_DSC_computation_takes_any_number_of_axes():
    assert counts(np.array(7, np.uint8), np.array(True)) == [1, 1, 1]
    assert counts(np.array([1, 0, 1], np.uint8), np.array([1, 1, 0], np.uint8)) == [2, 2, 1]
    A = random_mask(np.random.default_rng(0), (2, 3, 1, 4, 1, 5, 2), 0.5)
    assert counts(A, A[::-1]) == counts_by_numpy(A, A[::-1])


def test_DSC_computation_takes_other_buffers_than_numpy():
    assert counts(b'\1\0\2', bytearray(b'\1\1\0')) == [2, 2, 1]


@pytest.mark.parametrize('shape', [(0,), (3, 0, 4), (0, 0)])
def test_DSC_computation_of_no_voxels(shape):
    assert counts(np.zeros(shape, np.uint8), np.zeros(shape, bool)) == [0, 0, 0]


def test_DSC_computation_takes_bool_read_only_and_strided_arrays():
    rng = np.random.default_rng(0)
    A, G = random_mask(rng, (9, 20, 33), 0.5), random_mask(rng, (9, 20, 33), 0.4)
    A.flags.writeable = False
    broadcast = np.broadcast_to(A[:, :1], A.shape)
    for a, g in (
        (A, G),
        (A.astype(bool), G),
        (A[::-1], G[::-1]),
        (A[:, ::-1, ::2], G[:, ::-1, ::2]),
        (A[::2, 3:17:5, 1::3], G[::2, 3:17:5, 1::3]),
        (A[..., 4], G[..., 5]),
        (A.T, G.T),
        (np.asfortranarray(A), G),
        (A, np.asfortranarray(G)),
        (A[:, ::-1], np.asfortranarray(G)[::-1]),
        (broadcast, G),
        (broadcast, broadcast[..., ::-1]),
    ):
        assert counts(a, g) == counts_by_numpy(a, g)
    assert counts(A, G) == counts(A.T, G.T)


@pytest.mark.parametrize('length', [1, 15, 16, 17, 255 * 16 - 1, 255 * 16, 255 * 16 + 1, 3 * 255 * 16 + 5])
def test_counters_of_a_byte_do_not_overflow(length):
    assert counts(np.full(length, 255, np.uint8), np.ones(length, bool)) == [length] * 3


@settings(deadline=None, max_examples=150)
@given(SEEDS, st.lists(st.integers(1, 40), max_size=3), st.floats(0, 1), st.data())
def test_DSC_computation_equals_numpy(seed, shape, share, data):
    rng = np.random.default_rng(seed)
    step = st.sampled_from([1, 1, 2, -1, -2])
    steps = [[slice(None, None, data.draw(step)) for _ in shape] for _ in 'AG']
    axes = [data.draw(st.permutations(range(len(shape)))) for _ in 'AG']
    views = []
    for slices, order in zip(steps, axes):
        doubled = random_mask(rng, tuple(2 * shape[axis] for axis in order), share).transpose(np.argsort(order))
        views.append(doubled[tuple(slices)][tuple(slice(length) for length in shape)])
    assert counts(*views) == counts_by_numpy(*views)


def test_large_arrays_for_several_threads():
    rng = np.random.default_rng(0)
    A, G = random_mask(rng, (150, 160, 170), 0.3), random_mask(rng, (150, 160, 170), 0.3)
    for a, g in ((A, G), (A, G[::-1]), (A, np.asfortranarray(G)), (A.ravel(), G.ravel())):
        assert counts(a, g) == counts_by_numpy(a, g)


def test_a_count_beyond_uint32_is_an_overflow_error_and_leaves_P():
    A = np.broadcast_to(np.ones(2**16, np.uint8), (2**16 + 1, 2**16))
    G = np.broadcast_to(np.zeros(2**16, np.uint8), A.shape)
    P = np.array([7, 8, 9], np.uint32)
    with pytest.raises(OverflowError, match=r'P cannot hold the count of A, 4295032832: it does not fit uint32'):
        fast_functions.DSC_computation(A, G, P)
    with pytest.raises(OverflowError, match=r'count of G, 4295032832'):
        fast_functions.DSC_computation(G, A, P)
    assert P.tolist() == [7, 8, 9]


# --------------------------------------------------------------------------------------------------- bad arguments


def read_only(array: np.ndarray) -> np.ndarray:
    """Return the array, locked."""
    array.flags.writeable = False
    return array


VOLUME = np.zeros((2, 3, 4), np.uint8)
MASK = np.ones((2, 3, 4), np.uint8)


@pytest.mark.parametrize(
    ('changed', 'error', 'message'),
    [
        ({'F': VOLUME.astype(bool)}, TypeError, 'F must be a uint8 array, not numpy.ndarray of bool'),
        ({'F': VOLUME.astype(np.int8)}, TypeError, 'F must be a uint8 array, not numpy.ndarray of int8'),
        ({'F': VOLUME.astype(float)}, TypeError, 'F must be a uint8 array, not numpy.ndarray of float64'),
        ({'F': VOLUME.astype('M8[D]')}, TypeError, r'F must be a uint8 array, not numpy.ndarray of datetime64\[D\]'),
        ({'F': VOLUME.tolist()}, TypeError, 'F must be a uint8 array, not list'),
        ({'F': None}, TypeError, 'F must be a uint8 array, not NoneType'),
        ({'F': VOLUME[0]}, ValueError, 'F must have 3 axes, not 2'),
        ({'F': VOLUME[None]}, ValueError, 'F must have 3 axes, not 4'),
        ({'F': read_only(VOLUME.copy())}, ValueError, 'F must be writable, not read-only'),
        ({'F': bytes(24)}, ValueError, 'F must be writable, not read-only'),
        ({'F': VOLUME[:, :, ::2]}, ValueError, 'F must be C-contiguous'),
        ({'F': VOLUME[::-1]}, ValueError, 'F must be C-contiguous'),
        ({'F': np.asfortranarray(VOLUME)}, ValueError, 'F must be C-contiguous, not strided or Fortran-ordered'),
        ({'S': VOLUME[:, :, :3]}, ValueError, r"S must have F's shape \(2, 3, 4\), not \(2, 3, 3\)"),
        ({'S': VOLUME[0]}, ValueError, r"S must have F's shape \(2, 3, 4\), not \(3, 4\)"),
        ({'S': VOLUME[0, 0]}, ValueError, r"S must have F's shape \(2, 3, 4\), not \(4,\)"),
        ({'S': VOLUME.astype(np.int64)}, TypeError, 'S must be a bool or uint8 array, not numpy.ndarray of int64'),
        ({'S': None}, TypeError, 'S must be a bool or uint8 array, not NoneType'),
        ({'threshold': -0.5}, ValueError, 'threshold must be 0 or more, not -0.5'),
        ({'threshold': float('nan')}, ValueError, 'threshold must be 0 or more, not nan'),
        ({'threshold': '0.5'}, TypeError, 'threshold must be a number, not str'),
        ({'threshold': None}, TypeError, 'threshold must be a number, not NoneType'),
        ({'top2': 'no'}, TypeError, 'top2 must be True or False, not str'),
        ({'top2': np.zeros(2)}, TypeError, 'top2 must be True or False, not numpy.ndarray of float64'),
    ],
)
def test_post_processing_refuses(changed, error, message):
    arguments = {'F': VOLUME.copy(), 'S': VOLUME, 'threshold': 0.5, 'top2': False, **changed}
    with pytest.raises(error, match=f'^{message}'):
        fast_functions.post_processing(**arguments)


@pytest.mark.parametrize(
    ('changed', 'error', 'message'),
    [
        ({'A': MASK.astype(np.int8)}, TypeError, 'A must be a bool or uint8 array, not numpy.ndarray of int8'),
        ({'A': MASK.astype(np.float32)}, TypeError, 'A must be a bool or uint8 array, not numpy.ndarray of float32'),
        ({'A': 1}, TypeError, 'A must be a bool or uint8 array, not int'),
        ({'G': MASK.astype(np.uint16)}, TypeError, 'G must be a bool or uint8 array, not numpy.ndarray of uint16'),
        ({'G': MASK.astype(object)}, TypeError, 'G must be a bool or uint8 array, not numpy.ndarray of object'),
        ({'G': MASK.astype('S1')}, TypeError, r'G must be a bool or uint8 array, not numpy.ndarray of \|S1'),
        ({'G': MASK[:1]}, ValueError, r"G must have A's shape \(2, 3, 4\), not \(1, 3, 4\)"),
        ({'G': MASK.T}, ValueError, r"G must have A's shape \(2, 3, 4\), not \(4, 3, 2\)"),
        ({'G': MASK[0, 0, 0]}, ValueError, r"G must have A's shape \(2, 3, 4\), not \(\)"),
        ({'P': np.zeros(3, np.int64)}, TypeError, 'P must be a uint32 array, not numpy.ndarray of int64'),
        ({'P': np.zeros(3, np.int32)}, TypeError, 'P must be a uint32 array, not numpy.ndarray of int32'),
        ({'P': np.zeros(3, '>u4')}, TypeError, 'P must be a uint32 array, not numpy.ndarray of >u4'),
        ({'P': [0, 0, 0]}, TypeError, 'P must be a uint32 array, not list'),
        ({'P': np.zeros(4, np.uint32)}, ValueError, 'P must have 3 elements, not 4'),
        ({'P': np.zeros((1, 3), np.uint32)}, ValueError, 'P must have 1 axis, not 2'),
        ({'P': np.zeros(6, np.uint32)[::2]}, ValueError, 'P must be C-contiguous'),
        ({'P': read_only(np.zeros(3, np.uint32))}, ValueError, 'P must be writable, not read-only'),
    ],
)
def test_DSC_computation_refuses(changed, error, message):
    arguments = {'A': MASK, 'G': MASK, 'P': np.zeros(3, np.uint32), **changed}
    with pytest.raises(error, match=f'^{message}'):
        fast_functions.DSC_computation(**arguments)


def test_a_refused_volume_is_unchanged():
    F = mask(['1111.2.........'])
    with pytest.raises(ValueError):
        fast_functions.post_processing(F, F, -1.0, False)
    assert np.array_equal(F, mask(['1111.2.........']))


def test_arrays_are_given_back():
    A = np.ones((2, 3, 4), np.uint8)
    P = np.zeros(3, np.uint32)
    before = sys.getrefcount(A), sys.getrefcount(P)
    for _ in range(10):
        fast_functions.DSC_computation(A, A, P)
        fast_functions.post_processing(A, A, 0.5, False)
        with pytest.raises(ValueError):
            fast_functions.DSC_computation(A, A[0], P)
    assert (sys.getrefcount(A), sys.getrefcount(P)) == before


def test_an_unaligned_P_is_filled():
    P = np.frombuffer(bytearray(13), np.uint32, count=3, offset=1)
    fast_functions.DSC_computation(MASK, MASK, P)
    assert P.tolist() == [24, 24, 24]


# --------------------------------------------------------------------------------------------------------- the build


def test_other_threads_run_meanwhile():
    F = (np.random.default_rng(0).random((200, 200, 200)) < 0.2).astype(np.uint8)
    turns, stop = 0, False

    def take_turns():
        nonlocal turns
        while not stop:
            turns += 1
            time.sleep(0.0005)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # seconds: a thread runs only when another one lets it
    try:
        other = threading.Thread(target=take_turns)
        other.start()
        before = turns
        fast_functions.post_processing(F, F, 0.5, False)
        after = turns
        stop = True
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert after > before


def test_the_build_by_hand_of_the_published_README(tmp_path):
    """swig, build_ext --inplace, mv, cp: as written there, and utils.py takes what comes of it."""
    folder = tmp_path / 'SWIG_fast_functions'
    shutil.copytree(
        TESTS.parent / 'SWIG_fast_functions', folder, ignore=shutil.ignore_patterns('build', '*.so', '*.egg-info')
    )
    code = tmp_path / 'OrganSegRSTN'
    code.mkdir()
    shutil.copy(TESTS.parent / 'OrganSegRSTN/utils.py', code)
    commands = """
        swig -python -c++ fast_functions.i
        python setup.py build_ext --inplace
        mv _fast_functions*.so _fast_functions.so
        cp {_fast_functions.so,fast_functions.py} ../OrganSegRSTN/
    """
    environment = os.environ | {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    subprocess.run(['bash', '-ec', commands], cwd=folder, env=environment, check=True, capture_output=True)
    check = 'import fast_functions, utils, numpy as np; print(fast_functions.__file__, utils.DSC_computation(*[np.ones(3, bool)] * 2))'
    done = subprocess.run([sys.executable, '-c', check], cwd=code, check=True, capture_output=True, text=True)
    assert done.stdout == f'{code / "fast_functions.py"} 2 * 3 / (3 + 3) = 1.0\n'


SANITIZED = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-O1']


@pytest.fixture(scope='module')
def compiler(tmp_path_factory):
    """A C++ compiler that has the sanitizers."""
    found = shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')
    if found is None:
        pytest.skip('no C++ compiler')
    folder = tmp_path_factory.mktemp('trial')
    (folder / 'empty.cc').write_text('int main() {}\n')
    trial = [found, *SANITIZED, folder / 'empty.cc', '-o', folder / 'empty']
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip('the compiler has no sanitizers')
    return found


@pytest.mark.long
def test_the_core_under_sanitizers(compiler, tmp_path):
    """Random shapes, strides and sizes, and addresses beyond 2^31, in C++ (fast_functions_sanitized.cc)."""
    driver = tmp_path / 'driver'
    source = TESTS / 'fast_functions_sanitized.cc'
    subprocess.run([compiler, '-std=c++17', '-pthread', *SANITIZED, source, '-o', driver], check=True)
    run = subprocess.run([driver], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 'as expected' in run.stdout


@pytest.mark.long
def test_the_built_module_under_sanitizers(compiler, tmp_path):
    """The same through the wrapper, with arrays right and wrong (fast_functions_sanitized.py)."""
    runtime = [
        subprocess.run(
            [compiler, f'-print-file-name={name}'], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ('libasan.so', 'libstdc++.so')
    ]
    if not all(Path(library).is_absolute() for library in runtime):
        pytest.skip('the sanitizers are not in a library that python could load first')
    flags = ' '.join(SANITIZED)
    build = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-cache-dir', '--target', tmp_path]
    subprocess.run(
        [*build, TESTS.parent / 'SWIG_fast_functions'],
        env=os.environ | {'CXX': compiler, 'CFLAGS': flags, 'CXXFLAGS': flags, 'LDFLAGS': SANITIZED[0]},
        capture_output=True,
        check=True,
    )
    assert b'__asan_' in next(tmp_path.glob('*.so')).read_bytes()
    run = subprocess.run(
        [sys.executable, TESTS / 'fast_functions_sanitized.py', tmp_path],
        env=os.environ | {'LD_PRELOAD': ' '.join(runtime), 'ASAN_OPTIONS': 'detect_leaks=0'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith(str(tmp_path)) and run.stdout.endswith('as expected\n')
