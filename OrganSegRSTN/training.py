"""Training (sections 3.2 and 3.3): coarse and fine networks together, in mode S, then I, then J, along one plane.

Reads the slices and lists of init.py and an FCN-8s to start from in models/pretrained/. Writes after
each mode the snapshot models/snapshots/SIJ_training_*/FD0:ZJ3_1_TIMESTAMP.pkl, and its output also to
logs/FD0:Z3_1_TIMESTAMP.txt.
"""

import contextlib
import glob
import math
import random
from argparse import Namespace
from pathlib import Path

from running import arguments, processes, script  # before packages: it names a missing one

# isort: split
import torch

from Data import load_slices, refuse_seen_cases, training_facts, varied
from model import (
    RSTN,
    ClippedAdam,
    DiceEntropyLoss,
    DSC_loss,
    FCN8s,
    get_parameters,
    set_precision,
    set_rates,
    without_scores,
)
from running.checkpoint import Run, list_checksums, seed_everything
from running.data_folder import GOOD_LOSS, MODES, find_pretrained, snapshot_folder, snapshot_name, step_snapshots
from running.files import atomic_write, locked
from running.results import start
from running.weights import check_facts, check_shapes, describe, description, load_weights, missing_weights


def main(wrap=lambda model, mode: model):
    """Train; wrap(model, mode) returns the model that takes the steps of a mode (see training_parallel.py)."""
    args = parse()
    processes.quiet()
    args.precision = processes.pick_precision(args.precision, processes.pick_device(args.GPU_ID))
    run = Run(checkpoint_path(args), args, **list_checksums(args, args.plane))
    with lock(args):
        state = run.load() if args.resume else None
        if state and state['finished']:
            if snapshot_path(args, 'J').exists():
                print(f'finished before: {run.path}')
                return
            state = None
        if state is None and not starting_path(args).exists():
            raise missing_weights(starting_path(args))
        keep_other_log(args)
        with run.logged(log_path(args), state):
            device, _ = start(args)
            with processes.process_group(device, hours=0.5):
                train(args, run, state, device, wrap)


def parse():
    parser = arguments.stage_parser(__doc__, arguments.TRAINING)
    parser.add_argument(
        '--pretrained', metavar='FILE', help='FCN-8s, or RSTN snapshot, to start from (default: by models/pretrained/)'
    )
    parser.add_argument('--fine_iterations', type=arguments.whole(1), default=1, metavar='T',
                        help="fine steps of a sample in I and J, the paper's T (default 1)")  # fmt: skip
    parser.add_argument('--joint_from', type=arguments.stamp, metavar='TIMESTAMP',
                        help='train mode J only, at learning_rate2 x learning_rate_m2, from the snapshot of mode I '
                        'with this timestamp (_ for none)')  # fmt: skip
    parser.add_argument('--snapshot_steps', type=arguments.whole(1), metavar='N',
                        help='in mode J, save a snapshot every N steps, too')  # fmt: skip
    arguments.add_training(parser)
    args = arguments.parse(parser)
    for name in ('learning_rate2', 'learning_rate_m2') if args.joint_from is not None else ():
        try:
            arguments.rate(getattr(args, name))
        except (ValueError, arguments.argparse.ArgumentTypeError):
            parser.error(f'argument {name}: {getattr(args, name)!r} is not a positive number')
    return args


def train(args, run, state, device, wrap):
    """Train in modes S, I and J in turn, from the checkpoint `state`, or (None) from the start."""
    seed_everything(args.seed)
    slices = load_slices(args, args.plane)
    if len(slices) < processes.world_size():
        raise ValueError(f'{len(slices)} slices to train on are too few for {processes.world_size()} processes')
    if state:
        model = new_model(args, width=len(state['parts']['model']['coarse_model.conv1_1.weight']))
        run.facts = state['facts']
    else:
        print(f'{args.current_fold}{args.plane} {len(slices) // processes.world_size()}', flush=True)
        model, run.facts = starting_model(args)
        remove_former(args, run)
        save_untrained(args, run, '', model)
    model = model.to(device).train()
    set_precision(model, args.precision)
    recipe = {'published': Published, 'fast': Fast}[args.recipe](args, slices, device)
    rates = 'learning_rate1 learning_rate_m1' if args.joint_from is None else 'learning_rate2 learning_rate_m2'
    optimizer = recipe.make_optimizer(model, *(getattr(args, rate) for rate in rates.split()))
    run.restore(state, model=model, optimizer=optimizer)
    mode, ended, wrapped = MODES[0], False, {}
    try:
        for mode, epoch in run.epochs(schedule(args)):
            if mode not in wrapped:
                wrapped = {mode: wrap(model, mode)}
            ended = False
            train_epoch(args, run, mode, epoch, wrapped[mode], optimizer, slices, recipe)
            end_epoch(args, run, mode, epoch, model, optimizer, recipe)
            ended = epoch + 1 == epochs(args, mode)
    except script.Terminated:
        raise
    except KeyboardInterrupt:
        save_snapshot(args, run, mode, model, interrupted=not ended)
        print(f'{args.current_fold}{args.plane}{mode} interrupted: saved as it was, {snapshot_path(args, mode)}')
        raise
    run.save(finished=True)


