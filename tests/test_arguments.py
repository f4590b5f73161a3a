"""The scripts' arguments: their published order, what is refused, and how a script starts and fails."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CODE, REPO, coarse2fine_args, fusion_args, merge_args, pretrain_args, run_script, training_args

from running import arguments, script

SCRIPTS = sorted(path.name for path in CODE.glob('*.py') if 'script.run(main)' in path.read_text())
INIT = ['data', 1, 4, -100, 240]
COMMANDS = {
    'init.py': INIT,
    'pretrain.py': pretrain_args('data'),
    'training.py': training_args('data'),
    'coarse_testing.py': training_args('data'),
    'oracle_testing.py': training_args('data'),
    'coarse_fusion.py': fusion_args('data'),
    'oracle_fusion.py': fusion_args('data'),
    'coarse2fine_testing.py': coarse2fine_args('data'),
    'merge_organs.py': merge_args('data'),
}

TO_ORGAN = 'data_path current_fold organ_number low_range high_range slice_threshold slice_thickness organ_ID'
RATES = 'learning_rate1 learning_rate_m1 learning_rate2 learning_rate_m2 crop_margin'


def test_every_stage_script_is_tested_here():
    assert set(COMMANDS) <= set(SCRIPTS)


def test_positionals_stand_in_the_published_order():
    assert (
        f'{TO_ORGAN} plane GPU_ID {RATES} crop_prob crop_sample_batch epoch_S epoch_I epoch_J lr_decay_epoch timestamp'
    ).split() == arguments.TRAINING
    assert (
        f'{TO_ORGAN} plane GPU_ID {RATES} crop_prob crop_sample_batch epoch_S epoch_I epoch_J epoch_step '
        'timestamp1 timestamp2'
    ).split() == arguments.TESTING + arguments.TESTING_OPTIONAL
    assert (
        f'{TO_ORGAN} GPU_ID {RATES} epoch_S epoch_I epoch_J epoch_step threshold '
        'timestamp1_X timestamp1_Y timestamp1_Z timestamp2_X timestamp2_Y timestamp2_Z'
    ).split() == arguments.FUSION + arguments.FUSION_OPTIONAL
    assert (
        f'{TO_ORGAN} GPU_ID {RATES} epoch_S epoch_I epoch_J epoch_step coarse_threshold fine_threshold max_rounds '
        'timestamp1_X timestamp1_Y timestamp1_Z'
    ).split() == arguments.COARSE2FINE


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_explains_and_ends_with_0(script, call):
    done = call(script, '--help')
    assert done.code == 0
    assert done.out.startswith('usage: ') and 'unused' not in done.out
    assert script not in COMMANDS or 'data_path' in done.out


@pytest.mark.parametrize('script', COMMANDS)
def test_without_arguments_usage_and_one_line_that_names_the_first_missing_one(script, call):
    done = call(script)
    assert (done.code, done.out) == (2, '')
    assert done.err.startswith('usage: ')
    assert f'{script}: error: ' in done.err.splitlines()[-1]
    assert 'data_path' in done.err.splitlines()[-1]
    assert 'unused' not in done.err


@pytest.mark.parametrize('script', [script for script in COMMANDS if script != 'pretrain.py'])
def test_one_argument_too_few_is_named(script, call):
    done = call(script, *COMMANDS[script][:-1])
    last = {'init.py': 'high_range', 'training.py': 'timestamp'}.get(script, 'timestamp1')
    assert done.code == 2
    assert last in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ('place', 'value', 'name'),
    [
        (1, 'first', 'current_fold'),
        (1, -1, 'current_fold'),
        (2, 0, 'organ_number'),
        (3, 'nan', 'low_range'),
        (4, -100, 'high_range'),  # not above low_range
        (5, -0.5, 'slice_threshold'),
        (6, 2, 'slice_thickness'),
        (7, 2, 'organ_ID'),  # above organ_number
        (8, 'A', 'plane'),
        (10, '1e-5,', 'learning_rate1'),
        (10, 0, 'learning_rate1'),
        (11, 'x10', 'learning_rate_m1'),
        (14, 2.5, 'crop_margin'),
        (15, 1.5, 'crop_prob'),
        (16, 0, 'crop_sample_batch'),
        (17, -2, 'epoch_S'),
        (20, 0, 'lr_decay_epoch'),
    ],
)
def test_a_wrong_value_ends_with_2_and_is_named(place, value, name, call):
    args = training_args('data')
    args[place] = value
    done = call('training.py', *args)
    assert (done.code, done.out) == (2, '')
    assert f'argument {name}: ' in done.err.splitlines()[-1]


def test_unused_and_extra_trailing_arguments_are_accepted():
    made = arguments.stage_parser('', arguments.TESTING, arguments.TESTING_OPTIONAL)
    args = arguments.parse(made, [*map(str, training_args('data')), '20261123_000000', 'one', 'more'])
    assert (args.timestamp1, args.timestamp2) == ('_', '20261123_000000')


def test_options_stand_before_or_after_the_positionals():
    made = arguments.stage_parser('', arguments.TRAINING)
    arguments.add_training(made)
    positionals = list(map(str, training_args('data')))
    assert arguments.parse(made, ['--seed', '3', *positionals]).seed == 3
    assert arguments.parse(made, [*positionals, '--seed', '3']).seed == 3


@pytest.mark.parametrize('low', ['-100', '-100.5', '-1e2'])
def test_negative_numbers_are_numbers_and_not_options(low):
    made = arguments.stage_parser('', 'data_path organ_number folds low_range high_range'.split())
    assert arguments.parse(made, ['data', '1', '4', low, '240']).low_range == float(low)


def test_rates_are_kept_as_typed():
    made = arguments.stage_parser('', arguments.TRAINING)
    args = arguments.parse(made, list(map(str, training_args('data'))))
    assert (args.learning_rate1, args.learning_rate_m1) == ('1e-5', '10')


@pytest.mark.parametrize('script', [script for script in COMMANDS if script != 'init.py'])
def test_a_users_mistake_is_one_line_and_exit_code_1(script, call, tmp_path):
    args = COMMANDS[script].copy()
    args[0] = tmp_path / 'no such folder'
    done = call(script, *args)
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(f'{script}: error: {tmp_path}')
    assert 'init.py' in done.err, 'the cure is named'
    assert not any(tmp_path.iterdir()), 'nothing is left behind'


def test_no_cases_at_all_is_one_line_and_exit_code_1(tmp_path):
    done = run_script('init.py', tmp_path, *INIT[1:], cwd='/')  # a process of its own, any working directory
    assert done.code == 1
    assert done.err.splitlines() == [
        f'init.py: error: {tmp_path}: no images/*.npy with labels/*.npy of the same name; convert the scans first'
    ]


def test_the_first_line_says_which_device(tested, call):
    assert call('coarse_testing.py', *training_args(tested)).out.startswith('device: CPU')
    args = training_args(tested)
    args[9] = 0
    device = 'cuda:0' if torch.cuda.is_available() else 'CPU'  # without CUDA a device number is no mistake
    assert call('coarse_testing.py', *args).out.startswith(f'device: {device}')


def test_importing_a_module_does_nothing(tmp_path):
    modules = [path.stem for path in sorted(CODE.glob('*.py'))]
    code = f'import {", ".join(modules)}'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=False, env=os.environ | {'PYTHONPATH': str(CODE)},
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert not any(tmp_path.iterdir())


def test_nothing_compiled_or_wrapped_is_committed():
    if not (REPO / '.git').exists():
        pytest.skip('not a clone')
    files = subprocess.run(['git', 'ls-files'], cwd=REPO, capture_output=True, text=True, check=True).stdout.split('\n')
    assert not [file for file in files if file.endswith(('.so', '.pyc', '.o')) or '_wrap.' in file]


# --- signals -------------------------------------------------------------------------------------------------------

SWALLOWED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from running import script
def main():
    try:
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    except KeyboardInterrupt:
        raise TypeError('as numpy makes of it')
script.run(main)
"""


@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 143), ('SIGINT', 130)])
def test_a_signal_that_a_library_makes_another_error_of_ends_as_a_signal_does(name, code):
    done = subprocess.run([sys.executable, '-c', SWALLOWED, CODE, name], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, '')


def test_the_first_signal_waits_for_the_end_of_a_block_and_the_second_does_not():
    signal.signal(signal.SIGTERM, script._Signals.answer)
    try:
        done = []
        with pytest.raises(script.Terminated), script.uninterrupted() as signalled:
            assert signalled() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signalled() is script.Terminated
            done.append('first')
        with pytest.raises(script.Terminated), script.uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append('second')
        assert done == ['first']
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        script._Signals.raised = None


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_python_without_packages_is_one_line_that_says_how_to_install_them(name):
    command = [sys.executable, '-ES', CODE / name]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1), done.stderr
    assert done.stderr.startswith(f'{name}: error: No module named ')
    assert done.stderr.endswith(f"install it: {sys.executable} -m pip install -r '{REPO}/requirements.txt'\n")
