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
    AttentionShape a;
    Strides grad, dq, dk, dv;
} BackwardShape;

typedef struct {
    int64_t heads, tokens, K; /* K: even */
    Strides from, to;
} RotateShape;

/* Of the signatures below, as kernels/native.py calls them: count it up with every change. */
enum { ABI = 2 };

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#include <string.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) AVX512

/* 0 where the processor lacks the instructions. */
int worldloop_bf16_abi(void) {
    int has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has ? ABI : 0;
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
    __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
    if (inside == 0xffff)
        _mm256_storeu_si256((__m256i *)to, half);
    else /* a masked store of half words takes AMD's processors dozens of cycles */
        _mm256_mask_storeu_epi16(to, inside, half);
}

/* ------------------------------------------------------------------------------- attention
 *
 * All products are one tile: ROWS rows times up to WIDE columns, summed in registers, two bf16
 * products a lane. For that keys are transposed and values interleaved once a head. The scores of
 * ROWS queries stay in the nearest cache; sums and exponentials are fp32. */

enum {
    ROWS = 6,
    WIDE = 64,            /* 24 sums of 16 lanes: what 32 registers hold */
    QUERIES = 16 * ROWS,  /* of the backward pass at a time: their weights stay in the second cache */
};

/* out[ROWS][wide] (+)= sum over pairs of word step * pair of a[r] times b[pair][column]; a
 * word is two bf16. */
INLINE void tile(const uint16_t *const a[ROWS], int64_t step, const uint32_t *b, int64_t pairs,
                 float *out, int64_t out_stride, const int wide, const int add) {
    __m512 sum[ROWS][WIDE / 16];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < wide / 16; c++)
            sum[r][c] = add ? _mm512_load_ps(out + r * out_stride + 16 * c) : _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, b += wide) {
        __m512bh columns[WIDE / 16];
#pragma GCC unroll 4
        for (int c = 0; c < wide / 16; c++) columns[c] = (__m512bh)_mm512_load_si512(b + 16 * c);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int word;
            memcpy(&word, a[r] + 2 * step * pair, 4); /* it may lie at an odd element */
            __m512bh both = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 4
            for (int c = 0; c < wide / 16; c++)
                sum[r][c] = _mm512_dpbf16_ps(sum[r][c], both, columns[c]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < wide / 16; c++)
            _mm512_store_ps(out + r * out_stride + 16 * c, sum[r][c]);
}

/* x[count][K] to panels [K/2][WIDE] of WIDE tokens each, so that K is summed over; beyond: zero. */
INLINE void transpose(const uint16_t *x, int64_t token, int64_t count, int64_t K, uint32_t *packed) {
    for (int64_t first = 0; first < count; first += WIDE, packed += K / 2 * WIDE) {
        for (int64_t m = 0; m < WIDE; m++) {
            if (first + m < count) {
                const uint16_t *one = x + (first + m) * token;
                for (int64_t d = 0; d < K; d += 32) __builtin_prefetch(one + 16 * token + d);
                for (int64_t pair = 0; pair < K / 2; pair++)
                    memcpy(packed + pair * WIDE + m, one + 2 * pair, 4);
            } else {
                for (int64_t pair = 0; pair < K / 2; pair++) packed[pair * WIDE + m] = 0;
            }
        }
    }
}

/* x[count][K] to panels [tokens/2][wide] of wide of the K each, so that tokens are summed over. */
INLINE void interleave(const uint16_t *x, int64_t token, int64_t count, int64_t K, int64_t tokens,
                       uint32_t *packed, const int wide) {
    for (int64_t first = 0; first < K; first += wide) {
        for (int64_t t = 0; t < tokens; t += 2) {
            const uint16_t *even = x + t * token, *odd = even + token;
            for (int64_t d = first; d < first + wide; d += 16, packed += 16) {
                __m256i low = _mm256_maskz_loadu_epi16(t < count ? lanes(K - d) : 0, even + d);
                __m256i high = _mm256_maskz_loadu_epi16(t + 1 < count ? lanes(K - d) : 0, odd + d);
                __m512i above = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
                _mm512_store_si512(packed, _mm512_or_si512(_mm512_cvtepu16_epi32(low), above));
            }
        }
    }
}

/* Rows n.. of x; the last row again in the place of none. */
INLINE void rows_of(const uint16_t *x, int64_t token, int64_t n, int64_t N,
                    const uint16_t *rows[ROWS]) {
    for (int64_t r = 0; r < ROWS; r++) rows[r] = x + (n + r < N ? n + r : N - 1) * token;
}

