// Op schemas, argument checks and the way to the kernels. Translates, never computes.
//
// Only torch's stable ABI is used, so that one binary serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "args.h"
#include "cpu/api.h"
#include "layout.h"
#ifdef SLIDERQUANT_CUDA
#include <dlfcn.h>

#include "cuda/launch.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
namespace layout = sliderquant::layout;
using sliderquant::Float;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "sliderquant::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_text(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

const char* dtype_text(ScalarType type) {
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

std::string describe(const Tensor& tensor) {
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
void check(const Expectation& e, const char* name, const Tensor& tensor, ScalarType type,
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
void check_each(const Expectation& e, const char* name, const Tensor& tensor, ScalarType type,
                std::initializer_list<int64_t> shape) {
  Shape whole = {};
  if (e.experts.has_value()) whole.append({*e.experts});
  whole.append(shape);
  check(e, name, tensor, type, whole);
}

Float float_type(const char* op, const char* name, ScalarType type, bool allow_fp32) {
  if (type == ScalarType::BFloat16) return Float::kBf16;
  if (type == ScalarType::Half) return Float::kFp16;
  if (type == ScalarType::Float && allow_fp32) return Float::kFp32;
  fail(op, name, ": expected bfloat16", allow_fp32 ? ", float16 or float32" : " or float16", "; got ",
       dtype_text(type));
}

// x [M, K] with unit stride along K.
Float check_input(const char* op, const Tensor& x) {
  const Float type = float_type(op, "x", x.scalar_type(), false);
  if (x.dim() != 2) fail(op, "x: expected [M, K]; got ", describe(x));
  if (x.size(1) > 1 && x.stride(1) != 1) fail(op, "x: expected unit stride along K; got stride ", x.stride(1));
  return type;
}

void check_bits(const char* op, const char* name, int64_t bits) {
  if (!layout::is_weight_bits(bits)) fail(op, name, ": expected 2, 3, 4 or 8; got ", bits);
}

void check_in_features(const char* op, int64_t k) {
  if (k <= 0 || k % layout::kBlockCodes != 0) {
    fail(op, "K: expected a positive multiple of ", layout::kBlockCodes, "; got ", k);
  }
}

// Kernel layout of the device; the dtype tells the layouts of the two ops apart.
void check_weight(const Expectation& e, const Tensor& w, int bits, int64_t n, int64_t k, bool integer) {
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
sliderquant::Experts check_offsets(const Expectation& e, const Tensor& offsets, int64_t m) {
  check(e, "offsets", offsets, ScalarType::Int, {*e.experts + 1});
  const sliderquant::Experts experts = {data<int32_t>(offsets), *e.experts};
  for (int64_t i = 0; e.like.device().is_cpu() && i <= experts.count; ++i) {
    const int32_t at = experts.offsets[i], least = i > 0 ? experts.offsets[i - 1] : 0;
    if (at < least || at > (i > 0 ? m : 0)) {
      fail(e.op, "offsets: expected to rise from 0 to at most M=", m, "; got ", at, " at ", i, " behind ", least);
    }
  }
  return experts;
}

void run_parallel(int64_t count, int64_t grain, sliderquant::cpu::RangeBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

#ifdef SLIDERQUANT_CUDA
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up where the first CUDA tensor arrives: this library links libtorch_cpu alone, and torch loads its CUDA part,
// if it has one, out of the linker's sight. Null under a torch built for CPUs alone.
CurrentStream current_cuda_stream() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return function;
}

// enqueue(stream) returns the text of a CUDA error, or null.
template <class Enqueue>
void run_cuda(const char* op, int device, const Enqueue& enqueue) {
  const CurrentStream current_stream = current_cuda_stream();
  if (current_stream == nullptr) {
    fail(op, "no aoti_torch_get_current_cuda_stream in libtorch_cuda.so; install a CUDA build of torch 2.11 or later");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(device, &stream));
  if (const char* error = enqueue(reinterpret_cast<uintptr_t>(stream))) fail(op, "CUDA: ", error);
}

template <class Args>
void run_cuda(const char* op, const Args& args, int device, const char* (*launch)(const Args&, int, uintptr_t)) {
  run_cuda(op, device, [&](uintptr_t stream) { return launch(args, device, stream); });
}

void check_aligned(const char* op, const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(op, name, ": expected an address that is a multiple of 16; got ", address);
  }
}

// launch(workspace, stream) of a product of m tokens and n output channels. The workspace goes back to torch's
// allocator as soon as the kernels are enqueued: what is allocated next on the same stream runs after them.
template <class T, class Launch>
void run_planned(const char* op, const Tensor& x, ScalarType type, const sliderquant::cuda::Plan& plan, int64_t m,
                 int64_t n, const Launch& launch) {
  const int64_t size = sliderquant::cuda::workspace_size(plan, m, n);
  Optional workspace;
  if (size > 0) workspace = torch::stable::new_empty(x, {size}, type);
  auto* partial = workspace.has_value() ? static_cast<T*>(workspace->mutable_data_ptr()) : nullptr;
  run_cuda(op, x.device().index(), [&](uintptr_t stream) { return launch(partial, stream); });
}

void wna16_cuda(const char* op, const Tensor& x, const sliderquant::Wna16& args) {
  check_aligned(op, "w_packed", args.w);
  const int device = x.device().index();
  const auto plan = sliderquant::cuda::plan(args, device);
  run_planned<float>(op, x, ScalarType::Float, plan, args.m, args.n, [&](float* workspace, uintptr_t stream) {
    return sliderquant::cuda::wna16(args, plan, workspace, device, stream);
  });
}

void integer_cuda(const char* op, const Tensor& codes, const sliderquant::IntegerGemm& args) {
  check_aligned(op, "w_packed", args.w);
  check_aligned(op, "codes", args.codes);
  const int device = codes.device().index();
  const auto plan = sliderquant::cuda::plan(args, device);
  run_planned<uint32_t>(op, codes, ScalarType::Int, plan, args.m, args.n, [&](uint32_t* workspace, uintptr_t stream) {
    return sliderquant::cuda::integer_gemm(args, plan, workspace, device, stream);
  });
}

void wna16_grouped_cuda(const char* op, const Tensor& x, const sliderquant::Wna16& args,
                        const sliderquant::Experts& experts) {
  check_aligned(op, "w_packed", args.w);
  const int device = x.device().index();
  const auto plan = sliderquant::cuda::plan_grouped(args, experts.count, device);
  run_planned<float>(op, x, ScalarType::Float, plan, args.m, args.n, [&](float* workspace, uintptr_t stream) {
    return sliderquant::cuda::wna16_grouped(args, experts, plan, workspace, device, stream);
  });
}

void integer_grouped_cuda(const char* op, const Tensor& codes, const sliderquant::IntegerGemm& args,
                          const sliderquant::Experts& experts) {
  check_aligned(op, "w_packed", args.w);
  check_aligned(op, "codes", args.codes);
  const int device = codes.device().index();
  const auto plan = sliderquant::cuda::plan_grouped(args, experts.count, device);
  run_planned<uint32_t>(op, codes, ScalarType::Int, plan, args.m, args.n, [&](uint32_t* workspace, uintptr_t stream) {
    return sliderquant::cuda::integer_gemm_grouped(args, experts, plan, workspace, device, stream);
  });
}
#define SLIDERQUANT_LAUNCH(kernel) sliderquant::cuda::kernel
#else
template <class Args>
void run_cuda(const char* op, const Args&, int, std::nullptr_t) {
  fail(op, "this library is built without CUDA kernels; build it again where nvcc is installed");
}

void wna16_cuda(const char* op, const Tensor& x, const sliderquant::Wna16& args) {
  run_cuda(op, args, x.device().index(), nullptr);
}

void integer_cuda(const char* op, const Tensor& codes, const sliderquant::IntegerGemm& args) {
  run_cuda(op, args, codes.device().index(), nullptr);
}

void wna16_grouped_cuda(const char* op, const Tensor& x, const sliderquant::Wna16& args, const sliderquant::Experts&) {
  wna16_cuda(op, x, args);
}

void integer_grouped_cuda(const char* op, const Tensor& codes, const sliderquant::IntegerGemm& args,
                          const sliderquant::Experts&) {
  integer_cuda(op, codes, args);
}
#define SLIDERQUANT_LAUNCH(kernel) nullptr
#endif

// With one weight, or with those of several experts where there are offsets.
Tensor wna16(const char* op, const Tensor* offsets, const Tensor& x, const Tensor& w_packed, const Tensor& scale,
             const Optional& zero, const Optional& bias, int64_t bits, int64_t group_size) {
  const Float type = check_input(op, x);
  check_bits(op, "bits", bits);
  if (group_size != -1 && group_size != 32 && group_size != 64 && group_size != 128) {
    fail(op, "group_size: expected -1, 32, 64 or 128; got ", group_size);
  }
  const int64_t m = x.size(0), k = x.size(1);
  check_in_features(op, k);
  if (group_size != -1 && k % group_size != 0) fail(op, "group_size: ", group_size, " does not divide K=", k);
  const bool grouped = offsets != nullptr;
  if (scale.dim() != (grouped ? 3 : 2)) {
    fail(op, "scale: expected float32 ", grouped ? "[E, G, N]" : "[G, N]", "; got ", describe(scale));
  }
  const int64_t group = group_size == -1 ? k : group_size, groups = k / group, n = scale.size(scale.dim() - 1);
  const Expectation e = {op,
                         " for bits=" + std::to_string(bits) + ", group_size=" + std::to_string(group_size) +
                             ", N=" + std::to_string(n) + ", K=" + std::to_string(k),
                         x, grouped ? std::optional(scale.size(0)) : std::nullopt};
  check_each(e, "scale", scale, ScalarType::Float, {groups, n});
  check_weight(e, w_packed, static_cast<int>(bits), n, k, false);
  if (zero.has_value()) check_each(e, "zero", *zero, ScalarType::Byte, {groups, n});
  if (bias.has_value()) check_each(e, "bias", *bias, ScalarType::Float, {n});
  const sliderquant::Experts experts = grouped ? check_offsets(e, *offsets, m) : sliderquant::Experts{};

  const Tensor y = torch::stable::new_empty(x, {m, n});
  if (m == 0 || n == 0) return y;
  const sliderquant::Wna16 args = {
      .x = data<uint16_t>(x),
      .x_type = type,
      .x_stride = x.stride(0),
      .w = data<uint32_t>(w_packed),
      .scale = data<float>(scale),
      .zero = data<uint8_t>(zero),
      .bias = data<float>(bias),
      .y = static_cast<uint16_t*>(y.mutable_data_ptr()),
      .m = m,
      .n = n,
      .k = k,
      .group = group,
      .bits = static_cast<int>(bits),
  };
  if (x.device().is_cpu()) {
    if (grouped) {
      sliderquant::cpu::wna16_grouped(args, experts, run_parallel);
    } else {
      sliderquant::cpu::kernels().wna16(args, sliderquant::cpu::all_panels(n), run_parallel);
    }
  } else if (grouped) {
    wna16_grouped_cuda(op, x, args, experts);
  } else {
    wna16_cuda(op, x, args);
  }
  return y;
}

Tensor wna16_gemm(const Tensor& x, const Tensor& w_packed, const Tensor& scale, const Optional& zero,
                  const Optional& bias, int64_t bits, int64_t group_size) {
  return wna16("wna16_gemm", nullptr, x, w_packed, scale, zero, bias, bits, group_size);
}

Tensor wna16_gemm_grouped(const Tensor& x, const Tensor& offsets, const Tensor& w_packed, const Tensor& scale,
                          const Optional& zero, const Optional& bias, int64_t bits, int64_t group_size) {
  return wna16("wna16_gemm_grouped", &offsets, x, w_packed, scale, zero, bias, bits, group_size);
}

void check_block(const char* op, const Tensor& x, int64_t block, int64_t k) {
  if (block < 1 || (block & (block - 1)) != 0 || k % block != 0) {
    fail(op, "block_size: expected a power of 2 that divides K=", k, "; got ", block);
  }
  if (block > layout::kMostBlock && !x.device().is_cpu()) {
    fail(op, "block_size: expected at most ", layout::kMostBlock, " on GPUs; got ", block);
  }
}

// What a quantizer of rows returns, and what it is told; x is [m, k], or [m, 2 * k] where it holds gates and ups.
struct Quantized {
  Tensor codes, scale, zero, row_sum;
  sliderquant::Quantize args;

  Quantized(const char* op, const Tensor& x, int64_t k, int64_t bits, bool symmetric, int64_t block)
      : codes(torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Byte)),
        scale(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float)),
        zero(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int)),
        row_sum(torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int)) {
    if (bits < 2 || bits > 8) fail(op, "bits: expected 2 to 8; got ", bits);
    check_block(op, x, block, k);
    args = {
        .x = data<uint16_t>(x),
        .x_type = check_input(op, x),
        .x_stride = x.stride(0),
        .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
        .scale = static_cast<float*>(scale.mutable_data_ptr()),
        .zero = static_cast<int32_t*>(zero.mutable_data_ptr()),
        .row_sum = static_cast<int32_t*>(row_sum.mutable_data_ptr()),
        .m = x.size(0),
        .k = k,
        .block = block,
        .bits = static_cast<int>(bits),
        .symmetric = symmetric,
    };
  }
};

