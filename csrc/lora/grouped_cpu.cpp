// LoRA with an adapter for each token on the CPU. Tokens are ordered by adapter, and the passes of cpu_kernels.cpp go over each
// adapter's rows through an index; adapters without tokens cost nothing.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu_call.h"
#include "grouped.h"

namespace peftops::lora {
namespace {

// The tokens of one adapter: order[begin, begin + rows).
struct Group {
  int64_t adapter, begin, rows, rank;
  double scale;
};

// Tokens by adapter, in the order of the adapters; within one, in their own. Tokens without an adapter, and those whose adapter has a
// scale or a rank of 0, are in no group.
struct Grouping {
  std::vector<int64_t> order;  // with kRowBlock entries behind, as the kernels want an index
  std::vector<Group> groups;
  int64_t rows = 0;
};

std::vector<int64_t> integers_of(const Tensor& t) {
  const Tensor dense = as_contiguous(t);
  std::vector<int64_t> values(static_cast<size_t>(dense.numel()));
  if (dense.scalar_type() == ScalarType::Int)
    std::copy_n(dense.const_data_ptr<int32_t>(), values.size(), values.begin());
  else
    std::copy_n(dense.const_data_ptr<int64_t>(), values.size(), values.begin());
  return values;
}

// "[1, 3]": where the flat index `at` lies in t.
std::string place_in(const Tensor& t, int64_t at) {
  std::string text;
  for (int64_t d = t.dim() - 1; d >= 0; at /= t.size(d), --d) text = std::to_string(at % t.size(d)) + (text.empty() ? "" : ", ") + text;
  return "[" + text + "]";
}

std::vector<int64_t> checked_ids(const char* op, const Tensor& adapter_ids, int64_t adapters) {
  std::vector<int64_t> ids = integers_of(adapter_ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto place = [&] { return place_in(adapter_ids, static_cast<int64_t>(i)); };
    PEFTOPS_CHECK(ids[i] >= -1, op, ": adapter_ids", place(), " is ", ids[i], ", but must be -1 (none) or more");
    PEFTOPS_CHECK(ids[i] < adapters, op, ": adapter_ids", place(), " is ", ids[i], ", but lora_a has ", adapters, " adapters");
  }
  return ids;
}

std::vector<int64_t> checked_ranks(const char* op, const std::optional<Tensor>& ranks, const GroupedProblem& problem) {
  if (!ranks) return std::vector<int64_t>(static_cast<size_t>(problem.adapters), problem.rank);
  std::vector<int64_t> values = integers_of(*ranks);
  for (size_t l = 0; l < values.size(); ++l)
    PEFTOPS_CHECK(values[l] >= 0 && values[l] <= problem.rank, op, ": ranks[", l, "] is ", values[l], ", but must be in [0, ", problem.rank,
                  "]");
  return values;
}

Grouping grouping_of(const char* op, const GroupedProblem& problem, const Tensor& scales, const Tensor& adapter_ids,
                     const std::optional<Tensor>& ranks) {
  const std::vector<int64_t> ids = checked_ids(op, adapter_ids, problem.adapters), rank = checked_ranks(op, ranks, problem);
  std::vector<int64_t> next(rank.size());  // where the adapter's next token goes
  for (const int64_t id : ids)
    if (id >= 0) ++next[static_cast<size_t>(id)];
  const Tensor dense = as_contiguous(scales);
  const float* scale = dense.const_data_ptr<float>();
  Grouping grouping;
  for (size_t l = 0; l < next.size(); ++l) {
    const int64_t rows = next[l];
    next[l] = -1;
    if (rows == 0 || rank[l] == 0 || scale[l] == 0) continue;
    grouping.groups.push_back({static_cast<int64_t>(l), grouping.rows, rows, rank[l], scale[l]});
    next[l] = grouping.rows;
    grouping.rows += rows;
  }
  grouping.order.resize(static_cast<size_t>(grouping.rows + kRowBlock));
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= 0 && next[static_cast<size_t>(ids[i])] >= 0)
      grouping.order[static_cast<size_t>(next[static_cast<size_t>(ids[i])]++)] = static_cast<int64_t>(i);
  return grouping;
}

const void* advanced(const Tensor& t, int64_t elements) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

void* advanced_mutable(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.mutable_data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

// One adapter's lora_a as [features, rank] and its lora_b as [out_features, rank].
Matrix a_of(const Tensor& lora_a, const Group& group) {
  return {advanced(lora_a, group.adapter * lora_a.stride(0)), lora_a.size(2), group.rank, lora_a.stride(2), lora_a.stride(1)};
}
Matrix b_of(const Tensor& lora_b, const Group& group) {
  return {advanced(lora_b, group.adapter * lora_b.stride(0)), lora_b.size(1), group.rank, lora_b.stride(1), lora_b.stride(2)};
}

// Runs body(part, begin, end) over the blocks of all parts as one range: many small parts share the threads as one large one does.
template <class Body>
void spread_parts(const std::vector<int64_t>& blocks, int64_t grain, const Body& body) {
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const int64_t count : blocks) ends.push_back(total += count);
  spread(total, grain, [&](int64_t begin, int64_t end) {
    for (size_t part = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin()); begin < end; ++part) {
      const int64_t first = ends[part] - blocks[part], stop = min_of(end, ends[part]);
      if (begin < stop) body(part, begin - first, stop - first);
      begin = stop;
    }
  });
}

