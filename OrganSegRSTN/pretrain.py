"""Make an FCN-8s to start training from.

Trains one on the fold's own training slices of all three planes, crops around the organ first, and
writes models/pretrained/fcn8s_FD{fold}_{organ}.pth. Or converts (--convert FILE) weights: the published
pipeline's fcn8s_from_caffe.pth is copied, torchvision's vgg16-*.pth (--convert vgg16 downloads it)
becomes fcn8s_from_vgg16.pth.
"""

import functools
import random
from pathlib import Path

from running import arguments, script  # before packages: it names a missing one

# isort: split
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils.data import ConcatDataset

from Data import load_slices, neighbours, refuse_seen_cases, training_facts, varied
from model import ClippedAdam, FCN8s, bounding_box, crop, set_precision, set_rates, smooth_dice, without_scores
from running.checkpoint import Run, list_checksums, seed_everything
from running.data_folder import PLANES, pretrained_folder, pretrained_name
from running.downloads import fetch_vgg16
from running.files import atomic_write, locked
from running.results import start
from running.weights import check_shapes, describe, description, load_weights

POSITIONALS = [*arguments.TRAINING[:8], 'GPU_ID', 'epochs']
VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their places in torchvision's `features`
NORMALIZATION = {  # mean and standard deviation of what conv1_1 was trained on, in [0, 1]
    'fcn8s_from_vgg16.pth': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'fcn8s_from_caffe.pth': ((104.00699 / 255, 116.66877 / 255, 122.67891 / 255), (1 / 255, 1 / 255, 1 / 255)),
}
CROPS_FIRST = 0.4  # share of the steps that see crops around the organ only
VARIED_FROM = 0.3  # share of the steps after which slices are turned, scaled and changed in contrast
CROPS = 4  # in a batch, which takes the time of two single ones
OTHERS = 4  # further organs to learn at most
PATIENCE, STUCK, ATTEMPTS = 600, 0.75, 3  # steps until the Dice loss of crops is below STUCK of that of an empty mask


def main():
    args = parse()
    device, _ = start(args)
    if args.convert:
        converted = write_converted(args)
        if not args.further:
            return
        args.start = str(converted)
    path = pretrained_folder(args) / pretrained_name(args)
    run = Run(path.with_suffix('.ckpt'), args, **list_checksums(args, PLANES))
    with locked(path.with_name(f'.{path.stem}.lock'), f'.{path.stem}.*.part'):
        write(path, pretrain(args, run, device))
        run.path.unlink(missing_ok=True)


def parse():
    parser = arguments.stage_parser(__doc__, POSITIONALS)
    parser.add_argument('--width', type=arguments.whole(3), default=64, help='channels of the first layer (default 64)')
    parser.add_argument('--learning_rate', type=arguments.number(0), default=2e-4,
                        help="Adam's highest rate (default 2e-4)")  # fmt: skip
    parser.add_argument('--convert', metavar='FILE',
                        help='convert these weights; vgg16: download them')  # fmt: skip
    parser.add_argument('--fold_normalization', action='store_true',
                        help="fold the Caffe model's mean and scale into conv1_1")  # fmt: skip
    parser.add_argument('--further', action='store_true', help='train the converted weights further')
    parser.add_argument('--start', metavar='FILE', help='weights to train further')
    parser.add_argument('--crop_margin', type=arguments.whole(0), default=20, help='as in training.py (default 20)')
    arguments.add_training(parser)
    args = arguments.parse(parser)
    if args.further and (args.start or not args.convert):
        parser.error('argument --further: goes with --convert, not with --start')
    return args


def write_converted(args):
    """Convert the weights of --convert; return the path that they are saved at."""
    folder = pretrained_folder(args)
    source = fetch_vgg16(folder) if args.convert == 'vgg16' else args.convert
    weights = load_weights(source)
    name, state = convert(weights, source, args.fold_normalization)
    if state is not weights and Path(source).resolve() == (folder / name).resolve():
        raise ValueError(f'{source}: would be replaced by what it is converted to; move it to another folder')
    write(folder / name, state)
    return folder / name


