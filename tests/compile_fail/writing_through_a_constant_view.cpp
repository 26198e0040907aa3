// A view of constant elements does not become a view of mutable ones.
// expect: const float
#include <specattn/view.hpp>

specattn::view<const float, 1> as_constant(specattn::view<float, 1> v) { return v; }
#ifdef MISUSE
specattn::view<float, 1> as_mutable(specattn::view<const float, 1> v) { return v; }
#endif
