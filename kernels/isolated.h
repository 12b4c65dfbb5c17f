/*
 * Backends in processes of their own: what breaks one of them takes nobody along.
 *
 * After an error of one device CUDA is unusable in the whole process, with all its devices, and for good; a crash takes
 * the process itself. A backend made with attn_backend_config.isolated runs in a child process instead: this program
 * once more, which serves that one backend and sees nothing else of its parent. When the child has ended, whatever
 * the reason, every call of the backend is ATTN_UNAVAILABLE and says how it ended; a new backend is a new process.
 *
 * Batches and rows go by memory that both processes have mapped, copied once on the way there and once on the way
 * back, and results are bitwise those of the same backend in this process. Decodes are pipelined as far as the kind
 * does (pipeline.h); an error of its start is told by the finish. Such backends have channels (channel.h) with each
 * other; that there is no library is told by the first that is sent.
 *
 * The child ends when its backend is destroyed, and when this process ends, in whatever way.
 */
#ifndef ATTND_KERNELS_ISOLATED_H
#define ATTND_KERNELS_ISOLATED_H

#include "kernels/attention.h"

/*
 * The first call in main(), with its arguments, of every program that is to have isolated backends: without it their
 * creation is ATTN_UNAVAILABLE. Does not return where this process is such a child.
 */
void attn_isolated_main(int argc, char **argv);

/* The process that an isolated backend runs in; 0: this one. Any thread. */
uint32_t attn_backend_process(const attn_backend *backend);

/*
 * The caller is done with a backend that has failed, or hangs, and does not wait for it: an isolated one's process is
 * killed, so that whatever call it is in ends with ATTN_UNAVAILABLE. Others are left alone. Any thread, while the
 * backend is not being destroyed; destroying it is still to be done.
 */
void attn_backend_give_up(attn_backend *backend);

#endif
