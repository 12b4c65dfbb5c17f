/* What shapes the engine takes, and how many bytes they are. */
#include "kernels/attention.h"

size_t attn_query_row_bytes(const attn_geometry *geometry) {
    return (size_t)geometry->heads_q * geometry->head_dim * attn_dtype_bytes(geometry->dtype);
}

size_t attn_key_row_bytes(const attn_geometry *geometry) {
    return (size_t)geometry->heads_kv * geometry->head_dim * attn_dtype_bytes(geometry->dtype);
}

size_t attn_value_row_bytes(const attn_geometry *geometry) {
    return (size_t)geometry->heads_kv * geometry->head_dim_v * attn_dtype_bytes(geometry->dtype);
}

size_t attn_out_row_bytes(const attn_geometry *geometry) {
    return (size_t)geometry->heads_q * geometry->head_dim_v * attn_dtype_bytes(geometry->dtype);
}

attn_dtype attn_kv_dtype(const attn_geometry *geometry) {
    return geometry->kv_dtype ? geometry->kv_dtype : geometry->dtype;
}

size_t attn_page_bytes(const attn_geometry *geometry) {
    size_t elements = (size_t)geometry->heads_kv * (geometry->head_dim + geometry->head_dim_v);
    return elements * attn_dtype_bytes(attn_kv_dtype(geometry)) * geometry->page_size * geometry->layers;
}

/* Wide enough for any model; they keep every product of the geometry's numbers within 64 bits. */
enum { MAX_LAYERS = 4096, MAX_HEADS = 4096, MIN_HEAD_DIM = 32, MAX_HEAD_DIM = 256 };

static attn_status check_head_dim(const char *name, uint32_t value) {
    if (value >= MIN_HEAD_DIM && value <= MAX_HEAD_DIM && value % 8 == 0) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "geometry.%s is %u: it must be a multiple of 8 from %d to %d", name, value,
                      MIN_HEAD_DIM, MAX_HEAD_DIM);
}

static attn_status check_heads(const attn_geometry *geometry) {
    if (geometry->heads_kv < 1 || geometry->heads_kv > MAX_HEADS) {
        return attn_error(ATTN_INVALID_ARGUMENT, "geometry.heads_kv is %u: it must be 1 to %d", geometry->heads_kv,
                          MAX_HEADS);
    }
    if (geometry->heads_q < 1 || geometry->heads_q > MAX_HEADS || geometry->heads_q % geometry->heads_kv != 0) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "geometry.heads_q is %u: it must be a multiple of heads_kv (%u), at most %d",
                          geometry->heads_q, geometry->heads_kv, MAX_HEADS);
    }
    if (geometry->heads_q / geometry->heads_kv > ATTN_MAX_GROUP) {
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "geometry.heads_q is %u: at most %d query heads may share one of the %u KV heads",
                          geometry->heads_q, ATTN_MAX_GROUP, geometry->heads_kv);
    }
    return attn_ok();
}

static attn_status check_dtypes(const attn_geometry *geometry) {
    if (geometry->dtype != ATTN_BF16 && geometry->dtype != ATTN_FP16 && geometry->dtype != ATTN_FP32) {
        return attn_error(ATTN_INVALID_ARGUMENT, "geometry.dtype is %d: it must be bf16, fp16 or fp32",
                          (int)geometry->dtype);
    }
    attn_dtype stored = attn_kv_dtype(geometry);
    if (stored == geometry->dtype || (stored == ATTN_FP8_E4M3 && geometry->dtype != ATTN_FP32)) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "geometry.kv_dtype is %s: with dtype %s it must be %s",
                      attn_dtype_name(stored), attn_dtype_name(geometry->dtype),
                      geometry->dtype == ATTN_FP32 ? "the same" : "the same or fp8_e4m3");
}

attn_status attn_geometry_check(const attn_geometry *geometry) {
    if (geometry->layers < 1 || geometry->layers > MAX_LAYERS) {
        return attn_error(ATTN_INVALID_ARGUMENT, "geometry.layers is %u: it must be 1 to %d", geometry->layers,
                          MAX_LAYERS);
    }
    ATTN_TRY(check_heads(geometry));
    ATTN_TRY(check_head_dim("head_dim", geometry->head_dim));
    ATTN_TRY(check_head_dim("head_dim_v", geometry->head_dim_v));
    ATTN_TRY(check_dtypes(geometry));
    uint32_t size = geometry->page_size;
    if (size != 16 && size != 32 && size != 64 && size != 128) {
        return attn_error(ATTN_INVALID_ARGUMENT, "geometry.page_size is %u: it must be 16, 32, 64 or 128 tokens", size);
    }
    return attn_ok();
}
