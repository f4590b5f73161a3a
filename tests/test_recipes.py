"""The fast recipe beside the published one, and a pretraining that learns crops first and starts again."""

import math
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BEGIN, FOLDER, coarse2fine_args, pretrain_args, settings, training_args
from test_parallel import finished, torchrun
from test_resuming import end, log_lines, start, wait_for
from torch.utils.data import default_collate

import Data
import pretrain
import training
from model import LARGEST_GRADIENT, OUTSIDE, RSTN, ClippedAdam, DiceEntropyLoss, FCN8s, set_rates, smooth_dice
from running.weights import description, load_weights
from volumes.planes import plane_weights

FAST = FOLDER.replace('training_', 'training_fast_')
EPOCHS = (1, 1, 1, 1)


@pytest.fixture
def started(data):
    """The tiny data folder with an FCN-8s that pretrain.py could have made."""
    torch.manual_seed(3)
    path = data / 'models/pretrained/fcn8s_FD0_1.pth'
    path.parent.mkdir(parents=True)
    network = FCN8s(3, width=4)
    torch.nn.init.normal_(network.score_fr.weight, std=0.1)
    torch.save(network.state_dict(), path)
    return data


# --- the two recipes -----------------------------------------------------------------------------------------------


def test_recipes_have_folders_of_their_own_and_say_so(started, call):
    args = training_args(started, epochs=EPOCHS)
    assert call('training.py', *args, '--seed', 1).code == 0
    assert call('training.py', *args, '--seed', 1, '--recipe', 'fast').code == 0
    one, two = (load_weights(started / 'models/snapshots' / folder / 'FD0:ZJ3_1.pkl') for folder in (FOLDER, FAST))
    assert (description(one)['recipe'], description(two)['recipe']) == ('published', 'fast')
    assert one.keys() == two.keys()
    assert not torch.equal(one['coarse_model.fc7.weight'], two['coarse_model.fc7.weight'])


def test_testing_takes_the_snapshots_of_its_recipe(tested, call):
    (tested / 'models/snapshots' / FOLDER).rename(tested / 'models/snapshots' / FAST)
    args = coarse2fine_args(tested)
    published = call('coarse2fine_testing.py', *args)
    assert published.code == 1 and f'{FOLDER}/FD0:XJ3_1.pkl' in published.err
    assert call('coarse2fine_testing.py', *args, '--recipe', 'fast').code == 0
    assert [path.name for path in (tested / 'results').glob('coarse2fine*')] == ['coarse2fine_testing_fast_1e-5x10,4']


def test_fast_is_adam_on_one_cosine_with_the_fine_layers_at_m1_times_the_rate(data):
    args = settings(data, plane='Z', recipe='fast', joint_from=None, slice_threshold=0.98)
    recipe = training.Fast(args, range(5), 'cpu')
    assert recipe.steps == 15
    model = RSTN(width=3)
    optimizer = recipe.make_optimizer(model, '1e-3', '2')
    assert isinstance(optimizer, torch.optim.Adam)
    count = sum(len(group['params']) for group in optimizer.param_groups)
    assert count == sum(parameter.requires_grad for parameter in model.parameters())
    rates = []
    for done in (0, 0.05, 0.5, 1):
        set_rates(optimizer, done)
        rates.append([group['lr'] for group in optimizer.param_groups])
    assert rates[0][0] == pytest.approx(2e-5)
    assert rates[1][0] == pytest.approx(1e-3, rel=0.01)
    assert rates[2] == pytest.approx([5e-4, 1e-3])
    assert rates[3] == pytest.approx([0, 0])


def test_a_quarter_of_the_joint_steps_of_fast_crop_by_the_label(data, monkeypatch):
    args = settings(data, plane='Z', recipe='fast', joint_from=None, slice_threshold=0.98)
    slices, taken = Data.load_slices(args, 'Z'), []
    recipe, optimizer = training.Fast(args, slices, 'cpu'), SimpleNamespace(param_groups=[])
    monkeypatch.setattr(training, 'train_step', lambda model, optimizer, mode, *_: taken.append(mode))
    monkeypatch.setattr(training, 'coarse_step', lambda *_: None)
    image, label = default_collate([slices[0]])
    for mode in 'SIJ':
        for position in range(8):
            recipe.step(SimpleNamespace(epoch=0, position=position), None, optimizer, mode, image, label)
    assert ''.join(taken) == 'SSSSSSSS' + 'IIIIIIII' + 'IJJJIJJJ'