/* by * x[K], rounded. */
INLINE void put(uint16_t *to, const float *x, int64_t K, float by) {
    for (int64_t d = 0; d < K; d += 16)
        store(to + d, lanes(K - d), _mm512_mul_ps(_mm512_load_ps(x + d), _mm512_set1_ps(by)));
}

/* 2^x for x <= 0, above which only rounding leads: the fraction's Taylor series (2e-6), the whole
 * part into the exponent. */
INLINE __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x); /* this order hands a NaN on */
    x = _mm512_min_ps(_mm512_setzero_ps(), x);
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

/* bf16 2^(scale score - shift) of a row of `keys` scores, M of them real; the shift that makes the
 * largest 1, and what makes their sum 1, into stats. */
INLINE void weights_of(float *scores, int64_t M, int64_t keys, float scale, uint16_t *weights,
                       float stats[2]) {
    for (int64_t m = M; m < keys; m++) scores[m] = -__builtin_inff(); /* their values are zero, too */
    __m512 largest = _mm512_load_ps(scores);
    for (int64_t m = 16; m < keys; m += 16)
        largest = _mm512_max_ps(largest, _mm512_load_ps(scores + m));
    stats[0] = scale * _mm512_reduce_max_ps(largest);
    __m512 by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(stats[0]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t m = 0; m < keys; m += 32) {
        __m512 a = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + m), by, shift));
        __m512 b = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(scores + m + 16), by, shift));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        _mm512_store_si512(weights + m, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    stats[1] = 1 / _mm512_reduce_add_ps(sum);
}

static int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

/* The next `words` of an arena, a whole number of cache lines. */
static void *take(uint32_t **arena, int64_t words) {
    uint32_t *here = *arena;
    *arena += whole(words, WIDE);
    return here;
}

INLINE int forward(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out,
                   float *stats, const AttentionShape *s, int64_t first, int64_t last,
                   const int wide) {
    int64_t N = s->N, M = s->M, K = s->K, keys = whole(M, WIDE), dims = whole(K, wide);
    int64_t words = keys * K / 2 + keys / 2 * dims + ROWS * (keys + keys / 2 + dims);
    uint32_t *arena = aligned_alloc(64, (size_t)whole(words + 5 * WIDE, WIDE) * 4), *all = arena;
    if (!all) return ENOMEM;
    uint32_t *packed_k = take(&arena, keys * K / 2), *packed_v = take(&arena, keys / 2 * dims);
    float *scores = take(&arena, ROWS * keys), *result = take(&arena, ROWS * dims);
    uint16_t *weights = take(&arena, ROWS * keys / 2);
    float scale = 1.44269504f / __builtin_sqrtf((float)K);
    for (int64_t i = first; i < last; i++) {
        int64_t row = i / s->heads, head = i % s->heads;
        transpose(k + row * s->k.row + head * s->k.head, s->k.token, M, K, packed_k);
        interleave(v + row * s->v.row + head * s->v.head, s->v.token, M, K, keys, packed_v, wide);
        const uint16_t *queries = q + row * s->q.row + head * s->q.head;
        uint16_t *to = out + row * s->out.row + head * s->out.head;
        for (int64_t n = 0; n < N; n += ROWS) {
            const uint16_t *a[ROWS];
            rows_of(queries, s->q.token, n, N, a);
            for (int64_t m = 0; m < keys; m += WIDE)
                tile(a, 1, packed_k + m * (K / 2), K / 2, scores + m, keys, WIDE, 0);
            float found[ROWS][2];
            for (int64_t r = 0; r < ROWS; r++) {
                weights_of(scores + r * keys, M, keys, scale, weights + r * keys, found[r]);
                a[r] = weights + r * keys;
            }
            for (int64_t d = 0; d < K; d += wide)
                tile(a, 1, packed_v + d * (keys / 2), keys / 2, result + d, dims, wide, 0);
            for (int64_t r = 0; r < ROWS && n + r < N; r++) {
                put(to + (n + r) * s->out.token, result + r * dims, K, found[r][1]);
                memcpy(stats + 2 * (i * N + n + r), found[r], sizeof found[r]);
            }
        }
    }
    free(all);
    return 0;
}

