/*
 * A thread block attends to its pieces one after the other. Tokens go by in tiles: keys and values are copied to
 * shared memory (cp.async), the values of a tile while its scores are computed, the next keys while its values are
 * used. A thread computes the scores of one token for some rows; a warp softens some rows; a thread sums a pair of
 * value columns for some rows. All sums are float32, and P is not rounded.
 *
 * Built with -fmad=false: what is to be bit by bit the CPU's (the merge) stays so, and the hot loops say fmaf.
 */
#include "kernels/cuda/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/layout.cuh"
#include "kernels/cuda/results.cuh"

namespace {

constexpr uint32_t THREADS = ATTN_CUDA_THREADS;
constexpr uint32_t WARPS = THREADS / 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
using layout::PIECE_BYTES;
using namespace results;

/* ------------------------------------------------------------------------------------------- */
/* Elements */

template <typename T> struct element;

template <> struct element<__nv_bfloat16> {
    static __device__ void load_16_bytes(const void *from, float *to) {
        uint4 bits = *(const uint4 *)from;
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = __uint_as_float(words[i] << 16);
            to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    static __device__ float2 load_pair(const void *from) {
        uint32_t word = *(const uint32_t *)from;
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    }
};

template <> struct element<__half> {
    static __device__ void load_16_bytes(const void *from, float *to) {
        uint4 bits = *(const uint4 *)from;
        const __half2 *pairs = (const __half2 *)&bits;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = __half22float2(pairs[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    }
    static __device__ float2 load_pair(const void *from) { return __half22float2(*(const __half2 *)from); }
};

template <> struct element<float> {
    static __device__ void load_16_bytes(const void *from, float *to) { *(float4 *)to = *(const float4 *)from; }
    static __device__ float2 load_pair(const void *from) { return *(const float2 *)from; }
};

/* ------------------------------------------------------------------------------------------- */
/* The pool */

/* A 16-byte piece a thread: rows [token][head] to their tiles. */
template <typename KV>
__global__ void append_kernel(attn_cuda_layer layer, const uint32_t *places, const void *keys, const void *values,
                              uint32_t tokens, uint32_t *status) {
    uint32_t key_pieces = layer.head_dim * KV::BYTES / PIECE_BYTES;
    uint32_t value_pieces = layer.head_dim_v * KV::BYTES / PIECE_BYTES;
    uint32_t row_pieces = key_pieces + value_pieces;
    uint64_t total = (uint64_t)tokens * layer.heads_kv * row_pieces;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total;
         i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t row = i / row_pieces;
        uint32_t piece = i % row_pieces, head = row % layer.heads_kv;
        bool is_value = piece >= key_pieces;
        if (is_value) piece -= key_pieces;
        uint32_t place = places[row / layer.heads_kv], page = place / layer.page_size;
        if (page >= layer.pages) {
            *status = 1;
            continue;
        }
        const float *scales = is_value ? layer.value_scales : layer.key_scales;
        uint4 stored =
            KV::load_new(layer, is_value ? values : keys, row * (is_value ? layer.head_dim_v : layer.head_dim), piece,
                         scales != nullptr ? scales[head] : 1.0f);
        *(uint4 *)layout::pool_piece(layer, page, head, place % layer.page_size, is_value, piece) = stored;
    }
}

/* All bits of some slots of a page set, which is NaN in every dtype. A block a head. */
__global__ void poison_kernel(attn_cuda_layer layer, uint32_t page, uint32_t first_slot, uint32_t slots) {
    for (uint32_t values = 0; values < 2; values++) {
        uint32_t pieces = (values ? layer.head_dim_v : layer.head_dim) * layer.element_bytes / PIECE_BYTES;
        for (uint32_t i = threadIdx.x; i < slots * pieces; i += blockDim.x) {
            char *to = layout::pool_piece(layer, page, blockIdx.x, first_slot + i / pieces, values, i % pieces);
            *(uint4 *)to = make_uint4(ALL_LANES, ALL_LANES, ALL_LANES, ALL_LANES);
        }
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Asynchronous copies */

/* 16 bytes to shared memory; zeros if there is no source. */
__device__ inline void copy_piece(uint32_t to, const void *from) {
    uint32_t bytes = from == nullptr ? 0 : PIECE_BYTES;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(from == nullptr ? (const void *)"" : from), "r"(bytes)
                 : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
    __syncthreads();
}

/* ------------------------------------------------------------------------------------------- */
/* Attending */

/* Tokens a tile of shared memory holds. */
template <typename T> __host__ __device__ constexpr uint32_t tile_tokens() { return sizeof(T) == 4 ? 32 : 64; }

/* Rows of a tile in shared memory lie an odd number of pieces apart, more or less: few bank conflicts. */
__host__ __device__ constexpr uint32_t shared_stride(uint32_t row_bytes) { return row_bytes + PIECE_BYTES; }

/* A block's shared memory: queries, scores, what is known of each row; then a tile's keys and its values. */
template <typename T, uint32_t ROWS> struct block_memory {
    float scores[ROWS][tile_tokens<T>()];
    float queries[ROWS][256];
    float maximum[ROWS], sum[ROWS], decay[ROWS], weight[ROWS];
    uint2 visible[ROWS];
};

template <typename T, uint32_t ROWS> size_t shared_bytes(const attn_cuda_layer &layer) {
    return sizeof(block_memory<T, ROWS>) +
           tile_tokens<T>() * (shared_stride(layer.head_dim * sizeof(T)) + shared_stride(layer.head_dim_v * sizeof(T)));
}

/* Starts copying tokens first .. first + tile - 1; those outside begin .. end - 1 become zero. */
template <typename T>
__device__ inline void load_tile(const attn_cuda_work &work, const attn_cuda_piece &piece, const uint32_t *pages,
                                 uint32_t first, bool values, uint32_t to) {
    const attn_cuda_layer &layer = work.call.layer;
    uint32_t row_bytes = (values ? layer.head_dim_v : layer.head_dim) * sizeof(T);
    uint32_t pieces = row_bytes / PIECE_BYTES, stride = shared_stride(row_bytes);
    for (uint32_t i = threadIdx.x; i < tile_tokens<T>() * pieces; i += THREADS) {
        uint32_t row = i / pieces, c = i % pieces, token = first + row;
        const char *from = nullptr;
        if (token >= piece.token_begin && token < piece.token_end) {
            uint32_t page = pages[token / layer.page_size];
            if (page < layer.pages) {
                from = layout::pool_piece(layer, page, piece.head, token % layer.page_size, values, c);
            } else {
                *work.call.status = 1;
            }
        }
        copy_piece(to + row * stride + c * PIECE_BYTES, from);
    }
    commit_copies();
}

template <typename T, uint32_t ROWS>
__device__ inline void load_queries(const attn_cuda_work &work, const attn_cuda_piece &piece,
                                    const attn_cuda_sequence &sequence, block_memory<T, ROWS> &memory) {
    const attn_cuda_layer &layer = work.call.layer;
    uint32_t group = layer.heads_q / layer.heads_kv, rows = piece.queries * group;
    constexpr uint32_t ELEMENTS = PIECE_BYTES / sizeof(T);
    uint32_t pieces = layer.head_dim / ELEMENTS;
    for (uint32_t i = threadIdx.x; i < ROWS * pieces; i += THREADS) {
        uint32_t row = i / pieces, c = i % pieces;
        float floats[ELEMENTS] = {};
        if (row < rows) {
            size_t query = (size_t)sequence.first_query + piece.query_first + row / group;
            size_t at = (query * layer.heads_q + piece.head * group + row % group) * layer.head_dim + c * ELEMENTS;
            element<T>::load_16_bytes((const T *)work.call.queries + at, floats);
        }
#pragma unroll
        for (uint32_t e = 0; e < ELEMENTS; e++)
            memory.queries[row][c * ELEMENTS + e] = floats[e];
    }
    if (threadIdx.x < ROWS) {
        uint32_t row = threadIdx.x;
        uint2 visible = make_uint2(0, 0);
        if (row < rows) visible = row_visible(sequence, work.call.window, piece.query_first + row / group);
        memory.visible[row] =
            make_uint2(max(visible.x, piece.token_begin), min(visible.y, max(piece.token_end, piece.token_begin)));
        memory.maximum[row] = -INFINITY;
        memory.sum[row] = 0.0f;
    }
}

/* Scores of one token and some rows, a thread. */
template <typename T, uint32_t ROWS>
__device__ inline void score_tile(const attn_cuda_work &work, block_memory<T, ROWS> &memory, const char *keys,
                                  uint32_t first) {
    constexpr uint32_t TOKENS = tile_tokens<T>();
    constexpr uint32_t ROWS_A_THREAD = ROWS * TOKENS / THREADS;
    constexpr uint32_t ELEMENTS = PIECE_BYTES / sizeof(T);
    uint32_t token = threadIdx.x % TOKENS, first_row = threadIdx.x / TOKENS * ROWS_A_THREAD;
    const char *key = keys + token * shared_stride(work.call.layer.head_dim * sizeof(T));
    float sums[ROWS_A_THREAD] = {};
    for (uint32_t e = 0; e < work.call.layer.head_dim; e += ELEMENTS) {
        float elements[ELEMENTS];
        element<T>::load_16_bytes(key + e * sizeof(T), elements);
#pragma unroll
        for (uint32_t r = 0; r < ROWS_A_THREAD; r++) {
#pragma unroll
            for (uint32_t i = 0; i < ELEMENTS; i += 4) {
                float4 query = *(const float4 *)&memory.queries[first_row + r][e + i];
                sums[r] = fmaf(query.x, elements[i], sums[r]);
                sums[r] = fmaf(query.y, elements[i + 1], sums[r]);
                sums[r] = fmaf(query.z, elements[i + 2], sums[r]);
                sums[r] = fmaf(query.w, elements[i + 3], sums[r]);
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < ROWS_A_THREAD; r++) {
        uint2 visible = memory.visible[first_row + r];
        float score = sums[r] * work.call.scale;
        if (work.call.softcap > 0) score = work.call.softcap * tanhf(score / work.call.softcap);
        bool sees = first + token >= visible.x && first + token < visible.y;
        memory.scores[first_row + r][token] = sees ? score : -INFINITY;
    }
}

/* Scores become probabilities relative to the new maximum. A warp a row. */
template <typename T, uint32_t ROWS> __device__ inline void soften_tile(block_memory<T, ROWS> &memory) {
    constexpr uint32_t TOKENS = tile_tokens<T>();
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t row = warp; row < ROWS; row += WARPS) {
        float largest = -INFINITY;
#pragma unroll
        for (uint32_t t = 0; t < TOKENS; t += 32)
            largest = fmaxf(largest, memory.scores[row][t + lane]);
#pragma unroll
        for (uint32_t step = 16; step > 0; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        float before = memory.maximum[row], after = fmaxf(before, largest);
        /* Where nothing has been seen yet, every difference is to be -inf, and not NaN. */
        float shift = after == -INFINITY ? 0.0f : after, sum = 0.0f;
#pragma unroll
        for (uint32_t t = 0; t < TOKENS; t += 32) {
            float power = expf(memory.scores[row][t + lane] - shift);
            memory.scores[row][t + lane] = power;
            sum += power;
        }
#pragma unroll
        for (uint32_t step = 16; step > 0; step /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, step);
        __syncwarp();
        if (lane == 0) {
            float decay = expf(before - shift);
            memory.decay[row] = decay;
            memory.maximum[row] = after;
            memory.sum[row] = fmaf(memory.sum[row], decay, sum);
        }
    }
}

/* The pair of columns and the rows that a thread sums. PARTS threads share a pair of columns. */
template <uint32_t ROWS, uint32_t PARTS> struct thread_sums {
    static constexpr uint32_t COUNT = ROWS / PARTS;
    float2 sums[COUNT];
};

template <typename T, uint32_t ROWS, uint32_t PARTS>
__device__ inline void add_values(const attn_cuda_work &work, const block_memory<T, ROWS> &memory, const char *values,
                                  thread_sums<ROWS, PARTS> &mine) {
    constexpr uint32_t COUNT = thread_sums<ROWS, PARTS>::COUNT;
    uint32_t pair = threadIdx.x % (THREADS / PARTS), first_row = threadIdx.x / (THREADS / PARTS) * COUNT;
    uint32_t stride = shared_stride(work.call.layer.head_dim_v * sizeof(T));
    if (2 * pair >= work.call.layer.head_dim_v) return;
#pragma unroll
    for (uint32_t r = 0; r < COUNT; r++) {
        float decay = memory.decay[first_row + r];
        mine.sums[r].x *= decay;
        mine.sums[r].y *= decay;
    }
    const char *value = values + pair * 2 * sizeof(T);
    for (uint32_t t = 0; t < tile_tokens<T>(); t += 4) {
        float2 columns[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            columns[i] = element<T>::load_pair(value + (t + i) * stride);
#pragma unroll
        for (uint32_t r = 0; r < COUNT; r++) {
            float4 powers = *(const float4 *)&memory.scores[first_row + r][t];
            mine.sums[r].x = fmaf(powers.x, columns[0].x, mine.sums[r].x);
            mine.sums[r].y = fmaf(powers.x, columns[0].y, mine.sums[r].y);
            mine.sums[r].x = fmaf(powers.y, columns[1].x, mine.sums[r].x);
            mine.sums[r].y = fmaf(powers.y, columns[1].y, mine.sums[r].y);
            mine.sums[r].x = fmaf(powers.z, columns[2].x, mine.sums[r].x);
            mine.sums[r].y = fmaf(powers.z, columns[2].y, mine.sums[r].y);
            mine.sums[r].x = fmaf(powers.w, columns[3].x, mine.sums[r].x);
            mine.sums[r].y = fmaf(powers.w, columns[3].y, mine.sums[r].y);
        }
    }
}

/* Normalises, and writes the piece's rows to its slot or where they end. */
template <typename T, uint32_t ROWS, uint32_t PARTS>
__device__ inline void deliver(const attn_cuda_work &work, const attn_cuda_piece &piece,
                               const attn_cuda_sequence &sequence, block_memory<T, ROWS> &memory,
                               const thread_sums<ROWS, PARTS> &mine) {
    constexpr uint32_t COUNT = thread_sums<ROWS, PARTS>::COUNT;
    uint32_t group = work.call.layer.heads_q / work.call.layer.heads_kv;
    uint32_t rows = piece.queries * group, columns = work.call.layer.head_dim_v;
    if (threadIdx.x < rows) {
        uint32_t row = threadIdx.x;
        float sum = memory.sum[row];
        float lse = sum == 0.0f ? -INFINITY : memory.maximum[row] + logf(sum);
        if (piece.to == ATTN_CUDA_TO_SLOT) {
            work.slot_lse[(size_t)piece.slot * ATTN_CUDA_MAX_ROWS + row] = lse;
        } else {
            destination to = find_destination(work.call, sequence, piece.query_first + row / group,
                                              piece.head * group + row % group, piece.slot);
            if (to.sink != nullptr) {
                row_weights weights = weigh(1, to.sink, [&](uint32_t) { return lse; });
                memory.weight[row] = weight_of(weights, lse);
                lse = merged_lse(weights);
            } else {
                memory.weight[row] = 1.0f;
            }
            write_lse(work.call, to, lse);
        }
    }
    __syncthreads();
    uint32_t pair = threadIdx.x % (THREADS / PARTS), first_row = threadIdx.x / (THREADS / PARTS) * COUNT;
    if (2 * pair >= columns) return;
#pragma unroll
    for (uint32_t r = 0; r < COUNT; r++) {
        uint32_t row = first_row + r;
        if (row >= rows) break;
        float sum = memory.sum[row], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        float2 out = make_float2(mine.sums[r].x * inverse, mine.sums[r].y * inverse);
        if (piece.to == ATTN_CUDA_TO_SLOT) {
            size_t at = ((size_t)piece.slot * ATTN_CUDA_MAX_ROWS + row) * columns + 2 * pair;
            work.slot_out[at] = out.x;
            work.slot_out[at + 1] = out.y;
        } else {
            destination to = find_destination(work.call, sequence, piece.query_first + row / group,
                                              piece.head * group + row % group, piece.slot);
            write_out<T>(work.call, to, 2 * pair, out.x * memory.weight[row]);
            write_out<T>(work.call, to, 2 * pair + 1, out.y * memory.weight[row]);
        }
    }
}

template <typename T, uint32_t ROWS, uint32_t PARTS>
__global__ void __launch_bounds__(THREADS) attend_kernel(const __grid_constant__ attn_cuda_work work) {
    extern __shared__ __align__(16) char shared[];
    constexpr uint32_t TOKENS = tile_tokens<T>();
    block_memory<T, ROWS> &memory = *(block_memory<T, ROWS> *)shared;
    char *keys = shared + sizeof memory;
    char *values = keys + TOKENS * shared_stride(work.call.layer.head_dim * sizeof(T));
    uint32_t keys_at = (uint32_t)__cvta_generic_to_shared(keys), values_at = (uint32_t)__cvta_generic_to_shared(values);
    for (uint32_t i = work.first_pieces[blockIdx.x]; i < work.first_pieces[blockIdx.x + 1]; i++) {
        attn_cuda_piece piece = work.pieces[i];
        attn_cuda_sequence sequence = work.call.sequences[piece.sequence];
        const uint32_t *pages = work.call.page_table + sequence.page_offset;
        thread_sums<ROWS, PARTS> mine = {};
        uint32_t first = piece.token_begin / TOKENS * TOKENS;
        __syncthreads(); /* the piece before has been delivered */
        if (first < piece.token_end) load_tile<T>(work, piece, pages, first, false, keys_at);
        load_queries<T, ROWS>(work, piece, sequence, memory);
        for (; first < piece.token_end; first += TOKENS) {
            load_tile<T>(work, piece, pages, first, true, values_at);
            wait_for_copies<1>(); /* keys */
            score_tile<T, ROWS>(work, memory, keys, first);
            __syncthreads();
            bool more = first + TOKENS < piece.token_end;
            if (more) load_tile<T>(work, piece, pages, first + TOKENS, false, keys_at);
            soften_tile<T, ROWS>(memory);
            if (more) {
                wait_for_copies<1>(); /* values */
            } else {
                wait_for_copies<0>();
            }
            add_values<T, ROWS, PARTS>(work, memory, values, mine);
            __syncthreads();
        }
        __syncthreads();
        deliver<T, ROWS, PARTS>(work, piece, sequence, memory, mine);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Merging: a cut unit a block, a row a warp */

template <typename T>
__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ attn_cuda_work work) {
    attn_cuda_merge unit = work.merges[blockIdx.x];
    attn_cuda_sequence sequence = work.call.sequences[unit.sequence];
    const uint32_t *slots = work.slots + unit.first_slot;
    uint32_t group = work.call.layer.heads_q / work.call.layer.heads_kv;
    uint32_t rows = unit.queries * group, columns = work.call.layer.head_dim_v;
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t row = threadIdx.x / 32; row < rows; row += WARPS) {
        destination to =
            find_destination(work.call, sequence, unit.query_first + row / group, unit.head * group + row % group, 0);
        auto lse_of = [&](uint32_t c) { return work.slot_lse[(size_t)slots[c] * ATTN_CUDA_MAX_ROWS + row]; };
        row_weights weights = weigh(unit.slot_count, to.sink, lse_of);
        float sums[256 / 32] = {};
        for (uint32_t c = 0; weights.any && c < unit.slot_count; c++) {
            float lse = lse_of(c);
            if (lse == -INFINITY) continue;
            float weight = weight_of(weights, lse);
            const float *partial = work.slot_out + ((size_t)slots[c] * ATTN_CUDA_MAX_ROWS + row) * columns;
#pragma unroll
            for (uint32_t i = 0; i < 256 / 32; i++) {
                if (i * 32 + lane < columns) sums[i] += weight * partial[i * 32 + lane];
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 256 / 32; i++) {
            if (i * 32 + lane < columns) write_out<T>(work.call, to, i * 32 + lane, sums[i]);
        }
        if (lane == 0) write_lse(work.call, to, merged_lse(weights));
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Launching */

/* kernel<<<blocks, threads, shared, on>>>(arguments..), as a function. */
template <typename... PARAMETERS, typename... ARGUMENTS>
cudaError_t launch(void (*kernel)(PARAMETERS...), uint32_t blocks, uint32_t threads, size_t shared, cudaStream_t on,
                   ARGUMENTS... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = on;
    return cudaLaunchKernelEx(&config, kernel, PARAMETERS(arguments)...);
}

template <typename T, uint32_t ROWS, uint32_t PARTS>
cudaError_t launch_attend(const attn_cuda_work &work, cudaStream_t on) {
    return launch(attend_kernel<T, ROWS, PARTS>, work.workers, THREADS, shared_bytes<T, ROWS>(work.call.layer), on,
                  work);
}

template <typename T> cudaError_t launch_attend_of(const attn_cuda_work &work, cudaStream_t on) {
    bool wide = work.call.layer.head_dim_v > THREADS; /* a thread has two columns */
    if (work.rows <= 4) return wide ? launch_attend<T, 4, 1>(work, on) : launch_attend<T, 4, 2>(work, on);
    return wide ? launch_attend<T, ATTN_CUDA_MAX_ROWS, 1>(work, on) : launch_attend<T, ATTN_CUDA_MAX_ROWS, 2>(work, on);
}

template <typename T, uint32_t ROWS, uint32_t PARTS> cudaError_t allow_shared() {
    attn_cuda_layer widest = {};
    widest.head_dim = widest.head_dim_v = 256;
    return cudaFuncSetAttribute(attend_kernel<T, ROWS, PARTS>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)shared_bytes<T, ROWS>(widest));
}

template <typename T> cudaError_t allow_shared_of() {
    cudaError_t error = allow_shared<T, 4, 1>();
    if (error == cudaSuccess) error = allow_shared<T, 4, 2>();
    if (error == cudaSuccess) error = allow_shared<T, ATTN_CUDA_MAX_ROWS, 1>();
    if (error == cudaSuccess) error = allow_shared<T, ATTN_CUDA_MAX_ROWS, 2>();
    return error;
}

template <typename KV>
cudaError_t launch_append(const attn_cuda_layer &layer, const uint32_t *places, const void *keys, const void *values,
                          uint32_t tokens, uint32_t *status, cudaStream_t on) {
    uint64_t pieces = (uint64_t)tokens * layer.heads_kv * (layer.head_dim + layer.head_dim_v) * KV::BYTES / PIECE_BYTES;
    uint32_t blocks = (uint32_t)min((pieces + 255) / 256, (uint64_t)4096);
    return launch(append_kernel<KV>, blocks, 256, 0, on, layer, places, keys, values, tokens, status);
}

template <typename T> cudaError_t launch_merge(const attn_cuda_work &work, cudaStream_t on) {
    return launch(merge_kernel<T>, work.merge_count, THREADS, 0, on, work);
}

} /* namespace */

extern "C" uint32_t attn_cuda_tile_bytes(uint32_t page_size, uint32_t head_dim, uint32_t head_dim_v,
                                         uint32_t element_bytes) {
    return page_size * (head_dim + head_dim_v) * element_bytes;
}

extern "C" int attn_cuda_poison(const attn_cuda_layer *layer, uint32_t page, uint32_t first_slot, uint32_t slots,
                                void *stream) {
    return launch(poison_kernel, layer->heads_kv, 128, 0, (cudaStream_t)stream, *layer, page, first_slot, slots);
}

extern "C" int attn_cuda_append(const attn_cuda_layer *layer, const uint32_t *places, const void *keys,
                                const void *values, uint32_t tokens, uint32_t *status, void *stream) {
    if (tokens == 0) return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    switch (layer->kv_dtype) {
    case ATTN_BF16: return launch_append<elements::bf16>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP16: return launch_append<elements::fp16>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP32: return launch_append<elements::fp32>(*layer, places, keys, values, tokens, status, on);
    case ATTN_FP8_E4M3: return launch_append<elements::fp8>(*layer, places, keys, values, tokens, status, on);
    default: return cudaErrorInvalidValue;
    }
}

extern "C" int attn_cuda_attend(const attn_cuda_work *work, void *stream) {
    cudaStream_t on = (cudaStream_t)stream;
    switch (work->call.layer.dtype) {
    case ATTN_BF16: return launch_attend_of<__nv_bfloat16>(*work, on);
    case ATTN_FP16: return launch_attend_of<__half>(*work, on);
    case ATTN_FP32: return launch_attend_of<float>(*work, on);
    default: return cudaErrorInvalidValue;
    }
}

extern "C" int attn_cuda_merge_units(const attn_cuda_work *work, void *stream) {
    if (work->merge_count == 0) return cudaSuccess;
    cudaStream_t on = (cudaStream_t)stream;
    switch (work->call.layer.dtype) {
    case ATTN_BF16: return launch_merge<__nv_bfloat16>(*work, on);
    case ATTN_FP16: return launch_merge<__half>(*work, on);
    case ATTN_FP32: return launch_merge<float>(*work, on);
    default: return cudaErrorInvalidValue;
    }
}

extern "C" int attn_cuda_prepare(void) {
    cudaError_t error = allow_shared_of<__nv_bfloat16>();
    if (error == cudaSuccess) error = allow_shared_of<__half>();
    if (error == cudaSuccess) error = allow_shared_of<float>();
    return error;
}
