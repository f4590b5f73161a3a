"""check_data.py on a small cohort, sound at first and then spoiled in every way that it knows."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import Ran, run_script, write_case
from matplotlib.image import imread
from test_survival import run_as_anybody

import check_data
from check_data import robust_z
from running import script
from scans.voxels import intensity_doubts

CASES = [f'{i:04d}' for i in range(1, 8)]
PLI = [[0, -2.0, 0, 30], [-2.0, 0, 0, 40], [0, 0, -5.0, 100], [0, 0, 0, 1]]


def make_case(seed):
    """Return (image, label) of (24, 20, 12): a body in air with a spine behind and a liver to the right.

    Organ 1 lies left in front. Organ 2 is the spine.
    """
    rng = np.random.default_rng(seed)
    y, x, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 20, 12)), indexing='ij')
    image = np.where(y**2 + x**2 < 0.85, -60.0, -1000.0)
    image[(y + 0.1) ** 2 + (x + 0.5) ** 2 < 0.12] = 110
    spine = (y - 0.6) ** 2 + x**2 < 0.04
    shift = rng.uniform(-0.05, 0.05, 3)
    organ = (y + 0.3 + shift[0]) ** 2 + (x - 0.35 + shift[1]) ** 2 + (z / 2 + shift[2]) ** 2 < 0.06
    image[spine], image[organ] = 200, 85
    image += rng.normal(0, 12, image.shape)
    return np.rint(image).astype(np.int16), (organ + 2 * spine).astype(np.uint8)


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    """A data folder of seven sound cases with geometry."""
    data = tmp_path_factory.mktemp('sound')
    (data / 'geometry').mkdir()
    for seed, name in enumerate(CASES):
        write_case(data, name, *make_case(seed))
        geometry = {'affine': PLI, 'holds': 'position', 'source': 'x', 'type': 'DICOM'}
        (data / 'geometry' / f'{name}.json').write_text(json.dumps(geometry))
    return data


@pytest.fixture
def cohort(sound, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(sound, tmp_path / 'data')


@pytest.fixture
def check(capsys, monkeypatch):
    """check(data, organs): run check_data.py in this process, without its pictures."""

    def check(data, organs=2):
        monkeypatch.setattr(sys, 'argv', ['check_data.py', str(data), str(organs), '-100', '240'])
        monkeypatch.setattr(check_data, 'contact_sheet', lambda *_: print('picture'))
        with pytest.raises(SystemExit) as end:
            script.run(check_data.main)
        out, err = capsys.readouterr()
        return Ran(*((1, out, end.value.code) if isinstance(end.value.code, str) else (end.value.code or 0, out, err)))

    return check


def change(data, kind, name, how):
    """Replace images/ or labels/NAME.npy by how(it)."""
    path = data / kind / f'{name}.npy'
    np.save(path, np.ascontiguousarray(how(np.load(path))))


def change_geometry(data, name, **values):
    path = data / 'geometry' / f'{name}.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def remarks(done, kind='warning'):
    return [line for line in done.out.splitlines() if line.startswith(kind)]


def test_a_sound_cohort_as_a_user_looks_at_it(cohort):
    before = {file: file.read_bytes() for file in cohort.glob('*/*')}
    done = run_script('check_data.py', cohort, 2, -100, 240)
    assert done.code == 0, done.err
    assert not remarks(done) and not remarks(done, 'error')
    assert (cohort / 'check_data_1.png').exists() and (cohort / 'check_data_2.png').exists(), 'one an organ'
    lines = done.out.splitlines()
    assert lines[0].split() == ['case', 'size', 'spacing,', 'mm', 'axes', 'HU', 'clipped']
    assert ' '.join(lines[1].split()).startswith('0001 24 x 20 x 12 2 x 2 x 5 PLI -10')
    label, image = np.load(cohort / 'labels/0001.npy'), np.load(cohort / 'images/0001.npy')
    voxels = (label == 1).sum()
    row = lines[lines.index(next(line for line in lines if line.startswith('organ 1'))) + 1].split()
    assert row[:4] == ['0001', str(voxels), f'{voxels * 0.02:.1f}', f'{image[label == 1].mean():.0f}']
    assert '7 cases looked at; warnings: 0, errors: 0' in lines
    assert {file: file.read_bytes() for file in cohort.glob('*/*')} == before, 'the data stays as it was'


def test_the_contact_sheet_shows_every_case_with_its_contour(cohort, call):
    assert f'written: {cohort / "check_data.png"}' in call('check_data.py', cohort, 1, -100, 240).out
    sheet = imread(cohort / 'check_data.png')
    assert sheet.shape[1] > sheet.shape[0] > 300
    red = (sheet[..., 0] > 0.8) & (sheet[..., 1] < 0.3) & (sheet[..., 2] < 0.3)
    width = sheet.shape[1] // 4
    tiles = [
        red[half][:, i * width : (i + 1) * width]
        for half in (slice(None, len(red) // 2), slice(len(red) // 2, None))
        for i in range(4)
    ]
    assert [tile.any() for tile in tiles] == [True] * 7 + [False]


# --- suspicious ----------------------------------------------------------------------------------------------------

SPOILED = {
    'image not HU': (('images', lambda a: a + 1024), '0003: no value below -200 HU, not even air: another modality, clipped, or without'),
    '8 bit': (('images', lambda a: a.clip(0, 150)), '0003: values from 0 to 150: a picture of 8 bit, not HU'),
    'clipped before': (('images', lambda a: a.clip(-160, 240)), '0003: no value below -200 HU, not even air'),
    'shifted HU': (('images', lambda a: a + 90), '0003: organ 1: unusual mean HU, 17'),
    'label upside down': (('labels', lambda a: a[::-1]), '0003: organ 2: unusual place along axis 0'),
    'label left for right': (('labels', lambda a: a[:, ::-1]), '0003: organ 1: unusual place along axis 1'),
    'small organ': (('labels', lambda a: a * (np.arange(12) == 6)), '0003: organ 1: unusual size in ml, '),
    'no organ': (('labels', lambda a: a * (a != 1)), '0003: no organ 1 in its label'),
}  # fmt: skip


@pytest.mark.parametrize(('spoil', 'warning'), SPOILED.values(), ids=SPOILED)
def test_a_case_unlike_the_others_is_named(spoil, warning, cohort, check):
    kind, how = spoil
    change(cohort, kind, '0003', how)
    done = check(cohort)
    assert done.code == 0, 'a warning is no error'
    assert [line for line in remarks(done) if line.startswith(f'warning: {warning}')], done.out
    assert {line.split()[1] for line in remarks(done)} == {'0003:'}, 'and no other case'


def test_a_scan_under_two_names_is_found(cohort, check):
    for kind in ('images', 'labels'):
        change(cohort, kind, '0003', lambda _, kind=kind: np.load(cohort / kind / '0002.npy'))
    done = check(cohort)
    assert done.code == 0 and [line.partition(':')[2] for line in remarks(done)] == [
        ' 0003: the same image as 0002: a fold that trains on one and tests the other says little'
    ]


def test_a_flipped_label_is_told_as_such(cohort, check):
    change(cohort, 'labels', '0003', lambda a: a[::-1])
    assert [line for line in remarks(check(cohort)) if line.endswith('flipped along it?')]


@pytest.mark.parametrize('axis', [0, 1])
def test_an_image_flipped_together_with_its_label_is_found_too(axis, cohort, check):
    for kind in ('images', 'labels'):
        change(cohort, kind, '0005', lambda a: np.flip(a, axis))
    assert [line for line in remarks(check(cohort)) if line.startswith(f'warning: 0005: flipped along axis {axis}?')]


def test_axes_and_spacing_unlike_the_others_are_named(cohort, check):
    change_geometry(cohort, '0002', affine=[[0, 2.0, 0, 30], *PLI[1:]])
    change_geometry(cohort, '0004', affine=[*PLI[:2], [0, 0, -1.0, 100], PLI[3]])
    said = remarks(check(cohort))
    assert 'warning: 0002: axes run PRI, in most cases PLI: turn the raw scan and convert it again' in said
    assert 'warning: 0004: spacing 2 x 2 x 1 mm, far from that of the others' in said


def test_without_geometry_sizes_are_in_voxels(cohort, check):
    shutil.rmtree(cohort / 'geometry')
    change(cohort, 'labels', '0003', lambda a: a * (np.arange(12) == 6))
    done = check(cohort)
    assert done.code == 0
    assert 'warning: 0001, 0002, 0003 and 4 more: no spacing known: sizes are in voxels' in remarks(done)
    assert [line for line in remarks(done) if line.startswith('warning: 0003: organ 1: unusual size in voxels')]


def test_a_window_that_cuts_the_organ_off_is_told_once_for_all_cases(cohort, call):
    done = call('check_data.py', cohort, 1, 100, 240)
    assert 'warning: 0001, 0002, 0003 and 4 more: over 25% of organ 1 lie outside the intensity window' in done.out


def test_few_cases_are_not_compared(cohort, check):
    for name in CASES[3:]:
        (cohort / 'images' / f'{name}.npy').unlink()
    change(cohort, 'images', '0003', lambda a: a - 50)
    done = check(cohort)
    assert done.code == 0 and not remarks(done)
    assert '0007: left out, it has no images/0007.npy' in done.out


# --- what init or training would stop at -----------------------------------------------------------------------------


def test_what_would_stop_the_pipeline_is_an_error_and_the_other_cases_are_looked_at(cohort, check):
    change(cohort, 'labels', '0001', lambda a: a[:-1])
    change(cohort, 'images', '0002', lambda a: np.where(a == a.max(), np.nan, a))
    (cohort / 'images/0004.npy').write_bytes(b'no array')
    done = check(cohort)
    assert done.code == 1
    errors = remarks(done, 'error')
    assert len(errors) == 3
    assert 'image (24, 20, 12) and label (23, 20, 12) are not two volumes' in errors[0]
    assert 'images/0002.npy: not all values are finite' in errors[1]
    assert '0004.npy: not a readable .npy array' in errors[2]
    assert '4 cases looked at; ' in done.out
    assert done.out.count('picture') == 2, 'one an organ, of the cases that are sound'


def test_no_organ_in_any_label_is_an_error_but_one_of_several_is_not(cohort, check):
    done = check(cohort, 3)
    assert done.code == 0
    assert 'warning: organ 3 is in no label: it cannot be trained on' in remarks(done)
    for name in CASES:
        change(cohort, 'labels', name, np.zeros_like)
    done = check(cohort)
    assert done.code == 1
    assert remarks(done, 'error') == ['error: no label holds an organ from 1 to 2']


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which('setpriv'), reason='root without setpriv: all is permitted')
def test_in_a_read_only_folder_all_but_the_picture_is_there_and_its_cause_is_named(cohort):
    change(cohort, 'images', '0003', lambda a: a + 90)
    cohort.chmod(0o500)
    done = run_as_anybody('check_data.py', cohort, 1, -100, 240)
    cohort.chmod(0o700)
    assert done.code == 1
    assert done.err == f"check_data.py: error: [Errno 13] Permission denied: '{cohort}/check_data.png'\n"
    assert '0007 24 x 20 x 12' in ' '.join(done.out.split()) and '0003: organ 1: unusual mean HU' in done.out


def test_an_empty_folder_is_one_line(tmp_path, check):
    done = check(tmp_path)
    assert done.code == 1 and 'no images/*.npy with labels/*.npy' in done.err and len(done.err.splitlines()) == 1


# --- the measures --------------------------------------------------------------------------------------------------


def test_robust_z_measures_by_the_median_deviation_but_never_by_less_than_least():
    np.testing.assert_allclose(robust_z([1, 2, 3, 4, 100], 0.1), np.array([-2, -1, 0, 1, 97]) * 0.6745)
    np.testing.assert_allclose(robust_z([5, 5, 5, 6], 0.5), [0, 0, 0, 2])


def test_intensity_doubts_on_literal_images():
    assert intensity_doubts(np.array([-1000, -50, 40, 900]), -100, 240) == []
    assert len(intensity_doubts(np.array([-1000] * 40 + [50]), -100, 240)) == 1
    assert len(intensity_doubts(np.array([0, 800, 4095]), -100, 240)) == 1
