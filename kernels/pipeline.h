/*
 * Decodes in two halves, so that the host gets one ready while the device is still at another:
 *
 *     start A    start B    finish A    start C    finish B    finish C
 *
 * attn_backend_decode is a start and its finish. At most attn_backend_depth(backend) decodes are started and not
 * finished. They happen in the order in which they were started, as if each had waited for the one before: what one
 * appends, the next reads. They finish in that order, too.
 *
 * While one is started, the batch, everything that it points to and the outputs belong to the backend. Of its other
 * operations only attn_backend_copy_page and attn_backend_plan_step may then be called; a copy happens in order with
 * the decodes. The others, and attn_backend_decode, are ATTN_INTERNAL. attn_backend_destroy may come at any time: it
 * waits for the device, and outputs of what was not finished are unspecified.
 *
 * Threads: as the backend.
 */
#ifndef ATTND_KERNELS_PIPELINE_H
#define ATTND_KERNELS_PIPELINE_H

#include "kernels/attention.h"

/* 1 and more. 1: the backend works on the calling thread, so that nothing would be gained by starting a second one. */
uint32_t attn_backend_depth(const attn_backend *backend);

/*
 * Starts a decode as attn_backend_decode does, whose errors it has: then nothing is started, and earlier decodes are
 * as they were. ATTN_INVALID_ARGUMENT: an empty batch. ATTN_INTERNAL: as many as may be are started already.
 */
attn_status attn_backend_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan);

/* Has the decode that was started first come to its end, so that finishing it waits for nothing? Never waits. */
bool attn_backend_has_ended(attn_backend *backend);

/*
 * Waits for the decode that was started first and gives what it came to. Whatever that is, it is started no more.
 * `timing` may be NULL; attention_ns of one that was started behind another counts the wait for that, and that for this
 * call. ATTN_INTERNAL: none is started.
 */
attn_status attn_backend_finish(attn_backend *backend, attn_timing *timing);

#endif
