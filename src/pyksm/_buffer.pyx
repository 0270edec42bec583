"""``Buffer``: private anonymous memory that pyksm owns, page-aligned and marked for KSM.

The mapping lives as long as the ``Buffer``, and every export (memoryview, numpy array, ctypes
object) keeps the ``Buffer`` alive; it holds no reference of its own, so no cycle can pass through
it and it needs no part in garbage collection (a Python subclass, which can hold references, gets
CPython's own).

Locks: the state of one Buffer changes under its critical section (the GIL today, a lock of its own
on a free-threaded build), and the ring of live mappings under one mutex. Neither is held while
Python code or a slow system call runs; the mutex is taken over fork, so a child never inherits it
locked.
"""

import contextlib
import os
import re
from operator import index

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc

cimport pyksm._linux as linux
from pyksm.errors import NotSupported

__all__ = ["Buffer", "live"]

cdef extern from "<pthread.h>" nogil:
    """
    static pthread_mutex_t pyksm_ring_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void pyksm_ring_lock(void) { pthread_mutex_lock(&pyksm_ring_mutex); }
    static void pyksm_ring_unlock(void) { pthread_mutex_unlock(&pyksm_ring_mutex); }
    static int pyksm_ring_over_fork(void) {
        return pthread_atfork(pyksm_ring_lock, pyksm_ring_unlock, pyksm_ring_unlock);
    }
    """
    void pyksm_ring_lock()
    void pyksm_ring_unlock()
    int pyksm_ring_over_fork()

cdef extern from "Python.h":
    Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    HUGE = 2 << 20  # a PMD-sized huge page of x86-64 and of 4 KiB-page arm64

cdef size_t PAGE = linux.sysconf(linux._SC_PAGESIZE)
# Rounding up to pages and looking for a huge-page boundary must not overflow.
cdef object LARGEST = PY_SSIZE_T_MAX - 2 * HUGE

cdef struct Mapping:
    uintptr_t address       # 0: closed
    size_t nbytes           # whole pages
    Mapping *previous       # neighbours in the ring of marked mappings; NULL: not in it
    Mapping *following

cdef Mapping ring                       # the ring's head, no mapping itself
ring.previous = ring.following = &ring
cdef bint looked = False                # has a mark of this process been seen in smaps?

if pyksm_ring_over_fork():
    raise MemoryError("pthread_atfork failed")


cdef void enter_ring(Mapping *mapping) noexcept nogil:
    pyksm_ring_lock()
    mapping.following = &ring
    mapping.previous = ring.previous
    ring.previous.following = mapping
    ring.previous = mapping
    pyksm_ring_unlock()


cdef void leave_ring(Mapping *mapping) noexcept nogil:
    pyksm_ring_lock()
    if mapping.following != NULL:
        mapping.previous.following = mapping.following
        mapping.following.previous = mapping.previous
        mapping.following = mapping.previous = NULL
    pyksm_ring_unlock()


cdef uintptr_t map_pages(size_t nbytes) noexcept nogil:
    """Map nbytes of whole pages wherever the kernel likes; 0 with errno set where it cannot."""
    cdef void *start = linux.mmap(NULL, nbytes, linux.PROT_READ | linux.PROT_WRITE,
                                  linux.MAP_PRIVATE | linux.MAP_ANONYMOUS, -1, 0)
    return 0 if start == linux.MAP_FAILED else <uintptr_t> start


cdef void unmap_between(uintptr_t start, uintptr_t end) noexcept nogil:
    if end > start:
        linux.munmap(<void *> start, end - start)


cdef uintptr_t map_huge_aligned(size_t nbytes) noexcept nogil:
    """Map nbytes from a huge-page boundary.

    Since Linux 6.7 (efa7df3e3bb5 "mm: align larger anonymous mappings on THP boundaries") the
    kernel does so by itself for a multiple of the huge page's size; else map more and give back
    both ends.
    """
    cdef size_t whole = (nbytes + HUGE - 1) // HUGE * HUGE
    cdef uintptr_t start = map_pages(whole), aligned
    if start == 0:
        return 0
    if start % HUGE == 0:
        unmap_between(start + nbytes, start + whole)
        return start
    linux.munmap(<void *> start, whole)
    start = map_pages(whole + HUGE)
    if start == 0:
        return 0
    aligned = (start + HUGE - 1) // HUGE * HUGE
    unmap_between(start, aligned)
    unmap_between(aligned + nbytes, start + whole + HUGE)
    return aligned


cdef int advise(uintptr_t address, size_t nbytes, int advice) except -1:
    """madvise, repeated after EINTR; returns the errno, 0 for success."""
    cdef int err
    while True:
        with nogil:
            err = linux.errno if linux.madvise(<void *> address, nbytes, advice) else 0
        if err != linux.EINTR:
            return err
        PyErr_CheckSignals()


cdef object too_many_mappings(str call):
    return MemoryError(
        f"{call} found no room for one more mapping: this process is at vm.max_map_count, or the "
        "kernel is out of memory. Free buffers, or raise it: sysctl vm.max_map_count=1048576"
    )


