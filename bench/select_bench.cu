// select() on the device over the table of rows × lengths, p = 0.95, ascending lists out, and beside it other libraries'
// selections of the same rows, where they are compiled in. Lists are compared with the CPU's, and a peer's with what it
// promises, before anything is timed.
//   select_bench_cuda [--smoke | --rules | ROWS LENGTH] [--real FILE]     FILE: see peers/README.md, which also has the commands
#include "specattn/cuda/select.cuh"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_harness.cuh"
#include "peers/select_peers.cuh"
#include "select_cells.cuh"

namespace {

using bench::row_kind;
using device = specattn::cuda;  // ::cuda is the toolkit's
using device_rows = bench::device_rows<float>;
using checked_rows = bench::checked_rows<float>;

constexpr float top_p = 0.95f;

using bench::cell;
constexpr cell table[] = {{8, 2048, 0},      {8, 8192, 9},      {8, 32768, 12},     {8, 131072, 18},
                          {64, 32768, 13},   {256, 2048, 0},    {256, 8192, 13},    {256, 32768, 25},
                          {256, 131072, 75}, {1024, 32768, 70}, {1024, 131072, 260}};
constexpr row_kind made_kinds[] = {row_kind::softmax, row_kind::uniform, row_kind::one_hot, row_kind::all_equal,
                                   row_kind::heavy_tie};

/// What a rule costs that is more than a share of the mass.
struct rule_case {
  const char* name;
  cell where;
  specattn::selection_rule rule;
  row_kind kind = row_kind::softmax;
  bool in_fp16 = false;
};
std::vector<rule_case> rule_cases() {
  std::vector<rule_case> cases;
  const auto add = [&](const char* name, const cell& where, auto set) {
    cases.push_back({name, where, {}});
    cases.back().rule.top_p = top_p;
    set(cases.back().rule);
  };
  for (const cell& where : {cell{256, 32768, 0}, cell{1024, 8192, 0}, cell{1024, 32768, 0}}) {
    const auto tenth = static_cast<std::int32_t>(where.length / 10);
    add("cap of 10 %", where, [&](auto& rule) { rule.max_tokens = tenth; });
    add("cap of 10 %, p = 1", where, [&](auto& rule) { rule.top_p = 1.0f, rule.max_tokens = tenth; });
  }
  for (const cell& where : {cell{256, 8192, 0, 4}, cell{1024, 8192, 0, 4}, cell{1024, 32768, 0, 4}}) {
    add("union of 4 rows", where, [](auto&) {});
    add("mean of 4 rows", where, [](auto& rule) { rule.rows = specattn::combine::mean; });
    add("max of 4 rows", where, [](auto& rule) { rule.rows = specattn::combine::max; });
  }
  const auto add_flat = [&](const char* name, const cell& where, row_kind kind, float p, bool in_fp16) {
    add(name, where, [&](auto& rule) { rule.top_p = p; });
    cases.back().kind = kind;
    cases.back().in_fp16 = in_fp16;
  };
  for (const cell& where : {cell{2048, 32768, 0}, cell{8192, 8192, 0}})
    add_flat("flat rows, p = 0.33", where, row_kind::flat, 0.33f, false);
  for (const cell& where : {cell{1024, 32768, 0}, cell{2048, 32768, 0}, cell{8192, 8192, 0}, cell{256, 131072, 0}}) {
    add_flat("fp16, flat rows of 16 heads, p = 0.33", where, row_kind::flat_16, 0.33f, true);
    add_flat("fp16, flat rows of 128, p = 0.28", where, row_kind::flat_128, 0.28f, true);
  }
  add("pages of 16", {256, 32768, 0}, [](auto& rule) { rule.page_size = 16; });
  add("bisection", {256, 32768, 0}, [](auto& rule) { rule.method = specattn::threshold_method::bisection; });
  return cases;
}

/// Whether a peer kept the heaviest positions of a row, and enough of them and no more: to 1e-4 of the mass, and with
/// all that tie with the lightest kept one.
bool valid(const bench::select_peer& peer, const bench::select_problem& problem, const float* row, std::int64_t r) {
  constexpr double tolerance = 1e-4;
  const std::vector<std::int32_t> kept = peer.kept(r);
  std::vector<char> is_kept(static_cast<std::size_t>(problem.length), 0);
  for (const std::int32_t position : kept) {
    if (position < 0 || position >= problem.length || is_kept[static_cast<std::size_t>(position)] != 0) return false;
    is_kept[static_cast<std::size_t>(position)] = 1;
  }
  float least = INFINITY, greatest_left = 0;
  double mass = 0, ties = 0;
  for (std::int64_t j = 0; j < problem.length; ++j) {
    const bool in = is_kept[static_cast<std::size_t>(j)] != 0;
    if (in) mass += static_cast<double>(row[j]);
    if (in) least = (std::min)(least, row[j]);
    if (!in) greatest_left = (std::max)(greatest_left, row[j]);
  }
  for (const std::int32_t position : kept) ties += row[position] == least ? static_cast<double>(least) : 0.0;
  if (least < greatest_left) return false;
  if (!peer.by_mass()) return static_cast<std::int64_t>(kept.size()) == problem.count;
  return mass >= static_cast<double>(problem.top_p) - tolerance &&
         mass - ties < static_cast<double>(problem.top_p) + tolerance;
}

struct timing {
  double cold_us = 0, warm_us = 0;  ///< 0: not timed
  const char* mark = "";            ///< behind the figure, or in its place
};

struct point {
  row_kind kind;
  cell where;
  double kept;  ///< share of positions
  timing ours;
  std::vector<timing> peers;
};

class select_bench {
 public:
  select_bench(cudaStream_t stream, bool smoke, const std::string& real_file)
      : ctx_(stream), clock_(stream), smoke_(smoke), peers_(bench::linked_peers()) {
    if (!real_file.empty()) {
      real_ = bench::read_rows(real_file);
      real_weights_ = specattn::buffer<float, device>(real_.weights.size());
      bench::check(
          cudaMemcpy(real_weights_.data(), real_.weights.data(), real_weights_.bytes(), cudaMemcpyHostToDevice));
    }
    bench::print_device();
    copy_ = smoke ? 1 : bench::copy_bandwidth(clock_, stream);
    std::printf("copy: %.0f GB/s; times are graph replays less an empty node of %.2f us; fp32, 4 sinks, 16 recent\n",
                copy_, clock_.empty_us());
    const auto empty = [&](int) { bench::empty_kernel<<<1, 1, 0, stream>>>(); };
    if (!peers_.empty() && !smoke) {
      std::printf("†: cannot be captured; plain calls between two events, where an empty kernel takes %.2f us\n",
                  clock_.stream_us(empty, 100));
    }
    std::printf("\n");
  }

