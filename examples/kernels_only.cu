// One kernel on device memory that you own: select() turns rows of attention weights into ascending lists of kept
// positions, in a graph whose lengths are read on the device. Checks itself against plain loops. Expect:
//   row 0: 153 of 1000 positions hold 0.901 of the mass
//   row 1: 82 of 500 positions hold 0.901 of the mass
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <specattn/cuda.cuh>
#include <specattn/random.hpp>
#include <vector>

using device = specattn::cuda;  // ::cuda is the toolkit's

namespace {

constexpr int rows = 2, longest = 1000;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

/// Not normalised: mass is relative to a row's own sum.
std::vector<float> attention_like() {
  std::vector<float> weights(rows * longest);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double logit = 12.0 * specattn::uniform(7, i, specattn::random_use::draft);
    weights[i] = static_cast<float>(std::exp(logit) / (1.0 + static_cast<double>(i % 10)));
  }
  return weights;
}

template <class T>
void copy(T* to, const T* from, std::size_t count) {
  check(cudaMemcpy(to, from, count * sizeof(T), cudaMemcpyDefault));
}

/// Whether the list ascends, its mass reaches `share`, and without its lightest it would not.
bool right(const std::vector<float>& weights, int row, int length, const std::int32_t* list, int count,
           double share) {
  double all = 0, kept = 0, lightest = 1e30;
  for (int i = 0; i < length; ++i) all += double(weights[static_cast<std::size_t>(row * longest + i)]);
  for (int i = 0; i < count; ++i) {
    if (i > 0 && list[i] <= list[i - 1]) return false;
    const auto weight = double(weights[static_cast<std::size_t>(row * longest + list[i])]);
    kept += weight;
    lightest = weight < lightest ? weight : lightest;
  }
  std::printf("row %d: %d of %d positions hold %.3f of the mass\n", row, count, length, kept / all);
  return kept >= 0.999999 * share * all && kept - lightest < share * all;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "SKIPPED: no CUDA device\n");
    return 77;
  }
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  specattn::context<device> ctx(stream);

  const std::vector<float> weights = attention_like();
  const std::vector<std::int32_t> lengths = {1000, 500};
  const specattn::buffer<float, device> device_weights(weights.size());
  const specattn::buffer<std::int32_t, device> device_lengths(lengths.size());
  copy(device_weights.data(), weights.data(), weights.size());

  specattn::selection_rule rule;
  rule.top_p = 0.9f;
  rule.sinks = rule.recent = 0;
  specattn::weight_rows<float, device> from;
  from.weights = device_weights.shaped({rows, 1, longest});  // groups, rows of a group, positions; any strides
  from.kv_lens = device_lengths.shaped({rows});
  const specattn::selection<device> kept(rows, longest);
  ctx.reserve_workspace(specattn::select_workspace_bytes(ctx, rows, 1, longest, rule));

  cudaGraph_t graph;
  cudaGraphExec_t ready;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  specattn::select(ctx, from, rule, kept.view());
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&ready, graph, 0));

  copy(device_lengths.data(), lengths.data(), lengths.size());  // after the capture: the graph reads them as it runs
  check(cudaGraphLaunch(ready, stream));
  check(cudaStreamSynchronize(stream));

  std::vector<std::int32_t> lists(rows * longest), counts(rows);
  copy(lists.data(), kept.view().positions.data(), lists.size());
  copy(counts.data(), kept.view().counts.data(), counts.size());
  bool good = true;
  for (int row = 0; row < rows; ++row) {
    const auto at = static_cast<std::size_t>(row);
    good = right(weights, row, lengths[at], lists.data() + row * longest, counts[at], 0.9) && good;
  }
  return good ? 0 : 1;
}