def schedule(args):
    """Return [(mode, epoch)] of all epochs."""
    return [(mode, epoch) for mode in modes(args) for epoch in range(epochs(args, mode))]


def modes(args):
    """Return the modes to train."""
    return MODES if args.joint_from is None else 'J'


def epochs(args, mode):
    """Return the number of epochs of a mode."""
    return getattr(args, f'epoch_{mode}')


# --- files ---------------------------------------------------------------------------------------------------------


def snapshot_path(args, mode, step=None):
    """Return the path of a mode's snapshot, or of that after a step."""
    return snapshot_folder(args) / snapshot_name(args, args.plane, mode, args.timestamp, step)


def checkpoint_path(args):
    """Return the path of the checkpoint: a snapshot's, without a mode."""
    return snapshot_path(args, '').with_suffix('.ckpt')


def log_path(args):
    """Return the path of the log."""
    name = snapshot_name(args, args.plane, '', args.timestamp)
    return Path(args.data_path, 'logs', name).with_suffix('.txt')


def keep_other_log(args):
    """Rename the log that a training of other settings has left under the same name, as its snapshots have their own folder."""
    path, log = checkpoint_path(args), log_path(args)
    others = path.parent.parent.glob(f'*/{glob.escape(path.name)}')
    if processes.rank() == 0 and not path.exists() and log.exists() and (other := next(others, None)):
        kept = log.with_name(f'{log.stem}_{other.parent.name}.txt')
        log.replace(kept)
        print(f'{log} is of other settings: kept as {kept.name}')


def lock(args):
    """Lock this training's snapshot names (rank 0 only)."""
    path = checkpoint_path(args)
    if processes.rank():
        return contextlib.nullcontext()
    snapshots = snapshot_path(args, '*').stem
    return locked(path.with_name(f'.{path.stem}.lock'), f'.{snapshots}.*.part', f'.{snapshots}_step*.part')


def remove_former(args, run):
    """Remove checkpoint, log and step snapshots of the training that this one replaces (rank 0 only)."""
    if processes.rank() == 0:
        run.path.unlink(missing_ok=True)
        run.drop_former_log()
        for path in step_snapshots(args, snapshot_path(args, 'J').name):
            path.unlink()


def save_snapshot(args, run, mode, model, step=None, **facts):
    """Save the state dict after a mode, or after a step of it (rank 0 only), with the facts of the run and these."""
    if processes.rank() == 0:
        with atomic_write(snapshot_path(args, mode, step)) as file:
            torch.save(describe(model.state_dict(), **run.facts, **facts), file)


def save_step(args, run, mode, step, last):
    """Save a snapshot where --snapshot_steps asks for one after this step of mode J, but not after the last one."""
    if mode == 'J' and args.snapshot_steps and step % args.snapshot_steps == 0 and step != last:
        save_snapshot(args, run, mode, run.parts['model'], step)


def save_untrained(args, run, mode, model):
    """Save the snapshots of the modes of 0 epochs that directly follow `mode` ('': the first ones)."""
    trained = modes(args)
    for following in trained[trained.index(mode) + len(mode) :]:
        if epochs(args, following):
            break
        save_snapshot(args, run, following, model)
        print(f'{args.current_fold}{args.plane}{following} has 0 epochs: saved as it is', flush=True)


# --- the start -----------------------------------------------------------------------------------------------------


def new_model(args, width):
    """Return an RSTN of these arguments."""
    return RSTN(args.crop_margin, args.crop_prob, args.crop_sample_batch, args.slice_thickness, None, width,
                args.fine_iterations)  # fmt: skip


def starting_path(args):
    """Return the weights to start from: an FCN-8s, or an RSTN snapshot."""
    if args.joint_from is None:
        return find_pretrained(args)
    return snapshot_folder(args) / snapshot_name(args, args.plane, 'I', args.joint_from)


def starting_model(args):
    """Return (RSTN to train, facts for its snapshots): filled from a snapshot, or both networks from an FCN-8s."""
    path = starting_path(args)
    weights = load_weights(path)
    origin = description(weights)
    refuse_seen_cases(args, path, origin)
    if args.joint_from is not None:
        check_facts(path, origin, {'intensity_window': [args.low_range, args.high_range]})
    model = from_RSTN(args, path, weights) if 'saliency1.weight' in weights else from_FCN8s(args, path, weights, origin)
    print(f'{args.current_fold}{args.plane}{modes(args)[0]} load pre-trained FCN8s model successfully!', flush=True)
    return model, training_facts(args, origin, plane=args.plane, recipe=args.recipe)


