/* The fast path: stores, plans, attends and merges in one launch, from the live lengths. */
#include "kernels/cuda/backend/run.h"

static attn_status launch_tuned(cuda_backend *self, const attn_cuda_call *call, const attn_cuda_tuning *tuning,
                                attn_cuda_expected expected) {
    const attn_cuda_workspace *workspace = call->batch_invariant ? &self->chunks : &self->runs;
    CUDA_TRY(attn_cuda_decode_launch(call, tuning, workspace, &expected, self->stream));
    self->launches++;
    return attn_ok();
}

static attn_status launch_decode(cuda_backend *self, const attn_cuda_call *call, attn_cuda_expected expected) {
    return launch_tuned(self, call, &self->tuning, expected);
}

static attn_cuda_expected expected_of(const tally *count) {
    return (attn_cuda_expected){count->most_queries, count->shortest, count->longest};
}

/* The same without the prefixes. */
static attn_cuda_expected expected_of_own(const call_memory *memory, uint32_t batch, uint32_t most_queries) {
    const uint32_t *lengths = memory->lengths.host;
    attn_cuda_expected expected = {most_queries, UINT32_MAX, 0};
    for (uint32_t k = 0; k < batch; k++) {
        if (lengths[k] < expected.shortest) expected.shortest = lengths[k];
        if (lengths[k] > expected.longest) expected.longest = lengths[k];
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

/*
 * Prefixes, then the sequences' own tokens, with which the prefixes' results are merged. By themselves, since many
 * queries on one prefix are for the kernel with many rows a block, and few on each sequence's own tokens are not.
 */
static attn_status run_prefixes(cuda_backend *self, attn_cuda_call call, const call_memory *memory, const tally *count,
                                bool is_plain) {
    size_t rows = (size_t)count->shared_rows * call.layer.heads_q;
    size_t out_bytes = rows * call.layer.head_dim_v * sizeof(float);
    attn_status status;
    if (!attn_cuda_arena_reserve(&self->apart, out_bytes + rows * sizeof(float), &status)) return status;
    attn_cuda_call shared = call;
    shared.partial_out = (void *)self->apart.device;
    shared.partial_lse = (void *)(self->apart.device + out_bytes);
    shared.sequences += call.batch;
    shared.batch = count->prefixes;
    ATTN_TRY(launch_decode(self, &shared, (attn_cuda_expected){.most_queries = count->most_sharing_queries}));
    if (is_plain) call.sequences = NULL;
    call.sharing = count->sharing;
    call.shared_out = shared.partial_out;
    call.shared_lse = shared.partial_lse;
    /* All that it needs of the launch before are results, for which it waits before it writes its own. */
    attn_cuda_tuning overlapping = self->tuning;
    overlapping.overlap_launches = self->tuning.is_hopper;
    return launch_tuned(self, &call, &overlapping, expected_of_own(memory, call.batch, count->most_queries));
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
