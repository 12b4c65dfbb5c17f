#include "dp/pages.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

attn_status dp_pages_init(dp_pages *pages, uint32_t total) {
    *pages = (dp_pages){.total = total};
    pages->references = calloc(total, sizeof *pages->references);
    pages->free_stack = malloc(total * sizeof *pages->free_stack);
    if (pages->references == NULL || pages->free_stack == NULL) {
        dp_pages_fini(pages);
        return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory to count %u pages", total);
    }
    dp_pages_renew(pages);
    return attn_ok();
}

void dp_pages_renew(dp_pages *pages) {
    pages->epoch++;
    pages->free = pages->total;
    memset(pages->references, 0, pages->total * sizeof *pages->references);
    for (uint32_t i = 0; i < pages->total; i++)
        pages->free_stack[i] = pages->total - 1 - i;
}

void dp_pages_fini(dp_pages *pages) {
    free(pages->references);
    free(pages->free_stack);
    *pages = (dp_pages){0};
}

uint32_t dp_pages_take(dp_pages *pages) {
    assert(pages->free > 0);
    uint32_t page = pages->free_stack[--pages->free];
    assert(pages->references[page] == 0);
    pages->references[page] = 1;
    return page;
}

void dp_pages_share(dp_pages *pages, uint32_t page) {
    assert(page < pages->total && pages->references[page] > 0);
    pages->references[page]++;
}

void dp_pages_drop(dp_pages *pages, uint32_t page) {
    assert(page < pages->total && pages->references[page] > 0);
    if (--pages->references[page] == 0) pages->free_stack[pages->free++] = page;
}

bool dp_pages_shared(const dp_pages *pages, uint32_t page) { return pages->references[page] > 1; }
