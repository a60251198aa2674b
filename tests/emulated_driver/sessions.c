/* The emulated driver's libnvidia-encode, first half: sessions and their configuration. HEVC, intra pictures,
 * host memory. It follows the rules of the public documentation to the letter: every version word, handle,
 * state and order is checked. */
#include "nvenc.h"

#include <stdio.h>
#include <stdlib.h>

static int opened; /* sessions so far */

NVENCSTATUS refuse(struct session *session, NVENCSTATUS status, const char *why)
{
    snprintf(session->message, sizeof session->message, "%s", why);
    return status;
}

void note_fault(const void *encoder, const char *call, int status)
{
    struct session *s = find(encoder, SESSION);
    int busy = (status == NV_ENC_ERR_LOCK_BUSY && !strcmp(call, "nvEncLockBitstream")) ||
               (status == NV_ENC_ERR_ENCODER_BUSY && !strcmp(call, "nvEncEncodePicture"));
    if (s) {
        s->faulty |= !busy;
        refuse(s, (NVENCSTATUS)status, "fault on order");
    }
}

int zero(const void *bytes, size_t size)
{
    for (const uint8_t *at = bytes; size--; at++)
        if (*at)
            return 0;
    return 1;
}

static int same(const GUID *a, const GUID *b) { return !memcmp(a, b, sizeof *a); }

int is_444(uint32_t format)
{
    return format == NV_ENC_BUFFER_FORMAT_YUV444 || format == NV_ENC_BUFFER_FORMAT_YUV444_10BIT;
}

int is_10bit(uint32_t format)
{
    return format == NV_ENC_BUFFER_FORMAT_YUV420_10BIT || format == NV_ENC_BUFFER_FORMAT_YUV444_10BIT;
}

int session_qp(const struct session *s)
{
    return s->params.tuningInfo == NV_ENC_TUNING_INFO_LOSSLESS ? -1 : (int)s->config.rcParams.constQP.qpIntra;
}

uint32_t session_format(const struct session *s)
{
    const NV_ENC_CONFIG_HEVC *hevc = &s->config.encodeCodecConfig.hevcConfig;
    if (hevc->chromaFormatIDC == 3)
        return hevc->pixelBitDepthMinus8 ? NV_ENC_BUFFER_FORMAT_YUV444_10BIT : NV_ENC_BUFFER_FORMAT_YUV444;
    return hevc->pixelBitDepthMinus8 ? NV_ENC_BUFFER_FORMAT_YUV420_10BIT : NV_ENC_BUFFER_FORMAT_NV12;
}

ENTRY(nvEncOpenEncodeSessionEx, (NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS * p, void **encoder), (p, encoder))
{
    *encoder = NULL;
    if (p->version != NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS_VER || p->apiVersion != NVENCAPI_VERSION)
        return NV_ENC_ERR_INVALID_VERSION;
    if (p->deviceType != NV_ENC_DEVICE_TYPE_CUDA || !p->device || p->device != current_context())
        return NV_ENC_ERR_INVALID_DEVICE;
    if (!zero(p->reserved1, sizeof p->reserved1) || p->reserved || !zero(p->reserved2, sizeof p->reserved2))
        return NV_ENC_ERR_INVALID_PARAM;
    struct session *s = calloc(1, sizeof *s);
    s->context = p->device;
    *encoder = new_handle(SESSION, s);
    if (count(SESSION) > settings[SESSION_LIMIT]) {
        s->failed = 1; /* only good for being destroyed */
        return NV_ENC_ERR_OUT_OF_MEMORY;
    }
    s->engine = opened++;
    return NV_ENC_SUCCESS;
}

static const char *nvEncGetLastErrorString(void *encoder)
{
    static _Thread_local char text[sizeof((struct session *)0)->message];
    lock_state();
    struct session *s = find(encoder, SESSION);
    snprintf(text, sizeof text, "%s", s ? s->message : "");
    unlock_state();
    return text;
}

