/* NVDEC in a plain C loop: what benchmarks/nvdec.py compares the decoder of sidelane with.
 *
 * The calls of codec/_nvdec.py and codec/_nvdec_parser.py, one thread per decoder; with the parser on the way a
 * deeper queue is faster. Needs the headers of Debian's libffmpeg-nvenc-dev; benchmarks/nvdec.py --loop takes:
 *
 *     cc -O2 -Wall -Wextra -shared -fPIC -pthread -o nvdec_loop.so benchmarks/nvdec_loop.c
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <ffnvcodec/dynlink_loader.h>

enum { DEPTH = 8, MAX_SURFACES = 32, MAX_DECODERS = 64 };

/* One call of nvdec_loop. Every pass of every decoder decodes the whole stream into the decoder's surface. */
typedef struct {
    const unsigned char *stream; /* Annex B, all-intra HEVC */
    size_t size;
    int decoders, passes;
    const CUdeviceptr *surfaces; /* [decoders], each frames * rows rows of pitch bytes */
    size_t pitch;
    int row_bytes, rows, frames; /* of one frame: bytes in a row, rows of all planes; frames in the stream */
    double *seconds;             /* [passes], wall clock from the first decoder's start to the last one's end */
    CUcontext context;
    pthread_barrier_t barrier;
} Loop;

typedef struct {
    Loop *loop;
    int number;
    CUvideodecoder decoder;
    CUstream stream;
    int decode_surfaces;
    int waiting[MAX_SURFACES], oldest, newest; /* ring of pictures that are displayed and not yet copied */
    int copied;
    int failed;
} Worker;

static CudaFunctions *cuda;
static CuvidFunctions *cuvid;

static int check(Worker *worker, const char *call, int status)
{
    if (status && !worker->failed) {
        fprintf(stderr, "nvdec_loop: %s -> %d\n", call, status);
        worker->failed = 1;
    }
    return status == 0;
}

#define CUDA(call) check(worker, #call, cuda->call)
#define CUVID(call) check(worker, #call, cuvid->call)

static void copy_oldest(Worker *worker)
{
    const Loop *loop = worker->loop;
    int picture = worker->waiting[worker->oldest++ % MAX_SURFACES];
    CUdeviceptr source = 0;
    unsigned pitch = 0;
    CUVIDPROCPARAMS how = {.progressive_frame = 1, .output_stream = worker->stream};
    CUVIDGETDECODESTATUS report = {0};

    if (worker->failed || !CUVID(cuvidMapVideoFrame(worker->decoder, picture, &source, &pitch, &how)))
        return;
    CUVID(cuvidGetDecodeStatus(worker->decoder, picture, &report));
    if (report.decodeStatus >= cuvidDecodeStatus_Error)
        check(worker, "decodeStatus", report.decodeStatus);
    if (worker->copied == loop->frames) {
        check(worker, "more frames than expected", loop->frames);
    } else {
        CUDA_MEMCPY2D copy = {
            .srcMemoryType = CU_MEMORYTYPE_DEVICE,
            .srcDevice = source,
            .srcPitch = pitch,
            .dstMemoryType = CU_MEMORYTYPE_DEVICE,
            .dstDevice = loop->surfaces[worker->number] + (size_t)worker->copied++ * loop->rows * loop->pitch,
            .dstPitch = loop->pitch,
            .WidthInBytes = loop->row_bytes,
            .Height = loop->rows,
        };
        CUDA(cuMemcpy2DAsync(&copy, worker->stream));
    }
    CUVID(cuvidUnmapVideoFrame(worker->decoder, source));
}

static int CUDAAPI on_sequence(void *user, CUVIDEOFORMAT *format)
{
    Worker *worker = user;
    int deep = format->bit_depth_luma_minus8 > 0, full = format->chroma_format == cudaVideoChromaFormat_444;
    CUVIDDECODECREATEINFO info = {
        .CodecType = format->codec,
        .ChromaFormat = format->chroma_format,
        .OutputFormat = full ? (deep ? cudaVideoSurfaceFormat_YUV444_16Bit : cudaVideoSurfaceFormat_YUV444)
                             : (deep ? cudaVideoSurfaceFormat_P016 : cudaVideoSurfaceFormat_NV12),
        .DeinterlaceMode = cudaVideoDeinterlaceMode_Weave,
        .ulCreationFlags = cudaVideoCreate_PreferCUVID,
        .bitDepthMinus8 = format->bit_depth_luma_minus8,
        .ulIntraDecodeOnly = 1,
        .ulNumOutputSurfaces = 1,
        .ulNumDecodeSurfaces = format->min_num_decode_surfaces + DEPTH,
        .ulWidth = format->coded_width,
        .ulHeight = format->coded_height,
        .ulMaxWidth = format->coded_width,
        .ulMaxHeight = format->coded_height,
        .ulTargetWidth = format->display_area.right - format->display_area.left,
        .ulTargetHeight = format->display_area.bottom - format->display_area.top,
        .display_area = {format->display_area.left, format->display_area.top, format->display_area.right,
                         format->display_area.bottom},
    };

    if (!worker->decoder) { /* kept for all passes: they decode the same stream */
        worker->decode_surfaces = info.ulNumDecodeSurfaces;
        CUVID(cuvidCreateDecoder(&worker->decoder, &info));
    }
    return worker->failed ? 0 : worker->decode_surfaces;
}

