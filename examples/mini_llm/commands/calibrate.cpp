#include "calibrate.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <random>

#include "calibrate_report.hpp"
#include "commands.hpp"
#include "input_error.hpp"
#include "option_values.hpp"
#include "progress_line.hpp"
#include "specattn/alignment_json.hpp"
#include "specattn/specattn.hpp"

namespace mini_llm {
namespace {

/// Mean attention of short blocks says little; a text needs this many tokens behind its prefill.
constexpr std::int32_t least_behind_prefill = 64;

constexpr const char* divergence_suffix = "-divergence.svg";
constexpr const char* mixtures_suffix = "-mixtures.svg";

template <specattn::storage T>
specattn::calibration calibrate_as(session& with, const std::vector<token_text>& texts,
                                   const specattn::calibration_options& options) {
  std::size_t longest = 0;
  for (const token_text& text : texts) longest = (std::max)(longest, text.tokens.size());
  specattn::calibrator<T, llama, llama> reading(*with.ctx, *with.target->model, *with.draft->model, options,
                                                static_cast<std::int32_t>(longest));
  progress_line progress(std::cerr);
  for (const token_text& text : texts) {
    reading.add(text.tokens, [&](std::int32_t done, std::int32_t total) {
      progress.show(text.name + print(": %d of %d tokens", done, total));
    });
  }
  progress.show("fitting");
  specattn::calibration made = reading.fit();
  made.fitted.target = with.target->model->fingerprint();
  made.fitted.draft = with.draft->model->fingerprint();
  return made;
}

}  // namespace

token_text sample_text(session& with, std::int32_t tokens, std::uint64_t seed) {
  const auto begin = with.target->words.bos_id();
  const std::int32_t first = begin ? *begin : with.target->config.bos_id.value_or(0);
  specattn::decode_options options;
  options.draft_length = 0;
  options.max_positions = tokens;
  with.require_room(with.guide, options, tokens);
  const auto plain = make_engine(*with.ctx, *with.target->model, nullptr, with.kv, with.guide, options);
  specattn::decode_request request;
  request.prompt = {&first, 1};
  request.max_new_tokens = tokens - 1;
  request.sampler.temperature = 0.8f;
  request.sampler.top_p = 0.95f;
  request.sampler.seed = seed;
  const std::int32_t row = plain->add(request, [](std::int32_t, std::int32_t) {});
  progress_line progress(std::cerr);
  std::size_t done = 1;
  while (plain->step([&](std::int32_t, std::span<const std::int32_t> made) {
    done += made.size();
    progress.show(print("sampling %zu of %d tokens", done, tokens));
    return true;
  })) {
  }
  const auto text = plain->text(row);
  return {"sampled", {text.begin(), text.end()}};
}

specattn::calibration calibrate_pair(session& with, const std::vector<token_text>& texts,
                                     const specattn::calibration_options& options) {
  if (!with.draft) throw input_error("calibrate needs a draft model (--model-draft)");
  set_key_value_range(*with.target->model, with.kv);
  set_key_value_range(*with.draft->model, with.kv);
  switch (with.kv) {
    case kv_type::f16:
      return calibrate_as<specattn::fp16>(with, texts, options);
    case kv_type::bf16:
      return calibrate_as<specattn::bf16>(with, texts, options);
    case kv_type::f32:
      break;
  }
  return calibrate_as<float>(with, texts, options);
}

void run_calibrate(const calibrate_options& options) {
  require_writable(options.out);
  if (!options.plot.empty()) {
    require_writable(options.plot + divergence_suffix);
    require_writable(options.plot + mixtures_suffix);
  }
  for (const std::filesystem::path& file : options.files) require_readable(file);
  specattn::calibration_options fit = options.fit;
  if (options.windows != "none") fit.windows = parse_integers(options.windows, "--windows", 1, 1 << 20);
  session_options pair = options.pair;
  pair.guide = "none";
  session with = open_session(pair);
  if (!with.draft) throw input_error("calibrate needs a draft model: name it with --model-draft");
  const std::int32_t limit = (std::min)(
      {options.tokens, with.target->model->shape().max_positions, with.draft->model->shape().max_positions});
  const std::int64_t least = std::int64_t{fit.prefill} + least_behind_prefill;
  if (limit < least) {
    throw input_error("calibrate: " + std::to_string(limit) + " tokens (--tokens, cut to the context) are too few; " +
                      "with --prefill " + std::to_string(fit.prefill) + " at least " + std::to_string(least) +
                      " are needed");
  }
  std::vector<token_text> texts;
  if (options.files.empty()) {
    const std::uint64_t seed = options.seed ? *options.seed : std::random_device{}();
    std::cerr << "sampling with seed " << seed << '\n';
    texts.push_back(sample_text(with, limit, seed));
  } else {
    texts = read_texts(options.files, *with.target, limit, static_cast<std::int32_t>(least));
  }
  const specattn::calibration made = calibrate_pair(with, texts, fit);
  for (const float divergence : made.fitted.divergence) {
    if (!std::isfinite(divergence)) {
      throw input_error("calibrate: the models' attention to these texts is not finite; nothing is written");
    }
  }
  if (options.json) {
    std::cout << to_json(made).dump(2) << std::endl;
  } else {
    print_calibration(std::cout, made);
    std::cout.flush();
  }
  specattn::save_alignment(made.fitted, options.out.string());
  std::cerr << "alignment written to " << options.out.string() << '\n';
  if (options.plot.empty()) return;
  write_text(options.plot + divergence_suffix, draw_divergence(made));
  write_text(options.plot + mixtures_suffix, draw_mixtures(made));
}

void add_calibrate_command(CLI::App& app) {
  const auto options = std::make_shared<calibrate_options>();
  CLI::App& command = *app.add_subcommand("calibrate", "fit a pair's alignment: what guides which target head");
  calibrate_options& o = *options;
  add_pair_flags(command, o.pair);
  command.add_option("-f,--file", o.files,
                     "a text to read, - for stdin; repeatable; without one the target samples its own");
  add_integer(command, "--tokens", o.tokens, 1, any_count, "tokens of each text, cut to the context");
  add_seed(command, "-s,--seed", o.seed, "of a sampled text, 64 bits; below 0: random (it is printed)");
  add_integer(command, "--draft,--draft-max,--draft-length", o.fit.draft_length, 1, specattn::max_draft_length,
              "tokens drafted a round");
  add_integer(command, "--record-steps", o.fit.record_steps, 0, any_count, "draft steps that guide a round; 0: all");
  add_integer(command, "--prefill", o.fit.prefill, 1, any_count, "leading tokens of a text that are not compared");
  add_integer(command, "--every", o.fit.every, 1, any_count, "compare every n-th block");
  command.add_option("--windows", o.windows, "recency signals: lengths, separated by commas, or none")
      ->capture_default_str();
  add_integer(command, "--sinks", o.fit.sinks, 0, any_count,
              "first positions that the sink signal covers; 0: no such signal");
  command.add_flag("--history,!--no-history", o.fit.history,
                   "the target's own attention a round ago is a signal too");
  command.add_option("-o,--out", o.out, "the alignment")->capture_default_str();
  command.add_option("--plot", o.plot, "write <prefix>-divergence.svg and <prefix>-mixtures.svg");
  command.add_flag("--json", o.json, "print JSON in place of the tables");
  refuse_empty_values(command);
  command.callback([options] { run_calibrate(*options); });
}

}  // namespace mini_llm
