// Device memory where the CPU operation reads: the two backends are in the message.
// expect: specattn::
// expect: cuda
// expect: cpu
#include <specattn/attend.hpp>

void fill(specattn::attend_args<float, specattn::cpu>& args, specattn::view<const float, 3, specattn::cpu> host,
          [[maybe_unused]] specattn::view<const float, 3, specattn::cuda> device) {
  args.q = host;
#ifdef MISUSE
  args.q = device;
#endif
}
