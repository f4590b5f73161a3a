"""The rows of bench.py, each the plain way and as the stages run it; a process serves one of the two.

plain: straightforward float32 PyTorch (the FCN-8s as written in FCN8s.features, torch.optim.SGD as it comes), numpy and
scipy, in the environment that a user has. fast: the stages' own functions, in the environment that run.sh gives them.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import distance
from torch.utils.flop_counter import FlopCounterMode

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / 'OrganSegRSTN'))

import init  # noqa: E402
import ring  # noqa: E402
from model import RSTN, FCN8s, set_precision  # noqa: E402
from running.data_folder import plane_view  # noqa: E402
from training import make_optimizer, train_step  # noqa: E402
from utils import DSC_computation, _post_processing_scipy, post_processing, to_unit  # noqa: E402
from volumes.planes import slice_window  # noqa: E402
from volumes.rounds import coarse_to_fine  # noqa: E402
from volumes.testing import PlaneSettings, PlaneTester, predict_volume, to_bytes  # noqa: E402

MARGIN = 20

FULL = SimpleNamespace(width=64, window=512, crop=96, volume=(512, 512, 240), product=4096)
QUICK = SimpleNamespace(width=4, window=48, crop=24, volume=(40, 32, 16), product=128)


def serve(pipe, fast, quick, peers):
    """Answer the driver's (method of Worker, arguments) through `pipe` until it is closed; peers: a folder to import from."""
    sys.path.append(peers)
    if not fast:
        ring.features = FCN8s.features  # the plain forward, here and in training
    worker = Worker(fast, QUICK if quick else FULL)
    with contextlib.suppress(EOFError):
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(worker, method)(*arguments))


