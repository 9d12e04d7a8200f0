#include "common/isa.h"

#include <cstdlib>

#include "common/check.h"
#if defined(AVSER_WITH_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace avser {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16, Isa::amx};

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
    case Isa::amx:
#if defined(AVSER_WITH_AMX)
      return true;
#else
      return false;
#endif
  }
  return false;
}

#if defined(AVSER_WITH_AMX) && defined(__linux__)
// The system saves the tiles of those processes alone that ask for it.
constexpr long kPossible = 0x1021, kRequest = 0x1023, kTileData = 18;

bool processor_has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  unsigned long possible = 0;
  return (d & kAll) == kAll && syscall(SYS_arch_prctl, kPossible, &possible) == 0 && (possible >> kTileData & 1) != 0;
}
// Later threads of the process may use them, too.
bool request_tiles() { return syscall(SYS_arch_prctl, kRequest, kTileData) == 0; }
#else
[[maybe_unused]] bool processor_has_tiles() { return false; }
bool request_tiles() { return false; }
#endif

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
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return bf16;
  return bf16 && processor_has_tiles();
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
  if (forced == nullptr || *forced == '\0') {
    const bool tiles = supported.back() == Isa::amx;
    return {tiles ? Isa::avx512_bf16 : supported.back(), ""};
  }
  for (Isa isa : kAll) {
    if (std::string(forced) != isa_name(isa)) continue;
    for (Isa have : supported) {
      if (have != isa) continue;
      if (isa == Isa::amx && !request_tiles()) return {isa, "AVSER_FAST_CPU_ISA: amx: the system refuses its tiles"};
      return {isa, ""};
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
    case Isa::amx:
      return "amx";
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
