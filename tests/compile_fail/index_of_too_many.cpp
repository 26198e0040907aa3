// As many indices as dimensions.
// expect: sizeof...
#include <specattn/view.hpp>

float element(specattn::view<float, 2> v) { return v(1, 2); }
#ifdef MISUSE
float no_element(specattn::view<float, 2> v) { return v(1, 2, 3); }
#endif
