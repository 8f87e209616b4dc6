// Python bindings of the segment forest: argument checks, DLPack, numpy. Nothing of torch is compiled in: tensors are asked
// for their __dlpack__() and read through the structs below (DLPack 0.x, what every library exports by default).
#include "forest.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

namespace py = pybind11;

namespace {

// ---- DLPack -----------------------------------------------------------------------------------------------------------

struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;  // strides count elements; null means contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
enum { CPU = 1, CUDA = 2, PINNED = 3 };

// A borrowed view of a caller's tensor; the capsule keeps it alive and returns it when the view goes.
struct View {
  std::string name;
  py::object capsule;
  void* data;
  int device;  // -1 for CPU, else the CUDA device
  std::string dtype;
  std::vector<int64_t> shape, stride;

  View(const py::object& object, const char* name) : name(name) {
    if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__"))
      throw py::type_error(this->name + " must be a torch tensor or numpy array, not " + (std::string)py::str(py::type::of(object).attr("__name__")));
    try {
      const int type = object.attr("__dlpack_device__")().cast<py::tuple>()[0].cast<int>();
      // stream = -1: the producer adds no synchronisation; our kernels run on the stream that the caller names.
      capsule = type == CUDA ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
    } catch (py::error_already_set& error) {
      throw py::type_error(this->name + " cannot be shared: " + error.what());
    }
    auto* managed = (DLManagedTensor*)PyCapsule_GetPointer(capsule.ptr(), "dltensor");
    if (!managed) throw py::error_already_set();
    const DLTensor& t = managed->tensor;
    if (t.device.type != CPU && t.device.type != CUDA && t.device.type != PINNED)
      throw py::value_error(this->name + " is on neither CPU nor CUDA (DLPack device type " + std::to_string(t.device.type) + ")");
    device = t.device.type == CUDA ? t.device.id : -1;
    data = (char*)t.data + t.byte_offset;
    const char* const kinds[] = {"int", "uint", "float", "pointer", "bfloat", "complex", "bool"};
    dtype = (t.dtype.code < 7 && t.dtype.lanes == 1 ? kinds[t.dtype.code] : "unknown") + std::to_string(t.dtype.bits);
    shape.assign(t.shape, t.shape + t.ndim);
    stride.resize(t.ndim);
    for (int64_t i = t.ndim - 1, step = 1; i >= 0; step *= shape[i--]) stride[i] = t.strides ? t.strides[i] : step;
  }

  std::string shown() const {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }
  // Checks the shape (-1: any) and that the dimensions from `contiguous_from` on are contiguous.
  View& is(const std::vector<int64_t>& wanted, size_t contiguous_from, const char* letters) {
    bool same = shape.size() == wanted.size();
    for (size_t i = 0; same && i < wanted.size(); ++i) same = wanted[i] < 0 || wanted[i] == shape[i];
    if (!same) throw py::value_error(name + " has shape " + shown() + ", expected " + letters);
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > contiguous_from; step *= shape[i])
      if (shape[i] > 1 && stride[i] != step) throw py::value_error(name + " is not contiguous in its last " + std::to_string(shape.size() - contiguous_from) + " dimension(s)");
    return *this;
  }
  Dtype floating() const {
    if (dtype != "float32" && dtype != "bfloat16") throw py::type_error(name + " is " + dtype + "; float32 and bfloat16 are supported");
    return dtype == "float32" ? Dtype::f32 : Dtype::bf16;
  }
  View& float32() {
    if (dtype != "float32") throw py::type_error(name + " is " + dtype + ", expected float32");
    return *this;
  }
  View& like(const View& other) {
    if (dtype != other.dtype) throw py::type_error(name + " is " + dtype + ", but " + other.name + " is " + other.dtype);
    return on(other);
  }
  View& on(const View& other) {
    if (device != other.device) throw py::value_error(name + " and " + other.name + " are on different devices");
    return *this;
  }
  View& written() {  // rows that overlap would make the result depend on the order of threads
    int64_t row = 1;
    for (size_t i = 1; i < shape.size(); ++i) row *= shape[i];
    if (!shape.empty() && shape[0] > 1 && std::abs(stride[0]) < row) throw py::value_error(name + " has rows that overlap in memory");
    return *this;
  }
  void on_cpu(const char* instead) const {
    if (device >= 0) throw py::value_error(name + " is on CUDA; this function is for the CPU, on CUDA use " + instead);
  }
  void on_cuda() const {
#ifndef FLAME_CUDA
    throw py::value_error(name + " is on CUDA, but flame_ext was built without it; rebuild where nvcc is found");
#endif
  }
};

