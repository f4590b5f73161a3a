"""Calibrate the predicted DSC of a mask (volumes/calibration.py) on test cases with labels, and say what it is worth."""

import math

import numpy as np
from scipy.stats import spearmanr

from volumes.calibration import LEAST, PENALTY, SIGNALS, ridge, worst


def calibrate(cases):
    """Return the calibration, plain data for JSON, of test cases {name: (signals, DSC)}; None for fewer than LEAST.

    Only signals that all cases hold are used; the inter-iteration DSC, the weakest, only without the DSC with
    round 0. `left_out` has the DSC of each case as the others predict it.
    """
    names = [name for name in SIGNALS if all(name in signals for signals, _ in cases.values())]
    names = [name for name in names if name != 'inter_iteration' or 'from_start' not in names]
    if len(cases) < LEAST or not names:
        return None
    table = [[signals[name] for name in names] for signals, _ in cases.values()]
    values = [value for _, value in cases.values()]
    others = [[one for j, one in enumerate(zip(table, values)) if j != i] for i in range(len(values))]
    return {
        'method': f'ridge regression, penalty {PENALTY:g}',
        'signals': names,
        'cases': list(cases),
        'table': table,
        'DSC': values,
        'left_out': [ridge(*zip(*rest))(row) for rest, row in zip(others, table)],
    }


def quality(calibration):
    """Return what the predictions of the cases left out are worth, as the report shows it."""
    true, predicted = calibration['DSC'], calibration['left_out']
    count = worst(len(true))
    lowest, flagged = (set(np.argsort(values, kind='stable')[:count].tolist()) for values in (true, predicted))
    names = calibration['cases']
    single = {
        name: rank_correlation(column, true) for name, column in zip(calibration['signals'], zip(*calibration['table']))
    }
    return {
        'rank_correlation': rank_correlation(predicted, true),
        'rank_correlation_of_signals': single,
        'mean_error': float(np.mean(np.abs(np.subtract(predicted, true)))),
        'worst': [names[i] for i in sorted(lowest, key=lambda i: true[i])],
        'caught': [names[i] for i in sorted(lowest & flagged, key=lambda i: true[i])],
    }


def rank_correlation(a, b):
    """Return Spearman's rank correlation; None where one does not vary."""
    found = float(spearmanr(a, b).statistic) if min(np.ptp(a), np.ptp(b)) > 0 else math.nan
    return found if math.isfinite(found) else None
