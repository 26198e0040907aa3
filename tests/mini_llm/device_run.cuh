// A model on the device with a cache and the arrays of one pass, so that a test can say what the pass holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/device_llama.cuh"
#include "cuda_fixture.cuh"
#include "golden.hpp"
#include "specattn/attention_pass.hpp"
#include "specattn/cuda/attend.cuh"
#include "specattn/cuda/kv_cache.cuh"

inline mini_llm::device_llama load_device_model(const std::string& name, std::int32_t max_slots = 256) {
  const std::filesystem::path directory = source_path("examples/models/" + name);
  return {mini_llm::load_model_config(directory), mini_llm::model_files::open(directory), max_slots};
}

/// Some tokens of a sequence that follow what its cache row holds.
struct device_piece {
  std::int32_t row = 0;
  std::vector<std::int32_t> tokens;
};

class device_run : public cuda_fixture {
 public:
  using device = specattn::cuda;

  device_run(mini_llm::device_llama& model, std::int32_t sequences, std::int32_t positions,
             std::int32_t page_size = 0)
      : model_(model),
        shape_(model.shape()),
        cache_({sequences, shape_.layers, shape_.kv_heads, shape_.head_dim, positions, page_size, 0}),
        tokens_(room()),
        positions_(room()),
        wanted_(room()),
        offsets_(static_cast<std::size_t>(sequences) + 1),
        lengths_(static_cast<std::size_t>(sequences)),
        rows_(static_cast<std::size_t>(sequences)),
        logits_(room() * static_cast<std::size_t>(shape_.vocab)) {
    context().reserve_workspace(specattn::attend_workspace_bytes(
        context(), {sequences, shape_.max_slots, shape_.q_heads, shape_.kv_heads, shape_.head_dim, positions}));
  }

  specattn::kv_cache<specattn::fp16, device>& cache() { return cache_; }

  /// Says what the next pass holds: the pieces' slots one after another, then `padding` slots.
  void set(const std::vector<device_piece>& pieces, const std::vector<std::int32_t>& wanted,
           std::ptrdiff_t padding = 0) {
    std::vector<std::int32_t> tokens, positions, offsets = {0}, lengths, rows;
    for (const device_piece& piece : pieces) {
      const auto count = static_cast<std::int32_t>(piece.tokens.size());
      cache_.reserve(piece.row, count);
      lengths.push_back(cache_.length(piece.row));
      rows.push_back(piece.row);
      for (std::int32_t i = 0; i < count; ++i) {
        tokens.push_back(piece.tokens[static_cast<std::size_t>(i)]);
        positions.push_back(lengths.back() + i);
      }
      offsets.push_back(static_cast<std::int32_t>(tokens.size()));
    }
    tokens.resize(tokens.size() + static_cast<std::size_t>(padding));
    positions.resize(tokens.size());
    slots_ = static_cast<std::ptrdiff_t>(tokens.size());
    wants_ = static_cast<std::ptrdiff_t>(wanted.size());
    sequences_ = static_cast<std::ptrdiff_t>(pieces.size());
    specattn::detail::check_cuda(cudaStreamSynchronize(stream()), "test");
    put(tokens_, tokens);
    put(positions_, positions);
    put(wanted_, wanted);
    put(offsets_, offsets);
    put(lengths_, lengths);
    put(rows_, rows);
    cache_.publish(context());
  }
  void advance(const std::vector<device_piece>& pieces) {
    for (const device_piece& piece : pieces)
      cache_.advance(piece.row, static_cast<std::int32_t>(piece.tokens.size()));
  }

  /// Puts the pass on the stream.
  void enqueue() {
    specattn::attention_pass<specattn::fp16, device> attention(
        context(), cache_,
        {offsets_.shaped({sequences_ + 1}), lengths_.shaped({sequences_}), rows_.shaped({sequences_})});
    model_.forward(context(), {tokens_.shaped({slots_}), positions_.shaped({slots_}), wanted_.shaped({wants_})},
                   attention, logits_.shaped({wants_, shape_.vocab}));
  }
  /// [wanted, vocab] of the last pass.
  std::vector<float> logits() {
    specattn::detail::check_cuda(cudaStreamSynchronize(stream()), "test");
    std::vector<float> copy(static_cast<std::size_t>(wants_ * shape_.vocab));
    if (!copy.empty()) {
      specattn::detail::check_cuda(
          cudaMemcpy(copy.data(), logits_.data(), copy.size() * sizeof(float), cudaMemcpyDeviceToHost), "test");
    }
    return copy;
  }

  std::vector<float> pass(const std::vector<device_piece>& pieces, const std::vector<std::int32_t>& wanted,
                          std::ptrdiff_t padding = 0) {
    set(pieces, wanted, padding);
    enqueue();
    advance(pieces);
    return logits();
  }

  /// Feeds a text in chunks, without logits.
  void prefill(std::int32_t row, std::span<const std::int32_t> text, std::size_t chunk = 256) {
    for (std::size_t first = 0; first < text.size(); first += chunk) {
      const auto part = text.subspan(first, std::min(chunk, text.size() - first));
      pass({{row, {part.begin(), part.end()}}}, {});
    }
  }

 private:
  std::size_t room() const { return static_cast<std::size_t>(shape_.max_slots); }
  static void put(const specattn::buffer<std::int32_t, device>& to, const std::vector<std::int32_t>& from) {
    specattn::detail::expects(from.size() <= to.size(), "test: ", from.size(), " numbers for ", to.size());
    specattn::detail::check_cuda(
        cudaMemcpy(to.data(), from.data(), from.size() * sizeof(std::int32_t), cudaMemcpyHostToDevice), "test");
  }

  mini_llm::device_llama& model_;
  specattn::model_shape shape_;
  specattn::kv_cache<specattn::fp16, device> cache_;
  specattn::buffer<std::int32_t, device> tokens_, positions_, wanted_, offsets_, lengths_, rows_;
  specattn::buffer<float, device> logits_;
  std::ptrdiff_t slots_ = 0, wants_ = 0, sequences_ = 0;
};

/// How far a row of logits is from the expected one, in the expected row's standard deviation.
struct logits_distance {
  double mean = 0.0;  ///< root of the mean square
  double most = 0.0;
};
inline logits_distance distance(std::span<const float> got, std::span<const float> expected) {
  double sum = 0.0, squares = 0.0, off_squares = 0.0, off_most = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const auto value = static_cast<double>(expected[i]), off = static_cast<double>(got[i]) - value;
    sum += value;
    squares += value * value;
    off_squares += off * off;
    off_most = std::max(off_most, std::abs(off));
    if (std::isnan(off)) off_most = INFINITY;
  }
  const auto count = static_cast<double>(expected.size());
  const double spread = std::sqrt(squares / count - sum / count * sum / count);
  return {std::sqrt(off_squares / count) / spread, off_most / spread};
}
