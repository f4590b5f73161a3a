"""predict.py: a mask for a new scan, on its own grid however that lies, and every bad input with its line."""

import functools
import itertools
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import FOLDER, coarse2fine_args, fusion_args, run_script, tiny_weights
from PIL import Image
from raw_scans import make_slices, write_slices

import predict
import volumes.segmenting
import volumes.testing
from model import RSTN
from reporting.trust import calibrate
from running.files import load_volume, write_json
from running.results import checksum
from running.weights import describe
from scans.geometry import Geometry, geometry_file, save_geometry
from volumes.calibration import calibration_file
from volumes.rounds import coarse_probability

PLI = np.array(
    [[0, -2.0, 0, 30], [-3.0, 0, 0, 40], [0, 0, -5.0, 100], [0, 0, 0, 1]]
)  # axis 0 to the back, 1 left, 2 down
TURNS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)]


def make_scan(seed=0):
    """(image int16 HU, organ bool), both (9, 8, 6) lying PLI: a bright box off the centre of a soft body in air."""
    organ = np.zeros((9, 8, 6), bool)
    organ[2:5, 2:4, 2:5] = True
    body = np.pad(np.ones((7, 6, 6), bool), ((1, 1), (1, 1), (0, 0)))
    noise = np.random.default_rng(seed).normal(0, 15, organ.shape)
    return np.rint(np.where(organ, 180.0, np.where(body, -60.0, -900.0)) + noise).astype(np.int16), organ


def turned(array, axes, flips):
    """The array with its axes in another order and some of them run backwards."""
    return array.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)]


def turned_affine(affine, shape, axes, flips):
    """Affine of the turned array of an array of this shape: the same voxels at the same places."""
    index = np.eye(4)  # index of the turned array -> index of the array
    for new, (old, flip) in enumerate(zip(axes, flips)):
        index[old, [0, 1, 2]] = 0
        index[old, new] = flip
        index[old, 3] = 0 if flip == 1 else shape[old] - 1
    return affine @ index


def write(path, array, affine=PLI, code=1):
    image = nib.Nifti1Image(array, affine)
    image.set_sform(image.affine, code)
    image.set_qform(image.affine, code)
    nib.save(image, path)
    return path


def mask_of(path):
    return np.asarray(nib.load(path).dataobj)


def save_snapshots(folder, **changes):
    """Untimestamped snapshots of the three planes; -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for plane in 'XYZ':
        torch.save(tiny_weights(**changes), folder / f'FD0:{plane}J3_1.pkl')
    return [str(folder / f'FD0:{plane}J3_1.pkl') for plane in 'XYZ']


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    """Snapshots of a network that segments what is bright; their folder's name has a comma and tells margin 4."""
    return save_snapshots(tmp_path_factory.mktemp('data') / 'models/snapshots/SIJ_training_1e-5x10,4')


LOADED = functools.cache(volumes.testing.load_RSTN)  # without the facts to check


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Each network is loaded once for all tests in this process, which is most of their time."""
    monkeypatch.setattr(volumes.testing, 'load_RSTN', lambda *args: LOADED(*args[:6]))


@pytest.fixture
def scan(tmp_path):
    """scan.nii.gz, lying PLI, and its image."""
    return write(tmp_path / 'scan.nii.gz', make_scan()[0])


def predicted(*arguments):
    """Run predict.py on the CPU, within this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['predict.py', *map(str, arguments), '--device', 'cpu'])
        predict.main()


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def canonical(snapshots, tmp_path_factory):
    """Mask and probability of the scan that lies as in training."""
    folder = tmp_path_factory.mktemp('canonical')
    image, organ = make_scan()
    write(folder / 'scan.nii', image)
    predicted(folder / 'scan.nii', folder / 'mask.nii', *snapshots, '--rounds', 1, '--probability', folder / 'p.nii')
    mask, probability = mask_of(folder / 'mask.nii'), mask_of(folder / 'p.nii')
    assert mask[organ].all() and mask.mean() < 0.5, 'the organ is found'
    assert all((turned(mask, (0, 1, 2), flips) != mask).any() for _, flips in TURNS[1:8]), (
        'every turn must change the mask'
    )
    return mask, probability


