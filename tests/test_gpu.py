"""gpu.py on a CPU at a small width: the script itself works. What it is for, a GPU, is not here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TESTS


def gpu(*args):
    command = [sys.executable, TESTS / 'gpu.py', *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, env=os.environ)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card: run tests/gpu.py')
def test_without_a_card_it_says_so():
    done = gpu()
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'gpu.py: no CUDA device here: nothing was checked, and nothing about GPUs is proven\n'


def test_some_checks_pass_on_a_CPU(tmp_path):
    names = ['rates', 'nine_steps', 'ring_or_plain', 'out_of_memory', 'missing_device']
    done = gpu('--device', 'cpu', '--width', 4, '--json', tmp_path / 'gpu.json', '--only', ','.join(names))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / 'gpu.json').read_text())
    assert list(found['checks']) == names and all(check['passed'] for check in found['checks'].values())
    assert found['checks']['ring_or_plain']['fp32 24'].keys() == {'ring', 'plain'}
    assert done.stdout.splitlines()[-1] == '5 of 5 passed'


def test_a_check_that_fails_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    import gpu

    def fails(args):
        raise AssertionError('bytes moved')

    monkeypatch.setitem(gpu.CHECKS, 'golden', fails)
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--device', 'cpu', '--only', 'golden,memory'])
    assert gpu.main() == 1
    out, _ = capsys.readouterr()
    assert 'FAIL golden, 0 s: "error": "AssertionError: bytes moved"' in out
    assert out.endswith('1 of 2 passed; FAIL golden\n')


def test_a_check_that_is_not_begun_in_time_fails(tmp_path):
    done = gpu('--device', 'cpu', '--only', 'memory', '--minutes', '-1', '--json', tmp_path / 'gpu.json')
    assert done.returncode == 1 and done.stdout.endswith('0 of 1 passed; FAIL memory\n')
    check = json.loads((tmp_path / 'gpu.json').read_text())['checks']['memory']
    assert not check['passed'] and 'not begun within -1 minutes' in check['error']


@pytest.mark.long
def test_all_checks_pass_on_a_CPU():
    from gpu import CHECKS

    done = gpu('--device', 'cpu', '--width', 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f'{len(CHECKS)} of {len(CHECKS)} passed'
