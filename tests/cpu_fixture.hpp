// The CPU as the cases of attend and kv_cache see a backend.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "specattn/cpu/context.hpp"

struct cpu_fixture {
  using backend = specattn::cpu;
  static constexpr bool to_the_bit = true;  // results do not depend on how work is divided

  explicit cpu_fixture(int threads = 2) : context_(std::make_unique<specattn::context<specattn::cpu>>(threads)) {}

  specattn::context<specattn::cpu>& context() { return *context_; }

  template <class T>
  specattn::buffer<T> upload(const std::vector<T>& host) {
    specattn::buffer<T> copy(host.size());
    if (!host.empty()) std::memcpy(static_cast<void*>(copy.data()), host.data(), copy.bytes());
    return copy;
  }

  template <class T>
  std::vector<T> download(const specattn::buffer<T>& from) {
    return {from.data(), from.data() + from.size()};
  }

  /// Fills the workspace with garbage: nothing may be expected of it.
  void soil_workspace() {
    const std::size_t bytes = context_->workspace_bytes();
    if (bytes > 0) std::memset(context_->workspace(bytes, "test"), 0xab, bytes);
  }

 private:
  std::unique_ptr<specattn::context<specattn::cpu>> context_;
};
