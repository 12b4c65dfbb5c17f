/* The parent's side: a backend that posts commands to its process and waits for the answers. */
#include "kernels/backend.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/cpu/workers.h"
#include "kernels/isolated/channel.h"
#include "kernels/isolated/create.h"
#include "kernels/isolated/isolated.h"
#include "kernels/isolated/mailbox.h"
#include "kernels/isolated/packet.h"
#include "kernels/isolated/process.h"

/*
 * How long to look for an answer before sleeping. A kind with a device behind it is not worth a sleep, as its driver's
 * own waits are not; one of this machine's CPUs needs them for itself.
 */
#define SPIN_FOR_DEVICE_NS 2000000
#define SPIN_FOR_CPU_NS    20000

/* As many threads copy rows as fast as memory takes them. Fewer bytes are copied before others are awake. */
#define COPIERS_MOST    6
#define COPIED_TOGETHER ((size_t)256 << 10)

typedef struct {
    const attn_batch *batch;
    attn_packet packet;
    attn_answer *answer;
} flight;

typedef struct isolated_backend isolated_backend;
struct isolated_backend {
    attn_backend base;
    attn_backend_ops ops; /* the base's: those below, and what differs by kind */
    attn_mailbox mailbox;
    attn_process *process;
    uint32_t posted;
    flight flights[ATTN_FLIGHTS];
    uint32_t oldest; /* flight */
    int64_t spin_ns;
    attn_cpu_workers *copiers; /* of rows, where the workers that it may have have nothing else to do; or NULL */
    int device;                /* of a kind with channels */
    isolated_backend *next;    /* in the list of all there are */
};

static isolated_backend *of(attn_backend *backend) { return (isolated_backend *)backend; }

/* ------------------------------------------------------------------------------------------- */
/* Commands */

static bool is_given(attn_answer *answer) { return atomic_load_explicit(&answer->is_given, memory_order_acquire); }

/* The outcome borrows the answer's place. */
static attn_status wait_for(isolated_backend *self, attn_answer *answer) {
    attn_bell *bell = &self->mailbox.control->answered;
    for (;;) {
        uint32_t seen = attn_bell_count(bell);
        if (is_given(answer)) return attn_status_view(&answer->outcome);
        if (attn_process_has_ended(self->process)) return attn_process_end(self->process);
        attn_bell_wait(bell, seen, self->spin_ns);
    }
}

/* A place in the ring, for the caller to fill and to post, if it comes to that; waits for one. */
static attn_status next_command(isolated_backend *self, attn_command_kind kind, attn_command **command) {
    attn_command *next = &self->mailbox.control->ring[self->posted % ATTN_RING];
    *command = next;
    if (self->posted >= ATTN_RING) {
        attn_status before = wait_for(self, &next->answer);
        if (!is_given(&next->answer)) return before;
    }
    next->kind = kind;
    return attn_ok();
}

static void post(isolated_backend *self, attn_command *command) {
    atomic_store_explicit(&command->answer.is_given, false, memory_order_relaxed);
    self->posted++;
    attn_bell_ring(&self->mailbox.control->posted);
}

