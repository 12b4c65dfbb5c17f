#define _GNU_SOURCE
#include "kernels/isolated/mailbox.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/pause.h"

/* Where regions begin: the file has holes, which take no memory. */
#define REGION_BYTES_MOST ((size_t)1 << 36)
#define CONTROL_BYTES     ((size_t)1 << 16)
#define GROWTH_BYTES      ((size_t)1 << 20)

_Static_assert(sizeof(attn_control) <= CONTROL_BYTES, "the control block has its place");

/* ------------------------------------------------------------------------------------------- */
/* Bells */

static void futex(_Atomic uint32_t *word, int operation, uint32_t value) {
    syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

/* A waiter says that it waits before it looks for the last time: one of the two sees the other. */
void attn_bell_ring(attn_bell *bell) {
    atomic_fetch_add(&bell->rung, 1);
    if (atomic_load(&bell->is_awaited)) futex(&bell->rung, FUTEX_WAKE, INT_MAX);
}

static bool rings_within(const attn_bell *bell, uint32_t seen, int64_t spin_ns) {
    if (spin_ns == 0) return attn_bell_count(bell) != seen;
    int64_t end = attn_now_ns() + spin_ns;
    do {
        for (int i = 0; i < 16; i++) {
            if (attn_bell_count(bell) != seen) return true;
            attn_pause();
        }
    } while (attn_now_ns() < end);
    return false;
}

void attn_bell_wait(attn_bell *bell, uint32_t seen, int64_t spin_ns) {
    if (rings_within(bell, seen, spin_ns)) return;
    atomic_store(&bell->is_awaited, 1);
    if (atomic_load(&bell->rung) == seen) futex(&bell->rung, FUTEX_WAIT, seen);
    atomic_store(&bell->is_awaited, 0);
}

/* ------------------------------------------------------------------------------------------- */
/* The memory */

static attn_status no_memory(const char *what, size_t bytes) {
    return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory to share with a backend's process: %s of %zu bytes: %s", what,
                      bytes, strerrordesc_np(errno));
}

static void *map(int fd, size_t offset, size_t bytes) {
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    return base == MAP_FAILED ? NULL : base;
}

attn_status attn_mailbox_open(attn_mailbox *mailbox, int fd) {
    *mailbox = (attn_mailbox){.fd = fd};
    mailbox->control = map(fd, 0, CONTROL_BYTES);
    return mailbox->control == NULL ? no_memory("mmap", CONTROL_BYTES) : attn_ok();
}

attn_status attn_mailbox_create(attn_mailbox *mailbox) {
    size_t bytes = (1 + ATTN_REGIONS) * REGION_BYTES_MOST;
    *mailbox = (attn_mailbox){.fd = memfd_create("attnd backend", MFD_CLOEXEC)};
    if (mailbox->fd < 0) return no_memory("memfd_create", bytes);
    attn_status status = ftruncate(mailbox->fd, (off_t)bytes) == 0 ? attn_mailbox_open(mailbox, mailbox->fd)
                                                                   : no_memory("ftruncate", bytes);
    if (attn_failed(status)) close(mailbox->fd);
    return status;
}

void attn_mailbox_close(attn_mailbox *mailbox) {
    for (uint32_t i = 0; i < ATTN_REGIONS; i++) {
        if (mailbox->regions[i].base != NULL) munmap(mailbox->regions[i].base, mailbox->regions[i].bytes);
    }
    munmap(mailbox->control, CONTROL_BYTES);
    close(mailbox->fd);
}

attn_status attn_mailbox_reserve(attn_mailbox *mailbox, uint32_t region, size_t bytes) {
    if (bytes <= mailbox->regions[region].bytes) return attn_ok();
    size_t grown = (bytes + bytes / 4 + GROWTH_BYTES - 1) / GROWTH_BYTES * GROWTH_BYTES;
    if (grown > REGION_BYTES_MOST) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "%zu bytes are more than a backend's process takes at once", bytes);
    }
    void *base = map(mailbox->fd, (1 + region) * REGION_BYTES_MOST, grown);
    if (base == NULL) return no_memory("mmap", grown);
    if (mailbox->regions[region].base != NULL) munmap(mailbox->regions[region].base, mailbox->regions[region].bytes);
    mailbox->regions[region].base = base;
    mailbox->regions[region].bytes = grown;
    return attn_ok();
}
