/* Page-aligned, mergeable memory for arrays.
 *
 * Two kinds of private anonymous mappings, both marked MADV_MERGEABLE from birth to death:
 *
 *   slabs, 64 MiB, aligned to their size, out of which runs of pages up to 8 MiB are cut.
 *     Adjacent slabs become one VMA, and freeing a run changes no VMA at all: a mapping per
 *     array would need a VMA for each second one freed and meet vm.max_map_count.
 *   big mappings, one array each, aligned to 2 MiB.
 *
 * Freed pages are kept, still marked, for the next array that asked to be merged: a first touch
 * costs 1.5 us a page, a reuse nothing. What is kept is bounded (`budget` below); beyond it the
 * largest free runs go back to the kernel with MADV_DONTNEED, which splits no VMA, and slabs
 * without any array and freed big mappings with munmap.
 *
 * Memory is first touched through huge pages (MADV_HUGEPAGE: a third of the cost) and, once
 * filled, kept with MADV_NOHUGEPAGE (arena_keep_small), or khugepaged would collapse, and thereby
 * unmerge, what ksmd has merged (max_ptes_shared, max_ptes_none in mm/khugepaged.c).
 *
 * One mutex; the calls under it are an madvise or an mmap. It is taken around fork, so a child
 * finds the arena whole and goes on with its own copy.
 */

#include "_arena.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_MERGEABLE
#define MADV_MERGEABLE 12
#endif
#ifndef MADV_HUGEPAGE
#define MADV_HUGEPAGE 14
#define MADV_NOHUGEPAGE 15
#endif

#define MIB ((size_t)1 << 20)
#define HUGE_BYTES (2 * MIB)
#define SLAB_BYTES (64 * MIB)
#define RUN_BYTES (8 * MIB)         /* larger arrays get a mapping of their own */
#define KEEP_ON_BYTES (256 * MIB)   /* kept while an allocator is switched on */
#define KEEP_OFF_BYTES (32 * MIB)   /* kept when none is */
#define KEEP_LIVE_SHARE 8           /* and, in both cases, an eighth of what is alive */
#define PURGE_BYTES (16 * MIB)      /* given back by one call at most: a short critical section */
#define CACHED_MAX 16               /* freed big mappings kept */
#define FIT_TRIES 8                 /* runs looked at in the bin that may hold an exact fit */

#define USED 0x80000000u
#define BINS 256
#define WORDS (BINS / 64)

/* One per page of a slab, meaningful at the first and the last page of each run (boundary tags):
   the runs of a slab tile it without gaps. */
typedef struct {
    uint32_t pages;      /* length of the run, | USED; also at its last page */
    uint32_t dirty;      /* free run: upper bound of its pages that may hold old bytes */
    uint32_t prev, next; /* free list, as handles; 0 ends it */
} page_tag;

typedef struct mapping {
    struct mapping *prev, *next; /* every marked mapping */
    char *base;
    size_t nbytes;
    size_t small;    /* bytes from the base on that are MADV_NOHUGEPAGE */
    page_tag *tags;  /* slabs only */
    uint32_t id;     /* slabs only */
    uint32_t top;    /* slabs: pages ever handed out; those above hold zeros and no memory */
    size_t used;     /* big: bytes asked for, rounded to pages; 0 while cached */
} mapping;

enum { DIRTY, CLEAN, KINDS }; /* of free runs: may hold old bytes and memory, or certainly not */

static struct {
    pthread_mutex_t lock;
    mapping *all;
    /* registry: open addressing by the address of the mapping */
    mapping **table;
    size_t table_size, table_used;
    /* slabs by id; id 0 is none */
    mapping **slabs;
    uint32_t slabs_size;
    uint32_t bins[KINDS][BINS];
    uint64_t bitmap[KINDS][WORDS];
    mapping *cached[CACHED_MAX]; /* freed big mappings, oldest first */
    unsigned cached_count;
    size_t live_arrays, live_bytes, kept_bytes, mappings, mapped_bytes;
    long on;
} arena = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t started = PTHREAD_ONCE_INIT;
static size_t page_bytes = 4096;
static unsigned page_shift = 12;
static uint32_t slab_pages;
static unsigned handle_shift; /* handle = slab id << handle_shift | page */

static void lock_arena(void) { pthread_mutex_lock(&arena.lock); }
static void unlock_arena(void) { pthread_mutex_unlock(&arena.lock); }

