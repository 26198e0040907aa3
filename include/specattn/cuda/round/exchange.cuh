// What a captured round is known by, and what host and device tell each other about it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../device/graph.cuh"
#include "layout.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// What a captured round depends on besides what it reads.
struct round_key {
  std::vector<std::int32_t> rows;  ///< cache rows, ascending
  std::int32_t drafts = 0;
  std::int32_t max_len = 0;  ///< of the texts
  bool sparse = false;       ///< the guide decides what is read
  bool sampled = false;      ///< some sequence is not greedy
  bool listed = false;       ///< a sparse draft has lists to read
  bool reuse = false;        ///< of lists that a round before has selected
  friend bool operator==(const round_key&, const round_key&) = default;
};

/// Lengths are rounded up to one of eight steps in each doubling, so that a growing text is captured anew only then.
inline std::int32_t length_bucket(std::int32_t length, std::int32_t most) {
  std::int32_t step = 256;
  while (step < most && length > 16 * step) step *= 2;
  return (std::min)((length + step - 1) / step * step, most);
}

/// The most recently captured graphs.
class captured_rounds {
 public:
  /// The graph of a round; `queue()` puts its work on the context's stream where it is not there yet.
  template <class Queue>
  const captured_graph& find(const context<cuda>& ctx, const round_key& key, Queue&& queue) {
    if (workspace_bytes_ != ctx.workspace_bytes()) clear();  // it has moved
    workspace_bytes_ = ctx.workspace_bytes();
    for (const auto& [known, graph] : graphs_) {
      if (known == key) return graph;
    }
    if (graphs_.size() == most) graphs_.erase(graphs_.begin());
    graphs_.emplace_back(key, captured_graph(ctx.stream(), queue));
    return graphs_.back().second;
  }
  void clear() { graphs_.clear(); }

 private:
  static constexpr std::size_t most = 32;
  std::vector<std::pair<round_key, captured_graph>> graphs_;
  std::size_t workspace_bytes_ = 0;  // when they were captured
};

template <class Element>
void copy_elements(const context<cuda>& ctx, Element* to, const Element* from, std::size_t count) {
  if (count == 0) return;
  check_cuda(cudaMemcpyAsync(to, from, count * sizeof(Element), cudaMemcpyDefault, ctx.stream()), "decode");
}

/// Pinned memory that a captured round reads and writes, and the device's copies.
class round_exchange {
 public:
  round_exchange() = default;
  round_exchange(std::int32_t sequences, std::int32_t drafts)
      : device_(sequences, drafts),
        input_(static_cast<std::size_t>(sequences)),
        samplers_(static_cast<std::size_t>(sequences)),
        output_(static_cast<std::size_t>(sequences)),
        drafted_(static_cast<std::size_t>(sequences) * static_cast<std::size_t>(drafts)) {}

  round_arrays arrays(std::int32_t sequences, std::int32_t drafts) const { return device_.arrays(sequences, drafts); }

  /// Before a round is launched.
  void tell(std::size_t s, const sequence_input& input, const sampler_options& sampler) {
    input_[s] = input;
    samplers_[s] = sampler;
  }
  void queue_inputs(const context<cuda>& ctx, const round_arrays& round) const {
    const auto n = static_cast<std::size_t>(round.sequences);
    copy_elements(ctx, device_.input(), input_.data(), n);
    copy_elements(ctx, device_.samplers(), samplers_.data(), n);
  }
  void queue_outputs(const context<cuda>& ctx, const round_arrays& round) const {
    const auto n = static_cast<std::size_t>(round.sequences);
    copy_elements<sequence_output>(ctx, output_.data(), round.output, n);
    copy_elements<std::int32_t>(ctx, drafted_.data(), round.drafted, n * static_cast<std::size_t>(round.drafts));
  }
  /// After it has ended.
  const sequence_input& told(std::int32_t s) const { return input_[static_cast<std::size_t>(s)]; }
  const sequence_output& heard(std::int32_t s) const { return output_[static_cast<std::size_t>(s)]; }
  /// The tokens drafted for a sequence that were judged, of a round that drafted `drafts`.
  std::span<const std::int32_t> drafted(std::int32_t s, std::int32_t drafts) const {
    return {drafted_.data() + std::ptrdiff_t{s} * drafts, static_cast<std::size_t>(heard(s).drafted)};
  }

 private:
  round_memory device_;
  pinned_buffer<sequence_input> input_;
  pinned_buffer<sampler_options> samplers_;
  pinned_buffer<sequence_output> output_;
  pinned_buffer<std::int32_t> drafted_;
};

/// The arrays of a prefill's pass, which is not captured.
class prefill_arrays {
 public:
  prefill_arrays() = default;
  explicit prefill_arrays(std::int32_t most) : host_(2 * static_cast<std::size_t>(most) + 4), device_(host_.size()) {}

  /// Uploads tokens that stand from position `first` on, for a cache row that holds `cached`. The copy is staged: the
  /// host's arrays are free again.
  void upload(const context<cuda>& ctx, std::span<const std::int32_t> tokens, std::int32_t first, std::int32_t cached,
              std::int32_t row) {
    count_ = static_cast<std::int32_t>(tokens.size());
    auto at = std::copy(tokens.begin(), tokens.end(), host_.begin());
    for (std::int32_t i = 0; i < count_; ++i) *at++ = first + i;
    for (const std::int32_t number : {0, count_, cached, row}) *at++ = number;
    copy_elements<std::int32_t>(ctx, device_.data(), host_.data(), 2 * tokens.size() + 4);
  }
  forward_batch<cuda> batch() const {
    std::int32_t* const device = device_.data();
    return {{device, {count_}}, {device + count_, {count_}}, {device, {0}}};
  }
  pass_layout<cuda> layout() const {
    std::int32_t* const numbers = device_.data() + 2 * std::ptrdiff_t{count_};
    return {{numbers, {2}}, {numbers + 2, {1}}, {numbers + 3, {1}}};
  }

 private:
  std::vector<std::int32_t> host_;
  buffer<std::int32_t, cuda> device_;
  std::int32_t count_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
