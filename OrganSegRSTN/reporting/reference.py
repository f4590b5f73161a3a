"""Figures to compare a report with: of a paper, a former summary.json, or logs/published.json."""

import math
from pathlib import Path

from reporting.data import text_lines
from reporting.runs import DISTANCES
from reporting.scores import MALFORMED
from running.data_folder import Slice, fold_list, slice_list
from running.files import read_json

FIGURES = ('mean', 'std', 'min', 'max')
PUBLISHED = Path(__file__).resolve().parents[2] / 'logs' / 'published.json'


class Reference:
    """Figures under a name.

    content: {"name": "Yu et al. 2018", "coarse2fine": {"mean": 0.8462}}, or a summary.json's; figures
    of folds are {"coarse2fine": {"folds": {"0": {"mean": 0.8462, "cases": 20}}}}.
    figures: {organ, or None for any, and (organ, settings): {result or distance: (figures of all folds, {fold: figures})}}.
    Raises one of MALFORMED.
    """

    def __init__(self, content, name):
        self.name = str(content.get('name') or name)
        runs = content.get('runs') or [{'results': {k: v for k, v in content.items() if isinstance(v, dict)}}]
        self.figures = {}
        for run in reversed(runs):  # of other settings of an organ the first run counts
            folds = dict.fromkeys(run.get('folds', ()), {})  # distances have no figures by fold
            found = {
                key: (
                    figures(key, value.get('all', value)),
                    {int(f): one for f, v in value.get('folds', {}).items() if 'mean' in (one := figures(key, v))}
                    or folds,
                )
                for key, value in run['results'].items()
            }
            self.figures |= {run.get('organ'): found, (run.get('organ'), run.get('settings')): found}
        if not any(part for results in self.figures.values() for found in results.values() for part in found):
            raise ValueError('it holds no figures')

    def __call__(self, organ, key, folds, settings=None):
        """Return {mean, std, min, max} of a result or distance over `folds`, as far as they are known."""
        everything, by_fold = self._found(organ, key, settings)
        found = [by_fold.get(fold) for fold in folds]
        if everything and set(by_fold) in (set(), set(folds)) and not (len(found) == 1 and found[0]):
            return everything
        if not all(found):
            return {}
        cases = sum(fold['cases'] for fold in found)
        return found[0] if len(found) == 1 else {'mean': sum(fold['mean'] * fold['cases'] for fold in found) / cases}

    def of_fold(self, organ, key, fold, settings=None):
        """Return {mean, std, min, max} of a result in a fold, as far as they are known."""
        return self._found(organ, key, settings)[1].get(fold, {})

    def _found(self, organ, key, settings):
        known = next((self.figures[name] for name in ((organ, settings), organ, None) if name in self.figures), {})
        return known.get(key, ({}, {}))

    def unused(self, reports):
        """Return a line about figures that have no counterpart in `reports`; '' if there are none."""
        known = {row['key'] for report in reports for row in report['rows']}.union(DISTANCES)
        unused = sorted(self.figures.get(None, {}).keys() - known)
        if not unused:
            return ''
        return f'{self.name}: no such result here: {", ".join(unused)}; here are {", ".join(sorted(known))}'


def figures(key, values):
    """Return the mean, std, min, max and number of cases in `values`; ValueError if one is out of range."""
    found = {name: values[name] for name in FIGURES if values.get(name) is not None}
    for name, value in found.items():
        highest = math.inf if key in ('HD95', 'ASD') else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            limits = 'at least 0' if highest > 1 else 'from 0 to 1, as 0.8462 for 84.62 %'
            raise ValueError(f'{key}: {name}: {value!r} is not a number {limits}')
    return found and found | {'cases': max(1, int(values.get('counted', values.get('cases', 1))))}


def read_references(path):
    """Return the References of a JSON file; FileNotFoundError or ValueError names the file."""
    try:
        content = read_json(path)
        return [Reference(part, Path(path).name) for part in content.get('references', [content])]
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such reference file') from None
    except MALFORMED as error:
        raise ValueError(
            f'{path}: not a reference ({error}); it should be a summary.json, or read '
            '{"name": "...", "coarse2fine": {"mean": 0.8462}}'
        ) from None


def published_references(source):
    """Return the References of logs/published.json if the data folder holds NIH Pancreas-CT; else [].

    It does if four folds test 80 or 82 cases, at least one of them tests exactly the published cases,
    and the labels hold one organ, which dataset.json, if there is one, calls pancreas. Figures of folds
    that test other cases are left out.
    """
    tested = {
        fold: [source.case_name(fold, number) for number in source.cases(fold)]
        for fold in range(4)
        if fold_list(source.path, 'testing', fold).exists()
    }
    if sum(map(len, tested.values())) not in (80, 82) or not PUBLISHED.exists() or not one_pancreas(source):
        return []
    published = read_json(PUBLISHED)['folds']
    same = {int(fold) for fold, (first, last) in published.items() if tested.get(int(fold)) == numbered(first, last)}
    references = read_references(PUBLISHED)
    for reference in references:
        for _, by_fold in reference.figures[None].values():
            for fold in by_fold.keys() - same:
                del by_fold[fold]
    return [reference for reference in references if any(found[1] for found in reference.figures[None].values())]


def numbered(first, last):
    """Number the cases of a fold: '0001', '0003' -> ['0001', '0002', '0003']."""
    return [f'{number:04d}' for number in range(int(first), int(last) + 1)]


def one_pancreas(source):
    """Return whether the labels hold one organ, and nothing calls it other than pancreas."""
    path = slice_list(source.path, 'X')
    line = source.attempt(next, text_lines(path), '') if path.exists() else ''
    organs = len(source.attempt(Slice.read, line).organs) if line else 0
    return organs == 1 and 'pancreas' in source.label_names.get(1, 'pancreas').lower()
