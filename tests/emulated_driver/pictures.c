/* The emulated driver's libnvidia-encode, second half: inputs, pictures and bitstreams. Pictures are encoded as
 * late as possible, when they are locked, so that an input that changes too early is found out. The bytes come
 * from a function that the test installs; without one they are a description of the picture. */
#include "nvenc.h"

#include <stdlib.h>
#include <unistd.h>

#define MAX_ENGINES 8

/* Writes a picture (or its headers) to `out` and returns the bytes, 0 on failure. */
typedef int32_t encoder_function(const uint8_t *frame, uint32_t width, uint32_t height, uint32_t pitch,
                                 uint32_t format, int32_t qp, const int8_t *map, uint32_t map_size,
                                 int32_t parts, uint8_t *out, uint32_t capacity);
static encoder_function *encoder_callback;
static pthread_mutex_t engine_locks[MAX_ENGINES] = {[0 ... MAX_ENGINES - 1] = PTHREAD_MUTEX_INITIALIZER};
static uint64_t engine_pictures[MAX_ENGINES];

EXPORT void emulated_encoder(encoder_function *callback)
{
    encoder_callback = callback;
    memset(engine_pictures, 0, sizeof engine_pictures);
}

EXPORT uint64_t emulated_engine_pictures(int engine) { return engine_pictures[engine]; }

static uint64_t frame_bytes(const NV_ENC_REGISTER_RESOURCE *r)
{
    return (uint64_t)r->pitch * (is_444(r->bufferFormat) ? r->height * 3 : r->height * 3 / 2);
}

/* Sum of the samples, without the padding of the rows. */
static uint64_t checksum(const NV_ENC_REGISTER_RESOURCE *r)
{
    uint64_t sum = 0, rows = frame_bytes(r) / r->pitch, width = r->width * (is_10bit(r->bufferFormat) ? 2 : 1);
    const uint8_t *row = r->resourceToRegister;
    for (; rows--; row += r->pitch)
        for (uint64_t x = 0; x < width; x++)
            sum += row[x];
    return sum;
}

static void *owned(void *encoder, const void *handle, enum kind kind)
{
    void **state = find(handle, kind); /* the session comes first in every structure */
    return state && *state == encoder ? state : NULL;
}

void free_bitstream(void *handle)
{
    struct bitstream *b = drop(handle, BITSTREAM);
    free(b->bytes);
    free(b->map);
    free(b);
}

int encode(const struct session *s, const struct bitstream *b, const uint8_t *frame, uint32_t pitch,
           uint32_t format, enum parts parts, uint8_t *out, uint32_t capacity)
{
    uint32_t width = s->params.encodeWidth, height = s->params.encodeHeight;
    if (encoder_callback)
        return encoder_callback(frame, width, height, pitch, format, b->qp, b->map, b->map_size, parts, out, capacity);
    static const uint8_t headers[] = {0, 0, 1, 0x40, 1, 'h'}, start[] = {0, 0, 1, 0x26, 1};
    uint8_t *at = out;
    if (parts != PICTURE_ONLY)
        at = memcpy(at, headers, sizeof headers), at += sizeof headers;
    if (parts != HEADERS_ONLY) {
        uint64_t facts[] = {width, height, (uint64_t)(int64_t)b->qp, b->checksum};
        memcpy(at, start, sizeof start);
        memcpy(at + sizeof start, facts, sizeof facts);
        at += sizeof start + sizeof facts;
    }
    return (int)(at - out);
}

static void match_resource(void *handle, void *state, void *more)
{
    struct { uint64_t address, size; void *session; int found; } *search = more;
    struct resource *r = state;
    uint64_t start = (uintptr_t)r->params.resourceToRegister;
    (void)handle;
    if (start < search->address + search->size && search->address < start + frame_bytes(&r->params))
        search->found |= !search->session || r->session == search->session;
}

static int registered_in(void *session, uint64_t address, uint64_t size)
{
    struct { uint64_t address, size; void *session; int found; } search = {address, size, session, 0};
    each(RESOURCE, match_resource, &search);
    return search.found;
}

int registered_at(uint64_t address, uint64_t size) { return registered_in(NULL, address, size); }

