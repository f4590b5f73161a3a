"""Testing a network on volumes along one plane (section 3.3): slice windows in, the average of their outputs out."""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from Data import geometry_facts, image_checksums
from model import load_RSTN
from running import arguments, processes
from running.data_folder import (
    averaged_snapshots,
    epoch_name,
    find_snapshot,
    plane_view,
    read_cases,
    results_folder,
)
from running.files import array_shape, load_volume, save_volume
from running.results import Checksums, Results, case_settings, lock_folders, prepare_folder, start
from running.weights import missing_weights
from scans.geometry import check_labels, geometry_file, known, load_geometry
from scans.nifti import export
from utils import DSC_computation, for_device, to_unit
from volumes.planes import SliceAverage, mean_of, plane_weights, slice_window

# of the slice windows in a batch; with twice as many on a card, cuDNN can take 7 times as long a slice in float32
PIXELS_AT_ONCE = {'cpu': 2**17, 'cuda': 2**19}
SALIENCY_REACH = 3  # pixels: of its convolutions of 3 x 3 and 5 x 5


class PlaneSettings(NamedTuple):
    """What a network is tested with."""

    intensity_window: tuple  # HU
    thickness: int  # slices, 1 or 3
    margin: int  # pixels around the box
    device: torch.device
    precision: str


class PlaneTester:
    """The networks of one plane's snapshots (paths), whose mean is the prediction; each is loaded when it is needed.

    TEST: 'C', 'O' or 'F' as in RSTN; facts: what the training must agree with, see load_RSTN.
    A single network stays in memory between volumes.
    """

    def __init__(self, plane, paths, TEST, settings, facts=None):
        self.plane, self.paths, self.TEST, self.settings = plane, paths, TEST, settings
        self.facts, self.net = facts, None

    @property
    def reach(self):
        """Return the voxels around a mask that the fine network's output there depends on."""
        return self.settings.margin + SALIENCY_REACH

    def predict(self, image, **volumes):
        """Return the probability (W, H, L) float32 of the organ in `image` (W, H, L) HU; see predict_volume."""
        return mean_of(self.each(image, **volumes))

    def each(self, image, **volumes):
        """Yield the probability that each snapshot predicts; predict returns their mean."""
        for path in self.paths:
            yield predict_volume(self.load(path), image, self.plane, self.settings, **volumes)
        if len(self.paths) > 1:
            self.release()

    def load(self, path):
        """Return the network of a snapshot."""
        if len(self.paths) > 1:
            self.release()
        if self.net is None:
            print(f'{self.plane}: snapshot {path}', flush=True)
            _, thickness, margin, device, precision = self.settings
            self.net = load_RSTN(path, self.TEST, thickness, margin, device, precision, self.facts)
        return self.net

    def release(self):
        """Free the network's memory."""
        self.net = None


