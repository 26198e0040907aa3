// mix_importance() on the cpu: tiles of positions, so that the draft's rows are read once and stay in the L1 cache.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "../importance.hpp"
#include "../scalar.hpp"
#include "context.hpp"
#include "lanes.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

template <>
struct importance_impl<cpu> {
  static constexpr std::int32_t tile =
      importance_args<cpu>::split_unit;  // 16 draft heads × 256 floats fill half of a 32 KB L1 cache
  static constexpr std::int32_t strip_lanes = 4;
  static constexpr std::int32_t strip = strip_lanes * lanes::width;  // positions whose sums stay in registers

  static std::size_t workspace_bytes(const context<cpu>& ctx, const resident_mixture<cpu>& mixture,
                                     std::ptrdiff_t steps, std::ptrdiff_t /*kv_len*/, std::ptrdiff_t /*sequences*/) {
    const auto heads = static_cast<std::size_t>(mixture.signals.draft_heads());
    const auto tiles = static_cast<std::size_t>(ctx.threads()) * heads * tile;
    return (static_cast<std::size_t>(steps) * heads + tiles) * sizeof(float);
  }

  template <storage T, storage U>
  static void run(context<cpu>& ctx, const resident_mixture<cpu>& mixture, const importance_args<cpu, T, U>& args) {
    for (std::ptrdiff_t s = 0; s < args.sequences(); ++s) run_sequence(ctx, mixture, args, s);
  }

 private:
  template <storage T, storage U>
  static void run_sequence(context<cpu>& ctx, const resident_mixture<cpu>& mixture, importance_args<cpu, T, U> args,
                           std::ptrdiff_t s) {
    if (!args.length.empty()) args.kv_len = std::clamp(args.length[s], 0, args.kv_len);
    if (args.kv_len <= 0) return;
    const auto heads = mixture.signals.draft_heads();
    const auto steps = static_cast<std::int32_t>(args.draft_weights.extent(0));
    auto* floats =
        reinterpret_cast<float*>(ctx.workspace(workspace_bytes(ctx, mixture, steps, args.kv_len, 1), "importance"));
    float* scales = floats;
    float* tiles = floats + std::ptrdiff_t{steps} * heads;
    prefix_scales(args, s, scales);
    const std::int32_t taken = args.steps_of(s);
    const std::int32_t count = (args.kv_len + tile - 1) / tile;
    ctx.parallel_for(count, [&](std::ptrdiff_t t, int member) {
      const auto begin = static_cast<std::int32_t>(t) * tile;
      const std::int32_t length = (std::min)(tile, args.kv_len - begin);
      float* combined = tiles + std::ptrdiff_t{member} * heads * tile;
      if (args.separate_steps) {
        for (std::int32_t step = 0; step < steps; ++step) {
          if (step < taken) combine(args, s, scales, step, step + 1, begin, length, combined);
          mix(mixture, args, s, combined, step, begin, length);
        }
      } else {
        combine(args, s, scales, 0, taken, begin, length, combined);
        mix(mixture, args, s, combined, 0, begin, length);
      }
    });
  }

  /// scales[step, head] = 1 / mass of the row; 0 for a row with none.
  template <storage T, storage U>
  static void prefix_scales(const importance_args<cpu, T, U>& args, std::ptrdiff_t s, float* scales) {
    for (std::ptrdiff_t step = 0; step < args.masses.extent(0); ++step) {
      for (std::ptrdiff_t layer = 0; layer < args.masses.extent(1); ++layer) {
        for (std::ptrdiff_t head = 0; head < args.masses.extent(3); ++head) {
          const float mass = args.masses(step, layer, s, head);
          *scales++ = mass > 0.0f ? 1.0f / mass : 0.0f;
        }
      }
    }
  }

  /// combined[head, i] = mean over the steps of the scaled rows, positions begin … begin + length.
  template <storage T, storage U>
  static void combine(const importance_args<cpu, T, U>& args, std::ptrdiff_t s, const float* scales,
                      std::int32_t first_step, std::int32_t last_step, std::int32_t begin, std::int32_t length,
                      float* combined) {
    const auto layers = static_cast<std::int32_t>(args.draft_weights.extent(1));
    const auto q_heads = static_cast<std::int32_t>(args.draft_weights.extent(3));
    const float share = 1.0f / static_cast<float>(last_step - first_step);
    for (std::int32_t h = 0; h < layers * q_heads; ++h) {
      float* out = combined + std::ptrdiff_t{h} * tile;
      for (std::int32_t step = first_step; step < last_step; ++step) {
        float scale = scales[step * layers * q_heads + h] * share;
        if (!args.split_scales.empty())
          scale *= args.split_scales(step, h / q_heads, s, h % q_heads, begin / args.split_len);
        const T* row = &args.draft_weights(step, h / q_heads, s, h % q_heads, begin);
        if (step == first_step) {
          for (std::int32_t i = 0; i < length; ++i) out[i] = scale * to_float(row[i]);
        } else {
          for (std::int32_t i = 0; i < length; ++i) out[i] += scale * to_float(row[i]);
        }
      }
    }
  }

