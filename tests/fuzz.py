"""A reader, fed valid files with bytes changed at random, for a bounded time: python fuzz.py READER FOLDER SECONDS SEED

It must read each, or raise the ValueError or OSError that a script ends with in one line: nothing else, within 10
seconds and 3 GB. On anything else it prints seed, number and content of the input, which FOLDER still holds. Run by
test_fuzz.py; by hand, for longer, or with SEED:NUMBER to repeat one input.
"""

import base64
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / 'OrganSegRSTN'), str(TESTS.parent / 'DATA2NPY')]

import numpy as np  # noqa: E402

NUMBERS = [
    b'\0',
    b'\xff',
    b'\x7f\xff\xff\xff',
    b'\xff\xff\xff\x7f',
    b'\xff\xff\xff\xff',
    b'-1',
    b'1e999',
    b'9' * 30,
    b'\n',
    b' ',
]


class Hang(BaseException):
    """A reader took too long."""


# --- readers: each makes valid files in a folder, and reads one -----------------------------------------------------


def dicom(folder, syntax=None):
    from raw_scans import make_slices

    from scans.dicom import read_series

    slices = make_slices(np.random.default_rng(0).integers(-1000, 1000, (6, 5, 2)).astype(np.int16))
    for i, s in enumerate(slices):
        if syntax:
            s.compress(syntax)
        s.save_as(folder / f'{i}.dcm', enforce_file_format=True)
    return folder / '1.dcm', lambda path: read_series(path.parent, lambda note: None)


def dicom_rle(folder):
    from pydicom.uid import RLELossless

    return dicom(folder, RLELossless)


def dicom_enhanced(folder):
    from raw_scans import enhanced, make_slices

    from scans.dicom import read_series

    (whole,) = enhanced(make_slices(np.arange(60, dtype=np.int16).reshape(6, 5, 2)), frames=2)
    whole.save_as(folder / '1.dcm', enforce_file_format=True)
    return folder / '1.dcm', lambda path: read_series(path.parent, lambda note: None)


def dicom_sample(folder, name):
    """A compressed slice that pydicom ships."""
    from pydicom.data import get_testdata_file

    from scans.dicom import read_series

    path = folder / '1.dcm'
    path.write_bytes(Path(get_testdata_file(name, download=False)).read_bytes())
    return path, lambda path: read_series(path.parent, lambda note: None)


def dicom_jpeg_2000(folder):
    return dicom_sample(folder, 'MR_small_jp2klossless.dcm')


def dicom_jpeg_ls(folder):
    return dicom_sample(folder, 'MR_small_jpeg_ls_lossless.dcm')


def list_of_cases(folder):
    from running.data_folder import fold_list, read_cases

    path = fold_list(folder, 'testing', 0)
    path.parent.mkdir()
    fold_list(folder, 'training', 0).touch()
    path.write_text(''.join(f'{i} images/{i:04d}.npy labels/{i:04d}.npy\n' for i in range(5)))
    return path, lambda path: read_cases(folder, 'testing', 0)


def list_of_slices(folder):
    from Data import read_slices

    path = folder / 'training_X.txt'
    path.write_text(
        ''.join(f'0 {i} images_X/a/{i}.npy labels_X/a/{i}.npy {i - 9.25} 2 0 1 1 1 0 0 0 0 0\n' for i in range(5))
    )
    return path, read_slices


def npy(folder):
    from running.files import load_array

    np.save(folder / 'a.npy', np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    return folder / 'a.npy', load_array


def npz(folder):
    from running.files import read_volume, save_volume

    save_volume(folder / 'a.npz', np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    return folder / 'a.npz', lambda path: read_volume(path, (2, 3, 4))


def nifti(folder):
    from raw_scans import write_nifti

    from scans.nifti import open_nifti

    write_nifti(folder / 'a.nii', np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    return folder / 'a.nii', lambda path: open_nifti(path, lambda note: None).image(lambda note: None)


def nifti_gz(folder):
    from raw_scans import write_nifti

    from scans.nifti import open_nifti

    write_nifti(folder / 'a.nii.gz', np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    return folder / 'a.nii.gz', lambda path: open_nifti(path).label()


def geometry(folder):
    from scans.geometry import Geometry, load_geometry, save_geometry

    save_geometry(folder / 'a.json', Geometry(np.diag([1.5, 2, 3, 1]), 'position', 'a', 'NIfTI'))
    return folder / 'a.json', load_geometry


def settings(folder):
    from running.results import read_settings

    (folder / 'run.json').write_text(json.dumps({'window': [-100, 240], 'snapshots': ['0a'], 'cases': [[['a', 'b']]]}))
    return folder / 'run.json', read_settings


def weights(folder, legacy=False):
    import torch

    from running.weights import load_weights

    state = {f'layer{i}.weight': torch.arange(6.0).reshape(2, 3) for i in range(3)}
    torch.save(state, folder / 'a.pkl', _use_new_zipfile_serialization=not legacy)
    return folder / 'a.pkl', load_weights


def weights_legacy(folder):
    return weights(folder, legacy=True)


READERS = [dicom, dicom_rle, dicom_enhanced, dicom_jpeg_2000, dicom_jpeg_ls, list_of_cases, list_of_slices, npy, npz, nifti,
           nifti_gz, geometry, settings, weights, weights_legacy]  # fmt: skip


# --- the run -------------------------------------------------------------------------------------------------------


def mutated(content, rng):
    """The bytes, changed in one to four places."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice([1, 1, 2, 4, 8, 40]))
        content[at:end] = rng.choice([
            b'', bytes(rng.randrange(256) for _ in range(end - at)), rng.choice(NUMBERS), content[at:end] * 2,
            content[(start := rng.randrange(len(content) + 1)) : start + end - at],
        ])  # fmt: skip
        if rng.random() < 0.05:
            del content[at:]
    return bytes(content)


def give_up(*_):
    raise Hang


def main():
    name, folder, seconds, seed = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    path, read = {reader.__name__: reader for reader in READERS}[name](folder)
    valid = path.read_bytes()
    read(path)
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, give_up)
    seed, _, only = seed.partition(':')
    number, refused, end = int(only or 0), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        content = mutated(valid, random.Random(f'{seed}:{number}'))
        path.write_bytes(content)
        signal.alarm(10)
        try:
            read(path)
        except (ValueError, OSError):
            refused += 1
        except BaseException:
            print(f'{name} {seed}:{number}: {base64.b64encode(content).decode()}')
            raise
        finally:
            signal.alarm(0)
        if only:
            break
        number += 1
    print(f'{number} inputs, {refused} refused')


if __name__ == '__main__':
    main()