/* The rows region, with room for so many bytes. */
static attn_status reserve_rows(isolated_backend *self, attn_command *command, size_t bytes, char **rows) {
    ATTN_TRY(attn_mailbox_reserve(&self->mailbox, ATTN_ROWS_REGION, bytes));
    command->region_bytes = bytes;
    *rows = self->mailbox.regions[ATTN_ROWS_REGION].base;
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* The pool */

static attn_status begin_rows(isolated_backend *self, attn_command_kind kind, uint32_t layer, const uint32_t *pages,
                              uint64_t position, uint32_t tokens, attn_command **command, attn_packed_rows *rows) {
    const attn_geometry *geometry = &self->base.geometry;
    uint32_t count = (uint32_t)((position + tokens - 1) / geometry->page_size + 1);
    char *base;
    ATTN_TRY(next_command(self, kind, command));
    ATTN_TRY(reserve_rows(self, *command, attn_packed_rows_place(geometry, count, tokens, NULL).bytes, &base));
    *rows = attn_packed_rows_place(geometry, count, tokens, base);
    memcpy(rows->pages, pages, count * sizeof *pages);
    (*command)->layer = layer;
    (*command)->position = position;
    (*command)->tokens = tokens;
    (*command)->pages = count;
    return attn_ok();
}

static attn_status isolated_append(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                   uint32_t tokens, const void *keys, const void *values) {
    isolated_backend *self = of(backend);
    attn_command *command;
    attn_packed_rows rows;
    ATTN_TRY(begin_rows(self, ATTN_COMMAND_APPEND, layer, pages, position, tokens, &command, &rows));
    memcpy(rows.keys, keys, tokens * attn_key_row_bytes(&backend->geometry));
    memcpy(rows.values, values, tokens * attn_value_row_bytes(&backend->geometry));
    post(self, command);
    return wait_for(self, &command->answer);
}

static attn_status isolated_export(attn_backend *backend, uint32_t layer, const uint32_t *pages, uint64_t position,
                                   uint32_t tokens, void *keys, void *values) {
    isolated_backend *self = of(backend);
    attn_command *command;
    attn_packed_rows rows;
    ATTN_TRY(begin_rows(self, ATTN_COMMAND_EXPORT, layer, pages, position, tokens, &command, &rows));
    post(self, command);
    ATTN_TRY(wait_for(self, &command->answer));
    memcpy(keys, rows.keys, tokens * attn_key_row_bytes(&backend->geometry));
    memcpy(values, rows.values, tokens * attn_value_row_bytes(&backend->geometry));
    return attn_ok();
}

/* A process that has ended says so at the next call that can. */
static void isolated_copy_page(attn_backend *backend, uint32_t from, uint32_t to) {
    isolated_backend *self = of(backend);
    attn_command *command;
    if (attn_failed(next_command(self, ATTN_COMMAND_COPY_PAGE, &command))) return;
    command->page = from;
    command->to = to;
    post(self, command);
}

static void isolated_poison(attn_backend *backend, uint32_t page, uint32_t first_slot, uint32_t slots) {
    isolated_backend *self = of(backend);
    attn_command *command;
    if (attn_failed(next_command(self, ATTN_COMMAND_POISON, &command))) return;
    command->page = page;
    command->to = first_slot;
    command->slots = slots;
    post(self, command);
}

/* ------------------------------------------------------------------------------------------- */
/* Decoding */

/* Of each sequence of a flight, by several threads where that is much. */
typedef struct {
    const flight *of;
    const attn_geometry *geometry;
    void (*copy)(const attn_packet *packet, const attn_geometry *geometry, const attn_batch *batch, uint32_t i);
    atomic_uint next;
} copying;

static void copy_some(void *context, uint32_t worker) {
    copying *rows = context;
    (void)worker;
    for (uint32_t i; (i = atomic_fetch_add(&rows->next, 1)) < rows->of->batch->size;)
        rows->copy(&rows->of->packet, rows->geometry, rows->of->batch, i);
}

static void copy_all(const isolated_backend *self, copying *rows) {
    if (self->copiers == NULL || rows->of->packet.bytes < COPIED_TOGETHER)
        copy_some(rows, 0);
    else
        attn_cpu_workers_run(self->copiers, copy_some, rows);
}

/* A plan is checked here, where rejected ones are counted and logged, and again where it is used. */
static attn_status accept_plan(attn_backend *backend, const attn_batch *batch, const attn_plan **plan) {
    if (*plan == NULL) return attn_ok();
    ATTN_TRY(attn_line_build(&backend->line, batch));
    *plan = attn_backend_accept_plan(backend, *plan);
    return attn_ok();
}

static attn_status isolated_start(attn_backend *backend, const attn_batch *batch, const attn_plan *plan) {
    isolated_backend *self = of(backend);
    uint32_t region = (self->oldest + backend->started) % ATTN_FLIGHTS;
    flight *next = &self->flights[region];
    attn_command *command;
    ATTN_TRY(accept_plan(backend, batch, &plan));
    ATTN_TRY(next_command(self, ATTN_COMMAND_DECODE, &command));
    size_t plan_bytes = plan == NULL ? 0 : attn_plan_bytes(backend->line.workers);
    attn_packet_counts counts = attn_packet_count(&backend->geometry, batch, plan_bytes);
    size_t bytes = attn_packet_place(&backend->geometry, &counts, NULL).bytes;
    ATTN_TRY(attn_mailbox_reserve(&self->mailbox, region, bytes));
    next->packet = attn_packet_place(&backend->geometry, &counts, self->mailbox.regions[region].base);
    next->packet.head->counts = counts;
    attn_packet_pack(&next->packet, &backend->geometry, batch, plan);
    next->batch = batch;
    copying rows = {.of = next, .geometry = &backend->geometry, .copy = attn_packet_pack_rows};
    copy_all(self, &rows);
    next->answer = &self->mailbox.control->decoded[region];
    atomic_store_explicit(&next->answer->is_given, false, memory_order_relaxed);
    command->identity = backend->identity;
    command->region = region;
    command->region_bytes = bytes;
    post(self, command);
    return attn_ok();
}

static bool isolated_has_ended(attn_backend *backend) {
    isolated_backend *self = of(backend);
    return is_given(self->flights[self->oldest].answer) || attn_process_has_ended(self->process);
}

static attn_status isolated_finish(attn_backend *backend, attn_timing *timing) {
    isolated_backend *self = of(backend);
    flight *ended = &self->flights[self->oldest];
    self->oldest = (self->oldest + 1) % ATTN_FLIGHTS;
    ATTN_TRY(wait_for(self, ended->answer));
    *timing = ended->answer->timing;
    copying rows = {.of = ended, .geometry = &backend->geometry, .copy = attn_packet_deliver};
    copy_all(self, &rows);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Channels, which may outlive their backends */

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static isolated_backend *all; /* guarded by it */

static void list(isolated_backend *self) {
    pthread_mutex_lock(&all_lock);
    self->next = all;
    all = self;
    pthread_mutex_unlock(&all_lock);
}

static void unlist(isolated_backend *self) {
    pthread_mutex_lock(&all_lock);
    isolated_backend **link = &all;
    while (*link != self)
        link = &(*link)->next;
    *link = self->next;
    pthread_mutex_unlock(&all_lock);
}

void attn_isolated_revoke(const attn_backend *backend, uint64_t number) {
    pthread_mutex_lock(&all_lock);
    for (isolated_backend *each = all; each != NULL; each = each->next) {
        if (&each->base == backend) atomic_store(&each->mailbox.control->revoked_channel, number);
    }
    pthread_mutex_unlock(&all_lock);
}

void attn_isolated_describe_end(attn_backend *backend, attn_channel_end *end) { end->device = of(backend)->device; }

attn_status attn_isolated_ask(attn_backend *backend, attn_command_kind kind, attn_channel_request *request,
                              const uint32_t *pages) {
    isolated_backend *self = of(backend);
    attn_command *command;
    char *rows;
    ATTN_TRY(next_command(self, kind, &command));
    ATTN_TRY(reserve_rows(self, command, sizeof *request + request->count * sizeof *pages, &rows));
    memcpy(rows, request, sizeof *request);
    if (request->count > 0) memcpy(rows + sizeof *request, pages, request->count * sizeof *pages);
    post(self, command);
    ATTN_TRY(wait_for(self, &command->answer));
    memcpy(request, rows, sizeof *request);
    return attn_ok();
}

/* ------------------------------------------------------------------------------------------- */
/* Life */

static bool may_isolate;

void attn_isolated_allow(void) { may_isolate = true; }

static void free_all(isolated_backend *self) {
    if (self->process != NULL && !attn_process_destroy(self->process)) return; /* who waits for its end has the rest */
    attn_mailbox_close(&self->mailbox);
    free(self);
}

static void isolated_destroy(attn_backend *backend) {
    unlist(of(backend));
    attn_cpu_workers_destroy(of(backend)->copiers);
    attn_backend_fini(backend);
    free_all(of(backend));
}

static void isolated_give_up(attn_backend *backend) { attn_process_kill(of(backend)->process); }

#ifndef ATTN_RELEASE
static void isolated_break(attn_backend *backend) {
    isolated_backend *self = of(backend);
    attn_command *command;
    if (attn_failed(next_command(self, ATTN_COMMAND_BREAK, &command))) return;
    post(self, command);
}
#endif

static const attn_backend_ops isolated_ops = {
    .destroy = isolated_destroy,
    .append = isolated_append,
    .export = isolated_export,
    .start = isolated_start,
    .has_ended = isolated_has_ended,
    .finish = isolated_finish,
    .copy_page = isolated_copy_page,
    .poison = isolated_poison,
    .give_up = isolated_give_up,
#ifndef ATTN_RELEASE
    .break_device = isolated_break,
#endif
};

static attn_create_request request_of(const attn_backend_config *config) {
    attn_create_request request = {.geometry = config->geometry,
                                   .pages = config->pages,
                                   .workers = config->workers,
                                   .device = config->device,
                                   .has_cpus = config->cpus != NULL,
                                   .has_k_scales = config->k_scales != NULL,
                                   .has_v_scales = config->v_scales != NULL};
    snprintf(request.kind, sizeof request.kind, "%s", config->kind == NULL ? "auto" : config->kind);
    snprintf(request.isa, sizeof request.isa, "%s", config->isa == NULL ? "" : config->isa);
    return request;
}

static void put(char **end, const void *bytes, size_t count) {
    if (bytes == NULL) return;
    memcpy(*end, bytes, count);
    *end += count;
}

/* Has the process create its backend; *reply is in the rows region. */
static attn_status create_there(isolated_backend *self, const attn_backend_config *config, attn_create_reply *reply) {
    attn_create_request request = request_of(config);
    size_t scales = (size_t)config->geometry.layers * config->geometry.heads_kv * sizeof(float);
    attn_command *command;
    char *end;
    ATTN_TRY(next_command(self, ATTN_COMMAND_CREATE, &command));
    ATTN_TRY(reserve_rows(self, command,
                          sizeof request + sizeof *reply + config->workers * sizeof *config->cpus + 2 * scales, &end));
    put(&end, &request, sizeof request);
    put(&end, config->cpus, config->workers * sizeof *config->cpus);
    put(&end, config->k_scales, scales);
    put(&end, config->v_scales, scales);
    post(self, command);
    ATTN_TRY(wait_for(self, &command->answer));
    memcpy(reply, self->mailbox.regions[ATTN_ROWS_REGION].base, sizeof *reply);
    return attn_ok();
}

static void ring_for_the_end(void *mailbox) { attn_bell_ring(&((attn_mailbox *)mailbox)->control->answered); }

static void init_base(isolated_backend *self, const attn_backend_ops *kind, const attn_backend_config *config,
                      const attn_create_reply *reply) {
    self->ops = isolated_ops;
    self->ops.kind = kind->kind;
    self->ops.stores_fp8 = kind->stores_fp8;
    self->ops.channels = kind->channels == NULL ? NULL : &attn_isolated_channel_ops;
    self->device = reply->device;
    self->ops.depth = reply->depth < ATTN_FLIGHTS ? reply->depth : ATTN_FLIGHTS;
    if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
        self->spin_ns = reply->depth > 1 ? SPIN_FOR_DEVICE_NS : SPIN_FOR_CPU_NS;
    }
    attn_backend_init(&self->base, &self->ops, config, reply->tile_tokens, reply->block_queries, reply->workers);
    self->base.process = (uint32_t)attn_process_id(self->process);
    snprintf(self->base.description, sizeof self->base.description, "%s", reply->description);
}

/* `self` has its mailbox. */
static attn_status start_process(isolated_backend *self, const attn_backend_ops *kind,
                                 const attn_backend_config *config) {
    attn_create_reply reply;
    ATTN_TRY(attn_process_start(self->mailbox.fd, ring_for_the_end, &self->mailbox, &self->process));
    ATTN_TRY(create_there(self, config, &reply));
    uint32_t copiers = config->workers < COPIERS_MOST ? config->workers : COPIERS_MOST;
    if (reply.depth > 1 && copiers > 1) ATTN_TRY(attn_cpu_workers_create(copiers, NULL, &self->copiers));
    init_base(self, kind, config, &reply);
    return attn_ok();
}

attn_status attn_isolated_create(const attn_backend_ops *kind, const attn_backend_config *config,
                                 attn_backend **backend) {
    if (!may_isolate) {
        return attn_error(ATTN_UNAVAILABLE, "this program has no isolated backends: attn_isolated_main was not called");
    }
    isolated_backend *self = calloc(1, sizeof *self);
    if (self == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for an isolated backend");
    attn_status status = attn_mailbox_create(&self->mailbox);
    if (attn_failed(status)) {
        free(self);
        return status;
    }
    status = start_process(self, kind, config);
    if (attn_failed(status)) {
        attn_saved_status why; /* it may be in the memory that goes */
        attn_status_save(&why, status);
        free_all(self);
        return attn_error(why.code, "%s", why.message);
    }
    list(self);
    *backend = &self->base;
    return status;
}
