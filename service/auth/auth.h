/*
 * Who is calling: bearer tokens to tenant numbers.
 *
 * A call carries the metadata `authorization: Bearer TOKEN`. With no tenants configured nothing is
 * asked for, whatever a call carries is ignored, and everything belongs to tenant 0. With tenants:
 *   ATTN_UNAUTHENTICATED     no `authorization`, or not of the form "Bearer TOKEN"
 *   ATTN_PERMISSION_DENIED   a well-formed token that is no tenant's
 * Messages never repeat what was sent.
 *
 * Tokens are not kept: the table holds their SHA-256 digests, and a check compares the digest of
 * what was sent with all of them, each in constant time, so that the time taken tells nothing about
 * which tenants or prefixes exist.
 *
 * Constant after creation: any thread may check.
 */
#ifndef ATTND_SERVICE_AUTH_AUTH_H
#define ATTND_SERVICE_AUTH_AUTH_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "service/config/config.h"

typedef struct attn_auth attn_auth;

/*
 * Creates the table; the caller destroys it. `tenants` and `admin_token` are not kept. count 0: nothing is asked
 * for. admin_token NULL: nobody may administer.
 */
attn_status attn_auth_create(const attn_config_tenant *tenants, uint32_t count, const char *admin_token,
                             attn_auth **auth);

/* NULL is fine. */
void attn_auth_destroy(attn_auth *auth);

/* Tenant numbers run from 0 to this minus 1; at least 1. */
uint32_t attn_auth_tenants(const attn_auth *auth);

/*
 * Finds the caller's tenant. `authorization` is the metadata's value, `size` bytes, not terminated;
 * NULL if the call has none (or has it twice). *tenant is set if the status is ATTN_OK.
 */
attn_status attn_auth_check(const attn_auth *auth, const char *authorization, size_t size, uint32_t *tenant);

/*
 * Whether the caller may administer the server: its token is the admin token, which is no tenant's, asked for whether
 * there are tenants or not. ATTN_PERMISSION_DENIED also where the server has none.
 */
attn_status attn_auth_check_admin(const attn_auth *auth, const char *authorization, size_t size);

#endif