// The passes of one call over all groups, of which there is at least one. Sums are [rows of all groups, rank] accumulators; a group's lie
// dense, [rows, its rank], from its first row on.
class GroupedCall {
 public:
  GroupedCall(const Tensor& x, const Tensor& lora_a, const GroupedProblem& problem, const Grouping& grouping)
      : call_(x, lora_a), kernels_(call_.kernels), like_(x), rank_(problem.rank), grouping_(grouping) {}

  // S = scale x A^T.
  Tensor project(const Rows& x, const Tensor& lora_a) {
    const std::vector<Packed> a = pack([&](const Group& group) { return a_of(lora_a, group); });
    const Tensor s = sums();
    std::vector<ProjectPart> parts(a.size());
    std::vector<ProjectTask> tasks;
    for (size_t g = 0; g < a.size(); ++g) {
      const Group& group = grouping_.groups[g];
      parts[g] = {0, group.rank, group.scale, 0, Mask{}, sums_of(s, group)};
      tasks.push_back({x.data(), group.rows, x.columns, x.stride, a[g], &parts[g], 1, group.rank, false, 0, index_of(group)});
    }
    spread_parts(row_blocks(1), 1, [&](size_t part, int64_t begin, int64_t end) { kernels_.project(tasks[part], begin, end); });
    return s;
  }

  // Y += S F with each group's F as [rank, features]; Y contiguous.
  template <class Factor>
  void expand(const Tensor& y, int64_t features, const Tensor& s, const Factor& factor) {
    const std::vector<Packed> b = pack(factor);
    const std::vector<Packed> elements = elements_of(s);
    std::vector<ExpandPart> parts(b.size());
    std::vector<ExpandTask> tasks;
    for (size_t g = 0; g < b.size(); ++g) {
      const Group& group = grouping_.groups[g];
      parts[g] = {elements[g].data, elements[g].stride, ceil_div(group.rank, kernels_.step), b[g], Mask{}};
      tasks.push_back({y.mutable_data_ptr(), group.rows, features, features, &parts[g], 1, index_of(group)});
    }
    spread_parts(row_blocks(ceil_div(features, kExpandColumns)), 1,
                 [&](size_t part, int64_t begin, int64_t end) { kernels_.expand(tasks[part], begin, end); });
  }

