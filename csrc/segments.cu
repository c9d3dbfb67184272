// One launch from token log-probs to the loss, its metrics and u = ∂loss/∂logp: see segments.h.
//
// A block takes one unit after another; no two units share a row. It sums the rows, evaluates the loss and writes u.
// The block that finishes last then sums the units. No order depends on which block that is, so results are the same to
// the bit in every run.
#include <limits.h>

#include "device.cuh"
#include "losses.cuh"
#include "segments.h"
#include "xpo.h"

namespace xpo {
namespace {

// Shared memory: partial sums, K values per thread; counts; whether this block is the last.
template <typename T, int THREADS, int K, int M>
struct Scratch {
    T lanes[K * THREADS];
    uint32_t counts[M * THREADS];
    uint32_t last;
};

// Sums each of v (K) over the block; all threads get the sums. lanes (K, THREADS).
template <int THREADS, int K, typename T>
__device__ void block_sum(T (&v)[K], T* lanes) {
    const int lane = int(threadIdx.x);
    __syncthreads();  // the previous contents have been read
#pragma unroll
    for (int k = 0; k < K; ++k) lanes[k * THREADS + lane] = v[k];
    for (int width = THREADS / 2; width > 0; width /= 2) {
        __syncthreads();
        tree_step<K>(lanes, lane, width, THREADS);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = lanes[k * THREADS];
}

template <typename T>
__device__ T factor(const SegmentCall<T>& call) {
    const T denominator = call.denominator ? *call.denominator : T(1);
    return T(call.scale) / (denominator == 0 ? T(1) : denominator);
}

template <typename T>
__device__ T weight(const SegmentCall<T>& call, int64_t unit) {
    return call.weights ? call.weights[unit] : T(1);
}

// In the block that arrives last: values (1 + M, U) → loss, means and counts. entries (M, U): the number of entries
// summed in a value; null: one, or none if the value is NaN.
template <int THREADS, int K, int M, typename T>
__device__ void finish(const SegmentCall<T>& call, const uint32_t* entries, Scratch<T, THREADS, K, M>& scratch) {
    static_assert(K >= 1 + M, "a loss and the metrics");
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // orders this block's writes before its ticket
        scratch.last = atomicAdd(call.ticket, 1u) == gridDim.x - 1;
        __threadfence();  // orders the reads of the others' writes after their tickets
    }
    __syncthreads();
    if (!scratch.last) return;
    T sums[1 + M] = {};
    uint32_t counts[M] = {};
    for (int64_t unit = threadIdx.x; unit < call.units; unit += THREADS) {
        sums[0] += weight(call, unit) * call.values[unit];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const T x = call.values[(1 + m) * call.units + unit];
            const uint32_t count = entries ? entries[m * call.units + unit] : uint32_t(x == x);
            counts[m] += count;
            if (count) sums[1 + m] += x;
        }
    }
    block_sum<THREADS>(sums, scratch.lanes);
    block_sum<THREADS>(counts, scratch.counts);
    if (threadIdx.x == 0) {
        *call.loss = factor(call) * sums[0];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            call.means[m] = counts[m] ? sums[1 + m] / T(counts[m]) : T(NAN);
            call.counts[m] = counts[m];
        }
    }
}

template <typename T>
__device__ void write_values(
    const SegmentCall<T>& call, int64_t unit, bool valid, T loss, const T* metrics, int count) {
    call.values[unit] = valid ? loss : T(0);
    for (int m = 0; m < count; ++m) call.values[(1 + m) * call.units + unit] = valid ? metrics[m] : T(NAN);
}

