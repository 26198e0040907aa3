// Words of this library that other headers take as macros (Qt: slots, signals, emit, foreach, forever; windows.h: near, far,
// small; macOS: check, verify, require): set aside from here to words_end.hpp, where the includer has them again.
// Included as often as needed, so without #pragma once: every header that uses such a word includes both.
#pragma push_macro("slots")
#pragma push_macro("signals")
#pragma push_macro("emit")
#pragma push_macro("foreach")
#pragma push_macro("forever")
#pragma push_macro("near")
#pragma push_macro("far")
#pragma push_macro("small")
#pragma push_macro("check")
#pragma push_macro("verify")
#pragma push_macro("require")
#undef slots
#undef signals
#undef emit
#undef foreach
#undef forever
#undef near
#undef far
#undef small
#undef check
#undef verify
#undef require
