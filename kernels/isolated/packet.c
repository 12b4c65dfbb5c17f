#include "kernels/isolated/packet.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------- */
/* Counting and placing */

static uint32_t pages_of(const attn_geometry *geometry, uint32_t length) {
    return (uint32_t)(((uint64_t)length + geometry->page_size - 1) / geometry->page_size);
}

/* Of query rows: one partial result each or, with batch_invariant, one a chunk of the part. */
static uint64_t partial_rows_of(const attn_batch *batch, uint32_t i) {
    uint64_t chunks = ((uint64_t)batch->lengths[i] + ATTN_CHUNK_TOKENS - 1) / ATTN_CHUNK_TOKENS;
    return batch->query_lengths[i] * (batch->batch_invariant ? chunks : 1);
}

attn_packet_counts attn_packet_count(const attn_geometry *geometry, const attn_batch *batch, size_t plan_bytes) {
    attn_packet_counts counts = {.size = batch->size,
                                 .prefixes = batch->prefix_count,
                                 .plan_bytes = plan_bytes,
                                 .has_new = batch->new_keys != NULL,
                                 .has_lses = batch->lses != NULL,
                                 .has_parts = batch->parts != NULL,
                                 .has_sinks = batch->sinks != NULL};
    for (uint32_t i = 0; i < batch->size; i++) {
        counts.pages += pages_of(geometry, batch->lengths[i]);
        counts.rows += batch->query_lengths[i];
        counts.new_rows += attn_batch_new_rows(batch, i);
        if (attn_batch_part(batch, i) != NULL)
            counts.partial_rows += partial_rows_of(batch, i);
        else
            counts.out_rows += batch->query_lengths[i];
    }
    for (uint32_t p = 0; p < batch->prefix_count; p++)
        counts.members += batch->prefixes[p].count;
    return counts;
}

/* Of a device's vectors. */
#define ALIGNMENT 256

/* The next place of `count` things of `size` bytes; *bytes grows by them. */
static void *place(char *base, size_t *bytes, uint64_t count, size_t size) {
    size_t offset = (*bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *bytes = offset + count * size;
    return base == NULL ? NULL : base + offset;
}

attn_packet attn_packet_place(const attn_geometry *geometry, const attn_packet_counts *counts, char *base) {
    attn_packet packet = {0};
    size_t bytes = 0, of_parts = counts->has_parts ? counts->size : 0;
    uint32_t heads = geometry->heads_q;
    packet.head = place(base, &bytes, 1, sizeof *packet.head);
    packet.lengths = place(base, &bytes, counts->size, sizeof *packet.lengths);
    packet.query_lengths = place(base, &bytes, counts->size, sizeof *packet.query_lengths);
    packet.page_offsets = place(base, &bytes, (uint64_t)counts->size + 1, sizeof *packet.page_offsets);
    packet.pages = place(base, &bytes, counts->pages, sizeof *packet.pages);
    packet.reads = place(base, &bytes, counts->size, sizeof *packet.reads);
    packet.parts = place(base, &bytes, of_parts, sizeof *packet.parts);
    packet.plan = place(base, &bytes, counts->plan_bytes, 1);
    packet.prefixes = place(base, &bytes, counts->prefixes, sizeof *packet.prefixes);
    packet.members = place(base, &bytes, counts->members, sizeof *packet.members);
    packet.sinks = place(base, &bytes, counts->has_sinks ? heads : 0, sizeof *packet.sinks);
    packet.queries = place(base, &bytes, counts->rows, attn_query_row_bytes(geometry));
    packet.keys = place(base, &bytes, counts->new_rows, attn_key_row_bytes(geometry));
    packet.values = place(base, &bytes, counts->new_rows, attn_value_row_bytes(geometry));
    packet.outs = place(base, &bytes, counts->out_rows, attn_out_row_bytes(geometry));
    packet.lses = place(base, &bytes, counts->has_lses ? counts->out_rows * heads : 0, sizeof *packet.lses);
    packet.partial_outs =
        place(base, &bytes, counts->partial_rows * heads * geometry->head_dim_v, sizeof *packet.partial_outs);
    packet.partial_lses = place(base, &bytes, counts->partial_rows * heads, sizeof *packet.partial_lses);
    packet.bytes = bytes;
    return packet;
}

attn_packed_rows attn_packed_rows_place(const attn_geometry *geometry, uint32_t pages, uint32_t tokens, char *base) {
    attn_packed_rows rows = {0};
    rows.pages = place(base, &rows.bytes, pages, sizeof *rows.pages);
    rows.keys = place(base, &rows.bytes, tokens, attn_key_row_bytes(geometry));
    rows.values = place(base, &rows.bytes, tokens, attn_value_row_bytes(geometry));
    return rows;
}

/* ------------------------------------------------------------------------------------------- */
/* There */

static void pack_tables(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch) {
    uint32_t offset = 0;
    memcpy(packet->lengths, batch->lengths, batch->size * sizeof *packet->lengths);
    memcpy(packet->query_lengths, batch->query_lengths, batch->size * sizeof *packet->query_lengths);
    for (uint32_t i = 0; i < batch->size; i++) {
        uint32_t count = pages_of(geometry, batch->lengths[i]);
        packet->page_offsets[i] = offset;
        packet->reads[i] = attn_batch_is_read(batch, i);
        if (count > 0) memcpy(packet->pages + offset, batch->pages + batch->page_offsets[i], count * sizeof(uint32_t));
        offset += count;
    }
    packet->page_offsets[batch->size] = offset;
    if (batch->parts != NULL) memcpy(packet->parts, batch->parts, batch->size * sizeof *packet->parts);
}

static void pack_prefixes(const attn_packet *packet, const attn_batch *batch) {
    uint32_t *members = packet->members;
    for (uint32_t p = 0; p < batch->prefix_count; p++) {
        const attn_prefix *prefix = &batch->prefixes[p];
        packet->prefixes[p] = (attn_packed_prefix){prefix->count, prefix->tokens};
        memcpy(members, prefix->members, prefix->count * sizeof *members);
        members += prefix->count;
    }
}

/* Appends the bytes at `*end`. */
static void put(char **end, const void *bytes, size_t count) {
    memcpy(*end, bytes, count);
    *end += count;
}

static void pack_rows(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch) {
    char *queries = packet->queries, *keys = packet->keys, *values = packet->values;
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t new_rows = attn_batch_new_rows(batch, i);
        put(&queries, batch->queries[i], batch->query_lengths[i] * attn_query_row_bytes(geometry));
        if (new_rows == 0) continue;
        put(&keys, batch->new_keys[i], new_rows * attn_key_row_bytes(geometry));
        put(&values, batch->new_values[i], new_rows * attn_value_row_bytes(geometry));
    }
}

