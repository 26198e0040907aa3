// The least that a guide, a model and an attention can be: each offers what its concept asks for and nothing else. What
// a decoder does with them, it does with any.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "specattn/specattn.hpp"

namespace concept_testing {

using namespace specattn;  // NOLINT(google-build-using-namespace)

/// Made in its place and left there: what the library holds it by must be a pointer.
struct stays_in_place {
  explicit stays_in_place(std::nullptr_t) {}
  stays_in_place(const stays_in_place&) = delete;
  stays_in_place& operator=(const stays_in_place&) = delete;
};

/// Converts to a T and can do nothing else.
template <class T>
struct only_converts {
  T value;
  operator T() const { return value; }  // NOLINT(google-explicit-constructor)
};

/// How often a decoder called which hook.
struct hook_calls {
  int prepare = 0, before_verify = 0, before_layer = 0, after_verify = 0, forget = 0;
};

/// Keeps everything in the even layers, and of each list of the others the first position.
template <class Round>
void keep_little(const Round& round) {
  for (std::int32_t layer = 0; layer < round.layers; ++layer) {
    for (std::int32_t s = 0; s < round.sequences(); ++s) {
      if (layer % 2 == 0) {
        round.keep_everything(layer, s);
        continue;
      }
      for (std::int32_t h = 0; h < round.kv_heads; ++h) {
        const std::ptrdiff_t group = round.group(layer, s, h);
        round.kept.counts[group] = 1;
        round.kept.positions(group, 0) = 0;
        for (std::ptrdiff_t i = 1; i < padded_count(1, round.kept.capacity()); ++i)
          round.kept.positions(group, i) = -1;
      }
    }
  }
}

/// Of one storage and one backend, and without templates: a guide needs to know no other.
template <class T = float, class B = cpu>
struct archetype_guide : stays_in_place {
  using stays_in_place::stays_in_place;

  void prepare(const guide_setup&) { ++calls.prepare; }
  guide_needs needs() const { return {.draft_weights = true, .target_weights = true}; }
  only_converts<std::size_t> workspace_bytes(const context<B>&) const { return {64}; }
  void before_verify(context<B>&, round_state<T, B>& round) {
    ++calls.before_verify;
    keep_little(round);
  }
  void before_layer(context<B>&, round_state<T, B>&, std::int32_t, view<const float, 3, B>) { ++calls.before_layer; }
  void after_verify(context<B>&, round_state<T, B>&) { ++calls.after_verify; }
  void forget(std::int32_t) { ++calls.forget; }
  only_converts<std::int64_t> metadata_rows(std::int32_t) const { return {0}; }

  hook_calls calls;
};

/// One that keeps its memory with the decoder: it takes it where it decides, and leaves out what would do nothing.
template <class T = float, class B = cpu>
struct archetype_guide_with_memory : archetype_guide<T, B> {
  using archetype_guide<T, B>::archetype_guide;
  using archetype_guide<T, B>::before_verify;

  struct memory {
    memory() = default;
    memory(const memory&) = delete;
    memory& operator=(const memory&) = delete;
    int rounds = 0;
  };

  void before_verify(context<B>&, round_state<T, B>& round, memory& own) {
    rounds = ++own.rounds;
    keep_little(round);
  }

  int rounds = 0;  ///< that the memory of its last decoder has seen
};

inline constexpr std::int32_t archetype_vocab = 7;
inline constexpr model_shape archetype_shape{.layers = 2,
                                             .q_heads = 2,
                                             .kv_heads = 1,
                                             .head_dim = 4,
                                             .vocab = archetype_vocab,
                                             .max_positions = 96,
                                             .max_slots = 48};

/// The next of the tokens, in a circle.
inline std::int32_t token_after(std::int32_t token) { return (token + 1) % archetype_vocab; }

/// Counts in a circle. Its values are all one: so is whatever attention makes of them, and without attention it says
/// nothing.
struct archetype_model : stays_in_place {
  /// \param wrong_after the token that it goes wrong after, as drafts do; negative: none
  explicit archetype_model(std::int32_t wrong_after = -1) : stays_in_place(nullptr), wrong_after_(wrong_after) {}

  model_shape shape() const { return archetype_shape; }

  template <layer_attention<cpu> Attention>
  void forward(context<cpu>&, const forward_batch<cpu>& batch, Attention& attention, view<float, 2, cpu> logits) {
    const auto slots = static_cast<std::ptrdiff_t>(batch.tokens.size());
    const std::int32_t dim = archetype_shape.head_dim;
    std::vector<float> ones(static_cast<std::size_t>(slots * 2 * dim), 1.0f);
    std::vector<float> out(static_cast<std::size_t>(slots * 2 * dim), 0.0f);
    const view<const float, 3> q(ones.data(), {slots, 2, dim});
    const view<const float, 3> kv(ones.data(), {slots, 1, dim});
    for (std::int32_t layer = 0; layer < archetype_shape.layers; ++layer) {
      std::fill(out.begin(), out.end(), 0.0f);
      attention(layer, q, kv, kv, view<float, 3>(out.data(), {slots, 2, dim}));
    }
    for (std::size_t row = 0; row < batch.logit_rows.size(); ++row) {
      const auto slot = static_cast<std::size_t>(batch.logit_rows[row]);
      const std::int32_t token = batch.tokens[slot];
      const std::int32_t next = token == wrong_after_ ? token : token_after(token);
      for (std::int32_t v = 0; v < archetype_vocab; ++v) {
        logits(static_cast<std::ptrdiff_t>(row), v) =
            v == next ? 20.0f * out[slot * 2 * static_cast<std::size_t>(dim)] : 0.0f;
      }
    }
  }

 private:
  std::int32_t wrong_after_;
};

/// Counting from a first token.
inline std::vector<std::int32_t> counted(std::int32_t first, std::size_t length) {
  std::vector<std::int32_t> text;
  for (std::int32_t token = first; text.size() < length; token = token_after(token)) text.push_back(token);
  return text;
}

/// Runs a row to its end.
template <class Decoder>
std::vector<std::int32_t> finished(Decoder& decoder, std::int32_t row) {
  while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
  }
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

}  // namespace concept_testing
