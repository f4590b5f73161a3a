"""report.py: its measures, incomplete results, references, and its page in a real browser."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal

import golden_case
import numpy as np
import pytest
import surface_distance
from conftest import write_case
from matplotlib.figure import Figure

from report import number, percent
from reporting.data import parse_log, read_label_names
from reporting.measures import Surfaces, compare_surfaces, interval, joint_box, spread
from reporting.pictures import anatomy, chosen_slices, contour_path, draw_losses, remarks, thinned, upright
from reporting.reference import PUBLISHED, figures, read_references
from reporting.runs import title
from running.files import save_volume
from scans.geometry import Geometry, geometry_file, save_geometry

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:surface_distance')  # of scipy's old names

RESULTS = 'results/coarse2fine_testing_1e-5x10,20'
ROUNDS = 'FD0:XJ3_1_20261123_000000,YJ3_1_20261123_000000,ZJ3_1_20261123_000000:e2682_0.5_0.5,3'
COARSE = 'results/coarse_testing_1e-5x10,20'
PLANES = ','.join(f'{plane}J3_1_20261123_000000.pkl' for plane in 'XYZ')
FUSION = f'{COARSE}/FD0:fusion:{PLANES}_e2682,0.5/results.txt'
TXT = f'{RESULTS}/{ROUNDS}/results.txt'
JSON = f'{RESULTS}/{ROUNDS}/results.json'
R2 = f'{RESULTS}/{ROUNDS}/volumes/R2_1.npz'
LOG = """0Z 2
0ZS load pre-trained FCN8s model successfully!
0ZS Epoch[1/1], Iter[00000], Coarse/Fine/Avg Loss 0.9000/0.6000/0.7000, Time Elapsed 1.00s
0ZS Epoch[1/1], Iter[00001], Coarse/Fine/Avg Loss 0.6000/0.3000/0.4000, Time Elapsed 2.00s
0ZS Epoch[1], Total Coarse/Fine/Avg Loss 0.7500/0.4500/0.5500, Time elapsed 2.00s
0ZS mean Avg loss of the last epoch 0.5500, asked for at most 0.3: NOT reached, see "convergence" in README.md
0ZJ Epoch[1/2], Iter[00000], Coarse/Fine/Avg Loss 0.3000/0.1500/0.2000, Time Elapsed 1.00s
"""


def affine_of(spacing):
    """An affine as DICOM conversion gives it: rows to the back, columns to the left, slices down."""
    affine = np.zeros((4, 4))
    affine[1, 0], affine[0, 1], affine[2, 2], affine[3, 3] = -spacing[0], -spacing[1], -spacing[2], 1
    affine[:3, 3] = 100
    return affine


@pytest.fixture(scope='session')
def golden_data(tmp_path_factory):
    """The golden data folder with its results, a geometry of case 1 and a log; shared, so read only."""
    data = tmp_path_factory.mktemp('report') / 'data'
    golden_case.write_volumes(data)
    for part in ('results', 'lists'):
        shutil.copytree(golden_case.GOLDEN / part, data / part)
    save_geometry(geometry_file(data, '0001'), Geometry(affine_of((0.8, 0.9, 2.5)), 'position', 'made up', 'DICOM'))
    (data / 'logs').mkdir()
    (data / 'logs' / 'FD0:Z3_1_20261123_000000.txt').write_text(LOG)
    return data


@pytest.fixture
def golden(golden_data, tmp_path):
    """A copy of it of the test's own."""
    return shutil.copytree(golden_data, tmp_path / 'my <b>data & "more"')


@pytest.fixture
def report(call):
    """report(data, *options) runs report.py and gives its (output, summary, page)."""

    def report(data, *options):
        done = call('report.py', data, *options)
        assert done.code == 0, done.err
        assert f'written: {data / "report" / "index.html"}' in done.out
        summary = json.loads((data / 'report' / 'summary.json').read_text())
        return done.out, summary, (data / 'report' / 'index.html').read_text()

    return report


def masks(*boxes, shape=(12, 12, 12)):
    """Masks with one box each."""
    volumes = [np.zeros(shape, bool) for _ in boxes]
    for volume, box in zip(volumes, boxes):
        volume[box] = True
    return volumes


# --- measures ------------------------------------------------------------------------------------------------------


def test_equal_masks_have_no_distance():
    (block,) = masks(np.s_[2:5, 2:5, 2:5])
    assert compare_surfaces(block, block, (0.7, 0.7, 2.5)) == Surfaces(0, 0, 1)


@pytest.mark.parametrize(('axis', 'distance'), [(0, 0.5), (1, 2), (2, 3)])
def test_distances_are_in_mm_along_every_axis(axis, distance):
    """Two long rods, one voxel apart along an axis: most of their surfaces lie its spacing apart."""
    other = [slice(5, 6)] * 3
    one = [slice(5, 6)] * 3
    along = (axis + 1) % 3
    one[along] = other[along] = slice(0, 300)
    other[axis] = slice(6, 7)
    shape = [12, 12, 12]
    shape[along] = 300
    label, pred = masks(tuple(one), tuple(other), shape=shape)
    found = compare_surfaces(label, pred, (0.5, 2, 3))
    assert found.hd95 == distance
    assert 0 < found.asd < distance
    assert (found.nsd == 1) == (distance <= 1)


@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.7, 0.9, 2.5), (3, 0.5, 0.5)])
def test_measures_agree_with_the_library(spacing):
    label, pred = masks(np.s_[1:6, 2:9, 3:7], np.s_[2:8, 2:8, 4:10])
    distances = surface_distance.compute_surface_distances(label, pred, spacing)
    there, back = surface_distance.compute_average_surface_distance(distances)
    assert compare_surfaces(label, pred, spacing) == Surfaces(
        surface_distance.compute_robust_hausdorff(distances, 95),
        (there + back) / 2,
        surface_distance.compute_surface_dice_at_tolerance(distances, 1),
    )


def test_an_empty_mask_is_infinitely_far():
    block, empty = masks(np.s_[2:5, 2:5, 2:5], np.s_[0:0, 0:0, 0:0])
    assert compare_surfaces(block, empty, (1, 1, 1)) == Surfaces(math.inf, math.inf, 0)
    assert compare_surfaces(empty, block, (1, 1, 1)) == Surfaces(math.inf, math.inf, 0)
    assert all(map(math.isnan, compare_surfaces(empty, empty, (1, 1, 1))))


