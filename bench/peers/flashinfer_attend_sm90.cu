// FlashInfer's paged prefill for Hopper, FA3 templates: what its wrappers choose on sm_90 unless told otherwise. Needs
// FlashInfer's headers and the CUTLASS that its wheel brings; README.md says where to get them.
#include <flashinfer/attention/scheduler.cuh>

#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include <cmath>
#include <memory>

#include "peers/flashinfer_pages.cuh"

namespace {

using specattn::bf16;
using element = cutlass::bfloat16_t;

class prefill_sm90 final : public bench::attend_peer {
 public:
  prefill_sm90() : attend_peer("FlashInfer prefill FA3") {}
  void prepare(const bench::attend_problem& problem) override {
    pages_ = nullptr;
    pages_ = std::make_unique<bench::flashinfer_pages>(problem);
  }
  const bf16* out() const override { return pages_->out.data(); }
  bool by_head() const override { return pages_->by_head; }

  void plan(cudaStream_t stream) override {
    bench::flashinfer_pages& p = *pages_;
    bench::check(flashinfer::PrefillSM90Plan<std::int32_t>(
        p.scratch.data(), p.scratch_bytes, p.plan.data(), p.host_plan, p.plan_bytes, plan_, p.query_offsets.data(),
        p.page_offsets.data(), p.lengths.data(), p.rows, p.sequences, p.query_heads, p.key_heads, bench::head_dim,
        bench::head_dim, p.page_size, true, false, sizeof(element), stream));
  }

  void run(const bf16* keys, const bf16* values, cudaStream_t stream) override {
    const bench::flashinfer_pages& p = *pages_;
    parameters a{};
    const auto elements = [](const bf16* from) { return reinterpret_cast<element*>(const_cast<bf16*>(from)); };
    a.q_ptr = elements(p.q);
    a.k_ptr = elements(keys);
    a.v_ptr = elements(values);
    a.o_ptr = elements(p.out.data());
    a.qo_tile_indices = p.planned<std::int32_t>(plan_.qo_tile_indices_offset);
    a.qo_indptr = p.planned<std::int32_t>(plan_.qo_indptr_offset);
    a.kv_indptr = p.planned<std::int32_t>(plan_.kv_indptr_offset);
    a.kv_indices = p.pages_on_device.data();
    a.qo_lens = p.planned<std::int32_t>(plan_.qo_len_offset);
    a.kv_lens = p.planned<std::int32_t>(plan_.kv_len_offset);
    a.head_indices = p.planned<std::int32_t>(plan_.head_indices_offset);
    a.work_indptr = p.planned<std::int32_t>(plan_.work_indptr_offset);
    a.batch_indices = p.planned<std::int32_t>(plan_.batch_indices_offset);
    a.additional_params.sm_scale = 1.0f / std::sqrt(static_cast<float>(bench::head_dim));
    a.q_stride_n = a.o_stride_n = std::int64_t{p.query_heads} * bench::head_dim;
    a.q_stride_h = a.o_stride_h = bench::head_dim;
    a.k_stride_n = a.v_stride_n = p.position_stride;
    a.k_stride_h = a.v_stride_h = p.head_stride;
    a.k_page_stride = a.v_page_stride = p.unit;
    a.nnz_qo = p.rows;
    a.num_qo_heads = p.query_heads;
    a.num_kv_heads = p.key_heads;
    a.group_size = bench::group_heads;
    a.page_size = p.page_size;
    a.window_left = -1;
    a.causal = true;
    bench::check(
        flashinfer::BatchPrefillWithPagedKVCacheDispatched<bench::head_dim, bench::head_dim,
                                                           flashinfer::MaskMode::kCausal, false, false,
                                                           flashinfer::DefaultAttention<false>>(a, true, stream));
  }

 private:
  using parameters = flashinfer::BatchPrefillPagedParams<element, element, element, std::int32_t>;
  std::unique_ptr<bench::flashinfer_pages> pages_;
  flashinfer::PrefillPlanSM90Info plan_;
};

const bench::linked_peer<prefill_sm90> prefill_sm90_linked;

}  // namespace
