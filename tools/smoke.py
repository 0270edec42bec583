"""Use an installed pyksm for a moment: every module imports, memory can be had and marked."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import platform
import sys
import sysconfig

import pyksm

assert "numpy" not in sys.modules, "import pyksm must load no numpy"

for module in pkgutil.iter_modules(pyksm.__path__, "pyksm."):
    if module.name not in ("pyksm.__main__", "pyksm.contrib"):
        importlib.import_module(module.name)

for name in pyksm.__all__:
    getattr(pyksm, name)

if hasattr(pyksm, "Buffer"):
    with pyksm.Buffer(1 << 20) as buffer, memoryview(buffer) as view:
        view[:5] = b"pyksm"

gil = "free-threaded " if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
version = importlib.metadata.version("pyksm")
print(f"pyksm {version} works on {gil}{platform.python_version()} ({sys.executable})")
