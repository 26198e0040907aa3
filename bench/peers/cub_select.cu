// Selection by sorting, as one writes it with CUB: (weight, position) pairs of each row sorted by weight, then a scan of
// the sorted weights up to the mass. The list is the front of the sorted positions, so it is not ascending.
#include <cub/cub.cuh>

#include "cuda_harness.cuh"
#include "peers/select_peers.cuh"

namespace {

using device = specattn::cuda;
constexpr int scan_threads = 512;
constexpr int scan_items = 8;

__global__ void fill_positions(std::int32_t* positions, std::int32_t* offsets, std::int64_t rows,
                               std::int64_t length) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < rows * length;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    positions[i] = static_cast<std::int32_t>(i % length);
    if (i <= rows) offsets[i] = static_cast<std::int32_t>(i * length);
  }
}

/// counts[row]: how many leading weights of the sorted row reach the mass; a CTA for each row, which stops there.
__global__ void __launch_bounds__(scan_threads)
    count_to_mass(const float* sorted, std::int64_t length, float mass, std::int32_t* counts) {
  using load = cub::BlockLoad<float, scan_threads, scan_items, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
  using scan = cub::BlockScan<float, scan_threads>;
  __shared__ typename load::TempStorage load_memory;
  __shared__ typename scan::TempStorage scan_memory;
  __shared__ int found;
  const float* row = sorted + blockIdx.x * length;
  float before = 0;
  for (std::int64_t first = 0; first < length; first += scan_threads * scan_items) {
    if (threadIdx.x == 0) found = INT32_MAX;
    float weights[scan_items];
    load(load_memory).Load(row + first, weights, static_cast<int>(length - first), 0.0f);
    float total;
    scan(scan_memory).InclusiveSum(weights, weights, total);
    __syncthreads();
    for (int i = scan_items - 1; i >= 0; --i) {
      if (before + weights[i] < mass) break;
      if (i == 0 || before + weights[i - 1] < mass) atomicMin(&found, static_cast<int>(threadIdx.x) * scan_items + i);
    }
    __syncthreads();
    if (found != INT32_MAX) {
      if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<std::int32_t>(first + found + 1);
      return;
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0)
    counts[blockIdx.x] = static_cast<std::int32_t>(length);  // rounding kept the sum below the mass
}

class sorted : public bench::select_peer {
 public:
  using select_peer::select_peer;

  void prepare(const bench::select_problem& problem) override {
    problem_ = problem;
    const auto cells = static_cast<std::size_t>(problem.rows * problem.length);
    positions_ = specattn::buffer<std::int32_t, device>(cells);
    offsets_ = specattn::buffer<std::int32_t, device>(static_cast<std::size_t>(problem.rows) + 1);
    sorted_weights_ = specattn::buffer<float, device>(cells);
    sorted_positions_ = specattn::buffer<std::int32_t, device>(cells);
    counts_ = specattn::buffer<std::int32_t, device>(static_cast<std::size_t>(problem.rows));
    fill_positions<<<1024, 256>>>(positions_.data(), offsets_.data(), problem.rows, problem.length);
    bench::check(cudaGetLastError());
    std::size_t bytes = 0;
    bench::check(sort(nullptr, bytes, nullptr, nullptr));
    workspace_ = specattn::buffer<std::byte, device>(bytes);
    bench::check(cudaDeviceSynchronize());
  }
  void run(const float* rows, cudaStream_t stream) override {
    std::size_t bytes = workspace_.bytes();
    bench::check(sort(workspace_.data(), bytes, rows, stream));
    count_to_mass<<<static_cast<unsigned>(problem_.rows), scan_threads, 0, stream>>>(
        sorted_weights_.data(), problem_.length, problem_.top_p, counts_.data());
    bench::check(cudaGetLastError());
  }
  std::vector<std::int32_t> kept(std::int64_t row) const override {
    std::int32_t count = 0;
    bench::check(cudaMemcpy(&count, counts_.data() + row, sizeof count, cudaMemcpyDeviceToHost));
    std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
    bench::check(cudaMemcpy(positions.data(), sorted_positions_.data() + row * problem_.length, positions.size() * 4,
                            cudaMemcpyDeviceToHost));
    return positions;
  }

 protected:
  virtual cudaError_t sort(void* workspace, std::size_t& bytes, const float* rows, cudaStream_t stream) = 0;

  bench::select_problem problem_;
  specattn::buffer<std::int32_t, device> positions_, offsets_, sorted_positions_, counts_;
  specattn::buffer<float, device> sorted_weights_;
  specattn::buffer<std::byte, device> workspace_;
};

class segmented_sort final : public sorted {
 public:
  segmented_sort() : sorted("CUB segmented sort", true) {}
  /// From 500 segments on CUB partitions them first and waits for the result on the host.
  bool captures() const override { return problem_.rows < 500; }

 private:
  cudaError_t sort(void* workspace, std::size_t& bytes, const float* rows, cudaStream_t stream) override {
    return cub::DeviceSegmentedSort::SortPairsDescending(
        workspace, bytes, rows, sorted_weights_.data(), positions_.data(), sorted_positions_.data(),
        problem_.rows * problem_.length, problem_.rows, offsets_.data(), offsets_.data() + 1, stream);
  }
};

class segmented_radix_sort final : public sorted {
 public:
  segmented_radix_sort() : sorted("CUB segmented radix sort", true) {}

 private:
  cudaError_t sort(void* workspace, std::size_t& bytes, const float* rows, cudaStream_t stream) override {
    return cub::DeviceSegmentedRadixSort::SortPairsDescending(
        workspace, bytes, rows, sorted_weights_.data(), positions_.data(), sorted_positions_.data(),
        problem_.rows * problem_.length, problem_.rows, offsets_.data(), offsets_.data() + 1, 0, 32, stream);
  }
};

const bench::linked_peer<segmented_sort> segmented_sort_linked;
const bench::linked_peer<segmented_radix_sort> segmented_radix_sort_linked;

}  // namespace
