"""segment() from Python, several organs in one mask, and all scans of a folder, by predict.py."""

import csv
import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPO, run_script, tiny_weights
from raw_scans import make_slices, write_slices
from test_predict import PLI, loaded_once, make_scan, mask_of, save_snapshots, turned, write  # noqa: F401

import predict as predict_script
from running.files import read_json
from volumes.fusion import merge
from volumes.segmenting import Networks, folder_snapshots, organ_snapshots, segment
from volumes.testing import to_bytes


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    return save_snapshots(tmp_path_factory.mktemp('data') / 'models/snapshots/SIJ_training_1e-5x10,4')


@pytest.fixture
def scans(tmp_path):
    """A folder with a NIfTI file of each ending, a DICOM series, and one that is broken."""
    folder = tmp_path / 'scans'
    folder.mkdir()
    write(folder / 'anna.nii.gz', make_scan()[0])
    write(folder / 'bert.nii', make_scan(1)[0])
    (folder / 'cut.nii').write_bytes((folder / 'bert.nii').read_bytes()[:500])
    write_slices(folder / 'dora/1.2.3', make_slices(make_scan()[0], spacing=(3.0, 2.0, 5.0)))
    return folder


def predict(call, *arguments):
    return call('predict.py', *arguments, '--device', 'cpu', '--rounds', 1)


def table(folder):
    with open(folder / 'scans.csv', newline='') as file:
        return {row['scan']: row for row in csv.DictReader(file)}


# --- from Python ---------------------------------------------------------------------------------------------------


def test_segment_gives_what_predict_writes_and_the_record(snapshots, tmp_path, call):
    image, organ = make_scan()
    scan = write(tmp_path / 'scan.nii', turned(image, (1, 2, 0), (1, -1, 1)), PLI[:, [1, 2, 0, 3]])
    files = [tmp_path / name for name in ('m.nii', 'p.nii', 'r.json')]
    done = predict(call, scan, files[0], *snapshots, '--probability', files[1], '--record', files[2])
    assert done.code == 0, done.err

    loaded = nib.load(scan)
    mask, probability, record = segment(loaded.get_fdata(), loaded.affine, snapshots, rounds=1, device='cpu')
    assert mask.any() and mask.dtype == np.uint8 and probability.dtype == np.float32
    np.testing.assert_array_equal(mask, mask_of(files[0]))
    np.testing.assert_array_equal(probability, mask_of(files[1]))
    assert json.loads(json.dumps(record)) | {'notes': []} == read_json(files[2])['organs']['1']
    assert record['voxels'] == mask.sum() == record['voxels_by_round'][1]
    assert record['ml'] == pytest.approx(mask.sum() * 2 * 3 * 5 / 1000)
    assert record['rounds'] == 1 and record['agreement'] == record['inter_iteration_DSC'][0] > 0
    assert record['settings']['margin'] == 4 and record['organ_ID'] == 1 and record['warnings'] == []


def test_networks_are_loaded_once_for_many_scans(snapshots, capsys):
    networks = Networks(snapshots, device='cpu')
    with pytest.raises(TypeError, match='low_range: for Networks'):
        segment(make_scan()[0], PLI, networks, low_range=-50)
    assert re.match(r'device: CPU, \d+ threads \(as asked\)\n', capsys.readouterr().out)
    image, _ = make_scan()
    first = segment(image, PLI, networks, rounds=1)
    assert all(tester.net for tester in networks.coarse + networks.fine)
    assert capsys.readouterr().out.count(': snapshot ') == 6
    again = segment(image, PLI, networks, rounds=1)
    assert ': snapshot ' not in capsys.readouterr().out
    np.testing.assert_array_equal(first[0], again[0])
    once = Networks(snapshots, device='cpu', keep=False)
    segment(image, PLI, once, rounds=1)
    assert not any(tester.net for tester in once.coarse + once.fine)


@pytest.mark.parametrize(
    ('image', 'affine', 'words'),
    [
        (np.zeros((4, 5)), PLI, r'image \(4, 5\)'),
        (np.zeros((4, 5, 6), complex), PLI, 'of complex128'),
        (np.zeros((4, 5, 6)), np.zeros((4, 4)), 'gives every voxel a place'),
        (np.zeros((4, 5, 6)), np.eye(3), 'gives every voxel a place'),
        (np.full((4, 5, 6), np.nan), PLI, 'all its values are NaN'),
    ],
)
def test_what_is_no_scan_is_a_ValueError(image, affine, words, snapshots):
    with pytest.raises(ValueError, match=words):
        segment(image, affine, Networks(snapshots, device='cpu'))


