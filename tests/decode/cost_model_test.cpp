// The cost model: its byte bounds, what it learns from rounds with known costs, what it then chooses.
#include "specattn/cost_model.hpp"

#include <doctest/doctest.h>

#include <string>

#include "specattn/random.hpp"

using namespace specattn;

namespace {

/// Bytes of a model's weights that a pass reads (input embeddings are looked up) and of a position's keys and values.
struct model_bytes {
  double weights;
  double layers, kv_heads, head_dim;
  double row() const { return 2.0 * 2.0 * head_dim; }
  double rows() const { return layers * kv_heads; }
};
constexpr model_bytes llama_2_7b{2 * 6.607e9, 32, 32, 128};
constexpr model_bytes tiny_llama{2 * 1.035e9, 22, 4, 64};
constexpr model_bytes llama_3_8b{2 * 7.505e9, 32, 8, 128};
constexpr model_bytes llama_3_1b{2 * 1.236e9, 16, 8, 64};

double bound_over_dense(const model_bytes& target, const model_bytes& draft, double kv_len, double batch,
                        double draft_kept) {
  round_cost cost;
  cost.target = pass_cost::of_bytes(target.weights, target.row(), 3e12);
  cost.draft = pass_cost::of_bytes(draft.weights, draft.row(), 3e12);
  round_workload work{.sequences = batch,
                      .kv_len = kv_len,
                      .target_rows = target.rows(),
                      .draft_rows = draft.rows(),
                      .kept_share = 0.22};
  const double dense = round_seconds(cost, work, {4, false});
  work.draft_kept_share = draft_kept;
  return dense / round_seconds(cost, work, {4, true});
}

/// A device whose costs are known, with times off by up to `noise`.
struct pretend_device {
  round_cost cost;
  round_workload work;
  double noise = 0.0;
  std::uint64_t draws = 0;

  double about(double seconds) {
    return seconds * (1.0 + noise * (2.0 * uniform(9, draws++, random_use::emit) - 1.0));
  }
  round_trace run(round_setting setting) {
    round_trace trace;
    trace.sequences = 1;
    decode_counts& c = trace.counts;
    c.rounds = 1;
    c.dense_rounds = setting.sparse ? 0 : 1;
    c.proposed = setting.draft_length;
    while (c.accepted < c.proposed && uniform(5, draws++, random_use::emit) < work.acceptance) ++c.accepted;
    c.corrected = c.accepted < c.proposed;
    const double slots = setting.draft_length + 1;
    c.kv_rows_dense = static_cast<std::int64_t>(work.target_rows * (work.kv_len + slots));
    c.kv_rows_read = setting.sparse
                         ? static_cast<std::int64_t>(work.target_rows * (work.kv_len * work.kept_share + slots))
                         : c.kv_rows_dense;
    c.draft_steps = c.proposed + (setting.sparse ? static_cast<std::int64_t>(work.more_steps) : 0);
    const auto steps = static_cast<double>(c.draft_steps);
    c.draft_rows_read = c.draft_rows_dense = static_cast<std::int64_t>(work.draft_rows * steps * (work.kv_len + 1));
    trace.verify_seconds = about(cost.target.seconds(slots, static_cast<double>(c.kv_rows_read)));
    trace.draft_seconds = about(steps * cost.draft.start + cost.draft.row * static_cast<double>(c.draft_rows_read));
    if (setting.sparse) trace.guide_seconds = about(cost.guide + cost.guide_position * work.kv_len);
    return trace;
  }
};

pretend_device long_context() {
  pretend_device device;
  device.cost.target = {400e-6, 60e-6, 5e-9, 1e-9};
  device.cost.draft = {60e-6, 0.0, 8e-9, 0.0};
  device.cost.guide = 20e-6;
  device.cost.guide_position = 15e-9;
  device.work = {.kv_len = 4000, .target_rows = 24, .draft_rows = 8, .kept_share = 0.25, .acceptance = 0.7};
  device.work.more_steps = 1;
  return device;
}

void decode(pretend_device& device, round_planner& planner, int rounds) {
  for (int i = 0; i < rounds; ++i) {
    const round_setting setting = planner.choose(1, device.work.kv_len);
    planner.learn(device.run(setting), device.work.kv_len);
  }
}

}  // namespace

