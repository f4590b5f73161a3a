"""FCN-8s and RSTN: names, shapes and first values; boxes and crops; what each mode looks at; the loss; the rates."""

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_weights

from model import RSTN, DSC_loss, FCN8s, bilinear_upsampling, bounding_box, crop, get_parameters, uncrop, union
from training import make_optimizer, train_step

# --- keys, shapes and first values ---------------------------------------------------------------------------------

CONVOLUTIONS = [
    ('conv1_1', (64, 3, 3, 3)),
    ('conv1_2', (64, 64, 3, 3)),
    ('conv2_1', (128, 64, 3, 3)),
    ('conv2_2', (128, 128, 3, 3)),
    ('conv3_1', (256, 128, 3, 3)),
    ('conv3_2', (256, 256, 3, 3)),
    ('conv3_3', (256, 256, 3, 3)),
    ('conv4_1', (512, 256, 3, 3)),
    ('conv4_2', (512, 512, 3, 3)),
    ('conv4_3', (512, 512, 3, 3)),
    ('conv5_1', (512, 512, 3, 3)),
    ('conv5_2', (512, 512, 3, 3)),
    ('conv5_3', (512, 512, 3, 3)),
    ('fc6', (4096, 512, 7, 7)),
    ('fc7', (4096, 4096, 1, 1)),
]


def published_shapes(n_class):
    """{key: shape} of the Caffe model's PyTorch port with n_class classes."""
    scores = [('score_fr', 4096), ('score_pool3', 256), ('score_pool4', 512)]
    shapes = {}
    for layer, shape in CONVOLUTIONS + [(layer, (n_class, channels, 1, 1)) for layer, channels in scores]:
        shapes |= {f'{layer}.weight': shape, f'{layer}.bias': shape[:1]}
    sizes = {'upscore2': 4, 'upscore_pool4': 4, 'upscore8': 16}
    return shapes | {f'{layer}.weight': (n_class, n_class, size, size) for layer, size in sizes.items()}


def shapes_of(module):
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def on_meta(make):
    """A full-width network without its memory."""
    with torch.device('meta'):
        return make()


@pytest.mark.parametrize('n_class', [1, 3, 21])
def test_FCN8s_has_the_published_keys_and_shapes(n_class):
    assert shapes_of(on_meta(lambda: FCN8s(n_class))) == published_shapes(n_class)


@pytest.mark.parametrize('n_class', [1, 3])
def test_RSTN_has_the_published_keys_and_shapes(n_class):
    expected = {f'{net}.{key}': shape for net in ('coarse_model', 'fine_model')
                for key, shape in published_shapes(n_class).items()}  # fmt: skip
    for layer, size in (('saliency1', 3), ('saliency2', 5)):
        expected |= {f'{layer}.weight': (n_class, n_class, size, size), f'{layer}.bias': (n_class,)}
    net = on_meta(lambda: RSTN(n_class=n_class))
    assert shapes_of(net) == expected
    assert n_class == 1 or round(sum(p.numel() for p in net.parameters()) / 1e6) == 269


def test_padding_pooling_and_dropout_are_those_of_the_paper():
    net = on_meta(lambda: FCN8s(3))
    assert net.conv1_1.padding == (100, 100)
    assert all(net.get_submodule(layer).padding == (1, 1) for layer, _ in CONVOLUTIONS[1:13])
    assert net.fc6.padding == net.fc7.padding == (0, 0)
    dropouts = [layer for layer in net.modules() if isinstance(layer, torch.nn.Dropout2d)]
    assert [dropout.p for dropout in dropouts] == [0.5, 0.5]


@pytest.mark.parametrize('size', [(1, 1), (24, 31), (40, 48)])
def test_an_FCN8s_returns_logits_of_the_images_size(size):
    assert FCN8s(3, width=4)(torch.zeros(2, 3, *size)).shape == (2, 3, *size)


def test_pools_keep_the_odd_last_row():
    pool3, pool4, fc7 = FCN8s(3, width=4).features(torch.zeros(1, 3, 24, 31))
    # 24 + 198 = 222 -> 111 -> 56 -> 28 -> 14 -> 7 and 31 + 198 = 229 -> 115 -> 58 -> 29 -> 15 -> 8; fc6 takes 6 off
    assert (pool3.shape[2:], pool4.shape[2:], fc7.shape[2:]) == ((28, 29), (14, 15), (1, 2))


