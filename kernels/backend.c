/* Which backends there are, and the way to them: every argument is checked here, once for all. */
#include "kernels/backend.h"

#include <math.h>
#include <string.h>

#include "base/status.h"
#include "kernels/faults.h"
#include "kernels/isolated.h"
#include "kernels/isolated/isolated.h"
#include "kernels/pipeline.h"

/* The first is what "auto" takes: it works on every machine. */
static const attn_backend_ops *const registry[] = {
    &attn_cpu_backend_ops,
    &attn_reference_backend_ops,
#ifdef ATTN_HAVE_CUDA
    &attn_cuda_backend_ops,
#endif
};
enum { REGISTERED = sizeof registry / sizeof registry[0] };

/* NULL: there is none. */
static const attn_backend_ops *find_kind(const char *kind) {
    if (!kind || strcmp(kind, "auto") == 0) return registry[0];
    for (size_t n = 0; n < REGISTERED; n++) {
        if (strcmp(kind, registry[n]->kind) == 0) return registry[n];
    }
    return NULL;
}

bool attn_backend_kind_has_channels(const char *kind) {
    const attn_backend_ops *ops = find_kind(kind);
    return ops != NULL && ops->channels != NULL;
}

static attn_status refuse_kind(const char *kind) {
    if (strcmp(kind, "cuda") == 0) return attn_error(ATTN_UNAVAILABLE, "this build has no cuda backend");
    return attn_error(ATTN_INVALID_ARGUMENT,
                      "no backend \"%s\": there are \"auto\", \"cpu\", \"reference\" and \"cuda\"", kind);
}

/* `scales` is the configuration's field `name`. */
static attn_status check_scales(const attn_geometry *geometry, const char *name, const float *scales) {
    size_t count = (size_t)geometry->layers * geometry->heads_kv;
    if (!scales) return attn_ok();
    if (attn_kv_dtype(geometry) != ATTN_FP8_E4M3) {
        return attn_error(ATTN_INVALID_ARGUMENT, "%s: keys and values in %s have no scales", name,
                          attn_dtype_name(attn_kv_dtype(geometry)));
    }
    for (size_t n = 0; n < count; n++) {
        if (isfinite(scales[n]) && scales[n] > 0) continue;
        return attn_error(ATTN_INVALID_ARGUMENT,
                          "%s[%zu] (layer %zu, KV head %zu) is %g: it must be finite and above 0", name, n,
                          n / geometry->heads_kv, n % geometry->heads_kv, (double)scales[n]);
    }
    return attn_ok();
}

attn_status attn_backend_create(const attn_backend_config *config, attn_backend **backend) {
    const attn_backend_ops *ops = find_kind(config->kind);
    *backend = NULL;
    ATTN_TRY(attn_geometry_check(&config->geometry));
    ATTN_TRY(check_scales(&config->geometry, "k_scales", config->k_scales));
    ATTN_TRY(check_scales(&config->geometry, "v_scales", config->v_scales));
    if (config->pages == 0) return attn_error(ATTN_INVALID_ARGUMENT, "a backend needs at least one page");
    if (!ops) return refuse_kind(config->kind);
    if (attn_kv_dtype(&config->geometry) == ATTN_FP8_E4M3 && !ops->stores_fp8) {
        return attn_error(ATTN_UNAVAILABLE, "the %s backend stores no keys and values in fp8_e4m3", ops->kind);
    }
    return config->isolated ? attn_isolated_create(ops, config, backend) : ops->create(config, backend);
}

void attn_backend_destroy(attn_backend *backend) {
    if (backend) backend->ops->destroy(backend);
}

void attn_backend_lend(attn_backend *backend, void *memory, size_t bytes) {
    if (backend->ops->borrow) backend->ops->borrow(backend, memory, bytes);
}

void attn_backend_take_back(attn_backend *backend, void *memory) {
    if (backend->ops->give_back) backend->ops->give_back(backend, memory);
}

uint32_t attn_backend_process(const attn_backend *backend) { return backend->process; }

void attn_backend_give_up(attn_backend *backend) {
    if (backend->ops->give_up) backend->ops->give_up(backend);
}

const char *attn_backend_describe(const attn_backend *backend) { return backend->description; }

const attn_geometry *attn_backend_geometry(const attn_backend *backend) { return &backend->geometry; }

uint64_t attn_backend_small_bytes(const attn_backend *backend) { return backend->ops->small_bytes; }

uint64_t attn_backend_plans_rejected(const attn_backend *backend) {
    return atomic_load_explicit(&backend->plans_rejected, memory_order_relaxed);
}

#ifndef ATTN_RELEASE
void attn_backend_break(attn_backend *backend) {
    if (backend->ops->break_device)
        backend->ops->break_device(backend);
    else
        backend->broken = true;
}
#endif

