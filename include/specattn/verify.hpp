// Accept or reject drafted tokens, and the sampling that both sides share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.hpp"
#include "error.hpp"
#include "random.hpp"
#include "sampling.hpp"
#include "view.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

/// One round's decisions for a batch. Sequence s has slots slot_offsets(s) … slot_offsets(s + 1) - 1, at least one:
/// row 0 of them judges its first drafted token, and so on; the last row has nothing to judge and yields the bonus
/// token. Its drafted tokens therefore start at entry slot_offsets(s) - s.
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
  view<std::int32_t, 1, B> next_token;          ///< out [sequences] correction or bonus; no_token where the row that
                                                ///< was to yield it has no distribution
};

namespace detail {
/// The backend's implementation.  // incomplete? include <specattn/specattn.hpp> (cpu) or <specattn/cuda.cuh>
template <backend B>
struct verify_impl;

template <backend B>
void check_sample(view<const float, 2, B> logits, view<const sampler_options, 1, B> samplers,
                  view<const std::int64_t, 1, B> positions, view<float, 2, B> probabilities,
                  view<std::int32_t, 1, B> tokens) {
  const auto rows = logits.extent(0), vocab = logits.extent(1);
  expects(vocab <= max_vocab && (vocab > 0 || rows == 0), "sample: a vocabulary of ", vocab, "; give 1 … ",
          max_vocab);
  expects(samplers.extent(0) == rows && positions.extent(0) == rows && tokens.extent(0) == rows, "sample: ", rows,
          " rows of logits, ", samplers.extent(0), " samplers, ", positions.extent(0), " positions, ",
          tokens.extent(0), " tokens");
  expects(probabilities.empty() || (probabilities.extent(0) == rows && probabilities.extent(1) == vocab),
          "sample: probabilities [", probabilities.extent(0), ", ", probabilities.extent(1), "] for logits [", rows,
          ", ", vocab, "]");
}

template <backend B>
void check_verify(const verify_args<B>& args) {
  const auto slots = args.target_logits.extent(0), vocab = args.target_logits.extent(1);
  const auto sequences = args.samplers.extent(0), drafted = args.drafted.extent(0);
  expects(vocab <= max_vocab && (vocab > 0 || slots == 0), "verify: a vocabulary of ", vocab, "; give 1 … ",
          max_vocab);
  expects(args.slot_offsets.extent(0) == sequences + 1, "verify: ", args.slot_offsets.extent(0), " slot_offsets for ",
          sequences, " sequences");
  expects(args.positions.extent(0) == sequences && args.accepted.extent(0) == sequences &&
              args.next_token.extent(0) == sequences,
          "verify: ", sequences, " samplers, ", args.positions.extent(0), " positions, ", args.accepted.extent(0),
          " accepted, ", args.next_token.extent(0), " next_token");
  expects(drafted == slots - sequences, "verify: ", drafted, " drafted tokens for ", slots, " slots of ", sequences,
          " sequences");
  const auto& draft = args.draft_probabilities;
  expects(draft.empty() || (draft.extent(0) == drafted && draft.extent(1) == vocab), "verify: draft_probabilities [",
          draft.extent(0), ", ", draft.extent(1), "] for ", drafted, " drafted tokens of a vocabulary of ", vocab);
}
}  // namespace detail

/// Bytes of workspace that sample() and verify() take from the context for `slots` rows of `vocab` logits or less.
template <backend B>
std::size_t verify_workspace_bytes(const context<B>& ctx, std::ptrdiff_t slots, std::ptrdiff_t vocab) {
  return detail::verify_impl<B>::workspace_bytes(ctx, slots, vocab);
}

/// Draws one token from each row of logits, as the draft does and as plain decoding does. A row's token depends on
/// the row, its sampler and its position alone: not on the batch, nor on the number of threads.
/// \param logits        [rows, vocab] -inf masks a token
/// \param samplers      [rows]
/// \param positions     [rows] text position the token will stand at
/// \param use           random_use::draft or random_use::emit
/// \param probabilities out [rows, vocab] the distribution drawn from (untouched for greedy rows, zero where the
///                      token is no_token); may be empty
/// \param tokens        out [rows]; no_token where a row holds NaN, +inf, or nothing but -inf
/// \throws contract_error
/// \cost   reads every logit once from memory; no sort: truncation narrows to a few candidates
/// \sync   cpu: done on return. cuda: queued on the context's stream.
template <backend B>
void sample(context<B>& ctx, view<const float, 2, B> logits, view<const sampler_options, 1, B> samplers,
            view<const std::int64_t, 1, B> positions, random_use use, view<float, 2, B> probabilities,
            view<std::int32_t, 1, B> tokens) {
  detail::check_sample<B>(logits, samplers, positions, probabilities, tokens);
  detail::verify_impl<B>::sample(ctx, logits, samplers, positions, use, probabilities, tokens);
}

/// Greedy: accepts drafted tokens while they equal the target's choice. Otherwise rejection sampling (Leviathan et
/// al., arXiv 2211.17192): the emitted tokens follow the law of the target as it was evaluated, whatever the draft;
/// with sparse attention that is the sparse target, not the dense one.
///
/// A drafted token of draft probability zero is rejected. Where the draft leaves no residual, the replacement comes
/// from the target's whole distribution. A row without a distribution (see no_token) accepts nothing.
/// \throws contract_error. What only the data can show (offsets that do not ascend, a drafted token outside the
///         vocabulary, no draft_probabilities for a sequence that samples) is refused on the cpu; cuda, which does
///         not read back, rejects such a token.
/// \cost   reads every logit once from memory, and the rows of draft_probabilities whose token was rejected
/// \sync   cpu: done on return. cuda: queued on the context's stream.
template <backend B>
void verify(context<B>& ctx, const verify_args<B>& args) {
  detail::check_verify(args);
  detail::verify_impl<B>::run(ctx, args);  // incomplete? include <specattn/specattn.hpp> or <specattn/cuda.cuh>
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