def test_new_score_layers_are_zero_and_upsampling_is_bilinear_on_the_diagonal_and_frozen():
    net = FCN8s(3, width=4)
    for layer in (net.score_fr, net.score_pool3, net.score_pool4):
        assert not layer.weight.any() and not layer.bias.any()
    for layer in (net.upscore2, net.upscore_pool4, net.upscore8):
        assert not layer.weight.requires_grad
        assert layer.bias is None
        assert all(layer.weight[a, b].any() == (a == b) for a, b in itertools.product(range(3), repeat=2))
    np.testing.assert_array_equal(
        net.upscore2.weight[1, 1] * 16, [[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]
    )


def test_bilinear_weights_of_a_literal_size():
    line = np.array([1, 3, 5, 7, 7, 5, 3, 1]) / 8
    np.testing.assert_allclose(bilinear_upsampling(1, 8)[0, 0], np.outer(line, line))


def test_loaded_upsampling_is_used_as_stored_between_the_classes():
    net = RSTN(width=4)
    net.load_state_dict(tiny_weights())
    assert net.coarse_model.upscore8.weight[0, 1].any()
    dense = net.coarse_model(torch.full((1, 3, 24, 24), 0.7))
    with torch.no_grad():
        for layer in ('upscore2', 'upscore_pool4', 'upscore8'):
            weight = net.coarse_model.get_submodule(layer).weight
            weight.copy_(bilinear_upsampling(3, weight.shape[2]))
    assert not torch.allclose(net.coarse_model(torch.full((1, 3, 24, 24), 0.7)), dense, atol=1e-3)


def test_a_new_saliency_hands_on_multiples_of_the_image():
    torch.manual_seed(0)
    net = RSTN(width=4)
    assert net.saliency1.bias.tolist() == [1, 1, 1]
    assert net.saliency2.bias.tolist() == [1, 1.5, 2]
    assert not net.saliency2.weight.any()
    # Xavier-normal: variance 2 / (fan in + fan out)
    assert net.saliency1.weight.std().item() == pytest.approx((2 / (27 + 27)) ** 0.5, rel=0.35)
    for value, expected in zip(net.saliency(torch.rand(1, 3, 6, 7))[0], (1, 1.5, 2)):
        assert (value == expected).all()


def test_saliency_of_thickness_1_has_bias_1():
    assert RSTN(n_class=1, width=4).saliency2.bias.tolist() == [1]


# --- boxes ---------------------------------------------------------------------------------------------------------


def mask(*rows):
    """(1, A, B) bool from rows of text."""
    return torch.tensor([[[pixel == '#' for pixel in row] for row in rows]])


ORGAN = mask(
    '......',
    '..#...',
    '...#..',
    '......',
    '......',
)


def test_a_box_is_half_open_and_holds_every_marked_pixel():
    assert bounding_box(ORGAN, (0, 0, 0, 0)) == (1, 3, 2, 4)


def test_margins_are_added_before_and_after_along_each_axis():
    assert bounding_box(ORGAN, (1, 2, 0, 1)) == (0, 5, 2, 5)


def test_a_box_ends_at_the_image():
    assert bounding_box(ORGAN, (20, 20, 20, 20)) == (0, 5, 0, 6)


def test_a_box_is_taken_over_all_channels():
    other = mask('......', '......', '......', '......', '#.....')
    assert bounding_box(torch.cat([ORGAN, other]), (0, 0, 0, 0)) == (1, 5, 0, 4)


def test_no_marked_pixel_is_no_box():
    assert bounding_box(torch.zeros(3, 5, 6, dtype=bool), (1, 1, 1, 1)) is None


def test_the_joint_box_holds_all():
    assert union([(1, 3, 2, 4), (0, 2, 3, 6)]) == (0, 3, 2, 6)


def test_crop_and_uncrop():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert crop(image, (1, 3, 0, 2)).tolist() == [[[[4, 5], [8, 9]]]]
    assert uncrop(crop(image, (1, 3, 0, 2)), (1, 3, 0, 2), (3, 4), -9.0).tolist() == [
        [[[-9, -9, -9, -9], [4, 5, -9, -9], [8, 9, -9, -9]]]
    ]


def margins_of(**settings):
    torch.manual_seed(0)
    net = on_meta(lambda: RSTN(width=3, **settings))
    return np.array([net.margins() for _ in range(4000)])


def test_margins_are_the_fixed_one_without_chance_and_in_testing():
    assert (margins_of(crop_margin=5, crop_prob=0) == 5).all()
    for TEST in 'COF':
        assert (margins_of(crop_margin=5, crop_prob=1, TEST=TEST) == 5).all()


def test_random_margins_run_evenly_from_0_to_twice_the_fixed_one():
    drawn = margins_of(crop_margin=5, crop_prob=1)
    assert drawn.min() == 0 and drawn.max() == 10
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert (abs(counts / drawn.size - 1 / 11) < 0.015).all()
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.1, 'each side is drawn on its own'


def test_a_random_margin_is_the_truncated_mean_of_its_draws():
    drawn = margins_of(crop_margin=1, crop_prob=1, crop_sample_batch=2)  # of 0, 1, 2 twice: sums 0 1 1 2 2 2 3 3 4
    shares = np.bincount(drawn.ravel(), minlength=3) / drawn.size
    np.testing.assert_allclose(shares, [3 / 9, 5 / 9, 1 / 9], atol=0.02)
    wide = margins_of(crop_margin=20, crop_prob=1, crop_sample_batch=16)
    assert wide.std() < 4, 'many draws keep near the mean'


def test_half_of_the_margins_are_random_by_default():
    drawn = margins_of(crop_margin=20)
    fixed = (drawn == 20).all(1).mean()
    assert 0.45 < fixed < 0.55


# --- modes ---------------------------------------------------------------------------------------------------------

A, B = 48, 56
BIAS = torch.tensor([1.0, 1.5, 2.0])[:, None, None]
WHOLE = (0, A, 0, B)


@pytest.fixture
def image():
    """(2, 3, A, B): dim, with a bright organ (that the planted coarse network finds) in rows 26 to 29, columns 36 to 40."""
    image = torch.full((2, 3, A, B), 0.3) + 0.1 * torch.rand(2, 3, A, B, generator=torch.Generator().manual_seed(0))
    image[:, :, 26:30, 36:41] = 0.95
    return image


@pytest.fixture
def label():
    """(2, 3, A, B): boxes of the first sample rows 10 to 12, columns 14 to 15; of the second 16 to 18, columns 2 to 4."""
    label = torch.zeros(2, 3, A, B)
    label[0, 1, 10:13, 14:16] = 1
    label[1, 0, 16:19, 2:5] = 1
    return label


LABEL_BOX, OTHER_BOX = (9, 14, 13, 17), (15, 20, 1, 6)  # with a margin of 1


def only_thresholds(network):
    """Keep of a planted network what segments bright pixels: no noise, no path but pool3's."""
    with torch.no_grad():
        network.score_pool3.bias.copy_(network.score_fr.bias)
        for parameter in (network.score_fr.weight, network.score_fr.bias, network.score_pool4.weight):
            parameter.zero_()
        planted = network.score_pool3.weight[range(3), range(3)].clone()
        network.score_pool3.weight.zero_()[range(3), range(3)] = planted
        for layer in (network.upscore2, network.upscore_pool4, network.upscore8):
            layer.weight.copy_(bilinear_upsampling(3, layer.weight.shape[2]))


class Looked:
    """An RSTN of margin 1 that keeps what its fine and coarse networks were shown."""

    def __init__(self, TEST=None, planted=True):
        self.net = RSTN(crop_margin=1, crop_prob=0, TEST=TEST, width=4).eval()
        if planted:
            self.net.load_state_dict(tiny_weights())
            only_thresholds(self.net.coarse_model)
        with torch.no_grad():  # a saliency of 1, 1.5, 2
            self.net.saliency2.weight.zero_()
            self.net.saliency2.bias.copy_(BIAS.flatten())
        self.fine, self.coarse = [], []
        self.net.fine_model.register_forward_pre_hook(lambda _, inputs: self.fine.append(inputs[0]))
        self.net.coarse_model.register_forward_pre_hook(lambda _, inputs: self.coarse.append(inputs[0]))

    def __call__(self, *args, **keywords):
        with torch.no_grad():
            return self.net(*args, **keywords)


def assert_fine(looked, expected, fine, box):
    """The fine network was shown `expected` inside `box`, and its probability is 0 outside of it only."""
    torch.testing.assert_close(looked.fine[0], crop(expected, box))
    inside = torch.zeros(fine.shape, dtype=bool)
    crop(inside, box)[:] = True
    assert (fine[~inside] == 0).all()
    assert (fine[inside] > 0).all()


def found_box(coarse):
    """Box of a coarse probability >= 0.5 (3, A, B) over all channels, margin 1, worked out by numpy."""
    _, a, b = np.nonzero(coarse.numpy() >= 0.5)
    return (max(a.min() - 1, 0), min(a.max() + 2, A), max(b.min() - 1, 0), min(b.max() + 2, B))


def test_mode_S_crops_the_plain_image_by_the_label(image, label):
    looked = Looked()
    _, fine = looked(image[:1], label[:1], 'S')
    assert_fine(looked, image[:1], fine, LABEL_BOX)


def test_mode_I_crops_the_salient_image_by_the_label(image, label):
    looked = Looked()
    _, fine = looked(image[:1], label[:1], 'I')
    assert_fine(looked, image[:1] * BIAS, fine, LABEL_BOX)


def test_mode_J_crops_the_salient_image_by_the_coarse_probability(image, label):
    looked = Looked()
    coarse, fine = looked(image[:1], label[:1], 'J')
    box = found_box(coarse[0])
    assert 14 < box[0] <= 25 and 31 <= box[1] < A and 17 < box[2] <= 35 and 42 <= box[3] < B, 'the organ, not the label'
    assert_fine(looked, image[:1] * BIAS, fine, box)


def test_mode_J_takes_the_label_where_the_coarse_mask_is_empty(image, label):
    looked = Looked()
    coarse, fine = looked(image[:1] * 0.5, label[:1], 'J')
    assert (coarse < 0.5).all()
    assert_fine(looked, image[:1] * 0.5 * BIAS, fine, LABEL_BOX)


@pytest.mark.parametrize('mode', 'SIJ')
def test_where_nothing_marks_a_box_the_whole_image_is_seen(image, mode):
    looked = Looked()
    dim = image[:1] * 0.5
    _, fine = looked(dim, torch.zeros(1, 3, A, B), mode)
    assert_fine(looked, dim if mode == 'S' else dim * BIAS, fine, WHOLE)


def test_a_probability_of_exactly_one_half_is_organ(image, label):
    looked = Looked(planted=False)  # score layers of zero
    coarse, fine = looked(image[:1], label[:1], 'J')
    assert (coarse == 0.5).all()
    assert_fine(looked, image[:1] * BIAS, fine, WHOLE)


def test_another_mode_is_refused(image, label):
    with pytest.raises(ValueError, match="'K'"):
        Looked()(image, label, 'K')


def test_testing_C_is_the_coarse_probability_alone(image):
    looked = Looked('C')
    coarse, _ = Looked()(image[:1], image[:1], 'S')
    torch.testing.assert_close(looked(image[:1]), coarse)
    assert not looked.fine


def test_testing_O_crops_the_salient_image_by_the_label(image, label):
    looked = Looked('O')
    fine = looked(image[:1], label=label[:1])
    assert_fine(looked, image[:1] * BIAS, fine, LABEL_BOX)


def test_testing_F_takes_the_saliency_of_the_score_and_the_box_of_the_mask(image, label):
    looked = Looked('F')
    fine = looked(image[:1], score=torch.rand(1, 3, A, B), mask=label[:1])
    assert not looked.coarse
    assert_fine(looked, image[:1] * BIAS, fine, LABEL_BOX)


def test_testing_F_without_a_marked_voxel_sees_a_whole_image_of_zeros(image):
    looked = Looked('F')
    looked(image[:1], score=torch.ones(1, 3, A, B), mask=torch.zeros(1, 3, A, B))
    torch.testing.assert_close(looked.fine[0], torch.zeros(1, 3, A, B))


@pytest.mark.parametrize(('TEST', 'mode'), [(None, 'I'), (None, 'J'), ('O', None), ('F', None)])
def test_saliency_is_of_the_probability_and_not_of_the_logits(image, label, TEST, mode):
    looked = Looked(TEST)
    seen = []
    looked.net.saliency1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    score = torch.rand(1, 3, A, B)
    looked(image[:1], label[:1], mode, score=score, mask=label[:1])
    expected = score if TEST == 'F' else Looked('C')(image[:1])
    torch.testing.assert_close(seen[0], expected)


def test_saliency_weighs_the_image_pixel_by_pixel(image, label):
    looked = Looked('F')
    with torch.no_grad():
        looked.net.saliency1.weight.zero_()
        looked.net.saliency1.weight[range(3), range(3), 1, 1] = 1
        looked.net.saliency1.bias.zero_()
        looked.net.saliency2.weight[range(3), range(3), 2, 2] = 1
        looked.net.saliency2.bias.fill_(0.25)
    score = torch.rand(1, 3, A, B)
    fine = looked(image[:1], score=score, mask=label[:1])
    assert_fine(looked, image[:1] * (score + 0.25), fine, LABEL_BOX)


def test_thickness_1_spreads_one_saliency_over_the_three_equal_slices(image, label):
    net = RSTN(crop_margin=1, crop_prob=0, n_class=1, width=4).eval()
    with torch.no_grad():
        net.saliency2.bias.fill_(3)
        shown = []
        net.fine_model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
        coarse, fine = net(image[:1], label[:1, 1:2], 'I')
    assert coarse.shape == fine.shape == (1, 1, A, B)
    torch.testing.assert_close(shown[0], crop(image[:1] * 3, LABEL_BOX))


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('mode', 'salient'), [('S', 1), ('I', BIAS)])
def test_a_batch_is_cropped_to_the_joint_box_and_zero_outside_each_samples_own(image, label, mode, salient):
    looked = Looked()
    _, fine = looked(image, label, mode)
    joint = (9, 20, 1, 17)
    expected = torch.zeros_like(image)
    for n, box in enumerate((LABEL_BOX, OTHER_BOX)):
        crop(expected[n], box)[:] = crop((image * salient)[n], box)
    assert_fine(looked, expected, fine, joint)


