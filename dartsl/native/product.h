/* Products of small matrices, whose result stays in registers until it is done. */
#define ROWS 8 /* of the result that are computed at once */

/* c [rows, one vector] = a [rows, depth] b [depth, one vector], or that added to it. The element of
 * a at (m, k) is a[m * a_row + k * a_column]. As many as `lanes` columns of c are written; b may be
 * read past them. */
INLINE void NAME(tile)(const int rows, int64_t lanes, int64_t depth, const REAL *a, int64_t a_row,
                       int64_t a_column, const REAL *b, int64_t b_row, REAL *c, int64_t c_row,
                       const int adding) {
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
        if (adding) NAME(copy)(&right, c + m * c_row, lanes), sums[m] += right;
        NAME(copy)(c + m * c_row, &sums[m], lanes);
    }
}

/* c [rows, columns] = a [rows, depth] b [depth, columns], or that added to it. A vector of columns
 * of c comes `c_vector` numbers after the one before. With `whole` vectors, c has room for them. */
INLINE void NAME(product)(int64_t rows, int64_t columns, int64_t depth, const REAL *a,
                          int64_t a_row, int64_t a_column, const REAL *b, int64_t b_row, REAL *c,
                          int64_t c_row, int64_t c_vector, const int whole, const int adding) {
    for (int64_t n = 0; n < columns; n += LANES, b += LANES, c += c_vector) {
        int64_t lanes = whole ? LANES : least(columns - n, LANES), m = 0;
        if (lanes < LANES && n > 0 && !adding) /* the last vector, from earlier on */
            b -= LANES - lanes, c -= LANES - lanes, lanes = LANES;
        for (; m + ROWS <= rows; m += ROWS)
            NAME(tile)(ROWS, lanes, depth, a + m * a_row, a_row, a_column, b, b_row, c + m * c_row,
                       c_row, adding);
        for (; m + ROWS / 2 <= rows; m += ROWS / 2)
            NAME(tile)(ROWS / 2, lanes, depth, a + m * a_row, a_row, a_column, b, b_row,
                       c + m * c_row, c_row, adding);
        for (; m < rows; m++)
            NAME(tile)(1, lanes, depth, a + m * a_row, a_row, a_column, b, b_row, c + m * c_row,
                       c_row, adding);
    }
}

#undef ROWS
