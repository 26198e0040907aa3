// A contract header alone has no implementation: the message says which header brings it.
// expect: include <specattn/specattn.hpp>
// expect: attend_impl
#include <specattn/attend.hpp>
#ifdef MISUSE
// without the umbrella header
#else
#include <specattn/specattn.hpp>
#endif

void run(specattn::context<specattn::cpu>& ctx, const specattn::attend_args<float, specattn::cpu>& args) {
  specattn::attend(ctx, args);
}
