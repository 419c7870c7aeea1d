/* A 1x1 convolution in groups and the BatchNorm after it, in training, and their gradients.
 *
 * P pixels (of all images), G groups of I inputs and O outputs, C = G O channels. x [P, G I] and
 * weight [C, I] give
 *
 *     y = weight x,   out = scale (y - mean) / sqrt(var + eps)   [, ReLU]   [+ addend]
 *
 * with the mean and the variance of each channel of y. What is computed of a block of pixels is
 * used while it is in the cache: the statistics with y; the gradient of y, which is never written
 * to memory, for both gradients of the convolution.
 */
#define ROWS 8   /* of a product that are in registers at once */
#define BLOCK 64 /* pixels */
#define WIDTH 64 /* channels that are summed at once */

/* c [rows, columns] = a [rows, depth] b [depth, columns], or that added to it. Columns are taken a
 * vector at a time; `lanes` of it are written, as more may be read from b than it has columns. The
 * element of a at (m, k) is a[m * a_row + k * a_column]. */
static inline __attribute__((always_inline)) void NAME(tile)(
    const int rows, int64_t lanes, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column,
    const REAL *b, int64_t b_row, REAL *c, int64_t c_row, const int adding) {
    Vector sums[ROWS], right;
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) sums[m] = (Vector){0};
    for (int64_t k = 0; k < depth; k++) {
        memcpy(&right, b + k * b_row, BYTES);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) sums[m] += a[m * a_row + k * a_column] * right;
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) {
        REAL *to = c + m * c_row;
        if (lanes < LANES) {
            for (int64_t n = 0; n < lanes; n++) to[n] = sums[m][n] + (adding ? to[n] : 0);
            continue;
        }
        if (adding) memcpy(&right, to, BYTES), sums[m] += right;
        memcpy(to, &sums[m], BYTES);
    }
}

static inline __attribute__((always_inline)) void NAME(product)(
    int64_t rows, int64_t columns, int64_t depth, const REAL *a, int64_t a_row, int64_t a_column,
    const REAL *b, int64_t b_row, REAL *c, int64_t c_row, const int adding) {
    for (int64_t n = 0; n < columns; n += LANES) {
        int64_t lanes = least(columns - n, LANES), m = 0;
        for (; m + ROWS <= rows; m += ROWS)
            NAME(tile)(ROWS, lanes, depth, a + m * a_row, a_row, a_column, b + n, b_row,
                       c + m * c_row + n, c_row, adding);
        for (; m < rows; m++)
            NAME(tile)(1, lanes, depth, a + m * a_row, a_row, a_column, b + n, b_row,
                       c + m * c_row + n, c_row, adding);
    }
}

/* out = factor y + shift. */
static void NAME(affine)(int64_t channels, const REAL *mean, const REAL *inverse_std,
                         const REAL *scale, REAL *factor, REAL *shift) {
    for (int64_t c = 0; c < channels; c++) {
        factor[c] = inverse_std[c] * (scale ? scale[c] : 1);
        shift[c] = -mean[c] * factor[c];
    }
}

/* Joins n pixels of y [n, C] to the moments of its channels. */
static void NAME(add_moments)(int64_t n, int64_t channels, const REAL *y, double before,
                              double *means, double *squares) {
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
            join(means + c + l, squares + c + l, before,
                 (double)mean[l] + (double)rest[l] / (double)n, (double)square[l], (double)n);
    }
}

/* y of some pixels and its moments; `turned` is the weight as [G, I, O]. */
static void NAME(convolve)(const Pointwise *s, int64_t begin, int64_t end, const REAL *x,
                           const REAL *turned, REAL *y, double *means, double *squares) {
    int64_t inputs = s->inputs, outputs = s->outputs;
    int64_t channels = s->groups * outputs, width = s->groups * inputs;
    for (int64_t p = begin; p < end; p += BLOCK) {
        int64_t n = least(end - p, BLOCK);
        for (int64_t m = p; m < p + n; m += ROWS) /* all groups: memory is passed over in order */
            for (int64_t g = 0; g < s->groups; g++)
                NAME(product)(least(p + n - m, ROWS), outputs, inputs, x + m * width + g * inputs,
                              width, 1, turned + g * inputs * outputs, outputs,
                              y + m * channels + g * outputs, channels, 0);
        NAME(add_moments)(n, channels, y + p * channels, (double)(p - begin), means, squares);
    }
}

/* out of some pixels. */
static void NAME(normalize)(const Pointwise *s, int64_t begin, int64_t end, const REAL *y,
                            const REAL *factor, const REAL *shift, const REAL *addend, REAL *out) {
    int64_t channels = s->groups * s->outputs;
    for (int64_t p = begin; p < end; p++) {
        const REAL *from = y + p * channels;
        REAL *to = out + p * channels;
        for (int64_t c = 0; c < channels; c++) to[c] = from[c] * factor[c] + shift[c];
        if (s->rectify)
            for (int64_t c = 0; c < channels; c++) to[c] = to[c] < 0 ? 0 : to[c]; /* NaN stays */
        if (addend)
            for (int64_t c = 0; c < channels; c++) to[c] += addend[p * channels + c];
    }
}

