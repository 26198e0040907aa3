// What a Llama model does to its rows outside its products, on the device: the arithmetic of model/row_math.hpp, fused
// so that every product finds its rows in bf16. Each result depends on its own row alone.
#pragma once

#include <cstdint>

#include "specattn/cuda/context.cuh"
#include "specattn/model.hpp"
#include "specattn/scalar.hpp"
#include "specattn/view.hpp"

namespace mini_llm {

/// Gain and epsilon of an RMSNorm. gain [hidden]
struct device_norm {
  const float* gain = nullptr;
  float eps = 0.0f;
};

template <class T, int Rank>
using device_view = specattn::view<T, Rank, specattn::cuda>;

/// residual = embedding[tokens], and its norm as rms_norm() makes it: the begin of a pass.
/// \param embedding [vocab, hidden]
/// \pre   tokens are in [0, vocab) (not checked)
void embed(specattn::context<specattn::cuda>& ctx, device_view<const std::int32_t, 1> tokens,
           device_view<const specattn::bf16, 2> embedding, device_norm norm, device_view<float, 2> residual,
           device_view<specattn::bf16, 2> normed);

/// normed = x / sqrt(mean(x²) + eps) * gain, rounded to bf16. x, normed [rows, hidden]
void rms_norm(specattn::context<specattn::cuda>& ctx, device_view<const float, 2> x, device_norm norm,
              device_view<specattn::bf16, 2> normed);

/// out = x rounded to bf16. x, out [rows, size]
void round_rows(specattn::context<specattn::cuda>& ctx, device_view<const float, 2> x,
                device_view<specattn::bf16, 2> out);

/// The wanted rows alone, before the head: kept[r] = residual[rows[r]] and out[r] = x[rows[r]] rounded to bf16.
void gather_rows(specattn::context<specattn::cuda>& ctx, device_view<const std::int32_t, 1> rows,
                 device_view<const float, 2> x, device_view<const float, 2> residual,
                 device_view<specattn::bf16, 2> out, device_view<float, 2> kept);

/// active = silu(gate) * up, rounded to bf16. gate_up [rows, 2 * ffn], gate first; active [rows, ffn]
void silu_multiply(specattn::context<specattn::cuda>& ctx, device_view<const float, 2> gate_up,
                   device_view<specattn::bf16, 2> active);

}  // namespace mini_llm
