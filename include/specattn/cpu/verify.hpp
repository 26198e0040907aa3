// sample() and verify() on the CPU: rows in parallel, each by one member of the team.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../verify.hpp"
#include "context.hpp"
#include "sampling.hpp"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

template <>
struct verify_impl<cpu> {
  /// What one slot decides on its own; which of these count is settled afterwards.
  struct judgement {
    std::int32_t sequence;
    std::int32_t token;  // in place of the drafted one, or the bonus
    bool accepted;
  };
  /// A member's scratch.
  struct desk {
    float* weights;         // [vocab]
    candidate* candidates;  // [vocab]
  };

  static std::size_t lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
  static std::size_t desk_bytes(std::ptrdiff_t vocab) {
    return lines(static_cast<std::size_t>(vocab) * sizeof(float)) +
           lines(static_cast<std::size_t>(vocab) * sizeof(candidate));
  }
  static std::size_t workspace_bytes(const context<cpu>& ctx, std::ptrdiff_t slots, std::ptrdiff_t vocab) {
    return static_cast<std::size_t>(ctx.threads()) * desk_bytes(vocab) +
           lines(static_cast<std::size_t>(slots) * sizeof(judgement));
  }
  static desk desk_of(std::byte* workspace, int member, std::ptrdiff_t vocab) {
    std::byte* mine = workspace + static_cast<std::size_t>(member) * desk_bytes(vocab);
    return {reinterpret_cast<float*>(mine),
            reinterpret_cast<candidate*>(mine + lines(static_cast<std::size_t>(vocab) * sizeof(float)))};
  }

