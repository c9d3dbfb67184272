// Runs the kernels' own source on the host, for tests: the names of device.cuh and of CUDA that the kernels use.
//
// A thread is a fiber that runs until it has to wait for others, the blocks of a cluster together, one cluster after the
// other. So what one thread writes another sees too early or too late wherever a barrier is missing: run in either
// order, such a kernel gives something else. Shared memory begins as NaN, an asynchronous copy lands when it is waited
// for, and a launch fails where threads wait for each other for ever, write past their dynamic memory, or access 16 bytes
// that are not aligned.
#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidClusterSize = 912, cudaErrorMisalignedAddress = 716,
             cudaErrorUnknown = 999 };
inline const char* cudaGetErrorString(int) { return "error of the emulation"; }

// Four at once, whose address must be a multiple of 16: a launch that read or wrote others fails.
inline bool misaligned = false;
inline void check_alignment(const void* at) { misaligned |= reinterpret_cast<uintptr_t>(at) % 16 != 0; }
template <typename T>
struct Four {
    T x, y, z, w;
    Four() : x(), y(), z(), w() {}
    Four(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
    Four(const Four& from) : x(from.x), y(from.y), z(from.z), w(from.w) { check_alignment(&from); }
    Four& operator=(const Four& from) {
        check_alignment(this);
        x = from.x, y = from.y, z = from.z, w = from.w;
        return *this;
    }
};
using float4 = Four<float>;
using uint4 = Four<uint32_t>;
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

namespace xpo {

struct Limits { int64_t shared_bytes; int clusters, threads; };
struct Grid { int64_t blocks; int threads; int64_t shared_bytes = 0; int ranks = 1; };

namespace emulate {

inline Limits limits{232448, 8, 64};
inline int hosted = 8;  // the most blocks of a cluster that there is a place for
inline bool reversed = false;
constexpr size_t STACK = 1 << 16, ARENA = 1 << 14, GUARD = 64;

struct Index { unsigned x = 0, y = 0, z = 0; };
struct Barrier {
    int size = 0, arrived = 0;
    int64_t phase = 0;
    void arrive() {
        if (++arrived == size) arrived = 0, ++phase;
    }
};
struct Warp { Barrier barrier; uint64_t given[32]; };
struct Copy { void* to; const void* from; size_t size, given; int64_t group; };

struct Block {
    Index index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<long double> arena, dynamic;  // static and dynamic shared memory, as aligned as anything is
    char* shared() { return reinterpret_cast<char*>(arena.data()); }
};

struct Cluster { Barrier barrier; std::vector<Block> blocks; };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Cluster* cluster = nullptr;
    Block* block = nullptr;
    Index thread;
    size_t used = 0;  // of the arena
    std::vector<Copy> copies;
    int64_t closed = 0, cluster_phase = 0;
    Barrier* awaited = nullptr;
    int64_t phase = 0;
    bool done = false;
};

inline Fiber* current = nullptr;
inline Index block_size, grid_size;
inline ucontext_t scheduler;
inline void (*body)(const void*) = nullptr;
inline const void* body_arguments = nullptr;

inline void enter() {
    body(body_arguments);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

inline void wait(Barrier& barrier, int64_t phase) {
    current->awaited = &barrier, current->phase = phase;
    swapcontext(&current->context, &scheduler);
}

inline void meet(Barrier& barrier) {
    const int64_t phase = barrier.phase;
    barrier.arrive();
    wait(barrier, phase);
}

inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }

template <typename T>
T exchange(T x, int from) {
    static_assert(sizeof(T) <= 8, "a register or two");
    Warp& w = warp();
    std::memcpy(&w.given[current->thread.x % 32], &x, sizeof(T));
    meet(w.barrier);
    if (from >= 0 && from < 32) std::memcpy(&x, &w.given[from], sizeof(T));
    meet(w.barrier);
    return x;
}

inline void* shared(size_t bytes) {
    char* const here = current->block->shared() + current->used;
    current->used += (bytes + 15) / 16 * 16;
    return current->used <= ARENA ? here : nullptr;
}

inline void copy(void* to, const void* from, size_t size, size_t given) {
    std::memset(to, 0xff, size);
    current->copies.push_back({to, from, size, given, current->closed});
}

inline void land(int64_t groups) {
    std::vector<Copy> later;
    for (const Copy& c : current->copies) {
        if (c.group >= groups) {
            later.push_back(c);
            continue;
        }
        std::memset(c.to, 0, c.size);
        std::memcpy(c.to, c.from, c.given);
    }
    current->copies = std::move(later);
}

inline int run(std::vector<Fiber>& fibers) {
    for (size_t left = fibers.size(); left > 0;) {
        bool moved = false;
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& f = fibers[reversed ? fibers.size() - 1 - i : i];
            if (f.done || (f.awaited && f.awaited->phase == f.phase)) continue;
            f.awaited = nullptr, current = &f, moved = true;
            swapcontext(&scheduler, &f.context);
            left -= f.done;
        }
        if (!moved) return cudaErrorUnknown;
    }
    return cudaSuccess;
}

}  // namespace emulate