@pytest.mark.parametrize(('shape', 'spacing'), [((12, 12, 11), (1, 1, 1)), ((12, 12, 12), (1, 0, 1))])
def test_what_cannot_be_measured_is_refused(shape, spacing):
    with pytest.raises(ValueError, match='shape|spacing'):
        compare_surfaces(*masks(np.s_[2:5, 2:5, 2:5]), np.ones(shape, bool), spacing)


def test_nothing_vanishes_from_a_mean():
    found = spread([2.0, 4.0, math.inf, math.nan, None])
    assert found[:6] == (5, 2, 3.0, 1.0, 2.0, 4.0)
    assert 2.0 <= found.low < found.high <= 4.0
    assert (found.infinite, found.undefined, found.unmeasured) == (1, 1, 1)
    assert math.isnan(spread([None]).mean)


def test_the_interval_of_a_mean_is_its_bootstrap():
    values = [0.5, 0.6, 0.7, 0.8, 0.9] * 20  # std 0.141: about 0.7 +- 1.96 * 0.0141
    assert interval(values) == pytest.approx((0.672, 0.728), abs=0.002)
    assert interval(values) == interval(values)
    assert all(map(math.isnan, interval([0.5])))


def test_joint_box():
    one, other, empty = masks(np.s_[2:3, 5:6, 5:6], np.s_[4:5, 6:8, 5:6], np.s_[0:0, 0:0, 0:0])
    assert joint_box([one, other], (12, 12, 12), 1, 0) == np.s_[1:6, 4:9, 4:7]
    assert joint_box([one, other], (12, 12, 12), 3, 0) == np.s_[0:8, 2:11, 2:9]
    assert joint_box([one], (12, 12, 12), 0, 4) == np.s_[1:5, 4:8, 4:8]
    assert joint_box([empty], (12, 12, 12), 0, 4) == np.s_[5:9, 5:9, 5:9]
    assert joint_box([], (12, 2, 12), 0, 4) == np.s_[5:9, 0:2, 5:9]


# --- figures -------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_results_txt(golden, report):
    _, summary, _ = report(golden)
    assert summary['revision'] and summary['versions']['numpy'] == np.__version__
    results = summary['runs'][0]['results']
    seen = set()
    for path in sorted(golden.glob('results/*/*/results.txt')):
        kind = path.parent.parent.name.split('_')[0]
        for line in path.read_text().splitlines():
            found = re.match(
                r'(?:Average DSC_(?P<fusion>\w+)|Round (?P<round>\d+), Average DSC|DSC threshold = (?P<stop>[\d.]+), '
                r'Average DSC|Snapshot e2682: average DSC) = (?P<mean>[\d.]+)(?: std = (?P<std>[\d.]+))? \.',
                line,
            )
            if not found:
                continue
            plane = path.parent.name[4]
            key = f'{kind}_' + (
                f'fusion_{found["fusion"]}' if found['fusion'] else f'R{found["round"]}' if found['round']
                else found['stop'] or plane
            )  # fmt: skip
            key = key.replace('coarse2fine_0.99', 'coarse2fine')
            assert results[key]['all']['mean'] == float(found['mean']), key
            if found['std']:
                assert results[key]['all']['std'] == float(found['std'])
            seen.add(key)
    assert seen == results.keys() - {'HD95', 'ASD', 'NSD', 'coarse2fine_best'}
    assert len(seen) == 2 * (3 + 9) + 4 + 4


def test_a_case_has_its_rounds_distances_and_volume(golden, report):
    out, summary, page = report(golden)
    first, second = summary['runs'][0]['cases']
    assert [case['case'] for case in (first, second)] == ['0001', '0002']
    assert first['rounds'][0] == 2 * 1116 / (7319 + 1116)
    assert (first['stopped_at_round'], first['DSC']) == (2, 2 * 1114 / (3397 + 1116))
    assert first['ml']['label'] == pytest.approx(1116 * 0.8 * 0.9 * 2.5 / 1000)

    label = np.load(golden / 'labels' / '0001.npy') == 1
    pred = np.load(golden / RESULTS / ROUNDS / 'volumes' / 'R2_1.npz')['volume'] != 0
    expected = compare_surfaces(label, pred, (0.8, 0.9, 2.5))
    assert [first[key] for key in ('HD95', 'ASD', 'NSD')] == pytest.approx(list(expected))
    assert (first['unit'], second['unit'], second['ml']['label']) == ('mm', 'voxels', None)
    assert 'no geometry of 1 of 2 cases, measured in voxels: 0002' in out
    for text in ('52.37 ± 3.01', f'{expected.hd95:.2f}', '2.01 ml', '1020 voxels'):
        assert text in page


def write_results(folder, stage, cases):
    """results.json of {image name: {key: (label, prediction)}}, and the predictions as volumes."""
    content = []
    for place, (name, masks) in enumerate(cases.items(), 1):
        scores, agreement, before = {}, {}, None
        for key, (label, pred) in masks.items():
            save_volume(folder / 'volumes' / f'{key}_{place}.npz', pred)
            scores[key] = score(label, pred)
            if key.startswith('R') and key != 'R0':
                agreement[key[1:]] = score(before, pred)['DSC'] or 1.0
            before = pred
        content.append({'number': place, 'image_file': f'images/{name}.npy', 'scores': scores, 'agreement': agreement})
    (folder / 'results.json').write_text(json.dumps({'stage': stage, 'cases': content}))


def score(label, pred):
    both, pred, label = int((label & pred).sum()), int(pred.sum()), int(label.sum())
    dsc = 2 * both / (pred + label) if pred + label else None
    return {'DSC': dsc, 'intersection': both, 'prediction': pred, 'label': label}


def second_fold(data, empty=False):
    """Coarse-to-fine results of fold 1 (cases 0003, 0004): the labels themselves; 0004 may be empty."""
    cases = {}
    for case in ('0003', '0004'):
        label = np.load(data / 'labels' / f'{case}.npy')
        cases[case] = {f'R{r}': (label, label * (not (empty and case == '0004'))) for r in range(4)}
    folder = data / RESULTS / ROUNDS.replace('FD0', 'FD1')
    write_results(folder, 'coarse2fine', cases)
    return folder


def test_folds_add_up(golden, report):
    second_fold(golden)
    _, summary, page = report(golden)
    folds, everything = (summary['runs'][0]['results']['coarse2fine'][key] for key in ('folds', 'all'))
    assert folds['0']['mean'] == 0.5237438635803298
    assert folds['1']['mean'] == 1
    assert everything['mean'] == pytest.approx((0.5237438635803298 + 1) / 2)
    assert (everything['cases'], everything['max']) == (4, 1)
    assert 'Folds 0, 1' in page