def test_slices_without_the_organ_have_a_gradient():
    for loss, learns in ((training.DSC_loss(), False), (smooth_dice, True), (DiceEntropyLoss(), True)):
        output = torch.full((1, 3, 8, 8), 0.1, requires_grad=True)
        loss(output, torch.zeros(1, 3, 8, 8)).backward()
        assert (output.grad > 1e-4).all() == learns


def test_a_network_that_is_sure_and_wrong_still_learns():
    logits, label = torch.full((1, 3, 8, 8), -500.0), torch.zeros(1, 3, 8, 8)
    label[:, :, 2:4] = 1
    logits[..., 6:] = OUTSIDE
    loss = DiceEntropyLoss()(logits.requires_grad_(), label)
    loss.backward()
    seen = label[..., :6] == 1
    assert (logits.grad[..., :6][seen] < -1e-4).all()
    assert (logits.grad[..., 6:] == 0).all(), 'where the fine network has no say'
    assert loss.item() == pytest.approx(1 + (500 * 6 + 100 * 2) / 8 / 4, rel=1e-2)


def test_training_smooths_the_loss_by_a_thousandth_of_the_pixels_and_pretraining_by_a_hundredth():
    probability, label = torch.full((1, 1, 10, 10), 0.5), torch.zeros(1, 1, 10, 10)
    label[..., :2] = 1  # 20 of 100 pixels, so the Dice is 2 * 10 / (50 + 20)
    assert smooth_dice(probability, label).item() == pytest.approx(1 - 21 / 71)
    assert DiceEntropyLoss()(torch.zeros(1, 1, 10, 10), label).item() == pytest.approx(1 - 20.1 / 70.1 + math.log(2))


