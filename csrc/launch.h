// How kernels are launched: host code over CUDA's runtime, or over emulate.h in its place.
//
// Properties of a device, a kernel and a cluster never change: each is queried once, and then a launch costs a look-up.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <tuple>

namespace xpo {

struct Limits {
    int64_t shared_bytes;  // that a block can opt in to, static plus dynamic
    int clusters;          // largest cluster in blocks; 1: no clusters
    int threads;           // per block
};

struct Grid {
    int64_t blocks;
    int threads;  // per block
    int64_t shared_bytes = 0;
    int ranks = 1;  // blocks per cluster
};

// The subject of a question: a device, a kernel on it, or clusters of a kernel.
struct Subject {
    int device;
    const void* kernel = nullptr;
    int threads = 0, ranks = 0;
    int64_t shared_bytes = 0;

    auto all() const { return std::tie(device, kernel, threads, ranks, shared_bytes); }
    bool operator<(const Subject& other) const { return all() < other.all(); }
};

// The answers to one question. Errors are not kept.
template <typename Answer>
class Asked {
public:
    template <typename Ask>
    cudaError_t operator()(const Subject& subject, Answer& answer, const Ask& ask) {
        const std::lock_guard<std::mutex> guard(lock);
        auto found = answers.find(subject);
        if (found == answers.end()) {
            Answer first{};
            if (const cudaError_t error = ask(first); error != cudaSuccess) return error;
            found = answers.emplace(subject, first).first;
        }
        answer = found->second;
        return cudaSuccess;
    }

private:
    std::mutex lock;
    std::map<Subject, Answer> answers;
};

// Returns the answer to a question, which is a type of its own, and asks it only the first time. Answers are never
// destroyed, because a thread may still launch while the process exits.
template <typename Answer, typename Question>
cudaError_t ask_once(const Subject& subject, Answer& answer, const Question& question) {
    static auto& asked = *new Asked<Answer>;
    return asked(subject, answer, question);
}

inline cudaError_t read_limits(int device, Limits& limits) {
    const auto question = [device](Limits& found) {
        int shared = 0, clusters = 0, threads = 0;
        cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerBlock, device);
        found = {shared, clusters ? 8 : 1, threads};  // 8: what every device with clusters can launch
        return error;
    };
    return ask_once(Subject{device}, limits, question);
}

// Lets a kernel use all the dynamic shared memory that a block can have beside its static memory. The attribute belongs
// to the kernel on a device, not to a launch: set to the need of one launch, it would fail a larger one of another
// thread.
inline cudaError_t opt_in(const void* kernel, int device) {
    const auto question = [kernel, device](bool&) {
        Limits limits{};
        cudaFuncAttributes found{};
        cudaError_t error = read_limits(device, limits);
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, kernel);
        const int most = int(limits.shared_bytes) - int(found.sharedSizeBytes);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        // Memory that is not shared memory serves as cache, which is useless here: these kernels read nothing twice.
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        return error;
    };
    bool done = false;
    return ask_once(Subject{device, kernel}, done, question);
}

// Returns cudaErrorInvalidClusterSize if the device, or its share (MIG), cannot schedule such a cluster.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments... arguments) {
    const auto symbol = reinterpret_cast<const void*>(kernel);
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    if (grid.shared_bytes > 0)
        if (const cudaError_t error = opt_in(symbol, device); error != cudaSuccess) return error;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.ranks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = grid.ranks > 1 ? 1 : 0;
    if (grid.ranks > 1) {
        const auto question = [kernel, &config](int& hosted) {
            return cudaOccupancyMaxActiveClusters(&hosted, kernel, &config);
        };
        const Subject clusters{device, symbol, grid.threads, grid.ranks, grid.shared_bytes};
        int hosted = 0;
        const cudaError_t error = ask_once(clusters, hosted, question);
        if (error != cudaSuccess) return error;
        if (hosted == 0) return cudaErrorInvalidClusterSize;
    }
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace xpo
