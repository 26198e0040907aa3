// What a captured round is known by, and what host and device tell each other about it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../../decode_plan.hpp"
#include "../../decode_state.hpp"
#include "../device/graph.cuh"
#include "layout.cuh"

namespace specattn::inline SPECATTN_CODE::detail {

/// What a captured round depends on besides what it reads.
struct round_key : round_shape {
  std::vector<std::int32_t> rows;  ///< cache rows, ascending
  std::int32_t max_len = 0;        ///< of the texts
  bool forced = false;             ///< tokens are given
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
        forced_(static_cast<std::size_t>(sequences) * static_cast<std::size_t>(drafts + 1)),
        losses_(forced_.size()),
        drafted_(static_cast<std::size_t>(sequences) * static_cast<std::size_t>(drafts)) {}

  round_arrays arrays(const round_key& key) const {
    return device_.arrays(static_cast<std::int32_t>(key.rows.size()), key.drafts, key.steps, key.forced);
  }

  /// The tokens that a sequence drafts and emits, where those are given; and afterwards their losses.
  std::span<std::int32_t> forced(std::size_t s, std::int32_t drafts) {
    const auto each = static_cast<std::size_t>(drafts) + 1;
    return {forced_.data() + s * each, each};
  }
  std::span<const float> losses(std::size_t s, std::int32_t drafts) const {
    const auto each = static_cast<std::size_t>(drafts) + 1;
    return {losses_.data() + s * each, each};
  }
  /// Before a round is launched.
  void tell(std::size_t s, const sequence_input& input, const sampler_options& sampler) {
    input_[s] = input;
    samplers_[s] = sampler;
  }
  void queue_inputs(const context<cuda>& ctx, const round_arrays& round) const {
    const auto n = static_cast<std::size_t>(round.sequences);
    copy_elements(ctx, device_.input(), input_.data(), n);
    copy_elements(ctx, device_.samplers(), samplers_.data(), n);
    if (round.forced != nullptr) copy_elements<std::int32_t>(ctx, device_.forced(), forced_.data(), judged(round));
  }
  void queue_outputs(const context<cuda>& ctx, const round_arrays& round) const {
    const auto n = static_cast<std::size_t>(round.sequences);
    copy_elements<sequence_output>(ctx, output_.data(), round.output, n);
    copy_elements<std::int32_t>(ctx, drafted_.data(), round.drafted, n * static_cast<std::size_t>(round.drafts));
    if (round.forced != nullptr) copy_elements<float>(ctx, losses_.data(), round.losses, judged(round));
  }
  /// After it has ended.
  const sequence_input& told(std::int32_t s) const { return input_[static_cast<std::size_t>(s)]; }
  const sequence_output& heard(std::int32_t s) const { return output_[static_cast<std::size_t>(s)]; }
  /// The tokens drafted for a sequence that were judged, of a round that drafted `drafts`.
  std::span<const std::int32_t> drafted(std::int32_t s, std::int32_t drafts) const {
    return {drafted_.data() + std::ptrdiff_t{s} * drafts, static_cast<std::size_t>(heard(s).drafted)};
  }

 private:
  static std::size_t judged(const round_arrays& round) {
    return static_cast<std::size_t>(round.sequences) * static_cast<std::size_t>(round.most_slots());
  }

  round_memory device_;
  pinned_buffer<sequence_input> input_;
  pinned_buffer<sampler_options> samplers_;
  pinned_buffer<sequence_output> output_;
  pinned_buffer<std::int32_t> forced_;
  pinned_buffer<float> losses_;
  pinned_buffer<std::int32_t> drafted_;
};

/// The arrays of a prefill's pass, which is not captured.
class prefill_arrays {
 public:
  prefill_arrays() = default;
  /// \param slots, sequences the most of a pass
  prefill_arrays(std::int32_t slots, std::int32_t sequences)
      : host_(size(slots, sequences)), device_(size(slots, sequences)) {}
  static std::size_t bytes(std::int32_t slots, std::int32_t sequences) {
    return size(slots, sequences) * sizeof(std::int32_t);
  }

  /// Uploads parts of texts, each from what its row holds on. The copy is staged: the host's arrays are free again.
  /// \param cached of a row
  template <class Cached>
  void upload(const context<cuda>& ctx, std::span<const prefill_part> parts, Cached&& cached) {
    slots_ = 0;
    sequences_ = static_cast<std::int32_t>(parts.size());
    for (const prefill_part& part : parts) slots_ += part.to - cached(part.row);
    auto* token = host_.data();
    auto* position = token + slots_;
    auto* offset = position + slots_;
    auto* length = offset + sequences_ + 1;
    auto* row = length + sequences_;
    std::int32_t slot = 0;
    for (const prefill_part& part : parts) {
      *offset++ = slot;
      *length++ = cached(part.row);
      *row++ = part.row;
      for (std::int32_t i = cached(part.row); i < part.to; ++i, ++slot) {
        *token++ = part.text[static_cast<std::size_t>(i)];
        *position++ = i;
      }
    }
    *offset = slot;
    copy_elements<std::int32_t>(ctx, device_.data(), host_.data(), static_cast<std::size_t>(row - host_.data()));
  }
  forward_batch<cuda> batch() const {
    std::int32_t* const device = device_.data();
    return {{device, {slots_}}, {device + slots_, {slots_}}, {device, {0}}};
  }
  pass_layout<cuda> layout() const {
    std::int32_t* const numbers = device_.data() + 2 * std::ptrdiff_t{slots_};
    return {{numbers, {sequences_ + 1}},
            {numbers + sequences_ + 1, {sequences_}},
            {numbers + 2 * std::ptrdiff_t{sequences_} + 1, {sequences_}}};
  }

 private:
  static std::size_t size(std::int32_t slots, std::int32_t sequences) {
    return 2 * static_cast<std::size_t>(slots) + 3 * static_cast<std::size_t>(sequences) + 1;
  }

  std::vector<std::int32_t> host_;
  buffer<std::int32_t, cuda> device_;
  std::int32_t slots_ = 0, sequences_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