  void run_table(const cell* cells, std::size_t count) {
    std::printf(
        "| rows | length | p | kept %% | cold us | warm us | goal us | MB | GB/s cold | of copy "
        "|\n|---|---|---|---|---|---|---|---|---|---|\n");
    for (std::size_t i = 0; i < count; ++i) measure(cells[i], row_kind::softmax, true);
  }
  void run_rules() {
    std::printf(
        "\n| rule | groups | rows | length | kept %% | cold us | warm us | MB | GB/s cold | of copy |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n");
    for (const rule_case& each : rule_cases()) {
      if (each.in_fp16) {
        measure_rule<specattn::fp16>(each);
      } else {
        measure_rule<float>(each);
      }
    }
  }
  void run_kinds(const cell& where) {
    for (const row_kind kind : made_kinds) measure(where, kind, false);
  }
  void run_real(std::ptrdiff_t rows) {
    if (real_.rows > 0) measure({rows, static_cast<std::ptrdiff_t>(real_.length), 0}, row_kind::real, false);
  }
  /// The points since the last call, a column for each peer, cold and then warm.
  void print_points(const char* title) {
    if (!smoke_ && !peers_.empty()) {
      print_points(title, "cold", &timing::cold_us);
      print_points(title, "warm", &timing::warm_us);
    }
    points_.clear();
  }

 private:
  template <specattn::storage T>
  using sets_of = std::vector<std::unique_ptr<bench::device_rows<T>>>;
  using rows_set = sets_of<float>;

