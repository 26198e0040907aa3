// `mini_llm perplexity`: what each guide costs in perplexity and saves in reading, by the paper's protocol.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "command_input.hpp"
#include "model/engine.hpp"
#include "session.hpp"
#include "specattn/decode_options.hpp"

namespace mini_llm {

/// One row of the table: a guide at one setting.
struct guide_point {
  guide_kind kind = guide_kind::none;
  double setting = 0;  ///< p; the share of pages for quest; positions for window; none has no setting

  std::string label() const;
};

/// What one point measured over all texts of one context.
struct point_result {
  guide_point point;
  std::vector<double> text_nll;  ///< mean loss of each text's scored tokens, nats
  double nll = 0;                ///< mean loss of all scored tokens
  double standard_error = 0;     ///< of nll, tokens taken as independent
  double rise_error = 0;         ///< standard error of nll - dense nll, by pairs of tokens
  std::int64_t tokens = 0;       ///< scored
  specattn::decode_counts counts;
  double seconds = 0;
};

/// All points of one context; the first is dense.
struct context_result {
  std::int32_t context = 0;
  std::vector<std::string> texts;
  std::vector<point_result> points;

  const point_result& dense() const { return points.front(); }
};

double perplexity_of(const point_result& result);
/// Percent by which the perplexity of all tokens is over the dense one's.
double rise_percent(const point_result& result, const point_result& dense);
/// The mean of the texts' own rises, percent.
double mean_text_rise_percent(const point_result& result, const point_result& dense);
/// Percent of the KV rows that the verify passes did not read.
double reduction_percent(const point_result& result);

/// Rise at a reduction, on the line between the two nearest points of a guide; NaN outside the points' range.
double rise_at(const context_result& result, guide_kind kind, double reduction);

struct perplexity_options {
  session_options pair;  ///< decode options, alignment, sinks and recent positions included
  std::vector<std::filesystem::path> files;
  std::string contexts = "2048";
  std::string guides = "none,window,quest,paper,draft,oracle";
  std::string keep = "0.8,0.9,0.95,0.97,0.99";
  std::string pages = "0.0625,0.125,0.25,0.35";
  std::string windows = "128,256,512";
  double prefill = 0.1;  ///< share of a text that is read densely first
  std::string plot;      ///< file of the picture; empty: none
  std::string json;      ///< file of the results; empty: none
};

/// The points that the options ask for, dense first. \throws input_error
std::vector<guide_point> list_points(const perplexity_options& options);

/// Scores every text under one guide. Losses are appended to `losses`, text after text.
/// `progress(text)` is called before each.
point_result score_texts(session& with, const guide_point& point, const std::vector<token_text>& texts,
                         double prefill, std::vector<float>& losses,
                         const std::function<void(std::size_t)>& progress);

/// The whole command. \throws input_error, specattn::contract_error
void run_perplexity(const perplexity_options& options);

}  // namespace mini_llm