inline cudaError_t read_limits(Limits& limits) {
    limits = emulate::limits;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, void*, Arguments... arguments) {
    using namespace emulate;
    if (grid.threads % 32 || grid.threads < 32 || grid.blocks % grid.ranks || grid.blocks < 1 ||
        grid.ranks > limits.clusters || grid.shared_bytes > limits.shared_bytes)
        return cudaErrorInvalidConfiguration;
    if (grid.ranks > hosted) return cudaErrorInvalidClusterSize;
    using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
    const Call call{kernel, std::tuple<Parameters...>(Parameters(arguments)...)};
    body = [](const void* c) { std::apply(static_cast<const Call*>(c)->first, static_cast<const Call*>(c)->second); };
    body_arguments = &call;
    misaligned = false;
    block_size = {unsigned(grid.threads), 1, 1};
    grid_size = {unsigned(grid.blocks), 1, 1};
    std::vector<Fiber> fibers(size_t(grid.threads) * grid.ranks);
    for (int64_t first = 0; first < grid.blocks; first += grid.ranks) {
        Cluster cluster;
        cluster.barrier.size = grid.threads * grid.ranks;
        cluster.blocks.resize(grid.ranks);
        for (int rank = 0; rank < grid.ranks; ++rank) {
            Block& b = cluster.blocks[rank];
            b.index.x = unsigned(first + rank);
            b.barrier.size = grid.threads;
            b.warps.resize(grid.threads / 32);
            for (Warp& w : b.warps) w.barrier.size = 32;
            b.arena.resize(ARENA / 16);
            b.dynamic.resize((grid.shared_bytes + GUARD) / 16 + 1);
            std::memset(b.arena.data(), 0xff, ARENA);
            std::memset(b.dynamic.data(), 0xff, b.dynamic.size() * 16);
        }
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& f = fibers[i];
            f.cluster = &cluster, f.block = &cluster.blocks[i / grid.threads];
            f.thread.x = unsigned(i % grid.threads);
            f.used = 0, f.closed = f.cluster_phase = 0, f.awaited = nullptr, f.done = false;
            f.copies.clear();
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, enter, 0);
        }
        if (const int error = run(fibers)) return error;
        if (misaligned) return cudaErrorMisalignedAddress;
        for (Block& b : cluster.blocks) {
            const auto* const end = reinterpret_cast<const unsigned char*>(b.dynamic.data()) + grid.shared_bytes;
            for (size_t i = 0; i < GUARD; ++i)
                if (end[i] != 0xff) return cudaErrorUnknown;
        }
    }
    return cudaSuccess;
}

inline void copy_16(void* to, const void* from, int bytes) {
    check_alignment(to), check_alignment(from);
    emulate::copy(to, from, 16, size_t(bytes));
}
inline void copy_4(void* to, const void* from) { emulate::copy(to, from, 4, 4); }
inline void close_copies() { ++emulate::current->closed; }
template <int N>
void wait_for_copies() {
    emulate::land(emulate::current->closed - N);
}

inline void cluster_arrive() {
    auto& barrier = emulate::current->cluster->barrier;
    emulate::current->cluster_phase = barrier.phase;
    barrier.arrive();
}
inline void cluster_leave() { cluster_arrive(); }
inline void cluster_wait() { emulate::wait(emulate::current->cluster->barrier, emulate::current->cluster_phase); }
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
    const int ulp = std::max(exponent - 11, -24);  // of its last bit
    const auto steps = uint32_t(std::nearbyint(std::ldexp(size, -ulp)));
    return sign | (uint32_t(ulp + 24) * 0x400u + steps);
}

template <typename T>
uint32_t pair(float a, float b) {
    return narrow<T>(a) | narrow<T>(b) << 16;
}

}  // namespace xpo

#define threadIdx (xpo::emulate::current->thread)
#define blockIdx (xpo::emulate::current->block->index)
#define blockDim (xpo::emulate::block_size)
#define gridDim (xpo::emulate::grid_size)
#define XPO_SHARED(type, name, count) type* const name = static_cast<type*>(xpo::emulate::shared(sizeof(type) * (count)))
#define XPO_DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(xpo::emulate::current->block->dynamic.data())

inline void __syncthreads() { xpo::emulate::meet(xpo::emulate::current->block->barrier); }
inline void __syncwarp(unsigned = ~0u) { xpo::emulate::meet(xpo::emulate::warp().barrier); }
template <typename T>
T __shfl_sync(unsigned, T x, int lane) { return xpo::emulate::exchange(x, lane); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) { return xpo::emulate::exchange(x, int(threadIdx.x % 32) ^ mask); }
template <typename T>
T __shfl_down_sync(unsigned, T x, unsigned by) { return xpo::emulate::exchange(x, int(threadIdx.x % 32 + by)); }

// The device that the launches find.
extern "C" __attribute__((visibility("default"), used)) inline void xpo_emulate(int64_t shared_bytes, int clusters,
                                                                                int threads, int reversed) {
    xpo::emulate::limits = {shared_bytes, clusters, threads};
    xpo::emulate::reversed = reversed != 0;
    xpo::emulate::hosted = clusters;
}

// Of how many blocks clusters are that it has a place for: none of more than one where its share is too small.
extern "C" __attribute__((visibility("default"), used)) inline void xpo_emulate_hosted(int blocks) {
    xpo::emulate::hosted = blocks;
}
