"""How far to trust a mask: the signals of the rounds, and what is predicted from them."""

import json
import math

import numpy as np
import pytest
from conftest import coarse2fine_args

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
    assert kept['rounds'][1] == {name: record['rounds'][1][name] for name in ('voxels', 'inter_iteration')}
    assert kept['contraction'] == record['contraction'] and (folder / 'results.txt').read_bytes() == text


def test_the_record_of_masks_alone():
    masks = [row(1, 1, 1, 0, kind=np.uint8), row(1, 1, 0, 0, kind=np.uint8)]
    assert record_of_masks(masks) == {
        'rounds': [{'voxels': 3, 'inter_iteration': None}, {'voxels': 2, 'inter_iteration': 0.8}],
        'contraction': None,
        'probes': [],
    }
