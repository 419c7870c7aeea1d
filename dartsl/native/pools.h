/* The maps that all edges leaving a node share, weighed and summed for each of the k edges.
 *
 * x [B, H, W, C] itself (where it is one of the maps; its stride is 1) and its 3 x 3 pools of
 * stride 1 or 2, the maximum and the average of the pixels within x, each with its BatchNorm in
 * training: M maps. Edge e has
 *
 *     out[e] = sum over the maps m of weight[e, m] map[m]
 *
 * A pool's map is never in memory in its normalized form: an edge's weights and the norms together
 * are one factor for every map and channel, and one shift.
 */
#define BLOCK 64 /* pixels that are summed in one precision before they join the others */
#define MAPS 3

/* Calls a function with the number of maps as a constant. */
#define WITH_MAPS(maps, function, ...)                                                             \
    if (maps == 1) NAME(function)(__VA_ARGS__, 1);                                                 \
    else if (maps == 2) NAME(function)(__VA_ARGS__, 2);                                            \
    else NAME(function)(__VA_ARGS__, 3);

/* The higher of each two numbers, and NaN where either is. */
INLINE Vector NAME(higher)(Vector a, Vector b) {
    Mask of_a = (a > b) | (a != a);
    return (Vector)(((Mask)a & of_a) | ((Mask)b & ~of_a));
}

/* Row h of the pools of an image, [W', P, C]; so many channels from `first` on. `columns` are two
 * rows of vectors with one more on each side, which change neither a maximum nor a sum. */
INLINE void NAME(pool_channels)(const Pools *s, const REAL *image, int64_t h, int64_t first,
                                int64_t lanes, Vector *columns, REAL *y) {
    int64_t channels = s->channels, pools = s->maximum + s->average;
    int64_t top = most(h * s->stride - 1, 0), bottom = least(h * s->stride + 2, s->height);
    Vector *highest = columns + 1, *sum = columns + s->width + 3;
    highest[-1] = highest[s->width] = (Vector){0} - (REAL)INFINITY;
    sum[-1] = sum[s->width] = (Vector){0};
    for (int64_t w = 0; w < s->width; w++) {
        const REAL *pixel = image + (top * s->width + w) * channels + first;
        Vector value = NAME(some)(pixel, lanes);
        highest[w] = sum[w] = value;
        for (int64_t r = top + 1; r < bottom; r++) {
            pixel += s->width * channels, value = NAME(some)(pixel, lanes);
            highest[w] = NAME(higher)(value, highest[w]), sum[w] += value;
        }
    }
    REAL *of_average = y + s->maximum * channels + first;
    for (int64_t w = 0; w < s->width; w += s->stride) {
        Vector found;
        if (s->maximum) {
            found = NAME(higher)(highest[w - 1], NAME(higher)(highest[w], highest[w + 1]));
            NAME(copy)(y + first, &found, lanes);
        }
        if (s->average) {
            int64_t pixels = (bottom - top) * (least(w + 2, s->width) - most(w - 1, 0));
            found = (sum[w - 1] + sum[w] + sum[w + 1]) * (1 / (REAL)pixels);
            NAME(copy)(of_average, &found, lanes);
        }
        y += pools * channels, of_average += pools * channels;
    }
}

static void NAME(pool_row)(const Pools *s, const REAL *image, int64_t h, Vector *columns, REAL *y) {
    for (int64_t first = 0; first < s->channels; first += LANES)
        if (s->channels - first >= LANES)
            NAME(pool_channels)(s, image, h, first, LANES, columns, y);
        else NAME(pool_channels)(s, image, h, first, s->channels - first, columns, y);
}

