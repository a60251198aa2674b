/* The state of the emulated NVENC, the same for every API version: sessions, resources, pictures. */
#pragma once
#include "emulated.h"

#define HEADER_BYTES 4096
#define OUT_PARAMS_BYTES 256 /* of NV_ENC_ENCODE_OUT_PARAMS, ahead of a bitstream in device memory */

enum parts { PICTURE_ONLY, WITH_HEADERS, HEADERS_ONLY };
enum state { EMPTY, SUBMITTED, ENCODING, LOCKED };
enum headers { NEVER, FIRST_PICTURE, EVERY_PICTURE };

struct session {
    void *context;
    uint32_t api; /* the version of every structure of its session */
    int failed, initialized, engine;
    int faulty; /* a call failed on order: what was in flight then may never come out */
    uint32_t width, height, format;
    int qp;           /* -1: lossless */
    int mapped;       /* pictures may come with a QP map */
    int reorders;     /* B pictures or lookahead: pictures are held back */
    int vidmem;       /* bitstreams go to device memory */
    enum headers headers;
    void *setup; /* what it was initialized with, in the structures of its API */
    void **streams[2];
    void *stream_values[2];
    uint64_t submitted, collected; /* pictures */
    char message[160];
};

struct resource {
    void *session;
    uint64_t address, size;
    uint32_t width, height, pitch, format;
    int output;
    void *mapping;
};

/* A picture on its way, and the place its bytes come to: a bitstream buffer or an output mapping. */
struct bitstream {
    void *session, *input; /* `input`: the mapping it reads */
    enum state state;
    uint64_t number, stamp, checksum;
    int qp;
    int8_t *map;
    uint32_t map_size, size;
    uint8_t *bytes;
};

struct mapping {
    void *session, *resource;
    int pictures;             /* submitted from this input and not collected yet */
    struct bitstream *output; /* of output mappings */
};

void note_fault(const void *encoder, const char *call, int status);
void *owned(const void *encoder, const void *handle, enum kind kind); /* state of a handle of the session */
int registered_in(const void *encoder, uint64_t address, uint64_t size);
void give_back_all(void *encoder);
void free_bitstream(struct bitstream *b);
void free_mapping(void *handle);
void check_streams(const struct session *s);

/* A submitted picture; `frame` is read when it is collected, and must not have changed by then. */
void start_picture(struct session *s, struct bitstream *b, void *input, uint64_t stamp, const int8_t *map,
                   uint32_t map_size);
/* Encode the picture of `b` on the engine of its session, giving up the lock meanwhile. Returns success. */
int finish_picture(struct session *s, struct bitstream *b);
/* The same for an output mapping, into its device memory. */
int finish_output(struct session *s, void *handle);
/* Parameter sets of the session. Returns the bytes. */
uint32_t write_headers(const struct session *s, uint8_t *out, uint32_t capacity);
