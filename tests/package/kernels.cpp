// A stranger's program of kernels: nothing but the compiler's own headers beside the library's.
#include <specattn/cpu/attend.hpp>
#include <specattn/cpu/importance.hpp>
#include <specattn/cpu/kv_cache.hpp>
#include <specattn/cpu/mask_union.hpp>
#include <specattn/cpu/recompute.hpp>
#include <specattn/cpu/recompute_steps.hpp>
#include <specattn/cpu/sampling.hpp>
#include <specattn/cpu/select.hpp>
#include <specattn/cpu/verify.hpp>
#include <specattn/decode.hpp>
#include <specattn/draft_guide.hpp>

#if defined(EIGEN_WORLD_VERSION)
#error "a kernel's header includes Eigen"
#endif

int main() {}
