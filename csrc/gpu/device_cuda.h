// The device layer on a GPU (device.h).  sm_80 and newer; what needs more is guarded by __CUDA_ARCH__.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#define AVSER_KERNEL __global__
#define AVSER_DEVICE __device__ __forceinline__
#define AVSER_HOST_DEVICE __host__ __device__ __forceinline__
#define AVSER_GRID_CONSTANT __grid_constant__
#define AVSER_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define AVSER_UNROLL _Pragma("unroll")

namespace avser::gpu {

// Aligned: else each word is a load of its own.
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

AVSER_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
AVSER_DEVICE int threads() { return static_cast<int>(blockDim.x); }
AVSER_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
AVSER_DEVICE int warp() { return static_cast<int>(threadIdx.x / 32); }
AVSER_DEVICE int block() { return static_cast<int>(blockIdx.x); }
AVSER_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

AVSER_DEVICE void sync() { __syncthreads(); }
AVSER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
AVSER_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// All threads of the cluster's blocks meet; what they wrote to global memory is seen by all of them.
AVSER_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();  // no cluster of more than one block is ever launched there
#endif
}

template <typename T>
class Shared {
 public:
  AVSER_DEVICE explicit Shared(T* at) : at_(at) {}
  AVSER_DEVICE T& operator[](int i) const { return at_[i]; }
  AVSER_DEVICE Shared operator+(int n) const { return Shared(at_ + n); }
  template <typename U>
  AVSER_DEVICE Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(at_));
  }
  // For who reads global memory, or another block's, by the same code.
  AVSER_DEVICE T* generic() const { return at_; }
  AVSER_DEVICE uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(at_)); }

 private:
  T* at_;
};

// The block's dynamic shared memory.
AVSER_DEVICE Shared<char> shared_memory() {
  extern __shared__ __align__(128) char avser_shared[];
  return Shared<char>(avser_shared);
}

// Of a block of the same cluster that has begun.
AVSER_DEVICE const char* of_block(Shared<char> own, int rank) {
#if __CUDA_ARCH__ >= 900
  const char* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own.generic()), "r"(rank));
  return there;
#else
  return rank == 0 ? own.generic() : nullptr;  // no cluster of more than one block is ever launched there
#endif
}

AVSER_DEVICE void expect(bool) {}

// 16 bytes, zeros where `there` is false; done after copy_wait() of the same thread.
AVSER_DEVICE void copy16_async(Shared<char> to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(bytes) : "memory");
}
AVSER_DEVICE void copy4_async(Shared<float> to, const float* from, bool there) {
  const int bytes = there ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to.address()), "l"(from), "r"(bytes) : "memory");
}
AVSER_DEVICE void copy8_async(Shared<char> to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to.address()), "l"(from) : "memory");
}
AVSER_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What the thread copies up to here and since the last time is a group.
AVSER_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of its groups but the newest `newest` are done.
template <int newest>
AVSER_DEVICE void copy_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Four 8x8 matrices of 16-bit elements, or as many bytes of wider ones; lane i names row i % 8 of matrix i / 8.
AVSER_DEVICE void ldmatrix(uint32_t (&r)[4], Shared<char> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address())
               : "memory");
}

AVSER_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
AVSER_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
AVSER_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

AVSER_DEVICE Words4 load_weights(const Words4* at) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
  return {v.x, v.y, v.z, v.w};
}
AVSER_DEVICE Words2 load_weights(const Words2* at) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(at));
  return {v.x, v.y};
}
AVSER_DEVICE float load_weights(const float* at) { return __ldg(at); }

// Adds 1 and returns what was there; orders the memory of both sides.
AVSER_DEVICE int fetch_add(int* at) {
  __threadfence();
  const int before = atomicAdd(at, 1);
  __threadfence();
  return before;
}
// Past any cache of this multiprocessor: what other blocks of the same launch wrote.
AVSER_DEVICE float load_fresh(const float* at) { return __ldcg(at); }

AVSER_DEVICE float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
AVSER_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
AVSER_DEVICE float exponential(float x) { return expf(x); }
AVSER_DEVICE float tangent(float x) { return tanhf(x); }  // hyperbolic
AVSER_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
AVSER_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
AVSER_DEVICE float natural_log(float x) { return logf(x); }
AVSER_DEVICE double natural_log(double x) { return log(x); }

AVSER_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
AVSER_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
AVSER_DEVICE uint32_t round_tf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
}
AVSER_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
AVSER_DEVICE uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
AVSER_DEVICE float from_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
// Two 8-bit floats (e4m3) of the low or the high half of `x` as two 16-bit ones.
AVSER_DEVICE uint32_t f8_to_f16(uint16_t x) {
  const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(x, __NV_E4M3);
  return static_cast<uint32_t>(both.x) | static_cast<uint32_t>(both.y) << 16;
}

}  // namespace avser::gpu
