// Emulated scans: see cuda_runtime_api.h.
#pragma once

#include "cuda_runtime_api.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_WARP_SCANS };

template <class T, int Threads, BlockScanAlgorithm>
class BlockScan {
 public:
  struct TempStorage {
    T x[Threads];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}
  void ExclusiveSum(T mine, T& before, T& all) {
    storage_.x[emulated::here->current] = mine;
    __syncthreads();
    T sum = 0;
    for (int i = 0; i < Threads; ++i) {
      if (i == emulated::here->current) before = sum;
      sum += storage_.x[i];
    }
    all = sum;
    __syncthreads();
  }
  void ExclusiveSum(T mine, T& before) {
    T all;
    ExclusiveSum(mine, before, all);
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
