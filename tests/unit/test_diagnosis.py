"""``doctor`` on made-up hosts and processes; tests/kernel has real ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fakeksm import make_sysfs

from pyksm import diagnosis
from pyksm.diagnosis import CODES, SEVERITIES, Finding, doctor, merge_seconds
from pyksm.errors import NotSupported
from pyksm.host import Host
from pyksm.process import Process

ROOT = Path(__file__).parents[2]

HEALTHY: dict[str, int | str] = {
    "run": 1,
    "pages_skipped": 0,
    "smart_scan": 0,
    "stable_node_chains": 0,
    "stable_node_dups": 0,
}
"""A host with nothing to complain about."""


def host_of(tmp_path: Path, **values: int | str) -> Host:
    return Host(make_sysfs(tmp_path / "ksm", **(HEALTHY | values)), lease=tmp_path / "lease")


class FakeProc:
    """A /proc with one process in it."""

    def __init__(self, folder: Path, **rollup: int) -> None:
        self.folder = folder
        (folder / "42").mkdir(parents=True)
        self.write("42/stat", "42 (x y) S 7 " + " ".join(["0"] * 15) + " 99 0 0 0 5 6 7 8")
        self.write("42/status", "Name:\tx\nUid:\t0\t0\t0\t0\n")
        self.stat(ksm_rmap_items=0)
        self.write("42/smaps", "")
        sizes = {"Rss": 0, "Pss": 0, "Anonymous": 0, "Pss_Anon": 0, "KSM": 0} | rollup
        self.write("42/smaps_rollup", "".join(f"{key}: {kb:10} kB\n" for key, kb in sizes.items()))
        self.write("meminfo", "SwapTotal:   0 kB\nSwapFree:   0 kB\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def stat(self, merge_any: str = "no", **values: int) -> None:
        lines = [f"{name} {value}\n" for name, value in values.items()]
        self.write(
            "42/ksm_stat",
            "".join(lines) + f"ksm_merge_any: {merge_any}\nksm_mergeable: no\n",
        )

    def maps(self, *entries: tuple[str, str, dict[str, int]]) -> None:
        """Write mappings of 4 MiB: path, VmFlags, sizes in kB."""
        text = ""
        for number, (path, flags, sizes) in enumerate(entries):
            start = 0x7F0000000000 + number * 0x1000000
            text += f"{start:x}-{start + 0x400000:x} rw-p 00000000 00:01 0    {path}\n"
            text += "".join(f"{key}: {kb:10} kB\n" for key, kb in sizes.items())
            text += f"VmFlags: {flags}\n"
        self.write("42/smaps", text)

    @property
    def process(self) -> Process:
        return Process(42, proc=self.folder)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


def find(findings: list[Finding], code: str) -> Finding:
    found = [finding for finding in findings if finding.code == code]
    assert len(found) == 1, f"{code} in {[finding.code for finding in findings]}"
    return found[0]


def codes(findings: list[Finding]) -> set[str]:
    return {finding.code for finding in findings}


def test_a_healthy_host_has_no_findings(tmp_path: Path, proc: FakeProc) -> None:
    proc.maps(("", "rd wr mg", {"Rss": 0}))
    assert doctor(host=host_of(tmp_path), process=proc.process) == []


@pytest.mark.parametrize(
    ("code", "values", "words", "mend"),
    [
        ("ksmd-off", {"run": 0}, "does not run", "pyksm tune run=1"),
        ("ksmd-unmerged", {"run": 2}, "run is 2", "pyksm tune run=1"),
        ("scan-stuck", {"pages_to_scan": 0}, "never", "pages_to_scan=1000"),
        ("scan-stuck", {"sleep_millisecs": 4294967295}, "never", "sleep_millisecs=20"),
        (
            "scan-slow",
            {"pages_volatile": 262144},
            "100 pages every 20 ms, what is marked on this host (1.0 GiB) takes about 3 minutes",
            "pyksm settle",
        ),
        (
            "advisor-slow",
            {"advisor_mode": "none [scan-time]"},
            "one lap in 200 s",
            "advisor_target_scan_time",
        ),
        ("smart-scan", {"smart_scan": 1}, "smart_scan is on", "smart_scan=0"),
        (
            "smart-scan-skips",
            {"smart_scan": 1, "pages_skipped": 77},
            "skipped 77 page visits",
            "smart_scan=0",
        ),
        (
            "sharing-chains",
            {"stable_node_chains": 3, "stable_node_dups": 9},
            "3 contents are mapped over 256 times",
            "max_page_sharing",
        ),
        (
            "host-profit-negative",
            {"pages_sharing": 0, "ksm_zero_pages": 0, "pages_unshared": 163840},
            "10.0 MiB more than merging saves",
            "mark less",
        ),
    ],
)
def test_findings_about_the_host(
    code: str,
    values: dict[str, int | str],
    words: str,
    mend: str,
    tmp_path: Path,
    proc: FakeProc,
) -> None:
    found = find(doctor(host=host_of(tmp_path, **values), process=proc.process), code)
    assert found.severity == CODES[code]
    assert found.subject == "host"
    assert words in found.sentence
    assert mend in found.mend
    assert code not in codes(doctor(host=host_of(tmp_path), process=proc.process))


def test_a_fast_scan_of_much_is_not_slow(tmp_path: Path, proc: FakeProc) -> None:
    host = host_of(tmp_path, pages_volatile=262144, pages_to_scan=5000, sleep_millisecs=10)
    assert "scan-slow" not in codes(doctor(host=host, process=proc.process))
    # Measured on 6.18: two laps over 8192 pages at the defaults take 3.9 s, and we say three.
    seconds = merge_seconds(8192 * 4096, host_of(tmp_path).counters())
    assert 3.9 < seconds < 2 * 3.9


def test_no_ksm_says_only_that(tmp_path: Path) -> None:
    (found,) = doctor(host=Host(tmp_path / "absent"))
    assert (found.code, found.severity) == ("no-ksm", "error")
    assert "CONFIG_KSM=y" in found.mend


def test_a_kernel_that_only_pretends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotSupported("madvise(MADV_MERGEABLE): EINVAL")

    monkeypatch.setattr(diagnosis, "_is_real", lambda host: True)
    monkeypatch.setattr(diagnosis, "require_ksm", refuse)
    assert codes(doctor(host=host_of(tmp_path))) == {"no-ksm"}


@pytest.mark.parametrize(
    ("errno", "code"), [(30, "sysfs-read-only"), (13, "no-permission"), (1, "no-permission")]
)
def test_no_right_to_tune(
    errno: int, code: str, tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = NotSupported("no", errno=errno)
    monkeypatch.setattr(Host, "refusal", property(lambda host: refusal))
    found = codes(doctor(host=host_of(tmp_path), process=proc.process))
    assert found & {"sysfs-read-only", "no-permission"} == {code}


def test_no_prctl(tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(diagnosis._sys, "get_memory_merge", refuse)
    findings = doctor(host=host_of(tmp_path), process=proc.process)
    assert "Linux 6.4" in find(findings, "no-prctl").sentence


def test_swap_in_use(tmp_path: Path, proc: FakeProc) -> None:
    proc.write("meminfo", "SwapTotal:   5000 kB\nSwapFree:   3976 kB\n")
    found = find(doctor(host=host_of(tmp_path), process=proc.process), "swap-in-use")
    assert found.nbytes == 1 << 20


# ---- a process ----


def test_an_old_kernel_tells_nothing_of_a_process(tmp_path: Path, proc: FakeProc) -> None:
    (proc.folder / "42" / "ksm_stat").unlink()
    assert "no-ksm-stat" in codes(doctor(host=host_of(tmp_path), process=proc.process))


def test_nothing_marked(tmp_path: Path, proc: FakeProc) -> None:
    proc.maps(("", "rd wr", {"Rss": 4096}))
    findings = doctor(host=host_of(tmp_path), process=proc.process)
    assert find(findings, "nothing-marked").subject == "process 42"


@pytest.mark.parametrize(
    ("parent", "code"), [("yes", "merge-any-inherited"), ("no", "merge-any-leaks")]
)
def test_whose_wish_the_flag_was(parent: str, code: str, tmp_path: Path, proc: FakeProc) -> None:
    proc.stat("yes", ksm_rmap_items=0)
    proc.write("7/ksm_stat", f"ksm_merge_any: {parent}\n")
    found = codes(doctor(host=host_of(tmp_path), process=proc.process))
    assert found & {"merge-any-inherited", "merge-any-leaks"} == {code}


def test_a_process_that_gains_nothing(tmp_path: Path, proc: FakeProc) -> None:
    proc.stat(ksm_rmap_items=16384)
    found = find(doctor(host=host_of(tmp_path), process=proc.process), "profit-negative")
    assert found.nbytes == 1 << 20


def test_what_ksm_skips_of_an_opted_in_process(tmp_path: Path, proc: FakeProc) -> None:
    proc.stat("yes", ksm_rmap_items=0)
    big = {"Rss": 4096, "Anonymous": 4096}
    proc.maps(
        ("/memfd:x", "rd sh", big),
        ("/dev/shm/psm_1", "rd sh", big),
        ("/secretmem", "rd sh", big),
        ("", "rd ht", big),
        ("", "rd dp", big),
        ("/dev/zero", "rd sh", {"Rss": 100}),
    )
    findings = doctor(host=host_of(tmp_path), process=proc.process)
    found = {f.code: f.nbytes for f in findings if f.severity == "error"}
    four = 4 << 20
    assert found == {
        "memfd": four,
        "shared-memory": four,
        "secret": four,
        "hugetlb": four,
        "droppable": four,
    }


def test_huge_pages_and_locked_pages(tmp_path: Path, proc: FakeProc) -> None:
    proc.maps(
        ("", "rd wr mg", {"Rss": 4096, "AnonHugePages": 2048, "KSM": 0}),
        ("", "rd wr mg hg", {"Rss": 4096, "AnonHugePages": 0, "KSM": 1024}),
        ("", "rd wr mg nh lo", {"Rss": 4096, "AnonHugePages": 0, "KSM": 1024}),
        ("", "rd wr hg lo", {"Rss": 4096, "AnonHugePages": 4096, "KSM": 0}),
    )
    findings = doctor(host=host_of(tmp_path), process=proc.process)
    assert find(findings, "huge-pages").nbytes == 2 << 20
    assert find(findings, "huge-pages-return").nbytes == 1 << 20
    assert find(findings, "mlocked").nbytes == 4 << 20


def test_not_readable(tmp_path: Path, proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: Process) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Process, "stats", refuse)
    monkeypatch.setattr(diagnosis.os, "geteuid", lambda: 1000)
    host = host_of(tmp_path)
    assert "not-readable" in codes(doctor(host=host, process=proc.process))
    proc.write("42/status", "Uid:\t1000\t1000\t1000\t1000\n")
    assert "not-dumpable" in codes(doctor(host=host, process=proc.process))


# ---- the list ----


def test_the_gravest_comes_first(tmp_path: Path, proc: FakeProc) -> None:
    host = host_of(tmp_path, run=0, smart_scan=1, stable_node_chains=1, pages_volatile=262144)
    severities = [f.severity for f in doctor(host=host, process=proc.process)]
    assert set(severities) == set(SEVERITIES)
    assert severities == sorted(severities, key=SEVERITIES.index)


def test_every_code_is_in_the_documentation_with_its_severity() -> None:
    page = (ROOT / "docs" / "reference" / "doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert {code: severity for code, severity, _, _ in rows} == CODES
    assert len(rows) == len(CODES), "a code is documented twice"


def test_every_code_is_produced_by_a_test() -> None:
    tests = "".join(
        (ROOT / "tests" / name).read_text()
        for name in ("unit/test_diagnosis.py", "kernel/test_diagnosis_kernel.py")
    )
    missing = [code for code in CODES if f'"{code}"' not in tests]
    assert not missing


def test_wrong_objects_are_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no buffer"):
        doctor(42, host=host_of(tmp_path))
