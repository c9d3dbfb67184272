// The names of CUDA that the sources use, for a host compiler: those used in kernels, and a runtime over a device that
// tests describe. The threads of a launch are run by emulate_fibers.h (one after the other, in either order, to test
// results) or, with XPO_EMULATE_THREADS, by emulate_threads.h (all at once under ThreadSanitizer, to find missing
// order).
//
// A launch fails if its threads wait for each other for ever, write past their dynamic memory, access 16 bytes that are
// not aligned, or shuffle without all of their warp; and if it asks for more shared memory than the kernel has opted in
// to.
#pragma once

#include <stdint.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define CUDART_VERSION 13000

using cudaError_t = int;
using cudaStream_t = void*;
enum : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716,
    cudaErrorInvalidClusterSize = 912,
    cudaErrorUnknown = 999,
};
inline const char* cudaGetErrorString(int) { return "error of the emulation"; }

namespace xpo::emulate {

// The first error of the launch.
inline std::atomic<int> fault{0};
inline void fail(int error) {
    int none = 0;
    fault.compare_exchange_strong(none, error, std::memory_order_relaxed);
}

inline void check_alignment(const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail(cudaErrorMisalignedAddress);
}

struct Index { unsigned x = 0, y = 0, z = 0; };
struct Shape {
    int64_t blocks;
    int threads, ranks;
    int64_t shared_bytes;
};
inline Index block_size, grid_size;

// Runs every thread of a launch through `body`; returns 0 or a cudaError_t.
int run(const Shape& shape, const std::function<void()>& body);

}  // namespace xpo::emulate

