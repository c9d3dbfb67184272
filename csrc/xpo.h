// The C ABI of libxpo_fast_cuda: what ctypes calls.
//
// Pointers are of the device, strides in elements, `stream` is a cudaStream_t. A launch works on the device of the
// current context, waits for nothing, and returns 0, a cudaError_t, or one of XPO_… below; nothing to do is 0.
#pragma once

#include <stdint.h>

#if defined(__cplusplus)
#define XPO_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define XPO_EXPORT
#endif

// What is wrong with a call, where no cudaError_t says it.
enum {
    XPO_MISSING_POINTER = -1,
    XPO_BAD_SIZE = -2,  // negative, or more than a launch can count
    XPO_BAD_TYPE = -3,  // no such dtype, or no such loss
    XPO_BAD_PLAN = -4,  // does not hold the row, or is of a shape that no launch has
};

enum { XPO_FLOAT32 = 0, XPO_BFLOAT16 = 1, XPO_FLOAT16 = 2 };

XPO_EXPORT const char* xpo_error(int code);        // what a code says
XPO_EXPORT const char* xpo_architectures(void);    // what the library was compiled for, separated by spaces

// Versions as CUDA counts them, 1000 · major + 10 · minor; 0 for none.
typedef struct {
    int32_t driver;      // the newest CUDA that the driver supports
    int32_t runtime;     // the CUDA that the library was compiled with
    int32_t capability;  // of the current device, 10 · major + minor
} XpoUsable;

// 0 if the current device can run the kernels; else why a launch would fail, a cudaError_t. Makes the device's context.
XPO_EXPORT int xpo_usable(XpoUsable* found);

// --- rows: rows.cu -----------------------------------------------------------------------------------------------------

// Statistics of softmax(z), z the final logits, z = softcap(logit_scale (x + bias)) / temperature, and the gradient of
// Σ u_logp · logp + u_lse · lse by the products x. Null: not wanted. Without either u, the gradient of Σ logp.
typedef struct {
    const float* products;    // (n, V), rows `stride` apart
    const float* bias;        // (V,) or null
    const int64_t* targets;   // (n,); outside [0, V): logp is NaN, top1 is 0, and nothing is read
    float* logp;              // (n,) or null, as the five after it
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

// How rows of a vocabulary are read. `ranks` blocks share a row, `part` columns each (the last of them fewer, or none).
typedef struct {
    int32_t ranks;         // blocks of a cluster; 1: no cluster
    int32_t part;          // columns, whole vectors of every dtype
    int32_t kept;          // 1: in shared memory between the statistics and the gradient; 0: a gradient reads them again
    int32_t threads;       // of a block
    int64_t shared_bytes;  // dynamic, of a block
} XpoRowPlan;

// Asks no device. shared_limit: bytes that a block can opt in to; clusters: the most blocks of a cluster, 1 for none.
XPO_EXPORT int xpo_plan_rows(int64_t vocab, int64_t shared_limit, int32_t clusters, int32_t threads, int32_t with_grad,
                             XpoRowPlan* plan);

// As the plan says and not as the device would have it, for checks of every way to read a row. `ranks` is 1, 2, 4 or 8, and
// 1 where nothing is kept. cudaErrorInvalidClusterSize where the device has no place for such a cluster.
XPO_EXPORT int xpo_rows_planned(const XpoRows* rows, const XpoRowPlan* plan, void* stream);

// --- segments: segments.cu ---------------------------------------------------------------------------------------------

// What `call` points to stands in segments.h: xpo::SegmentPairs<float>, SegmentRows<float>, SegmentTokens<float>.
XPO_EXPORT int xpo_segment_pairs(const void* call, void* stream);
XPO_EXPORT int xpo_segment_rows(const void* call, void* stream);
XPO_EXPORT int xpo_segment_tokens(const void* call, void* stream);
