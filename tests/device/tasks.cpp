// The sizes in the struct that a recorded launch handed to its kernel, as JSON.
#include <sstream>
#include <string>

#include "../../csrc/lora/gemm.h"
#include "../../csrc/lora/grouped_kernels.h"
#include "../../csrc/lora/multi_kernels.h"

namespace {

using namespace peftops::lora;

template <class Task>
const Task& as(const void* bytes) {
  return *static_cast<const Task*>(bytes);
}

std::string json(std::initializer_list<std::pair<const char*, int64_t>> fields) {
  std::ostringstream text;
  for (const auto& [name, value] : fields) text << (text.tellp() ? ", \"" : "{\"") << name << "\": " << value;
  return text.str() + "}";
}

std::string grouped_fields(const std::string& task, const void* bytes) {
  if (task == "GroupTask") {
    const auto& t = as<GroupTask>(bytes);
    return json({{"rows", t.rows}, {"adapters", t.adapters}, {"rows_per_thread", t.rows_per_thread}});
  }
  if (task == "GroupFewTask") {
    const auto& t = as<GroupFewTask>(bytes);
    return json({{"rows", t.rows}, {"adapters", t.adapters}, {"tile_slots", t.tile_slots}, {"tile_rows", t.tile_rows}});
  }
  if (task == "ListTask") {
    const auto& t = as<ListTask>(bytes);
    return json({{"adapters", t.adapters},
                 {"groups_per_thread", t.groups_per_thread},
                 {"tile_slots", t.tile_slots},
                 {"part_slots", t.part_slots},
                 {"rows_per_part", t.rows_per_part}});
  }
  if (task == "GroupedShrinkTask") {
    const auto& t = as<GroupedShrinkTask>(bytes);
    return json({{"rows", t.rows},
                 {"adapters", t.adapters.count},
                 {"rank", t.adapters.rank},
                 {"depth", t.depth},
                 {"depth_per_split", t.depth_per_split}});
  }
  if (task == "GroupedExpandTask") {
    const auto& t = as<GroupedExpandTask>(bytes);
    return json({{"rows", t.rows},
                 {"adapters", t.adapters.count},
                 {"rank", t.adapters.rank},
                 {"columns", t.columns},
                 {"columns_per_block", t.columns_per_block}});
  }
  if (task == "GroupedGradientTask") {
    const auto& t = as<GroupedGradientTask>(bytes);
    return json({{"rows", t.rows},
                 {"adapters", t.adapters.count},
                 {"rank", t.adapters.rank},
                 {"features", t.features},
                 {"rows_per_part", t.rows_per_part}});
  }
  if (task == "GroupedFinishTask") {
    const auto& t = as<GroupedFinishTask>(bytes);
    return json({{"adapters", t.adapters}, {"count", t.count}});
  }
  return "";
}

std::string multi_fields(const std::string& task, const void* bytes) {
  if (task == "MultiShrinkTask") {
    const auto& t = as<MultiShrinkTask>(bytes);
    int64_t rank = 0;
    for (const auto& projection : t.projections) rank = at_least(projection.rank, rank);
    return json({{"rows", t.rows}, {"depth", t.depth}, {"rank", rank}, {"depth_per_split", t.depth_per_split}});
  }
  if (task == "MultiExpandTask") {
    const auto& t = as<MultiExpandTask>(bytes);
    return json({{"rows", t.rows}, {"columns", t.columns}, {"count", t.count}, {"columns_per_block", t.columns_per_block}});
  }
  return "";
}

std::string fields(const std::string& task, const void* bytes) {
  if (task == "ShrinkTask") {
    const auto& t = as<ShrinkTask>(bytes);
    return json({{"rows", t.rows}, {"depth", t.depth}, {"rank", t.rank}, {"depth_per_split", t.depth_per_split}});
  }
  if (task == "ExpandTask") {
    const auto& t = as<ExpandTask>(bytes);
    return json({{"rows", t.rows}, {"columns", t.columns}, {"rank", t.rank}, {"columns_per_block", t.columns_per_block}});
  }
  if (task == "GradientTask") {
    const auto& t = as<GradientTask>(bytes);
    return json({{"rows", t.rows}, {"features", t.features}, {"rank", t.rank}, {"rows_per_split", t.rows_per_split}});
  }
  if (task == "FinishTask") {
    const auto& t = as<FinishTask>(bytes);
    return json({{"count0", t.results[0].count}, {"count1", t.results[1].count}});
  }
  if (task == "OperandTask") {
    const auto& t = as<OperandTask>(bytes);
    return json({{"rows", t.rows}, {"stride", t.sums_stride}, {"splits", t.splits}});
  }
  if (task == "FactorTask") {
    const auto& t = as<FactorTask>(bytes);
    return json({{"lines", t.lines}, {"columns", t.columns}, {"whole_lines", t.whole_lines}, {"whole_columns", t.whole_columns}});
  }
  if (task == "GemmTask") {
    const auto& t = as<GemmTask>(bytes);
    return json({{"rows", t.rows},
                 {"columns", t.columns},
                 {"count", t.count},
                 {"depth0", t.segments[0].depth},
                 {"depth1", t.segments[1].depth},
                 {"adapter0", t.segments[0].adapter},
                 {"adapter1", t.segments[1].adapter},
                 {"masked", t.mask.data != nullptr}});
  }
  if (task == "DropoutMaskTask") {
    const auto& t = as<DropoutMaskTask>(bytes);
    return json({{"rows", t.rows}, {"columns", t.columns}});
  }
  if (const std::string text = grouped_fields(task, bytes); !text.empty()) return text;
  return multi_fields(task, bytes);
}

}  // namespace

extern "C" {

// Of a struct by its name; empty where it is not known. Valid until the next call.
const char* task_fields(const char* task, const void* bytes) {
  static std::string text;
  text = fields(task, bytes);
  return text.c_str();
}

int64_t lora_tile() { return kGpuTile; }
int64_t lora_finish_threads() { return kFinishThreads; }
int64_t lora_gemm_tile() { return kGemmTile; }
}
