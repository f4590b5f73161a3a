"""Training (sections 3.2 and 3.3): coarse and fine networks together, in mode S, then I, then J, along one plane.

Reads the slices and lists of init.py and an FCN-8s to start from in models/pretrained/; writes after each mode the
snapshot models/snapshots/SIJ_training_*/FD0:ZJ3_1_TIMESTAMP.pkl, and its output to logs/FD0:Z3_1_TIMESTAMP.txt, too.
"""

import contextlib
import math
import os
from pathlib import Path

import torch

from Data import load_slices
from model import RSTN, DSC_loss, FCN8s, get_parameters, set_precision
from running import arguments, checkpoint, processes, script
from running.checkpoint import list_checksums, seed_everything
from running.data_folder import (
    GOOD_LOSS,
    MODES,
    find_pretrained,
    read_cases,
    snapshot_folder,
    snapshot_name,
)
from running.files import atomic_write, locked
from running.results import start
from running.weights import check_shapes, load_weights, trained_on


def main(wrap=lambda model, device: model):
    """Train; wrap(model, device): what the model becomes before the first step (see training_parallel.py)."""
    made = arguments.parser(__doc__, arguments.TRAINING)
    made.add_argument(
        '--pretrained', metavar='FILE', help='FCN-8s to start from (default: found in models/pretrained/)'
    )
    made.add_argument('--fine_iterations', type=arguments.whole(1), default=1, metavar='T',
                      help="fine steps a sample in I and J, the paper's T (default 1)")  # fmt: skip
    arguments.add_training(made)
    checkpoint.add_options(made)
    args = arguments.parse(made)
    processes.quiet()
    run = checkpoint.Run(checkpoint_path(args), args, **list_checksums(args, args.plane))
    with lock(args):
        state = run.load() if args.resume else None
        if state and state['finished']:
            if all(snapshot_path(args, mode).exists() for mode, _ in schedule(args)):
                print(f'finished before: {run.path}')
                return
            state = None
        with checkpoint.logged(log_path(args)):
            device, _ = start(args)
            with processes.process_group(device, hours=0.5):
                train(args, run, state, device, wrap)


def train(args, run, state, device, wrap):
    """Modes S, I and J in turn, from where the checkpoint's `state` stands, or (None) from the start."""
    seed_everything(args.seed)
    slices = load_slices(args, args.plane)
    if len(slices) < processes.world_size():
        raise ValueError(f'{len(slices)} slices to train on are too few for {processes.world_size()} processes')
    if state:
        model = new_model(args, width=len(state['parts']['model']['coarse_model.conv1_1.weight']))
    else:
        run.path.unlink(missing_ok=True)  # of a training that this one takes the place of
        run.log(f'{args.current_fold}{args.plane} {len(slices) // processes.world_size()}')
        model = starting_model(args, run)
    model = model.to(device).train()
    set_precision(model, args.precision)
    optimizer = make_optimizer(model, args.learning_rate1, args.learning_rate_m1)
    run.restore(state, model=model, optimizer=optimizer)
    wrapped = wrap(model, device)
    mode = MODES[0]
    try:
        for mode, epoch in run.epochs(schedule(args)):
            train_epoch(args, run, mode, epoch, wrapped, optimizer, slices, device)
            end_epoch(args, run, mode, epoch, model, optimizer)
    except script.Terminated:
        raise
    except KeyboardInterrupt:
        save_snapshot(args, mode, model)
        print(f'{args.current_fold}{args.plane}{mode} interrupted: saved as it was, {snapshot_path(args, mode)}')
        raise
    run.save(finished=True)


def schedule(args):
    """[(mode, epoch)] of all epochs."""
    return [(mode, epoch) for mode in MODES for epoch in range(epochs(args, mode))]


def epochs(args, mode):
    """How many epochs a mode is trained."""
    return getattr(args, f'epoch_{mode}')


def snapshot_path(args, mode):
    """Where the snapshot of a mode is saved."""
    return snapshot_folder(args) / snapshot_name(args, args.plane, mode, args.timestamp)


def checkpoint_path(args):
    """Where the checkpoint is saved: as a snapshot's name, without a mode."""
    return snapshot_path(args, '').with_suffix('.ckpt')


def log_path(args):
    """Where the log is kept; of several processes rank 0 has one."""
    name = snapshot_name(args, args.plane, '', args.timestamp)
    return Path(os.devnull) if processes.rank() else Path(args.data_path, 'logs', name).with_suffix('.txt')


def lock(args):
    """Hold the names of this training's snapshots; of several processes rank 0 does."""
    path = checkpoint_path(args)
    if processes.rank():
        return contextlib.nullcontext()
    return locked(path.with_name(f'.{path.stem}.lock'), f'.{snapshot_path(args, "*").stem}.*.part')


def new_model(args, width):
    """An RSTN of these arguments."""
    return RSTN(args.crop_margin, args.crop_prob, args.crop_sample_batch, args.slice_thickness, None, width,
                args.fine_iterations)  # fmt: skip