TEST_CASE("cost model: bytes alone give the bounds over dense speculation that are known for real pairs") {
  constexpr double one_dense_step = 0.25 * (1.0 + 3 * 0.22);  // the others read 22 %
  CHECK(bound_over_dense(llama_2_7b, tiny_llama, 2048, 1, one_dense_step) == doctest::Approx(1.04).epsilon(0.006));
  CHECK(bound_over_dense(llama_2_7b, tiny_llama, 8192, 1, one_dense_step) == doctest::Approx(1.17).epsilon(0.006));
  CHECK(bound_over_dense(llama_2_7b, tiny_llama, 32768, 1, one_dense_step) == doctest::Approx(1.57).epsilon(0.006));
  CHECK(bound_over_dense(llama_2_7b, tiny_llama, 32768, 1, 1.0) == doctest::Approx(1.47).epsilon(0.006));
  CHECK(bound_over_dense(llama_2_7b, tiny_llama, 8192, 8, one_dense_step) == doctest::Approx(1.96).epsilon(0.006));
  CHECK(bound_over_dense(llama_3_8b, llama_3_1b, 32768, 8, one_dense_step) == doctest::Approx(2.00).epsilon(0.006));
  CHECK(bound_over_dense(llama_3_8b, llama_3_1b, 32768, 8, 1.0) == doctest::Approx(1.40).epsilon(0.006));
  CHECK(bound_over_dense(llama_3_8b, llama_3_1b, 131072, 1, one_dense_step) == doctest::Approx(1.66).epsilon(0.006));
  // As rounds are recorded: every step sparse, and half of each row once more.
  constexpr double keys = 0.22 + 0.5 / 4;
  CHECK(bound_over_dense(llama_3_8b, llama_3_1b, 32768, 8, keys) == doctest::Approx(2.11).epsilon(0.006));
  CHECK(bound_over_dense(llama_3_8b, llama_3_1b, 131072, 1, keys) == doctest::Approx(1.71).epsilon(0.006));
}

TEST_CASE("cost model: a round emits one token and the accepted ones before the first rejection") {
  CHECK(tokens_a_round(0.0, 7) == 1.0);
  CHECK(tokens_a_round(1.0, 7) == 8.0);
  CHECK(tokens_a_round(0.5, 2) == doctest::Approx(1.75));
  CHECK(tokens_a_round(0.8, 0) == 1.0);
}

TEST_CASE("cost model: what is cheap to draft and often accepted is drafted long, what is not, short") {
  round_cost cost;
  cost.target.start = 1e-3;
  cost.draft.start = 1e-5;
  round_workload work{.kv_len = 100, .target_rows = 1, .draft_rows = 1, .acceptance = 0.95};
  CHECK(fastest_setting(cost, work, 8, false).draft_length == 8);
  work.acceptance = 0.05;
  cost.draft.start = 3e-4;
  CHECK(fastest_setting(cost, work, 8, false).draft_length == 1);
}

TEST_CASE("cost model: a sparse verify pass is chosen where reading dominates, and only where it may be") {
  pretend_device device = long_context();
  CHECK(fastest_setting(device.cost, device.work, 8, true).sparse);
  CHECK(!fastest_setting(device.cost, device.work, 8, false).sparse);
  device.work.kv_len = 200;
  device.cost.guide = 100e-6;
  CHECK(!fastest_setting(device.cost, device.work, 8, true).sparse);
}

TEST_CASE("round_planner: from rounds of known cost it predicts every setting to within one per cent") {
  pretend_device device = long_context();
  round_planner planner(device.work.target_rows, device.work.draft_rows, 8, true);
  decode(device, planner, 80);
  for (std::int32_t length = 1; length <= 8; ++length) {
    for (const bool sparse : {false, true}) {
      const double want = round_seconds(device.cost, device.work, {length, sparse});
      CHECK(round_seconds(planner.cost(), planner.workload(), {length, sparse}) ==
            doctest::Approx(want).epsilon(0.01));
    }
  }
}

TEST_CASE("round_planner: with times off by a tenth it settles on a setting within three per cent of the fastest") {
  for (const double acceptance : {0.3, 0.7, 0.9}) {
    pretend_device device = long_context();
    device.noise = 0.1;
    device.work.acceptance = acceptance;
    round_planner planner(device.work.target_rows, device.work.draft_rows, 8, true);
    decode(device, planner, 400);
    const round_setting chosen = fastest_setting(planner.cost(), planner.workload(), 8, true);
    const round_setting best = fastest_setting(device.cost, device.work, 8, true);
    CAPTURE(acceptance);
    CHECK(chosen.sparse == best.sparse);
    CHECK(round_rate(device.cost, device.work, chosen) > 0.97 * round_rate(device.cost, device.work, best));
  }
}

TEST_CASE("round_planner: it follows a context that grows and a selection that stops paying") {
  pretend_device device = long_context();
  device.work.kv_len = 100;
  device.cost.guide = 150e-6;
  round_planner planner(device.work.target_rows, device.work.draft_rows, 8, true);
  decode(device, planner, 60);
  CHECK(!fastest_setting(planner.cost(), planner.workload(), 8, true).sparse);
  device.work.kv_len = 8000;
  decode(device, planner, 200);
  CHECK(fastest_setting(planner.cost(), planner.workload(), 8, true).sparse);
}

TEST_CASE("round_planner: refreshed rounds teach nothing; draft lengths out of range are refused by name") {
  pretend_device device = long_context();
  round_planner planner(24, 8, 4, true);
  round_trace trace = device.run({4, true});
  trace.counts.refreshed = 1;
  planner.learn(trace, 4000);
  CHECK(planner.cost().target.start == 0.0);
  CHECK(planner.workload().kept_share == 1.0);
  try {
    const round_planner wrong(24, 8, 16, true);
    FAIL("16 was taken");
  } catch (const contract_error& error) {
    CHECK(std::string(error.what()).find("draft lengths up to 16; give 1 … 15") != std::string::npos);
  }
}
