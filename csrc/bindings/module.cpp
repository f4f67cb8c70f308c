#include "register.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled operations of acqcore: raw pointers and sizes in, row states out.";
  register_cpu(m);
  register_cuda(m);
}
