"""Loops over pages: what each page of a range is to KSM right now, read from pagemap.

pagemap's PFNs, /proc/kpageflags and /proc/kpagecount need CAP_SYS_ADMIN (since Linux 4.2);
without it pass -1 for the two and only presence and bit 56, "exclusively mapped", are told.
Formats: Documentation/admin-guide/mm/pagemap.rst.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

cimport pyksm._linux as linux
from pyksm._sys import PAGE_SIZE

cdef enum:
    BATCH = 4096        # pagemap entries a read: 32 KiB
    WINDOW = 16         # entries of kpageflags or kpagecount a read; merged PFNs come in runs

cdef uint64_t PFN_MASK = (1ULL << 55) - 1
cdef uint64_t EXCLUSIVE = 1ULL << 56
cdef uint64_t PRESENT = 1ULL << 63
cdef uint64_t KPF_KSM = 1ULL << 21
cdef uint64_t KPF_ZERO_PAGE = 1ULL << 24
cdef uint64_t PAGE = PAGE_SIZE


cdef struct Window:         # a little read-ahead over a file of one uint64 a PFN
    int fd
    uint64_t first
    uint64_t entries[WINDOW]


cdef void open_window(Window *window, int fd) noexcept nogil:
    memset(window, 0, sizeof(Window))
    window.fd = fd
    window.first = <uint64_t> -1


cdef uint64_t lookup(Window *window, uint64_t pfn) noexcept nogil:
    cdef uint64_t first = pfn - pfn % WINDOW
    cdef ssize_t got
    if first != window.first:
        got = linux.pread(window.fd, window.entries, sizeof(window.entries), first * 8)
        if got < 0:
            got = 0
        memset((<char *> window.entries) + got, 0, sizeof(window.entries) - got)
        window.first = first
    return window.entries[pfn - first]


cdef ssize_t read_batch(int fd, uint64_t *entries, uint64_t page, uint64_t end) noexcept nogil:
    """Fill entries with those of the pages from number page to number end; the number read."""
    cdef uint64_t count = min(<uint64_t> BATCH, end - page)
    cdef ssize_t got = linux.pread(fd, entries, count * 8, page * 8)
    return got // 8 if got > 0 else 0


def survey(int pagemap_fd, int flags_fd, int count_fd, uint64_t start, uint64_t end,
           dict inherited, set inherited_here):
    """Count the pages of [start, end): present, not exclusive, KSM, zero; and pages saved.

    A KSM page with n mappings saves 1 - 1/n page for each of them. ``inherited`` maps a PFN to
    how many of its mappings came by fork, which shared the page without KSM; the addresses of
    those in this very range are ``inherited_here`` and save nothing.
    """
    cdef uint64_t entries[BATCH]
    cdef Window flags, counts
    cdef uint64_t page = start // PAGE, last = end // PAGE, pfn, kind
    cdef ssize_t got, i
    cdef Py_ssize_t present = 0, shared = 0, ksm = 0, zero = 0
    cdef double saved = 0
    cdef long long mappings
    cdef bint forked = bool(inherited)
    open_window(&flags, flags_fd)
    open_window(&counts, count_fd)
    while page < last:
        with nogil:
            got = read_batch(pagemap_fd, entries, page, last)
        if got == 0:
            break
        for i in range(got):
            if not entries[i] & PRESENT:
                continue
            present += 1
            if not entries[i] & EXCLUSIVE:
                shared += 1
            pfn = entries[i] & PFN_MASK
            if flags_fd < 0 or pfn == 0:
                continue
            kind = lookup(&flags, pfn)
            if kind & KPF_ZERO_PAGE:
                zero += 1
            elif kind & KPF_KSM:
                ksm += 1
                mappings = <long long> lookup(&counts, pfn)
                if forked:
                    if (page + i) * PAGE in inherited_here:
                        continue
                    mappings -= inherited.get(pfn, 0)
                if mappings > 1:
                    saved += 1 - 1.0 / mappings
        page += got
    return present, shared, ksm, zero, saved


def ksm_frames(int pagemap_fd, int flags_fd, uint64_t start, uint64_t end):
    """Return {address: PFN} of the KSM pages in [start, end)."""
    cdef uint64_t entries[BATCH]
    cdef Window flags
    cdef uint64_t page = start // PAGE, last = end // PAGE, pfn
    cdef ssize_t got, i
    cdef dict frames = {}
    open_window(&flags, flags_fd)
    while page < last:
        with nogil:
            got = read_batch(pagemap_fd, entries, page, last)
        if got == 0:
            break
        for i in range(got):
            pfn = entries[i] & PFN_MASK
            if entries[i] & PRESENT and pfn and lookup(&flags, pfn) & KPF_KSM:
                frames[(page + i) * PAGE] = pfn
        page += got
    return frames
