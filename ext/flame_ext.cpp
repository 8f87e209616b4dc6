// The Python module. It needs no torch headers: the Python methods of a tensor return its address, shape and
// strides (also for bfloat16, which numpy lacks). The caller's reference keeps the memory alive.
#include "flame_ext.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

namespace py = pybind11;
using namespace py::literals;

namespace {

using Tensor = const py::object&;
using Sizes = std::vector<int64_t>;
constexpr int64_t ANY = -1;  // matches any size
const std::string FLOATING = "torch.float32 or torch.bfloat16";
const std::string ANY_DEVICE = CUDA ? "cpu or cuda" : "cpu";

struct View : Rows {  // the memory of a tensor
  std::string dtype, device;
  Sizes shape;
  bool cuda;

  // Throws ValueError unless the tensor is as expected and contiguous (free_stride: except in dimension 0).
  View(Tensor tensor, const char* name, const std::string& dtypes, const Sizes& sizes,
       const std::string& expected_device = ANY_DEVICE, bool free_stride = false)
      : Rows{(void*)tensor.attr("data_ptr")().cast<uintptr_t>(), 0}, dtype(py::str(tensor.attr("dtype"))),
        device(py::str(tensor.attr("device"))), shape(tensor.attr("shape").cast<Sizes>()),
        cuda(CUDA && device.rfind("cuda", 0) == 0) {
    const auto strides = tensor.attr("stride")().cast<Sizes>();
    bool valid = dtypes.find(dtype) != std::string::npos && shape.size() == sizes.size();
    valid &= expected_device == ANY_DEVICE ? device == "cpu" || cuda : device == expected_device;
    int64_t dense_stride = 1;
    for (size_t i = shape.size(); valid && i-- > 0; dense_stride *= shape[i]) {
      valid &= sizes[i] == ANY || shape[i] == sizes[i];
      valid &= shape[i] < 2 || strides[i] == dense_stride || (free_stride && i == 0);
    }
    if (cuda)  // the kernels load 16 bytes at a time and compute in bfloat16 only
      valid &= (uintptr_t)data % 16 == 0 && (shape.size() < 2 || strides[0] % 8 == 0) &&
               (dtypes != FLOATING || float_dtype() == BF16);
    if (!valid)
      throw py::value_error(py::str("{} is {} {}, strides {}, on {}; expected {} {}, contiguous, on {}")
          .format(name, dtype, shape, strides, device, dtypes, sizes, expected_device));
    if (!shape.empty()) stride = strides[0];
  }

  Dtype float_dtype() const { return dtype == "torch.float32" ? F32 : BF16; }
};

template <class Params>
void run(const Params& params, const View& out, uintptr_t stream) {  // on the device of out
  if constexpr (CUDA)
    if (out.cuda) return run_on_cuda(params, stream);
  py::gil_scoped_release release;
  run_on_cpu(params, out.float_dtype());
}

void mask(const Forest& forest, Tensor out_) {
  const int64_t n = forest.tokens;
  auto* out = (uint8_t*)View(out_, "out", "torch.bool", {n, n}, "cpu").data;
  const Token* token = forest.plan(forest.buffer.data()).token;
  for (int64_t q = 0; q < n; ++q)
    for (int64_t k = 0; k < n; ++k) *out++ = visible(token[q], token[k]);
}

void attention(Tensor q_, Tensor k_, Tensor v_, Tensor out_, const Forest& forest, float scale, Tensor plan_,
               uintptr_t stream) {
  const View q(q_, "q", FLOATING, {forest.tokens, ANY, ANY}, ANY_DEVICE, true);
  const View k(k_, "k", q.dtype, {forest.tokens, ANY, q.shape[2]}, q.device, true);
  const View v(v_, "v", q.dtype, k.shape, q.device, true);
  const View out(out_, "out", q.dtype, q.shape, q.device, true);
  const int heads = (int)q.shape[1], kv_heads = (int)k.shape[1], head_dim = (int)q.shape[2];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || head_dim < 1 || head_dim > MAX_HEAD_DIM)
    throw py::value_error("the number of k's heads must divide q's, and head_dim must be at most " +
                          std::to_string(MAX_HEAD_DIM));
  Plan plan = forest.plan(forest.buffer.data());
  if (q.cuda) {
    const View copy(plan_, "plan", "torch.int32", {(int64_t)forest.buffer.size()}, q.device);
    plan = forest.plan((int32_t*)copy.data);
  }
  run(Attention{q, k, v, out, heads, kv_heads, head_dim, scale, plan}, out, stream);
}

