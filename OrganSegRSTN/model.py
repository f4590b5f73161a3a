"""The Recurrent Saliency Transformation Network (Yu et al., CVPR 2018, section 3): FCN8s, RSTN, the loss, loading.

State-dict keys and shapes are those of the published snapshots and of the Caffe FCN-8s ported to PyTorch.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

import ring
from running.weights import check_facts, check_shapes, description, load_weights

DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LAST_OF_BLOCK = ('conv1_2', 'conv2_2', 'conv3_3', 'conv4_3', 'conv5_3')  # pooling follows
LARGEST_GRADIENT = 1  # the largest norm of a gradient: larger ones can drive all logits far below 0
OUTSIDE = -9999999.0  # logit of every pixel outside the fine network's box: probability 0


class FCN8s(nn.Module):
    """FCN-8s on VGG-16 (Long et al., CVPR 2015): (N, 3, A, B) in [0, 1] -> logits (N, n_class, A, B).

    `width` is the number of channels of the first layer: 64 in the paper, less on a laptop. All but the score layers
    and what follows them computes in `dtype` (see set_precision; None: that of the weights).
    """

    dtype = None
    backgrounds = None  # or what ring.py remembers of weights that stay as they are: {size modulo 16: Background}

    def __init__(self, n_class, width=64):
        super().__init__()
        channels = 3
        for block, (convs, out) in enumerate(zip((2, 2, 3, 3, 3), (width, 2 * width, 4 * width, 8 * width, 8 * width))):
            for conv in range(convs):
                padding = 100 if block == conv == 0 else 1
                self.add_module(f'conv{block + 1}_{conv + 1}', nn.Conv2d(channels, out, 3, padding=padding))
                channels = out
        self.fc6 = nn.Conv2d(8 * width, 64 * width, 7)
        self.drop6 = nn.Dropout2d()
        self.fc7 = nn.Conv2d(64 * width, 64 * width, 1)
        self.drop7 = nn.Dropout2d()

        self.score_fr = nn.Conv2d(64 * width, n_class, 1)
        self.score_pool3 = nn.Conv2d(4 * width, n_class, 1)
        self.score_pool4 = nn.Conv2d(8 * width, n_class, 1)
        self.upscore2 = nn.ConvTranspose2d(n_class, n_class, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(n_class, n_class, 16, stride=8, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(n_class, n_class, 4, stride=2, bias=False)
        self._initialize_weights()

    def _initialize_weights(self):
        for name, layer in self.named_children():
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight.data = bilinear_upsampling(*layer.weight.shape[1:3])
                layer.weight.requires_grad = False  # frozen
            elif name.startswith('score'):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def unit_variance(self, x):
        """Scale each layer of new weights so that its outputs for images x (N, 3, A, B) have unit mean square.

        Kaiming's scale is right for noise; slices and their padding are dark, and fade from layer to layer.
        The 3 x 3 convolutions are centred first: the weights of an output have mean 0.
        """
        for name, layer in self.named_children():
            if name.startswith('conv'):
                layer.weight -= layer.weight.mean((1, 2, 3), keepdim=True)
            if name.startswith(('conv', 'fc')):
                layer.weight /= layer(x).square().mean().sqrt().clamp(min=1e-6)
                x = F.relu(layer(x))
                if name in LAST_OF_BLOCK:
                    x = F.max_pool2d(x, 2, ceil_mode=True)

    def forward(self, x):
        if ring.pays(self, x):
            return self.logits(ring.features(self, x), x.shape[2:])  # = self.features(x), faster
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16)):
            seen = self.features(x)
        return self.logits(seen, x.shape[2:])

    def several(self, images):
        """Return the logits (n_class, A, B) of each of `images` (3, A, B), whose sizes may differ."""
        if len(images) == 1:
            return [self(images[0][None])[0]]
        seen = ring.features_of_sizes(self, [image[None] for image in images])
        return [self.logits(one, image.shape[1:])[0] for one, image in zip(seen, images)]

    def logits(self, seen, size):
        """Return the logits (N, n_class, *size) of what the score layers see: pool3, pool4, fc7."""
        if self.dtype is torch.float16 and not all(torch.isfinite(activations).all() for activations in seen):
            raise ValueError('precision fp16: the activations of these weights exceed its range; give fp32')
        pool3, pool4, fc7 = (activations.to(self.score_fr.weight.dtype) for activations in seen)
        return self.upsample(self.score_pool3(pool3), self.score_pool4(pool4), self.score_fr(fc7), size)

    def features(self, x):
        """Return the inputs of the score layers, plainly: pool3 at 1/8, pool4 at 1/16, fc7 at 1/32 of the padded size."""
        pools = []
        for block, convs in enumerate((2, 2, 3, 3, 3)):
            for conv in range(convs):
                x = F.relu(self.get_submodule(f'conv{block + 1}_{conv + 1}')(x), inplace=True)
            x = F.max_pool2d(x, 2, ceil_mode=True)
            pools.append(x)
        x = self.drop6(F.relu(self.fc6(x), inplace=True))
        x = self.drop7(F.relu(self.fc7(x), inplace=True))
        return pools[2], pools[3], x

    def upsample(self, score3, score4, score_fr, size):
        """Fuse the scores coarse to fine; the crops undo the padding of 100. -> (N, n_class, *size)"""
        up = self.upscore2(score_fr)
        up = self.upscore_pool4(up + _cut(score4, 5, up.shape[2:]))
        up = ring.upsampled(self.upscore8, up + _cut(score3, 9, up.shape[2:]))
        return _cut(up, 31, size).contiguous()


def _cut(x, start, size):
    return x[:, :, start : start + size[0], start : start + size[1]]


def without_scores(state):
    """Return a state dict of an FCN8s without its score layers, which are those of its classes."""
    return {key: value for key, value in state.items() if 'score' not in key}


def bilinear_upsampling(n_class, size):
    """Return weights (n_class, n_class, size, size) of a transposed convolution: bilinear on the diagonal, zero off it."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    line = 1 - (torch.arange(size) - centre).abs() / factor
    weight = torch.zeros(n_class, n_class, size, size)
    weight[range(n_class), range(n_class)] = torch.outer(line, line)
    return weight


