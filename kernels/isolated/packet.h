/*
 * A batch in shared memory: its arrays one after another, without pointers.
 *
 * The head says how much of everything there is, and from that both processes find where it is. The parent packs
 * (attn_packet_pack, and attn_packet_pack_rows for each sequence), the child makes a batch of it that points into the
 * same memory (attn_packet_batch), and when the child's backend has written the outputs there, the parent hands them
 * out (attn_packet_deliver). Page tables hold no more than the pages of the sequences' lengths.
 */
#ifndef ATTND_KERNELS_ISOLATED_PACKET_H
#define ATTND_KERNELS_ISOLATED_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/attention.h"
#include "kernels/split_plan.h"

typedef struct {
    uint32_t size;
    uint32_t pages; /* of all page tables */
    uint32_t prefixes;
    uint32_t members; /* of all prefixes */
    uint64_t rows;    /* of queries */
    uint64_t new_rows;
    uint64_t out_rows; /* of whole sequences */
    uint64_t partial_rows;
    uint64_t plan_bytes;
    bool has_new, has_lses, has_parts, has_sinks;
} attn_packet_counts;

/* At the beginning of the region. */
typedef struct {
    attn_packet_counts counts;
    uint32_t layer;
    float scale, softcap;
    uint32_t window;
    bool batch_invariant, device_time;
} attn_packet_head;

typedef struct {
    uint32_t members, tokens;
} attn_packed_prefix;

/* Where it all is, in one process. Shapes as in attn_batch; sequences one after another. */
typedef struct {
    attn_packet_head *head;
    uint32_t *lengths, *query_lengths; /* [size] */
    uint32_t *page_offsets;            /* [size + 1] */
    uint32_t *pages;
    bool *reads;          /* [size] */
    uint64_t *first_rows; /* [size] of a sequence: its first row among the queries, */
    uint64_t *first_news; /* the new rows, */
    uint64_t *first_outs; /* and the outs, or the partial rows */
    attn_part *parts;     /* [size]; with has_parts */
    attn_plan *plan;
    attn_packed_prefix *prefixes;
    uint32_t *members;
    float *sinks;
    char *queries, *keys, *values; /* of the new rows */
    char *outs;                    /* of whole sequences */
    float *lses;
    float *partial_outs, *partial_lses; /* of spread ones */
    size_t bytes;                       /* of it all */
} attn_packet;

/* What a batch comes to; `plan_bytes` of its plan, 0: none. */
attn_packet_counts attn_packet_count(const attn_geometry *geometry, const attn_batch *batch, size_t plan_bytes);

/* Finds the places. `base` may be NULL, for the bytes. */
attn_packet attn_packet_place(const attn_geometry *geometry, const attn_packet_counts *counts, char *base);

/* Fills a packet, whose head has its counts, with all but rows and outputs. */
void attn_packet_pack(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                      const attn_plan *plan);

/* After that: sequence i's queries and new rows. Sequences may be packed at the same time, by several threads. */
void attn_packet_pack_rows(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch,
                           uint32_t i);

/* Copies sequence i's outputs to where the batch wants them. Likewise. */
void attn_packet_deliver(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch, uint32_t i);

/* Rows of one sequence that are appended or exported: its page table, key rows, value rows. */
typedef struct {
    uint32_t *pages;
    char *keys, *values;
    size_t bytes; /* of it all */
} attn_packed_rows;

attn_packed_rows attn_packed_rows_place(const attn_geometry *geometry, uint32_t pages, uint32_t tokens, char *base);

/* The pointers of a batch made of a packet: memory that is kept as long as the process, and grows. Zero at first. */
typedef struct {
    void *memory;
    size_t bytes;
} attn_packet_pointers;

/*
 * Makes `*batch` of a packet, valid as long as both and `pointers` are left alone. ATTN_RESOURCE_EXHAUSTED.
 */
attn_status attn_packet_batch(const attn_packet *packet, const attn_geometry *geometry, attn_packet_pointers *pointers,
                              attn_batch *batch);

#endif
