/*
 * Between ranks of one process, through host memory: an export of the sequence and an upload into the new pages, one
 * chunk at a time.
 *
 *   start -> [ next chunk -> source reads -> read_done -> ranks write -> write_done -> ] .. -> finish
 */
#define _GNU_SOURCE
#include "dp/transfer.h"

#include <stdlib.h>

#include "dp/direct.h"

/* Keys and values of a chunk, at most, if that is a token or more: short enough for other calls to wait for. */
#define CHUNK_BYTES ((size_t)1 << 20)

/* Rows on their way, and where they are: one piece of memory, for a rank that is lost may hold on to all of it. */
struct dp_cargo {
    dp_span keys, values; /* in `rows` */
    char rows[];
};

static size_t row_bytes(const dp_transfer *transfer) {
    return transfer->engine->key_row_bytes + transfer->engine->value_row_bytes;
}

/* Frees the cargo, or leaves it to the one chunk that ended without its rank. */
static void release_cargo(dp_transfer *transfer) {
    dp_keep keep = {.release = free, .context = transfer->cargo};
    if (transfer->read.detained)
        dp_export_keep(transfer->export, keep);
    else if (transfer->write.detained)
        dp_upload_keep(transfer->upload, keep);
    else
        free(transfer->cargo);
    transfer->cargo = NULL;
}

static void release(dp_transfer *transfer) {
    release_cargo(transfer);
    if (transfer->export != NULL) dp_export_end(transfer->export);
    if (transfer->upload != NULL) dp_upload_end(transfer->upload);
    transfer->export = NULL;
    transfer->upload = NULL;
}

static void finish(dp_transfer *transfer, attn_status status) {
    release(transfer);
    transfer->done(transfer, status);
}

/* Tokens from `position` on, up to the end of a chunk, that go to one rank; 0: that rank is the one they are on. */
static uint32_t tokens_to_send(const dp_transfer *transfer, uint64_t run) {
    const dp_sequences *table = &transfer->engine->sequences;
    uint32_t stripe = dp_part_of(transfer->position, transfer->to->stripes);
    if (dp_place_rank(table, transfer->to, stripe) == transfer->from->home) return 0;
    return run < transfer->chunk_tokens ? (uint32_t)run : transfer->chunk_tokens;
}

/* Moves on to the next tokens that are to be sent. Their number; 0: there are none left. */
static uint32_t find_chunk(dp_transfer *transfer) {
    uint64_t length = transfer->from->length;
    for (; transfer->layer < transfer->engine->config.geometry.layers; transfer->layer++) {
        while (transfer->position < length) {
            uint64_t run = dp_part_run(transfer->position, transfer->to->stripes);
            if (run > length - transfer->position) run = length - transfer->position;
            uint32_t tokens = tokens_to_send(transfer, run);
            if (tokens > 0) return tokens;
            transfer->position += run;
        }
        transfer->position = 0;
    }
    return 0;
}

static dp_transfer *transfer_of_read(dp_export_chunk *chunk) {
    return (dp_transfer *)(void *)((char *)chunk - offsetof(dp_transfer, read));
}

static dp_transfer *transfer_of_write(dp_upload_chunk *chunk) {
    return (dp_transfer *)(void *)((char *)chunk - offsetof(dp_transfer, write));
}

static void read_done(dp_export_chunk *chunk, attn_status status);
static void write_done(dp_upload_chunk *chunk, attn_status status);

static attn_status start_read(dp_transfer *transfer, uint32_t tokens) {
    transfer->read = (dp_export_chunk){
        .layer = transfer->layer,
        .token_offset = transfer->position,
        .tokens = tokens,
        .keys = transfer->cargo->rows,
        .values = transfer->cargo->rows + tokens * transfer->engine->key_row_bytes,
        .done = read_done,
    };
    return dp_export_read(transfer->export, &transfer->read);
}

static attn_status start_write(dp_transfer *transfer) {
    const dp_export_chunk *read = &transfer->read;
    dp_cargo *cargo = transfer->cargo;
    cargo->keys = (dp_span){read->keys, read->tokens * transfer->engine->key_row_bytes};
    cargo->values = (dp_span){read->values, read->tokens * transfer->engine->value_row_bytes};
    transfer->write = (dp_upload_chunk){
        .layer = read->layer,
        .token_offset = read->token_offset,
        .tokens = read->tokens,
        .keys = {.spans = &cargo->keys, .count = 1, .size = cargo->keys.size},
        .values = {.spans = &cargo->values, .count = 1, .size = cargo->values.size},
        .done = write_done,
    };
    return dp_upload_write_anywhere(transfer->upload, &transfer->write);
}

static void read_done(dp_export_chunk *chunk, attn_status status) {
    dp_transfer *transfer = transfer_of_read(chunk);
    if (!attn_failed(status)) status = start_write(transfer);
    if (attn_failed(status)) finish(transfer, status);
}

/* Leaves a chunk in flight, or has finished. */
static void go_on(dp_transfer *transfer) {
    uint32_t tokens = find_chunk(transfer);
    attn_status status = attn_ok();
    if (tokens > 0) {
        status = atomic_load(transfer->cancelled) ? attn_error(ATTN_CANCELLED, "the move was cancelled")
                                                  : start_read(transfer, tokens);
    }
    if (tokens == 0 || attn_failed(status)) finish(transfer, status);
}

static void write_done(dp_upload_chunk *chunk, attn_status status) {
    dp_transfer *transfer = transfer_of_write(chunk);
    if (attn_failed(status)) {
        finish(transfer, status);
        return;
    }
    transfer->position += chunk->tokens;
    transfer->bytes += chunk->tokens * row_bytes(transfer);
    go_on(transfer);
}

static attn_status start_by_host(dp_transfer *transfer) {
    dp_engine *engine = transfer->engine;
    attn_status status;
    transfer->export = NULL;
    transfer->upload = NULL;
    transfer->read = (dp_export_chunk){0};
    transfer->write = (dp_upload_chunk){0};
    transfer->chunk_tokens = CHUNK_BYTES > row_bytes(transfer) ? (uint32_t)(CHUNK_BYTES / row_bytes(transfer)) : 1;
    transfer->cargo = malloc(sizeof *transfer->cargo + transfer->chunk_tokens * row_bytes(transfer));
    if (transfer->cargo == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for rows on their way");
    pthread_mutex_lock(&engine->lock);
    status = dp_export_hold(engine, transfer->from, 0, transfer->from->length, &transfer->export);
    pthread_mutex_unlock(&engine->lock);
    if (!attn_failed(status)) status = dp_upload_into(engine, transfer->to, transfer->from->length, &transfer->upload);
    if (attn_failed(status)) {
        release(transfer);
        return status;
    }
    go_on(transfer);
    return attn_ok();
}

/* Where the direct way did not work the usual one is taken. */
static void direct_ended(dp_transfer *transfer, attn_status status) {
    if (!attn_failed(status)) {
        dp_count(&transfer->engine->moves_direct, 1);
        transfer->direct = true;
        transfer->bytes = transfer->from->length * transfer->engine->config.geometry.layers * row_bytes(transfer);
        transfer->done(transfer, status);
        return;
    }
    status = start_by_host(transfer);
    if (attn_failed(status)) transfer->done(transfer, status);
}

attn_status dp_transfer_start(dp_transfer *transfer) {
    transfer->bytes = transfer->position = transfer->layer = 0;
    return dp_direct_start(transfer, direct_ended) ? attn_ok() : start_by_host(transfer);
}