template <int THREADS, typename T>
__device__ void fill(T* u, Segment at, T value) {
    for (int64_t i = at.begin + threadIdx.x; i < at.end; i += THREADS) u[i] = value;
}

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) segment_pairs(SegmentPairs<T> args) {
    constexpr int M = PAIR_METRICS;
    using Shared = Scratch<T, THREADS, 1 + M, M>;
    XPO_SHARED(Shared, scratch, 1);
    const SegmentCall<T>& call = args.call;
    const PairLoss<T> f{args.kind,           T(args.scale),  T(args.reward_scale), T(args.positive),
                        T(args.negative),    T(args.target), T(args.shift),        T(args.price),
                        T(args.likelihood),  args.by_length != 0,
                        args.likelihood_by_length != 0};
    const auto logp = [&](int64_t i) { return call.logp[i]; };
    for (int64_t pair = blockIdx.x; pair < call.units; pair += gridDim.x) {
        const int64_t row_w = pair * args.pair_step, row_l = row_w + args.side_step;
        const Segment w = segment(call.offsets, row_w, call.start, call.tokens);
        const Segment l = segment(call.offsets, row_l, call.start, call.tokens);
        T sums[2] = {lane_sum<T>(w.begin, w.end, int(threadIdx.x), THREADS, logp),
                     lane_sum<T>(l.begin, l.end, int(threadIdx.x), THREADS, logp)};
        block_sum<THREADS>(sums, scratch->lanes);
        const int64_t len_w = args.len_w ? args.len_w[pair] : w.end - w.begin;
        const int64_t len_l = args.len_l ? args.len_l[pair] : l.end - l.begin;
        const bool valid = len_w > 0 && len_l > 0;
        // Every thread computes it: a broadcast would take as long.
        const PairValue<T> value = pair_loss(f, sums[0], sums[1], args.ref_w ? args.ref_w[pair] : T(0),
                                             args.ref_l ? args.ref_l[pair] : T(0), T(len_w), T(len_l));
        const T scale = factor(call) * weight(call, pair);
        fill<THREADS>(call.u, w, valid ? scale * value.d_w : T(0));
        fill<THREADS>(call.u, l, valid ? scale * value.d_l : T(0));
        if (threadIdx.x == 0) {
            call.sums[row_w] = sums[0];
            call.sums[row_l] = sums[1];
            const T metrics[M] = {value.reward_w, value.reward_l, T(value.reward_w > value.reward_l),
                                  value.reward_w - value.reward_l, sums[0], sums[1], -value.mean_w};
            write_values(call, pair, valid, value.loss, metrics, M);
        }
    }
    finish(call, static_cast<const uint32_t*>(nullptr), *scratch);
}

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) segment_rows(SegmentRows<T> args) {
    constexpr int M = ROW_METRICS;
    using Shared = Scratch<T, THREADS, 1 + M, M>;
    XPO_SHARED(Shared, scratch, 1);
    const SegmentCall<T>& call = args.call;
    const RowLoss<T> f{args.kind, T(args.beta), T(args.lambda_d), T(args.lambda_u)};
    const auto logp = [&](int64_t i) { return call.logp[i]; };
    const T point = args.point ? *args.point : T(0);
    for (int64_t row = blockIdx.x; row < call.units; row += gridDim.x) {
        const Segment at = segment(call.offsets, row, call.start, call.tokens);
        T sum[1] = {lane_sum<T>(at.begin, at.end, int(threadIdx.x), THREADS, logp)};
        block_sum<THREADS>(sum, scratch->lanes);
        const bool valid = (args.length ? args.length[row] : at.end - at.begin) > 0;
        const bool desirable = args.desirable[row] != 0;
        const RowValue<T> value = row_loss(f, sum[0], args.ref[row], desirable, point);
        fill<THREADS>(call.u, at, valid ? factor(call) * weight(call, row) * value.d : T(0));
        if (threadIdx.x == 0) {
            call.sums[row] = sum[0];
            const T metrics[M] = {desirable ? value.reward : T(NAN), desirable ? T(NAN) : value.reward,
                                  desirable ? sum[0] : T(NAN), desirable ? T(NAN) : sum[0], point};
            write_values(call, row, valid, value.loss, metrics, M);
        }
    }
    finish(call, static_cast<const uint32_t*>(nullptr), *scratch);
}

