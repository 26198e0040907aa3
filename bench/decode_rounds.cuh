// Rounds at the shapes of real models: a decoder over filled caches, its rounds timed one by one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device_llama.cuh"
#include "cuda_harness.cuh"
#include "decode_cells.hpp"
#include "specattn/cuda.cuh"

namespace bench {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;

/// A pair with its weights on the device.
struct loaded_pair {
  mini_llm::device_llama target, draft;
};

inline mini_llm::model_config config_of(const llama_size& size) {
  mini_llm::model_config config;
  config.layers = size.layers;
  config.hidden = size.hidden;
  config.q_heads = size.q_heads;
  config.kv_heads = size.kv_heads;
  config.head_dim = size.head_dim;
  config.ffn = size.ffn;
  config.vocab = size.vocab;
  config.max_context = 1 << 20;
  config.tie_word_embeddings = size.tied;
  return config;
}

/// Uniform numbers of unit variance, four from one hash.
static __global__ void fill_elements(bf16* to, std::size_t quarter, std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < quarter;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const std::uint64_t x = random_bits(i, seed);
    alignas(8) bf16 four[4];
    for (int j = 0; j < 4; ++j) {
      const float u = (static_cast<float>(x >> (16 * j) & 0xffffu) + 0.5f) * 0x1p-16f;
      four[j] = specattn::from_float<bf16>(3.4641016f * (u - 0.5f));
    }
    reinterpret_cast<uint2*>(to)[i] = *reinterpret_cast<const uint2*>(four);
  }
}

/// Fills a contiguous cache. The same seed and shape give the same numbers.
inline void fill_cache(const specattn::kv_cache<bf16, device>& cache, std::uint64_t seed, cudaStream_t stream) {
  const specattn::kv_cache_shape& shape = cache.shape();
  for (std::int32_t layer = 0; layer < shape.layers; ++layer) {
    const specattn::kv_view<bf16, device> part = cache.layer(layer);
    const std::size_t quarter =
        static_cast<std::size_t>(part.page_stride) * static_cast<std::size_t>(shape.sequences) / 4;
    std::uint64_t use = (seed * 1000 + static_cast<std::uint64_t>(layer)) << 40;
    for (bf16* to : {part.keys, part.values}) fill_elements<<<2048, 256, 0, stream>>>(to, quarter, use++);
  }
  check(cudaGetLastError());
}

/// `terms` random draft heads, a window of 64 and the sinks for each group.
inline specattn::alignment random_alignment(const llama_size& target, const llama_size& draft, int terms) {
  const auto fingerprint = [](const llama_size& of) {
    return specattn::model_fingerprint{of.name, of.layers, of.q_heads, of.kv_heads, of.head_dim, of.vocab, 0};
  };
  specattn::alignment pair;
  pair.draft = fingerprint(draft);
  pair.target = fingerprint(target);
  pair.signals = {draft.layers, draft.q_heads, {64}, 4, false};
  const auto groups = static_cast<std::size_t>(target.layers * target.kv_heads);
  const auto signals = static_cast<std::size_t>(pair.signals.count());
  const auto heads = static_cast<std::size_t>(pair.signals.draft_heads());
  std::mt19937 random(5);
  for (std::size_t g = 0; g < groups; ++g) {
    std::vector<float> row(signals, 0.0f);
    for (int t = 0; t < terms; ++t) row[random() % heads] += static_cast<float>(1 + random() % 1000);
    float sum = 0.0f;
    for (const float weight : row) sum += weight;
    for (float& weight : row) weight *= 0.96f / sum;
    row[heads] = row[heads + 1] = 0.02f;
    pair.coefficients.insert(pair.coefficients.end(), row.begin(), row.end());
  }
  pair.mixture_divergence.assign(groups, 0.0f);
  pair.divergence.assign(static_cast<std::size_t>(target.layers * draft.layers), 0.0f);
  for (std::int32_t j = 0; j < target.layers; ++j) pair.layer_map.push_back(j * draft.layers / target.layers);
  return pair;
}

