// Every kernel for the oldest device that is supported: builds for the newest one alone would not notice.
#include <specattn/cuda.cuh>

namespace s = specattn;
using device = specattn::cuda;  // ::cuda is the toolkit's

template class s::kv_cache<s::bf16, device>;
template class s::kv_cache<s::fp8_e4m3, device>;
template void s::attend<float, device>(s::context<device>&, const s::attend_args<float, device>&);
template void s::attend<s::bf16, device>(s::context<device>&, const s::attend_args<s::bf16, device>&);
template void s::attend<s::fp8_e4m3, device>(s::context<device>&, const s::attend_args<s::fp8_e4m3, device>&);
template void s::recompute<float, device>(s::context<device>&, const s::recompute_args<float, device>&);
template void s::recompute<s::bf16, device>(s::context<device>&, const s::recompute_args<s::bf16, device>&);
template void s::recompute<s::fp8_e4m3, device>(s::context<device>&, const s::recompute_args<s::fp8_e4m3, device>&);
template void s::recompute_steps<float, device>(s::context<device>&, const s::recompute_steps_args<float, device>&);
template void s::recompute_steps<s::bf16, device>(s::context<device>&,
                                                  const s::recompute_steps_args<s::bf16, device>&);
template void s::recompute_steps<s::fp8_e4m3, device>(s::context<device>&,
                                                      const s::recompute_steps_args<s::fp8_e4m3, device>&);
template void s::mix_importance<float, device>(s::context<device>&, const s::resident_mixture<device>&,
                                               const s::importance_args<device, float>&);
template void s::mix_importance<s::bf16, device>(s::context<device>&, const s::resident_mixture<device>&,
                                                 const s::importance_args<device, s::bf16>&);
template void s::mix_importance<s::fp16, device, s::fp16>(s::context<device>&, const s::resident_mixture<device>&,
                                                          const s::importance_args<device, s::fp16, s::fp16>&);
template void s::select<float, device>(s::context<device>&, const s::weight_rows<float, device>&,
                                       const s::selection_rule&, s::selection_view<device>);
template void s::select<s::fp16, device>(s::context<device>&, const s::weight_rows<s::fp16, device>&,
                                         const s::selection_rule&, s::selection_view<device>);
template void s::sample<device>(s::context<device>&, s::view<const float, 2, device>,
                                s::view<const s::sampler_options, 1, device>, s::view<const std::int64_t, 1, device>,
                                s::random_use, s::view<float, 2, device>, s::view<std::int32_t, 1, device>);
template void s::verify<device>(s::context<device>&, const s::verify_args<device>&);
