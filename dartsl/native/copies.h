/* k copies of ReLU(x), one after the other along the channels, and the gradient of x.
 *
 * x is [P, C] and the copies are [P, k C]. They are read `readers` times, and each reader gives a
 * gradient of them. */

int NAME(copies)(const Copies *s, const REAL *x, REAL *out) {
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t p = 0; p < s->pixels; p++)
        for (int64_t k = 0; k < s->copies; k++)
            for (int64_t c = 0; c < s->channels; c++) {
                REAL value = x[p * s->channels + c];
                out[(p * s->copies + k) * s->channels + c] = value < 0 ? 0 : value; /* NaN stays */
            }
    return 0;
}

/* The sum of all copies' and readers' gradients, where x is positive. */
int NAME(copies_backward)(const Copies *s, const REAL *x, REAL *gx,
                          const REAL *const *gradients) {
    int64_t width = s->copies * s->channels;
#pragma omp parallel for num_threads((int)s->threads) schedule(static)
    for (int64_t p = 0; p < s->pixels; p++) {
        REAL *to = gx + p * s->channels;
        for (int64_t c = 0; c < s->channels; c++) to[c] = 0;
        for (int64_t r = 0; r < s->readers; r++)
            for (int64_t k = 0; k < s->copies; k++)
                for (int64_t c = 0; c < s->channels; c++)
                    to[c] += gradients[r][p * width + k * s->channels + c];
        for (int64_t c = 0; c < s->channels; c++)
            if (x[p * s->channels + c] <= 0) to[c] = 0;
    }
    return 0;
}
