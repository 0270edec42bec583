"""``pyksm status`` on made-up figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakeksm import make_sysfs

from pyksm.cli import Exit, main, status
from pyksm.cli._output import console
from pyksm.cli.status import Rates, Snapshot, _page, _pages, _rates
from pyksm.host import Host


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(make_sysfs(tmp_path / "ksm"), lease=tmp_path / "lease")


def printed(snapshot: Snapshot, capsys: pytest.CaptureFixture[str]) -> str:
    console().print(_page(snapshot))
    return capsys.readouterr().out


def test_rates_come_from_two_looks(host: Host, tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 7\ncow_ksm 40\n")
    assert _pages(host.counters(), str(vmstat)) == (40, 100)
    assert _rates((40, 100), (60, 90), 2.0) == Rates(seconds=2.0, broken=10.0, merged=-5.0)


def test_a_kernel_without_cow_ksm_has_no_rate(host: Host, tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 7\n")
    assert _pages(host.counters(), str(tmp_path / "vmstat")) == (None, 100)
    assert _rates((None, 100), (None, 100), 1.0).broken is None
    assert not _rates((None, 100), (None, 0), 1.0).storm


@pytest.mark.parametrize(
    ("broken", "merged", "storm"),
    [(0, 0, False), (0, -5, False), (1, 0, True), (10, 20, False), (20, 10, True), (1, -1, True)],
)
def test_it_warns_when_more_is_broken_than_merged(
    broken: float,
    merged: float,
    storm: bool,
    host: Host,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = Rates(seconds=1.0, broken=float(broken), merged=float(merged))
    assert rates.storm is storm
    snapshot = Snapshot(host=host.stats(), processes=(), unreadable=0, rates=rates)
    assert ("faster than it is merged" in printed(snapshot, capsys)) is storm


def test_the_host_line_is_made_of_the_counters(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = Snapshot(host=host.stats(), processes=(), unreadable=3, rates=None)
    text = printed(snapshot, capsys)
    assert "ksmd stopped: 100 pages every 20 ms, smart_scan on; 7 laps" in text
    assert "40.0 KiB shared by 360.0 KiB more, zeros 12.0 KiB" in text
    assert "3 processes may not be read" in text
    assert "No process you may read has anything marked" in text


def test_json_has_every_figure_in_bytes(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "Host", lambda: host)
    assert main(["status", "--json"]) == Exit.OK
    data = json.loads(capsys.readouterr().out)
    assert data["host"]["saved_bytes"] == host.stats().saved_bytes
    assert data["host"]["counters"]["pages_sharing"] == 90


def test_a_process_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "4194304"]) == Exit.FAILURE
    assert "there is no process 4194304" in capsys.readouterr().err
