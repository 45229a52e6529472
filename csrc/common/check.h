// Argument checks: shapes as algebra, errors that carry the values.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace peftops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises a RuntimeError whose text is the concatenation of `parts`. The macros of torch would put a file and a line in front of it.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that the parts of the text are only made where it is needed.
#define PEFTOPS_CHECK(holds, ...)               \
  do {                                          \
    if (!(holds)) ::peftops::fail(__VA_ARGS__); \
  } while (false)

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// "[2, 3]": a shape as it stands in error messages.
inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ']';
  return text.str();
}

// `name` is anything that a stream takes.
template <class Name>
void check_dim(const char* op, const Name& name, const Tensor& t, int64_t dim, const char* layout) {
  PEFTOPS_CHECK(t.dim() == dim, op, ": ", name, " must be ", layout, ", but has shape ", shape_of(t));
}

template <class Name>
void check_dtype(const char* op, const Name& name, const Tensor& t, ScalarType want, const char* reason) {
  PEFTOPS_CHECK(t.scalar_type() == want, op, ": ", name, " has dtype ", name_of(t.scalar_type()), ", but ", reason, " ", name_of(want));
}

template <class Name>
void check_same_device(const char* op, const Name& name, const Tensor& t, const Tensor& x) {
  PEFTOPS_CHECK(t.device() == x.device(), op, ": ", name, " is on another device than x");
}

}  // namespace peftops
