// Accept or reject drafted tokens, and the sampling that both sides share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.hpp"
#include "error.hpp"
#include "random.hpp"
#include "view.hpp"

namespace specattn::inline v0_1 {

/// How a token is drawn from logits: temperature, then top-k, then top-p, then min-p, over one float32
/// distribution that serves the draw, the acceptance ratio and the residual alike.
struct sampler_options {
  float temperature = 0.0f;   ///< <= 0: greedy, the largest logit, ties to the smaller token
  std::int32_t top_k = 0;     ///< keep the k likeliest; 0: all
  float top_p = 1.0f;         ///< keep the least set of mass >= p; ties by smaller token
  float min_p = 0.0f;         ///< drop tokens below min_p times the likeliest
  std::uint64_t seed = 0;
};

/// A token that could not be drawn: the row held no finite logit.
inline constexpr std::int32_t no_token = -1;

/// One round's decisions for a batch. Sequence s has slots slot_offsets(s) … slot_offsets(s + 1) - 1: row 0 of them
/// judges its first drafted token, and so on; the last row has nothing to judge and yields the bonus token. Its
/// drafted tokens therefore start at entry slot_offsets(s) - s.
template <backend B = cpu>
struct verify_args {
  view<const float, 2, B> target_logits;        ///< [slots, vocab]
  view<const float, 2, B> draft_probabilities;  ///< [drafted, vocab] what each drafted token was drawn from; rows of
                                                ///< greedy sequences are not read; empty: all are greedy
  view<const std::int32_t, 1, B> drafted;       ///< [drafted]
  view<const std::int32_t, 1, B> slot_offsets;  ///< [sequences + 1]
  view<const sampler_options, 1, B> samplers;   ///< [sequences]
  view<const std::int64_t, 1, B> positions;     ///< [sequences] text position of the first drafted token
  view<std::int32_t, 1, B> accepted;            ///< out [sequences] 0 … drafted
  view<std::int32_t, 1, B> next_token;          ///< out [sequences] correction or bonus; no_token: no finite logit
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct verify_impl;
}  // namespace detail

/// Bytes of workspace that sample() and verify() take from the context.
template <backend B>
std::size_t verify_workspace_bytes(const context<B>& ctx, std::ptrdiff_t slots, std::ptrdiff_t vocab) {
  return detail::verify_impl<B>::workspace_bytes(ctx, slots, vocab);
}

/// Draws one token from each row of logits, as the draft does and as plain decoding does.
/// \param logits        [rows, vocab]
/// \param samplers      [rows]
/// \param positions     [rows] text position the token will stand at
/// \param use           random_use::draft or random_use::emit
/// \param probabilities out [rows, vocab] the distribution drawn from (untouched for greedy rows); may be empty
/// \param tokens        out [rows]; no_token where no logit is finite
template <backend B>
void sample(context<B>& ctx, view<const float, 2, B> logits, view<const sampler_options, 1, B> samplers,
            view<const std::int64_t, 1, B> positions, random_use use, view<float, 2, B> probabilities,
            view<std::int32_t, 1, B> tokens) {
  detail::verify_impl<B>::sample(ctx, logits, samplers, positions, use, probabilities, tokens);
}

/// Greedy: accepts drafted tokens while they equal the target's choice. Otherwise rejection sampling (Leviathan et
/// al., arXiv 2211.17192): the emitted tokens follow the law of the target as it was evaluated, whatever the draft;
/// with sparse attention that is the sparse target, not the dense one.
/// \sync cpu: done on return. cuda: queued on the context's stream.
template <backend B>
void verify(context<B>& ctx, const verify_args<B>& args) {
  detail::verify_impl<B>::run(ctx, args);
}

}  // namespace specattn::inline v0_1
