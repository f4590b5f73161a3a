"""Pretraining and training on tiny cases: log lines, snapshots, where a training starts from, Ctrl-C."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CODE, FOLDER, pretrain_args, run_script, settings, training_args

import pretrain
import training
from model import RSTN, FCN8s, load_RSTN
from running.checkpoint import Run
from running.weights import describe, description, load_weights
from training import Published, end_epoch, make_optimizer, starting_model, train_epoch

CPU = torch.device('cpu')
LOSSES = r'\d\.\d{4}/\d\.\d{4}/\d\.\d{4}'
SNAPSHOTS = f'models/snapshots/{FOLDER}'
EPOCHS = (1, 1, 2, 1)  # S, I, J and the decay step


@pytest.fixture(scope='module')
def trained(initialized, tmp_path_factory):
    """Tiny data after pretrain.py and training.py along Z, each as a process; .data, .pretraining, .log."""
    data = shutil.copytree(initialized, tmp_path_factory.mktemp('trained') / 'data')
    for kind in ('images', 'labels'):  # the slices of fold 0's test cases are never read
        for plane in 'XYZ':
            for case in ('0001', '0002'):
                shutil.rmtree(data / f'{kind}_{plane}' / case)
    pretraining = run_script('pretrain.py', *pretrain_args(data), '--seed', 1)
    assert pretraining.code == 0, pretraining.err
    log = run_script('training.py', *training_args(data, epochs=EPOCHS), '--seed', 1)
    assert log.code == 0, log.err
    return SimpleNamespace(data=data, pretraining=pretraining.out.splitlines(), log=log.out.splitlines())


# --- pretraining ---------------------------------------------------------------------------------------------------


def test_pretraining_says_what_it_does_and_writes_the_folds_FCN8s(trained):
    path = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'
    device, code, given, batches, epoch, written = trained.pretraining
    assert device.startswith('device: CPU')
    assert re.fullmatch(r'0 \d+', batches)
    assert re.fullmatch(r'0 Epoch\[1/1\], Dice Loss 0\.\d{4}, Time elapsed \d+\.\d\ds', epoch)
    assert written == f'written: {path}'
    weights = load_weights(path)
    assert weights.keys() == FCN8s(3, width=4).state_dict().keys()
    assert weights['conv1_1.weight'].shape == (4, 3, 3, 3), 'the width asked for'
    assert weights['score_fr.weight'].any(), 'it was trained'
    assert {tuple(kernel) for kernel in weights['upscore2.weight'][0, 1].tolist()} == {(0, 0, 0, 0)}, 'frozen'


def vgg16(expected, value=lambda i, shape: torch.full((1,), float(i)).expand(shape)):
    """torchvision's names and shapes for the widths of `expected`, the i-th layer's values all i, biases too."""
    layers = [*pretrain.VGG16_CONVOLUTIONS, 'fc6', 'fc7']
    names = [key.removesuffix('.weight') for key in expected if key.startswith(('conv', 'fc')) and 'weight' in key]
    weights = {}
    for i, (layer, name) in enumerate(zip(layers, names)):
        source = {'fc6': 'classifier.0', 'fc7': 'classifier.3'}.get(layer, f'features.{layer}')
        shape = expected[f'{name}.weight'].shape
        weights[f'{source}.weight'] = value(i, shape if name.startswith('conv') else (shape[0], shape[1:].numel()))
        weights[f'{source}.bias'] = value(i, shape[:1])
    weights['classifier.6.weight'], weights['classifier.6.bias'] = torch.zeros(1).expand(1000, 4096), torch.zeros(1000)
    return weights


@pytest.fixture(scope='module')
def expected():
    with torch.device('meta'):
        return FCN8s(21).state_dict()


def test_torchvisions_VGG16_becomes_an_FCN8s_without_score_layers(expected):
    name, state = pretrain.convert(vgg16(expected), 'vgg16-397923af.pth')
    assert name == 'fcn8s_from_vgg16.pth'
    layers = ['conv1_1', 'conv1_2', 'conv2_1', 'conv2_2', 'conv3_1', 'conv3_2', 'conv3_3', 'conv4_1', 'conv4_2',
              'conv4_3', 'conv5_1', 'conv5_2', 'conv5_3', 'fc6', 'fc7']  # fmt: skip
    assert list(state) == [f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')]
    for i, layer in enumerate(layers):
        weight = state[f'{layer}.weight']
        assert weight.shape == expected[f'{layer}.weight'].shape
        assert weight[0, 0, 0, 0] == state[f'{layer}.bias'][0] == i
    assert (pretrain.VGG16_CONVOLUTIONS[0], pretrain.VGG16_CONVOLUTIONS[-1]) == (0, 28)


def test_the_first_fully_connected_layer_runs_over_channels_then_rows_then_columns():
    with torch.device('meta'):
        narrow = FCN8s(21, width=1).state_dict()
    weights = vgg16(narrow, lambda i, shape: torch.arange(float(torch.Size(shape).numel())).reshape(shape))
    fc6 = pretrain.from_vgg16(weights, narrow)['fc6.weight']
    assert fc6[2, 3, 4, 5] == 2 * (8 * 49) + 3 * 49 + 4 * 7 + 5


def test_the_caffe_models_port_is_taken_over_as_it_is(expected):
    weights = {key: torch.zeros(1).expand(tensor.shape) for key, tensor in expected.items()}
    name, state = pretrain.convert(weights, 'a.pth')
    assert name == 'fcn8s_from_caffe.pth'
    assert state is weights


def other_vgg(places, channels):
    """A VGG of other depth: convolutions at these places of `features`, with these output channels."""
    weights, before = {}, 3
    for place, out in zip(places, channels):
        weights[f'features.{place}.weight'] = torch.zeros(1).expand(out, before, 3, 3)
        weights[f'features.{place}.bias'] = torch.zeros(out)
        before = out
    for layer, shape in (('classifier.0', (4096, 25088)), ('classifier.3', (4096, 4096))):
        weights |= {f'{layer}.weight': torch.zeros(1).expand(shape), f'{layer}.bias': torch.zeros(4096)}
    return weights


@pytest.mark.parametrize(
    ('places', 'channels'),
    [
        ((0, 3, 6, 8, 11, 13, 16, 18), (64, 128, 256, 256, 512, 512, 512, 512)),  # VGG-11
        ((0, 2, 5, 7, 10, 12, 15, 17, 20, 22), (64, 64, 128, 128, 256, 256, 512, 512, 512, 512)),  # VGG-13
        ((0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
         (64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)),  # VGG-19
        ((0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40),
         (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)),  # VGG-16 with batch norm
    ],
)  # fmt: skip
def test_another_VGG_is_refused_by_name(places, channels):
    with pytest.raises(ValueError, match=r'^other\.pth: '):
        pretrain.convert(other_vgg(places, channels), 'other.pth')


def test_converting_something_else_is_one_line(data, call):
    torch.save(FCN8s(3, width=4).state_dict(), data / 'narrow.pth')
    done = call('pretrain.py', *pretrain_args(data), '--convert', data / 'narrow.pth')
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'narrow.pth: conv1_1.weight is (4, 3, 3, 3), expected (64, 3, 3, 3)' in done.err
    assert [path for path in (data / 'models').rglob('*') if path.is_file()] == []


def test_weights_are_not_converted_in_place(data, monkeypatch):
    path = data / 'models/pretrained/fcn8s_from_caffe.pth'
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    args = SimpleNamespace(data_path=str(data), convert=str(path), fold_normalization=True)
    monkeypatch.setattr(pretrain, 'convert', lambda weights, *_: (path.name, weights | {'folded': torch.ones(1)}))
    with pytest.raises(ValueError, match='would be replaced by what it is converted to'):
        pretrain.write_converted(args)
    monkeypatch.setattr(pretrain, 'convert', lambda weights, *_: (path.name, weights))
    assert pretrain.write_converted(args) == path and torch.load(path) == {}


# --- where training starts from ------------------------------------------------------------------------------------


def save_pretrained(data, name, n_class=3, **facts):
    path = data / 'models/pretrained' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    network = FCN8s(n_class, width=4)
    torch.nn.init.normal_(network.score_fr.weight)
    state = network.state_dict()
    if facts:
        describe(state, **facts)
    torch.save(state, path)
    return state


@pytest.mark.parametrize(('name', 'n_class'), [('fcn8s_from_caffe.pth', 21), ('fcn8s_FD0_1.pth', 3)])
def test_both_networks_start_from_all_but_the_score_layers(data, name, n_class, capsys):
    state = save_pretrained(data, name, n_class)
    args = settings(data, plane='Z')
    model, _ = starting_model(args)
    assert name in capsys.readouterr().out, 'it says which file it took'
    for network in (model.coarse_model, model.fine_model):
        for key, tensor in network.state_dict().items():
            if 'score' not in key:
                assert torch.equal(tensor, state[key]), key
            elif key.startswith('score'):
                assert not tensor.any(), key
        assert network.upscore8.weight.shape == (3, 3, 16, 16) and not network.upscore8.weight[0, 1].any()


@pytest.mark.parametrize(('organ', 'taken'), [(1, True), (2, False)])
def test_score_layers_are_taken_over_from_a_pretraining_of_the_same_organ(data, organ, taken):
    state = save_pretrained(data, 'fcn8s_FD0_1.pth', organ_ID=organ, cases=['images/0003.npy', 'images/0004.npy'])
    args = settings(data, plane='Z')
    model, _ = starting_model(args)
    assert torch.equal(model.fine_model.score_fr.weight, state['score_fr.weight']) == taken


def test_a_missing_start_is_one_line_that_tells_both_cures(data, call):
    done = call('training.py', *training_args(data))
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'pretrain.py' in done.err and '--convert' in done.err and 'fcn8s_from_caffe.pth' in done.err


def test_another_folds_start_is_refused(trained, initialized, data, call):
    other = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'  # has seen cases 3 and 4, which fold 1 tests
    args = training_args(data)
    args[1] = 1
    done = call('training.py', *args, '--pretrained', other)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'images/0003.npy' in done.err and 'run pretrain.py for this fold' in done.err
    assert [path for path in (data / 'models').rglob('*') if path.is_file()] == []


@pytest.mark.parametrize('content', ['half an RSTN', 'no weights', 'a broken file'])
def test_a_start_that_is_no_FCN8s_is_one_line(data, call, content):
    path = data / 'own.pth'
    if content == 'a broken file':
        path.write_bytes(b'')
    else:
        weights = {'saliency1.weight': torch.zeros(3, 3, 3, 3)} if content == 'half an RSTN' else {}
        torch.save(weights, path)
    done = call('training.py', *training_args(data), '--pretrained', path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert 'own.pth' in done.err


def test_a_start_may_be_an_RSTN_of_other_data_and_what_does_not_fit_is_named(trained, data, call):
    snapshot = trained.data / SNAPSHOTS / 'FD0:ZJ3_1.pkl'
    state = load_weights(snapshot)
    state['saliency2.bias'] += 0.25
    del state['fine_model.score_fr.bias']
    torch.save(state, data / 'pancreas.pkl')
    shutil.copytree(data / 'images', data / 'i')
    for path in (data / 'images').iterdir():  # other data under the same names
        np.save(path, np.load(path)[::-1])
    done = call('training.py', *training_args(data, epochs=(0, 0, 0, 1)), '--pretrained', data / 'pancreas.pkl')
    assert done.code == 0, done.err
    assert 'starts the whole RSTN; does not fit and starts anew: fine_model.score_fr' in done.out
    started = load_weights(data / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    for key in ('coarse_model.fc6.weight', 'saliency2.bias', 'fine_model.conv1_1.weight'):
        assert torch.equal(started[key], state[key]), key


def test_an_RSTN_that_has_seen_the_folds_test_cases_is_refused(trained, call):
    args = training_args(trained.data)
    args[1] = 1
    done = call('training.py', *args, '--pretrained', trained.data / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    assert done.code == 1 and 'was trained on images/0003.npy, a test case of fold 1' in done.err


def test_a_start_hands_on_the_cases_that_it_has_seen(trained, data, call):
    other = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'  # has seen cases 3 and 4
    args = pretrain_args(data, fold=1)
    done = call('pretrain.py', *args, '--start', other)
    assert done.code == 1 and 'was trained on images/0003.npy, a test case of fold 1' in done.err
    (data / 'lists/testing_FD1.txt').write_text('0 images/0001.npy labels/0001.npy\n')
    assert call('pretrain.py', *args, '--start', other).code == 0
    facts = description(load_weights(data / 'models/pretrained/fcn8s_FD1_1.pth'))
    assert {'images/0003.npy', 'images/0004.npy'} <= {case.split()[0] for case in facts['cases']}


def test_a_test_case_is_known_by_its_content_however_the_list_names_it(trained, data, call):
    shutil.copytree(data / 'images', data / 'scans')
    path = data / 'lists/testing_FD1.txt'
    path.write_text(path.read_text().replace(' images/', ' scans/'))
    args = training_args(data)
    args[1] = 1
    done = call('training.py', *args, '--pretrained', trained.data / 'models/pretrained/fcn8s_FD0_1.pth')
    assert (
        done.code == 1 and 'was trained on images/0003.npy, which is scans/0003.npy, a test case of fold 1' in done.err
    )


def test_a_start_that_is_not_there_costs_nothing_of_the_former_training(trained, call):
    before = {path: path.read_bytes() for path in trained.data.rglob('*') if path.suffix in ('.txt', '.ckpt', '.pkl')}
    done = call('training.py', *training_args(trained.data, epochs=EPOCHS), '--pretrained', 'typo.pth')
    assert done.code == 1 and 'typo.pth: no such weights' in done.err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_training_that_fails_at_its_start_keeps_the_former_log_and_one_that_starts_replaces_it(trained, data, call):
    for folder in ('models', 'logs'):
        shutil.copytree(trained.data / folder, data / folder)
    log, other = data / 'logs/FD0:Z3_1.txt', data / 'other.pth'
    former = log.read_text()
    torch.save({'weight': torch.ones(1)}, other)
    args = training_args(data, epochs=EPOCHS)
    done = call('training.py', *args, '--pretrained', other)
    assert done.code == 1 and 'other.pth: not an FCN-8s' in done.err
    assert log.read_text().startswith(former) and 'ended by ValueError' in log.read_text()
    assert call('training.py', *args).code == 0
    again = log.read_text()
    assert again.startswith('device: ') and again.count('end of 0ZJ training stage!') == 1 and 'ended by' not in again


def test_a_log_of_other_settings_is_kept(trained, data, call):
    for folder in ('models', 'logs'):
        shutil.copytree(trained.data / folder, data / folder)
    log = data / 'logs/FD0:Z3_1.txt'
    before = log.read_bytes()
    done = call('training.py', *training_args(data, epochs=(0, 0, 0, 1)), '--recipe', 'fast')
    assert done.code == 0 and 'is of other settings: kept as FD0:Z3_1_SIJ_training_1e-5x10,4.txt' in done.out
    assert (data / 'logs/FD0:Z3_1_SIJ_training_1e-5x10,4.txt').read_bytes() == before != log.read_bytes()


def test_mode_J_does_not_start_from_a_snapshot_of_another_window(trained, call):
    args = training_args(trained.data, epochs=EPOCHS, timestamp='20261123_000000')
    args[3] = -160
    done = call('training.py', *args, '--joint_from', '_')
    assert (
        done.code == 1 and 'ZI3_1.pkl: trained with intensity_window [-100.0, 240.0], not [-160.0, 240.0]' in done.err
    )


def test_testing_warns_of_a_case_that_the_snapshot_was_trained_on(trained, data, call):
    shutil.copytree(trained.data / 'models', data / 'models')
    (data / 'lists/testing_FD0.txt').write_text('2 images/0003.npy labels/0003.npy\n')
    done = call('coarse_testing.py', *training_args(data, epochs=EPOCHS))
    assert done.code == 0 and 'FD0:ZJ3_1.pkl: was trained on images/0003.npy, a test case of this fold' in done.out


def test_a_case_under_another_number_is_refused(trained, data, call):
    path = data / 'lists/training_FD0.txt'
    path.write_text('3 images/0003.npy labels/0003.npy\n')
    start = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'
    done = call('training.py', *training_args(data), '--pretrained', start)
    assert done.code == 1 and 'case 3 is 0004, but images/0003.npy in the list of the fold' in done.err


# --- what snapshots say, and snapshots of steps ----------------------------------------------------------------------


def test_every_snapshot_says_what_its_training_was_like(trained):
    files = [trained.data / SNAPSHOTS / f'FD0:Z{mode}3_1.pkl' for mode in 'SIJ']
    for file in [trained.data / 'models/pretrained/fcn8s_FD0_1.pth', *files]:
        facts = description(load_weights(file))
        assert facts['intensity_window'] == [-100.0, 240.0] and facts['organ_ID'] == 1 and facts['slice_thickness'] == 3
        assert [case.split()[0] for case in facts['cases']] == ['images/0003.npy', 'images/0004.npy']
        assert len(facts['revision']) > 6
    assert facts['plane'] == 'Z' and facts['crop_margin'] == 4 and facts['recipe'] == 'published'


@pytest.mark.parametrize(
    ('place', 'value', 'words'),
    [(3, -150, 'intensity_window [-100.0, 240.0], not [-150.0, 240.0]'), (7, 2, 'organ_ID 1, not 2')],
)
def test_testing_refuses_what_contradicts_the_training(trained, data, call, place, value, words):
    shutil.copytree(trained.data / 'models', data / 'models')
    args = training_args(data, epochs=EPOCHS)
    args[place] = value
    if place == 7:
        args[2] = 2
        (data / SNAPSHOTS / 'FD0:ZJ3_1.pkl').rename(data / SNAPSHOTS / 'FD0:ZJ3_2.pkl')
    done = call('coarse_testing.py', *args)
    assert done.code == 1 and f'trained with {words}' in done.err


def test_snapshots_are_saved_every_n_steps_of_mode_J_and_testing_averages_the_last_ones(trained, data, call):
    (data / 'models/pretrained').mkdir(parents=True)
    shutil.copy(trained.data / 'models/pretrained/fcn8s_FD0_1.pth', data / 'models/pretrained')
    args = training_args(data, epochs=(0, 0, 2, 1))
    done = call('training.py', *args, '--seed', 1, '--snapshot_steps', 3)
    steps = len([line for line in done.out.splitlines() if 'Iter' in line])
    saved = sorted(path.name for path in (data / SNAPSHOTS).glob('*step*'))
    assert saved == [f'FD0:ZJ3_1_step{step:05d}.pkl' for step in range(3, steps, 3)] and len(saved) > 1, 'not the end'
    done = call('coarse_testing.py', *args, '--average', 2)
    assert done.code == 0 and all(name in done.out for name in (saved[-1], 'FD0:ZJ3_1.pkl'))
    averaged, alone = [], []
    for found, names in ((averaged, None), (alone, ['FD0:ZJ3_1.pkl', saved[-1]])):
        for name in names or ['FD0:ZJ3_1.pkl']:
            if names:
                (data / SNAPSHOTS / name).replace(data / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
                assert call('coarse_testing.py', *args, '--overwrite').code == 0
            volumes = data / 'results/coarse_testing_1e-5x10,4/FD0:ZJ3_1.pkl/volumes'
            found.append(np.load(volumes / 'e0021_1.npz')['volume'].astype(float))
    np.testing.assert_allclose(averaged[0], (alone[0] + alone[1]) / 2, atol=1)
    done = call('coarse_testing.py', *args, '--average', 9, '--overwrite')
    assert done.code == 1 and 'too few for --average 9' in done.err
    assert call('training.py', *training_args(data, epochs=(0, 0, 1, 1))).code == 0
    assert not list((data / SNAPSHOTS).glob('*step*')), 'those of the former training are gone'


def test_mode_J_starts_from_a_stored_snapshot_of_I_at_rates_of_its_own(trained, data, call):
    shutil.copytree(trained.data / 'models', data / 'models')
    stamp = '20261124_000000'
    args = training_args(data, epochs=(1, 1, 1, 1), timestamp=stamp)
    args[12:14] = ['1e-9', 1]  # learning_rate2, learning_rate_m2: next to nothing
    done = call('training.py', *args, '--seed', 1, '--joint_from', '_')
    assert done.code == 0, done.err
    assert '0ZJ Epoch[1/1], Iter[00000]' in done.out and '0ZI Epoch' not in done.out and '0ZS Epoch' not in done.out
    before, after = (load_weights(data / SNAPSHOTS / name) for name in ('FD0:ZI3_1.pkl', f'FD0:ZJ3_1_{stamp}.pkl'))
    assert all(torch.allclose(before[key], after[key], atol=1e-5) for key in before)
    for rate in ('1e-5', '1e-6'):
        args[12] = rate
        done = call('training.py', *args, '--joint_from', '_', '--resume')
        assert done.code == 1 and f'learning_rate2 was 1e-9, is {rate}' in done.err
    args[12] = 'abc'
    done = call('training.py', *args, '--joint_from', '_')
    assert done.code == 2 and "argument learning_rate2: 'abc' is not a positive number" in done.err
    args[12] = '1e-9'
    done = call('training.py', *args, '--joint_from', '20200101_000000')
    assert done.code == 1 and 'FD0:ZI3_1_20200101_000000.pkl: no such weights' in done.err


# --- the training log ----------------------------------------------------------------------------------------------


def test_the_log_is_as_published(trained):
    log = iter(trained.log)
    assert next(log).startswith('device: CPU')
    assert next(log).startswith('code: ')
    assert next(log).startswith('arguments: data_path=')
    batches = int(re.fullmatch(r'0Z (\d+)', next(log))[1])
    assert batches > 3
    assert 'fcn8s_FD0_1.pth' in next(log)
    assert next(log) == '0ZS load pre-trained FCN8s model successfully!'
    for mode, epochs, good in (('S', 1, 0.3), ('I', 1, 0.2), ('J', 2, 0.15)):
        for epoch in range(1, epochs + 1):
            losses = []
            for i in range(batches):
                line = next(log)
                assert re.fullmatch(
                    rf'0Z{mode} Epoch\[{epoch}/{epochs}\], Iter\[{i:05d}\], Coarse/Fine/Avg Loss {LOSSES}, '
                    r'Time Elapsed \d+\.\d\ds',
                    line,
                )
                losses.append([float(value) for value in re.search(LOSSES, line)[0].split('/')])
            line = next(log)
            assert re.fullmatch(
                rf'0Z{mode} Epoch\[{epoch}\], Total Coarse/Fine/Avg Loss {LOSSES}, Time elapsed \d+\.\d\ds', line
            )
            total = [float(value) for value in re.search(LOSSES, line)[0].split('/')]
            np.testing.assert_allclose(total, np.mean(losses, axis=0), atol=2e-4)
            np.testing.assert_allclose([c / 3 + f * 2 / 3 for c, f, _ in losses], [a for *_, a in losses], atol=2e-4)
            if mode == 'J':
                assert next(log) == 'lr decay'
        verdict = next(log)
        assert verdict.startswith(f'0Z{mode} ') and f'{total[2]:.4f}' in verdict and f'at most {good}' in verdict
        assert ('NOT reached' in verdict) == (total[2] > good)
        assert next(log) == f'########## end of 0Z{mode} training stage!'
    assert next(log, None) is None


def test_each_mode_leaves_a_snapshot_that_testing_loads(trained):
    files = sorted(path.name for path in (trained.data / SNAPSHOTS).glob('*.pkl'))
    assert files == ['FD0:ZI3_1.pkl', 'FD0:ZJ3_1.pkl', 'FD0:ZS3_1.pkl']
    before, *others = [load_RSTN(trained.data / SNAPSHOTS / file, 'O', 3, 4, CPU) for file in files]
    for net in others:
        assert not torch.equal(net.coarse_model.fc7.weight, before.coarse_model.fc7.weight)
    for net in (before, *others):
        upscore = net.fine_model.upscore8.weight
        assert torch.equal(upscore, FCN8s(3, width=4).upscore8.weight), 'frozen'


def without_times(log):
    return [re.sub(r'\d+\.\d\ds', '', line) for line in log]


def test_a_seed_makes_a_run_repeatable(trained, data, call):
    (data / 'models/pretrained').mkdir(parents=True)
    shutil.copy(trained.data / 'models/pretrained/fcn8s_FD0_1.pth', data / 'models/pretrained')
    args = training_args(data, epochs=EPOCHS, timestamp='20261123_000000')
    again = call('training.py', *args, '--seed', 1)
    assert without_times(again.out.splitlines())[5:] == without_times(trained.log)[5:]
    one = load_weights(trained.data / SNAPSHOTS / 'FD0:ZJ3_1.pkl')
    two = load_weights(data / SNAPSHOTS / 'FD0:ZJ3_1_20261123_000000.pkl')
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = call('training.py', *training_args(data, epochs=(1, 0, 0, 1)), '--seed', 2)
    assert without_times(other.out.splitlines())[6:10] != without_times(trained.log)[6:10]
    three = [load_weights(data / SNAPSHOTS / f'FD0:Z{mode}3_1.pkl') for mode in 'SIJ']
    assert all(torch.equal(three[0][key], later[key]) for later in three[1:] for key in later), 'modes of no epochs'


@pytest.fixture
def sample():
    label = torch.zeros(3, 16, 16)
    label[:, 4:9, 5:11] = 1
    return label * 0.5 + 0.2, label


class Slices(list):
    """A training set in memory, of images in [0, 1]."""

    def unit_on(self, device, image):
        return image


def train_mode(args, mode, count, model, optimizer, sample):
    """Train `count` epochs of a mode on one sample."""
    setattr(args, f'epoch_{mode}', count)
    run = Run(Path(args.data_path) / 'checkpoint', args)
    for epoch in run.epochs(range(count)):
        slices = Slices([sample])
        recipe = Published(args, slices, CPU)
        train_epoch(args, run, mode, epoch, model, optimizer, slices, recipe)
        end_epoch(args, run, mode, epoch, model, optimizer, recipe)


def test_rates_halve_every_lr_decay_epochs_in_mode_J_only(tmp_path, sample, capsys):
    args = settings(tmp_path, plane='Z', timestamp='_', lr_decay_epoch=2)
    model = RSTN(width=3)
    optimizer = make_optimizer(model, '1e-5', '10')
    train_mode(args, 'I', 2, model, optimizer, sample)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([1e-5, 2e-5, 1e-4, 2e-4])
    assert 'lr decay' not in capsys.readouterr().out
    train_mode(args, 'J', 5, model, optimizer, sample)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([1e-5 / 4, 2e-5 / 4, 1e-4 / 4, 2e-4 / 4])
    log = capsys.readouterr().out.splitlines()
    assert [log[i - 1][4:12] for i, line in enumerate(log) if line == 'lr decay'] == ['Epoch[2]', 'Epoch[4]']


def test_momentum_goes_on_from_mode_to_mode(tmp_path, sample):
    args = settings(tmp_path, plane='Z', timestamp='_', lr_decay_epoch=2)
    model = RSTN(width=3)
    optimizer = make_optimizer(model, '1e-5', '10')
    train_mode(args, 'S', 1, model, optimizer, sample)
    bias = model.fine_model.score_fr.bias
    before = optimizer.state[bias]['momentum_buffer'].clone()
    assert before.any()
    train_mode(args, 'I', 1, model, optimizer, sample)
    torch.testing.assert_close(optimizer.state[bias]['momentum_buffer'], 0.99 * before + bias.grad)


def test_the_verdict_holds_the_loss_against_the_published_goal():
    for mode, good in (('S', 0.3), ('I', 0.2), ('J', 0.15)):
        assert 'NOT' not in training.convergence(mode, good - 0.01)
        assert 'NOT' in training.convergence(mode, good + 0.01)


def test_thickness_1_trains(data, call):
    args = pretrain_args(data)
    args[6] = 1
    assert call('pretrain.py', *args, '--seed', 1).code == 0
    args = training_args(data, plane='X')
    args[6] = 1
    done = call('training.py', *args)
    assert done.code == 0, done.err
    for mode in 'SIJ':
        assert load_weights(data / SNAPSHOTS / f'FD0:X{mode}1_1.pkl')['saliency2.weight'].shape == (1, 1, 5, 5)


def test_fine_iterations_are_told_to_training_and_weighed_as_in_the_paper(trained, data, call):
    """One coarse and T = 2 fine losses: 1/5 and 2/5 each; `Fine` is the mean of the two."""
    pretrained = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'
    done = call('training.py', *training_args(data), '--pretrained', pretrained, '--fine_iterations', 2)
    assert done.code == 0, done.err
    steps = re.findall(r'^0Z([SIJ]) Epoch\[1/1\], Iter.* Loss ([\d.]+)/([\d.]+)/([\d.]+),', done.out, re.M)
    assert {mode for mode, *_ in steps} == set('SIJ')
    for mode, *losses in steps:
        coarse, fine, avg = map(float, losses)
        weights = (1 / 3, 2 / 3) if mode == 'S' else (1 / 5, 4 / 5)
        assert avg == pytest.approx(weights[0] * coarse + weights[1] * fine, abs=2e-4), mode
    load_RSTN(data / SNAPSHOTS / 'FD0:ZJ3_1.pkl', 'F', 3, 4, CPU)  # one shared fine network: tested as any other


def test_loading_by_processes_gives_the_same_set(trained, data, call):
    args = training_args(data, epochs=(1, 0, 0, 1))
    pretrained = trained.data / 'models/pretrained/fcn8s_FD0_1.pth'
    logs = [
        call('training.py', *args, '--pretrained', pretrained, '--seed', 1, '--workers', workers) for workers in (0, 1)
    ]
    assert [log.code for log in logs] == [0, 0]
    one, two = (without_times(log.out.splitlines()) for log in logs)
    assert one[:2] == two[:2] and one[3:] == two[3:], 'all but the arguments'


def test_ctrl_c_saves_the_mode_and_stops_with_130(trained, data, capsys):
    (data / 'models/pretrained').mkdir(parents=True)
    shutil.copy(trained.data / 'models/pretrained/fcn8s_FD0_1.pth', data / 'models/pretrained')
    command = [sys.executable, CODE / 'training.py', *map(str, training_args(data, epochs=(1, 10000, 1, 1)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('0ZI Epoch[1/10000], Iter[00001]'):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ''
    assert '0ZI interrupted: saved as it was' in out.splitlines()[-1]
    assert sorted(path.name for path in (data / SNAPSHOTS).iterdir()) == [
        'FD0:Z3_1.ckpt',
        'FD0:ZI3_1.pkl',
        'FD0:ZS3_1.pkl',
    ]
    for mode, warned in (('S', False), ('I', True)):
        load_RSTN(data / SNAPSHOTS / f'FD0:Z{mode}3_1.pkl', 'O', 3, 4, CPU)
        assert ('its training was interrupted' in capsys.readouterr().out) == warned


def test_a_loss_that_is_no_number_ends_training_in_one_line(trained, data, call):
    path = data / 'nan.pth'
    state = load_weights(trained.data / 'models/pretrained/fcn8s_FD0_1.pth')
    state['conv1_1.bias'] = torch.full((4,), float('nan'))
    torch.save(state, path)
    done = call('training.py', *training_args(data), '--pretrained', path)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert '0ZS Epoch[1/1], Iter[00000]: the loss is nan' in done.err
    assert [path for path in (data / 'models').rglob('*') if path.is_file()] == []