def starting_model(args, run):
    """The RSTN, both networks filled from a pretrained FCN-8s: all layers but the score and upscore layers.

    The score layers are taken over as well where pretrain.py trained them for this organ and thickness.
    """
    path = find_pretrained(args)
    weights = load_weights(path)
    told = trained_on(weights)
    refuse_seen_cases(args, path, told)
    with_scores = (
        told.get('organ_ID') == args.organ_ID and len(weights.get('score_fr.bias', ())) == args.slice_thickness
    )
    weights = {key: value for key, value in weights.items() if with_scores or 'score' not in key}
    if 'conv1_1.weight' not in weights:
        raise ValueError(f'{path}: not an FCN-8s: conv1_1.weight is missing')
    width = len(weights['conv1_1.weight'])
    with torch.device('meta'):  # no memory for what is wrong
        expected = FCN8s(args.slice_thickness, width).state_dict()
    check_shapes(path, weights, {key: value for key, value in expected.items() if with_scores or 'score' not in key})
    model = new_model(args, width)
    for network in (model.coarse_model, model.fine_model):
        missing, unknown = network.load_state_dict(weights, strict=False)
        if unknown or any('score' not in key for key in missing):
            raise ValueError(f'{path}: not an FCN-8s: {", ".join(unknown + missing)} unknown or missing')
    run.log(f'{path}: starts both networks, width {width}, score layers {"included" if with_scores else "from zero"}')
    run.log(f'{args.current_fold}{args.plane}{MODES[0]} load pre-trained FCN8s model successfully!')
    return model


def refuse_seen_cases(args, path, trained_on):
    """ValueError where the pretrained network has seen a test case of this fold."""
    tested = {case.image_file for case in read_cases(args.data_path, 'testing', args.current_fold)}
    seen = sorted(tested.intersection(trained_on.get('cases', ())))
    if seen:
        raise ValueError(
            f'{path}: was trained on {seen[0]}, a test case of fold {args.current_fold}: '
            'it belongs to another fold; run pretrain.py for this one'
        )


def make_optimizer(model, learning_rate1, learning_rate_m1):
    """SGD of section 4.1: biases at twice the rate without decay; saliency and fine layers at `learning_rate_m1` times."""
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
    for group in groups:  # fused steps need every momentum from the start; the saliency has no gradient before mode I
        for parameter in group['params']:
            optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def train_epoch(args, run, mode, epoch, model, optimizer, slices, device):
    """What is left of a pass over the active slices; logs a line a step."""
    name = f'{args.current_fold}{args.plane}{mode} Epoch[{epoch + 1}/{epochs(args, mode)}]'
    for index, (image, label) in run.steps(slices):
        step = train_step(model, optimizer, mode, image.to(device), label.to(device))
        coarse, fine, avg = processes.mean(step, device)
        run.losses.add((coarse, fine, avg))
        if not math.isfinite(avg):
            raise ValueError(f'{name}, Iter[{index:05d}]: the loss is {avg}; start again with a lower learning rate')
        run.log(f'{name}, Iter[{index:05d}], Coarse/Fine/Avg Loss {coarse:.4f}/{fine:.4f}/{avg:.4f}, '
                f'Time Elapsed {run.losses.elapsed:.2f}s')  # fmt: skip


def end_epoch(args, run, mode, epoch, model, optimizer):
    """Log an epoch's mean losses, halve the rates where it is time, and after a mode's last save its snapshot."""
    name = f'{args.current_fold}{args.plane}{mode}'
    coarse, fine, avg = run.losses.mean
    run.log(f'{name} Epoch[{epoch + 1}], Total Coarse/Fine/Avg Loss {coarse:.4f}/{fine:.4f}/{avg:.4f}, '
            f'Time elapsed {run.losses.elapsed:.2f}s')  # fmt: skip
    if mode == 'J' and (epoch + 1) % args.lr_decay_epoch == 0:
        run.log('lr decay')
        for group in optimizer.param_groups:
            group['lr'] *= 0.5
    if epoch + 1 == epochs(args, mode):
        save_snapshot(args, mode, model)
        run.log(f'{name} {convergence(mode, avg)}')
        run.log(f'########## end of {name} training stage!')


def train_step(model, optimizer, mode, image, label):
    """One SGD step on 1/3 coarse + 2/3 fine loss (equation 4); -> (coarse, fine, avg) losses before it.

    With T fine iterations the weights are 1 / (2T + 1) and 2 / (2T + 1) each, and `fine` is their mean.
    """
    criterion = DSC_loss()
    coarse, *fines = (criterion(probability, label) for probability in model(image, label, mode))
    fine = sum(fines) / len(fines)
    loss = (coarse + 2 * len(fines) * fine) / (2 * len(fines) + 1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return coarse.item(), fine.item(), loss.item()


def save_snapshot(args, mode, model):
    """Save the state dict; the file appears when it is complete. Of several processes rank 0 does."""
    if processes.rank() == 0:
        with atomic_write(snapshot_path(args, mode)) as file:
            torch.save(model.state_dict(), file)


def convergence(mode, avg):
    """A line that holds the last epoch's mean Avg loss against what the published README asks for."""
    good = GOOD_LOSS[mode]
    verdict = 'reached' if avg <= good else 'NOT reached, see "convergence" in README.md'
    return f'mean Avg loss of the last epoch {avg:.4f}, asked for at most {good}: {verdict}'


if __name__ == '__main__':
    script.run(main)
