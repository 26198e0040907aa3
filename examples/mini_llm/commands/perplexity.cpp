#include "perplexity.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <limits>
#include <memory>

#include "commands.hpp"
#include "input_error.hpp"
#include "option_values.hpp"
#include "perplexity_report.hpp"
#include "progress_line.hpp"
#include "session_flags.hpp"
#include "specattn/specattn.hpp"

namespace mini_llm {
namespace {

constexpr const char* keep_names = "-p,--p,--keep";
constexpr const char* pages_names = "--quest,--pages";

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

guide_choice choose(const session& with, const guide_point& point) {
  guide_choice choice = with.guide;
  choice.kind = point.kind;
  switch (point.kind) {
    case guide_kind::quest:
      choice.kept_share = static_cast<float>(point.setting);
      break;
    case guide_kind::window:
      choice.window = static_cast<std::int32_t>(point.setting);
      break;
    default:
      choice.rule.top_p = static_cast<float>(point.setting);
      break;
  }
  return choice;
}

/// Mean and standard error of values, tokens taken as independent.
std::pair<double, double> mean_and_error(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) sum += value;
  const auto count = static_cast<double>(values.size());
  const double mean = sum / count;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, values.size() > 1 ? std::sqrt(squares / (count - 1) / count) : 0.0};
}

/// A sparse point's loss against dense, token by token: the texts' own spread cancels.
double paired_error(const std::vector<float>& losses, const std::vector<float>& dense) {
  std::vector<double> differences(losses.size());
  for (std::size_t i = 0; i < losses.size(); ++i) differences[i] = static_cast<double>(losses[i] - dense[i]);
  return mean_and_error(differences).second;
}

/// \param texts of at least `context` tokens
context_result measure(session& with, const perplexity_options& options, const std::vector<guide_point>& points,
                       std::vector<token_text> texts, std::int32_t context) {
  context_result result;
  result.context = context;
  for (token_text& text : texts) {
    text.tokens.resize(static_cast<std::size_t>(context));
    result.texts.push_back(text.name);
  }
  with.decode.max_positions = context;
  std::vector<float> dense;
  progress_line progress(std::cerr);
  for (std::size_t i = 0; i < points.size(); ++i) {
    std::vector<float> losses;
    result.points.push_back(score_texts(with, points[i], texts, options.prefill, losses, [&](std::size_t text) {
      progress.show(print("%d tokens: %s, point %zu of %zu, text %zu of %zu", context, points[i].label().c_str(),
                          i + 1, points.size(), text + 1, texts.size()));
    }));
    if (i == 0) dense = losses;
    result.points.back().rise_error = paired_error(losses, dense);
  }
  return result;
}

/// A mean over losses that are no numbers is none either.
void require_finite(const token_text& text, const std::vector<float>& losses, std::int32_t first) {
  for (std::size_t i = 0; i < losses.size(); ++i) {
    if (std::isfinite(losses[i])) continue;
    throw input_error(print("perplexity: %s: the loss of token %zu is %f; --kv bf16 or f32 may help",
                            text.name.c_str(), static_cast<std::size_t>(first) + i, static_cast<double>(losses[i])));
  }
}

void require_alignment(session& with, const session_options& options, const std::vector<guide_point>& points) {
  for (const guide_point& point : points) {
    if (point.kind != guide_kind::draft && point.kind != guide_kind::paper) continue;
    auto found = find_alignment(options.alignment, with);
    if (!found) {
      throw input_error(
          "the guides draft and paper need an alignment of this pair; `mini_llm calibrate` makes one, "
          "--alignment names it");
    }
    with.guide.alignment = std::move(*found);
    return;
  }
}

}  // namespace

std::string guide_point::label() const {
  const std::string name(name_of(kind));
  switch (kind) {
    case guide_kind::none:
      return "dense";
    case guide_kind::window:
      return name + print(" %g", setting);
    case guide_kind::quest:
      return name + print(" %g of the pages", setting);
    default:
      return name + print(" p = %g", setting);
  }
}

double perplexity_of(const point_result& result) { return std::exp(result.nll); }

double rise_percent(const point_result& result, const point_result& dense) {
  return 100 * std::expm1(result.nll - dense.nll);
}

double mean_text_rise_percent(const point_result& result, const point_result& dense) {
  double sum = 0;
  for (std::size_t i = 0; i < result.text_nll.size(); ++i) sum += std::expm1(result.text_nll[i] - dense.text_nll[i]);
  return 100 * sum / static_cast<double>(result.text_nll.size());
}

double reduction_percent(const point_result& result) {
  return 100 *
         (1 - static_cast<double>(result.counts.kv_rows_read) / static_cast<double>(result.counts.kv_rows_dense));
}

