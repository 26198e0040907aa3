// How a model of your own meets the library: two members, shape() and forward(), and one call a layer. The model here
// is a two-layer transformer with RMS norm, rotary positions and a SiLU gate in plain loops, with random weights where
// you would load yours. The cache, what is read of it, and the bookkeeping of drafts are not the model's business.
// Expect:
//   dense speculation equals plain decoding: yes, … tokens a round
#include <cmath>
#include <cstdio>
#include <specattn/specattn.hpp>
#include <vector>

using namespace specattn;

namespace {

class my_model {
 public:
  /// \param noise what tells a draft from its target here: a share of other weights mixed in
  explicit my_model(float noise) {
    std::uint64_t stream = 1;
    const auto random = [&](std::size_t rows, std::size_t columns) {
      std::vector<float> w(rows * columns);
      const float scale = 3.0f / std::sqrt(static_cast<float>(columns));
      for (std::size_t i = 0; i < w.size(); ++i) {
        w[i] = scale * (uniform(stream, i, random_use::draft) - 0.5f +
                        noise * (uniform(stream, i, random_use::accept) - 0.5f));
      }
      ++stream;
      return w;
    };
    embedding_ = random(vocab, hidden);
    for (layer_weights& w : layers_) {
      w = {random(heads * head_dim, hidden),
           random(kv_heads * head_dim, hidden),
           random(kv_heads * head_dim, hidden),
           random(hidden, heads * head_dim),
           random(ffn, hidden),
           random(ffn, hidden),
           random(hidden, ffn)};
    }
    for (auto* rows : {&x_, &normed_, &q_, &out_, &k_, &v_, &gate_, &up_}) rows->resize(max_slots * ffn);
  }

  /// 1. The sizes. max_slots is the most tokens one forward() takes.
  model_shape shape() const {
    return {.layers = 2,
            .q_heads = heads,
            .kv_heads = kv_heads,
            .head_dim = head_dim,
            .vocab = vocab,
            .max_positions = 512,
            .max_slots = max_slots};
  }

  /// 2. One pass over the batch's tokens: those of all sequences, one after another. Nothing is kept between calls.
  template <class Attention>
  void forward(context<cpu>&, const forward_batch<>& batch, Attention& attention, view<float, 2> logits) {
    const auto slots = static_cast<std::ptrdiff_t>(batch.tokens.size());
    for (std::ptrdiff_t s = 0; s < slots; ++s) {
      for (int d = 0; d < hidden; ++d) x_[s * hidden + d] = embedding_[batch.tokens[s] * hidden + d];
    }
    for (std::int32_t layer = 0; layer < 2; ++layer) {
      const layer_weights& w = layers_[layer];
      for (std::ptrdiff_t s = 0; s < slots; ++s) {
        normalise(&x_[s * hidden], &normed_[s * hidden]);
        multiply(w.q, &normed_[s * hidden], hidden, &q_[s * heads * head_dim]);
        multiply(w.k, &normed_[s * hidden], hidden, &k_[s * kv_heads * head_dim]);
        multiply(w.v, &normed_[s * hidden], hidden, &v_[s * kv_heads * head_dim]);
        rotate(&q_[s * heads * head_dim], heads, batch.positions[s]);
        rotate(&k_[s * kv_heads * head_dim], kv_heads, batch.positions[s]);
      }
      // 3. The seam: hand over the new rows, receive what they attended to.
      attention(layer, view<const float, 3>(q_.data(), {slots, heads, head_dim}),
                view<const float, 3>(k_.data(), {slots, kv_heads, head_dim}),
                view<const float, 3>(v_.data(), {slots, kv_heads, head_dim}),
                view<float, 3>(out_.data(), {slots, heads, head_dim}));
      for (std::ptrdiff_t s = 0; s < slots; ++s) finish_layer(w, s);
    }
    for (std::size_t r = 0; r < batch.logit_rows.size(); ++r) {  // 4. Logits only where they are wanted.
      normalise(&x_[batch.logit_rows[r] * hidden], normed_.data());
      multiply(embedding_, normed_.data(), hidden, &logits(static_cast<std::ptrdiff_t>(r), 0));
    }
  }

 private:
  static constexpr int vocab = 97, hidden = 32, heads = 4, kv_heads = 2, head_dim = 8, ffn = 64, max_slots = 64;
  struct layer_weights {
    std::vector<float> q, k, v, o, gate, up, down;
  };

  static void multiply(const std::vector<float>& w, const float* in, int inputs, float* out) {
    for (std::size_t row = 0; row < w.size() / inputs; ++row) {
      float sum = 0;
      for (int i = 0; i < inputs; ++i) sum += w[row * inputs + i] * in[i];
      out[row] = sum;
    }
  }
  static void normalise(const float* in, float* out) {
    float squares = 0;
    for (int d = 0; d < hidden; ++d) squares += in[d] * in[d];
    for (int d = 0; d < hidden; ++d) out[d] = in[d] / std::sqrt(squares / hidden + 1e-5f);
  }
  static void rotate(float* row, int count, std::int32_t position) {
    for (int h = 0; h < count; ++h) {
      for (int d = 0; d < head_dim / 2; ++d) {
        const float angle = static_cast<float>(position) * std::pow(10000.0f, -2.0f * d / head_dim);
        float& a = row[h * head_dim + d];
        float& b = row[h * head_dim + d + head_dim / 2];
        const float turned = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = turned;
      }
    }
  }
  void finish_layer(const layer_weights& w, std::ptrdiff_t s) {
    float* x = &x_[s * hidden];
    multiply(w.o, &out_[s * heads * head_dim], heads * head_dim, normed_.data());
    for (int d = 0; d < hidden; ++d) x[d] += normed_[d];
    normalise(x, normed_.data());
    multiply(w.gate, normed_.data(), hidden, gate_.data());
    multiply(w.up, normed_.data(), hidden, up_.data());
    for (int i = 0; i < ffn; ++i) gate_[i] *= up_[i] / (1.0f + std::exp(-gate_[i]));
    multiply(w.down, gate_.data(), ffn, normed_.data());
    for (int d = 0; d < hidden; ++d) x[d] += normed_[d];
  }

  std::vector<float> embedding_, x_, normed_, q_, out_, k_, v_, gate_, up_;
  layer_weights layers_[2];
};

static_assert(language_model<my_model>);  // names the missing piece, should there be one

std::vector<std::int32_t> decode(context<cpu>& ctx, my_model& target, my_model& draft, std::int32_t draft_length,
                                 double* tokens_a_round) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 100; ++i) prompt.push_back(i * i % 97);
  no_guide dense;  // any guide of the library, or yours: see guide.hpp
  auto decoder = make_decoder<bf16>(ctx, target, draft, dense, {.draft_length = draft_length});
  const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 80});
  while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
  }
  const decode_counts& counts = decoder.counts(row);
  *tokens_a_round = static_cast<double>(counts.emitted) / static_cast<double>(counts.rounds);
  return {decoder.text(row).begin(), decoder.text(row).end()};
}

}  // namespace

int main() {
  context<cpu> ctx;
  my_model target(0.0f), draft(0.1f);
  double plain_rate = 0, rate = 0;
  const bool equal = decode(ctx, target, draft, 0, &plain_rate) == decode(ctx, target, draft, 4, &rate);
  std::printf("dense speculation equals plain decoding: %s, %.2f tokens a round\n", equal ? "yes" : "NO", rate);
  return equal && rate > 1.0 ? 0 : 1;
}
