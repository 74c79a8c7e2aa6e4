/* uint8 pixels, channels last, to normalised planes: out = in * scale + offset. Plain C that compilers vectorise. */
#include <stddef.h>
#include <stdint.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define BLOCK 256

static void plane(const uint8_t *restrict in, float *restrict out, size_t n, float scale, float offset)
{
    for (size_t i = 0; i < n; i++)
        out[i] = (float)in[3 * i] * scale + offset;
}

void normalise_f32(const uint8_t *in, float *out, size_t frames, size_t pixels, const float *scale, const float *offset)
{
    for (size_t f = 0; f < frames; f++, in += 3 * pixels, out += 3 * pixels)
        for (size_t at = 0; at < pixels; at += BLOCK) {
            size_t n = pixels - at < BLOCK ? pixels - at : BLOCK;
            for (int c = 0; c < 3; c++)
                plane(in + 3 * at + c, out + c * pixels + at, n, scale[c], offset[c]);
        }
}

static void halves(const float *in, uint16_t *out, size_t n)
{
    size_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
    for (; i < n; i++) {
        _Float16 half = (_Float16)in[i];
        __builtin_memcpy(out + i, &half, 2);
    }
}

void normalise_f16(const uint8_t *in, uint16_t *out, size_t frames, size_t pixels, const float *scale, const float *offset)
{
    float row[BLOCK];
    for (size_t f = 0; f < frames; f++, in += 3 * pixels, out += 3 * pixels)
        for (size_t at = 0; at < pixels; at += BLOCK) {
            size_t n = pixels - at < BLOCK ? pixels - at : BLOCK;
            for (int c = 0; c < 3; c++) {
                plane(in + 3 * at + c, row, n, scale[c], offset[c]);
                halves(row, out + c * pixels + at, n);
            }
        }
}