def test_a_missed_organ_counts_and_is_named(golden, report):
    second_fold(golden, empty=True)
    out, summary, page = report(golden)
    results = summary['runs'][0]['results']
    assert results['coarse2fine']['all']['min'] == 0
    assert results['coarse2fine']['missed'] == ['0004']
    case = summary['runs'][0]['cases'][-1]
    assert case['missed'] and case['surfaces'] == 'nothing predicted'
    assert (case['HD95'], case['NSD']) == (None, 0)  # JSON has no infinity
    assert '0004: DSC 0.00 %, nothing predicted, MISSED' in out
    assert 'missed in 1: 0004' in page
    assert 'mean of 2 of 3: 1 infinite' in page


def test_an_undefined_dsc_is_counted_apart(golden, report):
    np.save(golden / 'labels' / '0004.npy', np.load(golden / 'labels' / '0004.npy') * 0)
    second_fold(golden)
    _, summary, page = report(golden)
    assert summary['runs'][0]['results']['coarse2fine']['all']['undefined'] == 1
    assert summary['runs'][0]['cases'][-1]['DSC'] is None
    assert 'mean of 3 of 4: 1 undefined' in page


def test_a_case_that_stopped_early_keeps_its_last_dsc(golden, report):
    """As coarse2fine_testing.py --stop_DSC 0.99 leaves it: fewer rounds."""
    folder = golden / RESULTS / ROUNDS
    lines = (folder / 'results.txt').read_text().splitlines()
    keep = [line for i, line in enumerate(lines) if 'Round 3, DSC' not in line and 'Round 3, DSC' not in lines[i - 1]]
    (folder / 'results.txt').write_text('\n'.join(keep))
    _, summary, _ = report(golden)
    assert [len(case['rounds']) for case in summary['runs'][0]['cases']] == [3, 3]
    assert summary['runs'][0]['results']['coarse2fine_R2']['all']['mean'] == 0.5237438635803298
    assert summary['runs'][0]['cases'][0]['stopped_at_round'] == 2


def test_of_two_runs_of_the_same_the_later_counts(golden, report):
    later = golden / RESULTS / ROUNDS.replace('20261123', '20261124')
    shutil.copytree(golden / RESULTS / ROUNDS, later)
    (later / 'results.txt').write_text(
        (later / 'results.txt').read_text().replace('Round 2, DSC = 2 * 1114', 'Round 2, DSC = 2 * 1113')
    )
    out, summary, _ = report(golden)
    assert summary['runs'][0]['cases'][0]['DSC'] == 2 * 1113 / (3397 + 1116)
    assert f'{ROUNDS}: left out, {later.name} counts instead' in out
    assert (
        'fold 0: its stages tested several trainings: 20261123_000000 (coarse_X), 20261124_000000 (coarse2fine)' in out
    )
    assert 'its DSC is not the one in the results' in out


def test_folds_that_were_tested_in_different_ways_are_named(golden, report):
    first = golden / RESULTS / ROUNDS
    (first / 'run.json').write_text('{"stop_DSC": 0.95}')
    second = first.with_name(ROUNDS.replace('FD0', 'FD1').replace('0.5_0.5', '0.5_0.4'))
    shutil.copytree(first, second)
    (second / 'run.json').write_text('{"stop_DSC": "none"}')
    out, *_ = report(golden)
    assert (
        f'{second.name}: stop_DSC 0.99 instead of 0.95, thresholds 0.5_0.4,3 instead of 0.5_0.5,3, unlike fold 0' in out
    )
    assert f'{first.name}: rounds ended at an agreement of 0.95' in out and f'{second.name}: rounds ended' not in out


def test_of_two_thresholds_the_one_with_more_rounds_counts(golden, report):
    trial = golden / RESULTS / ROUNDS.replace('0.5_0.5,3', '0.5_0.25,1')
    shutil.copytree(golden / RESULTS / ROUNDS, trial)
    out, *_ = report(golden)
    assert f'{trial.name}: left out, {ROUNDS} counts instead' in out


def test_folds_that_the_lists_have_no_more_do_not_count(golden, report):
    old = golden / RESULTS / ROUNDS.replace('FD0', 'FD2')
    shutil.copytree(golden / RESULTS / ROUNDS, old)
    out, summary, _ = report(golden)
    assert f'{old.name}: left out, the lists have no fold 2' in out and summary['runs'][0]['folds'] == [0]


def test_stages_of_two_trainings_of_one_name_are_named(golden, report):
    for path, digest in ((golden / COARSE / f'FD0:{PLANES.split(",")[0]}', 'a'), (golden / RESULTS / ROUNDS, 'b')):
        (path / 'run.json').write_text(json.dumps({'snapshot FD0:XJ3_1_20261123_000000.pkl': digest}))
    out, *_ = report(golden)
    assert 'its stages tested several trainings of FD0:XJ3_1_20261123_000000.pkl: coarse2fine, coarse_X' in out


def test_volumes_in_ml_are_right_on_a_sheared_grid(golden, report):
    affine = affine_of((1.0, 1.0, 2.0))
    affine[1, 2] = 1.0  # mm towards the back from slice to slice
    save_geometry(geometry_file(golden, '0001'), Geometry(affine, 'position', 'made up', 'NIfTI'))
    _, summary, _ = report(golden)
    case = summary['runs'][0]['cases'][0]
    assert case['ml']['label'] == pytest.approx(case['voxels']['label'] * 2 / 1000)


def test_organs_and_settings_are_told_apart(golden, report):
    shutil.copytree(golden / RESULTS, golden / RESULTS.replace('1e-5', '1e-4'))
    folder = golden / COARSE / 'FD0:XJ3_1_20261123_000000.pkl'
    shutil.copytree(folder, folder.with_name('FD0:XJ3_2.pkl'))
    np.save(golden / 'labels' / '0001.npy', np.load(golden / 'labels' / '0001.npy') * 2)
    _, summary, _ = report(golden)
    assert [(run['organ'], run['settings']) for run in summary['runs']] == [
        (1, '1e-4x10,20'), (1, '1e-5x10,20'), (2, '1e-5x10,20'),
    ]  # fmt: skip


def test_titles():
    assert title('coarse_X') == 'Coarse, plane X'
    assert title('oracle_fusion_F2P') == 'Oracle fusion, F2P'
    assert title('coarse_fusion_X') == 'Coarse fusion, X'
    assert title('coarse2fine_R3') == 'Coarse to fine, round 3'
    assert title('coarse2fine_0.95') == 'Coarse to fine, stopped at 0.95'
    assert title('coarse2fine') == 'Coarse to fine, stopped at 0.99'


