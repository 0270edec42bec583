"""What tests and benchmarks share: probes, waiting, child processes, a second smaps reader.

Nothing here imports pyksm, so that a check made with it is a second opinion and not an echo.
Import it as ``from support import wait_until``; the fixtures are in the ``conftest.py`` of the
repository's root.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import inspect
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, TypeVar

T = TypeVar("T")

SYSFS = Path("/sys/kernel/mm/ksm")
LOCK_PATH = Path(tempfile.gettempdir()) / "pyksm-tests.lock"
LOCK_SECONDS = float(os.environ.get("PYKSM_TESTS_LOCK_SECONDS", "900"))

_MADV_MERGEABLE = 12
_PR_GET_MEMORY_MERGE = 68


# --- what this machine can do ------------------------------------------------------------------


def kernel_tests() -> Literal["try", "require", "off"]:
    """Return what ``PYKSM_KERNEL_TESTS`` asks for: unset, ``1`` or ``0``."""
    value = os.environ.get("PYKSM_KERNEL_TESTS", "")
    try:
        return {"": "try", "1": "require", "0": "off"}[value]  # type: ignore[return-value]
    except KeyError:
        raise ValueError(
            f"PYKSM_KERNEL_TESTS={value!r}: leave it unset (run what can run), or say 1 "
            "(a missing prerequisite is an error) or 0 (no kernel tests)"
        ) from None


def _probe_ksm() -> str:
    if not SYSFS.is_dir():
        return f"{SYSFS} does not exist: this kernel was built without CONFIG_KSM"
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel checks the advice before the range, so an empty range is a probe and no change.
    if libc.madvise(None, ctypes.c_size_t(0), _MADV_MERGEABLE):
        return f"madvise(MADV_MERGEABLE) says {os.strerror(ctypes.get_errno())}"
    return ""


def _probe_knobs() -> str:
    try:
        os.close(os.open(SYSFS / "pages_to_scan", os.O_WRONLY))
    except OSError as error:
        return f"{SYSFS} cannot be written ({error.strerror}): run the tests as root"
    return ""


def _probe_prctl() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_GET_MEMORY_MERGE, zero, zero, zero, zero) < 0:
        return "prctl(PR_GET_MEMORY_MERGE) is refused: it came with Linux 6.4"
    return ""


def _probe_ksm_stat() -> str:
    try:
        text = Path("/proc/self/ksm_stat").read_text()
    except OSError as error:
        return f"/proc/self/ksm_stat cannot be read ({error.strerror}): it came with Linux 6.1"
    if "ksm_process_profit" not in text:
        return "/proc/self/ksm_stat does not tell the profit: Linux 6.4 does"
    return ""


def _probe_smaps() -> str:
    if not re.search(r"^KSM:", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE):
        return "/proc/self/smaps_rollup has no KSM line: it came with Linux 6.6"
    return ""


def _probe_pagemap() -> str:
    buffer = ctypes.create_string_buffer(b"present", 8)
    page = ctypes.addressof(buffer) // os.sysconf("SC_PAGESIZE")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(page * 8)
            entry = int.from_bytes(file.read(8), "little")
    except OSError as error:
        return f"/proc/self/pagemap cannot be read ({error.strerror})"
    if not entry & ((1 << 55) - 1):
        return "/proc/self/pagemap hides page numbers: that needs CAP_SYS_ADMIN"
    return ""


_PROBES: dict[str, Callable[[], str]] = {
    "ksm": _probe_ksm,
    "knobs": _probe_knobs,
    "prctl": _probe_prctl,
    "ksm_stat": _probe_ksm_stat,
    "smaps": _probe_smaps,
    "pagemap": _probe_pagemap,
}


@functools.cache
def capabilities() -> dict[str, str]:
    """Return why each capability is missing, in words; an empty string where it is there.

    ``ksm`` (the kernel has it), ``knobs`` (sysfs can be written), ``prctl`` (the whole-process
    switch), ``ksm_stat``, ``smaps`` (its KSM line), ``pagemap`` (page numbers are visible).
    """
    missing = {}
    for name, probe in _PROBES.items():
        try:
            missing[name] = probe()
        except OSError as error:
            missing[name] = f"the probe for {name!r} failed: {error}"
    return missing


# --- the knobs of ksmd -------------------------------------------------------------------------


def read_knob(name: str) -> str:
    """Return one sysfs file as the kernel would take it back (``scan-time``, not its brackets)."""
    text = (SYSFS / name).read_text().strip()
    chosen = re.search(r"\[(.+?)\]", text)
    return chosen[1] if chosen else text


def counter(name: str) -> int:
    """Return one sysfs counter or integer knob."""
    return int(read_knob(name))


def write_knob(name: str, value: object) -> None:
    """Write one sysfs file with a bare system call."""
    descriptor = os.open(SYSFS / name, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, f"{name}={value}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def knobs() -> dict[str, str]:
    """Return every writable knob of this kernel."""
    return {
        path.name: read_knob(path.name)
        for path in sorted(SYSFS.iterdir())
        if path.stat().st_mode & 0o200
    }


def restore_knobs(before: dict[str, str]) -> None:
    """Unmerge everything and put every knob back; ``run`` comes last.

    ``run=2`` first, because the kernel refuses max_page_sharing and merge_across_nodes with EBUSY
    while a page is merged; the advisor before pages_to_scan, because it owns that knob while it
    is on and resets it when it goes.
    """
    write_knob("run", 2)
    if before.get("advisor_mode") == "none" and read_knob("advisor_mode") != "none":
        write_knob("advisor_mode", "none")
    for name, value in before.items():
        if name not in ("run", "advisor_mode") and read_knob(name) != value:
            write_knob(name, value)
    if before.get("advisor_mode") not in (None, "none"):
        write_knob("advisor_mode", before["advisor_mode"])
    write_knob("run", 0)
    if before["run"] != "0":
        write_knob("run", before["run"])


class Ksmd:
    """The kernel's scanner while a test has it to itself; what the ``ksmd`` fixture gives."""

    def set(self, **values: object) -> None:
        """Write knobs; the fixture puts them back after the test."""
        for name, value in values.items():
            write_knob(name, value)

    def fast(self) -> None:
        """Scan as fast as one core goes, every page on every lap."""
        self.set(pages_to_scan=20000, sleep_millisecs=0)
        if (SYSFS / "smart_scan").exists():  # Linux 6.7
            self.set(smart_scan=0)
        self.set(run=1)

    def stop(self) -> None:
        """Stop scanning; what is merged stays merged."""
        self.set(run=0)

    def unmerge_all(self) -> None:
        """Break every shared page of the host and stop."""
        self.set(run=2)
        self.set(run=0)

    def laps(self, count: int = 2, timeout: float = 60.0) -> None:
        """Wait until this many full scans that began after the call have ended."""
        # One more than asked: the lap under way has passed some pages already.
        goal = counter("full_scans") + count + 1
        wait_until(lambda: counter("full_scans") >= goal, timeout, what=f"{count} laps of ksmd")


