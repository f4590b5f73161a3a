"""Testing a volume: one network along one plane (coarse, oracle, fine), and the rounds of coarse to fine."""

import contextlib
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import load_RSTN
from running import processes
from running.data_folder import epoch_name, find_snapshot, read_cases, results_folder, snapshot_folder
from running.files import load_volume, save_volume
from running.results import Results, checksum, lock_folders, prepare_folder, start
from running.weights import missing_weights
from scans.nifti import export
from utils import DSC_computation, to_unit
from volumes.planes import SliceAverage, plane_view, slice_window

PIXELS_AT_ONCE = 2**16  # pixels of the slices that the coarse network sees at once


class PlaneTester:
    """The network of a plane's snapshot, loaded when it is first needed.

    TEST: 'C', 'O' or 'F' as in RSTN; args: a stage's arguments.
    """

    def __init__(self, args, plane, snapshot, TEST, device):
        self.args, self.plane, self.TEST, self.device = args, plane, TEST, device
        self.path = snapshot_folder(args) / snapshot
        self.net = None

    def predict(self, image, **volumes):
        """Probability (W, H, L) float32 of the organ in `image` (W, H, L) HU; see predict_volume."""
        if self.net is None:
            print(f'{self.plane}: snapshot {self.path}', flush=True)
            args = self.args
            self.net = load_RSTN(
                self.path, self.TEST, args.slice_thickness, args.crop_margin, self.device, args.precision
            )
        window = (self.args.low_range, self.args.high_range)
        return predict_volume(self.net, image, self.plane, window, self.args.slice_thickness, self.device, **volumes)


@torch.inference_mode()
def predict_volume(net, image, plane, window, thickness, device, label=None, score=None, mask=None):
    """Average of the network's outputs over all windows of `image` along `plane` (section 3.3).

    image: (W, H, L) HU, clipped to `window`; label, or score and mask: what RSTN takes in testing 'O' and 'F', of the
    image's shape. Windows without a voxel of label or mask are skipped: their output is 0. -> (W, H, L) float32
    """
    views = {'image': image, 'label': label, 'score': score, 'mask': mask}
    views = {name: plane_view(volume, plane) for name, volume in views.items() if volume is not None}
    marks = views.get('label', views.get('mask'))
    average = SliceAverage(image.shape, plane, thickness)
    windows = {j: slice_window(j, len(views['image']), thickness) for j in range(len(views['image']))}
    seen = [j for j, ids in windows.items() if marks is None or marks[ids].any()]
    batch = max(PIXELS_AT_ONCE // views['image'][0].size, 1) if marks is None else 1  # boxes differ in size
    for first in tqdm(
        range(0, len(seen), batch), desc=f'plane {plane}', leave=False, disable=processes.rank() > 0 or None
    ):
        places = seen[first : first + batch]
        ids = np.array([windows[j] for j in places])  # (N, 3)
        inputs = {name: view[ids[:, :thickness]].astype(np.float32) for name, view in views.items() if name != 'image'}
        inputs['image'] = to_unit(views['image'][ids], *window)  # (N, 3, A, B)
        outputs = net(**{name: torch.from_numpy(array).to(device) for name, array in inputs.items()})
        for j, output in zip(places, outputs.cpu().numpy()):
            average.add(j, output)
    return average.volume()


def to_bytes(probability):
    """Probability in [0, 1] as it is stored: round(255 p), uint8."""
    return np.around(probability * 255).astype(np.uint8)


def stored(path, shape, compute):
    """The volume at `path`, or `compute()` stored there."""
    volume = load_volume(path, shape)
    if volume is None:
        volume = compute()
        save_volume(path, volume)
    return volume


def run_settings(args, cases, snapshots, kinds=('image_file',)):
    """What stored volumes depend on, apart from their names: for run.json.

    cases: of the fold's testing list; kinds: which of their files are looked at.
    """
    files = [[getattr(case, kind) for kind in kinds] for case in cases]
    return {
        'window': [args.low_range, args.high_range],
        'precision': args.precision,
        'snapshots': [checksum(snapshot_folder(args) / snapshot) for snapshot in snapshots],
        'cases': [[[file, checksum(Path(args.data_path, file))] for file in case] for case in files],
    }


def require_snapshots(testers, volumes):
    """FileNotFoundError where a snapshot is missing that is needed, since not all of these volumes are stored."""
    for tester in testers:
        if not tester.path.exists() and not all(volume.exists() for volume in volumes):
            raise missing_weights(tester.path)


@contextlib.contextmanager
def first_alone(*folders):
    """Hold the result folders for the block; of several processes the first does, and the others follow its set-up.

    Within the block the processes can wait for each other. They exchange no tensors, so gloo serves GPUs, too.
    """
    with processes.process_group(torch.device('cpu')), lock_folders(*(folders if processes.rank() == 0 else ())):
        yield


def share_out(cases, compute):
    """Let each of several processes call compute(number, case) for its share of the cases, numbered from 1.

    -> whether this process is the first, which then goes through all cases and finds their volumes stored.
    """
    processes.wait()  # the first has prepared the folders
    if processes.world_size() > 1:
        for number, case in list(enumerate(cases, 1))[processes.rank() :: processes.world_size()]:
            compute(number, case)
    processes.wait()
    return processes.rank() == 0


def evaluate_plane(args, stage, TEST):
    """Coarse or oracle testing of a fold's test cases along a plane: volumes/{epoch}_{case}.npz and results.txt."""
    processes.quiet()
    device, made = start(args)
    snapshot = find_snapshot(args, args.plane, args.timestamp1)
    folder = results_folder(args, stage, snapshot)
    cases = read_cases(args.data_path, 'testing', args.current_fold)
    tester = PlaneTester(args, args.plane, snapshot, TEST, device)
    epoch = epoch_name(args)

    def file(number):
        return folder / 'volumes' / f'{epoch}_{number}.npz'

    def volume_and_label(number, case):
        start = time.time()
        image, label = case.image(args.data_path), case.label(args.data_path, args.organ_ID)
        volumes = {'label': label} if TEST == 'O' else {}
        volume = stored(file(number), image.shape, lambda: to_bytes(tester.predict(image, **volumes)))
        print(f'    {case.image_file}: {time.time() - start:.1f} s', flush=True)
        return volume, label

    require_snapshots([tester], [file(number) for number in range(1, len(cases) + 1)])
    with first_alone(folder):
        if processes.rank() == 0:
            kinds = ('image_file', 'label_file') if TEST == 'O' else ('image_file',)
            prepare_folder(folder, run_settings(args, cases, [snapshot], kinds), made)
        if not share_out(cases, volume_and_label):
            return
        scores = []
        with Results(folder) as results:
            results(f'Evaluating snapshot {epoch}:')
            for number, case in enumerate(cases, 1):
                volume, label = volume_and_label(number, case)
                export(args, file(number), volume >= 128, case)
                scores.append(DSC_computation(label, volume >= 128))
                results(f'  Testcase {number}: DSC = {scores[-1]} .')
            mean, _ = results.average([score.value for score in scores])
            results(f'Snapshot {epoch}: average DSC = {mean} .')