/* The statistics [3, C] of y from the moments of the parts, mean and squares [2, C] each. */
static void NAME(summarize)(const Pointwise *s, double eps, const double *moments,
                            REAL *statistics) {
    int64_t channels = s->groups * s->outputs, pixels = s->pixels, parts = parts_of(pixels);
    for (int64_t c = 0; c < channels; c++) {
        double mean = 0, squares = 0;
        for (int64_t part = 0; part < parts; part++) {
            const double *of_part = moments + part * 2 * channels + c;
            double before = (double)begin_of(part, parts, pixels);
            double n = (double)begin_of(part + 1, parts, pixels) - before;
            join(&mean, &squares, before, of_part[0], of_part[channels], n);
        }
        statistics[c] = (REAL)mean;
        statistics[channels + c] = (REAL)(1 / sqrt(squares / (double)pixels + eps));
        statistics[2 * channels + c] = (REAL)(squares / (double)(pixels - 1));
    }
}

/* y, out [P, C]; statistics [3, C]: mean, 1 / sqrt(var + eps), variance without bias. scale [C] and
 * addend [P, C] may be NULL. */
int NAME(pointwise)(const Pointwise *s, double eps, const REAL *x, const REAL *weight,
                    const REAL *scale, const REAL *addend, REAL *y, REAL *out,
                    REAL *statistics) {
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    int64_t pixels = s->pixels, parts = parts_of(pixels), real = sizeof(REAL);
    REAL *turned = zeros(channels * inputs * real), *factor = zeros(2 * channels * real);
    double *moments = zeros(parts * 2 * channels * (int64_t)sizeof(double));
    int failed = !turned || !factor || !moments;
    if (!failed) {
        REAL *shift = factor + channels;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < inputs; i++)
                turned[(c / outputs * inputs + i) * outputs + c % outputs] = weight[c * inputs + i];
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
        for (int64_t part = 0; part < parts; part++)
            NAME(convolve)(s, begin_of(part, parts, pixels), begin_of(part + 1, parts, pixels), x,
                           turned, y, moments + part * 2 * channels,
                           moments + (part * 2 + 1) * channels);
        NAME(summarize)(s, eps, moments, statistics);
        NAME(affine)(channels, statistics, statistics + channels, scale, factor, shift);
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
        for (int64_t part = 0; part < parts; part++)
            NAME(normalize)(s, begin_of(part, parts, pixels), begin_of(part + 1, parts, pixels), y,
                            factor, shift, addend, out);
    }
    free(turned), free(factor), free(moments);
    return failed;
}

/* What the gradient of y is made of, [C] each: slope (y - mean) + factor g + offset. */
typedef struct {
    const REAL *mean;
    REAL *factor, *shift, *slope, *offset;
} NAME(Gradient);

/* Adds to the sums [C] of g and of g (y - mean) over some pixels; g is 0 where ReLU's output is. */
static void NAME(add_sums)(const Pointwise *s, int64_t begin, int64_t end, const REAL *gradient,
                           const REAL *y, const NAME(Gradient) * of, double *sums,
                           double *products) {
    int64_t channels = s->groups * s->outputs;
    REAL a[WIDTH], b[WIDTH];
    for (int64_t p = begin; p < end; p += BLOCK)
        for (int64_t start = 0; start < channels; start += WIDTH) {
            int64_t pixels = least(end - p, BLOCK), width = least(channels - start, WIDTH);
            const REAL *factor = of->factor + start, *shift = of->shift + start;
            const REAL *mean = of->mean + start;
            for (int64_t c = 0; c < width; c++) a[c] = b[c] = 0;
            for (int64_t n = 0; n < pixels; n++) {
                const REAL *from = y + (p + n) * channels + start;
                const REAL *g = gradient + (p + n) * channels + start;
                if (s->rectify)
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
                products[start + c] += (double)b[c];
            }
        }
}

/* The gradient of y, [n, C]. */
static void NAME(gradient_of_y)(const Pointwise *s, int64_t n, const REAL *gradient, const REAL *y,
                                const NAME(Gradient) * of, REAL *to) {
    const REAL *mean = of->mean, *factor = of->factor, *shift = of->shift;
    const REAL *slope = of->slope, *offset = of->offset;
    int64_t channels = s->groups * s->outputs;
    for (; n > 0; n--, gradient += channels, y += channels, to += channels)
        if (s->rectify)
            for (int64_t c = 0; c < channels; c++) {
                REAL passed = y[c] * factor[c] + shift[c] <= 0 ? 0 : gradient[c];
                to[c] = slope[c] * (y[c] - mean[c]) + factor[c] * passed + offset[c];
            }
        else
            for (int64_t c = 0; c < channels; c++)
                to[c] = slope[c] * (y[c] - mean[c]) + factor[c] * gradient[c] + offset[c];
}

