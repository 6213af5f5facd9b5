"""Builds the kernels beside the package; where there is no C++ compiler, goes on without them.

Everything else about the package stands in pyproject.toml.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = "src/moefit/quant/csrc"
COMPILERS = 4  # at once at most: each takes up to half a GiB


class BuildKernels(build_ext):
    """A plain shared library, loaded with ctypes: no Python or torch headers are needed."""

    def build_extensions(self):
        """Compile several files at a time; setuptools compiles one after the other."""
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources, **settings):
            with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
                made = pool.map(lambda source: compile_in_turn([source], **settings), sources)
                return list(chain.from_iterable(made))

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext):
        """Build; say so if it could not be. What failed is optional, and missing from then on."""
        try:
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001 - whatever a compiler may do
            self.warn(
                f"the kernels were not built ({error}); moefit computes in torch then, more slowly."
                " Install a C++ compiler (Debian: g++) and install moefit again to have them"
            )

    def get_export_symbols(self, ext):
        """No module initialiser to export."""
        return ext.export_symbols


setup(
    ext_modules=[
        Extension(
            "moefit.quant._kernels",
            sources=sorted(glob(f"{CSRC}/**/*.cpp", recursive=True)),
            depends=sorted(
                file for end in ("h", "inc") for file in glob(f"{CSRC}/**/*.{end}", recursive=True)
            ),
            # Every level is compiled and one is chosen at run time: no flag names a processor.
            # OpenMP is compiled for, but not linked: torch's own runtime serves (csrc/experts.cpp).
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-std=c++17",
                "-fopenmp",
                "-fvisibility=default",
                "-Wno-psabi",
            ],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for this Python and newer
)
