// The threads of a launch as threads of the host, all blocks at once, for ThreadSanitizer: see emulate.h.
//
// Only what CUDA orders is ordered here: by a block's barrier, and by a cluster's between a releasing arrival and a
// wait. Shuffles and relaxed arrivals carry values but no order. A fence orders only the accesses around an atomic of
// the same thread, before or after it. A block's shared memory is reused as soon as its last thread has ended. So a
// race that the sanitizer reports is one on a device too: the order that is missing here is missing there.
#pragma once

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

namespace xpo {
namespace emulate {

inline bool reversed = false;  // has no effect: threads take no turns
constexpr size_t ARENA = 1 << 14;
constexpr auto RELAXED = std::memory_order_relaxed, ACQUIRE = std::memory_order_acquire;
constexpr auto RELEASE = std::memory_order_release;

// Counts all arrivals. Each is a read-modify-write, so whoever acquires the last one sees everything that was released
// before it, whatever came in between. It waits by futex, because the standard library's waits would order more.
struct Barrier {
    uint32_t size = 0;
    std::atomic<uint32_t> arrived{0};

    uint32_t arrive(std::memory_order order) {  // returns the count to wait for
        const uint32_t before = arrived.fetch_add(1, order);
        if ((before + 1) % size == 0) syscall(SYS_futex, &arrived, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
        return (before / size + 1) * size;
    }

    void wait(uint32_t count, std::memory_order order) {
        for (uint32_t now; int32_t((now = arrived.load(order)) - count) < 0;)
            syscall(SYS_futex, &arrived, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    }
};

struct Warp {
    Barrier barrier;
    std::atomic<uint64_t> given[32];
};
struct Copy { void* to; const void* from; size_t size, given; int64_t group; };

struct Block {
    Index index;
    Barrier barrier;
    std::unique_ptr<Warp[]> warps;
    std::vector<long double> arena, dynamic;
    std::atomic<int> gone{0};

    char* shared() { return reinterpret_cast<char*>(arena.data()); }
    void scribble() {
        std::memset(arena.data(), 0xff, ARENA);
        std::memset(dynamic.data(), 0xff, dynamic.size() * sizeof(long double));
    }
};

struct Cluster {
    Barrier barrier;
    std::unique_ptr<Block[]> blocks;
};

struct Thread {
    Cluster* cluster = nullptr;
    Block* block = nullptr;
    Index thread;
    size_t used = 0;
    std::vector<Copy> copies;
    int64_t closed = 0;
    uint32_t cluster_count = 0;
    uint32_t* last_atomic = nullptr;
    bool fenced = false;
};
inline thread_local Thread* current = nullptr;

template <typename T>
T exchange(T x, int from) {
    Warp& w = current->block->warps[current->thread.x / 32];
    const auto meet = [&w] { w.barrier.wait(w.barrier.arrive(RELAXED), RELAXED); };
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    w.given[current->thread.x % 32].store(bits, RELAXED);
    meet();
    if (from >= 0 && from < 32) {
        bits = w.given[from].load(RELAXED);
        std::memcpy(&x, &bits, sizeof(T));
    }
    meet();
    return x;
}

inline void* shared(size_t bytes) {
    char* const here = current->block->shared() + current->used;
    current->used += (bytes + 15) / 16 * 16;
    return here;
}

inline void copy(void* to, const void* from, size_t size, size_t given) {
    current->copies.push_back({to, from, size, given, current->closed});
}

inline void land(int64_t groups) {
    std::vector<Copy> later;
    for (const Copy& c : current->copies) {
        if (c.group >= groups) {
            later.push_back(c);
            continue;
        }
        std::memset(static_cast<char*>(c.to) + c.given, 0, c.size - c.given);
        std::memcpy(c.to, c.from, c.given);
    }
    current->copies = std::move(later);
}

inline int run(const Shape& shape, const std::function<void()>& body) {
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::thread> threads;
    for (int64_t first = 0; first < shape.blocks; first += shape.ranks) {
        clusters.push_back(std::make_unique<Cluster>());
        Cluster& cluster = *clusters.back();
        cluster.barrier.size = uint32_t(shape.threads * shape.ranks);
        cluster.blocks.reset(new Block[shape.ranks]);
        for (int rank = 0; rank < shape.ranks; ++rank) {
            Block& b = cluster.blocks[rank];
            b.index.x = unsigned(first + rank);
            b.barrier.size = uint32_t(shape.threads);
            b.warps.reset(new Warp[shape.threads / 32]);
            for (int w = 0; w < shape.threads / 32; ++w) b.warps[w].barrier.size = 32;
            b.arena.resize(ARENA / sizeof(long double));
            b.dynamic.resize(shape.shared_bytes / sizeof(long double) + 1);
            b.scribble();
        }
    }
    for (auto& cluster : clusters)
        for (int i = 0; i < shape.ranks * shape.threads; ++i)
            threads.emplace_back([&shape, &body, &cluster, i] {
                Thread me;
                me.cluster = cluster.get(), me.block = &cluster->blocks[i / shape.threads];
                me.thread.x = unsigned(i % shape.threads);
                current = &me;
                body();
                if (me.block->gone.fetch_add(1, std::memory_order_acq_rel) + 1 == shape.threads) me.block->scribble();
            });
    for (auto& t : threads) t.join();
    return cudaSuccess;
}

}  // namespace emulate

inline void cluster_arrive() {
    emulate::current->cluster_count = emulate::current->cluster->barrier.arrive(emulate::RELEASE);
}
inline void cluster_arrive_relaxed() {
    emulate::current->cluster_count = emulate::current->cluster->barrier.arrive(emulate::RELAXED);
}
inline void cluster_wait() {
    emulate::current->cluster->barrier.wait(emulate::current->cluster_count, emulate::ACQUIRE);
}

}  // namespace xpo

inline void __syncthreads() {
    auto& barrier = xpo::emulate::current->block->barrier;
    barrier.wait(barrier.arrive(xpo::emulate::RELEASE), xpo::emulate::ACQUIRE);
}

inline void __threadfence() {
    auto& me = *xpo::emulate::current;
    me.fenced = true;
    if (me.last_atomic != nullptr) (void)__atomic_load_n(me.last_atomic, __ATOMIC_ACQUIRE);
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t by) {
    auto& me = *xpo::emulate::current;
    me.last_atomic = at;
    return me.fenced ? __atomic_fetch_add(at, by, __ATOMIC_RELEASE) : __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
