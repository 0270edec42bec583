"""What ``import pyksm`` and ``pyksm --help`` cost, against a bare interpreter in the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUNDS = 21
IMPORT_SECONDS = 0.010
HELP_SECONDS = 0.120
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}

CASES = {
    "bare": ["-c", "pass"],
    "import": ["-c", "import pyksm"],
    "help": ["-m", "pyksm", "--help"],
}


def start(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=ENV, stdout=subprocess.DEVNULL, check=True, timeout=60
    )
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """Return the shortest time of each case, the rounds interleaved.

    Other processes can only lengthen a start, and a start is too short to average that out.
    """
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(ROUNDS):
        names = list(CASES)
        for name in names[turn % 3 :] + names[: turn % 3]:  # each follows each: caches differ
            times[name].append(start(CASES[name]))
    return {name: min(taken) for name, taken in times.items()}


def test_import(benchmark, seconds: dict[str, float]) -> None:
    benchmark.extra_info |= seconds
    benchmark.pedantic(start, (CASES["import"],), rounds=3)
    if benchmark.enabled:
        assert seconds["import"] - seconds["bare"] <= IMPORT_SECONDS


def test_help(benchmark, seconds: dict[str, float]) -> None:
    benchmark.extra_info |= seconds
    benchmark.pedantic(start, (CASES["help"],), rounds=3)
    if benchmark.enabled:
        assert seconds["help"] <= HELP_SECONDS
