"""The positional arguments of every stage script, each spelled once, and the way a script starts and fails.

A stage lists the names it takes, in order; the published order and meaning of all of them are in README.md.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback


class Terminated(KeyboardInterrupt):
    """SIGTERM, answered like Ctrl-C but for the exit code."""


class _Signals:
    """Ctrl-C and SIGTERM as exceptions; while `hold` is set the first of them is put off."""

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
    """The first Ctrl-C or SIGTERM waits until the end of the block, which may ask for the exception that waits."""
    _Signals.hold = True
    try:
        yield lambda: _Signals.waiting
    finally:
        _Signals.hold, waiting, _Signals.waiting = False, _Signals.waiting, None
    if waiting:
        raise waiting


def report_to_torchrun(message):
    """Where torchrun started this process: let its own report, which follows, end with the message as the cause."""
    if file := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        with contextlib.suppress(OSError), open(file, 'w') as report:
            json.dump({'message': message, 'timestamp': int(time.time())}, report)


def foreseeable(error):
    """Whether an error is the user's or the machine's, and its message what the user needs."""
    if isinstance(error, RuntimeError):  # torch's, without memory
        return any(text in str(error) for text in ('out of memory', "can't allocate memory"))
    return isinstance(error, (ValueError, OSError, MemoryError))


def run(main):
    """Run a script: a user's mistake ends it with one line and exit code 1, Ctrl-C with 130, SIGTERM with 143.

    RSTN_TRACEBACK=1 in the environment shows where the mistake was noticed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background shells have it
            signal.signal(number, _Signals.answer)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a name that the terminal cannot show stops nothing
            stream.reconfigure(errors='backslashreplace')
    try:
        status = main()
    except (KeyboardInterrupt, Exception) as error:
        # numpy may make a TypeError of the exception that a signal raises while it reads a file
        if signalled := _Signals.raised or (isinstance(error, KeyboardInterrupt) and type(error)):
            sys.exit(143 if signalled is Terminated else 130)
        if not foreseeable(error):
            raise
        if os.environ.get('RSTN_TRACEBACK'):
            traceback.print_exc()
        sys.stdout.flush()
        message = ' '.join(str(error).split()) or type(error).__name__
        message = f'{os.path.basename(sys.argv[0])}: error: {message}'
        report_to_torchrun(message)
        sys.exit(message)
    sys.exit(status)
