/* Decoding the part of a JPEG that a crop needs, and resizing it, in one pass over the rows.
 *
 * Rows are resized as they are decoded, so that no picture is ever held and the working set stays in the L2 cache.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libjpeg.h"
#include "resize.h"

#define EXPORTED __attribute__((visibility("default")))

enum { CORRUPT = -1, UNSUPPORTED = -2 };
enum { READ = 4, MARGIN = 2 }; /* rows asked for at a time; pixels around a crop that smooth chroma looks at */

/* -- libjpeg -------------------------------------------------------------------------------------------------- */

static struct {
  error_manager *(*std_error)(error_manager *);
  void (*create)(decoder *, int version, size_t size);
  void (*mem_src)(decoder *, const unsigned char *, unsigned long);
  int (*read_header)(decoder *, int require_image);
  void (*calc_output_dimensions)(decoder *);
  int (*start)(decoder *);
  void (*crop)(decoder *, unsigned *left, unsigned *width);
  unsigned (*skip)(decoder *, unsigned rows);
  unsigned (*read)(decoder *, uint8_t **rows, unsigned count);
  int (*finish)(decoder *);
  void (*destroy)(decoder *);
} jpeg;

/* Open libjpeg-turbo. Returns 0, or -1 with the reason in `message` (MESSAGE bytes, as everywhere). */
EXPORTED int crops_open(const char *path, char *message) {
  static const char *names[] = {
      "jpeg_std_error",        "jpeg_CreateDecompress", "jpeg_mem_src",        "jpeg_read_header",
      "jpeg_calc_output_dimensions", "jpeg_start_decompress", "jpeg_crop_scanline", "jpeg_skip_scanlines",
      "jpeg_read_scanlines",   "jpeg_finish_decompress", "jpeg_destroy_decompress"};
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(message, MESSAGE, "%s", dlerror());
    return -1;
  }
  void **slots = (void **)&jpeg;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!(slots[i] = dlsym(library, names[i]))) {
      snprintf(message, MESSAGE, "%s has no %s", path, names[i]);
      return -1;
    }
  return 0;
}

static void on_error(decoder *cinfo) {
  session *s = (session *)cinfo;
  s->errors.format_message(cinfo, s->message);
  longjmp(s->failed, 1);
}

/* libjpeg only warns of missing or garbled pixels and goes on in grey; to a training set they are errors. */
static void on_message(decoder *cinfo, int level) {
  session *s = (session *)cinfo;
  if (level >= 0) return;
  s->errors.format_message(cinfo, s->message);
  if (!strncmp(s->message, "Corrupt", 7) || !strncmp(s->message, "Premature", 9)) longjmp(s->failed, 1);
}

static session *new_session(char *message) {
  session *s = malloc(sizeof *s);
  if (!s) return NULL;
  memset(s, 0, offsetof(session, scan)); /* what follows is large and made when it is needed */
  s->message = message;
  return s;
}

/* Free what a session holds, whichever way the decoder left. */
static int end(session *s, int result) {
  if (s->cinfo.mem) jpeg.destroy(&s->cinfo);
  free(s->memory);
  free(s);
  return result;
}

static void read_header(session *s, const uint8_t *data, size_t size) {
  s->cinfo.err = jpeg.std_error(&s->errors);
  s->errors.error_exit = on_error;
  s->errors.emit_message = on_message;
  jpeg.create(&s->cinfo, VERSION, sizeof(decoder));
  jpeg.mem_src(&s->cinfo, data, size);
  jpeg.read_header(&s->cinfo, 1);
}

/* Start decoding, with the entropy decoder of our own if what is to be replaced is really libjpeg's. */
static void start(session *s) {
  Dl_info library, found[2];
  jpeg.start(&s->cinfo);
  entropy_decoder *entropy = s->cinfo.entropy;
  if (entropy && dladdr((void *)jpeg.start, &library) && dladdr((void *)entropy->start_pass, &found[0]) &&
      dladdr((void *)entropy->decode_mcu, &found[1]) && found[0].dli_fbase == library.dli_fbase &&
      found[1].dli_fbase == library.dli_fbase)
    use_own_entropy_decoder(s);
}

/* -- decoding ------------------------------------------------------------------------------------------------- */

typedef struct {
  filter x, y;
  int pairs, ring_rows, bytes; /* bytes of an output row */
  size_t stride;               /* bytes of a decoded row */
  int32_t *spread, *sum;
  uint8_t *rows[READ], *ring;
} plan;

