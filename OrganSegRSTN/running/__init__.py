"""What surrounds every stage: arguments, files, the data folder, results, checkpoints, processes."""

import os
import sys


def _name_missing_package(kind, error, traceback):
    """End a script with one line if a package is missing; each script imports this room first.

    RSTN_TRACEBACK=1 in the environment prints the traceback instead.
    """
    if not issubclass(kind, ModuleNotFoundError) or os.environ.get('RSTN_TRACEBACK'):
        sys.__excepthook__(kind, error, traceback)
        return
    name, requirements = os.path.basename(sys.argv[0]), os.path.join(__file__, '../../../requirements.txt')
    print(f'{name}: error: {error}; install it: {sys.executable} -m pip install -r {os.path.normpath(requirements)!r}',
          file=sys.stderr)  # fmt: skip


sys.excepthook = _name_missing_package