/* The pools y [B, H', W', P C] of a part of the batch, and their moments [2, P C]. */
static int NAME(pool_part)(const Pools *s, const Parts *parts, int64_t part, const REAL *x, REAL *y,
                           double *moments) {
    int64_t width = (s->width + s->stride - 1) / s->stride, height = parts->pixels / width;
    int64_t channels = (s->maximum + s->average) * s->channels, done = 0;
    int64_t rows = (BLOCK + width - 1) / width;
    Vector *columns = memory(2 * (s->width + 2) * BYTES);
    if (columns == NULL) return 1;
    y += first_pixel(parts, part) * channels;
    for (int64_t b = first_image(parts, part); b < first_image(parts, part + 1); b++)
        for (int64_t h = 0; h < height; h += rows) {
            int64_t some = least(rows, height - h), n = some * width;
            for (int64_t r = 0; r < some; r++)
                NAME(pool_row)(s, x + b * s->height * s->width * s->channels, h + r, columns,
                               y + r * width * channels);
            NAME(add_moments)(n, channels, y, done, moments);
            y += n * channels, done += n;
        }
    free(columns);
    return 0;
}

/* Values of all maps at a pixel: of x, and of the pools y, so many numbers of C from `first` on. */
INLINE void NAME(values_of)(const Pools *s, const REAL *x, const REAL *y, int64_t first,
                            int64_t lanes, Vector *values, const int maps) {
    int64_t channels = s->channels;
    values[0] = NAME(some)(s->identity ? x + first : y + first, lanes);
    if (s->identity) y -= channels;
#pragma GCC unroll 3
    for (int m = 1; m < maps; m++) values[m] = NAME(some)(y + m * channels + first, lanes);
}

/* out [n, k C] of n pixels from factors [k, M, C] and shifts [k, C]. */
INLINE void NAME(weigh_pixels)(const Pools *s, int64_t n, const REAL *x, const REAL *y,
                               const REAL *factors, const REAL *shifts, REAL *out, const int maps) {
    int64_t channels = s->channels, pools = s->maximum + s->average;
    for (int64_t p = 0; p < n; p++, y += pools * channels, out += s->edges * channels)
        for (int64_t first = 0; first < channels; first += LANES) {
            int64_t lanes = least(channels - first, LANES);
            Vector values[MAPS];
            NAME(values_of)(s, x + p * channels, y, first, lanes, values, maps);
            for (int64_t e = 0; e < s->edges; e++) {
                Vector total = NAME(load)(shifts + e * channels + first);
#pragma GCC unroll 3
                for (int m = 0; m < maps; m++)
                    total += NAME(load)(factors + (e * maps + m) * channels + first) * values[m];
                NAME(copy)(out + e * channels + first, &total, lanes);
            }
        }
}

static void NAME(weigh_part)(const Pools *s, int64_t maps, int64_t n, const REAL *x, const REAL *y,
                             const REAL *factors, const REAL *shifts, REAL *out) {
    WITH_MAPS(maps, weigh_pixels, s, n, x, y, factors, shifts, out)
}

/* Of all maps, [M, C] each: mean and 1 / sqrt(var + eps), by the statistics [3, P C] of the pools;
 * those of x itself are 0 and 1. */
static void NAME(norms_of)(const Pools *s, const REAL *statistics, REAL *mean, REAL *inverse) {
    int64_t channels = s->channels, identity = s->identity * channels;
    int64_t of_pools = (s->maximum + s->average) * channels;
    for (int64_t c = 0; c < identity; c++) mean[c] = 0, inverse[c] = 1;
    memcpy(mean + identity, statistics, (size_t)of_pools * sizeof(REAL));
    memcpy(inverse + identity, statistics + of_pools, (size_t)of_pools * sizeof(REAL));
}

