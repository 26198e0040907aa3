// One decoding run over a pair of llamas, with the key/value type and the guide chosen at run time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "llama.hpp"
#include "specattn/alignment.hpp"
#include "specattn/cost_model.hpp"
#include "specattn/cpu/context.hpp"
#include "specattn/decode_options.hpp"
#include "specattn/select.hpp"

namespace mini_llm {

/// What keys and values are stored as.
enum class kv_type { f16, bf16, f32 };

/// What guides the verify pass.
enum class guide_kind {
  none,    ///< dense: exact
  draft,   ///< mixtures of the draft's heads (the default)
  paper,   ///< one draft layer for each target layer, the steps' sets united
  window,  ///< StreamingLLM: sinks and a recency window
  quest,   ///< pages chosen by the target's own queries
  oracle,  ///< the target's own attention: a bound, slower than dense
};

kv_type parse_kv_type(std::string_view name);        ///< \throws input_error naming the choices
guide_kind parse_guide_kind(std::string_view name);  ///< \throws input_error naming the choices
std::string_view name_of(kv_type type);
std::string_view name_of(guide_kind kind);

/// A guide and how much it keeps.
struct guide_choice {
  guide_kind kind = guide_kind::draft;
  specattn::selection_rule rule{.rows = specattn::combine::mean};  ///< draft, paper, oracle
  float kept_share = 0.25f;                                        ///< quest: share of the pages
  std::int32_t window = 512;                                       ///< window: newest positions
  specattn::alignment alignment;                                   ///< draft, paper
};

/// See specattn::decoder, whose calls these are.
class engine {
 public:
  using on_tokens = std::function<bool(std::int32_t row, std::span<const std::int32_t> tokens)>;
  using on_progress = std::function<void(std::int32_t done, std::int32_t total)>;

  virtual ~engine() = default;
  virtual std::int32_t add(const specattn::decode_request& request, const on_progress& progress) = 0;
  virtual void rewind(std::int32_t row, const specattn::decode_request& request) = 0;
  virtual bool step(const on_tokens& callback) = 0;
  virtual void remove(std::int32_t row) = 0;
  virtual specattn::decode_counts score(std::span<const std::int32_t> tokens, std::int32_t prefill,
                                        std::span<float> loss) = 0;
  virtual std::span<const std::int32_t> text(std::int32_t row) const = 0;
  virtual specattn::finish_reason finish(std::int32_t row) const = 0;
  virtual const specattn::decode_counts& counts(std::int32_t row) const = 0;
  virtual const specattn::round_trace& last_round() const = 0;
  virtual const specattn::round_planner* planner() const = 0;
};

/// Makes a model refuse keys and values that this type cannot hold, and name a type that can.
void set_key_value_range(llama& model, kv_type type);

/// \param draft null: plain decoding (options.draft_length must be 0, and the guide none, window, quest or oracle)
/// \throws specattn::contract_error as specattn::decoder
std::unique_ptr<engine> make_engine(specattn::context<specattn::cpu>& ctx, llama& target, llama* draft, kv_type type,
                                    const guide_choice& guide, const specattn::decode_options& options);

/// Bytes of caches, recordings, selections and logits that such an engine allocates.
specattn::decode_memory engine_bytes(const llama& target, const llama* draft, kv_type type, const guide_choice& guide,
                                     const specattn::decode_options& options);

}  // namespace mini_llm
