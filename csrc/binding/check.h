// Checks of what arrives from torch, whose messages print the values.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../args.h"
#include "../experts.h"
#include "../layout.h"

namespace sliderquant::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "sliderquant::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string describe(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto device = tensor.device();
  std::ostringstream text;
  text << dtype_text(tensor.scalar_type()) << ' ' << shape_text(sizes.data(), sizes.size()) << " on "
       << (device.is_cuda() ? "cuda:" + std::to_string(device.index()) : device.is_cpu() ? "cpu" : "another device");
  return text.str();
}

// Sizes of a tensor, without an allocation: every call of an op checks several.
struct Shape {
  int64_t sizes[5] = {};
  size_t count = 0;

  Shape(std::initializer_list<int64_t> list) { append(list); }
  void append(std::initializer_list<int64_t> list) {
    for (const int64_t size : list) sizes[count++] = size;
  }
};

struct Expectation {
  const char* op;
  std::string context;  // the values that the expected shapes follow from
  const Tensor& like;   // its device
  std::optional<int64_t> experts = std::nullopt;  // how many, where there is more than one weight
};

// Contiguous, of this dtype and shape, on the same device.
inline void check(const Expectation& e, const char* name, const Tensor& tensor, ScalarType type,
           const Shape& shape) {
  const auto sizes = tensor.sizes();
  const bool same_shape = sizes.size() == shape.count && std::equal(sizes.begin(), sizes.end(), shape.sizes);
  if (!same_shape || tensor.scalar_type() != type || tensor.device() != e.like.device()) {
    fail(e.op, name, ": expected ", dtype_text(type), ' ', shape_text(shape.sizes, shape.count), e.context,
         " on the device of the input; got ", describe(tensor));
  }
  if (!tensor.is_contiguous()) fail(e.op, name, ": expected a contiguous tensor; call .contiguous() on it");
}

// The same of something that every weight has.
inline void check_each(const Expectation& e, const char* name, const Tensor& tensor, ScalarType type,
                std::initializer_list<int64_t> shape) {
  Shape whole = {};
  if (e.experts.has_value()) whole.append({*e.experts});
  whole.append(shape);
  check(e, name, tensor, type, whole);
}

inline Float float_type(const char* op, const char* name, ScalarType type, bool allow_fp32) {
  if (type == ScalarType::BFloat16) return Float::kBf16;
  if (type == ScalarType::Half) return Float::kFp16;
  if (type == ScalarType::Float && allow_fp32) return Float::kFp32;
  fail(op, name, ": expected bfloat16", allow_fp32 ? ", float16 or float32" : " or float16", "; got ",
       dtype_text(type));
}

// x [M, K] with unit stride along K.
inline Float check_input(const char* op, const Tensor& x) {
  const Float type = float_type(op, "x", x.scalar_type(), false);
  if (x.dim() != 2) fail(op, "x: expected [M, K]; got ", describe(x));
  if (x.size(1) > 1 && x.stride(1) != 1) fail(op, "x: expected unit stride along K; got stride ", x.stride(1));
  return type;
}

inline void check_bits(const char* op, const char* name, int64_t bits) {
  if (!layout::is_weight_bits(bits)) fail(op, name, ": expected 2, 3, 4 or 8; got ", bits);
}

inline void check_in_features(const char* op, int64_t k) {
  if (k <= 0 || k % layout::kBlockCodes != 0) {
    fail(op, "K: expected a positive multiple of ", layout::kBlockCodes, "; got ", k);
  }
}

// Kernel layout of the device; the dtype tells the layouts of the two ops apart.
inline void check_weight(const Expectation& e, const Tensor& w, int bits, int64_t n, int64_t k, bool integer) {
  const ScalarType type = integer ? ScalarType::Byte : ScalarType::Int;
  const int64_t elements = integer ? 4 : 1;  // of a word
  if (e.like.device().is_cpu()) {
    check_each(e, "w_packed", w, type, {layout::panels(n), layout::row_words(bits, k), elements * layout::kPanelRows});
  } else {
    check_each(e, "w_packed", w, type,
               {layout::gpu::panels(n), layout::gpu::chunks(k), elements * layout::gpu::chunk_words(bits)});
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const Optional& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Where the tokens of each expert begin, and where those of the last one end. A GPU's are not looked at: that would wait
// for it.
inline Experts check_offsets(const Expectation& e, const Tensor& offsets, int64_t m) {
  check(e, "offsets", offsets, ScalarType::Int, {*e.experts + 1});
  const Experts experts = {data<int32_t>(offsets), *e.experts};
  for (int64_t i = 0; e.like.device().is_cpu() && i <= experts.count; ++i) {
    const int32_t at = experts.offsets[i], least = i > 0 ? experts.offsets[i - 1] : 0;
    if (at < least || at > (i > 0 ? m : 0)) {
      fail(e.op, "offsets: expected to rise from 0 to at most M=", m, "; got ", at, " at ", i, " behind ", least);
    }
  }
  return experts;
}

}  // namespace sliderquant::binding