// A one-dimensional list of integers (list, numpy, torch), refused where int64 would not hold it exactly.
std::vector<int64_t> integers(py::object object, const char* name) {
  if (py::hasattr(object, "cpu")) object = object.attr("cpu")();  // a torch tensor, wherever it is
  const py::array array = py::module_::import("numpy").attr("asarray")(object);
  if (array.ndim() != 1) throw py::value_error(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions, expected 1");
  if (array.size() == 0) return {};
  if (array.dtype().kind() != 'i' && array.dtype().kind() != 'u')
    throw py::type_error(std::string(name) + " is " + (std::string)py::str(array.dtype()) + ", expected integers");
  if (array.dtype().kind() == 'u' && array.itemsize() == 8 && array.attr("max")().cast<uint64_t>() > INT64_MAX)
    throw py::value_error(std::string(name) + " has values beyond int64");
  const auto exact = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
  return {exact.data(), exact.data() + exact.size()};
}

std::vector<int32_t> integers32(const py::object& object, const char* name) {
  const std::vector<int64_t> wide = integers(object, name);
  for (size_t i = 0; i < wide.size(); ++i)
    if (wide[i] < INT32_MIN || wide[i] > INT32_MAX)
      throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(wide[i]) + " is beyond int32");
  return {wide.begin(), wide.end()};
}

// ---- Functions --------------------------------------------------------------------------------------------------------

std::shared_ptr<Forest> layout(const py::object& lengths, const py::object& parents) {
  const auto l = integers32(lengths, "lengths"), p = integers32(parents, "parents");
  py::gil_scoped_release release;
  return std::make_shared<Forest>(l, p);
}

void mask(const Forest& forest, const py::object& out_, uintptr_t stream) {
  View out(out_, "out");
  const int64_t n = forest.tokens();
  out.is({n, n}, 1, "[T, T]").written();
  if (out.dtype != "bool8" && out.dtype != "uint8") throw py::type_error("out is " + out.dtype + ", expected bool or uint8");
  if (out.device >= 0) out.on_cuda();
  py::gil_scoped_release release;
  if (out.device < 0) return cpu_mask(forest, (uint8_t*)out.data, out.stride[0]);
#ifdef FLAME_CUDA
  cuda_mask(forest, (uint8_t*)out.data, out.stride[0], out.device, stream);
#endif
}

void attention(const py::object& q_, const py::object& k_, const py::object& v_, const py::object& out_, const Forest& forest, double scale,
                      const py::object& rows, uintptr_t stream) {
  View q(q_, "q"), k(k_, "k"), v(v_, "v"), out(out_, "out");
  const int64_t tokens = forest.tokens();
  std::vector<int64_t> row_list;
  if (!rows.is_none()) row_list = integers(rows, "rows");
  q.is({rows.is_none() ? tokens : (int64_t)row_list.size(), -1, -1}, 1, rows.is_none() ? "[T, H, d] of the layout" : "[len(rows), H, d]");
  k.is({tokens, -1, q.shape[2]}, 1, "[T, Hkv, d] of the layout and q");
  v.is({tokens, k.shape[1], q.shape[2]}, 1, "that of k").like(q);
  out.is(q.shape, 1, "that of q").like(q).written();
  k.like(q);
  Attention a{q.data, k.data, v.data, out.data, q.stride[0], k.stride[0], v.stride[0], out.stride[0], (int)q.shape[1], (int)k.shape[1], (int)q.shape[2], (float)scale, q.floating()};
  if (q.shape[1] < 1 || k.shape[1] < 1 || q.shape[1] % k.shape[1])
    throw py::value_error("q has " + std::to_string(q.shape[1]) + " heads, which k's " + std::to_string(k.shape[1]) + " do not divide");
  if (q.shape[2] < 1 || q.shape[2] > MAX_DIM) throw py::value_error("q has head_dim " + std::to_string(q.shape[2]) + "; 1 to " + std::to_string(MAX_DIM) + " are supported");
  if (!(scale > 0) || !std::isfinite(a.scale)) throw py::value_error("scale must be positive and finite");
  if (q.device >= 0) q.on_cuda();
  py::gil_scoped_release release;
  const int share = a.heads / a.kv_heads;
#ifdef FLAME_CUDA
  if (q.device >= 0) {
    Tiles some;
    if (!rows.is_none()) some = forest.tiles(&row_list, cuda_tile(share));
    return cuda_attention(a, forest, rows.is_none() ? nullptr : &some, q.device, stream);
  }
#endif
  (void)share, (void)stream;
  if (rows.is_none()) cpu_attention(a, forest, forest.all_tiles(CPU_TILE));
  else cpu_attention(a, forest, forest.tiles(&row_list, CPU_TILE));
}

