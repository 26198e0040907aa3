// Two kernels on memory that you own, without the loop: select() turns attention weights into kept positions, attend()
// reads only those from a paged cache. Checks itself against plain loops in double. Expect:
//   kept 75 of 1000 positions, 0.506 of the mass
//   attention over them differs from plain loops by at most …e-07
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <specattn/specattn.hpp>
#include <vector>

using namespace specattn;

namespace {

constexpr int kv_len = 1000, head_dim = 64, kv_heads = 2, q_heads = 4, page_size = 16;
constexpr int pages = (kv_len + 1 + page_size - 1) / page_size;

float random_number(std::uint64_t seed, std::ptrdiff_t at) {
  return uniform(seed, static_cast<std::uint64_t>(at), random_use::draft) - 0.5f;
}

/// Attention of one query over the kept positions and its own (position kv_len), in double.
std::vector<double> plain_attention(const kv_view<float>& kv, const float* q, int kv_head, view<std::int32_t, 1> kept,
                                    int count) {
  std::vector<double> out(head_dim), scores;
  double sum = 0;
  for (int i = 0; i <= count; ++i) {
    const float* key = kv.key(0, i < count ? kept[i] : kv_len, kv_head);
    double dot = 0;
    for (int d = 0; d < head_dim; ++d) dot += double(q[d]) * double(key[d]);
    scores.push_back(std::exp(dot / std::sqrt(double(head_dim))));
    sum += scores.back();
  }
  for (int i = 0; i <= count; ++i) {
    const float* value = kv.value(0, i < count ? kept[i] : kv_len, kv_head);
    for (int d = 0; d < head_dim; ++d)
      out[static_cast<std::size_t>(d)] += scores[static_cast<std::size_t>(i)] / sum * double(value[d]);
  }
  return out;
}

/// Your cache: pages in any order, [page][kv head][position in page][head_dim], found through a block table.
struct paged_cache {
  std::vector<float> keys, values;
  std::vector<std::int32_t> table;
  kv_view<float> kv;
};

paged_cache make_cache() {
  const std::size_t elements = std::size_t{pages} * kv_heads * page_size * head_dim;
  paged_cache cache{std::vector<float>(elements), std::vector<float>(elements), std::vector<std::int32_t>(pages), {}};
  for (std::size_t i = 0; i < elements; ++i) {
    cache.keys[i] = random_number(1, static_cast<std::ptrdiff_t>(i));
    cache.values[i] = random_number(2, static_cast<std::ptrdiff_t>(i));
  }
  for (int i = 0; i < pages; ++i) cache.table[static_cast<std::size_t>(i)] = (i * 37) % pages;
  cache.kv.keys = cache.keys.data();
  cache.kv.values = cache.values.data();
  cache.kv.page_shift = 4;
  cache.kv.position_stride = head_dim;
  cache.kv.head_stride = page_size * head_dim;
  cache.kv.page_stride = kv_heads * cache.kv.head_stride;
  cache.kv.block_table = view<const std::int32_t, 2>(cache.table.data(), {1, pages});
  cache.kv.kv_heads = kv_heads;
  cache.kv.head_dim = head_dim;
  return cache;
}

}  // namespace

int main() {
  const paged_cache cache = make_cache();
  const kv_view<float>& kv = cache.kv;

  // Your weights: one row for each kv head here; rows need not be normalised.
  std::vector<float> weights(kv_heads * kv_len);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights[i] = std::exp(12.0f * random_number(3, static_cast<std::ptrdiff_t>(i)));
  }
  context<cpu> ctx;
  const selection_rule rule{.top_p = 0.5f};
  const attend_shape shape{.sequences = 1,
                           .slots = 1,
                           .q_heads = q_heads,
                           .kv_heads = kv_heads,
                           .head_dim = head_dim,
                           .kv_len = kv_len + 1};
  ctx.reserve_workspace(
      std::max(select_workspace_bytes(ctx, kv_heads, 1, kv_len, rule), attend_workspace_bytes(ctx, shape)));
  selection<cpu> kept(kv_heads, kv_len);
  weight_rows<float> from;
  from.weights = view<const float, 3>(weights.data(), {kv_heads, 1, kv_len});
  select(ctx, from, rule, kept.view());
  std::printf("kept %d of %d positions, %.3f of the mass\n", kept.view().counts[0], kv_len,
              static_cast<double>(kept.view().mass[0]));

  // One slot; its own key and value are already in the cache at position kv_len.
  std::vector<float> q(q_heads * head_dim), out(q.size());
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = 4 * random_number(4, static_cast<std::ptrdiff_t>(i));
  const std::int32_t offsets[] = {0, 1}, lengths[] = {kv_len};
  attend_args<float> args;
  args.q = view<const float, 3>(q.data(), {1, q_heads, head_dim});
  args.kv = kv;
  args.slot_offsets = view<const std::int32_t, 1>(offsets, {2});
  args.kv_lens = view<const std::int32_t, 1>(lengths, {1});
  args.kept = kept.view();
  args.kept_sequence_stride = kv_heads;
  args.out = view<float, 3>(out.data(), {1, q_heads, head_dim});
  attend(ctx, args);

  double worst = 0;
  for (int h = 0; h < q_heads; ++h) {
    const int kv_head = h / (q_heads / kv_heads);
    const auto expected = plain_attention(kv, q.data() + h * head_dim, kv_head, kept.view().positions[kv_head],
                                          kept.view().counts[kv_head]);
    for (int d = 0; d < head_dim; ++d) {
      worst = std::max(worst, std::abs(expected[static_cast<std::size_t>(d)] - double(args.out(0, h, d))));
    }
  }
  std::printf("attention over them differs from plain loops by at most %.0e\n", worst);
  return worst < 1e-5 && kept.view().counts[0] < kv_len ? 0 : 1;
}
