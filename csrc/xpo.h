// The C ABI of libxpo_fast_cuda, which Python calls through ctypes.
//
// Pointers point to device memory, strides are in elements, `stream` is a cudaStream_t. A launch works on the device of
// the current context, waits for nothing, and returns 0, a cudaError_t, or one of XPO_… below; an empty launch returns
// 0.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
#define XPO_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define XPO_EXPORT
#endif

// Errors of a call that no cudaError_t describes.
enum {
    XPO_MISSING_POINTER = -1,
    XPO_BAD_SIZE = -2,  // negative, or more than a launch can count
    XPO_BAD_TYPE = -3,  // no such dtype, or no such loss
    XPO_BAD_PLAN = -4,  // cannot hold the row, or has a shape that no launch has
};

enum { XPO_FLOAT32 = 0, XPO_BFLOAT16 = 1, XPO_FLOAT16 = 2 };

XPO_EXPORT const char* xpo_error(int code);        // the message of a code
XPO_EXPORT const char* xpo_architectures(void);    // targets that the library was compiled for, separated by spaces

// Versions as CUDA counts them, 1000 · major + 10 · minor; 0 for none.
typedef struct {
    int32_t driver;      // the newest CUDA that the driver supports
    int32_t runtime;     // the CUDA that the library was compiled with
    int32_t capability;  // of the current device: 10 · major + minor
} XpoUsable;

// Returns 0 if the current device can run the kernels, else the cudaError_t that a launch would fail with. Creates the
// device's context.
XPO_EXPORT int xpo_usable(XpoUsable* found);

// --- rows: rows.cu ---------------------------------------------------------------------------------------------------

// Statistics of softmax(z), z the final logits, z = softcap(logit_scale (x + bias)) / temperature, and the gradient of
// Σ u_logp · logp + u_lse · lse with respect to the products x. Null: not wanted. With neither u, the gradient of Σ
// logp.
typedef struct {
    const float* products;    // (n, V), rows `stride` apart
    const float* bias;        // (V,) or null
    const int64_t* targets;   // (n,); outside [0, V): logp is NaN, top1 is 0, and nothing is read
    float* logp;              // (n,) or null; so are the next five
    float* lse;
    float* entropy;
    float* log_sum_sq_probs;
    float* mean_logit;
    float* top1;              // 1 or 0
    const float* u_logp;      // (n,) or null
    const float* u_lse;       // (n,) or null
    void* grad;               // (n, V) or null, rows `grad_stride` apart; float32 may be the products themselves
    int64_t n, vocab, stride, grad_stride;
    float gain;               // logit_scale / temperature
    float inner;              // logit_scale / softcap, 0 for no softcap
    float ceiling;            // softcap / temperature
    int32_t grad_type;        // XPO_FLOAT32, …
} XpoRows;

XPO_EXPORT int xpo_rows(const XpoRows* rows, void* stream);

// How the rows of a vocabulary size are read: `ranks` blocks share a row, with `part` columns each (the last ones
// fewer, or none).
typedef struct {
    int32_t ranks;         // blocks per cluster; 1: no cluster
    int32_t part;          // columns: a multiple of a vector of every dtype
    int32_t kept;          // 1: columns stay in shared memory for the gradient; 0: it reads them again
    int32_t threads;       // per block
    int64_t shared_bytes;  // dynamic, per block
} XpoRowPlan;

// Queries no device. shared_limit: bytes that a block can opt in to; clusters: largest cluster in blocks, 1: no
// clusters.
XPO_EXPORT int xpo_plan_rows(int64_t vocab, int64_t shared_limit, int32_t clusters, int32_t threads, int32_t with_grad,
                             XpoRowPlan* plan);

// Follows the given plan instead of the device's own, so that checks can cover every way to read a row. `ranks` is 1,
// 2, 4 or 8, and 1 if nothing is kept. Returns cudaErrorInvalidClusterSize if the device cannot schedule such a
// cluster.
XPO_EXPORT int xpo_rows_planned(const XpoRows* rows, const XpoRowPlan* plan, void* stream);

// --- segments: segments.cu -------------------------------------------------------------------------------------------

// `call` points to a struct of segments.h: xpo::SegmentPairs<float>, SegmentRows<float> or SegmentTokens<float>.
XPO_EXPORT int xpo_segment_pairs(const void* call, void* stream);
XPO_EXPORT int xpo_segment_rows(const void* call, void* stream);
XPO_EXPORT int xpo_segment_tokens(const void* call, void* stream);
