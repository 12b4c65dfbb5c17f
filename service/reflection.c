/*
 * grpc.reflection v1 and v1alpha: services and .proto files out of the embedded descriptor sets. The
 * two differ in name only, so that one set of messages reads and writes both.
 *
 * No served file imports another: a file is answered alone.
 */
#include <stdio.h>
#include <string.h>

#include "proto/descriptor.pb-c.h"
#include "proto/reflection.pb-c.h"
#include "service/descriptors.h"
#include "service/rpcs.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest request_message;
typedef Grpc__Reflection__V1__ServerReflectionResponse response_message;

#define MAX_SERVICES 16
#define MAX_NAME     256

/* ------------------------------------------------------------------------------------------- */
/* Files and symbols */

/* Whether `symbol` is `scope`.`name`, or, if `inside` is given, begins so; then *inside is what follows. */
static bool names(const char *scope, const char *name, const char *symbol, const char **inside) {
    size_t scope_length = strlen(scope);
    if (scope_length > 0) {
        if (strncmp(symbol, scope, scope_length) != 0 || symbol[scope_length] != '.') return false;
        symbol += scope_length + 1;
    }
    size_t length = strlen(name);
    if (strncmp(symbol, name, length) != 0) return false;
    if (symbol[length] == '\0') return true;
    if (inside != NULL && symbol[length] == '.') *inside = symbol + length + 1;
    return false;
}

static bool enums_define(Attnd__Descriptor__Enum *const *enums, size_t count, const char *scope, const char *symbol) {
    for (size_t i = 0; i < count; i++) {
        if (names(scope, enums[i]->name, symbol, NULL)) return true;
    }
    return false;
}

static bool messages_define(Attnd__Descriptor__Message *const *messages, size_t count, const char *scope,
                            const char *symbol) {
    for (size_t i = 0; i < count; i++) {
        const char *inside = NULL;
        if (names(scope, messages[i]->name, symbol, &inside)) return true;
        if (inside == NULL) continue;
        return enums_define(messages[i]->enum_type, messages[i]->n_enum_type, "", inside) ||
               messages_define(messages[i]->nested_type, messages[i]->n_nested_type, "", inside);
    }
    return false;
}

static bool services_define(const Attnd__Descriptor__File *file, const char *symbol) {
    for (size_t i = 0; i < file->n_service; i++) {
        const Attnd__Descriptor__Service *service = file->service[i];
        const char *inside = NULL;
        if (names(file->package, service->name, symbol, &inside)) return true;
        for (size_t j = 0; inside != NULL && j < service->n_method; j++) {
            if (strcmp(service->method[j]->name, inside) == 0) return true;
        }
    }
    return false;
}

static bool file_defines(const Attnd__Descriptor__File *file, const char *symbol) {
    return services_define(file, symbol) ||
           messages_define(file->message_type, file->n_message_type, file->package, symbol) ||
           enums_define(file->enum_type, file->n_enum_type, file->package, symbol);
}

static bool file_is_named(const Attnd__Descriptor__File *file, const char *name) {
    return strcmp(file->name, name) == 0;
}

/* Visits the files until `visit` returns true; whether it did. */
static bool visit_files(bool (*visit)(const Attnd__Descriptor__File *file, const ProtobufCBinaryData *bytes,
                                      void *context),
                        void *context) {
    bool done = false;
    for (size_t i = 0; i < descriptor_set_count && !done; i++) {
        Attnd__Descriptor__FileSet *set =
            attnd__descriptor__file_set__unpack(NULL, descriptor_sets[i].size, descriptor_sets[i].bytes);
        for (size_t j = 0; set != NULL && j < set->n_file && !done; j++) {
            Attnd__Descriptor__File *file = attnd__descriptor__file__unpack(NULL, set->file[j].len, set->file[j].data);
            if (file != NULL) done = visit(file, &set->file[j], context);
            attnd__descriptor__file__free_unpacked(file, NULL);
        }
        attnd__descriptor__file_set__free_unpacked(set, NULL);
    }
    return done;
}

/* ------------------------------------------------------------------------------------------- */
/* Answers */

typedef struct {
    response_message *response;
    grpc_slice packed;
    /* what is looked for */
    bool (*matches)(const Attnd__Descriptor__File *file, const char *wanted);
    const char *wanted;
    /* what is listed */
    Grpc__Reflection__V1__ListServiceResponse list;
    Grpc__Reflection__V1__ServiceResponse services[MAX_SERVICES];
    Grpc__Reflection__V1__ServiceResponse *service_list[MAX_SERVICES];
    char names[MAX_SERVICES][MAX_NAME];
    size_t service_count;
} answer;

