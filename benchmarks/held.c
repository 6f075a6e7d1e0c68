/* Preloaded into benchmarks/held_child.py: whatever the device has, a block may have HELD bytes of shared memory, as on
 * SM120. FlashAttention-2 asks the CUDA runtime for that number where the choice of a tile depends on it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>

enum { MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97, NOT_INITIALIZED = 3 }; /* of cudaDeviceAttr, of cudaError */

typedef int attribute_of(int *value, int attribute, int device);

unsigned held_answers; /* so far: a process sees by it whether FlashAttention-2 came by here */

static int found(struct dl_phdr_info *object, size_t size, void *path) {
    const char *slash = strrchr(object->dlpi_name, '/');
    const char *name = slash ? slash + 1 : object->dlpi_name;
    if (strncmp(name, "libcudart.so", strlen("libcudart.so"))) return 0;
    *(const char **)path = object->dlpi_name;
    return 1;
}

/* By its path: RTLD_NEXT does not see what Python loads for a module of its own. */
static attribute_of *of_runtime(void) {
    static attribute_of *known;
    const char *path = 0;
    if (!known && dl_iterate_phdr(found, &path))
        known = (attribute_of *)dlsym(dlopen(path, RTLD_LAZY | RTLD_NOLOAD), "cudaDeviceGetAttribute");
    return known;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    attribute_of *real = of_runtime();
    int failed = real ? real(value, attribute, device) : NOT_INITIALIZED;
    if (!failed && attribute == MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) *value = HELD, held_answers++;
    return failed;
}
