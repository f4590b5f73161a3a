"""Compare two settings case by case: paired differences of the DSC, and the Wilcoxon signed-rank test of them."""

import itertools
import math
from typing import NamedTuple

from scipy.stats import wilcoxon

from reporting.measures import spread
from reporting.pictures import draw_differences, write_chart
from reporting.runs import HEADLINES, title
from reporting.scores import results_table

LEAST = 6  # cases that differ; of five, no differences have a p below 0.05


class Tested(NamedTuple):
    """The results of a run: {key of results_table: {case name: Dice}}."""

    name: str  # of the data folder
    organ: int
    settings: str
    results: dict


def tested_runs(source, runs, name=None):
    """Return [Tested] of the results of a data folder (read_results), under the folder's name or this one."""
    return [
        Tested(
            name or source.path.resolve().name,
            run.organ,
            f'{run.settings} {run.epoch}, thickness {run.thickness}',
            {
                key: {source.case_name(*place): dice for place, dice in values.items()}
                for key, values in results_table(run, stages).items()
            },
        )
        for run, stages in runs.items()
    ]


def compare_runs(source, runs, other_source, other_runs, folder):
    """Return the comparisons of the runs of two data folders; of one folder, of its settings with each other.

    Writes a chart of each to folder/charts. Only runs of one organ are compared.
    """
    paths = source.path.resolve(), other_source.path.resolve()
    same, alike = paths[0] == paths[1], paths[0].name == paths[1].name
    names = map(str, paths) if alike and not same else (None, None)
    ours, theirs = (tested_runs(*one, name) for *one, name in zip((source, other_source), (runs, other_runs), names))
    pairs = itertools.combinations(ours, 2) if same else itertools.product(ours, theirs)
    pairs = [(a, b) for a, b in pairs if a.organ == b.organ]
    if not pairs:
        source.notice(f'--compare {other_source.path}: no two results of one organ to compare')
    found = []
    for a, b in pairs:
        chart = f'charts/compared{len(found)}.svg'
        if comparison := compare(source, a, b):
            points = [(case['case'], case['difference']) for case in comparison['differences']]
            write_chart(folder / chart, draw_differences, (7.2, 3.0), points)
            found.append(comparison | {'organ_title': source.organ_title(a.organ), 'chart': chart})
    return found


def compare(source, a, b):
    """Return the comparison of two Tested: a minus b by case, of the first result that both have; None without one."""
    key = next((key for key in HEADLINES if key in a.results and key in b.results), None)
    shared = {} if key is None else {case: (dice, b.results[key].get(case)) for case, dice in a.results[key].items()}
    pairs = {case: pair for case, pair in shared.items() if pair[1] and not any(math.isnan(one.value) for one in pair)}
    names = [f'{one.name}, {one.settings}' for one in (a, b)]
    if not pairs:
        source.notice(f'{names[0]} and {names[1]}: no case has a result in both')
        return None
    if unlike := [case for case, (x, y) in pairs.items() if x.label != y.label]:
        source.notice(f'{names[0]} and {names[1]}: labels of different sizes: {", ".join(unlike)}')
    differences = [
        {'case': case, 'DSC': x.value, 'other': y.value, 'difference': x.value - y.value}
        for case, (x, y) in pairs.items()
    ]
    values = [case['difference'] for case in differences]
    changed = [value for value in values if value]
    return {
        'names': names,
        'result': title(key),
        'all': spread(values)._asdict(),
        'higher': sum(value > 0 for value in values),
        'lower': sum(value < 0 for value in values),
        'p': float(wilcoxon(changed).pvalue) if len(changed) >= LEAST else None,
        'unpaired': len(set(a.results[key]) ^ set(b.results[key])),
        'differences': sorted(differences, key=lambda case: case['difference']),
    }
