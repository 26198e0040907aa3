// Fitting an alignment on the device: rows are normalised, compared and mixed there; the search for the coefficients, a
// few numbers a group, stays on the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../alignment.hpp"
#include "alignment/kernels.cuh"
#include "context.cuh"

#include "../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

template <>
class divergence_accumulator<cuda> {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows)
      : targets_(target_rows), drafts_(draft_rows) {
    detail::check_divergence_rows(targets_, drafts_);
    sums_ = buffer<double, cuda>(static_cast<std::size_t>(targets_ * drafts_));
    state_ = buffer<detail::divergence_state, cuda>(1);
  }

  static std::size_t workspace_bytes(std::int32_t target_rows, std::int32_t draft_rows, std::ptrdiff_t length) {
    const auto targets = static_cast<std::size_t>(target_rows), drafts = static_cast<std::size_t>(draft_rows);
    return targets * drafts * splits(length) * sizeof(double) + targets * sizeof(double) +
           (targets + drafts) * (sizeof(detail::row_status) + static_cast<std::size_t>(length) * sizeof(float));
  }

  void add(context<cuda>& ctx, view<const float, 2, cuda> target, view<const float, 2, cuda> draft) {
    const std::ptrdiff_t length = target.extent(1);
    detail::check_divergence_sample<cuda>(targets_, drafts_, target, draft);
    const auto need =
        workspace_bytes(static_cast<std::int32_t>(targets_), static_cast<std::int32_t>(drafts_), length);
    auto* const parts = reinterpret_cast<double*>(ctx.workspace(need, "divergence"));
    auto* const entropies = parts + targets_ * drafts_ * static_cast<std::ptrdiff_t>(splits(length));
    auto* const status = reinterpret_cast<detail::row_status*>(entropies + targets_);
    auto* const rows = reinterpret_cast<float*>(status + targets_ + drafts_);
    stream_ = ctx.stream();
    detail::normalise<detail::row_form::target>(ctx, {detail::one_each(target), rows, status, entropies});
    detail::normalise<detail::row_form::logarithm>(
        ctx, {detail::one_each(draft), rows + targets_ * length, status + targets_, nullptr});
    const detail::divergence_launch launch{targets_,     drafts_,
                                           length,       static_cast<std::ptrdiff_t>(splits(length)),
                                           rows,         rows + targets_ * length,
                                           entropies,    status,
                                           parts,        sums_.data(),
                                           state_.data()};
    const auto tiles = [](std::ptrdiff_t count) {
      return static_cast<unsigned>((count - 1) / detail::divergence_tile + 1);
    };
    if (length > 0)
      start(ctx, detail::divergence_kernel, dim3(tiles(drafts_), tiles(targets_), unsigned(launch.splits)), launch);
    start(ctx, detail::accumulate_kernel,
          dim3(static_cast<unsigned>((targets_ * drafts_ - 1) / detail::alignment_threads + 1)), launch);
  }

  std::int64_t samples() const { return state().samples; }

  std::vector<float> mean() const {
    const detail::divergence_state now = state();
    const std::ptrdiff_t row = now.broken_row - 1;
    detail::expects(
        row < 0, "divergence: ", row < targets_ ? "target" : "draft", " row ", row < targets_ ? row : row - targets_,
        now.broken_status == detail::row_status::massless ? " has no mass"
                                                          : " holds a weight that is negative or no number");
    std::vector<double> sums(sums_.size());
    detail::check_cuda(cudaMemcpyAsync(sums.data(), sums_.data(), sums_.bytes(), cudaMemcpyDeviceToHost, stream_),
                       "divergence");
    detail::check_cuda(cudaStreamSynchronize(stream_), "divergence");
    std::vector<float> means(sums.size());
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const double mean = now.samples > 0 ? sums[i] / static_cast<double>(now.samples) : 0.0;
      means[i] = static_cast<float>((std::max)(mean, 0.0));  // rounding must not leave a negative divergence
    }
    return means;
  }

 private:
  static std::size_t splits(std::ptrdiff_t length) {
    return static_cast<std::size_t>((length + detail::divergence_split - 1) / detail::divergence_split);
  }
  static void start(context<cuda>& ctx, void (*kernel)(detail::divergence_launch), dim3 grid,
                    const detail::divergence_launch& launch) {
    detail::start_kernel(ctx, kernel, grid, detail::alignment_threads, launch, "divergence");
  }
  detail::divergence_state state() const {
    detail::divergence_state now{};
    detail::check_cuda(cudaMemcpyAsync(&now, state_.data(), sizeof now, cudaMemcpyDeviceToHost, stream_),
                       "divergence");
    detail::check_cuda(cudaStreamSynchronize(stream_), "divergence");
    return now;
  }

  std::ptrdiff_t targets_;
  std::ptrdiff_t drafts_;
  buffer<double, cuda> sums_;
  buffer<detail::divergence_state, cuda> state_;
  cudaStream_t stream_ = nullptr;  // of the last add()
};