@pytest.mark.parametrize(('axes', 'flips'), TURNS)
def test_the_mask_lies_on_the_same_voxels_however_the_scan_lies(axes, flips, canonical, snapshots, tmp_path):
    image, _ = make_scan()
    affine = turned_affine(PLI, image.shape, axes, flips)
    write(tmp_path / 'scan.nii', turned(image, axes, flips), affine)
    output, p = tmp_path / 'mask.nii.gz', tmp_path / 'p.nii.gz'
    predicted(tmp_path / 'scan.nii', output, *snapshots, '--rounds', 1, '--probability', p)

    mask, probability = canonical
    np.testing.assert_array_equal(mask_of(output), turned(mask, axes, flips))
    np.testing.assert_array_equal(mask_of(p), turned(probability, axes, flips))
    for path, kind in ((output, np.uint8), (p, np.float32)):
        np.testing.assert_array_equal(nib.load(path).affine, nib.load(tmp_path / 'scan.nii').affine)
        assert nib.load(path).get_data_dtype() == kind


@pytest.mark.parametrize(('sform', 'qform'), [(1, 1), (2, 0), (0, 1), (0, 0), (4, 1)])
def test_codes_and_both_forms_of_the_affine_are_kept(sform, qform, scan, snapshots, tmp_path):
    image = nib.load(scan)
    image.set_sform(PLI, sform)
    image.set_qform(PLI, qform)
    nib.save(image, tmp_path / 'coded.nii')
    predicted(tmp_path / 'coded.nii', tmp_path / 'mask.nii', *snapshots, '--rounds', 0)
    before, after = nib.load(tmp_path / 'coded.nii').header, nib.load(tmp_path / 'mask.nii').header
    for field in ('dim', 'pixdim', 'sform_code', 'qform_code', 'srow_x', 'srow_z', 'quatern_b', 'qoffset_y'):
        np.testing.assert_array_equal(after[field], before[field], err_msg=field)


def test_a_DICOM_folder_gives_the_mask_of_the_same_scan_in_NIfTI(scan, snapshots, tmp_path, capsys):
    image, _ = make_scan()
    write_slices(tmp_path / 'study/series', make_slices(image, spacing=(3.0, 2.0, 5.0)))
    predicted(tmp_path / 'study', tmp_path / 'dicom.nii.gz', *snapshots)
    predicted(scan, tmp_path / 'nifti.nii.gz', *snapshots)

    mask = mask_of(tmp_path / 'dicom.nii.gz')
    assert mask.shape == (8, 9, 6), 'columns, rows, slices, as NIfTI has it'
    np.testing.assert_array_equal(mask, mask_of(tmp_path / 'nifti.nii.gz').transpose(1, 0, 2))
    assert nib.aff2axcodes(nib.load(tmp_path / 'dicom.nii.gz').affine) == ('L', 'P', 'I')
    assert nib.affines.voxel_sizes(nib.load(tmp_path / 'dicom.nii.gz').affine) == pytest.approx([2, 3, 5])
    assert 'warning' not in capsys.readouterr().out


# --- how training arrays lie ---------------------------------------------------------------------------------------


def write_geometry(path, affine, holds='position'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'affine': affine.tolist(), 'holds': holds, 'source': 'x', 'type': 'NIfTI'}))
    return path


def orientation_of(told, snapshot, capsys):
    codes = volumes.segmenting.training_orientation(told, volumes.segmenting.Training(4, 3), snapshot)
    return codes, capsys.readouterr().out


def test_training_arrays_are_taken_to_lie_as_NIHs_unless_something_tells(tmp_path, capsys):
    snapshot = tmp_path / 'models/snapshots/SIJ_training_1e-5x10,20/FD0:XJ3_1.pkl'
    assert orientation_of(None, snapshot, capsys)[0] == 'PLI'
    assert orientation_of('RAS', snapshot, capsys)[0] == 'RAS'
    like = write_geometry(tmp_path / 'like.json', np.diag([1, -2, 3, 1.0]) + np.eye(4, k=3))
    assert orientation_of(str(like), snapshot, capsys) == ('RPS', f'training arrays: RPS (by {like})\n')

    for case in ('a', 'b'):  # the data folder that the snapshot lies in
        write_geometry(tmp_path / f'geometry/{case}.json', np.diag([-1, -2, 3, 1.0]) + np.eye(4, k=3))
    write_geometry(tmp_path / 'geometry/c.json', np.diag([-1, -2, 3, 1.0]), 'spacing')
    codes, said = orientation_of(None, snapshot, capsys)
    assert codes == 'LPS' and 'as 2 of 3 cases in' in said
    assert orientation_of(None, tmp_path / 'other/place/SIJ_training_1e-5x10,20/FD0:XJ3_1.pkl', capsys)[0] == 'PLI'
    assert orientation_of(None, predict.Path('/x.pkl'), capsys)[0] == 'PLI'
    training = volumes.segmenting.Training(4, 3, orientation='LPS')
    found = volumes.segmenting.training_orientation(str(tmp_path / 'geometry/c.json'), training, snapshot)
    assert found == 'LPS' and 'as the snapshots say' in capsys.readouterr().out, 'the file does not say'
    with pytest.raises(FileNotFoundError, match='no such geometry'):
        volumes.segmenting.training_orientation(
            str(tmp_path / 'none.json'), volumes.segmenting.Training(4, 3), snapshot
        )


