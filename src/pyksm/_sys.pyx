"""One function per kernel call: arguments through the door, errno out of it, and no policy.

Each call releases the GIL, takes errno before any Python code can run, and repeats itself after
EINTR once Python's signal handlers have had their say (PEP 475). CPython installs handlers
without SA_RESTART, and MADV_UNMERGEABLE then returns EINTR with part of the range done; repeating
it completes the rest.
"""

import os

from cpython.buffer cimport PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uintptr_t
from libc.stdlib cimport strtoll
from posix.dlfcn cimport dlsym

cimport pyksm._linux as linux

cdef enum:
    M_MMAP_THRESHOLD = -3  # malloc.h of glibc; musl has no such header

PAGE_SIZE = linux.sysconf(linux._SC_PAGESIZE)
MERGEABLE = linux.MADV_MERGEABLE
UNMERGEABLE = linux.MADV_UNMERGEABLE
HUGEPAGE = linux.MADV_HUGEPAGE
NOHUGEPAGE = linux.MADV_NOHUGEPAGE
POPULATE_WRITE = linux.MADV_POPULATE_WRITE


cdef object _error(int err, str call):
    return OSError(err, f"{call}: {os.strerror(err)}")


def madvise(uintptr_t address, size_t nbytes, int advice):
    cdef int rc, err
    while True:
        with nogil:
            rc = linux.madvise(<void *> address, nbytes, advice)
            err = linux.errno if rc else 0
        if not rc:
            return
        if err != linux.EINTR:
            raise _error(err, "madvise")
        PyErr_CheckSignals()


def get_memory_merge():
    cdef int rc, err
    with nogil:
        rc = linux.prctl(linux.PR_GET_MEMORY_MERGE, 0, 0, 0, 0)
        err = linux.errno if rc < 0 else 0
    if rc < 0:
        raise _error(err, "prctl(PR_GET_MEMORY_MERGE)")
    return rc != 0


def set_memory_merge(bint on):
    cdef int rc, err
    with nogil:
        rc = linux.prctl(linux.PR_SET_MEMORY_MERGE, on, 0, 0, 0)
        err = linux.errno if rc else 0
    if rc:
        raise _error(err, "prctl(PR_SET_MEMORY_MERGE)")


def address_of(buffer):
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_STRIDED_RO)
    address = <uintptr_t> view.buf
    PyBuffer_Release(&view)
    return address


def pread_ints(tuple fds):
    """Read one decimal from the start of each open file; None where there is none."""
    cdef int[64] numbers
    cdef long long[64] values
    cdef bint[64] found
    cdef Py_ssize_t i, count = len(fds)
    if count > 64:
        raise ValueError(f"at most 64 files at once, not {count}")
    for i in range(count):
        numbers[i] = fds[i]
    with nogil:  # once for all: for each file apart it costs some 7 % more
        for i in range(count):
            found[i] = _pread_int(numbers[i], &values[i])
    return [values[i] if found[i] else None for i in range(count)]


cdef bint _pread_int(int fd, long long *value) noexcept nogil:
    cdef char[32] text
    cdef char *end
    cdef ssize_t got = linux.pread(fd, text, sizeof(text) - 1, 0)
    if got <= 0:
        return False
    text[got] = 0
    value[0] = strtoll(text, &end, 10)
    return end != text


ctypedef int (*mallopt_function)(int parameter, int value) noexcept nogil


def set_mmap_threshold(int nbytes):
    """Fix glibc's M_MMAP_THRESHOLD; False where the C library has no mallopt (musl)."""
    cdef mallopt_function mallopt = <mallopt_function> dlsym(NULL, b"mallopt")
    if mallopt == NULL:
        return False
    return mallopt(M_MMAP_THRESHOLD, nbytes) == 1
