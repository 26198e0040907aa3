// attend() on the CPU: dense, over selections, recording, and a prefill chunk, on the embedded pair's shapes and on one
// layer of an 8B model. Each point is one pass over all layers, each layer with a cache of its own. Before a point is
// timed, some of its rows are compared with the oracle. "floor" is the time the multiply-adds alone would take at the
// rate measured in the same run.
#include "specattn/cpu/attend.hpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "harness.hpp"
#include "oracle/attend_oracle.hpp"
#include "specattn/cpu/kv_cache.hpp"

namespace {

using specattn::bf16;
using specattn::cpu;
using specattn::fp16;

struct model_shape {
  std::string name;
  std::int32_t layers, kv_heads, group, head_dim;
};

struct point {
  std::int32_t kv_len = 4096;
  std::int32_t slots = 1;
  double kept = -1.0;  // share of the prefix; negative: dense, without a list
  bool record = false;
};

/// Multiply-adds a second of one thread, eight independent sums.
double multiply_add_rate() {
  using specattn::detail::lanes;
  double best = 0.0;
  for (int turn = 0; turn < 200; ++turn) {
    lanes sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = lanes::broadcast(static_cast<float>(i));
    const lanes half = lanes::broadcast(0.5f);
    const auto start = std::chrono::steady_clock::now();
    constexpr int rounds = 2000;
    for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum[i] = fmadd(sum[i], half, half);
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    lanes total = sum[0];  // the array's own address must not be taken: it would move to memory
    for (int i = 1; i < 8; ++i) total = add(total, sum[i]);
    bench::keep(total);
    best = std::max(best, 8.0 * rounds * lanes::width / took.count());
  }
  return best;
}

/// A pass over all layers of a model, ready to run again and again.
template <specattn::storage T>
class pass {
 public:
  pass(const model_shape& m, const point& p, specattn::context<cpu>& ctx)
      : m_(m), p_(p), ctx_(ctx), cache_({1, m.layers, m.kv_heads, m.head_dim, p.kv_len + p.slots, 0, 0}) {
    std::mt19937 engine(3);
    std::normal_distribution<float> normal;
    const auto length = p.kv_len + p.slots;
    k_.resize(static_cast<std::size_t>(length * m.kv_heads * m.head_dim));
    v_ = k_;
    q_.resize(static_cast<std::size_t>(p.slots * m.kv_heads * m.group * m.head_dim));
    out_ = q_;
    for (auto* numbers : {&k_, &v_, &q_})
      for (float& x : *numbers) x = specattn::to_float(specattn::from_float<T>(normal(engine)));
    for (std::int32_t layer = 0; layer < m.layers; ++layer)
      cache_.append(ctx, layer, 0, {k_.data(), {length, m.kv_heads, m.head_dim}},
                    {v_.data(), {length, m.kv_heads, m.head_dim}});
    cache_.advance(0, length);
    select(engine);
    if (p.record) weights_.resize(static_cast<std::size_t>(m.layers * m.kv_heads * m.group * length));
    ctx.reserve_workspace(
        specattn::attend_workspace_bytes(ctx, {1, p.slots, m.kv_heads * m.group, m.kv_heads, m.head_dim, length}));
  }

  void operator()() {
    for (std::int32_t layer = 0; layer < m_.layers; ++layer) run(layer);
  }

  double bytes() const { return attended_rows_ * 2.0 * m_.head_dim * sizeof(T); }
  double multiply_adds() const {
    const double causal = p_.slots > 16 ? m_.layers * m_.kv_heads * (p_.slots - 1) / 2.0 : 0.0;
    return 2.0 * (attended_rows_ - causal) * p_.slots * m_.group * m_.head_dim;
  }
  std::string label() const {
    std::string text = m_.name + ", " + std::to_string(p_.kv_len) + " positions, S = " + std::to_string(p_.slots);
    if (p_.kept >= 0) text += ", kept " + std::to_string(static_cast<int>(p_.kept * 100 + 0.5)) + " %";
    return text + (p_.record ? ", recording" : "");
  }

  /// Compares the first and last slot's first and last head of the last layer with the oracle.
  void validate() {
    (*this)();
    const std::int32_t heads = m_.kv_heads * m_.group;
    for (std::int32_t slot : {0, p_.slots - 1})
      for (std::int32_t head : {0, heads - 1}) {
        const auto want = expected(slot, head);
        for (std::int32_t d = 0; d < m_.head_dim; ++d) {
          const double got = out_[static_cast<std::size_t>((slot * heads + head) * m_.head_dim + d)];
          if (!(std::abs(got - want.out[static_cast<std::size_t>(d)]) <= 2e-5))
            bench::session::fail(label() + ": wrong result at slot " + std::to_string(slot));
        }
      }
  }

