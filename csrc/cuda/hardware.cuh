// Instructions that CUDA C++ has no function for: tensor cores, their loads, and copies in the background.
//
// Layouts are those of the PTX instruction set manual, "Matrix fragments for mma.m16n8k16" and "ldmatrix". With
// g = lane / 4 and t = lane % 4, a thread holds of A (16 x 16) rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9; of
// B (16 x 8) the same k and column g; of C (16 x 8) rows g, g + 8 and columns 2t, 2t + 1.
#ifndef ALBERT_FAST_HARDWARE_CUH
#define ALBERT_FAST_HARDWARE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace albert_fast::cuda {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Stores 16 bytes at once; the compiler might split the assignment of a uint4 into words. The same kernel must not read
// these bytes again.
__device__ __forceinline__ void store_16(void* global, const void* items) {
    std::uint32_t words[4];
    memcpy(words, items, sizeof words);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3]));
}

// Copies 16 bytes from global to shared memory in the background; `valid` of them (0 or 16) are read, the rest are
// zeros.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane i points at row i % 8 of matrix i / 8; the lane's words are elements
// (g, 2t) and (g, 2t + 1) of each.
__device__ __forceinline__ void load_matrices(std::uint32_t (&words)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// c += a b, sums in float32; the third argument only names the element type.
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b,
                                             __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t* b,
                                             __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace albert_fast::cuda

#endif
