"""A report on the test results and training logs of a data folder: DATA_PATH/report/index.html.

Reads results/, logs/, lists/, labels/, images/, geometry/ and dataset.json of the data folder. What
is missing or broken becomes a line of the report. The page opens from disk, without a network.

--reference compares it with the figures of a JSON file: a former summary.json, or
{"name": "Yu et al. 2018", "coarse2fine": {"mean": 0.8462}}. Without it, NIH Pancreas-CT is
compared with the published figures in logs/published.json.

Beside the page: summary.json with all figures; the table of results as results.csv and results.tex.
Beside the snapshots: trust_J3_1.json, from which predict.py predicts the DSC of a new mask.
"""

import contextlib
import math
import os
import re
import shutil
from pathlib import Path

from running import arguments, script  # before packages: it names a missing one

# isort: split
import jinja2

from reporting.comparing import LEAST as LEAST_COMPARED
from reporting.comparing import compare_runs
from reporting.data import Source, read_logs
from reporting.measures import RESAMPLES, TOLERANCE
from reporting.pictures import COLOURS, COLUMNS, draw_losses, write_chart
from reporting.reference import published_references, read_references
from reporting.runs import RunReport
from reporting.scores import AGREEMENTS, read_results
from reporting.tables import write_csv, write_latex
from running.files import errors_naming, locked, write_json
from running.results import code
from volumes.calibration import LEAST, SIGNALS, calibration_file

# what a report's folder may hold, and lose; .DS_Store is the Finder's
PARTS = {'.DS_Store', 'index.html', 'summary.json', 'results.csv', 'results.tex', 'charts', 'cases'}


def main():
    args = read_arguments()
    data = Path(args.data_path)
    if not data.is_dir():
        raise FileNotFoundError(f'{data}: no such folder')
    if args.compare and not Path(args.compare).is_dir():
        raise FileNotFoundError(f'{args.compare}: no such folder')
    references = read_references(args.reference) if args.reference else []
    source = Source(data)
    runs, logs = read_results(source), read_logs(source)
    if not runs and not logs:
        raise FileNotFoundError(
            f'{data}: no results and no logs to report on; train and test first, see docs/run_sh.md'
        )
    if not runs:
        source.notice('no test results yet: the report shows the training only')
    with fresh_folder(data / 'report') as folder:
        for part in ('charts', 'cases'):
            (folder / part).mkdir()
        reports = [RunReport(source, args, folder, i, *run).content() for i, run in enumerate(runs.items())]
        charts = [loss_chart(source, folder, i, log) for i, log in enumerate(logs)]
        comparisons = compare_with(args.compare, source, runs, folder) if args.compare else []
        for line in filter(None, (reference.unused(reports) for reference in references)):
            source.notice(line)
        published = [] if references or not reports else published_references(source)
        content = {'name': data.resolve().name, 'runs': reports, 'comparisons': comparisons, 'notices': source.notices}
        write_json(folder / 'summary.json', summary(**content), nulls=True)
        write_csv(folder / 'results.csv', reports)
        write_latex(folder / 'results.tex', reports)
        page = render(**content, logs=charts, references=references or published, published=bool(published))
        (folder / 'index.html').write_text(page, encoding='utf-8')
    saved = set()
    for run in reports:
        save_calibration(data, run, saved)
    size = sum(file.stat().st_size for file in (data / 'report').rglob('*') if file.is_file())
    print(f'written: {data / "report" / "index.html"} ({size / 1e6:.1f} MB with its pictures)')


def read_arguments():
    parser = arguments.Parser(__doc__)
    parser.add_argument('data_path', help='the data folder, $DATA_PATH in run.sh')
    parser.add_argument('--reference', metavar='FILE', help='JSON of figures to compare with, or a former summary.json')
    parser.add_argument('--compare', metavar='OTHER_DATA_PATH',
                        help='compare case by case with its results; DATA_PATH itself: its settings')  # fmt: skip
    parser.add_argument('--explain', type=arguments.whole(0), default=1, metavar='N',
                        help='draw what the networks see in the N worst cases (default 1)')  # fmt: skip
    for end, default in (('low', -100), ('high', 240)):
        parser.add_argument(f'--{end}_range', type=arguments.number(), default=default,
                            help=f'window (HU) of pictures of tests without run.json (default {default})')  # fmt: skip
    parser.add_argument(
        '--slices', type=arguments.whole(1), default=96, help='most slices a case and plane (default 96)'
    )
    return arguments.parse(parser)


