/* BatchNorm in training and its gradient, a part of the batch at a time.
 *
 * y [P, C] of P pixels and C channels gives
 *
 *     out = scale (y - mean) / sqrt(var + eps) + bias   [+ addend]
 *
 * with the mean and the variance of each channel of y. Its gradient is
 *
 *     dy = factor (g - sum(g) / P - (y - mean) / (var + eps) sum(g (y - mean)) / P)
 *
 * with factor = scale / sqrt(var + eps), where g is the gradient of out.
 */
#define BLOCK 64  /* pixels that are summed in one precision before they join the others */
#define VECTORS 8 /* of channels, whose sums are in the cache meanwhile */

/* Calls one of the functions below for the channels from `begin` to `end`, a vector after the
 * other: memory is passed over in order. Where the last vector is not full, it begins earlier; so
 * many channels that were done before are `skipped` in sums. Only where there are less channels
 * than a vector has, `lanes` is not the constant LANES. */
#define BY_VECTOR(begin, end, function, ...)                                                       \
    for (int64_t next = begin; next < end; next += LANES) {                                        \
        int64_t first = least(next, end - LANES);                                                  \
        if (first >= 0) NAME(function)(__VA_ARGS__, first, next - first, LANES);                   \
        else NAME(function)(__VA_ARGS__, 0, 0, end);                                               \
    }

/* By channel, and room for a vector behind the last one. */
typedef struct {
    int64_t channels;
    const REAL *inverse_std;
    REAL *mean, *factor, *shift; /* out = factor y + shift */
    REAL *slope, *offset;        /* dy = slope (y - mean) + factor g + offset */
} NAME(Norm);

/* A norm by statistics [2, C], mean and 1 / sqrt(var + eps). scale and bias may be NULL. `room` is
 * for `size_of_norm` bytes. */
static int64_t NAME(size_of_norm)(int64_t channels) {
    return 5 * (channels + LANES) * (int64_t)sizeof(REAL);
}

static NAME(Norm) NAME(norm)(int64_t channels, const REAL *statistics, const REAL *scale,
                             const REAL *bias, REAL *room) {
    int64_t step = channels + LANES;
    NAME(Norm) norm = {channels,        statistics + channels, room,           room + step,
                       room + 2 * step, room + 3 * step,       room + 4 * step};
    for (int64_t c = 0; c < channels; c++) {
        norm.mean[c] = statistics[c];
        norm.factor[c] = norm.inverse_std[c] * (scale ? scale[c] : 1);
        norm.shift[c] = (bias ? bias[c] : 0) - norm.mean[c] * norm.factor[c];
    }
    return norm;
}

INLINE void NAME(moments_of)(int64_t n, int64_t channels, const REAL *y, int64_t before,
                             double *moments, int64_t first, int64_t skipped, int64_t lanes) {
    Vector mean = {0}, rest = {0}, square = {0};
    for (int64_t p = 0; p < n; p++) mean += NAME(some)(y + p * channels + first, lanes);
    mean /= (REAL)n;
    for (int64_t p = 0; p < n; p++) {
        Vector value = NAME(some)(y + p * channels + first, lanes) - mean;
        rest += value; /* 0 but for the rounding of the mean */
        square += value * value;
    }
    for (int64_t l = skipped; l < lanes; l++)
        join(moments + first + l, moments + channels + first + l, (double)before,
             (double)mean[l] + (double)rest[l] / (double)n, (double)square[l], (double)n);
}

/* Joins n pixels of y [n, C] to the mean and the squared deviations [2, C] of those before. */
static void NAME(add_moments)(int64_t n, int64_t channels, const REAL *y, int64_t before,
                              double *moments) {
    BY_VECTOR(0, channels, moments_of, n, channels, y, before, moments)
}

/* Statistics [3, C] of y: mean, 1 / sqrt(var + eps), variance without bias; from the parts'
 * moments, [2, C] each. */
static void NAME(summarize)(const Parts *parts, int64_t channels, double eps, const double *moments,
                            REAL *statistics) {
    double pixels = (double)first_pixel(parts, parts->number);
    for (int64_t c = 0; c < channels; c++) {
        double mean = 0, squares = 0;
        for (int64_t part = 0; part < parts->number; part++) {
            const double *of_part = moments + part * 2 * channels + c;
            int64_t before = first_pixel(parts, part), n = first_pixel(parts, part + 1) - before;
            join(&mean, &squares, (double)before, of_part[0], of_part[channels], (double)n);
        }
        statistics[c] = (REAL)mean;
        statistics[channels + c] = (REAL)(1 / sqrt(squares / pixels + eps));
        statistics[2 * channels + c] = (REAL)(squares / (pixels - 1));
    }
}

