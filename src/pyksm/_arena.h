/* Page-aligned, mergeable memory for arrays; pure C, no Python, no GIL. See _arena.c. */

#ifndef PYKSM_ARENA_H
#define PYKSM_ARENA_H

#include <stddef.h>
#include <stdint.h>

/* What a NEP 49 handler carries in its ctx: smaller requests go to the fallback. */
typedef struct {
    size_t min_bytes;
} arena_policy;

/* The functions of a data handler, laid out as numpy's PyDataMemAllocator. */
typedef struct {
    void *ctx;
    void *(*malloc)(void *ctx, size_t nbytes);
    void *(*calloc)(void *ctx, size_t count, size_t size);
    void *(*realloc)(void *ctx, void *pointer, size_t nbytes);
    void (*free)(void *ctx, void *pointer, size_t nbytes);
} arena_functions;

/* Ours; ctx is an arena_policy. Each may be called from any thread. What is freed or resized is
   told by the pointer: the size numpy passes on is only handed to the fallback. */
void *arena_malloc(void *ctx, size_t nbytes);
void *arena_calloc(void *ctx, size_t count, size_t size);
void *arena_realloc(void *ctx, void *pointer, size_t nbytes);
void arena_free(void *ctx, void *pointer, size_t nbytes);

/* Say, before anything else, what serves small requests: numpy's own functions. */
void arena_fallback(const arena_functions *functions);

/* Wrap the functions in place. They stay wrapped for ever, because arrays of the arena may be
   alive until the process ends; arena_everywhere_min() says what the arena takes over: requests
   of at least that many bytes, nothing at SIZE_MAX. */
void arena_wrap(arena_functions *functions);
void arena_everywhere_min(size_t min_bytes);

/* Make sure there is a slab and tell where. 0, or the errno of the call that failed. */
int arena_first_slab(uintptr_t *address, size_t *nbytes);

/* Switch every page handed out so far to MADV_NOHUGEPAGE; returns the bytes newly switched. */
size_t arena_keep_small(void);

/* While at least one allocator is switched on more freed memory is kept for the next array. */
void arena_switched_on(int by);

/* Unmap, or let go of, all memory that no array uses. */
void arena_release_kept(void);

typedef struct {
    size_t live_arrays;
    size_t live_bytes;
    size_t kept_bytes;
    size_t mappings;
    size_t mapped_bytes;
} arena_counters;

void arena_count(arena_counters *counters);

typedef struct {
    uintptr_t address;
    size_t nbytes;
} arena_extent;

/* Copy at most `room` marked mappings to `extents`; returns how many there are. */
size_t arena_extents(arena_extent *extents, size_t room);

#endif
