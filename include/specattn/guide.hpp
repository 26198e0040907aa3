// What guides a round: a policy that decides, between draft and verify, what the target reads.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "backend.hpp"
#include "kv_cache.hpp"
#include "model.hpp"
#include "select.hpp"
#include "selection.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_CODE {

/// The maxima a guide must be ready for. It allocates in prepare(), never in a round.
struct guide_setup {
  model_shape target;
  model_shape draft;  ///< layers 0: there is no draft
  std::int32_t max_sequences = 1;
  std::int32_t max_positions = 0;
  std::int32_t max_slots = 1;       ///< of all sequences in one verify pass
  std::int32_t recorded_steps = 0;  ///< rows of draft weights a round leaves for each head
};

/// What a guide wants recorded.
struct guide_needs {
  bool draft_weights = false;   ///< the draft's weights of this round
  bool target_weights = false;  ///< the target's own weights of every slot, for the next round
};

/// One round as a guide sees it. Sequences are in the order of the batch; groups of `kept` are (layer, sequence,
/// kv head), layer slowest. Everything is valid during the call only.
template <storage T, backend B = cpu>
struct round_state {
  const kv_cache<T, B>* target_cache = nullptr;
  std::span<const std::int32_t> cache_rows;    ///< [sequences] identifies a sequence from round to round
  std::span<const std::int32_t> kv_lens;       ///< [sequences] prefix of the verify pass
  std::span<const std::int32_t> slot_offsets;  ///< [sequences + 1] of the verify pass
  std::span<const std::uint8_t> dense;         ///< [sequences] 1: this sequence's round is dense, whatever the guide
  std::span<const std::int32_t> replayed;      ///< [sequences] leading slots that only rewrite known positions
  std::span<const std::int32_t> accepted;      ///< [sequences] valid in after_verify; -1: the round is void for it
  /// Recorded draft weights [steps, draft layers, sequences, q_heads, capacity]: entry j of a row is prefix position j.
  /// A sparse draft leaves one step, the mean of its steps' rows as recompute_steps() makes them.
  view<const float, 5, B> draft_weights;
  view<const float, 4, B> draft_masses;  ///< [steps, draft layers, sequences, q_heads] a row's sum over the prefix
  std::span<const std::int32_t> draft_steps;  ///< [sequences] recorded steps, the first ones; 0: did not draft
  /// Recorded target weights [layers, slots, q_heads, capacity]; entries as recording_view says. In after_verify.
  view<const float, 4, B> target_weights;
  selection_view<B> kept;  ///< [layers * sequences * kv_heads] the decision
  std::int32_t layers = 0;
  std::int32_t kv_heads = 0;

  std::int32_t sequences() const { return static_cast<std::int32_t>(kv_lens.size()); }
  std::ptrdiff_t group(std::int32_t layer, std::int32_t sequence, std::int32_t kv_head) const {
    return (std::ptrdiff_t{layer} * sequences() + sequence) * kv_heads + kv_head;
  }
  /// Makes one sequence dense in one layer.
  void keep_everything(std::int32_t layer, std::int32_t sequence) const {
    for (std::int32_t h = 0; h < kv_heads; ++h) kept.counts[group(layer, sequence, h)] = keep_all;
  }
};

/// A guide that remembers something of its texts, or needs scratch: a decoder keeps that in a `G::memory` of its own, which
/// it makes without arguments, and passes it to every hook as the last argument, so that one guide serves several decoders,
/// on several threads. needs() and metadata_rows() never take it; no other hook is called without it.
template <class G>
concept guide_with_memory = requires {
  typename G::memory;
};

namespace detail {

template <class G, class T, class B>
concept takes_memory_before_verify = requires(G& g, typename G::memory& memory, context<B>& ctx,
                                              round_state<T, B>& round) {
  g.before_verify(ctx, round, memory);
};

template <class G, class T, class B>
concept takes_memory_before_layer = requires(G& g, typename G::memory& memory, context<B>& ctx,
                                             round_state<T, B>& round, std::int32_t layer,
                                             view<const float, 3, B> q) {
  g.before_layer(ctx, round, layer, q, memory);
};

/// What a decoder needs of a guide with memory: to make the memory, and a hook that decides and takes it.
template <class G, class T, class B>
concept decides_with_memory = std::default_initializable<typename G::memory> &&
    (takes_memory_before_verify<G, T, B> || takes_memory_before_layer<G, T, B>);

}  // namespace detail

