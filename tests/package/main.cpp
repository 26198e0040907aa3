// A stranger's program: the umbrella header and nothing else. Prints the version it was built against.
#include <cstdio>
#include <specattn/specattn.hpp>

#if !defined(CONSUMERS_OWN)
#error "the consumer's own flags did not survive"
#endif

int main() {
  std::printf("specattn %d.%d.%d\n", SPECATTN_VERSION_MAJOR, SPECATTN_VERSION_MINOR, SPECATTN_VERSION_PATCH);
}
