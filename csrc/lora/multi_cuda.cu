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

// Backward, projection by projection as gradients arrive, then what they share.
class Backward {
 public:
  Backward(const MultiProblem& problem, const Tensors& weights, const Tensors& lora_a, const Tensors& lora_b, const Tensor& scales,
           double dropout_p, const Tensor& s, const Tensor& masks, bool need_x)
      : grad_weights(weights.size()),
        grad_biases(weights.size()),
        grad_a(weights.size()),
        grad_b(weights.size()),
        problem_(problem),
        weights_(weights),
        lora_a_(lora_a),
        lora_b_(lora_b),
        s_(s),
        masks_(as_contiguous(masks)),
        rows_(s.size(0)),
        shares_x_(need_x && problem.features > 0),
        need_x_(need_x),
        call_(kOp, weights[0], problem, scales, dropout_p, lora_a),
        g_(weights.size()),
        sums_(weights.size(), Sums{Tensor(), 1, s.size(0), 0}),
        products_(weights.size()),
        grad_s_(weights.size()),
        added_(weights.size()) {}

  // The gradients of weight and bias, and dS_j.
  void add(int64_t j, const Tensor& grad, const std::optional<Rows>& x, bool need_weight, bool need_bias, bool need_a, bool need_b) {
    there_.push_back(j);
    const int64_t rank = problem_.ranks[at(j)], out_features = problem_.out_features[at(j)];
    const Rows& g = g_[at(j)].emplace(grad, out_features);
    std::tie(products_[at(j)], grad_weights[at(j)], grad_biases[at(j)]) =
        base_gradients(g, weights_[at(j)], x, need_x_, need_weight, need_bias);
    const ScalarType type = lora_a_[at(j)].scalar_type();
    const bool none = rows_ == 0 || rank == 0;
    if (need_a) grad_a[at(j)] = none ? zeros_on(s_, type, rank, problem_.features) : empty_on(s_, type, rank, problem_.features);
    if (need_b) grad_b[at(j)] = none ? zeros_on(s_, type, out_features, rank) : empty_on(s_, type, out_features, rank);
    if (none) return;
    adapted_.push_back(j);
    if (!need_x_ && !need_a) return;
    const Sums& sums = sums_[at(j)] = call_.one.project(g, lora_b_[at(j)], rank, true, call_.scale(j), nullptr, MaskBits{});
    if (!need_a) return;
    // The up-projection adds the splits for the gradient of lora_a as well.
    if (sums.splits > 1 && shares_x_)
      grad_s_[at(j)] = added_[at(j)] = empty_on(s_, ScalarType::Float, rows_, sums.stride);
    else
      grad_s_[at(j)] = call_.one.added(sums);
  }

  // dX = sum of dY_j W_j + keep_j(dS_j A_j).
  Tensor grad_x() {
    if (!need_x_) return {};
    Tensor sum = products_[at(there_[0])];
    if (adapted_.size() == there_.size() && shares_x_ && call_.expands_together(there_)) {
      call_.expand(there_, products_, sums_, lora_a_, masks_, added_);
      return sum;
    }
    for (size_t i = 1; i < there_.size(); ++i) sum = torch::stable::subtract(sum, products_[at(there_[i])], -1.0);
    for (const int64_t j : adapted_)
      call_.one.expand(sum, problem_.features, sums_[at(j)], lora_a_[at(j)], problem_.ranks[at(j)], true, call_.scale(j),
                       mask_of(masks_, j), added_[at(j)].defined() ? static_cast<float*>(added_[at(j)].mutable_data_ptr()) : nullptr,
                       sums_[at(j)].stride);
    return sum;
  }

  // dB_j = dY_j^T S_j and dA_j = dS_j^T keep_j(X), after grad_x.
  void factor_gradients(const std::optional<Rows>& x) {
    for (const int64_t j : adapted_) {
      const int64_t rank = problem_.ranks[at(j)];
      Call call(kOp, weights_[0], lora_a_[at(j)]);
      if (grad_b[at(j)].defined()) {
        const Rows saved = padded(Rows(columns_of(s_, problem_.first_rank[at(j)], rank), rank));
        call.gradient(*g_[at(j)], static_cast<const float*>(saved.data()), saved.stride, grad_b[at(j)], rank, false, call_.scale(j),
                      MaskBits{});
      }
      if (grad_a[at(j)].defined())
        call.gradient(*x, grad_s_[at(j)].const_data_ptr<float>(), sums_[at(j)].stride, grad_a[at(j)], rank, true, call_.scale(j),
                      mask_of(masks_, j));
      call.finish();
    }
  }

  Tensors grad_weights, grad_biases, grad_a, grad_b;

 private:
  static constexpr const char* kOp = "lora_linear_multi_backward";

  const MultiProblem& problem_;
  const Tensors &weights_, &lora_a_, &lora_b_;
  const Tensor s_, masks_;
  const int64_t rows_;
  const bool shares_x_, need_x_;
  MultiCall call_;
  Indices there_, adapted_;  // projections with a gradient, and those of them with an adapter
  std::vector<std::optional<Rows>> g_;
  std::vector<Sums> sums_;  // dS_j in its splits
  Tensors products_, grad_s_, added_;  // dY_j W_j; dS_j where lora_a needs it; the same where the up-projection makes it
};

MultiGradients lora_linear_multi_backward(OptionalTensors grads, std::optional<Tensor> x, Tensors weights, Tensors lora_a, Tensors lora_b,
                                          Tensor scales, double dropout_p, Tensor s, Tensor masks, bool need_x,
                                          std::vector<bool> need_weight, std::vector<bool> need_bias, std::vector<bool> need_a,
                                          std::vector<bool> need_b) {
  const MultiProblem problem =
      check_multi_backward(grads, x, weights, lora_a, lora_b, scales, dropout_p, s, masks, need_weight, need_bias, need_a, need_b);
  check_cuda_dtype("lora_linear_multi_backward", weights[0]);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, problem.features) : std::nullopt;
  Backward backward(problem, weights, lora_a, lora_b, scales, dropout_p, s, masks, need_x);
  const Tensor* first = nullptr;
  for (size_t j = 0; j < grads.size(); ++j) {
    if (!grads[j]) continue;
    if (!first) first = &*grads[j];
    backward.add(static_cast<int64_t>(j), *grads[j], tokens, need_weight[j], need_bias[j], need_a[j], need_b[j]);
  }
  const Tensor grad_x = backward.grad_x();
  backward.factor_gradients(tokens);
  return multi_backward_results(*first, problem.features,
                                {grad_x, backward.grad_weights, backward.grad_biases, backward.grad_a, backward.grad_b});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CUDA, m) {
  m.impl("lora_linear_multi", TORCH_BOX(&lora_linear_multi));
  m.impl("lora_linear_multi_forward", TORCH_BOX(&lora_linear_multi_forward));
  m.impl("lora_linear_multi_backward", TORCH_BOX(&lora_linear_multi_backward));
}

}  // namespace peftops::lora
