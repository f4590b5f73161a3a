"""Predict the mask of a new scan (section 3.3, algorithm 1): coarse on three planes, then fine rounds until two agree.

    python predict.py INPUT OUTPUT SNAPSHOT_X SNAPSHOT_Y SNAPSHOT_Z [options]
    python predict.py INPUT OUTPUT --organs SNAPSHOTS ... [options]

INPUT is a NIfTI file, or a folder with one DICOM series. OUTPUT, .nii.gz or .nii, is a mask on INPUT's
own grid (of a DICOM series: columns, rows, slices); .dcm is a DICOM segmentation of the series.
Several snapshots of a plane, separated by commas, are averaged: x/FD0:XJ3_1.pkl,x/FD1:XJ3_1.pkl.

If OUTPUT is another name, INPUT is a folder of scans: NIfTI files, and DICOM series at or below it.
The folder OUTPUT then holds NAME.nii.gz and NAME.json of each scan, and scans.csv. A scan that fails
does not stop the others; a scan that is done is not done again.

--organs finds several organs: the mask holds the number of the organ of the highest probability.

The snapshots hold intensity window, margin and orientation of their training; options that contradict
them are refused. For published snapshots, which hold nothing, a line says what is assumed.

A network knows its organ in arrays that lie as in training, so INPUT's axes are turned to lie so, and
the mask's axes back. INPUT without a position (no affine, or one of mere spacing) is taken as
conversion would store it.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from running import arguments, script  # before packages: it names a missing one

# isort: split
import nibabel as nib
import numpy as np
from tqdm import tqdm

from reporting.explaining import write_explanation
from running.data_folder import PLANES
from running.files import LEFTOVERS, atomic_write, locked, read_json, write_json
from running.results import checksum, start
from scans.dataset import SCAN
from scans.dicom import is_slice, read_series, refuse_part, series_folders, split_scans
from scans.dicom_file import header_value
from scans.geometry import PUBLISHED, Scan
from scans.nifti import affine_header, grid_header, is_nifti_name, open_nifti, write_nifti
from scans.segmentation import UNNAMED, SegmentedSeries, import_highdicom, is_dicom_name, organ_code
from volumes.fusion import merge
from volumes.segmenting import NIH, STORED, Networks, is_orientation, organ_snapshots, segment_scan, split_snapshots
from volumes.starting import read_box, read_start
from volumes.testing import to_bytes
from volumes.trust import PROBES

NOT_OURS = 'is not what predict.py wrote there; move it away, or name another OUTPUT'
NO_SERIES = 'a DICOM mask refers to a DICOM series, so INPUT must be the folder of one'


def main():
    args = parse()
    device, _ = start(args)
    check_outputs(args)
    organs = read_organs(args, device)
    if args.folder:
        return predict_folder(args, organs)
    source = read_input(args.INPUT, args.OUTPUT)
    mask, probability, records = find_organs(source, organs, args, start=rough_mask(args, source.scan))
    write_mask(args.OUTPUT, mask, source, organs)
    if args.probability:
        write_nifti(args.probability, probability.transpose(PUBLISHED), source.header)
    if args.record:
        write_json(args.record, {'organs': records})
    for path in filter(None, (args.OUTPUT, args.probability, args.record)):
        print(f'written: {path}')
    return 0


# --- arguments -----------------------------------------------------------------------------------------------------


def parse(argv=None):
    """Return the arguments; see the top of this file."""
    parser = arguments.Parser(__doc__)
    parser.add_argument('INPUT', help='NIfTI file, folder of a DICOM series, or folder of scans')
    parser.add_argument('OUTPUT', help='mask to write, .nii.gz, .nii or .dcm; a folder for many')
    for plane in PLANES:
        parser.add_argument(f'SNAPSHOT_{plane}', nargs='?',
                            help=f'snapshot of plane {plane}, or several separated by commas')  # fmt: skip
    parser.add_argument('--organs', nargs='+', metavar='SNAPSHOTS',
                        help='snapshots of several organs, or folders of them, instead of X, Y, Z')  # fmt: skip
    for name, default, kind, text in (
        ('--rounds', 10, arguments.whole(0), 'fine rounds at most'),
        ('--stop_DSC', 0.99, arguments.number(0, 1), 'inter-iteration DSC at which two rounds agree'),
        ('--threshold', 0.5, arguments.number(0, 1), 'probability from which a voxel is organ'),
    ):
        parser.add_argument(name, default=default, type=kind, help=f'{text} (default {default})')
    parser.add_argument('--device', '--GPU_ID', dest='GPU_ID', default='0',
                        help='number of the CUDA device, or cpu (default 0)')  # fmt: skip
    for name, kind, text in (
        ('--low_range', arguments.number(), 'lower end of the intensity window (HU)'),
        ('--high_range', arguments.number(), 'upper end of the intensity window (HU)'),
        ('--margin', arguments.whole(0), "pixels around the organ's box"),
    ):
        parser.add_argument(name, type=kind, help=f'{text} (default: as the snapshots say)')
    parser.add_argument('--orientation', type=orientation, metavar='WHERE',
                        help="how training arrays lie: axis codes such as PLI, or a training case's geometry/CASE.json; "
                        f'{STORED}: do not turn anything (default: as the snapshots say)')  # fmt: skip
    parser.add_argument('--probability', metavar='FILE', help='write the mean probability, too (float32 .nii.gz)')
    parser.add_argument('--record', metavar='FILE', help='write the figures, too (.json)')
    parser.add_argument('--start', metavar='FILE', help='rough mask on the grid of INPUT that is round 0')
    parser.add_argument('--box', nargs=6, type=arguments.whole(0), metavar=('X0', 'X1', 'Y0', 'Y1', 'Z0', 'Z1'),
                        help='box that is round 0: first and last voxels of INPUT')  # fmt: skip
    parser.add_argument('--probe', type=arguments.whole(0, len(PROBES)), default=0, metavar='N',
                        help='also compute round 1 from N other starts, as a signal of trust (default 0)')  # fmt: skip
    parser.add_argument('--explain', metavar='FOLDER', help='draw what saliency and fine network see')
    parser.add_argument('--code', nargs='+', default=[], metavar='ORGAN',
                        help='name or code of the organ in a DICOM mask; with --organs: 3=pancreas')  # fmt: skip
    parser.add_argument('--dicom', action='store_true', help='of a folder: write NAME.dcm')
    parser.add_argument('--overwrite', action='store_true', help='replace results of other settings')
    arguments.add_precision(parser)
    parser.add_argument('--force', action='store_true', help='take a snapshot although its name is of another plane')
    args = arguments.parse(parser, argv)
    args.folder = names_a_folder(args)
    given = [plane for plane in PLANES if getattr(args, f'SNAPSHOT_{plane}')]
    if args.organs and given or not args.organs and len(given) < len(PLANES):
        parser.error('SNAPSHOT_X, SNAPSHOT_Y and SNAPSHOT_Z are required, or --organs instead')
    if (args.start or args.box or args.explain) and (args.organs or args.folder) or args.start and args.box:
        parser.error('--start, --box (one of them) and --explain are for one scan and one organ')
    return args


def orientation(text):
    """Check the text of --orientation: axis codes, a geometry file, or 'stored'; return it."""
    text = text if text == STORED or text.endswith('.json') else text.upper()
    if not is_orientation(text):
        raise argparse.ArgumentTypeError(f'{text!r} is neither axis codes such as {NIH} nor a .json file')
    return text


def names_a_folder(args):
    """Return whether OUTPUT is the folder of the masks of INPUT's scans."""
    named = is_nifti_name(args.OUTPUT) or is_dicom_name(args.OUTPUT)
    return os.path.isdir(args.INPUT) and not named and (os.path.isdir(args.OUTPUT) or not Path(args.OUTPUT).suffix)


