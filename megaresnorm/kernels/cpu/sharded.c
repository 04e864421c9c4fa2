/* A norm sharded over the hidden dimension: kernels/add_norm/sharded.py says what is computed.
 *
 * Each function does one piece for rows first .. last (of blocks of rows, for the gradients of weight and bias). Sums over a row are
 * taken in pieces of 512 columns, and those are added in FP64.
 */
#include "common.h"

#define PIECE 512

struct shard {
    const void *z, *dy;             /* [rows, columns] */
    const float *weight, *bias;     /* [columns]; bias may be NULL */
    float *statistics;              /* [rows, 2] of whole rows: mean, 1 / deviation */
    float *sums;                    /* [rows, 1] (RMSNorm) or [rows, 2]: of local columns, or of whole rows in shard_grad_apply */
    void *out;                      /* [rows, columns] */
    float *partial;                 /* [blocks, 2, columns]: gradients of weight and bias */
    long rows, rows_per_block, columns, whole_columns, layernorm, z_type, dy_type, out_type;
};

INLINE void stats_row(const void *z, int Z, float *restrict row, long n, long layernorm, float *found) {
    double sum = 0.0, squares = 0.0;
#pragma omp simd
    for (long i = 0; i < n; i++) row[i] = load(z, Z, i);
    for (long start = 0; layernorm && start < n; start += PIECE) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (long i = start; i < MIN(start + PIECE, n); i++) part += row[i];
        sum += part;
    }
    const float mean = (float)(sum / n);
    for (long start = 0; start < n; start += PIECE) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (long i = start; i < MIN(start + PIECE, n); i++) part += (row[i] - mean) * (row[i] - mean);
        squares += part;
    }
    if (layernorm) found[0] = mean, found[1] = (float)squares;
    else found[0] = (float)squares;
}

EXPORT void shard_stats(const struct shard *a, long first, long last) {
    const long n = a->columns, width = 1 + a->layernorm;
    float *scratch_row = scratch(1, n);
    for (long row = first; row < last; row++) {
        const void *z = row_of(a->z, a->z_type, row, n);
        WITH_TYPE(a->z_type, Z, stats_row(z, Z, scratch_row, n, a->layernorm, a->sums + row * width));
    }
    free(scratch_row);
}

INLINE void apply_row(const void *z, int Z, void *restrict out, int OUT, const float *restrict weight, const float *restrict bias,
                      float mean, float reciprocal, long n) {
    if (bias) {
#pragma omp simd
        for (long i = 0; i < n; i++) store(out, OUT, i, (load(z, Z, i) - mean) * reciprocal * weight[i] + bias[i]);
    } else {
#pragma omp simd
        for (long i = 0; i < n; i++) store(out, OUT, i, (load(z, Z, i) - mean) * reciprocal * weight[i]);
    }
}

EXPORT void shard_apply(const struct shard *a, long first, long last) {
    const long n = a->columns;
    for (long row = first; row < last; row++) {
        const void *z = row_of(a->z, a->z_type, row, n);
        void *out = (void *)row_of(a->out, a->out_type, row, n);
        const float mean = a->statistics[2 * row], reciprocal = a->statistics[2 * row + 1];
        WITH_TYPE(a->z_type, Z, WITH_TYPE(a->out_type, OUT, apply_row(z, Z, out, OUT, a->weight, a->bias, mean, reciprocal, n)));
    }
}

INLINE void sums_row(const void *dy, int DY, const void *z, int Z, const float *restrict weight, float mean, float reciprocal, long n,
                     long layernorm, float *found) {
    double along = 0.0, sum = 0.0;
    for (long start = 0; start < n; start += PIECE) {
        float part_along = 0.0f, part_sum = 0.0f;
#pragma omp simd reduction(+ : part_along, part_sum)
        for (long i = start; i < MIN(start + PIECE, n); i++) {
            const float g = load(dy, DY, i) * weight[i];
            part_along += g * ((load(z, Z, i) - mean) * reciprocal);
            part_sum += g;
        }
        along += part_along;
        sum += part_sum;
    }
    found[0] = (float)along;
    if (layernorm) found[1] = (float)sum;
}

EXPORT void shard_grad_sums(const struct shard *a, long first, long last) {
    const long n = a->columns, width = 1 + a->layernorm;
    for (long row = first; row < last; row++) {
        const void *z = row_of(a->z, a->z_type, row, n), *dy = row_of(a->dy, a->dy_type, row, n);
        const float mean = a->statistics[2 * row], reciprocal = a->statistics[2 * row + 1];
        WITH_TYPE(a->dy_type, DY, WITH_TYPE(a->z_type, Z,
            sums_row(dy, DY, z, Z, a->weight, mean, reciprocal, n, a->layernorm, a->sums + row * width)));
    }
}

INLINE void weights_row(const void *dy, int DY, const void *z, int Z, float mean, float reciprocal, float *restrict d_weight,
                        float *restrict d_bias, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float d = load(dy, DY, i);
        d_weight[i] += d * ((load(z, Z, i) - mean) * reciprocal);
        d_bias[i] += d;
    }
}

EXPORT void shard_grad_weights(const struct shard *a, long first, long last) {
    const long n = a->columns;
    for (long block = first; block < last; block++) {
        float *d_weight = a->partial + block * 2 * n, *d_bias = d_weight + n;
        memset(d_weight, 0, 2 * n * sizeof(float));
        for (long row = block * a->rows_per_block; row < MIN((block + 1) * a->rows_per_block, a->rows); row++) {
            const void *z = row_of(a->z, a->z_type, row, n), *dy = row_of(a->dy, a->dy_type, row, n);
            const float mean = a->statistics[2 * row], reciprocal = a->statistics[2 * row + 1];
            WITH_TYPE(a->dy_type, DY, WITH_TYPE(a->z_type, Z, weights_row(dy, DY, z, Z, mean, reciprocal, d_weight, d_bias, n)));
        }
    }
}

INLINE void grad_row(const void *dy, int DY, const void *z, int Z, void *restrict out, int OUT, const float *restrict weight,
                     float mean, float reciprocal, float along, float sum, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float unit = (load(z, Z, i) - mean) * reciprocal;
        store(out, OUT, i, reciprocal * (load(dy, DY, i) * weight[i] - sum - unit * along));
    }
}

EXPORT void shard_grad_apply(const struct shard *a, long first, long last) {
    const long n = a->columns, width = 1 + a->layernorm;
    for (long row = first; row < last; row++) {
        const void *z = row_of(a->z, a->z_type, row, n), *dy = row_of(a->dy, a->dy_type, row, n);
        void *out = (void *)row_of(a->out, a->out_type, row, n);
        const float mean = a->statistics[2 * row], reciprocal = a->statistics[2 * row + 1], *sums = a->sums + row * width;
        const float along = sums[0] / a->whole_columns, sum = a->layernorm ? sums[1] / a->whole_columns : 0.0f;
        WITH_TYPE(a->dy_type, DY, WITH_TYPE(a->z_type, Z, WITH_TYPE(a->out_type, OUT,
            grad_row(dy, DY, z, Z, out, OUT, a->weight, mean, reciprocal, along, sum, n))));
    }
}