static uintptr_t place(uintptr_t *at, size_t bytes) {
  uintptr_t here = *at;
  *at += (bytes + 63) / 64 * 64;
  return here;
}

/* Lay the plan's arrays out from address `at`; returns the end. */
static uintptr_t lay_out(plan *p, uintptr_t at) {
  filter *axes[2] = {&p->x, &p->y};
  for (int a = 0; a < 2; a++) {
    axes[a]->first = (int *)place(&at, axes[a]->size * sizeof(int));
    axes[a]->count = (int *)place(&at, axes[a]->size * sizeof(int));
    axes[a]->weight = (int32_t *)place(&at, (size_t)axes[a]->size * axes[a]->most * sizeof(int32_t));
  }
  p->spread = (int32_t *)place(&at, (size_t)p->x.size * (p->x.most + 1) * 4 * sizeof(int32_t));
  p->sum = (int32_t *)place(&at, p->bytes * sizeof(int32_t));
  for (int i = 0; i < READ; i++) p->rows[i] = (uint8_t *)place(&at, p->stride);
  p->ring = (uint8_t *)place(&at, (size_t)p->ring_rows * p->bytes + 1);
  return at;
}

/* The box wanted, in single precision as Pillow has it. Fractions taken from a resized picture may lie just outside. */
static void take_box(session *s, const double *where, float *box) {
  const float sides[2] = {(float)s->cinfo.image_width, (float)s->cinfo.image_height}, slack = 1e-3f;
  for (int i = 0; i < 4; i++) {
    box[i] = where ? (float)where[i] : i < 2 ? 0 : sides[i - 2];
    if (box[i] < 0 && box[i] >= -slack) box[i] = 0;
    if (box[i] > sides[i & 1] && box[i] <= sides[i & 1] + slack) box[i] = sides[i & 1];
  }
  int inside = box[0] >= 0 && box[1] >= 0 && box[2] <= sides[0] && box[3] <= sides[1];
  if (inside && box[0] < box[2] && box[1] < box[3]) return;
  snprintf(s->message, MESSAGE, "the box %g, %g to %g, %g does not lie in the image of %u x %u pixels", box[0], box[1],
           box[2], box[3], s->cinfo.image_width, s->cinfo.image_height);
  longjmp(s->failed, 1);
}

/* Let the decoder halve, quarter or eighth the picture while the box stays at least as large as the output. */
static void scale_down(decoder *cinfo, float *box, int height, int width, int most) {
  int scale = 1;
  while (2 * scale <= most && box[2] - box[0] >= 2.0 * scale * width && box[3] - box[1] >= 2.0 * scale * height)
    scale *= 2;
  cinfo->scale_num = 1;
  cinfo->scale_denom = (unsigned)scale;
  for (int i = 0; i < 4; i++) box[i] /= (float)scale;
  jpeg.calc_output_dimensions(cinfo);
}

static void make_plan(session *s, plan *p, const float *box, int flip) {
  size_t bytes = lay_out(p, 0);
  if (!(s->memory = calloc(1, bytes + 63))) {
    snprintf(s->message, MESSAGE, "out of memory");
    longjmp(s->failed, 1);
  }
  lay_out(p, ((uintptr_t)s->memory + 63) / 64 * 64);
  make_filter(&p->x, (int)s->cinfo.output_width, box[0], box[2], flip);
  make_filter(&p->y, (int)s->cinfo.output_height, box[1], box[3], 0);
  p->pairs = filter_pairs(&p->x);
  spread_weights(&p->x, p->pairs, p->spread);
}