ENTRY(nvEncRegisterResource, (void *encoder, NV_ENC_REGISTER_RESOURCE *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_REGISTER_RESOURCE_VER);
    NEED(s, p->resourceType == NV_ENC_INPUT_RESOURCE_TYPE_CUDADEVICEPTR && p->bufferUsage == NV_ENC_INPUT_IMAGE,
         NV_ENC_ERR_UNSUPPORTED_PARAM, "only CUDA memory for input");
    NEED(s, (uint32_t)p->bufferFormat == session_format(s), NV_ENC_ERR_INVALID_PARAM, "not the format of the session");
    NEED(s, p->width == s->params.encodeWidth && p->height == s->params.encodeHeight, NV_ENC_ERR_INVALID_PARAM, "size");
    NEED_ZERO(s, p->reserved1);
    NEED_ZERO(s, p->reserved2);
    uint64_t address = (uintptr_t)p->resourceToRegister;
    NEED(s, p->pitch % 4 == 0 && p->pitch >= p->width * (is_10bit(p->bufferFormat) ? 2u : 1u),
         NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "pitch");
    NEED(s, is_memory(address, frame_bytes(p)), NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "not memory of cuMemAlloc");
    NEED(s, !registered_in(encoder, address, frame_bytes(p)), NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "registered twice");
    struct resource *r = calloc(1, sizeof *r);
    r->session = encoder;
    r->params = *p;
    p->registeredResource = new_handle(RESOURCE, r);
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncUnregisterResource, (void *encoder, void *resource), (encoder, resource))
{
    USE_SESSION(s);
    struct resource *r = owned(encoder, resource, RESOURCE);
    NEED(s, r, NV_ENC_ERR_RESOURCE_NOT_REGISTERED, "not a registered resource");
    if (r->mapping) {
        if (!s->faulty)
            violation("a resource was unregistered while it was mapped");
        return refuse(s, NV_ENC_ERR_INVALID_CALL, "the resource is mapped");
    }
    free(drop(resource, RESOURCE));
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncMapInputResource, (void *encoder, NV_ENC_MAP_INPUT_RESOURCE *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_MAP_INPUT_RESOURCE_VER);
    NEED_ZERO(s, p->reserved1);
    NEED_ZERO(s, p->reserved2);
    struct resource *r = owned(encoder, p->registeredResource, RESOURCE);
    NEED(s, r, NV_ENC_ERR_RESOURCE_NOT_REGISTERED, "not a registered resource");
    NEED(s, !r->mapping, NV_ENC_ERR_MAP_FAILED, "mapped already");
    struct mapping *m = calloc(1, sizeof *m);
    *m = (struct mapping){encoder, p->registeredResource, 0};
    p->mappedResource = r->mapping = new_handle(MAPPING, m);
    p->mappedBufferFmt = r->params.bufferFormat;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncUnmapInputResource, (void *encoder, void *mapped), (encoder, mapped))
{
    USE_SESSION(s);
    struct mapping *m = owned(encoder, mapped, MAPPING);
    NEED(s, m, NV_ENC_ERR_RESOURCE_NOT_MAPPED, "not a mapped resource");
    if (m->pictures && !s->faulty)
        violation("an input was unmapped before its picture was locked");
    ((struct resource *)find(m->resource, RESOURCE))->mapping = NULL;
    free(drop(mapped, MAPPING));
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncCreateBitstreamBuffer, (void *encoder, NV_ENC_CREATE_BITSTREAM_BUFFER *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_CREATE_BITSTREAM_BUFFER_VER);
    NEED_ZERO(s, p->reserved1);
    struct bitstream *b = calloc(1, sizeof *b);
    b->session = encoder;
    p->bitstreamBuffer = new_handle(BITSTREAM, b);
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncDestroyBitstreamBuffer, (void *encoder, void *bitstream), (encoder, bitstream))
{
    USE_SESSION(s);
    struct bitstream *b = owned(encoder, bitstream, BITSTREAM);
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "not a bitstream buffer");
    if (!s->faulty && (b->state == LOCKED || b->state == ENCODING))
        violation("a bitstream buffer was destroyed while it was locked");
    NEED(s, b->state != ENCODING, NV_ENC_ERR_INVALID_CALL, "the bitstream buffer is being locked");
    free_bitstream(bitstream);
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS submit(struct session *s, void *encoder, NV_ENC_PIC_PARAMS *p)
{
    struct mapping *m = owned(encoder, p->inputBuffer, MAPPING);
    struct bitstream *b = owned(encoder, p->outputBitstream, BITSTREAM);
    NEED(s, m, NV_ENC_ERR_RESOURCE_NOT_MAPPED, "the input is not mapped");
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "no bitstream buffer");
    NEED(s, b->state == EMPTY, NV_ENC_ERR_INVALID_PARAM, "the bitstream buffer is in use");
    const NV_ENC_REGISTER_RESOURCE *r = &((struct resource *)find(m->resource, RESOURCE))->params;
    NEED(s, p->inputWidth == r->width && p->inputHeight == r->height && p->inputPitch == r->pitch &&
                p->bufferFmt == r->bufferFormat, NV_ENC_ERR_INVALID_PARAM, "the input is registered otherwise");
    NEED(s, p->pictureStruct == NV_ENC_PIC_STRUCT_FRAME, NV_ENC_ERR_INVALID_PARAM, "pictureStruct");
    NEED(s, !p->completionEvent, NV_ENC_ERR_INVALID_PARAM, "events are for asynchronous sessions");
    NEED_ZERO(s, p->reserved1);
    NEED_ZERO(s, p->reserved3);
    for (int i = 0; i < 2; i++)
        if (s->streams[i] && (*s->streams[i] != s->stream_values[i] || !find(s->stream_values[i], STREAM)))
            violation("a stream of the session is gone");
    const NV_ENC_RC_PARAMS *rate = &s->config.rcParams;
    if (s->config.frameIntervalP > 1 || rate->enableLookahead)
        return NV_ENC_ERR_NEED_MORE_INPUT;
    uint32_t blocks = ((r->width + 31) / 32) * ((r->height + 31) / 32);
    NEED(s, !p->qpDeltaMap || (rate->qpMapMode == NV_ENC_QP_MAP_DELTA && p->qpDeltaMapSize == blocks),
         NV_ENC_ERR_INVALID_PARAM, "QP map");
    if (p->qpDeltaMap) {
        b->map = memcpy(malloc(blocks), p->qpDeltaMap, blocks);
        b->map_size = blocks;
    }
    b->state = SUBMITTED;
    b->mapping = p->inputBuffer;
    b->number = s->submitted++;
    b->stamp = p->inputTimeStamp;
    b->qp = session_qp(s);
    b->checksum = checksum(r);
    m->pictures++;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncEncodePicture, (void *encoder, NV_ENC_PIC_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_PIC_PARAMS_VER);
    if (!(p->encodePicFlags & NV_ENC_PIC_FLAG_EOS))
        return submit(s, encoder, p);
    NEED(s, !p->inputBuffer && !p->outputBitstream, NV_ENC_ERR_INVALID_PARAM, "EOS comes alone");
    return NV_ENC_SUCCESS;
}

