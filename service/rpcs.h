/* The RPCs that the server serves, one constant for each; see call.h for what they mean. */
#ifndef ATTND_SERVICE_RPCS_H
#define ATTND_SERVICE_RPCS_H

#include "service/call.h"

/* attnd.v1.Attention */
extern const rpc rpc_get_server_info; /* rpc_info.c */
extern const rpc rpc_restart_rank;
extern const rpc rpc_open_sequences; /* rpc_sequences.c */
extern const rpc rpc_fork_sequence;
extern const rpc rpc_truncate_sequence;
extern const rpc rpc_close_sequences;
extern const rpc rpc_describe_sequences;
extern const rpc rpc_move_sequence; /* rpc_move.c */
extern const rpc rpc_append_kv;     /* rpc_append.c */
extern const rpc rpc_export_kv;     /* rpc_export.c */
extern const rpc rpc_decode;        /* rpc_decode.c */
extern const rpc rpc_decode_stream; /* rpc_stream.c */

/* grpc.health.v1.Health */
extern const rpc rpc_health_check; /* health.c */
extern const rpc rpc_health_watch;

/* grpc.reflection.v1 and v1alpha */
extern const rpc rpc_reflection; /* reflection.c */
extern const rpc rpc_reflection_v1alpha;

#endif