template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) segment_tokens(SegmentTokens<T> args) {
    constexpr int M = TOKEN_METRICS, LOSS = M, SLOPE = M + 1, LOGP = M + 2;
    using Shared = Scratch<T, THREADS, M + 3, M>;
    XPO_SHARED(Shared, scratch, 1);
    const SegmentCall<T>& call = args.call;
    const TokenLoss<T> f{args.kind,   T(args.log_low), T(args.log_high), T(args.log_cap),
                         T(args.cap), T(args.penalty), T(args.tau_pos),  T(args.tau_neg)};
    const bool has_kl = args.ref != nullptr || f.kind == PENALISED;
    const auto place = [&](int64_t i) { return args.positions ? args.positions[i] : i; };
    const auto inside = [&](int64_t i) { return args.mask == nullptr || args.mask[place(i)] != 0; };
    const auto log_ratio = [&](int64_t i) { return args.old ? call.logp[i] - args.old[place(i)] : T(0); };
    for (int64_t row = blockIdx.x; row < call.units; row += gridDim.x) {
        const Segment at = segment(call.offsets, row, call.start, call.tokens);
        T row_ratio = 0, share = 1;  // the row's log r; the factor of a token's loss in the row's loss
        T each = 1;                  // derivative of the row's log r with respect to a token's
        if (args.sequence) {
            T sums[2] = {
                lane_sum<T>(at.begin, at.end, int(threadIdx.x), THREADS,
                            [&](int64_t i) { return inside(i) ? log_ratio(i) : T(0); }),
                lane_sum<T>(at.begin, at.end, int(threadIdx.x), THREADS, [&](int64_t i) { return T(inside(i)); })};
            block_sum<THREADS>(sums, scratch->lanes);
            each = sums[1] > 0 ? 1 / sums[1] : T(1);
            row_ratio = sums[0] / (sums[1] > 0 ? sums[1] : T(1));
            if (args.sequence == MEAN_OF_ROW) share = each;
        }
        const T scale = factor(call) * weight(call, row) * share;
        T sums[M + 3] = {};  // of metrics, losses, derivatives with respect to the row's log r, and log-probs
        uint32_t entries[M] = {};
        for (int64_t i = at.begin + threadIdx.x; i < at.end; i += THREADS) {
            T u = 0, loss = 0;
            if (inside(i)) {
                const T logp = call.logp[i];
                const T advantage = args.advantage[args.advantage_by_token ? place(i) : row];
                const TokenValue<T> value = token_loss(f, logp, args.sequence ? row_ratio : log_ratio(i), advantage);
                Slope<T> kl{value.kl, 0};
                loss = value.loss;
                if (args.ref) {
                    kl = k3(logp, args.ref[place(i)]);
                    loss += T(args.beta) * kl.value;
                    u = T(args.beta) * kl.slope;
                }
                if (args.sequence) {
                    sums[SLOPE] += value.d;  // is added to u at the end of the row
                } else {
                    u += value.d;
                }
                sums[LOSS] += loss;
                sums[LOGP] += logp;
                const T metrics[M] = {value.ratio, T(value.low), T(value.high), T(value.low || value.high), kl.value};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    const bool there = metrics[m] == metrics[m] && (m != KL_METRIC || has_kl);
                    entries[m] += there;
                    if (there) sums[m] += metrics[m];
                }
            }
            call.u[i] = scale * u;
            if (args.token_losses) args.token_losses[i] = share * loss;
        }
        block_sum<THREADS>(sums, scratch->lanes);
        block_sum<THREADS>(entries, scratch->counts);
        if (args.sequence) {
            const T own = scale * each * sums[SLOPE];
            for (int64_t i = at.begin + threadIdx.x; i < at.end; i += THREADS)
                if (inside(i)) call.u[i] += own;
        }
        if (threadIdx.x == 0) {
            call.sums[row] = sums[LOGP];
            call.values[row] = share * sums[LOSS];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const bool of_row = args.sequence && m != KL_METRIC;  // one entry per row, the mean over its tokens
                call.values[(1 + m) * call.units + row] = of_row && entries[m] ? sums[m] / T(entries[m]) : sums[m];
                args.row_counts[m * call.units + row] = of_row ? uint32_t(entries[m] > 0) : entries[m];
            }
        }
    }
    finish(call, args.row_counts, *scratch);
}

// --- launches --------------------------------------------------------------------------------------------------------

constexpr int64_t MOST = INT_MAX;  // of units and of tokens: they are counted in 32 bits

