#include "engine.hpp"

#include <array>
#include <limits>
#include <utility>
#include <variant>

#include "input_error.hpp"
#include "specattn/specattn.hpp"

namespace mini_llm {
namespace {

using specattn::context;
using specattn::cpu;
using specattn::view;

constexpr std::array<std::pair<std::string_view, kv_type>, 3> kv_names{
    {{"f16", kv_type::f16}, {"bf16", kv_type::bf16}, {"f32", kv_type::f32}}};
constexpr std::array<std::pair<std::string_view, guide_kind>, 6> guide_names{{{"none", guide_kind::none},
                                                                              {"draft", guide_kind::draft},
                                                                              {"paper", guide_kind::paper},
                                                                              {"window", guide_kind::window},
                                                                              {"quest", guide_kind::quest},
                                                                              {"oracle", guide_kind::oracle}}};

template <class Names>
auto parse(const Names& names, std::string_view name, const char* what) {
  std::string choices;
  for (const auto& [spelling, value] : names) {
    if (spelling == name) return value;
    choices += (choices.empty() ? "" : ", ") + std::string(spelling);
  }
  throw input_error(std::string(what) + " '" + std::string(name) + "' is none of " + choices);
}

template <class Names, class Value>
std::string_view spell(const Names& names, Value value) {
  for (const auto& [spelling, other] : names) {
    if (other == value) return spelling;
  }
  return {};
}

/// One of the library's guides behind one type, so that a decoder is compiled once for all of them.
class chosen_guide {
 public:
  explicit chosen_guide(const guide_choice& choice) {
    switch (choice.kind) {
      case guide_kind::none:
        guide_.emplace<specattn::no_guide>();
        break;
      case guide_kind::draft:
        guide_.emplace<specattn::draft_guide<>>(choice.alignment, choice.rule);
        break;
      case guide_kind::paper: {
        specattn::selection_rule rule = choice.rule;
        rule.rows = specattn::combine::unite;
        guide_.emplace<specattn::draft_guide<>>(choice.alignment.layer_map_only(), rule);
        break;
      }
      case guide_kind::window: {
        auto& window = guide_.emplace<specattn::window_guide>();
        window.sinks = choice.rule.sinks;
        window.recent = choice.window;
        break;
      }
      case guide_kind::quest:
        guide_.emplace<specattn::page_guide<cpu>>(choice.kept_share);
        break;
      case guide_kind::oracle:
        guide_.emplace<specattn::oracle_guide<>>(choice.rule);
        break;
    }
  }

  void prepare(const specattn::guide_setup& setup) {
    std::visit([&](auto& g) { g.prepare(setup); }, guide_);
  }
  specattn::guide_needs needs() const {
    return std::visit([](const auto& g) { return g.needs(); }, guide_);
  }
  std::size_t workspace_bytes(const context<cpu>& ctx) const {
    return std::visit([&](const auto& g) { return g.workspace_bytes(ctx); }, guide_);
  }
  template <class Round>
  void before_verify(context<cpu>& ctx, Round& round) {
    std::visit([&](auto& g) { g.before_verify(ctx, round); }, guide_);
  }
  template <class Round>
  void before_layer(context<cpu>& ctx, Round& round, std::int32_t layer, view<const float, 3> q) {
    std::visit([&](auto& g) { g.before_layer(ctx, round, layer, q); }, guide_);
  }
  template <class Round>
  void after_verify(context<cpu>& ctx, Round& round) {
    std::visit([&](auto& g) { g.after_verify(ctx, round); }, guide_);
  }
  void forget(std::int32_t row) {
    std::visit([&](auto& g) { g.forget(row); }, guide_);
  }
  std::int64_t metadata_rows(std::int32_t kv_len) const {
    return std::visit([&](const auto& g) { return g.metadata_rows(kv_len); }, guide_);
  }

 private:
  std::variant<specattn::no_guide, specattn::draft_guide<>, specattn::window_guide, specattn::page_guide<cpu>,
               specattn::oracle_guide<>>
      guide_;
};

template <specattn::storage T, class Draft>
class engine_of final : public engine {
 public:
  engine_of(context<cpu>& ctx, llama& target, Draft& draft, const guide_choice& guide,
            const specattn::decode_options& options)
      : guide_(guide), decoder_(ctx, target, draft, guide_, options) {}

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
  chosen_guide guide_;
  specattn::decoder<T, llama, Draft, chosen_guide, cpu> decoder_;
};

}  // namespace

kv_type parse_kv_type(std::string_view name) { return parse(kv_names, name, "key/value type"); }
guide_kind parse_guide_kind(std::string_view name) { return parse(guide_names, name, "guide"); }
std::string_view name_of(kv_type type) { return spell(kv_names, type); }
std::string_view name_of(guide_kind kind) { return spell(guide_names, kind); }

void set_key_value_range(llama& model, kv_type type) {
  constexpr float rounds_to_infinity = 65520.0f;  // the least that f16's largest, 65504, is not nearest to
  model.refuse_keys_values_from(type == kv_type::f16 ? rounds_to_infinity : std::numeric_limits<float>::infinity());
}

std::unique_ptr<engine> make_engine(context<cpu>& ctx, llama& target, llama* draft, kv_type type,
                                    const guide_choice& guide, const specattn::decode_options& options) {
  set_key_value_range(target, type);
  if (draft != nullptr) set_key_value_range(*draft, type);
  const auto make = [&]<class T>(T) -> std::unique_ptr<engine> {
    if (draft != nullptr) return std::make_unique<engine_of<T, llama>>(ctx, target, *draft, guide, options);
    static specattn::no_draft none;  // stateless
    return std::make_unique<engine_of<T, specattn::no_draft>>(ctx, target, none, guide, options);
  };
  switch (type) {
    case kv_type::f16:
      return make(specattn::fp16{});
    case kv_type::bf16:
      return make(specattn::bf16{});
    case kv_type::f32:
      break;
  }
  return make(float{});
}

specattn::decode_memory engine_bytes(const llama& target, const llama* draft, kv_type type, const guide_choice& guide,
                                     const specattn::decode_options& options) {
  const specattn::model_shape draft_shape = draft != nullptr ? draft->shape() : specattn::model_shape{};
  const specattn::guide_needs needs = chosen_guide(guide).needs();
  switch (type) {
    case kv_type::f16:
      return specattn::decoder_bytes<specattn::fp16>(target.shape(), draft_shape, options, needs);
    case kv_type::bf16:
      return specattn::decoder_bytes<specattn::bf16>(target.shape(), draft_shape, options, needs);
    case kv_type::f32:
      break;
  }
  return specattn::decoder_bytes<float>(target.shape(), draft_shape, options, needs);
}

}  // namespace mini_llm