ENTRY(nvEncGetEncodeGUIDCount, (void *encoder, uint32_t *count), (encoder, count))
{
    USE_SESSION(s);
    *count = settings[HEVC] ? 2 : 1;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncGetEncodeGUIDs, (void *encoder, GUID *guids, uint32_t size, uint32_t *count), (encoder, guids, size, count))
{
    static const GUID other = {0x6bc82762, 0x4e63, 0x4ca4, {0xaa, 0x85, 0x1e, 0x50, 0xf3, 0x21, 0xf6, 0xbf}};
    USE_SESSION(s);
    *count = 0;
    if (size)
        guids[(*count)++] = other;
    if (size > 1 && settings[HEVC])
        guids[(*count)++] = NV_ENC_CODEC_HEVC_GUID;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncGetEncodeCaps, (void *encoder, GUID codec, NV_ENC_CAPS_PARAM *p, int *value), (encoder, codec, p, value))
{
    USE_SESSION(s);
    NEED_VERSION(s, p, NV_ENC_CAPS_PARAM_VER);
    NEED_ZERO(s, p->reserved);
    NEED(s, same(&codec, &NV_ENC_CODEC_HEVC_GUID) && settings[HEVC], NV_ENC_ERR_INVALID_PARAM, "no such codec");
    NEED(s, (uint32_t)p->capsToQuery < NV_ENC_CAPS_EXPOSED_COUNT, NV_ENC_ERR_INVALID_PARAM, "unknown capability");
    switch ((int)p->capsToQuery) {
    case NV_ENC_CAPS_WIDTH_MIN: *value = settings[WIDTH_MIN]; break;
    case NV_ENC_CAPS_HEIGHT_MIN: *value = settings[HEIGHT_MIN]; break;
    case NV_ENC_CAPS_WIDTH_MAX: *value = settings[WIDTH_MAX]; break;
    case NV_ENC_CAPS_HEIGHT_MAX: *value = settings[HEIGHT_MAX]; break;
    case NV_ENC_CAPS_MB_NUM_MAX: *value = 262144; break;
    case NV_ENC_CAPS_SUPPORT_YUV444_ENCODE: *value = settings[YUV444]; break;
    case NV_ENC_CAPS_SUPPORT_10BIT_ENCODE: *value = settings[TEN_BIT]; break;
    case NV_ENC_CAPS_SUPPORT_LOSSLESS_ENCODE: *value = settings[LOSSLESS]; break;
    case NV_ENC_CAPS_NUM_ENCODER_ENGINES: *value = settings[ENGINES]; break;
    default: *value = 0;
    }
    return NV_ENC_SUCCESS;
}

static int is_preset(const GUID *preset)
{
    return same(preset, &NV_ENC_PRESET_P1_GUID) || same(preset, &NV_ENC_PRESET_P7_GUID);
}

