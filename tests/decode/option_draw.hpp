// Options of the decoding loop, drawn at random for the toy pair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>

#include "decode/problem.hpp"

namespace decode_testing {

class option_draw {
 public:
  explicit option_draw(std::uint32_t seed) : bits_(seed) {}

  std::int32_t number(std::int32_t least, std::int32_t most) {
    return std::uniform_int_distribution<std::int32_t>(least, most)(bits_);
  }
  bool chance(int of) { return number(1, of) == 1; }

  decode_options options() {
    decode_options o;
    o.draft_length = number(1, 6);
    o.max_sequences = number(1, 3);
    o.min_context = chance(3) ? number(0, 80) : 0;
    o.dense_layers = chance(2) ? number(0, 3) : 0;
    o.refresh_every = chance(3) ? number(1, 3) : 0;
    o.record_steps = chance(3) ? number(1, o.draft_length + 1) : 0;
    o.record_every = chance(2) ? number(2, 5) : 1;
    o.adaptive = chance(4);
    o.sparse_draft = chance(2);
    o.draft_rule = toy_rule(0.1f * static_cast<float>(number(2, 10)));
    if (chance(3)) o.draft_rule.rows = combine::unite;
    o.prefill_chunk = number(1, 40);
    o.max_positions = chance(3) ? number(131, 200) : 0;  // some texts end at the limit
    o.page_size = chance(2) ? 1 << number(0, 5) : 0;
    while (o.max_sequences * (o.draft_length + 1) * (o.refresh_every + 1) > target_shape.max_slots) --o.draft_length;
    o.record_steps = (std::min)(o.record_steps, o.draft_length + 1);
    return o;
  }

 private:
  std::mt19937 bits_;
};

inline std::string describe(const decode_options& o) {
  std::string text;
  const auto add = [&](const char* name, std::int32_t value) {
    text += std::string(name) + " " + std::to_string(value) + ", ";
  };
  add("draft_length", o.draft_length);
  add("max_sequences", o.max_sequences);
  add("min_context", o.min_context);
  add("dense_layers", o.dense_layers);
  add("refresh_every", o.refresh_every);
  add("record_steps", o.record_steps);
  add("record_every", o.record_every);
  add("adaptive", o.adaptive);
  add("sparse_draft", o.sparse_draft);
  add("unite", o.draft_rule.rows == combine::unite);
  add("prefill_chunk", o.prefill_chunk);
  add("max_positions", o.max_positions);
  add("page_size", o.page_size);
  return text;
}

}  // namespace decode_testing