def check_outputs(args):
    """Refuse, before any work, outputs that are no masks by name, cannot be written, or are INPUT itself."""
    files = [Path(path) for path in (args.OUTPUT, args.probability, args.record) if path]
    if args.explain:
        files += [Path(args.explain, f'{plane}.png') for plane in PLANES]
    if args.folder:
        if args.probability or args.record:
            raise ValueError(f'{args.OUTPUT}: --probability and --record are for one scan, not for a folder')
        files = [Path(args.OUTPUT, 'scans.csv')]
    elif not (is_nifti_name(args.OUTPUT) or is_dicom_name(args.OUTPUT)):
        raise ValueError(
            f'{args.OUTPUT}: a mask is written as .dcm, .nii.gz or .nii, those of a folder to a folder; name it so'
        )
    if args.probability and (args.organs or not is_nifti_name(args.probability)):
        raise ValueError(f'{args.probability}: the probability of one organ is written, as .nii.gz or .nii; name it so')
    if args.dicom and not args.folder:
        raise ValueError(f'{args.OUTPUT}: --dicom goes with a folder of scans; name a DICOM mask .dcm')
    if is_dicom_name(args.OUTPUT) or args.dicom:
        import_highdicom()
        if not os.path.isdir(args.INPUT):
            raise ValueError(f'{args.OUTPUT}: {NO_SERIES}')
    elif args.code:
        raise ValueError(f'{args.OUTPUT}: --code goes with a DICOM mask')
    for path in files:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f'{path}: cannot be written; name a file in a folder that you can write to')
    outputs = [args.OUTPUT] if args.folder else files
    paths = [Path(path) for path in (args.INPUT, args.start, *outputs) if path]
    for one, two in itertools.combinations(paths, 2):
        if one.resolve() == two.resolve() or one.exists() and two.exists() and one.samefile(two):
            raise ValueError(f'{two}: INPUT, OUTPUT, --start, --probability and --record must be different files')


