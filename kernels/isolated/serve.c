/* The child's side: takes commands, one after another, and lets its backend do them. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "kernels/faults.h"
#include "kernels/isolated.h"
#include "kernels/isolated/channel.h"
#include "kernels/isolated/create.h"
#include "kernels/isolated/isolated.h"
#include "kernels/isolated/mailbox.h"
#include "kernels/isolated/packet.h"
#include "kernels/isolated/process.h"
#include "kernels/pipeline.h"

/*
 * How long to look for a next command before sleeping: what a wake-up costs or, where the time is the device's, the gap
 * between two layers, in which the parent packs a large batch.
 */
#define SPIN_NS            20000
#define SPIN_FOR_DEVICE_NS 500000

typedef struct {
    attn_answer *answer;
    attn_batch batch;
    attn_packet_pointers pointers;
} flight;

typedef struct {
    attn_mailbox mailbox;
    attn_backend *backend;
    uint32_t taken; /* commands */
    flight flights[ATTN_FLIGHTS];
    uint32_t oldest, in_flight; /* flights */
    int64_t spin_ns;
    attn_channel *channel; /* that it has a side of; NULL: none */
    struct {
        uint64_t number; /* of the channel */
        attn_channel_side of;
    } side;
} server;

static void give(server *self, attn_answer *answer, attn_status outcome) {
    attn_status_save(&answer->outcome, outcome);
    atomic_store_explicit(&answer->is_given, true, memory_order_release);
    attn_bell_ring(&self->mailbox.control->answered);
}

/* What is mapped is lent to the backend, once there is one: a device then needs no copies. */
static void lend(server *self, uint32_t region) {
    if (self->backend == NULL || self->mailbox.regions[region].base == NULL) return;
    attn_backend_lend(self->backend, self->mailbox.regions[region].base, self->mailbox.regions[region].bytes);
}