/// A guide's hooks. The loop overrides what before_verify decided for sequences marked dense and for the first
/// `dense_layers`.
/// - prepare(setup): allocates, and refuses what it cannot guide
/// - needs(): what must be recorded
/// - workspace_bytes(ctx): scratch it takes from the context
/// - before_verify(ctx, round): after the draft, before the target
/// - before_layer(ctx, round, layer, q): inside the verify pass, keys of earlier positions cached
/// - after_verify(ctx, round): accepted counts are known
/// - forget(cache_row): the row's sequence has ended; whatever was remembered of it is void
/// - metadata_rows(kv_len): cache rows' worth of bytes it reads a (layer, kv head) besides what it keeps
///
/// A guide_with_memory takes its memory in before_verify or in before_layer, where it decides. On cuda, whose rounds are
/// captured, decoders take no_guide and draft_guide<cuda> alone, and say so.
template <class G, class T, class B = cpu>
concept guide = requires(G& g, const G& constant, context<B>& ctx, const context<B>& constant_ctx,
                         const guide_setup& setup, round_state<T, B>& round, std::int32_t layer,
                         view<const float, 3, B> q, std::int32_t kv_len) {
  g.prepare(setup);
  { constant.needs() } -> std::same_as<guide_needs>;
  { constant.workspace_bytes(constant_ctx) } -> std::convertible_to<std::size_t>;
  g.before_verify(ctx, round);
  g.before_layer(ctx, round, layer, q);
  g.after_verify(ctx, round);
  g.forget(kv_len);
  { constant.metadata_rows(kv_len) } -> std::convertible_to<std::int64_t>;
  requires !guide_with_memory<G> || detail::decides_with_memory<G, T, B>;
};

/// Hooks that do nothing, for guides to inherit.
struct idle_guide {
  void prepare(const guide_setup&) {}
  guide_needs needs() const { return {}; }
  template <class Context>
  std::size_t workspace_bytes(const Context&) const {
    return 0;
  }
  template <class Context, class Round>
  void before_verify(Context&, Round&) {}
  template <class Context, class Round, class Queries>
  void before_layer(Context&, Round&, std::int32_t, Queries) {}
  template <class Context, class Round>
  void after_verify(Context&, Round&) {}
  void forget(std::int32_t) {}
  std::int64_t metadata_rows(std::int32_t) const { return 0; }
};

namespace detail {

/// The hooks of a guide, with the memory where the guide has hooks that take one, without where not; a guide with memory
/// may leave out hooks that would do nothing.
template <class G, class Memory>
struct guide_hooks {
  G& guide;
  Memory& memory;

  void prepare(const guide_setup& setup) const {
    if constexpr (requires { guide.prepare(setup, memory); })
      guide.prepare(setup, memory);
    else if constexpr (!guide_with_memory<G>)
      guide.prepare(setup);
  }
  template <class Context>
  std::size_t workspace_bytes(const Context& ctx) const {
    if constexpr (requires { guide.workspace_bytes(ctx, memory); })
      return guide.workspace_bytes(ctx, memory);
    else if constexpr (!guide_with_memory<G>)
      return guide.workspace_bytes(ctx);
    else
      return 0;
  }
  template <class Context, class Round>
  void before_verify(Context& ctx, Round& round) const {
    if constexpr (requires { guide.before_verify(ctx, round, memory); })
      guide.before_verify(ctx, round, memory);
    else if constexpr (!guide_with_memory<G>)
      guide.before_verify(ctx, round);
  }
  template <class Context, class Round, class Queries>
  void before_layer(Context& ctx, Round& round, std::int32_t layer, Queries q) const {
    if constexpr (requires { guide.before_layer(ctx, round, layer, q, memory); })
      guide.before_layer(ctx, round, layer, q, memory);
    else if constexpr (!guide_with_memory<G>)
      guide.before_layer(ctx, round, layer, q);
  }
  template <class Context, class Round>
  void after_verify(Context& ctx, Round& round) const {
    if constexpr (requires { guide.after_verify(ctx, round, memory); })
      guide.after_verify(ctx, round, memory);
    else if constexpr (!guide_with_memory<G>)
      guide.after_verify(ctx, round);
  }
  void forget(std::int32_t cache_row) const {
    if constexpr (requires { guide.forget(cache_row, memory); })
      guide.forget(cache_row, memory);
    else if constexpr (!guide_with_memory<G>)
      guide.forget(cache_row);
  }
};

}  // namespace detail

