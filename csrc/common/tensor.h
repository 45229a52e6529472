// Tensors as kernels want them: allocation beside another tensor, rows, strides. Stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "check.h"

namespace peftops {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Size>
Tensor empty_on(const Tensor& like, ScalarType type, Size... sizes) {
  const std::array<int64_t, sizeof...(sizes)> shape{sizes...};
  return torch::stable::new_empty(like, Sizes(shape.data(), shape.size()), type);
}

template <class... Size>
Tensor zeros_on(const Tensor& like, ScalarType type, Size... sizes) {
  const std::array<int64_t, sizeof...(sizes)> shape{sizes...};
  return torch::stable::new_zeros(like, Sizes(shape.data(), shape.size()), type);
}

// What sums are made in.
inline ScalarType accumulator_of(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The product of the leading sizes.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A matrix whose rows are contiguous.
inline Tensor with_unit_stride(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

// [..., columns] as a matrix with contiguous rows. Strides that allow it make it a view; else it owns a copy. Calls of views through
// the dispatcher would cost more than a small problem's arithmetic.
struct Rows {
  Tensor owner;
  int64_t rows, columns, stride;

  Rows(const Tensor& t, int64_t columns_) : owner(t), rows(rows_of(t)), columns(columns_), stride(columns_) {
    const int64_t dim = t.dim();
    if (dim == 2 && (columns <= 1 || t.stride(1) == 1))
      stride = t.stride(0);
    else if (!t.is_contiguous())
      owner = torch::stable::contiguous(t);
  }

  const void* data() const { return owner.const_data_ptr(); }

  // As a 2-D tensor, for a vendor's GEMM.
  Tensor matrix() const {
    if (owner.dim() == 2) return owner;
    const std::array<int64_t, 2> shape{rows, columns};
    return torch::stable::view(owner, Sizes(shape.data(), shape.size()));
  }
};

// A [rows, columns] tensor in the leading sizes of `like`.
inline Tensor reshaped_like(const Tensor& t, const Tensor& like, int64_t columns) {
  if (like.dim() == 2) return t;
  std::vector<int64_t> shape(static_cast<size_t>(like.dim()));
  for (int64_t d = 0; d + 1 < like.dim(); ++d) shape[static_cast<size_t>(d)] = like.size(d);
  shape.back() = columns;
  return torch::stable::view(t, Sizes(shape.data(), shape.size()));
}

}  // namespace peftops
