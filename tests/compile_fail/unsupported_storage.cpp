// Keys and values are float, bf16, fp16 or fp8_e4m3.
// expect: storage
// expect: double
#include <specattn/kv_cache.hpp>

using supported = specattn::kv_view<specattn::bf16, specattn::cpu>;
#ifdef MISUSE
using unsupported = specattn::kv_view<double, specattn::cpu>;
#endif