void rope(const py::object& qkv_, const py::object& cos_, const py::object& sin_, int64_t heads) {
  View qkv(qkv_, "qkv"), cos(cos_, "cos"), sin(sin_, "sin");
  qkv.on_cpu("torch");
  const Dtype dtype = qkv.is({-1, -1, -1}, 1, "[T, heads, d]").written().floating();
  if (qkv.shape[2] % 2) throw py::value_error("qkv has an odd head_dim, " + std::to_string(qkv.shape[2]));
  if (heads < 0 || heads > qkv.shape[1]) throw py::value_error("heads is " + std::to_string(heads) + ", but qkv has " + std::to_string(qkv.shape[1]));
  cos.is({qkv.shape[0], qkv.shape[2] / 2}, 0, "[T, d / 2] of qkv").on(qkv).float32();
  sin.is(cos.shape, 0, "that of cos").on(qkv).float32();
  py::gil_scoped_release release;
  cpu_rope(qkv.data, dtype, qkv.shape[0], qkv.stride[0], (int)heads, (int)qkv.shape[2], (const float*)cos.data, (const float*)sin.data);
}

void rmsnorm(const py::object& x_, const py::object& weight_, const py::object& out_, double eps, const py::object& delta_) {
  View x(x_, "x"), weight(weight_, "weight"), out(out_, "out");
  x.on_cpu("torch");
  x.is({-1, -1}, 0, "[T, D]").float32();
  weight.is({x.shape[1]}, 0, "[D] of x").on(x).float32();
  const Dtype out_dtype = out.is(x.shape, 0, "that of x").on(x).floating();
  std::unique_ptr<View> delta;
  if (!delta_.is_none()) delta = std::make_unique<View>(delta_, "delta");
  const Dtype delta_dtype = delta ? delta->is(x.shape, 0, "that of x").on(x).floating() : Dtype::f32;
  py::gil_scoped_release release;
  cpu_rmsnorm((float*)x.data, delta ? delta->data : nullptr, delta_dtype, (const float*)weight.data, out.data, out_dtype, x.shape[0], x.shape[1], (float)eps);
}

void swiglu(const py::object& gate_up_, const py::object& out_) {
  View gate_up(gate_up_, "gate_up"), out(out_, "out");
  gate_up.on_cpu("torch");
  const Dtype dtype = gate_up.is({-1, -1}, 0, "[T, 2 F]").floating();
  if (gate_up.shape[1] % 2) throw py::value_error("gate_up has an odd width, " + std::to_string(gate_up.shape[1]));
  out.is({gate_up.shape[0], gate_up.shape[1] / 2}, 0, "[T, F] of gate_up").like(gate_up);
  py::gil_scoped_release release;
  cpu_swiglu(gate_up.data, out.data, dtype, out.shape[0], out.shape[1]);
}

