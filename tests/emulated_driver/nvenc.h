/* The checks that every entry point of the emulated NVENC makes. Included below the structures of one API version
 * (layout_<version>.h, written from the driver tables); sessions.c and pictures.c are compiled for each. */
#pragma once
#include "engine.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API_12_1 (12 << 4 | 1)
#define API_12_2 (12 << 4 | 2)

/* What a session was initialized with. */
struct setup {
    NV_ENC_INITIALIZE_PARAMS params;
    NV_ENC_CONFIG config;
};

static inline NVENCSTATUS refuse(struct session *session, NVENCSTATUS status, const char *why)
{
    snprintf(session->message, sizeof session->message, "%s", why);
    return status;
}

/* Whether the bits of `record` that its layout reserves are zero. */
static inline int unreserved(const void *record, const struct span *reserved)
{
    for (; reserved->size; reserved++)
        for (uint32_t i = 0; i < reserved->size; i++)
            if (((const uint8_t *)record)[reserved->offset + i] & reserved->mask)
                return 0;
    return 1;
}

static inline int same(const GUID *a, const GUID *b) { return !memcmp(a, b, sizeof *a); }

#define ENTRY(name, parameters, arguments)                                                          \
    static NVENCSTATUS name##_work parameters;                                                      \
    static NVENCSTATUS name##_entry parameters                                                      \
    {                                                                                               \
        struct fault fault = enter(#name);                                                          \
        int status = fault.status && !fault.after ? fault.status : (int)name##_work arguments;      \
        if (fault.status)                                                                           \
            note_fault(encoder, #name, status = fault.status);                                      \
        return (NVENCSTATUS)leave(status);                                                          \
    }                                                                                               \
    static NVENCSTATUS name##_work parameters

#define USE_SESSION(s)                                                                              \
    struct session *s = find(encoder, SESSION);                                                     \
    if (!s || s->failed)                                                                            \
        return NV_ENC_ERR_INVALID_ENCODERDEVICE;                                                    \
    if (s->api != NVENCAPI_VERSION) {                                                               \
        violation("a session is used with the functions of another API version");                   \
        return refuse(s, NV_ENC_ERR_INVALID_VERSION, "the session has another API version");        \
    }                                                                                               \
    if (current_context() != s->context)                                                            \
        return refuse(s, NV_ENC_ERR_INVALID_DEVICE, "the context of the session is not current");   \
    s->message[0] = 0

#define NEED(s, condition, status, why)                                                             \
    if (!(condition))                                                                               \
    return refuse(s, status, why)

#define NEED_INITIALIZED(s)                                                                         \
    NEED(s, s->initialized, NV_ENC_ERR_ENCODER_NOT_INITIALIZED, "the encoder is not initialized")

/* `p` is a structure `type` with its version word, and its reserved bits are zero. */
#define NEED_STRUCT(s, p, type)                                                                     \
    NEED(s, p, NV_ENC_ERR_INVALID_PTR, #type " is NULL");                                           \
    NEED(s, (p)->version == type##_VER, NV_ENC_ERR_INVALID_VERSION, "version word of " #type);      \
    NEED(s, unreserved(p, type##_reserved), NV_ENC_ERR_INVALID_PARAM, "reserved bits of " #type)