/* The defaults hold what real presets hold and an all-intra client must not leave in: B pictures, lookahead. */
ENTRY(nvEncGetEncodePresetConfigEx,
      (void *encoder, GUID codec, GUID preset, uint32_t tuning, NV_ENC_PRESET_CONFIG *p),
      (encoder, codec, preset, tuning, p))
{
    USE_SESSION(s);
    NEED_VERSION(s, p, NV_ENC_PRESET_CONFIG_VER);
    NEED(s, p->presetCfg.version == NV_ENC_CONFIG_VER, NV_ENC_ERR_INVALID_VERSION, "version word of presetCfg");
    NEED_ZERO(s, p->reserved1);
    NEED_ZERO(s, p->reserved2);
    NEED(s, same(&codec, &NV_ENC_CODEC_HEVC_GUID) && is_preset(&preset), NV_ENC_ERR_UNSUPPORTED_PARAM, "no such preset");
    NEED(s, tuning >= NV_ENC_TUNING_INFO_HIGH_QUALITY && tuning <= NV_ENC_TUNING_INFO_LOSSLESS,
         NV_ENC_ERR_INVALID_PARAM, "no such tuning");
    NV_ENC_CONFIG *config = &p->presetCfg;
    memset((char *)config + sizeof config->version, 0, sizeof *config - sizeof config->version);
    config->gopLength = 250;
    config->frameIntervalP = 3;
    config->rcParams.version = NV_ENC_RC_PARAMS_VER;
    config->rcParams.enableLookahead = 1;
    config->rcParams.lookaheadDepth = 8;
    if (tuning != NV_ENC_TUNING_INFO_LOSSLESS) {
        config->rcParams.rateControlMode = NV_ENC_PARAMS_RC_VBR;
        config->rcParams.averageBitRate = config->rcParams.maxBitRate = 10000000;
        config->rcParams.multiPass = NV_ENC_TWO_PASS_QUARTER_RESOLUTION;
        config->rcParams.enableAQ = 1;
        config->rcParams.constQP = (NV_ENC_QP){28, 31, 25};
    }
    config->encodeCodecConfig.hevcConfig.idrPeriod = 250;
    config->encodeCodecConfig.hevcConfig.chromaFormatIDC = 1;
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS check_rate(struct session *s, const NV_ENC_RC_PARAMS *rate, int lossless)
{
    uint32_t qps[] = {rate->constQP.qpInterP, rate->constQP.qpInterB, rate->constQP.qpIntra};
    NEED(s, rate->version == NV_ENC_RC_PARAMS_VER, NV_ENC_ERR_INVALID_VERSION, "version word of rcParams");
    NEED(s, rate->rateControlMode == NV_ENC_PARAMS_RC_CONSTQP, NV_ENC_ERR_UNSUPPORTED_PARAM, "only CONSTQP here");
    for (int i = 0; i < 3; i++)
        NEED(s, qps[i] <= (lossless ? 0 : 51), NV_ENC_ERR_INVALID_PARAM, "QP is out of range");
    NEED(s, !rate->enableAQ && !rate->enableTemporalAQ && !rate->multiPass && !rate->averageBitRate &&
                !rate->maxBitRate && !rate->vbvBufferSize, NV_ENC_ERR_INVALID_PARAM, "rate control beside CONSTQP");
    NEED(s, rate->qpMapMode == NV_ENC_QP_MAP_DISABLED || rate->qpMapMode == NV_ENC_QP_MAP_DELTA,
         NV_ENC_ERR_UNSUPPORTED_PARAM, "no such QP map");
    NEED_ZERO(s, rate->reserved);
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS check_config(struct session *s, const NV_ENC_INITIALIZE_PARAMS *p)
{
    const NV_ENC_CONFIG *c = p->encodeConfig;
    NEED(s, c, NV_ENC_ERR_INVALID_PTR, "encodeConfig is NULL");
    const NV_ENC_CONFIG_HEVC *hevc = &c->encodeCodecConfig.hevcConfig;
    int lossless = p->tuningInfo == NV_ENC_TUNING_INFO_LOSSLESS;
    NEED(s, c->version == NV_ENC_CONFIG_VER, NV_ENC_ERR_INVALID_VERSION, "version word of encodeConfig");
    NEED(s, c->gopLength == 1 && hevc->idrPeriod == 1, NV_ENC_ERR_UNSUPPORTED_PARAM, "only intra pictures here");
    NEED(s, !lossless || settings[LOSSLESS], NV_ENC_ERR_UNSUPPORTED_PARAM, "no lossless coding");
    const GUID *profile = &NV_ENC_HEVC_PROFILE_FREXT_GUID;
    if (hevc->chromaFormatIDC == 1)
        profile = hevc->pixelBitDepthMinus8 ? &NV_ENC_HEVC_PROFILE_MAIN10_GUID : &NV_ENC_HEVC_PROFILE_MAIN_GUID;
    else
        NEED(s, hevc->chromaFormatIDC == 3 && settings[YUV444], NV_ENC_ERR_UNSUPPORTED_PARAM, "chroma format");
    NEED(s, hevc->pixelBitDepthMinus8 == 0 || (hevc->pixelBitDepthMinus8 == 2 && settings[TEN_BIT]),
         NV_ENC_ERR_UNSUPPORTED_PARAM, "bit depth");
    NEED(s, same(&c->profileGUID, profile), NV_ENC_ERR_INVALID_PARAM, "the profile does not hold the format");
    NEED_ZERO(s, c->reserved);
    NEED_ZERO(s, hevc->reserved1);
    NEED(s, !hevc->reserved, NV_ENC_ERR_INVALID_PARAM, "reserved bits of hevcConfig");
    return check_rate(s, &c->rcParams, lossless);
}

ENTRY(nvEncInitializeEncoder, (void *encoder, NV_ENC_INITIALIZE_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_VERSION(s, p, NV_ENC_INITIALIZE_PARAMS_VER);
    NEED(s, !s->initialized, NV_ENC_ERR_INVALID_CALL, "initialized twice");
    NEED(s, same(&p->encodeGUID, &NV_ENC_CODEC_HEVC_GUID) && is_preset(&p->presetGUID),
         NV_ENC_ERR_INVALID_PARAM, "codec or preset");
    NEED(s, (int)p->encodeWidth >= settings[WIDTH_MIN] && (int)p->encodeWidth <= settings[WIDTH_MAX] &&
                (int)p->encodeHeight >= settings[HEIGHT_MIN] && (int)p->encodeHeight <= settings[HEIGHT_MAX],
         NV_ENC_ERR_INVALID_PARAM, "the frame size is out of range");
    NEED(s, p->encodeWidth % 2 == 0 && p->encodeHeight % 2 == 0, NV_ENC_ERR_INVALID_PARAM, "odd frame size");
    NEED(s, p->enablePTD && !p->enableEncodeAsync, NV_ENC_ERR_UNSUPPORTED_PARAM, "enablePTD or enableEncodeAsync");
    NEED(s, p->frameRateNum && p->frameRateDen, NV_ENC_ERR_INVALID_PARAM, "no frame rate");
    NEED(s, !p->reservedBitFields, NV_ENC_ERR_INVALID_PARAM, "reserved bits");
    NEED_ZERO(s, p->reserved);
    NEED_ZERO(s, p->reserved2);
    NVENCSTATUS status = check_config(s, p);
    if (status)
        return status;
    s->params = *p;
    s->config = *p->encodeConfig;
    s->params.encodeConfig = &s->config;
    s->initialized = 1;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncReconfigureEncoder, (void *encoder, NV_ENC_RECONFIGURE_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_RECONFIGURE_PARAMS_VER);
    NV_ENC_INITIALIZE_PARAMS *changed = &p->reInitEncodeParams;
    NEED(s, changed->version == NV_ENC_INITIALIZE_PARAMS_VER, NV_ENC_ERR_INVALID_VERSION, "version word inside");
    NEED(s, changed->tuningInfo == s->params.tuningInfo && changed->encodeWidth == s->params.encodeWidth &&
                changed->encodeHeight == s->params.encodeHeight &&
                changed->maxEncodeWidth == s->params.maxEncodeWidth &&
                changed->maxEncodeHeight == s->params.maxEncodeHeight && changed->enablePTD == s->params.enablePTD,
         NV_ENC_ERR_INVALID_PARAM, "this cannot be changed without a new session");
    NVENCSTATUS status = check_config(s, changed);
    if (status)
        return status;
    NEED(s, changed->encodeConfig->frameIntervalP == s->config.frameIntervalP &&
                !memcmp(&changed->encodeConfig->encodeCodecConfig, &s->config.encodeCodecConfig,
                        sizeof s->config.encodeCodecConfig),
         NV_ENC_ERR_INVALID_PARAM, "picture structure and format cannot be changed without a new session");
    s->config = *changed->encodeConfig;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncSetIOCudaStreams, (void *encoder, void *in, void *out), (encoder, in, out))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED(s, in && out, NV_ENC_ERR_INVALID_PTR, "the address of a stream is NULL");
    s->streams[0] = in, s->streams[1] = out;
    for (int i = 0; i < 2; i++) {
        s->stream_values[i] = *s->streams[i];
        NEED(s, find(s->stream_values[i], STREAM), NV_ENC_ERR_INVALID_PTR, "no stream at this address");
    }
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncGetSequenceParams, (void *encoder, NV_ENC_SEQUENCE_PARAM_PAYLOAD *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_VERSION(s, p, NV_ENC_SEQUENCE_PARAM_PAYLOAD_VER);
    NEED(s, p->spsppsBuffer && p->outSPSPPSPayloadSize, NV_ENC_ERR_INVALID_PTR, "no room for the headers");
    uint8_t headers[HEADER_BYTES] = {0};
    struct bitstream none = {.qp = session_qp(s)};
    uint32_t size = encode(s, &none, NULL, 0, session_format(s), HEADERS_ONLY, headers, sizeof headers);
    size += settings[HEADER_PADDING];
    NEED(s, size <= p->inBufferSize, NV_ENC_ERR_NOT_ENOUGH_BUFFER, "the headers are longer");
    memcpy(p->spsppsBuffer, headers, size);
    *p->outSPSPPSPayloadSize = size;
    return NV_ENC_SUCCESS;
}

/* What a session still has when it is destroyed is lost on a real driver; here it is freed and told. */
static void reclaim(void *handle, void *state, void *encoder)
{
    if (*(void **)state != encoder)
        return;
    if (!((struct session *)find(encoder, SESSION))->faulty)
        violation("a session was destroyed before all it had was given back");
    if (find(handle, BITSTREAM))
        free_bitstream(handle);
    else
        free(drop(handle, find(handle, MAPPING) ? MAPPING : RESOURCE));
}

ENTRY(nvEncDestroyEncoder, (void *encoder), (encoder))
{
    struct session *s = find(encoder, SESSION);
    if (!s)
        return NV_ENC_ERR_INVALID_ENCODERDEVICE;
    if (current_context() != s->context)
        return refuse(s, NV_ENC_ERR_INVALID_DEVICE, "the context of the session is not current");
    each(MAPPING, reclaim, encoder);
    each(RESOURCE, reclaim, encoder);
    each(BITSTREAM, reclaim, encoder);
    free(drop(encoder, SESSION));
    return NV_ENC_SUCCESS;
}

EXPORT NVENCSTATUS NvEncodeAPIGetMaxSupportedVersion(uint32_t *version)
{
    *version = settings[VERSION];
    return (NVENCSTATUS)leave(enter("NvEncodeAPIGetMaxSupportedVersion").status);
}

#define SLOT(name) memcpy(&list->name, &(void *){(void *)name}, sizeof(void *))

EXPORT NVENCSTATUS NvEncodeAPICreateInstance(NV_ENCODE_API_FUNCTION_LIST *list)
{
    NVENCSTATUS status = (NVENCSTATUS)leave(enter("NvEncodeAPICreateInstance").status);
    if (status)
        return status;
    if (!list)
        return NV_ENC_ERR_INVALID_PTR;
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
