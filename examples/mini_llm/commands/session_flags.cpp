#include "session_flags.hpp"

#include "command_input.hpp"
#include "option_values.hpp"

namespace mini_llm {
namespace {

void add_guide_flags(CLI::App& command, session_options& o) {
  add_keep_flag(command, o);
  add_integer(command, "--keep-max", o.rule.max_tokens, 0, any_count, "most positions a selection keeps");
  add_integer(command, "--window", o.window, 0, any_count, "newest positions of --guide window");
  add_number(command, "--pages", o.kept_share, least_share, 1, "share of the pages that --guide quest keeps");
  add_integer(command, "--min-context", o.decode.min_context, 0, any_count,
              "below this many cached positions a round is dense");
}

}  // namespace

void add_keep_flag(CLI::App& command, session_options& o) {
  add_number(command, "--keep", o.rule.top_p, 0, 1, "share of the importance that a selection keeps");
}

void add_recording_flags(CLI::App& command, session_options& o) {
  add_integer(command, "--record-steps", o.decode.record_steps, 0, any_count,
              "draft steps that guide a round; 0: all");
  add_integer(command, "--record-every", o.decode.record_every, 1, any_count,
              "of n rounds the first records and selects; 1: each does");
  command.add_flag("--sparse-draft,!--dense-draft", o.decode.sparse_draft,
                   "draft steps read the draft's own selection, made a round ago");
}

void add_dense_flags(CLI::App& command, session_options& o) {
  add_integer(command, "--sinks", o.rule.sinks, 0, any_count, "first positions, always kept");
  add_integer(command, "--recent", o.rule.recent, 0, any_count, "newest positions, always kept");
  add_integer(command, "--dense-layers", o.decode.dense_layers, 0, any_count, "first layers that stay dense");
  add_integer(command, "--refresh", o.decode.refresh_every, 0, any_count,
              "every n rounds rewrite approximate keys and values; 0: never");
}

void add_alignment_flag(CLI::App& command, session_options& o) {
  command.add_option("--alignment", o.alignment, "the pair's alignment, as `calibrate` writes it");
}

void add_device_flag(CLI::App& command, session_options& o) {
  command.add_option("--device", o.device, "cpu or cuda (guides none, draft and paper; --kv f16)")
      ->capture_default_str();
}

void add_session_flags(CLI::App& command, session_options& o) {
  add_pair_flags(command, o);
  add_alignment_flag(command, o);
  command.add_option("--guide", o.guide, "none (exact), draft, paper, window, quest or oracle");
  add_integer(command, "-c,--ctx-size", o.decode.max_positions, 0, any_count,
              "positions; 0: what the prompt and -n can fill");
  add_integer(command, "--draft,--draft-max", o.decode.draft_length, 0, specattn::max_draft_length,
              "tokens drafted a round, at most with --adaptive; 0: plain decoding");
  command.add_flag("--adaptive", o.decode.adaptive,
                   "choose each round's draft length, and dense or sparse, by the costs of the rounds before");
  add_guide_flags(command, o);
  add_dense_flags(command, o);
  add_recording_flags(command, o);
  add_number(command, "--draft-keep", o.decode.draft_rule.top_p, 0, 1, "share that the draft's own selection keeps");
}

}  // namespace mini_llm
