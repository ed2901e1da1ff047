/* Resizing rows of bytes with Pillow's antialiased bilinear filter, to the bit.
 *
 * A triangle whose support grows with the reduction, in fixed point of 22 bits, horizontally first, rounded to bytes,
 * then vertically. The triangle has no negative weights, so no sum leaves 0..255.
 */
#include "resize.h"

#include <math.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

/* One clone for each generation of vector units, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

enum { PRECISION = 22, HALF = 1 << (PRECISION - 1) };

/* The most inputs that an output depends on when from..to of the inputs become `size` outputs. */
int most_taps(float from, float to, int size) {
  double scale = (double)(to - from) / size;
  return 2 * (int)ceil(scale > 1 ? scale : 1) + 1;
}

static double triangle(double distance) { return fabs(distance) < 1 ? 1 - fabs(distance) : 0; }

/* Make the filter from from..to, in input pixels, to its `size` outputs; mirrored if `flip`. */
void make_filter(filter *f, int inputs, float from, float to, int flip) {
  double scale = (double)(to - from) / f->size, support = scale > 1 ? scale : 1;
  for (int i = 0; i < f->size; i++) {
    double centre = from + (i + 0.5) * scale, sum = 0;
    int low = (int)(centre - support + 0.5), high = (int)(centre + support + 0.5);
    low = low < 0 ? 0 : low;
    high = high > inputs ? inputs : high;
    for (int x = low; x < high; x++) sum += triangle((x - centre + 0.5) * (1 / support));
    int at = flip ? f->size - 1 - i : i;
    f->first[at] = low;
    f->count[at] = high - low;
    for (int x = low; x < high; x++) {
      double share = sum != 0 ? triangle((x - centre + 0.5) * (1 / support)) / sum : 0;
      f->weight[at * f->most + x - low] = (int32_t)(0.5 + share * (1 << PRECISION));
    }
  }
}

/* The first input that a filter looks at, and the one after the last. */
void filter_reach(const filter *f, int *low, int *high) {
  *low = f->first[0];
  *high = 0;
  for (int i = 0; i < f->size; i++) {
    if (f->first[i] < *low) *low = f->first[i];
    if (f->first[i] + f->count[i] > *high) *high = f->first[i] + f->count[i];
  }
}

/* The pairs of inputs that every output gets in `across_rgbx`. */
int filter_pairs(const filter *f) {
  int most = 0;
  for (int i = 0; i < f->size; i++) most = f->count[i] > most ? f->count[i] : most;
  return (most + 1) / 2;
}

/* Spread weights for `across_rgbx`: per output, pairs of taps, each weight on the 4 bytes of its RGBX pixel. */
void spread_weights(const filter *f, int pairs, int32_t *spread) {
  for (int i = 0; i < f->size; i++)
    for (int k = 0; k < 2 * pairs; k++, spread += 4)
      for (int c = 0; c < 4; c++) spread[c] = k < f->count[i] ? f->weight[i * f->most + k] : 0;
}

static void across_rgbx_plain(const filter *f, int pairs, const int32_t *spread, const uint8_t *row, uint8_t *out) {
  for (int i = 0; i < f->size; i++, out += 3) {
    const uint8_t *pixel = row + 4 * f->first[i];
    int32_t sum[4] = {HALF, HALF, HALF, HALF};
    for (int k = 0; k < 2 * pairs; k++, spread += 4, pixel += 4)
      for (int c = 0; c < 4; c++) sum[c] += pixel[c] * spread[c];
    for (int c = 0; c < 3; c++) out[c] = (uint8_t)(sum[c] >> PRECISION);
  }
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static inline void pairs_avx2(const filter *f, int pairs, const int32_t *spread,
                                                              const uint8_t *row, uint8_t *out) {
  const __m256i *weights = (const __m256i *)spread;
  const __m128i low_bytes = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (int i = 0; i < f->size; i++, out += 3) {
    const uint8_t *pixel = row + 4 * f->first[i];
    __m256i sum = _mm256_setr_epi32(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
    for (int p = 0; p < pairs; p++, pixel += 8) {
      __m256i two = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)pixel));
      sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(two, *weights++));
    }
    __m128i total = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    int rgbx = _mm_cvtsi128_si32(_mm_shuffle_epi8(_mm_srli_epi32(total, PRECISION), low_bytes));
    memcpy(out, &rgbx, 4);
  }
}

/* With the usual numbers of pairs known to the compiler. */
__attribute__((target("avx2"))) static void across_rgbx_avx2(const filter *f, int pairs, const int32_t *spread,
                                                             const uint8_t *row, uint8_t *out) {
  if (pairs == 1)
    pairs_avx2(f, 1, spread, row, out);
  else if (pairs == 2)
    pairs_avx2(f, 2, spread, row, out);
  else
    pairs_avx2(f, pairs, spread, row, out);
}
#endif

/* Resize one row of RGBX pixels to RGB. May read 8 * pairs bytes past the row and write one byte past `out`. */
void across_rgbx(const filter *f, int pairs, const int32_t *spread, const uint8_t *row, uint8_t *out) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) {
    across_rgbx_avx2(f, pairs, spread, row, out);
    return;
  }
#endif
  across_rgbx_plain(f, pairs, spread, row, out);
}

/* Resize one row of grey pixels. */
void across_gray(const filter *f, const uint8_t *row, uint8_t *out) {
  for (int i = 0; i < f->size; i++) {
    int32_t sum = HALF;
    for (int k = 0; k < f->count[i]; k++) sum += row[f->first[i] + k] * f->weight[i * f->most + k];
    out[i] = (uint8_t)(sum >> PRECISION);
  }
}

/* Weigh `count` rows of a ring together into one row of `width` bytes; `sum` is room for as many sums. */
VECTORISED
void down(const uint8_t *ring, int ring_rows, int width, int first, int count, const int32_t *weight,
          int32_t *restrict sum, uint8_t *restrict out) {
  const uint8_t *row[4];
  int32_t w[4] = {0};
  for (int k = 0; k < 4; k++) row[k] = ring + (size_t)((first + (k < count ? k : 0)) % ring_rows) * width;
  for (int k = 0; k < 4 && k < count; k++) w[k] = weight[k];
  if (count <= 2) {
    for (int x = 0; x < width; x++) out[x] = (uint8_t)((HALF + row[0][x] * w[0] + row[1][x] * w[1]) >> PRECISION);
    return;
  }
  for (int x = 0; x < width; x++)
    sum[x] = HALF + row[0][x] * w[0] + row[1][x] * w[1] + row[2][x] * w[2] + row[3][x] * w[3];
  for (int k = 4; k < count; k++) {
    const uint8_t *more = ring + (size_t)((first + k) % ring_rows) * width;
    for (int x = 0; x < width; x++) sum[x] += more[x] * weight[k];
  }
  for (int x = 0; x < width; x++) out[x] = (uint8_t)(sum[x] >> PRECISION);
}