template <typename T>
int check(const SegmentCall<T>& call) {
    if (call.tokens < 0 || call.units < 0 || call.tokens > MOST || call.units > MOST) return XPO_BAD_SIZE;
    const bool whole = call.offsets && call.loss && call.means && call.counts && call.ticket;
    const bool of_tokens = call.tokens == 0 || (call.logp && call.u);
    const bool of_units = call.units == 0 || (call.sums && call.values);
    return whole && of_tokens && of_units ? 0 : XPO_MISSING_POINTER;
}

template <typename T>
cudaError_t clear(T* memory, int64_t count, void* stream) {
    if (count <= 0) return cudaSuccess;
    return cudaMemsetAsync(memory, 0, size_t(count) * sizeof(T), static_cast<cudaStream_t>(stream));
}

// Without units one block writes the empty loss; log-probs that belong to no unit get u = 0.
template <int BLOCKS, int THREADS, typename Call>
int launch_units(void (*kernel)(Call), const Call& args, void* stream) {
    const int64_t units = args.call.units;
    cudaError_t error = clear(args.call.ticket, 1, stream);
    if (error == cudaSuccess) error = clear(args.call.u, args.call.tokens, stream);
    if (error != cudaSuccess) return int(error);
    return int(launch(kernel, Grid{units < 1 ? 1 : units < BLOCKS ? units : BLOCKS, THREADS}, stream, args));
}

template <typename T, int BLOCKS, int THREADS>
int launch_pairs(const SegmentPairs<T>* args, void* stream) {
    if (args == nullptr) return XPO_MISSING_POINTER;
    if (const int code = check(args->call)) return code;
    if (args->pair_step < 1 || args->side_step < 1) return XPO_BAD_SIZE;
    if (args->kind < 0 || args->kind >= PAIR_KINDS) return XPO_BAD_TYPE;
    return launch_units<BLOCKS, THREADS>(segment_pairs<T, THREADS>, *args, stream);
}

template <typename T, int BLOCKS, int THREADS>
int launch_rows(const SegmentRows<T>* args, void* stream) {
    if (args == nullptr) return XPO_MISSING_POINTER;
    if (const int code = check(args->call)) return code;
    if (args->kind < 0 || args->kind >= ROW_KINDS) return XPO_BAD_TYPE;
    if (args->call.units > 0 && !(args->ref && args->desirable)) return XPO_MISSING_POINTER;
    return launch_units<BLOCKS, THREADS>(segment_rows<T, THREADS>, *args, stream);
}

template <typename T, int BLOCKS, int THREADS>
int launch_tokens(const SegmentTokens<T>* args, void* stream) {
    if (args == nullptr) return XPO_MISSING_POINTER;
    if (const int code = check(args->call)) return code;
    const bool known = args->kind >= 0 && args->kind < TOKEN_KINDS;
    if (!known || args->sequence < BY_TOKEN || args->sequence > SUM_OF_ROW) return XPO_BAD_TYPE;
    const bool of_tokens = args->call.tokens == 0 || args->advantage;
    if (!of_tokens || (args->call.units > 0 && !args->row_counts)) return XPO_MISSING_POINTER;
    if (const cudaError_t error = clear(args->token_losses, args->token_losses ? args->call.tokens : 0, stream);
        error != cudaSuccess)
        return int(error);
    return launch_units<BLOCKS, THREADS>(segment_tokens<T, THREADS>, *args, stream);
}

}  // namespace
}  // namespace xpo

#if !defined(XPO_EMULATE)
constexpr int BLOCKS = 65535, THREADS = 256;

int xpo_segment_pairs(const void* args, void* stream) {
    return xpo::launch_pairs<float, BLOCKS, THREADS>(static_cast<const xpo::SegmentPairs<float>*>(args), stream);
}

int xpo_segment_rows(const void* args, void* stream) {
    return xpo::launch_rows<float, BLOCKS, THREADS>(static_cast<const xpo::SegmentRows<float>*>(args), stream);
}

int xpo_segment_tokens(const void* args, void* stream) {
    return xpo::launch_tokens<float, BLOCKS, THREADS>(static_cast<const xpo::SegmentTokens<float>*>(args), stream);
}
#endif