/// For guides with memory to inherit: the hooks without one, which work on a memory that the guide owns. `using
/// base::before_verify` and alike make both visible.
template <class G, class Memory>
class remembering_guide : public idle_guide {
 public:
  using memory = Memory;

  void prepare(const guide_setup& setup) { hooks().prepare(setup); }
  template <class Context>
  std::size_t workspace_bytes(const Context& ctx) const {
    return detail::guide_hooks<const G, const Memory>{static_cast<const G&>(*this), own_}.workspace_bytes(ctx);
  }
  template <class Context, class Round>
  void before_verify(Context& ctx, Round& round) {
    hooks().before_verify(ctx, round);
  }
  template <class Context, class Round, class Queries>
  void before_layer(Context& ctx, Round& round, std::int32_t layer, Queries q) {
    hooks().before_layer(ctx, round, layer, q);
  }
  template <class Context, class Round>
  void after_verify(Context& ctx, Round& round) {
    hooks().after_verify(ctx, round);
  }
  void forget(std::int32_t cache_row) { hooks().forget(cache_row); }

 private:
  detail::guide_hooks<G, Memory> hooks() { return {static_cast<G&>(*this), own_}; }

  Memory own_;
};

namespace detail {

/// A decoder's hold on a guide: the guide is the caller's, what it remembers is the decoder's.
template <class G>
class held_guide {
  struct nothing {};
  template <class Guide>
  struct memory_of {
    using type = nothing;
  };
  template <guide_with_memory Guide>
  struct memory_of<Guide> {
    using type = typename Guide::memory;
  };
  using memory = typename memory_of<G>::type;

 public:
  explicit held_guide(G& guide) : guide_(&guide) {}

  guide_needs needs() const { return std::as_const(*guide_).needs(); }
  std::int64_t metadata_rows(std::int32_t kv_len) const { return std::as_const(*guide_).metadata_rows(kv_len); }
  template <class Context>
  std::size_t workspace_bytes(const Context& ctx) const {
    return guide_hooks<const G, const memory>{*guide_, memory_}.workspace_bytes(ctx);
  }
  guide_hooks<G, memory> operator*() { return {*guide_, memory_}; }

 private:
  G* guide_;
  memory memory_;
};

}  // namespace detail

/// Dense verification: exact speculative decoding. With a sparse draft it is a lossless system of its own.
struct no_guide : idle_guide {
  template <class Context, class Round>
  void before_verify(Context&, Round& round) {
    for (std::int32_t layer = 0; layer < round.layers; ++layer) {
      for (std::int32_t s = 0; s < round.sequences(); ++s) round.keep_everything(layer, s);
    }
  }
};

/// StreamingLLM (Xiao et al., arXiv 2309.17453) with original positions: the sinks and the newest positions.
struct window_guide : idle_guide {
  std::int32_t sinks = 4;
  std::int32_t recent = 512;

  template <class Context, class Round>
  void before_verify(Context&, Round& round) {
    for (std::int32_t layer = 0; layer < round.layers; ++layer) {
      for (std::int32_t s = 0; s < round.sequences(); ++s) {
        for (std::int32_t h = 0; h < round.kv_heads; ++h) fill(round, layer, s, h);
      }
    }
  }

 private:
  template <class Round>
  void fill(Round& round, std::int32_t layer, std::int32_t s, std::int32_t h) const {
    const std::int32_t kv_len = round.kv_lens[static_cast<std::size_t>(s)];
    const std::ptrdiff_t group = round.group(layer, s, h);
    const std::int32_t head = std::clamp(sinks, 0, kv_len);
    const std::int32_t tail = (std::max)(head, kv_len - std::clamp(recent, 0, kv_len));
    for (std::int32_t i = 0; i < head; ++i) round.kept.positions(group, i) = i;
    detail::grow_list(round.kept, group, head, tail, kv_len);
  }
};

}  // namespace specattn::inline SPECATTN_CODE
