/*
 * The instructions that the decode kernels are made of, one function each. Shared-memory addresses are the 32-bit
 * ones of the shared window (__cvta_generic_to_shared).
 */
#ifndef ATTND_KERNELS_CUDA_INSTRUCTIONS_CUH
#define ATTND_KERNELS_CUDA_INSTRUCTIONS_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

namespace ptx {

/* ------------------------------------------------------------------------------------------- */
/* Checked builds (device_memory.h) */

#ifdef ATTN_CUDA_CHECKED
constexpr bool IS_CHECKED = true;
#else
constexpr bool IS_CHECKED = false;
#endif

/* In checked builds the launch fails if this does not hold. */
__device__ inline void require(bool holds) {
    if (IS_CHECKED && !holds) __trap();
}

/* ------------------------------------------------------------------------------------------- */
/* mbarrier and bulk copy */

__device__ inline uint32_t shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Makes barrier_init visible to the copy engine. */
__device__ inline void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Waits until the phase of this parity is complete. */
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#else
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}

/* Arrives, and says that so many bytes will arrive too. */
__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Copies `bytes` (a multiple of 16) from global to shared memory; they count on `barrier`. Read once: evicted first. */
__device__ inline void bulk_copy(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

/* The same to blocks of the cluster, a bit each: to the same places there, and the bytes count on each one's barrier.
 */
__device__ inline void bulk_copy_to_blocks(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                           uint16_t blocks, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4, %5;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"(blocks), "l"(policy)
                 : "memory");
#endif
}

__device__ inline uint64_t evict_first_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline uint64_t evict_last_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline void store_with_policy(float *to, float value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(value), "l"(policy) : "memory");
}

__device__ inline void store_with_policy(float2 *to, float2 value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(to), "f"(value.x), "f"(value.y),
                 "l"(policy)
                 : "memory");
}

__device__ inline void store_with_policy(float4 *to, float4 value, uint64_t policy) {
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w), "l"(policy)
                 : "memory");
}

/* Makes what this thread wrote visible to bulk copies and wgmma that are started afterwards. */
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

/* The same of what was written to shared memory. */
__device__ inline void shared_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* 16 bytes of zeros, to shared memory. */
__device__ inline void store_zeros(uint32_t to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

/* 16 bytes from global to shared memory, by the thread, asynchronously. */
__device__ inline void copy_16_bytes(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* Arrives at the barrier, for one of the arrivals it was made with, once this thread's copies so far are there. */
__device__ inline void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Those of this thread's copies that no other group has been made of become one. */
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most so many of the groups committed last are still on their way. */
template <int GROUPS> __device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

/* A barrier of a group of threads; __syncthreads has number 0. */
template <int THREADS> __device__ inline void named_barrier(uint32_t group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
}

/* Arrives at it without waiting; THREADS are those who arrive and those who wait. */
template <int THREADS> __device__ inline void named_barrier_arrive(uint32_t group) {
    asm volatile("bar.arrive %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
}

/* ------------------------------------------------------------------------------------------- */
/* Global memory */

/*
 * Adds, after all that this thread, and threads it has met at a barrier, wrote; what others wrote before they added is
 * visible afterwards, also to threads met at a later barrier. Returns the value before.
 */
__device__ inline uint32_t atomic_add_acquire_release(uint32_t *word, uint32_t number) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(number) : "memory");
    return before;
}

__device__ inline uint64_t atomic_add_acquire_release(uint64_t *word, uint64_t number) {
    uint64_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(word), "l"(number) : "memory");
    return before;
}

/* What others wrote before they changed the word is visible afterwards, likewise. */
__device__ inline uint64_t load_acquire(const uint64_t *word) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

/* Stores and loads of words that others read and write at the same time: each word is either there or not. */
__device__ inline void store_relaxed(uint32_t *to, uint4 words) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w)
                 : "memory");
}

__device__ inline void store_relaxed(uint32_t *to, uint2 words) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words.x), "r"(words.y) : "memory");
}

__device__ inline void store_relaxed(uint32_t *to, uint32_t word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ inline uint32_t load_relaxed_1(const uint32_t *from) {
    uint32_t word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

__device__ inline uint4 load_relaxed_4(const uint32_t *from) {
    uint4 words;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
    return words;
}

__device__ inline uint2 load_relaxed_2(const uint32_t *from) {
    uint2 words;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from) : "memory");
    return words;
}

/* Writes `to` if the word is `from`. Returns what it was. */
__device__ inline uint64_t compare_and_swap(uint64_t *word, uint64_t from, uint64_t to) {
    uint64_t before;
    asm volatile("atom.cas.acq_rel.gpu.global.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(word), "l"(from), "l"(to)
                 : "memory");
    return before;
}

__device__ inline void prefetch_l2(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

/* Of the device's clock, which ticks a microsecond or finer. */
__device__ inline uint64_t global_time_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}

