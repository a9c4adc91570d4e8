// The dropout rules as they are, for tests and for looking at: words and verdicts of a block of rows and columns.
#include "../arch/philox.h"

namespace bigmodel::BIGMODEL_ISA {

void philox_block(const PhiloxArgs& args) {
  for (int64_t i = 0; i < args.rows; i++)
    for (int64_t first = 0; first < args.columns; first += 16) {
      // Both rules in units of 16 columns: a whole unit for a pair of queries, half a unit of a row's elements.
      const int64_t row = args.first_row + i;
      Philox8 r;
      uint32_t bits, words[4][8];
      if (args.elements) {
        r = philox8(args.dropout.key, uint32_t(first / 32) << 3, uint32_t(uint64_t(row)), uint32_t(uint64_t(row) >> 32), 0);
        bits = keep_elements(args.dropout, row, first / 32) >> (first % 32);
      } else {
        r = philox8(args.dropout.key, uint32_t(first / 16) << 3, uint32_t(row >> 4) << 3 | uint32_t(row & 7), uint32_t(args.head), uint32_t(args.sequence));
        bits = keep_probabilities(args.dropout, first / 16, row, args.head, args.sequence) >> (row & 8 ? 16 : 0);
      }
      for (int w = 0; w < 4; w++) store_words(r.word[w], words[w]);
      const int half = args.elements ? first % 32 != 0 : (row & 8) != 0;
      for (int64_t j = 0; j < 16 && first + j < args.columns; j++) {
        args.words[i * args.columns + first + j] = words[2 * half + j / 8][j % 8];
        args.kept[i * args.columns + first + j] = bits >> j & 1;
      }
    }
  if (!args.elements) return;
  // What an epilogue does to a row, with a first column of its own.
  for (int64_t i = 0; i < args.rows; i++)
    for (int64_t first = 0; first < args.columns; first += 3 * F32::width) {
      const int64_t n = args.columns - first < 3 * F32::width ? args.columns - first : 3 * F32::width;
      drop_elements(args.dropout, args.first_row + i, first, n, args.values + i * args.columns + first);
    }
}

}  // namespace bigmodel::BIGMODEL_ISA
