// Which instruction set the CPU kernels run on.
//
// Every csrc/ops/*/*_cpu.cpp is compiled once per instruction set; its contents live in the namespace
// avser::AVSER_ISA_NAMESPACE (isa_scalar, isa_avx2, isa_avx512, ...) and end in one function that returns a table of
// function pointers.  The op's header declares that function with AVSER_DECLARE_PER_ISA and callers take the table of
// the running machine with AVSER_PICK:
//
//   // my_op.h
//   struct MyOpKernels { void (*run)(const float* x, float* y, int64_t n); };
//   AVSER_DECLARE_PER_ISA(MyOpKernels, my_op_kernels);
//   // my_op_cpu.cpp
//   namespace avser::AVSER_ISA_NAMESPACE {
//   const MyOpKernels& my_op_kernels() {
//     static const MyOpKernels kernels{&run};
//     return kernels;
//   }
//   }  // namespace avser::AVSER_ISA_NAMESPACE
//   // my_op.cpp
//   AVSER_PICK(my_op_kernels).run(x, y, n);
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace avser {

// avx2 includes fma and f16c, avx512 is F, DQ, BW and VL, avx512_vnni adds 8-bit dot products, avx512_bf16 adds those
// of bfloat16 to that.  amx is avx512_bf16 with the products of bf16 and int8 on matrix tiles (ops/gemm/gemm_amx.h).
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, avx512_bf16 = 4, amx = 5 };

// Floats in a vector of the kernels of an instruction set.
constexpr int64_t float_lanes(Isa isa) { return isa == Isa::scalar ? 4 : isa == Isa::avx2 ? 8 : 16; }

const char* isa_name(Isa isa);

// Compiled in and supported by this machine, best last.  Never empty: scalar is always there.
std::vector<Isa> supported_isas();
std::vector<Isa> compiled_isas();

// What runs: the best supported one but amx, which has not been run on a machine that has it; or the one named by
// AVSER_FAST_CPU_ISA.  The choice is made at the first call and kept; an unknown or unsupported name throws a backend
// error at every call.
Isa current_isa();

}  // namespace avser

#if defined(AVSER_WITH_AVX512_BF16)
#define AVSER_CASE_AVX512_BF16_(function) \
  case ::avser::Isa::avx512_bf16:         \
  case ::avser::Isa::amx:                 \
    return &::avser::isa_avx512_bf16::function;
#define AVSER_DECLARE_AVX512_BF16_(table, function) \
  namespace isa_avx512_bf16 {                       \
  const table& function();                          \
  }
#else
#define AVSER_CASE_AVX512_BF16_(function)
#define AVSER_DECLARE_AVX512_BF16_(table, function)
#endif
#if defined(AVSER_WITH_AVX512_VNNI)
#define AVSER_CASE_AVX512_VNNI_(function) \
  case ::avser::Isa::avx512_vnni:         \
    return &::avser::isa_avx512_vnni::function;
#define AVSER_DECLARE_AVX512_VNNI_(table, function) \
  namespace isa_avx512_vnni {                       \
  const table& function();                          \
  }
#else
#define AVSER_CASE_AVX512_VNNI_(function)
#define AVSER_DECLARE_AVX512_VNNI_(table, function)
#endif
#if defined(AVSER_WITH_AVX512)
#define AVSER_CASE_AVX512_(function) \
  case ::avser::Isa::avx512:         \
    return &::avser::isa_avx512::function;
#define AVSER_DECLARE_AVX512_(table, function) \
  namespace isa_avx512 {                       \
  const table& function();                     \
  }
#else
#define AVSER_CASE_AVX512_(function)
#define AVSER_DECLARE_AVX512_(table, function)
#endif
#if defined(AVSER_WITH_AVX2)
#define AVSER_CASE_AVX2_(function) \
  case ::avser::Isa::avx2:         \
    return &::avser::isa_avx2::function;
#define AVSER_DECLARE_AVX2_(table, function) \
  namespace isa_avx2 {                       \
  const table& function();                   \
  }
#else
#define AVSER_CASE_AVX2_(function)
#define AVSER_DECLARE_AVX2_(table, function)
#endif

// Use inside namespace avser.
#define AVSER_DECLARE_PER_ISA(table, function) \
  namespace isa_scalar {                       \
  const table& function();                     \
  }                                            \
  AVSER_DECLARE_AVX2_(table, function)         \
  AVSER_DECLARE_AVX512_(table, function)       \
  AVSER_DECLARE_AVX512_VNNI_(table, function)  \
  AVSER_DECLARE_AVX512_BF16_(table, function)  \
  static_assert(true, "")

// The table of an instruction set (a value of type const table&).
#define AVSER_PICK_FOR(isa, function)          \
  ([](::avser::Isa avser_isa_) {               \
    switch (avser_isa_) {                      \
      AVSER_CASE_AVX512_BF16_(function)        \
      AVSER_CASE_AVX512_VNNI_(function)        \
      AVSER_CASE_AVX512_(function)             \
      AVSER_CASE_AVX2_(function)               \
      default:                                 \
        return &::avser::isa_scalar::function; \
    }                                          \
  }(isa)())

#define AVSER_PICK(function) AVSER_PICK_FOR(::avser::current_isa(), function)
