/*
 * The pages of one rank's pool: which are free, and how many hold each of the others.
 *
 * A page is an index into the backend's pool; this module counts, the backend stores. A page is
 * free, or has one holder (a sequence may write to it), or several (forks, steps that read, and exports): then
 * it is shared and nobody writes to it.
 *
 * Threads: guarded by the engine's lock.
 */
#ifndef ATTND_DP_PAGES_H
#define ATTND_DP_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

#define DP_NO_PAGE UINT32_MAX

typedef struct {
    uint32_t epoch; /* from 1; counts up when the pool is emptied under its holders: pages of an earlier one are gone */
    uint32_t total;
    uint32_t free;
    uint32_t *references; /* [total] */
    uint32_t *free_stack; /* [free] in use */
} dp_pages;

attn_status dp_pages_init(dp_pages *pages, uint32_t total);
void dp_pages_fini(dp_pages *pages);

/* Takes a free page, with one reference. There must be one. */
uint32_t dp_pages_take(dp_pages *pages);

/* One more holder of a page that has one. */
void dp_pages_share(dp_pages *pages, uint32_t page);

/* One holder less; the last one frees the page. */
void dp_pages_drop(dp_pages *pages, uint32_t page);

/* A new epoch: all pages are free. Who holds pages of an earlier one does not drop them any more. */
void dp_pages_renew(dp_pages *pages);

bool dp_pages_shared(const dp_pages *pages, uint32_t page);

#endif
