"""What a data folder holds of test results and training logs. It may be half there: what is missing becomes a notice."""

import functools
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from running.data_folder import PLANES, read_cases
from running.files import read_volume
from running.results import read_settings
from scans.geometry import geometry_file, load_geometry  # noqa: E402
from utils import Dice, DSC_computation
from volumes.fusion import FUSIONS
from volumes.rounds import AGREEMENTS


class Source:
    """The data folder, read leniently: `notices` gathers, and prints, a line for whatever cannot be read."""

    def __init__(self, data_path):
        self.path = Path(data_path)
        self.notices = []
        self.cases = functools.lru_cache(maxsize=None)(self._cases)

    def notice(self, text):
        text = ' '.join(str(text).replace(f'{self.path}/', '').split())
        if text not in self.notices:
            self.notices.append(text)
            print(f'note: {text}', flush=True)

    def attempt(self, read, *args):
        """read(*args), or None and a notice where it fails."""
        try:
            return read(*args)
        except (OSError, ValueError) as error:
            self.notice(error)
            return None

    def _cases(self, fold):
        """{number: Case} of a fold's testing list, numbers from 1 as in results."""
        return dict(enumerate(self.attempt(read_cases, self.path, 'testing', fold) or [], 1))

    def case_name(self, fold, number):
        case = self.cases(fold).get(number)
        return Path(case.image_file).stem if case else f'case {number} of fold {fold}'

    def label(self, fold, number, organ):
        """Where the organ is, bool (W, H, L), or None."""
        case = self.cases(fold).get(number)
        return case and self.attempt(case.label, self.path, organ)

    def image(self, fold, number):
        """The scan (W, H, L), or None."""
        case = self.cases(fold).get(number)
        return case and self.attempt(case.image, self.path)

    def geometry(self, fold, number):
        """The Geometry of the stored arrays, or None where it is not known."""
        return self.attempt(self._geometry, geometry_file(self.path, self.case_name(fold, number)))

    @staticmethod
    def _geometry(path):
        found = load_geometry(path)
        return None if found is None or found.holds == 'nothing' else found


SNAPSHOT = re.compile(r'([XYZ])J(\d+)_(\d+)(?:_(.{15}))?(?:\.pkl)?')


# names of result folders, as utils.results_folder and the stages make them
PLANE = re.compile(r'FD(?P<fold>\d+):(?P<snapshots>[XYZ]J.+)')


FUSION = re.compile(r'FD(?P<fold>\d+):fusion:(?P<snapshots>.+)_(?P<epoch>e\d+),(?P<options>[^,]+)')


ROUNDS = re.compile(r'FD(?P<fold>\d+):(?P<snapshots>X.+,Z[^:]+):(?P<epoch>e\d+)_(?P<options>[^_]+_[^_]+,\d+)')


NAMES = {'coarse': (PLANE, FUSION), 'oracle': (PLANE, FUSION), 'coarse2fine': (ROUNDS,)}


SCORE = re.compile(
    r'(?:Testcase (?P<case>\d{1,9}):)?\s*(?:DSC_(?P<fusion>\w+)|Round (?P<round>\d{1,9}), DSC|(?P<inter>Inter-iteration) DSC|DSC)'
    r' = 2 \* (?P<both>\d{1,18}) / \((?P<pred>\d{1,18}) \+ (?P<label>\d{1,18})\) ='
)


class Folder(NamedTuple):
    """A result folder by its name, with the DSC of its cases: scores {result: {number: Dice}}.

    stage: coarse_X, oracle_fusion, coarse2fine ...; result: '' of a plane, F2P ... of a fusion, R0, R1 ... of rounds.
    inters: {(number, round): inter-iteration DSC}.
    """

    path: Path
    stage: str
    fold: int
    run: tuple  # (organ, settings, slice thickness, epoch): what results must share to be put together
    options: str  # thresholds and rounds
    times: tuple  # timestamps of its snapshots
    scores: dict
    inters: dict
    made_with: dict  # settings in its run.json

    def volume_file(self, result, number):
        return self.path / 'volumes' / f'{result or self.run[3]}_{number}.npz'

    def mask(self, result, number, shape=None):
        """A stored prediction (W, H, L) as bool; FileNotFoundError, ValueError where there is no whole one."""
        path = self.volume_file(result, number)
        volume = read_volume(path, shape)
        if volume.ndim != 3:
            raise ValueError(f'{path}: shape {volume.shape}, where a volume has three axes')
        return volume >= 128 if not result else volume != 0

    @property
    def window(self):
        """The intensity window (HU) that it was tested with, or None."""
        match self.made_with.get('window'):
            case [int() | float() as low, int() | float() as high] if low < high:
                return low, high
        return None


