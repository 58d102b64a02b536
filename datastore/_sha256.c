/* SHA-256 of many independent buffers side by side, one vector lane or one of two interleaved streams each.
 *
 * datastore/sha256.py is the only user; hashlib is the oracle and the fallback. The file compiles for any x86-64 CPU (the
 * variants carry their own target attributes and `variants()` names those that the running CPU has) and, with an
 * empty list of variants, on other architectures.
 *
 * Every variant is a kernel that feeds n blocks to each of its lanes. The driver below it keeps the lanes busy: a lane
 * whose buffer ends gets the next one, longest first; when only a few lanes are left they are finished one by one.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64
#define MAX_LANES 16
#define MAX_SUFFIX 64
/* Rest of the data (63) + suffix + 0x80 + length of the message (8), in whole blocks. */
#define MAX_TAIL (3 * BLOCK)

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>
#include <immintrin.h>

static const uint32_t K[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* State of all lanes: word w of lane l is s[w][l]. */
typedef struct {
    uint32_t s[8][MAX_LANES] __attribute__((aligned(64)));
} State;

/* Feeds `blocks` blocks to every lane; p[l] is the first block of lane l. */
typedef void (*Kernel)(State *state, const uint8_t *const *p, size_t blocks);

/* ---- one lane in plain C: the ends of batches on CPUs without SHA extensions ---- */

#define ROR(x, n) (((x) >> (n)) | ((x) << (32 - (n))))

static void
plain_one(State *state, int lane, const uint8_t *p, size_t blocks)
{
    uint32_t h[8], w[16];
    for (int i = 0; i < 8; i++) h[i] = state->s[i][lane];
    for (; blocks; blocks--, p += BLOCK) {
        uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], i = h[7];
        for (int r = 0; r < 64; r++) {
            uint32_t x;
            if (r < 16) {
                memcpy(&x, p + 4 * r, 4);
                x = __builtin_bswap32(x);
            } else {
                uint32_t u = w[(r + 1) & 15], v = w[(r + 14) & 15];
                x = w[r & 15] + w[(r + 9) & 15] + (ROR(u, 7) ^ ROR(u, 18) ^ (u >> 3))
                    + (ROR(v, 17) ^ ROR(v, 19) ^ (v >> 10));
            }
            w[r & 15] = x;
            uint32_t t = i + (ROR(e, 6) ^ ROR(e, 11) ^ ROR(e, 25)) + (g ^ (e & (f ^ g))) + K[r] + x;
            uint32_t m = (ROR(a, 2) ^ ROR(a, 13) ^ ROR(a, 22)) + ((a & b) | (c & (a | b)));
            i = g, g = f, f = e, e = d + t, d = c, c = b, b = a, a = t + m;
        }
        h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += i;
    }
    for (int i = 0; i < 8; i++) state->s[i][lane] = h[i];
}

/* ---- rounds, written once for vectors of any width ---- */

/* The rotation of a..h is in the order of the arguments. */
#define ROUND(a, b, c, d, e, f, g, h, r, x)                                                                            \
    do {                                                                                                               \
        V t_ = ADD(ADD(h, BIG1(e)), ADD(CH(e, f, g), ADD(SET(K[r]), x)));                                              \
        d = ADD(d, t_);                                                                                                \
        h = ADD(t_, ADD(BIG0(a), MAJ(a, b, c)));                                                                       \
    } while (0)
#define EXPAND(i)                                                                                                      \
    (w[i] = ADD(ADD(w[i], w[(i + 9) & 15]), ADD(SMALL0(w[(i + 1) & 15]), SMALL1(w[(i + 14) & 15]))))
#define ROUNDS8(r, x0, x1, x2, x3, x4, x5, x6, x7)                                                                     \
    ROUND(a, b, c, d, e, f, g, h, r, x0);                                                                              \
    ROUND(h, a, b, c, d, e, f, g, r + 1, x1);                                                                          \
    ROUND(g, h, a, b, c, d, e, f, r + 2, x2);                                                                          \
    ROUND(f, g, h, a, b, c, d, e, r + 3, x3);                                                                          \
    ROUND(e, f, g, h, a, b, c, d, r + 4, x4);                                                                          \
    ROUND(d, e, f, g, h, a, b, c, r + 5, x5);                                                                          \
    ROUND(c, d, e, f, g, h, a, b, r + 6, x6);                                                                          \
    ROUND(b, c, d, e, f, g, h, a, r + 7, x7)
