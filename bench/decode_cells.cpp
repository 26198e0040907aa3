#include "decode_cells.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

namespace bench {
namespace {

using json = nlohmann::json;

/// Every number of a cell but those of its setup, with its name.
template <class Cell, class Visit>
void for_each_number(Cell& c, Visit visit) {
  visit("draft_length", c.draft_length);
  visit("cached", c.cached);
  visit("round_ms", c.round_ms);
  visit("draft_ms", c.draft_ms);
  visit("guide_ms", c.guide_ms);
  visit("verify_ms", c.verify_ms);
  visit("accept_ms", c.accept_ms);
  visit("target_rows", c.target_rows);
  visit("draft_rows", c.draft_rows);
  visit("target_rows_dense", c.target_rows_dense);
  visit("draft_rows_dense", c.draft_rows_dense);
  visit("draft_steps", c.draft_steps);
  visit("dense_share", c.dense_share);
  visit("memory_gb", c.memory_gb);
  visit("copy_gb_s", c.copy_gb_s);
  visit("guide_top_p", c.guide_top_p);
  visit("draft_top_p", c.draft_top_p);
}

json to_json(const cell& c) {
  json line = {{"pair", c.models().name},
               {"kv_len", c.kv_len},
               {"batch", c.batch},
               {"way", name_of(c.decoding)},
               {"kept", c.kept}};
  for_each_number(c, [&](const char* name, auto value) { line[name] = value; });
  return line;
}

cell to_cell(const json& line) {
  const auto pair = line.at("pair").get<std::string>();
  const auto decoding = line.at("way").get<std::string>();
  const auto* named = std::find_if(std::begin(model_pairs), std::end(model_pairs),
                                   [&](const model_pair& one) { return one.name == pair; });
  const auto* known =
      std::find_if(std::begin(all_ways), std::end(all_ways), [&](way one) { return name_of(one) == decoding; });
  if (named == std::end(model_pairs) || known == std::end(all_ways))
    throw std::runtime_error("of pair " + pair + " decoded by " + decoding);
  cell c;
  c.pair = static_cast<std::int32_t>(named - model_pairs);
  c.decoding = *known;
  c.kv_len = line.at("kv_len");
  c.batch = line.at("batch");
  c.kept = line.at("kept");
  for_each_number(c, [&](const char* name, auto& value) { line.at(name).get_to(value); });
  return c;
}

}  // namespace

double llama_size::weight_bytes() const {
  const double attention = 1.0 * hidden * (2 * q_heads + 2 * kv_heads) * head_dim;
  const double layer = attention + 3.0 * hidden * ffn;
  return 2.0 * (layers * layer + 1.0 * vocab * hidden);
}

const char* name_of(way w) {
  switch (w) {
    case way::autoregressive:
      return "autoregressive";
    case way::dense:
      return "dense speculation";
    case way::sparse_draft:
      return "sparse draft, dense verify";
    case way::specattn:
      return "SpecAttn";
    case way::reuse:
      return "SpecAttn, every 4th round";
    case way::dense_draft:
      return "SpecAttn, dense draft";
  }
  return "";
}

std::vector<series> planned_series() {
  std::vector<series> plan;
  const auto add = [&](std::int32_t pair, std::int32_t kv_len, std::int32_t batch, way decoding, double kept,
                       const std::vector<std::int32_t>& draft_lengths) {
    const bool sparse = has_guide(decoding) || has_sparse_draft(decoding);
    const setup what{pair, kv_len, batch, decoding, sparse ? kept : 1.0};
    const auto known = [&](const series& one) { return one.what == what; };
    if (std::none_of(plan.begin(), plan.end(), known))
      plan.push_back({what, has_draft(decoding) ? draft_lengths : std::vector<std::int32_t>{0}});
  };
  constexpr way in_order[] = {way::dense,        way::specattn,    way::reuse,
                              way::sparse_draft, way::dense_draft, way::autoregressive};
  for (const goal_row& row : goal_rows) {
    for (const way w : in_order) add(row.pair, row.kv_len, row.batch, w, 0.22, {4, 2, 3, 5, 6, 7, 8});
  }
  for (const goal_row& row : goal_rows) {
    for (const double kept : {0.10, 0.50}) add(row.pair, row.kv_len, row.batch, way::specattn, kept, {4, 2, 3, 6, 8});
  }
  // The rest, long and wide first; a cache of 64 GiB (batch * kv_len) at most.
  constexpr std::int32_t kv_lens[] = {32768, 8192, 131072, 2048};
  constexpr std::int32_t batches[] = {16, 4, 1, 8};
  for (const double kept : {0.22, 0.10}) {
    for (const std::int32_t kv_len : kv_lens) {
      for (const std::int32_t batch : batches) {
        for (const std::int32_t pair : {1, 0}) {
          const std::int64_t positions = std::int64_t{kv_len} * batch;
          if (positions > (pair == 0 ? 131072 : 524288)) continue;
          for (const way w : in_order) {
            if (kept > 0.2 || w == way::specattn) add(pair, kv_len, batch, w, kept, {4, 2, 3, 6, 8});
          }
        }
      }
    }
  }
  return plan;
}

cell_file::cell_file(std::filesystem::path path) : path_(std::move(path)) {
  std::ifstream file(path_);
  std::size_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    try {
      const json parsed = json::parse(line);
      if (parsed.contains("run")) {
        runs_.push_back(parsed.at("run"));
      } else {
        cells_.push_back(to_cell(parsed));
      }
    } catch (const std::exception& error) {
      throw std::runtime_error(path_.string() + ", line " + std::to_string(number) + ": no cell: " + error.what());
    }
  }
}

const cell* cell_file::find(const setup& what, std::int32_t draft_length) const {
  const auto found = std::find_if(cells_.begin(), cells_.end(),
                                  [&](const cell& c) { return c.key() == what && c.draft_length == draft_length; });
  return found == cells_.end() ? nullptr : &*found;
}

void cell_file::add(const cell& found) {
  append(to_json(found).dump());
  cells_.push_back(found);
}

void cell_file::add_run(std::string_view device_and_command) {
  append(json{{"run", device_and_command}}.dump());
  runs_.emplace_back(device_and_command);
}

void cell_file::append(const std::string& line) const {
  if (path_.empty()) return;
  std::ofstream file(path_, std::ios::app);
  file << line << '\n';
  if (!file.flush()) throw std::runtime_error(path_.string() + ": cannot be written");
}

}  // namespace bench