@pytest.mark.parametrize('TEST', 'OF')
def test_windows_to_test_in_a_batch_are_seen_each_by_itself(image, label, TEST):
    looked = Looked(TEST)
    score = torch.rand(2, 3, A, B)
    marks = {'label': label} if TEST == 'O' else {'score': score, 'mask': label}
    together = looked(image, **marks)
    alone = [looked(image[n : n + 1], **{k: v[n : n + 1] for k, v in marks.items()}) for n in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert (together > 0).sum() == 3 * (5 * 4 + 5 * 5), 'the boxes of both, nothing else'


def test_a_sample_without_a_box_does_not_stop_its_batch(image, label):
    label[1] = 0
    looked = Looked()
    _, fine = looked(image, label, 'S')
    assert fine.shape == image.shape
    expected = torch.zeros(3, A, B)
    crop(expected, LABEL_BOX)[:] = crop(image[0], LABEL_BOX)
    torch.testing.assert_close(looked.fine[0][0], expected)
    torch.testing.assert_close(looked.fine[0][1], image[1])


def test_in_a_batch_without_any_box_every_image_is_whole(image):
    looked = Looked()
    looked(image, torch.zeros(2, 3, A, B), 'S')
    torch.testing.assert_close(looked.fine[0], image)
    looked = Looked('F')
    empty = looked(image, score=torch.ones(2, 3, A, B), mask=torch.zeros(2, 3, A, B))
    torch.testing.assert_close(empty[0], empty[1])


# --- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_is_soft_dice_over_all_channels_averaged_over_the_batch():
    pred = torch.tensor([[[[0.5, 1.0]], [[0.0, 0.5]]], [[[1.0, 0.0]], [[0.0, 0.0]]]])  # (2, 2, 1, 2)
    label = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]], [[[1.0, 0.0]], [[0.0, 0.0]]]])
    # first: 1 - 2 * 1.5 / (2 + 2) = 0.25; second: 1 - 2 * 1 / (1 + 1) = 0
    assert DSC_loss()(pred, label).item() == pytest.approx(0.125, abs=1e-6)


