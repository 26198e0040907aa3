#include "session.hpp"

#include <utility>

#include "input_error.hpp"
#include "specattn/alignment_json.hpp"

namespace mini_llm {

std::optional<specattn::alignment> find_alignment(const std::filesystem::path& given, const loaded_model& target,
                                                  const loaded_model& draft) {
  const auto& wanted_draft = draft.model.fingerprint();
  const auto& wanted_target = target.model.fingerprint();
  if (!given.empty()) return specattn::load_alignment(given.string(), wanted_draft, wanted_target);
  const std::filesystem::path shipped = embedded_models() / "alignment.json";
  if (!std::filesystem::exists(shipped)) return std::nullopt;
  specattn::alignment alignment = specattn::load_alignment(shipped.string());
  if (!alignment.draft.matches(wanted_draft) || !alignment.target.matches(wanted_target)) return std::nullopt;
  return alignment;
}

namespace {

void load_models(session& made, const session_options& options) {
  const bool embedded = options.model.empty();
  made.target = std::make_unique<loaded_model>(load_model(embedded ? embedded_models() / "books-7m" : options.model));
  if (options.decode.draft_length == 0) return;
  if (options.draft.empty() && !embedded) return;  // a target of the user's own and no draft: plain decoding
  made.draft = std::make_unique<loaded_model>(
      load_model(options.draft.empty() ? embedded_models() / "books-1m" : options.draft));
  check_same_vocabulary(*made.target, *made.draft);
}

}  // namespace

session open_session(const session_options& options) {
  session made;
  made.kv = parse_kv_type(options.kv);
  std::optional<guide_kind> kind;
  if (!options.guide.empty()) kind = parse_guide_kind(options.guide);
  made.ctx = std::make_unique<specattn::context<specattn::cpu>>(options.threads);
  load_models(made, options);
  made.decode = options.decode;
  if (!made.draft) made.decode.draft_length = 0;

  std::optional<specattn::alignment> alignment;
  if (made.draft) alignment = find_alignment(options.alignment, *made.target, *made.draft);
  if (!kind) kind = alignment ? guide_kind::draft : guide_kind::none;
  if (*kind == guide_kind::draft || *kind == guide_kind::paper) {
    if (!made.draft) throw input_error("--guide " + std::string(name_of(*kind)) + " needs a draft model (-md)");
    if (!alignment) {
      throw input_error("--guide " + std::string(name_of(*kind)) +
                        " needs an alignment of this pair; `mini_llm calibrate` makes one, --alignment names it");
    }
  }
  made.guide = {*kind, options.rule, options.kept_share, options.window, alignment.value_or(specattn::alignment{})};
  return made;
}

}  // namespace mini_llm
