// Divergences and mixtures on the device: the CPU's cases, and the CPU's figures at a model's size.
#include "specattn/cuda/alignment.cuh"

#include "cpu_fixture.hpp"
#include "cuda_fixture.cuh"
#include "specattn/cpu/alignment.hpp"

using alignment_fixture = cuda_fixture;

#include "alignment/cases.hpp"

namespace alignment_testing {

TEST_CASE(
    "divergence_accumulator on the device: many rows, long ones, any stride: the CPU's figures, and the same twice") {
  held<cuda_fixture> on;
  held<cpu_fixture> cpu;
  constexpr std::ptrdiff_t length = 5003;
  constexpr std::int32_t targets = 37, drafts = 70;
  specattn::divergence_accumulator<specattn::cuda> got(targets, drafts), again(targets, drafts),
      columns(targets, drafts);
  specattn::divergence_accumulator<specattn::cpu> want(targets, drafts);
  for (unsigned sample = 0; sample < 3; ++sample) {
    const auto target = random_rows(targets * length, 30 + sample, 0.1f);
    const auto draft = random_rows(drafts * length, 40 + sample, 0.1f);
    on.add(got, target, targets, draft, drafts);
    on.add(again, target, targets, draft, drafts);
    cpu.add(want, target, targets, draft, drafts);
    std::vector<float> turned(target.size());
    for (std::size_t r = 0; r < targets; ++r) {
      for (std::size_t i = 0; i < length; ++i) turned[i * targets + r] = target[r * length + i];
    }
    const auto memory = on.upload(turned);
    columns.add(on.context(), {memory.data(), {targets, length}, {1, targets}}, on.matrix(draft, drafts));
    CHECK(columns.samples() == sample + 1);  // memory must outlive its use
  }
  const auto figures = got.mean(), right = want.mean();
  CHECK(figures == again.mean());
  CHECK(figures == columns.mean());
  for (std::size_t i = 0; i < figures.size(); ++i) CHECK(std::abs(figures[i] - right[i]) < 1e-5 * (1.0 + right[i]));
}

TEST_CASE(
    "mixture_fit on the device: groups and signals of a model, long samples: as good as the CPU's, and the same "
    "twice") {
  held<cuda_fixture> on;
  held<cpu_fixture> cpu;
  const auto problem = random_mixture(12, 40, 1, 3, 9001, 15);
  const auto fit = fit_of(on, problem);
  const auto got = fit.solve(on.context(), 400, 1e-4f), again = fit.solve(on.context(), 400, 1e-4f);
  const auto want = fit_of(cpu, problem).solve(cpu.context(), 400, 1e-4f);
  CHECK(got.coefficients == again.coefficients);
  CHECK(got.divergence == again.divergence);
  CHECK(got.iterations == again.iterations);
  for (std::size_t g = 0; g < 12; ++g) {
    CHECK(got.excess[g] <= 1e-4f);
    CHECK(std::abs(got.divergence[g] - want.divergence[g]) < 1.1e-4f);
  }
}

}  // namespace alignment_testing
