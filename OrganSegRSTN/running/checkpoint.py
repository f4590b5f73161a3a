"""A training that can end anywhere and continue to the same bits: its position, log and random states in a checkpoint."""

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from running import processes
from running.data_folder import fold_list, read_list, slice_list
from running.files import atomic_write, errors_naming
from running.results import Checksums
from running.script import uninterrupted
from running.weights import check_archive

# arguments that may differ from those of the checkpoint, or that its path holds
FREE = {
    'recipe', 'data_path', 'GPU_ID', 'workers', 'resume', 'checkpoint_minutes', 'further', 'learning_rate2', 'learning_rate_m2', 'unused',
}  # fmt: skip
KEYS = {'settings', 'facts', 'finished', 'log_bytes', 'epoch', 'order', 'position', 'losses', 'random', 'parts'}


class Losses:
    """Running mean of the losses of an epoch, and the time since its start (s)."""

    def __init__(self):
        self.start, self.total, self.count = time.time(), 0.0, 0

    def add(self, losses):
        self.total = self.total + np.array(losses)
        self.count += 1

    @property
    def mean(self):
        return self.total / self.count

    @property
    def elapsed(self):
        return time.time() - self.start

    def state_dict(self):
        return {'total': np.atleast_1d(self.total).tolist(), 'count': self.count, 'elapsed': self.elapsed}

    def load_state_dict(self, state):
        self.total, self.count = np.array(state['total']), state['count']
        self.start = time.time() - state['elapsed']


