"""What the report shows of a run: the spread of its results, and of each case measures and pictures."""

import json
import math

from reporting.data import AGREEMENTS, results_of, rounds_of, stop_round
from reporting.measures import compare_surfaces, spread
from reporting.pictures import draw_gain, draw_rounds, write_chart, write_planes
from utils import DSC_computation

HEADLINES = ['coarse2fine', 'coarse_fusion_F2P', 'coarse_Z', 'coarse_Y', 'coarse_X', 'oracle_fusion_F2P']  # the first


MAIN = ['coarse_X', 'coarse_Y', 'coarse_Z', 'coarse_fusion_F2P', 'oracle_fusion_F2P', 'coarse2fine_R0', 'coarse2fine']


DISTANCES = ('HD95', 'ASD', 'NSD')


class RunReport:
    """Measures a run's cases and writes its charts and pictures to `folder`.

    source: the Source; run, stages: as read_results gives them; args: those of report.py; index: the run's number.
    """

    def __init__(self, source, args, folder, index, run, stages):
        self.source, self.args, self.folder, self.index, self.stages = source, args, folder, index, stages
        self.organ, self.settings, self.thickness, self.epoch = run
        self.table = results_of(stages)
        self.order = [key for key in [*HEADLINES, *self.table] if key in self.table]

    def content(self):
        """What the page shows."""
        headline = self.order[0]
        cases = [self.case(*case) for case in sorted({case for values in self.table.values() for case in values})]
        if in_voxels := [case['case'] for case in cases if case['unit'] == 'voxels']:
            names = ', '.join(in_voxels)
            self.source.notice(f'no geometry of {len(in_voxels)} of {len(cases)} cases, measured in voxels: {names}')
        rows = [self.row(key, values) for key, values in self.table.items()]
        shown = [case for case in cases if case['result'] == headline]
        return {
            'id': f'run{self.index}',
            'organ': self.organ,
            'settings': self.settings,
            'thickness': self.thickness,
            'epoch': self.epoch,
            'folds': sorted({case['fold'] for case in cases}),
            'rows': rows,
            'main': [row for row in rows if row['key'] in MAIN] or rows,
            'headline': next(row for row in rows if row['key'] == headline),
            'distances': [distances(shown, unit) for unit in ('mm', 'voxels')],
            'cases': cases,
            'charts': run_charts(self.folder, self.index, cases),
        }

    def row(self, key, values):
        """A line of the table of results: the Spread of the DSC of all cases and of each fold, and who was missed."""
        folds = sorted({fold for fold, _ in values})
        return {
            'key': key,
            'title': title(key),
            'all': spread([dice.value for dice in values.values()]),
            'folds': {fold: spread([dice.value for case, dice in values.items() if case[0] == fold]) for fold in folds},
            'missed': [self.source.case_name(*case) for case, dice in values.items() if is_missed(dice)],
        }

    def case(self, fold, number):
        """A case: its DSC by round, measures of its last result, and pictures."""
        result = next(key for key in self.order if (fold, number) in self.table[key])
        dice = self.table[result][fold, number]
        geometry = self.source.geometry(fold, number)
        spacing = [1.0, 1.0, 1.0] if geometry is None else [float(s) for s in geometry.spacing]
        ml = None if geometry is None else math.prod(spacing) / 1000
        rounds = self.rounds(fold, number)
        tested, stored = self.stored(result, fold, rounds['stopped_at_round'])
        masks = self.masks(tested, stored, fold, number, dice)
        surfaces = self.surfaces(masks, spacing)
        case = {
            'case': self.source.case_name(fold, number),
            'id': f'run{self.index}_fold{fold}_{number}',
            'fold': fold,
            'number': number,
            'result': result,
            'DSC': dice.value,
            'missed': is_missed(dice),
            **rounds,
            'unit': 'voxels' if geometry is None else 'mm',
            'spacing': spacing,
            'voxels': {'label': dice.label, 'prediction': dice.pred},
            'ml': {'label': ml and dice.label * ml, 'prediction': ml and dice.pred * ml},
            **dict(zip(DISTANCES, surfaces or [None] * 3)),
            'surfaces': how_measured(surfaces, dice),
        }
        print(f'{self.settings} organ {self.organ}: {case_line(case)}', flush=True)
        return case | {'planes': self.pictures(case, masks, geometry, tested.window)}

    def rounds(self, fold, number):
        """DSC and inter-iteration DSC of a case's rounds of coarse to fine, and the round at which it stops."""
        tested = self.stages.get('coarse2fine', {}).get(fold)
        scores = rounds_of(tested, number) if tested else []
        return {
            'rounds': [score.value for score in scores],
            'inter_iteration': [tested.inters.get((number, r)) for r in range(1, len(scores))],
            'stopped_at_round': stop_round(tested, number, float(AGREEMENTS[-1])) if scores else None,
        }

    def stored(self, key, fold, stop):
        """(Folder, result) in which the volume of a result of results_of is stored."""
        if key == 'coarse2fine':
            return self.stages['coarse2fine'][fold], f'R{stop}'
        stage, _, result = key.rpartition('_') if 'fusion' in key else (key, '', '')
        return self.stages[stage][fold], result

    def masks(self, tested, result, fold, number, dice):
        """{label, prediction, coarse: bool (W, H, L)}, as far as they can be read and fit each other."""
        label = self.source.label(fold, number, self.organ)
        shape = None if label is None else label.shape
        pred = self.source.attempt(tested.mask, result, number, shape)
        if label is not None and pred is not None and DSC_computation(label, pred)[1:] != dice[1:]:
            file = tested.volume_file(result, number)
            self.source.notice(f'{file}: its DSC is not that of results.txt; test this case again')
        further = pred is not None and tested.stage == 'coarse2fine' and result != 'R0'
        coarse = self.source.attempt(tested.mask, 'R0', number, pred.shape) if further else None
        masks = {'label': label, 'prediction': pred, 'coarse': coarse}
        return {name: mask for name, mask in masks.items() if mask is not None}

    def surfaces(self, masks, spacing):
        """The Surfaces of a case; None where label or prediction are missing."""
        if not {'label', 'prediction'} <= masks.keys():
            return None
        return self.source.attempt(compare_surfaces, masks['label'], masks['prediction'], spacing)

    def pictures(self, case, masks, geometry, window):
        """The PlanePictures of a case; the contours of all slices are written to cases/ID.js."""
        image = self.source.image(case['fold'], case['number']) if masks else None
        if image is None:
            return []
        if any(mask.shape != image.shape for mask in masks.values()):
            self.source.notice(f'{case["case"]}: image of shape {image.shape} does not fit its label or prediction')
            return []
        window = window or (self.args.low_range, self.args.high_range)
        folder = self.folder / 'cases'
        planes = write_planes(folder, case['id'], image, masks, geometry, window, self.args.slices)
        content = {picture.plane: {'sheet': picture.sheet, 'contours': picture.contours} for picture in planes}
        script = f'showCase({json.dumps(case["id"])}, {json.dumps(content)});\n'
        (folder / f'{case["id"]}.js').write_text(script)
        return planes


