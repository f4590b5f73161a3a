"""A training that may end anywhere and goes on as if it had not: its place, log and random states, in a checkpoint."""

import random
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

import parallel
from arguments import uninterrupted, whole
from utils import whole_file

# arguments that another machine, or the next start, may change
FREE = (
    'data_path',
    'GPU_ID',
    'workers',
    'resume',
    'checkpoint_minutes',
    'learning_rate2',
    'learning_rate_m2',
    'unused',
)


def add_options(made):
    """--resume and --checkpoint_minutes, for a stage that trains."""
    made.add_argument(
        '--resume', action='store_true', help='go on from the checkpoint of these arguments, if there is one'
    )
    made.add_argument('--checkpoint_minutes', type=whole(0), default=10, metavar='M',
                      help='save a checkpoint every M minutes as well as every epoch (default 10)')  # fmt: skip


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
    """What a training is doing, what it has said, and the checkpoint at `path` that holds both.

    settings: what a checkpoint must agree on, to go on from it; parts: {name: model, optimizer, ...}, whatever has
    state_dict and load_state_dict.
    """

    def __init__(self, path, args, **settings):
        self.path, self.minutes, self.workers = path, args.checkpoint_minutes, args.workers
        free = {name: value for name, value in vars(args).items() if name not in FREE}
        self.settings = free | {'processes': parallel.world_size()} | settings
        self.parts, self.lines, self.finished = {}, [], False
        self.saved = time.monotonic()
        self.epoch = 0  # epochs that are done, of all modes
        self._begin_epoch()

    def _begin_epoch(self):
        self.order, self.position, self.losses = None, 0, Losses()

    def log(self, line):
        """Print a line of the training's log, and keep it for the log of a resumed run."""
        print(line, flush=True)
        self.lines.append(line)

    # --- the loops ---

    def epochs(self, schedule):
        """What is left of `schedule`, an entry an epoch; after each but the last a checkpoint is saved."""
        while self.epoch < len(schedule):
            yield schedule[self.epoch]
            self.epoch += 1
            self._begin_epoch()
            if self.epoch < len(schedule):
                self.save()

    def steps(self, dataset):
        """(index, sample) of what is left of an epoch, in an order shuffled anew for each.

        Ctrl-C and SIGTERM wait for the end of a step, and until a checkpoint is saved.
        """
        if self.order is None:
            self.order = parallel.gather(torch.randperm(len(dataset)))[0]
        for sample in self._loader(dataset):
            with uninterrupted() as signalled:
                yield self.position, sample
                self.position += 1
                stops, dues = zip(*parallel.gather((signalled(), self._due())))
                if any(stops + dues):
                    self.save()
            if any(stops):  # on another rank
                raise KeyboardInterrupt

    def _loader(self, dataset):
        """Batches of one: of every world_size samples this rank's own; an incomplete last group is left out."""
        world = parallel.world_size()
        mine = self.order[: len(self.order) // world * world][parallel.rank() :: world][self.position :]
        own = torch.Generator()  # leaves the global random numbers alone
        return DataLoader(dataset, sampler=mine.tolist(), generator=own, num_workers=self.workers)

    def _due(self):
        return time.monotonic() - self.saved >= 60 * self.minutes

    # --- the checkpoint ---

    def load(self):
        """Read the checkpoint and print its log again; False where there is none. Its parts are handed out by restore."""
        try:
            state = torch.load(self.path, map_location='cpu', weights_only=True, mmap=True)
            former = state['settings']
        except FileNotFoundError:
            return False
        except Exception as error:  # a truncated file fails in any of a dozen ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f'{self.path}: not a readable checkpoint ({reason}); remove it to start anew') from None
        differing = [
            f'{name} was {former.get(name)}, is {self.settings.get(name)}'
            for name in sorted({*former, *self.settings})
            if former.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f'{self.path}: made with other arguments ({"; ".join(differing)}); give those, or another timestamp, '
                'or leave out --resume to start anew'
            )
        self.finished = state['finished']
        print(f'{"finished before" if self.finished else "resumed from"}: {self.path}')
        for line in state['lines']:
            self.log(line)
        self._state = state
        return True

    def restore(self, **parts):
        """Keep these parts in the checkpoints; after `load` they get what they held, and so do place and random states."""
        self.parts = parts
        state = self.__dict__.pop('_state', None)
        if state is None:
            return
        for name, part in parts.items():
            part.load_state_dict(state['parts'][name])
        self.epoch, self.order, self.position = state['epoch'], state['order'], state['position']
        self.losses.load_state_dict(state['losses'])
        set_random_states(state['random'][parallel.rank()])

    def part(self, name):
        """The state of a part in the loaded checkpoint."""
        return self._state['parts'][name]

    def save(self):
        """Write the checkpoint; rank 0 does, with the random states of every rank."""
        randoms = parallel.gather(random_states())
        if parallel.rank() == 0:
            state = {
                'settings': self.settings,
                'finished': self.finished,
                'lines': self.lines,
                'epoch': self.epoch,
                'order': self.order,
                'position': self.position,
                'losses': self.losses.state_dict(),
                'random': randoms,
                'parts': {name: part.state_dict() for name, part in self.parts.items()},
            }
            with whole_file(self.path) as file:
                torch.save(state, file)
        self.saved = time.monotonic()

    def finish(self):
        """Leave a checkpoint that says that all is done, without the weights, which the snapshots hold."""
        self.finished, self.parts = True, {}
        self.save()


def random_states():
    """The state of every source of random numbers that training uses."""
    name, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states):
    """Put them back; that of the CUDA device only where there was and is one."""
    name, keys, *rest = states['numpy']
    random.setstate(states['python'])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    if torch.cuda.is_available() and states['cuda'] is not None:
        torch.cuda.set_rng_state(states['cuda'])
