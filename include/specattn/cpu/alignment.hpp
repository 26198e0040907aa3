// Fitting an alignment on the cpu: divergences between attention rows, and mixtures by expectation–maximisation. Both are
// products of matrices, which Eigen multiplies; tasks are cut alike for any number of threads.
#pragma once

#if defined(__CUDACC__) && !defined(EIGEN_NO_CUDA)
#define EIGEN_NO_CUDA  // only host code here; nvcc warns of Eigen's annotations. For Eigen in kernels include it before
#define SPECATTN_EIGEN_NO_CUDA
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // g++ 12 on Eigen's AVX-512 intrinsics, as on ours (lanes.hpp)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"  // what they say under a sanitizer
#endif
#include <Eigen/Core>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#if defined(SPECATTN_EIGEN_NO_CUDA)
#undef EIGEN_NO_CUDA
#undef SPECATTN_EIGEN_NO_CUDA
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../alignment.hpp"
#include "../error.hpp"
#include "../view.hpp"
#include "context.hpp"

namespace specattn::inline SPECATTN_CODE {
namespace detail {

/// Copies a row scaled to unit mass; a row without mass becomes zeros. False where a weight is negative, infinite or
/// NaN.
inline bool copy_normalised(view<const float, 1> row, float* out) {
  double mass = 0.0;
  bool sound = true;
  for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) {
    out[i] = row[i];
    mass += static_cast<double>(out[i]);
    sound = sound && out[i] >= 0.0f;
  }
  if (!sound || !std::isfinite(mass)) return false;
  if (mass > 0.0) {
    for (std::ptrdiff_t i = 0; i < row.extent(0); ++i) {
      out[i] = static_cast<float>(static_cast<double>(out[i]) / mass);
    }
  }
  return true;
}

using float_rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using double_rows = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Rows in the caller's memory, `stride` apart.
using mapped_rows = Eigen::Map<const float_rows, Eigen::Unaligned, Eigen::OuterStride<>>;

/// Positions whose products are summed in float, before the sums are added in double.
inline constexpr std::ptrdiff_t product_stretch = 512;

/// Sum of products. Runs over independent lanes, which compilers turn into vector code, added up in one fixed order.
inline double dot(const float* a, const float* b, std::ptrdiff_t length) {
  constexpr std::ptrdiff_t lanes = 16, stretch = 32 * lanes;
  double total = 0.0;
  for (std::ptrdiff_t first = 0; first < length; first += stretch) {
    const std::ptrdiff_t end = (std::min)(first + stretch, length);
    float sums[lanes] = {};
    std::ptrdiff_t i = first;
    for (; i + lanes <= end; i += lanes) {
      for (std::ptrdiff_t j = 0; j < lanes; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (std::ptrdiff_t j = 0; i + j < end; ++j) sums[j] += a[i + j] * b[i + j];
    for (std::ptrdiff_t j = 0; j < lanes; ++j) total += static_cast<double>(sums[j]);
  }
  return total;
}

}  // namespace detail

template <>
class divergence_accumulator<cpu> {
 public:
  divergence_accumulator(std::int32_t target_rows, std::int32_t draft_rows)
      : targets_(target_rows), drafts_(draft_rows) {
    detail::check_divergence_rows(targets_, drafts_);
    sums_.resize(static_cast<std::size_t>(targets_ * drafts_));
    entropies_.resize(static_cast<std::size_t>(targets_));
  }

  static std::size_t workspace_bytes(std::int32_t, std::int32_t, std::ptrdiff_t) { return 0; }

  void add(context<cpu>& ctx, view<const float, 2> target, view<const float, 2> draft) {
    const std::ptrdiff_t length = target.extent(1), rows = targets_ + drafts_;
    detail::check_divergence_sample<cpu>(targets_, drafts_, target, draft);
    rows_.resize(static_cast<std::size_t>(rows * length));
    for (std::ptrdiff_t r = 0; r < rows; ++r) {
      float* const out = rows_.data() + r * length;
      detail::expects(detail::copy_normalised(r < targets_ ? target[r] : draft[r - targets_], out),
                      "divergence: ", r < targets_ ? "target" : "draft", " row ", r < targets_ ? r : r - targets_,
                      " holds a weight that is negative or no number");
      detail::expects(r >= targets_ || std::any_of(out, out + length, [](float w) { return w > 0.0f; }),
                      "divergence: target row ", r, " has no mass");
    }
    ctx.parallel_for(rows, [&](std::ptrdiff_t r, int) { take_logarithms(r, rows_.data() + r * length, length); });
    const std::ptrdiff_t draft_blocks = (drafts_ + draft_block - 1) / draft_block;
    const std::ptrdiff_t target_blocks = (targets_ + target_block - 1) / target_block;
    ctx.parallel_for(target_blocks * draft_blocks, [&](std::ptrdiff_t block, int) {
      add_block(block / draft_blocks * target_block, block % draft_blocks * draft_block, length);
    });
    ++samples_;
  }

  std::int64_t samples() const { return samples_; }
  std::vector<float> mean() const {
    std::vector<float> means(sums_.size());
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      const double mean = samples_ > 0 ? sums_[i] / static_cast<double>(samples_) : 0.0;
      means[i] = static_cast<float>((std::max)(mean, 0.0));  // rounding must not leave a negative divergence
    }
    return means;
  }

 private:
  /// Of a target row its sum of p log p; a draft row is replaced by its logarithms.
  void take_logarithms(std::ptrdiff_t r, float* row, std::ptrdiff_t length) {
    if (r >= targets_) {
      for (std::ptrdiff_t i = 0; i < length; ++i) row[i] = std::log((std::max)(row[i], detail::divergence_floor));
      return;
    }
    double sum = 0.0;
    for (std::ptrdiff_t i = 0; i < length; ++i) {
      if (row[i] > 0.0f) sum += static_cast<double>(row[i]) * static_cast<double>(std::log(row[i]));
    }
    entropies_[static_cast<std::size_t>(r)] = sum;
  }

  static constexpr std::ptrdiff_t target_block = 16, draft_block = 32;  // rows of a task

  /// Adds the sample's divergences between a block of target rows and one of draft rows.
  void add_block(std::ptrdiff_t target, std::ptrdiff_t draft, std::ptrdiff_t length) {
    const std::ptrdiff_t targets = (std::min)(target_block, targets_ - target);
    const std::ptrdiff_t drafts = (std::min)(draft_block, drafts_ - draft);
    detail::double_rows sums = detail::double_rows::Zero(targets, drafts);
    detail::float_rows part(targets, drafts);
    for (std::ptrdiff_t first = 0; first < length; first += detail::product_stretch) {
      const std::ptrdiff_t count = (std::min)(detail::product_stretch, length - first);
      const detail::mapped_rows p(rows_.data() + target * length + first, targets, count,
                                  Eigen::OuterStride<>(length));
      const detail::mapped_rows log_q(rows_.data() + (targets_ + draft) * length + first, drafts, count,
                                      Eigen::OuterStride<>(length));
      part.noalias() = p * log_q.transpose();
      sums += part.cast<double>();
    }
    for (std::ptrdiff_t j = 0; j < targets; ++j) {
      for (std::ptrdiff_t i = 0; i < drafts; ++i) {
        sums_[static_cast<std::size_t>((target + j) * drafts_ + draft + i)] +=
            entropies_[static_cast<std::size_t>(target + j)] - sums(j, i);
      }
    }
  }

  std::ptrdiff_t targets_;
  std::ptrdiff_t drafts_;
  std::vector<double> sums_;
  std::vector<double> entropies_;
  std::vector<float> rows_;  // of the sample at hand
  std::int64_t samples_ = 0;
};

template <>
class mixture_fit<cpu> {
 public:
  mixture_fit(std::int32_t groups, std::int32_t shared_signals, std::int32_t own_signals)
      : groups_(groups), shared_(shared_signals), own_(own_signals) {
    detail::check_mixture(groups_, shared_, own_);
  }