/* Heads first..last of all rows' heads. stats [heads,N,2] is for the backward pass. */
AVX512 int worldloop_attention_bf16(const uint16_t *q, const uint16_t *k, const uint16_t *v,
                                    uint16_t *out, float *stats, const AttentionShape *s,
                                    int64_t first, int64_t last) {
    if (s->K <= 32) return forward(q, k, v, out, stats, s, first, last, 32);
    return forward(q, k, v, out, stats, s, first, last, WIDE);
}

INLINE float dot(const uint16_t *x, const uint16_t *y, int64_t K) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < K; d += 16)
        sum = _mm512_fmadd_ps(load(x + d, lanes(K - d)), load(y + d, lanes(K - d)), sum);
    return _mm512_reduce_add_ps(sum);
}

/* Of two queries: weights p and d_scores = p (d_p - delta) as words of both for the sums over
 * queries, d_scores also as bf16 rows for the sum over keys. */
INLINE void gradients_of(const float *scores, const float *d_p, const float stats[2][2],
                         const float delta[2], int64_t M, int64_t keys, float scale,
                         uint16_t *d_rows, uint32_t *p_words, uint32_t *d_words) {
    for (int64_t m = 0; m < keys; m += 16) {
        __m512i p_word = _mm512_setzero_si512(), d_word = p_word;
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + r * keys + m), _mm512_set1_ps(scale),
                                       _mm512_set1_ps(stats[r][0]));
            __m512 p = _mm512_maskz_mul_ps(lanes(M - m), exp2_ps(x), _mm512_set1_ps(stats[r][1]));
            __m512 from = _mm512_sub_ps(_mm512_load_ps(d_p + r * keys + m), _mm512_set1_ps(delta[r]));
            __m256i d = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mul_ps(lanes(M - m), p, from));
            _mm256_store_si256((__m256i *)(d_rows + r * keys + m), d);
            __m512i p_half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
            __m512i d_half = _mm512_cvtepu16_epi32(d);
            p_word = _mm512_or_si512(p_word, r ? _mm512_slli_epi32(p_half, 16) : p_half);
            d_word = _mm512_or_si512(d_word, r ? _mm512_slli_epi32(d_half, 16) : d_half);
        }
        _mm512_store_si512(p_words + m, p_word);
        _mm512_store_si512(d_words + m, d_word);
    }
}

