/* uint8 pixels, channels last, to normalised planes: out = in * scale + offset. Compiled by pipelines/stages/normalise.py. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define BLOCK 512

/* n interleaved pixels into three planes of bytes */
static void split(const uint8_t *restrict in, uint8_t (*restrict out)[BLOCK], size_t n)
{
    size_t i = 0;
#ifdef __AVX2__
    const char z = -1;
    __m128i pick[3][3]; /* [plane][sixteen bytes of in]: where the plane's bytes stand there */
    for (int c = 0; c < 3; c++)
        for (int part = 0; part < 3; part++) {
            char at[16];
            for (int k = 0; k < 16; k++) {
                int byte = 3 * k + c - 16 * part;
                at[k] = byte >= 0 && byte < 16 ? (char)byte : z;
            }
            pick[c][part] = _mm_loadu_si128((const __m128i *)at);
        }
    for (; i + 16 <= n; i += 16) {
        const __m128i *at = (const __m128i *)(in + 3 * i);
        __m128i a = _mm_loadu_si128(at), b = _mm_loadu_si128(at + 1), c = _mm_loadu_si128(at + 2);
        for (int p = 0; p < 3; p++) {
            __m128i v = _mm_or_si128(_mm_shuffle_epi8(a, pick[p][0]), _mm_shuffle_epi8(b, pick[p][1]));
            _mm_storeu_si128((__m128i *)(out[p] + i), _mm_or_si128(v, _mm_shuffle_epi8(c, pick[p][2])));
        }
    }
#endif
    for (; i < n; i++)
        for (int p = 0; p < 3; p++)
            out[p][i] = in[3 * i + p];
}

/* Where `out` is aligned the results pass the caches by: a batch is larger than these, and nobody reads it soon. */
static void scaled(const uint8_t *restrict in, float *restrict out, size_t n, float scale, float offset)
{
    size_t i = 0;
#ifdef __AVX2__
    __m256 s = _mm256_set1_ps(scale), o = _mm256_set1_ps(offset);
    if ((uintptr_t)out % 32 == 0)
        for (; i + 8 <= n; i += 8) {
            __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + i))));
            _mm256_stream_ps(out + i, _mm256_add_ps(_mm256_mul_ps(v, s), o));
        }
#endif
    for (; i < n; i++)
        out[i] = (float)in[i] * scale + offset;
}

static void halves(const uint8_t *restrict in, uint16_t *restrict out, size_t n, float scale, float offset)
{
    size_t i = 0;
#ifdef __AVX2__
    __m256 s = _mm256_set1_ps(scale), o = _mm256_set1_ps(offset);
    int aligned = (uintptr_t)out % 16 == 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + i))));
        __m128i half = _mm256_cvtps_ph(_mm256_add_ps(_mm256_mul_ps(v, s), o), 0);
        if (aligned)
            _mm_stream_si128((__m128i *)(out + i), half);
        else
            _mm_storeu_si128((__m128i *)(out + i), half);
    }
#endif
    for (; i < n; i++) {
        _Float16 half = (_Float16)((float)in[i] * scale + offset);
        memcpy(out + i, &half, 2);
    }
}

static void finished(void)
{
#ifdef __AVX2__
    _mm_sfence(); /* whoever is told that the frames are there finds them */
#endif
}

#define NORMALISE(name, type, row)                                                                                   \
    void name(const uint8_t *in, type *out, size_t frames, size_t pixels, const float *scale, const float *offset)  \
    {                                                                                                               \
        uint8_t planes[3][BLOCK];                                                                                   \
        for (size_t f = 0; f < frames; f++, in += 3 * pixels, out += 3 * pixels)                                    \
            for (size_t at = 0; at < pixels; at += BLOCK) {                                                         \
                size_t n = pixels - at < BLOCK ? pixels - at : BLOCK;                                               \
                split(in + 3 * at, planes, n);                                                                      \
                for (int c = 0; c < 3; c++)                                                                         \
                    row(planes[c], out + c * pixels + at, n, scale[c], offset[c]);                                  \
            }                                                                                                       \
        finished();                                                                                                 \
    }

NORMALISE(normalise_f32, float, scaled)
NORMALISE(normalise_f16, uint16_t, halves)
