"""Read the DSC of every test case from results.json of a result folder, or from results.txt."""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

from reporting.data import text_lines
from running.data_folder import PLANES, SNAPSHOT_PARTS
from running.files import read_json, read_volume
from running.results import read_settings
from utils import Dice
from volumes.fusion import FUSIONS
from volumes.rounds import AGREEMENTS
from volumes.trust import is_record

MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)  # from reading an odd JSON

# names of result folders, as running.data_folder and the stages make them
_PLANE = re.compile(r'FD(?P<fold>\d+):(?P<snapshots>[XYZ]J.+)')
_FUSION = re.compile(r'FD(?P<fold>\d+):fusion:(?P<snapshots>.+)_(?P<epoch>e\d+),[^,]+')
_ROUNDS = re.compile(
    r'FD(?P<fold>\d+):(?P<snapshots>X.+,Z[^:]+):(?P<epoch>e\d+)_[^_]+_(?P<threshold>[^_]+),(?P<rounds>\d+)'
)
NAMES = {'coarse': _PLANE, 'oracle': _PLANE, 'coarse_fusion': _FUSION, 'oracle_fusion': _FUSION, 'coarse2fine': _ROUNDS}
SNAPSHOT = re.compile(SNAPSHOT_PARTS + r'(?:\.pkl)?')

# lines of results.txt
SCORE = re.compile(
    r'(?:DSC_(?P<fusion>\w+)|Round (?P<round>\d{1,9}), DSC|(?P<agreement>Inter-iteration) DSC|\bDSC)'
    r' = 2 \* (?P<both>\d{1,18}) / \((?P<pred>\d{1,18}) \+ (?P<label>\d{1,18})\) ='
)
PLACE = re.compile(r'\s*(?:Evaluating snapshot (?P<epoch>e\d+)|Testcase (?P<case>\d{1,9})):')


class Run(NamedTuple):
    """What results must share to stand in one table."""

    organ: int
    settings: str  # 1e-5x10,20
    thickness: int
    epoch: str  # e2682


class CaseScores(NamedTuple):
    """The figures of a case; a key is the prefix of a result's volumes: e2682, X, F2P, R0 ..."""

    image_file: str | None
    dice: dict  # {key: Dice}
    agreement: dict  # {round: inter-iteration DSC}
    signals: dict | None = None  # the record of volumes.trust, as stored

    def rounds(self):
        """Return [Dice] of rounds 0, 1, ... as far as the case went."""
        keys = itertools.takewhile(self.dice.__contains__, (f'R{r}' for r in itertools.count()))
        return [self.dice[key] for key in keys]

    def stop(self, threshold):
        """Return the first round whose inter-iteration DSC reaches `threshold`, else the last one."""
        last = len(self.rounds()) - 1
        return next((r for r in range(1, last) if self.agreement.get(r, 0) >= threshold), last)

    def record(self):
        """Return the record of volumes.trust: the stored one, else what the rounds alone say."""
        rounds = [
            {'voxels': dice.pred, 'inter_iteration': self.agreement.get(r)} for r, dice in enumerate(self.rounds())
        ]
        return self.signals or {'rounds': rounds}

    def best(self):
        """Return the round of the highest DSC, the first of several; its choice needs the label."""
        values = [-1 if math.isnan(dice.value) else dice.value for dice in self.rounds()]
        return values.index(max(values))


class ResultFolder(NamedTuple):
    """A result folder: what its name says, and the figures of its cases."""

    path: Path
    stage: str  # coarse_X, oracle_fusion, coarse2fine ...
    fold: int
    run: Run
    cases: dict  # {number: CaseScores}

    def volume_file(self, key, number):
        return self.path / 'volumes' / f'{key}_{number}.npz'

    def mask(self, key, number, shape):
        """Return a stored prediction (W, H, L), bool; FileNotFoundError, or ValueError if it is not whole."""
        volume = read_volume(self.volume_file(key, number), shape)
        return volume >= 128 if key == self.run.epoch else volume != 0  # planes store round(255 p)

    def tested_with(self):
        """Return (sorted checksums of the tested snapshots, by run.json; end_of_rounds)."""
        settings = read_settings(self.path / 'run.json')
        return sorted(
            str(value) for name, value in settings.items() if name.startswith('snapshot ')
        ), self.end_of_rounds()

    def end_of_rounds(self):
        """Return how the rounds of coarse to fine end: fine threshold, stop_DSC, most rounds; by name and run.json."""
        name, stop = _ROUNDS.fullmatch(self.path.name), read_settings(self.path / 'run.json').get('stop_DSC')
        stop = min(float(AGREEMENTS[-1]), stop if isinstance(stop, int | float) else 1)
        return {'threshold': float(name['threshold']), 'stop_DSC': stop, 'rounds': int(name['rounds'])}

    def test_settings(self):
        """Return {setting: value} of what figures depend on: thresholds and most rounds by its name, the rest by run.json."""
        settings = read_settings(self.path / 'run.json')
        found = {key: settings[key] for key in ('window', 'average', 'precision') if key in settings}
        if 'stop_DSC' in settings:
            found['stop_DSC'] = self.end_of_rounds()['stop_DSC']
        named = re.search(r'[:_]e\d+[_,](.+)', self.path.name)
        return found | ({'thresholds': named[1]} if named else {})

    def intensity_window(self):
        """Return the intensity window (HU) of the test, from run.json, or None."""
        match read_settings(self.path / 'run.json').get('window'):
            case [int() | float() as low, int() | float() as high] if low < high:
                return low, high
        return None


