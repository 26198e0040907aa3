// select() beside a sort and an nth_element, on softmax rows of 1K to 128K positions. Every list is compared with the
// oracle's before anything is timed.
#include "specattn/cpu/select.hpp"

#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "harness.hpp"
#include "oracle/select_oracle.hpp"

namespace {

using specattn::bf16;
using specattn::cpu;

struct shape {
  std::ptrdiff_t groups;
  std::ptrdiff_t rows;
  std::ptrdiff_t kv_len;
  double bytes(std::size_t element) const {
    return static_cast<double>(groups * rows * kv_len) * static_cast<double>(element);
  }
  std::string text() const {
    return std::to_string(groups) + " x " + std::to_string(rows) + " x " + std::to_string(kv_len);
  }
};

/// Softmax of normal logits, with a heavy first position, as attention has.
std::vector<float> softmax_rows(const shape& s) {
  std::mt19937 random(7);
  std::normal_distribution<float> logit(0.0f, 2.0f);
  std::vector<float> weights(static_cast<std::size_t>(s.groups * s.rows * s.kv_len));
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = std::exp(logit(random) + (i % static_cast<std::size_t>(s.kv_len) == 0 ? 8.0f : 0.0f)) /
                 static_cast<float>(s.kv_len);
  return weights;
}

/// The peer everybody writes first: sort all, add up until p.
std::size_t sorted_top_p(const float* weights, std::size_t count, float p, std::vector<std::int32_t>& order) {
  order.resize(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return weights[a] > weights[b]; });
  const double target = p * std::accumulate(weights, weights + count, 0.0);
  double held = 0;
  std::size_t kept = 0;
  while (kept < count && held < target) held += static_cast<double>(weights[order[kept++]]);
  std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept));
  return kept;
}

/// An easier problem: the k heaviest for a k that somebody else found.
std::size_t nth_element_top_k(const float* weights, std::size_t count, std::size_t k, std::vector<float>& copy,
                              std::vector<std::int32_t>& list) {
  copy.assign(weights, weights + count);
  std::nth_element(copy.begin(), copy.begin() + static_cast<std::ptrdiff_t>(k - 1), copy.end(), std::greater<>());
  const float least = copy[k - 1];
  list.resize(count);
  std::size_t kept = 0;
  for (std::size_t i = 0; i < count && kept < k; ++i)
    if (weights[i] >= least) list[kept++] = static_cast<std::int32_t>(i);
  return kept;
}

template <specattn::storage T>
struct setting {
  setting(const shape& s, const specattn::selection_rule& r, int threads)
      : size(s),
        rule(r),
        context(threads),
        values(softmax_rows(s)),
        weights(values.size()),
        kept(s.groups, s.kv_len) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      weights.data()[i] = specattn::from_float<T>(values[i]);
      values[i] = specattn::to_float(weights.data()[i]);
    }
    from.weights = weights.shaped({s.groups, s.rows, s.kv_len});
    context.reserve_workspace(specattn::select_workspace_bytes(context, s.groups, s.rows, s.kv_len, rule));
  }

  void run() { specattn::select(context, from, rule, kept.view()); }

  void check_against_oracle() {
    run();
    const auto view = kept.view();
    for (std::ptrdiff_t g = 0; g < (std::min<std::ptrdiff_t>)(size.groups, 2); ++g) {
      oracle::select_input in;
      in.length = static_cast<int>(size.kv_len);
      in.top_p = rule.top_p;
      in.sinks = rule.sinks;
      in.recent = rule.recent;
      in.page_size = rule.page_size;
      in.combine = rule.rows == specattn::combine::unite ? oracle::select_rows::unite : oracle::select_rows::mean;
      for (std::ptrdiff_t r = 0; r < size.rows; ++r) {
        const auto begin = values.begin() + (g * size.rows + r) * size.kv_len;
        in.rows.emplace_back(begin, begin + size.kv_len);
      }
      const auto want = oracle::select(in).list;
      bool same = view.counts[g] == static_cast<std::int32_t>(want.size());
      for (std::size_t i = 0; same && i < want.size(); ++i)
        same = view.positions(g, static_cast<std::ptrdiff_t>(i)) == want[i];
      if (!same) bench::session::fail("select " + size.text() + ": the list differs from the oracle's");
    }
  }

  std::string kept_share() const {
    const double share = 100.0 * kept.view().counts[0] / static_cast<double>(size.kv_len);
    return "keeps " + std::to_string(std::lround(share)) + " %";
  }

  shape size;
  specattn::selection_rule rule;
  specattn::context<cpu> context;
  std::vector<float> values;
  specattn::buffer<T> weights;
  specattn::selection<cpu> kept;
  specattn::weight_rows<T> from;
};

