// A problem as FlashInfer takes it: page tables over the caches as they lie, sequences' offsets, workspaces.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_harness.cuh"
#include "peers/attend_peers.cuh"
#include "specattn/cuda/context.cuh"

namespace bench {

template <class T>
specattn::buffer<T, specattn::cuda> upload(const std::vector<T>& host) {
  specattn::buffer<T, specattn::cuda> copy(host.size());
  if (!host.empty()) check(cudaMemcpy(copy.data(), host.data(), copy.bytes(), cudaMemcpyHostToDevice));
  return copy;
}

/// Pages of 16 when dense, of one position when listed. A page table knows one list a sequence: where kv heads have
/// their own, each is a sequence of one kv head.
struct flashinfer_pages {
  static constexpr std::size_t scratch_bytes = std::size_t{384} << 20, plan_bytes = std::size_t{8} << 20;

  explicit flashinfer_pages(const attend_problem& problem)
      : by_head(problem.reads == reading::list_a_head),
        page_size(problem.reads == reading::dense ? 16 : 1),
        sequences(problem.batch() * (by_head ? kv_heads : 1)),
        rows(sequences * problem.slots),
        query_heads(by_head ? group_heads : q_heads),
        key_heads(by_head ? 1 : kv_heads),
        unit(by_head ? head_dim : page_size * problem.position_stride),
        position_stride(problem.position_stride),
        head_stride(problem.head_stride),
        q(by_head ? problem.q_by_head : problem.q),
        page_offsets{0},
        query_offsets{0} {
    std::vector<std::int32_t> pages, last_page_lens;
    for (std::int32_t i = 0; i < sequences; ++i) {
      add_pages(problem, i, pages);
      page_offsets.push_back(static_cast<std::int32_t>(pages.size()));
      query_offsets.push_back(query_offsets.back() + problem.slots);
      const std::int32_t in_pages = page_offsets[lengths.size()] - page_offsets[lengths.size() - 1];
      last_page_lens.push_back(lengths.back() - (in_pages - 1) * page_size);
    }
    pages_on_device = upload(pages);
    page_offsets_on_device = upload(page_offsets);
    query_offsets_on_device = upload(query_offsets);
    last_page_lens_on_device = upload(last_page_lens);
    out = specattn::buffer<specattn::bf16, specattn::cuda>(static_cast<std::size_t>(rows * query_heads * head_dim));
    scratch = specattn::buffer<std::byte, specattn::cuda>(scratch_bytes);
    plan = specattn::buffer<std::byte, specattn::cuda>(plan_bytes);
    check(cudaMallocHost(&host_plan, plan_bytes));
  }
  flashinfer_pages(const flashinfer_pages&) = delete;
  flashinfer_pages& operator=(const flashinfer_pages&) = delete;
  ~flashinfer_pages() { cudaFreeHost(host_plan); }

  template <class T>
  T* planned(std::int64_t offset) const {
    return reinterpret_cast<T*>(plan.data() + offset);
  }
  template <class T>
  T* scratch_at(std::int64_t offset) const {
    return reinterpret_cast<T*>(scratch.data() + offset);
  }

  bool by_head;
  std::int32_t page_size, sequences, rows, query_heads, key_heads;
  std::ptrdiff_t unit, position_stride, head_stride;  ///< page i begins at element i * unit
  const specattn::bf16* q;
  std::vector<std::int32_t> page_offsets, query_offsets, lengths;
  specattn::buffer<std::int32_t, specattn::cuda> pages_on_device, page_offsets_on_device, query_offsets_on_device,
      last_page_lens_on_device;
  specattn::buffer<specattn::bf16, specattn::cuda> out;
  specattn::buffer<std::byte, specattn::cuda> scratch, plan;
  void* host_plan = nullptr;

 private:
  /// The tail's positions end the list: its mask is causal.
  void add_pages(const attend_problem& problem, std::int32_t i, std::vector<std::int32_t>& pages) {
    const std::int32_t sequence = by_head ? i / kv_heads : i, head = by_head ? i % kv_heads : 0;
    const std::ptrdiff_t start = sequence * problem.sequence_stride + head * problem.head_stride;
    const std::int32_t kv_len = problem.kv_lens[static_cast<std::size_t>(sequence)];
    const auto add = [&](std::int32_t position) {
      pages.push_back(static_cast<std::int32_t>((start + position * problem.position_stride) / unit));
    };
    if (problem.reads == reading::dense) {
      for (std::int32_t p = 0; p < kv_len + problem.slots; p += page_size) add(p);
      lengths.push_back(kv_len + problem.slots);
      return;
    }
    const auto& list = problem.kept[static_cast<std::size_t>(sequence * kv_heads + head)];
    for (const std::int32_t p : list) add(p);
    for (std::int32_t p = kv_len; p < kv_len + problem.slots; ++p) add(p);
    lengths.push_back(static_cast<std::int32_t>(list.size()) + problem.slots);
  }
};

}  // namespace bench
