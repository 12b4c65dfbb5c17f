/*
 * The file of an fp8 KV cache's scales. Private to service/config.
 *
 * Text; a line gives the scales of the keys (k) or values (v) of one layer: one for all KV heads, or one for each.
 * What follows a # is a comment. Lines may come in any order, each at most once.
 *
 *     0 k 0.0215
 *     0 v 0.011 0.0125 0.0109 0.013
 */
#ifndef ATTND_SERVICE_CONFIG_SCALES_H
#define ATTND_SERVICE_CONFIG_SCALES_H

#include <stddef.h>

#include "base/status.h"
#include "kernels/attention.h"

/*
 * Reads `text` (`size` bytes, a zero behind them; it is written to) into k_scales and v_scales [layers, heads_kv],
 * which come in as zeros: where no line gives any they stay zero. `place` begins the messages, the line's number
 * follows.
 */
attn_status attn_scales_read(char *text, size_t size, const char *place, const attn_geometry *geometry, float *k_scales,
                             float *v_scales);

#endif
