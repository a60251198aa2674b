/* Sessions and what belongs to them, and the checks that every entry point of the emulated NVENC makes. */
#pragma once
#include "emulated.h"

#include <string.h>
#ifdef PUBLIC_HEADER
#include <ffnvcodec/dynlink_cuda.h>
#include <ffnvcodec/nvEncodeAPI.h>
#else
#include "nvenc_11_1.h"
#endif

#define HEADER_BYTES 4096

enum parts { PICTURE_ONLY, WITH_HEADERS, HEADERS_ONLY };
enum state { EMPTY, SUBMITTED, ENCODING, LOCKED };

struct session {
    void *context;
    int failed, initialized, engine;
    int faulty; /* a call failed on order: what was in flight then may never be locked */
    NV_ENC_INITIALIZE_PARAMS params;
    NV_ENC_CONFIG config;
    void **streams[2];
    void *stream_values[2];
    uint64_t submitted, collected; /* pictures */
    char message[160];
};

struct resource {
    void *session;
    NV_ENC_REGISTER_RESOURCE params;
    void *mapping;
};

struct mapping {
    void *session, *resource;
    int pictures; /* submitted and not locked yet */
};

struct bitstream {
    void *session, *mapping;
    enum state state;
    uint64_t number, stamp, checksum;
    int qp; /* -1: lossless */
    int8_t *map;
    uint32_t map_size, size;
    uint8_t *bytes;
};

NVENCSTATUS refuse(struct session *session, NVENCSTATUS status, const char *why);
void note_fault(const void *encoder, const char *call, int status);
int zero(const void *bytes, size_t size);
int is_444(uint32_t format);
int is_10bit(uint32_t format);
int session_qp(const struct session *s); /* -1: lossless */
uint32_t session_format(const struct session *s);
void free_bitstream(void *handle);

/* Encodes on the caller's thread; `frame` is NULL for headers alone. Returns the bytes, 0 on failure. */
int encode(const struct session *s, const struct bitstream *b, const uint8_t *frame, uint32_t pitch,
           uint32_t format, enum parts parts, uint8_t *out, uint32_t capacity);

/* The entry points of pictures.c. */
NVENCSTATUS nvEncRegisterResource(void *encoder, NV_ENC_REGISTER_RESOURCE *p);
NVENCSTATUS nvEncUnregisterResource(void *encoder, void *resource);
NVENCSTATUS nvEncMapInputResource(void *encoder, NV_ENC_MAP_INPUT_RESOURCE *p);
NVENCSTATUS nvEncUnmapInputResource(void *encoder, void *mapped);
NVENCSTATUS nvEncCreateBitstreamBuffer(void *encoder, NV_ENC_CREATE_BITSTREAM_BUFFER *p);
NVENCSTATUS nvEncDestroyBitstreamBuffer(void *encoder, void *bitstream);
NVENCSTATUS nvEncEncodePicture(void *encoder, NV_ENC_PIC_PARAMS *p);
NVENCSTATUS nvEncLockBitstream(void *encoder, NV_ENC_LOCK_BITSTREAM *p);
NVENCSTATUS nvEncUnlockBitstream(void *encoder, void *bitstream);

#define ENTRY(name, parameters, arguments)                                                          \
    static NVENCSTATUS name##_work parameters;                                                      \
    NVENCSTATUS name parameters                                                                     \
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
    if (current_context() != s->context)                                                            \
        return refuse(s, NV_ENC_ERR_INVALID_DEVICE, "the context of the session is not current");   \
    s->message[0] = 0

#define NEED_INITIALIZED(s)                                                                         \
    if (!s->initialized)                                                                            \
    return refuse(s, NV_ENC_ERR_ENCODER_NOT_INITIALIZED, "the encoder is not initialized")

#define NEED_VERSION(s, p, word)                                                                    \
    if (!(p))                                                                                       \
        return refuse(s, NV_ENC_ERR_INVALID_PTR, "a parameter structure is NULL");                  \
    if ((p)->version != (word))                                                                     \
    return refuse(s, NV_ENC_ERR_INVALID_VERSION, "version word is not " #word)

#define NEED_ZERO(s, field)                                                                         \
    if (!zero(&(field), sizeof(field)))                                                             \
    return refuse(s, NV_ENC_ERR_INVALID_PARAM, "reserved field is not zero: " #field)

#define NEED(s, condition, status, why)                                                             \
    if (!(condition))                                                                               \
    return refuse(s, status, why)
