#include "service/auth/auth.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/crypto.h>
#include <openssl/sha.h>

struct attn_auth {
    bool has_admin;
    unsigned char admin[SHA256_DIGEST_LENGTH]; /* digest of the admin token */
    uint32_t count;
    unsigned char digests[][SHA256_DIGEST_LENGTH]; /* [count] of the tenants' tokens */
};

static void digest_of(const char *token, size_t size, unsigned char *digest) {
    SHA256((const unsigned char *)token, size, digest);
}

attn_status attn_auth_create(const attn_config_tenant *tenants, uint32_t count, const char *admin_token,
                             attn_auth **auth) {
    attn_auth *created = malloc(sizeof(*created) + count * sizeof(created->digests[0]));
    if (created == NULL) return attn_error(ATTN_RESOURCE_EXHAUSTED, "no memory for %u tenants", count);
    created->has_admin = admin_token != NULL;
    if (created->has_admin) digest_of(admin_token, strlen(admin_token), created->admin);
    created->count = count;
    for (uint32_t i = 0; i < count; i++) {
        digest_of(tenants[i].token, strlen(tenants[i].token), created->digests[i]);
    }
    *auth = created;
    return attn_ok();
}

void attn_auth_destroy(attn_auth *auth) { free(auth); }

uint32_t attn_auth_tenants(const attn_auth *auth) { return auth->count > 0 ? auth->count : 1; }

/* The token in "Bearer TOKEN" (RFC 6750; the scheme's name in any case), or NULL. */
static const char *bearer_token(const char *authorization, size_t size, size_t *token_size) {
    static const char scheme[] = "bearer ";
    size_t at = sizeof(scheme) - 1;
    if (authorization == NULL || size < at) return NULL;
    for (size_t i = 0; i < at; i++) {
        char character = authorization[i];
        if (character >= 'A' && character <= 'Z') character = (char)(character - 'A' + 'a');
        if (character != scheme[i]) return NULL;
    }
    while (at < size && authorization[at] == ' ') {
        at++;
    }
    if (at == size) return NULL;
    *token_size = size - at;
    return authorization + at;
}

static attn_status no_credentials(void) {
    return attn_error(ATTN_UNAUTHENTICATED,
                      "this server asks for credentials: send the metadata 'authorization: Bearer TOKEN'");
}

attn_status attn_auth_check(const attn_auth *auth, const char *authorization, size_t size, uint32_t *tenant) {
    unsigned char digest[SHA256_DIGEST_LENGTH];
    size_t token_size;
    bool found = false;
    if (auth->count == 0) {
        *tenant = 0;
        return attn_ok();
    }
    const char *token = bearer_token(authorization, size, &token_size);
    if (token == NULL) return no_credentials();
    digest_of(token, token_size, digest);
    for (uint32_t i = 0; i < auth->count; i++) {
        /* No early exit: the time taken is the same for every tenant and for none. */
        if (CRYPTO_memcmp(digest, auth->digests[i], sizeof(digest)) == 0) {
            found = true;
            *tenant = i;
        }
    }
    if (!found) return attn_error(ATTN_PERMISSION_DENIED, "the token in 'authorization' is no tenant's");
    return attn_ok();
}

attn_status attn_auth_check_admin(const attn_auth *auth, const char *authorization, size_t size) {
    unsigned char digest[SHA256_DIGEST_LENGTH];
    size_t token_size;
    if (!auth->has_admin) {
        return attn_error(ATTN_PERMISSION_DENIED, "administration is off: this server has no auth.admin_token_file");
    }
    const char *token = bearer_token(authorization, size, &token_size);
    if (token == NULL) return no_credentials();
    digest_of(token, token_size, digest);
    if (CRYPTO_memcmp(digest, auth->admin, sizeof(digest)) == 0) return attn_ok();
    return attn_error(ATTN_PERMISSION_DENIED, "the token in 'authorization' is not the admin token");
}