template <specattn::storage T>
double timed(bench::session& session, const std::string& what, const shape& s, const specattn::selection_rule& rule,
             int threads) {
  setting<T> one(s, rule, threads);
  one.check_against_oracle();
  return session
      .point(
          "select " + what + " " + s.text() + ", " + std::to_string(threads) + (threads > 1 ? " threads" : " thread"),
          s.bytes(sizeof(T)), [&] { one.run(); }, one.kept_share())
      .median_us;
}

void peers(bench::session& session, const shape& s, const specattn::selection_rule& rule) {
  setting<float> one(s, rule, 1);
  one.run();
  const auto k = static_cast<std::size_t>((std::max)(1, one.kept.view().counts[0]));
  const auto length = static_cast<std::size_t>(s.kv_len);
  std::vector<std::int32_t> order;
  std::vector<float> copy;
  const auto rows = static_cast<std::size_t>(s.groups * s.rows);
  session.point("std::sort top-p " + s.text() + ", 1 thread", s.bytes(sizeof(float)), [&] {
    for (std::size_t r = 0; r < rows; ++r)
      bench::keep(sorted_top_p(one.values.data() + r * length, length, rule.top_p, order));
  });
  session.point("std::nth_element, k given " + s.text() + ", 1 thread", s.bytes(sizeof(float)), [&] {
    for (std::size_t r = 0; r < rows; ++r)
      bench::keep(nth_element_top_k(one.values.data() + r * length, length, k, copy, order));
  });
}

}  // namespace

int main(int argc, char** argv) {
  bench::session session("select", argc, argv);
  const specattn::selection_rule rule;
  specattn::selection_rule everything;
  everything.top_p = 1.0f;
  specattn::selection_rule mean;
  mean.rows = specattn::combine::mean;
  specattn::selection_rule pages;
  pages.page_size = 16;
  if (session.smoke()) {
    timed<float>(session, "p 0.95", {2, 1, 1024}, rule, 2);
    timed<float>(session, "mean", {2, 4, 1024}, mean, 1);
    timed<bf16>(session, "p 0.95 bf16", {2, 2, 1024}, rule, 1);
    timed<float>(session, "keep all", {2, 1, 1024}, everything, 1);
    peers(session, {2, 1, 1024}, rule);
    return 0;
  }
  for (const std::ptrdiff_t kv_len : {1024, 4096, 8192, 32768, 131072}) {
    const shape s{16, 1, kv_len};
    timed<float>(session, "p 0.95", s, rule, 1);
    timed<float>(session, "p 0.95", s, rule, 2);
    timed<bf16>(session, "p 0.95 bf16", s, rule, 1);
    timed<float>(session, "keep all", s, everything, 1);
    if (kv_len <= 32768) peers(session, s, rule);
  }
  for (const shape& s : {shape{16, 16, 4096}, shape{64, 16, 32768}}) {
    timed<float>(session, "unite", s, rule, 2);
    timed<float>(session, "mean", s, mean, 2);
    timed<float>(session, "pages of 16", s, pages, 2);
  }
}
