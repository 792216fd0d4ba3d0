// Checks of an op's arguments. A failed check throws std::runtime_error, RuntimeError in Python,
// with the op, the argument, what it is and what was expected. It tells of a bug in the caller and
// never crashes the process.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace pyserve {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A piece of an error message.
struct Piece {
  Piece(const char* text) : text(text) {}
  template <class Number>
  Piece(Number number) : text(std::to_string(number)) {}

  std::string text;
};

[[noreturn, gnu::noinline, gnu::cold]] inline void fail(std::initializer_list<Piece> pieces) {
  std::string message;
  for (const Piece& piece : pieces) message += piece.text;
  throw std::runtime_error(message);
}

#define PYSERVE_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) [[unlikely]]    \
      ::pyserve::fail({__VA_ARGS__}); \
  } while (false)

// What an op needs to know of a tensor, read once. The pointers belong to the tensor, which must
// outlive the view.
struct View {
  const char* op;
  const char* name;
  void* data;
  const int64_t* sizes;
  const int64_t* strides;  // in elements
  int64_t dim;
  ScalarType dtype;

  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

enum class LastDim { kContiguous, kStrided };

// The dtype of a tensor. Tensor::scalar_type() asks torch for the number of one dtype after another
// until it finds the tensor's; here these numbers are asked for only once.
inline ScalarType dtype_of(const Tensor& tensor) {
  struct Known {
    int32_t number;
    ScalarType dtype;
  };
  static const Known all_known[] = {{aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                    {aoti_torch_dtype_float16(), ScalarType::Half},
                                    {aoti_torch_dtype_int32(), ScalarType::Int},
                                    {aoti_torch_dtype_float32(), ScalarType::Float},
                                    {aoti_torch_dtype_int64(), ScalarType::Long},
                                    {aoti_torch_dtype_int16(), ScalarType::Short},
                                    {aoti_torch_dtype_uint8(), ScalarType::Byte}};
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  for (const Known& known : all_known) {
    if (known.number == number) return known.dtype;
  }
  return tensor.scalar_type();
}

inline void check_dtype(const View& view, ScalarType dtype) {
  PYSERVE_CHECK(view.dtype == dtype, view.op, ": ", view.name, " must be ",
                torch::headeronly::toString(dtype), ", got ",
                torch::headeronly::toString(view.dtype));
}

enum class Place { kCpu, kCuda };

// Reads the tensors of one call of an op, all of which must be on the op's kind of device.
struct ViewReader {
  const char* op;
  Place place;

  // Views a tensor that must have `dim` dims; -1 allows any number from 1 on.
  View operator()(const char* name, const Tensor& tensor, int64_t dim,
                  LastDim last_dim = LastDim::kContiguous) const {
    const bool is_there = place == Place::kCpu ? tensor.is_cpu() : tensor.is_cuda();
    PYSERVE_CHECK(is_there, op, ": ", name,
                  place == Place::kCpu ? " must be on the CPU" : " must be on a CUDA device");
    // Uses torch's C functions directly, because each method of Tensor first asks for the number of
    // dims.
    View view{op, name, nullptr, nullptr, nullptr, 0, dtype_of(tensor)};
    int64_t *sizes = nullptr, *strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &view.data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &view.dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
    view.sizes = sizes;
    view.strides = strides;
    PYSERVE_CHECK(dim < 0 ? view.dim >= 1 : view.dim == dim, op, ": ", name, " has ", view.dim,
                  " dims, expected ", dim < 0 ? 1 : dim, dim < 0 ? " or more" : "");
    PYSERVE_CHECK(last_dim == LastDim::kStrided || view.size(view.dim - 1) <= 1 ||
                      view.stride(view.dim - 1) == 1,
                  op, ": the last dim of ", name, " must be contiguous");
    return view;
  }

  View operator()(const char* name, const Tensor& tensor, int64_t dim, ScalarType dtype,
                  LastDim last_dim = LastDim::kContiguous) const {
    const View view = (*this)(name, tensor, dim, last_dim);
    check_dtype(view, dtype);
    return view;
  }
};

inline void check_size(const View& view, int64_t i, int64_t expected) {
  PYSERVE_CHECK(view.size(i) == expected, view.op, ": size ", i, " of ", view.name, " is ",
                view.size(i), ", expected ", expected);
}

inline void check_same_dtype(const View& view, const View& like) {
  PYSERVE_CHECK(view.dtype == like.dtype, view.op, ": ", view.name, " is ",
                torch::headeronly::toString(view.dtype), ", ", like.name, " is ",
                torch::headeronly::toString(like.dtype));
}

inline void check_same_sizes(const View& view, const View& like) {
  bool same = view.dim == like.dim;
  for (int64_t i = 0; same && i < view.dim; ++i) same = view.size(i) == like.size(i);
  PYSERVE_CHECK(same, view.op, ": ", view.name, " and ", like.name, " differ in shape");
}

inline int64_t num_elements(const View& view) {
  int64_t product = 1;
  for (int64_t i = 0; i < view.dim; ++i) product *= view.size(i);
  return product;
}

inline void check_contiguous(const View& view) {
  int64_t stride = 1;
  for (int64_t i = view.dim - 1; i >= 0; stride *= view.size(i), --i) {
    PYSERVE_CHECK(view.size(i) == 1 || view.stride(i) == stride || num_elements(view) == 0, view.op,
                  ": ", view.name, " must be contiguous");
  }
}

// A tensor's leading dims taken as a single one: `count` rows of the last dim, `stride` elements
// apart.
struct Rows {
  int64_t count;
  int64_t stride;
};

inline Rows rows_of(const View& view) {
  Rows rows{1, view.size(view.dim - 1)};
  for (int64_t i = view.dim - 2; i >= 0; --i) {
    if (view.size(i) == 1) continue;
    if (rows.count == 1) rows.stride = view.stride(i);
    PYSERVE_CHECK(view.stride(i) == rows.stride * rows.count, view.op, ": the rows of ", view.name,
                  " are not evenly spaced");
    rows.count *= view.size(i);
  }
  return rows;
}

// Calls fn(T{}) with the C++ type of a float32 or bfloat16 tensor.
template <class Float32, class Bfloat16, class Fn>
void dispatch_float(const View& view, Fn&& fn) {
  if (view.dtype == ScalarType::Float) return fn(Float32{});
  if (view.dtype == ScalarType::BFloat16) return fn(Bfloat16{});
  fail({view.op, ": ", view.name, " must be float32 or bfloat16, got ",
        torch::headeronly::toString(view.dtype)});
}

}  // namespace pyserve
