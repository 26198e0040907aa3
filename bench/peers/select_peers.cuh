// Other libraries' selections behind one interface, so that select_bench.cu times them as it times ours.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace bench {

/// Rows of fp32 weights in device memory, dense, each of unit mass, and what to keep of them.
struct select_problem {
  std::int64_t rows = 0;
  std::int64_t length = 0;
  float top_p = 0.95f;
  std::int64_t count = 0;  ///< for peers that select by count: the positions that select() keeps on average
};

/// One peer on one problem. Its outputs and scratch are allocated once and used by every run().
class select_peer {
 public:
  select_peer(std::string name, bool by_mass) : name_(std::move(name)), by_mass_(by_mass) {}
  virtual ~select_peer() = default;

  const std::string& name() const { return name_; }
  /// Whether it finds how many positions hold the mass, as select() does; else it is told `count`.
  bool by_mass() const { return by_mass_; }
  virtual bool takes(const select_problem&) const { return true; }
  /// Whether run() can be captured in a graph.
  virtual bool captures() const { return true; }
  virtual void prepare(const select_problem& problem) = 0;
  virtual void run(const float* rows, cudaStream_t stream) = 0;
  /// The positions of a row that the last run() kept, in any order. Copies to the host, synchronises.
  virtual std::vector<std::int32_t> kept(std::int64_t row) const = 0;

 private:
  std::string name_;
  bool by_mass_;
};

/// The peers whose sources are linked in: each source adds its own before main() begins.
inline std::vector<std::unique_ptr<select_peer>>& linked_peers() {
  static std::vector<std::unique_ptr<select_peer>> peers;
  return peers;
}

/// Declared once for each peer, at namespace scope.
template <class Peer>
struct linked_peer {
  linked_peer() { linked_peers().push_back(std::make_unique<Peer>()); }
};

}  // namespace bench