static int CUDAAPI on_decode(void *user, CUVIDPICPARAMS *picture)
{
    Worker *worker = user;

    for (int i = worker->oldest; i < worker->newest; i++)
        if (worker->waiting[i % MAX_SURFACES] == picture->CurrPicIdx)
            while (worker->oldest <= i)
                copy_oldest(worker);
    CUVID(cuvidDecodePicture(worker->decoder, picture));
    return !worker->failed;
}

static int CUDAAPI on_display(void *user, CUVIDPARSERDISPINFO *display)
{
    Worker *worker = user;

    if (display) { /* else the stream has ended */
        worker->waiting[worker->newest++ % MAX_SURFACES] = display->picture_index;
        if (worker->newest - worker->oldest > DEPTH)
            copy_oldest(worker);
    }
    return !worker->failed;
}

static void decode_stream(Worker *worker)
{
    CUvideoparser parser = NULL;
    CUVIDPARSERPARAMS params = {
        .CodecType = cudaVideoCodec_HEVC,
        .ulMaxNumDecodeSurfaces = 1,
        .pUserData = worker,
        .pfnSequenceCallback = on_sequence,
        .pfnDecodePicture = on_decode,
        .pfnDisplayPicture = on_display,
    };
    CUVIDSOURCEDATAPACKET all = {.payload = worker->loop->stream, .payload_size = worker->loop->size};
    CUVIDSOURCEDATAPACKET end = {.flags = CUVID_PKT_ENDOFSTREAM};

    worker->oldest = worker->newest = worker->copied = 0;
    if (!CUVID(cuvidCreateVideoParser(&parser, &params)))
        return;
    CUVID(cuvidParseVideoData(parser, &all));
    CUVID(cuvidParseVideoData(parser, &end));
    while (worker->oldest < worker->newest)
        copy_oldest(worker);
    CUDA(cuStreamSynchronize(worker->stream));
    CUVID(cuvidDestroyVideoParser(parser));
    if (worker->copied != worker->loop->frames)
        check(worker, "frames copied", worker->copied);
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void *work(void *argument)
{
    Worker *worker = argument;
    Loop *loop = worker->loop;
    CUcontext previous;

    CUDA(cuCtxPushCurrent(loop->context));
    CUDA(cuStreamCreate(&worker->stream, 1 /* CU_STREAM_NON_BLOCKING */));
    for (int pass = -1; pass < loop->passes; pass++) { /* pass -1 warms up */
        pthread_barrier_wait(&loop->barrier);
        double start = now();
        if (!worker->failed)
            decode_stream(worker);
        pthread_barrier_wait(&loop->barrier);
        if (worker->number == 0 && pass >= 0)
            loop->seconds[pass] = now() - start;
    }
    if (worker->decoder)
        CUVID(cuvidDestroyDecoder(worker->decoder));
    if (worker->stream)
        CUDA(cuStreamDestroy(worker->stream));
    CUDA(cuCtxPopCurrent(&previous));
    return NULL;
}

/* Arguments as in Loop. Uses the primary context of device 0. Returns 0, or 1 after a message on stderr. */
int nvdec_loop(const unsigned char *stream, size_t size, int decoders, int passes, const CUdeviceptr *surfaces,
               size_t pitch, int row_bytes, int rows, int frames, double *seconds)
{
    Loop loop = {.stream = stream, .size = size, .decoders = decoders, .passes = passes, .surfaces = surfaces,
                 .pitch = pitch, .row_bytes = row_bytes, .rows = rows, .frames = frames, .seconds = seconds};
    Worker workers[MAX_DECODERS] = {0}, *worker = workers; /* the macros want a name for who failed */
    pthread_t threads[MAX_DECODERS];
    CUdevice device;
    int failed = 0;

    if (decoders < 1 || decoders > MAX_DECODERS)
        return 1;
    if (!cuda && (cuda_load_functions(&cuda, NULL) || cuvid_load_functions(&cuvid, NULL)))
        return 1;
    if (!CUDA(cuInit(0)) || !CUDA(cuDeviceGet(&device, 0)))
        return 1;
    if (!CUDA(cuDevicePrimaryCtxRetain(&loop.context, device)))
        return 1;
    pthread_barrier_init(&loop.barrier, NULL, decoders);
    for (int i = 0; i < decoders; i++) {
        workers[i] = (Worker){.loop = &loop, .number = i};
        if (pthread_create(&threads[i], NULL, work, &workers[i])) {
            perror("nvdec_loop: pthread_create");
            abort(); /* those that run wait for this one */
        }
    }
    for (int i = 0; i < decoders; i++) {
        pthread_join(threads[i], NULL);
        failed |= workers[i].failed;
    }
    pthread_barrier_destroy(&loop.barrier);
    CUDA(cuDevicePrimaryCtxRelease(device));
    return failed;
}
