/*
 * A child process: this program once more, with a mark for its only argument (attn_isolated_main), MEMORY_FD for the
 * memory that it shares with its parent, and at standard input a pipe from which nothing comes, but whose end says that
 * the parent wants it no more, or has ended itself.
 */
#ifndef ATTND_KERNELS_ISOLATED_PROCESS_H
#define ATTND_KERNELS_ISOLATED_PROCESS_H

#include <stdbool.h>

#include "base/status.h"

#define ATTN_PROCESS_MARK      "--serve-isolated-backend"
#define ATTN_PROCESS_MEMORY_FD 3

typedef struct attn_process attn_process;

/*
 * Starts a child that has `memory_fd`. `ended(context)` is called once, on a thread of its own, when the child has
 * ended. ATTN_UNAVAILABLE, ATTN_RESOURCE_EXHAUSTED: there is no child.
 */
attn_status attn_process_start(int memory_fd, void (*ended)(void *context), void *context, attn_process **process);

int attn_process_id(const attn_process *process);

/* Has it ended? Any thread. */
bool attn_process_has_ended(const attn_process *process);

/* ATTN_UNAVAILABLE: how it ended. After that it has. Any thread. */
attn_status attn_process_end(const attn_process *process);

/* Any thread. */
void attn_process_kill(attn_process *process);

/*
 * Ends the child, by the pipe and, where that does not help, by a signal, and frees what was here of it. False: it
 * does not end, as a process that a driver holds on to: then `ended` may still be called, at any time.
 */
bool attn_process_destroy(attn_process *process);

#endif
