// expect: a specattn::buffer holds trivially copyable elements only
#include <specattn/buffer.hpp>
#include <string>

specattn::buffer<int> numbers;
#ifdef MISUSE
specattn::buffer<std::string> strings;
#endif
