// The attention object a model calls in one pass over a batch: appends to the cache, then reads what was decided.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend.hpp"
#include "kv_cache.hpp"
#include "rotary.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// The queries of a pass's slots, every layer, and the log-sum-exp of each over what it attended to.
template <backend B = cpu>
struct query_log {
  view<float, 4, B> q;    ///< [layers, slots or more, q_heads, head_dim], rotated; empty: nothing is kept
  view<float, 3, B> lse;  ///< [layers, slots or more, q_heads] natural log

  bool empty() const { return q.empty(); }
};

/// A function to be called with a layer's queries before it attends, for guides that look at them.
template <backend B = cpu>
struct layer_hook {
  void* object = nullptr;
  void (*call)(void* object, std::int32_t layer, view<const float, 3, B> q) = nullptr;
};

/// Models layer_attention. Dense by default; guide_by() makes it read listed positions only, record() stores its weights,
/// keep_queries() stores what recompute_steps() needs.
///
/// Groups of `kept` are (layer, sequence, kv head), layer slowest; recordings are [layer, row, q_head, position].
template <storage T, backend B = cpu>
class attention_pass {
 public:
  /// The pages for the pass must be reserved; the caller advances the cache when the pass is over.
  attention_pass(context<B>& ctx, kv_cache<T, B>& cache, pass_layout<B> layout)
      : ctx_(&ctx), cache_(&cache), layout_(layout) {}

  void guide_by(selection_view<B> kept) { kept_ = kept; }
  void record(view<float, 4, B> weights, record_slots slots) {
    weights_ = weights;
    slots_ = slots;
  }
  void keep_queries(const query_log<B>& log) { log_ = log; }
  void before_each_layer(layer_hook<B> hook) { hook_ = hook; }

  void operator()(std::int32_t layer, view<const float, 3, B> q, view<const float, 3, B> k, view<const float, 3, B> v,
                  view<float, 3, B> out) {
    if (!log_.empty())  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
      detail::attend_impl<B>::keep_queries(*ctx_, q, log_.q[layer]);
    cache_->append(*ctx_, layer, layout_, k, v);
    attend_to(layer, q, out, k.extent(0) > 0);
  }
  /// The same for q and k not rotated yet; q is rotated in place.
  void operator()(std::int32_t layer, view<float, 3, B> q, view<const float, 3, B> k, view<const float, 3, B> v,
                  view<float, 3, B> out, const rotary_view<B>& rotary) {
    cache_->append_rotated(*ctx_, layer, layout_, q, k, v, rotary,
                           log_.empty() ? view<float, 3, B>() : log_.q[layer]);
    attend_to(layer, q, out, k.extent(0) > 0);
  }

 private:
  void attend_to(std::int32_t layer, view<const float, 3, B> q, view<float, 3, B> out, bool appended) {
    if (hook_.call != nullptr) hook_.call(hook_.object, layer, q);

    attend_args<T, B> args;
    args.q = q;
    args.kv = cache_->layer(layer);
    args.slot_offsets = layout_.slot_offsets;
    args.kv_lens = layout_.kv_lens;
    args.cache_rows = layout_.cache_rows;
    args.out = out;
    if (!kept_.counts.empty()) {
      const std::ptrdiff_t groups = std::ptrdiff_t{layout_.sequences()} * args.kv.kv_heads;
      args.kept = kept_.slice(layer * groups, groups);
      args.kept_sequence_stride = args.kv.kv_heads;
    }
    if (!weights_.empty()) args.recording = {weights_[layer], slots_};
    if (!log_.empty()) args.lse = log_.lse[layer].slice(0, q.extent(0));
    detail::attend(*ctx_, args, appended && hook_.call == nullptr);
  }

  context<B>* ctx_;
  kv_cache<T, B>* cache_;
  pass_layout<B> layout_;
  selection_view<B> kept_;
  view<float, 4, B> weights_;
  record_slots slots_ = record_slots::newest;
  query_log<B> log_;
  layer_hook<B> hook_;
};

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