// A numpy array's data; not by DLPack, which cannot say that memory is read-only, as a mapped store is.
const void* whole(const py::array& array, const char* name, const char* dtype, const std::vector<int64_t>& shape) {
  if ((std::string)py::str(array.dtype()) != dtype) throw py::type_error(std::string(name) + " is " + (std::string)py::str(array.dtype()) + ", expected " + dtype);
  if (std::vector<int64_t>(array.shape(), array.shape() + array.ndim()) != shape) throw py::value_error(std::string(name) + " does not have the shape that vectors [N, M, D] imply");
  if (!(array.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " is not contiguous");
  return array.data();
}

void unit_vectors(const py::array& vectors, const py::object& index_, const py::object& out_, const py::object& scales, const py::object& statistics) {
  if (vectors.ndim() != 3) throw py::value_error("vectors has " + std::to_string(vectors.ndim()) + " dimensions, expected [N, M, D]");
  const int64_t N = vectors.shape(0), M = vectors.shape(1), D = vectors.shape(2);
  Store store{whole(vectors, "vectors", scales.is_none() ? "float16" : "int8", {N, M, D}), nullptr, nullptr, M, D};
  if (!scales.is_none()) {
    store.scales = (const float*)whole(scales.cast<py::array>(), "scales", "float32", {N, M});
    store.statistics = (const float*)whole(statistics.cast<py::array>(), "statistics", "float32", {2, M, D});
  }
  const std::vector<int64_t> index = integers(index_, "index");
  for (const int64_t i : index)
    if (i < 0 || i >= N * M) throw py::value_error("index has " + std::to_string(i) + ", but there are " + std::to_string(N * M) + " vectors");
  View out(out_, "out");
  out.on_cpu("torch");
  out.is({(int64_t)index.size(), D}, 0, "[len(index), D]").float32();
  py::gil_scoped_release release;
  cpu_unit_vectors(store, index.data(), (int64_t)index.size(), (float*)out.data);
}

// A read-only numpy view of one of the layout's arrays, which keeps the layout alive.
template <std::vector<int32_t> Forest::*Member>
py::array array_of(const py::object& self) {
  const auto& values = self.cast<const Forest&>().*Member;
  py::array_t<int32_t> array({(py::ssize_t)values.size()}, {(py::ssize_t)sizeof(int32_t)}, values.data(), self);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

}  // namespace

PYBIND11_MODULE(flame_ext, m) {
  m.doc() = "The segment forest: key k is visible to query q iff k's segment is q's or an ancestor of it, and depth(k) <= depth(q).";
#ifdef FLAME_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  py::class_<Forest, std::shared_ptr<Forest>>(m, "Layout", "A forest laid out in one packed row of T tokens; S segments, R runs. Made by layout().")
      .def_property_readonly("lengths", array_of<&Forest::length>, "int32 [S]")
      .def_property_readonly("parents", array_of<&Forest::parent>, "int32 [S], -1 for a root")
      .def_property_readonly("start", array_of<&Forest::start>, "int32 [S + 1], offset of each segment in the packed row")
      .def_property_readonly("segment", array_of<&Forest::segment>, "int32 [T], segment of each token")
      .def_property_readonly("depth", array_of<&Forest::depth>, "int32 [T], tokens before it from its root down")
      .def_property_readonly("first", array_of<&Forest::first>, "int32 [T], preorder number of the token's segment")
      .def_property_readonly("last", array_of<&Forest::last>, "int32 [T], preorder number of that segment's last descendant")
      .def_property_readonly("range_ptr", array_of<&Forest::range_ptr>, "int32 [S + 1], segment s has the runs range_ptr[s]..range_ptr[s + 1]")
      .def_property_readonly("range_start", array_of<&Forest::range_start>, "int32 [R], first packed token of each run: ancestors from the root, then the segment itself")
      .def_property_readonly("range_stop", array_of<&Forest::range_stop>, "int32 [R], end of each run; for a query at i, the last run ends at i + 1");
  m.def("layout", layout, py::arg("lengths"), py::arg("parents"),
        "Layout of segments with `lengths` tokens each, one after the other; parents[i] is -1 or an index < i.\n"
        "Raises ValueError where lengths and parents make no forest, TypeError where they are no integers.");
  m.def("mask", mask, py::arg("layout"), py::arg("out"), py::arg("stream") = 0, "Writes the rule into out, bool or uint8 [T, T] on CPU or CUDA: out[q, k] = k is visible to q.");
  m.def("attention", attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("layout"), py::arg("scale"), py::arg("rows") = py::none(), py::arg("stream") = 0,
        "out = softmax(scale q k^T over the visible keys) v, without copying a shared key or forming the score matrix.\n"
        "q, out: [Q, H, d]; k, v: [T, Hkv, d], Hkv dividing H; float32 or bfloat16, CPU or CUDA; the stride between tokens is free.\n"
        "rows: packed index of each query, any order; None means that query i is token i. stream: CUDA stream handle.\n"
        "Raises TypeError or ValueError that names the argument.");
  m.def("rope", rope, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("heads"),
        "Rotates the first `heads` heads of qkv [T, *, d] in place, pairs (i, i + d / 2); cos, sin float32 [T, d / 2]. CPU.");
  m.def("rmsnorm", rmsnorm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("eps"), py::arg("delta") = py::none(),
        "x += delta in place if given, then out = x / sqrt(mean(x^2) + eps) * weight; x, weight float32, out and delta float32 or bfloat16, [T, D]. CPU.");
  m.def("swiglu", swiglu, py::arg("gate_up"), py::arg("out"), "out [T, F] = silu(gate) * up, gate_up = [gate | up] [T, 2 F], computed in float32. CPU.");
  m.def("unit_vectors", unit_vectors, py::arg("vectors"), py::arg("index"), py::arg("out"), py::arg("scales") = py::none(), py::arg("statistics") = py::none(),
        "out [n, D] float32 = the vectors number index [n] of a store, normalised: numpy float16 [N, M, D] as it is, or int8 with\n"
        "scales [N, M] and statistics [2, M, D], float32: mean + deviation * scale * integers. CPU.");
  m.def("simd", cpu_simd, py::arg("name") = "", "The instruction set in use on the CPU; with a name, uses that one (for tests).");
}
