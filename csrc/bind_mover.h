#pragma once

#include <pybind11/pybind11.h>

namespace elo {

void bind_mover(pybind11::module_& m);

}  // namespace elo