def test_networks_of_another_orientation_see_the_scan_their_way(canonical, snapshots, tmp_path):
    image, _ = make_scan()
    write(tmp_path / 'ras.nii', turned(image, (1, 0, 2), (-1, -1, -1)), np.diag([2, 3, 5, 1.0]) + np.eye(4, k=3))
    predicted(tmp_path / 'ras.nii', tmp_path / 'pli.nii', *snapshots, '--rounds', 1, '--orientation', 'PLI')
    np.testing.assert_array_equal(mask_of(tmp_path / 'pli.nii'), turned(canonical[0], (1, 0, 2), (-1, -1, -1)))
    predicted(tmp_path / 'ras.nii', tmp_path / 'ars.nii', *snapshots, '--rounds', 1, '--orientation', 'ARS')
    assert (mask_of(tmp_path / 'ars.nii') != mask_of(tmp_path / 'pli.nii')).any(), 'the network sees another image'
    predicted(tmp_path / 'ras.nii', tmp_path / 'stored.nii', *snapshots, '--rounds', 1, '--orientation', 'stored')
    np.testing.assert_array_equal(mask_of(tmp_path / 'stored.nii'), mask_of(tmp_path / 'ars.nii'))


@pytest.mark.parametrize(('affine', 'code'), [(PLI, 0), (np.eye(4), 1), (np.diag([2, 2, 5, 1]), 2)])
def test_a_scan_that_does_not_tell_how_it_lies_is_seen_as_conversion_stores_it(
    affine, code, canonical, snapshots, tmp_path, capsys
):
    image, _ = make_scan()
    write(tmp_path / 'scan.nii', image.transpose(1, 0, 2), affine, code)
    predicted(tmp_path / 'scan.nii', tmp_path / 'mask.nii', *snapshots, '--rounds', 1)
    np.testing.assert_array_equal(mask_of(tmp_path / 'mask.nii'), canonical[0].transpose(1, 0, 2))
    said = capsys.readouterr().out
    assert 'has no position: its axes are taken as conversion stores them, transpose(1, 0, 2)' in said
    assert ('of unknown size' in said) == (code == 0)


# --- the method ----------------------------------------------------------------------------------------------------


def test_as_a_user_runs_it_and_the_same_mask_as_coarse2fine_testing(tested, call):
    """Case 1 of the tiny data: its last round is what predict.py gives for its image; margin 4 is the folder's."""
    assert call('coarse2fine_testing.py', *coarse2fine_args(tested, rounds=2)).code == 0
    image = np.load(tested / 'images/0001.npy')
    write(tested / 'scan.nii.gz', image, turned_affine(PLI, image.shape, (0, 1, 2), (1, 1, 1)))
    scan, output = tested / 'scan.nii.gz', tested / 'mask.nii.gz'
    names = sorted(map(str, (tested / 'models/snapshots').glob('*/*.pkl')))
    done = run_script('predict.py', scan, output, *names, '--rounds', 2, '--stop_DSC', 1)

    assert done.code == 0, done.err
    mask = mask_of(output)
    stored = next((tested / 'results').glob('coarse2fine*/*/volumes/R2_1.npz'))
    np.testing.assert_array_equal(mask, load_volume(stored, image.shape))
    lines = done.out.splitlines()
    assert lines[0].startswith('device: CPU')
    assert [line for line in lines if line.startswith('round 2: ') and 'inter-iteration DSC = ' in line]
    assert 'rounds used: 2' in lines
    assert f'volume: {mask.sum()} voxels, {mask.sum() * 0.03:.1f} ml' in lines
    assert lines[-1] == f'written: {output}'

    predicted(scan, output, *names, '--rounds', 0, '--probability', tested / 'p.nii.gz')
    coarse = sorted((tested / 'results').glob('coarse_testing*/*/volumes/e1111_1.npz'))
    coarse = coarse_probability([load_volume(file, image.shape) for file in coarse])
    np.testing.assert_array_equal(mask_of(tested / 'p.nii.gz'), coarse)