static void start(void)
{
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    page_shift = (unsigned)__builtin_ctzl(page_bytes);
    slab_pages = (uint32_t)(SLAB_BYTES >> page_shift);
    handle_shift = (unsigned)__builtin_ctz(slab_pages);
    pthread_atfork(lock_arena, unlock_arena, unlock_arena);
}

static size_t round_up(size_t nbytes, size_t step) { return (nbytes + step - 1) & ~(step - 1); }

/* ---------------------------------------------------------------------- registry */

static size_t slot_of(const char *base, size_t size)
{
    uint64_t key = (uint64_t)((uintptr_t)base / HUGE_BYTES) * 0x9E3779B97F4A7C15u;
    return (size_t)(key >> 32) & (size - 1);
}

static mapping *registered(const char *base)
{
    if (!arena.table_size)
        return NULL;
    size_t at = slot_of(base, arena.table_size);
    while (arena.table[at] && arena.table[at]->base != base)
        at = (at + 1) & (arena.table_size - 1);
    return arena.table[at];
}

static void table_put(mapping **table, size_t size, mapping *m)
{
    size_t at = slot_of(m->base, size);
    while (table[at])
        at = (at + 1) & (size - 1);
    table[at] = m;
}

/* Make room for one more in the registry; 0 when there is no memory for that. */
static int reserve_slot(void)
{
    if ((arena.table_used + 1) * 2 <= arena.table_size)
        return 1;
    size_t size = arena.table_size ? arena.table_size * 2 : 256;
    mapping **table = calloc(size, sizeof *table);
    if (!table)
        return 0;
    for (size_t i = 0; i < arena.table_size; i++)
        if (arena.table[i])
            table_put(table, size, arena.table[i]);
    free(arena.table);
    arena.table = table;
    arena.table_size = size;
    return 1;
}

static void enlist(mapping *m) /* after reserve_slot */
{
    table_put(arena.table, arena.table_size, m);
    arena.table_used++;
    m->prev = NULL;
    m->next = arena.all;
    if (arena.all)
        arena.all->prev = m;
    arena.all = m;
    arena.mappings++;
    arena.mapped_bytes += m->nbytes;
}

static void delist(mapping *m)
{
    size_t mask = arena.table_size - 1, at = slot_of(m->base, arena.table_size);
    while (arena.table[at] != m)
        at = (at + 1) & mask;
    arena.table[at] = NULL;
    for (size_t i = (at + 1) & mask; arena.table[i]; i = (i + 1) & mask) {
        mapping *moved = arena.table[i];
        arena.table[i] = NULL;
        table_put(arena.table, arena.table_size, moved);
    }
    arena.table_used--;
    if (m->prev)
        m->prev->next = m->next;
    else
        arena.all = m->next;
    if (m->next)
        m->next->prev = m->prev;
    arena.mappings--;
    arena.mapped_bytes -= m->nbytes;
}

/* The mapping a pointer of ours lies in: a slab, or a big mapping at its start. Any other
   page-aligned pointer (one in 256 of malloc's) is not ours: NULL. */
static mapping *mapping_of(const char *pointer)
{
    mapping *m = registered((char *)((uintptr_t)pointer & ~(uintptr_t)(SLAB_BYTES - 1)));
    if (m && m->tags)
        return m;
    m = registered(pointer);
    return m && !m->tags ? m : NULL;
}

/* ---------------------------------------------------------------------- mappings */

/* Map nbytes (a multiple of 2 MiB) at a multiple of `alignment`; NULL when there is no memory.
   `hint` keeps mappings side by side, where they share one VMA. */
static char *map_aligned(size_t nbytes, size_t alignment, char *hint)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    char *base = mmap(hint, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    if (!((uintptr_t)base & (alignment - 1)))
        return base;
    munmap(base, nbytes);
    /* PROT_NONE is not charged where overcommit is strict */
    char *wide = mmap(NULL, nbytes + alignment, PROT_NONE, flags, -1, 0);
    if (wide == MAP_FAILED)
        return NULL;
    base = (char *)round_up((uintptr_t)wide, alignment);
    if (base > wide)
        munmap(wide, (size_t)(base - wide));
    size_t behind = (size_t)(wide + alignment - base);
    if (behind)
        munmap(base + nbytes, behind);
    if (mprotect(base, nbytes, PROT_READ | PROT_WRITE)) {
        munmap(base, nbytes);
        return NULL;
    }
    return base;
}