class RSTN(nn.Module):
    """Coarse FCN-8s, saliency transformation, fine FCN-8s (section 3.2, equations 2 to 4).

    TEST None trains: forward(image, label, mode) -> (coarse probability, fine probability), mode 'S', 'I' or 'J';
    in I and J it returns fine_iterations (the paper's T) fine ones, each made from the one before it; in 'C' none.
    With `logits` it returns logits instead; those outside the fine network's box are OUTSIDE.
    TEST 'C', 'O' or 'F' tests: forward -> one probability. All are (N, n_class, A, B); image is (N, 3, A, B).
    Where label and mask are on the CPU, their boxes are found without waiting for a GPU.
    """

    def __init__(
        self, crop_margin=20, crop_prob=0.5, crop_sample_batch=1, n_class=3, TEST=None, width=64, fine_iterations=1
    ):
        super().__init__()
        self.margin, self.prob, self.sample_batch, self.TEST = crop_margin, crop_prob, crop_sample_batch, TEST
        self.fine_iterations = fine_iterations
        self.coarse_model = FCN8s(n_class, width)
        self.saliency1 = nn.Conv2d(n_class, n_class, 3, padding=1)
        self.saliency2 = nn.Conv2d(n_class, n_class, 5, padding=2)
        self.fine_model = FCN8s(n_class, width)
        nn.init.xavier_normal_(self.saliency1.weight)
        nn.init.ones_(self.saliency1.bias)
        nn.init.zeros_(self.saliency2.weight)
        self.saliency2.bias.data = torch.tensor([1.0, 1.5, 2.0])[:n_class]

    def forward(self, image, label=None, mode=None, score=None, mask=None, logits=False):
        if self.TEST == 'F':
            return self.fine_windows(image * self.saliency(score), mask >= 0.5, empty=0)
        coarse = self.coarse_model(image)
        probability = torch.sigmoid(coarse)
        if self.TEST == 'C':
            return probability
        if self.TEST == 'O':
            return self.fine_windows(image * self.saliency(probability), label >= 0.5)
        if mode not in ('C', 'S', 'I', 'J'):
            raise ValueError(f'mode {mode!r} is not one of S, I, J')
        found = [(coarse, probability)]  # one sigmoid of each: the order in which gradients add up sets the bits
        for _ in range({'C': 0, 'S': 1}.get(mode, self.fine_iterations)):
            seen = image if mode == 'S' else image * self.saliency(probability)
            masks = [probability >= 0.5] if mode == 'J' else []
            fine = self.fine(seen, *masks, label >= 0.5)
            probability = torch.sigmoid(fine)
            found.append((fine, probability))
        outputs, probabilities = zip(*found)
        return outputs if logits else probabilities

    def saliency(self, probability):
        """Return the saliency map of a probability (equation 3), which multiplies the image."""
        return self.saliency2(F.relu(self.saliency1(probability)))

    def fine(self, image, *masks):
        """Return the fine logits of a batch to train on: inside the box of a mask (bool) and its margins, OUTSIDE elsewhere.

        A sample's box is that of the first of its masks that is not empty; without one it is the whole image.
        """
        margins, whole = self.margins(), (0, image.shape[2], 0, image.shape[3])
        boxes = [
            next(filter(None, (bounding_box(mask, margins) for mask in own)), whole) for own in zip(*masks, strict=True)
        ]
        if len(boxes) > 1:  # each sample keeps its own box only
            image = torch.stack([uncrop(crop(one, box), box, one.shape[1:]) for one, box in zip(image, boxes)])
        joint = union(boxes)
        return uncrop(self.fine_model(crop(image, joint)), joint, image.shape[2:], OUTSIDE)

    def fine_windows(self, image, mask, empty=1):
        """Return the fine probability of windows to test, each by itself: inside the box of its mask; 0 outside.

        An empty mask has no box: the network sees the whole image times `empty`.
        """
        margins, whole = self.margins(), (0, image.shape[2], 0, image.shape[3])
        boxes = [bounding_box(one, margins) for one in mask]
        crops = [crop(one, box) if box else one * empty for one, box in zip(image, boxes)]
        logits = self.fine_model.several(crops)
        return torch.stack(
            [uncrop(torch.sigmoid(one), box or whole, image.shape[2:]) for one, box in zip(logits, boxes)]
        )

    def margins(self):
        """Return the pixels to add before and after the box along A, before and after it along B."""
        if self.TEST is not None or random.random() >= self.prob:
            return (self.margin,) * 4
        return tuple(
            sum(random.randint(0, 2 * self.margin) for _ in range(self.sample_batch)) // self.sample_batch
            for _ in range(4)
        )


