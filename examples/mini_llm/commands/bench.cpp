#include "bench.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>

#include "command_input.hpp"
#include "commands.hpp"
#include "input_error.hpp"
#include "option_values.hpp"
#include "progress_line.hpp"
#include "session_flags.hpp"
#include "specattn/specattn.hpp"

namespace mini_llm {
namespace {

constexpr const char* prompt_names = "-p,--n-prompt";
constexpr const char* length_names = "-n,--n-gen";
constexpr const char* depth_names = "-d,--n-depth";
constexpr const char* draft_names = "--draft,--draft-max,--draft-length";

class stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

const auto no_progress = [](std::int32_t, std::int32_t) {};

nlohmann::ordered_json to_json(const session& with, const bench_result& row) {
  nlohmann::ordered_json json{{"model", with.target->directory.filename().string()},
                              {"weight_bytes", with.target->model->weight_bytes()},
                              {"cache_type", name_of(with.kv)},
                              {"threads", with.ctx->threads()},
                              {"system", row.system},
                              {"test", row.test},
                              {"tokens", row.tokens},
                              {"depth", row.depth},
                              {"avg_ts", row.mean()},
                              {"stddev_ts", row.deviation()},
                              {"samples_ts", row.rates}};
  if (row.counts.rounds == 0) return json;
  json["tokens_a_round"] = row.tokens_a_round();
  json["kv_rows_read"] = row.counts.kv_rows_read;
  json["kv_rows_dense"] = row.counts.kv_rows_dense;
  if (row.draft_length > 0) {
    json["draft_model"] = with.draft->directory.filename().string();
    json["draft_length"] = row.draft_length;
    json["draft_n"] = row.counts.proposed;
    json["draft_n_accepted"] = row.counts.accepted;
  }
  return json;
}

class row_printer {
 public:
  row_printer(const session& with, std::string format) : with_(&with), format_(std::move(format)) {
    if (format_ == "md") {
      std::cout
          << "| model | weights MiB | kv | threads | system | test | t/s | tokens a round | KV rows not read % |\n"
             "|---|---:|---|---:|---|---|---:|---:|---:|\n";
    } else if (format_ == "csv") {
      std::cout << "model,weight_bytes,cache_type,threads,system,test,tokens,depth,avg_ts,stddev_ts,tokens_a_round,"
                   "reduction_percent\n";
    }
  }

  void print_row(const bench_result& row) {
    const std::string model = with_->target->directory.filename().string();
    const std::string kv(name_of(with_->kv));
    const std::size_t bytes = with_->target->model->weight_bytes();
    if (format_ == "md") {
      const bool decoded = row.counts.rounds > 0;
      std::cout << print("| %s | %.1f | %s | %d | %s | %s | %.2f ± %.2f |", model.c_str(),
                         static_cast<double>(bytes) / (1 << 20), kv.c_str(), with_->ctx->threads(),
                         row.system.c_str(), row.test.c_str(), row.mean(), row.deviation())
                << (decoded ? print(" %.2f | %.1f |\n", row.tokens_a_round(), row.reduction_percent())
                            : " – | – |\n");
    } else if (format_ == "csv") {
      std::cout << print("%s,%zu,%s,%d,\"%s\",%s,%d,%d,%.4f,%.4f,%.4f,%.2f\n", model.c_str(), bytes, kv.c_str(),
                         with_->ctx->threads(), row.system.c_str(), row.test.c_str(), row.tokens, row.depth,
                         row.mean(), row.deviation(), row.tokens_a_round(), row.reduction_percent());
    } else {
      rows_.push_back(to_json(*with_, row));
    }
    std::cout.flush();
  }

  void finish() {
    if (format_ == "json") std::cout << rows_.dump(2) << '\n';
  }

