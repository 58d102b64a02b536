"""The C parts: each is one file `ROOM/_NAME.c` beside its Python user, becoming the module `ROOM._NAME`.

Everything else is in pyproject.toml. They use CPython's stable ABI, so one build serves every Python from 3.11 on, and
they are optional: without a compiler the Python form beside them does the work.
"""

from pathlib import Path

from setuptools import Extension, setup

ROOMS = ("agent", "core", "datastore", "fusefs", "hypervisor", "pxar", "repository", "server")
HERE = Path(__file__).parent

setup(
    ext_modules=[
        Extension(
            f"{room}.{source.stem}",
            sources=[f"{room}/{source.name}"],
            define_macros=[("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=["-O3", "-g0", "-Wall"],
            py_limited_api=True,
            optional=True,
        )
        for room in ROOMS
        for source in sorted((HERE / room).glob("_*.c"))
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
