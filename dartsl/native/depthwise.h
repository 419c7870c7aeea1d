/* The weight gradient of a depthwise convolution, in channels_last.
 *
 * B images, C channels, H x W pixels, K x K kernel (K = 3, 5, 7), stride s and dilation d (1, 2),
 * padding p = d (K / 2). x [B, C, H, W] and g [B, C, ceil(H / s), ceil(W / s)] are in
 * channels_last, the gradient [C, 1, K, K] is contiguous:
 *
 *     dw[c, i, j] = sum over images and outputs (h, w) of g[c, h, w] x[c, h s + i d - p, w s + j d - p]
 *
 * The channels are taken LANES at a time, one to a lane of a vector. So many channels of an image
 * are first packed into a small buffer with the padding around them, so that the loop over the
 * outputs has neither borders nor strides of memory; K, s and d are constants in it, and the sums
 * of a row of the kernel stay in registers.
 */
#define MAX_WIDTH 7 /* of a kernel */
#define PIXELS 4    /* of the loop over a row that are unrolled */

/* Some channels of an image [height, width, channels] into the middle of a buffer of zeros that is
 * wider by `border` on each side. */
static void NAME(pack)(const REAL *image, Vector *packed, int64_t height, int64_t width,
                       int64_t channels, int64_t lanes, int64_t border) {
    for (int64_t h = 0; h < height; h++) {
        Vector *row = packed + (h + border) * (width + 2 * border) + border;
        for (int64_t w = 0; w < width; w++, image += channels)
            if (lanes == LANES)
                memcpy(row + w, image, BYTES);
            else
                memcpy(row + w, image, (size_t)lanes * sizeof(REAL));
    }
}

/* total[K, K] += the sum over the outputs of an image. */
static inline __attribute__((always_inline)) void NAME(add)(
    const Vector *x, const Vector *g, Vector *total, int64_t width, int64_t out_height,
    int64_t out_width, const int kernel, const int stride, const int dilation) {
    for (int i = 0; i < kernel; i++) {
        Vector sums[2][MAX_WIDTH]; /* two of each: an addition need not wait for the last one */
        for (int j = 0; j < kernel; j++) sums[0][j] = sums[1][j] = (Vector){0};
        for (int64_t h = 0; h < out_height; h++) {
            const Vector *row = x + (h * stride + i * dilation) * width, *from = g + h * out_width;
            int64_t w = 0;
            for (; w + PIXELS <= out_width; w += PIXELS)
#pragma GCC unroll 8
                for (int n = 0; n < PIXELS; n++)
#pragma GCC unroll 7
                    for (int j = 0; j < kernel; j++)
                        sums[n % 2][j] += from[w + n] * row[(w + n) * stride + j * dilation];
            for (; w < out_width; w++)
#pragma GCC unroll 7
                for (int j = 0; j < kernel; j++)
                    sums[0][j] += from[w] * row[w * stride + j * dilation];
        }
        for (int j = 0; j < kernel; j++) total[i * kernel + j] += sums[0][j] + sums[1][j];
    }
}

#define WITH_KERNEL(K, ...)                                                        \
    if (s->stride == 1 && s->dilation == 1) NAME(add)(__VA_ARGS__, K, 1, 1);       \
    else if (s->stride == 1) NAME(add)(__VA_ARGS__, K, 1, 2);                      \
    else if (s->dilation == 1) NAME(add)(__VA_ARGS__, K, 2, 1);                    \
    else NAME(add)(__VA_ARGS__, K, 2, 2);

static void NAME(add_any)(const Depthwise *s, const Vector *x, const Vector *g, Vector *total,
                          int64_t width, int64_t out_height, int64_t out_width) {
    if (s->kernel == 3) { WITH_KERNEL(3, x, g, total, width, out_height, out_width) }
    else if (s->kernel == 5) { WITH_KERNEL(5, x, g, total, width, out_height, out_width) }
    else { WITH_KERNEL(7, x, g, total, width, out_height, out_width) }
}

/* dw from all of x and g. */
int NAME(weight_gradient)(const Depthwise *s, const REAL *x, const REAL *g, REAL *dw) {
    int64_t border = s->dilation * (s->kernel / 2), taps = s->kernel * s->kernel;
    int64_t width = s->width + 2 * border, height = s->height + 2 * border;
    int64_t out_height = (s->height + s->stride - 1) / s->stride;
    int64_t out_width = (s->width + s->stride - 1) / s->stride;
    int64_t blocks = (s->channels + LANES - 1) / LANES;
    int64_t parts = least(s->images, MAX_PARTS);
    Vector *totals = zeros(parts * blocks * taps * BYTES);
    int failed = totals == NULL;
#pragma omp parallel for num_threads((int)s->threads) schedule(static) reduction(| : failed)
    for (int64_t part = 0; part < parts; part++) {
        Vector *xs = zeros(height * width * BYTES), *gs = zeros(out_height * out_width * BYTES);
        failed |= xs == NULL || gs == NULL;
        for (int64_t b = part * s->images / parts; b < (part + 1) * s->images / parts; b++)
            for (int64_t block = 0; block < blocks && !failed; block++) {
                int64_t first = block * LANES, lanes = least(s->channels - first, LANES);
                NAME(pack)(x + b * s->height * s->width * s->channels + first, xs, s->height,
                           s->width, s->channels, lanes, border);
                NAME(pack)(g + b * out_height * out_width * s->channels + first, gs, out_height,
                           out_width, s->channels, lanes, 0);
                NAME(add_any)(s, xs, gs, totals + (part * blocks + block) * taps, width,
                              out_height, out_width);
            }
        free(xs);
        free(gs);
    }
    for (int64_t c = 0; c < s->channels && !failed; c++)
        for (int64_t t = 0; t < taps; t++) {
            REAL sum = 0;
            for (int64_t part = 0; part < parts; part++)
                sum += totals[(part * blocks + c / LANES) * taps + t][c % LANES];
            dw[c * taps + t] = sum;
        }
    free(totals);
    return failed;
}

#undef WITH_KERNEL
#undef MAX_WIDTH
#undef PIXELS
