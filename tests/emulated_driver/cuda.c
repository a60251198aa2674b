/* The emulated driver's libcuda: device memory is host memory, work is done when it is asked for. Also the
 * handles, faults and counters of the whole, and the functions by which a test controls it. */
#include "emulated.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 4096
#define FAULTS 16
#define CALLS 64

enum { CUDA_SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };

struct slot {
    uint32_t generation;
    enum kind kind;
    void *state;
};

struct block {
    uint64_t size;
    uint8_t *bytes;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct slot slots[SLOTS];
static uint32_t next_slot;
static int live[KINDS];
static struct {
    char call[48];
    int status, skip, times, after;
} faults[FAULTS];
static struct {
    char name[48];
    uint64_t count;
} calls[CALLS];
static char broken[256];
static _Thread_local void *contexts[16];
static _Thread_local int depth;

int settings[SETTINGS];
static const int defaults[SETTINGS] = {
    [VERSION] = 0xD0, [ACCEPTS] = 0xD0, [ENGINES] = 3, [SESSION_LIMIT] = 8, [HEVC] = 1, [YUV444] = 1, [TEN_BIT] = 1,
    [LOSSLESS] = 1, [RESIZE] = 1, [VIDMEM] = 1, [WIDTH_MIN] = 129, [HEIGHT_MIN] = 33, [WIDTH_MAX] = 8192, [HEIGHT_MAX] = 8192};
static const char *const setting_names[SETTINGS] = {
    "version", "accepts", "engines", "session_limit", "slow_us", "header_padding", "padding", "hevc", "yuv444",
    "ten_bit", "lossless", "resize", "vidmem", "width_min", "height_min", "width_max", "height_max"};
static const char *const kind_names[KINDS] = {
    "", "memory", "event", "stream", "session", "resource", "mapping", "bitstream"};

void lock_state(void) { pthread_mutex_lock(&mutex); }

void unlock_state(void) { pthread_mutex_unlock(&mutex); }

static void count_call(const char *call)
{
    for (int i = 0; i < CALLS; i++) {
        if (!calls[i].name[0])
            snprintf(calls[i].name, sizeof calls[i].name, "%s", call);
        if (!strcmp(calls[i].name, call)) {
            calls[i].count++;
            return;
        }
    }
    abort();
}

struct fault enter(const char *call)
{
    lock_state();
    count_call(call);
    for (int i = 0; i < FAULTS; i++) {
        if (!faults[i].times || strcmp(faults[i].call, call))
            continue;
        if (faults[i].skip) {
            faults[i].skip--;
            continue;
        }
        faults[i].times--;
        return (struct fault){faults[i].status, faults[i].after};
    }
    return (struct fault){0, 0};
}

int leave(int status)
{
    unlock_state();
    return status;
}

void violation(const char *format, ...)
{
    if (broken[0])
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(broken, sizeof broken, format, arguments);
    va_end(arguments);
}

void *new_handle(enum kind kind, void *state)
{
    for (uint32_t tried = 0; tried < SLOTS; tried++) {
        uint32_t at = next_slot++ % SLOTS;
        if (slots[at].kind)
            continue;
        slots[at] = (struct slot){slots[at].generation + 1, kind, state};
        live[kind]++;
        return (void *)((uintptr_t)slots[at].generation << 20 | (uintptr_t)at << 4 | 8);
    }
    abort();
}

static struct slot *slot_of(const void *handle, enum kind kind)
{
    struct slot *slot = &slots[(uintptr_t)handle >> 4 & (SLOTS - 1)];
    int same = slot->generation == (uintptr_t)handle >> 20 && ((uintptr_t)handle & 15) == 8;
    return same && slot->kind == kind ? slot : NULL;
}

void *find(const void *handle, enum kind kind)
{
    struct slot *slot = slot_of(handle, kind);
    return slot ? slot->state : NULL;
}

void *drop(const void *handle, enum kind kind)
{
    struct slot *slot = slot_of(handle, kind);
    if (!slot)
        return NULL;
    slot->kind = 0;
    live[kind]--;
    return slot->state;
}

void each(enum kind kind, void (*visit)(void *handle, void *state, void *more), void *more)
{
    if (!live[kind])
        return;
    for (uintptr_t at = 0; at < SLOTS; at++)
        if (slots[at].kind == kind)
            visit((void *)((uintptr_t)slots[at].generation << 20 | at << 4 | 8), slots[at].state, more);
}

int count(enum kind kind) { return live[kind]; }

/* Control. */

EXPORT void emulated_reset(void)
{
    lock_state();
    for (uint32_t at = 0; at < SLOTS; at++) {
        if (slots[at].kind == MEMORY)
            free(((struct block *)slots[at].state)->bytes);
        if (slots[at].kind)
            free(slots[at].state);
        slots[at].kind = 0;
    }
    memset(live, 0, sizeof live);
    memset(faults, 0, sizeof faults);
    memset(calls, 0, sizeof calls);
    memcpy(settings, defaults, sizeof settings);
    broken[0] = 0;
    unlock_state();
}

EXPORT void emulated_set(const char *name, int value)
{
    for (int i = 0; i < SETTINGS; i++)
        if (!strcmp(setting_names[i], name)) {
            settings[i] = value;
            return;
        }
    abort();
}

/* After `skip` more calls of `call`, the next `times` return `status`, before or `after` doing their work. */
EXPORT void emulated_fail(const char *call, int status, int skip, int times, int after)
{
    lock_state();
    int i = 0;
    while (i < FAULTS - 1 && faults[i].times) /* the last one is replaced when there are too many */
        i++;
    snprintf(faults[i].call, sizeof faults[i].call, "%s", call);
    faults[i].status = status, faults[i].skip = skip, faults[i].times = times, faults[i].after = after;
    unlock_state();
}

EXPORT int emulated_live(const char *kind)
{
    int found = 0;
    lock_state();
    for (int i = 1; i < KINDS; i++)
        if (!strcmp(kind_names[i], kind))
            found = live[i];
    unlock_state();
    return found;
}

EXPORT uint64_t emulated_calls(const char *call)
{
    uint64_t found = 0;
    lock_state();
    for (int i = 0; i < CALLS; i++)
        if (!strcmp(calls[i].name, call))
            found = calls[i].count;
    unlock_state();
    return found;
}

EXPORT const char *emulated_violation(void) { return broken; }

EXPORT void emulated_forgive(void) { broken[0] = 0; }

EXPORT int emulated_context_depth(void) { return depth; }

/* libcuda. */

#define CUDA(name, parameters, arguments)                                                           \
    static int name##_work parameters;                                                              \
    EXPORT int name parameters                                                                      \
    {                                                                                               \
        struct fault fault = enter(#name);                                                          \
        int status = fault.status && !fault.after ? fault.status : name##_work arguments;           \
        return leave(fault.status ? fault.status : status);                                         \
    }                                                                                               \
    static int name##_work parameters

void *current_context(void) { return depth ? contexts[depth - 1] : NULL; }

CUDA(cuInit, (unsigned flags), (flags)) { return flags ? INVALID_VALUE : CUDA_SUCCESS; }

CUDA(cuDeviceGet, (int *device, int ordinal), (device, ordinal))
{
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUDA(cuDevicePrimaryCtxRetain, (void **context, int device), (context, device))
{
    *context = (void *)(uintptr_t)(0xC0DE00 + device);
    return CUDA_SUCCESS;
}

CUDA(cuCtxPushCurrent_v2, (void *context), (context))
{
    if ((uintptr_t)context >> 8 != 0xC0DE || depth == 16)
        return INVALID_CONTEXT;
    contexts[depth++] = context;
    return CUDA_SUCCESS;
}

CUDA(cuCtxPopCurrent_v2, (void **context), (context))
{
    if (!depth)
        return INVALID_CONTEXT;
    *context = contexts[--depth];
    return CUDA_SUCCESS;
}

EXPORT int cuGetErrorName(int status, const char **name)
{
    static _Thread_local char text[32];
    snprintf(text, sizeof text, "CUDA_ERROR_%d", status);
    *name = text;
    return CUDA_SUCCESS;
}

CUDA(cuStreamCreate, (void **stream, unsigned flags), (stream, flags))
{
    if (!depth)
        return INVALID_CONTEXT;
    *stream = new_handle(STREAM, calloc(1, 1));
    return CUDA_SUCCESS;
}

static int drop_simple(void *handle, enum kind kind)
{
    void *state = drop(handle, kind);
    free(state);
    return state ? CUDA_SUCCESS : INVALID_HANDLE;
}

CUDA(cuStreamDestroy_v2, (void *stream), (stream)) { return drop_simple(stream, STREAM); }

CUDA(cuStreamSynchronize, (void *stream), (stream)) { return find(stream, STREAM) ? CUDA_SUCCESS : INVALID_HANDLE; }

CUDA(cuStreamWaitEvent, (void *stream, void *event, unsigned flags), (stream, event, flags))
{
    char *recorded = find(event, EVENT);
    if (!find(stream, STREAM) || !recorded || flags)
        return INVALID_HANDLE;
    if (!*recorded)
        violation("a stream waits for an event that was never recorded");
    return CUDA_SUCCESS;
}

CUDA(cuEventCreate, (void **event, unsigned flags), (event, flags))
{
    if (!depth)
        return INVALID_CONTEXT;
    *event = new_handle(EVENT, calloc(1, 1));
    return CUDA_SUCCESS;
}

CUDA(cuEventRecord, (void *event, void *stream), (event, stream))
{
    char *recorded = find(event, EVENT);
    if (!recorded || (stream && !find(stream, STREAM)))
        return INVALID_HANDLE;
    *recorded = 1;
    return CUDA_SUCCESS;
}

CUDA(cuEventDestroy_v2, (void *event), (event)) { return drop_simple(event, EVENT); }

CUDA(cuMemAlloc_v2, (uint64_t *address, uint64_t size), (address, size))
{
    if (!depth)
        return INVALID_CONTEXT;
    void *bytes;
    if (!size || posix_memalign(&bytes, 512, size))
        return size ? OUT_OF_MEMORY : INVALID_VALUE;
    memset(bytes, 0xDD, size);
    struct block *block = malloc(sizeof *block);
    *block = (struct block){size, bytes};
    new_handle(MEMORY, block);
    *address = (uintptr_t)bytes;
    return CUDA_SUCCESS;
}

struct search {
    uint64_t address, size;
    void *handle;
};

static void match_block(void *handle, void *state, void *more)
{
    struct search *search = more;
    struct block *block = state;
    uint64_t start = (uintptr_t)block->bytes;
    if (search->address >= start && search->address + search->size <= start + block->size)
        search->handle = handle;
}

int is_memory(uint64_t address, uint64_t size)
{
    struct search search = {address, size, NULL};
    each(MEMORY, match_block, &search);
    return search.handle != NULL;
}

CUDA(cuMemFree_v2, (uint64_t address), (address))
{
    struct search search = {address, 0, NULL};
    each(MEMORY, match_block, &search);
    struct block *block = search.handle ? find(search.handle, MEMORY) : NULL;
    if (!block || (uintptr_t)block->bytes != address)
        return INVALID_VALUE;
    if (!depth)
        return INVALID_CONTEXT;
    drop(search.handle, MEMORY);
    if (registered_at(address, block->size))
        violation("memory was freed while an encoder had it registered");
    else
        free(block->bytes);
    free(block);
    return CUDA_SUCCESS;
}

/* Copies are done at once. Where an encoder still writes nobody may read. */
static int copy(void *target, const void *source, uint64_t size, uint64_t device, void *stream)
{
    if (!depth)
        return INVALID_CONTEXT;
    if (stream && !find(stream, STREAM))
        return INVALID_HANDLE;
    if (device && !is_memory(device, size))
        return INVALID_VALUE;
    if (device && written_at(device, size))
        violation("an output was read before it was unmapped");
    memcpy(target, source, size);
    return CUDA_SUCCESS;
}

CUDA(cuMemcpyDtoHAsync_v2, (void *target, uint64_t source, uint64_t size, void *stream),
     (target, source, size, stream))
{
    return copy(target, (void *)source, size, source, stream);
}

/* Either side may be a tensor of the test, which stands for device memory that this driver did not hand out. */
CUDA(cuMemcpyDtoDAsync_v2, (uint64_t target, uint64_t source, uint64_t size, void *stream),
     (target, source, size, stream))
{
    return copy((void *)target, (void *)source, size, is_memory(source, 1) ? source : 0, stream);
}

CUDA(cuMemcpyHtoDAsync_v2, (uint64_t target, const void *source, uint64_t size, void *stream),
     (target, source, size, stream))
{
    return copy((void *)target, source, size, 0, stream);
}