  void add(context<cpu>&, view<const float, 2> target, view<const float, 2> shared, view<const float, 3> own) {
    const std::ptrdiff_t length = target.extent(1);
    detail::check_mixture_sample<cpu>(groups_, shared_, own_, target, shared, own);
    sample s{length, std::vector<float>(static_cast<std::size_t>((groups_ + shared_ + groups_ * own_) * length))};
    float* out = s.rows.data();
    const auto take = [&](view<const float, 1> row, const char* what, std::ptrdiff_t number) {
      detail::expects(detail::copy_normalised(row, out), "mixture_fit: ", what, " ", number,
                      " holds a weight that is negative or no number");
      out += length;
    };
    for (std::ptrdiff_t g = 0; g < groups_; ++g) take(target[g], "target", g);
    for (std::ptrdiff_t i = 0; i < shared_; ++i) take(shared[i], "shared signal", i);
    for (std::ptrdiff_t g = 0; g < groups_; ++g) {
      for (std::ptrdiff_t i = 0; i < own_; ++i) take(own[g][i], "a signal of group", g);
    }
    samples_.push_back(std::move(s));
  }

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const sample& s : samples_) sum += s.rows.size() * sizeof(float);
    return sum;
  }

  mixture_result solve(context<cpu>& ctx, std::int32_t max_iterations = 500, float tolerance = 1e-4f) const {
    detail::expects(!samples_.empty(), "mixture_fit: no samples to fit");
    std::vector<detail::mixture_search> searches(
        static_cast<std::size_t>(groups_),
        {static_cast<std::size_t>(shared_ + own_), max_iterations, static_cast<double>(tolerance)});
    ctx.parallel_for((groups_ + group_block - 1) / group_block, [&](std::ptrdiff_t block, int) {
      search_block(searches, block * group_block, (std::min)(groups_, (block + 1) * group_block));
    });
    return detail::collect(searches);
  }

 private:
  struct sample {
    std::ptrdiff_t length;
    std::vector<float> rows;  // targets [groups], shared signals, own signals [groups, own], each [length]
  };
  static constexpr std::ptrdiff_t group_block = 16;  // groups of a task, which read the samples together

  /// A group whose search goes on, and what it asks for.
  struct reading {
    std::ptrdiff_t group;
    detail::mixture_trial* at;
  };

  /// The rows of a sample, from a position on.
  detail::mapped_rows rows(const sample& s, std::ptrdiff_t row, std::ptrdiff_t n, std::ptrdiff_t first,
                           std::ptrdiff_t count) const {
    return {s.rows.data() + row * s.length + first, n, count, Eigen::OuterStride<>(s.length)};
  }
  std::ptrdiff_t own_row(std::ptrdiff_t g) const { return groups_ + shared_ + g * own_; }

  void search_block(std::vector<detail::mixture_search>& searches, std::ptrdiff_t begin, std::ptrdiff_t end) const;
  void evaluate(const std::vector<reading>& readings) const;
  void evaluate_stretch(const sample& s, const std::vector<reading>& readings, const detail::float_rows& coefficients,
                        std::ptrdiff_t first, std::ptrdiff_t count, detail::double_rows& gains) const;

  std::ptrdiff_t groups_;
  std::ptrdiff_t shared_;
  std::ptrdiff_t own_;
  std::vector<sample> samples_;
};

