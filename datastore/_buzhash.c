/* Buzhash over the last 64 bytes: where in a stream does a chunk end?
 *
 * datastore/buzhash.py is the only user; its Python form is the oracle and the fallback.
 *
 * The hash of a position depends on the 64 bytes before it alone. One recurrence costs the latency of a rotation and two
 * XORs per byte, so several places of the block, each warmed up with the 64 bytes before it, are gone through side by
 * side: four in plain C, sixteen in the lanes of AVX-512, where the table is looked up by byte permutations instead of
 * loads. Hits are rare: the lanes only note that there was one, and the first lane that has one is gone through again.
 *
 * Tables are rotated so that the bits of the hash that count are the topmost ones: a hit is then one comparison.
 */

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define WINDOW 64
/* Positions per lane and batch. No power of two: lanes 4 KiB apart meet in the same cache sets. */
#define SEGMENT 4160
/* Shorter lanes are not worth their warm-up. */
#define MIN_SEGMENT 512
/* Below this many positions the GIL is kept: giving it back costs more than the scan. */
#define KEEP_GIL 2048

static const uint32_t TABLE[256] = {
    0x458be752, 0xc10748cc, 0xfbbcdbb8, 0x6ded5b68, 0xb10a82b5, 0x20d75648, 0xdfc5665f, 0xa8428801,
    0x7ebf5191, 0x841135c7, 0x65cc53b3, 0x280a597c, 0x16f60255, 0xc78cbc3e, 0x294415f5, 0xb938d494,
    0xec85c4e6, 0xb7d33edc, 0xe549b544, 0xfdeda5aa, 0x882bf287, 0x3116737c, 0x05569956, 0xe8cc1f68,
    0x0806ac5e, 0x22a14443, 0x15297e10, 0x50d090e7, 0x4ba60f6f, 0xefd9f1a7, 0x5c5c885c, 0x82482f93,
    0x9bfd7c64, 0x0b3e7276, 0xf2688e77, 0x8fad8abc, 0xb0509568, 0xf1ada29f, 0xa53efdfe, 0xcb2b1d00,
    0xf2a9e986, 0x6463432b, 0x95094051, 0x5a223ad2, 0x9be8401b, 0x61e579cb, 0x1a556a14, 0x5840fdc2,
    0x9261ddf6, 0xcde002bb, 0x52432bb0, 0xbf17373e, 0x7b7c222f, 0x2955ed16, 0x9f10ca59, 0xe840c4c9,
    0xccabd806, 0x14543f34, 0x1462417a, 0x0d4a1f9c, 0x087ed925, 0xd7f8f24c, 0x7338c425, 0xcf86c8f5,
    0xb19165cd, 0x9891c393, 0x325384ac, 0x0308459d, 0x86141d7e, 0xc922116a, 0xe2ffa6b6, 0x53f52aed,
    0x2cd86197, 0xf5b9f498, 0xbf319c8f, 0xe0411fae, 0x977eb18c, 0xd8770976, 0x9833466a, 0xc674df7f,
    0x8c297d45, 0x8ca48d26, 0xc49ed8e2, 0x7344f874, 0x556f79c7, 0x6b25eaed, 0xa03e2b42, 0xf68f66a4,
    0x8e8b09a2, 0xf2e0e62a, 0x0d3a9806, 0x9729e493, 0x8c72b0fc, 0x160b94f6, 0x450e4d3d, 0x7a320e85,
    0xbef8f0e1, 0x21d73653, 0x4e3d977a, 0x1e7b3929, 0x1cc6c719, 0xbe478d53, 0x8d752809, 0xe6d8c2c6,
    0x275f0892, 0xc8acc273, 0x4cc21580, 0xecc4a617, 0xf5f7be70, 0xe795248a, 0x375a2fe9, 0x425570b6,
    0x8898dcf8, 0xdc2d97c4, 0x0106114b, 0x364dc22f, 0x1e0cad1f, 0xbe63803c, 0x5f69fac2, 0x4d5afa6f,
    0x1bc0dfb5, 0xfb273589, 0x0ea47f7b, 0x3c1c2b50, 0x21b2a932, 0x6b1223fd, 0x2fe706a8, 0xf9bd6ce2,
    0xa268e64e, 0xe987f486, 0x3eacf563, 0x1ca2018c, 0x65e18228, 0x2207360a, 0x57cf1715, 0x34c37d2b,
    0x1f8f3cde, 0x93b657cf, 0x31a019fd, 0xe69eb729, 0x8bca7b9b, 0x4c9d5bed, 0x277ebeaf, 0xe0d8f8ae,
    0xd150821c, 0x31381871, 0xafc3f1b0, 0x927db328, 0xe95effac, 0x305a47bd, 0x426ba35b, 0x1233af3f,
    0x686a5b83, 0x50e072e5, 0xd9d3bb2a, 0x8befc475, 0x487f0de6, 0xc88dff89, 0xbd664d5e, 0x971b5d18,
    0x63b14847, 0xd7d3c1ce, 0x7f583cf3, 0x72cbcb09, 0xc0d0a81c, 0x7fa3429b, 0xe9158a1b, 0x225ea19a,
    0xd8ca9ea3, 0xc763b282, 0xbb0c6341, 0x020b8293, 0xd4cd299d, 0x58cfa7f8, 0x91b4ee53, 0x37e4d140,
    0x95ec764c, 0x30f76b06, 0x5ee68d24, 0x679c8661, 0xa41979c2, 0xf2b61284, 0x4fac1475, 0x0adb49f9,
    0x19727a23, 0x15a7e374, 0xc43a18d5, 0x3fb1aa73, 0x342fc615, 0x924c0793, 0xbee2d7f0, 0x8a279de9,
    0x4aa2d70c, 0xe24dd37f, 0xbe862c0b, 0x177c22c2, 0x5388e5ee, 0xcd8a7510, 0xf901b4fd, 0xdbc13dbc,
    0x6c0bae5b, 0x64efe8c7, 0x48b02079, 0x80331a49, 0xca3d8ae6, 0xf3546190, 0xfed7108b, 0xc49b941b,
    0x32baf4a9, 0xeb833a4a, 0x88a3f1a5, 0x3a91ce0a, 0x3cc27da1, 0x7112e684, 0x4a3096b1, 0x3794574c,
    0xa3c8b6f3, 0x1d213941, 0x6e0a2e00, 0x233479f1, 0x0f4cd82f, 0x6093edd2, 0x5d7d209e, 0x464fe319,
    0xd4dcac9e, 0x0db845cb, 0xfb5e4bc3, 0xe0256ce1, 0x09fb4ed1, 0x0914be1e, 0xa5bdb2c3, 0xc6eb57bb,
    0x30320350, 0x3f397e91, 0xa67791bc, 0x86bc0e2c, 0xefa0a7e2, 0xe9ff7543, 0xe733612c, 0xd185897b,
    0x329e5388, 0x91dd236b, 0x2ecb0d93, 0xf4d82a3d, 0x35b5c03f, 0xe4e606f0, 0x05b21843, 0x37b45964,
    0x5eff22f4, 0x6027f4cc, 0x77178b3c, 0xae507131, 0x7bf7cabc, 0xf9c18d66, 0x593ade65, 0xd95ddf11,
};