class Organ(NamedTuple):
    """An organ to find: its networks, and its name, Code and side (or None) in a DICOM mask."""

    networks: Networks
    code: tuple


def read_organs(args, device):
    """Return {number in the mask: Organ} of the snapshots, and of --code."""
    options = {name: getattr(args, name) for name in ('low_range', 'high_range', 'margin', 'orientation', 'precision')}
    options |= {'force': args.force, 'keep': args.folder}
    if args.organs:
        snapshots = organ_snapshots(args.organs)
    else:
        snapshots = {1: [split_snapshots(getattr(args, f'SNAPSHOT_{plane}')) for plane in PLANES]}
    codes, organs = read_codes(args, snapshots), {}
    for number, paths in snapshots.items():
        networks = Networks(paths, device, **options)
        unnamed = f'organ {networks.training.organ_ID or number}', UNNAMED, None
        organs[number] = Organ(networks, codes.get(number, unnamed))
    return organs


def read_codes(args, numbers):
    """Return {number in the mask: (name, Code, side)} of --code."""
    found = {}
    for text in args.code:
        number, _, name = text.rpartition('=') if args.organs else ('1', '', text)
        if not number.isdigit() or int(number) not in numbers:
            raise ValueError(f'--code {text}: give the number of an organ and its name: {min(numbers)}=pancreas')
        if int(number) in found:
            raise ValueError(
                f'--code {text}: organ {number} has a code; put a name with a blank into quotes: "left kidney"'
            )
        found[int(number)] = (name.rpartition(':')[2], *organ_code(name))
    return found


