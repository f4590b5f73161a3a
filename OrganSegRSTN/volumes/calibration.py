"""Predict the DSC of a mask without its label, from the signals of its rounds (volumes/trust.py).

The method is ridge regression (Hoerl and Kennard 1970) of the DSC on a few standardized signals, fitted
to test cases with labels by report.py (reporting/trust.py).
"""

import math

import numpy as np

from running.files import read_json

SIGNALS = {  # at the round where a case stops
    'inter_iteration': 'inter-iteration DSC',
    'from_start': 'DSC with round 0',
    'planes': 'planes disagree',
    'entropy': 'entropy',
}
PENALTY = 1.0  # on squared weights, for standardized signals
LEAST = 6  # test cases; fewer show nothing
COVERAGE = 0.9  # of the interval of a predicted DSC
WORST = 0.25  # share of the test cases that a prediction should find
ENDS = ('threshold', 'stop_DSC', 'rounds')  # what the end of the rounds depends on
FAR = 3.0  # standard deviations of a signal: unlike the test cases


def case_signals(record, stop=None):
    """Return {name: number} of the SIGNALS of a record at the round `stop` (the last), those that it holds; {} if it is empty.

    inter_iteration is missing in round 0.
    """
    rounds = record['rounds'][: None if stop is None else stop + 1]
    if not (rounds and rounds[-1].get('voxels')):
        return {}
    return {name: rounds[-1][name] for name in SIGNALS if rounds[-1].get(name) is not None}


def predict(calibration, signals):
    """Return (predicted DSC, low, high, whether to look at the scan) of a case with these signals.

    The interval is as wide as the COVERAGE quantile of the errors of the cases left out; of fewer than 19
    cases that is the largest error.
    To look at: predicted among the lowest WORST of these cases. None, and to look at: a signal lies more than
    FAR standard deviations from those of the cases, where the fit says nothing.
    """
    row = [signals[name] for name in calibration['signals']]
    scores = logit([*calibration['table'], row])
    if (np.abs(scores[-1] - scores[:-1].mean(axis=0)) > FAR * np.maximum(scores[:-1].std(axis=0), 0.1)).any():
        return None, None, None, True
    value = ridge(calibration['table'], calibration['DSC'])(row)
    errors = np.sort(np.abs(np.subtract(calibration['left_out'], calibration['DSC'])))
    width = float(errors[min(math.ceil(COVERAGE * (len(errors) + 1)), len(errors)) - 1])
    low = value <= np.sort(calibration['left_out'])[worst(len(errors)) - 1]
    return value, max(value - width, 0.0), min(value + width, 1.0), bool(low)


def worst(count):
    """Return how many of `count` cases are the worst ones."""
    return max(round(WORST * count), 1)


def ridge(table, values):
    """Return a function from a row of signals to its predicted DSC, fitted to a table (cases, signals)."""
    table, values = logit(table), np.array(values, float)
    mean, std = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
    scaled = (table - mean) / std
    weights = np.linalg.solve(scaled.T @ scaled + PENALTY * np.eye(len(mean)), scaled.T @ (values - values.mean()))
    return lambda row: float(np.clip(values.mean() + (logit(row) - mean) / std @ weights, 0, 1))


def logit(shares):
    """Return log(p / (1 - p)) of numbers from 0 to 1: it spreads those that crowd near an end."""
    shares = np.clip(np.array(shares, float), 1e-4, 1 - 1e-4)
    return np.log(shares / (1 - shares))


# --- the calibration beside the snapshots --------------------------------------------------------------------------


def calibration_file(snapshots, thickness, organ_ID):
    """Return the path of the calibration in a folder of snapshots: trust_J3_1.json."""
    return snapshots / f'trust_J{thickness}_{organ_ID}.json'


def read_calibration(path):
    """Return a stored calibration, or None where there is none; raise ValueError where it is damaged."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f'{path}: not a readable calibration ({error}); run report.py again') from None
    try:
        table, others = np.array(found['table'], float), np.array([found['DSC'], found['left_out']], float)
        whole = table.shape == (others.shape[1], len(found['signals'])) and set(found['signals']) <= SIGNALS.keys()
        whole = whole and all(math.isfinite(end[name]) for end in found['settings'] for name in ENDS)
        whole = whole and all(isinstance(fold, list) for fold in found['snapshots'])  # before: of all folds together
    except (LookupError, TypeError, ValueError):
        whole = False
    if not (whole and np.isfinite(table).all() and np.isfinite(others).all() and others.shape[1] >= LEAST):
        raise ValueError(f'{path}: not a calibration; run report.py again')
    return found


def print_trust(record, path, snapshots, settings, start='coarse'):
    """Print the line that says how far to trust a mask, by the calibration at `path`; return its figures for JSON.

    It says nothing of a mask that was made otherwise than those of the test cases. snapshots: a function that
    returns the checksums of the networks; settings: {'threshold': ..., 'stop_DSC': ...}; start: what round 0 is.
    """
    rounds = record['rounds']
    if not rounds[-1]['voxels'] or rounds[-1]['planes'] is None:
        return {}
    planes = f'planes disagree on {100 * rounds[-1]["planes"]:.0f} %'
    if start != 'coarse':
        print(f'{planes}; no predicted DSC: round 0 is not that of the coarse networks')
        return {}
    signals = case_signals(record)
    try:
        calibration = read_calibration(path)
    except ValueError as error:  # the mask is worth more than this line
        print(f'{planes}; no predicted DSC: {error}')
        return {}
    if calibration is None:
        print(f'{planes}; no predicted DSC: report.py writes {path} from {LEAST} or more test cases (of several folds)')
        return {}
    if len(rounds) == 1:
        print(f'{planes}; no predicted DSC without a fine round')
        return {}
    if not all(ended_alike(rounds, settings, theirs) for theirs in calibration['settings']):
        print(f'{planes}; no predicted DSC: in {path} rounds end in another way (--threshold, --stop_DSC, --rounds)')
        return {}
    if sorted(snapshots()) not in calibration['snapshots']:
        print(f'{planes}; no predicted DSC: {path} is of other snapshots; give those of one fold that is in the report')
        return {}
    value, low, high, look = predict(calibration, signals)
    predicted = 'no predicted DSC, its signals are unlike those of the test cases'
    if value is not None:
        predicted = f'predicted DSC {value:.2f} ({low:.2f} to {high:.2f})'
    print(f'{predicted}; {planes}' + (': look at this scan' if look else ''))
    return {'predicted_DSC': value, 'low': low, 'high': high, 'look_at_this_scan': look}


def ended_alike(rounds, settings, theirs):
    """Return whether these rounds end as those of test cases, whose settings are `theirs`.

    Where they end before two agree, they are as many as the test cases may have had; more do not matter.
    """
    if any(theirs[name] != value for name, value in settings.items()):
        return False
    return rounds[-1].get('inter_iteration', 0) >= theirs['stop_DSC'] or len(rounds) > theirs['rounds']