#define ROTL(x, n) ((uint32_t)((x) << (n)) | (uint32_t)((x) >> (32 - (n))))

typedef struct {
    uint32_t table[256] __attribute__((aligned(64))); /* rotated */
    uint32_t limit;                                   /* a hash of at least this is a hit */
#if defined(__x86_64__)
    uint8_t planes[4][256] __attribute__((aligned(64))); /* byte k of every table entry */
#endif
} Search;

/* All functions below look at positions: position c of `data` is the place behind its byte c - 1, and its hash is that of
 * data[c - 64 .. c - 1], which must be there. They return the first hit of first..last, or 0. */

static inline uint32_t
hash_at(const Search *s, const uint8_t *data, size_t position)
{
    uint32_t h = 0;
    for (const uint8_t *p = data + position - WINDOW; p < data + position; p++) h = ROTL(h, 1) ^ s->table[*p];
    return h;
}

/* Goes on from hash `h` of position first - 1. */
static size_t
scan_from(const Search *s, const uint8_t *data, uint32_t h, size_t first, size_t last)
{
    for (size_t c = first; c <= last; c++) {
        h = ROTL(h, 1) ^ s->table[data[c - 1 - WINDOW]] ^ s->table[data[c - 1]];
        if (h >= s->limit) return c;
    }
    return 0;
}

