/* A Huffman decoder for baseline scans, in place of libjpeg's: the greater part of the time goes here.
 *
 * One look into a table gives a whole symbol: its run of zeros, the coefficient and how many bits both took, where code
 * and coefficient fit into LOOK_BITS (ITU-T T.81, annex F.2.2). The scan is freed of its stuffed zeros some kilobytes
 * ahead, so that filling the bit buffer needs no decision. Data that ends too soon is an error, never grey pixels.
 */
#include <stdio.h>
#include <string.h>

#include "libjpeg.h"

/* An entry of a table. The value is the coefficient (WHOLE), or the number of bits that it has (CODE). */
#define ENTRY(value, run, kind, bits) ((uint32_t)(value) << 16 | (uint32_t)((run) << 8 | (kind) << 6 | (bits)))
#define VALUE(entry) ((int32_t)(entry) >> 16)
#define RUN(entry) ((int)((entry) >> 8 & 31))
#define KIND(entry) ((int)((entry) >> 6 & 3))
#define BITS(entry) ((int)((entry) & 63))
enum { WHOLE, CODE, END, LONG };
enum { AT_ONCE = 5 }; /* WHOLE entries whose bits one filling of the bit buffer suffices for */
_Static_assert(AT_ONCE * LOOK_BITS <= 57, "what fill() provides");

