// The sums of one pass over the logits of a row: the largest logit, Σ e^(z − largest), and the sums behind entropy, Σ
// p² and the mean. Sums of parts can be merged in any grouping; the statistics follow from them. Plain arithmetic for
// device and host, in float32.
//
// A logit of −∞ adds nothing; a row of only −∞ has lse −∞ and logp NaN. NaN and +∞ make every statistic of a row NaN,
// as in torch.
#pragma once

#include <math.h>
#include <stdint.h>

#if !defined(XPO_BOTH)
#if defined(__CUDACC__)
#define XPO_BOTH __host__ __device__ __forceinline__
#else
#define XPO_BOTH inline
#endif
#endif

namespace xpo {

// Stands for −∞: differences, and their products with sums of exponentials, stay finite.
constexpr float FLOOR = -1e30f;

XPO_BOTH float exponential(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);  // relative error |x|·2⁻²⁴; and e^x itself is e^−|x| of the largest term
#else
    return expf(x);
#endif
}

// One rounding each, never fused: the target's logit and the largest are compared, wherever each was computed.
XPO_BOTH float rounded_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

XPO_BOTH float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// The scaling of products: gain = logit_scale / temperature, inner = logit_scale / softcap, ceiling = softcap /
// temperature.
struct Scaling {
    float gain, inner, ceiling;
    float flat;  // 1 / ceiling
};

// Product plus bias to final logit.
template <bool SOFTCAP>
XPO_BOTH float final_logit(float x, const Scaling& s) {
    return SOFTCAP ? rounded_product(tanhf(rounded_product(x, s.inner)), s.ceiling) : rounded_product(x, s.gain);
}

// The derivative of a final logit with respect to its product.
template <bool SOFTCAP>
XPO_BOTH float slope(float z, const Scaling& s) {
    const float t = SOFTCAP ? z * s.flat : 0.0f;
    return s.gain * (1.0f - t * t);
}

struct Sums {
    float top = FLOOR;      // the largest logit
    float total = 0;        // Σ e^(z − top)
    float weighted = 0;     // Σ e^(z − top) (z − top); this and the rest with STATISTICS only
    float squares = 0;      // Σ e^(2 (z − top))
    float plain = 0;        // Σ z
};

// A max that ignores NaN: the NaN stays in the sums.
XPO_BOTH float larger(float a, float b) { return fmaxf(a, b); }

template <bool STATISTICS>
XPO_BOTH void raise(Sums& s, float top) {
    const float share = exponential(s.top - top);
    if (STATISTICS) {
        s.weighted = share * (s.weighted + larger(s.top - top, FLOOR) * s.total);
        s.squares *= share * share;
    }
    s.total *= share;
    s.top = top;
}

// Adds K more logits, of which the first `valid` exist; the others are −∞.
template <bool STATISTICS, int K>
XPO_BOTH void add(Sums& s, const float (&z)[K], int valid) {
    float top = s.top;
#pragma unroll
    for (int k = 0; k < K; ++k) top = larger(top, z[k]);
    raise<STATISTICS>(s, top);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const float gap = z[k] - top, e = exponential(gap);
        s.total += e;
        if (STATISTICS) {
            s.weighted += e * larger(gap, FLOOR);
            s.squares += e * e;
            if (k < valid) s.plain += z[k];
        }
    }
}

// Merges two parts; both threads of a pair compute the same bits.
template <bool STATISTICS>
XPO_BOTH Sums merged(Sums a, Sums b) {
    const float top = larger(a.top, b.top);
    raise<STATISTICS>(a, top);
    raise<STATISTICS>(b, top);
    return {top, rounded_sum(a.total, b.total), rounded_sum(a.weighted, b.weighted), rounded_sum(a.squares, b.squares),
            rounded_sum(a.plain, b.plain)};
}

// The statistics of a row.
struct Row {
    float largest, log_total;

    XPO_BOTH explicit Row(const Sums& s) : largest(s.top == FLOOR ? -INFINITY : s.top), log_total(logf(s.total)) {}
    XPO_BOTH float log_p(float z) const { return (z - largest) - log_total; }
    XPO_BOTH float lse() const { return largest + log_total; }
    XPO_BOTH float entropy(const Sums& s) const { return log_total - s.weighted / s.total; }
    XPO_BOTH float log_sum_sq_probs(const Sums& s) const { return logf(s.squares) - 2.0f * log_total; }
};

}  // namespace xpo
