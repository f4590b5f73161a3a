"""Read a data folder leniently: what is missing or broken becomes a notice of the report."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from running.data_folder import read_cases
from running.files import open_file
from scans.dataset import read_label_names
from scans.geometry import geometry_file, known, load_geometry

MOST_TEXT = 1 << 25  # bytes read of a log or results.txt; the longest training writes a third of it
LONGEST_LINE = 1000  # bytes; a longer line is read in pieces


class Source:
    """A data folder; `notices` collects a line for whatever cannot be read."""

    def __init__(self, data_path):
        self.path = Path(data_path)
        self.notices = []
        self.cases = functools.cache(self._cases)
        self.label_names = self.attempt(read_label_names, self.path / 'dataset.json') or {}

    def notice(self, text):
        """Print a line, and keep it for the report."""
        text = ' '.join(str(text).replace(f'{self.path}/', '').split())
        if text not in self.notices:
            self.notices.append(text)
            print(f'note: {text}', flush=True)

    def attempt(self, read, *args):
        """Return read(*args), or None and a notice if it fails."""
        try:
            return read(*args)
        except (OSError, ValueError) as error:
            self.notice(error)
            return None

    def _cases(self, fold):
        """Return {number: Case} of a fold's testing list, numbered from 1 as in results."""
        return dict(enumerate(self.attempt(read_cases, self.path, 'testing', fold) or [], 1))

    def case_name(self, fold, number):
        case = self.cases(fold).get(number)
        return Path(case.image_file).stem if case else f'case {number} of fold {fold}'

    def organ_title(self, organ):
        """Return `organ 1 (spleen)`, or `organ 1` if dataset.json does not name it."""
        return f'organ {organ} ({self.label_names[organ]})' if organ in self.label_names else f'organ {organ}'

    def label(self, fold, number, organ):
        """Return where the organ is, bool (W, H, L), or None."""
        case = self.cases(fold).get(number)
        return case and self.attempt(case.label, self.path, organ)

    def image(self, fold, number):
        """Return the scan (W, H, L) in HU, or None."""
        case = self.cases(fold).get(number)
        return case and self.attempt(case.image, self.path)

    def geometry(self, fold, number):
        """Return the Geometry of the stored arrays, or None if it is unknown."""
        found = self.attempt(load_geometry, geometry_file(self.path, self.case_name(fold, number)))
        return found if known(found) else None


def text_lines(path):
    """Yield the lines of a text file; ValueError if it is not a regular file, or is too large."""
    size = 0
    try:
        with open_file(path) as file:
            while line := file.readline(LONGEST_LINE):
                size += len(line)
                if size > MOST_TEXT:
                    raise ValueError(f'more than {MOST_TEXT >> 20} MB, too large for a log or a results.txt')
                yield line.decode(errors='replace')
    except ValueError as error:
        raise ValueError(f'{path}: left out, {error}') from None


# --- training logs -------------------------------------------------------------------------------------------------

LOSS = re.compile(
    r'\d+[XYZ](?P<mode>[SIJ]) Epoch\[(?P<epoch>\d{1,9})(?:/\d+)?\], (?:Iter\[(?P<step>\d{1,9})\]|Total).*?'
    r'Loss (?P<coarse>\d+\.?\d*|nan)/(?P<fine>\d+\.?\d*|nan)/(?P<avg>\d+\.?\d*|nan)(?=,)'
)

RECIPE = re.compile(r'arguments: .* recipe=(\w+)')


class Log(NamedTuple):
    """A training log: steps {(mode, epoch): [avg]}, epochs {(mode, epoch): mean (coarse, fine, avg)}."""

    name: str
    steps: dict
    epochs: dict
    recipe: str = 'published'


def read_logs(source):
    """Return the logs of a data folder that hold losses, by name."""
    logs = [source.attempt(read_log, path) for path in sorted(source.path.glob('logs/*.txt'))]
    return [log for log in logs if log]


def read_log(path):
    """Return the Log in a training's output; ValueError if it holds no loss."""
    log = parse_log(path.stem, text_lines(path))
    if not (log.steps or log.epochs):
        raise ValueError(f'{path}: left out, it holds no losses')
    return log


def parse_log(name, lines):
    """Return the Log in lines of output; of an epoch that was trained twice, the last training counts."""
    log = Log(name, {}, {})
    for line in lines:
        if named := RECIPE.match(line):
            log = log._replace(recipe=named[1])
        if not (found := LOSS.match(line)):
            continue
        epoch = found['mode'], int(found['epoch'])
        losses = tuple(float(found[part]) for part in ('coarse', 'fine', 'avg'))
        if found['step'] is None:
            log.epochs[epoch] = losses
        else:
            if int(found['step']) == 0:
                log.steps[epoch] = []
            log.steps.setdefault(epoch, []).append(losses[2])
    return log