/* Pools y, out [B, H', W', k C] and statistics [3, P C] of the pools. */
int NAME(pools)(const Pools *s, double eps, const REAL *x, const REAL *weights, REAL *y, REAL *out,
                REAL *statistics) {
    int64_t channels = s->channels, pools = s->maximum + s->average, maps = s->identity + pools;
    int64_t height = (s->height + s->stride - 1) / s->stride, real = sizeof(REAL);
    Parts parts = parts_of(s->images, height * ((s->width + s->stride - 1) / s->stride));
    double *moments = zeros(parts.number * 2 * pools * channels * (int64_t)sizeof(double));
    REAL *mean = memory(maps * channels * real), *inverse = memory(maps * channels * real);
    REAL *factors = zeros(s->edges * maps * channels * real);
    REAL *shifts = zeros(s->edges * channels * real);
    int failed = !moments || !mean || !inverse || !factors || !shifts;
    if (failed) goto end;
#pragma omp parallel for num_threads((int)s->threads) schedule(static) reduction(| : failed)
    for (int64_t part = 0; part < parts.number; part++)
        failed |= NAME(pool_part)(s, &parts, part, x, y, moments + part * 2 * pools * channels);
    if (failed) goto end;
    NAME(summarize)(&parts, pools * channels, eps, moments, statistics);
    NAME(norms_of)(s, statistics, mean, inverse);
    for (int64_t e = 0; e < s->edges; e++)
        for (int64_t m = 0; m < maps; m++)
            for (int64_t c = 0; c < channels; c++) {
                REAL factor = weights[e * maps + m] * inverse[m * channels + c];
                factors[(e * maps + m) * channels + c] = factor;
                shifts[e * channels + c] -= factor * mean[m * channels + c];
            }
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t part = 0; part < parts.number; part++) {
        int64_t begin = first_pixel(&parts, part), n = first_pixel(&parts, part + 1) - begin;
        NAME(weigh_part)(s, maps, n, x + begin * channels, y + begin * pools * channels, factors,
                         shifts, out + begin * s->edges * channels);
    }
end:
    free(moments), free(mean), free(inverse), free(factors), free(shifts);
    return failed;
}

/* Adds of n pixels, for every edge and channel, sum(g) and sum(g (map - mean)) of every map to the
 * totals [k, 1 + M, C]. */
INLINE void NAME(sum_edges)(const Pools *s, int64_t n, const REAL *gradient, const REAL *x,
                            const REAL *y, const REAL *mean, double *totals, const int maps) {
    int64_t channels = s->channels, pools = s->maximum + s->average, width = s->edges * channels;
    for (int64_t begin = 0; begin < n; begin += BLOCK)
        for (int64_t first = 0; first < channels; first += LANES)
            for (int64_t e = 0; e < s->edges; e++) {
                int64_t lanes = least(channels - first, LANES);
                Vector values[MAPS], sums[1 + MAPS] = {{0}};
                for (int64_t p = begin; p < least(n, begin + BLOCK); p++) {
                    Vector g = NAME(some)(gradient + p * width + e * channels + first, lanes);
                    NAME(values_of)(s, x + p * channels, y + p * pools * channels, first, lanes,
                                    values, maps);
                    sums[0] += g;
#pragma GCC unroll 3
                    for (int m = 0; m < maps; m++)
                        sums[1 + m] += g * (values[m] - NAME(load)(mean + m * channels + first));
                }
                for (int m = 0; m <= maps; m++)
                    for (int64_t l = 0; l < lanes; l++)
                        totals[(e * (1 + maps) + m) * channels + first + l] += (double)sums[m][l];
            }
}

static void NAME(sum_part)(const Pools *s, int64_t maps, int64_t n, const REAL *gradient,
                           const REAL *x, const REAL *y, const REAL *mean, double *totals) {
    WITH_MAPS(maps, sum_edges, s, n, gradient, x, y, mean, totals)
}

/* How the gradient of a pool, or of x as a map, follows from those of the edges: it is
 * slope (map - mean) + offset + sum over e of factor[e] g[e]. All are [M, C] and [k, M, C]. */
typedef struct {
    REAL *mean, *inverse, *slope, *offset, *factors;
} NAME(Back);

