#define _GNU_SOURCE
#include "dp/watchdog.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/clock.h"
#include "dp/state.h"

/* How often it looks; more often where less than four times that is called a stall. */
#define LOOK_NS INT64_C(20000000)

/* What it knows of a rank. The watchdog's thread's, but for what the lock guards. */
typedef struct {
    bool lost;            /* at the last look */
    uint32_t losses;      /* in a row, failed restarts included */
    int64_t serves_since; /* when it was installed last */
    int64_t restart_ns;   /* when it is to be restarted; INT64_MAX: never */
    bool wanted;          /* somebody wants it restarted now; guarded by the lock */
} watched;

struct dp_watchdog {
    dp_engine *engine;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* to stop, or a restart is wanted */
    bool stopping;          /* guarded by lock */
    watched *ranks;         /* [ranks] */
};

int64_t dp_restart_delay(int64_t rank_restart_ns, uint32_t losses) {
    int64_t delay = rank_restart_ns;
    while (losses-- > 1 && delay < DP_RESTART_MAX_NS)
        delay *= 2;
    return delay < DP_RESTART_MAX_NS ? delay : DP_RESTART_MAX_NS;
}

/* ------------------------------------------------------------------------------------------- */
/* One look at one rank */

static void schedule_restart(const dp_watchdog *watchdog, watched *rank, int64_t now) {
    int64_t first_delay = watchdog->engine->config.rank_restart_ns;
    rank->losses++;
    rank->restart_ns = first_delay > 0 ? now + dp_restart_delay(first_delay, rank->losses) : INT64_MAX;
}

static void note_loss(const dp_watchdog *watchdog, watched *rank, int64_t now) {
    rank->lost = true;
    if (now - rank->serves_since >= DP_RESTART_MAX_NS) rank->losses = 0;
    schedule_restart(watchdog, rank, now);
}

/* The new pool comes first: who sees the rank serve finds it. */
static void let_serve(dp_watchdog *watchdog, uint32_t index, int64_t now) {
    dp_engine *engine = watchdog->engine;
    pthread_mutex_lock(&engine->lock);
    uint32_t epoch = dp_sequences_renew_rank(&engine->sequences, index);
    pthread_mutex_unlock(&engine->lock);
    dp_rank_install(engine->ranks[index].rank, epoch);
    watchdog->ranks[index].lost = false;
    watchdog->ranks[index].serves_since = now;
}

static bool take_wish(dp_watchdog *watchdog, watched *rank) {
    pthread_mutex_lock(&watchdog->lock);
    bool wanted = rank->wanted;
    rank->wanted = false;
    pthread_mutex_unlock(&watchdog->lock);
    return wanted;
}

static void start_if_due(dp_watchdog *watchdog, uint32_t index, int64_t now) {
    watched *rank = &watchdog->ranks[index];
    if (take_wish(watchdog, rank)) {
        rank->losses = 0;
        rank->restart_ns = now;
    }
    if (now < rank->restart_ns) return;
    if (attn_failed(dp_rank_start(watchdog->engine->ranks[index].rank))) schedule_restart(watchdog, rank, now);
}

static void look_at_rank(dp_watchdog *watchdog, uint32_t index) {
    const dp_config *config = &watchdog->engine->config;
    dp_rank *rank = watchdog->engine->ranks[index].rank;
    watched *known = &watchdog->ranks[index];
    int64_t now = attn_now_ns();
    if (config->rank_stall_ns > 0) dp_rank_fence_stalled(rank, now, config->rank_stall_ns);
    if (!dp_rank_lost(rank)) {
        take_wish(watchdog, known);
        return;
    }
    if (!known->lost) note_loss(watchdog, known, now);
    switch (dp_rank_look_at_start(rank)) {
    case DP_START_NONE: start_if_due(watchdog, index, now); break;
    case DP_START_RUNNING: break;
    case DP_START_READY: let_serve(watchdog, index, now); break;
    case DP_START_FAILED: schedule_restart(watchdog, known, now); break;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* The thread */

static int64_t interval(const dp_watchdog *watchdog) {
    int64_t stall_ns = watchdog->engine->config.rank_stall_ns;
    return stall_ns > 0 && stall_ns / 4 < LOOK_NS ? stall_ns / 4 + 1 : LOOK_NS;
}

/* False: to stop. */
static bool wait_for_next_look(dp_watchdog *watchdog) {
    int64_t until = attn_now_ns() + interval(watchdog);
    struct timespec time = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    pthread_mutex_lock(&watchdog->lock);
    if (!watchdog->stopping) pthread_cond_timedwait(&watchdog->changed, &watchdog->lock, &time);
    bool goes_on = !watchdog->stopping;
    pthread_mutex_unlock(&watchdog->lock);
    return goes_on;
}

static void *watch(void *argument) {
    dp_watchdog *watchdog = argument;
    pthread_setname_np(pthread_self(), "watchdog");
    while (wait_for_next_look(watchdog)) {
        for (uint32_t r = 0; r < watchdog->engine->config.ranks; r++)
            look_at_rank(watchdog, r);
    }
    return NULL;
}

static void watchdog_free(dp_watchdog *watchdog) {
    pthread_cond_destroy(&watchdog->changed);
    pthread_mutex_destroy(&watchdog->lock);
    free(watchdog->ranks);
    free(watchdog);
}

attn_status dp_watchdog_create(dp_engine *engine, dp_watchdog **watchdog) {
    dp_watchdog *created = calloc(1, sizeof *created);
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for the ranks' watchdog");
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC); /* attn_now_ns's */
    pthread_cond_init(&created->changed, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&created->lock, NULL);
    created->engine = engine;
    created->ranks = calloc(engine->config.ranks, sizeof *created->ranks);
    for (uint32_t r = 0; created->ranks != NULL && r < engine->config.ranks; r++)
        created->ranks[r].serves_since = attn_now_ns();
    if (created->ranks == NULL || pthread_create(&created->thread, NULL, watch, created) != 0) {
        watchdog_free(created);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory or thread for the ranks' watchdog");
    }
    *watchdog = created;
    return attn_ok();
}

void dp_watchdog_destroy(dp_watchdog *watchdog) {
    if (watchdog == NULL) return;
    pthread_mutex_lock(&watchdog->lock);
    watchdog->stopping = true;
    pthread_mutex_unlock(&watchdog->lock);
    pthread_cond_signal(&watchdog->changed);
    pthread_join(watchdog->thread, NULL);
    watchdog_free(watchdog);
}

void dp_watchdog_restart(dp_watchdog *watchdog, uint32_t rank) {
    pthread_mutex_lock(&watchdog->lock);
    watchdog->ranks[rank].wanted = true;
    pthread_mutex_unlock(&watchdog->lock);
    pthread_cond_signal(&watchdog->changed);
}