/* Map and mark; `huge` bytes of it are for huge pages. NULL with errno set when refused. */
static char *map_marked(size_t nbytes, size_t alignment, char *hint, size_t huge)
{
    char *base = map_aligned(nbytes, alignment, hint);
    if (!base) {
        errno = ENOMEM;
        return NULL;
    }
    if (huge)
        madvise(base, huge, MADV_HUGEPAGE); /* EINVAL: a kernel without huge pages, fine */
    int rc;
    do
        rc = madvise(base, nbytes, MADV_MERGEABLE);
    while (rc && errno == EINTR);
    if (rc) {
        int err = errno;
        munmap(base, nbytes);
        errno = err;
        return NULL;
    }
    return base;
}

/* Mappings to give back once the lock is released. */
typedef struct {
    mapping *first;
} doomed;

static void doom(doomed *dead, mapping *m)
{
    delist(m);
    m->next = dead->first;
    dead->first = m;
}

static void bury(doomed *dead)
{
    while (dead->first) {
        mapping *m = dead->first;
        dead->first = m->next;
        munmap(m->base, m->nbytes);
        free(m->tags);
        free(m);
    }
}

/* ---------------------------------------------------------------------- free runs */

static page_tag *tag_of(uint32_t handle)
{
    return &arena.slabs[handle >> handle_shift]->tags[handle & (slab_pages - 1)];
}

/* Bins: exact up to 64 pages, then sixteen to each doubling. */
static unsigned bin_of(uint32_t pages)
{
    if (pages <= 64)
        return pages - 1;
    unsigned e = 31u - (unsigned)__builtin_clz(pages);
    return 64 + (e - 6) * 16 + ((pages >> (e - 4)) & 15);
}

static void write_tags(mapping *slab, uint32_t page, uint32_t pages, uint32_t used)
{
    slab->tags[page].pages = pages | used;
    slab->tags[page + pages - 1].pages = pages | used;
}

static void put_run(mapping *slab, uint32_t page, uint32_t pages, uint32_t dirty)
{
    int kind = dirty ? DIRTY : CLEAN;
    unsigned bin = bin_of(pages);
    uint32_t handle = slab->id << handle_shift | page, next = arena.bins[kind][bin];
    write_tags(slab, page, pages, 0);
    page_tag *tag = &slab->tags[page];
    tag->dirty = dirty;
    tag->prev = 0;
    tag->next = next;
    if (next)
        tag_of(next)->prev = handle;
    arena.bins[kind][bin] = handle;
    arena.bitmap[kind][bin / 64] |= (uint64_t)1 << bin % 64;
    arena.kept_bytes += (size_t)dirty << page_shift;
}

static void pull_run(mapping *slab, uint32_t page)
{
    page_tag *tag = &slab->tags[page];
    int kind = tag->dirty ? DIRTY : CLEAN;
    unsigned bin = bin_of(tag->pages);
    if (tag->next)
        tag_of(tag->next)->prev = tag->prev;
    if (tag->prev)
        tag_of(tag->prev)->next = tag->next;
    else {
        arena.bins[kind][bin] = tag->next;
        if (!tag->next)
            arena.bitmap[kind][bin / 64] &= ~((uint64_t)1 << bin % 64);
    }
    arena.kept_bytes -= (size_t)tag->dirty << page_shift;
}

/* The handle of a free run of at least this many pages, or 0. */
static uint32_t find_run(int kind, uint32_t pages)
{
    unsigned bin = bin_of(pages);
    uint32_t handle = arena.bins[kind][bin];
    for (int tries = FIT_TRIES; handle && tries; tries--) {
        page_tag *tag = tag_of(handle);
        if (tag->pages >= pages)
            return handle;
        handle = tag->next;
    }
    /* every run of a later bin is long enough */
    bin++;
    for (unsigned word = bin / 64; word < WORDS; word++) {
        uint64_t bits = arena.bitmap[kind][word];
        if (word == bin / 64)
            bits &= ~(uint64_t)0 << bin % 64;
        if (bits)
            return arena.bins[kind][word * 64 + (unsigned)__builtin_ctzll(bits)];
    }
    return 0;
}

