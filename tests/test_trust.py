"""How far to trust a mask: the signals of the rounds, and what is predicted from them."""

import json
import math

import numpy as np
import pytest
from conftest import coarse2fine_args

from reporting.trust import calibrate, quality
from running.files import write_json
from volumes.calibration import (
    calibration_file,
    case_signals,
    predict,
    print_trust,
    read_calibration,
    ridge,
)
from volumes.trust import (
    Watch,
    Watched,
    checked,
    contraction,
    disagreement,
    entropy,
    other_starts,
    record_of_masks,
    shifted,
    soft_DSC,
)

FINE = 'results/coarse2fine_testing_1e-5x10,4/FD0:XJ3_1,YJ3_1,ZJ3_1:e1111_0.5_0.5,2'


def row(*values, kind=np.float32):
    return np.array([[values]], kind)


class Says:
    """A tester that always predicts this volume, and keeps the masks that it was given."""

    def __init__(self, *values):
        self.volume, self.masks = row(*values), []

    def predict(self, image, score, mask):
        self.masks.append(mask)
        return self.volume


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
    assert soft_DSC(row(1, 0), row(1, 0)) == 1
    assert soft_DSC(row(1, 0), row(0.5, 0.5)) == pytest.approx(2 * 0.5 / 2)
    assert soft_DSC(row(0, 0), row(0.1, 0.1)) is None


def test_contraction_is_the_factor_by_which_rounds_approach_each_other():
    assert contraction([0.8, 0.9, 0.95]) == pytest.approx(0.5)
    assert contraction([0.8, 1.0]) == 0
    assert contraction([0.8]) is None and contraction([1.0, 1.0]) is None


def test_the_record_of_the_rounds_and_the_same_rounds():
    fine = [Says(0.9, 0.9, 0.1, 0), Says(0.9, 0.2, 0.1, 0), Says(0.9, 0.9, 0.1, 0)]
    coarse = [row(255, 255, 255, 0, kind=np.uint8)] * 2 + [row(255, 255, 0, 0, kind=np.uint8)]
    watch = Watch(0.5, probes=3)
    rounds = watch.coarse_to_fine(coarse, fine, None, organ_ID=1)
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
            watch.coarse_to_fine([row(0, 0, 0, 0, kind=np.uint8)] * 3, [Says(1, 1, 0, 0)], None, 1, start), 'ab'
        )
    )
    assert mask is start[0] and score is start[1] and after.ravel().tolist() == [1, 1, 0, 0]


class Snapshots:
    """A PlaneTester of these paths, which are the probabilities that they predict."""

    def __init__(self, *paths):
        self.paths, self.released = list(paths), 0

    def predict(self, image):
        return sum(self.paths) / np.float32(len(self.paths))

    def release(self):
        self.released += 1


def test_several_snapshots_give_their_mean_and_their_disagreement():
    tester = Snapshots(row(0.9, 0.1), row(0.7, 0.3), row(0.8, 0.9))
    watched = Watched(tester, 0.5)
    np.testing.assert_array_equal(watched.predict(None), tester.predict(None))
    assert watched.vote.tolist() == [[[True, False]]]
    assert [vote.ravel().tolist() for vote in watched.votes] == [[True, False], [True, False], [True, True]]


def test_a_start_is_widened_or_shifted_and_what_leaves_is_lost():
    mask = np.zeros((3, 4, 5), np.uint8)
    mask[1, 1, 1] = 1
    widened, *moved = other_starts(mask, 1)
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
    assert not checked(record)


# --- the records of test cases -------------------------------------------------------------------------------------


def test_coarse_to_fine_records_its_signals_beside_the_same_results(tested, call):
    done = call('coarse2fine_testing.py', *coarse2fine_args(tested), '--probe', 1)
    assert done.code == 0, done.err
    folder = tested / FINE
    record = json.loads((folder / 'signals' / '1.json').read_text())
    results = json.loads((folder / 'results.json').read_text())
    case = results['cases'][0]
    assert case['signals'] == record and checked(record)
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
    assert predict(calibration, {'inter_iteration': 0.97, 'planes': 0.9999})[3], 'unlike the test cases'


def test_the_line_of_a_new_scan(tmp_path, capsys):
    record = {'rounds': [{'voxels': 9, 'planes': 0.5}, {'voxels': 9, 'planes': 0.31, 'inter_iteration': 0.9}]}
    path = calibration_file(tmp_path, 3, 1)
    assert print_trust(record, path) == {}
    assert capsys.readouterr().out.startswith(f'planes disagree on 31 %; no predicted DSC: report.py writes {path}')
    write_json(path, calibrate(made_cases(8)))
    figures = print_trust(record, path)
    line = 'predicted DSC {predicted_DSC:.2f} ({low:.2f} to {high:.2f}); planes disagree on 31 %: look at this scan\n'
    assert capsys.readouterr().out == line.format(**figures) and figures['look_at_this_scan']
    assert print_trust({'rounds': record['rounds'][:1]}, path) == {}
    assert capsys.readouterr().out == 'planes disagree on 50 %; no predicted DSC without a fine round\n'
    assert print_trust({'rounds': [{'voxels': 0}]}, path) == {} and capsys.readouterr().out == ''


def test_the_inter_iteration_DSC_is_used_only_without_the_DSC_with_round_0():
    cases = {name: (signals | {'from_start': 0.9}, value) for name, (signals, value) in made_cases(6).items()}
    assert calibrate(cases)['signals'] == ['from_start', 'planes']


@pytest.mark.parametrize('change', [{'table': [[1]]}, {'DSC': 3}, {'signals': ['size']}, {'left_out': [math.nan] * 8}])
def test_a_damaged_calibration_is_one_line(tmp_path, change):
    path = calibration_file(tmp_path, 3, 1)
    write_json(path, calibrate(made_cases(8)) | change)
    with pytest.raises(ValueError, match=f'{path}: not a calibration; run report.py again'):
        read_calibration(path)


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
    assert trust['signals'][0]['predicted'] == read_calibration(path)['left_out'][0]
    assert 'would have caught case 1 of fold 0' in page and (data / 'report/charts/run0_trust.svg').exists()
