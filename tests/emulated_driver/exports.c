/* The two exports of the emulated libnvidia-encode. They hand out the functions of the API version that is asked
 * for, as a driver does for every version up to its own. */
#include "emulated.h"

#include <stddef.h>

enum { INVALID_PTR = 6, INVALID_VERSION = 15 };

int create_instance_11_1(void *list);
int create_instance_12_1(void *list);
int create_instance_13_0(void *list);

static const struct {
    int code; /* major << 4 | minor */
    int (*create)(void *list);
} versions[] = {{0xB1, create_instance_11_1}, {0xC1, create_instance_12_1}, {0xD0, create_instance_13_0}};

int sessions_opened;

EXPORT int NvEncodeAPIGetMaxSupportedVersion(uint32_t *version)
{
    *version = settings[VERSION];
    return leave(enter("NvEncodeAPIGetMaxSupportedVersion").status);
}

EXPORT int NvEncodeAPICreateInstance(uint32_t *list)
{
    int status = leave(enter("NvEncodeAPICreateInstance").status);
    if (status || !list)
        return status ? status : INVALID_PTR;
    int code = (int)((*list & 0xFF) << 4 | (*list >> 24 & 0xF)); /* of the version word */
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++)
        if (versions[i].code == code && code <= settings[ACCEPTS])
            return versions[i].create(list);
    return INVALID_VERSION;
}
