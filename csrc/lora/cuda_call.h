// What the CUDA operators of this room share: matrices as the kernels take them, and one call's buffers, plans and launches.
#pragma once

#include <cstdlib>

#include "../common/launch.h"
#include "gemm_sm90.h"
#include "lora.h"

namespace peftops::lora {

inline void check_cuda_dtype(const char* op, const Tensor& x) {
  PEFTOPS_CHECK(x.scalar_type() != ScalarType::Double, op, ": x has dtype float64, but must be float32, bfloat16 or float16 on CUDA");
}

inline const Kernels& kernels_for(const Tensor& x, const Tensor& lora_a) {
  const bool wide = lora_a.scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return wide ? kernels_bfloat16_float32() : kernels_bfloat16();
    case ScalarType::Half: return wide ? kernels_float16_float32() : kernels_float16();
    default: return kernels_float32();
  }
}

inline std::string linear_names() {
  std::string names;
  for (const char* name : kLinearNames) names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

inline const GemmKernels& gemm_sm80_for(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? gemm_sm80_bfloat16() : gemm_sm80_float16();
}

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool in_whole_chunks(const Rows& t) {
  return t.columns % 8 == 0 && t.stride * static_cast<int64_t>(t.owner.element_size()) % 16 == 0 && on_16_bytes(t.data());
}

// The same matrix in whole chunks, as the kernels read it: a copy where it is not.
inline Rows padded(const Rows& t) {
  if (in_whole_chunks(t)) return t;
  const Tensor matrix = t.matrix();
  const int64_t columns = round_up(t.columns, 8);
  Tensor whole = empty_on(matrix, matrix.scalar_type(), t.rows, columns);
  Tensor filled = torch::stable::narrow(whole, 1, 0, t.columns), rest = torch::stable::narrow(whole, 1, t.columns, columns - t.columns);
  torch::stable::copy_(filled, matrix);
  torch::stable::zero_(rest);
  return {whole, columns};
}

inline bool in_whole_chunks(const Tensor& matrix) {
  return (matrix.size(1) <= 1 || matrix.stride(1) == 1) && in_whole_chunks(Rows(matrix, matrix.size(1)));
}

inline Rows padded_factor(const Tensor& factor) { return padded(Rows(factor, factor.size(1))); }

inline MaskBits bits_of(const Tensor& mask) {
  return mask.dim() == 2 ? MaskBits{static_cast<uint8_t*>(mask.data_ptr()), mask.size(1)} : MaskBits{nullptr, 0};
}

struct Draw {
  const int64_t* seed;
  uint32_t threshold;
};

// Sums of a projection, to be added over their splits.
struct Sums {
  Tensor values;  // [splits * rows, stride]
  int64_t splits, rows, stride;

  const float* data() const { return values.const_data_ptr<float>(); }
};

// One call's launches.
class Call {
 public:
  Call(const char* op, const Tensor& x, const Tensor& lora_a) : kernels_(kernels_for(x, lora_a)), launch_(op, x), like_(x) {}

  // scale * keep(X) F^T, F as [rank, depth] or `down` as [depth, rank], drawing the mask where `draw` is given.
  Sums project(const Rows& x, const Tensor& factor, int64_t rank, bool down, Scale scale, const Draw* draw, MaskBits mask) {
    const Rows tokens = padded(x), f = padded_factor(factor);
    const ShrinkPlan plan = plan_shrink(x.rows, x.columns, rank, down, kernels_.element_bytes, launch_.device(), kernels_.terms);
    const int64_t stride = round_up(rank, 8);
    Sums sums{empty_on(like_, ScalarType::Float, checked_product(plan.split.count, x.rows, "the sums"), stride), plan.split.count, x.rows,
              stride};
    ShrinkTask task{};
    task.x = tokens.data(), task.rows = x.rows, task.depth = x.columns, task.x_stride = tokens.stride;
    task.factor = f.data(), task.rank = rank, task.factor_stride = f.stride;
    task.depth_per_split = plan.split.length;
    task.scale = scale;
    if (draw) task.seed = draw->seed, task.threshold = draw->threshold;
    task.mask = mask;
    task.sums = static_cast<float*>(sums.values.mutable_data_ptr()), task.sums_stride = stride;
    const Kernel<ShrinkTask> kernel = (draw ? kernels_.draw : down ? kernels_.shrink_down : kernels_.shrink)[plan.candidate];
    launch_(kernel, {plan.row_blocks, plan.split.count, plan.rank_blocks}, kThreads, plan.shared_memory, task);
    return sums;
  }

  // Y += keep(S F^T), F as [columns, rank] or `down` as [rank, columns]; Y is contiguous. S itself goes to `sum` where it is given.
  void expand(const Tensor& y, int64_t columns, const Sums& sums, const Tensor& factor, int64_t rank, bool down, Scale scale, MaskBits mask,
              float* sum, int64_t sum_stride) {
    if (columns == 0) return;
    const Rows f = padded_factor(factor);
    const ExpandPlan plan = plan_expand(sums.rows, columns, kernels_.element_bytes, launch_.device(), kernels_.terms);
    ExpandTask task{};
    task.y = y.mutable_data_ptr(), task.rows = sums.rows, task.columns = columns;
    task.sums = sums.data(), task.splits = sums.splits, task.rank = rank, task.sums_stride = sums.stride;
    task.sum = sum, task.sum_stride = sum_stride;
    task.factor = f.data(), task.factor_stride = f.stride;
    task.columns_per_block = plan.columns_per_block;
    task.scale = scale;
    task.mask = mask;
    task.y_aligned = columns % 8 == 0 && on_16_bytes(task.y);
    launch_(!down       ? kernels_.expand
            : mask.data ? kernels_.expand_down_masked
                        : kernels_.expand_down,
            {plan.row_blocks, plan.column_blocks}, kThreads, plan.shared_memory, task);
  }

  // How to make the D of `gemm`. `whole`: all operands are in whole chunks, so that nothing must be copied. The environment variable
  // PEFTOPS_FORCE_PLAN names the plan that is taken where it can be run.
  Linear choose(int64_t rows, int64_t columns, int64_t depth, int64_t rank, bool down, bool whole) const {
    LinearRefusals refused{};
    const GemmTask shape = task_of(rows, columns, depth, rank, down, false);
    const char* const types = kernels_.operand ? nullptr : "tensor cores do not multiply these types";
    refused.of[static_cast<int>(Linear::gemm_sm80)] = types ? types : refuse_gemm_sm80(rows, columns, launch_.device());
    refused.of[static_cast<int>(Linear::gemm_sm90)] = types ? types : refuse_gemm_sm90(shape, 2, launch_.device());
    if (const char* name = std::getenv("PEFTOPS_FORCE_PLAN"); name && *name) {
      const int forced = linear_named(name);
      PEFTOPS_CHECK(forced >= 0, launch_.op(), ": PEFTOPS_FORCE_PLAN is '", name, "', but must be one of ", linear_names());
      if (!refused.of[forced]) return static_cast<Linear>(forced);
    }
    return plan_linear(refused, whole);
  }

  // D = X W^T + keep(S F^T) + bias by one GEMM, W and F both as [columns, depth] or both `down`; D is contiguous. S is the sum of its
  // splits and goes to `sum` where it is given.
  void gemm(Linear how, const Tensor& d, int64_t columns, const Rows& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Sums& sums, const Tensor& factor, int64_t rank, bool down, Scale scale, MaskBits mask, float* sum,
            int64_t sum_stride) const {
    const Rows tokens = padded(x), w = padded_factor(weight), f = kernels_.terms > 1 ? terms_of(factor, down) : padded_factor(factor);
    const Tensor added = bias ? as_contiguous(*bias) : Tensor();
    // Right before the GEMM: one that starts early has to wait for this operand alone.
    const Tensor s = empty_on(like_, like_.scalar_type(), sums.rows, kernels_.terms * sums.stride);
    OperandTask prepare{};
    prepare.sums = sums.data(), prepare.splits = sums.splits, prepare.rows = sums.rows, prepare.sums_stride = sums.stride;
    prepare.sum = sum, prepare.sum_stride = sum_stride;
    prepare.operand = s.mutable_data_ptr();
    launch_(kernels_.operand, {ceil_div(sums.rows, kGpuTile)}, kThreads, 0, prepare);

    GemmTask task = task_of(x.rows, columns, x.columns, rank, down, mask.data);
    Segment &base = task.segments[mask.data ? 1 : 0], &low_rank = task.segments[mask.data ? 0 : 1];
    base.x = tokens.data(), base.x_stride = tokens.stride, base.w = w.data(), base.w_stride = w.stride;
    low_rank.x = prepare.operand, low_rank.w = f.data(), low_rank.w_stride = f.stride;
    task.d = d.mutable_data_ptr();
    task.bias = bias ? added.const_data_ptr() : nullptr;
    task.scale = scale, task.mask = mask;
    if (how == Linear::gemm_sm90)
      gemm_sm90(task);
    else
      gemm_sm80(task);
  }

  // Any task that is not refused, of the type of this call's x.
  void gemm_sm80(const GemmTask& task) const {
    const GemmPlan plan = plan_gemm_sm80(task.rows, task.columns);
    const GemmKernels& kernels = gemm_sm80_for(like_);
    launch_(task.segments[0].down ? kernels.down : kernels.rows, {plan.row_blocks * plan.column_blocks}, kThreads, kGemmMemory, task);
  }

  // The same; the launch before it may have made the X of the adapter's segments and nothing else that is read here.
  void gemm_sm90(const GemmTask& task) const {
    const GemmSm90Plan plan = plan_gemm_sm90(task.rows, task.columns, launch_.device());
    if (like_.scalar_type() == ScalarType::BFloat16)
      lora::gemm_sm90<bfloat16>(launch_, task, plan, true);
    else
      lora::gemm_sm90<float16>(launch_, task, plan, true);
  }

  // gradient = keep(G)^T S; `gradient` lies with the features or the ranks fastest. Complete after finish().
  void gradient(const Rows& g, const float* s, int64_t s_stride, const Tensor& gradient, int64_t rank, bool features_fastest, Scale scale,
                MaskBits mask) {
    if (g.columns == 0) return;
    const Rows lines = padded(g);
    const GradientPlan plan = plan_gradient(g.rows, g.columns, rank, kernels_.element_bytes, launch_.device(), kernels_.terms);
    GradientTask task{};
    task.g = lines.data(), task.rows = g.rows, task.features = g.columns, task.g_stride = lines.stride;
    task.s = s, task.rank = rank, task.s_stride = s_stride;
    task.rows_per_split = plan.split.length;
    task.scale = scale;
    task.mask = mask;
    task.gradient = gradient.mutable_data_ptr();
    task.feature_stride = features_fastest ? 1 : rank, task.rank_stride = features_fastest ? g.columns : 1;
    if (plan.split.count > 1) {
      const int64_t count = g.columns * rank;
      buffers_[results_] = empty_on(like_, ScalarType::Float, plan.split.count, count);
      task.partials = static_cast<float*>(buffers_[results_].mutable_data_ptr());
      finish_.results[results_++] = {task.partials, plan.split.count, count, task.gradient};
    }
    const Kernel<GradientTask> kernel = (mask.data ? kernels_.gradient_masked : kernels_.gradient)[plan.candidate];
    launch_(kernel, {plan.feature_blocks, plan.split.count, plan.rank_blocks}, kThreads, plan.shared_memory, task);
  }

  // Adds up what `gradient` left in parts.
  void finish() {
    if (results_ == 0) return;
    int64_t count = 0;
    for (int i = 0; i < results_; ++i) count = at_least(count, finish_.results[i].count);
    launch_(kernels_.finish, {ceil_div(count, kFinishThreads), results_}, kFinishThreads, 0, finish_);
  }

  // The sum over the splits as a buffer [rows, stride].
  Tensor added(const Sums& sums) {
    if (sums.splits == 1) return sums.values;
    Tensor sum = empty_on(like_, ScalarType::Float, sums.rows, sums.stride);
    const int64_t count = sums.rows * sums.stride;
    if (count == 0) return sum;
    FinishTask task{};
    task.results[0] = {sums.data(), sums.splits, count, sum.mutable_data_ptr()};
    launch_(kernels_float32().finish, {ceil_div(count, kFinishThreads)}, kFinishThreads, 0, task);
    return sum;
  }

 private:
  // The task of `gemm` without its buffers, its operands in whole chunks. A mask is of segment 0.
  GemmTask task_of(int64_t rows, int64_t columns, int64_t depth, int64_t rank, bool down, bool masked) const {
    const int64_t ranks = kernels_.terms * round_up(rank, 8), line = round_up(columns, 8);
    GemmTask task{};
    task.segments[masked ? 1 : 0] = {nullptr, round_up(depth, 8), nullptr, down ? line : round_up(depth, 8), down, depth, false};
    task.segments[masked ? 0 : 1] = {nullptr, ranks, nullptr, down ? line : ranks, down, kernels_.terms > 1 ? ranks : rank, true};
    task.count = 2;
    task.rows = rows, task.columns = columns, task.d_stride = columns;
    return task;
  }

  // A float32 factor [columns, rank], or `down` [rank, columns], as a GEMM's operand: along the ranks its terms F1, F2, F1.
  Rows terms_of(const Tensor& given, bool down) const {
    const Tensor factor = with_unit_stride(given);
    FactorTask task{};
    task.factor = factor.const_data_ptr<float>(), task.stride = factor.stride(0);
    task.lines = factor.size(0), task.columns = factor.size(1);
    task.whole_lines = down ? round_up(task.lines, 8) : task.lines, task.whole_columns = round_up(task.columns, 8);
    const int64_t lines = down ? 3 * task.whole_lines : task.whole_lines;
    task.operand_stride = down ? task.whole_columns : 3 * task.whole_columns;
    task.apart = down ? task.whole_lines * task.whole_columns : task.whole_columns;
    const Tensor operand = empty_on(like_, like_.scalar_type(), lines, task.operand_stride);
    task.operand = operand.mutable_data_ptr();
    launch_(factor_operand_kernel(), {ceil_div(task.whole_columns, kGpuTile), min_of(ceil_div(task.whole_lines, kFactorLines), kMaxGridY)},
            kThreads, 0, task);
    return {operand, task.operand_stride};
  }

  const Kernels& kernels_;
  const Launcher launch_;
  const Tensor like_;
  FinishTask finish_{};
  Tensor buffers_[2];
  int results_ = 0;
};

// scale / (1 - p), times the tensor's value on the device.
inline Scale scale_of(double scale, const std::optional<Tensor>& tensor_scale, double dropout_p) {
  return {static_cast<float>(scale / (1.0 - dropout_p)), tensor_scale ? tensor_scale->const_data_ptr<float>() : nullptr};
}

inline bool is_off(Scale scale) { return scale.host == 0.0f; }

}  // namespace peftops::lora