def test_numbers_as_papers_print_them():
    assert (percent(0.84619), percent(1), percent(math.nan), percent(None)) == ('84.62', '100.00', '–', '–')
    assert (number(3.14159), number(math.inf), number(math.nan), number(None)) == ('3.14', '∞', '–', '–')


# --- results.json --------------------------------------------------------------------------------------------------


def counts(dsc, intersection, prediction, label):
    return {'DSC': dsc, 'intersection': intersection, 'prediction': prediction, 'label': label}


GOLDEN_ROUNDS = {
    'stage': 'coarse2fine',
    'cases': [
        {
            'number': 1,
            'image_file': 'images/0001.npy',
            'scores': {'R0': counts(0.2, 1116, 7319, 1116), 'R1': counts(0.5, 1113, 3421, 1116)},
            'agreement': {'1': 0.637},
        },
        {
            'number': 2,
            'image_file': 'images/0002.npy',
            'scores': {'R0': counts(0.3, 1020, 5433, 1020), 'R1': counts(0.5, 1, 1, 1), 'R2': counts(None, 0, 0, 0)},
            'agreement': {'1': 0.99, '2': 1.0},
        },
    ],
}


def test_figures_are_read_from_results_json(golden, report):
    (golden / JSON).write_text(json.dumps(GOLDEN_ROUNDS))
    out, summary, _ = report(golden)
    first, second = summary['runs'][0]['cases']
    assert first['rounds'] == [2 * 1116 / (7319 + 1116), 2 * 1113 / (3421 + 1116)]
    assert (first['inter_iteration'], first['stopped_at_round']) == ([0.637], 1)
    assert (second['DSC'], second['rounds'][2], second['stopped_at_round']) == (1, None, 1)
    assert f'{RESULTS}/{ROUNDS}/volumes/R1_2.npz: its DSC is not the one in the results' in out


def test_rounds_needed_and_the_best_round(golden, report):
    (golden / JSON).write_text(json.dumps(GOLDEN_ROUNDS).replace('3421', '34210'))  # round 1 of case 1 is the worse
    _, summary, page = report(golden)
    run = summary['runs'][0]
    assert [case['best_round'] for case in run['cases']] == [0, 1]
    assert run['results']['coarse2fine_best']['all']['mean'] == pytest.approx((2 * 1116 / (7319 + 1116) + 1) / 2)
    assert [stop['threshold'] for stop in run['stops']] == ['0.90', '0.95', '0.98', '0.99']
    assert [stop['reached'] for stop in run['stops']] == [1, 1, 1, 1]  # case 1 ends at 0.637
    assert (run['stops'][3]['rounds']['mean'], run['stops'][3]['rounds']['std']) == (1, 0)
    assert '26.46 (round 0)' in page


def test_the_table_of_results_as_csv_and_latex(golden, report):
    (golden / 'dataset.json').write_text('{"labels": {"left_kidney & co": 1}}')
    report(golden)
    with open(golden / 'report' / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row['result'] == 'coarse2fine')
    assert (row['name'], row['fold'], row['cases'], row['missed']) == ('left_kidney & co', 'all', '2', '0')
    assert (row['thickness'], row['epoch']) == ('3', 'e2682')
    assert float(row['mean']) == 0.5237438635803298
    text = (golden / 'report' / 'results.tex').read_text()
    assert r'left\_kidney \& co' in text and 'e2682, thickness 3}' in text
    assert r'Coarse to fine, stopped at 0.99 & 2 & 52.37 $\pm$ 3.01 & 49.37 to 55.38 & 49.37 & 55.38 \\' in text


def test_a_plane_and_a_fusion_are_read_from_results_json(golden, report):
    case = GOLDEN_ROUNDS['cases'][0]
    for file, stage, scores in (
        (f'{COARSE}/FD0:ZJ3_1_20261123_000000.pkl/results.txt', 'coarse', {'e2682': counts(0.8, 8, 10, 10)}),
        (FUSION, 'coarse_fusion', {'F2P': counts(0.4, 4, 10, 10)}),
    ):
        (golden / file).with_suffix('.json').write_text(
            json.dumps({'stage': stage, 'cases': [case | {'scores': scores}]})
        )
        (golden / file).unlink()
    _, summary, _ = report(golden)
    results = summary['runs'][0]['results']
    assert (results['coarse_Z']['all']['mean'], results['coarse_fusion_F2P']['all']['mean']) == (0.8, 0.4)


def test_a_results_txt_that_was_written_later_counts(golden, report):
    (golden / JSON).write_text(json.dumps(GOLDEN_ROUNDS))
    os.utime(golden / JSON, (1e9, 1e9))
    _, summary, _ = report(golden)
    assert len(summary['runs'][0]['cases'][0]['rounds']) == 4


def test_a_case_whose_place_in_the_list_has_changed_is_left_out(golden, report):
    (golden / JSON).write_text(json.dumps(GOLDEN_ROUNDS))
    (golden / 'lists' / 'testing_FD0.txt').write_text('0 images/0002.npy labels/0002.npy\n')
    (golden / 'lists' / 'training_FD0.txt').unlink()
    _, summary, _ = report(golden)
    assert f'{RESULTS}/{ROUNDS}: images/0001.npy left out' in ' '.join(summary['notices'])
    assert summary['runs'][0]['results'].keys().isdisjoint({'coarse2fine', 'coarse2fine_R0'})


@pytest.mark.parametrize(
    'text',
    ['', '[]', '{}', '{"cases": 5}', '{"cases": [{}]}', '{"cases": [{"number": 1, "image_file": "a", "scores": [1]}]}']
    + [json.dumps(GOLDEN_ROUNDS).replace(*change) for change in (
        ('1116', '"many"'), ('1116', '-1'), ('7319', '5'), ('7319', '1e999'), ('0.637', '"much"'), ('"R0"', 'R0'),
    )],
)  # fmt: skip
def test_of_a_results_json_that_cannot_be_read_the_text_counts(golden, report, text):
    (golden / JSON).write_text(text)
    _, summary, _ = report(golden)
    assert any('results.json: not readable' in notice for notice in summary['notices'])
    assert len(summary['runs'][0]['cases'][0]['rounds']) == 4


# --- logs ----------------------------------------------------------------------------------------------------------


