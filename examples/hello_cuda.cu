// hello.cpp on the device: two toy models in two kernels, a guide, a loop whose rounds are captured graphs. Expect:
//   plain decoding equals SpecAttn at top_p = 1: yes
//   at top_p = 0.8: … % of the KV rows read, … tokens a round
#include <cmath>
#include <cstdio>
#include <specattn/cuda.cuh>
#include <specattn/random.hpp>
#include <utility>
#include <vector>

using device = specattn::cuda;  // ::cuda is the toolkit's
template <class T, int Rank>
using view = specattn::view<T, Rank, device>;

struct toy_launch {
  float noise;
  specattn::forward_batch<device> batch;
  float *q, *k, *out;  // [slots, 2, 16], [slots, 1, 16], [slots, 2, 16]
  view<float, 2> logits;
};

__device__ float embedding(float noise, int token, int d) {
  const auto at = static_cast<std::uint64_t>(token * 32 + d);
  const auto number = [&](int seed) {
    return static_cast<float>(specattn::uniform(seed, at, specattn::random_use::draft)) - 0.5f;
  };
  return number(1) + noise * number(2);
}
__global__ void embed(const __grid_constant__ toy_launch toy) {
  const int s = blockIdx.x, d = threadIdx.x;
  const float turn = 0.1f * static_cast<float>(toy.batch.positions[s]);
  const float x = 4 * embedding(toy.noise, toy.batch.tokens[s], d) + sinf(turn * static_cast<float>(d % 5));
  toy.q[s * 32 + d] = x;
  if (d < 16) toy.k[s * 16 + d] = x;
}
__global__ void predict(const __grid_constant__ toy_launch toy) {
  const int r = blockIdx.x, token = threadIdx.x;
  float sum = 0;
  for (int d = 0; d < 32; ++d)
    sum += toy.out[toy.batch.logit_rows[r] * 32 + d] * embedding(toy.noise, token, (d * 7 + 3) % 32);
  toy.logits(r, token) = sum;
}

/// A pass puts its work on the context's stream and reads tokens and positions there.
struct toy {
  float noise;
  specattn::buffer<float, device> q{128 * 32}, k{128 * 16}, out{128 * 32};
  specattn::model_shape shape() const { return {1, 2, 1, 16, 50, 512, 128}; }
  template <class Attention>
  void forward(specattn::context<device>& ctx, const specattn::forward_batch<device>& batch, Attention& attention,
               view<float, 2> logits) {
    const std::ptrdiff_t slots = batch.tokens.extent(0);
    const toy_launch launch{noise, batch, q.data(), k.data(), out.data(), logits};
    embed<<<static_cast<unsigned>(slots), 32, 0, ctx.stream()>>>(launch);
    const view<const float, 3> keys(k.data(), {slots, 1, 16});
    attention(0, view<const float, 3>(q.data(), {slots, 2, 16}), keys, keys,
              view<float, 3>(out.data(), {slots, 2, 16}));
    const auto rows = static_cast<unsigned>(batch.logit_rows.extent(0));
    if (rows > 0) predict<<<rows, 50, 0, ctx.stream()>>>(launch);
  }
};

/// Both draft heads count the same; see calibrate() for how a pair's real mixture is found.
specattn::alignment even_mixture() {
  specattn::alignment pair;
  pair.target = pair.draft = {.name = "toy", .layers = 1, .q_heads = 2, .kv_heads = 1, .head_dim = 16, .vocab = 50};
  pair.signals = {.draft_layers = 1, .draft_q_heads = 2};
  pair.coefficients = {0.5f, 0.5f};
  pair.mixture_divergence = pair.divergence = {0.1f};
  pair.layer_map = {0};
  return pair;
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "SKIPPED: no CUDA device\n");
    return 77;
  }
  cudaStream_t stream;
  if (cudaStreamCreate(&stream) != cudaSuccess) return 1;
  specattn::context<device> ctx(stream);
  toy target{0.0f}, draft{0.1f};
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 200; ++i) prompt.push_back(i * i % 50);
  const auto run = [&](auto guide, std::int32_t draft_length) {
    auto decoder = specattn::make_decoder<float>(ctx, target, draft, guide, {.draft_length = draft_length});
    const auto row = decoder.add({.prompt = prompt, .max_new_tokens = 64});
    while (decoder.step([](std::int32_t, std::span<const std::int32_t>) { return true; })) {
    }
    return std::pair(std::vector(decoder.text(row).begin(), decoder.text(row).end()), decoder.counts(row));
  };
  using guide = specattn::draft_guide<device>;
  const auto plain = run(specattn::no_guide{}, 0).first;
  const bool equal = plain == run(guide(even_mixture(), {.top_p = 1.0f}), 4).first;
  std::printf("plain decoding equals SpecAttn at top_p = 1: %s\n", equal ? "yes" : "NO");
  const specattn::decode_counts c = run(guide(even_mixture(), {.top_p = 0.8f}), 4).second;
  std::printf("at top_p = 0.8: %.0f %% of the KV rows read, %.2f tokens a round\n",
              100.0 * double(c.kv_rows_read) / double(c.kv_rows_dense), double(c.emitted) / double(c.rounds));
  return equal && c.kv_rows_read < c.kv_rows_dense ? 0 : 1;
}
