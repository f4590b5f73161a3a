"""Reading snapshots and other weights from strangers: a pickle that would run code, or ask for more memory than its
file explains, is refused before torch loads it."""

import os
import pickle
import pickletools
import zipfile

import torch

from running.data_folder import print_once
from running.files import open_file, quoted

PLAIN = {'collections OrderedDict'} | {
    f'torch._utils {name}' for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter')
} | {
    f'{module} {kind}Storage'
    for module in ('torch', 'torch.cuda')
    for kind in ('Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char', 'Byte', 'Bool')
}  # fmt: skip


class ForeignCall(Exception):
    """A pickle calls something that plain weights do not need."""


def load_weights(path):
    """Return the state dict in a file of PyTorch 0.4 or newer, on the CPU, without a `module.` prefix.

    Raise ValueError where the file is damaged, not plain weights, or would run code.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=check_weights(path) or None)
    except FileNotFoundError:
        raise missing_weights(path) from None
    except (pickle.UnpicklingError, ForeignCall) as error:
        reason = str(error).split('\n')[0]
        raise ValueError(f'{path}: refused: it is damaged or not plain weights ({reason})') from None
    except PermissionError:
        raise
    except Exception as error:  # a truncated file fails in many ways, some without a message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'{path}: not a readable snapshot ({reason}); download or train it again') from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.ndim and v.numel() for k, v in state.items()
    ):
        raise ValueError(f'{path}: not a state dict of tensors')
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > os.path.getsize(path):
        raise ValueError(f'{path}: refused: its tensors ask for more numbers than the file holds')
    for key in [key for key in state if key.startswith('module.')]:
        state[key.removeprefix('module.')] = state.pop(key)
    if description(state).get('interrupted'):
        print_once(f'warning: {path}: its training was interrupted by Ctrl-C, and not finished since')
    return state


def missing_weights(path):
    """Return the error to raise where a snapshot or other weights do not exist."""
    return FileNotFoundError(
        f'{path}: no such weights; train them first, or check that recipe, fold, plane, organ, rates, margin and '
        'timestamp are those of the training'
    )


def check_shapes(path, state, expected):
    """Raise ValueError where `state` lacks a key of `expected`, or holds it in another shape."""
    wrong = next((key for key in expected if key not in state or state[key].shape != expected[key].shape), None)
    if wrong is not None:
        found = tuple(state[wrong].shape) if wrong in state else 'missing'
        raise ValueError(f'{path}: {wrong} is {found}, expected {tuple(expected[wrong].shape)}')


# --- what weights say of their training ----------------------------------------------------------------------------

FACTS = {
    'organ_ID': int, 'plane': str, 'slice_thickness': int, 'crop_margin': int, 'intensity_window': list, 'cases': list,
    'orientation': str, 'spacing': list, 'place': list, 'recipe': str, 'revision': str, 'interrupted': bool,
}  # fmt: skip
FAR_SPACING = 1.5  # times the voxels of the training


def describe(state, **facts):
    """Store facts of the training (see FACTS) in a state dict; other readers of the file ignore them."""
    state._metadata['OrganSegRSTN'] = facts
    return state


def description(weights):
    """Return the facts of `describe`, those of the right type; {} for weights of others."""
    metadata = getattr(weights, '_metadata', None)
    found = metadata.get('OrganSegRSTN') if isinstance(metadata, dict) else None
    facts = found.items() if isinstance(found, dict) else ()
    facts = {name: value for name, value in facts if name in FACTS and isinstance(value, FACTS[name])}
    parts = {
        'intensity_window': (2, int | float),
        'spacing': (3, int | float),
        'place': (6, int | float),
        'cases': (None, str),
    }
    for name in parts.keys() & facts.keys():
        length, kind = parts[name]
        if length not in (None, len(facts[name])) or not all(isinstance(part, kind) for part in facts[name]):
            del facts[name]
    return facts


def check_facts(path, facts, expected):
    """Raise ValueError where weights were trained with other values than `expected`.

    Warn of another voxel size, and of `cases` (FILE SHA-256) that the training has seen. For published weights,
    which hold no facts, print what is assumed.
    """
    if not facts:
        assumed = ', '.join(f'{name} {value}' for name, value in expected.items() if name != 'cases')
        print(f'{path}: does not say how it was trained; assumes {assumed}')
    for name, value in expected.items():
        if name == 'cases':
            for scan in seen_cases(facts, value):
                print_once(f'warning: {path}: was trained on {scan}, a test case of this fold: its figures say little')
        elif name == 'spacing':
            if doubt := spacing_doubt(value, facts.get(name)):
                print(f'warning: {doubt}')
        elif facts.get(name, value) != value:
            raise ValueError(f'{path}: trained with {name} {facts[name]}, not {value}')


def seen_cases(facts, cases):
    """Return those `cases` (FILE SHA-256) that weights were trained on, by their facts: FILE, or `OTHER, which is FILE`."""
    seen = {digest: file for file, _, digest in (case.rpartition(' ') for case in facts.get('cases', ()))}
    found = [(seen[digest], file) for file, _, digest in (case.rpartition(' ') for case in cases) if digest in seen]
    return [file if trained == file else f'{trained}, which is {file}' for trained, file in found]


def spacing_doubt(ours, trained):
    """Return a sentence where voxels (mm along each axis) are not about as large as in training; else ''."""
    ratios = [max(one / other, other / one) for one, other in zip(ours, trained or ours)]
    if max(ratios) <= FAR_SPACING:
        return ''
    text, usual = (' x '.join(f'{size:.3g}' for size in sizes) for sizes in (ours, trained))
    return f'voxels of {text} mm, but the networks were trained on {usual} mm'


# --- before loading ------------------------------------------------------------------------------------------------


def check_weights(path):
    """Refuse a file of weights that calls anything but tensor constructors, or asks for more than its own size.

    A zip archive is also checked against its checksums; the legacy format has none. torch.load with
    weights_only=True still takes bytearray(10**12), and compressed entries of any size. Return
    whether the file is a zip archive (by its first bytes, as torch does), not legacy.
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
    """Refuse a zip archive of torch in which an entry differs from its checksum (CRC-32), which torch does not check.

    This takes 0.2 s for a snapshot of 1 GB in the page cache.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        plain_entries(archive, os.fstat(file.fileno()).st_size)
        if broken := archive.testzip():
            raise ValueError(f'its entry {quoted(broken)} differs from its checksum: it has changed since it was saved')


def plain_entries(archive, size):
    """Return the entries of a zip archive of `size` bytes; refuse compressed ones, and sizes beyond the file's."""
    entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError('its entries ask for more bytes than the file holds')
    return entries


def check_pickle(file, size):
    """Scan one pickle without executing it.

    Raise ForeignCall where it calls what plain weights do not need; raise ValueError for a number
    above `size`, the bytes of the file: no tensor in it can have so many elements.
    """
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in ('GLOBAL', 'INST') and argument not in PLAIN:
            raise ForeignCall(f'it calls {argument.replace(" ", ".")}')
        if operation.name in ('STACK_GLOBAL', 'EXT1', 'EXT2', 'EXT4'):
            raise ForeignCall('it calls what plain weights do not need')
        if size is not None and isinstance(argument, int) and argument > size:
            raise ValueError(
                f'its header asks for {argument} elements, but the file has {size} bytes: '
                'it is damaged or not a snapshot'
            )
