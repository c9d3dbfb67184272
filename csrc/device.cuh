// The features of CUDA that the kernels use, in one place; emulate.h defines the same names for a host compiler.
#pragma once

#if defined(XPO_EMULATE)
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

// An array in shared memory, and the dynamic shared memory of the launch; each can be declared once per kernel.
#define XPO_SHARED(type, name, count) __shared__ type name[count]
#define XPO_DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char xpo_dynamic[];  \
    type* const name = reinterpret_cast<type*>(xpo_dynamic)

namespace xpo {

// A thread's asynchronous copies from device memory to shared memory. `wait_for_copies<N>` waits for all but the last N
// groups that the thread has closed, and makes their data visible to the thread.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes) {  // the rest of the 16 becomes 0
    const auto at = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_4(void* to, const void* from) {
    const auto at = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A cluster's barrier in two halves, and access to the shared memory of another of its blocks; from sm_90 on. A waiting
// thread sees what was written before a `cluster_arrive`, but not what was written before a `cluster_arrive_relaxed`.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

template <typename T>
__device__ __forceinline__ const T* of_rank(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return reinterpret_cast<const T*>(there);
#else
    return shared;
#endif
}

// Rounds two floats to a narrower dtype; the first goes into the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pair(float a, float b);

template <>
__device__ __forceinline__ uint32_t pair<__nv_bfloat16>(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
__device__ __forceinline__ uint32_t pair<__half>(float a, float b) {
    const __half2 both = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace xpo

#endif
