// Bindings of the cuda backend: builds argument structs from Python arguments. No torch here; pointers are trusted.
#include <stdexcept>
#include <string>

#include "../cuda/launch.h"
#include "register.h"

namespace py = pybind11;
using acqcore::Matrix;
namespace cuda = acqcore::cuda;

namespace {

cuda::LogitStatsArgs logit_stats_args(const Matrix& logits, uintptr_t targets, double temperature, int64_t vocab_start,
                                      bool accumulate, uintptr_t state, uintptr_t index) {
  if (logits.columns >= int64_t(1) << 30) throw std::invalid_argument("logits: expected fewer than 2^30 columns");
  return {logits,
          reinterpret_cast<const int64_t*>(targets),
          temperature,
          vocab_start,
          accumulate,
          reinterpret_cast<double*>(state),
          reinterpret_cast<int64_t*>(index)};
}

cuda::RowStatsArgs row_stats_args(const Matrix& hidden, const Matrix& weight, uintptr_t bias, uintptr_t targets,
                                  double softcap, double scale, double temperature, int64_t vocab_start,
                                  uintptr_t state, uintptr_t index, uintptr_t slots, int64_t slot_count,
                                  uintptr_t products) {
  return {hidden,
          weight,
          reinterpret_cast<const float*>(bias),
          reinterpret_cast<const int64_t*>(targets),
          softcap,
          scale,
          temperature,
          vocab_start,
          reinterpret_cast<double*>(state),
          reinterpret_cast<int64_t*>(index),
          {reinterpret_cast<const cuda::Slot*>(slots), slot_count, reinterpret_cast<float*>(products)}};
}

#if defined(ACQCORE_CUDA)
void row_stats_sm90(const cuda::RowStatsArgs& args, int device, uintptr_t stream, uintptr_t scratch,
                    int64_t scratch_bytes) {
  cuda::row_stats_sm90(args,
                       {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(scratch), scratch_bytes});
}

void logit_stats(const cuda::LogitStatsArgs& args, int device, uintptr_t stream, uintptr_t scratch,
                 int64_t scratch_bytes) {
  cuda::logit_stats(args,
                    {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(scratch), scratch_bytes});
}
#endif

}  // namespace

void register_cuda(py::module_& m) {
  py::class_<cuda::LogitStatsArgs>(m, "CudaLogitStatsArgs")
      .def(py::init(&logit_stats_args), py::arg("logits"), py::arg("targets"), py::arg("temperature"),
           py::arg("vocab_start"), py::arg("accumulate"), py::arg("state"), py::arg("index"));
  m.def("cuda_logit_stats_on_host", &cuda::logit_stats_on_host, py::arg("args"), py::arg("multiprocessors"),
        py::call_guard<py::gil_scoped_release>());
  py::class_<cuda::RowStatsArgs>(m, "CudaRowStatsArgs")
      .def(py::init(&row_stats_args), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("targets"),
           py::arg("softcap"), py::arg("scale"), py::arg("temperature"), py::arg("vocab_start"), py::arg("state"),
           py::arg("index"), py::arg("slots") = 0, py::arg("slot_count") = 0, py::arg("products") = 0);
  m.def("cuda_fold_tiles_on_host", &cuda::fold_tiles_on_host, py::arg("products"), py::arg("args"), py::arg("splits"),
        py::call_guard<py::gil_scoped_release>());
#if defined(ACQCORE_CUDA)
  m.attr("cuda_built") = true;
  m.def(
      "cuda_row_stats_sm90_scratch", [](const cuda::RowStatsArgs& args) { return cuda::row_stats_sm90_scratch(args); },
      py::arg("args"));
  m.def("cuda_row_stats_sm90", &row_stats_sm90, py::arg("args"), py::arg("device"), py::arg("stream"),
        py::arg("scratch"), py::arg("scratch_bytes"), py::call_guard<py::gil_scoped_release>());
  m.def("cuda_unavailable", &cuda::unavailable);
  m.def("cuda_logit_stats_scratch", &cuda::scratch_bytes, py::arg("device"), py::arg("rows"), py::arg("columns"));
  m.def("cuda_logit_stats", &logit_stats, py::arg("args"), py::arg("device"), py::arg("stream"), py::arg("scratch"),
        py::arg("scratch_bytes"), py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda_built") = false;
#endif
}
