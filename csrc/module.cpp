// The Python module `_C`: build facts, and the pure host functions that property tests call. No operator needs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "common/export.h"
#include "common/index.h"
#include "common/numeric.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "lora/gemm.h"
#include "lora/gemm_sm90.h"
#include "lora/grouped_plan.h"
#include "lora/multi_plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and host functions of peftops.";
  m.attr("version") = PEFTOPS_VERSION;
  m.attr("cpu_levels") = py::str(PEFTOPS_CPU_LEVELS).attr("split")(",");
  m.attr("cuda_targets") = py::str(PEFTOPS_CUDA_TARGETS).attr("split")();
  m.def("cpu_level", [] { return peftops_cpu_level(); }, "Instruction-set level of the CPU kernels in use.");
  m.def(
      "best_cpu_level", [] { return peftops::kCpuLevelNames[static_cast<int>(peftops::best_cpu_level())]; },
      "Highest instruction-set level that this machine runs.");

  m.def("ceil_div", &peftops::ceil_div);
  m.def("round_up", &peftops::round_up);
  m.def("offset_of", &peftops::offset_of);
  m.def("checked_product", [](int64_t a, int64_t b) { return peftops::checked_product(a, b, "product"); });
  m.def("checked_int32", [](int64_t value) { return peftops::checked_int32(value, "value"); });

  m.def("bfloat16_to_float", [](uint16_t bits) { return peftops::to_float(peftops::bfloat16{bits}); });
  m.def("float_to_bfloat16", [](float value) { return peftops::to_bfloat16(value).bits; });
  m.def("float16_to_float", [](uint16_t bits) { return peftops::to_float(peftops::float16{bits}); });
  m.def("float_to_float16", [](float value) { return peftops::to_float16(value).bits; });

  m.def("philox4x32", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const peftops::Philox4 out = peftops::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::array<uint32_t, 4>{out.word[0], out.word[1], out.word[2], out.word[3]};
  });
  m.def("dropout_threshold", &peftops::dropout_threshold);
  m.def("dropout_byte", &peftops::dropout_byte);

  namespace lora = peftops::lora;
  m.def("lora_gradient_panel", &lora::gradient_panel, "Width of the column panels of LoRA's gradient pass.");

  py::class_<peftops::Device>(m, "Device", "What a plan may know of a GPU.")
      .def(py::init([](int sm, int sm_count, int64_t shared_memory) { return peftops::Device{sm, sm_count, shared_memory}; }),
           py::arg("sm"), py::arg("sm_count"), py::arg("shared_memory"));
  m.attr("lora_tile") = lora::kGpuTile;
  m.attr("lora_shrink_ranks") = std::vector<int>(std::begin(lora::kShrinkRanks), std::end(lora::kShrinkRanks));
  m.attr("lora_gradient_ranks") = std::vector<int>(std::begin(lora::kGradientRanks), std::end(lora::kGradientRanks));
  py::class_<lora::Split>(m, "LoraSplit").def_readonly("count", &lora::Split::count).def_readonly("length", &lora::Split::length);
  py::class_<lora::ShrinkPlan>(m, "LoraShrinkPlan")
      .def_readonly("candidate", &lora::ShrinkPlan::candidate)
      .def_readonly("row_blocks", &lora::ShrinkPlan::row_blocks)
      .def_readonly("rank_blocks", &lora::ShrinkPlan::rank_blocks)
      .def_readonly("split", &lora::ShrinkPlan::split)
      .def_readonly("shared_memory", &lora::ShrinkPlan::shared_memory);
  py::class_<lora::ExpandPlan>(m, "LoraExpandPlan")
      .def_readonly("row_blocks", &lora::ExpandPlan::row_blocks)
      .def_readonly("column_blocks", &lora::ExpandPlan::column_blocks)
      .def_readonly("columns_per_block", &lora::ExpandPlan::columns_per_block)
      .def_readonly("shared_memory", &lora::ExpandPlan::shared_memory);
  py::class_<lora::GradientPlan>(m, "LoraGradientPlan")
      .def_readonly("candidate", &lora::GradientPlan::candidate)
      .def_readonly("feature_blocks", &lora::GradientPlan::feature_blocks)
      .def_readonly("rank_blocks", &lora::GradientPlan::rank_blocks)
      .def_readonly("split", &lora::GradientPlan::split)
      .def_readonly("shared_memory", &lora::GradientPlan::shared_memory);
  m.def("lora_refuse_shrink", &lora::refuse_shrink, "Why a device cannot run a candidate; None if it can.", py::arg("ranks"),
        py::arg("down"), py::arg("element_bytes"), py::arg("device"), py::arg("terms") = 1);
  m.def("lora_plan_shrink", &lora::plan_shrink, py::arg("rows"), py::arg("depth"), py::arg("rank"), py::arg("down"),
        py::arg("element_bytes"), py::arg("device"), py::arg("terms") = 1);
  m.def("lora_plan_expand", &lora::plan_expand, py::arg("rows"), py::arg("columns"), py::arg("element_bytes"), py::arg("device"),
        py::arg("terms") = 1);
  m.def("lora_plan_gradient", &lora::plan_gradient, py::arg("rows"), py::arg("features"), py::arg("rank"), py::arg("element_bytes"),
        py::arg("device"), py::arg("terms") = 1);

  m.attr("lora_gemm_tile") = lora::kGemmTile;
  m.attr("lora_gemm_depth") = lora::kGemmDepth;
  m.attr("lora_gemm_memory") = lora::kGemmMemory;
  m.attr("lora_linears") = std::vector<std::string>(std::begin(lora::kLinearNames), std::end(lora::kLinearNames));
  m.def("lora_refuse_gemm_sm80", &lora::refuse_gemm_sm80, "Why a device cannot make a result of this size; None if it can.");
  m.def("lora_plan_gemm_sm80", [](int64_t rows, int64_t columns) {
    const lora::GemmPlan plan = lora::plan_gemm_sm80(rows, columns);
    return std::pair{plan.row_blocks, plan.column_blocks};
  });
  m.def("lora_gemm_block", [](uint32_t index, uint32_t row_blocks, uint32_t column_blocks) {
    const lora::GemmBlock block = lora::gemm_block(index, row_blocks, column_blocks);
    return std::pair{block.row, block.column};
  });
  m.def(
      "lora_segment_tiles",
      [](const std::vector<std::pair<int64_t, bool>>& segments, int64_t tile, bool off) {
        lora::GemmTask task{};
        for (const auto& [depth, adapter] : segments)
          task.segments[task.count].depth = depth, task.segments[task.count++].adapter = adapter;
        std::vector<std::pair<int, int64_t>> found;
        for (lora::SegmentTile at = lora::first_tile(task, 0, off); at.segment < task.count; at = lora::next_tile(task, at, tile, off))
          found.emplace_back(at.segment, at.depth);
        return found;
      },
      "The tiles of a GEMM's contraction: (segment, depth) of each. segments: (depth, adapter).");
  m.def("lora_plan_linear", [](const std::vector<std::optional<std::string>>& refused, bool whole) {
    lora::LinearRefusals reasons{};
    for (int i = 0; i < lora::kLinears; ++i)
      reasons.of[i] = refused.at(static_cast<size_t>(i)) ? refused[static_cast<size_t>(i)]->c_str() : nullptr;
    return lora::kLinearNames[static_cast<int>(lora::plan_linear(reasons, whole))];
  });

  m.attr("grouped_few_tokens") = lora::kFewTokens;
  m.def("grouped_tile_slots", &lora::tile_slots);
  m.def("grouped_part_slots", &lora::part_slots);
  // Candidate, blocks along the grid's axes, lengths of a block's share, shared memory.
  m.def("grouped_plan_shrink", [](int64_t rows, int64_t depth, int64_t rank, int64_t adapters, bool down, int bytes, peftops::Device on) {
    const auto plan = lora::plan_grouped_shrink(rows, depth, rank, adapters, down, bytes, on);
    return std::tuple(lora::kShrinkRanks[plan.candidate], plan.tiles, plan.split.count, plan.rank_blocks, plan.split.length,
                      plan.shared_memory);
  });
  m.def("grouped_plan_expand", [](int64_t rows, int64_t columns, int64_t adapters, int bytes, peftops::Device on) {
    const auto plan = lora::plan_grouped_expand(rows, columns, adapters, bytes, on);
    return std::tuple(plan.tiles, plan.column_blocks, plan.columns_per_block, plan.shared_memory);
  });
  m.def("grouped_plan_gradient", [](int64_t rows, int64_t features, int64_t rank, int64_t adapters, int bytes, peftops::Device on) {
    const auto plan = lora::plan_grouped_gradient(rows, features, rank, adapters, bytes, on);
    return std::tuple(lora::kGradientRanks[plan.candidate], plan.parts, plan.feature_blocks, plan.rank_blocks, plan.rows_per_part,
                      plan.shared_memory);
  });
  m.def("grouped_refuse_few", &lora::refuse_few);
  m.def("grouped_plan_few_shrink", [](int64_t rows, int64_t depth, int64_t rank, int64_t adapters, peftops::Device on) {
    const auto plan = lora::plan_few_shrink(rows, depth, rank, adapters, on);
    return std::tuple(lora::kFewRanks[plan.candidate], plan.tiles, plan.split.count, plan.rank_blocks, plan.split.length,
                      plan.shared_memory);
  });
  m.def("grouped_plan_few_expand", [](int64_t rows, int64_t columns, int64_t rank, int64_t adapters) {
    const auto plan = lora::plan_few_expand(rows, columns, rank, adapters);
    return std::tuple(lora::kFewRanks[plan.candidate], plan.tiles, plan.column_blocks, plan.shared_memory);
  });
  m.def("multi_sharing", &lora::sharing);
  m.def("multi_refuse", &lora::refuse_multi);
  m.def("multi_refuse_expand", &lora::refuse_multi_expand);
  m.def("multi_expand_memory", &lora::multi_expand_memory);
  m.def("multi_plan_shrink", [](int64_t rows, int64_t depth, int64_t ranks, peftops::Device on) {
    const auto plan = lora::plan_multi_shrink(rows, depth, ranks, on);
    return std::tuple(lora::kShrinkRanks[plan.candidate], plan.row_blocks, plan.split.count, plan.rank_blocks, plan.split.length,
                      plan.shared_memory);
  });

  py::class_<lora::DepthTiles>(m, "LoraDepthTiles")
      .def_readonly("count", &lora::DepthTiles::count)
      .def_readonly("total", &lora::DepthTiles::total)
      .def_property_readonly("tiles", [](const lora::DepthTiles& t) { return std::vector<int>(t.tiles, t.tiles + t.count); })
      .def_property_readonly("last_blocks",
                             [](const lora::DepthTiles& t) { return std::vector<int>(t.last_blocks, t.last_blocks + t.count); });
  py::class_<lora::GemmSm90Plan>(m, "LoraGemmSm90Plan")
      .def_readonly("candidate", &lora::GemmSm90Plan::candidate)
      .def_readonly("row_tiles", &lora::GemmSm90Plan::row_tiles)
      .def_readonly("column_tiles", &lora::GemmSm90Plan::column_tiles)
      .def_readonly("swizzle", &lora::GemmSm90Plan::swizzle);
  py::class_<lora::Sm90Tile>(m, "LoraSm90Tile")
      .def_readonly("rows", &lora::Sm90Tile::rows)
      .def_readonly("columns", &lora::Sm90Tile::columns)
      .def_readonly("shared_memory", &lora::Sm90Tile::shared_memory)
      .def_readonly("cost", &lora::Sm90Tile::cost);
  py::class_<lora::Segment>(m, "LoraSegment")
      .def(py::init([](uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, bool down, int64_t depth, bool adapter) {
             return lora::Segment{
                 reinterpret_cast<const void*>(x), x_stride, reinterpret_cast<const void*>(w), w_stride, down, depth, adapter};
           }),
           py::arg("x") = 0, py::arg("x_stride"), py::arg("w") = 0, py::arg("w_stride"), py::arg("down") = false, py::arg("depth"),
           py::arg("adapter") = false);
  py::class_<lora::GemmTask>(m, "LoraGemmTask")
      .def(py::init([](const std::vector<lora::Segment>& segments, int64_t rows, int64_t columns, uintptr_t d, int64_t d_stride,
                       uintptr_t mask) {
             lora::GemmTask task{};
             task.count = static_cast<int>(segments.size());
             std::copy_n(segments.begin(), std::min<size_t>(segments.size(), lora::kMaxSegments), task.segments);
             task.rows = rows, task.columns = columns, task.d = reinterpret_cast<void*>(d), task.d_stride = d_stride;
             task.mask.data = reinterpret_cast<uint8_t*>(mask);
             return task;
           }),
           py::arg("segments"), py::arg("rows"), py::arg("columns"), py::arg("d") = 0, py::arg("d_stride"), py::arg("mask") = 0);
  m.attr("lora_sm90_tiles") = std::vector<lora::Sm90Tile>(std::begin(lora::kSm90Tiles), std::end(lora::kSm90Tiles));
  m.attr("lora_depth_tile") = lora::kDepthTile;
  m.attr("lora_depth_block") = lora::kDepthBlock;
  m.def("lora_depth_tiles", &lora::depth_tiles);
  m.def("lora_refuse_gemm_sm90", &lora::refuse_gemm_sm90, "Why a device cannot run a task with elements of so many bytes; None if it can.");
  m.def("lora_plan_gemm_sm90", py::overload_cast<int64_t, int64_t, const peftops::Device&>(&lora::plan_gemm_sm90));
  m.def("lora_plan_gemm_sm90", py::overload_cast<int, int64_t, int64_t>(&lora::plan_gemm_sm90), "The same for a candidate.");
}
