"""What the tests share: tiny cases, a tiny network that segments them, and the scripts run as a user runs them.

The tiny network is the golden recipe's at width 4: its planted path segments bright organs without training.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# tiny networks lose more than they gain by a second thread; test_golden.py takes two
os.environ['OMP_NUM_THREADS'] = '1'
# a shell that runs the tests in the background has them, and all that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
CODE = REPO / 'OrganSegRSTN'
sys.path[:0] = [str(CODE), str(REPO / 'DATA2NPY'), str(TESTS / 'golden')]

import recipe  # noqa: E402
import torch  # noqa: E402

from model import RSTN  # noqa: E402

torch.set_num_threads(1)

SHAPES = [(14, 16, 7), (16, 14, 6), (12, 16, 8), (14, 14, 6)]
FOLDER = 'SIJ_training_1e-5x10,4'  # of the tiny settings below


def pytest_collection_modifyitems(items):
    """Begin with the longest file, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != 'test_golden.py')


# --- running scripts -----------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """How a script ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def run_script(name, *args, **keywords):
    """Run a stage script as a user does, in a process of its own; keywords go to subprocess.run."""
    command = [sys.executable, CODE / name, *map(str, args)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, **keywords)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(capsys, monkeypatch):
    """call(name, *args): the same without a process of its own, which saves the seconds that importing torch takes."""

    def call(name, *args):
        monkeypatch.setattr(sys, 'argv', [str(CODE / name), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(CODE / name), run_name='__main__')
        out, err = capsys.readouterr()
        code = end.value.code
        if isinstance(code, str):  # sys.exit(message)
            code, err = 1, f'{err}{code}\n'
        return Ran(code or 0, out, err)

    return call


@pytest.fixture
def spare():
    """Fail a test that allocates 150 MB or more: a file that asks for too much is refused before."""
    try:
        Path('/proc/self/clear_refs').write_text('5')  # reset the peak
    except OSError:
        pytest.skip('peak memory can be measured on Linux only')

    def peak():
        return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024

    before = peak()
    yield
    assert peak() - before < 150, 'MB'


# --- tiny data and its arguments -----------------------------------------------------------------------------------


def write_case(data, name, image, label):
    """Write images/{name}.npy and labels/{name}.npy."""
    for kind, volume in (('images', image), ('labels', label)):
        (data / kind).mkdir(parents=True, exist_ok=True)
        np.save(data / kind / f'{name}.npy', volume)


@pytest.fixture(scope='session')
def initialized(tmp_path_factory):
    """Four tiny cases in two folds after init.py; shared, so read only."""
    data = tmp_path_factory.mktemp('initialized') / 'data'
    for i, shape in enumerate(SHAPES):
        write_case(data, f'{i + 1:04d}', *recipe.volume(900 + i, shape))
    done = run_script('init.py', data, 1, 2, -100, 240)
    assert done.code == 0, done.err
    return data


@pytest.fixture
def data(initialized, tmp_path):
    """A copy of the tiny data folder of the test's own; in its path is a blank."""
    return shutil.copytree(initialized, tmp_path / 'my data')


def tiny_weights(seed=7, width=4):
    """State dict of a narrow RSTN that segments bright organs."""
    with torch.device('meta'):
        shapes = {key: tensor.shape for key, tensor in RSTN(width=width).state_dict().items()}
    return {key: torch.from_numpy(array) for key, array in recipe.weights(shapes, seed).items()}


@pytest.fixture
def tested(data):
    """The tiny data folder with untimestamped snapshots of the three planes."""
    folder = data / 'models' / 'snapshots' / FOLDER
    folder.mkdir(parents=True)
    for plane in 'XYZ':
        torch.save(tiny_weights(), folder / f'FD0:{plane}J3_1.pkl')
    return data


BEGIN = [0, 1, -100, 240, 0.98, 3, 1]  # current_fold ... organ_ID
RATES = ['1e-5', 10, '1e-5', 10, 4]


def training_args(data, plane='Z', epochs=(1, 1, 1, 1), timestamp='_'):
    """Positionals of training.py, coarse_testing.py and oracle_testing.py on the tiny data."""
    return [data, *BEGIN, plane, 'cpu', *RATES, 0.5, 1, *epochs, timestamp]


def fusion_args(data, epochs=(1, 1, 1, 1), timestamp='_'):
    """Positionals of coarse_fusion.py and oracle_fusion.py on the tiny data."""
    return [data, *BEGIN, 'cpu', *RATES, *epochs, 0.5, *[timestamp] * 3]


def coarse2fine_args(data, rounds=2, epochs=(1, 1, 1, 1), timestamp='_'):
    """Positionals of coarse2fine_testing.py on the tiny data."""
    return [data, *BEGIN, 'cpu', *RATES, *epochs, 0.5, 0.5, rounds, *[timestamp] * 3]


def merge_args(data, organs='1 2', **settings):
    """Positionals of merge_organs.py on the tiny data; settings as for coarse2fine_args."""
    args = coarse2fine_args(data, **settings)
    return [args[0], args[1], 2, *args[3:7], organs, *args[8:]]


def pretrain_args(data, fold=0, epochs=1):
    """Positionals of pretrain.py on the tiny data, and a narrow width."""
    return [data, fold, *BEGIN[1:], 'cpu', epochs, '--width', 4]


def settings(data, **changes):
    """Parsed arguments, as the functions behind the scripts take them."""
    values = {'data_path': str(data), 'current_fold': 0, 'organ_number': 1, 'low_range': -100.0, 'high_range': 240.0,
              'slice_threshold': 0.98, 'slice_thickness': 3, 'organ_ID': 1, 'GPU_ID': 'cpu', 'learning_rate1': '1e-5',
              'learning_rate_m1': '10', 'crop_margin': 4, 'crop_prob': 0.5, 'crop_sample_batch': 1, 'epoch_S': 1,
              'epoch_I': 1, 'epoch_J': 1, 'epoch_step': 1, 'pretrained': None, 'recipe': 'published', 'precision': 'fp32', 'resume': False, 'checkpoint_minutes': 10, 'seed': None, 'workers': 0, 'fine_iterations': 1, 'joint_from': None, 'snapshot_steps': None, 'average': 1}  # fmt: skip
    return SimpleNamespace(**values | changes)