# --- one scan ------------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """A Scan as conversion stores it, the header of a NIfTI file on its grid, what reading it noted.

    series: what a DICOM mask refers to, or None.
    """

    scan: Scan
    header: nib.Nifti1Header
    notes: list
    series: SegmentedSeries | None


def read_input(path, output=''):
    """Return the Input at a path; `output`: the mask that is asked for."""
    notes = []

    def say(note):
        print(note, flush=True)
        notes.append(note)

    if os.path.isdir(path):
        folder = series_folder(path, say)
        series = SegmentedSeries(folder) if is_dicom_name(output) else None
        scan = read_series(folder, say)
        return Input(scan, affine_header(scan.geometry and scan.geometry.transposed()), notes, series)
    if not is_nifti_name(path):
        raise ValueError(f'{path}: neither a NIfTI file (.nii, .nii.gz) nor a folder with a DICOM series')
    if is_dicom_name(output):
        raise ValueError(f'{path}: {NO_SERIES}')
    return Input(open_nifti(path, say).image(say), grid_header(path), notes, None)


def series_folder(path, say=print):
    """Return the one folder at or below `path` that holds a DICOM series; print a warning where it is not CT."""
    folders = [folder for folder, holds_slices in series_folders(path) if holds_slices]
    if len(folders) != 1:
        raise ValueError(f'{path}: {len(folders) or "no"} folders with DICOM slices in it; name the one of the series')
    first = next(file for file in sorted(folders[0].iterdir()) if is_slice(file))
    if (kind := header_value(first, 'Modality')) not in ('', 'CT'):
        say(f'warning: {folders[0]}: its modality is {kind}, not CT')
    return folders[0]


def rough_mask(args, scan):
    """Return the mask of --start or --box as the scan is stored, or None."""
    if args.start or args.box:
        return read_start(args.start, scan) if args.start else read_box(args.box, scan)
    return None


def find_organs(source, organs, args, start=None):
    """Return (mask, probability, {organ: record}) of an Input; with --organs the mask holds their numbers, else 1.

    The probability is None with --organs. start: mask of round 0, as the scan is stored.
    """
    found, records = {}, {}
    explain = args.explain and functools.partial(write_explanation, args.explain)
    for number, organ in organs.items():
        mask, probability, record = segment_scan(
            source.scan, organ.networks, args.rounds, args.stop_DSC, args.threshold, start, args.probe, explain
        )
        records[number] = record | {'notes': source.notes}
        found[number] = mask, to_bytes(probability) if args.organs else None
    if args.organs:
        mask, probability = merge(found), None
        for number, record in records.items():
            before, record['voxels'] = record['voxels'], int(np.count_nonzero(mask == number))
            record['ml'] = record['ml'] and record['ml'] * record['voxels'] / before
            print(f'organ {number}: {record["voxels"]} of {before} voxels')
    return mask, probability, records


def write_mask(path, mask, source, organs):
    """Write a mask, which lies as the Input is stored, as NIfTI or as DICOM."""
    if is_dicom_name(path):
        source.series.write(path, mask, {number: organ.code for number, organ in organs.items()})
    else:
        write_nifti(path, mask.transpose(PUBLISHED), source.header)


# --- a folder of scans ---------------------------------------------------------------------------------------------


def predict_folder(args, organs):
    """Find the organs in all scans of a folder; return the exit code: 1 where one failed."""
    scans, output = find_scans(Path(args.INPUT)), Path(args.OUTPUT)
    parts = split_scans([path for path in scans.values() if path.is_dir()])
    how, table = made_with(args, organs), output / 'scans.csv'
    if table.exists() and not table.read_text(encoding='utf-8', errors='replace').startswith('scan,label,'):
        raise ValueError(f'{table}: {NOT_OURS}')
    rows, failed = [], {}
    with locked(output / '.lock', LEFTOVERS):
        for name, path in tqdm(scans.items(), desc='scans', disable=None):
            try:
                refuse_part(path, parts)
                with contextlib.redirect_stdout(io.StringIO()):  # the record holds what is printed of a scan
                    records, done = predict_one(args, organs, path, output / name, how)
                text = '; '.join(summary(number, record) for number, record in records.items())
                text = f'{name}: {text}{" (done before)" if done else ""}'
            except Exception as error:
                if not script.foreseeable(error):
                    raise
                text = failed[name] = ' '.join(f'{name}: error: {str(error) or type(error).__name__}'.split())
                records = {'': {'error': text.partition(': error: ')[2]}}
            tqdm.write(text)
            sys.stdout.flush()
            rows += table_rows(name, records)
        for file in sorted(output.glob('*.json')):  # of another folder, or what a scan that failed had before
            record = former_record(file)
            if file.stem not in scans.keys() - failed and record and former_mask(file, record).is_file():
                rows += table_rows(file.stem, record['organs'])
        write_table(table, rows)
    print(f'written: {table}', flush=True)
    if failed:
        print(f'{len(failed)} of {len(scans)} scans failed:', *failed.values(), sep='\n', file=sys.stderr)
    return 1 if failed else 0


def find_scans(folder):
    """Return {name: path} of the files in a folder that are named as scans, and of the series at or below it."""
    found = [(SCAN.sub('', path.name), path) for path in sorted(folder.iterdir())
             if SCAN.search(path.name) and not path.is_dir() and not path.name.startswith('.')]  # fmt: skip
    series = [path for path, holds_slices in series_folders(folder) if holds_slices]
    firsts = Counter(path.relative_to(folder).parts[:1] for path in series)
    for path in series:
        below = path.relative_to(folder).parts
        short = firsts[below[:1]] == 1
        found.append((below[0] if below and short else '_'.join(below) or folder.resolve().name, path))
    scans = dict(found)
    if not scans:
        raise FileNotFoundError(f'{folder}: no NIfTI files (.nii, .nii.gz) and no DICOM series in it')
    if len(scans) < len(found):
        name = Counter(name for name, _ in found).most_common(1)[0][0]
        paths = ', '.join(str(path) for one, path in found if one == name)
        raise ValueError(f'{folder}: the masks of {paths} would have one name; rename a scan')
    return scans


def made_with(args, organs):
    """Return what a mask and its record depend on beside the scan."""
    settings = {name: getattr(args, name) for name in ('rounds', 'stop_DSC', 'threshold', 'probe')}
    for number, organ in organs.items():
        settings[f'organ {number}'] = organ.networks.record()['settings']
        settings[f'snapshots {number}'] = organ.networks.checksums
        settings[f'calibration {number}'] = checksum(organ.networks.calibration_file())
        if args.dicom:
            settings[f'code {number}'] = [organ.code[0], organ.code[1].value, organ.code[2] and organ.code[2].value]
    return settings


def predict_one(args, organs, path, stem, how):
    """Find the organs in a scan; return ({organ: record}, whether that was done before).

    Write STEM.json, then STEM.nii.gz or STEM.dcm, and last the mask's checksum. ValueError: there is a mask that was made
    otherwise, or is not ours.
    """
    file, mask_file = Path(f'{stem}.json'), Path(f'{stem}{".dcm" if args.dicom else ".nii.gz"}')
    how = how | {'scan': scan_checksum(path), 'mask': mask_file.name}
    former = former_record(file)
    before = former.get('made_with', {})
    check_ours(file, mask_file, former)
    if former:
        if differing := [name for name in sorted(how.keys() | before.keys()) if before.get(name) != how.get(name)]:
            if not args.overwrite:
                raise ValueError(f'{mask_file}: already exists, made with other settings ({", ".join(differing)}); give '
                                 '--overwrite to replace it, or name another OUTPUT')  # fmt: skip
        elif mask_file.exists():
            return {int(number): record for number, record in former['organs'].items()}, True
    source = read_input(path, mask_file)
    mask, _, records = find_organs(source, organs, args)
    former_mask(file, former).unlink(
        missing_ok=True
    )  # a mask without its record, or with one of another, is never there
    record = {'made_with': how, 'organs': records}
    write_json(file, record)
    write_mask(mask_file, mask, source, organs)
    write_json(file, record | {'mask_SHA-256': checksum(mask_file)})
    return records, False


def check_ours(file, mask_file, former):
    """Raise ValueError if one of a scan's files is not as predict.py wrote it. former: the record in `file`, or {}."""
    written = former_mask(file, former)
    unchanged = former and former.get('mask_SHA-256') in (None, checksum(written))
    for path, ours in ((file, former), (written, unchanged), (mask_file, unchanged and mask_file == written)):
        if path.exists() and not ours:
            raise ValueError(f'{path}: {NOT_OURS}')


