#include "device_engine.cuh"

#include <concepts>
#include <string>
#include <utility>

#include "input_error.hpp"
#include "specattn/cuda.cuh"
#include "specattn/cuda/decode.cuh"
#include "specattn/cuda/draft_guide.cuh"

namespace mini_llm {
namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::context;

template <specattn::storage T, class Draft, class Guide>
class device_engine final : public engine {
 public:
  device_engine(context<device>& ctx, device_llama& target, Draft& draft, Guide guide,
                const specattn::decode_options& options)
      : guide_(std::move(guide)), decoder_(ctx, target, draft, guide_, options) {}

  std::int32_t add(const specattn::decode_request& request, const on_progress& progress) override {
    return decoder_.add(request, progress);
  }
  void rewind(std::int32_t row, const specattn::decode_request& request) override { decoder_.rewind(row, request); }
  bool step(const on_tokens& callback) override { return decoder_.step(callback); }
  void remove(std::int32_t row) override { decoder_.remove(row); }
  specattn::decode_counts score(std::span<const std::int32_t> tokens, std::int32_t prefill,
                                std::span<float> loss) override {
    return decoder_.score(tokens, prefill, loss);
  }
  std::span<const std::int32_t> text(std::int32_t row) const override { return decoder_.text(row); }
  specattn::finish_reason finish(std::int32_t row) const override { return decoder_.finish(row); }
  const specattn::decode_counts& counts(std::int32_t row) const override { return decoder_.counts(row); }
  const specattn::round_trace& last_round() const override { return decoder_.last_round(); }
  const specattn::round_planner* planner() const override { return decoder_.planner(); }

 private:
  Guide guide_;
  specattn::decoder<T, device_llama, Draft, Guide, device> decoder_;
};

specattn::draft_guide<device> make_draft_guide(const guide_choice& choice) {
  if (choice.kind == guide_kind::draft) return {choice.alignment, choice.rule};
  specattn::selection_rule rule = choice.rule;  // the paper's
  rule.rows = specattn::combine::unite;
  return {choice.alignment.layer_map_only(), rule};
}

template <specattn::storage T>
std::unique_ptr<engine> make_stored_as(context<device>& ctx, device_llama& target, device_llama* draft,
                                       const guide_choice& choice, const specattn::decode_options& options) {
  using specattn::no_guide;
  if (draft == nullptr) {
    static specattn::no_draft none;  // stateless
    return std::make_unique<device_engine<T, specattn::no_draft, no_guide>>(ctx, target, none, no_guide{}, options);
  }
  if (choice.kind == guide_kind::none) {
    return std::make_unique<device_engine<T, device_llama, no_guide>>(ctx, target, *draft, no_guide{}, options);
  }
  return std::make_unique<device_engine<T, device_llama, specattn::draft_guide<device>>>(
      ctx, target, *draft, make_draft_guide(choice), options);
}

void check_choice(kv_type type, const guide_choice& choice) {
  if (choice.kind != guide_kind::none && choice.kind != guide_kind::draft && choice.kind != guide_kind::paper) {
    throw input_error("--guide " + std::string(name_of(choice.kind)) +
                      " is not there with --device cuda; none, draft and paper are");
  }
  if (type != kv_type::f16) {
    throw input_error("--kv " + std::string(name_of(type)) + " is not there with --device cuda; f16 is");
  }
}

}  // namespace

std::unique_ptr<engine> make_device_engine(context<device>& ctx, device_llama& target, device_llama* draft,
                                           kv_type type, const guide_choice& guide,
                                           const specattn::decode_options& options) {
  check_choice(type, guide);
  return make_stored_as<specattn::fp16>(ctx, target, draft, guide, options);
}

specattn::decode_memory device_engine_bytes(const specattn::model_shape& target, const specattn::model_shape& draft,
                                            kv_type type, const guide_choice& guide,
                                            const specattn::decode_options& options) {
  check_choice(type, guide);
  specattn::guide_needs needs;
  if (guide.kind != guide_kind::none) needs = make_draft_guide(guide).needs();
  return specattn::decoder_bytes<specattn::fp16, device>(target, draft, options, needs);
}

}  // namespace mini_llm