def test_a_log_is_read():
    log = parse_log('log', LOG.splitlines())
    assert log.steps == {('S', 1): [0.7, 0.4], ('J', 1): [0.2]}
    assert log.epochs == {('S', 1): (0.75, 0.45, 0.55)}


def test_the_chart_of_the_fast_recipe_asks_for_no_published_loss():
    for recipe, words in (('published', ('loss (1 − Dice)', 'asked for')), ('fast', ('cross-entropy',))):
        log = parse_log('log', [f'arguments: plane=Z recipe={recipe} seed=0', *LOG.splitlines()])
        axes = Figure().subplots()
        draw_losses(axes, log)
        text = ' '.join([axes.get_ylabel(), *(one.get_text() for one in axes.get_legend().get_texts())])
        assert all(word in text for word in words) and ('asked for' in text) == (recipe == 'published')


def test_of_an_epoch_trained_twice_the_last_counts():
    assert parse_log('log', (LOG + LOG.replace('0.7000', '0.1000')).splitlines()).steps['S', 1] == [0.1, 0.4]


def test_thinned():
    assert thinned([1, 2, 3, 4], 2) == [1.5, 3.5]
    assert thinned([1, 2], 5) == [1, 2]


def test_a_report_of_a_training_alone(golden, report):
    shutil.rmtree(golden / 'results')
    out, summary, page = report(golden)
    assert summary['runs'] == []
    assert 'no test results yet' in out
    assert 'Fold 0, plane Z, organ 1 20261123_000000' in page
    assert 'S 0.5500 after epoch 1' in page


# --- what is half there --------------------------------------------------------------------------------------------

BROKEN = {
    'a corrupt volume': (R2, lambda f: f.write_bytes(f.read_bytes()[:100]), 'R2_1.npz: not a whole .npz'),
    'a volume of text': (R2, lambda f: f.write_text('hello'), 'R2_1.npz: not a whole .npz'),
    'a volume without its array': (R2, lambda f: np.savez(f, other=np.ones(3)), 'R2_1.npz: not a whole .npz'),
    'a volume of another shape': (R2, lambda f: np.savez(f, volume=np.ones((3, 3, 3))), '(shape (3, 3, 3) instead of'),
    'a missing volume': (R2, os.remove, 'R2_1.npz: no such volume'),
    'no results': (FUSION, os.remove, 'left out, it holds no result yet; run its stage to the end'),
    'half a results.txt': (FUSION, lambda f: f.write_text(f.read_text()[:800]), 'cut off within case 2, which is left'),
    'an empty results.txt': (FUSION, lambda f: f.write_text(''), 'left out, it holds no result yet'),
    'half a run.json': (TXT.replace('results.txt', 'run.json'), lambda f: f.write_text('{"wi'), 'not a readable run.json'),
    'no list': ('lists/testing_FD0.txt', os.remove, 'testing_FD0.txt: no such list'),
    'a list of another kind': ('lists/testing_FD0.txt', lambda f: f.write_text('a b\n'), "'a b' is not"),
    'no label': ('labels/0001.npy', os.remove, 'labels/0001.npy: no such file'),
    'a corrupt label': ('labels/0001.npy', lambda f: f.write_bytes(b'\0'), 'labels/0001.npy: not a readable .npy'),
    'a flat label': ('labels/0001.npy', lambda f: np.save(f, np.ones((3, 3))), 'labels/0001.npy: 2 axes'),
    'no image': ('images/0001.npy', os.remove, 'images/0001.npy: no such file'),
    'an image of another shape': ('images/0001.npy', lambda f: np.save(f, np.ones((3, 3, 3))), 'does not fit its label'),
    'a broken geometry': ('geometry/0001.json', lambda f: f.write_text('{'), 'geometry/0001.json: not a geometry'),
    'a geometry without spacing': (
        'geometry/0001.json', lambda f: f.write_text(f.read_text().replace('-0.8', '0')), 'lays out no volume',
    ),
    'an empty log': ('logs/FD0:Z3_1_20261123_000000.txt', lambda f: f.write_text(''), 'it holds no losses'),
    'a foreign folder': (f'{COARSE}/my copy', lambda f: f.mkdir(), 'my copy: left out, not the name of'),
    'an empty result folder': (f'{COARSE}/FD1:XJ3_1.pkl', lambda f: f.mkdir(), 'XJ3_1.pkl: left out, it holds no result'),
}  # fmt: skip


SPLEEN = {
    'nnU-Net': {'channel_names': {'0': 'CT'}, 'labels': {'background': 0, 'spleen & co': 1, 'both': [1, 2]}},
    'Decathlon': {'name': 'Spleen', 'labels': {'0': 'background', '1': 'spleen & co'}},
}


@pytest.mark.parametrize('kind', SPLEEN)
def test_organs_have_the_names_of_dataset_json(golden, report, kind):
    (golden / 'dataset.json').write_text(json.dumps(SPLEEN[kind]))
    out, summary, page = report(golden)
    assert summary['runs'][0]['organ_name'] == 'spleen & co'
    assert 'Organ 1 (spleen &amp; co): coarse to fine' in page
    assert 'Fold 0, plane Z, organ 1 (spleen &amp; co) 20261123_000000' in page
    assert 'organ 1 (spleen & co): fold 0, 0001: DSC' in out
    assert read_label_names(golden / 'dataset.json') == {0: 'background', 1: 'spleen & co'}


@pytest.mark.parametrize('text', ['', '[]', '{"labels": 5}', '{"labels": {"2": ["b"], "9999": "c", "d": -1, "1": 1}}'])
def test_a_dataset_json_without_names_changes_nothing(golden, report, text):
    (golden / 'dataset.json').write_text(text)
    _, summary, page = report(golden)
    assert 'Organ 1: coarse to fine' in page
    assert summary['runs'][0]['organ_name'] is None


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to('/dev/zero')


def huge(path):
    path.touch()
    os.truncate(path, 3 << 30)


ENDLESS = {
    'results': ['logs/FD0:Z3_1_20261123_000000.txt', TXT, 'dataset.json'],
    'results.json': [JSON],
    'volumes': [TXT.replace('results.txt', 'run.json'), R2, 'geometry/0001.json'],
    'lists': ['lists/testing_FD0.txt'],
}


