// One row of logits on the device: its peak, its truncated distribution, a draw from it. All sums are whole numbers of
// quanta, so that they are the CPU's whatever the order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../sampling.hpp"
#include "../../view.hpp"
#include "team.cuh"

#include "../../words_begin.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

inline constexpr std::int32_t sampling_stride = 128;  // elements a warp works on at a time, four a lane

/// Elements of a warp's segment when `members` CTAs share a row.
SPECATTN_HD constexpr std::int32_t segment_length(std::ptrdiff_t vocab, int members) {
  const std::ptrdiff_t parts = std::ptrdiff_t{members} * sampling_warps * sampling_stride;
  return static_cast<std::int32_t>((vocab + parts - 1) / parts) * sampling_stride;
}

/// The row as one warp of the team sees it: a segment of adjacent tokens, kept where all its lanes can read it.
class sampled_row {
 public:
  /// \param room this CTA's, sampling_warps * segment floats, 16-byte aligned; not used by read<false>() and peak()
  __device__ sampled_row(sampling_team& team, float* room, std::ptrdiff_t vocab) : team_(team) {
    const std::int32_t segment = segment_length(vocab, team.size());
    first_ = (team.rank() * sampling_warps + team.warp()) * segment;
    const std::ptrdiff_t left = vocab - first_;
    tokens_ = static_cast<std::int32_t>(left < 0 ? 0 : left < segment ? left : segment);
    padded_ = (tokens_ + sampling_stride - 1) / sampling_stride * sampling_stride;
    row_ = room + team.warp() * segment;
  }

  /// Reads this warp's logits for peak(); with Keep, they are kept for make_weights().
  template <bool Keep>
  __device__ void read(view<const float, 1, cuda> logits) {
    best_ = -INFINITY;
    at_ = INT32_MAX;
    usable_ = true;
    const float* from = logits.data() + first_ * logits.stride(0);
    if (logits.stride(0) == 1 && reinterpret_cast<std::uintptr_t>(from) % sizeof(float4) == 0) {
      read_fours<Keep>(from);
    } else {
      read_ones<Keep>(from, logits.stride(0));
    }
    __syncwarp();
  }

  /// The likeliest token, or no_token where the row has no distribution.
  __device__ std::int32_t peak() {
    // Larger logits have larger keys, and smaller tokens among equals; zeros are equal.
    const std::uint32_t bits = __float_as_uint(best_ + 0.0f);
    const std::uint32_t order = bits ^ (bits >> 31 != 0 ? ~0u : 0x80000000u);
    std::uint64_t key = static_cast<std::uint64_t>(order) << 32 | ~static_cast<std::uint32_t>(at_);
    key = team_.largest(usable_ ? key : ~std::uint64_t{0});
    const auto top = static_cast<std::uint32_t>(key >> 32);
    largest_ = __uint_as_float(top ^ (top >> 31 != 0 ? 0x80000000u : ~0u));
    return key == ~std::uint64_t{0} || largest_ == -INFINITY
               ? no_token
               : static_cast<std::int32_t>(~static_cast<std::uint32_t>(key));
  }

  /// Turns the kept logits into weights, truncated. Returns how many quanta they sum to.
  __device__ std::uint64_t make_weights(const sampler_options& options, std::ptrdiff_t vocab) {
    inverse_ = inverse_temperature(options.temperature);
    cut_ = {};
    std::uint64_t total = measure<true>([&](float& logit, std::int32_t) {
      logit = sampling_weight(logit, largest_, inverse_);
      return quanta(logit);
    });
    const auto kept = [&](float weight, std::int32_t token) {
      return cut_.keeps(weight_bits(weight), token) ? quanta(weight) : 0;
    };
    if (options.top_k > 0 && options.top_k < vocab) {
      cut_ = head_end<false>(static_cast<std::uint64_t>(options.top_k));
      if (options.top_p < 1.0f) total = measure<false>(kept);
    }
    if (options.top_p < 1.0f) {
      const double goal = ceil(static_cast<double>(options.top_p) * static_cast<double>(total));
      cut_ = head_end<true>(goal >= 1.0 ? static_cast<std::uint64_t>(goal) : 1);  // at least one token
    }
    if (options.min_p > 0.0f) {
      const std::uint32_t bits = weight_bits(options.min_p < 1.0f ? options.min_p : 1.0f);
      if (bits > cut_.bits) cut_ = {bits};
    }
    return cut_.bits == 0 ? total : measure<false>(kept);
  }

