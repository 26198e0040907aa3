// Importance from signals: for each target (layer, kv head), the weighted sum of the draft heads' rows.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "alignment.hpp"
#include "backend.hpp"
#include "error.hpp"
#include "scalar.hpp"
#include "selection.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// The coefficients of an alignment without their zeros, in the order they are used.
struct sparse_mixture {
  struct term {
    std::int32_t signal;
    float coefficient;
  };
  std::vector<std::int32_t> first;  ///< [groups + 1] terms of group g are first[g] … first[g + 1] - 1
  std::vector<term> terms;
  std::int32_t kv_heads = 1;  ///< group g is (layer g / kv_heads, kv head g % kv_heads)
  signal_set signals;

  std::int32_t groups() const { return static_cast<std::int32_t>(first.size()) - 1; }
};

/// A mixture where the backend reads it: on the cpu the sparse_mixture itself, for cuda a copy in device memory, in
/// <specattn/cuda/importance.cuh>. Both are made of a sparse_mixture.
template <backend B>
class resident_mixture;

template <>
class resident_mixture<cpu> : public sparse_mixture {
 public:
  resident_mixture() = default;
  explicit resident_mixture(sparse_mixture from) : sparse_mixture(std::move(from)) {}
};

/// Drops terms below `least`, or below half of the group's largest where that is less (hundreds of signals that share
/// a group evenly are all small), and rescales the others of the group to a sum of one. At the default a sixth of a
/// fitted mixture's terms go, with 0.2 % of its sum.
inline sparse_mixture make_sparse_mixture(const alignment& from, float least = 2e-3f) {
  sparse_mixture mixture;
  mixture.signals = from.signals;
  mixture.kv_heads = from.target.kv_heads;
  const std::int32_t signals = from.signals.count();
  const auto groups = static_cast<std::int32_t>(from.coefficients.size()) / signals;
  mixture.first.push_back(0);
  for (std::int32_t g = 0; g < groups; ++g) {
    const float* row = from.coefficients.data() + std::ptrdiff_t{g} * signals;
    const float bound = (std::min)(least, 0.5f * *std::max_element(row, row + signals));
    float sum = 0.0f;
    for (std::int32_t i = 0; i < signals; ++i) sum += row[i] >= bound ? row[i] : 0.0f;
    for (std::int32_t i = 0; i < signals; ++i) {
      if (row[i] >= bound && row[i] > 0.0f) mixture.terms.push_back({i, row[i] / sum});
    }
    mixture.first.push_back(static_cast<std::int32_t>(mixture.terms.size()));
  }
  return mixture;
}

/// The target's own attention a round ago, a row for each group: counts(r, g) weights at ascending positions, or, where
/// that is keep_all, one for every position. 0 entries: there is none yet.
template <backend B = cpu>
struct attention_history {
  view<const float, 3, B> weights;           ///< [rows, groups, capacity] unit mass
  view<const std::int32_t, 3, B> positions;  ///< [rows, groups, capacity]
  view<const std::int32_t, 2, B> counts;     ///< [rows, groups]
  view<const std::int32_t, 1, B> row_of;     ///< [sequences] the row of each; empty: sequence s has row s
  SPECATTN_HD std::ptrdiff_t row(std::ptrdiff_t s) const { return row_of.empty() ? s : row_of[s]; }
};

/// Importance is stored in multiples of this. A position's is a share of one, so that fp16 keeps its 11 bits down to
/// 2^-29, and a row's mass as well as a selection needs it.
template <storage U>
inline constexpr float importance_unit = 1.0f;
template <>
inline constexpr float importance_unit<fp16> = 0x1p-15f;

/// A batch's signals and where its importance goes. Rows are contiguous; every other stride is free.
///
/// Row (step, layer, s, head) of `draft_weights` holds the weights over the prefix of sequence s; rows are scaled to unit
/// mass here, then averaged over the steps. A recording that keeps 16 bits relative to each split's maximum gives
/// `split_scales`: a stored weight times its split's scale is the weight.
template <backend B = cpu, storage T = float, storage U = float>
struct importance_args {
  static_assert(!scaled_storage<T>,
                "weights have no scale that 8 bits could be multiples of: use float, bf16 or fp16");
  static_assert(std::same_as<U, float> || std::same_as<U, fp16>, "importance is stored as float or as fp16");
  view<const T, 5, B> draft_weights;     ///< [steps, draft layers, sequences, q_heads, capacity]
  view<const float, 5, B> split_scales;  ///< [steps, draft layers, sequences, q_heads, splits]; empty: all are 1
  std::int32_t split_len = 0;            ///< positions of a split, a multiple of split_unit
  view<const float, 4, B> masses;        ///< [steps, draft layers, sequences, q_heads] what a row's weights sum to
  attention_history<B> history;          ///< empty: none
  std::int32_t kv_len = 0;               ///< length of the prefixes; where `length` is given, the most they can be
  view<const std::int32_t, 1, B>
      length;  ///< [sequences] the prefixes' lengths, read when the work runs; empty: kv_len
  view<const std::int32_t, 1, B> steps;  ///< [sequences] how many steps each has taken, the first ones, read when the
                                         ///< work runs; 0 counts as 1; empty: all
  bool separate_steps =
      false;          ///< a row for each step instead of their mean; the last step's again where one took fewer
  view<U, 5, B> out;  ///< [target layers, sequences, kv_heads, 1 or steps, kv_len or more]

