"""What the real kernel makes of our memory: marked, touched in huge pages, kept small, merged."""

from __future__ import annotations

import errno
import io
import re

import numpy as np
import pytest
from support import Ksmd, mappings, smaps_kb, spawn, vm_flags, wait_until

import pyksm
from pyksm import _buffer, arrays
from pyksm.arrays import buffer_of

MIB = 1 << 20
SIZE = 64 * MIB


def huge_pages_on() -> bool:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return "[never]" not in file.read()
    except OSError:
        return False


needs_huge = pytest.mark.skipif(not huge_pages_on(), reason="transparent huge pages are off")


def test_every_buffer_is_marked_and_live_tells_of_it():
    buffers = [pyksm.Buffer(size) for size in (1, 10_000, 2 * MIB, 5 * MIB)]
    for buffer in buffers:
        assert "mg" in vm_flags(buffer.address)
        assert buffer.mergeable
        mapped = -len(buffer) % 4096 + len(buffer)
        assert (buffer.address, mapped) in _buffer.live()


def test_the_mark_does_not_outlive_the_memory():
    buffer = pyksm.Buffer(MIB)
    address = buffer.address
    buffer.close()
    assert not any(m.start <= address < m.end and "mg" in m.flags for m in mappings())


@needs_huge
def test_the_first_touch_goes_through_huge_pages_until_kept_small():
    buffer = pyksm.Buffer(8 * MIB)
    view = np.frombuffer(buffer, "u1")
    view[: 4 * MIB] = 1
    assert smaps_kb(buffer.address, "AnonHugePages", len(buffer)) == 4096
    buffer.keep_small()
    assert {"mg", "nh"} <= vm_flags(buffer.address)
    view[4 * MIB :] = 1
    assert smaps_kb(buffer.address, "AnonHugePages", len(buffer)) == 4096