 private:
  const session* with_;
  std::string format_;
  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
};

struct tested_system {
  guide_choice guide;
  std::int32_t draft_length;
};

std::vector<tested_system> list_systems(session& with, const bench_options& options) {
  std::vector<tested_system> systems{{with.guide, 0}};
  const std::string list = options.guides + ",";
  for (std::size_t from = 0, end = 0; (end = list.find(',', from)) != list.npos; from = end + 1) {
    if (end == from) continue;
    guide_choice guide = with.guide;
    guide.kind = parse_guide_kind(list.substr(from, end - from));
    if (!with.draft) throw input_error("bench: --guide needs a draft model (--model-draft)");
    if (guide.kind == guide_kind::draft || guide.kind == guide_kind::paper) {
      const auto found = find_alignment(options.pair.alignment, with);
      if (!found) throw input_error("bench: no alignment of this pair; --alignment names one");
      guide.alignment = *found;
    }
    for (const std::int32_t length :
         parse_integers(options.draft_lengths, draft_names, 1, specattn::max_draft_length)) {
      systems.push_back({guide, length});
    }
  }
  return systems;
}

}  // namespace

double bench_result::mean() const {
  return rates.empty() ? 0.0 : std::accumulate(rates.begin(), rates.end(), 0.0) / static_cast<double>(rates.size());
}

double bench_result::deviation() const {
  if (rates.size() < 2) return 0.0;
  double squares = 0;
  for (const double rate : rates) squares += (rate - mean()) * (rate - mean());
  return std::sqrt(squares / static_cast<double>(rates.size() - 1));
}

double bench_result::tokens_a_round() const {
  return counts.rounds == 0 ? 0.0 : static_cast<double>(counts.emitted) / static_cast<double>(counts.rounds);
}

double bench_result::reduction_percent() const {
  if (counts.kv_rows_dense == 0) return 0.0;
  return 100 * (1 - static_cast<double>(counts.kv_rows_read) / static_cast<double>(counts.kv_rows_dense));
}

std::vector<std::int32_t> bench_tokens(const session& with, std::size_t count) {
  std::vector<std::int32_t> tokens;
  const std::filesystem::path prompt = embedded_models() / "prompt.txt";
  std::error_code ignored;
  if (std::filesystem::exists(prompt, ignored)) tokens = with.target->encode(read_text(prompt));
  const std::size_t period = tokens.size();
  const auto vocab = (std::min)(static_cast<std::uint64_t>(with.target->words.vocab_size()),
                                static_cast<std::uint64_t>(with.target->config.vocab));
  std::uint64_t state = 1;
  while (tokens.size() < count) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    tokens.push_back(period > 0 ? tokens[tokens.size() - period] : static_cast<std::int32_t>((state >> 33) % vocab));
  }
  tokens.resize(count);
  return tokens;
}

bench_result measure_prefill(session& with, const bench_options& options, std::int32_t tokens) {
  bench_result row{.test = print("pp%d", tokens), .system = "plain", .tokens = tokens};
  specattn::decode_options decode = options.pair.decode;
  decode.draft_length = 0;
  decode.max_positions = tokens + 1;
  with.require_room(with.guide, decode, decode.max_positions);
  const auto plain = make_engine(*with.ctx, *with.target->model, nullptr, with.kv, with.guide, decode);
  // The last token of a prompt belongs to the first round, so one more is given than is read.
  const std::vector<std::int32_t> prompt = bench_tokens(with, static_cast<std::size_t>(tokens) + 1);
  for (std::int32_t i = -options.warm_ups; i < options.repetitions; ++i) {
    const stopwatch watch;
    const std::int32_t at = plain->add({.prompt = prompt}, no_progress);
    if (i >= 0) row.rates.push_back(tokens / watch.seconds());
    plain->remove(at);
  }
  return row;
}

