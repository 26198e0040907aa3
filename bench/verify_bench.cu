// verify() and sample() on the device against reading every logit once. Outcomes are compared with the CPU's before
// anything is timed.
//   verify_bench_cuda [--smoke]
#include "specattn/cuda/verify.cuh"

#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_harness.cuh"
#include "specattn/cpu/verify.hpp"

namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::sampler_options;

constexpr std::ptrdiff_t drafted_each = 5;

/// N(0, 2.5) logits with a few likely tokens, as a language model has them. Row r is that of slot r + r / skip_each;
/// noise makes the draft's of the target's.
__global__ void fill_logits(float* logits, std::size_t rows, std::size_t vocab, std::size_t skip_each, float noise,
                            std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < rows * vocab;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const std::size_t row = i / vocab, slot = row + (skip_each > 0 ? row / skip_each : 0), token = i % vocab;
    float logit = 2.5f * bench::normal(slot * vocab + token, seed);
    if ((token * 2654435761u + slot * 40503u) % 4001 == 7) logit += 5.0f;
    logits[i] = logit + (noise > 0.0f ? noise * bench::normal(i, seed + 1) : 0.0f);
  }
}

struct cell {
  std::ptrdiff_t sequences, vocab;
  const char* name;
  sampler_options sampler;
  std::ptrdiff_t slots() const { return sequences * (drafted_each + 1); }
  std::ptrdiff_t drafted() const { return sequences * drafted_each; }
};

/// One round's inputs, drafted by sample(), and its outputs.
struct device_round {
  specattn::buffer<float, device> target, draft;
  specattn::buffer<std::int32_t, device> tokens, offsets, accepted, next;
  specattn::buffer<sampler_options, device> samplers;
  specattn::buffer<std::int64_t, device> positions;
  specattn::verify_args<device> args;

  device_round(const cell& c, std::uint64_t seed, specattn::context<device>& ctx)
      : target(static_cast<std::size_t>(c.slots() * c.vocab)),
        draft(static_cast<std::size_t>(c.drafted() * c.vocab)),
        tokens(static_cast<std::size_t>(c.drafted())),
        offsets(static_cast<std::size_t>(c.sequences + 1)),
        accepted(static_cast<std::size_t>(c.sequences)),
        next(accepted.size()),
        samplers(static_cast<std::size_t>(c.slots())),
        positions(samplers.size()) {
    std::vector<std::int32_t> ends(offsets.size());
    for (std::size_t s = 0; s < ends.size(); ++s) ends[s] = static_cast<std::int32_t>(s) * (drafted_each + 1);
    std::vector<sampler_options> options(samplers.size(), c.sampler);
    std::vector<std::int64_t> places(positions.size());
    for (std::size_t i = 0; i < options.size(); ++i) options[i].seed = seed * 1000 + i;
    bench::check(cudaMemcpy(offsets.data(), ends.data(), offsets.bytes(), cudaMemcpyHostToDevice));
    bench::check(cudaMemcpy(samplers.data(), options.data(), samplers.bytes(), cudaMemcpyHostToDevice));
    bench::check(cudaMemcpy(positions.data(), places.data(), positions.bytes(), cudaMemcpyHostToDevice));
    const auto vocab = static_cast<std::size_t>(c.vocab);
    const specattn::buffer<float, device> drafts(draft.size());
    fill_logits<<<1024, 256, 0, ctx.stream()>>>(target.data(), static_cast<std::size_t>(c.slots()), vocab, 0, 0,
                                                seed);
    fill_logits<<<1024, 256, 0, ctx.stream()>>>(drafts.data(), tokens.size(), vocab, drafted_each, 0.5f, seed);
    const std::ptrdiff_t rows = c.drafted();
    ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, c.slots(), c.vocab));
    specattn::sample<device>(ctx, drafts.shaped({rows, c.vocab}), samplers.shaped({rows}), positions.shaped({rows}),
                             specattn::random_use::draft, draft.shaped({rows, c.vocab}), tokens.shaped({rows}));
    bench::check(cudaStreamSynchronize(ctx.stream()));
    args.target_logits = target.shaped({c.slots(), c.vocab});
    args.draft_probabilities = draft.shaped({rows, c.vocab});
    args.drafted = tokens.shaped({rows});
    args.slot_offsets = offsets.shaped({c.sequences + 1});
    args.samplers = samplers.shaped({c.sequences});
    args.positions = positions.shaped({c.sequences});
    args.accepted = accepted.shaped({c.sequences});
    args.next_token = next.shaped({c.sequences});
  }
};

template <class T>
std::vector<T> on_host(const specattn::buffer<T, device>& from) {
  std::vector<T> copy(from.size());
  bench::check(cudaMemcpy(copy.data(), from.data(), from.bytes(), cudaMemcpyDeviceToHost));
  return copy;
}

