#include "session.hpp"

#include <algorithm>
#include <utility>

#include "input_error.hpp"
#include "mapped_file.hpp"
#include "model/device_support.hpp"
#include "model/memory_limit.hpp"
#include "specattn/alignment_json.hpp"

namespace mini_llm {

std::unique_ptr<engine> session::make(const guide_choice& with, const specattn::decode_options& options) const {
  if (on_device) return on_device->make(kv, with, options);
  return make_engine(*ctx, *target->model, draft_model(), kv, with, options);
}

specattn::decode_memory session::engine_bytes() const {
  if (on_device) return on_device->engine_bytes(kv, guide, decode);
  return mini_llm::engine_bytes(*target->model, draft_model(), kv, guide, decode);
}

std::size_t session::weight_bytes() const {
  if (on_device) return on_device->weight_bytes();
  return target->model->weight_bytes() + (draft ? draft->model->weight_bytes() : 0);
}

namespace {

void require_context(std::int64_t positions, const loaded_model& target) {
  if (positions <= target.config.max_context) return;
  const std::string limit = std::to_string(target.config.max_context);
  throw input_error(target.directory.string(),
                    (target.config.sliding_window ? "attention sees the last " + limit + " positions (sliding_window)"
                                                  : "the context has " + limit + " positions") +
                        ", " + std::to_string(positions) + " are asked for; give no more (-c,--ctx-size " + limit +
                        ", or less to write: -n)");
}

}  // namespace

void session::require_room(const guide_choice& with, specattn::decode_options options, std::int64_t positions) const {
  options.max_positions = static_cast<std::int32_t>((std::max)(std::int64_t{options.max_positions}, positions));
  require_context(options.max_positions, *target);  // a draft of a shorter one drafts as far as it reaches
  if (on_device) return;
  options.max_positions = static_cast<std::int32_t>(positions);
  require_memory(
      mini_llm::engine_bytes(*target->model, options.draft_length > 0 ? draft_model() : nullptr, kv, with, options)
          .total(),
      "a text of " + std::to_string(positions) + " positions",
      "a smaller context (-c) or fewer tokens (-n) need less");
}

std::optional<specattn::alignment> find_alignment(const std::filesystem::path& given, const session& with) {
  const bool on_device = with.on_device != nullptr;
  const auto& wanted_draft = on_device ? with.on_device->draft_fingerprint() : with.draft->model->fingerprint();
  const auto& wanted_target = on_device ? with.on_device->target_fingerprint() : with.target->model->fingerprint();
  if (!given.empty()) return specattn::load_alignment(given.string(), wanted_draft, wanted_target);
  const std::filesystem::path shipped = embedded_models() / "alignment.json";
  if (!std::filesystem::exists(shipped)) return std::nullopt;
  specattn::alignment alignment = specattn::load_alignment(shipped.string());
  if (!alignment.draft.matches(wanted_draft) || !alignment.target.matches(wanted_target)) return std::nullopt;
  return alignment;
}

void check_refresh(std::int32_t refresh_every, std::int32_t draft_length) {
  const std::int64_t tokens = (std::int64_t{refresh_every} + 1) * (draft_length + 1);
  if (tokens <= max_slots) return;
  throw input_error("--refresh " + std::to_string(refresh_every) + " with " + std::to_string(draft_length) +
                    " drafted tokens a round rewrites up to " + std::to_string(tokens) + " at once; a pass takes " +
                    std::to_string(max_slots) + ": give 0 to " + std::to_string(max_slots / (draft_length + 1) - 1));
}

namespace {

bool is_cuda(const std::string& device) {
  if (device != "cpu" && device != "cuda") throw input_error("device '" + device + "' is none of cpu, cuda");
  return device == "cuda";
}

void load_models(session& made, const session_options& options) {
  const bool embedded = options.model.empty();
  const bool on_device = is_cuda(options.device);
  const auto load = [&](const std::filesystem::path& directory) {
    auto loaded = std::make_unique<loaded_model>(on_device ? open_model(directory) : load_model(directory));
    if (on_device) require_device_model(loaded->config, directory.string());
    return loaded;
  };
  made.target = load(embedded ? embedded_models() / "books-7m" : options.model);
  // A target of the user's own and no draft: plain decoding.
  if (options.decode.draft_length > 0 && (embedded || !options.draft.empty())) {
    made.draft = load(options.draft.empty() ? embedded_models() / "books-1m" : options.draft);
    fit_vocabulary(*made.target, *made.draft);
  }
  if (on_device) made.on_device = load_device_pair(*made.target, made.draft.get());
}

}  // namespace

session open_session(const session_options& options) {
  if (!options.alignment.empty()) {
    require_readable(options.alignment);
    std::error_code ignored;  // a pointer of Git LFS is named by what maps it; a pipe cannot be mapped
    if (std::filesystem::is_regular_file(options.alignment, ignored)) mapped_file{options.alignment};
  }
  session made;
  made.kv = parse_kv_type(options.kv);
  std::optional<guide_kind> kind;
  if (!options.guide.empty()) kind = parse_guide_kind(options.guide);
  made.ctx = std::make_unique<specattn::context<specattn::cpu>>(options.threads);
  load_models(made, options);
  made.decode = options.decode;
  if (!made.draft) made.decode.draft_length = 0;
  require_context(made.decode.max_positions, *made.target);
  check_refresh(made.decode.refresh_every, made.decode.draft_length);

  std::optional<specattn::alignment> alignment;
  if (made.draft) alignment = find_alignment(options.alignment, made);
  if (!kind) kind = alignment ? guide_kind::draft : guide_kind::none;
  if (*kind == guide_kind::draft || *kind == guide_kind::paper) {
    if (options.decode.draft_length == 0) {
      throw input_error("--guide " + std::string(name_of(*kind)) + " needs drafts, and --draft is 0");
    }
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
