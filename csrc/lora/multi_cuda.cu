// Several projections of one x on CUDA: registration, buffers and launches. Projections that may share a pass over x, or over its gradient,
// do; the others go one by one through lora_linear's kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/philox.h"
#include "cuda_call.h"
#include "multi.h"
#include "multi_kernels.h"

namespace peftops::lora {
namespace {

using Indices = std::vector<int64_t>;

size_t at(int64_t j) { return static_cast<size_t>(j); }

// Columns [first, first + columns) of a matrix of sums.
Tensor columns_of(const Tensor& matrix, int64_t first, int64_t columns) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, columns);
}

MaskBits mask_of(const Tensor& masks, int64_t j) {
  if (masks.dim() != 3) return {nullptr, 0};
  return {static_cast<uint8_t*>(masks.data_ptr()) + j * masks.size(1) * masks.size(2), masks.size(2)};
}

// One call's launches.
class MultiCall {
 public:
  MultiCall(const char* op, const Tensor& x, const MultiProblem& problem, const Tensor& scales, double dropout_p, const Tensors& lora_a)
      : one(op, x, lora_a[0]), problem_(problem), launch_(op, x), like_(x), scales_(as_contiguous(scales)), dropout_p_(dropout_p) {
    if (lora_a[0].scalar_type() == x.scalar_type() && x.scalar_type() != ScalarType::Float)
      kernels_ = x.scalar_type() == ScalarType::Half ? &multi_kernels_float16() : &multi_kernels_bfloat16();
  }

  Call one;  // for one projection

  Scale scale(int64_t j) const { return {static_cast<float>(1.0 / (1.0 - dropout_p_)), scales_.const_data_ptr<float>() + j}; }

  // S_j of every projection. seeds: of the masks to draw into `masks`, or null.
  std::vector<Sums> project(const Rows& x, const Tensors& lora_a, const int64_t* seeds, const Tensor& masks) {
    std::vector<Sums> sums;
    const int64_t count = problem_.count();
    const bool shares = !refuse_multi(count, element_bytes(), launch_.device()) && !has_empty_result();
    const Rows tokens = padded(x);
    for (int64_t j = 0; j < count;) {
      const int64_t together = shares ? sharing(count - j) : 1;
      if (together > 1) {
        project_together(tokens, lora_a, j, together, seeds, masks, sums);
      } else {
        const Draw draw{seeds + j, dropout_threshold(dropout_p_)};
        sums.push_back(
            one.project(tokens, lora_a[at(j)], problem_.ranks[at(j)], false, scale(j), seeds ? &draw : nullptr, mask_of(masks, j)));
      }
      j += together;
    }
    return sums;
  }

  bool expands_together(const Indices& which) const {
    int64_t most = 0;
    for (const int64_t j : which) most = at_least(problem_.ranks[at(j)], most);
    return !refuse_multi_expand(min_of(static_cast<int64_t>(which.size()), kSharingProjections), most, element_bytes(), launch_.device());
  }

  // Y += the other products + sum_j keep_j(dS_j A_j) over the projections in `which`. The sums of the splits go to `added` where it is
  // defined.
  void expand(const Indices& which, const Tensors& products, const std::vector<Sums>& sums, const Tensors& lora_a, const Tensor& masks,
              const Tensors& added) {
    const Tensor& y = products[at(which[0])];
    const int64_t rows = y.size(0), columns = y.size(1), count = static_cast<int64_t>(which.size());
    const ExpandPlan plan = plan_expand(rows, columns, 2, launch_.device());
    for (int64_t first = 0, together; first < count; first += together) {
      together = at_least(sharing(count - first), 1);
      MultiExpandTask task{};
      task.y = y.mutable_data_ptr(), task.rows = rows, task.columns = columns;
      task.columns_per_block = plan.columns_per_block;
      task.mask_stride = mask_of(masks, 0).stride;
      task.aligned = columns % 8 == 0 && on_16_bytes(task.y);
      task.count = static_cast<int32_t>(together);
      std::vector<Rows> factors;
      int others = 0;
      for (int64_t i = 0; i < together; ++i) {
        const int64_t j = which[at(first + i)];
        auto& projection = task.projections[i];
        factors.push_back(padded_factor(lora_a[at(j)]));
        projection.sums = sums[at(j)].data(), projection.splits = sums[at(j)].splits, projection.sums_stride = sums[at(j)].stride;
        projection.rank = problem_.ranks[at(j)];
        if (added[at(j)].defined()) projection.sum = static_cast<float*>(added[at(j)].mutable_data_ptr());
        projection.factor = factors.back().data(), projection.factor_stride = factors.back().stride;
        projection.scale = scale(j), projection.mask = mask_of(masks, j).data;
        if (first + i == 0) continue;
        const void* const other = products[at(j)].const_data_ptr();
        task.others[others++] = other;
        task.aligned = task.aligned && on_16_bytes(other);
      }
      launch_(masks.dim() == 3 ? kernels_->expand_masked : kernels_->expand, {plan.row_blocks, plan.column_blocks}, kThreads,
              multi_expand_memory(together), task);
    }
  }

