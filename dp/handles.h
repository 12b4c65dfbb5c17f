/*
 * Handles: what a client holds in its hand instead of a slot number.
 *
 * A handle is the pair (generation, slot) encrypted as one 64-bit block under a random key of this
 * process. Every 64-bit value decrypts to some pair, so nothing is stored: whoever opens a handle
 * checks that the slot exists, is in use, and has that generation. A made-up or stale handle, or
 * one of another process, passes that check with a chance of (slots in use) / 2^64.
 *
 * The cipher is Speck64/128, which has the block size that a handle has.
 *
 * Threads: a key does not change after dp_handle_key_random; sealing and unsealing may run anywhere.
 */
#ifndef ATTND_DP_HANDLES_H
#define ATTND_DP_HANDLES_H

#include <stdint.h>

#include "base/status.h"

#define DP_HANDLE_ROUNDS 27

typedef struct {
    uint32_t rounds[DP_HANDLE_ROUNDS];
} dp_handle_key;

/* Expands a secret of 128 bits, least significant word first. */
void dp_handle_key_expand(dp_handle_key *key, const uint32_t secret[4]);

/* A key from the system's random source. ATTN_UNAVAILABLE: it has none to give. */
attn_status dp_handle_key_random(dp_handle_key *key);

/* The handle of a slot's generation. May be 0: the caller then moves on to another generation. */
uint64_t dp_handle_seal(const dp_handle_key *key, uint32_t slot, uint32_t generation);

void dp_handle_unseal(const dp_handle_key *key, uint64_t handle, uint32_t *slot, uint32_t *generation);

#endif