def from_RSTN(args, path, weights):
    """Return an RSTN with the layers of a snapshot that fit; print the others, which start anew."""
    if 'coarse_model.conv1_1.weight' not in weights:
        raise ValueError(f'{path}: not an RSTN snapshot: coarse_model.conv1_1.weight is missing')
    model = new_model(args, width=len(weights['coarse_model.conv1_1.weight']))
    expected = model.state_dict()
    fitting = {key: value for key, value in weights.items() if key in expected and value.shape == expected[key].shape}
    model.load_state_dict(fitting, strict=False)
    others = sorted({key.rpartition('.')[0] for key in expected.keys() ^ fitting.keys()})
    print(f'{path}: starts the whole RSTN; does not fit and starts anew: {", ".join(others) or "nothing"}')
    return model


def from_FCN8s(args, path, weights, origin):
    """Return an RSTN with both networks filled from a pretrained FCN-8s: all layers but score and upscore.

    The score layers are taken, too, where pretrain.py trained them for this organ and thickness.
    """
    with_scores = (
        origin.get('organ_ID') == args.organ_ID and len(weights.get('score_fr.bias', ())) == args.slice_thickness
    )
    kept = dict if with_scores else without_scores
    weights = kept(weights)
    if 'conv1_1.weight' not in weights:
        raise ValueError(f'{path}: not an FCN-8s: conv1_1.weight is missing')
    width = len(weights['conv1_1.weight'])
    with torch.device('meta'):  # no memory for what may be wrong
        expected = FCN8s(args.slice_thickness, width).state_dict()
    check_shapes(path, weights, kept(expected))
    model = new_model(args, width)
    for network in (model.coarse_model, model.fine_model):
        missing, unknown = network.load_state_dict(weights, strict=False)
        if unknown or any('score' not in key for key in missing):
            raise ValueError(f'{path}: not an FCN-8s: {", ".join(unknown + missing)} unknown or missing')
    if args.recipe == 'fast':
        model.saliency2.bias.data.fill_(1)  # the slices as pretraining knows them
    print(f'{path}: starts both networks, width {width}, score layers {"included" if with_scores else "from zero"}')
    return model


# --- steps ---------------------------------------------------------------------------------------------------------


def make_optimizer(model, learning_rate1, learning_rate_m1):
    """Return the SGD of section 4.1: biases at twice the rate without decay, saliency and fine layers at m1 times the rate."""
    rate, times = float(learning_rate1), float(learning_rate_m1)
    groups = [
        {
            'params': list(get_parameters(model, coarse, bias)),
            'lr': rate * (1 if coarse else times) * (2 if bias else 1),
            'weight_decay': 0 if bias else 0.0005,
        }
        for coarse in (True, False)
        for bias in (False, True)
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.99, fused=True)
    for group in groups:  # fused steps need every momentum; the saliency has no gradient before mode I
        for parameter in group['params']:
            optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def train_epoch(args, run, mode, epoch, model, optimizer, slices, recipe):
    """Train the remaining steps of an epoch; print a line a step."""
    name = f'{args.current_fold}{args.plane}{mode} Epoch[{epoch + 1}/{epochs(args, mode)}]'
    for index, (image, label) in run.steps(slices):
        step = recipe.step(run, model, optimizer, mode, image, label)
        coarse, fine, avg = processes.mean(step)
        run.losses.add((coarse, fine, avg))
        if not math.isfinite(avg):
            raise ValueError(f'{name}, Iter[{index:05d}]: the loss is {avg}; start again with a lower learning rate')
        steps = len(slices) // processes.world_size()
        save_step(args, run, mode, epoch * steps + index + 1, last=epochs(args, mode) * steps)
        print(f'{name}, Iter[{index:05d}], Coarse/Fine/Avg Loss {coarse:.4f}/{fine:.4f}/{avg:.4f}, '
                f'Time Elapsed {run.losses.elapsed:.2f}s', flush=True)  # fmt: skip


def end_epoch(args, run, mode, epoch, model, optimizer, recipe):
    """Print an epoch's mean losses, and after a mode's last epoch save its snapshot."""
    name = f'{args.current_fold}{args.plane}{mode}'
    coarse, fine, avg = run.losses.mean
    print(f'{name} Epoch[{epoch + 1}], Total Coarse/Fine/Avg Loss {coarse:.4f}/{fine:.4f}/{avg:.4f}, '
            f'Time elapsed {run.losses.elapsed:.2f}s', flush=True)  # fmt: skip
    recipe.end_epoch(mode, epoch, optimizer)
    if epoch + 1 == epochs(args, mode):
        save_snapshot(args, run, mode, model)
        if args.recipe == 'published':
            print(f'{name} {convergence(mode, avg)}')
        print(f'########## end of {name} training stage!', flush=True)
        save_untrained(args, run, mode, model)


