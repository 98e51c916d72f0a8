// All inline PTX, each instruction as one named function: what the kernels need from the machine.
//
// The kernels include this file and nothing else of CUDA, so that they also compile with NVRTC, and
// on a host: with NBL_EMULATE defined, tests/emulation/emulation.h gives every function here (and
// threadIdx, __global__ …) a host definition. A function added here needs its sibling there, except
// for those of Hopper, which nothing else can run.
//
// Fragments of mma.m16n8k16, lane = 4 g + t (g = 0…7, t = 0…3), two consecutive k to a register:
//   a[0] = A[g][2t, 2t+1]       a[1] = A[g+8][2t, 2t+1]
//   a[2] = A[g][2t+8, 2t+9]     a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]       b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t, 2t+1]     d[2], d[3] = D[g+8][2t, 2t+1]
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

// a · b + c of each half, rounded once; subnormal numbers are kept.
template <class T>
NBL_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);

template <>
NBL_DEVICE uint32_t fma2<bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>
NBL_DEVICE uint32_t fma2<float16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (a & b) | c, as one instruction even where b and c are constants.
NBL_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Whether there is an instruction that makes float16 of e4m3.
#if __CUDA_ARCH__ >= 890
constexpr bool kHasFp8Conversion = true;
#else
constexpr bool kHasFp8Conversion = false;
#endif

// The two lowest bytes, e4m3, as float16.
NBL_DEVICE uint32_t fp8_to_half2(uint32_t bytes) {
  uint32_t halves = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
#endif
  return halves;
}

// Four of the bytes of a (0 to 3) and b (4 to 7), each named by a digit of the selector, the last
// one for the lowest byte.
NBL_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

NBL_DEVICE float rsqrt_approx(float value) { return rsqrtf(value); }  // 2 ulp

NBL_DEVICE void trap() { asm volatile("trap;"); }

// ---- Hopper only: barriers that count bytes, tensor copies, warpgroup products -----------------

// What cuTensorMapEncodeTiled fills in: a tensor in global memory and the box that one copy takes.
struct alignas(64) TensorMap {
  uint64_t word[16];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A barrier in shared memory whose phase ends with `arrivals` arrivals and all bytes expected.
NBL_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Shows this thread's barrier_init to the copies, which go through the asynchronous proxy.
NBL_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

NBL_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

NBL_DEVICE void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity: 0 is the first; before it, 1 counts as ended.
NBL_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.b32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Copies the box at (x, y, z), x innermost; zeros outside the tensor. One thread's work; the bytes
// of the whole box arrive at the barrier.
NBL_DEVICE void copy_tensor_3d(void* shared, const TensorMap* map, int x, int y, int z,
                               uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}

// Before the first product of a batch: earlier accesses to its registers are complete.
NBL_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

NBL_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until the products into d are complete: no access to d moves above it.
NBL_DEVICE void wgmma_wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= A B on 64x128x16, A and B in shared memory, both with the contraction as their slow
// dimension ("MN-major"; the last two immediates). a and b are matrix descriptors. Warp w of the
// warpgroup receives rows 16 w …, d[4 n …] the fragment of columns 8 n … as mma.m16n8k16 gives it.
template <class T>
NBL_DEVICE void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool add);

#define NBL_WGMMA_M64N128K16(T, type)                                                             \
  template <>                                                                                     \
  NBL_DEVICE void wgmma_m64n128k16<T>(float (&d)[64], uint64_t a, uint64_t b, bool add) {         \
    asm volatile(                                                                                 \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                          \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
        " "                                                                                       \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "       \
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "      \
        "%64, %65, add, 1, 1, 1, 1;\n}"                                                           \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),     \
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), \
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),           \
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),           \
          "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),           \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),           \
          "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),           \
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),           \
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),           \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),           \
          "+f"(d[62]), "+f"(d[63])                                                                \
        : "l"(a), "l"(b), "r"(static_cast<int>(add))                                              \
        : "memory");                                                                              \
  }

NBL_WGMMA_M64N128K16(bfloat16, "bf16")
NBL_WGMMA_M64N128K16(float16, "f16")
#undef NBL_WGMMA_M64N128K16

// Registers per thread of this warpgroup, from here on.
template <int kCount>
NBL_DEVICE void give_back_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
NBL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace nbl

#endif  // NBL_EMULATE
