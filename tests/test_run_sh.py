"""run.sh as a user runs it: lazy mode on a tiny phantom, one stage again, dry runs, settings that are refused, failures,
several GPUs, signals.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

STAGES = [
    'conversion (dicom2npy.py)', 'conversion (nii2npy.py)', 'initialization', 'a look at the data', 'pretraining', 'training',
    'coarse testing', 'coarse fusion', 'oracle testing', 'oracle fusion', 'coarse-to-fine testing', 'report',
]  # fmt: skip
TINY = {'PRETRAINING_WIDTH': '4', 'PRETRAINING_EPOCHS': '1', 'TRAINING_EPOCH_S': '1', 'TRAINING_EPOCH_I': '1',
        'TRAINING_EPOCH_J': '1', 'LR_DECAY_EPOCH_J_STEP': '1', 'FOLDS': '2', 'MAX_ROUNDS': '2',
        'CURRENT_GPU': 'cpu', 'SEED': '1'}  # fmt: skip
NEEDED = ('PATH', 'HOME', 'LANG', 'TMPDIR', 'LD_LIBRARY_PATH', 'OMP_NUM_THREADS')


def environment(**flags):
    """The environment of a run: nothing of the tester's own settings."""
    kept = {name: os.environ[name] for name in NEEDED if name in os.environ}
    return kept | {'PYTHON': sys.executable} | {name: str(value) for name, value in flags.items()}


def run_sh(cwd='/', **flags):
    return subprocess.run(
        ['bash', REPO / 'run.sh'],
        cwd=cwd,
        env=environment(**flags),
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )


def stages(out):
    return [line.removeprefix('#### ') for line in out.splitlines() if line.startswith('#### ')]


@pytest.fixture(scope='module')
def lazy(tmp_path_factory):
    """LAZY_MODE=1 on a tiny phantom's raw data; in the paths are blanks."""
    folder = tmp_path_factory.mktemp('lazy mode')
    raw, data = folder / 'raw data', folder / 'my data'
    made = [sys.executable, REPO / 'DATA2NPY/make_phantom.py', raw, '--size', '32', '32', '16', '--cases', '4']
    subprocess.run(made, check=True, capture_output=True)
    done = run_sh(LAZY_MODE=1, RAW_PATH=raw, DATA_PATH=data, **TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return SimpleNamespace(raw=raw, data=data, out=done.stdout)


def test_lazy_mode_runs_every_stage_in_order(lazy):
    assert stages(lazy.out) == STAGES
    assert 'DEMO' not in lazy.out, 'the demo settings are for the built-in phantom only'
    assert lazy.out.splitlines()[-1].startswith(f'written: {lazy.data}/report/index.html')


def test_lazy_mode_leaves_all_results_of_three_planes(lazy):
    logs = sorted(path.name for path in (lazy.data / 'logs').iterdir())
    stamp = re.fullmatch(r'FD0:X3_1_(\d{8}_\d{6})\.txt', logs[0])[1]
    assert logs == [f'FD0:{plane}3_1_{stamp}.txt' for plane in 'XYZ']
    for name in logs:
        assert (lazy.data / 'logs' / name).read_text().splitlines()[-1].endswith('J training stage!')
    snapshots = lazy.data / 'models/snapshots/SIJ_training_1e-5x10,20'
    assert sorted(path.name for path in snapshots.glob('*.pkl')) == sorted(
        f'FD0:{plane}{mode}3_1_{stamp}.pkl' for plane in 'XYZ' for mode in 'SIJ'
    )
    x, y, z = (f'{plane}J3_1_{stamp}' for plane in 'XYZ')
    for folder in (
        *(f'{stage}_testing_1e-5x10,20/FD0:{name}.pkl' for stage in ('coarse', 'oracle') for name in (x, y, z)),
        *(f'{s}_testing_1e-5x10,20/FD0:fusion:{x}.pkl,{y}.pkl,{z}.pkl_e1111,0.5' for s in ('coarse', 'oracle')),
        f'coarse2fine_testing_1e-5x10,20/FD0:{x},{y},{z}:e1111_0.5_0.5,2',
    ):
        assert (lazy.data / 'results' / folder / 'results.txt').stat().st_size > 100, folder
    assert len(list((lazy.data / 'results').rglob('results.txt'))) == 9


def test_one_stage_again_takes_the_newest_snapshots_and_the_stored_volumes(lazy):
    folder = lazy.data / 'results'
    results = next(folder.glob('coarse2fine*/*/results.txt'))
    before = results.read_text()
    results.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob('*.npz')}
    for path in (lazy.data / 'models/snapshots/SIJ_training_1e-5x10,20').glob('*J3_1_*'):  # an older training
        shutil.copy(path, path.with_name(re.sub(r'_\d{8}_\d{6}', '_20000101_000000', path.name)))
    done = run_sh(ENABLE_COARSE2FINE_TESTING=1, DATA_PATH=lazy.data, **TINY)
    assert done.returncode == 0, done.stderr
    assert stages(done.stdout) == ['coarse-to-fine testing']
    assert 'tests the training 2' in done.stdout
    assert results.read_text() == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*.npz')} == times


