// attend() on the device over the verify table: 32 query heads, 8 kv heads, head_dim 128, bf16, contiguous cache. Dense,
// over a list of everything, over random and clustered lists, masks, single slots and recording; then the larger cells
// over fp8_e4m3 with a scale for each head. --sweep varies one thing at a time instead. Every point is compared with a
// double-precision reference before it is timed; gathers are judged by a bare one of the same rows in the same run.
//   attend_bench_cuda [--smoke | --sweep | BATCH KV_LEN [ROW]] [--real FILE]     FILE: see peers/README.md
#include "attend_cells.cuh"

#include <cstring>
#include <span>
#include <string>

namespace {

using bench::attend_cell;
using bench::attend_result;
using bench::attend_row;
using bench::device;
using specattn::bf16;
using specattn::fp16;
using specattn::fp8_e4m3;

constexpr attend_cell fp8_table[] = {{8, 8192}, {8, 32768}, {16, 32768}};
constexpr attend_cell table[] = {{1, 8192, 22, 12},  {1, 32768, 60, 20},   {1, 131072, 215, 55},
                                 {8, 8192, 115, 32}, {8, 32768, 420, 100}, {16, 32768, 830, 190}};

constexpr attend_row rows[] = {{"dense", 6, 2, 1, false},
                               {"dense, recording", 6, 2, 1, true},
                               {"everything listed", 6, 1, 1, false},
                               {"22 % random", 6, 0.22, 1, false},
                               {"22 %, recording", 6, 0.22, 1, true},
                               {"22 % in runs of 16", 6, 0.22, 16, false},
                               {"22 %, masked", 6, 0.22, 1, false, true},
                               {"10 % random", 6, 0.10, 1, false},
                               {"10 % in runs of 16", 6, 0.10, 16, false},
                               {"dense, one slot", 1, 2, 1, false}};
constexpr attend_row fp8_rows[] = {{"dense, fp8", 6, 2, 1, false}, {"22 % random, fp8", 6, 0.22, 1, false}};

/// The tables of one run.
class report {
 public:
  report(cudaStream_t stream, bool smoke, bench::file_rows real)
      : ctx_(stream), clock_(stream), smoke_(smoke), real_(std::move(real)) {
    bench::print_device();
    if (smoke) return;
    copy_ = bench::copy_bandwidth(clock_, stream);
    std::printf(
        "copy: %.0f GB/s; times are graph replays less an empty node of %.2f us; 32 query heads, 8 kv heads, "
        "head_dim 128, bf16, 6 slots but where it says otherwise\n",
        copy_, clock_.empty_us());
  }

  static void head() {
    std::printf(
        "\n| batch | kv_len | | us | goal us | bare gather us | MB | GB/s | of copy | off by |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n");
  }
  template <specattn::storage T>
  void cell(const attend_cell& c, std::span<const attend_row> of, const char* only = "") {
    bench::attend_timer<T> timer(c, real_, ctx_, smoke_ ? nullptr : &clock_);
    for (const attend_row& r : of) {
      if (std::strstr(r.name, only) == nullptr) continue;
      const attend_result m = timer.measure(r);
      const double goal = r.record || r.masked || r.run > 1 || r.slots == 1 ? 0
                          : r.share > 1                                     ? c.dense_goal_us
                          : r.share > 0.2 && r.share < 1                    ? c.sparse_goal_us
                                                                            : 0;
      std::printf("| %d | %d | %s | %.1f | %s | %s | %.1f | %.0f | %.0f %% | %.0e |\n", c.batch, c.kv_len, r.name,
                  m.us, goal > 0 ? std::to_string(static_cast<int>(goal)).c_str() : "-", beside_gather(m).c_str(),
                  m.bytes * 1e-6, m.bytes * 1e-3 / m.us, 100 * m.bytes * 1e-3 / m.us / copy_, double{m.off});
      std::fflush(stdout);
    }
  }

