// What the core offers to device code, used from a kernel: templates show only then that they call host functions.
#include <specattn/attend.hpp>
#include <specattn/attention_state.hpp>
#include <specattn/random.hpp>
#include <specattn/scalar.hpp>
#include <specattn/view.hpp>

template <specattn::storage T>
__global__ void use_kernel(specattn::view<const float, 3, specattn::cuda> in, specattn::kv_view<T, specattn::cuda> kv,
                           specattn::selection_view<specattn::cuda> kept,
                           specattn::view<float, 1, specattn::cuda> out) {
  const auto row = in[0].slice(0, 1);
  specattn::attention_state state{row(0, 0), 1.0f};
  state = specattn::merge(state, specattn::attention_state{in(0, 0, 1), 1.0f}).state;
  const float key = specattn::to_float(*kv.key(0, 1, 0)) + specattn::to_float(specattn::from_float<T>(state.sum));
  const auto drawn = specattn::uniform(1, 2, specattn::random_use::accept);
  out[0] = key * specattn::finish_scale(state) + specattn::log_sum_exp(state) + static_cast<float>(drawn) +
           static_cast<float>(in.size() + kept.groups() + in.extents()[1]);
}

template __global__ void use_kernel<float>(specattn::view<const float, 3, specattn::cuda>,
                                           specattn::kv_view<float, specattn::cuda>,
                                           specattn::selection_view<specattn::cuda>,
                                           specattn::view<float, 1, specattn::cuda>);
template __global__ void use_kernel<specattn::bf16>(specattn::view<const float, 3, specattn::cuda>,
                                                    specattn::kv_view<specattn::bf16, specattn::cuda>,
                                                    specattn::selection_view<specattn::cuda>,
                                                    specattn::view<float, 1, specattn::cuda>);
template __global__ void use_kernel<specattn::fp16>(specattn::view<const float, 3, specattn::cuda>,
                                                    specattn::kv_view<specattn::fp16, specattn::cuda>,
                                                    specattn::selection_view<specattn::cuda>,
                                                    specattn::view<float, 1, specattn::cuda>);
