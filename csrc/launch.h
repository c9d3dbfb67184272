// How kernels are launched: host code over CUDA's runtime, or over what emulate.h has in its place.
//
// What is asked of a device, of a kernel and of a cluster never changes: it is asked once, and a launch costs a
// look-up.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <tuple>

namespace xpo {

struct Limits {
    int64_t shared_bytes;  // that a block can opt in to, static and dynamic together
    int clusters;          // the most blocks of a cluster, 1 for none
    int threads;           // of a block
};

struct Grid {
    int64_t blocks;
    int threads;  // of a block
    int64_t shared_bytes = 0;
    int ranks = 1;  // blocks of a cluster
};

// What may be asked about: a device, a kernel on it, clusters of a kernel.
struct Subject {
    int device;
    const void* kernel = nullptr;
    int threads = 0, ranks = 0;
    int64_t shared_bytes = 0;

    auto all() const { return std::tie(device, kernel, threads, ranks, shared_bytes); }
    bool operator<(const Subject& other) const { return all() < other.all(); }
};

// The answers to one question. An error is not remembered.
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

// Asks a question, which is a type of its own, unless it has an answer. Answers are never destroyed: a thread may still
// launch while the process exits.
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

// Lets a kernel take all the dynamic shared memory that a block can have beside its static memory. The attribute is the
// kernel's on a device, not a launch's: set to what one launch needs, it would fail another thread's that needs more.
inline cudaError_t opt_in(const void* kernel, int device) {
    const auto question = [kernel, device](bool&) {
        Limits limits{};
        cudaFuncAttributes found{};
        cudaError_t error = read_limits(device, limits);
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, kernel);
        const int most = int(limits.shared_bytes) - int(found.sharedSizeBytes);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        // What a multiprocessor does not give to shared memory is cache, of which these kernels read nothing twice.
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        return error;
    };
    bool done = false;
    return ask_once(Subject{device, kernel}, done, question);
}

// cudaErrorInvalidClusterSize where the device, or the share of it that is given (MIG), has no place for such a cluster.
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
