// Keys and values may be fp8_e4m3; weights to select from may not.
// expect: weights have no scale that 8 bits could be multiples of
#include <specattn/select.hpp>

specattn::importance<specattn::bf16> supported;
#ifdef MISUSE
specattn::importance<specattn::fp8_e4m3> unsupported;
#endif
