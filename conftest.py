"""The arrangement for every test of the repository: tests, benchmarks and doctests.

A test marked ``kernel`` (all of ``tests/kernel``, and the doctests that touch memory) runs alone
on this machine, starts with nothing merged and ksmd stopped, and leaves every knob as it found
it. ``PYKSM_KERNEL_TESTS`` unset runs what can run, ``1`` makes a missing prerequisite an error,
``0`` runs none of them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from support import (
    HostLock,
    Ksmd,
    capabilities,
    counter,
    kernel_tests,
    knobs,
    restore_knobs,
    write_knob,
)

ROOT = Path(__file__).parent
PURE = {"errors", "knobs", "result", "undo", "rules"}
"""Modules whose doctests need no kernel."""

LOCK = pytest.StashKey[HostLock]()
LOCK_FAILED = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the kernel by where it is."""
    for item in items:
        in_kernel_folder = ROOT / "tests" / "kernel" in item.path.parents
        doctest = isinstance(item, pytest.DoctestItem) and item.path.stem not in PURE
        if in_kernel_folder or doctest:
            item.add_marker("kernel")


def needs(item: pytest.Item) -> list[str]:
    """Return the capabilities a test asks for by its markers and fixtures."""
    wanted = []
    for marker in item.iter_markers("kernel"):
        wanted += ["ksm", *marker.args]
    fixtures = getattr(item, "fixturenames", ())
    if item.get_closest_marker("root") or "ksmd" in fixtures:
        wanted += ["ksm", "knobs"]
    return list(dict.fromkeys(wanted))


def gate(reason: str) -> None:
    """Skip a test for want of something, or fail it where that was forbidden."""
    if kernel_tests() == "require":
        pytest.fail(f"PYKSM_KERNEL_TESTS=1, but {reason}", pytrace=False)
    pytest.skip(f"{reason} (PYKSM_KERNEL_TESTS=1 makes this an error)")


# Outermost, and so outside the clock of pytest-timeout: waiting for another run is no failure.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold this machine's lock around a kernel test, its fixtures included."""
    wanted = needs(item)
    if not wanted or kernel_tests() == "off" or any(capabilities()[name] for name in wanted):
        return (yield)
    lock = item.config.stash.setdefault(LOCK, HostLock())
    try:
        lock.acquire()
    except TimeoutError as error:
        item.stash[LOCK_FAILED] = str(error)
        return (yield)
    try:
        return (yield)
    finally:
        lock.release()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip (or fail) a kernel test this machine cannot run, before any fixture of it."""
    wanted = needs(item)
    if not wanted:
        return
    if kernel_tests() == "off":
        pytest.skip("PYKSM_KERNEL_TESTS=0: no kernel tests")
    for name in wanted:
        if reason := capabilities()[name]:
            gate(reason)
    if reason := item.stash.get(LOCK_FAILED, ""):
        pytest.fail(reason, pytrace=False)


@pytest.fixture(autouse=True)
def _ksm_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a kernel test a host with nothing merged, and insist that it gives it back so."""
    if not needs(request.node) or capabilities()["knobs"]:
        yield
        return
    _forget_kept_memory()
    before = knobs()
    if before["run"] != "0" and kernel_tests() != "require":
        pytest.skip(
            f"ksmd is in use on this host (run={before['run']}), and the kernel tests would "
            "unmerge everything (PYKSM_KERNEL_TESTS=1 runs them all the same)"
        )
    write_knob("run", 2)
    write_knob("run", 0)
    clean = before | {"run": "0"}
    try:
        yield
        left = {name: value for name, value in knobs().items() if value != clean[name]}
    finally:
        restore_knobs(before)
    if left:
        changes = ", ".join(f"{name}={left[name]} (was {clean[name]})" for name in left)
        pytest.fail(f"the test left knobs changed: {changes}", pytrace=False)


def _forget_kept_memory() -> None:
    """Have this process hold no marked memory of earlier tests, which would merge as well."""
    gc.collect()
    arena = sys.modules.get("pyksm._numpy")
    if arena is not None:
        arena.release_kept()


@pytest.fixture
def host_lock(request: pytest.FixtureRequest) -> HostLock:
    """Give the lock a kernel test runs under, for a child that must not wait for it."""
    return request.config.stash[LOCK]


@pytest.fixture
def ksmd(_ksm_as_it_was: None) -> Iterator[Ksmd]:
    """Run ksmd as fast as it goes; put every knob back, also those the test wrote."""
    before = knobs()
    scanner = Ksmd()
    try:
        scanner.fast()
        yield scanner
    finally:
        restore_knobs(before)


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest) -> None:
    """Give doctests ``pyksm``, ``np`` and ``os``."""
    if isinstance(request.node, pytest.DoctestItem):
        import numpy as np

        import pyksm

        namespace = request.getfixturevalue("doctest_namespace")
        namespace.update(pyksm=pyksm, np=np, os=os)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the integrations whose library is not installed."""
    if collection_path.parent == ROOT / "src" / "pyksm" / "contrib":
        library = collection_path.stem
        if library != "__init__" and importlib.util.find_spec(library) is None:
            return True
    return None


def pytest_report_header() -> str:
    """Say once what this machine lacks."""
    missing = [f"{name}: {reason}" for name, reason in capabilities().items() if reason]
    run = "" if capabilities()["ksm"] else f", run={counter('run')}"
    return f"KSM: {'; '.join(missing) or 'all capabilities'}{run}, kernel tests: {kernel_tests()}"
