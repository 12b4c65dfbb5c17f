/*
 * The watchdog: a thread that looks at every rank many times a second, gives up those that have stalled, and
 * restarts those that are lost, each after a delay that doubles from loss to loss.
 *
 * It never waits for a rank: a new worker creates its backend on its own thread, and is looked at from time to
 * time until it is there.
 *
 * Threads: create and destroy belong to the engine's; the rest is for any.
 */
#ifndef ATTND_DP_WATCHDOG_H
#define ATTND_DP_WATCHDOG_H

#include "dp/engine.h"

typedef struct dp_watchdog dp_watchdog;

/* Starts to watch the engine's ranks, which are there. ATTN_RESOURCE_EXHAUSTED: no memory or thread. */
attn_status dp_watchdog_create(dp_engine *engine, dp_watchdog **watchdog);

/* Ends the thread. NULL is fine. */
void dp_watchdog_destroy(dp_watchdog *watchdog);

/* Has a lost rank restarted without delay, and its delays begin anew. */
void dp_watchdog_restart(dp_watchdog *watchdog, uint32_t rank);

/* How long a restart waits after `losses` losses or failed restarts in a row, 1 or more; see dp_config.rank_restart_ns.
 */
int64_t dp_restart_delay(int64_t rank_restart_ns, uint32_t losses);

#endif
