/*
 * Transfers: the rows of a sequence copied to pages on other ranks.
 *
 * This is the one place that knows how bytes get from rank to rank. What is here goes through the host's memory and
 * works between any backends: for each layer, a bounded chunk of rows is read by the source rank (attn_backend_export)
 * and then written by the ranks it goes to (attn_backend_append), as jobs of their queues, so that calls of other
 * sequences run between two chunks. Much at once goes from device to device, where the backends have channels
 * (dp/direct.h); if that fails, through the host's memory after all.
 *
 * What arrives is bitwise what was there. With an fp8 cache that holds because attn_backend_export gives the stored
 * number times its scale, and attn_backend_append stores that as the same number, except where the product is too
 * small or too large for the geometry's dtype.
 *
 * Threads: dp_transfer_start from any, `done` on a rank thread or on the calling one.
 */
#ifndef ATTND_DP_TRANSFER_H
#define ATTND_DP_TRANSFER_H

#include "dp/state.h"

typedef struct dp_transfer dp_transfer;
typedef struct dp_cargo dp_cargo;

/* The caller's memory, untouched by the caller from dp_transfer_start to `done`. */
struct dp_transfer {
    /* in */
    dp_engine *engine;
    const dp_sequence *from;      /* a whole sequence, busy with the move: it holds still; all of its tokens go.. */
    const dp_place *to;           /* ..here, but for those whose rank is `from`'s own: they are there already */
    const atomic_bool *cancelled; /* once true, no further chunk is started: ATTN_CANCELLED */
    /* Called exactly once if dp_transfer_start returned ATTN_OK, maybe before that. `status` is valid during it. */
    void (*done)(dp_transfer *transfer, attn_status status);
    /* out, valid from `done` */
    uint64_t bytes; /* of keys and values that went.. */
    bool direct;    /* ..from device to device */
    /* the transfer's own */
    dp_export *export;
    dp_upload *upload;
    dp_export_chunk read;
    dp_upload_chunk write;
    dp_cargo *cargo; /* the chunk's rows */
    uint32_t chunk_tokens;
    uint32_t layer;    /* of the chunk.. */
    uint64_t position; /* ..and its first token */
};

/*
 * Starts it. ATTN_RESOURCE_EXHAUSTED: no memory, and nothing was done. `done` comes with ATTN_CANCELLED, with
 * ATTN_RESOURCE_EXHAUSTED where a rank's queue is full, with ATTN_UNAVAILABLE where one is lost or was since the pages
 * were taken, or with what the backends say. It does not wait for a backend that hangs: that may go on to use the rows
 * on their way, which are then freed when it has come back.
 */
attn_status dp_transfer_start(dp_transfer *transfer);

#endif
