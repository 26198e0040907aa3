#include "skinny_product.cuh"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstddef>

#include "specattn/cuda/device/copy.cuh"
#include "specattn/cuda/device/mma.cuh"
#include "specattn/cuda/device/overlap.cuh"

namespace mini_llm {
namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::bf16;
namespace detail = specattn::detail;

constexpr int warps = 16;
constexpr int threads = 32 * warps;
constexpr int tile = 8;   // outputs
constexpr int unit = 64;  // inputs a warp takes at a time: 128 bytes of each of a tile's rows
constexpr int unit_bytes = tile * unit * int{sizeof(bf16)};
constexpr int stages = 4;    // units of a warp that are on their way
constexpr int together = 2;  // tiles between two meetings of the warps: a gate's and its up's
constexpr int most_rows = 16;
constexpr int padding = 32;  // elements behind a row of x, against bank conflicts

struct skinny_launch {
  skinny_rows x;
  skinny_result y;
  device_matrix weights;
  std::int32_t rows;
  std::int32_t tiles;  // outputs, or pairs of them, each a CTA's at a time
};

/// The first output of the CTA's tile number i, or -1 behind the last.
__device__ std::int32_t first_output(const skinny_launch& a, std::int32_t i) {
  const bool paired = !a.y.active.empty();
  const std::int32_t which =
      static_cast<std::int32_t>(blockIdx.x) + (paired ? i / 2 : i) * static_cast<std::int32_t>(gridDim.x);
  if (which >= a.tiles) return -1;
  return which * tile + (paired && i % 2 == 1 ? static_cast<std::int32_t>(a.weights.outputs / 2) : 0);
}

/// A warp's units of the CTA's tiles, one after another, brought to its own part of shared memory. Lanes read what they
/// have brought themselves: nobody waits for another. Behind the last output the last is read again.
class weight_stream {
 public:
  __device__ weight_stream(const skinny_launch& a, std::byte* ring, int warp, int lane)
      : a_(a),
        ring_(ring + warp * stages * unit_bytes + lane * 16),
        row_(lane / 4),
        input_(warp * unit + lane % 4 * 8),
        units_((static_cast<std::int32_t>(a.weights.inputs) / unit - warp + warps - 1) / warps) {
    begin_tile();
  }

  __device__ std::int32_t units() const { return units_; }  // of a tile
  __device__ void start_next() {
    if (from_ != nullptr && units_ > 0) {
      const std::uint32_t to = detail::shared_address(ring_ + in_ * unit_bytes);
      detail::copy_16_bytes(to, from_, 16);
      detail::copy_16_bytes(to + unit_bytes / 2, from_ + unit / 2, 16);
      from_ += warps * unit;
      if (++next_unit_ == units_) {
        next_unit_ = 0;
        ++next_tile_;
        begin_tile();
      }
      in_ = in_ + 1 == stages ? 0 : in_ + 1;
    }
    detail::commit_copies();
  }
  /// The lane's elements of the oldest unit: eight of inputs 0 … 31, eight of the others.
  __device__ void take(uint4& low, uint4& high) {
    detail::await_copies<stages - 1>();
    low = *reinterpret_cast<const uint4*>(ring_ + out_ * unit_bytes);
    high = *reinterpret_cast<const uint4*>(ring_ + out_ * unit_bytes + unit_bytes / 2);
    out_ = out_ + 1 == stages ? 0 : out_ + 1;
  }

 private:
  __device__ void begin_tile() {
    const std::int32_t first = first_output(a_, next_tile_);
    if (first < 0) return void(from_ = nullptr);
    const std::int64_t output = min(std::int64_t{first} + row_, a_.weights.outputs - 1);
    from_ = a_.weights.data + output * a_.weights.inputs + input_;
  }

