// Threads and their scratch memory.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace acqcore::ACQCORE_ISA {

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Uninitialized memory, 64-byte aligned, freed at the end of its scope. Linux backs large pieces with pages of 2 MiB:
// with pages of 4 KiB the product spends 10 % of its time on page tables (Xeon, virtual machine; N = 4096, D = 576).
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_((bytes + 127) / 64 * 64) {
#if defined(__linux__)
    if (bytes_ >= kLargePage / 2) {
      bytes_ = (bytes_ + kLargePage - 1) / kLargePage * kLargePage;
      data_ = aligned_alloc(kLargePage, bytes_);
      if (data_) madvise(data_, bytes_, MADV_HUGEPAGE);
      return;
    }
#endif
    data_ = aligned_alloc(64, bytes_);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool missing() const { return data_ == nullptr; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kLargePage = 2 << 20;
  int64_t bytes_;
  void* data_;
};

// Hands out consecutive 64-byte aligned pieces of a block; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace acqcore::ACQCORE_ISA
