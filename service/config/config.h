/*
 * The server's configuration: one table of settings, read from a YAML file and from flags.
 *
 * Every setting has a key path ("geometry.head_dim") and, but for the tenants, a flag
 * ("--head-dim"); both are parsed and checked by the same code, and flags win over the file. With
 * neither, the defaults below make a server that runs anywhere: loopback, cpu, one rank.
 * service/config/attnd.example.yaml is a commented file with every key.
 *
 * Errors are ATTN_INVALID_ARGUMENT and begin with the place: the flag, or the file and key path
 * ("attnd.yaml: geometry.head_dim: 33 is not a multiple of 8").
 *
 * One thread reads a configuration; afterwards it is constant and any thread may look at it.
 */
#ifndef ATTND_SERVICE_CONFIG_CONFIG_H
#define ATTND_SERVICE_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "kernels/attention.h"
#include "service/log/log.h"

#define ATTN_CONFIG_MAX_LISTEN  16
#define ATTN_CONFIG_MAX_TENANTS 1024

/* One who may call. Tenant numbers are the positions in the file, from 0. */
typedef struct {
    const char *name;       /* for logs and metrics; unique */
    const char *token;      /* the bearer token, 16 bytes or more; unique; from auth.tenants.token or token_file */
    uint64_t max_pages;     /* 0: no quota */
    uint64_t max_sequences; /* likewise */
} attn_config_tenant;

typedef struct {
    /* server */
    const char *listen[ATTN_CONFIG_MAX_LISTEN]; /* "host:port", "[v6]:port" or "unix:/path" */
    uint32_t listen_count;                      /* 1 or more; default 127.0.0.1:7400 */
    uint32_t cq_threads;                        /* completion queues, one thread each */
    uint32_t grace_ms;                          /* how long a drain waits for calls in flight */
    const char *ready_file;                     /* written when serving, one listening address a line; NULL: none */

    /* geometry */
    attn_geometry geometry;     /* complete: head_dim_v is filled in */
    float k_scale;              /* of an fp8 cache, where its file gives no other; else 1 */
    float v_scale;              /* likewise */
    const char *kv_scales_file; /* text, scales.h; NULL: none */
    const float *k_scales;      /* [layers, heads_kv] from these three; NULL: the cache is not fp8 */
    const float *v_scales;      /* likewise */

    /* ranks */
    const char *backend; /* "auto", "cpu", "reference", "cuda" */
    const char *isa;     /* "auto", "avx512bf16", "avx512", "avx2", "portable" */
    uint32_t ranks;
    uint32_t threads; /* a rank, its own included; default: usable cores / ranks, 1 at least */
    bool pin_cpus;
    const char *isolated;             /* "auto": with cuda and several ranks, "true", "false"; see dp_config.isolated */
    uint32_t pages;                   /* a rank; default: 1 GiB of them, 64 at least */
    float rebalance_factor;           /* see dp_config.rebalance_factor; 0: never, else above 1 */
    uint64_t direct_move_bytes;       /* see dp_config.direct_move_bytes; 0: never */
    uint64_t spread_above_tokens;     /* see dp_config.spread_above_tokens; 0: never */
    uint32_t rank_stall_ms;           /* see dp_config.rank_stall_ns; 0: never */
    uint32_t rank_restart_backoff_ms; /* see dp_config.rank_restart_ns; 0: never */
    uint32_t min_serving_ranks;       /* 1 .. ranks; while fewer serve, health says NOT_SERVING */

    /* limits */
    uint32_t max_batch;     /* sequences a step */
    uint32_t max_sequences; /* open at once, all tenants */
    uint64_t max_sequence_tokens;
    uint32_t max_queue;         /* calls waiting for one rank */
    uint64_t max_message_bytes; /* one request message; given in MiB */
    uint32_t step_idle_ms;      /* 0: never */
    uint32_t sequence_idle_ms;  /* 0: never */

    /* auth */
    const attn_config_tenant *tenants; /* [tenant_count] */
    uint32_t tenant_count;             /* 0: no credentials asked for, everything is tenant 0 */
    const char *admin_token_file;      /* NULL: nobody may administer */
    const char *admin_token;           /* its first line: 16 bytes or more, no tenant's; or NULL */

    /* metrics */
    bool metrics;                /* serve /metrics, /healthz, /readyz over HTTP: asked for by giving a port */
    const char *metrics_address; /* numeric; default 127.0.0.1 */
    uint16_t metrics_port;       /* 0: any free one */

    /* log */
    attn_log_level log_level;

    /* Test aid, from --test-faults only; release builds have no such flag. */
    bool test_faults;

    void *owned; /* the strings and tenants above */
} attn_config;

/* What attn_config_read found on the command line. */
typedef enum {
    ATTN_CONFIG_RUN,
    ATTN_CONFIG_HELP,    /* --help: print attn_config_help() and leave */
    ATTN_CONFIG_VERSION, /* --version: likewise with the version */
} attn_config_action;

/*
 * Fills *config from the defaults, the file named by --config, if any, and the flags, in this order,
 * and checks the whole. After ATTN_OK and ATTN_CONFIG_RUN the caller owns *config and ends it with
 * attn_config_fini; in all other cases there is nothing to end. argv is not reordered or kept.
 */
attn_status attn_config_read(int argc, char *const *argv, attn_config *config, attn_config_action *action);

/*
 * The same from YAML text alone: `name` stands for the file in messages. For tests and fuzzing.
 * token_file and kv_scales_file are read from the file system.
 */
attn_status attn_config_parse(const char *yaml, size_t size, const char *name, attn_config *config);

/* Frees what *config holds; tokens are wiped first. */
void attn_config_fini(attn_config *config);

/* The text of --help. The caller frees it; NULL if there is no memory. */
char *attn_config_help(void);

#endif
