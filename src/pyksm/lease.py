"""The lease: who asked for which knob, what the knobs were before, and how they get back there.

KSM's knobs are one set for the whole host, so every change pyksm makes goes through one file
under ``/run/pyksm``. The rules:

* Any number of processes hold requests at once; the strongest wins, knob by knob
  (``pyksm.knobs.KNOBS``), and the last one out puts back the original.
* The file is written before a knob is: whatever moment a process dies at, the next caller finds
  the originals and finishes the work. A holder that is gone (pid and start time, so that a reused
  pid does not count) has its requests dropped by whoever comes next.
* A knob that is neither what the lease wrote last nor what it was about to write was set by
  somebody else. It is theirs from then on: the lease lets go of it and remembers that it did.
* After a reboot the knobs are the kernel's again and the file means nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn, Protocol

from pyksm.errors import KsmError, NotSupported
from pyksm.knobs import Value, Values, from_file, plan, resolve, spins
from pyksm.result import Result

__all__ = ["Claim", "KnobFiles", "Lease", "LeaseRequest", "LeaseStatus"]

_VERSION: Final = 1
_MAX_BYTES: Final = 1 << 20
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class KnobFiles(Protocol):
    """What the lease needs of the knobs' owner."""

    def read(self) -> Values:
        """Return every knob this kernel has."""

    def write(self, name: str, value: Value) -> None:
        """Set one knob, and raise unless it then reads back as that value."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRequest(Result):
    """One request that stands: who made it, and for what."""

    pid: int
    alive: bool
    """False: the holder is gone, and the next change of a knob by anyone drops its request."""
    knobs: Values


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LeaseStatus(Result):
    """What the lease holds now."""

    path: str
    original: Values
    """What the last one out puts back."""
    requests: tuple[LeaseRequest, ...]
    pending: tuple[str, ...]
    """Knobs nobody asks for any more that could not be put back yet; tried again at each call."""
    foreign: dict[str, Value]
    """Knobs somebody else set while they were held, and the value found, which was left alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    id: str
    pid: int
    start: int
    pidns: int
    knobs: Values

    def __post_init__(self) -> None:
        numbers = (self.pid, self.start, self.pidns)
        if not (isinstance(self.id, str) and all(type(n) is int and n >= 0 for n in numbers)):
            raise ValueError("a request names no process")
        _check_values(self.knobs)


@dataclasses.dataclass(slots=True)
class _State:
    """What the file says."""

    original: Values = dataclasses.field(default_factory=dict)
    written: dict[str, list[Value]] = dataclasses.field(default_factory=dict)
    """What each knob may read if nobody else touched it: one value, or two amid a change."""
    requests: list[_Request] = dataclasses.field(default_factory=list)
    foreign: Values = dataclasses.field(default_factory=dict)

    def copy(self) -> _State:
        return _State(
            dict(self.original),
            {name: list(values) for name, values in self.written.items()},
            list(self.requests),
            dict(self.foreign),
        )

    def asked(self) -> set[str]:
        return {name for request in self.requests for name in request.knobs}

    def pending(self) -> set[str]:
        kept = {"pages_to_scan"} if "advisor_mode" in self.asked() else set()
        return set(self.original) - self.asked() - kept

    def target(self) -> Values:
        return resolve(self.original, [request.knobs for request in self.requests])

    def let_go(self, name: str) -> None:
        self.original.pop(name, None)
        self.written.pop(name, None)
        self.requests = [
            dataclasses.replace(
                request, knobs={k: v for k, v in request.knobs.items() if k != name}
            )
            for request in self.requests
        ]

    def keep(self, id: str) -> None:
        """Fold one request into the originals: this is what the knobs go back to from now on."""
        for request in [request for request in self.requests if request.id == id]:
            self.requests.remove(request)
            knobs = dict(request.knobs)
            mode = knobs.get("advisor_mode", self.original.get("advisor_mode"))
            if mode != self.original.get("advisor_mode"):
                # The number before belonged to the other mode.
                knobs.setdefault("pages_to_scan", 100)
            self.original.update(knobs)


