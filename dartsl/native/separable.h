/* A separable convolution: ReLU, depthwise, pointwise in groups, BatchNorm in training.
 *
 * B images, G groups of I inputs and O outputs. x [B, H, W, S I] has one source of I channels for
 * every group (S = G), or one that all groups read (S = 1). With the depthwise kernels [G I, K, K]
 * and the pointwise weight [G O, I],
 *
 *     y = pointwise (depthwise * ReLU(x)),   out = BatchNorm(y)   [+ addend]
 *
 * A CPU waits for its memory. So an image is taken at a time, and what lies between x and y, and
 * between their gradients, is in the cache only: what the depthwise convolution gives is computed a
 * second time in the backward pass.
 */
#define BLOCK 64 /* pixels that are computed at once, at least */

/* Where the pixels of an image are. All lengths of planes are in vectors. */
typedef struct {
    int64_t step; /* only every so manyth pixel of x is read, and of those: */
    int64_t height, width, stride, dilation;
    int64_t border, pitch, plane; /* of the padded planes of x */
    int64_t out_height, out_width;
    int64_t g_border, g_pitch, g_plane; /* of the planes of a gradient of the output */
    int64_t blocks;                     /* vectors that hold I channels */
    int64_t rows;                       /* of outputs that are computed at once */
} NAME(Geometry);

static NAME(Geometry) NAME(geometry)(const Separable *s) {
    NAME(Geometry) g;
    /* With stride and dilation 2 all taps are on even pixels. */
    g.step = s->stride == 2 && s->dilation == 2 ? 2 : 1;
    g.height = (s->height + g.step - 1) / g.step, g.width = (s->width + g.step - 1) / g.step;
    g.stride = s->stride / g.step, g.dilation = s->dilation / g.step;
    g.border = g.dilation * (s->kernel / 2);
    g.pitch = g.width + 2 * g.border, g.plane = g.pitch * (g.height + 2 * g.border);
    g.out_height = (g.height + g.stride - 1) / g.stride;
    g.out_width = (g.width + g.stride - 1) / g.stride;
    g.g_border = g.stride == 1 ? g.border : 0;
    g.g_pitch = g.out_width + 2 * g.g_border;
    g.g_plane = g.g_pitch * (g.out_height + 2 * g.g_border);
    g.blocks = (s->inputs + LANES - 1) / LANES;
    g.rows = least((BLOCK + g.out_width - 1) / g.out_width, g.out_height);
    return g;
}

/* The depthwise weight [G I, K, K] as vectors [G, blocks, K, K], flipped in both axes or not. */
static void NAME(arrange_kernels)(const Separable *s, int64_t blocks, const REAL *weight,
                                  int flipped, Vector *to) {
    int64_t taps = s->kernel * s->kernel;
    for (int64_t c = 0; c < s->groups * s->inputs; c++)
        for (int64_t t = 0; t < taps; t++) {
            int64_t i = c % s->inputs, block = c / s->inputs * blocks + i / LANES;
            to[block * taps + (flipped ? taps - 1 - t : t)][i % LANES] = weight[c * taps + t];
        }
}

/* All planes of an image of x. */
static void NAME(read_image)(const Separable *s, const NAME(Geometry) *g, const REAL *x,
                             int64_t image, Vector *planes) {
    int64_t pixel = s->sources * s->inputs, row = s->width * pixel;
    for (int64_t source = 0; source < s->sources; source++)
        NAME(pack)(x + image * s->height * row + source * s->inputs, g->step * row, g->step * pixel,
                   g->height, g->width, s->inputs, planes + source * g->blocks * g->plane,
                   g->border, g->pitch, g->plane);
}

/* `rows` rows of what the depthwise convolution gives, [pixels, G, blocks]. */
static void NAME(depthwise_rows)(const Separable *s, const NAME(Geometry) *g, const Vector *planes,
                                 const Vector *kernels, int64_t first, int64_t rows, Vector *to) {
    int64_t taps = s->kernel * s->kernel, vectors = s->groups * g->blocks;
    for (int64_t h = first; h < first + rows; h++, to += g->out_width * vectors)
        for (int64_t v = 0; v < vectors; v++) {
            int64_t plane = s->sources == 1 ? v % g->blocks : v;
            NAME(convolve_row)(s->kernel, g->stride, g->dilation,
                               planes + plane * g->plane + h * g->stride * g->pitch, g->pitch,
                               kernels + v * taps, to + v, vectors, g->out_width, 0);
        }
}

/* What a thread needs for itself. */
typedef struct {
    Vector *planes, *depthwise, *gradients, *spread, *row;
    REAL *gy;
} NAME(Room);

