// Under -ffast-math NaN logits would go unseen, masked positions read, and exp() be wrong: refused, with the remedy.
// expect: SpecAttn needs NaN, infinities and the order of sums: no -ffast-math or -Ofast (add -fno-fast-math to this target)
// misuse-flags: -ffast-math
#include <specattn/config.hpp>
