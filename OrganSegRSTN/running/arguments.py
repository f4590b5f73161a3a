"""The positional arguments of every stage script, each defined once; a stage lists the names that it takes, in order."""

import argparse
import math
import os
import re
import sys


def whole(low, high=None):
    """Return the type of a whole number of at least `low` (and at most `high`)."""

    def parse(text):
        value = int(text)
        if value < low or (high is not None and value > high):
            limits = f'at least {low}' if high is None else f'{low} to {high}'
            raise argparse.ArgumentTypeError(f'{text} is not a whole number of {limits}')
        return value

    parse.__name__ = 'whole number'
    return parse


def number(low=-math.inf, high=math.inf):
    """Return the type of a finite number within [low, high]."""

    def parse(text):
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f'{text} is not a number within [{low:g}, {high:g}]')
        return value

    parse.__name__ = 'number'
    return parse


def rate(text):
    """Return a positive number kept as it was typed, because it becomes part of a folder's name (1e-5, never 1e-05)."""
    if not 0 < float(text) < math.inf or os.sep in text or text != text.strip():
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive number')
    return text


def one_of(*choices):
    """Return the type of a value that must be one of `choices`."""

    def parse(text):
        for choice in choices:
            if text == str(choice):
                return choice
        raise argparse.ArgumentTypeError(f'{text!r} is not one of {", ".join(map(str, choices))}')

    return parse


def organs(text):
    """Return several organs, as run.sh lists them: '1 3' -> [1, 3]."""
    found = [whole(1, 255)(word) for word in text.split()]
    if len(found) < 2 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of two or more different organs, such as "1 3"')
    return found


def stamp(text):
    """Return a timestamp: any text that can be part of a file's name."""
    if '/' in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a file's name")
    return text


ARGUMENTS = {
    'data_path': (str, 'the data folder, $DATA_PATH in run.sh'),
    'current_fold': (whole(0), 'the fold that is tested, from 0'),
    'organ_number': (whole(1, 255), 'highest organ number in the labels'),
    'folds': (whole(1), 'how many folds the cases are divided into'),
    'low_range': (number(), 'lower end of the intensity window (HU)'),
    'high_range': (number(), 'upper end of the intensity window (HU)'),
    'slice_threshold': (number(0), 'share of the slices with the organ to train on; above 1: least number of pixels'),
    'slice_thickness': (one_of(1, 3), 'slices that the network sees at once, 1 or 3'),
    'organ_ID': (whole(1, 255), 'the organ, from 1 to organ_number'),
    'organ_IDs': (organs, 'the organs to merge, in one argument: "1 3"'),
    'plane': (one_of('X', 'Y', 'Z'), 'X, Y or Z'),
    'GPU_ID': (str, 'number of the CUDA device, or cpu'),
    'learning_rate1': (rate, 'learning rate of the coarse network'),
    'learning_rate_m1': (rate, 'times learning_rate1: the rate of the saliency and fine layers'),
    'learning_rate2': (str, 'learning rate of the coarse network with --joint_from; else not used'),
    'learning_rate_m2': (str, 'times learning_rate2, with --joint_from; else not used'),
    'crop_margin': (whole(0), "pixels around the organ's box that the fine network sees"),
    'crop_prob': (number(0, 1), 'probability of a random margin in training'),
    'crop_sample_batch': (whole(1), 'draws whose mean is a random margin'),
    'epoch_S': (whole(0), 'epochs in mode S (separate)'),
    'epoch_I': (whole(0), 'epochs in mode I (individual)'),
    'epoch_J': (whole(0), 'epochs in mode J (joint)'),
    'lr_decay_epoch': (whole(1), 'epochs in mode J after which the rates halve'),
    'epoch_step': (whole(1), 'lr_decay_epoch of the training'),
    'threshold': (
        number(0, 1),
        'probability from which a voxel is organ in the masks of single planes; F1 to F3P do not depend on it',
    ),
    'coarse_threshold': (number(0, 1), "part of the result folder's name"),
    'fine_threshold': (number(0, 1), 'probability from which a voxel is organ'),
    'max_rounds': (whole(0), 'fine rounds after the coarse round 0'),
    'epochs': (whole(1), 'epochs of pretraining'),
    'timestamp': (stamp, 'time of the training (15 characters, 20261123_000000); _ for none'),
    'timestamp1': (stamp, 'timestamp of the snapshot to test; _ for none'),
    'timestamp2': (str, 'not used'),
} | {
    f'timestamp{i}_{plane}': (stamp, f'timestamp of the {plane} snapshot; _ for none' if i == 1 else 'not used')
    for i in (1, 2)
    for plane in 'XYZ'
}
SETTINGS = 'learning_rate1 learning_rate_m1 learning_rate2 learning_rate_m2 crop_margin'
WINDOW = 'low_range high_range slice_threshold slice_thickness organ_ID'
TRAINING = (
    f'data_path current_fold organ_number {WINDOW} plane GPU_ID {SETTINGS} crop_prob crop_sample_batch '
    'epoch_S epoch_I epoch_J lr_decay_epoch timestamp'
).split()
TESTING = [*TRAINING[:-2], 'epoch_step', 'timestamp1']
TESTING_OPTIONAL = ['timestamp2']
_THREE_PLANES = (
    f'data_path current_fold organ_number {WINDOW} GPU_ID {SETTINGS} epoch_S epoch_I epoch_J epoch_step'
).split()
_THREE_TIMES = [f'timestamp1_{plane}' for plane in 'XYZ']
FUSION = [*_THREE_PLANES, 'threshold', *_THREE_TIMES]
COARSE2FINE = [*_THREE_PLANES, 'coarse_threshold', 'fine_threshold', 'max_rounds', *_THREE_TIMES]
MERGING = ['organ_IDs' if name == 'organ_ID' else name for name in COARSE2FINE]
RECIPES = ('published', 'fast')
FUSION_OPTIONAL = [f'timestamp2_{plane}' for plane in 'XYZ']


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a script's docstring as its help; an error is one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        dashed = next((word for word in sys.argv[1:] if word.startswith('-') and os.path.lexists(word)), None)
        cure = f'; write a name that begins with - as ./{dashed}' if dashed else ''
        super().error(' '.join(f'{message}{cure}'.split()))