/* slope, offset and factors, and the gradient of the weights [k, M], which may be NULL, from the
 * sums of all parts. */
static void NAME(add_edges)(const Pools *s, int64_t maps, double pixels, const REAL *weights,
                            const double *totals, NAME(Back) *back, REAL *gweights) {
    int64_t channels = s->channels;
    for (int64_t e = 0; e < (gweights ? s->edges : 0); e++)
        for (int64_t m = 0; m < maps; m++) {
            const double *products = totals + (e * (1 + maps) + 1 + m) * channels;
            double sum = 0;
            for (int64_t c = 0; c < channels; c++)
                sum += products[c] * (double)back->inverse[m * channels + c];
            gweights[e * maps + m] = (REAL)sum;
        }
    for (int64_t m = 0; m < maps; m++)
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0, product = 0, inverse = (double)back->inverse[m * channels + c];
            for (int64_t e = 0; e < s->edges; e++) {
                const double *of_edge = totals + e * (1 + maps) * channels + c;
                double weight = (double)weights[e * maps + m];
                sum += weight * of_edge[0], product += weight * of_edge[(1 + m) * channels];
                back->factors[(e * maps + m) * channels + c] = (REAL)(weight * inverse);
            }
            int normalized = m >= s->identity;
            back->slope[m * channels + c] =
                (REAL)(normalized ? -inverse * inverse * inverse * product / pixels : 0);
            back->offset[m * channels + c] = (REAL)(normalized ? -inverse * sum / pixels : 0);
        }
}

/* Adds to the gradient of rows x columns pixels the gradient of their average, `each`, and that of
 * their maximum to the first that has it; NaN is the highest. */
INLINE void NAME(spread_to)(int64_t rows, int64_t columns, int64_t row, int64_t channels,
                            int64_t lanes, int64_t maximum, Vector highest, Vector of_highest,
                            Vector each, const REAL *x, REAL *gx) {
    Mask found = (Vector){0} < (Vector){0}; /* nowhere yet */
    for (int64_t r = 0; r < rows; r++, x += row, gx += row)
#pragma GCC unroll 3
        for (int64_t c = 0; c < columns; c++) {
            Vector total = NAME(some)(gx + c * channels, lanes) + each;
            if (maximum) {
                Vector value = NAME(some)(x + c * channels, lanes);
                Mask has = ((value == highest) | (value != value)) & ~found;
                total += (Vector)((Mask)of_highest & has);
                found |= has;
            }
            NAME(copy)(gx + c * channels, &total, lanes);
        }
}

/* The gradient of an image x [H, W, C], from those of the edges [H', W', k C]. A maximum's is that
 * of the first pixel that has it. */
