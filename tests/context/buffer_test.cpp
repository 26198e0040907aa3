// buffer on the CPU: zeroed, aligned, and large ones take memory as it is used.
#include "specattn/buffer.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <limits>
#include <new>
#include <utility>

#include "specattn/error.hpp"

namespace {

std::size_t resident_bytes() {
  std::size_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

TEST_CASE("buffer: elements are zero and the first is 64-byte aligned, small and large, moved or not") {
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 18, (std::size_t{1} << 20) + 3}) {
    CAPTURE(size);
    specattn::buffer<float> numbers(size);
    CHECK(reinterpret_cast<std::uintptr_t>(numbers.data()) % 64 == 0);
    std::size_t other = 0;
    for (std::size_t i = 0; i < size; ++i) other += numbers.data()[i] != 0.0f ? 1 : 0;
    CHECK(other == 0);
    for (std::size_t i = 0; i < size; ++i) numbers.data()[i] = 1.0f;
    specattn::buffer<float> moved(std::move(numbers));
    specattn::buffer<float> again;
    again = std::move(moved);
    CHECK(again.size() == size);
    CHECK(again.data()[size - 1] == 1.0f);
  }
}

TEST_CASE("buffer: a large one takes memory from the system as it is used") {
  constexpr std::size_t size = std::size_t{1} << 30;
  const std::size_t before = resident_bytes();
  const specattn::buffer<std::uint8_t> bytes(size);
  bytes.data()[0] = bytes.data()[size / 2] = bytes.data()[size - 1] = 1;
  CHECK(resident_bytes() < before + (std::size_t{128} << 20));
  CHECK(bytes.data()[size / 4] == 0);
}

TEST_CASE("buffer: sizes past the address space are refused") {
  const volatile std::size_t most = std::numeric_limits<std::size_t>::max();  // compilers warn of what they see
  CHECK_THROWS_AS(specattn::buffer<double>{most}, specattn::contract_error);
  CHECK_THROWS_AS(specattn::buffer<double>{most / 16}, specattn::contract_error);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they end the program where memory is refused
  CHECK_THROWS_AS(specattn::buffer<std::uint8_t>{most / 4}, std::bad_alloc);
#endif
}
