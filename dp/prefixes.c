#include "dp/prefixes.h"

#include <string.h>

/* What is being looked for in a batch. The arrays are the batch's scratch memory. */
typedef struct {
    dp_batch *batch;
    uint32_t chunk_pages; /* of one chunk */
    bool read_only;
    uint32_t *table; /* [1 << bits] by page: the first sequence whose first chunk ends with it, plus 1; 0: none */
    uint32_t bits;
    uint32_t *order;  /* [count] the sequences that share a chunk and more with another, sorted by their tables */
    uint32_t *common; /* [count - 1] chunks that order[n] and order[n + 1] share */
    uint32_t count;
} search;

/* In a table's entry: the sequence is in `order` already. */
#define IN_COMPANY 0x80000000u

/* Of a table at most half full: 1 << bits entries. */
static uint32_t table_bits(uint32_t size) {
    uint32_t bits = 1;
    while (bits < 31 && 1u << bits < 2 * size)
        bits++;
    return bits;
}

size_t dp_prefixes_scratch(uint32_t size) { return ((size_t)1 << table_bits(size)) + 2 * (size_t)size; }

/* Chunks of sequence i that it may share: committed and whole. */
static uint32_t chunks_of(const search *search, uint32_t i) {
    const dp_batch *batch = search->batch;
    if (batch->parts != NULL && batch->parts[i].chunk_stride != 0) return 0;
    return (batch->lengths[i] - (search->read_only ? 0 : batch->query_lengths[i])) / ATTN_CHUNK_TOKENS;
}

/* The page that ends a chunk. */
static uint32_t last_page(const search *search, uint32_t i, uint32_t chunk) {
    const dp_batch *batch = search->batch;
    return batch->pages[batch->page_offsets[i] + (chunk + 1) * search->chunk_pages - 1];
}

/* ------------------------------------------------------------------------------------------- */
/* Who shares anything */

static void add_in_company(search *search, uint32_t i) {
    uint32_t page = last_page(search, i, 0), mask = (1u << search->bits) - 1;
    uint32_t place = page * 0x9e3779b1u >> (32 - search->bits); /* the high bits: pages often differ by a constant */
    uint32_t *entry = &search->table[place];
    while (*entry != 0 && last_page(search, (*entry & ~IN_COMPANY) - 1, 0) != page) {
        place = (place + 1) & mask;
        entry = &search->table[place];
    }
    if (*entry == 0) {
        *entry = i + 1;
        return;
    }
    if ((*entry & IN_COMPANY) == 0) {
        search->order[search->count++] = *entry - 1;
        *entry |= IN_COMPANY;
    }
    search->order[search->count++] = i;
}