def test_planes_of_fast_snapshots_are_weighted_by_slice_spacing_in_testing_and_prediction(tested, call):
    folder = tested / 'models/snapshots' / FOLDER
    for path in folder.glob('*.pkl'):
        state = OrderedDict(tiny_weights())
        state._metadata = {}
        torch.save(describe(state, recipe='fast', orientation='PLI', spacing=[3.0, 2.0, 5.0]), path)
    folder = folder.rename(folder.with_name(FOLDER.replace('training_', 'training_fast_')))
    for path in (tested / 'images').iterdir():  # voxels of 3 x 2 x 5 mm
        save_geometry(geometry_file(tested, path.stem), Geometry(PLI, 'position', 'made up', 'NIfTI'))
    for stage, args in (('coarse2fine_testing', coarse2fine_args(tested, 2)), ('coarse_fusion', fusion_args(tested))):
        done = call(f'{stage}.py', *args, '--recipe', 'fast')
        assert done.code == 0, done.err
    image = np.load(tested / 'images/0001.npy')
    coarse, rounds, fused = (
        [load_volume(file, image.shape) for file in sorted((tested / 'results').glob(f'{pattern}_1.npz'))]
        for pattern in ('coarse_testing*/FD0:?J*/volumes/e1111', 'coarse2fine*/*/volumes/R?', 'coarse*/*/volumes/F2')
    )
    mean = sum(weight * volume for weight, volume in zip((0.3, 0.2, 0.5), coarse)) / 255
    assert ((mean > 0.51) & (coarse_probability(coarse) < 0.49)).any(), 'the weights matter'
    decided = np.abs(mean - 0.5) > 1e-6
    for mask in (rounds[0], fused[0]):
        np.testing.assert_array_equal(mask[decided], mean[decided] > 0.5)
    run = json.loads(next((tested / 'results').glob('coarse2fine*/*/run.json')).read_text())
    assert run['weights images/0001.npy'] == pytest.approx([0.3, 0.2, 0.5])

    write(tested / 'scan.nii.gz', image, PLI)
    names = sorted(map(str, folder.glob('*.pkl')))
    predicted(tested / 'scan.nii.gz', tested / 'mask.nii.gz', *names, '--rounds', 2, '--stop_DSC', 1)
    np.testing.assert_array_equal(mask_of(tested / 'mask.nii.gz'), rounds[2])


def test_rounds_end_when_two_agree(scan, snapshots, tmp_path, capsys):
    predicted(scan, tmp_path / 'mask.nii', *snapshots, '--stop_DSC', 0.1)
    assert 'rounds used: 1\n' in capsys.readouterr().out
    predicted(scan, tmp_path / 'mask.nii', *snapshots, '--rounds', 0)
    assert 'rounds used: 0\n' in capsys.readouterr().out


def test_several_snapshots_of_a_plane_are_averaged(scan, snapshots, tmp_path):
    others = save_snapshots(tmp_path / 'SIJ_training_1e-5x10,4', seed=8)
    probabilities = []
    for one in (snapshots, others, [','.join(pair) for pair in zip(snapshots, others)]):
        predicted(scan, tmp_path / 'm.nii', *one, '--rounds', 0, '--probability', tmp_path / 'p.nii', '--margin', 4)
        probabilities.append(mask_of(tmp_path / 'p.nii'))
    np.testing.assert_allclose(probabilities[2], (probabilities[0] + probabilities[1]) / 2, atol=1 / 255)
    assert np.abs(probabilities[0] - probabilities[1]).max() > 0.05
    predicted(scan, tmp_path / 'm.nii', *[','.join([one, one]) for one in snapshots], '--rounds', 1)
    predicted(scan, tmp_path / 'n.nii', *snapshots, '--rounds', 1)
    np.testing.assert_array_equal(mask_of(tmp_path / 'm.nii'), mask_of(tmp_path / 'n.nii'))


def test_one_network_stays_in_memory_until_it_is_released_and_several_are_loaded_in_turn(snapshots):
    image = make_scan()[0]
    settings = volumes.testing.PlaneSettings((-100, 240), 3, 4, torch.device('cpu'), 'fp32')
    one = volumes.testing.PlaneTester('X', snapshots[:1], 'C', settings)
    first = one.predict(image)
    kept = one.net
    one.predict(image)
    assert kept is not None and one.net is kept
    one.release()
    assert one.net is None
    two = volumes.testing.PlaneTester('X', snapshots[:1] * 2, 'C', settings)
    np.testing.assert_array_equal(two.predict(image), first)


