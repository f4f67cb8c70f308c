// Pure multiply-add throughput, by instruction set: the ceiling of any matrix product on one core.
//
// Sixteen independent sums hide the latency of the multiply-add (4 cycles, two per cycle on the widest cores). The
// result is returned so that the compiler keeps the loop.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
constexpr int kSums = 16;
}

extern "C" __attribute__((target("avx512f"))) float avx512_fp32(std::int64_t rounds) {
    __m512 sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-4f);
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(sums[i], a, b);
    }
    float total = 0.0f;
    for (int i = 0; i < kSums; ++i) total += _mm512_reduce_add_ps(sums[i]);
    return total;
}

extern "C" __attribute__((target("avx512f,avx512bf16"))) float avx512_bf16(std::int64_t rounds) {
    __m512 sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.999f), _mm512_set1_ps(0.5f));
    const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-4f), _mm512_set1_ps(1e-4f));
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    }
    float total = 0.0f;
    for (int i = 0; i < kSums; ++i) total += _mm512_reduce_add_ps(sums[i]);
    return total;
}

#if defined(__linux__)
// Four independent products of whole tiles, 16 x 16 x 32 multiply-adds each. NaN if Linux denies tile registers.
extern "C" __attribute__((target("amx-tile,amx-bf16"))) float amx_bf16(std::int64_t rounds) {
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kAsk, kTileData) != 0) return __builtin_nanf("");
    struct {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    std::uint16_t ones[512];
    for (std::uint16_t& one : ones) one = 0x2f80;  // 2^-32: sums of 2^-64 that never reach 1
    float tile[256], total = 0.0f;
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (std::int64_t r = 0; r < rounds; ++r) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, tile, 64);
    total += tile[0];
    _tile_stored(1, tile, 64);
    total += tile[0];
    _tile_stored(2, tile, 64);
    total += tile[0];
    _tile_stored(3, tile, 64);
    total += tile[0];
    _tile_release();
    return total;
}
#endif

extern "C" __attribute__((target("avx2,fma"))) float avx2_fp32(std::int64_t rounds) {
    constexpr int kFew = 12;  // sixteen registers, two of which hold the factors
    __m256 sums[kFew];
    for (int i = 0; i < kFew; ++i) sums[i] = _mm256_set1_ps(1e-3f * static_cast<float>(i));
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-4f);
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kFew; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);
    }
    float lanes[8], total = 0.0f;
    for (int i = 0; i < kFew; ++i) {
        _mm256_storeu_ps(lanes, sums[i]);
        for (float lane : lanes) total += lane;
    }
    return total;
}

#elif defined(__aarch64__)
#include <arm_neon.h>

extern "C" float neon_fp32(std::int64_t rounds) {
    constexpr int kSums = 24;  // of 32 registers: four multiply-adds per cycle, latency 4
    float32x4_t sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = vdupq_n_f32(1e-3f * static_cast<float>(i));
    const float32x4_t a = vdupq_n_f32(0.999f), b = vdupq_n_f32(1e-4f);
    for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = vfmaq_f32(b, sums[i], a);
    }
    float total = 0.0f;
    for (int i = 0; i < kSums; ++i) total += vaddvq_f32(sums[i]);
    return total;
}
#endif
