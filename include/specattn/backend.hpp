// The two backends as types. A view, a buffer and a context carry one, so that mixing them does not compile.
#pragma once

#include <concepts>

#include "config.hpp"

namespace specattn::inline SPECATTN_DATA {

/// Host memory, worked on by a team of threads. Implemented under cpu/.
struct cpu {};
/// Device memory, worked on along one stream. Implemented under cuda/.
struct cuda {};
/// The same by a name that no other library has: after `using namespace specattn` in a .cu file `cuda` is ambiguous, since
/// the toolkit has a namespace ::cuda.
using device = cuda;

template <class B>
concept backend = std::same_as<B, cpu> || std::same_as<B, cuda>;

}  // namespace specattn::inline SPECATTN_DATA

namespace specattn::inline SPECATTN_CODE {

/// Where an operation runs: context<cpu> is a team of threads and a workspace, context<cuda> a stream and a
/// workspace. Defined in cpu/context.hpp and cuda/context.cuh.
template <backend B>
class context;

}  // namespace specattn::inline SPECATTN_CODE
