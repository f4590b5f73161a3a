"""What a file claims to hold, held against its size before memory is taken for it; and small text, read within bounds.

Volumes, lists and snapshots come from strangers, and a header of some bytes can ask for all the memory there is. What is
not as it should be is a ValueError that says why; whoever reads the file adds its name.
"""

import io
import json
import math
import os
import pickletools
import stat
import zipfile

import numpy as np

MOST_VOXELS = 2**31  # a header that claims more is taken for broken
MOST_JSON = 1 << 26  # bytes; a report's summary of hundreds of cases has some MB
LONGEST_LINE = 1 << 16  # characters; a slice with 255 organs takes a quarter of it
NPY_HEADER = 1 << 14  # bytes; numpy itself refuses a longer one


def open_file(path):
    """Open a file for its bytes; a folder, a pipe or a device, which may never end, is refused."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('it is not a regular file')
    return open(path, 'rb')


# --- arrays --------------------------------------------------------------------------------------------------------


def npy_claim(file):
    """(shape, dtype, bytes of header and array) that the .npy header at the start of a file claims."""
    head = io.BytesIO(file.read(NPY_HEADER))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f'of .npy version {version}, which no array of numbers needs')
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, kind = read(head)
    except Exception as error:  # numpy parses it as Python, and meets what is none with whatever that raises
        raise ValueError(f'its header cannot be read: {error}') from None
    if kind.kind not in 'biuf':
        raise ValueError(f'it holds {kind}, not numbers')
    if min(shape, default=0) < 0 or math.prod(shape) > MOST_VOXELS:
        raise ValueError(f'its header claims the shape {shape}, which no scan has')
    return shape, kind, head.tell() + math.prod(shape) * kind.itemsize


def check_npy(file):
    """Refuse an open .npy file that is shorter than its header claims."""
    shape, kind, size = npy_claim(file)
    file.seek(0)
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError(f'its header claims {shape} of {kind}, more than the file holds; is it truncated?')


def check_entry(archive, entry, shape=None):
    """Refuse an array in a zip archive that is of another shape, or unpacks to more or less than its header claims."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError('compressed in a way that numpy does not use')
    with archive.open(entry) as file:
        claimed, _, size = npy_claim(file)
    if shape is not None and claimed != tuple(shape):
        raise ValueError(f'shape {claimed} instead of {tuple(shape)}')
    if entry.file_size != size:
        raise ValueError(f'it unpacks to {entry.file_size} bytes, where its header claims {size}')


# --- weights -------------------------------------------------------------------------------------------------------

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
                f'its entry {shown(broken)} is not what its checksum says: it has changed since it was saved'
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


# --- text ----------------------------------------------------------------------------------------------------------


def read_lines(path):
    """The lines of a text file."""
    lines = []
    with open_file(path) as file, io.TextIOWrapper(file, encoding='utf-8') as text:
        while line := text.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE or '\0' in line:
                raise ValueError(f'line {len(lines) + 1} is not text, or longer than any list has')
            if not line.endswith('\n'):
                raise ValueError(f'cut off within line {len(lines) + 1}')
            lines.append(line.rstrip('\n'))
    return lines


def read_json(path):
    """The object (dict) in a JSON file."""
    with open_file(path) as file:
        content = file.read(MOST_JSON)
    if len(content) == MOST_JSON:
        raise ValueError(f'more than {MOST_JSON} bytes')
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError('nested too deeply') from None
    if not isinstance(found, dict):
        raise ValueError('not an object in braces')
    return found


def shown(text):
    """A text for an error line: as Python writes it, and not longer than can be read."""
    return repr(text) if len(text) <= 80 else f'{text[:80]!r} ... ({len(text)} characters)'