/// Runs the searches of a block of groups to their ends, each reading of the samples for all that go on.
inline void mixture_fit<cpu>::search_block(std::vector<detail::mixture_search>& searches, std::ptrdiff_t begin,
                                           std::ptrdiff_t end) const {
  std::vector<reading> readings;
  while (true) {
    readings.clear();
    for (std::ptrdiff_t g = begin; g < end; ++g) {
      detail::mixture_search& search = searches[static_cast<std::size_t>(g)];
      if (!search.done()) readings.push_back({g, &search.pending()});
    }
    if (readings.empty()) return;
    evaluate(readings);
    for (const reading& one : readings) searches[static_cast<std::size_t>(one.group)].take();
  }
}

/// The mean divergence of each group's mixture and its gains.
inline void mixture_fit<cpu>::evaluate(const std::vector<reading>& readings) const {
  const auto active = static_cast<std::ptrdiff_t>(readings.size());
  detail::float_rows coefficients(active, shared_ + own_);
  detail::double_rows gains = detail::double_rows::Zero(active, shared_ + own_);
  for (std::ptrdiff_t a = 0; a < active; ++a) {
    detail::mixture_trial& at = *readings[static_cast<std::size_t>(a)].at;
    at.divergence = 0.0;
    coefficients.row(a) =
        Eigen::Map<const Eigen::RowVectorXd>(at.coefficients.data(), shared_ + own_).template cast<float>();
  }
  for (const sample& s : samples_) {
    for (std::ptrdiff_t first = 0; first < s.length; first += detail::product_stretch) {
      evaluate_stretch(s, readings, coefficients, first, (std::min)(detail::product_stretch, s.length - first),
                       gains);
    }
  }
  for (std::ptrdiff_t a = 0; a < active; ++a) {
    detail::mixture_trial& at = *readings[static_cast<std::size_t>(a)].at;
    for (std::ptrdiff_t i = 0; i < shared_ + own_; ++i)
      at.gain[static_cast<std::size_t>(i)] = gains(a, i) / static_cast<double>(samples_.size());
    at.divergence /= static_cast<double>(samples_.size());
  }
}

inline void mixture_fit<cpu>::evaluate_stretch(const sample& s, const std::vector<reading>& readings,
                                               const detail::float_rows& coefficients, std::ptrdiff_t first,
                                               std::ptrdiff_t count, detail::double_rows& gains) const {
  const auto active = static_cast<std::ptrdiff_t>(readings.size());
  const detail::mapped_rows shared = rows(s, groups_, shared_, first, count);
  detail::float_rows ratio(active, count);
  ratio.noalias() = coefficients.leftCols(shared_) * shared;
  float logarithms[detail::product_stretch];
  for (std::ptrdiff_t a = 0; a < active; ++a) {
    const reading& one = readings[static_cast<std::size_t>(a)];
    const detail::mapped_rows own = rows(s, own_row(one.group), own_, first, count);
    if (own_ > 0) ratio.row(a).noalias() += coefficients.row(a).rightCols(own_) * own;
    const float* const goal = s.rows.data() + one.group * s.length + first;
    float* const row = ratio.data() + a * count;
    for (std::ptrdiff_t k = 0; k < count; ++k) {
      row[k] = goal[k] / (row[k] > detail::divergence_floor ? row[k] : detail::divergence_floor);
      logarithms[k] = row[k] > 0.0f ? row[k] : 1.0f;
    }
    for (std::ptrdiff_t k = 0; k < count; ++k) logarithms[k] = detail::logarithm(logarithms[k]);
    one.at->divergence += detail::dot(goal, logarithms, count);
    for (std::ptrdiff_t i = 0; i < own_; ++i)
      gains(a, shared_ + i) += detail::dot(row, own.data() + i * s.length, count);
  }
  detail::float_rows part(active, shared_);
  part.noalias() = ratio * shared.transpose();
  gains.leftCols(shared_) += part.cast<double>();
}

}  // namespace specattn::inline SPECATTN_CODE