  const skinny_launch& a_;
  std::byte* ring_;
  const bf16* from_ = nullptr;  // of the next unit; none behind the last tile
  std::int32_t row_, input_, units_, next_unit_ = 0, next_tile_ = 0;
  int in_ = 0, out_ = 0;
};

__device__ void store_rounded(bf16* to, float4 x) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
  reinterpret_cast<__nv_bfloat162*>(to)[0] = low;
  reinterpret_cast<__nv_bfloat162*>(to)[1] = high;
}

/// A warp adds up a row's squares, in the order of the lanes whatever rows there are. Loads go out together.
__device__ float scale_of(const skinny_launch& a, std::int32_t row) {
  if (a.x.squares.empty()) return 1.0f;
  constexpr int batch = 16;
  float sum = 0.0f;
  const auto parts = static_cast<std::int32_t>(a.x.squares.extent(1));
  for (auto first = static_cast<std::int32_t>(threadIdx.x) % 32; first < parts; first += batch * 32) {
    float v[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) v[j] = first + j * 32 < parts ? a.x.squares(row, first + j * 32) : 0.0f;
#pragma unroll
    for (int j = 0; j < batch; ++j) sum += v[j];
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return 1.0f / sqrtf(sum / static_cast<float>(a.weights.inputs) + a.x.eps);
}

/// The rows' inputs that a warp multiplies, in pieces of 16 bytes for each lane: unit after unit, row after row.
template <int PieceInputs>
class row_pieces {
 public:
  __device__ row_pieces(const skinny_launch& a, std::int32_t units)
      : rows_(a.rows), end_(units * a.rows * each), warp_(static_cast<std::int32_t>(threadIdx.x) / 32) {}
  __device__ std::int32_t end() const { return end_; }
  __device__ std::int32_t row(std::int32_t piece) const { return piece / each % rows_; }
  __device__ std::int32_t input(std::int32_t piece) const {
    return (piece / each / rows_ * warps + warp_) * unit + piece % each * PieceInputs;
  }

 private:
  static constexpr std::int32_t each = unit / PieceInputs;  // of a row and unit
  std::int32_t rows_, end_, warp_;
};

/// Wide rows to shared memory, rounded. Loads of a lane go out together.
__device__ void take_wide_rows(const skinny_launch& a, bf16* x, std::int32_t stride, std::int32_t units) {
  constexpr int batch = 8;
  const row_pieces<4> pieces(a, units);
  for (std::int32_t first = static_cast<std::int32_t>(threadIdx.x) % 32; first < pieces.end(); first += batch * 32) {
    float4 v[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const std::int32_t piece = first + j * 32;
      if (piece < pieces.end())
        v[j] = *reinterpret_cast<const float4*>(&a.x.wide(pieces.row(piece), pieces.input(piece)));
    }
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const std::int32_t piece = first + j * 32;
      if (piece < pieces.end()) store_rounded(x + pieces.row(piece) * stride + pieces.input(piece), v[j]);
    }
  }
}

/// x = the rows, of which each warp brings what it multiplies itself and waits for no other; and what their sums are to
/// be scaled by, which is there when the warps meet.
__device__ void take_rows(const skinny_launch& a, bf16* x, std::int32_t stride, std::int32_t units, float* scales) {
  const std::int32_t warp = static_cast<std::int32_t>(threadIdx.x) / 32,
                     lane = static_cast<std::int32_t>(threadIdx.x) % 32;
  const bool wide = a.x.rounded.empty();
  const row_pieces<8> pieces(a, wide ? 0 : units);
  for (std::int32_t piece = lane; piece < pieces.end(); piece += 32) {
    const std::int32_t row = pieces.row(piece), input = pieces.input(piece);
    detail::copy_16_bytes(detail::shared_address(x + row * stride + input), &a.x.rounded(row, input), 16);
  }
  detail::commit_copies();
  if (wide) take_wide_rows(a, x, stride, units);
  if (warp < a.rows) {
    const float scale = scale_of(a, warp);
    if (lane == 0) scales[warp] = scale;
  }
  detail::await_copies<0>();
  __syncwarp();
}

/// The sums of Rows × tile by each warp, of the tiles between two meetings.
template <int Rows>
using partial_sums = float[together][warps][Rows * tile];