static bool pack_if_match(const Attnd__Descriptor__File *file, const ProtobufCBinaryData *bytes, void *context) {
    answer *answer = context;
    if (!answer->matches(file, answer->wanted)) return false;
    Grpc__Reflection__V1__FileDescriptorResponse files = GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    ProtobufCBinaryData one = *bytes;
    files.n_file_descriptor_proto = 1;
    files.file_descriptor_proto = &one;
    answer->response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    answer->response->file_descriptor_response = &files;
    answer->packed = call_pack(&answer->response->base);
    answer->response->file_descriptor_response = NULL;
    return true;
}

static void answer_not_found(answer *answer) {
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = ATTN_NOT_FOUND;
    error.error_message = "not served here";
    answer->response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    answer->response->error_response = &error;
    answer->packed = call_pack(&answer->response->base);
    answer->response->error_response = NULL;
}

static void answer_file(answer *answer, bool (*matches)(const Attnd__Descriptor__File *file, const char *wanted),
                        const char *wanted) {
    answer->matches = matches;
    answer->wanted = wanted;
    if (!visit_files(pack_if_match, answer)) answer_not_found(answer);
}

static bool list_services(const Attnd__Descriptor__File *file, const ProtobufCBinaryData *bytes, void *context) {
    (void)bytes;
    answer *answer = context;
    for (size_t i = 0; i < file->n_service && answer->service_count < MAX_SERVICES; i++) {
        size_t at = answer->service_count++;
        snprintf(answer->names[at], MAX_NAME, "%s.%s", file->package, file->service[i]->name);
        grpc__reflection__v1__service_response__init(&answer->services[at]);
        answer->services[at].name = answer->names[at];
        answer->service_list[at] = &answer->services[at];
    }
    return false;
}

static void answer_services(answer *answer) {
    visit_files(list_services, answer);
    grpc__reflection__v1__list_service_response__init(&answer->list);
    answer->list.n_service = answer->service_count;
    answer->list.service = answer->service_list;
    answer->response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    answer->response->list_services_response = &answer->list;
    answer->packed = call_pack(&answer->response->base);
}

static grpc_slice answer_request(request_message *request) {
    response_message response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    answer answer = {.response = &response};
    response.valid_host = request->host;
    response.original_request = request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        answer_file(&answer, file_is_named, request->file_by_filename);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        answer_file(&answer, file_defines, request->file_containing_symbol);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_services(&answer);
        break;
    default: answer_not_found(&answer); /* proto3 has no extensions */
    }
    return answer.packed;
}

/* ------------------------------------------------------------------------------------------- */
/* The stream: one message in, one out */

static void reflection_start(call *call) {
    call_watch(call);
    call_receive(call);
}

static void handle_message(call *call) {
    grpc_byte_buffer *buffer = call->received;
    wire_message message;
    call->received = NULL;
    attn_status status = call_read(call, buffer, &message);
    if (attn_failed(status)) {
        call_finish(call, status, NULL, 0);
    } else {
        grpc_slice slice = answer_request((request_message *)(uintptr_t)message.message);
        call_send(call, &slice, 1);
    }
    grpc_byte_buffer_destroy(buffer);
}

static void reflection_run(call *call, uint32_t events) {
    if (call->finished) return;
    if (call->closed) {
        call_finish(call, attn_error(ATTN_CANCELLED, "the client is gone"), NULL, 0);
    } else if (events & CALL_SENT) {
        if (call->sent_ok) call_receive(call);
    } else if (events & CALL_RECEIVED) {
        if (call->received != NULL) {
            handle_message(call);
        } else if (call->received_ok) {
            call_finish(call, attn_ok(), NULL, 0);
        }
    }
}

#define REFLECTION_RPC(version)                                                                                        \
    {                                                                                                                  \
        .path = "/grpc.reflection." version ".ServerReflection/ServerReflectionInfo", .method = ATTN_METHOD_OTHER,     \
        .request = &grpc__reflection__v1__server_reflection_request__descriptor, .stream_in = true,                    \
        .open_to_all = true, .while_draining = true, .background = true, .slots = 1, .start = reflection_start,        \
        .run = reflection_run,                                                                                         \
    }

const rpc rpc_reflection = REFLECTION_RPC("v1");
const rpc rpc_reflection_v1alpha = REFLECTION_RPC("v1alpha");
