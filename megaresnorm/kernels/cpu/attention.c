/* Attention over whole sequences, forward and backward, from the fused q, k, v of a layer, with rotary positions.
 *
 * A task is one sequence and one key/value head with all the query heads that share it; its keys and values are turned into FP32
 * once. Queries go in blocks of QUERIES rows: scores, softmax and products of a block stay in cache. What lies above the
 * diagonal is not computed, nor what lies before the segment of a block's first query. Nothing of size seq x seq is kept: the backward pass has the logarithm of every row's sum.
 */
#include "common.h"

#if defined(__AVX512F__)
#define WIDTH 16
#define TILE 8
#elif defined(__AVX2__)
#define WIDTH 8
#define TILE 4
#else
#define WIDTH 4
#define TILE 4
#endif
#define QUERIES 32 /* a multiple of TILE */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

struct attention {
    const void *qkv;        /* [batch, seq, heads + 2 kv_heads, width], of type */
    const float *cos, *sin; /* [seq, width], or [batch, seq, width], or NULL; the first half of sin is negative */
    const int64_t *first_keys; /* [batch, seq], the first key that a query sees, not falling; or NULL: 0 */
    void *y;                /* forward: [batch, seq, heads, width] */
    float *log_sums;        /* [batch, heads, seq] */
    const void *dy;         /* backward: as y */
    void *d_qkv;            /* as qkv */
    long batch, seq, heads, kv_heads, width, type, rotary_batch_stride;
    double scale;
};