class Claim:
    """One request of this process, from the moment it stands in the file."""

    __slots__ = ("abandoned", "dropped", "ending", "id", "lease", "wanted")

    def __init__(self, lease: Lease, wanted: Values) -> None:
        """Make up an id; the request itself is in the file."""
        self.id = secrets.token_hex(8)
        self.lease = lease
        self.wanted = dict(wanted)
        self.dropped = self.ending = self.abandoned = False

    def end(self) -> None:
        """Undo the change from now on: an interrupted undoing must not become a keeping."""
        self.ending = True

    def drop(self) -> None:
        """Mark the change as kept for good; safe in ``__del__``, acted on at the next call.

        If its undoing has begun and failed it is undone then, instead.
        """
        if self.ending:
            self.abandoned = True
        else:
            self.dropped = True


class _Mine:
    """The claims and leases of this process; a forked child starts with no claims."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self.registered = False

    def register(self, lease: Lease) -> None:
        """Start to watch forks and the exit; once, and not before the first lease."""
        if not self.registered:
            self.registered = True
            os.register_at_fork(after_in_child=_in_forked_child)
            atexit.register(_at_exit)
        self.leases.add(lease)

    def of(self, lease: Lease) -> list[Claim]:
        # By path: several Host objects of a process are one user of the lease.
        return [claim for claim in list(self.claims.values()) if claim.lease.path == lease.path]


_mine = _Mine()


def _in_forked_child() -> None:
    _mine.claims = {}
    for lease in list(_mine.leases):
        lease._after_fork()


def _at_exit() -> None:
    """Fold what was kept, and put back what is still held."""
    for lease in {claim.lease for claim in list(_mine.claims.values())}:
        with contextlib.suppress(Exception):  # the next caller finds the rest in the file
            lease._leave()


class Lease:
    """The lease on the knobs of one sysfs folder.

    One object serves all threads. Every method that changes something first finishes what dead
    holders left behind and what this process decided to keep.
    """

    timeout: float = 30.0
    """Seconds to wait for another process that is changing knobs."""

    def __init__(self, directory: str, files: KnobFiles, *, name: str, proc: str = "/proc") -> None:
        """Take the directory of the lease file; nothing is opened or made yet."""
        self.directory = directory = os.path.abspath(directory)
        self.path = os.path.join(directory, f"{name}.json")
        self._name = name
        self._files = files
        self._proc = proc
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._fds: list[int] = []
        _mine.register(self)

    # What callers do

    def hold(self, wanted: Values) -> Claim:
        """Make a request that stands until it is released or kept; all of it, or nothing."""
        claim = Claim(self, wanted)
        with self._locked() as dir_fd:
            state, current = self._begin(dir_fd)
            before = state.copy()
            self._add(state, claim, current)
            _mine.claims[claim.id] = claim
            try:
                self._settle(dir_fd, state, current, must=set(wanted), stop=True)
            except BaseException as error:
                del _mine.claims[claim.id]
                state.requests, state.foreign = before.requests, before.foreign
                self._put_back(dir_fd, state, error)
                raise
        return claim

    def release(self, claim: Claim) -> Values:
        """End a request; return the knobs of it that somebody else had set meanwhile.

        If it is interrupted, or a knob cannot be put back, the next call of anyone goes on.
        """
        claim.end()
        with self._locked() as dir_fd:
            state, current = self._begin(dir_fd)
            state.requests = [request for request in state.requests if request.id != claim.id]
            self._settle(dir_fd, state, current, must=set(claim.wanted))
            _mine.claims.pop(claim.id, None)
        return {name: state.foreign[name] for name in claim.wanted if name in state.foreign}

    def keep(self, wanted: Values) -> None:
        """Set knobs for good: others may hold stronger requests, this is what comes after them."""
        self.hold(wanted).drop()
        self.restore(must=False)

    def restore(self, *, force: bool = False, must: bool = True) -> None:
        """Finish what dead holders left; with ``force`` end the requests of living ones too."""
        with self._locked() as dir_fd:
            state, current = self._begin(dir_fd)
            if force:
                state.requests = []
            self._settle(dir_fd, state, current, must=state.pending() if must else set())

    def sweep(self) -> None:
        """Finish what dead holders left, if there is anything; costs one look at the file."""
        state = self._peek()
        if state.requests or state.original:
            dropped = any(claim.dropped for claim in _mine.of(self))
            if dropped or state.pending() or not all(map(self._alive, state.requests)):
                self.restore(must=False)

    def status(self) -> LeaseStatus:
        """Return what the file says; changes nothing and takes no lock."""
        state = self._peek()
        return LeaseStatus(
            path=self.path,
            original=state.original,
            requests=tuple(
                LeaseRequest(pid=request.pid, alive=self._alive(request), knobs=request.knobs)
                for request in state.requests
            ),
            pending=tuple(sorted(state.pending())),
            foreign=state.foreign,
        )

    # One change, from the journal to the knobs

    def _begin(self, dir_fd: int) -> tuple[_State, Values]:
        """Read file and knobs; drop the dead, fold the kept, let go of what others have set."""
        state = self._load(dir_fd)
        current = self._files.read()
        state.requests = [request for request in state.requests if self._alive(request)]
        for claim in _mine.of(self):
            if claim.dropped:
                state.keep(claim.id)
        for name in [name for name in state.original if name not in current]:
            state.let_go(name)  # another kernel's
        for name in _foreign(state, current):
            state.foreign[name] = current[name]
            state.let_go(name)
            if name == "advisor_mode" and "pages_to_scan" not in state.asked():
                state.let_go("pages_to_scan")
        return state, current

    def _add(self, state: _State, claim: Claim, current: Values) -> None:
        names = set(claim.wanted)
        if "advisor_mode" in names:
            names.add("pages_to_scan")  # changing the mode overwrites it
        for name in names:
            state.original.setdefault(name, current[name])
            state.foreign.pop(name, None)
        if "run" in claim.wanted:
            # An unmerge happens once. Whoever asks for `run` after it must not, by leaving,
            # make it happen again; ksmd then stays stopped, which is what is left of it.
            state.requests = [_spend_unmerge(request) for request in state.requests]
        pid = os.getpid()
        start = _start_time(self._proc, pid) or 0
        namespace = _pid_namespace(self._proc)
        state.requests.append(_Request(claim.id, pid, start, namespace, claim.wanted))
        _refuse_nonsense(current, {**current, **state.target()}, claim.wanted)

    def _settle(
        self,
        dir_fd: int,
        state: _State,
        current: Values,
        *,
        must: set[str],
        stop: bool = False,
    ) -> None:
        """Bring the knobs to what the requests say; raise for a knob in ``must`` that fails.

        A knob that is nobody's business here but cannot be put back (EBUSY while pages are
        merged) stays in the file, for the next call to try again.
        """
        target = state.target()
        writes = plan(current, target)
        for name, value in writes:
            allowed = state.written.setdefault(name, [current[name]])
            allowed.extend(v for v in (current[name], value) if v not in allowed)
            if name == "run" and value == 2 and 0 not in allowed:
                allowed.append(0)  # what an unmerge leaves that was killed (run_store)
        if any(name == "advisor_mode" for name, _ in writes):
            state.written.pop("pages_to_scan", None)  # the kernel writes it too
        self._save(dir_fd, state)
        self._forget_kept(state)
        failures = self._write_all(writes, must if stop else set())
        for name in [name for name in state.original if name not in failures]:
            if name in target:
                state.written[name] = [target[name]]
            else:
                state.written.pop(name, None)
        for name in state.pending() - set(failures):
            del state.original[name]
        state.written = {k: v for k, v in state.written.items() if k in state.original}
        with contextlib.suppress(OSError):  # the journal says the same in more words
            self._save(dir_fd, state)
        for name in must & set(failures):
            raise failures[name]

    def _write_all(
        self, writes: list[tuple[str, Value]], stop_at: set[str]
    ) -> dict[str, OSError | KsmError]:
        failures: dict[str, OSError | KsmError] = {}
        for name, value in writes:
            try:
                self._files.write(name, value)
            except (OSError, KsmError) as error:
                if name in stop_at:
                    raise
                failures[name] = error
        return failures

    def _put_back(self, dir_fd: int, state: _State, error: BaseException) -> None:
        """Return to the state before a request that could not be met."""
        try:
            self._settle(dir_fd, state, self._files.read(), must=set())
        except Exception as failure:  # noqa: BLE001 - the first error is the one to raise
            error.add_note(f"pyksm could not put the knobs back as well: {failure}")

    def _forget_kept(self, state: _State) -> None:
        """Drop the claims whose folding into the originals, or whose end, is on record now."""
        standing = {request.id for request in state.requests}
        for claim in _mine.of(self):
            if (claim.dropped or claim.abandoned) and claim.id not in standing:
                _mine.claims.pop(claim.id, None)

    def _leave(self) -> None:
        """Release and fold everything of this process, at its exit."""
        for claim in _mine.of(self):
            if not claim.dropped:
                self.release(claim)
        self.restore(must=False)

    # Who is alive

    def _alive(self, request: _Request) -> bool:
        if request.pidns != _pid_namespace(self._proc):
            return True  # its pid means nothing here
        start = _start_time(self._proc, request.pid)
        if start is None or start != request.start:
            return False
        # Ours, but no claim: an interrupt came between the file and the caller.
        claim = _mine.claims.get(request.id)
        return request.pid != os.getpid() or (claim is not None and not claim.abandoned)

    # The file

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lease among threads and processes; give the open directory."""
        if self._owner == threading.get_ident():
            raise KsmError(
                "a signal handler tried to change knobs while the code it interrupted was "
                "changing them; let the handler raise instead"
            )
        if not self._lock.acquire(timeout=self.timeout):
            raise TimeoutError(f"another thread has been changing knobs for {self.timeout:g} s")
        try:
            self._owner = threading.get_ident()
            with self._opened_dir() as dir_fd, self._flocked(dir_fd):
                yield dir_fd
        finally:
            self._owner = None
            self._lock.release()

    @contextlib.contextmanager
    def _opened_dir(self, *, make: bool = True) -> Iterator[int]:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.directory, 0o755)
        try:
            fd = os.open(self.directory, _OPEN | os.O_DIRECTORY)
        except NotADirectoryError:  # what O_NOFOLLOW gives for a link, too
            raise KsmError(
                f"{self.directory} is not a directory, or a symbolic link; the lease of the "
                f"knobs is not kept there. Remove it: rm {self.directory}"
            ) from None
        self._fds.append(fd)
        try:
            _check_private(self.directory, os.fstat(fd), 0o022, "chmod go-w")
            yield fd
        finally:
            self._close(fd)

    @contextlib.contextmanager
    def _flocked(self, dir_fd: int) -> Iterator[None]:
        path = os.path.join(self.directory, f"{self._name}.lock")
        fd = _open_private(f"{self._name}.lock", path, os.O_RDWR | os.O_CREAT, dir_fd)
        self._fds.append(fd)
        try:
            self._wait_for_lock(fd, path)
            try:
                os.pwrite(fd, f"{os.getpid():<10}\n".encode(), 0)  # for the message of waiters
                yield
            finally:
                # Not left to close(): a child forked meanwhile shares the lock.
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            self._close(fd)

    def _wait_for_lock(self, fd: int, path: str) -> None:
        deadline = time.monotonic() + self.timeout
        pause = 0.0005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pid = os.pread(fd, 16, 0).decode("ascii", "replace").strip()
                    raise TimeoutError(
                        f"process {pid} has held {path} for {self.timeout:g} s; it is changing "
                        "knobs (an unmerge takes half a second per GiB) or is stopped"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 2, 0.02)

    def _close(self, fd: int) -> None:
        if fd in self._fds:
            self._fds.remove(fd)
            os.close(fd)

    def _after_fork(self) -> None:
        """Start anew in a forked child: another thread of the parent may have been inside."""
        self._lock = threading.Lock()
        self._owner = None
        for fd in list(self._fds):
            self._close(fd)

    def _peek(self) -> _State:
        try:
            with self._opened_dir(make=False) as dir_fd:
                return self._load(dir_fd)
        except FileNotFoundError:
            return _State()

    def _load(self, dir_fd: int) -> _State:
        try:
            fd = _open_private(f"{self._name}.json", self.path, os.O_RDONLY, dir_fd)
        except FileNotFoundError:
            return _State()
        with open(fd, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
        try:
            return _parse(text, _boot_id(self._proc))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _refuse_file(self.path, error)

    def _save(self, dir_fd: int, state: _State) -> None:
        """Replace the file in one step; a crash leaves the old one or the new one.

        No fsync: after a crash of the machine the file means nothing.
        """
        name = f"{self._name}.json"
        if not (state.original or state.requests or state.foreign):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=dir_fd)
            return
        text = json.dumps(
            {
                "version": _VERSION,
                "boot_id": _boot_id(self._proc),
                "original": state.original,
                "written": state.written,
                "requests": [dataclasses.asdict(request) for request in state.requests],
                "foreign": state.foreign,
            },
            indent=1,
        )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{name}.new", dir_fd=dir_fd)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = _open_private(f"{name}.new", f"{self.path}.new", flags, dir_fd)
        with open(fd, "w") as file:
            file.write(text)
        os.replace(f"{name}.new", name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def _spend_unmerge(request: _Request) -> _Request:
    if request.knobs.get("run") != 2:
        return request
    return dataclasses.replace(request, knobs={**request.knobs, "run": 0})


def _refuse_nonsense(current: Values, after: Values, wanted: Values) -> None:
    """Refuse what is only wrong together with the knobs as they are."""
    if "pages_to_scan" in wanted and after.get("advisor_mode") == "scan-time":
        raise NotSupported(
            "pages_to_scan cannot be set while advisor_mode is scan-time: the advisor sets it",
            hint="Ask for advisor_mode='none' in the same call",
            errno=errno.EINVAL,
        )
    if spins(after) and not spins(current):
        raise ValueError(
            "with the knobs as they are this makes pages_to_scan=0 and sleep_millisecs=0: "
            "ksmd would burn a whole core and scan nothing; to stop it use run=0"
        )


def _foreign(state: _State, current: Values) -> list[str]:
    """Name the knobs that read what the lease never wrote.

    ``written`` leaves out pages_to_scan while the advisor of one of us sets it.
    """
    return [name for name, allowed in state.written.items() if current[name] not in allowed]


def _parse(text: bytes, boot_id: str) -> _State:
    if len(text) > _MAX_BYTES:
        raise ValueError("it is too long")
    data = json.loads(text)
    if data["version"] != _VERSION:
        raise ValueError(f"its version is {data['version']!r}, not {_VERSION}")
    if not isinstance(data["boot_id"], str):
        raise ValueError("it names no boot")
    if data["boot_id"] != boot_id:
        return _State()
    requests = [_Request(**request) for request in data["requests"]]
    state = _State(data["original"], data["written"], requests, data["foreign"])
    _check_values(state.original)
    _check_values(state.foreign)
    for name, values in state.written.items():
        if not (isinstance(values, list) and values and all(from_file(name, v) for v in values)):
            raise ValueError(f"it says that {name!r} was written as {values!r}")
    if not (set(state.written) | state.asked()) <= set(state.original):
        raise ValueError("it lacks the original of a knob")
    return state


def _check_values(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not from_file(name, value):
            raise ValueError(f"it says {name!r} is {value!r}")


def _refuse_file(path: str, error: Exception) -> NoReturn:
    raise KsmError(
        f"{path} is not a lease pyksm wrote ({type(error).__name__}: {error}), so no knob was "
        f"touched. Look at it, set the knobs it names by hand, then remove it: rm {path}"
    ) from error


def _open_private(name: str, path: str, flags: int, dir_fd: int) -> int:
    try:
        fd = os.open(name, flags | _OPEN, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise KsmError(
            f"{path} is a symbolic link, which pyksm does not follow. Remove it: rm {path}"
        ) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise KsmError(f"{path} is not a regular file. Remove it")
        _check_private(path, info, 0o077, "chmod 600")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_private(path: str, info: os.stat_result, forbidden: int, mend: str) -> None:
    if info.st_uid not in (0, os.geteuid()):
        raise KsmError(
            f"{path} belongs to user {info.st_uid}, who could make pyksm write what they like. "
            "Remove it, or give another lease directory"
        )
    if stat.S_IMODE(info.st_mode) & forbidden:
        raise KsmError(
            f"{path} is open to other users (mode {stat.S_IMODE(info.st_mode):o}). "
            f"Look whether it is yours, then: {mend} {path}"
        )


def _boot_id(proc: str) -> str:
    try:
        with open(f"{proc}/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def _start_time(proc: str, pid: int) -> int | None:
    """Return a process's start in clock ticks since boot; None where it is gone or a zombie."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # a name may hold spaces and brackets
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])  # fields 3 and 22 of proc_pid_stat(5)


def _pid_namespace(proc: str) -> int:
    try:
        return os.stat(f"{proc}/self/ns/pid").st_ino
    except OSError:
        return 0