double rise_at(const context_result& result, guide_kind kind, double reduction) {
  std::vector<std::pair<double, double>> line;  // (reduction, rise)
  for (const point_result& point : result.points) {
    if (point.point.kind == kind) line.emplace_back(reduction_percent(point), rise_percent(point, result.dense()));
  }
  std::sort(line.begin(), line.end());
  for (std::size_t i = 0; i + 1 < line.size(); ++i) {
    const auto [x0, y0] = line[i];
    const auto [x1, y1] = line[i + 1];
    if (reduction >= x0 && reduction <= x1 && x1 > x0) return y0 + (y1 - y0) * (reduction - x0) / (x1 - x0);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

std::vector<guide_point> list_points(const perplexity_options& options) {
  std::vector<guide_point> points{{guide_kind::none, 1.0}};
  std::string list = options.guides + ",";
  for (std::size_t from = 0, end = 0; (end = list.find(',', from)) != list.npos; from = end + 1) {
    const std::string name = list.substr(from, end - from);
    if (name.empty()) continue;
    const guide_kind kind = parse_guide_kind(name);
    std::vector<double> settings;
    switch (kind) {
      case guide_kind::none:
        continue;
      case guide_kind::quest:
        settings = parse_numbers(options.pages, pages_names, least_share, 1);
        break;
      case guide_kind::window:
        for (const std::int32_t window : parse_integers(options.windows, "--windows", 0, 1 << 30)) {
          settings.push_back(window);
        }
        break;
      default:
        settings = parse_numbers(options.keep, keep_names, 0, 1);
        break;
    }
    for (const double setting : settings) points.push_back({kind, setting});
  }
  return points;
}

specattn::decode_counts score_text(engine& decoder, const token_text& text, std::int32_t first,
                                   std::vector<float>& losses) {
  try {
    return decoder.score(text.tokens, first, losses);
  } catch (const specattn::contract_error& error) {  // of a model whose logits are no numbers, say
    throw input_error(text.name, std::string(error.what()) + "; --kv bf16 or f32 may help");
  }
}

point_result score_texts(session& with, const guide_point& point, const std::vector<token_text>& texts,
                         double prefill, std::vector<float>& losses,
                         const std::function<void(std::size_t)>& progress) {
  point_result result;
  result.point = point;
  const auto decoder = with.make(choose(with, point), with.decode);
  const double start = seconds_now();
  std::vector<double> all;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    progress(i);
    const auto length = static_cast<std::int32_t>(texts[i].tokens.size());
    const auto first = (std::max)(1, static_cast<std::int32_t>(prefill * length));
    std::vector<float> loss(static_cast<std::size_t>(length - first));
    result.counts += score_text(*decoder, texts[i], first, loss);
    require_finite(texts[i], loss, first);
    const std::vector<double> exact(loss.begin(), loss.end());
    result.text_nll.push_back(mean_and_error(exact).first);
    all.insert(all.end(), exact.begin(), exact.end());
    losses.insert(losses.end(), loss.begin(), loss.end());
  }
  std::tie(result.nll, result.standard_error) = mean_and_error(all);
  if (!std::isfinite(perplexity_of(result))) {
    throw input_error(
        print("perplexity: a mean loss of %g nats a token has no perplexity; are the weights whole?", result.nll));
  }
  result.tokens = static_cast<std::int64_t>(all.size());
  result.seconds = seconds_now() - start;
  return result;
}

void run_perplexity(const perplexity_options& options) {
  const std::vector<guide_point> points = list_points(options);
  if (options.files.empty()) throw input_error("perplexity: name at least one text with --file");
  if (!(options.prefill > 0 && options.prefill < 1)) throw input_error("--prefill is a share above 0 and below 1");
  for (const std::string* file : {&options.plot, &options.json}) {
    if (!file->empty()) require_writable(*file);
  }
  for (const std::filesystem::path& file : options.files) require_readable(file);
  session_options pair = options.pair;
  pair.guide = "none";
  session with = open_session(pair);
  if (!with.draft) throw input_error("perplexity needs a draft model: name it with --model-draft");
  with.guide.rule = pair.rule;
  require_alignment(with, pair, points);
  const auto limit = static_cast<std::int32_t>(with.target->config.max_context);
  const std::vector<std::int32_t> contexts = parse_integers(options.contexts, "--contexts", 16, limit);
  if (contexts.empty()) throw input_error("--contexts: name at least one");
  // Read once, for the longest: standard input cannot be read again, and a text that is too short is one from the start.
  const std::int32_t longest = *std::max_element(contexts.begin(), contexts.end());
  const std::vector<token_text> texts = read_texts(options.files, *with.target, longest, longest);
  with.require_room(with.guide, with.decode, longest);
  std::vector<context_result> results;
  for (const std::int32_t context : contexts) {
    results.push_back(measure(with, options, points, texts, context));
    print_table(std::cout, results.back());
    std::cout.flush();
  }
  if (!options.json.empty()) write_text(options.json, to_json(results).dump(1) + "\n");
  if (!options.plot.empty()) write_text(options.plot, draw_results(results));
}

void add_perplexity_command(CLI::App& app) {
  const auto options = std::make_shared<perplexity_options>();
  CLI::App& command = *app.add_subcommand("perplexity", "perplexity and KV reduction of every guide on texts");
  perplexity_options& o = *options;
  add_pair_flags(command, o.pair);
  command.add_option("-f,--file", o.files, "a text, - for stdin; repeatable");
  command.add_option("--contexts", o.contexts, "tokens of each text that are taken")->capture_default_str();
  command.add_option("--guides", o.guides, "none (dense, always measured), window, quest, paper, draft, oracle")
      ->capture_default_str();
  command.add_option(keep_names, o.keep, "shares of the importance that draft, paper and oracle keep")
      ->capture_default_str();
  command.add_option(pages_names, o.pages, "shares of the pages that quest keeps")->capture_default_str();
  command.add_option("--windows", o.windows, "newest positions that window keeps")->capture_default_str();
  add_number(command, "--prefill", o.prefill, least_share, 1 - least_share,
             "share of a text read densely before rounds begin");
  add_alignment_flag(command, o.pair);
  add_device_flag(command, o.pair);
  add_integer(command, "--draft,--draft-max,--draft-length", o.pair.decode.draft_length, 1,
              specattn::max_draft_length, "tokens drafted a round");
  add_recording_flags(command, o.pair);
  add_dense_flags(command, o.pair);
  command.add_option("--plot", o.plot, "write a picture of rise against reduction (SVG)");
  command.add_option("--json", o.json, "write the results as JSON");
  refuse_empty_values(command);
  command.callback([options] { run_perplexity(*options); });
}

}  // namespace mini_llm
