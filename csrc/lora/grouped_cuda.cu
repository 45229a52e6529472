// Grouped LoRA on CUDA: registration, buffers and launches. What depends on adapter_ids happens on the device, so a captured graph may be
// replayed with other ids.
#include <torch/csrc/stable/library.h>

#include "cuda_call.h"
#include "grouped.h"
#include "grouped_kernels.h"

namespace peftops::lora {
namespace {

const GroupedKernels& grouped_kernels_for(const Tensor& x, const Tensor& lora_a) {
  const bool wide = lora_a.scalar_type() == ScalarType::Float;
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return wide ? grouped_kernels_bfloat16_float32() : grouped_kernels_bfloat16();
    case ScalarType::Half: return wide ? grouped_kernels_float16_float32() : grouped_kernels_float16();
    default: return grouped_kernels_float32();
  }
}

// The adapters' factors [L, rows, columns] in whole chunks: a copy where they are not.
struct Stack {
  Tensor owner;

  explicit Stack(const Tensor& factors) : owner(factors) {
    const int64_t size = static_cast<int64_t>(factors.element_size()), columns = factors.size(2);
    if (columns % 8 == 0 && factors.stride(2) == 1 && factors.stride(1) * size % 16 == 0 && factors.stride(0) * size % 16 == 0 &&
        on_16_bytes(factors.const_data_ptr()))
      return;
    const int64_t whole = round_up(columns, 8);
    owner = empty_on(factors, factors.scalar_type(), factors.size(0), factors.size(1), whole);
    Tensor filled = torch::stable::narrow(owner, 2, 0, columns), rest = torch::stable::narrow(owner, 2, columns, whole - columns);
    torch::stable::copy_(filled, factors);
    torch::stable::zero_(rest);
  }