/* Decode the columns and rows that the filters reach and emit each output row as soon as its inputs are there. */
static void read_resized(session *s, plan *p, uint8_t *out) {
  decoder *cinfo = &s->cinfo;
  filter *x = &p->x, *y = &p->y;
  int left, right, top, bottom;
  filter_reach(x, &left, &right);
  filter_reach(y, &top, &bottom);
  unsigned offset = left > MARGIN ? (unsigned)(left - MARGIN) : 0, limit = (unsigned)(right + MARGIN);
  unsigned width = (limit < cinfo->output_width ? limit : cinfo->output_width) - offset;
  if (width < cinfo->output_width) jpeg.crop(cinfo, &offset, &width);
  for (int i = 0; i < x->size; i++) x->first[i] -= (int)offset;
  if (top > MARGIN) jpeg.skip(cinfo, (unsigned)(top - MARGIN));
  for (int done = 0; (int)cinfo->output_scanline < bottom;) {
    int at = (int)cinfo->output_scanline, count = (int)jpeg.read(cinfo, p->rows, READ);
    for (int r = at; r < at + count; r++) {
      uint8_t *ring = p->ring + (size_t)(r % p->ring_rows) * p->bytes;
      if (cinfo->output_components == 1)
        across_gray(x, p->rows[r - at], ring);
      else
        across_rgbx(x, p->pairs, p->spread, p->rows[r - at], ring);
      for (; done < y->size && y->first[done] + y->count[done] <= r + 1; done++, out += p->bytes) {
        const int32_t *weight = y->weight + (size_t)done * y->most;
        down(p->ring, p->ring_rows, p->bytes, y->first[done], y->count[done], weight, p->sum, out);
      }
    }
  }
}

/* Read a JPEG's height, width and channels (1 or 3) into `shape`. Returns 0, CORRUPT or UNSUPPORTED. */
EXPORTED int crops_shape(const uint8_t *data, size_t size, int32_t *shape, char *message) {
  session *s = new_session(message);
  if (!s) return CORRUPT;
  if (setjmp(s->failed)) return end(s, CORRUPT);
  read_header(s, data, size);
  shape[0] = (int32_t)s->cinfo.image_height;
  shape[1] = (int32_t)s->cinfo.image_width;
  shape[2] = s->cinfo.jpeg_color_space == GRAY ? 1 : 3;
  return end(s, s->cinfo.num_components == 4 ? UNSUPPORTED : 0);
}

/* Decode a box (left, top, right, bottom, in pixels; NULL for all) of a JPEG, resized to out [height, width, channels].
 *
 * flip mirrors the result; most_scale 2, 4 or 8 allows the decoder to reduce the picture by at most that much first.
 * Rows below the box are not looked at, so damage there is not noticed. Returns 0, CORRUPT or UNSUPPORTED. */
EXPORTED int crops_decode(const uint8_t *data, size_t size, uint8_t *out, int height, int width, int channels,
                          const double *where, int flip, int most_scale, char *message) {
  session *s = new_session(message);
  if (!s) return CORRUPT;
  if (setjmp(s->failed)) return end(s, CORRUPT);
  read_header(s, data, size);
  if (s->cinfo.num_components == 4) return end(s, UNSUPPORTED);
  s->cinfo.out_color_space = channels == 1 ? GRAY : RGBX;
  float box[4];
  take_box(s, where, box);
  scale_down(&s->cinfo, box, height, width, most_scale);
  plan p = {.x = {.size = width, .most = most_taps(box[0], box[2], width)},
            .y = {.size = height, .most = most_taps(box[1], box[3], height)}};
  p.ring_rows = p.y.most;
  p.bytes = width * channels;
  p.stride = (size_t)s->cinfo.output_width * (channels == 1 ? 1 : 4) + 8 * (size_t)p.x.most;
  make_plan(s, &p, box, flip);
  start(s);
  read_resized(s, &p, out);
  return end(s, 0);
}

/* Decode a whole JPEG into out [image height, image width, channels], to the end of its data. */
EXPORTED int crops_whole(const uint8_t *data, size_t size, uint8_t *out, int channels, char *message) {
  session *s = new_session(message);
  if (!s) return CORRUPT;
  if (setjmp(s->failed)) return end(s, CORRUPT);
  read_header(s, data, size);
  decoder *cinfo = &s->cinfo;
  if (cinfo->num_components == 4) return end(s, UNSUPPORTED);
  cinfo->out_color_space = channels == 1 ? GRAY : RGB;
  start(s);
  size_t stride = (size_t)cinfo->output_width * channels;
  for (unsigned left; (left = cinfo->output_height - cinfo->output_scanline);) {
    uint8_t *rows[READ];
    for (unsigned i = 0; i < READ && i < left; i++) rows[i] = out + (cinfo->output_scanline + i) * stride;
    jpeg.read(cinfo, rows, left < READ ? left : READ);
  }
  if (!s->own_entropy) {
    jpeg.finish(cinfo);
  } else if (!entropy_ended(s)) {
    snprintf(message, MESSAGE, "Corrupt JPEG data: more data than pixels");
    return end(s, CORRUPT);
  }
  return end(s, 0);
}