INLINE void NAME(spread_pools)(const Pools *s, const NAME(Back) *back, const REAL *gradient,
                               const REAL *x, const REAL *y, REAL *gx, const int maps) {
    int64_t channels = s->channels, pools = s->maximum + s->average;
    memset(gx, 0, (size_t)(s->height * s->width * channels) * sizeof(REAL));
    for (int64_t h = 0; h < s->height; h += s->stride)
        for (int64_t w = 0; w < s->width; w += s->stride) {
            int64_t top = most(h - 1, 0), bottom = least(h + 2, s->height);
            int64_t left = most(w - 1, 0), right = least(w + 2, s->width);
            REAL share = 1 / (REAL)((bottom - top) * (right - left));
            for (int64_t first = 0; first < channels; first += LANES) {
                int64_t lanes = least(channels - first, LANES);
                int64_t here = (h * s->width + w) * channels + first;
                Vector values[MAPS], of_maps[MAPS];
                NAME(values_of)(s, x + here - first, y, first, lanes, values, maps);
#pragma GCC unroll 3
                for (int m = 0; m < maps; m++) {
                    int64_t at = m * channels + first;
                    of_maps[m] = NAME(load)(back->slope + at) *
                                     (values[m] - NAME(load)(back->mean + at)) +
                                 NAME(load)(back->offset + at);
                }
                for (int64_t e = 0; e < s->edges; e++) {
                    Vector g = NAME(some)(gradient + e * channels + first, lanes);
#pragma GCC unroll 3
                    for (int m = 0; m < maps; m++)
                        of_maps[m] +=
                            NAME(load)(back->factors + (e * maps + m) * channels + first) * g;
                }
                if (s->identity) {
                    Vector own = NAME(some)(gx + here, lanes) + of_maps[0];
                    NAME(copy)(gx + here, &own, lanes);
                }
                Vector highest = values[s->identity], of_highest = of_maps[s->identity];
                Vector each = {0}; /* not 0 * NaN */
                if (s->average) each = of_maps[maps - 1] * share;
                int64_t at = (top * s->width + left) * channels + first, row = s->width * channels;
                if (bottom - top == 3 && right - left == 3 && lanes == LANES)
                    NAME(spread_to)(3, 3, row, channels, LANES, s->maximum, highest, of_highest,
                                    each, x + at, gx + at);
                else
                    NAME(spread_to)(bottom - top, right - left, row, channels, lanes, s->maximum,
                                    highest, of_highest, each, x + at, gx + at);
            }
            gradient += s->edges * channels, y += pools * channels;
        }
}

static void NAME(spread_image)(const Pools *s, int64_t maps, const NAME(Back) *back,
                               const REAL *gradient, const REAL *x, const REAL *y, REAL *gx) {
    WITH_MAPS(maps, spread_pools, s, back, gradient, x, y, gx)
}

/* Gradients of x and of the weights; each may be NULL where it is not wanted. `gradient` is that of
 * out. */
int NAME(pools_backward)(const Pools *s, const REAL *gradient, const REAL *x, const REAL *weights,
                         const REAL *y, const REAL *statistics, REAL *gx, REAL *gweights) {
    int64_t channels = s->channels, pools = s->maximum + s->average, maps = s->identity + pools;
    int64_t height = (s->height + s->stride - 1) / s->stride;
    int64_t image = s->height * s->width * channels;
    Parts parts = parts_of(s->images, height * ((s->width + s->stride - 1) / s->stride));
    int64_t of_maps = (maps * channels + LANES) * (int64_t)sizeof(REAL);
    int64_t size = s->edges * (1 + maps) * channels, width = s->edges * channels;
    double *totals = zeros(parts.number * size * (int64_t)sizeof(double));
    NAME(Back) back = {zeros(of_maps), zeros(of_maps), zeros(of_maps), zeros(of_maps),
                       zeros(s->edges * of_maps)};
    int failed = !totals || !back.mean || !back.inverse || !back.slope || !back.offset ||
                 !back.factors;
    if (failed) goto end;
    NAME(norms_of)(s, statistics, back.mean, back.inverse);
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t part = 0; part < parts.number; part++) {
        int64_t begin = first_pixel(&parts, part), n = first_pixel(&parts, part + 1) - begin;
        NAME(sum_part)(s, maps, n, gradient + begin * width, x + begin * channels,
                       y + begin * pools * channels, back.mean, totals + part * size);
    }
    for (int64_t part = 1; part < parts.number; part++)
        for (int64_t n = 0; n < size; n++) totals[n] += totals[part * size + n];
    NAME(add_edges)(s, maps, (double)(s->images * parts.pixels), weights, totals, &back, gweights);
    if (gx == NULL) goto end;
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t b = 0; b < s->images; b++) {
        int64_t begin = b * parts.pixels;
        NAME(spread_image)(s, maps, &back, gradient + begin * width, x + b * image,
                           y + begin * pools * channels, gx + b * image);
    }
end:
    free(totals), free(back.mean), free(back.inverse), free(back.slope), free(back.offset);
    free(back.factors);
    return failed;
}

#undef WITH_MAPS
#undef MAPS
#undef BLOCK
