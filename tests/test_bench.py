"""bench.py at tiny sizes: it cannot rot unseen. Its figures at these sizes mean nothing."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TESTS

pytestmark = pytest.mark.long
KEYS = {
    'coarse_fp32', 'fine_fp32', 'training_fp32', 'coarse_bf16', 'fine_bf16', 'training_bf16', 'fine_fp32_one_thread',
    'training_fp32_one_thread', 'fine_round', 'coarse_case', 'init', 'dsc', 'post_processing_organ', 'post_processing_blobs',
}  # fmt: skip


def bench(*args):
    command = [sys.executable, TESTS / 'bench.py', '--quick', '--repeats', '1', *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=os.environ)


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """(what the bench wrote, what it printed)."""
    file = tmp_path_factory.mktemp('bench') / 'bench.json'
    done = bench('--json', file, '--memory')
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_every_row_holds_plain_fast_and_their_ratio(measured):
    found, _ = measured
    assert found.keys() >= KEYS
    for key in KEYS:
        row = found[key]
        assert row['plain'] > 0
        assert row['fast'] > 0
        assert row['ratio'] == row['plain'] / row['fast']


def test_network_rows_tell_the_share_of_the_matrix_product_rate(measured):
    found, _ = measured
    for key in (key for key in KEYS if 'fp32' in key or 'bf16' in key):
        rate, _ = found['product_rate'][key.split('_')[1]]
        assert found[key]['of_product_rate'] == pytest.approx(found[key]['gflop'] / found[key]['fast'] / rate)


def test_peak_memory_of_whole_stages_is_reported(measured):
    found, _ = measured
    assert all(100e6 < found['memory'][stage] < 2e9 for stage in ('coarse_testing', 'training'))


def test_the_table_has_a_line_a_row(measured):
    _, printed = measured
    assert {line.split()[0] for line in printed.splitlines() if 'x' in line} >= KEYS


def test_a_row_that_is_none_is_named():
    done = bench('--only', 'dsc,nothing')
    assert done.returncode == 2
    assert "'nothing' is not one of coarse_fp32" in done.stderr.splitlines()[-1]
