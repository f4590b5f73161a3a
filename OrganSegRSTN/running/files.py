"""running.files."""

import contextlib
import errno
import fcntl
import functools
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

LEFTOVERS = '.*.[0-9]*.part'  # what a killed run leaves half-written: .NAME.PROCESS.part


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """Open a file that appears under its name only when it is complete: written beside it, flushed, renamed."""
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
        with contextlib.suppress(OSError):  # of a disk that cannot be written to; the block's own error tells
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_naming(path, part=None):
    """Let an OSError of the block that names no file, or `part`, name `path`: also one that a library hides behind its own.

    numpy and torch answer a full disk with a ValueError or RuntimeError about the archive that they could not close.
    """
    try:
        yield
    except Exception as error:
        behind = error
        while behind and not (isinstance(behind, OSError) and behind.errno and behind.filename in (None, str(part))):
            behind = behind.__context__
        if behind is None:
            raise
        raise OSError(behind.errno, behind.strerror, str(path)) from None


@contextlib.contextmanager
def locked(path, *parts):
    """Hold the lock file `path` for the block; ValueError names the process that holds it already.

    What a killed run left half-written is removed: files and folders that the patterns `parts` find beside the lock.
    The kernel frees the lock however the process ends. On a file system without locks nothing is held, or removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    if lock is None:
        _warn_unlocked()
        yield
        return
    try:
        with errors_naming(path):
            os.truncate(lock.fileno(), 0)
            os.write(
                lock.fileno(),
                f'process {os.getpid()} on {socket.gethostname()} ({os.path.basename(sys.argv[0])})'.encode(),
            )
        for pattern in parts:
            for part in list(path.parent.glob(pattern)):
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        lock.close()


def _lock(path):
    """The open file `path`, locked; None where its file system has no locks; ValueError names who has locked it."""
    while True:
        lock = open(path, 'a+')  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or 'another process'
            lock.close()
            raise ValueError(f'{path.parent}: in use by {holder}; wait until it is done, or end it') from None
        except OSError as error:
            lock.close()
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            path.unlink(missing_ok=True)
            return None
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
        lock.close()  # its last holder has removed it since


@functools.cache
def _warn_unlocked():
    print('this file system has no locks: that no two runs write into one folder is up to you', flush=True)


def load_array(path):
    """The array of a .npy file; ValueError names a file that is no whole array of numbers."""
    try:
        with open_file(path) as file:
            check_npy(file)
            return np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (ValueError, EOFError, RecursionError) as error:
        raise ValueError(f'{path}: not a readable .npy array ({error}); make it again') from None


def write_array(file, array):
    """Write a .npy into an open file through its own `write`: numpy's short cut does not tell a full disk's error."""
    np.save(SimpleNamespace(write=file.write), array)


def save_volume(path, volume):
    """Write a prediction as a compressed .npz with the one array `volume`."""
    with atomic_write(path) as file:
        np.savez_compressed(file, volume=volume)


def read_volume(path, shape=None):
    """The array `volume` of a prediction's .npz, of `shape` where that is known; ValueError names what is no whole one."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            entry = archive.getinfo('volume.npy')
            check_entry(archive, entry, shape)
            with archive.open(entry) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such volume') from None
    except Exception as error:  # zlib, zip and numpy each have their own errors for a broken file
        why = str(error) or type(error).__name__
        raise ValueError(f'{path}: not a whole .npz of a prediction ({why})') from None


def load_volume(path, shape):
    """The array `volume` (of `shape`) of a prediction's .npz; None where there is none, or (said in a line) a broken one."""
    try:
        return read_volume(path, shape)
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f'{error}; made again where it can be')
        return None


MOST_VOXELS = 2**31  # a header that claims more is taken for broken


MOST_JSON = 1 << 26  # bytes; a report's summary of hundreds of cases has some MB


LONGEST_LINE = 1 << 16  # characters; a slice with 255 organs takes a quarter of it


NPY_HEADER = 1 << 14  # bytes; numpy itself refuses a longer one


def open_file(path):
    """Open a file for its bytes; a folder, a pipe or a device, which may never end, is refused."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('it is not a regular file')
    return open(path, 'rb')


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


def quoted(text):
    """A text for an error line: as Python writes it, and not longer than can be read."""
    return repr(text) if len(text) <= 80 else f'{text[:80]!r} ... ({len(text)} characters)'