 private:
  int element_bytes() const { return kernels_ ? 2 : 4; }
  bool has_empty_result() const {
    return std::any_of(problem_.out_features.begin(), problem_.out_features.end(), [](int64_t size) { return size == 0; });
  }

  // Projections [first, first + count), in one pass over x. Their sums lie side by side.
  void project_together(const Rows& x, const Tensors& lora_a, int64_t first, int64_t count, const int64_t* seeds, const Tensor& masks,
                        std::vector<Sums>& sums) {
    int64_t width = 0, most = 0;
    for (int64_t j = first; j < first + count; ++j)
      width += round_up(problem_.ranks[at(j)], 8), most = at_least(problem_.ranks[at(j)], most);
    const MultiShrinkPlan plan = plan_multi_shrink(x.rows, problem_.features, most, launch_.device());
    const Tensor values = empty_on(like_, ScalarType::Float, checked_product(plan.split.count, x.rows, "the sums"), width);
    MultiShrinkTask task{};
    task.x = x.data(), task.rows = x.rows, task.depth = problem_.features, task.x_stride = x.stride;
    task.depth_per_split = plan.split.length;
    task.split_stride = x.rows * width, task.sums_stride = width;
    task.threshold = dropout_threshold(dropout_p_), task.mask_stride = mask_of(masks, 0).stride;
    std::vector<Rows> factors;
    int64_t column = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = first + i, rank = problem_.ranks[at(j)];
      auto& projection = task.projections[i];
      factors.push_back(padded_factor(lora_a[at(j)]));
      projection.factor = factors.back().data(), projection.rank = rank, projection.factor_stride = factors.back().stride;
      projection.scale = scale(j);
      if (seeds) projection.seed = seeds + j, projection.mask = mask_of(masks, j).data;
      projection.sums = static_cast<float*>(values.mutable_data_ptr()) + column;
      sums.push_back({columns_of(values, column, round_up(rank, 8)), plan.split.count, x.rows, width});
      column += round_up(rank, 8);
    }
    launch_((seeds ? kernels_->draw : kernels_->shrink)[count - 2][plan.candidate], {plan.row_blocks, plan.split.count, plan.rank_blocks},
            kThreads, plan.shared_memory, task);
  }

  const MultiProblem& problem_;
  const Launcher launch_;
  const Tensor like_, scales_;
  const double dropout_p_;
  const MultiKernels* kernels_ = nullptr;
};

struct Forward {
  Tensors ys;
  Tensor s, masks;
};

Forward forward(const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const Tensors& lora_a, const Tensors& lora_b,
                const Tensor& scales, double dropout_p, const std::optional<Tensor>& seeds, bool saves) {
  const MultiProblem problem = check_multi_forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds);
  check_cuda_dtype("lora_linear_multi", x);
  const int64_t rows = rows_of(x), count = problem.count();
  const bool drops = dropout_p > 0.0;
  Forward result;
  for (int64_t j = 0; j < count; ++j) result.ys.push_back(base_product(x, weights[at(j)], biases[at(j)]));
  result.masks = drops ? empty_on(x, ScalarType::Byte, count, rows, ceil_div(problem.features, 8)) : empty_on(x, ScalarType::Byte, 0);
  result.s = empty_on(x, ScalarType::Float, rows, problem.rank);
  if (rows == 0 || (problem.rank == 0 && !drops)) return result;

  MultiCall call("lora_linear_multi", x, problem, scales, dropout_p, lora_a);
  const Tensor keys = drops ? as_contiguous(*seeds) : Tensor();
  const std::vector<Sums> sums =
      call.project(Rows(x, problem.features), lora_a, drops ? keys.const_data_ptr<int64_t>() : nullptr, result.masks);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t rank = problem.ranks[at(j)], out_features = problem.out_features[at(j)];
    if (rank == 0) continue;
    Tensor mine = columns_of(result.s, problem.first_rank[at(j)], rank);
    const bool direct = saves && rank % 8 == 0;  // else a chunk's end would be the next projection's beginning
    Tensor sum;
    if (out_features == 0)
      sum = call.one.added(sums[at(j)]);
    else if (saves && !direct)
      sum = empty_on(x, ScalarType::Float, rows, round_up(rank, 8));
    float* const to = !saves || out_features == 0 ? nullptr : static_cast<float*>((direct ? mine : sum).mutable_data_ptr());
    call.one.expand(result.ys[at(j)], out_features, sums[at(j)], lora_b[at(j)], rank, false, call.scale(j), MaskBits{}, to,
                    direct ? problem.rank : round_up(rank, 8));
    if (saves && sum.defined()) torch::stable::copy_(mine, columns_of(sum, 0, rank));
  }
  return result;
}

std::tuple<Tensors, Tensor, Tensor> lora_linear_multi_forward(Tensor x, Tensors weights, OptionalTensors biases, Tensors lora_a,
                                                              Tensors lora_b, Tensor scales, double dropout_p,
                                                              std::optional<Tensor> seeds) {
  const Forward result = forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds, true);
  return {result.ys, result.s, result.masks};
}