@pytest.mark.parametrize('make', [fifo, device, huge])
@pytest.mark.parametrize('what', ENDLESS)
def test_a_file_without_an_end_becomes_a_line(golden, report, what, make):
    os.utime(golden / TXT, (1, 1))  # older than /dev/zero
    for file in ENDLESS[what]:
        make(golden / file)
    with time_limit(60):
        _, summary, _ = report(golden)
    for file in ENDLESS[what]:
        assert any(file in notice for notice in summary['notices']), (file, summary['notices'])
    assert summary['runs'][0]['results']['coarse_Z']['all']['cases'] == 2


@contextlib.contextmanager
def time_limit(seconds):
    """Fail instead of hanging."""

    def stop(*_):
        raise TimeoutError(f'not done after {seconds} s')

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize('what', BROKEN)
def test_what_is_broken_becomes_a_line(golden, report, what):
    path, harm, line = BROKEN[what]
    harm(golden / path)
    out, summary, page = report(golden)
    assert any(line in notice for notice in summary['notices']), summary['notices']
    assert line in out
    assert page.count('<li>') == len(summary['notices'])
    assert str(golden) not in page
    assert summary['runs'][0]['results']['coarse2fine']['all']['cases'] == 2


def test_a_case_without_result_is_named(golden, report):
    text = (golden / TXT).read_text()
    (golden / TXT).write_text(text[: text.index('  Testcase 2:') + 100])  # within its round 0
    out, summary, _ = report(golden)
    assert '1 of 2 cases without a result: 0002' in out
    assert summary['runs'][0]['results']['coarse2fine']['all']['cases'] == 1
    assert summary['runs'][0]['cases'][1]['result'] == 'coarse_fusion_F2P'


def test_distances_that_could_not_be_measured_are_counted(golden, report):
    (golden / R2).write_bytes(b'PK')
    _, summary, page = report(golden)
    assert summary['runs'][0]['results']['HD95']['all']['unmeasured'] == 1
    assert summary['runs'][0]['cases'][0]['surfaces'] == 'not measured'
    assert 'mean of 0 of 1: 1 not measured' in page


@pytest.mark.parametrize('exists', [True, False])
def test_nothing_to_report_is_one_line(call, tmp_path, exists):
    data = tmp_path / 'data'
    if exists:
        (data / 'results').mkdir(parents=True)
    done = call('report.py', data)
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert ('no results and no logs' if exists else 'no such folder') in done.err
    assert not (data / 'report').exists()


# --- reference -----------------------------------------------------------------------------------------------------


def test_a_reference_stands_beside(golden, report, tmp_path):
    file = tmp_path / 'reference.json'
    file.write_text(
        '{"name": "Yu & al.", "coarse2fine": {"mean": 0.8462, "std": 0.05}, "HD95": {"mean": 5.2}, "typo": {"mean": 0}}'
    )
    out, _, page = report(golden, '--reference', file)
    assert 'Yu &amp; al.: 84.62 ± 5.00' in page
    assert 'Yu &amp; al.: 5.20' in page
    assert 'Yu & al.: no such result here: typo; here are ASD' in out


def test_a_former_summary_is_a_reference(golden, report, tmp_path):
    report(golden)
    former = shutil.copy(golden / 'report' / 'summary.json', tmp_path / 'former.json')
    (reference,) = read_references(former)
    assert reference(1, 'coarse2fine', [0])['mean'] == 0.5237438635803298
    assert reference(1, 'coarse2fine', [0, 1]) == {}
    assert reference(1, 'NSD', [0]).keys() == {'mean', 'std', 'min', 'max', 'cases'}
    _, _, page = report(golden, '--reference', former)
    assert page.count('52.37 ± 3.01') > 2


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'not a reference'),
        ('[1]', 'not a reference'),
        ('{"name": "x"}', 'it holds no figures'),
        ('{"coarse2fine": {"mean": 84.62}}', '84.62 is not a number from 0 to 1, as 0.8462'),
        ('{"coarse2fine": {"mean": "much"}}', "'much' is not a number"),
        ('{"runs": [1]}', 'not a reference'),
        (None, 'no such reference file'),
    ],
)
def test_what_is_no_reference_is_one_line(golden_data, call, tmp_path, text, message):
    file = tmp_path / 'reference.json'
    if text is not None:
        file.write_text(text)
    done = call('report.py', golden_data, '--reference', file)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_folds_are_compared_with_the_same_folds(tmp_path):
    file = tmp_path / 'reference.json'
    folds = {'0': {'mean': 0.8, 'std': 0.1, 'cases': 20}, '1': {'mean': 0.5, 'cases': 10}, '2': {'mean': None}}
    file.write_text(json.dumps({'coarse2fine': {'folds': folds}}))
    (reference,) = read_references(file)
    assert reference(1, 'coarse2fine', [0]) == {'mean': 0.8, 'std': 0.1, 'cases': 20}
    assert reference(1, 'coarse2fine', [0, 1]) == {'mean': pytest.approx(0.7)}
    assert reference(1, 'coarse2fine', [1, 2]) == {}
    assert reference.of_fold(1, 'coarse2fine', 1)['mean'] == 0.5
    file.write_text(json.dumps({'coarse2fine': {'mean': 0.9, 'folds': folds}}))
    assert read_references(file)[0](1, 'coarse2fine', [0])['mean'] == 0.8, "the fold's own figure, not that of all"
    runs = [{'organ': 1, 'settings': name, 'folds': [0, 1], 'results': {'coarse2fine': {'mean': mean}, 'HD95': {'mean': 8}}}
            for name, mean in (('1e-5x10,20', 0.6), ('fast_5e-4x1,20', 0.8))]  # fmt: skip
    file.write_text(json.dumps({'runs': runs}))
    (former,) = read_references(file)
    assert former(1, 'coarse2fine', [0, 1], 'fast_5e-4x1,20')['mean'] == 0.8
    assert former(1, 'coarse2fine', [0, 1], 'another')['mean'] == 0.6, 'the first run'
    assert former(1, 'HD95', [0, 1])['mean'] == 8 and former(1, 'HD95', [0]) == former(1, 'HD95', [1, 2]) == {}


