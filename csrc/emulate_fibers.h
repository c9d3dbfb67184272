// The threads of a launch as fibers, for tests of results: see emulate.h.
//
// A fiber runs until it has to wait for others; the blocks of a cluster run together, one cluster after the other. So
// if a barrier is missing, a thread sees another's write too early or too late, and running in both orders gives
// different results. Shared memory starts as NaN, and an asynchronous copy lands only when it is waited for.
#pragma once

#include <ucontext.h>

#include <memory>
#include <vector>

namespace xpo {
namespace emulate {

inline bool reversed = false;
constexpr size_t STACK = 1 << 16, ARENA = 1 << 14, GUARD = 64;

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
    std::vector<long double> arena, dynamic;  // shared memory; long double for the strictest alignment
    char* shared() { return reinterpret_cast<char*>(arena.data()); }
};

struct Cluster { Barrier barrier; std::vector<Block> blocks; };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Cluster* cluster = nullptr;
    Block* block = nullptr;
    Index thread;
    size_t used = 0;  // bytes of the arena in use
    std::vector<Copy> copies;
    int64_t closed = 0, cluster_phase = 0;
    Barrier* awaited = nullptr;
    int64_t phase = 0;
    bool done = false;
};

inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline const std::function<void()>* running = nullptr;

inline void enter() {
    (*running)();
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

template <typename T>
T exchange(T x, int from) {
    static_assert(sizeof(T) <= 8, "a register or two");
    Warp& w = current->block->warps[current->thread.x / 32];
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

inline int take_turns(std::vector<Fiber>& fibers) {
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

inline int run(const Shape& shape, const std::function<void()>& body) {
    running = &body;
    std::vector<Fiber> fibers(size_t(shape.threads) * shape.ranks);
    for (int64_t first = 0; first < shape.blocks; first += shape.ranks) {
        Cluster cluster;
        cluster.barrier.size = shape.threads * shape.ranks;
        cluster.blocks.resize(shape.ranks);
        for (int rank = 0; rank < shape.ranks; ++rank) {
            Block& b = cluster.blocks[rank];
            b.index.x = unsigned(first + rank);
            b.barrier.size = shape.threads;
            b.warps.resize(shape.threads / 32);
            for (Warp& w : b.warps) w.barrier.size = 32;
            b.arena.resize(ARENA / 16);
            b.dynamic.resize((shape.shared_bytes + GUARD) / 16 + 1);
            std::memset(b.arena.data(), 0xff, ARENA);
            std::memset(b.dynamic.data(), 0xff, b.dynamic.size() * 16);
        }
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber& f = fibers[i];
            f.cluster = &cluster, f.block = &cluster.blocks[i / shape.threads];
            f.thread.x = unsigned(i % shape.threads);
            f.used = 0, f.closed = f.cluster_phase = 0, f.awaited = nullptr, f.done = false;
            f.copies.clear();
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, enter, 0);
        }
        if (const int error = take_turns(fibers)) return error;
        for (Block& b : cluster.blocks) {
            const auto* const end = reinterpret_cast<const unsigned char*>(b.dynamic.data()) + shape.shared_bytes;
            for (size_t i = 0; i < GUARD; ++i)
                if (end[i] != 0xff) return cudaErrorUnknown;
        }
    }
    return cudaSuccess;
}

}  // namespace emulate

inline void cluster_arrive() {
    auto& barrier = emulate::current->cluster->barrier;
    emulate::current->cluster_phase = barrier.phase;
    barrier.arrive();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulate::wait(emulate::current->cluster->barrier, emulate::current->cluster_phase); }

}  // namespace xpo

inline void __syncthreads() { xpo::emulate::meet(xpo::emulate::current->block->barrier); }

// Fibers take turns only where they wait; blocks run one after another.
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* at, uint32_t by) {
    const uint32_t before = *at;
    *at += by;
    return before;
}
