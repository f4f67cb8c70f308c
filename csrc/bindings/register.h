// One registration function per backend, called by module.cpp.
#pragma once
#include <pybind11/pybind11.h>

void register_cpu(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