static attn_status check_device(const attn_backend *backend) {
#ifndef ATTN_RELEASE
    if (backend->broken) return attn_error(ATTN_UNAVAILABLE, "the device is broken, for a test");
#else
    (void)backend;
#endif
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

static attn_status check_layer(const attn_backend *backend, uint32_t layer) {
    if (layer < backend->geometry.layers) return attn_ok();
    return attn_error(ATTN_INVALID_ARGUMENT, "layer %u: the geometry has %u", layer, backend->geometry.layers);
}

static attn_status check_page(const attn_backend *backend, uint32_t page) {
    if (page < backend->pages) return attn_ok();
    return attn_error(ATTN_INTERNAL, "page %u: the pool has %u", page, backend->pages);
}

/* Are `tokens` > 0 rows from `position` on within the page table, and its pages within the pool? */
static attn_status check_rows(const attn_backend *backend, uint32_t layer, const uint32_t *pages, uint32_t page_count,
                              uint64_t position, uint32_t tokens) {
    ATTN_TRY(check_layer(backend, layer));
    uint64_t room = (uint64_t)page_count * backend->geometry.page_size;
    if (position > room || tokens > room - position) {
        return attn_error(ATTN_INTERNAL, "%u tokens at position %llu do not fit a page table of %u pages", tokens,
                          (unsigned long long)position, page_count);
    }
    uint64_t last = (position + tokens - 1) / backend->geometry.page_size;
    for (uint64_t p = position / backend->geometry.page_size; p <= last; p++) {
        ATTN_TRY(check_page(backend, pages[p]));
    }
    return attn_ok();
}

attn_status attn_backend_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint32_t page_count,
                                uint64_t position, uint32_t tokens, const void *keys, const void *values) {
    ATTN_TRY(attn_backend_check_idle(backend, "an append"));
    if (tokens == 0) return check_layer(backend, layer);
    ATTN_TRY(check_rows(backend, layer, pages, page_count, position, tokens));
    ATTN_TRY(check_device(backend));
    return backend->ops->append(backend, layer, pages, position, tokens, keys, values);
}

attn_status attn_backend_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint32_t page_count,
                                uint64_t position, uint32_t tokens, void *keys, void *values) {
    ATTN_TRY(attn_backend_check_idle(backend, "an export"));
    if (tokens == 0) return check_layer(backend, layer);
    ATTN_TRY(check_rows(backend, layer, pages, page_count, position, tokens));
    ATTN_TRY(check_device(backend));
    return backend->ops->export(backend, layer, pages, position, tokens, keys, values);
}

attn_status attn_backend_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    ATTN_TRY(check_page(backend, from));
    ATTN_TRY(check_page(backend, to));
    if (from != to) backend->ops->copy_page(backend, from, to);
    return attn_ok();
}

attn_status attn_backend_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    ATTN_TRY(attn_backend_check_idle(backend, "poison"));
    ATTN_TRY(check_page(backend, page));
    uint32_t page_size = backend->geometry.page_size;
    if (first_slot > page_size || slots > page_size - first_slot) {
        return attn_error(ATTN_INVALID_ARGUMENT, "slots %u and %u more: a page has %u", first_slot, slots, page_size);
    }
    backend->ops->poison(backend, page, first_slot, slots);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Decode */

uint32_t attn_backend_depth(const attn_backend *backend) { return backend->ops->start ? backend->ops->depth : 1; }

attn_status attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    if (backend->started == attn_backend_depth(backend)) {
        return attn_error(ATTN_INTERNAL, "%u decodes are started already, as many as may be", backend->started);
    }
    if (batch->size == 0) return attn_error(ATTN_INVALID_ARGUMENT, "an empty batch was to be started");
    ATTN_TRY(attn_batch_check(backend, batch));
    ATTN_TRY(check_device(backend));
    if (backend->ops->start) {
        ATTN_TRY(backend->ops->start(backend, batch, plan));
    } else {
        backend->timing = (attn_timing){0};
        ATTN_TRY(backend->ops->decode(backend, batch, plan, &backend->timing));
    }
    backend->started++;
    return attn_ok();
}

bool attn_backend_has_ended(attn_backend *backend) {
    return backend->started == 0 || !backend->ops->start || backend->ops->has_ended(backend);
}

attn_status attn_backend_finish(attn_backend *backend, attn_timing *timing) {
    attn_timing unwanted;
    if (!timing) timing = &unwanted;
    *timing = (attn_timing){0};
    if (backend->started == 0) return attn_error(ATTN_INTERNAL, "no decode is started that could be finished");
    backend->started--;
    if (backend->ops->start) return backend->ops->finish(backend, timing);
    *timing = backend->timing;
    return attn_ok();
}

attn_status attn_backend_decode(attn_backend *backend, const attn_batch *batch, const attn_plan *plan,
                                attn_timing *timing) {
    if (timing) *timing = (attn_timing){0};
    ATTN_TRY(attn_backend_check_idle(backend, "a decode"));
    if (batch->size == 0) return attn_ok();
    ATTN_TRY(attn_backend_start(backend, batch, plan));
    return attn_backend_finish(backend, timing);
}
