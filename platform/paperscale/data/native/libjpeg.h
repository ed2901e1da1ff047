/* The part of libjpeg's interface, version 6.2, that is used here, and the state of one call.
 *
 * libjpeg-turbo's shared library is opened at run time (Pillow's wheels carry one), so that a C compiler is all that
 * building takes. The layout is the stable binary interface of that version; jpeg_CreateDecompress itself refuses a
 * library of another version or structure size.
 */
#ifndef LIBJPEG_H
#define LIBJPEG_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

enum { VERSION = 62, MESSAGE = 200 };
enum { GRAY = 1, RGB = 2, RGBX = 7 }; /* colour spaces; RGBX has a fourth, meaningless byte */

typedef struct decoder decoder;

typedef struct {
  void (*error_exit)(decoder *);
  void (*emit_message)(decoder *, int level);
  void (*output_message)(decoder *);
  void (*format_message)(decoder *, char *text);
  void (*reset)(decoder *);
  char rest[472]; /* the library's own, with room to spare */
} error_manager;

typedef struct {
  const uint8_t *next;
  size_t left;
} source;

typedef struct {
  uint8_t bits[17]; /* bits[n]: how many codes have n bits */
  uint8_t symbols[256];
} huffman_codes;

typedef struct {
  int id, index, h_samp_factor, v_samp_factor, quant_table, dc_table, ac_table;
} component;

typedef struct {
  void (*start_pass)(decoder *);
  int (*decode_mcu)(decoder *, int16_t **blocks);
} entropy_decoder;

struct decoder {
  error_manager *err;
  void *mem, *progress, *client_data;
  int is_decompressor, global_state;
  source *src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  void *colormap;
  unsigned output_scanline;
  int input_scan_number;
  unsigned input_row;
  int output_scan_number;
  unsigned output_row;
  void *coef_bits, *quant_tables[4];
  huffman_codes *dc_tables[4], *ac_tables[4];
  int data_precision;
  component *components;
  int progressive_mode, arith_code;
  uint8_t arithmetic[48];
  unsigned restart_interval;
  int jfif[5];
  int ccir601_sampling;
  void *marker_list;
  int max_h_samp_factor, max_v_samp_factor, min_dct_scaled_size;
  unsigned total_rows;
  uint8_t *sample_range_limit;
  int comps_in_scan;
  component *scan_components[4];
  unsigned mcus_per_row, mcu_rows;
  int blocks_in_mcu, mcu_membership[10];
  int spectral[4], unread_marker;
  void *master, *main, *coef, *post, *inputctl, *marker;
  entropy_decoder *entropy;
  void *idct, *upsample, *cconvert, *cquantize;
};

_Static_assert(sizeof(void *) != 8 || (offsetof(decoder, output_scanline) == 168 && offsetof(decoder, entropy) == 592 &&
                                       sizeof(decoder) == 632),
               "the layout that libjpeg 6.2 has where pointers have 8 bytes");

/* Bits, read from the left. */
typedef struct {
  const uint8_t *at; /* the next byte to take */
  uint64_t bits;
  int left; /* of the bits, those at hand */
} bit_reader;

enum { WINDOW = 8192, LONGEST_MCU = 2560 }; /* bytes; 10 blocks of 64 symbols of 31 bits, and the reader's 8 */

/* An entropy-coded scan: what is still as it is in the file, and the next part of it, unstuffed. */
typedef struct {
  const uint8_t *next, *end, *real; /* of the file; and the end of the window's real bytes */
  bit_reader reader;
  uint8_t window[WINDOW + LONGEST_MCU];
} scan;

enum { LOOK_BITS = 11 };

typedef struct {
  uint32_t look[1 << LOOK_BITS];
  int32_t limit[18], offset[17];
  uint8_t symbols[256];
} code_table;

/* What one call holds. The decoder comes first: libjpeg hands it to the functions that need the rest. */
typedef struct {
  decoder cinfo;
  error_manager errors;
  jmp_buf failed;
  char *message;
  void *memory;
  unsigned predictors[4]; /* of the DC coefficients */
  int own_entropy;
  scan scan; /* from here on not zeroed */
  code_table dc[4], ac[4];
} session;

void use_own_entropy_decoder(session *s);
int entropy_ended(session *s);

#endif