  /// One thing at a time, from 8 x 32768 with four query heads a kv head, head_dim 128, six slots, 22 % at random.
  void sweep() {
    std::printf(
        "\n| varied | | kept | dense us | GB/s | sparse us | bare gather us | MB | GB/s | of copy | off by |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|\n");
    const attend_row base{"", 6, 0.22, 1};
    const attend_cell cell_of{smoke_ ? 2 : 8, smoke_ ? 700 : 32768};
    for (const std::int32_t group : {1, 4, 8}) {
      attend_cell c = cell_of;
      c.group = group;
      point<bf16>("query heads a kv head", std::to_string(group), c, base);
    }
    for (const std::int32_t head_dim : {64, 128, 256}) {
      attend_cell c = cell_of;
      c.head_dim = head_dim;
      point<bf16>("head_dim", std::to_string(head_dim), c, base);
    }
    for (const std::int32_t slots : {1, 2, 4, 6, 8, 16}) {
      attend_cell c = cell_of;
      c.most_slots = slots;
      point<bf16>("slots", std::to_string(slots), c, {"", slots, 0.22, 1});
    }
    for (const double share : {0.01, 0.02, 0.05, 0.1, 0.22, 0.35, 0.5, 0.75, 1.0})
      point<bf16>("kept share", std::to_string(static_cast<int>(100 * share + 0.5)) + " %", cell_of,
                  {"", 6, share, 1});
    point<bf16>("storage", "bf16", cell_of, base);
    point<fp16>("storage", "fp16", cell_of, base);
    point<fp8_e4m3>("storage", "fp8_e4m3", cell_of, base);
    point<bf16>("pattern, 8 x 32768", "random", cell_of, base);
    point<bf16>("pattern, 8 x 32768", "runs of 16", cell_of, {"", 6, 0.22, 16});
    if (real_.rows == 0) return;
    const attend_cell real{smoke_ ? 2 : 32, static_cast<std::int32_t>(real_.length)};
    const double kept = point<bf16>("pattern, 32 x " + std::to_string(real.kv_len), "real lists", real,
                                    {"", 6, 0.5, attend_row::real});
    point<bf16>("pattern, 32 x " + std::to_string(real.kv_len), "random, as many", real, {"", 6, kept, 1});
  }

 private:
  static std::string beside_gather(const attend_result& m) {
    if (m.gather_us == 0) return "-";
    char text[40];
    std::snprintf(text, sizeof text, "%.1f (%.2fx)", m.gather_us, m.us / m.gather_us);
    return text;
  }
  template <specattn::storage T>
  double point(const std::string& varied, const std::string& value, const attend_cell& c, const attend_row& r) {
    bench::attend_timer<T> timer(c, real_, ctx_, smoke_ ? nullptr : &clock_);
    const attend_result dense = timer.measure({"dense", r.slots, 2, 1}), m = timer.measure(r);
    std::printf("| %s | %s | %.1f %% | %.1f | %.0f | %.1f | %s | %.1f | %.0f | %.0f %% | %.0e |\n", varied.c_str(),
                value.c_str(), 100 * m.kept, dense.us, dense.bytes * 1e-3 / dense.us, m.us, beside_gather(m).c_str(),
                m.bytes * 1e-6, m.bytes * 1e-3 / m.us, 100 * m.bytes * 1e-3 / m.us / copy_,
                double{std::max(m.off, dense.off)});
    std::fflush(stdout);
    return m.kept;
  }

  specattn::context<device> ctx_;
  bench::device_clock clock_;
  bool smoke_;
  bench::file_rows real_;
  double copy_ = 1;
};

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  bench::file_rows real;
  if (argc > 2 && std::strcmp(argv[argc - 2], "--real") == 0) {
    real = bench::read_rows(argv[argc - 1]);
    argc -= 2;
  }
  const std::string first = argc > 1 ? argv[1] : "";
  const bool smoke = first == "--smoke", one = argc > 2;
  cudaStream_t stream;
  bench::check(cudaStreamCreate(&stream));
  report run(stream, smoke, real);
  if (first != "--sweep") report::head();
  if (smoke) {
    run.cell<bf16>({2, 700}, rows);
    run.cell<fp8_e4m3>({2, 700}, fp8_rows);
  }
  if (smoke || first == "--sweep") {
    run.sweep();
    return 0;
  }
  const auto wanted = [&](const attend_cell& c) {
    return !one || (c.batch == std::atoi(argv[1]) && c.kv_len == std::atoi(argv[2]));
  };
  const char* only = argc > 3 ? argv[3] : "";
  for (const attend_cell& c : table)
    if (wanted(c)) run.cell<bf16>(c, rows, only);
  for (const attend_cell& c : fp8_table)
    if (wanted(c)) run.cell<fp8_e4m3>(c, fp8_rows, only);
  return 0;
}