class Run:
    """The loops of a training, its log, and the checkpoint at `path` from which it continues.

    settings: further values that a checkpoint must agree with.
    """

    def __init__(self, path, args, **settings):
        self.path, self.minutes, self.workers = path, args.checkpoint_minutes, args.workers
        free = FREE if getattr(args, 'joint_from', None) is None else FREE - {'learning_rate2', 'learning_rate_m2'}
        kept = {name: value for name, value in vars(args).items() if name not in free}
        self.settings = kept | {'processes': processes.world_size()} | settings
        self.parts, self.facts, self.log = {}, {}, None  # facts: for the snapshots, see running.weights.describe
        self.saved = time.monotonic()
        self.epoch = 0  # finished epochs, of all modes
        self.signalled = lambda: None
        self._begin_epoch()

    def _begin_epoch(self):
        self.order, self.position, self.losses = None, 0, Losses()

    def begin_again(self):
        """Return to the first epoch."""
        self.epoch = 0
        self._begin_epoch()

    @contextlib.contextmanager
    def logged(self, path, state):
        """Copy all output of the block to the file at `path`, after what the log held at the checkpoint `state`.

        Without a state, what a former training has logged stays until drop_former_log is called.
        """
        if processes.rank():
            yield
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with errors_naming(path):
            self.log = open(path, 'ab', buffering=0)  # noqa: SIM115
            if state:
                self.log.truncate(min(state['log_bytes'], path.stat().st_size))
            self.former_log = 0 if state else path.stat().st_size
        output = _Both(sys.stdout, self.log, path)
        with self.log, contextlib.redirect_stdout(output):
            try:
                yield
            except BaseException as error:
                output.log(f'ended by {type(error).__name__} {error}'.strip() + '\n')
                raise

    def drop_former_log(self):
        """Cut off what the log held before this block."""
        if self.log and self.former_log:
            with errors_naming(self.log.name):
                text = Path(self.log.name).read_bytes()[self.former_log :]
                self.log.truncate(0)
                self.log.write(text)

    # --- loops ---

    def epochs(self, schedule):
        """Yield the remaining entries of `schedule`, one for each epoch; save a checkpoint after each but the last.

        The first Ctrl-C or SIGTERM takes effect after the running step, when a checkpoint is saved.
        """
        with uninterrupted() as self.signalled:
            while self.epoch < len(schedule):
                yield schedule[self.epoch]
                self.epoch += 1
                self._begin_epoch()
                if self.epoch < len(schedule):
                    self._pause(save=True)

    def steps(self, dataset):
        """Yield (index, sample) for the remaining samples of an epoch, which has an order of its own."""
        if self.order is None:
            self.order = processes.gather(torch.randperm(len(dataset)))[0]
        for sample in self._loader(dataset):
            yield self.position, sample
            self.position += 1
            self._pause()

    def _loader(self, dataset):
        """Return batches of one: this rank's of every world_size samples; an incomplete last group is dropped."""
        world = processes.world_size()
        mine = self.order[: len(self.order) // world * world][processes.rank() :: world][self.position :]
        own = torch.Generator()  # leaves the global random numbers alone
        pinned = torch.cuda.is_initialized()  # the host need not wait for the copy
        return DataLoader(dataset, sampler=mine.tolist(), generator=own, num_workers=self.workers, pin_memory=pinned,
                          worker_init_fn=_apart)  # fmt: skip

    def _pause(self, save=False):
        """Save between two steps: when it is time, or when a signal waits in any rank, which then ends all ranks."""
        due = save or time.monotonic() - self.saved >= 60 * self.minutes
        signals, dues = zip(*processes.gather((self.signalled(), due)))
        stop = next(filter(None, signals), None)
        if stop or any(dues):
            self.save()
        if stop:
            print(f'checkpoint saved: {self.path}', flush=True)
            raise stop

    # --- the checkpoint ---

    def load(self):
        """Return the checkpoint; None where there is none. Raise ValueError if it is damaged or of other settings."""
        try:
            check_archive(self.path)
            state = torch.load(self.path, map_location='cpu', weights_only=True, mmap=True)
            if missing := KEYS - set(state):
                raise ValueError(f'{", ".join(sorted(missing))} missing')
            former = dict(json.loads(state['settings']))
        except FileNotFoundError:
            return None
        except Exception as error:  # a truncated file fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f'{self.path}: not a readable checkpoint ({reason}); remove it to start again') from None
        differing = [
            f'{name} was {former.get(name)}, is {value}'
            for name, value in json.loads(json.dumps(self.settings)).items()
            if former.get(name) != value
        ]
        if differing:
            raise ValueError(
                f'{self.path}: made with other arguments ({"; ".join(differing)}); give those, or another timestamp, '
                'or remove it to start again'
            )
        return state

    def restore(self, state, **parts):
        """Keep these parts, {name: model, optimizer, ...}, in the checkpoints; continue from `state` unless it is None."""
        self.parts = parts
        if len({str(place) for place in processes.gather(state and (state['epoch'], state['position']))}) > 1:
            raise ValueError(f'{self.path}: not the same for every process; is the data folder shared?')
        if state is None:
            return
        print(f'resumed from: {self.path}', flush=True)
        for name, part in parts.items():
            saved = state['parts'].get(name, {})
            if saved.keys() != part.state_dict().keys():
                raise ValueError(
                    f'{self.path}: made by another version of this code ({name}); remove it to start again'
                )
            part.load_state_dict(saved)
        self.epoch, self.order, self.position = state['epoch'], state['order'], state['position']
        self.losses.load_state_dict(state['losses'])
        set_random_states(state['random'][processes.rank()])

    def save(self, finished=False):
        """Write the checkpoint (rank 0), with the random states of every rank. finished: without the weights."""
        randoms = processes.gather(random_states())
        if processes.rank() == 0:
            state = {
                'settings': json.dumps(self.settings),
                'facts': self.facts,
                'finished': finished,
                'log_bytes': os.fstat(self.log.fileno()).st_size if self.log else 0,
                'epoch': self.epoch,
                'order': self.order,
                'position': self.position,
                'losses': self.losses.state_dict(),
                'random': randoms,
                'parts': {} if finished else {name: part.state_dict() for name, part in self.parts.items()},
            }
            with atomic_write(self.path) as file:
                torch.save(state, file)
        self.saved = time.monotonic()


def _apart(_worker):
    """Keep the signals of this process's group from a process that loads slices: the training answers them."""
    os.setpgrp()


class _Both:
    """The standard output, whose text goes to the log at `path` as well."""

    def __init__(self, output, file, path):
        self.output, self.file, self.path = output, file, path

    def write(self, text):
        self.output.write(text)
        self.log(text)

    def log(self, text):
        with errors_naming(self.path):
            self.file.write(text.encode(errors='backslashreplace'))

    def flush(self):
        self.output.flush()


def seed_everything(seed):
    """Seed every source of random numbers that training uses, each rank with its own seed; None seeds nothing."""
    if seed is not None:
        seed += processes.rank()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def random_states():
    """Return the state of every source of random numbers that training uses."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states):
    """Restore these states; that of the CUDA device only where there was and is one."""
    name, keys, *rest = states['numpy']
    random.setstate(states['python'])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    if torch.cuda.is_initialized() and states['cuda'] is not None:
        torch.cuda.set_rng_state(states['cuda'])


def list_checksums(args, planes):
    """Return {list: checksum} of the data that a checkpoint must agree with: slices of these planes, and the fold."""
    files = [slice_list(args.data_path, plane) for plane in planes]
    files.append(fold_list(args.data_path, 'training', args.current_fold))
    checksum = Checksums(args.data_path)
    return {file.name: (checksum(file) or read_list(file))[:12] for file in files}  # read_list names a missing file