  template <storage T, storage U>
  static void mix(const sparse_mixture& mixture, const importance_args<cpu, T, U>& args, std::ptrdiff_t s,
                  const float* combined, std::int32_t out_row, std::int32_t begin, std::int32_t length) {
    const std::ptrdiff_t past = args.history.row(s);
    for (std::int32_t g = 0; g < mixture.groups(); ++g) {
      U* to = &args.out(g / mixture.kv_heads, s, g % mixture.kv_heads, out_row, begin);
      float sums_here[tile];
      float* out = sums_here;
      if constexpr (std::same_as<U, float>) out = to;
      const auto* terms = mixture.terms.data() + mixture.first[static_cast<std::size_t>(g)];
      const auto* end = mixture.terms.data() + mixture.first[static_cast<std::size_t>(g) + 1];
      const auto row_of = [&](const sparse_mixture::term& term) -> const float* {
        if (term.signal < mixture.signals.draft_heads()) return combined + std::ptrdiff_t{term.signal} * tile;
        if (!is_history(mixture.signals, term.signal) || args.history.counts.empty()) return nullptr;
        return args.history.counts(past, g) == keep_all ? &args.history.weights(past, g, begin) : nullptr;
      };
      std::int32_t i = 0;
      for (; i + strip <= length; i += strip) {
        lanes sums[strip_lanes];
        for (lanes& sum : sums) sum = lanes::zero();
        for (const auto* term = terms; term != end; ++term) {
          const float* row = row_of(*term);
          if (row == nullptr) continue;
          const lanes coefficient = lanes::broadcast(term->coefficient);
          for (std::int32_t j = 0; j < strip_lanes; ++j)
            sums[j] = fmadd(coefficient, lanes::load(row + i + j * lanes::width), sums[j]);
        }
        for (std::int32_t j = 0; j < strip_lanes; ++j) sums[j].store(out + i + j * lanes::width);
      }
      for (; i < length; ++i) {
        out[i] = 0.0f;
        for (const auto* term = terms; term != end; ++term) {
          if (const float* row = row_of(*term)) out[i] += term->coefficient * row[i];
        }
      }
      for (const auto* term = terms; term != end; ++term) {
        if (!is_history(mixture.signals, term->signal)) {
          add_uniform(mixture.signals, *term, args.kv_len, begin, length, out);
        } else if (!args.history.counts.empty()) {
          add_listed(args.history, past, g, term->coefficient, begin, length, out);
        }
      }
      if constexpr (std::same_as<U, fp16>) {
        for (i = 0; i < length; ++i) to[i] = from_float<fp16>((std::min)(out[i] / importance_unit<fp16>, 65504.0f));
      }
    }
  }

  /// Signals are ordered draft heads, windows, sinks, history.
  static bool is_history(const signal_set& signals, std::int32_t signal) {
    return signal ==
           signals.draft_heads() + static_cast<std::int32_t>(signals.windows.size()) + (signals.sinks > 0 ? 1 : 0);
  }

  /// Adds a recency window or the sinks, whose weights are all the same; does nothing for a draft head.
  static void add_uniform(const signal_set& signals, sparse_mixture::term term, std::int32_t kv_len,
                          std::int32_t begin, std::int32_t length, float* out) {
    const std::int32_t signal = term.signal - signals.draft_heads();
    if (signal < 0) return;
    const auto windows = static_cast<std::int32_t>(signals.windows.size());
    const bool recent = signal < windows;
    const uniform_signal uniform{recent ? signals.windows[static_cast<std::size_t>(signal)] : signals.sinks, recent};
    const std::int32_t count = uniform.count(kv_len), first = uniform.first(kv_len);
    add_range(first, first + count, term.coefficient / static_cast<float>(count), begin, length, out);
  }

  /// Adds the listed weights that fall into the tile at `begin`.
  static void add_listed(const attention_history<cpu>& history, std::ptrdiff_t row, std::int32_t group,
                         float coefficient, std::int32_t begin, std::int32_t length, float* out) {
    const std::int32_t count = history.counts(row, group);
    if (count <= 0) return;  // keep_all included: that row was added with the draft's
    const std::int32_t* positions = &history.positions(row, group, 0);
    const float* weights = &history.weights(row, group, 0);
    const auto first = std::lower_bound(positions, positions + count, begin) - positions;
    for (std::ptrdiff_t i = first; i < count && positions[i] < begin + length; ++i)
      out[positions[i] - begin] += coefficient * weights[i];
  }

  /// Adds `value` at positions [from, to) that fall into the tile at `begin`.
  static void add_range(std::int32_t from, std::int32_t to, float value, std::int32_t begin, std::int32_t length,
                        float* out) {
    const std::int32_t first = (std::max)(from - begin, 0);
    const std::int32_t last = (std::min)(to - begin, length);
    for (std::int32_t i = first; i < last; ++i) out[i] += value;
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
