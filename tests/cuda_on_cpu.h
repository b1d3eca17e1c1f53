// Runs CUDA kernels of csrc/cuda on a CPU, slowly, to test what no compiler checks: indices, barriers, tails.
//
// Force-included before a .cu file that is compiled as C++. A thread of a block is a fiber that runs until its next
// barrier, in an order that the test chooses; shared memory starts as NaN; background copies arrive only when they are
// waited for. So a missing barrier or wait gives wrong numbers instead of a rare race. Warp instructions follow the
// fragment layouts of the PTX manual. Blocks run one after another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define ALBERT_FAST_HARDWARE_CUH  // replaced below

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct __half {
    _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7FFF};
    return {static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline dim3 threadIdx, blockIdx;
namespace albert_fast::cuda {
constexpr std::size_t kEmulatedSharedBytes = 256 * 1024;
inline uint4 shared_memory[kEmulatedSharedBytes / sizeof(uint4)];
}  // namespace albert_fast::cuda

namespace emulation {

enum class Waiting { kNot, kBlock, kWarp, kDone };
struct Copy {
    void* to;
    const void* from;
    int valid;
};
struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf barrier;  // where it waits, once it has started: swapcontext would make a system call at every barrier
    bool started = false;
    dim3 thread;
    Waiting waiting = Waiting::kNot;
    std::vector<std::vector<Copy>> copies{1};  // the last group is still open
};

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 256 * 1024;
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline const char* failure = nullptr;
inline std::uint64_t warp_slots[1024][8];  // what each thread offers its warp

// The device that the kernels see, and what they were last started with; set and read by the tests.
struct Device {
    int multiprocessors = 2, shared_bytes = 232448, order = 0;
    unsigned grid_x = 0, grid_y = 0;
    int launched_bytes = 0, allowed_bytes = 48 * 1024;  // more must be asked for
};
inline Device device;

// What the emulation leaves out, so that a test can see that it would be noticed.
enum class Omitted { kNothing, kBarriers, kWaiting };
inline Omitted omitted = Omitted::kNothing;

inline void fail(const char* message) {
    if (failure == nullptr) failure = message;
}

inline void wait(Waiting where) {
    current->waiting = where;
    if (_setjmp(current->barrier) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
    body();
    current->waiting = Waiting::kDone;
    _longjmp(scheduler, 1);
}

// Runs one thread up to its next barrier.
inline __attribute__((noinline)) void run_thread(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    current = &fiber;
    threadIdx = fiber.thread;
    if (fiber.started) _longjmp(fiber.barrier, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Lets those go on whose barrier is complete; false if nobody can.
inline bool release() {
    bool moved = false;
    const auto all = [](auto first, auto last, Waiting state) {
        return std::all_of(first, last, [&](const Fiber& f) { return f.waiting == state; });
    };
    const auto free_range = [&](auto first, auto last) {
        std::for_each(first, last, [](Fiber& f) { f.waiting = Waiting::kNot; });
        moved = true;
    };
    if (all(fibers.begin(), fibers.end(), Waiting::kBlock)) free_range(fibers.begin(), fibers.end());
    for (auto warp = fibers.begin(); warp != fibers.end(); warp += kWarp) {
        if (all(warp, warp + kWarp, Waiting::kWarp)) free_range(warp, warp + kWarp);
    }
    return moved;
}

inline void run_block(unsigned threads) {
    std::memset(albert_fast::cuda::shared_memory, 0xFF, sizeof albert_fast::cuda::shared_memory);
    fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber fiber;
        fiber.thread = dim3(i, 0, 0);
        fiber.stack = std::move(fibers[i].stack);  // of the block before
        if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
        getcontext(&fiber.start);
        fiber.start.uc_stack = {fiber.stack.get(), 0, kStackBytes};
        fiber.start.uc_link = nullptr;
        fibers[i] = std::move(fiber);
        makecontext(&fibers[i].start, enter, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (device.order == 1) std::reverse(order.begin(), order.end());
    std::mt19937 random(1);
    do {
        if (device.order == 2) std::shuffle(order.begin(), order.end(), random);
        for (const unsigned i : order) {
            if (fibers[i].waiting == Waiting::kNot) run_thread(fibers[i]);
        }
    } while (failure == nullptr && release());
    for (const Fiber& fiber : fibers) {
        if (fiber.waiting != Waiting::kDone) fail("not all threads of a block or warp reached a barrier");
    }
}

inline void arrive(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.valid));
    }
}

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
inline std::uint64_t* slot(int of_lane) { return warp_slots[threadIdx.x / kWarp * kWarp + of_lane]; }

}  // namespace emulation

inline void __syncthreads() {
    if (emulation::omitted != emulation::Omitted::kBarriers) emulation::wait(emulation::Waiting::kBlock);
}
inline void __syncwarp() { emulation::wait(emulation::Waiting::kWarp); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    if (mask != 0xFFFFFFFFu) emulation::fail("a shuffle of part of a warp");
    std::memcpy(emulation::slot(emulation::lane()), &value, sizeof value);
    __syncwarp();
    std::memcpy(&value, emulation::slot(emulation::lane() ^ distance), sizeof value);
    __syncwarp();
    return value;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    if (mask != 0xFFFFFFFFu) emulation::fail("a shuffle of part of a warp");
    std::memcpy(emulation::slot(emulation::lane()), &value, sizeof value);
    __syncwarp();
    std::memcpy(&value, emulation::slot(source % emulation::kWarp), sizeof value);
    __syncwarp();
    return value;
}

inline long long atomicMin(long long* address, long long value) {
    const long long old = *address;
    *address = std::min(old, value);
    return old;
}

namespace albert_fast::cuda {

inline void copy_async_16(void* shared, const void* global, int valid) {
    const auto misaligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 != 0; };
    if (misaligned(shared) || misaligned(global)) emulation::fail("a background copy between misaligned addresses");
    emulation::current->copies.back().push_back({shared, global, valid});
}
inline void store_16(void* global, const void* items) {
    if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) emulation::fail("a misaligned store");
    std::memcpy(global, items, 16);
}
inline void commit_copies() { emulation::current->copies.emplace_back(); }
template <int kPending>
void wait_for_copies() {
    auto& copies = emulation::current->copies;
    if (emulation::omitted == emulation::Omitted::kWaiting) return;
    while (copies.size() > kPending + 1) {
        emulation::arrive(copies.front());
        copies.erase(copies.begin());
    }
}

