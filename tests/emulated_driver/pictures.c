/* The emulated driver's libnvidia-encode in one API version, second half: inputs, pictures and bitstreams; and the
 * list of its functions. */
#include "nvenc.h"

static int is_10bit(uint32_t format)
{
    return format == NV_ENC_BUFFER_FORMAT_YUV420_10BIT || format == NV_ENC_BUFFER_FORMAT_YUV444_10BIT;
}

static uint64_t frame_bytes(const NV_ENC_REGISTER_RESOURCE *r)
{
    int full = r->bufferFormat == NV_ENC_BUFFER_FORMAT_YUV444 || r->bufferFormat == NV_ENC_BUFFER_FORMAT_YUV444_10BIT;
    return (uint64_t)r->pitch * (full ? r->height * 3 : r->height * 3 / 2);
}

static NVENCSTATUS check_input(struct session *s, const NV_ENC_REGISTER_RESOURCE *p)
{
    NEED(s, (uint32_t)p->bufferFormat == s->format, NV_ENC_ERR_INVALID_PARAM, "not the format of the session");
    NEED(s, p->width == s->width && p->height == s->height, NV_ENC_ERR_INVALID_PARAM, "size");
    NEED(s, p->pitch % 4 == 0 && p->pitch >= p->width * (is_10bit(p->bufferFormat) ? 2u : 1u),
         NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "pitch");
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS check_output(struct session *s, const NV_ENC_REGISTER_RESOURCE *p)
{
    NEED(s, s->vidmem, NV_ENC_ERR_UNSUPPORTED_PARAM, "bitstreams go to host memory");
    NEED(s, p->bufferFormat == NV_ENC_BUFFER_FORMAT_U8 && p->height == 1 && p->pitch == p->width,
         NV_ENC_ERR_INVALID_PARAM, "an output is one row of bytes");
    NEED(s, p->width > OUT_PARAMS_BYTES, NV_ENC_ERR_INVALID_PARAM, "no room behind the output parameters");
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncRegisterResource, (void *encoder, NV_ENC_REGISTER_RESOURCE *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_STRUCT(s, p, NV_ENC_REGISTER_RESOURCE);
    NEED(s, p->resourceType == NV_ENC_INPUT_RESOURCE_TYPE_CUDADEVICEPTR, NV_ENC_ERR_UNSUPPORTED_PARAM, "only CUDA memory");
    NEED(s, p->bufferUsage == NV_ENC_INPUT_IMAGE || p->bufferUsage == NV_ENC_OUTPUT_BITSTREAM,
         NV_ENC_ERR_UNSUPPORTED_PARAM, "only images and bitstreams");
    int output = p->bufferUsage == NV_ENC_OUTPUT_BITSTREAM;
    NVENCSTATUS status = output ? check_output(s, p) : check_input(s, p);
    if (status)
        return status;
    uint64_t address = (uintptr_t)p->resourceToRegister, size = output ? p->width : frame_bytes(p);
    NEED(s, is_memory(address, size), NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "not memory of cuMemAlloc");
    NEED(s, !registered_in(encoder, address, size), NV_ENC_ERR_RESOURCE_REGISTER_FAILED, "registered twice");
    struct resource *r = malloc(sizeof *r);
    *r = (struct resource){encoder, address, size, p->width, p->height, p->pitch, p->bufferFormat, output, NULL};
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
    NEED_STRUCT(s, p, NV_ENC_MAP_INPUT_RESOURCE);
    struct resource *r = owned(encoder, p->registeredResource, RESOURCE);
    NEED(s, r, NV_ENC_ERR_RESOURCE_NOT_REGISTERED, "not a registered resource");
    NEED(s, !r->mapping, NV_ENC_ERR_MAP_FAILED, "mapped already");
    struct mapping *m = calloc(1, sizeof *m);
    *m = (struct mapping){encoder, p->registeredResource, 0, r->output ? calloc(1, sizeof *m->output) : NULL};
    p->mappedResource = r->mapping = new_handle(MAPPING, m);
    p->mappedBufferFmt = r->format;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncUnmapInputResource, (void *encoder, void *mapped), (encoder, mapped))
{
    USE_SESSION(s);
    struct mapping *m = owned(encoder, mapped, MAPPING);
    NEED(s, m, NV_ENC_ERR_RESOURCE_NOT_MAPPED, "not a mapped resource");
    if (m->pictures && !s->faulty)
        violation("an input was unmapped before its picture was collected");
    if (m->output) {
        NEED(s, m->output->state != ENCODING, NV_ENC_ERR_INVALID_CALL, "the output is being unmapped");
        if (!finish_output(s, mapped))
            return refuse(s, NV_ENC_ERR_GENERIC, "the encoder of the test failed");
    }
    free_mapping(mapped);
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncCreateBitstreamBuffer, (void *encoder, NV_ENC_CREATE_BITSTREAM_BUFFER *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_STRUCT(s, p, NV_ENC_CREATE_BITSTREAM_BUFFER);
    NEED(s, !s->vidmem, NV_ENC_ERR_INVALID_CALL, "bitstreams go to device memory");
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
    free_bitstream(drop(bitstream, BITSTREAM));
    return NV_ENC_SUCCESS;
}

/* Where the bytes of a picture go: a bitstream buffer, or a mapped output in device memory. */
static struct bitstream *target(struct session *s, void *encoder, void *handle)
{
    if (!s->vidmem)
        return owned(encoder, handle, BITSTREAM);
    struct mapping *m = owned(encoder, handle, MAPPING);
    if (!m || !m->output)
        return NULL;
    struct resource *r = find(m->resource, RESOURCE);
    memset((void *)r->address, 0xEE, r->size); /* undefined until it is unmapped */
    return m->output;
}

static NVENCSTATUS submit(struct session *s, void *encoder, NV_ENC_PIC_PARAMS *p)
{
    struct mapping *m = owned(encoder, p->inputBuffer, MAPPING);
    NEED(s, m && !m->output, NV_ENC_ERR_RESOURCE_NOT_MAPPED, "the input is not mapped");
    struct bitstream *b = target(s, encoder, p->outputBitstream);
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "no bitstream buffer");
    NEED(s, b->state == EMPTY, NV_ENC_ERR_INVALID_PARAM, "the bitstream buffer is in use");
    const struct resource *r = find(m->resource, RESOURCE);
    NEED(s, r->width == s->width && r->height == s->height, NV_ENC_ERR_INVALID_PARAM, "registered in another size");
    NEED(s, p->inputWidth == r->width && p->inputHeight == r->height && p->inputPitch == r->pitch &&
                (uint32_t)p->bufferFmt == r->format, NV_ENC_ERR_INVALID_PARAM, "the input is registered otherwise");
    NEED(s, p->pictureStruct == NV_ENC_PIC_STRUCT_FRAME, NV_ENC_ERR_INVALID_PARAM, "pictureStruct");
    NEED(s, !p->completionEvent, NV_ENC_ERR_INVALID_PARAM, "events are for asynchronous sessions");
    check_streams(s);
    if (s->reorders)
        return NV_ENC_ERR_NEED_MORE_INPUT;
    uint32_t blocks = ((r->width + 31) / 32) * ((r->height + 31) / 32);
    NEED(s, !p->qpDeltaMap || (s->mapped && p->qpDeltaMapSize == blocks), NV_ENC_ERR_INVALID_PARAM, "QP map");
    start_picture(s, b, p->inputBuffer, p->inputTimeStamp, p->qpDeltaMap, blocks);
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncEncodePicture, (void *encoder, NV_ENC_PIC_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_STRUCT(s, p, NV_ENC_PIC_PARAMS);
    if (!(p->encodePicFlags & NV_ENC_PIC_FLAG_EOS))
        return submit(s, encoder, p);
    NEED(s, !p->inputBuffer && !p->outputBitstream, NV_ENC_ERR_INVALID_PARAM, "EOS comes alone");
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncLockBitstream, (void *encoder, NV_ENC_LOCK_BITSTREAM *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_STRUCT(s, p, NV_ENC_LOCK_BITSTREAM);
    struct bitstream *b = owned(encoder, p->outputBitstream, BITSTREAM);
    NEED(s, b, NV_ENC_ERR_INVALID_PARAM, "no bitstream buffer");
    NEED(s, b->state == SUBMITTED, NV_ENC_ERR_INVALID_CALL, "no picture waits in the bitstream buffer");
    if (p->doNotWait && settings[SLOW_US])
        return NV_ENC_ERR_LOCK_BUSY;
    NEED(s, finish_picture(s, b), NV_ENC_ERR_GENERIC, "the encoder of the test failed");
    p->bitstreamBufferPtr = b->bytes;
    p->bitstreamSizeInBytes = b->size;
    p->outputTimeStamp = b->stamp;
    p->pictureType = NV_ENC_PIC_TYPE_IDR;
    p->pictureStruct = NV_ENC_PIC_STRUCT_FRAME;
    return NV_ENC_SUCCESS;
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

#define SLOT(name) memcpy(&list->name, &(void *){(void *)name##_entry}, sizeof(void *))

int CREATE_INSTANCE(NV_ENCODE_API_FUNCTION_LIST *list)
{
    if (list->version != NV_ENCODE_API_FUNCTION_LIST_VER)
        return NV_ENC_ERR_INVALID_VERSION;
    SLOT(nvEncOpenEncodeSessionEx);
    SLOT(nvEncGetLastErrorString);
    SLOT(nvEncGetEncodeGUIDCount);
    SLOT(nvEncGetEncodeGUIDs);
    SLOT(nvEncGetEncodeCaps);
    SLOT(nvEncGetEncodePresetConfigEx);
    SLOT(nvEncInitializeEncoder);
    SLOT(nvEncReconfigureEncoder);
    SLOT(nvEncSetIOCudaStreams);
    SLOT(nvEncGetSequenceParams);
    SLOT(nvEncRegisterResource);
    SLOT(nvEncUnregisterResource);
    SLOT(nvEncMapInputResource);
    SLOT(nvEncUnmapInputResource);
    SLOT(nvEncCreateBitstreamBuffer);
    SLOT(nvEncDestroyBitstreamBuffer);
    SLOT(nvEncEncodePicture);
    SLOT(nvEncLockBitstream);
    SLOT(nvEncUnlockBitstream);
    SLOT(nvEncDestroyEncoder);
    return NV_ENC_SUCCESS;
}
