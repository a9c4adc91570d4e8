// The kernels of sums over rows, by element type, and how rows are cut into parts.
#include "reduce/columns.cuh"

#include <algorithm>

#include "reduce/launch.h"

namespace bigmodel::cuda {
namespace {

using Parts = ColumnParts<bfloat16>;  // all element types have its sizes

int blocks_across(int columns) { return (columns + Parts::columns - 1) / Parts::columns; }

}  // namespace

// Four blocks for each multiprocessor, and of a part 32 rows at least and no more than 128 parts, which somebody has to add up.
int column_part_size(int rows, int columns, int multiprocessors) {
  constexpr int step = Parts::warps * Parts::at_once;
  const int most = std::clamp(4 * multiprocessors / std::max(1, blocks_across(columns)), 1, 128);
  const int64_t size = (int64_t(rows) + most - 1) / most;
  return int(std::max<int64_t>(1, (size + step - 1) / step) * step);
}

void column_parts(const ColumnPartsParams& p, bool is_bfloat16, const Stream& stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const Grid grid = {blocks_across(p.columns), (p.rows - 1) / p.rows_of_part + 1};
  is_bfloat16 ? launch<ColumnParts<bfloat16>>(grid, p, stream) : launch<ColumnParts<float16>>(grid, p, stream);
}

void sum_parts(const SumPartsParams& p, bool is_bfloat16, const Stream& stream) {
  int blocks = 0;
  for (int i = 0; i < p.sums; i++) blocks += SumParts<bfloat16>::blocks_of(p.sum[i].columns);
  if (blocks == 0) return;
  is_bfloat16 ? launch<SumParts<bfloat16>>({blocks}, p, stream) : launch<SumParts<float16>>({blocks}, p, stream);
}

}  // namespace bigmodel::cuda
