// FlashInfer's selections: top-p and AIR top-p renormalisation (rows out, dense), radix and filtered top-k (unordered
// positions out, k given). Needs FlashInfer's headers; README.md says where to get them.
#include <flashinfer/air_top_p.cuh>
#include <flashinfer/sampling.cuh>
#include <flashinfer/topk.cuh>

#include "cuda_harness.cuh"
#include "peers/select_peers.cuh"

namespace {

namespace peer = flashinfer::sampling;
using device = specattn::cuda;

/// The kept positions are those whose renormalised weight is not zero.
class renormalised : public bench::select_peer {
 public:
  using select_peer::select_peer;
  void prepare(const bench::select_problem& problem) override {
    problem_ = problem;
    out_ = specattn::buffer<float, device>(static_cast<std::size_t>(problem.rows * problem.length));
  }
  std::vector<std::int32_t> kept(std::int64_t row) const override {
    std::vector<float> weights(static_cast<std::size_t>(problem_.length));
    bench::check(cudaMemcpy(weights.data(), out_.data() + row * problem_.length, weights.size() * sizeof(float),
                            cudaMemcpyDeviceToHost));
    std::vector<std::int32_t> positions;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] > 0) positions.push_back(static_cast<std::int32_t>(i));
    }
    return positions;
  }

 protected:
  bench::select_problem problem_;
  specattn::buffer<float, device> out_;
};

class top_p final : public renormalised {
 public:
  top_p() : renormalised("FlashInfer top-p", true) {}
  void run(const float* rows, cudaStream_t stream) override {
    bench::check(peer::TopPRenormProb<float>(const_cast<float*>(rows), out_.data(), nullptr,
                                             static_cast<std::uint32_t>(problem_.rows), problem_.top_p,
                                             static_cast<std::uint32_t>(problem_.length), stream));
  }
};

/// Not the deterministic variant: the default, and the faster one.
class air_top_p final : public renormalised {
 public:
  air_top_p() : renormalised("FlashInfer AIR top-p", true) {}
  bool takes(const bench::select_problem& p) const override { return p.length >= peer::air_top_p::NUM_BUCKETS; }
  void prepare(const bench::select_problem& problem) override {
    renormalised::prepare(problem);
    const auto rows = static_cast<std::size_t>(problem.rows);
    const auto candidates = peer::air_top_p::calcBufLen<float>(static_cast<int>(problem.length));
    const std::size_t row_bytes = sizeof(peer::air_top_p::Counter<float>) +
                                  peer::air_top_p::NUM_BUCKETS * (sizeof(float) + sizeof(int)) +
                                  2 * static_cast<std::size_t>(candidates) * sizeof(float);
    workspace_ = specattn::buffer<std::byte, device>(rows * row_bytes + 5 * 256);  // each part aligned to 256
  }
  void run(const float* rows, cudaStream_t stream) override {
    bench::check(peer::air_top_p::AirTopPRenormProb<false, float>(
        const_cast<float*>(rows), out_.data(), nullptr, static_cast<std::uint32_t>(problem_.rows), problem_.top_p,
        static_cast<std::uint32_t>(problem_.length), workspace_.data(), stream));
  }

 private:
  specattn::buffer<std::byte, device> workspace_;
};

class top_k : public bench::select_peer {
 public:
  using select_peer::select_peer;
  void prepare(const bench::select_problem& problem) override {
    problem_ = problem;
    const auto cells = static_cast<std::size_t>(problem.rows * problem.count);
    positions_ = specattn::buffer<std::int32_t, device>(cells);
    weights_ = specattn::buffer<float, device>(cells);
    state_ = specattn::buffer<std::byte, device>(std::size_t{1} << 20);  // as FlashInfer's Python allocates it
  }
  std::vector<std::int32_t> kept(std::int64_t row) const override {
    std::vector<std::int32_t> positions(static_cast<std::size_t>(problem_.count));
    bench::check(cudaMemcpy(positions.data(), positions_.data() + row * problem_.count, positions.size() * 4,
                            cudaMemcpyDeviceToHost));
    return positions;
  }

 protected:
  bench::select_problem problem_;
  specattn::buffer<std::int32_t, device> positions_;
  specattn::buffer<float, device> weights_;
  specattn::buffer<std::byte, device> state_;
};

class radix_top_k final : public top_k {
 public:
  radix_top_k() : top_k("FlashInfer radix top-k", false) {}
  void run(const float* rows, cudaStream_t stream) override {
    bench::check(peer::RadixTopKMultiCTA<float, std::int32_t>(
        const_cast<float*>(rows), positions_.data(), weights_.data(), nullptr,
        static_cast<std::uint32_t>(problem_.rows), static_cast<std::uint32_t>(problem_.count),
        static_cast<std::uint32_t>(problem_.length), reinterpret_cast<peer::RadixRowState*>(state_.data()), false,
        stream));
  }
};

class filtered_top_k final : public top_k {
 public:
  filtered_top_k() : top_k("FlashInfer filtered top-k", false) {}
  bool takes(const bench::select_problem& p) const override {
    return p.count <= static_cast<std::int64_t>(peer::FILTERED_TOPK_MAX_K) && p.count < p.length;
  }
  void run(const float* rows, cudaStream_t stream) override {
    bench::check(peer::FilteredTopK<float, std::int32_t>(
        const_cast<float*>(rows), positions_.data(), weights_.data(), nullptr,
        static_cast<std::uint32_t>(problem_.rows), static_cast<std::uint32_t>(problem_.count),
        static_cast<std::uint32_t>(problem_.length), false, peer::TopKTieBreak::None, stream));
  }
};

const bench::linked_peer<top_p> top_p_linked;
const bench::linked_peer<air_top_p> air_top_p_linked;
const bench::linked_peer<radix_top_k> radix_top_k_linked;
const bench::linked_peer<filtered_top_k> filtered_top_k_linked;

}  // namespace