def write(path, state):
    """Save the weights."""
    with atomic_write(path) as file:
        torch.save(state, file)
    print(f'written: {path}')


def convert(weights, path, folded=False):
    """Return (file name, FCN-8s state dict) of the Caffe model's PyTorch port, or of torchvision's VGG-16.

    The normalization of VGG-16 is folded into conv1_1, that of the Caffe model only if `folded`.
    """
    with torch.device('meta'):
        expected = FCN8s(n_class=21).state_dict()
    if 'features.0.weight' in weights:
        name, weights = 'fcn8s_from_vgg16.pth', from_vgg16(weights, expected)
        expected = without_scores(expected)
    else:
        name = 'fcn8s_from_caffe.pth'
    try:
        check_shapes(path, weights, expected)
    except ValueError as error:
        raise ValueError(
            f"{error}: neither fcn8s_from_caffe.pth nor torchvision's VGG-16 (without batch norm)"
        ) from None
    if folded or name == 'fcn8s_from_vgg16.pth':
        weights = fold_normalization(weights, *NORMALIZATION[name])
    return name, weights


def fold_normalization(weights, mean, std):
    """Let conv1_1 take x in [0, 1] where it took (x - mean) / std, so that 0, also in the padding, is dark."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    weight = weights['conv1_1.weight'] / std
    bias = weights['conv1_1.bias'] - (weight * mean).sum((1, 2, 3))
    return weights | {'conv1_1.weight': weight, 'conv1_1.bias': bias}


def from_vgg16(weights, expected):
    """Return torchvision's VGG-16 as FCN-8s: features become conv1_1 ... conv5_3, classifier 0 and 3 fc6 and fc7."""
    layers = [key.removesuffix('.weight') for key in expected if key.startswith('conv') and key.endswith('.weight')]
    sources = dict(zip(layers, (f'features.{i}' for i in VGG16_CONVOLUTIONS)))
    sources |= {'fc6': 'classifier.0', 'fc7': 'classifier.3'}
    return {
        f'{layer}.{kind}': as_shaped(weights[f'{source}.{kind}'], expected[f'{layer}.{kind}'].shape)
        for layer, source in sources.items()
        for kind in ('weight', 'bias')
        if f'{source}.{kind}' in weights
    }


def as_shaped(tensor, shape):
    """Return a fully connected layer's weights as a convolution's; leave what does not fit for check_shapes to name."""
    return tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor


# --- training ------------------------------------------------------------------------------------------------------


def pretrain(args, run, device):
    """Train an FCN-8s on the slices of the fold's training cases, X, Y and Z mixed; return its state dict.

    It starts the coarse and the fine network. It learns the organ's neighbours as well, as further
    classes that are dropped at the end.
    """
    seed_everything(args.seed)
    others = neighbours(load_slices(args, 'Z'), OTHERS)
    active = ConcatDataset([load_slices(args, plane, others) for plane in PLANES])
    facts = starting_facts(args)
    args.slice_threshold = 0  # all slices
    whole = ConcatDataset([load_slices(args, plane, others) for plane in PLANES])
    state = run.load() if args.resume else None
    if state is None:
        run.path.unlink(missing_ok=True)
        print(f'{args.current_fold} {len(active)}', flush=True)
    attempt = Attempt()
    while (model := learn(args, run, state, attempt, active, whole, device)) is None:
        attempt.again()
        run.begin_again()
        state = None
    return describe(own_classes(model.state_dict(), args.slice_thickness), **facts)


def starting_facts(args):
    """Return the facts to store with the weights; refuse a --start that has seen a test case of the fold."""
    origin = {} if args.start is None else description(load_weights(args.start))
    refuse_seen_cases(args, args.start, origin)
    return training_facts(args, origin)