inline void load_matrices(std::uint32_t (&words)[4], const void* shared) {
    const int lane = emulation::lane();
    if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0) emulation::fail("a misaligned row of a matrix");
    std::memcpy(emulation::slot(lane), &shared, sizeof shared);
    __syncwarp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        const char* row;
        std::memcpy(&row, emulation::slot(matrix * 8 + lane / 4), sizeof row);
        std::memcpy(&words[matrix], row + lane % 4 * 4, 4);
    }
    __syncwarp();
}

template <class Scalar>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b, Scalar) {
    const int lane = emulation::lane();
    std::memcpy(emulation::slot(lane), a, 16);
    std::memcpy(emulation::slot(lane) + 2, b, 8);
    __syncwarp();
    const auto element = [](int of_lane, int word, int half) {
        Scalar item;
        std::memcpy(&item, reinterpret_cast<const char*>(emulation::slot(of_lane)) + word * 4 + half * 2, sizeof item);
        if constexpr (std::is_same_v<Scalar, __half>) return __half2float(item);
        if constexpr (std::is_same_v<Scalar, __nv_bfloat16>) return __bfloat162float(item);
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const float left = element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            c[i] += left * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
    }
    __syncwarp();
}

}  // namespace albert_fast::cuda

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorUnknown = 999 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const bool processors = attribute == cudaDevAttrMultiProcessorCount;
    *value = processors ? emulation::device.multiprocessors : emulation::device.shared_bytes;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    emulation::device.allowed_bytes = bytes;
    return bytes <= emulation::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Parameters, class... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Values... values) {
    emulation::Device& device = emulation::device;
    device.launched_bytes = static_cast<int>(config->dynamicSmemBytes);
    device.grid_x = config->gridDim.x, device.grid_y = config->gridDim.y;
    if (device.launched_bytes > device.allowed_bytes) return cudaErrorInvalidValue;
    emulation::failure = nullptr;
    emulation::body = [=] { kernel(static_cast<Parameters>(values)...); };
    for (unsigned y = 0; y < device.grid_y; ++y) {
        for (unsigned x = 0; x < device.grid_x; ++x) {
            blockIdx = dim3(x, y, 0);
            emulation::run_block(config->blockDim.x);
        }
    }
    if (emulation::failure == nullptr) return cudaSuccess;
    std::fprintf(stderr, "cuda_on_cpu: %s\n", emulation::failure);
    return cudaErrorUnknown;
}

// What a test asks for: the size of the device and the order in which threads run (0 forwards, 1 backwards, 2 shuffled).
extern "C" inline __attribute__((used, visibility("default"))) void emulate_device(int multiprocessors,
                                                                                  int shared_bytes, int order) {
    emulation::device = {};
    emulation::device.multiprocessors = multiprocessors;
    emulation::device.shared_bytes = shared_bytes;
    emulation::device.order = order;
}
// 0 for nothing, else a place in `Omitted`; until it is called again.
extern "C" inline __attribute__((used, visibility("default"))) void emulate_without(int what) {
    emulation::omitted = static_cast<emulation::Omitted>(what);
}
// (blocks of tokens, blocks of columns, bytes of shared memory) of the last launch.
extern "C" inline __attribute__((used, visibility("default"))) void emulated_launch(std::int64_t* found) {
    found[0] = emulation::device.grid_x, found[1] = emulation::device.grid_y;
    found[2] = emulation::device.launched_bytes;
}
