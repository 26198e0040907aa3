// One attention pass on host data: what the tests of every backend state, run and compare with the oracle.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "oracle/attend_oracle.hpp"
#include "specattn/attend.hpp"

namespace attend_testing {

using specattn::keep_all;
using specattn::record_slots;
using list = std::vector<std::int32_t>;

/// What a pass looks like; everything has a small default.
struct pass_shape {
  std::vector<std::int32_t> kv_lens = {40};
  std::vector<std::int32_t> slots = {1};
  std::int32_t kv_heads = 2;
  std::int32_t group = 2;
  std::int32_t head_dim = 64;
  std::int32_t page_size = 0;
  float scale = 0.0f;
  bool strided = false;  // q and out with gaps, head_dim not fastest
};

/// Keys and values of a text of given length, as the cache will hold them: [position][kv head][d].
template <specattn::storage T>
struct text {
  std::vector<float> k, v;
};

template <specattn::storage T>
struct problem {
  pass_shape shape;
  std::vector<text<T>> texts;           // one a sequence, kv_len + slots positions
  std::vector<float> q;                 // [slots][q_heads][d]
  std::vector<std::vector<list>> kept;  // [sequence][kv head]; empty: dense
  std::vector<std::vector<bool>> all;   // [sequence][kv head]: keep_all instead of the list; may be empty
  std::vector<std::vector<std::vector<std::uint32_t>>>
      masks;  // beside kept: the slots that read an entry; may be empty
  bool record = false;
  record_slots recorded = record_slots::newest;

  std::int32_t q_heads() const { return shape.kv_heads * shape.group; }
  std::int32_t slots() const { return std::accumulate(shape.slots.begin(), shape.slots.end(), 0); }
  bool everything(std::size_t s, std::size_t h) const { return kept.empty() || (!all.empty() && all[s][h]); }
};

/// What a pass returns, on the host.
struct answer {
  std::vector<float> out;  // [slots][q_heads][d]
  std::vector<float> lse;  // [slots][q_heads]
  std::vector<float> weights;
  std::ptrdiff_t capacity = 0;
};

constexpr float stale = -77.0f;  // what outputs hold before the call

template <specattn::storage T>
problem<T> random_problem(const pass_shape& shape, std::uint32_t seed = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  problem<T> p;
  p.shape = shape;
  for (std::size_t s = 0; s < shape.slots.size(); ++s) {
    const auto size = static_cast<std::size_t>((shape.kv_lens[s] + shape.slots[s]) * shape.kv_heads * shape.head_dim);
    text<T> t;
    for (std::size_t i = 0; i < size; ++i) {
      t.k.push_back(specattn::to_float(specattn::from_float<T>(normal(engine))));
      t.v.push_back(specattn::to_float(specattn::from_float<T>(normal(engine))));
    }
    p.texts.push_back(std::move(t));
  }
  p.q.resize(static_cast<std::size_t>(p.slots() * p.q_heads() * shape.head_dim));
  for (float& x : p.q) x = 2.0f * normal(engine);
  return p;
}

/// Every position of the prefix with probability `share`, for each head anew.
template <specattn::storage T>
void keep_random(problem<T>& p, double share, std::uint32_t seed = 7) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> uniform;
  p.kept.clear();
  for (std::int32_t kv_len : p.shape.kv_lens) {
    std::vector<list> heads(static_cast<std::size_t>(p.shape.kv_heads));
    for (list& positions : heads)
      for (std::int32_t i = 0; i < kv_len; ++i)
        if (uniform(engine) < share) positions.push_back(i);
    p.kept.push_back(heads);
  }
}

inline specattn::kv_cache_shape cache_shape(const pass_shape& shape) {
  std::int32_t longest = 1;
  for (std::size_t s = 0; s < shape.slots.size(); ++s) longest = std::max(longest, shape.kv_lens[s] + shape.slots[s]);
  const auto sequences = static_cast<std::int32_t>(shape.slots.size());
  return {sequences, 2, shape.kv_heads, shape.head_dim, longest, shape.page_size, 0};
}

