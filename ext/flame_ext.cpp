// The Python module. Nothing of torch is compiled in: a tensor says by itself, in Python, where its numbers
// lie (also bfloat16, which numpy does not know), and the caller's reference keeps them there.
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
constexpr int64_t ANY = -1;  // a size
const std::string FLOATING = "torch.float32 torch.bfloat16";

struct View : Rows {  // of a tensor
  std::string dtype, device;
  Sizes shape;
  bool cuda;

  // Throws ValueError unless dtype and device ("": the CPU or CUDA) are among these, the shape is as wanted,
  // and the tensor is contiguous; with `gaps`, each of its rows.
  View(Tensor tensor, const char* name, const std::string& dtypes, const Sizes& wanted,
       const std::string& place = "", bool gaps = false)
      : Rows{(void*)tensor.attr("data_ptr")().cast<uintptr_t>(), 0}, dtype(py::str(tensor.attr("dtype"))),
        device(py::str(tensor.attr("device"))), shape(tensor.attr("shape").cast<Sizes>()),
        cuda(CUDA && device.rfind("cuda", 0) == 0) {
    const auto strides = tensor.attr("stride")().cast<Sizes>();
    bool right = dtypes.find(dtype) != std::string::npos && shape.size() == wanted.size();
    right &= place.empty() ? device == "cpu" || cuda : device == place;
    int64_t step = 1;
    for (size_t i = shape.size(); right && i-- > 0; step *= shape[i]) {
      right &= wanted[i] == ANY || shape[i] == wanted[i];
      right &= shape[i] < 2 || strides[i] == step || (gaps && i == 0);
    }
    if (cuda)  // kernels move 16 bytes at once, and know bfloat16 alone
      right &= (uintptr_t)at % 16 == 0 && (shape.size() < 2 || strides[0] % 8 == 0) &&
               (dtypes != FLOATING || floating() == BF16);
    if (!right)
      throw py::value_error(py::str("{} is {} {}, strides {}, on {}; expected {} {}, contiguous, on {}")
                                .format(name, dtype, shape, strides, device, dtypes, wanted, place));
    if (!shape.empty()) stride = strides[0];
  }

  Dtype floating() const { return dtype == "torch.float32" ? F32 : BF16; }
};

template <class Task>
void run(const Task& task, const View& out, uintptr_t stream) {  // where `out` lies
  if constexpr (CUDA)
    if (out.cuda) return run_on_cuda(task, stream);
  py::gil_scoped_release release;
  run_on_cpu(task, out.floating());
}

void mask(const Forest& forest, Tensor out_) {
  const int64_t n = forest.tokens;
  auto* out = (uint8_t*)View(out_, "out", "torch.bool", {n, n}, "cpu").at;
  const Token* token = forest.plan(forest.buffer.data()).token;
  for (int64_t q = 0; q < n; ++q)
    for (int64_t k = 0; k < n; ++k) *out++ = visible(token[q], token[k]);
}

void attention(Tensor q_, Tensor k_, Tensor v_, Tensor out_, const Forest& forest, float scale, Tensor plan_,
               uintptr_t stream) {
  const View q(q_, "q", FLOATING, {forest.tokens, ANY, ANY}, "", true);
  const View k(k_, "k", q.dtype, {forest.tokens, ANY, q.shape[2]}, q.device, true);
  const View v(v_, "v", q.dtype, k.shape, q.device, true);
  const View out(out_, "out", q.dtype, q.shape, q.device, true);
  const int heads = (int)q.shape[1], kv_heads = (int)k.shape[1], dim = (int)q.shape[2];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || dim < 1 || dim > MAX_DIM)
    throw py::value_error("k's heads must divide q's, and head_dim is at most " + std::to_string(MAX_DIM));
  Plan plan = forest.plan(forest.buffer.data());
  if (q.cuda) {
    const View copy(plan_, "plan", "torch.int32", {(int64_t)forest.buffer.size()}, q.device);
    plan = forest.plan((int32_t*)copy.at);
  }
  run(Attention{q, k, v, out, heads, kv_heads, dim, scale, plan}, out, stream);
}

