// The tables of decode_bench, from its cells.
#pragma once

#include <ostream>

#include "decode_cells.hpp"

namespace bench {

/// Writes a Markdown report of everything in the file.
void write_report(std::ostream& out, const cell_file& file);

/// Milliseconds that a round's bytes take at the copy bandwidth measured in the cell's run: all weights once a pass,
/// every KV row that was read, and for each phase of it.
struct byte_floor {
  double draft_ms = 0, guide_ms = 0, verify_ms = 0;
  double round_ms() const { return draft_ms + guide_ms + verify_ms; }
};
byte_floor floor_of(const cell& c);

}  // namespace bench
