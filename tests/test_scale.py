"""scale.py: its laws and its estimate on literal figures, and the script at tiny sizes."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import TESTS
from scale import Law, duration, fine_work, makespan, operations, organ_extent


def test_a_law_finds_the_coefficients_that_made_the_figures():
    records = [{'windows': w, 'seconds': 3 + 0.5 * w} for w in (1, 10, 100)]
    law = Law(records, 'seconds', {'process': lambda _: 1, 'window': lambda record: record['windows']})
    assert list(law.coefficients) == pytest.approx([3, 0.5])
    assert law.worst == pytest.approx(0, abs=1e-9)
    assert law({'windows': 1000}) == pytest.approx(503)


def test_no_coefficient_is_below_zero():
    records = [{'n': n, 'seconds': 10 - n} for n in (1, 2, 3)]
    assert min(Law(records, 'seconds', {'process': lambda _: 1, 'n': lambda record: record['n']}).coefficients) >= 0


def test_jobs_go_to_the_worker_that_is_free_first_the_longest_first():
    assert makespan([1, 2, 3, 4], 1) == 10
    assert makespan([1, 2, 3, 4], 2) == 5
    assert makespan([1, 2, 3, 4], 8) == 4


def test_operations_are_counted_as_they_run_and_training_costs_about_three_times_as_many():
    forward, both = operations((32, 24), 4), operations((32, 24), 4, training=True)
    assert 2.5 * forward < both < 3 * forward


def test_a_fine_round_sees_the_organs_slices_along_each_axis():
    windows, gflop = fine_work((60, 60, 30), (10, 20, 5), 4)
    assert windows == 35
    assert gflop == pytest.approx(
        10 * operations((60, 30), 4) + 20 * operations((50, 30), 4) + 5 * operations((50, 60), 4)
    )


def test_the_organs_extent_counts_slices():
    label = np.zeros((5, 6, 7), np.uint8)
    label[1:4, 2:3, 0:7] = 1
    assert organ_extent(label) == [3, 1, 7]


def test_durations_are_readable():
    assert [duration(seconds) for seconds in (0.5, 90, 7200, 172800)] == ['0.5 s', '1.5 min', '2 h', '2 days']


def test_the_script_measures_every_stage_and_says_what_is_an_estimate(tmp_path):
    command = [sys.executable, TESTS / 'scale.py', '--quick', '--markdown', tmp_path / 'scale.md']
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'scale.md').read_text()
    for stage in ('init', 'coarse X', 'coarse Y', 'coarse Z', 'coarse fusion', 'coarse to fine'):
        assert f'| 1 of 14x16x7 | {stage} |' in page
    assert 'full width: an ESTIMATE' in page
    assert '| 8 GPUs |' in page