# --- reading -------------------------------------------------------------------------------------------------------


def read_results(source):
    """Return {Run: {stage: {fold: ResultFolder}}} of all results.

    Of several results of one fold, that of the latest timestamp counts, then that of the most rounds, then the newest.
    """

    def rank(path):
        rounds, text = _ROUNDS.fullmatch(path.name), path / 'results.txt'
        times = [time for *_, time in re.findall(SNAPSHOT_PARTS, path.name)]
        return path.parent, times, int(rounds['rounds']) if rounds else 0, text.stat().st_mtime if text.exists() else 0

    runs = {}
    for path in sorted(sorted(source.path.glob('results/*_testing_*/*')), key=rank):
        if path.name.startswith('.') or not path.is_dir() or not (folder := source.attempt(read_folder, source, path)):
            continue
        folds = runs.setdefault(folder.run, {}).setdefault(folder.stage, {})
        if other := folds.get(folder.fold):
            source.notice(f'{other.path}: left out, {path.name} counts instead')
        folds[folder.fold] = folder
    for stages in runs.values():
        notice_mixed(source, stages)
    return dict(sorted(runs.items()))


def notice_mixed(source, stages):
    """Notice what stands in one table though it is not alike, and rounds that ended before the paper's stop."""
    for folds in stages.values():
        source.attempt(notice_settings, source, *folds.values())
    for fold in sorted({fold for folds in stages.values() for fold in folds}):
        folders = {stage: folds[fold] for stage, folds in stages.items() if fold in folds}
        source.attempt(notice_trainings, source, fold, folders)
    for folder in stages.get('coarse2fine', {}).values():
        source.attempt(notice_early_stop, source, folder)


def notice_early_stop(source, folder):
    """Notice that rounds ended before the paper's stop."""
    if (stop := folder.end_of_rounds()['stop_DSC']) < float(AGREEMENTS[-1]):
        source.notice(f'{folder.path}: rounds ended at an agreement of {stop}; figures of higher ones are of that')


def notice_settings(source, first, *others):
    """Notice the folds of a stage that were tested with other settings than the first one."""
    ours = first.test_settings()
    for other in others:
        theirs = other.test_settings()
        if differing := [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]:
            found = ', '.join(f'{key} {theirs[key]} instead of {ours[key]}' for key in sorted(differing))
            source.notice(f'{other.path}: {found}, unlike fold {first.fold}: their mean says little')


def notice_trainings(source, fold, folders):
    """Notice that a fold's folders {stage: ResultFolder} are of several trainings, by timestamps, or by checksums."""
    trainings, contents = {}, {}
    for stage, folder in folders.items():
        for plane, _, _, _, time in re.findall(SNAPSHOT_PARTS, folder.path.name):
            trainings.setdefault(plane, {}).setdefault(time or 'no timestamp', stage)
    if mixed := next((stages for stages in trainings.values() if len(stages) > 1), None):
        found = ', '.join(f'{time} ({stage})' for time, stage in sorted(mixed.items()))
        source.notice(f'fold {fold}: its stages tested several trainings: {found}')
    for stage, folder in folders.items():
        for name, value in read_settings(folder.path / 'run.json').items():
            if snapshot := re.fullmatch(r'(?:[XYZ] )?snapshot (.+)', name):
                contents.setdefault(snapshot[1], {}).setdefault(value, stage)
    if changed := next(((name, stages) for name, stages in contents.items() if len(stages) > 1), None):
        source.notice(
            f'fold {fold}: its stages tested several trainings of {changed[0]}: {", ".join(sorted(changed[1].values()))}'
        )


def read_folder(source, path):
    """Return the ResultFolder at `path`; ValueError if its name is not one, or if it holds no result."""
    stage, settings = path.parent.name.split('_testing_', 1)
    stage += '_fusion' if ':fusion:' in path.name else ''
    name = NAMES[stage].fullmatch(path.name) if stage in NAMES else None
    snapshots = [SNAPSHOT.fullmatch(text) for text in name['snapshots'].split(',')] if name else [None]
    if None in snapshots:
        raise ValueError(f'{path}: left out, not the name of a result folder')
    cases = read_scores(source, path)
    drop_moved(source, path, int(name['fold']), cases)
    keys = [key for case in cases.values() for key in case.dice]
    if not keys:
        raise ValueError(f'{path}: left out, it holds no result yet; run its stage to the end')
    first, epoch = snapshots[0], name.groupdict().get('epoch', keys[0])
    stage += f'_{first["plane"]}' if NAMES[stage] is _PLANE else ''
    run = Run(int(first['organ']), settings, int(first['thickness']), epoch)
    return ResultFolder(path, stage, int(name['fold']), run, cases)