void attn_packet_pack(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                      const attn_plan *plan) {
    attn_packet_head *head = packet->head;
    head->layer = batch->layer;
    head->scale = batch->scale;
    head->softcap = batch->softcap;
    head->window = batch->window;
    head->batch_invariant = batch->batch_invariant;
    head->device_time = batch->device_time;
    pack_tables(packet, geometry, batch);
    pack_prefixes(packet, batch);
    pack_rows(packet, geometry, batch);
    if (batch->sinks != NULL) memcpy(packet->sinks, batch->sinks, geometry->heads_q * sizeof *packet->sinks);
    if (plan != NULL) memcpy(packet->plan, plan, head->counts.plan_bytes);
}

/* ------------------------------------------------------------------------------------------- */
/* And back */

/* Takes the bytes from `*end` on. */
static void take(void *to, const char **end, size_t count) {
    memcpy(to, *end, count);
    *end += count;
}

void attn_packet_deliver(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch) {
    const char *outs = packet->outs, *lses = (const char *)packet->lses;
    const char *partial_outs = (const char *)packet->partial_outs, *partial_lses = (const char *)packet->partial_lses;
    size_t lse_bytes = geometry->heads_q * sizeof(float), out_bytes = attn_out_row_bytes(geometry);
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t rows = batch->query_lengths[i];
        if (attn_batch_part(batch, i) != NULL) {
            rows = partial_rows_of(batch, i);
            take(batch->partials[i].out, &partial_outs, rows * geometry->head_dim_v * lse_bytes);
            take(batch->partials[i].lse, &partial_lses, rows * lse_bytes);
            continue;
        }
        take(batch->outs[i], &outs, rows * out_bytes);
        if (batch->lses != NULL && batch->lses[i] != NULL) memcpy(batch->lses[i], lses, rows * lse_bytes);
        if (batch->lses != NULL) lses += rows * lse_bytes;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* In the child */

typedef struct {
    const void **queries, **new_keys, **new_values;
    void **outs;
    float **lses;
    attn_partial *partials;
    attn_prefix *prefixes;
} pointer_arrays;

static pointer_arrays place_pointers(const attn_packet_counts *counts, char *base, size_t *bytes) {
    pointer_arrays arrays;
    *bytes = 0;
    arrays.queries = place(base, bytes, counts->size, sizeof *arrays.queries);
    arrays.new_keys = place(base, bytes, counts->size, sizeof *arrays.new_keys);
    arrays.new_values = place(base, bytes, counts->size, sizeof *arrays.new_values);
    arrays.outs = place(base, bytes, counts->size, sizeof *arrays.outs);
    arrays.lses = place(base, bytes, counts->size, sizeof *arrays.lses);
    arrays.partials = place(base, bytes, counts->size, sizeof *arrays.partials);
    arrays.prefixes = place(base, bytes, counts->prefixes, sizeof *arrays.prefixes);
    return arrays;
}

/* `batch` has its lengths, parts and reads. */
static void point_to_rows(const attn_packet *packet, const attn_geometry *geometry, const pointer_arrays *arrays,
                          const attn_batch *batch) {
    const char *queries = packet->queries, *keys = packet->keys, *values = packet->values;
    for (uint32_t i = 0; i < batch->size; i++) {
        arrays->queries[i] = queries;
        queries += batch->query_lengths[i] * attn_query_row_bytes(geometry);
        bool is_read = packet->reads[i];
        arrays->new_keys[i] = is_read ? NULL : keys;
        arrays->new_values[i] = is_read ? NULL : values;
        size_t new_rows = attn_batch_new_rows(batch, i);
        keys += new_rows * attn_key_row_bytes(geometry);
        values += new_rows * attn_value_row_bytes(geometry);
    }
}

static void point_to_outputs(const attn_packet *packet, const attn_geometry *geometry, const pointer_arrays *arrays,
                             const attn_batch *batch) {
    char *outs = packet->outs;
    float *lses = packet->lses, *partial_outs = packet->partial_outs, *partial_lses = packet->partial_lses;
    size_t heads = geometry->heads_q;
    for (uint32_t i = 0; i < batch->size; i++) {
        size_t rows = batch->query_lengths[i];
        arrays->outs[i] = NULL;
        arrays->lses[i] = NULL;
        arrays->partials[i] = (attn_partial){0};
        if (attn_batch_part(batch, i) != NULL) {
            rows = partial_rows_of(batch, i);
            arrays->partials[i] = (attn_partial){partial_outs, partial_lses};
            partial_outs += rows * heads * geometry->head_dim_v;
            partial_lses += rows * heads;
            continue;
        }
        arrays->outs[i] = outs;
        arrays->lses[i] = lses;
        outs += rows * attn_out_row_bytes(geometry);
        if (batch->lses != NULL) lses += rows * heads;
    }
}

static void point_to_members(const attn_packet *packet, const pointer_arrays *arrays) {
    const uint32_t *members = packet->members;
    for (uint32_t p = 0; p < packet->head->counts.prefixes; p++) {
        const attn_packed_prefix *prefix = &packet->prefixes[p];
        arrays->prefixes[p] = (attn_prefix){members, prefix->members, prefix->tokens};
        members += prefix->members;
    }
}

static attn_status reserve_pointers(attn_packet_pointers *pointers, size_t bytes) {
    if (bytes <= pointers->bytes) return attn_ok();
    void *grown = realloc(pointers->memory, bytes);
    if (grown == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a batch: %zu bytes", bytes);
    *pointers = (attn_packet_pointers){grown, bytes};
    return attn_ok();
}

attn_status attn_packet_batch(const attn_packet *packet, const attn_geometry *geometry, attn_packet_pointers *pointers,
                              attn_batch *batch) {
    const attn_packet_head *head = packet->head;
    const attn_packet_counts *counts = &head->counts;
    size_t bytes;
    place_pointers(counts, NULL, &bytes);
    ATTN_TRY(reserve_pointers(pointers, bytes));
    pointer_arrays arrays = place_pointers(counts, pointers->memory, &bytes);
    *batch = (attn_batch){.layer = head->layer,
                          .size = counts->size,
                          .lengths = packet->lengths,
                          .query_lengths = packet->query_lengths,
                          .page_offsets = packet->page_offsets,
                          .pages = packet->pages,
                          .queries = arrays.queries,
                          .new_keys = counts->has_new ? arrays.new_keys : NULL,
                          .new_values = counts->has_new ? arrays.new_values : NULL,
                          .outs = arrays.outs,
                          .lses = counts->has_lses ? arrays.lses : NULL,
                          .parts = counts->has_parts ? packet->parts : NULL,
                          .partials = counts->has_parts ? arrays.partials : NULL,
                          .prefixes = counts->prefixes > 0 ? arrays.prefixes : NULL,
                          .prefix_count = counts->prefixes,
                          .scale = head->scale,
                          .softcap = head->softcap,
                          .window = head->window,
                          .sinks = counts->has_sinks ? packet->sinks : NULL,
                          .batch_invariant = head->batch_invariant,
                          .device_time = head->device_time};
    point_to_rows(packet, geometry, &arrays, batch);
    point_to_outputs(packet, geometry, &arrays, batch);
    point_to_members(packet, &arrays);
    return attn_ok();
}

void attn_packet_pointers_free(attn_packet_pointers *pointers) {
    free(pointers->memory);
    *pointers = (attn_packet_pointers){0};
}