def test_nothing_found_is_an_empty_mask_and_a_warning(snapshots, tmp_path, call):
    write(tmp_path / 'air.nii.gz', np.full((6, 5, 4), -900, np.int16))
    done = call('predict.py', tmp_path / 'air.nii.gz', tmp_path / 'mask.nii.gz', *snapshots)
    assert done.code == 0, done.err
    assert 'warning: nothing found, the mask is empty' in done.out and 'rounds used: 0' in done.out
    assert not mask_of(tmp_path / 'mask.nii.gz').any()


# --- warnings and bad inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'warning'),
    [
        (
            lambda image: image + 1024,
            'no value below -200 HU, not even air: another modality, clipped, or without its intercept (-1024)',
        ),
        (lambda image: image.clip(0, 150), 'values from 0 to 150: a picture of 8 bit, not HU'),
        (lambda image: image.clip(-150, 300), 'no value below -200 HU, not even air'),
        (lambda image: image - 3000, '100.0% of its voxels lie outside the intensity window, -100 to 240'),
    ],
)
def test_another_modality_or_range_is_warned_about(change, warning, snapshots, tmp_path, call):
    write(tmp_path / 'odd.nii', change(make_scan()[0]).astype(np.int16))
    done = call('predict.py', tmp_path / 'odd.nii', tmp_path / 'mask.nii', *snapshots, '--rounds', 0)
    assert done.code == 0 and f'warning: {warning}' in done.out


def test_DICOM_of_another_modality_is_warned_about(snapshots, tmp_path, call):
    write_slices(tmp_path / 'mr', make_slices(make_scan()[0], Modality='MR'))
    done = call('predict.py', tmp_path / 'mr', tmp_path / 'mask.nii', *snapshots, '--rounds', 0)
    assert done.code == 0 and 'its modality is MR, not CT' in done.out


def test_a_snapshot_of_an_earlier_mode_is_warned_about(scan, snapshots, tmp_path, call):
    torch.save(tiny_weights(), tmp_path / 'FD0:XI3_1.pkl')
    done = call('predict.py', scan, tmp_path / 'm.nii', tmp_path / 'FD0:XI3_1.pkl', *snapshots[1:], '--rounds', 0)
    assert done.code == 0 and 'warning: FD0:XI3_1.pkl is of mode I; the training ends with mode J' in done.out


def refused(done, *words):
    """It ended with exit code 1 and one line that holds the words."""
    assert done.code == 1, done.out + done.err
    error = done.err.splitlines()
    assert len(error) == 1 and error[0].startswith('predict.py: error: ')
    for word in words:
        assert word in error[0]


@pytest.mark.parametrize('shape', [(6, 5), (6, 5, 4, 2)])
def test_a_volume_of_2_or_4_axes_is_refused(shape, snapshots, tmp_path, call):
    path = write(tmp_path / 'flat.nii', np.zeros(shape, np.int16))
    refused(call('predict.py', path, tmp_path / 'm.nii', *snapshots), 'flat.nii', 'one 3D volume is expected')
    assert not (tmp_path / 'm.nii').exists()


def test_an_input_that_is_no_scan_is_refused(snapshots, tmp_path, call):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'scan.txt').write_text('text')
    (tmp_path / 'text.nii').write_text('text')
    for name, words in {
        'missing.nii.gz': 'no such file',
        'empty': 'no folders with DICOM slices',
        'scan.txt': 'neither a NIfTI file (.nii, .nii.gz) nor a folder',
        'text.nii': 'not a readable NIfTI file',
    }.items():
        refused(call('predict.py', tmp_path / name, tmp_path / 'm.nii', *snapshots), name, words)
    for series in ('one', 'two'):
        write_slices(tmp_path / 'study' / series, make_slices(make_scan()[0]))
    refused(call('predict.py', tmp_path / 'study', tmp_path / 'm.nii', *snapshots), '2 folders with DICOM slices')


def test_outputs_that_cannot_be_meant_are_refused(scan, snapshots, tmp_path, call):
    refused(call('predict.py', scan, tmp_path / 'mask.npz', *snapshots), 'mask.npz', '.nii.gz or .nii')
    before = scan.read_bytes()
    refused(call('predict.py', scan, scan, *snapshots), 'must be different files')
    assert scan.read_bytes() == before
    mask = tmp_path / 'm.nii'
    refused(call('predict.py', scan, mask, *snapshots, '--probability', mask), 'must be different files')
    (tmp_path / 'link.nii.gz').symlink_to(scan)
    os.link(scan, tmp_path / 'hard.nii.gz')
    for one, other in ((scan, 'link'), (scan, 'hard'), (tmp_path / 'link.nii.gz', 'scan')):
        refused(call('predict.py', one, tmp_path / f'{other}.nii.gz', *snapshots), 'must be different files')
    assert scan.read_bytes() == before
    (tmp_path / 'folder.nii').mkdir()
    for output in ('folder.nii', 'scan.nii.gz/m.nii'):
        refused(call('predict.py', scan, tmp_path / output, *snapshots), output, 'cannot be written')


