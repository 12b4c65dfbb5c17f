/* The fast path: stores, plans, attends and merges in one launch, from the live lengths. */
#include "kernels/cuda/backend/run.h"
#include "kernels/cuda/side_by_side.h"

static attn_status launch_decode(cuda_backend *self, const attn_cuda_call *call, attn_cuda_expected expected) {
    const attn_cuda_workspace *workspace = call->batch_invariant ? &self->chunks : &self->runs;
    CUDA_TRY(attn_cuda_decode_launch(call, &self->tuning, workspace, &expected, self->stream));
    self->launches++;
    return attn_ok();
}

static attn_cuda_expected expected_of(const tally *count) {
    return (attn_cuda_expected){count->most_queries, count->shortest, count->longest};
}

/* What is known of some packed sequences: those from `first` to before `end`. */
static attn_cuda_expected expected_of_packed(const call_memory *memory, uint32_t first, uint32_t end,
                                             uint32_t most_queries) {
    const attn_cuda_sequence *sequences = memory->sequences.host;
    attn_cuda_expected expected = {most_queries, UINT32_MAX, 0};
    for (uint32_t k = first; k < end; k++) {
        if (sequences[k].length < expected.shortest) expected.shortest = sequences[k].length;
        if (sequences[k].length > expected.longest) expected.longest = sequences[k].length;
    }
    return expected;
}

/* batch_invariant: as many sequences at a time as the chunks' slots are enough for. */
static attn_status run_chunks(cuda_backend *self, attn_cuda_call call, const tally *count, bool is_plain) {
    const attn_line *line = &self->base.line;
    const attn_cuda_sequence *sequences = call.sequences;
    uint32_t first = 0, size = line->batch->size;
    while (first < size) {
        uint32_t last = first + 1;
        while (last < size && line->starts[last + 1] - line->starts[first] <= self->chunks.slots)
            last++;
        call.sequences = is_plain && last - first == size ? NULL : sequences + first;
        call.batch = last - first;
        ATTN_TRY(launch_decode(self, &call, expected_of(count)));
        first = last;
    }
    return attn_ok();
}

/* What the rule for own tokens beside prefixes wants to know of the packed sequences. */
static void measure_forks(attn_cuda_forks *forks, const call_memory *memory) {
    const attn_cuda_sequence *own = memory->sequences.host, *prefixes = own + forks->own.batch;
    for (uint32_t k = 0; k < forks->own.batch; k++)
        forks->own_tiles += attn_cuda_own_tiles(own[k].length);
    forks->least_queries = UINT32_MAX;
    for (uint32_t k = 0; k < forks->prefixes.batch; k++) {
        if (prefixes[k].query_length < forks->least_queries) forks->least_queries = prefixes[k].query_length;
    }
}

/*
 * Prefixes and the sequences' own tokens, by themselves, since many queries on one prefix are for the kernel with many
 * rows a block, and few on each sequence's own tokens are not.
 */
static attn_status run_prefixes(cuda_backend *self, attn_cuda_call call, const call_memory *memory, const tally *count,
                                bool is_plain) {
    size_t rows = (size_t)count->shared_rows * call.layer.heads_q;
    size_t out_bytes = rows * call.layer.head_dim_v * sizeof(float);
    uint32_t batch = call.batch, all = batch + count->prefixes;
    attn_status status;
    if (!attn_cuda_arena_reserve(&self->apart, out_bytes + rows * sizeof(float), &status)) return status;
    attn_cuda_forks forks = {.own = call,
                             .prefixes = call,
                             .own_expected = expected_of_packed(memory, 0, batch, count->most_queries),
                             .prefixes_expected = expected_of_packed(memory, batch, all, count->most_sharing_queries),
                             .sharing = count->sharing,
                             .apart_out = (void *)self->apart.device,
                             .apart_lse = (void *)(self->apart.device + out_bytes)};
    if (is_plain) forks.own.sequences = NULL;
    forks.prefixes.sequences += batch;
    forks.prefixes.batch = count->prefixes;
    measure_forks(&forks, memory);
    uint32_t own_workers =
        self->own_workers >= 0 ? (uint32_t)self->own_workers : attn_cuda_choose_own_workers(&forks, &self->tuning);
    CUDA_TRY(attn_cuda_launch_forks(&forks, &self->tuning, own_workers, &self->runs, self->stream));
    self->launches += 2;
    return attn_ok();
}

attn_status attn_cuda_run_fast(cuda_backend *self, const attn_batch *batch, const call_memory *memory,
                               const tally *count) {
    attn_cuda_call call = attn_cuda_describe_call(self, batch, memory);
    bool has_new = count->new_rows > 0;
    if (!has_new) call.keys = call.values = NULL;
    bool is_plain = count->most_queries == 1 && count->partial_rows == 0 &&
                    (!has_new || count->new_rows == batch->size); /* as without call.sequences */
    if (batch->batch_invariant) return run_chunks(self, call, count, is_plain);
    if (count->prefixes > 0) return run_prefixes(self, call, memory, count, is_plain);
    if (is_plain) call.sequences = NULL;
    return launch_decode(self, &call, expected_of(count));
}
