"""What an NVENC session is asked to encode: whether a GPU can, and the configuration that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sidelane.codec._abi import Abi
from sidelane.codec._limits import FrameLimits
from sidelane.layout import SurfaceFormat

# Presets switch these on, and everything but the QP would be ignored, refused or left to the CUDA cores.
_RATE_CONTROL_OFF = (
    *(
        "averageBitRate",
        "maxBitRate",
        "vbvBufferSize",
        "vbvInitialDelay",
        "targetQuality",
        "targetQualityLSB",
    ),
    *("enableMinQP", "enableMaxQP", "enableInitialRCQP", "enableAQ", "enableTemporalAQ", "aqStrength"),
    *("enableLookahead", "lookaheadDepth", "multiPass", "cbQPIndexOffset", "crQPIndexOffset"),
)


@dataclass(frozen=True)
class Coding:
    """What a session encodes.

    Attributes:
        qp: None is lossless.
        preset: 1 (fastest) to 7.
        repeat_headers: parameter sets before every picture, else not in the stream at all.
        max_width, max_height: of the largest frames that the session may later change to; never less than
            `width` and `height`.
        on_device: bitstreams go to device memory.
    """

    format: SurfaceFormat
    width: int
    height: int
    qp: int | None
    preset: int = 1
    qp_map: bool = False
    repeat_headers: bool = False
    max_width: int = 0
    max_height: int = 0
    on_device: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_width", max(self.max_width, self.width))
        object.__setattr__(self, "max_height", max(self.max_height, self.height))


@dataclass(frozen=True)
class EncoderCaps(FrameLimits):
    """What NVENC does with HEVC on one GPU. Without HEVC `engines` and all that follows is zero.

    Whether bitstreams may go to device memory is no capability: the driver says so to the session.
    """

    engines: int
    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int  # 16x16 blocks in a frame
    yuv444: bool
    ten_bit: bool
    lossless: bool
    resize: bool  # sessions can change their frame size

    def refusal(self, coding: Coding) -> str | None:
        """Why `coding` is not possible here; None if it is."""
        fmt = coding.format
        if not self.engines:
            return "this GPU does not encode HEVC"
        if buffer_format(fmt) is None:
            return f"no NVENC encodes {fmt.bits}-bit samples (format '{fmt.name}')"
        if not fmt.subsampled and not self.yuv444:
            return "this GPU does not encode 4:4:4"
        if fmt.itemsize == 2 and not self.ten_bit:
            return "this GPU does not encode 10 bit"
        if coding.qp is None and not self.lossless:
            return "this GPU does not encode without loss"
        if (coding.max_width, coding.max_height) != (coding.width, coding.height) and not self.resize:
            return "this GPU does not change the frame size of a session"
        refusal = self.size_refusal(coding.width, coding.height)
        return refusal or self.size_refusal(coding.max_width, coding.max_height)


def buffer_format(format: SurfaceFormat) -> str | None:
    """NVENC's name of a surface format; None if it has none."""
    if format.itemsize == 2 and format.bits != 10:
        return None
    if format.subsampled:
        return "NV_ENC_BUFFER_FORMAT_NV12" if format.itemsize == 1 else "NV_ENC_BUFFER_FORMAT_YUV420_10BIT"
    return "NV_ENC_BUFFER_FORMAT_YUV444" if format.itemsize == 1 else "NV_ENC_BUFFER_FORMAT_YUV444_10BIT"


def configure(abi: Abi, config: Any, coding: Coding) -> None:
    """Make `config`, an NV_ENC_CONFIG with the defaults of a preset, all-intra at constant QP or lossless."""
    fmt = coding.format
    depth = 8 if fmt.itemsize == 1 else fmt.bits
    profile = ("MAIN" if depth == 8 else "MAIN10") if fmt.subsampled else "FREXT"
    config.profileGUID = abi.guid(f"NV_ENC_HEVC_PROFILE_{profile}_GUID")
    config.gopLength = 1
    config.frameIntervalP = 0  # intra pictures only
    rate = config.rcParams
    for name in _RATE_CONTROL_OFF:
        setattr(rate, name, 0)
    rate.rateControlMode = abi.number("NV_ENC_PARAMS_RC_CONSTQP")
    rate.zeroReorderDelay = 1
    rate.qpMapMode = abi.number("NV_ENC_QP_MAP_DELTA" if coding.qp_map else "NV_ENC_QP_MAP_DISABLED")
    set_constant_qp(config, coding.qp or 0)
    hevc = config.encodeCodecConfig.hevcConfig
    hevc.level = abi.number("NV_ENC_LEVEL_AUTOSELECT")
    hevc.tier = abi.number("NV_ENC_TIER_HEVC_HIGH")
    hevc.idrPeriod = 1
    hevc.sliceMode, hevc.sliceModeData = 3, 1  # one slice
    hevc.repeatSPSPPS = int(coding.repeat_headers)
    hevc.disableSPSPPS = int(not coding.repeat_headers)
    hevc.chromaFormatIDC = 1 if fmt.subsampled else 3
    if hasattr(type(hevc), "outputBitDepth"):  # from 12.2 on, where the older bits are reserved
        bits = abi.number(f"NV_ENC_BIT_DEPTH_{depth}")
        hevc.inputBitDepth = hevc.outputBitDepth = bits
    else:
        hevc.pixelBitDepthMinus8 = depth - 8
    vui = hevc.hevcVUIParameters
    vui.videoSignalTypePresentFlag, vui.videoFormat, vui.videoFullRangeFlag = 1, 5, 1  # unspecified, full


def set_constant_qp(config: Any, qp: int) -> None:
    """Put `qp` into `config`, an NV_ENC_CONFIG; 0 also stands for lossless."""
    quantizer = config.rcParams.constQP
    quantizer.qpInterP = quantizer.qpInterB = quantizer.qpIntra = qp
