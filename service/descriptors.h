/* The descriptor sets of the served protos, embedded at build time from what protoc-c wrote. */
#ifndef ATTND_SERVICE_DESCRIPTORS_H
#define ATTND_SERVICE_DESCRIPTORS_H

#include <stddef.h>
#include <stdint.h>

/* A serialized google.protobuf.FileDescriptorSet. */
typedef struct {
    const uint8_t *bytes;
    size_t size;
} descriptor_set;

extern const descriptor_set descriptor_sets[];
extern const size_t descriptor_set_count;

#endif