  static constexpr std::int32_t split_unit = 256;
  SPECATTN_HD std::ptrdiff_t sequences() const { return draft_weights.extent(2); }
  SPECATTN_HD std::int32_t steps_of(std::ptrdiff_t s) const {
    const auto all = static_cast<std::int32_t>(draft_weights.extent(0));
    if (steps.empty() || steps[s] > all) return all;
    return steps[s] < 1 ? 1 : steps[s];
  }
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct importance_impl;

/// A recency window or the sinks: `asked` positions, or all there are, of the same weight.
struct uniform_signal {
  std::int32_t asked;
  bool recent;
  SPECATTN_HD std::int32_t count(std::int32_t kv_len) const { return asked < kv_len ? asked : kv_len; }
  SPECATTN_HD std::int32_t first(std::int32_t kv_len) const { return recent ? kv_len - count(kv_len) : 0; }
};

template <storage T, backend B, storage U>
void check_importance(const resident_mixture<B>& mixture, const importance_args<B, T, U>& args) {
  const signal_set& signals = mixture.signals;
  const auto& weights = args.draft_weights;
  const auto steps = weights.extent(0), sequences = args.sequences();
  expects(weights.extent(1) == signals.draft_layers && weights.extent(3) == signals.draft_q_heads,
          "importance: weights of ", weights.extent(1), " draft layers × ", weights.extent(3),
          " heads, the mixture is over ", signals.draft_layers, " × ", signals.draft_q_heads);
  const auto is_per_row = [&](const auto& numbers) {
    return numbers.extent(0) == steps && numbers.extent(1) == signals.draft_layers &&
           numbers.extent(2) == sequences && numbers.extent(3) == signals.draft_q_heads;
  };
  expects(steps >= 1 && is_per_row(args.masses), "importance: masses of [", args.masses.extent(0), ", ",
          args.masses.extent(1), ", ", args.masses.extent(2), ", ", args.masses.extent(3), "] for weights of ", steps,
          " steps and ", sequences, " sequences");
  if (!args.split_scales.empty()) {
    expects(args.split_len > 0 && args.split_len % args.split_unit == 0, "importance: split_len ", args.split_len,
            " is no multiple of ", args.split_unit);
    expects(is_per_row(args.split_scales) && args.split_scales.extent(4) * args.split_len >= args.kv_len,
            "importance: split_scales of [", args.split_scales.extent(0), ", ", args.split_scales.extent(1), ", ",
            args.split_scales.extent(2), ", ", args.split_scales.extent(3), ", ", args.split_scales.extent(4),
            "] for ", args.kv_len, " positions in splits of ", args.split_len);
  }
  expects(weights.stride(4) == 1 && args.out.stride(4) == 1, "importance: weights of stride ", weights.stride(4),
          " and out of stride ", args.out.stride(4), "; rows must be contiguous");
  expects(weights.extent(4) >= args.kv_len, "importance: rows of ", weights.extent(4), " weights, kv_len ",
          args.kv_len);
  expects(args.length.empty() || args.length.extent(0) == sequences, "importance: ", args.length.extent(0),
          " lengths for ", sequences, " sequences");
  expects(args.steps.empty() || args.steps.extent(0) == sequences, "importance: ", args.steps.extent(0),
          " step counts for ", sequences, " sequences");
  const std::ptrdiff_t rows = args.separate_steps ? steps : 1;
  const auto& out = args.out;
  expects(out.extent(1) == sequences && out.extent(2) == mixture.kv_heads &&
              out.extent(0) * mixture.kv_heads == mixture.groups() && out.extent(3) == rows &&
              out.extent(4) >= args.kv_len,
          "importance: out is [", out.extent(0), ", ", out.extent(1), ", ", out.extent(2), ", ", out.extent(3), ", ",
          out.extent(4), "], needed [", mixture.groups() / mixture.kv_heads, ", ", sequences, ", ", mixture.kv_heads,
          ", ", rows, ", ", args.kv_len, "]");
}
}  // namespace detail

/// How far a value may be from the exact one, relative to itself. Every term is >= 0, so nothing cancels: what counts
/// is float's rounding on the cpu, and on the device that of coefficients and of the steps' means to bf16, at most 2^-8
/// each. (With 32 terms a group, errors of 1e-3 in the root mean square were measured.)
template <backend B>
inline constexpr double importance_error = 2e-6;
template <>
inline constexpr double importance_error<cuda> = 8e-3;

/// Bytes of workspace that mix_importance() takes from the context for `sequences` × `steps` × `kv_len` or anything
/// smaller.
template <backend B>
std::size_t importance_workspace_bytes(const context<B>& ctx, const resident_mixture<B>& mixture,
                                       std::ptrdiff_t steps, std::ptrdiff_t kv_len, std::ptrdiff_t sequences = 1) {
  return detail::importance_impl<B>::workspace_bytes(ctx, mixture, steps, kv_len, sequences);
}

/// Writes the importance of every prefix position of each sequence for every group of the mixture; reads and writes nothing
/// after a prefix's end. An absent signal (no history yet) contributes nothing; the row is not rescaled, since select()
/// relates mass to the row's own sum.
///
/// Values are within importance_error<B> of themselves, and fp16's within half a unit of its last place more; those of
/// twice importance_unit<fp16>'s reciprocal, which no alignment's are, would be cut off there.
/// select() takes the rows as they are: it relates mass to a row's own sum.
///
/// \throws contract_error for shapes that differ
/// \cost   reads steps × draft heads × kv_len weights once. cpu: terms × kv_len multiply-adds. cuda: a product of
///         groups × draft heads × kv_len on tensor cores, whatever the number of terms
/// \sync   cpu: done on return. cuda: queued on the context's stream
template <storage T, backend B, storage U>
void mix_importance(context<B>& ctx, const resident_mixture<B>& mixture, const importance_args<B, T, U>& args) {
  detail::check_importance(mixture, args);
  detail::importance_impl<B>::run(ctx, mixture, args);  // incomplete? include <specattn/specattn.hpp> (cpu)
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
