// All CPU kernels, included by cpu.cpp once per instruction set with ISA (a name), TARGET (the function
// attribute), WIDTH (floats in a vector) and perhaps BF16_DOT (there is an instruction for products of
// bfloat16 pairs) and AMX (and one for products of 16 x 16 tiles of them).

namespace ISA {
namespace {

#include "vector.inl"
#include "products.inl"
#include "attention.inl"
#include "elementwise.inl"

const Kernels kernels{NAME(ISA),
                      {scratch_floats<float, FLOATS>, scratch_floats<bf16, BF16_MATH>},
                      {attend<float, FLOATS>, attend<bf16, BF16_MATH>},
                      {rope<float>, rope<bf16>},
                      {rmsnorm<float>, rmsnorm<bf16>},
                      {swiglu<float>, swiglu<bf16>},
                      {unit_vectors<fp16>, unit_vectors<int8_t>}};

}  // namespace
}  // namespace ISA

#undef ISA
#undef TARGET
#undef WIDTH
#undef BF16_DOT
#undef AMX
