"""What the report shows of a run: the spread of its results, and measures and pictures of each case."""

import json
import math

from reporting import trust
from reporting.explaining import explain_case
from reporting.measures import compare_surfaces, spread
from reporting.pictures import draw_gain, draw_rounds, draw_trust, write_chart, write_planes
from reporting.scores import AGREEMENTS, results_table
from reporting.surfaces import write_surfaces
from utils import DSC_computation
from volumes.calibration import SIGNALS, case_signals

# the headline of a run is the first of these that it has
HEADLINES = ['coarse2fine', 'coarse_fusion_F2P', 'coarse_Z', 'coarse_Y', 'coarse_X', 'oracle_fusion_F2P']
MAIN = ['coarse_X', 'coarse_Y', 'coarse_Z', 'coarse_fusion_F2P', 'oracle_fusion_F2P', 'coarse2fine_R0', 'coarse2fine']
DISTANCES = ('HD95', 'ASD', 'NSD')


class RunReport:
    """Measures the cases of a run and writes its charts and pictures to `folder`.

    source: the Source; args: those of report.py; index: the run's number; run, stages: an item of
    read_results.
    """

    def __init__(self, source, args, folder, index, run, stages):
        self.source, self.args, self.folder, self.index = source, args, folder, index
        self.run, self.stages = run, stages
        self.table = results_table(run, stages)
        self.order = [key for key in [*HEADLINES, *self.table] if key in self.table]

    def content(self):
        """Return what the page shows."""
        headline = self.order[0]
        cases = [self.case(*case) for case in sorted({case for values in self.table.values() for case in values})]
        if in_voxels := [case['case'] for case in cases if case['unit'] == 'voxels']:
            self.source.notice(
                f'no geometry of {len(in_voxels)} of {len(cases)} cases, measured in voxels: {", ".join(in_voxels)}'
            )
        scored = [case for case in cases if case['rounds'] and not math.isnan(case['DSC'])]
        for case in sorted(scored, key=lambda case: case['DSC'])[: self.args.explain]:
            case['seen'] = self.source.attempt(self.seen, case) or []
        rows = [self.row(key, values) for key, values in self.table.items()]
        shown = [case for case in cases if case['result'] == headline]
        return {
            'id': f'run{self.index}',
            **self.run._asdict(),
            'organ_name': self.source.label_names.get(self.run.organ),
            'organ_title': self.source.organ_title(self.run.organ),
            'folds': sorted({case['fold'] for case in cases}),
            'rows': rows,
            'main': [row for row in rows if row['key'] in MAIN] or rows,
            'headline': next(row for row in rows if row['key'] == headline),
            'distances': [distances(shown, unit) for unit in ('mm', 'voxels')],
            'cases': cases,
            'stops': self.stops(),
            'charts': run_charts(self.folder, self.index, cases),
            'trust': self.trust(),
        }

    def row(self, key, values):
        """Return a row of the table of results: the Spread of the DSC of all and of each fold, missed cases."""
        folds = sorted({fold for fold, _ in values})
        return {
            'key': key,
            'title': title(key),
            'all': spread([dice.value for dice in values.values()]),
            'folds': {fold: spread([dice.value for case, dice in values.items() if case[0] == fold]) for fold in folds},
            'missed': [self.source.case_name(*case) for case, dice in values.items() if is_missed(dice)],
        }

    def case(self, fold, number):
        """Return a case: its DSC by round, measures of its last result, and pictures."""
        result = next(key for key in self.order if (fold, number) in self.table[key])
        dice = self.table[result][fold, number]
        geometry = self.source.geometry(fold, number)
        spacing = [1.0, 1.0, 1.0] if geometry is None else [float(mm) for mm in geometry.spacing]
        ml = geometry and geometry.voxel_ml
        rounds = self.rounds(fold, number)
        tested, key = self.stored(result, fold, rounds['stopped_at_round'])
        image, masks = self.volumes(tested, key, number, dice)
        surfaces = None
        if {'label', 'prediction'} <= masks.keys():
            surfaces = self.source.attempt(compare_surfaces, masks['label'], masks['prediction'], spacing)
        case = {
            'case': self.source.case_name(fold, number),
            'id': f'run{self.index}_fold{fold}_{number}',
            'fold': fold,
            'number': number,
            'result': result,
            'seen': [],
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
        print(f'{self.run.settings} {self.source.organ_title(self.run.organ)}: {case_line(case)}', flush=True)
        intensity_window = self.source.attempt(tested.intensity_window) or (self.args.low_range, self.args.high_range)
        return case | {'planes': self.pictures(case['id'], image, masks, geometry, intensity_window)}

    def rounds(self, fold, number):
        """Return DSC and inter-iteration DSC of a case's rounds, where it stops, and the best round."""
        folder = self.stages.get('coarse2fine', {}).get(fold)
        case = folder.cases.get(number) if folder else None
        rounds = case.rounds() if case else []
        return {
            'rounds': [dice.value for dice in rounds],
            'inter_iteration': [case.agreement.get(r) for r in range(1, len(rounds))],
            'stopped_at_round': case.stop(float(AGREEMENTS[-1])) if rounds else None,
            'best_round': case.best() if rounds else None,
        }

    def seen(self, case):
        """Return the pictures of what the networks see of a case; see explain_case."""
        tested, number = self.stages['coarse2fine'][case['fold']], case['number']
        image, geometry = self.source.image(tested.fold, number), self.source.geometry(tested.fold, number)
        if image is None:
            return []
        intensity_window = tested.intensity_window() or (self.args.low_range, self.args.high_range)
        return explain_case(self.folder / 'cases', case['id'], tested, number, image, geometry, intensity_window)

    def trust(self):
        """Return how well the signals of the rounds predict the last DSC, and the calibration; None without rounds."""
        folders = self.stages.get('coarse2fine', {})
        places = [
            (fold, n) for fold in sorted(folders) for n, case in sorted(folders[fold].cases.items()) if case.rounds()
        ]
        if not places:
            return None
        cases, signals = {}, []
        for fold, number in places:
            case, name = folders[fold].cases[number], self.source.case_name(fold, number)
            stop = case.stop(float(AGREEMENTS[-1]))
            found, value = case_signals(case.record(), stop), case.rounds()[stop].value
            signals.append({'case': name, 'DSC': value, 'predicted': None, **dict.fromkeys(SIGNALS), **found})
            if found and not math.isnan(value):
                cases[name] = found, value
        tests = [self.source.attempt(folder.tested_with) for folder in folders.values()]
        calibration = trust.calibrate(cases) if all(tests) else None
        shown = {'signals': signals, 'counted': len(cases), 'calibration': calibration}
        if calibration:
            calibration['snapshots'], calibration['settings'] = map(list, zip(*tests))
            predicted = dict(zip(calibration['cases'], calibration['left_out']))
            for case in signals:
                case['predicted'] = predicted.get(case['case'])
            shown |= trust.quality(calibration) | {'chart': f'charts/run{self.index}_trust.svg'}
            points = [(case['predicted'], case['DSC'], case['case'] in shown['worst']) for case in signals]
            points = [point for point in points if point[0] is not None]
            write_chart(self.folder / shown['chart'], draw_trust, (3.6, 3.4), points)
        return shown

    def stops(self):
        """Return, for each stopping threshold, the Spread of the rounds needed, and the cases that reached it."""
        folders = self.stages.get('coarse2fine', {}).values()
        cases = [case for folder in folders for case in folder.cases.values() if case.rounds()]
        return [
            {
                'threshold': threshold,
                'rounds': spread([case.stop(float(threshold)) for case in cases]),
                'reached': sum(
                    case.agreement.get(case.stop(float(threshold)), 0) >= float(threshold) for case in cases
                ),
                'DSC': spread([case.rounds()[case.stop(float(threshold))].value for case in cases]),
            }
            for threshold in (AGREEMENTS if cases else ())
        ]

    def stored(self, result, fold, stop):
        """Return (ResultFolder, prefix of the volume file) of a result of results_table."""
        if result == 'coarse2fine':
            return self.stages['coarse2fine'][fold], f'R{stop}'
        stage, _, fusion = result.rpartition('_')
        return (self.stages[stage][fold], fusion) if 'fusion' in stage else (self.stages[result][fold], self.run.epoch)

    def volumes(self, tested, key, number, dice):
        """Return (image, {label, prediction, coarse: bool (W, H, L)}), as far as they are readable and fit."""
        label = self.source.label(tested.fold, number, self.run.organ)
        image = self.source.image(tested.fold, number)
        if image is not None and label is not None and image.shape != label.shape:
            name = self.source.case_name(tested.fold, number)
            self.source.notice(f'{name}: image of shape {image.shape} does not fit its label of shape {label.shape}')
            image = None
        known = label if label is not None else image
        if known is None:
            return None, {}
        masks = {'label': label, 'prediction': self.source.attempt(tested.mask, key, number, known.shape)}
        if tested.stage == 'coarse2fine' and key != 'R0' and masks['prediction'] is not None:
            masks['coarse'] = self.source.attempt(tested.mask, 'R0', number, known.shape)
        masks = {name: mask for name, mask in masks.items() if mask is not None}
        if {'label', 'prediction'} <= masks.keys() and DSC_computation(label, masks['prediction'])[1:] != dice[1:]:
            file = tested.volume_file(key, number)
            self.source.notice(f'{file}: its DSC is not the one in the results; test this case again')
        return image, masks

    def pictures(self, case_id, image, masks, geometry, intensity_window):
        """Return what write_planes returns of a case; writes the contours of all slices to cases/ID.js."""
        if image is None or not masks:
            return []
        folder = self.folder / 'cases'
        planes = write_planes(folder, case_id, image, masks, geometry, intensity_window, self.args.slices)
        content = {plane['plane']: {'sheet': plane['sheet'], 'contours': plane['contours']} for plane in planes}
        write_surfaces(folder / f'{case_id}_3d.js', case_id, masks, geometry)
        (folder / f'{case_id}.js').write_text(f'showCase({json.dumps(case_id)}, {json.dumps(content)});\n')
        return planes


def is_missed(dice):
    """Return whether there is an organ, and no voxel of it was found."""
    return dice.label > 0 and dice.inter == 0


def title(key):
    """Return a title: coarse2fine_R1 -> Coarse to fine, round 1."""
    stage, _, result = key.rpartition('_')
    if key == 'coarse2fine' or stage == 'coarse2fine':
        where = f'round {result[1:]}' if result.startswith('R') else f'stopped at {result if stage else AGREEMENTS[-1]}'
        return f'Coarse to fine, {"best round" if result == "best" else where}'
    return f'{stage.replace("_", " ").capitalize()}, {"" if "fusion" in stage else "plane "}{result}'


def distances(cases, unit):
    """Return the Spread of HD95, ASD and NSD over the cases that are measured in `unit`, mm or voxels."""
    cases = [case for case in cases if case['unit'] == unit]
    measures = {key: spread([case[key] for case in cases]) for key in DISTANCES}
    return {'unit': unit, 'cases': len(cases), 'measures': measures}


def how_measured(surfaces, dice):
    """Return why a case has its distances, or none."""
    if surfaces is None:
        return 'not measured'
    if dice.label == 0:
        return 'no organ in the label' + (', none predicted' if dice.pred == 0 else '')
    return 'measured' if dice.pred else 'nothing predicted'


def case_line(case):
    """Return a line of output about a case."""
    distance = f'HD95 {case["HD95"]:.2f} {case["unit"]}' if case['surfaces'] == 'measured' else case['surfaces']
    missed = ', MISSED' if case['missed'] else ''
    return f'fold {case["fold"]}, {case["case"]}: DSC {case["DSC"] * 100:.2f} %, {distance}{missed}'


def run_charts(folder, index, cases):
    """Return [{file, width, text}] of a run's charts: DSC by round, and coarse against coarse to fine."""
    cases = [case for case in cases if case['rounds'] and not math.isnan(case['DSC'])]
    if not cases:
        return []
    gained = sum(case['DSC'] > case['rounds'][0] for case in cases)
    rounds, gain = f'charts/run{index}_rounds.svg', f'charts/run{index}_gain.svg'
    write_chart(folder / rounds, draw_rounds, (4.2, 3.2), [case['rounds'] for case in cases])
    write_chart(folder / gain, draw_gain, (5.6, 3.2), [(c['case'], c['rounds'][0], c['DSC']) for c in cases])
    text = f'Coarse (round 0) against coarse to fine, case by case: {gained} of {len(cases)} gain.'
    return [
        {'file': rounds, 'width': 4.2, 'text': 'DSC by round: every case, and their mean.'},
        {'file': gain, 'width': 5.6, 'text': text},
    ]