  const void* data() const { return owner.const_data_ptr(); }
  int64_t adapter_stride() const { return owner.stride(0); }
  int64_t row_stride() const { return owner.stride(1); }
};

Integers integers_of(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

// One call's tokens by adapter, and its launches.
class GroupedCall {
 public:
  GroupedCall(const char* op, const Tensor& x, const Tensor& lora_a, const Tensor& scales, const Tensor& adapter_ids,
              const std::optional<Tensor>& ranks)
      : kernels_(grouped_kernels_for(x, lora_a)),
        launch_(op, x),
        like_(x),
        scales_(as_contiguous(scales)),
        ids_(as_contiguous(adapter_ids)),
        rows_(rows_of(x)) {
    PEFTOPS_CHECK(rows_ <= kMostTokens, op, ": adapter_ids has ", rows_, " elements, but CUDA takes up to ", kMostTokens);
    if (ranks) ranks_ = as_contiguous(*ranks);
    adapters_ = {lora_a.size(0), lora_a.size(1), scales_.const_data_ptr<float>(), ranks ? integers_of(ranks_) : Integers{}};
  }

  // Before project and expand of a forward pass.
  void group_forward(int64_t columns) {
    few_ = !refuse_few(rows_, columns, kernels_.element_bytes, launch_.device());
    group(0);
  }

  // Lists the tiles and, where rows_per_part is not 0, the parts of the adapters' tokens.
  void group(int64_t rows_per_part) {
    const int64_t tile_rows = few_ ? kFewTileRows : kGpuTile, slots = tile_slots(rows_, adapters_.count, tile_rows);
    order_ = integers(rows_), tiles_ = integers(slots * 4);
    if (rows_per_part == 0 && rows_ <= kFewTokens) {
      const GroupFewTask task{integers_of(ids_), rows_, adapters_.count, order(), tiles(), slots, static_cast<int32_t>(tile_rows)};
      launch_(group_few_kernel(), {1}, kGroupThreads, 2 * kGroupThreads * int64_t{sizeof(int32_t)}, task);
      return;
    }
    const int64_t groups = groups_of(adapters_.count);
    const Tensor starts = integers(groups + 1);
    auto* const first = static_cast<int32_t*>(starts.mutable_data_ptr());
    launch_(group_kernel(), {groups}, kGroupThreads, 2 * kGroupThreads * int64_t{sizeof(uint64_t)},
            GroupTask{integers_of(ids_), rows_, adapters_.count, ceil_div(rows_, kGroupThreads), order(), first});
    ListTask task{};
    task.starts = first, task.adapters = adapters_.count, task.groups_per_thread = ceil_div(groups, kListThreads);
    task.tiles = tiles(), task.tile_slots = slots;
    if (rows_per_part) {
      task.part_slots = part_slots(rows_, adapters_.count, rows_per_part);
      parts_ = integers(task.part_slots * 4), ranges_ = integers(adapters_.count * 2);
      task.rows_per_part = static_cast<int32_t>(min_of(rows_per_part, kMostTokens));
      task.parts = parts(), task.ranges = ranges();
    }
    launch_(list_kernel(), {1}, kListThreads, 2 * kListThreads * int64_t{sizeof(uint64_t)}, task);
  }

  // c_l X F_l^T, F_l as [rank, depth] or `down` as [depth, rank].
  Sums project(const Rows& x, const Tensor& factors, bool down) {
    const Rows tokens = padded(x);
    const Stack stack(factors);
    const GroupedShrinkPlan many =
        plan_grouped_shrink(rows_, x.columns, adapters_.rank, adapters_.count, down, kernels_.element_bytes, launch_.device());
    const FewShrinkPlan few = plan_few_shrink(rows_, x.columns, adapters_.rank, adapters_.count, launch_.device());
    const Split split = few_ ? few.split : many.split;
    const int64_t stride = round_up(adapters_.rank, 8);
    Sums sums{empty_on(like_, ScalarType::Float, checked_product(split.count, rows_, "the sums"), stride), split.count, rows_, stride};
    GroupedShrinkTask task{};
    task.tiles = tiles(), task.order = order(), task.adapters = adapters_;
    task.x = tokens.data(), task.rows = rows_, task.depth = x.columns, task.x_stride = tokens.stride;
    task.factors = stack.data(), task.adapter_stride = stack.adapter_stride(), task.factor_stride = stack.row_stride();
    task.depth_per_split = split.length;
    task.sums = static_cast<float*>(sums.values.mutable_data_ptr()), task.sums_stride = stride;
    if (few_)
      launch_(kernels_.shrink_few[few.candidate], {few.tiles, split.count, few.rank_blocks}, kThreads, few.shared_memory, task);
    else
      launch_((down ? kernels_.shrink_down : kernels_.shrink)[many.candidate], {many.tiles, split.count, many.rank_blocks}, kThreads,
              many.shared_memory, task);
    return sums;
  }

  // Y += S F_l^T, F_l as [columns, rank] or `down` as [rank, columns]; Y is contiguous. S itself goes to `sum` where it is given.
  void expand(const Tensor& y, int64_t columns, const Sums& sums, const Tensor& factors, bool down, float* sum, int64_t sum_stride) {
    const Stack stack(factors);
    const GroupedExpandPlan plan = plan_grouped_expand(rows_, columns, adapters_.count, kernels_.element_bytes, launch_.device());
    GroupedExpandTask task{};
    task.tiles = tiles(), task.order = order(), task.adapters = adapters_;
    task.y = y.mutable_data_ptr(), task.rows = rows_, task.columns = columns;
    task.sums = sums.data(), task.splits = sums.splits, task.sums_stride = sums.stride;
    task.sum = sum, task.sum_stride = sum_stride;
    task.factors = stack.data(), task.adapter_stride = stack.adapter_stride(), task.factor_stride = stack.row_stride();
    task.columns_per_block = plan.columns_per_block;
    task.y_aligned = columns % 8 == 0 && on_16_bytes(task.y);
    if (few_) {
      const FewExpandPlan few = plan_few_expand(rows_, columns, adapters_.rank, adapters_.count);
      task.columns_per_block = kFewColumns;
      launch_(kernels_.expand_few[few.candidate], {few.tiles, few.column_blocks}, kThreads, few.shared_memory, task);
      return;
    }
    launch_(down ? kernels_.expand_down : kernels_.expand, {plan.tiles, plan.column_blocks}, kThreads, plan.shared_memory, task);
  }

  // gradient_l = G^T S over the tokens of l, with the features or the ranks fastest.
  void gradient(const Rows& g, const float* s, int64_t s_stride, const Tensor& gradient, bool features_fastest) {
    const Rows lines = padded(g);
    const GroupedGradientPlan plan = gradient_plan(g.columns);
    GroupedGradientTask task{};
    task.parts = parts(), task.order = order(), task.adapters = adapters_;
    task.g = lines.data(), task.rows = rows_, task.features = g.columns, task.g_stride = lines.stride;
    task.s = s, task.s_stride = s_stride;
    task.rows_per_part = rows_per_part_;
    task.gradient = gradient.mutable_data_ptr();
    task.feature_stride = features_fastest ? 1 : adapters_.rank, task.rank_stride = features_fastest ? g.columns : 1;
    const int64_t slots = part_slots(rows_, adapters_.count, rows_per_part_), count = g.columns * adapters_.rank;
    Tensor partials;
    if (rows_per_part_ < rows_) {
      partials = empty_on(like_, ScalarType::Float, slots, count);
      task.partials = static_cast<float*>(partials.mutable_data_ptr());
    }
    launch_(kernels_.gradient[plan.candidate], {slots, plan.feature_blocks, plan.rank_blocks}, kThreads, plan.shared_memory, task);
    if (!task.partials) return;
    const GroupedFinishTask finish{ranges(), adapters_.count, count, task.partials, task.gradient};
    launch_(kernels_.finish, {adapters_.count, min_of(ceil_div(count, kGroupedFinishElements), kMaxGridY)}, kFinishThreads, 0, finish);
  }

  // The parts of the gradients of a call: both have those that the fewest features ask for.
  int64_t choose_parts(int64_t fewest_features) { return rows_per_part_ = gradient_plan(fewest_features).rows_per_part; }

  // The sum over the splits as a buffer [rows, stride].
  Tensor added(const Sums& sums) {
    if (sums.splits == 1) return sums.values;
    Tensor sum = empty_on(like_, ScalarType::Float, sums.rows, sums.stride);
    const int64_t count = sums.rows * sums.stride;
    FinishTask task{};
    task.results[0] = {sums.data(), sums.splits, count, sum.mutable_data_ptr()};
    launch_(kernels_float32().finish, {ceil_div(count, kFinishThreads)}, kFinishThreads, 0, task);
    return sum;
  }

 private:
  static constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max() - kListThreads;

  GroupedGradientPlan gradient_plan(int64_t features) const {
    return plan_grouped_gradient(rows_, features, adapters_.rank, adapters_.count, kernels_.element_bytes, launch_.device());
  }
  Tensor integers(int64_t count) const { return empty_on(like_, ScalarType::Int, count); }
  int32_t* order() const { return static_cast<int32_t*>(order_.mutable_data_ptr()); }
  Tile* tiles() const { return static_cast<Tile*>(tiles_.mutable_data_ptr()); }
  Part* parts() const { return static_cast<Part*>(parts_.mutable_data_ptr()); }
  Range* ranges() const { return static_cast<Range*>(ranges_.mutable_data_ptr()); }

  const GroupedKernels& kernels_;
  const Launcher launch_;
  const Tensor like_, scales_, ids_;
  Tensor ranks_, order_, tiles_, parts_, ranges_;
  Adapters adapters_;
  bool few_ = false;
  int64_t rows_, rows_per_part_ = 0;
};

struct Forward {
  Tensor y, s;
};

Forward forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b,
                const Tensor& scales, const Tensor& adapter_ids, const std::optional<Tensor>& ranks, bool saves) {
  const auto [features, out_features, adapters, rank] = check_grouped_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks);
  check_cuda_dtype("grouped_lora_linear", x);
  const Tensor y = base_product(x, weight, bias);
  const int64_t rows = rows_of(x);
  if (rows == 0 || (out_features == 0 && (rank == 0 || !saves))) return {y, zeros_on(x, ScalarType::Float, rows, rank)};

