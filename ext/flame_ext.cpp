// The Python module: a segment forest's layout, its mask, attention over it, and the element-wise parts of a
// decoder block.
//
// Nothing of torch is compiled in: a tensor says by itself, in Python, where its numbers lie (also bfloat16,
// which numpy does not know), and the caller's reference keeps them there.
#include "tasks.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

namespace py = pybind11;

namespace {

using Sizes = std::vector<int64_t>;
constexpr int64_t ANY = -1;  // a size

std::string shown(const Sizes& sizes) {
  std::string all;
  for (int64_t n : sizes) all += (all.empty() ? "" : ", ") + (n == ANY ? "any" : text(n));
  return "[" + all + "]";
}

struct View {  // of a tensor
  std::string dtype, device;
  Sizes shape;
  int64_t stride = 0;  // elements between rows
  uintptr_t address;

  // Throws ValueError, which names the tensor, unless its dtype is one of these words, its shape and device
  // ("": the CPU or CUDA) are the wanted ones and it is contiguous; with `gaps`, unless its rows are.
  View(const py::object& tensor, const char* name, const std::string& dtypes, const Sizes& wanted,
       const std::string& place = "", bool gaps = false)
      : dtype(std::string(py::str(tensor.attr("dtype"))).substr(6)),  // "torch."
        device(py::str(tensor.attr("device"))),
        shape(tensor.attr("shape").cast<Sizes>()),
        address(tensor.attr("data_ptr")().cast<uintptr_t>()) {
    const auto strides = tensor.attr("stride")().cast<Sizes>();
    bool right = (" " + dtypes + " ").find(" " + dtype + " ") != std::string::npos;
    right &= place.empty() ? device == "cpu" || on_gpu() : device == place;
    right &= shape.size() == wanted.size();
    int64_t step = 1;
    for (size_t i = shape.size(); right && i-- > 0; step *= shape[i]) {
      right &= wanted[i] == ANY || shape[i] == wanted[i];
      right &= shape[i] < 2 || strides[i] == step || (gaps && i == 0);
    }
    if (!right)
      throw py::value_error(text(name, " is ", dtype, " ", shown(shape), ", strides ", shown(strides),
                                 ", on ", device, "; expected ", dtypes, " ", shown(wanted),
                                 ", contiguous, on ", !place.empty() ? place : CUDA ? "cpu or cuda" : "cpu"));
    if (!shape.empty()) stride = strides[0];
  }

  bool on_gpu() const { return CUDA && device.rfind("cuda", 0) == 0; }
  Dtype floating() const { return dtype == "float32" ? F32 : BF16; }
  template <class T>
  T* data() const { return (T*)address; }
};

const char* const FLOATING = "float32 bfloat16";

// ---- The forest -------------------------------------------------------------------------------------------

// A read-only numpy view of one of the layout's arrays, which keeps the layout alive.
template <std::vector<int32_t> Forest::*Member>
py::array array_of(const py::object& layout) {
  const auto& values = layout.cast<const Forest&>().*Member;
  py::array_t<int32_t> array((py::ssize_t)values.size(), values.data(), layout);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

void mask(const Forest& forest, const py::object& out_) {
  const int64_t n = forest.segment.size();
  auto* out = View(out_, "out", "bool", {n, n}, "cpu").data<uint8_t>();
  const int32_t *first = forest.first.data(), *last = forest.last.data(), *depth = forest.depth.data();
  for (int64_t q = 0; q < n; ++q)
    for (int64_t k = 0; k < n; ++k) *out++ = visible(first[q], depth[q], first[k], last[k], depth[k]);
}

void attention(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& out_,
               const Forest& forest, float scale, const py::object& plan_, uintptr_t stream) {
  const int64_t tokens = forest.segment.size();
  const View q(q_, "q", FLOATING, {tokens, ANY, ANY}, "", true);
  const View k(k_, "k", q.dtype, {tokens, ANY, q.shape[2]}, q.device, true);
  const View v(v_, "v", q.dtype, k.shape, q.device, true);
  const View out(out_, "out", q.dtype, q.shape, q.device, true);
  const int heads = (int)q.shape[1], kv_heads = (int)k.shape[1], dim = (int)q.shape[2];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || dim < 1 || dim > MAX_DIM)
    throw py::value_error(text("q has ", heads, " heads of ", dim, ", k has ", kv_heads,
                               ": they must divide q's, and head_dim is at most ", MAX_DIM));
  const Attention a{q.data<void>(), k.data<void>(), v.data<void>(), out.data<void>(),
                    q.stride, k.stride, v.stride, out.stride, heads, kv_heads, dim, scale};
  if constexpr (CUDA)
    if (q.on_gpu()) {
      View(out_, "out", "bfloat16", out.shape, q.device, true);
      const View plan(plan_, "plan", "int32", {(int64_t)forest.buffer.size()}, q.device);
      return cuda_attention(a, forest.plan(plan.data<int32_t>()), forest.tile_size, stream);
    }
  py::gil_scoped_release release;
  cpu_attention(a, q.floating(), forest);
}

// ---- Element-wise parts -----------------------------------------------------------------------------------

template <class Task>
void run(const Task& task, const View& out, uintptr_t stream) {  // over all rows, where `out` lies
  if constexpr (CUDA)
    if (out.on_gpu()) {
      if (out.floating() != BF16) throw py::value_error("on CUDA the kernels write bfloat16");
      return cuda_rows(task, out.shape[0], stream);
    }
  py::gil_scoped_release release;
  cpu_rows(task, out.floating(), out.shape[0]);
}

void rope(const py::object& qkv_, const py::object& cos_, const py::object& sin_, int64_t heads,
          uintptr_t stream) {
  const View cos(cos_, "cos", "float32", {ANY, ANY});
  const View sin(sin_, "sin", "float32", cos.shape, cos.device);
  const View qkv(qkv_, "qkv", FLOATING, {cos.shape[0], ANY, 2 * cos.shape[1]}, cos.device, true);
  if (heads < 0 || heads > qkv.shape[1])
    throw py::value_error(text("qkv has ", qkv.shape[1], " heads, but heads is ", heads));
  run(Rope{qkv.data<void>(), qkv.stride, (int)heads, (int)qkv.shape[2], cos.data<float>(), sin.data<float>()},
      qkv, stream);
}

void rmsnorm(const py::object& x_, const py::object& weight_, const py::object& out_, float eps,
             const py::object& delta_, uintptr_t stream) {
  const View x(x_, "x", "float32", {ANY, ANY});
  const View weight(weight_, "weight", "float32", {x.shape[1]}, x.device);
  const View out(out_, "out", FLOATING, x.shape, x.device);
  RmsNorm task{x.data<float>(), nullptr, weight.data<float>(), out.data<void>(), x.shape[1], eps};
  if (!delta_.is_none()) task.delta = View(delta_, "delta", out.dtype, x.shape, x.device).data<void>();
  run(task, out, stream);
}

void swiglu(const py::object& gate_up_, const py::object& out_, uintptr_t stream) {
  const View out(out_, "out", FLOATING, {ANY, ANY});
  const View gate_up(gate_up_, "gate_up", out.dtype, {out.shape[0], 2 * out.shape[1]}, out.device);
  run(SwiGlu{gate_up.data<void>(), out.data<void>(), out.shape[1]}, out, stream);
}

}  // namespace

