/* What dartsl computes in C on a CPU, for float and for double. Python calls these functions, see
 * the modules beside them; all tensors are in channels_last.
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
#define MAX_PARTS 32 /* of a batch that are summed apart */
#define PART 512     /* pixels of a part at least */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* A vector that begins in the buffer may reach past its last number. */
static void *zeros(int64_t bytes) {
    size_t rounded = (size_t)(bytes / 64 + 2) * 64;
    void *buffer = aligned_alloc(64, rounded);
    if (buffer != NULL) memset(buffer, 0, rounded);
    return buffer;
}

/* Joins mean and sum of squared deviations of n numbers to those of `before` numbers (Chan et al.,
 * 1979). Nothing is lost where the mean is large beside the deviations. */
static void join(double *mean, double *squares, double before, double other, double more,
                 double n) {
    double delta = other - *mean;
    *mean += delta * n / (before + n);
    *squares += more + delta * delta * before * n / (before + n);
}

/* How many parts the pixels of a batch are summed in, and where one starts. */
static int64_t parts_of(int64_t pixels) {
    return pixels < 2 * PART ? 1 : least(pixels / PART, MAX_PARTS);
}

static int64_t begin_of(int64_t part, int64_t parts, int64_t pixels) {
    return part * pixels / parts;
}

typedef struct {
    int64_t images, channels, height, width, kernel, stride, dilation, threads;
} Depthwise;

typedef struct {
    int64_t pixels, groups, inputs, outputs, rectify, threads;
} Pointwise;

typedef struct {
    int64_t pixels, channels, copies, readers, threads;
} Copies;

#define LANES ((int64_t)(BYTES / sizeof(REAL))) /* numbers in a vector */
#define Vector NAME(Vector)

#define REAL float
#define NAME(name) name##_float
typedef REAL Vector __attribute__((vector_size(BYTES)));
#include "copies.h"
#include "depthwise.h"
#include "pointwise.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(name) name##_double
typedef REAL Vector __attribute__((vector_size(BYTES)));
#include "copies.h"
#include "depthwise.h"
#include "pointwise.h"
