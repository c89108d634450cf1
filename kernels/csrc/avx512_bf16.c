/* bf16 operators for processors with AVX512-BF16, whose matrix products torch's own CPU attention
 * leaves idle. kernels/native.py calls them; attention.py and qk_rope.py beside it define what they
 * compute, docs/kernels.md has what they gain. Each works on items first..last, so that the caller
 * can spread them over threads, and returns 0 or an errno.
 *
 * Shape letters: h heads, N queries, M keys, K head dimension.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

/* Elements from one row, head and token to the next; the head dimension is dense. */
typedef struct {
    int64_t row, head, token;
} Strides;

typedef struct {
    int64_t heads, N, M, K; /* K: even */
    Strides q, k, v, out;
} AttentionShape;

typedef struct {
    int64_t heads, tokens, K; /* K: even */
    Strides from, to;
} RotateShape;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) AVX512

int worldloop_has_avx512_bf16(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* Which of 16 lanes hold an element where `left` are left. */
INLINE __mmask16 lanes(int64_t left) {
    return left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
}

INLINE __m512 load(const uint16_t *x, __mmask16 inside) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE void store(uint16_t *to, __mmask16 inside, __m512 x) {
    _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(x));
}

/* ------------------------------------------------------------------------------- attention
 *
 * For each head the keys are transposed and the values interleaved once, so that both products are
 * one tile: ROWS queries times WIDE columns, summed in registers, two bf16 products a lane. The
 * scores of ROWS queries stay in the nearest cache; sums and exponentials are fp32. */

enum { ROWS = 6, WIDE = 64 }; /* 24 sums of 16 lanes: what 32 registers hold */

/* out[ROWS][WIDE] = sum over pairs of a[r][pair] b[pair][column]; a word is two bf16 of the sum. */
INLINE void tile(const uint32_t *const a[ROWS], const uint32_t *b, int64_t pairs, float *out,
                 int64_t out_stride) {
    __m512 sum[ROWS][WIDE / 16];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < WIDE / 16; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, b += WIDE) {
        __m512bh columns[WIDE / 16];
#pragma GCC unroll 4
        for (int c = 0; c < WIDE / 16; c++) columns[c] = (__m512bh)_mm512_load_si512(b + 16 * c);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[r][pair]);
#pragma GCC unroll 4
            for (int c = 0; c < WIDE / 16; c++)
                sum[r][c] = _mm512_dpbf16_ps(sum[r][c], both, columns[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < WIDE / 16; c++)
            _mm512_store_ps(out + r * out_stride + 16 * c, sum[r][c]);
}

/* Keys [M,K] to panels [K/2][WIDE] of WIDE keys each; keys beyond M are zero. */
INLINE void pack_keys(const uint16_t *keys, int64_t token, int64_t M, int64_t K, uint32_t *packed) {
    for (int64_t first = 0; first < M; first += WIDE, packed += K / 2 * WIDE) {
        for (int64_t m = 0; m < WIDE; m++) {
            if (first + m < M) {
                const uint16_t *key = keys + (first + m) * token;
                for (int64_t pair = 0; pair < K / 2; pair++)
                    memcpy(packed + pair * WIDE + m, key + 2 * pair, 4);
            } else {
                for (int64_t pair = 0; pair < K / 2; pair++) packed[pair * WIDE + m] = 0;
            }
        }
    }
}

/* Values [M,K] to panels [keys/2][WIDE] of WIDE of the K each; what lies beyond is zero. */
INLINE void pack_values(const uint16_t *values, int64_t token, int64_t M, int64_t K, int64_t keys,
                        uint32_t *packed) {
    for (int64_t first = 0; first < K; first += WIDE) {
        for (int64_t pair = 0; pair < keys / 2; pair++) {
            const uint16_t *even = values + 2 * pair * token, *odd = even + token;
            for (int64_t d = first; d < first + WIDE; d += 16, packed += 16) {
                __mmask16 inside = lanes(K - d);
                __m256i low = _mm256_maskz_loadu_epi16(2 * pair < M ? inside : 0, even + d);
                __m256i high = _mm256_maskz_loadu_epi16(2 * pair + 1 < M ? inside : 0, odd + d);
                __m512i above = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
                _mm512_store_si512(packed, _mm512_or_si512(_mm512_cvtepu16_epi32(low), above));
            }
        }
    }
}

/* 2^x for x <= 0: the fraction's Taylor series (2e-6), the whole part into the exponent. */
INLINE __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x); /* this order hands a NaN on */
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
    return _mm512_scalef_ps(p, whole);
}

/* bf16 2^(scale (score - largest)) of a row of `keys` scores, M of them real; returns their sum. */
INLINE float weights_of(float *scores, int64_t M, int64_t keys, float scale, uint16_t *weights) {
    for (int64_t m = M; m < keys; m++) scores[m] = -1e30f; /* their values are zero as well */
    __m512 largest = _mm512_load_ps(scores);
    for (int64_t m = 16; m < keys; m += 16)
        largest = _mm512_max_ps(largest, _mm512_load_ps(scores + m));
    __m512 by = _mm512_set1_ps(scale), sum = _mm512_setzero_ps();
    __m512 shift = _mm512_set1_ps(scale * _mm512_reduce_max_ps(largest));
    for (int64_t m = 0; m < keys; m += 32) {
        __m512 a = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + m), by, shift));
        __m512 b = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + m + 16), by, shift));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        _mm512_store_si512(weights + m, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return _mm512_reduce_add_ps(sum);
}

