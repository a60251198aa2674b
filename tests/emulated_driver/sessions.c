/* The emulated driver's libnvidia-encode in one API version, first half: sessions and their configuration. HEVC,
 * intra pictures, host memory. It follows the rules of the public documentation to the letter: every version
 * word, reserved bit, handle, state and order is checked. */
#include "nvenc.h"

extern int sessions_opened; /* so far, of every API version */

static int bit_depth(const NV_ENC_CONFIG_HEVC *hevc)
{
#if API_CODE >= API_12_2
    return hevc->inputBitDepth == hevc->outputBitDepth ? (int)hevc->outputBitDepth : 0;
#else
    return 8 + (int)hevc->pixelBitDepthMinus8;
#endif
}

static uint32_t input_format(const NV_ENC_CONFIG_HEVC *hevc)
{
    int ten = bit_depth(hevc) == 10;
    if (hevc->chromaFormatIDC == 3)
        return ten ? NV_ENC_BUFFER_FORMAT_YUV444_10BIT : NV_ENC_BUFFER_FORMAT_YUV444;
    return ten ? NV_ENC_BUFFER_FORMAT_YUV420_10BIT : NV_ENC_BUFFER_FORMAT_NV12;
}

ENTRY(nvEncOpenEncodeSessionEx, (NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS * p, void **encoder), (p, encoder))
{
    *encoder = NULL;
    if (p->version != NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS_VER || p->apiVersion != NVENCAPI_VERSION)
        return NV_ENC_ERR_INVALID_VERSION;
    if (p->deviceType != NV_ENC_DEVICE_TYPE_CUDA || !p->device || p->device != current_context())
        return NV_ENC_ERR_INVALID_DEVICE;
    if (!unreserved(p, NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS_reserved))
        return NV_ENC_ERR_INVALID_PARAM;
    struct session *s = calloc(1, sizeof *s);
    s->context = p->device;
    s->api = NVENCAPI_VERSION;
    *encoder = new_handle(SESSION, s);
    if (count(SESSION) > settings[SESSION_LIMIT]) {
        s->failed = 1; /* only good for being destroyed */
        return NV_ENC_ERR_OUT_OF_MEMORY;
    }
    s->engine = sessions_opened++;
    return NV_ENC_SUCCESS;
}

static const char *nvEncGetLastErrorString_entry(void *encoder)
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
    NEED_STRUCT(s, p, NV_ENC_CAPS_PARAM);
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
    case NV_ENC_CAPS_SUPPORT_DYN_RES_CHANGE: *value = settings[RESIZE]; break;
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
    NEED_STRUCT(s, p, NV_ENC_PRESET_CONFIG);
    NEED(s, p->presetCfg.version == NV_ENC_CONFIG_VER, NV_ENC_ERR_INVALID_VERSION, "version word of presetCfg");
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
    NV_ENC_CONFIG_HEVC *hevc = &config->encodeCodecConfig.hevcConfig;
    hevc->idrPeriod = 250;
    hevc->chromaFormatIDC = 1;
#if API_CODE >= API_12_2
    hevc->inputBitDepth = hevc->outputBitDepth = NV_ENC_BIT_DEPTH_8;
#endif
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
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS check_config(struct session *s, const NV_ENC_INITIALIZE_PARAMS *p)
{
    const NV_ENC_CONFIG *c = p->encodeConfig;
    NEED_STRUCT(s, c, NV_ENC_CONFIG);
    const NV_ENC_CONFIG_HEVC *hevc = &c->encodeCodecConfig.hevcConfig;
    int lossless = p->tuningInfo == NV_ENC_TUNING_INFO_LOSSLESS, depth = bit_depth(hevc);
    NEED(s, c->gopLength == 1 && hevc->idrPeriod == 1, NV_ENC_ERR_UNSUPPORTED_PARAM, "only intra pictures here");
    NEED(s, !lossless || settings[LOSSLESS], NV_ENC_ERR_UNSUPPORTED_PARAM, "no lossless coding");
    NEED(s, depth == 8 || (depth == 10 && settings[TEN_BIT]), NV_ENC_ERR_UNSUPPORTED_PARAM, "bit depth");
    const GUID *profile = &NV_ENC_HEVC_PROFILE_FREXT_GUID;
    if (hevc->chromaFormatIDC == 1)
        profile = depth == 10 ? &NV_ENC_HEVC_PROFILE_MAIN10_GUID : &NV_ENC_HEVC_PROFILE_MAIN_GUID;
    else
        NEED(s, hevc->chromaFormatIDC == 3 && settings[YUV444], NV_ENC_ERR_UNSUPPORTED_PARAM, "chroma format");
    NEED(s, same(&c->profileGUID, profile), NV_ENC_ERR_INVALID_PARAM, "the profile does not hold the format");
    return check_rate(s, &c->rcParams, lossless);
}