  GroupedCall call("grouped_lora_linear", x, lora_a, scales, adapter_ids, ranks);
  call.group_forward(out_features);
  Sums sums{empty_on(x, ScalarType::Float, rows, rank), 1, rows, 0};
  if (rank > 0) sums = call.project(Rows(x, features), lora_a, false);
  const bool whole = sums.splits == 1 && sums.stride == rank;
  if (out_features == 0) {
    Tensor s = call.added(sums);
    return {y, whole ? s : torch::stable::contiguous(torch::stable::narrow(s, 1, 0, rank))};
  }
  Tensor s = whole || !saves ? sums.values : empty_on(x, ScalarType::Float, rows, rank);
  call.expand(y, out_features, sums, lora_b, false, whole || !saves ? nullptr : static_cast<float*>(s.mutable_data_ptr()), rank);
  return {y, s};
}

std::tuple<Tensor, Tensor> grouped_lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       Tensor scales, Tensor adapter_ids, std::optional<Tensor> ranks) {
  const Forward result = forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks, true);
  return {result.y, result.s};
}

Tensor grouped_lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scales,
                           Tensor adapter_ids, std::optional<Tensor> ranks) {
  return forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks, false).y;
}

Gradients grouped_lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scales,
                                       Tensor adapter_ids, std::optional<Tensor> ranks, Tensor s, bool need_x, bool need_weight,
                                       bool need_bias, bool need_a, bool need_b) {
  const auto [features, out_features, adapters, rank] =
      check_grouped_backward(grad, x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s, need_weight || need_a);
  check_cuda_dtype("grouped_lora_linear_backward", grad);
  const Rows g(grad, out_features);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  const auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x, need_weight, need_bias);
  const int64_t rows = g.rows;
  const ScalarType type = lora_a.scalar_type();
  const bool has_a = need_a && adapters * rank * features > 0, has_b = need_b && adapters * rank * out_features > 0;
  const bool has_x = need_x && features > 0;
  Tensor grad_a, grad_b;
  // Of no tokens the gradients are zero.
  if (need_a) grad_a = rows == 0 ? zeros_on(lora_a, type, adapters, rank, features) : empty_on(lora_a, type, adapters, rank, features);
  if (need_b)
    grad_b = rows == 0 ? zeros_on(lora_b, type, adapters, out_features, rank) : empty_on(lora_b, type, adapters, out_features, rank);
  if (rows > 0 && (has_x || has_a || has_b)) {
    GroupedCall call("grouped_lora_linear_backward", grad, lora_a, scales, adapter_ids, ranks);
    const bool both = has_a && has_b;
    call.group(has_a || has_b ? call.choose_parts(both ? min_of(features, out_features) : has_a ? features : out_features) : 0);
    if (has_b) {
      const Rows saved = padded(Rows(s, rank));
      call.gradient(g, static_cast<const float*>(saved.data()), saved.stride, grad_b, false);
    }
    if (has_x || has_a) {
      Sums sums{empty_on(grad, ScalarType::Float, rows, rank), 1, rows, 0};
      if (rank > 0) sums = call.project(g, lora_b, true);
      Tensor grad_s = sums.values;
      if (has_x) {
        // The up-projection adds the splits for the gradient of lora_a as well.
        const bool adds = has_a && sums.splits > 1;
        if (adds) grad_s = empty_on(grad, ScalarType::Float, rows, sums.stride);
        call.expand(grad_x, features, sums, lora_a, true, adds ? static_cast<float*>(grad_s.mutable_data_ptr()) : nullptr, sums.stride);
      } else {
        grad_s = call.added(sums);
      }
      if (has_a) call.gradient(*tokens, grad_s.const_data_ptr<float>(), sums.stride, grad_a, true);
    }
  }
  return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CUDA, m) {
  m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
  m.impl("grouped_lora_linear_forward", TORCH_BOX(&grouped_lora_linear_forward));
  m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

}  // namespace peftops::lora
