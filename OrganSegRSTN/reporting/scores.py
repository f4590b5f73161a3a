"""Read the DSC of every test case: from results.json of a result folder, else from the published results.txt."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from reporting.data import text_lines
from running.data_folder import PLANES
from running.files import read_json, read_volume
from running.results import read_settings
from utils import Dice
from volumes.fusion import FUSIONS
from volumes.rounds import AGREEMENTS

MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)  # from reading an odd JSON

# names of result folders, as running.data_folder and the stages make them
_PLANE = re.compile(r'FD(?P<fold>\d+):(?P<snapshots>[XYZ]J.+)')
_FUSION = re.compile(r'FD(?P<fold>\d+):fusion:(?P<snapshots>.+)_(?P<epoch>e\d+),[^,]+')
_ROUNDS = re.compile(r'FD(?P<fold>\d+):(?P<snapshots>X.+,Z[^:]+):(?P<epoch>e\d+)_[^_]+_[^_]+,\d+')
NAMES = {'coarse': _PLANE, 'oracle': _PLANE, 'coarse_fusion': _FUSION, 'oracle_fusion': _FUSION, 'coarse2fine': _ROUNDS}
SNAPSHOT = re.compile(r'(?P<plane>[XYZ])J(?P<thickness>\d+)_(?P<organ>\d+)(?:_.{15})?(?:\.pkl)?')

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


class Scores(NamedTuple):
    """The figures of a result folder; `key` is the prefix of a result's volumes: e2682, X, F2P, R0 ..."""

    dice: dict  # {key: {case number: Dice}}
    agreement: dict  # {(case number, round): inter-iteration DSC}
    images: dict  # {case number: image file}, as far as they are known


class ResultFolder(NamedTuple):
    """A result folder: what its name says, and its figures."""

    path: Path
    stage: str  # coarse_X, oracle_fusion, coarse2fine ...
    fold: int
    run: Run
    scores: Scores

    def volume_file(self, key, number):
        return self.path / 'volumes' / f'{key}_{number}.npz'

    def mask(self, key, number, shape):
        """A stored prediction (W, H, L) as bool; FileNotFoundError or ValueError if there is no whole one of `shape`."""
        volume = read_volume(self.volume_file(key, number), shape)
        return volume >= 128 if key == self.run.epoch else volume != 0  # planes store round(255 p)

    def intensity_window(self):
        """The intensity window (HU) of the test, from run.json, or None."""
        match (read_settings(self.path / 'run.json') or {}).get('window'):
            case [int() | float() as low, int() | float() as high] if low < high:
                return low, high
        return None


# --- reading -------------------------------------------------------------------------------------------------------


def read_results(source):
    """{Run: {stage: {fold: ResultFolder}}} of all results; of several, that of the latest timestamp and most rounds."""

    def age(path):
        return path.parent, [int(number) for number in re.findall(r'[0-9]+', path.name)], path.name

    runs = {}
    for path in sorted(source.path.glob('results/*_testing_*/*'), key=age):
        if path.name.startswith('.') or not path.is_dir() or not (folder := source.attempt(read_folder, source, path)):
            continue
        folds = runs.setdefault(folder.run, {}).setdefault(folder.stage, {})
        if other := folds.get(folder.fold):
            source.notice(f'{other.path}: left out, {path.name} is a later run of the same')
        folds[folder.fold] = folder
    return dict(sorted(runs.items()))


def read_folder(source, path):
    """The ResultFolder at `path`; ValueError if its name is not one, or if it holds no result."""
    stage, settings = path.parent.name.split('_testing_', 1)
    stage += '_fusion' if ':fusion:' in path.name else ''
    name = NAMES[stage].fullmatch(path.name) if stage in NAMES else None
    snapshots = [SNAPSHOT.fullmatch(text) for text in name['snapshots'].split(',')] if name else [None]
    if None in snapshots:
        raise ValueError(f'{path}: left out, not the name of a result folder')
    first = snapshots[0]
    scores = read_scores(source, path)
    check_cases(source, path, int(name['fold']), scores)
    if not any(scores.dice.values()):
        raise ValueError(f'{path}: left out, it holds no result yet; run its stage to the end')
    run = Run(
        int(first['organ']), settings, int(first['thickness']), name.groupdict().get('epoch') or next(iter(scores.dice))
    )
    stage += f'_{first["plane"]}' if NAMES[stage] is _PLANE else ''
    return ResultFolder(path, stage, int(name['fold']), run, scores)


def read_scores(source, path):
    """The Scores in results.json of a folder, or in results.txt if that was written later or is the only one."""
    file, text = path / 'results.json', path / 'results.txt'
    try:
        if not text.exists() or file.stat().st_mtime > text.stat().st_mtime - 60:
            return json_scores(read_json(file))
    except FileNotFoundError:
        pass
    except MALFORMED as error:
        source.notice(f'{file}: not readable ({error!r}); results.txt is read instead')
    return text_scores(source, text) if text.exists() else Scores({}, {}, {})