template <>
class mixture_fit<cuda> {
 public:
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals)
      : groups_(groups), shared_(shared_signals), own_(own_signals) {
    detail::check_mixture(groups_, shared_, own_);
  }

  void add(context<cuda>& ctx, view<const float, 2, cuda> target, view<const float, 2, cuda> shared,
           view<const float, 3, cuda> own) {
    const std::ptrdiff_t length = target.extent(1), rows = groups_ + shared_ + groups_ * own_;
    detail::check_mixture_sample<cuda>(groups_, shared_, own_, target, shared, own);
    sample s{length, buffer<float, cuda>(static_cast<std::size_t>(rows * length)),
             buffer<detail::row_status, cuda>(static_cast<std::size_t>(rows))};
    const auto take = [&](view<const float, 3, cuda> from, std::ptrdiff_t first) {
      detail::normalise<detail::row_form::plain>(
          ctx, {from, s.rows.data() + first * length, s.status.data() + first, nullptr});
    };
    take(detail::one_each(target), 0);
    if (shared_ > 0) take(detail::one_each(shared), groups_);
    if (own_ > 0) take(own, groups_ + shared_);
    samples_.push_back(std::move(s));
  }

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const sample& s : samples_) sum += s.rows.bytes();
    return sum;
  }

  mixture_result solve(context<cuda>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-4f) const {
    detail::expects(!samples_.empty(), "mixture_fit: no samples to fit");
    check_rows(ctx);
    std::vector<detail::mixture_search> searches(
        static_cast<std::size_t>(groups_),
        {static_cast<std::size_t>(shared_ + own_), max_iterations, static_cast<double>(tolerance)});
    board numbers(*this);
    while (std::any_of(searches.begin(), searches.end(), [](const auto& one) { return !one.done(); }))
      read_samples(ctx, searches, numbers);
    return detail::collect(searches);
  }

 private:
  struct sample {
    std::ptrdiff_t length;
    buffer<float, cuda> rows;  // targets [groups], shared signals, own signals [groups, own], each [length]
    buffer<detail::row_status, cuda> status;
  };
  /// What one reading of the samples passes between host and device.
  struct board {
    explicit board(const mixture_fit& fit) : values(static_cast<std::size_t>(fit.shared_ + fit.own_ + 1)) {
      for (const sample& s : fit.samples_)
        splits = (std::max)(splits, static_cast<std::size_t>((s.length - 1) / detail::mixture_split + 1));
      const auto groups = static_cast<std::size_t>(fit.groups_);
      coefficients = buffer<float, cuda>(groups * (values - 1));
      active = buffer<std::int32_t, cuda>(groups);
      parts = buffer<double, cuda>(groups * splits * values);
      readings = buffer<double, cuda>(groups * values);
    }
    std::size_t values;  // a group: its gains and its divergence
    std::size_t splits = 1;
    buffer<float, cuda> coefficients;
    buffer<std::int32_t, cuda> active;
    buffer<double, cuda> parts, readings;
  };

  /// Throws for the first broken row.
  void check_rows(context<cuda>& ctx) const {
    for (const sample& s : samples_) {
      std::vector<detail::row_status> status(s.status.size());
      detail::check_cuda(
          cudaMemcpyAsync(status.data(), s.status.data(), s.status.bytes(), cudaMemcpyDeviceToHost, ctx.stream()),
          "mixture_fit");
      detail::check_cuda(cudaStreamSynchronize(ctx.stream()), "mixture_fit");
      for (std::ptrdiff_t r = 0; r < static_cast<std::ptrdiff_t>(status.size()); ++r) {
        const bool target = r < groups_, shared = r < groups_ + shared_;
        detail::expects(status[static_cast<std::size_t>(r)] != detail::row_status::broken, "mixture_fit: ",
                        target   ? "target"
                        : shared ? "shared signal"
                                 : "a signal of group",
                        " ",
                        target   ? r
                        : shared ? r - groups_
                                 : (r - groups_ - shared_) / own_,
                        " holds a weight that is negative or no number");
      }
    }
  }

  /// Evaluates the pending trials of all searches that are not done, and lets them go on.
  void read_samples(context<cuda>& ctx, std::vector<detail::mixture_search>& searches, board& numbers) const {
    const std::size_t signals = numbers.values - 1;
    std::vector<float> coefficients;
    std::vector<std::int32_t> active;
    for (detail::mixture_search& one : searches) {
      active.push_back(one.done() ? 0 : 1);
      for (double c : one.pending().coefficients) coefficients.push_back(static_cast<float>(c));
    }
    const auto bring = [&](const auto& to, const auto& from) {
      detail::check_cuda(cudaMemcpyAsync(to.data(), from.data(), to.bytes(), cudaMemcpyHostToDevice, ctx.stream()),
                         "mixture_fit");
    };
    bring(numbers.coefficients, coefficients);
    bring(numbers.active, active);
    const detail::device_guard here(ctx.device());
    detail::check_cuda(cudaMemsetAsync(numbers.parts.data(), 0, numbers.parts.bytes(), ctx.stream()), "mixture_fit");
    const dim3 grid(static_cast<unsigned>(numbers.splits), static_cast<unsigned>(groups_));
    for (const sample& s : samples_) {
      const detail::mixture_launch launch{
          s.rows.data(),       s.length, groups_, shared_, own_, numbers.coefficients.data(), numbers.active.data(),
          numbers.parts.data()};
      detail::start_kernel(ctx, detail::mixture_kernel, grid, detail::alignment_threads, launch, "mixture_fit");
    }
    detail::queue_kernel(ctx, detail::gather_parts_kernel,
                         {.grid = dim3(static_cast<unsigned>(groups_)), .threads = detail::alignment_threads},
                         "mixture_fit", numbers.parts.data(), static_cast<std::ptrdiff_t>(numbers.values),
                         static_cast<std::ptrdiff_t>(numbers.splits), numbers.readings.data());
    std::vector<double> readings(numbers.readings.size());
    detail::check_cuda(cudaMemcpyAsync(readings.data(), numbers.readings.data(), numbers.readings.bytes(),
                                       cudaMemcpyDeviceToHost, ctx.stream()),
                       "mixture_fit");
    detail::check_cuda(cudaStreamSynchronize(ctx.stream()), "mixture_fit");
    const auto count = static_cast<double>(samples_.size());
    for (std::size_t g = 0; g < searches.size(); ++g) {
      if (searches[g].done()) continue;
      detail::mixture_trial& trial = searches[g].pending();
      for (std::size_t i = 0; i < signals; ++i) trial.gain[i] = readings[g * numbers.values + i] / count;
      trial.divergence = readings[g * numbers.values + signals] / count;
      searches[g].take();
    }
  }

  std::ptrdiff_t groups_;
  std::ptrdiff_t shared_;
  std::ptrdiff_t own_;
  std::vector<sample> samples_;
};

}  // namespace specattn::inline SPECATTN_CODE

#include "../words_end.hpp"