static int NAME(get_room)(const Separable *s, const NAME(Geometry) *g, int backward,
                          NAME(Room) *room) {
    int64_t vectors = s->groups * g->blocks, pixels = g->rows * g->out_width;
    room->planes = zeros(s->sources * g->blocks * g->plane * BYTES);
    room->depthwise = memory(pixels * vectors * BYTES);
    room->gradients = zeros(backward ? vectors * g->g_plane * BYTES : 0);
    int64_t apart = backward && g->stride > 1;
    room->spread = memory(apart ? s->sources * g->blocks * g->plane * BYTES : 0);
    room->row = memory(backward ? g->width * BYTES : 0);
    room->gy = memory(backward ? pixels * s->groups * s->outputs * (int64_t)sizeof(REAL) : 0);
    return room->planes && room->depthwise && room->gradients && room->spread && room->row &&
           room->gy;
}

static void NAME(free_room)(NAME(Room) *room) {
    free(room->planes), free(room->depthwise), free(room->gradients), free(room->spread);
    free(room->row), free(room->gy);
}

/* y and its moments [2, C] of a part of the batch; `turned` is the pointwise weight as [G, I, O].
 */
static void NAME(convolve_part)(const Separable *s, const NAME(Geometry) *g, const Parts *parts,
                                int64_t part, const REAL *x, const Vector *kernels,
                                const REAL *turned, NAME(Room) *room, REAL *y, double *moments) {
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    int64_t width = s->groups * g->blocks * LANES, done = 0;
    y += first_pixel(parts, part) * channels;
    for (int64_t b = first_image(parts, part); b < first_image(parts, part + 1); b++) {
        NAME(read_image)(s, g, x, b, room->planes);
        for (int64_t h = 0; h < g->out_height; h += g->rows) {
            int64_t rows = least(g->rows, g->out_height - h), n = rows * g->out_width;
            const REAL *from = (const REAL *)room->depthwise;
            NAME(depthwise_rows)(s, g, room->planes, kernels, h, rows, room->depthwise);
            for (int64_t p = 0; p < n; p += 8) /* all groups: memory is written in order */
                for (int64_t group = 0; group < s->groups; group++)
                    NAME(product)(least(n - p, 8), outputs, inputs,
                                  from + p * width + group * g->blocks * LANES, width, 1,
                                  turned + group * inputs * outputs, outputs,
                                  y + p * channels + group * outputs, channels, LANES, 0, 0);
            NAME(add_moments)(n, channels, y, done, moments);
            y += n * channels, done += n;
        }
    }
}

/* y, out [B, H', W', G O] and statistics [3, G O]; scale, bias [G O] and the addend may be NULL. */
int NAME(separable)(const Separable *s, double eps, const REAL *x, const REAL *depthwise,
                    const REAL *pointwise, const REAL *scale, const REAL *bias, const REAL *addend,
                    REAL *y, REAL *out, REAL *statistics) {
    NAME(Geometry) g = NAME(geometry)(s);
    Parts parts = parts_of(s->images, g.out_height * g.out_width);
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    Vector *kernels = zeros(s->groups * g.blocks * s->kernel * s->kernel * BYTES);
    REAL *turned = zeros(channels * inputs * (int64_t)sizeof(REAL));
    REAL *room_of_norm = zeros(NAME(size_of_norm)(channels));
    double *moments = zeros(parts.number * 2 * channels * (int64_t)sizeof(double));
    int failed = !kernels || !turned || !room_of_norm || !moments;
    if (!failed) {
        NAME(arrange_kernels)(s, g.blocks, depthwise, 0, kernels);
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < inputs; i++)
                turned[(c / outputs * inputs + i) * outputs + c % outputs] =
                    pointwise[c * inputs + i];
#pragma omp parallel num_threads((int)s->threads) reduction(| : failed)
        {
            NAME(Room) room;
            failed |= !NAME(get_room)(s, &g, 0, &room);
#pragma omp for schedule(static)
            for (int64_t part = 0; part < parts.number; part++)
                if (!failed)
                    NAME(convolve_part)(s, &g, &parts, part, x, kernels, turned, &room, y,
                                        moments + part * 2 * channels);
            NAME(free_room)(&room);
        }
    }
    if (!failed) {
        NAME(summarize)(&parts, channels, eps, moments, statistics);
        NAME(Norm) norm = NAME(norm)(channels, statistics, scale, bias, room_of_norm);
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
        for (int64_t part = 0; part < parts.number; part++) {
            int64_t begin = first_pixel(&parts, part), end = first_pixel(&parts, part + 1);
            NAME(normalize)(&norm, end - begin, y + begin * channels,
                            addend ? addend + begin * channels : NULL, out + begin * channels);
        }
    }
    free(kernels), free(turned), free(room_of_norm), free(moments);
    return failed;
}

/* The gradient of the output of the depthwise convolution of an image, in planes; and that of the
 * pointwise weight, added to `turned` [G, I, O] where that is not NULL. */