void rope(Tensor qkv_, Tensor cos_, Tensor sin_, int64_t heads, uintptr_t stream) {
  const View cos(cos_, "cos", "torch.float32", {ANY, ANY});
  const View sin(sin_, "sin", "torch.float32", cos.shape, cos.device);
  const View qkv(qkv_, "qkv", FLOATING, {cos.shape[0], ANY, 2 * cos.shape[1]}, cos.device, true);
  if (heads < 0 || heads > qkv.shape[1]) throw py::value_error("heads is negative, or qkv has fewer heads");
  const int head_dim = (int)qkv.shape[2];
  run(Rope{qkv, (int)heads, head_dim, (float*)cos.data, (float*)sin.data, qkv.shape[0]}, qkv, stream);
}

void rmsnorm(Tensor x_, Tensor weight_, Tensor out_, float eps, Tensor delta_, uintptr_t stream) {
  const View x(x_, "x", "torch.float32", {ANY, ANY});
  const View weight(weight_, "weight", "torch.float32", {x.shape[1]}, x.device);
  const View out(out_, "out", FLOATING, x.shape, x.device);
  RmsNorm params{(float*)x.data, nullptr, (float*)weight.data, out.data, x.shape[0], x.shape[1], eps};
  if (!delta_.is_none()) params.delta = View(delta_, "delta", out.dtype, x.shape, x.device).data;
  run(params, out, stream);
}

void swiglu(Tensor gate_up_, Tensor out_, uintptr_t stream) {
  const View out(out_, "out", FLOATING, {ANY, ANY});
  const View gate_up(gate_up_, "gate_up", out.dtype, {out.shape[0], 2 * out.shape[1]}, out.device);
  run(SwiGlu{gate_up.data, out.data, out.shape[0], out.shape[1]}, out, stream);
}

}  // namespace

PYBIND11_MODULE(flame_ext, m) {
  m.doc() = "Attention over a segment forest, and other kernels of a decoder layer.";
  m.attr("cpu") = !simd("").empty();  // whether the kernels support this CPU (x86-64 with AVX2)
  m.attr("cuda") = CUDA;
  const auto plan = [](const Forest& f) { return py::array_t<int32_t>(f.buffer.size(), f.buffer.data()); };
  py::class_<Forest>(m, "Layout").def_property_readonly("plan", plan, "int32 [P], the input of the kernels. "
      "It starts with [T, 3]: the segment, the last descendant of that segment, and the depth of each token");
  m.def("layout", &std::make_unique<Forest, const Sizes&, const Sizes&, const int64_t&>, "lengths"_a,
        "parents"_a, "tile"_a = 64, "Return the Layout of segments in depth-first order: parents[i] is -1, "
        "i - 1 or an ancestor of i - 1. tile: queries per tile; on CUDA at most 64 // (heads per KV head)");
  m.def("mask", mask, "layout"_a, "out"_a, "Write bool [T, T]: out[q, k] = query q sees key k");
  m.def("attention", attention, "q"_a, "k"_a, "v"_a, "out"_a, "layout"_a, "scale"_a, "plan"_a = py::none(),
        "stream"_a = 0, "Write attention to out. q, out: [T, H, d]; k, v: [T, Hkv, d]; float32 or bfloat16; "
        "any token stride. On CUDA: bfloat16, d 64 or 128; plan: layout.plan on the GPU; stream: a handle");
  m.def("rope", rope, "qkv"_a, "cos"_a, "sin"_a, "heads"_a, "stream"_a = 0,
        "Rotate the first heads of [T, *, d] in place, pairs (i, i + d / 2). cos, sin: float32 [T, d / 2]");
  m.def("rmsnorm", rmsnorm, "x"_a, "weight"_a, "out"_a, "eps"_a, "delta"_a = py::none(), "stream"_a = 0,
        "Add delta to x, then write RMSNorm(x) to out, [T, D]. x, weight: float32; delta: out's dtype");
  m.def("swiglu", swiglu, "gate_up"_a, "out"_a, "stream"_a = 0, "Write silu(gate) * up to out, [T, F]");
  m.def("simd", simd, "name"_a = "", "Select an instruction set unless name is ''. Return the one in use");
}