INLINE int backward(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *out,
                    const uint16_t *grad, const float *stats, uint16_t *dq, uint16_t *dk,
                    uint16_t *dv, const BackwardShape *shape, int64_t first, int64_t last,
                    const int wide) {
    const AttentionShape *s = &shape->a;
    int64_t N = s->N, M = s->M, K = s->K, keys = whole(M, WIDE), dims = whole(K, wide);
    int64_t words = keys * K + keys / 2 * dims + 2 * (keys + ROWS) * dims +
                    ROWS * (2 * keys + keys / 2 + dims) + QUERIES * (keys + dims) + 2 * WIDE;
    uint32_t *arena = aligned_alloc(64, (size_t)whole(words + 13 * WIDE, WIDE) * 4), *all = arena;
    if (!all) return ENOMEM;
    uint32_t *packed_k = take(&arena, keys * K / 2), *packed_v = take(&arena, keys * K / 2);
    uint32_t *mixed_k = take(&arena, keys / 2 * dims);
    uint32_t *mixed_q = take(&arena, QUERIES / 2 * dims);
    uint32_t *mixed_grad = take(&arena, QUERIES / 2 * dims);
    /* A tile of the last keys reads and sums some words and rows beyond them. */
    uint32_t *p_words = take(&arena, QUERIES / 2 * keys + WIDE);
    uint32_t *d_words = take(&arena, QUERIES / 2 * keys + WIDE);
    float *sum_k = take(&arena, (keys + ROWS) * dims), *sum_v = take(&arena, (keys + ROWS) * dims);
    float *scores = take(&arena, ROWS * keys), *d_p = take(&arena, ROWS * keys);
    float *result = take(&arena, ROWS * dims);
    uint16_t *d_rows = take(&arena, ROWS * keys / 2);
    float root = 1 / __builtin_sqrtf((float)K), scale = 1.44269504f * root;
    for (int64_t i = first; i < last; i++) {
        int64_t row = i / s->heads, head = i % s->heads;
        const uint16_t *keys_of = k + row * s->k.row + head * s->k.head;
        const uint16_t *queries = q + row * s->q.row + head * s->q.head;
        const uint16_t *outs = out + row * s->out.row + head * s->out.head;
        const uint16_t *grads = grad + row * shape->grad.row + head * shape->grad.head;
        transpose(keys_of, s->k.token, M, K, packed_k);
        transpose(v + row * s->v.row + head * s->v.head, s->v.token, M, K, packed_v);
        interleave(keys_of, s->k.token, M, K, keys, mixed_k, wide);
        memset(sum_k, 0, (size_t)((keys + ROWS) * dims) * 4);
        memset(sum_v, 0, (size_t)((keys + ROWS) * dims) * 4);
        for (int64_t block = 0; block < N; block += QUERIES) {
            int64_t count = N - block < QUERIES ? N - block : QUERIES;
            int64_t padded = whole(count, ROWS); /* even; those beyond are zero in both mixed_ */
            interleave(queries + block * s->q.token, s->q.token, count, K, padded, mixed_q, wide);
            interleave(grads + block * shape->grad.token, shape->grad.token, count, K, padded,
                       mixed_grad, wide);
            for (int64_t t = 0; t < padded; t += ROWS) {
                int64_t n = block + t;
                const uint16_t *a[ROWS], *g[ROWS];
                rows_of(queries, s->q.token, n, N, a);
                rows_of(grads, shape->grad.token, n, N, g);
                for (int64_t m = 0; m < keys; m += WIDE) {
                    tile(a, 1, packed_k + m * (K / 2), K / 2, scores + m, keys, WIDE, 0);
                    tile(g, 1, packed_v + m * (K / 2), K / 2, d_p + m, keys, WIDE, 0);
                }
                for (int64_t r = 0; r < ROWS; r += 2) {
                    float found[2][2], delta[2];
                    for (int64_t two = 0; two < 2; two++) {
                        int64_t query = n + r + two < N ? n + r + two : N - 1;
                        memcpy(found[two], stats + 2 * (i * N + query), sizeof found[two]);
                        delta[two] = dot(grads + query * shape->grad.token,
                                         outs + query * s->out.token, K);
                    }
                    int64_t at = (t + r) / 2 * keys;
                    gradients_of(scores + r * keys, d_p + r * keys, found, delta, M, keys, scale,
                                 d_rows + r * keys, p_words + at, d_words + at);
                }
                for (int64_t r = 0; r < ROWS; r++) a[r] = d_rows + r * keys;
                for (int64_t d = 0; d < K; d += wide)
                    tile(a, 1, mixed_k + d * (keys / 2), keys / 2, result + d, dims, wide, 0);
                uint16_t *to = dq + row * shape->dq.row + head * shape->dq.head;
                for (int64_t r = 0; r < ROWS && n + r < N; r++)
                    put(to + (n + r) * shape->dq.token, result + r * dims, K, root);
            }
            for (int64_t m = 0; m < M; m += ROWS) {
                const uint16_t *p[ROWS], *d_of[ROWS];
                for (int64_t r = 0; r < ROWS; r++) {
                    p[r] = (const uint16_t *)(p_words + m + r);
                    d_of[r] = (const uint16_t *)(d_words + m + r);
                }
                for (int64_t d = 0; d < K; d += wide) {
                    tile(p, keys, mixed_grad + d * (padded / 2), padded / 2, sum_v + m * dims + d,
                         dims, wide, 1);
                    tile(d_of, keys, mixed_q + d * (padded / 2), padded / 2, sum_k + m * dims + d,
                         dims, wide, 1);
                }
            }
        }
        uint16_t *to_k = dk + row * shape->dk.row + head * shape->dk.head;
        uint16_t *to_v = dv + row * shape->dv.row + head * shape->dv.head;
        for (int64_t m = 0; m < M; m++) {
            put(to_k + m * shape->dk.token, sum_k + m * dims, K, root);
            put(to_v + m * shape->dv.token, sum_v + m * dims, K, 1);
        }
    }
    free(all);
    return 0;
}

AVX512 int worldloop_attention_backward_bf16(const uint16_t *q, const uint16_t *k,
                                             const uint16_t *v, const uint16_t *out,
                                             const uint16_t *grad, const float *stats, uint16_t *dq,
                                             uint16_t *dk, uint16_t *dv, const BackwardShape *s,
                                             int64_t first, int64_t last) {
    if (s->a.K <= 32)
        return backward(q, k, v, out, grad, stats, dq, dk, dv, s, first, last, 32);
    return backward(q, k, v, out, grad, stats, dq, dk, dv, s, first, last, WIDE);
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

int worldloop_bf16_abi(void) { return 0; }

#endif