/// Writes a problem's rows to an empty cache of its shape.
template <class Fixture, specattn::storage T>
void fill(Fixture& fixture, const problem<T>& p, specattn::kv_cache<T, typename Fixture::backend>& cache) {
  const auto& shape = p.shape;
  const std::int32_t sequences = cache.shape().sequences, longest = cache.shape().max_positions;
  std::vector<specattn::buffer<float, typename Fixture::backend>> keys, values;
  for (const auto& t : p.texts) {
    keys.push_back(fixture.upload(t.k));
    values.push_back(fixture.upload(t.v));
  }
  // Sequences grow a little in turn, so that their pages interleave in the pool. Layer 1 is the one that is read.
  for (std::int32_t done = 0; done < longest; done += 13) {
    for (std::int32_t s = sequences; s-- > 0;) {
      const auto at = static_cast<std::size_t>(s);
      const std::int32_t length = shape.kv_lens[at] + shape.slots[at];
      const std::int32_t count = std::min(13, length - done);
      if (count <= 0) continue;
      const std::ptrdiff_t extents[3] = {length, shape.kv_heads, shape.head_dim};
      cache.append(fixture.context(), 1, s, keys[at].shaped(extents).slice(done, count),
                   values[at].shaped(extents).slice(done, count));
      cache.advance(s, count);
    }
  }
}

template <class Fixture, specattn::storage T>
specattn::kv_cache<T, typename Fixture::backend> filled_cache(Fixture& fixture, const problem<T>& p) {
  specattn::kv_cache<T, typename Fixture::backend> cache(cache_shape(p.shape));
  fill(fixture, p, cache);
  return cache;
}

/// q and out either dense or as [slots][d][q_heads + 1], which makes every stride unusual.
template <class B>
specattn::view<float, 3, B> shaped(float* data, std::ptrdiff_t slots, std::ptrdiff_t heads, std::ptrdiff_t dim,
                                   bool strided) {
  if (!strided) return {data, {slots, heads, dim}};
  return {data, {slots, heads, dim}, {dim * (heads + 1), 1, heads + 1}};
}

template <specattn::storage T>
std::vector<float> laid_out(const problem<T>& p, const std::vector<float>& dense) {
  if (!p.shape.strided) return dense;
  const std::ptrdiff_t slots = p.slots(), heads = p.q_heads(), dim = p.shape.head_dim;
  std::vector<float> memory(static_cast<std::size_t>(slots * dim * (heads + 1)), stale);
  const auto to = shaped<specattn::cpu>(memory.data(), slots, heads, dim, true);
  for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(dense.size()); ++i)
    to(i / (heads * dim), i / dim % heads, i % dim) = dense[static_cast<std::size_t>(i)];
  return memory;
}

template <specattn::storage T>
std::vector<float> gathered(const problem<T>& p, std::vector<float>& memory) {
  const std::ptrdiff_t slots = p.slots(), heads = p.q_heads(), dim = p.shape.head_dim;
  const auto from = shaped<specattn::cpu>(memory.data(), slots, heads, dim, p.shape.strided);
  std::vector<float> dense;
  for (std::ptrdiff_t i = 0; i < slots * heads * dim; ++i)
    dense.push_back(from(i / (heads * dim), i / dim % heads, i % dim));
  return dense;
}

/// The lists of a problem as a selection on the backend: group = sequence * (kv_heads + 1) + head.
template <class Fixture>
struct uploaded_selection {
  specattn::buffer<std::int32_t, typename Fixture::backend> positions, counts;
  specattn::selection_view<typename Fixture::backend> view;
  specattn::buffer<std::uint32_t, typename Fixture::backend> words;
  specattn::view<const std::uint32_t, 2, typename Fixture::backend> masks;

  template <specattn::storage T>
  uploaded_selection(Fixture& fixture, const problem<T>& p) {
    if (p.kept.empty()) return;
    const auto heads = static_cast<std::size_t>(p.shape.kv_heads);
    const std::size_t groups = p.kept.size() * (heads + 1);
    std::size_t capacity = 1;
    for (const auto& sequence : p.kept)
      for (const list& positions_of : sequence) capacity = std::max(capacity, positions_of.size());
    std::vector<std::int32_t> host_positions(groups * capacity, -1), host_counts(groups, 0);
    std::vector<std::uint32_t> host_words(groups * capacity, 0);
    for (std::size_t s = 0; s < p.kept.size(); ++s) {
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t g = s * (heads + 1) + h;
        std::copy(p.kept[s][h].begin(), p.kept[s][h].end(),
                  host_positions.begin() + static_cast<std::ptrdiff_t>(g * capacity));
        if (!p.masks.empty())
          std::copy(p.masks[s][h].begin(), p.masks[s][h].end(),
                    host_words.begin() + static_cast<std::ptrdiff_t>(g * capacity));
        host_counts[g] = p.everything(s, h) ? keep_all : static_cast<std::int32_t>(p.kept[s][h].size());
      }
    }
    positions = fixture.upload(host_positions);
    counts = fixture.upload(host_counts);
    view.positions = positions.shaped({static_cast<std::ptrdiff_t>(groups), static_cast<std::ptrdiff_t>(capacity)});
    view.counts = counts.shaped({static_cast<std::ptrdiff_t>(groups)});
    if (p.masks.empty()) return;
    words = fixture.upload(host_words);
    masks = words.shaped({static_cast<std::ptrdiff_t>(groups), static_cast<std::ptrdiff_t>(capacity)});
  }
};