def write_nih(data, cases=range(1, 83), organs=1, folds=4):
    """Lists of the folds of such cases; coarse-to-fine results of folds 0 and 2, DSC 0.8 and 0.6."""
    names = [f'{case:04d}' for case in cases]
    (data / 'lists').mkdir(parents=True)
    (data / 'lists' / 'training_X.txt').write_text(f'0 0 a b 1.5{" 0" * 5 * organs}\n')
    sizes = [len(names) // folds + (fold >= folds - len(names) % folds) for fold in range(folds)]
    for fold in range(folds):
        tested = range(sum(sizes[:fold]), sum(sizes[: fold + 1]))
        lines = [f'{i} images/{names[i]}.npy labels/{names[i]}.npy\n' for i in tested]
        (data / 'lists' / f'testing_FD{fold}.txt').write_text(''.join(lines))
        if fold in (0, 2):
            folder = data / RESULTS / ROUNDS.replace('FD0', f'FD{fold}')
            folder.mkdir(parents=True)
            scores = {'R0': counts(None, 8 if fold == 0 else 6, 10, 10)}
            content = [
                {'number': n, 'image_file': f'images/{names[i]}.npy', 'scores': scores} for n, i in enumerate(tested, 1)
            ]
            (folder / 'results.json').write_text(json.dumps({'stage': 'coarse2fine', 'cases': content}))
    return data


def column(page, name):
    """The column `name` of the table of results for coarse to fine: all folds, then each fold."""
    table = page[page.index('<th scope="col">Result</th>') :].partition('</table>')[0]
    place = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table).index(name) - 1
    rows = table[table.index('<tbody class="main">') :].split('<tr')[1:]
    return [re.findall(r'<td[^>]*>(.*?)</td>', row, re.S)[place + (i > 0)].strip() for i, row in enumerate(rows)]


def test_nih_stands_beside_the_published_figures(report, tmp_path):
    _, _, page = report(write_nih(tmp_path / 'data'))
    assert column(page, 'Mean ± std (%)')[1:] == ['80.00 ± 0.00', '60.00 ± 0.00']
    assert column(page, 'published, PyTorch') == ['–', '84.62 ± 6.62', '']
    of_both = (84.44 * 20 + 84.12 * 21) / 41
    assert column(page, 'published, Caffe v2.0') == [f'{of_both:.2f}', '84.44', '84.12']
    assert column(page, 'fixed-point model')[1:] == ['83.65', '82.20']


def test_of_80_nih_cases_only_fold_0_is_the_published_one(report, tmp_path):
    cases = [case for case in range(1, 83) if case not in (25, 70)]
    _, _, page = report(write_nih(tmp_path / 'data', cases))
    assert column(page, 'published, Caffe v2.0') == ['–', '84.44', '']


def test_files_of_the_users_in_the_reports_folder_are_not_lost(golden, call):
    notes = golden / 'report/.notes'
    notes.parent.mkdir()
    notes.write_text('mine')
    done = call('report.py', golden)
    assert done.code == 1 and f'{notes.parent}: holds .notes' in done.err and notes.read_text() == 'mine'
    notes.parent.rename(golden / 'elsewhere')
    notes.parent.symlink_to(golden / 'elsewhere')
    done = call('report.py', golden)
    assert done.code == 1 and f'{notes.parent}: is not a folder' in done.err


NOT_NIH = {
    'another number of cases': {'cases': range(1, 82)},
    'other names': {'cases': range(101, 183)},
    'two organs': {'organs': 2},
    'two folds': {'folds': 2},
}


@pytest.mark.parametrize('what', [*NOT_NIH, 'a spleen', 'a reference'])
def test_other_data_does_not_stand_beside_nih(report, tmp_path, what):
    data = write_nih(tmp_path / 'data', **NOT_NIH.get(what, {}))
    if what == 'a spleen':
        (data / 'dataset.json').write_text('{"labels": {"spleen": 1}}')
    (tmp_path / 'reference.json').write_text('{"name": "ours", "coarse2fine": {"mean": 0.5}}')
    options = ['--reference', tmp_path / 'reference.json'] if what == 'a reference' else []
    _, _, page = report(data, *options)
    assert '84.44' not in page and 'published' not in page
    assert ('50.00' in page) == bool(options)


def test_the_published_file_is_itself_a_reference(golden, report):
    _, _, page = report(golden, '--reference', PUBLISHED)
    assert column(page, 'published, PyTorch') == ['84.62 ± 6.62']


def test_distances_of_a_reference_may_be_above_one():
    assert figures('HD95', {'mean': 5.2, 'cases': 20}) == {'mean': 5.2, 'cases': 20}


# --- slices --------------------------------------------------------------------------------------------------------


def test_the_opening_slice_is_where_label_and_prediction_differ_most():
    label, pred = masks(np.s_[2:6, 2:6, 2:6], np.s_[2:6, 2:6, 2:6])
    pred[4, 0:2] = True
    seen = {'image': np.zeros((12, 12, 12)), 'label': label, 'prediction': pred}
    places, opening = chosen_slices(seen, 64)
    assert (list(places), opening) == (list(range(12)), 4)
    places, opening = chosen_slices(seen, 4)
    assert (list(places), places[opening]) == ([1, 4, 7, 10], 4)


def test_without_masks_it_is_the_middle_one():
    places, opening = chosen_slices({'image': np.zeros((12, 3, 3))}, 64)
    assert places[opening] == 6


def test_contours_run_around_the_voxels():
    assert contour_path(np.zeros((3, 3), bool)) == ''
    one = np.zeros((3, 4), bool)
    one[1, 2] = True  # row 1, column 2: its middle is at (2.5, 1.5), in half pixels (5, 3)
    points = np.cumsum([[int(n) for n in pair] for pair in re.findall(r'(-?\d+) (-?\d+)', contour_path(one))], axis=0)
    assert {tuple(point) for point in points} == {(4, 3), (6, 3), (5, 2), (5, 4)}