 private:
  void select(std::mt19937& engine) {
    const std::int32_t groups = m_.layers * m_.kv_heads;
    attended_rows_ = static_cast<double>(groups) * (p_.kv_len + p_.slots);
    if (p_.kept < 0) return;
    kept_ = specattn::selection<cpu>(groups, p_.kv_len);
    std::uniform_real_distribution<double> uniform;
    attended_rows_ = static_cast<double>(groups) * p_.slots;
    const auto view = kept_.view();
    for (std::int32_t g = 0; g < groups; ++g) {
      std::int32_t count = 0;
      for (std::int32_t i = 0; i < p_.kv_len; ++i)
        if (p_.kept >= 1.0 || uniform(engine) < p_.kept) view.positions(g, count++) = i;
      view.counts[g] = count;
      attended_rows_ += count;
    }
  }

  void run(std::int32_t layer) {
    const std::int32_t heads = m_.kv_heads * m_.group;
    specattn::attend_args<T> args;
    args.q = {q_.data(), {p_.slots, heads, m_.head_dim}};
    args.out = {out_.data(), {p_.slots, heads, m_.head_dim}};
    args.kv = cache_.layer(layer);
    args.slot_offsets = {offsets_, {2}};
    args.kv_lens = {&p_.kv_len, {1}};
    if (p_.kept >= 0) {
      args.kept = kept_.view().slice(layer * m_.kv_heads, m_.kv_heads);
      args.kept_sequence_stride = m_.kv_heads;
    }
    if (p_.record) {
      const std::ptrdiff_t length = p_.kv_len + p_.slots;
      args.recording.weights = {weights_.data() + layer * heads * length, {1, heads, length}};
    }
    specattn::attend(ctx_, args);
  }

  oracle::attended expected(std::int32_t slot, std::int32_t head) const {
    const std::int32_t kv_head = head / m_.group;
    const auto row = [&](const std::vector<float>& from, std::int32_t index) {
      const auto first = from.begin() + std::ptrdiff_t{index} * m_.head_dim;
      return std::vector<double>(first, first + m_.head_dim);
    };
    std::vector<std::vector<double>> keys, values;
    const auto take = [&](std::int32_t position) {
      keys.push_back(row(k_, position * m_.kv_heads + kv_head));
      values.push_back(row(v_, position * m_.kv_heads + kv_head));
    };
    const std::int32_t g = (m_.layers - 1) * m_.kv_heads + kv_head;
    const std::int32_t count = p_.kept >= 0 ? kept_.view().counts[g] : p_.kv_len;
    for (std::int32_t i = 0; i < count; ++i) take(p_.kept >= 0 ? kept_.view().positions(g, i) : i);
    for (std::int32_t i = 0; i <= slot; ++i) take(p_.kv_len + i);
    return oracle::attend(row(q_, slot * m_.kv_heads * m_.group + head), keys, values,
                          1.0 / std::sqrt(static_cast<double>(m_.head_dim)));
  }

  model_shape m_;
  point p_;
  specattn::context<cpu>& ctx_;
  specattn::kv_cache<T> cache_;
  specattn::selection<cpu> kept_;
  std::vector<float> k_, v_, q_, out_, weights_;
  std::int32_t offsets_[2] = {0, p_.slots};
  double attended_rows_ = 0.0;
};

template <specattn::storage T>
void time(bench::session& session, specattn::context<cpu>& ctx, double rate, const model_shape& m, point p) {
  if (session.smoke()) p.kv_len = 300;
  pass<T> one(m, p, ctx);
  one.validate();
  char floor[64];
  std::snprintf(floor, sizeof floor, "floor %.1f us", one.multiply_adds() / (rate * ctx.threads()) * 1e6);
  session.point(one.label(), one.bytes(), one, floor);
}

}  // namespace

int main(int argc, char** argv) {
  bench::session session("attend", argc, argv);
  specattn::context<cpu> ctx;
  const double rate = multiply_add_rate();
  const model_shape target{"target fp16", 8, 2, 2, 64};
  const model_shape draft{"draft fp16", 4, 2, 2, 32};
  const model_shape large{"one 8B layer bf16", 1, 8, 4, 128};
  for (std::int32_t slots = 1; slots <= 9; ++slots) time<fp16>(session, ctx, rate, target, {4096, slots});
  for (std::int32_t slots : {1, 3, 5, 7, 9})
    for (double kept : {0.10, 0.22, 0.50, 1.0}) time<fp16>(session, ctx, rate, target, {4096, slots, kept});
  for (bool record : {false, true})
    for (std::int32_t slots : {1, 2}) time<fp16>(session, ctx, rate, draft, {4096, slots, -1.0, record});
  time<fp16>(session, ctx, rate, draft, {4096, 1, 0.10});
  for (std::int32_t slots : {1, 6}) time<bf16>(session, ctx, rate, large, {8192, slots});
  time<bf16>(session, ctx, rate, large, {8192, 6, 0.22});
  time<fp16>(session, ctx, rate, target, {3584, session.smoke() ? 32 : 256});
  return 0;
}