def test_snapshots_that_do_not_belong_together_are_refused(scan, snapshots, tmp_path, call):
    x, y, z = snapshots
    torch.save(tiny_weights(width=5), wide := tmp_path / 'FD0:YJ3_1.pkl')
    torch.save(tiny_weights(), other := tmp_path / 'FD0:ZJ3_2_20261123_000000.pkl')
    thin = tiny_weights()
    thin['saliency1.weight'] = thin['saliency1.weight'][:1]
    torch.save(thin, one := tmp_path / 'FD0:ZJ1_1.pkl')
    for paths, words in (
        ((x, wide, z), ['YJ3_1.pkl: has width 5', 'XJ3_1.pkl has width 4']),
        ((x, y, other), ['ZJ3_2_20261123_000000.pkl: has organ_ID 2', 'has organ_ID 1']),
        ((x, y, one), ['ZJ1_1.pkl: has slice_thickness 1', 'has slice_thickness 3']),
        ((x, y, f'{z},{other}'), ['has organ_ID 2']),
    ):
        refused(call('predict.py', scan, tmp_path / 'm.nii', *paths), *words)


def test_a_snapshot_of_another_plane_is_refused_unless_forced(scan, snapshots, tmp_path, call):
    x, y, z = snapshots
    swapped = [scan, tmp_path / 'm.nii', y, x, z, '--rounds', 0]
    refused(call('predict.py', *swapped), 'a snapshot of plane Y given for plane X')
    assert call('predict.py', *swapped, '--force').code == 0


def test_a_file_that_is_no_snapshot_is_refused(scan, snapshots, tmp_path, call):
    x, y, _ = snapshots
    torch.save({'fc6.weight': torch.zeros(1)}, tmp_path / 'fcn.pth')
    refused(call('predict.py', scan, tmp_path / 'm.nii', x, y, tmp_path / 'fcn.pth'), 'fcn.pth: not an RSTN snapshot')
    refused(call('predict.py', scan, tmp_path / 'm.nii', x, y, tmp_path / 'none.pkl'), 'none.pkl', 'no such')


@pytest.mark.parametrize('name', ['--device', '--GPU_ID'])
def test_the_device_goes_by_its_name_in_the_stages_too(name, scan, snapshots, tmp_path, call):
    done = call('predict.py', scan, tmp_path / 'm.nii', *snapshots, '--rounds', 0, name, 'cpu')
    assert done.code == 0 and done.out.startswith('device: CPU') and '(as asked)' in done.out


def test_options_are_checked_before_any_work(scan, snapshots, tmp_path, call):
    for options in (
        ['--orientation', 'PLX'],
        ['--orientation', 'PAI'],
        ['--threshold', 2],
        ['--low_range', 300, '--high_range', 200],
    ):
        assert call('predict.py', scan, tmp_path / 'm.nii', *snapshots, *options).code == 2
    assert call('predict.py', scan).code == 2
    done = call('predict.py', scan, tmp_path / 'm.nii', *snapshots, '--low_range', 0, '--high_range', 1)
    assert done.code == 1 and 'intensity window 0 to 1: scans are read as whole HU' in done.err


def test_a_comma_separates_snapshots_but_also_stands_in_folder_names():
    assert volumes.segmenting.split_snapshots('a,20/FD0:XJ3_1.pkl,a,20/FD1:XJ3_1.pkl,x.pth') == [
        predict.Path('a,20/FD0:XJ3_1.pkl'),
        predict.Path('a,20/FD1:XJ3_1.pkl'),
        predict.Path('x.pth'),
    ]


def test_the_margin_is_the_one_in_the_folders_name():
    assert volumes.segmenting.named_margin(predict.Path('models/snapshots/SIJ_training_1e-4x10,10/FD0:XJ3_1.pkl')) == 10
    assert volumes.segmenting.named_margin(predict.Path('elsewhere/FD0:XJ3_1.pkl')) == 20


# --- what snapshots say of their training --------------------------------------------------------------------------

FACTS = {
    'intensity_window': [-150.0, 200.0],
    'crop_margin': 2,
    'slice_thickness': 3,
    'organ_ID': 1,
    'orientation': 'RPS',
}