/* gx of some pixels, and their share of the weight's gradient, `turned` [G, I, O]; each may be
 * NULL. gy [BLOCK, C] is for what is computed on the way; it and weight [C, I] have room for a
 * vector behind them. */
static void NAME(differentiate)(const Pointwise *s, int64_t begin, int64_t end,
                                const REAL *gradient, const REAL *x, const REAL *weight,
                                const REAL *y, const NAME(Gradient) * of, REAL *gy, REAL *gx,
                                REAL *turned) {
    int64_t inputs = s->inputs, outputs = s->outputs;
    int64_t channels = s->groups * outputs, width = s->groups * inputs;
    for (int64_t p = begin; p < end; p += BLOCK) {
        int64_t n = least(end - p, BLOCK);
        NAME(gradient_of_y)(s, n, gradient + p * channels, y + p * channels, of, gy);
        for (int64_t m = 0; m < n && gx; m += ROWS)
            for (int64_t g = 0; g < s->groups; g++)
                NAME(product)(least(n - m, ROWS), inputs, outputs, gy + m * channels + g * outputs,
                              channels, 1, weight + g * outputs * inputs, inputs,
                              gx + (p + m) * width + g * inputs, width, 0);
        for (int64_t g = 0; g < s->groups && turned; g++)
            NAME(product)(inputs, outputs, n, x + p * width + g * inputs, 1, width,
                          gy + g * outputs, channels, turned + g * inputs * outputs, outputs, 1);
    }
}

/* slope and offset, and the gradient of the scale, which may be NULL, from the parts' sums of g and
 * of g (y - mean), [2, C] each. */
static void NAME(add_up)(const Pointwise *s, const double *sums, const REAL *inverse_std,
                         const NAME(Gradient) * of, REAL *gscale) {
    int64_t channels = s->groups * s->outputs, parts = parts_of(s->pixels);
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0, product = 0, inverse = (double)inverse_std[c];
        for (int64_t part = 0; part < parts; part++) {
            sum += sums[part * 2 * channels + c];
            product += sums[(part * 2 + 1) * channels + c];
        }
        double share = (double)of->factor[c] / (double)s->pixels;
        of->slope[c] = (REAL)(-share * inverse * inverse * product);
        of->offset[c] = (REAL)(-share * sum);
        if (gscale) gscale[c] = (REAL)(inverse * product);
    }
}

/* The weight's gradient [C, I] from the parts' shares, [G, I, O] each. */
static void NAME(turn_back)(const Pointwise *s, const REAL *turned, REAL *gw) {
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    int64_t parts = parts_of(s->pixels);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < inputs; i++) {
            const REAL *from = turned + (c / outputs * inputs + i) * outputs + c % outputs;
            double sum = 0;
            for (int64_t part = 0; part < parts; part++) sum += from[part * channels * inputs];
            gw[c * inputs + i] = (REAL)sum;
        }
}

/* Gradients of x, weight and scale from that of out; each may be NULL where it is not wanted. */
int NAME(pointwise_backward)(const Pointwise *s, const REAL *gradient, const REAL *x,
                             const REAL *weight, const REAL *scale, const REAL *y,
                             const REAL *statistics, REAL *gx, REAL *gw, REAL *gscale) {
    int64_t channels = s->groups * s->outputs, size = channels * s->inputs;
    int64_t pixels = s->pixels, parts = parts_of(pixels), real = sizeof(REAL);
    int64_t block = BLOCK * channels + LANES; /* no part reads what another one writes */
    double *sums = zeros(parts * 2 * channels * (int64_t)sizeof(double));
    REAL *factor = zeros(4 * channels * real), *weights = zeros(size * real);
    REAL *gy = zeros(parts * block * real), *turned = zeros(gw ? parts * size * real : 0);
    int failed = !sums || !factor || !weights || !gy || !turned;
    if (!failed) {
        const REAL *mean = statistics, *inverse_std = statistics + channels;
        NAME(Gradient) of = {mean, factor, factor + channels, factor + 2 * channels,
                             factor + 3 * channels};
        memcpy(weights, weight, (size_t)(size * real));
        NAME(affine)(channels, mean, inverse_std, scale, of.factor, of.shift);
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
        for (int64_t part = 0; part < parts; part++)
            NAME(add_sums)(s, begin_of(part, parts, pixels), begin_of(part + 1, parts, pixels),
                           gradient, y, &of, sums + part * 2 * channels,
                           sums + (part * 2 + 1) * channels);
        NAME(add_up)(s, sums, inverse_std, &of, gscale);
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
        for (int64_t part = 0; part < (gx || gw ? parts : 0); part++)
            NAME(differentiate)(s, begin_of(part, parts, pixels), begin_of(part + 1, parts, pixels),
                                gradient, x, weights, y, &of, gy + part * block, gx,
                                gw ? turned + part * size : NULL);
        if (gw) NAME(turn_back)(s, turned, gw);
    }
    free(sums), free(factor), free(weights), free(gy), free(turned);
    return failed;
}

#undef ROWS
#undef BLOCK
#undef WIDTH
