"""A folder that looks like /sys/kernel/mm/ksm, and a model of the kernel behind it."""

from __future__ import annotations

from pathlib import Path

DEFAULTS: dict[str, int | str] = {
    "advisor_max_cpu": 70,
    "advisor_max_pages_to_scan": 30000,
    "advisor_min_pages_to_scan": 500,
    "advisor_mode": "[none] scan-time",
    "advisor_target_scan_time": 200,
    "full_scans": 7,
    "general_profit": -4096,
    "ksm_zero_pages": 3,
    "max_page_sharing": 256,
    "merge_across_nodes": 1,
    "pages_scanned": 1000,
    "pages_shared": 10,
    "pages_sharing": 90,
    "pages_skipped": 5,
    "pages_to_scan": 100,
    "pages_unshared": 20,
    "pages_volatile": 30,
    "run": 0,
    "sleep_millisecs": 20,
    "smart_scan": 1,
    "stable_node_chains": 2,
    "stable_node_chains_prune_millisecs": 2000,
    "stable_node_dups": 4,
    "use_zero_pages": 0,
}


def make_sysfs(folder: Path, **values: int | str) -> Path:
    """Fill a folder with what a kernel of today shows."""
    folder.mkdir(exist_ok=True)
    for name, value in (DEFAULTS | values).items():
        (folder / name).write_text(f"{value}\n")
    return folder


def shown(folder: Path) -> dict[str, str]:
    """Return the value of every file, the chosen advisor without its brackets."""
    values = {path.name: path.read_text().partition("\n")[0] for path in folder.iterdir()}
    values["advisor_mode"] = values["advisor_mode"].replace("[none] scan-time", "none")
    return values


class Kernel:
    """The knobs as mm/ksm.c keeps them: the advisor owns pages_to_scan while it is on."""

    def __init__(self, **values: int | str) -> None:
        self.knobs: dict[str, int | str] = {
            name: value
            for name, value in DEFAULTS.items()
            if name.startswith(("advisor", "stable_node_chains_prune", "use", "smart", "sleep"))
            or name in ("run", "pages_to_scan", "merge_across_nodes", "max_page_sharing")
        } | {"advisor_mode": "none"}
        self.knobs |= values
        self.writes: list[tuple[str, int | str]] = []
        self.fail: dict[str, BaseException] = {}

    def read(self) -> dict[str, int | str]:
        return dict(self.knobs)

    def write(self, name: str, value: int | str) -> None:
        if name in self.fail:
            raise self.fail[name]
        self.writes.append((name, value))
        if name == "pages_to_scan" and self.knobs["advisor_mode"] == "scan-time":
            raise OSError(22, "EINVAL: the advisor rules")
        if name == "advisor_mode" and value != self.knobs[name]:
            start = self.knobs["advisor_min_pages_to_scan"]
            self.knobs["pages_to_scan"] = 100 if value == "none" else start
        self.knobs[name] = value