def former_record(file):
    """Return the record of a scan; {} where there is none, or it is none of ours."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found.get('made_with'), dict) and isinstance(found.get('organs'), dict) else {}


def former_mask(file, record):
    """Return the path of the mask that a record in `file` is of."""
    return file.with_name(record.get('made_with', {}).get('mask', f'{file.stem}.nii.gz'))


def scan_checksum(path):
    """Return the SHA-256 of a scan's file, or of those of its files, by name."""
    if path.is_file():
        return checksum(path)
    lines = [f'{file.name} {checksum(file)}' for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def summary(number, record):
    """Return a record as a line."""
    size = f'{record["voxels"]} voxels' if record['ml'] is None else f'{record["ml"]:.1f} ml'
    predicted = record.get('trust', {}).get('predicted_DSC')
    trust = '' if predicted is None else f', predicted DSC {predicted:.2f}'
    warnings = ''.join(f', warning: {text}' for text in record['warnings'])
    return f'label {number}: {size}, {record["rounds"]} rounds{trust}{warnings}'


def table_rows(name, records):
    """Return the rows of a scan with these {organ: record}."""
    return [{'scan': name, 'label': number} | record for number, record in records.items()]


def write_table(path, rows):
    """Write the figures of the scans' records, and of their `trust`, as CSV: a line for each scan and organ."""
    rows = [row | row.get('trust', {}) for row in rows]
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list | dict))
    columns.pop('error', None)
    with atomic_write(path, 'w') as file:
        table = csv.DictWriter(file, [*columns, 'warnings', 'error'], extrasaction='ignore')
        table.writeheader()
        for row in rows:
            table.writerow(row | {'warnings': '; '.join(row.get('warnings', []) + row.get('notes', []))})


if __name__ == '__main__':
    script.run(main)
