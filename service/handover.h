/*
 * For ThreadSanitizer alone: what is given to gRPC by one thread and comes back on another was handed
 * over inside libgrpc, which is not instrumented. These two say so; elsewhere they are nothing.
 */
#ifndef ATTND_SERVICE_HANDOVER_H
#define ATTND_SERVICE_HANDOVER_H

#if defined(__SANITIZE_THREAD__)

void __tsan_acquire(void *address);
void __tsan_release(void *address);

/* Everything this thread has done so far comes before.. */
static inline void handover_give(void *token) { __tsan_release(token); }

/* ..everything that the thread which takes the same token does next. */
static inline void handover_take(void *token) { __tsan_acquire(token); }

#else

static inline void handover_give(void *token) { (void)token; }
static inline void handover_take(void *token) { (void)token; }

#endif

#endif