static NVENCSTATUS check_size(struct session *s, const NV_ENC_INITIALIZE_PARAMS *p)
{
    uint32_t width = p->encodeWidth, height = p->encodeHeight;
    uint32_t most[] = {p->maxEncodeWidth ? p->maxEncodeWidth : width, p->maxEncodeHeight ? p->maxEncodeHeight : height};
    NEED(s, (int)width >= settings[WIDTH_MIN] && (int)height >= settings[HEIGHT_MIN], NV_ENC_ERR_INVALID_PARAM,
         "the frame is too small");
    NEED(s, width <= most[0] && height <= most[1] && (int)most[0] <= settings[WIDTH_MAX] &&
                (int)most[1] <= settings[HEIGHT_MAX],
         NV_ENC_ERR_INVALID_PARAM, "the frame is too large");
    NEED(s, width % 2 == 0 && height % 2 == 0, NV_ENC_ERR_INVALID_PARAM, "odd frame size");
    NEED(s, p->darWidth == width && p->darHeight == height, NV_ENC_ERR_INVALID_PARAM, "display aspect ratio");
    return NV_ENC_SUCCESS;
}

/* Takes over parameters that were checked. */
static void set_up(struct session *s, const NV_ENC_INITIALIZE_PARAMS *p)
{
    struct setup *setup = s->setup;
    NV_ENC_CONFIG config = *(const NV_ENC_CONFIG *)p->encodeConfig; /* which may be the one that is held */
    const NV_ENC_CONFIG_HEVC *hevc = &config.encodeCodecConfig.hevcConfig;
    setup->params = *p;
    setup->config = config;
    setup->params.encodeConfig = &setup->config;
    s->width = p->encodeWidth, s->height = p->encodeHeight;
    s->format = input_format(hevc);
    s->qp = p->tuningInfo == NV_ENC_TUNING_INFO_LOSSLESS ? -1 : (int)config.rcParams.constQP.qpIntra;
    s->mapped = config.rcParams.qpMapMode == NV_ENC_QP_MAP_DELTA;
    s->reorders = config.frameIntervalP > 1 || config.rcParams.enableLookahead;
    s->headers = hevc->repeatSPSPPS ? EVERY_PICTURE : hevc->disableSPSPPS ? NEVER : FIRST_PICTURE;
    s->vidmem = p->enableOutputInVidmem;
}

