// FlashInfer's batch attention over paged caches, FA2 templates: prefill (on tensor cores; what its decode wrapper runs
// too when asked for tensor cores) and decode. Needs FlashInfer's headers; README.md says where to get them.
#include <flashinfer/attention/decode.cuh>
#include <flashinfer/attention/default_decode_params.cuh>
#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <flashinfer/attention/variants.cuh>

#include <cmath>
#include <memory>

#include "peers/flashinfer_pages.cuh"

namespace {

using specattn::bf16;
using element = __nv_bfloat16;
using paged = flashinfer::paged_kv_t<element, std::int32_t>;
using variant = flashinfer::DefaultAttention<false, false, false, false>;
constexpr auto no_rotation = flashinfer::PosEncodingMode::kNone;
const float scale = 1.0f / std::sqrt(static_cast<float>(bench::head_dim));

class flashinfer_peer : public bench::attend_peer {
 public:
  using attend_peer::attend_peer;
  void prepare(const bench::attend_problem& problem) override {
    pages_ = nullptr;  // first, so that workspaces of two problems never stand side by side
    pages_ = std::make_unique<bench::flashinfer_pages>(problem);
  }
  const bf16* out() const override { return pages_->out.data(); }
  bool by_head() const override { return pages_->by_head; }

 protected:
  paged caches(const bf16* keys, const bf16* values) const {
    const bench::flashinfer_pages& p = *pages_;
    const std::int64_t strides[] = {p.unit, p.head_stride, p.position_stride, 1};
    const auto elements = [](const bf16* from) { return reinterpret_cast<element*>(const_cast<bf16*>(from)); };
    return {static_cast<std::uint32_t>(p.key_heads),
            static_cast<std::uint32_t>(p.page_size),
            bench::head_dim,
            static_cast<std::uint32_t>(p.sequences),
            flashinfer::QKVLayout::kHND,
            elements(keys),
            elements(values),
            strides,
            p.pages_on_device.data(),
            p.page_offsets_on_device.data(),
            p.last_page_lens_on_device.data()};
  }
  element* q() const { return reinterpret_cast<element*>(const_cast<bf16*>(pages_->q)); }
  element* results() const { return reinterpret_cast<element*>(pages_->out.data()); }
  std::int32_t row_stride() const { return pages_->query_heads * bench::head_dim; }

  std::unique_ptr<bench::flashinfer_pages> pages_;
};

class prefill final : public flashinfer_peer {
 public:
  prefill() : flashinfer_peer("FlashInfer prefill FA2") {}
  void plan(cudaStream_t stream) override {
    bench::flashinfer_pages& p = *pages_;
    bench::check(flashinfer::PrefillPlan<std::int32_t>(
        p.scratch.data(), p.scratch_bytes, p.plan.data(), p.host_plan, p.plan_bytes, plan_, p.query_offsets.data(),
        p.page_offsets.data(), p.rows, p.sequences, p.query_heads, p.key_heads, bench::head_dim, bench::head_dim,
        p.page_size, false, sizeof(element), -1, -1, false, 0, 0, stream));
  }
  void run(const bf16* keys, const bf16* values, cudaStream_t stream) override {
    const bench::flashinfer_pages& p = *pages_;
    parameters a(q(), caches(keys, values), nullptr, p.query_offsets_on_device.data(), nullptr, nullptr, results(),
                 nullptr, nullptr, p.query_heads, row_stride(), bench::head_dim, -1, 0.0f, scale, 1.0f, 1e4f);
    a.request_indices = p.planned<std::int32_t>(plan_.request_indices_offset);
    a.qo_tile_indices = p.planned<std::int32_t>(plan_.qo_tile_indices_offset);
    a.kv_tile_indices = p.planned<std::int32_t>(plan_.kv_tile_indices_offset);
    a.o_indptr = p.planned<std::int32_t>(plan_.o_indptr_offset);
    a.kv_chunk_size_ptr = p.planned<std::int32_t>(plan_.kv_chunk_size_ptr_offset);
    a.padded_batch_size = static_cast<std::uint32_t>(plan_.padded_batch_size);
    a.max_total_num_rows = static_cast<std::uint32_t>(plan_.total_num_rows);
    if (plan_.split_kv) a.merge_indptr = p.planned<std::int32_t>(plan_.merge_indptr_offset);
    bench::check(plan_.cta_tile_q == 16 ? launch<16>(a, stream) : launch<64>(a, stream));
  }

 private:
  using parameters = flashinfer::BatchPrefillPagedParams<element, element, element, std::int32_t>;
  template <std::uint32_t Rows>
  cudaError_t launch(const parameters& a, cudaStream_t stream) const {
    return flashinfer::BatchPrefillWithPagedKVCacheDispatched<
        true, Rows, bench::head_dim, bench::head_dim, no_rotation, false, flashinfer::MaskMode::kCausal, variant>(
        a, plan_.split_kv ? pages_->scratch_at<element>(plan_.v_offset) : nullptr,
        plan_.split_kv ? pages_->scratch_at<float>(plan_.s_offset) : nullptr, true, stream);
  }
  flashinfer::PrefillPlanInfo plan_;
};

class decode final : public flashinfer_peer {
 public:
  decode() : flashinfer_peer("FlashInfer decode") {}
  bool takes(const bench::attend_problem& problem) const override { return problem.slots == 1; }
  void plan(cudaStream_t stream) override {
    bench::flashinfer_pages& p = *pages_;
    const auto estimate =
        flashinfer::BatchDecodeWithPagedKVCacheWorkEstimationDispatched<bench::group_heads, bench::head_dim,
                                                                        no_rotation, variant, parameters>;
    bench::check(flashinfer::DecodePlan<bench::head_dim, no_rotation, variant, parameters>(
        p.scratch.data(), p.scratch_bytes, p.plan.data(), p.host_plan, p.plan_bytes, plan_, p.page_offsets.data(),
        p.sequences, p.query_heads, p.page_size, false, stream, estimate));
  }
  void run(const bf16* keys, const bf16* values, cudaStream_t stream) override {
    const bench::flashinfer_pages& p = *pages_;
    parameters a(q(), nullptr, caches(keys, values), results(), nullptr, nullptr, p.query_heads, row_stride(),
                 bench::head_dim, -1, 0.0f, scale, 1.0f, 1e4f);
    a.request_indices = p.planned<std::int32_t>(plan_.request_indices_offset);
    a.kv_tile_indices = p.planned<std::int32_t>(plan_.kv_tile_indices_offset);
    a.o_indptr = p.planned<std::int32_t>(plan_.o_indptr_offset);
    a.kv_chunk_size_ptr = p.planned<std::int32_t>(plan_.kv_chunk_size_ptr_offset);
    a.padded_batch_size = static_cast<std::uint32_t>(plan_.padded_batch_size);
    bench::check(flashinfer::BatchDecodeWithPagedKVCacheDispatched<bench::head_dim, no_rotation, variant, parameters>(
        a, plan_.split_kv ? p.scratch_at<element>(plan_.v_offset) : nullptr,
        plan_.split_kv ? p.scratch_at<float>(plan_.s_offset) : nullptr, true, stream));
  }

 private:
  using parameters = flashinfer::BatchDecodeParams<element, element, element, std::int32_t>;
  flashinfer::DecodePlanInfo plan_;
};

const bench::linked_peer<prefill> prefill_linked;
const bench::linked_peer<decode> decode_linked;

}  // namespace
