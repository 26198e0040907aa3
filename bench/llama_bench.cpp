// The Llama model of the mini-LLM on the embedded pair. First what its linear part costs for 1 … 256 rows: attention
// does nothing there, so that is embedding, norms, products, rotary embedding and the LM head (256 rows: a prefill chunk,
// no logits). The share is that of the multiply-adds which the same threads do on registers alone, measured in the same
// run. Then whole decode and verify passes with dense attention, behind 0 and 3840 positions.
#include "model/llama.hpp"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "harness.hpp"
#include "mini_llm/cached_attention.hpp"
#include "specattn/cpu/lanes.hpp"

namespace {

using specattn::context;
using specattn::cpu;
using specattn::detail::lanes;

struct no_attention {
  using rows = specattn::view<const float, 3>;
  void operator()(std::int32_t, rows, rows, rows, specattn::view<float, 3>) {}
};

/// Billions of multiply-adds a second on registers, all threads together: the best of several turns.
double multiply_add_peak(context<cpu>& ctx) {
  constexpr int chains = lanes::width == 16 ? 16 : 12;
  constexpr int steps = 200000;
  std::vector<float> results(static_cast<std::size_t>(ctx.threads()) * 16);
  double best = 0;
  for (int turn = 0; turn < 15; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    ctx.parallel_for(ctx.threads(), [&](std::ptrdiff_t i, int) {
      lanes sums[chains];
      for (lanes& sum : sums) sum = lanes::zero();
      const lanes factor = lanes::broadcast(0.5f);
      for (int step = 0; step < steps; ++step) {
        for (lanes& sum : sums) sum = fmadd(sum, factor, factor);
      }
      for (int c = 1; c < chains; ++c) sums[0] = add(sums[0], sums[c]);
      results[static_cast<std::size_t>(i) * 16] = sum_of_lanes(sums[0]);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = (std::max)(best, 1e-9 * chains * steps * lanes::width * ctx.threads() / took.count());
  }
  bench::keep(results);
  return best;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

void time_rows(bench::session& session, mini_llm::llama& model, const std::string& name, int threads, double peak) {
  context<cpu> ctx(threads);
  no_attention attention;
  const std::int32_t vocab = model.shape().vocab;
  for (const std::int32_t count : {1, 2, 3, 5, 6, 9, 256}) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i * 97 + 5) % vocab;
    std::vector<std::int32_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), 100);
    const bool prefill = count == 256;  // wants no logits
    std::vector<std::int32_t> rows(prefill ? 0 : tokens.size());
    std::iota(rows.begin(), rows.end(), 0);
    std::vector<float> memory(rows.size() * static_cast<std::size_t>(vocab));
    const specattn::view<float, 2> logits(memory.data(), {static_cast<std::ptrdiff_t>(rows.size()), vocab});
    const double products = static_cast<double>(count) *
                            static_cast<double>(model.layer_products() + (prefill ? 0 : model.head_products()));
    double best = 0;  // the note needs the time, so the point is timed before it is printed
    const auto run = [&] { model.forward(ctx, {tokens, positions, rows}, attention, logits); };
    for (int i = 0; i < (session.smoke() ? 1 : 200); ++i) {
      const auto start = std::chrono::steady_clock::now();
      run();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      best = (std::max)(best, 1e-9 * products / took.count());
      if (prefill && i == 30) break;
    }
    session.point(name + ", " + std::to_string(count) + " rows, " + std::to_string(threads) +
                      (threads > 1 ? " threads" : " thread"),
                  static_cast<double>(model.weight_bytes()), run,
                  "best " + fixed(best, 1) + " Gmadd/s, " + fixed(100 * best / peak, 0) + " % of the registers' " +
                      fixed(peak, 1));
  }
}

template <specattn::storage T>
void time_depths(bench::session& session, mini_llm::llama& model, const std::string& name, int threads,
                 const std::string& cache) {
  context<cpu> ctx(threads);
  const std::int32_t vocab = model.shape().vocab;
  const std::int32_t depths[] = {0, session.smoke() ? 256 : 3840};
  cached_attention<T> attention(ctx, model.shape(), depths[1] + 16);
  std::vector<float> memory(static_cast<std::size_t>(vocab) * 16);
  const auto pass = [&](std::int32_t count, bool wants_logits) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(count), 17);
    std::vector<std::int32_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(attention.length()));
    std::vector<std::int32_t> rows(wants_logits ? tokens.size() : 0);
    std::iota(rows.begin(), rows.end(), 0);
    model.forward(ctx, {tokens, positions, rows}, attention,
                  specattn::view<float, 2>(memory.data(), {static_cast<std::ptrdiff_t>(rows.size()), vocab}));
  };
  for (const std::int32_t depth : depths) {
    const auto start = std::chrono::steady_clock::now();
    while (attention.length() < depth) {
      pass(256, false);
      attention.advance(256);
    }
    const std::chrono::duration<double> prefill = std::chrono::steady_clock::now() - start;
    const double cache_bytes = 2.0 * depth * model.shape().layers * model.shape().kv_heads * model.shape().head_dim *
                               static_cast<double>(sizeof(T));
    for (const std::int32_t count : {1, 5}) {
      session.point(
          name + ", " + std::to_string(count) + " rows behind " + std::to_string(depth) + ", " + cache + ", " +
              std::to_string(threads) + (threads > 1 ? " threads" : " thread"),
          static_cast<double>(model.weight_bytes()) + cache_bytes, [&] { pass(count, true); },
          depth > 0 ? "prefill " + fixed(depth / prefill.count(), 0) + " tok/s" : "");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bench::session session("llama", argc, argv);
  for (const std::string name : {"books-1m", "books-7m"}) {
    const std::string directory = std::string(SPECATTN_SOURCE_DIR) + "/examples/models/" + name;
    mini_llm::llama model(mini_llm::load_model_config(directory), mini_llm::model_files::open(directory), 256, name);
    for (const int threads : {1, 2}) {
      context<cpu> ctx(threads);
      time_rows(session, model, name, threads, multiply_add_peak(ctx));
      time_depths<float>(session, model, name, threads, "float cache");
      time_depths<specattn::bf16>(session, model, name, threads, "bf16 cache");
    }
  }
}
