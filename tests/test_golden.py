"""Parity with the published pipeline at full width (268 M parameters): see golden/README.md. Some five minutes."""

import json
import os
import re

import golden_case
import numpy as np
import pytest
import torch
from conftest import run_script
from golden_case import GOLDEN, TIMESTAMP, remove_snapshots, write_snapshots, write_volumes

from model import RSTN
from training import make_optimizer, train_step
from utils import to_unit
from volumes.planes import slice_window

THREADS = os.environ.get('GOLDEN_THREADS', '2')
BEGIN = [0, 1, -100, 240, 0.98, 3, 1]  # current_fold ... organ_ID
RATES = ['1e-5', 10, '1e-5', 10, 20]
EPOCHS = [2, 6, 8, 2]
TIMES = [TIMESTAMP] * 3
RESULTS = sorted(path.relative_to(GOLDEN) for path in (GOLDEN / 'results').rglob('*') if path.is_file())
VOLUMES = [path for path in RESULTS if path.suffix == '.npz']
TEXTS = [path for path in RESULTS if path.name == 'results.txt']
NUMBER = r'\d+(?:\.\d+)?(?:e-\d+)?'


def stage(script, *args):
    done = run_script(script, *args, env=os.environ | {'OMP_NUM_THREADS': THREADS, 'OMP_WAIT_POLICY': 'PASSIVE'})
    assert done.code == 0, done.err


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The data folder after all stages, each a process; the snapshots are in the published code's file format."""
    data = tmp_path_factory.mktemp('golden') / 'data'
    write_volumes(data)
    write_snapshots(data, legacy=True)

    stage('init.py', data, 1, 2, -100, 240)
    for kind in ('coarse', 'oracle'):
        for plane in 'XYZ':
            stage(f'{kind}_testing.py', data, *BEGIN, plane, 0, *RATES, 0.5, 1, *EPOCHS, TIMESTAMP, TIMESTAMP)
        stage(f'{kind}_fusion.py', data, *BEGIN, 0, *RATES, *EPOCHS, 0.5, *TIMES)
    stage('coarse2fine_testing.py', data, *BEGIN, 0, *RATES, *EPOCHS, 0.5, 0.5, 3, *TIMES)
    yield data
    remove_snapshots(data)


@pytest.mark.parametrize('name', sorted(path.name for path in (GOLDEN / 'lists').iterdir()))
def test_lists_are_the_same(data, name):
    found, expected = ((folder / 'lists' / name).read_text().splitlines() for folder in (data, GOLDEN))
    assert found == expected


def test_the_same_lists_and_result_files_and_no_others(data):
    assert {path.name for path in (data / 'lists').iterdir()} == {path.name for path in (GOLDEN / 'lists').iterdir()}
    files = {path.relative_to(data) for path in (data / 'results').rglob('*') if path.is_file()}
    ours = {'run.json', 'results.json'}  # decided differences
    files = {path for path in files if path.name not in ours and path.parent.name != 'signals'}
    assert files == set(RESULTS)


def stored(path):
    with np.load(path) as file:
        assert file.files == ['volume']
        return file['volume'].astype(int)


@pytest.mark.parametrize('path', VOLUMES, ids=lambda path: '/'.join(path.parts[1:])[:60] + path.name)
def test_volumes_are_the_same(data, path):
    found, expected = stored(data / path), stored(GOLDEN / path)
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 1
    assert np.count_nonzero(found != expected) <= found.size / 1000


@pytest.mark.parametrize('path', TEXTS, ids=lambda path: '/'.join(path.parts[1:])[:60])
def test_results_lines_are_the_same(data, path):
    found, expected = ((folder / path).read_text().splitlines() for folder in (data, GOLDEN))
    value = rf'(?<== ){NUMBER}'  # a DSC, mean or standard deviation; the counts before it are covered by the volumes
    for one, other in zip(found, expected, strict=True):
        counts = r'2 \* \d+ / \(\d+ \+ \d+\)'
        assert re.sub(value, '#', re.sub(counts, '@', one)) == re.sub(value, '#', re.sub(counts, '@', other))
        assert results_values(one) == pytest.approx(results_values(other), abs=1e-3)


def results_values(text):
    """Every DSC, mean and standard deviation in results lines."""
    return [float(value) for value in re.findall(rf' = ({NUMBER})(?= (?:\.|std))', text)]


@pytest.fixture(scope='module')
def bf16(tmp_path_factory):
    """The data folder after coarse to fine, which makes the coarse volumes, and fusion, in bfloat16."""
    data = tmp_path_factory.mktemp('bf16') / 'data'
    write_volumes(data)
    write_snapshots(data)
    stage('init.py', data, 1, 2, -100, 240)
    stage('coarse2fine_testing.py', data, *BEGIN, 0, *RATES, *EPOCHS, 0.5, 0.5, 3, *TIMES, '--precision', 'bf16')
    stage('coarse_fusion.py', data, *BEGIN, 0, *RATES, *EPOCHS, 0.5, *TIMES)
    yield data
    remove_snapshots(data)


@pytest.mark.long
@pytest.mark.parametrize('stage_folder', ['coarse_testing_1e-5x10,20/FD0:fusion', 'coarse2fine_testing_1e-5x10,20'])
def test_bf16_is_within_a_hundredth_of_every_DSC(bf16, stage_folder):
    (path,) = (path for path in TEXTS if str(path).startswith(f'results/{stage_folder}'))
    found, expected = (results_values((folder / path).read_text()) for folder in (bf16, GOLDEN))
    assert len(expected) > 10
    assert found == pytest.approx(expected, abs=0.01)


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    """(losses, norms) of the nine training steps of golden/README.md."""
    folder = tmp_path_factory.mktemp('volumes')
    write_volumes(folder)
    image, label = (np.load(folder / kind / '0001.npy') for kind in ('images', 'labels'))
    expected = json.loads((GOLDEN / 'training.json').read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(int(THREADS))
    with torch.device('meta'):
        model = RSTN(crop_margin=20, crop_prob=0)
    model.load_state_dict(golden_case.weights(), assign=True)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0
    model.train()
    optimizer = make_optimizer(model, '1e-5', '10')
    losses = []
    for step in expected['steps']:
        window = slice_window(step['slice'], image.shape[2], 3)
        x, y = (
            torch.from_numpy(np.moveaxis(volume[:, :, window], 2, 0)[None])
            for volume in (to_unit(image, -100, 240), label)
        )
        losses.append(train_step(model, optimizer, step['mode'], x, y.float()))
    torch.set_num_threads(threads)
    norms = {key: model.state_dict()[key].double().norm().item() for key in expected['norms_after']}
    return losses, norms, expected


def test_losses_of_nine_training_steps_are_the_same(steps):
    losses, _, expected = steps
    assert len(losses) == len(expected['steps']) == 9
    for (coarse, fine, avg), step in zip(losses, expected['steps']):
        tolerance = 1e-4 if step['mode'] == 'S' else 2e-3
        assert (coarse, fine, avg) == pytest.approx(
            (step['coarse_loss'], step['fine_loss'], step['loss']), abs=tolerance
        )


def test_norms_after_nine_training_steps_are_the_same(steps):
    _, norms, expected = steps
    assert norms == pytest.approx(expected['norms_after'], rel=1e-4)