def learn(args, run, state, attempt, active, whole, device):
    """Return the FCN-8s after all epochs, or None if it does not learn."""
    steps = args.epochs * len(active)
    model = new_model(args, active).to(device).train()
    set_precision(model, args.precision)
    parameters = {'params': [p for p in model.parameters() if p.requires_grad], 'highest': args.learning_rate}
    optimizer = ClippedAdam([parameters], fused=True)
    run.restore(state, model=model, optimizer=optimizer, attempt=attempt)
    for epoch in run.epochs(range(args.epochs)):
        for index, sample in run.steps(active):
            step = epoch * len(active) + index
            set_rates(optimizer, step / steps)
            image, label = batch(args, sample, index, step / steps, active, whole, device)
            loss, empty = pretrain_step(model, optimizer, image, label, args.slice_thickness)
            run.losses.add((loss,))
            if attempt.fails(loss, empty, step, CROPS_FIRST * steps):
                return None
        print(f'{args.current_fold} Epoch[{epoch + 1}/{args.epochs}], Dice Loss {run.losses.mean[0]:.4f}, '
                f'Time elapsed {run.losses.elapsed:.2f}s', flush=True)  # fmt: skip
    return plain(model)


def new_model(args, active):
    """Return the FCN-8s to train, with a score of every slice and organ."""
    classes, thickness = len(active[0][1]), args.slice_thickness
    if args.start is None:
        model = FCN8s(classes, args.width)
        samples = [active[random.randrange(len(active))] for _ in range(CROPS)]
        on_device = functools.partial(active.datasets[0].on_device, 'cpu')
        model.unit_variance(crops(samples, on_device, 2 * args.crop_margin, thickness, vary=False)[0])
        standardize(model)
        return model
    weights = without_scores(load_weights(args.start))
    model = FCN8s(classes, width=len(weights.get('conv1_1.weight', [0])))
    check_shapes(args.start, weights, without_scores(model.state_dict()))
    model.load_state_dict(weights, strict=False)
    return model


def standardize(model):
    """Let the 3 x 3 convolutions learn standardized weights, until `plain` makes ordinary ones of them."""
    for name, layer in model.named_children():
        if name.startswith('conv'):
            parametrize.register_parametrization(layer, 'weight', Standardized())


def plain(model):
    """Return the model with ordinary weights: the same values, the state-dict keys of FCN8s."""
    for layer in model.children():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, 'weight')
    return model


class Standardized(torch.nn.Module):
    """Weights (outputs, inputs, 3, 3) as a gain per output times weights of mean 0 and variance 1 (arXiv:1903.10520)."""

    def forward(self, weight, gain):
        deviation, mean = torch.std_mean(weight, (1, 2, 3), correction=0, keepdim=True)
        return gain / deviation * (weight - mean)

    def right_inverse(self, weight):
        return weight, weight.std((1, 2, 3), correction=0, keepdim=True)


def own_classes(state, thickness):
    """Return the state dict without the scores of other organs; the own organ's come first."""
    for key, value in state.items():
        if key.startswith('upscore'):
            state[key] = value[:thickness, :thickness].clone()
        elif key.startswith('score_'):
            state[key] = value[:thickness].clone()
    return state