  /// The row itself where its logits are adjacent, else a copy of it in `room`.
  static const float* adjacent(view<const float, 1> row, float* room) {
    if (row.stride(0) == 1) return row.data();
    for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) room[i] = row[i];
    return room;
  }

  static void sample(context<cpu>& ctx, view<const float, 2> logits, view<const sampler_options, 1> samplers,
                     view<const std::int64_t, 1> positions, random_use use, view<float, 2> probabilities,
                     view<std::int32_t, 1> tokens) {
    const std::ptrdiff_t vocab = logits.extent(1);
    std::byte* workspace = ctx.workspace(workspace_bytes(ctx, 0, vocab), "sample");
    ctx.parallel_for(logits.extent(0), [&](std::ptrdiff_t row, int member) {
      const desk mine = desk_of(workspace, member, vocab);
      const float* from = adjacent(logits[row], mine.weights);
      if (samplers[row].greedy()) {
        tokens[row] = find_peak(from, vocab).token;
        return;
      }
      const double total = make_weights(from, vocab, samplers[row], mine.weights, mine.candidates);
      const double u = uniform(samplers[row].seed, static_cast<std::uint64_t>(positions[row]), use);
      tokens[row] = total > 0.0 ? draw_token(mine.weights, vocab, u * total) : no_token;
      if (probabilities.empty()) return;
      const view<float, 1> out = probabilities[row];
      const float scale = probability_scale(total);
      for (std::ptrdiff_t i = 0; i < vocab; ++i) out[i] = scale > 0.0f ? mine.weights[i] * scale : 0.0f;
    });
  }

  static void run(context<cpu>& ctx, const verify_args<cpu>& args) {
    const std::ptrdiff_t slots = args.target_logits.extent(0), vocab = args.target_logits.extent(1);
    const std::ptrdiff_t sequences = args.samplers.extent(0);
    check_contents(args);
    std::byte* workspace = ctx.workspace(workspace_bytes(ctx, slots, vocab), "verify");
    auto* judgements =
        reinterpret_cast<judgement*>(workspace + static_cast<std::size_t>(ctx.threads()) * desk_bytes(vocab));
    for (std::ptrdiff_t s = 0; s < sequences; ++s) {
      for (std::ptrdiff_t slot = args.slot_offsets[s]; slot < args.slot_offsets[s + 1]; ++slot) {
        judgements[slot] = {static_cast<std::int32_t>(s), no_token, false};
      }
    }
    ctx.parallel_for(slots, [&](std::ptrdiff_t slot, int member) {
      judge(args, slot, desk_of(workspace, member, vocab), judgements[slot]);
    });
    for (std::ptrdiff_t s = 0; s < sequences; ++s) {
      std::ptrdiff_t slot = args.slot_offsets[s];
      while (judgements[slot].accepted) ++slot;  // the last slot accepts nothing
      args.accepted[s] = static_cast<std::int32_t>(slot - args.slot_offsets[s]);
      args.next_token[s] = judgements[slot].token;
    }
  }

 private:
  static void check_contents(const verify_args<cpu>& args) {
    const std::ptrdiff_t slots = args.target_logits.extent(0), vocab = args.target_logits.extent(1);
    const std::ptrdiff_t sequences = args.samplers.extent(0);
    const auto& offsets = args.slot_offsets;
    expects(offsets[0] == 0 && offsets[sequences] == slots, "verify: slot_offsets run from ", offsets[0], " to ",
            offsets[sequences], ", not from 0 to ", slots);
    for (std::ptrdiff_t s = 0; s < sequences; ++s) {
      expects(offsets[s] < offsets[s + 1], "verify: sequence ", s, " has no slot (slot_offsets ", offsets[s], ", ",
              offsets[s + 1], ")");
      expects(args.samplers[s].greedy() || offsets[s + 1] - offsets[s] == 1 || !args.draft_probabilities.empty(),
              "verify: sequence ", s, " samples, but there are no draft_probabilities");
    }
    for (std::ptrdiff_t d = 0; d < args.drafted.extent(0); ++d) {
      expects(args.drafted[d] >= 0 && args.drafted[d] < vocab, "verify: drafted token ", args.drafted[d], " (entry ",
              d, ") is outside the vocabulary of ", vocab);
    }
  }

  static void judge(const verify_args<cpu>& args, std::ptrdiff_t slot, desk mine, judgement& out) {
    const std::ptrdiff_t vocab = args.target_logits.extent(1), s = out.sequence;
    const sampler_options& options = args.samplers[s];
    const bool last = slot + 1 == args.slot_offsets[s + 1];
    const std::ptrdiff_t entry = slot - s;
    const float* logits = adjacent(args.target_logits[slot], mine.weights);
    if (options.greedy()) {
      out.token = find_peak(logits, vocab).token;
      out.accepted = !last && out.token == args.drafted[entry];
      return;
    }
    double total = make_weights(logits, vocab, options, mine.weights, mine.candidates);
    if (!(total > 0.0)) return;
    const auto position = static_cast<std::uint64_t>(args.positions[s] + (slot - args.slot_offsets[s]));
    if (!last) {
      const view<const float, 1> draft = args.draft_probabilities[entry];
      const std::int32_t token = args.drafted[entry];
      const float scale = probability_scale(total);
      out.accepted =
          accepts(uniform(options.seed, position, random_use::accept), mine.weights[token] * scale, draft[token]);
      if (out.accepted) return;
      total = leave_residual(mine.weights, draft, scale);
      if (!(total > 0.0)) {
        total = make_weights(adjacent(args.target_logits[slot], mine.weights), vocab, options, mine.weights,
                             mine.candidates);
      }
    }
    out.token = draw_token(mine.weights, vocab, uniform(options.seed, position, random_use::emit) * total);
  }

  /// weights = max(0, weights * scale - draft); returns their sum.
  static double leave_residual(float* weights, view<const float, 1> draft, float scale) {
    const std::ptrdiff_t vocab = draft.extent(0), stride = draft.stride(0);
    const float* q = draft.data();
    if (stride == 1) {
      for (std::ptrdiff_t i = 0; i < vocab; ++i) weights[i] = residual(product(weights[i], scale), q[i]);
    } else {
      for (std::ptrdiff_t i = 0; i < vocab; ++i) weights[i] = residual(product(weights[i], scale), q[i * stride]);
    }
    return sum_row(weights, vocab);
  }
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../words_end.hpp"
