"""Build the compiled rooms of pyksm; everything declarative is in pyproject.toml."""

import sys
import sysconfig

from setuptools import Extension, setup

try:
    import numpy
    from Cython.Build import cythonize
except ImportError as error:  # only when built without isolation
    sys.exit(
        f"pyksm's build needs Cython and numpy ({error}). "
        "Run `make build`, or `pip install .` without --no-build-isolation."
    )

# One wheel serves every GIL-ful CPython from 3.11 on (the first stable ABI with buffers);
# free-threaded builds have no stable ABI yet (PEP 803 is for 3.15).
STABLE_ABI = sys.implementation.name == "cpython" and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)
ABI_MACROS = [("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else []


def extension(room, sources=(), depends=(), include_dirs=(), macros=()):
    return Extension(
        f"pyksm.{room}",
        sources=[f"src/pyksm/{room}.pyx", *sources],
        depends=list(depends),
        include_dirs=["src/pyksm", *include_dirs],
        define_macros=[("_GNU_SOURCE", None), *ABI_MACROS, *macros],
        extra_compile_args=["-O2", "-g0", "-Wno-unused-function"],
        py_limited_api=STABLE_ABI,
    )


extensions = [
    extension("_sys"),
    extension("_pages"),
    extension("_buffer"),
    extension(
        "_numpy",
        sources=["src/pyksm/_arena.c"],
        depends=["src/pyksm/_arena.h"],
        include_dirs=[numpy.get_include()],
        macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),
        ],
    ),
]

setup(
    ext_modules=cythonize(
        extensions,
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "auto_pickle": False,
            "autotestdict": False,
            "embedsignature": True,
            "embedsignature.format": "python",
        },
    ),
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