  // gradient[adapter] = G^T S into a [features, rank] view of each adapter's part, and, where F is given as [features, rank],
  // sums scale G F in the same pass.
  template <class Factor>
  Tensor gradient(const Rows& g, const Tensor* s, const Tensor* gradient, int64_t feature_stride, int64_t rank_stride,
                  const Factor* factor) {
    const int64_t panel = gradient_panel(g.columns), panels = ceil_div(g.columns, panel);
    std::vector<GradientPart> parts(grouping_.groups.size());
    std::vector<GradientTask> tasks;
    for (const Group& group : grouping_.groups) {
      GradientTask task{};
      task.g = g.data(), task.rows = group.rows, task.features = g.columns, task.g_stride = g.stride;
      task.width = call_.padded(group.rank), task.panel = panel, task.index = index_of(group);
      if (gradient) {
        GradientPart& part = parts[tasks.size()];
        part = {0, group.rank, Mask{}, advanced_mutable(*gradient, group.adapter * gradient->stride(0)), feature_stride, rank_stride};
        task.parts = &part, task.count = 1;
      }
      tasks.push_back(task);
    }
    if (gradient) {
      const std::vector<Packed> packed = pack_sums(*s);
      for (size_t part = 0; part < tasks.size(); ++part) tasks[part].s = packed[part];
    }
    Tensor partials;
    if (factor) {
      const std::vector<Packed> packed = pack(*factor);
      partials = partials_of(panels);
      char* at = static_cast<char*>(partials.mutable_data_ptr());
      for (size_t part = 0; part < tasks.size(); ++part) {
        tasks[part].b = packed[part], tasks[part].partials = at;
        at += panels * panel_elements(grouping_.groups[part]) * static_cast<int64_t>(partials.element_size());
      }
    }
    spread_parts(std::vector<int64_t>(tasks.size(), panels), 1,
                 [&](size_t part, int64_t begin, int64_t end) { kernels_.gradient(tasks[part], begin, end); });
    return factor ? reduced(tasks, panels) : Tensor();
  }

  // Sums from the order of the tokens, [M, rank], and to it.
  Tensor gathered(const Tensor& s) const {
    const Tensor dense = as_contiguous(s), found = sums();
    each_row([&](int64_t grouped, int64_t token, size_t bytes) {
      std::memcpy(advanced_mutable(found, grouped), advanced(dense, token), bytes);
    });
    return found;
  }
  void scatter(const Tensor& s, const Tensor& out) const {
    each_row([&](int64_t grouped, int64_t token, size_t bytes) { std::memcpy(advanced_mutable(out, token), advanced(s, grouped), bytes); });
  }

 private:
  Tensor sums() const { return empty_on(like_, accumulator_of(like_), grouping_.rows, rank_); }
  void* sums_of(const Tensor& s, const Group& group) const { return advanced_mutable(s, group.begin * rank_); }
  const int64_t* index_of(const Group& group) const { return grouping_.order.data() + group.begin; }