/* C[R x V vectors] (+)= A B; A is read element by element with any strides, B and C by rows. */
INLINE void tile(long k, const float *a, long a_row, long a_column, const float *b, long b_row, float *c, long c_row, int add, int R, int V) {
    vec sum[TILE][2];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = add ? *(const vec *)(c + r * c_row + v * WIDTH) : (vec){0};
    for (long i = 0; i < k; i++) {
        vec right[2];
        for (int v = 0; v < V; v++) right[v] = *(const vec *)(b + i * b_row + v * WIDTH);
        for (int r = 0; r < R; r++) {
            const float left = a[r * a_row + i * a_column];
            for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) *(vec *)(c + r * c_row + v * WIDTH) = sum[r][v];
}

/* C (+)= A B for A [m x k], B [k x n]; n is a multiple of WIDTH. */
static void multiply(long m, long n, long k, const float *a, long a_row, long a_column, const float *b, long b_row, float *c, long c_row, int add) {
    for (long row = 0; row < m;) {
        const int rows = m - row >= TILE ? TILE : 1;
        const float *left = a + row * a_row;
        for (long column = 0; column < n;) {
            const int two = n - column >= 2 * WIDTH;
            const float *right = b + column;
            float *to = c + row * c_row + column;
            if (rows == TILE && two) tile(k, left, a_row, a_column, right, b_row, to, c_row, add, TILE, 2);
            else if (rows == TILE) tile(k, left, a_row, a_column, right, b_row, to, c_row, add, TILE, 1);
            else if (two) tile(k, left, a_row, a_column, right, b_row, to, c_row, add, 1, 2);
            else tile(k, left, a_row, a_column, right, b_row, to, c_row, add, 1, 1);
            column += two ? 2 * WIDTH : WIDTH;
        }
        row += rows;
    }
}

/* A row of one head as FP32, times factor, turned by its position. */
static void load_head(const struct attention *a, long batch, long position, long head, int rotary, float factor, float *to) {
    const long heads = a->heads + 2 * a->kv_heads, n = a->width, first = ((batch * a->seq + position) * heads + head) * n, half = n / 2;
    if (!rotary || !a->cos) {
#define PLAIN(T) _Pragma("omp simd") for (long i = 0; i < n; i++) to[i] = factor * load(a->qkv, T, first + i)
        WITH_TYPE(a->type, T, PLAIN(T));
#undef PLAIN
        return;
    }
    const float *cos = a->cos + batch * a->rotary_batch_stride + position * n, *sin = a->sin + batch * a->rotary_batch_stride + position * n;
#define TURN(T) \
    _Pragma("omp simd") for (long i = 0; i < half; i++) { \
        const float low = load(a->qkv, T, first + i), high = load(a->qkv, T, first + half + i); \
        to[i] = factor * rounded(low * cos[i] + high * sin[i], T); \
        to[half + i] = factor * rounded(high * cos[half + i] + low * sin[half + i], T); \
    }
    WITH_TYPE(a->type, T, TURN(T));
#undef TURN
}

/* All keys and values of one sequence and head, a row of ``pitch`` floats each. */
static void load_keys_and_values(const struct attention *a, long batch, long kv, float *keys, float *values, long pitch) {
    for (long j = 0; j < a->seq; j++) {
        load_head(a, batch, j, a->heads + kv, 1, 1.0f, keys + j * pitch);
        load_head(a, batch, j, a->heads + a->kv_heads + kv, 0, 1.0f, values + j * pitch);
    }
}

/* The gradient of such a row, turned back. */
static void store_head(const struct attention *a, long batch, long position, long head, int rotary, float factor, const float *from) {
    const long heads = a->heads + 2 * a->kv_heads, n = a->width, first = ((batch * a->seq + position) * heads + head) * n, half = n / 2;
    if (!rotary || !a->cos) {
#define PLAIN(T) _Pragma("omp simd") for (long i = 0; i < n; i++) store(a->d_qkv, T, first + i, factor * from[i])
        WITH_TYPE(a->type, T, PLAIN(T));
#undef PLAIN
        return;
    }
    const float *cos = a->cos + batch * a->rotary_batch_stride + position * n, *sin = a->sin + batch * a->rotary_batch_stride + position * n;
#define TURN(T) \
    _Pragma("omp simd") for (long i = 0; i < half; i++) { \
        const float low = factor * from[i], high = factor * from[half + i]; \
        store(a->d_qkv, T, first + i, low * cos[i] + high * sin[half + i]); \
        store(a->d_qkv, T, first + half + i, high * cos[half + i] + low * sin[i]); \
    }
    WITH_TYPE(a->type, T, TURN(T));
#undef TURN
}

/* Columns of a [rows x n] matrix become rows of a [n x pitch] one; what is beyond ``rows`` is zero. */
static void transpose(const float *from, long from_row, long rows, long n, float *to, long pitch) {
    for (long i = 0; i < n; i++) {
        for (long j = 0; j < rows; j++) to[i * pitch + j] = from[j * from_row + i];
        memset(to + i * pitch + rows, 0, (pitch - rows) * sizeof *to);
    }
}

/* The first key that a query sees, from ``low`` to the query itself whatever the caller says. */
static long first_key(const struct attention *a, long batch, long query, long low) {
    const long first = a->first_keys ? a->first_keys[batch * a->seq + query] : 0;
    return first < low ? low : MIN(first, query);
}

/* Scores of keys low to pitch - 1 become what they are the logarithms of, divided by exp(shift); what a query does not see
 * becomes 0. */
static void exponentials(const struct attention *a, long batch, long query, float *scores, long low, long pitch, float shift) {
    const long first = first_key(a, batch, query, low), end = query + 1;
    memset(scores + low, 0, (first - low) * sizeof *scores);
#pragma omp simd
    for (long j = first; j < end; j++) scores[j] = exp_f32(scores[j] - shift);
    memset(scores + end, 0, (pitch - end) * sizeof *scores);
}

static float largest_score(const struct attention *a, long batch, long query, const float *scores, long low) {
    float largest = -INFINITY;
    const long first = first_key(a, batch, query, low), end = query + 1;
#pragma omp simd reduction(max : largest)
    for (long j = first; j < end; j++) largest = scores[j] > largest ? scores[j] : largest;
    return largest;
}

EXPORT void attention_forward(const struct attention *a, long first, long last) {
    const long seq = a->seq, n = a->width, columns = padded(n), pitch = padded(seq), group = a->heads / a->kv_heads;
    float *rows = scratch(seq, n), *keys = scratch(n, seq), *values = scratch(seq, n);
    float *q = scratch(QUERIES, n), *p = scratch(QUERIES, seq), *y = scratch(QUERIES, n);
    memset(values, 0, seq * columns * sizeof *values);
    for (long task = first; task < last; task++) {
        const long batch = task / a->kv_heads, kv = task % a->kv_heads;
        load_keys_and_values(a, batch, kv, rows, values, columns);
        transpose(rows, columns, seq, n, keys, pitch);
        for (long head = kv * group; head < (kv + 1) * group; head++)
            for (long start = 0; start < seq; start += QUERIES) {
                const long count = MIN(QUERIES, seq - start), seen = start + count;
                const long low = first_key(a, batch, start, 0) / WIDTH * WIDTH; /* what the block sees begins here */
                for (long i = 0; i < count; i++) load_head(a, batch, start + i, head, 1, a->scale, q + i * columns);
                multiply(count, padded(seen) - low, n, q, columns, 1, keys + low, pitch, p + low, pitch, 0);
                for (long i = 0; i < count; i++) {
                    float *row = p + i * pitch, sum = 0.0f;
                    const float largest = largest_score(a, batch, start + i, row, low);
                    exponentials(a, batch, start + i, row, low, padded(seen), largest);
#pragma omp simd reduction(+ : sum)
                    for (long j = low; j < seen; j++) sum += row[j];
                    a->log_sums[(batch * a->heads + head) * seq + start + i] = largest + logf(sum);
                    const float factor = 1.0f / sum;
#pragma omp simd
                    for (long j = low; j < seen; j++) row[j] *= factor;
                }
                multiply(count, columns, seen - low, p + low, pitch, 1, values + low * columns, columns, y, columns, 0);
                for (long i = 0; i < count; i++) {
                    const long to = ((batch * seq + start + i) * a->heads + head) * n;
#define PUT(T) _Pragma("omp simd") for (long c = 0; c < n; c++) store(a->y, T, to + c, y[i * columns + c])
                    WITH_TYPE(a->type, T, PUT(T));
#undef PUT
                }
            }
    }
    free(rows), free(keys), free(values), free(q), free(p), free(y);
}

EXPORT void attention_backward(const struct attention *a, long first, long last) {
    const long seq = a->seq, n = a->width, columns = padded(n), pitch = padded(seq), group = a->heads / a->kv_heads;
    float *rows = scratch(seq, n), *values = scratch(seq, n), *keys_t = scratch(n, seq), *values_t = scratch(n, seq);
    float *dk = scratch(seq, n), *dv = scratch(seq, n), *q = scratch(QUERIES, n), *dq = scratch(QUERIES, n), *dy = scratch(QUERIES, n);
    float *p = scratch(QUERIES, seq), *dp = scratch(QUERIES, seq);
    memset(rows, 0, seq * columns * sizeof *rows);
    memset(q, 0, QUERIES * columns * sizeof *q);
    memset(dy, 0, QUERIES * columns * sizeof *dy);
    for (long task = first; task < last; task++) {
        const long batch = task / a->kv_heads, kv = task % a->kv_heads;
        load_keys_and_values(a, batch, kv, rows, values, columns);
        transpose(rows, columns, seq, n, keys_t, pitch);
        transpose(values, columns, seq, n, values_t, pitch);
        memset(dk, 0, seq * columns * sizeof *dk);
        memset(dv, 0, seq * columns * sizeof *dv);
        for (long head = kv * group; head < (kv + 1) * group; head++)
            for (long start = 0; start < seq; start += QUERIES) {
                const long count = MIN(QUERIES, seq - start), seen = start + count;
                const long low = first_key(a, batch, start, 0) / WIDTH * WIDTH; /* what the block sees begins here */
                for (long i = 0; i < count; i++) {
                    const long from = ((batch * seq + start + i) * a->heads + head) * n;
                    load_head(a, batch, start + i, head, 1, a->scale, q + i * columns);
#define GET(T) _Pragma("omp simd") for (long c = 0; c < n; c++) dy[i * columns + c] = load(a->dy, T, from + c)
                    WITH_TYPE(a->type, T, GET(T));
#undef GET
                }
                multiply(count, padded(seen) - low, n, q, columns, 1, keys_t + low, pitch, p + low, pitch, 0);
                multiply(count, padded(seen) - low, n, dy, columns, 1, values_t + low, pitch, dp + low, pitch, 0);
                for (long i = 0; i < count; i++)
                    exponentials(a, batch, start + i, p + i * pitch, low, padded(seen),
                                 a->log_sums[(batch * a->heads + head) * seq + start + i]);
                multiply(seen - low, columns, count, p + low, 1, pitch, dy, columns, dv + low * columns, columns, 1);
                for (long i = 0; i < count; i++) { /* p becomes the gradient of the scores */
                    float *row = p + i * pitch, *gradient = dp + i * pitch, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (long j = low; j < seen; j++) sum += row[j] * gradient[j];
#pragma omp simd
                    for (long j = low; j < seen; j++) row[j] *= gradient[j] - sum;
                }
                multiply(seen - low, columns, count, p + low, 1, pitch, q, columns, dk + low * columns, columns, 1);
                multiply(count, columns, seen - low, p + low, pitch, 1, rows + low * columns, columns, dq, columns, 0);
                for (long i = 0; i < count; i++) store_head(a, batch, start + i, head, 1, a->scale, dq + i * columns);
            }
        for (long j = 0; j < seq; j++) {
            store_head(a, batch, j, a->heads + kv, 1, 1.0f, dk + j * columns);
            store_head(a, batch, j, a->heads + a->kv_heads + kv, 0, 1.0f, dv + j * columns);
        }
    }
    free(rows), free(values), free(keys_t), free(values_t), free(dk), free(dv), free(q), free(dq), free(dy), free(p), free(dp);
}