def stage_parser(doc, required, optional=()):
    """Return a Parser of these positionals; further ones are accepted and not used."""
    parser = Parser(doc)
    for name in [*required, *optional]:
        kind, text = ARGUMENTS[name]
        parser.add_argument(name, type=kind, help=text, nargs='?' if name in optional else None)
    parser.add_argument('unused', nargs='*', default=[], help=argparse.SUPPRESS)
    if 'learning_rate1' in required:
        parser.add_argument('--recipe', type=one_of(*RECIPES), default=RECIPES[0],
                            help='published (default) or fast (docs/recipes.md)')  # fmt: skip
    parser._negative_number_matcher = re.compile(r'-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$', re.I)  # -1e2 is a number
    return parser


PRECISIONS = ('fp32', 'tf32', 'bf16', 'fp16', 'auto')


def add_precision(parser, without=()):
    """Add --precision, for a stage that runs a network; without: those that it does not take."""
    names = [name for name in PRECISIONS if name not in without]
    parser.add_argument('--precision', type=one_of(*names), default='fp32',
                        help=f'{", ".join(names)} (default fp32): which are faster where, see docs/speed.md')  # fmt: skip


def add_overwrite(parser, what='results of other settings'):
    """Add --overwrite, for a stage that stores volumes or lists."""
    parser.add_argument('--overwrite', action='store_true', help=f'replace {what}')


def add_nifti(parser):
    """Add --nifti, for a stage that predicts masks."""
    parser.add_argument('--nifti', action='store_true', help='write the final predictions as .nii.gz, too')


def add_testing(parser):
    """Add the options of the stages that test networks."""
    add_precision(parser)
    parser.add_argument('--average', type=whole(1), default=1, metavar='N',
                        help='test the mean of the last N snapshots of a plane, see --snapshot_steps of training.py')  # fmt: skip
    add_nifti(parser)
    add_overwrite(parser)


def add_training(parser):
    """Add the options that training and pretraining share."""
    add_precision(parser, without=['fp16'])  # its gradients vanish
    parser.add_argument('--seed', type=whole(0, 2**63 - 1), help='make the run repeatable on this machine')
    parser.add_argument('--workers', type=whole(0), default=0, help='processes that load slices (default 0)')
    parser.add_argument('--resume', action='store_true', help='continue from the checkpoint of these arguments, if any')
    parser.add_argument('--checkpoint_minutes', type=whole(0), default=10, metavar='M',
                        help='save a checkpoint every M minutes, and after every epoch (default 10)')  # fmt: skip


def parse(parser, argv=None):
    """Parse the arguments and check them against each other; a mistake prints the usage and exits with 2."""
    args = parser.parse_args(argv)
    highest = max(getattr(args, 'organ_IDs', [getattr(args, 'organ_ID', 0)]))
    if highest > getattr(args, 'organ_number', 255):
        parser.error(f'argument organ_ID: {highest} is above organ_number, {args.organ_number}')
    low, high = (getattr(args, name, None) for name in ('low_range', 'high_range'))
    if None not in (low, high) and low >= high:
        parser.error(f'argument high_range: {args.high_range:g} is not above low_range, {args.low_range:g}')
    return args
