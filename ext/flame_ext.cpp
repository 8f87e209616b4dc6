// The Python module: a segment forest's layout, its mask, and attention over it.
#include "cpu.h"
#include "view.h"

#include <cmath>
#include <memory>

void add_elementwise(py::module_& m);  // elementwise.cpp

namespace {

std::shared_ptr<Forest> layout(const py::object& lengths, const py::object& parents, int64_t tile) {
  const std::vector<int64_t> l = integers(lengths, "lengths"), p = integers(parents, "parents");
  py::gil_scoped_release release;
  return std::make_shared<Forest>(l, p, tile);
}

// A read-only numpy view of one of the layout's arrays, which keeps the layout alive.
template <std::vector<int32_t> Forest::*Member>
py::array array_of(const py::object& layout) {
  const auto& values = layout.cast<const Forest&>().*Member;
  py::array_t<int32_t> array((py::ssize_t)values.size(), values.data(), layout);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

// The plan on a GPU: the caller's copy of Layout.plan.
Plan device_plan(const Forest& forest, const py::object& plan, int device) {
  if (plan.is_none()) throw py::value_error("plan is None; on CUDA it must be a copy of layout.plan there");
  return forest.plan(View(plan, "plan", "int32", {(int64_t)forest.buffer.size()}, device).data<int32_t>());
}

void mask_row(const Forest& forest, int64_t q, uint8_t* __restrict out) {
  const int32_t *first = forest.first.data(), *last = forest.last.data(), *depth = forest.depth.data();
  const int32_t q_first = first[q], q_depth = depth[q];
  const int64_t n = forest.segment.size();
  for (int64_t k = 0; k < n; ++k) out[k] = visible(q_first, q_depth, first[k], last[k], depth[k]);
}

void mask(const Forest& forest, const py::object& out_, const py::object& plan, uintptr_t stream) {
  const int64_t n = forest.segment.size();
  const View out = View(out_, "out", "bool or uint8", {n, n}, ANYWHERE, 1).written();
  auto* to = out.data<uint8_t>();
  const int64_t stride = out.stride[0];
  if constexpr (CUDA)
    if (out.device != CPU)
      return cuda_mask(device_plan(forest, plan, out.device), to, stride, {out.device, stream});
  py::gil_scoped_release release;
  over_rows(n, [&](int64_t from, int64_t end) {
    for (int64_t q = from; q < end; ++q) mask_row(forest, q, to + q * stride);
  });
}

void attention(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& out_,
               const Forest& forest, double scale_, const py::object& plan, uintptr_t stream) {
  const int64_t tokens = forest.segment.size();
  const View q(q_, "q", FLOATING, {tokens, ANY, ANY}, ANYWHERE, 1);
  const View k(k_, "k", q.dtype, {tokens, ANY, q.shape[2]}, q.device, 1);
  const View v(v_, "v", q.dtype, k.shape, q.device, 1);
  const View out = View(out_, "out", q.dtype, q.shape, q.device, 1).written();
  const int64_t heads = q.shape[1], kv_heads = k.shape[1], dim = q.shape[2];
  const float scale = (float)scale_;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads)
    q.fail(" has ", heads, " heads, which k's ", kv_heads, " do not divide");
  if (dim < 1 || dim > MAX_DIM) q.fail(" has head_dim ", dim, "; 1 to ", MAX_DIM, " are supported");
  if (!(scale > 0) || !std::isfinite(scale)) throw py::value_error("scale must be a finite float32 above 0");
  const Attention a{q.data<void>(), k.data<void>(), v.data<void>(), out.data<void>(),
                    q.stride[0], k.stride[0], v.stride[0], out.stride[0],
                    (int)heads, (int)kv_heads, (int)dim, scale, q.floating()};
  if constexpr (CUDA)
    if (q.device != CPU)
      return cuda_attention(a, device_plan(forest, plan, q.device), forest.tile_size, {q.device, stream});
  py::gil_scoped_release release;
  cpu_attention(a, forest);
}

}  // namespace

PYBIND11_MODULE(flame_ext, m) {
  m.doc() = "The segment forest: key k is visible to query q iff k's segment is q's or an ancestor of it,\n"
            "and depth(k) <= depth(q).";
  m.attr("cuda") = CUDA;
  py::class_<Forest, std::shared_ptr<Forest>>(m, "Layout", "A forest in a packed row of T tokens.")
      .def_property_readonly("lengths", array_of<&Forest::lengths>, "int32 [S]")
      .def_property_readonly("parents", array_of<&Forest::parents>, "int32 [S], -1 for a root")
      .def_property_readonly("start", array_of<&Forest::start>, "int32 [S + 1], where each segment begins")
      .def_property_readonly("segment", array_of<&Forest::segment>, "int32 [T], segment of each token")
      .def_property_readonly("depth", array_of<&Forest::depth>, "int32 [T], tokens above it in its tree")
      .def_property_readonly("first", array_of<&Forest::first>, "int32 [T], preorder number of its segment")
      .def_property_readonly("last", array_of<&Forest::last>, "int32 [T], of its segment's last descendant")
      .def_property_readonly("plan", array_of<&Forest::buffer>, "int32 [P], what kernels read, for CUDA");
  m.def("layout", layout, py::arg("lengths"), py::arg("parents"), py::arg("tile") = CPU_TILE,
        "Layout of segments with `lengths` tokens, one after the other; parents[i] is -1 or an index < i.\n"
        "tile: how many queries at most share a list of keys; on CUDA 64 // (heads a KV head) is fast.\n"
        "Raises ValueError where lengths and parents make no forest, TypeError where they are no integers.");
  m.def("mask", mask, py::arg("layout"), py::arg("out"), py::arg("plan") = py::none(), py::arg("stream") = 0,
        "Writes the rule into out, bool or uint8 [T, T] on CPU or CUDA: out[q, k] = k is visible to q.\n"
        "plan, stream: as for attention.");
  m.def("attention", attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("layout"),
        py::arg("scale"), py::arg("plan") = py::none(), py::arg("stream") = 0,
        "out = softmax(scale q k^T over the visible keys) v; no shared key is copied, no score matrix made.\n"
        "q, out: [T, H, d]; k, v: [T, Hkv, d], Hkv dividing H; float32 or bfloat16; tokens may lie apart.\n"
        "On CUDA, plan is a copy of layout.plan on q's device, and stream a stream's handle.\n"
        "Raises TypeError or ValueError that names the argument.");
  m.def("simd", use_simd, py::arg("name") = "", "The instruction set in use; with a name, uses that one.");
  add_elementwise(m);
}
