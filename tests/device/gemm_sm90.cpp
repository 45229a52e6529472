// The segmented-K GEMM for sm_90a as an operator of its own, for tests.
#include "../../csrc/lora/gemm_sm90.h"

#include <torch/csrc/stable/library.h>

#include "../../csrc/common/launch.h"
#include "../../csrc/common/tensor.h"

namespace {

using namespace peftops;
using namespace peftops::lora;
using MaybeTensor = std::optional<Tensor>;

// candidate: -1 for that of the plan. adapters: a bit for each segment.
Tensor gemm(Tensor d, std::vector<Tensor> x, std::vector<Tensor> w, bool down, int64_t adapters, MaybeTensor bias, MaybeTensor column_scale,
            double scale, MaybeTensor device_scale, MaybeTensor mask, int64_t candidate, bool programmatic) {
  GemmTask task{};
  task.count = static_cast<int>(x.size());
  for (size_t j = 0; j < x.size() && j < kMaxSegments; ++j)
    task.segments[j] = {x[j].const_data_ptr(), x[j].stride(0),          w[j].const_data_ptr(), w[j].stride(0), down,
                        x[j].size(1),          (adapters >> j & 1) != 0};
  task.d = d.mutable_data_ptr(), task.rows = d.size(0), task.columns = d.size(1), task.d_stride = d.stride(0);
  if (bias) task.bias = bias->const_data_ptr();
  if (column_scale) task.column_scale = column_scale->const_data_ptr<float>();
  task.scale = {static_cast<float>(scale), device_scale ? device_scale->const_data_ptr<float>() : nullptr};
  if (mask) task.mask = {static_cast<uint8_t*>(mask->mutable_data_ptr()), mask->stride(0)};

  const Launcher launch("gemm_sm90", d);
  if (const char* reason = refuse_gemm_sm90(task, static_cast<int>(d.element_size()), launch.device())) fail("refused: ", reason);
  const GemmSm90Plan plan = candidate < 0 ? plan_gemm_sm90(task.rows, task.columns, launch.device())
                                          : plan_gemm_sm90(static_cast<int>(candidate), task.rows, task.columns);
  (d.scalar_type() == ScalarType::BFloat16 ? gemm_sm90<bfloat16> : gemm_sm90<float16>)(launch, task, plan, programmatic);
  return d;
}

}  // namespace

STABLE_TORCH_LIBRARY(peftops_test, m) {
  m.def(
      "gemm_sm90(Tensor(a!) d, Tensor[] x, Tensor[] w, bool down, int adapters, Tensor? bias, Tensor? column_scale, float scale, "
      "Tensor? device_scale, Tensor? mask, int candidate, bool programmatic) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(peftops_test, CUDA, m) { m.impl("gemm_sm90", TORCH_BOX(&gemm)); }
