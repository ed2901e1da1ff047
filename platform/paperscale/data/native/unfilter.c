/* The filters of PNG (ISO/IEC 15948, section 9) undone, for samples of 8 bits. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))

static uint8_t paeth(int left, int above, int corner) {
  int p = left + above - corner, a = abs(p - left), b = abs(p - above), c = abs(p - corner);
  return (uint8_t)(a <= b && a <= c ? left : b <= c ? above : corner);
}

/* Undo the filters of `height` rows of a filter's number and `width` bytes each, `step` bytes to a pixel, into `out`,
 * which holds height * width bytes. Returns 0, or -1 where a row has a number that is no filter's. */
EXPORTED int crops_unfilter(const uint8_t *in, int height, int width, int step, uint8_t *out) {
  for (int y = 0; y < height; y++, out += width, in += width + 1) {
    const uint8_t *from = in + 1, *above = y ? out - width : NULL;
    if (*in > 4) return -1;
    memcpy(out, from, (size_t)width);
    for (int x = 0; x < width && *in; x++) {
      int left = x < step ? 0 : out[x - step], up = above ? above[x] : 0;
      int corner = above && x >= step ? above[x - step] : 0;
      switch (*in) {
        case 1: out[x] = (uint8_t)(from[x] + left); break;
        case 2: out[x] = (uint8_t)(from[x] + up); break;
        case 3: out[x] = (uint8_t)(from[x] + (left + up) / 2); break;
        default: out[x] = (uint8_t)(from[x] + paeth(left, up, corner));
      }
    }
  }
  return 0;
}
