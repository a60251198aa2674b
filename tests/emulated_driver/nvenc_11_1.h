/* The part of the NVENC interface, version 11.1 on 64-bit Linux, that the emulated driver uses: structures,
 * numbers and signatures written down from the public documentation of the layout. tests/test_emulated.py compares
 * every one of them with the public header. */
#pragma once
#include <stdint.h>

#define NVENCAPI_MAJOR_VERSION 11
#define NVENCAPI_MINOR_VERSION 1
#define NVENCAPI_VERSION (NVENCAPI_MAJOR_VERSION | NVENCAPI_MINOR_VERSION << 24)
#define NVENCAPI_STRUCT_VERSION(revision) ((uint32_t)NVENCAPI_VERSION | (revision) << 16 | 7u << 28)

typedef struct {
    uint32_t Data1;
    uint16_t Data2, Data3;
    uint8_t Data4[8];
} GUID;

static const GUID NV_ENC_CODEC_HEVC_GUID = {
    0x790cdc88, 0x4522, 0x4d7b, {0x94, 0x25, 0xbd, 0xa9, 0x97, 0x5f, 0x76, 0x03}};
static const GUID NV_ENC_HEVC_PROFILE_MAIN_GUID = {
    0xb514c39a, 0xb55b, 0x40fa, {0x87, 0x8f, 0xf1, 0x25, 0x3b, 0x4d, 0xfd, 0xec}};
static const GUID NV_ENC_HEVC_PROFILE_MAIN10_GUID = {
    0xfa4d2b6c, 0x3a5b, 0x411a, {0x80, 0x18, 0x0a, 0x3f, 0x5e, 0x3c, 0x9b, 0xe5}};
static const GUID NV_ENC_HEVC_PROFILE_FREXT_GUID = {
    0x51ec32b5, 0x1b4c, 0x453c, {0x9c, 0xbd, 0xb6, 0x16, 0xbd, 0x62, 0x13, 0x41}};
static const GUID NV_ENC_PRESET_P1_GUID = {
    0xfc0a8d3e, 0x45f8, 0x4cf8, {0x80, 0xc7, 0x29, 0x88, 0x71, 0x59, 0x0e, 0xbf}};
static const GUID NV_ENC_PRESET_P7_GUID = {
    0x84848c12, 0x6f71, 0x4c13, {0x93, 0x1b, 0x53, 0xe2, 0x83, 0xf5, 0x79, 0x74}};

typedef enum {
    NV_ENC_SUCCESS = 0,
    NV_ENC_ERR_NO_ENCODE_DEVICE = 1,
    NV_ENC_ERR_UNSUPPORTED_DEVICE = 2,
    NV_ENC_ERR_INVALID_ENCODERDEVICE = 3,
    NV_ENC_ERR_INVALID_DEVICE = 4,
    NV_ENC_ERR_INVALID_PTR = 6,
    NV_ENC_ERR_INVALID_PARAM = 8,
    NV_ENC_ERR_INVALID_CALL = 9,
    NV_ENC_ERR_OUT_OF_MEMORY = 10,
    NV_ENC_ERR_ENCODER_NOT_INITIALIZED = 11,
    NV_ENC_ERR_UNSUPPORTED_PARAM = 12,
    NV_ENC_ERR_LOCK_BUSY = 13,
    NV_ENC_ERR_NOT_ENOUGH_BUFFER = 14,
    NV_ENC_ERR_INVALID_VERSION = 15,
    NV_ENC_ERR_MAP_FAILED = 16,
    NV_ENC_ERR_NEED_MORE_INPUT = 17,
    NV_ENC_ERR_ENCODER_BUSY = 18,
    NV_ENC_ERR_GENERIC = 20,
    NV_ENC_ERR_RESOURCE_REGISTER_FAILED = 23,
    NV_ENC_ERR_RESOURCE_NOT_REGISTERED = 24,
    NV_ENC_ERR_RESOURCE_NOT_MAPPED = 25
} NVENCSTATUS;