bench_result measure_decode(session& with, const bench_options& options, const guide_choice& guide,
                            std::int32_t draft_length, std::int32_t tokens, std::int32_t depth) {
  bench_result row{.test = print("tg%d @ d%d", tokens, depth),
                   .system = "plain",
                   .tokens = tokens,
                   .depth = depth,
                   .draft_length = draft_length};
  if (depth == 0) row.test = print("tg%d", tokens);
  specattn::decode_options decode = options.pair.decode;
  decode.draft_length = draft_length;
  decode.max_positions = depth + tokens + 1;
  with.require_room(guide, decode, decode.max_positions);
  if (draft_length > 0) {
    row.system = print("%s γ %d", guide.kind == guide_kind::none ? "dense" : std::string(name_of(guide.kind)).c_str(),
                       draft_length);
  }
  const auto decoder = make_engine(*with.ctx, *with.target->model, draft_length > 0 ? with.draft_model() : nullptr,
                                   with.kv, guide, decode);
  const std::vector<std::int32_t> prompt = bench_tokens(with, static_cast<std::size_t>(depth) + 1);
  const specattn::decode_request request{.prompt = prompt, .max_new_tokens = tokens};
  const std::int32_t at = decoder->add(request, no_progress);
  for (std::int32_t i = -options.warm_ups; i < options.repetitions; ++i) {
    decoder->rewind(at, request);
    const stopwatch watch;
    while (decoder->step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    if (i < 0) continue;
    row.rates.push_back(tokens / watch.seconds());
    row.counts += decoder->counts(at);
  }
  return row;
}

void run_bench(const bench_options& options) {
  if (options.format != "md" && options.format != "csv" && options.format != "json") {
    throw input_error("bench: --output '" + options.format + "' is none of md, csv, json");
  }
  session_options pair = options.pair;
  pair.guide = "none";
  session with = open_session(pair);
  with.guide.rule = pair.rule;
  const std::int32_t limit = with.target->model->shape().max_positions - 1;
  const auto prompts = parse_integers(options.prompts, prompt_names, 0, limit);
  const auto lengths = parse_integers(options.generate, length_names, 0, limit);
  const auto depths = parse_integers(options.depths, depth_names, 0, limit);
  const std::vector<tested_system> systems = list_systems(with, options);
  std::cerr << "tokens a second, mean ± standard deviation of " << options.repetitions
            << " repetitions; greedy; sampling is timed, tokenisation is not\n";
  row_printer rows(with, options.format);
  for (const std::int32_t tokens : prompts) {
    if (tokens > 0) rows.print_row(measure_prefill(with, options, tokens));
  }
  for (const std::int32_t tokens : lengths) {
    for (const std::int32_t depth : depths) {
      if (tokens == 0) continue;
      if (depth + tokens > limit) {
        throw input_error(
            print("bench: %d tokens at a depth of %d pass the context of %d", tokens, depth, limit + 1));
      }
      for (const tested_system& system : systems) {
        rows.print_row(measure_decode(with, options, system.guide, system.draft_length, tokens, depth));
      }
    }
  }
  rows.finish();
}

void add_bench_command(CLI::App& app) {
  const auto options = std::make_shared<bench_options>();
  CLI::App& command = *app.add_subcommand("bench", "prefill and decode rates by depth of context");
  bench_options& o = *options;
  add_pair_flags(command, o.pair);
  command.add_option(prompt_names, o.prompts, "lengths of the prefill tests")->capture_default_str();
  command.add_option(length_names, o.generate, "lengths of the decode tests")->capture_default_str();
  command.add_option(depth_names, o.depths, "tokens cached before a decode test")->capture_default_str();
  add_integer(command, "-r,--repetitions", o.repetitions, 1, 1000, "timed repetitions");
  add_integer(command, "-w,--warm-ups", o.warm_ups, 0, 1000, "untimed repetitions before");
  command.add_option("--guide,--guides", o.guides,
                     "speculative rows beside the plain ones: none (dense), draft, paper, window, quest, oracle");
  command.add_option(draft_names, o.draft_lengths, "tokens drafted a round")->capture_default_str();
  add_alignment_flag(command, o.pair);
  add_keep_flag(command, o.pair);
  add_recording_flags(command, o.pair);
  command.add_option("-o,--output", o.format, "md, csv or json")->capture_default_str();
  refuse_empty_values(command);
  command.callback([options] { run_bench(*options); });
}

}  // namespace mini_llm