@torch.inference_mode()
def predict_volume(net, image, plane, settings, label=None, score=None, mask=None):
    """Return the average of the network's outputs over all slice windows of `image` along `plane` (section 3.3).

    image: (W, H, L) HU, clipped to the intensity window; label, or score and mask: what RSTN takes in
    testing 'O' and 'F', of the image's shape. A window without a voxel of label or mask is skipped:
    its output is 0. -> (W, H, L) float32
    """
    device = settings.device
    hosted = {'label': label, 'mask': mask}  # the boxes are looked up on the CPU
    views = {name: slices_on('cpu', one, plane) for name, one in hosted.items() if one is not None}
    marks = next(iter(views.values()), None)
    views['image'] = slices_on(device, image, plane)
    if score is not None:
        views['score'] = slices_on(device, score, plane)
    average = SliceAverage(image.shape, plane, settings.thickness, device)
    slices = len(views['image'])
    windows = torch.tensor([slice_window(j, slices, settings.thickness) for j in range(slices)])  # (slices, 3)
    marked = torch.ones(slices, dtype=bool) if marks is None else marks.flatten(1).any(1)
    seen = marked[windows].any(1).nonzero().flatten().tolist()
    batch = max(PIXELS_AT_ONCE[device.type] // views['image'][0].numel(), 1)
    for first in tqdm(
        range(0, len(seen), batch), desc=f'plane {plane}', leave=False, disable=processes.rank() > 0 or None
    ):
        places = seen[first : first + batch]
        ids = windows[places]  # (N, 3)
        inputs = {
            name: view[ids[:, : settings.thickness].to(view.device)].float()
            for name, view in views.items()
            if name != 'image'
        }
        inputs['image'] = to_unit(views['image'][ids.to(device)], *settings.intensity_window)  # (N, 3, A, B)
        for j, output in zip(places, net(**inputs)):
            average.add(j, output)
    return average.volume()


def slices_on(device, volume, plane):
    """Return a volume (W, H, L) on a device as (slices, A, B)."""
    volume = np.require(for_device(volume), requirements=['C', 'W'])
    return processes.send(torch.from_numpy(plane_view(volume, plane)), device)


def to_bytes(probability):
    """Return a probability in [0, 1] as it is stored: round(255 p), uint8."""
    return np.around(probability * 255).astype(np.uint8)


# --- a fold's test cases -------------------------------------------------------------------------------------------


def parse(doc):
    """Return the arguments of a testing script with this docstring."""
    parser = arguments.stage_parser(doc, arguments.TESTING, arguments.TESTING_OPTIONAL)
    arguments.add_testing(parser)
    return arguments.parse(parser)


def plane_tester(args, plane, snapshot, TEST, device, cases):
    """Return the PlaneTester of a snapshot's name for the test cases of a stage."""
    check_labels(args.data_path, cases)
    window = (args.low_range, args.high_range)
    settings = PlaneSettings(window, args.slice_thickness, args.crop_margin, device, args.precision)
    facts = {
        'plane': plane,
        'organ_ID': args.organ_ID,
        'intensity_window': list(window),
        'crop_margin': args.crop_margin,
    }
    facts |= geometry_facts(args.data_path, cases) | {'cases': image_checksums(args, cases)}
    return PlaneTester(plane, averaged_snapshots(args, snapshot), TEST, settings, facts)


def evaluate_plane(args, stage, TEST):
    """Test a fold's cases along a plane, coarse or oracle: volumes/{epoch}_{case}.npz, results.txt, results.json."""
    processes.quiet()
    device, provenance = start(args)
    snapshot = find_snapshot(args, args.plane, args.timestamp1)
    folder = results_folder(args, stage, snapshot)
    cases = read_cases(args.data_path, 'testing', args.current_fold)
    tester = plane_tester(args, args.plane, snapshot, TEST, device, cases)
    epoch = epoch_name(args)
    files = {number: folder / 'volumes' / f'{epoch}_{number}.npz' for number in range(1, len(cases) + 1)}

    def volume_and_label(number, case):
        begin = time.time()
        image, label = case.image(args.data_path), case.label(args.data_path, args.organ_ID)
        volumes = {'label': label} if TEST == 'O' else {}
        volume = stored(files[number], image.shape, lambda: to_bytes(tester.predict(image, **volumes)))
        print(f'    {case.image_file}: {time.time() - begin:.1f} s', flush=True)
        return volume, label

    require_snapshots([tester], files.values())
    with first_alone(folder):
        if processes.rank() == 0:
            settings = run_settings(args, cases, [snapshot], labels=TEST == 'O')
            replace = args.overwrite and (lambda: require_inputs(args, [tester], cases))
            prepare_folder(folder, settings, provenance, replace)
        if not share_out(cases, volume_and_label):
            return
        scores = []
        with Results(folder, stage) as results:
            results(f'Evaluating snapshot {epoch}:')
            for number, case in enumerate(cases, 1):
                volume, label = volume_and_label(number, case)
                export(args, files[number], volume >= 128, case)
                scores.append(DSC_computation(label, volume >= 128))
                results(f'  Testcase {number}: DSC = {scores[-1]} .')
                results.add_case(number, case, {epoch: scores[-1]})
            mean, _ = results.average([score.value for score in scores])
            results(f'Snapshot {epoch}: average DSC = {mean} .')


def stored(path, shape, compute):
    """Return the volume at `path`; if there is none, compute() it and store it there."""
    volume = load_volume(path, shape)
    if volume is None:
        volume = compute()
        save_volume(path, volume)
    return volume


def run_settings(args, cases, snapshots, labels=False):
    """Return what stored volumes depend on, apart from their names, for run.json.

    cases: the fold's testing list; labels: the stage predicts from their labels, too.
    """
    checksum = Checksums(args.data_path)
    settings = {'window': [args.low_range, args.high_range], 'precision': args.precision, 'average': args.average}
    paths = [path for snapshot in snapshots for path in averaged_snapshots(args, snapshot)]
    settings |= {f'snapshot {path.name}': checksum(path) for path in paths}
    checksum.save()
    return settings | case_settings(args.data_path, cases, labels)


def case_weights(args, cases):
    """Return {image file: plane_weights} of these cases of a data folder; {} with the published recipe."""
    weights = {}
    for case in cases if args.recipe == 'fast' else ():
        name = Path(case.image_file).stem
        shape = array_shape(Path(args.data_path, case.image_file))
        geometry = load_geometry(geometry_file(args.data_path, name), shape)
        weights[case.image_file] = plane_weights(args.recipe, geometry.spacing if known(geometry) else None)
    return weights


def weights_settings(weights):
    """Return the case_weights for run.json."""
    return {f'weights {file}': 'equal' if found is None else found.tolist() for file, found in weights.items()}


def require_snapshots(testers, volumes):
    """Raise FileNotFoundError where a snapshot is missing and not all of these volumes are stored."""
    for tester in testers:
        for path in tester.paths:
            if not path.exists() and not all(volume.exists() for volume in volumes):
                raise missing_weights(path)


def require_inputs(args, testers, cases):
    """Raise what testing would where a snapshot is missing or does not fit, or a scan or label cannot be read."""
    for tester in testers:
        for path in tester.paths:
            tester.load(path)
        tester.release()
    for case in cases:
        case.image(args.data_path)
        case.label(args.data_path, args.organ_ID)


@contextlib.contextmanager
def first_alone(*folders):
    """Lock the result folders during the block, in rank 0; the processes of torchrun can wait for each other in it.

    They exchange no tensors, so gloo serves GPUs, too.
    """
    with processes.process_group(torch.device('cpu')), lock_folders(*(folders if processes.rank() == 0 else ())):
        yield


def share_out(cases, compute):
    """Call compute(number, case) for this process's share of the cases, numbered from 1.

    Return whether this is rank 0, which then goes through all cases and finds their volumes stored.
    """
    processes.wait()  # for rank 0 to prepare the folders
    if processes.world_size() > 1:
        for number, case in list(enumerate(cases, 1))[processes.rank() :: processes.world_size()]:
            compute(number, case)
    processes.wait()
    return processes.rank() == 0