def test_the_loss_of_nothing_on_nothing_is_0_and_of_nothing_on_something_1():
    nothing, something = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert DSC_loss()(nothing, nothing).item() == 0
    assert DSC_loss()(nothing, something).item() == pytest.approx(1, abs=1e-6)


def test_the_constant_keeps_an_empty_label_soft():
    pred = torch.tensor([[[[1e-6]]]])
    assert DSC_loss()(pred, torch.zeros(1, 1, 1, 1)).item() == pytest.approx(0.5, abs=1e-6)


# --- trained parameters and their rates ----------------------------------------------------------------------------


def names(model, parameters):
    found = {id(parameter): name for name, parameter in model.named_parameters()}
    return {found[id(parameter)] for parameter in parameters}


def test_parameters_are_grouped_by_network_and_kind_without_the_frozen_ones():
    model = on_meta(lambda: RSTN(width=4))
    layers = [layer for layer, _ in CONVOLUTIONS] + ['score_fr', 'score_pool3', 'score_pool4']
    coarse = [f'coarse_model.{layer}' for layer in layers]
    others = [f'fine_model.{layer}' for layer in layers] + ['saliency1', 'saliency2']
    assert names(model, get_parameters(model, coarse=True, bias=False)) == {f'{layer}.weight' for layer in coarse}
    assert names(model, get_parameters(model, coarse=True, bias=True)) == {f'{layer}.bias' for layer in coarse}
    assert names(model, get_parameters(model, coarse=False, bias=False)) == {f'{layer}.weight' for layer in others}
    assert names(model, get_parameters(model, coarse=False, bias=True)) == {f'{layer}.bias' for layer in others}


