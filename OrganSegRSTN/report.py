"""A report on whatever results and training logs a data folder holds: DATA_PATH/report/index.html and summary.json.

Reads results/, logs/, lists/, labels/, images/ and geometry/ of the data folder; what is missing or broken becomes a line
of the report. The page opens from disk, without network or server. --reference compares it with figures of a JSON file:
{"name": "Yu et al. 2018", "coarse2fine": {"mean": 0.8462}}, or a former summary.json.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
from pathlib import Path

import jinja2

from reporting.data import AGREEMENTS, Source, read_logs, read_results
from reporting.measures import TOLERANCE
from reporting.pictures import COLOURS, COLUMNS, draw_losses, write_chart
from reporting.runs import DISTANCES, RunReport
from running import arguments, script
from running.files import errors_naming, locked, read_json
from running.results import code

FIGURES = ('mean', 'std', 'min', 'max')


def main():
    args = arguments_of()
    data = Path(args.data_path)
    if not data.is_dir():
        raise FileNotFoundError(f'{data}: no such folder')
    reference = read_reference(args.reference) if args.reference else None
    source = Source(data)
    runs, logs = read_results(source), read_logs(source)
    if not runs and not logs:
        raise FileNotFoundError(f'{data}: no results and no logs to report on; train and test first (see README.md)')
    if not runs:
        source.notice('no test results yet: the report shows the training only')
    name = data.resolve().name
    with fresh_folder(data / 'report') as folder:
        for part in ('charts', 'cases'):
            (folder / part).mkdir()
        reports = [RunReport(source, args, folder, i, *run).content() for i, run in enumerate(runs.items())]
        charts = [loss_chart(folder, i, log) for i, log in enumerate(logs)]
        notice_unused(source, reference, reports)
        write_json(folder / 'summary.json', summary(name, reports, source.notices))
        page = render(name=name, runs=reports, logs=charts, notices=source.notices, reference=reference)
        (folder / 'index.html').write_text(page, encoding='utf-8')
    size = sum(file.stat().st_size for file in (data / 'report').rglob('*') if file.is_file())
    print(f'written: {data / "report" / "index.html"} ({size / 1e6:.1f} MB with its pictures)')


def arguments_of():
    made = arguments.Parser(__doc__)
    made.add_argument('data_path', help='the data folder, $DATA_PATH in run.sh')
    made.add_argument('--reference', metavar='FILE', help='JSON of figures to compare with, or a former summary.json')
    made.add_argument('--low_range', type=arguments.number(), default=-100, help='window to look at slices in (HU), ')
    made.add_argument('--high_range', type=arguments.number(), default=240, help='where run.json of a test names none')
    made.add_argument('--slices', type=arguments.whole(1), default=96, help='most slices a case and plane (default 96)')
    return arguments.parse(made)


@contextlib.contextmanager
def fresh_folder(path):
    """A new folder that takes the place of `path` when it is complete."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    with locked(path.with_name(f'.{path.name}.lock'), f'.{path.name}.*.part'), errors_naming(path):
        part.mkdir()
        try:
            yield part
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def loss_chart(folder, index, log):
    """{file, title, text} of a training log's chart."""
    file = f'charts/log{index}.svg'
    write_chart(folder / file, draw_losses, (3.6, 2.7), log)
    ends = {mode: (epoch, losses[2]) for (mode, epoch), losses in sorted(log.epochs.items())}
    text = ', '.join(f'{mode} {ends[mode][1]:.4f} after epoch {ends[mode][0]}' for mode in 'SIJ' if mode in ends)
    name = re.fullmatch(r'FD(\d+):([XYZ])(\d+)_(\d+)_?(.*)', log.name)
    title = f'Fold {name[1]}, plane {name[2]}, organ {name[4]} {name[5]}' if name else log.name
    return {'file': file, 'title': title.strip(), 'text': text or 'no epoch finished'}


# --- reference and summary -----------------------------------------------------------------------------------------


