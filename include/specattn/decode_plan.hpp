// What a round is to do, decided before it runs: who takes part, how far each drafts, and what is read densely.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cost_model.hpp"
#include "decode_options.hpp"
#include "decode_state.hpp"
#include "guide.hpp"
#include "sequence_table.hpp"

namespace specattn::inline SPECATTN_CODE::detail {

/// One sequence's part in a round.
struct planned_row {
  std::int32_t row = 0;     ///< of the caches
  std::int32_t drafts = 0;  ///< tokens that are drafted and judged
  std::int32_t steps = 0;   ///< draft steps: one a token, and one more where the last token's attention guides, too
  bool dense = false;       ///< its round reads everything, whatever the guide keeps
  bool refresh = false;     ///< keys and values since the last exact one are rewritten first; then it is dense
};

/// What a round does whatever its texts hold: what a captured graph depends on.
struct round_shape {
  std::int32_t drafts = 0;  ///< the most that a row drafts
  std::int32_t steps = 0;   ///< the most draft steps that a row takes
  bool sparse = false;      ///< the guide decides what is read
  bool sampled = false;     ///< some sequence is not greedy
  bool listed = false;      ///< a sparse draft has lists to read
  bool reuse = false;       ///< of lists that a round before has selected
  friend bool operator==(const round_shape&, const round_shape&) = default;
};

/// A round, as a value.
struct round_plan : round_shape {
  std::vector<planned_row> rows;
  std::int32_t longest = 0;  ///< of the texts

  std::int32_t size() const { return static_cast<std::int32_t>(rows.size()); }
  bool any_dense() const {
    return std::any_of(rows.begin(), rows.end(), [](const planned_row& r) { return r.dense; });
  }
  /// The draft has failed before it proposed anything.
  void drop_drafts(bool guide_needs_draft) {
    for (planned_row& row : rows) {
      row.drafts = row.steps = 0;
      row.dense = row.dense || guide_needs_draft;
    }
    drafts = steps = 0;
    listed = reuse = false;
    sparse = sparse && !guide_needs_draft;
  }
};

/// Whose turn it is to record, and whose to reuse what a round before has selected (decode_options::record_every).
class recording_turns {
 public:
  explicit recording_turns(std::int32_t sequences) { rows_.reserve(static_cast<std::size_t>(sequences)); }

  /// Some sequence is not the one it was: the next round records, and no list is of use to it.
  void begin_anew() {
    rounds_ = 0;
    recorded_ = false;
  }
  /// Whether the draft has lists of these cache rows, from whatever round recorded last.
  bool may_continue(const round_plan& plan) const {
    return recorded_ && std::equal(plan.rows.begin(), plan.rows.end(), rows_.begin(), rows_.end(),
                                   [](const planned_row& planned, std::int32_t row) { return planned.row == row; });
  }
  /// Whether a round of these cache rows may read what the last recording one selected.
  bool may_reuse(std::int32_t every, const round_plan& plan) const {
    return rounds_ > 0 && rounds_ < every && (sparse_ || !plan.sparse) && may_continue(plan);
  }
  /// Notes a round; one that drafted nothing leaves lists as they were, and the next one records.
  void take(const round_plan& plan) {
    const bool drafted = plan.drafts > 0;
    if (drafted && !plan.reuse) {
      rows_.clear();
      for (const planned_row& planned : plan.rows) rows_.push_back(planned.row);
      sparse_ = plan.sparse;
      recorded_ = true;
      rounds_ = 0;
    }
    // Where some sequence read everything, what was selected says nothing of it.
    rounds_ = plan.any_dense() || !drafted ? 0 : rounds_ + 1;
  }

 private:
  std::vector<std::int32_t> rows_;  // of the last round that recorded
  std::int32_t rounds_ = 0;         // rounds since the last recording, that one included; 0: the next one records
  bool sparse_ = false;             // whether the target's lists were made, too
  bool recorded_ = false;           // since the last begin_anew()
};

/// Makes plans: as the options say, or, where they are adaptive, as the rounds before suggest.
class round_policy {
 public:
  /// \param guided there is a guide, so that rounds may be sparse
  round_policy(const decode_options& options, const decode_sizes& sizes, const guide_needs& needs, bool guided)
      : options_(options), sizes_(sizes), needs_(needs), guided_(guided), turns_(sizes.sequences) {
    plan_.rows.reserve(static_cast<std::size_t>(sizes.sequences));
    if (!options.adaptive || options.draft_length == 0) return;
    planner_.emplace(double(sizes.target_cache.layers) * sizes.target_cache.kv_heads,
                     double(sizes.draft_cache.layers) * sizes.draft_cache.kv_heads, options.draft_length, guided);
  }

