"""The compiled extension; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile().install()  # a file a core

setup(
    ext_modules=[
        Pybind11Extension(
            "emocore._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No contraction: the kernels say where a product is fused with its sum, so that no result depends
            # on what a compiler chose for one loop or another.
            extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=off"],
            libraries=["dl", "pthread"],
        )
    ]
)
