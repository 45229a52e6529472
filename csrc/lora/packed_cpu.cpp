// Linears with a packed weight on the CPU: buffers, tasks and registration. The arithmetic is in packed_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include "cpu_call.h"
#include "packed.h"
#include "packed_kernels.h"

namespace peftops::lora::packed {
namespace {

const LevelKernels& level_kernels() {
  switch (cpu_level()) {
#ifdef PEFTOPS_X86
    case CpuLevel::avx512: return kernels_avx512();
    case CpuLevel::avx2: return kernels_avx2();
#endif
    default: return kernels_baseline();
  }
}

Strided strided(const Tensor& t) { return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }

Tensor pack_weight(Tensor weight) {
  check_pack_weight(weight);
  const Storage storage = storage_of(weight);
  const int64_t blocks = ceil_div(weight.size(0), kPackedLanes), steps = ceil_div(weight.size(1), 2);
  Tensor packed = empty_on(weight, weight.scalar_type(), blocks, steps, kPackedLanes, 2);
  const Kernels& kernels = level_kernels().find(storage, storage);
  const Strided from = strided(weight);
  spread(blocks, ceil_div(1 << 10, steps + 1),
         [&](int64_t begin, int64_t end) { kernels.pack(from, packed.mutable_data_ptr(), begin, end); });
  return packed;
}

// Rows in strips, `element` bytes for a step of one.
Tensor in_strips(const Tensor& rows_like, const StripTask& rows, int64_t steps, int64_t element,
                 void (*strip)(const StripTask&, int64_t, int64_t)) {
  Tensor strips = empty_on(rows_like, ScalarType::Byte, checked_product(checked_product(rows.rows, steps, "strips"), element, "strips"));
  StripTask task = rows;
  task.to = strips.mutable_data_ptr();
  spread(ceil_div(steps, kPackedChunk), ceil_div(1 << 13, rows.rows * kPackedChunk + 1),
         [&](int64_t begin, int64_t end) { strip(task, begin, end); });
  return strips;
}

Tensor lora_linear_packed(Tensor x, Tensor packed, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scale,
                          int64_t out_features) {
  const auto& [features, columns, rank] = check_linear(x, packed, bias, lora_a, lora_b, scale, out_features);
  const int64_t rows = rows_of(x), steps = ceil_div(features, 2);
  const Kernels& kernels = level_kernels().find(storage_of(x), storage_of(lora_a));
  const Tensor tokens = as_contiguous(x), weight = as_contiguous(packed), dense_bias = bias ? as_contiguous(*bias) : Tensor();
  Tensor y = empty_on(x, x.scalar_type(), rows, columns);

  LinearTask task{};
  task.rows = rows, task.out_features = columns, task.y = y.mutable_data_ptr();
  if (bias) task.bias = dense_bias.const_data_ptr();
  const Tensor strips = in_strips(x, {tokens.const_data_ptr(), rows, features, nullptr}, steps, kernels.element, kernels.strip_rows);
  task.base = {strips.const_data_ptr(), weight.const_data_ptr(), steps};

  Tensor s, s_strips, packed_b;
  if (const double factor = *scale.const_data_ptr<float>(); factor != 0.0 && rank > 0) {
    const int64_t rank_steps = ceil_div(rank, 2);
    s = few_row_sums(by_piece(tokens, rows, features), rows, lora_a, factor);
    s_strips = in_strips(x, {s.const_data_ptr(), rows, rank, nullptr}, rank_steps, kernels.factor_element, kernels.strip_sums);
    packed_b = empty_on(lora_b, lora_b.scalar_type(), ceil_div(columns, kPackedLanes), rank_steps, kPackedStep);
    task.b = strided(lora_b), task.packed_b = packed_b.mutable_data_ptr();
    task.lora = {s_strips.const_data_ptr(), task.packed_b, rank_steps};
  }
  // About 2^17 products are worth a thread.
  const int64_t width = kernels.group * kPackedLanes;
  spread(ceil_div(columns, width), ceil_div(1 << 17, width * (rows * (features + rank) + 1)),
         [&](int64_t begin, int64_t end) { kernels.linear(task, begin, end); });
  return reshaped_like(y, x, columns);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("lora_linear_packed", TORCH_BOX(&lora_linear_packed));
}

}  // namespace peftops::lora::packed
