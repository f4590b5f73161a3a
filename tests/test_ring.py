"""ring.py against the plain network: the same logits and gradients at every size, for far fewer operations."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ring
from model import RSTN, FCN8s, load_RSTN, set_precision


class PlainFCN8s(FCN8s):
    """The network as published: every layer computed everywhere."""

    def forward(self, x):
        pool3, pool4, fc7 = self.features(x)
        return self.upsample(self.score_pool3(pool3), self.score_pool4(pool4), self.score_fr(fc7), x.shape[2:])


def twins(width=4, bias=0.3, dtype=torch.float64):
    """(plain, by ring): two testing networks of the same random weights, whose biases are `bias` x normal noise."""
    torch.manual_seed(7)
    plain = PlainFCN8s(3, width).to(dtype).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith('bias'):
            nn.init.normal_(parameter, std=bias)
        elif name.startswith('score'):
            nn.init.kaiming_normal_(parameter)
    fast = FCN8s(3, width).to(dtype).eval()
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def image(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def distance(a, b):
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# --- the same numbers ----------------------------------------------------------------------------------------------

SIZES = [(n, n) for n in (*range(2, 41, 3), *range(95, 112))]  # every size modulo 16, which is what pooling sees
SIZES += [(1, 1), (1, 2), (1, 40), (37, 1), (8, 31), (16, 17), (95, 128), (130, 61), (127, 96)]


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_features_are_those_of_the_plain_network(size):
    plain, _ = twins()
    with torch.no_grad():
        for mine, wanted in zip(ring.features(plain, image(1, 3, *size)), plain.features(image(1, 3, *size))):
            assert mine.shape == wanted.shape
            assert distance(mine, wanted) < 1e-10


@pytest.mark.parametrize('shape', [(1, 3, 33, 50), (4, 3, 20, 9), (2, 3, 96, 96)], ids=str)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_logits_are_those_of_the_plain_network(shape, dtype, tolerance):
    plain, fast = twins(width=8, dtype=dtype)
    with torch.inference_mode():
        x = image(*shape, dtype=dtype)
        assert distance(fast(x), plain(x)) < tolerance


def test_a_whole_slice():
    plain, fast = twins(dtype=torch.float32)
    with torch.no_grad():
        x = image(1, 3, 512, 512, dtype=torch.float32)
        assert distance(fast(x), plain(x)) < 1e-5


@pytest.mark.parametrize('fill', [0, 1])
def test_an_image_without_content(fill):
    plain, fast = twins()
    with torch.no_grad():
        x = torch.full((1, 3, 30, 41), fill, dtype=torch.float64)
        assert distance(fast(x), plain(x)) < 1e-10


# --- sizes that differ, and zeros -----------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=str)
def test_images_of_several_sizes_have_the_logits_that_each_has_alone(dtype, tolerance):
    plain, fast = twins(width=8, dtype=dtype)
    images = [image(3, *size, dtype=dtype) for size in ((33, 50), (20, 9), (49, 66), (96, 40), (96, 40))]
    with torch.inference_mode():
        for mine, one in zip(fast.several(images), images, strict=True):
            assert mine.shape == one.shape
            assert distance(mine, plain(one[None])[0]) < tolerance


def test_sizes_that_grow_to_multiples_of_16_on_a_card_change_nothing(monkeypatch):
    plain, fast = twins(width=8)
    images = [image(3, *size) for size in ((33, 50), (20, 9), (48, 64))]
    monkeypatch.setattr(ring, 'on_card', lambda x: True)
    canvas, start = ring.on_a_canvas([one[None] for one in images])
    assert canvas.shape == (3, 3, 48, 64)
    assert start == [99, 99]
    with torch.no_grad():
        for mine, one in zip(fast.several(images), images):
            assert distance(mine, plain(one[None])[0]) < 1e-12


@pytest.mark.parametrize('box', [(0, 7, 30, 41), (3, 4, 2, 3), (20, 60, 0, 41), (0, 0, 0, 0)], ids=str)
def test_zeros_around_an_image_are_not_computed_and_change_nothing(box):
    plain, fast = twins()
    a0, a1, b0, b1 = box
    x = torch.zeros(2, 3, 60, 41, dtype=torch.float64)
    x[1, :, a0:a1, b0:b1] = image(3, a1 - a0, b1 - b0) + 0.1
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            mine = fast(x)
        assert distance(mine, plain(x)) < 1e-10
        with FlopCounterMode(display=False) as full:
            fast(x + 0.1)
    assert counter.get_total_flops() < full.get_total_flops()


# --- training ------------------------------------------------------------------------------------------------------


def gradients(net, x):
    """{name: gradient} of every parameter and of the image, for a loss that weighs every logit differently."""
    torch.manual_seed(3)  # of the dropout
    x = x.clone().requires_grad_()
    logits = net(x)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=x.dtype).view_as(logits)).sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad} | {'image': x.grad}


@pytest.mark.parametrize('bias', [0.3, 0], ids=['random biases', 'biases 0, as in a new network'])
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (1, 3, 45, 38), (2, 3, 32, 51)], ids=str)
def test_gradients_are_those_of_the_plain_network(shape, bias):
    plain, fast = (net.train() for net in twins(bias=bias))
    wanted, mine = gradients(plain, image(*shape)), gradients(fast, image(*shape))
    assert mine.keys() == wanted.keys()
    for name in wanted:
        assert distance(mine[name], wanted[name]) < 1e-10, name


def test_steps_of_an_optimizer_end_at_the_same_weights():
    nets = [net.train() for net in twins()]
    for net in nets:
        optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            gradients(net, image(1, 3, 20, 20) - 0.5)
            optimizer.step()
    plain, fast = (net.state_dict() for net in nets)
    for name in plain:
        assert distance(fast[name], plain[name]) < 1e-9, name


def scale_the_data(net):
    for parameter in net.parameters():
        parameter.data.mul_(1.1)


def load_others(net):
    net.load_state_dict({name: 0.9 * tensor for name, tensor in net.state_dict().items()})


@pytest.mark.parametrize('change', [scale_the_data, load_others])
def test_nothing_is_remembered_of_former_weights(change):
    plain, fast = twins()
    x = image(1, 3, 24, 24)
    with torch.no_grad():
        before = fast(x)
        change(plain), change(fast)
        assert distance(fast(x), plain(x)) < 1e-10 < distance(fast(x), before)


def test_a_testing_network_computes_its_background_once_for_each_size_modulo_16(tmp_path):
    torch.save(RSTN(width=8).state_dict(), tmp_path / 'FD0:ZJ3_1.pkl')
    net = load_RSTN(tmp_path / 'FD0:ZJ3_1.pkl', 'F', 3, 20, torch.device('cpu')).fine_model
    fresh = copy.deepcopy(net)
    fresh.backgrounds = None
    images = [image(3, *size, dtype=torch.float32) for size in ((24, 24), (40, 24), (24, 31), (24, 24))]
    operations = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            assert all(torch.equal(*pair) for pair in zip(net.several(images), fresh.several(images), strict=True))
        operations.append(counter.get_total_flops())
    assert len(net.backgrounds) == 2, '24 and 40 are the same modulo 16'
    assert operations[1] < operations[0]
    level = net.backgrounds.popitem()[1].levels[0]
    assert not level.is_inference()
    assert level.untyped_storage().nbytes() == 4 * len(level), 'the canvas is not kept'


# --- half the bits -------------------------------------------------------------------------------------------------


def in_bf16_weights(net, x):
    return net.to(torch.bfloat16)(x.to(torch.bfloat16))


def under_autocast(net, x):
    with torch.autocast('cpu', torch.bfloat16):
        return net(x)


@pytest.mark.parametrize('run', [in_bf16_weights, under_autocast])
@pytest.mark.parametrize('shape', [(1, 3, 40, 40), (1, 3, 300, 40)], ids=str)  # fc6 of few positions, of many
def test_bf16_is_as_near_to_float32_as_the_plain_networks(run, shape):
    plain, fast = twins(width=16, dtype=torch.float32)
    with torch.no_grad():
        x = image(*shape, dtype=torch.float32)
        exact = plain(x)
        errors = [((run(net, x) - exact).square().mean() / exact.var()).sqrt() for net in (plain, fast)]
        assert errors[1] < 1.5 * errors[0] < 0.1


def test_autocast_trains():
    _, fast = twins(width=8, dtype=torch.float32)
    exact = copy.deepcopy(fast)
    x = image(1, 3, 40, 40, dtype=torch.float32)
    under_autocast(fast, x).float().square().sum().backward()
    exact(x).square().sum().backward()
    for (name, half), full in zip(fast.named_parameters(), exact.parameters()):
        if half.requires_grad:
            assert torch.cosine_similarity(half.grad.flatten(), full.grad.flatten(), dim=0) > 0.99, name


# --- the pieces ----------------------------------------------------------------------------------------------------


def test_stretch_repeats_the_middle_of_a_background():
    rim = torch.tensor([[1, 2, 3, 2, 1],
                        [2, 5, 6, 5, 2],
                        [3, 6, 9, 6, 3],
                        [2, 5, 6, 5, 2],
                        [1, 2, 3, 2, 1]])  # fmt: skip
    stretched = torch.tensor([[1, 2, 3, 3, 3, 2, 1],
                              [2, 5, 6, 6, 6, 5, 2],
                              [3, 6, 9, 9, 9, 6, 3],
                              [3, 6, 9, 9, 9, 6, 3],
                              [2, 5, 6, 6, 6, 5, 2],
                              [1, 2, 3, 3, 3, 2, 1]])  # fmt: skip
    assert ring.stretch(rim[None, None], (6, 7))[0, 0].tolist() == stretched.tolist()


def test_align_pads_to_whole_windows_of_pooling():
    """Windows begin at even places. 3 .. 6, two convolutions later 1 .. 8: one more on the left, one on the right."""
    deviation, start = ring.align(torch.ones(1, 1, 4, 5), start=[3, 3], convs=2)
    assert start == [2, 2]
    assert deviation.shape == (1, 1, 1 + 4 + 1, 1 + 5 + 0)
    assert deviation.sum() == 4 * 5


@pytest.mark.parametrize('n, a, b', product([1, 2], [7, 9], [7, 12]))
def test_a_convolution_as_matrix_product(n, a, b):
    layer, x = nn.Conv2d(4, 5, 7).double(), image(n, 4, a, b)
    with torch.no_grad():
        assert distance(ring.as_matrix_products(layer, [x])[0], layer(x)) < 1e-12


@pytest.mark.parametrize('n', [1, 9, 40])
def test_a_product_and_its_gradients_are_those_of_a_linear_layer(n):
    rows, weight, gradient = image(n, 98), image(70, 98), image(n, 70)
    exact, mine = (
        [t.to(dtype, copy=True).requires_grad_() for t in (rows, weight)] for dtype in (torch.float64, torch.float32)
    )
    F.linear(*exact).backward(gradient)
    y = ring.product(*mine)
    y.backward(gradient.float())
    for one, other in [(y.detach(), F.linear(*exact).detach()), *((a.grad, b.grad) for a, b in zip(mine, exact))]:
        assert one.shape == other.shape
        assert distance(one.double(), other) < 1e-5


@pytest.mark.parametrize('size, share', [(1, 0.35), (96, 0.45), (200, 0.6)])
def test_the_ring_is_not_computed(size, share):
    operations = []
    for net in twins(width=8, dtype=torch.float32):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.zeros(1, 3, size, size))
        operations.append(counter.get_total_flops())
    assert operations[1] < share * operations[0]


# --- bf16 ----------------------------------------------------------------------------------------------------------


def test_bf16_computes_in_bf16_and_scores_in_float32():
    plain, fast = twins(width=8, dtype=torch.float32)
    x = image(2, 3, 40, 37, dtype=torch.float32)
    wanted = plain(x)
    set_precision(fast, 'bf16')
    assert {pool.dtype for pool in ring.early_blocks(fast, [x.bfloat16()])[0]} == {torch.bfloat16}
    mine = fast(x)
    assert mine.dtype == torch.float32
    assert 1e-6 < distance(mine, wanted) < 0.03
    set_precision(fast, 'bf16', store=True)
    kept = {key: tensor.dtype for key, tensor in fast.state_dict().items()}
    assert kept['fc6.weight'] == kept['conv1_1.bias'] == torch.bfloat16
    assert kept['score_fr.weight'] == kept['upscore8.weight'] == torch.float32
    assert distance(fast(x), mine) < 0.01


def test_the_plain_network_computes_in_bf16_where_the_ring_does_not_pay(monkeypatch):
    plain, fast = (net.train() for net in twins(width=8, dtype=torch.float32))
    x = image(1, 3, 33, 40, dtype=torch.float32)
    wanted = gradients(plain, x)
    set_precision(fast, 'bf16')
    monkeypatch.setattr(ring, 'pays', lambda *_: False)
    monkeypatch.setattr(ring, 'features', None)
    mine = gradients(fast, x)
    for name, gradient in mine.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), 0) > 0.95, name


def test_a_range_that_fp16_exceeds_is_an_error():
    _, fast = twins(width=8, dtype=torch.float32)
    set_precision(fast, 'fp16', store=True)
    x = image(1, 3, 20, 20, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(fast(x)).all()
        fast.conv3_1.weight.mul_(1e5)
        with pytest.raises(ValueError, match='precision fp16: .+ give fp32'):
            fast(x)


@pytest.mark.parametrize(
    ('precision', 'n', 'testing', 'training'),
    [('fp32', 96, True, False), ('fp32', 512, True, True), ('tf32', 512, True, False), ('bf16', 96, False, False)],
)
def test_the_ring_pays_on_a_CPU_and_for_many_operations(monkeypatch, precision, n, testing, training):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', precision == 'tf32')
    monkeypatch.setattr(ring, 'on_card', lambda x: x.device.type == 'meta')
    with torch.device('meta'):
        net, x = FCN8s(3), torch.zeros(1, 3, n, n)
    set_precision(net, precision)
    assert ring.pays(net, x) == training
    with torch.no_grad():
        assert ring.pays(net, x) == testing
        assert not ring.pays(FCN8s(3, width=4), x)
        assert ring.pays(net, torch.zeros(1))


def test_many_scores_on_a_card_are_upsampled_by_a_convolution_to_the_same(monkeypatch):
    net, x = FCN8s(3, width=3).double(), torch.rand(2, 3, 7, 5, dtype=torch.float64)
    monkeypatch.setattr(ring, 'on_card', lambda x: True)
    for layer in (net.upscore2, net.upscore8):
        nn.init.normal_(layer.weight)  # more than the bilinear diagonal
        wanted = layer(x)
        monkeypatch.setattr(ring, 'MANY_SCORES', x.numel() - 1)
        monkeypatch.setattr(layer, 'forward', None)
        torch.testing.assert_close(ring.upsampled(layer, x), wanted)


def test_the_last_upsampling_of_a_network_goes_this_way(monkeypatch):
    net = FCN8s(3, width=3).double()
    scores = [torch.rand(2, 3, n, n, dtype=torch.float64) for n in (31, 17, 3)]
    wanted = net.upsample(*scores, (40, 40))
    monkeypatch.setattr(ring, 'on_card', lambda x: True)
    monkeypatch.setattr(ring, 'MANY_SCORES', 0)
    monkeypatch.setattr(net.upscore8, 'forward', None)
    torch.testing.assert_close(net.upsample(*scores, (40, 40)), wanted)


def test_bf16_gradients_reach_float32_weights():
    plain, fast = (net.train() for net in twins(width=8, dtype=torch.float32))
    set_precision(fast, 'bf16')
    x = image(1, 3, 33, 40, dtype=torch.float32)
    wanted, mine = gradients(plain, x), gradients(fast, x)
    for name, gradient in mine.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), 0) > 0.95, name
