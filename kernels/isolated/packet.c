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
    packet.first_rows = place(base, &bytes, counts->size, sizeof *packet.first_rows);
    packet.first_news = place(base, &bytes, counts->size, sizeof *packet.first_news);
    packet.first_outs = place(base, &bytes, counts->size, sizeof *packet.first_outs);
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

static void pack_first_rows(const attn_packet *packet, const attn_batch *batch) {
    uint64_t rows = 0, news = 0, outs = 0, partials = 0;
    for (uint32_t i = 0; i < batch->size; i++) {
        bool is_part = attn_batch_part(batch, i) != NULL;
        packet->first_rows[i] = rows;
        packet->first_news[i] = news;
        packet->first_outs[i] = is_part ? partials : outs;
        rows += batch->query_lengths[i];
        news += attn_batch_new_rows(batch, i);
        if (is_part)
            partials += partial_rows_of(batch, i);
        else
            outs += batch->query_lengths[i];
    }
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
    pack_first_rows(packet, batch);
    pack_prefixes(packet, batch);
    if (batch->sinks != NULL) memcpy(packet->sinks, batch->sinks, geometry->heads_q * sizeof *packet->sinks);
    if (plan != NULL) memcpy(packet->plan, plan, head->counts.plan_bytes);
}

void attn_packet_pack_rows(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                           uint32_t i) {
    size_t new_rows = attn_batch_new_rows(batch, i), query = attn_query_row_bytes(geometry);
    size_t key = attn_key_row_bytes(geometry), value = attn_value_row_bytes(geometry);
    memcpy(packet->queries + packet->first_rows[i] * query, batch->queries[i], batch->query_lengths[i] * query);
    if (new_rows == 0) return;
    memcpy(packet->keys + packet->first_news[i] * key, batch->new_keys[i], new_rows * key);
    memcpy(packet->values + packet->first_news[i] * value, batch->new_values[i], new_rows * value);
}

/* ------------------------------------------------------------------------------------------- */
/* And back */

static void deliver_partial(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                            uint32_t i) {
    size_t heads = geometry->heads_q, first = packet->first_outs[i] * heads, rows = partial_rows_of(batch, i) * heads;
    size_t dim = geometry->head_dim_v;
    memcpy(batch->partials[i].out, packet->partial_outs + first * dim, rows * dim * sizeof(float));
    memcpy(batch->partials[i].lse, packet->partial_lses + first, rows * sizeof(float));
}

void attn_packet_deliver(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                         uint32_t i) {
    if (attn_batch_part(batch, i) != NULL) {
        deliver_partial(packet, geometry, batch, i);
        return;
    }
    size_t row = attn_out_row_bytes(geometry), heads = geometry->heads_q, rows = batch->query_lengths[i];
    memcpy(batch->outs[i], packet->outs + packet->first_outs[i] * row, rows * row);
    if (batch->lses == NULL || batch->lses[i] == NULL) return;
    memcpy(batch->lses[i], packet->lses + packet->first_outs[i] * heads, rows * heads * sizeof(float));
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

static void point_to_rows(const attn_packet *packet, const attn_geometry *geometry, const pointer_arrays *arrays,
                          uint32_t i) {
    arrays->queries[i] = packet->queries + packet->first_rows[i] * attn_query_row_bytes(geometry);
    arrays->new_keys[i] = arrays->new_values[i] = NULL;
    if (packet->reads[i]) return;
    arrays->new_keys[i] = packet->keys + packet->first_news[i] * attn_key_row_bytes(geometry);
    arrays->new_values[i] = packet->values + packet->first_news[i] * attn_value_row_bytes(geometry);
}

static void point_to_outputs(const attn_packet *packet, const attn_geometry *geometry, const pointer_arrays *arrays,
                             const attn_batch *batch, uint32_t i) {
    size_t first = packet->first_outs[i], heads = geometry->heads_q;
    bool is_part = attn_batch_part(batch, i) != NULL;
    arrays->outs[i] = is_part ? NULL : packet->outs + first * attn_out_row_bytes(geometry);
    arrays->lses[i] = is_part || batch->lses == NULL ? NULL : packet->lses + first * heads;
    arrays->partials[i] = (attn_partial){0};
    if (!is_part) return;
    arrays->partials[i].out = packet->partial_outs + first * heads * geometry->head_dim_v;
    arrays->partials[i].lse = packet->partial_lses + first * heads;
}

static void point_to_members(const attn_packet *packet, const pointer_arrays *arrays) {
    const uint32_t *members = packet->members;
    for (uint32_t p = 0; p < packet->head->counts.prefixes; p++) {
        const attn_packed_prefix *prefix = &packet->prefixes[p];
        arrays->prefixes[p] = (attn_prefix){members, prefix->members, prefix->tokens};
        members += prefix->members;
    }
}

/* NULL: there is no memory. */
static char *reserve_pointers(attn_packet_pointers *pointers, size_t bytes) {
    if (bytes > pointers->bytes) {
        void *grown = realloc(pointers->memory, bytes);
        if (grown == NULL) return NULL;
        pointers->memory = grown;
        pointers->bytes = bytes;
    }
    return pointers->memory;
}

attn_status attn_packet_batch(const attn_packet *packet, const attn_geometry *geometry, attn_packet_pointers *pointers,
                              attn_batch *batch) {
    const attn_packet_head *head = packet->head;
    const attn_packet_counts *counts = &head->counts;
    size_t bytes;
    place_pointers(counts, NULL, &bytes);
    char *memory = reserve_pointers(pointers, bytes);
    if (memory == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a batch: %zu bytes", bytes);
    pointer_arrays arrays = place_pointers(counts, memory, &bytes);
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
    for (uint32_t i = 0; i < batch->size; i++) {
        point_to_rows(packet, geometry, &arrays, i);
        point_to_outputs(packet, geometry, &arrays, batch, i);
    }
    point_to_members(packet, &arrays);
    return attn_ok();
}