/// The rules that make a sparse verify pass and a sparse draft keep a given share.
struct share_rules {
  specattn::selection_rule guide{.top_p = 1.0f, .rows = specattn::combine::mean};
  specattn::selection_rule draft{.top_p = 1.0f, .rows = specattn::combine::mean};
};

/// What rounds of a setup run with.
struct round_plan {
  std::int32_t kv_len = 0;  ///< positions of the caches
  std::int32_t cached = 0;  ///< of them filled
  std::int32_t batch = 1;
  std::int32_t draft_length = 0;  ///< at most
  bool sparse_draft = false;
  std::int32_t record_every = 1;
  share_rules rules;

  static round_plan of(const setup& what, std::int32_t longest, const share_rules& rules) {
    constexpr std::int32_t room = 128;  // for the rounds' tokens, so that no prefix passes kv_len
    return {what.kv_len,
            what.kv_len - room,
            what.batch,
            longest,
            has_sparse_draft(what.decoding),
            bench::record_every(what.decoding),
            rules};
  }
  specattn::decode_options options() const {
    specattn::decode_options o;
    o.draft_length = draft_length;
    o.max_sequences = batch;
    o.max_positions = kv_len;
    o.sparse_draft = sparse_draft;
    o.record_every = record_every;
    o.draft_rule = rules.draft;
    return o;
  }
};

/// Calls use(draft, guide) with what a way of decoding takes.
template <class Use>
void with_draft_and_guide(loaded_pair& models, const llama_size& target, const llama_size& draft, way decoding,
                          const specattn::selection_rule& rule, Use use) {
  specattn::no_guide none;
  if (!has_draft(decoding)) {
    specattn::no_draft nobody;
    use(nobody, none);
  } else if (has_guide(decoding)) {
    specattn::draft_guide<device> guide(random_alignment(target, draft, 32), rule);
    use(models.draft, guide);
  } else {
    use(models.draft, none);
  }
}

/// Makes a decoder over filled caches with all of the batch's sequences admitted, and calls use(decoder, rows).
template <class Draft, class Guide, class Use>
void with_decoder(specattn::context<device>& ctx, mini_llm::device_llama& target, Draft& draft, Guide& guide,
                  const round_plan& plan, std::uint64_t target_seed, std::uint64_t draft_seed, Use use) {
  auto decoder = specattn::make_decoder<bf16>(ctx, target, draft, guide, plan.options());
  fill_cache(decoder.target_cache(), target_seed, ctx.stream());
  if (plan.draft_length > 0) fill_cache(decoder.draft_cache(), draft_seed, ctx.stream());
  std::mt19937 random(7);
  std::vector<std::int32_t> prompt(static_cast<std::size_t>(plan.cached) + 1), rows;
  for (std::int32_t s = 0; s < plan.batch; ++s) {
    for (std::int32_t& token : prompt) token = static_cast<std::int32_t>(random() % 256);
    rows.push_back(decoder.add_cached({.prompt = prompt, .max_new_tokens = plan.kv_len}));
  }
  use(decoder, rows);
}

inline double median(std::vector<double> numbers) {
  std::sort(numbers.begin(), numbers.end());
  return numbers[numbers.size() / 2];
}

/// What the rounds of one turn took, in milliseconds.
struct turn_times {
  std::vector<double> round, draft, guide, verify, accept;

  void add(double round_ms, const specattn::round_trace& trace) {
    round.push_back(round_ms);
    draft.push_back(1e3 * trace.draft_seconds);
    guide.push_back(1e3 * trace.guide_seconds);
    verify.push_back(1e3 * trace.verify_seconds);
    accept.push_back(1e3 * trace.accept_seconds);
  }
};

