/* Close one residual connection and open the next, forward and backward: kernels/add_norm/reference.py says what is computed.
 *
 * A row goes through first-level cache once: it is summed, rounded to what is stored, and everything after reads that.
 * Sums over a row are taken in pieces of 512 columns, and those are added in FP64: FP32 alone would lose digits at 8192.
 */
#include "common.h"

/* Where a row of an output is written: into the tensor, or into a scratch row that flush() streams there. */
INLINE void *target(const void *tensor, int type, long row, long n, long stream, void *staging) {
    return tensor && stream ? staging : (void *)row_of(tensor, type, row, n);
}

INLINE void flush(const void *tensor, int type, long row, long n, long stream, const void *staging) {
    if (tensor && stream) stream_bytes((void *)row_of(tensor, type, row, n), staging, n * size_of(type));
}

enum kind { NO_NORM = 0, RMSNORM = 1, LAYERNORM = 2 };
#define PIECE 512
#define SUMS 7 /* column sums of backward, in the order of struct backward's norms */

struct norm { const float *weight, *bias; float *statistics; long kind; double eps; }; /* statistics: [rows, 2] mean, 1/deviation */

struct forward {
    const void *x, *delta;      /* [rows, columns] */
    const float *gate;          /* [columns], [1] or NULL: then scale */
    void *z, *trunk, *branch;   /* outputs, or NULL; z and trunk have residual_type */
    struct norm branch_norm, norm, next_norm;
    long columns, gate_size, x_type, delta_type, residual_type, branch_type;
    long stream; /* outputs are larger than the caches */
    double alpha, scale;
};

struct backward {
    const void *d_trunk, *d_branch; /* gradients, or NULL */
    const void *z, *trunk, *delta;  /* what forward stored; trunk with two norms, delta with a learned gate or a norm of its own */
    const float *gate;
    void *dx, *d_delta;             /* outputs; d_delta may be NULL */
    float *partial;                 /* [blocks, SUMS, columns]: of weight and bias of the three norms, and of the gate */
    struct norm branch_norm, norm, next_norm;
    long rows, rows_per_block, columns, gate_size;
    long d_trunk_type, d_branch_type, residual_type, delta_type, dx_type, d_delta_type, stream;
    double alpha, scale;
};

/* z = alpha x + gate delta, rounded to Z, left in the scratch row and stored. */
INLINE void sum_piece(const void *x, int X, const void *delta, int D, const float *gate, int vector_gate, float alpha, float scale,
                      float *restrict z, void *restrict stored, int Z, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        float sum = alpha * load(x, X, i);
        if (delta) sum += (vector_gate ? gate[i] : scale) * load(delta, D, i);
        z[i] = rounded(sum, Z);
        if (stored) store(stored, Z, i, sum);
    }
}

static void sum_row(const struct forward *a, long row, const void *delta, int delta_type, float scale, float *z, void *staging) {
    const long n = a->columns;
    const void *x = row_of(a->x, a->x_type, row, n);
    void *stored = target(a->z, a->residual_type, row, n, a->stream, staging);
#define SUM(delta, vector_gate, stored) \
    WITH_TYPE(a->x_type, X, WITH_TYPE(delta_type, D, WITH_TYPE(a->residual_type, Z, \
        sum_piece(x, X, delta, D, a->gate, vector_gate, a->alpha, scale, z, stored, Z, n))))
    if (!delta && !stored) WITH_TYPE(a->x_type, X, sum_piece(x, X, NULL, F32, NULL, 0, 1.0f, 0.0f, z, NULL, F32, n));
    else if (!delta) SUM(NULL, 0, stored);
    else if (a->gate_size > 1) SUM(delta, 1, stored);
    else SUM(delta, 0, stored);
#undef SUM
    flush(a->z, a->residual_type, row, n, a->stream, staging);
}

/* Mean (0 for RMSNorm) and 1 / sqrt(mean square of the deviation + eps), in two passes. */
static void row_statistics(const float *restrict x, long n, const struct norm *norm, long row, float *mean, float *reciprocal) {
    double sum = 0.0, squares = 0.0;
    *mean = 0.0f;
    if (norm->kind == LAYERNORM) {
        for (long start = 0; start < n; start += PIECE) {
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (long i = start; i < MIN(start + PIECE, n); i++) part += x[i];
            sum += part;
        }
        *mean = (float)(sum / n);
    }
    const float m = *mean;
    for (long start = 0; start < n; start += PIECE) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (long i = start; i < MIN(start + PIECE, n); i++) part += (x[i] - m) * (x[i] - m);
        squares += part;
    }
    *reciprocal = (float)(1.0 / sqrt(squares / n + norm->eps));
    norm->statistics[2 * row] = *mean;
    norm->statistics[2 * row + 1] = *reciprocal;
}