@needs_huge
@pytest.mark.parametrize(
    "make", ["load", "copy", "copy_inside", "full", "array", "like", "unpickle"]
)
def test_what_comes_filled_was_touched_in_huge_pages_and_is_kept_small(make, tmp_path):
    source = np.ones(SIZE // 8)

    def load():
        np.save(tmp_path / "a.npy", source)
        return pyksm.load(tmp_path / "a.npy")

    def unpickle():
        import pickle

        return pyksm.load(io.BytesIO(pickle.dumps([source], 4)), allow_pickle=True)[0]

    made = {
        "load": load,
        "copy": lambda: pyksm.copy(source),
        "copy_inside": lambda: pyksm.copy([source])[0],
        "full": lambda: pyksm.full(SIZE // 8, 1.0),
        "array": lambda: pyksm.array(source),
        "like": lambda: pyksm.ones_like(source),
        "unpickle": unpickle,
    }[make]()
    address = made.ctypes.data
    assert smaps_kb(address, "AnonHugePages", SIZE) >= (SIZE - 4 * MIB) >> 10
    assert {"mg", "nh"} <= vm_flags(address)


@needs_huge
def test_an_array_of_your_own_filling_is_kept_small_when_you_say_so():
    made = pyksm.empty(4 * MIB, "u1")
    assert "hg" in vm_flags(made.ctypes.data)
    arrays.keep_small(made[100:])
    assert "nh" in vm_flags(made.ctypes.data)


def test_without_ksm_it_is_not_supported_or_plain_memory():
    """EINVAL from madvise, as a kernel without CONFIG_KSM gives it (by seccomp)."""

    def worker():
        import ctypes
        import errno
        import struct

        # BPF: load the system call's number; madvise (28 on x86-64) with advice 12 -> EINVAL.
        program = b"".join(
            struct.pack("HBBI", *line)
            for line in [
                (0x20, 0, 0, 0),
                (0x15, 0, 3, 28),
                (0x20, 0, 0, 32),
                (0x15, 0, 1, 12),
                (0x06, 0, 0, 0x00050000 | errno.EINVAL),
                (0x06, 0, 0, 0x7FFF0000),
            ]
        )
        text = ctypes.create_string_buffer(program)
        filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 6, ctypes.addressof(text)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, filters, 0, 0) == 0
        import pyksm

        try:
            pyksm.Buffer(10)
        except pyksm.NotSupported as error:
            say(error.errno, "|", error)  # noqa: F821
        plain = pyksm.Buffer(10, missing_ok=True)
        say(plain.mergeable, repr(plain))  # noqa: F821
        say(pyksm._buffer.live(), pyksm.zeros(5000, missing_ok=True).sum())  # noqa: F821

    import platform

    if platform.machine() != "x86_64":
        pytest.skip("the filter is written for x86-64")
    with spawn(worker) as child:
        said = child.reply()
        assert said.startswith(str(errno.EINVAL))
        assert "CONFIG_KSM" in said
        assert "missing_ok=True" in said
        assert re.match("False .*not mergeable", child.reply())
        assert child.reply() == "[] 0.0"


def test_a_kernel_that_says_yes_and_does_nothing_is_found_out(tmp_path):
    fake = tmp_path / "smaps"
    fake.write_text("1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nVmFlags: rd wr mg\n"
                    "3000-4000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr\n")  # fmt: skip
    assert _buffer._flags_of(0x2000, fake) == [b"rd", b"wr", b"mg"]
    assert _buffer._flags_of(0x3000, fake) == [b"rd", b"wr"]
    assert _buffer._flags_of(0x9000, fake) is None
    assert _buffer._flags_of(0x9000, tmp_path / "none") is None

    def worker():
        import ctypes

        libc = ctypes.CDLL(None)
        from pathlib import Path

        import pyksm

        # Bind a smaps without mg over our own: the only kernel we have tells the truth.
        assert libc.unshare(0x00020000) == 0
        libc.mount(b"none", b"/", None, 0x44000, None)
        lie = Path("/tmp") / f"pyksm-smaps-{__import__('os').getpid()}"
        lie.write_text("0-ffffffffffffffff rw-p 00000000 00:00 0 \nVmFlags: rd wr\n")
        smaps = f"/proc/{__import__('os').getpid()}/smaps".encode()
        bound = libc.mount(bytes(lie), smaps, None, 0x1000, None) == 0
        lie.unlink()
        if not bound:
            say("cannot mount")  # noqa: F821
        else:
            try:
                pyksm.Buffer(10)
            except pyksm.NotSupported as error:
                say(error)  # noqa: F821
            plain = pyksm.Buffer(10, missing_ok=True)
            say(plain.mergeable)  # noqa: F821

    with spawn(worker) as child:
        said = child.reply()
        if said == "cannot mount":
            pytest.skip("a mount over /proc/self/smaps is not allowed here")
        assert "did nothing" in said
        assert child.reply() == "False"


def test_two_processes_that_load_one_file_merge_all_of_it(ksmd: Ksmd, tmp_path):
    rng = np.random.default_rng(0)
    # Sizes that are no whole pages, small and large, one not contiguous.
    np.savez(
        tmp_path / "m.npz", a=rng.random(5001), b=rng.random((100, 77)).T, c=rng.random(999_999)
    )

    def worker(path):
        from support import smaps_kb

        import pyksm

        model = pyksm.load(path)
        say("ready")  # noqa: F821
        for _ in commands():  # noqa: F821
            owners = {id(o): o for o in map(pyksm.arrays.buffer_of, model.values())}
            say(sum(smaps_kb(o.address, "KSM") for o in owners.values()))  # noqa: F821

    pages = sum(-(-n * 8 // 4096) for n in (5001, 7700, 999_999))
    with (
        spawn(worker, str(tmp_path / "m.npz")) as one,
        spawn(worker, str(tmp_path / "m.npz")) as two,
    ):
        one.expect("ready")
        two.expect("ready")
        for child in (one, two):
            wait_until(lambda c=child: int(c.ask("ksm")) >= pages * 4, what="all pages merged")


def test_two_copies_in_one_process_merge_whatever_the_source_was_like(ksmd: Ksmd):
    source = {"m": np.random.default_rng(1).random((700, 900))[:, ::2], "k": "x" * 77}
    copies = [pyksm.copy(source) for _ in range(2)]
    pages = -(-source["m"].nbytes // 4096)
    for copied in copies:
        owner = buffer_of(copied["m"])
        wait_until(
            lambda owner=owner: smaps_kb(owner.address, "KSM", len(owner)) >= pages * 4,
            what="all pages merged",
        )
    copies[0]["m"][0, 0] = -1
    assert copies[1]["m"][0, 0] == source["m"][0, 0]
