"""Files that are whole or absent, locks, and arrays and text whose headers are checked before memory is allocated."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import shutil
import socket
import stat
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

LEFTOVERS = '.*.[0-9]*.part'  # .NAME.PROCESS.part, as a killed run leaves it
MOST_VOXELS = 2**31  # a header that asks for more is damaged
MOST_JSON = 1 << 26  # bytes; the summary of a report on hundreds of cases has some MB
LONGEST_LINE = 1 << 16  # characters; a list line with 255 organs takes a quarter of it
NPY_HEADER = 1 << 14  # bytes; numpy refuses a longer one
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


# --- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """Open a file that gets its name only when it is complete: write beside it, flush, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name[:200]}.{os.getpid()}.part')
    try:
        with errors_naming(path, part), open(part, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # the block's own error names the cause
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_naming(path, part=None):
    """Raise an OSError of the block that names no file, or `part`, with the name `path`.

    This includes errors that a library re-raises as its own: numpy and torch report a full disk as
    a ValueError or RuntimeError about the archive that they could not close.
    """
    try:
        yield
    except Exception as error:
        cause = error
        while cause and not (isinstance(cause, OSError) and cause.errno and cause.filename in (None, str(part))):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def write_array(file, array):
    """Write a .npy to an open file by its own `write`: numpy's shortcut hides the error of a full disk."""
    np.save(SimpleNamespace(write=file.write), array)


def write_json(path, content, nulls=False):
    """Write an object as JSON; `nulls`: write nan and infinite numbers as null, as JSON demands."""
    with atomic_write(path, 'w') as file:
        json.dump(_finite(content) if nulls else content, file, indent=1)


def _finite(value):
    """Return a value for JSON with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_volume(path, volume):
    """Write a prediction as a compressed .npz with the one array `volume`."""
    with atomic_write(path) as file:
        np.savez_compressed(file, volume=volume)


# --- locks ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path, *leftovers):
    """Hold the lock file `path` during the block; raise ValueError that names the process that holds it.

    Remove what a killed run left half-written: files and folders beside the lock that match
    `leftovers`. The kernel frees the lock however the process ends. On a file system without locks,
    print a line, lock and remove nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if lock is None:
        print(f'{path.parent}: this file system has no locks; let no other run write there', flush=True)
        yield
        return
    with lock:
        try:
            with errors_naming(path):
                holder = f'process {os.getpid()} on {socket.gethostname()} ({os.path.basename(sys.argv[0])})'
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), holder.encode())
            remove_leftovers(path.parent, leftovers)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _lock(path):
    """Return the open file `path`, locked; None where its file system has no locks."""
    lock = open(path, 'a+', encoding='utf-8')  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with lock:
            lock.seek(0)
            holder = lock.read().strip() or 'another process'
        raise ValueError(f'{path.parent}: in use by {holder}; wait until it is done, or end it') from None
    except OSError as error:
        lock.close()
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        return None
    if os.fstat(lock.fileno()).st_nlink:
        return lock
    lock.close()  # its last holder has removed it since
    return _lock(path)


def remove_leftovers(folder, patterns):
    """Remove the files and folders of a folder that match one of these patterns."""
    for pattern in patterns:
        for part in list(folder.glob(pattern)):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


# --- arrays --------------------------------------------------------------------------------------------------------


def open_file(path):
    """Open a file for its bytes; refuse a folder, and a pipe or device, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('it is not a regular file')
    return open(path, 'rb')


def load_array(path):
    """Return the array of a .npy file; raise ValueError where it is not a whole array of numbers."""
    with _whole_array(path) as (file, _):
        return np.load(file, allow_pickle=False)


def array_shape(path):
    """Return the shape of the array of a .npy file; raise ValueError as load_array."""
    with _whole_array(path) as (_, shape):
        return shape


@contextlib.contextmanager
def _whole_array(path):
    """Open a .npy file, whose size is that of its header, for the block: (file, shape)."""
    try:
        with open_file(path) as file:
            shape, kind, size = npy_header(file)
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError(f'its header asks for {shape} of {kind}, more than the file holds: it is truncated')
            file.seek(0)
            yield file, shape
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (ValueError, EOFError, RecursionError) as error:
        raise ValueError(f'{path}: not a readable .npy array ({error}); make it again') from None


def read_volume(path, shape=None):
    """Return the array `volume` of a prediction's .npz; raise ValueError where it is damaged or not of `shape`."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            entry = archive.getinfo('volume.npy')
            check_entry(archive, entry, shape)
            with archive.open(entry) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such volume') from None
    except Exception as error:  # zlib, zipfile and numpy each have their own errors for a damaged file
        reason = str(error) or type(error).__name__
        raise ValueError(f'{path}: not a whole .npz of a prediction ({reason})') from None


def load_volume(path, shape):
    """Return the array `volume` (of `shape`) of a prediction; None where it is missing or, with a line, damaged."""
    try:
        return read_volume(path, shape)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f'{error}; it will be made again if possible')
        return None


def npy_header(file):
    """Return (shape, dtype, bytes of header and array) by the .npy header at the start of an open file."""
    head = io.BytesIO(file.read(NPY_HEADER))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f'its .npy version {version} is not for arrays of numbers')
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, kind = read(head)
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise ValueError(f'its header cannot be read: {error}') from None
    if kind.kind not in 'biuf':
        raise ValueError(f'it holds {kind}, not numbers')
    if min(shape, default=0) < 0 or math.prod(shape) > MOST_VOXELS:
        raise ValueError(f'its header asks for the shape {shape}, which no scan has')
    return shape, kind, head.tell() + math.prod(shape) * kind.itemsize


def check_entry(archive, entry, shape=None):
    """Refuse an array in a zip archive that is not of `shape`, or whose size is not what its header asks for."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError('it is compressed in a way that numpy does not use')
    with archive.open(entry) as file:
        stored, _, size = npy_header(file)
    if shape is not None and stored != tuple(shape):
        raise ValueError(f'shape {stored} instead of {tuple(shape)}')
    if entry.file_size != size:
        raise ValueError(f'it unpacks to {entry.file_size} bytes, but its header asks for {size}')


# --- text ----------------------------------------------------------------------------------------------------------


def read_lines(path):
    """Return the lines of a text file that are not blank; a byte order mark is dropped."""
    lines = []
    with open_file(path) as file, io.TextIOWrapper(file, encoding='utf-8-sig') as text:
        while line := text.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE or '\0' in line:
                raise ValueError(f'line {len(lines) + 1} is not text, or longer than a list line can be')
            if line.strip():
                lines.append(line.rstrip('\r\n'))
    return lines


def read_json(path):
    """Return the object (dict) in a JSON file."""
    with open_file(path) as file:
        content = file.read(MOST_JSON)
    if len(content) == MOST_JSON:
        raise ValueError(f'it has more than {MOST_JSON} bytes')
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    if not isinstance(found, dict):
        raise ValueError('it is not an object in braces')
    return found


def quoted(text):
    """Return a text for an error line: as Python writes it, shortened to what can be read."""
    return repr(text) if len(text) <= 80 else f'{text[:80]!r} ... ({len(text)} characters)'
