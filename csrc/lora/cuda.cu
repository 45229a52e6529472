// LoRA on CUDA: checks, plan, buffers, launches and registration. The device code is in sm80.cuh.
#include <torch/csrc/stable/library.h>

#include "../common/launch.h"
#include "../common/philox.h"
#include "cuda_kernels.h"
#include "lora.h"

namespace peftops::lora {
namespace {

void check_cuda_dtype(const char* op, const Tensor& x) {
  PEFTOPS_CHECK(x.scalar_type() != ScalarType::Double, op, ": x has dtype float64, but must be float32, bfloat16 or float16 on CUDA");
}

const Kernels& kernels_for(const Tensor& x, const Tensor& lora_a) {
  const bool wide = lora_a.scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return wide ? kernels_bfloat16_float32() : kernels_bfloat16();
    case ScalarType::Half: return wide ? kernels_float16_float32() : kernels_float16();
    default: return kernels_float32();
  }
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The same matrix in whole chunks, as the kernels read it: a copy where it is not.
Rows padded(const Rows& t) {
  const int64_t size = static_cast<int64_t>(t.owner.element_size());
  if (t.columns % 8 == 0 && t.stride * size % 16 == 0 && on_16_bytes(t.data())) return t;
  const Tensor matrix = t.matrix();
  const int64_t columns = round_up(t.columns, 8);
  Tensor whole = empty_on(matrix, matrix.scalar_type(), t.rows, columns);
  Tensor filled = torch::stable::narrow(whole, 1, 0, t.columns), rest = torch::stable::narrow(whole, 1, t.columns, columns - t.columns);
  torch::stable::copy_(filled, matrix);
  torch::stable::zero_(rest);
  return {whole, columns};
}

Rows padded_factor(const Tensor& factor) { return padded(Rows(factor, factor.size(1))); }

MaskBits bits_of(const Tensor& mask) {
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
    const ShrinkPlan plan = plan_shrink(x.rows, x.columns, rank, down, kernels_.element_bytes, launch_.device());
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
    const ExpandPlan plan = plan_expand(sums.rows, columns, kernels_.element_bytes, launch_.device());
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

  // gradient = keep(G)^T S; `gradient` lies with the features or the ranks fastest. Complete after finish().
  void gradient(const Rows& g, const float* s, int64_t s_stride, const Tensor& gradient, int64_t rank, bool features_fastest, Scale scale,
                MaskBits mask) {
    if (g.columns == 0) return;
    const Rows lines = padded(g);
    const GradientPlan plan = plan_gradient(g.rows, g.columns, rank, kernels_.element_bytes, launch_.device());
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
  const Kernels& kernels_;
  const Launcher launch_;
  const Tensor like_;
  FinishTask finish_{};
  Tensor buffers_[2];
  int results_ = 0;
};

// scale / (1 - p), times the tensor's value on the device.
Scale scale_of(double scale, const std::optional<Tensor>& tensor_scale, double dropout_p) {
  return {static_cast<float>(scale / (1.0 - dropout_p)), tensor_scale ? tensor_scale->const_data_ptr<float>() : nullptr};
}

bool is_off(Scale scale) { return scale.host == 0.0f; }

struct Forward {
  Tensor y, s, mask;
};

Forward forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                double scale_, const std::optional<Tensor>& tensor_scale, double dropout_p, const std::optional<Tensor>& seed, bool saves) {
  const Problem problem = check_forward(x, weight, bias, lora_a, lora_b, tensor_scale, dropout_p, seed);
  check_cuda_dtype("lora_linear", x);
  const auto& [features, out_features, rank] = problem;
  const Tensor y = base_product(x, weight, bias);
  const int64_t rows = rows_of(x);
  const bool drops = dropout_p > 0.0;
  const Scale scale = scale_of(scale_, tensor_scale, dropout_p);
  if (is_off(scale) || rows == 0 || (rank == 0 && !drops) || (out_features == 0 && !saves))
    return {y, zeros_on(x, ScalarType::Float, rows, rank),
            drops ? zeros_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0)};