template <int Rows>
__device__ float total(const partial_sums<Rows>& parts, int which, int element) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < warps; ++w) sum += parts[which][w][element];
  return sum;
}

/// The result that a thread makes of two tiles, and what it meets there: fetched ahead, while the tiles are multiplied.
struct own_result {
  std::int32_t row = 0;
  std::int32_t output = -1;  // none
  float before = 0.0f, gain = 0.0f;
};

template <int Rows>
__device__ own_result result_of(const skinny_launch& a, std::int32_t first) {
  constexpr int elements = Rows * tile;
  const int element = static_cast<int>(threadIdx.x) % elements, which = static_cast<int>(threadIdx.x) / elements;
  own_result own{.row = element / tile};
  if (which >= (a.y.active.empty() ? together : 1) || own.row >= a.rows) return own;
  const std::int32_t of_tile = first_output(a, first + which);
  if (of_tile < 0 || of_tile + element % tile >= a.weights.outputs) return own;
  own.output = of_tile + element % tile;
  if (a.y.add) own.before = a.y.sums(own.row, own.output);
  if (a.y.next.gain != nullptr) own.gain = a.y.next.gain[own.output];
  return own;
}

/// Notes a sum for the product behind. The eight sums of a part lie in eight neighbouring lanes.
__device__ void prepare_next(const skinny_next& next, const own_result& own, float sum) {
  static_assert(skinny_part == tile, "a part of the squares is a row of a tile");
  next.rounded(own.row, own.output) = specattn::from_float<bf16>(sum * own.gain);
  const unsigned lanes = 0xffu << (threadIdx.x % 32 / tile * tile);
  float square = sum * sum;
  for (int distance = tile / 2; distance > 0; distance /= 2) square += __shfl_xor_sync(lanes, square, distance);
  if (own.output % tile == 0) next.squares(own.row, own.output / tile) = square;
}

/// A thread makes its result from the warps' parts.
template <int Rows>
__device__ void finish(const skinny_launch& a, const own_result& own, const partial_sums<Rows>& parts,
                       const float* scales) {
  constexpr int elements = Rows * tile;
  if (own.output < 0) return;
  const int element = static_cast<int>(threadIdx.x) % elements, which = static_cast<int>(threadIdx.x) / elements;
  const float sum = total<Rows>(parts, which, element) * scales[own.row];
  if (!a.y.active.empty()) {
    const float up = total<Rows>(parts, 1, element) * scales[own.row], active = sum / (1.0f + __expf(-sum)) * up;
    a.y.active(own.row, own.output) = specattn::from_float<bf16>(active);
  } else {
    const float result = own.before + sum;
    a.y.sums(own.row, own.output) = result;
    if (a.y.next.gain != nullptr) prepare_next(a.y.next, own, result);
  }
}

/// Products of a unit: an instruction takes 16 inputs, which lanes count in their own order, of x and of weights alike.
template <int Rows>
__device__ void multiply_unit(float (&sum)[4], const bf16* x, std::int32_t eight_rows, uint4 low, uint4 high) {
  const uint4 weights[2] = {low, high};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 upper = *reinterpret_cast<const uint4*>(x + half * (unit / 2));
    uint4 lower{};
    if constexpr (Rows > 8) lower = *reinterpret_cast<const uint4*>(x + eight_rows + half * (unit / 2));
    const std::uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y},
                        second[4] = {upper.z, lower.z, upper.w, lower.w};
    detail::multiply_add<bf16>(sum, first, weights[half].x, weights[half].y);
    detail::multiply_add<bf16>(sum, second, weights[half].z, weights[half].w);
  }
}