static attn_status map_region(server *self, uint32_t region, uint64_t bytes, char **base) {
    char *before = self->mailbox.regions[region].base;
    if (bytes > self->mailbox.regions[region].bytes) {
        if (before != NULL && self->backend != NULL) attn_backend_take_back(self->backend, before);
        attn_status status = attn_mailbox_reserve(&self->mailbox, region, bytes);
        lend(self, region);
        if (attn_failed(status)) return status;
    }
    *base = self->mailbox.regions[region].base;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Creating */

static const void *take(const char **end, bool is_there, size_t bytes) {
    const char *begin = *end;
    if (!is_there) return NULL;
    *end += bytes;
    return begin;
}

static attn_status create(server *self, const attn_command *command) {
    char *rows;
    ATTN_TRY(map_region(self, ATTN_ROWS_REGION, command->region_bytes, &rows));
    attn_create_request request;
    memcpy(&request, rows, sizeof request);
    const char *end = rows + sizeof request;
    size_t scales = (size_t)request.geometry.layers * request.geometry.heads_kv * sizeof(float);
    attn_backend_config config = {.kind = request.kind,
                                  .geometry = request.geometry,
                                  .pages = request.pages,
                                  .workers = request.workers,
                                  .isa = request.isa[0] == '\0' ? NULL : request.isa,
                                  .device = request.device};
    config.cpus = take(&end, request.has_cpus, request.workers * sizeof *config.cpus);
    config.k_scales = take(&end, request.has_k_scales, scales);
    config.v_scales = take(&end, request.has_v_scales, scales);
    ATTN_TRY(attn_backend_create(&config, &self->backend));
    lend(self, ATTN_ROWS_REGION);
    if (self->spin_ns > 0 && attn_backend_depth(self->backend) > 1) self->spin_ns = SPIN_FOR_DEVICE_NS;
    const attn_line *line = &self->backend->line;
    attn_create_reply reply = {.tile_tokens = line->tile_tokens,
                               .block_queries = line->block_queries,
                               .workers = line->workers,
                               .depth = attn_backend_depth(self->backend),
                               .device = attn_channel_end_of(self->backend).device};
    snprintf(reply.description, sizeof reply.description, "%s", attn_backend_describe(self->backend));
    memcpy(rows, &reply, sizeof reply);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Rows and pages */

static attn_status move_rows(server *self, const attn_command *command) {
    char *base;
    ATTN_TRY(map_region(self, ATTN_ROWS_REGION, command->region_bytes, &base));
    attn_packed_rows rows =
        attn_packed_rows_place(attn_backend_geometry(self->backend), command->pages, command->tokens, base);
    if (command->kind == ATTN_COMMAND_EXPORT) {
        return attn_backend_export(self->backend, command->layer, rows.pages, command->pages, command->position,
                                   command->tokens, rows.keys, rows.values);
    }
    return attn_backend_append(self->backend, command->layer, rows.pages, command->pages, command->position,
                               command->tokens, rows.keys, rows.values);
}

/* ------------------------------------------------------------------------------------------- */
/* Decodes */

static attn_status start(server *self, const attn_command *command, flight *next) {
    const attn_geometry *geometry = attn_backend_geometry(self->backend);
    char *base;
    ATTN_TRY(map_region(self, command->region, command->region_bytes, &base));
    attn_packet_counts counts = ((const attn_packet_head *)(void *)base)->counts;
    attn_packet packet = attn_packet_place(geometry, &counts, base);
    ATTN_TRY(attn_packet_batch(&packet, geometry, &next->pointers, &next->batch));
    attn_backend_set_identity(self->backend, command->identity);
    return attn_backend_start(self->backend, &next->batch, counts.plan_bytes > 0 ? packet.plan : NULL);
}

static void finish_oldest(server *self) {
    attn_answer *answer = self->flights[self->oldest].answer;
    self->oldest = (self->oldest + 1) % ATTN_FLIGHTS;
    self->in_flight--;
    attn_status outcome = attn_backend_finish(self->backend, &answer->timing);
    give(self, answer, outcome);
}

/* Nothing of a decode that did not start is in flight; its outcome is known now. */
static void decode(server *self, const attn_command *command) {
    while (self->in_flight >= attn_backend_depth(self->backend) || self->in_flight == ATTN_FLIGHTS)
        finish_oldest(self);
    flight *next = &self->flights[(self->oldest + self->in_flight) % ATTN_FLIGHTS];
    next->answer = &self->mailbox.control->decoded[command->region];
    attn_status status = start(self, command, next);
    if (attn_failed(status))
        give(self, next->answer, status);
    else
        self->in_flight++;
}

/* ------------------------------------------------------------------------------------------- */
/* Channels */

static bool is_revoked(void *context) {
    const server *self = context;
    return atomic_load(&self->mailbox.control->revoked_channel) == self->side.number;
}

static void close_channel(server *self) {
    attn_channel_destroy(self->channel);
    self->channel = NULL;
}

static attn_status make_channel_id(server *self, const attn_command *command) {
    char *rows;
    ATTN_TRY(map_region(self, ATTN_ROWS_REGION, command->region_bytes, &rows));
    return self->backend->ops->channels->make_id(&((attn_channel_request *)(void *)rows)->id);
}

static attn_status open_channel(server *self, const attn_channel_request *request) {
    if (self->channel != NULL && self->side.number == request->number) return attn_ok();
    close_channel(self);
    self->side.number = request->number;
    self->side.of = (attn_channel_side){.own = attn_channel_end_of(self->backend),
                                        .index = request->index,
                                        .other_device = request->other_device,
                                        .id = request->id,
                                        .is_revoked = is_revoked,
                                        .context = self};
    return self->backend->ops->channels->create_side(&self->side.of, &self->channel);
}

static attn_status use_channel(server *self, const attn_command *command) {
    attn_channel_request request;
    char *rows;
    ATTN_TRY(map_region(self, ATTN_ROWS_REGION, command->region_bytes, &rows));
    memcpy(&request, rows, sizeof request);
    const uint32_t *pages = (const uint32_t *)(void *)(rows + sizeof request);
    ATTN_TRY(open_channel(self, &request));
    attn_status status = (command->kind == ATTN_COMMAND_SEND ? attn_channel_send : attn_channel_receive)(
        self->channel, self->backend, pages, request.count, request.timeout_ns);
    if (attn_failed(status)) close_channel(self);
    return status;
}

/* ------------------------------------------------------------------------------------------- */
/* Commands */

static attn_status do_at_once(server *self, const attn_command *command) {
    switch (command->kind) {
    case ATTN_COMMAND_CREATE: return create(self, command);
    case ATTN_COMMAND_APPEND:
    case ATTN_COMMAND_EXPORT: return move_rows(self, command);
    case ATTN_COMMAND_COPY_PAGE: return attn_backend_copy_page(self->backend, command->page, command->to);
    case ATTN_COMMAND_CHANNEL_ID: return make_channel_id(self, command);
    case ATTN_COMMAND_SEND:
    case ATTN_COMMAND_RECEIVE: return use_channel(self, command);
    case ATTN_COMMAND_POISON: return attn_backend_poison(self->backend, command->page, command->to, command->slots);
#ifndef ATTN_RELEASE
    case ATTN_COMMAND_BREAK: attn_backend_break(self->backend); return attn_ok();
#endif
    default: return attn_error(ATTN_INTERNAL, "an isolated backend was sent command %d", (int)command->kind);
    }
}

static void take_command(server *self) {
    attn_command *command = &self->mailbox.control->ring[self->taken++ % ATTN_RING];
    if (self->channel != NULL && is_revoked(self)) close_channel(self);
    attn_status status = attn_ok();
    if (command->kind == ATTN_COMMAND_DECODE)
        decode(self, command);
    else
        status = do_at_once(self, command);
    give(self, &command->answer, status);
}

/* With decodes in flight: looks for a command to come and for the oldest to end, as long as that takes. */
static void look_about(server *self) {
    if (attn_backend_has_ended(self->backend))
        finish_oldest(self);
    else if (self->spin_ns == 0)
        usleep(1);
}

static void serve(server *self) {
    attn_bell *posted = &self->mailbox.control->posted;
    for (;;) {
        if (attn_bell_count(posted) != self->taken)
            take_command(self);
        else if (self->in_flight > 0)
            look_about(self);
        else
            attn_bell_wait(posted, self->taken, self->spin_ns);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

/* The parent has closed the pipe, or has ended. The system takes back what the backend has. */
static void *end_with_parent(void *unused) {
    char byte;
    ssize_t count;
    (void)unused;
    do
        count = read(STDIN_FILENO, &byte, 1);
    while (count > 0 || (count < 0 && errno == EINTR));
    _exit(EXIT_SUCCESS);
}

static int run(void) {
    server self = {.spin_ns = sysconf(_SC_NPROCESSORS_ONLN) > 1 ? SPIN_NS : 0};
    pthread_t watcher;
    prctl(PR_SET_NAME, "attnd-backend");
    signal(SIGINT, SIG_IGN); /* at a terminal they are sent to both: the parent decides */
    signal(SIGTERM, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    attn_status status = attn_mailbox_open(&self.mailbox, ATTN_PROCESS_MEMORY_FD);
    if (attn_failed(status) || pthread_create(&watcher, NULL, end_with_parent, NULL) != 0) {
        fprintf(stderr, "attnd-backend: cannot start: %s\n", attn_failed(status) ? status.message : "no thread");
        return EXIT_FAILURE;
    }
    serve(&self);
    return EXIT_SUCCESS;
}

void attn_isolated_main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], ATTN_PROCESS_MARK) == 0) _exit(run());
    attn_isolated_allow();
}
