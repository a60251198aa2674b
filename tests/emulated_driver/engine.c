/* The emulated NVENC below its interface: pictures are encoded as late as possible, when they are collected, so
 * that an input that changes too early is found out. The bytes come from a function that the test installs;
 * without one they are a description of the picture. */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_ENGINES 8

/* Writes a picture (or its headers) to `out` and returns the bytes, 0 on failure. */
typedef int32_t encoder_function(const uint8_t *frame, uint32_t width, uint32_t height, uint32_t pitch,
                                 uint32_t format, int32_t qp, int32_t mapped, const int8_t *map,
                                 uint32_t map_size, int32_t parts, uint8_t *out, uint32_t capacity);
static encoder_function *encoder_callback;
static pthread_mutex_t engine_locks[MAX_ENGINES] = {[0 ... MAX_ENGINES - 1] = PTHREAD_MUTEX_INITIALIZER};
static uint64_t engine_pictures[MAX_ENGINES];

EXPORT void emulated_encoder(encoder_function *callback)
{
    encoder_callback = callback;
    memset(engine_pictures, 0, sizeof engine_pictures);
}

EXPORT uint64_t emulated_engine_pictures(int engine) { return engine_pictures[engine]; }

void note_fault(const void *encoder, const char *call, int status)
{
    enum { LOCK_BUSY = 13, ENCODER_BUSY = 18 };
    struct session *s = find(encoder, SESSION);
    int busy = (status == LOCK_BUSY && !strcmp(call, "nvEncLockBitstream")) ||
               (status == ENCODER_BUSY && !strcmp(call, "nvEncEncodePicture"));
    if (s) {
        s->faulty |= !busy;
        snprintf(s->message, sizeof s->message, "fault on order");
    }
}

void *owned(const void *encoder, const void *handle, enum kind kind)
{
    void **state = find(handle, kind); /* the session comes first in every structure */
    return state && *state == encoder ? state : NULL;
}

/* Sum of the samples, without the padding of the rows. */
static uint64_t checksum(const struct resource *r)
{
    int bytes = r->format & 0x110000 ? 2 : 1; /* the 10-bit formats */
    uint64_t sum = 0, rows = r->size / r->pitch, width = (uint64_t)r->width * bytes;
    const uint8_t *row = (const uint8_t *)r->address;
    for (; rows--; row += r->pitch)
        for (uint64_t x = 0; x < width; x++)
            sum += row[x];
    return sum;
}

static struct resource *resource_of(void *mapping)
{
    struct mapping *m = find(mapping, MAPPING);
    return m ? find(m->resource, RESOURCE) : NULL;
}

/* Encodes on the caller's thread; `r` is NULL for headers alone. Returns the bytes, 0 on failure. */
static int encode(const struct session *s, const struct bitstream *b, const struct resource *r, enum parts parts,
                  uint8_t *out, uint32_t capacity)
{
    if (encoder_callback)
        return encoder_callback(r ? (const uint8_t *)r->address : NULL, s->width, s->height, r ? r->pitch : 0,
                                s->format, b ? b->qp : s->qp, s->mapped, b ? b->map : NULL, b ? b->map_size : 0,
                                parts, out, capacity);
    static const uint8_t headers[] = {0, 0, 1, 0x40, 1, 'h'}, start[] = {0, 0, 1, 0x26, 1};
    uint8_t *at = out;
    if (parts != PICTURE_ONLY)
        at = memcpy(at, headers, sizeof headers), at += sizeof headers;
    if (parts != HEADERS_ONLY) {
        uint64_t facts[] = {s->width, s->height, (uint64_t)(int64_t)b->qp, b->checksum};
        memcpy(at, start, sizeof start);
        memcpy(at + sizeof start, facts, sizeof facts);
        at += sizeof start + sizeof facts;
        if ((int64_t)settings[PADDING] > out + capacity - at)
            return 0;
        memset(at, 0, settings[PADDING]);
        at += settings[PADDING];
    }
    return (int)(at - out);
}

uint32_t write_headers(const struct session *s, uint8_t *out, uint32_t capacity)
{
    return encode(s, NULL, NULL, HEADERS_ONLY, out, capacity) + settings[HEADER_PADDING];
}

void start_picture(struct session *s, struct bitstream *b, void *input, uint64_t stamp, const int8_t *map,
                   uint32_t map_size)
{
    if (map) {
        b->map = memcpy(malloc(map_size), map, map_size);
        b->map_size = map_size;
    }
    b->state = SUBMITTED;
    b->input = input;
    b->number = s->submitted++;
    b->stamp = stamp;
    b->qp = s->qp;
    b->checksum = checksum(resource_of(input));
    ((struct mapping *)find(input, MAPPING))->pictures++;
}