@pytest.mark.parametrize(
    'options',
    [{'rounds': -1}, {'threshold': 2}, {'stop_DSC': np.nan}, {'orientation': 'PLX'}, {'precision': 'fp8'},
     {'margin': 20, 'low_range': 300}],
)  # fmt: skip
def test_options_that_cannot_be_are_a_ValueError_that_names_them(options, snapshots):
    with pytest.raises(ValueError, match=list(options)[-1]):
        segment(make_scan()[0], PLI, snapshots, device='cpu', **options)


def test_snapshots_of_fewer_planes_are_a_ValueError(snapshots):
    with pytest.raises(ValueError, match='X, Y and Z are needed'):
        Networks(snapshots[:2], device='cpu')


def test_without_an_affine_the_axes_are_taken_as_conversion_stores_them(snapshots):
    image, _ = make_scan()
    networks = Networks(snapshots, device='cpu')
    placed, _, _ = segment(image, PLI, networks, rounds=1)
    mask, _, record = segment(image.transpose(1, 0, 2), None, networks, rounds=1)
    np.testing.assert_array_equal(mask, placed.transpose(1, 0, 2))
    assert record['ml'] is None


USER = """
import utils, sys
assert utils.mine
path, hook = list(sys.path), sys.excepthook
from OrganSegRSTN import segment
assert (sys.path, sys.excepthook) == (path, hook)
import model
assert model.mine and utils is sys.modules['utils']
import numpy
mask, probability, record = segment(numpy.load('scan.npy'), numpy.load('affine.npy'), sys.argv[1:], device='cpu', rounds=1)
numpy.save('mask.npy', mask)
"""