Tensors lora_linear_multi(Tensor x, Tensors weights, OptionalTensors biases, Tensors lora_a, Tensors lora_b, Tensor scales,
                          double dropout_p, std::optional<Tensor> seeds) {
  return forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds, false).ys;
}

MultiGradients lora_linear_multi_backward(OptionalTensors grads, std::optional<Tensor> x, Tensors weights, Tensors lora_a, Tensors lora_b,
                                          Tensor scales, double dropout_p, Tensor s, Tensor masks, bool need_x,
                                          std::vector<bool> need_weight, std::vector<bool> need_bias, std::vector<bool> need_a,
                                          std::vector<bool> need_b) {
  const char* op = "lora_linear_multi_backward";
  const MultiProblem problem =
      check_multi_backward(grads, x, weights, lora_a, lora_b, scales, dropout_p, s, masks, need_weight, need_bias, need_a, need_b);
  check_cuda_dtype(op, weights[0]);
  const int64_t rows = s.size(0), features = problem.features;
  const size_t count = grads.size();
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  const Tensor bits = as_contiguous(masks);
  MultiCall call(op, weights[0], problem, scales, dropout_p, lora_a);
  std::vector<std::optional<Rows>> g(count);
  Tensors products(count), grad_weights(count), grad_biases(count), grad_a(count), grad_b(count), grad_s(count);
  std::vector<Sums> sums(count, Sums{Tensor(), 1, rows, 0});
  Indices there, adapted;  // projections with a gradient, and with an adapter in it
  for (int64_t j = 0; j < problem.count(); ++j) {
    if (!grads[at(j)]) continue;
    there.push_back(j);
    const int64_t rank = problem.ranks[at(j)], out_features = problem.out_features[at(j)];
    const Rows& mine = g[at(j)].emplace(*grads[at(j)], out_features);
    std::tie(products[at(j)], grad_weights[at(j)], grad_biases[at(j)]) =
        base_gradients(mine, weights[at(j)], tokens, need_x, need_weight[at(j)], need_bias[at(j)]);
    const ScalarType type = lora_a[at(j)].scalar_type();
    const bool none = rows == 0 || rank == 0;
    if (need_a[at(j)]) grad_a[at(j)] = none ? zeros_on(s, type, rank, features) : empty_on(s, type, rank, features);
    if (need_b[at(j)]) grad_b[at(j)] = none ? zeros_on(s, type, out_features, rank) : empty_on(s, type, out_features, rank);
    if (none) continue;
    adapted.push_back(j);
    if (!need_x && !need_a[at(j)]) continue;
    sums[at(j)] = call.one.project(mine, lora_b[at(j)], rank, true, call.scale(j), nullptr, MaskBits{});
    // The up-projection adds the splits for the gradient of lora_a as well.
    if (need_a[at(j)])
      grad_s[at(j)] = sums[at(j)].splits == 1  ? sums[at(j)].values
                      : need_x && features > 0 ? empty_on(s, ScalarType::Float, rows, sums[at(j)].stride)
                                               : call.one.added(sums[at(j)]);
  }

  Tensor grad_x;
  if (need_x) {
    grad_x = products[at(there[0])];
    Tensors added(count);
    for (const int64_t j : adapted)
      if (grad_s[at(j)].defined() && sums[at(j)].splits > 1) added[at(j)] = grad_s[at(j)];
    if (adapted.size() == there.size() && features > 0 && call.expands_together(there)) {
      call.expand(there, products, sums, lora_a, bits, added);
    } else {
      for (size_t i = 1; i < there.size(); ++i) grad_x = torch::stable::subtract(grad_x, products[at(there[i])], -1.0);
      for (const int64_t j : adapted)
        call.one.expand(grad_x, features, sums[at(j)], lora_a[at(j)], problem.ranks[at(j)], true, call.scale(j), mask_of(bits, j),
                        added[at(j)].defined() ? static_cast<float*>(added[at(j)].mutable_data_ptr()) : nullptr, sums[at(j)].stride);
    }
  }
  for (const int64_t j : adapted) {
    const int64_t rank = problem.ranks[at(j)];
    Call factors(op, weights[0], lora_a[at(j)]);
    if (need_b[at(j)]) {
      const Rows saved = padded(Rows(columns_of(s, problem.first_rank[at(j)], rank), rank));
      factors.gradient(*g[at(j)], static_cast<const float*>(saved.data()), saved.stride, grad_b[at(j)], rank, false, call.scale(j),
                       MaskBits{});
    }
    if (need_a[at(j)])
      factors.gradient(*tokens, grad_s[at(j)].const_data_ptr<float>(), sums[at(j)].stride, grad_a[at(j)], rank, true, call.scale(j),
                       mask_of(bits, j));
    factors.finish();
  }
  return multi_backward_results(*grads[at(there[0])], features, {grad_x, grad_weights, grad_biases, grad_a, grad_b});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CUDA, m) {
  m.impl("lora_linear_multi", TORCH_BOX(&lora_linear_multi));
  m.impl("lora_linear_multi_forward", TORCH_BOX(&lora_linear_multi_forward));
  m.impl("lora_linear_multi_backward", TORCH_BOX(&lora_linear_multi_backward));
}

}  // namespace peftops::lora
