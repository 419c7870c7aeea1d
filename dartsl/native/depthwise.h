/* Depthwise convolutions in channels_last and their gradients.
 *
 * C channels, H x W pixels, K x K kernel (K = 3, 5, 7), stride s and dilation d, of which one is 1
 * and the other 1 or 2, padding p = d (K / 2). At every output o of [ceil(H / s), ceil(W / s)], in
 * both axes alike,
 *
 *     y[o] = sum over j of w[j] x[s o + d j - p]
 *
 * Channels are taken LANES at a time, one to a lane of a vector. So many channels of an image are a
 * plane: a small buffer with the padding around the pixels, so that the loops have neither borders
 * nor strides of memory. K, s and d are constants in them.
 */
#define PIXELS 8 /* of an output row that are computed at once */

/* The planes of ReLU of an image [height, width, channels], which is `row` numbers from one row to
 * the next and `pixel` from one pixel to the next. A plane is `pitch` vectors wide and `size`
 * large. */
static void NAME(pack)(const REAL *image, int64_t row, int64_t pixel, int64_t height, int64_t width,
                       int64_t channels, Vector *planes, int64_t border, int64_t pitch,
                       int64_t size) {
    for (int64_t h = 0; h < height; h++)
        for (int64_t first = 0, plane = 0; first < channels; first += LANES, plane++) {
            Vector *to = planes + plane * size + (h + border) * pitch + border;
            const REAL *from = image + h * row + first;
            int64_t lanes = least(channels - first, LANES);
            for (int64_t w = 0; w < width; w++) {
                Vector value = NAME(some)(from + w * pixel, lanes);
                to[w] = NAME(passed)(value, value);
            }
        }
}

/* The gradient of a row of a plane into that of the image, where ReLU let the image pass. */
static void NAME(unpack)(const Vector *row, int64_t width, int64_t lanes, int64_t pixel,
                         const REAL *image, REAL *gradient) {
    for (int64_t w = 0; w < width; w++, image += pixel, gradient += pixel) {
        Vector value = NAME(passed)(NAME(some)(image, lanes), row[w]);
        NAME(copy)(gradient, &value, lanes);
    }
}

/* `many` outputs of a row, or those added to it; x begins at the row's first tap. */
INLINE void NAME(convolve_some)(const int many, const Vector *x, int64_t pitch,
                                const Vector *weight, Vector *out, int64_t out_step,
                                const int adding, const int kernel, const int stride,
                                const int dilation) {
    Vector sums[PIXELS];
#pragma GCC unroll 8
    for (int n = 0; n < many; n++) sums[n] = adding ? out[n * out_step] : (Vector){0};
    for (int i = 0; i < kernel; i++, x += dilation * pitch, weight += kernel)
#pragma GCC unroll 7
        for (int j = 0; j < kernel; j++)
#pragma GCC unroll 8
            for (int n = 0; n < many; n++) sums[n] += weight[j] * x[n * stride + j * dilation];
#pragma GCC unroll 8
    for (int n = 0; n < many; n++) out[n * out_step] = sums[n];
}

/* A row of n outputs, `out_step` vectors from one to the next, or that added to it. */
INLINE void NAME(convolve)(const Vector *x, int64_t pitch, const Vector *weight, Vector *out,
                           int64_t out_step, int64_t n, const int adding, const int kernel,
                           const int stride, const int dilation) {
    int64_t w = 0;
    for (; w + PIXELS <= n; w += PIXELS)
        NAME(convolve_some)(PIXELS, x + w * stride, pitch, weight, out + w * out_step, out_step,
                            adding, kernel, stride, dilation);
    for (; w < n; w++)
        NAME(convolve_some)(1, x + w * stride, pitch, weight, out + w * out_step, out_step, adding,
                            kernel, stride, dilation);
}

/* The gradient of the input, added to a plane with padding, from a row of n outputs' gradient. */
INLINE void NAME(spread)(const Vector *g, int64_t n, const Vector *weight, Vector *gx,
                         int64_t pitch, const int kernel, const int stride, const int dilation) {
    for (int i = 0; i < kernel; i++)
        for (int64_t w = 0; w < n; w++)
#pragma GCC unroll 7
            for (int j = 0; j < kernel; j++)
                gx[i * dilation * pitch + w * stride + j * dilation] +=
                    weight[i * kernel + j] * g[w];
}

/* The gradient of the weight, added to total [K, K]; g is `g_pitch` vectors from row to row. */
INLINE void NAME(weigh)(const Vector *x, int64_t pitch, const Vector *g, int64_t g_pitch,
                        int64_t height, int64_t width, Vector *total, const int kernel,
                        const int stride, const int dilation) {
    for (int i = 0; i < kernel; i++) {
        Vector sums[2][7]; /* two of each: an addition need not wait for the last one */
        for (int j = 0; j < kernel; j++) sums[0][j] = sums[1][j] = (Vector){0};
        for (int64_t h = 0; h < height; h++) {
            const Vector *row = x + (h * stride + i * dilation) * pitch, *from = g + h * g_pitch;
            int64_t w = 0;
            for (; w + 4 <= width; w += 4)
#pragma GCC unroll 8
                for (int n = 0; n < 4; n++)
#pragma GCC unroll 7
                    for (int j = 0; j < kernel; j++)
                        sums[n % 2][j] += from[w + n] * row[(w + n) * stride + j * dilation];
            for (; w < width; w++)
#pragma GCC unroll 7
                for (int j = 0; j < kernel; j++)
                    sums[0][j] += from[w] * row[w * stride + j * dilation];
        }
        for (int j = 0; j < kernel; j++) total[i * kernel + j] += sums[0][j] + sums[1][j];
    }
}

/* Calls one of the functions above with kernel, stride and dilation as constants. */
#define WITH_KERNEL(K, function, ...)                                                              \
    if (kernel == K && stride == 2) NAME(function)(__VA_ARGS__, K, 2, 1);                          \
    else if (kernel == K && dilation == 2) NAME(function)(__VA_ARGS__, K, 1, 2);                   \
    else if (kernel == K) NAME(function)(__VA_ARGS__, K, 1, 1);
#define WITH_CONSTANTS(function, ...)                                                              \
    WITH_KERNEL(3, function, __VA_ARGS__)                                                          \
    WITH_KERNEL(5, function, __VA_ARGS__)                                                          \
    WITH_KERNEL(7, function, __VA_ARGS__)

static void NAME(convolve_row)(int64_t kernel, int64_t stride, int64_t dilation, const Vector *x,
                               int64_t pitch, const Vector *weight, Vector *out, int64_t out_step,
                               int64_t n, int adding) {
    if (adding) {
        WITH_CONSTANTS(convolve, x, pitch, weight, out, out_step, n, 1)
    } else {
        WITH_CONSTANTS(convolve, x, pitch, weight, out, out_step, n, 0)
    }
}

static void NAME(spread_row)(int64_t kernel, int64_t stride, int64_t dilation, const Vector *g,
                             int64_t n, const Vector *weight, Vector *gx, int64_t pitch) {
    WITH_CONSTANTS(spread, g, n, weight, gx, pitch)
}

static void NAME(weigh_plane)(int64_t kernel, int64_t stride, int64_t dilation, const Vector *x,
                              int64_t pitch, const Vector *g, int64_t g_pitch, int64_t height,
                              int64_t width, Vector *total) {
    WITH_CONSTANTS(weigh, x, pitch, g, g_pitch, height, width, total)
}

#undef WITH_CONSTANTS
#undef WITH_KERNEL
#undef PIXELS
