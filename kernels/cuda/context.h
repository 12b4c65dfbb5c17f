/*
 * What all that this process has on one device lives in: the device's context.
 *
 * After an error such as an illegal address a context is broken: every later call in it fails, and, with the drivers
 * that we have seen, in this process's contexts on all other devices, too. What could help then, short of a new process
 * (kernels/isolated.h), is to reset the device, which takes away all that anybody has there. So the users of a context
 * are counted: the last one of a broken context resets the device, and nobody enters it before. One that hangs never
 * leaves; then nobody enters it again. Where the reset does not help, who enters next is told so.
 *
 * A user is whatever owns memory, streams or events of the device: a backend, or a channel.
 *
 * Any thread. Its current device is `device` afterwards.
 */
#ifndef ATTND_KERNELS_CUDA_CONTEXT_H
#define ATTND_KERNELS_CUDA_CONTEXT_H

#include <stdbool.h>

#include "base/status.h"

/* One user more. ATTN_UNAVAILABLE: the context is broken, and others use it still; or no reset has helped. */
attn_status attn_cuda_context_enter(int device);

/* One user less, who has freed what it had there, as far as that could be done. */
void attn_cuda_context_leave(int device);

/* Whether all calls on the current device fail: after an error that may as well have been about one call only. */
bool attn_cuda_context_is_broken(void);

#endif
