// FlashInfer's BatchAttention: one cooperative launch over a plan that balances shares, merges included. Needs
// FlashInfer's headers; README.md says where to get them.
#include <flashinfer/attention/persistent.cuh>
#include <flashinfer/attention/scheduler.cuh>
#include <flashinfer/attention/variants.cuh>

#include <cmath>
#include <memory>

#include "peers/flashinfer_pages.cuh"

namespace {

using specattn::bf16;
using element = __nv_bfloat16;

/// What its kernel reads, under the names that it reads.
struct parameters {
  using DTypeQ = element;
  using DTypeKV = element;
  using DTypeO = element;
  using IdType = std::int32_t;
  element *q, *k, *v, *partial_o, *final_o;
  float *partial_lse, *final_lse;
  std::int32_t *q_indptr, *kv_indptr, *partial_indptr, *kv_indices, *q_len, *kv_len, *q_start, *kv_start, *kv_end;
  std::int32_t *kv_head_idx_arr, *work_indptr, *len_kv_chunk, *merge_indptr, *merge_o_indices, *num_packed_qo_len;
  std::uint32_t num_kv_heads;
  flashinfer::uint_fastdiv gqa_group_size, page_size;
  std::uint32_t q_stride_n, q_stride_h, k_stride_page, k_stride_h, k_stride_n, v_stride_page, v_stride_h, v_stride_n;
  std::uint32_t k_sf_stride_page, k_sf_stride_h, k_sf_stride_n, v_sf_stride_page, v_sf_stride_h, v_sf_stride_n;
  float sm_scale, logits_soft_cap, v_scale;
  std::int32_t window_left;
  __host__ __device__ std::uint32_t get_qo_len(std::uint32_t) const { return 0; }  // only windows ask
  __host__ __device__ std::uint32_t get_kv_len(std::uint32_t) const { return 0; }
};
struct variant : flashinfer::DefaultAttention<false, false, false, false> {
  static constexpr bool use_logits_soft_cap = false;
  using DefaultAttention::DefaultAttention;
};

class batch_attention final : public bench::attend_peer {
 public:
  batch_attention() : attend_peer("FlashInfer BatchAttention") {}
  void prepare(const bench::attend_problem& problem) override {
    pages_ = nullptr;  // first, so that workspaces of two problems never stand side by side
    pages_ = std::make_unique<bench::flashinfer_pages>(problem);
  }
  const bf16* out() const override { return pages_->out.data(); }
  bool by_head() const override { return pages_->by_head; }

  void plan(cudaStream_t stream) override {
    bench::flashinfer_pages& p = *pages_;
    bench::check(flashinfer::TwoStageHolisticPlan<std::int32_t>(
        p.scratch.data(), p.scratch_bytes, p.plan.data(), p.host_plan, p.plan_bytes, plan_, p.query_offsets.data(),
        p.page_offsets.data(), p.lengths.data(), p.sequences, p.query_heads, p.key_heads, bench::head_dim, true,
        stream));
  }
  void run(const bf16* keys, const bf16* values, cudaStream_t stream) override {
    parameters a[2] = {task(0, keys, values), task(1, keys, values)};
    bench::check(flashinfer::BatchPagedAttentionPersistent<128, 16, bench::head_dim, bench::head_dim,
                                                           flashinfer::MaskMode::kCausal, true, variant>(
        a[0], a[1], static_cast<std::uint32_t>(plan_.num_blks_x), static_cast<std::uint32_t>(plan_.num_blks_y),
        stream));
  }

 private:
  parameters task(int i, const bf16* keys, const bf16* values) const {
    const bench::flashinfer_pages& p = *pages_;
    const auto& t = plan_.tasks[i];
    const auto elements = [](const bf16* from) { return reinterpret_cast<element*>(const_cast<bf16*>(from)); };
    const auto numbers = [&](std::int64_t offset) { return p.planned<std::int32_t>(offset); };
    parameters a{};
    a.q = elements(p.q);
    a.k = elements(keys);
    a.v = elements(values);
    a.partial_o = p.scratch_at<element>(plan_.partial_o_offset);
    a.final_o = elements(p.out.data());
    a.partial_lse = p.scratch_at<float>(plan_.partial_lse_offset);
    a.q_indptr = numbers(t.q_indptr_offset);
    a.kv_indptr = numbers(t.kv_indptr_offset);
    a.partial_indptr = numbers(t.partial_indptr_offset);
    a.kv_indices = p.pages_on_device.data();
    a.q_len = numbers(t.q_len_offset);
    a.kv_len = numbers(t.kv_len_offset);
    a.q_start = numbers(t.q_start_offset);
    a.kv_start = numbers(t.kv_start_offset);
    a.kv_end = numbers(t.kv_end_offset);
    a.kv_head_idx_arr = numbers(t.kv_head_idx_offset);
    a.work_indptr = numbers(t.work_indptr_offset);
    a.len_kv_chunk = numbers(plan_.len_kv_chunk_offset) + i;
    a.merge_indptr = numbers(plan_.merge_indptr_offset);
    a.merge_o_indices = numbers(plan_.merge_o_indices_offset);
    a.num_packed_qo_len = numbers(plan_.num_qo_len_offset);
    a.num_kv_heads = static_cast<std::uint32_t>(p.key_heads);
    a.gqa_group_size = flashinfer::uint_fastdiv(bench::group_heads);
    a.page_size = flashinfer::uint_fastdiv(static_cast<std::uint32_t>(p.page_size));
    a.q_stride_n = static_cast<std::uint32_t>(p.query_heads * bench::head_dim);
    a.q_stride_h = bench::head_dim;
    a.k_stride_page = a.v_stride_page = static_cast<std::uint32_t>(p.unit);
    a.k_stride_h = a.v_stride_h = static_cast<std::uint32_t>(p.head_stride);
    a.k_stride_n = a.v_stride_n = static_cast<std::uint32_t>(p.position_stride);
    a.sm_scale = 1.0f / std::sqrt(static_cast<float>(bench::head_dim));
    a.v_scale = 1.0f;
    a.window_left = -1;
    return a;
  }

  std::unique_ptr<bench::flashinfer_pages> pages_;
  flashinfer::HolisticPlanInfo<2> plan_;
};

const bench::linked_peer<batch_attention> batch_attention_linked;

}  // namespace
