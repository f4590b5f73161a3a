"""Build the C++ module `fast_functions`: SWIG writes the wrapper, a C++17 compiler (gcc or clang) does the rest.

Usage: pip install ./SWIG_fast_functions

Or by hand, as for the published code: swig -python -c++ fast_functions.i writes fast_functions.py, which
imports _fast_functions; python setup.py build_ext --inplace builds that one here.
"""

import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BY_HAND = '--inplace' in sys.argv


class BuildWithSwig(build_ext):
    """build_ext with the wrapper written into the build folder, not among the sources."""

    def swig_sources(self, sources: list[str], extension: Extension) -> list[str]:
        """Replace the interface file by the wrapper that SWIG makes of it."""
        wrapper = Path(self.build_temp, 'fast_functions_wrap.cc')
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        interface = [source for source in sources if source.endswith('.i')]
        proxy = [] if BY_HAND else ['-noproxy']
        self.spawn([self.find_swig(), '-c++', '-python', *proxy, '-o', str(wrapper), *interface])
        return [str(wrapper), *(source for source in sources if source not in interface)]


module = Extension(
    '_fast_functions' if BY_HAND else 'fast_functions',
    sources=['fast_functions.i', 'fast_functions.cc'],
    depends=['fast_functions.h'],
    include_dirs=['.'],
    extra_compile_args=['-std=c++17', '-O3', '-g0', '-pthread'],
    extra_link_args=['-pthread'],
)

with tempfile.TemporaryDirectory() as scratch:  # nothing is left beside the sources
    setup(
        ext_modules=[module],
        py_modules=[],
        cmdclass={'build_ext': BuildWithSwig},
        options={'build': {'build_base': scratch}, 'egg_info': {'egg_base': scratch}},
    )
