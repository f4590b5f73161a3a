"""FCN-8s without the ring: what the padding of 100 computes is computed only where the image matters.

conv1_1 pads the image by 100 pixels, so that a crop of 96 x 96 becomes 294 x 294: nine tenths of it hold no image. What
a layer answers there is known beforehand. Under zero padding every layer of an image-free input has, per channel, one
`level` wherever its edges are out of reach, and a rim around it:

    +-----------------+    rim         set by the weights and the distance to the edge alone, 1 to 6 pixels wide; the
    |       rim       |                same all along an edge, so that a small canvas, stretched where needed, gives it
    |   . . . . . .   |    .           the level: a constant of the channel
    |   . +-----+ .   |    deviation   what the image changes: 0 outside the image's reach, which starts as the image
    |   . |image| .   |                and grows by a pixel in every convolution
    |   . +-----+ .   |
    |   . . . . . .   |    activation = background (level and rim) + deviation
    +-----------------+

Rim and reach touch at pool4 and meet in conv5_1. Until then the two are computed apart, the background on a canvas of 5
to 16 pixels, the deviation on its reach alone, outside of which it is 0, as zero padding has it:

    x = level + d    =>    conv(x, w) + b = conv(d, w) + v,  where v = conv(level, w) + b is read off the canvas
                           relu(conv(x, w) + b) = relu(v) + d',  d' = relu(conv(d, w) + v) - relu(v)

and max pooling commutes with subtracting a constant. On a CPU, air around the body, which clips to 0, is not computed
either, unless the image needs a gradient. Images of several sizes can share a canvas of deviations. conv5_1 and after
see the sum of the two. fc6 is computed as the matrix product that it is: as a convolution to a few pixels it spends its
time on rearranging 100 M weights.

Everything is differentiable: these are the plain network's logits and gradients (Long et al., CVPR 2015), at 0.3 of its
operations for 96 x 96 pixels and 0.5 for 512 x 512. Only a network for testing, whose weights stay as they are
(model.set_precision), remembers its backgrounds between calls.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

PADDING = 100  # of conv1_1; the other convolutions pad by 1
CONVS = (2, 2, 3, 3, 3)  # convolutions of a block, each block ending in 2 x 2 pooling
MANY_SCORES = 2**14  # more than one crop's: cuDNN takes longer to upsample them than to be given more operations
FEW = 64  # rows up to which a matrix product takes less time than casting its weights


def pays(net, x):
    """Return whether the ring is faster than the plain FCN8s `net` for images x: on a CPU always (tests/bench.py).

    It saves arithmetic but has 163 operations instead of 44 (fewer where backgrounds are remembered). So on CUDA it
    pays where the card, not the host, takes the time (measured on an H200 at width 64, logs/gpu).
    """
    if not on_card(x):
        return True
    strict = net.dtype in (None, torch.float32) and not torch.backends.cudnn.allow_tf32
    work = len(x) * x.shape[2] * x.shape[3] * (net.conv1_1.out_channels / 64) ** 2
    if torch.is_grad_enabled():
        return strict and work >= 2**16
    return work >= (2**13 if strict else 2**16)


def on_card(x):
    """Return whether a tensor is on a CUDA device."""
    return x.is_cuda


def features(net, x):
    """Return (pool3, pool4, fc7) of the FCN8s `net` for images (N, 3, A, B), as net.features does."""
    return features_of_sizes(net, [x])[0]


def features_of_sizes(net, groups):
    """Return what features does for groups of images, (N, 3, A, B) each, of any sizes: [(pool3, pool4, fc7)] of the groups.

    They go through blocks 1 to 4 in one batch, and through fc6 and fc7 as rows of one product, which reads the weights
    once.
    """
    pools = early_blocks(net, [x.to(net.dtype or net.conv1_1.weight.dtype) for x in groups])
    xs = [pool4 for _, pool4 in pools]
    for conv in range(CONVS[4]):
        weights = _weights(net, 5, conv, xs[0].dtype)
        xs = [F.relu(F.conv2d(x, *weights, padding=1), inplace=True) for x in xs]
    xs = [F.max_pool2d(x, 2, ceil_mode=True) for x in xs]
    xs = [net.drop6(F.relu(x)) for x in as_matrix_products(net.fc6, xs)]
    xs = [net.drop7(F.relu(x)) for x in as_matrix_products(net.fc7, xs)]
    return [(pool3, pool4, x) for (pool3, pool4), x in zip(pools, xs)]


def early_blocks(net, groups):
    """Return [pool3, pool4] of groups of images: (N, channels, ~(A + 198) / 8, ~(B + 198) / 8), and the same at 1/16.

    The deviation of all images is on one canvas: beyond the smaller ones it is 0, as it is in their padding.
    """
    counts = [len(x) for x in groups]
    sizes = [tuple(n + 2 * PADDING - 2 for n in x.shape[2:]) for x in groups]  # of the plain network's activations
    layers = [
        [_weights(net, block, conv, groups[0].dtype) for conv in range(convs)]
        for block, convs in enumerate(CONVS[:4], 1)
    ]
    backgrounds = backgrounds_of(net, layers, sizes, groups[0])
    levels = iter(backgrounds[-1].levels)  # the same in each of them
    deviation, start = on_a_canvas(groups)
    pools = []
    for block, weights in enumerate(layers, 1):
        convs = len(weights)
        deviation, start = align(deviation, start, convs)
        layout = torch.channels_last if block < 4 else torch.contiguous_format  # the faster one of large maps, of small
        deviation = deviation.contiguous(memory_format=layout)
        for weight, _ in weights:
            deviation = convolve(deviation, weight, next(levels))
        deviation = F.max_pool2d(deviation, 2)
        start, sizes = [(s - convs) // 2 for s in start], [halved(size) for size in sizes]
        if block >= 3:
            parts = zip(backgrounds, deviation.split(counts), sizes)
            pools.append([assemble(background.pools[block], part, start, size) for background, part, size in parts])
    return list(zip(*pools))


class Background(NamedTuple):
    """What blocks 1 to 4 make of no image, on canvases of 5 to 16 pixels."""

    levels: list  # of each convolution, before its ReLU: (channels,)
    pools: dict  # after block 3 and block 4: (1, channels, a, b)


def backgrounds_of(net, layers, sizes, like):
    """Return the Background of each size of activations, which differ by the size modulo 16 only.

    layers: weight and bias of the convolutions of each block; like: a tensor of their precision and device.
    """
    kinds = [tuple(n % 16 for n in size) for size in sizes]
    if net.backgrounds is None or torch.is_grad_enabled():
        found = {kind: make_background(layers, size, like) for kind, size in dict(zip(kinds, sizes)).items()}
        return [found[kind] for kind in kinds]
    for kind, size in zip(kinds, sizes):
        if kind not in net.backgrounds:
            with torch.inference_mode(False), torch.no_grad():
                net.backgrounds[kind] = make_background(layers, size, like)
    return [net.backgrounds[kind] for kind in kinds]


def make_background(layers, size, like):
    """Return the Background of a size of activations, see backgrounds_of."""
    background, levels, pools = like.new_zeros(1, 3, 1, 1), [], {}
    rim = -1  # conv1_1's own padding is 0 like its input: no rim
    for block, weights in enumerate(layers, 1):
        rim += len(weights)
        background = stretch(background, [2 * (rim + 2) - n % 2 for n in size])
        for weight, bias in weights:
            background = F.conv2d(background, weight, bias, padding=1)
            level = background[0, :, background.shape[2] // 2, background.shape[3] // 2]
            levels.append(level.clone())  # without its canvas
            background = F.relu(background)
        background = F.max_pool2d(background, 2, ceil_mode=True)
        if block >= 3:
            pools[block] = background
        rim, size = (rim + 1) // 2, halved(size)
    return Background(levels, pools)


def halved(size):
    """Return the size after pooling, which keeps an odd last row."""
    return [(n + 1) // 2 for n in size]


def on_a_canvas(groups):
    """Return all images in one batch (N, 3, A, B), zero beyond small ones, and where it begins in the padded image.

    On a CPU, unless it needs a gradient, it is cut to what is not zero: air is. On CUDA, where looking costs more
    than it saves, sizes become multiples of 16, so that few shapes occur.
    """
    height, width = (max(x.shape[axis] for x in groups) for axis in (2, 3))
    cuda = on_card(groups[0])
    if cuda:
        height, width = height + -height % 16, width + -width % 16
    canvas = torch.cat([F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in groups])
    if cuda or canvas.requires_grad:
        return canvas, [PADDING - 1, PADDING - 1]
    seen = canvas.any(dim=0).any(dim=0)
    places = [seen.any(dim=1 - axis).nonzero().flatten().tolist() or [0] for axis in (0, 1)]
    (a0, *_, a1), (b0, *_, b1) = ([*place, place[-1]] for place in places)
    return canvas[:, :, a0 : a1 + 1, b0 : b1 + 1], [PADDING - 1 + a0, PADDING - 1 + b0]


def convolve(deviation, weight, level):
    """Convolve (3 x 3, then ReLU) a deviation from `level`, which grows a pixel on each side."""
    deviation = F.conv2d(deviation, weight, level, padding=2)
    level = F.relu(level)[:, None, None]
    if deviation.requires_grad:
        return F.relu(deviation, inplace=True) - level
    return deviation.relu_().sub_(level)


def align(deviation, start, convs):
    """Pad the deviation so that it is whole pooling windows `convs` convolutions later; return it and its start."""
    before = [(s - convs) % 2 for s in start]
    after = [(s + n + convs) % 2 for s, n in zip(start, deviation.shape[2:])]
    return F.pad(deviation, (before[1], after[1], before[0], after[0])), [s - b for s, b in zip(start, before)]


def stretch(background, size):
    """Return the background of the same weights for another, larger size: its middle row and column are repeated."""
    for axis, n in zip((2, 3), size):
        small = background.shape[axis]
        place = torch.arange(n, device=background.device)
        place = torch.maximum(place.clamp(max=(small - 1) // 2), place - (n - small))  # 0 1 2 2 2 2 3 4
        background = background.index_select(axis, place)
    return background


def assemble(background, deviation, start, size):
    """Return the activations (N, C, *size): the background of that size plus the deviation, which begins at `start`."""
    after = [n - s - small for n, s, small in zip(size, start, deviation.shape[2:])]  # below 0: cut off what is zero
    return stretch(background, size) + F.pad(deviation, (start[1], after[1], start[0], after[0]))


def as_matrix_products(layer, xs):
    """Return an unpadded convolution (Conv2d) of each x (N, C, A, B): one product, with the weights where they lie."""
    weight, (height, width) = layer.weight.flatten(1), layer.kernel_size  # (outputs, inputs)
    patches = [x.unfold(2, height, 1).unfold(3, width, 1).movedim(1, 3).flatten(3) for x in xs]  # (N, a, b, inputs)
    rows = torch.cat([patch.flatten(0, 2) for patch in patches])
    dtype = weight.dtype if len(rows) <= FEW else rows.dtype
    y = product(rows.to(dtype), weight.to(dtype)) + layer.bias.to(dtype)
    ys = y.split([patch.shape[:3].numel() for patch in patches])
    return [y.unflatten(0, patch.shape[:3]).movedim(3, 1) for y, patch in zip(ys, patches)]


def product(rows, weight):
    """Return rows (n, inputs) times the transposed weight (outputs, inputs): (n, outputs)."""
    if weight.dtype is torch.float32 and weight.device.type == 'cpu' and torch.backends.mkldnn.is_available():
        return _Product.apply(rows, weight)
    return F.linear(rows, weight)


class _Product(torch.autograd.Function):
    """The product in float32 on a CPU: forward as a convolution of oneDNN, backward as two matrix products.

    A 1 x 1 convolution whose image is the weights and whose kernels are the rows reads 100 M weights once, as they lie,
    and takes a half to a quarter of the time of a matrix product. With one thread F.conv2d would take a slower one than
    oneDNN's. Backward the products take a third to a half of the convolution's time.
    """

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(rows, weight)
        image, kernels = weight[None, None].movedim(3, 1), rows[:, :, None, None]
        return torch.mkldnn_convolution(image, kernels, None, (0, 0), (1, 1), (1, 1), 1)[0, :, 0]

    @staticmethod
    def backward(ctx, gradient):  # (n, outputs)
        rows, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ rows


def upsampled(layer, x):
    """Return an unpadded transposed convolution of x (N, C, A, B), whose kernel is twice its stride.

    Many scores on a card are upsampled by a convolution, which computes each block of stride x stride pixels from 2 x 2
    pixels. cuDNN's transposed convolution of few channels takes a quarter of the card's time in coarse testing in bf16
    (logs/gpu).
    """
    if not on_card(x) or x.numel() <= MANY_SCORES:
        return layer(x)
    scores, classes, stride = *layer.weight.shape[:2], layer.stride[0]
    taps = layer.weight.view(scores, classes, 2, stride, 2, stride).flip(2, 4)  # the pixel before comes first
    kernels = taps.permute(1, 3, 5, 0, 2, 4).reshape(-1, scores, 2, 2)
    return F.pixel_shuffle(F.conv2d(x, kernels, padding=1), stride)


def _weights(net, block, conv, dtype):
    """Return weight and bias of a convolution, in the precision of the activations."""
    layer = net.get_submodule(f'conv{block}_{conv + 1}')
    return layer.weight.to(dtype), layer.bias.to(dtype)