  /// After make_weights(): a token's weight.
  __device__ float weight(float logit, std::int32_t token) const {
    const float whole = sampling_weight(logit, largest_, inverse_);
    return cut_.keeps(weight_bits(whole), token) ? whole : 0.0f;
  }

  /// weights = residual(weights * scale, draft). Returns how many quanta they sum to.
  __device__ std::uint64_t leave_residual(view<const float, 1, cuda> draft, float scale) {
    const std::uint64_t total = measure<true>([&](float& weight, std::int32_t token) {
      const float target = cut_.keeps(weight_bits(weight), token) ? product(weight, scale) : 0.0f;
      weight = token < first_ + tokens_ ? residual(target, draft[token]) : 0.0f;
      return quanta(weight);
    });
    cut_ = {};
    return total;
  }

  /// The first token at which the running sum of weights exceeds `share` of `total`, the last measure of them; the last
  /// of positive weight where rounding denies it. For the warp that has it; the others get no_token.
  __device__ std::int32_t draw(double share, std::uint64_t total) const {
    const auto below = static_cast<std::uint64_t>(share * static_cast<double>(total));
    return find(below < total ? below + 1 : total, [&](float weight, std::int32_t token) {
      return cut_.keeps(weight_bits(weight), token) ? quanta(weight) : 0;
    });
  }

  /// visit(token, weight) for this lane's tokens.
  template <class Visit>
  __device__ void for_each(Visit visit) const {
    for (std::int32_t i = team_.lane(); i < tokens_; i += 32) {
      const float weight = row_[i];
      visit(first_ + i, cut_.keeps(weight_bits(weight), first_ + i) ? weight : 0.0f);
    }
  }

 private:
  template <bool Keep>
  __device__ void read_fours(const float* from) {
    constexpr int ahead = 4;  // loads in flight
    const auto* fours = reinterpret_cast<const float4*>(from);
    auto* row = reinterpret_cast<float4*>(row_);
    const std::int32_t whole = tokens_ / 4;
    std::int32_t i = team_.lane();
    for (; i + (ahead - 1) * 32 < whole; i += ahead * 32) {
      float4 part[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j) part[j] = __ldcs(fours + i + j * 32);
#pragma unroll
      for (int j = 0; j < ahead; ++j) take<Keep>(part[j], row, i + j * 32);
    }
    for (; i < padded_ / 4; i += 32) {
      float4 one = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (i < whole) one = fours[i];
      if (i == whole) {
        if (tokens_ % 4 > 0) one.x = from[whole * 4];
        if (tokens_ % 4 > 1) one.y = from[whole * 4 + 1];
        if (tokens_ % 4 > 2) one.z = from[whole * 4 + 2];
      }
      take<Keep>(one, row, i);
    }
  }
  template <bool Keep>
  __device__ void take(float4 four, float4* row, std::int32_t i) {
    see(four.x, i * 4);
    see(four.y, i * 4 + 1);
    see(four.z, i * 4 + 2);
    see(four.w, i * 4 + 3);
    if (Keep) row[i] = four;
  }
  template <bool Keep>
  __device__ void read_ones(const float* from, std::ptrdiff_t stride) {
    for (std::int32_t i = team_.lane(); i < padded_; i += 32) {
      const float one = i < tokens_ ? from[i * stride] : -INFINITY;
      see(one, i);
      if (Keep) row_[i] = one;
    }
  }
  __device__ void see(float logit, std::int32_t i) {
    usable_ = usable_ && usable_logit(logit);
    at_ = logit > best_ ? first_ + i : at_;
    best_ = logit > best_ ? logit : best_;
  }

  /// amount(element, token) summed over the row; with Change, it may change the element.
  template <bool Change, class Amount>
  __device__ std::uint64_t measure(Amount amount) {
    std::uint64_t sum = 0;
    auto* row = reinterpret_cast<float4*>(row_);
    for (std::int32_t i = team_.lane(); i < padded_ / 4; i += 32) {
      float4 four = row[i];
      const std::int32_t token = first_ + i * 4;
      sum +=
          amount(four.x, token) + amount(four.y, token + 1) + amount(four.z, token + 2) + amount(four.w, token + 3);
      if (Change) row[i] = four;
    }
    return team_.sum(sum, mine_, before_);
  }