static size_t
scan_one(const Search *s, const uint8_t *data, size_t first, size_t last)
{
    uint32_t h;
    if (first > last) return 0;
    h = hash_at(s, data, first);
    return h >= s->limit ? first : scan_from(s, data, h, first + 1, last);
}

/* Four segments of `length` positions side by side, the first of them begins at `first`; `first` > 64. */
static size_t
scan_four(const Search *s, const uint8_t *data, size_t first, size_t length)
{
    const uint32_t *table = s->table, limit = s->limit;
    const uint8_t *p0 = data + first - 1, *p1 = p0 + length, *p2 = p1 + length, *p3 = p2 + length;
    uint32_t h[4];
    size_t i, hit;
    int lane;

    for (lane = 0; lane < 4; lane++) h[lane] = hash_at(s, data, first - 1 + lane * length);
    uint32_t h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3];
    for (i = 0; i < length; i++) {
        const uint8_t *o0 = p0 + i - WINDOW, *o1 = p1 + i - WINDOW, *o2 = p2 + i - WINDOW, *o3 = p3 + i - WINDOW;
        h0 = ROTL(h0, 1) ^ table[*o0] ^ table[o0[WINDOW]];
        h1 = ROTL(h1, 1) ^ table[*o1] ^ table[o1[WINDOW]];
        h2 = ROTL(h2, 1) ^ table[*o2] ^ table[o2[WINDOW]];
        h3 = ROTL(h3, 1) ^ table[*o3] ^ table[o3[WINDOW]];
        if (__builtin_expect(h0 >= limit, 0)) return first + i;
        if (__builtin_expect(h1 >= limit, 0)) { lane = 1; break; }
        if (__builtin_expect(h2 >= limit, 0)) { lane = 2; break; }
        if (__builtin_expect(h3 >= limit, 0)) { lane = 3; break; }
    }
    if (i == length) return 0;
    /* The rest of the lanes before that one may have an earlier hit. */
    h[0] = h0, h[1] = h1, h[2] = h2;
    for (int before = 0; before < lane; before++) {
        size_t start = first + before * length;
        hit = scan_from(s, data, h[before], start + i + 1, start + length - 1);
        if (hit) return hit;
    }
    return first + lane * length + i;
}

static size_t
scan_plain(const Search *s, const uint8_t *data, size_t first, size_t last)
{
    while (last + 1 - first >= 4 * MIN_SEGMENT) {
        size_t length = (last + 1 - first) / 4;
        if (length > SEGMENT) length = SEGMENT;
        size_t hit = scan_four(s, data, first, length);
        if (hit) return hit;
        first += 4 * length;
    }
    return scan_one(s, data, first, last);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>

#define LANES 16
#define VECTOR __attribute__((target("avx512f,avx512bw,avx512vbmi")))

static int
have_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vbmi");
}

/* Byte k of the table entries of 64 bytes. */
#define PLANE(k) _mm512_mask_blend_epi8(high, \
    _mm512_permutex2var_epi8(t[k][0], bytes, t[k][1]), _mm512_permutex2var_epi8(t[k][2], bytes, t[k][3]))

/* Sixteen segments of `length` positions (a multiple of 16) side by side, from position `first` > 64 on. Bit l of the
 * result: segment l has a hit. */
