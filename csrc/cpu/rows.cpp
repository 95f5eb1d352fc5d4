#include "cpu/rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace ep {

extern const RowKernels row_kernels_baseline;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows f16c. Whether the operating system saves the
// wide registers is asked by the avx2 check beside it.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c(); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Slowest first, each running all that the one before it needs.
std::vector<const RowKernels*> find_usable() {
    std::vector<const RowKernels*> usable;
    usable.push_back(&row_kernels_baseline);
#if defined(__x86_64__)
    if (has_avx2()) usable.push_back(&row_kernels_avx2);
    if (has_avx2() && has_avx512()) usable.push_back(&row_kernels_avx512);
#endif
    return usable;
}

const std::vector<const RowKernels*>& usable_kernels() {
    static const std::vector<const RowKernels*> usable = find_usable();
    return usable;
}

}  // namespace

const RowKernels& row_kernels() {
    static const RowKernels& best = *usable_kernels().back();
    return best;
}

const RowKernels* find_row_kernels(std::string_view name) {
    for (const RowKernels* kernels : usable_kernels())
        if (name == kernels->name) return kernels;
    return nullptr;
}

std::vector<const char*> row_kernel_names() {
    std::vector<const char*> names;
    for (const RowKernels* kernels : usable_kernels()) names.push_back(kernels->name);
    return names;
}

void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace ep
