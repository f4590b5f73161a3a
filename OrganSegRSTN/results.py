"""results.txt: every line is printed and kept; the file is written whole at the end."""

import math
import statistics

from utils import whole_file


class Results:
    """Lines of a stage: `with Results(folder) as results: results(line)` prints them and writes folder/results.txt."""

    def __init__(self, folder):
        self.path = folder / 'results.txt'
        self.lines = []
        self.undefined = 0

    def __call__(self, line):
        print(line, flush=True)
        self.lines.append(line)

    def average(self, values):
        """Mean and population standard deviation of the defined values (nan is left out); nan where there is none."""
        defined = [value for value in values if not math.isnan(value)]
        self.undefined = max(self.undefined, len(values) - len(defined))
        if not defined:
            return math.nan, math.nan
        return statistics.fmean(defined), statistics.pstdev(defined)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        if self.undefined:
            self(f'{self.undefined} case(s) with an empty label and an empty prediction left out of the averages .')
        with whole_file(self.path, 'w') as file:
            file.write('\n'.join(self.lines) + '\n')
        print(f'written: {self.path.parent}', flush=True)