/* y = (x - mean) * reciprocal * weight + bias, stored as OUT; the scratch row gets what was stored. */
INLINE void apply_norm(const struct norm *norm, const float *x, float *y, void *restrict out, int OUT, float mean, float reciprocal,
                       long n) {
    const float *restrict weight = norm->weight, *restrict bias = norm->bias;
#define NORMALIZE(offset) \
    _Pragma("omp simd") for (long i = 0; i < n; i++) { \
        float value = (x[i] - mean) * reciprocal * weight[i] + (offset); \
        if (out) store(out, OUT, i, value); \
        if (y) y[i] = rounded(value, OUT); \
    }
    if (bias) { NORMALIZE(bias[i]) } else { NORMALIZE(0.0f) }
#undef NORMALIZE
}

INLINE void copy_row(const void *from, int T, float *restrict to, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) to[i] = load(from, T, i);
}

INLINE void store_row(const float *restrict x, void *restrict out, int OUT, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) store(out, OUT, i, x[i]);
}

EXPORT void add_norm_forward(const struct forward *a, long first, long last) {
    const long n = a->columns;
    float *z = scratch(3, n), *y = z + padded(n), *staging = y + padded(n);
    const float scale = a->gate_size == 1 ? a->gate[0] : (float)a->scale;
    for (long row = first; row < last; row++) {
        float mean, reciprocal;
        const void *delta = row_of(a->delta, a->delta_type, row, n);
        int delta_type = a->delta_type;
        if (a->branch_norm.kind) {
            WITH_TYPE(delta_type, D, copy_row(delta, D, y, n));
            row_statistics(y, n, &a->branch_norm, row, &mean, &reciprocal);
            apply_norm(&a->branch_norm, y, y, NULL, F32, mean, reciprocal, n);
            delta = y, delta_type = F32;
        }
        sum_row(a, row, delta, delta_type, scale, z, staging);
        if (a->stream) prefetch_next(a->x, a->x_type, row, last, n), prefetch_next(a->delta, a->delta_type, row, last, n);
        if (a->norm.kind) {
            void *trunk = target(a->trunk, a->residual_type, row, n, a->stream, staging);
            row_statistics(z, n, &a->norm, row, &mean, &reciprocal);
            WITH_TYPE(a->residual_type, T, apply_norm(&a->norm, z, z, trunk, T, mean, reciprocal, n));
            flush(a->trunk, a->residual_type, row, n, a->stream, staging);
        }
        void *branch = target(a->branch, a->branch_type, row, n, a->stream, staging);
        if (a->next_norm.kind) {
            row_statistics(z, n, &a->next_norm, row, &mean, &reciprocal);
            WITH_TYPE(a->branch_type, B, apply_norm(&a->next_norm, z, NULL, branch, B, mean, reciprocal, n));
        } else if (branch) {
            WITH_TYPE(a->branch_type, B, store_row(z, branch, B, n));
        }
        flush(a->branch, a->branch_type, row, n, a->stream, staging);
    }
    stream_end();
    free(z);
}

/* Gradient of a norm's input from that of its output, dy, of type DY: g. Adds to the sums of weight and bias; ``unit`` is scratch. */
INLINE void norm_backward(const struct norm *norm, const void *dy, int DY, const void *x, int X, float mean, float reciprocal,
                          float *restrict unit, float *restrict g, float *restrict d_weight, float *restrict d_bias, long n) {
    const float *restrict weight = norm->weight;
    double along = 0.0, sum = 0.0;
    for (long start = 0; start < n; start += PIECE) {
        float part_along = 0.0f, part_sum = 0.0f;
#define PASS(bias_too) \
    _Pragma("omp simd reduction(+ : part_along, part_sum)") for (long i = start; i < MIN(start + PIECE, n); i++) { \
        float d = load(dy, DY, i), u = (load(x, X, i) - mean) * reciprocal, gy = d * weight[i]; \
        unit[i] = u; \
        g[i] = gy; \
        d_weight[i] += d * u; \
        part_along += gy * u; \
        if (bias_too) { d_bias[i] += d; part_sum += gy; } \
    }
        if (norm->kind == LAYERNORM) { PASS(1) } else { PASS(0) }
#undef PASS
        along += part_along;
        sum += part_sum;
    }
    const float mean_along = (float)(along / n), mean_g = (float)(sum / n);
#pragma omp simd
    for (long i = 0; i < n; i++) g[i] = reciprocal * (g[i] - mean_g - unit[i] * mean_along);
}

INLINE void add_typed(const void *from, int T, float *restrict to, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) to[i] += load(from, T, i);
}