class Attempt:
    """A start from new weights: its number, and the mean losses of its last steps, by which it fails or not."""

    def __init__(self):
        self.begin(1)

    def begin(self, number):
        self.number, self.loss, self.empty = number, 1.0, 1.0

    def fails(self, loss, empty, step, last):
        """Return whether the mean loss is too high at a step (from 0), checked from step PATIENCE to step `last`.

        empty: the loss of a network that marks nothing. It is far below 1, because the loss is smoothed.
        """
        weight = 1 / min(step + 1, PATIENCE / 5)
        self.loss += weight * (loss - self.loss)
        self.empty += weight * (empty - self.empty)
        return PATIENCE <= step + 1 <= last and not self.loss <= STUCK * self.empty  # also where it is nan

    def again(self):
        """Count the next attempt; raise ValueError after the last one."""
        line = f'attempt {self.number} does not learn: Dice loss {self.loss:.2f} of crops, {self.empty:.2f} with nothing marked'
        if self.number == ATTEMPTS:
            raise ValueError(
                f'{line}, asked for {STUCK * self.empty:.2f}; try another --learning_rate or a larger --width, and see with '
                'check_data.py whether the labels lie on their images'
            )
        print(f'{line}; starting again from other weights', flush=True)
        self.begin(self.number + 1)

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


def pretrain_step(model, optimizer, image, label, thickness):
    """Take one step on soft Dice plus cross-entropy; return the organ's Dice loss before it, and that of an empty mask.

    The other organs together weigh as much as the organ itself.
    """
    logits = model(image)
    probability = torch.sigmoid(logits)
    own = label[:, :thickness]
    loss = dice = smooth_dice(probability[:, :thickness], own)
    if label.shape[1] > thickness:
        others = (tensor[:, thickness:].unflatten(1, (-1, thickness)).flatten(0, 1) for tensor in (probability, label))
        loss = (dice + smooth_dice(*others)) / 2
    optimizer.zero_grad()
    (loss + F.binary_cross_entropy_with_logits(logits, label)).backward()
    optimizer.step()
    return torch.stack([dice, smooth_dice(torch.zeros_like(own), own)]).tolist()  # a GPU is waited for once


# --- batches -------------------------------------------------------------------------------------------------------


def batch(args, sample, index, done, active, whole, device):
    """Return (image (N, 3, A, B), label (N, C, A, B)) of a step, after `done` of all steps.

    At first only crops around the organ: it has 0.1 % of the pixels of a slice, where a new network
    does not find it for thousands of steps. Then, for the coarse network, crops, active slices and any slices in turn.
    """
    vary, on_device = done >= VARIED_FROM, functools.partial(active.datasets[0].on_device, device)
    stored = [tensor[0] for tensor in sample]
    if done < CROPS_FIRST or index % 3 == 1:
        samples = [stored, *(active[random.randrange(len(active))] for _ in range(CROPS - 1))]
        return crops(samples, on_device, 2 * args.crop_margin, args.slice_thickness, vary)
    if index % 3 == 2:
        stored = whole[random.randrange(len(whole))]
    image, label = on_device(*stored)
    if vary:
        image, label = varied(image, label)
    return image[None], label[None]


def crops(samples, on_device, margin, thickness, vary):
    """Return a batch of crops of one size around the organ of each stored sample, with margins from 0 to `margin`."""
    boxes = [
        bounding_box(label[:thickness] > 0, [random.randint(0, margin) for _ in range(4)])
        or (0, label.shape[1], 0, label.shape[2])
        for _, label in samples
    ]
    least = [min(image.shape[axis] for image, _ in samples) for axis in (1, 2)]
    size = [min(max(box[i + 1] - box[i] for box in boxes), n) for i, n in zip((0, 2), least)]
    cropped = []
    for sample, own in zip(samples, boxes):
        image, label = on_device(*sample)
        box = placed(own, size, image.shape[1:])
        cropped.append(varied(image, label, box) if vary else (crop(image, box), crop(label, box)))
    return [torch.stack(tensors) for tensors in zip(*cropped)]


def placed(box, size, shape):
    """Return the box grown (or cut) to `size`, at a random place around what it held, within a slice of `shape`."""
    ends = []
    for low, high, n, most in zip(box[::2], box[1::2], size, shape):
        first = min(max(low - random.randint(0, max(n - (high - low), 0)), 0), most - n)
        ends += [first, first + n]
    return tuple(ends)


if __name__ == '__main__':
    script.run(main)