def train_step(model, optimizer, mode, image, label, criterion=None):
    """Take one step on 1/3 coarse + 2/3 fine loss (equation 4); return the (coarse, fine, avg) losses before it.

    image: on the model's device; label: there or on the CPU, where the boxes of modes S and I are found without waiting.
    With T fine iterations the weights are 1 / (2T + 1) and 2 / (2T + 1) each, and `fine` is their mean.
    criterion: DSC_loss (None) or DiceEntropyLoss; its `of_logits` says what it takes.
    """
    criterion = criterion or DSC_loss()
    outputs = model(image, label, mode, logits=criterion.of_logits)
    label = label.to(image.device, non_blocking=True).float()
    coarse, *fines = (criterion(output, label) for output in outputs)
    fine = sum(fines) / len(fines)
    loss = (coarse + 2 * len(fines) * fine) / (2 * len(fines) + 1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return tuple(torch.stack([coarse, fine, loss]).tolist())  # a GPU is waited for once


def coarse_step(model, optimizer, image, label):
    """Take one step of the coarse network only."""
    model = getattr(model, 'module', model)  # a DistributedDataParallel would wait for the gradients of all networks
    optimizer.zero_grad()
    (logits,) = model(image, label, 'C', logits=True)
    DiceEntropyLoss()(logits, label).backward()
    processes.average_gradients(model.coarse_model)
    optimizer.step()


def convergence(mode, avg):
    """Return a line that compares the last epoch's mean Avg loss with what the published README asks for."""
    good = GOOD_LOSS[mode]
    verdict = 'reached' if avg <= good else 'NOT reached, see "Convergence" in docs/training.md'
    return f'mean Avg loss of the last epoch {avg:.4f}, asked for at most {good}: {verdict}'


# --- recipes -------------------------------------------------------------------------------------------------------


class Published:
    """Section 4.1: SGD on the soft Dice of the slices as they are; the rates halve in mode J."""

    make_optimizer = staticmethod(make_optimizer)

    def __init__(self, args, slices, device):
        self.args, self.slices, self.device = args, slices, device

    def step(self, run, model, optimizer, mode, image, label):
        """Train on a sample; return its (coarse, fine, avg) losses."""
        return train_step(model, optimizer, mode, self.slices.unit_on(self.device, image), label)

    def end_epoch(self, mode, epoch, optimizer):
        """Halve the rates when due."""
        if mode == 'J' and (epoch + 1) % self.args.lr_decay_epoch == 0:
            print('lr decay')
            for group in optimizer.param_groups:
                group['lr'] *= 0.5


class Fast(Published):
    """For a start that pretrain.py made: Adam on Dice and cross-entropy of varied slices; one cosine for all modes.

    In three of seven steps the coarse network learns from any slice as well: most slices are without the organ.
    In one of four steps of mode J the fine network sees the box of the label, as in mode I, so as not to forget it.
    """

    def __init__(self, args, slices, device):
        super().__init__(args, slices, device)
        self.steps_of_epoch = len(slices) // processes.world_size()
        self.steps = self.steps_of_epoch * len(schedule(args))
        self.whole = load_slices(Namespace(**vars(args) | {'slice_threshold': 0}), args.plane)

    def make_optimizer(self, model, learning_rate1, learning_rate_m1):
        """Return Adam with clipped gradients; saliency and fine layers have m1 times the rate."""
        highest = [float(learning_rate1), float(learning_rate1) * float(learning_rate_m1)]
        parameters = [
            [*get_parameters(model, coarse, False), *get_parameters(model, coarse, True)] for coarse in (True, False)
        ]
        return ClippedAdam([{'params': p, 'highest': rate} for p, rate in zip(parameters, highest)], fused=True)

    def step(self, run, model, optimizer, mode, image, label):
        set_rates(optimizer, (run.epoch * self.steps_of_epoch + run.position) / self.steps)
        if run.position % 7 in (1, 3, 5):
            coarse_step(model, optimizer, *self.varied_batch(*self.whole[random.randrange(len(self.whole))]))
        if mode == 'J' and run.position % 4 == 0:
            mode = 'I'
        return train_step(model, optimizer, mode, *self.varied_batch(image[0], label[0]), DiceEntropyLoss())

    def varied_batch(self, image, label):
        """Return a batch of one stored sample, varied on the device."""
        return [tensor[None] for tensor in varied(*self.slices.on_device(self.device, image, label))]

    def end_epoch(self, mode, epoch, optimizer):
        pass


if __name__ == '__main__':
    script.run(main)