static VECTOR uint32_t
lanes_with_hits(const Search *s, const uint8_t *data, size_t first, size_t length)
{
    __m512i ring[WINDOW]; /* table entries of the last 64 bytes of every lane */
    __m512i t[4][4], h = _mm512_setzero_si512(), top = h;
    /* Byte i takes byte i - 1 / i + 1, and i - 2 / i + 2, of its dword. */
    const __m512i back1 = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14));
    const __m512i ahead1 = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15));
    const __m512i back2 = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13));
    const __m512i ahead2 = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15));
    const __mmask64 odd = 0xaaaaaaaaaaaaaaaau, even = ~odd, upper = 0xccccccccccccccccu, lower = ~upper;
    const uint8_t *p = data + first - 1 - WINDOW;
    size_t end = length + WINDOW;

    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) t[k][i] = _mm512_load_si512(s->planes[k] + 64 * i);
    for (int i = 0; i < WINDOW; i++) ring[i] = h;
    for (size_t i = 0; i < end; i += 16) {
        __m512i rows[4], w[4];
        if (i == WINDOW) top = _mm512_setzero_si512(); /* hashes of the warm-up do not count */
        for (int a = 0; a < 4; a++) {
            const uint8_t *q = p + i + a * length;
            __m512i r = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)q));
            r = _mm512_mask_broadcast_i32x4(r, 0x00f0, _mm_loadu_si128((const __m128i *)(q + 4 * length)));
            r = _mm512_mask_broadcast_i32x4(r, 0x0f00, _mm_loadu_si128((const __m128i *)(q + 8 * length)));
            rows[a] = _mm512_mask_broadcast_i32x4(r, 0xf000, _mm_loadu_si128((const __m128i *)(q + 12 * length)));
        }
        __m512i x = _mm512_unpacklo_epi32(rows[0], rows[1]), y = _mm512_unpacklo_epi32(rows[2], rows[3]);
        w[0] = _mm512_unpacklo_epi64(x, y), w[1] = _mm512_unpackhi_epi64(x, y);
        x = _mm512_unpackhi_epi32(rows[0], rows[1]), y = _mm512_unpackhi_epi32(rows[2], rows[3]);
        w[2] = _mm512_unpacklo_epi64(x, y), w[3] = _mm512_unpackhi_epi64(x, y);
        __m512i *slot = ring + i % WINDOW;
        for (int j = 0; j < 4; j++, slot += 4) {
            /* Dword l of `bytes` is the next four bytes of lane l. */
            __m512i bytes = w[j], v[4];
            __mmask64 high = _mm512_movepi8_mask(bytes);
            __m512i p0 = PLANE(0), p1 = PLANE(1), p2 = PLANE(2), p3 = PLANE(3);
            /* Four planes of four bytes each become four dwords, the table entries. */
            __m512i a = _mm512_mask_shuffle_epi8(p0, odd, p1, back1), b = _mm512_mask_shuffle_epi8(p1, even, p0, ahead1);
            __m512i c = _mm512_mask_shuffle_epi8(p2, odd, p3, back1), d = _mm512_mask_shuffle_epi8(p3, even, p2, ahead1);
            v[0] = _mm512_mask_shuffle_epi8(a, upper, c, back2), v[2] = _mm512_mask_shuffle_epi8(c, lower, a, ahead2);
            v[1] = _mm512_mask_shuffle_epi8(b, upper, d, back2), v[3] = _mm512_mask_shuffle_epi8(d, lower, b, ahead2);
            for (int b4 = 0; b4 < 4; b4++) {
                /* 0x96: three-way XOR */
                h = _mm512_ternarylogic_epi32(_mm512_rol_epi32(h, 1), v[b4], slot[b4], 0x96);
                slot[b4] = v[b4];
                top = _mm512_max_epu32(top, h);
            }
        }
    }
    return _mm512_cmpge_epu32_mask(top, _mm512_set1_epi32((int)s->limit));
}

