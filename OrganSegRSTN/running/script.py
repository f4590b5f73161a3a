"""How a script ends: errors in one line, exit codes, signals."""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
import traceback


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, with another exit code."""


class _Signals:
    """Ctrl-C and SIGTERM as exceptions; while `hold` is set the first of them waits."""

    hold = False
    waiting = None
    raised = None

    @classmethod
    def answer(cls, number, _frame):
        error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if not cls.hold or cls.waiting:
            cls.raised = error
            raise error
        cls.waiting = error


@contextlib.contextmanager
def uninterrupted():
    """Delay the first Ctrl-C or SIGTERM to the end of the block; yield a function that returns the waiting exception."""
    _Signals.hold = True
    try:
        yield lambda: _Signals.waiting
    finally:
        _Signals.hold, waiting, _Signals.waiting = False, _Signals.waiting, None
    if waiting:
        raise waiting


def report_to_torchrun(message):
    """Give torchrun, where it started this process, the message that its own report ends with."""
    if file := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        with contextlib.suppress(OSError), open(file, 'w') as report:
            json.dump({'message': message, 'timestamp': int(time.time())}, report)


def foreseeable(error):
    """Return whether an error is the user's or the machine's, so that its message is all that the user needs."""
    return out_of_memory(error) or isinstance(error, (ValueError, OSError, MemoryError))


def out_of_memory(error):
    """Return whether an error is torch's, cuBLAS's or cuDNN's way to say that there is too little memory."""
    signs = ('out of memory', "can't allocate memory", 'STATUS_ALLOC_FAILED', 'ALLOCATION_FAILED')
    if not isinstance(error, RuntimeError):
        return False
    if 'CUBLAS_STATUS_NOT_INITIALIZED' in str(error):  # cuBLAS also says so where it is broken
        return card_memory()[0] < 0.5
    return any(sign in str(error) for sign in signs)


def card_memory():
    """Return (free, total) GiB of the CUDA device in use; infinite where there is none."""
    torch = sys.modules.get('torch')
    with contextlib.suppress(RuntimeError):  # of a device that no longer answers
        if torch and torch.cuda.is_initialized():
            return tuple(size / 2**30 for size in torch.cuda.mem_get_info())
    return math.inf, math.inf


def message_of(error):
    """Return what a user needs of an error, in one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    if out_of_memory(error):
        text = re.split(r'(?<=\w{3})\. (?=If |Including |Process )', text)[0]  # torch goes on with its own variables
        free, total = card_memory()
        if 'allocate' not in text and free < math.inf:
            text += f' ({free:.1f} of {total:.1f} GiB are free)'
        text += '; less is needed with --precision bf16 (PRECISION) or a narrower network (PRETRAINING_WIDTH)'
    return text


def run(main):
    """Run a script: a foreseeable error ends it with one line and exit code 1, Ctrl-C with 130, SIGTERM with 143.

    RSTN_TRACEBACK=1 in the environment prints the traceback, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background shells ignore them
            signal.signal(number, _Signals.answer)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # print names that the terminal's encoding lacks
            stream.reconfigure(errors='backslashreplace')
    try:
        status = main()
    except (KeyboardInterrupt, Exception) as error:
        # numpy can turn the exception of a signal that arrives while it reads a file into a TypeError
        if signalled := _Signals.raised or (isinstance(error, KeyboardInterrupt) and type(error)):
            sys.exit(143 if signalled is Terminated else 130)
        if not foreseeable(error):
            raise
        if os.environ.get('RSTN_TRACEBACK'):
            traceback.print_exc()
        sys.stdout.flush()
        message = f'{os.path.basename(sys.argv[0])}: error: {message_of(error)}'
        report_to_torchrun(message)
        sys.exit(message)
    sys.exit(status)
