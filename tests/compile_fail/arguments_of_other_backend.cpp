// A CPU context with arguments on the device.
// expect: deduced conflicting types for parameter
// expect: cuda
#include <specattn/specattn.hpp>

void run(specattn::context<specattn::cpu>& ctx, const specattn::attend_args<float, specattn::cpu>& host,
         [[maybe_unused]] const specattn::attend_args<float, specattn::cuda>& device) {
  specattn::attend(ctx, host);
#ifdef MISUSE
  specattn::attend(ctx, device);
#endif
}
