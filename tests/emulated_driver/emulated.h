/* What the parts of the emulated driver share: handles, the lock, faults on order, broken rules, settings. */
#pragma once
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum kind { MEMORY = 1, EVENT, STREAM, SESSION, RESOURCE, MAPPING, BITSTREAM, KINDS };

struct fault {
    int status; /* 0: none */
    int after;  /* the work is done before the status is returned */
};

/* Settings by name (emulated_set). VERSION is what the driver claims, ACCEPTS the newest API it takes. */
enum setting {
    VERSION, ACCEPTS, ENGINES, SESSION_LIMIT, SLOW_US, HEADER_PADDING, PADDING, HEVC, YUV444, TEN_BIT, LOSSLESS,
    RESIZE, VIDMEM, WIDTH_MIN, HEIGHT_MIN, WIDTH_MAX, HEIGHT_MAX, SETTINGS
};
extern int settings[SETTINGS];

/* Take the lock, count the call and say whether it has to fail; `leave` gives the lock back. */
struct fault enter(const char *call);
int leave(int status);
void lock_state(void);
void unlock_state(void);

/* Handles are never reused: a stale one finds nothing. All with the lock held. */
void *new_handle(enum kind kind, void *state);
void *find(const void *handle, enum kind kind);
void *drop(const void *handle, enum kind kind); /* returns the state, which the caller frees */
void each(enum kind kind, void (*visit)(void *handle, void *state, void *more), void *more);
int count(enum kind kind);

/* A rule of the interface that the client broke, whatever the call returns; the first is kept. */
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* libcuda as libnvidia-encode sees it, and back. */
void *current_context(void);
int is_memory(uint64_t address, uint64_t size);
int registered_at(uint64_t address, uint64_t size); /* whether an encoder has a resource in there */
int written_at(uint64_t address, uint64_t size);    /* whether an encoder may still write there */
