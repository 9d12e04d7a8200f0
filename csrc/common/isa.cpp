#include "common/isa.h"

#include <cstdlib>

#include "common/check.h"

namespace avser {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16};

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
#if defined(AVSER_WITH_AVX2)
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#if defined(AVSER_WITH_AVX512)
      return true;
#else
      return false;
#endif
    case Isa::avx512_vnni:
#if defined(AVSER_WITH_AVX512_VNNI)
      return true;
#else
      return false;
#endif
    case Isa::avx512_bf16:
#if defined(AVSER_WITH_AVX512_BF16)
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool machine_has(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__)
  // The compiler's helper also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::avx512_vnni) return vnni;
  return vnni && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::string names(const std::vector<Isa>& isas) {
  std::string out;
  for (Isa isa : isas) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
  return out;
}

struct Choice {
  Isa isa = Isa::scalar;
  std::string error;
};

Choice choose() {
  const std::vector<Isa> supported = supported_isas();
  const char* forced = std::getenv("AVSER_FAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return {supported.back(), ""};
  for (Isa isa : kAll) {
    if (std::string(forced) != isa_name(isa)) continue;
    for (Isa have : supported) {
      if (have == isa) return {isa, ""};
    }
    return {Isa::scalar, cat("AVSER_FAST_CPU_ISA: expected an instruction set that this build and machine have (",
                             names(supported), "), got ", forced, compiled(isa) ? "" : ", which was not compiled")};
  }
  return {Isa::scalar, cat("AVSER_FAST_CPU_ISA: expected one of ", names(supported), ", got '", forced, "'")};
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    default:
      return "scalar";
  }
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> out;
  for (Isa isa : kAll) {
    if (compiled(isa)) out.push_back(isa);
  }
  return out;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (Isa isa : compiled_isas()) {
    if (machine_has(isa)) out.push_back(isa);
  }
  return out;
}

Isa current_isa() {
  static const Choice choice = choose();
  AVSER_CHECK(choice.error.empty(), backend, choice.error);
  return choice.isa;
}

}  // namespace avser