static size_t
scan_avx512(const Search *s, const uint8_t *data, size_t first, size_t last)
{
    while (last + 1 - first >= LANES * MIN_SEGMENT) {
        size_t length = (last + 1 - first) / LANES & ~(size_t)63;
        if (length > SEGMENT) length = SEGMENT;
        uint32_t lanes = lanes_with_hits(s, data, first, length);
        if (lanes) {
            first += __builtin_ctz(lanes) * length;
            return scan_one(s, data, first, first + length - 1);
        }
        first += LANES * length;
    }
    return scan_plain(s, data, first, last);
}

#else

#define have_avx512() 0
#define scan_avx512 scan_plain

#endif

static void
prepare(Search *s, int bits)
{
    for (int i = 0; i < 256; i++) {
        s->table[i] = bits == 32 ? TABLE[i] : ROTL(TABLE[i], 32 - bits);
#if defined(__x86_64__)
        for (int k = 0; k < 4; k++) s->planes[k][i] = (uint8_t)(s->table[i] >> 8 * k);
#endif
    }
    s->limit = ~(uint32_t)0 >> (32 - bits); /* the mask */
    s->limit = (s->limit - 2) << (32 - bits);
}

/* ---- Python ---- */

static PyObject *
variants(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return have_avx512() ? Py_BuildValue("[ss]", "avx512", "plain") : Py_BuildValue("[s]", "plain");
}

static PyObject *
table(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    uint8_t bytes[4 * 256];
    for (int i = 0; i < 4 * 256; i++) bytes[i] = (uint8_t)(TABLE[i / 4] >> 8 * (i % 4));
    return PyBytes_FromStringAndSize((const char *)bytes, sizeof bytes);
}

static size_t
search(int vector, int bits, const uint8_t *data, const uint8_t *history, size_t known, size_t first, size_t last)
{
    Search s;
    prepare(&s, bits);
    if (first <= WINDOW) { /* windows that begin before the block */
        uint8_t seam[2 * WINDOW] = {0};
        size_t end = last < WINDOW ? last : WINDOW;
        memcpy(seam + WINDOW - known, history, known);
        memcpy(seam + WINDOW, data, end);
        size_t hit = scan_one(&s, seam, first + WINDOW, end + WINDOW);
        if (hit) return hit - WINDOW;
        first = WINDOW + 1;
    }
    if (first > last) return 0;
    return (vector ? scan_avx512 : scan_plain)(&s, data, first, last);
}

static PyObject *
find(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    Py_buffer data, history;
    Py_ssize_t first, last;
    size_t hit = 0;
    int bits;

    if (!PyArg_ParseTuple(args, "sy*y*nni", &name, &data, &history, &first, &last, &bits)) return NULL;
    int vector = !strcmp(name, "avx512") && have_avx512(), known = history.len <= WINDOW ? (int)history.len : WINDOW;
    if (!vector && strcmp(name, "plain"))
        PyErr_Format(PyExc_ValueError, "this machine has no variant %s", name);
    else if (first < 1 || first + known < WINDOW || last > data.len || bits < 2 || bits > 32)
        PyErr_SetString(PyExc_ValueError, "positions outside the data");
    else if (first <= last) {
        const uint8_t *tail = (const uint8_t *)history.buf + history.len - known;
        if (last - first < KEEP_GIL)
            hit = search(vector, bits, data.buf, tail, (size_t)known, (size_t)first, (size_t)last);
        else {
            Py_BEGIN_ALLOW_THREADS
            hit = search(vector, bits, data.buf, tail, (size_t)known, (size_t)first, (size_t)last);
            Py_END_ALLOW_THREADS
        }
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&history);
    return PyErr_Occurred() ? NULL : PyLong_FromSize_t(hit);
}

static PyMethodDef methods[] = {
    {"variants", variants, METH_NOARGS, "variants() -> names of what this CPU can run, quickest first"},
    {"table", table, METH_NOARGS, "table() -> the 256 constants as u32, little-endian"},
    {"find", find, METH_VARARGS, "find(variant, data, history, first, last, bits) -> first hit of first..last or 0"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_buzhash", "Where chunks of a stream end.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit__buzhash(void)
{
    return PyModuleDef_Init(&module);
}
