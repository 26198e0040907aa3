// What decode_bench measures: pairs of models, settings of a round, and what was found, kept as JSON lines.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

/// The shape of a published Llama model; weights are random.
struct llama_size {
  const char* name;
  std::int32_t layers, q_heads, kv_heads, head_dim, hidden, ffn, vocab;
  bool tied;  ///< the LM head is the embedding

  /// Bytes that a pass reads: all bf16 matrices, but of an embedding of its own only rows.
  double weight_bytes() const;
  double row_bytes() const { return 2.0 * 2.0 * head_dim; }  ///< one position's K and V of a layer and kv head
  double rows() const { return 1.0 * layers * kv_heads; }    ///< KV rows of a position
};

struct model_pair {
  const char* name;
  llama_size target, draft;
};

inline constexpr model_pair model_pairs[] = {
    {"Llama-2-7B",
     {"Llama-2-7B", 32, 32, 32, 128, 4096, 11008, 32000, false},
     {"TinyLlama-1.1B", 22, 32, 4, 64, 2048, 5632, 32000, false}},
    {"Llama-3.1-8B",
     {"Llama-3.1-8B", 32, 32, 8, 128, 4096, 14336, 128256, false},
     {"Llama-3.2-1B", 16, 32, 8, 64, 2048, 8192, 128256, true}},
};

/// The ways to decode that are compared.
enum class way {
  autoregressive,
  dense,         ///< speculation, everything dense
  sparse_draft,  ///< the same with a sparse draft: lossless
  specattn,      ///< sparse draft and sparse verify pass
  reuse,         ///< the same, recording and selecting in every fourth round
  dense_draft,   ///< dense draft and sparse verify pass
};
inline constexpr way all_ways[] = {way::autoregressive, way::dense, way::sparse_draft,
                                   way::specattn,       way::reuse, way::dense_draft};
const char* name_of(way w);
constexpr bool has_draft(way w) { return w != way::autoregressive; }
constexpr bool has_sparse_draft(way w) { return w == way::sparse_draft || w == way::specattn || w == way::reuse; }
constexpr bool has_guide(way w) { return w == way::specattn || w == way::reuse || w == way::dense_draft; }
constexpr std::int32_t record_every(way w) { return w == way::reuse ? 4 : 1; }

/// Rounds that one decoder can run: all but the draft length.
struct setup {
  std::int32_t pair = 0;  ///< of model_pairs
  std::int32_t kv_len = 0;
  std::int32_t batch = 1;
  way decoding = way::dense;
  double kept = 1;  ///< share of the prefix that sparse passes are to keep

  const model_pair& models() const { return model_pairs[pair]; }
  bool same_shape(const setup& other) const {
    return pair == other.pair && kv_len == other.kv_len && batch == other.batch;
  }
  bool operator==(const setup&) const = default;
};

/// One cell: the medians over its timed rounds; where rounds take turns, the mean over the turns' medians.
struct cell : setup {
  std::int32_t draft_length = 0;
  std::int32_t cached = 0;  ///< prefix positions of a sequence; a little below kv_len, where the last round ends
  double round_ms = 0;      ///< wall clock, host included
  double draft_ms = 0, guide_ms = 0, verify_ms = 0, accept_ms = 0;  ///< events on the device
  double target_rows = 0, draft_rows = 0;                           ///< KV rows that the round read
  double target_rows_dense = 0, draft_rows_dense = 0;               ///< and that dense passes would have read
  double draft_steps = 0;                                           ///< of each sequence
  double dense_share = 0;                                           ///< of the sequences, those whose round was dense
  double memory_gb = 0;                     ///< models of the pair, caches and everything else the decoder took
  double copy_gb_s = 0;                     ///< of the run that measured the cell
  double guide_top_p = 1, draft_top_p = 1;  ///< what made sparse passes keep their share

  const setup& key() const { return *this; }
  double rest_ms() const { return round_ms - draft_ms - guide_ms - verify_ms - accept_ms; }
  double guide_share() const { return guide_ms / round_ms; }
  bool fell_back() const { return has_guide(decoding) && dense_share > 0; }
};

/// Setups with their draft lengths, the most telling first.
struct series {
  setup what;
  std::vector<std::int32_t> draft_lengths;
};
std::vector<series> planned_series();

/// The six rows that have goals.
struct goal_row {
  std::int32_t pair, kv_len, batch;
  double goal;
};
inline constexpr goal_row goal_rows[] = {{0, 2048, 1, 1.00}, {0, 8192, 1, 1.08},  {0, 32768, 1, 1.40},
                                         {0, 8192, 8, 1.70}, {1, 32768, 8, 1.80}, {1, 131072, 1, 1.45}};

/// A file of cells, one JSON object a line, and before those of each run its device and command.
class cell_file {
 public:
  /// Reads what is there. \throws std::runtime_error naming a line that is none of these
  explicit cell_file(std::filesystem::path path);

  const std::vector<cell>& cells() const { return cells_; }
  const std::vector<std::string>& runs() const { return runs_; }  ///< device and command of each run
  bool has(const setup& what, std::int32_t draft_length) const { return find(what, draft_length) != nullptr; }
  const cell* find(const setup& what, std::int32_t draft_length) const;

  void add(const cell& found);
  void add_run(std::string_view device_and_command);

 private:
  void append(const std::string& line) const;

  std::filesystem::path path_;
  std::vector<cell> cells_;
  std::vector<std::string> runs_;
};

}  // namespace bench
