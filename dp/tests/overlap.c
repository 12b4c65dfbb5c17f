#include "dp/tests/overlap.h"

#include <stdlib.h>

#include "kernels/pipeline.h"

enum { DEPTH = 2, LOOKS = 3, DEVICES = 64 };

/* What a backend has started. */
typedef struct {
    const attn_backend *backend;
    const attn_batch *batches[DEPTH];
    uint32_t count;
    uint32_t looks; /* at the first */
} device;

static struct {
    pthread_mutex_t lock; /* guards all */
    pthread_cond_t changed;
    device devices[DEVICES];
    bool holds;
    uint32_t may_end; /* of those that are held */
    uint32_t started, most, in_flight;
    attn_code start_fails, end_fails;
    pthread_t last;
} overlap = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

uint32_t __wrap_attn_backend_depth(const attn_backend *backend);
attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);
bool __wrap_attn_backend_has_ended(attn_backend *backend);
attn_status __wrap_attn_backend_finish(attn_backend *backend, attn_timing *timing);

/* The backend's device, or a free one for it: those without decodes are. */
static device *find(const attn_backend *backend) {
    device *found = NULL;
    for (uint32_t i = 0; i < DEVICES; i++) {
        device *each = &overlap.devices[i];
        if (each->count > 0 && each->backend == backend) return each;
        if (each->count == 0) found = each;
    }
    if (found == NULL) abort();
    *found = (device){.backend = backend};
    return found;
}

uint32_t __wrap_attn_backend_depth(const attn_backend *backend) {
    (void)backend;
    return DEPTH;
}

attn_status __wrap_attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    if (plan != NULL) abort();
    pthread_mutex_lock(&overlap.lock);
    attn_code fails = overlap.start_fails;
    device *on = find(backend);
    if (on->count == DEPTH) abort();
    if (fails == ATTN_OK) {
        on->batches[on->count++] = batch;
        if (on->count > overlap.most) overlap.most = on->count;
        overlap.started++;
        overlap.in_flight++;
        overlap.last = pthread_self();
    }
    pthread_cond_broadcast(&overlap.changed);
    pthread_mutex_unlock(&overlap.lock);
    return fails == ATTN_OK ? attn_ok() : attn_error(fails, "the device takes nothing");
}

static bool may_end(void) { return !overlap.holds || overlap.may_end > 0; }

bool __wrap_attn_backend_has_ended(attn_backend *backend) {
    pthread_mutex_lock(&overlap.lock);
    bool has_ended = may_end() && ++find(backend)->looks > LOOKS;
    pthread_mutex_unlock(&overlap.lock);
    return has_ended;
}

attn_status __wrap_attn_backend_finish(attn_backend *backend, attn_timing *timing) {
    pthread_mutex_lock(&overlap.lock);
    while (!may_end())
        pthread_cond_wait(&overlap.changed, &overlap.lock);
    if (overlap.holds) overlap.may_end--;
    device *on = find(backend);
    if (on->count == 0) abort();
    attn_code fails = overlap.end_fails;
    const attn_batch *batch = on->batches[0];
    on->batches[0] = on->batches[1];
    on->count--;
    on->looks = 0;
    overlap.in_flight--;
    pthread_mutex_unlock(&overlap.lock);
    if (fails != ATTN_OK) return attn_error(fails, "the device is on fire");
    return attn_backend_decode(backend, batch, NULL, timing);
}

void overlap_hold(void) {
    pthread_mutex_lock(&overlap.lock);
    overlap.holds = true;
    overlap.may_end = overlap.started = overlap.most = 0;
    pthread_mutex_unlock(&overlap.lock);
}

static void change(bool *what, bool to, uint32_t *count, uint32_t more) {
    pthread_mutex_lock(&overlap.lock);
    *what = to;
    *count += more;
    pthread_cond_broadcast(&overlap.changed);
    pthread_mutex_unlock(&overlap.lock);
}

void overlap_let_end(uint32_t count) { change(&overlap.holds, true, &overlap.may_end, count); }

void overlap_release(void) { change(&overlap.holds, false, &overlap.may_end, 0); }

static void set_code(attn_code *which, attn_code code) {
    pthread_mutex_lock(&overlap.lock);
    *which = code;
    pthread_mutex_unlock(&overlap.lock);
}

void overlap_fail_starts(attn_code code) { set_code(&overlap.start_fails, code); }

void overlap_fail_ends(attn_code code) { set_code(&overlap.end_fails, code); }

static uint32_t look(const uint32_t *count) {
    pthread_mutex_lock(&overlap.lock);
    uint32_t now = *count;
    pthread_mutex_unlock(&overlap.lock);
    return now;
}

uint32_t overlap_started(void) { return look(&overlap.started); }

uint32_t overlap_most(void) { return look(&overlap.most); }

uint32_t overlap_in_flight(const attn_backend *backend) {
    if (backend == NULL) return look(&overlap.in_flight);
    pthread_mutex_lock(&overlap.lock);
    uint32_t now = find(backend)->count;
    pthread_mutex_unlock(&overlap.lock);
    return now;
}

void overlap_wait_until_started(uint32_t count) {
    pthread_mutex_lock(&overlap.lock);
    while (overlap.started < count)
        pthread_cond_wait(&overlap.changed, &overlap.lock);
    pthread_mutex_unlock(&overlap.lock);
}

pthread_t overlap_last_thread(void) {
    pthread_mutex_lock(&overlap.lock);
    pthread_t last = overlap.last;
    pthread_mutex_unlock(&overlap.lock);
    return last;
}