INLINE void NAME(normal_of)(const NAME(Norm) *norm, const REAL *y, const REAL *addend, REAL *out,
                            int64_t first, int64_t skipped, int64_t lanes) {
    (void)skipped;
    Vector value = NAME(some)(y + first, lanes);
    value = value * NAME(load)(norm->factor + first) + NAME(load)(norm->shift + first);
    if (addend) value += NAME(some)(addend + first, lanes);
    NAME(copy)(out + first, &value, lanes);
}

/* out of n pixels. The addend may be NULL. */
static void NAME(normalize)(const NAME(Norm) *norm, int64_t n, const REAL *y, const REAL *addend,
                            REAL *out) {
    int64_t channels = norm->channels;
    for (int64_t at = 0; at < n * channels; at += channels) {
        const REAL *other = addend ? addend + at : NULL;
        BY_VECTOR(0, channels, normal_of, norm, y + at, other, out + at)
    }
}

INLINE void NAME(sums_of)(const NAME(Norm) *norm, const REAL *gradient, const REAL *y,
                          int64_t begin, Vector (*sums)[VECTORS], int64_t first, int64_t skipped,
                          int64_t lanes) {
    Vector g = NAME(some)(gradient + first, lanes), value = NAME(some)(y + first, lanes);
    int64_t vector = (first + skipped - begin) / LANES;
    sums[0][vector] += g;
    sums[1][vector] += g * (value - NAME(load)(norm->mean + first));
}

INLINE void NAME(totals_of)(int64_t channels, int64_t begin, Vector (*sums)[VECTORS],
                            double *totals, int64_t first, int64_t skipped, int64_t lanes) {
    int64_t vector = (first + skipped - begin) / LANES;
    for (int64_t l = skipped; l < lanes; l++) {
        totals[first + l] += (double)sums[0][vector][l];
        totals[channels + first + l] += (double)sums[1][vector][l];
    }
}

/* Adds sum(g) and sum(g (y - mean)) of n pixels to the totals [2, C]. */
static void NAME(add_sums)(const NAME(Norm) *norm, int64_t n, const REAL *gradient, const REAL *y,
                           double *totals) {
    int64_t channels = norm->channels;
    for (int64_t from = 0; from < n; from += BLOCK)
        for (int64_t begin = 0; begin < channels; begin += VECTORS * LANES) {
            int64_t to = least(n, from + BLOCK), end = least(channels, begin + VECTORS * LANES);
            Vector sums[2][VECTORS] = {{{0}}};
            for (int64_t at = from * channels; at < to * channels; at += channels)
                BY_VECTOR(begin, end, sums_of, norm, gradient + at, y + at, begin, sums)
            BY_VECTOR(begin, end, totals_of, channels, begin, sums, totals)
        }
}

/* slope and offset of the gradient, and the gradients of scale and bias, which may be NULL, from
 * the parts' sums. */
static void NAME(add_up)(const NAME(Norm) *norm, const Parts *parts, const double *sums,
                         REAL *gscale, REAL *gbias) {
    int64_t channels = norm->channels;
    double pixels = (double)first_pixel(parts, parts->number);
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0, product = 0, inverse = (double)norm->inverse_std[c];
        for (int64_t part = 0; part < parts->number; part++) {
            sum += sums[part * 2 * channels + c];
            product += sums[(part * 2 + 1) * channels + c];
        }
        double share = (double)norm->factor[c] / pixels;
        norm->slope[c] = (REAL)(-share * inverse * inverse * product);
        norm->offset[c] = (REAL)(-share * sum);
        if (gscale) gscale[c] = (REAL)(inverse * product);
        if (gbias) gbias[c] = (REAL)sum;
    }
}

INLINE void NAME(gradient_of)(const NAME(Norm) *norm, const REAL *gradient, const REAL *y, REAL *to,
                              int64_t first, int64_t skipped, int64_t lanes) {
    (void)skipped;
    Vector g = NAME(some)(gradient + first, lanes), value = NAME(some)(y + first, lanes);
    value = NAME(load)(norm->slope + first) * (value - NAME(load)(norm->mean + first)) +
            NAME(load)(norm->factor + first) * g + NAME(load)(norm->offset + first);
    NAME(copy)(to + first, &value, lanes);
}

/* The gradient of y of n pixels. */
static void NAME(gradient_of_y)(const NAME(Norm) *norm, int64_t n, const REAL *gradient,
                                const REAL *y, REAL *to) {
    int64_t channels = norm->channels;
    for (int64_t at = 0; at < n * channels; at += channels)
        BY_VECTOR(0, channels, gradient_of, norm, gradient + at, y + at, to + at)
}

#undef BY_VECTOR
#undef VECTORS
#undef BLOCK