  Call call("lora_linear", x, lora_a);
  Tensor mask = drops ? empty_on(x, ScalarType::Byte, rows, ceil_div(features, 8)) : empty_on(x, ScalarType::Byte, 0);
  const Draw draw{drops ? seed->const_data_ptr<int64_t>() : nullptr, dropout_threshold(dropout_p)};
  const Sums sums = call.project(Rows(x, features), lora_a, rank, false, scale, drops ? &draw : nullptr, bits_of(mask));
  const bool whole = sums.splits == 1 && sums.stride == rank;
  if (rank == 0 || out_features == 0) {
    Tensor s = call.added(sums);
    return {y, whole ? s : torch::stable::contiguous(torch::stable::narrow(s, 1, 0, rank)), mask};
  }
  Tensor s = whole || !saves ? sums.values : empty_on(x, ScalarType::Float, rows, rank);
  call.expand(y, out_features, sums, lora_b, rank, false, scale, MaskBits{},
              whole || !saves ? nullptr : static_cast<float*>(s.mutable_data_ptr()), rank);
  return {y, s, mask};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       double scale, std::optional<Tensor> tensor_scale, double dropout_p,
                                                       std::optional<Tensor> seed) {
  const Forward result = forward(x, weight, bias, lora_a, lora_b, scale, tensor_scale, dropout_p, seed, true);
  return {result.y, result.s, result.mask};
}

Tensor lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, double scale, double dropout_p,
                   std::optional<Tensor> seed) {
  return forward(x, weight, bias, lora_a, lora_b, scale, std::nullopt, dropout_p, seed, false).y;
}

Tensor lora_linear_tensor_scale(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scale,
                                double dropout_p, std::optional<Tensor> seed) {
  return forward(x, weight, bias, lora_a, lora_b, 1.0, scale, dropout_p, seed, false).y;
}

Gradients lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight, Tensor lora_a, Tensor lora_b, double scale_,
                               std::optional<Tensor> tensor_scale, double dropout_p, Tensor s, Tensor mask, bool need_x, bool need_weight,
                               bool need_bias, bool need_a, bool need_b) {
  const auto& [features, out_features, rank] =
      check_backward(grad, x, weight, lora_a, lora_b, tensor_scale, dropout_p, s, mask, need_weight || need_a);
  check_cuda_dtype("lora_linear_backward", grad);
  const Rows g(grad, out_features);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  const auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x, need_weight, need_bias);
  const ScalarType type = lora_a.scalar_type();
  const Scale scale = scale_of(scale_, tensor_scale, dropout_p);
  const int64_t rows = g.rows;
  Tensor grad_a, grad_b;
  if (is_off(scale) || rows == 0 || rank == 0) {
    if (need_a) grad_a = zeros_on(lora_a, type, rank, features);
    if (need_b) grad_b = zeros_on(lora_b, type, out_features, rank);
  } else if (need_x || need_a || need_b) {
    Call call("lora_linear_backward", grad, lora_a);
    const Tensor bits = as_contiguous(mask);
    const MaskBits kept = dropout_p > 0.0 ? bits_of(bits) : MaskBits{};
    const Rows saved = padded(Rows(s, rank));
    if (need_b) {
      grad_b = empty_on(lora_b, type, out_features, rank);
      call.gradient(g, static_cast<const float*>(saved.data()), saved.stride, grad_b, rank, false, scale, MaskBits{});
    }
    if (need_x || need_a) {
      const Sums sums = call.project(g, lora_b, rank, true, scale, nullptr, MaskBits{});
      Tensor grad_s = sums.values;
      if (need_x) {
        // The up-projection adds the splits for the gradient of lora_a as well.
        const bool adds = need_a && sums.splits > 1;
        if (adds) grad_s = empty_on(grad, ScalarType::Float, rows, sums.stride);
        call.expand(grad_x, features, sums, lora_a, rank, true, scale, kept,
                    adds ? static_cast<float*>(grad_s.mutable_data_ptr()) : nullptr, sums.stride);
      } else {
        grad_s = call.added(sums);
      }
      if (need_a) {
        grad_a = empty_on(lora_a, type, rank, features);
        call.gradient(*tokens, grad_s.const_data_ptr<float>(), sums.stride, grad_a, rank, true, scale, kept);
      }
    }
    call.finish();
  }
  return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
}

Tensor lora_dropout_mask(Tensor seed, int64_t rows, int64_t cols, double p) {
  check_dropout_mask(seed, rows, cols, p);
  Tensor mask = empty_on(seed, ScalarType::Bool, rows, cols);
  if (rows == 0 || cols == 0) return mask;
  const Launcher launch("lora_dropout_mask", seed);
  const int64_t count = checked_product(rows, ceil_div(cols, 8), "lora_dropout_mask");
  const DropoutMaskTask task{seed.const_data_ptr<int64_t>(), rows, cols, dropout_threshold(p), static_cast<bool*>(mask.mutable_data_ptr())};
  launch(dropout_mask_kernel(), {min_of(ceil_div(count, kThreads), std::numeric_limits<int32_t>::max())}, kThreads, 0, task);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear.tensor_scale", TORCH_BOX(&lora_linear_tensor_scale));
  m.impl("lora_linear_forward", TORCH_BOX(&lora_linear_forward));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
  m.impl("lora_dropout_mask", TORCH_BOX(&lora_dropout_mask));
}

}  // namespace peftops::lora