PYBIND11_MODULE(flame_ext, m) {
  m.doc() = "The segment forest: key k is visible to query q iff k's segment is q's or an ancestor of it,\n"
            "and depth(k) <= depth(q). Tensors are torch's. ValueError names the one that is wrong.";
  m.attr("cpu") = !simd("").empty();  // are there kernels for this CPU (x86 with AVX2)?
  m.attr("cuda") = CUDA;
  py::class_<Forest, std::shared_ptr<Forest>>(m, "Layout", "A forest in a packed row of T tokens.")
      .def_property_readonly("segment", array_of<&Forest::segment>, "int32 [T], segment of each token")
      .def_property_readonly("depth", array_of<&Forest::depth>, "int32 [T], tokens above it in its tree")
      .def_property_readonly("first", array_of<&Forest::first>, "int32 [T], preorder number of its segment")
      .def_property_readonly("last", array_of<&Forest::last>, "int32 [T], of its segment's last descendant")
      .def_property_readonly("plan", array_of<&Forest::buffer>, "int32 [P], what kernels read, for CUDA");
  m.def("layout", &std::make_shared<Forest, const Sizes&, const Sizes&, const int64_t&>, py::arg("lengths"),
        py::arg("parents"), py::arg("tile") = 64,
        "Layout of segments with `lengths` tokens, one after the other; parents[i] is -1 or an index < i.\n"
        "tile: how many queries at most share a list of keys; on CUDA at most 64 // (heads a KV head).");
  m.def("mask", mask, py::arg("layout"), py::arg("out"),
        "Writes the rule into out, bool [T, T]: out[q, k] = k is visible to q.");
  m.def("attention", attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("layout"),
        py::arg("scale"), py::arg("plan") = py::none(), py::arg("stream") = 0,
        "out = softmax(scale q k^T over the visible keys) v; no shared key is copied, no score matrix made.\n"
        "q, out: [T, H, d]; k, v: [T, Hkv, d], Hkv dividing H; float32 or bfloat16; tokens may lie apart.\n"
        "On CUDA: bfloat16, d 64 or 128; plan is a copy of layout.plan there, stream a stream's handle.");
  m.def("rope", rope, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("heads"), py::arg("stream") = 0,
        "Rotates the first `heads` heads of qkv [T, *, d] in place, pairs (i, i + d / 2).\n"
        "cos, sin: float32 [T, d / 2]. On CUDA, here and below: bfloat16, rows of whole 16 bytes.");
  m.def("rmsnorm", rmsnorm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("eps"),
        py::arg("delta") = py::none(), py::arg("stream") = 0,
        "x += delta in place if given, then out = x / sqrt(mean(x^2) + eps) * weight, all [T, D].\n"
        "x, weight float32; out and delta both float32 or both bfloat16.");
  m.def("swiglu", swiglu, py::arg("gate_up"), py::arg("out"), py::arg("stream") = 0,
        "out [T, F] = silu(gate) * up, gate_up = [gate | up] [T, 2 F], computed in float32.");
  m.def("simd", simd, py::arg("name") = "", "The CPU's instruction set in use; with a name, uses that one.");
}
