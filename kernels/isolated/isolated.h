/* Between kernels/backend.c, the parent's side (backend.c) and the child's (serve.c). */
#ifndef ATTND_KERNELS_ISOLATED_ISOLATED_H
#define ATTND_KERNELS_ISOLATED_ISOLATED_H

#include "kernels/backend.h"

/* A backend of a kind, in a process of its own. The configuration has been checked. Errors as attn_backend_create. */
attn_status attn_isolated_create(const attn_backend_ops *kind, const attn_backend_config *config,
                                 attn_backend **backend);

/* There is an attn_isolated_main that children of this program will come to. */
void attn_isolated_allow(void);

#endif
