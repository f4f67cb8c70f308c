// A non-owning strided matrix, as passed from Python.
#pragma once
#include <cstdint>

namespace acqcore {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct Matrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;     // in elements
  int64_t column_stride;  // in elements
  DType dtype;
};

}  // namespace acqcore