def test_a_user_with_modules_of_the_same_names_imports_it_in_one_line(snapshots, tmp_path):
    image, _ = make_scan()
    for name in ('utils', 'model'):
        (tmp_path / f'{name}.py').write_text('mine = True\n')
    np.save(tmp_path / 'scan.npy', image)
    np.save(tmp_path / 'affine.npy', PLI)
    (tmp_path / 'user.py').write_text(USER)
    command = [sys.executable, tmp_path / 'user.py', *snapshots]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env={'PYTHONPATH': str(REPO)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mask, _, _ = segment(image, PLI, snapshots, device='cpu', rounds=1)
    np.testing.assert_array_equal(np.load(tmp_path / 'mask.npy'), mask)


def test_the_package_names_what_it_needs_as_requirements_txt_does():
    tomllib = pytest.importorskip('tomllib', reason='tomllib is new in Python 3.11')
    project = tomllib.loads((REPO / 'pyproject.toml').read_text())
    lines = (REPO / 'requirements.txt').read_text().splitlines()
    pinned = dict(line.split()[0].split('==') for line in lines if '==' in line and line[0] != '#')
    for text in project['project']['dependencies']:
        name, _, least = text.partition('>=')
        assert name in pinned
        assert [int(part) for part in least.split('.') if part] <= [int(part) for part in pinned[name].split('.')]
    for package in project['tool']['setuptools']['packages']:
        assert (REPO / package.replace('.', '/') / '__init__.py').exists()
    highdicom = project['project']['optional-dependencies']['dicom'][0]
    assert f"HIGHDICOM = '{highdicom}'" in (REPO / 'OrganSegRSTN/scans/segmentation.py').read_text()


# --- several organs ------------------------------------------------------------------------------------------------


def save_organs(folder, *organs, fold=0, stamp='', **changes):
    """Snapshots of organs whose networks differ a little."""
    folder.mkdir(parents=True, exist_ok=True)
    for organ in organs:
        for plane in 'XYZ':
            torch.save(tiny_weights(seed=6 + organ, **changes), folder / f'FD{fold}:{plane}J3_{organ}{stamp}.pkl')
    return folder


def test_several_organs_in_one_mask_by_highest_probability(tmp_path, call):
    folder = save_organs(tmp_path / 'SIJ_training_1e-5x10,4', 1, 2)
    image, _ = make_scan()
    scan = write(tmp_path / 'scan.nii', image)
    record = tmp_path / 'r.json'
    done = predict(call, scan, tmp_path / 'organs.nii', '--organs', folder, '--record', record)
    assert done.code == 0, done.err
    found = {}
    for organ in (1, 2):
        paths = [folder / f'FD0:{plane}J3_{organ}.pkl' for plane in 'XYZ']
        mask, probability, _ = segment(image, PLI, paths, rounds=1, device='cpu')
        found[organ] = mask, to_bytes(probability)
    expected = merge(found)
    assert set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(mask_of(tmp_path / 'organs.nii'), expected)
    records = read_json(record)['organs']
    for organ in (1, 2):
        assert records[str(organ)]['voxels'] == (expected == organ).sum()
        assert records[str(organ)]['ml'] == pytest.approx((expected == organ).sum() * 0.03)

    files = sorted(map(str, folder.glob('*.pkl')), reverse=True)  # one by one, in any order
    assert predict(call, scan, tmp_path / 'files.nii', '--organs', *files).code == 0
    np.testing.assert_array_equal(mask_of(tmp_path / 'files.nii'), expected)


def test_of_a_folder_the_newest_whole_training_of_each_fold_is_taken(tmp_path):
    for stamp in ('_20260101_000000', '_20260202_000000', '_20260303_000000'):
        save_organs(tmp_path, 1, stamp=stamp)
    (tmp_path / 'FD0:XJ3_1_20260303_000000.pkl').unlink()
    (tmp_path / 'FD0:XS3_1_20260404_000000.pkl').touch()  # of an earlier mode
    (tmp_path / 'FD0:XJ3_1_20260202_000000_step00500.pkl').touch()
    save_organs(tmp_path, 1, fold=1, stamp='_20260101_000000')
    save_organs(tmp_path, 2)
    save_organs(tmp_path, 2, stamp='_20260101_000000')
    save_organs(tmp_path, 3, stamp='_my-own-training')  # any 15 characters are a timestamp
    names = {tuple(path.name for path in paths) for paths in folder_snapshots(tmp_path)}
    assert names == {(f'FD0:{plane}J3_1_20260202_000000.pkl', f'FD1:{plane}J3_1_20260101_000000.pkl')
                     for plane in 'XYZ'} | {(f'FD0:{plane}J3_{organ}.pkl',) for plane in 'XYZ' for organ in ('2', '3_my-own-training')}  # fmt: skip


def test_organs_that_cannot_be_told_apart_or_lack_a_plane_are_refused(tmp_path):
    one, other = save_organs(tmp_path / 'a', 1), save_organs(tmp_path / 'b', 1)
    with pytest.raises(ValueError, match='organ 1, plane X is given already'):
        organ_snapshots([str(one), str(other)])
    with pytest.raises(ValueError, match='organ 1: no snapshot of plane Y, Z'):
        organ_snapshots([str(one / 'FD0:XJ3_1.pkl')])
    (other / 'FD0:XJ3_1.pkl').rename(tmp_path / 'x.pkl')
    with pytest.raises(ValueError, match='neither it nor its name says'):
        organ_snapshots([str(tmp_path / 'x.pkl')])
    with pytest.raises(ValueError, match='no training of all three planes of organ 1, fold 0'):
        organ_snapshots([str(other)])
    (tmp_path / 'none').mkdir()
    with pytest.raises(FileNotFoundError, match='no snapshots of mode J'):
        organ_snapshots([str(tmp_path / 'none')])
    joined = ','.join(str(one / 'FD0:XJ3_1.pkl') for _ in range(2))
    others = [str(one / f'FD0:{plane}J3_1.pkl') for plane in 'YZ']
    assert [len(paths) for paths in organ_snapshots([joined, *others])[1]] == [2, 1, 1]


def test_organs_and_snapshots_are_one_or_the_other(snapshots, call):
    assert call('predict.py', 'a.nii', 'b.nii').code == 2
    assert call('predict.py', 'a.nii', 'b.nii', *snapshots[:2]).code == 2
    done = call('predict.py', 'a.nii', 'b.nii', *snapshots, '--organs', 'x')
    assert done.code == 2 and 'or --organs instead' in done.err.splitlines()[-1]


# --- a folder of scans ---------------------------------------------------------------------------------------------


def test_all_scans_of_a_folder_and_a_broken_one_does_not_stop_the_others(scans, snapshots, tmp_path):
    out = tmp_path / 'out'
    done = run_script('predict.py', scans, out, *snapshots, '--device', 'cpu', '--rounds', 1)
    assert done.code == 1
    assert done.err.splitlines()[-2] == '1 of 4 scans failed:'
    assert done.err.splitlines()[-1].startswith(f'cut: error: {scans / "cut.nii"}: ')
    assert 'Traceback' not in done.err and done.out.count('ml, 1 rounds') == 3
    assert {file.name for file in out.iterdir()} == {'scans.csv'} | {
        f'{name}.{end}' for name in ('anna', 'bert', 'dora') for end in ('nii.gz', 'json')
    }
    rows = table(out)
    assert list(rows) == ['anna', 'bert', 'cut', 'dora'] and rows['cut']['error'].startswith(str(scans))
    for name in ('anna', 'bert'):
        image = nib.load(next(scans.glob(f'{name}.nii*')))
        mask, _, record = segment(np.asarray(image.dataobj), image.affine, snapshots, rounds=1, device='cpu')
        np.testing.assert_array_equal(mask_of(out / f'{name}.nii.gz'), mask)
        np.testing.assert_array_equal(nib.load(out / f'{name}.nii.gz').affine, image.affine)
        assert int(rows[name]['voxels']) == mask.sum() and float(rows[name]['ml']) == pytest.approx(record['ml'])
        assert float(rows[name]['agreement']) == pytest.approx(record['agreement']) and not rows[name]['error']
    np.testing.assert_array_equal(mask_of(out / 'dora.nii.gz').transpose(1, 0, 2), mask_of(out / 'anna.nii.gz'))


def test_a_folder_is_taken_up_where_it_stopped(scans, snapshots, tmp_path, call):
    out = tmp_path / 'out'
    (scans / 'cut.nii').unlink()
    first = predict(call, scans, out, *snapshots)
    assert first.code == 0, first.err
    masks = {path: path.stat().st_mtime_ns for path in out.glob('*.nii.gz')}
    (out / 'bert.nii.gz').unlink()  # as if it had been killed there
    again = predict(call, scans, out, *snapshots)
    assert again.code == 0 and again.out.count('(done before)') == 2
    assert {path for path, time in masks.items() if path.stat().st_mtime_ns == time} == {
        out / 'anna.nii.gz', out / 'dora.nii.gz'
    }  # fmt: skip
    assert set(table(out)) == {'anna', 'bert', 'dora'}

    before = table(out)
    (out / 'anna.nii.gz').unlink()
    del before['anna']
    (out / 'notes.json').mkdir()
    (tmp_path / 'more').mkdir()
    write(tmp_path / 'more/emil.nii', make_scan(2)[0])
    assert predict(call, tmp_path / 'more', out, *snapshots).code == 0
    assert list(table(out)) == ['emil', 'bert', 'dora'] and before.items() < table(out).items()


def test_masks_of_other_settings_scans_or_makers_are_never_taken_for_done(scans, snapshots, tmp_path, call):
    out = tmp_path / 'out'
    out.mkdir()
    (scans / 'cut.nii').unlink()
    write(out / 'anna.nii.gz', np.ones((3, 3, 3), np.uint8))  # the user's
    (out / 'bert.json').write_text('{"mine": 1}')
    before = (out / 'anna.nii.gz').read_bytes()
    done = predict(call, scans, out, *snapshots)
    assert done.code == 1 and (out / 'anna.nii.gz').read_bytes() == before
    assert [line.split(':')[0] for line in done.err.splitlines()] == ['2 of 3 scans failed', 'anna', 'bert']
    assert done.err.count('is not what predict.py wrote there; move it away') == 2
    (out / 'bert.json').write_text('not JSON')
    assert predict(call, scans, out, *snapshots, '--overwrite').err.count('move it away') == 2
    assert (out / 'anna.nii.gz').read_bytes() == before and (out / 'bert.json').read_text() == 'not JSON'

    (out / 'anna.nii.gz').unlink()
    (out / 'bert.json').unlink()
    assert predict(call, scans, out, *snapshots).code == 0
    assert predict(call, scans, out, *snapshots).out.count('(done before)') == 3
    other = predict(call, scans, out, *snapshots, '--threshold', 0.4)
    assert other.code == 1 and other.err.count('made with other settings (threshold)') == 3
    assert predict(call, scans, out, *snapshots, '--probe', 1).err.count('made with other settings (probe)') == 3
    write(scans / 'bert.nii', make_scan(2)[0])
    changed = predict(call, scans, out, *snapshots)
    assert changed.code == 1 and 'bert.nii.gz: already exists, made with other settings (scan)' in changed.err
    rows = table(out)
    assert list(rows) == ['anna', 'bert', 'dora'] and rows['bert']['voxels'], 'what it had before is kept'


def test_a_mask_that_was_corrected_by_hand_is_kept(scans, snapshots, tmp_path, call):
    out = tmp_path / 'out'
    (scans / 'cut.nii').unlink()
    assert predict(call, scans, out, *snapshots).code == 0
    write(out / 'bert.nii.gz', np.ones((9, 8, 6), np.uint8))
    before = (out / 'bert.nii.gz').read_bytes()
    for options in ([], ['--threshold', 0.4, '--overwrite']):
        done = predict(call, scans, out, *snapshots, *options)
        assert done.code == 1 and 'bert.nii.gz: is not what predict.py wrote there; move it away' in done.err
        assert (out / 'bert.nii.gz').read_bytes() == before
    (out / 'scans.csv').write_text('name,age\nanna,50\n')
    done = predict(call, scans, out, *snapshots)
    assert done.code == 1 and 'scans.csv: is not what predict.py wrote there' in done.err


def test_every_file_that_is_named_as_a_scan_and_every_part_of_one_is_spoken_of(scans, snapshots, tmp_path, call):
    (scans / 'cut.nii').rename(scans / 'D.NII.GZ')
    (scans / 'e.mha').touch()
    (scans / 'f.nii').symlink_to('nowhere')
    slices = make_slices(make_scan(2)[0], PatientID='p', FrameOfReferenceUID='1.2.3')
    write_slices(scans / 'one', slices[:3])
    write_slices(scans / 'two', slices[3:])
    done = predict(call, scans, tmp_path / 'out', *snapshots)
    rows = table(tmp_path / 'out')
    assert done.code == 1 and [name for name in rows if rows[name]['error']] == ['D', 'e', 'f', 'one', 'two']
    assert all('look like parts of one scan' in rows[name]['error'] for name in ('one', 'two'))


def test_the_table_has_a_column_for_each_figure_of_trust_that_a_record_holds(tmp_path):
    record = {'voxels': 5, 'ml': 0.1, 'rounds': 2, 'notes': [], 'warnings': ['odd']}
    trusted = record | {'trust': {'predicted_DSC': 0.8125, 'look_at_this_scan': True}}
    predict_script.write_table(tmp_path / 'scans.csv', [
        {'scan': 'anna', 'label': 1} | trusted, {'scan': 'a,b', 'label': 1} | record, {'scan': 'c', 'error': 'cut off'},
    ])  # fmt: skip
    rows = table(tmp_path)
    assert rows['anna']['predicted_DSC'] == '0.8125' and rows['anna']['look_at_this_scan'] == 'True'
    assert rows['a,b']['predicted_DSC'] == '' and rows['a,b']['warnings'] == 'odd' and rows['c']['error'] == 'cut off'
    assert predict_script.summary(1, trusted) == 'label 1: 0.1 ml, 2 rounds, predicted DSC 0.81, warning: odd'


def test_folders_that_cannot_be_meant_are_refused(scans, snapshots, tmp_path, call):
    for arguments, words in (
        ((scans, scans), 'must be different files'),
        ((scans, tmp_path / 'out', '--probability', tmp_path / 'p.nii'), '--probability and --record are for one scan'),
        ((tmp_path / 'none', tmp_path / 'out'), '.nii.gz or .nii'),
        ((scans, tmp_path / 'out.mha'), '.nii.gz or .nii'),
    ):
        done = predict(call, arguments[0], arguments[1], *snapshots, *arguments[2:])
        assert done.code == 1 and words in done.err.splitlines()[-1], done.err
    (tmp_path / 'empty').mkdir()
    assert 'no NIfTI files' in predict(call, tmp_path / 'empty', tmp_path / 'out', *snapshots).err
    write(scans / 'dora.nii', make_scan()[0])
    assert 'would have one name' in predict(call, scans, tmp_path / 'out', *snapshots).err
    assert not list((tmp_path / 'out').glob('*.nii.gz'))
