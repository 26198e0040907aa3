// expect: a specattn::view has between one and five dimensions
#include <specattn/view.hpp>

specattn::view<float, 5> five;
#ifdef MISUSE
specattn::view<float, 6> six;
#endif
