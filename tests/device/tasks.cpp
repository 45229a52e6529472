// The sizes in the struct that a recorded launch handed to its kernel, as JSON.
#include <sstream>
#include <string>

#include "../../csrc/lora/gemm.h"

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
  return "";
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
