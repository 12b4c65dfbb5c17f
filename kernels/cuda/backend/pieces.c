/*
 * Calls of geometries that decode.h has no kernel for: the host walks the line (kernels/split_plan.h) over the lengths
 * of the call and uploads what the thread blocks have to do, in pieces; append, attend and merge follow one another
 * (attend.cu).
 */
#include "kernels/cuda/backend/run.h"
#include "kernels/cuda/backend/upload.h"

/* The lists of a wave, as they grow. */
typedef struct {
    attn_cuda_piece *pieces;
    attn_cuda_merge *merges;
    uint32_t *slots;
    uint32_t piece_count, merge_count, slot_count;
} work_lists;

static attn_cuda_piece piece_of(const attn_run *run, uint64_t begin, uint64_t end) {
    return (attn_cuda_piece){.sequence = run->sequence,
                             .head = run->head,
                             .query_first = run->query_first,
                             .queries = run->queries,
                             .token_begin = (uint32_t)begin,
                             .token_end = (uint32_t)end};
}

static attn_cuda_merge *add_merge(work_lists *lists, const attn_run *run) {
    attn_cuda_merge *merge = &lists->merges[lists->merge_count++];
    *merge = (attn_cuda_merge){.sequence = run->sequence,
                               .head = run->head,
                               .query_first = run->query_first,
                               .queries = run->queries,
                               .first_slot = lists->slot_count};
    return merge;
}

/* Default mode: a run is a piece. The first worker of a cut unit lists its merge. */
static void add_run(const cuda_backend *self, work_lists *lists, const attn_run *run) {
    attn_cuda_piece piece = piece_of(run, run->token_begin, run->token_end);
    piece.to = run->whole ? ATTN_CUDA_TO_OUT : ATTN_CUDA_TO_SLOT;
    piece.slot = run->whole ? 0 : run->slot;
    lists->pieces[lists->piece_count++] = piece;
    if (run->whole || run->tile_begin > 0) return;
    attn_cuda_merge *merge = add_merge(lists, run);
    merge->slot_count = attn_run_slots(&self->base.line, run, lists->slots + lists->slot_count);
    lists->slot_count += merge->slot_count;
}

/* batch_invariant: a chunk is a piece, of a part in its own place, else in the slot of its place in the wave. */
static void add_chunks(const cuda_backend *self, work_lists *lists, const attn_run *run) {
    const attn_line *line = &self->base.line;
    bool is_part = attn_batch_part(line->batch, run->sequence) != NULL;
    uint64_t unit_slot = run->line_tile - run->tile_begin - line->begin;
    for (uint64_t tile = run->tile_begin; tile < run->tile_end; tile++) {
        uint64_t begin, end;
        attn_run_tile(line, run, tile, &begin, &end);
        attn_cuda_piece piece = piece_of(run, begin, end);
        piece.to = is_part ? ATTN_CUDA_TO_OUT : ATTN_CUDA_TO_SLOT;
        piece.slot = (uint32_t)(is_part ? attn_run_chunk(run, tile) : unit_slot + tile);
        if (is_part && piece.slot >= attn_cuda_chunks(line->batch->lengths[run->sequence]))
            continue; /* without any token */
        lists->pieces[lists->piece_count++] = piece;
    }
    if (is_part || run->tile_begin > 0) return;
    attn_cuda_merge *merge = add_merge(lists, run);
    merge->slot_count = (uint32_t)run->unit_tiles;
    for (uint64_t tile = 0; tile < run->unit_tiles; tile++) {
        lists->slots[lists->slot_count++] = (uint32_t)(unit_slot + tile);
    }
}

/* What every worker does in this wave. */
static work_lists list_work(const cuda_backend *self, const attn_plan *plan, const call_memory *memory) {
    const attn_line *line = &self->base.line;
    work_lists lists = {.pieces = memory->pieces.host, .merges = memory->merges.host, .slots = memory->slots.host};
    uint32_t *first_pieces = memory->first_pieces.host;
    for (uint32_t w = 0; w < line->workers; w++) {
        attn_walk walk;
        attn_run run;
        first_pieces[w] = lists.piece_count;
        attn_walk_start(&walk, line, w, plan);
        while (attn_walk_next(&walk, &run)) {
            (line->batch->batch_invariant ? add_chunks : add_run)(self, &lists, &run);
        }
    }
    first_pieces[line->workers] = lists.piece_count;
    return lists;
}

/* ------------------------------------------------------------------------------------------- */
/* Launches */

static attn_cuda_work describe_work(const cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                                    uint32_t merges, uint32_t most_queries) {
    return (attn_cuda_work){
        .call = attn_cuda_describe_call(self, batch, memory),
        .pieces = memory->pieces.device,
        .first_pieces = memory->first_pieces.device,
        .merges = memory->merges.device,
        .slots = memory->slots.device,
        .slot_out = self->slot_out,
        .slot_lse = self->slot_lse,
        .workers = self->base.line.workers,
        .merge_count = merges,
        .rows = (most_queries < self->base.line.block_queries ? most_queries : self->base.line.block_queries) *
                attn_cuda_group(&self->base.geometry),
    };
}

static attn_status run_wave(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                            const call_memory *memory, uint32_t most_queries) {
    work_lists lists = list_work(self, plan, memory);
    ATTN_TRY(attn_cuda_upload(memory->first_pieces, lists.pieces + lists.piece_count, self->stream));
    attn_cuda_work work = describe_work(self, batch, memory, lists.merge_count, most_queries);
    CUDA_TRY(attn_cuda_attend(&work, self->stream));
    CUDA_TRY(attn_cuda_merge_units(&work, self->stream));
    self->launches += lists.merge_count > 0 ? 2 : 1;
    return attn_ok();
}

static attn_status append_new_rows(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                                   uint32_t rows) {
    attn_cuda_layer layer = attn_cuda_layer_at(self, batch->layer);
    CUDA_TRY(attn_cuda_append(&layer, memory->places.device, memory->keys.device, memory->values.device, rows,
                              memory->status, self->stream));
    self->launches += rows > 0;
    return attn_ok();
}

/* Waves of pieces: one, but in batch_invariant mode. */
static attn_status run_waves(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                             const call_memory *memory, const tally *count) {
    if (!batch->batch_invariant) return run_wave(self, batch, plan, memory, count->most_queries);
    attn_line *line = &self->base.line;
    attn_line_first_wave(line);
    for (bool first = true; attn_line_next_wave(line, self->slots); first = false) {
        if (!first) CUDA_TRY(cudaStreamSynchronize(self->stream)); /* the lists have been read */
        ATTN_TRY(run_wave(self, batch, plan, memory, count->most_queries));
    }
    return attn_ok();
}

attn_status attn_cuda_run_pieces(cuda_backend *self, const attn_batch *batch, const attn_plan *plan,
                                 const call_memory *memory, const tally *count) {
    ATTN_TRY(append_new_rows(self, batch, memory, count->new_rows));
    return run_waves(self, batch, plan, memory, count);
}