__device__ inline uint32_t multiprocessor() {
    uint32_t number;
    asm volatile("mov.u32 %0, %smid;" : "=r"(number));
    return number;
}

/* ------------------------------------------------------------------------------------------- */
/* Clusters: blocks that can write to each other's shared memory. From sm_90 on */

/*
 * Says that this thread has got its block's shared memory ready for the others. Who has made barriers there has them
 * seen by barrier_init_fence; nothing else is, so that nobody has to wait for what a release would.
 */
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

/* Waits until all threads of the cluster have arrived, or ended. */
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* Where block `rank` of the cluster has what lies here at `address`. */
__device__ inline uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
    uint32_t there = address;
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
#endif
    return there;
}

/*
 * Arrives at a barrier of a block of the cluster, given by address_in_cluster. It says that something has been read, no
 * more: with .release.cluster it would wait for all that the thread has written to global memory, too.
 */
__device__ inline void barrier_arrive_in_cluster(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/* Stores to a block of the cluster; the bytes count on `barrier`, of that block. */
__device__ inline void store_in_cluster(uint32_t to, float value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(value),
                 "r"(barrier)
                 : "memory");
#endif
}

__device__ inline void store_in_cluster(uint32_t to, float2 value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(value.x), "f"(value.y), "r"(barrier)
                 : "memory");
#endif
}

__device__ inline void store_in_cluster(uint32_t to, float4 value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
                 : "memory");
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Programmatic dependent launch: both are no-ops in an ordinary launch */

__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ------------------------------------------------------------------------------------------- */
/* Matrix instructions */

__device__ inline void load_matrices(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

/* The 8 x 8 matrix of bf16 that the warp holds, transposed. */
__device__ inline uint32_t transpose_matrix(uint32_t matrix) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

/* c[16 x 8] += a[16 x 16] b[16 x 8], of bf16. */
__device__ inline void multiply_add_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same of fp16. */
__device__ inline void multiply_add_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Two floats as bf16 or fp16, the first in the low half. */
__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ inline uint32_t pack_fp16(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* The e4m3 numbers in the low two bytes as fp16, exactly. */
__device__ inline uint32_t widen_e4m3(uint32_t bytes) {
    uint32_t pair;
#if __CUDA_ARCH__ >= 890
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %1;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "}"
        : "=r"(pair)
        : "r"(bytes));
#else
    /* Bit by bit an fp16 with an exponent 8 too small, but for NaN, which has to be one afterwards, too. */
    uint32_t spread = __byte_perm(bytes, 0, 0x1404);
    uint32_t scaled = (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
    __half2 exact = __hmul2(*reinterpret_cast<__half2 *>(&scaled), __float2half2_rn(256.0f));
    pair = *reinterpret_cast<uint32_t *>(&exact);
    if ((bytes & 0x7fu) == 0x7fu) pair |= 0x7e00u;
    if ((bytes & 0x7f00u) == 0x7f00u) pair |= 0x7e000000u;
#endif
    return pair;
}

/* Those in the high two. */
__device__ inline uint32_t widen_e4m3_high(uint32_t bytes) {
#if __CUDA_ARCH__ >= 890
    uint32_t pair;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %1;\n"
        "cvt.rn.f16x2.e4m3x2 %0, high;\n"
        "}"
        : "=r"(pair)
        : "r"(bytes));
    return pair;
#else
    return widen_e4m3(bytes >> 16);
#endif
}

/* Rounds to the nearest e4m3, ties to even; beyond 448, infinities too, to 448. NaN stays NaN. The first in the low
 * byte. */
__device__ inline uint32_t pack_e4m3(float first, float second) {
    __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
    return pair;
}

__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Of the four lanes that share lane / 4. */
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Of the eight lanes that share lane % 4. */
__device__ inline float column_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 16));
}

__device__ inline float column_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 4);
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

/* ------------------------------------------------------------------------------------------- */
/* Matrix products of a warpgroup (sm_90a): 64 rows, asynchronous */

/*
 * Where a matrix lies in shared memory: columns `chunk` bytes wide as layout.cuh has them, from `address` on, which is
 * to be a multiple of 1024 but for what is skipped of the matrix. Its rows may run along either side of the product;
 * `chunk_stride` is from one column to the next, and matters where the rows' own direction is longer than a chunk.
 */
template <uint32_t CHUNK> struct matrix {
    uint32_t low; /* of the descriptor */

    /* By all lanes. Taken from one of them, which tells the compiler that it is the same for all. */
    __device__ matrix(uint32_t address, uint32_t chunk_stride)
        : low(__shfl_sync(0xffffffffu, chunk_stride / 16 << 16 | address / 16, 0)) {}

    /* The descriptor of what begins `bytes` further. */
    __device__ uint64_t at(uint32_t bytes) const {
        constexpr uint32_t LAYOUT = CHUNK == 128 ? 1 : CHUNK == 64 ? 2 : 3;
        constexpr uint32_t HIGH = LAYOUT << 30 | 8 * CHUNK / 16; /* from eight rows to the next eight */
        return (uint64_t)HIGH << 32 | (low + bytes / 16);
    }
};