cdef object checked_size(nbytes):
    """Return nbytes as an int once it is sure that a mapping of it can be asked for."""
    if isinstance(nbytes, bool):
        raise TypeError("nbytes must be a number of bytes, not a bool")
    try:
        size = index(nbytes)
    except TypeError:
        raise TypeError(
            f"nbytes must be an int, not {type(nbytes).__name__}; give a whole number of bytes"
        ) from None
    if size < 1:
        raise ValueError(f"nbytes must be at least 1, not {size}")
    if size > LARGEST:
        raise ValueError(f"nbytes={size} is more than an address space holds ({LARGEST} bytes)")
    return size


def _flags_of(uintptr_t address, smaps="/proc/self/smaps"):
    """Return the VmFlags of the mapping that holds an address; None where nobody tells."""
    header = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ")
    inside = False
    try:
        with open(smaps, "rb") as file:
            for line in file:
                found = header.match(line)
                if found:
                    inside = int(found[1], 16) <= address < int(found[2], 16)
                elif inside and line.startswith(b"VmFlags:"):
                    return line.split()[1:]
    except OSError:
        pass  # no /proc here: the kernel's answer to madvise is all there is
    return None


cdef class Buffer:
    """Memory of your own that KSM may merge: private, page-aligned, zero-filled, writable.

    Anything that takes a writable buffer takes it: ``memoryview``, ``numpy.frombuffer``,
    ``ctypes...from_buffer``, ``file.readinto``. Equal pages of it are merged with those of other
    buffers and processes while ksmd runs (``pyksm.settle`` to make it happen now).

    >>> import pyksm
    >>> with pyksm.Buffer(10_000, missing_ok=True) as buffer:
    ...     with memoryview(buffer) as view:
    ...         view[:5] = b"hello"
    ...     len(buffer), buffer.address % 4096
    (10000, 0)

    The pages are marked with MADV_MERGEABLE (Linux 2.6.32), and the first ``Buffer`` of a process
    looks for the mark in ``/proc/self/smaps``. The memory is unmapped when the ``Buffer`` and all
    that was made from it is gone, or by :meth:`close`. It is not shared: a forked child has its
    own copy-on-write copy of it.

    From 2 MiB on it starts at a huge-page boundary and is first touched through huge pages
    (MADV_HUGEPAGE), which is 3 to 4 times faster than 4 KiB by 4 KiB; KSM splits them by itself.
    Once it is filled, call :meth:`keep_small`.

    ``nbytes``: size in bytes; the mapping is rounded up to whole pages, the rest stays zero.
    ``missing_ok``: where the kernel has no KSM, give plain memory rather than an error.

    Raises ``TypeError`` and ``ValueError`` for what is no size, ``MemoryError`` where the memory
    cannot be had, and ``NotSupported`` where this kernel does not merge (madvise: EINVAL, or no
    ``mg`` in VmFlags).
    """

    cdef Mapping _mapping
    cdef Py_ssize_t _exports
    cdef readonly Py_ssize_t nbytes
    cdef readonly bint mergeable
    cdef object __weakref__

    def __cinit__(self, nbytes, *, missing_ok=False):
        cdef size_t whole
        cdef uintptr_t address
        cdef int err
        self.nbytes = checked_size(nbytes)
        whole = (<size_t> self.nbytes + PAGE - 1) // PAGE * PAGE
        with nogil:
            address = map_huge_aligned(whole) if whole >= HUGE else map_pages(whole)
            err = linux.errno if address == 0 else 0
        if err:
            raise MemoryError(
                f"cannot map {self.nbytes} bytes ({self.nbytes / 2**30:.2f} GiB): "
                f"{os.strerror(err)}"
            )
        self._mapping.nbytes = whole
        self._mapping.address = address
        self._mark(bool(missing_ok))
        if whole >= HUGE:
            # EINVAL: a kernel without huge pages, so there is nothing to gain.
            advise(address, whole, linux.MADV_HUGEPAGE)

    cdef int _mark(self, bint missing_ok) except -1:
        """Let KSM have the pages, and the first time in a process see that it took them."""
        global looked
        cdef int err = advise(self._mapping.address, self._mapping.nbytes, linux.MADV_MERGEABLE)
        if err == linux.EAGAIN or err == linux.ENOMEM:
            raise too_many_mappings("madvise(MADV_MERGEABLE)")
        if not err and not looked:
            flags = _flags_of(self._mapping.address)
            looked = flags is None or b"mg" in flags
            if not looked and not missing_ok:
                raise NotSupported(
                    "this kernel answered MADV_MERGEABLE with success and did nothing (no 'mg' in "
                    "VmFlags)",
                    hint="Run on a Linux kernel with KSM, not an emulation of one; missing_ok=True "
                    "gives plain memory",
                )
            if not looked:
                return 0
        if err:
            if missing_ok:
                return 0
            raise NotSupported(
                f"this kernel does not merge memory (madvise: {os.strerror(err)})",
                hint="It needs CONFIG_KSM=y; missing_ok=True gives plain memory",
                errno=err,
            )
        self.mergeable = True
        enter_ring(&self._mapping)
        return 0

    def __dealloc__(self):
        self._unmap()

    cdef int _unmap(self) noexcept:
        """Take the mapping away from self, then from the process; 0, or the errno."""
        cdef uintptr_t address = self._mapping.address
        cdef size_t nbytes = self._mapping.nbytes
        cdef int err = 0
        if address == 0:
            return 0
        self._mapping.address = 0
        with nogil:
            leave_ring(&self._mapping)
            if linux.munmap(<void *> address, nbytes):
                # It lies amid its neighbours' mapping and the process is at vm.max_map_count, so
                # it cannot be cut out: give back the memory at least, the addresses stay taken.
                err = linux.errno
                linux.madvise(<void *> address, nbytes, linux.MADV_DONTNEED)
        return err

    def close(self):
        """Unmap the memory now; a second call does nothing.

        Raises ``BufferError``, and leaves it open, while a view of it (memoryview, numpy array,
        ctypes object) is alive. Not known as alive is what took the address and let go of the
        view: ``numpy.ndarray(shape, buffer=buffer)`` does (``numpy.frombuffer`` does not), and
        code given :attr:`address`.
        """
        cdef int err
        with cython.critical_section(self):
            if self._exports:
                raise BufferError(
                    f"cannot close a Buffer with {self._exports} live view(s); delete them, or "
                    "just drop the Buffer: it goes with the last of them"
                )
            err = self._unmap()
        if err:
            raise too_many_mappings("munmap")

    def keep_small(self):
        """Keep huge pages out from now on; call it when the memory is filled.

        Without it khugepaged collapses a 2 MiB range of which at most half (max_ptes_shared, 256
        pages) is merged, which copies the merged pages out again. Pages that are huge now stay so
        until KSM splits them; a later first touch goes 4 KiB by 4 KiB. (MADV_NOHUGEPAGE, Linux
        2.6.38; nothing to do on a kernel without huge pages.)
        """
        cdef int err
        err = advise(self.address, self._mapping.nbytes, linux.MADV_NOHUGEPAGE)
        if err == linux.EAGAIN or err == linux.ENOMEM:
            raise too_many_mappings("madvise(MADV_NOHUGEPAGE)")

    @property
    def address(self):
        """Where the memory starts: a multiple of the page size, and of 2 MiB from 2 MiB on."""
        if self._mapping.address == 0:
            raise ValueError("this Buffer is closed")
        return self._mapping.address

    @property
    def closed(self):
        """Whether the memory is gone."""
        return self._mapping.address == 0

    @property
    def readonly(self):
        """A read-only ``memoryview`` of the memory, to hand to whoever must not write."""
        return memoryview(self).toreadonly()

    def __getbuffer__(self, Py_buffer *view, int flags):
        with cython.critical_section(self):
            if self._mapping.address == 0:
                raise ValueError("this Buffer is closed")
            PyBuffer_FillInfo(view, self, <void *> self._mapping.address, self.nbytes, 0, flags)
            self._exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        with cython.critical_section(self):
            self._exports -= 1

    def __len__(self):
        return self.nbytes

    def __bool__(self):
        return True

    def __enter__(self):
        if self._mapping.address == 0:
            raise ValueError("this Buffer is closed")
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except BufferError as refused:
            # The frames of a traceback hold views; the body's exception must not be hidden.
            if error is None:
                raise
            error.add_note(f"pyksm.Buffer was not closed: {refused}")

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "cannot pickle or copy a pyksm.Buffer: it is memory of this process. Pickle "
            "bytes(buffer); pyksm.copy() an array made from it"
        )

    def __repr__(self):
        if self._mapping.address == 0:
            return f"<pyksm.Buffer: {self.nbytes} bytes, closed>"
        plain = "" if self.mergeable else ", not mergeable"
        return f"<pyksm.Buffer: {self.nbytes} bytes at {self._mapping.address:#x}{plain}>"


def live():
    """Return (address, bytes mapped) of every live Buffer that was marked, the oldest first.

    Switching a whole process off wipes all marks (PR_SET_MEMORY_MERGE 0); these are to be put
    back.
    """
    cdef Mapping *mapping
    cdef Mapping *copies = NULL
    cdef size_t room = 0, count = 0, i
    # Making Python objects may free a Buffer, so none is made while the mutex is held.
    while True:
        count = 0
        pyksm_ring_lock()
        mapping = ring.following
        while mapping != &ring:
            if count < room:
                copies[count] = mapping[0]
            count += 1
            mapping = mapping.following
        pyksm_ring_unlock()
        if count <= room:
            break
        free(copies)
        room = count + 16
        copies = <Mapping *> malloc(room * sizeof(Mapping))
        if copies == NULL:
            raise MemoryError(f"no memory to list {count} buffers")
    try:
        return [(copies[i].address, copies[i].nbytes) for i in range(count)]
    finally:
        free(copies)


with contextlib.suppress(TypeError):  # only a build without the stable ABI has static types
    Buffer.__module__ = "pyksm"
