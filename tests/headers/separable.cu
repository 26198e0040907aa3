// Separable compilation: what is not inlined into a kernel must fit below the kernel's own bound. And in a .cu file, after
// `using namespace specattn`, the backend has a name that is not also the toolkit's.
#include <specattn/cuda.cuh>
using namespace specattn;

void keep(context<device>& ctx, const weight_rows<float, device>& from, const attend_args<bf16, device>& args,
          selection_view<device> out) {
  select(ctx, from, {}, out);
  attend(ctx, args);
}
