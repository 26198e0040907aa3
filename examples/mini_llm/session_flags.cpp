#include "session_flags.hpp"

namespace mini_llm {

void add_session_flags(CLI::App& command, session_options& o) {
  command.add_option("-m,--model", o.model, "target: a Hugging Face directory; default: the embedded one");
  command.add_option("--md,--model-draft,--draft-model", o.draft, "draft; default with the embedded target: its own");
  command.add_option("--alignment", o.alignment, "the pair's alignment, as `calibrate` writes it");
  command.add_option("--guide", o.guide, "none (exact), draft, paper, window, quest or oracle");
  command.add_option("--kv,--cache-type", o.kv, "f16, bf16 or f32")->capture_default_str();
  command.add_option("-t,--threads", o.threads, "0: all")->check(CLI::Range(0, 1024))->capture_default_str();
  command.add_option("-c,--ctx-size", o.decode.max_positions, "positions; 0: what the prompt and -n can fill")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--draft,--draft-max", o.decode.draft_length,
                  "tokens drafted a round, at most with --adaptive; 0: plain decoding")
      ->check(CLI::Range(0, specattn::max_draft_length))
      ->capture_default_str();
  command.add_flag("--adaptive", o.decode.adaptive,
                   "choose each round's draft length, and dense or sparse, by the costs of the rounds before");
  command.add_option("--keep", o.rule.top_p, "share of the importance that a selection keeps")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--keep-max", o.rule.max_tokens, "most positions a selection keeps")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--sinks", o.rule.sinks, "first positions, always kept")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--recent", o.rule.recent, "newest positions, always kept")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--window", o.window, "newest positions of --guide window")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--pages", o.kept_share, "share of the pages that --guide quest keeps")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--min-context", o.decode.min_context, "below this many cached positions a round is dense")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--dense-layers", o.decode.dense_layers, "first layers that stay dense")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--refresh", o.decode.refresh_every, "every n rounds rewrite approximate keys and values; 0: never")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--record-steps", o.decode.record_steps, "draft steps that guide a round; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--record-every", o.decode.record_every, "of n rounds the first records and selects; 1: each does")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_flag("--sparse-draft,!--dense-draft", o.decode.sparse_draft,
                   "draft steps read the draft's own selection, made a round ago");
  command.add_option("--draft-keep", o.decode.draft_rule.top_p, "share that the draft's own selection keeps")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
}

}  // namespace mini_llm
