/*
 * In front of the backends of a test, a device that takes two decodes at a time (kernels/pipeline.h): the linker puts
 * its attn_backend_depth, _start, _has_ended and _finish before the real ones (OVERLAP_LINKOPTS in BUILD). A decode
 * that was started has ended after some looks at it, and really happens when it is finished. Tests may hold it until
 * then, and have starts or ends fail.
 *
 * Threads: any.
 */
#ifndef ATTND_DP_TESTS_OVERLAP_H
#define ATTND_DP_TESTS_OVERLAP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "kernels/attention.h"

/* From now on no decode ends, on any rank, and counts begin at 0. */
void overlap_hold(void);

/* So many decodes that are held may end, in all. */
void overlap_let_end(uint32_t count);

/* All may, from now on. */
void overlap_release(void);

/* Starts to come, or ends, fail with `code`; ATTN_OK: they do not. */
void overlap_fail_starts(attn_code code);
void overlap_fail_ends(attn_code code);

/* Decodes that were started since overlap_hold, and the most that were started and not finished, of one backend. */
uint32_t overlap_started(void);
uint32_t overlap_most(void);
void overlap_wait_until_started(uint32_t count);

/* Decodes that are started and not finished; of all backends if it is NULL. */
uint32_t overlap_in_flight(const attn_backend *backend);

/* The thread that started the last one. */
pthread_t overlap_last_thread(void);

#endif
