#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <string>

#include "commands.hpp"
#include "compare.hpp"
#include "input_error.hpp"
#include "model/loaded_model.hpp"
#include "option_values.hpp"
#include "report.hpp"
#include "session.hpp"
#include "session_flags.hpp"
#include "text/stream_decoder.hpp"

namespace mini_llm {
namespace {

struct generate_options {
  generate_options() {  // what wrote fastest on the embedded pair at three quarters fewer KV rows
    session.decode.draft_length = 2;
    session.rule.top_p = 0.92f;
  }

  session_options session;
  std::optional<std::string> prompt;
  std::string file;
  std::int32_t predict = 256;
  std::optional<std::uint64_t> seed = 1;  ///< nothing: a random one
  specattn::sampler_options sampler{.temperature = 0.8f, .top_p = 0.95f};
  bool ignore_eos = false;
  bool show_prompt = false;
  bool compare = false;
  bool json = false;
};

std::atomic<bool> interrupted{false};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string prompt_text(const generate_options& options) {
  if (!options.file.empty()) return read_text(options.file);
  if (options.prompt) return *options.prompt;
  return read_text(embedded_models() / "prompt.txt");
}

/// A line on stderr that overwrites itself, once a prefill has taken a second.
engine::on_progress show_progress() {
  const double start = now();
  return [start](std::int32_t done, std::int32_t total) {
    const double elapsed = now() - start;
    if (elapsed < 1.0 && done < total) return;
    if (elapsed < 1.0) return;
    std::cerr << "\rprefill: " << done << " of " << total << " tokens, " << static_cast<std::int64_t>(done / elapsed)
              << " tokens per second" << (done == total ? "\n" : "") << std::flush;
  };
}

void print_setting(const session& made, const generate_options& options, std::size_t prompt_tokens) {
  const specattn::decode_memory memory = made.engine_bytes();
  const auto megabytes = [](std::size_t bytes) { return std::to_string((bytes + 524288) / 1048576) + " MiB"; };
  std::cerr << "target " << made.target->directory.string();
  if (made.draft)
    std::cerr << "\ndraft " << made.draft->directory.string() << ", " << made.decode.draft_length
              << " tokens a round";
  std::cerr << "\nverification: ";
  if (made.guide.kind == guide_kind::none) {
    std::cerr << "dense (exact)";
  } else {
    std::cerr << "sparse, guided by " << name_of(made.guide.kind)
              << " (approximate: the text follows the target as evaluated over the kept positions)";
  }
  std::cerr << "\nprompt " << prompt_tokens << " tokens, seed " << options.sampler.seed << ", temperature "
            << options.sampler.temperature << ", "
            << (made.on_device ? made.on_device->device_name() : std::to_string(made.ctx->threads()) + " threads")
            << ", KV " << name_of(made.kv) << "\nmemory, at most: weights " << megabytes(made.weight_bytes())
            << ", caches " << megabytes(memory.target_cache + memory.draft_cache) << ", recordings "
            << megabytes(memory.recordings) << ", selections and logits "
            << megabytes(memory.selections + memory.logits) << "\n\n";
}

run_result write_text_after(const session& made, const generate_options& options, engine& decoder,
                            const specattn::decode_request& request, std::string* collected) {
  run_result result;
  result.prompt_tokens = static_cast<std::int32_t>(request.prompt.size());
  result.draft_length = made.decode.draft_length;
  const double start = now();
  const std::int32_t row = decoder.add(request, show_progress());
  const double prefilled = now();
  result.prefill_seconds = prefilled - start;
  stream_decoder stream(made.target->words, true);
  const auto put = [&](const std::string& piece) {
    if (options.json) {
      *collected += piece;
    } else {
      std::cout << piece << std::flush;
    }
  };
  if (options.show_prompt) put(made.target->words.decode(request.prompt));
  bool running = request.max_new_tokens > 0;
  while (running) {
    running = decoder.step([&](std::int32_t, std::span<const std::int32_t> tokens) {
      put(stream.push(tokens));
      return !interrupted.load() && (options.json || std::cout.good());
    });
    result.trace += decoder.last_round();
  }
  put(stream.flush());
  if (!options.json) std::cout << std::endl;
  result.decode_seconds = now() - prefilled;
  result.counts = decoder.counts(row);
  result.finish = decoder.finish(row);
  return result;
}

void generate(generate_options options) {
  options.sampler.seed = options.seed ? *options.seed : std::random_device{}();
  const std::string given = prompt_text(options);
  session made = open_session(options.session);
  if (options.compare && made.draft) check_refresh(made.decode.refresh_every, comparison::longest_draft);
  const std::vector<std::int32_t> prompt = made.target->encode(given);
  if (prompt.empty()) throw input_error("the prompt is empty; give at least one token");
  const std::int64_t limit =
      made.decode.max_positions > 0 ? made.decode.max_positions : made.target->config.max_context;
  if (static_cast<std::int64_t>(prompt.size()) > limit) {
    throw input_error("the prompt has " + std::to_string(prompt.size()) + " tokens, the context holds " +
                      std::to_string(limit));
  }
  // Without -c the context is what this run can fill, not all that the model could.
  const std::int64_t positions = (std::min)(limit, static_cast<std::int64_t>(prompt.size()) + options.predict);
  if (made.decode.max_positions == 0) made.decode.max_positions = static_cast<std::int32_t>(positions);
  made.require_room(made.guide, made.decode, positions);
  std::unique_ptr<engine> decoder = made.make(made.guide, made.decode);
  print_setting(made, options, prompt.size());
  std::signal(SIGINT, [](int) { interrupted.store(true); });
  std::vector<std::int32_t> stops;
  if (!options.ignore_eos) stops = made.target->config.eos_ids;
  const specattn::decode_request request{.prompt = prompt,
                                         .max_new_tokens = options.predict,
                                         .draft_length = -1,
                                         .stop_tokens = stops,
                                         .sampler = options.sampler};
  std::string text;
  const run_result result = write_text_after(made, options, *decoder, request, &text);
  std::cerr << '\n';
  print_report(std::cerr, result);
  nlohmann::json report = to_json(result);
  report["text"] = text;
  report["seed"] = options.sampler.seed;
  report["guide"] = name_of(made.guide.kind);
  decoder.reset();
  if (options.compare && !interrupted.load()) {
    const comparison table = compare_systems(made, request);
    print_comparison(std::cerr, table);
    report["compare"] = to_json(table);
  }
  std::cerr << "peak memory       = " << peak_resident_bytes() / 1048576 << " MiB\n";
  report["peak_resident_bytes"] = peak_resident_bytes();
  if (options.json) std::cout << report.dump(2) << '\n';
  if (!std::cout) throw input_error("standard output could not be written; the text is incomplete");
}

}  // namespace

void add_generate_command(CLI::App& app) {
  auto options = std::make_shared<generate_options>();
  CLI::App* command = app.add_subcommand("generate", "write text after a prompt (the main job)");
  add_session_flags(*command, options->session);
  auto* prompt = command->add_option("-p,--prompt", options->prompt, "prompt; default: the embedded one");
  command->add_option("-f,--file", options->file, "read the prompt from a file, '-' for stdin")->excludes(prompt);
  add_integer(*command, "-n,--n-predict,--max-tokens", options->predict, 0, 1 << 24, "tokens to write");
  add_seed(*command, "-s,--seed", options->seed, "seed, 64 bits; below 0: random (it is printed)");
  add_number(*command, "--temp,--temperature", options->sampler.temperature, 0, 1000, "0: greedy");
  add_integer(*command, "--top-k", options->sampler.top_k, -1, any_count, "0 or -1: off");
  add_number(*command, "--top-p", options->sampler.top_p, 0, 1, "1: off");
  add_number(*command, "--min-p", options->sampler.min_p, 0, 1, "0: off");
  command->add_flag("--ignore-eos", options->ignore_eos, "go on after the end-of-text token");
  command->add_flag("--display-prompt", options->show_prompt, "write the prompt before the text");
  add_device_flag(*command, options->session);
  command->add_flag("--compare", options->compare,
                    "then time autoregressive and dense speculative decoding from the same prompt");
  command->add_flag("--json", options->json, "one JSON object on stdout, the text in it");
  refuse_empty_values(*command, prompt);  // an empty prompt is one: the begin token alone
  command->callback([options] { generate(*options); });
}

}  // namespace mini_llm