void rope(Tensor qkv_, Tensor cos_, Tensor sin_, int64_t heads, uintptr_t stream) {
  const View cos(cos_, "cos", "torch.float32", {ANY, ANY});
  const View sin(sin_, "sin", "torch.float32", cos.shape, cos.device);
  const View qkv(qkv_, "qkv", FLOATING, {cos.shape[0], ANY, 2 * cos.shape[1]}, cos.device, true);
  if (heads < 0 || heads > qkv.shape[1]) throw py::value_error("qkv has fewer heads");
  const int dim = (int)qkv.shape[2];
  run(Rope{qkv, (int)heads, dim, (float*)cos.at, (float*)sin.at, qkv.shape[0]}, qkv, stream);
}

void rmsnorm(Tensor x_, Tensor weight_, Tensor out_, float eps, Tensor delta_, uintptr_t stream) {
  const View x(x_, "x", "torch.float32", {ANY, ANY});
  const View weight(weight_, "weight", "torch.float32", {x.shape[1]}, x.device);
  const View out(out_, "out", FLOATING, x.shape, x.device);
  RmsNorm task{(float*)x.at, nullptr, (float*)weight.at, out.at, x.shape[0], x.shape[1], eps};
  if (!delta_.is_none()) task.delta = View(delta_, "delta", out.dtype, x.shape, x.device).at;
  run(task, out, stream);
}

void swiglu(Tensor gate_up_, Tensor out_, uintptr_t stream) {
  const View out(out_, "out", FLOATING, {ANY, ANY});
  const View gate_up(gate_up_, "gate_up", out.dtype, {out.shape[0], 2 * out.shape[1]}, out.device);
  run(SwiGlu{gate_up.at, out.at, out.shape[0], out.shape[1]}, out, stream);
}

}  // namespace

PYBIND11_MODULE(flame_ext, m) {
  m.doc() = "Kernels over the segment forest. ValueError names the tensor that is wrong.";
  m.attr("cpu") = !simd("").empty();  // are there kernels for this CPU (x86 with AVX2)?
  m.attr("cuda") = CUDA;
  const auto plan = [](const Forest& f) { return py::array_t<int32_t>(f.buffer.size(), f.buffer.data()); };
  py::class_<Forest>(m, "Layout").def_property_readonly("plan", plan, "int32 [P], what kernels read; "
      "begins with [T, 3]: a token's segment, that one's last descendant, the token's depth");
  m.def("layout", &std::make_unique<Forest, const Sizes&, const Sizes&, const int64_t&>, "lengths"_a,
        "parents"_a, "tile"_a = 64, "depth first: parents[i] is -1, i - 1 or an ancestor of that. tile: how "
        "many queries at most share a list of keys; on CUDA at most 64 // (heads a KV head)");
  m.def("mask", mask, "layout"_a, "out"_a, "Writes into bool [T, T]: out[q, k] = k is visible to q");
  m.def("attention", attention, "q"_a, "k"_a, "v"_a, "out"_a, "layout"_a, "scale"_a, "plan"_a = py::none(),
        "stream"_a = 0, "q, out: [T, H, d]; k, v: [T, Hkv, d]; float32 or bfloat16; tokens may lie apart. "
        "On CUDA: bfloat16, d 64 or 128; plan is a copy of layout.plan there, stream a stream's handle");
  m.def("rope", rope, "qkv"_a, "cos"_a, "sin"_a, "heads"_a, "stream"_a = 0,
        "Rotates the first heads of [T, *, d] in place, pairs (i, i + d / 2). cos, sin: float32 [T, d / 2]");
  m.def("rmsnorm", rmsnorm, "x"_a, "weight"_a, "out"_a, "eps"_a, "delta"_a = py::none(), "stream"_a = 0,
        "x += delta in place if given, then the norm, [T, D]. x, weight float32; out, delta of one type");
  m.def("swiglu", swiglu, "gate_up"_a, "out"_a, "stream"_a = 0, "out [T, F] = silu(gate) * up, of [T, 2 F]");
  m.def("simd", simd, "name"_a = "", "The CPU's instruction set in use; with a name, uses that one");
}