def described(folder, **changes):
    """Snapshots of the three planes, which say what their training was like."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for plane in 'XYZ':
        state = RSTN(width=4).state_dict()
        state.update(tiny_weights())
        torch.save(describe(state, plane=plane, **FACTS | changes), folder / f'{plane}.pkl')
        paths.append(folder / f'{plane}.pkl')
    return paths


def test_window_margin_and_orientation_come_from_the_snapshots_wherever_they_lie(scan, snapshots, tmp_path, call):
    """Published snapshots say nothing: the same figures have to be given, and are said to be assumed where they are not."""
    done = call('predict.py', scan, tmp_path / 'a.nii', *described(tmp_path / 'x'), '--rounds', 2)
    assert done.code == 0, done.err
    for line in (
        '--low_range: -150, as the snapshots say',
        '--margin: 2, as the',
        'training arrays: RPS (as the snapshots',
    ):
        assert line in done.out
    asked = ['--low_range', -150, '--high_range', 200, '--margin', 2, '--orientation', 'RPS']
    same = call('predict.py', scan, tmp_path / 'b.nii', *snapshots, '--rounds', 2, *asked)
    assert same.code == 0 and 'assumes' not in same.out
    np.testing.assert_array_equal(mask_of(tmp_path / 'a.nii'), mask_of(tmp_path / 'b.nii'))
    published = call('predict.py', scan, tmp_path / 'c.nii', *snapshots, '--rounds', 2)
    for line in (
        '--low_range: the snapshots do not say; assumes -100',
        '--margin: the snapshots do not say; assumes 4',
    ):
        assert line in published.out


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--low_range', -100], ['--low_range -100: the snapshots were trained with -150']),
        (['--margin', 20], ['--margin 20: the snapshots were trained with 2']),
        (['--orientation', 'PLI'], ['--orientation PLI: the snapshots were trained on arrays that lie RPS']),
    ],
)
def test_options_that_contradict_the_snapshots_are_refused(options, words, scan, tmp_path, call):
    refused(call('predict.py', scan, tmp_path / 'm.nii', *described(tmp_path / 'x'), *options), *words)
    assert not (tmp_path / 'm.nii').exists()


def test_snapshots_of_unlike_trainings_are_refused(scan, tmp_path, call):
    one, other = described(tmp_path / 'one'), described(tmp_path / 'other', intensity_window=[-100.0, 240.0])
    refused(call('predict.py', scan, tmp_path / 'm.nii', *one[:2], other[2]), 'intensity_window [-100.0, 240.0]')
    refused(
        call('predict.py', scan, tmp_path / 'm.nii', one[1], one[0], one[2]), 'a snapshot of plane Y given for plane X'
    )


def test_voxels_of_another_size_than_in_training_are_warned_about(scan, tmp_path, call):
    done = call('predict.py', scan, tmp_path / 'm.nii', *described(tmp_path, spacing=[1.0, 1.0, 5.0]), '--rounds', 0)
    assert (
        done.code == 0 and 'warning: voxels of 2 x 3 x 5 mm, but the networks were trained on 1 x 1 x 5 mm' in done.out
    )


def test_a_window_that_is_none_is_refused(scan, snapshots, tmp_path, call):
    refused(
        call('predict.py', scan, tmp_path / 'm.nii', *snapshots, '--low_range', 300), 'is not above --low_range 300'
    )


def test_blanks_after_the_commas_of_a_list_are_allowed():
    assert volumes.segmenting.split_snapshots('a.pkl, b.pkl') == [predict.Path('a.pkl'), predict.Path('b.pkl')]


def test_weights_of_the_fine_network_that_are_not_finite_are_found_before_the_coarse_step(
    scan, snapshots, tmp_path, call
):
    weights = tiny_weights()
    weights['fine_model.fc7.bias'][0] = np.nan
    torch.save(weights, tmp_path / 'FD0:XJ3_1.pkl')
    done = call('predict.py', scan, tmp_path / 'm.nii', tmp_path / 'FD0:XJ3_1.pkl', *snapshots[1:])
    refused(done, 'FD0:XJ3_1.pkl: fine_model.fc7.bias is not finite')
    assert 'coarse:' not in done.out


# --- a rough mask, the trust in a mask, and what the networks see ---------------------------------------------------


def test_a_rough_mask_is_round_0_wherever_it_comes_from(canonical, scan, snapshots, tmp_path, capsys):
    """As NIfTI on the scan's grid, turned or not, and as a box: the same round 1."""
    _, organ = make_scan()
    axes, flips = (2, 0, 1), (1, -1, 1)
    turned_scan = write(
        tmp_path / 'turned.nii', turned(make_scan()[0], axes, flips), turned_affine(PLI, organ.shape, axes, flips)
    )
    rough = write(tmp_path / 'rough.nii', organ.astype(np.uint8))
    a, b, c = (f'{tmp_path}/{name}.nii' for name in 'abc')
    predicted(scan, a, *snapshots, '--rounds', 1, '--start', rough)
    assert 'start: 18 voxels' in capsys.readouterr().out
    predicted(turned_scan, b, *snapshots, '--rounds', 1, '--start', rough)
    predicted(scan, c, *snapshots, '--rounds', 1, '--box', 2, 4, 2, 3, 2, 4)
    assert mask_of(a)[organ].mean() > 0.5
    np.testing.assert_array_equal(mask_of(b), turned(mask_of(a), axes, flips))
    np.testing.assert_array_equal(mask_of(c), mask_of(a))


