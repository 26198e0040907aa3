// Other libraries' attention behind one interface, so that attend_peers.cu times it as it times ours.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "specattn/scalar.hpp"

namespace bench {

constexpr std::int32_t q_heads = 32, kv_heads = 8, group_heads = q_heads / kv_heads, head_dim = 128;

/// Which positions a pass reads.
enum class reading {
  dense,        ///< all
  one_list,     ///< a list for each sequence, the same for its kv heads
  list_a_head,  ///< a list for each sequence and kv head
};

/// One layer's attention, bf16: slot i of a sequence attends to its kept positions and to positions
/// kv_len … kv_len + i. Key of (sequence, kv head, position): keys + their strides, and the same for values.
struct attend_problem {
  std::int32_t slots = 0;
  std::vector<std::int32_t> kv_lens;
  std::ptrdiff_t sequence_stride = 0, head_stride = 0, position_stride = 0;  ///< in elements
  reading reads = reading::dense;
  std::vector<std::vector<std::int32_t>> kept;  ///< [sequence * kv_heads + kv head], ascending
  const specattn::bf16* q = nullptr;            ///< [sequences, slots, q_heads, head_dim]
  const specattn::bf16* q_by_head = nullptr;    ///< [sequences, kv_heads, slots, group_heads, head_dim]
  std::int32_t batch() const { return static_cast<std::int32_t>(kv_lens.size()); }
};

/// One peer on one problem.
class attend_peer {
 public:
  explicit attend_peer(std::string name) : name_(std::move(name)) {}
  virtual ~attend_peer() = default;

  const std::string& name() const { return name_; }
  virtual bool takes(const attend_problem&) const { return true; }
  /// Allocates and copies what does not change while lengths stay as they are.
  virtual void prepare(const attend_problem& problem) = 0;
  /// What its caller repeats whenever lengths or counts change: host work, and a copy to the device on `stream`.
  virtual void plan(cudaStream_t stream) = 0;
  virtual void run(const specattn::bf16* keys, const specattn::bf16* values, cudaStream_t stream) = 0;
  /// Results, as q or, when by_head(), as q_by_head.
  virtual const specattn::bf16* out() const = 0;
  virtual bool by_head() const = 0;

 private:
  std::string name_;
};

/// The peers whose sources are linked in: each source adds its own before main() begins.
inline std::vector<std::unique_ptr<attend_peer>>& linked_peers() {
  static std::vector<std::unique_ptr<attend_peer>> peers;
  return peers;
}

/// Declared once for each peer, at namespace scope.
template <class Peer>
struct linked_peer {
  linked_peer() { linked_peers().push_back(std::make_unique<Peer>()); }
};

}  // namespace bench