/// Runs a problem on a fixture's backend over a cache that holds its rows.
template <class Fixture, specattn::storage T>
answer run(Fixture& fixture, const problem<T>& p, const specattn::kv_cache<T, typename Fixture::backend>& cache) {
  using B = typename Fixture::backend;
  const std::ptrdiff_t slots = p.slots(), heads = p.q_heads(), dim = p.shape.head_dim;
  const auto sequences = static_cast<std::ptrdiff_t>(p.shape.slots.size());
  std::vector<std::int32_t> offsets = {0};
  std::int32_t longest = 0;
  for (std::size_t s = 0; s < p.shape.slots.size(); ++s) {
    offsets.push_back(offsets.back() + p.shape.slots[s]);
    longest = std::max(longest, p.shape.kv_lens[s] + p.shape.slots[s]);
  }
  const auto q = fixture.upload(laid_out(p, p.q));
  const auto out = fixture.upload(laid_out(p, std::vector<float>(p.q.size(), stale)));
  const auto lse = fixture.upload(std::vector<float>(static_cast<std::size_t>(slots * heads), stale));
  const auto slot_offsets = fixture.upload(offsets);
  const auto kv_lens = fixture.upload(p.shape.kv_lens);
  const uploaded_selection<Fixture> kept(fixture, p);

  answer result;
  result.capacity = longest + 3;
  const std::ptrdiff_t rows = p.recorded == record_slots::newest ? sequences : slots;
  const auto weights =
      fixture.upload(std::vector<float>(static_cast<std::size_t>(rows * heads * result.capacity), stale));

  specattn::attend_args<T, B> args;
  args.q = shaped<B>(q.data(), slots, heads, dim, p.shape.strided);
  args.out = shaped<B>(out.data(), slots, heads, dim, p.shape.strided);
  args.kv = cache.layer(1);
  args.slot_offsets = slot_offsets.shaped({sequences + 1});
  args.kv_lens = kv_lens.shaped({sequences});
  args.scale = p.shape.scale;
  args.kept = kept.view;
  args.kept_sequence_stride = p.shape.kv_heads + 1;
  args.slot_masks = kept.masks;
  args.lse = lse.shaped({slots, heads});
  if (p.record) args.recording = {weights.shaped({rows, heads, result.capacity}), p.recorded};

  const specattn::attend_shape need{static_cast<std::int32_t>(sequences),
                                    static_cast<std::int32_t>(slots),
                                    static_cast<std::int32_t>(heads),
                                    p.shape.kv_heads,
                                    p.shape.head_dim,
                                    longest};
  fixture.context().reserve_workspace(specattn::attend_workspace_bytes(fixture.context(), need));
  fixture.soil_workspace();
  specattn::attend(fixture.context(), args);

  auto memory = fixture.download(out);
  result.out = gathered(p, memory);
  result.lse = fixture.download(lse);
  result.weights = fixture.download(weights);
  return result;
}

template <class Fixture, specattn::storage T>
answer run(Fixture& fixture, const problem<T>& p) {
  return run(fixture, p, filled_cache(fixture, p));
}

/// The positions that a slot attends to, in the order in which they are recorded.
template <specattn::storage T>
list attended_positions(const problem<T>& p, std::size_t s, std::size_t head, std::int32_t slot) {
  list positions;
  if (p.everything(s, head)) {
    positions.resize(static_cast<std::size_t>(p.shape.kv_lens[s]));
    std::iota(positions.begin(), positions.end(), 0);
  } else {
    for (std::size_t i = 0; i < p.kept[s][head].size(); ++i)
      if (p.masks.empty() || (p.masks[s][head][i] >> slot & 1u) != 0) positions.push_back(p.kept[s][head][i]);
  }
  for (std::int32_t i = 0; i <= slot; ++i) positions.push_back(p.shape.kv_lens[s] + i);
  return positions;
}