def test_lazy_mode_again_converts_and_initializes_only_what_has_changed(lazy, tmp_path):
    data = shutil.copytree(lazy.data, tmp_path / 'moved')
    pretrained = next((data / 'models/pretrained').glob('*.pth'))
    pretrained.write_bytes(b'')  # the run ends when training begins
    flags = TINY | {'LAZY_MODE': 1, 'RAW_PATH': lazy.raw, 'DATA_PATH': data}
    same = run_sh(**flags).stdout
    assert same.count(f'converted before: nothing in {lazy.raw} has changed') == 2
    assert 'initialized before: nothing has changed' in same and 'models/pretrained holds an FCN-8s' in same
    label = next(lazy.raw.rglob('label0001.nii.gz'))
    label.write_bytes(label.read_bytes())
    changed = run_sh(**flags).stdout
    assert 'before' not in changed and f'4 cases in 2 folds, lists in {data}' in changed
    assert stages(same) == stages(changed) == STAGES[:6]
    asked = run_sh(
        **flags | {'LAZY_MODE': 0, 'ENABLE_DICOM2NPY': 1, 'ENABLE_INITIALIZATION': 1, 'ENABLE_CHECK_DATA': 0}
    )
    assert (asked.returncode, 'before' in asked.stdout) == (0, False), 'a stage that is asked for runs'


def test_lazy_mode_takes_no_start_that_was_made_with_other_settings(lazy):
    flags = TINY | {'LAZY_MODE': 1, 'RAW_PATH': lazy.raw, 'DATA_PATH': lazy.data, 'DRY_RUN': 1}
    assert run_sh(**flags).returncode == 0
    wider = run_sh(**flags | {'PRETRAINING_WIDTH': 5})
    assert wider.returncode != 0 and 'was made with width ' in wider.stderr and 'not width 5,' in wider.stderr
    assert run_sh(**flags | {'PRETRAINING_WIDTH': 5, 'ENABLE_PRETRAINING': 1}).returncode == 0


def test_a_relative_data_path_is_seen_from_where_one_stands(lazy):
    done = run_sh(cwd=lazy.data.parent, ENABLE_COARSE_FUSION=1, DATA_PATH=lazy.data.name, **TINY)
    assert done.returncode == 0, done.stderr


def commands(out):
    """[(script, arguments)] of a dry run."""
    found = [shlex.split(line) for line in out.splitlines() if line and not line.startswith('#')]
    assert all(words[1].startswith(str(REPO)) for words in found)
    return [(words[1].removeprefix(f'{REPO}/'), words[2:]) for words in found]


class Parsed(Exception):
    """The arguments were understood."""


