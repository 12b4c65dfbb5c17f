#define _GNU_SOURCE
#include "kernels/isolated/process.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { POLITE_S = 5, KILLED_S = 10 };

struct attn_process {
    pid_t id;
    int lifeline; /* the pipe's end that the child does not have */
    void (*ended)(void *context);
    void *context;
    pthread_t reaper;
    pthread_mutex_t lock; /* nobody signals a process that was reaped: its number may be another's */
    int how;              /* of waitpid; constant once.. */
    atomic_bool is_gone;
};

extern char **environ;

int attn_process_id(const attn_process *process) { return (int)process->id; }

bool attn_process_has_ended(const attn_process *process) {
    return atomic_load_explicit(&process->is_gone, memory_order_acquire);
}

attn_status attn_process_end(const attn_process *process) {
    int id = (int)process->id;
    if (WIFSIGNALED(process->how)) {
        return attn_error(ATTN_UNAVAILABLE, "process %d of this backend was ended by signal %d (%s)", id,
                          WTERMSIG(process->how), sigabbrev_np(WTERMSIG(process->how)));
    }
    return attn_error(ATTN_UNAVAILABLE, "process %d of this backend has ended with status %d", id,
                      WEXITSTATUS(process->how));
}

void attn_process_kill(attn_process *process) {
    pthread_mutex_lock(&process->lock);
    if (!attn_process_has_ended(process)) kill(process->id, SIGKILL);
    pthread_mutex_unlock(&process->lock);
}

/* ------------------------------------------------------------------------------------------- */
/* Its end */

static void *reap(void *argument) {
    attn_process *process = argument;
    siginfo_t unused;
    while (waitid(P_PID, (id_t)process->id, &unused, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
    }
    pthread_mutex_lock(&process->lock);
    while (waitpid(process->id, &process->how, 0) < 0 && errno == EINTR) {
    }
    atomic_store_explicit(&process->is_gone, true, memory_order_release);
    pthread_mutex_unlock(&process->lock);
    process->ended(process->context);
    return NULL;
}

static bool reaped_within(attn_process *process, time_t seconds) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += seconds;
    return pthread_timedjoin_np(process->reaper, NULL, &end) == 0;
}

static void process_free(attn_process *process) {
    pthread_mutex_destroy(&process->lock);
    free(process);
}

bool attn_process_destroy(attn_process *process) {
    close(process->lifeline);
    if (!reaped_within(process, POLITE_S)) {
        attn_process_kill(process);
        if (!reaped_within(process, KILLED_S)) {
            pthread_detach(process->reaper);
            return false;
        }
    }
    process_free(process);
    return true;
}

/* ------------------------------------------------------------------------------------------- */
/* Its start */

/* No handler and no mask of this process; of its files those three, and standard output and error. */
static int spawn(pid_t *id, int lifeline, int memory_fd) {
    char name[] = "attnd-backend", mark[] = ATTN_PROCESS_MARK;
    char *arguments[] = {name, mark, NULL};
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
    posix_spawn_file_actions_adddup2(&files, lifeline, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files, memory_fd, ATTN_PROCESS_MEMORY_FD);
    posix_spawn_file_actions_addclosefrom_np(&files, ATTN_PROCESS_MEMORY_FD + 1);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int error = posix_spawn(id, "/proc/self/exe", &files, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    return error;
}

/* Copies that none of the child's numbers overwrites while they are given to it. */
static int lifted(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, ATTN_PROCESS_MEMORY_FD + 1); }

static attn_status start_child(attn_process *process, int memory_fd) {
    int ends[2] = {-1, -1}, error = ENOMEM;
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no pipe to a backend's process: %s", strerrordesc_np(errno));
    }
    int lifeline = lifted(ends[0]), memory = lifted(memory_fd);
    if (lifeline >= 0 && memory >= 0) error = spawn(&process->id, lifeline, memory);
    if (lifeline >= 0) close(lifeline);
    if (memory >= 0) close(memory);
    close(ends[0]);
    process->lifeline = ends[1];
    if (error == 0) return attn_ok();
    close(ends[1]);
    return attn_error(ATTN_UNAVAILABLE, "no process for a backend: %s", strerrordesc_np(error));
}

attn_status attn_process_start(int memory_fd, void (*ended)(void *context), void *context, attn_process **process) {
    attn_process *made = calloc(1, sizeof *made);
    if (made == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for a backend's process");
    made->ended = ended;
    made->context = context;
    pthread_mutex_init(&made->lock, NULL);
    atomic_init(&made->is_gone, false);
    attn_status status = start_child(made, memory_fd);
    if (!attn_failed(status) && pthread_create(&made->reaper, NULL, reap, made) != 0) {
        kill(made->id, SIGKILL);
        waitpid(made->id, &made->how, 0);
        close(made->lifeline);
        status = attn_error(ATTN_RESOURCE_EXHAUSTED, "no thread to watch a backend's process");
    }
    if (attn_failed(status)) {
        process_free(made);
        return status;
    }
    *process = made;
    return status;
}
