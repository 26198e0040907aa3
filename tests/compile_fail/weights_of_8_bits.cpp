// Keys and values may be fp8_e4m3; weights to select from may not.
// expect: weights have no scale that 8 bits could be multiples of
#include <specattn/select.hpp>

specattn::weight_rows<specattn::bf16> supported;
#ifdef MISUSE
specattn::weight_rows<specattn::fp8_e4m3> unsupported;
#endif