/// The oracle's answer for one slot (of its sequence) and query head.
template <specattn::storage T>
oracle::attended expected(const problem<T>& p, std::size_t s, std::int32_t slot, std::int32_t slot_row,
                          std::int32_t q_head) {
  const auto dim = static_cast<std::size_t>(p.shape.head_dim);
  const auto head = static_cast<std::size_t>(q_head / p.shape.group);
  const auto row = [dim](const std::vector<float>& from, std::size_t index) {
    return std::vector<double>(from.begin() + static_cast<std::ptrdiff_t>(index * dim),
                               from.begin() + static_cast<std::ptrdiff_t>((index + 1) * dim));
  };
  std::vector<std::vector<double>> keys, values;
  for (std::int32_t position : attended_positions(p, s, head, slot)) {
    const std::size_t index = static_cast<std::size_t>(position * p.shape.kv_heads) + head;
    keys.push_back(row(p.texts[s].k, index));
    values.push_back(row(p.texts[s].v, index));
  }
  const double scale = p.shape.scale != 0.0f ? p.shape.scale : 1.0 / std::sqrt(static_cast<double>(dim));
  return oracle::attend(row(p.q, static_cast<std::size_t>(slot_row * p.q_heads() + q_head)), keys, values, scale);
}

/// The largest differences between an answer and the oracle.
struct differences {
  double out = 0.0, lse = 0.0, weights = 0.0, sum = 0.0;
  bool untouched_behind = true;
};

template <specattn::storage T>
differences compare(const problem<T>& p, const answer& a) {
  differences d;
  std::int32_t slot_row = 0;
  for (std::size_t s = 0; s < p.shape.slots.size(); ++s) {
    for (std::int32_t slot = 0; slot < p.shape.slots[s]; ++slot, ++slot_row) {
      for (std::int32_t head = 0; head < p.q_heads(); ++head) {
        const auto want = expected(p, s, slot, slot_row, head);
        const std::size_t at = static_cast<std::size_t>(slot_row * p.q_heads() + head);
        const auto dim = static_cast<std::size_t>(p.shape.head_dim);
        for (std::size_t i = 0; i < dim; ++i) d.out = std::max(d.out, std::abs(want.out[i] - a.out[at * dim + i]));
        d.lse = std::max(d.lse, std::abs(want.lse - a.lse[at]));
        if (!p.record || (p.recorded == record_slots::newest && slot + 1 < p.shape.slots[s])) continue;
        const std::size_t row = p.recorded == record_slots::newest ? s : static_cast<std::size_t>(slot_row);
        const float* weights =
            a.weights.data() + (row * static_cast<std::size_t>(p.q_heads()) + static_cast<std::size_t>(head)) *
                                   static_cast<std::size_t>(a.capacity);
        double sum = 0.0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(a.capacity); ++i) {
          if (i >= want.weights.size()) {
            d.untouched_behind = d.untouched_behind && weights[i] == stale;
            continue;
          }
          sum += weights[i];
          d.weights = std::max(d.weights, std::abs(want.weights[i] - weights[i]));
        }
        d.sum = std::max(d.sum, std::abs(sum - 1.0));
      }
    }
  }
  return d;
}

/// Runs a problem over a cache that holds its rows and checks everything it returned against the oracle.
template <class Fixture, specattn::storage T>
void agrees_with_oracle(Fixture& fixture, const problem<T>& p,
                        const specattn::kv_cache<T, typename Fixture::backend>& cache) {
  const auto d = compare(p, run(fixture, p, cache));
  constexpr double tolerance = Fixture::template tolerance<T>;
  CHECK_FALSE(!(d.out <= tolerance));  // NaN fails too
  CHECK_FALSE(!(d.lse <= tolerance));
  CHECK_FALSE(!(d.weights <= tolerance));
  CHECK_FALSE(!(d.sum <= 2e-5));
  CHECK(d.untouched_behind);
}

template <class Fixture, specattn::storage T>
void agrees_with_oracle(Fixture& fixture, const problem<T>& p) {
  agrees_with_oracle(fixture, p, filled_cache(fixture, p));
}

}  // namespace attend_testing