static uint32_t find_longest_dirty(void)
{
    for (int word = WORDS - 1; word >= 0; word--) {
        uint64_t bits = arena.bitmap[DIRTY][word];
        if (bits)
            return arena.bins[DIRTY][word * 64 + 63 - __builtin_clzll(bits)];
    }
    return 0;
}

/* How many of the pages [page, page + pages) were ever handed out. */
static uint32_t below_top(const mapping *slab, uint32_t page, uint32_t pages)
{
    if (slab->top <= page)
        return 0;
    return slab->top - page < pages ? slab->top - page : pages;
}

static void put_remainder(mapping *slab, uint32_t page, uint32_t pages, uint32_t dirty)
{
    uint32_t touched = below_top(slab, page, pages);
    put_run(slab, page, pages, dirty < touched ? dirty : touched);
}

/* A free run becomes `pages` used ones and a free remainder. Returns how many bytes from its
   start may hold old bytes. */
static size_t take_run(mapping *slab, uint32_t page, uint32_t pages)
{
    uint32_t whole = slab->tags[page].pages, dirty = slab->tags[page].dirty;
    pull_run(slab, page);
    uint32_t old = dirty ? below_top(slab, page, pages) : 0;
    if (whole > pages)
        put_remainder(slab, page + pages, whole - pages, dirty);
    write_tags(slab, page, pages, USED);
    if (slab->top < page + pages)
        slab->top = page + pages;
    return (size_t)old << page_shift;
}

/* ---------------------------------------------------------------------- slabs */

static uint32_t free_slab_id(void)
{
    for (uint32_t id = 1; id < arena.slabs_size; id++)
        if (!arena.slabs[id])
            return id;
    uint32_t size = arena.slabs_size ? arena.slabs_size * 2 : 64;
    if ((uint64_t)size << handle_shift > (uint64_t)UINT32_MAX + 1)
        return 0;
    mapping **slabs = realloc(arena.slabs, size * sizeof *slabs);
    if (!slabs)
        return 0;
    memset(slabs + arena.slabs_size, 0, (size - arena.slabs_size) * sizeof *slabs);
    uint32_t id = arena.slabs_size ? arena.slabs_size : 1;
    arena.slabs = slabs;
    arena.slabs_size = size;
    return id;
}

/* Below the lowest slab: the kernel hands out addresses downwards. */
static char *slab_hint(void)
{
    char *lowest = NULL;
    for (uint32_t id = 1; id < arena.slabs_size; id++)
        if (arena.slabs[id] && (!lowest || arena.slabs[id]->base < lowest))
            lowest = arena.slabs[id]->base;
    return lowest ? lowest - SLAB_BYTES : NULL;
}

static mapping *new_slab(void)
{
    uint32_t id = free_slab_id();
    mapping *slab = calloc(1, sizeof *slab);
    page_tag *tags = calloc(slab_pages, sizeof *tags);
    char *base = NULL;
    errno = ENOMEM;
    if (id && slab && tags && reserve_slot())
        base = map_marked(SLAB_BYTES, SLAB_BYTES, slab_hint(), SLAB_BYTES);
    if (!base) {
        int err = errno;
        free(slab);
        free(tags);
        errno = err;
        return NULL;
    }
    slab->base = base;
    slab->nbytes = SLAB_BYTES;
    slab->tags = tags;
    slab->id = id;
    arena.slabs[id] = slab;
    enlist(slab);
    put_run(slab, 0, slab_pages, 0);
    return slab;
}

static void drop_slab(mapping *slab, doomed *dead)
{
    pull_run(slab, 0);
    arena.slabs[slab->id] = NULL;
    doom(dead, slab);
}

/* Return a run to the free ones, together with its free neighbours. */
static void free_run(mapping *slab, uint32_t page, uint32_t pages)
{
    uint32_t dirty = pages;
    uint32_t next = page + pages;
    if (next < slab_pages && !(slab->tags[next].pages & USED)) {
        pull_run(slab, next);
        dirty += slab->tags[next].dirty;
        pages += slab->tags[next].pages;
    }
    if (page && !(slab->tags[page - 1].pages & USED)) {
        uint32_t before = page - slab->tags[page - 1].pages;
        pull_run(slab, before);
        dirty += slab->tags[before].dirty;
        pages += slab->tags[before].pages;
        page = before;
    }
    put_run(slab, page, pages, dirty);
}