#define FIRST16                                                                                                        \
    ROUNDS8(0, w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]);                                                        \
    ROUNDS8(8, w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15])
#define NEXT16(r)                                                                                                      \
    ROUNDS8(r, EXPAND(0), EXPAND(1), EXPAND(2), EXPAND(3), EXPAND(4), EXPAND(5), EXPAND(6), EXPAND(7));                \
    ROUNDS8(r + 8, EXPAND(8), EXPAND(9), EXPAND(10), EXPAND(11), EXPAND(12), EXPAND(13), EXPAND(14), EXPAND(15))

/* ---- 16 lanes, AVX-512 ---- */

#define V __m512i
#define ADD(x, y) _mm512_add_epi32(x, y)
#define SET(x) _mm512_set1_epi32((int)(x))
#define XOR3(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0x96)
#define CH(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xca)
#define MAJ(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xe8)
#define RR(x, n) _mm512_ror_epi32(x, n)
#define BIG0(x) XOR3(RR(x, 2), RR(x, 13), RR(x, 22))
#define BIG1(x) XOR3(RR(x, 6), RR(x, 11), RR(x, 25))
#define SMALL0(x) XOR3(RR(x, 7), RR(x, 18), _mm512_srli_epi32(x, 3))
#define SMALL1(x) XOR3(RR(x, 17), RR(x, 19), _mm512_srli_epi32(x, 10))

__attribute__((target("avx512f,avx512bw"))) static void
lanes16(State *state, const uint8_t *const *p, size_t blocks)
{
    const V swap = _mm512_broadcast_i32x4(_mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));
    V s[8];
    for (int i = 0; i < 8; i++) s[i] = _mm512_load_si512(state->s[i]);
    for (size_t offset = 0; offset < blocks * BLOCK; offset += BLOCK) {
        V w[16], t[16];
        for (int i = 0; i < 16; i++) w[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(p[i] + offset), swap);
        /* 16 blocks of 16 words become 16 words of 16 lanes: pairs, fours, then whole 128-bit quarters. */
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            V x0 = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88), x1 = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
            V y0 = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88), y1 = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
            t[i] = _mm512_shuffle_i32x4(x0, y0, 0x88);
            t[i + 8] = _mm512_shuffle_i32x4(x0, y0, 0xdd);
            t[i + 4] = _mm512_shuffle_i32x4(x1, y1, 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(x1, y1, 0xdd);
        }
        for (int i = 0; i < 16; i++) w[i] = t[i];
        V a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
        FIRST16;
        NEXT16(16);
        NEXT16(32);
        NEXT16(48);
        s[0] = ADD(s[0], a), s[1] = ADD(s[1], b), s[2] = ADD(s[2], c), s[3] = ADD(s[3], d);
        s[4] = ADD(s[4], e), s[5] = ADD(s[5], f), s[6] = ADD(s[6], g), s[7] = ADD(s[7], h);
    }
    for (int i = 0; i < 8; i++) _mm512_store_si512(state->s[i], s[i]);
}

#undef V
#undef ADD
#undef SET
#undef XOR3
#undef CH
#undef MAJ
#undef RR

/* ---- 8 lanes, AVX2 ---- */

#define V __m256i
#define ADD(x, y) _mm256_add_epi32(x, y)
#define SET(x) _mm256_set1_epi32((int)(x))
#define XOR3(x, y, z) _mm256_xor_si256(_mm256_xor_si256(x, y), z)
#define CH(x, y, z) _mm256_xor_si256(z, _mm256_and_si256(x, _mm256_xor_si256(y, z)))
#define MAJ(x, y, z) _mm256_or_si256(_mm256_and_si256(x, y), _mm256_and_si256(z, _mm256_or_si256(x, y)))
#define RR(x, n) _mm256_or_si256(_mm256_srli_epi32(x, n), _mm256_slli_epi32(x, 32 - (n)))
#undef SMALL0
#undef SMALL1
#define SMALL0(x) XOR3(RR(x, 7), RR(x, 18), _mm256_srli_epi32(x, 3))
#define SMALL1(x) XOR3(RR(x, 17), RR(x, 19), _mm256_srli_epi32(x, 10))