INLINE void store_scaled(const float *restrict g, float factor, const float *gate, void *restrict to, int T, long n) {
    if (gate) {
#pragma omp simd
        for (long i = 0; i < n; i++) store(to, T, i, g[i] * gate[i]);
    } else {
#pragma omp simd
        for (long i = 0; i < n; i++) store(to, T, i, g[i] * factor);
    }
}

/* d_gate += g * delta, where delta may have a norm of its own. */
INLINE void add_gate_sums(const float *restrict g, const void *delta, int D, const struct norm *norm, long row,
                          float *restrict d_gate, long n) {
    const float *s = norm->statistics + 2 * row, *restrict weight = norm->weight, *restrict bias = norm->bias;
    if (!norm->kind) {
#pragma omp simd
        for (long i = 0; i < n; i++) d_gate[i] += g[i] * load(delta, D, i);
    } else {
#pragma omp simd
        for (long i = 0; i < n; i++)
            d_gate[i] += g[i] * ((load(delta, D, i) - s[0]) * s[1] * weight[i] + (bias ? bias[i] : 0.0f));
    }
}

static void backward_row(const struct backward *a, long row, float *scratch_rows, float *partial) {
    const long n = a->columns;
    const int residual = a->residual_type;
    float *g = scratch_rows, *unit = g + padded(n), *dy = unit + padded(n);
    const void *d_trunk = row_of(a->d_trunk, a->d_trunk_type, row, n), *d_branch = row_of(a->d_branch, a->d_branch_type, row, n);
    const void *z = row_of(a->z, residual, row, n), *delta = row_of(a->delta, a->delta_type, row, n);
#define NORM_BACKWARD(norm, dy, DY, x, X, sums) \
    norm_backward(norm, dy, DY, x, X, (norm)->statistics[2 * row], (norm)->statistics[2 * row + 1], unit, g, \
                  partial + (sums) * n, partial + (sums + 1) * n, n)
    if (a->next_norm.kind && d_branch) {
        const void *x = a->norm.kind ? row_of(a->trunk, residual, row, n) : z;
        WITH_TYPE(a->d_branch_type, DY, WITH_TYPE(residual, X, NORM_BACKWARD(&a->next_norm, d_branch, DY, x, X, 4)));
    } else {
        memset(g, 0, n * sizeof *g);
        if (d_branch) WITH_TYPE(a->d_branch_type, T, add_typed(d_branch, T, g, n));
    }
    if (d_trunk) WITH_TYPE(a->d_trunk_type, T, add_typed(d_trunk, T, g, n));
    if (a->norm.kind) {
        memcpy(dy, g, n * sizeof *g);
        WITH_TYPE(residual, X, NORM_BACKWARD(&a->norm, dy, F32, z, X, 2));
    }
    if (a->stream) {
        prefetch_next(a->z, residual, row, a->rows, n);
        prefetch_next(a->d_branch, a->d_branch_type, row, a->rows, n);
        prefetch_next(a->d_trunk, a->d_trunk_type, row, a->rows, n);
    }
    void *dx = target(a->dx, a->dx_type, row, n, a->stream, unit);
    WITH_TYPE(a->dx_type, T, store_scaled(g, a->alpha, NULL, dx, T, n));
    flush(a->dx, a->dx_type, row, n, a->stream, unit);
    if (!a->d_delta) return;
    if (a->gate_size) WITH_TYPE(a->delta_type, D, add_gate_sums(g, delta, D, &a->branch_norm, row, partial + 6 * n, n));
    float scale = a->gate_size == 1 ? a->gate[0] : (float)a->scale;
    const float *gate = a->gate_size > 1 ? a->gate : NULL;
    if (a->branch_norm.kind) {
        store_scaled(g, scale, gate, dy, F32, n);
        WITH_TYPE(a->delta_type, D, NORM_BACKWARD(&a->branch_norm, dy, F32, delta, D, 0));
        scale = 1.0f, gate = NULL;
    }
    void *d_delta = target(a->d_delta, a->d_delta_type, row, n, a->stream, unit);
    WITH_TYPE(a->d_delta_type, T, store_scaled(g, scale, gate, d_delta, T, n));
    flush(a->d_delta, a->d_delta_type, row, n, a->stream, unit);
#undef NORM_BACKWARD
}

/* Blocks of rows, each with partial sums of its own: their order of addition does not depend on the number of threads. */
EXPORT void add_norm_backward(const struct backward *a, long first, long last) {
    const long n = a->columns;
    float *rows = scratch(3, n);
    for (long block = first; block < last; block++) {
        float *partial = a->partial + block * SUMS * n;
        memset(partial, 0, SUMS * n * sizeof *partial);
        for (long row = block * a->rows_per_block; row < MIN((block + 1) * a->rows_per_block, a->rows); row++)
            backward_row(a, row, rows, partial);
    }
    stream_end();
    free(rows);
}
