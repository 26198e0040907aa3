// `mini_llm bench`: prefill and decode rates by depth of context, as llama-bench shows them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "session.hpp"
#include "specattn/decode_options.hpp"

namespace mini_llm {

struct bench_options {
  session_options pair;
  std::string prompts = "512";   ///< lengths of the prefill tests
  std::string generate = "128";  ///< lengths of the decode tests
  std::string depths = "0,1024,2048,3840";
  std::string guides;               ///< speculative rows; empty: none
  std::string draft_lengths = "4";  ///< of the speculative rows
  std::int32_t repetitions = 5;
  std::int32_t warm_ups = 1;
  std::string format = "md";  ///< md, csv or json
};

/// One row: a test and its repetitions.
struct bench_result {
  std::string test;    ///< "pp512", "tg128 @ d2048"
  std::string system;  ///< "plain", "draft, γ = 4"
  std::int32_t tokens = 0;
  std::int32_t depth = 0;
  std::int32_t draft_length = 0;
  std::vector<double> rates{};       ///< tokens a second, one a repetition
  specattn::decode_counts counts{};  ///< of all timed repetitions together

  double mean() const;
  double deviation() const;          ///< sample standard deviation; 0 for one repetition
  double tokens_a_round() const;     ///< 0 where nothing was decoded
  double reduction_percent() const;  ///< KV rows that verify passes did not read
};

/// The same tokens every time: the embedded prompt repeated when it is there, else numbers from a fixed seed.
std::vector<std::int32_t> bench_tokens(const session& with, std::size_t count);

/// Tokens a second of reading `tokens` tokens into an empty cache.
bench_result measure_prefill(session& with, const bench_options& options, std::int32_t tokens);
/// Tokens a second of writing `tokens` greedy tokens behind `depth` cached ones. draft_length 0 decodes plainly.
bench_result measure_decode(session& with, const bench_options& options, const guide_choice& guide,
                            std::int32_t draft_length, std::int32_t tokens, std::int32_t depth);

/// The whole command. \throws input_error, specattn::contract_error
void run_bench(const bench_options& options);

}  // namespace mini_llm