// The channels of x, [M, K] or [M, 2 * K].
int64_t check_rows(const char* op, const Tensor& x, bool gated) {
  check_input(op, x);
  const int64_t k = x.size(1);
  if (k > INT32_MAX) fail(op, "x: expected fewer than 2^31 columns; got ", describe(x));
  if (gated && k % 2 != 0) fail(op, "x: expected [M, 2 * K]; got ", describe(x));
  if (k <= 0) fail(op, "x: expected at least one column; got ", describe(x));
  return gated ? k / 2 : k;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, int64_t bits, bool symmetric,
                                                              int64_t block) {
  const char* op = "quantize_per_token";
  const Quantized made(op, x, check_rows(op, x, false), bits, symmetric, block);
  if (x.size(0) > 0) {
    if (x.device().is_cpu()) {
      sliderquant::cpu::kernels().quantize(made.args, run_parallel);
    } else {
      run_cuda(op, made.args, x.device().index(), SLIDERQUANT_LAUNCH(quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum};
}

// x and residual [M, K], weight [K] -> the same of their normalized sum, and the sum, which is empty without a residual
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_quantize(const Tensor& x, const Optional& residual,
                                                                     const Tensor& weight, double epsilon,
                                                                     int64_t bits, bool symmetric, int64_t block) {
  const char* op = "rms_norm_quantize";
  const int64_t m = x.dim() == 2 ? x.size(0) : 0, k = check_rows(op, x, false);
  const Expectation e = {op, " for K=" + std::to_string(k), x};
  check(e, "weight", weight, x.scalar_type(), {k});
  if (residual.has_value()) {
    const auto& r = *residual;
    if (r.dim() != 2 || r.size(0) != m || r.size(1) != k || r.scalar_type() != x.scalar_type() ||
        r.device() != x.device() || (k > 1 && r.stride(1) != 1)) {
      fail(op, "residual: expected ", describe(x), " like x, with unit stride along K; got ", describe(r));
    }
  }
  const Quantized made(op, x, k, bits, symmetric, block);
  const Tensor sum = torch::stable::new_empty(x, {residual.has_value() ? m : 0, k});
  if (m > 0) {
    const sliderquant::RmsNormQuantize args = {
        .quantize = made.args,
        .residual = data<uint16_t>(residual),
        .residual_stride = residual.has_value() ? residual->stride(0) : 0,
        .sum = static_cast<uint16_t*>(sum.mutable_data_ptr()),
        .weight = data<uint16_t>(weight),
        .epsilon = static_cast<float>(epsilon),
    };
    if (x.device().is_cpu()) {
      sliderquant::cpu::kernels().rms_norm_quantize(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(rms_norm_quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum, sum};
}

// x [M, 2 * K], gates before ups -> the same of silu(gate) * up
std::tuple<Tensor, Tensor, Tensor, Tensor> silu_mul_quantize(const Tensor& x, int64_t bits, bool symmetric,
                                                             int64_t block) {
  const char* op = "silu_mul_quantize";
  const Quantized made(op, x, check_rows(op, x, true), bits, symmetric, block);
  if (x.size(0) > 0) {
    const sliderquant::SiluMulQuantize args = {made.args};
    if (x.device().is_cpu()) {
      sliderquant::cpu::kernels().silu_mul_quantize(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(silu_mul_quantize));
    }
  }
  return {made.codes, made.scale, made.zero, made.row_sum};
}

// With one weight, or with those of several experts where there are offsets.
Tensor w4a4(const char* op, const Tensor* offsets, const Tensor& codes, const Tensor& sa, const Tensor& za,
            const Tensor& row_sum, const Tensor& w_packed, const Tensor& sw, const Optional& zw, const Tensor& col_sum,
            const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  check_bits(op, "weight_bits", weight_bits);
  const Float type = float_type(op, "out_dtype", out_dtype, true);
  if (codes.dim() != 2) fail(op, "codes: expected uint8 [M, K]; got ", describe(codes));
  const int64_t m = codes.size(0), k = codes.size(1);
  check_in_features(op, k);
  // Activation codes may take all 8 bits; the bracket must fit int32 whatever they are.
  const int64_t k_limit = INT32_MAX / (255 * ((int64_t{1} << weight_bits) - 1));
  if (k > k_limit) {
    fail(op, "K: at most ", k_limit, " input channels keep ", weight_bits, "-bit sums within int32; got ", k);
  }
  const bool grouped = offsets != nullptr;
  if (sw.dim() != (grouped ? 2 : 1)) {
    fail(op, "sw: expected float32 ", grouped ? "[E, N]" : "[N]", "; got ", describe(sw));
  }
  const int64_t n = sw.size(sw.dim() - 1);
  const Expectation e = {op,
                         " for weight_bits=" + std::to_string(weight_bits) + ", M=" + std::to_string(m) +
                             ", N=" + std::to_string(n) + ", K=" + std::to_string(k),
                         codes, grouped ? std::optional(sw.size(0)) : std::nullopt};
  check(e, "codes", codes, ScalarType::Byte, {m, k});
  check(e, "sa", sa, ScalarType::Float, {m});
  check(e, "za", za, ScalarType::Int, {m});
  check(e, "row_sum", row_sum, ScalarType::Int, {m});
  check_each(e, "sw", sw, ScalarType::Float, {n});
  check_each(e, "col_sum", col_sum, ScalarType::Int, {n});
  check_weight(e, w_packed, static_cast<int>(weight_bits), n, k, true);
  if (zw.has_value()) check_each(e, "zw", *zw, ScalarType::Byte, {n});
  if (bias.has_value()) check_each(e, "bias", *bias, ScalarType::Float, {n});
  const sliderquant::Experts experts = grouped ? check_offsets(e, *offsets, m) : sliderquant::Experts{};

  const Tensor y = torch::stable::new_empty(codes, {m, n}, out_dtype);
  if (m == 0 || n == 0) return y;
  const sliderquant::IntegerGemm args = {
      .codes = data<uint8_t>(codes),
      .sa = data<float>(sa),
      .za = data<int32_t>(za),
      .row_sum = data<int32_t>(row_sum),
      .w = data<uint32_t>(w_packed),
      .sw = data<float>(sw),
      .zw = data<uint8_t>(zw),
      .col_sum = data<int32_t>(col_sum),
      .bias = data<float>(bias),
      .y = y.mutable_data_ptr(),
      .y_type = type,
      .m = m,
      .n = n,
      .k = k,
      .bits = static_cast<int>(weight_bits),
  };
  if (codes.device().is_cpu()) {
    if (grouped) {
      sliderquant::cpu::integer_gemm_grouped(args, experts, run_parallel);
    } else {
      sliderquant::cpu::kernels().integer_gemm(args, sliderquant::cpu::all_panels(n), run_parallel);
    }
  } else if (grouped) {
    integer_grouped_cuda(op, codes, args, experts);
  } else {
    integer_cuda(op, codes, args);
  }
  return y;
}

Tensor w4a4_gemm(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                 const Tensor& w_packed, const Tensor& sw, const Optional& zw, const Tensor& col_sum,
                 const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  return w4a4("w4a4_gemm", nullptr, codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits, out_dtype);
}

Tensor w4a4_gemm_grouped(const Tensor& codes, const Tensor& sa, const Tensor& za, const Tensor& row_sum,
                         const Tensor& offsets, const Tensor& w_packed, const Tensor& sw, const Optional& zw,
                         const Tensor& col_sum, const Optional& bias, int64_t weight_bits, ScalarType out_dtype) {
  return w4a4("w4a4_gemm_grouped", &offsets, codes, sa, za, row_sum, w_packed, sw, zw, col_sum, bias, weight_bits,
              out_dtype);
}

Tensor hadamard(const Tensor& x, int64_t block) {
  const char* op = "hadamard";
  const Float type = float_type(op, "x", x.scalar_type(), true);
  if (x.dim() < 1) fail(op, "x: expected [..., K]; got ", describe(x));
  const int64_t k = x.size(x.dim() - 1);
  check_block(op, x, block, k);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor y = torch::stable::empty_like(rows);
  if (x.numel() > 0) {
    const sliderquant::Hadamard args = {
        .x = rows.const_data_ptr(),
        .y = y.mutable_data_ptr(),
        .type = type,
        .m = x.numel() / k,
        .k = k,
        .block = block,
    };
    if (x.device().is_cpu()) {
      sliderquant::cpu::kernels().hadamard(args, run_parallel);
    } else {
      run_cuda(op, args, x.device().index(), SLIDERQUANT_LAUNCH(hadamard));
    }
  }
  return y;
}

// weight_packed [N, K * bits / 32] in checkpoint packing; K
int64_t check_stream(const char* op, const Tensor& weight_packed, int64_t bits) {
  check_bits(op, "bits", bits);
  if (weight_packed.dim() != 2 || weight_packed.scalar_type() != ScalarType::Int || !weight_packed.is_contiguous()) {
    fail(op, "weight_packed: expected contiguous int32 [N, K * bits / 32]; got ", describe(weight_packed));
  }
  const int64_t k = weight_packed.size(1) * 32 / bits;
  check_in_features(op, k);
  if (weight_packed.size(1) * 32 % bits != 0) {
    fail(op, "weight_packed: expected whole codes of ", bits, " bits in every row; got ", describe(weight_packed));
  }
  return k;
}

// -> kernel layout, as check_weight expects it.
Tensor repack(const Tensor& weight_packed, int64_t bits, int64_t activation_bits) {
  const char* op = "repack";
  const int64_t k = check_stream(op, weight_packed, bits), n = weight_packed.size(0);
  if (activation_bits != 16 && (activation_bits < 2 || activation_bits > 8)) {
    fail(op, "activation_bits: expected 16, or 2 to 8; got ", activation_bits);
  }
  const bool pairs = activation_bits == 16, on_cpu = weight_packed.device().is_cpu();
  const int width = static_cast<int>(bits);
  const int64_t rows = on_cpu ? layout::panels(n) : layout::gpu::panels(n);
  const int64_t columns = on_cpu ? layout::row_words(width, k) : layout::gpu::chunks(k);
  const int64_t words = on_cpu ? layout::kPanelRows : layout::gpu::chunk_words(width);
  const Tensor packed = torch::stable::new_empty(weight_packed, {rows, columns, pairs ? words : 4 * words},
                                                 pairs ? ScalarType::Int : ScalarType::Byte);
  if (n == 0) return packed;
  const sliderquant::Repack args = {
      .stream = data<uint32_t>(weight_packed),
      .packed = static_cast<uint32_t*>(packed.mutable_data_ptr()),
      .n = n,
      .k = k,
      .bits = width,
      .pairs = pairs,
  };
  if (on_cpu) {
    sliderquant::cpu::kernels().repack(args, run_parallel);
  } else {
    run_cuda(op, args, weight_packed.device().index(), SLIDERQUANT_LAUNCH(repack));
  }
  return packed;
}

Tensor column_sums(const Tensor& weight_packed, int64_t bits) {
  const int64_t k = check_stream("column_sums", weight_packed, bits), n = weight_packed.size(0);
  const Tensor sums = torch::stable::new_empty(weight_packed, {n});
  sliderquant::cpu::kernels().column_sums(
      {
          .stream = data<uint32_t>(weight_packed),
          .sums = static_cast<int32_t*>(sums.mutable_data_ptr()),
          .n = n,
          .k = k,
          .bits = static_cast<int>(bits),
      },
      run_parallel);
  return sums;
}

// weight fp32 [N, K], scale and zero fp32 [N, G] -> quantized fp32 and error int16, both [N, K]
std::tuple<Tensor, Tensor> fake_quantize_weight(const Tensor& weight, const Tensor& scale, const Tensor& zero,
                                                int64_t max_code) {
  const char* op = "fake_quantize_weight";
  if (weight.dim() != 2 || weight.size(1) == 0) fail(op, "weight: expected float32 [N, K]; got ", describe(weight));
  if (scale.dim() != 2 || scale.size(1) == 0) fail(op, "scale: expected float32 [N, G]; got ", describe(scale));
  if (max_code < 1 || max_code > 255) fail(op, "max_code: expected 1 to 255; got ", max_code);
  const int64_t n = weight.size(0), k = weight.size(1), groups = scale.size(1);
  if (k % groups != 0) fail(op, "scale: expected groups that divide K=", k, "; got ", describe(scale));
  const Expectation e = {op, " for N=" + std::to_string(n) + ", K=" + std::to_string(k), weight};
  check(e, "weight", weight, ScalarType::Float, {n, k});
  check(e, "scale", scale, ScalarType::Float, {n, groups});
  check(e, "zero", zero, ScalarType::Float, {n, groups});
  const Tensor quantized = torch::stable::new_empty(weight, {n, k});
  const Tensor error = torch::stable::new_empty(weight, {n, k}, ScalarType::Short);
  sliderquant::cpu::kernels().fake_quantize(
      {
          .weight = data<float>(weight),
          .scale = data<float>(scale),
          .zero = data<float>(zero),
          .quantized = static_cast<float*>(quantized.mutable_data_ptr()),
          .error = static_cast<int16_t*>(error.mutable_data_ptr()),
          .groups = n * groups,
          .size = k / groups,
          .max_code = static_cast<int>(max_code),
      },
      run_parallel);
  return {quantized, error};
}

// grad fp32 and error int16 [N, K] -> gradient of the weight fp32 [N, K], sums fp32 [3, N, G]
std::tuple<Tensor, Tensor> fake_quantize_weight_backward(const Tensor& grad, const Tensor& error, int64_t groups) {
  const char* op = "fake_quantize_weight_backward";
  if (grad.dim() != 2 || grad.size(1) == 0) fail(op, "grad: expected float32 [N, K]; got ", describe(grad));
  const int64_t n = grad.size(0), k = grad.size(1);
  if (groups < 1 || k % groups != 0) fail(op, "groups: expected a divisor of K=", k, "; got ", groups);
  const Expectation e = {op, " for N=" + std::to_string(n) + ", K=" + std::to_string(k), grad};
  check(e, "grad", grad, ScalarType::Float, {n, k});
  check(e, "error", error, ScalarType::Short, {n, k});
  const Tensor grad_weight = torch::stable::new_empty(grad, {n, k});
  const Tensor sums = torch::stable::new_empty(grad, {3, n, groups});
  sliderquant::cpu::kernels().fake_quantize_backward(
      {
          .grad = data<float>(grad),
          .error = data<int16_t>(error),
          .grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr()),
          .sums = static_cast<float*>(sums.mutable_data_ptr()),
          .groups = n * groups,
          .size = k / groups,
      },
      run_parallel);
  return {grad_weight, sums};
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("wna16_gemm", TORCH_BOX(&wna16_gemm));
  library.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  library.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  library.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize));
  library.impl("hadamard", TORCH_BOX(&hadamard));
  library.impl("w4a4_gemm", TORCH_BOX(&w4a4_gemm));
  library.impl("wna16_gemm_grouped", TORCH_BOX(&wna16_gemm_grouped));
  library.impl("w4a4_gemm_grouped", TORCH_BOX(&w4a4_gemm_grouped));
  library.impl("repack", TORCH_BOX(&repack));
}

}  // namespace

STABLE_TORCH_LIBRARY(sliderquant, library) {
  library.def(
      "wna16_gemm(Tensor x, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size) "
      "-> Tensor");
  library.def(
      "quantize_per_token(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor weight, float epsilon, int bits, bool symmetric, "
      "int block_size=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "silu_mul_quantize(Tensor x, int bits, bool symmetric, int block_size=1) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("hadamard(Tensor x, int block_size) -> Tensor");
  library.def(
      "w4a4_gemm(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor w_packed, Tensor sw, Tensor? zw, "
      "Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor");
  library.def(
      "wna16_gemm_grouped(Tensor x, Tensor offsets, Tensor w_packed, Tensor scale, Tensor? zero, Tensor? bias, "
      "int bits, int group_size) -> Tensor");
  library.def(
      "w4a4_gemm_grouped(Tensor codes, Tensor sa, Tensor za, Tensor row_sum, Tensor offsets, Tensor w_packed, "
      "Tensor sw, Tensor? zw, Tensor col_sum, Tensor? bias, int weight_bits, ScalarType out_dtype) -> Tensor");
  library.def("repack(Tensor weight_packed, int bits, int activation_bits) -> Tensor");
  library.def("column_sums(Tensor weight_packed, int bits) -> Tensor");
  library.def("fake_quantize_weight(Tensor weight, Tensor scale, Tensor zero, int max_code) -> (Tensor, Tensor)");
  library.def("fake_quantize_weight_backward(Tensor grad, Tensor error, int groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sliderquant, CPU, library) {
  implement(library);
  library.impl("column_sums", TORCH_BOX(&column_sums));
  library.impl("fake_quantize_weight", TORCH_BOX(&fake_quantize_weight));
  library.impl("fake_quantize_weight_backward", TORCH_BOX(&fake_quantize_weight_backward));
}

#ifdef SLIDERQUANT_CUDA
STABLE_TORCH_LIBRARY_IMPL(sliderquant, CUDA, library) { implement(library); }
#endif
