// Products of split numbers that are not all sums of their parts (split.h): the parts' sum is the number itself, whatever it is.
#include "split.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

constexpr int64_t most_rows = rows_of<Parts<1>>, block_words = split_depth * panel;   // of one part of a block
static_assert(most_rows == panel, "a block of A is as large as one of B");

// 16 numbers, the sum of their parts from the lowest; part(p) has them as float32.
template <class Part>
BIGMODEL_INLINE F32 joined(int count, const Part& part) {
  __m512 sum = _mm512_castsi512_ps(part(count - 1));
  for (int p = count - 2; p >= 0; p--) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(part(p)));
  return {sum};
}

}  // namespace

void multiply_joined(int64_t rows, int64_t depth, int of_a, const void* a, int of_b, const void* b, float* c, int64_t c_stride,
                     bool accumulate) {
  alignas(64) float left[most_rows][deepest_block], right[deepest_block][panel];
  const uint16_t *block_a = static_cast<const uint16_t*>(a), *block_b = static_cast<const uint16_t*>(b);
  for (int64_t k = 0; k < depth; k += split_depth, block_a += of_a * block_words, block_b += of_b * block_words) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t at = 0; at < split_depth; at += F32::width)
        joined(of_a, [&](int p) {
          const uint16_t* line = block_a + p * block_words + r * split_depth + at;
          return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(line))), 16);
        }).store(&left[r][k + at]);
    for (int64_t pair = 0; pair < split_depth / 2; pair++)
      for (int half = 0; half < 2; half++) {
        auto words = [&](int p) { return _mm512_load_si512(block_b + p * block_words + half * tile_words + pair * split_depth); };
        auto even = [&](int p) { return _mm512_slli_epi32(words(p), 16); };
        auto odd = [&](int p) { return _mm512_and_si512(words(p), _mm512_set1_epi32(int(0xffff0000u))); };
        joined(of_b, even).store(&right[k + 2 * pair][half * F32::width]);
        joined(of_b, odd).store(&right[k + 2 * pair + 1][half * F32::width]);
      }
  }
  for (int64_t r = 0; r < rows; r += tile_rows)
    rest::multiply_tile_of_rows(smaller(tile_rows, rows - r), depth, left[r], deepest_block, right[0], c + r * c_stride, c_stride,
                                accumulate);
}

}  // namespace bigmodel::BIGMODEL_ISA
