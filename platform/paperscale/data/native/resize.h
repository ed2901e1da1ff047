/* Resizing rows of bytes with Pillow's antialiased bilinear filter. */
#ifndef RESIZE_H
#define RESIZE_H

#include <stdint.h>

/* Along one axis, output i is the sum over k < count[i] of weight[i * most + k] times input first[i] + k. */
typedef struct {
  int size, most, *first, *count;
  int32_t *weight;
} filter;

int most_taps(float from, float to, int size);
void make_filter(filter *f, int inputs, float from, float to, int flip);
void filter_reach(const filter *f, int *low, int *high);
int filter_pairs(const filter *f);
void spread_weights(const filter *f, int pairs, int32_t *spread);
void across_rgbx(const filter *f, int pairs, const int32_t *spread, const uint8_t *row, uint8_t *out);
void across_gray(const filter *f, const uint8_t *row, uint8_t *out);
void down(const uint8_t *ring, int ring_rows, int width, int first, int count, const int32_t *weight, int32_t *sum,
          uint8_t *out);

#endif