/* Before the first product of a group, and after registers that it uses were written. */
__device__ inline void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Waits until at most so many of the groups committed last are still being computed. */
template <int GROUPS> __device__ inline void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

/* Keeps the compiler from using sums before a wait that comes before this. */
template <uint32_t COUNT> __device__ inline void hold(float (&sums)[COUNT]) {
#pragma unroll
    for (uint32_t i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(sums[i])::"memory");
}

/* From here on a thread of the warpgroup has so many registers: fewer than before, or more, which others have given. */
template <int COUNT> __device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define ATTN_PTX_FLOATS_8(c, i)                                                                                        \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
#define ATTN_PTX_FLOATS_16(c, i) ATTN_PTX_FLOATS_8(c, i), ATTN_PTX_FLOATS_8(c, i + 8)
#define ATTN_PTX_NAMES_16        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTN_PTX_NAMES_32                                                                                              \
    ATTN_PTX_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_PTX_NAMES_64                                                                                              \
    ATTN_PTX_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "   \
                      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/*
 * multiply_rows: c[64 x 64 or 128] = a[64 x 16] b[64 or 128 x 16]^T, or += if `add`; both in shared memory, 16 numbers
 * of a row.
 * multiply_columns: c[64 x 128, 64 or 32] += a[64 x 16] b[16 x 128, 64 or 32]; a in registers, as sums are laid over
 * them.
 */
#define ATTN_PTX_WARPGROUP_PRODUCTS(NAME, TYPE)                                                                        \
    __device__ inline void multiply_rows_##NAME(float(&c)[32], uint64_t a, uint64_t b, uint32_t add) {                 \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, %34, 0;\n"                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" ATTN_PTX_NAMES_32                \
                     "}, %32, %33, add, 1, 1, 0, 0;\n"                                                                 \
                     "}"                                                                                               \
                     : ATTN_PTX_FLOATS_16(c, 0), ATTN_PTX_FLOATS_16(c, 16)                                             \
                     : "l"(a), "l"(b), "r"(add)                                                                        \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    __device__ inline void multiply_rows_##NAME(float(&c)[64], uint64_t a, uint64_t b, uint32_t add) {                 \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, %66, 0;\n"                                                                      \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" ATTN_PTX_NAMES_64               \
                     "}, %64, %65, add, 1, 1, 0, 0;\n"                                                                 \
                     "}"                                                                                               \
                     : ATTN_PTX_FLOATS_16(c, 0), ATTN_PTX_FLOATS_16(c, 16), ATTN_PTX_FLOATS_16(c, 32),                 \
                       ATTN_PTX_FLOATS_16(c, 48)                                                                       \
                     : "l"(a), "l"(b), "r"(add)                                                                        \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    __device__ inline void multiply_columns_##NAME(float(&c)[64], const uint32_t(&a)[4], uint64_t b) {                 \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, 1, 0;\n"                                                                        \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" ATTN_PTX_NAMES_64               \
                     "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n"                                                   \
                     "}"                                                                                               \
                     : ATTN_PTX_FLOATS_16(c, 0), ATTN_PTX_FLOATS_16(c, 16), ATTN_PTX_FLOATS_16(c, 32),                 \
                       ATTN_PTX_FLOATS_16(c, 48)                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                              \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    __device__ inline void multiply_columns_##NAME(float(&c)[32], const uint32_t(&a)[4], uint64_t b) {                 \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, 1, 0;\n"                                                                        \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" ATTN_PTX_NAMES_32                \
                     "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n"                                                   \
                     "}"                                                                                               \
                     : ATTN_PTX_FLOATS_16(c, 0), ATTN_PTX_FLOATS_16(c, 16)                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                              \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    __device__ inline void multiply_columns_##NAME(float(&c)[16], const uint32_t(&a)[4], uint64_t b) {                 \
        asm volatile("{\n"                                                                                             \
                     ".reg .pred add;\n"                                                                               \
                     "setp.ne.b32 add, 1, 0;\n"                                                                        \
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" ATTN_PTX_NAMES_16                \
                     "}, {%16, %17, %18, %19}, %20, add, 1, 1, 1;\n"                                                   \
                     "}"                                                                                               \
                     : ATTN_PTX_FLOATS_16(c, 0)                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                              \
                     : "memory");                                                                                      \
    }

ATTN_PTX_WARPGROUP_PRODUCTS(bf16, "bf16")
ATTN_PTX_WARPGROUP_PRODUCTS(fp16, "f16")

#undef ATTN_PTX_WARPGROUP_PRODUCTS
#undef ATTN_PTX_NAMES_64
#undef ATTN_PTX_NAMES_32
#undef ATTN_PTX_NAMES_16
#undef ATTN_PTX_FLOATS_16
#undef ATTN_PTX_FLOATS_8

} /* namespace ptx */

#endif