  // copy(place among the groups' sums, place in the order of the tokens, bytes) of each row.
  template <class Copy>
  void each_row(const Copy& copy) const {
    const size_t size = like_.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float);
    for (const Group& group : grouping_.groups)
      for (int64_t i = 0; i < group.rows; ++i)
        copy(group.begin * rank_ + i * group.rank, index_of(group)[i] * rank_, static_cast<size_t>(group.rank) * size);
  }

  // Blocks of kRowBlock rows in each group, times `columns`.
  std::vector<int64_t> row_blocks(int64_t columns) const {
    std::vector<int64_t> blocks;
    for (const Group& group : grouping_.groups) blocks.push_back(ceil_div(group.rows, kRowBlock) * columns);
    return blocks;
  }

  // Scratch for all groups at once, shape(group's number) = (rows, stride) in elements each.
  template <class Shape>
  std::vector<Packed> scratch(const Shape& shape) {
    const size_t count = grouping_.groups.size();
    int64_t elements = 0;
    for (size_t g = 0; g < count; ++g) elements += shape(g).first * shape(g).second;
    std::vector<Packed> parts;
    char* at = static_cast<char*>(call_.scratch(elements, 1).data);
    for (size_t g = 0; g < count; ++g) {
      const auto [rows, stride] = shape(g);
      parts.push_back({at, stride});
      at += rows * stride * kernels_.element;
    }
    return parts;
  }

  // Each group's factor, as factor(group) has it.
  template <class Factor>
  std::vector<Packed> pack(const Factor& factor) {
    std::vector<Matrix> matrices;
    std::vector<int64_t> rows;
    for (const Group& group : grouping_.groups) {
      matrices.push_back(factor(group));
      rows.push_back(ceil_div(matrices.back().contraction, kernels_.step));
    }
    const std::vector<Packed> packed = scratch([&](size_t g) { return std::pair(rows[g], call_.padded(matrices[g].lanes)); });
    spread_parts(rows, ceil_div(1 << 16, matrices.front().lanes + 1),
                 [&](size_t part, int64_t begin, int64_t end) { kernels_.pack_factor(matrices[part], packed[part], begin, end); });
    return packed;
  }

  // Sums as the gradient wants them, rows by ranks.
  std::vector<Packed> pack_sums(const Tensor& s) {
    const std::vector<Group>& groups = grouping_.groups;
    const std::vector<Packed> packed =
        scratch([&](size_t g) { return std::pair(ceil_div(groups[g].rows, kernels_.step), call_.padded(groups[g].rank)); });
    for (size_t g = 0; g < packed.size(); ++g) {
      const Group& group = groups[g];
      const Matrix matrix{sums_of(s, group), group.rows, group.rank, group.rank, 1};
      kernels_.pack_sums(matrix, packed[g], 0, ceil_div(group.rows, kernels_.step));
    }
    return packed;
  }

  // Sums as the up-projection wants them, elements along the rank.
  std::vector<Packed> elements_of(const Tensor& s) {
    std::vector<Packed> elements;
    if (kernels_.step == 1) {
      for (const Group& group : grouping_.groups) elements.push_back({sums_of(s, group), group.rank});
      return elements;
    }
    elements = scratch([&](size_t g) {
      const Group& group = grouping_.groups[g];
      return std::pair(group.rows, ceil_div(group.rank, kernels_.step));
    });
    for (size_t g = 0; g < elements.size(); ++g) {
      const Group& group = grouping_.groups[g];
      kernels_.pack_ranks(sums_of(s, group), group.rank, group.rows, group.rank, elements[g]);
    }
    return elements;
  }

  // Accumulators of one group in one column panel.
  int64_t panel_elements(const Group& group) const { return round_up(group.rows, kRowBlock) * call_.padded(group.rank); }

  Tensor partials_of(int64_t panels) const {
    int64_t elements = 0;
    for (const Group& group : grouping_.groups) elements += panel_elements(group);
    return empty_on(like_, accumulator_of(like_), checked_product(elements, panels, "partial sums"));
  }

  // scale times the panels' partial sums, added in order.
  Tensor reduced(const std::vector<GradientTask>& tasks, int64_t panels) const {
    const Tensor found = sums();
    std::vector<int64_t> rows;
    for (const Group& group : grouping_.groups) rows.push_back(group.rows);
    spread_parts(rows, 64, [&](size_t part, int64_t begin, int64_t end) {
      const Group& group = grouping_.groups[part];
      kernels_.reduce(tasks[part].partials, panels, panel_elements(group), call_.padded(group.rank), group.rank, group.scale,
                      sums_of(found, group), group.rank, begin, end);
    });
    return found;
  }

  Call call_;
  const Kernels& kernels_;
  Tensor like_;
  int64_t rank_;
  const Grouping& grouping_;
};

// Y by the vendor's GEMM and the adapters' passes; beside it S in the order of the tokens where `s` is given, zeros [M, r].
Tensor by_passes(const GroupedProblem& problem, const Grouping& grouping, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b, const Tensor* s) {
  const Tensor y = base_product(x, weight, bias);
  if (grouping.groups.empty()) return y;
  GroupedCall call(x, lora_a, problem, grouping);
  const Tensor sums = call.project(Rows(x, problem.features), lora_a);
  if (s) call.scatter(sums, *s);
  call.expand(y, problem.out_features, sums, [&](const Group& group) { return transposed(b_of(lora_b, group)); });
  return y;
}

