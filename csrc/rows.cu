// Statistics and gradient of rows of products h Wᵀ, between the head's GEMMs; each logit is read from device memory
// once.
//
// A block, or each block of a cluster for its part of the row, copies its columns to shared memory asynchronously and
// computes the sums of online.cuh on the way. The blocks read each other's sums, and then turn the columns they kept
// into ∂L/∂(product). A row too long for any cluster is read a second time, from its end, which is still in L2. Without
// a gradient a row is read once and nothing is kept. There are no atomics, and every merge has a fixed order: the same
// input gives the same bits.
#include <type_traits>

#include "device.cuh"
#include "online.cuh"
#include "xpo.h"

namespace xpo {
namespace {

constexpr int MAX_THREADS = 512, MAX_WARPS = MAX_THREADS / 32;
// The least number of blocks per multiprocessor, so that others copy while one waits for its cluster: MOST_BLOCKS if
// they keep their columns and these are short enough, else BLOCKS.
constexpr int MOST_BLOCKS = 3, BLOCKS = 2;
constexpr int AHEAD = 8;      // vectors of 4 columns that a thread has in flight to shared memory
constexpr int UNROLLED = 4;   // the same to registers
constexpr int WHOLE = 8;      // columns: a multiple of a vector of every dtype
constexpr int STATIC_SHARED = 512, SYSTEM_SHARED = 1024;  // upper bounds, bytes per block beside its columns

struct Launch {
    XpoRows rows;
    Scaling scaling;
    int part, ranks;
    bool wide_products, wide_bias, wide_grad;  // whether every row is aligned to 16 bytes
};

// Merges the sums of the first `lanes` lanes of a warp; each of these gets the result.
template <bool STATISTICS>
__device__ __forceinline__ Sums merged_over_lanes(Sums s, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
        Sums other;
        other.top = __shfl_xor_sync(~0u, s.top, mask);
        other.total = __shfl_xor_sync(~0u, s.total, mask);
        if (STATISTICS) {
            other.weighted = __shfl_xor_sync(~0u, s.weighted, mask);
            other.squares = __shfl_xor_sync(~0u, s.squares, mask);
            other.plain = __shfl_xor_sync(~0u, s.plain, mask);
        }
        s = merged<STATISTICS>(s, other);
    }
    return s;
}

// Merges the sums of the block's threads, then of the cluster's blocks: every thread gets the same bits. It is a
// barrier for what the block's threads wrote to shared memory. The blocks of a cluster must call one more
// `cluster_wait`.
template <bool STATISTICS>
__device__ __forceinline__ Sums merged_over_row(Sums s, int ranks) {
    XPO_SHARED(Sums, of_warp, MAX_WARPS);
    XPO_SHARED(Sums, of_block, 1);
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    s = merged_over_lanes<STATISTICS>(s, 32);
    if (lane == 0) of_warp[threadIdx.x / 32] = s;
    __syncthreads();
    s = merged_over_lanes<STATISTICS>(lane < warps ? of_warp[lane] : Sums{}, MAX_WARPS);
    if (ranks > 1) {
        if (threadIdx.x == 0) *of_block = s;
        if (threadIdx.x < 32) {
            cluster_arrive();
        } else {
            cluster_arrive_relaxed();  // others read nothing of these warps, and a release would cost a fence
        }
        cluster_wait();
        s = merged_over_lanes<STATISTICS>(lane < ranks ? *of_rank(of_block, lane) : Sums{}, 8);
        cluster_arrive();  // tells the other blocks that the reads of their memory are done, so that they may exit
    }
    // Lanes beyond the merged ones hold other sums.
    s.top = __shfl_sync(~0u, s.top, 0);
    s.total = __shfl_sync(~0u, s.total, 0);
    if (STATISTICS) {
        s.weighted = __shfl_sync(~0u, s.weighted, 0);
        s.squares = __shfl_sync(~0u, s.squares, 0);
        s.plain = __shfl_sync(~0u, s.plain, 0);
    }
    return s;
}

// Loads four columns from device memory, 0 from `end` on.
__device__ __forceinline__ void read_4(const float* row, int column, int end, bool wide, float (&x)[4]) {
    if (wide && column + 4 <= end) {
        const float4 all = *reinterpret_cast<const float4*>(row + column);
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = column + k < end ? row[column + k] : 0.0f;
    }
}

// Starts the copy of four columns of products to shared memory; the values from `end` on are meaningless.
__device__ __forceinline__ void copy_4_columns(float* kept, const float* row, int column, int end, bool wide) {
    if (wide) {
        const int there = end - column;
        copy_16(kept, row + column, there < 4 ? 4 * there : 16);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (column + k < end) copy_4(kept + k, row + column + k);
    }
}

// Turns products into final logits, −∞ from `end` on.
template <bool SOFTCAP>
__device__ __forceinline__ void finish_4(const Launch& a, int column, int end, float (&x)[4]) {
    if (a.rows.bias != nullptr) {
        float b[4];
        read_4(a.rows.bias, column, end, a.wide_bias, b);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = rounded_sum(x[k], b[k]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = column + k < end ? final_logit<SOFTCAP>(x[k], a.scaling) : -INFINITY;
}

// Writes dz of as many columns as 16 bytes hold, up to `end`.
template <typename Grad, int K>
__device__ __forceinline__ void write(Grad* row, int column, int end, bool wide, const float (&dz)[K]) {
    if constexpr (sizeof(Grad) == 4) {
        static_assert(K == 4, "16 bytes");
        if (wide && column + K <= end) {
            *reinterpret_cast<float4*>(row + column) = {dz[0], dz[1], dz[2], dz[3]};
            return;
        }
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (column + k < end) row[column + k] = dz[k];
    } else {
        static_assert(K == 8, "16 bytes");
        const uint32_t pairs[4] = {pair<Grad>(dz[0], dz[1]), pair<Grad>(dz[2], dz[3]), pair<Grad>(dz[4], dz[5]),
                                   pair<Grad>(dz[6], dz[7])};
        if (wide && column + K <= end) {
            *reinterpret_cast<uint4*>(row + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
            return;
        }
        auto* const out = reinterpret_cast<uint16_t*>(row);
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (column + k < end) out[column + k] = uint16_t(pairs[k / 2] >> 16 * (k % 2));
    }
}

// Grad: the dtype of dz, or void for none. KEPT: whether the columns stay in shared memory in between, as final logits.
template <typename Grad, bool KEPT, bool STATISTICS, bool SOFTCAP>
__global__ void __launch_bounds__(MAX_THREADS, KEPT ? MOST_BLOCKS : BLOCKS) row_pass(const __grid_constant__ Launch a) {
    const int rank = int(blockIdx.x % unsigned(a.ranks)), threads = int(blockDim.x), thread = int(threadIdx.x);
    const int64_t n = blockIdx.x / unsigned(a.ranks);
    const int vocab = int(a.rows.vocab);
    const int64_t first = int64_t(rank) * a.part;  // int64: the parts of 8 blocks may extend beyond the vocabulary
    const int begin = int(first < vocab ? first : vocab), end = int(first + a.part < vocab ? first + a.part : vocab);
    const float* const row = a.rows.products + n * a.rows.stride;
    const int64_t target = a.rows.targets[n];
    const int y = target >= 0 && target < vocab ? int(target) : -1;
    float x_y = 0;
    if (rank == 0 && thread == 0 && y >= 0) x_y = rounded_sum(row[y], a.rows.bias != nullptr ? a.rows.bias[y] : 0.0f);

    const int vectors = (end - begin + 3) / 4;
    Sums sums;
    if constexpr (KEPT) {
        // A thread reads only what it copied itself, which needs no barrier.
        XPO_DYNAMIC_SHARED(float, kept);
#pragma unroll 1
        for (int d = 0; d < AHEAD; ++d) {
            const int v = thread + d * threads;
            if (v < vectors) copy_4_columns(kept + 4 * v, row, begin + 4 * v, end, a.wide_products);
            close_copies();
        }
        for (int v = thread; v < vectors; v += threads) {
            wait_for_copies<AHEAD - 1>();
            float4* const here = reinterpret_cast<float4*>(kept) + v;
            float z[4] = {here->x, here->y, here->z, here->w};
            finish_4<SOFTCAP>(a, begin + 4 * v, end, z);
            *here = {z[0], z[1], z[2], z[3]};
            add<STATISTICS>(sums, z, end - begin - 4 * v);
            const int next = v + AHEAD * threads;
            if (next < vectors) copy_4_columns(kept + 4 * next, row, begin + 4 * next, end, a.wide_products);
            close_copies();
        }
    } else {
        for (int v = thread; v < vectors; v += UNROLLED * threads) {
            float z[UNROLLED][4];
#pragma unroll
            for (int d = 0; d < UNROLLED; ++d) {
                const int w = v + d * threads;
                if (w < vectors) read_4(row, begin + 4 * w, end, a.wide_products, z[d]);
            }
#pragma unroll
            for (int d = 0; d < UNROLLED; ++d) {
                const int w = v + d * threads;
                if (w >= vectors) break;
                finish_4<SOFTCAP>(a, begin + 4 * w, end, z[d]);
                add<STATISTICS>(sums, z[d], end - begin - 4 * w);
            }
        }
    }
    sums = merged_over_row<STATISTICS>(sums, a.ranks);
    const Row found(sums);
    if (rank == 0 && thread == 0) {
        const float z_y = y < 0 ? NAN : final_logit<SOFTCAP>(x_y, a.scaling);
        if (a.rows.logp != nullptr) a.rows.logp[n] = found.log_p(z_y);
        if (a.rows.lse != nullptr) a.rows.lse[n] = found.lse();
        if (a.rows.top1 != nullptr) a.rows.top1[n] = z_y >= found.largest ? 1.0f : 0.0f;
        if (STATISTICS) {
            if (a.rows.entropy != nullptr) a.rows.entropy[n] = found.entropy(sums);
            if (a.rows.log_sum_sq_probs != nullptr) a.rows.log_sum_sq_probs[n] = found.log_sum_sq_probs(sums);
            if (a.rows.mean_logit != nullptr) a.rows.mean_logit[n] = sums.plain / float(vocab);
        }
    }
    if constexpr (!std::is_void<Grad>::value) {
        constexpr int K = 16 / sizeof(Grad);
        Grad* const out = static_cast<Grad*>(a.rows.grad) + n * a.rows.grad_stride;
        float u = 0, factor = 0;  // coefficients of e_y and of p
        if (a.rows.u_logp != nullptr) u = a.rows.u_logp[n];
        if (a.rows.u_lse != nullptr) factor = a.rows.u_lse[n];
        if (a.rows.u_logp == nullptr && a.rows.u_lse == nullptr) u = 1;
        factor -= u;
        // If the row is read again, from its last vector on: what was read last is still in a cache.
        const int last = begin + (end - begin - 1) / K * K;
        for (int at = begin + K * thread; at < end; at += K * threads) {
            const int column = KEPT ? at : last - (at - begin);
            float dz[K];
#pragma unroll
            for (int k = 0; k < K; k += 4) {
                float z[4];
                if constexpr (KEPT) {
                    XPO_DYNAMIC_SHARED(float, kept);
                    const float4 here = reinterpret_cast<const float4*>(kept)[(column - begin + k) / 4];
                    z[0] = here.x, z[1] = here.y, z[2] = here.z, z[3] = here.w;
                } else {
                    read_4(row, column + k, end, a.wide_products, z);
                    finish_4<SOFTCAP>(a, column + k, end, z);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // p_y − 1 is formed before it is rounded: it is the gradient of a confident token.
                    const float by_z = exponential(found.log_p(z[i])) * factor + (column + k + i == y ? u : 0.0f);
                    dz[k + i] = by_z * slope<SOFTCAP>(z[i], a.scaling);
                }
            }
            write(out, column, end, a.wide_grad, dz);
        }
    }
    if (a.ranks > 1) cluster_wait();
}

bool aligned(const void* memory, int64_t stride_bytes) {
    return reinterpret_cast<uintptr_t>(memory) % 16 == 0 && stride_bytes % 16 == 0;
}

template <typename Grad, bool KEPT>
cudaError_t launch_rows(const Launch& a, const Grid& grid, void* stream) {
    const XpoRows& r = a.rows;
    const bool statistics = r.entropy != nullptr || r.log_sum_sq_probs != nullptr || r.mean_logit != nullptr;
    const bool softcap = r.inner != 0;
    return statistics ? softcap ? launch(row_pass<Grad, KEPT, true, true>, grid, stream, a)
                                : launch(row_pass<Grad, KEPT, true, false>, grid, stream, a)
           : softcap  ? launch(row_pass<Grad, KEPT, false, true>, grid, stream, a)
                      : launch(row_pass<Grad, KEPT, false, false>, grid, stream, a);
}

template <typename Grad>
cudaError_t launch_rows(const Launch& a, const Grid& grid, bool kept, void* stream) {
    return kept ? launch_rows<Grad, true>(a, grid, stream) : launch_rows<Grad, false>(a, grid, stream);
}

constexpr int64_t MOST_COLUMNS = 1 << 30;
constexpr int MOST_RANKS = 8;

int check(const XpoRows& r) {
    if (r.n < 0 || r.vocab < 1 || r.vocab > MOST_COLUMNS || r.stride < 0 || r.grad_stride < 0) return XPO_BAD_SIZE;
    if (r.grad_type < XPO_FLOAT32 || r.grad_type > XPO_FLOAT16) return XPO_BAD_TYPE;
    return r.n > 0 && (r.products == nullptr || r.targets == nullptr) ? XPO_MISSING_POINTER : 0;
}

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int launch_planned(const XpoRows& r, const XpoRowPlan& plan, void* stream) {
    const int grad_bytes = r.grad_type == XPO_FLOAT32 ? 4 : 2;
    const Launch a{r,
                   {r.gain, r.inner, r.ceiling, r.ceiling != 0 ? 1.0f / r.ceiling : 0.0f},
                   plan.part,
                   plan.ranks,
                   aligned(r.products, 4 * r.stride),
                   aligned(r.bias, 0),
                   aligned(r.grad, grad_bytes * r.grad_stride)};
    const Grid grid{r.n * plan.ranks, plan.threads, plan.shared_bytes, plan.ranks};
    if (r.grad == nullptr) return launch_rows<void, false>(a, grid, stream);
    if (r.grad_type == XPO_BFLOAT16) return launch_rows<__nv_bfloat16>(a, grid, plan.kept, stream);
    if (r.grad_type == XPO_FLOAT16) return launch_rows<__half>(a, grid, plan.kept, stream);
    return launch_rows<float>(a, grid, plan.kept, stream);
}

}  // namespace
}  // namespace xpo

// Chooses the smallest cluster with three blocks per multiprocessor, else with two, else reads the row twice: a block
// alone on a multiprocessor leaves it idle whenever it waits.
int xpo_plan_rows(int64_t vocab, int64_t shared_limit, int32_t clusters, int32_t threads, int32_t with_grad,
                  XpoRowPlan* plan) {
    using namespace xpo;
    if (plan == nullptr) return XPO_MISSING_POINTER;
    if (vocab < 1 || vocab > MOST_COLUMNS || clusters < 1 || threads < 32) return XPO_BAD_SIZE;
    const int64_t most = threads < MAX_THREADS ? threads / 32 * 32 : MAX_THREADS;
    int64_t part = rounded_up(vocab, WHOLE), ranks = 1;
    bool kept = false;
    for (int blocks = MOST_BLOCKS; blocks >= BLOCKS; --blocks) {
        const int64_t limit = (shared_limit + SYSTEM_SHARED) / blocks - SYSTEM_SHARED - STATIC_SHARED;
        for (int64_t r = 1; with_grad && !kept && r <= clusters && r <= MOST_RANKS; r *= 2) {
            const int64_t columns = rounded_up((vocab + r - 1) / r, WHOLE);
            if (columns * int64_t(sizeof(float)) <= limit) kept = true, part = columns, ranks = r;
        }
    }
    const int64_t wanted = rounded_up((part + 3) / 4, 32);
    *plan = {int32_t(ranks), int32_t(part), kept, int32_t(wanted < most ? wanted : most),
             kept ? part * int64_t(sizeof(float)) : 0};
    return 0;
}

int xpo_rows_planned(const XpoRows* rows, const XpoRowPlan* plan, void* stream) {
    using namespace xpo;
    if (rows == nullptr || plan == nullptr) return XPO_MISSING_POINTER;
    const XpoRowPlan& p = *plan;
    if (const int code = check(*rows)) return code;
    const bool known = p.ranks == 1 || (p.kept && (p.ranks == 2 || p.ranks == 4 || p.ranks == MOST_RANKS));
    const bool whole = p.part > 0 && p.part % WHOLE == 0 && int64_t(p.part) * p.ranks >= rows->vocab;
    const bool warps = p.threads >= 32 && p.threads <= MAX_THREADS && p.threads % 32 == 0;
    const bool memory = p.shared_bytes == (p.kept ? int64_t(sizeof(float)) * p.part : 0);
    if (!known || !whole || !warps || !memory) return XPO_BAD_PLAN;
    if (rows->n > INT32_MAX / p.ranks) return XPO_BAD_SIZE;
    return rows->n == 0 ? 0 : launch_planned(*rows, p, stream);
}

int xpo_rows(const XpoRows* rows, void* stream) {
    using namespace xpo;
    if (rows == nullptr) return XPO_MISSING_POINTER;
    const XpoRows& r = *rows;
    if (const int code = check(r)) return code;
    if (r.n == 0) return 0;
    int device = 0;
    Limits limits{};
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (const cudaError_t error = read_limits(device, limits); error != cudaSuccess) return error;
    for (int clusters = limits.clusters;;) {
        XpoRowPlan plan{};
        int error = xpo_plan_rows(r.vocab, limits.shared_bytes, clusters, limits.threads, r.grad != nullptr, &plan);
        if (error == 0) error = xpo_rows_planned(&r, &plan, stream);
        if (error != cudaErrorInvalidClusterSize || plan.ranks == 1) return error;
        clusters = plan.ranks / 2;  // the device cannot schedule these
    }
}

int xpo_usable(XpoUsable* found) {
    using namespace xpo;
    if (found == nullptr) return XPO_MISSING_POINTER;
    *found = {0, CUDART_VERSION, 0};
    int driver = 0, device = 0, major = 0, minor = 0;
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaDriverGetVersion(&driver);
    found->driver = driver;
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    found->capability = 10 * major + minor;
    const auto kernel = reinterpret_cast<const void*>(&row_pass<void, false, false, false>);
    return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernel) : error;
}

const char* xpo_error(int code) {
    switch (code) {
        case XPO_MISSING_POINTER: return "a pointer is missing";
        case XPO_BAD_SIZE: return "a size is negative or beyond what a launch can count";
        case XPO_BAD_TYPE: return "no such dtype or loss";
        case XPO_BAD_PLAN: return "a plan that does not hold the row, or that no launch has";
        default: return cudaGetErrorString(cudaError_t(code));
    }
}

const char* xpo_architectures() {
#if defined(XPO_ARCHITECTURES)
    return XPO_ARCHITECTURES;
#else
    return "";
#endif
}