int finish_picture(struct session *s, struct bitstream *b)
{
    struct resource *found = resource_of(b->input);
    if (!found)
        return 0;
    if (b->number != s->collected && !s->faulty)
        violation("pictures were not collected in the order of submission");
    struct resource r = *found;
    int whole = s->headers == EVERY_PICTURE || (s->headers == FIRST_PICTURE && b->number == 0);
    uint32_t capacity = 2 * r.size + HEADER_BYTES + settings[PADDING];
    uint8_t *bytes = malloc(capacity);
    int engine = s->engine % settings[ENGINES], slow = settings[SLOW_US];
    b->state = ENCODING;
    unlock_state();
    pthread_mutex_lock(&engine_locks[engine]);
    if (slow)
        usleep(slow);
    int changed = checksum(&r) != b->checksum;
    int size = encode(s, b, &r, whole ? WITH_HEADERS : PICTURE_ONLY, bytes, capacity);
    engine_pictures[engine]++;
    pthread_mutex_unlock(&engine_locks[engine]);
    lock_state();
    if (changed)
        violation("an input changed before its picture was collected");
    b->bytes = bytes;
    b->size = size;
    struct mapping *m = find(b->input, MAPPING);
    if (m)
        m->pictures--;
    free(b->map);
    b->map = NULL;
    b->map_size = 0;
    s->collected++;
    b->state = LOCKED;
    return size > 0;
}

int finish_output(struct session *s, void *handle)
{
    struct mapping *m = find(handle, MAPPING);
    if (m->output->state != SUBMITTED)
        return 1;
    if (s->faulty && !resource_of(m->output->input))
        return 1; /* nobody waits for it */
    if (!finish_picture(s, m->output))
        return 0;
    const struct resource *r = find(m->resource, RESOURCE);
    uint32_t room = r->size - OUT_PARAMS_BYTES, size = m->output->size;
    uint32_t head[OUT_PARAMS_BYTES / 4] = {s->api | 1u << 16 | 7u << 28, size};
    memcpy((void *)r->address, head, sizeof head);
    memcpy((uint8_t *)r->address + sizeof head, m->output->bytes, size < room ? size : room);
    return 1;
}

/* Searches in registered memory. */

struct search {
    uint64_t address, size;
    const void *session;
    int registered, written;
};

static void match_resource(void *handle, void *state, void *more)
{
    struct search *search = more;
    struct resource *r = state;
    (void)handle;
    if (r->address >= search->address + search->size || search->address >= r->address + r->size)
        return;
    if (search->session && r->session != search->session)
        return;
    search->registered = 1;
    struct mapping *m = find(r->mapping, MAPPING);
    search->written |= m && m->output && m->output->state != EMPTY;
}

static struct search search_for(const void *session, uint64_t address, uint64_t size)
{
    struct search search = {address, size, session, 0, 0};
    each(RESOURCE, match_resource, &search);
    return search;
}

int registered_in(const void *encoder, uint64_t address, uint64_t size)
{
    return search_for(encoder, address, size).registered;
}

int registered_at(uint64_t address, uint64_t size) { return search_for(NULL, address, size).registered; }

int written_at(uint64_t address, uint64_t size) { return search_for(NULL, address, size).written; }

void check_streams(const struct session *s)
{
    for (int i = 0; i < 2; i++)
        if (s->streams[i] && (*s->streams[i] != s->stream_values[i] || !find(s->stream_values[i], STREAM)))
            violation("a stream of the session is gone");
}

/* What a session still has when it is destroyed is lost on a real driver; here it is freed and told. */

void free_bitstream(struct bitstream *b)
{
    free(b->bytes);
    free(b->map);
    free(b);
}

void free_mapping(void *handle)
{
    struct mapping *m = drop(handle, MAPPING);
    struct resource *r = find(m->resource, RESOURCE);
    if (r)
        r->mapping = NULL;
    if (m->output)
        free_bitstream(m->output);
    free(m);
}

static void reclaim(void *handle, void *state, void *encoder)
{
    if (*(void **)state != encoder)
        return;
    if (!((struct session *)find(encoder, SESSION))->faulty)
        violation("a session was destroyed before all it had was given back");
    if (find(handle, MAPPING))
        free_mapping(handle);
    else if (find(handle, BITSTREAM))
        free_bitstream(drop(handle, BITSTREAM));
    else
        free(drop(handle, RESOURCE));
}

void give_back_all(void *encoder)
{
    each(MAPPING, reclaim, encoder);
    each(RESOURCE, reclaim, encoder);
    each(BITSTREAM, reclaim, encoder);
}
