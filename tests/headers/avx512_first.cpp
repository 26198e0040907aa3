// <immintrin.h> before the library: its warnings are then not silenced by anybody, and there are none.
#include <immintrin.h>

#include <specattn/cpu/attend.hpp>

template void specattn::attend<specattn::bf16, specattn::cpu>(specattn::context<specattn::cpu>&,
                                                              const specattn::attend_args<specattn::bf16>&);
template void specattn::attend<specattn::fp8_e4m3, specattn::cpu>(specattn::context<specattn::cpu>&,
                                                                  const specattn::attend_args<specattn::fp8_e4m3>&);
