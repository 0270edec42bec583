"""Sphinx: MyST pages, Furo, and docstrings of the installed pyksm."""

import os
from importlib.metadata import version as installed_version

import pyksm

# Sphinx >= 9 would otherwise import a stub in place of the compiled module beside it, and the
# docstrings live in the .pyx.
os.environ["SPHINX_AUTODOC_IGNORE_NATIVE_MODULE_TYPE_STUBS"] = "1"

project = "pyksm"
author = copyright = "the pyksm authors"
version = release = installed_version("pyksm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pyksm {release}"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True

nitpicky = True
# Names that are not ours; no inventory is fetched, so that the docs build without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections\.abc|types|typing|typing_extensions|numpy|np|os|pathlib|enum)\..*"),
    (r"py:.*", r"(asyncio|dataclasses|threading|numpy|np)(\..*)?"),
    (
        r"py:(class|exc|obj|data)",
        r"(int|str|bool|float|bytes|object|tuple|list|dict|set|frozenset|None|Self|Any|Path|Buffer"
        r"|[A-Za-z]*(Error|Exception)|Callable|Iterable|Iterator|Mapping|Sequence|TracebackType"
        r"|Traversable|memoryview|bytearray|type|property)",
    ),
    # What no user names: bases and helpers of the results.
    (r"py:.*", r"pyksm\.(result|settle|marks|frames|smaps|lease)\..*"),
]
# Types that annotations name but __all__ does not; and what docstrings mention before it is built.
PLANNED = "Buffer Host Progress SettleResult allocator copy doctor empty estimate load settle"
nitpick_ignore_regex += [
    (r"py:.*", rf"(pyksm\.)?{name}(\..*)?") for name in PLANNED.split() if name not in pyksm.__all__
]

# numpy.typing's aliases lose their module in annotations; the docstrings say what is taken.
nitpick_ignore_regex += [
    ("py:class", r"(ArrayLike|DTypeLike|NDArray|Order|LikeOrder|Shape|Progress)"),
    ("py:class", r"(.*\.)?(T|CapsuleType)"),
    ("py:mod", "contextvars"),
]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