// An adapter's matrices with unit stride along their last dimension.
Tensor with_unit_rows(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

// Runs of consecutive tokens that share an adapter.
std::vector<std::pair<int64_t, const Group*>> runs_of(const Grouping& grouping, int64_t rows) {
  std::vector<const Group*> group_of(static_cast<size_t>(rows));
  for (const Group& group : grouping.groups)
    for (int64_t i = group.begin; i < group.begin + group.rows; ++i)
      group_of[static_cast<size_t>(grouping.order[static_cast<size_t>(i)])] = &group;
  std::vector<std::pair<int64_t, const Group*>> runs;
  for (int64_t i = 0; i < rows; ++i)
    if (runs.empty() || runs.back().second != group_of[static_cast<size_t>(i)]) runs.emplace_back(i, group_of[static_cast<size_t>(i)]);
  return runs;
}

// Few rows: one kernel reads the weight once, with each token's own S B^T as a second piece of the same sum.
Tensor by_few_rows(const GroupedProblem& problem, const Grouping& grouping, const Tensor& x, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b) {
  const auto& [features, out_features, adapters, rank] = problem;
  const Kernels& kernels = level_kernels().find(storage_of(x), storage_of(lora_a));
  const int64_t rows = rows_of(x);
  const Tensor tokens = as_contiguous(x), a = with_unit_rows(lora_a), b = with_unit_rows(lora_b);
  const std::array<int64_t, 2> shape{rows, features};
  Tensor matrix = torch::stable::view(tokens, Sizes(shape.data(), shape.size()));
  const Tensor s = empty_on(x, accumulator_of(x), rows, rank);

  std::vector<SmallRun> runs;
  std::vector<SmallTask> down;
  std::vector<Tensor> pieces;
  std::vector<int64_t> blocks;
  const auto starts = runs_of(grouping, rows);
  for (size_t k = 0; k < starts.size(); ++k) {
    const auto [first, group] = starts[k];
    if (!group) continue;
    const int64_t count = (k + 1 < starts.size() ? starts[k + 1].first : rows) - first;
    pieces.push_back(by_piece(torch::stable::narrow(matrix, 0, first, count), count, features));
    SmallTask task{};
    task.x = pieces.back().const_data_ptr(), task.weight = advanced(a, group->adapter * a.stride(0));
    task.rows = count, task.features = features, task.out_features = group->rank, task.weight_stride = a.stride(1);
    task.factor = group->scale;
    task.y = advanced_mutable(s, first * rank);
    down.push_back(task);
    blocks.push_back(ceil_div(group->rank, kSmallBlock));
    runs.push_back({first, count, task.y, advanced(b, group->adapter * b.stride(0)), group->rank});
  }
  spread_parts(blocks, small_grain(1, features),
               [&](size_t part, int64_t begin, int64_t end) { kernels.small_project(down[part], begin, end); });

  const Tensor all = by_piece(tokens, rows, features), dense_bias = bias ? as_contiguous(*bias) : Tensor();
  Tensor y = empty_on(x, x.scalar_type(), rows, out_features);
  SmallTask task{};
  task.x = all.const_data_ptr(), task.weight = weight.const_data_ptr();
  task.rows = rows, task.features = features, task.out_features = out_features, task.weight_stride = weight.stride(0);
  task.factor = 1.0;
  if (bias) task.bias = dense_bias.const_data_ptr();
  task.b_stride = b.stride(1), task.runs = runs.data(), task.run_count = static_cast<int64_t>(runs.size());
  task.y = y.mutable_data_ptr();
  spread(ceil_div(out_features, kSmallBlock), small_grain(rows, features + rank),
         [&](int64_t begin, int64_t end) { kernels.small_linear(task, begin, end); });
  return reshaped_like(y, x, out_features);
}

// The result alone.
Tensor grouped_lora_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b, Tensor scales,
                           Tensor adapter_ids, std::optional<Tensor> ranks) {
  const GroupedProblem problem = check_grouped_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks);
  const Grouping grouping = grouping_of("grouped_lora_linear", problem, scales, adapter_ids, ranks);
  const bool few = rows_of(x) <= kSmallRows && !grouping.groups.empty() && (problem.features <= 1 || weight.stride(1) == 1);
  return few ? by_few_rows(problem, grouping, x, weight, bias, lora_a, lora_b)
             : by_passes(problem, grouping, x, weight, bias, lora_a, lora_b, nullptr);
}