enum {
    NV_ENC_CAPS_WIDTH_MAX = 16,
    NV_ENC_CAPS_HEIGHT_MAX = 17,
    NV_ENC_CAPS_MB_NUM_MAX = 31,
    NV_ENC_CAPS_SUPPORT_YUV444_ENCODE = 33,
    NV_ENC_CAPS_SUPPORT_LOSSLESS_ENCODE = 34,
    NV_ENC_CAPS_SUPPORT_10BIT_ENCODE = 39,
    NV_ENC_CAPS_WIDTH_MIN = 45,
    NV_ENC_CAPS_HEIGHT_MIN = 46,
    NV_ENC_CAPS_NUM_ENCODER_ENGINES = 49,
    NV_ENC_CAPS_EXPOSED_COUNT = 51
};
enum { NV_ENC_DEVICE_TYPE_CUDA = 1 };
enum { NV_ENC_INPUT_RESOURCE_TYPE_CUDADEVICEPTR = 1 };
enum { NV_ENC_INPUT_IMAGE = 0 };
enum { NV_ENC_PIC_STRUCT_FRAME = 1 };
enum { NV_ENC_PIC_TYPE_IDR = 3 };
enum { NV_ENC_PIC_FLAG_FORCEIDR = 2, NV_ENC_PIC_FLAG_EOS = 8 };
enum { NV_ENC_PARAMS_RC_CONSTQP = 0, NV_ENC_PARAMS_RC_VBR = 1 };
enum { NV_ENC_QP_MAP_DISABLED = 0, NV_ENC_QP_MAP_DELTA = 2 };
enum { NV_ENC_MULTI_PASS_DISABLED = 0, NV_ENC_TWO_PASS_QUARTER_RESOLUTION = 1 };
enum { NV_ENC_TUNING_INFO_HIGH_QUALITY = 1, NV_ENC_TUNING_INFO_LOSSLESS = 4 };
enum {
    NV_ENC_BUFFER_FORMAT_NV12 = 0x1,
    NV_ENC_BUFFER_FORMAT_YUV444 = 0x1000,
    NV_ENC_BUFFER_FORMAT_YUV420_10BIT = 0x10000,
    NV_ENC_BUFFER_FORMAT_YUV444_10BIT = 0x100000
};

typedef struct {
    uint32_t version, capsToQuery, reserved[62];
} NV_ENC_CAPS_PARAM;

typedef struct {
    uint32_t version, size, memoryHeap, reserved;
    void *bitstreamBuffer, *bitstreamBufferPtr;
    uint32_t reserved1[58];
    void *reserved2[64];
} NV_ENC_CREATE_BITSTREAM_BUFFER;

typedef struct {
    uint32_t qpInterP, qpInterB, qpIntra;
} NV_ENC_QP;

typedef struct {
    uint32_t version, rateControlMode;
    NV_ENC_QP constQP;
    uint32_t averageBitRate, maxBitRate, vbvBufferSize, vbvInitialDelay;
    uint32_t enableMinQP : 1, enableMaxQP : 1, enableInitialRCQP : 1, enableAQ : 1, reservedBitField1 : 1;
    uint32_t enableLookahead : 1, disableIadapt : 1, disableBadapt : 1, enableTemporalAQ : 1;
    uint32_t zeroReorderDelay : 1, enableNonRefP : 1, strictGOPTarget : 1, aqStrength : 4;
    uint32_t reservedBitFields : 16;
    NV_ENC_QP minQP, maxQP, initialRCQP;
    uint32_t temporallayerIdxMask;
    uint8_t temporalLayerQP[8], targetQuality, targetQualityLSB;
    uint16_t lookaheadDepth;
    uint8_t lowDelayKeyFrameScale, reserved1[3];
    uint32_t qpMapMode, multiPass, alphaLayerBitrateRatio;
    int8_t cbQPIndexOffset, crQPIndexOffset;
    uint16_t reserved2;
    uint32_t reserved[4];
} NV_ENC_RC_PARAMS;