def bounding_box(mask, margins):
    """Return (a0, a1, b0, b1) around the True pixels of `mask` (C, A, B), plus margins; None where it is empty."""
    seen = mask.any(dim=0)
    lines = torch.cat([seen.any(dim=1), seen.any(dim=0)]).cpu().split(seen.shape)  # a GPU is waited for once
    box = []
    for hits, (before, after) in zip(lines, (margins[:2], margins[2:])):
        places = hits.nonzero()
        if len(places) == 0:
            return None
        box += [max(int(places[0]) - before, 0), min(int(places[-1]) + 1 + after, len(hits))]
    return tuple(box)


def union(boxes):
    """Return the smallest box around all `boxes`."""
    a0, a1, b0, b1 = zip(*boxes)
    return min(a0), max(a1), min(b0), max(b1)


def crop(image, box):
    """Return the part of `image` (..., A, B) inside `box`."""
    a0, a1, b0, b1 = box
    return image[..., a0:a1, b0:b1]


def uncrop(image, box, size, outside=0.0):
    """Return a canvas (..., *size) of `outside` with a crop at its `box`."""
    a0, a1, b0, b1 = box
    return F.pad(image, (b0, size[1] - b1, a0, size[0] - a1), value=outside)


class DSC_loss(nn.Module):
    """Soft Dice loss over all channels of a sample, averaged over the batch (section 3.3)."""

    of_logits = False

    def forward(self, pred, target):
        pred, target = pred.flatten(1), target.flatten(1)
        DSC = (2 * (pred * target).sum(1) + 1e-6) / (pred.sum(1) + target.sum(1) + 1e-6)
        return (1 - DSC).mean()