static void NAME(through_pointwise)(const Separable *s, const NAME(Geometry) *g,
                                    const NAME(Norm) *norm, const REAL *gradient, const REAL *y,
                                    const Vector *kernels, const REAL *pointwise, NAME(Room) *room,
                                    REAL *turned) {
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    int64_t width = s->groups * g->blocks * LANES;
    for (int64_t h = 0; h < g->out_height; h += g->rows) {
        int64_t rows = least(g->rows, g->out_height - h), n = rows * g->out_width;
        int64_t begin = h * g->out_width * channels;
        NAME(gradient_of_y)(norm, n, gradient + begin, y + begin, room->gy);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t group = 0; group < s->groups; group++) {
                Vector *to = room->gradients + group * g->blocks * g->g_plane +
                             (h + r + g->g_border) * g->g_pitch + g->g_border;
                NAME(product)(g->out_width, inputs, outputs,
                              room->gy + r * g->out_width * channels + group * outputs, channels, 1,
                              pointwise + group * outputs * inputs, inputs, (REAL *)to, LANES,
                              g->g_plane * LANES, 1, 0);
            }
        if (turned == NULL) continue;
        NAME(depthwise_rows)(s, g, room->planes, kernels, h, rows, room->depthwise);
        for (int64_t group = 0; group < s->groups; group++)
            NAME(product)(inputs, outputs, n, (REAL *)room->depthwise + group * g->blocks * LANES,
                          1, width, room->gy + group * outputs, channels,
                          turned + group * inputs * outputs, outputs, LANES, 0, 1);
    }
}

/* The gradient of an image x [H, W, S I], from that of the depthwise convolution's output in
 * planes. */
static void NAME(through_depthwise)(const Separable *s, const NAME(Geometry) *g,
                                    const Vector *kernels, NAME(Room) *room, const REAL *x,
                                    REAL *gx) {
    int64_t taps = s->kernel * s->kernel, channels = s->sources * s->inputs;
    int64_t shared = s->sources == 1 ? s->groups : 1; /* groups that read the same source */
    int64_t vectors = s->sources * g->blocks, apart = g->stride > 1;
    if (g->step > 1) memset(gx, 0, (size_t)(s->height * s->width * channels) * sizeof(REAL));
    if (apart) {
        memset(room->spread, 0, (size_t)(vectors * g->plane * BYTES));
        for (int64_t v = 0; v < s->groups * g->blocks; v++)
            for (int64_t h = 0; h < g->out_height; h++)
                NAME(spread_row)(s->kernel, g->stride, g->dilation,
                                 room->gradients + v * g->g_plane + h * g->g_pitch, g->out_width,
                                 kernels + v * taps,
                                 room->spread + v % vectors * g->plane + h * g->stride * g->pitch,
                                 g->pitch);
    }
    for (int64_t h = 0; h < g->height; h++)
        for (int64_t v = 0; v < vectors; v++) {
            Vector *row = room->row;
            if (apart) row = room->spread + v * g->plane + (h + g->border) * g->pitch + g->border;
            else
                for (int64_t k = 0; k < shared; k++)
                    NAME(convolve_row)(
                        s->kernel, 1, g->dilation,
                        room->gradients + (k * g->blocks + v) * g->g_plane + h * g->g_pitch,
                        g->g_pitch, kernels + (k * g->blocks + v) * taps, row, 1, g->width, k > 0);
            int64_t first = v % g->blocks * LANES;
            int64_t at = h * g->step * s->width * channels + v / g->blocks * s->inputs + first;
            NAME(unpack)(row, g->width, least(s->inputs - first, LANES), g->step * channels, x + at,
                         gx + at);
        }
}

/* The gradient of x of a part of the batch, and what the part adds to those of the weights, [G,
 * blocks, K, K] and [G, I, O]; each may be NULL, but the weights' are together. */
static void NAME(differentiate_part)(const Separable *s, const NAME(Geometry) *g,
                                     const Parts *parts, int64_t part, const NAME(Norm) *norm,
                                     const REAL *gradient, const REAL *x, const REAL *y,
                                     const Vector *kernels, const Vector *flipped,
                                     const REAL *pointwise, NAME(Room) *room, REAL *gx,
                                     Vector *of_depthwise, REAL *of_pointwise) {
    int64_t vectors = s->groups * g->blocks, taps = s->kernel * s->kernel;
    int64_t image = s->height * s->width * s->sources * s->inputs;
    for (int64_t b = first_image(parts, part); b < first_image(parts, part + 1); b++) {
        int64_t begin = b * parts->pixels * s->groups * s->outputs;
        if (of_depthwise) NAME(read_image)(s, g, x, b, room->planes);
        NAME(through_pointwise)(s, g, norm, gradient + begin, y + begin, kernels, pointwise, room,
                                of_pointwise);
        for (int64_t v = 0; v < (of_depthwise ? vectors : 0); v++)
            NAME(weigh_plane)(s->kernel, g->stride, g->dilation,
                              room->planes + (s->sources == 1 ? v % g->blocks : v) * g->plane,
                              g->pitch,
                              room->gradients + v * g->g_plane + g->g_border * (g->g_pitch + 1),
                              g->g_pitch, g->out_height, g->out_width, of_depthwise + v * taps);
        if (gx) NAME(through_depthwise)(s, g, flipped, room, x + b * image, gx + b * image);
    }
}

