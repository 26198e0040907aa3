// Kernels of the CPU as one file of a program uses them; each including file is compiled for a CPU of its own.
#pragma once

#include <specattn/cpu/attend.hpp>
#include <specattn/cpu/kv_cache.hpp>
#include <specattn/cpu/select.hpp>
#include <specattn/cpu/verify.hpp>

template void specattn::attend<float, specattn::cpu>(specattn::context<specattn::cpu>&,
                                                     const specattn::attend_args<float>&);
template void specattn::select<float, specattn::cpu>(specattn::context<specattn::cpu>&,
                                                     const specattn::weight_rows<float>&,
                                                     const specattn::selection_rule&, specattn::selection_view<>);
template void specattn::verify<specattn::cpu>(specattn::context<specattn::cpu>&, const specattn::verify_args<>&);
template class specattn::kv_cache<specattn::bf16, specattn::cpu>;
