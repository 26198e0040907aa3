// Emulated clusters: see cuda_runtime_api.h.
#pragma once

#include "cuda_runtime_api.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return emulated::here->rank; }
  unsigned num_blocks() const { return emulated::here->size; }
  void barrier_arrive() const {}
  void barrier_wait() const { emulated::meet_cluster(); }
  void sync() const { emulated::meet_cluster(); }
  /// Shared memory is thread-local: a peer's lies at the same distance from its anchor.
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    char* const* anchors = emulated::here->anchors;
    return reinterpret_cast<T*>(anchors[rank] + (reinterpret_cast<char*>(mine) - anchors[emulated::here->rank]));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
