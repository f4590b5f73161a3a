"""Prove the pipeline on a GPU, in about ten minutes: PASS or FAIL and figures for each promise, as lines and as JSON.

Usage: python tests/gpu.py [--json FILE] [--only NAME,...] [--device cuda:0|cpu] [--width N] [--minutes M]

It needs what requirements.txt installs. Without a card it says so and exits 0; --device cpu with a small width tries the
script itself. At width 64 it compares the numbers with the published code's (tests/golden), else with those of the
plain network on the CPU.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import golden_case
import numpy as np
import process_memory
import torch

import ring
import training_parallel
from Data import DataLayer, varied
from model import RSTN, DiceEntropyLoss, DSC_loss, FCN8s, load_RSTN, set_precision
from running import processes, script
from running.weights import load_weights
from training import coarse_step, make_optimizer, train_step
from utils import DSC_computation, to_unit
from volumes.planes import slice_window
from volumes.rounds import coarse_probability, coarse_to_fine
from volumes.testing import PlaneSettings, PlaneTester, to_bytes

GOLDEN = golden_case.GOLDEN
WINDOW, MARGIN = (-100, 240), 20
WAYS = {'ring': True, 'plain': False}  # of computing the FCN-8s, see `way`


def main():
    args = arguments()
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        print('gpu.py: no CUDA device here: nothing was checked, and nothing about GPUs is proven')
        return 0
    if args.worker:
        return worker(args)
    if args.exhaust:
        return script.run(lambda: exhaust(args))
    found, failed, begin = {'card': environment(args), 'checks': {}}, [], time.monotonic()
    for name in args.only:
        start = time.monotonic()
        try:
            if start - begin > 60 * args.minutes:
                raise TimeoutError(f'not begun within {args.minutes:g} minutes')
            figures, passed = CHECKS[name](args) or {}, True
        except Exception as error:  # every check is tried
            traceback.print_exc()
            figures, passed = {'error': f'{type(error).__name__}: {error}'.splitlines()[0]}, False
            failed.append(name)
        seconds = time.monotonic() - start
        print(f'{"PASS" if passed else "FAIL"} {name}, {seconds:.0f} s: {short(figures)}', flush=True)
        found['checks'][name] = {'passed': passed, 'seconds': seconds} | figures
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + '\n')
    print(f'{len(args.only) - len(failed)} of {len(args.only)} passed' + ''.join(f'; FAIL {name}' for name in failed))
    return 1 if failed else 0


def arguments():
    """Return the options; sizes of what is measured follow from the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures to FILE')
    parser.add_argument('--only', default=','.join(CHECKS), help='only these checks')
    parser.add_argument('--device', type=torch.device, default='cuda:0', help='default cuda:0')
    parser.add_argument('--width', type=int, default=64, help='channels of the first layer (default 64)')
    parser.add_argument('--minutes', type=float, default=9, help='begin no check later than this (default 9)')
    for hidden in ('--worker', '--exhaust'):
        parser.add_argument(hidden, action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(',')
    if unknown := set(args.only) - set(CHECKS):
        parser.error(f'argument --only: {unknown.pop()!r} is not one of {", ".join(CHECKS)}')
    small = args.device.type == 'cpu'
    args.GPU_ID = 'cpu' if small else str(args.device.index or 0)
    args.slice, args.crop, args.volume, args.repeats = (
        (40, 24, (40, 36, 8), 1) if small else (512, 96, (512, 512, 240), 10)
    )
    args.precisions = precisions(args.device)
    return args


def precisions(device):
    """Return those that the device takes."""
    found = []
    for name in ('fp32', 'tf32', 'bf16', 'fp16'):
        with contextlib.suppress(ValueError, RuntimeError, AssertionError):
            found.append(processes.pick_precision(name, device))
    return found


def short(figures):
    """Return the figures of a check in one line."""
    return json.dumps(json.loads(json.dumps(figures), parse_float=lambda text: float(f'{float(text):.3g}')))[1:-1]


def environment(args):
    """Print and return what it runs on."""
    found = {'torch': torch.__version__, 'cuda': torch.version.cuda, 'device': processes.device_name(args.device)}
    if args.device.type == 'cuda':
        properties = torch.cuda.get_device_properties(args.device)
        found |= {
            'capability': torch.cuda.get_device_capability(args.device),
            'architectures': torch.cuda.get_arch_list(),
            'memory': properties.total_memory,
            'cudnn': torch.backends.cudnn.version(),
        }
    print(short(found), flush=True)
    return found


# --- how to measure ------------------------------------------------------------------------------------------------


def finish(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds_of(args, work, repeats=None):
    """Return the median time of a work, after one to warm up."""
    times = []
    for _ in range((repeats or args.repeats) + 1):
        finish(args.device)
        start = time.perf_counter()
        work()
        finish(args.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def busy_share(args, work):
    """Return the share of a work's time in which the card computes; None on a CPU."""
    if args.device.type == 'cpu':
        return None
    seconds = seconds_of(args, work, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        work()
        finish(args.device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds


@functools.cache
def golden_snapshot(width):
    """Return (folder that is removed at the end, snapshot of the golden recipe): its planted path segments bright organs."""
    folder = tempfile.TemporaryDirectory(prefix='gpu_')
    path = Path(folder.name, 'FD0:ZJ3_1.pkl')
    with torch.device('meta'):
        shapes = {key: tensor.shape for key, tensor in RSTN(width=width).state_dict().items()}
    torch.save({key: torch.from_numpy(array) for key, array in golden_case.recipe.weights(shapes, 7).items()}, path)
    return folder, path


def network(args, TEST, precision='fp32', device=None):
    """Return a testing network of the golden weights, and the device set up for its precision."""
    device = device or args.device
    if device.type == 'cuda':
        processes.set_up_CUDA(precision, None)
    return load_RSTN(golden_snapshot(args.width)[1], TEST, 3, MARGIN, device, precision)


def testers(args, TEST, precision='fp32', device=None):
    """Return the PlaneTesters of the three planes, which share one network."""
    settings = PlaneSettings(WINDOW, 3, MARGIN, device or args.device, precision)
    found, net = [PlaneTester(plane, [None], TEST, settings) for plane in 'XYZ'], network(args, TEST, precision, device)
    for tester in found:
        tester.net = net
    return found


# --- the same numbers ----------------------------------------------------------------------------------------------


def case(number):
    """Return (image, label) of a golden test case, from 1."""
    return golden_case.recipe.volume(699 + number, golden_case.SHAPES[number - 1])


def rounds_of(args, precision='fp32', device=None, rounds=2):
    """Return ([coarse volumes of case 1 in bytes], [masks of rounds 0, 1, ...])."""
    image, _ = case(1)
    coarse = [to_bytes(tester.predict(image)) for tester in testers(args, 'C', precision, device)]
    masks = []
    for mask, _ in coarse_to_fine(coarse, testers(args, 'F', precision, device), image, 0.5):
        masks.append(mask)
        if len(masks) > rounds:
            break
    return coarse, masks


def expected_rounds(args):
    """Return the same by the published code (width 64), or by the plain network on the CPU."""
    if args.width != 64:
        with plain():
            return rounds_of(args, device=torch.device('cpu'))
    volumes = [
        GOLDEN / f'results/coarse_testing_1e-5x10,20/FD0:{plane}J3_1_{golden_case.TIMESTAMP}.pkl/volumes/e2682_1.npz'
        for plane in 'XYZ'
    ]
    (folder,) = (GOLDEN / 'results/coarse2fine_testing_1e-5x10,20').iterdir()
    files = [*volumes, *(folder / f'volumes/R{r}_1.npz' for r in range(3))]
    found = [np.load(file)['volume'] for file in files]
    return found[:3], found[3:]


@contextlib.contextmanager
def way(ringed):
    """Compute the FCN-8s by the ring, or plainly, during the block."""
    pays, ring.pays = ring.pays, lambda *_: ringed
    try:
        yield
    finally:
        ring.pays = pays


@contextlib.contextmanager
def plain():
    """Compute the FCN-8s without the ring during the block."""
    several, FCN8s.several = FCN8s.several, lambda self, images: [self(image[None])[0] for image in images]
    try:
        with way(False):
            yield
    finally:
        FCN8s.several = several


def golden(args):
    """Compare strict fp32 with the published code: bytes of three coarse planes, masks of two fine rounds."""
    (coarse, masks), (expected, rounds) = rounds_of(args), expected_rounds(args)
    moved = [np.count_nonzero(one != other) / one.size for one, other in zip(coarse, expected)]
    levels = max(int(abs(one.astype(int) - other).max()) for one, other in zip(coarse, expected))
    DSCs = [DSC_computation(one, other).value for one, other in zip(masks, rounds)]
    assert levels <= 1 and max(moved) <= 1e-3, f'bytes moved: {moved}, by {levels} levels at most'
    assert len(DSCs) == 3 and min(DSCs) > 0.999, f'DSC with the expected masks: {DSCs}'
    return {'bytes_moved': max(moved), 'levels': levels, 'DSC_of_rounds': DSCs}


def nine_steps(args):
    """Compare strict fp32 with the published code: losses and norms of the nine golden training steps, by ring and plainly."""
    record = json.loads((GOLDEN / 'training.json').read_text())
    if args.width == 64:
        wanted = [(step['coarse_loss'], step['fine_loss'], step['loss']) for step in record['steps']]
        wanted_norms = record['norms_after']
    else:
        wanted, wanted_norms = steps_on(args, torch.device('cpu'), record)
    found = {}
    for name, ringed in WAYS.items():
        with way(ringed):
            losses, norms = steps_on(args, args.device, record)
        loss = max(abs(a - b) for one, other in zip(losses, wanted) for a, b in zip(one, other))
        norm = max(abs(norms[key] / wanted_norms[key] - 1) for key in norms)
        assert loss < 2e-3 and norm < 1e-4, f'{name}: losses differ by {loss}, norms by {norm}'
        found[name] = {'loss_differs': loss, 'norm_differs': norm}
    return found


def steps_on(args, device, record):
    """Return (losses, norms after) of the nine steps on a device."""
    if device.type == 'cuda':
        processes.set_up_CUDA('fp32', None)
    image, label = case(1)
    model = RSTN(MARGIN, crop_prob=0, width=args.width)
    model.load_state_dict(load_weights(golden_snapshot(args.width)[1]))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0
    model.to(device).train()
    optimizer, losses = make_optimizer(model, '1e-5', '10'), []
    for step in record['steps']:
        window = slice_window(step['slice'], image.shape[2], 3)
        x, y = (
            torch.from_numpy(np.moveaxis(v[:, :, window], 2, 0)[None].copy()) for v in (to_unit(image, *WINDOW), label)
        )
        losses.append(train_step(model, optimizer, step['mode'], x.to(device), y.float()))
    state = model.state_dict()
    return losses, {key: state[key].double().norm().item() for key in record['norms_after']}


def other_precisions(args):
    """Compare the DSC of every round in tf32, bf16 and fp16 with fp32's: within 0.01."""
    label = case(1)[1]
    wanted = [DSC_computation(label, mask).value for mask in rounds_of(args)[1]]
    found = {}
    for precision in args.precisions[1:]:
        DSCs = [DSC_computation(label, mask).value for mask in rounds_of(args, precision)[1]]
        found[precision] = max(abs(one - other) for one, other in zip(DSCs, wanted, strict=True))
    assert all(difference < 0.01 for difference in found.values()), f'DSCs differ by {found}'
    return found


# --- speed ---------------------------------------------------------------------------------------------------------


def rates(args):
    """Measure copies (GB/s) and products (TFLOP/s)."""
    n = 256 if args.device.type == 'cpu' else 8192
    source = torch.rand(n * n, device=args.device)
    target = torch.empty_like(source)
    found = {'copy': 2 * source.nbytes / seconds_of(args, lambda: target.copy_(source)) / 1e9}
    for precision in args.precisions:
        if args.device.type == 'cuda':
            processes.set_up_CUDA(precision, None)
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(precision, torch.float32)
        a, b = torch.rand(2, n, n, device=args.device).to(dtype)
        found[precision] = 2 * n**3 / seconds_of(args, lambda a=a, b=b: a @ b) / 1e12
    return found


def ring_or_plain(args):
    """Compare the ring's logits and ms with the plain network's, by size and precision; `pays` is to choose the faster."""
    found, wrong = {}, []
    for precision in args.precisions:
        net = network(args, 'C', precision).coarse_model
        for n in (args.crop, args.slice):
            x = torch.rand(1, 3, n, n, device=args.device)
            name, found[name] = f'{precision} {n}', testing_by_way(args, net, x, precision)
            pays = {name: torch.inference_mode()(ring.pays)(net, x)}
            if precision != 'fp16':
                found[f'step {name}'] = steps_by_way(args, precision, n)
                pays[f'step {name}'] = ring.pays(net, x)
            wrong += [one for one, ringed in pays.items() if ringed != (found[one]['ring'] < found[one]['plain'])]
        windows = [torch.rand(3, args.crop + 5 * i, args.crop + 3 * i, device=args.device) for i in range(8)]
        found[f'{precision} eight windows'] = windows_by_way(args, net, windows)
    return found | {'pays_is_wrong_for': wrong}


@torch.inference_mode()
def testing_by_way(args, net, x, precision):
    """Return the ms of a network in testing by way, also in the channels-last format on a card."""
    found, logits = {}, {}
    for name, ringed in WAYS.items():
        with way(ringed):
            logits[name], found[name] = net(x), 1e3 * seconds_of(args, lambda: net(x))
    difference = float((logits['ring'] - logits['plain']).abs().max() / logits['plain'].abs().max())
    assert difference < (1e-4 if precision == 'fp32' else 0.1), f'{precision} {x.shape}: logits differ by {difference}'
    if args.device.type == 'cuda':
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        with way(False):
            found['plain, channels last'] = 1e3 * seconds_of(args, lambda: last(x))
    return found


def steps_by_way(args, precision, n):
    """Return the ms of a training step in mode I by way."""
    step, found = training_work(args, precision, n), {}
    for name, ringed in WAYS.items():
        with way(ringed):
            found[name] = 1e3 * seconds_of(args, step)
    return found


@torch.inference_mode()
def windows_by_way(args, net, windows):
    """Return the ms of fine windows of several sizes, together by the ring, and one by one plainly."""
    found = {'ring': 1e3 * seconds_of(args, lambda: net.several(windows))}
    with plain():
        found['plain'] = 1e3 * seconds_of(args, lambda: net.several(windows))
    return found


def times(args):
    """Measure training steps, coarse testing and a fine round by precision: seconds, and the card's busy share."""
    found = {}
    for precision in args.precisions:
        one = {}
        if precision != 'fp16':
            for n in (args.crop, args.slice):
                step = training_work(args, precision, n)
                one[f'step {n}'] = seconds_of(args, step)
                one[f'busy, step {n}'] = busy_share(args, step)
        image, mask = body(args.volume)
        planes = testers(args, 'C', precision)
        one['coarse, three planes'] = seconds_of(args, lambda p=planes: [t.predict(image) for t in p], 1)
        one['busy, coarse Z'] = busy_share(args, lambda p=planes: p[2].predict(image))
        coarse, fine = [mask * np.uint8(200)] * 3, testers(args, 'F', precision)

        def a_round(coarse=coarse, fine=fine):
            rounds = coarse_to_fine(coarse, fine, image, 0.5)
            return next(rounds), next(rounds)

        round_0 = seconds_of(args, lambda c=coarse: coarse_probability(c) >= 0.5, 1)
        one['fine round'] = seconds_of(args, a_round, 1) - round_0
        one['busy, fine round'] = busy_share(args, a_round)
        found[precision] = one
    return found | {'asked of an H100': {'step 512': 0.01, 'coarse, three planes': 1.5, 'ten fine rounds': 4}}


def training_work(args, precision, n):
    """Return a step in mode I on a slice of n x n, always with the same box, as a function."""
    if args.device.type == 'cuda':
        processes.set_up_CUDA(precision, None)
    with args.device:
        model = RSTN(crop_prob=0, width=args.width).train()
    set_precision(model, precision)
    optimizer = make_optimizer(model, '1e-5', '10')
    image, label = torch.rand(1, 3, n, n, device=args.device), torch.zeros(1, 3, n, n)
    label[:, :, n // 3 : n // 2, n // 3 : n // 2] = 1
    return lambda: train_step(model, optimizer, 'I', image, label)


def body(shape):
    """Return (image, mask of an organ): a body in air that fills 0.7 of a slice."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing='ij', sparse=True)
    image = np.where((axes[0] / 0.85) ** 2 + (axes[1] / 0.8) ** 2 + 0 * axes[2] < 1, 40, -1000).astype(np.int16)
    mask = sum((a / 0.15) ** 2 for a in axes) < 1
    image[mask] = 120
    return image, mask.astype(np.uint8)


def memory(args):
    """Measure the peak memory (GB) of a training step on a whole slice, and of coarse testing, by precision."""
    if args.device.type == 'cpu':
        return {}
    found = {}
    image, _ = body(args.volume)
    for precision in args.precisions:
        work = {'coarse': lambda p=precision: testers(args, 'C', p)[2].predict(image)}
        if precision != 'fp16':
            work['step'] = lambda p=precision: training_work(args, p, args.slice)()
        for name, make in work.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(args.device)
            make()
            found[f'{precision} {name}'] = torch.cuda.max_memory_allocated(args.device) / 1e9
    return found


# --- runs ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def training_folder(args):
    """Yield (data folder, arguments of training.py in a narrow network on tiny cases)."""
    with tempfile.TemporaryDirectory(prefix='gpu_') as folder:
        data = Path(folder)
        process_memory.write_cases(data, [(40, 36, 10)] * 4)
        process_memory.run('init.py', data, 1, 2, *WINDOW)
        pretrained = data / 'models' / 'pretrained' / 'fcn8s_from_caffe.pth'
        pretrained.parent.mkdir(parents=True)
        torch.manual_seed(0)
        torch.save(FCN8s(3, min(args.width, 16)).state_dict(), pretrained)
        settings = [*process_memory.BEGIN, 'Z', args.GPU_ID, *process_memory.RATES, 0.5, 1, *process_memory.EPOCHS]
        yield data, [data, *settings]


def snapshot(data, timestamp):
    return load_weights(data / process_memory.SNAPSHOTS / f'FD0:ZJ3_1_{timestamp}.pkl')


def differs(one, other):
    """Return the largest difference of two state dicts."""
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def seed_and_resume(args):
    """Run training.py twice with one seed, and killed and resumed: the same bits."""
    with training_folder(args) as (data, settings):
        for timestamp in ('20260101_000001', '20260101_000002'):
            process_memory.run('training.py', *settings, timestamp, '--seed', 1)
        command = [sys.executable, process_memory.CODE / 'training.py', *settings, '20260101_000003', '--seed', 1]
        command = [*map(str, command), '--checkpoint_minutes', '0', '--resume']
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if 'ZI Epoch' in line:
                process.kill()
                break
        process.stdout.read()
        process.wait()
        resumed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert 'resumed from' in resumed
        first, *others = (snapshot(data, f'20260101_00000{i}') for i in (1, 2, 3))
    figures = {f'{name}_differs': differs(first, one) for name, one in zip(('seed', 'resumed'), others)}
    assert not any(figures.values()), f'weights differ: {figures}'
    return figures


def training_slices(args):
    """Compare a sample made and varied on the card with the CPU's; pretrain, and train by the fast recipe."""
    with training_folder(args) as (data, settings):
        fold, organ_number, *window, threshold, thickness, organ = process_memory.BEGIN
        slices = DataLayer(data, fold, organ_number, *window, threshold, thickness, organ, 'Z')
        made = []
        for device in (torch.device('cpu'), args.device):
            random.seed(0)
            sample = slices.on_device(device, *slices.stored(0))
            made.append([tensor.cpu() for tensor in (*sample, *varied(*sample))])
        differences = [float((one - other).abs().max()) for one, other in zip(*made)]
        image, label, image_varied, _ = differences
        moved = float((made[0][3] != made[1][3]).float().mean())
        assert label == 0 and max(image, image_varied) < 1e-5 and moved < 1e-3, f'{differences}, labels moved: {moved}'
        process_memory.run('pretrain.py', data, *process_memory.BEGIN, args.GPU_ID, 1, '--width', 4)
        process_memory.run('training.py', *settings, '_', '--recipe', 'fast')
    return {'image_differs': max(image, image_varied), 'labels_moved': moved}


def two_processes(args):
    """Compare two processes on one card, gradients averaged over gloo, with one process that averages them."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', __file__]
    command += ['--worker', '--device', str(args.device), '--width', str(min(args.width, 16))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker(args):
    """Run one of two processes; rank 0 prints by how much averaged gradients differ from one process's."""
    if args.device.type == 'cuda':
        torch.cuda.set_device(args.device)
        processes.set_up_CUDA('fp32', None)
    with processes.process_group(torch.device('cpu')):  # by gloo: both are on one card
        difference = averaged_and_not(args)
    if processes.rank() == 0:
        print(json.dumps({'weights_differ': difference}))
    return int(difference > 1e-5)


def averaged_and_not(args):
    """Return by how much weights differ after steps of each mode and one of the coarse network, averaged and not."""
    samples = [(torch.rand(1, 3, 40, 36), (torch.rand(1, 3, 40, 36) > 0.7).float()) for _ in range(2)]
    torch.distributed.broadcast_object_list(samples)
    samples = [[tensor.to(args.device) for tensor in sample] for sample in samples]
    models = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = RSTN(crop_prob=0, width=args.width).to(args.device).eval()
        optimizer = make_optimizer(model, '1e-3', '10')
        wrapped = model
        for mode, new in (('S', True), ('I', True), ('C', False), ('I', False), ('J', True)):
            if parallel:
                if new:
                    wrapped = training_parallel.distribute(model, mode)
                if mode == 'C':
                    coarse_step(wrapped, optimizer, *samples[processes.rank()])
                else:
                    train_step(wrapped, optimizer, mode, *samples[processes.rank()])
                continue
            optimizer.zero_grad()
            for image, label in samples:
                if mode == 'C':
                    loss = DiceEntropyLoss()(*model(image, label, mode, logits=True), label)
                else:
                    coarse, fine = (DSC_loss()(p, label) for p in model(image, label, mode))
                    loss = (coarse + 2 * fine) / 3
                (loss / 2).backward()
            optimizer.step()
        models.append(model)
    return max(processes.gather(differs(*(model.state_dict() for model in models))))


def out_of_memory(args):
    """Check that too little memory is one line that names a cure, exit code 1."""
    command = [sys.executable, __file__, '--exhaust', '--device', str(args.device), '--width', str(args.width)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.returncode
    line = done.stderr.strip()
    assert '\n' not in line and '--precision bf16' in line, line
    return {'line': line}


def exhaust(args):
    """Ask for more memory than there is."""
    if args.device.type == 'cuda':
        torch.cuda.set_per_process_memory_fraction(0.01, args.device)
    torch.empty(1 << 48 if args.device.type == 'cpu' else 1 << 40, dtype=torch.uint8, device=args.device)


def missing_device(args):
    """Check that a device that is not there, given twice, or hidden, is one line, exit code 1."""
    found = {}
    hidden = {'CUDA_VISIBLE_DEVICES': ''}
    tried = [('0,0', {})] if args.device.type == 'cpu' else [('99', {}), ('0,0', {}), ('0', hidden)]
    for GPU_ID, more in tried:
        command = [sys.executable, process_memory.CODE / 'pretrain.py', '.', 0, 1, *WINDOW, 0.98, 3, 1, GPU_ID, 1]
        done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, env=os.environ | more)
        assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
        found[GPU_ID] = done.stderr.strip()
    return found


CHECKS = {
    check.__name__: check
    for check in (
        rates, golden, nine_steps, other_precisions, ring_or_plain, times, memory, seed_and_resume, training_slices,
        two_processes, out_of_memory, missing_device,
    )
}  # fmt: skip

if __name__ == '__main__':
    sys.exit(main())