/// Rounds of one draft length: the first ones capture and warm up, the others are timed by the wall clock, which
/// the round's own synchronisation makes complete.
template <class Decoder>
cell time_rounds(Decoder& decoder, const std::vector<std::int32_t>& rows, const round_plan& plan, const setup& what,
                 std::int32_t draft_length) {
  const std::int32_t every = plan.record_every, warm = 2 * every, timed = every == 1 ? 5 : 3 * every;
  for (const std::int32_t row : rows)
    decoder.rewind(row, {.max_new_tokens = plan.kv_len, .draft_length = draft_length});
  std::vector<turn_times> turns(static_cast<std::size_t>(every));
  specattn::decode_counts counts;
  for (std::int32_t i = 0; i < warm + timed; ++i) {
    std::size_t told = 0;
    const auto start = std::chrono::steady_clock::now();
    decoder.step([&](std::int32_t, std::span<const std::int32_t> tokens) {
      told += tokens.empty() ? 0 : 1;
      return true;
    });
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (told != rows.size()) throw std::runtime_error("a sequence wrote no token in a round");
    if (i < warm) continue;
    turns[static_cast<std::size_t>(i % every)].add(took.count(), decoder.last_round());
    counts += decoder.last_round().counts;
  }
  const auto mean = [&](std::vector<double> turn_times::*of) {
    double sum = 0.0;
    for (const turn_times& turn : turns) sum += median(turn.*of);
    return sum / every;
  };
  const auto a_round = [&](std::int64_t count) { return static_cast<double>(count) / timed; };
  cell found{what};
  found.draft_length = draft_length;
  found.cached = plan.cached;
  found.round_ms = mean(&turn_times::round);
  found.draft_ms = mean(&turn_times::draft);
  found.guide_ms = mean(&turn_times::guide);
  found.verify_ms = mean(&turn_times::verify);
  found.accept_ms = mean(&turn_times::accept);
  found.target_rows = a_round(counts.kv_rows_read);
  found.target_rows_dense = a_round(counts.kv_rows_dense);
  found.draft_steps = a_round(counts.draft_steps) / plan.batch;
  found.draft_rows = a_round(counts.draft_rows_read);
  found.draft_rows_dense = a_round(counts.draft_rows_dense);
  found.dense_share = static_cast<double>(counts.dense_rounds) / static_cast<double>(counts.rounds);
  return found;
}

/// Finds, by bisection over the filled caches of one sequence, the shares of the mass that keep a share of the positions:
/// in the verify pass, and in a sparse draft's own lists. Random weights attend nearly evenly, so what is imposed here
/// is the kept share; everything from the recording to the lists runs as it does for a user.
inline share_rules find_rules(specattn::context<device>& ctx, loaded_pair& models, const setup& what) {
  const llama_size &target = what.models().target, &draft = what.models().draft;
  share_rules rules;
  float low[2] = {0.0f, 0.0f}, high[2] = {1.0f, 1.0f};
  for (int turn = 0; turn < 10; ++turn) {
    float* const sides[2] = {&rules.guide.top_p, &rules.draft.top_p};
    for (int i = 0; i < 2; ++i) *sides[i] = 0.5f * (low[i] + high[i]);
    round_plan plan = round_plan::of(what, 4, rules);
    plan.batch = 1;
    plan.sparse_draft = true;
    specattn::draft_guide<device> guide(random_alignment(target, draft, 32), rules.guide);
    with_decoder(ctx, models.target, models.draft, guide, plan, 1, 2, [&](auto& decoder, const auto&) {
      for (int round = 0; round < 2; ++round)  // a first one drafts densely
        decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
      const specattn::decode_counts& counts = decoder.last_round().counts;
      const auto dense = static_cast<double>(counts.draft_rows_dense);
      // What the recording read: half a row of each position, where dense steps read whole ones.
      const double keys = 0.5 / static_cast<double>(counts.draft_steps) * dense;
      const double shares[2] = {static_cast<double>(counts.kv_rows_read) / static_cast<double>(counts.kv_rows_dense),
                                (static_cast<double>(counts.draft_rows_read) - keys) / dense};
      for (int i = 0; i < 2; ++i) (shares[i] > what.kept ? high : low)[i] = *sides[i];
    });
  }
  return rules;
}

