/* Cross entropy of rows of logits; where asked, the gradient takes the place of the logits. */
#include "common.h"

struct cross_entropy {
    void *logits;          /* [rows, columns], each row ``pitch`` elements after the one before */
    const int64_t *labels; /* [rows]; negative: nothing to predict */
    float *losses;         /* [rows, 2]: -log p(label) and log(Z)^2, 0 without a label */
    long columns, pitch, type, wants_gradient;
    double z_loss, scale;
};

INLINE void cross_entropy_row(const struct cross_entropy *a, void *logits, int T, int64_t label, float *losses) {
    const long n = a->columns;
    float largest = -INFINITY, not_a_number = 0.0f;
    double sum = 0.0;
    losses[0] = losses[1] = 0.0f;
    if (label < 0) {
        if (a->wants_gradient) memset(logits, 0, n * size_of(T));
        return;
    }
#pragma omp simd reduction(max : largest) reduction(+ : not_a_number)
    for (long i = 0; i < n; i++) {
        const float x = load(logits, T, i);
        largest = x > largest ? x : largest;
        not_a_number += x != x ? 1.0f : 0.0f;
    }
    if (not_a_number > 0.0f) largest = NAN; /* which a comparison would drop */
    for (long start = 0; start < n; start += 512) {
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (long i = start; i < MIN(start + 512, n); i++) part += exp_f32(load(logits, T, i) - largest);
        sum += part;
    }
    const float log_z = (float)(largest + log(sum)), at_label = load(logits, T, label);
    losses[0] = log_z - at_label;
    losses[1] = log_z * log_z;
    if (!a->wants_gradient) return;
    /* scale (p (1 + 2 z log Z) at every token, less 1 at the label) */
    const float factor = (float)(a->scale * (1.0 + 2.0 * a->z_loss * log_z) / sum);
#pragma omp simd
    for (long i = 0; i < n; i++) store(logits, T, i, factor * exp_f32(load(logits, T, i) - largest));
    store(logits, T, label, (float)((double)factor * exp_f32(at_label - largest) - a->scale));
}

EXPORT void cross_entropy(const struct cross_entropy *a, long first, long last) {
    for (long row = first; row < last; row++)
        WITH_TYPE(a->type, T, cross_entropy_row(a, (char *)a->logits + row * a->pitch * size_of(T), T, a->labels[row], a->losses + 2 * row));
}