def test_a_fast_training_that_is_killed_ends_with_the_same_bits_and_log(started, tmp_path):
    other = shutil.copytree(started, tmp_path / 'undisturbed')
    options = ('--seed', 1, '--recipe', 'fast', '--checkpoint_minutes', 0, '--resume')
    undisturbed = start('training.py', *training_args(other, epochs=EPOCHS), *options)
    out, err = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, err
    process = start('training.py', *training_args(started, epochs=EPOCHS), *options)
    wait_for(process, '0ZI .+Iter.00001')
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    process = start('training.py', *training_args(started, epochs=EPOCHS), *options)
    resumed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert 'resumed from' in resumed
    log = 'logs/FD0:Z3_1.txt'
    assert log_lines((started / log).read_text()) == log_lines((other / log).read_text())
    one, two = (load_weights(folder / 'models/snapshots' / FAST / 'FD0:ZJ3_1.pkl') for folder in (started, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_two_processes_train_fast(started):
    args = training_args(started, epochs=(1, 1, 0, 1))
    args[args.index('cpu')] = 'cpu,cpu'
    log = finished(torchrun(*args, '--recipe', 'fast'))
    assert len(re.findall(r'0Z[SI] Epoch.1., Total', log)) == 2 and 'NOT reached' not in log
    assert (started / 'models/snapshots' / FAST / 'FD0:ZJ3_1.pkl').exists()


# --- planes weighted by their slice spacing ------------------------------------------------------------------------


def test_planes_are_weighted_by_slice_spacing_in_the_fast_recipe_only():
    assert plane_weights('fast', [1, 1, 4]).tolist() == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    assert plane_weights('fast', [2, 2, 2]) is None and plane_weights('fast', None) is None
    assert plane_weights('published', [1, 1, 4]) is None


# --- varied slices -------------------------------------------------------------------------------------------------


def test_a_varied_sample_is_the_box_where_nothing_varies(monkeypatch):
    for most in ('TURN', 'SCALE', 'STRETCH', 'CONTRAST'):
        monkeypatch.setattr(Data, most, 0)
    image, label = torch.rand(3, 20, 30), (torch.rand(6, 20, 30) > 0.5).float()
    seen, marked = Data.varied(image, label, (3, 15, 4, 27))
    torch.testing.assert_close(seen, image[:, 3:15, 4:27])
    assert torch.equal(marked, label[:, 3:15, 4:27])


def test_image_and_label_vary_together_and_dark_stays_dark():
    random.seed(1)
    label = torch.zeros(3, 40, 40)
    label[:, 15:25, 10:22] = 1
    for _ in range(20):
        seen, marked = Data.varied(0.5 * label, label)
        assert seen.shape == (3, 40, 40) and marked.unique().tolist() == [0, 1]
        assert (seen[marked == 1] > 0.03).all() and not seen[:, :3].any()
        assert 60 < marked[1].sum() < 240


def test_a_whole_slice_is_shifted_and_a_crop_is_not(monkeypatch):
    for most in ('TURN', 'SCALE', 'STRETCH', 'CONTRAST'):
        monkeypatch.setattr(Data, most, 0)
    label = torch.zeros(3, 40, 60)
    label[:, 20, 30] = 1
    moves = []
    for _ in range(50):
        seen, marked = Data.varied(torch.rand(3, 40, 60), torch.nn.functional.max_pool2d(label, 3, 1, 1))
        moves.append(marked[0].nonzero().double().mean(0) - torch.tensor([20, 30]))
    furthest = torch.stack(moves).abs().amax(0)
    assert 4 < furthest[0] <= 6.5 and 6 < furthest[1] <= 9.5, 'up to 15 % of each side'
    assert torch.equal(Data.varied(label, label, (0, 40, 0, 60))[1], label)


# --- pretraining ---------------------------------------------------------------------------------------------------


def run_pretraining(monkeypatch, data, *options):
    monkeypatch.setattr(sys, 'argv', ['pretrain.py', *map(str, [*pretrain_args(data), '--seed', 1, *options])])
    pretrain.main()
    return load_weights(data / 'models/pretrained/fcn8s_FD0_1.pth')


def fail_once(self, loss, empty, step, crops):
    return self.number == 1 and step == 2


def test_a_start_that_does_not_learn_is_replaced_and_a_line_says_so(data, monkeypatch, capsys):
    first = run_pretraining(monkeypatch, data)
    monkeypatch.setattr(pretrain.Attempt, 'fails', fail_once)
    second = run_pretraining(monkeypatch, data)
    assert 'attempt 1 does not learn' in capsys.readouterr().out
    assert not torch.equal(first['conv1_1.weight'], second['conv1_1.weight']), 'other weights'


def test_a_second_start_that_is_interrupted_goes_on_to_the_same_bits(data, monkeypatch, capsys):
    monkeypatch.setattr(pretrain.Attempt, 'fails', fail_once)
    whole = run_pretraining(monkeypatch, data)
    step, count = pretrain.pretrain_step, []

    def cut(*args):
        count.append(1)
        if len(count) == 6:
            raise ValueError('cut')
        return step(*args)

    monkeypatch.setattr(pretrain, 'pretrain_step', cut)
    with pytest.raises(ValueError, match='cut'):
        run_pretraining(monkeypatch, data, '--resume', '--checkpoint_minutes', 0)
    capsys.readouterr()
    resumed = run_pretraining(monkeypatch, data, '--resume', '--checkpoint_minutes', 0)
    out = capsys.readouterr().out
    assert 'resumed from' in out and 'does not learn' not in out
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_after_three_starts_the_error_gives_advice(data, monkeypatch):
    monkeypatch.setattr(pretrain, 'STUCK', 0)
    monkeypatch.setattr(pretrain, 'PATIENCE', 2)
    with pytest.raises(ValueError, match=r'attempt 3 does not learn.*--learning_rate.*check_data'):
        run_pretraining(monkeypatch, data)
    assert list((data / 'models/pretrained').glob('*.pth')) == []


def test_a_start_is_judged_by_its_crops_only():
    steps = range(pretrain.PATIENCE + 5)

    def failed(loss, empty, crops):
        attempt = pretrain.Attempt()
        return [step for step in steps if attempt.fails(loss, empty, step, crops)]

    assert not failed(0.9, 1, crops=pretrain.PATIENCE - 1), 'too few steps to tell'
    assert failed(0.9, 1, crops=pretrain.PATIENCE) == [pretrain.PATIENCE - 1]
    assert failed(0.62, 0.62, crops=pretrain.PATIENCE), 'it marks nothing'
    assert failed(float('nan'), 0.62, crops=pretrain.PATIENCE)
    assert not failed(0.4, 0.62, crops=pretrain.PATIENCE)


def test_crops_hold_the_organ_and_have_one_size():
    random.seed(2)
    samples = []
    for a, b in ((5, 9), (30, 2), (18, 25)):
        label = torch.zeros(6, 40, 32)
        label[:3, a : a + 6, b : b + 4] = 1
        label[3:] = 1  # another organ
        samples.append((label[:3] * 0.5, label))
    for _ in range(10):
        image, label = pretrain.crops(samples, lambda *sample: sample, 8, thickness=3, vary=False)
        assert image.shape[0] == 3 and image.shape[2:] == label.shape[2:]
        assert label[:, :3].sum((1, 2, 3)).tolist() == [3 * 24] * 3, 'no pixel of the organ is cut off'


def test_large_gradients_are_clipped():
    torch.manual_seed(0)
    model = FCN8s(3, width=3).train()
    for name, weight in model.named_parameters():
        if name.startswith('score') and name.endswith('weight'):
            torch.nn.init.normal_(weight, std=10)
    label = torch.zeros(1, 3, 24, 24)
    label[:, :, 8:16, 8:16] = 1
    optimizer = ClippedAdam(model.parameters(), lr=0)
    _, empty = pretrain.pretrain_step(model, optimizer, label * 0.5, label, thickness=3)
    assert empty == pytest.approx(1 - 0.01 / (1 / 9 + 0.01)), 'that of an empty mask'
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    assert norm.item() == pytest.approx(LARGEST_GRADIENT, rel=1e-3)


def test_other_organs_are_learned_and_left_out_of_the_file(initialized, tmp_path, monkeypatch):
    data = shutil.copytree(initialized, tmp_path / 'data')
    for path in data.glob('lists/training_?.txt'):  # a second organ where the first one is
        lines = [line.split() for line in path.read_text().splitlines()]
        path.write_text(''.join(' '.join([*line, *line[5:10]]) + '\n' for line in lines))
    seen = []
    step = pretrain.pretrain_step
    monkeypatch.setattr(pretrain, 'pretrain_step', lambda *args: seen.append(args[3].shape[1]) or step(*args))
    args = [data, BEGIN[0], 2, *BEGIN[2:], 'cpu', 1, '--width', 4, '--seed', 1]
    monkeypatch.setattr(sys, 'argv', ['pretrain.py', *map(str, args)])
    pretrain.main()
    assert set(seen) == {6}
    weights = load_weights(data / 'models/pretrained/fcn8s_FD0_1.pth')
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in FCN8s(3, width=4).state_dict().items()
    }


def test_converted_weights_are_trained_on_the_fold(started, call):
    path = started / 'models/pretrained/fcn8s_from_vgg16.pth'
    network = FCN8s(3, width=5)
    torch.save({key: value for key, value in network.state_dict().items() if 'score' not in key}, path)
    done = call('pretrain.py', *pretrain_args(started), '--start', path)
    assert done.code == 0, done.err
    weights = load_weights(started / 'models/pretrained/fcn8s_FD0_1.pth')
    assert len(weights['conv1_1.weight']) == 5
    assert (weights['conv1_1.weight'] - network.conv1_1.weight).abs().max() < 0.1


def test_converted_weights_are_trained_further_whatever_their_file_is_called(data, monkeypatch):
    path = data / 'caffe_or_not.pth'
    torch.save({}, path)
    state = {key: value for key, value in FCN8s(3, width=5).state_dict().items() if 'score' not in key}
    monkeypatch.setattr(pretrain, 'convert', lambda *args: ('fcn8s_from_vgg16.pth', state))
    monkeypatch.setattr(
        sys, 'argv', ['pretrain.py', *map(str, pretrain_args(data)), '--convert', str(path), '--further']
    )
    pretrain.main()
    assert len(load_weights(data / 'models/pretrained/fcn8s_FD0_1.pth')['conv1_1.weight']) == 5


def test_layers_of_unit_variance():
    torch.manual_seed(1)
    network = FCN8s(3, width=4)
    image = torch.rand(2, 3, 30, 30) * 0.2
    network.unit_variance(image)
    before = []
    network.conv3_2.register_forward_hook(lambda layer, inputs, output: before.append(output.detach().clone()))
    network.features(image)
    assert before[0].square().mean() == pytest.approx(1, rel=1e-3)


def test_standardized_weights_end_as_ordinary_ones_of_the_same_network():
    torch.manual_seed(1)
    network, image = FCN8s(3, width=4), torch.rand(1, 3, 30, 30)
    network.unit_variance(image)
    torch.nn.init.normal_(network.score_fr.weight)
    keys, before = set(network.state_dict()), network.eval()(image)
    pretrain.standardize(network)
    torch.testing.assert_close(network(image), before, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    pretrain.pretrain_step(network, optimizer, image, (torch.rand(1, 3, 30, 30) < 0.5).float(), 3)
    learned = network(image)
    assert not torch.allclose(learned, before, rtol=1e-2)
    assert pretrain.plain(network).state_dict().keys() == keys
    torch.testing.assert_close(network(image), learned)
    assert network.conv3_2.weight.mean((1, 2, 3)).abs().max() < 1e-6, 'centred after a step, too'


def test_folding_lets_the_first_layer_see_what_it_was_trained_on():
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(3, 4, 3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    image = torch.rand(1, 3, 9, 9)
    normalized = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    state = {'conv1_1.weight': layer.weight.data, 'conv1_1.bias': layer.bias.data}
    folded = pretrain.fold_normalization(state, mean, std)
    wanted = layer(normalized)
    mine = torch.nn.functional.conv2d(image, folded['conv1_1.weight'], folded['conv1_1.bias'])
    torch.testing.assert_close(mine, wanted)