/* Adds all parts of so many numbers to the first. */
static void NAME(add_parts)(int64_t parts, int64_t size, REAL *numbers) {
    for (int64_t part = 1; part < parts; part++)
        for (int64_t n = 0; n < size; n++) numbers[n] += numbers[part * size + n];
}

/* Gradients of x, depthwise and pointwise weight, scale and bias; each may be NULL where it is not
 * wanted, but the two weights' go together. `gradient` is that of out. */
int NAME(separable_backward)(const Separable *s, const REAL *gradient, const REAL *x,
                             const REAL *depthwise, const REAL *pointwise, const REAL *scale,
                             const REAL *bias, const REAL *y, const REAL *statistics, REAL *gx,
                             REAL *gdepthwise, REAL *gpointwise, REAL *gscale, REAL *gbias) {
    NAME(Geometry) g = NAME(geometry)(s);
    Parts parts = parts_of(s->images, g.out_height * g.out_width);
    int64_t inputs = s->inputs, outputs = s->outputs, channels = s->groups * outputs;
    int64_t taps = s->kernel * s->kernel, vectors = s->groups * g.blocks, real = sizeof(REAL);
    int64_t size = channels * inputs, weighs = gdepthwise != NULL;
    Vector *kernels = zeros(vectors * taps * BYTES), *flipped = zeros(vectors * taps * BYTES);
    Vector *of_depthwise = zeros(weighs ? parts.number * vectors * taps * BYTES : 0);
    REAL *of_pointwise = zeros(weighs ? parts.number * size * real : 0);
    REAL *weights = zeros(size * real), *room_of_norm = zeros(NAME(size_of_norm)(channels));
    double *sums = zeros(parts.number * 2 * channels * (int64_t)sizeof(double));
    int failed = !kernels || !flipped || !of_depthwise || !of_pointwise || !weights ||
                 !room_of_norm || !sums;
    if (failed) goto end;
    NAME(Norm) norm = NAME(norm)(channels, statistics, scale, bias, room_of_norm);
    NAME(arrange_kernels)(s, g.blocks, depthwise, 0, kernels);
    NAME(arrange_kernels)(s, g.blocks, depthwise, g.stride == 1, flipped);
    memcpy(weights, pointwise, (size_t)(size * real));
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t part = 0; part < parts.number; part++) {
        int64_t begin = first_pixel(&parts, part), end = first_pixel(&parts, part + 1);
        NAME(add_sums)(&norm, end - begin, gradient + begin * channels, y + begin * channels,
                       sums + part * 2 * channels);
    }
    NAME(add_up)(&norm, &parts, sums, gscale, gbias);
    if (gx == NULL && !weighs) goto end;
#pragma omp parallel num_threads((int)s->threads) reduction(| : failed)
    {
        NAME(Room) room;
        failed |= !NAME(get_room)(s, &g, 1, &room);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts.number; part++)
            if (!failed)
                NAME(differentiate_part)(s, &g, &parts, part, &norm, gradient, x, y, kernels,
                                         flipped, weights, &room, gx,
                                         weighs ? of_depthwise + part * vectors * taps : NULL,
                                         weighs ? of_pointwise + part * size : NULL);
        NAME(free_room)(&room);
    }
    if (weighs && !failed) {
        NAME(add_parts)(parts.number, vectors * taps * LANES, (REAL *)of_depthwise);
        NAME(add_parts)(parts.number, size, of_pointwise);
        for (int64_t c = 0; c < s->groups * inputs; c++)
            for (int64_t t = 0; t < taps; t++)
                gdepthwise[c * taps + t] =
                    of_depthwise[(c / inputs * g.blocks + c % inputs / LANES) * taps + t]
                                [c % inputs % LANES];
        for (int64_t c = 0; c < channels; c++)
            for (int64_t i = 0; i < inputs; i++)
                gpointwise[c * inputs + i] =
                    of_pointwise[(c / outputs * inputs + i) * outputs + c % outputs];
    }
end:
    free(kernels), free(flipped), free(of_depthwise), free(of_pointwise), free(weights);
    free(room_of_norm), free(sums);
    return failed;
}

#undef BLOCK
