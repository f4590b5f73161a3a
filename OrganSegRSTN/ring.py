"""FCN-8s without the ring: what the padding of 100 computes is computed only where the image can be felt.

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

and max pooling commutes with subtracting a constant. conv5_1 and after see the sum of the two. fc6 is computed as the
matrix product that it is: as a convolution to a few pixels it spends its time on rearranging 100 M weights.

Everything is differentiable and nothing is remembered between calls: these are the plain network's logits and gradients
(Long et al., CVPR 2015), at 0.4 of its operations for 96 x 96 pixels and 0.7 for 512 x 512.
"""

import torch
import torch.nn.functional as F

PADDING = 100  # of conv1_1; the other convolutions pad by 1
CONVS = (2, 2, 3, 3, 3)  # convolutions of a block, each block ending in 2 x 2 pooling
FEW = 64  # rows up to which a matrix product takes less time than casting its weights


def features(net, x):
    """What the score layers of the FCN8s `net` see for images (N, 3, A, B): pool3, pool4, fc7, as from net.features."""
    pool3, pool4 = early_blocks(net, x.to(net.dtype or net.conv1_1.weight.dtype))
    x = pool4
    for conv in range(CONVS[4]):
        x = F.relu(F.conv2d(x, *_weights(net, 5, conv, x.dtype), padding=1), inplace=True)
    x = F.max_pool2d(x, 2, ceil_mode=True)
    x = net.drop6(F.relu(as_matrix_product(net.fc6, x), inplace=True))
    x = net.drop7(F.relu(as_matrix_product(net.fc7, x), inplace=True))
    return pool3, pool4, x


def early_blocks(net, image):
    """pool3 and pool4 of images (N, 3, A, B): (N, channels, ~(A + 198) / 8, ~(B + 198) / 8), and the same at 1/16."""
    size = [n + 2 * PADDING - 2 for n in image.shape[2:]]  # of the plain network's activations
    start = PADDING - 1  # where the deviation begins in them, along both axes
    rim = -1  # conv1_1's own padding is 0 like its input: no rim
    background, deviation = image.new_zeros(1, 3, 1, 1), image
    pools = []
    for block, convs in enumerate(CONVS[:4], 1):
        rim += convs
        background = stretch(background, [2 * (rim + 2) - n % 2 for n in size])
        deviation, start = align(deviation, start, convs)
        layout = torch.channels_last if block < 4 else torch.contiguous_format  # the faster one of large maps, of small
        deviation = deviation.contiguous(memory_format=layout)
        for conv in range(convs):
            background, deviation = convolve(*_weights(net, block, conv, image.dtype), background, deviation)
        background = F.max_pool2d(background, 2, ceil_mode=True)
        deviation = F.max_pool2d(deviation, 2)
        start, rim, size = (start - convs) // 2, (rim + 1) // 2, [(n + 1) // 2 for n in size]
        pools.append((background, deviation, start, size))
    return [assemble(*pool) for pool in pools[2:]]


def convolve(weight, bias, background, deviation):
    """A 3 x 3 convolution and its ReLU: of the background, and of the deviation, which grows a pixel on each side."""
    background = F.conv2d(background, weight, bias, padding=1)
    level = background[0, :, background.shape[2] // 2, background.shape[3] // 2]
    deviation = F.conv2d(deviation, weight, level, padding=2)
    level = F.relu(level)[:, None, None]
    if deviation.requires_grad:
        return F.relu(background), F.relu(deviation, inplace=True) - level
    return background.relu_(), deviation.relu_().sub_(level)


def align(deviation, start, convs):
    """The deviation and its start, so padded that, `convs` convolutions later, it consists of whole pooling windows."""
    before = (start - convs) % 2
    after = [(start + n + convs) % 2 for n in deviation.shape[2:]]
    return F.pad(deviation, (before, after[1], before, after[0])), start - before


def stretch(background, size):
    """The background of the same weights for another, larger size: its middle row and column are repeated."""
    for axis, n in zip((2, 3), size):
        small = background.shape[axis]
        place = torch.arange(n, device=background.device)
        place = torch.maximum(place.clamp(max=(small - 1) // 2), place - (n - small))  # 0 1 2 2 2 2 3 4
        background = background.index_select(axis, place)
    return background


def assemble(background, deviation, start, size):
    """Activations (N, C, *size): the background of that size plus the deviation, which begins at `start`."""
    after = [n - start - small for n, small in zip(size, deviation.shape[2:])]
    return stretch(background, size) + F.pad(deviation, (start, after[1], start, after[0]))


def as_matrix_product(layer, x):
    """An unpadded convolution (Conv2d) of x (N, C, A, B), as one product with the weights where they lie in memory."""
    weight, (height, width) = layer.weight.flatten(1), layer.kernel_size  # (outputs, inputs)
    patches = x.unfold(2, height, 1).unfold(3, width, 1).movedim(1, 3).flatten(3)  # (N, a, b, inputs)
    rows = patches.flatten(0, 2)
    dtype = weight.dtype if len(rows) <= FEW else x.dtype
    y = product(rows.to(dtype), weight.to(dtype)) + layer.bias.to(dtype)
    return y.unflatten(0, patches.shape[:3]).movedim(3, 1)


def product(rows, weight):
    """rows (n, inputs) times weight (outputs, inputs), transposed: (n, outputs)."""
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


def _weights(net, block, conv, dtype):
    """Weight and bias of a convolution, in the precision of the activations."""
    layer = net.get_submodule(f'conv{block}_{conv + 1}')
    return layer.weight.to(dtype), layer.bias.to(dtype)