/* ---------------------------------------------------------------------- what is kept */

static size_t budget(void)
{
    size_t keep = arena.on > 0 ? KEEP_ON_BYTES : KEEP_OFF_BYTES;
    return keep + arena.live_bytes / KEEP_LIVE_SHARE;
}

static void drop_cached(unsigned index, doomed *dead)
{
    mapping *m = arena.cached[index];
    arena.kept_bytes -= m->nbytes;
    arena.cached_count--;
    memmove(&arena.cached[index], &arena.cached[index + 1],
            (arena.cached_count - index) * sizeof *arena.cached);
    doom(dead, m);
}

/* The pages from here on are as new: to be touched through huge pages again. */
static void lower_top(mapping *slab, uint32_t page)
{
    size_t small = round_up((size_t)page << page_shift, HUGE_BYTES);
    slab->top = page;
    if (slab->small > small) {
        madvise(slab->base + small, slab->small - small, MADV_HUGEPAGE);
        slab->small = small;
    }
}

/* Give back the memory of the longest free run; returns how much that was. */
static size_t purge_run(doomed *dead)
{
    uint32_t handle = find_longest_dirty();
    if (!handle)
        return 0;
    mapping *slab = arena.slabs[handle >> handle_shift];
    uint32_t page = handle & (slab_pages - 1);
    uint32_t pages = slab->tags[page].pages, dirty = slab->tags[page].dirty;
    if (pages == slab_pages) {
        drop_slab(slab, dead); /* unmapped once the lock is released */
        return (size_t)dirty << page_shift;
    }
    pull_run(slab, page);
    size_t touched = (size_t)below_top(slab, page, pages) << page_shift;
    if (madvise(slab->base + ((size_t)page << page_shift), touched, MADV_DONTNEED)) {
        put_run(slab, page, pages, dirty); /* EINVAL: mlocked; it stays as it is */
        return 0;
    }
    if (page + pages >= slab->top)
        lower_top(slab, page);
    put_run(slab, page, pages, 0);
    return (size_t)dirty << page_shift;
}

static void keep_within(size_t allowed, doomed *dead)
{
    size_t done = 0;
    while (arena.kept_bytes > allowed && done < PURGE_BYTES) {
        if (arena.cached_count) {
            done += arena.cached[0]->nbytes;
            drop_cached(0, dead);
            continue;
        }
        size_t gone = purge_run(dead);
        if (!gone)
            break;
        done += gone;
    }
}

static void keep_within_budget(doomed *dead) { keep_within(budget(), dead); }

/* ---------------------------------------------------------------------- big mappings */

/* The last, partial 2 MiB of a big mapping is touched through a huge page only if at least half
   of it is asked for. */
static size_t huge_part(size_t used)
{
    return (used + HUGE_BYTES / 2) & ~(HUGE_BYTES - 1);
}

static mapping *take_cached(size_t nbytes)
{
    for (unsigned i = arena.cached_count; i-- > 0;) {
        mapping *m = arena.cached[i];
        if (m->nbytes < nbytes || m->nbytes - nbytes > nbytes / 8)
            continue;
        arena.kept_bytes -= m->nbytes;
        arena.cached_count--;
        memmove(&arena.cached[i], &arena.cached[i + 1],
                (arena.cached_count - i) * sizeof *arena.cached);
        return m;
    }
    return NULL;
}

static void *big_alloc(size_t used, int zeroed)
{
    used = round_up(used, page_bytes);
    size_t nbytes = round_up(used, HUGE_BYTES);
    lock_arena();
    mapping *m = take_cached(nbytes);
    if (m) {
        arena.live_arrays++;
        arena.live_bytes += used;
        m->used = used;
        if (zeroed)
            m->small = 0;
        unlock_arena();
        if (zeroed) { /* lazily, as fresh memory would be */
            if (madvise(m->base, m->nbytes, MADV_DONTNEED)) /* EINVAL: mlocked */
                memset(m->base, 0, m->nbytes);
            madvise(m->base, huge_part(used), MADV_HUGEPAGE);
        }
        return m->base;
    }
    unlock_arena();
    m = calloc(1, sizeof *m);
    char *base = m ? map_marked(nbytes, HUGE_BYTES, NULL, huge_part(used)) : NULL;
    if (!base) {
        free(m);
        return NULL;
    }
    m->base = base;
    m->nbytes = nbytes;
    m->used = used;
    lock_arena();
    if (!reserve_slot()) {
        unlock_arena();
        munmap(base, nbytes);
        free(m);
        return NULL;
    }
    enlist(m);
    arena.live_arrays++;
    arena.live_bytes += used;
    unlock_arena();
    return base;
}

