/*
 * How a tile lies in the pool (launch.h), so that a run of its rows is a bulk copy, and what a copy leaves in shared
 * memory is what ldmatrix and wgmma read without bank conflicts.
 *
 * A tile is cut into blocks of TOKENS_A_BLOCK tokens at most, one after the other; a block is its keys, then its
 * values. Either is cut into columns `chunk` bytes wide, the widest of 128, 64, 32 and 16 that divides a row, one
 * after the other; a column holds the rows one after the other. Within a column, the 16-byte pieces of row r lie at
 * place (piece ^ swizzle): the layouts that wgmma calls 128-, 64- and 32-byte swizzle.
 */
#ifndef ATTND_KERNELS_CUDA_LAYOUT_CUH
#define ATTND_KERNELS_CUDA_LAYOUT_CUH

#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/launch.h"

namespace layout {

constexpr uint32_t PIECE_BYTES = 16;
constexpr uint32_t TOKENS_A_BLOCK = 64;

__host__ __device__ constexpr uint32_t chunk_bytes(uint32_t row_bytes) {
    return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : row_bytes % 32 == 0 ? 32 : 16;
}

/* What the places of row `row`'s pieces are xored with. */
__host__ __device__ constexpr uint32_t swizzle(uint32_t chunk, uint32_t row) {
    return row * chunk / 128 % (chunk / PIECE_BYTES);
}

__host__ __device__ constexpr uint32_t block_tokens(uint32_t page_size) {
    return page_size < TOKENS_A_BLOCK ? page_size : TOKENS_A_BLOCK;
}

/* Byte of piece `piece` of row `row` among the keys, or the values, of a block of `tokens` tokens. */
__host__ __device__ inline uint32_t piece_offset(uint32_t row_bytes, uint32_t tokens, uint32_t row, uint32_t piece) {
    uint32_t chunk = chunk_bytes(row_bytes), pieces = chunk / PIECE_BYTES;
    return piece / pieces * tokens * chunk + row * chunk + (piece % pieces ^ swizzle(chunk, row)) * PIECE_BYTES;
}

/* A piece of a key row, or a value row, of a slot of a page, which must be of the pool. */
__device__ inline char *pool_piece(const attn_cuda_layer &layer, uint32_t page, uint32_t head, uint32_t slot,
                                   bool values, uint32_t piece) {
    uint32_t tokens = block_tokens(layer.page_size);
    uint32_t key_bytes = layer.head_dim * layer.element_bytes, value_bytes = layer.head_dim_v * layer.element_bytes;
    char *block = layer.memory + ((size_t)page * layer.heads_kv + head) * layer.tile_bytes +
                  (size_t)(slot / tokens) * tokens * (key_bytes + value_bytes);
    return block + (values ? tokens * key_bytes : 0) +
           piece_offset(values ? value_bytes : key_bytes, tokens, slot % tokens, piece);
}

} /* namespace layout */

#endif