def read_results(source):
    """{run: {stage: {fold: Folder}}} of all results of a data folder."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted(source.path.glob('results/*_testing_*/*')):
        if not path.is_dir() or path.name.startswith('.'):
            continue
        folder = named_folder(path)
        if folder is None:
            source.notice(f'{path}: left out, not the name of a result folder')
            continue
        folder = folder._replace(made_with=source.attempt(read_settings, path / 'run.json') or {})
        read_scores(source, folder)
        if not any(folder.scores.values()):
            source.notice(f'{path}: left out, it holds no result yet')
            continue
        keep_newest(source, runs[folder.run][folder.stage], folder)
    return {run: runs[run] for run in sorted(runs)}


def keep_newest(source, folders, folder):
    """Put a folder under its fold; of several the one of the latest timestamps, then of most rounds, stays."""

    def age(folder):
        return folder.times, [float(number) for number in re.findall(r'\d+\.?\d*', folder.options)], folder.options

    other = folders.get(folder.fold)
    if other:
        other, folder = sorted([other, folder], key=age)
        source.notice(f'{other.path}: left out, {folder.path.name} is a later run of the same')
    folders[folder.fold] = folder


def named_folder(path):
    """The Folder, without scores, that a path's name tells; None where it tells none."""
    kind, settings = path.parent.name.split('_testing_', 1)
    found = next((m for m in (pattern.fullmatch(path.name) for pattern in NAMES.get(kind, ())) if m), None)
    snapshots = [SNAPSHOT.fullmatch(name) for name in found['snapshots'].split(',')] if found else []
    if not (snapshots and all(snapshots)):
        return None
    plane, thickness, organ, _ = snapshots[0].groups()
    if found.re is PLANE:
        stage, epoch, options = f'{kind}_{plane}', plane_epoch(path), ''
    else:
        stage, epoch, options = f'{kind}_fusion' if found.re is FUSION else kind, found['epoch'], found['options']
    run = int(organ), settings, int(thickness), epoch
    times = tuple(snapshot[4] or '' for snapshot in snapshots)
    return Folder(path, stage, int(found['fold']), run, options, times, scores={}, inters={}, made_with={})


def plane_epoch(path):
    """`e2682` of a plane's result folder: named in results.txt, else by its volumes."""
    found = re.search(r'snapshot (e\d+)', results_text(path))
    volumes = sorted(file.name.split('_')[0] for file in path.glob('volumes/e*_*.npz'))
    return found[1] if found else next(iter(volumes), '')


def results_text(path):
    """results.txt of a result folder; '' where there is none."""
    try:
        return (path / 'results.txt').read_text(errors='replace')
    except OSError:
        return ''


def read_scores(source, folder):
    """Fill a folder's scores: from results.txt, and for cases that it lacks from their volumes and labels."""
    text = results_text(folder.path)
    parse_scores(text, folder)
    listed = sorted(source.cases(folder.fold))
    added = [n for n in listed if not is_whole(folder, n) and score_volumes(source, folder, n)]
    if added:
        cause = 'results.txt lacks them' if text else 'there is no results.txt'
        source.notice(f'{folder.path}: the DSC of {len(added)} case(s) computed from their volumes: {cause}')
    there = {number for values in folder.scores.values() for number in values}
    lacking = {
        'without a result': [n for n in listed if n not in there],
        'half there': [n for n in sorted(there) if not is_whole(folder, n)],
    }
    for what, numbers in lacking.items():
        if there and numbers:
            names = ', '.join(source.case_name(folder.fold, number) for number in numbers)
            source.notice(f'{folder.path}: {len(numbers)} of {len(listed)} cases {what}: {names}')


def is_whole(folder, number):
    """Whether a case has all its results: of a plane, of all fusions, of all rounds or up to --stop_DSC."""
    if folder.stage != 'coarse2fine':
        results = FUSIONS if 'fusion' in folder.stage else ['']
        return all(number in folder.scores.get(result, {}) for result in results)
    rounds = len(rounds_of(folder, number))
    asked = folder.made_with.get('stop_DSC')
    stopped = isinstance(asked, float) and folder.inters.get((number, rounds - 1), 0) >= asked
    return stopped or rounds > int(folder.options.split(',')[1])


def parse_scores(text, folder):
    """Add the DSC lines of a results.txt to a folder's scores; a DSC is computed anew from the counts of its line."""
    number = latest = 0
    for line in text.splitlines():
        if case := re.match(r'\s*Testcase (\d{1,9}):', line):
            number = int(case[1])
        found = SCORE.search(line)
        if not found or not number:
            continue
        dice = dice_of(*(int(found[name]) for name in ('both', 'pred', 'label')))
        if found['inter']:
            folder.inters[number, latest] = agreement(dice)
            continue
        if found['round']:
            latest = int(found['round'])
        result = found['fusion'] or (f'R{latest}' if found['round'] else '')
        folder.scores.setdefault(result, {})[number] = dice


def dice_of(both, pred, label):
    """The Dice of three counts (voxels)."""
    return Dice(2.0 * both / (pred + label) if pred + label else math.nan, both, pred, label)


def agreement(dice):
    """Inter-iteration DSC; two empty rounds agree."""
    return dice.value if dice.pred + dice.label else 1.0