/// The round's outcome against the CPU's. Returns the tokens accepted.
std::vector<std::int32_t> validated(const device_round& got, const cell& c) {
  const auto target = on_host(got.target), draft = on_host(got.draft);
  const auto tokens = on_host(got.tokens), offsets = on_host(got.offsets);
  const auto samplers = on_host(got.samplers);
  const auto positions = on_host(got.positions);
  std::vector<std::int32_t> accepted(got.accepted.size()), next(accepted.size());
  specattn::context<specattn::cpu> ctx;
  ctx.reserve_workspace(specattn::verify_workspace_bytes(ctx, c.slots(), c.vocab));
  specattn::verify_args<> args;
  args.target_logits = {target.data(), {c.slots(), c.vocab}};
  args.draft_probabilities = {draft.data(), {c.drafted(), c.vocab}};
  args.drafted = {tokens.data(), {c.drafted()}};
  args.slot_offsets = {offsets.data(), {c.sequences + 1}};
  args.samplers = {samplers.data(), {c.sequences}};
  args.positions = {positions.data(), {c.sequences}};
  args.accepted = {accepted.data(), {c.sequences}};
  args.next_token = {next.data(), {c.sequences}};
  specattn::verify(ctx, args);
  if (accepted != on_host(got.accepted) || next != on_host(got.next)) {
    std::fprintf(stderr, "%s, %td sequences: the outcome is not the CPU's\n", c.name, c.sequences);
    std::exit(1);
  }
  return accepted;
}

void measure(const cell& c, specattn::context<device>& ctx, bench::device_clock& clock, double copy, bool smoke) {
  const double row_bytes = 4.0 * static_cast<double>(c.vocab);
  const int sets = smoke ? 1 : static_cast<int>(std::min(32.0, 2.0 + 128e6 / (row_bytes * double(c.slots()))));
  std::vector<std::unique_ptr<device_round>> data;
  for (int i = 0; i < sets; ++i) data.push_back(std::make_unique<device_round>(c, 5u + unsigned(i), ctx));
  specattn::verify(ctx, data[0]->args);
  bench::check(cudaStreamSynchronize(ctx.stream()));
  double kept = 0, rejected = 0;
  for (const std::int32_t accepted : validated(*data[0], c)) {
    kept += accepted;
    rejected += accepted < drafted_each ? 1 : 0;
  }
  if (smoke) return;
  const auto at = [&](int i) -> device_round& { return *data[static_cast<std::size_t>(i % sets)]; };
  const double verify_us = clock.net_us([&](int i) { specattn::verify(ctx, at(i).args); }, 4 * sets);
  const std::ptrdiff_t rows = c.sequences;  // one draft step of the batch
  const double sample_us = clock.net_us(
      [&](int i) {
        specattn::sample<device>(ctx, at(i).args.target_logits.slice(0, rows), at(i).args.samplers,
                                 at(i).args.positions, specattn::random_use::emit,
                                 at(i).draft.shaped({rows, c.vocab}), at(i).args.next_token);
      },
      4 * sets);
  // What has to be read: every logit, and a draft row for each sequence that rejected.
  const double bytes = row_bytes * (static_cast<double>(c.slots()) + (c.sampler.greedy() ? 0 : rejected));
  std::printf("| %td x %td | %td | %s | %.2f | %.1f | %.1f | %.1f | %.0f | %.0f %% | %.1f |\n", c.sequences,
              drafted_each + 1, c.vocab, c.name, kept / static_cast<double>(c.drafted()), bytes * 1e-6,
              bytes * 1e-3 / copy, verify_us, bytes * 1e-3 / verify_us, 100 * bytes * 1e-3 / verify_us / copy,
              sample_us);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (bench::no_device()) return bench::skipped;
  bench::opened_device opened(argc, argv);
  std::printf("copy: %.0f GB/s; times are graph replays less an empty node of %.2f us; inputs rotate, cold\n",
              opened.copy_gb_s, opened.clock.empty_us());
  std::printf(
      "| sequences x slots | vocab | sampler | accepted | MB | at copy speed us | verify us | GB/s | of copy | "
      "sample one "
      "step us |\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (const auto& [sequences, vocab] :
       {std::pair<std::ptrdiff_t, std::ptrdiff_t>{16, 128256}, {1, 128256}, {16, 32000}}) {
    measure({sequences, vocab, "greedy", {}}, opened.ctx, opened.clock, opened.copy_gb_s, opened.smoke);
    measure({sequences, vocab, "temperature 1", {1.0f, 0, 1.0f, 0.0f, 0}}, opened.ctx, opened.clock, opened.copy_gb_s,
            opened.smoke);
    measure({sequences, vocab, "temperature 0.7, top-p 0.9", {0.7f, 0, 0.9f, 0.0f, 0}}, opened.ctx, opened.clock,
            opened.copy_gb_s, opened.smoke);
    measure({sequences, vocab, "temperature 0.7, top-k 50, top-p 0.9", {0.7f, 50, 0.9f, 0.0f, 0}}, opened.ctx,
            opened.clock, opened.copy_gb_s, opened.smoke);
    if (opened.smoke) break;
  }
  return 0;
}
