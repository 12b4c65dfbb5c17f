/* Test aids: faults of the device under a backend. Release builds do not have them. */
#ifndef ATTND_KERNELS_FAULTS_H
#define ATTND_KERNELS_FAULTS_H

#include "kernels/attention.h"

#ifndef ATTN_RELEASE
/*
 * Breaks the device: the backend's next append, export or decode ends with ATTN_UNAVAILABLE, and so do all after that.
 * On the thread that drives the backend. A backend of the host only says so. With cuda it is a real error (a kernel
 * writes where no memory is), and breaks all that the backend's process has on any device.
 */
void attn_backend_break(attn_backend *backend);
#endif

#endif