def read_reference(path):
    """{name, figures: {organ, or None for any: {key: {mean, std, min, max}}}} of a reference file or summary.json.

    ValueError names what is not a figure.
    """
    figures = {}
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such reference file') from None
    except ValueError as error:
        raise no_reference(path, error) from None
    try:
        runs = content.get('runs') or [{'results': {k: v for k, v in content.items() if isinstance(v, dict)}}]
        for run in reversed(runs):  # the first run of an organ counts
            results = {key: value.get('all', value) for key, value in run['results'].items()}
            figures[run.get('organ')] = {key: checked_figures(path, key, value) for key, value in results.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise no_reference(path, error) from None
    if not any(figures.values()):
        raise ValueError(
            f'{path}: holds no figures; it should read {{"name": "...", "coarse2fine": {{"mean": 0.8462}}}}'
        )
    return {'name': str(content.get('name') or Path(path).name), 'figures': figures}


def no_reference(path, error):
    """The ValueError to raise where a file is no reference."""
    return ValueError(
        f'{path}: not a reference ({error!r}); '
        'it should read {"name": "...", "coarse2fine": {"mean": 0.8462}}, or be a summary.json'
    )


def checked_figures(path, key, values):
    """The mean, std, min and max among `values`, as numbers."""
    figures = {name: values[name] for name in FIGURES if values.get(name) is not None}
    for name, value in figures.items():
        highest = math.inf if key in ('HD95', 'ASD') else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            limits = 'at least 0' if highest > 1 else 'from 0 to 1, as 0.8462 for 84.62 %'
            raise ValueError(f'{path}: {key}: {name}: {value!r} is not a number {limits}')
    return figures


def reference_figures(reference, organ, key):
    """What the reference says of a result or distance; {} where it says nothing."""
    figures = reference['figures'] if reference else {}
    return figures.get(organ, figures.get(None, {})).get(key, {})


def notice_unused(source, reference, reports):
    """A notice for figures of the reference that have nothing here to be compared with."""
    known = {row['key'] for report in reports for row in report['rows']}.union(DISTANCES)
    for organ, figures in (reference['figures'] if reference else {}).items():
        if organ is None and (unused := sorted(figures.keys() - known)):
            source.notice(
                f'{reference["name"]}: no such result here: {", ".join(unused)}; here are {", ".join(sorted(known))}'
            )


def summary(name, reports, notices):
    """The content of summary.json, told with the revision of the code that made it: DSC and NSD from 0 to 1; null is what is undefined, infinite or not measured."""
    runs = []
    for report in reports:
        results = {
            row['key']: {
                'all': row['all']._asdict(),
                'folds': {str(fold): figures._asdict() for fold, figures in row['folds'].items()},
                'missed': row['missed'],
            }
            for row in report['rows']
        }
        measured = next((d for d in report['distances'] if d['unit'] == 'mm' and d['cases']), None)
        results |= {key: {'all': value._asdict()} for key, value in measured['measures'].items()} if measured else {}
        cases = [{k: v for k, v in case.items() if k not in ('planes', 'id')} for case in report['cases']]
        kept = ('organ', 'settings', 'thickness', 'epoch', 'folds')
        runs.append({key: report[key] for key in kept} | {'results': results, 'cases': cases})
    return code() | {'name': name, 'NSD_tolerance': TOLERANCE, 'runs': runs, 'notices': notices}


def write_json(path, content):
    """Write JSON; numbers that JSON does not know (nan, infinite) become null."""

    def known(value):
        if isinstance(value, dict):
            return {key: known(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [known(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(known(content), indent=1, allow_nan=False) + '\n', encoding='utf-8')


# --- the page ------------------------------------------------------------------------------------------------------


def percent(value):
    """0.84619 -> 84.62; a dash for what is not a finite number."""
    return '–' if value is None or not math.isfinite(value) else f'{value * 100:.2f}'


def number(value, digits=2):
    """A number as it stands in a table; ∞ where a distance is infinite."""
    if value is None or math.isnan(value):
        return '–'
    return '∞' if math.isinf(value) else f'{value:.{digits}f}'


def volume(case, mask):
    """The volume of a case's label or prediction, with its unit."""
    ml = case['ml'][mask]
    return f'{case["voxels"][mask]} voxels' if ml is None else f'{ml:.2f} ml'


def coverage(figures):
    """`mean of 18 of 20: 2 infinite`, or '' where every case counts."""
    whys = [(figures.infinite, 'infinite'), (figures.undefined, 'undefined'), (figures.unmeasured, 'not measured')]
    text = ', '.join(f'{count} {why}' for count, why in whys if count)
    return f'mean of {figures.counted} of {figures.cases}: {text}' if text else ''


def render(**content):
    """The page, from reporting/page.html; all text in it is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / 'reporting')
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {'percent': percent, 'number': number, 'volume': volume, 'coverage': coverage}
    environment.globals |= {'referred': functools.partial(reference_figures, content['reference'])}
    return environment.get_template('page.html').render(
        content, colours=COLOURS, columns=COLUMNS, tolerance=TOLERANCE, agreement=AGREEMENTS[-1]
    )


if __name__ == '__main__':
    script.run(main)
