"""The compiled extension; everything else about the package is in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

HEADERS = sorted(glob("csrc/*.h"))


def is_stale(made: str, source: str) -> bool:
    """Whether an object file is missing, or older than what it is made from."""
    changed = max(os.path.getmtime(path) for path in (source, *HEADERS, __file__))
    return not os.path.exists(made) or os.path.getmtime(made) < changed


ParallelCompile(needs_recompile=is_stale).install()  # a file a core

setup(
    ext_modules=[
        Pybind11Extension(
            "emocore._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=HEADERS,
            cxx_std=17,
            # No contraction: the kernels say where a product is fused with its sum, so that no result depends
            # on what a compiler chose for one loop or another.
            extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off"],
            libraries=["dl", "pthread"],
        )
    ]
)
