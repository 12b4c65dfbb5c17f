#include "dp/handles.h"

#include <errno.h>
#include <sys/random.h>

static uint32_t rotate_right(uint32_t word, unsigned bits) { return word >> bits | word << (32 - bits); }

static uint32_t rotate_left(uint32_t word, unsigned bits) { return word << bits | word >> (32 - bits); }

void dp_handle_key_expand(dp_handle_key *key, const uint32_t secret[4]) {
    uint32_t words[3] = {secret[1], secret[2], secret[3]};
    uint32_t round = secret[0];
    for (uint32_t i = 0; i < DP_HANDLE_ROUNDS; i++) {
        key->rounds[i] = round;
        uint32_t *word = &words[i % 3];
        *word = (round + rotate_right(*word, 8)) ^ i;
        round = rotate_left(round, 3) ^ *word;
    }
}

attn_status dp_handle_key_random(dp_handle_key *key) {
    uint32_t secret[4];
    ssize_t got;
    do {
        got = getrandom(secret, sizeof secret, 0);
    } while (got < 0 && errno == EINTR);
    if (got != (ssize_t)sizeof secret) return attn_error(ATTN_UNAVAILABLE, "the system gives no random bytes");
    dp_handle_key_expand(key, secret);
    return attn_ok();
}

uint64_t dp_handle_seal(const dp_handle_key *key, uint32_t slot, uint32_t generation) {
    uint32_t high = generation, low = slot;
    for (uint32_t i = 0; i < DP_HANDLE_ROUNDS; i++) {
        high = (rotate_right(high, 8) + low) ^ key->rounds[i];
        low = rotate_left(low, 3) ^ high;
    }
    return (uint64_t)high << 32 | low;
}

void dp_handle_unseal(const dp_handle_key *key, uint64_t handle, uint32_t *slot, uint32_t *generation) {
    uint32_t high = (uint32_t)(handle >> 32), low = (uint32_t)handle;
    for (uint32_t i = DP_HANDLE_ROUNDS; i-- > 0;) {
        low = rotate_right(low ^ high, 3);
        high = rotate_left((high ^ key->rounds[i]) - low, 8);
    }
    *slot = low;
    *generation = high;
}