def json_scores(content):
    """The Scores in the content of a results.json; one of MALFORMED if it is not one."""
    scores = Scores({}, {}, {})
    for case in content['cases']:
        number = int(case['number'])
        scores.images[number] = str(case['image_file'])
        for key, dice in case['scores'].items():
            both, pred, label = (int(dice[name]) for name in ('intersection', 'prediction', 'label'))
            if not 0 <= both <= min(pred, label):
                raise ValueError(f'{both} of {pred} and {label} voxels cannot overlap')
            scores.dice.setdefault(key, {})[number] = dice_of(both, pred, label)
        for r, value in case.get('agreement', {}).items():
            scores.agreement[number, int(r)] = float(value)
    return scores


def text_scores(source, path):
    """The Scores in a results.txt; without its averages it was cut off, and its last case is left out."""
    scores = Scores({}, {}, {})
    number, epoch, latest, whole = 0, '', 0, False
    for line in text_lines(path):
        if place := PLACE.match(line):
            number, epoch = int(place['case'] or 0), place['epoch'] or epoch
        whole = whole or 'verage DSC' in line
        found = SCORE.search(line)
        if not (found and number):
            continue
        dice = dice_of(*(int(found[name]) for name in ('both', 'pred', 'label')))
        if found['agreement']:
            scores.agreement[number, latest] = dice.value if dice.pred + dice.label else 1.0
            continue
        latest = int(found['round'] or 0)
        key = found['fusion'] or (f'R{latest}' if found['round'] else epoch)
        scores.dice.setdefault(key, {})[number] = dice
    if number and not whole:
        source.notice(f'{path}: cut off within case {number}, which is left out; run its stage to the end')
        for values in scores.dice.values():
            values.pop(number, None)
    return scores


def dice_of(both, pred, label):
    """The Dice of three counts of voxels."""
    return Dice(2.0 * both / (pred + label) if pred + label else math.nan, both, pred, label)


def check_cases(source, path, fold, scores):
    """Notice the cases of a fold's list without a result; drop results of cases that the list has elsewhere now."""
    cases = source.cases(fold)
    for number, image_file in scores.images.items():
        if not cases or Path(image_file).stem == source.case_name(fold, number):
            continue
        source.notice(f'{path}: {image_file} left out, the testing list has changed since; test again')
        for values in scores.dice.values():
            values.pop(number, None)
    there = {number for values in scores.dice.values() for number in values}
    if there and (lacking := [source.case_name(fold, number) for number in cases if number not in there]):
        source.notice(f'{path}: {len(lacking)} of {len(cases)} cases without a result: {", ".join(lacking)}')


# --- tables --------------------------------------------------------------------------------------------------------


def rounds_of(folder, number):
    """[Dice] of a case's rounds 0, 1, ... as far as it went."""
    found = []
    while number in folder.scores.dice.get(f'R{len(found)}', {}):
        found.append(folder.scores.dice[f'R{len(found)}'][number])
    return found


def stop_round(folder, number, threshold):
    """The first round whose inter-iteration DSC reaches `threshold`, else the last round."""
    last = len(rounds_of(folder, number)) - 1
    agreed = (r for r in range(1, last) if folder.scores.agreement.get((number, r), 0) >= threshold)
    return next(agreed, last)


def results_table(run, stages):
    """{key: {(fold, number): Dice}} of a run's stages: all that results.txt prints an average of, in its order.

    Keys: coarse_X, coarse_fusion_F2P, oracle_Z ..., coarse2fine_R0 (round 0; a case that has stopped keeps its last
    DSC) ..., coarse2fine_0.90 (stopped at this agreement) ..., and coarse2fine, the paper's stop at 0.99.
    """

    def cases(stage, key):
        folders = sorted(stages.get(stage, {}).items())
        return {
            (fold, n): dice for fold, folder in folders for n, dice in sorted(folder.scores.dice.get(key, {}).items())
        }

    table = {}
    for kind in ('coarse', 'oracle'):
        table |= {f'{kind}_{plane}': cases(f'{kind}_{plane}', run.epoch) for plane in PLANES}
        table |= {f'{kind}_fusion_{fusion}': cases(f'{kind}_fusion', fusion) for fusion in FUSIONS}
    folders = stages.get('coarse2fine', {})
    rounds = {(fold, number): rounds_of(folders[fold], number) for fold, number in cases('coarse2fine', 'R0')}
    for r in range(max(map(len, rounds.values()), default=0)):
        table[f'coarse2fine_R{r}'] = {case: dice[min(r, len(dice) - 1)] for case, dice in rounds.items()}
    for threshold in AGREEMENTS:
        table['coarse2fine' if threshold == AGREEMENTS[-1] else f'coarse2fine_{threshold}'] = {
            (fold, n): dice[stop_round(folders[fold], n, float(threshold))] for (fold, n), dice in rounds.items()
        }
    return {key: values for key, values in table.items() if values}
