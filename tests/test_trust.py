"""How far to trust a mask: the signals of the rounds, and what is predicted from them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import coarse2fine_args, settings, tiny_weights

from Data import place_fact
from reporting.explaining import look
from reporting.trust import calibrate, quality
from running.data_folder import read_cases
from running.files import write_json
from volumes.calibration import (
    calibration_file,
    case_signals,
    predict,
    print_trust,
    read_calibration,
    ridge,
)
from volumes.rounds import coarse_probability
from volumes.segmenting import find
from volumes.starting import given, place_voxels, starts
from volumes.testing import PlaneSettings, PlaneTester
from volumes.trust import (
    Watch,
    Watched,
    contraction,
    disagreement,
    entropy,
    is_record,
    marked_part,
    other_starts,
    record_of_masks,
    shifted,
    soft_DSC,
)

END = {'threshold': 0.5, 'stop_DSC': 0.99, 'rounds': 10}  # of the rounds
FINE = 'results/coarse2fine_testing_1e-5x10,4/FD0:XJ3_1,YJ3_1,ZJ3_1:e1111_0.5_0.5,2'


def row(*values, kind=np.float32):
    return np.array([[values]], kind)


class Says:
    """A tester that always predicts this volume, and keeps the masks that it was given."""

    reach = 9  # voxels around a mask: the whole volume

    def __init__(self, *values):
        self.volume, self.masks = row(*values), []

    def predict(self, image, score, mask):
        self.masks.append(mask)
        return self.volume

    def each(self, image, **volumes):
        yield self.predict(image, **volumes)


# --- signals -------------------------------------------------------------------------------------------------------


def test_planes_that_agree_disagree_by_0_and_apart_ones_by_1():
    a, b = row(1, 1, 0, 0, kind=bool), row(0, 1, 1, 0, kind=bool)
    assert disagreement([a, a, a]) == 0
    assert disagreement([a, b]) == pytest.approx(2 / 3)
    assert disagreement([a, ~a]) == 1
    assert disagreement([a & False] * 3) == 0, 'empty ones agree'


def test_entropy_is_1_bit_where_nothing_is_known_and_0_where_all_is():
    assert entropy(row(0.5, 0.5)) == pytest.approx(1)
    assert entropy(row(1, 0)) == pytest.approx(0, abs=1e-5)
    assert entropy(row()) is None


def test_soft_DSC_is_1_for_a_sure_mask():
    for mask, score, wanted in [
        (row(1, 0), row(1, 0), 1),
        (row(1, 0), row(0.5, 0.5), 2 * 0.5 / 2),
        (row(0, 0), row(0.1, 0.1), None),
    ]:
        assert soft_DSC(marked_part(mask, score), score) == wanted


def test_contraction_is_the_factor_by_which_rounds_approach_each_other():
    assert contraction([0.8, 0.9, 0.95]) == pytest.approx(0.5)
    assert contraction([0.8, 1.0]) == 0
    assert contraction([0.8]) is None and contraction([1.0, 1.0]) is None


def test_the_record_of_the_rounds_and_the_same_rounds():
    fine = [Says(0.9, 0.9, 0.1, 0), Says(0.9, 0.2, 0.1, 0), Says(0.9, 0.9, 0.1, 0)]
    coarse = [row(255, 255, 255, 0, kind=np.uint8)] * 2 + [row(255, 255, 0, 0, kind=np.uint8)]
    watch = Watch(0.5, probes=3)
    rounds = watch.coarse_to_fine(coarse, fine, row(0, 0, 0, 0))
    masks = [mask.ravel().tolist() for mask, _ in (next(rounds), next(rounds), next(rounds))]
    assert masks == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    first, second, third = (record := watch.record())['rounds']
    assert [values['voxels'] for values in record['rounds']] == [3, 2, 2]
    assert 'inter_iteration' not in first and second['inter_iteration'] == 0.8 and third['inter_iteration'] == 1
    assert first['planes'] == pytest.approx(1 / 3) and second['planes'] == 0.5
    assert second['snapshots'] is None, 'one snapshot a plane'
    assert record['contraction'] == 0 and record['probes'] == [1, None, None], 'a shift out of the volume'
    assert fine[0].masks[1].ravel().tolist() == [1, 1, 1, 1], 'the first probe is widened'


def test_another_start_is_round_0():
    start = row(0, 1, 1, 1, kind=np.uint8), row(0, 0.7, 0.7, 0.7)
    watch = Watch(0.5)
    (mask, score), (after, _) = (
        pair
        for pair, _ in zip(
            watch.coarse_to_fine([row(0, 0, 0, 0, kind=np.uint8)] * 3, [Says(1, 1, 0, 0)], row(0, 0, 0, 0), start),
            'ab',
        )
    )
    assert mask is start[0] and score is start[1] and after.ravel().tolist() == [1, 1, 0, 0]


class Snapshots(PlaneTester):
    """A PlaneTester of these paths, which are the probabilities that they predict."""

    def __init__(self, *paths):
        super().__init__('X', paths, 'F', PlaneSettings((-100, 240), 3, 1, torch.device('cpu'), 'fp32'))

    def each(self, image):
        yield from (path.copy() for path in self.paths)


def test_several_snapshots_give_their_mean_and_their_disagreement():
    tester = Snapshots(row(0.9, 0.1), row(0.7, 0.3), row(0.8, 0.9))
    watched = Watched(tester, 0.5)
    np.testing.assert_array_equal(watched.predict(None), tester.predict(None))
    np.testing.assert_allclose(tester.predict(None), row(0.8, 1.3 / 3))
    assert watched.vote.tolist() == [[[True, False]]]
    assert [vote.ravel().tolist() for vote in watched.votes] == [[True, False], [True, False], [True, True]]


def test_a_start_is_widened_or_shifted_and_what_leaves_is_lost():
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 1, 1] = 1
    widened, *moved = other_starts(mask, 1, 7)
    assert widened.sum() == 7 and [tuple(map(int, np.argwhere(m)[0])) for m in moved] == [
        (2, 1, 1), (0, 1, 1), (1, 2, 1), (1, 0, 1), (1, 1, 2), (1, 1, 0)
    ]  # fmt: skip
    assert not shifted(mask, (0, 0, 4)).any() and not shifted(mask, (0, 9, 0)).any()


@pytest.mark.parametrize(
    'record',
    [{}, [], {'rounds': 3, 'probes': []}, {'rounds': [3], 'probes': []}, {'rounds': [{'voxels': 'x'}], 'probes': []},
     {'rounds': [], 'probes': [math.nan]}, {'rounds': []}, {'rounds': [{'planes': [1]}], 'probes': []}],
)  # fmt: skip
def test_what_is_no_record_is_not_taken_for_one(record):
    assert not is_record(record)


# --- the records of test cases -------------------------------------------------------------------------------------


def test_coarse_to_fine_records_its_signals_beside_the_same_results(tested, call):
    done = call('coarse2fine_testing.py', *coarse2fine_args(tested), '--probe', 1)
    assert done.code == 0, done.err
    folder = tested / FINE
    record = json.loads((folder / 'signals' / '1.json').read_text())
    results = json.loads((folder / 'results.json').read_text())
    case = results['cases'][0]
    assert case['signals'] == record and is_record(record)
    assert len(record['rounds']) == 3 and len(record['probes']) == 1
    for r in (1, 2):
        assert record['rounds'][r]['inter_iteration'] == pytest.approx(case['agreement'][str(r)])
        assert record['rounds'][r]['voxels'] == case['scores'][f'R{r}']['prediction']
    assert 0 <= record['rounds'][2]['planes'] <= 1 and 0 < record['rounds'][2]['entropy'] < 1

    # a probe that is asked for later is computed, the masks and results.txt stay the same
    text = (folder / 'results.txt').read_bytes()
    call('coarse2fine_testing.py', *coarse2fine_args(tested), '--probe', 2)
    again = json.loads((folder / 'signals' / '1.json').read_text())
    assert again['probes'][:1] == record['probes'] and len(again['probes']) == 2
    assert again['rounds'] == record['rounds'] and (folder / 'results.txt').read_bytes() == text

    # results of earlier versions, or a damaged record: the signals of the masks
    (folder / 'signals' / '1.json').write_text('{"rounds": [7]}')
    call('coarse2fine_testing.py', *coarse2fine_args(tested))
    kept = json.loads((folder / 'results.json').read_text())['cases'][0]['signals']
    assert kept['rounds'][1] == {
        name: record['rounds'][1][name] for name in ('voxels', 'inter_iteration', 'from_start')
    }
    assert kept['contraction'] == record['contraction'] and (folder / 'results.txt').read_bytes() == text


def test_the_record_of_masks_alone():
    masks = [row(1, 1, 1, 0, kind=np.uint8), row(1, 1, 0, 0, kind=np.uint8)]
    assert record_of_masks(masks) == {
        'rounds': [{'voxels': 3}, {'voxels': 2, 'inter_iteration': 0.8, 'from_start': 0.8}],
        'contraction': None,
        'probes': [],
    }


# --- the predicted DSC ---------------------------------------------------------------------------------------------


def made_cases(count, seed=0):
    """{name: (signals, DSC)}: rounds that agree better have the better DSC, but for some noise."""
    random = np.random.default_rng(seed)
    values = np.linspace(0.5, 0.9, count)
    inters = np.clip(0.8 + 0.2 * values + random.normal(0, 0.003, count), 0, 1)
    return {
        f'case{i}': ({'inter_iteration': float(inter), 'planes': float(random.uniform(0.1, 0.5))}, float(value))
        for i, (inter, value) in enumerate(zip(inters, values))
    }


def test_the_signals_are_those_of_the_round_where_a_case_stops():
    record = {'rounds': [{'voxels': 3, 'planes': 0.4}, {'voxels': 2, 'planes': 0.3, 'inter_iteration': 0.8, 'x': 1},
                         {'voxels': 0}]}  # fmt: skip
    assert case_signals(record, 0) == {'planes': 0.4}
    assert case_signals(record, 1) == {'inter_iteration': 0.8, 'planes': 0.3}
    assert case_signals(record) == {}, 'nothing found: no signals'


def test_each_case_is_predicted_without_its_own_label():
    cases = made_cases(8)
    calibration = calibrate(cases)
    changed = calibrate(cases | {'case3': (cases['case3'][0], 0.1)})
    assert changed['left_out'][3] == calibration['left_out'][3]
    assert changed['left_out'][2] != calibration['left_out'][2]
    assert np.abs(np.subtract(calibration['left_out'], calibration['DSC'])).max() < 0.1


def test_fewer_than_six_cases_predict_nothing():
    assert calibrate(made_cases(5)) is None and calibrate(made_cases(6))['signals'] == ['inter_iteration', 'planes']


def test_only_signals_that_all_cases_have_are_used():
    cases = made_cases(6)
    del cases['case2'][0]['planes']
    assert calibrate(cases)['signals'] == ['inter_iteration']
    del cases['case1'][0]['inter_iteration']
    assert calibrate(cases) is None


def test_what_predictions_are_worth():
    found = quality(calibrate(made_cases(8)))
    assert found['rank_correlation'] > 0.9 and found['rank_correlation_of_signals']['inter_iteration'] > 0.9
    assert found['worst'] == ['case0', 'case1'] and 'case0' in found['caught'] and found['mean_error'] < 0.1


def test_ridge_is_the_published_solution():
    """Augmented least squares: rows of sqrt(penalty) with the value 0."""
    random = np.random.default_rng(1)
    table, values = random.uniform(0.2, 0.8, (9, 2)), random.uniform(0.4, 0.6, 9)
    x = np.log(table / (1 - table))
    scaled = (x - x.mean(0)) / x.std(0)
    weights, *_ = np.linalg.lstsq(np.r_[scaled, np.eye(2)], np.r_[values - values.mean(), 0, 0], rcond=None)
    assert ridge(table, values)(table[4]) == pytest.approx(values.mean() + scaled[4] @ weights)


def test_the_interval_holds_nine_in_ten_of_the_errors_and_all_of_few():
    few, many = calibrate(made_cases(6)), calibrate(made_cases(30))
    for calibration, least in ((few, 6), (many, 28)):
        value, low, high, _ = predict(calibration, made_cases(6)['case3'][0])
        errors = np.abs(np.subtract(calibration['left_out'], calibration['DSC']))
        assert (errors <= max(high - value, value - low) + 1e-12).sum() == least


def test_a_low_or_strange_prediction_asks_to_look_at_the_scan():
    calibration = calibrate(made_cases(8))
    assert predict(calibration, {'inter_iteration': 0.9, 'planes': 0.3})[3]
    assert not predict(calibration, {'inter_iteration': 0.97, 'planes': 0.3})[3]
    assert predict(calibration, {'inter_iteration': 0.97, 'planes': 0.9999}) == (None, None, None, True), 'unlike them'


def test_the_line_of_a_new_scan(tmp_path, capsys):
    record = {'rounds': [{'voxels': 9, 'planes': 0.5}, {'voxels': 9, 'planes': 0.31, 'inter_iteration': 0.9}]}
    path = calibration_file(tmp_path, 3, 1)
    assert print_trust(record, path, list, {}) == {}
    assert capsys.readouterr().out.startswith(f'planes disagree on 31 %; no predicted DSC: report.py writes {path}')
    settings, of_a = {'threshold': 0.5, 'stop_DSC': 0.99}, lambda: ['b', 'a']
    found = {'snapshots': [['a', 'b'], ['c', 'd']]}
    write_json(path, calibrate(made_cases(8)) | found | {'settings': [settings | {'rounds': 1}]})
    figures = print_trust(record, path, of_a, settings)
    line = 'predicted DSC {predicted_DSC:.2f} ({low:.2f} to {high:.2f}); planes disagree on 31 %: look at this scan\n'
    assert capsys.readouterr().out == line.format(**figures) and figures['look_at_this_scan']
    for others in ('ac', 'abcd', 'a'):
        assert print_trust(record, path, lambda: list(others), settings) == {}
        assert f'no predicted DSC: {path} is of other snapshots; give those of one fold' in capsys.readouterr().out
    record['rounds'][-1]['planes'] = 0.9999
    assert print_trust(record, path, of_a, settings) == {
        'predicted_DSC': None,
        'low': None,
        'high': None,
        'look_at_this_scan': True,
    }
    assert capsys.readouterr().out == (
        'no predicted DSC, its signals are unlike those of the test cases; planes disagree on 100 %: look at this scan\n'
    )
    assert print_trust({'rounds': record['rounds'][:1]}, path, of_a, settings) == {}
    assert capsys.readouterr().out == 'planes disagree on 50 %; no predicted DSC without a fine round\n'
    write_json(path, read_calibration(path) | {'settings': [settings | {'rounds': 2}]})
    assert print_trust(record, path, of_a, settings) == {}
    assert 'end in another way' in capsys.readouterr().out, 'one round, though two were allowed, and no agreement'
    assert print_trust(record, path, of_a, settings, 'given') == {}
    assert 'no predicted DSC: round 0 is not that of the coarse networks' in capsys.readouterr().out
    assert print_trust({'rounds': [{'voxels': 9, 'planes': None}]}, path, of_a, settings, 'given') == {}
    assert print_trust({'rounds': [{'voxels': 0}]}, path, of_a, settings) == {} and capsys.readouterr().out == ''


def test_the_inter_iteration_DSC_is_used_only_without_the_DSC_with_round_0():
    cases = {name: (signals | {'from_start': 0.9}, value) for name, (signals, value) in made_cases(6).items()}
    assert calibrate(cases)['signals'] == ['from_start', 'planes']


@pytest.mark.parametrize('change', [{'table': [[1]]}, {'DSC': 3}, {'signals': ['size']}, {'left_out': [math.nan] * 8},
                                    {'settings': [{'threshold': 0.5}]}, {'snapshots': ['a']}])  # fmt: skip
def test_a_damaged_calibration_is_one_line(tmp_path, change):
    path = calibration_file(tmp_path, 3, 1)
    write_json(path, calibrate(made_cases(8)) | {'settings': [END], 'snapshots': []} | change)
    with pytest.raises(ValueError, match=f'{path}: not a calibration; run report.py again'):
        read_calibration(path)


def test_each_snapshot_of_a_plane_is_asked_in_every_scan(monkeypatch):
    monkeypatch.setattr('volumes.testing.load_RSTN', lambda path, *rest: path)
    monkeypatch.setattr('volumes.testing.predict_volume', lambda net, image, *rest: row(0.2 if net == 'a' else 0.9))
    tester = PlaneTester('X', ['a', 'b'], 'F', PlaneSettings((-100, 240), 3, 1, torch.device('cpu'), 'fp32'))
    for left in (None, 'b'):  # what is in memory from the scan before
        tester.net = left
        assert Watched(tester, 0.5).predict(row(0)).item() == pytest.approx(0.55)


def results_of(cases):
    """A results.txt of cases with one fine round, as the published pipeline writes it."""
    lines = ['Fusing results of 1 snapshots:']
    for number, (signals, DSC) in enumerate(cases.values(), 1):
        inter, both = round(signals['inter_iteration'] * 1000), round(DSC * 1000)
        lines += [f'  Testcase {number}:', f'    Round 0, DSC = 2 * {both - 9} / (1000 + 1000) = 0 .',
                  f'    Round 1, DSC = 2 * {both} / (1000 + 1000) = 0 .',
                  f'      Inter-iteration DSC = 2 * {inter} / (1000 + 1000) = 0 .']  # fmt: skip
    return '\n'.join([*lines, 'Round 0, Average DSC = 0 .']) + '\n'


@pytest.mark.parametrize('count', [5, 8])
def test_the_report_predicts_and_saves_its_calibration(tmp_path, call, count):
    data = tmp_path / 'data'
    folder = data / 'results/coarse2fine_testing_1e-5x10,20' / 'FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,1'
    snapshots = data / 'models/snapshots/SIJ_training_1e-5x10,20'
    for path in (folder, snapshots):
        path.mkdir(parents=True)
    (folder / 'results.txt').write_text(results_of(made_cases(count)))
    write_json(folder / 'run.json', {f'snapshot {plane}.pkl': f'of {plane}' for plane in 'ZYX'})
    done = call('report.py', data)
    assert done.code == 0, done.err
    page = (data / 'report/index.html').read_text()
    trust = json.loads((data / 'report/summary.json').read_text())['runs'][0]['trust']
    path = calibration_file(snapshots, 3, 1)
    assert path.exists() == (count == 8) == (f'written: {path}' in done.out)
    if count < 8:
        assert trust['calibration'] is None and 'no predicted DSC from fewer than 6' in page
        return
    assert trust['rank_correlation'] > 0.9 and len(trust['signals']) == 8
    assert read_calibration(path)['snapshots'] == [['of X', 'of Y', 'of Z']]
    assert read_calibration(path)['settings'] == [{'threshold': 0.5, 'stop_DSC': 0.99, 'rounds': 1}]
    assert trust['signals'][0]['predicted'] == read_calibration(path)['left_out'][0]
    assert 'would have caught case 1 of fold 0' in page and (data / 'report/charts/run0_trust.svg').exists()


# --- other starts of a new scan ------------------------------------------------------------------------------------


def test_lower_thresholds_and_the_place_follow_where_nothing_is_found():
    coarse = [row(0, 15, 20, 0, 60, kind=np.uint8)] * 3  # at most 0.235
    found = [(mask.ravel().tolist(), remark) for mask, _, remark in starts(coarse, 0.5, [0, 1, 0, 1, 0, 0.4])]
    assert found == [
        ([0, 0, 0, 0, 0], ''),
        ([0, 0, 0, 0, 1], 'round 0 from the probability 0.1 on'),
        ([0, 1, 1, 0, 0], 'round 0 from the probability 0.05 on'),  # the largest component
        ([1, 1, 0, 0, 0], 'round 0 where the training cases have the organ'),
    ]
    assert len(list(starts(coarse, 0.5, None))) == 3
    assert len(list(starts(coarse, 0.08, None))) == 2, 'only lower thresholds'


def test_a_place_has_at_least_one_voxel():
    assert place_voxels([0.2, 0.5, 1, 1, 0, 0], (10, 4, 3)) == [2, 5, 3, 4, 0, 1]


def test_the_place_is_the_median_box_of_the_training_cases(data):
    settings_ = settings(data)
    cases = read_cases(data, 'training', 0)
    boxes = []
    for case in cases:
        found = np.argwhere(case.label(data, 1))
        low, high = found.min(0), found.max(0) + 1
        boxes.append(np.ravel(np.column_stack([low, high])) / np.repeat(np.load(data / case.image_file).shape, 2))
    assert place_fact(settings_, cases)['place'] == np.median(boxes, axis=0).tolist()
    (data / 'lists/training_X.txt').unlink()
    assert place_fact(settings_, cases) == {}


def fake_networks(coarse, fine, place=None):
    """Networks whose coarse testers see `coarse`, and whose fine ones see `fine`, wherever they look."""
    testers = [SimpleNamespace(predict=lambda image: row(*coarse))] * 3
    return SimpleNamespace(coarse=testers, fine=[Says(*fine)] * 3, keep=True, training=SimpleNamespace(place=place),
                           settings=SimpleNamespace(margin=4), release=lambda *_: None)  # fmt: skip


def test_a_scan_in_which_the_coarse_networks_find_nothing_is_tried_again(capsys):
    warnings = []
    mask, _, found = find(row(0, 0, 0), fake_networks([0.3, 0, 0], [0.9, 0.9, 0]), 3, 0.99, 0.5, warn=warnings.append)
    assert mask.ravel().tolist() == [1, 1, 0] and found['start'] == 'round 0 from the probability 0.25 on'
    assert warnings == ['found only with round 0 from the probability 0.25 on: look at this scan']
    assert 'nothing found; tries again: round 0 from the probability 0.25 on' in capsys.readouterr().out
    assert found['voxels_by_round'] == [1, 2, 2] and found['rounds'] == 2


def test_the_last_place_to_look_is_that_of_the_training_cases():
    place, warnings = [0, 1, 0, 1, 0.6, 1], []
    networks = fake_networks([0, 0, 0], [0, 0, 0.9], place)
    mask, _, found = find(row(0, 0, 0), networks, 3, 0.99, 0.5, warn=warnings.append)
    assert mask.ravel().tolist() == [0, 0, 1] and 'where the training cases have the organ' in warnings[0]
    networks.training.place = None
    mask, _, found = find(row(0, 0, 0), networks, 3, 0.99, 0.5, warn=warnings.append)
    assert not mask.any() and found['voxels'] == 0
    assert warnings[1] == (
        'the snapshots do not say where the training cases have the organ, so it is not looked for there'
    )


def test_a_given_start_needs_no_coarse_network_and_is_not_replaced():
    networks = fake_networks([0.9, 0.9, 0.9], [0, 0, 0])
    networks.coarse = None
    start = given(row(1, 0, 0))
    mask, _, found = find(row(0, 0, 0), networks, 3, 0.99, 0.5, start, warn=pytest.fail)
    assert not mask.any() and found['start'] == 'given' and found['signals']['rounds'][0]['planes'] is None


# --- comparisons ---------------------------------------------------------------------------------------------------


def data_of(path, cases, settings='1e-5x10,20'):
    """A data folder with a results.txt of these cases."""
    folder = path / f'results/coarse2fine_testing_{settings}' / 'FD0:XJ3_1,YJ3_1,ZJ3_1:e2682_0.5_0.5,1'
    folder.mkdir(parents=True)
    (folder / 'results.txt').write_text(results_of(cases))
    return path


@pytest.mark.parametrize('count', [5, 8])
def test_results_are_compared_case_by_case(tmp_path, call, count):
    cases = made_cases(count)
    better = {name: (signals, value + 0.01 + 0.002 * i) for i, (name, (signals, value)) in enumerate(cases.items())}
    data, other = data_of(tmp_path / 'a', better), data_of(tmp_path / 'b', cases)
    done = call('report.py', data, '--compare', other)
    assert done.code == 0, done.err
    (found,) = json.loads((data / 'report/summary.json').read_text())['comparisons']
    differences = [case['difference'] for case in found['differences']]
    assert found['names'] == [f'{name}, 1e-5x10,20 e2682, thickness 3' for name in 'ab'] and found['higher'] == count
    assert found['all']['mean'] == pytest.approx(np.mean(differences)) == pytest.approx(0.01 + 0.001 * (count - 1))
    assert found['p'] == (None if count < 6 else pytest.approx(2 / 2**8)), 'all of eight are higher'
    page = (data / 'report/index.html').read_text()
    assert ('Fewer than 6 cases differ: this shows nothing.' in page) == (count < 6)
    assert ('Wilcoxon signed-rank test: p = 0.0078' in page) == (count == 8)
    assert (data / 'report/charts/compared0.svg').exists()


def test_two_settings_in_one_folder_are_compared_once(tmp_path, call):
    cases = made_cases(6)
    data = data_of(data_of(tmp_path / 'a', cases), cases, settings='1e-4x10,20')
    assert call('report.py', data, '--compare', data).code == 0
    (found,) = json.loads((data / 'report/summary.json').read_text())['comparisons']
    assert [name.split()[1] for name in found['names']] == ['1e-4x10,20', '1e-5x10,20'] and found['p'] is None
    assert 'There is no difference.' in (data / 'report/index.html').read_text()


def test_cases_that_do_not_differ_prove_nothing(tmp_path, call):
    """Ten equal cases and five better ones: the normal approximation would say p = 0.04."""
    cases = made_cases(15)
    better = {name: (s, value + 0.01 * (i < 5)) for i, (name, (s, value)) in enumerate(cases.items())}
    data, other = data_of(tmp_path / 'one/data', better), data_of(tmp_path / 'two/data', cases)
    assert call('report.py', data, '--compare', other).code == 0
    (found,) = json.loads((data / 'report/summary.json').read_text())['comparisons']
    assert (found['higher'], found['lower'], found['p']) == (5, 0, None)
    assert [name.split(', ')[0] for name in found['names']] == [str(data), str(other)], 'both folders are called data'
    assert 'Fewer than 6 cases differ' in (data / 'report/index.html').read_text()


def test_what_cannot_be_compared_is_said(tmp_path, call):
    data = data_of(tmp_path / 'a', made_cases(6))
    done = call('report.py', data, '--compare', data)
    assert done.code == 0 and 'no two results of one organ to compare' in done.out
    done = call('report.py', data, '--compare', tmp_path / 'none')
    assert done.code == 1 and f'{tmp_path / "none"}: no such folder' in done.err and not done.out, 'before any picture'


def test_a_report_survives_a_damaged_run_json_where_it_would_calibrate(tmp_path, call):
    data = data_of(tmp_path / 'a', made_cases(6))
    (run,) = data.glob('results/*/*')
    (run / 'run.json').write_text('{')
    done = call('report.py', data)
    assert done.code == 0 and 'run.json: not a readable run.json' in done.out
    assert json.loads((data / 'report/summary.json').read_text())['runs'][0]['trust']['calibration'] is None


# --- what the networks see -----------------------------------------------------------------------------------------


def test_what_the_networks_see_is_what_testing_computes(tested, call):
    call('coarse2fine_testing.py', *coarse2fine_args(tested))
    volumes = [tested / f'results/coarse_testing_1e-5x10,4/FD0:{p}J3_1.pkl/volumes/e1111_1.npz' for p in 'XYZ']
    score = coarse_probability([np.load(path)['volume'] for path in volumes])
    mask, image = np.load(tested / FINE / 'volumes/R0_1.npz')['volume'], np.load(tested / 'images/0001.npy')
    path = tested / 'models/snapshots/SIJ_training_1e-5x10,4/FD0:ZJ3_1.pkl'
    tester = PlaneTester('Z', [path], 'F', PlaneSettings((-100.0, 240.0), 3, 4, torch.device('cpu'), 'fp32'))
    panels, (a0, a1, b0, b1), j = look(tester, image, mask, score)
    assert j == mask.sum(axis=(0, 1)).argmax()
    fine, output = [], tester.load(path)
    tester.net = lambda **inputs: fine.append(output(**inputs)) or fine[-1]
    tester.predict(image, score=score, mask=mask)
    order = [k for k in range(mask.shape[2]) if mask[:, :, max(k - 1, 0) : k + 2].any()]
    seen = torch.cat(fine)[order.index(j)]
    np.testing.assert_allclose(panels['fine probability, round 1'], seen[1].numpy(), atol=1e-6)
    outside = np.ones(mask.shape[:2], bool)
    outside[a0:a1, b0:b1] = False
    assert not panels['fine probability, round 1'][outside].any()
    np.testing.assert_allclose(panels['the fine network sees'], panels['image'] * panels['saliency'], rtol=1e-6)


def test_the_report_draws_the_worst_cases(tested, call):
    call('coarse2fine_testing.py', *coarse2fine_args(tested))
    assert call('report.py', tested, '--explain', 1).code == 0
    files = sorted(path.name for path in (tested / 'report/cases').glob('*_seen.png'))
    case = min(json.loads((tested / 'report/summary.json').read_text())['runs'][0]['cases'], key=lambda c: c['DSC'])
    assert files == [f'run0_fold0_{case["number"]}_{plane}_seen.png' for plane in 'XYZ']
    assert (tested / 'report/index.html').read_text().count('class="seen"') == 3
    snapshot = next(tested.glob('models/snapshots/*/FD0:ZJ3_1.pkl'))
    torch.save(tiny_weights(seed=8), snapshot)
    done = call('report.py', tested)
    assert f'{snapshot.name}: has changed since' in done.out and not list((tested / 'report/cases').glob('*_seen.png'))
    assert call('report.py', tested, '--explain', 0).code == 0
    assert not list((tested / 'report/cases').glob('*_seen.png'))
