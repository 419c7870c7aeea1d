/* BatchNorm in training and its gradient, a part of the batch at a time.
 *
 * y [P, C] of P pixels and C channels gives
 *
 *     out = scale (y - mean) / sqrt(var + eps) + bias   [, ReLU]   [+ addend]
 *
 * with the mean and the variance of each channel of y. Its gradient is
 *
 *     dy = factor (g - sum(g) / P - (y - mean) / (var + eps) sum(g (y - mean)) / P)
 *
 * with factor = scale / sqrt(var + eps), where g is the gradient of out, 0 where ReLU's output is.
 */
#define BLOCK 64 /* pixels, and */
#define WIDTH 64 /* channels that are summed in one precision before they join the others */

typedef struct {
    int64_t channels, rectify;
    const REAL *mean, *inverse_std;
    REAL *factor, *shift; /* out = factor y + shift */
    REAL *slope, *offset; /* dy = slope (y - mean) + factor g + offset */
} NAME(Norm);

/* A norm by statistics [2, C], mean and 1 / sqrt(var + eps); `room` is for four times C numbers.
 * scale and bias may be NULL. */
static NAME(Norm) NAME(norm)(int64_t channels, int64_t rectify, const REAL *statistics,
                             const REAL *scale, const REAL *bias, REAL *room) {
    NAME(Norm) norm = {channels, rectify, statistics, statistics + channels,
                       room, room + channels, room + 2 * channels, room + 3 * channels};
    for (int64_t c = 0; c < channels; c++) {
        norm.factor[c] = norm.inverse_std[c] * (scale ? scale[c] : 1);
        norm.shift[c] = (bias ? bias[c] : 0) - norm.mean[c] * norm.factor[c];
    }
    return norm;
}

/* Joins n pixels of y [n, C] to the mean and the squared deviations [2, C] of those before. */
static void NAME(add_moments)(int64_t n, int64_t channels, const REAL *y, int64_t before,
                              double *moments) {
    for (int64_t c = 0; c < channels; c += WIDTH) {
        int64_t width = least(channels - c, WIDTH);
        REAL mean[WIDTH] = {0}, rest[WIDTH] = {0}, square[WIDTH] = {0};
        for (int64_t p = 0; p < n; p++)
            for (int64_t l = 0; l < width; l++) mean[l] += y[p * channels + c + l];
        for (int64_t l = 0; l < width; l++) mean[l] /= (REAL)n;
        for (int64_t p = 0; p < n; p++)
            for (int64_t l = 0; l < width; l++) {
                REAL deviation = y[p * channels + c + l] - mean[l];
                rest[l] += deviation; /* 0 but for the rounding of the mean */
                square[l] += deviation * deviation;
            }
        for (int64_t l = 0; l < width; l++)
            join(moments + c + l, moments + channels + c + l, (double)before,
                 (double)mean[l] + (double)rest[l] / (double)n, (double)square[l], (double)n);
    }
}

/* Statistics [3, C] of y: mean, 1 / sqrt(var + eps), variance without bias; from the parts' moments,
 * [2, C] each. */
static void NAME(summarize)(const Parts *parts, int64_t channels, double eps,
                            const double *moments, REAL *statistics) {
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

/* out of n pixels. The addend may be NULL. */
static void NAME(normalize)(const NAME(Norm) * norm, int64_t n, const REAL *y, const REAL *addend,
                            REAL *out) {
    int64_t channels = norm->channels;
    const REAL *factor = norm->factor, *shift = norm->shift;
    for (int64_t p = 0; p < n; p++, y += channels, out += channels) {
        for (int64_t c = 0; c < channels; c++) out[c] = y[c] * factor[c] + shift[c];
        if (norm->rectify)
            for (int64_t c = 0; c < channels; c++) out[c] = out[c] < 0 ? 0 : out[c]; /* NaN stays */
        if (addend)
            for (int64_t c = 0; c < channels; c++) out[c] += addend[p * channels + c];
    }
}

/* Adds sum(g) and sum(g (y - mean)) of n pixels to the sums [2, C]. */
static void NAME(add_sums)(const NAME(Norm) * norm, int64_t n, const REAL *gradient, const REAL *y,
                           double *sums) {
    int64_t channels = norm->channels;
    REAL a[WIDTH], b[WIDTH];
    for (int64_t begin = 0; begin < n; begin += BLOCK)
        for (int64_t start = 0; start < channels; start += WIDTH) {
            int64_t end = least(n, begin + BLOCK), width = least(channels - start, WIDTH);
            const REAL *factor = norm->factor + start, *shift = norm->shift + start;
            const REAL *mean = norm->mean + start;
            for (int64_t c = 0; c < width; c++) a[c] = b[c] = 0;
            for (int64_t p = begin; p < end; p++) {
                const REAL *from = y + p * channels + start, *g = gradient + p * channels + start;
                if (norm->rectify)
                    for (int64_t c = 0; c < width; c++) {
                        REAL passed = from[c] * factor[c] + shift[c] <= 0 ? 0 : g[c];
                        a[c] += passed;
                        b[c] += passed * (from[c] - mean[c]);
                    }
                else
                    for (int64_t c = 0; c < width; c++) {
                        a[c] += g[c];
                        b[c] += g[c] * (from[c] - mean[c]);
                    }
            }
            for (int64_t c = 0; c < width; c++) {
                sums[start + c] += (double)a[c];
                sums[channels + start + c] += (double)b[c];
            }
        }
}

/* slope and offset of the gradient, and the gradients of scale and bias, which may be NULL, from the
 * parts' sums. */
static void NAME(add_up)(const NAME(Norm) * norm, const Parts *parts, const double *sums,
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

/* The gradient of y of n pixels. */
static void NAME(gradient_of_y)(const NAME(Norm) * norm, int64_t n, const REAL *gradient,
                                const REAL *y, REAL *to) {
    int64_t channels = norm->channels;
    const REAL *mean = norm->mean, *factor = norm->factor, *shift = norm->shift;
    const REAL *slope = norm->slope, *offset = norm->offset;
    for (; n > 0; n--, gradient += channels, y += channels, to += channels)
        if (norm->rectify)
            for (int64_t c = 0; c < channels; c++) {
                REAL passed = y[c] * factor[c] + shift[c] <= 0 ? 0 : gradient[c];
                to[c] = slope[c] * (y[c] - mean[c]) + factor[c] * passed + offset[c];
            }
        else
            for (int64_t c = 0; c < channels; c++)
                to[c] = slope[c] * (y[c] - mean[c]) + factor[c] * gradient[c] + offset[c];
}

#undef BLOCK
#undef WIDTH