template <int Rows>
__global__ void __launch_bounds__(threads) skinny_kernel(const __grid_constant__ skinny_launch a) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ float scales[most_rows];
  auto* const parts = reinterpret_cast<partial_sums<Rows>*>(memory + stages * warps * unit_bytes);  // two, in turn
  auto* const x = reinterpret_cast<bf16*>(parts + 2);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  weight_stream stream(a, memory, warp, lane);
  detail::launch_dependents();
  for (int i = 0; i < stages - 1; ++i) stream.start_next();
  const std::int32_t stride = static_cast<std::int32_t>(a.weights.inputs) + padding, last = a.rows - 1;
  detail::wait_for_previous_kernel();
  take_rows(a, x, stride, stream.units(), scales);
  // Rows beyond the last are read from the last: their sums go nowhere.
  const std::int32_t upper = min(lane / 4, last), lower = min(lane / 4 + 8, last);
  const bf16* const mine = x + upper * stride + warp * unit + lane % 4 * 8;
  for (std::int32_t first = 0; first_output(a, first) >= 0; first += together) {
    partial_sums<Rows>& part = parts[first / together % 2];
    const own_result own = result_of<Rows>(a, first);
    for (int which = 0; which < together && first_output(a, first + which) >= 0; ++which) {
      float sum[4] = {};
      for (std::int32_t i = 0; i < stream.units(); ++i) {
        stream.start_next();
        uint4 low, high;
        stream.take(low, high);
        multiply_unit<Rows>(sum, mine + i * warps * unit, (lower - upper) * stride, low, high);
      }
      float* const to = &part[which][warp][lane / 4 * tile + lane % 4 * 2];
      *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
      if constexpr (Rows > 8) *reinterpret_cast<float2*>(to + 8 * tile) = {sum[2], sum[3]};
    }
    __syncthreads();
    finish<Rows>(a, own, part, scales);
  }
}

int rows_of_kernel(std::ptrdiff_t rows) { return rows <= 8 ? 8 : most_rows; }

std::size_t shared_bytes(std::ptrdiff_t rows, std::ptrdiff_t inputs) {
  const std::size_t ring = std::size_t{stages} * warps * unit_bytes;
  const std::size_t parts =
      2 * sizeof(float) * together * warps * static_cast<std::size_t>(rows_of_kernel(rows)) * tile;
  return ring + parts + sizeof(bf16) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(inputs + padding);
}

/// Never two CTAs on a multiprocessor: of a product that starts while the one before runs, some multiprocessors would
/// get two CTAs and others none, and so on from product to product (Llama-2-7B's of 2 to 4 rows: 14 % more time).
template <int Rows>
void start(const specattn::context<device>& ctx, const skinny_launch& launch) {
  const std::size_t shared = (std::max)(shared_bytes(launch.rows, launch.weights.inputs),
                                        static_cast<std::size_t>(ctx.block_shared_bytes()) / 2);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((std::min)(launch.tiles, std::int32_t{ctx.multiprocessors()})));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream();
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = ctx.code_major() >= 9 ? 1 : 0;
  detail::check_cuda(cudaFuncSetAttribute(skinny_kernel<Rows>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared)),
                     "skinny_product");
  detail::check_cuda(cudaLaunchKernelEx(&config, skinny_kernel<Rows>, launch), "skinny_product");
}

}  // namespace

bool is_skinny(const specattn::context<device>& ctx, std::ptrdiff_t rows, std::ptrdiff_t inputs) {
  return rows <= most_rows && inputs % unit == 0 &&
         shared_bytes(rows, inputs) + most_rows * sizeof(float) <= static_cast<std::size_t>(ctx.block_shared_bytes());
}

void skinny_product(specattn::context<device>& ctx, const skinny_rows& x, const device_matrix& weights,
                    const skinny_result& y) {
  const bool paired = !y.active.empty();
  const auto rows = static_cast<std::int32_t>(x.rounded.empty() ? x.wide.extent(0) : x.rounded.extent(0));
  if (rows == 0) return;
  const skinny_launch launch{
      x, y, weights, rows,
      static_cast<std::int32_t>(paired ? weights.outputs / (2 * tile) : (weights.outputs + tile - 1) / tile)};
  if (rows <= 8) return start<8>(ctx, launch);
  start<most_rows>(ctx, launch);
}

}  // namespace mini_llm