@pytest.mark.parametrize(
    'start',
    [np.ones((9, 8, 5)), np.zeros((9, 8, 6)), -np.eye(8, 6) * np.ones((9, 1, 1)), np.arange(432).reshape(9, 8, 6) % 3],
)
def test_a_start_of_segment_that_does_not_fit_is_refused(start, snapshots):
    with pytest.raises(ValueError, match=r'a mask of the image, \(9, 8, 6\), of 0 and one other value is expected'):
        volumes.segmenting.segment(make_scan()[0], PLI, snapshots, device='cpu', start=start)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--box', 2, 9, 2, 3, 2, 4], '--box: x from 2 to 9 is not within 0 to 8'),
        (['--start', 'empty.nii'], 'an empty mask is no start'),
        (['--start', 'small.nii'], 'does not fit its image'),
        (['--start', 'empty.nii', '--box', 2, 4, 2, 3, 2, 4], '--start, --box (one of them)'),
        (['--box', 2, 4, 2], 'expected 6 arguments'),
    ],
)
def test_a_start_that_does_not_fit_is_refused(options, words, scan, snapshots, tmp_path, call):
    write(tmp_path / 'empty.nii', np.zeros((9, 8, 6), np.uint8))
    write(tmp_path / 'small.nii', np.ones((9, 8, 5), np.uint8))
    options = [tmp_path / word if str(word).endswith('.nii') else word for word in options]
    done = call('predict.py', scan, tmp_path / 'mask.nii', *snapshots, *options)
    assert done.code in (1, 2) and words in done.err and not (tmp_path / 'mask.nii').exists()


def test_the_record_holds_the_signals_and_the_predicted_DSC(scan, snapshots, tmp_path, capsys):
    file = calibration_file(Path(snapshots[0]).parent, 3, 1)
    predicted(scan, tmp_path / 'mask.nii', *snapshots, '--record', tmp_path / 'record.json', '--probe', 1)
    record = json.loads((tmp_path / 'record.json').read_text())['organs']['1']
    assert record['trust'] == {} and f'no predicted DSC: report.py writes {file}' in capsys.readouterr().out
    assert record['signals']['probes'] == [pytest.approx(1, abs=0.5)] and record['start'] == 'coarse'
    planes = record['signals']['rounds'][-1]['planes']
    cases = {str(i): ({'planes': planes + (i - 2.5) / 100}, 0.9 - i / 20) for i in range(6)}
    known = {'snapshots': [sorted(checksum(path) for path in snapshots)],
             'settings': [{'threshold': 0.5, 'stop_DSC': 0.99, 'rounds': 1}]}  # fmt: skip
    write_json(file, calibrate(cases) | known)
    try:
        predicted(scan, tmp_path / 'mask.nii', *snapshots, '--threshold', 0.4)
        assert 'no predicted DSC' in (said := capsys.readouterr().out) and 'end in another way (--threshold' in said
        predicted(scan, tmp_path / 'mask.nii', *snapshots, '--record', tmp_path / 'record.json')
    finally:
        file.unlink()
    trust = json.loads((tmp_path / 'record.json').read_text())['organs']['1']['trust']
    assert 'predicted DSC {predicted_DSC:.2f} ({low:.2f} to {high:.2f}); planes disagree on'.format(**trust) in (
        capsys.readouterr().out
    )


def test_what_the_networks_see_is_drawn(scan, snapshots, tmp_path):
    predicted(scan, tmp_path / 'mask.nii', *snapshots, '--rounds', 1, '--explain', tmp_path / 'seen')
    for plane in 'XYZ':
        with Image.open(tmp_path / f'seen/{plane}.png') as picture:
            assert picture.size == (1375, 341) and len(picture.getcolors(10**6)) > 100