@pytest.fixture
def parsed(monkeypatch):
    """parsed(script, arguments): what the script's own parser makes of them; the script goes no further."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **keywords):
        raise Parsed(parse_args(parser, *args, **keywords))

    def parsed(script, arguments):
        monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
        monkeypatch.setattr(sys, 'argv', [script, *arguments])
        with pytest.raises(Parsed) as end:
            runpy.run_path(str(REPO / script), run_name='__main__')
        return end.value.args[0]

    return parsed


def test_a_dry_run_of_lazy_mode_prints_commands_that_the_scripts_understand_and_does_nothing(tmp_path, parsed):
    data = tmp_path / 'my data'
    done = run_sh(DRY_RUN=1, LAZY_MODE=1, DATA_PATH=data)
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir()), 'nothing is created'
    found = commands(done.stdout)
    three = ['X', 'Y', 'Z']
    assert [script.split('/')[1] for script, _ in found] == [
        'make_phantom.py', 'dicom2npy.py', 'nii2npy.py', 'init.py', 'check_data.py', 'pretrain.py', *['training.py'] * 3,
        *['coarse_testing.py'] * 3, 'coarse_fusion.py', *['oracle_testing.py'] * 3, 'oracle_fusion.py',
        'coarse2fine_testing.py', 'report.py',
    ]  # fmt: skip
    understood = [(script, parsed(script, arguments)) for script, arguments in found]
    assert all(args.data_path == str(data) for script, args in understood if script.startswith('OrganSegRSTN'))
    assert [args.plane for script, args in understood if script.endswith('training.py')] == three
    assert [args.plane for script, args in understood if script.endswith('coarse_testing.py')] == three
    training, testing = (dict(understood)[f'OrganSegRSTN/{name}.py'] for name in ('training', 'coarse2fine_testing'))
    assert len(training.timestamp) == 15
    assert testing.timestamp1_X == testing.timestamp1_Z == training.timestamp
    assert training.resume and dict(understood)['OrganSegRSTN/pretrain.py'].resume


def test_a_dry_run_of_users_data_has_the_published_defaults(tmp_path, parsed):
    (tmp_path / 'raw').mkdir()
    done = run_sh(DRY_RUN=1, LAZY_MODE=1, DATA_PATH=tmp_path / 'data', RAW_PATH=tmp_path / 'raw', CURRENT_FOLD=2)
    found = dict(commands(done.stdout))
    assert 'DATA2NPY/make_phantom.py' not in found
    args = vars(parsed('OrganSegRSTN/training.py', found['OrganSegRSTN/training.py']))
    defaults = {'organ_number': 1, 'low_range': -100, 'high_range': 240, 'slice_threshold': 0.98, 'slice_thickness': 3,
                'learning_rate1': '1e-5', 'learning_rate_m1': '10', 'learning_rate2': '1e-5', 'learning_rate_m2': '10',
                'crop_margin': 20, 'crop_prob': 0.5, 'crop_sample_batch': 1, 'epoch_S': 2, 'epoch_I': 6, 'epoch_J': 8,
                'lr_decay_epoch': 2, 'organ_ID': 1, 'current_fold': 2, 'GPU_ID': '2'}  # fmt: skip
    assert {name: args[name] for name in defaults} == defaults
    args = parsed('OrganSegRSTN/coarse2fine_testing.py', found['OrganSegRSTN/coarse2fine_testing.py'])
    assert (args.coarse_threshold, args.fine_threshold, args.max_rounds) == (0.5, 0.5, 10)
    assert parsed('OrganSegRSTN/init.py', found['OrganSegRSTN/init.py']).folds == 4


IMAGES = {
    'images/a.nii': False,
    'imagesTr/a_0000.nii.gz': False,
    'images/a.nrrd': False,
    'images/a b.MHA': False,
    'imagesTr/a.mhd': False,
    'imagesTs/a.nii.gz': True,  # scans to predict on, which nii2npy.py leaves out
    'images/a.dcm': True,
    'images/notes.nii.txt': True,
}


@pytest.mark.parametrize(('name', 'as_dicom'), IMAGES.items())
def test_lazy_mode_looks_for_dicom_unless_there_are_images_that_nii2npy_reads(tmp_path, name, as_dicom):
    (tmp_path / 'my raw' / name).parent.mkdir(parents=True)
    (tmp_path / 'my raw' / name).touch()
    done = run_sh(DRY_RUN=1, LAZY_MODE=1, DATA_PATH=tmp_path / 'data', RAW_PATH=tmp_path / 'my raw')
    assert ('DATA2NPY/dicom2npy.py' in dict(commands(done.stdout))) == as_dicom


def test_without_a_switch_nothing_is_done(tmp_path):
    done = run_sh(DATA_PATH=tmp_path / 'data')
    assert (done.returncode, stages(done.stdout)) == (0, [])
    assert not any(tmp_path.iterdir())


def test_it_runs_through_a_symbolic_link_and_by_bash_only(tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/link').symlink_to(os.path.relpath(REPO / 'run.sh', tmp_path / 'bin'))
    (tmp_path / 'run.sh').symlink_to('bin/link')
    (tmp_path / 'sh').symlink_to(shutil.which('bash'))
    flags = environment(DRY_RUN=1, ENABLE_REPORT=1, CDPATH=REPO)
    done = subprocess.run(['bash', 'run.sh'], cwd=tmp_path, env=flags, check=True, capture_output=True, text=True)
    assert commands(done.stdout) == [
        ('OrganSegRSTN/report.py', [f'{REPO}/data', '--low_range', '-100', '--high_range', '240'])
    ]
    for shell in ('sh', 'dash', tmp_path / 'sh'):
        if shutil.which(shell):
            done = subprocess.run([shell, REPO / 'run.sh'], env=flags, check=False, capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr) == (2, '', 'run.sh needs bash: bash run.sh\n')


def test_overwrite_goes_to_every_stage_that_finds_results_or_lists(tmp_path, parsed):
    flags = {'DRY_RUN': 1, 'DATA_PATH': tmp_path, 'RAW_PATH': tmp_path, 'LAZY_MODE': 1, 'WRITE_NIFTI': 1,
             'ORGAN_NUMBER': 2, 'CURRENT_ORGAN_ID': '1 2'}  # fmt: skip
    for overwrite in (0, 1):
        found = commands(run_sh(**flags, OVERWRITE=overwrite).stdout)
        named = {script.split('/')[1] for script, arguments in found if '--overwrite' in arguments}
        assert named == ({'init.py', 'coarse_testing.py', 'coarse_fusion.py', 'oracle_testing.py', 'oracle_fusion.py',
                          'coarse2fine_testing.py', 'merge_organs.py'} if overwrite else set())  # fmt: skip
    assert all(parsed(*command).overwrite for command in found if '--overwrite' in command[1])


# --- what is refused before anything runs ---------------------------------------------------------------------------

WRONG = {
    'CURRENT_PLANE': ['Q', 'x', 'XY'], 'COARSE_TESTING_PLANE': ['B'], 'CURRENT_FOLD': ['4', '-1', 'all'],
    'CURRENT_ORGAN_ID': ['', ' ', '2', '0', '1 1', '1,2', '*'], 'ORACLE_FUSION_ORGAN_ID': [' ', '2'],
    'ORGAN_NUMBER': ['0', '256', 'one'], 'FOLDS': ['0', '1', '2.5'], 'LOW_RANGE': ['-100,5', 'low', '240', 'nan'],
    'HIGH_RANGE': ['-100', ' '], 'SLICE_THRESHOLD': ['-1', 'most'], 'SLICE_THICKNESS': ['2', '33'],
    'CURRENT_GPU': ['gpu0', '0,', '-1', '0 1'], 'PLANE_GPUS': ['0', 'a b c', ' 0 1 2'], 'PRECISION': ['fp16', 'FP32'],
    'SEED': ['-1', '1.5'], 'LABEL_ORIENTATION': ['turned'], 'PRETRAINING_WIDTH': ['0', '2'],
    'PRETRAINING_EPOCHS': ['0', 'ten'], 'PRETRAINING_LEARNING_RATE': ['0', 'fast'], 'LEARNING_RATE1': ['-1e-5', '1e-', '1e-5,'],
    'LEARNING_RATE_M1': ['x10', '0'], 'TRAINING_MARGIN': ['-1', '20px', '1e1'], 'TRAINING_PROB': ['1.5', '50%'],
    'TRAINING_SAMPLE_BATCH': ['0'], 'TRAINING_EPOCH_S': ['-1', 'two'], 'TRAINING_EPOCH_J': ['0.5'], 'LR_DECAY_EPOCH_J_STEP': ['0'],
    'FINE_ITERATIONS': ['0'], 'COARSE_FUSION_THRESHOLD': ['1.1', '-0.1'], 'MAX_ROUNDS': ['-1', '10 '], 'STOP_DSC': ['99'],
    'TRAINING_TIMESTAMP': ['a/b', 'run1'], 'COARSE2FINE_TIMESTAMP1_Y': ['../x', '20261123_00000'], 'JOINT_FROM': ['1'], 'ENABLE_TRAINING': ['yes'], 'OVERWRITE': ['2'],
    'DRY_RUN': ['no'], 'REPORT_REFERENCE': ['/no/such/file'], 'DATA_PATH': [__file__],
}  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'value'), [(name, value) for name, values in WRONG.items() for value in values], ids=ascii
)
def test_a_setting_that_cannot_be_right_is_refused_by_name(tmp_path, name, value):
    flags = {'DATA_PATH': tmp_path / 'data', 'DRY_RUN': 1, 'LAZY_MODE': 1, 'RAW_PATH': tmp_path, name: value}
    done = run_sh(**flags)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    other = 'LOW_RANGE' if name == 'HIGH_RANGE' else name  # of two that contradict each other the first is named
    assert re.match(f'run.sh: ({name}|{other}) is ', done.stderr) and value.strip() in done.stderr


def test_a_name_that_looks_like_a_setting_and_is_none_gives_a_warning(tmp_path):
    flags = {'ENABLE_TRAINNG': 1, 'PRETRAINING_WITDH': 8, 'TRAINING_GPU': 'cpu', 'COARSE_TESTING_EPOCH_S': 2}
    done = run_sh(DRY_RUN=1, ENABLE_REPORT=1, DATA_PATH=tmp_path / 'data', **flags)
    assert done.returncode == 0 and [line.split()[1] for line in done.stderr.splitlines()] == [
        'ENABLE_TRAINNG', 'PRETRAINING_WITDH'
    ]  # fmt: skip


@pytest.mark.parametrize('switch', ['ENABLE_NII2NPY', 'LAZY_MODE'])
def test_raw_scans_that_are_not_there_are_refused_in_a_dry_run_too(tmp_path, switch):
    done = run_sh(DRY_RUN=1, **{switch: 1}, RAW_PATH=tmp_path / 'raw', DATA_PATH=tmp_path / 'data')
    assert (done.returncode, commands(done.stdout)) == (2, [])
    assert f"RAW_PATH is '{tmp_path / 'raw'}': no such folder" in done.stderr


def test_a_list_of_raw_scans_to_convert_is_needed(tmp_path):
    done = run_sh(ENABLE_NII2NPY=1, DATA_PATH=tmp_path / 'data')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert 'RAW_PATH is empty: name the folder of the raw scans' in done.stderr


def test_one_fold_is_enough_where_nothing_is_trained(tmp_path):
    assert len(commands(run_sh(DRY_RUN=1, ENABLE_COARSE_TESTING=1, FOLDS=1, DATA_PATH=tmp_path).stdout)) == 3


@pytest.mark.parametrize(
    'stage', ['COARSE_TESTING', 'COARSE_FUSION', 'ORACLE_TESTING', 'ORACLE_FUSION', 'FINE_TESTING']
)
@pytest.mark.parametrize(('epochs', 'trained'), [('S', 2), ('I', 6), ('J', 8), ('STEP', 2)])
def test_epochs_that_the_published_run_sh_repeats_must_be_those_of_the_training(tmp_path, stage, epochs, trained):
    flags = {'DRY_RUN': 1, 'ENABLE_COARSE_FUSION': 1, 'DATA_PATH': tmp_path}
    assert run_sh(**flags, **{f'{stage}_EPOCH_{epochs}': trained}).returncode == 0
    done = run_sh(**flags, **{f'{stage}_EPOCH_{epochs}': trained + 1})
    training = 'LR_DECAY_EPOCH_J_STEP' if epochs == 'STEP' else f'TRAINING_EPOCH_{epochs}'
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f"run.sh: {stage}_EPOCH_{epochs} is '{trained + 1}', but {training} is '{trained}'")


def test_a_later_fold_without_pretraining_is_found_before_the_first_is_trained(data):
    (data / 'models/pretrained').mkdir(parents=True)
    (data / 'models/pretrained/fcn8s_FD0_1.pth').touch()
    flags = {'ENABLE_TRAINING': 1, 'DATA_PATH': data, 'CURRENT_FOLD': 'A', 'FOLDS': 2}
    done = run_sh(**flags)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith('run.sh: fold 1, organ 1: no FCN-8s to start from in models/pretrained')
    (data / 'models/pretrained/fcn8s_from_vgg16.pth').touch()
    assert stages(run_sh(**flags).stdout) == ['training'], 'one for all folds'


# --- a python, and a folder for .venv -------------------------------------------------------------------------------


def test_a_python_that_is_missing_or_lacks_numpy_is_one_line(tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'bare'], check=True)
    bare = f'{tmp_path}/bare/bin/python'
    for python, says in (
        ('/no/python', "PYTHON is '/no/python': there is no such command"),
        ('false', "PYTHON is 'false', which does not start as python 3.10 or newer"),
        (bare, f"install them: {bare} -m pip install -r '{REPO}/requirements.txt'"),
    ):
        done = run_sh(ENABLE_REPORT=1, DATA_PATH=tmp_path, PYTHON=python)
        assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1)
        assert says in done.stderr
    assert 'lacks torch numpy scipy' in done.stderr


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which('setpriv'), reason='root writes anywhere')
def test_a_repository_that_cannot_be_written_to_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        for name in ('run.sh', 'plumbing.sh', 'setup.sh', 'requirements.txt'):
            shutil.copy(REPO / name, folder)
        shutil.copytree(REPO / 'SWIG_fast_functions', f'{folder}/SWIG_fast_functions')
        os.chmod(folder, 0o555)
        user = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'] if os.getuid() == 0 else []
        command = [*user, 'bash', f'{folder}/run.sh']
        done = subprocess.run(
            command, env=environment(ENABLE_REPORT=1, PYTHON=''), cwd='/', check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr == (
            f'{folder} cannot be written to, so .venv cannot be made there; name a python that has requirements.txt '
            'installed: PYTHON=... bash run.sh\n'
        )
        os.chmod(folder, 0o755)


# --- what runs, and how it fails ------------------------------------------------------------------------------------


def test_a_past_training_is_tested_by_its_timestamp_and_one_plane_alone(tmp_path, parsed):
    done = run_sh(DRY_RUN=1, ENABLE_COARSE_TESTING=1, ENABLE_COARSE2FINE_TESTING=1, DATA_PATH=tmp_path, CURRENT_PLANE='Y',
                  COARSE_TIMESTAMP1='20250101_000000', COARSE2FINE_TIMESTAMP1_Z='20250102_000000')  # fmt: skip
    (one, first), (two, second) = commands(done.stdout)
    assert (parsed(one, first).plane, parsed(one, first).timestamp1) == ('Y', '20250101_000000')
    assert (parsed(two, second).timestamp1_X, parsed(two, second).timestamp1_Z) == ('_', '20250102_000000')


def test_a_failing_stage_stops_the_run_and_is_named_last(tmp_path):
    done = run_sh(ENABLE_INITIALIZATION=1, ENABLE_COARSE_FUSION=1, DATA_PATH=tmp_path)
    assert done.returncode == 1
    assert stages(done.stdout) == ['initialization']
    assert done.stderr.splitlines()[-1] == 'run.sh: stopped in initialization (exit code 1)'


def test_a_failing_training_does_not_hide_behind_its_log_and_leaves_nothing_to_go_on_from(data):
    (data / 'models/pretrained').mkdir(parents=True)
    (data / 'models/pretrained/fcn8s_FD0_1.pth').write_bytes(b'no weights')
    done = run_sh(ENABLE_TRAINING=1, ENABLE_COARSE_TESTING=1, DATA_PATH=data)
    assert done.returncode == 1
    assert stages(done.stdout) == ['training']
    log, error, stopped = next((data / 'logs').iterdir()), *done.stderr.splitlines()
    assert stopped == 'run.sh: stopped in training of fold 0, organ 1, plane X (exit code 1)'
    assert 'fcn8s_FD0_1.pth' in error and 'fcn8s_FD0_1.pth' in log.read_text()


def test_ctrl_c_in_training_keeps_snapshot_and_log_and_runs_nothing_more(lazy, data):
    (data / 'models').mkdir()
    shutil.copytree(lazy.data / 'models/pretrained', data / 'models/pretrained')
    flags = TINY | {'TRAINING_EPOCH_S': '10000', 'TRAINING_TIMESTAMP': '_'}
    process = subprocess.Popen(
        ['bash', REPO / 'run.sh'], env=environment(ENABLE_TRAINING=1, ENABLE_COARSE_TESTING=1, DATA_PATH=data, **flags),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = data / 'logs/FD0:X3_1.txt'
    deadline = time.time() + 120
    while not (log.exists() and 'Iter[00002]' in log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert stages(out) == ['training']
    assert (data / 'models/snapshots/SIJ_training_1e-5x10,20/FD0:XS3_1.pkl').exists()
    *_, saved, ended = log.read_text().splitlines()
    assert '0XS interrupted: saved as it was' in saved and ended == 'ended by KeyboardInterrupt'


def test_fold_A_and_several_organs_are_all_folds_of_each(tmp_path, parsed):
    done = run_sh(DRY_RUN=1, ENABLE_COARSE2FINE_TESTING=1, DATA_PATH=tmp_path, CURRENT_FOLD='A', FOLDS=2,
                  CURRENT_ORGAN_ID='1 3', ORGAN_NUMBER=3, STOP_DSC='0.99')  # fmt: skip
    found = [parsed(*command) for command in commands(done.stdout)]
    assert [(args.current_fold, args.organ_ID) for args in found] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert {(args.GPU_ID, args.stop_DSC) for args in found} == {('0', 0.99)}


def test_several_organs_as_nifti_are_merged_fold_by_fold_after_all_are_tested(tmp_path, parsed):
    flags = {'DRY_RUN': 1, 'ENABLE_COARSE2FINE_TESTING': 1, 'DATA_PATH': tmp_path, 'CURRENT_FOLD': 'A', 'FOLDS': 2,
             'ORGAN_NUMBER': 3, 'WRITE_NIFTI': 1, 'STOP_DSC': '0.99'}  # fmt: skip
    found = [parsed(*command) for command in commands(run_sh(**flags, CURRENT_ORGAN_ID='1 3').stdout)]
    tests, merges = found[:4], found[4:]
    assert all(args.probability and args.nifti for args in tests)
    assert [(args.current_fold, args.organ_IDs) for args in merges] == [(0, [1, 3]), (1, [1, 3])]
    shared = vars(tests[0]).keys() & vars(merges[0]).keys() - {'organ_ID'}
    assert {name: getattr(tests[0], name) for name in shared} == {name: getattr(merges[0], name) for name in shared}
    assert len(commands(run_sh(**flags, CURRENT_ORGAN_ID=' 1 ').stdout)) == 2, 'one organ: nothing to merge'
    assert len(commands(run_sh(**flags | {'WRITE_NIFTI': 0}, CURRENT_ORGAN_ID='1 3').stdout)) == 4


def test_the_demos_settings_go_with_its_folder_which_takes_no_other_scans(tmp_path, parsed):
    (tmp_path / 'phantom').mkdir()
    done = run_sh(DRY_RUN=1, ENABLE_COARSE2FINE_TESTING=1, DATA_PATH=tmp_path)
    [command] = commands(done.stdout)
    assert parsed(*command).learning_rate1 == '1e-3'
    done = run_sh(DRY_RUN=1, LAZY_MODE=1, DATA_PATH=tmp_path, RAW_PATH=tmp_path / 'raw')
    assert (done.returncode, commands(done.stdout)) == (2, [])
    assert "is the demo's folder: name another DATA_PATH" in done.stderr


# --- several GPUs, and signals -------------------------------------------------------------------------------------


def launched(out):
    """[(processes or None, script, arguments)] of a dry run in which torchrun may start scripts."""
    found = []
    for line in out.splitlines():
        if line and not line.startswith('#'):
            words = [word for word in shlex.split(line) if not word.startswith('OMP_NUM_THREADS=')][1:]
            processes = None
            if words[:2] == ['-m', 'torch.distributed.run']:
                processes = ' '.join(words[2 : (place := words.index('--nproc_per_node') + 2)])
                words = words[place:]
            found.append((processes, words[0].removeprefix(f'{REPO}/OrganSegRSTN/'), words[1:]))
    return found


def test_a_stage_on_several_gpus_is_started_by_torchrun_with_a_process_for_each(tmp_path):
    done = run_sh(DRY_RUN=1, ENABLE_PRETRAINING=1, ENABLE_TRAINING=1, ENABLE_COARSE_TESTING=1, ENABLE_COARSE_FUSION=1,
                  ENABLE_ORACLE_TESTING=1, ENABLE_COARSE2FINE_TESTING=1, DATA_PATH=tmp_path, CURRENT_PLANE='Y', CURRENT_GPU='5,6',
                  TRAINING_GPU='0,1,2,3', COARSE2FINE_TESTING_GPU='1')  # fmt: skip
    found = launched(done.stdout)
    assert [(processes, script) for processes, script, _ in found] == [
        (None, 'pretrain.py'), ('--standalone --nproc_per_node 4', 'training_parallel.py'),
        ('--standalone --nproc_per_node 2', 'coarse_testing.py'), (None, 'coarse_fusion.py'),
        ('--standalone --nproc_per_node 2', 'oracle_testing.py'), (None, 'coarse2fine_testing.py'),
    ]  # fmt: skip
    assert [arguments[8] for _, script, arguments in found if script == 'pretrain.py'] == ['0']
    assert [arguments[9] for _, script, arguments in found if script.startswith('training')] == ['0,1,2,3']
    assert [arguments[9] for _, script, arguments in found if script == 'coarse_testing.py'] == ['5,6']


@pytest.mark.parametrize(
    ('nproc', 'getconf', 'threads'),
    [('echo 12', 'echo 64', 6), ('exit 127', 'echo 8', 4), ('echo 1', 'echo 64', 1)],
)
def test_processes_side_by_side_share_the_cores_unless_the_user_says_how(
    tmp_path, monkeypatch, nproc, getconf, threads
):
    for name, line in (('nproc', nproc), ('getconf', getconf)):
        (tmp_path / name).write_text(f'#!/bin/sh\n{line}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    flags = {
        'DRY_RUN': 1,
        'ENABLE_COARSE_TESTING': 1,
        'DATA_PATH': tmp_path,
        'CURRENT_PLANE': 'Y',
        'CURRENT_GPU': '0,1',
    }
    assert run_sh(**flags, OMP_NUM_THREADS='').stdout.splitlines()[1].startswith(f'OMP_NUM_THREADS={threads} ')
    assert 'OMP_NUM_THREADS' not in run_sh(**flags, OMP_NUM_THREADS=3).stdout


def test_several_machines_are_told_to_torchrun(tmp_path):
    there = '--nnodes 2 --rdzv_backend c10d --rdzv_endpoint host:29500'
    done = run_sh(
        DRY_RUN=1, ENABLE_TRAINING=1, DATA_PATH=tmp_path, CURRENT_PLANE='Z', CURRENT_GPU=0, TORCHRUN_ARGS=there
    )
    [(processes, script, _)] = launched(done.stdout)
    assert (processes, script) == (f'{there} --nproc_per_node 1', 'training_parallel.py')


def test_plane_gpus_are_one_for_each_plane_and_the_first_for_what_takes_one(tmp_path):
    flags = {'DRY_RUN': 1, 'ENABLE_PRETRAINING': 1, 'ENABLE_TRAINING': 1, 'ENABLE_COARSE_TESTING': 1,
             'ENABLE_COARSE2FINE_TESTING': 1, 'DATA_PATH': tmp_path}  # fmt: skip
    found = launched(run_sh(**flags, PLANE_GPUS='4 cpu 6').stdout)
    assert [(script, arguments[8:10]) for _, script, arguments in found if script in ('training.py', 'coarse_testing.py')] == [
        (script, [plane, gpu])
        for script in ('training.py', 'coarse_testing.py')
        for plane, gpu in (('X', '4'), ('Y', 'cpu'), ('Z', '6'))
    ]  # fmt: skip
    one = [arguments[8] for _, script, arguments in found if script in ('pretrain.py', 'coarse2fine_testing.py')]
    assert one == ['4', '4']
    found = launched(run_sh(**flags, PLANE_GPUS='4 cpu').stdout)
    planes = [arguments[8:10] for _, script, arguments in found if script == 'training.py']
    assert planes == [['X', '4'], ['Y', 'cpu'], ['Z', '4']]


SETTINGS = {'TRAINING_MARGIN': '4', 'TRAINING_EPOCH_S': '1', 'TRAINING_EPOCH_I': '1', 'TRAINING_EPOCH_J': '1',
            'LR_DECAY_EPOCH_J_STEP': '1', 'CURRENT_GPU': 'cpu', 'PLANE_GPUS': 'cpu cpu cpu'}  # fmt: skip


@pytest.mark.parametrize(('gpus', 'lost'), [('cpu cpu cpu', 'Y'), ('cpu cpu', 'X')])
def test_planes_at_once_mark_their_lines_and_a_failure_of_one_ends_the_stage_and_names_it(gpus, lost, tested):
    next(tested.glob(f'models/snapshots/*/FD0:{lost}J3_1.pkl')).unlink()
    flags = SETTINGS | {'PLANE_GPUS': gpus}
    done = run_sh(ENABLE_COARSE_TESTING=1, ENABLE_COARSE_FUSION=1, DATA_PATH=tested, **flags)
    assert done.returncode == 1
    assert stages(done.stdout) == ['coarse testing']
    said = [line for line in done.stdout.splitlines() if not line.startswith('#')]
    assert {line[:3] for line in said} == {'X: ', 'Y: ', 'Z: '}
    order = ''.join(line[0] for line in said)
    assert gpus != 'cpu cpu' or order.rindex('X') < order.index('Z'), 'Z follows X'
    written = [line[0] for line in said if line[3:].startswith('written: ')]
    assert sorted(written) == sorted({*'XYZ'} - {lost})
    assert done.stderr.splitlines() == [
        f'run.sh: coarse testing of fold 0, organ 1, plane {lost} failed (exit code 1)',
        f'run.sh: stopped in coarse testing of fold 0, organ 1, plane {lost} (exit code 1)',
    ]


WAITS = """
import sys, time
def hook(event, args):
    if event == 'os.rename' and str(args[1]).endswith('e1111_2.npz'):
        open(str(args[1]) + '.waits', 'w').close()
        time.sleep(600)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_run_sh_ends_all_planes_before_it_ends(tested, tmp_path, number, code):
    (tmp_path / 'sitecustomize.py').write_text(WAITS)
    process = subprocess.Popen(
        ['bash', REPO / 'run.sh'], env=environment(ENABLE_COARSE_TESTING=1, DATA_PATH=tested, PYTHONPATH=tmp_path, **SETTINGS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 300
    while len(list(tested.rglob('*.waits'))) < 3 and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    stopped = [line[0] for line in out.splitlines() if line[3:].startswith('stopped: the volumes in')]
    assert sorted(stopped) == ['X', 'Y', 'Z']
    assert err.splitlines()[-1].startswith('run.sh: stopped in coarse testing of fold 0, organ 1')
    assert [path.name for path in tested.rglob('.*')] == ['.checksums.json']


def test_a_stopped_training_of_run_shs_own_timestamp_says_how_to_go_on(lazy, data):
    shutil.copytree(lazy.data / 'models/pretrained', data / 'models/pretrained')
    flags = TINY | {'ENABLE_TRAINING': 1, 'DATA_PATH': data, 'CURRENT_PLANE': 'X'}
    command = {'args': ['bash', REPO / 'run.sh'], 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(**command, env=environment(**flags)) as process:
        for line in process.stdout:
            if 'Iter[00002]' in line:
                process.terminate()
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    (checkpoint,) = (data / 'models/snapshots').glob('*/*.ckpt')
    stamp = checkpoint.stem.split('_', 2)[2]
    assert f'to go on where it stopped: TRAINING_TIMESTAMP={stamp} before the same command' in err
    done = run_sh(**flags, TRAINING_TIMESTAMP=stamp)
    assert done.returncode == 0 and f'resumed from: {checkpoint}' in done.stdout


def test_a_start_that_would_not_be_used_is_refused(tmp_path):
    run = {'DRY_RUN': 1, 'DATA_PATH': tmp_path, 'ENABLE_PRETRAINING': 1, 'ENABLE_TRAINING': 1}
    for flags, words in (
        ({'PRETRAINED_FURTHER': 1}, 'PRETRAINED_FURTHER is 1, but PRETRAINED is empty'),
        ({'PRETRAINED': 'vgg16', 'PRETRAINING_WIDTH': 12}, 'the weights of PRETRAINED are of width 64'),
    ):
        done = run_sh(**run, **flags)
        assert done.returncode == 2 and words in done.stderr
    assert run_sh(**run).returncode == 0
    converted = tmp_path / 'models/pretrained/fcn8s_from_vgg16.pth'
    converted.parent.mkdir(parents=True)
    converted.touch()
    done = run_sh(**run)
    assert done.returncode == 2 and f'{converted}: training would start from it' in done.stderr
    assert run_sh(**run | {'ENABLE_PRETRAINING': 0}).returncode == 0
    converted.rename(converted.with_name('fcn8s_FD0_1.pth'))
    done = run_sh(**run | {'ENABLE_PRETRAINING': 0, 'DRY_RUN': 0}, PRETRAINED='vgg16')
    assert done.returncode == 2 and 'no FCN-8s to start from in models/pretrained, made of vgg16' in done.stderr


def test_training_starts_from_what_PRETRAINED_was_converted_to(tmp_path):
    folder = tmp_path / 'models/pretrained'
    for path in (folder / 'fcn8s_from_caffe.pth', tmp_path / 'images/a.npy'):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    torch.save({'conv1_1.weight': torch.zeros(1)}, tmp_path / 'my.pth')
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'my vgg.pth')
    lazy = {'DRY_RUN': 1, 'DATA_PATH': tmp_path, 'LAZY_MODE': 1}
    for name in ('vgg16', tmp_path / 'my.pth'):
        said = run_sh(**lazy, PRETRAINED=name).stdout
        start = 'vgg16' if name == 'vgg16' else 'caffe'
        assert f'--convert {name}' in said and f'--pretrained {folder}/fcn8s_from_{start}.pth' in said
    (folder / 'fcn8s_from_vgg16.pth').touch()
    for name, start in (('vgg16', 'vgg16'), (tmp_path / 'my vgg.pth', 'vgg16'), (tmp_path / 'my.pth', 'caffe')):
        said = run_sh(**lazy, PRETRAINED=name).stdout
        assert ('--convert' in said) == (name != 'vgg16'), 'a file is converted anew: what is there may be of another'
        assert f'--pretrained {folder}/fcn8s_from_{start}.pth' in said
    assert '--pretrained' not in run_sh(**lazy).stdout
    done = run_sh(**lazy, PRETRAINING_WIDTH=16)
    assert (
        done.returncode == 2 and 'PRETRAINING_WIDTH is 16, but training would start from the converted' in done.stderr
    )


def test_fold_A_leaves_no_fold_out(tmp_path):
    (tmp_path / 'lists').mkdir()
    (tmp_path / 'lists/training_FD4.txt').touch()
    run = {'DRY_RUN': 1, 'DATA_PATH': tmp_path, 'ENABLE_COARSE_TESTING': 1, 'CURRENT_FOLD': 'A'}
    done = run_sh(**run)
    assert done.returncode == 2 and f'FOLDS is 4, but {tmp_path}/lists holds more folds' in done.stderr
    report = {'ENABLE_COARSE_TESTING': 0, 'ENABLE_REPORT': 1}
    for flags in ({'FOLDS': 5}, {'CURRENT_FOLD': 0}, {'ENABLE_INITIALIZATION': 1}, report):
        assert run_sh(**run | flags).returncode == 0


def test_weights_from_outside_recipe_steps_and_averages_reach_the_scripts(tmp_path):
    flags = {
        'DRY_RUN': 1, 'DATA_PATH': tmp_path, 'CURRENT_PLANE': 'Z', 'ENABLE_PRETRAINING': 1, 'ENABLE_TRAINING': 1,
        'ENABLE_COARSE_TESTING': 1, 'ENABLE_COARSE2FINE_TESTING': 1, 'RECIPE': 'fast', 'PRETRAINED': 'vgg16',
        'PRETRAINED_FURTHER': 1, 'SNAPSHOT_STEPS': 500, 'AVERAGE': 3, 'JOINT_FROM': '_', 'LEARNING_RATE2': '1e-6',
    }  # fmt: skip
    done = run_sh(**flags)
    assert done.returncode == 0, done.stderr
    found = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith('#')]
    further, training, coarse, coarse2fine = (' '.join(words) for words in found)
    folder = tmp_path / 'models/pretrained'
    assert further.endswith('--convert vgg16 --further')
    folder.mkdir(parents=True)
    (folder / 'fcn8s_from_vgg16.pth').touch()
    (tmp_path / 'images').mkdir()
    lazy = run_sh(**flags | {'LAZY_MODE': 1}).stdout
    assert len(re.findall('--convert vgg16 --further', lazy)) == 1, (
        'trained further, though the converted weights are there'
    )
    for words in (
        '--recipe fast',
        f'--pretrained {folder}/fcn8s_FD0_1.pth',
        '--joint_from _',
        '--snapshot_steps 500',
        ' 1e-6 ',
    ):
        assert words in training
    for line in (coarse, coarse2fine):
        assert '--recipe fast --average 3' in line


def test_lazy_mode_with_the_published_recipe_names_the_fast_one(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/a.npy').touch()
    line = 'RECIPE=fast trains better masks in less time from this start'
    for recipe, said in (('published', 1), ('fast', 0)):
        done = run_sh(DRY_RUN=1, LAZY_MODE=1, DATA_PATH=tmp_path, RECIPE=recipe)
        assert done.stdout.count(line) == said