  /// visit(weight, bits, amount) for kept elements >= bound. Amounts are quanta or ones.
  template <bool ByMass, class Visit>
  __device__ void for_each_kept(float bound, Visit visit) const {
    const auto* row = reinterpret_cast<const float4*>(row_);
    for (std::int32_t i = team_.lane(); i < padded_ / 4; i += 32) {
      const float4 four = row[i];
      const float part[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (part[j] < bound || !cut_.keeps(weight_bits(part[j]), first_ + i * 4 + j)) continue;
        visit(part[j], weight_bits(part[j]), ByMass ? quanta(part[j]) : 1);
      }
    }
  }

  /// The end of the shortest head of the order whose mass or count reaches `goal`; all where even the row does not.
  template <bool ByMass>
  __device__ truncation head_end(std::uint64_t goal) {
    constexpr float near = 0x1p-7f, far = 0x1p-15f;  // most heads end above: fewer tokens to count
    std::uint64_t above[2] = {};
    for_each_kept<ByMass>(far, [&](float weight, std::uint32_t, std::uint64_t amount) {
      above[0] += weight >= near ? amount : 0;
      above[1] += amount;
    });
    team_.sum(above);
    std::uint32_t low = weight_bits(above[0] >= goal ? near : above[1] >= goal ? far : weight_quantum);
    std::uint32_t high = weight_bits(1.0f) + 1;
    std::uint64_t ahead = 0;
    for (;;) {  // narrows [low, high) until it is one number
      const int width = 32 - __clz(static_cast<int>(high - 1 - low)), shift = width > 9 ? width - 9 : 0;
      team_.clear();
      for_each_kept<ByMass>(__uint_as_float(low), [&](float, std::uint32_t bits, std::uint64_t amount) {
        if (bits < high) team_.add((bits - low) >> shift, amount);
      });
      team_.merge();
      const std::int32_t bin = team_.bin_that_reaches(goal, ahead);
      if (bin < 0) return cut_;
      low += static_cast<std::uint32_t>(bin) << shift;
      high = low + (1u << shift) < high ? low + (1u << shift) : high;
      if (shift == 0)
        return among_equals(low, team_.merged(bin), ByMass ? quanta(__uint_as_float(low)) : 1, goal - ahead);
    }
  }

  /// The end of a head within tokens of equal weight: their amounts sum to `all`, and reach `goal` at its last.
  __device__ truncation among_equals(std::uint32_t bits, std::uint64_t all, std::uint64_t each, std::uint64_t goal) {
    const std::uint64_t needed = (goal - 1) / each + 1;
    if (needed * each == all) return cut_.bits == bits ? cut_ : truncation{bits};
    const auto equal = [&](float weight, std::int32_t token) {
      return weight_bits(weight) == bits && cut_.keeps(bits, token) ? std::uint64_t{1} : 0;
    };
    measure<false>(equal);
    const std::int32_t token = find(needed, equal);
    return {bits, team_.tell(team_.lane() == 0 ? token : no_token)};
  }

  /// The token at which the running sum of amounts reaches `goal`, in the warp that has it; no_token in others. After
  /// measure() of the same amounts.
  template <class Amount>
  __device__ std::int32_t find(std::uint64_t goal, Amount amount) const {
    if (before_ >= goal || before_ + mine_ < goal) return no_token;
    std::uint64_t before = before_;
    for (std::int32_t begin = 0; begin < padded_; begin += 32) {
      const std::int32_t i = begin + team_.lane();
      std::uint64_t upto = amount(row_[i], first_ + i);
      for (int distance = 1; distance < 32; distance *= 2) {
        const std::uint64_t other = __shfl_up_sync(~0u, upto, static_cast<unsigned>(distance));
        if (team_.lane() >= distance) upto += other;
      }
      const std::uint32_t reached = __ballot_sync(~0u, before + upto >= goal);
      if (reached != 0) return first_ + begin + __ffs(static_cast<int>(reached)) - 1;
      before += __shfl_sync(~0u, upto, 31);
    }
    return no_token;
  }

  sampling_team& team_;
  float* row_;
  std::int32_t first_, tokens_,
      padded_;  // of the segment: its first token, how many there are, and room for how many
  float best_ = 0.0f, largest_ = 0.0f, inverse_ = 0.0f;
  std::int32_t at_ = 0;
  bool usable_ = true;
  truncation cut_;
  std::uint64_t mine_ = 0, before_ = 0;  // the last measure: of this warp, of the warps before it
};

}  // namespace specattn::inline SPECATTN_CODE::detail

#include "../../words_end.hpp"
