// The segment kernels on the host, for tests: run by emulate_fibers.h in float and in double, and the sum of one
// segment.
//   g++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -o libxpo_fast_host.so csrc/host.cpp
#define XPO_EMULATE
#include "emulate.h"

#include "segments.cu"

const char* xpo_error(int) { return "refused"; }

// Blocks so small that in short rows some threads have no work and in longer ones a thread has several tokens; and so
// few that a block takes several units.
constexpr int BLOCKS = 5, THREADS = 64;

#define XPO_LAUNCHER(verb, Call)                                                                                 \
    int xpo_segment_##verb(const void* call, void* stream) {                                                     \
        return xpo::launch_##verb<float, BLOCKS, THREADS>(static_cast<const xpo::Call<float>*>(call), stream);   \
    }                                                                                                            \
    XPO_EXPORT int xpo_segment_##verb##_double(const void* call, void* stream) {                                 \
        return xpo::launch_##verb<double, BLOCKS, THREADS>(static_cast<const xpo::Call<double>*>(call), stream); \
    }                                                                                                            \
    XPO_EXPORT int64_t xpo_sizeof_##verb() { return sizeof(xpo::Call<float>); }

XPO_LAUNCHER(pairs, SegmentPairs)
XPO_LAUNCHER(rows, SegmentRows)
XPO_LAUNCHER(tokens, SegmentTokens)

// Sums x[begin … end) in a kernel's order, lane by lane.
template <typename T>
T segment_sum(const T* x, int64_t begin, int64_t end, int lanes) {
    std::vector<T> partial(lanes);
    for (int lane = 0; lane < lanes; ++lane)
        partial[lane] = xpo::lane_sum<T>(begin, end, lane, lanes, [&](int64_t i) { return x[i]; });
    for (int width = lanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < lanes; ++lane) xpo::tree_step<1>(partial.data(), lane, width, lanes);
    return partial[0];
}

XPO_EXPORT float xpo_segment_sum(const float* x, int64_t begin, int64_t end, int lanes) {
    return segment_sum(x, begin, end, lanes);
}
XPO_EXPORT double xpo_segment_sum_double(const double* x, int64_t begin, int64_t end, int lanes) {
    return segment_sum(x, begin, end, lanes);
}
