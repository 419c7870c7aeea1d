/* What dartsl computes in C on a CPU, for float and for double. Python calls `separable`, `pools`
 * and their gradients, see separable.py and pools.py; all maps are in channels_last.
 *
 * A batch is always parted in the same way, and the parts' sums are added in their order: any
 * number of threads gives the same bits. Functions return 0, or 1 where there is no memory.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of a vector: those of a register, as compilers are poor at longer ones. */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define INLINE static inline __attribute__((always_inline))
#define MAX_PARTS 32 /* of a batch that are summed apart */

typedef struct {
    int64_t images, sources, groups, inputs, outputs, height, width, kernel, stride, dilation;
    int64_t threads;
} Separable;

/* Of the three maps those that are 1. */
typedef struct {
    int64_t images, channels, height, width, stride, edges, identity, maximum, average;
    int64_t threads;
} Pools;

/* A batch in parts of whole images, of so many pixels each. */
typedef struct {
    int64_t images, pixels, number;
} Parts;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static Parts parts_of(int64_t images, int64_t pixels) {
    return (Parts){images, pixels, least(images, MAX_PARTS)};
}

static int64_t first_image(const Parts *parts, int64_t part) {
    return part * parts->images / parts->number;
}

static int64_t first_pixel(const Parts *parts, int64_t part) {
    return first_image(parts, part) * parts->pixels;
}

/* Room for so many bytes; a vector that begins in it may reach past its end. */
static void *memory(int64_t bytes) { return aligned_alloc(64, (size_t)(bytes / 64 + 2) * 64); }

static void *zeros(int64_t bytes) {
    void *room = memory(bytes);
    if (room != NULL) memset(room, 0, (size_t)(bytes / 64 + 2) * 64);
    return room;
}

/* Joins mean and sum of squared deviations of n numbers to those of `before` numbers (Chan et al.,
 * 1979). Nothing is lost where the mean is large beside the deviations. */
static void join(double *mean, double *squares, double before, double other, double more,
                 double n) {
    double delta = other - *mean;
    *mean += delta * n / (before + n);
    *squares += more + delta * delta * before * n / (before + n);
}

#define LANES ((int64_t)(BYTES / sizeof(REAL))) /* numbers in a vector */
#define Vector NAME(Vector)
#define Mask NAME(Mask)

#define REAL float
#define NAME(name) name##_float
#include "vector.h"
#include "batch_norm.h"
#include "depthwise.h"
#include "product.h"
#include "separable.h"
#include "pools.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(name) name##_double
#include "vector.h"
#include "batch_norm.h"
#include "depthwise.h"
#include "product.h"
#include "separable.h"
#include "pools.h"
