"""A training that may end anywhere and goes on as if it had not: its place, log and random states, in a checkpoint."""

import contextlib
import random
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader

from running import processes
from running.arguments import whole
from running.data_folder import fold_list, read_list, slice_list
from running.files import atomic_write, errors_naming
from running.results import checksum
from running.script import uninterrupted
from running.weights import check_archive

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


KEYS = {'settings', 'finished', 'lines', 'epoch', 'order', 'position', 'losses', 'random', 'parts'}  # of a checkpoint


def add_options(made):
    """--resume and --checkpoint_minutes, for a stage that trains."""
    made.add_argument(
        '--resume', action='store_true', help='go on from the checkpoint of these arguments, if there is one'
    )
    made.add_argument('--checkpoint_minutes', type=whole(0), default=10, metavar='M',
                      help='save a checkpoint every M minutes as well as every epoch (default 10)')  # fmt: skip


@contextlib.contextmanager
def logged(path):
    """All that the block prints goes to the file at `path` as well; so does what ends it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        errors_naming(path),
        open(path, 'w', encoding='utf-8') as log,
        contextlib.redirect_stdout(_Both(sys.stdout, log)),
    ):
        try:
            yield
        except BaseException as error:
            log.write(f'ended by {type(error).__name__} {error}'.strip() + '\n')
            raise


class _Both:
    """Stands where sys.stdout does, and writes to two files."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)

    def flush(self):
        for file in self.files:
            file.flush()


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

    settings: what a checkpoint must agree on, to go on from it.
    """

    def __init__(self, path, args, **settings):
        self.path, self.minutes, self.workers = path, args.checkpoint_minutes, args.workers
        free = {name: value for name, value in vars(args).items() if name not in FREE}
        self.settings = free | {'processes': processes.world_size()} | settings
        self.parts, self.lines = {}, []
        self.saved = time.monotonic()
        self.epoch = 0  # epochs that are done, of all modes
        self.signalled = lambda: None
        self._begin_epoch()

    def _begin_epoch(self):
        self.order, self.position, self.losses = None, 0, Losses()

    def log(self, line):
        """Print a line of the training's log, and keep it for the log of a resumed run."""
        print(line, flush=True)
        self.lines.append(line)

    # --- the loops ---

    def epochs(self, schedule):
        """What is left of `schedule`, an entry an epoch; after each but the last a checkpoint is saved.

        Ctrl-C and SIGTERM wait for the end of a step, and until a checkpoint is saved; a second one does not.
        """
        with uninterrupted() as self.signalled:
            while self.epoch < len(schedule):
                yield schedule[self.epoch]
                self.epoch += 1
                self._begin_epoch()
                if self.epoch < len(schedule):
                    self._pause(save=True)

    def steps(self, dataset):
        """(index, sample) of what is left of an epoch, in an order shuffled anew for each."""
        if self.order is None:
            self.order = processes.gather(torch.randperm(len(dataset)))[0]
        for sample in self._loader(dataset):
            yield self.position, sample
            self.position += 1
            self._pause()

    def _loader(self, dataset):
        """Batches of one: of every world_size samples this rank's own; an incomplete last group is left out."""
        world = processes.world_size()
        mine = self.order[: len(self.order) // world * world][processes.rank() :: world][self.position :]
        own = torch.Generator()  # leaves the global random numbers alone
        return DataLoader(dataset, sampler=mine.tolist(), generator=own, num_workers=self.workers)

    def _pause(self, save=False):
        """Between two steps: save where it is time, or where any rank has a signal waiting, which then ends all."""
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
        """What the checkpoint holds; None where there is none. ValueError: it is broken, or of other arguments."""
        try:
            check_archive(self.path)
            state = torch.load(self.path, map_location='cpu', weights_only=True, mmap=True)
            if missing := KEYS - set(state):
                raise ValueError(f'{", ".join(sorted(missing))} missing')
        except FileNotFoundError:
            return None
        except Exception as error:  # a truncated file fails in any of a dozen ways
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f'{self.path}: not a readable checkpoint ({reason}); remove it to start anew') from None
        former = state['settings']
        differing = [
            f'{name} was {former.get(name)}, is {self.settings.get(name)}'
            for name in sorted({*former, *self.settings})
            if former.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f'{self.path}: made with other arguments ({"; ".join(differing)}); give those, or another timestamp, '
                'or remove it to start anew'
            )
        return state

    def restore(self, state, **parts):
        """Keep these parts, {name: model, optimizer, ...}, in the checkpoints; with a `state` go on from it.

        Its log is printed again, so that this run's output is the whole log.
        """
        self.parts = parts
        if len({str(place) for place in processes.gather(state and (state['epoch'], state['position']))}) > 1:
            raise ValueError(f'{self.path}: not the same for every process; is the data folder shared?')
        if state is None:
            return
        print(f'resumed from: {self.path}')
        for line in state['lines']:
            self.log(line)
        for name, part in parts.items():
            part.load_state_dict(state['parts'][name])
        self.epoch, self.order, self.position = state['epoch'], state['order'], state['position']
        self.losses.load_state_dict(state['losses'])
        set_random_states(state['random'][processes.rank()])

    def save(self, finished=False):
        """Write the checkpoint; rank 0 does, with the random states of every rank. Finished: without the weights."""
        randoms = processes.gather(random_states())
        if processes.rank() == 0:
            state = {
                'settings': self.settings,
                'finished': finished,
                'lines': self.lines,
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


def list_checksums(args, planes):
    """{list: checksum}, what of the data a checkpoint must agree on: the slices of these planes, and the fold."""
    files = [slice_list(args.data_path, plane) for plane in planes]
    files.append(fold_list(args.data_path, 'training', args.current_fold))
    return {file.name: (checksum(file) or read_list(file))[:12] for file in files}  # read_list says what is missing


def seed_everything(seed):
    """Seed every source of random numbers that training uses, each rank's its own; None leaves them as they are."""
    if seed is not None:
        seed += processes.rank()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