@contextlib.contextmanager
def fresh_folder(path):
    """Yield a new folder that replaces the report at `path` when it is complete; ValueError: it holds anything else."""
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    refuse_others(path)
    with locked(path.with_name(f'.{path.name}.lock'), f'.{path.name}.*.part'), errors_naming(path):
        part.mkdir()
        try:
            yield part
            refuse_others(path)  # the pictures took a while
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def refuse_others(path):
    """Raise ValueError where what a report replaces is not a folder, or holds what no report wrote."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f'{path}: is not a folder, but a file or a link; move it away')
    others = {file.name for file in path.iterdir()} - PARTS if path.exists() else ()
    if others:
        raise ValueError(f'{path}: holds {", ".join(sorted(others))}, which would be lost; move it away')


def compare_with(path, source, runs, folder):
    """Return the comparisons with the results of another data folder; see compare_runs."""
    other = Source(path)
    found = compare_runs(source, runs, other, read_results(other), folder)
    source.notices += (f'{path}: {line}' for line in other.notices)
    return found


def save_calibration(data, run, saved):
    """Write a run's calibration beside its snapshots, and add its path to `saved`; print a line where there is one."""
    snapshots = data / 'models' / 'snapshots' / f'SIJ_training_{run["settings"]}'
    if not (run['trust'] and run['trust']['calibration'] and snapshots.is_dir()):
        return
    path = calibration_file(snapshots, run['thickness'], run['organ'])
    if path in saved:
        print(f'note: {path}: of the epochs {run["epoch"]}, no longer of the others')
    saved.add(path)
    try:
        write_json(path, run['trust']['calibration'])
        print(f'written: {path}')
    except OSError as error:
        print(f'note: predict.py will not predict the DSC: {error}')


def loss_chart(source, folder, index, log):
    """Return {file, title, text} of a training log's chart."""
    file = f'charts/log{index}.svg'
    write_chart(folder / file, draw_losses, (3.6, 2.7), log)
    last = {mode: (epoch, losses[2]) for (mode, epoch), losses in sorted(log.epochs.items())}
    text = ', '.join(f'{mode} {last[mode][1]:.4f} after epoch {last[mode][0]}' for mode in 'SIJ' if mode in last)
    name = re.fullmatch(r'FD(\d+):([XYZ])(\d+)_(\d+)_?(.*)', log.name)
    title = f'Fold {name[1]}, plane {name[2]}, {source.organ_title(int(name[4]))} {name[5]}' if name else log.name
    return {'file': file, 'title': title.strip(), 'text': text or 'no epoch finished'}


def summary(name, runs, comparisons, notices):
    """Return the content of summary.json: DSC and NSD from 0 to 1; null for what is not finite."""
    kept = []
    for run in runs:
        results = {
            row['key']: {
                'all': row['all']._asdict(),
                'folds': {str(fold): spread._asdict() for fold, spread in row['folds'].items()},
                'missed': row['missed'],
            }
            for row in run['rows']
        }
        in_mm = next((part for part in run['distances'] if part['unit'] == 'mm' and part['cases']), None)
        results |= {key: {'all': spread._asdict()} for key, spread in in_mm['measures'].items()} if in_mm else {}
        cases = [{k: v for k, v in case.items() if k not in ('planes', 'id', 'seen')} for case in run['cases']]
        settings = {key: run[key] for key in ('organ', 'organ_name', 'settings', 'thickness', 'epoch', 'folds')}
        stops = [stop | {key: stop[key]._asdict() for key in ('rounds', 'DSC')} for stop in run['stops']]
        kept.append(settings | {'results': results, 'stops': stops, 'cases': cases, 'trust': run['trust']})
    return code() | {
        'name': name,
        'NSD_tolerance': TOLERANCE,
        'runs': kept,
        'comparisons': comparisons,
        'notices': notices,
    }


# --- the page ------------------------------------------------------------------------------------------------------


def number(value, digits=2):
    """Return a number as a table shows it: ∞ for an infinite distance, a dash for none."""
    if value is None or math.isnan(value):
        return '–'
    return '∞' if math.isinf(value) else f'{value:.{digits}f}'


def percent(value):
    """Return a share in percent: 0.84619 -> 84.62."""
    return number(value if value is None else value * 100)


def volume(case, mask):
    """Return the volume of a case's label or prediction, with its unit."""
    ml = case['ml'][mask]
    return f'{case["voxels"][mask]} voxels' if ml is None else f'{ml:.2f} ml'


def coverage(spread):
    """Return `mean of 18 of 20: 2 infinite`, or '' if every case counts."""
    causes = [(spread.infinite, 'infinite'), (spread.undefined, 'undefined'), (spread.unmeasured, 'not measured')]
    text = ', '.join(f'{count} {cause}' for count, cause in causes if count)
    return f'mean of {spread.counted} of {spread.cases}: {text}' if text else ''


def render(**content):
    """Return the page, from reporting/page.html; all text in it is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / 'reporting')
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {'percent': percent, 'number': number, 'volume': volume, 'coverage': coverage}
    return environment.get_template('page.html').render(
        content,
        colours=COLOURS,
        columns=COLUMNS,
        tolerance=TOLERANCE,
        resamples=RESAMPLES,
        agreement=AGREEMENTS[-1],
        least=LEAST,
        signals=SIGNALS,
        least_compared=LEAST_COMPARED,
    )


if __name__ == '__main__':
    script.run(main)
