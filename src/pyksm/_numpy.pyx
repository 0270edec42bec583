"""numpy's data handler (NEP 49) on the arena of _arena.c; the only room that sees numpy's headers.

The handler's four functions are C and call no Python. A handler is a capsule; every array made
with it holds a reference, so the struct behind it lives as long as the last of them.
"""

import os

from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport strcmp, strncpy
from posix.unistd cimport close, pipe, read, write


cdef extern from "_arena.h":
    ctypedef struct arena_policy:
        size_t min_bytes

    ctypedef struct arena_functions:
        pass

    ctypedef struct arena_counters:
        size_t live_arrays
        size_t live_bytes
        size_t kept_bytes
        size_t mappings
        size_t mapped_bytes

    ctypedef struct arena_extent:
        uintptr_t address
        size_t nbytes

    void *arena_malloc(void *ctx, size_t nbytes) noexcept nogil
    void *arena_calloc(void *ctx, size_t count, size_t size) noexcept nogil
    void *arena_realloc(void *ctx, void *pointer, size_t nbytes) noexcept nogil
    void arena_free(void *ctx, void *pointer, size_t nbytes) noexcept nogil
    void arena_fallback(const arena_functions *functions) noexcept nogil
    void arena_wrap(arena_functions *functions) noexcept nogil
    void arena_everywhere_min(size_t min_bytes) noexcept nogil
    int arena_first_slab(uintptr_t *address, size_t *nbytes) noexcept nogil
    size_t arena_keep_small() noexcept nogil
    void arena_release_kept() noexcept nogil
    void arena_switched_on(int by) noexcept nogil
    void arena_count(arena_counters *counters) noexcept nogil
    size_t arena_extents(arena_extent *extents, size_t room) noexcept nogil


cdef extern from "Python.h":
    ctypedef void (*destructor)(PyObject *) noexcept
    ctypedef struct PyObject:
        pass
    object PyCapsule_New(void *pointer, const char *name, destructor destroy)
    void *PyCapsule_GetPointer(object capsule, const char *name) except NULL
    void *peek "PyCapsule_GetPointer"(PyObject *capsule, const char *name) noexcept


cdef extern from "numpy/arrayobject.h":
    """
    /* PyDataMemAllocator begins with these five, in this order; NEP 49, version 1 */
    _Static_assert(offsetof(PyDataMemAllocator, free) == offsetof(arena_functions, free),
                   "numpy's PyDataMemAllocator has changed");
    """
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept nogil
        void *(*calloc)(void *, size_t, size_t) noexcept nogil
        void *(*realloc)(void *, void *, size_t) noexcept nogil
        void (*free)(void *, void *, size_t) noexcept nogil

    ctypedef struct PyDataMem_Handler:
        char *name
        unsigned char version
        PyDataMemAllocator allocator

    int _import_array() except -1
    object PyDataMem_SetHandler(object handler)
    object PyDataMem_GetHandler()
    PyObject *PyDataMem_DefaultHandler


_import_array()

cdef const char *CAPSULE = "mem_handler"  # the name numpy demands


cdef struct Handler:
    PyDataMem_Handler numpy
    arena_policy policy


cdef void forget(PyObject *capsule) noexcept:
    free(peek(capsule, CAPSULE))


def handler(size_t min_bytes):
    """Make a handler that gives requests of at least min_bytes to the arena."""
    cdef Handler *made = <Handler *> calloc(1, sizeof(Handler))
    if made == NULL:
        raise MemoryError
    strncpy(made.numpy.name, b"pyksm", 6)
    made.numpy.version = 1
    made.policy.min_bytes = min_bytes
    made.numpy.allocator.ctx = &made.policy
    made.numpy.allocator.malloc = arena_malloc
    made.numpy.allocator.calloc = arena_calloc
    made.numpy.allocator.realloc = arena_realloc
    made.numpy.allocator.free = arena_free
    try:
        return PyCapsule_New(made, CAPSULE, forget)
    except BaseException:
        free(made)
        raise


def current():
    """Return the handler of this context."""
    return PyDataMem_GetHandler()


def set_current(handler):
    """Set the handler of this context and return the one before it."""
    return PyDataMem_SetHandler(handler)


cdef PyDataMem_Handler *default = <PyDataMem_Handler *> PyCapsule_GetPointer(
    <object> PyDataMem_DefaultHandler, CAPSULE)
cdef bint wrapped = False
NOTHING = <size_t> -1  # for set_everywhere

arena_fallback(<arena_functions *> &default.allocator)


def wrap_default():
    """Wrap numpy's default handler, once and for ever; False where that cannot be done."""
    global wrapped
    if wrapped:
        return True
    if default.version != 1 or strcmp(default.name, b"default_allocator") != 0:
        return False
    if not writable(&default.allocator, sizeof(PyDataMemAllocator)):
        return False
    arena_wrap(<arena_functions *> &default.allocator)
    wrapped = True
    return True


cdef bint writable(void *memory, size_t nbytes) noexcept:
    """Say whether memory may be written, by letting the kernel write its own bytes to it."""
    cdef int ends[2]
    cdef bint done
    if pipe(ends):
        return False
    done = write(ends[1], memory, nbytes) == <ssize_t> nbytes
    done = done and read(ends[0], memory, nbytes) == <ssize_t> nbytes  # EFAULT if it may not
    close(ends[0])
    close(ends[1])
    return done


def set_everywhere(size_t min_bytes):
    """Let the wrapped default handler give requests of at least min_bytes to the arena."""
    arena_everywhere_min(min_bytes)


def switched_on(int by):
    """Count the allocators that are on; with none on, less freed memory is kept."""
    with nogil:
        arena_switched_on(by)


def first_slab():
    """Return the address and the bytes of a slab, made if there is none."""
    cdef uintptr_t address = 0
    cdef size_t nbytes = 0
    cdef int err
    with nogil:
        err = arena_first_slab(&address, &nbytes)
    if err:
        raise OSError(err, f"mmap of a slab: {os.strerror(err)}")
    return address, nbytes


def keep_small():
    """Switch all memory handed out so far to MADV_NOHUGEPAGE; return the bytes newly switched."""
    cdef size_t switched
    with nogil:
        switched = arena_keep_small()
    return switched


def release_kept():
    """Give the system back all memory that no array uses."""
    with nogil:
        arena_release_kept()


def slabs():
    """Return (address, nbytes) of every marked mapping of the arena."""
    cdef size_t room = 0, count = 0, i
    cdef arena_extent *extents = NULL
    while True:
        count = arena_extents(extents, room)
        if count <= room:
            break
        free(extents)
        room = count + 16
        extents = <arena_extent *> calloc(room, sizeof(arena_extent))
        if extents == NULL:
            raise MemoryError
    try:
        return [(extents[i].address, extents[i].nbytes) for i in range(count)]
    finally:
        free(extents)


def counters():
    """Return what the arena holds, as a dict; bytes are whole pages."""
    cdef arena_counters now
    arena_count(&now)
    return {
        "live_arrays": now.live_arrays,
        "live_bytes": now.live_bytes,
        "kept_bytes": now.kept_bytes,
        "mappings": now.mappings,
        "mapped_bytes": now.mapped_bytes,
    }
