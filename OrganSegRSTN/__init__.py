"""OrganSegRSTN from Python: `from OrganSegRSTN import segment`, in a checkout or after `pip install .`.

The scripts in this folder import each other's rooms by short names, such as `utils` and `model`. They
are imported here as OrganSegRSTN.utils and so on, beside modules of these names that are yours.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_OURS = {path.stem for path in _HERE.iterdir()}


def _import_apart():
    """Import the rooms of this folder; leave the search path, modules of the same names and sys.excepthook as they were."""
    yours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] in _OURS}
    sys.path.insert(0, str(_HERE))
    hook = sys.excepthook
    try:
        from volumes.segmenting import Networks, segment
    finally:
        sys.path.remove(str(_HERE))
        sys.excepthook = hook  # a script has its own
        for name in [name for name in sys.modules if name.partition('.')[0] in _OURS]:
            sys.modules[f'{__name__}.{name}'] = sys.modules.pop(name)
        sys.modules.update(yours)
    return Networks, segment


Networks, segment = _import_apart()