/* Encodes the picture of `b` on the engine of its session; the lock is given up meanwhile. */
static NVENCSTATUS finish_picture(struct session *s, struct bitstream *b)
{
    struct mapping *m = find(b->mapping, MAPPING);
    NEED(s, m, NV_ENC_ERR_GENERIC, "the input is gone");
    NV_ENC_REGISTER_RESOURCE r = ((struct resource *)find(m->resource, RESOURCE))->params;
    enum parts parts = s->config.encodeCodecConfig.hevcConfig.repeatSPSPPS ? WITH_HEADERS : PICTURE_ONLY;
    if (!s->config.encodeCodecConfig.hevcConfig.disableSPSPPS && b->number == 0)
        parts = WITH_HEADERS;
    uint32_t capacity = 2 * frame_bytes(&r) + HEADER_BYTES;
    uint8_t *bytes = malloc(capacity);
    int engine = s->engine % settings[ENGINES], slow = settings[SLOW_US];
    b->state = ENCODING;
    unlock_state();
    pthread_mutex_lock(&engine_locks[engine]);
    if (slow)
        usleep(slow);
    int changed = checksum(&r) != b->checksum;
    int size = encode(s, b, r.resourceToRegister, r.pitch, r.bufferFormat, parts, bytes, capacity);
    engine_pictures[engine]++;
    pthread_mutex_unlock(&engine_locks[engine]);
    lock_state();
    if (changed)
        violation("an input changed before its picture was locked");
    b->bytes = bytes;
    b->size = size;
    if ((m = find(b->mapping, MAPPING)))
        m->pictures--;
    free(b->map);
    b->map = NULL;
    b->map_size = 0;
    s->collected++;
    b->state = LOCKED;
    NEED(s, size > 0, NV_ENC_ERR_GENERIC, "the encoder of the test failed");
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncLockBitstream, (void *encoder, NV_ENC_LOCK_BITSTREAM *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_LOCK_BITSTREAM_VER);
    NEED_ZERO(s, p->reserved1);
    struct bitstream *b = owned(encoder, p->outputBitstream, BITSTREAM);
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "no bitstream buffer");
    NEED(s, b->state == SUBMITTED, NV_ENC_ERR_INVALID_CALL, "no picture waits in the bitstream buffer");
    if (b->number != s->collected)
        violation("pictures were not locked in the order of submission");
    if (p->doNotWait && settings[SLOW_US])
        return NV_ENC_ERR_LOCK_BUSY;
    NVENCSTATUS status = finish_picture(s, b);
    p->bitstreamBufferPtr = b->bytes;
    p->bitstreamSizeInBytes = b->size;
    p->outputTimeStamp = b->stamp;
    p->pictureType = NV_ENC_PIC_TYPE_IDR;
    p->pictureStruct = NV_ENC_PIC_STRUCT_FRAME;
    return status;
}

ENTRY(nvEncUnlockBitstream, (void *encoder, void *bitstream), (encoder, bitstream))
{
    USE_SESSION(s);
    struct bitstream *b = owned(encoder, bitstream, BITSTREAM);
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "no bitstream buffer");
    NEED(s, b->state == LOCKED, NV_ENC_ERR_INVALID_CALL, "the bitstream buffer is not locked");
    memset(b->bytes, 0xEE, b->size); /* the pointer is good until now */
    free(b->bytes);
    b->bytes = NULL;
    b->state = EMPTY;
    return NV_ENC_SUCCESS;
}

