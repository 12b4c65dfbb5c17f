/*
 * Counts who allocates and who copies, for zero_copy.py: a library to preload into attnd.
 *
 * Every malloc, calloc, realloc and aligned allocation, and every memcpy and memmove that is a call and
 * not inlined, is counted by whether it was called from the program itself or from one of its
 * libraries (gRPC and below it). The counters live in the file that ATTND_COUNTERS names, mapped
 * and shared: eight uint64_t, see `counters`.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    _Atomic uint64_t allocations, allocated_bytes;
    _Atomic uint64_t copies, copied_bytes;
} tally;

typedef struct {
    tally program;
    tally libraries;
} counters;

static counters before_start; /* counts until the file is mapped */
static counters *counted = &before_start;
static uintptr_t program_begin, program_end; /* the program's code */

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

static int find_program(struct dl_phdr_info *object, size_t size, void *context) {
    (void)size;
    (void)context;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[i];
        if (segment->p_type != PT_LOAD || (segment->p_flags & PF_X) == 0) continue;
        program_begin = object->dlpi_addr + segment->p_vaddr;
        program_end = program_begin + segment->p_memsz;
    }
    return 1; /* the first object is the program */
}

__attribute__((constructor)) static void map_counters(void) {
    const char *path = getenv("ATTND_COUNTERS");
    dl_iterate_phdr(find_program, NULL);
    if (path == NULL) return;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(counters)) != 0) abort();
    void *mapped = mmap(NULL, sizeof(counters), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) abort();
    close(file);
    counted = mapped;
}

static tally *tally_of(const void *caller) {
    uintptr_t address = (uintptr_t)caller;
    return address >= program_begin && address < program_end ? &counted->program : &counted->libraries;
}

static void count_allocation(const void *caller, size_t size) {
    tally *of = tally_of(caller);
    atomic_fetch_add_explicit(&of->allocations, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&of->allocated_bytes, size, memory_order_relaxed);
}

/* The copy itself, as one instruction: the real memcpy is what is being replaced. */
static void *copy(const void *caller, void *to, const void *from, size_t size) {
    void *start = to;
    tally *of = tally_of(caller);
    atomic_fetch_add_explicit(&of->copies, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&of->copied_bytes, size, memory_order_relaxed);
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return start;
}

/* ------------------------------------------------------------------------------------------- */

#define CALLER __builtin_return_address(0)

void *malloc(size_t size) {
    count_allocation(CALLER, size);
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    count_allocation(CALLER, count * size);
    return __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size) {
    count_allocation(CALLER, size);
    return __libc_realloc(memory, size);
}

void *aligned_alloc(size_t alignment, size_t size) {
    count_allocation(CALLER, size);
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
    count_allocation(CALLER, size);
    *memory = __libc_memalign(alignment, size);
    return *memory != NULL ? 0 : 12;
}

void *memcpy(void *restrict to, const void *restrict from, size_t size) { return copy(CALLER, to, from, size); }

void *__memcpy_chk(void *restrict to, const void *restrict from, size_t size, size_t room) {
    if (size > room) abort();
    return copy(CALLER, to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    if ((uintptr_t)to - (uintptr_t)from >= size) return copy(CALLER, to, from, size);
    unsigned char *last_to = (unsigned char *)to + size;
    const unsigned char *last_from = (const unsigned char *)from + size;
    while (size-- > 0) {
        *(volatile unsigned char *)--last_to = *--last_from;
    }
    return to;
}
