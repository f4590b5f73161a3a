"""The table of results as CSV and LaTeX."""

import csv
import math

FIGURES = ('cases', 'counted', 'mean', 'std', 'low', 'high', 'min', 'max', 'infinite', 'undefined', 'unmeasured')
ESCAPES = {character: f'\\{character}' for character in '&%$#_{}'} | {
    '\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
}  # fmt: skip


def write_csv(path, runs):
    """Write a row for each result of each run, over all folds, then by fold; DSC from 0 to 1."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        table = csv.writer(file)
        table.writerow(['organ', 'name', 'settings', 'thickness', 'epoch', 'result', 'fold', *FIGURES, 'missed'])
        for run in runs:
            start = [run[key] for key in ('organ', 'organ_name', 'settings', 'thickness', 'epoch')]
            for row in run['rows']:
                table.writerow([*start, row['key'], 'all', *values(row['all']), len(row['missed'])])
                for fold, spread in row['folds'].items():
                    table.writerow([*start, row['key'], fold, *values(spread), ''])


def values(spread):
    return ['' if math.isnan(value) else value for value in (getattr(spread, name) for name in FIGURES)]


def write_latex(path, runs):
    """Write the main results of each run as a tabular, in percent."""
    lines = [
        r'\begin{tabular}{lrrrrr}',
        r'\hline',
        r'Result & Cases & Mean $\pm$ std (\%) & 95\,\% interval & Min & Max \\',
    ]
    for run in runs:
        title = ', '.join(filter(None, (run['organ_title'], run['settings'], run['epoch'])))
        lines += [r'\hline', rf'\multicolumn{{6}}{{l}}{{{escaped(title)}, thickness {run["thickness"]}}} \\']
        for row in run['main']:
            mean, std, least, most, low, high = (
                '--' if math.isnan(value) else f'{value * 100:.2f}' for value in row['all'][2:8]
            )
            figures = f'{mean} $\\pm$ {std} & {low} to {high} & {least} & {most}'
            lines.append(rf'{escaped(row["title"])} & {row["all"].counted} & {figures} \\')
    path.write_text('\n'.join([*lines, r'\hline', r'\end{tabular}', '']), encoding='utf-8')


def escaped(text):
    """Return a text for LaTeX."""
    return ''.join(ESCAPES.get(character, character) for character in text)