  /// Rows that are together beyond the L2.
  template <specattn::storage T = float>
  sets_of<T> make_rows(const cell& c, row_kind kind) {
    const double bytes = static_cast<double>(sizeof(T)) * static_cast<double>(c.rows * c.length);
    const int sets = smoke_ ? 1 : static_cast<int>((std::min)(640.0, 2.0 + 160e6 / bytes));
    sets_of<T> data;
    for (int i = 0; i < sets; ++i) {
      data.push_back(std::make_unique<bench::device_rows<T>>(c, kind, 77u + static_cast<std::uint32_t>(i), real_,
                                                             real_weights_.data(), ctx_.stream()));
    }
    return data;
  }

  template <specattn::storage T>
  void measure_rule(const rule_case& each) {
    const cell& c = each.where;
    const auto data = make_rows<T>(c, each.kind);
    ctx_.reserve_workspace(specattn::select_workspace_bytes(ctx_, c.groups(), c.group_rows, c.length, each.rule));
    bench::checked_rows<T> rows(*data[0], c);
    data[0]->select(ctx_, c, each.rule);
    bench::check(cudaStreamSynchronize(ctx_.stream()));
    const double kept = bench::validated(*data[0], c, rows, each.rule);
    if (smoke_) return;
    const auto sets = static_cast<int>(data.size());
    const double bytes = static_cast<double>(sizeof(T)) * static_cast<double>(c.rows * c.length);
    const timing took =
        timed(sets, bytes, true, [&](int i) { data[static_cast<std::size_t>(i)]->select(ctx_, c, each.rule); });
    const double moved = bytes + 4.0 * kept * static_cast<double>(c.groups() * c.length);
    std::printf("| %s | %td | %td | %td | %.1f | %.1f | %.1f | %.1f | %.0f | %.0f %% |\n", each.name, c.groups(),
                c.group_rows, c.length, 100 * kept, took.cold_us, took.warm_us, moved * 1e-6,
                moved * 1e-3 / took.cold_us, 100 * moved * 1e-3 / took.cold_us / copy_);
    std::fflush(stdout);
  }

  /// `in_table`: with p = 1 too, and with a line of its own.
  void measure(const cell& c, row_kind kind, bool in_table) {
    const double bytes = 4.0 * static_cast<double>(c.rows * c.length);
    rows_set data = make_rows(c, kind);
    const auto sets = static_cast<int>(data.size());
    checked_rows rows(*data[0], c);
    point now{kind, c, 0, {}, {}};
    for (const float p : {1.0f, top_p}) {
      if (p >= 1 && !in_table) continue;
      specattn::selection_rule rule;
      rule.top_p = p;
      data[0]->select(ctx_, c, rule);
      bench::check(cudaStreamSynchronize(ctx_.stream()));
      now.kept = bench::validated(*data[0], c, rows, rule);
      if (smoke_) continue;
      now.ours = timed(sets, bytes, true, [&](int i) { data[static_cast<std::size_t>(i)]->select(ctx_, c, rule); });
      if (in_table) print_ours(now, p, bytes);
    }
    for (const auto& peer : peers_) now.peers.push_back(measure_peer(*peer, now, data, rows));
    points_.push_back(std::move(now));
  }

  timing measure_peer(bench::select_peer& peer, const point& now, rows_set& data, const checked_rows& rows) {
    const cell& c = now.where;
    bench::select_problem problem{c.rows, c.length, top_p, std::lround(now.kept * static_cast<double>(c.length))};
    if (!peer.takes(problem)) return {0, 0, "–"};
    peer.prepare(problem);
    peer.run(data[0]->weights.data(), ctx_.stream());
    bench::check(cudaStreamSynchronize(ctx_.stream()));
    for (std::size_t i = 0; i < rows.which.size(); ++i) {
      const float* row = rows.weights.data() + static_cast<std::ptrdiff_t>(i) * c.length;
      if (valid(peer, problem, row, rows.which[i])) continue;
      std::fprintf(stderr, "%s: row %td of %td x %td, %s, is not a selection of that %s\n", peer.name().c_str(),
                   rows.which[i], c.rows, c.length, bench::name_of(now.kind), peer.by_mass() ? "mass" : "count");
      if (smoke_) std::exit(1);
      return {0, 0, "wrong"};
    }
    timing took;
    if (!smoke_) {
      took = timed(static_cast<int>(data.size()), 4.0 * static_cast<double>(c.rows * c.length), peer.captures(),
                   [&](int i) { peer.run(data[static_cast<std::size_t>(i)]->weights.data(), ctx_.stream()); });
    }
    peer.prepare({});  // gives the memory back
    return took;
  }

