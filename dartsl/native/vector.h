/* LANES numbers, and some of them to and from memory. */
typedef REAL Vector __attribute__((vector_size(BYTES)));
typedef __typeof__((Vector){0} < (Vector){0}) Mask; /* of integers: all bits of a number, or none */

/* By powers of two: a copy whose length is not a constant is a call. */
INLINE void NAME(copy)(void *to, const void *from, int64_t lanes) {
    char *target = to;
    const char *source = from;
    if (lanes >= LANES) {
        memcpy(target, source, BYTES);
        return;
    }
#pragma GCC unroll 4
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        if (lanes & half) {
            memcpy(target, source, (size_t)half * sizeof(REAL));
            target += half * (int64_t)sizeof(REAL), source += half * (int64_t)sizeof(REAL);
        }
}

INLINE Vector NAME(load)(const REAL *from) {
    Vector found;
    memcpy(&found, from, BYTES);
    return found;
}

/* So many numbers, and zeros behind them. */
INLINE Vector NAME(some)(const REAL *from, int64_t lanes) {
    Vector found = {0};
    NAME(copy)(&found, from, lanes);
    return found;
}

/* g where ReLU lets x pass, and 0 elsewhere; NaN passes. */
INLINE Vector NAME(passed)(Vector x, Vector g) { return (Vector)((Mask)g & ~(x <= 0)); }