def read_scores(source, path):
    """Return {number: CaseScores} of results.json, or of results.txt if it is newer or the only one."""
    file, text = path / 'results.json', path / 'results.txt'
    try:
        if not text.exists() or file.stat().st_mtime > text.stat().st_mtime - 60:
            return dict(map(json_scores, read_json(file)['cases']))
    except FileNotFoundError:
        pass
    except MALFORMED as error:
        source.notice(f'{file}: not readable ({error!r}); results.txt is read instead')
    return text_scores(source, text) if text.exists() else {}


def json_scores(case):
    """Return (number, CaseScores) of a case in a results.json; one of MALFORMED if it is not one."""
    dice = {}
    for key, counts in case['scores'].items():
        both, pred, label = (int(counts[name]) for name in ('intersection', 'prediction', 'label'))
        if not 0 <= both <= min(pred, label):
            raise ValueError(f'{both} of {pred} and {label} voxels cannot overlap')
        dice[key] = dice_of(both, pred, label)
    agreement = {int(r): float(value) for r, value in case.get('agreement', {}).items()}
    signals = case['signals'] if is_record(case.get('signals')) else None
    return int(case['number']), CaseScores(str(case['image_file']), dice, agreement, signals)


def text_scores(source, path):
    """Return {number: CaseScores} of a results.txt.

    If it ends without averages it was cut off: its last case may be incomplete and is left out.
    """
    cases, number, epoch, latest, whole = {}, 0, '', 0, False
    for line in text_lines(path):
        if place := PLACE.match(line):
            number, epoch = int(place['case'] or 0), place['epoch'] or epoch
        whole = whole or 'verage DSC' in line
        found = SCORE.search(line)
        if not (found and number):
            continue
        case = cases.setdefault(number, CaseScores(None, {}, {}))
        dice = dice_of(*(int(found[name]) for name in ('both', 'pred', 'label')))
        if found['agreement']:
            case.agreement[latest] = dice.value if dice.pred + dice.label else 1.0  # two empty rounds agree
            continue
        latest = int(found['round'] or 0)
        case.dice[found['fusion'] or (f'R{latest}' if found['round'] else epoch)] = dice
    if cases and not whole:
        source.notice(f'{path}: cut off within case {number}, which is left out; run its stage to the end')
        cases.pop(number, None)
    return cases


def dice_of(both, pred, label):
    """Return the Dice of three counts of voxels."""
    return Dice(2.0 * both / (pred + label) if pred + label else math.nan, both, pred, label)


def drop_moved(source, path, fold, cases):
    """Drop the results of cases that moved in the fold's list; notice the cases without a result.

    ValueError: there is no such fold any more.
    """
    lists = [re.fullmatch(r'testing_FD(\d{1,3})\.txt', file.name) for file in source.path.glob('lists/*')]
    if (folds := [int(found[1]) for found in lists if found]) and fold > max(folds):
        raise ValueError(f'{path}: left out, the lists have no fold {fold}')
    listed = source.cases(fold)
    for number, case in list(cases.items()):
        if listed and case.image_file and Path(case.image_file).stem != source.case_name(fold, number):
            source.notice(f'{path}: {case.image_file} left out, the testing list has changed since; test again')
            del cases[number]
    if cases and (lacking := [source.case_name(fold, number) for number in listed if number not in cases]):
        source.notice(f'{path}: {len(lacking)} of {len(listed)} cases without a result: {", ".join(lacking)}')


def results_table(run, stages):
    """Return {key: {(fold, number): Dice}} of a run's stages, in the order of the pipeline.

    Keys: coarse_X, coarse_fusion_F2P, oracle_Z ..., coarse2fine_R0 (round 0; a case that has stopped
    keeps its last DSC) ..., coarse2fine_best (each case's best round), coarse2fine_0.90 (stopped at
    this agreement) ..., and coarse2fine, the paper's stop at 0.99.
    """

    def cases(stage):
        folders = sorted(stages.get(stage, {}).items())
        return {(fold, n): case for fold, folder in folders for n, case in sorted(folder.cases.items())}

    def column(stage, key):
        return {place: case.dice[key] for place, case in cases(stage).items() if key in case.dice}

    table = {}
    for kind in ('coarse', 'oracle'):
        table |= {f'{kind}_{plane}': column(f'{kind}_{plane}', run.epoch) for plane in PLANES}
        table |= {f'{kind}_fusion_{fusion}': column(f'{kind}_fusion', fusion) for fusion in FUSIONS}
    tested = {place: case for place, case in cases('coarse2fine').items() if case.rounds()}
    for r in range(max((len(case.rounds()) for case in tested.values()), default=0)):
        table[f'coarse2fine_R{r}'] = {place: case.rounds()[: r + 1][-1] for place, case in tested.items()}
    if tested:
        table['coarse2fine_best'] = {place: case.rounds()[case.best()] for place, case in tested.items()}
    for threshold in AGREEMENTS:
        table['coarse2fine' if threshold == AGREEMENTS[-1] else f'coarse2fine_{threshold}'] = {
            place: case.rounds()[case.stop(float(threshold))] for place, case in tested.items()
        }
    return {key: values for key, values in table.items() if values}