ENTRY(nvEncInitializeEncoder, (void *encoder, NV_ENC_INITIALIZE_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_STRUCT(s, p, NV_ENC_INITIALIZE_PARAMS);
    NEED(s, !s->initialized, NV_ENC_ERR_INVALID_CALL, "initialized twice");
    NEED(s, same(&p->encodeGUID, &NV_ENC_CODEC_HEVC_GUID) && is_preset(&p->presetGUID),
         NV_ENC_ERR_INVALID_PARAM, "codec or preset");
    NEED(s, p->enablePTD && !p->enableEncodeAsync, NV_ENC_ERR_UNSUPPORTED_PARAM, "enablePTD or enableEncodeAsync");
    NEED(s, p->frameRateNum && p->frameRateDen, NV_ENC_ERR_INVALID_PARAM, "no frame rate");
    NEED(s, !p->privDataSize && !p->privData, NV_ENC_ERR_INVALID_PARAM, "private data");
    NEED(s, !p->enableOutputInVidmem || settings[VIDMEM], NV_ENC_ERR_UNSUPPORTED_PARAM,
         "no bitstreams in device memory");
#if API_CODE >= API_12_1
    NEED(s, !p->enableOutputInVidmem || p->splitEncodeMode == NV_ENC_SPLIT_DISABLE_MODE, NV_ENC_ERR_INVALID_PARAM,
         "split frames do not go to device memory");
#endif
    NVENCSTATUS status = check_size(s, p);
    if (!status)
        status = check_config(s, p);
    if (status)
        return status;
    s->setup = calloc(1, sizeof(struct setup));
    set_up(s, p);
    s->initialized = 1;
    return NV_ENC_SUCCESS;
}

static NVENCSTATUS check_unchanged(struct session *s, const NV_ENC_INITIALIZE_PARAMS *changed)
{
    const struct setup *setup = s->setup;
    const NV_ENC_INITIALIZE_PARAMS *now = &setup->params;
    const NV_ENC_CONFIG *config = changed->encodeConfig;
    NEED(s, same(&changed->encodeGUID, &now->encodeGUID) && same(&changed->presetGUID, &now->presetGUID) &&
                changed->tuningInfo == now->tuningInfo && changed->maxEncodeWidth == now->maxEncodeWidth &&
                changed->maxEncodeHeight == now->maxEncodeHeight && changed->enablePTD == now->enablePTD &&
                changed->enableEncodeAsync == now->enableEncodeAsync &&
                changed->enableOutputInVidmem == now->enableOutputInVidmem,
         NV_ENC_ERR_INVALID_PARAM, "this cannot be changed without a new session");
    NEED(s, config->gopLength == setup->config.gopLength &&
                config->frameIntervalP == setup->config.frameIntervalP &&
                config->rcParams.rateControlMode == setup->config.rcParams.rateControlMode &&
                !memcmp(&config->encodeCodecConfig, &setup->config.encodeCodecConfig,
                        sizeof config->encodeCodecConfig),
         NV_ENC_ERR_INVALID_PARAM, "picture structure and format cannot be changed without a new session");
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncReconfigureEncoder, (void *encoder, NV_ENC_RECONFIGURE_PARAMS *p), (encoder, p))
{
    USE_SESSION(s);
    NEED_INITIALIZED(s);
    NEED_STRUCT(s, p, NV_ENC_RECONFIGURE_PARAMS);
    NV_ENC_INITIALIZE_PARAMS *changed = &p->reInitEncodeParams;
    NEED(s, changed->version == NV_ENC_INITIALIZE_PARAMS_VER, NV_ENC_ERR_INVALID_VERSION, "version word inside");
    if (!changed->encodeConfig)
        changed->encodeConfig = &((struct setup *)s->setup)->config;
    NVENCSTATUS status = check_size(s, changed);
    if (!status)
        status = check_config(s, changed);
    if (!status)
        status = check_unchanged(s, changed);
    if (status)
        return status;
    if (changed->encodeWidth != s->width || changed->encodeHeight != s->height) {
        NEED(s, changed->maxEncodeWidth && changed->maxEncodeHeight && settings[RESIZE], NV_ENC_ERR_UNSUPPORTED_PARAM,
             "the frame size cannot change");
        NEED(s, p->forceIDR, NV_ENC_ERR_INVALID_PARAM, "a new frame size starts with an IDR picture");
        if (s->submitted != s->collected)
            violation("the frame size was changed while pictures were in flight");
    }
    set_up(s, changed);
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
    NEED_STRUCT(s, p, NV_ENC_SEQUENCE_PARAM_PAYLOAD);
    NEED(s, p->spsppsBuffer && p->outSPSPPSPayloadSize, NV_ENC_ERR_INVALID_PTR, "no room for the headers");
    uint8_t headers[HEADER_BYTES] = {0};
    uint32_t size = write_headers(s, headers, sizeof headers);
    NEED(s, size <= p->inBufferSize, NV_ENC_ERR_NOT_ENOUGH_BUFFER, "the headers are longer");
    memcpy(p->spsppsBuffer, headers, size);
    *(uint32_t *)p->outSPSPPSPayloadSize = size;
    return NV_ENC_SUCCESS;
}

ENTRY(nvEncDestroyEncoder, (void *encoder), (encoder))
{
    struct session *s = find(encoder, SESSION);
    if (!s)
        return NV_ENC_ERR_INVALID_ENCODERDEVICE;
    if (current_context() != s->context)
        return refuse(s, NV_ENC_ERR_INVALID_DEVICE, "the context of the session is not current");
    give_back_all(encoder);
    drop(encoder, SESSION);
    free(s->setup);
    free(s);
    return NV_ENC_SUCCESS;
}