/// Measures the draft lengths of a series; calls done(cell) after each. `go_on` is asked before each.
inline void measure(specattn::context<device>& ctx, loaded_pair& models, const setup& what, const share_rules& rules,
                    const std::vector<std::int32_t>& draft_lengths, const std::function<bool()>& go_on,
                    const std::function<void(cell)>& done) {
  const auto used_gb = [] {
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return 1e-9 * static_cast<double>(total - free);
  };
  const double weights_gb =
      1e-9 * static_cast<double>(
                 models.target.weight_bytes() + models.target.scratch_bytes() +
                 (has_draft(what.decoding) ? models.draft.weight_bytes() + models.draft.scratch_bytes() : 0));
  const std::int32_t longest = *std::max_element(draft_lengths.begin(), draft_lengths.end());
  const round_plan plan = round_plan::of(what, longest, rules);
  const llama_size &target = what.models().target, &draft = what.models().draft;
  ctx = specattn::context<device>(ctx.stream());  // a workspace of its own, so that memory counts are the setup's
  const double before_gb = used_gb();
  with_draft_and_guide(models, target, draft, what.decoding, plan.rules.guide, [&](auto& drafts, auto& guide) {
    with_decoder(ctx, models.target, drafts, guide, plan, 1, 2, [&](auto& decoder, const auto& rows) {
      for (const std::int32_t length : draft_lengths) {
        if (!go_on()) return;
        cell found = time_rounds(decoder, rows, plan, what, length);
        found.memory_gb = weights_gb + used_gb() - before_gb;
        done(found);
      }
    });
  });
}

/// Texts that `rounds` rounds write behind seeded caches.
inline std::vector<std::vector<std::int32_t>> texts_of(specattn::context<device>& ctx, loaded_pair& models,
                                                       const llama_size& target, const llama_size& draft,
                                                       const round_plan& plan, way decoding, std::uint64_t draft_seed,
                                                       int rounds) {
  std::vector<std::vector<std::int32_t>> texts;
  with_draft_and_guide(models, target, draft, decoding, plan.rules.guide, [&](auto& drafts, auto& guide) {
    with_decoder(ctx, models.target, drafts, guide, plan, 1, draft_seed, [&](auto& decoder, const auto& rows) {
      for (int i = 0; i < rounds; ++i) decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; });
      for (const std::int32_t row : rows) {
        const std::span<const std::int32_t> text = decoder.text(row);
        texts.emplace_back(text.begin() + plan.cached + 1, text.end());
      }
    });
  });
  return texts;
}

/// Throws unless rounds that go through recording, importance and selection but keep everything write what dense
/// rounds write. Returns the tokens written.
/// \param draft_seed of the draft's cache: that of the target's (1) where both models are the same
inline std::size_t check_rounds(specattn::context<device>& ctx, loaded_pair& models, const llama_size& target,
                                const llama_size& draft, std::int32_t kv_len, std::uint64_t draft_seed) {
  round_plan plan{
      .kv_len = kv_len, .cached = kv_len - 64, .batch = 2, .draft_length = 4, .record_every = 2, .rules = {}};
  const auto dense = texts_of(ctx, models, target, draft, plan, way::dense, draft_seed, 6);
  std::size_t written = 0;
  for (const auto& text : dense) written += text.size();
  if (texts_of(ctx, models, target, draft, plan, way::dense_draft, draft_seed, 6) != dense)
    throw std::runtime_error(std::string(target.name) +
                             ": keeping everything, rounds write other tokens than dense ones");
  return written;
}

}  // namespace bench