@pytest.mark.parametrize('flips', [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)])
@pytest.mark.parametrize('axes', [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_slices_stand_upright_whatever_the_axes(axes, flips):
    """One body, axes turned and flipped: the axial slice is the same, front up, right on the left."""
    body = np.zeros((4, 5, 6))  # axes lead to R, A, S
    body[3, 4, :] = 1  # right and front
    volume = body.transpose(axes)[tuple(slice(None, None, flip) for flip in flips)]
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, flip) in enumerate(zip(axes, flips)):
        affine[world, axis] = 2.0 * flip
    found = anatomy(Geometry(affine, 'position', '', 'NIfTI'))
    assert found == list(zip(axes, flips))
    place = {world: axis for axis, (world, _) in enumerate(found)}
    axial = upright(volume, 'XYZ'[place[2]], place[1], place[0], found)[0]
    assert np.argwhere(axial).tolist() == [[0, 0]]


def test_an_affine_that_holds_no_position_tells_nothing_of_left_and_right():
    assert anatomy(Geometry(np.eye(4), 'spacing', '', 'NIfTI')) is None
    assert anatomy(None) is None


def test_remarks_tell_what_is_left_out():
    box, shape = np.s_[0:12, 2:10, 0:12], (12, 12, 12)
    assert remarks((2, 0), box, shape, 4, 1, 2) == [
        'S up, R on the left', 'cropped around the organ, slices 2 to 9', '4 of these slices are kept', '1 pixel in 2',
    ]  # fmt: skip
    assert remarks(None, np.s_[0:12, 0:12, 0:12], shape, 12, 1, 1) == []


def test_pictures_stay_small(golden, report):
    """A wide scan with a prediction all over it: at most so many slices, of 256 pixels a side."""
    rng = np.random.default_rng(0)
    shape = (300, 40, 90)
    write_case(golden, '0001', rng.integers(-100, 240, shape).astype(np.int16), np.ones(shape, np.uint8))
    mask = np.ones(shape, np.uint8)
    mask[:, :, 17] = 0
    write_results(golden / RESULTS / ROUNDS, 'coarse2fine', {'0001': {'R0': (np.ones(shape, np.uint8), mask)}})
    _, _, page = report(golden, '--slices', 64)
    first = page[page.index('id="run0_fold0_1"') : page.index('id="run0_fold0_2"')]
    sizes = [json.loads(size) for size in re.findall(r'data-size="([^"]+)"', first)]
    numbers = [json.loads(text) for text in re.findall(r'data-numbers="([^"]+)"', first)]
    assert max(map(max, sizes)) <= 256
    assert [len(n) for n in numbers] == [60, 40, 45]
    assert '<output>17</output>' in first  # the opening slice is never thinned out
    assert '45 of these slices are kept' in first
    assert '1 pixel in 2' in first


# --- the page ------------------------------------------------------------------------------------------------------


def test_names_are_escaped(golden, report):
    name = 'a"<script>alert(1)</script>&\'b'
    safe = name.replace('/', '_')
    for kind in ('images', 'labels'):
        (golden / kind / '0001.npy').rename(golden / kind / f'{safe}.npy')
    (golden / 'lists' / 'testing_FD0.txt').write_text(
        f'0 images/{safe}.npy labels/{safe}.npy\n1 images/0002.npy labels/0002.npy\n'
    )
    _, summary, page = report(golden)
    assert summary['runs'][0]['cases'][0]['case'] == safe
    assert '<script>alert' not in page
    assert '<b>data' not in page
    assert 'my &lt;b&gt;data' in page


def test_the_page_needs_nothing_from_outside(golden, report):
    _, _, page = report(golden)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    for file in re.findall(r'(?:src|href)="([^"#:]+)"', page):
        assert (golden / 'report' / file).is_file(), file


def test_the_same_results_make_the_same_report(golden, report):
    report(golden)
    first = {f.relative_to(golden): f.read_bytes() for f in (golden / 'report').rglob('*') if f.is_file()}
    (golden / 'report' / 'charts' / 'stale.svg').touch()
    report(golden)
    again = {f.relative_to(golden): f.read_bytes() for f in (golden / 'report').rglob('*') if f.is_file()}
    assert first == again
    assert not list(golden.glob('.report*'))


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    """A headless Chromium, without a network."""
    selenium = pytest.importorskip('selenium.webdriver', reason='selenium is missing (tests/requirements.txt)')
    chromium, driver = (shutil.which(name) for name in ('chromium', 'chromedriver'))
    if not (chromium and driver):
        pytest.skip('no chromium and chromedriver: apt-get install chromium chromium-driver')
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
                 'disable-component-update', 'disable-sync', 'disable-dev-shm-usage', 'window-size=1280,900',
                 f'user-data-dir={tmp_path_factory.mktemp("chromium")}'):  # fmt: skip
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    started = selenium.Chrome(options, selenium.ChromeService(driver))
    yield started
    started.quit()


def test_the_page_in_a_browser(golden, report, browser, tmp_path):
    """It loads without an error, and a slider moves the slice and its contours."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    report(golden)
    browser.get((golden / 'report' / 'index.html').as_uri())
    assert browser.find_element(By.TAG_NAME, 'h1').text == golden.name
    pictures = 'return [...document.images].every(i => i.complete && i.naturalWidth > 0)'
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(pictures))

    figure = browser.find_element(By.CSS_SELECTOR, '#run0_fold0_1 [data-plane=Z]')
    slider = figure.find_element(By.TAG_NAME, 'input')
    before = {
        name: figure.find_element(By.CSS_SELECTOR, f'path.{name}').get_attribute('d')
        for name in ('label', 'prediction')
    }
    opening = int(figure.find_element(By.TAG_NAME, 'output').text)
    slider.send_keys(Keys.ARROW_LEFT * 3)
    WebDriverWait(browser, 20).until(lambda b: figure.get_attribute('data-shown') == str(opening - 3))
    assert figure.find_element(By.TAG_NAME, 'output').text == str(opening - 3)
    after = {name: figure.find_element(By.CSS_SELECTOR, f'path.{name}').get_attribute('d') for name in before}
    assert all(before[name] != after[name] for name in before)
    image = figure.find_element(By.TAG_NAME, 'image')
    assert image.get_attribute('href').endswith('run0_fold0_1_Z.jpg')
    width, height = json.loads(figure.get_attribute('data-size'))
    row, column = divmod(opening - 3, 8)
    assert [float(image.get_attribute(key)) for key in 'xy'] == [-width * column, -height * row]

    shown = 'return getComputedStyle(document.querySelector("path.label")).display'
    assert browser.execute_script(shown) == 'inline'
    browser.find_element(By.ID, 'show-label').send_keys(Keys.SPACE)
    assert browser.execute_script(shown) == 'none'

    assert browser.save_screenshot(str(tmp_path / 'report.png'))
    assert (tmp_path / 'report.png').stat().st_size > 10_000
    assert browser.get_log('browser') == []


def test_it_fits_a_laptop_and_prints_without_its_controls(golden, report, browser):
    report(golden)
    browser.get((golden / 'report' / 'index.html').as_uri())
    fits = 'return document.documentElement.scrollWidth <= document.documentElement.clientWidth'
    assert browser.execute_script(fits)
    shown = (
        'return [".plane input", "nav a", "path.label"].map(s => getComputedStyle(document.querySelector(s)).display)'
    )
    assert browser.execute_script(shown) == ['block', 'block', 'inline']
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': 'print'})
    assert browser.execute_script(shown) == ['none', 'none', 'inline']
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'media': ''})
    assert len(browser.execute_cdp_cmd('Page.printToPDF', {})['data']) > 10_000
