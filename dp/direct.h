/*
 * Direct transfers: the pages of a whole sequence sent from one rank to another over a channel (kernels/channel.h), in
 * the pools' own layout: between GPUs, without the host's memory.
 *
 * Two ranks take part at once, so one direct transfer is under way at a time, and others go the usual way
 * (dp/transfer.h): two in opposite directions could each wait for the other's end of the queue.
 *
 *     both ranks say what their backends are -> the channel is made -> one sends, one receives -> done
 *
 * Neither waits for long: the timeout is below the stall limit, and a rank that is lost breaks the channel.
 */
#ifndef ATTND_DP_DIRECT_H
#define ATTND_DP_DIRECT_H

#include "dp/transfer.h"

/*
 * Starts to send a transfer's pages. True: `ended` will be called, on a rank thread or on the calling one, maybe before
 * this returns: with ATTN_OK when all have arrived, else with what went wrong, and then the usual way is as good as
 * before. False: this transfer cannot go so: it is small, it spreads the sequence, the backends have no channels, or
 * another one is under way.
 */
bool dp_direct_start(dp_transfer *transfer, void (*ended)(dp_transfer *transfer, attn_status status));

#endif
