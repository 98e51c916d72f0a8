// All inline PTX, each instruction as one named function: what the kernels need from the machine.
//
// The kernels include this file and nothing else of CUDA, so that they also compile with NVRTC, and
// on a host: with NBL_EMULATE defined, tests/emulation/emulation.h gives every function here (and
// threadIdx, __global__ …) a host definition. A function added here needs its sibling there, except
// for those of Hopper, which nothing else can run.
//
// Fragments of mma.m16n8k16, lane = 4 g + t (g = 0…7, t = 0…3), two consecutive k to a register:
//   a[0] = A[g][2t, 2t+1]   a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, +9]   a[3] = A[g+8][2t+8,
//   +9] b[0] = B[2t, 2t+1][g]   b[1] = B[2t+8, 2t+9][g] d[0] = D[g][2t]   d[1] = D[g][2t+1]   d[2]
//   = D[g+8][2t]   d[3] = D[g+8][2t+1]
#pragma once

#include "nbl/dtypes.h"

namespace nbl {

// 16 bytes: the widest access of a thread.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace nbl

#if defined(NBL_EMULATE)
#include "emulation.h"
#else

#define NBL_DEVICE __device__ __forceinline__
#define NBL_PARAM const __grid_constant__  // a kernel's one argument, a struct

namespace nbl {

// ---- Threads -----------------------------------------------------------------------------------

// The dynamic shared memory of the block, aligned to 1024 bytes (what TMA's swizzle asks for).
NBL_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char nbl_shared_memory[];
  return nbl_shared_memory;
}

NBL_DEVICE void sync_block() { __syncthreads(); }

NBL_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
NBL_DEVICE T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <class T>
NBL_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// True in every lane when it is in any.
NBL_DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value) != 0; }

// Makes this thread's writes to global memory visible to other blocks before its later ones.
NBL_DEVICE void fence_global() { __threadfence(); }

// Returns the value before.
NBL_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}

NBL_DEVICE uint64_t atomic_min(uint64_t* address, uint64_t value) {
  return atomicMin(reinterpret_cast<unsigned long long*>(address),
                   static_cast<unsigned long long>(value));
}

// ---- Programmatic dependent launch (nothing before sm_90) --------------------------------------

// Waits for the kernels this one depends on; before it only what they do not write may be read.
NBL_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its blocks on SMs that are free.
NBL_DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Global memory -----------------------------------------------------------------------------

// Data read once, such as weights: 16 bytes past L1. The address is a multiple of 16.
NBL_DEVICE Bytes16 load_streaming(const void* address) {
  Bytes16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address));
  return v;
}

// 16 bytes that an earlier kernel of the stream may have written.
NBL_DEVICE Bytes16 load_16(const void* address) {
  Bytes16 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}

NBL_DEVICE void store_16(void* address, const Bytes16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// Brings a cache line into L2, the point of coherence, without waiting: safe before
// grid_dependency_wait() even for data that an earlier kernel writes.
NBL_DEVICE void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---- Shared memory -----------------------------------------------------------------------------

NBL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory without waiting; zeros where not valid.
NBL_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

NBL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of the groups this thread has committed are not complete.
template <int kPending>
NBL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i. Lane
// 4 g + t receives the elements 2t, 2t+1 of row g; transposed: rows 2t, 2t+1 of column g.
NBL_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

NBL_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- Arithmetic --------------------------------------------------------------------------------

// d += A B on 16x8x16, T bfloat16 or float16, float32 accumulation. Fragments: above.
template <class T>
NBL_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
NBL_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
NBL_DEVICE void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats rounded to nearest even, lo in the lower half; and back.
template <class T>
NBL_DEVICE uint32_t pack2(float lo, float hi);

template <>
NBL_DEVICE uint32_t pack2<bfloat16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

template <>
NBL_DEVICE uint32_t pack2<float16>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

struct Float2 {
  float lo, hi;
};

template <class T>
NBL_DEVICE Float2 unpack2(uint32_t packed);

template <>
NBL_DEVICE Float2 unpack2<bfloat16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <>
NBL_DEVICE Float2 unpack2<float16>(uint32_t packed) {
  Float2 v;
  asm("{.reg .f16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;}"
      : "=f"(v.lo), "=f"(v.hi)
      : "r"(packed));
  return v;
}

NBL_DEVICE float rsqrt_approx(float value) { return rsqrtf(value); }  // 2 ulp

}  // namespace nbl

#endif  // NBL_EMULATE
