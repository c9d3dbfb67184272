// The losses of xpo_fast/methods that the segment kernels compute, each with its derivative, and the order in which a
// segment is summed. Plain arithmetic for device and host; the pure functions in methods/ are the definition.
//
// At a kink the derivative is the one that autograd gives for the pure function: relu'(0) = 0, and a clamp passes the
// gradient at its bounds. Comparisons are written so that NaN stays NaN.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define XPO_BOTH __host__ __device__ __forceinline__
#else
#define XPO_BOTH inline
#endif

namespace xpo {

// --- the sum of a segment --------------------------------------------------------------------------------------------
// Lane i of L adds x[i], x[i + L], …; then a binary tree adds the lanes. The order depends only on the segment's length
// and L, so a sum is the same to the bit whatever surrounds the segment. An empty segment sums to 0.

template <typename T, typename Fetch>
XPO_BOTH T lane_sum(int64_t begin, int64_t end, int lane, int lanes, Fetch fetch) {
    T total = 0;
#pragma unroll 4
    for (int64_t i = begin + lane; i < end; i += lanes) total += fetch(i);
    return total;
}

// One level of the tree over K arrays of `lanes` partial sums, x (K, lanes). All lanes call it, `width` = lanes/2, …,
// 2, 1.
template <int K, typename T>
XPO_BOTH void tree_step(T* x, int lane, int width, int lanes) {
    if (lane < width) {
#pragma unroll
        for (int k = 0; k < K; ++k) x[k * lanes + lane] += x[k * lanes + lane + width];
    }
}

// The place of a segment among the n values of a call, whose first has the offset `start`. For any offsets,
// 0 ≤ begin ≤ end ≤ n.
struct Segment {
    int64_t begin, end;
};

XPO_BOTH Segment segment(const int64_t* offsets, int64_t row, int64_t start, int64_t n) {
    int64_t begin = offsets[row] - start, end = offsets[row + 1] - start;
    begin = begin < 0 ? 0 : begin > n ? n : begin;
    end = end < begin ? begin : end > n ? n : end;
    return {begin, end};
}

// --- pieces ----------------------------------------------------------------------------------------------------------

template <typename T>
struct Slope {
    T value, slope;
};

// log(1 + eˣ) = −log σ(−x)
template <typename T>
XPO_BOTH T softplus(T x) {
    return (x <= 0 ? T(0) : x) + log1p(exp(-fabs(x)));
}

template <typename T>
XPO_BOTH T sigmoid(T x) {
    const T e = exp(-fabs(x));
    return (x < 0 ? e : T(1)) / (1 + e);
}

template <typename T>
XPO_BOTH Slope<T> relu(T x) {
    return x <= 0 ? Slope<T>{0, 0} : Slope<T>{x, 1};
}

// `top` of math.past_overflow, the log of the largest number minus 12, and its exponential.
template <typename T>
struct Overflow;
template <>
struct Overflow<float> {
    static constexpr double top = 76.72283905206835, exp_top = 2.0907669978359585e33;
};
template <>
struct Overflow<double> {
    static constexpr double top = 697.782712893384, exp_top = 1.1045408366714095e303;
};

// eˣ, and beyond `top` its tangent.
template <typename T>
XPO_BOTH Slope<T> exp_tangent(T x) {
    const T top = T(Overflow<T>::top);
    if (x > top) return {T(Overflow<T>::exp_top) * (1 + (x - top)), T(Overflow<T>::exp_top)};
    const T e = exp(x);
    return {e, e};
}

// eˣ − 1 likewise, and the slope minus 1, as k3 needs them: without cancellation near 0.
template <typename T>
XPO_BOTH Slope<T> expm1_tangent(T x) {
    const T top = T(Overflow<T>::top);
    if (x > top) return {T(Overflow<T>::exp_top) * (1 + (x - top)), T(Overflow<T>::exp_top)};
    const T e = expm1(x);
    return {e, e};
}

// --- pairs -----------------------------------------------------------------------------------------------------------

enum PairKind : int64_t { LOGISTIC, HINGE, SQUARED, EXPONENTIAL, TRUNCATED_QUADRATIC, SAVAGE, PAIR_KINDS };

// L = f(h) − likelihood·m_w, h = scale·(x_w − x_l) + price·(len_w − len_l) − shift, x = logp − ref_logp, or x divided
// by the length; m_w = logp_w, or logp_w divided by the length. f by `kind`: positive·softplus(−h) +
// negative·softplus(h); max(0, target − h); (h − target)²; e⁻ʰ; max(0, 1 − h)²; σ(−h)². Rewards are reward_scale·x.
template <typename T>
struct PairLoss {
    int64_t kind;
    T scale, reward_scale, positive, negative, target, shift, price, likelihood;
    bool by_length, likelihood_by_length;
};

template <typename T>
struct PairValue {
    T loss, d_w, d_l;  // the derivatives with respect to logp_w and logp_l
    T reward_w, reward_l, mean_w;
};

template <typename T>
XPO_BOTH Slope<T> margin_loss(const PairLoss<T>& f, T h) {
    switch (f.kind) {
        case LOGISTIC:
            return {f.positive * softplus(-h) + f.negative * softplus(h),
                    f.negative * sigmoid(h) - f.positive * sigmoid(-h)};
        case HINGE: {
            const Slope<T> gap = relu(f.target - h);
            return {gap.value, -gap.slope};
        }
        case SQUARED: {
            const T gap = h - f.target;
            return {gap * gap, 2 * gap};
        }
        case EXPONENTIAL: {
            const Slope<T> e = exp_tangent(-h);
            return {e.value, -e.slope};
        }
        case TRUNCATED_QUADRATIC: {
            const Slope<T> gap = relu(1 - h);
            return {gap.value * gap.value, -2 * gap.value};
        }
        default: {  // SAVAGE
            const T s = sigmoid(-h);
            return {s * s, -2 * s * s * sigmoid(h)};
        }
    }
}

template <typename T>
XPO_BOTH PairValue<T> pair_loss(const PairLoss<T>& f, T logp_w, T logp_l, T ref_w, T ref_l, T len_w, T len_l) {
    T x_w = logp_w - ref_w, x_l = logp_l - ref_l;
    if (f.by_length) {
        x_w /= len_w;
        x_l /= len_l;
    }
    const T h = f.scale * x_w - f.scale * x_l + f.price * (len_w - len_l) - f.shift;
    const Slope<T> margin = margin_loss(f, h);
    const T mean_w = f.likelihood_by_length ? logp_w / len_w : logp_w;
    const T d = f.scale * margin.slope;
    const T d_mean = f.likelihood_by_length ? f.likelihood / len_w : f.likelihood;
    return {margin.value - f.likelihood * mean_w,
            (f.by_length ? d / len_w : d) - d_mean,
            f.by_length ? -d / len_l : -d,
            f.reward_scale * x_w,
            f.reward_scale * x_l,
            mean_w};
}

// --- rows ------------------------------------------------------------------------------------------------------------

enum RowKind : int64_t { SIGMOID_GAIN, LOGISTIC_GAIN, ROW_KINDS };

// With Δ = logp − ref_logp: SIGMOID_GAIN, KTO: λ_D σ(−g) if desirable, else λ_U σ(g), with g = β(Δ − point);
// LOGISTIC_GAIN, BCO: λ_D softplus(−g) if desirable, else λ_U softplus(g), with g = βΔ − point.
template <typename T>
struct RowLoss {
    int64_t kind;
    T beta, lambda_d, lambda_u;
};

template <typename T>
struct RowValue {
    T loss, d, reward;  // d: the derivative with respect to logp
};

template <typename T>
XPO_BOTH RowValue<T> row_loss(const RowLoss<T>& f, T logp, T ref, bool desirable, T point) {
    const T ratio = logp - ref, reward = f.beta * ratio;
    const T gain = f.kind == SIGMOID_GAIN ? f.beta * (ratio - point) : reward - point;
    const T lambda = desirable ? f.lambda_d : f.lambda_u, x = desirable ? -gain : gain;
    const T d = (desirable ? -f.beta : f.beta) * lambda * sigmoid(x);
    if (f.kind == SIGMOID_GAIN) return {lambda * sigmoid(x), d * sigmoid(-x), reward};
    return {lambda * softplus(x), d, reward};
}

// --- tokens ----------------------------------------------------------------------------------------------------------

enum TokenKind : int64_t { CLIPPED, PENALISED, PLAIN, WEIGHTED, GATED, TOKEN_KINDS };

// With r = e^log_ratio and A the advantage:
// CLIPPED    −min(r·A, clip(r)·A), with bounds on log r: log_high from above if A > 0; log_low from below if A < 0, and
//            then log_cap from above (dual clip; ∞: none);
// PENALISED  −r·A + penalty·(r − 1 − log r);
// PLAIN      −A·logp;
// WEIGHTED   −sg(min(r, cap))·A·logp;
// GATED      −(4/τ) σ(τ(r − 1))·A, τ = tau_pos if A > 0, else tau_neg.
template <typename T>
struct TokenLoss {
    int64_t kind;
    T log_low, log_high, log_cap, cap, penalty, tau_pos, tau_neg;
};

template <typename T>
struct TokenValue {
    T loss, d;      // d: the derivative with respect to log_ratio, which is that with respect to logp
    T ratio;        // of PLAIN: the log-prob
    bool low, high; // clipped
    T kl;           // of PENALISED: r − 1 − log r
};

template <typename T>
XPO_BOTH TokenValue<T> token_loss(const TokenLoss<T>& f, T logp, T log_ratio, T advantage) {
    if (f.kind == PLAIN) return {-advantage * logp, -advantage, logp, false, false, 0};
    const Slope<T> ratio = exp_tangent(log_ratio);
    switch (f.kind) {
        case CLIPPED: {
            const bool negative = advantage < 0, positive = advantage > 0;
            const bool below = negative && log_ratio < f.log_low;
            const bool above = log_ratio > (negative ? f.log_cap : f.log_high);
            const T bound = below ? f.log_low : negative ? f.log_cap : f.log_high;
            if (below || above)
                return {-advantage * exp_tangent(bound).value, 0, ratio.value, below, positive && above, 0};
            return {-advantage * ratio.value, -advantage * ratio.slope, ratio.value, false, false, 0};
        }
        case PENALISED: {
            const Slope<T> e = expm1_tangent(log_ratio);
            const T kl = e.value - log_ratio;
            return {-ratio.value * advantage + f.penalty * kl, -ratio.slope * advantage + f.penalty * e.slope,
                    ratio.value, false, false, kl};
        }
        case WEIGHTED: {
            const bool above = ratio.value > f.cap;
            const T weight = above ? f.cap : ratio.value;
            return {-weight * advantage * logp, -weight * advantage, ratio.value, false, above && advantage > 0, 0};
        }
        default: {  // GATED
            const T tau = advantage > 0 ? f.tau_pos : f.tau_neg, x = tau * (ratio.value - 1);
            const T s = sigmoid(x);
            return {-(4 / tau) * s * advantage, -4 * s * sigmoid(-x) * ratio.slope * advantage, ratio.value, false,
                    false, 0};
        }
    }
}

// k3 = ref/π − 1 − log(ref/π), and its derivative with respect to logp.
template <typename T>
XPO_BOTH Slope<T> k3(T logp, T ref) {
    const T x = ref - logp;
    const Slope<T> e = expm1_tangent(x);
    return {e.value - x, -e.slope};
}

}  // namespace xpo
