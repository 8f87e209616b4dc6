// A caller's array, looked at once: every function of the module gets its arrays through here.
//
// Nothing of torch is compiled in: a tensor says by itself, in Python, where its numbers lie (also bfloat16,
// which numpy does not know), and the caller's reference keeps them there.
#pragma once
#include "tasks.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

constexpr int64_t ANY = -1;             // a size
constexpr int CPU = -1, ANYWHERE = -2;  // devices; else the number of a CUDA device
const std::string FLOATING = "float32 or bfloat16";

class View {
 public:
  std::string dtype;
  int device = CPU;
  std::vector<int64_t> shape, stride;  // stride counts elements

  // Throws TypeError or ValueError, which name the array, where it is none, of another dtype than `dtypes`
  // (words), of another shape than `wanted`, not contiguous from dimension `contiguous` on, or on another
  // device than `on`.
  View(const py::object& object, const char* name, const std::string& dtypes,
       const std::vector<int64_t>& wanted, int on = CPU, size_t contiguous = 0)
      : name(name) {
    if (py::isinstance<py::array>(object)) look_at_array(py::reinterpret_borrow<py::array>(object));
    else if (py::hasattr(object, "data_ptr")) look_at_tensor(object);
    else throw py::type_error(text(name, " must be a torch tensor or numpy array"));
    if ((" " + dtypes + " ").find(" " + dtype + " ") == std::string::npos)
      throw py::type_error(text(name, " is ", dtype, ", expected ", dtypes));
    bool same = shape.size() == wanted.size();
    for (size_t i = 0; same && i < wanted.size(); ++i) same = wanted[i] == ANY || wanted[i] == shape[i];
    if (!same) fail(" has shape ", shown(shape), ", expected ", shown(wanted));
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > contiguous; step *= shape[i])
      if (shape[i] > 1 && stride[i] != step) fail(" is not contiguous");
    if (on != ANYWHERE && on != device) fail(" is on ", place(device), ", expected on ", place(on));
    if (device != CPU && !CUDA)
      fail(" is on CUDA, but flame_ext was built without it; rebuild where nvcc is found");
  }

  // To be written to. Rows that overlap would make the result depend on the order of threads.
  const View& written() const {
    int64_t row = 1;
    for (size_t i = 1; i < shape.size(); ++i) row *= shape[i];
    if (!shape.empty() && shape[0] > 1 && std::abs(stride[0]) < row) fail(" has rows that overlap in memory");
    if (!writeable) fail(" is read-only");
    return *this;
  }

  template <class T>
  T* data() const { return (T*)address; }

  Dtype floating() const { return dtype == "float32" ? F32 : BF16; }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const { throw py::value_error(text(name, parts...)); }

 private:
  std::string name;
  void* address;
  bool writeable = true;

  void look_at_array(const py::array& array) {
    const py::ssize_t size = std::max<py::ssize_t>(1, array.itemsize());
    address = const_cast<void*>(array.data());
    writeable = array.writeable();
    dtype = std::string(py::str(array.dtype()));
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
      shape.push_back(array.shape(i));
      stride.push_back(array.strides(i) / size);
    }
    if (!array.attr("flags").attr("aligned").cast<bool>())
      fail(" has elements that lie between multiples of their size");
  }

  void look_at_tensor(const py::object& tensor) {
    const py::object where = tensor.attr("device");
    const std::string kind = py::str(where.attr("type"));
    if (kind != "cpu" && kind != "cuda") fail(" is on ", kind, ", expected on the CPU or CUDA");
    if (tensor.attr("requires_grad").cast<bool>()) fail(" requires a gradient; detach() it first");
    if (kind == "cuda") device = where.attr("index").cast<int>();
    dtype = std::string(py::str(tensor.attr("dtype"))).substr(6);  // "torch."
    shape = tensor.attr("shape").cast<std::vector<int64_t>>();
    stride = tensor.attr("stride")().cast<std::vector<int64_t>>();
    address = (void*)tensor.attr("data_ptr")().cast<uintptr_t>();
  }

  static std::string place(int device) { return device == CPU ? "the CPU" : text("cuda:", device); }

  static std::string shown(const std::vector<int64_t>& shape) {
    std::string all;
    for (int64_t n : shape) all += (all.empty() ? "" : ", ") + (n == ANY ? "any" : text(n));
    return "[" + all + "]";
  }
};

// A list of integers (list, numpy array, tensor on the CPU), refused where int64 would not hold it exactly.
inline std::vector<int64_t> integers(const py::object& object, const char* name) {
  const py::array array = py::module_::import("numpy").attr("asarray")(object);
  const char kind = array.dtype().kind();
  if (array.ndim() != 1) throw py::value_error(text(name, " has ", array.ndim(), " dimensions, expected 1"));
  if (array.size() && kind != 'i' && (kind != 'u' || array.itemsize() == 8))
    throw py::type_error(text(name, " is ", std::string(py::str(array.dtype())), ", expected integers"));
  const auto exact = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
  return {exact.data(), exact.data() + exact.size()};
}
