"""Figures to compare a report with: of a paper, or of a former summary.json."""

import math
from pathlib import Path

from reporting.runs import DISTANCES
from reporting.scores import MALFORMED
from running.files import read_json

FIGURES = ('mean', 'std', 'min', 'max')


class Reference:
    """Figures of a JSON file: {"name": "Yu et al. 2018", "coarse2fine": {"mean": 0.8462}}, or a summary.json.

    figures: {organ, or None for any: {result or distance: {mean, std, min, max}}}. FileNotFoundError or ValueError
    names a file, or a figure, that cannot be read.
    """

    def __init__(self, path):
        try:
            content = read_json(path)
            self.name = str(content.get('name') or Path(path).name)
            runs = content.get('runs') or [{'results': {k: v for k, v in content.items() if isinstance(v, dict)}}]
            results = {run.get('organ'): run['results'] for run in reversed(runs)}  # of an organ the first run counts
            self.figures = {
                organ: {k: figures(k, v.get('all', v)) for k, v in r.items()} for organ, r in results.items()
            }
        except FileNotFoundError:
            raise FileNotFoundError(f'{path}: no such reference file') from None
        except MALFORMED as error:
            raise ValueError(
                f'{path}: not a reference ({error}); it should be a summary.json, or read '
                '{"name": "...", "coarse2fine": {"mean": 0.8462}}'
            ) from None
        if not any(self.figures.values()):
            raise ValueError(f'{path}: holds no figures, such as {{"name": "...", "coarse2fine": {{"mean": 0.8462}}}}')

    def __call__(self, organ, key):
        """{mean, std, min, max} of a result or distance, as far as they are known."""
        return self.figures.get(organ, self.figures.get(None, {})).get(key, {})

    def unused(self, reports):
        """A line about figures of any organ that `reports` have nothing to compare with; '' if there are none."""
        known = {row['key'] for report in reports for row in report['rows']}.union(DISTANCES)
        unused = sorted(self.figures.get(None, {}).keys() - known)
        if not unused:
            return ''
        return f'{self.name}: no such result here: {", ".join(unused)}; here are {", ".join(sorted(known))}'


def figures(key, values):
    """The mean, std, min and max among `values`; ValueError if one is not a number in its range."""
    found = {name: values[name] for name in FIGURES if values.get(name) is not None}
    for name, value in found.items():
        highest = math.inf if key in ('HD95', 'ASD') else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            limits = 'at least 0' if highest > 1 else 'from 0 to 1, as 0.8462 for 84.62 %'
            raise ValueError(f'{key}: {name}: {value!r} is not a number {limits}')
    return found
