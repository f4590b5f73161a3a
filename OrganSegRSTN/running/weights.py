"""running.weights."""

import os
import pickle
import pickletools
import zipfile

import torch

from running.files import open_file, quoted


def load_weights(path):
    """The state dict in a file of any PyTorch since 0.4, on the CPU, without a `module.` prefix; runs no code of it."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=check_weights(path) or None)
    except FileNotFoundError:
        raise missing_weights(path) from None
    except (pickle.UnpicklingError, ForeignCall) as error:
        reason = str(error).split('\n')[0]
        raise ValueError(f'{path}: refused, since it is not plain weights or is broken ({reason})') from None
    except PermissionError:
        raise
    except Exception as error:  # a truncated file fails in any of a dozen ways, some without a message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'{path}: not a readable snapshot ({reason}); download or train it again') from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.ndim and v.numel() for k, v in state.items()
    ):
        raise ValueError(f'{path}: not a state dict of tensors')
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > os.path.getsize(path):
        raise ValueError(f'{path}: refused, its tensors claim more numbers than the file holds')
    for key in [key for key in state if key.startswith('module.')]:
        state[key.removeprefix('module.')] = state.pop(key)
    return state


def missing_weights(path):
    """The error to raise where a snapshot or other weights are not there."""
    return FileNotFoundError(
        f'{path}: no such weights; train them first, or look whether fold, plane, organ, rates, margin and timestamp '
        'are those of the training'
    )


def check_shapes(path, state, expected):
    """ValueError where `state` lacks a key of `expected`, or holds it in another shape."""
    wrong = next((key for key in expected if key not in state or state[key].shape != expected[key].shape), None)
    if wrong is not None:
        found = tuple(state[wrong].shape) if wrong in state else 'missing'
        raise ValueError(f'{path}: {wrong} is {found}, expected {tuple(expected[wrong].shape)}')


def trained_on(weights):
    """{'organ_ID': ..., 'cases': [image file, ...]} that pretrain.py tells with its weights; {} with others."""
    metadata = getattr(weights, '_metadata', None)
    told = metadata.get('trained_on') if isinstance(metadata, dict) else None
    cases = told.get('cases') if isinstance(told, dict) else None
    return told if isinstance(cases, list) and all(isinstance(case, str) for case in cases) else {}


PLAIN = {'collections OrderedDict'} | {
    f'torch._utils {name}' for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter')
} | {
    f'{module} {kind}Storage'
    for module in ('torch', 'torch.cuda')
    for kind in ('Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char', 'Byte', 'Bool')
}  # fmt: skip


class ForeignCall(Exception):
    """A pickle calls what no plain weights need."""


def check_weights(path):
    """Refuse a file of weights that would call anything but what tensors are made of, or that claims sizes beyond its own.

    Nor may a bit of it have changed, where it is a zip archive; the legacy format holds no checksum.
    torch.load(weights_only=True) still takes bytearray(10**12), and packed entries of any size. -> whether it is a zip
    archive, told by its first bytes as torch does, or legacy
    """
    with open_file(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(4)
        file.seek(0)
        if start != b'PK\3\4':
            for _ in range(3):  # magic number, version, sizes of types
                check_pickle(file, None)
            check_pickle(file, size)
            return False
        with zipfile.ZipFile(file) as archive:
            for entry in plain_entries(archive, size):
                if entry.filename.endswith('.pkl'):
                    with archive.open(entry) as pickled:
                        check_pickle(pickled, size)
    check_archive(path)
    return True


def check_archive(path):
    """Refuse a zip archive that torch has written where an entry is not what its checksum (CRC-32) says.

    0.2 s for a snapshot of 1 GB in the page cache, read a piece at a time; torch itself looks at no checksum.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        plain_entries(archive, os.fstat(file.fileno()).st_size)
        if broken := archive.testzip():
            raise ValueError(
                f'its entry {quoted(broken)} is not what its checksum says: it has changed since it was saved'
            )


def plain_entries(archive, size):
    """The entries of a zip archive of `size` bytes; ValueError where they are packed, or claim more."""
    entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError('its entries claim more bytes than the file holds')
    return entries


def check_pickle(file, size):
    """Read one pickle, without carrying it out: ForeignCall names a call that plain weights do not need; ValueError
    a number above `size`, the bytes of the file, which cannot be that of a tensor in it.
    """
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ('GLOBAL', 'INST') and argument not in PLAIN:
            raise ForeignCall(f'it calls {argument.replace(" ", ".")}')
        if operation.name in ('STACK_GLOBAL', 'EXT1', 'EXT2', 'EXT4'):
            raise ForeignCall('it calls what is not plain weights')
        if size is not None and isinstance(argument, int) and argument > size:
            raise ValueError(f'it claims {argument} of something, more than the {size} bytes of the file')