static int64_t whole(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

/* Heads first..last of all rows' heads. 0, or ENOMEM. */
AVX512 int worldloop_attention_bf16(const uint16_t *q, const uint16_t *k, const uint16_t *v,
                               uint16_t *out, const AttentionShape *s, int64_t first, int64_t last) {
    int64_t keys = whole(s->M), dims = whole(s->K);
    int64_t words = keys * s->K / 2 + keys / 2 * dims + ROWS * (keys + keys / 2 + WIDE);
    uint32_t *packed_k = aligned_alloc(64, (size_t)(whole(words) * 4));
    if (!packed_k) return ENOMEM;
    uint32_t *packed_v = packed_k + keys * s->K / 2;
    float *scores = (float *)(packed_v + keys / 2 * dims), *result = scores + ROWS * keys;
    uint16_t *weights = (uint16_t *)(result + ROWS * WIDE);
    float scale = 1.44269504f / __builtin_sqrtf((float)s->K);
    for (int64_t i = first; i < last; i++) {
        int64_t row = i / s->heads, head = i % s->heads;
        pack_keys(k + row * s->k.row + head * s->k.head, s->k.token, s->M, s->K, packed_k);
        pack_values(v + row * s->v.row + head * s->v.head, s->v.token, s->M, s->K, keys, packed_v);
        const uint16_t *queries = q + row * s->q.row + head * s->q.head;
        uint16_t *to = out + row * s->out.row + head * s->out.head;
        for (int64_t n = 0; n < s->N; n += ROWS) {
            const uint32_t *a[ROWS];
            float sums[ROWS];
            for (int64_t r = 0; r < ROWS; r++) { /* the last queries again in the place of none */
                int64_t query = n + r < s->N ? n + r : s->N - 1;
                a[r] = (const uint32_t *)(queries + query * s->q.token);
            }
            for (int64_t m = 0; m < keys; m += WIDE)
                tile(a, packed_k + m * (s->K / 2), s->K / 2, scores + m, keys);
            for (int64_t r = 0; r < ROWS; r++) {
                sums[r] = weights_of(scores + r * keys, s->M, keys, scale, weights + r * keys);
                a[r] = (const uint32_t *)(weights + r * keys);
            }
            for (int64_t d = 0; d < s->K; d += WIDE) {
                tile(a, packed_v + d * (keys / 2), keys / 2, result, WIDE);
                for (int64_t r = 0; r < ROWS && n + r < s->N; r++) {
                    __m512 share = _mm512_set1_ps(1 / sums[r]);
                    for (int64_t c = 0; c < WIDE && d + c < s->K; c += 16) {
                        __m512 x = _mm512_mul_ps(_mm512_load_ps(result + r * WIDE + c), share);
                        store(to + (n + r) * s->out.token + d + c, lanes(s->K - d - c), x);
                    }
                }
            }
        }
    }
    free(packed_k);
    return 0;
}

/* ------------------------------------------------------------------------- norm and rotation */

/* Each head x[K] normalised, its halves rotated by cos and sin [K/2]; rounded once. Items are
 * tokens of all rows. */
AVX512 int worldloop_norm_rotate_bf16(const uint16_t *x, uint16_t *out, const uint16_t *weight,
                                      const float *cos, const float *sin, float eps,
                                      const RotateShape *s, int64_t first, int64_t last) {
    int64_t half = s->K / 2;
    for (int64_t i = first; i < last; i++) {
        int64_t row = i / s->tokens, token = i % s->tokens;
        const uint16_t *from = x + row * s->from.row + token * s->from.token;
        uint16_t *to = out + row * s->to.row + token * s->to.token;
        for (int64_t head = 0; head < s->heads; head++, from += s->from.head, to += s->to.head) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t d = 0; d < half; d += 16) {
                __m512 a = load(from + d, lanes(half - d)), b = load(from + half + d, lanes(half - d));
                squares = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, squares));
            }
            float mean = _mm512_reduce_add_ps(squares) / (float)s->K;
            __m512 by = _mm512_set1_ps(1 / __builtin_sqrtf(mean + eps));
            for (int64_t d = 0; d < half; d += 16) {
                __mmask16 inside = lanes(half - d);
                const uint16_t *w = weight + d;
                __m512 a = _mm512_mul_ps(load(from + d, inside), load(w, inside));
                __m512 b = _mm512_mul_ps(load(from + half + d, inside), load(w + half, inside));
                __m512 c = _mm512_maskz_loadu_ps(inside, cos + token * half + d);
                __m512 n = _mm512_maskz_loadu_ps(inside, sin + token * half + d);
                a = _mm512_mul_ps(a, by), b = _mm512_mul_ps(b, by);
                store(to + d, inside, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, n)));
                store(to + half + d, inside, _mm512_fmadd_ps(a, n, _mm512_mul_ps(b, c)));
            }
        }
    }
    return 0;
}

#else

int worldloop_has_avx512_bf16(void) { return 0; }

#endif