def score_volumes(source, folder, number):
    """Add the DSC of a case's stored volumes to a folder's scores; -> whether there were any."""
    if folder.stage == 'coarse2fine':
        rounds = int(folder.options.split(',')[1]) + 1
        results = [f'R{r}' for r in range(rounds)]
    else:
        results = FUSIONS if 'fusion' in folder.stage else ['']
    results = [result for result in results if folder.volume_file(result, number).exists()]
    label = source.label(folder.fold, number, folder.run[0]) if results else None
    before = None
    for result in results if label is not None else []:
        mask = source.attempt(folder.mask, result, number, label.shape)
        if mask is None:
            break
        folder.scores.setdefault(result, {})[number] = DSC_computation(label, mask)
        if before is not None and result.startswith('R'):
            folder.inters[number, int(result[1:])] = agreement(DSC_computation(before, mask))
        before = mask
    return before is not None


def rounds_of(folder, number):
    """[Dice] of a case's rounds 0, 1, ... as far as it went."""
    found = []
    while number in folder.scores.get(f'R{len(found)}', {}):
        found.append(folder.scores[f'R{len(found)}'][number])
    return found


def stop_round(folder, number, asked):
    """The first round whose inter-iteration DSC reaches `asked`, else the last; None where round 0 is missing."""
    last = len(rounds_of(folder, number)) - 1
    return next(
        (r for r in range(1, last + 1) if folder.inters.get((number, r), 0) >= asked), last if last >= 0 else None
    )


def results_of(stages):
    """{key: {(fold, number): Dice}} of a run's stages: all that results.txt prints an average of, in its order.

    Keys: coarse_X, coarse_fusion_F2P, oracle_Z ..., coarse2fine_R0 (round 0; a case that has stopped keeps its last
    DSC) ..., coarse2fine_0.90 (stopped at this agreement) ..., and coarse2fine, the paper's stop at 0.99.
    """
    table = {}
    for kind in ('coarse', 'oracle'):
        for stage in [f'{kind}_{plane}' for plane in PLANES] + [f'{kind}_fusion']:
            for result in FUSIONS if 'fusion' in stage else ['']:
                table[f'{stage}_{result}'.rstrip('_')] = {
                    (fold, number): dice
                    for fold, folder in sorted(stages.get(stage, {}).items())
                    for number, dice in sorted(folder.scores.get(result, {}).items())
                }
    table |= round_results(stages.get('coarse2fine', {}))
    return {key: values for key, values in table.items() if values}


def round_results(folders):
    """The part of results_of that is of coarse to fine."""
    cases = {
        (fold, number): rounds
        for fold, folder in sorted(folders.items())
        for number in sorted(folder.scores.get('R0', {}))
        if (rounds := rounds_of(folder, number))
    }
    table = {}
    for r in range(max(map(len, cases.values()), default=0)):
        table[f'coarse2fine_R{r}'] = {case: rounds[min(r, len(rounds) - 1)] for case, rounds in cases.items()}
    for asked in AGREEMENTS:
        key = 'coarse2fine' if asked == AGREEMENTS[-1] else f'coarse2fine_{asked}'
        table[key] = {
            (fold, number): rounds[stop_round(folders[fold], number, float(asked))]
            for (fold, number), rounds in cases.items()
        }
    return table


LOSS = re.compile(
    r'(?P<fold>\d+)(?P<plane>[XYZ])(?P<mode>[SIJ]) Epoch\[(?P<epoch>\d{1,9})(?:/\d+)?\], (?:Iter\[(?P<step>\d{1,9})\]|Total).*?'
    r'Loss (?P<coarse>\d+\.?\d*|nan)/(?P<fine>\d+\.?\d*|nan)/(?P<avg>\d+\.?\d*|nan)(?=,)'
)


class Log(NamedTuple):
    """A training log: steps {(mode, epoch): [avg loss]}, epochs {(mode, epoch): (coarse, fine, avg) mean loss}."""

    name: str
    steps: dict
    epochs: dict


def read_logs(source):
    """The logs of a data folder that hold losses, by name."""
    logs = []
    for path in sorted(source.path.glob('logs/*.txt')):
        text = source.attempt(functools.partial(path.read_text, errors='replace'))
        log = parse_log(path.stem, text or '')
        if log.steps or log.epochs:
            logs.append(log)
        elif text is not None:
            source.notice(f'{path}: left out, it holds no losses')
    return logs


def parse_log(name, text):
    """The Log of a training's output; a mode and epoch that is trained again counts as it was trained last."""
    log = Log(name, {}, {})
    for line in text.splitlines():
        found = LOSS.match(line)
        if not found:
            continue
        epoch = found['mode'], int(found['epoch'])
        coarse, fine, avg = (float(found[part]) for part in ('coarse', 'fine', 'avg'))
        if found['step'] is None:
            log.epochs[epoch] = coarse, fine, avg
        else:
            if int(found['step']) == 0:
                log.steps[epoch] = []
            log.steps.setdefault(epoch, []).append(avg)
    return log