def smooth_dice(pred, target, share=0.01):
    """Return the soft Dice loss of a batch, smoothed by a share of the pixels: slices without the organ have a gradient.

    With a share above the organ's, networks mark less: in doubt they leave pixels out.
    """
    pred, target = pred.flatten(1), target.flatten(1)
    smooth = share * pred.shape[1]
    return (1 - (2 * (pred * target).sum(1) + smooth) / (pred.sum(1) + target.sum(1) + smooth)).mean()


class DiceEntropyLoss(nn.Module):
    """Dice loss, smoothed by 0.1 %, plus cross-entropy, of logits.

    The cross-entropy of a probability has no gradient where a network is so sure and wrong that it rounds to 0 or 1;
    that of a logit has. Outside the fine network's box, where nothing can be learned, the logit counts as -100.
    """

    of_logits = True

    def forward(self, logits, target):
        entropy = F.binary_cross_entropy_with_logits(logits.masked_fill(logits == OUTSIDE, -100), target)
        return smooth_dice(torch.sigmoid(logits), target, 0.001) + entropy


class ClippedAdam(torch.optim.Adam):
    """Adam; the norm of the gradient of each group of parameters is at most LARGEST_GRADIENT."""

    def step(self):
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group['params'], LARGEST_GRADIENT)
        return super().step()


def set_rates(optimizer, done):
    """Set the rates of a step after `done` of all steps: up to each group's `highest` at 5 %, down along a cosine."""
    share = min(1, (done + 1e-3) / 0.05) * (1 + math.cos(math.pi * min(done, 1))) / 2
    for group in optimizer.param_groups:
        group['lr'] = share * group['highest']


def get_parameters(model, coarse=True, bias=False, parallel=False):
    """Yield the trained parameters of the coarse network, or of saliency and fine network; weights or biases."""
    model = model.module if parallel else model
    for name, parameter in model.named_parameters():
        if 'upscore' not in name and name.startswith('coarse_model.') == coarse and name.endswith('.bias') == bias:
            yield parameter


def set_precision(model, precision, store=False):
    """Make every FCN-8s in `model` compute in a precision of DTYPES.

    store: for testing, where weights no longer change: convert them, and let ring.py remember what it knows of them.
    Score layers, upsampling, saliency and loss stay in float32, and so do the optimizer's weights.
    """
    for net in model.modules():
        if isinstance(net, FCN8s):
            net.dtype = DTYPES[precision]
            if store:
                net.backgrounds = {}
                for name, layer in net.named_children():
                    if name.startswith(('conv', 'fc')):
                        layer.to(net.dtype)


def load_RSTN(path, TEST, thickness, crop_margin, device, precision='fp32', facts=None):
    """Return the RSTN of a snapshot, ready for testing: only the networks that TEST uses, of the snapshot's width.

    facts: what the training must agree with, see running.weights.FACTS; None: whatever it was.
    """
    state = load_weights(path)
    if facts is not None:
        check_facts(path, description(state), facts)
    if 'coarse_model.conv1_1.weight' not in state or 'saliency1.weight' not in state:
        raise ValueError(f'{path}: not an RSTN snapshot: coarse_model.conv1_1.weight or saliency1.weight is missing')
    width, n_class = len(state['coarse_model.conv1_1.weight']), len(state['saliency1.weight'])
    if n_class != thickness:
        raise ValueError(f'{path}: trained with slice_thickness {n_class}, not {thickness}')
    with torch.device('meta'):  # no memory and no random numbers: the weights are loaded
        net = RSTN(crop_margin, n_class=n_class, TEST=TEST, width=width)
    for unused in {'C': ['fine_model', 'saliency1', 'saliency2'], 'F': ['coarse_model']}.get(TEST, []):
        delattr(net, unused)
    used = net.state_dict()
    check_shapes(path, state, used)
    if lost := [key for key in state if not torch.isfinite(state[key].sum(dtype=torch.float64))]:
        raise ValueError(f'{path}: {lost[0]} is not finite: the training diverged, or the file is damaged')
    net.load_state_dict({key: state[key].float() for key in used}, assign=True)
    set_precision(net, precision, store=True)
    return net.to(device).eval()
