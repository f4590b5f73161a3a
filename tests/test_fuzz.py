"""Every reader of files from outside, under random changes for a bounded time: see fuzz.py.

RSTN_FUZZ_SECONDS (default 2 a reader) and RSTN_FUZZ_SEED (default 0) in the environment run it longer or otherwise.
"""

import base64
import os
import re
import subprocess
import sys

import pytest
from conftest import TESTS
from fuzz import READERS

pytestmark = pytest.mark.long
SECONDS = float(os.environ.get('RSTN_FUZZ_SECONDS', '2'))
SEED = os.environ.get('RSTN_FUZZ_SEED', '0')


@pytest.mark.parametrize('reader', [reader.__name__ for reader in READERS])
def test_changed_bytes_are_read_or_refused_in_a_line(reader, tmp_path):
    command = [sys.executable, TESTS / 'fuzz.py', reader, tmp_path, str(SECONDS), SEED]
    run = subprocess.run(command, capture_output=True, text=True, errors='replace', timeout=SECONDS + 100, check=False)
    kept = {
        file.name: base64.b64encode(file.read_bytes()).decode()[:3000] for file in tmp_path.iterdir() if file.is_file()
    }
    assert run.returncode == 0, f'seed {SEED}: {run.stdout}\n{run.stderr[-3000:]}\nthe folder then: {kept}'
    inputs, refused = map(int, re.fullmatch(r'(\d+) inputs, (\d+) refused', run.stdout.splitlines()[-1]).groups())
    assert inputs >= 20 and 0 < refused < inputs