/* With the lock held. */
static void big_free(mapping *m, doomed *dead)
{
    arena.live_arrays--;
    arena.live_bytes -= m->used;
    m->used = 0;
    if (m->nbytes > budget() / 2) {
        doom(dead, m);
        return;
    }
    if (arena.cached_count == CACHED_MAX)
        drop_cached(0, dead);
    arena.cached[arena.cached_count++] = m;
    arena.kept_bytes += m->nbytes;
    keep_within_budget(dead);
}

/* Resize a big mapping, moving pages rather than bytes; NULL where that cannot be done. */
static void *big_resize(mapping *m, size_t used)
{
    used = round_up(used, page_bytes);
    size_t nbytes = round_up(used, HUGE_BYTES);
    lock_arena();
    size_t had = m->nbytes;
    if (nbytes <= had) {
        arena.live_bytes += used - m->used;
        arena.mapped_bytes -= had - nbytes;
        m->used = used;
        m->nbytes = nbytes;
        if (m->small > nbytes)
            m->small = nbytes;
        unlock_arena();
        if (nbytes < had)
            munmap(m->base + nbytes, had - nbytes);
        return m->base;
    }
    int small = m->small != 0;
    unlock_arena();
    /* mremap wants one VMA, so one kind of page for the whole of it */
    madvise(m->base, had, small ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
    char *base = map_aligned(nbytes, HUGE_BYTES, NULL);
    if (!base)
        return NULL;
    lock_arena(); /* keep_small and slabs() must not see it half moved */
    if (mremap(m->base, had, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, base) == MAP_FAILED) {
        unlock_arena();
        munmap(base, nbytes);
        return NULL;
    }
    delist(m); /* and so there is a slot for it */
    arena.live_bytes += used - m->used;
    m->base = base;
    m->nbytes = nbytes;
    m->used = used;
    m->small = small ? nbytes : 0;
    enlist(m);
    unlock_arena();
    return base;
}

/* ---------------------------------------------------------------------- runs */

static void *run_alloc(size_t nbytes, int zeroed)
{
    uint32_t pages = (uint32_t)(round_up(nbytes, page_bytes) >> page_shift);
    lock_arena();
    uint32_t handle = find_run(DIRTY, pages);
    if (!handle)
        handle = find_run(CLEAN, pages);
    mapping *slab = handle ? arena.slabs[handle >> handle_shift] : new_slab();
    if (!slab) {
        unlock_arena();
        return NULL;
    }
    uint32_t page = handle & (slab_pages - 1);
    size_t old = take_run(slab, page, pages);
    arena.live_arrays++;
    arena.live_bytes += (size_t)pages << page_shift;
    unlock_arena();
    char *pointer = slab->base + ((size_t)page << page_shift);
    if (zeroed && old)
        memset(pointer, 0, old < nbytes ? old : nbytes);
    return pointer;
}

static __attribute__((noinline)) void *arena_alloc(size_t nbytes, int zeroed)
{
    pthread_once(&started, start);
    if (nbytes > PTRDIFF_MAX - SLAB_BYTES)
        return NULL;
    if (nbytes > RUN_BYTES)
        return big_alloc(nbytes, zeroed);
    if (!nbytes)
        nbytes = 1;
    void *pointer = run_alloc(nbytes, zeroed);
    return pointer ? pointer : big_alloc(nbytes, zeroed); /* no room for a whole slab */
}

static uint32_t page_in(const mapping *slab, const char *pointer)
{
    return (uint32_t)((size_t)(pointer - slab->base) >> page_shift);
}

/* No page is smaller than this: a pointer with any of these bits is not ours, without a lookup. */
#define OFF_PAGE 4095

/* Free a page-aligned pointer if it is ours; 0 if it is not. */
static __attribute__((noinline)) int arena_release(void *pointer)
{
    doomed dead = {NULL};
    lock_arena();
    mapping *m = mapping_of(pointer);
    if (m && m->tags) {
        uint32_t page = page_in(m, pointer), pages = m->tags[page].pages & ~USED;
        arena.live_arrays--;
        arena.live_bytes -= (size_t)pages << page_shift;
        free_run(m, page, pages);
        keep_within_budget(&dead);
    } else if (m) {
        big_free(m, &dead);
    }
    unlock_arena();
    bury(&dead);
    return m != NULL;
}

/* Make a run longer or shorter where it lies; 0 where that cannot be done. With the lock held. */
static int run_resize(mapping *slab, uint32_t page, uint32_t want)
{
    uint32_t pages = slab->tags[page].pages & ~USED, next = page + pages;
    if (want < pages) {
        write_tags(slab, page, want, USED);
        free_run(slab, page + want, pages - want);
    } else if (want > pages) {
        if (next >= slab_pages || slab->tags[next].pages & USED ||
            slab->tags[next].pages < want - pages)
            return 0;
        take_run(slab, next, want - pages);
        write_tags(slab, page, want, USED);
    }
    arena.live_bytes += ((size_t)want << page_shift) - ((size_t)pages << page_shift);
    return 1;
}

/* Resize one of ours within the arena without copying; NULL where that cannot be done.
   `have` gets the bytes the old block holds, 0 if it is not ours. */
static void *arena_resize(void *pointer, size_t nbytes, int stays, size_t *have)
{
    *have = 0;
    if ((uintptr_t)pointer & OFF_PAGE)
        return NULL;
    lock_arena();
    mapping *m = mapping_of(pointer);
    if (!m) {
        unlock_arena();
        return NULL;
    }
    if (m->tags) {
        uint32_t page = page_in(m, pointer);
        *have = (size_t)(m->tags[page].pages & ~USED) << page_shift;
        uint32_t want = (uint32_t)(round_up(nbytes ? nbytes : 1, page_bytes) >> page_shift);
        int done = stays && nbytes <= RUN_BYTES && run_resize(m, page, want);
        unlock_arena();
        return done ? pointer : NULL;
    }
    *have = m->used;
    unlock_arena();
    return stays && nbytes > RUN_BYTES ? big_resize(m, nbytes) : NULL;
}

/* ---------------------------------------------------------------------- the handlers */

/* What serves small requests: numpy's default functions as they were before any wrapping. They
   keep a cache of small blocks, which the C library alone would not match. */
static arena_functions fallback __attribute__((aligned(64))); /* one cache line */

static void *malloc_from(size_t min_bytes, size_t nbytes)
{
    if (__builtin_expect(nbytes < min_bytes, 1))
        return fallback.malloc(fallback.ctx, nbytes);
    return arena_alloc(nbytes, 0);
}

static void *calloc_from(size_t min_bytes, size_t count, size_t size)
{
    size_t nbytes;
    if (__builtin_mul_overflow(count, size, &nbytes))
        return NULL;
    if (nbytes < min_bytes)
        return fallback.calloc(fallback.ctx, count, size);
    return arena_alloc(nbytes, 1);
}

static void *realloc_from(size_t min_bytes, void *pointer, size_t nbytes)
{
    if (!pointer)
        return malloc_from(min_bytes, nbytes);
    int large = nbytes >= min_bytes;
    size_t have;
    void *moved = arena_resize(pointer, nbytes, large, &have);
    if (moved)
        return moved;
    if (have) { /* from the arena */
        moved = malloc_from(min_bytes, nbytes);
        if (moved) {
            memcpy(moved, pointer, have < nbytes ? have : nbytes);
            arena_release(pointer);
        }
        return moved;
    }
    /* only its owner knows how long the old block is, so let the owner make it long enough */
    pointer = fallback.realloc(fallback.ctx, pointer, nbytes);
    if (!pointer || !large)
        return pointer;
    moved = arena_alloc(nbytes, 0);
    if (!moved)
        return pointer;
    memcpy(moved, pointer, nbytes);
    fallback.free(fallback.ctx, pointer, nbytes);
    return moved;
}

void arena_free(void *ctx, void *pointer, size_t nbytes)
{
    (void)ctx;
    if (__builtin_expect((uintptr_t)pointer & OFF_PAGE, 1) || !arena_release(pointer))
        fallback.free(fallback.ctx, pointer, nbytes);
}

static size_t policy_of(void *ctx) { return ((arena_policy *)ctx)->min_bytes; }

void *arena_malloc(void *ctx, size_t nbytes) { return malloc_from(policy_of(ctx), nbytes); }

void *arena_calloc(void *ctx, size_t count, size_t size)
{
    return calloc_from(policy_of(ctx), count, size);
}

void *arena_realloc(void *ctx, void *pointer, size_t nbytes)
{
    return realloc_from(policy_of(ctx), pointer, nbytes);
}

/* numpy's default handler, wrapped: the same with a policy for the whole process */

static size_t everywhere_min = SIZE_MAX;

static size_t everywhere(void) { return __atomic_load_n(&everywhere_min, __ATOMIC_RELAXED); }

static void *everywhere_malloc(void *ctx, size_t nbytes)
{
    (void)ctx;
    return malloc_from(everywhere(), nbytes);
}

static void *everywhere_calloc(void *ctx, size_t count, size_t size)
{
    (void)ctx;
    return calloc_from(everywhere(), count, size);
}

static void *everywhere_realloc(void *ctx, void *pointer, size_t nbytes)
{
    (void)ctx;
    return realloc_from(everywhere(), pointer, nbytes);
}

void arena_fallback(const arena_functions *functions) { fallback = *functions; }

void arena_wrap(arena_functions *functions)
{
    pthread_once(&started, start);
    /* what frees goes in first: no pointer of ours may ever meet an unwrapped free */
    __atomic_store_n(&functions->free, arena_free, __ATOMIC_SEQ_CST);
    __atomic_store_n(&functions->realloc, everywhere_realloc, __ATOMIC_SEQ_CST);
    __atomic_store_n(&functions->malloc, everywhere_malloc, __ATOMIC_SEQ_CST);
    __atomic_store_n(&functions->calloc, everywhere_calloc, __ATOMIC_SEQ_CST);
}

void arena_everywhere_min(size_t min_bytes)
{
    __atomic_store_n(&everywhere_min, min_bytes, __ATOMIC_SEQ_CST);
}

/* ---------------------------------------------------------------------- the rest */

int arena_first_slab(uintptr_t *address, size_t *nbytes)
{
    pthread_once(&started, start);
    lock_arena();
    mapping *slab = NULL;
    for (uint32_t id = 1; id < arena.slabs_size && !slab; id++)
        slab = arena.slabs[id];
    if (!slab)
        slab = new_slab();
    int err = slab ? 0 : errno;
    if (slab) {
        *address = (uintptr_t)slab->base;
        *nbytes = slab->nbytes;
    }
    unlock_arena();
    return err;
}

size_t arena_keep_small(void)
{
    size_t switched = 0;
    lock_arena();
    for (mapping *m = arena.all; m; m = m->next) {
        /* of a slab the 2 MiB that nobody was given stay with huge pages */
        size_t end = m->tags ? round_up((size_t)m->top << page_shift, HUGE_BYTES) : m->nbytes;
        if (end <= m->small)
            continue;
        if (!madvise(m->base + m->small, end - m->small, MADV_NOHUGEPAGE)) {
            switched += end - m->small;
            m->small = end;
        }
    }
    unlock_arena();
    return switched;
}

/* Count a switch on (1), off (-1) or none (0); give back what is kept over the budget, or all of
   it, in short critical sections. */
static void trim(int by, int all)
{
    doomed dead = {NULL};
    size_t before;
    pthread_once(&started, start);
    lock_arena();
    arena.on += by;
    do {
        before = arena.kept_bytes;
        keep_within(all ? 0 : budget(), &dead);
        unlock_arena();
        bury(&dead);
        lock_arena();
    } while (arena.kept_bytes < before);
    unlock_arena();
}

void arena_switched_on(int by) { trim(by, 0); }

void arena_release_kept(void) { trim(0, 1); }

void arena_count(arena_counters *counters)
{
    lock_arena();
    counters->live_arrays = arena.live_arrays;
    counters->live_bytes = arena.live_bytes;
    counters->kept_bytes = arena.kept_bytes;
    counters->mappings = arena.mappings;
    counters->mapped_bytes = arena.mapped_bytes;
    unlock_arena();
}

size_t arena_extents(arena_extent *extents, size_t room)
{
    size_t count = 0;
    lock_arena();
    for (mapping *m = arena.all; m; m = m->next, count++)
        if (count < room) {
            extents[count].address = (uintptr_t)m->base;
            extents[count].nbytes = m->nbytes;
        }
    unlock_arena();
    return count;
}
