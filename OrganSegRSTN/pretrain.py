"""Make an FCN-8s to start training from.

Trains one on the fold's own training slices of all three planes (Kaiming start, Adam) and writes
models/pretrained/fcn8s_FD{fold}_{organ}.pth. Or converts (--convert FILE) weights: the published
pipeline's fcn8s_from_caffe.pth is copied, torchvision's vgg16-*.pth becomes fcn8s_from_vgg16.pth.
"""

import random

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset

from Data import load_slices, training_facts
from model import FCN8s, bounding_box, crop, set_precision
from running import arguments, script
from running.checkpoint import Run, list_checksums, seed_everything
from running.data_folder import PLANES, pretrained_folder, pretrained_name
from running.files import atomic_write, locked
from running.results import start
from running.weights import check_shapes, describe, load_weights

POSITIONALS = [*arguments.TRAINING[:8], 'GPU_ID', 'epochs']
VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their places in torchvision's `features`
SCORE_LAYERS = ('score_', 'upscore')


def main():
    args = parse()
    device, _ = start(args)
    if args.convert:
        name, state = convert(load_weights(args.convert), args.convert)
        write(pretrained_folder(args) / name, state)
        return
    path = pretrained_folder(args) / pretrained_name(args)
    run = Run(path.with_suffix('.ckpt'), args, **list_checksums(args, PLANES))
    with locked(path.with_name(f'.{path.stem}.lock'), f'.{path.stem}.*.part'):
        write(path, pretrain(args, run, device))
        run.path.unlink(missing_ok=True)


def parse():
    parser = arguments.stage_parser(__doc__, POSITIONALS)
    parser.add_argument('--width', type=arguments.whole(3), default=64, help='channels of the first layer (default 64)')
    parser.add_argument('--learning_rate', type=arguments.number(0), default=2e-4,
                        help="Adam's rate, falling to 0 along a cosine (default 2e-4)")  # fmt: skip
    parser.add_argument('--convert', metavar='FILE', help='convert these weights instead of training')
    parser.add_argument('--crop_margin', type=arguments.whole(0), default=20, help='as in training.py (default 20)')
    arguments.add_training(parser)
    return arguments.parse(parser)


def write(path, state):
    """Save the weights."""
    with atomic_write(path) as file:
        torch.save(state, file)
    print(f'written: {path}')


def convert(weights, path):
    """Return (file name, FCN-8s state dict) of the Caffe model's PyTorch port, as it is, or of torchvision's VGG-16."""
    with torch.device('meta'):
        expected = FCN8s(n_class=21).state_dict()
    if 'features.0.weight' in weights:
        name, weights = 'fcn8s_from_vgg16.pth', from_vgg16(weights, expected)
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith(SCORE_LAYERS)}
    else:
        name = 'fcn8s_from_caffe.pth'
    try:
        check_shapes(path, weights, expected)
    except ValueError as error:
        raise ValueError(
            f"{error}: neither fcn8s_from_caffe.pth nor torchvision's VGG-16 (without batch norm)"
        ) from None
    return name, weights


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


def pretrain(args, run, device):
    """Train an FCN-8s on the slices of the fold's training cases, X, Y and Z mixed; return its state dict.

    It starts the coarse and the fine network: a third of its samples are active slices cropped around
    the organ, a third active slices as they are, a third any slices.
    """
    seed_everything(args.seed)
    active = ConcatDataset([load_slices(args, plane) for plane in PLANES])
    facts = training_facts(args)
    args.slice_threshold = 0  # all slices
    whole = ConcatDataset([load_slices(args, plane) for plane in PLANES])
    state = run.load() if args.resume else None
    if state is None:
        run.path.unlink(missing_ok=True)
        print(f'{args.current_fold} {len(active)}', flush=True)
    model = FCN8s(args.slice_thickness, args.width).to(device).train()
    set_precision(model, args.precision)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, fused=True)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(active))
    run.restore(state, model=model, optimizer=optimizer, rates=rates)
    for epoch in run.epochs(range(args.epochs)):
        for index, sample in run.steps(active):
            image, label = vary(sample, index % 3, whole, args.crop_margin)
            run.losses.add(pretrain_step(model, optimizer, image.to(device), label.to(device)))
            rates.step()
        print(f'{args.current_fold} Epoch[{epoch + 1}/{args.epochs}], Dice Loss {run.losses.mean[0]:.4f}, '
                f'Time elapsed {run.losses.elapsed:.2f}s', flush=True)  # fmt: skip
    return describe(model.state_dict(), **facts)


def vary(sample, kind, whole, crop_margin):
    """Return (image, label), each (1, C, A, B): the active slice (kind 0), a crop of it (1), or any slice (2).

    A crop has a margin from 0 to twice `crop_margin` on each side.
    """
    image, label = sample
    if kind == 1:
        box = bounding_box(label[0] >= 0.5, [random.randint(0, 2 * crop_margin) for _ in range(4)])
        return (crop(image, box), crop(label, box)) if box else sample
    if kind == 2:
        return [tensor[None] for tensor in whole[random.randrange(len(whole))]]
    return sample


def pretrain_step(model, optimizer, image, label):
    """Take one Adam step on soft Dice plus cross-entropy, without which a Kaiming start does not learn.

    Return (Dice loss,). It is smoothed by 1 % of the pixels, so that slices without the organ have a gradient.
    """
    logits = model(image)
    probability, smooth = torch.sigmoid(logits), 0.01 * label.numel()
    loss = 1 - (2 * (probability * label).sum() + smooth) / (probability.sum() + label.sum() + smooth)
    optimizer.zero_grad()
    (loss + F.binary_cross_entropy_with_logits(logits, label)).backward()
    optimizer.step()
    return (loss.item(),)


if __name__ == '__main__':
    script.run(main)