__attribute__((target("avx2"))) static void
lanes8(State *state, const uint8_t *const *p, size_t blocks)
{
    const V swap = _mm256_broadcastsi128_si256(_mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3));
    V s[8];
    for (int i = 0; i < 8; i++) s[i] = _mm256_load_si256((const V *)state->s[i]);
    for (size_t offset = 0; offset < blocks * BLOCK; offset += BLOCK) {
        V w[16], t[8], u[8];
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 8; i++)
                t[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const V *)(p[i] + offset + 32 * half)), swap);
            for (int i = 0; i < 8; i += 2) {
                u[i] = _mm256_unpacklo_epi32(t[i], t[i + 1]);
                u[i + 1] = _mm256_unpackhi_epi32(t[i], t[i + 1]);
            }
            for (int i = 0; i < 8; i += 4) {
                t[i] = _mm256_unpacklo_epi64(u[i], u[i + 2]);
                t[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
                t[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
                t[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
            }
            for (int i = 0; i < 4; i++) {
                w[8 * half + i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
                w[8 * half + i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
            }
        }
        V a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
        FIRST16;
        NEXT16(16);
        NEXT16(32);
        NEXT16(48);
        s[0] = ADD(s[0], a), s[1] = ADD(s[1], b), s[2] = ADD(s[2], c), s[3] = ADD(s[3], d);
        s[4] = ADD(s[4], e), s[5] = ADD(s[5], f), s[6] = ADD(s[6], g), s[7] = ADD(s[7], h);
    }
    for (int i = 0; i < 8; i++) _mm256_store_si256((V *)state->s[i], s[i]);
}

/* ---- SHA extensions: one stream, or two interleaved, which hides the latency of the round instruction ---- */

#define SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))

/* The instructions keep the state as ABEF and CDGH. */
SHA_TARGET static inline void
sha_load(const State *state, int lane, __m128i *abef, __m128i *cdgh)
{
#define S(i) ((int)state->s[i][lane])
    *abef = _mm_set_epi32(S(0), S(1), S(4), S(5));
    *cdgh = _mm_set_epi32(S(2), S(3), S(6), S(7));
#undef S
}

SHA_TARGET static inline void
sha_store(State *state, int lane, __m128i abef, __m128i cdgh)
{
    uint32_t x[4], y[4];
    _mm_storeu_si128((__m128i *)x, abef);
    _mm_storeu_si128((__m128i *)y, cdgh);
    state->s[0][lane] = x[3], state->s[1][lane] = x[2], state->s[4][lane] = x[1], state->s[5][lane] = x[0];
    state->s[2][lane] = y[3], state->s[3][lane] = y[2], state->s[6][lane] = y[1], state->s[7][lane] = y[0];
}

#define SHA_LOAD(m, p) m = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p)), swap)
/* Four rounds; m holds words r..r+3. */
#define SHA_FOUR(x, y, m, r)                                                                                           \
    do {                                                                                                               \
        __m128i k_ = _mm_add_epi32(m, _mm_load_si128((const __m128i *)&K[r]));                                         \
        y = _mm_sha256rnds2_epu32(y, x, k_);                                                                           \
        x = _mm_sha256rnds2_epu32(x, y, _mm_shuffle_epi32(k_, 0x0e));                                                  \
    } while (0)
/* m0 becomes the four words after m0 .. m3. */
#define SHA_NEXT(m0, m1, m2, m3)                                                                                       \
    m0 = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(m0, m1), _mm_alignr_epi8(m3, m2, 4)), m3)

SHA_TARGET static void
sha_one(State *state, int lane, const uint8_t *p, size_t blocks)
{
    const __m128i swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    __m128i x, y, m0, m1, m2, m3;
    sha_load(state, lane, &x, &y);
    for (; blocks; blocks--, p += BLOCK) {
        __m128i x0 = x, y0 = y;
        SHA_LOAD(m0, p);
        SHA_FOUR(x, y, m0, 0);
        SHA_LOAD(m1, p + 16);
        SHA_FOUR(x, y, m1, 4);
        SHA_LOAD(m2, p + 32);
        SHA_FOUR(x, y, m2, 8);
        SHA_LOAD(m3, p + 48);
        SHA_FOUR(x, y, m3, 12);
#define SIXTEEN(r)                                                                                                     \
    SHA_NEXT(m0, m1, m2, m3);                                                                                          \
    SHA_FOUR(x, y, m0, r);                                                                                             \
    SHA_NEXT(m1, m2, m3, m0);                                                                                          \
    SHA_FOUR(x, y, m1, r + 4);                                                                                         \
    SHA_NEXT(m2, m3, m0, m1);                                                                                          \
    SHA_FOUR(x, y, m2, r + 8);                                                                                         \
    SHA_NEXT(m3, m0, m1, m2);                                                                                          \
    SHA_FOUR(x, y, m3, r + 12)
        SIXTEEN(16);
        SIXTEEN(32);
        SIXTEEN(48);
#undef SIXTEEN
        x = _mm_add_epi32(x, x0);
        y = _mm_add_epi32(y, y0);
    }
    sha_store(state, lane, x, y);
}

