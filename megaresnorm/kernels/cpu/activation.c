/* GELU and SwiGLU with the bias of the linear layer before them; the backward pass sums the bias's gradient as it goes. */
#include "common.h"

struct activation {
    const void *h;       /* [rows, width] for GELU, [rows, 2 width] for SwiGLU: gate, then up; without the bias */
    const float *bias;   /* as a row of h, or NULL */
    void *y;             /* forward: [rows, width] */
    const void *dy;      /* backward: as y */
    void *dh;            /* as h */
    float *partial;      /* [blocks, row of h], or NULL without a bias */
    long rows, rows_per_block, width, type, swiglu;
};

/* The share of a normal distribution below x, and its density there: erf by 7.1.26 of Abramowitz and Stegun, to 1.5e-7. */
INLINE void normal(float x, float *below, float *density) {
    const float z = fabsf(x) * 0x1.6a09e6p-1f, e = exp_f32(-z * z), t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = fmaf(p, t, -1.453152027f);
    p = fmaf(p, t, 1.421413741f);
    p = fmaf(p, t, -0.284496736f);
    p = fmaf(p, t, 0.254829592f);
    const float above = 0.5f * p * t * e;
    *below = x < 0.0f ? above : 1.0f - above;
    *density = e * 0x1.988454p-2f;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

INLINE void gelu_row(const void *h, const float *restrict bias, void *restrict y, int T, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float x = load(h, T, i) + (bias ? bias[i] : 0.0f);
        float below, density;
        normal(x, &below, &density);
        store(y, T, i, x * below);
    }
}

INLINE void gelu_row_backward(const void *h, const float *restrict bias, const void *dy, void *restrict dh, float *restrict d_bias, int T, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float x = load(h, T, i) + (bias ? bias[i] : 0.0f);
        float below, density;
        normal(x, &below, &density);
        const float d = load(dy, T, i) * (below + x * density);
        store(dh, T, i, d);
        if (d_bias) d_bias[i] += d;
    }
}

INLINE void swiglu_row(const void *h, const float *restrict bias, void *restrict y, int T, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float gate = load(h, T, i) + (bias ? bias[i] : 0.0f), up = load(h, T, n + i) + (bias ? bias[n + i] : 0.0f);
        store(y, T, i, gate * sigmoid(gate) * up);
    }
}

INLINE void swiglu_row_backward(const void *h, const float *restrict bias, const void *dy, void *restrict dh, float *restrict d_bias, int T, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) {
        const float gate = load(h, T, i) + (bias ? bias[i] : 0.0f), up = load(h, T, n + i) + (bias ? bias[n + i] : 0.0f);
        const float d = load(dy, T, i), s = sigmoid(gate);
        const float d_gate = d * up * s * (1.0f + gate * (1.0f - s)), d_up = d * gate * s;
        store(dh, T, i, d_gate);
        store(dh, T, n + i, d_up);
        if (d_bias) d_bias[i] += d_gate, d_bias[n + i] += d_up;
    }
}

/* A call with a constant NULL for what is not there, so that loops have no branches. */
#define WITH_BIAS(bias, call_with, call_without) do { if (bias) call_with; else call_without; } while (0)

EXPORT void activation_forward(const struct activation *a, long first, long last) {
    const long n = a->width, columns = a->swiglu ? 2 * n : n;
    for (long row = first; row < last; row++) {
        const void *h = row_of(a->h, a->type, row, columns);
        void *y = (void *)row_of(a->y, a->type, row, n);
        if (a->swiglu) WITH_TYPE(a->type, T, WITH_BIAS(a->bias, swiglu_row(h, a->bias, y, T, n), swiglu_row(h, NULL, y, T, n)));
        else WITH_TYPE(a->type, T, WITH_BIAS(a->bias, gelu_row(h, a->bias, y, T, n), gelu_row(h, NULL, y, T, n)));
    }
}

/* Blocks of rows, as in add_norm.c. */
EXPORT void activation_backward(const struct activation *a, long first, long last) {
    const long n = a->width, columns = a->swiglu ? 2 * n : n;
    for (long block = first; block < last; block++) {
        float *sums = a->bias ? a->partial + block * columns : NULL;
        if (sums) memset(sums, 0, columns * sizeof *sums);
        for (long row = block * a->rows_per_block; row < MIN((block + 1) * a->rows_per_block, a->rows); row++) {
            const void *h = row_of(a->h, a->type, row, columns), *dy = row_of(a->dy, a->type, row, n);
            void *dh = (void *)row_of(a->dh, a->type, row, columns);
#define ROW(f) WITH_TYPE(a->type, T, WITH_BIAS(sums, f(h, a->bias, dy, dh, sums, T, n), f(h, NULL, dy, dh, NULL, T, n)))
            if (a->swiglu) ROW(swiglu_row_backward);
            else ROW(gelu_row_backward);
#undef ROW
        }
    }
}