def test_a_parallel_models_parameters_are_those_of_its_module():
    model = RSTN(width=3)
    parallel = torch.nn.DataParallel(model)
    for coarse, bias in itertools.product((True, False), repeat=2):
        inner = names(model, get_parameters(model, coarse, bias))
        assert names(model, get_parameters(parallel, coarse, bias, parallel=True)) == inner


def test_the_optimizers_rates_decays_and_momentum():
    model = on_meta(lambda: RSTN(width=4))
    optimizer = make_optimizer(model, '1e-5', '10')
    assert isinstance(optimizer, torch.optim.SGD)
    rates = {}
    for group in optimizer.param_groups:
        assert (group['momentum'], group['dampening'], group['nesterov']) == (0.99, 0, False)
        for name in names(model, group['params']):
            rates[name] = (group['lr'], group['weight_decay'])
    for name, parameter in model.named_parameters():
        if 'upscore' in name:
            assert name not in rates and not parameter.requires_grad
            continue
        rate = 1e-5 if name.startswith('coarse_model') else 1e-4
        assert rates[name] == pytest.approx((2 * rate, 0) if name.endswith('bias') else (rate, 5e-4))


# --- several fine iterations (the paper's T) -----------------------------------------------------------------------


def test_each_fine_iteration_looks_through_the_saliency_of_the_one_before(image, label):
    net = RSTN(crop_margin=1, crop_prob=0, width=4, fine_iterations=2).eval()
    net.load_state_dict(tiny_weights())
    seen = []
    net.saliency1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        coarse, first, second = net(image[:1], label[:1], 'I')
        assert len(net(image[:1], label[:1], 'S')) == 2, 'not in mode S'
    torch.testing.assert_close(seen, [coarse, first])
    assert not torch.equal(first, second)


def test_the_loss_of_several_fine_iterations_weighs_each_of_them_twice_the_coarse_one(image, label):
    torch.manual_seed(0)
    model = RSTN(crop_prob=0, width=3, fine_iterations=2)
    coarse, fine, avg = train_step(model, make_optimizer(model, '1e-5', '10'), 'I', image[:1], label[:1])
    assert avg == pytest.approx((coarse + 4 * fine) / 5)