def is_missed(dice):
    """Whether there is an organ, and no voxel of it was found."""
    return dice.label > 0 and dice.inter == 0


def title(key):
    """coarse2fine_R1 -> Coarse to fine, round 1."""
    stage, _, result = (
        key.replace('coarse_fusion', 'coarse fusion').replace('oracle_fusion', 'oracle fusion').partition('_')
    )
    if stage == 'coarse2fine':
        where = f'round {result[1:]}' if result.startswith('R') else f'stopped at {result or AGREEMENTS[-1]}'
        return f'Coarse to fine, {where}'
    return f'{stage.capitalize()}, {"plane " if result in "XYZ" and "fusion" not in stage else ""}{result}'


def distances(cases, unit):
    """The Spread of HD95, ASD and NSD over the cases that are measured in `unit`, mm or voxels."""
    cases = [case for case in cases if case['unit'] == unit]
    measures = {key: spread([case[key] for case in cases]) for key in DISTANCES}
    return {'unit': unit, 'cases': len(cases), 'measures': measures}


def how_measured(surfaces, dice):
    """Why a case has the distances that it has."""
    if surfaces is None:
        return 'not measured'
    if dice.label == 0:
        return 'no organ in the label' + (', none predicted' if dice.pred == 0 else '')
    return 'measured' if dice.pred else 'nothing predicted'


def case_line(case):
    """A case in a line of output."""
    distance = f'HD95 {case["HD95"]:.2f} {case["unit"]}' if case['surfaces'] == 'measured' else case['surfaces']
    missed = ', MISSED' if case['missed'] else ''
    return f'fold {case["fold"]}, {case["case"]}: DSC {case["DSC"] * 100:.2f} %, {distance}{missed}'


def run_charts(folder, index, cases):
    """[{file, text}] of a run's charts: DSC by round, and coarse against coarse to fine."""
    cases = [case for case in cases if case['rounds'] and not math.isnan(case['DSC'])]
    if not cases:
        return []
    gained = sum(case['DSC'] > case['rounds'][0] for case in cases)
    charts = {
        f'charts/run{index}_rounds.svg': (
            draw_rounds, (4.2, 3.2), [case['rounds'] for case in cases], 'DSC by round: every case, and their mean.',
        ),
        f'charts/run{index}_gain.svg': (
            draw_gain,
            (5.6, 3.2),
            [(case['case'], case['rounds'][0], case['DSC']) for case in cases],
            f'Coarse (round 0) against coarse to fine, case by case: {gained} of {len(cases)} gain.',
        ),
    }  # fmt: skip
    for file, (draw, size, values, _) in charts.items():
        write_chart(folder / file, draw, size, values)
    return [{'file': file, 'width': size[0], 'text': text} for file, (_, size, _, text) in charts.items()]
