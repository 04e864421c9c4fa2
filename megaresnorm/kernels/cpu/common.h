/* What every kernel here shares: number types, and the few functions of one float that they need.
 *
 * The code is plain C over rows. It is compiled once for each level of instructions (build.py), and the compiler turns the
 * loops marked ``omp simd`` into vectors of that level; nothing links to OpenMP. Every kernel works on a range of rows (or
 * heads) and is called from as many threads as there are ranges.
 */
#ifndef MEGARESNORM_COMMON_H
#define MEGARESNORM_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

enum type { F32 = 0, BF16 = 1 }; /* as build.py numbers torch's types */

INLINE uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

INLINE float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }

INLINE uint16_t to_bf16(float f) { /* nearest, ties to even; NaN stays NaN */
    uint32_t u = bits(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

INLINE float load(const void *p, int type, long i) {
    return type == BF16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void store(void *p, int type, long i, float f) {
    if (type == F32) ((float *)p)[i] = f;
    else ((uint16_t *)p)[i] = to_bf16(f);
}

INLINE float rounded(float f, int type) { return type == BF16 ? from_bf16(to_bf16(f)) : f; }

INLINE long size_of(int type) { return type == F32 ? 4 : 2; }

/* Row r of a matrix of n columns; NULL stays NULL. */
INLINE const void *row_of(const void *p, int type, long r, long n) {
    return p ? (const char *)p + r * n * size_of(type) : NULL;
}

/* Ask for the row after ``r``, so that it arrives while this one is worked on. */
INLINE void prefetch_next(const void *p, int type, long r, long last, long n) {
    if (!p || r + 1 >= last) return;
    const char *next = row_of(p, type, r + 1, n);
    for (long i = 0; i < n * size_of(type); i += 64) __builtin_prefetch(next + i);
}

/* A loop is specialised for each type by calling it with constants: WITH_TYPE(t, T, f(T, ...)). */
#define WITH_TYPE(type, T, call) \
    do { if ((type) == BF16) { const int T = BF16; call; } else { const int T = F32; call; } } while (0)

/* e^x to about 1e-7; 0 below -87 and infinity above 88.37. */
INLINE float exp_f32(float x) {
    float n = rintf(x * 0x1.715476p+0f);
    float r = fmaf(n, -0x1.62e4p-1f, x); /* n ln 2 in two parts */
    r = fmaf(n, -0x1.7f7d1cp-20f, r);
    float p = 0x1.6850e4p-10f;
    p = fmaf(p, r, 0x1.123bccp-7f);
    p = fmaf(p, r, 0x1.555b98p-5f);
    p = fmaf(p, r, 0x1.55548ep-3f);
    p = fmaf(p, r, 0x1.fffff8p-2f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    float clamped = n < -126.0f ? -126.0f : n > 127.0f ? 127.0f : n;
    float y = p * from_bits((uint32_t)((int32_t)clamped + 127) << 23);
    y = x < -87.0f ? 0.0f : y;
    y = x > 88.37f ? INFINITY : y;
    return x != x ? x : y;
}

/* Copy what will not be read again before it has left the caches: past them, so that nothing is fetched to be overwritten. */
static inline void stream_bytes(void *restrict to, const void *restrict from, long bytes) {
#ifdef __SSE2__
    if ((uintptr_t)to % 64 == 0 && bytes % 64 == 0) {
        for (long i = 0; i < bytes; i += 64) {
            const __m128i *source = (const __m128i *)((const char *)from + i);
            __m128i *target = (__m128i *)((char *)to + i);
#ifdef __AVX512F__
            _mm512_stream_si512((__m512i *)target, _mm512_loadu_si512(source));
#else
            for (int k = 0; k < 4; k++) _mm_stream_si128(target + k, _mm_loadu_si128(source + k));
#endif
        }
        return;
    }
#endif
    memcpy(to, from, bytes);
}

INLINE void stream_end(void) { /* before anybody else reads what was streamed */
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* Scratch for ``rows`` rows of ``n`` floats, each starting on a cache line; free() gives it back. */
INLINE long padded(long n) { return (n + 15) / 16 * 16; }
static inline float *scratch(long rows, long n) {
    float *memory = aligned_alloc(64, (size_t)(rows * padded(n) * 4 + 63) / 64 * 64 + 64);
    if (!memory) abort(); /* there is no memory for a few rows */
    return memory;
}

#endif