# --- the lock ----------------------------------------------------------------------------------


class HostLock:
    """One exclusive lock for all test runs of this machine, because ksmd is one per host.

    Used as ``with HostLock().hold():``, also by scripts. Where the process was started under
    ``flock LOCKFILE command`` that lock is taken over instead of waited for.
    """

    def __init__(self, path: Path = LOCK_PATH) -> None:
        """Open (and create) the lock file, or find the descriptor of it that was inherited."""
        self._inherited = _inherited_descriptor(path)
        self.descriptor = _open_lock(path) if self._inherited is None else self._inherited
        self.path = path

    def acquire(self, timeout: float = LOCK_SECONDS) -> None:
        """Take the lock; ``TimeoutError`` says who to look for if it does not come free."""

        def take() -> bool:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            wait_until(take, timeout, what=f"the lock {self.path}", longest=0.5)
        except AssertionError:
            raise TimeoutError(
                f"another run of pyksm's tests has held {self.path} for {timeout:.0f} s; "
                f"`fuser {self.path}` names it"
            ) from None

    def release(self) -> None:
        """Give it back; also where a forked child still has the descriptor open."""
        if self._inherited is None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def hold(self, timeout: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the lock in a ``with`` block."""
        self.acquire(timeout)
        try:
            yield
        finally:
            self.release()


def _open_lock(path: Path) -> int:
    # Without O_CREAT first: in a sticky directory the kernel (fs.protected_regular) refuses
    # O_CREAT on a file that another user made, even to root.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)


def _inherited_descriptor(path: Path) -> int | None:
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return None
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found = os.fstat(int(name))
            if os.path.samestat(found, wanted) and os.get_inheritable(int(name)):
                return int(name)
    return None


# --- waiting -----------------------------------------------------------------------------------


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 30.0,
    *,
    what: str = "",
    longest: float = 0.05,
) -> T:
    """Poll until the predicate is true and return its value; ``AssertionError`` after timeout.

    The sleep between two looks doubles from 1 ms up to ``longest`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {timeout:g} s in vain for {what or predicate}")
        time.sleep(pause)
        pause = min(pause * 2, longest)


# --- memory, seen independently ----------------------------------------------------------------


def anon_pages() -> int:
    """Return the anonymous memory of the whole host in bytes (AnonPages): the physical truth."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("AnonPages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no AnonPages")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """One entry of smaps, read by nothing of pyksm's."""

    start: int
    end: int
    fields: dict[str, str]

    def kb(self, key: str) -> int:
        """Return one figure in kB; 0 where this kernel has no such line."""
        return int(self.fields.get(key, "0").split()[0])

    @property
    def flags(self) -> frozenset[str]:
        """The two-letter words of VmFlags."""
        return frozenset(self.fields["VmFlags"].split())


_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def mappings(pid: int | str = "self") -> list[Mapping]:
    """Return all mappings of a process."""
    found: list[Mapping] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        header = _HEADER.match(line)
        if header:
            found.append(Mapping(start=int(header[1], 16), end=int(header[2], 16), fields={}))
        else:
            key, _, value = line.partition(":")
            found[-1].fields[key] = value.strip()
    return found


def vm_flags(address: int, pid: int | str = "self") -> frozenset[str]:
    """Return the VmFlags (``mg``, ``nh``, ``sh`` ...) of the mapping that holds an address."""
    for mapping in mappings(pid):
        if mapping.start <= address < mapping.end:
            return mapping.flags
    raise AssertionError(f"{address:#x} is in no mapping of {pid}")


def smaps_kb(address: int, key: str, nbytes: int = 1, pid: int | str = "self") -> int:
    """Return a figure of smaps in kB, summed over the whole mappings that a range touches."""
    touched = [m for m in mappings(pid) if m.start < address + nbytes and address < m.end]
    assert touched, f"{address:#x} is in no mapping of {pid}"
    return sum(mapping.kb(key) for mapping in touched)


def rollup_kb(key: str, pid: int | str = "self") -> int:
    """Return a figure of smaps_rollup in kB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    return 0


# --- child processes ---------------------------------------------------------------------------

_PREAMBLE = """\
import sys

def say(*words):
    print(*words, flush=True)

def commands():
    for line in sys.stdin:
        yield line.split()

"""


class Child:
    """A Python process that talks in lines: it says ``ready``, gets a command, says a reply."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        """Wrap a process started with pipes."""
        self.process = process
        self.pid = process.pid
        self._errors = errors
        self._lines: list[str] = []
        self._partial = b""
        self._ended = False

    def send(self, *words: object) -> None:
        """Send one command, its words joined by blanks."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self._story("no longer listens")) from None

    def reply(self, timeout: float = 60.0) -> str:
        """Return the next line the child says."""
        deadline = time.monotonic() + timeout
        while not self._lines:
            if self._ended:
                raise AssertionError(self._story("ended without a reply"))
            self._read_more(max(0.0, deadline - time.monotonic()), timeout)
        return self._lines.pop(0)

    def ask(self, *words: object, timeout: float = 60.0) -> str:
        """Send a command and return the reply."""
        self.send(*words)
        return self.reply(timeout)

    def expect(self, line: str, timeout: float = 60.0) -> None:
        """Take the next line and insist on what it says."""
        said = self.reply(timeout)
        assert said == line, f"child {self.pid} said {said!r}, not {line!r}"

    def finish(self, timeout: float = 60.0) -> int:
        """Close the child's input, wait for its end and return its exit status."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Kill the child and whatever it started in its own session, and reap it."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @property
    def errors(self) -> str:
        """What the child wrote to its standard error so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    def _read_more(self, patience: float, timeout: float) -> None:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(patience):
                raise AssertionError(self._story(f"said nothing for {timeout:g} s"))
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        self._ended = not data
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._lines += [line.decode() for line in lines]

    def _story(self, what: str) -> str:
        return f"child {self.pid} {what} (status {self.process.poll()}):\n{self.errors}"


@contextlib.contextmanager
def spawn(
    source: str | Callable[..., object],
    *args: object,
    env: dict[str, str] | None = None,
    user: int | None = None,
    python: str = sys.executable,
) -> Iterator[Child]:
    """Start a fresh Python process and kill it at the end of the block.

    ``source`` is Python text, or a function that needs nothing of its module (it imports what it
    uses) and is called with ``args``, which travel by ``repr``. Both find ``say(*words)`` and
    ``commands()`` defined. ``env`` is added to the environment; ``user`` is a numeric uid to run
    as. The child imports the same pyksm as this process.

        def worker(size):
            import pyksm
            buffer = pyksm.Buffer(size)
            say("ready")
            for word, *rest in commands():
                say(rest)

        with spawn(worker, 1 << 20) as child:
            child.expect("ready")
            child.ask("touch", 7)
    """
    if callable(source):
        body = textwrap.dedent(inspect.getsource(source))
        source = f"{body}\n{source.__name__}(*{args!r})\n"
    else:
        source = textwrap.dedent(source)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (env or {})
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [python, "-c", _PREAMBLE + source, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
            user=user,
        )
        child = Child(process, errors)
        try:
            yield child
        finally:
            child.kill()


def rounds(usual: int, campaign: int) -> int:
    """Return how often a slow test repeats: more under ``make campaign``."""
    return campaign if os.environ.get("PYKSM_CAMPAIGN") == "1" else usual
