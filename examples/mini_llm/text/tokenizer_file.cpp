#include "tokenizer_file.hpp"

#include <limits>

#include "json_document.hpp"
#include "utf8.hpp"
#include "vocabulary.hpp"

namespace mini_llm {
namespace {

constexpr std::size_t max_steps = 32;         // of any one chain
constexpr std::size_t max_step_bytes = 256;   // of what a step looks for or puts in; real ones: one character
constexpr std::size_t max_template_ids = 64;  // around a text; real templates have one to four

bool flag_or(const json_field& object, std::string_view name, bool absent) {
  const auto field = object.find(name);
  return field ? field->boolean() : absent;
}

[[noreturn]] void refuse_kind(const json_field& step, const std::string& what) {
  step.refuse(what + " of type " + in_quotes(step.at("type").text()) + " is not supported");
}

/// The steps of a Sequence held under `list`, or the one step itself.
std::vector<json_field> steps_of(const json_field& step, std::string_view list) {
  if (step.at("type").text() != "Sequence") return {step};
  const json_field sequence = step.at(list);
  if (sequence.size() > max_steps) sequence.expected("at most " + std::to_string(max_steps) + " steps");
  std::vector<json_field> steps;
  for (std::size_t i = 0; i < sequence.size(); ++i) {
    steps.push_back(sequence.at(i));
    if (steps.back().at("type").text() == "Sequence") steps.back().refuse("a Sequence inside a Sequence");
  }
  return steps;
}

const std::string& step_text(const json_field& field) {
  const std::string& text = field.text();
  if (text.size() > max_step_bytes) {
    field.refuse(std::to_string(text.size()) + " bytes (at most " + std::to_string(max_step_bytes) +
                 " are accepted)");
  }
  return text;
}

/// The `pattern` of a Replace step; only plain strings.
std::string plain_pattern(const json_field& step) {
  const json_field pattern = step.at("pattern");
  const std::string& text = step_text(pattern.at("String"));
  if (text.empty()) pattern.refuse("an empty pattern");
  return text;
}

void read_normalizer(const json_field& root, tokenizer_settings& settings) {
  const auto normalizer = root.find("normalizer");
  if (!normalizer) return;
  for (const json_field& step : steps_of(*normalizer, "normalizers")) {
    const std::string& type = step.at("type").text();
    if (type == "Prepend") {
      settings.normalizer.push_back({true, {}, step_text(step.at("prepend"))});
    } else if (type == "Replace") {
      settings.normalizer.push_back({false, plain_pattern(step), step_text(step.at("content"))});
    } else if (type == "NFC") {
      settings.normalizer.push_back({false, {}, {}, true});
    } else {
      refuse_kind(step, "a normalizer");
    }
  }
}

/// The scheme of a Metaspace step, in its new spelling or the old one (add_prefix_space).
prefix_scheme read_prefix_scheme(const json_field& step) {
  const auto scheme = step.find("prepend_scheme");
  if (!scheme) return flag_or(step, "add_prefix_space", true) ? prefix_scheme::always : prefix_scheme::never;
  if (scheme->text() == "always") return prefix_scheme::always;
  if (scheme->text() == "first") return prefix_scheme::first;
  if (scheme->text() == "never") return prefix_scheme::never;
  scheme->expected("\"always\", \"first\" or \"never\"");
}

std::string read_word_mark(const json_field& step) {
  const json_field mark = step.at("replacement");
  const std::string& text = mark.text();
  if (text.empty() || text == " " || read_utf8(text, 0).length != text.size()) {
    mark.expected("a single character other than the space");
  }
  return text;
}

split_step read_split(const json_field& step) {
  const std::string& behavior = step.at("behavior").text();
  const bool invert = flag_or(step, "invert", false);
  const bool keeps_matches_only = behavior == "Removed" && invert;
  if (behavior != "Isolated" && !keeps_matches_only) {
    step.refuse("the behavior " + in_quotes(behavior) + (invert ? " inverted" : "") + " is not supported");
  }
  return {step.at("pattern").at("Regex").text(), keeps_matches_only};
}

void read_byte_level(const json_field& step, bool is_first, pre_tokenizer_steps& steps) {
  steps.byte_level = true;
  if (flag_or(step, "add_prefix_space", true)) {
    if (!is_first) step.refuse("add_prefix_space after another step is not supported");
    steps.prefix = prefix_scheme::always;
  }
  if (flag_or(step, "use_regex", true)) steps.splits.push_back({std::string(gpt2_pattern), false});
}

void read_pre_tokenizer(const json_field& root, pre_tokenizer_steps& steps) {
  const auto pre_tokenizer = root.find("pre_tokenizer");
  if (!pre_tokenizer) return;
  const std::vector<json_field> chain = steps_of(*pre_tokenizer, "pretokenizers");
  for (std::size_t i = 0; i < chain.size(); ++i) {
    const json_field& step = chain[i];
    const std::string& type = step.at("type").text();
    if (steps.byte_level || !steps.word_mark.empty()) {
      step.refuse("a step after ByteLevel or Metaspace is not supported");
    }
    if (type == "ByteLevel") {
      read_byte_level(step, i == 0, steps);
    } else if (type == "Split") {
      steps.splits.push_back(read_split(step));
    } else if (type == "Digits") {
      steps.splits.push_back({flag_or(step, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", false});
    } else if (type == "Metaspace" && i == 0) {
      steps.word_mark = read_word_mark(step);
      steps.prefix = read_prefix_scheme(step);
      steps.split_at_word_mark = flag_or(step, "split", true);
    } else {
      refuse_kind(step, "a pre-tokenizer");
    }
  }
}

void read_strip(const json_field& step, bool fused, decoder_steps& decoder) {
  if (!fused) step.refuse("Strip before Fuse is not supported");
  const json_field content = step.at("content");
  if (content.text().size() != 1) content.expected("a single ASCII character");
  decoder.strip_text = content.text();
  decoder.strip_count = step.at("start").integer(0, 1 << 20);
  step.at("stop").integer(0, 0);
}

void read_decoder(const json_field& root, tokenizer_settings& settings) {
  decoder_steps& decoder = settings.decoder;
  const auto field = root.find("decoder");
  if (!field) {
    if (!settings.pre_tokenizer.byte_level) root.refuse("the field \"decoder\" is missing");
    decoder.byte_level = true;
    return;
  }
  const std::vector<json_field> chain = steps_of(*field, "decoders");
  bool fused = false;
  for (const json_field& step : chain) {
    const std::string& type = step.at("type").text();
    if (type == "ByteLevel" && chain.size() == 1) {
      decoder.byte_level = true;
    } else if (type == "Metaspace" && chain.size() == 1) {
      decoder.word_mark = read_word_mark(step);
      decoder.drop_first_marks = read_prefix_scheme(step) != prefix_scheme::never;
    } else if (type == "Replace" && !fused && !decoder.byte_fallback) {
      decoder.replacements.emplace_back(plain_pattern(step), step_text(step.at("content")));
    } else if (type == "ByteFallback" && !fused) {
      decoder.byte_fallback = true;
    } else if (type == "Fuse") {
      fused = true;
    } else if (type == "Strip" && decoder.strip_text.empty()) {
      read_strip(step, fused, decoder);
    } else {
      refuse_kind(step, "a decoder (at this place)");
    }
  }
}

/// Appends the ids that a template's SpecialToken entry stands for.
void append_special(const json_field& processor, const json_field& entry, std::vector<std::int64_t>& ids) {
  const std::string& name = entry.at("SpecialToken").at("id").text();
  const json_field listed = processor.at("special_tokens").at(name).at("ids");
  if (ids.size() + listed.size() > max_template_ids) {
    entry.refuse(std::to_string(ids.size() + listed.size()) + " tokens on one side of the text (at most " +
                 std::to_string(max_template_ids) + " are accepted)");
  }
  for (std::size_t i = 0; i < listed.size(); ++i) {
    ids.push_back(listed.at(i).integer(0, std::numeric_limits<std::int32_t>::max()));
  }
}

void read_template(const json_field& processor, tokenizer_settings& settings) {
  const json_field single = processor.at("single");
  if (single.size() > max_steps) single.expected("at most " + std::to_string(max_steps) + " entries");
  bool past_text = false;
  for (std::size_t i = 0; i < single.size(); ++i) {
    const json_field entry = single.at(i);
    if (entry.find("Sequence")) {
      if (past_text) entry.refuse("the text occurs twice");
      past_text = true;
    } else {
      append_special(processor, entry, past_text ? settings.suffix_ids : settings.prefix_ids);
    }
  }
  if (!past_text) single.refuse("the text itself is missing");
}

void read_post_processor(const json_field& root, tokenizer_settings& settings) {
  const auto post_processor = root.find("post_processor");
  if (!post_processor) return;
  for (const json_field& step : steps_of(*post_processor, "processors")) {
    const std::string& type = step.at("type").text();
    if (type == "TemplateProcessing") {
      if (!settings.prefix_ids.empty() || !settings.suffix_ids.empty()) step.refuse("a second template");
      read_template(step, settings);
    } else if (type != "ByteLevel") {  // which only trims offsets, of no interest here
      refuse_kind(step, "a post-processor");
    }
  }
}

void read_merges(const json_field& merges, tokenizer_settings& settings) {
  if (merges.size() > max_merges) {
    merges.refuse(std::to_string(merges.size()) + " merges (at most " + std::to_string(max_merges) +
                  " are accepted)");
  }
  std::size_t index = 0;
  for (const nlohmann::json& merge : merges.array()) {
    const auto refuse = [&] {
      merges.refuse("merge " + std::to_string(index) + ": \"left right\" or [\"left\", \"right\"] expected");
    };
    if (merge.is_string()) {
      const std::string& both = merge.get_ref<const std::string&>();
      const std::size_t space = both.find(' ');
      if (space == both.npos || both.find(' ', space + 1) != both.npos) refuse();
      settings.merges.emplace_back(both.substr(0, space), both.substr(space + 1));
    } else {
      if (!merge.is_array() || merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) refuse();
      settings.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    }
    if (settings.merges.back().first.empty() || settings.merges.back().second.empty()) refuse();
    ++index;
  }
}

void read_model(const json_field& root, tokenizer_settings& settings) {
  const json_field model = root.at("model");
  // Old files leave the type out; then only BPE has merges.
  if (const auto type = model.find("type"); type && type->text() != "BPE") refuse_kind(model, "a model");
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const auto field = model.find(affix); field && !field->text().empty()) {
      field->refuse("marks inside words are not supported");
    }
  }
  if (const auto dropout = model.find("dropout")) dropout->number(0.0, 0.0);
  const json_field vocab = model.at("vocab");
  if (vocab.object().size() > max_tokens) {
    vocab.refuse(std::to_string(vocab.object().size()) + " tokens (at most " + std::to_string(max_tokens) +
                 " are accepted)");
  }
  for (const auto& [text, id] : vocab.object().get_ref<const nlohmann::json::object_t&>()) {
    const bool usable = id.is_number_integer() && id.get<std::int64_t>() >= 0;
    if (!usable) {
      vocab.refuse("token " + in_quotes(text) + ": an id expected, got " +
                   (id.is_structured() ? "a list or object" : in_quotes(id.dump())));
    }
    if (text.size() > max_token_bytes) {
      vocab.refuse("token " + in_quotes(text) + " has " + std::to_string(text.size()) + " bytes (at most " +
                   std::to_string(max_token_bytes) + " are accepted)");
    }
    settings.tokens.emplace_back(text, id.get<std::int64_t>());
  }
  read_merges(model.at("merges"), settings);
  if (const auto unknown = model.find("unk_token")) settings.unknown_token = unknown->text();
  settings.byte_fallback = flag_or(model, "byte_fallback", false);
  settings.fuse_unknown = flag_or(model, "fuse_unk", false);
  settings.ignore_merges = flag_or(model, "ignore_merges", false);
}

void read_added_tokens(const json_field& root, tokenizer_settings& settings) {
  const auto list = root.find("added_tokens");
  if (!list) return;
  if (list->size() > max_tokens) {
    list->refuse(std::to_string(list->size()) + " tokens (at most " + std::to_string(max_tokens) + " are accepted)");
  }
  for (std::size_t i = 0; i < list->size(); ++i) {
    const json_field entry = list->at(i);
    added_token token;
    token.content = entry.at("content").text();
    token.id = entry.at("id").integer(0, std::numeric_limits<std::int32_t>::max());
    token.takes_space_before = flag_or(entry, "lstrip", false);
    token.takes_space_after = flag_or(entry, "rstrip", false);
    token.normalized = flag_or(entry, "normalized", false);
    token.special = flag_or(entry, "special", false);
    if (token.content.empty() || token.content.size() > max_added_bytes) {
      entry.refuse("content of " + std::to_string(token.content.size()) + " bytes (1 to " +
                   std::to_string(max_added_bytes) + " are accepted)");
    }
    if (flag_or(entry, "single_word", false)) entry.refuse("single_word is not supported");
    settings.added.push_back(std::move(token));
  }
}

/// The text of bos_token or eos_token: a string, or an object with `content`.
std::string read_mark(const json_field& root, std::string_view name) {
  const auto field = root.find(name);
  if (!field) return {};
  return field->is_object() ? field->at("content").text() : field->text();
}

void read_config(std::string_view config_text, tokenizer_settings& settings) {
  constexpr std::string_view source = "tokenizer_config.json";
  const nlohmann::json document = parse_json(config_text, source);
  const json_field root(document, source);
  if (const auto add = root.find("add_bos_token")) settings.add_bos = add->boolean();
  if (const auto add = root.find("add_eos_token")) settings.add_eos = add->boolean();
  settings.bos_token = read_mark(root, "bos_token");
  settings.eos_token = read_mark(root, "eos_token");
}

}  // namespace

tokenizer_settings parse_tokenizer_file(std::string_view text, std::string_view config_text,
                                        std::string_view source) {
  tokenizer_settings settings;
  {  // the document is gone before the next one is read: it may take much memory
    const nlohmann::json document = parse_json(text, source);
    const json_field root(document, source);
    read_model(root, settings);
    read_added_tokens(root, settings);
    read_normalizer(root, settings);
    read_pre_tokenizer(root, settings.pre_tokenizer);
    read_decoder(root, settings);
    read_post_processor(root, settings);
  }
  if (!config_text.empty()) read_config(config_text, settings);
  return settings;
}

}  // namespace mini_llm