static void find_company(search *search) {
    memset(search->table, 0, ((size_t)1 << search->bits) * sizeof *search->table);
    for (uint32_t i = 0; i < search->batch->size; i++) {
        if (chunks_of(search, i) > 0) add_in_company(search, i);
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Sorting: those that share more are nearer to each other */

/* Leading chunks that two sequences share, by bisection. */
static uint32_t shared_chunks(const search *search, uint32_t a, uint32_t b) {
    uint32_t low = 0, high = chunks_of(search, a), other = chunks_of(search, b);
    if (other < high) high = other;
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        if (last_page(search, a, middle - 1) == last_page(search, b, middle - 1))
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static bool is_before(const search *search, uint32_t a, uint32_t b) {
    uint32_t shared = shared_chunks(search, a, b), of_a = chunks_of(search, a), of_b = chunks_of(search, b);
    if (shared < of_a && shared < of_b) return last_page(search, a, shared) < last_page(search, b, shared);
    return of_a != of_b ? of_a < of_b : a < b;
}

/* Lets order[root] sink to its place in the heap of the first `count`. */
static void sink(search *search, uint32_t root, uint32_t count) {
    uint32_t *order = search->order;
    for (uint32_t child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && is_before(search, order[child], order[child + 1])) child++;
        if (!is_before(search, order[root], order[child])) return;
        uint32_t moved = order[root];
        order[root] = order[child];
        order[child] = moved;
    }
}

/* Heapsort: in place, for no memory is to be allocated here. */
static void sort_order(search *search) {
    for (uint32_t root = search->count / 2; root-- > 0;)
        sink(search, root, search->count);
    for (uint32_t end = search->count; end-- > 1;) {
        uint32_t largest = search->order[0];
        search->order[0] = search->order[end];
        search->order[end] = largest;
        sink(search, 0, end);
    }
}

/* A backend refuses a batch with a prefix that is not one: so every page is looked at, not only those that end a chunk.
 */
static void compare_neighbours(search *search) {
    const dp_batch *batch = search->batch;
    for (uint32_t n = 0; n + 1 < search->count; n++) {
        uint32_t a = search->order[n], b = search->order[n + 1], chunks = shared_chunks(search, a, b);
        size_t bytes = (size_t)chunks * search->chunk_pages * sizeof *batch->pages;
        bool same = memcmp(batch->pages + batch->page_offsets[a], batch->pages + batch->page_offsets[b], bytes) == 0;
        search->common[n] = same ? chunks : 0;
    }
}

/* ------------------------------------------------------------------------------------------- */
/* Choosing */

/*
 * Appends to the batch's prefixes the best ones of order[first] .. order[end - 1]; returns the chunks that they save.
 * Either all share one prefix, of as many chunks as their least alike neighbours do, or there is one or more on each
 * side of those neighbours. A call for each side ends sooner than this one: it has fewer sequences.
 */
static uint64_t choose(search *search, uint32_t first, uint32_t end) {
    dp_batch *batch = search->batch;
    if (end - first < 2) return 0;
    uint32_t least = search->common[first];
    for (uint32_t n = first + 1; n + 1 < end; n++) {
        if (search->common[n] < least) least = search->common[n];
    }
    uint32_t kept = batch->prefix_count;
    uint64_t together = (uint64_t)(end - first - 1) * least, apart = 0;
    for (uint32_t n = first, begin = first; n < end; n++) {
        if (n + 1 < end && search->common[n] != least) continue;
        apart += choose(search, begin, n + 1);
        begin = n + 1;
    }
    if (together == 0 || together < apart) return apart;
    batch->prefix_count = kept;
    batch->prefixes[batch->prefix_count++] =
        (attn_prefix){.members = search->order + first, .count = end - first, .tokens = least * ATTN_CHUNK_TOKENS};
    return together;
}

void dp_prefixes_find(dp_batch *batch, const attn_geometry *geometry, bool read_only) {
    uint32_t bits = table_bits(batch->size), *behind_table = batch->prefix_scratch + ((size_t)1 << bits);
    search search = {
        .batch = batch,
        .chunk_pages = ATTN_CHUNK_TOKENS / geometry->page_size,
        .read_only = read_only,
        .table = batch->prefix_scratch,
        .bits = bits,
        .order = behind_table,
        .common = behind_table + batch->size,
    };
    batch->prefix_count = 0;
    batch->tokens_shared = 0;
    find_company(&search);
    if (search.count == 0) return;
    sort_order(&search);
    compare_neighbours(&search);
    batch->tokens_shared = choose(&search, 0, search.count) * ATTN_CHUNK_TOKENS;
}

/* ------------------------------------------------------------------------------------------- */
/* Several batches */

static const uint32_t *pages_of(const dp_launch_prefixes *launch, const attn_prefix *prefix) {
    return launch->pages + launch->page_offsets[prefix->members[0]];
}

/* Tokens that need not be read, as if each member has all of the prefix. */
static uint64_t saved_by(uint32_t members, uint32_t tokens) { return (uint64_t)(members - 1) * tokens; }

/* Adds the members of `other` behind those of `prefix`, if that is worth it and right. Sets how much more is saved. */
static bool joins(const dp_launch_prefixes *launch, attn_prefix *prefix, const attn_prefix *other, uint64_t *saved) {
    const uint32_t *own = pages_of(launch, prefix), *others = pages_of(launch, other);
    uint32_t tokens = prefix->tokens < other->tokens ? prefix->tokens : other->tokens;
    uint64_t together = saved_by(prefix->count + other->count, tokens);
    uint64_t apart = saved_by(prefix->count, prefix->tokens) + saved_by(other->count, other->tokens);
    if (own[0] != others[0] || together < apart) return false;
    if (memcmp(own, others, tokens / launch->page_size * sizeof *own) != 0) return false;
    *saved = together - apart;
    prefix->tokens = tokens;
    return true;
}

uint64_t dp_prefixes_join(dp_launch_prefixes *launch) {
    uint32_t left = 0, *members = launch->members;
    uint64_t saved = 0, more;
    for (uint32_t p = 0; p < launch->count; p++) {
        attn_prefix joined = launch->prefixes[p];
        if (joined.count == 0) continue; /* it is in one before */
        memcpy(members, joined.members, joined.count * sizeof *members);
        joined.members = members;
        for (uint32_t q = p + 1; q < launch->count; q++) {
            attn_prefix *other = &launch->prefixes[q];
            if (other->count == 0 || !joins(launch, &joined, other, &more)) continue;
            memcpy(members + joined.count, other->members, other->count * sizeof *members);
            joined.count += other->count;
            other->count = 0;
            saved += more;
        }
        members += joined.count;
        launch->prefixes[left++] = joined;
    }
    launch->count = left;
    return saved;
}
