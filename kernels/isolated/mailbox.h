/*
 * The memory that an isolated backend's two processes share, and the commands that go through it.
 *
 *     one file without a name:  | control: the ring of commands | region 0 | region 1 | region 2 |
 *
 * The parent posts commands; the child takes them in this order and answers each in its place in the ring, which may
 * then be another's. What a decode comes to it says later, in a place of the decode's own. A region holds what is too
 * large for a command, belongs to whoever has the command that names it, and grows as it is needed: each process maps
 * more of it then.
 *
 * Each side has a bell that the other one rings; who waits for one looks for a while and then sleeps.
 */
#ifndef ATTND_KERNELS_ISOLATED_MAILBOX_H
#define ATTND_KERNELS_ISOLATED_MAILBOX_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/split_plan.h"

enum {
    ATTN_RING = 32,                  /* commands that may wait for their answers */
    ATTN_FLIGHTS = 2,                /* decodes among them; decode n's batch is in region n % ATTN_FLIGHTS */
    ATTN_ROWS_REGION = ATTN_FLIGHTS, /* for the rows of everything else */
    ATTN_REGIONS,
};

typedef enum {
    ATTN_COMMAND_CREATE, /* in the rows region: create.h's */
    ATTN_COMMAND_APPEND,
    ATTN_COMMAND_EXPORT,
    ATTN_COMMAND_DECODE,
    ATTN_COMMAND_COPY_PAGE,
    ATTN_COMMAND_POISON,
    ATTN_COMMAND_BREAK,
    ATTN_COMMAND_CHANNEL_ID, /* these three: channel.h's */
    ATTN_COMMAND_SEND,
    ATTN_COMMAND_RECEIVE,
} attn_command_kind;

/* Written by the child, and then given. */
typedef struct {
    attn_saved_status outcome;
    attn_timing timing; /* decode */
    atomic_bool is_given;
} attn_answer;

/* Written by the parent, but for the answer. */
typedef struct {
    attn_command_kind kind;
    uint32_t layer;
    uint64_t position;
    uint32_t tokens;
    uint32_t pages;              /* append, export: of the page table */
    uint32_t page, to, slots;    /* copy_page: from and to; poison: page, first slot, slots */
    attn_plan_identity identity; /* decode */
    uint32_t region;             /* decode */
    uint64_t region_bytes;       /* of whatever region it uses */
    attn_answer answer;          /* of a decode: that it was taken */
} attn_command;

/* What one process rings and the other one waits for. */
typedef struct {
    _Alignas(64) _Atomic uint32_t rung; /* so often */
    _Atomic uint32_t is_awaited;
} attn_bell;

void attn_bell_ring(attn_bell *bell);

/* Returns once it was rung more often than `seen` times, or sooner: who calls looks again. Sleeps after `spin_ns`. */
void attn_bell_wait(attn_bell *bell, uint32_t seen, int64_t spin_ns);

static inline uint32_t attn_bell_count(const attn_bell *bell) {
    return atomic_load_explicit(&bell->rung, memory_order_acquire);
}

/* At the beginning of the memory. */
typedef struct {
    attn_bell posted;                 /* once a command: so many are in the ring, and were before */
    attn_bell answered;               /* by the child, and when it has ended */
    _Atomic uint64_t revoked_channel; /* channel.h */
    attn_command ring[ATTN_RING];
    attn_answer decoded[ATTN_FLIGHTS]; /* of the decode whose batch is in that region: stays until its next one */
} attn_control;

/* One process's view. */
typedef struct {
    int fd;
    attn_control *control;
    struct {
        char *base;
        size_t bytes;
    } regions[ATTN_REGIONS];
} attn_mailbox;

/* The parent's: new memory. ATTN_RESOURCE_EXHAUSTED. Undo with attn_mailbox_close. */
attn_status attn_mailbox_create(attn_mailbox *mailbox);

/* The child's: the memory behind `fd`. */
attn_status attn_mailbox_open(attn_mailbox *mailbox, int fd);

void attn_mailbox_close(attn_mailbox *mailbox);

/* Maps the first `bytes` of a region, at least; what it holds stays. ATTN_RESOURCE_EXHAUSTED. */
attn_status attn_mailbox_reserve(attn_mailbox *mailbox, uint32_t region, size_t bytes);

#endif
