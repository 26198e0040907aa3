// Writes attention rows of a model on a text, for select_bench.cu: the weights of the last 16 of 4096 tokens over the
// positions before them, one row for each (layer, slot, head), scaled to unit mass there.
//   draft_rows BOOK OUT [MODEL]     MODEL: a Hugging Face folder; without one, the embedded draft
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <vector>

#include "commands/command_input.hpp"
#include "mini_llm/cached_attention.hpp"
#include "model/llama.hpp"
#include "model/loaded_model.hpp"

namespace {

constexpr std::int32_t slots = 16;

void forward(specattn::context<specattn::cpu>& ctx, mini_llm::llama& model, cached_attention<float>& attention,
             const std::vector<std::int32_t>& tokens, std::int32_t first, std::int32_t count) {
  std::vector<std::int32_t> positions(static_cast<std::size_t>(count));
  for (std::int32_t i = 0; i < count; ++i) positions[static_cast<std::size_t>(i)] = first + i;
  const std::vector<std::int32_t> part(tokens.begin() + first, tokens.begin() + first + count);
  model.forward(ctx, {part, positions, {}}, attention, {});
  attention.advance(count);
}

void write_rows(const char* book, const char* out, const std::filesystem::path& folder) {
  mini_llm::loaded_model loaded = mini_llm::load_model(folder);
  const specattn::model_shape& shape = loaded.model->shape();
  const std::int32_t total = (std::min)(4096, shape.max_positions);
  const auto tokens = mini_llm::read_texts({book}, loaded, total, total).front().tokens;
  specattn::context<specattn::cpu> ctx;
  cached_attention<float> attention(ctx, shape, total);
  const std::int32_t prefix = total - slots;
  for (std::int32_t at = 0; at < prefix; at += mini_llm::max_slots) {
    forward(ctx, *loaded.model, attention, tokens, at, (std::min)(mini_llm::max_slots, prefix - at));
  }
  attention.record_all();
  forward(ctx, *loaded.model, attention, tokens, prefix, slots);

  std::ofstream file(out, std::ios::binary);
  const std::int64_t head[] = {std::int64_t{shape.layers} * slots * shape.q_heads, prefix};
  file.write(reinterpret_cast<const char*>(head), sizeof head);
  std::vector<float> row(static_cast<std::size_t>(prefix));
  for (std::int64_t i = 0; i < head[0]; ++i) {
    const float* weights =
        &attention.weights()(i / (slots * shape.q_heads), i / shape.q_heads % slots, i % shape.q_heads, 0);
    double mass = 0;
    for (std::int32_t j = 0; j < prefix; ++j) mass += static_cast<double>(weights[j]);
    for (std::int32_t j = 0; j < prefix; ++j) {
      row[static_cast<std::size_t>(j)] = static_cast<float>(static_cast<double>(weights[j]) / mass);
    }
    file.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(row.size() * sizeof(float)));
  }
  if (!file.flush()) throw std::runtime_error(std::string(out) + " could not be written");
  std::printf("%s: %td rows of %d weights\n", out, static_cast<std::ptrdiff_t>(head[0]), prefix);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "draft_rows BOOK OUT [MODEL]\n");
    return 1;
  }
  try {
    write_rows(argv[1], argv[2], argc == 4 ? argv[3] : mini_llm::embedded_models() / "books-1m");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "draft_rows: %s\n", error.what());
    return 1;
  }
}
