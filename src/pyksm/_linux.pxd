# Kernel constants and prototypes, and nothing else. What the headers of an older distribution
# lack is defined here by its number, which is kernel ABI.

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/types.h>
    #include <unistd.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #ifndef MADV_POPULATE_READ          /* Linux 5.14 */
    #define MADV_POPULATE_READ 22
    #endif
    #ifndef MADV_POPULATE_WRITE         /* Linux 5.14 */
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef PR_SET_MEMORY_MERGE         /* Linux 6.4 */
    #define PR_SET_MEMORY_MERGE 67
    #define PR_GET_MEMORY_MERGE 68
    #endif
    """
    ctypedef long ssize_t
    ctypedef long off_t
    int errno
    int EAGAIN
    int EINTR
    int ENOMEM

    int MADV_DONTNEED
    int MADV_MERGEABLE
    int MADV_UNMERGEABLE
    int MADV_HUGEPAGE
    int MADV_NOHUGEPAGE
    int MADV_POPULATE_READ
    int MADV_POPULATE_WRITE

    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    void *MAP_FAILED

    int PR_SET_MEMORY_MERGE
    int PR_GET_MEMORY_MERGE

    void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset) nogil
    int munmap(void *address, size_t length) nogil
    int madvise(void *address, size_t length, int advice) nogil
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c,
              unsigned long d) nogil
    ssize_t pread(int fd, void *buffer, size_t count, off_t offset) nogil
    long sysconf(int name) nogil
    int _SC_PAGESIZE
