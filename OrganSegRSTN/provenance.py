"""What a figure was made with: code revision, libraries, device, threads, seed and arguments."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ('torch', 'numpy', 'scipy', 'fast-functions')


def begin(args):
    """(device, provenance) of a stage that runs a network: the lines that every log begins with are printed."""
    from model import device_name, pick_device  # torch: seconds that other stages need not wait

    device = pick_device(args.GPU_ID)
    made = provenance(args, device_name(device))
    print_provenance(made)
    return device, made


def begin_without_network(args, stage):
    """The provenance of a stage that runs no network: the same lines are printed."""
    print(f'device: CPU ({stage} needs no other)')
    made = provenance(args, 'CPU')
    print_provenance(made)
    return made


def code():
    """{what: value} of the code and its libraries."""
    versions = {'python': platform.python_version()} | {name: library_version(name) for name in LIBRARIES}
    return {'revision': revision(), 'versions': versions}


def provenance(args, device):
    """{what: value} of a run with these arguments on a device of this name."""
    return code() | {
        'device': device,
        'arguments': {name: value for name, value in vars(args).items() if name != 'unused'},
    }


def print_provenance(made):
    """Two lines: the code and its libraries, the arguments."""
    print(f'code: {made["revision"]}; ' + ', '.join(f'{name} {value}' for name, value in made['versions'].items()))
    print('arguments: ' + ' '.join(f'{name}={value}' for name, value in made['arguments'].items()), flush=True)


@functools.cache
def revision():
    """The commit of the code, `-dirty` where files differ from it; `unknown` without git."""
    command = ['git', '-C', Path(__file__).resolve().parent, 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def library_version(name):
    """The installed version of a library, or `none`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return 'none'