class Worker:
    """Times one row after the other, one of the two ways; a row is {name: (fresh, work)}, and work(fresh()) is timed."""

    def __init__(self, fast, size):
        self.fast, self.size, self.row, self.threads = fast, size, {}, torch.get_num_threads()

    def prepare(self, key):
        """Make a row ready, each of its works done once; -> their names."""
        self.row = {}  # the memory of the former row
        torch.set_num_threads(1 if key.endswith('one_thread') else self.threads)
        name, precision = [*key.split('_'), ''][:2]
        makers = {'coarse': testing_row, 'fine': testing_row, 'training': training_row, 'init': init_row}
        whole = {'fine_round': fine_round_row, 'coarse_case': coarse_case_row}
        if key in whole:
            self.row = whole[key](self.fast, self.size)
        elif name in makers:
            self.row = makers[name](self.fast, self.size, name, precision if self.fast else 'fp32')
        else:
            self.row = voxel_row(self.fast, self.size, key)
        for work in self.row:
            self.time(work)
        return list(self.row)

    def time(self, work):
        """Return the seconds of one work of the row."""
        fresh, work = self.row[work]
        argument = fresh()
        start = time.perf_counter()
        work(argument)
        return time.perf_counter() - start

    def operations(self, key):
        """Return the floating-point operations of the plain row (2 a multiply-add); 0 where it has no network."""
        if not ('fp32' in key or 'bf16' in key):
            return 0
        training, size = key.startswith('training'), self.size.window if key.startswith('coarse') else self.size.crop
        with torch.device('meta'):
            net, image = FCN8s(3, self.size.width), torch.empty(1, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            out = net(image)
            if training:
                out.sum().backward()
        return counter.get_total_flops() * (2 if training else 1)  # two networks are trained

    def product_rates(self, repeats):
        """Return {precision: (GFLOP/s, how)}: the fastest of three ways to multiply two large square matrices."""
        ways = {'matmul': torch.matmul, 'linear': F.linear, 'conv2d 1x1': as_convolution}
        n, rates = self.size.product, {}
        for precision, dtype in (('fp32', torch.float32), ('bf16', torch.bfloat16)):
            a, b = torch.randn(2, n, n).to(dtype)
            for name, way in ways.items():
                self.row = {name: (lambda: None, lambda _, way=way, a=a, b=b: way(a, b))}
                with torch.no_grad():
                    fastest = min(self.time(name) for _ in range(repeats + 1))
                rates[precision] = max(rates.get(precision, (0,)), (2 * n**3 / fastest / 1e9, name))
        return rates


def as_convolution(a, b):
    """Return the product of two square matrices, as oneDNN computes a convolution."""
    return F.conv2d(a.t().reshape(1, len(a), -1, 1), b[:, :, None, None])


# --- networks ------------------------------------------------------------------------------------------------------


def network(TEST, width):
    """Return an RSTN with random weights, in the score layers too: from zero, there would be no gradient to pass on."""
    torch.manual_seed(0)
    net = RSTN(crop_prob=0, TEST=TEST, width=width)
    for name, weight in net.named_parameters():
        if 'score' in name and 'upscore' not in name and name.endswith('weight'):
            torch.nn.init.normal_(weight, std=0.01)
    return net


def testing_row(fast, size, name, precision):
    """Return a row: a window by the coarse net, or a crop, all of it in the box, by saliency and fine net."""
    net = network({'coarse': 'C', 'fine': 'F'}[name], size.width).eval()
    set_precision(net, precision, store=True)
    n = size.window if name == 'coarse' else size.crop
    inputs = {'image': torch.rand(1, 3, n, n)}
    if name == 'fine':
        inputs |= {'score': torch.rand(1, 3, n, n), 'mask': torch.ones(1, 3, n, n)}
    without_gradients = torch.inference_mode if fast else torch.no_grad
    return {'torch': (lambda: None, without_gradients()(lambda _: net(**inputs)))}


def training_row(fast, size, _, precision):
    """Return a step in mode I: coarse, saliency and fine net, both of the whole crop, backward, SGD."""
    net = network(None, size.width).train()
    set_precision(net, precision)
    optimizer = make_optimizer(net, '1e-5', '10')
    if not fast:
        groups = [{key: group[key] for key in ('params', 'lr', 'weight_decay')} for group in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, momentum=0.99)
    image, label = torch.rand(1, 3, size.crop, size.crop), torch.zeros(1, 3, size.crop, size.crop)
    label[:, :, 8:-8, 8:-8] = 1  # with the margin of 20 the box is the whole crop
    return {'torch': (lambda: None, lambda _: train_step(net, optimizer, 'I', image, label))}


# --- whole volumes -------------------------------------------------------------------------------------------------


def body(size):
    """Return (image, mask of an organ): a body in air, 0.7 of a slice; the organ's largest crop along Z is size.crop."""
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) - n / 2 for n in size.volume], indexing='ij', sparse=True)
    a, b, c = (2 * axis / n for axis, n in zip(axes, size.volume))
    image = np.where((a / 0.95) ** 2 + (b / 0.94) ** 2 + 0 * c < 1, 40, -1000).astype(np.int16)
    half = max(size.crop // 2 - MARGIN, 2)
    mask = (axes[0] / half) ** 2 + (axes[1] / half) ** 2 + (axes[2] / 6.5) ** 2 < 1
    image[mask] = 120
    return image, mask.astype(np.uint8)


def settings():
    return PlaneSettings((-100, 240), 3, MARGIN, torch.device('cpu'), 'fp32')


def fine_round_row(fast, size):
    """Return the row of round 1 of coarse to fine with one tester, along Z: some 14 windows up to size.crop in a whole scan."""
    image, mask = body(size)
    tester = PlaneTester('Z', [None], 'F', settings())
    tester.net = network('F', size.width).eval()
    set_precision(tester.net, 'fp32', store=True)
    if not fast:
        tester = SimpleNamespace(predict=partial(plain_volume, tester.net, 'Z'))

    def round_0():
        rounds = coarse_to_fine([mask * np.uint8(200)] * 3, [tester], image, 0.5)
        return rounds, *next(rounds)

    if fast:
        return {'coarse_to_fine': (round_0, lambda made: next(made[0]))}
    return {'loop': (round_0, lambda made: plain_round(tester, image, *made[1:]))}


def plain_round(tester, image, mask, score):
    """Return a round on the whole scan."""
    score = tester.predict(image, score=score, mask=mask) / np.float32(1)
    mask = (score >= 0.5).astype(np.uint8)
    return post_processing(mask, mask.copy(), 0.5, 1), score


def coarse_case_row(fast, size):
    """Return the row of coarse testing along Z of six slices of a scan with a body and air, to bytes."""
    image = np.ascontiguousarray(body(size)[0][:, :, 2:8])
    net = network('C', size.width).eval()
    set_precision(net, 'fp32', store=True)
    if fast:
        return {'predict_volume': (lambda: None, lambda _: to_bytes(predict_volume(net, image, 'Z', settings())))}
    return {'loop': (lambda: None, lambda _: to_bytes(plain_volume(net, 'Z', image)))}


@torch.no_grad()
def plain_volume(net, plane, image, **volumes):
    """Test window by window, each three slices of the whole scan, added and averaged in numpy."""
    views = {name: plane_view(volume, plane) for name, volume in volumes.items()}
    unit, total = plane_view(image, plane), np.zeros(image.shape, np.float32)
    sums, slices = plane_view(total, plane), image.shape['XYZ'.index(plane)]
    for j in range(slices):
        ids = slice_window(j, slices, 3)
        if 'mask' in views and not views['mask'][ids].any():
            continue
        inputs = {name: torch.from_numpy(view[ids].astype(np.float32))[None] for name, view in views.items()}
        output = net(torch.from_numpy(to_unit(unit[ids], -100, 240))[None], **inputs)[0].numpy()
        for k in range(max(j - 1, 0), min(j + 2, slices)):
            sums[k] += output[k - j + 1]
    for k in range(slices):
        sums[k] /= min(k + 2, slices) - max(k - 1, 0)
    return total


# --- initialization ------------------------------------------------------------------------------------------------


def init_row(fast, size, *_):
    """Return slices of one case along three planes, and what the lists say of each."""
    folder = tempfile.TemporaryDirectory(prefix='bench_')  # removed with the row
    data = Path(folder.name)
    image = np.random.default_rng(0).normal(0, 200, size.volume).astype(np.int16)
    for kind, volume in (('images', image), ('labels', cases(size).organ_volume(np.random.default_rng(0)))):
        (data / kind).mkdir()
        np.save(data / kind / '0001.npy', volume)

    def fresh():
        for made in Path(folder.name).glob('*_[XYZ]'):
            shutil.rmtree(made)
        os.sync()  # what the former run wrote is not written back during this one
        return data

    if fast:
        return {'init.py': (fresh, fast_init)}
    return {
        'slice by slice': (fresh, partial(plain_init, measured=True)),
        'np.save alone': (fresh, partial(plain_init, measured=False)),
    }


def fast_init(data):
    """Return init.py's work on a case."""
    args = SimpleNamespace(data_path=data, organ_number=1, low_range=-100, high_range=240)
    with ThreadPoolExecutor(os.cpu_count()) as writers:
        return init.initialize_case(args, 0, '0001', writers)


def plain_init(data, measured):
    """Return the published order of things: a loop of slices with np.save; measured: and each slice's list entries."""
    image, label = (np.load(data / kind / '0001.npy') for kind in ('images', 'labels'))
    entries = []
    for plane in 'XYZ':
        folders = [data / f'{kind}_{plane}' / '0001' for kind in ('images', 'labels')]
        for folder in folders:
            folder.mkdir(parents=True)
        for j, pair in enumerate(zip(plane_view(image, plane), plane_view(label, plane))):
            for folder, one in zip(folders, pair):
                np.save(folder / f'{j:04d}.npy', one)
            if measured:
                organ = pair[1] == 1
                a, b = organ.nonzero()
                box = (a.min(), a.max(), b.min(), b.max()) if len(a) else (0, 0, 0, 0)
                entries.append((np.clip(pair[0], -100, 240).mean(), organ.sum(), *box))
    return entries


# --- post-processing and Dice --------------------------------------------------------------------------------------


def cases(size):
    """Return SWIG_fast_functions/test.py as a module, making volumes of this size."""
    spec = importlib.util.spec_from_file_location('swig_test', REPO / 'SWIG_fast_functions' / 'test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SHAPE = size.volume
    return module


def voxel_row(fast, size, key):
    """Return the row dsc, post_processing_organ or post_processing_blobs."""
    made, rng = cases(size), np.random.default_rng(0)
    volume = made.blob_volume(rng) if key.endswith('blobs') else made.organ_volume(rng)
    return dice_row(fast, volume.astype(bool)) if key == 'dsc' else post_processing_row(fast, volume, made)


def dice_row(fast, label):
    """Return the counts of a label and of a prediction that lies a little beside it, both bool."""
    pred = np.roll(label, 5, axis=0)
    if fast:
        return {'fast_functions': (lambda: None, lambda _: DSC_computation(label, pred))}
    return {
        'numpy': (lambda: None, lambda _: [np.count_nonzero(mask) for mask in (label, pred, label & pred)]),
        'scipy': (lambda: None, lambda _: distance.dice(label.ravel(), pred.ravel())),
    }


def post_processing_row(fast, volume, made):
    """Return the components of at least half the largest one's size, of a fresh copy each time."""
    if fast:
        return {'fast_functions': (volume.copy, lambda mask: post_processing(mask, volume, 0.5, 1))}
    row = {'scipy': (volume.copy, lambda mask: _post_processing_scipy(mask, volume, 0.5))}
    row |= {name: (volume.copy, work) for name, work in made.peers().items() if name != 'scipy'}
    if 'cc3d' in row:
        import cc3d

        row['cc3d labels alone'] = (volume.copy, partial(cc3d.connected_components, connectivity=6, binary_image=True))
    return row