SHA_TARGET static void
sha_two(State *state, const uint8_t *const *lanes, size_t blocks)
{
    const __m128i swap = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    const uint8_t *p = lanes[0], *q = lanes[1];
    __m128i x, y, m0, m1, m2, m3, u, v, n0, n1, n2, n3;
    sha_load(state, 0, &x, &y);
    sha_load(state, 1, &u, &v);
    for (; blocks; blocks--, p += BLOCK, q += BLOCK) {
        __m128i x0 = x, y0 = y, u0 = u, v0 = v;
#define START(m, n, r)                                                                                                 \
    SHA_LOAD(m, p + 4 * (r));                                                                                          \
    SHA_LOAD(n, q + 4 * (r));                                                                                          \
    SHA_FOUR(x, y, m, r);                                                                                              \
    SHA_FOUR(u, v, n, r)
        START(m0, n0, 0);
        START(m1, n1, 4);
        START(m2, n2, 8);
        START(m3, n3, 12);
#undef START
#define STEP(i, j, k, l, r)                                                                                            \
    SHA_NEXT(m##i, m##j, m##k, m##l);                                                                                  \
    SHA_NEXT(n##i, n##j, n##k, n##l);                                                                                  \
    SHA_FOUR(x, y, m##i, r);                                                                                           \
    SHA_FOUR(u, v, n##i, r)
#define SIXTEEN(r)                                                                                                     \
    STEP(0, 1, 2, 3, r);                                                                                               \
    STEP(1, 2, 3, 0, r + 4);                                                                                           \
    STEP(2, 3, 0, 1, r + 8);                                                                                           \
    STEP(3, 0, 1, 2, r + 12)
        SIXTEEN(16);
        SIXTEEN(32);
        SIXTEEN(48);
#undef SIXTEEN
#undef STEP
        x = _mm_add_epi32(x, x0);
        y = _mm_add_epi32(y, y0);
        u = _mm_add_epi32(u, u0);
        v = _mm_add_epi32(v, v0);
    }
    sha_store(state, 0, x, y);
    sha_store(state, 1, u, v);
}

/* ---- registers that others left behind ---- */

/* Code that used the upper halves of vector registers and did not clear them makes every instruction of the older form
 * wait for the one before it, in this thread and for as long as it lives: SHA extensions (which have no other form) then
 * run at less than half their rate. ISA-L's CRC leaves a thread like that. */
__attribute__((target("avx"))) static void
clear_upper_halves(void)
{
    _mm256_zeroupper();
}

static void
clear_vectors(void)
{
    if (__builtin_cpu_supports("avx")) clear_upper_halves();
}

__attribute__((target("xsave"))) static uint64_t
state_in_use(void)
{
    return _xgetbv(1);
}

/* Whether the upper halves are in use: 1, 0, or -1 if this CPU does not tell. Only tests ask: a rate would say nothing on
 * a busy machine. */
static int
vectors_in_use(void)
{
    unsigned a = 0, b, c, d;
    if (!__builtin_cpu_supports("avx") || !__get_cpuid_count(13, 1, &a, &b, &c, &d) || !(a >> 2 & 1)) return -1;
    return (int)(state_in_use() >> 2 & 1);
}

/* ---- what the running CPU can do ---- */

typedef struct {
    const char *name;
    int lanes;
    Kernel kernel;
} Variant;

static const Variant VARIANTS[] = {
    {"lanes16", 16, lanes16},
    {"lanes8", 8, lanes8},
    {"sha-ni-x2", 2, sha_two},
};
#define VARIANT_COUNT ((int)(sizeof VARIANTS / sizeof *VARIANTS))

static int
has_sha(void)
{
    unsigned a, b, c, d; /* by cpuid: compilers differ in whether they know the feature by name */
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

static int
supported(const Variant *variant)
{
    if (variant->kernel == lanes16) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (variant->kernel == lanes8) return __builtin_cpu_supports("avx2") != 0;
    return has_sha();
}

/* ---- the driver ---- */

typedef struct {
    const uint8_t *data;
    size_t length;
    size_t number; /* position in the caller's sequence */
} Job;

typedef struct {
    const uint8_t *next; /* next block, in the data or in `tail` */
    size_t blocks;       /* whole blocks there */
    int tail_blocks;     /* blocks of `tail` still to come after them */
    size_t number;       /* whose digest it will be */
    uint8_t tail[MAX_TAIL];
} Lane;

static int
longer_first(const void *x, const void *y)
{
    size_t a = ((const Job *)x)->length, b = ((const Job *)y)->length;
    return a < b ? 1 : a > b ? -1 : 0;
}

static void
lane_start(Lane *lane, State *state, int l, const Job *job, const uint8_t *suffix, size_t suffix_length)
{
    size_t rest = job->length % BLOCK, used = rest + suffix_length;
    uint64_t bits = __builtin_bswap64((uint64_t)(job->length + suffix_length) * 8);
    lane->tail_blocks = (int)((used + 9 + BLOCK - 1) / BLOCK);
    memset(lane->tail, 0, sizeof lane->tail);
    if (rest) memcpy(lane->tail, job->data + (job->length - rest), rest);
    if (suffix_length) memcpy(lane->tail + rest, suffix, suffix_length);
    lane->tail[used] = 0x80;
    memcpy(lane->tail + lane->tail_blocks * BLOCK - 8, &bits, 8);
    lane->next = job->data;
    lane->blocks = job->length / BLOCK;
    lane->number = job->number;
    for (int i = 0; i < 8; i++) state->s[i][l] = INITIAL[i];
}

/* Goes over to the tail once the data is through; false if all is through. */
static int
lane_more(Lane *lane)
{
    if (lane->blocks == 0 && lane->tail_blocks) {
        lane->next = lane->tail;
        lane->blocks = (size_t)lane->tail_blocks;
        lane->tail_blocks = 0;
    }
    return lane->blocks != 0;
}

static void
lane_result(const Lane *lane, const State *state, int l, uint8_t *digests)
{
    for (int i = 0; i < 8; i++) {
        uint32_t word = __builtin_bswap32(state->s[i][l]);
        memcpy(digests + 32 * lane->number + 4 * i, &word, 4);
    }
}

static void
run(const Variant *variant, Job *jobs, size_t count, const uint8_t *suffix, size_t suffix_length, uint8_t *digests)
{
    State state;
    Lane lanes[MAX_LANES];
    int index[MAX_LANES]; /* lane number of each active lane */
    int active = 0, sha = has_sha();
    size_t taken = 0;
    /* One lane of a vector does a sixteenth or an eighth of the kernel's rate; below that the rest goes one by one. */
    int few = variant->lanes == 2 ? 1 : sha ? variant->lanes / 2 : 2;

    clear_vectors();
    qsort(jobs, count, sizeof *jobs, longer_first);
    memset(&state, 0, sizeof state);
    for (; active < variant->lanes && taken < count; active++) {
        lane_start(&lanes[active], &state, active, &jobs[taken++], suffix, suffix_length);
        lane_more(&lanes[active]);
        index[active] = active;
    }
    while (active > few || (active && taken < count)) {
        const uint8_t *p[MAX_LANES];
        size_t blocks = SIZE_MAX;
        for (int i = 0; i < active; i++)
            if (lanes[index[i]].blocks < blocks) blocks = lanes[index[i]].blocks;
        for (int l = 0; l < variant->lanes; l++) p[l] = lanes[index[0]].next; /* idle lanes follow another one */
        for (int i = 0; i < active; i++) p[index[i]] = lanes[index[i]].next;
        variant->kernel(&state, p, blocks);
        int kept = 0;
        for (int i = 0; i < active; i++) {
            int l = index[i];
            lanes[l].next += blocks * BLOCK;
            lanes[l].blocks -= blocks;
            if (!lane_more(&lanes[l])) {
                lane_result(&lanes[l], &state, l, digests);
                if (taken == count) continue;
                lane_start(&lanes[l], &state, l, &jobs[taken++], suffix, suffix_length);
                lane_more(&lanes[l]);
            }
            index[kept++] = l;
        }
        active = kept;
    }
    for (int i = 0; i < active; i++) {
        int l = index[i];
        do {
            (sha ? sha_one : plain_one)(&state, l, lanes[l].next, lanes[l].blocks);
            lanes[l].blocks = 0;
        } while (lane_more(&lanes[l]));
        lane_result(&lanes[l], &state, l, digests);
    }
}

#else /* other architectures: no variants, sha256.py uses hashlib */

typedef struct {
    const char *name;
    int lanes;
} Variant;
typedef struct {
    const uint8_t *data;
    size_t length;
    size_t number;
} Job;
static const Variant VARIANTS[] = {{"", 0}};
#define VARIANT_COUNT 0
#define supported(variant) 0
#define run(variant, jobs, count, suffix, suffix_length, digests) ((void)(digests))
#define clear_vectors() ((void)0)
#define vectors_in_use() (-1)

#endif

/* ---- Python ---- */

static PyObject *
variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    PyObject *found = PyList_New(0);
    for (int i = 0; found && i < VARIANT_COUNT; i++) {
        if (!supported(&VARIANTS[i])) continue;
        PyObject *item = Py_BuildValue("(si)", VARIANTS[i].name, VARIANTS[i].lanes);
        if (!item || PyList_Append(found, item) < 0) Py_CLEAR(found);
        Py_XDECREF(item);
    }
    return found;
}

static PyObject *
digest_many(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name, *suffix;
    PyObject *sequence, *items, *digests = NULL;
    Py_ssize_t suffix_length, taken = 0;
    const Variant *variant = NULL;

    if (!PyArg_ParseTuple(args, "sOy#", &name, &sequence, &suffix, &suffix_length)) return NULL;
    for (int i = 0; i < VARIANT_COUNT; i++)
        if (!strcmp(VARIANTS[i].name, name) && supported(&VARIANTS[i])) variant = &VARIANTS[i];
    if (!variant) return PyErr_Format(PyExc_ValueError, "this machine has no variant %s", name);
    if (suffix_length > MAX_SUFFIX) return PyErr_Format(PyExc_ValueError, "a suffix has at most %d bytes", MAX_SUFFIX);
    items = PySequence_Tuple(sequence);
    if (!items) return NULL;
    Py_ssize_t count = PyTuple_Size(items);
    Py_buffer *buffers = PyMem_Calloc((size_t)count + 1, sizeof *buffers);
    Job *jobs = PyMem_Calloc((size_t)count + 1, sizeof *jobs);
    if (!buffers || !jobs) {
        PyErr_NoMemory();
        goto done;
    }
    for (; taken < count; taken++) {
        if (PyObject_GetBuffer(PyTuple_GetItem(items, taken), &buffers[taken], PyBUF_SIMPLE) < 0) goto done;
        jobs[taken].data = buffers[taken].buf;
        jobs[taken].length = (size_t)buffers[taken].len;
        jobs[taken].number = (size_t)taken;
    }
    digests = PyBytes_FromStringAndSize(NULL, 32 * count);
    if (digests && count) {
        uint8_t *output = (uint8_t *)PyBytes_AsString(digests);
        Py_BEGIN_ALLOW_THREADS
        run(variant, jobs, (size_t)count, (const uint8_t *)suffix, (size_t)suffix_length, output);
        Py_END_ALLOW_THREADS
    }
done:
    while (taken > 0) PyBuffer_Release(&buffers[--taken]);
    PyMem_Free(buffers);
    PyMem_Free(jobs);
    Py_DECREF(items);
    return digests;
}

static PyObject *
clear_registers(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    clear_vectors();
    Py_RETURN_NONE;
}

static PyObject *
registers_in_use(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    int in_use = vectors_in_use();
    if (in_use < 0) Py_RETURN_NONE;
    return PyBool_FromLong(in_use);
}

static PyMethodDef methods[] = {
    {"clear_registers", clear_registers, METH_NOARGS,
     "clear_registers() clears the upper halves of this thread's vector registers, which slow down what comes next"},
    {"registers_in_use", registers_in_use, METH_NOARGS,
     "registers_in_use() -> whether those upper halves are in use; None if the CPU does not tell"},
    {"variants", variants, METH_NOARGS, "variants() -> list of (name, lanes) that this CPU can run"},
    {"digest_many", digest_many, METH_VARARGS,
     "digest_many(variant, buffers, suffix) -> SHA-256 of each buffer + suffix (at most 64 bytes), packed"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sha256", "SHA-256 of many buffers side by side.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__sha256(void)
{
    return PyModuleDef_Init(&module);
}
