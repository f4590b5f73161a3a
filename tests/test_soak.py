"""A short soak (soak.py runs 200 cases), and that it would notice."""

import json
import subprocess
import sys

import pytest
from conftest import TESTS
from soak import growth

pytestmark = pytest.mark.long
STAGES = ['init', 'coarse X', 'coarse Y', 'coarse Z', 'coarse fusion', 'coarse to fine']


def looks(memory, files, cases=200):
    return {done: (memory(done), files(done)) for done in range(cases + 1)}


def test_steady_memory_and_files_are_no_growth():
    seen = looks(lambda done: 300e6 + done % 7 * 1e5, lambda done: 4 + done % 2)
    assert not growth('coarse X', seen, 200)['grows']


def test_volumes_that_stay_in_memory_every_case_are_growth():
    assert growth('coarse X', looks(lambda done: 300e6 + done * 120e3, lambda done: 4), 200)['grows']


def test_a_file_left_open_every_case_is_growth():
    assert growth('coarse X', looks(lambda done: 300e6, lambda done: 4 + done), 200)['grows']


def test_a_dozen_cases_from_init_to_coarse_to_fine_do_not_grow(tmp_path):
    command = [sys.executable, TESTS / 'soak.py', '--cases', '12', '--json', tmp_path / 'soak.json']
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / 'soak.json').read_text())['stages']
    assert list(stages) == STAGES
    assert stages['coarse to fine']['looks'] >= 6
