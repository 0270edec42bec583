"""What is shipped: the sdist holds every source, and a wheel made from it works."""

from __future__ import annotations

import email
import importlib.metadata
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "pyksm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist of a copy, so that the checkout's own build folders stay as they are."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: an sdist is made from one")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
            (copy / name).chmod((ROOT / name).stat().st_mode & 0o777)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=copy)
    (found,) = folder.glob("*.tar.gz")
    return found


def members(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.split("/", 1)[1] for name in names}


@pytest.mark.slow
def test_sdist_holds_every_source(sdist: Path) -> None:
    inside = members(sdist)
    for suffix in (".py", ".pyx", ".pxd", ".pyi", ".c", ".h", ".typed"):
        for path in PACKAGE.rglob(f"*{suffix}"):
            assert str(path.relative_to(ROOT)) in inside
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py", "conftest.py"):
        assert name in inside
    assert {"tools/check-prerequisites", "tests/support.py", "docs/conf.py"} <= inside


@pytest.mark.slow
def test_sdist_holds_nothing_generated(sdist: Path) -> None:
    generated = {path.with_suffix(".c").name for path in PACKAGE.glob("*.pyx")}
    for name in members(sdist):
        assert Path(name).name not in generated
        assert not name.endswith((".so", ".pyc", ".o"))
        assert "__pycache__" not in name
        assert not name.startswith(("build/", ".venv/", "docs/_build/"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_from_sdist_installs_and_works(sdist: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (metadata,) = (name for name in inside if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(metadata))
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.pyi"), PACKAGE / "py.typed"]:
        assert str(path.relative_to(PACKAGE.parent)) in inside
    extensions = {name for name in inside if name.endswith(".so")}
    assert len(extensions) == len(list(PACKAGE.glob("*.pyx")))
    assert not {name for name in inside if name.endswith((".pyx", ".c", ".h"))}
    if "abi3" in wheel.name:
        assert wheel.name.startswith(f"pyksm-{PROJECT['version']}-cp311-abi3-linux")
        assert all(name.endswith(".abi3.so") for name in extensions)
    assert message["Name"] == "pyksm"
    assert message["License-Expression"] == "MIT"
    assert message["Requires-Python"] == ">=3.11"

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        wheel,
        cwd=tmp_path,
    )
    said = run(python, "-I", "-W", "error", ROOT / "tools" / "smoke.py", cwd=tmp_path)
    assert said.startswith(f"pyksm {PROJECT['version']} works on")
    command = run(environment / "bin" / "pyksm", "--version", cwd=tmp_path)
    assert PROJECT["version"] in command


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("pyksm")
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "MIT"
    scripts = importlib.metadata.entry_points(group="console_scripts", name="pyksm")
    assert [script.value for script in scripts] == ["pyksm.__main__:main"]


def test_version_is_in_the_changelog() -> None:
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_the_packages() -> None:
    text = (ROOT / "README.md").read_text()
    assert "apt-get install python3 python3-venv python3-dev gcc make" in text
    for word in ("make demo", "make test"):
        assert word in text
