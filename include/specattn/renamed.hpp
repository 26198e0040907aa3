// Names that changed before 0.1.0, kept for whoever built on a development version. They go with 0.2.
#pragma once

#include "backend.hpp"
#include "recompute.hpp"
#include "scalar.hpp"
#include "select.hpp"

#include "words_begin.hpp"

namespace specattn::inline SPECATTN_CODE {

template <storage T, backend B = cpu>
using importance [[deprecated("importance is weight_rows now")]] = weight_rows<T, B>;

template <storage T, backend B = cpu>
using key_recording_args [[deprecated("key_recording_args is recompute_steps_args now")]] =
    recompute_steps_args<T, B>;

template <storage T, backend B>
[[deprecated("record_keys() is recompute_steps() now")]] void record_keys(context<B>& ctx,
                                                                          const recompute_steps_args<T, B>& args) {
  recompute_steps(ctx, args);
}

}  // namespace specattn::inline SPECATTN_CODE

#include "words_end.hpp"