std::tuple<Tensor, Tensor> grouped_lora_linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor lora_a, Tensor lora_b,
                                                       Tensor scales, Tensor adapter_ids, std::optional<Tensor> ranks) {
  const GroupedProblem problem = check_grouped_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks);
  const Grouping grouping = grouping_of("grouped_lora_linear", problem, scales, adapter_ids, ranks);
  const Tensor s = zeros_on(x, accumulator_of(x), rows_of(x), problem.rank);
  const Tensor y = by_passes(problem, grouping, x, weight, bias, lora_a, lora_b, &s);
  return {y, s};
}

// Room for a gradient of `like`: zeros where some adapter or rank gets none.
Tensor room_for(const Tensor& like, const GroupedProblem& problem, const Grouping& grouping) {
  bool covered = static_cast<int64_t>(grouping.groups.size()) == problem.adapters;
  for (const Group& group : grouping.groups) covered = covered && group.rank == problem.rank;
  return covered ? empty_on(like, like.scalar_type(), like.size(0), like.size(1), like.size(2))
                 : zeros_on(like, like.scalar_type(), like.size(0), like.size(1), like.size(2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_lora_linear_backward(Tensor grad, std::optional<Tensor> x, Tensor weight,
                                                                                Tensor lora_a, Tensor lora_b, Tensor scales,
                                                                                Tensor adapter_ids, std::optional<Tensor> ranks, Tensor s,
                                                                                bool need_x, bool need_weight, bool need_bias, bool need_a,
                                                                                bool need_b) {
  const GroupedProblem problem =
      check_grouped_backward(grad, x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s, need_weight || need_a);
  const Grouping grouping = grouping_of("grouped_lora_linear_backward", problem, scales, adapter_ids, ranks);
  const auto& [features, out_features, adapters, rank] = problem;
  const Rows g(grad, out_features);
  const std::optional<Rows> tokens = x ? std::optional<Rows>(std::in_place, *x, features) : std::nullopt;
  auto [grad_x, grad_weight, grad_bias] = base_gradients(g, weight, tokens, need_x, need_weight, need_bias);
  Tensor grad_a, grad_b;
  if (need_a) grad_a = room_for(lora_a, problem, grouping);
  if (need_b) grad_b = room_for(lora_b, problem, grouping);
  if (!grouping.groups.empty() && (need_x || need_a || need_b)) {
    GroupedCall call(grad, lora_a, problem, grouping);
    const auto b = [&](const Group& group) { return b_of(lora_b, group); };
    const auto a = [&](const Group& group) { return transposed(a_of(lora_a, group)); };
    const Tensor sums = need_b ? call.gathered(s) : Tensor();
    const Tensor grad_s = call.gradient(g, need_b ? &sums : nullptr, need_b ? &grad_b : nullptr, rank, 1, need_x || need_a ? &b : nullptr);
    if (need_a) call.gradient(*tokens, &grad_s, &grad_a, 1, features, static_cast<decltype(&b)>(nullptr));
    if (need_x) call.expand(grad_x, features, grad_s, a);
  }
  return backward_results(grad, features, {grad_x, grad_weight, grad_bias, grad_a, grad_b});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftops, CPU, m) {
  m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
  m.impl("grouped_lora_linear_forward", TORCH_BOX(&grouped_lora_linear_forward));
  m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

}  // namespace peftops::lora