// Accesses of four at once, whose address must be a multiple of 16.
template <typename T>
struct Four {
    T x, y, z, w;
    Four() : x(), y(), z(), w() {}
    Four(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
    Four(const Four& from) : x(from.x), y(from.y), z(from.z), w(from.w) { xpo::emulate::check_alignment(&from); }
    Four& operator=(const Four& from) {
        xpo::emulate::check_alignment(this);
        x = from.x, y = from.y, z = from.z, w = from.w;
        return *this;
    }
};
using float4 = Four<float>;
using uint4 = Four<uint32_t>;
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

#if defined(XPO_EMULATE_THREADS)
#include "emulate_threads.h"
#else
#include "emulate_fibers.h"
#endif

// --- the runtime -----------------------------------------------------------------------------------------------------

namespace xpo::emulate {

constexpr int STATIC = 512, WITHOUT_OPT_IN = 48 * 1024;  // bytes of shared memory per block
inline int device = 0;                                   // a new number whenever a test describes the device again
inline int shared_bytes = 232448, clusters = 8, threads = 64;
inline int hosted = 8;  // the largest cluster, in blocks, that can be scheduled
inline std::atomic<int> asked{0};  // number of questions about the device beyond which one it is
inline std::map<std::pair<const void*, int>, int> opted_in;

}  // namespace xpo::emulate

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned n = 1) : x(n), y(1), z(1) {}
};
struct cudaFuncAttributes { size_t sharedSizeBytes; };
struct cudaLaunchAttribute {
    int id;
    struct { dim3 clusterDim; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
enum : int {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrClusterLaunch,
    cudaDevAttrMaxThreadsPerBlock,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributePreferredSharedMemoryCarveout,
    cudaLaunchAttributeClusterDimension,
    cudaSharedmemCarveoutMaxShared = 100,
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = xpo::emulate::device;
    return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
    using namespace xpo::emulate;
    ++asked;
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes; return cudaSuccess;
        case cudaDevAttrClusterLaunch: *value = clusters > 1; return cudaSuccess;
        case cudaDevAttrMaxThreadsPerBlock: *value = threads; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    ++xpo::emulate::asked;
    found->sharedSizeBytes = xpo::emulate::STATIC;
    return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
    using namespace xpo::emulate;
    ++asked;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value + STATIC > shared_bytes) return cudaErrorInvalidValue;
    opted_in[{kernel, device}] = value;
    return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
    ++xpo::emulate::asked;
    *found = int(config->attrs->val.clusterDim.x) <= xpo::emulate::hosted;
    return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    using namespace xpo::emulate;
    const int ranks = config->numAttrs > 0 ? int(config->attrs->val.clusterDim.x) : 1;
    const Shape shape{config->gridDim.x, int(config->blockDim.x), ranks, int64_t(config->dynamicSmemBytes)};
    const auto opted = opted_in.find({reinterpret_cast<const void*>(kernel), device});
    const int most = opted == opted_in.end() ? WITHOUT_OPT_IN - STATIC : opted->second;
    if (shape.shared_bytes > most) return cudaErrorInvalidValue;
    if (shape.threads % 32 || shape.threads < 32 || shape.threads > threads || shape.blocks < 1 || shape.blocks % ranks)
        return cudaErrorInvalidConfiguration;
    if (ranks > clusters || ranks > hosted) return cudaErrorInvalidClusterSize;
    fault = cudaSuccess;
    block_size = {unsigned(shape.threads), 1, 1};
    grid_size = {unsigned(shape.blocks), 1, 1};
    const std::tuple<Parameters...> call{arguments...};
    const int error = run(shape, [&] { std::apply(kernel, call); });
    return error ? error : fault.load();
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    return cudaSuccess;
}

#include "launch.h"  // included before names such as threadIdx are defined, which its fields use too

// --- what threads do -------------------------------------------------------------------------------------------------

#define threadIdx (xpo::emulate::current->thread)
#define blockIdx (xpo::emulate::current->block->index)
#define blockDim (xpo::emulate::block_size)
#define gridDim (xpo::emulate::grid_size)
#define XPO_SHARED(type, name, count) type* const name = static_cast<type*>(xpo::emulate::shared(sizeof(type) * (count)))
#define XPO_DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(xpo::emulate::current->block->dynamic.data())

namespace xpo {

namespace emulate {

// Here all lanes of a warp take part in a shuffle, so the mask must name them all.
template <typename T>
T shuffled(unsigned mask, T x, int from) {
    if (mask != ~0u) fail(cudaErrorUnknown);
    return exchange(x, from);
}

}  // namespace emulate

inline void copy_16(void* to, const void* from, int bytes) {
    emulate::check_alignment(to), emulate::check_alignment(from);
    emulate::copy(to, from, 16, size_t(bytes));
}
inline void copy_4(void* to, const void* from) { emulate::copy(to, from, 4, 4); }
inline void close_copies() { ++emulate::current->closed; }
template <int N>
void wait_for_copies() {
    emulate::land(emulate::current->closed - N);
}

template <typename T>
const T* of_rank(const T* shared, int rank) {
    const auto at = reinterpret_cast<const char*>(shared) - emulate::current->block->shared();
    return reinterpret_cast<const T*>(emulate::current->cluster->blocks[rank].shared() + at);
}

template <typename T>
uint32_t narrow(float x);
template <>
inline uint32_t narrow<__nv_bfloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
template <>
inline uint32_t narrow<__half>(float x) {
    const uint32_t sign = std::signbit(x) ? 0x8000u : 0;
    const float size = std::fabs(x);
    if (!(size < 65520.0f)) return std::isnan(x) ? 0x7fffu : sign | 0x7c00u;
    int exponent;
    if (std::frexp(size, &exponent) == 0) return sign;
    const int ulp = exponent - 11 > -24 ? exponent - 11 : -24;  // exponent of its last bit
    const auto steps = uint32_t(std::nearbyint(std::ldexp(size, -ulp)));
    return sign | (uint32_t(ulp + 24) * 0x400u + steps);
}

template <typename T>
uint32_t pair(float a, float b) {
    return narrow<T>(a) | narrow<T>(b) << 16;
}

}  // namespace xpo

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) { return xpo::emulate::shuffled(mask, x, lane); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int by) { return xpo::emulate::shuffled(mask, x, int(threadIdx.x % 32) ^ by); }

// Describes the device that later launches run on.
extern "C" __attribute__((visibility("default"), used)) inline void xpo_emulate(int64_t shared_bytes, int clusters,
                                                                                int threads, int reversed) {
    using namespace xpo;
    ++emulate::device;
    emulate::shared_bytes = int(shared_bytes), emulate::threads = threads;
    emulate::clusters = emulate::hosted = clusters;
    emulate::reversed = reversed != 0;
}

// Sets the largest cluster that can be scheduled: 1 block if the device's share (MIG) is too small for more.
extern "C" __attribute__((visibility("default"), used)) inline void xpo_emulate_hosted(int blocks) {
    ++xpo::emulate::device;
    xpo::emulate::hosted = blocks;
}

extern "C" __attribute__((visibility("default"), used)) inline int xpo_emulate_asked() { return xpo::emulate::asked; }
