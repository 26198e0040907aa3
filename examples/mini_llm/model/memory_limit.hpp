// How much memory this process may still take, and a refusal in words before the kernel's, which has none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace mini_llm {

/// Bytes, and what limits them.
struct memory_room {
  std::uint64_t bytes = UINT64_MAX;  ///< UINT64_MAX: nothing is known
  std::string limit;                 ///< "the machine has that available", …
};

/// The least of what the machine has available (swap included), what the process's cgroup and those above it leave
/// (version 1 and 2; file pages that can be dropped count as free), and what `ulimit -v` leaves.
/// \param root where /proc and /sys are found; tests give another
memory_room available_memory(const std::filesystem::path& root = "/");

/// Refuses to begin what cannot be finished.
/// \param what   what needs the memory, as the subject of a sentence
/// \param remedy what needs less
/// \throws input_error naming both numbers when `needed` bytes are more than there are
void require_memory(std::size_t needed, std::string_view what, std::string_view remedy,
                    const memory_room& room = available_memory());

}  // namespace mini_llm
