// Runs tasks on threads, provides memory for temporaries, and divides rows into chunks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>

#include "../common.h"
#include "vec.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
static inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

template <class T>
static inline T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Keeps the first exception of any thread in a parallel region, since one that leaves the region would end the process;
// and lets the calling thread ask for signals. The calling thread constructs it before the region.
class Region {
public:
    Region() = default;
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    // Calls body(), unless the region has failed. Returns whether body() ran to its end.
    template <class Body>
    bool run(Body body) noexcept {
        return !stopped() && attempt(body);
    }

    // Whether the result is lost, so that all threads may skip their work; they still meet at every barrier.
    bool stopped() noexcept {
        if (std::this_thread::get_id() == caller_) attempt(check_signals);
        return failed_.load(std::memory_order_relaxed);
    }

    // To call after the region: throws the exception that was kept.
    void finish() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    const std::thread::id caller_ = std::this_thread::get_id();
    std::atomic<bool> failed_{false}, kept_{false};
    std::exception_ptr error_;

    template <class Body>
    bool attempt(Body body) noexcept {
        try {
            body();
            return true;
        } catch (...) {
            if (!kept_.exchange(true)) error_ = std::current_exception();
            failed_.store(true, std::memory_order_relaxed);
            return false;
        }
    }
};

// Calls body(task) for every task in [0, tasks), on up to num_threads threads of the OpenMP pool that torch uses too;
// a thread that is free takes the next one. Tasks must not depend on each other. Throws the first exception of a task.
template <class Body>
static inline void parallel_for(std::int64_t tasks, int num_threads, Body body) {
    [[maybe_unused]] const int threads = static_cast<int>(smaller(num_threads, tasks));
    Region region;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (std::int64_t task = 0; task < tasks; ++task) region.run([&] { body(task); });
        return region.finish();
    }
#endif
    for (std::int64_t task = 0; task < tasks; ++task) region.run([&] { body(task); });
    region.finish();
}

// Rows [begin, end) of a chunk, in an even split of `rows` that is the same for every number of threads.
struct Chunks {
    std::int64_t rows, size, count;

    // At least min_rows rows in a chunk, at most max_count chunks, and a multiple of `step` rows in all but the last.
    Chunks(std::int64_t rows, std::int64_t min_rows, std::int64_t max_count, std::int64_t step)
        : rows(rows),
          size(round_up(larger(larger(min_rows, 1), divide_up(rows, max_count)), step)),
          count(divide_up(rows, size)) {}

    std::int64_t begin(std::int64_t chunk) const { return chunk * size; }
    std::int64_t end(std::int64_t chunk) const { return smaller(rows, (chunk + 1) * size); }
};

// Calls body(begin, end) for pieces of the rows of a (rows, columns) array, each worth the cost of a task.
template <class Body>
static inline void parallel_rows(std::int64_t rows, std::int64_t columns, int num_threads, Body body) {
    const Chunks chunks(rows, 16384 / larger(columns, 1), 8 * static_cast<std::int64_t>(num_threads), 1);
    parallel_for(chunks.count, num_threads, [&](std::int64_t i) { body(chunks.begin(i), chunks.end(i)); });
}

// Asks the operating system for large pages under memory that has not been written to yet. With pages of 4 KiB, weights
// and activations have more pages than the processor caches addresses of.
static inline void use_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kLarge = 2 << 20;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kLarge * kLarge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The size of a core's second cache from the operating system, or the usual 1 MiB.
static inline std::int64_t second_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return 1 << 20;
}

// Memory that grows and is kept: large allocations would come from the operating system each time, with a page fault
// per 4 KiB.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    float* get(std::int64_t floats) {
        if (floats > capacity_) {
            std::free(data_);
            capacity_ = round_up(floats, 1024);
            data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>(capacity_) * sizeof(float)));
            if (data_ == nullptr) {
                capacity_ = 0;
                throw std::bad_alloc();
            }
            use_large_pages(data_, static_cast<std::size_t>(capacity_) * sizeof(float));
        }
        return data_;
    }

private:
    float* data_ = nullptr;
    std::int64_t capacity_ = 0;
};

// kTask: for one task of a parallel region. kShared: for all tasks of a call, held by the caller.
enum class Purpose { kTask, kShared };

// At least `floats` floats at a multiple of 64 bytes, contents undefined, valid until this thread asks again for the
// same purpose.
template <Purpose>
static inline float* scratch(std::int64_t floats) {
    static thread_local Scratch memory;
    return memory.get(floats);
}

}  // namespace albert_fast::ALBERT_FAST_ISA
