// Owning storage for a view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <utility>

#include "error.hpp"
#include "view.hpp"

namespace specattn::inline SPECATTN_CODE {

namespace detail {
template <backend B, class T, std::size_t Rank>
view<T, static_cast<int>(Rank), B> shape_buffer(T* data, std::size_t size, const std::ptrdiff_t (&extents)[Rank]) {
  dimensions<static_cast<int>(Rank)> shape{};
  std::size_t need = 1;
  for (int d = 0; d < static_cast<int>(Rank); ++d) {
    shape[d] = extents[d];
    need *= static_cast<std::size_t>(extents[d]);
  }
  expects(need <= size, "buffer: a view of ", need, " elements over a buffer of ", size);
  return {data, shape};
}
}  // namespace detail

/// `size` elements of a trivially copyable type in the backend's memory, zeroed, 64-byte aligned, freed with the
/// object. Moves, never copies. The CUDA specialisation is in cuda/context.cuh.
///
/// In host memory a large one (from 1 MiB) takes its pages from the system as they are touched: a cache for a long
/// context costs what is used of it.
template <class T, backend B = cpu>
class buffer;

template <class T>
class buffer<T, cpu> {
  static_assert(std::is_trivially_copyable_v<T>, "a specattn::buffer holds trivially copyable elements only");

 public:
  static constexpr std::size_t alignment = 64;

  buffer() = default;
  explicit buffer(std::size_t size) : size_(size) {
    if (size == 0) return;
    detail::expects(size <= (static_cast<std::size_t>(PTRDIFF_MAX) - alignment) / sizeof(T), "buffer: ", size,
                    " elements of ", sizeof(T), " bytes do not fit the address space");
    data_ = static_cast<T*>(bytes() < lazy_bytes ? take_at_once(bytes()) : take_lazily(bytes()));
  }
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;
  ~buffer() {
    if (data_ == nullptr) return;
    if (bytes() < lazy_bytes) {
      ::operator delete (data_, std::align_val_t{alignment});
    } else {
      std::free(taken_for(data_));
    }
  }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::size_t bytes() const { return size_ * sizeof(T); }

  /// The first product(extents) elements, shaped. Throws contract_error when the buffer holds fewer.
  template <std::size_t Rank>
  view<T, static_cast<int>(Rank), cpu> shaped(const std::ptrdiff_t (&extents)[Rank]) const {
    return detail::shape_buffer<cpu>(data_, size_, extents);
  }

 private:
  static constexpr std::size_t lazy_bytes = std::size_t{1} << 20;

  static void* take_at_once(std::size_t bytes) {
    return std::memset(::operator new (bytes, std::align_val_t{alignment}), 0, bytes);
  }
  /// calloc leaves pages that the system hands out zeroed alone, but aligns less: what it gave is noted right before
  /// the first element, where the alignment leaves room for a pointer.
  static void* take_lazily(std::size_t bytes) {
    void* const taken = std::calloc(1, bytes + alignment);
    if (taken == nullptr) {
      detail::raise<std::bad_alloc>("buffer: " + std::to_string(bytes) + " bytes of memory are not to be had");
    }
    const std::size_t skipped = alignment - reinterpret_cast<std::uintptr_t>(taken) % alignment;
    std::byte* const first = static_cast<std::byte*>(taken) + skipped;
    std::memcpy(first - sizeof taken, &taken, sizeof taken);
    return first;
  }
  static void* taken_for(T* data) {
    void* taken = nullptr;
    std::memcpy(&taken, reinterpret_cast<std::byte*>(data) - sizeof taken, sizeof taken);
    return taken;
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace specattn::inline SPECATTN_CODE