  timing timed(int sets, double bytes, bool captures, const std::function<void(int)>& run) {
    const auto cold = [&](int i) { run(i % sets); };
    const auto warm = [&](int) { run(0); };
    const int colds = (std::max)(sets, 4), warms = bytes > 64e6 ? 4 : 20;
    if (!captures) return {clock_.stream_us(cold, colds), clock_.stream_us(warm, warms), "†"};
    return {clock_.net_us(cold, colds), clock_.net_us(warm, warms), ""};
  }

  void print_ours(const point& now, float p, double bytes) const {
    const double moved = bytes + now.kept * bytes;
    std::printf("| %td | %td | %.2f | %.1f | %.1f | %.1f | %s | %.1f | %.0f | %.0f %% |\n", now.where.rows,
                now.where.length, static_cast<double>(p), 100 * now.kept, now.ours.cold_us, now.ours.warm_us,
                p < 1 && now.where.goal_us > 0 ? std::to_string(static_cast<int>(now.where.goal_us)).c_str() : "-",
                moved * 1e-6, moved * 1e-3 / now.ours.cold_us, 100 * moved * 1e-3 / now.ours.cold_us / copy_);
    std::fflush(stdout);
  }

  void print_points(const char* title, const char* how, double timing::*us) const {
    std::printf("\n%s, %s, us\n\n| weights | rows | length | kept %% | read once | select() |", title, how);
    for (const auto& peer : peers_) std::printf(" %s |", peer->name().c_str());
    std::printf(" best by mass over select() |\n|---|---|---|---|---|---|---|");
    for (std::size_t i = 0; i < peers_.size(); ++i) std::printf("---|");
    std::printf("\n");
    for (const point& at : points_) {
      const double limit = 4e-3 * static_cast<double>(at.where.rows * at.where.length) / copy_;
      std::printf("| %s | %td | %td | %.1f | %.2f | %.1f |", bench::name_of(at.kind), at.where.rows, at.where.length,
                  100 * at.kept, limit, at.ours.*us);
      double best = INFINITY;
      for (std::size_t i = 0; i < at.peers.size(); ++i) {
        const timing& took = at.peers[i];
        if (took.*us <= 0) {
          std::printf(" %s |", took.mark);
          continue;
        }
        std::printf(" %.1f%s |", took.*us, took.mark);
        if (peers_[i]->by_mass()) best = (std::min)(best, took.*us);
      }
      std::printf(" %.1f |\n", best / at.ours.*us);
    }
  }

  specattn::context<device> ctx_;
  bench::device_clock clock_;
  bool smoke_;
  std::vector<std::unique_ptr<bench::select_peer>>& peers_;
  bench::file_rows real_;
  specattn::buffer<float, device> real_weights_;
  double copy_ = 1;
  std::vector<point> points_;
};

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  std::string real_file;
  if (argc > 2 && std::strcmp(argv[argc - 2], "--real") == 0) {
    real_file = argv[argc - 1];
    argc -= 2;
  }
  const bool smoke = argc == 2 && std::strcmp(argv[1], "--smoke") == 0;
  const bool rules_alone = argc == 2 && std::strcmp(argv[1], "--rules") == 0;
  if (argc > 3 || (argc == 2 && !smoke && !rules_alone)) {
    std::fprintf(stderr, "select_bench_cuda [--smoke | --rules | ROWS LENGTH] [--real FILE]\n");
    return 1;
  }
  cudaStream_t stream;
  bench::check(cudaStreamCreate(&stream));
  select_bench run(stream, smoke, real_file);
  if (argc == 3) {
    const cell one{std::atol(argv[1]), std::atol(argv[2]), 0};
    run.run_table(&one, 1);
    run.print_points("select() and its peers");
    return 0;
  }
  if (rules_alone) {
    run.run_rules();
    return 0;
  }
  run.run_table(table, smoke ? 2 : std::size(table));
  run.run_rules();
  run.print_points("select() and its peers");
  const std::ptrdiff_t length = smoke ? 8192 : 32768;
  for (const std::ptrdiff_t rows : {8, 256}) {
    run.run_kinds({rows, length, 0});
    run.run_real(rows);
    if (smoke) break;
  }
  run.print_points("Kinds of weights");
  return 0;
}