static const uint8_t natural_order[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

static void fail(session *s, const char *why) {
  snprintf(s->message, MESSAGE, "%s", why);
  longjmp(s->failed, 1);
}

/* The number that `size` bits stand for (T.81, table F.1): those that begin with 0 are negative. */
static inline int extend(uint32_t bits, int size) {
  return bits < (1u << size >> 1) ? (int)bits - (1 << size) + 1 : (int)bits;
}

/* What follows from the LOOK_BITS bits `ahead` when they begin with the code of `symbol`, `bits` long. */
static uint32_t entry(uint32_t ahead, int symbol, int bits, int is_dc) {
  int run = is_dc ? 0 : symbol >> 4, size = is_dc ? symbol : symbol & 15;
  if (!is_dc && size == 0) return run == 15 ? ENTRY(0, 16, CODE, bits) : ENTRY(0, 0, END, bits);
  if (bits + size > LOOK_BITS) return ENTRY(size, run, CODE, bits);
  uint32_t value = ahead >> (LOOK_BITS - bits - size) & ((1u << size) - 1);
  return ENTRY(extend(value, size), run, WHOLE, bits + size);
}

/* Canonical codes (T.81, annex C): those of n bits follow those of n - 1 bits, doubled. */
static void build(session *s, code_table *t, const huffman_codes *codes, int is_dc) {
  int code = 0, count = 0;
  for (uint32_t i = 0; i < 1u << LOOK_BITS; i++) t->look[i] = ENTRY(0, 0, LONG, 0);
  memcpy(t->symbols, codes->symbols, sizeof t->symbols);
  for (int n = 1; n <= 16; n++, code <<= 1) {
    t->offset[n] = count - code;
    for (int i = 0; i < codes->bits[n]; i++, code++, count++) {
      int symbol = codes->symbols[count & 255];
      if (code >> n || count > 255 || (is_dc && symbol > 15)) fail(s, "Corrupt JPEG data: bad Huffman table");
      int free = LOOK_BITS - n;
      for (int j = 0; free >= 0 && j < 1 << free; j++) {
        uint32_t ahead = (uint32_t)(code << free | j);
        t->look[ahead] = entry(ahead, symbol, n, is_dc);
      }
    }
    t->limit[n] = code << (16 - n); /* codes below this, in 16 bits, have at most n */
  }
}

/* Move what is unread to the front of the window, and unstuff as much of the scan behind it as there is room for.
 *
 * A zero byte is stuffed after each FF of a scan; any other byte after FF makes a marker, which ends it. */
static void top_up(scan *in) {
  uint8_t *out = in->window + (in->real - in->reader.at), *full = in->window + WINDOW;
  memmove(in->window, in->reader.at, (size_t)(out - in->window));
  in->reader.at = in->window;
  while (out < full && in->next < in->end) {
    size_t room = (size_t)(full - out), raw = (size_t)(in->end - in->next), most = raw < room ? raw : room;
    const uint8_t *ff = memchr(in->next, 0xFF, most);
    size_t plain = ff ? (size_t)(ff - in->next) : most;
    memcpy(out, in->next, plain);
    out += plain;
    in->next += plain;
    if (ff && (in->end - ff < 2 || ff[1] != 0)) in->end = ff;
    if (ff && ff < in->end) *out++ = 0xFF, in->next += 2;
  }
  in->real = out;
  if (in->next == in->end) memset(out, 0, LONGEST_MCU); /* read before an early end is noticed */
}

/* Have at least 57 bits at hand. */
static inline void fill(bit_reader *r) {
  uint64_t word;
  memcpy(&word, r->at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  r->bits |= word >> r->left;
  r->at += (63 - r->left) >> 3;
  r->left |= 56;
}

static inline uint32_t look_up(const bit_reader *r, const code_table *t) {
  return t->look[r->bits >> (64 - LOOK_BITS)];
}

static inline void drop(bit_reader *r, int bits) {
  r->bits <<= bits;
  r->left -= bits;
}

static inline int take_value(bit_reader *r, int size) {
  if (size == 0) return 0;
  int value = extend((uint32_t)(r->bits >> (64 - size)), size);
  drop(r, size);
  return value;
}

/* The symbol of a code longer than LOOK_BITS at the head of `bits`, and the code's length << 8. */
static int long_symbol(session *s, uint64_t bits, const code_table *t) {
  int32_t ahead = (int32_t)(bits >> 48);
  for (int n = LOOK_BITS + 1; n <= 16; n++)
    if (ahead < t->limit[n]) return n << 8 | t->symbols[((ahead >> (16 - n)) + t->offset[n]) & 255];
  fail(s, "Corrupt JPEG data: bad Huffman code");
  return 0;
}

static inline int dc_difference(session *s, bit_reader *r, const code_table *t) {
  fill(r);
  uint32_t e = look_up(r, t);
  int size = VALUE(e);
  if (KIND(e) == LONG) {
    int symbol = long_symbol(s, r->bits, t);
    drop(r, symbol >> 8);
    size = symbol & 15;
  } else {
    drop(r, BITS(e));
    if (KIND(e) == WHOLE) return VALUE(e);
  }
  return take_value(r, size);
}

/* Decode a symbol that is not WHOLE. Returns where the next coefficient goes, 64 at the block's end. */
static inline int rare_symbol(session *s, bit_reader *r, const code_table *t, uint32_t e, int k, int16_t *block) {
  int run = RUN(e), size = VALUE(e);
  fill(r);
  if (KIND(e) == LONG) {
    int symbol = long_symbol(s, r->bits, t);
    drop(r, symbol >> 8);
    run = symbol >> 4 & 15, size = symbol & 15;
    if (size == 0) return run == 15 ? k + 16 : 64;
  } else {
    drop(r, BITS(e));
    if (KIND(e) == END) return 64;
    if (size == 0) return k + 16;
  }
  block[natural_order[k + run]] = (int16_t)take_value(r, size);
  return k + run + 1;
}

static inline void ac_coefficients(session *s, bit_reader *r, const code_table *t, int16_t *block) {
  int k = 1;
  while (k < 64) {
    fill(r);
    for (int n = 0; n < AT_ONCE && k < 64; n++) {
      uint32_t e = look_up(r, t);
      if (KIND(e) != WHOLE) {
        k = rare_symbol(s, r, t, e, k, block);
        break;
      }
      drop(r, BITS(e));
      k += RUN(e);
      block[natural_order[k++]] = (int16_t)VALUE(e);
    }
  }
  if (k > 64) fail(s, "Corrupt JPEG data: a block of more than 64 coefficients");
}

/* Decode the blocks of one MCU; without storing them if `blocks` is NULL. */
static int decode_mcu(decoder *cinfo, int16_t **blocks) {
  session *s = (session *)cinfo;
  if (s->scan.next < s->scan.end && s->scan.real - s->scan.reader.at < LONGEST_MCU) top_up(&s->scan);
  bit_reader r = s->scan.reader; /* a copy can live in registers */
  int16_t nowhere[64];
  for (int b = 0; b < cinfo->blocks_in_mcu; b++) {
    int c = cinfo->mcu_membership[b];
    const component *part = cinfo->scan_components[c];
    int16_t *block = blocks ? blocks[b] : nowhere;
    s->predictors[c] += (unsigned)dc_difference(s, &r, &s->dc[part->dc_table]);
    block[0] = (int16_t)s->predictors[c];
    ac_coefficients(s, &r, &s->ac[part->ac_table], block);
  }
  s->scan.reader = r;
  if ((s->scan.real - r.at) * 8 + r.left < 0) fail(s, "Premature end of JPEG data");
  return 1;
}

/* Replace libjpeg's entropy decoder, after jpeg_start_decompress, for scans of the common kind: all components
 * together, Huffman-coded, 8 bits, without restart markers. Others keep libjpeg's. */
void use_own_entropy_decoder(session *s) {
  decoder *cinfo = &s->cinfo;
  int built_dc[4] = {0}, built_ac[4] = {0};
  if (cinfo->progressive_mode || cinfo->arith_code || cinfo->restart_interval || cinfo->data_precision != 8 ||
      cinfo->comps_in_scan != cinfo->num_components)
    return;
  for (int c = 0; c < cinfo->comps_in_scan; c++) {
    int dc = cinfo->scan_components[c]->dc_table, ac = cinfo->scan_components[c]->ac_table;
    if (dc < 0 || dc > 3 || ac < 0 || ac > 3 || !cinfo->dc_tables[dc] || !cinfo->ac_tables[ac]) return;
    if (!built_dc[dc]++) build(s, &s->dc[dc], cinfo->dc_tables[dc], 1);
    if (!built_ac[ac]++) build(s, &s->ac[ac], cinfo->ac_tables[ac], 0);
  }
  s->scan.next = cinfo->src->next;
  s->scan.end = cinfo->src->next + cinfo->src->left;
  s->scan.real = s->scan.window;
  s->scan.reader = (bit_reader){.at = s->scan.window};
  top_up(&s->scan);
  s->own_entropy = 1;
  cinfo->entropy->decode_mcu = decode_mcu;
}

/* Whether the data ends where the last block does: less than a byte is left before the next marker. */
int entropy_ended(session *s) {
  if (s->scan.next < s->scan.end) top_up(&s->scan);
  return s->scan.next == s->scan.end && (s->scan.real - s->scan.reader.at) * 8 + s->scan.reader.left < 8;
}