  /// The next round. Nothing is drafted where it would outrun a sequence's limit, the context or the draft's.
  round_plan& plan(sequence_table& sequences) {
    plan_.rows.clear();
    plan_.longest = 0;
    plan_.sampled = false;
    double cached = 0.0;
    bool all_short = true;
    for (std::int32_t row = 0; row < sequences.size(); ++row) {
      if (!sequences.runs(row)) continue;
      const sequence_state& seq = sequences.at(row);
      const auto length = static_cast<std::int32_t>(seq.text.size());
      plan_.rows.push_back(plan_row(row, seq, length));
      plan_.longest = (std::max)(plan_.longest, length);
      plan_.sampled = plan_.sampled || !seq.sampler.greedy();
      all_short = all_short && length - 1 < options_.min_context;
      cached += length;
    }
    if (plan_.rows.empty()) return plan_;
    limit_drafts(cached / plan_.size(), sequences);
    plan_.sparse = guided_ && may_be_sparse_ && !all_short && (plan_.drafts > 0 || !needs_.draft_weights);
    plan_.listed = options_.sparse_draft && plan_.drafts > 0 && turns_.may_continue(plan_);
    plan_.reuse = plan_.drafts > 0 && ((needs_.draft_weights && plan_.sparse) || options_.sparse_draft) &&
                  turns_.may_reuse(options_.record_every, plan_);
    count_steps(sequences);
    return plan_;
  }

  /// Some sequence is not the one it was.
  void begin_anew() { turns_.begin_anew(); }
  /// Notes that the plan's round stands. \param drafts_lost the draft has failed in it
  void take(const round_plan& plan, bool drafts_lost) {
    turns_.take(plan);
    if (drafts_lost) turns_.begin_anew();
  }
  void learn(const round_trace& trace) {
    if (planner_) planner_->learn(trace, kv_len_);
  }
  /// Null where the options are not adaptive.
  const round_planner* planner() const { return planner_ ? &*planner_ : nullptr; }

 private:
  planned_row plan_row(std::int32_t row, const sequence_state& seq, std::int32_t length) const {
    planned_row planned{.row = row};
    planned.drafts = (std::min)(seq.draft_length, seq.max_new_tokens - (length - seq.prompt_length) - 1);
    planned.refresh =
        seq.refreshed || (options_.refresh_every > 0 && seq.rounds_since_refresh >= options_.refresh_every &&
                          seq.exact_length < length - 1);
    planned.dense = planned.refresh || length - 1 < options_.min_context;
    return planned;
  }

  /// How many more tokens both caches can take of a text whose last token is not cached yet.
  std::int32_t room(const sequence_state& seq) const {
    const auto length = static_cast<std::int32_t>(seq.text.size());
    const std::int32_t draft = options_.draft_length > 0 ? sizes_.draft_cache.max_positions + 1 : length;
    return (std::max)(0, (std::min)(sizes_.positions, draft) - length);
  }

  void limit_drafts(double mean_length, const sequence_table& sequences) {
    std::int32_t most = options_.draft_length;
    may_be_sparse_ = true;
    if (planner_) {
      kv_len_ = mean_length;
      const round_setting setting = planner_->choose(plan_.size(), mean_length);
      most = setting.draft_length;
      may_be_sparse_ = setting.sparse;
    }
    plan_.drafts = 0;
    for (planned_row& row : plan_.rows) {
      row.drafts = (std::max)(0, (std::min)({row.drafts, most, room(sequences.at(row.row))}));
      row.dense = row.dense || (needs_.draft_weights && row.drafts == 0);
      plan_.drafts = (std::max)(plan_.drafts, row.drafts);
    }
  }

  /// A draft step a token, and where a round records for its guide, one more on the last drafted token: what that token
  /// asks for, no other step tells. The step draws nothing.
  void count_steps(const sequence_table& sequences) {
    const bool guides = needs_.draft_weights && plan_.sparse && !plan_.reuse;
    plan_.steps = 0;
    for (planned_row& row : plan_.rows) {
      row.steps = row.drafts;
      const auto length = static_cast<std::int32_t>(sequences.at(row.row).text.size());
      const bool fits = length + row.drafts <= sizes_.draft_cache.max_positions;
      if (guides && !row.dense && row.drafts > 0 && row.drafts < sizes_.steps && fits) ++row.steps;
      plan_.steps = (std::max)(plan_.steps, row.steps);
    }
  }

  decode_options options_;
  decode_sizes sizes_;
  guide_needs needs_;
  bool guided_ = false;
  bool may_be_sparse_ = true;  // this round's pace
  recording_turns turns_;
  std::optional<round_planner> planner_;
  double kv_len_ = 0.0;  // of the round, for the planner
  round_plan plan_;
};

}  // namespace specattn::inline SPECATTN_CODE::detail