typedef struct {
    uint32_t level, tier, minCUSize, maxCUSize;
    uint32_t useConstrainedIntraPred : 1, disableDeblockAcrossSliceBoundary : 1, outputBufferingPeriodSEI : 1;
    uint32_t outputPictureTimingSEI : 1, outputAUD : 1, enableLTR : 1, disableSPSPPS : 1, repeatSPSPPS : 1;
    uint32_t enableIntraRefresh : 1, chromaFormatIDC : 2, pixelBitDepthMinus8 : 3;
    uint32_t enableFillerDataInsertion : 1, enableConstrainedEncoding : 1, enableAlphaLayerEncoding : 1;
    uint32_t singleSliceIntraRefresh : 1, reserved : 14;
    uint32_t idrPeriod, intraRefreshPeriod, intraRefreshCnt, maxNumRefFramesInDPB, ltrNumFrames;
    uint32_t vpsId, spsId, ppsId, sliceMode, sliceModeData, maxTemporalLayersMinus1;
    uint32_t hevcVUIParameters[28];
    uint32_t ltrTrustMode, useBFramesAsRef, numRefL0, numRefL1, reserved1[214];
    void *reserved2[64];
} NV_ENC_CONFIG_HEVC;

typedef union {
    NV_ENC_CONFIG_HEVC hevcConfig;
    uint32_t space[448]; /* of the other codecs */
} NV_ENC_CODEC_CONFIG;

typedef struct {
    uint32_t version;
    GUID profileGUID;
    uint32_t gopLength;
    int32_t frameIntervalP;
    uint32_t monoChromeEncoding, frameFieldMode, mvPrecision;
    NV_ENC_RC_PARAMS rcParams;
    NV_ENC_CODEC_CONFIG encodeCodecConfig;
    uint32_t reserved[278];
    void *reserved2[64];
} NV_ENC_CONFIG;

typedef struct {
    uint32_t version;
    GUID encodeGUID, presetGUID;
    uint32_t encodeWidth, encodeHeight, darWidth, darHeight, frameRateNum, frameRateDen;
    uint32_t enableEncodeAsync, enablePTD;
    uint32_t reportSliceOffsets : 1, enableSubFrameWrite : 1, enableExternalMEHints : 1, enableMEOnlyMode : 1;
    uint32_t enableWeightedPrediction : 1, enableOutputInVidmem : 1, reservedBitFields : 26;
    uint32_t privDataSize;
    void *privData;
    NV_ENC_CONFIG *encodeConfig;
    uint32_t maxEncodeWidth, maxEncodeHeight, maxMEHintCountsPerBlock[8], tuningInfo, bufferFormat;
    uint32_t reserved[287];
    void *reserved2[64];
} NV_ENC_INITIALIZE_PARAMS;

typedef struct {
    uint32_t version;
    NV_ENC_INITIALIZE_PARAMS reInitEncodeParams;
    uint32_t resetEncoder : 1, forceIDR : 1, reserved : 30;
} NV_ENC_RECONFIGURE_PARAMS;

typedef struct {
    uint32_t version;
    NV_ENC_CONFIG presetCfg;
    uint32_t reserved1[255];
    void *reserved2[64];
} NV_ENC_PRESET_CONFIG;

typedef struct {
    uint32_t version, inputWidth, inputHeight, inputPitch, encodePicFlags, frameIdx;
    uint64_t inputTimeStamp, inputDuration;
    void *inputBuffer, *outputBitstream, *completionEvent;
    uint32_t bufferFmt, pictureStruct, pictureType;
    uint64_t codecPicParams[192];
    uint32_t meHintCountsPerBlock[8];
    void *meExternalHints;
    uint32_t reserved1[6];
    void *reserved2[2];
    int8_t *qpDeltaMap;
    uint32_t qpDeltaMapSize, reservedBitFields;
    uint16_t meHintRefPicDist[2];
    void *alphaBuffer;
    uint32_t reserved3[286];
    void *reserved4[59];
} NV_ENC_PIC_PARAMS;

typedef struct {
    uint32_t version;
    uint32_t doNotWait : 1, ltrFrame : 1, getRCStats : 1, reservedBitFields : 29;
    void *outputBitstream;
    uint32_t *sliceOffsets;
    uint32_t frameIdx, hwEncodeStatus, numSlices, bitstreamSizeInBytes;
    uint64_t outputTimeStamp, outputDuration;
    void *bitstreamBufferPtr;
    uint32_t pictureType, pictureStruct, frameAvgQP, frameSatd, ltrFrameIdx, ltrFrameBitmap, temporalId;
    uint32_t reserved[12], intraMBCount, interMBCount;
    int32_t averageMVX, averageMVY;
    uint32_t alphaLayerSizeInBytes, reserved1[218];
    void *reserved2[64];
} NV_ENC_LOCK_BITSTREAM;

