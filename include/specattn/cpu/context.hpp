// context<cpu>: a team of threads and a workspace.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "../backend.hpp"
#include "../buffer.hpp"
#include "../error.hpp"
#include "usable_cpus.hpp"

namespace specattn::inline SPECATTN_CODE {

/// A fork-join team. The calling thread is member 0; the others spin briefly between calls, then sleep. A call ends
/// when its indices are done, not when every member has looked: a member that sleeps, or that the system gave no
/// processor, holds nobody up. No more threads run than CPUs may be used (usable_cpus()): more would take turns, and those
/// that spin would keep others from working. One caller at a time. Nothing is allocated after construction.
template <>
class context<cpu> {
 public:
  /// \param threads         members of the team, the caller included; 0: usable_cpus()
  /// \param workspace_bytes memory for the operations' scratch: the largest of their …_workspace_bytes()
  explicit context(int threads = 0, std::size_t workspace_bytes = 0);
  ~context();
  context(const context&) = delete;
  context& operator=(const context&) = delete;

  /// Members of the team. Work is laid out for so many, whether that many threads run or not.
  int threads() const { return threads_; }
  std::size_t workspace_bytes() const { return workspace_.size(); }
  /// Allocates a workspace of at least `bytes`; what it held is lost.
  void reserve_workspace(std::size_t bytes) {
    if (bytes > workspace_.size()) workspace_ = buffer<std::byte, cpu>(bytes);
  }
  /// The workspace, 64-byte aligned. Throws contract_error when it holds fewer than `bytes`.
  std::byte* workspace(std::size_t bytes, const char* operation) {
    detail::expects(bytes <= workspace_.size(), operation, ": needs a workspace of ", bytes,
                    " bytes, the context has ", workspace_.size());
    return workspace_.data();
  }

  /// Calls body(index, member) once for every index in [0, count), members taking indices as they become free, the
  /// highest first. count is below 2^32.
  /// Returns when all are done. `body` must not throw.
  template <class Body>
  void parallel_for(std::ptrdiff_t count, Body&& body) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty()) {
      while (count > 0) body(--count, 0);
      return;
    }
    using body_type = std::remove_reference_t<Body>;
    run(count, std::addressof(body),
        [](void* erased, std::ptrdiff_t i, int member) { (*static_cast<body_type*>(erased))(i, member); });
  }

 private:
  using task = void (*)(void*, std::ptrdiff_t, int);
  void run(std::ptrdiff_t count, const void* body, task call);
  void work(int member);
  void serve(int member);

  static constexpr int spins_before_sleep = 100000;  // 0.1 to 0.3 ms: longer than sampling between two passes

  int threads_ = 1;
  std::vector<std::thread> workers_;
  buffer<std::byte, cpu> workspace_;
  void* body_ = nullptr;
  task call_ = nullptr;
  /// Indices of the present call that nobody has taken, under the call's number: one word, so that a member that
  /// comes late can take nothing of a call that it did not see begin. Whoever took an index may read body_ and call_
  /// until it has counted the index as done.
  alignas(64) std::atomic<std::uint64_t> open_{0};
  alignas(64) std::atomic<std::ptrdiff_t> done_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  std::atomic<bool> stop_{false};
};

inline context<cpu>::context(int threads, std::size_t workspace_bytes) : workspace_(workspace_bytes) {
  detail::expects(threads >= 0 && threads <= 1024, "context: ", threads, " threads; give 0 … 1024");
  const int cpus = usable_cpus();
  threads_ = threads == 0 ? cpus : threads;
  threads = (std::min)(threads_, cpus);
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  for (int member = 1; member < threads; ++member) workers_.emplace_back([this, member] { serve(member); });
}

inline context<cpu>::~context() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

inline void context<cpu>::run(std::ptrdiff_t count, const void* body, task call) {
  body_ = const_cast<void*>(body);
  call_ = call;
  done_.store(0, std::memory_order_relaxed);
  const std::uint32_t number = generation_.load(std::memory_order_relaxed) + 1;
  open_.store((std::uint64_t{number} << 32) | static_cast<std::uint32_t>(count), std::memory_order_release);
  generation_.store(number, std::memory_order_release);
  generation_.notify_all();
  work(0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    if (spins > spins_before_sleep) std::this_thread::yield();
  }
}

inline void context<cpu>::work(int member) {
  std::uint64_t open = open_.load(std::memory_order_acquire);
  while (static_cast<std::uint32_t>(open) != 0) {
    if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire)) continue;
    call_(body_, static_cast<std::ptrdiff_t>(static_cast<std::uint32_t>(open)) - 1, member);
    done_.fetch_add(1, std::memory_order_release);
    open = open_.load(std::memory_order_acquire);
  }
}

inline void context<cpu>::serve(int member) {
  std::uint32_t seen = 0;
  for (;;) {
    std::uint32_t now = generation_.load(std::memory_order_acquire);
    for (int spins = 0; now == seen; ++spins) {
      if (spins > spins_before_sleep) generation_.wait(seen, std::memory_order_acquire);
      now = generation_.load(std::memory_order_acquire);
    }
    seen = now;
    if (stop_.load(std::memory_order_relaxed)) return;
    work(member);
  }
}

}  // namespace specattn::inline SPECATTN_CODE
