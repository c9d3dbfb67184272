// xpo_segment_*: from token log-probs and row offsets to sequence sums, loss, metrics and u = ∂loss/∂logp, in one
// launch.
//
// Rows are segments: row i of R has the log-probs logp[offsets[i] − start … offsets[i + 1] − start), cut to the n that
// are given. Every pointer in a struct points to device memory; "or null" marks what may be left out. All arrays are
// contiguous. T is float in the library, and also double in the tests' host build. Every field is 8 bytes wide, so that
// the layout follows from the order.
#pragma once

#include <stdint.h>

namespace xpo {

// The fields that all three have.
template <typename T>
struct SegmentCall {
    int64_t tokens, start, units;  // n; the offset of logp[0]; units: pairs or rows
    const T* logp;                 // (n,)
    const int64_t* offsets;        // (R + 1,)
    const T* weights;              // (U,) factors of the units' losses, or null: 1
    const T* denominator;          // () divisor of the sum, unless it is 0; or null
    double scale;                  // factor of the loss and of u
    T* u;                          // (n,) ∂loss/∂logp, 0 for log-probs of no unit
    T* sums;                       // (R,) sums of logp
    T* values;                     // (1 + M, U): losses, 0 for units left out; metrics, NaN if a unit has none
    T* loss;                       // ()
    T* means;                      // (M,) means of the metrics, NaN over no entry
    int64_t* counts;               // (M,) number of entries of each mean
    uint32_t* ticket;              // () scratch
};

// A unit is a pair of a chosen and a rejected row: rows pair·pair_step and pair·pair_step + side_step. It is left out
// if one of the two has no token. Metrics (7): rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
// logps/chosen, logps/rejected, nll_loss.
template <typename T>
struct SegmentPairs {
    SegmentCall<T> call;
    int64_t pair_step, side_step;
    const T *ref_w, *ref_l;        // (P,) reference log-probs, or null: 0
    const int64_t *len_w, *len_l;  // (P,) scored tokens, or null: the segments' lengths
    int64_t kind;                  // PairKind and PairLoss
    double scale, reward_scale, positive, negative, target, shift, price, likelihood;
    int64_t by_length, likelihood_by_length;
};

// A unit is a row. Metrics (5): rewards/chosen, rewards/rejected, logps/chosen, logps/rejected, point.
template <typename T>
struct SegmentRows {
    SegmentCall<T> call;
    const T* ref;              // (R,)
    const uint8_t* desirable;  // (R,) bool
    const T* point;            // () KTO's reference point, BCO's shift, or null: 0
    const int64_t* length;     // (R,) scored tokens, or null: the segments' lengths
    int64_t kind;              // RowKind and RowLoss
    double beta, lambda_d, lambda_u;
};

// A unit is a row, and its loss the sum of its tokens' losses. Per-token arrays cover all N tokens of the batch: the
// entry of logp[i] is at positions[i]. Values are sums over a row, and row_counts are their numbers of entries. Metrics
// (5): ratio, low-clipped, high-clipped, either, kl.
template <typename T>
struct SegmentTokens {
    SegmentCall<T> call;
    const int64_t* positions;    // (n,), or null: i itself
    const uint8_t* mask;         // (N,) bool, or null: all; u is 0 outside
    const T* advantage;          // (R,), or (N,)
    const T* old;                // (N,) log-probs at sampling, or null: the policy's own
    const T* ref;                // (N,) reference log-probs, or null: no kl
    T* token_losses;             // (n,), 0 for log-probs of no row; or null
    uint32_t* row_counts;        // (M, R)
    int64_t advantage_by_token;  // else by row
    int64_t sequence;            // BY_TOKEN; else r per row, exp of its mean log r, and a mean or sum over it
    int64_t kind;                // TokenKind and TokenLoss
    double log_low, log_high, log_cap, cap, penalty, tau_pos, tau_neg;
    double beta;                 // coefficient of k3 with the reference
};

enum { PAIR_METRICS = 7, ROW_METRICS = 5, TOKEN_METRICS = 5, KL_METRIC = 4 };
enum { BY_TOKEN, MEAN_OF_ROW, SUM_OF_ROW };

}  // namespace xpo