typedef struct {
    uint32_t version, subResourceIndex;
    void *inputResource, *registeredResource, *mappedResource;
    uint32_t mappedBufferFmt, reserved1[251];
    void *reserved2[63];
} NV_ENC_MAP_INPUT_RESOURCE;

typedef struct {
    uint32_t version, resourceType, width, height, pitch, subResourceIndex;
    void *resourceToRegister, *registeredResource;
    uint32_t bufferFormat, bufferUsage;
    void *pInputFencePoint, *pOutputFencePoint;
    uint32_t reserved1[247];
    void *reserved2[60];
} NV_ENC_REGISTER_RESOURCE;

typedef struct {
    uint32_t version, inBufferSize, spsId, ppsId;
    void *spsppsBuffer;
    uint32_t *outSPSPPSPayloadSize;
    uint32_t reserved[250];
    void *reserved2[64];
} NV_ENC_SEQUENCE_PARAM_PAYLOAD;

typedef struct {
    uint32_t version, deviceType;
    void *device, *reserved;
    uint32_t apiVersion, reserved1[253];
    void *reserved2[64];
} NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS;

typedef struct {
    uint32_t version, reserved;
    void *nvEncOpenEncodeSession, *nvEncGetEncodeGUIDCount, *nvEncGetEncodeProfileGUIDCount;
    void *nvEncGetEncodeProfileGUIDs, *nvEncGetEncodeGUIDs, *nvEncGetInputFormatCount, *nvEncGetInputFormats;
    void *nvEncGetEncodeCaps, *nvEncGetEncodePresetCount, *nvEncGetEncodePresetGUIDs, *nvEncGetEncodePresetConfig;
    void *nvEncInitializeEncoder, *nvEncCreateInputBuffer, *nvEncDestroyInputBuffer, *nvEncCreateBitstreamBuffer;
    void *nvEncDestroyBitstreamBuffer, *nvEncEncodePicture, *nvEncLockBitstream, *nvEncUnlockBitstream;
    void *nvEncLockInputBuffer, *nvEncUnlockInputBuffer, *nvEncGetEncodeStats, *nvEncGetSequenceParams;
    void *nvEncRegisterAsyncEvent, *nvEncUnregisterAsyncEvent, *nvEncMapInputResource, *nvEncUnmapInputResource;
    void *nvEncDestroyEncoder, *nvEncInvalidateRefFrames, *nvEncOpenEncodeSessionEx, *nvEncRegisterResource;
    void *nvEncUnregisterResource, *nvEncReconfigureEncoder, *reserved1, *nvEncCreateMVBuffer;
    void *nvEncDestroyMVBuffer, *nvEncRunMotionEstimationOnly, *nvEncGetLastErrorString, *nvEncSetIOCudaStreams;
    void *nvEncGetEncodePresetConfigEx, *nvEncGetSequenceParamEx, *reserved2[277];
} NV_ENCODE_API_FUNCTION_LIST;

#define NV_ENC_CAPS_PARAM_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENC_CREATE_BITSTREAM_BUFFER_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENC_RC_PARAMS_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENC_CONFIG_VER (NVENCAPI_STRUCT_VERSION(7) | 1u << 31)
#define NV_ENC_INITIALIZE_PARAMS_VER (NVENCAPI_STRUCT_VERSION(5) | 1u << 31)
#define NV_ENC_RECONFIGURE_PARAMS_VER (NVENCAPI_STRUCT_VERSION(1) | 1u << 31)
#define NV_ENC_PRESET_CONFIG_VER (NVENCAPI_STRUCT_VERSION(4) | 1u << 31)
#define NV_ENC_PIC_PARAMS_VER (NVENCAPI_STRUCT_VERSION(4) | 1u << 31)
#define NV_ENC_LOCK_BITSTREAM_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENC_MAP_INPUT_RESOURCE_VER NVENCAPI_STRUCT_VERSION(4)
#define NV_ENC_REGISTER_RESOURCE_VER NVENCAPI_STRUCT_VERSION(3)
#define NV_ENC_SEQUENCE_PARAM_PAYLOAD_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS_VER NVENCAPI_STRUCT_VERSION(1)
#define NV_ENCODE_API_FUNCTION_LIST_VER NVENCAPI_STRUCT_VERSION(2)
