// mix_importance() on the CPU.
#include "specattn/cpu/importance.hpp"

#include "cpu_fixture.hpp"

using importance_fixture = cpu_fixture;

#include "importance/cases.hpp"
