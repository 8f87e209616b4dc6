// The module's element-wise functions: of a decoder block what is neither attention nor a matrix product, and
// the store's reader.
#include "cpu.h"
#include "view.h"

namespace {

// Runs a task over all rows, where `out` lies: on the CPU by one of two kernels, by dtype.
template <class Task>
void run(const Task& task, void (*const kernels[2])(const Task&, int64_t, int64_t), const View& out,
         uintptr_t stream) {
  const int64_t rows = out.shape[0];
  if constexpr (CUDA)
    if (out.device != CPU) return cuda_rows(task, out.floating(), rows, {out.device, stream});
  const auto kernel = kernels[out.floating()];
  py::gil_scoped_release release;
  over_rows(rows, [&](int64_t from, int64_t to) { kernel(task, from, to); });
}

void rope(const py::object& qkv_, const py::object& cos_, const py::object& sin_, int64_t heads,
          uintptr_t stream) {
  const View qkv = View(qkv_, "qkv", FLOATING, {ANY, ANY, ANY}, ANYWHERE, 1).written();
  const int64_t tokens = qkv.shape[0], dim = qkv.shape[2];
  if (dim % 2) qkv.fail(" has an odd head_dim, ", dim);
  if (heads < 0 || heads > qkv.shape[1]) qkv.fail(" has ", qkv.shape[1], " heads, but heads is ", heads);
  const View cos(cos_, "cos", "float32", {tokens, dim / 2}, qkv.device);
  const View sin(sin_, "sin", "float32", {tokens, dim / 2}, qkv.device);
  const Rope task{qkv.data<void>(), qkv.stride[0], (int)heads, (int)dim, cos.data<float>(),
                  sin.data<float>()};
  run(task, cpu().rope, qkv, stream);
}

void rmsnorm(const py::object& x_, const py::object& weight_, const py::object& out_, double eps,
             const py::object& delta_, uintptr_t stream) {
  const View x = View(x_, "x", "float32", {ANY, ANY}, ANYWHERE).written();
  const View weight(weight_, "weight", "float32", {x.shape[1]}, x.device);
  const View out = View(out_, "out", FLOATING, x.shape, x.device).written();
  RmsNorm task{x.data<float>(), nullptr, weight.data<float>(), out.data<void>(), x.shape[1], (float)eps};
  if (!delta_.is_none()) task.delta = View(delta_, "delta", out.dtype, x.shape, x.device).data<void>();
  run(task, cpu().rmsnorm, out, stream);
}

void swiglu(const py::object& gate_up_, const py::object& out_, uintptr_t stream) {
  const View gate_up(gate_up_, "gate_up", FLOATING, {ANY, ANY}, ANYWHERE);
  const int64_t tokens = gate_up.shape[0], width = gate_up.shape[1] / 2;
  if (gate_up.shape[1] % 2) gate_up.fail(" has an odd width, ", gate_up.shape[1]);
  const View out = View(out_, "out", gate_up.dtype, {tokens, width}, gate_up.device).written();
  const SwiGlu task{gate_up.data<void>(), out.data<void>(), width};
  run(task, cpu().swiglu, out, stream);
}

void unit_vectors(const py::object& vectors_, const py::object& index_, const py::object& out_,
                  const py::object& scales_, const py::object& statistics_) {
  const bool int8 = !scales_.is_none();
  const View vectors(vectors_, "vectors", int8 ? "int8" : "float16", {ANY, ANY, ANY});
  const int64_t rows = vectors.shape[0], columns = vectors.shape[1], width = vectors.shape[2];
  const std::vector<int64_t> index = integers(index_, "index");
  for (const int64_t i : index)
    if (i < 0 || i >= rows * columns)
      throw py::value_error(text("index has ", i, ", but there are ", rows * columns, " vectors"));
  const View out = View(out_, "out", "float32", {(int64_t)index.size(), width}).written();
  UnitVectors task{vectors.data<void>(), nullptr, nullptr, columns, width, index.data(), out.data<float>()};
  if (int8) task.scales = View(scales_, "scales", "float32", {rows, columns}).data<float>();
  if (int8) task.statistics = View(statistics_, "statistics", "float32", {2, columns, width}).data<float>();
  const auto kernel = cpu().unit_vectors[int8];
  py::gil_scoped_release release;
  over_rows(out.shape[0], [&](int64_t from, int64_t to) { kernel(task, from, to); });
}

}  // namespace

void add_elementwise(py::module_& m) {
  m.def("rope", rope, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("heads"),
        py::arg("stream") = 0,
        "Rotates the first `heads` heads of qkv [T, *, d] in place, pairs (i, i + d / 2).\n"
        "cos, sin: float32 [T, d / 2]. stream: on CUDA, a stream's handle.");
  m.def("rmsnorm", rmsnorm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("eps"),
        py::arg("delta") = py::none(), py::arg("stream") = 0,
        "x += delta in place if given, then out = x / sqrt(mean(x^2) + eps) * weight, all [T, D].\n"
        "x, weight float32; out and delta both float32 or both bfloat16. stream: as for rope.");
  m.def("swiglu", swiglu, py::arg("gate_up"), py::arg("out"), py::arg("stream") = 0,
        "out [T, F] = silu(gate) * up, gate_up = [gate | up] [T, 2 F], computed in float32.\n"
        "stream: as for rope.");
  m.def("unit_vectors", unit_vectors, py::arg("vectors"), py::arg("index"), py::arg("out"),
        py::arg("scales") = py::none(), py::arg("statistics") = py::none(),
        "out [n, D] float32 = the vectors number index [n] of a store, normalised. CPU.\n"
        "vectors: float16 [N, M, D], or int8 with float32 scales [N, M] and statistics [2, M, D]:\n"
        "mean + deviation * scale * integers.");
}
