// A shaped, strided, non-owning array whose type carries its backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend.hpp"

namespace specattn::inline SPECATTN_DATA {

/// One number for each dimension. A std::array that device code may index without special compiler flags.
template <int Rank>
struct dimensions {
  std::ptrdiff_t values[std::size_t{Rank}];
  [[gnu::always_inline]] SPECATTN_HD constexpr std::ptrdiff_t& operator[](std::ptrdiff_t d) { return values[d]; }
  [[gnu::always_inline]] SPECATTN_HD constexpr std::ptrdiff_t operator[](std::ptrdiff_t d) const { return values[d]; }
  [[gnu::always_inline]] friend constexpr bool operator==(const dimensions&, const dimensions&) = default;
};

/// `Rank` extents and strides over memory the caller owns. Strides count elements and may be anything, the last
/// one included; offsets are 64-bit. An empty view (no data) stands for "not wanted" where a parameter says so.
template <class T, int Rank, backend B = cpu>
class view {
  static_assert(Rank >= 1 && Rank <= 5, "a specattn::view has between one and five dimensions");

 public:
  using value_type = std::remove_const_t<T>;
  using element_type = T;
  using backend_type = B;
  using index = std::ptrdiff_t;
  static constexpr int rank = Rank;

  [[gnu::always_inline]] view() = default;

  /// Dense, last dimension fastest.
  [[gnu::always_inline]] SPECATTN_HD view(T* data, dimensions<Rank> extents) : data_(data), extents_(extents) {
    index stride = 1;
    for (int d = Rank - 1; d >= 0; --d) {
      strides_[d] = stride;
      stride *= extents[d];
    }
  }

  [[gnu::always_inline]] SPECATTN_HD view(T* data, dimensions<Rank> extents, dimensions<Rank> strides)
      : data_(data), extents_(extents), strides_(strides) {}

  /// A view of mutable elements is also a view of constant ones.
  template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
  // NOLINTNEXTLINE(google-explicit-constructor): as with pointers
  [[gnu::always_inline]] SPECATTN_HD view(const view<U, Rank, B>& other)
      : data_(other.data()), extents_(other.extents()), strides_(other.strides()) {}

  [[gnu::always_inline]] SPECATTN_HD T* data() const { return data_; }
  [[gnu::always_inline]] SPECATTN_HD index extent(int d) const { return extents_[d]; }
  [[gnu::always_inline]] SPECATTN_HD index stride(int d) const { return strides_[d]; }
  [[gnu::always_inline]] SPECATTN_HD dimensions<Rank> extents() const { return extents_; }
  [[gnu::always_inline]] SPECATTN_HD dimensions<Rank> strides() const { return strides_; }
  [[gnu::always_inline]] SPECATTN_HD bool empty() const { return data_ == nullptr; }
  [[gnu::always_inline]] SPECATTN_HD index size() const {
    index product = 1;
    for (index e : extents_.values) product *= e;
    return product;
  }

  /// Element (i, j, …). Not checked.
  template <class... Index>
    requires(sizeof...(Index) == Rank)
  [[gnu::always_inline]] SPECATTN_HD T& operator()(Index... i) const {
    return data_[offset(dimensions<Rank>{static_cast<index>(i)...})];
  }

  /// What lies at index i of the first dimension, one rank lower.
  [[gnu::always_inline]] SPECATTN_HD view<T, Rank - 1, B> operator[](index i) const requires(Rank > 1) {
    dimensions<Rank - 1> extents{};
    dimensions<Rank - 1> strides{};
    for (int d = 1; d < Rank; ++d) {
      extents[d - 1] = extents_[d];
      strides[d - 1] = strides_[d];
    }
    return {data_ + i * strides_[0], extents, strides};
  }

  [[gnu::always_inline]] SPECATTN_HD T& operator[](index i) const requires(Rank == 1) {
    return data_[i * strides_[0]];
  }

  /// Indices [first, first + count) of the first dimension.
  [[gnu::always_inline]] SPECATTN_HD view slice(index first, index count) const {
    view part = *this;
    part.data_ = data_ + first * strides_[0];
    part.extents_[0] = count;
    return part;
  }

 private:
  [[gnu::always_inline]] SPECATTN_HD index offset(dimensions<Rank> i) const {
    index sum = 0;
    for (int d = 0; d < Rank; ++d) sum += i[d] * strides_[d];
    return sum;
  }

  T* data_ = nullptr;
  dimensions<Rank> extents_{};
  dimensions<Rank> strides_{};
};

}  // namespace specattn::inline SPECATTN_DATA
